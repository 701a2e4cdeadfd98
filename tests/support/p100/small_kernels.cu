// The functions that the tests of the executor run, in one thread each; Python computes the same results.
// small_kernels.sass is their machine code for sm_60; python -m tests.support.p100_small_kernels writes it.

#include <cuda_fp16.h>

typedef unsigned int u32;
typedef long long s64;
typedef unsigned long long u64;

extern "C" __global__ void integers(int* out, const int* a, const int* b) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    const int x = a[i], y = b[i];
    const u32 ux = x, uy = y;
    int* to = out + i;
    auto put = [&](int value) { *to = value, to += n; };
    put(x + y);
    put(x - y);
    put(x * y);
    put(__mulhi(x, y));
    put(__umulhi(ux, uy));
    put(min(x, y));
    put(max(ux, uy));
    put(x << (uy & 31));
    put(x >> (uy & 31));
    put(ux >> (uy & 31));
    put((x & y) | (~x & i));
    put(x ^ y);
    put(y != 0 ? x / (y == -1 ? 1 : y) : 0);
    put(uy != 0 ? ux % uy : 0);
    int bytes;  // with the sign of byte 3
    asm("prmt.b32 %0, %1, %2, 0x2b61;" : "=r"(bytes) : "r"(x), "r"(y));
    put(bytes);
    put(__funnelshift_l(x, y, 7));
    put(__funnelshift_r(x, y, i & 31));
    put((ux >> 5) & 0x3f);
    put((x << 20) >> 24);
    put(abs(x));
    put(x < y ? i : x);
    put((x > 5) != (ux < uy));
}

extern "C" __global__ void wide_integers(s64* out, const s64* a, const s64* b) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    const s64 x = a[i], y = b[i];
    const u64 ux = x, uy = y;
    s64* to = out + i;
    auto put = [&](s64 value) { *to = value, to += n; };
    put(x + y);
    put(x - y);
    put(x - y + i);
    put((s64)(int)x * (int)y);
    put((u64)(u32)x * (u32)y);
    put(x * y);
    put(min(x, y));
    put(max(x, y));
    put(min(max(x, -5ll), 5ll));
    put(max(ux, uy));
    put(x << (y & 63));
    put(x >> (y & 63));
    put(ux >> 13);
    put(x < y);
    put(x <= y);
    put(x == y);
    put(ux > uy);
    put(y != 0 ? ux / uy : 0);
    put(y != 0 ? ux % uy : 0);
    put(x != 0 && (x > y || y > 7) ? 3 : 4);
}

extern "C" __global__ void floats(float* out, const float* a, const float* b) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    const float x = a[i], y = b[i];
    float* to = out + i;
    auto put = [&](float value) { *to = value, to += n; };
    put(x + y);
    put(x - fabsf(y));
    put(x * y);
    put(fmaf(x, y, 1.5f));
    put(fminf(x, y));
    put(fmaxf(-x, y));
    put(x < y);
    put(x >= y);
    put(x != y);
    put(x == y);
    put(!(x > y));
    put(isnan(x) ? 1.0f : isinf(x) ? 2.0f : 0.0f);
    put(exp2f(x));
    put(log2f(fabsf(x)));
    put(1.0f / x);
    put(sqrtf(fabsf(x)));
    put(rsqrtf(fabsf(x)));
    put((float)(int)x);
    put((float)(u32)x);
    put((float)__float_as_int(x));
    put((float)(u64)fabsf(x));
    put(__half2float(__float2half(x)));
    put(__half2float(__ushort_as_half((unsigned short)i)));
    put(__int_as_float(__float_as_int(y) & 0x7fffffff));
}

// Loops of different length, break, continue and return in every lane; then a sum over the warp and over the block.
extern "C" __global__ void flow(int* out, const int* a, int n) {
    __shared__ int sums[2];
    const int i = threadIdx.x, x = a[blockIdx.x * blockDim.x + i];
    int steps = 0;
    for (int value = x; value != 1; ++steps) {  // of the Collatz sequence
        if (steps == n) break;
        if (value % 2 == 0) {
            value /= 2;
            continue;
        }
        for (int k = 0; k < value % 3; ++k) steps += 100;
        value = 3 * value + 1;
    }
    int sum = steps;
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (i % 32 == 0) sums[i / 32] = sum;
    __syncthreads();
    int* to = out + blockIdx.x * blockDim.x + i;
    const int stride = gridDim.x * blockDim.x;
    to[0] = steps;
    to[stride] = sums[0] + sums[1];
    to[2 * stride] = __shfl_up_sync(~0u, x, 3, 16);
    to[3 * stride] = __shfl_down_sync(~0u, x, 5);
    to[4 * stride] = __shfl_sync(~0u, x, i + 1, 8);
    to[5 * stride] = __ballot_sync(~0u, x & 1);
    to[6 * stride] = __all_sync(~0u, x > 0) + 2 * __any_sync(~0u, x > 90);
    if (x % 2) return;
    to[7 * stride] = x;
}

// Shared memory in units of 4, 8 and 16 bytes, at a stride between lanes, and bytes of global memory.
extern "C" __global__ void memory(float* out, const float* a, const unsigned char* bytes, int stride) {
    __shared__ __align__(16) float tile[1024];
    const int i = threadIdx.x;
    for (int k = i; k < 1024; k += 32) tile[k] = a[k];
    __syncthreads();
    const float one = tile[i * stride % 1024];
    const float2 two = *(const float2*)&tile[2 * i * stride % 1024];
    const float4 four = *(const float4*)&tile[4 * i * stride % 1024];
    out[i] = one;
    *(float2*)&out[32 + 2 * i] = two;
    *(float4*)&out[96 + 4 * i] = four;
    out[224 + i] = __int_as_float(bytes[i] + 3 * ((const signed char*)bytes)[i] + 5 * ((const short*)bytes)[i]);
}
