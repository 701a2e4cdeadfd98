"""From a problem to a time: the traces of its blocks are replayed, the waves counted.

A launch takes as long as the multiprocessor with most blocks. Few blocks are replayed as they come; of many, some waves
of each kind are, and every further block takes as long as those behind the first wave. Problems with long sequences are
replayed for shorter ones, in the same kernels, and continued along the line (forward: a block's work grows with the
keys) or the parabola (backward: with queries and keys) through them.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from . import card as gp100
from .pipeline import USUAL, Assumptions, Encoder, Multiprocessor, Share
from .problems import Problem
from .sass import Program, bank_conflicts
from .tracing import Block, Kernels, TracedLaunch, Tracer

SENSITIVITIES = {
    "no pairs": Assumptions(dual_issue=False),
    "no register conflicts": Assumptions(register_conflicts=False),
    "half of DRAM": Assumptions(dram_rate=0.5),
    "in step": Assumptions(in_step=True),
}

EXACT = 500_000  # instructions that are replayed as they come, whatever they are
WAVES = 4  # replayed of many alike, if they are short enough
STEP = 64  # a multiple of every tile: sequences that are whole tiles longer have the same ragged end


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

    def __init__(self, kernels: Kernels, card: gp100.Card = gp100.SXM2) -> None:
        self.card = card
        self.tracer = Tracer(kernels, card.multiprocessors)
        self._replayed: dict[tuple[object, ...], list[float]] = {}

    def predict(self, problem: Problem, assumptions: Assumptions = USUAL) -> Prediction:
        """The time of one pass, its launches one after the other."""
        lengths = lengths_replayed(problem)
        traced = [self.tracer.trace(problem, length) for length in lengths]
        quantities = [
            {"time": sum(self._cycles(launch, assumptions) for launch in launches), **self._bounds(launches)}
            for launches in traced
        ]
        cycles = {name: _continued(lengths, [q[name] for q in quantities], problem.seqlen) for name in quantities[0]}
        times = {name: self.card.microseconds(value) for name, value in cycles.items()}
        launches = traced[0]
        waiting = len(launches) * gp100.LAUNCH_SECONDS * 1e6
        return Prediction(problem, times.pop("time") + waiting, times, tuple(launch.kernel for launch in launches))

    def launches(self, problem: Problem) -> list[TracedLaunch]:
        """What was executed, at the shortest length that was replayed."""
        return self.tracer.trace(problem, lengths_replayed(problem)[0])

    # ---- the time of a launch

    def _cycles(self, launch: TracedLaunch, assumptions: Assumptions) -> float:
        """Of the multiprocessor with most blocks."""
        blocks = launch.on_fullest(self.card.multiprocessors)
        if sum(block.instructions for block in blocks) <= EXACT or len(blocks) <= launch.resident:
            return self._replay(launch, blocks, assumptions)[-1]
        numbers = {kind.block: blocks.count(kind.block) for kind in launch.kinds}
        filling, cycles = 0.0, 0.0
        for block, number in numbers.items():
            waves = max(2, min(WAVES, EXACT // (block.instructions * launch.resident)))
            ends = self._replay(launch, [block] * (waves * launch.resident), assumptions)
            first, last = ends[launch.resident - 1], ends[-1]
            period = (last - first) / (len(ends) - launch.resident)
            filling = max(filling, first - launch.resident * period)
            cycles += number * period
        return filling + cycles

    def _replay(self, launch: TracedLaunch, blocks: list[Block], assumptions: Assumptions) -> list[float]:
        """When the blocks of one multiprocessor end."""
        active = min(self.card.multiprocessors, launch.blocks)
        key = (tuple(map(id, blocks)), launch.resident, active, assumptions)
        if key not in self._replayed:
            share = Share.of(self.card, active, assumptions)
            encoder = Encoder(launch.program, share, assumptions)
            issued = {block: [encoder.for_schedulers(warp) for warp in block.warps] for block in set(blocks)}
            queue = [issued[block] for block in blocks]
            self._replayed[key] = Multiprocessor(queue, launch.resident, assumptions).run()
        return self._replayed[key]

    # ---- what no schedule can beat

    def _bounds(self, launches: list[TracedLaunch]) -> dict[str, float]:
        """Cycles for which each unit is busy, with the blocks spread evenly over the card."""
        busy: Counter[str] = Counter()
        for launch in launches:
            for block, count in launch.kinds:
                for name, cycles in block_bounds(launch.program, block, self.card).items():
                    busy[name] += cycles * count / self.card.multiprocessors
        return dict(busy)


def block_bounds(program: Program, block: Block, card: gp100.Card) -> dict[str, float]:
    """Cycles for which one block keeps each unit of a multiprocessor busy.

    Args:
        program: of the block.
        block: its traces.
        card: whose L2 and DRAM are shared evenly.
    """
    executed = block.times(program)
    timings = [gp100.TIMINGS[instruction.op] for instruction in program.instructions]
    of_unit = {unit: np.array([t.cycles * (t.unit == unit) for t in timings]) for unit in (gp100.FP32, gp100.SFU)}
    conflicts = np.array(bank_conflicts(program)) * (of_unit[gp100.FP32] > 0)
    pairs = np.array([instruction.pairs_with_next for instruction in program.instructions])
    shuffles = np.array([instruction.op == "SHFL" for instruction in program.instructions])
    accesses = [*zip(*block.warps, strict=True)][1:]
    lanes = executed @ of_unit[gp100.FP32]
    share = Share.of(card, card.multiprocessors, USUAL)
    smem_cycles, sectors, dram_sectors = (sum(int(column.sum()) for column in columns) for columns in accesses)
    cycles = {
        "FP32 lanes": lanes / gp100.SCHEDULERS,
        "FP32 lanes with conflicts": (lanes + executed @ conflicts) / gp100.SCHEDULERS,
        "issue, one at a time": executed.sum() / gp100.SCHEDULERS,
        "issue, with pairs": (executed.sum() - executed @ pairs) / gp100.SCHEDULERS,
        "shared memory": smem_cycles + executed @ shuffles,
        "special functions": executed @ of_unit[gp100.SFU] / gp100.SCHEDULERS,
        "L2": gp100.SECTOR * sectors / share.l2,
        "DRAM": gp100.SECTOR * dram_sectors / share.dram,
    }
    return {name: float(value) for name, value in cycles.items()}


# ---- long sequences ----


def lengths_replayed(problem: Problem) -> list[int]:
    """The lengths that are replayed for a problem: its own, or shorter ones with the same ragged end."""
    longest, count = (2 * STEP, 3) if problem.is_backward else (8 * STEP, 2)
    if problem.seqlen <= longest:
        return [problem.seqlen]
    ragged = problem.seqlen % STEP
    if problem.is_backward:
        return [ragged + STEP * n for n in (1, 2, 3)]
    return [ragged + STEP * n for n in (4, 8)]


def _continued(lengths: list[int], values: list[float], length: int) -> float:
    """The polynomial through the points, at another length."""
    if lengths == [length]:
        return values[0]
    return float(np.polyval(np.polyfit(lengths, values, len(lengths) - 1), length))
