"""A prepared data folder small enough for any test, from the self-made English -> German task."""

from __future__ import annotations

from pathlib import Path

from examples.wmt14 import prepare
from number_translation import draw_pairs


def prepare_small_corpus(folder: Path, training_pairs: int = 400) -> Path:
    """Writes `folder / "data"`: `training_pairs` pairs to train on, 20 to validate on and 20 to test on."""
    options = []
    for split, pairs in {
        "train": draw_pairs(training_pairs, seed=1),
        "valid": draw_pairs(20, seed=2, test=True),
        "test": draw_pairs(20, seed=3, test=True),
    }.items():
        for side, sentences in zip(("source", "target"), zip(*pairs, strict=True), strict=True):
            file = folder / f"{split}.{side}"
            file.write_text("".join(sentence + "\n" for sentence in sentences), encoding="utf-8")
            options += [f"--{split}-{side}", str(file)]
    data = folder / "data"
    prepare.main(["--preparation", "smoke", "--out", str(data), "--workers", "1", *options])
    return data
