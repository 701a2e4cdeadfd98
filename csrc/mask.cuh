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

// A grid has at most 65535 blocks in z.
template <class F>
__device__ __forceinline__ void for_each_batch(const AttentionParams& p, F f) {
#pragma unroll 1
    for (int b = blockIdx.z; b < p.batch; b += gridDim.z) f(b);
}

// The key head of a query head.
__device__ __forceinline__ int key_head(const AttentionParams& p, int h) {
    return p.nheads == p.nheads_k ? h : h / (p.nheads / p.nheads_k);
}

__device__ __forceinline__ float* per_row(const PerRow& x, const Sequence& s, int h) {
    return x.data + s.b * x.batch + h * x.head + s.first_q;
}

// ---- tiles that the band and the lengths leave something of

struct Range {
    int begin, end;
};

// The band's edges, where none is beyond every key. Lengths are below kLongest, so that all sums here fit 32 bits.
__device__ __forceinline__ int left_edge(const AttentionParams& p) { return min(p.left, 2 * kLongest); }
__device__ __forceinline__ int right_edge(const AttentionParams& p) { return min(p.right, 2 * kLongest); }

// Key tiles that the queries of tile i0 may look into; begin is a multiple of kBlockN.
template <class T>
__device__ __forceinline__ Range key_range(const AttentionParams& p, const Sequence& s, int i0) {
    const int first = i0 + s.shift, last = min(i0 + T::kBlockM, s.seqlen_q) - 1 + s.shift;
    const int begin = max(first - left_edge(p), 0), end = min(last + right_edge(p) + 1, s.seqlen_k);
    if (begin >= end) return {0, 0};
    return {begin / T::kBlockN * T::kBlockN, end};
}

// Query tiles that may look into the keys of tile j0: exactly those whose key_range has it.
template <class T>
__device__ __forceinline__ Range query_range(const AttentionParams& p, const Sequence& s, int j0) {
    const int first = j0 - s.shift, last = min(j0 + T::kBlockN, s.seqlen_k) - 1 - s.shift;
    const int begin = max(first - right_edge(p), 0), end = min(last + left_edge(p) + 1, s.seqlen_q);
    if (begin >= end) return {0, 0};
    return {begin / T::kBlockM * T::kBlockM, end};
}

// ---- scores, in units of ln 2: their exponential is a power of 2

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Calls f(i, j, query, key) for every score of this thread.
template <class T, class F>
__device__ __forceinline__ void for_each_score(const Lane<T>& lane, int i0, int j0, F f) {
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
#pragma unroll
        for (int j = 0; j < T::kKeys; ++j)
            f(i, j, i0 + lane.template row<T::kRows>(i), j0 + lane.template column<T::kKeys>(j));
}

// Elements that lie together: one vector access.
template <class B, int kCount>
struct alignas(kCount * sizeof(B)) Elements {
    B of[kCount];
};

// Calls f(i, j, x) with what a mask or a bias has for every score of this thread that is inside the sequence. It takes
// kAtOnce keys at a time; if more than one, all keys of the tile must be inside. `row` points to the element of `query`
// and `first_key`; from there it walks, because a multiplication of 64 bits is many instructions.
template <int kAtOnce, class T, class B, class F>
__device__ __forceinline__ void walk_elements(const B* row, const Scores& x, const Sequence& s, int query,
                                              int first_key, F f) {
    constexpr int kRowGroup = kGroupOf<T::kRows>, kKeyGroup = kGroupOf<T::kKeys>;
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
        const B* element = row;
        int key = first_key;
#pragma unroll
        for (int j = 0; j < T::kKeys; j += kAtOnce) {
            if (query < s.seqlen_q && (kAtOnce > 1 || key < s.seqlen_k)) {
                const auto elements = *reinterpret_cast<const Elements<B, kAtOnce>*>(element);
#pragma unroll
                for (int e = 0; e < kAtOnce; ++e) f(i, j + e, elements.of[e]);
            }
            const int step = kAtOnce + ((j + kAtOnce) % kKeyGroup == 0 ? (T::kLanesX - 1) * kKeyGroup : 0);
            key += step;
            element += step * x.key;
        }
        const int step = 1 + ((i + 1) % kRowGroup == 0 ? (T::kLanesY - 1) * kRowGroup : 0);
        query += step;
        row += step * x.row;
    }
}

// The same for the tile at (i0, j0), with a group of keys at a time if that is possible.
template <class B, class T, class F>
__device__ __forceinline__ void for_each_element(const Scores& x, const Sequence& s, int h, int i0, int j0,
                                                 const Lane<T>& lane, F f) {
    constexpr int kGroup = kGroupOf<T::kKeys>;
    const int query = i0 + lane.template row<T::kRows>(0), key = j0 + lane.template column<T::kKeys>(0);
    const B* first = static_cast<const B*>(x.data) + s.b * x.batch + h * x.head + query * x.row + key * x.key;
    const unsigned address = static_cast<unsigned>(reinterpret_cast<size_t>(first)), row = sizeof(B) * x.row;
    const bool is_aligned = (address | row) % sizeof(Elements<B, kGroup>) == 0;
    if (x.key == 1 && is_aligned && j0 + T::kBlockN <= s.seqlen_k)
        walk_elements<kGroup, T>(first, x, s, query, key, f);
    else
        walk_elements<1, T>(first, x, s, query, key, f);
}

template <class B, class T>
__device__ __forceinline__ void add_bias(float (&scores)[T::kRows][T::kKeys], const Scores& bias, const Sequence& s,
                                         int h, int i0, int j0, const Lane<T>& lane) {
    for_each_element<B>(bias, s, h, i0, j0, lane,
                        [&](int i, int j, B x) { scores[i][j] = fmaf(to_float(x), kLog2E, scores[i][j]); });
}

// q k^T  ->  (scale * q k^T + bias) / ln 2, and -inf where the query must not attend to the key.
template <class E, class T>
__device__ __forceinline__ void finish_scores(float (&scores)[T::kRows][T::kKeys], const AttentionParams& p,
                                              const Sequence& s, int h, int i0, int j0, const Lane<T>& lane) {
    const float scale = p.scale * kLog2E;
    for_each_score<T>(lane, i0, j0, [&](int i, int j, int, int) { scores[i][j] *= scale; });
    if (p.bias.data != nullptr) {
        // A bias is in float or in the call's own type.
        if (sizeof(E) == sizeof(float) || p.bias_type == kBiasFloat32)
            add_bias<float>(scores, p.bias, s, h, i0, j0, lane);
        else
            add_bias<E>(scores, p.bias, s, h, i0, j0, lane);
    }
    const int first = i0 + s.shift, last = first + T::kBlockM - 1, left = left_edge(p), right = right_edge(p);
    const bool is_inside = j0 + T::kBlockN <= s.seqlen_k && j0 >= last - left && j0 + T::kBlockN - 1 <= first + right;
    if (!is_inside) {
        for_each_score<T>(lane, i0, j0, [&](int i, int j, int query, int key) {
            const int offset = key - query - s.shift;
            if (key >= s.seqlen_k || offset < -left || offset > right) scores[i][j] = -INFINITY;
        });
    }
    if (p.mask.data != nullptr) {
        for_each_element<unsigned char>(p.mask, s, h, i0, j0, lane, [&](int i, int j, unsigned char is_allowed) {
            if (!is_allowed) scores[i][j] = -INFINITY;
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
    for (index_t token = tokens.begin + blockIdx.x; token < tokens.end; token += gridDim.x) {
        E* row = static_cast<E*>(x.data) + h * x.head + token * x.row;
        for (int d = threadIdx.x; d < dims; d += blockDim.x) row[d] = from_float<E>(0.0f);
    }
}

}  // namespace fastattn
