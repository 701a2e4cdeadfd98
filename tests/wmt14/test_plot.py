"""The picture of a training shows what was logged."""

from __future__ import annotations

import json

import pytest

from examples.wmt14 import plot

RECORDS = [
    {"event": "update", "update": 1, "nll": 5.0, "target_tokens_seen": 1_000_000},
    {"event": "validation", "update": 1, "nll": 4.5, "bleu": 3.0, "target_tokens_seen": 1_000_000},
    {"event": "validation", "update": 2, "nll": 4.0, "target_tokens_seen": 1_500_000},
    {"event": "update", "update": 2, "nll": 3.0, "target_tokens_seen": 1_500_000},
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return tmp_path


def test_series_are_the_values_logged_over_millions_of_tokens():
    assert plot.series(RECORDS, "update", "nll") == ([1.0, 1.5], [5.0, 3.0])
    assert plot.series(RECORDS, "validation", "nll") == ([1.0, 1.5], [4.5, 4.0])
    assert plot.series(RECORDS, "validation", "bleu") == ([1.0], [3.0])


def test_picture_is_written(run, capsys):
    pytest.importorskip("matplotlib")
    plot.main([str(run), "--output", str(run / "curve.svg")])
    picture = (run / "curve.svg").read_text()
    assert "4 records" in capsys.readouterr().out
    assert picture.startswith("<?xml") and "<svg" in picture


def test_an_empty_log_is_an_error(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(SystemExit, match="run: its log.jsonl must hold at least one update"):
        plot.main([str(tmp_path), "--output", str(tmp_path / "curve.png")])
    assert not (tmp_path / "curve.png").exists()
