// The gradients of one key head: blocks of keys, and for each the blocks of queries that share it. Scores are computed
// again from lse.
#pragma once

#include "forward.h"
#include "kernels.h"

namespace fastattn {
namespace {

using Part = CpuKernels::Part;

long backward_scratch(const AttentionParams& p) {
    const long d = padded(p.head_dim), dv = padded(p.head_dim_v), n = staggered(kBlockN);
    return 2 * n * (d + dv) + kBlockN * d + kBlockM * (2 * d + dv) + 3 * kBlockM * n + 2 * kBlockM + words_scratch(p) +
           15 * 16;
}

template <class E>
class Backward {
  public:
    Backward(const AttentionParams& p, int b, const Part& part, float* memory)
        : p(p),
          s(p, b),
          part(part),
          h_k(key_head(p, part.h_begin)),
          d(padded(p.head_dim)),
          dv(padded(p.head_dim_v)),
          i_end(min(part.i_end, s.seqlen_q)),
          j_end(min(part.j_end, s.seqlen_k)) {
        Scratch scratch{memory};
        const int n = staggered(kBlockN);
        k = scratch.take(n * d), v = scratch.take(n * dv), k_rows = scratch.take(kBlockN * d);
        dk_sum = scratch.take(n * d), dv_sum = scratch.take(n * dv), dq = scratch.take(kBlockM * d);
        q = scratch.take(kBlockM * d), dout = scratch.take(kBlockM * dv);
        weights = scratch.take(kBlockM * n), dweights = scratch.take(kBlockM * n), slopes = scratch.take(kBlockM * n);
        lse = scratch.take(kBlockM), delta = scratch.take(kBlockM);
        dropout = {take_words(p, scratch), p.dropout_threshold, p.dropout_rescale};
        if (s.seqlen_q <= kChunk && s.seqlen_k <= kBlockN) look_ahead();
    }

    void run() {
        for (int j0 = part.j_begin; j0 < j_end; j0 += kBlockN) block_of_keys(j0, min(kBlockN, j_end - j0));
        if (part.has_dq && part.j_begin >= j_end) clear_dq();
        if (part.has_dq && p.dq_sum.data != nullptr) round_dq();
    }

  private:
    const AttentionParams& p;
    const Sequence s;
    const Part part;
    const int h_k, d, dv, i_end, j_end;
    float *k, *v;                        // transposed
    float *k_rows, *dk_sum, *dv_sum;     // of a block of keys
    float *q, *dout, *dq, *lse, *delta;  // of a block of queries
    float *weights, *dweights, *slopes;
    Dropout dropout;
    Ahead ahead;

    void look_ahead() {
        const Following next(p, s.b, part.h_begin, part.h_end - part.h_begin);
        const int rows = min(next.s.seqlen_q, kChunk), keys = min(next.s.seqlen_k, kBlockN);
        ahead.add<E>(p.dq, s.b, part.h_begin, s.first_q, s.seqlen_q, p.head_dim);
        ahead.add<E>(p.dk, s.b, h_k, s.first_k, s.seqlen_k, p.head_dim);
        ahead.add<E>(p.dv, s.b, h_k, s.first_k, s.seqlen_k, p.head_dim_v);
        ahead.add<E>(p.k, next.s.b, next.h_k, next.s.first_k, keys, p.head_dim);
        ahead.add<E>(p.v, next.s.b, next.h_k, next.s.first_k, keys, p.head_dim_v);
        ahead.add<E>(p.q, next.s.b, next.h, next.s.first_q, rows, p.head_dim);
        ahead.add<E>(p.out, next.s.b, next.h, next.s.first_q, rows, p.head_dim_v);
        ahead.add<E>(p.dout, next.s.b, next.h, next.s.first_q, rows, p.head_dim_v);
    }

    // ---- keys

    void block_of_keys(int j0, int count) {
        bool are_seen = false;  // by some query
        for (int h = part.h_begin; h < part.h_end; ++h) {
            const Keys keys(p, s, h);
            if (h == part.h_begin || p.mask.head != 0) copy_keys(keys, j0, count);
            const int used = max(0, min(count, keys.end - j0));
            for (int i0 = part.i_begin; i0 < i_end; i0 += kBlockM) {
                const Block block(p, s, i0, min(kBlockM, i_end - i0), j0, used, padded(count));
                if (!block.is_empty()) {
                    compute_scores(block, h, keys, staggered(count));
                    if (part.has_dkv) add_to_dkv(block, count, !are_seen);
                    are_seen = true;
                    if (part.has_dq) add_to_dq(block, h);
                } else if (part.has_dq && j0 == part.j_begin) {
                    fill_zero(dq, block.rows * d);
                    store_dq(block, h);
                }
            }
        }
        if (!part.has_dkv) return;
        if (!are_seen) clear_dkv(count);
        const index_t token = s.first_k + j0;
        store_rows(rows_of<E>(p.dk, s.b, h_k, token), p.dk.row, dk_sum, d, count, p.head_dim, kLn2, false);
        store_rows(rows_of<E>(p.dv, s.b, h_k, token), p.dv.row, dv_sum, dv, count, p.head_dim_v, 1.0f, false);
    }

    void copy_keys(const Keys& keys, int j0, int count) {
        const int row = staggered(count);
        const E* from_k = rows_of<E>(p.k, s.b, h_k, s.first_k + j0);
        const E* from_v = rows_of<E>(p.v, s.b, h_k, s.first_k + j0);
        copy_transposed(k, row, from_k, p.k.row, count, p.head_dim);
        copy_transposed(v, row, from_v, p.v.row, count, p.head_dim_v);
        clear_unseen_columns(k, row, p.head_dim, keys, j0, count);
        clear_unseen_columns(v, row, p.head_dim_v, keys, j0, count);
        if (!part.has_dq) return;
        copy_rows(k_rows, d, from_k, p.k.row, count, p.head_dim, 1.0f);
        clear_unseen_rows(k_rows, d, d, keys, j0, count);
    }

    void clear_dkv(int count) {
        fill_zero(dk_sum, static_cast<long>(count) * d);
        fill_zero(dv_sum, static_cast<long>(count) * dv);
    }

    void add_to_dkv(const Block& block, int count, bool is_first) {
        if (is_first) clear_dkv(count);
        const Band band = block.transposed();
        multiply_weights(block.keys, p.head_dim_v, block.rows, {weights, 1, block.row}, dout, dv, dv_sum, dv, band,
                         true);
        multiply_weights(block.keys, p.head_dim, block.rows, {dweights, 1, block.row}, q, d, dk_sum, d, band, true);
    }

    // ---- queries

    // weights and dweights, of which those are the gradients of the scores.
    void compute_scores(const Block& block, int h, const Keys& keys, int k_row) {
        copy_queries(block, h);
        multiply_scores(block.rows, block.keys, p.head_dim, {q, d, 1}, k, k_row, weights, block.row, block.band);
        multiply_scores(block.rows, block.keys, p.head_dim_v, {dout, dv, 1}, v, k_row, dweights, block.row, block.band);
        if (p.softcap != 0.0f) cap_scores(weights, slopes, block, softcap_of(p));
        const bool has_mask = !keys.all || keys.begin > 0;
        if (p.bias.data != nullptr || has_mask) add_bias_and_mask(weights, p, s, h, block, has_mask);
        if (dropout.words != nullptr)
            random_words(dropout.words, *p.seed, s.b, h, block.i0, block.rows, block.j0, block.row);
        softmax_gradient(weights, dweights, block, dropout, lse, delta, ahead);
        if (p.dbias.partial != nullptr) add_to_dbias(block, h);
        if (p.softcap != 0.0f) multiply_slopes(dweights, slopes, block);
    }

    void copy_queries(const Block& block, int h) {
        const index_t token = s.first_q + block.i0, first = row_index(p.lse, s, h) + block.i0;
        copy_rows(q, d, rows_of<E>(p.q, s.b, h, token), p.q.row, block.rows, p.head_dim, p.scale * kLog2E);
        copy_rows(dout, dv, rows_of<E>(p.dout, s.b, h, token), p.dout.row, block.rows, p.head_dim_v, 1.0f);
        const E* out = rows_of<E>(p.out, s.b, h, token);
        for (int i = 0; i < block.rows; ++i, out += p.out.row) {
            ahead.fetch_row(0, 4);
            Floats products{};
            for (int x = 0; x < p.head_dim_v; x += kLanes)
                products += load_some(out + x, p.head_dim_v - x) * load(dout + i * dv + x);
            delta[i] = sum(products)[0] - (p.dlse.data == nullptr ? 0.0f : p.dlse.data[first + i]);
            const float of_row = p.lse.data[first + i];
            lse[i] = of_row == -kInfinity ? kInfinity : of_row * kLog2E;
        }
    }

    // ---- dQ: summed up over blocks of keys where it belongs, if that holds floats, else in dq_sum

    float* dq_sum(int h, int i) const { return p.dq_sum.data + (row_index(p.dq_sum, s, h) + i) * p.head_dim; }

    void add_to_dq(const Block& block, int h) {
        multiply_weights(block.rows, p.head_dim, block.keys, {dweights, block.row, 1}, k_rows, d, dq, d, block.band,
                         false);
        store_dq(block, h);
    }

    void store_dq(const Block& block, int h) const {
        const bool adds = block.j0 > part.j_begin;
        if (p.dq_sum.data != nullptr)
            store_rows(dq_sum(h, block.i0), p.head_dim, dq, d, block.rows, p.head_dim, p.scale, adds);
        else
            store_rows(rows_of<E>(p.dq, s.b, h, s.first_q + block.i0), p.dq.row, dq, d, block.rows, p.head_dim, p.scale,
                       adds);
    }

    void round_dq() const {
        for (int h = part.h_begin; h < part.h_end; ++h)
            for (int i = part.i_begin; i < i_end; ++i) {
                E* to = rows_of<E>(p.dq, s.b, h, s.first_q + i);
                for (int x = 0; x < p.head_dim; x += kLanes)
                    store_some(to + x, load_some(dq_sum(h, i) + x, p.head_dim - x), p.head_dim - x);
            }
    }

    // Of a sequence without keys.
    void clear_dq() {
        fill_zero(dq, kBlockM * d);
        for (int h = part.h_begin; h < part.h_end; ++h)
            for (int i0 = part.i_begin; i0 < i_end; i0 += kBlockM)
                store_dq(Block(p, s, i0, min(kBlockM, i_end - i0), part.j_begin, 0, 0), h);
    }

    // ---- the gradient of the bias

    // Into the partial sum that this sequence belongs to.
    void add_to_dbias(const Block& block, int h) const {
        const BiasGrad& to = p.dbias;
        const index_t copy = to.batch == 1 ? s.b % to.copies : 0, b = to.batch == 1 ? 0 : s.b;
        const index_t head = (copy * to.batch + b) * to.heads + (to.heads == 1 ? 0 : h);
        const float* from = dweights;
        for (int i = 0; i < block.rows; ++i, from += block.row) {
            float* row = to.partial + (head * to.rows + (to.rows == 1 ? 0 : block.i0 + i)) * to.keys;
            const int begin = block.begin(i), end = block.end(i);
            if (to.keys > 1) {
                for (int j = begin; j < end; ++j) row[block.j0 + j] += from[j];
            } else {
                for (int j = begin; j < end; ++j) *row += from[j];
            }
        }
    }
};

template <class E>
void attend_backward(const AttentionParams& p, int b, const Part& part, float* memory) {
    Backward<E>(p, b, part, memory).run();
}

}  // namespace
}  // namespace fastattn
