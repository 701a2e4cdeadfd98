"""The registers, predicates and condition codes of a set of warps, and the operands of instructions on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .operand import TRUE_PREDICATE, ZERO_REGISTER, Operand, predicate_number, register_number

WARP = 32
Lanes = slice | NDArray[Any]  # the lanes that execute an instruction: all of them, or those with these numbers
Values = NDArray[Any]  # one number for each of these lanes
Step = Callable[[Lanes], None]  # an instruction
Getter = Callable[[Lanes], Values]  # a source operand

_DISCARDED = -1  # the row that takes what is written to RZ and PT


class State:
    """Registers, predicates and condition codes as arrays over the lanes, and the constants that all lanes share.

    Args:
        lanes: their number, that of whole warps.
        constants: the constant banks by number.
        special: the special registers, such as SR_TID.X, by name.
    """

    def __init__(self, lanes: int, constants: Mapping[int, bytes], special: Mapping[str, NDArray[Any]]) -> None:
        self.lanes, self.constants, self.special = np.arange(lanes), constants, special
        self.registers = np.zeros((ZERO_REGISTER + 2, lanes), np.uint32)
        self.predicates = np.zeros((TRUE_PREDICATE + 2, lanes), bool)
        self.predicates[TRUE_PREDICATE] = True
        # Condition codes. The carry of a sum of three is up to 2.
        self.carry = np.zeros(lanes, np.int64)
        self.zero, self.sign = np.zeros(lanes, bool), np.zeros(lanes, bool)

    # ---- source operands

    def unsigned(self, text: str) -> Getter:
        """The operand's 32 bits."""
        operand = Operand.parse(text)
        if operand.half:
            raise ValueError(f"operand: half a register is not understood here: {text!r}")
        return self._bits(operand)

    def wide(self, text: str, is_signed: bool = False) -> Getter:
        """The operand as a 64-bit integer, wide enough for sums of three and for 16-bit products."""
        get, kind = self.unsigned(text), np.int32 if is_signed else np.uint32
        return lambda s: get(s).view(kind).astype(np.int64)

    def pair(self, text: str) -> Getter:
        """The 64 bits of a register and the next one; of RZ, 0."""
        number = register_number(text)
        low, high = self.registers[number], self.registers[min(number + 1, ZERO_REGISTER)]
        return lambda s: low[s] | high[s].astype(np.uint64) << np.uint64(32)

    def half_word(self, text: str, is_signed: bool = False) -> Getter:
        """The lower 16 bits, with .H1 the upper ones, as a number of 64 bits."""
        operand = Operand.parse(text)
        get, shift = self._bits(operand), np.uint32(16 if operand.half == "H1" else 0)
        kind = np.int16 if is_signed else np.uint16
        return lambda s: (get(s) >> shift).astype(np.uint16).view(kind).astype(np.int64)

    def float16(self, text: str) -> Getter:
        """The float16 that the operand's suffix names, as float32."""
        operand = Operand.parse(text)
        get, shift = self._bits(operand.without_signs()), np.uint32(16 if operand.half == "H1_H1" else 0)
        return _signed(lambda s: (get(s) >> shift).astype(np.uint16).view(np.float16).astype(np.float32), operand)

    def single(self, text: str, flush: bool = False) -> Getter:
        """The operand as float32; with `flush`, subnormal numbers count as 0."""
        operand = Operand.parse(text)
        if operand.kind == "immediate":
            get = _always(operand.as_float())
        else:
            get = _viewed(self._bits(operand.without_signs()), np.float32)
        get = _signed(get, operand)
        return _then(flushed, get) if flush else get

    def predicate(self, text: str) -> Getter:
        """A predicate, such as P0, !P3 or PT."""
        get = _entries(self.predicates[predicate_number(text.lstrip("!"))])
        return _then(np.logical_not, get) if text.startswith("!") else get

    def condition(self, text: str) -> NDArray[Any]:
        """The lanes for which a condition on the condition codes holds."""
        if text not in ("CC.EQ", "CC.NE", "CC.NEU"):
            raise ValueError(f"condition: not understood: {text!r}")
        return self.zero if text == "CC.EQ" else ~self.zero

    def _bits(self, operand: Operand) -> Getter:
        if operand.kind == "register":
            get = _entries(self.registers[operand.number])
            if operand.absolute:
                get = _viewed(_then(np.abs, _viewed(get, np.int32)), np.uint32)
            if operand.negative:
                get = _then(np.negative, get)
            return _then(np.invert, get) if operand.inverted else get
        value = operand.as_integer(self.constants)
        value = abs(value) if operand.absolute else value
        value = -value if operand.negative else value
        return _always(np.uint32((~value if operand.inverted else value) & 0xFFFFFFFF))

    # ---- destinations

    def result(self, text: str, offset: int = 0) -> NDArray[Any]:
        """The row of a register, or of the one `offset` behind it."""
        if text.endswith(".CC"):
            raise ValueError(f"operand: condition codes are not understood here: {text!r}")
        number = register_number(text)
        return self.registers[_DISCARDED if number == ZERO_REGISTER else number + offset]

    def set(self, text: str, value: Getter) -> Step:
        """The step that puts the lower 32 bits of a value into a register."""
        return _setter(self.result(text), value)

    def set_single(self, text: str, value: Getter) -> Step:
        """The step that puts a value into a register as float32."""
        return _setter(self.result(text).view(np.float32), value)

    def result_predicate(self, text: str) -> NDArray[Any]:
        """The row of a predicate."""
        number = predicate_number(text)
        return self.predicates[_DISCARDED if number == TRUE_PREDICATE else number]

    def set_flags(self, s: Lanes, total: Values) -> None:
        """Set the condition codes of a sum, whose bits from 32 on are the carry."""
        self.carry[s] = total >> 32
        self.zero[s] = total & 0xFFFFFFFF == 0
        self.sign[s] = total & 0x80000000 != 0


# ---- getters and steps ----


def _setter(row: NDArray[Any], value: Getter) -> Step:
    def step(s: Lanes) -> None:
        row[s] = value(s)

    return step


def _entries(row: NDArray[Any]) -> Getter:
    return lambda s: row[s]


def _always(value: np.generic) -> Getter:
    constant = np.asarray(value)
    return lambda s: constant


def _then(function: Callable[[Values], Values], get: Getter) -> Getter:
    return lambda s: function(get(s))


def _viewed(get: Getter, kind: DTypeLike) -> Getter:
    return lambda s: get(s).view(kind)


def _signed(get: Getter, operand: Operand) -> Getter:
    get = _then(np.abs, get) if operand.absolute else get
    return _then(np.negative, get) if operand.negative else get


def flushed(x: Values) -> Values:
    """float32 with 0 in the place of subnormal numbers."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)
