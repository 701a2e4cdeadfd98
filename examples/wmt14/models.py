"""Trained models: where they lie, and how they are read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastattn import Transformer
from fastattn.integrations.marian import load_marian
from fastattn.integrations.safetensors import load_safetensors

from .checkpoints import checkpoint_folders
from .subwords import MODEL_FILE


def model_file(path: Path) -> Path:
    """The model that a path means: a file, a checkpoint's, a run's newest, or an exported folder.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_file():
        return path
    for candidate in [path, *reversed(checkpoint_folders(path))]:
        if (candidate / "model.pt").is_file():
            return candidate / "model.pt"
    if (path / "model.safetensors").is_file():
        return path
    raise FileNotFoundError(f"model: {path} is neither a model, nor a checkpoint, nor a run with a checkpoint")


def load_model(path: Path, device: str) -> Transformer:
    """The model that a path means, in evaluation mode; reads numbers only, never code.

    Raises:
        ValueError: a file that is no model, or a device that is not there.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ValueError(f"--device: {device} cannot be used ({str(error).splitlines()[0]})") from error
    found = model_file(path)
    return _load(found).to(device).eval()


def _load(found: Path) -> Transformer:
    if found.is_file():
        return Transformer.load(found)
    config = json.loads((found / "config.json").read_text(encoding="utf-8"))
    return load_marian(found) if config.get("model_type") == "marian" else load_safetensors(found)


def run_description(path: Path) -> dict[str, Any]:
    """The `config.json` of the run that a model, checkpoint or average lies in; empty if there is none."""
    for folder in [path.resolve(), *path.resolve().parents]:
        if (folder / "config.json").is_file():
            description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if "config" in description and "data" in description:
                return description
    return {}


def data_folder(model: Path, given: Path | None) -> Path:
    """The folder with a model's vocabulary: the one given, the exported model's own, or that of its run.

    Raises:
        ValueError: there is none.
    """
    if given:
        return given
    if (model / MODEL_FILE).is_file():
        return model
    description = run_description(model)
    if not description:
        raise ValueError(f"--data: must name the data folder, since {model} lies in no run")
    return Path(description["data"])


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Ends the process with the message, without a traceback, where the user can mend what is wrong."""
    try:
        yield
    except BrokenPipeError:  # the reader of the output has closed it; flushing at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, ValueError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
