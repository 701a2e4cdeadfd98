"""What the kernels of all passes share: sequences, rows, the scores of a tile, its dropout and its gradients."""

from __future__ import annotations

import triton
import triton.language as tl

INF: tl.constexpr = tl.constexpr(float("inf"))
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


# ---- sequences and tiles of them ----


@triton.jit
def token(cu_seqlens_ptr, b, total):
    """Where sequence b begins, cut to the tensor."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b).to(tl.int64), 0), total)


@triton.jit
def sequence(cu_seqlens_ptr, b, total, max_seqlen):
    """First token of sequence b, 0 when dense, and its length, cut to the tensor so that nothing outside is touched."""
    first = tl.full((), 0, tl.int64)
    seqlen = max_seqlen
    if cu_seqlens_ptr is not None:
        first = token(cu_seqlens_ptr, b, total)
        length = tl.maximum(token(cu_seqlens_ptr, b + 1, total) - first, 0)
        seqlen = tl.minimum(length, max_seqlen).to(tl.int32)
    return first, seqlen


@triton.jit
def key_range(i0, seqlen_q, seqlen_k, shift, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Begin (a multiple of BLOCK_N) and end of the keys that the queries of tile i0 may look at."""
    begin = 0
    end = seqlen_k
    if left is not None:
        begin = tl.maximum(i0 + shift - left, 0) // BLOCK_N * BLOCK_N
    if right is not None:
        end = tl.minimum(tl.minimum(i0 + BLOCK_M, seqlen_q) + shift + right, seqlen_k)
    return begin, end


@triton.jit
def query_range(j0, seqlen_q, seqlen_k, shift, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Begin (a multiple of BLOCK_M) and end of the queries that may look at the keys of tile j0."""
    begin = 0
    end = seqlen_q
    if right is not None:
        begin = tl.maximum(j0 - shift - right, 0) // BLOCK_M * BLOCK_M
    if left is not None:
        end = tl.minimum(tl.minimum(j0 + BLOCK_N, seqlen_k) - shift + left, seqlen_q)
    return begin, end


@triton.jit
def head(ptr, b, h, first, stride_b, stride_h, stride_row):
    """Pointer to the first row of one (batch, head)."""
    return ptr + tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h + first * stride_row


@triton.jit
def load_rows(ptr, stride_row, rows, seqlen, SIZE: tl.constexpr, BLOCK: tl.constexpr, DOT_DTYPE: tl.constexpr):
    """(rows, BLOCK) of one head, zeros beyond its last row and its SIZE dimensions."""
    dims = tl.arange(0, BLOCK)
    inside = (rows < seqlen)[:, None] & (dims < SIZE)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride_row + dims[None, :], inside, 0.0).to(DOT_DTYPE)


@triton.jit
def store_rows(ptr, stride_row, rows, seqlen, x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Store (rows, BLOCK) of one head, but nothing beyond its last row and its SIZE dimensions."""
    dims = tl.arange(0, BLOCK)
    inside = (rows < seqlen)[:, None] & (dims < SIZE)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride_row + dims[None, :], x.to(ptr.dtype.element_ty), inside)


@triton.jit
def fill_orphans(
    ptr, stride_row, value, cu_seqlens_ptr, b, batch, seqlen, first, total, tile, tile_count,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Fill the tokens between sequence b and the next, which belong to none; each tile's program takes a share.

    ptr is at the first token of the sequence.
    """
    if cu_seqlens_ptr is not None:
        end = total - first
        if b < batch - 1:
            end = token(cu_seqlens_ptr, b + 1, total) - first
        for row in range(seqlen + tile * ROWS, end, tile_count * ROWS):
            rows = row + tl.arange(0, ROWS)
            store_rows(ptr, stride_row, rows, end, tl.full((ROWS, BLOCK), value, tl.float32), SIZE, BLOCK)


# ---- scores ----


@triton.jit
def finish_scores(
    qk, b, h, rows, keys, seqlen_q, seqlen_k, shift,
    mask_ptr, stride_maskb, stride_maskh, stride_maskm, stride_maskn,
    bias_ptr, stride_biasb, stride_biash, stride_biasm, stride_biasn,
    scale_log2, left, right
):  # fmt: skip
    """log2(e) (scale * q k^T + bias), and -inf where the query must not attend to the key."""
    b, h, rows_64, keys_64 = tl.cast(b, tl.int64), tl.cast(h, tl.int64), rows.to(tl.int64), keys.to(tl.int64)
    scores = qk * scale_log2
    inside = (rows < seqlen_q) & (keys < seqlen_k)
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + (b * stride_biasb + h * stride_biash + rows_64 * stride_biasm + keys_64 * stride_biasn)
        scores += tl.load(bias_ptrs, inside, 0.0).to(tl.float32) * LOG2_E
    if mask_ptr is not None:
        mask_ptrs = mask_ptr + (b * stride_maskb + h * stride_maskh + rows_64 * stride_maskm + keys_64 * stride_maskn)
        scores = tl.where(tl.load(mask_ptrs, inside, 0), scores, -INF)
    if left is not None:
        scores = tl.where(keys - rows >= shift - left, scores, -INF)
    if right is not None:
        scores = tl.where(keys - rows <= shift + right, scores, -INF)
    return tl.where(keys < seqlen_k, scores, -INF)


@triton.jit
def dropout_keeps(
    seed_ptr, threshold, b, h, i0, j0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr
):  # fmt: skip
    """The weights of the tile that dropout keeps. Four keys share one Philox counter, each takes one of its words."""
    rows = i0 + tl.arange(0, BLOCK_M)
    groups = j0 // 4 + tl.arange(0, BLOCK_N // 4)
    seed = tl.load(seed_ptr)
    if KEYS_FIRST:
        word_0, word_1, word_2, word_3 = tl.philox(seed, groups[:, None], rows[None, :], h, b)
        number = tl.arange(0, 4)[None, :, None]
        words = tl.where(
            number < 2,
            tl.where(number == 0, word_0[:, None, :], word_1[:, None, :]),
            tl.where(number == 2, word_2[:, None, :], word_3[:, None, :]),
        )
        words = tl.reshape(words, (BLOCK_N, BLOCK_M))
    else:
        word_0, word_1, word_2, word_3 = tl.philox(seed, groups[None, :], rows[:, None], h, b)
        words = tl.interleave(tl.interleave(word_0, word_2), tl.interleave(word_1, word_3))
    return words >= tl.cast(threshold, tl.uint32)


@triton.jit
def load_lse(ptr, rows, seqlen_q):
    """In base 2; +inf, so that all weights are 0, where no key is allowed or there is no row."""
    lse = tl.load(ptr + rows, rows < seqlen_q, INF)
    return tl.where(lse == -INF, INF, lse) * LOG2_E


@triton.jit
def tile_gradients(
    scores, dp, lse, delta, seed_ptr, dropout_threshold, dropout_rescale, b, h, i0, j0,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr
):  # fmt: skip
    """The kept weights, not rescaled, and dS."""
    weights = tl.exp2(scores - lse)
    kept_weights = weights
    if seed_ptr is not None:
        keeps = dropout_keeps(seed_ptr, dropout_threshold, b, h, i0, j0, BLOCK_M, BLOCK_N, KEYS_FIRST)
        kept_weights = tl.where(keeps, weights, 0.0)
        dp = tl.where(keeps, dp * dropout_rescale, 0.0)
    return kept_weights, weights * (dp - delta)
