"""The oracle itself: against torch, against a loop written from the definition, against finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import functional, reference
from fastattn.arguments import attention_params, draw_seed, varlen_attention_params
from fastattn.philox import philox4x32
from tests.support.cases import BANDS, Case, cumulative
from tests.support.contract import call, call_reference, leaf


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention by its definition: softmax over the allowed keys of one head, one query at a time."""
    out, lse = torch.zeros(q.size(0), v.size(1), dtype=q.dtype), torch.full((q.size(0),), -torch.inf, dtype=q.dtype)
    for i in range(q.size(0)):
        keys = allowed[i].nonzero().flatten()
        if keys.numel():
            scores = scale * (k[keys] @ q[i]) + bias[i, keys]
            out[i], lse[i] = scores.softmax(0) @ v[keys], scores.exp().sum().log()
    return out, lse


DRAWN = {
    ("causal", 3, 5): "10000 11000 11100",
    ("causal-bottom-right", 3, 5): "11100 11110 11111",
    ("causal-bottom-right", 5, 3): "000 000 100 110 111",
    ("window-bottom-right", 3, 5): "00111 00011 00001",
    ("window", 4, 4): "1111 1111 1111 1111",
    ("causal-window", 2, 4): "1110 1111",
}


def band(name: str, seqlen_q: int, seqlen_k: int) -> list[list[bool]]:
    """The definition: -left <= j - (i + shift) <= right."""
    rule = BANDS[name]
    left, right = rule.get("window") or (None, None)
    right = 0 if rule.get("is_causal") else right
    shift = seqlen_k - seqlen_q if rule.get("causal_align") == "bottom-right" else 0
    return [
        [
            (left is None or j - i - shift >= -left) and (right is None or j - i - shift <= right)
            for j in range(seqlen_k)
        ]
        for i in range(seqlen_q)
    ]


@pytest.mark.parametrize("drawn", DRAWN, ids=str)
def test_bands_are_as_drawn(drawn: tuple[str, int, int]) -> None:
    name, seqlen_q, seqlen_k = drawn
    expected = [[c == "1" for c in row] for row in DRAWN[drawn].split()]
    assert band(name, seqlen_q, seqlen_k) == expected
    q, k = torch.zeros(1, 1, seqlen_q, 4), torch.zeros(1, 1, seqlen_k, 4)
    weights = functional.weights_of(attention_params(q, k, k, **BANDS[name]))
    assert torch.equal(weights[0, 0] > 0, torch.tensor(expected))


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("sizes", [(4, 4), (3, 7), (7, 3), (1, 5), (5, 1)], ids=str)
def test_equals_the_definition(name: str, sizes: tuple[int, int]) -> None:
    (seqlen_q, seqlen_k), nheads = sizes, 2
    q, k, v = (torch.randn(2, nheads, n, 5, dtype=torch.float64) for n in (seqlen_q, seqlen_k, seqlen_k))
    mask, bias = torch.rand(2, 1, seqlen_q, seqlen_k) > 0.3, torch.randn(nheads, 1, seqlen_k, dtype=torch.float64)
    with fastattn.use_backend("reference"):
        out, lse = fastattn.scaled_dot_product_attention(q, k, v, mask, attn_bias=bias, return_lse=True, **BANDS[name])
    allowed = torch.tensor(band(name, seqlen_q, seqlen_k)) & mask
    for b in range(2):
        for h in range(nheads):
            expected = by_definition(q[b, h], k[b, h], v[b, h], allowed[b, 0], bias[h].expand(seqlen_q, -1), 5**-0.5)
            torch.testing.assert_close((out[b, h], lse[b, h]), expected)


@pytest.mark.parametrize(
    "kwargs", [{}, {"is_causal": True}, {"scale": 0.7}, {"attn_mask": "bool"}, {"attn_mask": "float"}]
)
def test_equals_torch(kwargs: dict[str, Any]) -> None:
    q, k, v = (torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    masks = {"bool": torch.rand(2, 1, 6, 6) > 0.2, "float": torch.randn(4, 6, 6, dtype=torch.float64)}
    kwargs = {name: masks.get(value, value) if isinstance(value, str) else value for name, value in kwargs.items()}
    expected = F.scaled_dot_product_attention(q, k, v, **kwargs)
    with fastattn.use_backend("reference"):
        actual = fastattn.scaled_dot_product_attention(q, k, v, **kwargs)
    dout = torch.randn_like(actual)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout)
    )


# Random123's known answers for philox4x32-10: counter, key, words.
PHILOX_VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX_VECTORS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    seed = key[0] | key[1] << 32
    seed -= 2**64 if seed >= 2**63 else 0
    actual = philox4x32(torch.tensor([seed]), tuple(torch.tensor([c]) for c in counter))
    assert tuple(int(word) for word in actual) == words


def test_dropout_mask_counts_as_specified() -> None:
    seed, p = torch.tensor([-123456789]), 0.37
    keep = reference.dropout_mask(seed, 2, 3, 4, 11, p)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 3, 10), (1, 0, 2, 5), (0, 2, 1, 7)]:
        counter = tuple(torch.tensor([c]) for c in (j // 4, i, h, b))
        word = int(philox4x32(seed, counter)[j % 4])
        assert bool(keep[b, h, i, j]) == (word >= round(p * 2**32))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_is_exact(p: float) -> None:
    keep = reference.dropout_mask(torch.tensor([7]), 4, 4, 128, 128, p)
    n = keep.numel()
    assert abs(keep.double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    assert reference.dropout_mask(torch.tensor([7]), 1, 1, 3, 5, 0.0).all()
    assert not reference.dropout_mask(torch.tensor([7]), 1, 1, 3, 5, 1.0).any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dropout_drops_the_weights_of_its_mask(backend: str) -> None:
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    v = torch.eye(7).expand(2, 3, 7, 7)  # so that out is the weights
    with fastattn.use_backend(backend):
        torch.manual_seed(3)
        out = fastattn.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(3)
    seed = draw_seed(attention_params(q, k, v, dropout_p=0.4)).seed
    keep = reference.dropout_mask(seed, 2, 3, 5, 7, 0.4)
    expected = (8**-0.5 * q @ k.transpose(-1, -2)).softmax(-1) * keep / 0.6
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_everything_dropped(backend: str) -> None:
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    with fastattn.use_backend(backend):
        out = fastattn.scaled_dot_product_attention(q, q, q, dropout_p=1.0)
    (dq,) = torch.autograd.grad(out, q, torch.randn_like(out))
    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(dq, torch.zeros_like(dq))


# Heads are narrow, because the time grows with the square of the number of elements.
GRADCHECK_CASES = [
    Case(dims=(3, 4)),
    Case(mask="empty-rows", bias="full", band="window-bottom-right", heads=(4, 2), dims=(3, 2)),
    Case(bias="per-head", band="causal-window", dropout_p=0.3, scale=-0.5, dims=(4, 3)),
    Case(bias="per-key", mask="random", dropout_p=0.3, packed=True, heads=(2, 1), dims=(2, 3)),
    Case(mask="all-false", bias="full", packed=True, band="causal-bottom-right", dims=(3, 3)),
]


@pytest.mark.long
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=str)
def test_gradcheck(backend: str, case: Case) -> None:
    tensors, arguments = Case(**{**vars(case), "seqlens": (4, 5), "batch": 2}).make()
    inputs = [None if x is None else leaf(x, torch.float64) for x in tensors]

    def function(*args: Tensor | None) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        out, lse = call(args, arguments)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    with fastattn.use_backend(backend):
        assert torch.autograd.gradcheck(function, inputs)
        if backend == "reference":
            assert torch.autograd.gradgradcheck(function, inputs)


def test_lse_of_float64_is_float64() -> None:
    q = torch.randn(1, 1, 2, 3, dtype=torch.float64)
    assert fastattn.scaled_dot_product_attention(q, q, q, return_lse=True)[1].dtype == torch.float64
    assert (
        fastattn.scaled_dot_product_attention(q.half(), q.half(), q.half(), return_lse=True)[1].dtype == torch.float32
    )


def test_huge_scores_do_not_overflow() -> None:
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    out, lse = call_reference((1e4 * q, 1e4 * k, v, None), {"return_lse": True, "sinks": None})
    best = (q @ k.transpose(-1, -2)).argmax(-1)[0, 0]
    torch.testing.assert_close(out[0, 0], v[0, 0, best])
    assert lse.isfinite().all()


def test_lengths_that_promise_too_much_are_cut() -> None:
    """The values of cu_seqlens are not checked on a GPU; wrong ones must not lead outside of the tensors."""
    x, valid = torch.randn(7, 2, 4), cumulative([3, 4])
    p = varlen_attention_params(x, x, x, valid, valid, 9, 9)
    beyond = torch.tensor([0, 3, 12], dtype=torch.int32)
    expected, actual = reference.attention(p), reference.attention(p.replace(cu_seqlens_q=beyond, cu_seqlens_k=beyond))
    torch.testing.assert_close(actual, expected)


def test_garbage_past_the_last_sequence_is_not_read() -> None:
    cu_seqlens = cumulative([3, 4])
    x = torch.randn(9, 2, 4)
    x[7:] = torch.nan
    x.requires_grad_()
    for backend in ("torch", "reference"):
        with fastattn.use_backend(backend):
            out, lse = fastattn.varlen_attention(x, x, x, cu_seqlens, cu_seqlens, 4, 4, return_lse=True)
        (dx,) = torch.autograd.grad((out, lse), x, (torch.randn_like(out), torch.randn_like(lse)))
        assert out[:7].isfinite().all() and dx[:7].isfinite().all()
        assert not out[7:].any() and not dx[7:].any() and (lse[:, 7:] == -torch.inf).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("lengths", "total"), [([], 3), ([0, 0], 2), ([0], 0)], ids=str)
def test_packed_batches_of_nothing(backend: str, lengths: list[int], total: int) -> None:
    x, cu_seqlens = torch.randn(total, 2, 4, requires_grad=True), cumulative(lengths)
    with fastattn.use_backend(backend):
        out, lse = fastattn.varlen_attention(x, x, x, cu_seqlens, cu_seqlens, 0, 0, return_lse=True)
    (dx,) = torch.autograd.grad(out, x, torch.randn_like(out))
    assert out.shape == x.shape and not out.any() and not dx.any()
    assert lse.shape == (2, total) and (lse == -torch.inf).all()


def test_a_float_mask_is_a_bias_with_a_gradient() -> None:
    q, k = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4)
    mask = torch.randn(2, 1, 1, 5, requires_grad=True)
    dout = torch.randn(2, 2, 3, 4)
    grads = [
        torch.autograd.grad(fastattn.scaled_dot_product_attention(q, k, k, **{name: mask}), mask, dout)[0]
        for name in ("attn_mask", "attn_bias")
    ]
    weights = (0.5 * q @ k.transpose(-1, -2) + mask).softmax(-1)
    (expected,) = torch.autograd.grad(weights @ k, mask, dout)
    torch.testing.assert_close(grads, [expected, expected])
