// CUDA C++ for an ordinary C++ compiler: the language's own words, the built-in variables, barriers, shuffles and
// atomics.
//
// A kernel is compiled unchanged after this header. Each CUDA thread becomes a fiber: a stack of its own and a saved
// set of registers. One block runs at a time, all of its fibers on one operating-system thread. A fiber runs until it
// must wait for others (barrier, shuffle, vote), and then the scheduler (scheduler.cpp) switches to the next one. So
// the numbers do not depend on time but only on the chosen schedule, and a test can replay a failure.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// At block scope thread_local implies static, and `extern __shared__ T smem[];` stays legal: both kinds of shared
// memory work as they are written. They lie together in the library's thread-local block, which makes it easy to
// poison.
#define __shared__ thread_local

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
    unsigned x, y, z;
};

namespace simt {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Where in the kernel's source a barrier or a shuffle stands; as a default argument it is the caller's place.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

struct Thread {
    uint3 index;
    unsigned linear, lane, warp;
};
struct Block {
    uint3 index;
    dim3 grid, size;
};
extern Thread* self;
extern Block block;

// A warp call brings all lanes of `mask` together; the last to arrive runs `combine` once, on everybody's input and
// output.
using Combine = void (*)(unsigned mask, const void* const* in, void* const* out);
struct WarpCall {
    const char* name;
    Site site;
    unsigned mask;
    Combine combine;  // null: only to wait
    const void* in;
    void* out;
    bool orders_memory;  // true for __syncwarp alone: a shuffle does not order memory
};
void warp_call(const WarpCall& call);

struct BarrierResult {
    int count, all;
};
BarrierResult block_barrier(const char* name, bool predicate, Site site);

void atomic_read(const void* address, void* value, size_t bytes);
void atomic_write(void* address, const void* value, size_t bytes);
[[noreturn]] void fail_missing_lane(const char* name, unsigned lane, int source);

// ---- how a library exports its kernels: SIMT_EXPORT(name, kernel<...>), where the kernel takes one struct by value
struct Kernel {
    void (*run)(const void* params);
    size_t params_bytes;
};
template <auto kernel>
struct Export;
template <class Params, void (*kernel)(Params)>
struct Export<kernel> {
    static void run(const void* params) { kernel(*static_cast<const Params*>(params)); }
    static constexpr Kernel kKernel{run, sizeof(Params)};
};

}  // namespace simt

#define SIMT_EXPORT(name, ...)                                                         \
    extern "C" __attribute__((visibility("default"))) simt::Kernel simt_kernel_##name; \
    simt::Kernel simt_kernel_##name = simt::Export<(__VA_ARGS__)>::kKernel;

#define threadIdx (simt::self->index)
#define blockIdx (simt::block.index)
#define blockDim (simt::block.size)
#define gridDim (simt::block.grid)
constexpr int warpSize = simt::kWarpSize;

// ---- barriers

inline void __syncthreads(simt::Site site = simt::Site::here()) { simt::block_barrier("__syncthreads", false, site); }
inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::here()) {
    return simt::block_barrier("__syncthreads_count", predicate != 0, site).count;
}
inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::here()) {
    return simt::block_barrier("__syncthreads_and", predicate != 0, site).all;
}
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::here()) {
    return simt::block_barrier("__syncthreads_or", predicate != 0, site).count != 0;
}
inline void __syncwarp(unsigned mask = simt::kAllLanes, simt::Site site = simt::Site::here()) {
    simt::warp_call({"__syncwarp", site, mask, nullptr, nullptr, nullptr, true});
}
inline void __threadfence() {}  // one block at a time, one operating-system thread: memory is always in order
inline void __threadfence_block() {}

// ---- shuffles and votes

namespace simt {

struct Shuffle {
    const char* name;
    uint64_t value;
    int source;
};

inline void shuffle_lanes(unsigned mask, const void* const* in, void* const* out) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const auto* mine = static_cast<const Shuffle*>(in[lane]);
        if (!(mask >> mine->source & 1)) fail_missing_lane(mine->name, lane, mine->source);
        *static_cast<uint64_t*>(out[lane]) = static_cast<const Shuffle*>(in[mine->source])->value;
    }
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, Site site) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves at most 8 plain bytes");
    Shuffle in{name, 0, source};
    uint64_t out = 0;
    std::memcpy(&in.value, &value, sizeof value);
    warp_call({name, site, mask, shuffle_lanes, &in, &out, false});
    std::memcpy(&value, &out, sizeof value);
    return value;
}

// The first lane of the segment of `width` lanes that this lane belongs to.
inline int segment(int width) { return static_cast<int>(self->lane) & ~(width - 1); }

inline void ballot_lanes(unsigned mask, const void* const* in, void* const* out) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
        if ((mask >> lane & 1) && *static_cast<const int*>(in[lane])) votes |= 1u << lane;
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
        if (mask >> lane & 1) *static_cast<unsigned*>(out[lane]) = votes;
}

inline unsigned ballot(const char* name, unsigned mask, int predicate, Site site) {
    unsigned votes = 0;
    warp_call({name, site, mask, ballot_lanes, &predicate, &votes, false});
    return votes;
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Site site = simt::Site::here()) {
    return simt::shuffle("__shfl_sync", mask, value, simt::segment(width) + (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, simt::Site site = simt::Site::here()) {
    const int lane = simt::self->lane, source = lane ^ lane_mask;
    const bool inside = source < simt::segment(width) + width;
    return simt::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Site site = simt::Site::here()) {
    const int lane = simt::self->lane, source = lane - static_cast<int>(delta);
    return simt::shuffle("__shfl_up_sync", mask, value, source >= simt::segment(width) ? source : lane, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Site site = simt::Site::here()) {
    const int lane = simt::self->lane, source = lane + static_cast<int>(delta);
    return simt::shuffle("__shfl_down_sync", mask, value, source < simt::segment(width) + width ? source : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
    return simt::ballot("__ballot_sync", mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
    return simt::ballot("__any_sync", mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
    return simt::ballot("__all_sync", mask, !predicate, site) == 0;
}

// ---- atomics: no fiber can run between the read and the write

namespace simt {
template <class T, class Update>
__forceinline__ T atomic_update(T* address, Update update) {
    T old;
    atomic_read(address, &old, sizeof old);
    const T updated = update(old);
    atomic_write(address, &updated, sizeof updated);
    return old;
}
template <class T>
using Plain = std::common_type_t<T>;  // lets the second argument convert to the type of the first
}  // namespace simt

template <class T>
__forceinline__ T atomicAdd(T* address, simt::Plain<T> value) {
    return simt::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
__forceinline__ T atomicMax(T* address, simt::Plain<T> value) {
    return simt::atomic_update(address, [=](T old) { return old > value ? old : value; });
}
template <class T>
__forceinline__ T atomicMin(T* address, simt::Plain<T> value) {
    return simt::atomic_update(address, [=](T old) { return old < value ? old : value; });
}
template <class T>
__forceinline__ T atomicExch(T* address, simt::Plain<T> value) {
    return simt::atomic_update(address, [=](T) { return value; });
}
template <class T>
__forceinline__ T atomicCAS(T* address, simt::Plain<T> compare, simt::Plain<T> value) {
    return simt::atomic_update(address, [=](T old) { return old == compare ? value : old; });
}

template <class T>
__forceinline__ T __ldg(const T* address) {
    return *address;
}

#include "simt_math.h"
// The 16-bit types need float2 of simt_math.h.
#include "simt_half.h"
