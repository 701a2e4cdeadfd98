// Products of tiles. Each thread holds a micro-tile of accumulators in registers and adds outer products of operands in
// shared memory: left (k, rows) and right (k, columns), both with the contracted dimension outermost, so that what a
// thread needs for one k is contiguous.
#pragma once

#include "tile_copy.cuh"
#include "tiles.cuh"

namespace fastattn {

// ---- which part of a product a thread holds

template <class T>
struct Lane {
    int warp, x, y;

    __device__ __forceinline__ Lane() {
        const int thread = opaque(threadIdx.x), lane = thread % 32;
        warp = thread / 32;
        x = T::x(lane);
        y = T::y(lane);
    }

    // The index in the product of the i-th of this thread's kCount rows or columns.
    template <int kCount>
    __device__ __forceinline__ int row(int i) const {
        constexpr int kGroup = kGroupOf<kCount>;
        return warp * (T::kLanesY * kCount) + i / kGroup * (T::kLanesY * kGroup) + y * kGroup + i % kGroup;
    }
    template <int kCount>
    __device__ __forceinline__ int column(int j) const {
        constexpr int kGroup = kGroupOf<kCount>;
        return j / kGroup * (T::kLanesX * kGroup) + x * kGroup + j % kGroup;
    }
};

// Calls f(i, row) for those rows of a product's kCount rows per thread that a tensor has, from one to the next without
// a multiplication, which is many instructions for 64 bits.
template <int kCount, class T, class E, class F>
__device__ __forceinline__ void for_each_row(const TileRows<E>& rows, const Lane<T>& lane, F f) {
    constexpr int kGroup = kGroupOf<kCount>;
    int index = lane.template row<kCount>(0);
    E* row = rows.data + index * rows.stride;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if (index < rows.rows) f(i, row);
        const int step = i % kGroup < kGroup - 1 ? 1 : (T::kLanesY - 1) * kGroup + 1;
        index += step;
        row += step * rows.stride;
    }
}

// rows = factor * x, where a thread holds kRows rows of the product x.
template <class E, class T, int kRows>
__device__ __forceinline__ void store_rows(const TileRows<E>& to, const float (&x)[kRows][T::kDims], float factor,
                                           const Lane<T>& lane) {
    for_each_row<kRows>(to, lane, [&](int i, E* row) {
#pragma unroll
        for (int d = 0; d < T::kDims; d += 4)
            to.store(row, lane.template column<T::kDims>(d),
                     make_float4(x[i][d] * factor, x[i][d + 1] * factor, x[i][d + 2] * factor, x[i][d + 3] * factor));
    });
}

// The sum or maximum of a row: over the lanes of equal y.
template <class T>
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int n = 2; n <= T::kLanesX; n *= 2) x += __shfl_xor_sync(0xffffffffu, x, T::column_bit(n));
    return x;
}
template <class T>
__device__ __forceinline__ float row_max(float x) {
#pragma unroll
    for (int n = 2; n <= T::kLanesX; n *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, T::column_bit(n)));
    return x;
}

// ---- registers

template <int kRows, int kColumns>
__device__ __forceinline__ void clear(float (&c)[kRows][kColumns]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) c[i][j] = 0.0f;
}

// A thread's rows or columns for one k: groups of contiguous floats, `step` floats apart.
template <int kCount>
__device__ __forceinline__ void load_groups(float (&r)[kCount], const float* from, int step) {
    if constexpr (kCount == 1) {
        r[0] = from[0];
    } else if constexpr (kCount == 2) {
        const float2 pair = *reinterpret_cast<const float2*>(from);
        r[0] = pair.x, r[1] = pair.y;
    } else {
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
            const float4 quad = *reinterpret_cast<const float4*>(from + i / 4 * step);
            r[i] = quad.x, r[i + 1] = quad.y, r[i + 2] = quad.z, r[i + 3] = quad.w;
        }
    }
}

template <int kCount>
__device__ __forceinline__ void store_group(float* to, const float (&r)[kCount]) {
    static_assert(kCount == 1 || kCount == 2 || kCount == 4, "one vector access");
    if constexpr (kCount == 1)
        to[0] = r[0];
    else if constexpr (kCount == 2)
        *reinterpret_cast<float2*>(to) = make_float2(r[0], r[1]);
    else
        *reinterpret_cast<float4*>(to) = make_float4(r[0], r[1], r[2], r[3]);
}

// The swizzle of the weights' lines: lanes that are neighbours in x write their own keys' weights to different banks.
__device__ __forceinline__ constexpr int swapped(int key) { return key ^ (key >> 2 & 1); }

// c += left^T right over `length` values of k, a multiple of kStep. With kSwapped, left has line k at swapped(k). Where
// operands are staggered, rows and columns of lines 4 to 7 of every 8 are left_shift and right_shift further on.
//
// The outer product goes up one column of accumulators and down the next. Consecutive FMAs then share an operand, which
// stays in the operand reuse cache, and those read from the register file are hardly ever in one bank on sm_60; other
// orders cost up to a fifth of all cycles.
template <class T, int kLeftLine, int kRightLine, int kStep = 8, bool kSwapped = false, int kRows, int kColumns>
__device__ __forceinline__ void multiply(float (&c)[kRows][kColumns], const float* left, const float* right, int length,
                                         int left_shift = 0, int right_shift = 0) {
    constexpr int kLeftStep = T::kLanesY * kGroupOf<kRows>, kRightStep = T::kLanesX * kGroupOf<kColumns>;
    const float *upper_left = left + left_shift, *upper_right = right + right_shift;
#pragma unroll 1
    for (int k = 0; k < length; k += kStep) {
#pragma unroll
        for (int step = 0; step < kStep; ++step) {
            float a[kRows], b[kColumns];
            load_groups(a, (step % 8 < 4 ? left : upper_left) + (kSwapped ? swapped(step) : step) * kLeftLine,
                        kLeftStep);
            load_groups(b, (step % 8 < 4 ? right : upper_right) + step * kRightLine, kRightStep);
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
#pragma unroll
                for (int n = 0; n < kRows; ++n) {
                    const int i = j % 2 == 0 ? kRows - 1 - n : n;
                    c[i][j] = fmaf(a[i], b[j], c[i][j]);
                }
        }
        left += kStep * kLeftLine, upper_left += kStep * kLeftLine;
        right += kStep * kRightLine, upper_right += kStep * kRightLine;
    }
}

__device__ __forceinline__ int multiple_of(int step, int n) { return (n + step - 1) / step * step; }

// ---- the three products of attention. Each begins with a barrier, after which all threads are done with what lay in
// shared memory, and reads what it staged until its end.

// Waits until all threads are done with left and right, and stages a slice of head_dim there.
template <class T, class E>
__device__ __forceinline__ void sync_and_stage(float* left, float* right, const TileRows<E>& queries,
                                               const TileRows<E>& keys, int d0, bool queries_are_staged) {
    using QueryCopy = TransposedCopy<E, T::kThreads, T::kBlockM, T::kSlice>;
    using KeyCopy = TransposedCopy<E, T::kThreads, T::kBlockN, T::kSlice>;
    if (d0 + T::kSlice > min(queries.aligned_dims, keys.aligned_dims)) {
        __syncthreads();
        if (!queries_are_staged) QueryCopy::copy(left, queries, d0);
        KeyCopy::copy(right, keys, d0);
    } else if (queries_are_staged) {
        KeyCopy key_copy;
        key_copy.load(keys, d0);
        __syncthreads();
        key_copy.store(right);
    } else {
        QueryCopy query_copy;
        KeyCopy key_copy;
        query_copy.load(queries, d0);
        key_copy.load(keys, d0);
        __syncthreads();
        query_copy.store(left);
        key_copy.store(right);
    }
}

// scores = queries keys^T: q k^T or dout v^T, a slice of the head dimension at a time. Queries that are still there
// from the call before are not staged again.
template <class T, class E>
__device__ __forceinline__ void multiply_rows(float (&scores)[T::kRows][T::kKeys], const TileRows<E>& queries,
                                              const TileRows<E>& keys, float* left, float* right, const Lane<T>& lane,
                                              bool queries_are_staged = false) {
    clear(scores);
#pragma unroll 1
    for (int d0 = 0; d0 < queries.dims; d0 += T::kSlice) {
        sync_and_stage<T>(left, right, queries, keys, d0, queries_are_staged);
        __syncthreads();
        const int row = lane.template row<T::kRows>(0), column = lane.template column<T::kKeys>(0);
        multiply<T, kLineOf<T::kBlockM>, T::kBlockN, 16>(scores, left + row, right + column,
                                                         multiple_of(16, min(T::kSlice, queries.dims - d0)),
                                                         (row ^ staggered(4)) - row, (column ^ staggered(4)) - column);
    }
}

// sums += weights rows: weights v or dS k, kRowSlice rows at a time. A bit of seen(i0) is 0 for each of the rows from
// i0 on that is staged as zeros. The weights go through shared memory, where each warp reads only its own.
template <int kRowSlice, class T, class E, class Seen>
__device__ __forceinline__ void add_weighted(float (&sums)[T::kRows][T::kDims],
                                             const float (&weights)[T::kRows][T::kKeys], const TileRows<E>& rows,
                                             const Seen& seen, float* left, float* right, const Lane<T>& lane) {
    constexpr int kRowGroup = kGroupOf<T::kRows>, kKeyGroup = kGroupOf<T::kKeys>;
    float* own = left + lane.warp * (T::kKeySlice * T::kWarpRows);
#pragma unroll
    for (int i0 = 0; i0 < T::kBlockN; i0 += kRowSlice) {
        if (i0 >= rows.rows) break;
        sync_and_stage_rows<T::kThreads, kRowSlice, T::kHeadDim>(right, rows, i0);
        const unsigned kept = seen(i0);
        if (kept != ~0u) RowsCopy<E, T::kThreads, kRowSlice, T::kHeadDim>::clear(right, kept);
        if (i0 % T::kKeySlice == 0) {
#pragma unroll
            for (int j = 0; j < kKeyGroup; ++j)
#pragma unroll
                for (int i = 0; i < T::kRows; i += kRowGroup) {
                    float column[kRowGroup];
#pragma unroll
                    for (int e = 0; e < kRowGroup; ++e) column[e] = weights[i + e][i0 / T::kKeySlice * kKeyGroup + j];
                    const int line = swapped(lane.x * kKeyGroup + j);
                    store_group(own + line * T::kWarpRows + i * T::kLanesY + lane.y * kRowGroup, column);
                }
        }
        __syncthreads();
        multiply<T, T::kWarpRows, T::kHeadDim, 8, true>(
            sums, own + i0 % T::kKeySlice * T::kWarpRows + lane.y * kRowGroup,
            right + lane.template column<T::kDims>(0), min(kRowSlice, multiple_of(8, rows.rows - i0)));
    }
}

// sums += weights^T rows: weights^T dout or dS^T q.
template <class T, class E>
__device__ __forceinline__ void add_weighted_transposed(float (&sums)[T::kKeyRows][T::kDims],
                                                        const float (&weights)[T::kRows][T::kKeys],
                                                        const TileRows<E>& rows, float* left, float* right,
                                                        const Lane<T>& lane) {
    constexpr int kKeyGroup = kGroupOf<T::kKeys>;
    sync_and_stage_rows<T::kThreads, T::kBlockM, T::kHeadDim>(right, rows, 0);
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
#pragma unroll
        for (int j = 0; j < T::kKeys; j += kKeyGroup) {
            float group[kKeyGroup];
#pragma unroll
            for (int e = 0; e < kKeyGroup; ++e) group[e] = weights[i][j + e];
            store_group(left + lane.template row<T::kRows>(i) * T::kBlockN + lane.template column<T::kKeys>(j), group);
        }
    __syncthreads();
    multiply<T, T::kBlockN, T::kHeadDim>(sums, left + lane.template row<T::kKeyRows>(0),
                                         right + lane.template column<T::kDims>(0),
                                         min(T::kBlockM, multiple_of(8, rows.rows)));
}

}  // namespace fastattn
