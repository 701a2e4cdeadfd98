"""Calls for the launcher to pack, and what the struct must then hold."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.params import UNBOUNDED, AttentionParams, Buffers
from tests.support.attention_struct import Struct, as_dict

launcher = pytest.importorskip("fastattn._launcher", reason="fastattn._launcher is not built: it takes a C++ compiler")
cuda = pytest.importorskip("fastattn.cuda_kernels.attention")


def problem(q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> AttentionParams:
    p = AttentionParams(
        q, k, v, None, None, None, None, None, None, q.size(-2), k.size(-2), 0.25, 0.0, 0.0, UNBOUNDED, UNBOUNDED, False
    )
    return p.replace(**changes)


def buffers(*first: Tensor, **others: Tensor) -> Any:
    """Buffers with nothing but these."""
    given = dict(zip(Buffers._fields, first, strict=False)) | others
    return Buffers(**dict.fromkeys(Buffers._fields) | given)


def pack(p: AttentionParams, given: Any = None) -> dict[str, Any]:
    """The packed struct as nested dicts."""
    packed = launcher.pack(cuda.ELEMENTS[p.q.dtype], p, given or buffers())
    assert len(packed) == ctypes.sizeof(Struct)
    return as_dict(Struct.from_buffer_copy(packed))


# ---- what is expected ----


def rows(x: Tensor | None, is_aligned: bool = True) -> dict[str, Any]:
    if x is None:
        return {"data": None, "batch": 0, "head": 0, "row": 0, "is_aligned": 0}
    batch, head, row = (0, x.stride(1), x.stride(0)) if x.dim() == 3 else x.stride()[:3]
    return {"data": x.data_ptr(), "batch": batch, "head": head, "row": row, "is_aligned": int(is_aligned)}


def scores(x: Tensor | None, strides: tuple[int, ...] = (0, 0, 0, 0)) -> dict[str, Any]:
    return {
        "data": None if x is None else x.data_ptr(),
        **dict(zip(("batch", "head", "row", "key"), strides, strict=True)),
    }


NO_BIAS_GRAD = {"data": None, "partial": None, "copies": 0, "batch": 0, "heads": 0, "rows": 0, "keys": 0}


def assert_fields(packed: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: packed[name] for name in expected} == expected


def qkv(nheads: int = 2, nheads_k: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Batch 3, 5 queries, 7 keys, 8 and 12 wide: sizes that cannot be mistaken for each other."""
    sizes = (3, nheads, 5, 8), (3, nheads_k, 7, 8), (3, nheads_k, 7, 12)
    return tuple(torch.randn(size).to(dtype) for size in sizes)
