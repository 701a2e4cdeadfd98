"""The words of the generated pages: the verdicts on targets, and the templates' text in the committed pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.p100 import page

TEMPLATES = Path(page.__file__).parent


def test_verdicts() -> None:
    assert page.verdict(5.0, None) == "no target"
    assert page.verdict(6.2, 6.2) == "reached"
    assert page.verdict(4.5, 6.0) == "missed by 25 %"


def test_verdicts_of_bands() -> None:
    """A target is reached where the least that is expected reaches it, and missed where the most does not."""
    band = page.Band(5.0, 6.0, 7.0)
    assert page.banded_verdict(band, None) == "no target"
    assert page.banded_verdict(band, 5.0) == "reached"
    assert page.banded_verdict(band, 5.1) == page.banded_verdict(band, 7.0) == "open"
    assert page.banded_verdict(band, 8.0) == "missed by 25 %"


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("kernel_report.md", "p100_report.md"),
        ("training_report.md", "p100_training.md"),
        ("calibration.md", "p100_calibration.md"),
    ],
)
def test_the_page_has_the_text_of_its_template(template: str, name: str) -> None:
    written, end = (page.DOCS / name).read_text(), 0
    for text in re.split(r"\{\w+\}", (TEMPLATES / template).read_text()):
        begin = written.find(text, end)
        assert begin >= 0, f"not in {name}, or not in this place: {text}"
        end = begin + len(text)
