// Addresses and accesses. Generic, global, local and parameter addresses are those of the machine that runs this. An
// address of shared memory counts from the start of the thread-local block that holds it, so that 32 bits suffice.
#pragma once

#include "registers.h"

extern thread_local unsigned char smem[];

namespace ptx {

using Byte = unsigned char;

inline uintptr_t shared_window() { return simt::shared_memory.begin & ~uintptr_t{127}; }
inline u32 shared_address(const Byte* pointer) {
    return static_cast<u32>(reinterpret_cast<uintptr_t>(pointer) - shared_window());
}
inline u64 address_of(const Byte* pointer) { return reinterpret_cast<u64>(pointer); }
__forceinline__ Byte* shared(u32 address, s32 offset) {  // a little before the window is still seen as that
    return reinterpret_cast<Byte*>(shared_window() + static_cast<s32>(address + offset));
}
__forceinline__ Byte* memory(u64 address, s64 offset) { return reinterpret_cast<Byte*>(address + offset); }

#ifdef PTX_CHECKED
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

template <class T, int count>
struct Vector {
    T elements[count];
    const T& operator[](int i) const { return elements[i]; }
};

template <class T>
__forceinline__ T copy_of(const Byte* address) {
    T value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

// ---- global, shared and generic

template <class T>
__forceinline__ T load(const Byte* address) {
    if (kChecked) simt::check_access(address, sizeof(T), false);
    return copy_of<T>(address);
}
// A load that the compiler widened: of its bytes, the program reads those in `used`.
template <class T>
__forceinline__ T load(const Byte* address, unsigned used) {
    if (kChecked) {
        simt::check_alignment(address, sizeof(T));
        for (unsigned i = 0; i < sizeof(T); ++i)
            if (used >> i & 1) simt::check_read(address + i, 1);
    }
    return copy_of<T>(address);
}
template <class T>
__forceinline__ void store(Byte* address, T value) {
    if (kChecked) simt::check_access(address, sizeof(T), true);
    std::memcpy(address, &value, sizeof value);
}
template <class T, class Update>
__forceinline__ T update_atomically(Byte* address, Update update) {
    if (kChecked) simt::check_alignment(address, sizeof(T));
    return simt::atomic_update(reinterpret_cast<T*>(address), update);
}

// ---- local memory: the depot, one array per function

struct NoDepot {};
constexpr NoDepot no_depot{};
template <class Depot>
__forceinline__ void check_local(const Byte* address, size_t bytes, const Depot& depot) {
    if (kChecked) simt::check_local(address, bytes, &depot, sizeof depot);
}
template <class T, class Depot>
__forceinline__ T load_local(const Byte* address, const Depot& depot) {
    check_local(address, sizeof(T), depot);
    return copy_of<T>(address);
}
template <class T, class Depot>
__forceinline__ void store_local(Byte* address, T value, const Depot& depot) {
    check_local(address, sizeof(T), depot);
    std::memcpy(address, &value, sizeof value);
}

// ---- parameters, whose addresses are known when the code is translated

template <class T>
__forceinline__ void store_param(Byte* address, T value) {
    std::memcpy(address, &value, sizeof value);
}

}  // namespace ptx
