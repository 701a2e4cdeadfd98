"""The machine code of a kernel for compute capability 7.0 and up, parsed from what nvdisasm prints.

An instruction has 128 bits. From bit 105 on come the control bits that the P100's have in words of their own, in the
same order: stall, yield, the two scoreboards that it sets, those that it waits for. The layout is not documented by
NVIDIA; it is known from public assemblers.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.p100.machine.sass import Program, instruction, listing, section

CONTROL_BIT = 105 - 64  # in the second word

_LABEL = re.compile(r"^(?P<name>\.L_x_\d+):")
_INSTRUCTION = re.compile(
    r"\s+/\*(?P<pc>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<rest>[^;]*);"
)
_WORD = re.compile(r"/\* 0x(?P<word>[0-9a-f]{16}) \*/\s*$")
_TARGET = re.compile(r"`\((?P<label>\.L_x_\d+)\)")


def disassemble(cubin: Path, kernel: str) -> Program:
    """A kernel of a cubin; `benchmarks.p100.machine.sass.disassemble` says what is raised."""
    return parse(listing(cubin.read_bytes()), kernel)


def parse(text: str, kernel: str) -> Program:
    """A kernel from the text that `nvdisasm -hex` prints.

    Raises:
        ValueError: the text has no such kernel, or an instruction without its second word.
    """
    found: list[re.Match[str]] = []
    words: list[int] = []
    labels: dict[str, int] = {}
    for line in section(text, f".text.{kernel}"):
        word = _WORD.search(line)
        if match := _LABEL.match(line):
            labels[match["name"]] = len(found)
        elif match := _INSTRUCTION.match(line):
            found.append(match)
        elif word and len(words) < len(found):
            words.append(int(word["word"], 16))
    if not found or len(words) != len(found):
        raise ValueError(f"{kernel}: {len(found)} instructions with {len(words)} second words in this text")
    instructions = tuple(
        instruction(match, word >> CONTROL_BIT, _TARGET, labels) for match, word in zip(found, words, strict=True)
    )
    return Program(kernel, instructions, b"")
