"""Translating lines: order, odd input, formats of output, pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from examples.wmt14 import translate
from examples.wmt14.heatmap import draw_attention
from examples.wmt14.subwords import Subwords
from fastattn.nmt.generation import beam_search
from fastattn.nmt.transformer import Transformer
from tests.support.trained_run import random_model, text, write_run

ROOT = Path(__file__).parents[2]
LINES = ["the dog runs", "", "a cat sleeps under the black tree", "a", "   ", "the small house", text(3, 9)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("translate") / "run")


def translator_of(run, *options):
    return translate.make_translator(translate.parse_arguments([str(run), *options]))[0]


def expected_of(run, line, **options):
    """Every hypothesis of a line's search, alone, with its text."""
    subwords = Subwords.load(run / "data")
    found = beam_search(random_model(), torch.tensor(subwords.encode([line])), **options)[0]
    return [(hypothesis, subwords.decode([hypothesis.tokens])[0]) for hypothesis in found]


def test_order_is_kept_and_empty_lines_are_empty(run):
    translator = translator_of(run, "--batch-size", "2", "--max-extra", "7")
    results = translator.translate(LINES)
    for line, hypotheses in zip(LINES, results, strict=True):
        if line.strip():
            expected, said = expected_of(run, line, max_extra_tokens=7)[0]
            assert hypotheses[0].tokens == expected.tokens
            assert hypotheses[0].score == pytest.approx(expected.score, rel=1e-4)
            assert translator.texts(hypotheses) == [said]
        else:
            assert (hypotheses[0].tokens, hypotheses[0].score) == ([], 0.0)
    assert len({tuple(hypotheses[0].tokens) for hypotheses in results}) > 3
    assert translator.sentences == 5
    assert translator.tokens == sum(
        len(h[0].tokens) + 1 for h, line in zip(results, LINES, strict=True) if line.strip()
    )
    report = r"sentences: 5, tokens: \d+, seconds: [\d.]+; [\d.]+ sentences/s, \d+ tokens/s"
    assert re.fullmatch(report, translator.report())


def test_the_search_is_that_of_the_recipe_or_of_the_options(tmp_path):
    run = write_run(tmp_path / "run", {"beam_size": 5, "alpha": 1.0, "length_penalty": "length"})
    options = translator_of(run).options
    assert (options["beam_size"], options["alpha"], options["penalty"]) == (5, 1.0, "length")
    options = translator_of(run, "--beam", "3", "--alpha", "0", "--length-penalty", "paper").options
    assert (options["beam_size"], options["alpha"], options["penalty"]) == (3, 0.0, "paper")
    (tmp_path / "run/config.json").unlink()
    options = translator_of(run, "--data", str(run / "data")).options
    assert (options["beam_size"], options["alpha"], options["penalty"]) == (4, 0.6, "paper")
    assert options["max_extra_tokens"] == 50


def test_long_lines_are_cut_with_a_warning(run, capsys):
    translator = translator_of(run, "--max-length", "6", "--max-extra", "3")
    line = text(1, 30)
    (cut,) = translator.encode([line])
    whole = Subwords.load(run / "data").encode([line])[0]
    assert cut == [*whole[:5], whole[-1]]
    capsys.readouterr()
    (hypotheses,) = translator.translate([line], first=17)
    assert capsys.readouterr().err == f"line 17: {len(whole)} ids, cut to 6\n"
    assert len(hypotheses[0].tokens) < 6 + 3
    assert translator_of(run).max_length == 40  # the model's max_len


def test_files(run, tmp_path, capsys):
    output = tmp_path / "out.de"
    translate.main([str(run), "--split", "test", "--output", str(output), "--max-extra", "5"])
    sentences = ["the dog runs", None, "a cat"]
    expected = [line and expected_of(run, line, max_extra_tokens=5)[0][1] for line in sentences]
    assert output.read_text() == "".join(f"{line or ''}\n" for line in expected)
    assert "sentences: 2," in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.de"]


@pytest.mark.parametrize("options", [["--n-best", "3"], ["--scores"], ["--n-best", "3", "--scores"]])
def test_n_best_and_scores(run, tmp_path, options):
    output = tmp_path / "out.tsv"
    count = 3 if "--n-best" in options else 1
    translate.main(
        [str(run), "--split", "test", "--output", str(output), "--buffer", "1", "--max-extra", "5", *options]
    )
    expected = []
    for number, line in enumerate(["the dog runs", None, "a cat"], 1):
        found = expected_of(run, line, max_extra_tokens=5, num_hypotheses=count) if line else [(None, "")]
        for hypothesis, said in found:
            prefix = [str(number)] if count > 1 else []
            expected.append([*prefix, hypothesis.score if hypothesis else 0.0, said])
    rows = [line.split("\t") for line in output.read_text().splitlines()]
    assert [float(row.pop(-2)) for row in rows] == pytest.approx([row.pop(-2) for row in expected], abs=1e-3)
    assert rows == expected


def command(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "examples.wmt14.translate", *map(str, arguments)]
    return subprocess.Popen(line, cwd=ROOT, env=environment, **options)


def test_pipe_with_bytes_that_are_no_text(run):
    pipe = subprocess.PIPE
    process = command(run, "--max-extra", 4, stdin=pipe, stdout=pipe, stderr=pipe)
    sent = "the dog\u2028runs\r\n\na\rcat \udcff\nno line end".encode("utf-8", "surrogateescape")
    out, err = process.communicate(sent, timeout=100)
    assert process.returncode == 0, err
    lines = out.decode().split("\n")
    assert len(lines) == 5 and lines[1] == lines[4] == ""
    assert lines[0] == expected_of(run, "the dog runs", max_extra_tokens=4)[0][1]
    assert lines[3] == expected_of(run, "no line end", max_extra_tokens=4)[0][1]
    assert b"sentences: 3," in err and b"Traceback" not in err


def test_a_line_at_a_time_and_a_reader_that_leaves(run):
    pipe = subprocess.PIPE
    process = command(run, "--max-extra", 4, "--buffer", 1, stdin=pipe, stdout=pipe, stderr=pipe)
    watchdog = threading.Timer(100, process.kill)  # lest an answer that never comes be waited for
    watchdog.start()
    process.stdin.write(b"the dog runs\n")
    process.stdin.flush()
    answer = process.stdout.readline().decode()  # while the input is still open
    watchdog.cancel()
    assert answer == expected_of(run, "the dog runs", max_extra_tokens=4)[0][1] + "\n"
    process.stdout.close()
    _, err = process.communicate(b"a cat\n" * 3, timeout=100)
    assert (process.returncode, err) == (1, b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "--data: must name the data folder, since nowhere lies in no run"),
        (["nowhere", "--data", "{run}/data"], "model: nowhere is neither a model, nor a checkpoint"),
        (["{run}", "--data", "{run}"], "was not written by prepare"),
        (["{run}", "--device", "cuda:77"], "--device: cuda:77 cannot be used"),
        (["{run}", "--input", "nowhere.txt"], "nowhere.txt"),
        (["{run}", "--split", "test", "--alpha", "-1"], "alpha: must not be negative, got -1.0"),
        (["{run}", "--split", "test", "--n-best", "5"], r"num_hypotheses: must lie in [1, beam_size 4], got 5"),
        (["{run}", "--split", "test", "--attention", "a.png"], "--attention: draws one sentence, got 2"),
        (["{other}", "--split", "test"], "--data: the model has 61 ids"),
    ],
)
def test_errors_are_messages(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "{other}" in arguments:
        checkpoint = write_run(tmp_path / "other") / "checkpoints/update-00000010"
        Transformer(replace(random_model().config, vocab_size=61)).save(checkpoint / "model.pt")
    names = {"run": run, "other": tmp_path / "other"}
    with pytest.raises(SystemExit) as stopped:
        translate.main([argument.format(**names) for argument in arguments])
    assert message in stopped.value.code
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n-best", "0"], "--n-best: must be at least 1, got 0"),
        (["--batch-size", "-3"], "--batch-size: must be at least 1, got -3"),
        (["--split", "test", "--input", "x"], "--split: not together with --input"),
    ],
)
def test_options_out_of_range(run, capsys, arguments, message):
    with pytest.raises(SystemExit):
        translate.parse_arguments([str(run), *arguments])
    assert message in capsys.readouterr().err


def test_an_error_leaves_the_old_output(run, tmp_path):
    output = tmp_path / "out.de"
    output.write_text("old")
    with pytest.raises(SystemExit):
        translate.main([str(run), "--split", "test", "--output", str(output), "--alpha", "-1"])
    assert output.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.de"]


# ---- pictures ----


class Cells(HTMLParser):
    """The labels of a page's cells, and how often each tag was opened and closed."""

    def __init__(self, page):
        super().__init__()
        self.titles, self.opened, self.closed = [], {}, {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.opened[tag] = self.opened.get(tag, 0) + 1
        if tag == "td":
            self.titles.append(dict(attributes)["title"])

    def handle_endtag(self, tag):
        self.closed[tag] = self.closed.get(tag, 0) + 1


def test_a_page_of_attention(run, tmp_path):
    line = "the dog sees a small tree"
    page, output, source = tmp_path / "a.html", tmp_path / "out", tmp_path / "in"
    source.write_text(f"\n{line}\n")
    arguments = ["--attention", str(page), "--input", str(source), "--output", str(output), "--max-extra", "3"]
    translate.main([str(run), *arguments])
    best, said = expected_of(run, line, max_extra_tokens=3, with_attention=True)[0]
    assert output.read_text() == f"{said}\n"
    cells = Cells(page.read_text())
    assert cells.opened["table"] == cells.closed["table"] == 3  # heads
    processor = Subwords.load(run / "data").processor
    columns = [processor.id_to_piece(id) for id in Subwords.load(run / "data").encode([line])[0]]
    rows = [processor.id_to_piece(id) for id in best.tokens]
    assert columns[-1] == "</s>"
    expected = [
        f"{rows[i]} ← {columns[j]}: {best.attention[-1, head, i, j]:.3f}"
        for head in range(3)
        for i in range(len(rows))
        for j in range(len(columns))
    ]
    same = sum(map(str.__eq__, cells.titles, expected))
    assert len(cells.titles) == len(expected) and same > 0.98 * len(expected)  # the last digit may be another


def test_pieces_are_escaped_in_pages(tmp_path):
    draw_attention(tmp_path / "a.html", torch.full((1, 1, 2), 0.5), ["<b>", '"&'], ["</td>"], "<script>")
    page = (tmp_path / "a.html").read_text()
    assert "<script>" not in page and "<b>" not in page
    assert Cells(page).titles == ["</td> ← <b>: 0.500", '</td> ← "&: 0.500']


@pytest.mark.parametrize("heads", [1, 4, 5])
def test_a_picture_of_attention(tmp_path, heads):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    path = tmp_path / "a.png"
    weights = torch.rand(heads, 3, 4)
    weights[:, 1] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    draw_attention(path, weights, ["▁a", r"$\frac$", "▁c", "</s>"], ["▁1", "2", "▁3"], "a $ b\n→ c")
    image = pyplot.imread(path)
    assert image.shape[0] > 100 and image.shape[1] > 150
    darkest = torch.tensor(image[..., :3]).sum(-1)
    assert (darkest < 0.2).any()


def test_pictures_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="--attention: must end in .png or .html, got a.pdf"):
        draw_attention(tmp_path / "a.pdf", torch.zeros(1, 1, 1), ["a"], ["b"], "")
    with pytest.raises(
        ValueError, match=r"weights: must be \(heads, 2 target, 1 source pieces\), got shape \(1, 1, 2\)"
    ):
        draw_attention(tmp_path / "a.png", torch.zeros(1, 1, 2), ["a"], ["b", "c"], "")
    assert not list(tmp_path.iterdir())
