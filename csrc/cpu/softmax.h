// The softmax of a block of scores over what came before it, and the gradient of it.
#pragma once

#include "scores.h"

namespace fastattn {
namespace {

// Of every row: the largest score so far, and the sum of the weights that refer to it.
struct Running {
    float* largest;
    float* sum;
};

// The random words of a block and how they decide; words is null without dropout.
struct Dropout {
    unsigned* words;
    unsigned threshold;
    float rescale;

    Ints keeps(int i) const { return reinterpret_cast<Ints>(load(words + i) >= threshold); }
};

// Scores become weights, those that dropout leaves; `out`, which was summed so far, comes to refer to the new maxima.
FASTATTN_INLINE void softmax(float* scores, const Block& block, const Dropout& dropout, Running running, float* out,
                             int out_row, bool is_first, Ahead& ahead) {
    const int first = block.first_vector(), last = block.last_vector();
    for (int i = 0; i < block.rows; ++i, scores += block.row, out += out_row) {
        ahead.fetch_row();
        const int begin = block.begin(i), end = block.end(i);
        Floats most = splat(-kInfinity), total{};
        for (int j = first; j < last; j += kLanes) {
            const Floats x = inside(load(scores + j), j, begin, end);
            store(scores + j, x);
            most = max(most, x);
        }
        float now = largest(most)[0];
        if (!is_first) now = running.largest[i] > now ? running.largest[i] : now;
        const float reference = now == -kInfinity ? 0.0f : now;
        for (int j = first; j < last; j += kLanes) {
            Floats weight = exp2(load(scores + j) - reference);
            total += weight;
            if (dropout.words != nullptr) weight = dropout.keeps(i * block.row + j) ? weight : Floats{};
            store(scores + j, weight);
        }
        float all = sum(total)[0];
        if (!is_first) {
            const float factor = exp2(splat(running.largest[i] - reference))[0];
            all += running.sum[i] * factor;
            if (factor != 1.0f)
                for (int d = 0; d < out_row; d += kLanes) store(out + d, load(out + d) * factor);
        }
        running.largest[i] = now;
        running.sum[i] = all;
    }
}

// weights: from scores to P, rescaled where dropout keeps them; dweights: from dP to dS.
// delta: rowsum(out dout) - dlse; lse: in units of ln 2, and infinite where a row has no key.
FASTATTN_INLINE void softmax_gradient(float* weights, float* dweights, const Block& block, const Dropout& dropout,
                                      const float* lse, const float* delta, Ahead& ahead) {
    const int first = block.first_vector(), last = block.last_vector();
    for (int i = 0; i < block.rows; ++i, weights += block.row, dweights += block.row) {
        ahead.fetch_row(4);
        const int begin = block.begin(i), end = block.end(i);
        for (int j = first; j < last; j += kLanes) {
            // Not above 1: huge scores, computed once more, may pass their lse by their rounding. NaN stays.
            const Floats excess = inside(load(weights + j), j, begin, end) - lse[i];
            const Floats weight = exp2(excess > 0.0f ? Floats{} : excess);
            Floats dweight = load(dweights + j), kept = weight;
            if (dropout.words != nullptr) {
                const Ints keeps = dropout.keeps(i * block.row + j);
                kept = keeps ? weight * dropout.rescale : Floats{};
                dweight = keeps ? dweight * dropout.rescale : Floats{};
            }
            store(weights + j, kept);
            // Where the band leaves nothing, the product has left dweights as it was.
            store(dweights + j, inside(weight * (dweight - delta[i]), j, begin, end, 0.0f));
        }
    }
}

}  // namespace
}  // namespace fastattn
