"""The mean of several checkpoints' weights, which translates better than any of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .transformer import Transformer


def average_models(paths: Sequence[str | PathLike[str]]) -> Transformer:
    """The model whose every parameter is the plain mean of that parameter in the given files.

    The sums are taken in float64; one file at a time is in memory.

    Args:
        paths: files that `Transformer.save` wrote.

    Returns:
        The model, on the CPU, in training mode.

    Raises:
        ValueError: no path, a file named twice, two files with the same weights or with different configurations.

    Source: "Attention Is All You Need", section 6.1.
    """
    if not paths:
        raise ValueError("paths: must name at least one file, got none")
    files = [Path(path).resolve() for path in paths]
    for index, file in enumerate(files):
        if file in files[:index]:
            raise ValueError(f"paths: {paths[index]} is named twice")
    sums: dict[str, Any] = {}
    path_of: dict[bytes, str | PathLike[str]] = {}
    first = None
    for path in paths:
        model = Transformer.load(path)
        first = first or model.config
        if model.config != first:
            raise ValueError(f"paths: {path} has another configuration than {paths[0]}")
        state = model.state_dict()
        digest = _digest(state.values())
        if digest in path_of:
            raise ValueError(f"paths: {path} has the same weights as {path_of[digest]}")
        path_of[digest] = path
        for name, value in state.items():
            sums[name] = sums.get(name, 0) + value.double()
    model.load_state_dict({name: total / len(paths) for name, total in sums.items()})
    return model


def _digest(tensors: Iterable[Tensor]) -> bytes:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
