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

// The first `rows` rows, `dims` elements each, of a tensor from some row on. Nothing beyond them is ever touched: it
// reads as 0 and takes no writes.
template <class E>
struct TileRows {
    E* data;
    index_t stride;
    int rows, dims;
    bool is_aligned;  // whether four elements can be moved at a time

    template <bool kAligned>
    __device__ __forceinline__ float4 load(int row, int d) const {
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (row >= rows || d >= dims) return x;
        const E* from = data + row * stride + d;
        if (kAligned) {
            const Quad<E> quad = *reinterpret_cast<const Quad<E>*>(from);
            return make_float4(to_float(quad.x), to_float(quad.y), to_float(quad.z), to_float(quad.w));
        }
        x.x = to_float(from[0]);
        if (d + 1 < dims) x.y = to_float(from[1]);
        if (d + 2 < dims) x.z = to_float(from[2]);
        if (d + 3 < dims) x.w = to_float(from[3]);
        return x;
    }

    __device__ __forceinline__ float4 load(int row, int d) const {
        return is_aligned ? load<true>(row, d) : load<false>(row, d);
    }

    __device__ __forceinline__ void store(int row, int d, float4 x) const {
        if (row >= rows || d >= dims) return;
        E* to = data + row * stride + d;
        if (is_aligned) {
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

// Rows first + i0 ... of head h, where the sequence has `seqlen` of them.
template <class E>
__device__ __forceinline__ TileRows<E> tile_rows(const Rows& x, int b, int h, index_t first, int i0, int seqlen,
                                                 int dims) {
    E* data = static_cast<E*>(x.data) + b * x.batch + h * x.head + (first + i0) * x.row;
    return {data, x.row, max(seqlen - i0, 0), dims, x.is_aligned != 0};
}

// ---- into shared memory

__device__ __forceinline__ void store_quad(float* to, float x, float y, float z, float w) {
    *reinterpret_cast<float4*>(to) = make_float4(x, y, z, w);
}

// smem (kDims, kRows) = dimensions d0 ... d0 + kDims - 1 of kRows rows, transposed four by four in registers: both
// operands of a product lie with the contracted dimension outermost, and a thread reads its rows by vector loads.
template <int kThreads, int kRows, int kDims, bool kAligned, class E>
__device__ __forceinline__ void stage_transposed(float* smem, const TileRows<E>& tile, int d0) {
    constexpr int kRowQuads = kRows / 4, kItems = kRowQuads * kDims / 4;
#pragma unroll(kAligned ? 2 : 1)
    for (int item = threadIdx.x; item < kItems; item += kThreads) {
        const int row = item % kRowQuads * 4, d = item / kRowQuads * 4;
        const float4 a = tile.template load<kAligned>(row, d0 + d), b = tile.template load<kAligned>(row + 1, d0 + d);
        const float4 c = tile.template load<kAligned>(row + 2, d0 + d),
                     e = tile.template load<kAligned>(row + 3, d0 + d);
        float* to = smem + d * kRows + row;
        store_quad(to, a.x, b.x, c.x, e.x);
        store_quad(to + kRows, a.y, b.y, c.y, e.y);
        store_quad(to + 2 * kRows, a.z, b.z, c.z, e.z);
        store_quad(to + 3 * kRows, a.w, b.w, c.w, e.w);
    }
}

template <int kThreads, int kRows, int kDims, class E>
__device__ __forceinline__ void stage_transposed(float* smem, const TileRows<E>& tile, int d0) {
    if (tile.is_aligned)
        stage_transposed<kThreads, kRows, kDims, true>(smem, tile, d0);
    else
        stage_transposed<kThreads, kRows, kDims, false>(smem, tile, d0);
}

// smem (kRows, kDims) = rows as they lie, but line r holds row i0 + r % kLines * kGroup + r / kLines. That is the order
// in which the lanes of a warp hold the keys of a product; kGroup = 1 keeps the rows' own order.
template <int kThreads, int kRows, int kDims, int kGroup, bool kAligned, class E>
__device__ __forceinline__ void stage_rows(float* smem, const TileRows<E>& tile, int i0) {
    constexpr int kQuads = kDims / 4, kLines = kRows / kGroup;
#pragma unroll(kAligned ? 4 : 1)
    for (int item = threadIdx.x; item < kRows * kQuads; item += kThreads) {
        const int line = item / kQuads, d = item % kQuads * 4;
        const float4 x = tile.template load<kAligned>(i0 + line % kLines * kGroup + line / kLines, d);
        store_quad(smem + line * kDims + d, x.x, x.y, x.z, x.w);
    }
}

template <int kThreads, int kRows, int kDims, int kGroup, class E>
__device__ __forceinline__ void stage_rows(float* smem, const TileRows<E>& tile, int i0) {
    if (tile.is_aligned)
        stage_rows<kThreads, kRows, kDims, kGroup, true>(smem, tile, i0);
    else
        stage_rows<kThreads, kRows, kDims, kGroup, false>(smem, tile, i0);
}

}  // namespace fastattn
