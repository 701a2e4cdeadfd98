"""A run folder as training leaves it, with a vocabulary and a random model: all that translating needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from examples.wmt14.subwords import train_subwords
from fastattn.nmt.transformer import Transformer
from tests.support.tiny_transformer import TINY

WORDS = ["a", "the", "dog", "cat", "runs", "sleeps", "sees", "black", "white", "small", "big", "house", "tree", "under"]


def text(number: int, words: int) -> str:
    """A sentence of WORDS, the same for the same number."""
    return " ".join(WORDS[(number * 7 + place * place * 3 + place) % len(WORDS)] for place in range(words))


def write_data(folder: Path, **preparation: object) -> Path:
    """A data folder with a vocabulary of 60 ids and three test sentences, one of them empty."""
    folder.mkdir(parents=True)
    (folder / "subwords.model").write_bytes(train_subwords((text(n, 8) for n in range(50)), 60, 1.0))
    values = {"source_language": "en", "target_language": "de", "lowercase": False, "moses": False, **preparation}
    (folder / "preparation.json").write_text(json.dumps(values))
    (folder / "test.source.txt").write_text("the dog runs\n\na cat\n")
    return folder


def random_model(**changes: object) -> Transformer:
    """A model none of whose ids is improbable, in evaluation mode."""
    torch.manual_seed(1)
    config = replace(TINY, vocab_size=60, d_model=24, max_len=40, **changes)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        model.embedding.weight[0] = 0
    return model


def write_run(folder: Path, config: dict | None = None, preparation: dict | None = None, **changes: object) -> Path:
    """A run with one checkpoint of a random model, its recipe `config`."""
    checkpoint = folder / "checkpoints/update-00000010"
    checkpoint.mkdir(parents=True)
    random_model(**changes).save(checkpoint / "model.pt")
    data = write_data(folder / "data", **(preparation or {}))
    recipe = {"beam_size": 4, "alpha": 0.6, "length_penalty": "paper", "averaged": 1, **(config or {})}
    (folder / "config.json").write_text(json.dumps({"config": recipe, "data": str(data)}))
    return folder
