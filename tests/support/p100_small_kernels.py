"""Small kernels for the executor: tests/support/p100/small_kernels.cu, and their committed listing by nvdisasm.

python -m tests.support.p100_small_kernels    writes the listing again, with NVRTC 12.9 and nvdisasm 12.8
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from benchmarks.p100.machine import sass
from fastattn.cuda_kernels import nvrtc

SOURCE = Path(__file__).parent / "p100" / "small_kernels.cu"
NAMES = ("integers", "wide_integers", "floats", "flow", "memory")


@functools.cache
def listing() -> str:
    """The committed listing of all kernels."""
    return SOURCE.with_suffix(".sass").read_text()


@functools.cache
def small(kernel: str) -> sass.Program:
    """The program of one kernel."""
    return sass.parse(listing(), kernel)


def assembled(text: str) -> sass.Program:
    """A program of these lines, each an instruction or a label; it need not be one that the hardware would execute."""
    given = [line.strip() for line in text.splitlines() if line.strip()]
    count = sum(not line.endswith(":") for line in given)
    lines, instructions = ["", ".text.test:"], 0
    for line in given + ["NOP"] * (-count % 3):
        if line.endswith(":"):
            lines.append(line)
            continue
        if instructions % 3 == 0:
            lines.append(f"/* 0x{0x7E1 | 0x7E1 << 21 | 0x7E1 << 42:016x} */")
        lines.append(f"/*{8 * (instructions + instructions // 3 + 1):04x}*/  {line} ;  /* 0x{0:016x} */")
        instructions += 1
    return sass.parse("\n".join(lines), "test")


def compiled() -> str:
    """The listing of the source as compiled here: instructions and constants, without alignment."""
    image = nvrtc.find(60).compile(SOURCE.read_text(), "sm_60", options=("--std=c++17",)).image
    sections = re.split(r"\n(?=//-{5,} )", sass.listing(image))
    kept = [section for section in sections if re.search(r"^\.(text|nv\.constant2)\.", section, re.MULTILINE)]
    return re.sub(r" *\n\n+", "\n", re.sub(r" {4,}", "  ", "\n".join(kept)))


if __name__ == "__main__":
    SOURCE.with_suffix(".sass").write_text(compiled())
