"""The CPU kernels against the float64 oracle, on every instruction set of this machine."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import functional
from fastattn.arguments import attention_params
from tests.support.cases import SEVERAL_TILES, UNSEEN_KEYS, WITHIN_ONE_TILE, Case
from tests.support.contract import check, check_unseen_keys
from tests.support.cpu_checks import check_excluded_keys, check_first_keys
from tests.support.cpu_runs import assert_right, assert_same_bits, each_isa, on_cpu, results
from tests.support.unseen_keys import heads_with_nan

VARIED = Case(
    dtype=torch.float16, mask="padding", bias="per-head", band="window", dropout_p=0.3, heads=(4, 2), seqlens=(70, 75)
)


@each_isa
def test_contract(attention_case: Case, isa: str) -> None:
    with on_cpu(isa):
        check(attention_case)


@each_isa
@pytest.mark.parametrize("case", WITHIN_ONE_TILE + SEVERAL_TILES, ids=str)
def test_what_pairs_do_not_promise(case: Case, isa: str) -> None:
    with on_cpu(isa):
        check(case)


# ---- lengths ----


class EveryLength(Case):
    """Packed sequences of every length up to 129, with as many keys in another order."""

    def _lengths(self, longest: int) -> list[int]:
        return [(37 * n if longest == self.seqlens[1] else n) % self.batch % (longest + 1) for n in range(self.batch)]


EVERY_LENGTH: dict[str, dict[str, Any]] = {
    "plain": {},
    "band": {"band": "window-bottom-right"},
    "causal": {"band": "causal", "dtype": torch.bfloat16},
    "mask": {"mask": "random", "dtype": torch.float16},
    "dropout": {"dropout_p": 0.3},
}


@each_isa
@pytest.mark.parametrize("features", EVERY_LENGTH)
def test_every_length(features: str, isa: str) -> None:
    with on_cpu(isa):
        check(
            EveryLength(packed=True, heads=(1, 1), seqlens=(129, 130), batch=130, dims=(8, 3), **EVERY_LENGTH[features])
        )


@each_isa
@pytest.mark.parametrize("n", [5, *range(13, 19), *range(29, 35), 47, 48, 49, 63, 64, 65, 80, 96, 127, 128, 129])
def test_as_many_keys_as_queries(n: int, isa: str) -> None:
    with on_cpu(isa):
        check(Case(seqlens=(n, n), dims=(8, 8), heads=(1, 1), band="causal", dropout_p=0.3, batch=1))


# Around a block of 48 queries, a task of 240 of them, and a block of 256 keys.
EDGES_M, EDGES_N = (47, 48, 49, 95, 97, 239, 240, 241), (255, 256, 257, 511, 512, 513)
FEATURES: tuple[dict[str, Any], ...] = (
    {"band": "causal-bottom-right", "dropout_p": 0.3},
    {"mask": "random", "bias": "full", "dtype": torch.float16},
    {"band": "wide-window", "mask": "padding", "dropout_p": 0.3},
    {"band": "window", "bias": "per-key", "dtype": torch.bfloat16},
    {"mask": "empty-rows", "packed": True},
)


@each_isa
@pytest.mark.parametrize(
    ("n", "seqlens"),
    [*enumerate(zip(EDGES_M, itertools.cycle(EDGES_N), strict=False)), (4, (513, 241)), (0, (257, 49))],
)
def test_around_the_edges_of_blocks(n: int, seqlens: tuple[int, int], isa: str) -> None:
    with on_cpu(isa):
        check(Case(seqlens=seqlens, dims=(16, 8), heads=(2, 1), batch=1, **FEATURES[n % len(FEATURES)]))


@pytest.mark.slow
@each_isa
@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("seqlens", list(itertools.product(EDGES_M, EDGES_N)), ids=str)
def test_around_all_edges_of_blocks(seqlens: tuple[int, int], features: dict[str, Any], isa: str) -> None:
    with on_cpu(isa):
        check(Case(seqlens=seqlens, dims=(16, 8), heads=(2, 1), batch=2, **features))


# ---- head dimensions ----

HEAD_DIMS = (1, 7, 15, 16, 17, 31, 33, 64, 65, 100, 128, 255, 256)


@each_isa
@pytest.mark.parametrize("seqlen_q", [2, 50], ids=["few queries", "queries"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_any_head_dim(head_dim: int, seqlen_q: int, isa: str) -> None:
    dtype = (torch.float32, torch.float16, torch.bfloat16)[head_dim % 3]
    with on_cpu(isa):
        check(Case(dims=(head_dim, 257 - head_dim), seqlens=(seqlen_q, 37), heads=(2, 1), batch=1, dtype=dtype))


def test_a_head_dim_beyond_256_is_refused() -> None:
    q, k, v = (torch.randn(1, 2, n, 257) for n in (3, 5, 5))
    with fastattn.use_backend("cpu"), pytest.raises(NotImplementedError, match="takes head_dim <= 256, got 257"):
        fastattn.scaled_dot_product_attention(q, k, v)
    explanation = fastattn.explain(q, k, v)
    assert explanation.backend == "torch"
    assert explanation.refusals["cpu"] == ["takes head_dim <= 256, got 257"]
    assert fastattn.scaled_dot_product_attention(q, k, v).isfinite().all()


# ---- keys that no query sees ----


@each_isa
@pytest.mark.parametrize("case", UNSEEN_KEYS, ids=str)
def test_unseen_keys(case: Case, isa: str) -> None:
    with on_cpu(isa):
        check_unseen_keys(case)


@each_isa
def test_a_key_matters_to_those_heads_alone_that_see_it(isa: str) -> None:
    with on_cpu(isa):
        assert heads_with_nan() == [True, False, True, True]


@each_isa
@pytest.mark.parametrize("seqlen_q", [1, 3, 4, 7, 50])
@pytest.mark.parametrize("first", [1, 3, 4, 5, 8, 16, 20, 256, 260])
def test_keys_before_the_first_that_a_query_sees(first: int, seqlen_q: int, isa: str) -> None:
    """Padding on the left, and a band that begins there."""
    with on_cpu(isa):
        check_first_keys(first, seqlen_q)


@each_isa
@pytest.mark.parametrize("seqlen_q", [1, 4, 5, 60])
def test_keys_that_a_mask_excludes_among_others(seqlen_q: int, isa: str) -> None:
    with on_cpu(isa):
        check_excluded_keys(seqlen_q)


@each_isa
def test_blocks_that_the_band_excludes_are_never_read(isa: str) -> None:
    q, k, v = (torch.randn(1, 1, n, 16) for n in (32, 600, 600))
    with on_cpu(isa):
        expected = results(q, k, v, window=(0, 31))
        k[:, :, 64:], v[:, :, 64:] = torch.nan, torch.nan
        actual = results(q, k, v, window=(0, 31))
    assert_same_bits(actual, expected)
    assert not actual["dk"][:, :, 64:].any()


# ---- few queries ----


@each_isa
@pytest.mark.parametrize("seqlen_q", [1, 2, 3, 4])
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_few_queries(features: dict[str, Any], seqlen_q: int, isa: str) -> None:
    with on_cpu(isa):
        for seqlen_k in (15, 257) if seqlen_q % 2 else (1, 64, 530):
            check(Case(seqlens=(seqlen_q, seqlen_k), heads=(4, 2), dims=(20, 40), **features))


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_queries_are_like_the_same_ones_among_others(count: int, dtype: torch.dtype, isa: str) -> None:
    q, k, v = (torch.randn(2, heads, n, 40).to(dtype) for heads, n in ((4, 60), (2, 300), (2, 300)))
    mask, bias = torch.rand(2, 1, 1, 300) > 0.2, torch.randn(4, 60, 300)
    seed = torch.tensor([7])
    arguments = {"enable_gqa": True, "is_causal": True, "causal_align": "top-left", "dropout_p": 0.2}

    def attend(rows: int) -> tuple[Tensor, ...]:
        p = attention_params(q[:, :, :rows], k, v, mask, attn_bias=bias[:, :rows], **arguments)
        return functional.attend(p.replace(seed=seed), return_lse=True)

    with on_cpu(isa):
        few, many = attend(count), attend(60)
    for x, y in zip(few, many, strict=True):
        torch.testing.assert_close(x, y[:, :, :count], rtol=2 * torch.finfo(x.dtype).eps, atol=1e-5)


# ---- sizes ----


@each_isa
def test_no_problem_is_too_small(isa: str) -> None:
    sizes = itertools.product((0, 2), (0, 2), (0, 1, 5), (0, 6))
    with on_cpu(isa):
        for batch, heads, seqlen_q, seqlen_k in sizes:
            q, k, v = (torch.randn(batch, heads, n, 8) for n in (seqlen_q, seqlen_k, seqlen_k))
            for bias in (None, torch.randn(seqlen_k), torch.randn(heads, 1, 1)):
                found = results(q, k, v, bias)
                assert not any(x.isnan().any() for x in found.values())
                if seqlen_k == 0:
                    assert not found["out"].any() and not found["dq"].any() and (found["lse"] == -torch.inf).all()
                if seqlen_q == 0:
                    assert not any(found[name].any() for name in found if name in ("dk", "dv", "dbias"))


@each_isa
def test_no_packed_problem_is_too_small(isa: str) -> None:
    x = torch.randn(4, 2, 8)
    with on_cpu(isa):
        for edges in ([0], [0, 0], [0, 0, 0]):
            packed = torch.tensor(edges, dtype=torch.int32)
            found = results(
                x, x, x, cu_seqlens_q=packed, cu_seqlens_k=packed, max_seqlen_q=4, max_seqlen_k=4, is_causal=True
            )
            assert not any(found[name].any() for name in ("out", "dq", "dk", "dv"))
            assert (found["lse"] == -torch.inf).all()


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_no_sequence(dtype: torch.dtype, isa: str) -> None:
    """They may hold NaN, get 0 and change nothing, for few queries as for others."""
    edges = torch.tensor([0, 2, 5], dtype=torch.int32)
    q, k, v, dout = (torch.randn(9, 2, 8).to(dtype) for _ in range(4))
    for longest in (3, 70):
        arguments = {"cu_seqlens_q": edges, "cu_seqlens_k": edges, "max_seqlen_q": longest, "max_seqlen_k": longest}
        with on_cpu(isa):
            clean = results(q, k, v, dout=dout, **arguments)
            poisoned = [torch.cat([x[:5], torch.full_like(x[5:], torch.nan)]) for x in (q, k, v, dout)]
            found = results(*poisoned[:3], dout=poisoned[3], **arguments)
        assert_same_bits(found, clean)
        assert not any(found[name][5:].any() for name in ("out", "dq", "dk", "dv"))
        assert (found["lse"][:, 5:] == -torch.inf).all()


# ---- the gradient of the bias ----


@each_isa
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
@pytest.mark.parametrize("shape", list(itertools.product((1, 3), (1, 4), (1, 19), (1, 21))), ids=str)
def test_bias_gradient_of_every_shape(shape: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    """Beside the reference: a bias of the query's dtype or, next to half types, of float32."""
    q, k, v = (torch.randn(3, heads, n, 8).to(dtype) for heads, n in ((4, 19), (2, 21), (2, 21)))
    for bias_dtype in {dtype, torch.float32}:
        with on_cpu(isa):
            assert_right(q, k, v, torch.randn(shape).to(bias_dtype), enable_gqa=True, is_causal=True)


@each_isa
@pytest.mark.parametrize("batch", [1, 7, 8, 9, 20])
def test_bias_gradient_of_any_number_of_sequences(batch: int, isa: str) -> None:
    """They share at most eight partial sums."""
    with on_cpu(isa):
        check(Case(seqlens=(11, 13), bias="per-head", band="causal", heads=(2, 1), batch=batch))
        check(replace(VARIED, batch=batch % 4 + 1, seqlens=(9, 12)))
