// c = alpha a^T b for row-major a (k, m), b (k, n) and c (m, n), all of them multiples of the tile: the textbook
// product of tiles held in registers, whose rate on the P100 is known from others. It only serves to check the model.
//
// A block of 256 threads computes 128 x 128 of c; a thread 8 x 8, as 2 x 2 groups of 4 x 4. Slices of 8 rows of a and b
// go through two buffers in shared memory: while one is read, the next one arrives in registers.
// grid: (n / 128, m / 128)

constexpr int kTile = 128, kSlice = 8, kThreads = 256;

struct SgemmParams {
    const float *a, *b;
    float* c;
    int m, n, k;
    float alpha;
};

__device__ __forceinline__ void load(float (&r)[8], const float* from, int step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float4 quad = *reinterpret_cast<const float4*>(from + half * step);
        r[4 * half] = quad.x, r[4 * half + 1] = quad.y, r[4 * half + 2] = quad.z, r[4 * half + 3] = quad.w;
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) sgemm(const SgemmParams p) {
    __shared__ __align__(16) float a_slices[2][kSlice][kTile], b_slices[2][kSlice][kTile];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    // Neighbouring lanes share a column of b or a row of a, so that a warp reads few distinct bytes.
    const int row = warp / 2 * 32 + (lane % 2 + lane / 16 * 2) * 4, column = warp % 2 * 64 + lane / 2 % 8 * 4;
    const int from = warp, at = lane * 4;  // what this thread brings in: four floats of one row of each slice
    const float* a = p.a + from * p.m + blockIdx.y * kTile + at;
    const float* b = p.b + from * p.n + blockIdx.x * kTile + at;

    float c[8][8] = {};
    float4 next_a = *reinterpret_cast<const float4*>(a), next_b = *reinterpret_cast<const float4*>(b);
#pragma unroll 1
    for (int k = 0, buffer = 0; k < p.k; k += kSlice, buffer ^= 1) {
        *reinterpret_cast<float4*>(&a_slices[buffer][from][at]) = next_a;
        *reinterpret_cast<float4*>(&b_slices[buffer][from][at]) = next_b;
        __syncthreads();
        if (k + kSlice < p.k) {
            next_a = *reinterpret_cast<const float4*>(a += kSlice * p.m);
            next_b = *reinterpret_cast<const float4*>(b += kSlice * p.n);
        }
#pragma unroll
        for (int step = 0; step < kSlice; ++step) {
            float left[8], right[8];
            load(left, &a_slices[buffer][step][row], 16);
            load(right, &b_slices[buffer][step][column], 32);
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) c[i][j] = fmaf(left[i], right[j], c[i][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float* to = p.c + (blockIdx.y * kTile + row + i / 4 * 16 + i % 4) * p.n + blockIdx.x * kTile + column;
            *reinterpret_cast<float4*>(to + half * 32) =
                make_float4(p.alpha * c[i][4 * half], p.alpha * c[i][4 * half + 1], p.alpha * c[i][4 * half + 2],
                            p.alpha * c[i][4 * half + 3]);
        }
}
