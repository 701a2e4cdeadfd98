"""The machine code of a kernel for GP100 (sm_60), parsed from what nvdisasm prints.

Every fourth 64-bit word is a control word with 21 bits for each of the three instructions behind it. From the lowest:
cycles to stall (4), whether not to yield (1), the scoreboard that a result sets (3), the one that reading the operands
sets (3), the six scoreboards to wait for (6), the operands to keep in the reuse cache (4). The layout is not documented
by NVIDIA; it is known from the assembler maxas.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import nvdisasm

NO_SCOREBOARD = 7


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction with its control bits."""

    pc: int  # byte address in the kernel
    op: str  # "FFMA", "LDS", "ISETP"
    modifiers: tuple[str, ...]  # ("GE", "U32", "AND")
    operands: tuple[str, ...]  # as printed: ("R4", "R8.reuse", "-R9", "c[0x0][0x140]")
    guard: str | None  # "P0", "!P3"
    stall: int  # cycles until the warp's next instruction
    yields: bool
    write_barrier: int | None  # the scoreboard that its result releases
    read_barrier: int | None  # the scoreboard that its operands, once read, release
    waits: tuple[int, ...]  # scoreboards
    pairs_with_next: bool  # issued in the same cycle as the next one
    target: int | None  # the index of the instruction that a branch, SSY, PBK or CAL names

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.pc:#06x}: {guard}{'.'.join((self.op, *self.modifiers))} {', '.join(self.operands)}".rstrip()


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel."""

    name: str
    instructions: tuple[Instruction, ...]
    constants: bytes  # bank 2: what the compiler keeps there; empty if the text does not show it


# ---- reading ----

_LABEL = re.compile(r"^(?P<name>[.$]?\w[\w$.]*):")
_INSTRUCTION = re.compile(
    r"\s*/\*(?P<pc>[0-9a-f]{4,})\*/\s+(?P<open>\{\s+)?(?:@(?P<guard>!?P\w+)\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<rest>[^;}]*)[;}]"
)
_ENCODING = re.compile(r"/\* 0x(?P<word>[0-9a-f]{16}) \*/")
_NOTE = re.compile(r"\(\*.*?\*\)")
_TARGET = re.compile(r"`\((?P<label>.*?)\)")
_BYTES = re.compile(r"\.byte\s+(.*)")


def disassemble(cubin: Path, kernel: str) -> Program:
    """A kernel of a cubin.

    Args:
        cubin: the file.
        kernel: its name in the file, such as "attention_fwd_d64_32x32".

    Raises:
        ValueError: the cubin has no such kernel.
        nvdisasm.NotFound: see `nvdisasm.path`.
    """
    return parse(listing(cubin.read_bytes()), kernel)


@functools.lru_cache(maxsize=4)
def listing(cubin: bytes) -> str:
    """All that nvdisasm prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvdisasm.path(), "-hex", file.name], check=True, capture_output=True, text=True).stdout


def parse(text: str, kernel: str) -> Program:
    """A kernel from the text that `nvdisasm -hex` prints.

    Args:
        text: of the cubin, or the part about this kernel.
        kernel: its name.

    Raises:
        ValueError: the text has no such kernel, or a line of it is not understood.
    """
    lines = _section(text, f".text.{kernel}")
    if not lines:
        raise ValueError(f"kernel: {kernel!r} is not in this text")
    words = [match["word"] for line in lines for match in _ENCODING.finditer(line)]
    control = [int(word, 16) for word in words[::4]]
    labels: dict[str, int] = {}
    found: list[re.Match[str]] = []
    for line in lines:
        if match := _LABEL.match(line):
            labels[match["name"]] = len(found)
        elif match := _INSTRUCTION.match(line := _NOTE.sub("", line)):
            found.append(match)
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            raise ValueError(f"not an instruction: {line.strip()}")
    if len(words) != 4 * len(control) or len(found) != 3 * len(control):
        raise ValueError(f"{kernel}: {len(found)} instructions, but {len(words)} encodings")
    instructions = tuple(_instruction(match, control, labels) for match in found)
    return Program(kernel, instructions, _constants(_section(text, f".nv.constant2.{kernel}")))


def _section(text: str, name: str) -> list[str]:
    """The lines behind the label of a section, up to the next section."""
    begin = text.find(f"\n{name}:")
    if begin < 0:
        return []
    end = text.find("\n\t.section\t", begin)
    return text[begin : end if end >= 0 else None].split("\n")[2:]


def _instruction(match: re.Match[str], control: list[int], labels: dict[str, int]) -> Instruction:
    pc = int(match["pc"], 16)
    bits = control[pc // 32] >> 21 * (pc % 32 // 8 - 1)
    op, *modifiers = match["name"].split(".")
    label = _TARGET.search(match["rest"])
    operands = (operand.strip().replace("] [", "][") for operand in match["rest"].split(","))
    return Instruction(
        pc=pc,
        op=op,
        modifiers=tuple(modifiers),
        operands=tuple(operand for operand in operands if operand and not operand.startswith("`")),
        guard=match["guard"],
        stall=bits & 15,
        yields=not bits >> 4 & 1,
        write_barrier=_scoreboard(bits >> 5),
        read_barrier=_scoreboard(bits >> 8),
        waits=tuple(barrier for barrier in range(6) if bits >> 11 + barrier & 1),
        pairs_with_next=match["open"] is not None,
        target=labels[label["label"]] if label else None,
    )


def _scoreboard(bits: int) -> int | None:
    number = bits & 7
    return None if number == NO_SCOREBOARD else number


def _constants(lines: list[str]) -> bytes:
    return bytes(int(byte, 16) for line in lines for row in _BYTES.findall(line) for byte in row.split(","))


# ---- what can be seen without executing it ----


def loops(program: Program) -> list[tuple[int, int]]:
    """The first and last index of every loop, inner loops before outer ones; the jump to itself at the end is none."""
    backward = [
        (instruction.target, index)
        for index, instruction in enumerate(program.instructions)
        if instruction.op == "BRA" and instruction.target is not None and instruction.target < index
    ]
    return sorted(backward, key=lambda loop: (loop[1] - loop[0], loop[0]))


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
    """For every instruction, the extra cycles that its operands need because they lie in the same register bank.

    Register r lies in bank r % 4. A register that the previous arithmetic instruction has marked `.reuse` in the same
    operand position is not read again.
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
    """By operand position, the registers read and whether each is kept."""
    results = 2 if instruction.op.endswith("SETP") else 1
    for slot, operand in enumerate(instruction.operands[results:]):
        if match := _REGISTER.match(operand):
            yield slot, (int(match["number"]), ".reuse" in operand)
