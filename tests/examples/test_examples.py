"""The examples: the worked example, and the quickstart as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import demo_report
import quickstart
import worked_example
from number_translation import Vocabulary, draw_pairs

EXAMPLES = Path(__file__).parents[2] / "examples"
VOCABULARY = Vocabulary()


# ---- worked example ----


def test_worked_example_numbers():
    step = worked_example.single_head()
    assert step["q"].tolist() == [[1, 0, 2], [2, 2, 2], [2, 1, 3]]
    assert step["k"].tolist() == [[0, 1, 1], [4, 4, 0], [2, 3, 1]]
    assert step["v"].tolist() == [[1, 2, 3], [2, 8, 0], [2, 6, 3]]
    assert step["scores"].tolist() == [[2, 4, 4], [4, 16, 12], [4, 12, 10]]
    expected = torch.tensor([0.063379, 0.468311, 0.468311]), torch.tensor([1.936621, 6.683105, 1.595068])
    torch.testing.assert_close((step["weights"][0], step["out"][0]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(step["out"], step["weights"] @ step["v"])


def test_worked_example_variants():
    step = worked_example.single_head()
    q, k, v = (step[name] for name in "qkv")
    masked = worked_example.variants(q, k, v)
    assert masked["causal weights"][0].tolist() == [1, 0, 0]
    torch.testing.assert_close(masked["causal weights"][2], step["weights"][2])
    torch.testing.assert_close(masked["causal out"], masked["causal weights"] @ v)
    torch.testing.assert_close(masked["scaled weights"], torch.softmax(q @ k.T / 3**0.5, dim=-1))
    torch.testing.assert_close(masked["scaled out"], masked["scaled weights"] @ v)
    without, with_scale = worked_example.mean_largest_weights()
    assert without > 0.9 and with_scale < 0.5


def test_worked_example_heads_are_concatenated():
    _, out, weights = worked_example.two_heads()
    step = worked_example.single_head()
    scaled = worked_example.variants(step["q"], step["k"], step["v"])
    torch.testing.assert_close(weights[0], scaled["scaled weights"])
    q, k, v = (worked_example.X @ getattr(worked_example, name).flip(0) for name in ("W_Q", "W_K", "W_V"))
    second = torch.softmax(q @ k.T / 3**0.5, dim=-1)
    torch.testing.assert_close(weights[1], second)
    expected = torch.zeros(3, 4)
    expected[:, :3] += scaled["scaled out"]
    expected[:, 1:] += second @ v
    torch.testing.assert_close(out, expected)


def test_worked_example_prints_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["worked_example.py", "--out", str(tmp_path / "new" / "steps.png")])
    worked_example.main()
    text = capsys.readouterr().out
    for number in ("1.937    6.683    1.595", "0.063    0.468    0.468", "2     4     4"):
        assert number in text
    assert (tmp_path / "new" / "steps.png").read_bytes().startswith(b"\x89PNG")


# ---- quickstart ----


def _quickstart(*options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / "quickstart.py", "--device", "cpu", "--training-pairs", "500"]
    command += map(str, options)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


def test_quickstart_writes_everything(tmp_path):
    process = _quickstart("--steps", 5, "--test-sentences", 8, "--out", tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    for expected in ("cpu: fused kernels", "not triton", "BLEU", "nrefs:1", "exact match"):
        assert expected in output
    assert output.count("  English  ") == 5
    assert "tokens/s, loss" in errors and "lr " in errors and "5/5" in errors
    for name in ("attention.png", "loss.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    page = _page_data(tmp_path / "index.html")
    assert len(page["nll"]) == len(page["mean"]) == 5 and page["numbers"][0][1] == "BLEU"
    assert [sample["reference"] for sample in page["samples"]] == [german for _, german in draw_pairs(8, 2017, True)]
    for sample in page["samples"]:
        weights = torch.tensor(sample["weights"])
        assert weights.shape == (4, len(sample["target"]), len(sample["source"]))
        assert (weights.sum(-1) - 1).abs().max() < 0.02  # each rounded to three digits
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.pt", "vocabulary.json"]
    assert json.loads((tmp_path / "model" / "vocabulary.json").read_text("utf-8")) == VOCABULARY.pieces


def _page_data(path):
    text = path.read_text("utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_page_takes_any_text(tmp_path):
    text = "</script><b>DATA & more"
    attention = demo_report.Attention(torch.tensor([[[0.25, 0.75]]]), [text, "b"], ["c"], text, "c")
    path = tmp_path / "page.html"
    demo_report.write_page(path, [("1", text)], text, [2.0], [demo_report.Sample(attention, text)])
    data = _page_data(path)
    assert data["samples"][0]["source"] == [text, "b"] and data["samples"][0]["weights"] == [[[0.25, 0.75]]]
    assert path.read_text("utf-8").count("<b>") == (demo_report.page.TEMPLATE.read_text("utf-8").count("<b>"))
    with pytest.raises(ValueError):
        demo_report.write_page(path, [], "", [float("nan")], [])


def test_running_mean_is_of_what_is_around():
    assert demo_report.pictures.running_mean([1, 2, 3, 4, 9], window=2) == [1.5, 2, 3, 16 / 3, 6.5]
    assert demo_report.pictures.running_mean([], window=2) == []
    assert demo_report.pictures.running_mean([3.0]) == [3.0]


def test_quickstart_interrupted_leaves_a_model_that_translates(tmp_path):
    process = _quickstart("--steps", 100_000, "--out", tmp_path)
    for line in process.stderr:
        if "tokens/s" in line:
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Interrupted after step" in output and "Traceback" not in errors
    model, vocabulary = quickstart.load_model(tmp_path / "model", "cpu")
    assert vocabulary.pieces == VOCABULARY.pieces
    assert len(quickstart.translate_texts(model, vocabulary, ["on Monday she bought three apples"])) == 1


def test_quickstart_interrupted_outside_training_says_so(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--out", str(tmp_path)])
    monkeypatch.setattr(quickstart, "draw_pairs", interrupt)
    assert quickstart.main() == 130
    assert "Interrupted" in capsys.readouterr().out


def test_quickstart_batches_cover_every_pair_within_the_token_budget():
    pairs = draw_pairs(300, seed=4)
    encoded = quickstart.encode_pairs(pairs, VOCABULARY)
    batches = quickstart.token_batches(sorted(encoded, key=lambda pair: len(pair[0])))
    assert sum(map(len, batches)) == 300 and all(batches)
    for batch in batches:
        assert len(batch) * max(len(side) for pair in batch for side in pair) <= quickstart.BATCH_TOKENS
    source, target = next(quickstart.endless_batches(encoded, seed=0))
    sides = [[ids.tolist() for ids in side.tokens.split(side.cu_seqlens.diff().tolist())] for side in (source, target)]
    assert [max(map(len, side)) for side in sides] == [source.max_seqlen, target.max_seqlen]
    seen = {(VOCABULARY.decode(a), VOCABULARY.decode(b)) for a, b in zip(*sides, strict=True)}
    assert len(seen) > 1 and seen <= set(pairs)


def test_quickstart_refuses_with_a_reason(tmp_path, monkeypatch, capsys):
    quickstart.save_model(tmp_path / "model", quickstart.build_model(VOCABULARY), VOCABULARY)
    for options, reason in (
        (["--out", str(tmp_path / "none"), "--translate", "one apple"], "there is no model yet"),
        (["--out", str(tmp_path), "--translate", "one zebra"], "no pieces spell the word 'zebra'"),
    ):
        monkeypatch.setattr(sys, "argv", ["quickstart.py", "--device", "cpu", *options])
        with pytest.raises(SystemExit, match=reason):
            quickstart.main()
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--steps", "0"])
    with pytest.raises(SystemExit):
        quickstart.main()
    assert "--steps: must be at least 1, got 0" in capsys.readouterr().err
