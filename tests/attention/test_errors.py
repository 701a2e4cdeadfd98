"""Bad arguments: ValueError that names the argument, the rule and the value."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fastattn

Q, K, V = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 6)
X = torch.randn(10, 4, 8)
CU = torch.tensor([0, 4, 10], dtype=torch.int32)

DENSE: list[tuple[dict[str, Any], str]] = [
    ({"query": Q[0, 0, 0]}, "query: must be (..., heads, seqlen, head_dim), got shape (8,)"),
    ({"query": Q.int()}, "query: dtype must be float32, float16, bfloat16 or float64, got torch.int32"),
    ({"key": K[0]}, "key: has 3 dimensions, query has 4"),
    ({"key": K.half()}, "key: dtype torch.float16 differs from query's torch.float32"),
    ({"value": V.double()}, "value: dtype torch.float64 differs from query's torch.float32"),
    ({"key": K.to("meta")}, "key: is on meta, query on cpu"),
    ({"key": K[..., :5]}, "key: head_dim 5 differs from query's 8"),
    ({"query": Q[..., :0], "key": K[..., :0]}, "query: head_dim must be at least 1, got 0"),
    ({"value": V[:, :, :8]}, "value: shape (2, 4, 8, 6) differs from key's (2, 4, 9, 8) before the last dimension"),
    ({"key": K[:, :2], "value": V[:, :2]}, "key: has 2 heads, query has 4 (enable_gqa=True groups query heads)"),
    (
        {"key": K[:, :3], "value": V[:, :3], "enable_gqa": True},
        "key: enable_gqa needs query heads to be a multiple of key heads, got 4 and 3",
    ),
    ({"key": K[:1], "value": V[:1]}, "key: batch dimensions (1,) differ from query's (2,)"),
    ({"attn_mask": torch.ones(7, 10) > 0}, "attn_mask: shape (7, 10) does not broadcast to (2, 4, 7, 9)"),
    (
        {"attn_mask": torch.ones(1, 1, 1, 7, 9) > 0},
        "attn_mask: shape (1, 1, 1, 7, 9) does not broadcast to (2, 4, 7, 9)",
    ),
    (
        {"attn_mask": torch.ones(7, 9, dtype=torch.int64)},
        "attn_mask: dtype must be bool (True = may attend) or float (added to the scaled scores), got torch.int64",
    ),
    ({"attn_mask": torch.ones(3, 1, 7, 9)}, "attn_mask: shape (3, 1, 7, 9) does not broadcast to (2, 4, 7, 9)"),
    ({"attn_bias": torch.ones(4, 7, 8)}, "attn_bias: shape (4, 7, 8) does not broadcast to (2, 4, 7, 9)"),
    ({"attn_bias": torch.ones(7, 9).half()}, "attn_bias: a bias must be in float32 or in query's torch.float32"),
    (
        {"attn_bias": torch.ones(7, 9) > 0},
        "attn_bias: a bias must be in float32 or in query's torch.float32, got torch.bool",
    ),
    (
        {"attn_mask": torch.zeros(7, 9), "attn_bias": torch.zeros(7, 9)},
        "attn_bias: a float attn_mask is a bias already; give one of the two",
    ),
    ({"attn_mask": torch.ones(7, 9, device="meta") > 0}, "attn_mask: is on meta, query on cpu"),
    ({"dropout_p": 1.5}, "dropout_p: must be in [0, 1], got 1.5"),
    ({"dropout_p": -0.1}, "dropout_p: must be in [0, 1], got -0.1"),
    ({"dropout_p": float("nan")}, "dropout_p: must be in [0, 1], got nan"),
    ({"window": 5}, "window: must be (left, right), each an int >= 0 or None, got 5"),
    ({"window": (1, 2, 3)}, "window: must be (left, right), each an int >= 0 or None, got (1, 2, 3)"),
    ({"window": (-1, 0)}, "window: must be (left, right), each an int >= 0 or None, got (-1, 0)"),
    ({"window": (1.5, 0)}, "window: must be (left, right), each an int >= 0 or None, got (1.5, 0)"),
    ({"causal_align": "center"}, "causal_align: must be one of ('top-left', 'bottom-right'), got 'center'"),
]

PACKED: list[tuple[dict[str, Any], str]] = [
    ({"query": X[None]}, "query: must be (total_tokens, heads, head_dim), got shape (1, 10, 4, 8)"),
    ({"cu_seqlens_q": CU.long()}, "cu_seqlens_q: dtype must be int32, got torch.int64"),
    ({"cu_seqlens_k": CU[:0]}, "cu_seqlens_k: must have one dimension and at least one element, got shape (0,)"),
    ({"cu_seqlens_k": CU[None]}, "cu_seqlens_k: must have one dimension and at least one element, got shape (1, 3)"),
    ({"cu_seqlens_q": CU.to("meta")}, "cu_seqlens_q: is on meta, the tokens on cpu"),
    ({"cu_seqlens_q": CU + 1}, "cu_seqlens_q: must start at 0, got 1"),
    ({"cu_seqlens_q": CU[[0, 2, 1]]}, "cu_seqlens_q: must not decrease, got a step of -6"),
    ({"key": X[:9], "value": X[:9]}, "cu_seqlens_k: must not exceed the 9 tokens there are, got 10"),
    ({"cu_seqlens_k": CU[:2]}, "cu_seqlens_k: has 2 elements, cu_seqlens_q has 3"),
    ({"max_seqlen_q": 5}, "max_seqlen_q: must be at least the longest length 6, got 5"),
    ({"max_seqlen_k": -1}, "max_seqlen_k: must not be negative, got -1"),
    ({"attn_mask": torch.ones(2, 4, 6, 5) > 0}, "attn_mask: shape (2, 4, 6, 5) does not broadcast to (2, 4, 6, 6)"),
    ({"dropout_p": 2.0}, "dropout_p: must be in [0, 1], got 2.0"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), DENSE, ids=[message for _, message in DENSE])
def test_dense(changes: dict[str, Any], message: str) -> None:
    arguments = {"query": Q, "key": K, "value": V} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        fastattn.scaled_dot_product_attention(**arguments)
    with pytest.raises(ValueError, match=re.escape(message)):
        fastattn.explain(**arguments)


@pytest.mark.parametrize(("changes", "message"), PACKED, ids=[message for _, message in PACKED])
def test_packed(changes: dict[str, Any], message: str) -> None:
    arguments = {"query": X, "key": X, "value": X, "cu_seqlens_q": CU, "cu_seqlens_k": CU}
    with pytest.raises(ValueError, match=re.escape(message)):
        fastattn.varlen_attention(**(arguments | {"max_seqlen_q": 6, "max_seqlen_k": 6} | changes))


def test_the_valid_calls_are_valid() -> None:
    assert fastattn.scaled_dot_product_attention(Q, K, V).shape == (2, 4, 7, 6)
    assert fastattn.varlen_attention(X, X, X, CU, CU, 6, 6).shape == X.shape
