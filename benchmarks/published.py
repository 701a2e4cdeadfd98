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


@cache
def _table() -> dict[tuple[str, Shape, torch.dtype], Published]:
    with FILE.open() as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        shape = int(row["batch"]), int(row["nheads"]), int(row["seqlen"]), int(row["head_dim"])
        milliseconds = Published(float(row["fused_us"]) / 1e3, float(row["vanilla_us"]) / 1e3)
        found[row["pass"], shape, getattr(torch, row["dtype"])] = milliseconds
    return found


def shapes() -> list[tuple[Shape, torch.dtype]]:
    """Every shape and dtype of the table, once."""
    return list(dict.fromkeys((shape, dtype) for _, shape, dtype in _table()))


def times(which: str, shape: Shape, dtype: torch.dtype) -> Published | None:
    """The published times of a pass; None where there are none."""
    return _table().get((which, shape, dtype))
