// The tables of tiles.cuh and mma_tiles.cuh as data: what a launch has to know of each kernel. No image has them all.
#pragma once

#include <string_view>

#include "mma_tiles.cuh"
#include "tiles.cuh"

namespace fastattn {

struct Kernel {
    const char* name;
    const char* pass;
    int head_dim, block_m, block_n;  // 0 where a kernel has no tile
    int threads;                     // of a block
    int smem;                        // bytes of dynamic shared memory
};

#define FASTATTN_TEXT(name) #name
#define FASTATTN_TEXT_OF(macro) FASTATTN_TEXT(macro)
#define FASTATTN_RECORD_OF(pass, Smem, head_dim, m, n, ...)              \
    Kernel{FASTATTN_TEXT_OF(FASTATTN_KERNEL_NAME(pass, head_dim, m, n)), \
           #pass,                                                        \
           head_dim,                                                     \
           m,                                                            \
           n,                                                            \
           __VA_ARGS__::kThreads,                                        \
           Smem<__VA_ARGS__>::kBytes},
#define FASTATTN_RECORD(pass, Smem, head_dim, m, n, warps, lanes_x, min_blocks) \
    FASTATTN_RECORD_OF(pass, Smem, head_dim, m, n, Tile<head_dim, m, n, warps, lanes_x, min_blocks>)
#define FASTATTN_RECORD_MMA(pass, Smem, head_dim, m, n, warps, min_blocks) \
    FASTATTN_RECORD_OF(pass, Smem, head_dim, m, n, MmaShape<head_dim, m, n, warps, min_blocks>)

constexpr Kernel kKernels[] = {
    FASTATTN_FORWARD_KERNELS(FASTATTN_RECORD)          //
    FASTATTN_BACKWARD_KERNELS(FASTATTN_RECORD)         //
    FASTATTN_MMA_FORWARD_KERNELS(FASTATTN_RECORD_MMA)  //
    Kernel{"attention_dbias_sum", "attention_dbias_sum", 0, 0, 0, kDbiasSumThreads, 0},
};
constexpr int kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);

// The element types, by torch's names and in the order of BiasType.
constexpr const char* kElements[] = {"float32", "float16", "bfloat16"};
constexpr int kElementCount = 3;
constexpr int kElementBytes[] = {4, 2, 2};

// The position in kKernels; -1 if there is none of that name.
inline int find_kernel(std::string_view name) {
    for (int i = 0; i < kKernelCount; ++i) {
        if (name == kKernels[i].name) return i;
    }
    return -1;
}

// The position in kElements; -1 if there is none of that name.
inline int find_element(std::string_view name) {
    for (int i = 0; i < kElementCount; ++i) {
        if (name == kElements[i]) return i;
    }
    return -1;
}

}  // namespace fastattn
