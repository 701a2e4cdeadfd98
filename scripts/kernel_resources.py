"""Resources of every CUDA kernel by architecture: docs/kernel_resources.csv, from the installed build.

python scripts/kernel_resources.py            compares the file with the build and prints what differs
python scripts/kernel_resources.py --write    writes it
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

from fastattn import _launcher
from fastattn.cuda_kernels import images
from fastattn.cuda_kernels.sources import ELEMENTS, Arch, image_name

TABLE = Path(__file__).parents[1] / "docs" / "kernel_resources.csv"


class Multiprocessor(NamedTuple):
    """Resources shared by the blocks of one multiprocessor (CUDA C++ Programming Guide, "Technical Specifications")."""

    threads: int
    blocks: int
    smem: int  # bytes
    smem_per_block: int  # bytes that the system takes of each block


REGISTERS = 65536  # of every multiprocessor; a warp gets them in units of 256
MULTIPROCESSORS = {
    60: Multiprocessor(2048, 32, 64 << 10, 0),
    70: Multiprocessor(2048, 32, 96 << 10, 0),
    75: Multiprocessor(1024, 16, 64 << 10, 0),
    80: Multiprocessor(2048, 32, 164 << 10, 1 << 10),
    90: Multiprocessor(2048, 32, 228 << 10, 1 << 10),
}


def resident_blocks(arch: Arch, threads: int, registers: int, smem: int) -> int:
    """The number of blocks of a kernel that one multiprocessor runs at a time."""
    limits = MULTIPROCESSORS[arch.number]
    registers_of_warp = -(-registers * 32 // 256) * 256
    # Each of the four schedulers has its own quarter of the registers.
    warps = REGISTERS // 4 // registers_of_warp * 4
    by_smem = limits.smem // (smem + limits.smem_per_block) if smem else limits.blocks
    return min(limits.blocks, limits.threads // threads, warps // (threads // 32), by_smem)


def rows() -> list[dict[str, object]]:
    """The table's rows, one for each kernel, element type and architecture with machine code."""
    manifest = json.loads((images.HERE.kernels / "build.json").read_text())
    found = []
    for arch in (a for a in images.installed().archs if a.kind == "sm" and a.number in MULTIPROCESSORS):
        for kernel in _launcher.KERNELS:
            for element in ELEMENTS:
                used = manifest["images"][image_name(element, arch)]["kernels"].get(kernel.name)
                if used is None:  # another one has its place in this image
                    continue
                smem = kernel.smem + used["shared_bytes"]
                blocks = resident_blocks(arch, kernel.threads, used["registers"], smem)
                found.append(
                    {
                        "architecture": arch,
                        "kernel": kernel.name,
                        "element": element,
                        "threads": kernel.threads,
                        "registers": used["registers"],
                        "spilled_bytes": used["spill_bytes"],
                        "stack_bytes": used["stack_bytes"],
                        "shared_bytes": smem,
                        "blocks_per_multiprocessor": blocks,
                        "occupancy_percent": 100 * blocks * kernel.threads // MULTIPROCESSORS[arch.number].threads,
                    }
                )
    return found


def render(table: list[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, table[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def main(arguments: list[str]) -> int:
    built = render(rows()).splitlines(keepends=True)
    if arguments == ["--write"]:
        TABLE.write_text("".join(built))
        return 0
    architectures = {line.split(",")[0] for line in built}  # a build may have been told to make fewer
    recorded = [line for line in TABLE.read_text().splitlines(keepends=True) if line.split(",")[0] in architectures]
    sys.stdout.writelines(difflib.unified_diff(recorded, built, TABLE.name, "this build", n=0))
    return int(recorded != built)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
