// The random words of dropout for a block of scores: Philox4x32-10 (Salmon et al. 2011).
#pragma once

#include "vectors.h"

namespace fastattn {
namespace {

// a * m; the high halves into `high`.
FASTATTN_INLINE Words multiply_wide(Words a, unsigned m, Words& high) {
    constexpr unsigned long long kHigh = 0xffffffff00000000ull;
    const Words factor = splat(m);
    const Longs even = multiply_even(a, factor);
    const Longs odd = multiply_even(reinterpret_cast<Words>(reinterpret_cast<Longs>(a) >> 32), factor);
    high = reinterpret_cast<Words>((even >> 32) | (odd & kHigh));
    return reinterpret_cast<Words>((even & ~kHigh) | (odd << 32));
}

struct Counters {
    Words of[4];
};

FASTATTN_INLINE void philox(Counters& c, unsigned long long seed) {
    unsigned key0 = static_cast<unsigned>(seed), key1 = static_cast<unsigned>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        Words high0, high1;
        const Words low0 = multiply_wide(c.of[0], 0xD2511F53u, high0);
        const Words low1 = multiply_wide(c.of[2], 0xCD9E8D57u, high1);
        c = {{high1 ^ c.of[1] ^ key0, low1, high0 ^ c.of[3] ^ key1, low0}};
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
}

constexpr int kWordsBeyond = 4 * kLanes;  // that random_words may write behind the block

// words[i * row + j] of query i0 + i and key j0 + j, for i < rows and j < row; row and j0 are multiples of 4. The
// groups of four keys go through the rows without a gap, so that vectors are full however short a row is.
void random_words(unsigned* words, unsigned long long seed, int b, int h, int i0, int rows, int j0, int row) {
    const int groups = row / 4, count = rows * groups;
    Words group{}, query{};
    for (int i = 0; i < kLanes; ++i) group[i] = i % groups, query[i] = i0 + i / groups;
    const unsigned next_group = kLanes % groups, next_query = kLanes / groups, all = groups;
    for (int n = 0; n < count; n += kLanes, words += 4 * kLanes) {
        Counters c{{group + static_cast<unsigned>(j0 / 4), query, splat(static_cast<unsigned>(h)),
                    splat(static_cast<unsigned>(b))}};
        philox(c, seed);
        const Words even_low = zip_low(c.of[0], c.of[2]), even_high = zip_high(c.of[0], c.of[2]);
        const Words odd_low = zip_low(c.of[1], c.of[3]), odd_high = zip_high(c.of[1], c.of[3]);
        store(words, zip_low(even_low, odd_low));
        store(words + kLanes, zip_high(even_low, odd_low));
        store(words + 2 * kLanes, zip_low(even_high, odd_high));
        store(words + 3 * kLanes, zip_high(even_high, odd_high));
        group += next_group, query += next_query;
        const Words wraps = reinterpret_cast<Words>(group >= all);
        group -= wraps & all, query -= wraps;
    }
}

}  // namespace
}  // namespace fastattn
