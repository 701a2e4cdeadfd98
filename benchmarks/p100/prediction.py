"""From a problem to a time: the traces of its blocks are replayed, the waves counted.

A launch takes as long as the multiprocessor with most blocks. Few blocks are replayed as they come; of many, some waves
of each kind are, and every further block takes as long as those behind the first wave. Problems with long sequences are
replayed for shorter ones, in the same kernels. How long each unit is busy is continued to the true length by the
polynomial through them, which is exact; the share of the time for which the schedulers are busy by its slope over the
inverse of the length.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from . import chip
from .machine.sass import Program, bank_conflicts
from .pipeline import USUAL, Assumptions, Encoder, Multiprocessor, Share
from .problems import Problem
from .tracing import STEP, Block, Kernels, TracedLaunch, Tracer

ISSUE = "issue, with pairs"
WITHOUT_PAIRS = "issue, one at a time"  # what the schedulers could do at most if they never issued two; no bound
EXACT = 500_000  # instructions that are replayed as they come, whatever they are
WAVES = 4  # replayed of many alike, if they are short enough


class Prediction(NamedTuple):
    """Of the time of one pass."""

    problem: Problem
    microseconds: float
    bounds: dict[str, float]  # microseconds that each unit is busy, as if it never waited
    kernels: tuple[str, ...]

    @property
    def tflops(self) -> float:
        return self.problem.flops / self.microseconds * 1e-6

    def bound_tflops(self) -> dict[str, float]:
        """The rates that the units allow."""
        return {name: self.problem.flops / time * 1e-6 for name, time in self.bounds.items() if time}


class Model:
    """Predicts times; what was executed and replayed once is kept.

    Args:
        kernels: what runs.
        card: on which.
    """

    def __init__(self, kernels: Kernels, card: chip.Card = chip.SXM2) -> None:
        self.card = card
        self.tracer = Tracer(kernels, card.multiprocessors)
        self._replayed: dict[tuple[object, ...], list[float]] = {}

    def predict(self, problem: Problem, assumptions: Assumptions = USUAL) -> Prediction:
        """The time of one pass, its launches one after the other."""
        lengths = lengths_replayed(problem)
        traced = [self.tracer.trace(problem, length) for length in lengths]
        quantities = [
            {"time": sum(self.cycles(launch, assumptions) for launch in launches), **self._bounds(launches)}
            for launches in traced
        ]
        cycles = quantities[0] if lengths == [problem.seqlen] else _continued(lengths, quantities, problem.seqlen)
        times = {name: self.card.microseconds(value) for name, value in cycles.items()}
        launches = traced[0]
        waiting = len(launches) * chip.LAUNCH_SECONDS * 1e6
        return Prediction(problem, times.pop("time") + waiting, times, tuple(launch.kernel for launch in launches))

    def launches(self, problem: Problem) -> list[TracedLaunch]:
        """What was executed, at the shortest length that was replayed."""
        return self.tracer.trace(problem, lengths_replayed(problem)[0])

    # ---- the time of a launch

    def cycles(self, launch: TracedLaunch, assumptions: Assumptions = USUAL) -> float:
        """How long the multiprocessor with most blocks works."""
        blocks, resident = launch.on_fullest(self.card.multiprocessors), launch.taken.resident
        if len(blocks) <= 2 * resident or sum(block.instructions for block in blocks) <= EXACT:
            return self._replay(launch, blocks, assumptions)[-1]
        rest = len(blocks) % resident  # run last, and alone
        cycles = self._replay(launch, blocks[-rest:], assumptions)[-1] if rest else 0.0
        for n, (block, number) in enumerate(Counter(blocks[: len(blocks) - rest]).items()):
            begin, period = self._steady(launch, block, assumptions)
            cycles += number * period + (begin if n == 0 else 0.0)
        return cycles

    def _steady(self, launch: TracedLaunch, block: Block, assumptions: Assumptions) -> tuple[float, float]:
        """Of many blocks alike: what the first ones take longer than the others, and what each of those takes."""
        resident = launch.taken.resident
        waves = max(1, min(WAVES, EXACT // (block.instructions * resident)))
        ends = self._replay(launch, [block] * (waves * resident), assumptions)
        if waves == 1:  # so long that it does not matter how they begin
            return 0.0, ends[-1] / resident
        period = (ends[-1] - ends[resident - 1]) / (len(ends) - resident)
        return ends[resident - 1] - resident * period, period

    def _replay(self, launch: TracedLaunch, blocks: list[Block], assumptions: Assumptions) -> list[float]:
        """When the blocks of one multiprocessor end."""
        key = (tuple(map(id, blocks)), launch.taken.resident, self._active(launch), assumptions)
        if key not in self._replayed:
            self._replayed[key] = self._multiprocessor(launch, blocks, assumptions).run()
        return self._replayed[key]

    def _multiprocessor(self, launch: TracedLaunch, blocks: list[Block], assumptions: Assumptions) -> Multiprocessor:
        encoder = Encoder(launch.program, Share.of(self.card, self._active(launch), assumptions), assumptions)
        issued = {block: [encoder.for_schedulers(warp) for warp in block.warps] for block in set(blocks)}
        return Multiprocessor([issued[block] for block in blocks], launch.taken.resident, assumptions)

    def _active(self, launch: TracedLaunch) -> int:
        return min(self.card.multiprocessors, launch.blocks)

    def idle(self, launch: TracedLaunch) -> dict[int, float]:
        """For which share of the time schedulers have nothing to issue, by the instruction that ends their waiting."""
        block = launch.kinds[0].block
        multiprocessor = self._multiprocessor(launch, [block] * 2 * launch.taken.resident, USUAL)
        cycles = chip.SCHEDULERS * multiprocessor.run()[-1]
        return {index: idle / cycles for index, idle in multiprocessor.idle.items()}

    # ---- what no schedule can beat

    def _bounds(self, launches: list[TracedLaunch]) -> dict[str, float]:
        """Cycles for which each unit is busy, with the blocks spread evenly over the card."""
        busy: Counter[str] = Counter()
        for launch in launches:
            for block, count in launch.kinds:
                for name, cycles in block_bounds(launch.program, block, self.card).items():
                    busy[name] += cycles * count / self.card.multiprocessors
        return dict(busy)


def block_bounds(program: Program, block: Block, card: chip.Card) -> dict[str, float]:
    """Cycles for which one block keeps each unit of a multiprocessor busy.

    Args:
        program: of the block.
        block: its traces.
        card: whose L2 and DRAM are shared evenly.
    """
    executed = block.times(program)
    timings = [chip.TIMINGS[instruction.op] for instruction in program.instructions]
    of_unit = {unit: np.array([t.cycles * (t.unit == unit) for t in timings]) for unit in (chip.FP32, chip.SFU)}
    conflicts = np.array(bank_conflicts(program)) * (of_unit[chip.FP32] > 0)
    pairs = np.array([instruction.pairs_with_next for instruction in program.instructions])
    shuffles = np.array([instruction.op == "SHFL" for instruction in program.instructions])
    accesses = [*zip(*block.warps, strict=True)][1:]
    lanes = executed @ of_unit[chip.FP32]
    share = Share.of(card, card.multiprocessors, USUAL)
    smem_cycles, sectors, dram_sectors = (sum(int(column.sum()) for column in columns) for columns in accesses)
    cycles = {
        "FP32 lanes": lanes / chip.SCHEDULERS,
        "FP32 lanes with conflicts": (lanes + executed @ conflicts) / chip.SCHEDULERS,
        WITHOUT_PAIRS: executed.sum() / chip.SCHEDULERS,
        ISSUE: (executed.sum() - executed @ pairs) / chip.SCHEDULERS,
        "shared memory": smem_cycles + executed @ shuffles,
        "special functions": executed @ of_unit[chip.SFU] / chip.SCHEDULERS,
        "L2": chip.SECTOR * sectors / share.l2,
        "DRAM": chip.SECTOR * dram_sectors / share.dram,
    }
    return {name: float(value) for name, value in cycles.items()}


# ---- long sequences ----


def lengths_replayed(problem: Problem) -> list[int]:
    """The lengths that are replayed for a problem: its own, or shorter ones with the same ragged end."""
    if problem.seqlen < (5 * STEP if problem.is_backward else 9 * STEP):
        return [problem.seqlen]
    ragged = problem.seqlen % STEP
    return [ragged + STEP * tiles for tiles in ((2, 3, 4) if problem.is_backward else (4, 8))]


def _continued(lengths: list[int], quantities: list[dict[str, float]], length: int) -> dict[str, float]:
    """Time and bounds at another length."""
    degree = len(lengths) - 1
    there = {
        name: float(np.polyval(np.polyfit(lengths, [q[name] for q in quantities], degree), length))
        for name in quantities[0]
        if name != "time"
    }
    shares = [q[ISSUE] / q["time"] for q in quantities]
    share = float(np.polyval(np.polyfit(1 / np.array(lengths), shares, 1), 1 / length))
    return {"time": there[ISSUE] / share, **there}
