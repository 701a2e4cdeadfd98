// out = softmax(scale * q k^T + bias) v and lse (Vaswani et al. 2017, eq. 1; Dao 2023, Algorithm 1).
//
// A block computes kBlockM rows of one (batch, head) and walks over the key tiles that the band and the lengths leave.
//   shared memory: q^T, all of it or a slice; k^T, then v. The weights pass through it on their way to the second
//   product. registers: the tile's scores, the rows of out, their running maxima and sums.
// grid: (query tiles, nheads, batch): blocks that read the same keys run at about the same time and find them in L2
#pragma once

#include "mask.cuh"
#include "philox.cuh"
#include "softmax.cuh"

namespace fastattn {

template <class E, class T>
__device__ __forceinline__ void store_out(const AttentionParams& p, const Sequence& s, int h, int i0,
                                          const OnlineSoftmax<T>& softmax, const float (&out)[T::kRows][T::kDims],
                                          const Lane<T>& lane) {
    TileRows<E> rows = tile_rows<E>(p.out, s.b, h, s.first_q, s.seqlen_q, p.head_dim_v);
    rows.advance(i0);
    float* lse = per_row(p.lse, s, h) + i0;
    float sum[T::kRows];
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) sum[i] = softmax.total(i);
    for_each_row<T::kRows>(rows, lane, [&](int i, E* row) {
        const float inverse = sum[i] == 0.0f ? 0.0f : __fdividef(p.dropout_rescale, sum[i]);
        // -inf where no key is allowed
        if (lane.x == 0) lse[lane.template row<T::kRows>(i)] = (softmax.max[i] + __log2f(sum[i])) * kLn2;
#pragma unroll
        for (int d = 0; d < T::kDims; d += 4)
            rows.store(row, lane.template column<T::kDims>(d),
                       make_float4(out[i][d] * inverse, out[i][d + 1] * inverse, out[i][d + 2] * inverse,
                                   out[i][d + 3] * inverse));
    });
}

// Rows i0 ... of batch b and head h.
template <class E, class T>
__device__ __forceinline__ void attend(const AttentionParams& p, int b, int h, int i0) {
    using Smem = ForwardSmem<T>;
    extern __shared__ __align__(16) unsigned char smem[];
    float* left = reinterpret_cast<float*>(smem);
    float* right = left + Smem::kLeft;
    float* weights = T::kOneSlice ? right + Smem::kValues : left;

    const int h_k = key_head(p, h);
    const Sequence s(p, b);
    if (p.cu_seqlens_q != nullptr) {
        const Orphans tokens = orphans(p.cu_seqlens_q, b, p.batch, s.first_q, s.seqlen_q, p.total_q);
        clear_rows<E>(p.out, h, tokens, p.head_dim_v);
        for (index_t token = tokens.begin + blockIdx.x; token < tokens.end; token += gridDim.x)
            if (threadIdx.x == 0) p.lse.data[h * p.lse.head + token] = -INFINITY;
    }
    if (i0 >= s.seqlen_q) return;

    const Lane<T> lane;
    const Dropout dropout(p, s.b, h);
    const Range keys = key_range<T>(p, s, i0);
    TileRows<E> q = tile_rows<E>(p.q, b, h, s.first_q, s.seqlen_q, p.head_dim);
    TileRows<E> k = tile_rows<E>(p.k, b, h_k, s.first_k, s.seqlen_k, p.head_dim);
    TileRows<E> v = tile_rows<E>(p.v, b, h_k, s.first_k, s.seqlen_k, p.head_dim_v);
    q.advance(i0);
    if (keys.begin > 0) k.advance(keys.begin), v.advance(keys.begin);
    OnlineSoftmax<T> softmax;
    float out[T::kRows][T::kDims];
    clear(out);
#pragma unroll 1
    for (int j0 = keys.begin; j0 < keys.end; j0 += T::kBlockN) {
        float scores[T::kRows][T::kKeys];
        multiply_rows(scores, q, k, left, right, lane, T::kOneSlice && j0 > keys.begin);
        finish_scores<E>(scores, p, s, h, i0, j0, lane);
        softmax.update(scores, out);
        if (dropout.is_on) {
            const unsigned kept = dropout.keep_scores(i0, j0, lane);
            for_each_score<T>(lane, i0, j0, [&](int i, int j, int, int) {
                if (!(kept >> (i * T::kKeys + j) & 1)) scores[i][j] = 0.0f;
            });
        }
        add_weighted<Smem::kValueSlice>(out, scores, v, weights, right, lane);
        k.advance(T::kBlockN);
        v.advance(T::kBlockN);
    }
    store_out<E>(p, s, h, i0, softmax, out, lane);
}

template <class E, class T>
__device__ __forceinline__ void attention_fwd(const AttentionParams& p) {
    for_each_batch(p, [&](int b) { attend<E, T>(p, b, blockIdx.y, blockIdx.x * T::kBlockM); });
}

}  // namespace fastattn
