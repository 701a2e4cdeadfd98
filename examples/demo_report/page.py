"""One HTML page of a run, which needs nothing else: its numbers, its curve, and translations with their attention."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .pictures import WINDOW, Attention, running_mean

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Sample:
    """A translation to show, beside what was expected."""

    attention: Attention
    reference: str


def write_page(
    path: Path, numbers: Sequence[tuple[str, str]], signature: str, nll: Sequence[float], samples: Sequence[Sample]
) -> None:
    """Writes the page.

    Args:
        path: file to write.
        numbers: values and what they are called.
        signature: how they were made.
        nll: of every step, in nats per piece.
        samples: the sentences to show.
    """
    data = {
        **{"numbers": numbers, "signature": signature, "window": WINDOW, "nll": list(nll)},
        **{"mean": running_mean(nll), "samples": [_shown(sample) for sample in samples]},
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", r"\u003c")  # no text ends the script
    path.write_text(TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1), encoding="utf-8")


def _shown(sample: Sample) -> dict[str, object]:
    attention = sample.attention
    weights = [[[round(w, 3) for w in row] for row in head] for head in attention.weights.tolist()]
    texts = {"source": attention.source, "target": attention.target, "translation": attention.target_text}
    return {**texts, "reference": sample.reference, "weights": weights}
