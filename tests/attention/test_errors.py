"""Bad arguments: ValueError that names the argument, the rule and the value."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

import fastattn

Q, K, V = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 6)
X = torch.randn(10, 4, 8)
CU, USED = torch.tensor([0, 4, 10], dtype=torch.int32), torch.tensor([4, 9], dtype=torch.int32)

DENSE: list[tuple[dict[str, Any], str]] = [
    ({"query": Q[0, 0, 0]}, "query: must be (..., heads, seqlen, head_dim), got shape (8,)"),
    ({"query": Q.int()}, "query: dtype must be float32, float16, bfloat16 or float64, got torch.int32"),
    ({"key": K[0, 0, 0]}, "key: must be (..., heads, seqlen, head_dim), got shape (8,)"),
    ({"key": K.half()}, "key: dtype torch.float16 differs from query's torch.float32"),
    ({"value": V.double()}, "value: dtype torch.float64 differs from query's torch.float32"),
    ({"key": K.to("meta")}, "key: is on meta, query on cpu"),
    ({"key": K[..., :5]}, "key: head_dim 5 differs from query's 8"),
    ({"query": Q[..., :0], "key": K[..., :0]}, "query: head_dim must be at least 1, got 0"),
    ({"value": V[:, :, :8]}, "value: shape (2, 4, 8, 6) differs from key's (2, 4, 9, 8) in seqlen"),
    ({"key": K[:, :2], "value": V[:, :2]}, "key: has 2 heads, query has 4 (enable_gqa=True groups query heads)"),
    (
        {"key": K[:, :3], "value": V[:, :3], "enable_gqa": True},
        "key: enable_gqa needs query heads to be a multiple of key heads, got 4 and 3",
    ),
    ({"key": K.repeat(2, 1, 1, 1)}, "key: batch dimensions (4,) do not broadcast with query's (2,)"),
    (
        {"value": V.repeat(2, 1, 1, 1)},
        "value: batch dimensions (4,) do not broadcast with query's and key's (2,)",
    ),
    ({"value": V[:, :2]}, "value: has 2 heads, query has 4 (enable_gqa=True groups query heads)"),
    (
        {"value": V[:, :3], "enable_gqa": True},
        "value: enable_gqa needs query heads to be a multiple of value heads, got 4 and 3",
    ),
    (
        {"query": Q[:, :1], "enable_gqa": True},
        "key: enable_gqa needs query heads to be a multiple of key heads, got 1 and 4",
    ),
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
    ({"dropout_p": None}, "dropout_p: must be a number in [0, 1], got None"),
    ({"dropout_p": True}, "dropout_p: must be a number in [0, 1], got True"),
    ({"dropout_p": "0.1"}, "dropout_p: must be a number in [0, 1], got '0.1'"),
    ({"dropout_p": torch.tensor(0.1)}, "dropout_p: must be a number in [0, 1], got a Tensor of shape ()"),
    ({"scale": float("nan")}, "scale: must be a finite number, got nan"),
    ({"scale": float("-inf")}, "scale: must be a finite number, got -inf"),
    ({"scale": 10**400}, "scale: must be a finite number, got inf"),
    ({"scale": True}, "scale: must be a finite number, got True"),
    ({"scale": "1"}, "scale: must be a finite number, got '1'"),
    ({"scale": 1j}, "scale: must be a finite number, got 1j"),
    ({"scale": [0.5]}, "scale: must be a finite number, got [0.5]"),
    ({"scale": np.ones(4)}, "scale: must be a finite number, got array([1., 1., 1., 1.])"),
    (
        {"scale": torch.nn.Parameter(torch.ones(4, 1, 1))},
        "scale: must be a finite number, got a Parameter of shape (4, 1, 1); a learned or per-head scale is a factor of"
        " the query: (query * scale, ..., scale=1.0)",
    ),
    ({"is_causal": 1}, "is_causal: must be True or False, got 1"),
    ({"is_causal": None}, "is_causal: must be True or False, got None"),
    ({"is_causal": torch.tensor(True)}, "is_causal: must be True or False, got a Tensor of shape ()"),
    ({"enable_gqa": 1}, "enable_gqa: must be True or False, got 1"),
    ({"enable_gqa": "yes"}, "enable_gqa: must be True or False, got 'yes'"),
    ({"window": "no"}, "window: must be (left, right), each an int >= 0 or None, got 'no'"),
    ({"window": (True, 0)}, "window: must be (left, right), each an int >= 0 or None, got (True, 0)"),
    ({"window": (torch.tensor(1), 0)}, "window: must be (left, right), each an int >= 0 or None, got (tensor(1), 0)"),
    ({"causal_align": None}, "causal_align: must be one of ('top-left', 'bottom-right'), got None"),
    ({"query": None}, "query: must be a tensor, got None"),
    ({"key": [1.0]}, "key: must be a tensor, got [1.0]"),
    ({"value": np.zeros((2, 4, 9, 6))}, "value: must be a tensor, got numpy.ndarray"),
    (
        {"attn_mask": 0.0, "dropout_p": None, "is_causal": True},  # FlashAttention's dropout_p, softmax_scale, causal
        "attn_mask: must be a tensor, got 0.0; the order is query, key, value, attn_mask, dropout_p, is_causal",
    ),
    ({"attn_mask": [[True]]}, "attn_mask: must be a tensor, got [[True]]"),
    ({"attn_bias": 1}, "attn_bias: must be a tensor, got 1"),
    (
        {"attn_mask": torch.ones(2, 9) > 0},
        "attn_mask: shape (2, 9) does not broadcast to (2, 4, 7, 9); a mask of padding is attn_mask[:, None, None, :]",
    ),
    (
        {name: x.transpose(1, 2) for name, x in (("query", Q), ("key", K), ("value", V))},
        "key: has 9 heads, query has 7 (enable_gqa=True groups query heads); the layout is (..., heads, seqlen,"
        " head_dim), FlashAttention's (batch, seqlen, heads, head_dim) takes transpose(1, 2)",
    ),
    ({"window": 5}, "window: must be (left, right), each an int >= 0 or None, got 5"),
    ({"window": (1, 2, 3)}, "window: must be (left, right), each an int >= 0 or None, got (1, 2, 3)"),
    ({"window": (-1, 0)}, "window: must be (left, right), each an int >= 0 or None, got (-1, 0)"),
    ({"window": (1.5, 0)}, "window: must be (left, right), each an int >= 0 or None, got (1.5, 0)"),
    ({"causal_align": "center"}, "causal_align: must be one of ('top-left', 'bottom-right'), got 'center'"),
    ({"softcap": 0}, "softcap: must be None or a number from 1e-30 to 1e38, got 0.0"),
    ({"softcap": -1.0}, "softcap: must be None or a number from 1e-30 to 1e38, got -1.0"),
    ({"softcap": float("inf")}, "softcap: must be None or a number from 1e-30 to 1e38, got inf"),
    ({"softcap": 1e300}, "softcap: must be None or a number from 1e-30 to 1e38, got 1e+300"),
    ({"softcap": 1e-40}, "softcap: must be None or a number from 1e-30 to 1e38, got 1e-40"),
    ({"softcap": float("nan")}, "softcap: must be None or a number from 1e-30 to 1e38, got nan"),
    ({"softcap": "1"}, "softcap: must be None or a number from 1e-30 to 1e38, got '1'"),
    ({"softcap": torch.tensor(1.0)}, "softcap: must be None or a number from 1e-30 to 1e38, got a Tensor of shape ()"),
    ({"sinks": 0.0}, "sinks: must be a tensor, got 0.0"),
    ({"sinks": torch.zeros(3)}, "sinks: must be floats of shape (nheads,) = (4,), got torch.float32, (3,)"),
    ({"sinks": torch.zeros(4, 1)}, "sinks: must be floats of shape (nheads,) = (4,), got torch.float32, (4, 1)"),
    ({"sinks": torch.zeros(4).int()}, "sinks: must be floats of shape (nheads,) = (4,), got torch.int32, (4,)"),
    ({"sinks": torch.zeros(4, device="meta")}, "sinks: is on meta, query on cpu"),
    ({"seqused_k": [9, 9]}, "seqused_k: must be a tensor, got [9, 9]"),
    ({"seqused_k": USED.long()}, "seqused_k: must be int32 of shape (batch,) = (2,), got torch.int64, (2,)"),
    ({"seqused_k": USED[:1]}, "seqused_k: must be int32 of shape (batch,) = (2,), got torch.int32, (1,)"),
    ({"seqused_k": USED.to("meta")}, "seqused_k: is on meta, query on cpu"),
    ({"seqused_k": USED + 1}, "seqused_k: must be in [0, 9], the keys of sequence 1, got 10"),
    ({"seqused_k": USED - 5}, "seqused_k: must be in [0, 9], the keys of sequence 0, got -1"),
    ({"dropout_seed": 7}, "dropout_seed: must be a tensor, got 7"),
    ({"dropout_seed": USED}, "dropout_seed: must be int64 of shape (1,), got torch.int32, (2,)"),
    ({"dropout_seed": torch.zeros(1)}, "dropout_seed: must be int64 of shape (1,), got torch.float32, (1,)"),
    ({"dropout_seed": torch.tensor(1)}, "dropout_seed: must be int64 of shape (1,), got torch.int64, ()"),
    ({"dropout_seed": torch.zeros(1, device="meta").long()}, "dropout_seed: is on meta, query on cpu"),
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
    ({"max_seqlen_k": 2**31}, "max_seqlen_k: must be below 2**31, got 2147483648"),
    ({"max_seqlen_q": None}, "max_seqlen_q: must be an int, got None"),
    ({"max_seqlen_q": 6.0}, "max_seqlen_q: must be an int, got 6.0"),
    ({"max_seqlen_q": True}, "max_seqlen_q: must be an int, got True"),
    ({"max_seqlen_k": "6"}, "max_seqlen_k: must be an int, got '6'"),
    ({"max_seqlen_k": CU.max()}, "max_seqlen_k: must be an int, got a Tensor of shape ()"),
    ({"max_seqlen_k": np.array([6, 6])}, "max_seqlen_k: must be an int, got array([6, 6])"),
    ({"cu_seqlens_q": [0, 4, 10]}, "cu_seqlens_q: must be a tensor, got [0, 4, 10]"),
    ({"cu_seqlens_k": None}, "cu_seqlens_k: must be a tensor, got None"),
    ({"query": None}, "query: must be a tensor, got None"),
    ({"key": X[0]}, "key: must be (total_tokens, heads, head_dim), got shape (4, 8)"),
    ({"value": X[:9]}, "value: shape (9, 4, 8) differs from key's (10, 4, 8) in total_tokens"),
    ({"key": X[:, :2]}, "key: has 2 heads, query has 4 (enable_gqa=True groups query heads)"),
    ({"attn_mask": True}, "attn_mask: must be a tensor, got True"),
    ({"scale": float("inf")}, "scale: must be a finite number, got inf"),
    ({"is_causal": 0}, "is_causal: must be True or False, got 0"),
    ({"enable_gqa": None}, "enable_gqa: must be True or False, got None"),
    ({"attn_mask": torch.ones(2, 4, 6, 5) > 0}, "attn_mask: shape (2, 4, 6, 5) does not broadcast to (2, 4, 6, 6)"),
    ({"dropout_p": 2.0}, "dropout_p: must be in [0, 1], got 2.0"),
    ({"softcap": 0.0}, "softcap: must be None or a number from 1e-30 to 1e38, got 0.0"),
    ({"sinks": torch.zeros(5)}, "sinks: must be floats of shape (nheads,) = (4,), got torch.float32, (5,)"),
    ({"seqused_k": CU}, "seqused_k: must be int32 of shape (batch,) = (2,), got torch.int32, (3,)"),
    ({"seqused_k": USED}, "seqused_k: must be in [0, 6], the keys of sequence 1, got 9"),
    ({"dropout_seed": CU.long()}, "dropout_seed: must be int64 of shape (1,), got torch.int64, (3,)"),
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
