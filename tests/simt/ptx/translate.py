"""Translates one kernel of a PTX module to C++ that the CPU executor runs.

Registers become local variables, labels stay labels, each instruction becomes a statement or a block of its own.
#line directives give it the place in the CUDA source that the PTX names, else its place in the PTX, so that debug
information and reports speak of that file.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator

from tests.simt.ptx import arithmetic, control, convert, data, forms, tensor
from tests.simt.ptx.operands import Scope, block, label, memory_name, register
from tests.simt.ptx.parser import (
    BYTES,
    Brace,
    BranchTargets,
    Function,
    Instruction,
    Label,
    Module,
    Place,
    Pragma,
    Registers,
    Statement,
    Variable,
)

INSTRUCTIONS = (arithmetic, control, convert, data, tensor)  # each registers its forms
SHARED_GAP = 256  # bytes between static arrays of shared memory that belong to none, so that an overrun is seen


def translate(module: Module, kernel: str) -> str:
    """C++ with that kernel, and the device functions it calls.

    Raises:
        PtxError: an instruction, modifier or operand that is unknown; says where.
        ValueError: no such kernel.
    """
    entry = module.functions.get(kernel)
    if entry is None or not entry.is_entry:
        raise ValueError(f"kernel: {module.name} has no kernel {kernel!r}")
    bodies, scopes, waiting = {}, {}, [kernel]
    for function in waiting:  # grows while it is walked
        scopes[function] = scope = new_scope(module, module.functions[function])
        bodies[function] = list(body(module, module.functions[function], scope))
        waiting += sorted(scope.called - set(waiting))
    variables = [scope.variables[used] for scope in scopes.values() for used in sorted(scope.used)]
    prototypes = [prototype(module.functions[function]) + ";" for function in waiting]
    definitions = [line for function in reversed(waiting) for line in bodies[function]]
    return "\n".join(
        [
            '#include "ptx/ptx.h"',
            *shared_arrays([v for v in variables if v.space == "shared" and v.bytes]),
            "namespace ptx {",
            *(constant(v) for v in dict.fromkeys(variables) if v.space in ("global", "const")),
            *prototypes,
            *definitions,
            "}  // namespace ptx",
            f'extern "C" __attribute__((visibility("default"))) simt::Kernel simt_kernel_{kernel};',
            f"simt::Kernel simt_kernel_{kernel} = {{ptx::run_kernel, {scopes[kernel].params_bytes}}};",
            "",
        ]
    )


def new_scope(module: Module, function: Function) -> Scope:
    offsets, end = {}, 0
    for param in function.params:
        end += -end % param.alignment
        offsets[param.name] = end
        end += param.bytes
    own = {variable.name: variable for variable in (*function.results, *function.params)}
    return Scope(
        variables=module.variables | own,
        param_offsets=offsets if function.is_entry else None,
        params_bytes=end,
        functions=frozenset(f.name for f in module.functions.values() if not f.is_entry),
    )


def prototype(function: Function) -> str:
    if function.is_entry:
        return "static void run_kernel(const void* params_struct)"
    names = [variable.name for variable in (*function.results, *function.params)]
    return f"static void f_{function.name}({', '.join(f'Byte* {memory_name(name)}' for name in names)})"


# ---- functions


def body(module: Module, function: Function, scope: Scope) -> Iterator[str]:
    statements = list(module.statements(function))
    declare(scope, statements)
    yield prototype(function) + " {"
    if function.is_entry:
        yield "const Byte* const params = static_cast<const Byte*>(params_struct);"
    if any(isinstance(s, Instruction) and s.opcode.startswith("cp.async.") for s, _ in statements):
        yield "Copies copies;"
    # The lines behind a #line directive count on from it, so code of one place has to stay on one line.
    for (file, line), code in itertools.groupby(placed_code(module, statements, scope), key=operator.itemgetter(0)):
        yield f'#line {line} "{file}"\n{" ".join(text for _, text in code)}'
    yield "}"


def placed_code(
    module: Module, statements: list[tuple[Statement, Place]], scope: Scope
) -> Iterator[tuple[tuple[str, int], str]]:
    """The C++ of each statement, with the file and the line that it stands for."""
    for statement, place in statements:
        try:
            code = emit(statement, scope)
        except ValueError as error:
            raise module.error(place.ptx_line, error) from None
        if code:
            yield ((place.file, place.line) if place.file else (module.name, place.ptx_line)), code


def declare(scope: Scope, statements: list[tuple[Statement, Place]]) -> None:
    """Names that may be used before they are declared."""
    for statement, _ in statements:
        if isinstance(statement, BranchTargets):
            scope.branch_targets[statement.name] = statement.labels
        elif isinstance(statement, Variable):
            scope.variables[statement.name] = statement
            if statement.space == "local":
                scope.depot = memory_name(statement.name)


def emit(statement: Statement, scope: Scope) -> str:
    match statement:
        case Registers(type_, names):
            if type_ not in BYTES:
                raise ValueError(f"registers of type {type_} are unknown")
            scope.registers.update(dict.fromkeys(names, type_))
            return f"{type_} {', '.join(map(register, names))};"
        case Label(name):
            return f"{label(name)}:;"
        case Brace(text):
            scope.registers = scope.registers.new_child() if text == "{" else scope.registers.parents
            return text
        case Pragma(text):
            if text.startswith("used_bytes_mask"):
                scope.used_bytes_mask = int(text.split()[1], 0)
        case Variable(name, "local" | "param", num_bytes, alignment):
            if statement.space == "local" and memory_name(name) != scope.depot:
                raise ValueError("only one array of local memory is known")
            scope.variables[name] = statement
            return f"alignas({alignment}) Byte {memory_name(name)}[{num_bytes}];"
        case Instruction():
            return emit_instruction(statement, scope)
    return ""


def emit_instruction(instruction: Instruction, scope: Scope) -> str:
    form, match = forms.find(instruction.opcode, len(instruction.operands))
    code = form.emit(match, instruction, scope)
    if instruction.guard:
        negation = "!" if instruction.negated else ""
        return f"if ({negation}{scope.value(instruction.guard, 'pred')}) {block(code)}"
    return code


# ---- memory


def shared_arrays(variables: list[Variable]) -> Iterator[str]:
    """The static arrays as parts of one thread-local block; the names and sizes of its parts are for reports."""
    offset = SHARED_GAP
    for variable in dict.fromkeys(variables):
        offset += -offset % max(variable.alignment, 16)
        yield (
            f'asm(".hidden {variable.name}\\n.globl {variable.name}\\n.type {variable.name}, STT_TLS\\n"\n'
            f'    ".set {variable.name}, simt_static_storage + {offset}\\n.size {variable.name}, {variable.bytes}");\n'
            f'extern thread_local unsigned char {memory_name(variable.name)}[] asm("{variable.name}");'
        )
        offset += variable.bytes + SHARED_GAP
    if variables:
        yield f'extern "C" {{ alignas(128) thread_local unsigned char simt_static_storage[{offset}]; }}'


def constant(variable: Variable) -> str:
    """A table in the module's memory, as bytes."""
    size = BYTES[variable.element]
    data = b"".join((value % (1 << 8 * size)).to_bytes(size, "little") for value in variable.values)
    values = ", ".join(map(str, data.ljust(variable.bytes, b"\0")))
    return f"alignas({variable.alignment}) static Byte {memory_name(variable.name)}[] = {{{values}}};"
