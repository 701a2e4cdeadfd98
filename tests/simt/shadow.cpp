// The shadow memory: for every few bytes of registered global buffers and of shared memory, who wrote and who read
// last.
//
// A checked build compiles the kernel with -fsanitize=thread, so the compiler puts a call of __tsan_readN /
// __tsan_writeN before every access. Those functions are defined here; the sanitizer's own library is not linked. An
// access is judged against the cell's history: in bounds? writable? written before it is read? and, if another thread
// touched it, is there an order between the two? Order comes from block barriers (`epoch`) and __syncwarp (`period`),
// never from luck: what ran first here could run second on a GPU. Different blocks are never ordered. Array indices and
// the alignment of vector accesses come from -fsanitize=bounds,alignment, whose handlers are below as well.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "runtime.h"

namespace simt {
namespace {

constexpr uint8_t kAtomic = 1, kSeveralWarps = 2, kSeveralBlocks = 4;  // flags of an access

// One access, or several reads between which there is no order.
struct Access {
    uint32_t block, epoch, period, pc, lanes;
    uint16_t warp;
    uint8_t flags;
};
struct Cell {
    Access write, read;
};

// Memory with one cell per 2^granule bytes. The cells are zero (never accessed) and take no memory before they are
// used.
struct Region : Range {
    std::string name;
    bool writable, shared;
    unsigned granule;
    Cell* cells;
    Region(Range range, std::string name, bool writable, bool shared, unsigned granule)
        : Range(range), name(std::move(name)), writable(writable), shared(shared), granule(granule) {
        void* memory =
            mmap(nullptr, cells_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            std::perror("simt: no memory for the shadow");
            std::abort();
        }
        cells = static_cast<Cell*>(memory);
    }
    size_t cells_bytes() const { return (((end - begin) >> granule) + 2) * sizeof(Cell); }
    void release() { munmap(cells, cells_bytes()); }
};

struct SharedArray {
    uintptr_t offset, bytes;  // in the thread-local block
    std::string name;
};

std::vector<Region> buffers;
std::vector<Region> shared_regions;  // none or one; kept over launches, because a block's serial makes old cells stale
std::vector<SharedArray> shared_arrays;
constexpr size_t kNear = 1 << 20;  // an access that misses every buffer is named after one within this distance

uint32_t offset_of(void* return_address) {  // of the call, so that addr2line finds its line
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(return_address) - image.begin - 1);
}

[[noreturn]] void out_of_bounds(const std::string& address, uint32_t pc, const char* verb, size_t bytes) {
    report("out-of-bounds", address, place(pc), "", format("thread %u %s %zu bytes", self->linear, verb, bytes));
    give_up();
}

std::string relative(const char* name, uintptr_t begin, uintptr_t address) {
    return format("%s%+lld", name, static_cast<long long>(address - begin));
}

const SharedArray* shared_array_at(uintptr_t address) {
    for (const SharedArray& array : shared_arrays)
        if (address - shared_memory.begin - array.offset < array.bytes) return &array;
    return nullptr;
}

std::string name_of(const Region* region, uintptr_t address) {
    if (region == nullptr) return "an unregistered address";
    if (!region->shared) return relative(region->name.c_str(), region->begin, address);
    if (address - dynamic_shared_begin() < kMaxDynamicShared)
        return relative("dynamic shared", dynamic_shared_begin(), address);
    const SharedArray* array = nullptr;  // the last one that begins before
    for (const SharedArray& a : shared_arrays)
        if (shared_memory.begin + a.offset <= address) array = &a;
    if (array == nullptr) return "shared memory";
    return relative(("shared " + array->name).c_str(), shared_memory.begin + array->offset, address);
}

Region& shared_region() {
    if (shared_regions.empty() || shared_regions[0].begin != shared_memory.begin) {
        for (Region& region : shared_regions) region.release();
        shared_regions.clear();
        shared_regions.emplace_back(shared_memory, "shared", true, true, 1u);
    }
    return shared_regions[0];
}

void check_shared_bounds(uintptr_t address, size_t bytes, const char* verb, uint32_t pc) {
    const Region& region = shared_region();
    if (address - dynamic_shared_begin() < kMaxDynamicShared) {
        if (address + bytes > dynamic_shared_begin() + running.dynamic_shared)
            out_of_bounds(name_of(&region, address) + format(" (size %zu)", running.dynamic_shared), pc, verb, bytes);
        return;
    }
    const SharedArray* array = shared_array_at(address);
    const uintptr_t offset = address - shared_memory.begin;
    if (array == nullptr || offset + bytes > array->offset + array->bytes)
        out_of_bounds(name_of(&region, address), pc, verb, bytes);
}

Region* buffer_at(uintptr_t address, size_t bytes, const char* verb, uint32_t pc) {
    static size_t last = 0;
    const auto holds = [=](const Region& b) { return address >= b.begin && address + bytes <= b.end; };
    if (last < buffers.size() && holds(buffers[last])) return &buffers[last];
    for (last = 0; last < buffers.size(); ++last)
        if (holds(buffers[last])) return &buffers[last];
    const Region* nearest = nullptr;
    uintptr_t distance = kNear;
    for (const Region& buffer : buffers) {
        const uintptr_t away = address < buffer.begin ? buffer.begin - address : address + bytes - buffer.end;
        if (away < distance) {
            nearest = &buffer;
            distance = away;
        }
    }
    const std::string size = nearest == nullptr ? "" : format(" (size %zu)", nearest->end - nearest->begin);
    out_of_bounds(name_of(nearest, address) + size, pc, verb, bytes);
}

// ---- order

// Does every access in `past` come before what `me` does now, on any machine that obeys the barriers?
bool comes_before(const Access& past, const Fiber& me) {
    if (past.flags & kSeveralBlocks || past.block != running.serial) return false;
    if (past.epoch != running.epoch) return true;
    if (past.flags & kSeveralWarps || past.warp != me.warp) return false;
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
        if ((past.lanes >> lane & 1) && lane != me.lane && me.seen[lane] < past.period) return false;
    return true;
}

void check_race(const Access& past, const char* past_verb, const Access& now, const char* verb, const Region& region,
                uintptr_t address) {
    if (past.block == 0 || (past.flags & now.flags & kAtomic) || comes_before(past, current())) return;
    std::string who = format("warp %u lane %d", past.warp, __builtin_ctz(past.lanes));
    if (past.block != now.block || past.flags & kSeveralBlocks) who = "another block";
    report("race", name_of(&region, address), place(now.pc), place(past.pc),
           format("thread %u %s what %s %s, with no barrier between", self->linear, verb, who.c_str(), past_verb));
}

void remember_read(Access& past, const Access& now) {
    if (past.block == 0 || comes_before(past, current())) {
        past = now;  // whoever comes after this read comes after the older ones too
        return;
    }
    uint8_t flags = past.flags | now.flags;
    if (past.block != now.block) flags |= kSeveralBlocks;
    if (past.warp != now.warp) flags |= kSeveralWarps;
    const uint32_t lanes = past.lanes | now.lanes, period = std::max(past.period, now.period);
    past = now;
    past.flags = flags;
    past.lanes = lanes;
    past.period = period;
}

void judge(void* pointer, size_t bytes, bool is_write, bool is_atomic, void* return_address) {
    if (!checked || self == nullptr) return;  // the kernel's file may hold host code, which is instrumented as well
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    if (stacks.contains(address) || image.contains(address) || params.contains(address)) return;
    const uint32_t pc = offset_of(return_address);
    const char* verb = is_write ? "writes" : "reads";
    const bool in_shared = shared_memory.contains(address);
    if (in_shared) check_shared_bounds(address, bytes, verb, pc);
    Region& region = in_shared ? shared_region() : *buffer_at(address, bytes, verb, pc);
    if (is_write && !region.writable) {
        report("write-to-const", name_of(&region, address), place(pc), "", format("thread %u writes", self->linear));
        give_up();
    }
    const Fiber& me = current();
    const Access now{running.serial,
                     running.epoch,
                     me.period,
                     pc,
                     1u << me.lane,
                     static_cast<uint16_t>(me.warp),
                     static_cast<uint8_t>(is_atomic ? kAtomic : 0)};
    const uintptr_t first = (address - region.begin) >> region.granule;
    const uintptr_t last = (address + bytes - 1 - region.begin) >> region.granule;
    for (uintptr_t i = first; i <= last; ++i) {
        Cell& cell = region.cells[i];
        const uintptr_t cell_address = std::max(address, region.begin + (i << region.granule));
        if (in_shared && cell.write.block != now.block) cell.write = Access{};  // of an earlier block
        if (in_shared && cell.read.block != now.block) cell.read = Access{};
        if (in_shared && !is_write && cell.write.block == 0)
            report("uninitialised", name_of(&region, cell_address), place(pc), "",
                   format("thread %u reads what its block has not written", self->linear));
        check_race(cell.write, "wrote", now, verb, region, cell_address);
        if (is_write) {
            check_race(cell.read, "read", now, verb, region, cell_address);
            cell = {now, Access{}};
        } else if (!is_atomic) {  // the write that follows an atomic's read says it all
            remember_read(cell.read, now);
        }
    }
}

// Site or program counter, whichever is at hand.
template <class Where>
void judge_alignment(uintptr_t address, size_t alignment, Where where) {
    if (self == nullptr || address % alignment == 0) return;
    const Region* region = nullptr;
    for (const Region& buffer : buffers)
        if (buffer.contains(address)) region = &buffer;
    if (shared_memory.contains(address)) region = &shared_region();
    report("misaligned", name_of(region, address), place(where), "",
           format("thread %u needs a multiple of %zu bytes", self->linear, alignment));
    give_up();
}

}  // namespace

void check_alignment(const void* address, size_t alignment) {
    judge_alignment(reinterpret_cast<uintptr_t>(address), alignment, offset_of(__builtin_return_address(0)));
}
void check_access(const void* address, size_t bytes, bool is_write) {
    void* const pc = __builtin_return_address(0);
    judge_alignment(reinterpret_cast<uintptr_t>(address), bytes, offset_of(pc));
    judge(const_cast<void*>(address), bytes, is_write, false, pc);
}
void check_read(const void* address, size_t bytes) {
    judge(const_cast<void*>(address), bytes, false, false, __builtin_return_address(0));
}
void forget_writes(const void* address, size_t bytes) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    Region& region = shared_region();
    for (uintptr_t i = (at - region.begin) >> region.granule; i <= (at + bytes - 1 - region.begin) >> region.granule;
         ++i)
        region.cells[i].write = Access{};
}
void check_local(const void* address, size_t bytes, const void* array, size_t array_bytes) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address), begin = reinterpret_cast<uintptr_t>(array);
    const uint32_t pc = offset_of(__builtin_return_address(0));
    if (at < begin || at + bytes > begin + array_bytes)
        out_of_bounds(relative("local", begin, at) + format(" (size %zu)", array_bytes), pc, "touches", bytes);
    judge_alignment(at, bytes, pc);
}

void atomic_read(const void* address, void* value, size_t bytes) {
    judge(const_cast<void*>(address), bytes, false, true, __builtin_return_address(0));
    std::memcpy(value, address, bytes);
}
void atomic_write(void* address, const void* value, size_t bytes) {
    judge(address, bytes, true, true, __builtin_return_address(0));
    std::memcpy(address, value, bytes);
}

}  // namespace simt

// ---- what instrumented code calls

#define SIMT_HOOK(name, bytes, is_write) \
    extern "C" void name(void* address) { simt::judge(address, bytes, is_write, false, __builtin_return_address(0)); }
#define SIMT_HOOKS(bytes)                                 \
    SIMT_HOOK(__tsan_read##bytes, bytes, false)           \
    SIMT_HOOK(__tsan_write##bytes, bytes, true)           \
    SIMT_HOOK(__tsan_unaligned_read##bytes, bytes, false) \
    SIMT_HOOK(__tsan_unaligned_write##bytes, bytes, true) \
    SIMT_HOOK(__tsan_volatile_read##bytes, bytes, false)  \
    SIMT_HOOK(__tsan_volatile_write##bytes, bytes, true)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
extern "C" void __tsan_read_range(void* address, size_t bytes) {
    simt::judge(address, bytes, false, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
    simt::judge(address, bytes, true, false, __builtin_return_address(0));
}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}

// The beginnings of the compiler's descriptions of a failed check.
struct TypeMismatch {
    simt::Site site;
    void* type;
    unsigned char log_alignment;
};
struct IndexError {
    simt::Site site;
};

extern "C" void __ubsan_handle_type_mismatch_v1(TypeMismatch* mismatch, uintptr_t address) {
    using namespace simt;
    judge_alignment(address, size_t{1} << mismatch->log_alignment, mismatch->site);
}
extern "C" void __ubsan_handle_out_of_bounds(IndexError* error, uintptr_t index) {
    using namespace simt;
    if (self == nullptr) return;
    report("out-of-bounds", "", place(error->site), "",
           format("thread %u uses array index %lld", self->linear, static_cast<long long>(index)));
    give_up();
}

// ---- what the launcher calls

#define SIMT_API extern "C" __attribute__((visibility("default")))

SIMT_API void simt_add_buffer(const void* address, size_t bytes, const char* name, int writable, unsigned granule) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    simt::buffers.emplace_back(simt::Range{begin, begin + bytes}, name, writable != 0, false, granule);
}
SIMT_API void simt_clear_buffers() {
    for (simt::Region& buffer : simt::buffers) buffer.release();
    simt::buffers.clear();
}
SIMT_API void simt_add_shared_array(size_t offset, size_t bytes, const char* name) {
    simt::shared_arrays.push_back({offset, bytes, name});
}
