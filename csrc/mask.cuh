// Which keys a query may attend to: the sequence's lengths, the band, the mask; and the bias that is added to the
// scores.
#pragma once

#include "tile_mma.cuh"

namespace fastattn {

// Where sequence b lies and how long it is. Lengths that do not fit the tensors are cut, so nothing outside is touched.
struct Sequence {
    int b;
    index_t first_q, first_k;  // tokens before it; 0 when dense
    int seqlen_q, seqlen_k;
    int shift;  // key i + shift is on the diagonal of query i

    __device__ __forceinline__ Sequence(const AttentionParams& p, int b)
        : b(b), first_q(0), first_k(0), seqlen_q(p.seqlen_q), seqlen_k(p.seqlen_k) {
        if (p.cu_seqlens_q != nullptr) {
            first_q = clamp(p.cu_seqlens_q[b], p.total_q);
            first_k = clamp(p.cu_seqlens_k[b], p.total_k);
            seqlen_q = length(first_q, clamp(p.cu_seqlens_q[b + 1], p.total_q), p.seqlen_q);
            seqlen_k = length(first_k, clamp(p.cu_seqlens_k[b + 1], p.total_k), p.seqlen_k);
        }
        shift = p.bottom_right ? seqlen_k - seqlen_q : 0;
    }

    static __device__ __forceinline__ index_t clamp(index_t token, index_t total) {
        return min(max(token, index_t{0}), total);
    }
    static __device__ __forceinline__ int length(index_t first, index_t end, int longest) {
        return static_cast<int>(min(max(end - first, index_t{0}), static_cast<index_t>(longest)));
    }
};

__device__ __forceinline__ float* per_row(const PerRow& x, const Sequence& s, int h) {
    return x.data + s.b * x.batch + h * x.head + s.first_q;
}

// ---- tiles that the band and the lengths leave something of

struct Range {
    int begin, end;
};

// Key tiles that the queries of tile i0 may look into; begin is a multiple of kBlockN.
template <class T>
__device__ __forceinline__ Range key_range(const AttentionParams& p, const Sequence& s, int i0) {
    const index_t first = static_cast<index_t>(i0) + s.shift;
    const index_t last = static_cast<index_t>(min(i0 + T::kBlockM, s.seqlen_q)) - 1 + s.shift;
    const index_t begin = max(first - p.left, index_t{0});
    const index_t end = min(last + p.right + 1, static_cast<index_t>(s.seqlen_k));
    if (begin >= end) return {0, 0};
    return {static_cast<int>(begin) / T::kBlockN * T::kBlockN, static_cast<int>(end)};
}

// Query tiles that may look into the keys of tile j0: exactly those whose key_range has it.
template <class T>
__device__ __forceinline__ Range query_range(const AttentionParams& p, const Sequence& s, int j0) {
    const index_t first = static_cast<index_t>(j0) - s.shift;
    const index_t last = static_cast<index_t>(min(j0 + T::kBlockN, s.seqlen_k)) - 1 - s.shift;
    const index_t begin = max(first - p.right, index_t{0});
    const index_t end = min(last + p.left + 1, static_cast<index_t>(s.seqlen_q));
    if (begin >= end) return {0, 0};
    return {static_cast<int>(begin) / T::kBlockM * T::kBlockM, static_cast<int>(end)};
}

// ---- scores

// Calls f(i, j, query, key) for every score of this thread.
template <class T, class F>
__device__ __forceinline__ void for_each_score(const Lane<T>& lane, int i0, int j0, F f) {
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
#pragma unroll
        for (int j = 0; j < T::kKeys; ++j)
            f(i, j, i0 + lane.template row<T::kRows>(i), j0 + lane.template column<T::kKeys>(j));
}

template <class B, class T>
__device__ __forceinline__ void add_bias(float (&scores)[T::kRows][T::kKeys], const Scores& bias, const Sequence& s,
                                         int h, int i0, int j0, const Lane<T>& lane) {
    const B* data = static_cast<const B*>(bias.data) + s.b * bias.batch + h * bias.head;
    for_each_score<T>(lane, i0, j0, [&](int i, int j, int query, int key) {
        if (query < s.seqlen_q && key < s.seqlen_k) scores[i][j] += to_float(data[query * bias.row + key * bias.key]);
    });
}

// q k^T  ->  scale * q k^T + bias, and -inf where the query must not attend to the key.
template <class E, class T>
__device__ __forceinline__ void finish_scores(float (&scores)[T::kRows][T::kKeys], const AttentionParams& p,
                                              const Sequence& s, int h, int i0, int j0, const Lane<T>& lane) {
    for_each_score<T>(lane, i0, j0, [&](int i, int j, int, int) { scores[i][j] *= p.scale; });
    if (p.bias.data != nullptr) {
        // A bias is in float or in the call's own type.
        if (sizeof(E) == sizeof(float) || p.bias_type == kBiasFloat32)
            add_bias<float>(scores, p.bias, s, h, i0, j0, lane);
        else
            add_bias<E>(scores, p.bias, s, h, i0, j0, lane);
    }
    const index_t first = static_cast<index_t>(i0) + s.shift, last = first + T::kBlockM - 1;
    const bool is_inside =
        j0 + T::kBlockN <= s.seqlen_k && j0 >= last - p.left && j0 + T::kBlockN - 1 <= first + p.right;
    if (!is_inside) {
        for_each_score<T>(lane, i0, j0, [&](int i, int j, int query, int key) {
            const index_t offset = static_cast<index_t>(key) - query - s.shift;
            if (key >= s.seqlen_k || offset < -static_cast<index_t>(p.left) || offset > p.right)
                scores[i][j] = -INFINITY;
        });
    }
    if (p.mask.data != nullptr) {
        const unsigned char* mask =
            static_cast<const unsigned char*>(p.mask.data) + s.b * p.mask.batch + h * p.mask.head;
        for_each_score<T>(lane, i0, j0, [&](int i, int j, int query, int key) {
            const bool is_score = query < s.seqlen_q && key < s.seqlen_k;
            if (is_score && !mask[query * p.mask.row + key * p.mask.key]) scores[i][j] = -INFINITY;
        });
    }
}

// ---- tokens of no sequence

// Packed tensors may hold tokens that no sequence counts: after its longest allowed length, and after the last one.
// Sequence b answers for those up to the next sequence.
struct Orphans {
    index_t begin, end;
};

__device__ __forceinline__ Orphans orphans(const int* cu_seqlens, int b, int batch, index_t first, int seqlen,
                                           index_t total) {
    if (cu_seqlens == nullptr) return {0, 0};
    return {first + seqlen, b == batch - 1 ? total : Sequence::clamp(cu_seqlens[b + 1], total)};
}

// Zeros in their rows of head h, shared out among the blocks of one (batch, head).
template <class E>
__device__ __forceinline__ void clear_rows(const Rows& x, int h, const Orphans& tokens, int dims) {
    for (index_t token = tokens.begin + blockIdx.y; token < tokens.end; token += gridDim.y) {
        E* row = static_cast<E*>(x.data) + h * x.head + token * x.row;
        for (int d = threadIdx.x; d < dims; d += blockDim.x) row[d] = from_float<E>(0.0f);
    }
}

}  // namespace fastattn
