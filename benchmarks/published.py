"""The only published times of training attention on the P100's die, beside which ours stand row by row."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

FILE = Path(__file__).parent / "data" / "published_gp100.csv"
Shape = tuple[int, int, int, int]  # batch, nheads, seqlen, head_dim


class Published(NamedTuple):
    """Milliseconds on a Quadro GP100."""

    fused_ms: float  # xformers' memory-efficient kernels
    vanilla_ms: float  # matrix products and a softmax between them


class Row(NamedTuple):
    """A row of the table."""

    direction: str  # "forward" or "backward"
    shape: Shape
    dtype: torch.dtype
    times: Published
    is_compared: bool  # ours are timed and predicted beside it; by the others, the model is calibrated only


@cache
def rows() -> tuple[Row, ...]:
    """Every row."""
    with FILE.open() as file:
        return tuple(map(_row, csv.DictReader(file)))


def _row(cells: dict[str, str]) -> Row:
    shape = int(cells["batch"]), int(cells["nheads"]), int(cells["seqlen"]), int(cells["head_dim"])
    milliseconds = Published(float(cells["fused_us"]) / 1e3, float(cells["vanilla_us"]) / 1e3)
    return Row(cells["pass"], shape, getattr(torch, cells["dtype"]), milliseconds, cells["compared"] == "yes")


@cache
def _times() -> dict[tuple[str, Shape, torch.dtype], Published]:
    return {(row.direction, row.shape, row.dtype): row.times for row in rows() if row.is_compared}


def shapes() -> list[tuple[Shape, torch.dtype]]:
    """Every shape and dtype that ours are compared on, once."""
    return list(dict.fromkeys((shape, dtype) for _, shape, dtype in _times()))


def times(which: str, shape: Shape, dtype: torch.dtype) -> Published | None:
    """The published times of a pass that ours are compared on; None where there are none."""
    return _times().get((which, shape, dtype))


# Vanilla's backward passes that take the host's time, each with a pass of more heads, for which the card's time counts.
_HOST_BOUND = {(16, 16, 128, 64): (64, 16, 128, 64)}


def vanilla_on_the_card_ms(which: str, shape: Shape, dtype: torch.dtype) -> float | None:
    """The second reading of a time of vanilla that is the host's: the card's, scaled from more heads; else None."""
    more = _HOST_BOUND.get(shape)
    if which != "backward" or more is None or (measured := times(which, more, dtype)) is None:
        return None
    return measured.vanilla_ms * (shape[0] * shape[1]) / (more[0] * more[1])
