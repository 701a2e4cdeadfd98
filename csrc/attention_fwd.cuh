// out = softmax(scale * q k^T + bias) v and lse (Vaswani et al. 2017, eq. 1; Dao 2023, Algorithm 1).
//
// A block computes kBlockM rows of one (batch, head) and walks over the key tiles that the band and the lengths leave.
//   shared memory: q^T, all of it or a slice; k^T, then v. The weights pass through it on their way to the second
//   product. registers: the tile's scores, the rows of out, their running maxima and sums.
// grid: (batch * nheads, query tiles)
#pragma once

#include "mask.cuh"
#include "philox.cuh"
#include "softmax.cuh"

namespace fastattn {

template <class T>
__device__ __forceinline__ void drop(float (&weights)[T::kRows][T::kKeys], const Dropout& dropout, int i0, int j0,
                                     const Lane<T>& lane) {
    constexpr int kGroup = kGroupOf<T::kKeys>;
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
#pragma unroll
        for (int j = 0; j < T::kKeys; j += kGroup) {
            float factor[kGroup];
            dropout.factors(factor, i0 + lane.template row<T::kRows>(i), j0 + lane.template column<T::kKeys>(j));
#pragma unroll
            for (int e = 0; e < kGroup; ++e) weights[i][j + e] *= factor[e];
        }
}

template <class E, class T>
__device__ __forceinline__ void store_out(const AttentionParams& p, const Sequence& s, int h, int i0,
                                          const OnlineSoftmax<T>& softmax, const float (&out)[T::kRows][T::kDims],
                                          const Lane<T>& lane) {
    const TileRows<E> rows = tile_rows<E>(p.out, s.b, h, s.first_q, i0, s.seqlen_q, p.head_dim_v);
    float* lse = per_row(p.lse, s, h) + i0;
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
        const int row = lane.template row<T::kRows>(i);
        const float sum = softmax.total(i), inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        if (lane.x == 0 && row < rows.rows) lse[row] = softmax.max[i] + logf(sum);  // -inf where no key is allowed
#pragma unroll
        for (int d = 0; d < T::kDims; d += 4)
            rows.store(row, lane.template column<T::kDims>(d),
                       make_float4(out[i][d] * inverse, out[i][d + 1] * inverse, out[i][d + 2] * inverse,
                                   out[i][d + 3] * inverse));
    }
}

template <class E, class T>
__device__ __forceinline__ void attention_fwd(const AttentionParams& p) {
    using Smem = ForwardSmem<T>;
    extern __shared__ __align__(16) unsigned char smem[];
    float* left = reinterpret_cast<float*>(smem);
    float* right = left + Smem::kLeft;
    float* weights = T::kOneSlice ? right + Smem::kValues : left;

    const int h = blockIdx.x % p.nheads, h_k = h / (p.nheads / p.nheads_k), i0 = blockIdx.y * T::kBlockM;
    const Sequence s(p, blockIdx.x / p.nheads);

    const Orphans tokens = orphans(p.cu_seqlens_q, s.b, p.batch, s.first_q, s.seqlen_q, p.total_q);
    clear_rows<E>(p.out, h, tokens, p.head_dim_v);
    for (index_t token = tokens.begin + blockIdx.y; token < tokens.end; token += gridDim.y)
        if (threadIdx.x == 0) p.lse.data[h * p.lse.head + token] = -INFINITY;
    if (i0 >= s.seqlen_q) return;

    const Lane<T> lane;
    const Dropout dropout(p, s.b, h);
    const TileRows<E> q = tile_rows<E>(p.q, s.b, h, s.first_q, i0, s.seqlen_q, p.head_dim);
    const Range keys = key_range<T>(p, s, i0);
    OnlineSoftmax<T> softmax;
    float out[T::kRows][T::kDims];
    clear(out);
#pragma unroll 1
    for (int j0 = keys.begin; j0 < keys.end; j0 += T::kBlockN) {
        const TileRows<E> k = tile_rows<E>(p.k, s.b, h_k, s.first_k, j0, s.seqlen_k, p.head_dim);
        const TileRows<E> v = tile_rows<E>(p.v, s.b, h_k, s.first_k, j0, s.seqlen_k, p.head_dim_v);
        float scores[T::kRows][T::kKeys];
        multiply_rows(scores, q, k, left, right, lane, T::kOneSlice && j0 > keys.begin);
        finish_scores<E>(scores, p, s, h, i0, j0, lane);
        softmax.update(scores, out);
        if (dropout.is_on) drop(scores, dropout, i0, j0, lane);
        add_weighted(out, scores, v, weights, right, lane);
    }
    store_out<E>(p, s, h, i0, softmax, out, lane);
}

}  // namespace fastattn
