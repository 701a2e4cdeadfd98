"""Float instructions.

FFMA is a float64 product and sum, rounded to float32: in rare cases, one unit in the last place off the fused one. The
functions of the MUFU unit are exact before they are rounded, where the hardware's are off by some units in the last
place; like the hardware's, they take and give subnormal numbers as 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .operation import COMPARISONS, comparison, operation, set_predicates, set_register
from .sass import Instruction
from .state import Getter, State, Step, flushed

ROUNDINGS = "RM RP RZ"


@operation("FADD FADD32I", "FTZ")
def fadd(i: Instruction, state: State) -> Step:
    return _binary(i, state, np.add)


@operation("FMUL FMUL32I", "FTZ")
def fmul(i: Instruction, state: State) -> Step:
    return _binary(i, state, np.multiply)


def _binary(i: Instruction, state: State, function: Callable) -> Step:
    row, flush = state.result_single(i.operands[0]), "FTZ" in i.modifiers
    a, b = (state.single(text, flush) for text in i.operands[1:])

    def step(s):
        row[s] = function(a(s), b(s))

    def flushing(s):
        row[s] = flushed(function(a(s), b(s)))

    return flushing if flush else step


@operation("FFMA FFMA32I", f"FTZ {ROUNDINGS}")
def ffma(i: Instruction, state: State) -> Step:
    row, flush = state.result_single(i.operands[0]), "FTZ" in i.modifiers
    a, b, c = (state.single(text, flush) for text in i.operands[1:])

    def step(s):
        row[s] = np.multiply(a(s), b(s), dtype=np.float64) + c(s)

    def unusual(s):
        value = rounded(np.multiply(a(s), b(s), dtype=np.float64) + c(s), i.modifiers)
        row[s] = flushed(value) if flush else value

    return unusual if i.modifiers else step


def rounded(x: np.ndarray, modifiers: tuple[str, ...]) -> np.ndarray:
    """To float32, in the direction that a modifier names, else to the nearest."""
    near = x.astype(np.float32)
    back = near.astype(x.dtype)
    if "RP" in modifiers:
        return np.where(back < x, np.nextafter(near, np.float32(np.inf)), near)
    if "RM" in modifiers:
        return np.where(back > x, np.nextafter(near, np.float32(-np.inf)), near)
    if "RZ" in modifiers:
        return np.where(np.abs(back) > np.abs(x), np.nextafter(near, np.float32(0)), near)
    return near


@operation("FMNMX", "FTZ")
def fmnmx(i: Instruction, state: State) -> Step:
    row, is_min = state.result_single(i.operands[0]), state.predicate(i.operands[3])
    a, b = (state.single(text, "FTZ" in i.modifiers) for text in i.operands[1:3])

    def step(s):
        x, y = a(s), b(s)
        row[s] = np.where(is_min(s), np.fmin(x, y), np.fmax(x, y))

    return step


@operation("FSETP", f"{COMPARISONS} FTZ")
def fsetp(i: Instruction, state: State) -> Step:
    return set_predicates(i, state, _compared(i, state, i.operands[2:4]))


@operation("FSET", f"{COMPARISONS} FTZ BF")
def fset(i: Instruction, state: State) -> Step:
    return set_register(i, state, _compared(i, state, i.operands[1:3]))


def _compared(i: Instruction, state: State, operands: tuple[str, ...]) -> Getter:
    # The last modifier combines the result with a predicate.
    compare = comparison(i.modifiers[:-1])
    a, b = (state.single(text, "FTZ" in i.modifiers) for text in operands)
    return lambda s: compare(a(s), b(s))


@operation("FCMP", f"{COMPARISONS} FTZ")
def fcmp(i: Instruction, state: State) -> Step:
    """The first source where the third compares with 0, else the second."""
    row, compare = state.result_single(i.operands[0]), comparison(i.modifiers)
    a, b = (state.single(text) for text in i.operands[1:3])
    c = state.single(i.operands[3], "FTZ" in i.modifiers)

    def step(s):
        row[s] = np.where(compare(c(s), np.float32(0)), a(s), b(s))

    return step


_MUFU = {
    "EX2": np.exp2,
    "LG2": np.log2,
    "RCP": np.reciprocal,
    "RSQ": lambda x: 1 / np.sqrt(x),
    "SQRT": np.sqrt,
}


@operation("MUFU", " ".join(_MUFU))
def mufu(i: Instruction, state: State) -> Step:
    row, a, function = (
        state.result_single(i.operands[0]),
        state.single(i.operands[1], flush=True),
        _MUFU[i.modifiers[0]],
    )

    def step(s):
        row[s] = flushed(function(a(s).astype(np.float64)).astype(np.float32))

    return step


@operation("RRO", "EX2")
def rro(i: Instruction, state: State) -> Step:
    """Makes the argument ready for MUFU.EX2, which here needs nothing."""
    row, a = state.result_single(i.operands[0]), state.single(i.operands[1])

    def step(s):
        row[s] = a(s)

    return step


@operation("HADD2", "F32")
def hadd2(i: Instruction, state: State) -> Step:
    """The sum of two float16 as float32."""
    if i.modifiers != ("F32",):
        raise ValueError(f"instruction: not understood: {i}")
    row = state.result_single(i.operands[0])
    a, b = (state.float16(text) for text in i.operands[1:])

    def step(s):
        row[s] = a(s) + b(s)

    return step


# ---- conversions ----


@operation("F2F", "F16 F32 FTZ")
def f2f(i: Instruction, state: State) -> Step:
    """The types are those of the result and of the source."""
    to, source = (modifier for modifier in i.modifiers if modifier != "FTZ")
    row, flush = state.result(i.operands[0]), "FTZ" in i.modifiers
    a = state.single(i.operands[1], flush) if source == "F32" else state.float16(i.operands[1])
    kind, bits = (np.float16, np.uint16) if to == "F16" else (np.float32, np.uint32)

    def step(s):
        row[s] = a(s).astype(kind).view(bits)

    return step


@operation("I2F", f"F32 S32 U32 U64 S64 {ROUNDINGS}")
def i2f(i: Instruction, state: State) -> Step:
    row, source = state.result_single(i.operands[0]), i.modifiers[1]
    if source.endswith("64"):
        kind, pair = np.dtype(f"{'i' if source[0] == 'S' else 'u'}8"), state.u64(i.operands[1])

        def a(s):
            return pair(s).view(kind)
    else:
        a = state.wide(i.operands[1], source == "S32")

    def step(s):  # long double has the 64 bits that the comparison in `rounded` needs
        row[s] = rounded(a(s).astype(np.longdouble), i.modifiers[2:])

    return step


_TO_INTEGER = {"TRUNC": np.trunc, "FLOOR": np.floor, "CEIL": np.ceil}


@operation("F2I", f"FTZ F32 S32 U32 U64 S64 {' '.join(_TO_INTEGER)}")
def f2i(i: Instruction, state: State) -> Step:
    """What is out of range becomes the nearest that is in it, NaN 0."""
    names = [modifier for modifier in i.modifiers if modifier != "FTZ"]
    kind = np.dtype(f"{'i' if names[0][0] == 'S' else 'u'}{int(names[0][1:]) // 8}")
    integral = _TO_INTEGER[names[2]] if len(names) > 2 else np.rint
    a, limits = state.single(i.operands[1], "FTZ" in i.modifiers), np.iinfo(kind)
    rows = [state.result(i.operands[0], n) for n in range(kind.itemsize // 4)]

    def step(s):
        x = integral(np.nan_to_num(a(s), nan=0.0, posinf=np.inf, neginf=-np.inf).astype(np.longdouble))
        bits = np.clip(x, np.longdouble(limits.min), np.longdouble(limits.max)).astype(kind).astype(np.uint64)
        for n, row in enumerate(rows):
            row[s] = bits >> np.uint64(32 * n)

    return step
