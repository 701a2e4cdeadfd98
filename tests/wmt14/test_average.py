"""Averaging checkpoints, and what a checkpoint may not do to its reader."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.wmt14 import average, models
from fastattn.nmt.averaging import average_models
from fastattn.nmt.transformer import Transformer
from tests.support.tiny_transformer import TINY


def write_checkpoint(run, update, seed=None, config=TINY):
    """A checkpoint folder of a random model."""
    folder = run / "checkpoints" / f"update-{update:08d}"
    folder.mkdir(parents=True)
    torch.manual_seed(update if seed is None else seed)
    Transformer(config).save(folder / "model.pt")
    return folder


@pytest.fixture
def run(tmp_path):
    """A run of four checkpoints."""
    for update in (100, 200, 300, 400):
        write_checkpoint(tmp_path / "run", update)
    description = {"config": {"averaged": 5}, "data": "data"}
    (tmp_path / "run/config.json").write_text(json.dumps(description))
    return tmp_path / "run"


def parameters(path):
    return dict(Transformer.load(path).named_parameters())


def test_mean_of_the_last_checkpoints(run, tmp_path, capsys):
    output = tmp_path / "new" / "mean.pt"
    average.main([str(run), "--last", "3", "--output", str(output)])
    assert capsys.readouterr().out.endswith("3 checkpoints update-00000200 update-00000300 update-00000400\n")
    members = [parameters(run / f"checkpoints/update-00000{n}00/model.pt") for n in (2, 3, 4)]
    mean = parameters(output)
    assert list(mean) == list(members[0])
    for name, value in mean.items():
        assert value.dtype == torch.float32
        expected = torch.stack([member[name].double() for member in members]).mean(0).float()
        torch.testing.assert_close(value, expected, rtol=1e-7, atol=0)
    assert [path.name for path in output.parent.iterdir()] == ["mean.pt"]


def test_sums_are_taken_in_float64(tmp_path):
    values = [1.0, 2.0**-25, 2.0**-25, -1.0]
    for index, value in enumerate(values):
        model = Transformer(TINY)
        torch.nn.init.constant_(model.embedding.weight, value)
        torch.nn.init.constant_(model.encoder[0].feed_forward[0].bias, index)
        model.save(tmp_path / f"{index}.pt")
    mean = average_models([tmp_path / f"{index}.pt" for index in range(4)])
    assert (mean.embedding.weight == 2.0**-26).all()


def test_as_many_as_the_recipe_says_and_a_list(run):
    write_checkpoint(run, 500)
    write_checkpoint(run, 50)
    names = [path.name for path in average.select_checkpoints([run])]
    assert names == [f"update-00000{n}00" for n in (1, 2, 3, 4, 5)]
    chosen = [run / "checkpoints/update-00000300", run / "checkpoints/update-00000100"]
    assert average.select_checkpoints(chosen) == chosen


def folder(update):
    return f"run/checkpoints/update-{update:08d}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "--last: run has 4 checkpoints, fewer than 5"),
        (["run", "--last", "0"], "--last: must be at least 1, got 0"),
        ([folder(100), "--last", "1"], "--last: belongs to one run folder"),
        ([folder(100), folder(100)], "is of the same update as"),
        ([folder(100), f"run/../{folder(100)}"], "is of the same update as"),
        ([folder(100), f"other/{folder(100)}"], "is of the same update as"),
        ([folder(100), folder(999)], "update-00000999 holds no model.pt"),
        (
            [folder(100), folder(500)],
            "update-00000500/model.pt has the same weights as run/",
        ),
        ([folder(100), folder(600)], "update-00000600/model.pt has another configuration than"),
        ([folder(100), folder(700)], "update-00000700/model.pt is not a model that Transformer.save wrote"),
        ([folder(100), folder(800)], "update-00000800/model.pt is not a model that Transformer.save wrote"),
    ],
)
def test_refusals(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "run" not in arguments:
        write_checkpoint(tmp_path / "other/run", 100, seed=7)
        write_checkpoint(run, 500, seed=100)
        write_checkpoint(run, 600, config=replace(TINY, norm="pre"))
        broken = write_checkpoint(run, 700) / "model.pt"
        broken.write_bytes(broken.read_bytes()[:1000])
        torch.save({"config": {}, "state_dict": [1]}, write_checkpoint(run, 800) / "model.pt")
    with pytest.raises(SystemExit) as stopped:
        average.main([*arguments, "--output", "mean.pt"])
    assert message in stopped.value.code
    assert not list(tmp_path.glob("*mean*"))


def test_a_file_named_twice(run):
    path = run / "checkpoints/update-00000100/model.pt"
    with pytest.raises(ValueError, match="is named twice"):
        average_models([path, path.parent / "../update-00000100/model.pt"])
    with pytest.raises(ValueError, match="at least one file"):
        average_models([])


def test_an_output_that_cannot_be_written_leaves_the_old_one(run, tmp_path, monkeypatch):
    output = tmp_path / "mean.pt"
    output.write_text("old")

    def full_disk(self, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Transformer, "save", full_disk)
    with pytest.raises(SystemExit, match="no space left"):
        average.main([str(run), "--last", "2", "--output", str(output)])
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["mean.pt"]
    assert output.read_text() == "old"


class Hostile:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_checkpoint_runs_nothing(run, tmp_path):
    trap = tmp_path / "executed"
    path = run / "checkpoints/update-00000300/model.pt"
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "extra": Hostile(trap)}, path)
    readers = [
        lambda: average_models([run / "checkpoints/update-00000200/model.pt", path]),
        lambda: models.load_model(path.parent, "cpu"),
    ]
    for read in readers:
        with pytest.raises(ValueError, match="is not a model that Transformer.save wrote"):
            read()
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "the file was not hostile"


def test_which_model_a_path_means(run, tmp_path):
    newest = run / "checkpoints/update-00000400/model.pt"
    assert models.model_file(run) == models.model_file(newest.parent) == models.model_file(newest) == newest
    with pytest.raises(FileNotFoundError, match="is neither a model, nor a checkpoint, nor a run"):
        models.model_file(tmp_path)
