// Attention of one to four queries, those of decoding: k and v are read where they lie, once, because nothing would pay
// for copies of them.
#pragma once

#include "forward.h"

namespace fastattn {
namespace {

constexpr int kFewQueries = 4;

// Scores of kLanes keys at a time, of all queries. Keys behind the last one are not read; theirs are anything.
template <class E>
void multiply_keys_in_place(int rows, int keys, int dims, const float* q, int q_row, const E* k, index_t k_row,
                            float* scores, int scores_row) {
    for (int j = 0; j < keys; j += kLanes)
        for (int i = 0; i < rows; ++i) {
            Floats products[kLanes];
#pragma GCC unroll 16
            for (int lane = 0; lane < kLanes; ++lane) {
                const E* row = k + min(j + lane, keys - 1) * k_row;
                products[lane] = load(q + i * q_row) * load_some(row, dims);
                for (int d = kLanes; d < dims; d += kLanes)
                    products[lane] += load(q + i * q_row + d) * load_some(row + d, dims - d);
            }
            store(scores + i * scores_row + j, sums(products));
        }
}

// out (+)= weights v, without the rows of v that no query sees.
template <int kRows, class E>
void multiply_values_in_place(const Keys& seen, const Block& block, int dims, const float* weights, const E* v,
                              index_t v_row, float* out, int out_row, bool adds) {
    constexpr int kVectors = 4;
    for (int d = 0; d < dims; d += kVectors * kLanes) {
        const int vectors = min(kVectors, padded(dims - d) / kLanes);
        Floats sums[kRows][kVectors] = {};
        for (int j = block.begin(0); j < block.keys; ++j) {
            if (!seen.sees(block.j0 + j)) continue;
            const E* row = v + j * v_row + d;
            for (int x = 0; x < vectors; ++x) {
                const Floats value = load_some(row + x * kLanes, dims - d - x * kLanes);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) sums[r][x] += weights[r * block.row + j] * value;
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int x = 0; x < vectors; ++x) {
                float* to = out + r * out_row + d + x * kLanes;
                store(to, adds ? load(to) + sums[r][x] : sums[r][x]);
            }
    }
}

// All queries of head h, at most kFewQueries.
template <class E>
void attend_few(const AttentionParams& p, int b, int h, float* memory) {
    const Sequence s(p, b);
    const int h_k = key_head(p, h), rows = s.seqlen_q, d = padded(p.head_dim), dv = padded(p.head_dim_v);
    if (rows == 0) return;
    Scratch scratch{memory};
    float *q = scratch.take(kFewQueries * d), *out = scratch.take(kFewQueries * dv);
    const Running running{scratch.take(kFewQueries), scratch.take(kFewQueries)};
    float* scores = scratch.take(kFewQueries * kBlockN);
    const Dropout dropout{take_words(p, scratch), p.dropout_threshold, p.dropout_rescale};
    Ahead nothing;

    copy_rows(q, d, rows_of<E>(p.q, b, h, s.first_q), p.q.row, rows, p.head_dim, p.scale * kLog2E);
    for (int i = 0; i < rows; ++i) running.sum[i] = 0.0f;
    const Keys keys(p, s, h);
    const Block whole(p, s, 0, rows, 0, keys.end, 0);
    const int first = max(keys.begin, whole.begin(0) / 4 * 4), last = whole.end(rows - 1);
    for (int j0 = first; j0 < last; j0 += kBlockN) {
        const int count = min(kBlockN, last - j0), row = padded(count);
        const Block block(p, s, 0, rows, j0, count, row);
        multiply_keys_in_place(rows, count, p.head_dim, q, d, rows_of<E>(p.k, b, h_k, s.first_k + j0), p.k.row, scores,
                               row);
        if (p.bias.data != nullptr || !keys.all) add_bias_and_mask(scores, p, s, h, block, !keys.all);
        if (dropout.words != nullptr) random_words(dropout.words, *p.seed, b, h, 0, rows, j0, row);
        softmax(scores, block, dropout, running, out, dv, j0 == first, nothing);
        const E* v = rows_of<E>(p.v, b, h_k, s.first_k + j0);
        const auto multiply = rows == 1   ? multiply_values_in_place<1, E>
                              : rows == 2 ? multiply_values_in_place<2, E>
                              : rows == 3 ? multiply_values_in_place<3, E>
                                          : multiply_values_in_place<4, E>;
        multiply(keys, block, p.head_dim_v, scores, v, p.v.row, out, dv, j0 > first);
    }
    store_results<E>(p, s, h, 0, rows, out, dv, running);
}

}  // namespace
}  // namespace fastattn
