"""Fresh memory that holds NaN, so that a result which nobody has written, or a workspace read too early, is seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fresh_memory_is_nan(wanted: bool = True) -> Iterator[None]:
    """Inside, torch.empty and its like return NaN; torch does that itself in its deterministic mode.

    Args:
        wanted: False: memory is as it is outside.
    """
    previous, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(wanted or previous, warn_only=True)  # not every library of a GPU has that mode
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous, warn_only=warns)
