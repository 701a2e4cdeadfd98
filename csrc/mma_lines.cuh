// Tiles of elements in shared memory as tensor cores read them, and the products of such tiles. A line holds a row of a
// tensor, its dimensions in the order of the unit's column_line(); rows of queries lie in the order of row_line(), keys
// in that of column_line().
#pragma once

#include "mma_tiles.cuh"
#include "mma_units.cuh"
#include "tile_mma.cuh"

namespace fastattn {

// A shape and the instruction that multiplies it: what Lane<T> and its users take for T.
template <class U, class Shape>
struct MmaTile : Shape {
    using Unit = U;
    static constexpr int column_bit(int n) { return U::column_bit(n); }
    static constexpr int x(int lane) { return U::x(lane); }
    static constexpr int y(int lane) { return U::y(lane); }
};

__device__ __forceinline__ int lane_index() { return opaque(threadIdx.x) % 32; }

// ---- into shared memory

enum RowKind { kQueries, kKeys };

// smem = kDims dimensions of kTileRows rows; rows past the last one are copies of others.
template <class T, class E, RowKind kKind, int kTileRows, int kDims>
class LinesCopy {
    static constexpr int kLine = T::line_bytes(kDims), kChunks = kDims / 8, kStep = T::kThreads / kChunks;
    static constexpr int kCount = (kTileRows + kStep - 1) / kStep;
    static_assert(T::kThreads % kChunks == 0, "a thread stays in its dimensions");

    struct Place {
        int row, chunk;

        __device__ __forceinline__ Place() {
            const int thread = opaque(threadIdx.x);
            row = thread / kChunks, chunk = thread % kChunks;
        }
    };

    static __device__ __forceinline__ bool is_inside(int row) { return kTileRows % kStep == 0 || row < kTileRows; }

    static __device__ __forceinline__ void store_eight(unsigned char* smem, int row, int chunk, uint4 x) {
        const int in_unit = kKind == kQueries ? T::Unit::row_line(row % 16) : T::Unit::column_line(row % 16);
        T::Unit::store_eight(smem + (row / 16 * 16 + in_unit) * kLine, chunk, x);
    }

    static __device__ __forceinline__ uint4 gather(const TileRows<E>& tile, int row, int d) {
        const E* from = tile.row(row);
        const float4 low = tile.load(from, d), high = tile.load(from, d + 4);
        return make_uint4(pack<E>(low.x, low.y), pack<E>(low.z, low.w), pack<E>(high.x, high.y),
                          pack<E>(high.z, high.w));
    }

    // Whether the rows have all these dimensions and 16 bytes of each can be moved at a time.
    static __device__ __forceinline__ bool is_aligned(const TileRows<E>& tile) {
        const unsigned address = static_cast<unsigned>(reinterpret_cast<size_t>(tile.data));
        const unsigned stride = static_cast<unsigned>(sizeof(E) * tile.stride);
        return kDims <= tile.aligned_dims && (address | stride) % 16 == 0;
    }

    // All loads are in flight together.
    static __device__ __forceinline__ void copy_aligned(unsigned char* smem, const TileRows<E>& tile) {
        uint4 eights[kCount];
        const Place at;
        int row = at.row;
        const E* from = tile.row(row) + at.chunk * 8;
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
            eights[n] = *reinterpret_cast<const uint4*>(from);
            row += kStep;
            if (row < tile.rows) from += kStep * tile.stride;
        }
#pragma unroll
        for (int n = 0; n < kCount; ++n)
            if (is_inside(at.row + n * kStep)) store_eight(smem, at.row + n * kStep, at.chunk, eights[n]);
    }

  public:
    static __device__ __forceinline__ void stage(unsigned char* smem, const TileRows<E>& tile) {
        if (is_aligned(tile)) return copy_aligned(smem, tile);
        const Place at;
#pragma unroll 1
        for (int row = at.row; row < kTileRows; row += kStep)
            store_eight(smem, row, at.chunk, gather(tile, row, at.chunk * 8));
    }

    // Zeros over what this thread itself has stored in those rows whose bit of seen(row), of 32 rows from there on, is
    // 0: a weight of 0 does not take NaN out of a sum.
    template <class Seen>
    static __device__ __forceinline__ void clear_unseen(unsigned char* smem, const Seen& seen) {
        const Place at;
#pragma unroll
        for (int first = 0; first < kTileRows; first += 32) {
            const unsigned kept = seen(first);
            if (kept == ~0u) continue;
#pragma unroll 1
            for (int row = at.row; row < kTileRows; row += kStep)
                if (row / 32 == first / 32 && (kept >> row % 32 & 1) == 0)
                    store_eight(smem, row, at.chunk, make_uint4(0, 0, 0, 0));
        }
    }
};

// ---- products; each warp has its own rows of them

// x += queries keys^T, of which `keys` are there. left(a, k) gives the lane's part of queries for dimensions 16 k to
// 16 k + 15.
template <class E, int kDims, class T, class Left>
__device__ __forceinline__ void multiply_lines(float (&x)[T::kRows][T::kKeys], const Left& left,
                                               const unsigned char* right, int keys, const Lane<T>&) {
    using U = typename T::Unit;
    constexpr int kLine = T::line_bytes(kDims);
    right += U::template right_rows<kLine>(lane_index());
#pragma unroll
    for (int k = 0; k < kDims / 16; ++k) {
        unsigned a[U::kRegisters];
        left(a, k);
#pragma unroll
        for (int j = 0; j < T::kBlockN / 16; ++j) {
            if (16 * j >= keys) break;
            unsigned b[U::kRegisters];
            U::template load_rows<kLine>(b, right + 16 * j * kLine + 32 * k);
            U::template multiply<E, kRowsRows>(&x[0][4 * j], &x[1][4 * j], a, b);
        }
    }
}

// The rows of `lines` that belong to this warp as left operand of multiply_lines().
template <int kDims, class T>
__device__ __forceinline__ auto own_rows(const unsigned char* lines, const Lane<T>& lane) {
    using U = typename T::Unit;
    constexpr int kLine = T::line_bytes(kDims);
    const unsigned char* from = lines + 16 * lane.warp * kLine + U::template left_rows<kLine>(lane_index());
    return [from](unsigned (&a)[U::kRegisters], int k) { U::template load_rows<kLine>(a, from + 32 * k); };
}

// sums += weights rows, of which `keys` are there; the weights go from one product to the other in registers. rows has
// kDims dimensions.
template <class E, int kDims, class T>
__device__ __forceinline__ void add_weighted_lines(float (&sums)[T::kRows][T::kDims],
                                                   const float (&weights)[T::kRows][T::kKeys],
                                                   const unsigned char* rows, int keys, const Lane<T>&) {
    using U = typename T::Unit;
    constexpr int kLine = T::line_bytes(kDims);
    const int lane = lane_index();
    rows += U::template right_columns<kLine>(lane);
#pragma unroll
    for (int k = 0; k < T::kBlockN / 16; ++k) {
        if (16 * k >= keys) break;
        unsigned a[U::kRegisters];
        U::template to_left<E>(a, &weights[0][4 * k], &weights[1][4 * k], lane);
#pragma unroll
        for (int d = 0; d < kDims / 16; ++d) {
            unsigned b[U::kRegisters];
            U::template load_columns<kLine>(b, rows + 16 * k * kLine + 32 * d);
            U::template multiply<E, kRowsColumns>(&sums[0][4 * d], &sums[1][4 * d], a, b);
        }
    }
}

}  // namespace fastattn
