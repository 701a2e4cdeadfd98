// What the parts of the runtime know of each other: the scheduler, which runs fibers; the shadow memory, which judges
// every access of a checked build; where memory lies; and the reports. None is itself compiled with instrumentation.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <string>

#include "checks.h"

namespace simt {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxDynamicShared = 232448;  // what a block can ask for on the largest architecture, sm_90

enum class State { kReady, kInWarpCall, kAtBarrier, kDone };

struct Fiber : Thread {
    void* stack;
    State state;
    WarpCall call;        // while kInWarpCall
    const char* barrier;  // while kAtBarrier
    Site site;
    bool predicate;
    BarrierResult result;
    // Time as the race check sees it: __syncwarp ends a period of each of its lanes. seen[k] is the last period of lane
    // k (of this warp) whose accesses are known to come before what this fiber does now.
    uint32_t period;
    uint32_t seen[kWarpSize];
};

// The block that is running.
struct RunningBlock {
    uint32_t serial;  // counts blocks over all launches, from 1
    uint32_t epoch;   // counts block barriers, from 1: accesses of different epochs are ordered
    size_t dynamic_shared;
};
extern RunningBlock running;
extern bool checked;
inline Fiber& current() { return *static_cast<Fiber*>(self); }

extern Range stacks;  // of all fibers: local variables
extern Range image;   // this library's code, constants and the runtime's own state
extern Range params;  // the argument struct on the host
uintptr_t dynamic_shared_begin();
void prepare_memory(unsigned num_threads);  // finds all of these; at every launch
void release_stacks();
void poison_shared_memory(size_t dynamic_shared);  // NaN everywhere, whatever the last block left
char* stack_top(unsigned thread);

// Keeps a report, one for all threads that do the same: its kind, the address it is about, and two places in the source
// (either may be empty).
void report(const char* kind, const std::string& address, const std::string& site, const std::string& other_site,
            const std::string& text);
void forget_reports();
// Abandons the launch: what runs now has no meaning any more.
[[noreturn]] void give_up();

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string place(Site site);
std::string place(uint32_t pc);  // an offset into the image, to be translated by addr2line

}  // namespace simt
