"""The struct that kernels get: which tensors are marked as aligned, so that four elements are one access."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.packing import buffers, pack, problem, qkv, rows


def strided(sizes: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> Tensor:
    return torch.randn(4096).as_strided(sizes, strides, offset)


ALIGNMENTS = {
    "contiguous": (strided((3, 2, 5, 8), (80, 40, 8, 1)), True),
    "padded rows": (strided((3, 2, 5, 8), (240, 120, 12, 1)), True),
    "expanded": (strided((3, 2, 5, 8), (0, 0, 8, 1)), True),
    "one row inside": (strided((3, 2, 5, 8), (80, 40, 8, 1), offset=8), True),
    "four elements inside": (strided((3, 2, 5, 8), (80, 40, 8, 1), offset=4), True),
    "one element inside": (strided((3, 2, 5, 8), (80, 40, 8, 1), offset=1), False),
    "two elements inside": (strided((3, 2, 5, 8), (80, 40, 8, 1), offset=2), False),
    "odd batch stride": (strided((3, 2, 5, 8), (81, 40, 8, 1)), False),
    "odd head stride": (strided((3, 2, 5, 8), (200, 41, 8, 1)), False),
    "odd row stride": (strided((3, 2, 5, 8), (200, 100, 9, 1)), False),
    "row stride of two": (strided((3, 2, 5, 8), (200, 100, 10, 1)), False),
    "odd stride of one batch": (strided((1, 2, 5, 8), (81, 40, 8, 1)), True),
    "odd stride of one head": (strided((3, 1, 5, 8), (80, 41, 8, 1)), True),
    "odd stride of one row": (strided((3, 2, 1, 8), (80, 40, 9, 1)), True),
    "odd strides of one head and of rows": (strided((3, 1, 5, 8), (80, 41, 9, 1)), False),
    "head_dim 6": (strided((3, 2, 5, 6), (80, 40, 8, 1)), False),
    "head_dim 1": (strided((3, 2, 5, 1), (80, 40, 8, 7)), False),
}


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_alignment(name):
    q, is_aligned = ALIGNMENTS[name]
    _, k, v = qkv()
    packed = pack(problem(q, k[..., : q.size(-1)], v))
    assert packed["q"] == rows(q, is_aligned)
    assert packed["k"]["is_aligned"] == (q.size(-1) == 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("offset", "is_aligned"), [(4, True), (2, False), (6, False), (8, True)])
def test_four_half_elements_are_eight_bytes(dtype, offset, is_aligned):
    q = torch.randn(1024).to(dtype).as_strided((3, 2, 5, 8), (80, 40, 8, 1), offset)
    assert q.data_ptr() % 16 == 2 * offset % 16
    assert pack(problem(q, *qkv(dtype=dtype)[1:]))["q"] == rows(q, is_aligned)


def test_alignment_of_packed_tensors():
    cu_seqlens = torch.tensor([0, 20], dtype=torch.int32)
    sequences = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    q, k, v = strided((20, 2, 8), (17, 8, 1)), strided((20, 1, 8), (16, 3, 1)), strided((20, 1, 6), (8, 4, 1))
    packed = pack(problem(q, k, v, **sequences))
    assert [packed[name]["is_aligned"] for name in "qkv"] == [0, 1, 0]
    assert (packed["q"]["row"], packed["q"]["head"]) == (17, 8)


def test_values_are_as_wide_as_values():
    q, k, v = qkv()
    v, out, dv, dout = v[..., :6], torch.empty(3, 2, 5, 6), torch.empty(3, 2, 7, 6), torch.empty(3, 2, 5, 6)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    packed = pack(problem(q, k, v), buffers(out=out, dout=dout, dq=dq, dk=dk, dv=dv))
    assert [packed[name]["is_aligned"] for name in ("v", "out", "dout", "dv")] == [0] * 4
    assert [packed[name]["is_aligned"] for name in ("q", "k", "dq", "dk")] == [1] * 4
