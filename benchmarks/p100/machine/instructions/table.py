"""The table of what instructions mean: each operation is a function from an instruction to a step on the state."""

from __future__ import annotations

from collections.abc import Callable

from ..sass import Instruction
from ..state import State, Step

Build = Callable[[Instruction, State], Step]


class Table(dict[str, tuple[Build, frozenset[str]]]):
    """By operation: what makes a step of an instruction, and the modifiers that it understands."""

    def enter(self, names: str, modifiers: str = "") -> Callable[[Build], Build]:
        """Enters a function for these operations."""

        def enter(build: Build) -> Build:
            for name in names.split():
                self[name] = build, frozenset(modifiers.split())
            return build

        return enter


def not_understood(i: Instruction) -> ValueError:
    """The error for an instruction that nothing is known about."""
    return ValueError(f"not understood: {i}")
