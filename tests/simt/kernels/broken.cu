// One kernel with one defect of each class, chosen by -DDEFECT=...; with DEFECT=none it is correct.
// Every block of two warps reverses its 64 numbers through shared memory and adds up neighbours within a warp.
#include "platform.h"

enum class Defect {
    none,
    missing_barrier,
    missing_syncwarp,
    shuffle_for_syncwarp,
    divergent_barrier,
    early_return,
    uninitialised_shared,
    global_read,
    global_write,
    shared_read,
    shared_read_by_pointer,
    shared_write,
    race_between_blocks,
    plain_against_atomic,
    write_to_const,
    misaligned,
    lane_returned,
    lane_elsewhere,
    lane_not_in_mask,
    source_not_in_mask,
};

__device__ constexpr bool has(Defect defect) { return Defect::DEFECT == defect; }

__device__ float sum_of(float4 v) { return v.x + v.y + v.z + v.w; }

struct Params {
    const float* x;  // (n)
    float* y;        // (n)
    int* counter;    // (1)
    int n;
};

extern "C" __global__ void reverse(const Params p) {
    __shared__ float tile[64];
    extern __shared__ __align__(16) unsigned char smem[];
    float* exchange = reinterpret_cast<float*>(smem);  // [64]
    const int thread = threadIdx.x, lane = thread % warpSize, i = blockIdx.x * 64 + thread;
    if (has(Defect::early_return) && i >= p.n) return;
    if (has(Defect::write_to_const)) const_cast<float*>(p.x)[0] = 1.0f;

    // From global to shared memory
    const float value = i < p.n || has(Defect::global_read) ? p.x[i] : 0.0f;
    if (!has(Defect::uninitialised_shared) || thread != 7) tile[thread] = value;
    if (!has(Defect::missing_barrier) && !has(Defect::divergent_barrier)) __syncthreads();
    if (has(Defect::divergent_barrier)) {
        if (thread < 32)
            __syncthreads();  // one half here
        else
            __syncthreads();  // the other half here
    }
    float sum = tile[63 - thread];
    if (has(Defect::shared_read)) sum += tile[64 - thread];
    const float* last_part = &tile[48];
    if (has(Defect::shared_read_by_pointer)) sum += last_part[lane];
    if (has(Defect::misaligned)) sum += sum_of(*reinterpret_cast<const float4*>(p.x + 1));

    // Neighbours, through shared memory and by a shuffle
    exchange[has(Defect::shared_write) ? thread + 1 : thread] = sum;
    if (has(Defect::shuffle_for_syncwarp)) __shfl_sync(0xffffffffu, sum, 0);  // brings lanes together, orders no memory
    if (!has(Defect::missing_syncwarp) && !has(Defect::shuffle_for_syncwarp)) __syncwarp();
    if (!has(Defect::shared_write)) sum += exchange[thread ^ 1];
    if (has(Defect::lane_returned) && lane == 31) return;
    if (has(Defect::lane_elsewhere) && lane == 31) __syncthreads();  // the lane that is elsewhere
    const bool low_mask = has(Defect::lane_not_in_mask) || (has(Defect::source_not_in_mask) && lane < 16);
    sum += __shfl_xor_sync(low_mask                          ? 0x0000ffffu
                           : has(Defect::source_not_in_mask) ? 0xffff0000u
                                                             : 0xffffffffu,
                           sum, has(Defect::source_not_in_mask) ? 16 : 2);

    // Back to global memory
    if (i < p.n || has(Defect::global_write)) p.y[has(Defect::race_between_blocks) ? thread : i] = sum;
    if (thread == 0) {
        if (has(Defect::plain_against_atomic) && blockIdx.x == 1)
            *p.counter += 1;
        else
            atomicAdd(p.counter, 1);
    }
}

SIMT_EXPORT(reverse, reverse)
