"""Translates raw text, line by line, with a trained model.

    python -m examples.wmt14.translate runs/base_en_de/averaged.pt --split test --output out.de
    echo "A dog runs." | python -m examples.wmt14.translate runs/base_en_de --n-best 4
    echo "A dog runs." | python -m examples.wmt14.translate runs/base_en_de --attention attention.png

One line of output for every line of input, in the same order; an empty line for an empty one. A line of more pieces
than --max-length is cut there, with a warning. The search is the paper's (beam 4, length penalty 0.6, at most 50 ids
more than the source) unless the model's run has another recipe.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: idle threads sleep

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from fastattn import Transformer
from fastattn.nmt.generation import Hypothesis, translate

from .heatmap import draw_attention
from .models import data_folder, errors_as_messages, load_model, run_description
from .subwords import Subwords


@dataclass
class Translator:
    """A model, its vocabulary and how it searches; counts what it does.

    Args:
        model: in evaluation mode.
        subwords: of the data it was trained on.
        options: further arguments of `fastattn.nmt.generation.translate`.
        max_length: most ids of a source sentence, its end included; longer ones are cut.
    """

    model: Transformer
    subwords: Subwords
    options: dict[str, Any]
    max_length: int
    sentences: int = 0
    tokens: int = 0  # of the best translations, ends of sentence included
    seconds: float = 0.0

    def translate(
        self, lines: Sequence[str], first: int = 1, progress: Callable[[int], object] | None = None
    ) -> list[list[Hypothesis]]:
        """Translations of every line, best first; the empty one for an empty line.

        Args:
            lines: as a person writes them.
            first: number of the first line, for warnings.
            progress: called with numbers of lines that are done.
        """
        start = time.perf_counter()
        sources = self.encode(lines, first)
        full = [index for index, ids in enumerate(sources) if len(ids) > 1]  # more than an end of sentence
        found = translate(self.model, [sources[index] for index in full], progress=progress, **self.options)
        results = [[Hypothesis([], 0.0)] for _ in lines]
        for index, hypotheses in zip(full, found, strict=True):
            results[index] = hypotheses
        self.sentences += len(full)
        self.tokens += sum(len(best.tokens) + 1 for best, *_ in found)
        self.seconds += time.perf_counter() - start
        return results

    def encode(self, lines: Sequence[str], first: int = 1) -> list[list[int]]:
        """The ids of every line, at most `max_length`, each ended."""
        return [self._cut(ids, number) for number, ids in enumerate(self.subwords.encode(lines), first)]

    def texts(self, hypotheses: Sequence[Hypothesis]) -> list[str]:
        """The texts of translations, each on one line."""
        return [" ".join(text.split("\n")) for text in self.subwords.decode([each.tokens for each in hypotheses])]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces of ids, as the vocabulary writes them."""
        return [self.subwords.processor.id_to_piece(id) for id in ids]

    def _cut(self, ids: list[int], number: int) -> list[int]:
        if len(ids) <= self.max_length:
            return ids
        tqdm.write(f"line {number}: {len(ids)} ids, cut to {self.max_length}", file=sys.stderr)
        return [*ids[: self.max_length - 1], ids[-1]]

    def report(self) -> str:
        """A line that says how much was translated, and how fast."""
        seconds = max(self.seconds, 1e-9)
        return (
            f"sentences: {self.sentences}, tokens: {self.tokens}, seconds: {self.seconds:.1f}; "
            f"{self.sentences / seconds:.1f} sentences/s, {self.tokens / seconds:.0f} tokens/s"
        )


# ---- lines ----


def translated_lines(
    translator: Translator, lines: Iterable[str], buffer: int, with_scores: bool, n_best: int, bar: tqdm
) -> Iterator[str]:
    """The lines of output, in order; those of a buffer of input lines come when it is done."""
    lines, first = iter(lines), 1
    while chunk := list(islice(lines, buffer)):
        results = translator.translate(chunk, first, bar.update)
        bar.update(first + len(chunk) - 1 - bar.n)  # and the empty lines, which are not searched
        for number, hypotheses in enumerate(results, first):
            for hypothesis, text in zip(hypotheses, translator.texts(hypotheses), strict=True):
                score = f"{hypothesis.score:.4f}\t" if with_scores or n_best > 1 else ""
                yield (f"{number}\t" if n_best > 1 else "") + score + text
        first += len(chunk)


@contextmanager
def opened_input(path: Path | None) -> Iterator[Iterator[str]]:
    """The lines of a file or of standard input, which only a line feed ends; bytes that are not UTF-8 are marked."""
    file = sys.stdin.fileno() if path is None else path
    with open(file, encoding="utf-8", errors="replace", newline="\n", closefd=path is not None) as lines:
        yield (line.rstrip("\r\n") for line in lines)


@contextmanager
def opened_output(path: Path | None) -> Iterator[TextIO]:
    """A file that is complete or not there at all, or standard output."""
    if path is None:
        with open(sys.stdout.fileno(), "w", encoding="utf-8", newline="\n", closefd=False) as output:
            yield output
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as output:
            yield output
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# ---- the command ----


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.wmt14.translate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("model", type=Path, help="a run (its newest checkpoint), a checkpoint, an average, or an exported folder")
    add("--data", type=Path, metavar="FOLDER", help="written by prepare: the vocabulary (default: that of the run)")
    add("--split", choices=["valid", "test", "test_filtered"], help="translate this part of the data")
    add("--input", type=Path, metavar="FILE", help="translate these lines (default: standard input)")
    add("--output", type=Path, metavar="FILE", help="written whole (default: standard output)")
    add("--beam", type=int, metavar="N", help="hypotheses alive at each step (default: the recipe's, 4)")
    add("--alpha", type=float, metavar="X", help="exponent of the length penalty (default: the recipe's, 0.6)")
    add("--length-penalty", choices=["paper", "length"], help="((5 + n) / 6)^X or n^X (default: the recipe's)")
    add("--max-extra", type=int, default=50, metavar="N", help="most ids more than the source has (default 50)")
    add("--max-length", type=int, metavar="N", help="most ids of a line (default: the model's max_len)")
    add("--n-best", type=int, default=1, metavar="N", help="lines of number, tab, score, tab, translation")
    add("--scores", action="store_true", help="write the score and a tab before each translation")
    add("--attention", type=Path, metavar="FILE", help="draw what the last layer looked at, .png or .html; one line")
    add("--batch-size", type=int, default=64, metavar="N", help="sentences searched at a time (default 64)")
    add("--buffer", type=int, metavar="N", help="lines sorted by length together (default 4096; 1 on a terminal)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"cpu, cuda, cuda:1 ... (default {device})")
    args = parser.parse_args(arguments)
    if args.split and args.input:
        parser.error("--split: not together with --input")
    for name in ("max_extra", "max_length", "n_best", "batch_size", "buffer"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1, got {value}")
    return args


def make_translator(args: argparse.Namespace) -> tuple[Translator, Path]:
    """The translator that the command asks for, and the data folder of its vocabulary."""
    folder = data_folder(args.model, args.data)
    recipe = {"beam_size": 4, "alpha": 0.6, "length_penalty": "paper"} | run_description(args.model).get("config", {})
    given = {"beam_size": args.beam, "alpha": args.alpha, "length_penalty": args.length_penalty}
    search = {name: recipe[name] if value is None else value for name, value in given.items()}
    options = {
        "beam_size": search["beam_size"],
        "alpha": search["alpha"],
        "penalty": search["length_penalty"],
        "max_extra_tokens": args.max_extra,
        "num_hypotheses": args.n_best,
        "batch_size": args.batch_size,
        "with_attention": args.attention is not None,
    }
    model, subwords = load_model(args.model, args.device), Subwords.load(folder)
    if model.config.vocab_size != subwords.vocab_size:
        raise ValueError(f"--data: the model has {model.config.vocab_size} ids, {folder} has {subwords.vocab_size}")
    return Translator(model, subwords, options, args.max_length or model.config.max_len), folder


def draw(translator: Translator, lines: Sequence[str], path: Path) -> str:
    """Draws the attention of the only line that is not empty; returns its translation."""
    lines = [line for line in lines if line.strip()]
    if len(lines) != 1:
        raise ValueError(f"--attention: draws one sentence, got {len(lines)}")
    best = translator.translate(lines)[0][0]
    assert best.attention is not None  # `make_translator` asks for it with --attention
    (text,) = translator.texts([best])
    (source,) = translator.encode(lines)
    title = f"{lines[0]}\n→ {text}"
    draw_attention(path, best.attention[-1], translator.pieces(source), translator.pieces(best.tokens), title)
    return text


def run(args: argparse.Namespace) -> None:
    translator, folder = make_translator(args)
    path = folder / f"{args.split}.source.txt" if args.split else args.input
    is_terminal = path is None and sys.stdin.isatty()
    buffer = args.buffer or (1 if is_terminal else 4096)
    total = None if path is None else sum(1 for _ in path.open("rb"))
    with (
        opened_input(path) as lines,
        opened_output(args.output) as output,
        tqdm(total=total, unit=" lines", disable=True if is_terminal else None) as bar,
    ):
        if args.attention:
            print(draw(translator, list(lines), args.attention), file=output)
        else:
            for line in translated_lines(translator, lines, buffer, args.scores, args.n_best, bar):
                print(line, file=output, flush=buffer == 1)
    print(translator.report(), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    with errors_as_messages():
        run(args)


if __name__ == "__main__":
    main()
