"""The type of the tables that give each operation its semantics, a function from an instruction to a step."""

from __future__ import annotations

from collections.abc import Callable

from ..sass import Instruction
from ..state import State, Step

Build = Callable[[Instruction, State], Step]


class InstructionTable(dict[str, tuple[Build, frozenset[str]]]):
    """The functions that build steps, by operation, each with the modifiers that it understands."""

    def enter(self, names: str, modifiers: str = "") -> Callable[[Build], Build]:
        """Decorate a function: it builds the steps of these operations."""

        def enter(build: Build) -> Build:
            for name in names.split():
                self[name] = build, frozenset(modifiers.split())
            return build

        return enter


def not_understood(i: Instruction) -> ValueError:
    """The error for an instruction with unknown operation or modifiers."""
    return ValueError(f"not understood: {i}")
