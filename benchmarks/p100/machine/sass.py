"""The machine code of a kernel for sm_60, parsed from what nvdisasm prints.

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
    """The machine code of one kernel."""

    name: str
    instructions: tuple[Instruction, ...]
    constants: bytes  # constant bank 2, the compiler's own; empty if the text does not show it


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
    """The whole output of nvdisasm for a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvdisasm.path(), "-hex", file.name], check=True, capture_output=True, text=True).stdout


def parse(text: str, kernel: str) -> Program:
    """A kernel from the text that `nvdisasm -hex` prints.

    Args:
        text: the output for a cubin, or its part about this kernel.
        kernel: its name.

    Raises:
        ValueError: the text has no such kernel, or a line of it is not understood.
    """
    lines = section(text, f".text.{kernel}")
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
    return Program(kernel, instructions, _constants(section(text, f".nv.constant2.{kernel}")))


def section(text: str, name: str) -> list[str]:
    """The lines behind the label of a section, up to the next section."""
    begin = text.find(f"\n{name}:")
    if begin < 0:
        return []
    end = text.find("\n\t.section\t", begin)
    return text[begin : end if end >= 0 else None].split("\n")[2:]


def _instruction(match: re.Match[str], control: list[int], labels: dict[str, int]) -> Instruction:
    pc = int(match["pc"], 16)
    bits = control[pc // 32] >> 21 * (pc % 32 // 8 - 1)
    return instruction(match, bits, _TARGET, labels, pairs_with_next=match["open"] is not None)


def instruction(
    match: re.Match[str], bits: int, branch: re.Pattern[str], labels: dict[str, int], pairs_with_next: bool = False
) -> Instruction:
    """An instruction from what is printed and its control bits.

    Args:
        match: "pc", "name", "guard" and "rest" of its line.
        bits: the control bits, the stall lowest.
        branch: the "label" in an operand that names an instruction.
        labels: the index of the instruction behind each label.
        pairs_with_next: whether it is issued in the same cycle as the next one.
    """
    op, *modifiers = match["name"].split(".")
    label = branch.search(match["rest"])
    operands = (operand.strip().replace("] [", "][") for operand in match["rest"].split(","))
    return Instruction(
        pc=int(match["pc"], 16),
        op=op,
        modifiers=tuple(modifiers),
        operands=tuple(operand for operand in operands if operand and not operand.startswith("`")),
        guard=match["guard"],
        stall=bits & 15,
        yields=not bits >> 4 & 1,
        write_barrier=scoreboard(bits >> 5),
        read_barrier=scoreboard(bits >> 8),
        waits=tuple(barrier for barrier in range(6) if bits >> 11 + barrier & 1),
        pairs_with_next=pairs_with_next,
        target=labels[label["label"]] if label else None,
    )


def scoreboard(bits: int) -> int | None:
    number = bits & 7
    return None if number == NO_SCOREBOARD else number


def _constants(lines: list[str]) -> bytes:
    return bytes(int(byte, 16) for line in lines for row in _BYTES.findall(line) for byte in row.split(","))
