"""Which problems the report is about, and what is aimed at."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks import published
from benchmarks.published import Published

from . import chip
from .problems import FEATURES, Problem

HEAD_DIM = 64
# Heads of the problems with a goal: as many as fit the card and keep it busy.
HEADS = {32: 8192, 64: 8192, 82: 8192, 128: 8192, 256: 2048, 512: 1024, 1024: 512, 2048: 256}
# TFLOP/s on the SXM2 card in float32; at 32, what DRAM allows, of which NEAR counts as reached.
GOALS = {
    "forward": {64: 7.3, 82: 6.2, 128: 7.9, 512: 8.4, 1024: 8.4, 2048: 8.4},
    "backward": {64: 8.0, 82: 6.2, 128: 7.8, 256: 7.8},
}
DRAM_BOUND, NEAR = 32, 0.95
# Whole waves on 56 multiprocessors, whatever the kernels' residency: 16 heads for each.
FEATURE_BATCH, FEATURE_HEADS, FEATURE_LENGTHS = 112, 8, (64, 128, 256)
FEATURE_LOSS = 0.15


class Goal(NamedTuple):
    """A rate that is aimed at."""

    problem: Problem
    tflops: float | None


def goals(card: chip.Card) -> list[Goal]:
    """Of both passes at every length."""
    found = []
    for pass_, rates in GOALS.items():
        for seqlen, heads in HEADS.items():
            problem = Problem(pass_, heads, 1, seqlen, HEAD_DIM)
            rate = NEAR * dram_tflops(problem, card) if seqlen == DRAM_BOUND else rates.get(seqlen)
            found.append(Goal(problem, rate))
    return found


def dram_tflops(problem: Problem, card: chip.Card) -> float:
    """What DRAM allows if q, k, v and the gradient are read once, and out, lse and the gradients written once."""
    tensors = 7 if problem.is_backward else 4
    rows = problem.batch * problem.nheads * problem.seqlen
    moved = rows * (tensors * problem.head_dim * problem.dtype.itemsize + 4)
    return problem.flops / moved * card.dram_share * card.dram_bytes_per_s * 1e-12


def published_problems() -> list[tuple[Problem, Published]]:
    """Every row of the published table, forward before backward."""
    rows = []
    for pass_ in GOALS:
        for shape, dtype in published.shapes():
            if (times := published.times(pass_, shape, dtype)) is not None:
                rows.append((Problem(pass_, *shape, dtype), times))
    return sorted(rows, key=lambda row: _order(row[0]))


def _order(p: Problem) -> tuple[bool, bool, int, int, int]:
    return p.dtype != torch.float32, p.is_backward, -p.head_dim, p.seqlen, p.batch * p.nheads


def feature_problems() -> list[Problem]:
    """Every feature at every length, the plain problem first."""
    return [
        Problem(pass_, FEATURE_BATCH, FEATURE_HEADS, seqlen, HEAD_DIM, feature=feature)
        for feature in FEATURES
        for pass_ in GOALS
        for seqlen in FEATURE_LENGTHS
    ]


class Step(NamedTuple):
    """Forward and backward of one shape, by the published times of vanilla attention, and the factor aimed at."""

    forward: Problem
    backward: Problem
    vanilla_us: float
    factor: float


def steps() -> list[Step]:
    """Where both passes are published; where only the number of heads differs, the forward's time grows with it."""
    rows = [(problem, times) for problem, times in published_problems() if problem.dtype == torch.float32]
    forward = [row for row in rows if not row[0].is_backward]
    found = []
    for backward, times in rows:
        alike = [row for row in forward if row[0].seqlen == backward.seqlen and row[0].head_dim == backward.head_dim]
        if not backward.is_backward or not alike:
            continue
        heads = backward.batch * backward.nheads
        like, like_times = min(alike, key=lambda row: abs(row[0].batch * row[0].nheads - heads))
        vanilla = like_times.vanilla_ms * heads / (like.batch * like.nheads) + times.vanilla_ms
        same = backward._replace(pass_="forward")
        found.append(Step(same, backward, 1e3 * vanilla, 1.5 if backward.seqlen <= 128 else 1.15))
    return found
