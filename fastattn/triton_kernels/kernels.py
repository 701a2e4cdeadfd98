"""Fused attention in Triton: out = softmax(S) V and its gradients, never storing the weights.

    Z = scale Q K^T          S = softcap tanh(Z / softcap) + bias, or Z + bias without softcap

Forward (Vaswani et al. 2017, eq. 1; Dao 2023, Algorithm 1): a program computes BLOCK_M rows of one (batch, head) and
walks over the key tiles that the band and the lengths leave, with a running maximum and sum per row. Exponents are in
base 2; lse is stored in natural units, -inf for a row without a key.

Backward (Dao 2023, Algorithm 2): P = exp(S - lse) is computed again from q, k and lse. With f the factor of dropout and
delta = rowsum(P * dP) - dlse = rowsum(out * dout) - dlse,

    dV = (f P)^T dout      dP = f (dout V^T)      dS = P (dP - delta)      dZ = (1 - tanh(Z / softcap)^2) dS, or dS
    dQ = scale dZ K        dK = scale dZ^T Q

Short sequences, whose keys are one tile: a program of attention_bwd_kernel takes whole (batch, key head) pairs and
walks over the query tiles. Else attention_bwd_dq_kernel has a program per query tile and writes delta, which
attention_bwd_dkdv_kernel (a program per key tile and key head) reads, as does the kernel of bias_gradient.py. Every
element is summed up by one program in a fixed order: two runs give the same bits, and nothing is atomic.

Layout: element (b, h, i, d) of q lies at q.ptr + b * q.stride_b + h * q.stride_h + i * q.stride_row + d, and packed
tensors have stride_b = 0 and begin at their sequence's first token. A tile of scores is (queries, keys), or (keys,
queries) where dK and dV are computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import (
    CHANGING,
    INF,
    dropout_keeps,
    fill_orphans,
    finish_scores,
    head,
    head_per_row,
    key_range,
    key_sequence,
    load_lse,
    load_per_row,
    load_rows,
    query_range,
    scale_scores,
    seen_keys,
    sequence,
    store_per_row,
    store_rows,
    tile_gradients,
)

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


# ---- forward: a program per query tile of `pairs` (batch, head) ----


@triton.jit(do_not_specialize=CHANGING)
def attention_fwd_kernel(
    q, k, v, out, lse, mask, bias, dropout, band, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_k_ptr, total_q, total_k,
    batch, nheads, group, max_seqlen_q, max_seqlen_k, scale_log2, softcap, pairs,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """out and lse."""
    tile_count = tl.maximum(tl.cdiv(max_seqlen_q, BLOCK_M), 1)
    # From the last tile on, of which a causal band leaves most keys.
    tile = tile_count - 1 - tl.program_id(0) % tile_count
    for n in range(pairs):
        bh = tl.program_id(0) // tile_count * pairs + n
        b, h, i0 = bh // nheads, bh % nheads, tile * BLOCK_M
        first_q, seqlen_q = sequence(cu_seqlens_q_ptr, b, total_q, max_seqlen_q)
        first_k, seqlen_k = key_sequence(cu_seqlens_k_ptr, seqused_k_ptr, b, total_k, max_seqlen_k)
        shift = (seqlen_k - seqlen_q) * band.bottom_right
        head_out, head_lse = head(out, b, h, first_q), head_per_row(lse, b, h, first_q)
        fill_orphans(head_out, 0.0, cu_seqlens_q_ptr, b, batch, seqlen_q, first_q, total_q, tile, tile_count,
                     HEAD_DIM_V, BLOCK_DV)  # fmt: skip
        fill_orphans(head_lse, -INF, cu_seqlens_q_ptr, b, batch, seqlen_q, first_q, total_q, tile, tile_count, 1, 1)
        if i0 < seqlen_q:
            head_k, head_v = head(k, b, h // group, first_k), head(v, b, h // group, first_k)
            rows = i0 + tl.arange(0, BLOCK_M)
            q_tile = load_rows(head(q, b, h, first_q), rows, rows < seqlen_q, HEAD_DIM, BLOCK_D, DOT_DTYPE)
            row_max = tl.full((BLOCK_M,), -INF, tl.float32)
            row_sum = tl.zeros((BLOCK_M,), tl.float32)
            sums = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
            begin, end = key_range(i0, BLOCK_M, seqlen_q, seqlen_k, shift, band)
            for j0 in range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N):
                keys = j0 + tl.arange(0, BLOCK_N)
                k_tile = load_rows(head_k, keys, keys < seqlen_k, HEAD_DIM, BLOCK_D, DOT_DTYPE)
                qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
                scores, _ = scale_scores(qk, scale_log2, softcap)
                scores = finish_scores(
                    scores, b, h, rows[:, None], keys[None, :], seqlen_q, seqlen_k, shift, mask, bias, band
                )
                new_max = tl.maximum(row_max, tl.max(scores, 1))
                # A row without a key so far: all its scores are -inf, and so is the maximum.
                reference = tl.where(new_max == -INF, 0.0, new_max)
                weights = tl.exp2(scores - reference[:, None])
                rescale = tl.exp2(row_max - reference)
                row_sum = row_sum * rescale + tl.sum(weights, 1)
                row_max = new_max
                if dropout.seed_ptr is not None:
                    keeps = dropout_keeps(dropout, b, h, i0, j0, BLOCK_M, BLOCK_N, False)
                    weights = tl.where(keeps, weights, 0.0)
                seen = seen_keys(keys, b, h, begin, end, mask)
                v_tile = load_rows(head_v, keys, seen, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
                sums = tl.dot(weights.to(DOT_DTYPE), v_tile, sums * rescale[:, None], input_precision=PRECISION)

            is_empty = row_sum == 0.0
            row_sum = tl.where(is_empty, 1.0, row_sum)
            row_lse = tl.where(is_empty, -INF, (row_max + tl.log2(row_sum)) * LN_2)
            store_per_row(head_lse, rows, seqlen_q, row_lse)
            sums = sums * (dropout.rescale / row_sum)[:, None]
            store_rows(head_out, rows, seqlen_q, sums, HEAD_DIM_V, BLOCK_DV)


# ---- backward of short sequences: a program for `pairs` (batch, key head), whose keys are one tile ----


@triton.jit(do_not_specialize=CHANGING)
def attention_bwd_kernel(
    q, k, v, lse, dout, dlse, delta, dq, dk, dv,
    mask, bias, dropout, band, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_k_ptr, total_q, total_k,
    batch, nheads, group, max_seqlen_q, max_seqlen_k, scale, scale_log2, softcap, pairs,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """dQ, dK and dV, and delta unless its pointer is None."""
    nheads_k = nheads // group
    keys = tl.arange(0, BLOCK_N)
    for n in range(pairs):
        bh = tl.program_id(0) * pairs + n
        b, h_k = bh // nheads_k, bh % nheads_k
        first_q, seqlen_q = sequence(cu_seqlens_q_ptr, b, total_q, max_seqlen_q)
        first_k, seqlen_k = key_sequence(cu_seqlens_k_ptr, seqused_k_ptr, b, total_k, max_seqlen_k)
        shift = (seqlen_k - seqlen_q) * band.bottom_right
        begin, end = key_range(0, seqlen_q, seqlen_q, seqlen_k, shift, band)
        seen = seen_keys(keys, b, h_k * group, begin, end, mask)
        for member in range(1, group):
            seen = seen | seen_keys(keys, b, h_k * group + member, begin, end, mask)
        k_tile = load_rows(head(k, b, h_k, first_k), keys, seen, HEAD_DIM, BLOCK_D, DOT_DTYPE)
        v_tile = load_rows(head(v, b, h_k, first_k), keys, seen, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
        dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv_tile = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
        for member in range(group):
            h = h_k * group + member
            head_q, head_dout, head_dq = head(q, b, h, first_q), head(dout, b, h, first_q), head(dq, b, h, first_q)
            fill_orphans(head_dq, 0.0, cu_seqlens_q_ptr, b, batch, seqlen_q, first_q, total_q, 0, 1, HEAD_DIM, BLOCK_D)
            for i0 in range(0, seqlen_q, BLOCK_M):
                rows = i0 + tl.arange(0, BLOCK_M)
                q_tile = load_rows(head_q, rows, rows < seqlen_q, HEAD_DIM, BLOCK_D, DOT_DTYPE)
                dout_tile = load_rows(head_dout, rows, rows < seqlen_q, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
                row_lse = load_lse(head_per_row(lse, b, h, first_q), rows, seqlen_q)
                weights, kept_weights, dp, slope = tile_gradients(
                    q_tile, k_tile, v_tile, dout_tile, row_lse[None, :], b, h, i0, 0, seqlen_q, seqlen_k, shift,
                    mask, bias, dropout, band, scale_log2, softcap, BLOCK_M, BLOCK_N, True, PRECISION
                )  # fmt: skip
                # The weights sum to 1 up to the rounding of their scores, which must not tell them from delta.
                total = tl.sum(weights, 0)
                row_delta = tl.sum(weights * dp, 0) / tl.where(total == 0.0, 1.0, total)
                if dlse.ptr is not None:
                    row_delta -= load_per_row(head_per_row(dlse, b, h, first_q), rows, seqlen_q, 0.0)
                if delta.ptr is not None:
                    store_per_row(head_per_row(delta, b, h, first_q), rows, seqlen_q, row_delta)
                dscores = (weights * (dp - row_delta[None, :]) * slope).to(DOT_DTYPE)
                dv_tile = tl.dot(kept_weights.to(DOT_DTYPE), dout_tile, dv_tile, input_precision=PRECISION)
                dk_tile = tl.dot(dscores, q_tile, dk_tile, input_precision=PRECISION)
                # Triton shares all these products out to the warps like this one: by rows if it is tall.
                if BLOCK_N > BLOCK_D:
                    dq_tile = tl.trans(tl.dot(tl.trans(k_tile), dscores, input_precision=PRECISION))
                else:
                    dq_tile = tl.dot(tl.trans(dscores), k_tile, input_precision=PRECISION)
                store_rows(head_dq, rows, seqlen_q, dq_tile * scale, HEAD_DIM, BLOCK_D)
        head_dk, head_dv = head(dk, b, h_k, first_k), head(dv, b, h_k, first_k)
        store_rows(head_dk, keys, seqlen_k, dk_tile * scale, HEAD_DIM, BLOCK_D)
        store_rows(head_dv, keys, seqlen_k, dv_tile * dropout.rescale, HEAD_DIM_V, BLOCK_DV)
        fill_orphans(head_dk, 0.0, cu_seqlens_k_ptr, b, batch, seqlen_k, first_k, total_k, 0, 1, HEAD_DIM, BLOCK_D)
        fill_orphans(head_dv, 0.0, cu_seqlens_k_ptr, b, batch, seqlen_k, first_k, total_k, 0, 1, HEAD_DIM_V, BLOCK_DV)


# ---- dQ and delta: a program per (batch, head, query tile) ----


@triton.jit(do_not_specialize=CHANGING)
def attention_bwd_dq_kernel(
    q, k, v, out, lse, dout, dlse, delta, dq,
    mask, bias, dropout, band, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_k_ptr, total_q, total_k,
    batch, nheads, group, max_seqlen_q, max_seqlen_k, scale, scale_log2, softcap,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """delta and dQ of one tile of queries."""
    tile_count = tl.maximum(tl.cdiv(max_seqlen_q, BLOCK_M), 1)
    tile, bh = tile_count - 1 - tl.program_id(0) % tile_count, tl.program_id(0) // tile_count
    b, h, i0 = bh // nheads, bh % nheads, tile * BLOCK_M
    first_q, seqlen_q = sequence(cu_seqlens_q_ptr, b, total_q, max_seqlen_q)
    first_k, seqlen_k = key_sequence(cu_seqlens_k_ptr, seqused_k_ptr, b, total_k, max_seqlen_k)
    shift = (seqlen_k - seqlen_q) * band.bottom_right
    head_dq = head(dq, b, h, first_q)
    fill_orphans(head_dq, 0.0, cu_seqlens_q_ptr, b, batch, seqlen_q, first_q, total_q, tile, tile_count,
                 HEAD_DIM, BLOCK_D)  # fmt: skip
    if i0 >= seqlen_q:
        return

    head_k, head_v = head(k, b, h // group, first_k), head(v, b, h // group, first_k)
    rows = i0 + tl.arange(0, BLOCK_M)
    q_tile = load_rows(head(q, b, h, first_q), rows, rows < seqlen_q, HEAD_DIM, BLOCK_D, DOT_DTYPE)
    dout_tile = load_rows(head(dout, b, h, first_q), rows, rows < seqlen_q, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
    out_tile = load_rows(head(out, b, h, first_q), rows, rows < seqlen_q, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
    row_lse = load_lse(head_per_row(lse, b, h, first_q), rows, seqlen_q)
    row_delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse.ptr is not None:
        row_delta -= load_per_row(head_per_row(dlse, b, h, first_q), rows, seqlen_q, 0.0)
    store_per_row(head_per_row(delta, b, h, first_q), rows, seqlen_q, row_delta)

    dq_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, end = key_range(i0, BLOCK_M, seqlen_q, seqlen_k, shift, band)
    for j0 in range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N):
        keys = j0 + tl.arange(0, BLOCK_N)
        seen = seen_keys(keys, b, h, begin, end, mask)
        k_tile = load_rows(head_k, keys, seen, HEAD_DIM, BLOCK_D, DOT_DTYPE)
        v_tile = load_rows(head_v, keys, keys < seqlen_k, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
        weights, _, dp, slope = tile_gradients(
            q_tile, k_tile, v_tile, dout_tile, row_lse[:, None], b, h, i0, j0, seqlen_q, seqlen_k, shift,
            mask, bias, dropout, band, scale_log2, softcap, BLOCK_M, BLOCK_N, False, PRECISION
        )  # fmt: skip
        dscores = weights * (dp - row_delta[:, None]) * slope
        dq_tile = tl.dot(dscores.to(DOT_DTYPE), k_tile, dq_tile, input_precision=PRECISION)
    store_rows(head_dq, rows, seqlen_q, dq_tile * scale, HEAD_DIM, BLOCK_D)


# ---- dK and dV: a program per (batch, key head, key tile) ----


@triton.jit(do_not_specialize=CHANGING)
def attention_bwd_dkdv_kernel(
    q, k, v, lse, dout, delta, dk, dv,
    mask, bias, dropout, band, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_k_ptr, total_q, total_k,
    batch, nheads, group, max_seqlen_q, max_seqlen_k, scale, scale_log2, softcap,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """dK and dV of one tile of keys, over all query heads that share them."""
    tile_count = tl.maximum(tl.cdiv(max_seqlen_k, BLOCK_N), 1)
    tile, bh = tl.program_id(0) % tile_count, tl.program_id(0) // tile_count
    nheads_k = nheads // group
    b, h_k, j0 = bh // nheads_k, bh % nheads_k, tile * BLOCK_N
    first_q, seqlen_q = sequence(cu_seqlens_q_ptr, b, total_q, max_seqlen_q)
    first_k, seqlen_k = key_sequence(cu_seqlens_k_ptr, seqused_k_ptr, b, total_k, max_seqlen_k)
    shift = (seqlen_k - seqlen_q) * band.bottom_right
    head_dk, head_dv = head(dk, b, h_k, first_k), head(dv, b, h_k, first_k)
    fill_orphans(head_dk, 0.0, cu_seqlens_k_ptr, b, batch, seqlen_k, first_k, total_k, tile, tile_count,
                 HEAD_DIM, BLOCK_D)  # fmt: skip
    fill_orphans(head_dv, 0.0, cu_seqlens_k_ptr, b, batch, seqlen_k, first_k, total_k, tile, tile_count,
                 HEAD_DIM_V, BLOCK_DV)  # fmt: skip
    if j0 >= seqlen_k:
        return

    keys = j0 + tl.arange(0, BLOCK_N)
    k_tile = load_rows(head(k, b, h_k, first_k), keys, keys < seqlen_k, HEAD_DIM, BLOCK_D, DOT_DTYPE)
    v_tile = load_rows(head(v, b, h_k, first_k), keys, keys < seqlen_k, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    begin, end = query_range(j0, seqlen_q, seqlen_k, shift, band, BLOCK_M, BLOCK_N)
    for member in range(group):
        h = h_k * group + member
        head_q, head_dout = head(q, b, h, first_q), head(dout, b, h, first_q)
        head_lse, head_delta = head_per_row(lse, b, h, first_q), head_per_row(delta, b, h, first_q)
        for i0 in range(begin, end, BLOCK_M):
            rows = i0 + tl.arange(0, BLOCK_M)
            q_tile = load_rows(head_q, rows, rows < seqlen_q, HEAD_DIM, BLOCK_D, DOT_DTYPE)
            dout_tile = load_rows(head_dout, rows, rows < seqlen_q, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
            row_lse = load_lse(head_lse, rows, seqlen_q)
            row_delta = load_per_row(head_delta, rows, seqlen_q, 0.0)
            weights, kept_weights, dp, slope = tile_gradients(
                q_tile, k_tile, v_tile, dout_tile, row_lse[None, :], b, h, i0, j0, seqlen_q, seqlen_k, shift,
                mask, bias, dropout, band, scale_log2, softcap, BLOCK_M, BLOCK_N, True, PRECISION
            )  # fmt: skip
            dscores = weights * (dp - row_delta[None, :]) * slope
            dv_tile = tl.dot(kept_weights.to(DOT_DTYPE), dout_tile, dv_tile, input_precision=PRECISION)
            dk_tile = tl.dot(dscores.to(DOT_DTYPE), q_tile, dk_tile, input_precision=PRECISION)
    store_rows(head_dk, keys, seqlen_k, dk_tile * scale, HEAD_DIM, BLOCK_D)
    store_rows(head_dv, keys, seqlen_k, dv_tile * dropout.rescale, HEAD_DIM_V, BLOCK_DV)
