"""flash-attn's interface: every argument, forward and backward, against its definition over all pairs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.integrations import flash_attn
from fastattn.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from tests.integrations.dense import attention
from tests.support.cases import cumulative

BACKENDS = {"cpu": torch.float32, "torch": torch.float64, "reference": torch.float64}
HEADS, HEADS_K, DIM, DIM_V = 4, 2, 8, 6
SLOPES = torch.tensor([0.5, 0.25, 0.01, 2.0])
SLOPES_OF_BATCH = torch.stack([SLOPES, SLOPES.flip(0), SLOPES / 3])

ARGUMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "softmax_scale": {"softmax_scale": 0.7},
    "causal": {"causal": True},
    "left": {"window_size": (2, -1)},
    "right": {"window_size": (-1, 3)},
    "window": {"window_size": (3, 1)},
    "window of a tensor": {"window_size": torch.tensor([1, 2])},
    "causal left": {"causal": True, "window_size": (2, 5)},
    "softcap": {"softcap": 0.8},
    "negative softcap": {"softcap": -1.0},
    "softcap None": {"softcap": None},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi causal": {"alibi_slopes": SLOPES, "causal": True},
    "alibi right 0": {"alibi_slopes": SLOPES, "window_size": (4, 0)},
    "alibi window": {"alibi_slopes": SLOPES, "window_size": (4, 2)},
    "alibi of batch": {"alibi_slopes": SLOPES_OF_BATCH},
    "alibi of batch, causal": {"alibi_slopes": SLOPES_OF_BATCH, "causal": True},
    "deterministic": {"deterministic": True},
    "dropout": {"dropout_p": 0.4},
    "all": {
        "dropout_p": 0.4,
        "softmax_scale": 0.7,
        "causal": True,
        "window_size": (4, -1),
        "softcap": 1.5,
        "alibi_slopes": SLOPES_OF_BATCH,
        "deterministic": True,
    },
    "all, looking ahead": {
        "dropout_p": 0.4,
        "softmax_scale": 0.7,
        "window_size": (4, 2),
        "softcap": 1.5,
        "alibi_slopes": SLOPES_OF_BATCH,
    },
}


def leaves(total_q: tuple[int, ...], total_k: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    shapes = ((*total_q, HEADS, DIM), (*total_k, HEADS_K, DIM), (*total_k, HEADS_K, DIM_V))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, b: int, pattern: Tensor | None, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and S_dmask of sequence b; pattern, (nheads, seqlen_q, seqlen_k), says what dropout kept."""
    options = {name: x for name, x in arguments.items() if name not in ("alibi_slopes", "deterministic")}
    if options.get("softcap", 0.0) is None:
        options["softcap"] = 0.0
    slopes = arguments.get("alibi_slopes")
    if slopes is not None and slopes.dim() == 2:
        slopes = slopes[b]
    keep = None if pattern is None else ~pattern.signbit()
    out, lse, weights = attention(q, k, v, **options, slopes=slopes, keep=keep)
    return out, lse, weights if keep is None else torch.where(keep, weights, -weights)


def assert_same(actual: Any, expected: Any) -> None:
    exact = actual[0].dtype == torch.float64
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=1e-9 if exact else 2e-5, atol=1e-9 if exact else 1e-5)


def assert_same_gradients(actual: Any, expected: Any, inputs: list[Tensor]) -> None:
    """Through out and lse, whose rows without keys have none."""
    upstream = [torch.randn_like(x) for x in actual]
    upstream[1][actual[1] == -torch.inf] = 0
    ours = torch.autograd.grad(actual, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, [u.to(x.dtype) for u, x in zip(upstream, expected, strict=True)])
    assert_same(ours, [x.nan_to_num() for x in theirs])


# ---- dense ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(7, 11), (11, 7), (1, 5)], ids=str)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_dense(backend: str, lengths: tuple[int, int], name: str) -> None:
    dtype, arguments = BACKENDS[backend], ARGUMENTS[name]
    inputs = leaves((3, lengths[0]), (3, lengths[1]), dtype)
    with fastattn.use_backend(backend):
        out, lse, pattern = flash_attn_func(*inputs, **arguments, return_attn_probs=True)
        has_dropout = "dropout_p" in arguments
        parts = [
            by_definition(*(x[b].double() for x in inputs), b, pattern[b] if has_dropout else None, arguments)
            for b in range(3)
        ]
        expected = [torch.stack(x) for x in zip(*parts, strict=True)]
        assert_same([out, lse], expected[:2])
        assert out.is_contiguous() and out.shape == (3, lengths[0], HEADS, DIM_V)
        assert_same_gradients([out, lse], expected[:2], inputs)
        if has_dropout:
            assert_same([pattern], expected[2:])
            assert not pattern.requires_grad and pattern.signbit().any()
        else:
            assert pattern.shape == (0,)
            assert_same([flash_attn_func(*inputs, **arguments)], expected[:1])


def test_the_slopes_have_their_gradient() -> None:
    """flash-attn has none. Where a row's common part is left out of the bias, that of lse has it."""
    inputs = leaves((3, 7), (3, 11), torch.float64)
    for arguments in ({"causal": True}, {}):
        slopes = SLOPES_OF_BATCH.clone().requires_grad_()
        actual = flash_attn_func(*inputs, **arguments, alibi_slopes=slopes, return_attn_probs=True)[:2]
        parts = [
            by_definition(*(x[b] for x in inputs), b, None, arguments | {"alibi_slopes": slopes}) for b in range(3)
        ]
        expected = [torch.stack(x) for x in zip(*parts, strict=True)][:2]
        upstream = [torch.randn_like(x) for x in actual]
        ours, theirs = (torch.autograd.grad(x, slopes, upstream)[0] for x in (actual, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_large_slopes_far_from_the_start_lose_nothing() -> None:
    """A bias of slope * j alone, and a correction of slope * i, would cancel here to a few digits."""
    q, k, v = (x.detach() for x in leaves((1, 3), (1, 30000), torch.float32))
    slopes = torch.full((HEADS,), 3.0)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes, return_attn_probs=True)
    expected = by_definition(*(x[0].double() for x in (q, k, v)), 0, None, {"causal": True, "alibi_slopes": slopes})
    assert_same([out[0], lse[0]], expected[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    inputs = [x.detach().to(dtype) for x in leaves((3, 7), (3, 11), torch.float32)]
    out, lse, pattern = flash_attn_func(*inputs, **ARGUMENTS["all"], return_attn_probs=True)
    assert out.dtype == pattern.dtype == dtype and lse.dtype == torch.float32
    expected = by_definition(*(x[1].double() for x in inputs), 1, pattern[1], ARGUMENTS["all"])
    for x, y in zip((out[1], lse[1], pattern[1]), expected, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=2e-2, atol=2e-2)


# ---- packed ----

LENGTHS_Q, LENGTHS_K = [5, 0, 7], [3, 4, 9]


def slices(edges: Tensor, b: int) -> slice:
    return slice(int(edges[b]), int(edges[b + 1]))


def assert_sequences(
    results: Any, inputs: list[Tensor], edges: tuple[Tensor, Tensor], arguments: dict[str, Any], grads: bool = True
) -> None:
    """Each sequence is what it is by itself.

    Args:
        results: out, lse and S_dmask.
        inputs: q, k and v, packed.
    """
    out, lse, pattern = results
    parts, q, k, v = [], *inputs
    for b in range(3):
        rows, keys = slices(edges[0], b), slices(edges[1], b)
        n, m = rows.stop - rows.start, keys.stop - keys.start
        seen = pattern[b, :, :n, :m] if pattern.numel() else None
        part = by_definition(q[rows].double(), k[keys].double(), v[keys].double(), b, seen, arguments)
        parts.append(part[:2])
        if seen is not None:
            assert_same([seen], part[2:])
            rest = pattern[b].clone()
            rest[:, :n, :m] = 0
            assert not rest.any()
    expected = [torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], 1)]
    total = int(edges[0][-1])
    assert_same([out[:total], lse[:, :total]], expected)
    assert not out[total:].any() and (lse[:, total:] == -torch.inf).all()
    if grads:
        assert_same_gradients([out[:total], lse[:, :total]], expected, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_packed(backend: str, name: str) -> None:
    """Sequences of all lengths, and tokens of none behind them."""
    dtype, arguments, edges = BACKENDS[backend], ARGUMENTS[name], (cumulative(LENGTHS_Q), cumulative(LENGTHS_K))
    inputs = leaves((14,), (16,), dtype)
    with fastattn.use_backend(backend):
        results = flash_attn_varlen_func(*inputs, *edges, 8, 9, **arguments, return_attn_probs=True)
        assert_sequences(results, inputs, edges, arguments)
        if "dropout_p" not in arguments:
            assert torch.equal(flash_attn_varlen_func(*inputs, *edges, 8, 9, **arguments), results[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["none", "window", "alibi", "alibi of batch, causal", "all", "all, looking ahead"])
def test_packed_with_keys_in_pages(backend: str, name: str) -> None:
    """Pages of four keys in any order; what they hold behind a sequence does not matter."""
    dtype, arguments, edges = BACKENDS[backend], ARGUMENTS[name], (cumulative(LENGTHS_Q), cumulative(LENGTHS_K))
    inputs = [x.detach() for x in leaves((14,), (16,), dtype)]
    table = torch.randperm(15, dtype=torch.int32).reshape(3, 5)
    caches = [torch.full((15, 4, *x.shape[1:]), torch.nan, dtype=dtype) for x in inputs[1:]]
    for x, cache in zip(inputs[1:], caches, strict=True):
        for b in range(3):
            for j, row in enumerate(x[slices(edges[1], b)]):
                cache[table[b, j // 4], j % 4] = row
    if backend == "torch":  # whose plain products let NaN through
        caches = [x.nan_to_num() for x in caches]
    with fastattn.use_backend(backend):
        results = flash_attn_varlen_func(
            inputs[0], *caches, *edges, 8, 9, **arguments, return_attn_probs=True, block_table=table
        )
        assert_sequences(results, inputs, edges, arguments, grads=False)


# ---- several tensors in one ----


def assert_same_bits(
    packed: Callable[..., Any], apart: Callable[..., Any], joint: Tensor, others: list[Tensor]
) -> None:
    """Results and gradients.

    Args:
        packed: joint, others -> results. apart: the parts of joint, others -> results.
    """
    results, gradients = [], []
    for call in (lambda: packed(joint, *others), lambda: apart(*joint.unbind(-3), *others)):
        torch.manual_seed(3)
        *differentiable, pattern = call()
        upstream = [torch.linspace(-1, 1, x.numel()).reshape(x.shape) for x in differentiable]
        results.append([*differentiable, pattern])
        gradients.append(torch.autograd.grad(differentiable, [joint, *others], upstream))
    for x, y in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["all", "all, looking ahead"])
def test_packed_tensors_are_their_parts(name: str) -> None:
    how = ARGUMENTS[name] | {"return_attn_probs": True}
    edges, edges_k = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    q, kv = (torch.randn(3, 7, *shape, DIM, requires_grad=True) for shape in ((HEADS,), (2, HEADS_K)))
    qkv = torch.randn(3, 7, 3, HEADS, DIM, requires_grad=True)
    assert_same_bits(
        lambda kv, q: flash_attn_kvpacked_func(q, kv, **how), lambda k, v, q: flash_attn_func(q, k, v, **how), kv, [q]
    )
    assert_same_bits(
        lambda qkv: flash_attn_qkvpacked_func(qkv, **how), lambda *parts: flash_attn_func(*parts, **how), qkv, []
    )
    q, kv, qkv = (x.detach().flatten(0, 1)[:16].requires_grad_() for x in (q, kv, qkv))
    lengths = edges, edges_k, 8, 9
    assert_same_bits(
        lambda kv, q: flash_attn_varlen_kvpacked_func(q, kv, *lengths, **how),
        lambda k, v, q: flash_attn_varlen_func(q, k, v, *lengths, **how),
        kv,
        [q],
    )
    assert_same_bits(
        lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, edges, 8, **how),
        lambda *parts: flash_attn_varlen_func(*parts, edges, edges, 8, 8, **how),
        qkv,
        [],
    )


def test_positions_are_flash_attn_s() -> None:
    """The arguments in flash-attn's order, without names."""
    q, k, v = (x.detach() for x in leaves((3, 7), (3, 7), torch.float64))
    positional = (0.0, 0.7, True, (4, -1), 1.5, SLOPES, False)
    expected = flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=0.7, causal=True, window_size=(4, -1), softcap=1.5, alibi_slopes=SLOPES
    )
    edges = cumulative([7] * 3)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    v = v[..., :1].expand(k.shape)
    assert torch.equal(flash_attn_func(q, k, v, *positional)[..., :1], flash_attn_func(q, k, v[..., :1], *positional))
    torch.testing.assert_close(
        flash_attn_varlen_func(*flat, edges, edges, 7, 7, *positional).unflatten(0, (3, 7)), expected
    )
    assert torch.equal(
        flash_attn_kvpacked_func(q, torch.stack([k, v], 2), *positional), flash_attn_func(q, k, v, *positional)
    )


# ---- compiled ----


@pytest.mark.long
@pytest.mark.parametrize("name", ["causal", "all", "all, looking ahead"])
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    arguments = ARGUMENTS[name] | {"dropout_p": 0.0}
    inputs, edges = [x.detach() for x in leaves((3, 7), (3, 11), torch.float32)], cumulative([7] * 3)
    flat, edges_k = [x.flatten(0, 1) for x in inputs], cumulative([11] * 3)

    def both() -> list[Tensor]:
        dense = flash_attn_func(*inputs, **arguments, return_attn_probs=True)
        packed = flash_attn_varlen_func(*flat, edges, edges_k, 7, 11, **arguments, return_attn_probs=True)
        return [*dense[:2], *packed[:2]]

    for x, y in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(), both(), strict=True):
        torch.testing.assert_close(x, y)


# ---- what is refused ----

X, E = torch.zeros(3, 5, 4, 8), cumulative([5] * 3)
FLAT, PAGES, TABLE = X.flatten(0, 1), torch.zeros(9, 2, 4, 8), torch.zeros(3, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flash_attn_func(None, X, X), "q: must be a tensor, got None"),
        (lambda: flash_attn_func(X[0], X, X), "q: must be (batch, seqlen, nheads, headdim), got shape (5, 4, 8)"),
        (lambda: flash_attn_func(X, X[0], X), "k: must be (batch, seqlen, nheads, headdim), got shape (5, 4, 8)"),
        (lambda: flash_attn_func(X, X, X[:, :2]), "v: shape (3, 2, 4, 8) differs from k's (3, 5, 4, 8) before headdim"),
        (lambda: flash_attn_func(X, X[:2], X[:2]), "k: batch 2 differs from q's 3"),
        (lambda: flash_attn_func(X, X[..., :4], X), "k: headdim 4 differs from q's 8"),
        (lambda: flash_attn_func(X, X[:, :, :3], X[:, :, :3]), "k: q's heads must be a multiple of its heads, got"),
        (lambda: flash_attn_func(X, X, X, causal=1), "causal: must be True or False, got 1"),
        (lambda: flash_attn_func(X, X, X, dropout_p=2.0), "dropout_p: must be in [0, 1], got 2.0"),
        (lambda: flash_attn_func(X, X, X, window_size=3), "window_size: must be two ints, (left, right), negative"),
        (lambda: flash_attn_func(X, X, X, window_size=(1, 2, 3)), "window_size: must be two ints"),
        (lambda: flash_attn_func(X, X, X, window_size=(1.5, 2)), "window_size: must be two ints"),
        (lambda: flash_attn_func(X, X, X, window_size=None), "window_size: must be two ints"),
        (lambda: flash_attn_func(X, X, X, alibi_slopes=SLOPES[:3]), "alibi_slopes: must be float32, (nheads,) or"),
        (lambda: flash_attn_func(X, X, X, alibi_slopes=SLOPES.double()), "alibi_slopes: must be float32"),
        (lambda: flash_attn_func(X, X, X, alibi_slopes=0.5), "alibi_slopes: must be a tensor, got 0.5"),
        (lambda: flash_attn_func(X, X, X, return_attn_probs=1), "return_attn_probs: must be True or False, got 1"),
        (lambda: flash_attn_kvpacked_func(X, X), "kv: must be (batch, seqlen, 2, nheads, headdim), got"),
        (lambda: flash_attn_qkvpacked_func(X[:, :, None]), "qkv: must be (batch, seqlen, 3, nheads, headdim), got"),
        (lambda: flash_attn_varlen_kvpacked_func(FLAT, FLAT, E, E, 5, 5), "kv: must be (total, 2, nheads, headdim)"),
        (lambda: flash_attn_varlen_qkvpacked_func(FLAT, E, 5), "qkv: must be (total, 3, nheads, headdim), got shape"),
        (lambda: flash_attn_varlen_func(X, FLAT, FLAT, E, E, 5, 5), "q: must be (total, nheads, headdim), got shape"),
        (lambda: flash_attn_varlen_func(FLAT, FLAT, FLAT, E, None, 5, 5), "cu_seqlens_k: must be a tensor, got None"),
        (lambda: flash_attn_varlen_func(FLAT, FLAT, FLAT, E, E[1:], 5, 5), "cu_seqlens_k: both must be (batch + 1,)"),
        (lambda: flash_attn_varlen_func(FLAT, FLAT, FLAT, E, E.long(), 5, 5), "cu_seqlens_k: dtype must be int32"),
        (lambda: flash_attn_varlen_func(FLAT, FLAT, FLAT, E, E, 5, 4), "max_seqlen_k: must be at least the longest"),
        (
            lambda: flash_attn_varlen_func(FLAT, FLAT, FLAT, E, E, 5, 5, block_table=TABLE),
            "k: must be (num_blocks, page_block_size, nheads_k, headdim), got shape (15, 4, 8)",
        ),
        (
            lambda: flash_attn_varlen_func(FLAT, PAGES, PAGES, E, E, 5, 5, block_table=TABLE.long()),
            "block_table: must be int32, (batch, blocks) = (3, ...), got torch.int64, (3, 3)",
        ),
        (
            lambda: flash_attn_varlen_func(FLAT, PAGES, PAGES, E, E, 5, 5, block_table=TABLE[:2]),
            "block_table: must be int32, (batch, blocks) = (3, ...), got torch.int32, (2, 3)",
        ),
        (
            lambda: flash_attn_varlen_func(FLAT, PAGES, PAGES, E, E, 5, 5, block_table=TABLE - 1),
            "block_table: must be in [0, ",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call()


def test_every_function_has_a_docstring() -> None:
    for name in flash_attn.__all__:
        text = getattr(flash_attn, name).__doc__
        assert "Raises:" in text and ("Args:" in text or name == "install_as_flash_attn"), name
