// The kernels of one instruction set, as functions. Each set is an object of its own, with flags of its own; which one
// runs is chosen at run time.
#pragma once

#include "../attention.h"

namespace fastattn {

// A task is done by one thread, in `scratch` floats of memory that is aligned to 64 bytes.
struct CpuKernels {
    const char* name;
    int block_m, block_n;  // queries and keys
    int chunk, few;        // queries of a task, and how many have a way of their own

    long (*forward_scratch)(const AttentionParams&);
    long (*backward_scratch)(const AttentionParams&);

    // For each element type, in the order of kElements.
    // Queries i_begin ... i_end - 1, at most `chunk`.
    void (*forward[3])(const AttentionParams&, int b, int h, int i_begin, int i_end, float* scratch);
    // All queries, where there are at most `few`.
    void (*forward_few[3])(const AttentionParams&, int b, int h, float* scratch);
    // Of query heads that share a key head: dQ of some queries, dK and dV of some keys, or all of it.
    struct Part {
        int h_begin, h_end, i_begin, i_end, j_begin, j_end;
        bool has_dq, has_dkv;
    };
    void (*backward[3])(const AttentionParams&, int b, const Part&, float* scratch);

    // For tests: the words of queries 0 ... rows - 1, and 2^x in place, both for a whole number of vectors.
    void (*random_words)(unsigned* words, unsigned long long seed, int b, int h, int rows, int row);
    void (*exp2)(float* x, long count);
};

// Null where this build or the CPU has none.
const CpuKernels* avx512_kernels();
const CpuKernels* avx2_kernels();
const CpuKernels* baseline_kernels();

}  // namespace fastattn
