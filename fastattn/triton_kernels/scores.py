"""The parts that the kernels of all passes share: arguments, sequences, rows, scores of a tile, dropout, gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

INF: tl.constexpr = tl.constexpr(float("inf"))
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Numbers that change from call to call; kernels are not compiled again for those that divide by 16 or are 1.
CHANGING = ("total_q", "total_k", "batch", "max_seqlen_q", "max_seqlen_k")


# ---- arguments; a pointer or an edge that is None is a feature that the compiled kernel does not have ----


class Rows(NamedTuple):
    """(batch, heads, rows) of elements that lie side by side; packed: stride_b is 0."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_row: Any


class PerRow(NamedTuple):
    """(batch, heads, rows) of numbers that lie side by side; packed: the stride of the batch is 0.

    Strides that follow a batch's lengths come multiplied by 16: all of them look alike to Triton, which compiles a
    kernel for every mixture of those that 16 divides. It heeds `do_not_specialize` for no part of a tuple.
    """

    ptr: Any
    stride_b_16: Any
    stride_h_16: Any


class Scores(NamedTuple):
    """Mask or bias: (batch, heads, queries, keys), a stride is 0 where it broadcasts."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any
    stride_n: Any


class Dropout(NamedTuple):
    """A weight whose random word is at least `threshold` is kept and multiplied by `rescale`."""

    seed_ptr: Any
    threshold: Any
    rescale: Any


class Softcap(NamedTuple):
    """A product x of q and k becomes the score bound * tanh(x * factor), in base 2."""

    factor: Any
    bound_log2: Any


class Band(NamedTuple):
    """Key j is allowed iff -left <= j - (i + shift) <= right; shift is seqlen_k - seqlen_q if bottom_right, else 0."""

    left: Any
    right: Any
    bottom_right: Any  # 0 or 1


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
def key_sequence(cu_seqlens_k_ptr, seqused_k_ptr, b, total_k, max_seqlen_k):
    """First token of sequence b's keys and how many there are, which seqused_k may say are fewer than their places."""
    first, seqlen = sequence(cu_seqlens_k_ptr, b, total_k, max_seqlen_k)
    if seqused_k_ptr is not None:
        seqlen = tl.minimum(seqlen, tl.maximum(tl.load(seqused_k_ptr + b), 0))
    return first, seqlen


@triton.jit
def key_range(i0, count, seqlen_q, seqlen_k, shift, band):
    """Begin and end of the keys that the `count` queries from i0 on may look at."""
    begin = 0
    end = seqlen_k
    if band.left is not None:
        begin = tl.maximum(i0 + shift - band.left, 0)
    if band.right is not None:
        end = tl.minimum(tl.minimum(i0 + count, seqlen_q) + shift + band.right, seqlen_k)
    return begin, end


@triton.jit
def query_range(j0, seqlen_q, seqlen_k, shift, band, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Begin (a multiple of BLOCK_M) and end of the queries that may look at the keys of tile j0."""
    begin = 0
    end = seqlen_q
    if band.right is not None:
        begin = tl.maximum(j0 - shift - band.right, 0) // BLOCK_M * BLOCK_M
    if band.left is not None:
        end = tl.minimum(tl.minimum(j0 + BLOCK_N, seqlen_k) - shift + band.left, seqlen_q)
    return begin, end


# ---- rows ----


@triton.jit
def head(x, b, h, first):
    """The rows of one (batch, head), from the first token of the sequence on."""
    ptr = x.ptr + tl.cast(b, tl.int64) * x.stride_b + tl.cast(h, tl.int64) * x.stride_h + first * x.stride_row
    return Rows(ptr, x.stride_b, x.stride_h, x.stride_row)


@triton.jit
def head_per_row(x, b, h, first):
    """The numbers of one (batch, head), as `head` gives its rows."""
    ptr = x.ptr + tl.cast(b, tl.int64) * (x.stride_b_16 >> 4) + tl.cast(h, tl.int64) * (x.stride_h_16 >> 4)
    return Rows(ptr + first, 0, 0, 1)


@triton.jit
def head_scores(x, b, h):
    """Where the mask or the bias of one (batch, head) begins."""
    return x.ptr + tl.cast(b, tl.int64) * x.stride_b + tl.cast(h, tl.int64) * x.stride_h


@triton.jit
def seen_keys(keys, b, h, begin, end, mask):
    """Those of a tile's keys that are in the range, unless a mask that is the same for all queries excludes them.

    The others may hold anything, NaN too, which a weight of 0 does not take out of a product.
    """
    seen = (keys >= begin) & (keys < end)
    if mask.ptr is not None:
        is_same_for_all = mask.stride_m == 0
        if is_same_for_all:
            seen = seen & tl.load(head_scores(mask, b, h) + keys.to(tl.int64) * mask.stride_n, seen, 0)
    return seen


@triton.jit
def load_rows(x, rows, wanted, SIZE: tl.constexpr, BLOCK: tl.constexpr, DOT_DTYPE: tl.constexpr):
    """(rows, BLOCK) of one head, zeros in rows that are not wanted and beyond its SIZE dimensions."""
    dims = tl.arange(0, BLOCK)
    inside = wanted[:, None] & (dims < SIZE)[None, :]
    return tl.load(x.ptr + rows.to(tl.int64)[:, None] * x.stride_row + dims[None, :], inside, 0.0).to(DOT_DTYPE)


@triton.jit
def store_rows(x, rows, seqlen, values, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Store (rows, BLOCK) of one head, but nothing beyond its last row and its SIZE dimensions."""
    dims = tl.arange(0, BLOCK)
    inside = (rows < seqlen)[:, None] & (dims < SIZE)[None, :]
    ptrs = x.ptr + rows.to(tl.int64)[:, None] * x.stride_row + dims[None, :]
    tl.store(ptrs, values.to(x.ptr.dtype.element_ty), inside)


@triton.jit
def load_per_row(x, rows, seqlen, other):
    """(rows,) numbers of one head, `other` beyond its last row."""
    return tl.load(x.ptr + rows.to(tl.int64) * x.stride_row, rows < seqlen, other)


@triton.jit
def store_per_row(x, rows, seqlen, values):
    """Store (rows,) numbers of one head, but nothing beyond its last row."""
    tl.store(x.ptr + rows.to(tl.int64) * x.stride_row, values, rows < seqlen)


@triton.jit
def fill_orphans(
    x, value, cu_seqlens_ptr, b, batch, seqlen, first, total, tile, tile_count, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Fill the tokens between sequence b and the next, which belong to none; each tile's program takes a share.

    x is at the first token of the sequence.
    """
    if cu_seqlens_ptr is not None:
        end = total - first
        if b < batch - 1:
            end = token(cu_seqlens_ptr, b + 1, total) - first
        for row in range(seqlen + tile * 16, end, tile_count * 16):
            store_rows(x, row + tl.arange(0, 16), end, tl.full((16, BLOCK), value, tl.float32), SIZE, BLOCK)


# ---- scores ----


@triton.jit
def tanh(x):
    """To a few units in the last place, with what the interpreter has, too.

    Small arguments have a polynomial of their own (Moshier's Cephes library, tanhf): from the exponential only the last
    bits of 1 would be left of them.
    """
    magnitude = tl.abs(x)
    square = x * x
    y = -5.70498872745e-3 * square + 2.06390887954e-2
    y = y * square - 5.37397155531e-2
    y = y * square + 1.33314422036e-1
    y = y * square - 3.33332819422e-1
    exponential = tl.exp2(magnitude * (-2.0 * LOG2_E))
    large = (1.0 - exponential) / (1.0 + exponential)
    return tl.where(magnitude < 0.625, y * square * x + x, tl.where(x < 0.0, -large, large))


@triton.jit
def scale_scores(qk, scale_log2, softcap):
    """log2(e) scale * q k^T, under the bound of softcap unless it is None, and its derivative by what it is without."""
    if softcap is None:
        return qk * scale_log2, 1.0
    else:
        y = tanh(qk * softcap.factor)
        return y * softcap.bound_log2, 1.0 - y * y


@triton.jit
def finish_scores(scores, b, h, rows, keys, seqlen_q, seqlen_k, shift, mask, bias, band):
    """With log2(e) bias, and -inf where the query must not attend to the key."""
    rows_64, keys_64 = rows.to(tl.int64), keys.to(tl.int64)
    inside = (rows < seqlen_q) & (keys < seqlen_k)
    if bias.ptr is not None:
        offsets = rows_64 * bias.stride_m + keys_64 * bias.stride_n
        scores += tl.load(head_scores(bias, b, h) + offsets, inside, 0.0).to(tl.float32) * LOG2_E
    if mask.ptr is not None:
        offsets = rows_64 * mask.stride_m + keys_64 * mask.stride_n
        scores = tl.where(tl.load(head_scores(mask, b, h) + offsets, inside, 0), scores, -INF)
    rows = tl.minimum(rows, seqlen_q - 1)  # past the end they would see keys that no other query sees
    if band.left is not None:
        scores = tl.where(keys - rows >= shift - band.left, scores, -INF)
    if band.right is not None:
        scores = tl.where(keys - rows <= shift + band.right, scores, -INF)
    return tl.where(keys < seqlen_k, scores, -INF)


@triton.jit
def dropout_keeps(
    dropout, b, h, i0, j0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr
):  # fmt: skip
    """The weights of the tile that dropout keeps. Four keys share one Philox counter, each takes one of its words."""
    rows = i0 + tl.arange(0, BLOCK_M)
    groups = j0 // 4 + tl.arange(0, BLOCK_N // 4)
    seed = tl.load(dropout.seed_ptr)
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
    return words >= tl.cast(dropout.threshold, tl.uint32)


# ---- gradients ----


@triton.jit
def load_lse(lse, rows, seqlen_q):
    """In base 2; +inf, so that all weights are 0, where no key is allowed or there is no row."""
    lse = load_per_row(lse, rows, seqlen_q, INF)
    return tl.where(lse == -INF, INF, lse) * LOG2_E


@triton.jit
def tile_gradients(
    q, k, v, dout, lse, b, h, i0, j0, seqlen_q, seqlen_k, shift, mask, bias, dropout, band, scale_log2, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The weights P, those kept by dropout (not rescaled), dP and the slope dS / dZ of one tile.

    A tile is (queries, keys), or turned if KEYS_FIRST. Z is S without bias and mask before it comes under the softcap;
    without one, the slope is 1. lse has the shape that broadcasts to it.
    """
    rows, keys = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    if KEYS_FIRST:
        qk, dp = tl.dot(k, tl.trans(q), input_precision=PRECISION), tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        rows, keys = rows[None, :], keys[:, None]
    else:
        qk, dp = tl.dot(q, tl.trans(k), input_precision=PRECISION), tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        rows, keys = rows[:, None], keys[None, :]
    scores, slope = scale_scores(qk, scale_log2, softcap)
    scores = finish_scores(scores, b, h, rows, keys, seqlen_q, seqlen_k, shift, mask, bias, band)
    weights = tl.exp2(scores - lse)
    if (mask.ptr is not None) or ((band.left is not None) or (band.right is not None)):  # in pairs: Triton 3.3
        dp = tl.where(weights == 0.0, 0.0, dp)  # v may hold anything there, NaN too
        if softcap is not None:
            slope = tl.where(weights == 0.0, 0.0, slope)  # and so may k
    kept_weights = weights
    if dropout.seed_ptr is not None:
        keeps = dropout_keeps(dropout, b, h, i0, j0, BLOCK_M, BLOCK_N, KEYS_FIRST)
        kept_weights = tl.where(keeps, weights, 0.0)
        dp = tl.where(keeps, dp * dropout.rescale, 0.0)
    return weights, kept_weights, dp, slope
