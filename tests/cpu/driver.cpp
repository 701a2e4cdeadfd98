// The kernels of one instruction set, FASTATTN_ISA, with what divides a call into tasks, as a library without Python.
#include "kernels.cpp"
#include "work.h"

#define FASTATTN_EXPORT extern "C" __attribute__((visibility("default")))

using namespace fastattn;

FASTATTN_EXPORT void fastattn_run(const AttentionParams* p, int is_backward, int element, int threads) {
    const int element_size = element == 0 ? 4 : 2;
    (is_backward ? backward : forward)(*FASTATTN_KERNELS_OF(FASTATTN_ISA)(), *p, element, element_size, threads);
}

FASTATTN_EXPORT void fastattn_use_pool() { Threads::get().use_pool(true); }
