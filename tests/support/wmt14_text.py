"""Self-made parallel text and calls of `prepare` for the tests of examples/wmt14."""

from __future__ import annotations

import json
import random
from pathlib import Path

from examples.wmt14.corpora import MAX_LINE_BYTES
from examples.wmt14.prepare import main
from fastattn.nmt.data import ParallelTokens

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
    """Write every line with a line feed after it; returns the path."""
    encoded = [line.encode() if isinstance(line, str) else line for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


def write_text(folder: Path, train_pairs: int = 300) -> dict[str, Path]:
    """Write files of three splits; returns them by the options of `prepare`."""
    files = {}
    for seed, (split, count) in enumerate({"train": train_pairs, "valid": 20, "test": 10}.items()):
        for side, lines in sentences(count, seed).items():
            files[f"--{split}-{side}"] = write_lines(folder / f"{split}.{side}", lines)
    return files


def prepare(out: Path, files: dict[str, Path], *options: str, preparation: str = "smoke", workers: int = 1) -> None:
    """Run the command in this process; ends with SystemExit where the command would fail."""
    fixed = ["--preparation", preparation, "--out", str(out), "--workers", str(workers), "--vocab-size", "150"]
    main([*fixed, *options, *(str(part) for option in files.items() for part in option)])


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def tokens_of(out: Path, split: str = "train") -> ParallelTokens:
    return ParallelTokens(out, split)


# Number of the line -> the reason to drop it, and its sides.
BAD = {
    3: ("invalid UTF-8", b"caf\xe9 au lait", b"ein Haus."),
    5: ("NUL character", b"a house.", b"ein\0 Haus."),
    7: ("empty", b" \t ", b"ein Haus."),
    8: ("empty", b"a house.", "\u200b\u2028".encode()),
    11: ("too many words", b"a " * 251, b"ein " * 200),
    13: ("too many characters", b"x" * 5001, b"y"),
    17: ("too many characters", b"y", "ü".encode() * MAX_LINE_BYTES),
    19: ("markup", b'<SPEAKER ID="3" NAME="Mr X">', b"<SPEAKER ID=3>"),
    23: ("length ratio", b"a a a a a a a a a", b"ein ein"),
}


def spoil(files: dict[str, Path]) -> None:
    """Put the lines of BAD into the training files."""
    for column, side in ((1, "source"), (2, "target")):
        lines = files[f"--train-{side}"].read_bytes().split(b"\n")[:-1]
        for number, bad in BAD.items():
            lines[number - 1] = bad[column]
        write_lines(files[f"--train-{side}"], lines)
