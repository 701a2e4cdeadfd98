"""Batches as WMT training makes them, from the counted lengths of real sentence pairs."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
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
    by_length = every_update(tokens_per_update)
    return [by_length[int((i + 0.5) / count * len(by_length))] for i in range(count)]


def every_update(tokens_per_update: int = 25_000) -> list[Lengths]:
    """The updates of an epoch, those of short sentences first."""
    import numpy as np  # the benchmarks' parse() says what to install where it is missing

    from fastattn.nmt.batches import TokenBatches

    with FILE.open() as file:
        rows = [tuple(map(int, row.values())) for row in csv.DictReader(file)]
    source, target = (np.repeat([row[side] for row in rows], [row[2] for row in rows]) for side in (0, 1))
    full = TokenBatches(source, target, tokens_per_update).updates(0)
    by_length = sorted(full, key=lambda pairs: source[pairs].mean())
    return [Lengths(tuple(source[pairs].tolist()), tuple(target[pairs].tolist())) for pairs in by_length]


def longest_up_to(longest: int, tokens: int, among: Sequence[Lengths]) -> Lengths:
    """The longest pairs of an update, none with a side above a length, as many as fit into a number of ids.

    Args:
        longest: ids of a sentence.
        tokens: most ids of the source.
        among: updates, those of short sentences first; the first one that has a source of that length is taken.
    """
    update = next(update for update in among if longest in update.source)
    pairs = [pair for pair in zip(*update, strict=True) if max(pair) <= longest]
    pairs.sort(key=max, reverse=True)
    ends = itertools.accumulate(source for source, _ in pairs)
    kept = [pair for pair, end in zip(pairs, ends, strict=True) if end <= tokens]
    source, target = zip(*kept, strict=True)
    return Lengths(source, target)
