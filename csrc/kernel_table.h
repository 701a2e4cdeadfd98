// The table of tiles.cuh as data: what a launch has to know of each kernel.
#pragma once

#include <string_view>

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
#define FASTATTN_RECORD(pass, Smem, head_dim, m, n, warps, lanes_x, min_blocks) \
    Kernel{FASTATTN_TEXT_OF(FASTATTN_KERNEL_NAME(pass, head_dim, m, n)),        \
           #pass,                                                               \
           head_dim,                                                            \
           m,                                                                   \
           n,                                                                   \
           Tile<head_dim, m, n, warps, lanes_x, min_blocks>::kThreads,          \
           Smem<Tile<head_dim, m, n, warps, lanes_x, min_blocks>>::kBytes},

constexpr Kernel kKernels[] = {
    FASTATTN_KERNELS(FASTATTN_RECORD)  //
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
