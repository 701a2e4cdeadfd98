// Products of small matrices of floats in a task's scratch memory, one register tile after the other. Rows of the right
// operand and of the product are whole vectors.
#pragma once

#include "vectors.h"

namespace fastattn {
namespace {

// The accumulators of a tile: of 32 registers 6 x 4, beside 4 vectors of the right operand and 1 of the left; of 16
// registers 4 x 3.
constexpr int kTileRows = kRegisters == 32 ? 6 : 4, kTileVectors = kRegisters == 32 ? 4 : 3;

// Row r, column k lies at data + r * row + k * column: the transpose of what is stored, where column is its row.
struct Left {
    const float* data;
    long row, column;
};

// Of a block of scores, key j may be looked at by query i iff -left <= j - i <= right.
struct Band {
    int left, right;
};

template <int kRows, int kVectors>
void multiply_tile(Left a, const float* b, long b_row, float* c, long c_row, int k, bool adds) {
    Floats sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] = adds ? load(c + r * c_row + v * kLanes) : Floats{};
    for (int i = 0; i < k; ++i, a.data += a.column, b += b_row) {
        Floats right[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const Floats left = splat(a.data[r * a.row]);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) store(c + r * c_row + v * kLanes, sums[r][v]);
}

using MultiplyTile = void (*)(Left, const float*, long, float*, long, int, bool);

// The tiles of all sizes.
struct Tiles {
    MultiplyTile of[kTileRows * kTileVectors];
    MultiplyTile operator()(int rows, int vectors) const { return of[(rows - 1) * kTileVectors + vectors - 1]; }
};
template <int... I>
constexpr Tiles all_tiles(Indices<I...>) {
    return {{multiply_tile<I / kTileVectors + 1, I % kTileVectors + 1>...}};
}
constexpr Tiles kTiles = all_tiles(IndicesTo<kTileRows * kTileVectors>::Type{});

// Calls f(first column, vectors) for the vectors of n columns, in as few and as equal parts as tiles allow.
template <class F>
FASTATTN_INLINE void for_each_part(int n, F f) {
    const int all = padded(n) / kLanes, parts = (all + kTileVectors - 1) / kTileVectors;
    for (int part = 0, first = 0; part < parts; ++part) {
        const int vectors = (all - first) / (parts - part);
        f(first * kLanes, vectors);
        first += vectors;
    }
}

// C = A B for the scores of a block: tiles that the band leaves nothing of stay as they are.
void multiply_scores(int rows, int columns, int k, Left a, const float* b, long b_row, float* c, long c_row,
                     Band band) {
    for_each_part(columns, [&](int j, int vectors) {
        for (int i = 0; i < rows; i += kTileRows) {
            const int count = min(rows - i, kTileRows);
            if (i - band.left >= j + vectors * kLanes || i + count - 1 + band.right < j) continue;
            kTiles(count, vectors)({a.data + i * a.row, a.row, a.column}, b + j, b_row, c + i * c_row + j, c_row, k,
                                   false);
        }
    });
}

// C (+)= A B where A holds weights, and 0 where the band excludes them: k is summed over what the band leaves of it.
void multiply_weights(int rows, int columns, int k, Left a, const float* b, long b_row, float* c, long c_row, Band band,
                      bool adds) {
    for_each_part(columns, [&](int j, int vectors) {
        for (int i = 0; i < rows; i += kTileRows) {
            const int count = min(rows - i, kTileRows);
            const int begin = max(i - band.left, 0), end = min(i + count + band.right, k);
            kTiles(count, vectors)({a.data + i * a.row + begin * a.column, a.row, a.column}, b + begin * b_row + j,
                                   b_row, c + i * c_row + j, c_row, end - begin, adds);
        }
    });
}

}  // namespace
}  // namespace fastattn
