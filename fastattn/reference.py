"""Scaled dot-product attention in plain torch: the oracle of every kernel and the route that always works.

`attention` is ordinary differentiable torch code (any device, any floating dtype, any number of derivatives).
`attention_fwd` and `attention_bwd` are the same mathematics in the form in which a kernel is called: they fill buffers,
and the backward computes the weights again instead of storing them.

Notation (Vaswani et al. 2017, eq. 1; Dao 2023, Algorithms 1 and 2), row by row of the score matrix:

    Z = scale * Q K^T      S = softcap * tanh(Z / softcap) + bias, or Z + bias, and -inf where a key is not allowed
    lse = log(sum(exp(S)))          P = exp(S - lse)
    out = (keep * P / (1 - p)) V          delta = rowsum(P * dP) - dlse, where rowsum(P * dP) = rowsum(out * dout)
    dV = (keep * P / (1 - p))^T dout      dP = keep / (1 - p) * (dout V^T)      dS = P * (dP - delta)
    dbias = dS summed where it broadcast            dZ = (1 - tanh(Z / softcap)^2) * dS, or dS
    dQ = scale * dZ K                     dK = scale * dZ^T Q

float16 and bfloat16 inputs are computed in float32, everything else in its own precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import compat
from .params import AttentionParams, Backward, Forward
from .philox import keep_mask

INF = float("inf")


# ---- dropout ----


def dropout_mask(seed: Tensor, batch: int, nheads: int, seqlen_q: int, seqlen_k: int, p: float) -> Tensor:
    """The weights that dropout keeps, the same on every backend, dense or packed.

    Philox4x32-10 with key = seed and counter = (key_index // 4, query_index, head, batch); word key_index % 4 decides:
    a weight is kept iff its word >= round(p * 2**32).

    Args:
        seed: (1,) int64, the call's seed.
        batch, nheads, seqlen_q, seqlen_k: sizes; heads are query heads.
        p: probability of dropping a weight, in [0, 1].

    Returns:
        (batch, nheads, seqlen_q, seqlen_k) bool on the seed's device, True = kept.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    return keep_mask(seed, torch.arange(batch, device=seed.device), nheads, seqlen_q, seqlen_k, p)


# ---- one dense problem ----


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _full_precision(p: AttentionParams) -> AbstractContextManager[Any]:
    """Autocast switched off, so that a product in here stays in the precision it is written in."""
    device = p.q.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _allowed(p: AttentionParams, shift: int | Tensor) -> Tensor:
    """Which keys a query may attend to, broadcastable to (batch, nheads, seqlen_q, seqlen_k), bool."""
    allowed = _band(p, p.q.size(-2), p.k.size(-2), shift)
    if p.seqused_k is not None:
        allowed = allowed & (torch.arange(p.k.size(-2), device=p.q.device) < _used(p)[:, None, None, None])
    return allowed if p.mask is None else allowed & p.mask


def _used(p: AttentionParams) -> Tensor:
    """The keys that there are of each sequence of a dense problem, (batch,) int64."""
    assert p.seqused_k is not None
    return p.seqused_k.long().clamp(0, p.k.size(-2))


def _seen(x: Tensor, p: AttentionParams, allowed: Tensor) -> Tensor:
    """Keys or values in the computation's precision, one head per query head (grouped-query attention).

    They are 0 where no query may attend to them: a weight of 0 does not take NaN out of a product.
    """
    x = x.to(_compute_dtype(p.q))
    if x.size(1) != p.q.size(1):
        x = x.repeat_interleave(p.q.size(1) // x.size(1), dim=1)
    return x.masked_fill(~allowed.any(-2)[..., None], 0.0)


def _capped_tanh(p: AttentionParams, allowed: Tensor) -> tuple[Tensor, Tensor | None]:
    """S without bias and mask, (batch, nheads, seqlen_q, seqlen_k), and tanh(Z / softcap), or None without softcap."""
    z = p.scale * (p.q.to(_compute_dtype(p.q)) @ _seen(p.k, p, allowed).transpose(-1, -2))
    if p.softcap == 0:
        return z, None
    tanh = torch.tanh(z / p.softcap)
    return p.softcap * tanh, tanh


def _scores(p: AttentionParams, allowed: Tensor, capped: Tensor) -> Tensor:
    """S, (batch, nheads, seqlen_q, seqlen_k)."""
    s = capped if p.bias is None else capped + p.bias.to(capped.dtype)
    return s.masked_fill(~allowed, -INF)


def _band(p: AttentionParams, seqlen_q: int, seqlen_k: int, shift: int | Tensor) -> Tensor:
    """Which keys the band allows, (seqlen_q, seqlen_k) bool, or one per sequence as the shift."""
    query = torch.arange(seqlen_q, device=p.q.device)[:, None]
    offset = torch.arange(seqlen_k, device=p.q.device) - (query + shift)
    return (offset >= -p.left) & (offset <= p.right)


def band(p: AttentionParams) -> Tensor:
    """Which keys the band of a dense problem allows, (seqlen_q, seqlen_k) bool."""
    return _band(p, p.q.size(-2), p.k.size(-2), _dense_shift(p))


def _dropout_factor(p: AttentionParams, sequences: Tensor | None, s: Tensor) -> Tensor | None:
    """keep / (1 - p) in the shape of the scores, or None without dropout; all zero at p = 1."""
    if p.seed is None:
        return None
    if sequences is None:
        sequences = torch.arange(s.size(0), device=s.device)
    rescale = 1 / (1 - p.dropout_p) if p.dropout_p < 1 else 0.0
    return keep_mask(p.seed, sequences, s.size(1), s.size(2), s.size(3), p.dropout_p).to(s.dtype) * rescale


def softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """P and lse over the last dimension; a row of -inf has weights 0, lse -inf and zero gradients."""
    row_max = s.detach().amax(-1, keepdim=True) if s.size(-1) else s.new_zeros(*s.shape[:-1], 1)
    row_max = row_max.masked_fill(row_max == -INF, 0.0)
    exp = torch.exp(s - row_max)
    row_sum = exp.sum(-1, keepdim=True)
    empty = row_sum == 0
    row_sum = row_sum.masked_fill(empty, 1.0)
    lse = (row_max + row_sum.log()).masked_fill(empty, -INF)
    return exp / row_sum, lse.squeeze(-1)


def _dense_shift(p: AttentionParams) -> int | Tensor:
    if not p.bottom_right:
        return 0
    return (p.k.size(-2) if p.seqused_k is None else _used(p)[:, None, None, None]) - p.q.size(-2)


def attention_weights(p: AttentionParams) -> Tensor:
    """keep * P / (1 - p) of a dense problem, (batch, nheads, seqlen_q, seqlen_k), differentiable, in full precision."""
    with _full_precision(p):
        allowed = _allowed(p, _dense_shift(p))
        s = _scores(p, allowed, _capped_tanh(p, allowed)[0])
        weights, factor = softmax(s)[0], _dropout_factor(p, None, s)
        return weights if factor is None else weights * factor


def _dense(p: AttentionParams, shift: int | Tensor, sequences: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out and lse; `sequences` (batch,) are the batch indices that dropout counts with, None for 0, 1, 2 ..."""
    allowed = _allowed(p, shift)
    s = _scores(p, allowed, _capped_tanh(p, allowed)[0])
    weights, lse = softmax(s)
    factor = _dropout_factor(p, sequences, s)
    if factor is not None:
        weights = weights * factor
    return (weights @ _seen(p.v, p, allowed)).to(p.q.dtype), lse


def _dense_grad(
    p: AttentionParams, dout: Tensor, dlse: Tensor | None, shift: int | Tensor, sequences: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV and dS of `_dense`, in the precision of the computation."""
    dtype = _compute_dtype(p.q)
    dout = dout.to(dtype)
    allowed = _allowed(p, shift)
    capped, tanh = _capped_tanh(p, allowed)
    s = _scores(p, allowed, capped)
    weights, _ = softmax(s)
    dp = dout @ _seen(p.v, p, allowed).transpose(-1, -2)
    factor = _dropout_factor(p, sequences, s)
    kept = weights
    if factor is not None:
        kept, dp = weights * factor, dp * factor
    delta = (weights * dp).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    ds = weights * (dp - delta[..., None])
    dz = ds if tanh is None else (1 - tanh * tanh) * ds
    dq = p.scale * (dz @ _seen(p.k, p, allowed))
    dk = p.scale * (dz.transpose(-1, -2) @ p.q.to(dtype))
    dv = kept.transpose(-1, -2) @ dout
    if p.k.size(1) != p.q.size(1):
        dk, dv = (x.unflatten(1, (p.k.size(1), -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv, ds


# ---- packed sequences: one padded, masked dense problem per length bucket ----


class _Bucket(NamedTuple):
    """Sequences of similar length, padded to the longest of them."""

    sequences: Tensor  # (n,) int64, batch indices
    rows_q: Tensor  # (n, seqlen_q) int64, 1 + token index; 0 where there is no token
    rows_k: Tensor  # (n, seqlen_k)
    shift: int | Tensor  # one per sequence, (n, 1, 1, 1), when bottom-right

    def dense(self, p: AttentionParams) -> AttentionParams:
        """The padded problem; its mask excludes the keys that are no tokens."""
        inside, mask = (self.rows_k > 0)[:, None, None, :], self.crop(p.mask)
        return p.replace(
            q=_pad(p.q, self.rows_q),
            k=_pad(p.k, self.rows_k),
            v=_pad(p.v, self.rows_k),
            mask=inside if mask is None else mask & inside,
            bias=self.crop(p.bias),
            seqused_k=None,
        )

    def crop(self, x: Tensor | None) -> Tensor | None:
        """The part of a broadcastable mask or bias that this bucket sees."""
        if x is None:
            return None
        return (x if x.size(0) == 1 else x[self.sequences])[:, :, : self.rows_q.size(1), : self.rows_k.size(1)]


def _bucket_length(length: int) -> int:
    """Lengths that share a bucket differ by at most a quarter, or by 8."""
    step = max(8, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def _rows(start: Tensor, length: Tensor, seqlen: int, total: int) -> Tensor:
    position = torch.arange(seqlen, device=start.device)
    row = start[:, None] + position + 1
    return torch.where((position < length[:, None]) & (row <= total), row, 0)


def _buckets(p: AttentionParams) -> list[_Bucket]:
    """Grouped by length on the CPU; one bucket where reading the lengths would wait for a GPU or break a graph."""
    assert p.cu_seqlens_q is not None and p.cu_seqlens_k is not None
    starts_q, starts_k = p.cu_seqlens_q.long(), p.cu_seqlens_k.long()
    len_q, len_k = starts_q.diff().clamp(0, p.max_seqlen_q), starts_k.diff().clamp(0, p.max_seqlen_k)
    if p.seqused_k is not None:
        len_k = torch.minimum(len_k, p.seqused_k.long().clamp(min=0))

    def bucket(sequences: Tensor, seqlen_q: int, seqlen_k: int) -> _Bucket:
        n_q, n_k = len_q[sequences], len_k[sequences]
        rows_q = _rows(starts_q[sequences], n_q, seqlen_q, p.q.size(0))
        rows_k = _rows(starts_k[sequences], n_k, seqlen_k, p.k.size(0))
        return _Bucket(sequences, rows_q, rows_k, (n_k - n_q)[:, None, None, None] if p.bottom_right else 0)

    is_traced = torch.compiler.is_compiling() or compat.innermost_transformation() is not None
    if is_traced or not len_q.is_cpu or type(len_q) is not Tensor or not len_q.numel():
        return [bucket(torch.arange(len_q.size(0), device=p.q.device), p.max_seqlen_q, p.max_seqlen_k)]
    lengths = list(zip(len_q.tolist(), len_k.tolist(), strict=True))
    groups: dict[int, list[int]] = {}
    for sequence, pair in enumerate(lengths):
        groups.setdefault(_bucket_length(max(pair)), []).append(sequence)
    return [
        bucket(torch.tensor(group), max(lengths[i][0] for i in group), max(lengths[i][1] for i in group))
        for group in groups.values()
    ]


def _pad(x: Tensor, rows: Tensor) -> Tensor:
    """(tokens, heads, ...) to (n, heads, seqlen, ...), zeros where there is no token."""
    padded = torch.cat([x.new_zeros(1, *x.shape[1:]), x]).index_select(0, rows.flatten())
    return padded.unflatten(0, rows.shape).transpose(1, 2)


def _unpad(padded: Iterable[Tensor], rows: list[Tensor], total: int, fill: float = 0.0) -> Tensor:
    """The inverse of `_pad` over all buckets: (total, heads, ...), `fill` for tokens of no sequence."""
    row = torch.cat([r.flatten() for r in rows])
    flat = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in padded])
    slot = torch.zeros(total + 1, dtype=torch.long, device=row.device)
    slot[row] = torch.arange(1, row.numel() + 1, device=row.device)
    return torch.cat([flat.new_full((1, *flat.shape[1:]), fill), flat]).index_select(0, slot[1:])


def _packed(p: AttentionParams) -> tuple[Tensor, Tensor]:
    """out and lse; 0 and -inf for tokens of no sequence."""
    buckets = _buckets(p)
    outs, lses = zip(*(_dense(b.dense(p), b.shift, b.sequences) for b in buckets), strict=True)
    rows, total = [b.rows_q for b in buckets], p.q.size(0)
    return _unpad(outs, rows, total), _unpad(lses, rows, total, -INF).transpose(0, 1)


def _packed_grad(
    p: AttentionParams, dout: Tensor, dlse: Tensor | None, dbias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of `_packed`; adds to dbias."""
    buckets, grads = _buckets(p), []
    for b in buckets:
        dlse_rows = None if dlse is None else _pad(dlse.T, b.rows_q)
        *grad, ds = _dense_grad(b.dense(p), _pad(dout, b.rows_q), dlse_rows, b.shift, b.sequences)
        grads.append(grad)
        if dbias is not None:
            seen = dbias[:, :, : ds.size(2), : ds.size(3)]
            if dbias.size(0) == 1:
                seen += ds.sum_to_size(seen.shape)
            else:
                seen.index_add_(0, b.sequences, ds.sum_to_size(ds.size(0), *seen.shape[1:]))
    rows_q, rows_k = [b.rows_q for b in buckets], [b.rows_k for b in buckets]
    dq, dk, dv = zip(*grads, strict=True)
    return _unpad(dq, rows_q, p.q.size(0)), _unpad(dk, rows_k, p.k.size(0)), _unpad(dv, rows_k, p.k.size(0))


# ---- dense or packed: differentiable, and called like a kernel ----


def attention(p: AttentionParams) -> tuple[Tensor, Tensor]:
    """Differentiable attention, dense or packed.

    Returns:
        out: (batch, nheads, seqlen_q, head_dim_v), packed (total_q, nheads, head_dim_v), in q's dtype.
        lse: (batch, nheads, seqlen_q), packed (nheads, total_q), natural log, float32 (float64 for float64 inputs).
    """
    with _full_precision(p):
        return _packed(p) if p.is_packed() else _dense(p, _dense_shift(p))


def attention_fwd(forward: Forward, p: AttentionParams) -> None:
    """Fill out and lse."""
    out, lse = attention(p)
    forward.out.copy_(out)
    forward.lse.copy_(lse)


def attention_bwd(backward: Backward, p: AttentionParams) -> None:
    """Fill dq, dk, dv and, unless it is None, dbias.

    A kernel that sees a row in pieces takes P from lse and delta from out; here the row is whole, and both follow more
    exactly from the scores.
    """
    dout, dlse, dbias = backward.dout, backward.dlse, backward.dbias
    bias_sum = None if dbias is None else torch.zeros_like(dbias, dtype=_compute_dtype(p.q))
    with _full_precision(p):
        if p.is_packed():
            dq, dk, dv = _packed_grad(p, dout, dlse, bias_sum)
        else:
            dq, dk, dv, ds = _dense_grad(p, dout, dlse, _dense_shift(p))
            if bias_sum is not None:
                bias_sum += ds.sum_to_size(bias_sum.shape)
    backward.dq.copy_(dq)
    backward.dk.copy_(dk)
    backward.dv.copy_(dv)
    if dbias is not None and bias_sum is not None:
        dbias.copy_(bias_sum)
