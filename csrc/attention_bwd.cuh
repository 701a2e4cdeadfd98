// Gradients of attention (Dao 2023, Algorithm 2), with P = exp(S - lse) computed again from q, k and lse:
//   dV = (f P)^T dout      dP = f (dout V^T)      dS = P (dP - delta)      dQ = scale dS K      dK = scale dS^T Q
// f is the factor of dropout and delta = rowsum(out dout) - dlse. Every element of every gradient is summed up by one
// thread in a fixed order: two runs give the same bits, and nothing is atomic.
//
// attention_bwd: a block computes dK and dV of one (batch, key head). It walks over key tiles, over the query heads of
//   the group and over query tiles. With gridDim.x = 1 it has all key tiles and computes dQ, too: each tile of it is
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

// ---- what all of them read, and delta

// A head's rows from some query on. What there is one of for each row lies alike in lse, delta and dlse.
template <class E>
struct Queries {
    TileRows<E> q, out, dout;
    index_t first;

    __device__ __forceinline__ Queries(const AttentionParams& p, const Sequence& s, int h, int i0)
        : q(tile_rows<E>(p.q, s.b, h, s.first_q, s.seqlen_q, p.head_dim)),
          out(tile_rows<E>(p.out, s.b, h, s.first_q, s.seqlen_q, p.head_dim_v)),
          dout(tile_rows<E>(p.dout, s.b, h, s.first_q, s.seqlen_q, p.head_dim_v)),
          first(s.b * p.lse.batch + h * p.lse.head + s.first_q) {
        advance(i0);
    }

    __device__ __forceinline__ void advance(int n) {
        q.advance(n);
        out.advance(n);
        dout.advance(n);
        first += n;
    }
};

// rowsum(out dout) of kCount rows, `step` rows apart, whose loads are on their way together; four elements per lane.
template <bool kAligned, int kLanes, class E, int kCount>
__device__ __forceinline__ void multiply_out_dout(float (&sum)[kCount], const Queries<E>& queries, int row, int step,
                                                  int d0) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) sum[n] = 0.0f;
#pragma unroll 1
    for (int d = d0; d < queries.out.dims; d += 4 * kLanes) {
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
            const E *out = queries.out.row(row + n * step), *dout = queries.dout.row(row + n * step);
            const float4 x =
                kAligned ? to_floats(*reinterpret_cast<const Quad<E>*>(out + d)) : queries.out.load(out, d);
            const float4 y =
                kAligned ? to_floats(*reinterpret_cast<const Quad<E>*>(dout + d)) : queries.dout.load(dout, d);
            sum[n] = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, sum[n]))));
        }
    }
}

// delta of `count` queries. The barriers of the next product are between it and its readers.
template <class E, class T>
__device__ __forceinline__ void write_delta(const AttentionParams& p, const Queries<E>& queries, int count) {
    constexpr int kLanes = T::kHeadDim / 4 < 32 ? T::kHeadDim / 4 : 32;  // for each row
    constexpr int kStep = T::kThreads / kLanes, kAtOnce = 4;
    const int d0 = threadIdx.x % kLanes * 4, first = threadIdx.x / kLanes;
    const bool is_aligned = min(queries.out.aligned_dims, queries.dout.aligned_dims) > 0;
#pragma unroll 1
    for (int row = first; row - first < count; row += kAtOnce * kStep) {
        float sum[kAtOnce];
        if (is_aligned)
            multiply_out_dout<true, kLanes>(sum, queries, row, kStep, d0);
        else
            multiply_out_dout<false, kLanes>(sum, queries, row, kStep, d0);
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
#pragma unroll
            for (int bit = kLanes / 2; bit > 0; bit /= 2) sum[n] += __shfl_xor_sync(0xffffffffu, sum[n], bit);
            if (d0 > 0 || row + n * kStep >= count) continue;
            const index_t query = queries.first + row + n * kStep;
            p.delta.data[query] = sum[n] - (p.dlse.data == nullptr ? 0.0f : p.dlse.data[query]);
        }
    }
}

// Values of this thread's rows; `beyond` where there is no such query.
template <class T>
__device__ __forceinline__ void load_per_row(float (&x)[T::kRows], const float* from, int rows, float beyond,
                                             const Lane<T>& lane) {
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
        const int row = lane.template row<T::kRows>(i);
        x[i] = row < rows ? from[row] : beyond;
    }
}

// ---- what all of them compute: P and dS of one tile

// P = exp(scores - lse)
template <class E, class T>
__device__ __forceinline__ void to_weights(float (&scores)[T::kRows][T::kKeys], const AttentionParams& p,
                                           const Queries<E>& queries, const Lane<T>& lane) {
    float lse[T::kRows];
    load_per_row(lse, p.lse.data + queries.first, queries.q.rows, INFINITY, lane);
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
        const float reference = lse[i] == -INFINITY ? INFINITY : lse[i] * kLog2E;  // no key allowed: weights are 0
#pragma unroll
        for (int j = 0; j < T::kKeys; ++j) scores[i][j] = exp2_approx(scores[i][j] - reference);
    }
}

// delta of rows whose keys are all in this tile: rowsum(P dP) - dlse. Divided by rowsum(P), which is 1 but for
// rounding, the sum is their mean; so that dS of a row with one key is 0. The gradient of a bias reads delta again.
template <class E, class T>
__device__ __forceinline__ void delta_of_rows(float (&delta)[T::kRows], const float (&weights)[T::kRows][T::kKeys],
                                              const float (&dweights)[T::kRows][T::kKeys], const AttentionParams& p,
                                              const Queries<E>& queries, const Lane<T>& lane) {
    float dlse[T::kRows] = {};
    if (p.dlse.data != nullptr) load_per_row(dlse, p.dlse.data + queries.first, queries.q.rows, 0.0f, lane);
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
        float sum = 0.0f, total = 0.0f;
#pragma unroll
        for (int j = 0; j < T::kKeys; ++j) {
            sum = fmaf(weights[i][j], dweights[i][j], sum);
            total += weights[i][j];
        }
        sum = row_sum<T>(sum), total = row_sum<T>(total);
        delta[i] = (total == 0.0f ? 0.0f : __fdividef(sum, total)) - dlse[i];
        const int row = lane.template row<T::kRows>(i);
        if (p.bias.data != nullptr && lane.x == 0 && row < queries.q.rows) p.delta.data[queries.first + row] = delta[i];
    }
}

// weights = P where it is kept, else 0, and dscores = dS of a tile.
template <class E, class T>
__device__ __forceinline__ void tile_gradients(float (&weights)[T::kRows][T::kKeys],
                                               float (&dscores)[T::kRows][T::kKeys], const AttentionParams& p,
                                               const Sequence& s, const Queries<E>& queries, const TileRows<E>& k,
                                               const TileRows<E>& v, int h, int i0, int j0, bool has_delta, float* left,
                                               float* right, const Lane<T>& lane) {
    // In this order what the next products read again was read last, and is still in L2: q, k, dout.
    multiply_rows(dscores, queries.dout, v, left, right, lane);
    multiply_rows(weights, queries.q, k, left, right, lane);
    finish_scores<E>(weights, p, s, h, i0, j0, lane);
    to_weights(weights, p, queries, lane);

    const Dropout dropout(p, s.b, h);
    const Kept<T> kept = dropout.is_on ? dropout.keep_scores(i0, j0, lane) : Kept<T>{0};
    if (dropout.is_on) {
        for_each_score<T>(lane, i0, j0, [&](int i, int j, int, int) {
            dscores[i][j] = kept(i, j) ? p.dropout_rescale * dscores[i][j] : 0.0f;
        });
    }
    float delta[T::kRows];
    if (has_delta)
        load_per_row(delta, p.delta.data + queries.first, queries.q.rows, 0.0f, lane);
    else
        delta_of_rows(delta, weights, dscores, p, queries, lane);
    for_each_score<T>(lane, i0, j0,
                      [&](int i, int j, int, int) { dscores[i][j] = weights[i][j] * (dscores[i][j] - delta[i]); });
    if (dropout.is_on) {
        for_each_score<T>(lane, i0, j0, [&](int i, int j, int, int) {
            if (!kept(i, j)) weights[i][j] = 0.0f;
        });
    }
}

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

// ---- attention_bwd

// Where dQ is summed up between key tiles: in dq itself if that holds floats, else in dq_sum.
template <class E>
__device__ __forceinline__ TileRows<float> dq_sum_rows(const AttentionParams& p, const Sequence& s, int h) {
    if (p.dq_sum.data == nullptr) return tile_rows<float>(p.dq, s.b, h, s.first_q, s.seqlen_q, p.head_dim);
    float* data = p.dq_sum.data + (s.b * p.dq_sum.batch + h * p.dq_sum.head + s.first_q) * p.head_dim;
    return {data, p.head_dim, s.seqlen_q, p.head_dim, p.head_dim % 4 == 0 ? p.head_dim : 0};
}

// dQ of one query tile += scale dS K, or the first part of it.
template <class E, class T>
__device__ __forceinline__ void add_to_dq(const TileRows<float>& dq_sum, const float (&dscores)[T::kRows][T::kKeys],
                                          const TileRows<E>& k, const AttentionParams& p, const Sequence& s, int h,
                                          int i0, int j0, float* left, float* right, const Lane<T>& lane) {
    float sums[T::kRows][T::kDims];
    clear(sums);
    add_weighted<T::kKeySlice>(sums, dscores, k, left, right, lane);
    const Range keys = key_range<T>(p, s, i0);
    const bool is_first = j0 == keys.begin, is_last = j0 + T::kBlockN >= keys.end;
    for_each_row<T::kRows>(dq_sum, lane, [&](int i, float* row) {
#pragma unroll
        for (int d = 0; d < T::kDims; d += 4) {
            const int dim = lane.template column<T::kDims>(d);
            const float4 x = is_first ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : dq_sum.load(row, dim);
            sums[i][d] = fmaf(p.scale, sums[i][d], x.x);
            sums[i][d + 1] = fmaf(p.scale, sums[i][d + 1], x.y);
            sums[i][d + 2] = fmaf(p.scale, sums[i][d + 2], x.z);
            sums[i][d + 3] = fmaf(p.scale, sums[i][d + 3], x.w);
            if (sizeof(E) == sizeof(float) || !is_last)
                dq_sum.store(row, dim, make_float4(sums[i][d], sums[i][d + 1], sums[i][d + 2], sums[i][d + 3]));
        }
    });
    if (sizeof(E) == sizeof(float) || !is_last) return;
    TileRows<E> dq = tile_rows<E>(p.dq, s.b, h, s.first_q, s.seqlen_q, p.head_dim);
    dq.advance(i0);
    store_rows(dq, sums, 1.0f, lane);
}

// dQ = 0 where no key tile will come by.
template <class E, class T>
__device__ __forceinline__ void clear_dq(const AttentionParams& p, const Sequence& s, int h, const Lane<T>& lane) {
    TileRows<E> dq = tile_rows<E>(p.dq, s.b, h, s.first_q, s.seqlen_q, p.head_dim);
#pragma unroll 1
    for (int i0 = 0; i0 < s.seqlen_q; i0 += T::kBlockM, dq.advance(T::kBlockM)) {
        const Range keys = key_range<T>(p, s, i0);
        if (keys.begin < keys.end) continue;
        float zeros[T::kRows][T::kDims];
        clear(zeros);
        store_rows(dq, zeros, 1.0f, lane);
    }
}

// The tokens of no sequence have gradients of 0.
template <class E>
__device__ __forceinline__ void clear_orphans(const AttentionParams& p, const Sequence& s, int h_k, bool has_all_keys) {
    const int group = p.nheads / p.nheads_k;
    const Orphans queries = orphans(p.cu_seqlens_q, s.b, p.batch, s.first_q, s.seqlen_q, p.total_q);
    for (int h = h_k * group; has_all_keys && h < (h_k + 1) * group; ++h) clear_rows<E>(p.dq, h, queries, p.head_dim);
    const Orphans keys = orphans(p.cu_seqlens_k, s.b, p.batch, s.first_k, s.seqlen_k, p.total_k);
    clear_rows<E>(p.dk, h_k, keys, p.head_dim);
    clear_rows<E>(p.dv, h_k, keys, p.head_dim_v);
}

// dK and dV of batch b and key head h_k; with all keys, dQ.
template <class E, class T>
__device__ __forceinline__ void key_head_gradients(const AttentionParams& p, int b, int h_k) {
    extern __shared__ __align__(16) unsigned char smem[];
    float* left = reinterpret_cast<float*>(smem);
    float* right = left + BackwardSmem<T>::kLeft;

    const int group = p.nheads == p.nheads_k ? 1 : p.nheads / p.nheads_k;
    const Sequence s(p, b);
    const bool has_all_keys = gridDim.x == 1;
    // A row that this tile has all keys of needs nothing but the tile for its delta.
    const bool has_delta = !has_all_keys || s.seqlen_k > T::kBlockN;
    if (p.cu_seqlens_q != nullptr) clear_orphans<E>(p, s, h_k, has_all_keys);
    for (int h = h_k * group; has_all_keys && h < (h_k + 1) * group; ++h) {
        if (has_delta) write_delta<E, T>(p, Queries<E>(p, s, h, 0), s.seqlen_q);
        clear_dq<E>(p, s, h, Lane<T>());
    }

    TileRows<E> k = tile_rows<E>(p.k, b, h_k, s.first_k, s.seqlen_k, p.head_dim);
    TileRows<E> v = tile_rows<E>(p.v, b, h_k, s.first_k, s.seqlen_k, p.head_dim_v);
    const int first_j0 = blockIdx.x * T::kBlockN, step = gridDim.x * T::kBlockN;
    k.advance(first_j0), v.advance(first_j0);
#pragma unroll 1
    for (int j0 = first_j0; j0 < s.seqlen_k; j0 += step) {
        const Range range = query_range<T>(p, s, j0);
        float dk[T::kKeyRows][T::kDims], dv[T::kKeyRows][T::kDims];
        clear(dk);
        clear(dv);
#pragma unroll 1
        for (int h = h_k * group; h < (h_k + 1) * group; ++h) {
            Queries<E> queries(p, s, h, range.begin);
            TileRows<float> dq_sum = dq_sum_rows<E>(p, s, h);
            dq_sum.advance(range.begin);
#pragma unroll 1
            for (int i0 = range.begin; i0 < range.end; i0 += T::kBlockM) {
                const Lane<T> lane;
                float weights[T::kRows][T::kKeys], dscores[T::kRows][T::kKeys];
                tile_gradients(weights, dscores, p, s, queries, k, v, h, i0, j0, has_delta, left, right, lane);
                add_weighted_transposed(dk, dscores, queries.q, left, right, lane);
                if (has_all_keys) add_to_dq(dq_sum, dscores, k, p, s, h, i0, j0, left, right, lane);
                add_weighted_transposed(dv, weights, queries.dout, left, right, lane);
                queries.advance(T::kBlockM);
                dq_sum.advance(T::kBlockM);
            }
        }
        TileRows<E> to_dk = tile_rows<E>(p.dk, b, h_k, s.first_k, s.seqlen_k, p.head_dim);
        TileRows<E> to_dv = tile_rows<E>(p.dv, b, h_k, s.first_k, s.seqlen_k, p.head_dim_v);
        to_dk.advance(j0), to_dv.advance(j0);
        const Lane<T> lane;
        store_rows(to_dk, dk, p.scale, lane);
        store_rows(to_dv, dv, p.dropout_rescale, lane);
        k.advance(step), v.advance(step);
    }
}

// grid: (1 or key tiles, nheads_k, batch)
template <class E, class T>
__device__ __forceinline__ void attention_bwd(const AttentionParams& p) {
    for_each_batch(p, [&](int b) { key_head_gradients<E, T>(p, b, blockIdx.y); });
}

// ---- attention_bwd_dq

// dQ of rows i0 ... of batch b and head h.
template <class E, class T>
__device__ __forceinline__ void query_gradients(const AttentionParams& p, int b, int h, int i0) {
    extern __shared__ __align__(16) unsigned char smem[];
    float* left = reinterpret_cast<float*>(smem);
    float* right = left + BackwardSmem<T>::kLeft;

    const int h_k = key_head(p, h);
    const Sequence s(p, b);
    const Lane<T> lane;
    if (p.cu_seqlens_q != nullptr)
        clear_rows<E>(p.dq, h, orphans(p.cu_seqlens_q, b, p.batch, s.first_q, s.seqlen_q, p.total_q), p.head_dim);
    if (i0 >= s.seqlen_q) return;

    const Queries<E> queries(p, s, h, i0);
    write_delta<E, T>(p, queries, min(T::kBlockM, queries.q.rows));
    float sums[T::kRows][T::kDims];
    clear(sums);
    const Range keys = key_range<T>(p, s, i0);
    TileRows<E> k = tile_rows<E>(p.k, b, h_k, s.first_k, s.seqlen_k, p.head_dim);
    TileRows<E> v = tile_rows<E>(p.v, b, h_k, s.first_k, s.seqlen_k, p.head_dim_v);
    k.advance(keys.begin), v.advance(keys.begin);
#pragma unroll 1
    for (int j0 = keys.begin; j0 < keys.end; j0 += T::kBlockN) {
        float weights[T::kRows][T::kKeys], dscores[T::kRows][T::kKeys];
        tile_gradients(weights, dscores, p, s, queries, k, v, h, i0, j0, true, left, right, lane);
        add_weighted<T::kKeySlice>(sums, dscores, k, left, right, lane);
        k.advance(T::kBlockN), v.advance(T::kBlockN);
    }
    TileRows<E> dq = tile_rows<E>(p.dq, b, h, s.first_q, s.seqlen_q, p.head_dim);
    dq.advance(i0);
    store_rows(dq, sums, p.scale, lane);
}

// grid: (query tiles, nheads, batch)
template <class E, class T>
__device__ __forceinline__ void attention_bwd_dq(const AttentionParams& p) {
    for_each_batch(p, [&](int b) { query_gradients<E, T>(p, b, blockIdx.y, blockIdx.x * T::kBlockM); });
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
    float* right = left + ScoresSmem<T>::kLeft;
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
        const int h_k = key_head(p, h);
        TileRows<E> k = tile_rows<E>(p.k, s.b, h_k, s.first_k, s.seqlen_k, p.head_dim);
        TileRows<E> v = tile_rows<E>(p.v, s.b, h_k, s.first_k, s.seqlen_k, p.head_dim_v);
        k.advance(j0), v.advance(j0);
        float weights[T::kRows][T::kKeys], dscores[T::kRows][T::kKeys];
        tile_gradients(weights, dscores, p, s, Queries<E>(p, s, h, i0), k, v, h, i0, j0, true, left, right, lane);
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
