"""Conversions between types, and comparisons."""

from __future__ import annotations

import re

from tests.simt.ptx.arithmetic import DIRECTED
from tests.simt.ptx.forms import instruction
from tests.simt.ptx.operands import Scope, block
from tests.simt.ptx.parser import BYTES, Instruction

FLOATS = ("f16", "bf16", "f32", "f64")
INTEGRAL = {"rni": "std::rint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
COMPARES = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
UNSIGNED_COMPARES = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
COMBINE = {"and": "&&", "or": "||", "xor": "!="}


@instruction("cvt[.<rounding>][.<to_integer>][.ftz][.sat].<D=any>.<S=any>", operands=2)
def convert(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    result, source, rounding = match["D"], match["S"], match["rounding"]
    modifiers = instruction.opcode.split(".")
    value = scope.value(instruction.operands[1], source)
    flushes, saturates = "ftz" in modifiers, "sat" in modifiers
    if flushes and source == "f32":
        value = f"flush({value})"
    inexact = result in FLOATS and (source not in FLOATS or BYTES[result] < BYTES[source])
    to_integer = source in FLOATS and result not in FLOATS
    if inexact != bool(rounding) or (to_integer and not match["to_integer"]):
        raise ValueError("the rounding does not fit the types")
    value = _rounded_value(match, result, source, value)
    if result == "f32" and flushes:
        value = f"flush({value})"
    if saturates and result in FLOATS:
        value = f"saturate({value})"
    elif saturates and source not in FLOATS:
        value = f"clamp<{result}>({scope.value(instruction.operands[1], source)})"
    return scope.assign(instruction.operands[0], result, value)


def _rounded_value(match: re.Match, result: str, source: str, value: str) -> str:
    if match["to_integer"]:
        whole = f"{INTEGRAL[match['to_integer']]}(f64({value}))"
        return f"{result}({whole})" if result in FLOATS else f"to_integer<{result}, {source}>({whole})"
    if match["rounding"] not in DIRECTED:
        return f"{result}({value})" if {result, source} & {"f16", "bf16"} == set() else f"narrow<{result}>({value})"
    return f"rounded<{result}>({value}, {DIRECTED[match['rounding']]})"


@instruction("cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32", operands=3)
def convert_pair(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    """A packed conversion of two operands; the first one goes to the upper half."""
    target, upper, lower = instruction.operands
    pair = match[0].split(".")[2]
    return scope.assign(target, pair, f"{pair}({scope.value(lower, 'f32')}, {scope.value(upper, 'f32')})")


@instruction("cvt.rna.tf32.f32", operands=2)
def convert_tf32(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    target, source = instruction.operands
    return scope.assign(target, "b32", f"to_tf32({scope.value(source, 'f32')})")


@instruction("setp.<compare>[.ftz].<any>", operands=3)
@instruction("setp.<compare>.<bool>[.ftz].<any>", operands=4)
def set_predicate(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    type_, modifiers = match["T"], instruction.opcode.split(".")
    targets, left, right, *other = instruction.operands
    a, b = (scope.value(operand, type_) for operand in (left, right))
    if "ftz" in modifiers:
        if type_ != "f32":
            raise ValueError("ftz is known for f32 alone")
        a, b = f"flush({a})", f"flush({b})"
    compared = re.sub(r"\b[ab]\b", lambda name: a if name[0] == "a" else b, compare(match["compare"], type_))
    values = [f"({compared})", f"!({compared})"]
    if other:
        values = [f"{value} {COMBINE[match['bool']]} {scope.value(other[0], 'pred')}" for value in values]
    first, _, second = targets.partition("|")
    if not second:
        return scope.assign(first, "pred", values[0])
    both = f"const bool is_so = {values[0]}, is_not_so = {values[1]};"
    return block(both, scope.assign(first, "pred", "is_so"), scope.assign(second, "pred", "is_not_so"))


def compare(name: str, type_: str) -> str:
    """C++ that compares a and b. Of floats, the ordered comparisons are false of a NaN and the others (...u) true."""
    is_float = type_ in FLOATS
    unordered = "(is_nan(a) || is_nan(b))"
    if is_float and name in ("nan", "num"):
        return unordered if name == "nan" else f"!{unordered}"
    if is_float and name == "ne":
        return f"!{unordered} && a != b"
    if is_float and name[:-1] in COMPARES and name.endswith("u"):
        return f"{unordered} || a {COMPARES[name[:-1]]} b"
    if name in COMPARES and (name in ("eq", "ne") or is_float or type_[0] in "us"):
        return f"a {COMPARES[name]} b"
    if name in UNSIGNED_COMPARES and type_[0] == "u":
        return f"a {UNSIGNED_COMPARES[name]} b"
    raise ValueError(f"{name} is no comparison of {type_}")
