"""All steps of examples/wmt14, one after the other, as a person runs them; and that the smoke can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.wmt14 import smoke
from examples.wmt14.checkpoints import checkpoint_folders

ROOT = Path(__file__).parents[2]


def test_every_step_runs(tmp_path):
    out = tmp_path / "smoke"
    line = [sys.executable, "-m", "examples.wmt14.smoke", "--out", str(out)]
    result = subprocess.run(line, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    killed, score = result.stdout.index("killed after update-"), result.stdout.index("tok:13a")
    assert killed < score < result.stdout.index("every step ran")
    assert len((out / "test.txt").read_text(encoding="utf-8").splitlines()) == smoke.PAIRS["test"]
    assert checkpoint_folders(out / "run")[-1].name == f"update-{smoke.UPDATES:08d}"


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    with pytest.raises(SystemExit, match=f"^--out: must not exist yet, got {tmp_path}$"):
        smoke.main(["--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_failing_step_ends_it(capfd):
    with pytest.raises(SystemExit, match="^average: ended with exit code 1$"):
        smoke.call("average", "no-such-run", "--output", "nowhere")
    assert "no-such-run" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["-c", "raise SystemExit(3)"], "^train: ended with exit code 3 before its first checkpoint$"),
        (
            ["-c", "from pathlib import Path; Path('checkpoints/update-00000001').mkdir(parents=True)"],
            "before it could",
        ),
    ],
)
def test_training_that_cannot_be_killed_is_an_error(tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    # The checkpoint is looked for once the process has ended, so that the outcome does not depend on who is faster.
    monkeypatch.setattr(smoke.subprocess, "Popen", lambda line: finished(line))
    with pytest.raises(SystemExit, match=message):
        smoke.kill_after_a_checkpoint([sys.executable, *line], tmp_path)


def finished(line):
    process = popen(line)
    process.wait()
    return process


popen = subprocess.Popen


@pytest.mark.parametrize(
    ("updates", "last_nll", "message"),
    [
        ([50, 100, 100, 300], 1.0, "once each, got"),
        ([50, 100, 250], 1.0, "once each, got"),
        ([50, 100, 300], 4.5, "nll must fall by"),
    ],
)
def test_log_with_lost_or_repeated_updates_is_an_error(tmp_path, updates, last_nll, message):
    nlls = [5.0] * (len(updates) - 1) + [last_nll]
    records = [{"event": "update", "update": u, "nll": nll} for u, nll in zip(updates, nlls, strict=True)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(SystemExit, match=message):
        smoke.check_log(tmp_path)
