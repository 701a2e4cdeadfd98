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
    sizes = ("batch", "nheads", "seqlen", "head_dim")
    return {
        (row["pass"], tuple(int(row[size]) for size in sizes), getattr(torch, row["dtype"])): Published(
            float(row["fused_us"]) / 1e3, float(row["vanilla_us"]) / 1e3
        )
        for row in rows
    }


def shapes() -> list[tuple[Shape, torch.dtype]]:
    """Every shape and dtype of the table, once."""
    return list(dict.fromkeys((shape, dtype) for _, shape, dtype in _table()))


def times(which: str, shape: Shape, dtype: torch.dtype) -> Published | None:
    """Of a pass; None where nothing was published."""
    return _table().get((which, shape, dtype))
