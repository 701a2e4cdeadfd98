"""Runs the Triton kernels: on a GPU that Triton takes, else in its interpreter, on CPU tensors.

with on_triton():
    fastattn.scaled_dot_product_attention(q, k, v)  # tensors on DEVICE
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from fastattn import backends
from tests.support.cases import Case
from tests.support.contract import call, call_reference, condition, run
from tests.support.poison import fresh_memory_is_nan
from tests.support.tolerance import assert_close_to_oracle

# conftest.py sets it where there is no such GPU.
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
KERNELS = ".triton_kernels"


@contextmanager
def on_triton(
    block_m: int | None = None,
    block_n: int | None = None,
    multiprocessors: int = 1,
    in_one: bool = True,
    kernels: str = KERNELS,
    strict: bool = True,
) -> Iterator[None]:
    """Every attention call inside runs on the `triton` backend, and fresh memory holds NaN.

    Args:
        block_m, block_n: tiles of all kernels; None for those of the table.
        multiprocessors: of the GPU, as the launchers see it.
        in_one: whether the backward of short sequences is one kernel.
        kernels: package of the kernels, as seen from fastattn.
        strict: as by use_backend; or else because it is the first that takes the call.
    """
    attention = importlib.import_module(f"{kernels}.attention", "fastattn")
    tiles = attention.tiles

    class Few(attention.Device):
        """The same with other multiprocessors."""

        def gpu(self, device: torch.device) -> Any:
            return super().gpu(device)._replace(multiprocessors=multiprocessors)

    def choose(kernel: str, gpu: Any, dtype: torch.dtype, head_dims: Any, seqlens: tuple[int, int]) -> Any:
        tile = tiles.choose(kernel, gpu, dtype, head_dims, seqlens)
        if tile is None or (kernel == "bwd" and not in_one):
            return None
        tile = tile._replace(block_m=block_m or tile.block_m, block_n=block_n or tile.block_n)
        return None if kernel == "bwd" and seqlens[1] > tile.block_n else tile

    backend = dataclasses.replace(backends.get("triton"), module=attention.__name__, devices=None, min_capability=None)
    with (
        backends.replaced(backend),
        tiles.forced(choose),
        attention.on(Few()),
        fresh_memory_is_nan(),
        rounding_to_bfloat16(),
        # The interpreter multiplies by what unseen keys hold, and squares scores far above a softcap.
        np.errstate(invalid="ignore", over="ignore"),
        backends.use_backend("triton") if strict else nullcontext(),
    ):
        yield


@contextmanager
def rounding_to_bfloat16() -> Iterator[None]:
    """Inside, the interpreter rounds float32 to the nearest bfloat16, as a GPU does; by itself it cuts."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(builder: Any, x: Any, dtype: Any) -> Any:
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(builder, x, dtype)
        nearest = torch.tensor(x.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(nearest, dtype.scalar)

    interpreter.InterpreterBuilder.cast_impl = rounded
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.cast_impl = cast


@functools.cache
def expected(case: Case) -> tuple:
    """The results of the oracle and of plain torch, and how much rounding the case allows."""
    oracle = run(call_reference, case, torch.float64, DEVICE)
    return oracle, run(call_reference, case, case.dtype, DEVICE), condition(case)


def check_once(case: Case) -> None:
    """The contract in one run, in which unseen keys hold NaN; a second would have to give the same bits."""
    oracle, eager, rounding = expected(case)
    actual = run(call, case, case.dtype, DEVICE, unseen=True)
    assert actual.keys() == oracle.keys()
    for name, x in actual.items():
        assert_close_to_oracle(name, x, oracle[name], eager[name], rounding)
