"""attention_weights: what a call's values are multiplied with, for every argument that has a say in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

BATCH, HEADS, SEQLEN_Q, SEQLEN_K, DIM = 2, 4, 5, 7, 6
GENERATOR = torch.Generator().manual_seed(0)
MASK = torch.rand(BATCH, 1, SEQLEN_Q, SEQLEN_K, generator=GENERATOR) < 0.7
MASK[1, :, 2] = False  # a query that sees nothing
BIAS = torch.randn(HEADS, 1, SEQLEN_K, generator=GENERATOR, dtype=torch.float64)
SINKS = torch.randn(HEADS, generator=GENERATOR, dtype=torch.float64)

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"attn_mask": MASK},
    "causal": {"is_causal": True},
    "window": {"window": (2, 0), "causal_align": "bottom-right"},
    "bias and scale": {"attn_bias": BIAS, "scale": 0.3},
    "softcap": {"softcap": 0.5},
    "sinks": {"sinks": SINKS},
    "lengths": {"seqused_k": torch.tensor([3, 0], dtype=torch.int32)},
    "everything": {
        "attn_mask": MASK, "is_causal": True, "window": (3, None), "attn_bias": BIAS, "softcap": 2.0, "sinks": SINKS,
        "seqused_k": torch.tensor([7, 4], dtype=torch.int32), "causal_align": "bottom-right", "scale": 0.7,
    },
}  # fmt: skip


def operands(*leading: int, nheads_k: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(*leading, HEADS, SEQLEN_Q, DIM), (*leading, nheads_k, SEQLEN_K, DIM), (*leading, nheads_k, SEQLEN_K, 3)]
    q, k, v = (torch.randn(shape, generator=GENERATOR, dtype=torch.float64).requires_grad_() for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("name", CALLS)
def test_weights_times_values_are_the_call(name: str) -> None:
    q, k, v = operands(BATCH)
    weights = fastattn.attention_weights(q, k, **CALLS[name])
    out = fastattn.scaled_dot_product_attention(q, k, v, **CALLS[name])
    assert weights.shape == (BATCH, HEADS, SEQLEN_Q, SEQLEN_K)
    torch.testing.assert_close(weights @ v, out)
    upstream = torch.randn(out.shape, generator=GENERATOR, dtype=torch.float64)
    grads = [torch.autograd.grad(x, (q, k, v), upstream) for x in (weights @ v, out)]
    torch.testing.assert_close(*grads)


def test_rows_sum_to_one_or_see_nothing() -> None:
    q, k, _ = operands(BATCH)
    sums = fastattn.attention_weights(q, k, MASK).sum(-1)
    expected = torch.ones_like(sums)
    expected[1, :, 2] = 0
    torch.testing.assert_close(sums, expected)
    with_sink = fastattn.attention_weights(q, k, MASK, sinks=SINKS).sum(-1)
    assert (with_sink < sums)[sums > 0.5].all()
    assert (with_sink >= 0).all()


def test_shared_heads_and_other_numbers_of_dimensions() -> None:
    q, k, v = operands(BATCH, nheads_k=2)
    weights = fastattn.attention_weights(q, k, enable_gqa=True)
    torch.testing.assert_close(weights, fastattn.attention_weights(q, k.repeat_interleave(2, 1)))
    q, k, v = operands(3, BATCH)
    assert fastattn.attention_weights(q, k).shape == (3, BATCH, HEADS, SEQLEN_Q, SEQLEN_K)
    torch.testing.assert_close(fastattn.attention_weights(q, k)[1], fastattn.attention_weights(q[1], k[1]))
    one = fastattn.attention_weights(q[0, 0, 0], k[0, 0, 0])
    assert one.shape == (SEQLEN_Q, SEQLEN_K)
    torch.testing.assert_close(one, fastattn.attention_weights(q, k)[0, 0, 0])


def test_dtype_is_the_query_s() -> None:
    q, k, _ = operands(BATCH)
    half = fastattn.attention_weights(q.half(), k.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(
        half.double(), fastattn.attention_weights(q.half().double(), k.half().double()).half().double()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(BATCH, HEADS, SEQLEN_K, DIM + 1, dtype=torch.float64)}, "head_dim"),
        ({"attn_mask": torch.ones(3, 3, dtype=torch.bool)}, r"attn_mask: shape \(3, 3\) does not broadcast"),
        ({"sinks": SINKS[:2]}, r"sinks: must be floats of shape \(nheads,\) = \(4,\)"),
        ({"softcap": 0.0}, "softcap"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    q, k, _ = operands(BATCH)
    with pytest.raises(ValueError, match=message):
        fastattn.attention_weights(**({"query": q, "key": k} | change))


def test_nested_tensors_are_refused() -> None:
    rows = [torch.randn(n, 2, 4).requires_grad_() for n in (3, 5)]
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    with pytest.raises(ValueError, match="query, key: must not be nested"):
        fastattn.attention_weights(nested, nested)
