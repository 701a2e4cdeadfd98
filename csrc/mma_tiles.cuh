// The shapes of the tiles that tensor cores multiply, and the table of their kernels: elements of 16 bits from compute
// capability 7.0 on, see fastattn/cuda_kernels/sources.py. Only constants, so that the launcher reads the same table.
#pragma once

#include "tiles.cuh"

namespace fastattn {

// A block of Warps warps works on 16 queries for each of them and BlockN keys at a time. A product is made of units of
// 16 x 16, of which a lane holds two rows and four contiguous columns (mma_units.cuh); lanes form a grid of 8 x 4.
template <int HeadDim, int BlockM, int BlockN, int Warps, int MinBlocks>
struct MmaShape {
    static constexpr int kHeadDim = HeadDim, kBlockM = BlockM, kBlockN = BlockN;
    static constexpr int kWarps = Warps, kLanesX = 4, kLanesY = 8, kThreads = 32 * Warps, kMinBlocks = MinBlocks;
    static constexpr int kRows = 2, kKeys = BlockN / kLanesX, kDims = HeadDim / kLanesX;

    // Bytes of a line of so many elements. The gap of 16 puts the same 16 bytes of eight neighbours in different banks,
    // and what an unrolled product reads at constant distances.
    static constexpr int line_bytes(int elements) { return 2 * elements + 16; }

    static_assert(BlockM == 16 * Warps && BlockN % 16 == 0 && HeadDim % 16 == 0, "whole units");
};

// Shared memory of each pass, in bytes.
//   forward: lines of k, lines of v, and of q. In registers q needs its lines only until v comes, and lies there.
template <class T>
struct MmaForwardSmem {
    static constexpr bool kKeepsQueries = T::kHeadDim <= 64;  // in registers
    static constexpr int kLine = T::line_bytes(T::kHeadDim);
    static constexpr int kKeys = T::kBlockN * kLine, kQueries = T::kBlockM * kLine;
    static constexpr int kBytes = kKeys + (kKeepsQueries ? kLarger<kKeys, kQueries> : kKeys + kQueries);
};

// The kernels of one element type that tensor cores multiply, in the place of those of tiles.cuh with the same names
// but for mma.
#define FASTATTN_MMA_FORWARD_KERNELS(KERNEL)                      \
    /* pass, shared memory, head_dim, M, N, warps, min. blocks */ \
    KERNEL(attention_fwd_mma, MmaForwardSmem, 32, 32, 32, 2, 6)   \
    KERNEL(attention_fwd_mma, MmaForwardSmem, 32, 64, 64, 4, 3)   \
    KERNEL(attention_fwd_mma, MmaForwardSmem, 64, 32, 32, 2, 6)   \
    KERNEL(attention_fwd_mma, MmaForwardSmem, 64, 64, 32, 4, 3)   \
    KERNEL(attention_fwd_mma, MmaForwardSmem, 128, 64, 32, 4, 2)  \
    KERNEL(attention_fwd_mma, MmaForwardSmem, 256, 48, 16, 3, 1)

}  // namespace fastattn
