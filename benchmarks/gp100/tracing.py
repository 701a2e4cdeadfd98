"""What the launches of a problem execute: the blocks that stand for all others, with their traces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastattn.kernel_sources import Arch, image_name

from . import card as gp100
from . import cubin, sass
from .cache import CacheShare
from .execute import BlockTrace, execute
from .launches import Launch, record
from .pipeline import WarpTrace
from .problems import Problem, params

MOST_ROWS = 4  # of a grid that are executed where each of them does something else


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

    def resident(self, launch: Launch) -> int:
        """Blocks on a multiprocessor at a time."""
        used = cubin.kernels(self.file(launch.element))[launch.kernel]
        return gp100.resident_blocks(launch.threads, used.registers, launch.smem + used.static_smem)


@dataclass(frozen=True, eq=False)
class Block:
    """A block that stands for others."""

    warps: tuple[WarpTrace, ...]

    @property
    def instructions(self) -> int:
        return sum(len(warp.index) for warp in self.warps)


class Kind(NamedTuple):
    """How many blocks of a launch are like this one."""

    block: Block
    count: int


@dataclass(frozen=True, eq=False)
class TracedLaunch:
    """A launch with its blocks, in the order in which they start."""

    kernel: str
    element: str
    program: sass.Program
    resident: int  # blocks on a multiprocessor at a time
    kinds: tuple[Kind, ...]

    @property
    def blocks(self) -> int:
        return sum(kind.count for kind in self.kinds)

    def on_fullest(self, multiprocessors: int) -> list[Block]:
        """The blocks of the multiprocessor that has most of them."""
        ends = np.cumsum([kind.count for kind in self.kinds])
        numbers = range(0, self.blocks, multiprocessors)
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
        launches = self._record(problem, problem.seqlen)
        executed = launches if seqlen == problem.seqlen else self._record(problem, seqlen)
        if [launch.element for launch in launches] != [launch.element for launch in executed]:
            raise ValueError(f"seqlen: {problem} is computed by other launches when it is cut to {seqlen}")
        return [self._trace(problem, seqlen, *pair) for pair in zip(launches, executed, strict=True)]

    def _record(self, problem: Problem, seqlen: int) -> list[Launch]:
        return record(params(problem, seqlen), problem.is_backward, multiprocessors=self._multiprocessors)

    def _trace(self, problem: Problem, seqlen: int, launch: Launch, executed: Launch) -> TracedLaunch:
        program = self.kernels.program(launch.kernel, launch.element)
        resident = self.kernels.resident(launch)
        columns, rows = launch.grid[:2]
        at_once = min(resident * self._multiprocessors, columns * rows)
        sectors = gp100.L2_BYTES // gp100.SECTOR // at_once
        # Blocks of the same (batch, head) read the same keys and values while they run at once.
        sharing = max(1.0, at_once / columns)
        kinds = []
        for row, row_executed, count in _rows(rows, executed.grid[1], is_alike=problem.feature != "causal"):
            key = (launch.kernel, launch.element, *problem[4:], seqlen, row_executed, sectors, sharing)
            if key not in self._blocks:
                traces = execute(
                    *(program, launch.grid, launch.threads, launch.smem, executed.params, executed.buffers),
                    [(0, row_executed)],
                )
                self._blocks[key] = _block(traces[0, row_executed], sectors, sharing)
            kinds.append(Kind(self._blocks[key], count * columns))
        return TracedLaunch(launch.kernel, launch.element, program, resident, tuple(kinds))


def _rows(rows: int, rows_executed: int, is_alike: bool) -> list[tuple[int, int, int]]:
    """Rows of a grid, each with the row that is executed in its place and how many rows there are like it.

    Args:
        rows: of the launch.
        rows_executed: of the launch that is executed.
        is_alike: only the last row differs from the others, because it may be cut off.
    """
    if is_alike:
        return [(0, 0, rows - 1), (rows - 1, rows_executed - 1, 1)][rows == 1 :]
    first = np.linspace(0, rows, min(rows, MOST_ROWS) + 1).astype(int)
    return [(begin, (begin + end) // 2, end - begin) for begin, end in zip(first[:-1], first[1:], strict=True)]


def _block(trace: BlockTrace, sectors: int, sharing: Callable[[str], float]) -> Block:
    """The block, with what of its traffic misses its share of L2.

    Args:
        trace: what it executed.
        sectors: that its share holds.
        sharing: how many blocks read a buffer's sectors at the same time, by the buffer's name.
    """
    cache = CacheShare(sectors)
    missed: list[list[float]] = [[] for _ in trace.warps]
    for name, is_store, keys in trace.accesses:
        share = 1.0 if is_store else 1 / sharing(name)
        by_warp: dict[int, list[int]] = {}
        for key in keys.tolist():
            by_warp.setdefault(key >> 48, []).append(key & SECTOR_BITS)
        for warp, accessed in by_warp.items():
            found = cache.write(accessed) if is_store else cache.read(accessed)
            missed[warp].append((len(accessed), share * len(found)))
    return Block(tuple(_warp(warp, of_warp) for warp, of_warp in zip(trace.warps, missed, strict=True)))


def _warp(trace: Trace, missed: list[tuple[int, float]]) -> WarpTrace:
    """Lays the misses, which come in the order of execution, beside the instructions."""
