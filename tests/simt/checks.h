// What code that the compiler does not instrument asks of the runtime: it calls the checks itself, before every access.
#pragma once

#include "simt.h"

namespace simt {

// An address range.
struct Range {
    uintptr_t begin, end;
    bool contains(uintptr_t address) const { return address - begin < end - begin; }
};
extern Range shared_memory;  // this library's thread-local block: all __shared__ arrays

// An access that is aligned to its size; a read without alignment; an alignment alone; and an access to local memory,
// which is judged by its bounds.
void check_access(const void* address, size_t bytes, bool is_write);
void check_read(const void* address, size_t bytes);
void check_alignment(const void* address, size_t alignment);
void check_local(const void* address, size_t bytes, const void* array, size_t array_bytes);
// Shared memory becomes as if nobody had written it yet.
void forget_writes(const void* address, size_t bytes);
[[noreturn]] void trap(Site site);

}  // namespace simt
