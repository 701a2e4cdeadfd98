"""The table of instructions whose result is an expression of their operands.

Columns: the syntax; the types "result <- operands" (T as matched, W twice as wide, - for no result); the value in C++,
where a, b, c, d are the operands. Of float32, [.ftz] flushes operands and result, [.sat] clamps the result to 0 ... 1
and a <rounding> other than to nearest is in force while the value is computed: see emit_expression().
"""

from __future__ import annotations

import re

from tests.simt.ptx.forms import register
from tests.simt.ptx.operands import Scope, block
from tests.simt.ptx.parser import Instruction

TABLE = """
# integers
add.<int>                             T <- T T          a + b
add.sat.s32                           s32 <- s32 s32    clamp<s32>(s64(a) + b)
sub.<int>                             T <- T T          a - b
sub.sat.s32                           s32 <- s32 s32    clamp<s32>(s64(a) - b)
mul.lo.<int>                          T <- T T          a * b
mul.hi.<int>                          T <- T T          mul_hi(a, b)
mul.wide.<narrow>                     W <- T T          W(a) * W(b)
mad.lo.<int>                          T <- T T T        a * b + c
mad.hi.<int>                          T <- T T T        mul_hi(a, b) + c
mad.wide.<narrow>                     W <- T T W        W(a) * W(b) + c
div.<int>                             T <- T T          divide(a, b)
rem.<int>                             T <- T T          remainder(a, b)
sad.<int>                             T <- T T T        c + (a < b ? b - a : a - b)
abs.<signed>                          T <- T            a < 0 ? -a : a
neg.<signed>                          T <- T            -a
min.<int>                             T <- T T          a < b ? a : b
max.<int>                             T <- T T          a > b ? a : b

# bits
and.<bits>                            T <- T T          a & b
or.<bits>                             T <- T T          a | b
xor.<bits>                            T <- T T          a ^ b
not.<bits>                            T <- T            ~a
cnot.<bits>                           T <- T            a == 0
and.pred                              pred <- pred pred  a && b
or.pred                               pred <- pred pred  a || b
xor.pred                              pred <- pred pred  a != b
not.pred                              pred <- pred      !a
shl.<bits>                            T <- T u32        shift_left(a, b)
shr.<bits>                            T <- T u32        shift_right(a, b)
shr.<int>                             T <- T u32        shift_right(a, b)
shf.l.wrap.b32                        b32 <- b32 b32 u32  funnel_left(a, b, c & 31)
shf.l.clamp.b32                       b32 <- b32 b32 u32  funnel_left(a, b, c)
shf.r.wrap.b32                        b32 <- b32 b32 u32  funnel_right(a, b, c & 31)
shf.r.clamp.b32                       b32 <- b32 b32 u32  funnel_right(a, b, c)
lop3.b32                              b32 <- b32 b32 b32 u32  lop3(a, b, c, d)
prmt.b32                              b32 <- b32 b32 b32  prmt(a, b, c)
popc.<word>                           u32 <- T          __builtin_popcountll(a)
clz.<word>                            u32 <- T          count_leading_zeros(a)
brev.<word>                           T <- T            reverse_bits(a)
bfind.<int>                           u32 <- T          find_leading_bit(a)
bfind.shiftamt.<int>                  u32 <- T          find_leading_bit_shift(a)
bfe.<int>                             T <- T u32 u32    extract_bits(a, b, c)
bfi.<word>                            T <- T T u32 u32  insert_bits(a, b, c, d)
selp.<any>                            T <- T T pred     c ? a : b

# float32 and float64
add[.<rounding>][.ftz][.sat].f32      f32 <- f32 f32    a + b
add[.<rounding>].f64                  f64 <- f64 f64    a + b
sub[.<rounding>][.ftz][.sat].f32      f32 <- f32 f32    a - b
sub[.<rounding>].f64                  f64 <- f64 f64    a - b
mul[.<rounding>][.ftz][.sat].f32      f32 <- f32 f32    a * b
mul[.<rounding>].f64                  f64 <- f64 f64    a * b
fma.<rounding>[.ftz][.sat].f32        f32 <- f32 f32 f32  fmaf(a, b, c)
fma.<rounding>.f64                    f64 <- f64 f64 f64  fma(a, b, c)
mad.<rounding>[.ftz][.sat].f32        f32 <- f32 f32 f32  fmaf(a, b, c)
mad.<rounding>.f64                    f64 <- f64 f64 f64  fma(a, b, c)
div.<rounding>[.ftz].f32              f32 <- f32 f32    a / b
div.<rounding>.f64                    f64 <- f64 f64    a / b
div.full[.ftz].f32                    f32 <- f32 f32    a / b
div.approx[.ftz].f32                  f32 <- f32 f32    divide_approx(a, b)
rcp.<rounding>[.ftz].f32              f32 <- f32        1.0f / a
rcp.<rounding>.f64                    f64 <- f64        1.0 / a
rcp.approx[.ftz].f32                  f32 <- f32        1.0f / a
sqrt.<rounding>[.ftz].f32             f32 <- f32        std::sqrt(f32(a))
sqrt.<rounding>.f64                   f64 <- f64        std::sqrt(f64(a))
sqrt.approx[.ftz].f32                 f32 <- f32        std::sqrt(a)
rsqrt.approx[.ftz].f32                f32 <- f32        1.0 / std::sqrt(f64(a))
ex2.approx[.ftz].f32                  f32 <- f32        std::exp2(a)
lg2.approx[.ftz].f32                  f32 <- f32        std::log2(a)
sin.approx[.ftz].f32                  f32 <- f32        std::sin(a)
cos.approx[.ftz].f32                  f32 <- f32        std::cos(a)
tanh.approx.f32                       f32 <- f32        std::tanh(a)
neg[.ftz].f32                         f32 <- f32        -a
neg.f64                               f64 <- f64        -a
abs[.ftz].f32                         f32 <- f32        std::fabs(a)
abs.f64                               f64 <- f64        std::fabs(a)
min[.ftz].f32                         f32 <- f32 f32    minimum(a, b)
max[.ftz].f32                         f32 <- f32 f32    maximum(a, b)
min.f64                               f64 <- f64 f64    minimum(a, b)
max.f64                               f64 <- f64 f64    maximum(a, b)
min[.ftz].NaN.f32                     f32 <- f32 f32    or_nan(minimum(a, b), a, b)
max[.ftz].NaN.f32                     f32 <- f32 f32    or_nan(maximum(a, b), a, b)
copysign.<float>                      T <- T T          std::copysign(b, a)
testp.finite.<float>                  pred <- T         std::isfinite(a)
testp.infinite.<float>                pred <- T         std::isinf(a)
testp.number.<float>                  pred <- T         !std::isnan(a)
testp.notanumber.<float>              pred <- T         std::isnan(a)

# float16 and bfloat16, alone and in pairs
add[.rn].<half>                       T <- T T          a + b
sub[.rn].<half>                       T <- T T          a - b
mul[.rn].<half>                       T <- T T          a * b
fma.rn.<half>                         T <- T T T        fma(a, b, c)
neg.<half>                            T <- T            flip_signs(a)
abs.<half>                            T <- T            clear_signs(a)
min.<half>                            T <- T T          minimum(a, b)
max.<half>                            T <- T T          maximum(a, b)
min.NaN.<half>                        T <- T T          or_nan(minimum(a, b), a, b)
max.NaN.<half>                        T <- T T          or_nan(maximum(a, b), a, b)
ex2.approx.f16                        f16 <- f16        hexp2(a)
ex2.approx.f16x2                      f16x2 <- f16x2    h2exp2(a)

# lanes of a warp
vote.sync.ballot.b32                  b32 <- pred b32   simt::ballot("vote.sync.ballot", b, a, simt::Site::here())
vote.sync.any.pred                    pred <- pred b32  simt::ballot("vote.sync.any", b, a, simt::Site::here()) != 0
vote.sync.all.pred                    pred <- pred b32  simt::ballot("vote.sync.all", b, !a, simt::Site::here()) == 0
vote.sync.uni.pred                    pred <- pred b32  is_uniform(b, a)
redux.sync.add.<int32>                T <- T b32        reduce(b, a, [](T x, T y) { return x + y; })
redux.sync.min.<int32>                T <- T b32        reduce(b, a, [](T x, T y) { return x < y ? x : y; })
redux.sync.max.<int32>                T <- T b32        reduce(b, a, [](T x, T y) { return x > y ? x : y; })
redux.sync.and.b32                    b32 <- b32 b32    reduce(b, a, [](b32 x, b32 y) { return x & y; })
redux.sync.or.b32                     b32 <- b32 b32    reduce(b, a, [](b32 x, b32 y) { return x | y; })
redux.sync.xor.b32                    b32 <- b32 b32    reduce(b, a, [](b32 x, b32 y) { return x ^ y; })
bar.warp.sync                         - <- b32          __syncwarp(a)

# memory order: threads take turns, and see each other's writes at once
membar.<scope>                        - <-              void()
membar.gl                             - <-              void()
membar.cta                            - <-              void()
fence[.sc].<scope>                    - <-              void()
fence.acq_rel.<scope>                 - <-              void()
"""

TWICE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
DIRECTED = {"rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}


def add_row(row: str) -> None:
    syntax, signature, value = re.split(r"\s{2,}", row, maxsplit=2)
    result, _, operands = signature.partition("<-")
    result_type, operand_types = result.strip(), operands.split()

    def emit(match: re.Match, instruction: Instruction, scope: Scope) -> str:
        bound = match.groupdict().get("T") or ""
        names = {"T": bound, "W": TWICE.get(bound, "")}
        types = [names.get(type_, type_) for type_ in operand_types]
        expression = re.sub(r"\b[TW]\b", lambda name: names[name[0]], value)
        return emit_expression(match, instruction, scope, names.get(result_type, result_type), types, expression)

    register(syntax, (len(operand_types) + (result_type != "-"),), emit)


def emit_expression(
    match: re.Match, instruction: Instruction, scope: Scope, result: str, types: list[str], value: str
) -> str:
    """C++ that computes the value, its operands put in the places of a, b, c, d, and stores it."""
    modifiers = instruction.opcode.split(".")
    flushes = "ftz" in modifiers
    sources = instruction.operands if result == "-" else instruction.operands[1:]
    operands = {}
    for name, type_, source in zip("abcd", types, sources, strict=False):
        operand = scope.value(source, type_)
        operands[name] = f"flush({operand})" if flushes and type_ == "f32" else operand
    mode = DIRECTED.get(match.groupdict().get("rounding") or "rn")
    lines = []
    if mode:  # volatile: nothing is computed before the mode is set, or after it is restored
        lines.append(f"const Rounding mode({mode});")
        lines += [f"volatile {type_} {name} = {operands[name]};" for name, type_ in zip("abcd", types, strict=False)]
        lines.append(f"volatile {result} rounded = {value};")
        value = "rounded"
    else:
        value = re.sub(r"\b[abcd]\b", lambda name: operands[name[0]], value)
    if result == "-":
        return f"{value};"
    value = f"{result}({value})"
    value = f"flush({value})" if flushes and result == "f32" else value
    value = f"saturate({value})" if "sat" in modifiers and result == "f32" else value
    lines.append(scope.assign(instruction.operands[0], result, value))
    return block(*lines) if mode else lines[0]


for _row in TABLE.splitlines():
    if _row and not _row.startswith("#"):
        add_row(_row)
