// Philox4x32-10 (Salmon et al. 2011) and the dropout bits made of it: a function of seed, batch, head, query and key,
// so that any tile of any kernel computes the same ones.
#pragma once

#include "attention.h"
#include "platform.h"

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

// What dropout multiplies a weight by: 0, or dropout_rescale where the weight is kept.
struct Dropout {
    uint2 key;
    unsigned threshold, head, batch;
    float rescale;
    bool is_on;

    __device__ __forceinline__ Dropout(const AttentionParams& p, int b, int h)
        : key(make_uint2(0, 0)),
          threshold(p.dropout_threshold),
          head(h),
          batch(b),
          rescale(p.dropout_rescale),
          is_on(p.seed != nullptr) {
        if (is_on) key = make_uint2(static_cast<unsigned>(*p.seed), static_cast<unsigned>(*p.seed >> 32));
    }

    // Factors of the 4 or 2 keys from j on, a multiple of their number, of query i.
    __device__ __forceinline__ void factors(float (&factor)[4], int i, int j) const {
        const uint4 words = philox4x32(key, make_uint4(j / 4, i, head, batch));
        factor[0] = of(words.x), factor[1] = of(words.y), factor[2] = of(words.z), factor[3] = of(words.w);
    }
    __device__ __forceinline__ void factors(float (&factor)[2], int i, int j) const {
        const uint4 words = philox4x32(key, make_uint4(j / 4, i, head, batch));
        const bool is_first_half = j % 4 == 0;
        factor[0] = of(is_first_half ? words.x : words.z), factor[1] = of(is_first_half ? words.y : words.w);
    }

    __device__ __forceinline__ float of(unsigned word) const { return word >= threshold ? rescale : 0.0f; }
};

}  // namespace fastattn
