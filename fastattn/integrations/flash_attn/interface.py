"""The functions of flash_attn.flash_attn_interface: its arguments, its layout (batch, seqlen, nheads, headdim)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import functional, reference, values
from ...arguments import attention_params
from . import alibi
from .arguments import (
    WindowSize,
    check_block_table,
    check_cu_seqlens,
    check_shapes,
    looks_ahead,
    options,
    pages,
    unpacked,
    used_blocks,
)

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention with flash-attn's arguments, on every device and in every dtype of fastattn.

    Equivalent to::

        out = fastattn.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=dropout_p, is_causal=causal,
            scale=softmax_scale, enable_gqa=True, window=window_size, causal_align="bottom-right", softcap=softcap
        ).transpose(1, 2)

    and its masks, for 2 queries and 5 keys, 1 = may attend::

        causal   1 1 1 1 0      window_size=(1, 0)   0 0 1 1 0
                 1 1 1 1 1                           0 0 0 1 1

    Args:
        q: (batch, seqlen_q, nheads, headdim), float32, float16, bfloat16 or float64; any strides.
        k: (batch, seqlen_k, nheads_k, headdim), q's dtype and device; nheads is a multiple of nheads_k.
        v: (batch, seqlen_k, nheads_k, headdim_v).
        dropout_p: probability in [0, 1] of dropping a weight; 0.0 in evaluation.
        softmax_scale: factor of the scores; None means headdim ** -0.5.
        causal: allow key j for query i only if j <= i + seqlen_k - seqlen_q.
        window_size: (left, right), ints: allow key j for query i only if
            -left <= j - (i + seqlen_k - seqlen_q) <= right; negative: unbounded. causal makes right 0.
        softcap: scores approach it, in either direction, and do not pass it; None, 0 or less: there is none.
        alibi_slopes: (nheads,) or (batch, nheads) float32: -slope * |i + seqlen_k - seqlen_q - j| is added to the
            scores. Takes one float for each key where no query looks ahead (causal, or right 0), else a float for each
            query, key, head, and sequence if it has a batch dimension.
        deterministic: of no effect: fastattn always is.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out: (batch, seqlen_q, nheads, headdim_v), q's dtype, contiguous; 0 for a query without keys.
        softmax_lse, if asked for: (batch, nheads, seqlen_q), natural log, float32 (float64 for float64 inputs),
        differentiable; -inf for a query without keys.
        S_dmask, if asked for: (batch, nheads, seqlen_q, seqlen_k), q's dtype, the weights before dropout, negative
        where they were dropped, without gradients; empty, (0,), without dropout, as in flash-attn.

    Raises:
        ValueError: kinds, shapes, dtypes, devices or values of arguments are wrong or disagree.

    Source: Dao 2023, FlashAttention-2; the interface is that of flash-attn 2.
    """
    batch, nheads = check_shapes(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    how = options(dropout_p, softmax_scale, causal, window_size, softcap)
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    shift, ahead = seqlen_k - seqlen_q, looks_ahead(how)
    if alibi_slopes is not None:
        alibi_slopes = alibi.checked(alibi_slopes, q, batch, nheads)
        how["attn_bias"] = alibi.bias(alibi_slopes, seqlen_q, seqlen_k, shift, ahead)
    if not values.flag("return_attn_probs", return_attn_probs):
        out: Any = functional.scaled_dot_product_attention(q, k, v, **how)
        return out.transpose(1, 2).contiguous()
    results: Any = functional.scaled_dot_product_attention(q, k, v, **how, return_lse=True, return_seed=True)
    out, lse, seed = results
    if alibi_slopes is not None and not ahead:
        lse = alibi.corrected_lse(lse, alibi_slopes, seqlen_k, shift)
    if seed is None:
        pattern = q.new_empty(0)
    else:
        keep = reference.dropout_mask(seed, batch, nheads, seqlen_q, seqlen_k, how["dropout_p"])
        pattern = _pattern(q, k, how, keep)
    return out.transpose(1, 2).contiguous(), lse, pattern


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Result:
    """`flash_attn_func` of k and v in one tensor.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        kv: (batch, seqlen_k, 2, nheads_k, headdim).
        args, kwargs: the other arguments of `flash_attn_func`, from dropout_p on.

    Returns:
        As `flash_attn_func`.

    Raises:
        ValueError: as `flash_attn_func`, or the third dimension is not 2.
    """
    k, v = unpacked("kv", kv, 2, 5)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **kwargs: Any) -> Result:
    """`flash_attn_func` of q, k and v in one tensor.

    Args:
        qkv: (batch, seqlen, 3, nheads, headdim).
        args, kwargs: the other arguments of `flash_attn_func`, from dropout_p on.

    Returns:
        As `flash_attn_func`.

    Raises:
        ValueError: as `flash_attn_func`, or the third dimension is not 3.
    """
    q, k, v = unpacked("qkv", qkv, 3, 5)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """`flash_attn_func` of sequences packed one behind the other: `fastattn.varlen_attention` with its arguments.

    Args:
        q: (total_q, nheads, headdim).
        k: (total_k, nheads_k, headdim); with a block_table (num_blocks, page_block_size, nheads_k, headdim).
        v: (total_k, nheads_k, headdim_v), or in pages as k.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 on q's device, where sequences start and the last one ends.
        max_seqlen_q, max_seqlen_k: ints; no sequence is longer.
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic: as in `flash_attn_func`, per sequence.
        alibi_slopes: as there; where a query looks ahead, (batch, nheads, max_seqlen_q, max_seqlen_k) floats.
        return_attn_probs: as there; S_dmask waits for a GPU, to read the lengths.
        block_table: (batch, blocks) int32, which pages have a sequence's keys, in their order; cu_seqlens_k then only
            says how many keys there are. The pages are copied side by side.

    Returns:
        out: (total_q, nheads, headdim_v).
        softmax_lse, if asked for: (nheads, total_q).
        S_dmask, if asked for: (batch, nheads, max_seqlen_q, max_seqlen_k), 0 outside of the sequences; empty, (0,),
        without dropout.

    Raises:
        ValueError: kinds, shapes, dtypes, devices or values of arguments are wrong or disagree.

    Source: as `flash_attn_func`.
    """
    _, nheads = check_shapes(q, k, v, is_packed=True, is_paged=block_table is not None)
    batch = check_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
    how = options(dropout_p, softmax_scale, causal, window_size, softcap)
    ahead, lengths_k = looks_ahead(how), cu_seqlens_k.diff()
    shift, places = lengths_k - cu_seqlens_q.diff(), max_seqlen_k
    if block_table is not None:
        check_block_table(block_table, q, batch)
        block_table = used_blocks(block_table, k, lengths_k)
        k, v = pages(k, block_table, max_seqlen_k), pages(v, block_table, max_seqlen_k)
        places = k.shape[1]
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        cu_seqlens_k = places * torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        how["seqused_k"] = lengths_k
    if alibi_slopes is not None:
        alibi_slopes = alibi.checked(alibi_slopes, q, batch, nheads)
        how["attn_bias"] = alibi.bias(alibi_slopes, max_seqlen_q, places, shift, ahead)
    return_attn_probs = values.flag("return_attn_probs", return_attn_probs)
    results: Any = functional.varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, places, **how, return_lse=return_attn_probs,
        return_seed=return_attn_probs,
    )  # fmt: skip
    if not return_attn_probs:
        return results
    out, lse, seed = results
    if alibi_slopes is not None and not ahead:
        lse = alibi.corrected_packed_lse(lse, alibi_slopes, places, shift, cu_seqlens_q)
    if seed is None:
        return out, lse, q.new_empty(0)
    keep = reference.dropout_mask(seed, batch, nheads, max_seqlen_q, max_seqlen_k, how["dropout_p"])
    return out, lse, _packed_pattern(q, k, cu_seqlens_q, cu_seqlens_k, lengths_k, how, keep)


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Result:
    """`flash_attn_varlen_func` of k and v in one tensor.

    Args:
        q: (total_q, nheads, headdim).
        kv: (total_k, 2, nheads_k, headdim).
        args, kwargs: the other arguments of `flash_attn_varlen_func`, from cu_seqlens_q on.

    Returns:
        As `flash_attn_varlen_func`.

    Raises:
        ValueError: as `flash_attn_varlen_func`, or the second dimension is not 2.
    """
    k, v = unpacked("kv", kv, 2, 4)
    return flash_attn_varlen_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> Result:
    """`flash_attn_varlen_func` of q, k and v in one tensor.

    Args:
        qkv: (total, 3, nheads, headdim).
        cu_seqlens: (batch + 1,) int32, of queries and keys.
        max_seqlen: int; no sequence is longer.
        args, kwargs: the other arguments of `flash_attn_varlen_func`, from dropout_p on.

    Returns:
        As `flash_attn_varlen_func`.

    Raises:
        ValueError: as `flash_attn_varlen_func`, or the second dimension is not 3.
    """
    q, k, v = unpacked("qkv", qkv, 3, 4)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


# ---- S_dmask ----


@torch.no_grad()
def _pattern(q: Tensor, k: Tensor, how: dict[str, Any], keep: Tensor) -> Tensor:
    """The weights before dropout, negative where they were dropped.

    Args:
        q, k: (batch, nheads, seqlen_q, headdim) and (batch, nheads_k, seqlen_k, headdim).
        keep: (batch, nheads, seqlen_q, seqlen_k) bool.
    """
    weights = functional.weights_of(attention_params(q, k, k, **how))  # no seed is drawn, and nothing dropped
    return torch.where(keep, weights, -weights)


def _packed_pattern(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    lengths_k: Tensor,
    how: dict[str, Any],
    keep: Tensor,
) -> Tensor:
    """The same of packed sequences, (batch, nheads, max_seqlen_q, max_seqlen_k)."""
    pattern, bias = torch.zeros_like(keep, dtype=q.dtype), how.get("attn_bias")
    edges, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b, length_k in enumerate(lengths_k.tolist()):
        length_q = edges[b + 1] - edges[b]
        query, key = q[edges[b] :][:length_q], k[starts_k[b] :][:length_k]
        one = how | {"seqused_k": None}
        if bias is not None:
            one["attn_bias"] = (bias if bias.dim() == 3 else bias[b])[:, :length_q, :length_k]
        seen = (b, slice(None), slice(length_q), slice(length_k))
        pattern[seen] = _pattern(query.transpose(0, 1)[None], key.transpose(0, 1)[None], one, keep[seen][None])[0]
    return pattern
