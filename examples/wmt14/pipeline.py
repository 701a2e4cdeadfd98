"""The passes over the text, cleaning and encoding: parallel over chunks, in order, in constant memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from tqdm import tqdm

from fastattn.nmt.data import TokenWriter

from .cleaning import Cleaner, CorpusReport, Duplicates, clean, keep_all
from .corpora import Corpus, Text, read_pairs
from .subwords import TextForm

CHUNK_SIZE = 4000  # pairs that a worker is given at a time; the results do not depend on it
SIDES = ("source", "target")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A context manager: processes that apply functions to the items of iterators too long for the memory.

    Args:
        count: number of processes; with 1, this process does the work.
    """

    def __init__(self, count: int) -> None:
        self._most_pending = 3 * count
        self._pool = ProcessPoolExecutor(count) if count > 1 else None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The results in the order of the items, few of which are read ahead."""
        if self._pool is None:
            yield from map(function, items)
            return
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(self._pool.submit(function, item))
            if len(pending) > self._most_pending:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


# ---- cleaning ----


def normalized_files(folder: Path, split: str) -> list[Path]:
    """The files in which the normalised text of both sides of a split lies until it is encoded."""
    return [folder / f"{split}.{side}.normalized" for side in SIDES]


def clean_corpora(
    corpora: list[Corpus],
    paths: dict[Text, Path],
    folder: Path,
    cleaner: Cleaner,
    workers: Workers,
    duplicates: Duplicates | None = None,
) -> list[CorpusReport]:
    """Write the normalised text of the training split.

    Args:
        corpora: one after the other.
        paths: where each text's file lies.
        folder: where to write.
        cleaner: what to drop.
        workers: the processes that clean.
        duplicates: finds the pairs to drop as duplicates; None keeps them.
    """
    reports = []
    files = [file.open("w", encoding="utf-8", newline="\n") for file in normalized_files(folder, "train")]
    with files[0], files[1]:
        for corpus in corpora:
            report = CorpusReport(corpus.name)
            chunks = read_pairs(corpus, paths[corpus.source], paths[corpus.target], CHUNK_SIZE)
            with tqdm(total=corpus.lines, desc=f"cleaning {corpus.name}", unit=" pairs", disable=None) as bar:
                for outcomes in workers.map(partial(clean, cleaner), chunks):
                    for pair in report.add([duplicates(o) for o in outcomes] if duplicates else outcomes):
                        for file, line in zip(files, pair, strict=True):
                            file.write(line + "\n")
                    bar.update(len(outcomes))
            reports.append(report)
    return reports


def copy_corpora(
    split: str, corpora: list[Corpus], paths: dict[Text, Path], folder: Path, forms: tuple[TextForm, TextForm]
) -> list[CorpusReport]:
    """Write raw and normalised text of a split that is kept whole.

    Args:
        split: its name.
        corpora, paths, folder: as in `clean_corpora`.
        forms: how each side is normalised.

    Raises:
        ValueError: text that is not UTF-8.
    """
    reports = []
    raw_files = [(folder / f"{split}.{side}.txt").open("wb") for side in SIDES]
    files = [file.open("w", encoding="utf-8", newline="\n") for file in normalized_files(folder, split)]
    with raw_files[0], raw_files[1], files[0], files[1]:
        for corpus in corpora:
            report = CorpusReport(corpus.name)
            for chunk in read_pairs(corpus, paths[corpus.source], paths[corpus.target], CHUNK_SIZE):
                pairs = keep_all(forms, chunk, report)
                for raw, file, raw_lines, lines in zip(raw_files, files, chunk, zip(*pairs, strict=True), strict=True):
                    raw.writelines(line + b"\n" for line in raw_lines)
                    file.writelines(line + "\n" for line in lines)
            reports.append(report)
    return reports


def _lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            yield line.removesuffix("\n")


def sample_sentences(files: list[Path], pairs: int, sample_pairs: int) -> Iterator[str]:
    """The sentences of at most `sample_pairs` of the `pairs` pairs, evenly spread, of both sides."""
    kept = min(pairs, sample_pairs)
    for file in files:
        for i, line in enumerate(_lines(file)):
            if (i + 1) * kept // pairs > i * kept // pairs:
                yield line


# ---- encoding ----


def encode_split(split: str, folder: Path, model: Path, vocab_size: int, pairs: int, workers: Workers) -> list[int]:
    """Write the token files of a split and remove its normalised text; returns the ids of each side.

    Args:
        split: its name.
        folder: where the text lies and the tokens go.
        model: the file of the sentencepiece model.
        vocab_size: ids of that model.
        pairs: number of pairs of the split.
        workers: the processes that encode.
    """
    totals = []
    for side, file in zip(SIDES, normalized_files(folder, split), strict=True):
        total = 0
        with (
            TokenWriter(folder, split, side, vocab_size) as writer,
            tqdm(total=pairs, desc=f"encoding {split} {side}", unit=" sentences", disable=None) as bar,
        ):
            for ids, lengths in workers.map(partial(_encode, str(model)), _chunks(_lines(file))):
                writer.write(ids, lengths)
                total += ids.size
                bar.update(lengths.size)
        file.unlink()
        totals.append(total)
    return totals


def _chunks(lines: Iterator[str]) -> Iterator[list[str]]:
    while chunk := list(islice(lines, CHUNK_SIZE)):
        yield chunk


@lru_cache(1)
def _processor(model: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=model)


def _encode(model: str, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    sentences = _processor(model).encode(texts, add_eos=True)
    lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
    return np.fromiter(chain.from_iterable(sentences), np.int32, lengths.sum()), lengths
