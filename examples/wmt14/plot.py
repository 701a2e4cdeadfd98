"""Draws how training went: nll of training and validation, and BLEU of the validation, over the target tokens seen.

python -m examples.wmt14.plot runs/multi30k_fast --output curve.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .models import errors_as_messages
from .progress import read_log


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="plot", description=__doc__, formatter_class=formatter)
    parser.add_argument("run", type=Path, help="folder of a run, or any with its log.jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".png, .svg or .pdf")
    return parser.parse_args(arguments)


def series(records: Sequence[dict[str, Any]], event: str, name: str) -> tuple[list[float], list[float]]:
    """Target tokens seen, in millions, and the value at those records of an event that have it."""
    found = [record for record in records if record["event"] == event and name in record]
    return [record["target_tokens_seen"] / 1e6 for record in found], [record[name] for record in found]


def draw(records: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draws the curves of a training into a file.

    Args:
        records: of `read_log`.
        title: above it.
        path: file to write; its ending decides the format.

    Raises:
        ValueError: no update was logged.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not any(record["event"] == "update" for record in records):
        raise ValueError("run: its log.jsonl must hold at least one update")
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axis.plot(*series(records, "update", "nll"), color="tab:blue", linewidth=0.8, alpha=0.6, label="training nll")
    axis.plot(*series(records, "validation", "nll"), "o-", color="tab:blue", markersize=4, label="validation nll")
    axis.set(xlabel="target tokens seen, millions", ylabel="nats per target token", title=title)
    axis.grid(alpha=0.3)
    tokens, bleu = series(records, "validation", "bleu")
    lines, labels = axis.get_legend_handles_labels()
    if bleu:
        right = axis.twinx()
        lines += right.plot(tokens, bleu, "s-", color="tab:orange", markersize=4)
        labels.append("BLEU of the first validation sentences")
        right.set_ylabel("BLEU", color="tab:orange")
        right.set_ylim(bottom=0)
    axis.legend(lines, labels, loc="center right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    with errors_as_messages():
        records = read_log(args.run)
        draw(records, args.run.resolve().name, args.output)
        print(f"{args.output}: {len(records)} records of {args.run}")


if __name__ == "__main__":
    main()
