"""Derivatives of the Triton kernels in every way of asking, and operands that are not what lies in their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import fastattn
from tests.support.cases import cumulative
from tests.support.derivatives import FIRST, FORWARD, SECOND
from tests.support.triton_attention import DEVICE, on_triton

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::fastattn.FastattnFallbackWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
MODES = FIRST | FORWARD | SECOND
SOME = ("func.grad", "vmap of grad", "is_grads_batched", "func.jvp", "dual_level", "grad of grad", "functional.hvp")


@pytest.mark.parametrize("more", [{}, {"softcap": 0.8, "seqused_k": [4]}], ids=["plain", "capped"])
@pytest.mark.parametrize("mode", [pytest.param(m, marks=() if m in SOME else pytest.mark.slow) for m in MODES])
def test_every_way_of_asking(mode: str, more: dict[str, Any]) -> None:
    x, k, v = (torch.randn(1, 2, n, 4, device=DEVICE) for n in (3, 5, 5))
    if "seqused_k" in more:
        more = more | {"seqused_k": torch.tensor(more["seqused_k"], dtype=torch.int32, device=DEVICE)}
    call = lambda x: fastattn.scaled_dot_product_attention(x, k.to(x.dtype), v.to(x.dtype), **more)  # noqa: E731
    with fastattn.use_backend("reference"):
        expected = MODES[mode](call, x.double())
    with on_triton(strict=False):
        actual = MODES[mode](call, x)
    assert float((actual - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def negated(x: Tensor) -> Tensor:
    """The same values, as memory that is still to be negated."""
    lazy = torch._neg_view(-x)
    assert lazy.is_neg()
    return lazy


@pytest.mark.parametrize("which", ["q", "k", "v", "bias", "dout", "all"])
def test_a_negation_that_is_still_to_be_done(which: str) -> None:
    tensors = {"q": (1, 2, 5, 8), "k": (1, 2, 6, 8), "v": (1, 2, 6, 8), "bias": (5, 6), "dout": (1, 2, 5, 8)}
    plain = {name: torch.randn(shape, device=DEVICE) for name, shape in tensors.items()}
    lazy = {name: negated(x) if which in (name, "all") else x for name, x in plain.items()}
    with on_triton():
        for x, y in zip(_run(**lazy), _run(**plain), strict=True):
            assert torch.equal(x, y)


def _run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dout: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v, bias)]
    out, lse = fastattn.scaled_dot_product_attention(*inputs[:3], attn_bias=inputs[3], return_lse=True)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, dout)]


LENGTHS = [3, 0, 4]
STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "a column": lambda edges: torch.stack([edges, edges + 50], 1)[:, 0],
    "every second": lambda edges: edges.repeat_interleave(2)[::2],
}


@pytest.mark.parametrize("form", STRIDED)
def test_cumulative_lengths_with_a_stride(form: str) -> None:
    x = torch.randn(7, 2, 8, device=DEVICE)
    edges = cumulative(LENGTHS).to(DEVICE)
    with on_triton():
        for q, k in ((STRIDED[form](edges), edges), (edges, STRIDED[form](edges))):
            expected = fastattn.varlen_attention(x, x, x, edges, edges, 4, 4)
            assert torch.equal(fastattn.varlen_attention(x, x, x, q, k, 4, 4), expected)


@pytest.mark.parametrize("form", STRIDED)
def test_numbers_of_keys_with_a_stride(form: str) -> None:
    x, used = torch.randn(3, 2, 7, 8, device=DEVICE), torch.tensor([3, 0, 7], dtype=torch.int32, device=DEVICE)
    with on_triton():
        expected = fastattn.scaled_dot_product_attention(x, x, x, seqused_k=used)
        assert torch.equal(fastattn.scaled_dot_product_attention(x, x, x, seqused_k=STRIDED[form](used)), expected)


def test_one_cumulative_length_for_all() -> None:
    x, edges = torch.randn(4, 2, 8, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE).expand(3)
    with on_triton():
        assert not fastattn.varlen_attention(x, x, x, edges, edges, 4, 4).any()
