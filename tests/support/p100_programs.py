"""Programs by hand, whose time on a multiprocessor of the P100 is known."""

from __future__ import annotations

import numpy as np

from benchmarks.p100.machine.sass import Instruction
from benchmarks.p100.pipeline import WarpStream


def make(op: str, *operands: str, **control: object) -> Instruction:
    """An instruction that takes a cycle and waits for nothing, unless `control` says otherwise."""
    usual = {
        "stall": 1,
        "yields": True,
        "write_barrier": None,
        "read_barrier": None,
        "waits": (),
        "pairs_with_next": False,
    }
    return Instruction(0, op, (), operands, None, **{**usual, "target": None, **control})


FREE = make("FFMA", "R0", "R1", "R2", "R3")  # three banks
CONFLICT = make("FFMA", "R0", "R1", "R5", "R3")
LDS, MUFU, MINIMUM = make("LDS", "R0", "[R1]"), make("MUFU", "R0", "R1"), make("FMNMX", "R0", "R1", "R2", "PT")
LDG = make("LDG", "R0", "[R2]", write_barrier=0)


def stream(instructions: list[Instruction], smem_cycles: int = 1, sectors: int = 4, dram: int = 4) -> WarpStream:
    """The stream of a warp that executes these instructions, one after the other."""
    ops = [instruction.op for instruction in instructions]
    columns = (
        [smem_cycles * (op in ("LDS", "STS")) for op in ops],
        *([n * (op in ("LDG", "STG")) for op in ops] for n in (sectors, dram)),
    )
    return WarpStream(np.arange(len(ops)), *map(np.array, columns))
