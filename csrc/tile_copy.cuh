// Between tensors in global memory, of any element type and any strides, and tiles of floats in shared memory.
#pragma once

#include "attention.h"
#include "platform.h"

namespace fastattn {

// ---- elements and floats

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class E>
__device__ __forceinline__ E from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

template <class E>
struct alignas(4 * sizeof(E)) Quad {
    E x, y, z, w;
};

// ---- rows of a tensor

template <class E>
__device__ __forceinline__ float4 to_floats(Quad<E> x) {
    return make_float4(to_float(x.x), to_float(x.y), to_float(x.z), to_float(x.w));
}

// The first `rows` rows, `dims` elements each, of a tensor from some row on. Nothing beyond them is ever touched.
template <class E>
struct TileRows {
    E* data;
    index_t stride;
    int rows, dims;
    int aligned_dims;  // those that can be moved four at a time: all or 0

    // Row i, or the first one if i is beyond the end.
    __device__ __forceinline__ E* row(int i) const { return data + (i < rows ? static_cast<unsigned>(i) * stride : 0); }

    // From here on the rows begin n later.
    __device__ __forceinline__ void advance(int n) {
        data += static_cast<unsigned>(n) * stride;
        rows -= n;
    }

    // Four elements from d on, of which those that are there are read; the others are 0.
    __device__ __forceinline__ float4 load(const E* row, int d) const {
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (d >= dims) return x;
        if (aligned_dims != 0) return to_floats(*reinterpret_cast<const Quad<E>*>(row + d));
        x.x = to_float(row[d]);
        if (d + 1 < dims) x.y = to_float(row[d + 1]);
        if (d + 2 < dims) x.z = to_float(row[d + 2]);
        if (d + 3 < dims) x.w = to_float(row[d + 3]);
        return x;
    }

    // Those of four elements from d on that are there.
    __device__ __forceinline__ void store(E* row, int d, float4 x) const {
        if (d >= dims) return;
        E* to = row + d;
        if (aligned_dims != 0) {
            *reinterpret_cast<Quad<E>*>(to) = {from_float<E>(x.x), from_float<E>(x.y), from_float<E>(x.z),
                                               from_float<E>(x.w)};
            return;
        }
        to[0] = from_float<E>(x.x);
        if (d + 1 < dims) to[1] = from_float<E>(x.y);
        if (d + 2 < dims) to[2] = from_float<E>(x.z);
        if (d + 3 < dims) to[3] = from_float<E>(x.w);
    }
};

// All rows of a sequence that begins at token `first`, of batch b and head h.
template <class E>
__device__ __forceinline__ TileRows<E> tile_rows(const Rows& x, int b, int h, index_t first, int seqlen, int dims) {
    E* data = static_cast<E*>(x.data) + static_cast<unsigned>(b) * x.batch + static_cast<unsigned>(h) * x.head;
    if (first != 0) data += first * x.row;
    return {data, x.row, seqlen, dims, x.is_aligned != 0 ? dims : 0};
}

// ---- into shared memory

// In the place of rows beyond the last one there are copies of others: what becomes of them has weight 0, or is not
// stored. A tile has at least one row. Each copy comes in two kinds. Rows whose dimensions are all there and aligned go
// through registers: load() may run while other threads still compute with what lies in shared memory, and store()
// after the barrier. All other rows take copy().

// The line of dimension d has row r at r ^ staggered(d).
__device__ __forceinline__ constexpr int staggered(int d) { return (d >> 2 & 1) * 16; }

// smem (kDims, kRows) = dimensions d0 ... d0 + kDims - 1 of kRows rows, transposed: both operands of a product lie with
// the contracted dimension outermost, and a thread reads its rows by vector loads. A warp takes 32 bytes of 16 rows at
// a time; as the lines are staggered, its 32 lanes write to 32 banks.
template <class E, int kThreads, int kRows, int kDims>
class TransposedCopy {
    static constexpr int kRowGroups = kRows / 16, kStep = kThreads / 32 / kRowGroups * 8, kCount = kDims / kStep;
    static_assert(kThreads / 32 % kRowGroups == 0 && kDims % kStep == 0, "a thread stays in its row");
    static_assert(kRows % 32 == 0, "staggered rows stay in their line");
    Quad<E> quads_[kCount];

    struct Place {
        int row, d;

        __device__ __forceinline__ Place() {
            const int thread = opaque(threadIdx.x), warp = thread / 32, lane = thread % 32;
            row = warp % kRowGroups * 16 + lane % 16;
            d = warp / kRowGroups * 8 + lane / 16 * 4;
        }
        __device__ __forceinline__ float* in(float* smem) const { return smem + d * kRows + (row ^ staggered(d)); }
    };

    static __device__ __forceinline__ void store_column(float* to, float4 x) {
        to[0] = x.x, to[kRows] = x.y, to[2 * kRows] = x.z, to[3 * kRows] = x.w;
    }

  public:
    __device__ __forceinline__ void load(const TileRows<E>& tile, int d0) {
        const Place at;
        const E* from = tile.row(at.row) + d0 + at.d;
#pragma unroll
        for (int n = 0; n < kCount; ++n) quads_[n] = *reinterpret_cast<const Quad<E>*>(from + n * kStep);
    }

    __device__ __forceinline__ void store(float* smem) const {
        float* to = Place().in(smem);
#pragma unroll
        for (int n = 0; n < kCount; ++n) store_column(to + n * kStep * kRows, to_floats(quads_[n]));
    }

    static __device__ __forceinline__ void copy(float* smem, const TileRows<E>& tile, int d0) {
        const Place at;
        const E* from = tile.row(at.row);
        float* to = at.in(smem);
#pragma unroll 1
        for (int n = 0; n < kCount; ++n) store_column(to + n * kStep * kRows, tile.load(from, d0 + at.d + n * kStep));
    }
};

// smem (kRows, kDims) = rows i0 ... i0 + kRows - 1 as they lie.
template <class E, int kThreads, int kRows, int kDims>
class RowsCopy {
    static constexpr int kQuads = kDims / 4, kStep = kThreads / kQuads, kCount = kRows / kStep;
    static_assert(kThreads % kQuads == 0 && kRows % kStep == 0, "a thread stays in its dimensions");
    Quad<E> quads_[kCount];

    struct Place {
        int row, d;

        __device__ __forceinline__ Place() {
            const int thread = opaque(threadIdx.x);
            row = thread / kQuads, d = thread % kQuads * 4;
        }
        __device__ __forceinline__ float* in(float* smem) const { return smem + row * kDims + d; }
    };

    static __device__ __forceinline__ void store_quad(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }

  public:
    __device__ __forceinline__ void load(const TileRows<E>& tile, int i0) {
        const Place at;
        int row = i0 + at.row;
        const E* from = tile.row(row) + at.d;
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
            quads_[n] = *reinterpret_cast<const Quad<E>*>(from);
            row += kStep;
            if (row < tile.rows) from += kStep * tile.stride;
        }
    }

    __device__ __forceinline__ void store(float* smem) const {
        float* to = Place().in(smem);
#pragma unroll
        for (int n = 0; n < kCount; ++n) store_quad(to + n * kStep * kDims, to_floats(quads_[n]));
    }

    static __device__ __forceinline__ void copy(float* smem, const TileRows<E>& tile, int i0) {
        const Place at;
        float* to = at.in(smem);
#pragma unroll 1
        for (int n = 0; n < kCount; ++n)
            store_quad(to + n * kStep * kDims, tile.load(tile.row(i0 + at.row + n * kStep), at.d));
    }
};

// Waits until all threads are done with smem, and stages rows there.
template <int kThreads, int kRows, int kDims, class E>
__device__ __forceinline__ void sync_and_stage_rows(float* smem, const TileRows<E>& tile, int i0) {
    using Copy = RowsCopy<E, kThreads, kRows, kDims>;
    if (kDims <= tile.aligned_dims) {
        Copy copy;
        copy.load(tile, i0);
        __syncthreads();
        copy.store(smem);
    } else {
        __syncthreads();
        Copy::copy(smem, tile, i0);
    }
}

}  // namespace fastattn
