"""Trained models: where they lie, and how they are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastattn import Transformer
from fastattn.integrations.safetensors import load_safetensors

from .checkpoints import checkpoint_folders


def model_file(path: Path) -> Path:
    """The model that a path means: a file, a checkpoint's, a run's newest, or a folder of safetensors.

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
    """The model that a path means, in evaluation mode; reads numbers only, never code."""
    found = model_file(path)
    model = load_safetensors(found, device) if found.is_dir() else Transformer.load(found, device)
    return model.eval()


def run_description(path: Path) -> dict[str, Any]:
    """What `config.json` says of the run that a model, checkpoint or average lies in; empty if there is none."""
    for folder in [path.resolve(), *path.resolve().parents]:
        if (folder / "config.json").is_file():
            description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if "config" in description and "data" in description:
                return description
    return {}


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Ends the process with the message, without a traceback, where the user can mend what is wrong."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
