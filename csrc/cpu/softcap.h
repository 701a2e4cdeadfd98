// Scores that approach a bound: softcap * tanh(score / softcap), before bias and mask.
#pragma once

#include "scores.h"

namespace fastattn {
namespace {

// To 2 units in the last place. Small arguments have a polynomial of their own (Moshier's Cephes library, tanhf): from
// the exponential only the last bits of 1 would be left of them.
FASTATTN_INLINE Floats tanh(Floats x) {
    const Floats magnitude = x < 0.0f ? -x : x, square = x * x;
    Floats y = -5.70498872745e-3f * square + 2.06390887954e-2f;
    y = y * square - 5.37397155531e-2f;
    y = y * square + 1.33314422036e-1f;
    y = y * square - 3.33332819422e-1f;
    const Floats small = y * square * x + x;
    const Floats exponential = exp2(magnitude * (-2.0f * kLog2E)), large = (1.0f - exponential) / (1.0f + exponential);
    return magnitude < 0.625f ? small : x < 0.0f ? -large : large;
}

// Of p, in the units of scores.
FASTATTN_INLINE float softcap_of(const AttentionParams& p) { return p.softcap * kLog2E; }

// Scores come under the bound; `slopes`, unless it is null, are the derivatives.
void cap_scores(float* scores, float* slopes, const Block& block, float softcap) {
    for (int i = 0; i < block.rows; ++i)
        for (int j = block.first_vector(); j < block.last_vector(); j += kLanes) {
            const Floats y = tanh(load(scores + i * block.row + j) / softcap);
            store(scores + i * block.row + j, y * softcap);
            if (slopes != nullptr) store(slopes + i * block.row + j, 1.0f - y * y);
        }
}

// The gradients of capped scores become those of the scores; they stay 0 where the band leaves nothing.
void multiply_slopes(float* dscores, const float* slopes, const Block& block) {
    for (int i = 0; i < block.rows; ++i)
        for (int j = block.first_vector(); j < block.last_vector(); j += kLanes) {
            const Floats x = load(dscores + i * block.row + j) * load(slopes + i * block.row + j);
            store(dscores + i * block.row + j, inside(x, j, block.begin(i), block.end(i), 0.0f));
        }
}

}  // namespace
}  // namespace fastattn
