"""The parts that both generated pages have in common: tables, the sha256 of a cubin, the verdict on a target."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def markdown_table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    rows = [tuple(header), *map(tuple, lines)]
    rows.insert(1, ("---",) * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def digest(file: Path) -> str:
    """The sha256 of the cubin that a page belongs to."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def verdict(got: float, wanted: float | None) -> str:
    """The words for a target that is reached or missed."""
    if wanted is None:
        return "no target"
    return "reached" if got >= wanted else f"missed by {100 * (1 - got / wanted):.0f} %"
