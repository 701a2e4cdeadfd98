"""Calls on the CPU kernels, on one instruction set or on each of them, and in a number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from tests.support.contract import dense_condition
from tests.support.poison import fresh_memory_is_nan
from tests.support.tolerance import assert_close_to_oracle

NOT_BUILT = "fastattn._cpu is not built: it takes a C++ compiler"
cpu = pytest.importorskip("fastattn.cpu_kernels.attention", reason=NOT_BUILT)

each_isa = pytest.mark.parametrize("isa", cpu.ISAS)


@contextmanager
def on_cpu(isa: str = cpu.ISAS[0]) -> Iterator[None]:
    """Every attention call inside runs on the kernels of the instruction set, or raises; fresh memory holds NaN."""
    with cpu.on(isa), fresh_memory_is_nan(), fastattn.use_backend("cpu"):
        yield


@contextmanager
def in_threads(count: int) -> Iterator[None]:
    """Inside, torch works in this many threads."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def results(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dout: Tensor | None = None, **arguments: Any
) -> dict[str, Tensor]:
    """out, lse and the gradients of a call, for a random upstream gradient unless one is given.

    The tensors are taken as they are, with their strides and whatever is shared among their elements.
    """
    inputs = [x.detach().requires_grad_() for x in (q, k, v, bias) if x is not None]
    function = fastattn.varlen_attention if "cu_seqlens_q" in arguments else fastattn.scaled_dot_product_attention
    attn_bias = None if bias is None else inputs[3]
    out, lse = function(*inputs[:3], attn_bias=attn_bias, return_lse=True, **arguments)
    if dout is None:
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    grads = torch.autograd.grad(out, inputs, dout)
    return dict(zip(("out", "lse", "dq", "dk", "dv", "dbias"), (out.detach(), lse.detach(), *grads), strict=False))


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """NaN and infinities have to be at the same places, too."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert torch.equal(x.nan_to_num(), expected[name].nan_to_num()), name
        assert torch.equal(x.isnan(), expected[name].isnan()), name


def assert_right(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **arguments: Any) -> None:
    """The results of a dense call, are as close to float64's as the tolerance wants."""
    tensors = q, k, v, bias

    def run(backend: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        torch.manual_seed(1)  # of dropout's bits
        with fastattn.use_backend(backend):
            given = tuple(x if x is None or dtype is None else x.to(dtype) for x in tensors)
            return results(*given, dout=None if dtype is None else dout.to(dtype), **arguments)

    dout = torch.randn((*q.shape[:-1], v.size(-1)), generator=torch.Generator().manual_seed(3)).to(q.dtype)
    rest = dict(arguments)
    mask, dropout_p = rest.pop("attn_mask", None), rest.pop("dropout_p", 0.0)
    condition = dense_condition((q, k, v, dout), mask, bias, dropout_p, rest)
    actual, oracle, eager = run("cpu", None), run("reference", torch.float64), run("reference", None)
    if bias is not None:
        assert actual["dbias"].dtype == bias.dtype
        for found in (actual, eager):  # delta is as exact as out, whatever type the bias has
            found["dbias"] = found["dbias"].to(q.dtype)
    for name, x in actual.items():
        assert_close_to_oracle(name, x, oracle[name], eager[name], condition)
