"""Properties that hold for any sizes: padding, order and packing do not matter, rows of weights sum to one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn import functional
from fastattn.arguments import attention_params
from tests.support.cases import cumulative

pytestmark = pytest.mark.parametrize("backend", ["torch", "reference"])
size = st.integers(1, 20)
lengths = st.lists(st.integers(0, 12), min_size=1, max_size=5)
property_test = settings(max_examples=25, deadline=None)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@property_test
@given(seqlen_q=size, seqlen_k=size, padding=size, seed=st.integers(0, 1000))
def test_padding_is_invisible(backend: str, seqlen_q: int, seqlen_k: int, padding: int, seed: int) -> None:
    q, k, v = normal(seed, 2, 2, seqlen_q, 4), normal(seed + 1, 2, 2, seqlen_k, 4), normal(seed + 2, 2, 2, seqlen_k, 4)
    garbage = normal(seed + 3, 2, 2, padding, 4)
    mask = torch.arange(seqlen_k + padding) < seqlen_k
    with fastattn.use_backend(backend):
        plain = fastattn.scaled_dot_product_attention(q, k, v)
        padded = fastattn.scaled_dot_product_attention(q, torch.cat([k, garbage], 2), torch.cat([v, garbage], 2), mask)
    torch.testing.assert_close(padded, plain)


@property_test
@given(seqlen_q=size, seqlen_k=size, seed=st.integers(0, 1000))
def test_the_order_of_keys_is_invisible(backend: str, seqlen_q: int, seqlen_k: int, seed: int) -> None:
    q, k, v = normal(seed, 2, 2, seqlen_q, 4), normal(seed + 1, 2, 2, seqlen_k, 4), normal(seed + 2, 2, 2, seqlen_k, 3)
    bias, order = normal(seed + 3, 2, 1, 1, seqlen_k), torch.randperm(seqlen_k)
    with fastattn.use_backend(backend):
        plain = fastattn.scaled_dot_product_attention(q, k, v, attn_bias=bias)
        moved = fastattn.scaled_dot_product_attention(q, k[:, :, order], v[:, :, order], attn_bias=bias[..., order])
    torch.testing.assert_close(moved, plain)


@property_test
@given(seqlen_q=size, seqlen_k=size, seed=st.integers(0, 1000))
def test_weights_sum_to_one_or_to_nothing(backend: str, seqlen_q: int, seqlen_k: int, seed: int) -> None:
    q, k = normal(seed, 1, 2, seqlen_q, 4), normal(seed + 1, 1, 2, seqlen_k, 4)
    mask = normal(seed + 2, 1, 2, seqlen_q, seqlen_k) > 0.8
    ones = torch.ones(1, 2, seqlen_k, 1, dtype=torch.float64)
    has_key = mask.any(-1).double()
    weights = functional.weights_of(attention_params(q, k, ones, mask))
    with fastattn.use_backend(backend):
        out = fastattn.scaled_dot_product_attention(q, k, ones, mask)
    torch.testing.assert_close(weights.sum(-1), has_key)
    torch.testing.assert_close(out.squeeze(-1), has_key)
    assert not weights[~mask].any()


@property_test
@given(
    lengths_k=lengths,
    is_causal=st.booleans(),
    has_mask=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("causal_align", ["top-left", "bottom-right"])
def test_packed_equals_padded(
    backend: str,
    causal_align: str,
    lengths_k: list[int],
    is_causal: bool,
    has_mask: bool,
    dropout_p: float,
    seed: int,
) -> None:
    lengths_q = [(3 * n + 5) % 11 for n in lengths_k]
    q, k, v = (normal(seed + i, sum(n), 2, 4).requires_grad_() for i, n in enumerate((lengths_q, lengths_k, lengths_k)))
    longest_q, longest_k = max(lengths_q), max(lengths_k)
    kwargs = {"is_causal": is_causal, "causal_align": causal_align, "dropout_p": dropout_p, "return_lse": True}
    shape = (len(lengths_k), 2, longest_q, longest_k)
    mask, bias = (normal(seed + 3, *shape) > -0.5, normal(seed + 4, *shape)) if has_mask else (None, None)
    with fastattn.use_backend(backend):
        torch.manual_seed(seed)
        edges = cumulative(lengths_q), cumulative(lengths_k)
        out, lse = fastattn.varlen_attention(
            q, k, v, *edges, longest_q, longest_k, attn_mask=mask, attn_bias=bias, **kwargs
        )
        dout, dlse = normal(seed, *out.shape), normal(seed + 1, *lse.shape)
        dlse = dlse.masked_fill(lse == -torch.inf, 0.0)
        grads = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
        starts = [e.tolist() for e in edges]
        for b in range(len(lengths_k)):
            rows, keys = slice(*starts[0][b : b + 2]), slice(*starts[1][b : b + 2])
            # A batch whose last sequence is this one, alone: dropout counts with its index.
            one = [x[part].transpose(0, 1).detach() for x, part in ((q, rows), (k, keys), (v, keys))]
            batch = [x.expand(b + 1, *x.shape).clone().requires_grad_() for x in one]
            torch.manual_seed(seed)
            seen = [x if x is None else x[: b + 1, :, : lengths_q[b], : lengths_k[b]] for x in (mask, bias)]
            dense_out, dense_lse = fastattn.scaled_dot_product_attention(*batch, seen[0], attn_bias=seen[1], **kwargs)
            torch.testing.assert_close(dense_out[b].transpose(0, 1), out[rows])
            torch.testing.assert_close(dense_lse[b], lse[:, rows])
            upstream = dout[rows].transpose(0, 1), dlse[:, rows]
            dense_grads = torch.autograd.grad((dense_out[b], dense_lse[b]), batch, upstream)
            for packed, dense, part in zip(grads, dense_grads, (rows, keys, keys), strict=True):
                torch.testing.assert_close(dense[b].transpose(0, 1), packed[part])
