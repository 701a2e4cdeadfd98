"""An attention call as the Triton kernels take it: pointers, strides, sizes and what they are compiled for."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..params import AttentionParams
from .scores import Band, Dropout, PerRow, Rows, Scores, Softcap, sequence
from .tiles import block

LOG2_E = math.log2(math.e)
# On the CPU, as TRITON_INTERPRET had it when this was imported.
IS_INTERPRETED = not isinstance(sequence, triton.JITFunction)


def rows(x: Tensor, p: AttentionParams) -> Rows:
    """q, k, v, out or one of their gradients."""
    strides = x.stride()
    return Rows(x, 0, strides[1], strides[0]) if p.cu_seqlens_q is not None else Rows(x, *strides[:3])


def per_row(x: Tensor | None, p: AttentionParams) -> PerRow:
    """lse, delta or the gradient of lse."""
    if x is None:
        return PerRow(None, 0, 0)
    return PerRow(x, 0, 16 * x.stride(0)) if p.is_packed() else PerRow(x, 16 * x.stride(0), 16 * x.stride(1))


def _scores(x: Tensor | None) -> Scores:
    if x is None:
        return Scores(None, 0, 0, 0, 0)
    b, h, m, n = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return Scores(x, b, h, m, n)


def _dropout(p: AttentionParams) -> Dropout:
    threshold = round(p.dropout_p * 2**32)
    if threshold == 2**32:  # all weights are dropped: no threshold does that, so their factor does
        return Dropout(p.seed, 0, 0.0)
    return Dropout(p.seed, threshold, 1 / (1 - p.dropout_p))


def _softcap(p: AttentionParams) -> Softcap | None:
    if p.softcap == 0:
        return None
    return Softcap(p.scale / p.softcap, p.softcap * LOG2_E)


def _band(p: AttentionParams) -> Band:
    longest = p.max_seqlen_q + p.max_seqlen_k
    left, right = (edge if edge < longest else None for edge in (p.left, p.right))
    return Band(left, right, int(p.bottom_right))


def inputs(p: AttentionParams) -> dict[str, Any]:
    """The arguments that all kernels share, by name."""
    q, is_packed = p.q, p.cu_seqlens_q is not None
    return {
        "q": rows(q, p),
        "k": rows(p.k, p),
        "v": rows(p.v, p),
        "mask": _scores(p.mask),
        "bias": _scores(p.bias),
        "dropout": _dropout(p),
        "band": _band(p),
        "cu_seqlens_q_ptr": p.cu_seqlens_q,
        "cu_seqlens_k_ptr": p.cu_seqlens_k,
        "seqused_k_ptr": p.seqused_k,
        "total_q": q.size(0) if is_packed else 0,
        "total_k": p.k.size(0) if is_packed else 0,
        "batch": p.batch_size(),
        "nheads": q.size(1),
        "group": q.size(1) // p.k.size(1),
        "max_seqlen_q": p.max_seqlen_q,
        "max_seqlen_k": p.max_seqlen_k,
        "scale_log2": p.scale * LOG2_E,
        "softcap": _softcap(p),
        **_compiled_for(q.dtype, q.size(-1), p.v.size(-1), q.dtype == torch.float32 and _allows_tf32()),
    }


@functools.cache
def _compiled_for(dtype: torch.dtype, head_dim: int, head_dim_v: int, allows_tf32: bool) -> dict[str, Any]:
    return {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_D": block(head_dim),
        "BLOCK_DV": block(head_dim_v),
        "DOT_DTYPE": _dot_dtype(dtype),
        "PRECISION": "tf32" if allows_tf32 else "tf32x3",
    }


def _dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of the operands of products: the tensors' own. The interpreter cannot multiply bfloat16."""
    if dtype == torch.float32 or (dtype == torch.bfloat16 and IS_INTERPRETED):
        return tl.float32
    return tl.float16 if dtype == torch.float16 else tl.bfloat16


def _allows_tf32() -> bool:
    """Whether the user lets float32 products run in TF32, by the newest of torch's switches."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"
