"""Predicts, without a card, what the forward kernels do on a V100, a T4 and an A100, beside the public kernels.

    python -m benchmarks.volta.report      writes docs/volta_report.md and .csv

The public kernels are those of the wheel that calibrates the P100's model. Without it, the committed page stays.
"""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.p100.machine import nvdisasm
from benchmarks.p100.page import DOCS, Band, markdown_table
from fastattn.cuda_kernels import images, nvrtc

from . import chips, public_kernels
from .our_kernels import Compiler
from .prediction import Forward, Kernel, microseconds

TEMPLATE = Path(__file__).with_name("report.md")
PAGE = DOCS / "volta_report.md"
PUBLISHED = Path(__file__).parents[1] / "data" / "published_volta.csv"
# Heads and tokens; each row that is published is among those of a V100.
SHAPES = ((8192, 82), (1024, 128), (2400, 256), (1024, 512), (1024, 1024))
OURS, PUBLIC = "ours", "public"


class Row(NamedTuple):
    """A prediction, with the published time of the same machine code where there is one."""

    kernel: str  # OURS or PUBLIC
    card: str
    dtype: str
    heads: int
    seqlen: int
    multiplies: str  # "HMMA" or "FFMA"
    predicted_us: float
    published_us: float | None
    is_host_time: bool  # the published time does not grow with the head dimension, so it is the host's

    @property
    def ratio(self) -> float:
        """Predicted / published: the share of a predicted rate that the card reached."""
        assert self.published_us is not None
        return self.predicted_us / self.published_us

    @property
    def tflops(self) -> float:
        return Forward(self.heads, self.seqlen, 64).flops / self.predicted_us * 1e-6


def predicted(kernel: str, code: Kernel, card: chips.Card, dtype: str, pass_: Forward) -> Row:
    """The row of a pass without a published time."""
    multiplies = "HMMA" if any(instruction.op == "HMMA" for instruction in code.program.instructions) else "FFMA"
    us = microseconds(code, pass_, card)
    print(f"{kernel}, {card.name}, {dtype}, {pass_.heads} x {pass_.seqlen}: {us:.0f} us", file=sys.stderr)
    return Row(kernel, card.name, dtype, pass_.heads, pass_.seqlen, multiplies, us, None, False)


def calibrate() -> list[Row]:
    """Every published row, predicted."""
    rows = []
    with PUBLISHED.open() as lines:
        for cells in csv.DictReader(lines):
            card, dtype = chips.CARDS[cells["card"]], cells["dtype"]
            pass_ = Forward(int(cells["heads"]), int(cells["seqlen"]), int(cells["head_dim"]))
            row = predicted(PUBLIC, public_kernels.kernel(card, dtype), card, dtype, pass_)
            rows.append(row._replace(published_us=float(cells["fused_us"]), is_host_time=cells["host_time"] == "yes"))
    return rows


def compare() -> list[Row]:
    """Ours on every card, and the public kernel on the T4, for which nothing is published."""
    compiler = Compiler(nvrtc.find(75), images.HERE.csrc)
    rows = []
    for card in chips.CARDS.values():
        for dtype in public_kernels.ELEMENT_BYTES:
            for heads, seqlen in SHAPES:
                pass_ = Forward(heads, seqlen, 64)
                rows.append(predicted(OURS, compiler.kernel(pass_, card, dtype), card, dtype, pass_))
                if card == chips.T4 and dtype == "float16":
                    rows.append(predicted(PUBLIC, public_kernels.kernel(card, dtype), card, dtype, pass_))
    return rows


# ---- the band ----


def bands(rows: list[Row]) -> dict[str, Band]:
    """The share of a predicted rate that a card reached, by what multiplies, from the rows that are the card's time."""
    found = {}
    for multiplies in ("HMMA", "FFMA"):
        ratios = [row.ratio for row in _measured(rows) if row.multiplies == multiplies]
        found[multiplies] = Band(min(ratios), _mean(ratios), max(ratios))
    return found


def _measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.published_us is not None and not row.is_host_time]


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _spread(ratios: list[float]) -> float:
    """The standard deviation of the logarithm."""
    mean = math.log(_mean(ratios))
    return math.sqrt(sum((math.log(ratio) - mean) ** 2 for ratio in ratios) / len(ratios))


# ---- the files ----

_HEADER = (*Row._fields[:5], "multiplies", "predicted_us", "published_us", "host_time")


def write(rows: list[Row], file: Path) -> None:
    """Write the rows as CSV."""
    with file.open("w") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(_HEADER)
        for row in rows:
            published = "" if row.published_us is None else row.published_us
            writer.writerow((*row[:6], f"{row.predicted_us:.1f}", published, "yes" if row.is_host_time else "no"))


def read(file: Path) -> list[Row]:
    """The rows of a CSV."""
    with file.open() as lines:
        return [_row(cells) for cells in csv.DictReader(lines)]


def _row(cells: dict[str, str]) -> Row:
    return Row(
        kernel=cells["kernel"],
        card=cells["card"],
        dtype=cells["dtype"],
        heads=int(cells["heads"]),
        seqlen=int(cells["seqlen"]),
        multiplies=cells["multiplies"],
        predicted_us=float(cells["predicted_us"]),
        published_us=float(cells["published_us"]) if cells["published_us"] else None,
        is_host_time=cells["host_time"] == "yes",
    )


def text(rows: list[Row]) -> str:
    """The page."""
    band = bands(rows)
    return TEMPLATE.read_text().format(
        groups=_groups(rows),
        hmma=band["HMMA"].shown(),
        ffma=band["FFMA"].shown(),
        ours=_ours(rows, band),
        rows=_rows(rows),
        assumptions=markdown_table(("what", "from where"), chips.SOURCES),
    )


def _groups(rows: list[Row]) -> str:
    lines = []
    for group in dict.fromkeys((row.card, row.dtype, row.multiplies) for row in _measured(rows)):
        ratios = [row.ratio for row in _measured(rows) if (row.card, row.dtype, row.multiplies) == group]
        numbers = (f"**{_mean(ratios):.3f}**", f"{100 * _spread(ratios):.1f} %", f"{min(ratios):.3f}")
        lines.append((*group, str(len(ratios)), *numbers, f"{max(ratios):.3f}"))
    return markdown_table(("card", "dtype", "multiplied by", "rows", "mean", "spread", "least", "most"), lines)


def _ours(rows: list[Row], band: dict[str, Band]) -> str:
    """Our rates beside the public kernels': published where they are, else predicted with their own band."""
    public = {row[1:5]: row for row in rows if row.kernel == PUBLIC}
    lines = []
    for row in rows:
        if row.kernel == OURS:
            rate = band[row.multiplies].times(row.tflops)
            shown = (
                row.card,
                row.dtype,
                f"{row.heads} x {row.seqlen}",
                row.multiplies,
                f"{row.tflops:.1f}",
                rate.shown(1),
            )
            lines.append((*shown, *_beside(rate, public.get(row[1:5]), band)))
    header = ("card", "dtype", "heads x tokens", "multiplied by", "predicted", "expected", "public", "ours / public")
    return markdown_table(header, lines)


def _beside(ours: Band, public: Row | None, band: dict[str, Band]) -> tuple[str, str]:
    if public is None:
        return "", ""
    if public.published_us is None:
        rate = band[public.multiplies].times(public.tflops)
        ratio = Band(ours.low / rate.high, ours.centre / rate.centre, ours.high / rate.low)
        return f"{rate.shown(1)}, predicted", ratio.shown()
    published = public.tflops * public.ratio
    return f"{published:.1f}", ours.times(1 / published).shown()


def _rows(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row.published_us is not None:
            times = (f"{row.published_us:.0f}", f"{row.predicted_us:.0f}", f"**{row.ratio:.3f}**")
            lines.append((row.card, row.dtype, f"{row.heads} x {row.seqlen}", *times, "the host's" * row.is_host_time))
    return markdown_table(("card", "dtype", "heads x tokens", "published, us", "predicted, us", "ratio", "time"), lines)


def main() -> int:
    try:
        rows = [*calibrate(), *compare()]
    except (nvdisasm.NotFound, nvrtc.NotFound) as error:
        print(f"not predicted again, the committed page stays: {error}")
        return 0
    write(rows, PAGE.with_suffix(".csv"))
    PAGE.write_text(text(read(PAGE.with_suffix(".csv"))))
    print(f"wrote {PAGE} and its CSV")
    return 0


if __name__ == "__main__":
    sys.exit(main())
