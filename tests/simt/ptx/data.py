"""Instructions that move data: loads, stores, atomics, moves, address conversions."""

from __future__ import annotations

import re

from tests.simt.ptx.forms import instruction
from tests.simt.ptx.operands import ADDRESS, Scope, block, is_integer
from tests.simt.ptx.parser import BYTES, Instruction

ATOMIC_VALUES = {
    **{"add": "old + b", "and": "old & b", "or": "old | b", "xor": "old ^ b", "exch": "b"},
    **{"min": "minimum(old, b)", "max": "maximum(old, b)", "cas": "old == b ? c : old"},
    **{"inc": "old >= b ? 0 : old + 1", "dec": "old == 0 || old > b ? b : old - 1"},
}
BITWISE = ("and", "or", "xor", "exch", "cas")
CACHING = "[.<cache>][.nc][.<evict>][.<prefetch>]"


def state_space(match: re.Match) -> str:
    """The state space: global, shared, local, param or const; "" for a generic address."""
    return (match["space"] or "").split("::")[0]


@instruction(f"ld[.<order>][.<scope>][.<space>]{CACHING}[.<vector>].<any>", operands=2)
def load(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    space, type_, targets = state_space(match), match["T"], scope.elements(instruction.operands[0])
    check_vector(match, len(targets))
    value_type = type_ if len(targets) == 1 else f"Vector<{type_}, {len(targets)}>"
    mask, scope.used_bytes_mask = scope.used_bytes_mask, 0
    if space == "param":
        value = f"copy_of<{value_type}>({scope.param(instruction.operands[1], len(targets) * BYTES[type_])})"
    elif space == "local":
        value = f"load_local<{value_type}>({scope.address(instruction.operands[1], space)}, {scope.depot})"
    elif space == "const":
        value = f"copy_of<{value_type}>({scope.address(instruction.operands[1], space)})"
    else:
        used = f", {mask:#x}u" if mask else ""
        value = f"load<{value_type}>({scope.address(instruction.operands[1], space)}{used})"
    if len(targets) == 1:
        return scope.assign(targets[0], type_, value)
    parts = [scope.assign(target, type_, f"loaded[{i}]") for i, target in enumerate(targets) if target != "_"]
    return block(f"const auto loaded = {value};", *parts)


@instruction("st[.<order>][.<scope>][.<space>][.<cache>][.<evict>][.<vector>].<any>", operands=2)
def store(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    space, type_, sources = state_space(match), match["T"], scope.elements(instruction.operands[1])
    check_vector(match, len(sources))
    values = [scope.value(source, type_) for source in sources]
    value = f"Vector<{type_}, {len(values)}>{{{', '.join(values)}}}" if len(values) > 1 else values[0]
    if space == "param":
        return f"store_param({scope.param(instruction.operands[0], len(sources) * BYTES[type_])}, {value});"
    address = scope.address(instruction.operands[0], space)
    if space == "local":
        return f"store_local({address}, {value}, {scope.depot});"
    if space == "const":
        raise ValueError("constant memory is not written")
    return f"store({address}, {value});"


def check_vector(match: re.Match, length: int) -> None:
    wanted = int((match["vector"] or "v1")[1:])
    if length != wanted:
        raise ValueError(f"{wanted} elements are moved, {length} are named")


@instruction("atom[.<order>][.<scope>][.<space>].<atomic>[.noftz].<any>", operands=(3, 4))
@instruction("red[.<order>][.<scope>][.<space>].<atomic>[.noftz].<any>", operands=2)
def atomic(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    operation, type_ = match["atomic"], match["T"]
    is_bits = type_[0] == "b" and is_integer(type_)
    if is_bits != (operation in BITWISE) or (operation in ("inc", "dec") and type_ != "u32"):
        raise ValueError(f"{operation} of {type_} is unknown")
    target, place, *sources = ("_", *instruction.operands) if match[0].startswith("red") else instruction.operands
    if len(sources) != (2 if operation == "cas" else 1):
        raise ValueError(f"{operation} has {len(sources)} values")
    values = [f"const {type_} {n} = {scope.value(s, type_)};" for n, s in zip("bc", sources, strict=False)]
    update = f"[&]({type_} old) {{ return {type_}({ATOMIC_VALUES[operation]}); }}"
    before = f"update_atomically<{type_}>({scope.address(place, state_space(match))}, {update})"
    return block(*values, scope.assign(target, type_, before))


@instruction("mov.<any>", "mov.pred", operands=2)
def move(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    type_ = match.groupdict().get("T") or "pred"
    target, source = instruction.operands
    if target.startswith("{"):
        parts = scope.elements(target)
        part_type = f"b{8 * BYTES[type_] // len(parts)}"
        whole = f"const {type_} whole = {scope.value(source, type_)};"
        moves = [scope.assign(part, part_type, f"part<{part_type}>(whole, {i})") for i, part in enumerate(parts)]
        return block(whole, *moves)
    if source.startswith("{"):
        parts = scope.elements(source)
        part_type = f"b{8 * BYTES[type_] // len(parts)}"
        values = ", ".join(scope.value(part, part_type) for part in parts)
        return block(
            f"const {part_type} parts[] = {{{values}}};", scope.assign(target, type_, f"joined<{type_}>(parts)")
        )
    place = ADDRESS.fullmatch(f"[{source}]")
    if place is None or place[1] in scope.registers or place[1] not in scope.variables:
        return scope.assign(target, type_, scope.value(source, type_))
    pointer = scope.address(f"[{source}]", "")
    is_shared = scope.variable(place[1]).space == "shared"
    return scope.assign(target, type_, f"{type_}({'shared_address' if is_shared else 'address_of'}({pointer}))")


@instruction("cvta.<space>.<word>", "cvta.<space>.u64", "cvta.to.<space>.u64", operands=2)
def convert_address(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    """A conversion of addresses: all but those of shared memory are, like generic ones, addresses of this machine."""
    target, source = instruction.operands
    if source in scope.variables:
        return scope.assign(target, "u64", f"address_of({scope.pointer(source)})")
    value = scope.value(source, "u64")
    if state_space(match) == "shared":
        to_shared = match[0].startswith("cvta.to.")
        value = f"shared_address(memory({value}, 0))" if to_shared else f"address_of(shared(u32({value}), 0))"
    return scope.assign(target, "u64", f"u64({value})")


@instruction("prefetch.global.L1", "prefetch.global.L2", "prefetch.L1", "prefetch.L2", operands=1)
def prefetch(match: re.Match, instruction: Instruction, scope: Scope) -> str:
    return ";"
