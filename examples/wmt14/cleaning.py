"""Which training pairs are dropped and why, and how the others are written; the reasons are counted by line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from .corpora import MAX_LINE_BYTES
from .subwords import TextForm

INVALID = "invalid UTF-8"
NUL = "NUL character"
LONG = "too many characters"
EMPTY = "empty"
MARKUP = "markup"
WORDY = "too many words"
RATIO = "length ratio"
DUPLICATE = "duplicate"

LINES_KEPT = 20  # line numbers reported for each reason

_TAG = re.compile(r"</?[A-Za-z][^<>]*>")


@dataclass(frozen=True)
class Cleaner:
    """A function that normalises pairs, and drops those of a training corpus that teach nothing or cost too much.

    Args:
        source, target: how each side is written.
        max_words: of a normalised side, as spaces divide it.
        max_ratio: of the longer side's words to the shorter one's.
        max_characters: of a raw side; longer ones are not sentences.
    """

    source: TextForm
    target: TextForm
    max_words: int = 250
    max_ratio: float | None = None
    max_characters: int = 5000

    def __call__(self, source: bytes, target: bytes) -> tuple[str, str] | str:
        """The normalised pair, or the reason why there is none."""
        if max(len(source), len(target)) >= MAX_LINE_BYTES:
            return LONG
        try:
            pair = source.decode(), target.decode()
        except UnicodeDecodeError:
            return INVALID
        if any("\0" in side for side in pair):
            return NUL
        if any(len(side) > self.max_characters for side in pair):
            return LONG
        if any(_TAG.fullmatch(side.strip()) for side in pair):
            return MARKUP
        pair = self.source.normalize(pair[0]), self.target.normalize(pair[1])
        words = sorted(len(side.split()) for side in pair)
        if words[0] == 0:
            return EMPTY
        if words[1] > self.max_words:
            return WORDY
        if self.max_ratio is not None and words[1] > self.max_ratio * words[0]:
            return RATIO
        return pair


def clean(cleaner: Cleaner, chunk: tuple[list[bytes], list[bytes]]) -> list[tuple[str, str] | str]:
    """The cleaner's outcome for every pair of a chunk."""
    return [cleaner(source, target) for source, target in zip(*chunk, strict=True)]


@dataclass
class Dropped:
    """Number of pairs dropped for one reason, and the first of their line numbers, counted from 1."""

    pairs: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, line: int) -> None:
        self.pairs += 1
        if len(self.lines) < LINES_KEPT:
            self.lines.append(line)


@dataclass
class CorpusReport:
    """Counts of the pairs of one corpus that were kept and dropped."""

    name: str
    pairs: int = 0
    kept: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)

    def add(self, outcomes: Sequence[tuple[str, str] | str]) -> list[tuple[str, str]]:
        """Count the next pairs; returns those that are kept."""
        kept = []
        for line, outcome in enumerate(outcomes, self.pairs + 1):
            if isinstance(outcome, str):
                self.dropped.setdefault(outcome, Dropped()).add(line)
            else:
                kept.append(outcome)
        self.pairs += len(outcomes)
        self.kept += len(kept)
        return kept


def keep_all(
    forms: tuple[TextForm, TextForm], chunk: tuple[list[bytes], list[bytes]], report: CorpusReport
) -> list[tuple[str, str]]:
    """Every pair of a chunk normalised, whatever it is like: a validation or test set is scored as a whole.

    Raises:
        ValueError: text that is not UTF-8.
    """
    pairs = []
    for line, pair in enumerate(zip(*chunk, strict=True), report.pairs + 1):
        try:
            source, target = (form.normalize(side.decode()) for form, side in zip(forms, pair, strict=True))
        except UnicodeDecodeError as error:
            raise ValueError(f"{report.name}: line {line} must be UTF-8 text ({error})") from None
        pairs.append((source, target))
    return report.add(pairs)


class Duplicates:
    """A function that finds pairs it has seen before, by 64-bit hashes; it takes about 100 bytes of memory per pair."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, outcome: tuple[str, str] | str) -> tuple[str, str] | str:
        """The outcome itself, or the reason to drop it."""
        if isinstance(outcome, str):
            return outcome
        digest = blake2b("\n".join(outcome).encode(), digest_size=8).digest()
        if digest in self._seen:
            return DUPLICATE
        self._seen.add(digest)
        return outcome
