"""The public functions: docstrings, argument checks, choice of backend."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments, autograd, backends, reference
from .backends import Backend, Explanation, Problem
from .params import UNBOUNDED, AttentionParams

CausalAlign = Literal["top-left", "bottom-right"]
Window = tuple[int | None, int | None] | None


def scaled_dot_product_attention(
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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Fused softmax(scale * Q K^T + bias) V over the allowed keys, with dropout of the weights.

    Equivalent, without storing the scores, to::

        scores = scale * query @ key.transpose(-1, -2) + attn_bias
        scores = scores.masked_fill(~(attn_mask & band), -inf)
        lse = scores.logsumexp(-1)
        weights = dropout(exp(scores - lse), dropout_p)
        out = weights @ value

    Args:
        query: (..., nheads, seqlen_q, head_dim), float32, float16, bfloat16 or float64. Any strides; fused kernels copy
            a tensor whose last dimension is not contiguous, and `explain` says so.
        key: (..., nheads_k, seqlen_k, head_dim), query's dtype and device; nheads_k == nheads unless enable_gqa.
        value: (..., nheads_k, seqlen_k, head_dim_v).
        attn_mask: broadcasts to (..., nheads, seqlen_q, seqlen_k) and is never expanded. bool: True = may attend.
            float: the same as attn_bias.
        dropout_p: probability in [0, 1] of dropping a weight; the kept ones are scaled by 1 / (1 - dropout_p). There is
            no training flag. `reference.dropout_mask` says which are kept, for a seed that every call draws from the
            device's generator.
        is_causal: allow key j for query i only if j <= i (+ seqlen_k - seqlen_q when bottom-right). Combines with
            attn_mask, attn_bias and window. Drawn for 3 queries and 5 keys::

                top-left     1 0 0 0 0      bottom-right     1 1 1 0 0
                             1 1 0 0 0                       1 1 1 1 0
                             1 1 1 0 0                       1 1 1 1 1

        scale: factor of the scores; None means head_dim ** -0.5.
        enable_gqa: nheads may be a multiple of nheads_k; consecutive query heads share a key head.
        attn_bias: float, query's dtype or float32, added to the scaled scores; broadcasts like attn_mask. Its gradient
            has its own shape.
        window: (left, right), each an int >= 0 or None (unbounded): allow key j for query i only if
            -left <= j - i <= right (i + seqlen_k - seqlen_q when bottom-right). (1, 0), bottom-right, 3 x 5::

                0 1 1 0 0
                0 0 1 1 0
                0 0 0 1 1

        causal_align: "top-left" (torch's rule) or "bottom-right" (FlashAttention's), for is_causal and window.
        return_lse: also return the log-sum-exp of the rows.

    Returns:
        out: (..., nheads, seqlen_q, head_dim_v), query's dtype. A query with no allowed key gets 0, and zero gradients.
        lse, if asked for: (..., nheads, seqlen_q), natural log, float32 (float64 for float64 inputs), differentiable;
        -inf for a query with no allowed key.

    Determinism: forward and backward are bitwise reproducible for one seed, backend and device.

    Raises:
        ValueError: shapes, dtypes, devices or values disagree; the message names the argument, the rule and the value.
        NotImplementedError: `use_backend` names a backend that cannot take the call; the message lists the reasons.

    Source: Vaswani et al. 2017, eq. 1; Milakov & Gimelshein 2018 (online softmax); Dao 2023, Algorithms 1 and 2.
    """
    p = attention_params(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        attn_bias=attn_bias, window=window, causal_align=causal_align,
    )  # fmt: skip
    out, lse = attend(draw_seed(p), return_lse)
    if query.dim() == 4:
        return out if lse is None else (out, lse)
    batch_and_heads = query.shape[:-2]
    out = out.reshape(*batch_and_heads, *out.shape[-2:])
    return out if lse is None else (out, lse.reshape(*batch_and_heads, lse.shape[-1]))


def varlen_attention(
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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Fused attention of sequences packed one behind the other without padding; each attends to its own keys only.

    Equivalent to `scaled_dot_product_attention` of every sequence by itself::

        for b in range(batch):
            rows = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1])
            keys = slice(cu_seqlens_k[b], cu_seqlens_k[b + 1])
            out[rows] = attention(query[rows], key[keys], value[keys])  # heads in the middle

    and bit for bit the same dropout as the padded batch.

    Args:
        query: (total_q, nheads, head_dim), float32, float16, bfloat16 or float64.
        key: (total_k, nheads_k, head_dim), query's dtype and device; nheads_k == nheads unless enable_gqa.
        value: (total_k, nheads_k, head_dim_v).
        cu_seqlens_q: (batch + 1,) int32 on query's device; sequence b is tokens cu_seqlens_q[b] ... cu_seqlens_q[b + 1]
            - 1. It starts at 0 and does not decrease. Checked by value on the CPU; on a GPU lengths are clamped.
        cu_seqlens_k: the same for key and value.
        max_seqlen_q, max_seqlen_k: no sequence is longer.
        attn_mask, attn_bias: as in `scaled_dot_product_attention`, broadcast to (batch, nheads, max_seqlen_q,
            max_seqlen_k) and indexed by the position inside the sequence.
        dropout_p, is_causal, scale, enable_gqa, window, causal_align, return_lse: as in `scaled_dot_product_attention`,
            per sequence; the default alignment is bottom-right.

    Returns:
        out: (total_q, nheads, head_dim_v), query's dtype. Tokens past cu_seqlens_q[-1] and queries with no allowed key
        get 0 and zero gradients.
        lse, if asked for: (nheads, total_q), natural log, float32 (float64 for float64 inputs), differentiable; -inf
        for those tokens.

    Determinism: forward and backward are bitwise reproducible for one seed, backend and device.

    Raises:
        ValueError: shapes, dtypes, devices or values disagree; the message names the argument, the rule and the value.
        NotImplementedError: `use_backend` names a backend that cannot take the call; the message lists the reasons.

    Source: Vaswani et al. 2017, eq. 1; Dao 2023, section 3.
    """
    p = varlen_attention_params(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        attn_mask=attn_mask, attn_bias=attn_bias, dropout_p=dropout_p, is_causal=is_causal, window=window,
        causal_align=causal_align, scale=scale, enable_gqa=enable_gqa,
    )  # fmt: skip
    out, lse = attend(draw_seed(p), return_lse)
    return out if lse is None else (out, lse)


def explain(*args: Any, return_lse: bool = False, **kwargs: Any) -> Explanation:
    """Say which backend a call would run on, by which route, and why not on those preferred to it. Nothing is computed.

    Args: those of `scaled_dot_product_attention`, or those of `varlen_attention`, told apart by cu_seqlens_q.

    Returns:
        An object to print; its fields are `backend`, `route`, `refusals` and `notes`.

    Raises:
        ValueError, NotImplementedError: as the call itself would.
    """
    is_packed = "cu_seqlens_q" in kwargs or (len(args) > 3 and getattr(args[3], "dtype", None) == torch.int32)
    p = varlen_attention_params(*args, **kwargs) if is_packed else attention_params(*args, **kwargs)
    problem = _problem(p, return_lse)
    backend = backends.choose(problem)
    copied = [name for name in "qkv" if getattr(p, name).stride(-1) != 1] if _is_fused(backend, problem) else []
    notes = tuple(f"{name} is copied, because its last dimension is not contiguous" for name in copied)
    return backends.explain_choice(problem, notes)


# ---- the same in three steps, for modules that also want the weights of the very same call ----


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
    query, key, value = arguments.autocast(query, key, value)
    shape, key_shape = arguments.query_and_key_shapes(query, key, value, enable_gqa, is_packed=False)
    arguments.check_dropout(dropout_p)
    left, right, bottom_right = arguments.band(is_causal, window, causal_align)
    mask = bias = None
    if attn_mask is not None or attn_bias is not None:
        mask, bias = arguments.mask_and_bias(attn_mask, attn_bias, query, (*shape[:-1], key_shape[-2]))
    q, k, v = (query, key, value) if len(shape) == 4 else arguments.to_4d(query, key, value)
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
    query, key, value = arguments.autocast(query, key, value)
    _, nheads, head_dim = arguments.query_and_key_shapes(query, key, value, enable_gqa, is_packed=True)[0]
    arguments.check_cu_seqlens(query, cu_seqlens_q, max_seqlen_q, "q")
    arguments.check_cu_seqlens(key, cu_seqlens_k, max_seqlen_k, "k")
    arguments.check_same_batch(cu_seqlens_q, cu_seqlens_k)
    arguments.check_dropout(dropout_p)
    left, right, bottom_right = arguments.band(is_causal, window, causal_align)
    shape = (cu_seqlens_q.size(0) - 1, nheads, max_seqlen_q, max_seqlen_k)
    mask, bias = arguments.mask_and_bias(attn_mask, attn_bias, query, shape)
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


def attend(p: AttentionParams, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """out and, if asked for, lse on the backend of choice; 4-D, or packed. Where p has dropout it has a seed."""
    problem = _problem(p, return_lse)
    backend = backends.choose(problem)
    if backend.name == "reference":
        out, lse = reference.attention(p)
    elif _is_fused(backend, problem):
        out, lse = autograd.forward(backend.name, _operands(p))
    else:
        return _torch_attention(p), None
    return out, lse if return_lse else None


def attention_weights(p: AttentionParams) -> Tensor:
    """The weights of a dense call, dropout included: (batch, nheads, seqlen_q, seqlen_k), differentiable, q's dtype.

    A query with no allowed key has weights 0. The scores are stored, as they must be for whoever wants to see them.
    """
    return reference.attention_weights(p).to(p.q.dtype)


def _is_fused(backend: Backend, problem: Problem) -> bool:
    """Whether the call goes through the operator, and not through torch's function or plain differentiable code."""
    return backend.name != "reference" and (backend.name != "torch" or backends.why_not_sdpa(problem) is not None)


def _torch_attention(p: AttentionParams) -> Tensor:
    """F.scaled_dot_product_attention of a call for which it says the same."""
    mask, options = p.mask, {}
    if p.left < UNBOUNDED or p.right < UNBOUNDED:
        is_top_left = not p.bottom_right or p.max_seqlen_q == p.max_seqlen_k
        is_plain_causal = p.left == UNBOUNDED and p.right == 0 and p.mask is None and p.bias is None
        # With a scale of 0 or less torch's causal kernels return NaN: they mask by -inf before they scale.
        if is_plain_causal and is_top_left and p.scale > 0:
            options["is_causal"] = True
        else:
            mask = reference.band(p) if mask is None else reference.band(p) & mask
    if p.bias is not None:
        mask = p.bias if mask is None else torch.where(mask, p.bias, -torch.inf)
    if p.q.size(1) != p.k.size(1):
        options["enable_gqa"] = True
    if p.q.device.type == "cpu" and p.q.dtype in backends.HALF:
        # In half precision torch's gradient is ten times slower than in float32 on the CPU.
        q, k, v = (x.float() for x in (p.q, p.k, p.v))
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q, k, v, mask, scale=p.scale, **options).to(p.q.dtype)
    return F.scaled_dot_product_attention(p.q, p.k, p.v, mask, scale=p.scale, **options)


def _problem(p: AttentionParams, return_lse: bool) -> Problem:
    q, bias = p.q, p.bias
    return Problem(
        arguments.device_type(q),
        _capability(q.device) if q.is_cuda else None,
        q.dtype,
        q.shape[-1],
        p.v.shape[-1],
        p.cu_seqlens_q is not None,
        None if bias is None else bias.dtype,
        p.dropout_p,
        return_lse,
        bias is not None and (q.numel() == 0 or p.k.numel() == 0),
    )


def _capability(device: torch.device) -> tuple[int, int]:
    if torch.compiler.is_compiling():  # which warns of any cache it meets
        return torch.cuda.get_device_capability(device)
    return _cached_capability(device)


_cached_capability = functools.cache(torch.cuda.get_device_capability)


def _scale(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if scale is None else scale


def _operands(p: AttentionParams) -> AttentionParams:
    """The call as the operator takes it: last dimensions contiguous, no tensor twice (torch.compile forbids it)."""
    q, k, v, cu_seqlens_k = p.q, p.k, p.v, p.cu_seqlens_k
    is_plain = q is not k and q is not v and k is not v and (cu_seqlens_k is None or cu_seqlens_k is not p.cu_seqlens_q)
    if is_plain and q.stride()[-1] == k.stride()[-1] == v.stride()[-1] == 1:
        return p
    q, k, v = (autograd.with_contiguous_rows(x) for x in (q, k, v))
    k = k.view_as(k) if k is q else k
    v = v.view_as(v) if v is q or v is p.k else v
    if cu_seqlens_k is not None and cu_seqlens_k is p.cu_seqlens_q:
        cu_seqlens_k = cu_seqlens_k.view_as(cu_seqlens_k)
    return p.replace(q=q, k=k, v=v, cu_seqlens_k=cu_seqlens_k)
