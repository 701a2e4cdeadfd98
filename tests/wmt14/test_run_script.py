"""run.sh: the commands of a row's steps, each of which its step understands and the next one builds on."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from examples.wmt14.configs import CONFIGS
from examples.wmt14.train import chosen_config

ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    variables = {name: value for name, value in os.environ.items() if name not in ("GPUS", "TEXT", "DATA", "RUN")}
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables["PATH"]])
    script = ROOT / "examples/wmt14/run.sh"
    return subprocess.run(["bash", script, *arguments], env=variables | environment, capture_output=True, text=True)


def steps_of(*arguments, **environment):
    """The step's name, its parsed arguments and the words before its name, for every command that is printed."""
    done = run(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    steps = []
    for line in done.stdout.splitlines():
        if line:
            words = shlex.split(line.removeprefix("$ "))
            [place] = [i for i, word in enumerate(words) if word.startswith("examples.wmt14.")]
            step = import_module(words[place])
            steps.append((words[place].rpartition(".")[2], step.parse_arguments(words[place + 1 :]), words[:place]))
    return steps


def assert_are_a_row(steps, row, run, split):
    names, (prepare, train, average, translate, score), _ = zip(*steps, strict=True)
    assert names == ("prepare", "train", "average", "translate", "score")
    assert (train.config, prepare.preparation) == (row, CONFIGS[row].preparation)
    assert {prepare.out, train.data, translate.data, score.data} == {Path("data", prepare.preparation)}
    assert (train.out, train.resume, average.paths) == (Path(run), "auto", [Path(run)])
    assert average.last is None and translate.beam is None  # both as the recipe says
    assert average.output == translate.model and translate.output == score.hypotheses
    assert translate.split == score.split == split


@pytest.mark.parametrize(
    ("row", "run", "split"),
    [
        ("multi30k_tiny", "runs/multi30k_tiny", "test"),
        ("table3 A h=1", "runs/table3/A_h=1", "valid"),
    ],
)
def test_steps_of_a_row(row, run, split):
    steps = steps_of(row, "--dry-run", "--precision", "bf16", "--accumulate", "4")
    assert_are_a_row(steps, row, run, split)
    assert (chosen_config(steps[1][1]).precision, steps[1][1].accumulate) == ("bf16", 4)
    assert all(before == ["python", "-m"] for _, _, before in steps)


def test_table_3_is_all_its_rows():
    steps = steps_of("table3", "--dry-run", RUN="somewhere else")
    rows = [name for name in CONFIGS if name.startswith("table3 ")]
    assert len(rows) == 20 and len(steps) == 5 * 20
    for i, row in enumerate(rows):
        folder = row.removeprefix("table3 ").replace(" ", "_")
        assert_are_a_row(steps[5 * i : 5 * i + 5], row, f"somewhere else/{folder}", "valid")


def test_own_text_and_several_gpus():
    steps = steps_of("base_en_fr", "--dry-run", TEXT="my text", GPUS="8", DATA="made", RUN="my run")
    prepare, train, *_ = (arguments for _, arguments, _ in steps)
    assert steps[1][2] == ["torchrun", "--standalone", "--nproc-per-node", "8", "-m"]
    assert (prepare.train_source, prepare.test_target) == (Path("my text/train.en"), Path("my text/test.fr"))
    assert (prepare.out, train.data, train.out) == (Path("made"), Path("made"), Path("my run"))


def test_a_failing_step_ends_it(tmp_path):
    done = run("smoke", TEXT=str(tmp_path / "nowhere"), DATA=str(tmp_path / "data"), RUN=str(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stderr.startswith("prepare: ") and "there is no such file" in done.stderr
    assert "examples.wmt14.train" not in done.stdout


def test_rows_that_are_not_there():
    unknown, none = run("large", "--dry-run"), run()
    assert unknown.returncode == 1 and unknown.stdout == ""
    assert "ROW must be table3 or one of base_en_de" in unknown.stderr and "got 'large'" in unknown.stderr
    assert none.returncode == 2 and "examples/wmt14/run.sh ROW" in none.stderr
