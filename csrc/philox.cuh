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

    // Of query i and the keys from j on: bit e says whether key j + e is kept. j is a multiple of kCount, 4 or 2.
    template <int kCount>
    __device__ __forceinline__ unsigned keep(int i, int j) const {
        const uint4 words = philox4x32(key, make_uint4(j / 4, i, head, batch));
        unsigned bits = (words.x >= threshold) | (words.y >= threshold) << 1;
        const unsigned upper = (words.z >= threshold) | (words.w >= threshold) << 1;
        if (kCount == 4) return bits | upper << 2;
        return j % 4 == 0 ? bits : upper;
    }

    // Of all scores of this thread: bit i * kKeys + j. A loop, so that its registers do not add up with those of a
    // tile.
    template <class T>
    __device__ __forceinline__ unsigned keep_scores(int i0, int j0, const Lane<T>& lane) const {
        constexpr int kGroup = kGroupOf<T::kKeys>;
        static_assert(T::kRows * T::kKeys <= 32 && kGroup > 1, "one word has all of them");
        unsigned bits = 0;
#pragma unroll 1
        for (int n = 0; n < T::kRows * T::kKeys; n += kGroup) {
            const int i = n / T::kKeys, j = n % T::kKeys;
            bits |= keep<kGroup>(i0 + lane.template row<T::kRows>(i), j0 + lane.template column<T::kKeys>(j)) << n;
        }
        return bits;
    }
};

}  // namespace fastattn
