"""The cycle model calibrated on the chip: public kernels predicted beside the only published times of the P100's die.

    python -m benchmarks.p100.calibration             writes docs/p100_calibration.md and .csv
    python -m benchmarks.p100.calibration --rows 4    predicts the first rows of each group and prints them

The machine code is that of a public wheel, which is fetched with pip once (`public_kernels`). Without it the committed
table stays as it is, and predictions are still expected to be off as it says.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import published

from . import chip, static_analysis
from .machine import nvdisasm
from .page import DOCS, Band, markdown_table
from .passes import Pass
from .prediction import Predictor, lengths_replayed
from .public_kernels import ROWS, PublicTracer

TEMPLATE = Path(__file__).with_name("calibration.md")
PAGE = DOCS / "p100_calibration.md"
# xformers' backward in float32 first computes delta in three of torch's kernels, which pass over a tensor four times.
DELTA_PASSES, DELTA_KERNELS = 4, 3
WAYS = ("forward", "backward")
LANES = "FP32 lanes with conflicts"


class Calibrated(NamedTuple):
    """A row of the table: a published time and the prediction for the same machine code."""

    pass_: Pass
    published_us: float
    predicted_us: float
    lanes_us: float  # for which the FP32 lanes are busy, bank conflicts included
    touched_kb: float  # of machine code that a block executes
    error: float  # of the kernel's results, executed here, against float64, as a share of the largest entry
    is_fitted: bool  # constants of the model were chosen with it in view; the others were kept out

    @property
    def ratio(self) -> float:
        """Predicted / published: the share of a predicted rate that the card reached."""
        return self.predicted_us / self.published_us

    @property
    def is_even(self) -> bool:
        """Sequences consist of whole tiles."""
        return self.pass_.seqlen % ROWS == 0


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def spread(ratios: Sequence[float]) -> float:
    """The standard deviation of the logarithm."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = sum(logs) / len(logs)
    return math.sqrt(sum((x - mean) ** 2 for x in logs) / len(logs))


def expected(direction: str, card: chip.Card) -> Band:
    """The share of a predicted rate that a card is expected to reach, from the committed table.

    Forward from the rows of float32 with 64 dimensions and more: the public kernels for float16 convert in their inner
    loops, and ours do not. Backward from the rows of whole tiles: on the others the public kernels execute more code
    than an instruction cache may hold, and ours do not.

    The clock of the published times has two readings. At the data sheet's, the card reached these shares. If it was
    that which its products need, it did less in each cycle, and so does another card, whose clock is given: its least
    is that of this reading, its most that of the first one, and the centre lies between both.
    """
    band = _bands()[direction]
    if card == chip.QUADRO:
        return band
    slower = chip.QUADRO.clock_hz / chip.QUADRO_CLOCK_OF_PRODUCTS_HZ
    return Band(band.low * slower, band.centre * math.sqrt(slower), band.high)


def band_of(ratios: Sequence[float]) -> Band:
    return Band(min(ratios), geometric_mean(ratios), max(ratios))


def _is_like_ours(row: Calibrated) -> bool:
    p = row.pass_
    return not p.is_backward and p.dtype == torch.float32 and p.head_dim >= 64


@cache
def _bands() -> dict[str, Band]:
    rows = read(PAGE.with_suffix(".csv"))
    return {
        "forward": band_of([row.ratio for row in rows if _is_like_ours(row)]),
        "backward": band_of([row.ratio for row in rows if row.pass_.is_backward and row.is_even]),
    }


# ---- the rows ----


def passes() -> list[tuple[Pass, float, bool]]:
    """Every published pass with its microseconds, and whether it may be fitted, as every other row of a group may."""
    found = []
    for _, rows in groupby(published.rows(), lambda row: (row.direction, row.dtype)):
        for n, row in enumerate(rows):
            found.append((Pass(row.direction, *row.shape, row.dtype), 1e3 * row.times.fused_ms, n % 2 == 0))
    return found


def calibrate(chosen: list[tuple[Pass, float, bool]]) -> list[Calibrated]:
    """The rows of these passes, their machine code executed and replayed."""
    tracer = PublicTracer(chip.QUADRO.multiprocessors)
    predictor = Predictor(tracer, chip.QUADRO)
    rows = []
    for pass_, published_us, is_fitted in chosen:
        prediction = predictor.predict(pass_)
        (launch,) = predictor.launches(pass_)
        touched = static_analysis.touched_bytes(launch.program, launch.kinds[0].block.times(launch.program))
        error = max(tracer.error(pass_, length) for length in lengths_replayed(pass_))
        predicted_us = prediction.microseconds + delta_us(pass_, chip.QUADRO)
        lanes_us = prediction.bounds[LANES]
        rows.append(Calibrated(pass_, published_us, predicted_us, lanes_us, touched / 1024, error, is_fitted))
        print(f"{pass_}: {predicted_us:.0f} us, published {published_us:.0f}: {rows[-1].ratio:.3f}", file=sys.stderr)
    return rows


def delta_us(pass_: Pass, card: chip.Card) -> float:
    """The time of the kernels that xformers starts before that of the backward."""
    if not pass_.is_backward or pass_.dtype != torch.float32:
        return 0.0
    moved = DELTA_PASSES * 4.0 * pass_.batch * pass_.nheads * pass_.seqlen * pass_.head_dim
    seconds = moved / (card.dram_share * card.dram_bytes_per_s) + DELTA_KERNELS * chip.LAUNCH_SECONDS
    return 1e6 * seconds


# ---- the table as a file ----

_SHAPE = ("batch", "nheads", "seqlen", "head_dim")
_HEADER = (
    "pass",
    "dtype",
    *_SHAPE,
    "published_us",
    "predicted_us",
    "ratio",
    "lanes_us",
    "touched_kb",
    "error",
    "fitted",
)


def write(rows: list[Calibrated], file: Path) -> None:
    """Write the rows as CSV."""
    with file.open("w") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(_HEADER)
        for row in rows:
            p = row.pass_
            shape = [getattr(p, name) for name in _SHAPE]
            numbers = (f"{row.published_us:.1f}", f"{row.predicted_us:.1f}", f"{row.ratio:.3f}", f"{row.lanes_us:.1f}")
            is_fitted = "yes" if row.is_fitted else "no"
            rest = (f"{row.touched_kb:.0f}", f"{row.error:.1e}", is_fitted)
            writer.writerow((p.direction, dtype_name(p), *shape, *numbers, *rest))


def read(file: Path) -> list[Calibrated]:
    """The rows of a CSV."""
    with file.open() as lines:
        return [_row(cells) for cells in csv.DictReader(lines)]


def _row(cells: dict[str, str]) -> Calibrated:
    batch, nheads, seqlen, head_dim = (int(cells[name]) for name in _SHAPE)
    pass_ = Pass(cells["pass"], batch, nheads, seqlen, head_dim, getattr(torch, cells["dtype"]))
    names = ("published_us", "predicted_us", "lanes_us", "touched_kb", "error")
    published_us, predicted_us, lanes_us, touched_kb, error = (float(cells[name]) for name in names)
    is_fitted = cells["fitted"] == "yes"
    return Calibrated(pass_, published_us, predicted_us, lanes_us, touched_kb, error, is_fitted)


def dtype_name(pass_: Pass) -> str:
    return str(pass_.dtype).removeprefix("torch.")


# ---- the page ----

Choice = Callable[[Calibrated], bool]
_EXTRA: dict[str, Choice] = {
    "all": lambda row: True,
    "kept out of every fit": lambda row: not row.is_fitted,
    "whole tiles": lambda row: row.is_even,
    "whole tiles, kept out": lambda row: row.is_even and not row.is_fitted,
    "64 dimensions": lambda row: row.pass_.head_dim == 64,
    "64 dimensions, 128 tokens and less": lambda row: row.pass_.head_dim == 64 and row.pass_.seqlen <= 128,
    "fewer dimensions": lambda row: row.pass_.head_dim < 64,
    "more dimensions": lambda row: row.pass_.head_dim > 64,
    "82 and 197 tokens": lambda row: not row.is_even,
}


def text(rows: list[Calibrated]) -> str:
    """The page."""
    above = sum(row.lanes_us > row.published_us for row in rows)
    faster = chip.QUADRO.clock_hz / chip.QUADRO_CLOCK_OF_PRODUCTS_HZ
    means = {way: [f"{faster * geometric_mean(group):.3f}" for group in _by_dtype(rows, way)] for way in WAYS}
    bands = [(name, *(f"{share:.2f}" for share in band)) for name, band in _shown_bands().items()]
    return TEMPLATE.read_text().format(
        groups=_groups(rows),
        bands=markdown_table(("", "least", "expected", "most"), bands),
        rows=_rows(rows),
        above=f"{above} of {len(rows)}",
        nearest=f"{max(row.lanes_us / row.published_us for row in rows):.2f}",
        fast_forward=" and ".join(means["forward"]),
        fast_backward=" and ".join(means["backward"]),
    )


def _by_dtype(rows: list[Calibrated], way: str) -> list[list[float]]:
    """The ratios of float32 and of float16, the backward's of whole tiles."""
    alike = [row for row in rows if row.pass_.direction == way and (row.is_even or way == "forward")]
    return [[row.ratio for row in alike if row.pass_.dtype == dtype] for dtype in (torch.float32, torch.float16)]


def _shown_bands() -> dict[str, Band]:
    cards = (chip.QUADRO, chip.SXM2)
    return {f"{way}, {card.name}": expected(way, card) for way in WAYS for card in cards}


def _groups(rows: list[Calibrated]) -> str:
    lines = []
    for way in WAYS:
        for dtype in (torch.float32, torch.float16):
            group = [row for row in rows if row.pass_.direction == way and row.pass_.dtype == dtype]
            for name, belongs in _EXTRA.items():
                ratios = [row.ratio for row in group if belongs(row)]
                if len(ratios) > 1 and not (way == "forward" and name.startswith("whole tiles")):
                    lines.append((f"{way} {str(dtype).removeprefix('torch.')}", name, *_statistics(ratios)))
    return markdown_table(("pass", "rows", "", "mean", "spread", "least", "most"), lines)


def _statistics(ratios: list[float]) -> tuple[str, ...]:
    numbers = (f"{x:.3f}" for x in (min(ratios), max(ratios)))
    return (str(len(ratios)), f"**{geometric_mean(ratios):.3f}**", f"{100 * spread(ratios):.1f} %", *numbers)


def _rows(rows: list[Calibrated]) -> str:
    header = ("pass", "dtype", "batch x heads x tokens x dim", "published, us", "predicted, us", "ratio")
    lines = []
    for row in rows:
        p = row.pass_
        shape = f"{p.batch} x {p.nheads} x {p.seqlen} x {p.head_dim}"
        times = (f"{row.published_us:.0f}", f"{row.predicted_us:.0f}", f"**{row.ratio:.3f}**")
        more = (f"{row.lanes_us / row.published_us:.2f}", f"{row.touched_kb:.0f}", f"{row.error:.0e}")
        lines.append((p.direction, dtype_name(p), shape, *times, *more, "" if row.is_fitted else "kept out"))
    return markdown_table((*header, "lanes / published", "code of a block, KB", "error", "fit"), lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.p100.calibration", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, help="predict only so many rows of each group, and write nothing")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    groups = [[*rows] for _, rows in groupby(passes(), lambda row: (row[0].direction, row[0].dtype))]
    try:
        PublicTracer(chip.QUADRO.multiprocessors)
        nvdisasm.path()
    except nvdisasm.NotFound as error:
        print(f"not calibrated again, the committed table stays: {error}")
        return 0
    # The backward takes longest, so it comes first.
    with ProcessPoolExecutor(options.processes) as pool:
        found = [*pool.map(calibrate, [group[: options.rows] for group in reversed(groups)])]
    rows = [row for group in reversed(found) for row in group]
    if options.rows is None:
        write(rows, PAGE.with_suffix(".csv"))
        _bands.cache_clear()
        PAGE.write_text(text(read(PAGE.with_suffix(".csv"))))  # what is rounded there is rounded here
        print(f"wrote {PAGE} and its CSV")
    return 0


if __name__ == "__main__":
    sys.exit(main())
