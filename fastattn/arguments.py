"""From a caller's arguments to checked `AttentionParams`: every error names the argument, the rule and the value."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import compat, shapes, tensors, values
from .params import AttentionParams

CausalAlign = Literal["top-left", "bottom-right"]
Window = tuple[int | None, int | None] | None

ORDER = "the order is query, key, value, attn_mask, dropout_p, is_causal"
HALF = (torch.float16, torch.bfloat16)


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
    softcap: float | None = None,
    seqused_k: Tensor | None = None,
) -> AttentionParams:
    """The checked arguments of one dense call, as `scaled_dot_product_attention` takes them; no seed is drawn yet."""
    query, key, value = _attended(query, key, value)
    if enable_gqa is not False and enable_gqa is not True:
        enable_gqa = values.flag("enable_gqa", enable_gqa)
    q, k, v, (seqlen_q, seqlen_k, head_dim) = shapes.dense(query, key, value, enable_gqa)
    if attn_mask is not None and type(attn_mask) is not Tensor:
        lengths = seqlen_q, seqlen_k
        attn_mask, is_causal, causal_align = _band_of_mask(attn_mask, is_causal, window, causal_align, lengths)
    if type(dropout_p) is not float or not 0.0 <= dropout_p <= 1.0:
        dropout_p = values.probability("dropout_p", dropout_p)
    left, right, bottom_right = values.band(is_causal, window, causal_align)
    if type(q) is not Tensor and q.is_nested:
        check_jagged(attn_mask=attn_mask, attn_bias=attn_bias, window=window)
        check_jagged(dropout_p=dropout_p or None, causal_align=causal_align if bottom_right else None)
        check_jagged(softcap=softcap, seqused_k=seqused_k)
    mask = bias = None
    if attn_mask is not None or attn_bias is not None:
        if attn_bias is not None and type(attn_bias) is not Tensor:
            tensors.check("attn_bias", attn_bias)
        shape = (*shapes.leading(q, query, key, value), seqlen_q, seqlen_k)
        mask, bias = _mask_and_bias(attn_mask, attn_bias, query, shape)
    if seqused_k is not None:
        _check_seqused(seqused_k, q, q.shape[0], [seqlen_k])
    return AttentionParams(
        q, k, v, mask, bias, None, None, None, seqused_k, seqlen_q, seqlen_k,
        float(head_dim) ** -0.5 if scale is None else values.scale(scale),
        0.0 if softcap is None else values.softcap(softcap), dropout_p, left, right, bottom_right,
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
    softcap: float | None = None,
    seqused_k: Tensor | None = None,
) -> AttentionParams:
    """The checked arguments of one packed call, as `varlen_attention` takes them; no seed is drawn yet."""
    query, key, value = _attended(query, key, value)
    query, key, value = shapes.packed(query, key, value, values.flag("enable_gqa", enable_gqa))
    max_seqlen_q = values.length("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = values.length("max_seqlen_k", max_seqlen_k)
    _check_cu_seqlens(query, cu_seqlens_q, max_seqlen_q, "q")
    _check_cu_seqlens(key, cu_seqlens_k, max_seqlen_k, "k")
    _check_same_batch(cu_seqlens_q, cu_seqlens_k)
    left, right, bottom_right = values.band(is_causal, window, causal_align)
    for name, x in (("attn_mask", attn_mask), ("attn_bias", attn_bias)):
        if x is not None:
            tensors.check(name, x)
    shape = (cu_seqlens_q.size(0) - 1, query.shape[1], max_seqlen_q, max_seqlen_k)
    mask, bias = _mask_and_bias(attn_mask, attn_bias, query, shape)
    if seqused_k is not None:
        _check_seqused(seqused_k, query, shape[0], _readable_lengths(cu_seqlens_k))
    return AttentionParams(
        query, key, value, mask, bias, None, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k,
        float(query.shape[-1]) ** -0.5 if scale is None else values.scale(scale), values.softcap(softcap),
        values.probability("dropout_p", dropout_p), left, right, bottom_right,
    )  # fmt: skip


def with_seed(p: AttentionParams, dropout_seed: Tensor | None = None) -> AttentionParams:
    """The same call with the seed of its dropout, if it has dropout: the given one, or one that is drawn.

    Raises:
        ValueError: dropout_seed is not (1,) int64 on query's device.
    """
    if dropout_seed is not None:
        tensors.check("dropout_seed", dropout_seed)
        tensors.check_device("dropout_seed", dropout_seed, p.q)
        if dropout_seed.dtype != torch.int64 or tuple(dropout_seed.shape) != (1,):
            got = f"{dropout_seed.dtype}, {tuple(dropout_seed.shape)}"
            raise ValueError(f"dropout_seed: must be int64 of shape (1,), got {got}")
        return p if p.dropout_p == 0 else p.replace(seed=dropout_seed)
    return draw_seed(p)


def draw_seed(p: AttentionParams) -> AttentionParams:
    """The same call with the seed of its dropout, if it has dropout, drawn from the device's generator."""
    if p.dropout_p == 0:
        return p
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=p.q.device)
    return p.replace(seed=seed)


def device_type(x: Tensor) -> str:
    """x.device.type, on the usual devices without the making of a device."""
    return "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type


def _attended(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, checked but for their shapes, in autocast's dtype where autocast is on."""
    if not type(query) is type(key) is type(value) is Tensor:
        for name, x in (("query", query), ("key", key), ("value", value)):
            tensors.check(name, x)
        nested = query.is_nested, key.is_nested, value.is_nested
        if any(nested) and not all(nested):
            raise ValueError(f"query, key, value: must be nested all or none, got {nested}")
    if compat.is_any_autocast_enabled() and (dtype := _autocast_dtype(query)) is not None:
        # As torch's own attention does; float64 stays.
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    tensors.check_alike(query, key, value)
    return query, key, value


def check_jagged(**refused: object) -> None:
    """No argument, of a call with jagged nested tensors, that torch's function has no meaning for."""
    for name, x in refused.items():
        if x is not None:
            rule = "not defined for nested tensors; varlen_attention takes sequences packed"
            raise ValueError(f"{name}: {rule}, got {values.described(x)}")


# ---- autocast ----


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast, where it is on, wants of tensors on x's device."""
    device = device_type(x)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _autocast_bias(bias: Tensor, query: Tensor) -> Tensor:
    """A bias in the other half type in query's where autocast is on; float32 stays, which adds it exactly."""
    if bias.dtype in HALF and query.dtype in HALF and bias.dtype != query.dtype and _autocast_dtype(query) is not None:
        return bias.to(query.dtype)
    return bias


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
        tensors.check_device("attn_mask", mask, query)
        mask = shapes.broadcast_to_4d("attn_mask", mask, shape)
    if bias is not None:
        bias = _autocast_bias(bias, query)
        if bias.dtype not in (torch.float32, query.dtype):
            raise ValueError(f"{bias_name}: a bias must be in float32 or in query's {query.dtype}, got {bias.dtype}")
        tensors.check_device(bias_name, bias, query)
        bias = shapes.broadcast_to_4d(bias_name, bias, shape)
    return mask, bias


def _band_of_mask(
    attn_mask: Tensor, is_causal: bool, window: Window, causal_align: CausalAlign, lengths: tuple[int, int]
) -> tuple[Tensor | None, bool, CausalAlign]:
    """attn_mask, is_causal and causal_align where attn_mask may be torch's object for a causal band.

    Args:
        lengths: seqlen_q, seqlen_k.
    """
    band = tensors.causal_bias(attn_mask)
    if band is None:
        tensors.check("attn_mask", attn_mask, f"; {ORDER}")
        return attn_mask, is_causal, causal_align
    align, *size = band
    if is_causal:
        raise ValueError("is_causal: must be False where attn_mask is a CausalBias, got True")
    if tuple(size) != lengths:
        raise ValueError(f"attn_mask: a CausalBias must be of (seqlen_q, seqlen_k) = {lengths}, got {tuple(size)}")
    if causal_align != align and (window is not None or causal_align != "top-left"):
        raise ValueError(f"causal_align: must be {align!r}, that of attn_mask's CausalBias, got {causal_align!r}")
    return None, True, align


# ---- packed sequences ----


def _check_cu_seqlens(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, side: str) -> None:
    """Device, dtype and shape always; the values on the CPU, where reading them costs nothing.

    On a GPU lengths are clamped instead, so that nothing outside of the tensors is touched.

    Args:
        x: (total_tokens, heads, head_dim), the tensor that cu_seqlens divides.
        side: "q" or "k", the suffix of the arguments' names.
    """
    name = f"cu_seqlens_{side}"
    tensors.check(name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{name}: dtype must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"{name}: is on {cu_seqlens.device}, the tokens on {x.device}")
    if cu_seqlens.dim() != 1 or cu_seqlens.size(0) == 0:
        rule = "must have one dimension and at least one element"
        raise ValueError(f"{name}: {rule}, got shape {tuple(cu_seqlens.shape)}")
    _check_values(x, cu_seqlens, max_seqlen, side)


def check_lengths(p: AttentionParams) -> None:
    """The lengths that tensors hold, once more where these may have changed since the call; CPU tensors only.

    Raises:
        ValueError: they are not what they have to be.
    """
    for x, cu_seqlens, max_seqlen, side in (
        (p.q, p.cu_seqlens_q, p.max_seqlen_q, "q"),
        (p.k, p.cu_seqlens_k, p.max_seqlen_k, "k"),
    ):
        if cu_seqlens is not None:
            _check_values(x, cu_seqlens, max_seqlen, side)
    if p.seqused_k is not None:
        lengths = [p.k.shape[-2]] if p.cu_seqlens_k is None else _readable_lengths(p.cu_seqlens_k)
        if lengths is not None:
            _check_used_values(p.seqused_k, lengths)


def _check_values(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, side: str) -> None:
    """The rules for the values of cu_seqlens, where they can be read without waiting for them."""
    if not tensors.is_readable(cu_seqlens):
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


def _readable_lengths(cu_seqlens: Tensor) -> list[int] | None:
    """The lengths of packed sequences, or None where they cannot be read without waiting for them."""
    if not tensors.is_readable(cu_seqlens):
        return None
    edges = compat.to_list(cu_seqlens)
    return [end - start for start, end in zip(edges[:-1], edges[1:], strict=True)]


def _check_seqused(seqused_k: Tensor, query: Tensor, batch: int, lengths: list[int] | None) -> None:
    """Class, dtype, shape and device always; the values where they can be read without waiting for them.

    Args:
        lengths: of the keys, one for each sequence or one for all.
    """
    tensors.check("seqused_k", seqused_k)
    tensors.check_device("seqused_k", seqused_k, query)
    if seqused_k.dtype != torch.int32 or tuple(seqused_k.shape) != (batch,):
        got = f"{seqused_k.dtype}, {tuple(seqused_k.shape)}"
        raise ValueError(f"seqused_k: must be int32 of shape (batch,) = ({batch},), got {got}")
    if lengths is not None:
        _check_used_values(seqused_k, lengths)


def _check_used_values(seqused_k: Tensor, lengths: list[int]) -> None:
    if not tensors.is_readable(seqused_k):
        return
    used = compat.to_list(seqused_k)
    for b, n in enumerate(used):
        length = lengths[b if len(lengths) == len(used) else 0]
        if not 0 <= n <= length:
            raise ValueError(f"seqused_k: must be in [0, {length}], the keys of sequence {b}, got {n}")


def _check_same_batch(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Both sides hold the same number of sequences."""
    if cu_seqlens_q.size(0) != cu_seqlens_k.size(0):
        sizes = cu_seqlens_k.size(0), cu_seqlens_q.size(0)
        raise ValueError(f"cu_seqlens_k: has {sizes[0]} elements, cu_seqlens_q has {sizes[1]}")
