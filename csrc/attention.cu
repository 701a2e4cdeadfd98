// Every kernel of one element type, which -DFASTATTN_ELEMENT names: float, __half or __nv_bfloat16. Where tensor cores
// multiply it, -DFASTATTN_UNIT names their instruction in mma_units.cuh.
//
// To be read in this order: attention.h (the arguments), tiles.cuh (the table of kernels), tile_copy.cuh, tile_mma.cuh,
// mask.cuh, softcap.cuh, softmax.cuh, attention_fwd.cuh, attention_bwd.cuh, attention_dbias.cuh. Words that all of them
// use:
//   E             the element type of the tensors; the arithmetic is in float
//   T             a Tile of tiles.cuh: its sizes, and how many rows and columns of a product each thread holds
//   i0, j0        the first query and the first key of a tile; i, j: a thread's own rows and columns of it, from 0 on
//   left, right   the operands of a product in shared memory: left (k, rows), right (k, columns), k is contracted
//   line          what an operand has for one k
//   slice         the part of the contracted dimension that is in shared memory at a time
//   staged        copied into shared memory, as floats
//   staggered     swizzle of a transposed operand, against bank conflicts: lines 4 to 7 of every 8 have row r at r ^ 16
//   swapped       swizzle of the weights' lines, against bank conflicts: in every second group of 4, neighbouring lines
//                 change places
#include "attention_bwd.cuh"
#include "attention_dbias.cuh"
#include "attention_fwd.cuh"
#ifdef FASTATTN_UNIT
#include "attention_fwd_mma.cuh"
#endif

namespace fastattn {

using Element = FASTATTN_ELEMENT;

#define FASTATTN_DEFINE(pass, Smem, head_dim, m, n, warps, lanes_x, min_blocks) \
    extern "C" __global__ void __launch_bounds__(32 * (warps), min_blocks)      \
        FASTATTN_KERNEL_NAME(pass, head_dim, m, n)(const AttentionParams p) {   \
        pass<Element, Tile<head_dim, m, n, warps, lanes_x, min_blocks>>(p);     \
    }                                                                           \
    FASTATTN_EXPORT(FASTATTN_KERNEL_NAME(pass, head_dim, m, n))
#ifdef FASTATTN_UNIT
#define FASTATTN_DEFINE_MMA(pass, Smem, head_dim, m, n, warps, min_blocks)                     \
    extern "C" __global__ void __launch_bounds__(32 * (warps), min_blocks)                     \
        FASTATTN_KERNEL_NAME(pass, head_dim, m, n)(const AttentionParams p) {                  \
        pass<Element, MmaTile<FASTATTN_UNIT, MmaShape<head_dim, m, n, warps, min_blocks>>>(p); \
    }
FASTATTN_MMA_FORWARD_KERNELS(FASTATTN_DEFINE_MMA)
#else
FASTATTN_FORWARD_KERNELS(FASTATTN_DEFINE)
#endif
FASTATTN_BACKWARD_KERNELS(FASTATTN_DEFINE)

extern "C" __global__ void __launch_bounds__(kDbiasSumThreads) attention_dbias_sum(const AttentionParams p) {
    sum_bias_copies<Element>(p);
}
FASTATTN_EXPORT(attention_dbias_sum)

}  // namespace fastattn
