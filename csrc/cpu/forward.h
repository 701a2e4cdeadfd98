// Attention of some queries of one head. Rows are copied into scratch memory first, whatever their type and strides, k
// transposed: every product is then a plain one.
#pragma once

#include "dropout.h"
#include "softcap.h"
#include "softmax.h"

namespace fastattn {
namespace {

constexpr int kChunk = 5 * kBlockM;  // queries of a task, that share the copies of k and v

long words_scratch(const AttentionParams& p) { return p.seed == nullptr ? 0 : kBlockM * kBlockN + kWordsBeyond; }

unsigned* take_words(const AttentionParams& p, Scratch& scratch) {
    const long count = words_scratch(p);
    return count == 0 ? nullptr : reinterpret_cast<unsigned*>(scratch.take(count));
}

long forward_scratch(const AttentionParams& p) {
    const long d = padded(p.head_dim), dv = padded(p.head_dim_v), n = staggered(kBlockN);
    return kChunk * (d + dv + 2) + n * (d + dv) + kBlockM * n + words_scratch(p) + 9 * 16;
}

// Writes the rows of out and lse, whose weights are summed up.
template <class E>
void store_results(const AttentionParams& p, const Sequence& s, int h, int i0, int rows, const float* out, int out_row,
                   const Running& running) {
    E* to = rows_of<E>(p.out, s.b, h, s.first_q + i0);
    float* lse = p.lse.data + row_index(p.lse, s, h) + i0;
    for (int i = 0; i < rows; ++i, to += p.out.row, out += out_row) {
        if (running.sum[i] == 0.0f) {  // no key: out was not written, or is 0 / 0
            lse[i] = -kInfinity;
            for (int d = 0; d < p.head_dim_v; d += kLanes) store_some(to + d, Floats{}, p.head_dim_v - d);
        } else {
            lse[i] = (running.largest[i] + __builtin_log2f(running.sum[i])) * kLn2;
            store_rows(to, 0, out, 0, 1, p.head_dim_v, p.dropout_rescale / running.sum[i], false);
        }
    }
}

template <class E>
Ahead rows_ahead(const AttentionParams& p, const Sequence& s, int h) {
    Ahead ahead;
    if (s.seqlen_q > kChunk || s.seqlen_k > kBlockN) return ahead;
    const Following next(p, s.b, h, 1);
    ahead.add<E>(p.out, s.b, h, s.first_q, s.seqlen_q, p.head_dim_v);
    ahead.add<E>(p.k, next.s.b, next.h_k, next.s.first_k, next.s.seqlen_k, p.head_dim);
    ahead.add<E>(p.v, next.s.b, next.h_k, next.s.first_k, next.s.seqlen_k, p.head_dim_v);
    ahead.add<E>(p.q, next.s.b, next.h, next.s.first_q, next.s.seqlen_q, p.head_dim);
    return ahead;
}

// Queries i_begin ... i_end - 1 of head h, at most kChunk.
template <class E>
void attend(const AttentionParams& p, int b, int h, int i_begin, int i_end, float* memory) {
    const Sequence s(p, b);
    i_end = min(i_end, s.seqlen_q);
    if (i_begin >= i_end) return;
    const int h_k = key_head(p, h), rows = i_end - i_begin, d = padded(p.head_dim), dv = padded(p.head_dim_v);
    Scratch scratch{memory};
    float *q = scratch.take(kChunk * d), *out = scratch.take(kChunk * dv);
    const Running running{scratch.take(kChunk), scratch.take(kChunk)};
    float *k = scratch.take(staggered(kBlockN) * d), *v = scratch.take(kBlockN * dv);
    float* scores = scratch.take(kBlockM * staggered(kBlockN));
    const Dropout dropout{take_words(p, scratch), p.dropout_threshold, p.dropout_rescale};

    Ahead ahead = rows_ahead<E>(p, s, h);
    copy_rows(q, d, rows_of<E>(p.q, b, h, s.first_q + i_begin), p.q.row, rows, p.head_dim, p.scale * kLog2E);
    for (int i = 0; i < rows; ++i) running.sum[i] = 0.0f;
    bool has_keys[kChunk / kBlockM] = {};
    const Keys keys(p, s, h);
    const Block whole(p, s, i_begin, rows, 0, keys.end, 0);
    const int first = max(keys.begin, whole.begin(0) / 4 * 4), last = whole.end(rows - 1);
    for (int j0 = first; j0 < last; j0 += kBlockN) {
        const int count = min(kBlockN, last - j0), row = padded(count), k_row = staggered(count);
        copy_transposed(k, k_row, rows_of<E>(p.k, b, h_k, s.first_k + j0), p.k.row, count, p.head_dim);
        copy_rows(v, dv, rows_of<E>(p.v, b, h_k, s.first_k + j0), p.v.row, count, p.head_dim_v, 1.0f);
        clear_unseen_rows(v, dv, dv, keys, j0, count);
        for (int i = 0; i < rows; i += kBlockM) {
            const Block block(p, s, i_begin + i, min(kBlockM, rows - i), j0, count, row);
            if (block.is_empty()) continue;
            const bool is_first = !has_keys[i / kBlockM];
            has_keys[i / kBlockM] = true;
            multiply_scores(block.rows, count, p.head_dim, {q + i * d, d, 1}, k, k_row, scores, row, block.band);
            if (p.softcap != 0.0f) cap_scores(scores, nullptr, block, softcap_of(p));
            if (p.bias.data != nullptr || !keys.all) add_bias_and_mask(scores, p, s, h, block, !keys.all);
            if (dropout.words != nullptr) random_words(dropout.words, *p.seed, b, h, block.i0, block.rows, j0, row);
            softmax(scores, block, dropout, {running.largest + i, running.sum + i}, out + i * dv, dv, is_first, ahead);
            multiply_weights(block.rows, p.head_dim_v, count, {scores, row, 1}, v, dv, out + i * dv, dv, block.band,
                             !is_first);
        }
    }
    store_results<E>(p, s, h, i_begin, rows, out, dv, running);
}

}  // namespace
}  // namespace fastattn
