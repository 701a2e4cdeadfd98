// What differs between the compilers of the kernels, and nothing else: NVRTC (or nvcc) for a GPU, and a C++ compiler
// for the CPU executor, with tests/simt on the include path. No other file asks which one it is.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define SIMT_EXPORT(name, ...)  // extern "C" kernels have their names already

#if defined(__CUDACC_RTC__) && !defined(INFINITY)  // NVRTC has no <cmath>
#define INFINITY __int_as_float(0x7f800000)
#endif
#define FASTATTN_EXPORT(kernel)  // a GPU's compiler exports what is extern "C" and __global__

// The same value, of which the compiler no longer knows where it comes from: what is computed from it in a loop is
// computed there, and takes no register outside.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// 2^x, one instruction; below 2^-126 it is 0. What exp2f spends on such small results would be a third of a softmax.
__device__ __forceinline__ float exp2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
#else
#include "simt.h"

inline int opaque(int x) { return x; }

inline float exp2_approx(float x) {
    const float result = std::exp2(x);
    return result < 0x1p-126f ? 0.0f : result;
}

#define FASTATTN_EXPORT(kernel) SIMT_EXPORT(kernel, fastattn::kernel)
#endif
