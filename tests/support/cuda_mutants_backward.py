"""Sabotage of the backward kernels: what is changed in their files, and the case that must notice."""

from __future__ import annotations

from dataclasses import replace

from tests.support.cuda_mutants import (
    BIASED,
    CAPPED,
    CAPPED_BIASED,
    CAUSAL,
    DROPPED,
    EMPTY_ROWS,
    GROUPED,
    HALF,
    PADDED,
    PER_HEAD,
    PER_KEY,
    PLAIN,
    SHORT,
    SHORT_BIASED,
    SHORT_DROPPED,
    SHORT_EMPTY,
    STRADDLING,
    WINDOW,
    backward,
    bias_gradient,
    softcap,
    split,
)

DELTA = {
    "delta ignored": backward("(dscores[i][j] - delta[i])", "dscores[i][j]"),
    "delta of the first of four rows for all": backward("queries.out.row(row + n * step)", "queries.out.row(row)"),
    "delta without the last lanes": backward("bit = kLanes / 2;", "bit = kLanes / 4;"),
    "delta past the end written": backward(
        "d0 > 0 || row + n * kStep >= count", "d0 > 0", replace(PLAIN, heads=(2, 2)), "race"
    ),
    "delta past the tile's end written": split("min(T::kBlockM, queries.q.rows)", "T::kBlockM", PLAIN, "out-of-bounds"),
    "delta of wide rows without the later dimensions": replace(
        backward("d += 4 * kLanes", "d += 1024", replace(PLAIN, dims=(40, 200))), head_dim=256
    ),
    "delta of a row past the end read": backward(
        "x[i] = row < rows ? from[row] : 0.0f;", "x[i] = from[row];", PLAIN, "out-of-bounds"
    ),
    "gradient of lse ignored": backward("sum[n] - (p.dlse.data", "sum[n] - (true || p.dlse.data"),
    "gradient of lse ignored by short rows": backward(" - dlse[i];", ";", SHORT),
    "delta of short rows without half their keys": backward("sum = row_sum<T>(sum), ", "", SHORT),
    "delta of short rows not divided": backward("__fdividef(sum, total)", "sum + total", SHORT),
    "delta of a short row without keys is NaN": backward("total == 0.0f ? 0.0f : ", "", SHORT_EMPTY),
    "delta of long rows from one tile": backward(" || s.seqlen_k > T::kBlockN", ""),
    "delta of short rows without the factor of dropout": backward(
        "delta_of_rows(delta, weights, dscores, p, queries, lane);",
        "{ delta_of_rows(delta, weights, dscores, p, queries, lane); for (float& x : delta) x /= p.dropout_rescale; }",
        SHORT_DROPPED,
    ),
    "delta of short rows divided by what is kept": backward(
        "total += weights[i][j];", "total += dweights[i][j] == 0.0f ? 0.0f : weights[i][j];", SHORT_DROPPED
    ),
    "delta of short rows not kept for the bias": backward(
        "p.delta.data[queries.first + row] = delta[i];", ";", SHORT_BIASED
    ),
    "delta of the first short row kept for all": backward(
        "p.delta.data[queries.first + row] =", "p.delta.data[queries.first] =", SHORT_BIASED
    ),
    "delta of short rows past the end written": backward(
        "lane.x == 0 && row < queries.q.rows", "lane.x == 0", replace(SHORT_BIASED, heads=(2, 2)), "race"
    ),
    "delta of short rows written by all lanes": backward("lane.x == 0 && row <", "row <", SHORT_BIASED, "race"),
    "delta of short rows without keys not cleared": replace(
        backward("if (!has_delta && threadIdx.x", "if (false && threadIdx.x", STRADDLING), head_dim=64
    ),
    "delta of short rows neither written nor kept": backward("if (has_delta) write_delta", "if (false) write_delta"),
}

BACKWARD = {
    "lse not in units of ln 2": backward("lse[i] * kLog2E", "lse[i]"),
    "a row without keys in the backward": backward("lse[i] == -INFINITY ? INFINITY : ", "", EMPTY_ROWS),
    "scale of dq ignored": backward("fmaf(p.scale, sums[i][d], x.x)", "sums[i][d] + x.x"),
    "scale of dk ignored": backward("to_dk, dk, p.scale, lane", "to_dk, dk, 1.0f, lane"),
    "dropout not rescaled in dP": backward("p.dropout_rescale * dscores[i][j]", "dscores[i][j]", DROPPED),
    "dropout missing in dP": backward("kept(i, j) ? p.drop", "true ? p.drop", DROPPED),
    "dropout missing in dv": backward("if (!kept(i, j)) weights[i][j] = 0.0f;", "", DROPPED),
    "dropout not rescaled in dv": backward("to_dv, dv, p.dropout_rescale, lane", "to_dv, dv, 1.0f, lane", DROPPED),
    "dropout bits in another order in the backward": backward("kept(i, j)", "kept(j, i)", DROPPED),
    "dk and dv of the first head of a group": backward(
        "h < (h_k + 1) * group; ++h) {\n            Queries",
        "h < h_k * group + 1; ++h) {\n            Queries",
        GROUPED,
    ),
    "every query head has its own keys": backward(
        "group = p.nheads == p.nheads_k ? 1 : p.nheads / p.nheads_k", "group = 1", GROUPED
    ),
    "queries of the first tile for all in the backward": backward("                queries.advance(T::kBlockM);\n", ""),
    "queries before the first tile's": backward(
        "Queries<E> queries(p, s, h, range.begin);", "Queries<E> queries(p, s, h, 0);", CAUSAL
    ),
    "dq of the first tile for all": backward("                dq_sum.advance(T::kBlockM);\n", ""),
    "dq before the first tile's": backward("dq_sum.advance(range.begin);", "", CAUSAL),
    "dq begins anew at every key tile": backward("float4 x = is_first ?", "float4 x = true ?"),
    "dq never begins": backward("float4 x = is_first ?", "float4 x = false ?"),
    "dq not kept between key tiles": backward(
        "            if (sizeof(E) == sizeof(float) || !is_last)\n", "            if (is_last)\n", HALF
    ),
    "dq of a group in one place": backward("h * p.dq_sum.head + ", "", replace(HALF, heads=(2, 1))),
    "dq never rounded": backward("|| !is_last) return;", "|| true) return;", HALF),
    "dq of every tile rounded into the first": backward(
        "dq.advance(i0);\n    store_rows(dq, sums, 1.0f", "store_rows(dq, sums, 1.0f", HALF
    ),
    "dq not cleared where no key is": backward(
        "store_rows(dq, zeros, 1.0f, lane);", "", replace(WINDOW, seqlens=(129, 20))
    ),
    "keys of the first tile for all in the backward": backward("k.advance(step), v.advance(step);", "v.advance(step);"),
    "values of the first tile for all in the backward": backward(
        "k.advance(step), v.advance(step);", "k.advance(step);"
    ),
    "dk of every tile into the first": backward("to_dk.advance(j0), to_dv", "to_dv"),
    "dv of every tile into the first": backward("to_dk.advance(j0), to_dv.advance(j0);", "to_dk.advance(j0);"),
}

ONE_PIECE_SLOPES = "multiply_slopes<T>(dscores, left, p);\n                add_weighted_transposed"
SLOPES = {
    "slopes of softcap ignored in dq and dk": backward(ONE_PIECE_SLOPES, "add_weighted_transposed", CAPPED),
    "slopes of softcap ignored in the split's dk": split(ONE_PIECE_SLOPES, "add_weighted_transposed", CAPPED),
    "slopes of softcap ignored in the split's dq": split(
        "multiply_slopes<T>(dscores, left, p);\n        const auto seen", "const auto seen", CAPPED
    ),
    "slopes of softcap in the bias gradient": bias_gradient(
        "nullptr, p, s, Queries<E>(p, s, h, i0), k, v, h, i0, j0, true, left, right,\n                       lane);",
        "left, p, s, Queries<E>(p, s, h, i0), k, v, h, i0, j0, true, left, right, lane);"
        " multiply_slopes<T>(dscores, left, p);",
        CAPPED_BIASED,
    ),
    "slopes of softcap not of its square": softcap("fmaf(-y, y, 1.0f)", "1.0f - fabsf(y)"),
    "the slope of a thread's first key for all": softcap("(i * T::kKeys + j)", "(i * T::kKeys)"),
    "slopes of another thread": softcap("        slopes += opaque(threadIdx.x);\n    }", "    }", CAPPED, "race"),
    "slopes of unseen keys": softcap("if (dscores[i][j] != 0.0f) dscores", "dscores", replace(PADDED, softcap=3.0)),
}

SPLIT = {
    "scale of dq ignored in the split": split(
        "store_rows(dq, sums, p.scale, lane)", "store_rows(dq, sums, 1.0f, lane)"
    ),
    "a key tile of dq lost in the split": split(
        "int j0 = keys.begin; j0 < keys.end", "int j0 = keys.begin + 32; j0 < keys.end"
    ),
    "keys before the first tile's in the split": split("k.advance(keys.begin), v.advance(keys.begin);", "", WINDOW),
    "keys of the first tile for all in the split": split(
        "k.advance(T::kBlockN), v.advance(T::kBlockN);", "v.advance(T::kBlockN);"
    ),
    "every block has the first keys": split("first_j0 = blockIdx.x * T::kBlockN", "first_j0 = 0"),
    "dq of every tile into the first in the split": split(
        "dq.advance(i0);\n    store_rows(dq, sums, p.scale", "store_rows(dq, sums, p.scale"
    ),
    "delta taken from one tile in the split": split(
        "h, i0, j0, true, left, right, lane);\n        multiply",
        "h, i0, j0, false, left, right, lane);\n        multiply",
    ),
}

BIAS_GRADIENT = {
    "the first copy of the bias gradient lost": bias_gradient(
        "int copy = 0; copy < dbias", "int copy = 1; copy < dbias", BIASED
    ),
    "bias gradient of one key tile for all": bias_gradient("+ n % all.keys * T::kBlockN", "", PER_HEAD),
    "bias gradient of one query tile for all": bias_gradient("+ n / all.keys % all.rows * T::kBlockM", "", PER_KEY),
    "bias gradient of one head for all": bias_gradient("own_h + outer % all.heads", "own_h", PER_KEY),
    "bias gradient of one sequence for all": bias_gradient("own_b + outer / all.heads", "own_b", PER_HEAD),
    "bias gradient of another head's keys": bias_gradient(
        "const int h_k = key_head(p, h);\n        TileRows",
        "const int h_k = 0;\n        TileRows",
        replace(BIASED, heads=(4, 2)),
    ),
    "bias gradient of the first keys for all": bias_gradient("k.advance(j0), v.advance(j0);", "", BIASED),
    "bias gradient with a tile's own delta": bias_gradient(
        "h, i0, j0, true, left, right,\n",
        "h, i0, j0, false, left, right,\n",
        BIASED,
    ),
    "every copy of the bias gradient has all": bias_gradient("n = blockIdx.y; n <", "n = 0; n <", PER_HEAD),
    "every copy of the bias gradient goes on to all": bias_gradient("n += gridDim.y", "n += 1", PER_HEAD),
    "bias gradient not summed over keys": bias_gradient(
        "if (keys_broadcast && threadIdx", "if (false && threadIdx", PER_HEAD
    ),
    "bias gradient not summed over rows": bias_gradient(
        "if (rows_broadcast && threadIdx", "if (false && threadIdx", PER_KEY
    ),
    "bias gradient written past a row's end": bias_gradient(
        "if (own_i0 + row < dbias.rows && own_j0 + key < dbias.keys)", "if (own_i0 + row < dbias.rows)", BIASED, "race"
    ),
    "bias gradient written past the last row": bias_gradient(
        "if (own_i0 + row < dbias.rows && own_j0 + key < dbias.keys)", "if (own_j0 + key < dbias.keys)", BIASED, "race"
    ),
}

BACKWARD_ALONE = (DELTA, BACKWARD, SLOPES, SPLIT, BIAS_GRADIENT)
