"""One training from its first update, or from its newest checkpoint, to its last."""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastattn import Transformer, explain
from fastattn.nmt.batches import TokenBatches
from fastattn.nmt.data import ParallelTokens

from .checkpoints import Checkpoints, checkpoint_folders, random_state, seed_random, set_random_state
from .configs import Config
from .distributed import World
from .progress import Clock, Progress
from .signals import StopSignals
from .subwords import MODEL_FILE, Subwords
from .throughput import peak_flops, training_flops
from .trainer import NonFiniteError, Trainer
from .validation import Validation

# Settings that may change when a run goes on, since the updates made before do not depend on them.
_FREE = {"save_every", "validate_every", "keep_last", "averaged", "patience", "beam_size", "alpha", "length_penalty"}


class Run:
    """A training run with all its parts.

    Args:
        config: the recipe.
        args: the command's other options.
        world: the processes.

    Raises:
        ValueError: a folder whose checkpoints belong to another recipe, or that has some without `--resume auto`.
    """

    def __init__(self, config: Config, args: argparse.Namespace, world: World) -> None:
        self.config, self.args, self.world, self.folder = config, args, world, args.out
        data = ParallelTokens(args.data, "train")
        self.batches = TokenBatches(data.source_lengths, data.target_lengths, config.tokens_per_update, args.seed)
        self.updates_per_epoch = len(self.batches.updates(0))
        newest = self._prepare_folder(len(data))
        self.trainer = Trainer(
            config, self._model(newest), data, self.batches, world, args.accumulate, self._is_packed(), args.seed
        )
        self.update, self.epoch, self.index = 0, 0, 0  # updates made; the place of the next in the data
        self.best_nll, self.validations_since_best = float("inf"), 0
        self.clock = Clock()
        if newest:
            self._restore(torch.load(newest / "training.pt", map_location="cpu", weights_only=True))
        self.validation = Validation(self.trainer, args.data, args.bleu_sentences, args.bleu_beam)
        peak = peak_flops(world.device, config.precision)
        self.progress = Progress(
            self.folder, self.update, config.updates, self.clock, world.device, peak and peak * world.size,
            args.log_every, world.is_main,
        )  # fmt: skip

    def train(self) -> int:
        """Train until the last update, the end of patience or a signal; returns the exit code."""
        self._announce()
        try:
            with StopSignals() as signals:
                is_stopped = self._updates(signals)
        except NonFiniteError as error:
            self.progress.write("non-finite", error.update, {"tensors": error.tensors, "pairs": error.pairs})
            raise
        finally:
            self.progress.close()
        return 128 + (signals.received or signal.SIGTERM) if is_stopped else 0

    def _updates(self, signals: StopSignals) -> bool:
        """Make the updates that are left; returns whether a signal ended them."""
        stream = self.batches.stream(self.epoch, self.index)
        while self.update < self.config.updates and not self._is_out_of_patience():
            epoch, index, pairs = next(stream)
            step = self.trainer.step(self.update + 1, pairs, signals.received is not None)
            self.update, self.epoch, self.index = self.update + 1, epoch, index + 1
            self.progress.step(self.update, epoch, step, self._flops(pairs))
            if self._is_due(self.config.validate_every):
                self._validate()
            if step.stop or self._is_due(self.config.save_every):
                self._save()
            if step.stop:
                return True
        return False

    # ---- parts of the loop ----

    def _is_due(self, every: int | None) -> bool:
        return self.update % (every or self.updates_per_epoch) == 0 or self.update == self.config.updates

    def _is_out_of_patience(self) -> bool:
        return self.config.patience is not None and self.validations_since_best >= self.config.patience

    def _validate(self) -> None:
        with self.progress.pause():
            score = self.validation.run()
        self.validations_since_best += 1
        if score.nll < self.best_nll:
            self.best_nll, self.validations_since_best = score.nll, 0
        self.progress.validation(self.update, score.record())

    def _flops(self, pairs: NDArray[np.int64]) -> float:
        lengths = self.batches.source_lengths[pairs], self.batches.target_lengths[pairs]
        return training_flops(self.trainer.model.config, *lengths)

    # ---- state ----

    def _save(self) -> None:
        if self.world.is_main:
            state = {
                "trainer": self.trainer.state_dict(),
                "update": self.update,
                "position": {"epoch": self.epoch, "index": self.index},
                "best_nll": self.best_nll,
                "validations_since_best": self.validations_since_best,
                "clock": self.clock.state_dict(),
                "random": random_state(),
            }
            self.checkpoints.save(self.update, self.trainer.model, state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state["trainer"])
        self.update = state["update"]
        self.epoch, self.index = state["position"]["epoch"], state["position"]["index"]
        self.best_nll, self.validations_since_best = state["best_nll"], state["validations_since_best"]
        self.clock = Clock(**state["clock"])
        set_random_state(state["random"])

    # ---- beginning ----

    def _prepare_folder(self, num_pairs: int) -> Path | None:
        """The checkpoint to go on from, if any, in a folder that is this recipe's."""
        found = checkpoint_folders(self.folder)
        if found and not self.args.resume:
            raise ValueError(f"--out: {self.folder} holds checkpoints; go on with --resume auto or take another folder")
        description = self._description(num_pairs)
        if found:
            _check_same_recipe(json.loads((self.folder / "config.json").read_text("utf-8")), description)
        self.world.wait()
        if self.world.is_main:
            self.checkpoints = Checkpoints(self.folder, self.config.keep_last)
            partial = self.folder / ".config.json"
            partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            partial.replace(self.folder / "config.json")
        self.world.wait()
        return found[-1] if found else None

    def _description(self, num_pairs: int) -> dict[str, Any]:
        """The content of `config.json`: everything the run depends on."""
        return {
            "config": asdict(self.config),
            "seed": self.args.seed,
            "data": str(self.args.data.resolve()),
            "pairs": num_pairs,
            "subwords_sha256": hashlib.sha256((self.args.data / MODEL_FILE).read_bytes()).hexdigest(),
            "processes": self.world.size,
            "accumulation": self.args.accumulate,
            "packed": self._is_packed(),
            "attention": self._attention(),
            "torch": torch.__version__,
        }

    def _is_packed(self) -> bool:
        if self.args.batches is None:
            return self.world.device.type == "cuda" or self._attention() == "cpu"
        return bool(self.args.batches == "packed")

    def _attention(self) -> str:
        """The backend that computes it, on which the last bits depend."""
        x = torch.empty(1, 1, 1, 1, device=self.world.device)
        return explain(x, x, x).backend

    def _model(self, checkpoint: Path | None) -> Transformer:
        if checkpoint:
            model = Transformer.load(checkpoint / "model.pt", self.world.device)
        else:
            seed_random(self.args.seed)
            model = Transformer(self.config.model(Subwords.load(self.args.data).vocab_size)).to(self.world.device)
        model.checkpoint_activations = self.args.checkpoint_activations
        return model

    def _announce(self) -> None:
        if self.world.is_main:
            parameters = sum(p.numel() for p in self.trainer.model.parameters())
            batches = "packed" if self.trainer.packed else "padded"
            print(
                f"{self.config.name}: {parameters:,} parameters, {self.updates_per_epoch:,} updates per epoch, "
                f"{batches} batches, {self.config.precision}, {self.world.size} x {self.world.device.type}, "
                f"attention by {self._attention()}, "
                f"from update {self.update} to {self.config.updates}",
                file=sys.stderr,
            )


def _check_same_recipe(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ValueError unless this command would have made the same updates as those made before."""
    for name in ("seed", "pairs", "subwords_sha256", "packed", "attention"):
        if old.get(name) != new[name]:
            raise ValueError(f"--out: was trained with {name} {old.get(name)!r}, got {new[name]!r}")
    before, now = (json.loads(json.dumps(description["config"])) for description in (old, new))
    free = _FREE | ({"updates"} if now["schedule"] == "noam" else set())
    for name in before.keys() | now.keys():
        if name not in free and before.get(name) != now.get(name):
            raise ValueError(f"--out: was trained with {name} {before.get(name)!r}, got {now.get(name)!r}")
