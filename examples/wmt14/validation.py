"""Scores on the validation split: nll per token under teacher forcing, and BLEU of some translations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from sacrebleu.metrics.bleu import BLEU

from fastattn.nmt.batches import TokenBatches
from fastattn.nmt.data import ParallelTokens
from fastattn.nmt.generation import translate

from .subwords import Subwords
from .trainer import Trainer

_TOKENS_PER_BATCH = 8_192

Item = TypeVar("Item")


@dataclass(frozen=True)
class Score:
    """The scores of one validation."""

    nll: float  # nats per target token, without label smoothing
    bleu: float | None  # of the first sentences; None: not asked for
    bleu_signature: str | None

    def record(self) -> dict[str, Any]:
        """The fields of the log's record."""
        record: dict[str, Any] = {"nll": self.nll, "perplexity": math.exp(min(self.nll, 700.0))}
        if self.bleu is not None:
            record |= {"bleu": self.bleu, "bleu_signature": self.bleu_signature}
        return record


class Validation:
    """Scores a trainer's model; the processes share the work.

    Args:
        trainer: whose model, precision and layout of batches.
        folder: the prepared data.
        bleu_sentences: how many of the first sentences are translated; 0 for none.
        beam_size: hypotheses that live on at each step of their search.
    """

    def __init__(self, trainer: Trainer, folder: Path, bleu_sentences: int, beam_size: int) -> None:
        self.trainer = trainer
        recipe = trainer.config
        self.translate = partial(translate, beam_size=beam_size, alpha=recipe.alpha, penalty=recipe.length_penalty)
        self.data = ParallelTokens(folder, "valid")
        longest = max(self.data.source_lengths.max(), self.data.target_lengths.max())
        batches = TokenBatches(self.data.source_lengths, self.data.target_lengths, max(_TOKENS_PER_BATCH, longest))
        self.batches = batches.updates(0)
        self.num_sentences = min(bleu_sentences, len(self.data))
        self.subwords = Subwords.load(folder)
        self.references = (folder / "valid.target.txt").read_bytes().decode().split("\n")[: self.num_sentences]
        self.metric = BLEU(lowercase=self.subwords.forms["target"].lowercase)

    def run(self) -> Score:
        """The score of the model as it is; the same in every process."""
        model = self.trainer.model
        model.eval()
        try:
            with torch.inference_mode(), self.trainer.autocast():
                nll = self._nll()
                bleu = self._bleu() if self.num_sentences else None
        finally:
            model.train()
        return Score(nll, bleu, str(self.metric.get_signature()) if bleu is not None else None)

    def _nll(self) -> float:
        trainer, world = self.trainer, self.trainer.world
        total = torch.zeros(2, dtype=torch.float64, device=world.device)
        for pairs in self._mine(self.batches):
            batch = self.data.batch(pairs, trainer.packed, trainer.model.config.pad_id)
            sums = trainer.loss_of_batch(*(side.to(world.device) for side in batch))
            total += torch.stack([sums.nll, sums.num_tokens]).double()
        nll, num_tokens = world.sum_(total).tolist()
        return nll / num_tokens

    def _bleu(self) -> float:
        """BLEU of the search's best translations against the raw text."""
        mine = self._mine(range(self.num_sentences))
        sources = [self.data.pair(i)[0].tolist() for i in mine]
        found = self.translate(self.trainer.model, sources)
        texts = self.subwords.decode([best.tokens for best, *_ in found])
        gathered = self.trainer.world.gather(list(zip(mine, texts, strict=True)))
        ordered = [text for _, text in sorted(pair for share in gathered for pair in share)]
        return self.metric.corpus_score(ordered, [self.references]).score

    def _mine(self, work: Iterable[Item]) -> list[Item]:
        """The part of the work that is this process's share."""
        return list(work)[self.trainer.world.rank :: self.trainer.world.size]
