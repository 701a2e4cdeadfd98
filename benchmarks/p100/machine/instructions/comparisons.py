"""Comparisons, the registers and predicates that they set, selections by them, minimum and maximum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..sass import Instruction
from ..state import Getter, Lanes, State, Step, Values
from .table import InstructionTable, not_understood

TABLE = InstructionTable()
Compare = Callable[[Values, Values | np.generic], Values]


def _not(compare: Compare) -> Compare:
    return lambda a, b: ~compare(a, b)


def _ordered(a: Values, b: Values | np.generic) -> Values:
    return (a == a) & (b == b)


# Names with U are the unordered comparisons: true also where one of the two is NaN.
_COMPARE: dict[str, Compare] = {
    "LT": np.less,
    "EQ": np.equal,
    "LE": np.less_equal,
    "GT": np.greater,
    "NE": lambda a, b: (a != b) & _ordered(a, b),
    "GE": np.greater_equal,
    "NUM": _ordered,
    "NAN": _not(_ordered),
    "LTU": _not(np.greater_equal),
    "EQU": lambda a, b: (a == b) | ~_ordered(a, b),
    "LEU": _not(np.greater),
    "GTU": _not(np.less_equal),
    "NEU": np.not_equal,
    "GEU": _not(np.less),
}
_COMBINE = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}
_FLOATS = f"{' '.join((*_COMPARE, *_COMBINE))} FTZ"
_INTEGERS = f"LT EQ LE GT NE GE {' '.join(_COMBINE)} U32"


def _compare(i: Instruction) -> Compare:
    (name,) = (modifier for modifier in i.modifiers if modifier in _COMPARE)
    return _COMPARE[name]


# ---- truth values ----


@TABLE.enter("FSETP", _FLOATS)
def fsetp(i: Instruction, state: State) -> Step:
    return _set_predicates(i, state, _floats_compared(i, state, *i.operands[2:4]))


@TABLE.enter("ISETP", f"{_INTEGERS} X")
def isetp(i: Instruction, state: State) -> Step:
    return _set_predicates(i, state, _integers_compared(i, state, *i.operands[2:4]))


@TABLE.enter("PSETP", " ".join(_COMBINE))
def psetp(i: Instruction, state: State) -> Step:
    return _set_predicates(i, state, _predicates_combined(i, state, *i.operands[2:4]))


@TABLE.enter("FSET", f"{_FLOATS} BF")
def fset(i: Instruction, state: State) -> Step:
    return _set_register(i, state, _floats_compared(i, state, *i.operands[1:3]))


@TABLE.enter("ISET", f"{_INTEGERS} X BF")
def iset(i: Instruction, state: State) -> Step:
    return _set_register(i, state, _integers_compared(i, state, *i.operands[1:3]))


@TABLE.enter("PSET", f"{' '.join(_COMBINE)} BF")
def pset(i: Instruction, state: State) -> Step:
    return _set_register(i, state, _predicates_combined(i, state, *i.operands[1:3]))


def _set_predicates(i: Instruction, state: State, holds: Getter) -> Step:
    """The step that sets two predicates, to `holds` and to its negation, each combined with the last operand."""
    combine, other = _COMBINE[i.modifiers[-1]], state.predicate(i.operands[-1])
    yes, no = map(state.result_predicate, i.operands[:2])

    def step(s: Lanes) -> None:
        result, given = holds(s), other(s)
        yes[s] = combine(result, given)
        no[s] = combine(~result, given)

    return step


def _set_register(i: Instruction, state: State, holds: Getter) -> Step:
    """The step that sets a register to all ones, with BF to 1.0f, where `holds` and the last operand combine to it."""
    combine, other = _COMBINE[i.modifiers[-1]], state.predicate(i.operands[-1])
    row = state.result(i.operands[0].removesuffix(".CC"))
    true, sets_flags = 0x3F800000 if "BF" in i.modifiers else 0xFFFFFFFF, i.operands[0].endswith(".CC")

    def step(s: Lanes) -> None:
        row[s] = value = np.where(combine(holds(s), other(s)), true, 0)
        if sets_flags:
            state.set_flags(s, value)

    return step


def _floats_compared(i: Instruction, state: State, first: str, second: str) -> Getter:
    a, b, compare = (*(state.single(text, "FTZ" in i.modifiers) for text in (first, second)), _compare(i))
    return lambda s: compare(a(s), b(s))


def _integers_compared(i: Instruction, state: State, first: str, second: str) -> Getter:
    """The comparison of two words; with X, of two 64-bit numbers, by the condition codes of their lower words."""
    a, b, compare = (*(state.wide(text, "U32" not in i.modifiers) for text in (first, second)), _compare(i))
    if "X" not in i.modifiers:
        return lambda s: compare(a(s), b(s))

    def compared(s: Lanes) -> Values:
        upper = a(s) - b(s) - 1 + state.carry[s]
        # 1 stands for a difference that only the lower words have.
        return compare(np.where((upper == 0) & ~state.zero[s], 1, upper), np.int64(0))

    return compared


def _predicates_combined(i: Instruction, state: State, first: str, second: str) -> Getter:
    a, b, combine = state.predicate(first), state.predicate(second), _COMBINE[i.modifiers[-2]]
    return lambda s: combine(a(s), b(s))


# ---- selections ----


@TABLE.enter("SEL")
def sel(i: Instruction, state: State) -> Step:
    return _choose(i, state, state.predicate(i.operands[3]))


@TABLE.enter("FCMP", _FLOATS)
def fcmp(i: Instruction, state: State) -> Step:
    """Select the first source where the third compares with 0, else the second."""
    c, compare = state.single(i.operands[3], "FTZ" in i.modifiers), _compare(i)
    if "FTZ" in i.modifiers:
        raise not_understood(i)
    a, b = (state.single(text) for text in i.operands[1:3])
    return state.set_single(i.operands[0], lambda s: np.where(compare(c(s), np.float32(0)), a(s), b(s)))


@TABLE.enter("ICMP", _INTEGERS)
def icmp(i: Instruction, state: State) -> Step:
    """Select the first source where the third compares with 0, else the second."""
    c, compare = state.wide(i.operands[3], "U32" not in i.modifiers), _compare(i)
    return _choose(i, state, lambda s: compare(c(s), np.int64(0)))


def _choose(i: Instruction, state: State, is_first: Getter) -> Step:
    a, b = map(state.unsigned, i.operands[1:3])
    return state.set(i.operands[0], lambda s: np.where(is_first(s), a(s), b(s)))


@TABLE.enter("FMNMX", "FTZ")
def fmnmx(i: Instruction, state: State) -> Step:
    """The minimum where the predicate holds, else the maximum; a number counts before NaN."""
    a, b = (state.single(text, "FTZ" in i.modifiers) for text in i.operands[1:3])
    is_min = state.predicate(i.operands[3])
    return state.set_single(i.operands[0], lambda s: np.where(is_min(s), np.fmin(a(s), b(s)), np.fmax(a(s), b(s))))


@TABLE.enter("IMNMX", "U32 XLO XHI")
def imnmx(i: Instruction, state: State) -> Step:
    """Minimum or maximum; of pairs, XHI compares the upper words and tells XLO the result by the condition codes."""
    a, b = (state.wide(text, "U32" not in i.modifiers) for text in i.operands[1:3])
    is_min, row = state.predicate(i.operands[3]), state.result(i.operands[0].removesuffix(".CC"))
    if i.operands[0].endswith(".CC") != ("XHI" in i.modifiers):
        raise not_understood(i)

    def step(s: Lanes) -> None:
        x, y = a(s), b(s)
        is_less = np.where(state.zero[s], x < y, state.sign[s]) if "XLO" in i.modifiers else x < y
        row[s] = np.where(is_less == is_min(s), x, y)
        if "XHI" in i.modifiers:
            state.zero[s], state.sign[s] = x == y, is_less

    return step
