"""What the launches of a problem execute: the blocks that stand for all others, with their traces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastattn.cuda_kernels.sources import Arch, image_name

from . import chip
from .cache import CacheShare
from .launches import Launch
from .machine import cubin, sass
from .machine.execute import execute
from .machine.trace import BlockTrace, Trace
from .pipeline import WarpTrace
from .problems import Problem, launches

BROADCAST = ("mask", "bias")
SECTOR_BITS = (1 << 48) - 1
STEP = 64  # lengths that are a multiple of it take whole tiles
SHARED = {  # what the tiles of a (batch, head) read together
    "attention_fwd": frozenset({"k", "v"}),
    "attention_bwd": frozenset({"q", "dout", "lse", "delta"}),
    "attention_bwd_dq": frozenset({"k", "v"}),
    "attention_bwd_dbias": frozenset({"q", "k", "v", "dout", "lse", "delta"}),
}
MOST_TILES = 4  # of a (batch, head) that are executed where each of them does something else


class Kernels:
    """The kernels of a folder of cubins.

    Args:
        folder: with one cubin for each element type.
        cubin: taken for every element type in the place of the folder's.
    """

    def __init__(self, folder: Path, cubin: Path | None = None) -> None:
        self._folder, self._cubin = folder, cubin
        self._programs: dict[tuple[str, str], sass.Program] = {}

    def file(self, element: str) -> Path:
        return self._cubin or self._folder / image_name(element, Arch("sm", 60))

    def program(self, kernel: str, element: str) -> sass.Program:
        key = kernel, element
        if key not in self._programs:
            self._programs[key] = sass.disassemble(self.file(element), kernel)
        return self._programs[key]

    def resources(self, kernel: str, element: str) -> cubin.Resources:
        return cubin.kernels(self.file(element))[kernel]


@dataclass(frozen=True, eq=False)
class Block:
    """A block that stands for others."""

    warps: tuple[WarpTrace, ...]

    @property
    def instructions(self) -> int:
        return sum(len(warp.index) for warp in self.warps)

    def times(self, program: sass.Program) -> np.ndarray:
        """How often its warps executed each instruction."""
        return sum(np.bincount(warp.index, minlength=len(program.instructions)) for warp in self.warps)


class Kind(NamedTuple):
    """How many blocks of a launch are like this one."""

    block: Block
    count: int


class Taken(NamedTuple):
    """What a launch takes of a multiprocessor."""

    threads: int  # of a block
    registers: int  # of a thread
    smem: int  # bytes of a block
    resident: int  # blocks at a time


@dataclass(frozen=True, eq=False)
class TracedLaunch:
    """A launch with its blocks."""

    kernel: str
    element: str
    program: sass.Program
    taken: Taken
    kinds: tuple[Kind, ...]

    @property
    def blocks(self) -> int:
        return sum(kind.count for kind in self.kinds)

    def on_fullest(self, multiprocessors: int) -> list[Block]:
        """The blocks of the multiprocessor that has most: all kinds in their proportion, one behind the other."""
        ends = np.cumsum([kind.count for kind in self.kinds])
        count = -(-self.blocks // multiprocessors)
        numbers = (np.arange(count) + 0.5) / count * self.blocks
        return [self.kinds[i].block for i in np.searchsorted(ends, numbers, side="right")]


class Tracer:
    """Executes blocks; one that was executed once is kept.

    Args:
        kernels: what runs.
        multiprocessors: of the card.
    """

    def __init__(self, kernels: Kernels, multiprocessors: int) -> None:
        self.kernels, self._multiprocessors = kernels, multiprocessors
        self._blocks: dict[tuple[object, ...], Block] = {}

    def trace(self, problem: Problem, seqlen: int) -> list[TracedLaunch]:
        """The launches of a problem, whose blocks are executed as if its sequences were no longer than `seqlen`."""
        real = launches(problem, self._multiprocessors)
        cut = launches(problem, self._multiprocessors, seqlen)
        if len(real) != len(cut):
            raise ValueError(f"seqlen: {problem} is computed by other kernels when it is cut to {seqlen}")
        return [self._trace(problem, seqlen, *pair) for pair in zip(real, cut, strict=True)]

    def _trace(self, problem: Problem, seqlen: int, launch: Launch, executed: Launch) -> TracedLaunch:
        program = self.kernels.program(launch.kernel, launch.element)
        used = self.kernels.resources(launch.kernel, launch.element)
        smem = launch.smem + used.static_smem
        resident = chip.resident_blocks(launch.threads, used.registers, smem)
        heads_in_x = problem.nheads if launch.kernel.startswith("attention_bwd_dbias") else 1
        tiles, pairs = launch.grid[0] // heads_in_x, heads_in_x * launch.grid[1] * launch.grid[2]
        at_once = min(resident * self._multiprocessors, tiles * pairs)
        # The tiles of a (batch, head) start one behind the other, and read some tensors together; masks and biases
        # serve many.
        together, running = min(tiles, at_once), math.ceil(at_once / tiles)
        shared = SHARED.get(launch.kernel.partition("_d")[0], frozenset())
        sharing = {
            name: max(
                together if name in shared else 1.0,
                together * _served(tensor, problem.nheads, running) if name in BROADCAST else 1.0,
            )
            for tensor, name, _ in executed.buffers
        }
        # Without a feature, nothing but its own (batch, head) matters to a block.
        alike = problem._replace(batch=1, nheads=1, seqlen=1) if problem.feature == "plain" else problem
        kinds = []
        tiles_executed, is_causal = executed.grid[0] // heads_in_x, problem.feature == "causal"
        for tile, count in _tiles(tiles, tiles_executed, is_causal, is_ragged=seqlen % STEP != 0):
            key = (launch.kernel, launch.element, alike, seqlen, tile, at_once, *sharing.values())
            if key not in self._blocks:
                what = (launch.grid, launch.threads, launch.smem, executed.params_bytes, executed.buffers)
                (trace,) = execute(program, *what, [(tile, 0, 0)]).values()
                self._blocks[key] = block(trace, chip.L2_BYTES // chip.SECTOR // at_once, sharing)
            kinds.append(Kind(self._blocks[key], count * pairs))
        taken = Taken(launch.threads, used.registers, smem, resident)
        return TracedLaunch(launch.kernel, launch.element, program, taken, tuple(kinds))


def _tiles(tiles: int, executed: int, is_causal: bool, is_ragged: bool) -> list[tuple[int, int]]:
    """The tiles of a (batch, head) that are executed, and for how many tiles each of them stands.

    Args:
        tiles: of the launch.
        executed: of the launch that is executed.
        is_causal: each tile does something else.
        is_ragged: the last tile is cut off.
    """
    if not is_causal:
        return [(0, tiles - 1), (executed - 1, 1)][tiles == 1 :] if is_ragged else [(0, tiles)]
    first = np.linspace(0, tiles, min(tiles, MOST_TILES) + 1).astype(int)
    return [(int(begin + end) // 2, int(end - begin)) for begin, end in zip(first[:-1], first[1:], strict=True)]


def block(trace: BlockTrace, sectors: int, sharing: dict[str, float]) -> Block:
    """The block, with what of its traffic misses its share of L2.

    Args:
        trace: what it executed.
        sectors: that its share holds.
        sharing: how many blocks read the same of a buffer at the same time, by the buffer's name.
    """
    cache = CacheShare(sectors)
    missed: list[list[tuple[int, float]]] = [[] for _ in trace.warps]
    for name, is_store, keys in trace.accesses:
        share = 1.0 if is_store else 1 / sharing[name]
        by_warp: dict[int, list[int]] = {}
        for key in keys.tolist():
            by_warp.setdefault(key >> 48, []).append(key & SECTOR_BITS)
        for warp, accessed in by_warp.items():
            found = cache.write(accessed) if is_store else cache.read(accessed)
            missed[warp].append((len(accessed), share * len(found)))
    return Block(tuple(_warp(warp, of_warp) for warp, of_warp in zip(trace.warps, missed, strict=True)))


def _warp(trace: Trace, missed: list[tuple[int, float]]) -> WarpTrace:
    """Lays the misses, which come in the order of execution, beside the instructions."""
    is_access = np.flatnonzero(trace.sectors)
    dram = np.zeros(len(trace.index))
    waiting = iter(missed)
    for position in is_access:
        rest = int(trace.sectors[position])
        while rest > 0:  # an access to two buffers comes in two parts
            accessed, misses = next(waiting)
            rest -= accessed
            dram[position] += misses
    # Whole sectors, whose sum is that of the shares.
    whole = np.diff(np.round(np.cumsum(dram)), prepend=0.0)
    return WarpTrace(trace.index, trace.smem_cycles, trace.sectors, whole.astype(np.int64))


def _served(scores: torch.Tensor, nheads: int, running: int) -> float:
    """How many of the first (batch, head) that run at once read the same of a mask or a bias."""
    batch, heads = (size > 1 for size in scores.shape[:2])
    return running / len({(n // nheads * batch, n % nheads * heads) for n in range(running)})
