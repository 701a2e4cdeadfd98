// The scheduler: which fiber runs next, what a barrier and a warp call wait for, and what cannot be waited for.
//
// `ready` holds the fibers that can run. A fiber that must wait switches straight to the next ready one; the last one
// to arrive completes the barrier or the warp call and makes everybody ready again. When nobody is ready, control
// returns to run_block(), which finds the block finished or stuck. A meeting is checked when its last thread arrives,
// and when a thread exits.
#include <algorithm>
#include <iterator>
#include <vector>

#include "fiber.h"
#include "runtime.h"

namespace simt {

Thread* self;
Block block;
RunningBlock running;
bool checked;

namespace {

enum Schedule { kInOrder, kReversed, kShuffled };

Fiber fibers[kMaxThreads];
unsigned num_threads, num_done, num_at_barrier;
unsigned lanes_waiting[kMaxThreads / kWarpSize], lanes_done[kMaxThreads / kWarpSize];  // of each warp
void* launcher_stack;
bool given_up;
const Kernel* kernel;
const void* kernel_params;

int schedule;
uint64_t random_state;
unsigned random_below(unsigned bound) {  // xorshift64
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<unsigned>((random_state >> 32) % bound);
}

// A ring: a fiber is in it at most once.
struct ReadyQueue {
    Fiber* ring[kMaxThreads];
    unsigned head = 0, tail = 0;
    Fiber*& at(unsigned i) { return ring[i % kMaxThreads]; }
    bool empty() const { return head == tail; }
    void push(Fiber& fiber) {
        fiber.state = State::kReady;
        at(tail++) = &fiber;
    }
    Fiber* pop() {
        if (schedule == kReversed) return at(--tail);
        if (schedule == kShuffled) std::swap(at(head), at(head + random_below(tail - head)));
        return at(head++);
    }
} ready;

void switch_to_next(void** save_here) {
    if (ready.empty()) {
        simt_switch_stack(save_here, launcher_stack);
        return;
    }
    Fiber* next = ready.pop();
    const bool same = next == self && save_here == &current().stack;
    self = next;
    if (!same) simt_switch_stack(save_here, next->stack);
}

[[noreturn]] void fail(const char* kind, const std::string& site, const std::string& other, const std::string& text) {
    report(kind, "", site, other, text);
    give_up();
}

bool is_waiting(const Fiber& fiber) { return fiber.state == State::kInWarpCall || fiber.state == State::kAtBarrier; }
const char* waits_at(const Fiber& fiber) { return fiber.state == State::kAtBarrier ? fiber.barrier : fiber.call.name; }
Site waiting_site(const Fiber& fiber) { return fiber.state == State::kAtBarrier ? fiber.site : fiber.call.site; }

// ---- block barriers

void try_barrier() {
    if (num_at_barrier == 0 || num_at_barrier + num_done < num_threads) return;
    Fiber* first = std::find_if(fibers, fibers + num_threads, [](Fiber& f) { return f.state == State::kAtBarrier; });
    if (num_done > 0) {
        Fiber* gone = std::find_if(fibers, fibers + num_threads, [](Fiber& f) { return f.state == State::kDone; });
        fail("exited-thread", place(first->site), "",
             format("thread %u waits at %s, thread %u has returned", first->linear, first->barrier, gone->linear));
    }
    BarrierResult result{0, 1};
    for (unsigned i = 0; i < num_threads; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.barrier != first->barrier || fiber.site.line != first->site.line)
            fail("divergent-barrier", place(first->site), place(fiber.site),
                 format("thread %u waits at %s, thread %u at %s", first->linear, first->barrier, i, fiber.barrier));
        result.count += fiber.predicate;
        result.all &= fiber.predicate;
    }
    num_at_barrier = 0;
    ++running.epoch;
    for (unsigned i = 0; i < num_threads; ++i) {
        fibers[i].result = result;
        ready.push(fibers[i]);
    }
}

// ---- warp calls

Fiber* warp_of(const Fiber& fiber) { return fibers + fiber.warp * kWarpSize; }
unsigned lanes_of(const Fiber& fiber) {
    const unsigned count = std::min(num_threads - fiber.warp * kWarpSize, kWarpSize);
    return count == kWarpSize ? kAllLanes : (1u << count) - 1;
}
template <class Visit>
void for_lanes(unsigned mask, Visit visit) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
        if (mask >> lane & 1) visit(lane);
}

// A waiting fiber and another one that it waits for: can they still meet?
void check_meeting(const Fiber& waiting, const Fiber& other) {
    const WarpCall& call = waiting.call;
    if (other.state == State::kDone)
        fail("missing-lane", place(call.site), "",
             format("lane %u waits at %s for lane %u, which has returned", waiting.lane, call.name, other.lane));
    if (other.state != State::kInWarpCall || !(other.call.mask >> waiting.lane & 1)) return;
    const WarpCall& theirs = other.call;
    if (theirs.name != call.name || theirs.mask != call.mask || theirs.site.line != call.site.line)
        fail("missing-lane", place(call.site), place(theirs.site),
             format("lane %u waits at %s (mask %08x) for lane %u, which waits at %s (mask %08x)", waiting.lane,
                    call.name, call.mask, other.lane, theirs.name, theirs.mask));
}

// What happened in any of the lanes before __syncwarp is now known to all of them.
void join_periods(Fiber* warp, unsigned mask) {
    uint32_t joined[kWarpSize] = {};
    for_lanes(mask, [&](unsigned lane) {
        Fiber& fiber = warp[lane];
        fiber.seen[lane] = fiber.period++;
        for (unsigned k = 0; k < kWarpSize; ++k) joined[k] = std::max(joined[k], fiber.seen[k]);
    });
    for_lanes(mask, [&](unsigned lane) { std::copy(joined, joined + kWarpSize, warp[lane].seen); });
}

void complete_warp_call(Fiber* warp, const WarpCall& call) {
    if (call.combine != nullptr) {
        const void* in[kWarpSize] = {};
        void* out[kWarpSize] = {};
        for_lanes(call.mask, [&](unsigned lane) {
            in[lane] = warp[lane].call.in;
            out[lane] = warp[lane].call.out;
        });
        call.combine(call.mask, in, out);
    }
    if (call.orders_memory) join_periods(warp, call.mask);
    lanes_waiting[warp->warp] &= ~call.mask;
    for_lanes(call.mask, [&](unsigned lane) { ready.push(warp[lane]); });
}

// ---- the life of a fiber and of a block

void run_fiber() {
    kernel->run(kernel_params);
    Fiber& me = current();
    me.state = State::kDone;
    ++num_done;
    lanes_done[me.warp] |= 1u << me.lane;
    Fiber* warp = warp_of(me);
    for_lanes(lanes_of(me), [&](unsigned lane) {
        if (warp[lane].state == State::kInWarpCall && (warp[lane].call.mask >> me.lane & 1))
            check_meeting(warp[lane], me);
    });
    try_barrier();
    switch_to_next(&me.stack);
    __builtin_unreachable();
}

void report_stuck() {
    for (unsigned i = 0; i < num_threads; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.state != State::kInWarpCall) continue;
        for (unsigned lane = 0; lane < kWarpSize; ++lane) {
            const Fiber& other = warp_of(fiber)[lane];
            if (!(fiber.call.mask >> lane & 1) || !is_waiting(other)) continue;
            if (other.state == State::kInWarpCall && other.call.site.line == fiber.call.site.line) continue;
            report("deadlock", "", place(fiber.call.site), place(waiting_site(other)),
                   format("thread %u waits at %s for thread %u, which waits at %s", fiber.linear, fiber.call.name,
                          other.linear, waits_at(other)));
            return;
        }
    }
    report("deadlock", "", "", "", "no thread of the block can run");
}

void run_block(uint3 index, dim3 size, size_t dynamic_shared) {
    block.index = index;
    num_done = num_at_barrier = 0;
    running = {running.serial + 1, 1, dynamic_shared};
    ready.head = ready.tail = 0;
    std::fill(std::begin(lanes_waiting), std::end(lanes_waiting), 0);
    std::fill(std::begin(lanes_done), std::end(lanes_done), 0);
    poison_shared_memory(dynamic_shared);
    for (unsigned i = 0; i < num_threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber = Fiber{};
        fiber.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        fiber.linear = i;
        fiber.lane = i % kWarpSize;
        fiber.warp = i / kWarpSize;
        fiber.period = 1;
        fiber.stack = new_stack(stack_top(i), run_fiber);
        ready.push(fiber);
    }
    switch_to_next(&launcher_stack);
    self = nullptr;
    if (!given_up && num_done < num_threads) {
        report_stuck();
        given_up = true;
    }
}

}  // namespace

// ---- what kernels and the shadow memory call

void give_up() {
    given_up = true;
    void* never_again;
    simt_switch_stack(&never_again, launcher_stack);
    __builtin_unreachable();
}

void fail_missing_lane(const char* name, unsigned lane, int source) {
    fail("missing-lane", place(current().call.site), "",
         format("lane %u reads at %s from lane %d, which is not in the mask", lane, name, source));
}

void trap(Site site) { fail("trap", place(site), "", format("thread %u", self->linear)); }

BarrierResult block_barrier(const char* name, bool predicate, Site site) {
    Fiber& me = current();
    me.state = State::kAtBarrier;
    me.barrier = name;
    me.site = site;
    me.predicate = predicate;
    ++num_at_barrier;
    try_barrier();
    switch_to_next(&me.stack);
    return me.result;
}

void warp_call(const WarpCall& call) {
    Fiber& me = current();
    if (!(call.mask >> me.lane & 1))
        fail("missing-lane", place(call.site), "",
             format("lane %u calls %s with mask %08x, in which it is not", me.lane, call.name, call.mask));
    me.call = call;
    me.call.mask &= lanes_of(me);  // the last warp may be a partial one
    me.state = State::kInWarpCall;
    Fiber* warp = warp_of(me);
    lanes_waiting[me.warp] |= 1u << me.lane;
    const unsigned arrived = lanes_waiting[me.warp] | lanes_done[me.warp];
    bool complete = (arrived & me.call.mask) == me.call.mask;
    if (complete) {
        for_lanes(me.call.mask, [&](unsigned lane) {
            check_meeting(me, warp[lane]);
            complete &= warp[lane].call.mask == me.call.mask;
        });
    }
    if (complete) complete_warp_call(warp, me.call);
    switch_to_next(&me.stack);
}

}  // namespace simt

// ---- what the launcher calls

#define SIMT_API extern "C" __attribute__((visibility("default")))

SIMT_API void simt_launch(const simt::Kernel* kernel, const void* params, const unsigned* grid, const unsigned* block,
                          size_t dynamic_shared, int schedule, uint64_t seed, int checked) {
    using namespace simt;
    const dim3 blocks(grid[0], grid[1], grid[2]), threads(block[0], block[1], block[2]);
    forget_reports();
    num_threads = threads.x * threads.y * threads.z;
    prepare_memory(num_threads);
    simt::kernel = kernel;
    kernel_params = params;
    const uintptr_t address = reinterpret_cast<uintptr_t>(params);
    simt::params = {address, address + kernel->params_bytes};
    simt::schedule = schedule;
    simt::checked = checked != 0;
    random_state = (seed + 1) * 0x9e3779b97f4a7c15u | 1;
    given_up = false;
    simt::block.grid = blocks;
    simt::block.size = threads;

    std::vector<unsigned> order(size_t{blocks.x} * blocks.y * blocks.z);
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
    if (schedule == kReversed) std::reverse(order.begin(), order.end());
    if (schedule == kShuffled)
        for (size_t i = order.size(); i > 1; --i)
            std::swap(order[i - 1], order[random_below(static_cast<unsigned>(i))]);
    for (size_t i = 0; i < order.size() && !given_up; ++i) {
        const unsigned b = order[i];
        run_block({b % blocks.x, b / blocks.x % blocks.y, b / (blocks.x * blocks.y)}, threads, dynamic_shared);
    }
    self = nullptr;
    simt::checked = false;
    release_stacks();
}
