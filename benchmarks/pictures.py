"""Pictures of results: one PNG or more for each table, beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.comparison import Comparison, Row, comparisons, is_ours
from benchmarks.result_table import read

STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
OURS, THEIRS = "#c23b22", "#7a8ba3"
COLOURS = color_sequences["tab10"]
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def look(name: str, names: list[str]) -> dict[str, Any]:
    """The style of a line: the same for one name in every panel; ours are thicker."""
    turn, index = divmod(names.index(name), len(COLOURS))
    return {"color": COLOURS[index], "ls": "--" if turn else "-", "lw": 2.6 if is_ours(name) else 1.2}


def curves(ax: Axes, rows: Iterable[Row], by: str, names: list[str], x: str, y: str) -> None:
    """A line per value of the column `by`, on logarithmic axes."""
    for name in names:
        points = sorted((float(row[x]), float(row[y])) for row in rows if row[by] == name and row[y])
        if points:
            ax.plot(*zip(*points, strict=True), marker="o", ms=3, label=name, **look(name, names))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PLAIN)


def bars(ax: Axes, labels: list[str], values: list[float], colours: Sequence[str], unit: str) -> None:
    """Horizontal bars from the top down, each with its value."""
    drawn = ax.barh(range(len(values)), values, color=colours)
    ax.bar_label(drawn, labels=[f"{v:,.0f}" if v >= 1000 else f"{v:.4g}" for v in values], padding=3, fontsize=8)
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.margins(x=0.18, y=0.02)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(unit)


def ordered(rows: Iterable[Row], column: str) -> list[str]:
    """The values of a column in the order of the table."""
    return list(dict.fromkeys(row[column] for row in rows))


def panels(count: int, width: float = 4.4, height: float = 3.4, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of that many axes."""
    columns = min(columns, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    for unused in axes.flat[count:]:
        unused.remove()
    return figure, list(axes.flat[:count])


# ---- one function per table ----


def attention(rows: list[Row]) -> Figure | None:
    """Time against length, forward and backward together, by mask, of the suites of whole sequences."""
    rows = [row for row in rows if row["pass"] == "both" and row["suite"] in ("short", "long")]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row.get(name, "") for name in ("suite", "head_dim", "mask", "dtype", "threads"))
        groups.setdefault(key, []).append(row)
    groups = {key: group for key, group in groups.items() if len({row["seqlen_k"] for row in group}) > 1}
    if not groups:
        return None
    names = ordered(rows, "provider")
    figure, axes = panels(len(groups))
    for ax, ((suite, head_dim, mask, dtype, threads), group) in zip(axes, groups.items(), strict=True):
        curves(ax, group, "provider", names, "seqlen_k", "p50_ms")
        ax.set_title(f"{suite}, mask {mask}, d {head_dim}, {dtype}" + (f", {threads} threads" if threads else ""))
        ax.set_xlabel("length")
        ax.set_ylabel("ms, forward + backward")
    share_legend(figure, axes)
    return figure


def share_legend(figure: Figure, axes: list[Axes]) -> None:
    """One legend below all axes, of every label in them."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    columns = max(1, min(len(handles), int(figure.get_figwidth() / 2.3)))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


def attention_speedup(rows: list[Row]) -> Figure | None:
    """The speed of fastattn's fastest kernel over that of the fastest other, for every case."""
    found = [c for c in comparisons(rows) if c.which == "both"]
    if not found:
        return None
    found.sort(key=Comparison.speedup, reverse=True)
    figure, (ax,) = panels(1, 11, 1.2 + 0.19 * len(found))
    speedups = [c.speedup() for c in found]
    ax.barh(range(len(found)), [s - 1 for s in speedups], left=1, color=[OURS if s >= 1 else THEIRS for s in speedups])
    ax.set_yticks(range(len(found)), [c.case for c in found], fontsize=7)
    ax.invert_yaxis()
    ax.margins(y=0.5 / len(found))
    ax.axvline(1, color="black", lw=0.8)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(PLAIN)
    ax.set_xlabel("time of the fastest other / time of fastattn, forward + backward (right of 1: fastattn is faster)")
    return figure


def attention_batches(rows: list[Row]) -> Figure | None:
    """Times of forward and backward together on batches of sentences, padded and packed."""
    rows = [row for row in rows if row["pass"] == "both" and row["suite"] == "wmt"]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        threads = f", {row['threads']} threads" if row.get("threads") else ""
        groups.setdefault(f"{row['workload']}, {row['dtype']}{threads}", []).append(row)
    if not groups:
        return None
    tallest = max(map(len, groups.values()))
    figure, axes = panels(len(groups), 5.6, 0.7 + 0.24 * tallest)
    for ax, (title, group) in zip(axes, groups.items(), strict=True):
        group.sort(key=lambda row: float(row["p50_ms"]))
        names = [f"{row['provider']}, {row['layout']}" for row in group]
        shades = [OURS if is_ours(row["provider"]) else THEIRS for row in group]
        bars(ax, names, [float(row["p50_ms"]) for row in group], shades, "ms, forward + backward")
        ax.set_title(title)
    return figure


def multi_head_attention(rows: list[Row]) -> Figure | None:
    """The module's times on batches of sentences."""
    rows = [row for row in rows if row["pass"] == "both"]
    groups = ordered(rows, "workload")
    figure, axes = panels(len(groups), 4.8, 1.0 + 0.24 * len(rows) / len(groups))
    for ax, workload in zip(axes, groups, strict=True):
        group = [row for row in rows if row["workload"] == workload]
        names = [f"{row['provider']}, {row['dtype']}" for row in group]
        shades = [OURS if is_ours(row["provider"]) else THEIRS for row in group]
        bars(ax, names, [float(row["p50_ms"]) for row in group], shades, "ms, forward + backward")
        ax.set_title(f"{workload}, longest")
    return figure


def transformer_step(rows: list[Row]) -> Figure | None:
    """The speed of every rung of the ladder, for each model and precision."""
    groups = list(dict.fromkeys((row["model"], row["precision"]) for row in rows))
    figure, axes = panels(len(groups), 6.2, 2.4, columns=2)
    for ax, (model, precision) in zip(axes, groups, strict=True):
        group = [row for row in rows if (row["model"], row["precision"]) == (model, precision)]
        shades = [THEIRS if row["rung"].startswith("torch") else OURS for row in group]
        bars(ax, [row["rung"] for row in group], [float(row["tokens_per_s"]) for row in group], shades, "tokens/s")
        ax.set_title(f"training, {model}, {precision}")
    return figure


def example_steps(rows: list[Row]) -> Figure | None:
    """The speed of every way to train, for each example and precision."""
    groups = list(dict.fromkeys((row["example"], row["precision"]) for row in rows))
    figure, axes = panels(len(groups), 5.0, 2.0, columns=3)
    for ax, (example, precision) in zip(axes, groups, strict=True):
        group = [row for row in rows if (row["example"], row["precision"]) == (example, precision)]
        shades = [THEIRS if row["backend"] == "torch" else OURS for row in group]
        bars(ax, [row["way"] for row in group], [float(row["tokens_per_s"]) for row in group], shades, "tokens/s")
        ax.set_title(f"training, {example}, {precision}, one thread")
    return figure


def decode(rows: list[Row]) -> Figure | None:
    """The speed of every way to search, for each model and precision."""
    groups = list(dict.fromkeys((row["model"], row["precision"]) for row in rows))
    figure, axes = panels(len(groups), 6.2, 2.2, columns=2)
    for ax, (model, precision) in zip(axes, groups, strict=True):
        group = [row for row in rows if (row["model"], row["precision"]) == (model, precision)]
        shades = [OURS if is_ours(row["way"]) else THEIRS for row in group]
        bars(ax, [row["way"] for row in group], [float(row["tokens_per_s"]) for row in group], shades, "tokens/s")
        ax.set_title(f"beam search, {model}, {precision}")
    return figure


def layers(rows: list[Row]) -> Figure | None:
    """Time and memory against length."""
    kinds = [(dtype, y) for dtype in ordered(rows, "dtype") for y in ("p50_ms", "peak_memory_mib")]
    kinds = [(dtype, y) for dtype, y in kinds if any(row[y] and row["dtype"] == dtype for row in rows)]
    figure, axes = panels(len(kinds), 5.4, 4.0, columns=2)
    names = ordered(rows, "layer")
    for ax, (dtype, y) in zip(axes, kinds, strict=True):
        curves(ax, [row for row in rows if row["dtype"] == dtype], "layer", names, "seqlen", y)
        tokens = int(rows[0]["batch"]) * int(rows[0]["seqlen"])
        ax.set_title(f"one layer on {tokens:,} tokens, width {rows[0]['width']}, {dtype}")
        ax.set_xlabel("length of the sequences")
        ax.set_ylabel("ms, forward + backward" if y == "p50_ms" else "peak memory, MiB")
    share_legend(figure, axes)
    return figure


def overhead(rows: list[Row]) -> Figure | None:
    """The host's time for our calls and torch's, side by side."""
    rows = [row for row in rows if row["peer"]]
    figure, (ax,) = panels(1, 8.5, 0.6 * len(rows) + 1)
    labels = [label for row in rows for label in (row["op"], row["peer"])]
    values = [float(us) for row in rows for us in (row["min_us"], row["peer_min_us"])]
    bars(ax, labels, values, [OURS, THEIRS] * len(rows), "microseconds of the host, minimum")
    return figure


# The picture, its table, and the column for whose values there is one picture each.
DRAWN: tuple[tuple[Callable[[list[Row]], Figure | None], str, str | None], ...] = (
    (attention, "attention", "dtype"),
    (attention_batches, "attention", "dtype"),
    (attention_speedup, "attention", "suite"),
    (multi_head_attention, "multi_head_attention", None),
    (transformer_step, "transformer_step", None),
    (example_steps, "example_steps", None),
    (decode, "decode", None),
    (layers, "layers", None),
    (overhead, "overhead", None),
)


def draw(folder: Path) -> list[Path]:
    """Draws every picture of one folder; returns the files. A table without numbers has none."""
    plt.switch_backend("agg")  # needs no display
    with plt.rc_context(STYLE):
        return [file for drawn in DRAWN if (folder / f"{drawn[1]}.csv").exists() for file in _draw(folder, *drawn)]


def _draw(folder: Path, function: Callable[[list[Row]], Figure | None], table: str, column: str | None) -> list[Path]:
    rows, origin = read(folder / f"{table}.csv")
    rows = [row for row in rows if not row.get("no_numbers_because")]
    parts = {"": rows}
    if column is not None:
        parts = {f"_{x}": [row for row in rows if row[column] == x] for x in ordered(rows, column)}
    written = []
    for suffix, part in parts.items():
        if part and (figure := function(part)):
            figure.suptitle(f"{origin['device']}, torch {origin['versions']['torch']}, {origin['date'][:10]}")
            written.append(folder / f"{function.__name__}{suffix}.png")
            figure.savefig(written[-1])
            plt.close(figure)
    return written
