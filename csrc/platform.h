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
#else
#include "simt.h"
#define FASTATTN_EXPORT(kernel) SIMT_EXPORT(kernel, fastattn::kernel)
#endif
