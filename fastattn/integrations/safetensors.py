"""A Transformer as model.safetensors and config.json: plain numbers that any library reads and that hold no code."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from os import PathLike
from pathlib import Path

from torch import Tensor

from ..nmt.config import TransformerConfig
from ..nmt.transformer import Transformer

MODEL_TYPE = "fastattn.Transformer"


def save_safetensors(model: Transformer, folder: str | PathLike[str]) -> None:
    """Write `model.safetensors`, the parameters by their names in `state_dict`, and `config.json` into a folder."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": MODEL_TYPE, **asdict(model.config)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_safetensors(folder: str | PathLike[str]) -> Transformer:
    """The model that `save_safetensors` wrote, on the CPU, in training mode.

    Raises:
        ValueError: `config.json` is that of another kind of model, or the parameters are not those it describes.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind != MODEL_TYPE:
        raise ValueError(f"{folder / 'config.json'}: model_type must be {MODEL_TYPE!r}, got {kind!r}")
    values = {field.name: config[field.name] for field in fields(TransformerConfig) if field.name in config}
    return filled(Transformer(TransformerConfig(**values)), read_tensors(folder / "model.safetensors"), folder)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        ValueError: it is no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a safetensors file ({error})") from error


def filled(model: Transformer, state: dict[str, Tensor], folder: Path) -> Transformer:
    """The model with these parameters.

    Raises:
        ValueError: they are not those of its configuration.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{folder}: config.json does not describe model.safetensors ({error})") from error
    return model
