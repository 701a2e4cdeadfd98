// Gradients of attention (Dao 2023, Algorithm 2), with P = exp(S - lse) computed again from q, k and lse:
//   dV = (f P)^T dout      dP = f (dout V^T)      dS = P (dP - delta)      dQ = scale dS K      dK = scale dS^T Q
// f is the factor of dropout and delta = rowsum(out dout) - dlse. Every element of every gradient is summed up by one
// thread in a fixed order: two runs give the same bits, and nothing is atomic.
//
// attention_bwd: a block computes dK and dV of one (batch, key head). It walks over key tiles, over the query heads of
//   the group and over query tiles. With gridDim.y = 1 it has all key tiles and computes dQ, too: each tile of it is
//   read and written again for the next key tile by the thread that owns it. Five products, S and dP once.
// attention_bwd_dq: where there are too few (batch, head) pairs to fill the card, attention_bwd runs with a block for
//   each key tile and leaves dQ to this kernel, a block for each query tile. It goes first, because it writes delta.
// attention_bwd_dbias: a block sums up dS over all that its tile of the bias is broadcast to.
//
// shared memory: the two operands of one product at a time. registers: P and dS of a tile, and the sums.
#pragma once

#include "mask.cuh"
#include "philox.cuh"

namespace fastattn {

// ---- what all of them compute: P and dS of one tile

// delta of queries i0 ... i0 + kBlockM - 1, a warp per row. The barriers of the next product are between it and its
// readers.
template <class E, class T>
__device__ __forceinline__ void write_delta(const AttentionParams& p, const Sequence& s, int h, int i0) {
    const TileRows<E> out = tile_rows<E>(p.out, s.b, h, s.first_q, i0, s.seqlen_q, p.head_dim_v);
    const TileRows<E> dout = tile_rows<E>(p.dout, s.b, h, s.first_q, i0, s.seqlen_q, p.head_dim_v);
    float* delta = per_row(p.delta, s, h) + i0;
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < min(T::kBlockM, out.rows); row += T::kWarps) {
        float sum = 0.0f;
        for (int d = lane; d < p.head_dim_v; d += 32)
            sum = fmaf(to_float(out.data[row * out.stride + d]), to_float(dout.data[row * dout.stride + d]), sum);
#pragma unroll
        for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
        const float dlse = p.dlse.data == nullptr ? 0.0f : per_row(p.dlse, s, h)[i0 + row];
        if (lane == 0) delta[row] = sum - dlse;
    }
}

// Row values of this thread's rows; `beyond` where the sequence has no such query.
template <class T>
__device__ __forceinline__ void load_per_row(float (&x)[T::kRows], const PerRow& from, const Sequence& s, int h, int i0,
                                             float beyond, const Lane<T>& lane) {
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
        const int query = i0 + lane.template row<T::kRows>(i);
        x[i] = query < s.seqlen_q ? per_row(from, s, h)[query] : beyond;
    }
}

// weights = f P and dscores = dS of the tile (i0, j0).
template <class E, class T>
__device__ __forceinline__ void tile_gradients(float (&weights)[T::kRows][T::kKeys],
                                               float (&dscores)[T::kRows][T::kKeys], const AttentionParams& p,
                                               const Sequence& s, int h, int h_k, int i0, int j0, float* left,
                                               float* right, const Lane<T>& lane) {
    multiply_rows(weights, tile_rows<E>(p.q, s.b, h, s.first_q, i0, s.seqlen_q, p.head_dim),
                  tile_rows<E>(p.k, s.b, h_k, s.first_k, j0, s.seqlen_k, p.head_dim), left, right, lane);
    finish_scores<E>(weights, p, s, h, i0, j0, lane);
    float row[T::kRows];
    load_per_row(row, p.lse, s, h, i0, INFINITY, lane);
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
        if (row[i] == -INFINITY) row[i] = INFINITY;  // no key allowed: all weights are 0
#pragma unroll
        for (int j = 0; j < T::kKeys; ++j) weights[i][j] = __expf(weights[i][j] - row[i]);
    }

    multiply_rows(dscores, tile_rows<E>(p.dout, s.b, h, s.first_q, i0, s.seqlen_q, p.head_dim_v),
                  tile_rows<E>(p.v, s.b, h_k, s.first_k, j0, s.seqlen_k, p.head_dim_v), left, right, lane);
    load_per_row(row, p.delta, s, h, i0, 0.0f, lane);
    const Dropout dropout(p, s.b, h);
    constexpr int kGroup = kGroupOf<T::kKeys>;
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
#pragma unroll
        for (int j = 0; j < T::kKeys; j += kGroup) {
            float factor[kGroup];
#pragma unroll
            for (int e = 0; e < kGroup; ++e) factor[e] = 1.0f;
            if (dropout.is_on)
                dropout.factors(factor, i0 + lane.template row<T::kRows>(i), j0 + lane.template column<T::kKeys>(j));
#pragma unroll
            for (int e = 0; e < kGroup; ++e) {
                dscores[i][j + e] = weights[i][j + e] * (dscores[i][j + e] * factor[e] - row[i]);
                weights[i][j + e] *= factor[e];
            }
        }
}

template <class E, class T, int kRows>
__device__ __forceinline__ void store_rows(const TileRows<E>& to, const float (&x)[kRows][T::kDims], float factor,
                                           const Lane<T>& lane) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int d = 0; d < T::kDims; d += 4)
            to.store(lane.template row<kRows>(i), lane.template column<T::kDims>(d),
                     make_float4(x[i][d] * factor, x[i][d + 1] * factor, x[i][d + 2] * factor, x[i][d + 3] * factor));
}

// ---- attention_bwd

// Where dQ is summed up between key tiles: in dq itself if that holds floats, else in dq_sum.
template <class E>
__device__ __forceinline__ TileRows<float> dq_sum_rows(const AttentionParams& p, const Sequence& s, int h, int i0) {
    if (p.dq_sum.data == nullptr) return tile_rows<float>(p.dq, s.b, h, s.first_q, i0, s.seqlen_q, p.head_dim);
    float* data = p.dq_sum.data + (s.b * p.dq_sum.batch + h * p.dq_sum.head + s.first_q + i0) * p.head_dim;
    return {data, p.head_dim, max(s.seqlen_q - i0, 0), p.head_dim, p.head_dim % 4 == 0};
}

// dQ of one query tile += scale dS K, or the first part of it.
template <class E, class T>
__device__ __forceinline__ void add_to_dq(const float (&dscores)[T::kRows][T::kKeys], const TileRows<E>& k,
                                          const AttentionParams& p, const Sequence& s, int h, int i0, int j0,
                                          float* left, float* right, const Lane<T>& lane) {
    float sums[T::kRows][T::kDims];
    clear(sums);
    add_weighted(sums, dscores, k, left, right, lane);
    const Range keys = key_range<T>(p, s, i0);
    const TileRows<float> so_far = dq_sum_rows<E>(p, s, h, i0);
    const TileRows<E> dq = tile_rows<E>(p.dq, s.b, h, s.first_q, i0, s.seqlen_q, p.head_dim);
    const bool is_first = j0 == keys.begin, is_last = j0 + T::kBlockN >= keys.end;
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
#pragma unroll
        for (int d = 0; d < T::kDims; d += 4) {
            const int row = lane.template row<T::kRows>(i), dim = lane.template column<T::kDims>(d);
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (!is_first) sum = so_far.load(row, dim);
            sum.x = fmaf(p.scale, sums[i][d], sum.x);
            sum.y = fmaf(p.scale, sums[i][d + 1], sum.y);
            sum.z = fmaf(p.scale, sums[i][d + 2], sum.z);
            sum.w = fmaf(p.scale, sums[i][d + 3], sum.w);
            if (is_last)
                dq.store(row, dim, sum);
            else
                so_far.store(row, dim, sum);
        }
}

// delta of all rows of the group's heads, and dQ = 0 where no key tile will come by.
template <class E, class T>
__device__ __forceinline__ void prepare_rows(const AttentionParams& p, const Sequence& s, int h_k, int group,
                                             const Lane<T>& lane) {
    const Orphans tokens = orphans(p.cu_seqlens_q, s.b, p.batch, s.first_q, s.seqlen_q, p.total_q);
    for (int h = h_k * group; h < (h_k + 1) * group; ++h) {
        clear_rows<E>(p.dq, h, tokens, p.head_dim);
        for (int i0 = 0; i0 < s.seqlen_q; i0 += T::kBlockM) {
            write_delta<E, T>(p, s, h, i0);
            const Range keys = key_range<T>(p, s, i0);
            if (keys.begin < keys.end) continue;
            float zeros[T::kRows][T::kDims];
            clear(zeros);
            store_rows(tile_rows<E>(p.dq, s.b, h, s.first_q, i0, s.seqlen_q, p.head_dim), zeros, 1.0f, lane);
        }
    }
}

template <class E, class T>
__device__ __forceinline__ void attention_bwd(const AttentionParams& p) {
    extern __shared__ __align__(16) unsigned char smem[];
    float* left = reinterpret_cast<float*>(smem);
    float* right = left + BackwardSmem<T>::kLeft;

    const int h_k = blockIdx.x % p.nheads_k, group = p.nheads / p.nheads_k;
    const Sequence s(p, blockIdx.x / p.nheads_k);
    const Lane<T> lane;
    const bool has_all_keys = gridDim.y == 1;
    if (has_all_keys) prepare_rows<E, T>(p, s, h_k, group, lane);
    const Orphans tokens = orphans(p.cu_seqlens_k, s.b, p.batch, s.first_k, s.seqlen_k, p.total_k);
    clear_rows<E>(p.dk, h_k, tokens, p.head_dim);
    clear_rows<E>(p.dv, h_k, tokens, p.head_dim_v);

#pragma unroll 1
    for (int j0 = blockIdx.y * T::kBlockN; j0 < s.seqlen_k; j0 += gridDim.y * T::kBlockN) {
        const Range queries = query_range<T>(p, s, j0);
        const TileRows<E> k = tile_rows<E>(p.k, s.b, h_k, s.first_k, j0, s.seqlen_k, p.head_dim);
        float dk[T::kKeyRows][T::kDims], dv[T::kKeyRows][T::kDims];
        clear(dk);
        clear(dv);
#pragma unroll 1
        for (int h = h_k * group; h < (h_k + 1) * group; ++h) {
#pragma unroll 1
            for (int i0 = queries.begin; i0 < queries.end; i0 += T::kBlockM) {
                float weights[T::kRows][T::kKeys], dscores[T::kRows][T::kKeys];
                tile_gradients<E>(weights, dscores, p, s, h, h_k, i0, j0, left, right, lane);
                const TileRows<E> q = tile_rows<E>(p.q, s.b, h, s.first_q, i0, s.seqlen_q, p.head_dim);
                const TileRows<E> dout = tile_rows<E>(p.dout, s.b, h, s.first_q, i0, s.seqlen_q, p.head_dim_v);
                add_weighted_transposed(dv, weights, dout, left, right, lane);
                add_weighted_transposed(dk, dscores, q, left, right, lane);
                if (has_all_keys) add_to_dq<E>(dscores, k, p, s, h, i0, j0, left, right, lane);
            }
        }
        store_rows(tile_rows<E>(p.dk, s.b, h_k, s.first_k, j0, s.seqlen_k, p.head_dim), dk, p.scale, lane);
        store_rows(tile_rows<E>(p.dv, s.b, h_k, s.first_k, j0, s.seqlen_k, p.head_dim_v), dv, 1.0f, lane);
    }
}

// ---- attention_bwd_dq, grid: (batch * nheads, query tiles)

template <class E, class T>
__device__ __forceinline__ void attention_bwd_dq(const AttentionParams& p) {
    extern __shared__ __align__(16) unsigned char smem[];
    float* left = reinterpret_cast<float*>(smem);
    float* right = left + BackwardSmem<T>::kLeft;

    const int h = blockIdx.x % p.nheads, h_k = h / (p.nheads / p.nheads_k), i0 = blockIdx.y * T::kBlockM;
    const Sequence s(p, blockIdx.x / p.nheads);
    const Lane<T> lane;
    clear_rows<E>(p.dq, h, orphans(p.cu_seqlens_q, s.b, p.batch, s.first_q, s.seqlen_q, p.total_q), p.head_dim);
    if (i0 >= s.seqlen_q) return;

    write_delta<E, T>(p, s, h, i0);
    float dq[T::kRows][T::kDims];
    clear(dq);
    const Range keys = key_range<T>(p, s, i0);
#pragma unroll 1
    for (int j0 = keys.begin; j0 < keys.end; j0 += T::kBlockN) {
        float weights[T::kRows][T::kKeys], dscores[T::kRows][T::kKeys];
        tile_gradients<E>(weights, dscores, p, s, h, h_k, i0, j0, left, right, lane);
        const TileRows<E> k = tile_rows<E>(p.k, s.b, h_k, s.first_k, j0, s.seqlen_k, p.head_dim);
        add_weighted(dq, dscores, k, left, right, lane);
    }
    store_rows(tile_rows<E>(p.dq, s.b, h, s.first_q, i0, s.seqlen_q, p.head_dim), dq, p.scale, lane);
}

// ---- attention_bwd_dbias, grid: (tiles of the bias, copies)

// The n-th tile of scores that a tile of the bias is broadcast to.
struct BroadcastTiles {
    int batch, heads, rows, keys;  // how many of each

    __device__ __forceinline__ int count() const { return batch * heads * rows * keys; }
};

__device__ __forceinline__ int tiles(int n, int block) { return (n + block - 1) / block; }

// Adds up the rows or the columns of the tile in shared memory, or both, as the bias broadcasts: into its first row,
// its first column or its first element, each of which the thread that writes it may read without another barrier.
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
    float* right = left + BackwardSmem<T>::kLeft;
    const Lane<T> lane;

    // Which tile of the bias this block has, and the tiles of scores it stands for.
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
        float weights[T::kRows][T::kKeys], dscores[T::kRows][T::kKeys];
        tile_gradients<E>(weights, dscores, p, s, h, h / (p.nheads / p.nheads_k), i0, j0, left, right, lane);
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
