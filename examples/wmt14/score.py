"""Scores translations: sacreBLEU with its signature, chrF, and the BLEU of the paper, side by side.

    python -m examples.wmt14.score --data data/wmt14_en_de --split test out.de
    python -m examples.wmt14.score --references newstest2014.de --language de --metrics 13a,paper --json < out.de

The metrics, all of the corpus and all on text as a person writes it:

    13a     sacreBLEU's default: the tokens of mteval-v13a. The one to compare by.
    intl    sacreBLEU with the tokens of mteval-v14, which part all punctuation and symbols.
    chrf    chrF2, of characters, without tokens.
    moses   BLEU of multi-bleu.perl on tokens of Moses, punctuation normalised: what older papers print.
    paper   BLEU of multi-bleu.perl as the paper's authors computed it, into German only: quotes made plain, tokens of
            Moses, words with hyphens split. On newstest2014 it is about 1.5 above 13a.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import sacremoses
from sacrebleu.metrics.bleu import BLEU, BLEUScore
from sacrebleu.metrics.chrf import CHRF

from .models import errors_as_messages

METRICS = ("13a", "intl", "chrf", "moses", "paper")

# Test sets known by their number of lines.
KNOWN_SETS = {
    3003: "newstest2014, the full set",
    2737: "newstest2014, the filtered set",
    3000: "newstest2013",
}

_PLAIN_QUOTES = str.maketrans(dict.fromkeys("“”„‟«»″", '"') | dict.fromkeys("‘’‚‛‹›′", "'"))


@dataclass(frozen=True)
class Score:
    """The value of one metric on a whole test set."""

    metric: str
    value: float  # 0 ... 100
    details: str  # n-gram precisions, brevity penalty, tokens of hypotheses and references, where the metric has them
    signature: str


# ---- the paper's tokens ----


def plain_quotes(text: str) -> str:
    """Every typographic quote made \" or ', the low ones that begin German quotations included."""
    return text.translate(_PLAIN_QUOTES)


def normalized_punctuation(text: str, language: str) -> str:
    """The punctuation as Moses' normalize-punctuation.perl leaves it."""
    return _moses(language)[0].normalize(text)


def moses_tokens(text: str, language: str) -> str:
    """The sentence as Moses' tokenizer.perl writes it: tokens between single spaces, special characters escaped."""
    return _moses(language)[1].tokenize(text, return_str=True)


@lru_cache(maxsize=4)
def _moses(language: str) -> tuple[sacremoses.MosesPunctNormalizer, sacremoses.MosesTokenizer]:
    return sacremoses.MosesPunctNormalizer(language), sacremoses.MosesTokenizer(language)


def split_compounds(tokens: str) -> str:
    """A hyphen between two characters as a token of its own, `##AT##-##AT##`.

    Matches do not overlap, as in the original script: in `a-b-c` only the first hyphen is split, in `ab-cd-ef` both.
    """
    return re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", tokens, flags=re.ASCII)


def paper_tokens(text: str) -> str:
    """A German sentence as the paper's authors scored it."""
    return split_compounds(moses_tokens(plain_quotes(text), "de"))


# ---- metrics ----


def score(
    hypotheses: Sequence[str],
    references: Sequence[str],
    language: str,
    metrics: Sequence[str] | None = None,
    lowercase: bool = False,
) -> list[Score]:
    """The scores of translations, line by line against one reference each.

    Args:
        hypotheses, references: as a person writes them, neither tokenised nor in pieces.
        language: they are in: "de", "fr" ...
        metrics: some of METRICS; None for all that the language has.
        lowercase: ignore case.

    Raises:
        ValueError: not as many references as hypotheses, no line at all, an unknown metric, or "paper" for a language
            other than German.
    """
    lines = len(references)
    if len(hypotheses) != lines:
        raise ValueError(f"hypotheses: must be as many lines as the {lines} references, got {len(hypotheses)}")
    if not references:
        raise ValueError("references: must hold at least one line, got none")
    if metrics is None:
        metrics = [metric for metric in METRICS if metric != "paper" or language == "de"]
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metrics: must be among {', '.join(METRICS)}, got {metric!r}")
        if metric == "paper" and language != "de":
            raise ValueError(f"metrics: 'paper' splits German compounds; the language must be 'de', got {language!r}")
    compute: dict[str, Callable[[], Score]] = {
        "13a": lambda: sacre_bleu(hypotheses, references, "13a", lowercase),
        "intl": lambda: sacre_bleu(hypotheses, references, "intl", lowercase),
        "chrf": lambda: chrf(hypotheses, references, lowercase),
        "moses": lambda: multi_bleu(
            "moses", lambda text: moses_tokens(normalized_punctuation(text, language), language),
            hypotheses, references, lowercase,
        ),
        "paper": lambda: multi_bleu("paper", paper_tokens, hypotheses, references, lowercase),
    }  # fmt: skip
    return [compute[metric]() for metric in metrics]


def sacre_bleu(hypotheses: Sequence[str], references: Sequence[str], tokenize: str, lowercase: bool) -> Score:
    """The score of sacreBLEU, with one of its tokenisers."""
    bleu = BLEU(tokenize=tokenize, lowercase=lowercase)
    result = bleu.corpus_score(hypotheses, [references])
    return Score(tokenize, result.score, _details(result), str(bleu.get_signature()))


def chrf(hypotheses: Sequence[str], references: Sequence[str], lowercase: bool) -> Score:
    """The score chrF2, of character n-grams."""
    metric = CHRF(lowercase=lowercase)
    result = metric.corpus_score(hypotheses, [references])
    return Score("chrf", result.score, "", str(metric.get_signature()))


def multi_bleu(
    metric: str, tokenize: Callable[[str], str], hypotheses: Sequence[str], references: Sequence[str], lowercase: bool
) -> Score:
    """Unsmoothed BLEU as multi-bleu.perl computes it, on the tokens into which `tokenize` divides every line."""
    sides = [[tokenize(line.lower() if lowercase else line) for line in side] for side in (hypotheses, references)]
    bleu = BLEU(tokenize="none", smooth_method="none", force=True)
    result = bleu.corpus_score(sides[0], [sides[1]])
    signature = str(bleu.get_signature()).replace("tok:none", f"tok:{metric}|sacremoses:{sacremoses.__version__}")
    if lowercase:
        signature = signature.replace("case:mixed", "case:lc")
    return Score(metric, result.score, _details(result), signature)


def _details(result: BLEUScore) -> str:
    precisions = "/".join(f"{precision:.1f}" for precision in result.precisions)
    return f"{precisions} BP {result.bp:.3f} lengths {result.sys_len} {result.ref_len}"


# ---- the command ----


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.wmt14.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hypotheses", nargs="?", type=Path, help="translations, one a line (default: standard input)")
    reference = parser.add_mutually_exclusive_group(required=True)
    data_help = "from prepare: its references, language and case"
    reference.add_argument("--data", type=Path, metavar="FOLDER", help=data_help)
    reference.add_argument("--references", type=Path, metavar="FILE", help="untouched reference lines")
    splits = ["valid", "test", "test_filtered"]
    parser.add_argument("--split", default="test", choices=splits, help="of --data (default test)")
    parser.add_argument("--language", metavar="CODE", help="of the translations: de, fr ... (with --references)")
    parser.add_argument(
        "--metrics", metavar="A,B", help=f"of {', '.join(METRICS)} (default: all, paper into German only)"
    )
    parser.add_argument("--lowercase", action="store_true", help="ignore case (default: as --data does)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    args = parser.parse_args(arguments)
    if args.references and not args.language:
        parser.error("--language: must be given with --references")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    with errors_as_messages():
        references, language, lowercase = args.references, args.language, args.lowercase
        if args.data:
            references = args.data / f"{args.split}.target.txt"
            preparation = json.loads((args.data / "preparation.json").read_text(encoding="utf-8"))
            language, lowercase = preparation["target_language"], lowercase or preparation["lowercase"]
        reference_lines = read_lines(references)
        metrics = args.metrics.split(",") if args.metrics else None
        hypotheses = read_lines(args.hypotheses or sys.stdin.fileno())
        scores = score(hypotheses, reference_lines, language, metrics, lowercase)
        test_set = KNOWN_SETS.get(len(reference_lines))
        print(as_json(scores, len(reference_lines), test_set) if args.json else as_table(scores))
        known = f": as many as {test_set}, has" if test_set else ""
        print(f"{len(reference_lines)} lines{known}", file=sys.stderr)


def read_lines(file: Path | int) -> list[str]:
    """The lines of a UTF-8 file, which only a line feed ends."""
    with open(file, encoding="utf-8", newline="\n", closefd=not isinstance(file, int)) as lines:
        return [line.rstrip("\r\n") for line in lines]


def as_json(scores: Sequence[Score], lines: int, test_set: str | None) -> str:
    """The scores, the number of lines and the test set as JSON."""
    rows = {row.metric: {key: value for key, value in asdict(row).items() if key != "metric"} for row in scores}
    return json.dumps({"lines": lines, "test_set": test_set, "scores": rows}, indent=2)


def as_table(scores: Sequence[Score]) -> str:
    """A table with a line per metric."""
    width = max(len(row.details) for row in scores)
    rows = [f"{row.metric:<6} {row.value:6.2f}  {row.details:<{width}}  {row.signature}" for row in scores]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
