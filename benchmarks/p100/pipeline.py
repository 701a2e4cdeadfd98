"""A cycle model of one multiprocessor of the P100, which replays the instruction streams of its blocks' warps.

Each scheduler issues one instruction, or one pair, per cycle: that of the warp that has been ready longest, if its unit
accepts it. A warp is ready again when the stall count of its control word has passed and the scoreboards that its next
instruction waits for are released. Units are servers: they are free again after as many cycles as an instruction keeps
them busy. L2 and DRAM are two more servers, with this multiprocessor's share of the card's bandwidth; bandwidth that it
leaves unused is credited to it for a while, because multiprocessors do not all load at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import chip
from .machine.memory import SECTOR_BYTES
from .machine.sass import Instruction, Program
from .static_analysis import bank_conflicts


class ChipAssumptions(NamedTuple):
    """Assumptions of the cycle model about the chip, to be changed one at a time."""

    dual_issue: bool = True
    register_conflicts: bool = True
    dram_rate: float = 1.0  # factor on the bandwidth of DRAM that the card is assumed to reach
    in_step: bool = False  # all multiprocessors load at the same time and divide the rates evenly at every moment


USUAL = ChipAssumptions()
SENSITIVITIES = {
    "no pairs": ChipAssumptions(dual_issue=False),
    "no register conflicts": ChipAssumptions(register_conflicts=False),
    "half of DRAM": ChipAssumptions(dram_rate=0.5),
    "in step": ChipAssumptions(in_step=True),
}


class WarpStream(NamedTuple):
    """The instruction stream of a warp with what each instruction asks of the memories: arrays of one length."""

    positions: NDArray[Any]  # of the instructions in the program
    smem_cycles: NDArray[Any]  # cycles of shared memory, for 128 bytes each
    sectors: NDArray[Any]  # of global memory
    dram_sectors: NDArray[Any]  # those of them that miss L2


class Bandwidth(NamedTuple):
    """The bytes per cycle that one multiprocessor gets of L2 and DRAM."""

    l2: float
    dram: float

    @classmethod
    def of(cls, card: chip.Card, active: int, assumptions: ChipAssumptions) -> Bandwidth:
        """The equal share of one of `active` multiprocessors."""
        return cls(card.l2_bytes_per_cycle() / active, assumptions.dram_rate * card.dram_bytes_per_cycle() / active)


# ---- instructions to issue ----


class Effect(NamedTuple):
    """The consequences of an issued instruction: scoreboards to release, traffic, a barrier."""

    write_barrier: int | None
    read_barrier: int | None
    latency: int
    read_latency: int
    l2_cycles: float
    dram_cycles: float
    is_block_barrier: bool


class Op(NamedTuple):
    """One instruction to issue, in the order in which the loop below unpacks it."""

    position: int  # in the program
    unit: int  # one of the numbers below
    cycles: int  # for which the unit is busy
    queue: int  # cycles of earlier work that the unit may still have to do
    stall: int
    waits: tuple[tuple[int, int], ...]  # scoreboards, each with the number of results that may be outstanding
    effect: Effect | None
    paired: Op | None  # issued in the same cycle


# Units by number: first FP32 and SFU of each scheduler, then those of the multiprocessor.
_SHARED, _GLOBAL, _CONTROL, _L2, _DRAM, _UNITS = 4, 5, 6, 7, 8, 9


def _unit(kind: int, scheduler: int) -> int:
    if kind in (chip.FP32, chip.SFU):
        return kind * chip.SCHEDULERS + scheduler
    return {chip.SHARED: _SHARED, chip.GLOBAL: _GLOBAL, chip.CONTROL: _CONTROL}[kind]


class Encoder:
    """An encoder of the instruction streams of one program as lists of `Op`.

    Args:
        program: the machine code.
        share: the bandwidth of the multiprocessor.
        assumptions: those of the model.
        dram_latency: cycles of a load from DRAM.
    """

    def __init__(
        self,
        program: Program,
        share: Bandwidth,
        assumptions: ChipAssumptions,
        dram_latency: int = chip.DRAM_LATENCY,
    ) -> None:
        self._dram_latency = dram_latency
        self._instructions = program.instructions
        self._conflicts = bank_conflicts(program) if assumptions.register_conflicts else [0] * len(self._instructions)
        self._pairs = np.array([i.pairs_with_next and assumptions.dual_issue for i in self._instructions])
        self._share = share
        self._ops: dict[tuple[int, int], Op] = {}

    def for_schedulers(self, stream: WarpStream) -> list[list[Op]]:
        """The ops of a warp, once for each of the schedulers that it may belong to."""
        return [self.encode(stream, scheduler) for scheduler in range(chip.SCHEDULERS)]

    def encode(self, stream: WarpStream, scheduler: int) -> list[Op]:
        """The ops of a warp of one scheduler."""
        index, smem_cycles, sectors, dram_sectors = (column.astype(np.int64) for column in stream)
        packed = ((index << 12 | smem_cycles) << 12 | sectors) << 12 | dram_sectors
        kinds, kind_of = np.unique(packed, return_inverse=True)
        begins_pair = np.zeros(len(index) + 1, bool)
        begins_pair[1:-1] = self._pairs[index[:-1]] & (index[1:] == index[:-1] + 1)
        is_second, is_first = begins_pair[:-1], begins_pair[1:]
        following = np.where(is_first, np.roll(kind_of, -1), -1)
        pairs, pair_of = np.unique((kind_of * (len(kinds) + 1) + following + 1)[~is_second], return_inverse=True)
        table = []
        for kind, after in zip(*np.divmod(pairs, len(kinds) + 1), strict=True):
            op = self._op(int(kinds[kind]), scheduler)
            table.append(op if after == 0 else _paired(op, self._op(int(kinds[after - 1]), scheduler)))
        return [table[pair] for pair in pair_of.tolist()]

    def _op(self, kind: int, scheduler: int) -> Op:
        if (kind, scheduler) not in self._ops:
            unpacked = (kind >> 36, kind >> 24 & 4095, kind >> 12 & 4095, kind & 4095)
            self._ops[kind, scheduler] = self._new(*unpacked, scheduler)
        return self._ops[kind, scheduler]

    def _new(self, index: int, smem_cycles: int, sectors: int, dram_sectors: int, scheduler: int) -> Op:
        instruction = self._instructions[index]
        timing = chip.timing_of(instruction.op, instruction.modifiers)
        cycles = timing.cycles
        if timing.unit == chip.FP32:
            cycles += self._conflicts[index]
        elif timing.unit == chip.SHARED:
            cycles = max(smem_cycles, cycles)
        elif timing.unit == chip.GLOBAL:
            cycles = max(SECTOR_BYTES * sectors // chip.SMEM_BYTES_PER_CYCLE, cycles)
        return Op(
            position=index,
            unit=_unit(timing.unit, scheduler),
            cycles=cycles,
            queue=chip.QUEUE_CYCLES if timing.unit in (chip.SHARED, chip.GLOBAL) else 0,
            stall=max(1, instruction.stall),
            waits=_waits(instruction),
            effect=self._effect(instruction, timing, sectors, dram_sectors),
            paired=None,
        )

    def _effect(self, instruction: Instruction, timing: chip.Timing, sectors: int, dram_sectors: int) -> Effect | None:
        is_barrier = instruction.op == "BAR"
        scoreboards = (instruction.write_barrier, instruction.read_barrier)
        if scoreboards == (None, None) and not is_barrier and not sectors:
            return None
        latency = timing.latency
        if timing.unit == chip.GLOBAL:
            latency = self._dram_latency if dram_sectors else chip.L2_LATENCY
        l2, dram = SECTOR_BYTES * sectors / self._share.l2, SECTOR_BYTES * dram_sectors / self._share.dram
        return Effect(*scoreboards, latency, timing.read_latency, l2, dram, is_barrier)


def _paired(first: Op, second: Op) -> Op:
    return first._replace(stall=second.stall, waits=first.waits + second.waits, paired=second)


def _waits(instruction: Instruction) -> tuple[tuple[int, int], ...]:
    waits = tuple((barrier, 0) for barrier in instruction.waits)
    if instruction.op == "DEPBAR" and instruction.operands[0].startswith("SB"):
        waits += ((int(instruction.operands[0][2:]), int(instruction.operands[1], 0)),)
    return waits


# ---- the multiprocessor ----


@dataclass(eq=False, slots=True)
class _RunningWarp:
    ops: list[Op]
    block: _RunningBlock
    scheduler: int
    next: int = 0
    released: tuple[list[float], ...] = field(default_factory=lambda: tuple([] for _ in range(6)))  # cycles, in order

    def ready(self, after: float) -> float:
        """The cycle at which the scoreboards allow the next instruction."""
        for barrier, outstanding in self.ops[self.next].waits:
            times = self.released[barrier]
            if len(times) > outstanding and times[-1 - outstanding] > after:
                after = math.ceil(times[-1 - outstanding])
        return after

    def release(self, barrier: int, time: float) -> None:
        times = self.released[barrier]
        times.append(max(time, times[-1]) if times else time)


@dataclass(eq=False, slots=True)
class _RunningBlock:
    running: int  # warps
    arrived: list[_RunningWarp] = field(default_factory=list)  # at the barrier


class Multiprocessor:
    """A multiprocessor that runs blocks in turn, so many at a time.

    Args:
        blocks: the ops of each block's warps, once for each scheduler that may get the warp.
        resident: the number of blocks at a time.
        assumptions: those of the model.
    """

    def __init__(
        self, blocks: Iterable[Sequence[Sequence[list[Op]]]], resident: int, assumptions: ChipAssumptions = USUAL
    ) -> None:
        self.finished: list[float] = []  # the cycle at which each block ended
        # Cycles in which a scheduler had nothing to issue, by the position of the instruction that came next.
        self.idle: dict[int, float] = {}
        self._waiting = iter(blocks)
        self._heaps: tuple[list[tuple[float, int, _RunningWarp]], ...] = ([], [])
        self._free = [0.0] * _UNITS
        self._slots = [0.0, 0.0]  # the cycle from which each scheduler can issue again
        self._credit = 0 if assumptions.in_step else chip.BANDWIDTH_CREDIT
        self._order = 0
        self._started_warps = 0
        for first in range(resident):
            self._start_block(first * chip.BLOCK_STAGGER)

    def run(self) -> list[float]:
        """Replay all blocks; the cycles at which they have finished, in that order."""
        heaps, free, slots = self._heaps, self._free, self._slots
        while heaps[0] or heaps[1]:
            turn = _earlier(heaps, slots)
            heap = heaps[turn]
            ready, _, warp = heap[0]
            now = ready if ready > slots[turn] else slots[turn]
            position, unit, cycles, queue, stall, _, effect, paired = warp.ops[warp.next]
            possible = free[unit] - queue
            if paired is not None:
                possible = max(possible, free[paired.unit] - paired.queue)
            self._order += 1
            if possible > now:
                heapreplace(heap, (possible, self._order, warp))
                continue
            if now > slots[turn]:
                self.idle[position] = self.idle.get(position, 0.0) + now - slots[turn]
            slots[turn] = now + 1
            begin = free[unit]
            if begin < now:
                begin = now
            free[unit] = begin + cycles
            if effect is not None:
                self._take_effect(warp, effect, now, begin + cycles)
            if paired is not None:
                effect = self._issue_paired(warp, paired, now) or effect
            warp.next += 1
            if warp.next == len(warp.ops):
                heappop(heap)
                self._finish_warp(warp, now + stall)
            elif effect is not None and effect.is_block_barrier:
                heappop(heap)
                self._arrive(warp, now + stall)
            else:
                heapreplace(heap, (warp.ready(now + stall), self._order, warp))
        return self.finished

    def _issue_paired(self, warp: _RunningWarp, op: Op, now: float) -> Effect | None:
        begin = max(now, self._free[op.unit])
        self._free[op.unit] = begin + op.cycles
        if op.effect is not None:
            self._take_effect(warp, op.effect, now, begin + op.cycles)
        return op.effect

    def _take_effect(self, warp: _RunningWarp, effect: Effect, now: float, done: float) -> None:
        free = self._free
        if effect.read_barrier is not None:
            warp.release(effect.read_barrier, done + effect.read_latency)
        if effect.l2_cycles:
            free[_L2] = max(now - self._credit, free[_L2]) + effect.l2_cycles
            done = max(done, free[_L2])
        if effect.dram_cycles:
            free[_DRAM] = max(now - self._credit, free[_DRAM]) + effect.dram_cycles
            done = max(done, free[_DRAM])
        if effect.write_barrier is not None:
            warp.release(effect.write_barrier, done + effect.latency)

    def _arrive(self, warp: _RunningWarp, now: float) -> None:
        warp.block.arrived.append(warp)
        self._open_barrier(warp.block, now)

    def _open_barrier(self, block: _RunningBlock, now: float) -> None:
        if len(block.arrived) < block.running:
            return
        for warp in block.arrived:
            self._push(warp, now + chip.BARRIER_LATENCY)
        block.arrived = []

    def _push(self, warp: _RunningWarp, after: float) -> None:
        self._order += 1
        heappush(self._heaps[warp.scheduler], (warp.ready(after), self._order, warp))

    def _finish_warp(self, warp: _RunningWarp, now: float) -> None:
        warp.block.running -= 1
        if warp.block.running:
            self._open_barrier(warp.block, now)
        else:
            self.finished.append(now)
            self._start_block(now + chip.BLOCK_LAUNCH)

    def _start_block(self, now: float) -> None:
        ops_of_warps = next(self._waiting, None)
        if ops_of_warps is None:
            return
        block = _RunningBlock(running=len(ops_of_warps))
        for ops in ops_of_warps:
            scheduler = self._started_warps % chip.SCHEDULERS
            self._started_warps += 1
            self._push(_RunningWarp(ops[scheduler], block, scheduler), now)


def _earlier(heaps: tuple[list[tuple[float, int, _RunningWarp]], ...], slots: list[float]) -> int:
    """The scheduler that issues next."""
    if not heaps[0] or not heaps[1]:
        return int(not heaps[0])
    return int(max(heaps[1][0][0], slots[1]) < max(heaps[0][0][0], slots[0]))
