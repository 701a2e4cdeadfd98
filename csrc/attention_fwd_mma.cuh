// attention_fwd.cuh by tensor cores. q stays in registers as long as that many are left, and the weights never leave
// them. k and v have a place each in shared memory: two barriers for each tile. Nothing is loaded before its turn: that
// would take registers, and other blocks of the multiprocessor work in the meantime.
#pragma once

#include "attention_fwd.cuh"
#include "mma_lines.cuh"

namespace fastattn {

// This warp's rows of q as left operand: in registers, or else in shared memory, whose lines nothing may overwrite.
template <class T, bool kInRegisters>
struct QueryOperand {
    using U = typename T::Unit;
    static constexpr int kSteps = T::kHeadDim / 16;
    unsigned fragments[kSteps][U::kRegisters];

    __device__ __forceinline__ QueryOperand(const unsigned char* lines, const Lane<T>& lane) {
        const auto own = own_rows<T::kHeadDim>(lines, lane);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) own(fragments[k], k);
    }
    __device__ __forceinline__ void operator()(unsigned (&a)[U::kRegisters], int k) const {
#pragma unroll
        for (int n = 0; n < U::kRegisters; ++n) a[n] = fragments[k][n];
    }
};
template <class T>
struct QueryOperand<T, false> {
    const unsigned char* lines;
    const Lane<T>& lane;

    __device__ __forceinline__ QueryOperand(const unsigned char* lines, const Lane<T>& lane)
        : lines(lines), lane(lane) {}
    __device__ __forceinline__ void operator()(unsigned (&a)[T::Unit::kRegisters], int k) const {
        own_rows<T::kHeadDim>(lines, lane)(a, k);
    }
};

// out and lse of rows i0 ... of batch b and head h.
template <class E, class T>
__device__ __forceinline__ void attend_mma(const AttentionParams& p, int b, int h, int i0) {
    using Smem = MmaForwardSmem<T>;
    using QueryCopy = LinesCopy<T, E, kQueries, T::kBlockM, T::kHeadDim>;
    using KeyCopy = LinesCopy<T, E, kKeys, T::kBlockN, T::kHeadDim>;
    extern __shared__ __align__(16) unsigned char smem[];
    unsigned char *k_lines = smem, *v_lines = k_lines + Smem::kKeys;
    unsigned char* q_lines = Smem::kKeepsQueries ? v_lines : v_lines + Smem::kKeys;

    const int h_k = key_head(p, h);
    const Sequence s(p, b);
    if (p.cu_seqlens_q != nullptr) clear_orphan_rows<E>(p, s, h);
    if (i0 >= s.seqlen_q) return;

    const Lane<T> lane;
    const Dropout dropout(p, s.b, h);
    const Range keys = key_range<T>(p, s, i0);
    TileRows<E> q = tile_rows<E>(p.q, b, h, s.first_q, s.seqlen_q, p.head_dim);
    TileRows<E> k = tile_rows<E>(p.k, b, h_k, s.first_k, s.seqlen_k, p.head_dim);
    TileRows<E> v = tile_rows<E>(p.v, b, h_k, s.first_k, s.seqlen_k, p.head_dim_v);
    q.advance(i0);
    if (keys.begin > 0) k.advance(keys.begin), v.advance(keys.begin);

    __syncthreads();  // of the sequence before nothing is read any more
    QueryCopy::stage(q_lines, q);
    __syncthreads();
    const QueryOperand<T, Smem::kKeepsQueries> queries(q_lines, lane);

    OnlineSoftmax<T> softmax;
    float out[T::kRows][T::kDims];
    clear(out);
#pragma unroll 1
    for (int j0 = keys.begin; j0 < keys.end; j0 += T::kBlockN) {
        KeyCopy::stage(k_lines, k);
        __syncthreads();  // k is there, and the v before it, or q, is no longer read

        float scores[T::kRows][T::kKeys];
        clear(scores);
        multiply_lines<E, T::kHeadDim>(scores, queries, k_lines, k.rows, lane);
        scale_scores<T>(scores, nullptr, p);
        finish_scores<E>(scores, p, s, h, i0, j0, lane);
        softmax.update(scores, out);
        if (dropout.is_on) {
            const Kept<T> kept = dropout.keep_scores(i0, j0, lane);
            for_each_score<T>(lane, i0, j0, [&](int i, int j, int, int) {
                if (!kept(i, j)) scores[i][j] = 0.0f;
            });
        }

        KeyCopy::stage(v_lines, v);
        KeyCopy::clear_unseen(v_lines, [&](int row) { return seen_keys<T>(p, s, h, i0, j0 + row); });
        __syncthreads();  // v is there, and k is no longer read
        add_weighted_lines<E, T::kHeadDim>(out, scores, v_lines, v.rows, lane);
        k.advance(T::kBlockN), v.advance(T::kBlockN);
    }
    store_out<E>(p, s, h, i0, softmax, out, lane);
}

// grid: (query tiles, nheads, batch)
template <class E, class T>
__device__ __forceinline__ void attention_fwd_mma(const AttentionParams& p) {
    for_each_pair(p, p.nheads, [&](int b, int h) { attend_mma<E, T>(p, b, h, blockIdx.x * T::kBlockM); });
}

}  // namespace fastattn
