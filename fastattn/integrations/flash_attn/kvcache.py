"""flash_attn_with_kvcache: new keys and values written into a cache, in place, and attention over what it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import functional, tensors
from . import alibi
from .arguments import (
    WindowSize,
    check_block_table,
    check_indices,
    check_shapes,
    looks_ahead,
    options,
    pages,
    used_blocks,
)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a cache of keys and values, after new ones were written into it. Without gradients.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k_cache: (batch_cache, seqlen_cache, nheads_k, headdim), batch_cache >= batch; or in pages of any size, with a
            block_table, (num_blocks, page_block_size, nheads_k, headdim).
        v_cache: the same of the values; headdim_v.
        k: (batch, seqlen_new, nheads_k, headdim), written into k_cache behind each sequence's cache_seqlens.
        v: the same of the values; both or none.
        rotary_cos, rotary_sin: refused if given: rotate q and k before the call.
        cache_seqlens: int, or (batch,) int32: how many keys the cache holds of each sequence, before k; None: as many
            as it has places. Checked on the CPU; on a GPU lengths are clamped where keys are read, and writing past the
            end is an error of the device.
        cache_batch_idx: (batch,) int32, which of the cache's sequences are meant; distinct if there is k. Without it
            sequence b is the cache's b; with it they are copied.
        cache_leftpad: (batch,) int32, where a sequence's keys begin in the cache. Queries are at the end as ever.
        block_table: (batch, blocks) int32, which pages have a sequence's keys, in their order; they are copied. Not
            with cache_batch_idx.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`; seqlen_k is what the cache
            holds of a sequence in the end.
        rotary_interleaved: of no effect.
        num_splits: of no effect: fastattn divides the keys by itself.
        return_softmax_lse: also return softmax_lse.

    Returns:
        out: (batch, seqlen_q, nheads, headdim_v), q's dtype, contiguous.
        softmax_lse, if asked for: (batch, nheads, seqlen_q), natural log, float32.

    Raises:
        NotImplementedError: rotary_cos or rotary_sin is given.
        ValueError: kinds, shapes, dtypes, devices or values of arguments are wrong or disagree.

    Source: as `flash_attn_func`.
    """
    for name, x in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        if x is not None:
            raise NotImplementedError(f"{name}: not applied here; rotate q and k before the call, and give None")
    used, block_table = _append(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, block_table)
    if block_table is not None:
        k_cache, v_cache = pages(k_cache, block_table), pages(v_cache, block_table)
    elif cache_batch_idx is not None:
        k_cache, v_cache = (x.index_select(0, cache_batch_idx) for x in (k_cache, v_cache))
    else:
        k_cache, v_cache = k_cache[: q.shape[0]], v_cache[: q.shape[0]]
    batch, nheads = check_shapes(q, k_cache, v_cache)
    seqlen_q, seqlen_k = q.shape[1], k_cache.shape[1]
    how = options(0.0, softmax_scale, causal, window_size, softcap) | {"seqused_k": used}
    shift = seqlen_k - seqlen_q if used is None else used - seqlen_q
    if cache_leftpad is not None:
        _check_batch("cache_leftpad", cache_leftpad, q)
        places = torch.arange(seqlen_k, device=q.device)
        how["attn_mask"] = (places >= cache_leftpad[:, None])[:, None, None]
    if alibi_slopes is not None:
        alibi_slopes = alibi.checked(alibi_slopes, q, batch, nheads)
        how["attn_bias"] = alibi.bias(alibi_slopes, seqlen_q, seqlen_k, shift, looks_ahead(how))
    q, k_cache, v_cache = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    results: Any = functional.scaled_dot_product_attention(q, k_cache, v_cache, **how, return_lse=return_softmax_lse)
    if not return_softmax_lse:
        return results.transpose(1, 2).contiguous()
    out, lse = results
    if alibi_slopes is not None and not looks_ahead(how):
        lse = alibi.corrected_lse(lse, alibi_slopes, seqlen_k, shift)
    return out.transpose(1, 2).contiguous(), lse


def _append(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Write k and v into the caches.

    Returns:
        How many keys each sequence has then, (batch,) int32, or None for all places; and the block table, checked.
    """
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        tensors.check(name, x)
        if x.dim() != 4 or x.dtype != q.dtype:
            raise ValueError(f"{name}: must have four dimensions, in {q.dtype}, got {tuple(x.shape)}, {x.dtype}")
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError("cache_batch_idx: must be None where there is a block_table, which says what is meant")
    if block_table is not None:
        check_block_table(block_table, q, q.shape[0])
    if cache_batch_idx is not None:
        _check_batch("cache_batch_idx", cache_batch_idx, q)
        check_indices("cache_batch_idx", cache_batch_idx, k_cache.shape[0], "sequences of the cache")
    if (k is None) != (v is None):
        raise ValueError("k, v: must both be given, or none")
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens: must be given with k, which is written behind them")
        return None, None if block_table is None else used_blocks(block_table, k_cache, None)
    _check_batch("cache_seqlens", cache_seqlens, q)
    new = 0 if k is None else k.shape[1]
    page = k_cache.shape[1]
    capacity = page if block_table is None else page * block_table.shape[1]
    _check_capacity(cache_seqlens, new, capacity, "the cache" if block_table is None else "block_table")
    used = cache_seqlens + new
    if block_table is not None:
        block_table = used_blocks(block_table, k_cache, used)
    if k is not None and v is not None:
        places = cache_seqlens.long()[:, None] + torch.arange(new, device=q.device)
        if block_table is not None:
            where = block_table.long().gather(1, places // page), places % page
        else:
            rows = torch.arange(q.shape[0], device=q.device) if cache_batch_idx is None else cache_batch_idx.long()
            where = rows[:, None], places
        for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
            expected = (q.shape[0], new, *cache.shape[2:])
            if tuple(x.shape) != expected or x.dtype != cache.dtype:
                raise ValueError(f"{name}: must be {expected}, {cache.dtype}, got {tuple(x.shape)}, {x.dtype}")
            cache[where] = x
    return used, block_table


def _check_batch(name: str, x: Tensor, q: Tensor) -> None:
    """(batch,) int32 on q's device."""
    tensors.check(name, x)
    tensors.check_device(name, x, q)
    if x.dtype != torch.int32 or tuple(x.shape) != (q.shape[0],):
        raise ValueError(f"{name}: must be int32, (batch,) = ({q.shape[0]},), got {x.dtype}, {tuple(x.shape)}")


def _check_capacity(cache_seqlens: Tensor, new: int, capacity: int, holder: str) -> None:
    """The places that there are, where lengths can be read without waiting for them."""
    if not tensors.is_readable(cache_seqlens):
        return
    for b, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= capacity - new:
            rule = f"must be in [0, {capacity - new}], the {capacity} places of {holder} less {new} new ones"
            raise ValueError(f"cache_seqlens: {rule}, got {length} for sequence {b}")
