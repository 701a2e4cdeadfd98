"""From a caller's arguments to checked `AttentionParams`: every error names the argument, the rule and the value."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import compat
from .params import UNBOUNDED, AttentionParams

CausalAlign = Literal["top-left", "bottom-right"]
Window = tuple[int | None, int | None] | None

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ALIGNS = ("top-left", "bottom-right")


def attention_params(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    attn_bias: Tensor | None = None,
    window: Window = None,
    causal_align: CausalAlign = "top-left",
) -> AttentionParams:
    """The checked arguments of one dense call, as `scaled_dot_product_attention` takes them; no seed is drawn yet."""
    query, key, value = _autocast(query, key, value)
    shape, key_shape = _query_and_key_shapes(query, key, value, enable_gqa, is_packed=False)
    _check_dropout(dropout_p)
    left, right, bottom_right = _band(is_causal, window, causal_align)
    mask = bias = None
    if attn_mask is not None or attn_bias is not None:
        mask, bias = _mask_and_bias(attn_mask, attn_bias, query, (*shape[:-1], key_shape[-2]))
    q, k, v = (query, key, value) if len(shape) == 4 else _to_4d(query, key, value)
    return AttentionParams(
        q, k, v, mask, bias, None, None, None,
        shape[-2], key_shape[-2], _scale(scale, shape[-1]), dropout_p, left, right, bottom_right,
    )  # fmt: skip


def varlen_attention_params(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    window: Window = None,
    causal_align: CausalAlign = "bottom-right",
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionParams:
    """The checked arguments of one packed call, as `varlen_attention` takes them; no seed is drawn yet."""
    query, key, value = _autocast(query, key, value)
    _, nheads, head_dim = _query_and_key_shapes(query, key, value, enable_gqa, is_packed=True)[0]
    _check_cu_seqlens(query, cu_seqlens_q, max_seqlen_q, "q")
    _check_cu_seqlens(key, cu_seqlens_k, max_seqlen_k, "k")
    _check_same_batch(cu_seqlens_q, cu_seqlens_k)
    _check_dropout(dropout_p)
    left, right, bottom_right = _band(is_causal, window, causal_align)
    shape = (cu_seqlens_q.size(0) - 1, nheads, max_seqlen_q, max_seqlen_k)
    mask, bias = _mask_and_bias(attn_mask, attn_bias, query, shape)
    return AttentionParams(
        query, key, value, mask, bias, None, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k, _scale(scale, head_dim), dropout_p, left, right, bottom_right,
    )  # fmt: skip


def draw_seed(p: AttentionParams) -> AttentionParams:
    """The same call with the seed of its dropout, if it has dropout, drawn from the device's generator."""
    if p.dropout_p == 0:
        return p
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=p.q.device)
    return p.replace(seed=seed)


def _scale(scale: float | None, head_dim: int) -> float:
    return float(head_dim) ** -0.5 if scale is None else scale  # torch.jit.trace gives a size as an integer tensor


def device_type(x: Tensor) -> str:
    """x.device.type, on the usual devices without the making of a device."""
    return "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on, as torch's own attention does; float64 stays."""
    if not compat.is_any_autocast_enabled():
        return tensors
    device = device_type(tensors[0])
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


# ---- query, key, value ----


def _query_and_key_shapes(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, is_packed: bool
) -> tuple[torch.Size, torch.Size]:
    """The shapes of query and key; dtypes, devices, batch dimensions, heads and head dimensions of all three agree."""
    q, k, v = query.shape, key.shape, value.shape
    if is_packed and len(q) != 3:
        raise ValueError(f"query: must be (total_tokens, heads, head_dim), got shape {tuple(q)}")
    if len(q) < 2:
        raise ValueError(f"query: must be (..., heads, seqlen, head_dim), got shape {tuple(q)}")
    if query.dtype not in DTYPES:
        raise ValueError(f"query: dtype must be float32, float16, bfloat16 or float64, got {query.dtype}")
    _check_like_query("key", key, query)
    _check_like_query("value", value, query)
    if q[-1] == 0:
        raise ValueError("query: head_dim must be at least 1, got 0")
    if q == k == v:  # so that the most usual call pays for no more
        return q, k
    for name, x in (("key", k), ("value", v)):
        if len(x) != len(q):
            raise ValueError(f"{name}: has {len(x)} dimensions, query has {len(q)}")
    if k[-1] != q[-1]:
        raise ValueError(f"key: head_dim {k[-1]} differs from query's {q[-1]}")
    if v[:-1] != k[:-1]:
        shapes = f"shape {tuple(v)} differs from key's {tuple(k)}"
        raise ValueError(f"value: {shapes} before the last dimension")
    if len(q) > 2:
        heads = -2 if is_packed else -3
        _check_heads(q[heads], k[heads], enable_gqa)
    if not is_packed and len(q) > 3 and k[:-3] != q[:-3]:
        raise ValueError(f"key: batch dimensions {tuple(k[:-3])} differ from query's {tuple(q[:-3])}")
    return q, k


def _check_like_query(name: str, x: Tensor, query: Tensor) -> None:
    if x.dtype != query.dtype:
        raise ValueError(f"{name}: dtype {x.dtype} differs from query's {query.dtype}")
    _check_device(name, x, query)


def _check_device(name: str, x: Tensor, query: Tensor) -> None:
    if x.device != query.device:
        raise ValueError(f"{name}: is on {x.device}, query on {query.device}")


def _check_heads(nheads: int, nheads_k: int, enable_gqa: bool) -> None:
    if nheads == nheads_k:
        return
    if not enable_gqa:
        raise ValueError(f"key: has {nheads_k} heads, query has {nheads} (enable_gqa=True groups query heads)")
    if nheads_k == 0 or nheads % nheads_k:
        rule = "enable_gqa needs query heads to be a multiple of key heads"
        raise ValueError(f"key: {rule}, got {nheads} and {nheads_k}")


def _to_4d(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(..., heads, seqlen, head_dim) as (batch, heads, seqlen, head_dim); all have as many dimensions as the first."""
    ndim = tensors[0].ndim
    if ndim == 4:
        return tensors
    return tuple(x.flatten(0, -4) if ndim > 4 else x[(None,) * (4 - ndim)] for x in tensors)


# ---- mask and bias ----


def _mask_and_bias(
    attn_mask: Tensor | None, attn_bias: Tensor | None, query: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The two slots, 4-D; a float attn_mask is a bias.

    Args:
        shape: what both broadcast to, (..., nheads, seqlen_q, seqlen_k).
    """
    mask, bias, bias_name = attn_mask, attn_bias, "attn_bias"
    if attn_mask is not None and attn_mask.dtype.is_floating_point:
        if attn_bias is not None:
            raise ValueError("attn_bias: a float attn_mask is a bias already; give one of the two")
        mask, bias, bias_name = None, attn_mask, "attn_mask"
    if mask is not None:
        if mask.dtype != torch.bool:
            rule = "dtype must be bool (True = may attend) or float (added to the scaled scores)"
            raise ValueError(f"attn_mask: {rule}, got {mask.dtype}")
        _check_device("attn_mask", mask, query)
        mask = _broadcast_to_4d("attn_mask", mask, shape)
    if bias is not None:
        if bias.dtype not in (torch.float32, query.dtype):
            raise ValueError(f"{bias_name}: a bias must be in float32 or in query's {query.dtype}, got {bias.dtype}")
        _check_device(bias_name, bias, query)
        bias = _broadcast_to_4d(bias_name, bias, shape)
    return mask, bias


def _broadcast_to_4d(argument: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x as a 4-D view that broadcasts to `shape` with its leading dimensions made one; broadcast dimensions stay 1."""
    missing = len(shape) - x.dim()
    if missing < 0 or not all([size in (1, wanted) for size, wanted in zip(x.shape, shape[missing:], strict=True)]):
        raise ValueError(f"{argument}: shape {tuple(x.shape)} does not broadcast to {tuple(shape)}")
    for _ in range(max(4, len(shape)) - x.dim()):
        x = x.unsqueeze(0)
    if x.dim() == 4:
        return x
    if any(size != 1 for size in x.shape[:-3]):
        x = x.expand(*shape[:-3], *x.shape[-3:])
    return x.flatten(0, -4)


# ---- band and dropout ----


def _band(is_causal: bool, window: tuple[int | None, int | None] | None, causal_align: str) -> tuple[int, int, bool]:
    """left, right, bottom_right of the band that causal and window make together."""
    if causal_align not in ALIGNS:
        raise ValueError(f"causal_align: must be one of {ALIGNS}, got {causal_align!r}")
    left, right = UNBOUNDED, UNBOUNDED
    if window is not None:
        if not _is_window(window):
            raise ValueError(f"window: must be (left, right), each an int >= 0 or None, got {window!r}")
        left, right = (UNBOUNDED if w is None else min(w, UNBOUNDED) for w in window)
    return left, 0 if is_causal else right, causal_align == "bottom-right"


def _is_window(window: object) -> bool:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        return False
    return all(w is None or (isinstance(w, int) and w >= 0) for w in window)


def _check_dropout(dropout_p: float) -> None:
    """A probability."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: must be in [0, 1], got {dropout_p}")


# ---- packed sequences ----


def _check_cu_seqlens(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, side: str) -> None:
    """Device, dtype and shape always; the values on the CPU, where reading them costs nothing.

    On a GPU lengths are clamped instead, so that nothing outside of the tensors is touched.

    Args:
        x: (total_tokens, heads, head_dim), the tensor that cu_seqlens divides.
        side: "q" or "k", the suffix of the arguments' names.
    """
    name = f"cu_seqlens_{side}"
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{name}: dtype must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"{name}: is on {cu_seqlens.device}, the tokens on {x.device}")
    if cu_seqlens.dim() != 1 or cu_seqlens.size(0) == 0:
        rule = "must have one dimension and at least one element"
        raise ValueError(f"{name}: {rule}, got shape {tuple(cu_seqlens.shape)}")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen_{side}: must not be negative, got {max_seqlen}")
    _check_values(x, cu_seqlens, max_seqlen, side)


def check_lengths(p: AttentionParams) -> None:
    """The lengths of a packed call, once more where tensors may have changed since it was made; CPU tensors only.

    Raises:
        ValueError: they are not what they have to be.
    """
    for x, cu_seqlens, max_seqlen, side in (
        (p.q, p.cu_seqlens_q, p.max_seqlen_q, "q"),
        (p.k, p.cu_seqlens_k, p.max_seqlen_k, "k"),
    ):
        if cu_seqlens is not None:
            _check_values(x, cu_seqlens, max_seqlen, side)


def _check_values(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, side: str) -> None:
    """The rules for the values of cu_seqlens, where they can be read without waiting for them."""
    if not cu_seqlens.is_cpu or type(cu_seqlens) is not Tensor or torch.compiler.is_compiling():
        return
    name, total, edges = f"cu_seqlens_{side}", x.size(0), compat.to_list(cu_seqlens)
    lengths = [end - start for start, end in zip(edges[:-1], edges[1:], strict=True)]
    smallest, largest = min(lengths, default=0), max(lengths, default=0)
    if edges[0] != 0:
        raise ValueError(f"{name}: must start at 0, got {edges[0]}")
    if smallest < 0:
        raise ValueError(f"{name}: must not decrease, got a step of {smallest}")
    if edges[-1] > total:
        raise ValueError(f"{name}: must not exceed the {total} tokens there are, got {edges[-1]}")
    if largest > max_seqlen:
        raise ValueError(f"max_seqlen_{side}: must be at least the longest length {largest}, got {max_seqlen}")


def _check_same_batch(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Both sides hold the same number of sequences."""
    if cu_seqlens_q.size(0) != cu_seqlens_k.size(0):
        sizes = cu_seqlens_k.size(0), cu_seqlens_q.size(0)
        raise ValueError(f"cu_seqlens_k: has {sizes[0]} elements, cu_seqlens_q has {sizes[1]}")
