"""Sabotage of the CUDA kernels: what is changed in csrc, and the case that must notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tests.support.cases import Case
from tests.support.contract import check, check_lengths_are_cut

NUMBERS = "numbers"  # caught by the comparison with the oracle, not by the executor

# Two batches in two blocks, three tiles of queries and of keys. Rows of q and k are moved four elements at a time as
# they lie, those of v and out are narrower than the tile.
PLAIN = Case(seqlens=(70, 75), dims=(32, 24), heads=(1, 1), batch=2)
MASKED = replace(PLAIN, mask="random", heads=(2, 2))
EMPTY_ROWS = replace(PLAIN, mask="empty-rows")
BIASED = replace(PLAIN, bias="full", heads=(2, 2))
PER_HEAD = replace(PLAIN, bias="per-head")
PER_KEY = replace(PLAIN, bias="per-key", heads=(2, 2))
GROUPED = replace(PLAIN, heads=(4, 2))
PACKED = replace(PLAIN, packed=True, mask="padding")
PADDED = replace(PLAIN, mask="padding")  # keys that no query sees, which hold NaN
ONE_QUERY = replace(MASKED, seqlens=(1, 75))  # a mask of each head that no query changes
DROPPED = replace(PLAIN, dropout_p=0.3, heads=(2, 2))
CAUSAL = replace(PLAIN, band="causal", seqlens=(100, 100))
WINDOW = replace(PLAIN, band="window-bottom-right")
WIDE = replace(PLAIN, band="wide-window", seqlens=(150, 200), batch=1)
HALF = replace(PLAIN, dtype=torch.float16, heads=(4, 2), band="window")
ODD = replace(PLAIN, dims=(7, 7))
UNALIGNED = replace(PLAIN, dims=(24, 32))
SHORT = replace(PLAIN, seqlens=(70, 30))  # a row's keys are all in one tile
SHORT_EMPTY = replace(SHORT, mask="empty-rows")
SHORT_BIASED = replace(SHORT, bias="per-key")
SHORT_DROPPED = replace(SHORT, dropout_p=0.3)
WIDE_TILES = replace(PLAIN, seqlens=(128, 127))  # the tile of 64 x 64
WIDE_TILES_BIASED = replace(WIDE_TILES, bias="full", heads=(2, 2))
ALL_KEYS = replace(PLAIN, seqlens=(82, 90), dims=(64, 40), batch=1)  # tiles of 96 keys
STRADDLING = replace(ALL_KEYS, seqlens=(138, 90), bias="full", band="causal-bottom-right")
QUADS = replace(BIASED, seqlens=(72, 76))  # elements of the bias are moved four at a time
SLICED = replace(PLAIN, dims=(128, 100))  # two slices of the head dimension
CAPPED = replace(PLAIN, softcap=3.0)
CAPPED_BIASED = replace(CAPPED, bias="full", heads=(2, 2))
USED = replace(PLAIN, used=True, batch=3)  # all keys, half of them, none
SHORT_CAUSAL = replace(CAUSAL, seqlens=(40, 75))
SEEN = "const auto seen = [&](int row) { return seen_keys<T>(p, s, h, i0, j0 + row); };"
SEEN_ALL = "const auto seen = [&](int) { return ~0u; };"


@dataclass(frozen=True)
class Mutant:
    """A text of the sources replaced by another, the case that must notice, and what it must notice."""

    file: str
    old: str
    new: str
    case: Case = PLAIN
    caught_by: str = NUMBERS
    is_split: bool = False  # caught in the split backward
    head_dim: int = 32  # of the kernels that are run
    check: Callable[[Case], None] = check
    arch: str | None = None  # whose PTX is run, of tensor cores; None: the sources


def forward(old: str, new: str, case: Case = PLAIN, caught_by: str = NUMBERS, head_dim: int = 32) -> Mutant:
    return Mutant("attention_fwd.cuh", old, new, case, caught_by, False, head_dim)


def backward(old: str, new: str, case: Case = PLAIN, caught_by: str = NUMBERS) -> Mutant:
    return Mutant("attention_bwd.cuh", old, new, case, caught_by)


def split(old: str, new: str, case: Case = PLAIN, caught_by: str = NUMBERS) -> Mutant:
    return Mutant("attention_bwd.cuh", old, new, case, caught_by, is_split=True)


def bias_gradient(old: str, new: str, case: Case, caught_by: str = NUMBERS) -> Mutant:
    return Mutant("attention_dbias.cuh", old, new, case, caught_by)


def mask(old: str, new: str, case: Case = PLAIN, caught_by: str = NUMBERS) -> Mutant:
    return Mutant("mask.cuh", old, new, case, caught_by)


def copy(old: str, new: str, case: Case = PLAIN, caught_by: str = NUMBERS, head_dim: int = 32) -> Mutant:
    return Mutant("tile_copy.cuh", old, new, case, caught_by, False, head_dim)


def product(old: str, new: str, case: Case = PLAIN, caught_by: str = NUMBERS) -> Mutant:
    return Mutant("tile_mma.cuh", old, new, case, caught_by)


def philox(old: str, new: str, case: Case = DROPPED, head_dim: int = 32) -> Mutant:
    return Mutant("philox.cuh", old, new, case, NUMBERS, False, head_dim)


def softcap(old: str, new: str, case: Case = CAPPED, caught_by: str = NUMBERS) -> Mutant:
    return Mutant("softcap.cuh", old, new, case, caught_by)


def softmax(old: str, new: str, case: Case = PLAIN) -> Mutant:
    return Mutant("softmax.cuh", old, new, case)


SCORES = {
    "scale ignored": softcap("scale = p.scale * kLog2E;", "scale = kLog2E;", PLAIN),
    "scores not in units of ln 2": softcap("scale = p.scale * kLog2E;", "scale = p.scale;", PLAIN),
    "bias not in units of ln 2": mask("to_float(x), kLog2E,", "to_float(x), 1.0f,", BIASED),
    "bias of the first batch for all": mask("s.b * x.batch + ", "", BIASED),
    "bias of the first head for all": mask("h * x.head + ", "", BIASED),
    "bias of the first tile's rows for all": mask("query * x.row + ", "", BIASED),
    "bias of the first tile's keys for all": mask(" + key * x.key", "", BIASED),
    "bias of a thread's first row for all": mask("row += step * x.row;", "", BIASED),
    "bias of a thread's first key for all": mask("element += step * x.key;", "", BIASED),
    "bias of a thread's keys in one group": mask("? (T::kLanesX - 1) * kKeyGroup", "? 0", WIDE_TILES_BIASED),
    "bias read past its end": mask(
        "query < s.seqlen_q && (kAtOnce > 1 || key < s.seqlen_k)", "true", BIASED, "out-of-bounds"
    ),
    "bias read past its last rows": mask("        query += step;\n", "", BIASED, "out-of-bounds"),
    "bias read past its last keys": mask("            key += step;\n", "", BIASED, "out-of-bounds"),
    "groups of a bias past its last keys": mask(" && j0 + T::kBlockN <= s.seqlen_k", "", QUADS, "out-of-bounds"),
    "groups of a bias past its last rows": mask("query < s.seqlen_q && (kAtOnce", "(kAtOnce", QUADS, "out-of-bounds"),
    "groups of a bias for one key": mask("x.key == 1 && ", "", PER_HEAD),
    "a row of the bias not aligned": mask("(address | row)", "row", PER_KEY, "misaligned"),
    "rows of the bias not aligned": mask("(address | row)", "address", BIASED, "misaligned"),
    "the first key of each group of the bias": mask("elements.of[e]", "elements.of[0]", QUADS),
    "mask inverted": mask("if (!is_allowed)", "if (is_allowed)", MASKED),
    "mask of the first batch for all": mask("s.b * x.batch + ", "", MASKED),
    "mask of the first head for all": mask("h * x.head + ", "", MASKED),
    "mask of a thread's first row for all": mask("row += step * x.row;", "", MASKED),
    "mask of a thread's first key for all": mask("element += step * x.key;", "", MASKED),
    "mask read past its end": mask(
        "query < s.seqlen_q && (kAtOnce > 1 || key < s.seqlen_k)", "true", MASKED, "out-of-bounds"
    ),
    "keys past the end attended": mask("key >= s.seqlen_k) scores", "key > s.seqlen_k) scores"),
    "keys past the end of a whole tile attended": mask("|| j0 + T::kBlockN > s.seqlen_k)", "|| j0 > s.seqlen_k)"),
    "queries past the end have weights": mask("query >= s.seqlen_q || key", "key"),
    "queries past the end of a whole tile have weights": mask(
        "i0 + T::kBlockM > s.seqlen_q || j0", "j0", replace(PLAIN, seqlens=(70, 64))
    ),
    "causal off by one": mask("|| offset > right)", "|| offset >= right)", WINDOW),
    "window off by one": mask("offset < -left", "offset <= -left", WINDOW),
    "a tile on the left edge taken for a whole one": mask("j0 < last - left", "j0 < first - left", WIDE),
    "a tile on the right edge taken for a whole one": mask("> first + right", "> last + right", CAUSAL),
    "bottom-right ignored": mask("p.bottom_right ? seqlen_k - seqlen_q : 0", "0", WINDOW),
    "no left edge overflows": mask("return min(p.left, 2 * kLongest);", "return p.left;"),
    "no right edge overflows": mask("return min(p.right, 2 * kLongest);", "return p.right;"),
    "the last key tile missing": mask("min(last + right_edge(p) + 1,", "min(last + right_edge(p) - 31,", WINDOW),
    "the first key tile missing": mask("max(first - left_edge(p), 0)", "max(first - left_edge(p) + 32, 0)", WINDOW),
    "the last query tile missing": mask("min(last + left_edge(p) + 1,", "min(last + left_edge(p) - 31,", HALF),
    "the first query tile missing": mask("max(first - right_edge(p), 0)", "max(first - right_edge(p) + 32, 0)", HALF),
}

UNSEEN = {
    "values that no query sees not cleared": forward(SEEN, SEEN_ALL, PADDED),
    "keys that no query sees not cleared": backward(f"\n    {SEEN}", f"\n    {SEEN_ALL}", PADDED),
    "keys that no query sees not cleared in the split": split(f"\n        {SEEN}", f"\n        {SEEN_ALL}", PADDED),
    "dP of keys that no query sees": backward("if (weights[i][j] == 0.0f) dscores[i][j] = 0.0f;", "", PADDED),
    "keys that the mask excludes not cleared": mask("if (has_mask && is_seen)", "if (false)", PADDED),
    "keys before the band not cleared": mask("key >= keys.begin && key", "key", WINDOW),
    "keys before the band of a whole tile not cleared": mask("keys.begin <= j0 && ", "", WINDOW),
    "keys after the band not cleared": mask("key < keys.end;", "key < s.seqlen_k;", SHORT_CAUSAL),
    "keys after the band of a whole tile not cleared": mask(" && keys.end >= j0 + 32", "", SHORT_CAUSAL),
    "keys that another sequence does not see cleared": mask("s.b * p.mask.batch + ", "", PADDED),
    "keys that another head does not see cleared": mask("h * p.mask.head + key", "key", ONE_QUERY),
    "keys that the first key's mask excludes cleared": mask(" + key * p.mask.key", "", PADDED),
    "mask of keys past the end read": mask("if (has_mask && is_seen)", "if (has_mask)", PADDED, "out-of-bounds"),
    "later rows cleared like the first": copy("(kept >> (at.row + n * kStep) & 1)", "(kept >> at.row & 1)", PADDED),
}

SOFTCAP = {
    "softcap ignored": softcap("if (p.softcap == 0.0f) {", "if (true) {"),
    "scale ignored under a softcap": softcap("p.scale / p.softcap", "1.0f / p.softcap"),
    "scores that no softcap divides": softcap("p.scale / p.softcap", "p.scale"),
    "every softcap is 1": softcap("bound * y", "kLog2E * y"),
    "softcap not in units of ln 2": softcap("bound = p.softcap * kLog2E", "bound = p.softcap"),
    "softcap after the bias": forward(
        "scale_scores<T>(scores, nullptr, p);\n        finish_scores<E>(scores, p, s, h, i0, j0, lane);",
        "finish_scores<E>(scores, p, s, h, i0, j0, lane);\n        scale_scores<T>(scores, nullptr, p);",
        CAPPED_BIASED,
    ),
}

SEQUENCES = {
    "lengths of keys ignored": mask("if (p.seqused_k != nullptr) seqlen_k", "if (false) seqlen_k", USED),
    "lengths of keys of the first sequence": mask("p.seqused_k[b]", "p.seqused_k[0]", USED),
    "lengths of keys beyond them": replace(
        mask("length(0, p.seqused_k[b], seqlen_k)", "length(0, p.seqused_k[b], kLongest)", PACKED),
        check=check_lengths_are_cut,
    ),
    "lengths of keys below 0": replace(
        mask("length(0, p.seqused_k[b], seqlen_k)", "min(p.seqused_k[b], seqlen_k)", PACKED),
        check=check_lengths_are_cut,
    ),
    "bottom-right of all keys": mask(
        "seqlen_k = length(0, p.seqused_k[b], seqlen_k);\n        shift = p.bottom_right ? seqlen_k - seqlen_q : 0;",
        "shift = p.bottom_right ? seqlen_k - seqlen_q : 0;\n        if (p.seqused_k != nullptr)"
        " seqlen_k = length(0, p.seqused_k[b], seqlen_k);",
        replace(WINDOW, used=True, batch=3),
    ),
    "sequences beyond the grid lost": mask("b += gridDim.z;", "b += p.batch;", replace(PLAIN, batch=3)),
    "heads beyond the grid lost": mask("h += gridDim.y;", "h += nheads;", replace(PLAIN, heads=(3, 3))),
    "keys of another head": mask("h / (p.nheads / p.nheads_k)", "h % p.nheads_k", GROUPED),
    "the neighbour's tokens": mask(
        "first_k = clamp(p.cu_seqlens_k[b],", "first_k = clamp(p.cu_seqlens_k[b] + 1,", PACKED
    ),
    "tokens of no sequence not cleared": mask("row[d] = from_float<E>(0.0f);", ";", PACKED),
    "tokens after the last sequence not cleared": mask("b == batch - 1 ? total :", "", PACKED),
    "out of no sequence's tokens not cleared": forward(
        "clear_rows<E>(p.out, h,", "if (false) clear_rows<E>(p.out, h,", PACKED
    ),
    "lse of no sequence's tokens not cleared": forward("p.lse.data[h * p.lse.head + token] = -INFINITY", "", PACKED),
    "lse of the first head's tokens cleared alone": forward(
        "[h * p.lse.head + token]", "[token]", replace(PACKED, heads=(2, 2))
    ),
    "dq of no sequence's tokens not cleared": backward("clear_rows<E>(p.dq, h, queries, p.head_dim);", ";", PACKED),
    "dq of a group's first tokens cleared alone": backward(
        "has_all_keys && h < (h_k + 1) * group; ++h) clear",
        "has_all_keys && h < h_k * group + 1; ++h) clear",
        replace(PACKED, heads=(4, 2)),
    ),
    "dk of no sequence's tokens not cleared": backward("clear_rows<E>(p.dk, h_k, keys, p.head_dim);", "", PACKED),
    "dv of no sequence's tokens not cleared": backward("clear_rows<E>(p.dv, h_k, keys, p.head_dim_v);", "", PACKED),
    "dq of no sequence's tokens not cleared in the split": split(
        "clear_rows<E>(p.dq, h, orphans", "if (false) clear_rows<E>(p.dq, h, orphans", PACKED
    ),
}

COPIES = {
    "a row past the end read": copy(
        "i < rows ? static_cast<unsigned>(i) * stride : 0", "static_cast<unsigned>(i) * stride", PLAIN, "out-of-bounds"
    ),
    "rows past the end walked to": copy("if (row < tile.rows) from +=", "from +=", PLAIN, "out-of-bounds"),
    "a tile's later rows taken for rows past the end": copy(
        "            row += kStep;\n", "            row += 2 * kStep;\n"
    ),
    "a tile's later rows are the first ones": copy(
        "tile.row(i0 + at.row + n * kStep), at.d", "tile.row(i0 + at.row), at.d"
    ),
    "dimensions read past the end": copy("if (d >= dims) return x;", "", PLAIN, "out-of-bounds"),
    "the last dimensions of a row read past its end": copy("if (d + 3 < dims) x.w", "x.w", ODD),
    "dimensions written past the end": copy("if (d >= dims) return;", "", PLAIN, "race"),
    "tail of a row not written": copy("if (d + 2 < dims) to[2]", "if (d + 3 < dims) to[2]", ODD),
    "rows of another batch": copy("static_cast<unsigned>(b) * x.batch + ", ""),
    "rows of another sequence": copy("if (first != 0) data += first * x.row;", "", PACKED),
    "lines of 48 rows without a gap": Mutant(
        "tiles.cuh", "(kRows + 31) / 32 * 32", "kRows", ALL_KEYS, NUMBERS, head_dim=64
    ),
    "not staggered when written": copy("(row ^ staggered(d))", "row"),
    "every slice is the first one": copy(
        "tile.row(at.row) + d0 + at.d", "tile.row(at.row) + at.d", SLICED, head_dim=128
    ),
    "every slice of narrow rows is the first one": copy(
        "tile.load(from, d0 + at.d", "tile.load(from, at.d", SLICED, head_dim=128
    ),
    "aligned rows taken for narrow ones' width": copy(
        "if (kDims <= tile.aligned_dims)", "if (0 < tile.aligned_dims)", UNALIGNED, "out-of-bounds"
    ),
}

PRODUCTS = {
    "left not staggered when read": product("(row ^ staggered(4)) - row", "0"),
    "right not staggered when read": product("(column ^ staggered(4)) - column", "0"),
    "staggered half a step early": product("(step % 8 < 4 ? left :", "(step % 8 < 2 ? left :"),
    "weights' lines not swapped when written": product(
        "line = swapped(lane.x * kKeyGroup + j)", "line = lane.x * kKeyGroup + j"
    ),
    "weights' lines not swapped when read": product("(kSwapped ? swapped(step) : step)", "step"),
    "the last dimensions missing": product(
        "multiple_of(16, min(T::kSlice, queries.dims - d0))", "min(T::kSlice, queries.dims - d0) / 16 * 16"
    ),
    "queries staged again are others": product(
        "if (!queries_are_staged) QueryCopy::copy", "if (false) QueryCopy::copy"
    ),
    "the last keys of weights v missing": product("multiple_of(8, rows.rows - i0)", "(rows.rows - i0) / 8 * 8"),
    "the last queries of weights^T dout missing": product("multiple_of(8, rows.rows)", "rows.rows / 8 * 8"),
    "the first values staged twice": product(
        "kRowSlice, T::kHeadDim>(right, rows, i0)", "kRowSlice, T::kHeadDim>(right, rows, 0)"
    ),
    "later values with the first weights": product("own + i0 % T::kKeySlice * T::kWarpRows", "own"),
    "later keys with the first weights": product("[i0 / T::kKeySlice * kKeyGroup + j]", "[j]", WIDE_TILES),
    "later weights not staged": product("if (i0 % T::kKeySlice == 0)", "if (i0 == 0)", WIDE_TILES),
    "too narrow weights": product("own + line * T::kWarpRows", "own + line * 4", PLAIN, "race"),
    "too narrow weights of a warp": product("left + lane.warp * (T::kKeySlice", "left + lane.warp * (4", PLAIN, "race"),
    "rows written past the end": product("if (index < rows.rows) f(i, row);", "f(i, row);", PLAIN, "race"),
    "a row's sum without its last lanes": product("n <= T::kLanesX; n *= 2) x +=", "n < T::kLanesX; n *= 2) x +="),
    "a row's maximum without its last lanes": product(
        "n <= T::kLanesX; n *= 2) x = fmaxf", "n < T::kLanesX; n *= 2) x = fmaxf"
    ),
}

FORWARD = {
    "sum of weights not rescaled": softmax("fmaf(sum[i], rescale, tile_sum)", "sum[i] + tile_sum"),
    "out not rescaled": softmax("out[i][d] *= rescale;", ";"),
    "a row without keys is NaN": softmax("largest == -INFINITY ? 0.0f : largest", "largest", EMPTY_ROWS),
    "a row without keys has out NaN": forward("sum[i] == 0.0f ? 0.0f : ", "", EMPTY_ROWS),
    "lse in base 2": forward("__log2f(sum[i])) * kLn2", "__log2f(sum[i]))"),
    "queries of the first tile for all": forward("q.advance(i0);", ""),
    "keys of the first tile for all": forward("        k.advance(T::kBlockN);\n", ""),
    "values of the first tile for all": forward("        v.advance(T::kBlockN);\n", ""),
    "keys before the first tile's": forward(
        "if (keys.begin > 0) k.advance(keys.begin), ", "if (keys.begin > 0) ", WINDOW
    ),
    "values before the first tile's": forward(
        "k.advance(keys.begin), v.advance(keys.begin);\n    Online", "k.advance(keys.begin);\n    Online", WINDOW
    ),
    "queries never staged": forward("T::kOneSlice && j0 > keys.begin", "T::kOneSlice"),
    "the last slice of q taken for the first": forward(
        "T::kOneSlice && j0 > keys.begin", "j0 > keys.begin", SLICED, head_dim=128
    ),
    "weights where the queries are": forward("T::kOneSlice ? right + Smem::kValues : left", "left"),
    "weights where the values are": forward("right + Smem::kValues :", "right :"),
    "weights behind their place": forward("right + Smem::kValues :", "right + Smem::kKeys :", PLAIN, "out-of-bounds"),
    "dropout missing in out": forward("if (!kept(i, j))", "if (false && !kept(i, j))", DROPPED),
    "dropout bits of large tiles lost": philox(
        "kLong = (kCount > 32)", "kLong = false", replace(ALL_KEYS, dropout_p=0.3), head_dim=64
    ),
    "dropout bits in another order in out": forward("if (!kept(i, j))", "if (!kept(j, i))", DROPPED),
    "dropout not rescaled in out": forward("__fdividef(p.dropout_rescale,", "__fdividef(1.0f,", DROPPED),
}

DROPOUT = {
    "dropout bits of the first batch": philox("i, head, batch)", "i, head, 0)"),
    "dropout bits of the first head": philox("i, head, batch)", "i, 0, batch)"),
    "nine rounds of Philox": philox("round < 10", "round < 9"),
    "half a seed": philox("static_cast<unsigned>(*p.seed >> 32)", "0"),
    "dropout bits swapped": philox("(bits, words.x), words.y)", "(bits, words.y), words.x)"),
    "dropout bits of two keys for four": philox("words.z), words.w)", "words.x), words.y)"),
    "dropout bits of the first two of four keys": philox(
        "is_upper = j % 4 != 0", "is_upper = false", replace(DROPPED, dims=(128, 128)), 128
    ),
    "dropout bits counted from the other end": philox("kCount - 1 - (i * T::kKeys + j)", "i * T::kKeys + j"),
    "dropout bits of one row for all": philox(
        "lane.template row<T::kRows>(i), j0", "lane.template row<T::kRows>(0), j0"
    ),
    "dropout bits of a thread's first keys for all": philox(
        "lane.template column<T::kKeys>(j)", "lane.template column<T::kKeys>(0)", replace(DROPPED, seqlens=(128, 127))
    ),
    "dropout bits of the first tile's rows for all": philox("append<kGroup>(bits, i0 + ", "append<kGroup>(bits, "),
    "dropout bits of the first tile's keys for all": philox("j0 + lane.template", "lane.template"),
}

SHARED_AND_FORWARD = (SCORES, SOFTCAP, UNSEEN, SEQUENCES, COPIES, PRODUCTS, FORWARD, DROPOUT)
