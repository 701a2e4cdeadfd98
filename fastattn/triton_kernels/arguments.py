"""An attention call as the Triton kernels take it: pointers, strides, sizes and what they are compiled for."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..params import AttentionParams
from .scores import sequence

# On the CPU, as TRITON_INTERPRET had it when this was imported.
IS_INTERPRETED = not isinstance(sequence, triton.JITFunction)


def batch_size(p: AttentionParams) -> int:
    """How many sequences there are."""
    return p.q.size(0) if p.cu_seqlens_q is None else p.cu_seqlens_q.numel() - 1


def rows(name: str, x: Tensor, p: AttentionParams) -> dict[str, Any]:
    """Pointer and strides of a tensor of rows: q_ptr, stride_qb, stride_qh, stride_qm, of keys and values stride_kn."""
    strides = (0, x.stride(1), x.stride(0)) if p.is_packed() else x.stride()[:3]
    stem, row = name.replace("out", "o"), "n" if name[-1] in "kv" else "m"
    return {f"{name}_ptr": x} | {f"stride_{stem}{end}": n for end, n in zip(f"bh{row}", strides, strict=True)}


def per_row(lse: Tensor, p: AttentionParams) -> dict[str, Any]:
    """Pointer and strides of lse, which delta and its gradient share."""
    strides = (0, lse.stride(0)) if p.is_packed() else lse.stride()[:2]
    return {"lse_ptr": lse, "stride_lb": strides[0], "stride_lh": strides[1]}


def _scores(name: str, x: Tensor | None, p: AttentionParams) -> dict[str, Any]:
    """Pointer and strides of mask or bias, 0 where it broadcasts."""
    strides = (
        (0,) * 4 if x is None else [0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)]
    )
    return {f"{name}_ptr": x} | {f"stride_{name}{end}": n for end, n in zip("bhmn", strides, strict=True)}


def inputs(p: AttentionParams) -> dict[str, Any]:
    """What every kernel is called with."""
    head_dim, head_dim_v = p.q.size(-1), p.v.size(-1)
    longest = p.max_seqlen_q + p.max_seqlen_k
    threshold = round(p.dropout_p * 2**32)
    drops_all = threshold == 2**32
    return {
        **rows("q", p.q, p),
        **rows("k", p.k, p),
        **rows("v", p.v, p),
        **_scores("mask", p.mask, p),
        **_scores("bias", p.bias, p),
        "seed_ptr": p.seed,
        "dropout_threshold": 0 if drops_all else threshold,
        "dropout_rescale": 0.0 if drops_all else 1 / (1 - p.dropout_p),
        "cu_seqlens_q_ptr": p.cu_seqlens_q,
        "cu_seqlens_k_ptr": p.cu_seqlens_k,
        "total_q": p.q.size(0) if p.is_packed() else 0,
        "total_k": p.k.size(0) if p.is_packed() else 0,
        "batch": batch_size(p),
        "nheads": p.q.size(1),
        "group": p.q.size(1) // p.k.size(1),
        "max_seqlen_q": p.max_seqlen_q,
        "max_seqlen_k": p.max_seqlen_k,
        "scale_log2": p.scale * math.log2(math.e),
        "left": p.left if p.left < longest else None,
        "right": p.right if p.right < longest else None,
        "BOTTOM_RIGHT": p.bottom_right,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_DV": max(16, triton.next_power_of_2(head_dim_v)),
        "DOT_DTYPE": _dot_dtype(p.q),
        "PRECISION": "tf32" if _allows_tf32() else "ieee",
    }


def _dot_dtype(q: Tensor) -> tl.dtype:
    """Of the operands of products: the tensors' own. The interpreter cannot multiply bfloat16."""
    if q.dtype == torch.float32 or (q.dtype == torch.bfloat16 and IS_INTERPRETED):
        return tl.float32
    return tl.float16 if q.dtype == torch.float16 else tl.bfloat16


def _allows_tf32() -> bool:
    """Whether the user lets float32 products run in TF32, by the newest of torch's switches."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"
