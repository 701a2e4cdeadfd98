"""Runs the Triton kernels: on a GPU that Triton takes, else in its interpreter, on CPU tensors.

with on_triton():
    fastattn.scaled_dot_product_attention(q, k, v)  # tensors on DEVICE
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from fastattn import backends

# conftest.py sets it where there is no such GPU.
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
KERNELS = ".triton_kernels"


@contextmanager
def on_triton(
    block_m: int | None = None, block_n: int | None = None, multiprocessors: int = 4, kernels: str = KERNELS
) -> Iterator[None]:
    """Every attention call inside runs on the `triton` backend, and fresh memory holds NaN where that is cheap.

    Args:
        block_m, block_n: tiles of all passes; None for those of the table.
        multiprocessors: of the GPU, as the bias gradient sees it.
        kernels: package of the kernels, as seen from fastattn.
    """
    tiles = importlib.import_module(f"{kernels}.tiles", "fastattn")
    choose = tiles.choose

    def choose_forced(*call: object) -> object:
        return type(chosen := choose(*call))(
            *(t._replace(block_m=block_m or t.block_m, block_n=block_n or t.block_n) for t in chosen)
        )

    records = [
        dataclasses.replace(b, module=f"{kernels}.attention", min_capability=None) if b.name == "triton" else b
        for b in backends.BACKENDS
    ]
    with (
        mock.patch.object(backends, "BACKENDS", tuple(records)),
        mock.patch.object(tiles, "choose", choose_forced),
        mock.patch.object(tiles, "multiprocessors", lambda device: multiprocessors),
        _fresh_memory_is_nan(),
        backends.use_backend("triton"),
    ):
        yield


@contextmanager
def _fresh_memory_is_nan() -> Iterator[None]:
    """What torch.empty returns; torch does that itself in its deterministic mode, which not every GPU library has."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(previous or DEVICE == "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous)
