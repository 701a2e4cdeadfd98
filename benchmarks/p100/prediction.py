"""The predicted time of a pass: the streams of its blocks are replayed, and the waves counted.

A launch takes as long as the multiprocessor with most blocks. Few blocks are replayed as they come; of many, some waves
of each kind are, and every further block takes as long as those behind the first wave. Passes over long sequences are
replayed for shorter ones, in the same kernels, and extrapolated: the busy time of each unit by the polynomial through
the replayed lengths, which is exact; the busy share of the schedulers linearly in the inverse of the length.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple, Protocol

import numpy as np

from . import chip
from .machine.memory import SECTOR_BYTES
from .machine.sass import Program
from .passes import Pass
from .pipeline import USUAL, Bandwidth, ChipAssumptions, Encoder, Multiprocessor
from .static_analysis import bank_conflicts
from .tracing import WHOLE_TILES, Block, Cubins, TracedLaunch, Tracer

ISSUE = "issue, with pairs"
WITHOUT_PAIRS = "issue, one at a time"  # the limit if no two instructions were paired; not a bound
REPLAY_LIMIT = 500_000  # instructions: a multiprocessor with more of them is not replayed block by block
REPLAYED_WAVES = 4  # of each kind beyond that, or as few as have no more instructions than the limit


class Prediction(NamedTuple):
    """The predicted time of one pass."""

    pass_: Pass
    microseconds: float
    bounds: dict[str, float]  # microseconds for which each unit is busy
    kernels: tuple[str, ...]

    @property
    def tflops(self) -> float:
        return self.pass_.flops / self.microseconds * 1e-6

    def bound_tflops(self) -> dict[str, float]:
        """The TFLOP/s that each unit allows."""
        return {name: self.pass_.flops / time * 1e-6 for name, time in self.bounds.items() if time}


class PassTracer(Protocol):
    """What executes the launches of a pass, as `tracing.Tracer` does."""

    def trace(self, pass_: Pass, seqlen: int) -> list[TracedLaunch]: ...


class Predictor:
    """A predictor for one card; it keeps what it has executed and replayed once.

    Args:
        kernels: our cubins, or a tracer of other kernels.
        card: the card on which they run.
    """

    def __init__(self, kernels: Cubins | PassTracer, card: chip.Card = chip.SXM2) -> None:
        self.card = card
        self.tracer = Tracer(kernels, card.multiprocessors) if isinstance(kernels, Cubins) else kernels
        self._replayed: dict[tuple[object, ...], list[float]] = {}

    def predict(self, pass_: Pass, assumptions: ChipAssumptions = USUAL) -> Prediction:
        """The time of one pass, its launches one after the other."""
        lengths = lengths_replayed(pass_)
        traced = [self.tracer.trace(pass_, length) for length in lengths]
        quantities = [
            {"time": sum(self.cycles(launch, assumptions) for launch in launches), **self._bounds(launches)}
            for launches in traced
        ]
        cycles = quantities[0] if lengths == [pass_.seqlen] else _extrapolated(lengths, quantities, pass_.seqlen)
        times = {name: self.card.microseconds(value) for name, value in cycles.items()}
        launches = traced[0]
        waiting = len(launches) * chip.LAUNCH_SECONDS * 1e6
        return Prediction(pass_, times.pop("time") + waiting, times, tuple(launch.kernel for launch in launches))

    def launches(self, pass_: Pass) -> list[TracedLaunch]:
        """The traced launches of the shortest length that is replayed."""
        return self.tracer.trace(pass_, lengths_replayed(pass_)[0])

    # ---- the time of a launch

    def cycles(self, launch: TracedLaunch, assumptions: ChipAssumptions = USUAL) -> float:
        """The cycles of the multiprocessor with most blocks."""
        blocks, resident = launch.on_fullest(self.card.multiprocessors), launch.occupancy.resident
        if len(blocks) <= 2 * resident or sum(block.instructions for block in blocks) <= REPLAY_LIMIT:
            return self._replay(launch, blocks, assumptions)[-1]
        rest = len(blocks) % resident  # run last, and alone
        cycles = self._replay(launch, blocks[-rest:], assumptions)[-1] if rest else 0.0
        for n, (block, number) in enumerate(Counter(blocks[: len(blocks) - rest]).items()):
            begin, period = self._steady(launch, block, assumptions)
            cycles += number * period + (begin if n == 0 else 0.0)
        return cycles

    def _steady(self, launch: TracedLaunch, block: Block, assumptions: ChipAssumptions) -> tuple[float, float]:
        """Cycles of many blocks of one kind: the start-up of the first wave, and the period of every block."""
        resident = launch.occupancy.resident
        waves = max(1, min(REPLAYED_WAVES, REPLAY_LIMIT // (block.instructions * resident)))
        ends = self._replay(launch, [block] * (waves * resident), assumptions)
        if waves == 1:  # so long that it does not matter how they begin
            return 0.0, ends[-1] / resident
        period = (ends[-1] - ends[resident - 1]) / (len(ends) - resident)
        return ends[resident - 1] - resident * period, period

    def _replay(self, launch: TracedLaunch, blocks: list[Block], assumptions: ChipAssumptions) -> list[float]:
        """The cycles at which the blocks of one multiprocessor end."""
        key = (tuple(map(id, blocks)), launch.occupancy.resident, self._active(launch), assumptions)
        if key not in self._replayed:
            self._replayed[key] = self._multiprocessor(launch, blocks, assumptions).run()
        return self._replayed[key]

    def _multiprocessor(
        self, launch: TracedLaunch, blocks: list[Block], assumptions: ChipAssumptions
    ) -> Multiprocessor:
        share = Bandwidth.of(self.card, self._active(launch), assumptions)
        latency = max(block.dram_latency for block in blocks)  # they run beside one another
        encoder = Encoder(launch.program, share, assumptions, latency)
        issued = {block: [encoder.for_schedulers(warp) for warp in block.warps] for block in set(blocks)}
        return Multiprocessor([issued[block] for block in blocks], launch.occupancy.resident, assumptions)

    def _active(self, launch: TracedLaunch) -> int:
        return min(self.card.multiprocessors, launch.blocks)

    def idle(self, launch: TracedLaunch) -> dict[int, float]:
        """The share of the time for which schedulers are idle, by the position of the instruction issued next."""
        block = launch.kinds[0].block
        multiprocessor = self._multiprocessor(launch, [block] * 2 * launch.occupancy.resident, USUAL)
        cycles = chip.SCHEDULERS * multiprocessor.run()[-1]
        return {position: idle / cycles for position, idle in multiprocessor.idle.items()}

    # ---- bounds that hold for every schedule

    def _bounds(self, launches: list[TracedLaunch]) -> dict[str, float]:
        """Cycles for which each unit is busy, with the blocks spread evenly over the card."""
        busy: defaultdict[str, float] = defaultdict(float)
        for launch in launches:
            for block, count in launch.kinds:
                for name, cycles in block_bounds(launch.program, block, self.card).items():
                    busy[name] += cycles * count / self.card.multiprocessors
        return dict(busy)


def block_bounds(program: Program, block: Block, card: chip.Card) -> dict[str, float]:
    """Cycles for which one block keeps each unit of a multiprocessor busy.

    Args:
        program: the machine code of the block.
        block: its streams.
        card: the card, whose multiprocessors share L2 and DRAM evenly.
    """
    executed = block.times(program)
    timings = [chip.timing_of(instruction.op, instruction.modifiers) for instruction in program.instructions]
    of_unit = {unit: np.array([t.cycles * (t.unit == unit) for t in timings]) for unit in (chip.FP32, chip.SFU)}
    conflicts = np.array(bank_conflicts(program)) * (of_unit[chip.FP32] > 0)
    pairs = np.array([instruction.pairs_with_next for instruction in program.instructions])
    shuffles = np.array([instruction.op == "SHFL" for instruction in program.instructions])
    accesses = [*zip(*block.warps, strict=True)][1:]
    lanes = executed @ of_unit[chip.FP32]
    share = Bandwidth.of(card, card.multiprocessors, USUAL)
    smem_cycles, sectors, dram_sectors = (sum(int(column.sum()) for column in columns) for columns in accesses)
    cycles = {
        "FP32 lanes": lanes / chip.SCHEDULERS,
        "FP32 lanes with conflicts": (lanes + executed @ conflicts) / chip.SCHEDULERS,
        WITHOUT_PAIRS: executed.sum() / chip.SCHEDULERS,
        ISSUE: (executed.sum() - executed @ pairs) / chip.SCHEDULERS,
        "shared memory": smem_cycles + executed @ shuffles,
        "special functions": executed @ of_unit[chip.SFU] / chip.SCHEDULERS,
        "L2": SECTOR_BYTES * sectors / share.l2,
        "DRAM": SECTOR_BYTES * dram_sectors / share.dram,
    }
    return {name: float(value) for name, value in cycles.items()}


# ---- long sequences ----


def lengths_replayed(pass_: Pass) -> list[int]:
    """The lengths that are replayed for a pass: its own, or shorter ones with the same remainder of a tile."""
    if pass_.seqlen < (5 * WHOLE_TILES if pass_.is_backward else 9 * WHOLE_TILES):
        return [pass_.seqlen]
    ragged = pass_.seqlen % WHOLE_TILES
    return [ragged + WHOLE_TILES * tiles for tiles in ((2, 3, 4) if pass_.is_backward else (4, 8))]


def _extrapolated(lengths: list[int], quantities: list[dict[str, float]], length: int) -> dict[str, float]:
    """Time and bounds extrapolated to another length."""
    degree = len(lengths) - 1
    extrapolated = {
        name: float(np.polyval(np.polyfit(lengths, [q[name] for q in quantities], degree), length))
        for name in quantities[0]
        if name != "time"
    }
    shares = [q[ISSUE] / q["time"] for q in quantities]
    share = float(np.polyval(np.polyfit(1 / np.array(lengths), shares, 1), 1 / length))
    return {"time": extrapolated[ISSUE] / share, **extrapolated}
