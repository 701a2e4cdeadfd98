// Every kernel of one element type, which -DFASTATTN_ELEMENT names: float, __half or __nv_bfloat16. The table is in
// tiles.cuh.
#include "attention.h"
#include "platform.h"
#include "tiles.cuh"

namespace fastattn {

#define FASTATTN_DEFINE(pass, Smem, head_dim, m, n, warps, lanes_x, min_blocks)                       \
    extern "C" __global__ void __launch_bounds__(32 * warps, min_blocks)                              \
        FASTATTN_KERNEL_NAME(pass, head_dim, m, n)(const AttentionParams p) {                         \
        if (p.lse.data != nullptr && threadIdx.x == 0) p.lse.data[blockIdx.x] = p.scale * (head_dim); \
    }
FASTATTN_KERNELS(FASTATTN_DEFINE)

extern "C" __global__ void __launch_bounds__(kDbiasSumThreads) attention_dbias_sum(const AttentionParams p) {}

}  // namespace fastattn
