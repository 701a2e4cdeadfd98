// Philox4x32-10 (Salmon et al. 2011) and the dropout bits made of it: a function of seed, batch, head, query and key,
// so that any tile of any kernel computes the same ones.
#pragma once

#include "tile_mma.cuh"

namespace fastattn {

__device__ __forceinline__ uint4 philox4x32(uint2 key, uint4 counter) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
        const unsigned high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key.x += 0x9E3779B9u;
        key.y += 0xBB67AE85u;
    }
    return counter;
}

// Which of a thread's scores dropout keeps: a bit for each, the last one's is bit 0.
template <class T>
struct Kept {
    static constexpr int kCount = T::kRows * T::kKeys;
    static_assert(kCount <= 32, "one word has all of them");
    unsigned bits;

    __device__ __forceinline__ bool operator()(int i, int j) const {
        return bits >> (kCount - 1 - (i * T::kKeys + j)) & 1;
    }
};

// Which weights dropout keeps. What is kept is multiplied by dropout_rescale, but not here: a factor of all of them can
// wait for their sum.
struct Dropout {
    uint2 key;
    unsigned threshold, head, batch;
    bool is_on;

    __device__ __forceinline__ Dropout(const AttentionParams& p, int b, int h)
        : key(make_uint2(0, 0)), threshold(p.dropout_threshold), head(h), batch(b), is_on(p.seed != nullptr) {
        if (is_on) key = make_uint2(static_cast<unsigned>(*p.seed), static_cast<unsigned>(*p.seed >> 32));
    }

    // Of all scores of this thread. A loop over rows, so that its registers do not add up with those of a tile, and so
    // that what depends on the keys alone is computed once before it: three of the products of a call, and what the
    // block's head has a part in.
    template <class T>
    __device__ __forceinline__ Kept<T> keep_scores(int i0, int j0, const Lane<T>& lane) const {
        constexpr int kGroup = kGroupOf<T::kKeys>;
        unsigned bits = 0;
#pragma unroll 1
        for (int i = 0; i < T::kRows; ++i)
#pragma unroll
            for (int j = 0; j < T::kKeys; j += kGroup)
                bits =
                    append<kGroup>(bits, i0 + lane.template row<T::kRows>(i), j0 + lane.template column<T::kKeys>(j));
        return {bits};
    }

  private:
    // The bits, and behind them whether query i keeps each of kCount keys from j on. j is a multiple of kCount, 4 or 2.
    template <int kCount>
    __device__ __forceinline__ unsigned append(unsigned bits, int i, int j) const {
        static_assert(kCount == 4 || kCount == 2, "all of them are in one call");
        const uint4 words = philox4x32(key, make_uint4(j / 4, i, head, batch));
        if (kCount == 4) return append(append(append(append(bits, words.x), words.y), words.z), words.w);
        const bool is_upper = j % 4 != 0;
        return append(append(bits, is_upper ? words.z : words.x), is_upper ? words.w : words.y);
    }
    __device__ __forceinline__ unsigned append(unsigned bits, unsigned word) const {
        return 2 * bits + (word >= threshold);
    }
};

}  // namespace fastattn
