// Where things lie: the stacks of the fibers, shared memory, and this library itself. An instrumented access is told
// apart by its address alone.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "runtime.h"

// Dynamic shared memory, with a margin on both sides that belongs to no array, so that running over the end of a static
// array is seen. It goes under the names by which kernels of the global namespace and of namespace fastattn declare it.
extern "C" {
__attribute__((used)) alignas(128) thread_local unsigned char simt_storage[4096 + simt::kMaxDynamicShared + 4096];
}
asm(R"(
.hidden smem
.globl smem
.type smem, STT_TLS
.set smem, simt_storage + 4096
.hidden _ZN8fastattn4smemE
.globl _ZN8fastattn4smemE
.type _ZN8fastattn4smemE, STT_TLS
.set _ZN8fastattn4smemE, simt_storage + 4096
)");
extern thread_local unsigned char smem[];

namespace simt {

Range stacks, shared_memory, image, params;

namespace {

constexpr size_t kStackBytes = 256 << 10;  // reserved only; what a fiber does not touch costs nothing

// This library's own code and data, and its thread-local block in the calling thread.
int find_image(dl_phdr_info* info, size_t, void*) {
    Range found{~uintptr_t{0}, 0};
    const ElfW(Phdr)* thread_local_part = nullptr;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr) & part = info->dlpi_phdr[i];
        if (part.p_type == PT_TLS) thread_local_part = &part;
        if (part.p_type != PT_LOAD) continue;
        const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
        found = {std::min(found.begin, begin), std::max(found.end, begin + part.p_memsz)};
    }
    if (!found.contains(reinterpret_cast<uintptr_t>(&image))) return 0;
    image = found;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
    shared_memory = {begin, begin + thread_local_part->p_memsz};
    return 1;
}

}  // namespace

void prepare_memory(unsigned num_threads) {
    const volatile unsigned char* touch = smem;
    (void)*touch;  // the thread-local block exists from the first access on
    dl_iterate_phdr(find_image, nullptr);
    const size_t bytes = num_threads * kStackBytes;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        std::perror("simt: no memory for the stacks");
        std::abort();
    }
    stacks = {reinterpret_cast<uintptr_t>(memory), reinterpret_cast<uintptr_t>(memory) + bytes};
    for (unsigned i = 0; i < num_threads; ++i)  // a guard page below each stack
        mprotect(static_cast<char*>(memory) + i * kStackBytes, 4096, PROT_NONE);
}

// After every launch: a process may have only so many mappings, and each guard page makes one.
void release_stacks() { munmap(reinterpret_cast<void*>(stacks.begin), stacks.end - stacks.begin); }

char* stack_top(unsigned thread) { return reinterpret_cast<char*>(stacks.begin) + (thread + 1) * kStackBytes; }

uintptr_t dynamic_shared_begin() { return reinterpret_cast<uintptr_t>(smem); }

// The dynamic part is large, so only what is used of it.
void poison_shared_memory(size_t dynamic_shared) {
    char* const begin = reinterpret_cast<char*>(shared_memory.begin);
    char* const end = reinterpret_cast<char*>(shared_memory.end);
    char* const dynamic = reinterpret_cast<char*>(smem);
    std::fill(begin, dynamic, '\xff');
    std::fill(dynamic, dynamic + dynamic_shared, '\xff');
    std::fill(dynamic + kMaxDynamicShared, end, '\xff');
}

}  // namespace simt
