// The shapes of the tiles, and the table of all kernels. Only constants, so that the launcher reads the same table.
#pragma once

namespace fastattn {

// How many of a thread's kCount rows or columns are contiguous: one vector access.
template <int kCount>
constexpr int kGroupOf = kCount < 4 ? kCount : 4;
template <int a, int b>
constexpr int kLarger = a > b ? a : b;
// Floats from line to line of a transposed operand of kRows rows: whole 32s, because staggered() exchanges 16 with 16.
template <int kRows>
constexpr int kLineOf = (kRows + 31) / 32 * 32;

// A block of kWarps warps works on kBlockM queries and kBlockN keys at a time. A warp owns whole rows of every product,
// so that a row is reduced by shuffles alone; its lanes form a grid of kLanesY x kLanesX.
template <int HeadDim, int BlockM, int BlockN, int Warps, int LanesX, int MinBlocks>
struct Tile {
    static constexpr int kHeadDim = HeadDim, kBlockM = BlockM, kBlockN = BlockN;
    static constexpr int kWarps = Warps, kLanesX = LanesX, kLanesY = 32 / LanesX, kThreads = 32 * Warps;
    static constexpr int kMinBlocks = MinBlocks;  // per multiprocessor; limits the registers of a thread

    // The place of a lane in the grid, and the bit of its number that stands for n / 2 in x. Bit 0 is a row bit and the
    // next ones are column bits: neighbours read one operand by a broadcast.
    static constexpr int column_bit(int n) { return n; }
    static constexpr int x(int lane) { return lane / 2 % LanesX; }
    static constexpr int y(int lane) { return lane % 2 + lane / 2 / LanesX * 2; }

    // What one thread holds of a product: rows and columns come in groups of contiguous ones, one vector access each.
    static constexpr int kRows = BlockM / (Warps * kLanesY), kKeys = BlockN / LanesX, kDims = HeadDim / LanesX;
    static constexpr int kKeyRows = BlockN / (Warps * kLanesY);
    static constexpr int kWarpRows = BlockM / Warps;

    // Products over head_dim run in slices of kSlice, shorter ones where a tile is large. A block that has the
    // multiprocessor for itself takes the longest that fit into 48 KB: nobody else works while it waits at a barrier.
    // Products over keys run in slices of kKeySlice, which are the keys that a warp's lanes hold in one group each.
    static constexpr int kLongest = HeadDim >= 128 && BlockM + BlockN <= 64 ? 128 : 64;
    static constexpr int kSlice = HeadDim < 64 ? HeadDim : MinBlocks == 1 ? kLongest : BlockM + BlockN > 128 ? 32 : 64;
    static constexpr int kKeySlice = LanesX * kGroupOf<kKeys>;
    static constexpr bool kOneSlice = kSlice == HeadDim;

    static_assert(kRows >= 1 && kKeys >= 1 && kDims >= 1 && kKeyRows >= 1, "every thread has a part of every product");
    static_assert(BlockN % kKeySlice == 0 && kSlice % 16 == 0, "whole slices");
    static_assert(BlockN % 32 == 0, "a line of keys has no gap");
    static_assert((kRows <= 4 || kLanesY != 4) && (kKeys <= 4 || kLanesX != 4), "staggered() moves all groups alike");
};

// Shared memory of each pass, in floats: two operands, both with the contracted dimension outermost.
//   left:  q^T slice (kSlice, kBlockM)                  or weights^T (kKeySlice, kBlockM)
//   right: k^T slice (kSlice, kBlockN), and later on    v (kValueSlice, head_dim)
// With one slice, q^T stays for the whole pass, and the weights lie behind v.
template <class T>
struct ForwardSmem {
    static constexpr int kKeys = T::kSlice * T::kBlockN, kWeights = T::kKeySlice * T::kBlockM;
    // Half the values at a time, if all of them and the weights would take more than the place of the keys.
    static constexpr bool kHalves = T::kOneSlice && T::kKeySlice * T::kHeadDim + kWeights > kKeys;
    static constexpr int kValueSlice = kHalves ? T::kKeySlice / 2 : T::kKeySlice, kValues = kValueSlice * T::kHeadDim;
    static constexpr int kQueries = T::kSlice * kLineOf<T::kBlockM>;
    static constexpr int kLeft = T::kOneSlice ? kQueries : kLarger<kQueries, kWeights>;
    static constexpr int kRight = kLarger<kKeys, kValues + (T::kOneSlice ? kWeights : 0)>;
    static constexpr int kBytes = 4 * (kLeft + kRight);
};

//   left:  q^T or dout^T slice (kSlice, kBlockM)   or weights (kBlockM, kBlockN) or weights^T (kKeySlice, kBlockM)
//          or the slopes of a softcap (kBlockM, kBlockN)
//   right: k^T or v^T slice (kSlice, kBlockN)      or q or dout (kBlockM, head_dim) or k (kKeySlice, head_dim)
template <class T>
struct BackwardSmem {
    static constexpr int kLeft = kLarger<T::kSlice * kLineOf<T::kBlockM>, T::kBlockM * T::kBlockN>;
    static constexpr int kRight = kLarger<T::kSlice * T::kBlockN, T::kHeadDim * kLarger<T::kBlockM, T::kKeySlice>>;
    static constexpr int kBytes = 4 * (kLeft + kRight);
};

// A block of attention_bwd_dbias has scores only, whatever the head_dim, which it takes slice by slice.
template <class T>
struct ScoresSmem {
    static constexpr int kLeft = T::kBlockM * kLarger<T::kSlice, T::kBlockN>, kRight = T::kSlice * T::kBlockN;
    static constexpr int kBytes = 4 * (kLeft + kRight);
};

// The kernels of one element type: the pass and its tile. All of them and the sum of bias gradients are 19; where
// tensor cores multiply, those of mma_tiles.cuh take their place.
#define FASTATTN_FORWARD_KERNELS(KERNEL)                                   \
    /* pass, shared memory, head_dim, M, N, warps, lanes x, min. blocks */ \
    KERNEL(attention_fwd, ForwardSmem, 32, 32, 32, 2, 8, 4)                \
    KERNEL(attention_fwd, ForwardSmem, 32, 64, 64, 4, 8, 2)                \
    KERNEL(attention_fwd, ForwardSmem, 64, 96, 96, 6, 8, 2)                \
    KERNEL(attention_fwd, ForwardSmem, 64, 32, 32, 2, 8, 4)                \
    KERNEL(attention_fwd, ForwardSmem, 64, 64, 64, 4, 8, 2)                \
    KERNEL(attention_fwd, ForwardSmem, 128, 64, 32, 4, 8, 2)               \
    KERNEL(attention_fwd, ForwardSmem, 256, 64, 32, 8, 16, 1)
#define FASTATTN_BACKWARD_KERNELS(KERNEL)                         \
    KERNEL(attention_bwd, BackwardSmem, 32, 32, 32, 2, 8, 4)      \
    KERNEL(attention_bwd, BackwardSmem, 64, 48, 96, 6, 8, 1)      \
    KERNEL(attention_bwd, BackwardSmem, 64, 32, 32, 2, 8, 4)      \
    KERNEL(attention_bwd, BackwardSmem, 64, 64, 64, 4, 8, 2)      \
    KERNEL(attention_bwd, BackwardSmem, 128, 32, 32, 4, 16, 2)    \
    KERNEL(attention_bwd, BackwardSmem, 256, 32, 32, 8, 16, 1)    \
    KERNEL(attention_bwd_dq, BackwardSmem, 32, 32, 32, 2, 8, 4)   \
    KERNEL(attention_bwd_dq, BackwardSmem, 64, 32, 32, 2, 8, 4)   \
    KERNEL(attention_bwd_dq, BackwardSmem, 128, 32, 32, 4, 16, 2) \
    KERNEL(attention_bwd_dq, BackwardSmem, 256, 32, 32, 8, 16, 1) \
    KERNEL(attention_bwd_dbias, ScoresSmem, 256, 32, 32, 2, 8, 4)

// The kernel's name, for example attention_fwd_d64_64x64.
#define FASTATTN_KERNEL_NAME(pass, head_dim, m, n) pass##_d##head_dim##_##m##x##n

constexpr int kDbiasSumThreads = 256;  // of attention_dbias_sum: one thread per element of the bias

}  // namespace fastattn
