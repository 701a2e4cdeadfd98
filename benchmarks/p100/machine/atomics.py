"""Atomic operations on words of shared memory: ATOMS with MAX, MIN and CAS.

The lanes of a warp come one after the other, in the order of their numbers; the hardware's order is not known.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import Access
from .operand import ZERO_REGISTER, register_number
from .sass import Instruction
from .state import WARP, Lanes, State

_BANKS = 32


class Atomic(Access):
    """The memory operand of an atomic operation, and the operation itself."""

    def __init__(self, i: Instruction, state: State) -> None:
        if i.modifiers not in (("MAX", "S32"), ("MIN",), ("CAS",)):
            raise ValueError(f"instruction: not understood: {i}")
        super().__init__(replace(i, modifiers=()), state)
        self._modifiers, self._is_discarded = i.modifiers, register_number(i.operands[0]) == ZERO_REGISTER
        self._sources = [state.unsigned(text) for text in i.operands[2:]]
        if self._is_discarded == ("CAS" in i.modifiers):
            raise ValueError(f"instruction: not understood: {i}")

    def apply(self, s: Lanes, memory: NDArray[Any], offset: NDArray[Any]) -> None:
        """Change the words at these offsets into the bytes of a memory."""
        words, where, value = memory.view(np.uint32), offset // 4, self._sources[0](s)
        if self._modifiers[0] == "MAX":
            np.maximum.at(words.view(np.int32), where, value.view(np.int32))
        elif self._modifiers[0] == "MIN":
            np.minimum.at(words, where, value)
        else:
            self._swap(s, words, where, value)

    def _swap(self, s: Lanes, words: NDArray[Any], where: NDArray[Any], expected: NDArray[Any]) -> None:
        """Put the second source where the first one is found; the result is what was found."""
        new, found = self._sources[1](s), np.empty(len(where), np.uint32)
        for n, word in enumerate(where.tolist()):
            found[n] = words[word]
            if found[n] == expected[n]:
                words[word] = new[n]
        self.rows[0][s] = found


def turns(lanes: NDArray[Any], address: NDArray[Any], warps: int) -> NDArray[Any]:
    """The cycles that each warp's atomic operation takes: one for every lane that wants the bank with most of them."""
    bank = lanes // WARP * _BANKS + address // 4 % _BANKS
    return np.bincount(bank, minlength=_BANKS * warps).reshape(warps, _BANKS).max(1)
