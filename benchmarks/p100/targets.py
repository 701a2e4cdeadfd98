"""The passes of the kernel report, and the rates that they should reach."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks import published
from benchmarks.published import Published

from . import chip
from .passes import FEATURES, Pass

HEAD_DIM = 64
# Heads by length of the passes with a target: as many as fit the card and keep it busy.
HEADS = {32: 8192, 64: 8192, 82: 8192, 128: 8192, 256: 2048, 512: 1024, 1024: 512, 2048: 256}
# TFLOP/s in float32 on the SXM2 card, by length.
TARGET_TFLOPS = {
    "forward": {64: 7.3, 82: 6.2, 128: 7.9, 512: 8.4, 1024: 8.4, 2048: 8.4},
    "backward": {64: 8.0, 82: 6.2, 128: 7.8, 256: 7.8},
}
DRAM_BOUND_LENGTH, DRAM_BOUND_SHARE = 32, 0.95  # at this length, the target is this share of what DRAM allows
# 16 heads for each of 56 multiprocessors: whole waves, however many blocks are resident.
FEATURE_BATCH, FEATURE_HEADS, FEATURE_LENGTHS = 112, 8, (64, 128, 256)
FEATURE_LOSS = 0.15  # the share of the plain rate that a feature may cost


class Target(NamedTuple):
    """A pass and the rate that it should reach; None if there is no target."""

    pass_: Pass
    tflops: float | None


def targets(card: chip.Card) -> list[Target]:
    """The targets of both directions at every length."""
    found = []
    for direction, rates in TARGET_TFLOPS.items():
        for seqlen, heads in HEADS.items():
            pass_ = Pass(direction, heads, 1, seqlen, HEAD_DIM)
            rate = DRAM_BOUND_SHARE * dram_tflops(pass_, card) if seqlen == DRAM_BOUND_LENGTH else rates.get(seqlen)
            found.append(Target(pass_, rate))
    return found


def dram_tflops(pass_: Pass, card: chip.Card) -> float:
    """The rate that DRAM allows if each input is read once and each result written once."""
    tensors = 7 if pass_.is_backward else 4
    rows = pass_.batch * pass_.nheads * pass_.seqlen
    moved = rows * (tensors * pass_.head_dim * pass_.dtype.itemsize + 4)
    return pass_.flops / moved * card.dram_share * card.dram_bytes_per_s * 1e-12


def published_passes() -> list[tuple[Pass, Published]]:
    """Every row of the published table, forward before backward."""
    rows = []
    for direction in TARGET_TFLOPS:
        for shape, dtype in published.shapes():
            if (times := published.times(direction, shape, dtype)) is not None:
                rows.append((Pass(direction, *shape, dtype), times))
    return sorted(rows, key=lambda row: _order(row[0]))


def on_the_card_ms(p: Pass) -> float | None:
    """The second reading of vanilla's time, as `published.vanilla_on_the_card_ms` says."""
    return published.vanilla_on_the_card_ms(p.direction, (p.batch, p.nheads, p.seqlen, p.head_dim), p.dtype)


def _order(p: Pass) -> tuple[bool, bool, int, int, int]:
    return p.dtype != torch.float32, p.is_backward, -p.head_dim, p.seqlen, p.batch * p.nheads


def feature_passes() -> list[Pass]:
    """Every feature at every length, the plain passes first."""
    return [
        Pass(direction, FEATURE_BATCH, FEATURE_HEADS, seqlen, HEAD_DIM, feature=feature)
        for feature in FEATURES
        for direction in TARGET_TFLOPS
        for seqlen in FEATURE_LENGTHS
    ]


class BothPasses(NamedTuple):
    """Forward and backward of one shape, the published time of vanilla attention, and the target of the speed-up."""

    forward: Pass
    backward: Pass
    vanilla_us: float
    speedup: float
    card_us: float | None = None  # the second reading of vanilla's time, where the published one is the host's


def both_passes() -> list[BothPasses]:
    """The shapes of which both passes are published; a forward with other heads is scaled by their number."""
    rows = [(pass_, times) for pass_, times in published_passes() if pass_.dtype == torch.float32]
    forward = [row for row in rows if not row[0].is_backward]
    found = []
    for backward, times in rows:
        alike = [row for row in forward if row[0].seqlen == backward.seqlen and row[0].head_dim == backward.head_dim]
        if not backward.is_backward or not alike:
            continue
        heads = backward.batch * backward.nheads
        like, like_times = min(alike, key=lambda row: abs(row[0].batch * row[0].nheads - heads))
        vanilla = like_times.vanilla_ms * heads / (like.batch * like.nheads) + times.vanilla_ms
        same, speedup = backward._replace(direction="forward"), 1.5 if backward.seqlen <= 128 else 1.15
        on_the_card = on_the_card_ms(backward)
        card_us = None if on_the_card is None else 1e3 * (vanilla - times.vanilla_ms + on_the_card)
        found.append(BothPasses(same, backward, 1e3 * vanilla, speedup, card_us))
    return found
