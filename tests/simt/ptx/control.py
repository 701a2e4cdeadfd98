"""Control flow, calls, barriers and shuffles."""

from __future__ import annotations

import re

from tests.simt.ptx.forms import instruction
from tests.simt.ptx.operands import Scope, block, label
from tests.simt.ptx.parser import Instruction, split_operands


@instruction("bra[.uni]", operands=1)
def branch(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    return f"goto {label(instruction.operands[0])};"


@instruction("brx.idx[.uni]", operands=2)
def branch_to_index(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    index, name = instruction.operands
    if name not in scope.branch_targets:
        raise ValueError(f"{name} lists no targets")
    cases = [f"case {i}: goto {label(target)};" for i, target in enumerate(scope.branch_targets[name])]
    return f"switch ({scope.value(index, 'u32')}) {{ {' '.join(cases)} default: simt::trap(simt::Site::here()); }}"


@instruction("ret[.uni]", operands=0)
def return_(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    return "return;"


@instruction("exit", operands=0)
def exit_(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    if scope.param_offsets is None:
        raise ValueError("exit is unknown inside of a device function")
    return "return;"


@instruction("trap", operands=0)
def trap(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    return "simt::trap(simt::Site::here());"


@instruction("call[.uni]", operands=(1, 2, 3))
def call(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    """A call of a device function: it gets pointers to its results and arguments in parameter space."""
    lists = [operand[1:-1] for operand in instruction.operands if operand.startswith("(")]
    (name,) = (operand for operand in instruction.operands if not operand.startswith("("))
    if name not in scope.functions:
        raise ValueError(f"{name} has no body in this module")
    scope.called.add(name)
    return f"f_{name}({', '.join(scope.pointer(passed) for names in lists for passed in split_operands(names))});"


@instruction("bar.sync", "barrier.sync[.aligned]", operands=1)
def barrier(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    check_barrier(instruction.operands[0])
    return 'simt::block_barrier("bar.sync", false, simt::Site::here());'


@instruction("bar.red.popc.u32", "barrier.red.popc[.aligned].u32", operands=3)
@instruction("bar.red.<bool>.pred", "barrier.red.<bool>[.aligned].pred", operands=3)
def reducing_barrier(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    target, barrier, predicate = instruction.operands
    check_barrier(barrier)
    results = {"popc": "u32(met.count)", "and": "pred(met.all)", "or": "pred(met.count)"}
    operation = match.groupdict().get("bool") or "popc"
    met = f'simt::block_barrier("bar.red.{operation}", {scope.value(predicate, "pred")}, simt::Site::here())'
    type_ = "u32" if operation == "popc" else "pred"
    return block(f"const auto met = {met};", scope.assign(target, type_, results[operation]))


def check_barrier(operand: str) -> None:
    if operand != "0":
        raise ValueError("only the barrier 0, of all threads of the block, is known")


@instruction("shfl.sync.<shuffle>.b32", operands=5)
def shuffle(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    mode = match["shuffle"]
    targets, value, *controls = instruction.operands
    target, _, predicate = targets.partition("|")
    operands = ", ".join(scope.value(operand, "b32") for operand in (value, *controls))
    stores = [scope.assign(target, "b32", "shuffled.value")]
    if predicate:
        stores.append(scope.assign(predicate, "pred", "shuffled.in_range"))
    call = f'shuffle_{mode}("shfl.sync.{mode}", {operands}, simt::Site::here())'
    return block(f"const auto shuffled = {call};", *stores)
