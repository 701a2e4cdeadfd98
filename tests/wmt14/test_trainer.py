"""One update, however it is divided: the mean over real target tokens, and what happens when it is not finite."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from examples.wmt14.configs import CONFIGS
from examples.wmt14.distributed import World
from examples.wmt14.trainer import NonFiniteError, Step, Trainer
from fastattn import Transformer
from fastattn.nmt.batches import TokenBatches
from fastattn.nmt.data import ParallelTokens
from fastattn.nmt.losses import label_smoothed_cross_entropy
from tests.support.small_corpus import prepare_small_corpus

ROOT = Path(__file__).parents[2]
ALONE = World(0, 1, torch.device("cpu"))
SMOKE = CONFIGS["smoke"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))


def make_trainer(folder, world=ALONE, accumulation=1, packed=False, config=SMOKE):
    data = ParallelTokens(folder, "train")
    batches = TokenBatches(data.source_lengths, data.target_lengths, config.tokens_per_update)
    torch.manual_seed(0)
    model = Transformer(config.model(300))
    return Trainer(config, model, data, batches, world, accumulation, packed)


def train(trainer, updates=6, pairs=slice(None)):
    """The steps of some updates of the first epoch, and the last one's gradient.

    Not the parameters: the bias of the keys has no gradient but rounding, and Adam follows that as it does any other.
    """
    work = zip(range(1, updates + 1), trainer.batches.stream(), strict=False)
    steps = [trainer.step(update, indices[pairs]) for update, (_, _, indices) in work]
    return steps, torch.cat([p.grad.flatten() for p in trainer.parameters])


def assert_same_training(actual, expected):
    numbers = [[(s.loss, s.nll, s.gradient_norm) for s in steps] for steps in (actual[0], expected[0])]
    torch.testing.assert_close(*map(torch.tensor, numbers), rtol=1e-4, atol=0)
    assert (actual[1] - expected[1]).norm() < 1e-3 * expected[1].norm()


def without_dropout(config=SMOKE):
    return replace(config, transformer=replace(config.transformer, dropout=0.0))


def test_the_gradient_is_that_of_the_mean_over_target_tokens(folder):
    trainer = make_trainer(folder, config=without_dropout())
    model = trainer.model
    _, _, pairs = next(trainer.batches.stream())
    source, target = trainer.data.batch(pairs, packed=False)
    hidden = model.hidden(source, target)
    sums = label_smoothed_cross_entropy(hidden, model.output_weight(), target, 0.1)
    assert (target == 0).any()
    expected = torch.autograd.grad(sums.loss / (target != 0).sum(), list(model.parameters()))
    step = trainer.step(1, pairs)
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))
    assert step.loss == pytest.approx(sums.loss.item() / (target != 0).sum().item())
    assert step.nll == pytest.approx(sums.nll.item() / (target != 0).sum().item())
    assert step.target_tokens == (target != 0).sum() and step.source_tokens == (source != 0).sum()
    assert step.gradient_norm == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in expected)))
    assert step.learning_rate == trainer.config.learning_rate(1)


@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulation_changes_nothing_but_rounding(folder, accumulation):
    config = without_dropout()
    actual = train(make_trainer(folder, accumulation=accumulation, config=config))
    assert_same_training(actual, train(make_trainer(folder, config=config)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_and_padded_batches_agree(folder, precision):
    config = replace(without_dropout(), precision=precision)
    packed, padded = (train(make_trainer(folder, packed=packed, config=config)) for packed in (True, False))
    assert [s.nll for s in packed[0]] == pytest.approx(
        [s.nll for s in padded[0]], rel=2e-2 if precision == "bf16" else 2e-4
    )


def test_empty_parts_take_part(folder):
    """Two pairs in five parts: three of them are empty."""
    config = without_dropout()
    actual = train(make_trainer(folder, accumulation=5, config=config), pairs=slice(2))
    assert_same_training(actual, train(make_trainer(folder, config=config), pairs=slice(2)))
    for packed in (False, True):
        trainer = make_trainer(folder, packed=packed, config=config)
        empty = trainer.data.batch(np.array([], np.int64), packed)
        trainer.loss_of_batch(*empty).loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in trainer.parameters)


def test_dropout_depends_on_seed_update_and_part_alone(folder):
    first, again = (train(make_trainer(folder, accumulation=2)) for _ in range(2))
    assert first[0] == again[0] and torch.equal(first[1], again[1])
    trainer = make_trainer(folder)
    pairs = next(trainer.batches.stream())[2]
    losses = {update: float(trainer._accumulate(update, pairs, 1)[0]) for update in (1, 2)}
    assert losses[1] != losses[2]
    torch.rand(5)
    assert float(trainer._accumulate(1, pairs, 1)[0]) == losses[1]
    trainer.seed = 2
    assert float(trainer._accumulate(1, pairs, 1)[0]) != losses[1]
    trainer.seed = 1
    trainer.batches.share = lambda update, part, parts: update  # so that only the parts' numbers differ
    alike, trainer.accumulation = float(trainer._accumulate(1, pairs, 1)[0]), 2
    assert float(trainer._accumulate(1, pairs, 1)[0]) != pytest.approx(2 * alike, rel=1e-6)


# ---- not finite ----


def poisoned(trainer, value=math.nan):
    with torch.no_grad():
        trainer.model.decoder[0].feed_forward[0].weight[0, 0] = value
    return trainer


def test_a_nan_stops_before_it_reaches_any_other_parameter(folder):
    trainer = poisoned(make_trainer(folder))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(NonFiniteError) as error:
        trainer.step(7, np.array([5, 3, 8]))
    assert error.value.update == 7 and error.value.pairs == [5, 3, 8]
    assert {"loss", "decoder.0.feed_forward.0.weight", "gradient of embedding.weight"} <= set(error.value.tensors)
    assert "update 7: not finite: loss" in str(error.value) and "pairs 5, 3, 8 of the" in str(error.value)
    after = list(trainer.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if b.isfinite().all())


def test_a_finite_loss_with_an_infinite_gradient_stops(folder):
    trainer = make_trainer(folder)
    trainer.model.encoder[0].feed_forward[2].bias.register_hook(lambda grad: grad.fill_(math.inf))
    with pytest.raises(NonFiniteError) as error:
        trainer.step(1, np.array([0]))
    assert error.value.tensors == ["gradient of encoder.0.feed_forward.2.bias"]


def test_an_overflow_in_float16_halves_the_loss_scale_until_that_cannot_help(folder):
    trainer = make_trainer(folder, config=replace(SMOKE, precision="fp16"))
    before = nn.utils.parameters_to_vector(trainer.parameters).detach().clone()
    trainer.model.encoder[0].feed_forward[2].bias.register_hook(lambda grad: grad.fill_(math.inf))
    step = trainer.step(1, np.array([0]))
    assert not step.is_applied and math.isfinite(step.loss)
    assert torch.equal(nn.utils.parameters_to_vector(trainer.parameters), before)
    assert trainer.scaler.get_scale() == step.loss_scale / 2
    with pytest.raises(NonFiniteError, match=r"gradient of encoder\.0\.feed_forward\.2\.bias"):
        for update in range(2, 99):
            step = trainer.step(update, np.array([0]))
    assert step.loss_scale < 0.01


def test_a_nan_in_float16_is_no_overflow(folder):
    with pytest.raises(NonFiniteError, match="not finite: loss"):
        poisoned(make_trainer(folder, config=replace(SMOKE, precision="fp16"))).step(1, np.array([0]))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_learns_like_float32(folder, precision):
    config = without_dropout()
    low = train(make_trainer(folder, config=replace(config, precision=precision)), updates=20)[0]
    full = train(make_trainer(folder, config=config), updates=20)[0]
    assert full[-1].nll < full[0].nll - 0.5
    assert [s.nll for s in low] == pytest.approx([s.nll for s in full], rel=0.03)
    assert [s.gradient_norm for s in low] == pytest.approx([s.gradient_norm for s in full], rel=0.1)
    assert all(step.is_applied for step in low)


def test_a_trainer_goes_on_from_the_state_of_another(folder):
    config = replace(SMOKE, precision="fp16")
    first, second = make_trainer(folder, config=config), make_trainer(folder, config=config)
    hook = first.model.embedding.weight.register_hook(lambda grad: grad.fill_(math.inf))
    first.step(1, np.array([0]))
    hook.remove()
    train(first, updates=3)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps = [trainer.step(4, np.arange(9)) for trainer in (first, second)]
    assert steps[0] == steps[1] and steps[0].loss_scale == 2.0**15
    for ours, theirs in zip(first.parameters, second.parameters, strict=True):
        assert torch.equal(ours, theirs)


# ---- processes ----

PROCESS = """
import pathlib, sys
import torch
import tests.wmt14.test_trainer as test
from examples.wmt14.distributed import World
folder, results = map(pathlib.Path, sys.argv[1:])
world = World.join("cpu")
trainings = [test.train(test.make_trainer(folder, world), pairs=pairs) for pairs in test.SHARES]
torch.save([([vars(step) for step in steps], gradient) for steps, gradient in trainings], results / str(world.rank))
world.leave()
"""
SHARES = slice(None), slice(1)  # all pairs of an update; one pair, so that a process has none


@pytest.fixture(scope="module")
def two_processes(folder, tmp_path_factory):
    """The steps that two processes see of a training, and of one whose updates have a single pair."""
    results = tmp_path_factory.mktemp("results")
    script = results / "process.py"
    script.write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += map(str, (script, folder, results))
    path = os.pathsep.join([*map(str, (ROOT, ROOT / "tests", ROOT / "examples")), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(results / str(rank), weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("which", [0, 1], ids=["full updates", "an empty share"])
def test_two_processes_are_one_with_two_accumulation_steps(folder, two_processes, which):
    (first, first_gradient), (second, second_gradient) = (trainings[which] for trainings in two_processes)
    assert first == second and torch.equal(first_gradient, second_gradient)
    actual = [Step(**step) for step in first], first_gradient
    assert_same_training(actual, train(make_trainer(folder, accumulation=2), pairs=SHARES[which]))
