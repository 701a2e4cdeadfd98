"""The predicted time of a forward pass without a mask: streams replayed, waves counted, DRAM beside them."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.p100.machine.sass import Program

from . import chips
from .replay import Multiprocessor, encode
from .walk import Tile, stream

REPLAYED_WAVES = 3  # of a launch with more; every further block takes as long as those behind the first wave


class Kernel(NamedTuple):
    """A forward kernel on a card."""

    program: Program
    tile: Tile
    registers: int
    smem: int  # bytes of a block
    element_bytes: int


class Forward(NamedTuple):
    """A forward pass without a mask."""

    heads: int  # batch and heads together
    seqlen: int
    head_dim: int

    @property
    def flops(self) -> float:
        return 4.0 * self.heads * self.seqlen**2 * self.head_dim


def microseconds(kernel: Kernel, pass_: Forward, card: chips.Card) -> float:
    """The predicted time of a pass by a kernel on a card."""
    tile = kernel.tile
    positions = stream(kernel.program, tile, -(-pass_.seqlen // tile.block_n))
    table = [encode(instruction, card) for instruction in kernel.program.instructions]
    resident = card.resident_blocks(32 * tile.warps, kernel.registers, kernel.smem)
    blocks = -(-(-(-pass_.seqlen // tile.block_m) * pass_.heads) // card.multiprocessors)  # of the fullest one
    replayed = blocks if blocks <= REPLAYED_WAVES * resident else REPLAYED_WAVES * resident
    ends = Multiprocessor([table[n] for n in positions], tile.warps, resident).run(replayed)
    cycles = ends[-1]
    if blocks > replayed:
        cycles += (blocks - replayed) * (ends[-1] - ends[resident - 1]) / (replayed - resident)
    moved = 4.0 * pass_.heads * pass_.seqlen * pass_.head_dim * kernel.element_bytes  # q, k, v and out once
    dram_s = moved / (chips.DRAM_SHARE * card.dram_bytes_per_s)
    return 1e6 * (max(cycles / card.clock_hz, dram_s) + chips.LAUNCH_SECONDS)
