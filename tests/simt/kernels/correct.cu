// Correct kernels: the numbers must be right in every schedule, and the checked build must stay silent.
#include "platform.h"

namespace fastattn {

constexpr unsigned kFullWarp = 0xffffffffu;

template <class T>
__device__ T warp_sum(T value) {
    for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(kFullWarp, value, offset);
    return value;
}
__device__ __forceinline__ float warp_max(float value) {
    for (int offset = 16; offset > 0; offset >>= 1) value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
    return value;
}

// ---- c = a @ b; static shared tiles; one block of (16, 16) threads computes 16 x 16 elements

struct MatmulParams {
    const float *a, *b;  // (rows, inner), (inner, columns)
    float* c;
    int rows, inner, columns;
};

template <int kTile>
__device__ __forceinline__ void multiply_tiles(const MatmulParams& p) {
    __shared__ float tile_a[kTile][kTile + 1], tile_b[kTile][kTile + 1];
    const int x = threadIdx.x, y = threadIdx.y;
    const int row = blockIdx.y * kTile + y, column = blockIdx.x * kTile + x;
    float sum = 0.0f;
    for (int begin = 0; begin < p.inner; begin += kTile) {
        tile_a[y][x] = row < p.rows && begin + x < p.inner ? __ldg(&p.a[row * p.inner + begin + x]) : 0.0f;
        tile_b[y][x] = column < p.columns && begin + y < p.inner ? p.b[(begin + y) * p.columns + column] : 0.0f;
        __syncthreads();
        for (int k = 0; k < kTile; ++k) sum = fmaf(tile_a[y][k], tile_b[k][x], sum);
        __syncthreads();
    }
    if (row < p.rows && column < p.columns) p.c[row * p.columns + column] = sum;
}

extern "C" __global__ void __launch_bounds__(256) matmul(const MatmulParams p) { multiply_tiles<16>(p); }

// ---- sums of rows by shuffles within warps, dynamic shared memory between them, float4 loads

struct RowSumParams {
    const float* x;  // (rows, 4 * columns4), 16-byte aligned
    float* sums;     // (rows)
    int* total;      // number of positive elements, by an atomic
    int columns4;
};

extern "C" __global__ void row_sum(const RowSumParams p) {
    extern __shared__ __align__(16) unsigned char smem[];
    float* partial = reinterpret_cast<float*>(smem);
    const auto* row = reinterpret_cast<const float4*>(p.x) + blockIdx.x * p.columns4;
    float sum = 0.0f;
    int positive = 0;
    for (int i = threadIdx.x; i < p.columns4; i += blockDim.x) {
        const float4 v = row[i];
        sum += v.x + v.y + v.z + v.w;
        positive += (v.x > 0) + (v.y > 0) + (v.z > 0) + (v.w > 0);
    }
    sum = warp_sum(sum);
    const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float block_sum = 0.0f;
        for (int w = 0; w < blockDim.x / warpSize; ++w) block_sum += partial[w];
        p.sums[blockIdx.x] = block_sum;
    }
    positive = warp_sum(positive);
    if (lane == 0) atomicAdd(p.total, positive);
}

// ---- softmax(q k^T) v for one query row per warp, keys in steps of 32: the running maximum and sum of online softmax

struct SoftmaxParams {
    const float *scores, *v;  // (rows, keys), (keys, 32)
    float *out, *lse;         // (rows, 32), (rows)
    int rows, keys;
};

extern "C" __global__ void online_softmax(const SoftmaxParams p) {
    __shared__ float weights[4][32];
    const int lane = threadIdx.x, warp = threadIdx.y, row = blockIdx.x * blockDim.y + warp;
    if (row >= p.rows) return;  // no block barrier follows
    float highest = -INFINITY, sum = 0.0f, out = 0.0f;
    for (int begin = 0; begin < p.keys; begin += 32) {
        const float score = begin + lane < p.keys ? p.scores[row * p.keys + begin + lane] : -INFINITY;
        const float new_highest = fmaxf(highest, warp_max(score));
        const float weight = __expf(score - new_highest), rescale = __expf(highest - new_highest);
        highest = new_highest;
        sum = sum * rescale + warp_sum(weight);
        out *= rescale;
        weights[warp][lane] = weight;
        __syncwarp();
        for (int k = 0; k < min(32, p.keys - begin); ++k)
            out = fmaf(weights[warp][k], p.v[(begin + k) * 32 + lane], out);
        __syncwarp();
        weights[warp][lane] *= 0.5f;  // a lane may change its own element again
    }
    p.out[row * 32 + lane] = out / sum;
    if (lane == 0) p.lse[row] = highest + __logf(sum);
}

}  // namespace fastattn

SIMT_EXPORT(matmul, fastattn::matmul)
SIMT_EXPORT(row_sum, fastattn::row_sum)
SIMT_EXPORT(online_softmax, fastattn::online_softmax)
