"""Writes benchmarks/results/README.md from the tables beside it, and prints who wins.

python -m benchmarks.summary
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.command import RESULTS
from benchmarks.comparison import Comparison, Row, comparisons, is_ours, medians, print_comparisons
from benchmarks.result_table import read

HEAD = """# Results

Written by `python -m benchmarks.summary` from the tables in these folders, which the benchmarks write. Each table has a
JSON file beside it with device, driver, versions, commit and command. Times are medians unless the column says that
they are minima.
"""
WITHOUT_KERNELS = """\
Here fastattn attends with torch's kernels. These tables show the routes that exist without its own, and what
a call costs the host; they say nothing of the speed of fastattn's own kernels.
"""
# What of each table is shown: its title and its columns.
SHOWN = {
    "attention_targets": (
        "What the CPU kernels have to reach",
        ("target", "case", "peer", "unit", "ours", "theirs", "ratio", "wanted", "goal", "verdict"),
    ),
    "multi_head_attention": ("The module", ("workload", "provider", "dtype", "pass", "p50_ms", "peak_memory_mib")),
    "transformer_step": (
        "Training steps",
        ("model", "precision", "rung", "tokens_per_s", "step_ms", "peak_memory_mib", "paper_days"),
    ),
    "example_steps": (
        "Training steps of the examples",
        (
            "example",
            "precision",
            "way",
            "tokens_per_s",
            "step_ms",
            "before",
            "saved_percent",
            "wanted_percent",
            "verdict",
        ),
    ),
    "decode": ("Beam search", ("model", "precision", "way", "backend", "sentences", "tokens", "tokens_per_s")),
    "layers": ("One layer of each kind", ("dtype", "seqlen", "layer", "p50_ms", "peak_memory_mib")),
    "overhead": ("What a call costs the host", ("op", "min_us", "peer", "peer_min_us", "limit_us", "verdict")),
    "launch_latency": ("The host's part of a launch", ("op", "min_us", "p50_us", "p80_us")),
}


def markdown(rows: Iterable[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """A table; columns without any value are left out."""
    rows = [{column: str(row.get(column) or "") for column in columns} for row in rows]
    columns = tuple(column for column in columns if any(row[column] for row in rows))
    lines = [columns, ("---",) * len(columns), *([row[column] for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def attention(rows: list[Row]) -> str:
    """The medians of the suites, every case that was lost, and the published times beside ours."""
    found = comparisons(rows)
    text = "\n### Attention\n\n"
    if not found:
        timed = [row for row in rows if row["pass"] == "both" and row["p50_ms"]]
        return text + markdown(timed, ("suite", "workload", "layout", "mask", "dtype", "provider", "p50_ms", "note"))
    text += "fastattn's fastest kernel against the fastest of the others, forward and backward together:\n\n"
    suites = [
        {"suite": suite, "median speedup": f"{median:.2f}x", "cases": count, "lost": lost}
        for suite, (median, count, lost) in medians(found).items()
    ]
    text += markdown(suites, ("suite", "median speedup", "cases", "lost"))
    lost = sorted((c for c in found if c.speedup() < 1), key=Comparison.speedup)
    text += f"\n{len(lost)} of {len(found)} passes were lost" + (":\n\n" if lost else ".\n")
    if lost:
        columns = ("suite", "case", "which", "ours", "ours_ms", "peer", "peer_ms", "speedup")
        text += markdown([c._asdict() | {"speedup": f"{c.speedup():.2f}x"} for c in lost], columns)
    return text + beside_the_published(rows)


def beside_the_published(rows: list[Row]) -> str:
    """Ours, and the times that were published for the P100's die."""
    columns = ("pass", "dtype", "batch", "nheads", "seqlen_k", "head_dim", "published_vanilla_ms", "published_fused_ms")
    ours: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["published_vanilla_ms"] and is_ours(row["provider"]):
            key = tuple(row[column] for column in columns)
            if key not in ours or float(row["p50_ms"]) < float(ours[key]["p50_ms"]):
                ours[key] = row
    if not ours:
        return ""
    text = "\nBeside the times published for a Quadro GP100 (`benchmarks/data`):\n\n"
    return text + markdown(ours.values(), (*columns, "provider", "p50_ms"))


def origin_of(origin: dict[str, Any]) -> str:
    """A line on where a table's numbers come from."""
    versions = origin["versions"]
    changed = " with changes" if origin["dirty"] else ""
    parts = [f"torch {versions['torch']}", f"driver {origin['driver']}" if origin["driver"] else ""]
    parts += [f"commit {(origin['commit'] or 'unknown')[:10]}{changed}", origin["date"][:10]]
    if origin["device"].startswith("CPU"):
        parts.append(f"load {origin['load_before']} on {origin['cores']} cores before it began")
        parts.append(instruction_sets(origin))
    if "copy_gb_s" in origin:
        parts.append(f"a copy moves {origin['copy_gb_s']} GB/s")
    if "product_tflops" in origin:
        rates = [f"{name} {rate}" for name, rate in origin["product_tflops"].items()]
        parts.append(f"matrix products do {', '.join(rates)} TFLOP/s")
    if origin.get("float32_peak_tflops"):
        rates = [f"{name} {rate}" for name, rate in origin["float32_peak_tflops"].items()]
        parts.append(f"multiply-adds in registers {', '.join(rates)} TFLOP/s")
    return "; ".join(part for part in parts if part) + f"; `{origin['command']}`\n"


def instruction_sets(origin: dict[str, Any]) -> str:
    """The instruction sets of the kernels and of torch, where the table says them."""
    cpu = origin.get("cpu")
    return "" if cpu is None else f"kernels {cpu['instruction_set']}, torch {cpu['instruction_set_of_torch']}"


def opening(origin: dict[str, Any]) -> str:
    """The head of a device's tables."""
    runs_on = origin.get("backends", {}).get("float32", "torch")
    is_torch = origin["device"].startswith("CPU") and runs_on == "torch"
    return f"\n## {origin['device']}\n" + (f"\n{WITHOUT_KERNELS}" if is_torch else "")


def section(folder: Path) -> str:
    """All tables and pictures of one device."""
    text = ""
    for table in ("attention", *SHOWN):
        file = folder / f"{table}.csv"
        if not file.exists():
            continue
        rows, origin = read(file)
        if not text:
            text = opening(origin)
        if table == "attention":
            text += attention(rows)
        else:
            title, columns = SHOWN[table]
            text += f"\n### {title}\n\n" + markdown(rows, (*columns, "no_numbers_because"))
        text += f"\n{origin_of(origin)}"
        pictures = sorted(path for path in folder.glob(f"{table}*.png"))
        text += "".join(f"\n![{path.stem}]({folder.name}/{path.name})\n" for path in pictures)
    return text


def main(arguments: list[str] | None = None) -> int:
    """Writes the page and prints the comparison of every device; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description="Sum up the results.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of folders")
    results = parser.parse_args(arguments).results
    folders = sorted(path for path in results.glob("*") if path.is_dir())
    page = results / "README.md"
    page.write_text(HEAD + ("".join(section(folder) for folder in folders) or "\nNothing has been measured yet.\n"))
    for folder in folders:
        if (folder / "attention.csv").exists():
            print(f"\n{folder.name}")
            print_comparisons(comparisons(read(folder / "attention.csv")[0]))
    print(f"\nwrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
