"""Averages the weights of several checkpoints of a run: the paper's last step before translating (section 6.1).

python -m examples.wmt14.average runs/base_en_de --output runs/base_en_de/averaged.pt
python -m examples.wmt14.average run/checkpoints/update-00090000 run/checkpoints/update-00100000 --output mean.pt
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from fastattn.nmt.averaging import average_models

from .checkpoints import checkpoint_folders, update_of
from .models import errors_as_messages, run_description


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.wmt14.average", description=__doc__.splitlines()[0],
        epilog="The paper averages the last 5 checkpoints of a base model, the last 20 of a big one, 10 minutes apart.",
    )  # fmt: skip
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN | CHECKPOINT", help="one run, or its checkpoints")
    parser.add_argument("--last", type=int, metavar="N", help="of a run: its N newest (default: as its recipe)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the averaged model, written whole")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    with errors_as_messages():
        checkpoints = select_checkpoints(args.paths, args.last)
        average(checkpoints, args.output)
        print(f"{args.output}: mean of the {len(checkpoints)} checkpoints", *(path.name for path in checkpoints))


def select_checkpoints(paths: Sequence[Path], last: int | None = None) -> list[Path]:
    """The checkpoints to average.

    Args:
        paths: one run folder, or checkpoint folders.
        last: how many of a run's, the newest; None for as many as its recipe averages.

    Raises:
        FileNotFoundError: a folder is no checkpoint, or its model is missing.
        ValueError: fewer checkpoints than asked for, two of the same update, or `last` for a list.
    """
    if len(paths) == 1 and (paths[0] / "checkpoints").is_dir():
        if last is None:
            last = run_description(paths[0])["config"]["averaged"]
        if last < 1:
            raise ValueError(f"--last: must be at least 1, got {last}")
        found = checkpoint_folders(paths[0])
        if len(found) < last:
            raise ValueError(f"--last: {paths[0]} has {len(found)} checkpoints, fewer than {last}")
        return found[-last:]
    if last is not None:
        raise ValueError("--last: belongs to one run folder, not to a list of checkpoints")
    seen: dict[int, Path] = {}
    for path in paths:
        if not (path / "model.pt").is_file():
            raise FileNotFoundError(f"checkpoint: {path} holds no model.pt")
        update = update_of(path.resolve())
        if update in seen:
            raise ValueError(f"checkpoint: {path} is of the same update as {seen[update]}")
        seen[update] = path
    return list(paths)


def average(checkpoints: Sequence[Path], output: Path) -> None:
    """Writes the mean of the checkpoints' models; the file is complete or not there at all.

    Raises:
        FileNotFoundError: a checkpoint has no model.
        ValueError: two checkpoints with the same weights, or with different configurations.
    """
    mean = average_models([checkpoint / "model.pt" for checkpoint in checkpoints])
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        mean.save(partial)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
