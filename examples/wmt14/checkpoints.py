"""Checkpoints of a run: each a folder that appears complete, by one renaming, or not at all."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastattn import Transformer

_PREFIX = "update-"


def checkpoint_folders(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob(f"{_PREFIX}{'[0-9]' * 8}"))


def update_of(checkpoint: Path) -> int:
    """The number of updates after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


class Checkpoints:
    """Writes the checkpoints of one run; only one process may.

    Args:
        run: folder of the run.
        keep_last: how many are kept.
    """

    def __init__(self, run: Path, keep_last: int) -> None:
        self.run, self.keep_last = run, keep_last
        self.folder = run / "checkpoints"
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob(".*"):
            shutil.rmtree(unfinished)

    def save(self, update: int, model: Transformer, training: dict[str, Any]) -> None:
        """Writes `model.pt` and `training.pt` of an update, then deletes the checkpoints that are too old."""
        final = self.folder / f"{_PREFIX}{update:08d}"
        if not final.exists():
            partial = self.folder / f".{final.name}"
            partial.mkdir()
            model.save(partial / "model.pt")
            torch.save(training, partial / "training.pt")
            for path in (partial / "model.pt", partial / "training.pt", partial):
                _flush(path)
            partial.rename(final)
            _flush(self.folder)
        for old in checkpoint_folders(self.run)[: -self.keep_last]:
            # Renamed first: were the deletion interrupted, what is left must not look like a checkpoint.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}")))


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- random numbers ----


def seed_random(seed: int) -> None:
    """Begins the random numbers of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The states of the generators of Python, numpy and torch, as tensors and numbers."""
    numpy_state = np.random.get_state()
    assert isinstance(numpy_state, tuple)  # a dict only where a program sets another generator than numpy's own
    name, keys, *rest = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Continues with the numbers that followed `random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([x.cpu() for x in state["cuda"]])
