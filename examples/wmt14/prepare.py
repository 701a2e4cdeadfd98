"""Makes the data folder of one experiment: downloads, cleans, learns the subwords, encodes.

    python -m examples.wmt14.prepare --preparation wmt14_en_de --out data/wmt14_en_de
    python -m examples.wmt14.prepare --preparation small_en_de --out data/mine --train-source a.en.gz \\
        --train-target a.de.gz --valid-source v.en --valid-target v.de --test-source t.en --test-target t.de

The folder appears when it is complete. A run that was stopped leaves FOLDER.partial, which the next run starts anew,
and downloads, which it continues. The result is the same, byte for byte, whatever --workers is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastattn.nmt.batches import TokenBatches
from fastattn.nmt.data import ParallelTokens

from .cleaning import Cleaner, CorpusReport, Duplicates
from .corpora import PREPARATIONS, Corpus, Download, Preparation, Text
from .download import checksum, fetch
from .options import positive_int
from .pipeline import SIDES, Workers, clean_corpora, copy_corpora, encode_split, normalized_files, sample_sentences
from .subwords import EOS_ID, MODEL_FILE, PAD_ID, PREPARATION_FILE, UNK_ID, TextForm, train_subwords

REPORT_FILE = "report.json"
LOCAL_SPLITS = ("train", "valid", "test")
TOKENS_PER_UPDATE, GPUS = 25_000, 8  # the paper's; the share of padding is reported for them


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.wmt14.prepare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preparation", required=True, choices=PREPARATIONS, help="what to prepare, and how")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the data folder to make")
    parser.add_argument(
        "--downloads", type=Path, default=Path("downloads"), metavar="FOLDER",
        help="where downloaded files are or go (default downloads)",
    )  # fmt: skip
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=os.cpu_count(),
        metavar="N",
        help="processes (default one per processor)",
    )
    files = parser.add_argument_group("your own files instead of downloads: text or .gz, a sentence per line")
    for split in LOCAL_SPLITS:
        for side in SIDES:
            files.add_argument(f"--{split}-{side}", type=Path, metavar="FILE")
    text = parser.add_argument_group("changes to what the preparation says")
    text.add_argument("--source-language", metavar="CODE", help="such as en")
    text.add_argument("--target-language", metavar="CODE", help="such as de")
    text.add_argument("--vocab-size", type=positive_int, metavar="N", help="ids of the shared vocabulary")
    text.add_argument("--character-coverage", type=float, metavar="SHARE", help="of characters with ids of their own")
    text.add_argument("--lowercase", action=argparse.BooleanOptionalAction, help="write all text in lower case")
    text.add_argument("--moses", action=argparse.BooleanOptionalAction, help="Moses punctuation and tokens")
    text.add_argument("--max-words", type=positive_int, metavar="N", help="drop training pairs with a longer side")
    text.add_argument("--max-ratio", type=float, metavar="X", help="drop training pairs with sides more unequal")
    text.add_argument("--drop-duplicates", action="store_true", help="drop training pairs that were there before")
    text.add_argument(
        "--train-is-tokenised", action="store_true", help="training files are Moses-tokenised and escaped: undo that"
    )
    text.add_argument(
        "--sample-pairs", type=positive_int, default=1_000_000, metavar="N",
        help="pairs that the subwords are learned from (default 1000000)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    start = time.perf_counter()
    try:
        prepare(args)
    except (ValueError, OSError) as error:
        sys.exit(f"prepare: {error}")
    except KeyboardInterrupt:
        sys.exit("\nprepare: interrupted; the same command starts again and continues its downloads")
    print(f"{args.out} is ready after {time.perf_counter() - start:.1f} s")


def prepare(args: argparse.Namespace) -> None:
    """Make the data folder that the options ask for, unless it was made before."""
    preparation = chosen_preparation(args)
    paths = files_of(preparation, args.downloads)
    description = describe(args, preparation, paths)
    if args.out.exists():
        return check_is_same(args.out, description)
    with appearing_when_complete(args.out) as folder, Workers(args.workers) as workers:
        languages = preparation.source_language, preparation.target_language
        source, target = (TextForm(language, preparation.lowercase, preparation.moses) for language in languages)
        train_source, train_target = (replace(form, is_tokenised=args.train_is_tokenised) for form in (source, target))
        cleaner = Cleaner(train_source, train_target, preparation.max_words, preparation.max_ratio)
        reports = {}
        for split, corpora in preparation.corpora.items():
            if split == "train":
                duplicates = Duplicates() if args.drop_duplicates else None
                reports[split] = clean_corpora(corpora, paths, folder, cleaner, workers, duplicates)
            else:
                reports[split] = copy_corpora(split, corpora, paths, folder, (source, target))
            print_table(split, reports[split])
        learn_subwords(folder, preparation, kept(reports["train"]), args.sample_pairs)
        tokens = {
            split: encode_split(split, folder, folder / MODEL_FILE, preparation.vocab_size, kept(report), workers)
            for split, report in reports.items()
        }
        write_json(folder / REPORT_FILE, summarize(folder, reports, tokens))
        write_json(folder / PREPARATION_FILE, description)


# ---- what to do ----


def chosen_preparation(args: argparse.Namespace) -> Preparation:
    """The preparation with the changes of the options.

    Raises:
        ValueError: files of one side only, or a split without files.
    """
    preparation = PREPARATIONS[args.preparation]
    settings = vars(preparation).keys() - {"corpora"}
    changes = {name: value for name in settings if (value := getattr(args, name)) is not None}
    corpora = dict(preparation.corpora)
    for split in LOCAL_SPLITS:
        source, target = (getattr(args, f"{split}_{side}") for side in SIDES)
        if (source is None) != (target is None):
            raise ValueError(f"--{split}-source, --{split}-target: must both be given, or neither")
        if source is not None:
            corpora[split] = [Corpus(source.name, Text(source), Text(target))]
        elif split not in corpora:
            raise ValueError(f"--{split}-source, --{split}-target: must be given, {args.preparation} downloads nothing")
    return replace(preparation, corpora=corpora, **changes)


def files_of(preparation: Preparation, downloads: Path) -> dict[Text, Path]:
    """The file in which each text lies; what is missing is downloaded."""
    corpora = [corpus for split in preparation.corpora.values() for corpus in split]
    texts = [text for corpus in corpora for text in (corpus.source, corpus.target)]
    for corpus in corpora:
        if corpus.source == corpus.target:
            raise ValueError(f"{corpus.name}: source and target must be two texts, got {corpus.source.name} twice")
    files = {}
    for file in dict.fromkeys(text.file for text in texts):
        files[file] = fetch(file, downloads) if isinstance(file, Download) else file
        if not files[file].is_file():
            raise FileNotFoundError(f"{file}: there is no such file")
    return {text: files[text.file] for text in texts}


def describe(args: argparse.Namespace, preparation: Preparation, paths: dict[Text, Path]) -> dict[str, Any]:
    """All that decides the content of the data folder."""
    settings = {name: value for name, value in vars(preparation).items() if name != "corpora"}
    options = {name: getattr(args, name) for name in ("drop_duplicates", "train_is_tokenised", "sample_pairs")}
    ids = {"pad_id": PAD_ID, "eos_id": EOS_ID, "unk_id": UNK_ID}
    sums = {path: checksum(path) for path in sorted(set(paths.values()))}
    inputs = {
        split: [{text.name: sums[paths[text]] for text in (corpus.source, corpus.target)} for corpus in corpora]
        for split, corpora in preparation.corpora.items()
    }
    return {"preparation": args.preparation, **settings, **options, **ids, "inputs_sha256": inputs}


# ---- the folder ----


@contextmanager
def appearing_when_complete(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes the name `folder` at the end, unless there was an exception."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(folder)


def check_is_same(folder: Path, description: dict[str, Any]) -> None:
    """Raises ValueError unless the folder was made from the same input in the same way."""
    try:
        found = json.loads((folder / PREPARATION_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--out: must not exist, or have been made by this command, got {folder}") from None
    if different := [name for name, value in description.items() if found.get(name) != value]:
        raise ValueError(
            f"--out: {folder} was made with other {', '.join(different)}; remove it or name another folder"
        )
    print(f"{folder} was made before, from the same text in the same way.")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def learn_subwords(folder: Path, preparation: Preparation, pairs: int, sample_pairs: int) -> None:
    """Train the subword model on the normalised text, and write it into the folder."""
    if not pairs:
        raise ValueError("train: no pair is left after cleaning; see the table above for the reasons")
    sample = min(pairs, sample_pairs)
    print(f"learning {preparation.vocab_size:,} subwords from {sample:,} of {pairs:,} pairs ...", flush=True)
    sentences = sample_sentences(normalized_files(folder, "train"), pairs, sample)
    model = train_subwords(sentences, preparation.vocab_size, preparation.character_coverage)
    (folder / MODEL_FILE).write_bytes(model)


# ---- the report ----


def kept(reports: list[CorpusReport]) -> int:
    """Pairs of all corpora of a split that were not dropped."""
    return sum(report.kept for report in reports)


def print_table(split: str, reports: list[CorpusReport]) -> None:
    """Print a line per corpus, and one per reason for which pairs of it were dropped."""
    for report in reports:
        print(f"{split:14} {report.name:28} {report.pairs:>12,} pairs {report.kept:>12,} kept")
        for reason, dropped in sorted(report.dropped.items()):
            lines = ", ".join(map(str, dropped.lines[:5])) + (" ..." if dropped.pairs > 5 else "")
            print(f"{'':14} {reason:28} {dropped.pairs:>12,} dropped; lines {lines}")


def summarize(folder: Path, reports: dict[str, list[CorpusReport]], ids: dict[str, list[int]]) -> dict[str, Any]:
    """The content of `report.json`; prints the part about tokens."""
    splits: dict[str, dict[str, Any]] = {
        split: {
            "pairs": kept(corpora),
            **{f"{side}_ids": total for side, total in zip(SIDES, ids[split], strict=True)},
            "corpora": [asdict(corpus) for corpus in corpora],
        }
        for split, corpora in reports.items()
    }
    for split, counts in splits.items():
        means = [counts[f"{side}_ids"] / max(1, counts["pairs"]) for side in SIDES]
        print(f"{split:14} {counts['pairs']:>12,} pairs, {means[0]:.1f} source and {means[1]:.1f} target ids each")
    train = ParallelTokens(folder, "train")
    batches = TokenBatches(train.source_lengths, train.target_lengths, TOKENS_PER_UPDATE)
    alone, shared = batches.padding_share(), batches.padding_share(parts=GPUS)
    updates = len(batches.updates(0))
    print(
        f"updates of at most {TOKENS_PER_UPDATE:,} ids a side: {updates:,} in an epoch; places without a token:\n"
        f"  1 GPU   padded {alone.padded:.1%}, packed {alone.packed:.1%}\n"
        f"  {GPUS} GPUs  padded {shared.padded:.1%}, packed {shared.packed:.1%} (idle until the largest part is done)"
    )
    padding = {"1": alone._asdict(), str(GPUS): shared._asdict()}
    return {"splits": splits, "tokens_per_update": TOKENS_PER_UPDATE, "updates": updates, "padding_share": padding}


if __name__ == "__main__":
    main()
