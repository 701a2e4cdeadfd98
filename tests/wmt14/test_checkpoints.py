"""Checkpoint folders, whole or not there, and the state of the random numbers in them."""

from __future__ import annotations

import numpy as np
import torch

from examples.wmt14.checkpoints import Checkpoints, checkpoint_folders, random_state, set_random_state
from examples.wmt14.configs import CONFIGS
from fastattn import Transformer


def test_checkpoints_keep_the_last_and_no_half_ones(tmp_path):
    model = Transformer(CONFIGS["smoke"].model(30))
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for update in (5, 10, 20, 20):
        checkpoints.save(update, model, {"update": update})
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["update-00000010", "update-00000020"]
    (tmp_path / "checkpoints" / ".update-00000030").mkdir()
    assert len(checkpoint_folders(tmp_path)) == 2
    Checkpoints(tmp_path, keep_last=2)
    assert not (tmp_path / "checkpoints" / ".update-00000030").exists()


def test_random_state_goes_through_a_file_that_holds_no_code(tmp_path):
    import random

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    torch.save(random_state(), tmp_path / "state.pt")
    expected = draw()
    assert draw() != expected
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected
