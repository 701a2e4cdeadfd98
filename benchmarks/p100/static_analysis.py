"""Properties of machine code that are known without executing it: its loops and its register-bank conflicts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from .machine.sass import Instruction, Program


def loops(program: Program) -> list[tuple[int, int]]:
    """First and last index of every loop, inner loops first; the endless jump at the kernel's end is not one."""
    backward = [
        (instruction.target, index)
        for index, instruction in enumerate(program.instructions)
        if instruction.op == "BRA" and instruction.target is not None and instruction.target < index
    ]
    return sorted(backward, key=lambda loop: (loop[1] - loop[0], loop[0]))


LINE_BYTES = 128  # of the instruction caches


def touched_bytes(program: Program, times: NDArray[Any]) -> int:
    """The bytes of machine code, in whole cache lines, that are executed.

    Args:
        program: the kernel.
        times: the number of executions of each of its instructions.
    """
    lines = {i.pc // LINE_BYTES for i, n in zip(program.instructions, times.tolist(), strict=True) if n}
    return LINE_BYTES * len(lines)


# Instructions that read all their operands from the register file at once, in one cycle if the banks allow it.
_ARITHMETIC = frozenset(
    {
        "FFMA",
        "FADD",
        "FMUL",
        "FMNMX",
        "FCMP",
        "FSET",
        "FSETP",
        "HFMA2",
        "HADD2",
        "HMUL2",
        "XMAD",
        "IADD",
        "IADD3",
        "ICMP",
    }
    | {"IMNMX", "ISET", "ISETP", "ISCADD", "LEA", "LOP", "LOP3", "PRMT", "SEL", "SHF", "SHL", "SHR", "BFE", "BFI"}
)
BANKS = 4


def bank_conflicts(program: Program) -> list[int]:
    """The extra cycles of each instruction whose operands lie in the same register bank.

    Register r lies in bank r % 4. A register that the previous arithmetic instruction has marked `.reuse` in the same
    operand position comes from the operand reuse cache and is not read again.
    """
    kept: dict[int, int] = {}
    conflicts = []
    for instruction in program.instructions:
        if instruction.op not in _ARITHMETIC:
            conflicts.append(0)
            continue
        sources = dict(_source_registers(instruction))
        read = {register for slot, (register, _) in sources.items() if kept.get(slot) != register}
        conflicts.append(max(Counter(register % BANKS for register in read).values(), default=1) - 1)
        kept = {slot: register for slot, (register, is_kept) in sources.items() if is_kept}
    return conflicts


_REGISTER = re.compile(r"[-~|]*R(?P<number>\d+)\b")


def _source_registers(instruction: Instruction) -> Iterator[tuple[int, tuple[int, bool]]]:
    """The operand positions that are registers, each with its register and whether the reuse cache keeps it."""
    results = 2 if instruction.op.endswith("SETP") else 1
    for slot, operand in enumerate(instruction.operands[results:]):
        if match := _REGISTER.match(operand):
            yield slot, (int(match["number"]), ".reuse" in operand)
