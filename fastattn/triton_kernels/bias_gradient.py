"""The gradient of a bias in Triton: dS (kernels.py) summed over all that the bias is broadcast to, without atomics.

A program takes one tile of the bias and one of `copies` copies of it, into which it sums up, in a fixed order, every
copies-th of the tiles of scores that its own is broadcast to. The copies are added up afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import (
    CHANGING,
    head,
    head_per_row,
    key_range,
    key_sequence,
    load_lse,
    load_per_row,
    load_rows,
    sequence,
    tile_gradients,
)


@triton.jit(do_not_specialize=(*CHANGING, "copies", "bias_batch", "bias_rows", "bias_keys"))
def attention_bwd_dbias_kernel(
    q, k, v, lse, dout, delta, partial_ptr, copies, bias_batch, bias_heads, bias_rows, bias_keys,
    mask, bias, dropout, band, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_k_ptr, total_q, total_k,
    batch, nheads, group, max_seqlen_q, max_seqlen_k, scale_log2, softcap,
    ROWS_BROADCAST: tl.constexpr, KEYS_BROADCAST: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr
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
        first_q, seqlen_q = sequence(cu_seqlens_q_ptr, b, total_q, max_seqlen_q)
        first_k, seqlen_k = key_sequence(cu_seqlens_k_ptr, seqused_k_ptr, b, total_k, max_seqlen_k)
        shift = (seqlen_k - seqlen_q) * band.bottom_right
        begin, end = key_range(i0, BLOCK_M, seqlen_q, seqlen_k, shift, band)
        if (i0 < seqlen_q) & (j0 + BLOCK_N > begin) & (j0 < end):
            rows, keys = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
            head_k, head_v = head(k, b, h // group, first_k), head(v, b, h // group, first_k)
            q_tile = load_rows(head(q, b, h, first_q), rows, rows < seqlen_q, HEAD_DIM, BLOCK_D, DOT_DTYPE)
            k_tile = load_rows(head_k, keys, keys < seqlen_k, HEAD_DIM, BLOCK_D, DOT_DTYPE)
            v_tile = load_rows(head_v, keys, keys < seqlen_k, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
            dout_tile = load_rows(head(dout, b, h, first_q), rows, rows < seqlen_q, HEAD_DIM_V, BLOCK_DV, DOT_DTYPE)
            row_lse = load_lse(head_per_row(lse, b, h, first_q), rows, seqlen_q)
            row_delta = load_per_row(head_per_row(delta, b, h, first_q), rows, seqlen_q, 0.0)
            weights, _, dp, _ = tile_gradients(
                q_tile, k_tile, v_tile, dout_tile, row_lse[:, None], b, h, i0, j0, seqlen_q, seqlen_k, shift,
                mask, bias, dropout, band, scale_log2, softcap, BLOCK_M, BLOCK_N, False, PRECISION
            )  # fmt: skip
            sums += weights * (dp - row_delta[:, None])

    rows, keys = own_i0 + tl.arange(0, BLOCK_M), own_j0 + tl.arange(0, BLOCK_N)
    if ROWS_BROADCAST:
        sums = tl.sum(sums, 0, keep_dims=True)
    if KEYS_BROADCAST:
        sums = tl.sum(sums, 1, keep_dims=True)
    slice_ = (copy.to(tl.int64) * bias_batch + own_b) * bias_heads + own_h
    offsets = (slice_ * bias_rows + rows[:, None]) * bias_keys + keys[None, :]
    inside = (rows < bias_rows)[:, None] & (keys < bias_keys)[None, :]
    tl.store(partial_ptr + offsets, tl.broadcast_to(sums, BLOCK_M, BLOCK_N), inside)
