"""Self-made parallel text and calls of `prepare` for the tests of examples/wmt14."""

from __future__ import annotations

import random
from pathlib import Path

from examples.wmt14.prepare import main

WORDS = {
    "source": ["the", "a", "big", "small", "old", "house", "dog", "street", "man", "woman", "sees", "finds"],
    "target": [
        "das",
        "ein",
        "große",
        "kleine",
        "alte",
        "Haus",
        "Hund",
        "Straße",
        "Mann",
        "Frau",
        "sieht",
        "findet",
        "über",
    ],
}


def sentences(count: int, seed: int) -> dict[str, list[str]]:
    """`count` sentences a side, the target word for word as the source."""
    draw = random.Random(seed)
    drawn = [[draw.randrange(len(WORDS["source"])) for _ in range(draw.randint(2, 9))] for _ in range(count)]
    return {side: [" ".join(words[i] for i in sentence) + "." for sentence in drawn] for side, words in WORDS.items()}


def write_lines(path: Path, lines: list[str] | list[bytes]) -> Path:
    """Every line with a line feed after it."""
    encoded = [line.encode() if isinstance(line, str) else line for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


def write_text(folder: Path, train_pairs: int = 300) -> dict[str, Path]:
    """Files of three splits; by option of `prepare`."""
    files = {}
    for seed, (split, count) in enumerate({"train": train_pairs, "valid": 20, "test": 10}.items()):
        for side, lines in sentences(count, seed).items():
            files[f"--{split}-{side}"] = write_lines(folder / f"{split}.{side}", lines)
    return files


def prepare(out: Path, files: dict[str, Path], *options: str, preparation: str = "smoke", workers: int = 1) -> None:
    """The command in this process; ends with SystemExit where the command would fail."""
    fixed = ["--preparation", preparation, "--out", str(out), "--workers", str(workers), "--vocab-size", "150"]
    main([*fixed, *options, *(str(part) for option in files.items() for part in option)])
