"""Tensor cores and what feeds them: mma.sync, ldmatrix, cp.async."""

from __future__ import annotations

import re

from tests.simt.ptx.forms import instruction
from tests.simt.ptx.operands import Scope, block
from tests.simt.ptx.parser import Instruction, parse_integer

# (type of the elements, type of the sums) for each shape
TYPES = {
    "m16n8k16": (("f16", "f32"), ("f16", "f16"), ("bf16", "f32")),
    "m16n8k8": (("f16", "f32"), ("f16", "f16"), ("bf16", "f32"), ("tf32", "f32")),
    "m16n8k4": (("tf32", "f32"),),
    "m8n8k4": (("f16", "f32"), ("f16", "f16")),
}


@instruction("mma.sync.aligned.<shape>.<A=layout>.<B=layout>.<D=sum>.<E=element>.<F=element>.<C=sum>", operands=4)
def multiply(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    shape, element, total = match["shape"], match["E"], match["D"]
    if (match["F"], match["C"]) != (element, total) or (element, total) not in TYPES[shape]:
        raise ValueError("these types do not go together")
    if shape == "m8n8k4":
        layout = "M8N8K4<{}, {}>".format(*(str(match[m] == "row").lower() for m in "AB"))
    elif (match["A"], match["B"]) == ("row", "col"):
        layout = f"M16N8<{shape.split('k')[1]}, {element}>"
    else:
        raise ValueError("only row.col is known for this shape")
    targets, *sources = (scope.elements(operand) for operand in instruction.operands)
    types = ("b32", "b32", "f32" if total == "f32" else "b32")
    vectors = [
        f"Vector<{type_}, {len(parts)}>{{{', '.join(scope.value(part, type_) for part in parts)}}}"
        for type_, parts in zip(types, sources, strict=True)
    ]
    stores = [scope.assign(target, types[2], f"sums[{i}]") for i, target in enumerate(targets)]
    call = f"mma<{layout}, {element}, {total}>({', '.join(vectors)}, simt::Site::here())"
    return block(f"const auto sums = {call};", *stores)


@instruction(
    "ldmatrix.sync.aligned.m8n8.<count>[.trans].shared.b16",
    "ldmatrix.sync.aligned.m8n8.<count>[.trans].shared::cta.b16",
    operands=2,
)
def load_matrix(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    targets, count = scope.elements(instruction.operands[0]), int(match["count"][1:])
    if len(targets) != count:
        raise ValueError(f"{count} matrices are loaded, {len(targets)} registers are named")
    transposed = str(".trans" in instruction.opcode).lower()
    address = scope.address(instruction.operands[1], "shared")
    stores = [scope.assign(target, "b32", f"loaded[{i}]") for i, target in enumerate(targets)]
    call = f"load_matrices<{count}, {transposed}>({address}, simt::Site::here())"
    return block(f"const auto loaded = {call};", *stores)


@instruction("cp.async.<caching>.shared.global[.<prefetch>]", operands=(3, 4))
@instruction("cp.async.<caching>.shared::cta.global[.<prefetch>]", operands=(3, 4))
def start_copy(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    target, source, size, *used = instruction.operands
    num_bytes = parse_integer(size)
    if num_bytes not in (4, 8, 16) or (match["caching"] == "cg" and num_bytes != 16):
        raise ValueError(f"{num_bytes} bytes cannot be copied by cp.async.{match['caching']}")
    used_bytes = scope.value(used[0], "u32") if used else f"{num_bytes}"
    addresses = f"{scope.address(target, 'shared')}, {scope.address(source, 'global')}"
    return f"copies.start<{num_bytes}>({addresses}, {used_bytes});"


@instruction("cp.async.commit_group", "cp.async.wait_all", operands=0)
def finish_copies(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    return "copies.commit();" if match[0].endswith("commit_group") else "copies.wait_all();"


@instruction("cp.async.wait_group", operands=1)
def wait_for_copies(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    return f"copies.wait({parse_integer(instruction.operands[0])});"
