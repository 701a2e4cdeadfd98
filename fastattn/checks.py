"""From a caller's arguments to checked `AttentionParams`: every error names the argument, the rule and the value."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from .params import UNBOUNDED

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _check(condition: bool, argument: str, rule: str) -> None:
    if not condition:
        raise ValueError(f"{argument}: {rule}")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on, as torch's own attention does; float64 stays."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def check_query_key_value(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, is_packed: bool) -> None:
    """Dtypes, devices, batch dimensions, heads and head dimensions agree."""
    heads = -2 if is_packed else -3
    if is_packed:
        _check(query.dim() == 3, "query", f"must be (total_tokens, heads, head_dim), got shape {_shape(query)}")
    else:
        _check(query.dim() >= 2, "query", f"must be (..., heads, seqlen, head_dim), got shape {_shape(query)}")
    _check(query.dtype in DTYPES, "query", f"dtype must be float32, float16, bfloat16 or float64, got {query.dtype}")
    for name, x in (("key", key), ("value", value)):
        _check(x.dim() == query.dim(), name, f"has {x.dim()} dimensions, query has {query.dim()}")
        _check(x.dtype == query.dtype, name, f"dtype {x.dtype} differs from query's {query.dtype}")
        _check(x.device == query.device, name, f"is on {x.device}, query on {query.device}")
    _check(query.size(-1) > 0, "query", "head_dim must be at least 1, got 0")
    _check(key.size(-1) == query.size(-1), "key", f"head_dim {key.size(-1)} differs from query's {query.size(-1)}")
    _check(
        value.shape[:-1] == key.shape[:-1],
        "value",
        f"shape {_shape(value)} differs from key's {_shape(key)} before the last dimension",
    )
    if query.dim() == 2:
        return
    nheads, nheads_k = query.size(heads), key.size(heads)
    if enable_gqa:
        divides = nheads == nheads_k or (nheads_k > 0 and nheads % nheads_k == 0)
        _check(
            divides, "key", f"enable_gqa needs query heads to be a multiple of key heads, got {nheads} and {nheads_k}"
        )
    else:
        _check(
            nheads == nheads_k, "key", f"has {nheads_k} heads, query has {nheads} (enable_gqa=True groups query heads)"
        )
    if not is_packed:
        batch_q, batch_k = tuple(query.shape[:-3]), tuple(key.shape[:-3])
        _check(batch_q == batch_k, "key", f"batch dimensions {batch_k} differ from query's {batch_q}")


def to_4d(x: Tensor) -> Tensor:
    """(..., heads, seqlen, head_dim) as (batch, heads, seqlen, head_dim)."""
    return x.flatten(0, -4) if x.dim() > 4 else x[(None,) * (4 - x.dim())]


def _broadcast_to_4d(argument: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x as a 4-D view that broadcasts to `shape` with its leading dimensions made one; broadcast dimensions stay 1."""
    fits = x.dim() <= len(shape) and all(a in (1, b) for a, b in zip(reversed(x.shape), reversed(shape), strict=False))
    _check(fits, argument, f"shape {_shape(x)} does not broadcast to {tuple(shape)}")
    x = x[(None,) * (max(4, len(shape)) - x.dim())]
    if x.dim() == 4:
        return x
    batch = x.shape[:-3]
    if any(size != 1 for size in batch):
        x = x.expand(*shape[:-3], *x.shape[-3:])
    return x.flatten(0, -4)


def mask_and_bias(
    attn_mask: Tensor | None, attn_bias: Tensor | None, query: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The two slots, 4-D; a float attn_mask is a bias.

    Args:
        shape: what both broadcast to, (..., nheads, seqlen_q, seqlen_k).
    """
    mask, bias = attn_mask, attn_bias
    if attn_mask is not None and attn_mask.dtype.is_floating_point:
        _check(attn_bias is None, "attn_bias", "a float attn_mask is a bias already; give one of the two")
        mask, bias = None, attn_mask
    for name, x in (("attn_mask", attn_mask), ("attn_bias", attn_bias)):
        if x is not None:
            _check(x.device == query.device, name, f"is on {x.device}, query on {query.device}")
    if mask is not None:
        rule = "dtype must be bool (True = may attend) or float (added to the scaled scores)"
        _check(mask.dtype == torch.bool, "attn_mask", f"{rule}, got {mask.dtype}")
        mask = _broadcast_to_4d("attn_mask", mask, shape)
    if bias is not None:
        name = "attn_mask" if attn_bias is None else "attn_bias"
        rule = f"a bias must be in float32 or in query's {query.dtype}"
        _check(bias.dtype in (torch.float32, query.dtype), name, f"{rule}, got {bias.dtype}")
        bias = _broadcast_to_4d(name, bias, shape)
    return mask, bias


def band(is_causal: bool, window: tuple[int | None, int | None] | None, causal_align: str) -> tuple[int, int, bool]:
    """left, right, bottom_right of the band that causal and window make together."""
    aligns = ("top-left", "bottom-right")
    _check(causal_align in aligns, "causal_align", f"must be one of {aligns}, got {causal_align!r}")
    left, right = UNBOUNDED, UNBOUNDED
    if window is not None:
        is_pair = isinstance(window, (tuple, list)) and len(window) == 2
        valid = is_pair and all(w is None or (isinstance(w, numbers.Integral) and w >= 0) for w in window)
        _check(valid, "window", f"must be (left, right), each an int >= 0 or None, got {window!r}")
        left, right = (UNBOUNDED if w is None else min(int(w), UNBOUNDED) for w in window)
    return left, 0 if is_causal else right, causal_align == "bottom-right"


def check_dropout(dropout_p: float) -> None:
    """A probability."""
    _check(0.0 <= dropout_p <= 1.0, "dropout_p", f"must be in [0, 1], got {dropout_p}")


def check_cu_seqlens(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, side: str) -> None:
    """Device, dtype and shape always; the values on the CPU, where reading them costs nothing.

    On a GPU lengths are clamped instead, so that nothing outside of the tensors is touched.

    Args:
        x: (total_tokens, heads, head_dim), the tensor that cu_seqlens divides.
        side: "q" or "k", the suffix of the arguments' names.
    """
    name = f"cu_seqlens_{side}"
    _check(cu_seqlens.dtype == torch.int32, name, f"dtype must be int32, got {cu_seqlens.dtype}")
    _check(cu_seqlens.device == x.device, name, f"is on {cu_seqlens.device}, the tokens on {x.device}")
    rule = "must have one dimension and at least one element"
    _check(cu_seqlens.dim() == 1 and cu_seqlens.size(0) > 0, name, f"{rule}, got shape {_shape(cu_seqlens)}")
    _check(max_seqlen >= 0, f"max_seqlen_{side}", f"must not be negative, got {max_seqlen}")
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    edges = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(edges[:-1], edges[1:], strict=True)]
    smallest, largest = min(lengths, default=0), max(lengths, default=0)
    _check(edges[0] == 0, name, f"must start at 0, got {edges[0]}")
    _check(smallest >= 0, name, f"must not decrease, got a step of {smallest}")
    _check(edges[-1] <= x.size(0), name, f"must not exceed the {x.size(0)} tokens there are, got {edges[-1]}")
    _check(
        largest <= max_seqlen, f"max_seqlen_{side}", f"must be at least the longest length {largest}, got {max_seqlen}"
    )


def check_same_batch(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Both sides hold the same number of sequences."""
    sizes = cu_seqlens_k.size(0), cu_seqlens_q.size(0)
    _check(sizes[0] == sizes[1], "cu_seqlens_k", f"has {sizes[0]} elements, cu_seqlens_q has {sizes[1]}")
