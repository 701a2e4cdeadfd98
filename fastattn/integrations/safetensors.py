"""A Transformer as model.safetensors and config.json: plain numbers that any library reads and that hold no code."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from os import PathLike
from pathlib import Path

import torch

from ..config import TransformerConfig
from ..transformer import Transformer

MODEL_TYPE = "fastattn.Transformer"


def save_safetensors(model: Transformer, folder: str | PathLike) -> None:
    """Write `model.safetensors`, the parameters by their names in `state_dict`, and `config.json` into a folder."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": MODEL_TYPE, **asdict(model.config)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_safetensors(folder: str | PathLike, device: torch.device | str = "cpu") -> Transformer:
    """The model that `save_safetensors` wrote, in training mode.

    Raises:
        ValueError: `config.json` is that of another kind of model.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{folder / 'config.json'}: model_type must be {MODEL_TYPE!r}, got {config.get('model_type')!r}"
        )
    values = {field.name: config[field.name] for field in fields(TransformerConfig) if field.name in config}
    model = Transformer(TransformerConfig(**values)).to(device)
    model.load_state_dict(load_file(folder / "model.safetensors", device=str(device)))
    return model
