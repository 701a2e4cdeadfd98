"""A place where something else can be put for a while, in every thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

ValueT = TypeVar("ValueT")


class Seam(Generic[ValueT]):
    """A value that is replaced inside a `with` block.

    Not for the thread alone: a backward pass that autograd runs in a thread of its own has to find the same.
    """

    def __init__(self, value: ValueT) -> None:
        self.value = value

    @contextmanager
    def replaced(self, value: ValueT) -> Iterator[None]:
        """Inside, the value is this one."""
        previous, self.value = self.value, value
        try:
            yield
        finally:
            self.value = previous
