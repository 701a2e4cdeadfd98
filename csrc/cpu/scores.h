// A block of scores: which of them are looked at, and what mask and bias make of them. Scores are in units of ln 2:
// their exponential is a power of 2.
#pragma once

#include "products.h"
#include "rows.h"

namespace fastattn {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f, kInfinity = __builtin_inff();

// ---- keys

// The keys that a mask of keys alone leaves to a head, between the first and the last of them.
struct Keys {
    int begin = 0, end;
    bool all = true;            // the mask has nothing more to say
    const unsigned char* mask;  // null unless it is the same for all queries and excludes a key before `end`
    index_t step;

    Keys(const AttentionParams& p, const Sequence& s, int h) : end(s.seqlen_k), mask(nullptr), step(p.mask.key) {
        if (p.mask.data == nullptr) return;
        all = false;
        if (p.mask.row != 0) return;
        mask = static_cast<const unsigned char*>(p.mask.data) + s.b * p.mask.batch + h * p.mask.head;
        while (end > 0 && !mask[(end - 1) * step]) --end;
        while (begin < end && !mask[begin * step]) ++begin;
        begin = begin / 4 * 4;  // whole groups of random words
        bool has_holes = false;
        for (int j = begin; j < end; ++j) has_holes |= !mask[j * step];
        all = !has_holes;
        if (all && begin == 0) mask = nullptr;
    }

    bool sees(int j) const { return mask == nullptr || mask[j * step]; }
};

// What no query sees may hold anything, NaN too: its row becomes 0. Key j0 is the first row.
FASTATTN_INLINE void clear_unseen_rows(float* rows, int row, int dims, const Keys& keys, int j0, int count) {
    if (keys.mask == nullptr) return;
    for (int j = 0; j < count; ++j)
        if (!keys.sees(j0 + j)) fill_zero(rows + static_cast<long>(j) * row, dims);
}
FASTATTN_INLINE void clear_unseen_columns(float* rows, int row, int dims, const Keys& keys, int j0, int count) {
    if (keys.mask == nullptr) return;
    for (int j = 0; j < count; ++j)
        for (int d = 0; d < dims && !keys.sees(j0 + j); ++d) rows[static_cast<long>(d) * row + j] = 0.0f;
}

// ---- blocks

constexpr int kBlockM = 48, kBlockN = 256;

// Rows of a block that are a power of 2 apart would share the sets of the cache.
FASTATTN_INLINE int staggered(int n) { return padded(n) + kLanes; }

// Queries i0 ... i0 + rows - 1 and keys j0 ... j0 + keys - 1.
struct Block {
    int i0, rows, j0, keys, row;  // row: floats from one row of scores to the next
    Band band;

    Block(const AttentionParams& p, const Sequence& s, int i0, int rows, int j0, int keys, int row)
        : i0(i0), rows(rows), j0(j0), keys(keys), row(row) {
        const int diagonal = i0 + s.shift - j0;
        band = {min(p.left, 2 * kLongest) - diagonal, min(p.right, 2 * kLongest) + diagonal};
    }
    // The keys of row i, inside the block.
    int begin(int i) const { return min(max(i - band.left, 0), keys); }
    int end(int i) const { return max(min(i + band.right + 1, keys), 0); }
    // Those of all rows, in whole vectors, and in whole tiles of the transposed block.
    int first_vector() const { return begin(0) / kTileRows * kTileRows / kLanes * kLanes; }
    int last_vector() const { return min(padded(round_up(end(rows - 1), kTileRows)), row); }
    bool is_empty() const { return begin(0) >= end(rows - 1); }
    Band transposed() const { return {band.right, band.left}; }
};

// x, and `beyond` outside of the keys begin ... end - 1.
FASTATTN_INLINE Floats inside(Floats x, int j, int begin, int end, float beyond = -kInfinity) {
    if (j >= begin && j + kLanes <= end) return x;
    const Ints key = iota() + j;
    return ((key >= begin) & (key < end)) ? x : splat(beyond);
}

// ---- mask and bias

// Element j and those behind it of a row of a mask or a bias.
template <class B>
FASTATTN_INLINE auto elements_of_row(const B* row, index_t step, int j, int count) {
    if (step == 1) return load_some(row + j, count);
    B gathered[kLanes];
    for (int i = 0; i < min(count, kLanes); ++i) gathered[i] = row[(j + i) * step];
    return load_some(gathered, min(count, kLanes));
}

// Score = f(score, element) for a mask or a bias of type B, where the block has keys.
template <class B, class F>
FASTATTN_INLINE void combine(float* scores, const Scores& x, const Sequence& s, int h, const Block& block, F f) {
    const B* row = static_cast<const B*>(x.data) + s.b * x.batch + h * x.head + block.i0 * x.row + block.j0 * x.key;
    for (int i = 0; i < block.rows; ++i, scores += block.row, row += x.row)
        for (int j = block.begin(i) / kLanes * kLanes; j < block.end(i); j += kLanes)
            store(scores + j, f(load(scores + j), elements_of_row(row, x.key, j, block.keys - j)));
}

void add_bias_and_mask(float* scores, const AttentionParams& p, const Sequence& s, int h, const Block& block,
                       bool has_mask) {
    const auto add = [](Floats score, Floats bias) { return score + bias * kLog2E; };
    if (p.bias.data != nullptr) {
        if (p.bias_type == kBiasFloat32) combine<float>(scores, p.bias, s, h, block, add);
        if (p.bias_type == kBiasFloat16) combine<Float16>(scores, p.bias, s, h, block, add);
        if (p.bias_type == kBiasBfloat16) combine<Bfloat16>(scores, p.bias, s, h, block, add);
    }
    if (has_mask)
        combine<unsigned char>(scores, p.mask, s, h, block,
                               [](Floats score, Ints is_seen) { return is_seen ? score : splat(-kInfinity); });
}

}  // namespace
}  // namespace fastattn
