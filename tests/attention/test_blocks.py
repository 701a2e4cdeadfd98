"""The partition of a bias gradient into blocks: nothing is missed, little is stored and the GPU is busy."""

from __future__ import annotations

import pytest
import torch

from fastattn import blocks
from fastattn.arguments import attention_params, varlen_attention_params


@pytest.mark.parametrize(("n", "block", "expected"), [(0, 4, 1), (1, 4, 1), (4, 4, 1), (5, 4, 2), (64, 16, 4)])
def test_count(n, block, expected):
    assert blocks.count(n, block) == expected


@pytest.mark.parametrize(
    ("shape", "busy", "expected"),
    [
        ((6, 3, 40, 70), 1000, (6 * 3 * 3 * 3, 1)),  # broadcast over nothing: nothing to sum up
        ((1, 3, 40, 70), 30, (27, 2)),  # two copies make 54 blocks, enough for 30
        ((1, 3, 40, 70), 1000, (27, 6)),  # no more copies than sequences
        ((1, 1, 1, 70), 1000, (3, 54)),  # than sequences * heads * tiles of queries
        ((1, 1, 1, 1), 1000, (1, 64)),  # than 64
        ((1, 1, 1, 1), 7, (1, 7)),  # than keep the GPU busy
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bias_tiles_and_copies(shape, busy, expected, packed):
    batch, nheads, seqlen_q, seqlen_k = 6, 3, 40, 70
    if packed:
        q, k = torch.zeros(batch * seqlen_q, nheads, 8), torch.zeros(batch * seqlen_k, nheads, 8)
        ends = [torch.arange(batch + 1, dtype=torch.int32) * n for n in (seqlen_q, seqlen_k)]
        p = varlen_attention_params(q, k, k, *ends, seqlen_q, seqlen_k)
    else:
        q, k = torch.zeros(batch, nheads, seqlen_q, 8), torch.zeros(batch, nheads, seqlen_k, 8)
        p = attention_params(q, k, k)
    assert p.batch_size() == batch
    assert blocks.bias_tiles_and_copies(p, torch.Size(shape), (16, 32), busy) == expected
