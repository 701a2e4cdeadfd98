"""The struct that kernels get: the calls that the launcher refuses to pack, and its words."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from fastattn.params import AttentionParams
from tests.support.packing import buffers, launcher, problem, qkv

Q, K, V = qkv()
EDGES = torch.tensor([0, 3], dtype=torch.int32)


def packed(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> AttentionParams:
    x = torch.randn(3, 2, 8)
    return problem(x, x, x, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=3, max_seqlen_k=3)


REFUSALS = {
    "q: must have 4 dimensions, got torch.Size([2, 5, 8])": (problem(Q[0], K, V), buffers()),
    "out: must have 4 dimensions, got (12, 1)": (problem(Q, K, V), buffers(out=torch.empty(5, 12))),
    "mask: must have 4 dimensions, got torch.Size([5, 7])": (problem(Q, K, V, mask=torch.ones(5, 7) > 0), buffers()),
    "k: the last dimension must be contiguous, got a stride of 7": (
        problem(Q, torch.randn(3, 2, 8, 7).transpose(2, 3), V),
        buffers(),
    ),
    "dout: the last dimension must be contiguous, got a stride of 0": (
        problem(Q, K, V),
        buffers(dout=torch.ones(1).expand(3, 2, 5, 12)),
    ),
    "dlse: must be contiguous": (problem(Q, K, V), buffers(dlse=torch.ones(1).expand(3, 2, 5))),
    "cu_seqlens_q: must be contiguous": (packed(torch.tensor([0], dtype=torch.int32).expand(2), EDGES), buffers()),
    "cu_seqlens_k: must be contiguous": (
        packed(EDGES, torch.tensor([[0, 0], [3, 9]], dtype=torch.int32)[:, 0]),
        buffers(),
    ),
    "dbias_partial: must be contiguous": (
        problem(Q, K, V),
        buffers(dbias_partial=torch.ones(2, 3, 2, 7, 5).transpose(3, 4)),
    ),
    "dbias: must be contiguous": (
        problem(Q, K, V),
        buffers(dbias_partial=torch.ones(2, 3, 2, 5, 7), dbias=torch.ones(3, 2, 7, 5).transpose(2, 3)),
    ),
    "bias: dtype must be torch.float32, torch.float16 or torch.bfloat16, got torch.float64": (
        problem(Q, K, V, bias=torch.zeros(3, 2, 5, 7, dtype=torch.float64)),
        buffers(),
    ),
    "left: must fit 32 bits, got 2147483648": (problem(Q, K, V, left=2**31), buffers()),
    "right: must fit 32 bits, got -2147483649": (problem(Q, K, V, right=-(2**31) - 1), buffers()),
    "max_seqlen_q: must be below 2^29, got 536870912": (problem(Q, K, V, max_seqlen_q=2**29), buffers()),
    "max_seqlen_k: must be below 2^29, got 4294967296": (problem(Q, K, V, max_seqlen_k=2**32), buffers()),
    "max_seqlen_k: must be below 2^29, got -1": (problem(Q, K, V, max_seqlen_k=-1), buffers()),
    "p: must have 17 fields, got 16": (problem(Q, K, V)[:-1], buffers()),
    "max_seqlen_q: must be at most the tensor's length 5, got 6": (problem(Q, K, V, max_seqlen_q=6), buffers()),
    "max_seqlen_k: must be at most the tensor's length 7, got 8": (problem(Q, K, V, max_seqlen_k=8), buffers()),
    "buffers: must have 11 fields, got 10": (problem(Q, K, V), buffers()[:-1]),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusal(message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        launcher.pack("float32", *REFUSALS[message])


def test_an_unknown_element_is_refused():
    with pytest.raises(ValueError, match="^element: must be float32, float16 or bfloat16, got float64$"):
        launcher.pack("float64", problem(Q, K, V), buffers())


def test_what_is_no_tensor_is_said():
    with pytest.raises(AttributeError, match="shape"):
        launcher.pack("float32", problem(Q, K, V).replace(q=3), buffers())
    with pytest.raises(TypeError):
        launcher.pack("float32", problem(Q, K, V, scale="a"), buffers())
    with pytest.raises(TypeError):
        launcher.pack("float32", problem(Q, K, V, left=0.5), buffers())
    with pytest.raises(TypeError):
        launcher.pack("float32", [], buffers())
