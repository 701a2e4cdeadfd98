"""The launches of a pass, traced: a few of their blocks are executed and stand for all others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastattn.cuda_kernels import images
from fastattn.cuda_kernels.sources import Arch, image_name

from . import chip
from .l2_cache import CacheShare
from .launches import Launch
from .machine import cubin, sass
from .machine.execute import execute
from .machine.memory import LOCAL, SECTOR_BYTES, SECTOR_MASK, WARP_SHIFT
from .machine.trace import BlockTrace, WarpTrace
from .passes import Pass, launches
from .pipeline import WarpStream

INSTALLED = images.HERE.kernels
WHOLE_TILES = 64  # lengths that are a multiple of it have no partial tile
BROADCAST = ("mask", "bias")  # buffers that several (batch, head) may read
READ_BY_ALL_TILES = {  # buffers that every tile of a (batch, head) reads, by pass
    "attention_fwd": frozenset({"k", "v"}),
    "attention_bwd": frozenset({"q", "dout", "lse", "delta"}),
    "attention_bwd_dq": frozenset({"k", "v"}),
    "attention_bwd_dbias": frozenset({"q", "k", "v", "dout", "lse", "delta"}),
}
EXECUTED_TILES = 4  # of a (batch, head), where each tile has other work


class Cubins:
    """The cubins of a build, one per element type, and the machine code of their kernels.

    Args:
        folder: the folder of the cubins.
        override: a cubin for every element type, instead of those in the folder.
    """

    def __init__(self, folder: Path, override: Path | None = None) -> None:
        self._folder, self._override = folder, override
        self._programs: dict[tuple[str, str], sass.Program] = {}

    def file(self, element: str) -> Path:
        return self._override or self._folder / image_name(element, Arch("sm", 60))

    def program(self, kernel: str, element: str) -> sass.Program:
        key = kernel, element
        if key not in self._programs:
            self._programs[key] = sass.disassemble(self.file(element), kernel)
        return self._programs[key]

    def resources(self, kernel: str, element: str) -> cubin.KernelResources:
        return cubin.kernels(self.file(element))[kernel]


@dataclass(frozen=True, eq=False)
class Block:
    """A block that stands for others like it."""

    warps: tuple[WarpStream, ...]
    dram_latency: int = chip.DRAM_LATENCY  # cycles of its loads

    @property
    def instructions(self) -> int:
        return sum(len(warp.positions) for warp in self.warps)

    def times(self, program: sass.Program) -> NDArray[Any]:
        """The number of times that its warps execute each instruction."""
        return np.bincount(np.concatenate([w.positions for w in self.warps]), minlength=len(program.instructions))


class BlockKind(NamedTuple):
    """A block and the number of blocks of a launch that it stands for, itself included."""

    block: Block
    blocks: int


class Occupancy(NamedTuple):
    """Resources of a kernel and the number of its blocks that fit a multiprocessor."""

    threads: int  # per block
    registers: int  # per thread
    smem: int  # bytes per block
    resident: int  # blocks at a time


@dataclass(frozen=True, eq=False)
class TracedLaunch:
    """A launch and its kinds of blocks."""

    kernel: str
    element: str
    program: sass.Program
    occupancy: Occupancy
    kinds: tuple[BlockKind, ...]

    @property
    def blocks(self) -> int:
        return sum(kind.blocks for kind in self.kinds)

    def on_fullest(self, multiprocessors: int) -> list[Block]:
        """The blocks of the multiprocessor that has most: all kinds in their proportion, one after the other."""
        ends = np.cumsum([kind.blocks for kind in self.kinds])
        count = -(-self.blocks // multiprocessors)
        numbers = (np.arange(count) + 0.5) / count * self.blocks
        return [self.kinds[i].block for i in np.searchsorted(ends, numbers, side="right")]


class Tracer:
    """A tracer of passes, which keeps every block that it has executed once.

    Args:
        cubins: the kernels.
        multiprocessors: their number on the card.
    """

    def __init__(self, cubins: Cubins, multiprocessors: int) -> None:
        self.cubins, self._multiprocessors = cubins, multiprocessors
        self._blocks: dict[tuple[object, ...], Block] = {}

    def trace(self, pass_: Pass, seqlen: int) -> list[TracedLaunch]:
        """The launches of a pass, whose blocks are executed as if its sequences were no longer than `seqlen`."""
        real = launches(pass_, self._multiprocessors)
        cut = launches(pass_, self._multiprocessors, seqlen)
        if len(real) != len(cut):
            raise ValueError(f"seqlen: {pass_} is computed by other kernels when it is cut to {seqlen}")
        return [self._trace(pass_, seqlen, *pair) for pair in zip(real, cut, strict=True)]

    def _trace(self, pass_: Pass, seqlen: int, launch: Launch, executed: Launch) -> TracedLaunch:
        program = self.cubins.program(launch.kernel, launch.element)
        used = self.cubins.resources(launch.kernel, launch.element)
        smem = launch.smem + used.static_smem
        resident = chip.resident_blocks(launch.threads, used.registers, smem)
        heads_in_x = pass_.nheads if launch.kernel.startswith("attention_bwd_dbias") else 1
        tiles, pairs = launch.grid[0] // heads_in_x, heads_in_x * launch.grid[1] * launch.grid[2]
        at_once = min(resident * self._multiprocessors, tiles * pairs)
        # The tiles of a (batch, head) start one after the other and read some tensors together; a mask or a bias is
        # read by several (batch, head).
        together, running = min(tiles, at_once), math.ceil(at_once / tiles)
        shared = READ_BY_ALL_TILES.get(launch.kernel.partition("_d")[0], frozenset())
        sharing = {
            name: max(
                together if name in shared else 1.0,
                together * _readers(tensor, pass_.nheads, running) if name in BROADCAST else 1.0,
            )
            for tensor, name, _ in executed.buffers
        }
        # Blocks of a plain pass do not depend on the batch size, the number of heads or the true length.
        alike = pass_._replace(batch=1, nheads=1, seqlen=1) if pass_.feature == "plain" else pass_
        kinds = []
        tiles_executed, is_causal = executed.grid[0] // heads_in_x, pass_.feature == "causal"
        for tile, count in _tiles(tiles, tiles_executed, is_causal, is_ragged=seqlen % WHOLE_TILES != 0):
            key = (launch.kernel, launch.element, alike, seqlen, tile, at_once, *sharing.values())
            if key not in self._blocks:
                call = (launch.grid, launch.threads, launch.smem, executed.params_bytes, executed.buffers)
                (trace,) = execute(program, *call, [(tile, 0, 0)]).values()
                self._blocks[key] = block_of(trace, chip.L2_BYTES // SECTOR_BYTES // at_once, sharing)
            kinds.append(BlockKind(self._blocks[key], count * pairs))
        occupancy = Occupancy(launch.threads, used.registers, smem, resident)
        return TracedLaunch(launch.kernel, launch.element, program, occupancy, tuple(kinds))


def _tiles(tiles: int, executed: int, is_causal: bool, is_ragged: bool) -> list[tuple[int, int]]:
    """The tiles of a (batch, head) that are executed, and for how many tiles each of them stands.

    Args:
        tiles: their number in the launch.
        executed: their number in the launch with shorter sequences, which is executed.
        is_causal: each tile has another amount of work.
        is_ragged: the last tile is partial.
    """
    if not is_causal:
        return [(0, tiles - 1), (executed - 1, 1)][tiles == 1 :] if is_ragged else [(0, tiles)]
    first = np.linspace(0, tiles, min(tiles, EXECUTED_TILES) + 1).astype(int)
    return [(int(begin + end) // 2, int(end - begin)) for begin, end in zip(first[:-1], first[1:], strict=True)]


def block_of(trace: BlockTrace, sectors: int, sharing: dict[str, float]) -> Block:
    """The block of a trace, with the sectors that miss its share of L2.

    Args:
        trace: what the block executed.
        sectors: the capacity of its share.
        sharing: the number of blocks that read the same sectors of a buffer at the same time, by the buffer's name.
    """
    cache = CacheShare(sectors)
    missed: list[list[tuple[int, float]]] = [[] for _ in trace.warps]
    for name, is_store, keys in trace.accesses:
        share = 1.0 if is_store else 1 / sharing[name]
        by_warp: dict[int, list[int]] = {}
        for key in keys.tolist():
            by_warp.setdefault(key >> WARP_SHIFT, []).append(key & SECTOR_MASK)
        for warp, accessed in by_warp.items():
            misses = cache.write(accessed) if is_store else cache.read(accessed)
            missed[warp].append((len(accessed), share * len(misses)))
    streams = tuple(_stream(*warp) for warp in zip(trace.warps, missed, strict=True))
    return Block(streams, chip.SUMMING_DRAM_LATENCY if _adds_to_what_it_wrote(trace) else chip.DRAM_LATENCY)


def _adds_to_what_it_wrote(trace: BlockTrace) -> bool:
    """Whether the block reads sectors of global memory that it also writes; the stack does not count."""
    names = {*trace.read} & {*trace.written} - {LOCAL}
    return any(np.isin(trace.read[name], trace.written[name]).any() for name in names)


def _stream(trace: WarpTrace, missed: list[tuple[int, float]]) -> WarpStream:
    """The stream of a warp whose accesses, in the order of execution, are given with their misses."""
    is_access = np.flatnonzero(trace.sectors)
    dram = np.zeros(len(trace.index))
    accesses = iter(missed)
    for position in is_access:
        rest = int(trace.sectors[position])
        while rest > 0:  # an access to two buffers comes in two parts
            accessed, misses = next(accesses)
            rest -= accessed
            dram[position] += misses
    # Round to whole sectors so that their sum stays that of the fractions.
    whole = np.diff(np.round(np.cumsum(dram)), prepend=0.0)
    return WarpStream(trace.index, trace.smem_cycles, trace.sectors, whole.astype(np.int64))


def _readers(scores: torch.Tensor, nheads: int, running: int) -> float:
    """The mean number of the (batch, head) running at once that read the same part of a mask or a bias."""
    batch, heads = (size > 1 for size in scores.shape[:2])
    return running / len({(n // nheads * batch, n % nheads * heads) for n in range(running)})
