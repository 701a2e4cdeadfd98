"""The registry of instructions: a form is the syntax of an opcode, and what emits C++ for it.

Syntax is written as in the PTX manual, with [...] for what may be left out and <...> for a choice: `add[.ftz].<type>`.
<int> binds the data type to `T` (a class of types, or the name of one of the CHOICES); <D=any> binds it to `D`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.simt.ptx.operands import Scope
from tests.simt.ptx.parser import Instruction

TYPES = {
    "int": "u16 s16 u32 s32 u64 s64",
    "narrow": "u16 s16 u32 s32",  # has a type of twice its width
    "signed": "s16 s32 s64",
    "int32": "u32 s32",
    "bits": "b16 b32 b64",
    "word": "b32 b64",
    "float": "f32 f64",
    "half": "f16 bf16 f16x2 bf16x2",
    "any": "b8 u8 s8 b16 u16 s16 f16 bf16 b32 u32 s32 f32 f16x2 bf16x2 b64 u64 s64 f64",
}
CHOICES = {
    "rounding": "rn rz rm rp",
    "to_integer": "rni rzi rmi rpi",
    "space": "global shared::cta shared local param::entry param::func param const",
    "order": "weak volatile relaxed acquire release acq_rel",
    "scope": "cta cluster gpu sys",
    "cache": "ca cg cs lu cv wb wt",
    "evict": "L1::evict_normal L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate",
    "prefetch": "L2::64B L2::128B L2::256B",
    "vector": "v2 v4",
    "compare": "equ neu ltu leu gtu geu eq ne lt le gt ge lo ls hi hs num nan",
    "bool": "and or xor",
    "atomic": "add min max inc dec and or xor exch cas",
    "shuffle": "up down bfly idx",
    "shape": "m16n8k16 m16n8k8 m16n8k4 m8n8k4",
    "layout": "row col",
    "element": "f16 bf16 tf32",
    "sum": "f16 f32",
    "count": "x1 x2 x4",
    "caching": "ca cg",
}
# Emits the C++ of one instruction; the match holds what the syntax bound.
Emit = Callable[[re.Match, Instruction, Scope], str]


@dataclass(frozen=True)
class Form:
    pattern: re.Pattern
    num_operands: tuple[int, ...]
    emit: Emit


_forms: dict[str, list[Form]] = {}


def register(syntax: str, num_operands: tuple[int, ...], emit: Emit) -> None:
    name = re.match(r"\w+", syntax)[0]
    _forms.setdefault(name, []).append(Form(compile_syntax(syntax), num_operands, emit))


def instruction(*syntaxes: str, operands: int | tuple[int, ...]) -> Callable[[Emit], Emit]:
    """Registers the decorated function for these syntaxes and numbers of operands."""
    counts = (operands,) if isinstance(operands, int) else operands

    def decorate(emit: Emit) -> Emit:
        for syntax in syntaxes:
            register(syntax, counts, emit)
        return emit

    return decorate


def compile_syntax(syntax: str) -> re.Pattern:
    pattern = syntax.replace(".", r"\.").replace("[", "(?:").replace("]", ")?")
    return re.compile(re.sub(r"<(?:(\w+)=)?(\w+)>", _choice, pattern))


def _choice(match: re.Match) -> str:
    binding, name = match.groups()
    if name in TYPES:
        return f"(?P<{binding or 'T'}>{'|'.join(TYPES[name].split())})"
    return f"(?P<{binding or name}>{'|'.join(CHOICES[name].split())})"


@functools.cache
def find(opcode: str, num_operands: int) -> tuple[Form, re.Match]:
    """The form of an opcode with all its modifiers; ValueError if there is none."""
    for form in _forms.get(opcode.split(".")[0], ()):
        match = form.pattern.fullmatch(opcode)
        if match and num_operands in form.num_operands:
            return form, match
    raise ValueError(f"the instruction {opcode} with {num_operands} operands is unknown")
