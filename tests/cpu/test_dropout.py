"""Dropout of the CPU kernels draws the bits of fastattn.philox."""

from __future__ import annotations

import pytest
import torch

from fastattn import _cpu, functional, reference
from fastattn.arguments import attention_params, draw_seed
from fastattn.philox import philox4x32
from tests.support.cpu_runs import each_isa, on_cpu


@each_isa
@pytest.mark.parametrize("row", [4, 8, 12, 16, 20, 24, 64, 68, 256])
@pytest.mark.parametrize("rows", [1, 2, 3, 48])
def test_random_words(rows: int, row: int, isa: str) -> None:
    for seed, b, h in ((0, 0, 0), (1, 2, 3), (-1, 70000, 5), (2**63 - 1, 0, 2**20), (-(2**63), 1, 1)):
        words = torch.full((rows * row + 64,), -1, dtype=torch.int32)
        _cpu.random_words(isa, words.data_ptr(), seed, b, h, rows, row)
        group, query = torch.arange(row // 4), torch.arange(rows)[:, None]
        expected = philox4x32(torch.tensor([seed]), (group, query, torch.tensor(h), torch.tensor(b)))
        expected = torch.stack(torch.broadcast_tensors(*expected), -1).flatten()
        assert torch.equal(words[: rows * row].long() & 0xFFFFFFFF, expected)


@each_isa
@pytest.mark.parametrize("seqlens", [(1, 30), (4, 300), (33, 64), (70, 530)])
@pytest.mark.parametrize("dropout_p", [2**-32, 0.3, 0.8, 1 - 2**-40, 1.0])
def test_dropout_bits_are_the_references(dropout_p: float, seqlens: tuple[int, int], isa: str) -> None:
    """Equal weights, and identities in the place of v and of the upstream gradient, show every single one."""
    batch, nheads, (seqlen_q, seqlen_k), width = 2, 3, seqlens, 16
    kept = None
    for first in range(0, seqlen_k, 173):  # a part of v's columns
        q, k = torch.zeros(batch, nheads, seqlen_q, 8), torch.zeros(batch, nheads, seqlen_k, 8)
        v = torch.eye(seqlen_k)[:, first : first + width].expand(batch, nheads, -1, -1).detach().requires_grad_()
        torch.manual_seed(5)
        p = draw_seed(attention_params(q, k, v, dropout_p=dropout_p))
        assert p.seed is not None
        with on_cpu(isa):
            out, _ = functional.attend(p)
            upstream = torch.eye(seqlen_q, v.size(-1)).expand_as(out)
            (dv,) = torch.autograd.grad(out, v, upstream)
        if kept is None:
            kept = reference.dropout_mask(p.seed, batch, nheads, seqlen_q, seqlen_k, dropout_p)
        rescale = 1 / (1 - dropout_p) if kept.any() else 0.0
        columns = kept[..., first : first + width] * rescale / seqlen_k
        torch.testing.assert_close(out, columns, rtol=1e-5, atol=0)
        shown = min(seqlen_q, v.size(-1))
        rows = kept[..., :shown, :].transpose(-1, -2) * rescale / seqlen_k
        torch.testing.assert_close(dv[..., :shown], rows, rtol=1e-5, atol=0)
    assert kept is not None and kept.any() == (dropout_p < 0.9)


@each_isa
def test_dropout_bits_where_a_band_or_a_mask_begins_late(isa: str) -> None:
    """Keys that are left out at the front do not move the bits of the others."""
    seqlen_q, seqlen_k = 40, 640
    q, k = torch.zeros(1, 1, seqlen_q, 8), torch.zeros(1, 1, seqlen_k, 8)
    key = torch.arange(seqlen_k)
    for first in (1, 4, 30, 257, 301):
        for limits in ({"attn_mask": key >= first}, {"window": (seqlen_k, None)}):
            for column in (first, first + 5, 500, 639):
                v = (key == column).float()[:, None].expand(1, 1, -1, 1)
                p = draw_seed(attention_params(q, k, v, dropout_p=0.5, **limits))
                with on_cpu(isa):
                    out, _ = functional.attend(p)
                kept = reference.dropout_mask(p.seed, 1, 1, seqlen_q, seqlen_k, 0.5)
                assert torch.equal(out[0, 0, :, 0] > 0, kept[0, 0, :, column])
