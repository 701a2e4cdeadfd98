"""The table of PTX instructions to try, each with what Python and numpy compute for it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tests.support.ptx_numbers import WIDTH, encode, flushed, rounded


@dataclass(frozen=True)
class Case:
    """`extra` is written behind the operands."""

    opcode: str
    types: str  # of the result, then of the operands
    expected: Callable
    extra: str = ""
    tolerance: float = 0.0

    def __str__(self) -> str:
        return self.opcode + (f"[{self.extra.strip(', ')}]" if self.extra else "")


CASES: list[Case] = []


def case(opcode: str, types: str, expected: Callable, extra: str = "", tolerance: float = 0.0) -> None:
    CASES.append(Case(opcode, types, expected, extra, tolerance))


def truncated_division(a: int, b: int) -> tuple[int, int] | None:
    if b == 0:
        return None  # not specified
    quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return quotient, a - quotient * b


def leading_bit(a: int) -> int:
    return (~a if a < 0 else a).bit_length() - 1


def field(a: int, position: int, length: int, width: int, signed: bool) -> int:
    position, length = position & 255, length & 255
    if length == 0:
        return 0
    sign = a >> min(position + length - 1, width - 1) & 1 if signed else 0
    return sum((a >> (position + i) & 1 if i < length and position + i < width else sign) << i for i in range(width))


def inserted(a: int, b: int, position: int, length: int, width: int) -> int:
    mask = (((1 << (length & 255)) - 1) << (position & 255)) & ((1 << width) - 1)
    return b & ~mask | (a << (position & 255)) & mask


def permuted(a: int, b: int, selection: int) -> int:
    data, result = (b << 32 | a).to_bytes(8, "little"), []
    for i in range(4):
        byte = data[selection >> 4 * i & 7]
        result.append((255 if byte & 128 else 0) if selection >> 4 * i & 8 else byte)
    return int.from_bytes(result, "little")


def clamped(value: int, type_: str) -> int:
    width = WIDTH[type_]
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if type_[0] == "s" else (0, (1 << width) - 1)
    return min(max(value, low), high)


def integer_cases() -> None:
    for t in ["s16", "u16", "s32", "u32", "s64", "u64"]:
        width, three = WIDTH[t], f"{t} {t} {t}"
        case(f"add.{t}", three, operator.add)
        case(f"sub.{t}", three, operator.sub)
        case(f"mul.lo.{t}", three, operator.mul)
        case(f"mul.hi.{t}", three, lambda a, b, width=width: a * b >> width)
        case(f"mad.lo.{t}", f"{three} {t}", lambda a, b, c: a * b + c)
        case(f"div.{t}", three, lambda a, b: (truncated_division(a, b) or [None])[0])
        case(f"rem.{t}", three, lambda a, b: (truncated_division(a, b) or [None, None])[1])
        case(f"min.{t}", three, min)
        case(f"max.{t}", three, max)
        case(f"sad.{t}", f"{three} {t}", lambda a, b, c: c + abs(a - b))
        case(f"shr.{t}", f"{t} {t} count", operator.rshift)
        if t[0] == "s":
            case(f"abs.{t}", f"{t} {t}", abs)
            case(f"neg.{t}", f"{t} {t}", operator.neg)
        if width < 64:
            wide = f"{t[0]}{2 * width}"
            case(f"mul.wide.{t}", f"{wide} {t} {t}", operator.mul)
            case(f"mad.wide.{t}", f"{wide} {t} {t} {wide}", lambda a, b, c: a * b + c)
        if width > 16:
            case(f"mad.hi.{t}", f"{three} {t}", lambda a, b, c, width=width: (a * b >> width) + c)
            case(f"bfind.{t}", f"u32 {t}", leading_bit)
            signed = t[0] == "s"
            case(
                *(f"bfe.{t}", f"{t} {t} count count"),
                lambda a, p, n, width=width, signed=signed: field(a, p, n, width, signed),
            )
    case("bfind.shiftamt.u32", "u32 u32", lambda a: 31 - leading_bit(a) if a else -1)
    case("add.sat.s32", "s32 s32 s32", lambda a, b: clamped(a + b, "s32"))
    case("sub.sat.s32", "s32 s32 s32", lambda a, b: clamped(a - b, "s32"))


def bit_cases() -> None:
    for t in ("b16", "b32", "b64"):
        width = WIDTH[t]
        for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
            case(f"{name}.{t}", f"{t} {t} {t}", function)
        case(f"not.{t}", f"{t} {t}", operator.invert)
        case(f"cnot.{t}", f"{t} {t}", lambda a: a == 0)
        case(f"shl.{t}", f"{t} {t} count", lambda a, n: a << n if n < 64 else 0)
        case(f"shr.{t}", f"{t} {t} count", operator.rshift)
        case(f"selp.{t}", f"{t} {t} {t} pred", lambda a, b, p: a if p else b)
        if width > 16:
            case(f"popc.{t}", f"u32 {t}", int.bit_count)
            case(f"clz.{t}", f"u32 {t}", lambda a, width=width: width - a.bit_length())
            case(f"brev.{t}", f"{t} {t}", lambda a, width=width: int(f"{a:0{width}b}"[::-1], 2))
            case(
                *(f"bfi.{t}", f"{t} {t} {t} count count"),
                lambda a, b, p, n, width=width: inserted(a, b, p, n, width),
            )
    for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        case(f"{name}.pred", "pred pred pred", function)
    case("not.pred", "pred pred", operator.not_)
    for mode, counted in (("wrap", lambda n: n & 31), ("clamp", lambda n: min(n, 32))):
        case(f"shf.l.{mode}.b32", "b32 b32 b32 count", lambda a, b, n, f=counted: (b << 32 | a) << f(n) >> 32)
        case(f"shf.r.{mode}.b32", "b32 b32 b32 count", lambda a, b, n, f=counted: (b << 32 | a) >> f(n))
    case("prmt.b32", "b32 b32 b32 b32", permuted)
    case("lop3.b32", "b32 b32 b32 b32", lambda a, b, c: a & b | ~a & c, ", 0xca")
    case("lop3.b32", "b32 b32 b32 b32", lambda a, b, c: a ^ b ^ c, ", 0x96")


def is_special(*values: float) -> bool:
    return any(math.isnan(x) or math.isinf(x) for x in values)


def exactly(function: Callable, type_: str, mode: str = "rn", flush: bool = False, saturate: bool = False) -> Callable:
    """The exact result of finite numbers, rounded once; rows with others, or with a zero as result, are left out."""

    def expected(*values: float) -> float | None:
        values = tuple(map(flushed, values)) if flush else values
        if is_special(*values):
            return None
        try:
            exact = function(*map(Fraction, values))
        except ZeroDivisionError:
            return None
        if exact == 0:
            return None
        result = rounded(exact, type_, mode)
        result = flushed(result) if flush else result
        return (min(result, 1.0) if result > 0 else 0.0) if saturate else result

    return expected


def in_numpy(function: Callable, type_: str) -> Callable:
    def expected(*values: float) -> float:
        with np.errstate(all="ignore"):
            return float(function(*(np.array(value, type_) for value in values)))

    return expected


def pairs(function: Callable) -> Callable:
    def expected(*values: tuple) -> tuple | None:
        results = tuple(function(*parts) for parts in zip(*values, strict=True))
        return None if None in results else results

    return expected


def either_nan(a: float, b: float) -> bool:
    return math.isnan(a) or math.isnan(b)


def smaller(a: float, b: float) -> float:
    if either_nan(a, b):
        return b if math.isnan(a) else a
    return min((a, b), key=lambda x: (x, math.copysign(1, x)))


def larger(a: float, b: float) -> float:
    return -smaller(-a, -b)


def or_nan(function: Callable) -> Callable:
    return lambda a, b: math.nan if either_nan(a, b) else function(a, b)


ARITHMETIC = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def float_cases() -> None:
    for name, function in ARITHMETIC.items():
        case(f"{name}.f32", "f32 f32 f32", in_numpy(function, "float32"))
        case(f"{name}.f64", "f64 f64 f64", in_numpy(function, "float64"))
        case(f"{name}.ftz.f32", "f32 f32 f32", exactly(function, "f32", flush=True))
        case(f"{name}.rn.sat.f32", "f32 f32 f32", exactly(function, "f32", saturate=True))
        for mode in ("rz", "rm", "rp"):
            case(f"{name}.{mode}.f32", "f32 f32 f32", exactly(function, "f32", mode))
    for mode in ("rn", "rz", "rm", "rp"):
        case(f"fma.{mode}.f32", "f32 f32 f32 f32", exactly(lambda a, b, c: a * b + c, "f32", mode))
        case(f"div.{mode}.f32", "f32 f32 f32", exactly(operator.truediv, "f32", mode))
        case(f"rcp.{mode}.f32", "f32 f32", exactly(lambda a: 1 / a, "f32", mode))
    case("fma.rn.ftz.f32", "f32 f32 f32 f32", exactly(lambda a, b, c: a * b + c, "f32", flush=True))
    case("fma.rn.f64", "f64 f64 f64 f64", exactly(lambda a, b, c: a * b + c, "f64"))
    case("mad.rn.f32", "f32 f32 f32 f32", exactly(lambda a, b, c: a * b + c, "f32"))
    case("div.rn.f64", "f64 f64 f64", exactly(operator.truediv, "f64"))
    case("rcp.rn.f64", "f64 f64", exactly(lambda a: 1 / a, "f64"))
    case("sqrt.rn.f32", "f32 f32", in_numpy(np.sqrt, "float32"))
    case("sqrt.rn.f64", "f64 f64", in_numpy(np.sqrt, "float64"))
    case("div.full.f32", "f32 f32 f32", in_numpy(operator.truediv, "float32"), tolerance=2e-7)
    case("div.approx.f32", "f32 f32 f32", in_numpy(operator.truediv, "float32"), tolerance=2e-7)
    case("rcp.approx.ftz.f32", "f32 f32", lambda a: flushed(in_numpy(lambda x: 1 / x, "float64")(flushed(a))), "", 2e-7)
    case("sqrt.approx.f32", "f32 f32", in_numpy(np.sqrt, "float64"), tolerance=2e-7)
    case("rsqrt.approx.f32", "f32 f32", in_numpy(lambda x: 1 / np.sqrt(x), "float64"), tolerance=2e-7)
    case("ex2.approx.f32", "f32 f32", in_numpy(np.exp2, "float64"), tolerance=2e-7)
    case("ex2.approx.ftz.f32", "f32 f32", lambda a: flushed(in_numpy(np.exp2, "float64")(flushed(a))), "", 2e-7)
    case("lg2.approx.f32", "f32 f32", in_numpy(np.log2, "float64"), tolerance=2e-7)
    case("sin.approx.f32", "f32 f32", in_numpy(np.sin, "float64"), tolerance=2e-7)
    case("cos.approx.f32", "f32 f32", in_numpy(np.cos, "float64"), tolerance=2e-7)
    case("tanh.approx.f32", "f32 f32", in_numpy(np.tanh, "float64"), tolerance=2e-7)
    for t in ("f32", "f64", "f16", "bf16"):
        case(f"neg.{t}", f"{t} {t}", operator.neg)
        case(f"abs.{t}", f"{t} {t}", abs)
        case(f"min.{t}", f"{t} {t} {t}", smaller)
        case(f"max.{t}", f"{t} {t} {t}", larger)
        if t != "f64":
            case(f"min.NaN.{t}", f"{t} {t} {t}", or_nan(smaller))
            case(f"max.NaN.{t}", f"{t} {t} {t}", or_nan(larger))
    case("max.ftz.f32", "f32 f32 f32", lambda a, b: flushed(larger(flushed(a), flushed(b))))
    case("copysign.f32", "f32 f32 f32", lambda a, b: math.copysign(b, a))
    case("testp.finite.f32", "pred f32", math.isfinite)
    case("testp.infinite.f32", "pred f32", math.isinf)
    case("testp.number.f32", "pred f32", lambda a: not math.isnan(a))
    case("testp.notanumber.f64", "pred f64", math.isnan)


def half_cases() -> None:
    for t in ("f16", "bf16"):
        for name, function in ARITHMETIC.items():
            case(f"{name}.{t}", f"{t} {t} {t}", exactly(function, t))
            case(f"{name}.rn.{t}x2", f"{t}x2 {t}x2 {t}x2", pairs(exactly(function, t)))
        fused = exactly(lambda a, b, c: a * b + c, t)
        case(f"fma.rn.{t}", f"{t} {t} {t} {t}", fused)
        case(f"fma.rn.{t}x2", f"{t}x2 {t}x2 {t}x2 {t}x2", pairs(fused))
        case(f"max.{t}x2", f"{t}x2 {t}x2 {t}x2", pairs(larger))
        case(f"neg.{t}x2", f"{t}x2 {t}x2", pairs(operator.neg))
    case("ex2.approx.f16", "f16 f16", in_numpy(np.exp2, "float64"), tolerance=1e-3)


def compare_cases() -> None:
    compares = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
    for t in ("f32", "f64", "f16", "bf16"):
        for name, function in compares.items():
            case(f"setp.{name}.{t}", f"pred {t} {t}", lambda a, b, f=function: f(a, b) and not either_nan(a, b))
            case(f"setp.{name}u.{t}", f"pred {t} {t}", lambda a, b, f=function: f(a, b) or either_nan(a, b))
        case(f"setp.num.{t}", f"pred {t} {t}", lambda a, b: not either_nan(a, b))
        case(f"setp.nan.{t}", f"pred {t} {t}", either_nan)
    case("setp.gt.ftz.f32", "pred f32 f32", lambda a, b: flushed(a) > flushed(b))
    for t in ["s16", "u16", "s32", "u32", "s64", "u64"]:
        for name, function in compares.items():
            case(f"setp.{name}.{t}", f"pred {t} {t}", function)
    for name, function in {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.items():
        case(f"setp.{name}.u32", "pred u32 u32", compares[function])
    case("setp.eq.b64", "pred b64 b64", operator.eq)
    case("setp.lt.and.s32", "pred s32 s32 pred", lambda a, b, p: a < b and p)
    case("setp.ge.or.f32", "pred f32 f32 pred", lambda a, b, p: a >= b or p)
    case("setp.ne.xor.b32", "pred b32 b32 pred", lambda a, b, p: (a != b) != p)


def to_integer(type_: str, mode: str, wide: bool = False) -> Callable:
    rounding = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode]

    def expected(x: float) -> int:
        if math.isnan(x):
            return 1 << (WIDTH[type_] - 1) if wide else 0
        return clamped((1 << 80) * (1 if x > 0 else -1) if math.isinf(x) else rounding(x), type_)

    return expected


def narrowed(x: float, type_: str, mode: str = "rn") -> float:
    return x if is_special(x) or x == 0 else rounded(Fraction(x), type_, mode)


def conversion_cases() -> None:
    for source in ["s16", "u16", "s32", "u32", "s64", "u64"]:
        for result in ["s16", "u16", "s32", "u32", "s64", "u64"]:
            if source != result:
                case(f"cvt.{result}.{source}", f"{result} {source}", int)
                case(f"cvt.sat.{result}.{source}", f"{result} {source}", lambda x, t=result: clamped(x, t))
    for integer in ["s32", "u32", "s64", "u64"]:
        for t in ("f32", "f64"):
            for mode in ("rn", "rz", "rm", "rp"):
                case(
                    *(f"cvt.{mode}.{t}.{integer}", f"{t} {integer}"),
                    lambda x, t=t, mode=mode: rounded(Fraction(x), t, mode),
                )
            for mode in ("rni", "rzi", "rmi", "rpi"):
                wide = integer[1:] == "64" or t == "f64"
                case(f"cvt.{mode}.{integer}.{t}", f"{integer} {t}", to_integer(integer, mode, wide))
    case("cvt.rzi.s32.f16", "s32 f16", to_integer("s32", "rzi"))
    case("cvt.rn.f16.s32", "f16 s32", lambda x: rounded(Fraction(x), "f16"))
    narrowing = (("f16", "f32"), ("bf16", "f32"), ("f32", "f64"), ("f16", "f64"))
    for result, source in narrowing:
        for mode in ("rn", "rz", "rm", "rp"):
            case(
                *(f"cvt.{mode}.{result}.{source}", f"{result} {source}"),
                lambda x, t=result, mode=mode: narrowed(x, t, mode),
            )
        case(f"cvt.{source}.{result}", f"{source} {result}", float)
    for mode, function in (("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)):
        case(
            *(f"cvt.{mode}.f32.f32", "f32 f32"),
            lambda x, f=function: x if is_special(x) else math.copysign(f(x), x),
        )
    case("cvt.sat.f32.f32", "f32 f32", lambda x: min(x, 1.0) if x > 0 else 0.0)
    case("cvt.ftz.f32.f32", "f32 f32", flushed)
    for t in ("f16", "bf16"):
        case(
            *(f"cvt.rn.{t}x2.f32", f"{t}x2 f32 f32"),
            lambda a, b, t=t: None if is_special(a, b) else (narrowed(b, t), narrowed(a, t)),
        )
    case("cvt.rna.tf32.f32", "b32 f32", lambda x: None if is_special(x) else encode(x, "f32") + 0x1000 & ~0x1FFF)


for _make in (integer_cases, bit_cases, float_cases, half_cases, compare_cases, conversion_cases):
    _make()
