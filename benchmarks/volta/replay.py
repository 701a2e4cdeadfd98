"""A cycle model of one multiprocessor with four partitions, which replays the streams of all its resident warps.

Each partition issues one instruction per cycle, that of the warp that has been ready longest, if its unit accepts it.
A warp is ready again when its stall count has passed and the scoreboards that it waits for are released. Shared memory
and the path to global memory are one unit for all four.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import NamedTuple

from benchmarks.p100.machine.sass import Instruction

from . import chips


class Op(NamedTuple):
    """An instruction as the model sees it."""

    unit: int
    cycles: int  # for which the unit of the partition is busy
    latency: int  # from then on, until the result is there
    shared: int  # cycles of shared memory
    global_: int  # cycles of the path to global memory, of 128 bytes each
    stall: int
    waits: tuple[int, ...]
    write_barrier: int | None
    read_barrier: int | None
    is_barrier: bool


def _words(instruction: Instruction) -> int:
    """The words of 4 bytes that a lane moves."""
    return next((words for width, words in (("128", 4), ("64", 2)) if width in instruction.modifiers), 1)


def _shared_cycles(instruction: Instruction) -> int:
    words = _words(instruction)
    if instruction.op == "LDSM":
        return int(instruction.modifiers[-1]) if instruction.modifiers[-1] in ("2", "4") else 1
    return {"LDS": max(1, words // 2), "STS": words, "SHFL": 2}.get(instruction.op, 0)


def encode(instruction: Instruction, card: chips.Card) -> Op:
    """The op of an instruction on a card."""
    unit = chips.UNIT_OF.get(instruction.op, chips.INTEGER)
    latency = chips.SPECIAL_LATENCY if unit == chips.SPECIAL else 0
    if unit == chips.TENSOR:
        cycles, latency = card.tensor_cycles, card.tensor_latency
    else:
        cycles = chips.MEMORY_ISSUE if unit == chips.MEMORY else chips.CYCLES[unit]
    is_global = instruction.op in ("LDG", "LD", "STG", "ST")
    return Op(
        unit=unit,
        cycles=cycles,
        latency=latency,
        shared=_shared_cycles(instruction),
        global_=_words(instruction) if is_global else 0,
        stall=max(1, instruction.stall),
        waits=instruction.waits,
        write_barrier=instruction.write_barrier,
        read_barrier=instruction.read_barrier,
        is_barrier=instruction.op == "BAR",
    )


@dataclass(eq=False, slots=True)
class _Block:
    warps: int
    running: int
    arrived: list[tuple[float, _Warp]] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Warp:
    block: _Block
    partition: int
    next: int = 0
    scoreboards: list[float] = field(default_factory=partial(list, (0.0,) * 6))


class Multiprocessor:
    """A multiprocessor that runs blocks in turn, so many at a time.

    Args:
        ops: the stream of each of their warps.
        warps: of a block.
        resident: the number of blocks at a time.
    """

    def __init__(self, ops: list[Op], warps: int, resident: int) -> None:
        self._ops, self._warps, self._resident = ops, warps, resident
        self._heap: list[tuple[float, int, _Warp]] = []
        self._order = self._started = 0
        self._issue = [0.0] * chips.PARTITIONS
        self._units = [[0.0] * 7 for _ in range(chips.PARTITIONS)]
        self._shared = self._global = 0.0
        self.finished: list[float] = []

    def run(self, blocks: int) -> list[float]:
        """Replay so many blocks; the cycles at which they have finished, in that order."""
        for first in range(min(self._resident, blocks)):
            self._start(first * chips.BLOCK_STAGGER)
        waiting = blocks - self._resident
        while self._heap:
            ready, _, warp = heappop(self._heap)
            op = self._ops[warp.next]
            now = self._possible(ready, op, warp)
            if now > ready:
                self._push(now, warp)
                continue
            self._take(now, op, warp)
            warp.next += 1
            if warp.next == len(self._ops):
                warp.block.running -= 1
                if not warp.block.running:
                    self.finished.append(now)
                    if waiting > 0:
                        waiting -= 1
                        self._start(now + chips.BLOCK_LAUNCH)
            elif op.is_barrier:
                self._arrive(now + op.stall, warp)
            else:
                self._push(now + op.stall, warp)
        return self.finished

    def _start(self, now: float) -> None:
        block = _Block(self._warps, self._warps)
        for _ in range(self._warps):
            self._push(now, _Warp(block, self._started % chips.PARTITIONS))
            self._started += 1

    def _push(self, ready: float, warp: _Warp) -> None:
        self._order += 1
        heappush(self._heap, (ready, self._order, warp))

    def _possible(self, ready: float, op: Op, warp: _Warp) -> float:
        now = max(ready, self._issue[warp.partition], self._units[warp.partition][op.unit])
        for barrier in op.waits:
            now = max(now, warp.scoreboards[barrier])
        if op.shared:
            now = max(now, self._shared - chips.QUEUE_CYCLES)
        elif op.global_:
            now = max(now, self._global - chips.QUEUE_CYCLES)
        return now

    def _take(self, now: float, op: Op, warp: _Warp) -> None:
        self._issue[warp.partition] = now + 1
        self._units[warp.partition][op.unit] = now + op.cycles
        done = read = now + op.cycles + op.latency
        if op.shared:
            self._shared = max(self._shared, now + chips.MEMORY_DELAY) + op.shared
            read, done = self._shared, self._shared + chips.SMEM_LATENCY
        elif op.global_:
            self._global = max(self._global, now + chips.MEMORY_DELAY) + op.global_
            read, done = self._global, self._global + chips.GLOBAL_LATENCY
        elif op.unit == chips.MEMORY:
            done = now + chips.OTHER_LATENCY
        if op.write_barrier is not None:
            warp.scoreboards[op.write_barrier] = max(warp.scoreboards[op.write_barrier], done)
        if op.read_barrier is not None:
            warp.scoreboards[op.read_barrier] = max(warp.scoreboards[op.read_barrier], read)

    def _arrive(self, now: float, warp: _Warp) -> None:
        block = warp.block
        block.arrived.append((now, warp))
        if len(block.arrived) == block.warps:
            opens = max(ready for ready, _ in block.arrived) + chips.BARRIER_LATENCY
            for _, arrived in block.arrived:
                self._push(opens, arrived)
            block.arrived = []
