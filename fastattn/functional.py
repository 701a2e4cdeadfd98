"""The public functions of attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import autograd, backends, merging, overrides, reference, shapes
from .arguments import CausalAlign, Window, attention_params, check_jagged, varlen_attention_params, with_seed
from .backends import Explanation, Route
from .params import AttentionParams


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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    return_seed: bool = False,
) -> Tensor | tuple[Any, ...]:
    """Fused softmax(scale * Q K^T + bias) V over the allowed keys, with dropout of the weights.

    Equivalent, without storing the scores, to::

        scores = scale * query @ key.transpose(-1, -2)
        scores = softcap * tanh(scores / softcap)                # if there is a softcap
        scores = scores + attn_bias
        scores = scores.masked_fill(~(attn_mask & band & (key_index < seqused_k)), -inf)
        lse = cat([scores, sinks], -1).logsumexp(-1)             # a sink is one more score of every row
        weights = dropout(exp(scores - lse), dropout_p)          # of which no weight is left
        out = weights @ value

    Args:
        query: (..., nheads, seqlen_q, head_dim), float32, float16, bfloat16 or float64. Any strides; fused kernels copy
            a tensor whose last dimension is not contiguous, and `explain` says so.
        key: (..., nheads_k, seqlen_k, head_dim), query's dtype and device; nheads_k == nheads unless enable_gqa.
        value: (..., nheads_v, seqlen_k, head_dim_v); nheads_v == nheads_k, but for what follows.
            Dimensions before the last two broadcast between the three, as in torch's function: 1 or missing in some.
            One batch dimension is never copied, heads only where nheads_k and nheads_v are different numbers above 1.
            Gradients have the tensors' own shapes.
        attn_mask: broadcasts to (..., nheads, seqlen_q, seqlen_k) and is never expanded. bool: True = may attend.
            float: the same as attn_bias. A torch.nn.attention.bias.CausalBias of (seqlen_q, seqlen_k): is_causal in its
            alignment, which causal_align has to name if a window is given, too.
        dropout_p: probability in [0, 1] of dropping a weight; the kept ones are scaled by 1 / (1 - dropout_p). There is
            no training flag. `reference.dropout_mask` says which are kept, for a seed that every call draws from the
            device's generator.
        is_causal: allow key j for query i only if j <= i (+ seqlen_k - seqlen_q when bottom-right). Combines with
            attn_mask, attn_bias and window. Drawn for 3 queries and 5 keys::

                top-left     1 0 0 0 0      bottom-right     1 1 1 0 0
                             1 1 0 0 0                       1 1 1 1 0
                             1 1 1 0 0                       1 1 1 1 1

        scale: factor of the scores, a finite number; None means head_dim ** -0.5. A learned one, or one per head, is a
            factor of the query: (query * scale, key, value, scale=1.0).
        enable_gqa: nheads may be a multiple of nheads_k and of nheads_v; consecutive query heads share a key head.
        attn_bias: float, query's dtype or float32, added to the scaled scores; broadcasts like attn_mask. Its gradient
            has its own shape. Under autocast one in the other half type is cast to query's, and float32 stays. Fused
            kernels take what is below -2.3e38, such as torch.finfo(torch.float32).min, for -inf.
        window: (left, right), each an int >= 0 or None (unbounded): allow key j for query i only if
            -left <= j - i <= right (i + seqlen_k - seqlen_q when bottom-right). (1, 0), bottom-right, 3 x 5::

                0 1 1 0 0
                0 0 1 1 0
                0 0 0 1 1

        causal_align: "top-left" (torch's rule) or "bottom-right" (FlashAttention's), for is_causal and window.
        softcap: a number from 1e-30 to 1e38: scores approach it, in either direction, and do not pass it (Gemma 2).
        sinks: (nheads,) float, a logit of each head that takes weight and has no value (GPT-OSS). Differentiable.
        seqused_k: (batch,) int32 on query's device, batch being the product of the dimensions before the heads: how
            many of each sequence's keys there are; what k and v hold behind them does not matter. Bottom-right counts
            from them. Checked by value on the CPU; on a GPU lengths are clamped.
        dropout_seed: (1,) int64 on query's device: the seed of this call's dropout, the same mask anywhere; None draws
            one.
        return_lse: also return the log-sum-exp of the rows.
        return_seed: also return the seed of the dropout.

    Returns:
        out: (..., nheads, seqlen_q, head_dim_v), query's dtype. A query with no allowed key gets 0, and zero gradients.
        lse, if asked for: (..., nheads, seqlen_q), natural log, float32 (float64 for float64 inputs), differentiable;
        sinks included; -inf for a query with no allowed key, or its sink. `merge_attention` needs it.
        seed, if asked for, the last: (1,) int64, or None without dropout.

    Determinism: forward and backward are bitwise reproducible for one seed, backend and device; on a GPU the `torch`
    backend is as reproducible as torch's function; torch.use_deterministic_algorithms(True) leaves it no call that a
    fused backend takes.

    Jagged nested tensors are attended to by torch's function, without what that has not: attn_mask, attn_bias, window,
    bottom-right, dropout and lse. `varlen_attention` takes all of these with packed sequences.

    Raises:
        ValueError: kinds, shapes, dtypes, devices or values of arguments are wrong or disagree; the message names the
            argument, the rule and the value. So is a tensor of a class with a __torch_function__ of its own: its
            storage may not be what it means.
        NotImplementedError: `use_backend` names a backend that cannot take the call; the message lists the reasons.

    Source: Vaswani et al. 2017, eq. 1; Milakov & Gimelshein 2018 (online softmax); Dao 2023, Algorithms 1 and 2.
    """
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return overrides.hand_over(
            scaled_dot_product_attention, query, key, value, attn_mask=attn_mask, dropout_p=dropout_p,
            is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, attn_bias=attn_bias, window=window,
            causal_align=causal_align, softcap=softcap, sinks=sinks, seqused_k=seqused_k, dropout_seed=dropout_seed,
            return_lse=return_lse, return_seed=return_seed,
        )  # fmt: skip
    p = attention_params(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attn_bias=attn_bias, window=window,
        causal_align=causal_align, softcap=softcap, seqused_k=seqused_k,
    )  # fmt: skip
    p = with_seed(p, dropout_seed)
    if sinks is None:
        out, lse = attend(p, return_lse)
    else:
        out, lse = attend_with_sinks(p, sinks)
    if not query.dim() == key.dim() == value.dim() == 4:
        leading = shapes.leading(out, query, key, value)
        out = out.reshape(*leading, *out.shape[2:])
        lse = None if lse is None else lse.reshape(*leading, *lse.shape[2:])
    return _results(out, lse, p.seed, return_lse, return_seed)


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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    return_seed: bool = False,
) -> Tensor | tuple[Any, ...]:
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
        value: (total_k, nheads_k, head_dim_v). Heads broadcast as in `scaled_dot_product_attention`.
        cu_seqlens_q: (batch + 1,) int32 on query's device; sequence b is tokens cu_seqlens_q[b] ... cu_seqlens_q[b + 1]
            - 1. It starts at 0 and does not decrease. Checked by value on the CPU; on a GPU lengths are clamped.
        cu_seqlens_k: the same for key and value.
        max_seqlen_q, max_seqlen_k: ints in [0, 2**31); no sequence is longer.
        attn_mask, attn_bias: as in `scaled_dot_product_attention`, broadcast to (batch, nheads, max_seqlen_q,
            max_seqlen_k) and indexed by the position inside the sequence.
        dropout_p, is_causal, scale, enable_gqa, window, causal_align, softcap, sinks, dropout_seed, return_lse,
            return_seed: as in `scaled_dot_product_attention`, per sequence; the default alignment is bottom-right.
        seqused_k: (batch,) int32: how many of each sequence's keys there are; cu_seqlens_k says where it starts.

    Returns:
        out: (total_q, nheads, head_dim_v), query's dtype. Tokens past cu_seqlens_q[-1] and queries with no allowed key
        get 0 and zero gradients.
        lse, if asked for: (nheads, total_q), natural log, float32 (float64 for float64 inputs), differentiable; -inf
        for those tokens, or their sink.
        seed, if asked for, the last: (1,) int64, or None without dropout.

    Determinism: forward and backward are bitwise reproducible for one seed, backend and device.

    Raises:
        ValueError: kinds, shapes, dtypes, devices or values of arguments are wrong or disagree; the message names the
            argument, the rule and the value.
        NotImplementedError: `use_backend` names a backend that cannot take the call; the message lists the reasons.

    Source: Vaswani et al. 2017, eq. 1; Dao 2023, section 3.
    """
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return overrides.hand_over(
            varlen_attention, query, key, value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, attn_mask=attn_mask, attn_bias=attn_bias,
            dropout_p=dropout_p, is_causal=is_causal, window=window, causal_align=causal_align, scale=scale,
            enable_gqa=enable_gqa, softcap=softcap, sinks=sinks, seqused_k=seqused_k, dropout_seed=dropout_seed,
            return_lse=return_lse, return_seed=return_seed,
        )  # fmt: skip
    p = varlen_attention_params(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        attn_mask=attn_mask, attn_bias=attn_bias, dropout_p=dropout_p, is_causal=is_causal, window=window,
        causal_align=causal_align, scale=scale, enable_gqa=enable_gqa, softcap=softcap, seqused_k=seqused_k,
    )  # fmt: skip
    p = with_seed(p, dropout_seed)
    if sinks is None:
        out, lse = attend(p, return_lse)
    else:
        out, lse = attend_with_sinks(p, sinks)
    return _results(out, lse, p.seed, return_lse, return_seed)


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    attn_bias: Tensor | None = None,
    window: Window = None,
    causal_align: CausalAlign = "top-left",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """The weights that `scaled_dot_product_attention` gives to each value, without dropout, to look at.

    Fused kernels never store them. These are computed by plain torch operations, on any device, in memory that grows
    with seqlen_q x seqlen_k.

    Args: those of `scaled_dot_product_attention`, with the same shapes, dtypes and rules.

    Returns:
        (..., nheads, seqlen_q, seqlen_k), query's dtype, differentiable. Rows sum to 1, less what a sink takes; those
        of a query with no allowed key are 0.

    Raises:
        ValueError: as `scaled_dot_product_attention`; or query and key are nested tensors.

    Source: Vaswani et al. 2017, eq. 1.
    """
    p = attention_params(
        query, key, key, attn_mask, 0.0, is_causal, scale, enable_gqa, attn_bias=attn_bias, window=window,
        causal_align=causal_align, softcap=softcap, seqused_k=seqused_k,
    )  # fmt: skip
    if p.q.is_nested:
        raise ValueError(
            "query, key: must not be nested, their weights have no common shape; take sequences one by one"
        )
    weights = weights_of(p)
    if sinks is not None:
        merging.check_sinks(sinks, p.q)
        weights, _ = merging.with_sinks(weights, reference.attention(p)[1], sinks, packed=False)
    if not query.dim() == key.dim() == 4:
        weights = weights.reshape(*shapes.leading(weights, query, key, key), *weights.shape[2:])
    return weights


def _results(
    out: Tensor, lse: Tensor | None, seed: Tensor | None, return_lse: bool, return_seed: bool
) -> Tensor | tuple[Any, ...]:
    """What was asked for: out, (out, lse), (out, seed) or (out, lse, seed)."""
    if return_seed:
        return (out, lse, seed) if return_lse else (out, seed)
    return (out, lse) if return_lse else out


def explain(*args: Any, return_lse: bool = False, **kwargs: Any) -> Explanation:
    """Say which backend a call would run on, by which route, and why not on those preferred to it. Nothing is computed.

    Args: those of `scaled_dot_product_attention`, or those of `varlen_attention`, told apart by cu_seqlens.

    Returns:
        An object to print; its fields are `backend`, `route`, `refusals` and `notes`.

    Raises:
        ValueError, NotImplementedError: as the call itself would.
    """
    # By position, the fifth argument is cu_seqlens_k of a packed call, dropout_p of a dense one.
    has_fifth = len(args) > 4 and isinstance(args[4], Tensor)
    is_packed = has_fifth or not kwargs.keys().isdisjoint(("cu_seqlens_q", "cu_seqlens_k"))
    sinks, seed = kwargs.pop("sinks", None), kwargs.pop("dropout_seed", None)
    kwargs.pop("return_seed", None)
    p = (varlen_attention_params if is_packed else attention_params)(*args, **kwargs)
    if seed is not None:
        with_seed(p, seed)
    if sinks is not None:
        merging.check_sinks(sinks, p.q)
    call = backends.traits(p, return_lse or sinks is not None)
    is_operator = backends.choose(call).route_of(call) is Route.OPERATOR
    copied = autograd.copied(p) if is_operator else []
    notes = tuple(f"{name} is copied, because its last dimension is not contiguous" for name in copied)
    return backends.explain_choice(call, notes)


# ---- the same of a call that is built already, for modules that also want the weights of the very same call ----


def attend(p: AttentionParams, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """out and, if asked for, lse on the backend of choice; 4-D, or packed. Where p has dropout it has a seed."""
    if return_lse and p.q.is_nested:
        check_jagged(return_lse=return_lse)
    call = backends.traits(p, return_lse)
    backend = backends.choose(call)
    if backend.route_of(call) is Route.OPERATOR:
        out, lse = autograd.attention(backend.name, p)
    else:
        out, lse = backend.kernels().attention(p)
    return out, lse if return_lse else None


def attend_with_sinks(p: AttentionParams, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of a call whose heads have a sink each, a key without a value that every query sees."""
    merging.check_sinks(sinks, p.q)
    out, lse = attend(p, return_lse=True)
    assert lse is not None
    return merging.with_sinks(out, lse, sinks, p.is_packed())


def weights_of(p: AttentionParams) -> Tensor:
    """The weights of a dense call, dropout included: (batch, nheads, seqlen_q, seqlen_k), differentiable, q's dtype.

    A query with no allowed key has weights 0. The scores are stored, as they must be for whoever wants to see them.
    """
    return reference.attention_weights(p).to(p.q.dtype)
