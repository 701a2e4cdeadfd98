"""A training that is killed anywhere, and goes on, is to the bit the one that was not; a signal stops it in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.wmt14.checkpoints import checkpoint_folders
from examples.wmt14.progress import read_log
from tests.support.small_corpus import prepare_small_corpus

ROOT = Path(__file__).parents[2]
UPDATES = 40
COSTS = {"seconds", "cpu_seconds", "tokens_per_second", "tflops"}

# What runs before training: `die()` in the middle of something.
PRELUDE = """
import os, pathlib, shutil, signal, sys
import torch
from examples.wmt14 import checkpoints, progress, train, trainer

def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""

DEATHS = {
    "in an update, its gradients computed": """
accumulate = trainer.Trainer._accumulate
def dying(self, update, *rest):
    result = accumulate(self, update, *rest)
    return die() if update == 9 else result
trainer.Trainer._accumulate = dying
""",
    "in a line of the log": """
write = progress.Progress.write
def dying(self, event, update, values):
    if update == 15:
        self._file.write('{"event": "update", "update": 15, "lo')
        self._file.flush()
        die()
    write(self, event, update, values)
progress.Progress.write = dying
""",
    "in the writing of a checkpoint": """
save = torch.save
def dying(value, path):
    if "00000020/training.pt" in str(path):
        pathlib.Path(path).write_bytes(b"half")
        die()
    save(value, path)
torch.save = dying
""",
    "before a checkpoint gets its name": """
rename = pathlib.Path.rename
def dying(self, target):
    return die() if self.name == ".update-00000020" else rename(self, target)
pathlib.Path.rename = dying
""",
    "right after a checkpoint, before the old one is deleted": """
folders = checkpoints.checkpoint_folders
def dying(run):
    found = folders(run)
    return die() if found and checkpoints.update_of(found[-1]) == 20 else found
checkpoints.checkpoint_folders = dying
""",
    "in the deletion of an old checkpoint": """
remove = shutil.rmtree
def dying(folder, *rest):
    if folder.name == ".update-00000020":
        (folder / "model.pt").unlink()
        die()
    remove(folder, *rest)
shutil.rmtree = dying
""",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))


def start(data, run, prelude="", *options):
    code = f"{PRELUDE}\n{prelude}\nsys.exit(train.main(sys.argv[1:]))"
    arguments = ["--config", "smoke", "--data", data, "--out", run, "--resume", "auto", "--updates", UPDATES]
    arguments += ["--keep-last", 2, "--log-every", 1, "--validate-every", 20, "--bleu-sentences", 2, *options]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, encoding="utf-8")


def finish(process):
    errors = process.communicate(timeout=300)[1]
    return process.returncode, errors


def plain(value):
    """Tensors as numbers, so that values compare by ==."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def trained(run):
    """All that must not depend on what happened on the way: the log, the last model and what belongs to it."""
    records = [{k: v for k, v in record.items() if k not in COSTS} for record in read_log(run)]
    last = checkpoint_folders(run)[-1]
    training = torch.load(last / "training.pt", weights_only=True)
    del training["clock"]
    return records, plain(torch.load(last / "model.pt", weights_only=True)), plain(training)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted")
    code, errors = finish(start(data, run))
    assert code == 0, errors
    return trained(run)


def test_killed_anywhere_and_resumed_is_the_same_to_the_bit(data, uninterrupted, tmp_path):
    run = tmp_path / "run"
    for where, prelude in DEATHS.items():
        code, errors = finish(start(data, run, prelude))
        assert code == -signal.SIGKILL, f"{where}: {errors}"
        for checkpoint in checkpoint_folders(run):
            assert torch.load(checkpoint / "training.pt", weights_only=True)["update"] == int(checkpoint.name[-8:])
    assert [folder.name for folder in checkpoint_folders(run)] == ["update-00000030", "update-00000040"]
    code, errors = finish(start(data, run))
    assert code == 0, errors
    records, model, training = trained(run)
    assert [record["update"] for record in records if record["event"] == "update"] == list(range(1, UPDATES + 1))
    assert records == uninterrupted[0]
    assert model == uninterrupted[1]
    assert training == uninterrupted[2]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["update-00000030", "update-00000040"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_finishes_the_update_saves_and_names_itself(data, uninterrupted, tmp_path, number):
    run = tmp_path / "run"
    process = start(data, run, "", "--updates", 100_000, "--save-every", 100_000)
    while not read_log(run):
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(number)
    code, errors = finish(process)
    assert code == 128 + number, errors
    assert "Traceback" not in errors
    (checkpoint,) = checkpoint_folders(run)
    state = torch.load(checkpoint / "training.pt", weights_only=True)
    assert state["update"] == read_log(run)[-1]["update"] >= 1
