// Every kernel of one element type, which -DFASTATTN_ELEMENT names: float, __half or __nv_bfloat16. tiles.cuh has the
// table.
#include "attention_bwd.cuh"
#include "attention_dbias.cuh"
#include "attention_fwd.cuh"

namespace fastattn {

using Element = FASTATTN_ELEMENT;

#define FASTATTN_DEFINE(pass, Smem, head_dim, m, n, warps, lanes_x, min_blocks) \
    extern "C" __global__ void __launch_bounds__(32 * (warps), min_blocks)      \
        FASTATTN_KERNEL_NAME(pass, head_dim, m, n)(const AttentionParams p) {   \
        pass<Element, Tile<head_dim, m, n, warps, lanes_x, min_blocks>>(p);     \
    }                                                                           \
    FASTATTN_EXPORT(FASTATTN_KERNEL_NAME(pass, head_dim, m, n))
FASTATTN_KERNELS(FASTATTN_DEFINE)

extern "C" __global__ void __launch_bounds__(kDbiasSumThreads) attention_dbias_sum(const AttentionParams p) {
    sum_bias_copies<Element>(p);
}
FASTATTN_EXPORT(attention_dbias_sum)

}  // namespace fastattn
