// The gradient of a bias: dS, summed over every batch, head, row and key that the bias is broadcast to.
//
// attention_bwd_dbias: a block computes one copy of one tile of the bias. Of the tiles of scores that this tile is
//   broadcast to, it walks over every gridDim.y-th, and computes dS of each again.
// attention_dbias_sum: a thread adds up the copies of one element, in a fixed order.
//
// shared memory: the two operands of one product at a time, then the tile's sums. registers: P and dS of a tile, and
// their accumulators.
#pragma once

#include "attention_bwd.cuh"

namespace fastattn {

// ---- attention_bwd_dbias, grid: (tiles of the bias, copies)

// The n-th tile of scores that a tile of the bias is broadcast to.
struct BroadcastTiles {
    int batch, heads, rows, keys;  // how many of each

    __device__ __forceinline__ int count() const { return batch * heads * rows * keys; }
};

__device__ __forceinline__ int tiles(int n, int block) { return (n + block - 1) / block; }

// Reduces the tile in shared memory over the dimensions that the bias broadcasts: into its first row, its first column
// or its first element. Without another barrier, every thread may read the first column, but only thread j element j of
// the first row.
template <class T>
__device__ __forceinline__ void sum_broadcast(float* tile, bool rows_broadcast, bool keys_broadcast) {
    __syncthreads();
    if (keys_broadcast && threadIdx.x < T::kBlockM) {
        float sum = 0.0f;
        for (int j = 0; j < T::kBlockN; ++j) sum += tile[threadIdx.x * T::kBlockN + j];
        tile[threadIdx.x * T::kBlockN] = sum;
    }
    __syncthreads();
    if (rows_broadcast && threadIdx.x < T::kBlockN) {
        float sum = 0.0f;
        for (int i = 0; i < T::kBlockM; ++i) sum += tile[i * T::kBlockN + threadIdx.x];
        tile[threadIdx.x] = sum;
    }
}

template <class E, class T>
__device__ __forceinline__ void attention_bwd_dbias(const AttentionParams& p) {
    extern __shared__ __align__(16) unsigned char smem[];
    float* left = reinterpret_cast<float*>(smem);
    float* right = left + ScoresSmem<T>::kLeft;
    const Lane<T> lane;

    // This block's tile of the bias, and the tiles of scores that it is broadcast to.
    const BiasGrad& dbias = p.dbias;
    const int row_tiles = tiles(dbias.rows, T::kBlockM), key_tiles = tiles(dbias.keys, T::kBlockN);
    int index = blockIdx.x;
    const int own_j0 = index % key_tiles * T::kBlockN;
    index /= key_tiles;
    const int own_i0 = index % row_tiles * T::kBlockM;
    index /= row_tiles;
    const int own_h = index % dbias.heads, own_b = index / dbias.heads;
    const bool rows_broadcast = dbias.rows == 1, keys_broadcast = dbias.keys == 1;
    const BroadcastTiles all = {dbias.batch == 1 ? p.batch : 1, dbias.heads == 1 ? p.nheads : 1,
                                rows_broadcast ? tiles(p.seqlen_q, T::kBlockM) : 1,
                                keys_broadcast ? tiles(p.seqlen_k, T::kBlockN) : 1};

    float sums[T::kRows][T::kKeys];
    clear(sums);
#pragma unroll 1
    for (int n = blockIdx.y; n < all.count(); n += gridDim.y) {
        const int j0 = own_j0 + n % all.keys * T::kBlockN, i0 = own_i0 + n / all.keys % all.rows * T::kBlockM;
        const int outer = n / (all.keys * all.rows), h = own_h + outer % all.heads;
        const Sequence s(p, own_b + outer / all.heads);
        const Range keys = key_range<T>(p, s, i0);
        if (i0 >= s.seqlen_q || j0 < keys.begin || j0 >= keys.end) continue;
        const int h_k = key_head(p, h);
        TileRows<E> k = tile_rows<E>(p.k, s.b, h_k, s.first_k, s.seqlen_k, p.head_dim);
        TileRows<E> v = tile_rows<E>(p.v, s.b, h_k, s.first_k, s.seqlen_k, p.head_dim_v);
        k.advance(j0), v.advance(j0);
        float weights[T::kRows][T::kKeys], dscores[T::kRows][T::kKeys];
        tile_gradients(weights, dscores, nullptr, p, s, Queries<E>(p, s, h, i0), k, v, h, i0, j0, true, left, right,
                       lane);
        for_each_score<T>(lane, i0, j0, [&](int i, int j, int, int) { sums[i][j] += dscores[i][j]; });
    }

    __syncthreads();
    for_each_score<T>(lane, 0, 0, [&](int i, int j, int row, int key) { left[row * T::kBlockN + key] = sums[i][j]; });
    sum_broadcast<T>(left, rows_broadcast, keys_broadcast);
    const index_t slice = (static_cast<index_t>(blockIdx.y) * dbias.batch + own_b) * dbias.heads + own_h;
    for (int item = threadIdx.x; item < T::kBlockM * T::kBlockN; item += T::kThreads) {
        const int row = item / T::kBlockN, key = item % T::kBlockN;
        if (own_i0 + row < dbias.rows && own_j0 + key < dbias.keys)
            dbias.partial[(slice * dbias.rows + own_i0 + row) * dbias.keys + own_j0 + key] = left[item];
    }
}

// ---- attention_dbias_sum, grid: (elements of the bias / kDbiasSumThreads)

template <class E>
__device__ __forceinline__ void sum_bias_copies(const AttentionParams& p) {
    const BiasGrad& dbias = p.dbias;
    const index_t size = static_cast<index_t>(dbias.batch) * dbias.heads * dbias.rows * dbias.keys;
    const index_t element = static_cast<index_t>(blockIdx.x) * kDbiasSumThreads + threadIdx.x;
    if (element >= size) return;
    float sum = 0.0f;
    for (int copy = 0; copy < dbias.copies; ++copy) sum += dbias.partial[copy * size + element];
    static_cast<E*>(dbias.data)[element] = from_float<E>(sum);
}

}  // namespace fastattn
