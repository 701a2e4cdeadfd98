// Products of tiles. Each thread holds a micro-tile of the result in registers and multiplies outer products out of
// shared memory: left (k, rows) and right (k, columns), both with the contracted dimension outermost, so that what a
// thread needs for one k lies together.
#pragma once

#include "tile_copy.cuh"
#include "tiles.cuh"

namespace fastattn {

// ---- which part of a product a thread holds

// Lane bit 0 is a row bit and the next ones are column bits: neighbours read the same address of one operand.
template <class T>
struct Lane {
    int warp, x, y;

    __device__ __forceinline__ Lane() {
        const int lane = threadIdx.x % 32;
        warp = threadIdx.x / 32;
        x = lane / 2 % T::kLanesX;
        y = lane % 2 + lane / 2 / T::kLanesX * 2;
    }

    // Of `kCount` rows or columns per thread, the i-th one's index in the product.
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

// The sum or maximum of a row: over the lanes of equal y.
template <class T>
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int bit = 2; bit <= T::kLanesX; bit *= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
    return x;
}
template <class T>
__device__ __forceinline__ float row_max(float x) {
#pragma unroll
    for (int bit = 2; bit <= T::kLanesX; bit *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, bit));
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
        store_quad(to, r[0], r[1], r[2], r[3]);
}

// c += left^T right over `length` values of k, a multiple of 8.
template <class T, int kLeftLine, int kRightLine, int kRows, int kColumns>
__device__ __forceinline__ void multiply(float (&c)[kRows][kColumns], const float* left, const float* right,
                                         int length) {
    constexpr int kLeftStep = T::kLanesY * kGroupOf<kRows>, kRightStep = T::kLanesX * kGroupOf<kColumns>;
#pragma unroll 1
    for (int k = 0; k < length; k += 8) {
#pragma unroll
        for (int step = 0; step < 8; ++step) {
            float a[kRows], b[kColumns];
            load_groups(a, left + step * kLeftLine, kLeftStep);
            load_groups(b, right + step * kRightLine, kRightStep);
#pragma unroll
            for (int i = 0; i < kRows; ++i)
#pragma unroll
                for (int j = 0; j < kColumns; ++j) c[i][j] = fmaf(a[i], b[j], c[i][j]);
        }
        left += 8 * kLeftLine;
        right += 8 * kRightLine;
    }
}

__device__ __forceinline__ int multiple_of_8(int n) { return (n + 7) / 8 * 8; }

// ---- the three products of attention. Each begins with a barrier, after which all threads are done with what lay in
// shared memory, and reads what it staged until its end.

// scores = queries keys^T: q k^T or dout v^T, a slice of the head dimension at a time. Queries that are still there
// from the call before are not staged again.
template <class T, class E>
__device__ __forceinline__ void multiply_rows(float (&scores)[T::kRows][T::kKeys], const TileRows<E>& queries,
                                              const TileRows<E>& keys, float* left, float* right, const Lane<T>& lane,
                                              bool queries_are_staged = false) {
    clear(scores);
#pragma unroll 1
    for (int d0 = 0; d0 < queries.dims; d0 += T::kSlice) {
        __syncthreads();
        if (!queries_are_staged) stage_transposed<T::kThreads, T::kBlockM, T::kSlice>(left, queries, d0);
        stage_transposed<T::kThreads, T::kBlockN, T::kSlice>(right, keys, d0);
        __syncthreads();
        multiply<T, T::kBlockM, T::kBlockN>(scores, left + lane.template row<T::kRows>(0),
                                            right + lane.template column<T::kKeys>(0),
                                            multiple_of_8(min(T::kSlice, queries.dims - d0)));
    }
}

// sums += weights rows: weights v or dS k. The weights go through shared memory, where each warp reads only its own.
template <class T, class E>
__device__ __forceinline__ void add_weighted(float (&sums)[T::kRows][T::kDims],
                                             const float (&weights)[T::kRows][T::kKeys], const TileRows<E>& rows,
                                             float* left, float* right, const Lane<T>& lane) {
    constexpr int kRowGroup = kGroupOf<T::kRows>, kKeyGroup = kGroupOf<T::kKeys>;
    float* own = left + lane.warp * (T::kKeySlice * T::kWarpRows);
#pragma unroll
    for (int slice = 0; slice < T::kKeys / kKeyGroup; ++slice) {
        if (slice * T::kKeySlice >= rows.rows) break;
        __syncthreads();
#pragma unroll
        for (int j = 0; j < kKeyGroup; ++j)
#pragma unroll
            for (int i = 0; i < T::kRows; i += kRowGroup) {
                float column[kRowGroup];
#pragma unroll
                for (int e = 0; e < kRowGroup; ++e) column[e] = weights[i + e][slice * kKeyGroup + j];
                store_group(own + (j * T::kLanesX + lane.x) * T::kWarpRows + i * T::kLanesY + lane.y * kRowGroup,
                            column);
            }
        stage_rows<T::kThreads, T::kKeySlice, T::kHeadDim, kKeyGroup>(right, rows, slice * T::kKeySlice);
        __syncthreads();
        multiply<T, T::kWarpRows, T::kHeadDim>(sums, own + lane.y * kRowGroup,
                                               right + lane.template column<T::kDims>(0), T::kKeySlice);
    }
}

// sums += weights^T rows: weights^T dout or dS^T q.
template <class T, class E>
__device__ __forceinline__ void add_weighted_transposed(float (&sums)[T::kKeyRows][T::kDims],
                                                        const float (&weights)[T::kRows][T::kKeys],
                                                        const TileRows<E>& rows, float* left, float* right,
                                                        const Lane<T>& lane) {
    constexpr int kKeyGroup = kGroupOf<T::kKeys>;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
#pragma unroll
        for (int j = 0; j < T::kKeys; j += kKeyGroup) {
            float group[kKeyGroup];
#pragma unroll
            for (int e = 0; e < kKeyGroup; ++e) group[e] = weights[i][j + e];
            store_group(left + lane.template row<T::kRows>(i) * T::kBlockN + lane.template column<T::kKeys>(j), group);
        }
    stage_rows<T::kThreads, T::kBlockM, T::kHeadDim, 1>(right, rows, 0);
    __syncthreads();
    multiply<T, T::kBlockN, T::kHeadDim>(sums, left + lane.template row<T::kKeyRows>(0),
                                         right + lane.template column<T::kDims>(0),
                                         min(T::kBlockM, multiple_of_8(rows.rows)));
}

}  // namespace fastattn
