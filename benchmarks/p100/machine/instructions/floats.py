"""Float instructions.

FFMA is a float64 product and sum, rounded to float32: in rare cases, one unit in the last place off the fused one. The
functions of the MUFU unit are exact before they are rounded, where the hardware's are off by some units in the last
place; like the hardware's, they take and give subnormal numbers as 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..sass import Instruction
from ..state import Lanes, State, Step, Values, flushed
from .table import InstructionTable, not_understood

TABLE = InstructionTable()
_ROUNDINGS = "RM RP RZ"


@TABLE.enter("FADD FADD32I", "FTZ")
def fadd(i: Instruction, state: State) -> Step:
    return _binary(i, state, np.add)


@TABLE.enter("FMUL FMUL32I", "FTZ")
def fmul(i: Instruction, state: State) -> Step:
    return _binary(i, state, np.multiply)


def _binary(i: Instruction, state: State, function: Callable[[Values, Values], Values]) -> Step:
    flush = "FTZ" in i.modifiers
    a, b = (state.single(text, flush) for text in i.operands[1:])
    if flush:
        return state.set_single(i.operands[0], lambda s: flushed(function(a(s), b(s))))
    return state.set_single(i.operands[0], lambda s: function(a(s), b(s)))


@TABLE.enter("FFMA FFMA32I", f"FTZ {_ROUNDINGS}")
def ffma(i: Instruction, state: State) -> Step:
    flush = "FTZ" in i.modifiers
    a, b, c = (state.single(text, flush) for text in i.operands[1:])
    if not i.modifiers:
        return state.set_single(i.operands[0], lambda s: np.multiply(a(s), b(s), dtype=np.float64) + c(s))
    narrow = flushed if flush else np.asarray

    def value(s: Lanes) -> Values:
        return narrow(_rounded(np.multiply(a(s), b(s), dtype=np.float64) + c(s), i.modifiers))

    return state.set_single(i.operands[0], value)


def _rounded(x: Values, modifiers: tuple[str, ...]) -> Values:
    """The nearest float32, or the next one in the direction that a modifier names."""
    near = x.astype(np.float32)
    back = near.astype(x.dtype)
    if "RP" in modifiers:
        return np.where(back < x, np.nextafter(near, np.float32(np.inf)), near)
    if "RM" in modifiers:
        return np.where(back > x, np.nextafter(near, np.float32(-np.inf)), near)
    if "RZ" in modifiers:
        return np.where(np.abs(back) > np.abs(x), np.nextafter(near, np.float32(0)), near)
    return near


_FUNCTIONS: dict[str, Callable[[Values], Values]] = {
    "EX2": np.exp2,
    "LG2": np.log2,
    "RCP": np.reciprocal,
    "RSQ": lambda x: 1 / np.sqrt(x),
    "SQRT": np.sqrt,
}


@TABLE.enter("MUFU", " ".join(_FUNCTIONS))
def mufu(i: Instruction, state: State) -> Step:
    a, function = state.single(i.operands[1], flush=True), _FUNCTIONS[i.modifiers[0]]
    return state.set_single(i.operands[0], lambda s: flushed(function(a(s).astype(np.float64)).astype(np.float32)))


@TABLE.enter("RRO", "EX2")
def rro(i: Instruction, state: State) -> Step:
    """The range reduction before MUFU.EX2, which here changes nothing."""
    return state.set_single(i.operands[0], state.single(i.operands[1]))


@TABLE.enter("HADD2", "F32")
def hadd2(i: Instruction, state: State) -> Step:
    """The sum of two float16 as float32."""
    if i.modifiers != ("F32",):
        raise not_understood(i)
    a, b = (state.float16(text) for text in i.operands[1:])
    return state.set_single(i.operands[0], lambda s: a(s) + b(s))


# ---- conversions ----


@TABLE.enter("F2F", "F16 F32 FTZ")
def f2f(i: Instruction, state: State) -> Step:
    """Convert between float16 and float32; the modifiers name the type of the result, then that of the source."""
    to, source = (modifier for modifier in i.modifiers if modifier != "FTZ")
    a = state.single(i.operands[1], "FTZ" in i.modifiers) if source == "F32" else state.float16(i.operands[1])
    if to == "F32":
        return state.set_single(i.operands[0], a)
    return state.set(i.operands[0], lambda s: a(s).astype(np.float16).view(np.uint16))


@TABLE.enter("I2F", f"F32 S32 U32 U64 S64 {_ROUNDINGS}")
def i2f(i: Instruction, state: State) -> Step:
    source = i.modifiers[1]
    if source.endswith("64"):
        pair, kind = state.pair(i.operands[1]), np.int64 if source == "S64" else np.uint64
    else:
        pair, kind = state.wide(i.operands[1], source == "S32"), np.int64
    # A long double holds all 64 bits.
    return state.set_single(
        i.operands[0], lambda s: _rounded(pair(s).view(kind).astype(np.longdouble), i.modifiers[2:])
    )


_TO_INTEGRAL = {"TRUNC": np.trunc, "FLOOR": np.floor, "CEIL": np.ceil}


@TABLE.enter("F2I", f"FTZ F32 S32 U32 U64 S64 {' '.join(_TO_INTEGRAL)}")
def f2i(i: Instruction, state: State) -> Step:
    """Convert to an integer; numbers out of range become the nearest one in it, NaN 0."""
    names = [modifier for modifier in i.modifiers if modifier != "FTZ"]
    kind = np.dtype(f"{'i' if names[0][0] == 'S' else 'u'}{int(names[0][1:]) // 8}")
    integral = _TO_INTEGRAL[names[2]] if len(names) > 2 else np.rint
    a, least, most = state.single(i.operands[1], "FTZ" in i.modifiers), np.iinfo(kind).min, np.iinfo(kind).max
    rows = [state.result(i.operands[0], n) for n in range(kind.itemsize // 4)]

    def step(s: Lanes) -> None:
        x = integral(np.where(np.isnan(a(s)), 0, a(s)).astype(np.longdouble))
        bits = np.clip(x, np.longdouble(least), np.longdouble(most)).astype(kind).astype(np.uint64)
        for n, row in enumerate(rows):
            row[s] = bits >> np.uint64(32 * n)

    return step
