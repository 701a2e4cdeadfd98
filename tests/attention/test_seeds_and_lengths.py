"""Seeds that are given and returned, lengths of keys, and softcap, where the table of cases does not look."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from tests.support.cases import cumulative

BACKENDS = ["cpu", "torch", "reference"]
Q, K, V = torch.randn(3, 2, 4, 6, 8).unbind()
SEED = torch.tensor([-5])


def attend(*args: Any, **options: Any) -> Any:
    return fastattn.scaled_dot_product_attention(*args, **options)


# ---- seeds ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_gives_the_same_mask_anywhere(backend: str) -> None:
    """The same call, the reference's mask, and the packed call."""
    eye = torch.eye(6).expand(2, 4, 6, 6)
    with fastattn.use_backend(backend):
        out = attend(Q, K, eye, dropout_p=0.4, dropout_seed=SEED)
        again, seed = attend(Q, K, eye, dropout_p=0.4, dropout_seed=SEED, return_seed=True)
        edges, tokens = cumulative([6, 6]), [x.transpose(1, 2).flatten(0, 1) for x in (Q, K, eye)]
        packed = fastattn.varlen_attention(*tokens, edges, edges, 6, 6, dropout_p=0.4, dropout_seed=SEED)
    assert torch.equal(out, again) and torch.equal(seed, SEED)
    assert torch.equal(out != 0, fastattn.reference.dropout_mask(SEED, 2, 4, 6, 6, 0.4))
    torch.testing.assert_close(packed.unflatten(0, (2, 6)).transpose(1, 2), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_drawn_seed_is_returned(backend: str) -> None:
    with fastattn.use_backend(backend):
        out, lse, seed = attend(Q, K, V, dropout_p=0.4, return_lse=True, return_seed=True)
        assert torch.equal(attend(Q, K, V, dropout_p=0.4, dropout_seed=seed), out) and lse.shape == (2, 4, 6)
        assert seed.shape == (1,) and seed.dtype == torch.int64
        _, other = attend(Q, K, V, dropout_p=0.4, return_seed=True)
        assert not torch.equal(seed, other)
        assert attend(Q, K, V, dropout_seed=SEED, return_seed=True)[1] is None  # there is no dropout


def test_a_given_seed_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    attend(Q, K, V, dropout_p=0.4, dropout_seed=SEED)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.long
def test_a_seed_in_a_compiled_function() -> None:
    torch._dynamo.reset()
    function = torch.compile(lambda q, seed: attend(q, K, V, dropout_p=0.4, dropout_seed=seed), fullgraph=True)
    for seed in (SEED, SEED + 1):
        torch.testing.assert_close(function(Q, seed), attend(Q, K, V, dropout_p=0.4, dropout_seed=seed))


# ---- lengths of keys ----


def truncated(b: int, n: int, **options: Any) -> Tensor:
    return attend(Q[b : b + 1], K[b : b + 1, :, :n], V[b : b + 1, :, :n], **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align", ["top-left", "bottom-right"])
def test_lengths_cut_the_keys(backend: str, align: Any) -> None:
    """Bottom-right counts from the keys that there are."""
    options = {"window": (2, 1), "causal_align": align}
    with fastattn.use_backend(backend):
        out = attend(Q, K, V, seqused_k=torch.tensor([2, 5], dtype=torch.int32), **options)
        for b, n in enumerate((2, 5)):
            torch.testing.assert_close(out[b : b + 1], truncated(b, n, **options))


def test_lengths_of_several_batch_dimensions() -> None:
    q, k, v = (x.unflatten(0, (2, 1)) for x in (Q, K, V))
    used = torch.tensor([2, 5], dtype=torch.int32)
    torch.testing.assert_close(attend(q, k, v, seqused_k=used)[:, 0], attend(Q, K, V, seqused_k=used))


def test_strided_lengths_are_read_right() -> None:
    used = torch.tensor([2, 0, 5, 0], dtype=torch.int32)[::2]
    torch.testing.assert_close(attend(Q, K, V, seqused_k=used), attend(Q, K, V, seqused_k=used.clone()))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_lengths_beyond_the_keys_are_cut_where_nobody_reads_them(backend: str) -> None:
    from fastattn import backends
    from fastattn.arguments import attention_params
    from fastattn.params import Forward

    p = attention_params(Q, K, V)
    out, lse = torch.empty_like(Q), torch.empty(2, 4, 6)
    used = torch.tensor([-3, 99], dtype=torch.int32)
    backends.get(backend).kernels().attention_fwd(Forward(out, lse), p.replace(seqused_k=used))
    assert not out[0].any() and (lse[0] == -torch.inf).all()
    torch.testing.assert_close(out[1:], truncated(1, 6))


# ---- biases that are no longer finite in the kernels' units ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smallest_bias_masks_like_minus_infinity(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in (Q, K, V))
    bias = torch.zeros(6, 6, dtype=dtype)
    bias[2], bias[3, 1:] = torch.finfo(dtype).min, torch.finfo(dtype).min
    infinite = bias.masked_fill(bias != 0, -torch.inf)
    with fastattn.use_backend("cpu"):
        smallest, masked = (attend(q, k, v, attn_bias=x, return_lse=True) for x in (bias, infinite))
    assert all(torch.equal(x, y) for x, y in zip(smallest, masked, strict=True))
    assert not smallest[0][:, :, 2].any() and torch.equal(smallest[0][:, :, 3], v[:, :, 0])


# ---- softcap ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [1e-3, 0.5, 50.0, 1e6])
def test_scores_approach_the_softcap(backend: str, softcap: float) -> None:
    bias, mask = torch.randn(4, 6, 6), torch.rand(6, 6) < 0.7
    scores = (Q @ K.transpose(-1, -2)).double() * 8**-0.5
    scores = (softcap * torch.tanh(scores / softcap) + bias).masked_fill(~mask, -torch.inf)
    with fastattn.use_backend(backend):
        out = attend(Q, K, V, mask, attn_bias=bias, softcap=softcap)
    torch.testing.assert_close(out.double(), scores.softmax(-1).nan_to_num() @ V.double(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_softcap_bounds_what_would_overflow(backend: str) -> None:
    q, k = (1e18 * x for x in (Q, K))
    with fastattn.use_backend(backend):
        out = attend(q, k, V, softcap=2.0)
    scores = 2 * (Q @ K.transpose(-1, -2)).sign()
    torch.testing.assert_close(out, scores.softmax(-1) @ V)
