"""Runs every step of this example on a few hundred self-made sentence pairs, with a kill -9 in the middle of training.

    python -m examples.wmt14.smoke [--out FOLDER]

It says nothing about quality, only that the steps fit together on this machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from examples.number_translation import draw_pairs

from .checkpoints import checkpoint_folders
from .progress import read_log

PAIRS = {"train": 500, "valid": 50, "test": 50}
UPDATES = 300
LEAST_GAIN = 2.0  # nats per target token by which the loss must fall from first to last update


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.wmt14.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder that keeps everything; must be new (default: none is kept)")
    args = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads only get into each other's way at this size
    if args.out is None:
        with tempfile.TemporaryDirectory() as folder:
            return smoke(Path(folder))
    try:
        args.out.mkdir(parents=True)
    except FileExistsError:
        sys.exit(f"--out: must not exist yet, got {args.out}")
    smoke(args.out)


def smoke(folder: Path) -> None:
    """Run all steps; exits with a message at the first that fails."""
    start = time.perf_counter()
    data, run, output = folder / "data", folder / "run", folder / "test.txt"
    call("prepare", "--preparation", "smoke", "--out", data, "--workers", 1, *write_text(folder))
    options: list[object] = ["--config", "smoke", "--data", data, "--out", run, "--updates", UPDATES]
    options += ["--resume", "auto", "--log-every", 10, "--bleu-sentences", 20]
    kill_after_a_checkpoint(command("train", *options), run)
    call("train", *options)
    check_log(run)
    call("average", run, "--last", 3, "--output", run / "averaged.pt")
    call("translate", run / "averaged.pt", "--data", data, "--split", "test", "--output", output)
    call("score", output, "--data", data, "--split", "test")
    print(f"\nevery step ran: {time.perf_counter() - start:.0f} s")


def write_text(folder: Path) -> list[str | Path]:
    """Write the text, none of whose test sentences is in training; returns the options by which prepare finds it."""
    options: list[str | Path] = []
    for seed, (split, count) in enumerate(PAIRS.items()):
        pairs = draw_pairs(count, seed, test=split == "test")
        for side, sentences in zip(("source", "target"), zip(*pairs, strict=True), strict=True):
            file = folder / f"{split}.{side}"
            file.write_text("".join(f"{sentence}\n" for sentence in sentences), encoding="utf-8")
            options += [f"--{split}-{side}", file]
    return options


def command(step: str, *arguments: object) -> list[str]:
    """The command of a step; printed as a person would type it."""
    line = ["python", "-m", f"examples.wmt14.{step}", *map(str, arguments)]
    print(f"\n$ {shlex.join(line)}", flush=True)
    return [sys.executable, *line[1:]]


def call(step: str, *arguments: object) -> None:
    """Runs a step to its end."""
    if code := subprocess.run(command(step, *arguments)).returncode:
        sys.exit(f"{step}: ended with exit code {code}")


def kill_after_a_checkpoint(line: list[str], run: Path) -> None:
    """Starts training and kills it, as no program can prevent, when it has written a checkpoint."""
    process = subprocess.Popen(line)
    while not checkpoint_folders(run):
        if process.poll() is not None:
            sys.exit(f"train: ended with exit code {process.returncode} before its first checkpoint")
        time.sleep(0.01)
    process.kill()
    if process.wait() == 0:
        sys.exit("train: reached its last update before it could be killed")
    print(f"\nkilled after {checkpoint_folders(run)[-1].name}", flush=True)


def check_log(run: Path) -> None:
    """Exit unless the log has every update once, in spite of the kill, and the loss fell."""
    records = [record for record in read_log(run) if record["event"] == "update"]
    updates, gain = [record["update"] for record in records], records[0]["nll"] - records[-1]["nll"]
    if updates != sorted(set(updates)) or updates[-1] != UPDATES:
        sys.exit(f"train: the log must have the updates up to {UPDATES} once each, got {updates}")
    if gain < LEAST_GAIN:
        sys.exit(f"train: nll must fall by {LEAST_GAIN}, it fell by {gain:.2f}")


if __name__ == "__main__":
    main()
