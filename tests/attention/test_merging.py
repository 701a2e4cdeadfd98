"""Parts of the keys put together, and sinks: against the softmax over everything that they stand for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from tests.support.cases import cumulative

BACKENDS = ["cpu", "reference"]
BATCH, HEADS, SEQLEN_Q, SEQLEN_K, DIM = 2, 3, 5, 11, 4


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, HEADS, n, DIM) for n in (SEQLEN_Q, SEQLEN_K, SEQLEN_K)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def backend_and_dtype(backend: str) -> torch.dtype:
    return torch.float64 if backend == "reference" else torch.float32


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-5)


# ---- merge_attention ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [[SEQLEN_K], [4, 7], [1, 0, 10], [3, 3, 3, 2]], ids=str)
@pytest.mark.parametrize("band", [{}, {"is_causal": True}, {"window": (2, 1)}], ids=str)
def test_parts_are_the_whole(backend: str, cuts: list[int], band: dict[str, Any]) -> None:
    """Forward and backward, through out and lse; queries that see nothing of some parts, or of any."""
    q, k, v = leaves(backend_and_dtype(backend))
    seen = torch.ones(SEQLEN_Q, SEQLEN_K, dtype=torch.bool)
    seen[1] = False
    seen[2, 4:] = False
    if "is_causal" in band:
        seen = seen.tril()
    if "window" in band:
        seen = seen.tril(1).triu(-2)
    with fastattn.use_backend(backend):
        whole = fastattn.scaled_dot_product_attention(q, k, v, seen, return_lse=True)
        sides = k.split(cuts, 2), v.split(cuts, 2), seen.split(cuts, 1)
        parts = [
            fastattn.scaled_dot_product_attention(q, key, value, mask, return_lse=True)
            for key, value, mask in zip(*sides, strict=True)
        ]
        merged = fastattn.merge_attention(*zip(*parts, strict=True))
        upstream = [torch.randn_like(x) for x in whole]
        assert_same(merged, whole)
        grads = [torch.autograd.grad(x, (q, k, v), upstream) for x in (merged, whole)]
        assert_same(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_parts(backend: str) -> None:
    dtype = backend_and_dtype(backend)
    q, k, v = (torch.randn(7, 2, DIM, dtype=dtype, requires_grad=True) for _ in range(3))
    edges = cumulative([3, 4])
    with fastattn.use_backend(backend):

        def part(used: Tensor | None, mask: Tensor | None) -> Any:
            return fastattn.varlen_attention(
                q, k, v, edges, edges, 4, 4, attn_mask=mask, seqused_k=used, return_lse=True
            )

        first = torch.tensor([1, 3], dtype=torch.int32)
        behind = torch.arange(4) >= first[:, None, None, None]
        parts = [part(first, None), part(None, behind)]
        merged, whole = fastattn.merge_attention(*zip(*parts, strict=True), packed=True), part(None, None)
        assert_same(merged, whole)
        upstream = [torch.randn_like(x) for x in whole]
        assert_same(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (merged, whole)))


def test_merging_has_every_derivative() -> None:
    outs = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def merge(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.merge_attention(parts[:3], parts[3:])

    assert torch.autograd.gradcheck(merge, (*outs, *lses))
    assert torch.autograd.gradgradcheck(merge, (*outs, *lses))


def test_half_types_are_rounded_once() -> None:
    outs = [torch.randn(1, 2, 3, 4).bfloat16() for _ in range(3)]
    lses = [torch.randn(1, 2, 3) for _ in range(3)]
    out, lse = fastattn.merge_attention(outs, lses)
    exact, _ = fastattn.merge_attention([x.float() for x in outs], lses)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out, exact.bfloat16(), rtol=0, atol=0)


OUT, LSE = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "outs: must be a list of at least one tensor, got []"),
        (OUT, [LSE], "outs: must be a list of at least one tensor, got a Tensor of shape (1, 2, 3, 4)"),
        ([OUT, None], [LSE, LSE], "outs: must be a tensor, got None"),
        ([OUT, OUT], [LSE], "lses: must be as many as outs, 2, got 1"),
        ([OUT, OUT[:, :1]], [LSE, LSE], "outs: must be of one shape and dtype, got (1, 2, 3, 4), torch.float32 and ("),
        ([OUT, OUT.half()], [LSE, LSE], "outs: must be of one shape and dtype"),
        ([OUT], [LSE[..., :2]], "lses: must be of shape (1, 2, 3), as outs of (1, 2, 3, 4), got (1, 2, 2)"),
        ([OUT, OUT.to("meta")], [LSE, LSE], "outs: is on meta"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused(outs: Any, lses: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fastattn.merge_attention(outs, lses)


# ---- sinks ----


def softmax_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """By the definition: one more column of scores, of which no weight is left."""
    scores = (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(~seen, -torch.inf)
    column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    scores = torch.cat([scores, column], -1)
    return scores.softmax(-1)[..., :-1] @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_is_a_key_without_a_value(backend: str) -> None:
    """Also for a query that sees no key: its output is 0, and its log-sum-exp the sink."""
    dtype = backend_and_dtype(backend)
    q, k, v = leaves(dtype)
    sinks = torch.tensor([0.5, -30.0, 4.0], dtype=dtype, requires_grad=True)
    seen = torch.ones(SEQLEN_Q, SEQLEN_K, dtype=torch.bool).tril(3)
    seen[2] = False
    with fastattn.use_backend(backend):
        actual = fastattn.scaled_dot_product_attention(q, k, v, seen, sinks=sinks, return_lse=True)
    expected = softmax_with_sinks(q, k, v, sinks, seen)
    assert_same(actual, expected)
    assert not actual[0][:, :, 2].any() and torch.equal(actual[1][0, :, 2], sinks.detach())
    upstream = [torch.randn_like(x) for x in expected]
    grads = [torch.autograd.grad(x, (q, k, v, sinks), upstream) for x in (actual, expected)]
    assert_same(*grads)


def test_a_sink_that_takes_nothing_changes_nothing() -> None:
    q, k, v = leaves(torch.float32)
    none = torch.full((HEADS,), -torch.inf)
    seen = torch.ones(SEQLEN_Q, SEQLEN_K, dtype=torch.bool)
    seen[2] = False
    for x, y in zip(
        fastattn.scaled_dot_product_attention(q, k, v, seen, sinks=none, return_lse=True),
        fastattn.scaled_dot_product_attention(q, k, v, seen, return_lse=True),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def test_dropout_does_not_drop_a_sink() -> None:
    q, k, v = leaves(torch.float32)
    seed, sinks = torch.tensor([3]), torch.randn(HEADS)
    out = fastattn.scaled_dot_product_attention(q, k, v, dropout_p=0.4, sinks=sinks, dropout_seed=seed)
    scores = torch.cat(
        [q @ k.transpose(-1, -2) * DIM**-0.5, sinks[:, None, None].expand(BATCH, HEADS, SEQLEN_Q, 1)], -1
    )
    kept = fastattn.reference.dropout_mask(seed, BATCH, HEADS, SEQLEN_Q, SEQLEN_K, 0.4)
    torch.testing.assert_close(out, scores.softmax(-1)[..., :-1] * kept / 0.6 @ v)
