"""Integer and logical instructions. Numbers are 64 bits wide until they are stored into a register."""

from __future__ import annotations

import numpy as np

from .operand import Operand
from .operation import COMPARISONS, comparison, operation, set_predicates, set_register
from .sass import Instruction
from .state import Getter, State, Step

WORD = 0xFFFFFFFF


# ---- sums ----


@operation("IADD IADD32I", "X")
def iadd(i: Instruction, state: State) -> Step:
    return _sum(i, state, i.operands[1:])


@operation("IADD3", "X RS")
def iadd3(i: Instruction, state: State) -> Step:
    """With RS: the upper part, from bit 16 on, of the 33 bits of the first sum, plus the third number."""
    if "RS" not in i.modifiers:
        return _sum(i, state, i.operands[1:])
    row = state.result(i.operands[0])
    a, b, c = (state.wide(text) for text in i.operands[1:])

    def step(s):
        row[s] = (a(s) + b(s) >> 16) + c(s)

    return step


def _sum(i: Instruction, state: State, operands: tuple[str, ...]) -> Step:
    """Minus x is the complement of x plus 1; with X, the carry of the lower words stands for that 1."""
    row, sets_flags, is_extended = state.result(i.operands[0]), i.operands[0].endswith(".CC"), "X" in i.modifiers
    if not sets_flags and not is_extended:
        terms = [state.wide(text) for text in operands]

        def plain(s):
            row[s] = sum(term(s) for term in terms)

        return plain
    negative = [_is_negative(text) for text in operands]
    terms = [
        state.wide(text.replace("-", "~", 1) if minus else text) for text, minus in zip(operands, negative, strict=True)
    ]

    def step(s):
        total = sum(term(s) for term in terms) + (state.carry[s] if is_extended else sum(negative))
        row[s] = total
        if sets_flags:
            state.set_flags(s, total)

    return step


def _is_negative(text: str) -> bool:
    operand = Operand.parse(text)
    return operand.negative and operand.kind != "immediate"  # a negative immediate is just a number


@operation("ISCADD")
def iscadd(i: Instruction, state: State) -> Step:
    return _shifted_sum(i, state)


@operation("LEA", "HI X")
def lea(i: Instruction, state: State) -> Step:
    """With HI: the upper word of the third source and the first, shifted, plus the second."""
    if "HI" not in i.modifiers:
        return _shifted_sum(i, state)
    row, is_extended = state.result(i.operands[0]), "X" in i.modifiers
    a, b, c, shift = (state.wide(text) for text in i.operands[1:])
    if i.operands[0].endswith(".CC") or any(map(_is_negative, i.operands[1:])):
        raise ValueError(f"instruction: not understood: {i}")

    def step(s):
        upper = (c(s) << shift(s)) | (a(s) >> 32 - shift(s))
        row[s] = upper + b(s) + (state.carry[s] if is_extended else 0)

    return step


def _shifted_sum(i: Instruction, state: State) -> Step:
    row, sets_flags = state.result(i.operands[0]), i.operands[0].endswith(".CC")
    a, b, shift = (state.wide(text) for text in i.operands[1:])
    if "X" in i.modifiers or sets_flags and any(map(_is_negative, i.operands[1:])):
        raise ValueError(f"instruction: not understood: {i}")

    def step(s):
        total = (a(s) << shift(s) & WORD) + b(s)
        row[s] = total
        if sets_flags:
            state.set_flags(s, total)

    return step


# ---- products ----

_SUMMANDS = "CLO CHI CBCC CSFU"


@operation("XMAD", f"MRG PSL U16 S16 {_SUMMANDS}")
def xmad(i: Instruction, state: State) -> Step:
    """A product of halves plus a third number.

    PSL shifts the product left by 16. MRG puts the lower half of the second source into the upper half of the result.
    The third number is its lower (CLO) or upper half (CHI), or has the second source, shifted left by 16, added (CBCC).
    CSFU takes 2**16 off for each partial product of a signed upper with an unsigned lower half that is negative, which
    the logical shift of IADD3.RS leaves too large.
    """
    row = state.result(i.operands[0])
    signs = [modifier == "S16" for modifier in i.modifiers if modifier in ("S16", "U16")] or [False, False]
    a, b = (state.half_word(text, is_signed) for text, is_signed in zip(i.operands[1:3], signs, strict=True))
    summand = _summand(i, state)
    shift = 16 if "PSL" in i.modifiers else 0
    if "MRG" not in i.modifiers:

        def step(s):
            row[s] = (a(s) * b(s) << shift) + summand(s)

        return step
    lower = state.half_word(i.operands[2].replace(".H1", ""))

    def merged(s):
        row[s] = (a(s) * b(s) << shift) + summand(s) & 0xFFFF | lower(s) << 16

    return merged


def _summand(i: Instruction, state: State) -> Getter:
    c = state.wide(i.operands[3])
    if "CLO" in i.modifiers:
        return lambda s: c(s) & 0xFFFF
    if "CHI" in i.modifiers:
        return lambda s: c(s) >> 16
    if "CBCC" in i.modifiers:
        whole = state.wide(i.operands[2].replace(".H1", ""))
        return lambda s: c(s) + (whole(s) << 16)
    if "CSFU" in i.modifiers:
        a, b = (state.half_word(text, is_signed=True) for text in i.operands[1:3])
        lower_a, lower_b = (state.half_word(text.replace(".H1", "")) for text in i.operands[1:3])
        return lambda s: (
            c(s) - ((((a(s) < 0) & (lower_b(s) != 0)).astype(np.int64) + ((b(s) < 0) & (lower_a(s) != 0))) << 16)
        )
    return c


# ---- shifts and bits ----


@operation("SHL", "W")
def shl(i: Instruction, state: State) -> Step:
    row = state.result(i.operands[0])
    a, amount = state.wide(i.operands[1]), _amount(i, state, 32)

    def step(s):
        row[s] = a(s) << amount(s)

    return step


@operation("SHR", "U32 W")
def shr(i: Instruction, state: State) -> Step:
    row = state.result(i.operands[0])
    a, amount = state.wide(i.operands[1], "U32" not in i.modifiers), _amount(i, state, 32)

    def step(s):
        row[s] = a(s) >> amount(s)

    return step


@operation("SHF", "L R W HI U64 S64")
def shf(i: Instruction, state: State) -> Step:
    """L: the upper word of the third source and the first, shifted left; R: the lower one, shifted right, HI: the upper."""
    row, is_signed = state.result(i.operands[0]), "S64" in i.modifiers
    low, high = state.wide(i.operands[1]), state.wide(i.operands[3])
    amount = _amount(i, state, 63 if {"U64", "S64"} & set(i.modifiers) else 32)
    out = np.uint64(32 if "L" in i.modifiers or "HI" in i.modifiers else 0)
    kind = np.int64 if is_signed else np.uint64

    def step(s):
        both = (high(s) << 32 | low(s)).view(kind)
        n = amount(s).astype(kind)
        row[s] = (both << n if "L" in i.modifiers else both >> n).view(np.uint64) >> out

    return step


def _amount(i: Instruction, state: State, most: int) -> Getter:
    get, wraps = state.wide(i.operands[2]), "W" in i.modifiers
    return lambda s: get(s) & 31 if wraps else np.minimum(get(s), most)


_LOGIC = {"AND": np.bitwise_and, "OR": np.bitwise_or, "XOR": np.bitwise_xor, "PASS_B": lambda a, b: b}


@operation("LOP LOP32I", "AND OR XOR PASS_B NZ")
def lop(i: Instruction, state: State) -> Step:
    function = _LOGIC[i.modifiers[0]]
    *results, first, second = i.operands
    a, b = state.unsigned(first), state.unsigned(second)
    return _logical(i, state, results, lambda s: function(a(s), b(s)))


@operation("LOP3", "LUT NZ")
def lop3(i: Instruction, state: State) -> Step:
    """Any function of three bits: the last operand is the table of its results."""
    *results, first, second, third, table = i.operands
    a, b, c = (state.unsigned(text) for text in (first, second, third))
    terms = [n for n in range(8) if int(table, 0) >> n & 1]

    def value(s):
        x, y, z = a(s), b(s), c(s)
        result = np.zeros(np.shape(x | y | z), np.uint32)
        for n in terms:
            result |= (x if n & 4 else ~x) & (y if n & 2 else ~y) & (z if n & 1 else ~z)
        return result

    return _logical(i, state, results, value)


def _logical(i: Instruction, state: State, results: list[str], value: Getter) -> Step:
    """With NZ, a predicate says whether the result is not 0."""
    row = state.result(results[-1])
    if "NZ" not in i.modifiers:

        def step(s):
            row[s] = value(s)

        return step
    predicate = state.result_predicate(results[0])

    def tested(s):
        row[s] = result = value(s)
        predicate[s] = result != 0

    return tested


@operation("BFE", "U32")
def bfe(i: Instruction, state: State) -> Step:
    """A field of bits; the second source holds its position and, from bit 8 on, its length."""
    row, is_signed = state.result(i.operands[0]), "U32" not in i.modifiers
    a, where = state.wide(i.operands[1]), state.wide(i.operands[2])

    def step(s):
        position, length = where(s) & 255, where(s) >> 8 & 255
        field = a(s) >> position & (1 << length) - 1
        top = 1 << np.maximum(length - 1, 0)
        row[s] = (field ^ top) - top if is_signed else field

    return step


@operation("BFI")
def bfi(i: Instruction, state: State) -> Step:
    """Inserts the first source's lowest bits into the third one."""
    row = state.result(i.operands[0])
    a, where, c = (state.wide(text) for text in i.operands[1:])

    def step(s):
        position, length = where(s) & 255, where(s) >> 8 & 255
        mask = (1 << length) - 1 << position
        row[s] = c(s) & ~mask | a(s) << position & mask

    return step


@operation("PRMT")
def prmt(i: Instruction, state: State) -> Step:
    """Each byte is that of the eight of both numbers which a digit of the selector names, or 8 bits of its sign."""
    row = state.result(i.operands[0])
    a, selector, c = (state.wide(text) for text in i.operands[1:])

    def step(s):
        both, digits, result = c(s) << 32 | a(s), selector(s), 0
        for n in range(4):
            digit = digits >> 4 * n & 15
            byte = both >> 8 * (digit & 7) & 255
            result = result | np.where(digit & 8, (byte >> 7) * 255, byte) << 8 * n
        row[s] = result

    return step


# ---- comparisons ----


@operation("ISETP", f"{COMPARISONS} U32 X")
def isetp(i: Instruction, state: State) -> Step:
    return set_predicates(i, state, _compared(i, state, i.operands[2:4]))


@operation("ISET", f"{COMPARISONS} U32 X BF")
def iset(i: Instruction, state: State) -> Step:
    return set_register(i, state, _compared(i, state, i.operands[1:3]))


def _compared(i: Instruction, state: State, operands: tuple[str, ...]) -> Getter:
    """With X, of the upper words of two numbers, whose lower words' difference has set the condition codes."""
    a, b = (state.wide(text, "U32" not in i.modifiers) for text in operands)
    compare = comparison(i.modifiers[:-1])
    if "X" not in i.modifiers:
        return lambda s: compare(a(s), b(s))

    def difference(s):
        upper = a(s) - b(s) - 1 + state.carry[s]
        # 1 stands for a difference that only the lower words have.
        return compare(np.where((upper == 0) & ~state.zero[s], 1, upper), 0)

    return difference


@operation("ICMP", f"{COMPARISONS} U32")
def icmp(i: Instruction, state: State) -> Step:
    """The first source where the third compares with 0, else the second."""
    row, compare = state.result(i.operands[0]), comparison(i.modifiers)
    a, b, c = (*map(state.wide, i.operands[1:3]), state.wide(i.operands[3], "U32" not in i.modifiers))

    def step(s):
        row[s] = np.where(compare(c(s), 0), a(s), b(s))

    return step


@operation("IMNMX", "U32 XLO XHI")
def imnmx(i: Instruction, state: State) -> Step:
    """XHI and then XLO: of the upper and the lower words of two numbers; the condition codes say which one is less."""
    row, is_min = state.result(i.operands[0]), state.predicate(i.operands[3])
    a, b = (state.wide(text, "U32" not in i.modifiers) for text in i.operands[1:3])
    if i.operands[0].endswith(".CC") != ("XHI" in i.modifiers):
        raise ValueError(f"instruction: not understood: {i}")

    def step(s):
        x, y = a(s), b(s)
        is_less = x < y
        if "XLO" in i.modifiers:
            is_less = np.where(state.zero[s], is_less, state.sign[s])
        row[s] = np.where(is_less == is_min(s), x, y)
        if "XHI" in i.modifiers:
            state.zero[s], state.sign[s] = x == y, is_less

    return step
