"""prepare: what goes in comes out, bad lines are counted and named, and nothing half made looks finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.wmt14 import pipeline
from examples.wmt14 import prepare as prepare_module
from examples.wmt14.pipeline import Workers, sample_sentences
from examples.wmt14.subwords import Subwords
from fastattn.nmt.data import ParallelTokens
from tests.support.wmt14_text import prepare, report_of, sentences, spoil, tokens_of, write_lines, write_text


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_text_comes_back(files, out, capsys):
    prepare(out, files)
    subwords = Subwords.load(out)
    assert subwords.vocab_size == 150
    for seed, (split, count) in enumerate({"train": 300, "valid": 20, "test": 10}.items()):
        expected, tokens = sentences(count, seed), ParallelTokens(out, split)
        pairs = [tokens.pair(i) for i in range(len(tokens))]
        assert subwords.decode([source for source, _ in pairs], "source") == expected["source"]
        assert subwords.decode([target for _, target in pairs]) == expected["target"]
        assert all(side[-1] == subwords.eos_id and subwords.eos_id not in side[:-1] for pair in pairs for side in pair)
        assert pairs[0][0].tolist() == subwords.encode(expected["source"][:1])[0]
    report = report_of(out)["splits"]["train"]
    assert (report["pairs"], report["target_ids"]) == (300, int(tokens_of(out).target_lengths.sum()))
    assert "packed 0.0%" in capsys.readouterr().out


def test_bytes_depend_on_neither_workers_nor_chunks(files, tmp_path, monkeypatch):
    spoil(files)
    prepare(tmp_path / "one", files)
    monkeypatch.setattr(pipeline, "CHUNK_SIZE", 7)
    prepare(tmp_path / "two", files, workers=2)
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert {name for name in one if name.startswith("valid")} == {
        f"valid.{side}.{kind}" for side in ("source", "target") for kind in ("txt", "tokens.npy", "offsets.npy")
    }


def test_workers_keep_order_and_read_little_ahead():
    read = []

    def items():
        for i in range(100):
            read.append(i)
            yield i

    with Workers(2) as workers:
        results = workers.map(str, items())
        assert [next(results) for _ in range(3)] == ["0", "1", "2"]
        assert len(read) < 15
        assert list(results) == [str(i) for i in range(3, 100)]


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--train-source", b"one line\n", "both sides must have as many lines, got 1 in train.source and 300 in train"),
        ("--valid-target", b"ok\n" * 4 + b"\xff\n" + b"ok\n" * 15, "valid.source: line 5 must be UTF-8 text"),
        ("--train-source", b"\n" * 300, "no pair is left after cleaning"),
        ("--train-source", b"\xff\xfea\0 \0" * 300, "got 1 in train.source and 300"),
    ],
    ids=["lines", "utf8", "nothing-left", "utf16"],
)
def test_wrong_files_stop(files, out, option, content, message):
    files[option].write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        prepare(out, files)
    assert not out.exists()


def test_wrong_arguments_stop(files, out):
    with pytest.raises(SystemExit, match="vocab_size: 5000 does not fit the text"):
        prepare(out, files, "--vocab-size", "5000")
    with pytest.raises(SystemExit, match="--test-source, --test-target: must be given, smoke downloads nothing"):
        prepare(out, {option: file for option, file in files.items() if "test" not in option})
    with pytest.raises(SystemExit, match="--valid-source, --valid-target: must both be given, or neither"):
        prepare(out, {option: file for option, file in files.items() if option != "--valid-target"})
    with pytest.raises(SystemExit, match="nowhere: there is no such file"):
        prepare(out, files | {"--train-source": Path("nowhere")})
    with pytest.raises(SystemExit, match="source and target must be two texts"):
        prepare(out, files | {"--train-source": files["--train-target"]})
    assert not out.exists()


# ---- half made, made before ----


def test_the_folder_appears_only_when_complete(files, out, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "summarize", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        prepare(out, files)
    assert not out.exists() and out.with_name("out.partial").exists()
    monkeypatch.undo()
    out.with_name("out.partial").joinpath("stale").touch()
    prepare(out, files)
    assert not out.with_name("out.partial").exists() and "stale" not in contents(out)


def test_killed_and_run_again(files, tmp_path, out):
    big = write_text(tmp_path, train_pairs=40_000)
    arguments = [str(part) for option in big.items() for part in option]
    command = [sys.executable, "-m", "examples.wmt14.prepare", "--preparation", "smoke", "--out", out]
    process = subprocess.Popen(
        [*command, "--workers", "2", "--vocab-size", "150", *arguments],
        cwd=Path(__file__).parents[2],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    part = out.with_name("out.partial")
    while not (part.exists() and any(part.glob("train.*"))) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert part.exists() and not out.exists()
    prepare(out, big)
    assert len(tokens_of(out)) == 40_000


def test_the_same_again_is_done_before_it_starts(files, out, capsys):
    prepare(out, files)
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    capsys.readouterr()
    prepare(out, files)
    assert "made before" in capsys.readouterr().out
    assert before == {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    with pytest.raises(SystemExit, match="was made with other vocab_size"):
        prepare(out, files, "--vocab-size", "140")
    files["--train-source"].write_bytes(files["--train-source"].read_bytes().replace(b"dog", b"cat"))
    with pytest.raises(SystemExit, match="was made with other inputs_sha256"):
        prepare(out, files)
    (out / "preparation.json").unlink()
    with pytest.raises(SystemExit, match="must not exist, or have been made by this command"):
        prepare(out, files)


@pytest.mark.parametrize(("pairs", "sample"), [(10, 3), (10, 10), (10, 99), (1000, 7)])
def test_sample_is_even_and_of_both_sides(tmp_path, pairs, sample):
    sides = [write_lines(tmp_path / side, [f"{side}{i}" for i in range(pairs)]) for side in ("a", "b")]
    drawn = list(sample_sentences(sides, pairs, sample))
    kept = min(pairs, sample)
    assert len(drawn) == 2 * kept
    places = [int(line[1:]) for line in drawn[:kept]]
    assert [f"b{i}" for i in places] == drawn[kept:]
    assert max(b - a for a, b in zip([-1, *places], [*places, pairs], strict=True)) <= pairs // kept + 1
