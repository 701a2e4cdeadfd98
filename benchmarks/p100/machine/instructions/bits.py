"""Shifts, logical functions, bit fields. Numbers are 64 bits wide until they are stored into a register."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..sass import Instruction
from ..state import Getter, Lanes, State, Step, Values
from .table import InstructionTable

TABLE = InstructionTable()


@TABLE.enter("SHL", "W")
def shl(i: Instruction, state: State) -> Step:
    a, amount = state.wide(i.operands[1]), _amount(i, state, 32)
    return state.set(i.operands[0], lambda s: a(s) << amount(s))


@TABLE.enter("SHR", "U32 W")
def shr(i: Instruction, state: State) -> Step:
    a, amount = state.wide(i.operands[1], "U32" not in i.modifiers), _amount(i, state, 32)
    return state.set(i.operands[0], lambda s: a(s) >> amount(s))


@TABLE.enter("SHF", "L R W HI U64 S64")
def shf(i: Instruction, state: State) -> Step:
    """Shift two words, the third source on top; the result is the upper word with L and HI, else the lower."""
    low, high = state.wide(i.operands[1]), state.wide(i.operands[3])
    amount = _amount(i, state, 63 if {"U64", "S64"} & {*i.modifiers} else 32)
    kind = np.int64 if "S64" in i.modifiers else np.uint64
    shift = np.left_shift if "L" in i.modifiers else np.right_shift
    word = np.uint64(32 if {"L", "HI"} & {*i.modifiers} else 0)

    def value(s: Lanes) -> Values:
        both = (high(s) << 32 | low(s)).view(kind)
        return shift(both, amount(s).astype(kind)).view(np.uint64) >> word

    return state.set(i.operands[0], value)


def _amount(i: Instruction, state: State, most: int) -> Getter:
    """The shift amount; W takes it modulo 32."""
    get, wraps = state.wide(i.operands[2]), "W" in i.modifiers
    return lambda s: get(s) & 31 if wraps else np.minimum(get(s), most)


_LOGIC: dict[str, Callable[[Values, Values], Values]] = {
    "AND": np.bitwise_and,
    "OR": np.bitwise_or,
    "XOR": np.bitwise_xor,
    "PASS_B": lambda a, b: b,
}


@TABLE.enter("LOP LOP32I", "AND OR XOR PASS_B NZ")
def lop(i: Instruction, state: State) -> Step:
    *results, first, second = i.operands
    a, b, function = state.unsigned(first), state.unsigned(second), _LOGIC[i.modifiers[0]]
    return _set_logical(i, state, results, lambda s: function(a(s), b(s)))


@TABLE.enter("LOP3", "LUT NZ")
def lop3(i: Instruction, state: State) -> Step:
    """A logical function of three sources; the last operand is its truth table."""
    *results, first, second, third, table = i.operands
    a, b, c = (state.unsigned(text) for text in (first, second, third))
    terms = [n for n in range(8) if int(table, 0) >> n & 1]

    def value(s: Lanes) -> Values:
        x, y, z = a(s), b(s), c(s)
        result = x & np.uint32(0)
        for n in terms:
            result = result | (x if n & 4 else ~x) & (y if n & 2 else ~y) & (z if n & 1 else ~z)
        return result

    return _set_logical(i, state, results, value)


def _set_logical(i: Instruction, state: State, results: list[str], value: Getter) -> Step:
    """The step that stores a logical result and, with NZ, a predicate: whether the result is not 0."""
    if "NZ" not in i.modifiers:
        return state.set(results[0], value)
    predicate, row = state.result_predicate(results[0]), state.result(results[1])

    def step(s: Lanes) -> None:
        row[s] = result = value(s)
        predicate[s] = result != 0

    return step


@TABLE.enter("BFE", "U32")
def bfe(i: Instruction, state: State) -> Step:
    """Extract a bit field; the second source holds its position and, from bit 8 on, its length."""
    a, where, is_signed = state.wide(i.operands[1]), state.wide(i.operands[2]), "U32" not in i.modifiers

    def value(s: Lanes) -> Values:
        position, length = where(s) & 255, where(s) >> 8 & 255
        field = a(s) >> position & (1 << length) - 1
        sign = 1 << np.maximum(length - 1, 0)
        return (field ^ sign) - sign if is_signed else field

    return state.set(i.operands[0], value)


@TABLE.enter("BFI")
def bfi(i: Instruction, state: State) -> Step:
    """Insert the first source's lowest bits into the third one."""
    a, where, c = (state.wide(text) for text in i.operands[1:])

    def value(s: Lanes) -> Values:
        position, length = where(s) & 255, where(s) >> 8 & 255
        mask = (1 << length) - 1 << position
        return c(s) & ~mask | a(s) << position & mask

    return state.set(i.operands[0], value)


@TABLE.enter("PRMT")
def prmt(i: Instruction, state: State) -> Step:
    """Permute bytes: each digit of the selector names one of the eight bytes of both numbers, or its sign, repeated."""
    a, selector, c = (state.wide(text) for text in i.operands[1:])

    def value(s: Lanes) -> Values:
        both = c(s) << 32 | a(s)
        result = np.zeros_like(both)
        for n in range(4):
            digit = selector(s) >> 4 * n & 15
            byte = both >> 8 * (digit & 7) & 255
            result = result | np.where(digit & 8, (byte >> 7) * 255, byte) << 8 * n
        return result

    return state.set(i.operands[0], value)
