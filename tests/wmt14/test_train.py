"""The training command: what it writes, when it stops, what it refuses; alone and as two processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU
from torch.nn.modules.module import register_module_forward_pre_hook

from examples.wmt14 import train
from examples.wmt14.checkpoints import checkpoint_folders
from examples.wmt14.configs import CONFIGS
from examples.wmt14.distributed import World
from examples.wmt14.progress import read_log
from examples.wmt14.subwords import Subwords
from examples.wmt14.trainer import Trainer
from examples.wmt14.validation import Score, Validation
from fastattn import Transformer, use_backend
from fastattn.nmt.batches import TokenBatches
from fastattn.nmt.data import ParallelTokens
from fastattn.nmt.generation import Hypothesis, greedy_search, translate
from fastattn.nmt.losses import label_smoothed_cross_entropy
from fastattn.nmt.transformer import DecoderLayer, EncoderLayer
from tests.support.small_corpus import prepare_small_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))


def command(data, run, *options):
    fixed = ["--config", "smoke", "--data", data, "--out", run, "--device", "cpu", "--log-every", 1]
    return [*map(str, fixed), *map(str, options)]


def events(run, name):
    return [record for record in read_log(run) if record["event"] == name]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a run of 12 updates."""
    run = tmp_path_factory.mktemp("finished")
    options = ["--updates", 12, "--save-every", 4, "--validate-every", 5, "--keep-last", 2, "--bleu-sentences", 6]
    assert train.main(command(data, run, *options)) == 0
    return run


# ---- what it writes ----


def test_log(finished, data):
    updates = events(finished, "update")
    assert [record["update"] for record in updates] == list(range(1, 13))
    assert updates[-1]["nll"] < updates[0]["nll"] - 0.3
    assert math.exp(updates[0]["nll"]) > 120  # of 150 ids: the model knows nothing yet
    assert updates[0]["loss"] > 0 and updates[0]["gradient_norm"] > 0 and updates[0]["num_pairs"] > 1
    assert [record["learning_rate"] for record in updates[:4]] == pytest.approx([1.25e-3, 2.5e-3, 3.75e-3, 5e-3])
    assert updates[-1]["learning_rate"] == pytest.approx(5e-3 / 9)
    assert all(0 < record["target_tokens"] <= 600 for record in updates)
    seen = np.cumsum([record["target_tokens"] for record in updates])
    assert [record["target_tokens_seen"] for record in updates] == seen.tolist()
    for record in updates:
        assert record["tokens_per_second"] > 0 and record["tflops"] > 0
    assert sorted(record["seconds"] for record in updates) == [record["seconds"] for record in updates]
    validations = events(finished, "validation")
    assert [record["update"] for record in validations] == [5, 10, 12]
    assert validations[-1]["perplexity"] == pytest.approx(math.exp(validations[-1]["nll"]))
    assert "tok:13a" in validations[-1]["bleu_signature"]


def test_tensorboard(finished):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    curves = accumulator.EventAccumulator(str(finished / "tensorboard")).Reload()
    nll = [(event.step, event.value) for event in curves.Scalars("update/nll")]
    assert nll == [(r["update"], pytest.approx(r["nll"], rel=1e-6)) for r in events(finished, "update")]
    assert [event.step for event in curves.Scalars("validation/bleu")] == [5, 10, 12]


def test_validation_scores_the_model_of_the_checkpoint(finished, data):
    assert [folder.name for folder in checkpoint_folders(finished)] == ["update-00000008", "update-00000012"]
    model = Transformer.load(checkpoint_folders(finished)[-1] / "model.pt").eval()
    valid, subwords = ParallelTokens(data, "valid"), Subwords.load(data)
    source, target = valid.batch(range(len(valid)), packed=False)
    with torch.no_grad():
        sums = label_smoothed_cross_entropy(model.hidden(source, target), model.output_weight(), target)
        best = translate(model, [valid.pair(i)[0].tolist() for i in range(6)], beam_size=1)
        greedy = greedy_search(model, source[:6])
    logged = events(finished, "validation")[-1]
    assert logged["nll"] == pytest.approx((sums.nll / sums.num_tokens).item(), rel=1e-5)
    assert [hypotheses[0].tokens for hypotheses in best] == [hypothesis.tokens for hypothesis in greedy]
    references = (data / "valid.target.txt").read_text(encoding="utf-8").splitlines()[:6]
    translations = subwords.decode([hypotheses[0].tokens for hypotheses in best])
    assert logged["bleu"] == pytest.approx(BLEU().corpus_score(translations, [references]).score)


def test_validation_searches_by_the_rules_of_the_recipe(finished, data, monkeypatch):
    pairs = ParallelTokens(data, "train")
    recipe = replace(CONFIGS["smoke"], alpha=0.9, length_penalty="length")
    model = Transformer.load(checkpoint_folders(finished)[-1] / "model.pt")
    batches = TokenBatches(pairs.source_lengths, pairs.target_lengths)
    trainer = Trainer(recipe, model, pairs, batches, World(0, 1, torch.device("cpu")))
    searches = []

    def record(model, sources, **search):
        searches.append(search)
        return translate(model, sources, **search)

    monkeypatch.setattr("examples.wmt14.validation.translate", record)
    Validation(trainer, data, bleu_sentences=2, beam_size=3).run()
    assert searches == [{"beam_size": 3, "alpha": 0.9, "penalty": "length"}]


def test_description_of_the_run(finished, data):
    description = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    assert description["config"]["name"] == "smoke" and description["config"]["updates"] == 12
    assert description["config"]["transformer"]["d_model"] == 32
    assert description["data"] == str(data) and description["seed"] == 1
    assert description["packed"] is True and description["attention"] == "cpu"


def test_checkpointed_activations(data, tmp_path):
    """In training every layer runs once more, in the backward pass; not in the validation after the last update."""
    layers = []

    def note(module, inputs):
        if isinstance(module, (EncoderLayer, DecoderLayer)) and module.training:
            layers.append(type(module))

    options = ["--updates", 4, "--bleu-sentences", 0, "--checkpoint-activations"]
    with register_module_forward_pre_hook(note):
        assert train.main(command(data, tmp_path, *options)) == 0
    assert layers == [EncoderLayer, DecoderLayer, DecoderLayer, EncoderLayer] * 4


# ---- when it stops ----


def test_patience(data, tmp_path, monkeypatch):
    nll = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    monkeypatch.setattr(Validation, "run", lambda self: Score(next(nll), None, None))
    options = ["--validate-every", 1, "--save-every", 2, "--patience", 2, "--bleu-sentences", 0, "--resume", "auto"]
    assert train.main(command(data, tmp_path, *options)) == 0
    assert [record["nll"] for record in events(tmp_path, "validation")] == [3.0, 2.0, 2.5, 2.0]
    assert train.main(command(data, tmp_path, *options)) == 0
    assert len(events(tmp_path, "update")) == 4


def test_nan_ends_the_run_and_names_the_batch(data, tmp_path, monkeypatch, capsys):
    accumulate = Trainer._accumulate

    def poisoned(self, update, pairs, target_tokens):
        if update == 3:
            with torch.no_grad():
                self.model.embedding.weight[7] = math.nan
        return accumulate(self, update, pairs, target_tokens)

    monkeypatch.setattr(Trainer, "_accumulate", poisoned)
    options = ["--save-every", 2, "--bleu-sentences", 0]
    assert train.main(command(data, tmp_path, *options)) == train.NON_FINITE == 4
    assert "train: update 3: not finite: loss, embedding.weight" in capsys.readouterr().err
    (record,) = events(tmp_path, "non-finite")
    assert record["update"] == 3 and "embedding.weight" in record["tensors"] and len(record["pairs"]) > 1
    (checkpoint,) = checkpoint_folders(tmp_path)
    assert all(p.isfinite().all() for p in Transformer.load(checkpoint / "model.pt").parameters())


# ---- what it refuses ----


def refusal(arguments):
    with pytest.raises(SystemExit) as error:
        train.main(arguments)
    return error.value.code


def test_refusals(finished, data, tmp_path):
    assert "holds checkpoints; go on with --resume auto" in refusal(command(data, finished))
    options = [*command(data, finished, "--resume", "auto"), "--updates", "12"]
    assert "was trained with seed 1, got 2" in refusal([*options, "--seed", "2"])
    assert "was trained with updates 12, got 13" in refusal([*options, "--updates", "13"])
    assert "was trained with precision 'fp32', got 'bf16'" in refusal([*options, "--precision", "bf16"])
    assert "was trained with packed True, got False" in refusal([*options, "--batches", "padded"])
    with use_backend("reference"):
        assert "was trained with attention 'cpu', got 'reference'" in refusal([*options, "--batches", "packed"])
    assert train.main([*options, "--keep-last", "1"]) == 0
    new = tmp_path / "new"
    assert "--config: must be one of base_en_de" in refusal([*command(data, new), "--config", "large"])
    assert "train: folder: " in refusal(command(tmp_path / "no data", new))
    assert "--out: must be given" in refusal(["--config", "smoke", "--data", str(data)])
    assert "must be at least" in refusal(command(data, new, "--tokens-per-update", 20))
    assert refusal(["--config", "smoke", "--accumulate", "0"]) == 2


def test_dry_run_needs_no_folders(capsys):
    assert train.main(["--config", "big_en_de", "--dry-run"]) == 0
    assert "big_en_de: 21" in capsys.readouterr().out


# ---- two processes ----


def test_two_processes_train_as_one_with_two_steps(data, tmp_path):
    options = ["--updates", 8, "--save-every", 4, "--validate-every", 4, "--bleu-sentences", 5]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = [*launcher, "-m", "examples.wmt14.train", *command(data, tmp_path / "two", *options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(both, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stderr
    assert train.main(command(data, tmp_path / "one", *options, "--accumulate", 2)) == 0
    for event in ("update", "validation"):
        two, one = (events(tmp_path / name, event) for name in ("two", "one"))
        assert [r["update"] for r in two] == [r["update"] for r in one]
        assert [r["nll"] for r in two] == pytest.approx([r["nll"] for r in one], rel=1e-4)
    assert events(tmp_path / "two", "validation")[-1]["bleu"] == events(tmp_path / "one", "validation")[-1]["bleu"]
    assert [folder.name for folder in checkpoint_folders(tmp_path / "two")] == ["update-00000004", "update-00000008"]


class OneAfterTheOther(World):
    """A process that knows what those before it said."""

    said: list = []

    def sum_(self, values):
        self.said.append(values)
        return torch.stack(self.said).sum(0)

    def gather(self, value):
        self.said.insert(0, value)
        return self.said


@pytest.mark.parametrize("work", ["_nll", "_bleu"])
def test_processes_share_a_validation(finished, data, monkeypatch, work):
    pairs = ParallelTokens(data, "train")
    batches = TokenBatches(pairs.source_lengths, pairs.target_lengths)
    model = Transformer.load(checkpoint_folders(finished)[-1] / "model.pt")
    trainer = Trainer(CONFIGS["smoke"], model, pairs, batches, World(0, 1, torch.device("cpu")))
    model.eval()
    validation = Validation(trainer, data, bleu_sentences=7, beam_size=1)
    validation.batches = [np.arange(start, start + 4) for start in range(0, 20, 4)]
    monkeypatch.setattr(
        "examples.wmt14.validation.translate",
        lambda model, sources, **search: [[Hypothesis(ids, 0.0)] for ids in sources],
    )
    monkeypatch.setattr(validation.metric, "corpus_score", lambda texts, _: SimpleNamespace(score=texts))
    with torch.no_grad():
        expected = getattr(validation, work)()
        monkeypatch.setattr(OneAfterTheOther, "said", [])
        for rank in range(3):
            trainer.world = OneAfterTheOther(rank, 3, torch.device("cpu"))
            result = getattr(validation, work)()
    assert result == (pytest.approx(expected) if work == "_nll" else expected)
    shares = [float(said[1]) if work == "_nll" else len(said) for said in OneAfterTheOther.said]
    assert all(share < sum(shares) / 2 for share in shares)
