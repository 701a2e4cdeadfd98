"""flash_attn_with_kvcache: what is written into the cache, and attention over what it holds, by the definition."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.integrations.flash_attn import flash_attn_with_kvcache
from tests.integrations.dense import attention

BACKENDS = {"cpu": torch.float32, "torch": torch.float32, "reference": torch.float64}
BATCH, HEADS, HEADS_K, DIM, PLACES, PAGE = 3, 4, 2, 8, 12, 4
SLOPES = torch.tensor([0.5, 0.25, 0.01, 2.0])
SLOPES_OF_BATCH = torch.stack([SLOPES, SLOPES.flip(0), SLOPES / 3])
SEQLENS = torch.tensor([5, 0, 9], dtype=torch.int32)

ARGUMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window_size": (4, 1), "softmax_scale": 0.7},
    "causal window softcap": {"causal": True, "window_size": (3, -1), "softcap": 0.8},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi of batch, causal": {"alibi_slopes": SLOPES_OF_BATCH, "causal": True},
    "num_splits": {"num_splits": 3},
}


class Cache:
    """Keys and values in one of the arrangements, NaN where there are none, and what each sequence should see of it."""

    def __init__(self, kind: str, dtype: torch.dtype, empty: float, seqlens: Tensor = SEQLENS) -> None:
        self.kind, self.rows = kind, torch.arange(BATCH)
        self.options: dict[str, Any] = {}
        first = [0] * BATCH
        shape = (BATCH + 1, PLACES)  # one sequence more than are meant
        if kind == "batch_idx":
            self.rows = torch.tensor([2, 0, 3])
            self.options["cache_batch_idx"] = self.rows.int()
        if kind == "leftpad":
            first = [2, 0, 9]
            self.options["cache_leftpad"] = torch.tensor(first, dtype=torch.int32)
        if kind == "pages":
            self.table = torch.randperm(11, dtype=torch.int32)[:9].reshape(3, 3)
            self.options["block_table"] = self.table
            shape = (11, PAGE)
        self.k, self.v = (torch.full((*shape, HEADS_K, DIM), empty, dtype=dtype) for _ in "kv")
        for x in (self.k, self.v):
            for b in range(BATCH):
                for j in range(first[b], int(seqlens[b])):
                    x[self.place(b, j)] = torch.randn(HEADS_K, DIM, dtype=dtype)
        self.first = first

    def place(self, b: int, j: int) -> tuple[int, int]:
        """Where sequence b has its key j."""
        if self.kind == "pages":
            return int(self.table[b, j // PAGE]), j % PAGE
        return int(self.rows[b]), j

    def seen(self, x: Tensor, b: int, length: int) -> Tensor:
        return torch.stack([x[self.place(b, j)] for j in range(self.first[b], length)] or [x[0, 0]])[
            : max(0, length - self.first[b])
        ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dense", "batch_idx", "leftpad", "pages"])
@pytest.mark.parametrize("new", [None, 1, 3])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_cache(backend: str, kind: str, new: int | None, name: str) -> None:
    dtype, arguments = BACKENDS[backend], ARGUMENTS[name]
    cache = Cache(kind, dtype, 0.0 if backend == "torch" else torch.nan)
    q = torch.randn(BATCH, 2, HEADS, DIM, dtype=dtype)
    k, v = (None if new is None else torch.randn(BATCH, new, HEADS_K, DIM, dtype=dtype) for _ in "kv")
    expected_k, expected_v = cache.k.clone(), cache.v.clone()
    for b in range(BATCH):
        for t in range(new or 0):
            place = cache.place(b, int(SEQLENS[b]) + t)
            expected_k[place], expected_v[place] = k[b, t], v[b, t]
    with fastattn.use_backend(backend):
        out, lse = flash_attn_with_kvcache(
            q, cache.k, cache.v, k, v, cache_seqlens=SEQLENS, return_softmax_lse=True, **cache.options, **arguments
        )
        only_out = flash_attn_with_kvcache(
            q, cache.k, cache.v, cache_seqlens=SEQLENS + (new or 0), **cache.options, **arguments
        )
    torch.testing.assert_close(cache.k, expected_k, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(cache.v, expected_v, rtol=0, atol=0, equal_nan=True)
    assert out.is_contiguous() and out.shape == q.shape and lse.shape == (BATCH, HEADS, 2)
    options = {x: y for x, y in arguments.items() if x not in ("alibi_slopes", "num_splits")}
    for b in range(BATCH):
        length = int(SEQLENS[b]) + (new or 0)
        slopes = arguments.get("alibi_slopes")
        slopes = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        keys, values = (cache.seen(x, b, length).double() for x in (cache.k, cache.v))
        want, want_lse, _ = attention(q[b].double(), keys, values, slopes=slopes, **options)
        for actual in (out, only_out):
            torch.testing.assert_close(actual[b].double(), want, rtol=2e-5, atol=1e-5)
        torch.testing.assert_close(lse[b].double(), want_lse, rtol=2e-5, atol=1e-5)


def test_lengths_may_be_one_int_or_missing() -> None:
    cache, q = Cache("dense", torch.float32, 0.0, torch.tensor([PLACES] * 3)), torch.randn(BATCH, 2, HEADS, DIM)
    lengths = torch.tensor([7] * 3, dtype=torch.int32)
    expected = flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=lengths, causal=True)
    assert torch.equal(flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=7, causal=True), expected)
    everything = flash_attn_with_kvcache(q, cache.k, cache.v, causal=True, alibi_slopes=SLOPES)
    twelve = flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=PLACES, causal=True, alibi_slopes=SLOPES)
    torch.testing.assert_close(everything, twelve)
    assert not torch.equal(everything, expected)


def test_there_are_no_gradients() -> None:
    cache, q = Cache("dense", torch.float32, 0.0), torch.randn(BATCH, 1, HEADS, DIM, requires_grad=True)
    k = torch.randn(BATCH, 1, HEADS_K, DIM, requires_grad=True)
    out = flash_attn_with_kvcache(q, cache.k, cache.v, k, k, cache_seqlens=SEQLENS)
    assert not out.requires_grad and not cache.k.requires_grad


def test_decoding_step_by_step_is_the_causal_pass() -> None:
    """Tokens one by one, into a cache that begins empty."""
    tokens = [torch.randn(BATCH, 6, heads, DIM) for heads in (HEADS, HEADS_K, HEADS_K)]
    caches = [torch.full((BATCH, PLACES, HEADS_K, DIM), torch.nan) for _ in "kv"]
    steps = []
    for t in range(6):
        q, k, v = (x[:, t : t + 1] for x in tokens)
        steps.append(flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=t, causal=True))
    q, k, v = (x.transpose(1, 2) for x in tokens)
    expected = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(torch.cat(steps, 1), expected)


@pytest.mark.long
def test_compiled() -> None:
    torch._dynamo.reset()
    q, k = torch.randn(BATCH, 1, HEADS, DIM), torch.randn(BATCH, 1, HEADS_K, DIM)
    step = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    caches = [Cache("pages", torch.float32, 0.0) for _ in range(2)]
    caches[1].table.copy_(caches[0].table)
    caches[1].k.copy_(caches[0].k), caches[1].v.copy_(caches[0].v)
    outs = [
        function(q, cache.k, cache.v, k, k, cache_seqlens=SEQLENS, causal=True, alibi_slopes=SLOPES, **cache.options)
        for function, cache in zip((step, flash_attn_with_kvcache), caches, strict=True)
    ]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(caches[0].k, caches[1].k)


# ---- what is refused ----

Q, C, N = torch.zeros(3, 2, 4, 8), torch.zeros(4, 12, 2, 8), torch.zeros(3, 1, 2, 8)
TABLE = torch.zeros(3, 3, dtype=torch.int32)


@pytest.mark.parametrize("name", ["rotary_cos", "rotary_sin"])
def test_rotary_embeddings_are_refused_by_name(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{name}: not applied here; rotate q and k before the call"):
        flash_attn_with_kvcache(Q, C, C, N, N, cache_seqlens=3, **{name: torch.zeros(12, 4)})


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((None, C, C), {}, "q: must be a tensor, got None"),
        ((Q, C[0], C), {}, "k_cache: must have four dimensions, in torch.float32, got (12, 2, 8), torch.float32"),
        (
            (Q, C, C.half()),
            {},
            "v_cache: must have four dimensions, in torch.float32, got (4, 12, 2, 8), torch.float16",
        ),
        ((Q, C, C[:, :5]), {}, "v: shape (3, 5, 2, 8) differs from k's (3, 12, 2, 8)"),
        ((Q, C[:2], C[:2]), {}, "k: batch 2 differs from q's 3"),
        ((Q, C, C, N), {"cache_seqlens": 3}, "k, v: must both be given, or none"),
        ((Q, C, C, N, N), {}, "cache_seqlens: must be given with k, which is written behind them"),
        ((Q, C, C, N[:2], N), {"cache_seqlens": 3}, "k: must be (3, 1, 2, 8), torch.float32, got (2, 1, 2, 8)"),
        ((Q, C, C, N, N.half()), {"cache_seqlens": 3}, "v: must be (3, 1, 2, 8), torch.float32, got (3, 1, 2, 8)"),
        ((Q, C, C), {"cache_seqlens": 13}, "cache_seqlens: must be in [0, 12], the 12 places of the cache less 0"),
        (
            (Q, C, C, N, N),
            {"cache_seqlens": 12},
            "cache_seqlens: must be in [0, 11], the 12 places of the cache less 1",
        ),
        ((Q, C, C), {"cache_seqlens": -1}, "cache_seqlens: must be in [0, 12]"),
        (
            (Q, C, C),
            {"cache_seqlens": TABLE[0].long()},
            "cache_seqlens: must be int32, (batch,) = (3,), got torch.int64",
        ),
        ((Q, C, C), {"cache_leftpad": TABLE[0, :2]}, "cache_leftpad: must be int32, (batch,) = (3,), got torch.int32"),
        ((Q, C, C), {"cache_batch_idx": TABLE[0, :2]}, "cache_batch_idx: must be int32, (batch,) = (3,)"),
        (
            (Q, C, C),
            {"cache_batch_idx": TABLE[0], "block_table": TABLE},
            "cache_batch_idx: must be None where there is a block_table",
        ),
        ((Q, C, C), {"block_table": TABLE[:2]}, "block_table: must be int32, (batch, blocks) = (3, ...), got"),
        (
            (Q, C, C, N, N),
            {"block_table": TABLE, "cache_seqlens": 36},
            "cache_seqlens: must be in [0, 35], the 36 places of block_table less 1 new ones, got 36 for sequence 0",
        ),
    ],
)
def test_what_is_refused(args: Any, options: dict[str, Any], message: str) -> None:
    """And the cache is as it was."""
    before = C.clone()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        flash_attn_with_kvcache(*args, **options)
    assert torch.equal(C, before)


@pytest.mark.parametrize("page", [-1, 4])
@pytest.mark.parametrize("new", [(), (N, N)], ids=["read", "written"])
@pytest.mark.parametrize(("name", "what"), [("block_table", "pages"), ("cache_batch_idx", "sequences of the cache")])
def test_places_outside_the_cache_are_refused(name: str, what: str, new: tuple[Tensor, ...], page: int) -> None:
    """Torch would count negative ones from the end; and the cache is as it was."""
    places, before = TABLE.clone() if name == "block_table" else TABLE[0].clone(), C.clone()
    places[2] = page
    message = f"{name}: must be in [0, 3], one of 4 {what}, got {page} for sequence 2"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        flash_attn_with_kvcache(Q, C, C, *new, cache_seqlens=5, **{name: places})
    assert torch.equal(C, before)


@pytest.mark.parametrize("page", [-1, 1000])
def test_entries_behind_the_keys_may_be_anything(page: int) -> None:
    cache = Cache("pages", torch.float32, 0.0)
    used = torch.arange(3) * PAGE < SEQLENS[:, None]
    tables = cache.table, cache.table.where(used, page)
    assert not used.all()
    q = torch.randn(BATCH, 2, HEADS, DIM)
    expected, actual = (
        flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=SEQLENS, block_table=table) for table in tables
    )
    assert torch.equal(actual, expected)
