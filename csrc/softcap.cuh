// Scores of a product q k^T: scaled, and where there is a softcap, softcap * tanh(scale * q k^T / softcap).
#pragma once

#include "mask.cuh"

namespace fastattn {

// From one thread's place in the slopes of a tile on, where that of its score (i, j) lies: neighbours do not collide.
template <class T>
__device__ __forceinline__ constexpr int slope_offset(int i, int j) {
    return (i * T::kKeys + j) * T::kThreads;
}

// scores = q k^T becomes the scores in units of ln 2, before bias and mask.
//
// slopes, unless it is null, is shared memory for kBlockM * kBlockN floats. With a softcap the derivatives of the
// scores with respect to scale * q k^T lie there until the next product; a barrier goes first, after which all threads
// are done with what lay there. In registers they would be as many as the scores, softcap or not.
template <class T>
__device__ __forceinline__ void scale_scores(float (&scores)[T::kRows][T::kKeys], float* slopes,
                                             const AttentionParams& p) {
    if (p.softcap == 0.0f) {
        const float scale = p.scale * kLog2E;
#pragma unroll
        for (int i = 0; i < T::kRows; ++i)
#pragma unroll
            for (int j = 0; j < T::kKeys; ++j) scores[i][j] *= scale;
        return;
    }
    const float scale = p.scale / p.softcap, bound = p.softcap * kLog2E;
    if (slopes != nullptr) {
        __syncthreads();
        slopes += opaque(threadIdx.x);
    }
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
        for (int j = 0; j < T::kKeys; ++j) {
            const float y = tanhf(scale * scores[i][j]);
            scores[i][j] = bound * y;
            if (slopes != nullptr) slopes[slope_offset<T>(i, j)] = fmaf(-y, y, 1.0f);
        }
        scheduling_fence();  // what one row computes is live at a time
    }
}

// The gradients of scores become those of scale * q k^T. Where one is 0 it stays so, whatever k holds there.
template <class T>
__device__ __forceinline__ void multiply_slopes(float (&dscores)[T::kRows][T::kKeys], const float* slopes,
                                                const AttentionParams& p) {
    if (p.softcap == 0.0f) return;
    slopes += opaque(threadIdx.x);
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
#pragma unroll
        for (int j = 0; j < T::kKeys; ++j)
            if (dscores[i][j] != 0.0f) dscores[i][j] *= slopes[slope_offset<T>(i, j)];
}

}  // namespace fastattn
