// One kernel per group of built-in functions; each thread writes what it got.
#include "platform.h"

struct LaneParams {
    int* out;  // (values, 32)
};

// A warp of 32: value[i] for thread t at out[i * 32 + t].
extern "C" __global__ void lanes(const LaneParams p) {
    const int t = threadIdx.x;
    const unsigned all = 0xffffffffu;
    const int values[] = {
        __shfl_sync(all, t, 5),
        __shfl_sync(all, t, 1, 8),
        __shfl_up_sync(all, t, 3),
        __shfl_down_sync(all, t, 3, 16),
        __shfl_xor_sync(all, t, 9),
        static_cast<int>(__ballot_sync(all, t % 3 == 0)),
        __any_sync(all, t == 4),
        __all_sync(all, t != 4),
        __syncthreads_count(t < 10),
        __syncthreads_and(t < 10),
        __syncthreads_or(t < 10),
        t < 16 ? __shfl_xor_sync(0x0000ffffu, t, 1) : __shfl_xor_sync(0xffff0000u, t, 2),
        static_cast<int>(__umulhi(0x80000000u + t, 6)),
        __popc(t),
        __clz(t),
        __ffs(t),
        __float_as_int(static_cast<float>(t)),
        max(min(t, 20), 10),
    };
    int i = 0;
    for (int value : values) p.out[32 * i++ + t] = value;
}

struct MathParams {
    const float* x;  // (n), positive
    float* out;      // (5, n)
    int n;
};

extern "C" __global__ void math(const MathParams p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.n) return;
    const float x = p.x[i];
    const float values[] = {__expf(x), exp2f(x), __logf(x), rsqrtf(x), __fdividef(1.0f, x)};
    for (int k = 0; k < 5; ++k) p.out[k * p.n + i] = values[k];
}

struct HalfParams {
    const float *x, *y, *z;                 // (n)
    half *rounded, *sum, *product, *fused;  // (n)
    float* widened;                         // (n)
    int n;                                  // even
};

template <class T, class Pair>
__device__ void store_pair(T* to, Pair v) {
    to[0] = v.x;
    to[1] = v.y;
}

extern "C" __global__ void half_pairs(const HalfParams p) {
    __shared__ half2 pairs[32];
    const int i = 2 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= p.n) return;
    const half2 x = __floats2half2_rn(p.x[i], p.x[i + 1]), y = __float22half2_rn(make_float2(p.y[i], p.y[i + 1]));
    const half2 z = __halves2half2(__float2half(p.z[i]), __float2half_rn(p.z[i + 1]));
    pairs[threadIdx.x] = x;
    store_pair(p.rounded + i, pairs[threadIdx.x]);
    store_pair(p.sum + i, __hadd2(x, y));
    store_pair(p.product + i, x * y);
    store_pair(p.fused + i, __hfma2(x, y, z));
    const float2 wide = __half22float2(x);
    p.widened[i] = wide.x;
    p.widened[i + 1] = wide.y;
}

struct Bfloat16Params {
    const float *x, *y;                      // (n)
    __nv_bfloat16 *rounded, *sum, *product;  // (n)
    float* widened;                          // (n)
    int n;                                   // even
};

extern "C" __global__ void bfloat16_pairs(const Bfloat16Params p) {
    const int i = 2 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= p.n) return;
    const __nv_bfloat162 x = __floats2bfloat162_rn(p.x[i], p.x[i + 1]), y = __floats2bfloat162_rn(p.y[i], p.y[i + 1]);
    store_pair(p.rounded + i, x);
    store_pair(p.sum + i, __hadd2(x, y));
    store_pair(p.product + i, x * y);
    p.widened[i] = __low2float(x);
    p.widened[i + 1] = __bfloat162float(x.y);
}

SIMT_EXPORT(lanes, lanes)
SIMT_EXPORT(math, math)
SIMT_EXPORT(half_pairs, half_pairs)
SIMT_EXPORT(bfloat16_pairs, bfloat16_pairs)
