"""Fused attention in Triton: out = softmax(scale * Q K^T + bias) V and its gradients, never storing the weights.

Forward (Vaswani et al. 2017, eq. 1; Dao 2023, Algorithm 1): a program computes BLOCK_M rows of one (batch, head) and
walks over the key tiles that the band and the lengths leave, with a running maximum and sum per row. Exponents are in
base 2; lse is stored in natural units, -inf for a row without a key.

Backward (Dao 2023, Algorithm 2): P = exp(S - lse) is computed again from q, k and lse. With f the factor of dropout and
delta = rowsum(out * dout) - dlse,

    dV = (f P)^T dout      dP = f (dout V^T)      dS = P (dP - delta)      dQ = scale dS K      dK = scale dS^T Q

attention_bwd_dq_kernel has a program per query tile and writes delta, which attention_bwd_dkdv_kernel (a program per
key tile and key head) and attention_bwd_dbias_kernel (a program per tile of the bias and copy of it) read. Every
element is summed up by one program in a fixed order: two runs give the same bits, and nothing is atomic.

Layout: element (b, h, i, d) of q lies at q_ptr + b * stride_qb + h * stride_qh + i * stride_qm + d, and packed tensors
have stride_qb = 0 and begin at their sequence's first token. mask and bias have a stride of 0 where they broadcast.
A pointer or an edge of the band that is None is a feature that the compiled kernel does not have. A tile of scores is
(queries, keys), or (keys, queries) where dK and dV are computed, and `rows` and `keys` are shaped to broadcast to it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..params import AttentionParams
from . import tiles
from .arguments import IS_INTERPRETED, batch_size, inputs, per_row, rows
from .scores import (
    INF,
    dropout_keeps,
    fill_orphans,
    finish_scores,
    head,
    key_range,
    load_lse,
    load_rows,
    query_range,
    sequence,
    store_rows,
    tile_gradients,
)

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Numbers that change from call to call; kernels are not compiled again for those that divide by 16 or are 1.
CHANGING = ("batch", "total_q", "total_k", "max_seqlen_q", "max_seqlen_k", "left", "right", "dropout_threshold")
MAX_BIAS_COPIES = 64
FULL = 2  # programs per multiprocessor that keep a GPU busy


# ---- forward: a program per (batch, head, query tile) ----


@triton.jit(do_not_specialize=CHANGING)
def attention_fwd_kernel(
    q_ptr, stride_qb, stride_qh, stride_qm, k_ptr, stride_kb, stride_kh, stride_kn,
    v_ptr, stride_vb, stride_vh, stride_vn, out_ptr, stride_ob, stride_oh, stride_om, lse_ptr, stride_lb, stride_lh,
    mask_ptr, stride_maskb, stride_maskh, stride_maskm, stride_maskn,
    bias_ptr, stride_biasb, stride_biash, stride_biasm, stride_biasn,
    seed_ptr, dropout_threshold, dropout_rescale, cu_seqlens_q_ptr, cu_seqlens_k_ptr, total_q, total_k,
    batch, nheads, group, max_seqlen_q, max_seqlen_k, scale_log2, left, right,
    BOTTOM_RIGHT: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """out and lse of one tile of queries."""
    tile_count = tl.maximum(tl.cdiv(max_seqlen_q, BLOCK_M), 1)
    tile, bh = tl.program_id(0) % tile_count, tl.program_id(0) // tile_count
    b, h, i0 = bh // nheads, bh % nheads, tile * BLOCK_M
    h_k = h // group
    first_q, seqlen_q = sequence(cu_seqlens_q_ptr, b, total_q, max_seqlen_q)
    first_k, seqlen_k = sequence(cu_seqlens_k_ptr, b, total_k, max_seqlen_k)
    shift = seqlen_k - seqlen_q if BOTTOM_RIGHT else 0
    out_ptr = head(out_ptr, b, h, first_q, stride_ob, stride_oh, stride_om)
    lse_ptr = head(lse_ptr, b, h, first_q, stride_lb, stride_lh, 1)
    fill_orphans(out_ptr, stride_om, 0.0, cu_seqlens_q_ptr, b, batch, seqlen_q, first_q, total_q, tile, tile_count,
                  HEAD_DIM_V, BLOCK_DV, 16)  # fmt: skip
    fill_orphans(lse_ptr, 1, -INF, cu_seqlens_q_ptr, b, batch, seqlen_q, first_q, total_q, tile, tile_count, 1, 1, 16)
    if i0 >= seqlen_q:
        return

    q_ptr = head(q_ptr, b, h, first_q, stride_qb, stride_qh, stride_qm)
    k_ptr = head(k_ptr, b, h_k, first_k, stride_kb, stride_kh, stride_kn)
    v_ptr = head(v_ptr, b, h_k, first_k, stride_vb, stride_vh, stride_vn)
    rows = i0 + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, stride_qm, rows, seqlen_q, HEAD_DIM, BLOCK_D, DOT_DTYPE)
    row_max = tl.full((BLOCK_M,), -INF, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    begin, end = key_range(i0, seqlen_q, seqlen_k, shift, left, right, BLOCK_M, BLOCK_N)
    for j0 in range(begin, end, BLOCK_N):
        keys = j0 + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, stride_kn, keys, seqlen_k, HEAD_DIM, BLOCK_D, DOT_DTYPE)
        scores = finish_scores(
            tl.dot(q, tl.trans(k), input_precision=PRECISION),
            b, h, rows[:, None], keys[None, :], seqlen_q, seqlen_k, shift,
            mask_ptr, stride_maskb, stride_maskh, stride_maskm, stride_maskn,
            bias_ptr, stride_biasb, stride_biash, stride_biasm, stride_biasn,
            scale_log2, left, right
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row without a key so far: all its scores are -inf, and so is the maximum.
        reference = tl.where(new_max == -INF, 0.0, new_max)
        weights = tl.exp2(scores - reference[:, None])
        rescale = tl.exp2(row_max - reference)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
        if seed_ptr is not None:
            keeps = dropout_keeps(seed_ptr, dropout_threshold, b, h, i0, j0, BLOCK_M, BLOCK_N, False)
            weights = tl.where(keeps, weights, 0.0)
        v = load_rows(v_ptr, stride_vn, keys, seqlen_k, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
        out = tl.dot(weights.to(DOT_DTYPE), v, out * rescale[:, None], input_precision=PRECISION)

    is_empty = row_sum == 0.0
    row_sum = tl.where(is_empty, 1.0, row_sum)
    tl.store(lse_ptr + rows, tl.where(is_empty, -INF, (row_max + tl.log2(row_sum)) * LN_2), rows < seqlen_q)
    out = out * (dropout_rescale / row_sum)[:, None]
    store_rows(out_ptr, stride_om, rows, seqlen_q, out, HEAD_DIM_V, BLOCK_DV)


# ---- dQ and delta: a program per (batch, head, query tile) ----


@triton.jit(do_not_specialize=CHANGING)
def attention_bwd_dq_kernel(
    q_ptr, stride_qb, stride_qh, stride_qm, k_ptr, stride_kb, stride_kh, stride_kn,
    v_ptr, stride_vb, stride_vh, stride_vn, out_ptr, stride_ob, stride_oh, stride_om, lse_ptr, stride_lb, stride_lh,
    dout_ptr, stride_dob, stride_doh, stride_dom, dlse_ptr, delta_ptr, dq_ptr, stride_dqb, stride_dqh, stride_dqm,
    mask_ptr, stride_maskb, stride_maskh, stride_maskm, stride_maskn,
    bias_ptr, stride_biasb, stride_biash, stride_biasm, stride_biasn,
    seed_ptr, dropout_threshold, dropout_rescale, cu_seqlens_q_ptr, cu_seqlens_k_ptr, total_q, total_k,
    batch, nheads, group, max_seqlen_q, max_seqlen_k, scale, scale_log2, left, right,
    BOTTOM_RIGHT: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """delta and dQ of one tile of queries."""
    tile_count = tl.maximum(tl.cdiv(max_seqlen_q, BLOCK_M), 1)
    tile, bh = tl.program_id(0) % tile_count, tl.program_id(0) // tile_count
    b, h, i0 = bh // nheads, bh % nheads, tile * BLOCK_M
    h_k = h // group
    first_q, seqlen_q = sequence(cu_seqlens_q_ptr, b, total_q, max_seqlen_q)
    first_k, seqlen_k = sequence(cu_seqlens_k_ptr, b, total_k, max_seqlen_k)
    shift = seqlen_k - seqlen_q if BOTTOM_RIGHT else 0
    dq_ptr = head(dq_ptr, b, h, first_q, stride_dqb, stride_dqh, stride_dqm)
    fill_orphans(dq_ptr, stride_dqm, 0.0, cu_seqlens_q_ptr, b, batch, seqlen_q, first_q, total_q, tile, tile_count,
                  HEAD_DIM, BLOCK_D, 16)  # fmt: skip
    if i0 >= seqlen_q:
        return

    q_ptr = head(q_ptr, b, h, first_q, stride_qb, stride_qh, stride_qm)
    k_ptr = head(k_ptr, b, h_k, first_k, stride_kb, stride_kh, stride_kn)
    v_ptr = head(v_ptr, b, h_k, first_k, stride_vb, stride_vh, stride_vn)
    out_ptr = head(out_ptr, b, h, first_q, stride_ob, stride_oh, stride_om)
    dout_ptr = head(dout_ptr, b, h, first_q, stride_dob, stride_doh, stride_dom)
    rows = i0 + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, stride_qm, rows, seqlen_q, HEAD_DIM, BLOCK_D, DOT_DTYPE)
    dout = load_rows(dout_ptr, stride_dom, rows, seqlen_q, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
    out = load_rows(out_ptr, stride_om, rows, seqlen_q, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
    lse = load_lse(head(lse_ptr, b, h, first_q, stride_lb, stride_lh, 1), rows, seqlen_q)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        dlse_ptr = head(dlse_ptr, b, h, first_q, stride_lb, stride_lh, 1)
        delta -= tl.load(dlse_ptr + rows, rows < seqlen_q, 0.0)
    tl.store(head(delta_ptr, b, h, first_q, stride_lb, stride_lh, 1) + rows, delta, rows < seqlen_q)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, end = key_range(i0, seqlen_q, seqlen_k, shift, left, right, BLOCK_M, BLOCK_N)
    for j0 in range(begin, end, BLOCK_N):
        keys = j0 + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, stride_kn, keys, seqlen_k, HEAD_DIM, BLOCK_D, DOT_DTYPE)
        v = load_rows(v_ptr, stride_vn, keys, seqlen_k, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
        scores = finish_scores(
            tl.dot(q, tl.trans(k), input_precision=PRECISION),
            b, h, rows[:, None], keys[None, :], seqlen_q, seqlen_k, shift,
            mask_ptr, stride_maskb, stride_maskh, stride_maskm, stride_maskn,
            bias_ptr, stride_biasb, stride_biash, stride_biasm, stride_biasn,
            scale_log2, left, right
        )  # fmt: skip
        _, dscores = tile_gradients(
            scores, tl.dot(dout, tl.trans(v), input_precision=PRECISION), lse[:, None], delta[:, None],
            seed_ptr, dropout_threshold, dropout_rescale, b, h, i0, j0, BLOCK_M, BLOCK_N, False
        )  # fmt: skip
        dq = tl.dot(dscores.to(DOT_DTYPE), k, dq, input_precision=PRECISION)
    store_rows(dq_ptr, stride_dqm, rows, seqlen_q, dq * scale, HEAD_DIM, BLOCK_D)


# ---- dK and dV: a program per (batch, key head, key tile) ----


@triton.jit(do_not_specialize=CHANGING)
def attention_bwd_dkdv_kernel(
    q_ptr, stride_qb, stride_qh, stride_qm, k_ptr, stride_kb, stride_kh, stride_kn,
    v_ptr, stride_vb, stride_vh, stride_vn, lse_ptr, stride_lb, stride_lh,
    dout_ptr, stride_dob, stride_doh, stride_dom, delta_ptr,
    dk_ptr, stride_dkb, stride_dkh, stride_dkn, dv_ptr, stride_dvb, stride_dvh, stride_dvn,
    mask_ptr, stride_maskb, stride_maskh, stride_maskm, stride_maskn,
    bias_ptr, stride_biasb, stride_biash, stride_biasm, stride_biasn,
    seed_ptr, dropout_threshold, dropout_rescale, cu_seqlens_q_ptr, cu_seqlens_k_ptr, total_q, total_k,
    batch, nheads, group, max_seqlen_q, max_seqlen_k, scale, scale_log2, left, right,
    BOTTOM_RIGHT: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """dK and dV of one tile of keys, over all query heads that share them."""
    tile_count = tl.maximum(tl.cdiv(max_seqlen_k, BLOCK_N), 1)
    tile, bh = tl.program_id(0) % tile_count, tl.program_id(0) // tile_count
    nheads_k = nheads // group
    b, h_k, j0 = bh // nheads_k, bh % nheads_k, tile * BLOCK_N
    first_q, seqlen_q = sequence(cu_seqlens_q_ptr, b, total_q, max_seqlen_q)
    first_k, seqlen_k = sequence(cu_seqlens_k_ptr, b, total_k, max_seqlen_k)
    shift = seqlen_k - seqlen_q if BOTTOM_RIGHT else 0
    dk_ptr = head(dk_ptr, b, h_k, first_k, stride_dkb, stride_dkh, stride_dkn)
    dv_ptr = head(dv_ptr, b, h_k, first_k, stride_dvb, stride_dvh, stride_dvn)
    fill_orphans(dk_ptr, stride_dkn, 0.0, cu_seqlens_k_ptr, b, batch, seqlen_k, first_k, total_k, tile, tile_count,
                  HEAD_DIM, BLOCK_D, 16)  # fmt: skip
    fill_orphans(dv_ptr, stride_dvn, 0.0, cu_seqlens_k_ptr, b, batch, seqlen_k, first_k, total_k, tile, tile_count,
                  HEAD_DIM_V, BLOCK_DV, 16)  # fmt: skip
    if j0 >= seqlen_k:
        return

    keys = j0 + tl.arange(0, BLOCK_N)
    k_ptr = head(k_ptr, b, h_k, first_k, stride_kb, stride_kh, stride_kn)
    v_ptr = head(v_ptr, b, h_k, first_k, stride_vb, stride_vh, stride_vn)
    k = load_rows(k_ptr, stride_kn, keys, seqlen_k, HEAD_DIM, BLOCK_D, DOT_DTYPE)
    v = load_rows(v_ptr, stride_vn, keys, seqlen_k, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    begin, end = query_range(j0, seqlen_q, seqlen_k, shift, left, right, BLOCK_M, BLOCK_N)
    for h in range(h_k * group, (h_k + 1) * group):
        head_q = head(q_ptr, b, h, first_q, stride_qb, stride_qh, stride_qm)
        head_dout = head(dout_ptr, b, h, first_q, stride_dob, stride_doh, stride_dom)
        head_lse = head(lse_ptr, b, h, first_q, stride_lb, stride_lh, 1)
        head_delta = head(delta_ptr, b, h, first_q, stride_lb, stride_lh, 1)
        for i0 in range(begin, end, BLOCK_M):
            rows = i0 + tl.arange(0, BLOCK_M)
            q = load_rows(head_q, stride_qm, rows, seqlen_q, HEAD_DIM, BLOCK_D, DOT_DTYPE)
            dout = load_rows(head_dout, stride_dom, rows, seqlen_q, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
            lse = load_lse(head_lse, rows, seqlen_q)
            delta = tl.load(head_delta + rows, rows < seqlen_q, 0.0)
            scores = finish_scores(
                tl.dot(k, tl.trans(q), input_precision=PRECISION),
                b, h, rows[None, :], keys[:, None], seqlen_q, seqlen_k, shift,
                mask_ptr, stride_maskb, stride_maskh, stride_maskm, stride_maskn,
                bias_ptr, stride_biasb, stride_biash, stride_biasm, stride_biasn,
                scale_log2, left, right
            )  # fmt: skip
            weights, dscores = tile_gradients(
                scores, tl.dot(v, tl.trans(dout), input_precision=PRECISION), lse[None, :], delta[None, :],
                seed_ptr, dropout_threshold, dropout_rescale, b, h, i0, j0, BLOCK_M, BLOCK_N, True
            )  # fmt: skip
            dv = tl.dot(weights.to(DOT_DTYPE), dout, dv, input_precision=PRECISION)
            dk = tl.dot(dscores.to(DOT_DTYPE), q, dk, input_precision=PRECISION)
    store_rows(dk_ptr, stride_dkn, keys, seqlen_k, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, stride_dvn, keys, seqlen_k, dv * dropout_rescale, HEAD_DIM_V, BLOCK_DV)


# ---- bias gradient: a program per (tile of the bias, copy of the bias) ----


@triton.jit(do_not_specialize=CHANGING)
def attention_bwd_dbias_kernel(
    q_ptr, stride_qb, stride_qh, stride_qm, k_ptr, stride_kb, stride_kh, stride_kn,
    v_ptr, stride_vb, stride_vh, stride_vn, lse_ptr, stride_lb, stride_lh,
    dout_ptr, stride_dob, stride_doh, stride_dom, delta_ptr,
    partial_ptr, copies, bias_batch, bias_heads, bias_rows, bias_keys,
    mask_ptr, stride_maskb, stride_maskh, stride_maskm, stride_maskn,
    bias_ptr, stride_biasb, stride_biash, stride_biasm, stride_biasn,
    seed_ptr, dropout_threshold, dropout_rescale, cu_seqlens_q_ptr, cu_seqlens_k_ptr, total_q, total_k,
    batch, nheads, group, max_seqlen_q, max_seqlen_k, scale_log2, left, right,
    ROWS_BROADCAST: tl.constexpr, KEYS_BROADCAST: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """One copy of one tile of the bias gradient: dS summed over its share of all that the tile is broadcast to."""
    row_tiles, key_tiles = tl.cdiv(bias_rows, BLOCK_M), tl.cdiv(bias_keys, BLOCK_N)
    copy, index = tl.program_id(0) % copies, tl.program_id(0) // copies
    own_j0, index = index % key_tiles * BLOCK_N, index // key_tiles
    own_i0, index = index % row_tiles * BLOCK_M, index // row_tiles
    own_h, own_b = index % bias_heads, index // bias_heads

    # The tiles of scores that this tile of the bias is broadcast to.
    sum_keys = tl.cdiv(max_seqlen_k, BLOCK_N) if KEYS_BROADCAST else 1
    sum_rows = tl.cdiv(max_seqlen_q, BLOCK_M) if ROWS_BROADCAST else 1
    sum_heads, sum_batch = nheads // bias_heads, batch // bias_batch
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n in range(copy, sum_batch * sum_heads * sum_rows * sum_keys, copies):
        j0, i0 = own_j0 + n % sum_keys * BLOCK_N, own_i0 + n // sum_keys % sum_rows * BLOCK_M
        outer = n // sum_keys // sum_rows
        h, b = own_h + outer % sum_heads, own_b + outer // sum_heads
        h_k = h // group
        first_q, seqlen_q = sequence(cu_seqlens_q_ptr, b, total_q, max_seqlen_q)
        first_k, seqlen_k = sequence(cu_seqlens_k_ptr, b, total_k, max_seqlen_k)
        shift = seqlen_k - seqlen_q if BOTTOM_RIGHT else 0
        begin, end = key_range(i0, seqlen_q, seqlen_k, shift, left, right, BLOCK_M, BLOCK_N)
        if (i0 < seqlen_q) & (j0 >= begin) & (j0 < end):
            rows, keys = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
            head_q = head(q_ptr, b, h, first_q, stride_qb, stride_qh, stride_qm)
            head_k = head(k_ptr, b, h_k, first_k, stride_kb, stride_kh, stride_kn)
            head_v = head(v_ptr, b, h_k, first_k, stride_vb, stride_vh, stride_vn)
            head_dout = head(dout_ptr, b, h, first_q, stride_dob, stride_doh, stride_dom)
            q = load_rows(head_q, stride_qm, rows, seqlen_q, HEAD_DIM, BLOCK_D, DOT_DTYPE)
            k = load_rows(head_k, stride_kn, keys, seqlen_k, HEAD_DIM, BLOCK_D, DOT_DTYPE)
            v = load_rows(head_v, stride_vn, keys, seqlen_k, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
            dout = load_rows(head_dout, stride_dom, rows, seqlen_q, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
            lse = load_lse(head(lse_ptr, b, h, first_q, stride_lb, stride_lh, 1), rows, seqlen_q)
            head_delta = head(delta_ptr, b, h, first_q, stride_lb, stride_lh, 1)
            delta = tl.load(head_delta + rows, rows < seqlen_q, 0.0)
            scores = finish_scores(
                tl.dot(q, tl.trans(k), input_precision=PRECISION),
                b, h, rows[:, None], keys[None, :], seqlen_q, seqlen_k, shift,
                mask_ptr, stride_maskb, stride_maskh, stride_maskm, stride_maskn,
                bias_ptr, stride_biasb, stride_biash, stride_biasm, stride_biasn,
                scale_log2, left, right
            )  # fmt: skip
            _, dscores = tile_gradients(
                scores, tl.dot(dout, tl.trans(v), input_precision=PRECISION), lse[:, None], delta[:, None],
                seed_ptr, dropout_threshold, dropout_rescale, b, h, i0, j0, BLOCK_M, BLOCK_N, False
            )  # fmt: skip
            sums += dscores

    rows, keys = own_i0 + tl.arange(0, BLOCK_M), own_j0 + tl.arange(0, BLOCK_N)
    if ROWS_BROADCAST:
        sums = tl.sum(sums, 0, keep_dims=True)
    if KEYS_BROADCAST:
        sums = tl.sum(sums, 1, keep_dims=True)
    slice_ = (copy.to(tl.int64) * bias_batch + own_b) * bias_heads + own_h
    offsets = (slice_ * bias_rows + rows[:, None]) * bias_keys + keys[None, :]
    inside = (rows < bias_rows)[:, None] & (keys < bias_keys)[None, :]
    tl.store(partial_ptr + offsets, tl.broadcast_to(sums, BLOCK_M, BLOCK_N), inside)


# ---- launchers ----


def attention_fwd(out: Tensor, lse: Tensor, p: AttentionParams) -> None:
    """Fill out and lse."""
    batch, nheads = batch_size(p), p.q.size(1)
    if batch * nheads == 0:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    tile = _tiles(p).fwd
    programs = batch * nheads * _count(p.max_seqlen_q, tile.block_m)
    _launch(attention_fwd_kernel, programs, tile, p, inputs(p) | rows("out", out, p) | per_row(lse, p))


def attention_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    p: AttentionParams,
) -> None:
    """Fill dq, dk, dv and, unless it is None, dbias, in the bias's own shape."""
    batch, nheads, nheads_k = batch_size(p), p.q.size(1), p.k.size(1)
    if batch * nheads == 0:
        for grad in (dq, dk, dv, dbias):
            if grad is not None:
                grad.zero_()
        return
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    scale = {"scale": p.scale}
    known = inputs(p) | rows("dout", dout, p) | per_row(lse, p) | {"delta_ptr": torch.empty_like(lse)}

    # dQ's kernel goes first, because it writes delta.
    tile = _tiles(p).dq
    programs = batch * nheads * _count(p.max_seqlen_q, tile.block_m)
    own = rows("out", out, p) | rows("dq", dq, p) | {"dlse_ptr": dlse}
    _launch(attention_bwd_dq_kernel, programs, tile, p, known | scale | own)

    tile = _tiles(p).dkdv
    programs = batch * nheads_k * _count(p.max_seqlen_k, tile.block_n)
    own = rows("dk", dk, p) | rows("dv", dv, p)
    _launch(attention_bwd_dkdv_kernel, programs, tile, p, known | scale | own)

    if dbias is not None and dbias.numel():
        _bias_grad(dbias, known, p)


def _bias_grad(dbias: Tensor, known: dict[str, Any], p: AttentionParams) -> None:
    """Fill dbias: partial sums in copies of the bias, as many as fill the GPU, then their sum."""
    tile, sizes = _tiles(p).dbias, dbias.shape
    blocks = (1, 1, tile.block_m, tile.block_n)
    scores = (batch_size(p), p.q.size(1), p.max_seqlen_q, p.max_seqlen_k)
    bias_tiles = math.prod(_count(size, block) for size, block in zip(sizes, blocks, strict=True))
    sums = [_count(n, block) for n, size, block in zip(scores, sizes, blocks, strict=True) if size == 1]
    wanted = _count(FULL * tiles.multiprocessors(p.q.device), bias_tiles)
    copies = min(MAX_BIAS_COPIES, math.prod(sums), wanted)
    partial = dbias.new_empty(copies, *sizes, dtype=torch.float32)
    names = ("bias_batch", "bias_heads", "bias_rows", "bias_keys")
    own = dict(zip(names, sizes, strict=True)) | {"partial_ptr": partial, "copies": copies}
    broadcast = {"ROWS_BROADCAST": sizes[2] == 1, "KEYS_BROADCAST": sizes[3] == 1}
    _launch(attention_bwd_dbias_kernel, bias_tiles * copies, tile, p, known | own | broadcast)
    dbias.copy_(partial.sum(0))


def _count(n: int, block: int) -> int:
    """How many blocks n takes; at least 1, because tokens of no sequence are somebody's work."""
    return max(1, triton.cdiv(n, block))


def _tiles(p: AttentionParams) -> tiles.Tiles:
    head_dim = max(p.q.size(-1), p.v.size(-1))
    capability = None if IS_INTERPRETED else torch.cuda.get_device_capability(p.q.device)
    return tiles.choose(capability, p.q.element_size(), head_dim, p.max_seqlen_q)


def _launch(kernel: Any, programs: int, tile: tiles.Tile, p: AttentionParams, arguments: dict[str, Any]) -> None:
    """Run a kernel on the current stream of the call's device."""
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    with torch.cuda.device_of(p.q):
        kernel[(programs,)](**arguments, **blocks, num_warps=tile.num_warps, num_stages=tile.num_stages)
