"""Batches as WMT training makes them, from the counted lengths of real sentence pairs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parent / "data" / "sentence_pairs.csv"


class Lengths(NamedTuple):
    """Ids of each sentence of an update, the end of sentence included."""

    source: tuple[int, ...]
    target: tuple[int, ...]

    def tokens(self) -> int:
        """The ids of both sides."""
        return sum(self.source) + sum(self.target)


def updates(count: int, tokens_per_update: int = 25_000) -> list[Lengths]:
    """Some updates, from one of short sentences to one of long ones, at equal steps through an epoch's tokens.

    Args:
        count: how many.
        tokens_per_update: most ids of a side.
    """
    import numpy as np  # the benchmarks' parse() says what to install where it is missing

    from fastattn.nmt.batches import TokenBatches

    with FILE.open() as file:
        rows = [tuple(map(int, row.values())) for row in csv.DictReader(file)]
    source, target = (np.repeat([row[side] for row in rows], [row[2] for row in rows]) for side in (0, 1))
    full = TokenBatches(source, target, tokens_per_update).updates(0)
    by_length = sorted(full, key=lambda pairs: source[pairs].mean())
    chosen = [by_length[int((i + 0.5) / count * len(by_length))] for i in range(count)]
    return [Lengths(tuple(source[pairs].tolist()), tuple(target[pairs].tolist())) for pairs in chosen]
