"""The parts that the generated pages have in common: tables, the sha256 of a cubin, bands, the verdict on a target."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[2] / "docs"


class Band(NamedTuple):
    """The least that is expected, what is expected, and the most."""

    low: float
    centre: float
    high: float

    def times(self, x: float) -> Band:
        return Band(x * self.low, x * self.centre, x * self.high)

    def under(self, x: float) -> Band:
        """x divided by it: the least is then that of the most."""
        return Band(x / self.high, x / self.centre, x / self.low)

    def plus(self, other: Band) -> Band:
        return Band(self.low + other.low, self.centre + other.centre, self.high + other.high)

    def shown(self, digits: int = 2) -> str:
        """The centre with the ends behind it."""
        low, centre, high = (f"{x:.{digits}f}" for x in self)
        return f"**{centre}** ({low} - {high})"


def markdown_table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    rows = [tuple(header), *map(tuple, lines)]
    rows.insert(1, ("---",) * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def digest(file: Path) -> str:
    """The sha256 of the cubin that a page belongs to."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def banded_verdict(got: Band, wanted: float | None) -> str:
    """The words for a target: it is reached if the least that is expected reaches it, missed if the most does not."""
    if wanted is None or got.low >= wanted or got.high < wanted:
        return verdict(got.low if wanted is not None and got.low >= wanted else got.centre, wanted)
    return "open"


def verdict(got: float, wanted: float | None) -> str:
    """The words for a target that is reached or missed."""
    if wanted is None:
        return "no target"
    return "reached" if got >= wanted else f"missed by {100 * (1 - got / wanted):.0f} %"
