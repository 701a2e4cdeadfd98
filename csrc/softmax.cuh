// The softmax of rows whose keys come tile by tile (Milakov and Gimelshein 2018), in natural units.
#pragma once

#include "tile_mma.cuh"

namespace fastattn {

template <class T>
struct OnlineSoftmax {
    float max[T::kRows];  // of all scores so far
    float sum[T::kRows];  // of exp(score - max), over this thread's keys only

    __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
        for (int i = 0; i < T::kRows; ++i) max[i] = -INFINITY, sum[i] = 0.0f;
    }

    // scores -> exp(scores - max); what was summed up before is brought to the new maximum.
    __device__ __forceinline__ void update(float (&scores)[T::kRows][T::kKeys], float (&out)[T::kRows][T::kDims]) {
#pragma unroll
        for (int i = 0; i < T::kRows; ++i) {
            float largest = scores[i][0];
#pragma unroll
            for (int j = 1; j < T::kKeys; ++j) largest = fmaxf(largest, scores[i][j]);
            largest = fmaxf(max[i], row_max<T>(largest));
            // A row without a key so far: all its scores are -inf, and so is the old maximum.
            const float reference = largest == -INFINITY ? 0.0f : largest;
            const float rescale = __expf(max[i] - reference);
            float tile_sum = 0.0f;
#pragma unroll
            for (int j = 0; j < T::kKeys; ++j) {
                scores[i][j] = __expf(scores[i][j] - reference);
                tile_sum += scores[i][j];
            }
            sum[i] = fmaf(sum[i], rescale, tile_sum);
            max[i] = largest;
#pragma unroll
            for (int d = 0; d < T::kDims; ++d) out[i][d] *= rescale;
        }
    }

    // The sum over all keys of row i, 0 where none is allowed.
    __device__ __forceinline__ float total(int i) const { return row_sum<T>(sum[i]); }
};

}  // namespace fastattn
