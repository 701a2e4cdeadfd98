"""Sums and products of integers. Numbers are 64 bits wide until they are stored into a register."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from ..operand import Operand
from ..sass import Instruction
from ..state import Getter, Lanes, State, Step, Values
from .table import InstructionTable, not_understood

TABLE = InstructionTable()
_WORD = 0xFFFFFFFF


# ---- sums ----


@TABLE.enter("IADD IADD32I IADD3", "X RS")
def iadd(i: Instruction, state: State) -> Step:
    """The sum of two or three sources; with RS, that of the first two (33 bits) is first shifted right by 16."""
    if "RS" in i.modifiers and i.modifiers != ("RS",):
        raise not_understood(i)
    sources = [_with_sign(text) if i.op == "IADD3" else text for text in i.operands[1:]]
    if "RS" in i.modifiers:
        a, b, c = (state.wide(text) for text in sources)
        return state.set(i.operands[0], lambda s: (a(s) + b(s) >> 16) + c(s))
    is_extended = "X" in i.modifiers
    if not is_extended and not _sets_flags(i):
        numbers = [state.wide(text) for text in sources]
        return state.set(i.operands[0], lambda s: _sum(numbers, s))
    # Minus x is the complement of x plus 1. With X, the carry of the lower words stands for that 1.
    minus = [_is_negative(text) for text in sources]
    numbers = [state.wide("~" + text[1:] if m else text) for text, m in zip(sources, minus, strict=True)]

    def total(s: Lanes) -> Values:
        return _sum(numbers, s) + (state.carry[s] if is_extended else np.int64(sum(minus)))

    return _set_sum(i, state, total)


@TABLE.enter("ISCADD ISCADD32I LEA", "HI X")
def lea(i: Instruction, state: State) -> Step:
    """The first source shifted left, plus the second; with HI, the upper word of the shifted pair (third, first).

    Without a shift, it is 0. Of a generic address, the upper word comes with a predicate, whose meaning is not known;
    LD and ST name it behind the address. Here it is left as it is, and they do without.
    """
    if i.operands[0].startswith("P"):
        return lea(replace(i, operands=i.operands[1:]), state)
    sources = i.operands[1:]
    if len(sources) == (3 if "HI" in i.modifiers else 2):
        sources += ("0x0",)
    is_plain = not i.modifiers and not _sets_flags(i)
    if ("X" in i.modifiers and "HI" not in i.modifiers) or (any(map(_is_negative, sources)) and not is_plain):
        raise not_understood(i)
    a, b, *rest = (state.wide(text) for text in sources)
    if "HI" not in i.modifiers:
        (shift,) = rest
        return _set_sum(i, state, lambda s: (a(s) << shift(s) & _WORD) + b(s))
    c, shift = rest

    def upper(s: Lanes) -> Values:
        shifted = c(s) << shift(s) | a(s) >> 32 - shift(s)
        return (shifted & _WORD) + b(s) + (state.carry[s] if "X" in i.modifiers else 0)

    return _set_sum(i, state, upper)


def _sum(numbers: list[Getter], s: Lanes) -> Values:
    return functools.reduce(np.add, (number(s) for number in numbers))


def _set_sum(i: Instruction, state: State, total: Getter) -> Step:
    if not _sets_flags(i):
        return state.set(i.operands[0], total)
    row = state.result(i.operands[0].removesuffix(".CC"))

    def step(s: Lanes) -> None:
        row[s] = result = total(s)
        state.set_flags(s, result)

    return step


def _with_sign(text: str) -> str:
    """The text of an operand; an immediate of 20 bits, printed without its sign, becomes the signed number."""
    operand = Operand.parse(text)
    if operand.kind != "immediate" or operand.negative:
        return text
    number = operand.as_integer({})
    return hex(number - (1 << 20) if number >> 19 == 1 else number)


def _sets_flags(i: Instruction) -> bool:
    return i.operands[0].endswith(".CC")


def _is_negative(text: str) -> bool:
    operand = Operand.parse(text)
    return operand.negative and operand.kind != "immediate"  # a negative immediate is just a number


# ---- products ----


@TABLE.enter("XMAD", "MRG PSL U16 S16 CLO CHI CBCC CSFU")
def xmad(i: Instruction, state: State) -> Step:
    """A product of half words plus a third number.

    PSL shifts the product left by 16. MRG puts the lower half of the second source into the upper half of the result.
    The third number is its lower (CLO) or its upper half (CHI), or has the second source, shifted left by 16, added
    (CBCC). CSFU is for the upper word of a signed product, whose two middle partial products are summed without signs,
    and takes off 2**16 for each of them that is negative.
    """
    signs = [modifier == "S16" for modifier in i.modifiers if modifier in ("S16", "U16")] or [False, False]
    a, b = (state.half_word(text, is_signed) for text, is_signed in zip(i.operands[1:3], signs, strict=True))
    summand, shift = _summand(i, state), 16 if "PSL" in i.modifiers else 0
    if "MRG" not in i.modifiers:
        return state.set(i.operands[0], lambda s: (a(s) * b(s) << shift) + summand(s))
    lower = state.half_word(_whole(i.operands[2]))
    return state.set(i.operands[0], lambda s: (a(s) * b(s) << shift) + summand(s) & 0xFFFF | lower(s) << 16)


def _summand(i: Instruction, state: State) -> Getter:
    c = state.wide(i.operands[3])
    if "CLO" in i.modifiers:
        return lambda s: c(s) & 0xFFFF
    if "CHI" in i.modifiers:
        return lambda s: c(s) >> 16
    if "CBCC" in i.modifiers:
        second = state.wide(_whole(i.operands[2]))
        return lambda s: c(s) + (second(s) << 16)
    if "CSFU" in i.modifiers:
        upper_a, upper_b = (state.half_word(text, is_signed=True) for text in i.operands[1:3])
        lower_a, lower_b = (state.half_word(_whole(text)) for text in i.operands[1:3])

        def without_signs(s: Lanes) -> Values:
            negative = (upper_a(s) < 0) & (lower_b(s) != 0), (upper_b(s) < 0) & (lower_a(s) != 0)
            return c(s) - (negative[0].astype(np.int64) + negative[1] << 16)

        return without_signs
    return c


def _whole(text: str) -> str:
    return text.replace(".H1", "")
