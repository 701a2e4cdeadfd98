"""Checks of the CPU kernels that the table of cases cannot say, for the backend in force."""

from __future__ import annotations

import torch

import fastattn
from tests.support.cpu_runs import assert_right, assert_same_bits, results


def all_halves(dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of a half type, as (256, 1, 1, 256)."""
    return torch.arange(65536).to(torch.uint16).view(dtype).view(256, 1, 1, 256)


def check_rounding(dtype: torch.dtype) -> None:
    """Half to even: out is the mean of two neighbours, dv the sum of two gradients of any size, which may overflow."""
    a = all_halves(dtype)
    b = (torch.arange(65536) + 1).to(torch.uint16).view(dtype).view_as(a)
    dout = torch.cat([a, a.flatten()[torch.randperm(65536)].view_as(a)], 2)
    v, q = torch.cat([a, b], 2), torch.zeros(256, 1, 6, 8, dtype=dtype)
    out = fastattn.scaled_dot_product_attention(q, q[:, :, :2], v)
    dv = results(q[:, :, :2], q[:, :, :1], a, dout=dout)["dv"]
    mean, total = ((x[:, :, :1].double() + x[:, :, 1:].double()).float() for x in (v, dout))
    torch.testing.assert_close(out, (mean / 2).to(dtype).expand_as(out), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dv, total.to(dtype), rtol=0, atol=0, equal_nan=True)


def check_first_keys(first: int, seqlen_q: int) -> None:
    """The keys before this one, which no query sees because of a mask or a band, may hold NaN and have no gradient."""
    seqlen_k = max(seqlen_q, 20) + first
    q, k, v = (torch.randn(1, 2, n, 16) for n in (seqlen_q, seqlen_k, seqlen_k))
    mask = torch.arange(seqlen_k) >= first
    for limits in (
        {"attn_mask": mask},
        {"attn_mask": mask & (torch.arange(seqlen_k) != first + 2)},
        {"window": (seqlen_k - seqlen_q - first, None), "causal_align": "bottom-right"},
    ):
        clean = results(q, k, v, **limits)
        poisoned = [x.clone() for x in (k, v)]
        for x in poisoned:
            x[:, :, :first] = torch.nan
        assert_same_bits(results(q, *poisoned, **limits), clean)
        assert not any(clean[name][:, :, :first].any() for name in ("dk", "dv"))


def check_excluded_keys(seqlen_q: int) -> None:
    """Keys among others that a mask excludes for all queries may hold NaN and have no gradient."""
    q, k, v = (torch.randn(1, 2, n, 16) for n in (seqlen_q, 40, 40))
    mask = torch.rand(40) > 0.4
    clean = results(q, k, v, attn_mask=mask)
    poisoned = [x.masked_fill(~mask[:, None], torch.nan) for x in (k, v)]
    assert_same_bits(results(q, *poisoned, attn_mask=mask), clean)
    assert not any(clean[name][:, :, ~mask].any() for name in ("dk", "dv"))


def check_keys_apart() -> None:
    """The keys of a mask and of a bias lie apart in memory."""
    q, k, v = (torch.randn(1, 2, n, 16) for n in (9, 21, 21))
    bias, mask = torch.randn(1, 2, 21, 9).transpose(2, 3), (torch.rand(1, 2, 21, 9) > 0.2).transpose(2, 3)
    assert_right(q, k, v, bias, attn_mask=mask)
