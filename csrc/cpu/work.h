// How a call is divided into tasks. Results never depend on it: rows of every sum are added up in the same order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "threads.h"

namespace fastattn {

inline int count_blocks(int n, int block) { return (n + block - 1) / block; }

// What one thread does in a microsecond at least, of operations.
constexpr double kOperations = 5e4, kOperationsInPlace = 1.5e4;

// One thread, where waking others would take longer than they would save.
inline int useful_threads(const AttentionParams& p, int products, double operations_per_us, int threads) {
    constexpr double kWorthwhile = 20;  // us
    const double rows = p.cu_seqlens_q == nullptr ? static_cast<double>(p.batch) * p.seqlen_q : p.total_q;
    const double operations = 2.0 * products * rows * p.nheads * p.seqlen_k * std::max(p.head_dim, p.head_dim_v);
    return operations < kWorthwhile * operations_per_us ? 1 : threads;
}

// Rows of packed tensors that belong to no sequence become 0.
inline void clear_rows_behind(const Rows& x, int heads, int dims, int element_size, const int* cu_seqlens, int batch,
                              index_t total) {
    const index_t end = std::clamp<index_t>(cu_seqlens[batch], 0, total);
    for (index_t token = end; token < total; ++token)
        for (int h = 0; h < heads; ++h)
            std::memset(static_cast<char*>(x.data) + (token * x.row + h * x.head) * element_size, 0,
                        static_cast<std::size_t>(dims) * element_size);
}

// element: a position in kElements.
inline void forward(const CpuKernels& kernels, const AttentionParams& p, int element, int element_size, int threads) {
    if (p.cu_seqlens_q != nullptr) {
        clear_rows_behind(p.out, p.nheads, p.head_dim_v, element_size, p.cu_seqlens_q, p.batch, p.total_q);
        const index_t end = std::clamp<index_t>(p.cu_seqlens_q[p.batch], 0, p.total_q);
        for (int h = 0; h < p.nheads; ++h)
            std::fill(p.lse.data + h * p.lse.head + end, p.lse.data + h * p.lse.head + p.total_q, -HUGE_VALF);
    }
    const long heads = static_cast<long>(p.batch) * p.nheads, scratch_floats = kernels.forward_scratch(p);
    const bool is_few = p.seqlen_q <= kernels.few;
    threads = useful_threads(p, 2, is_few ? kOperationsInPlace : kOperations, threads);
    if (is_few) {
        for_each_task(heads, scratch_floats, threads, [&](long task, float* scratch) {
            kernels.forward_few[element](p, task / p.nheads, task % p.nheads, scratch);
        });
        return;
    }
    const int chunks = count_blocks(p.seqlen_q, kernels.chunk);
    for_each_task(chunks * heads, scratch_floats, threads, [&](long task, float* scratch) {
        const int i = task % chunks * kernels.chunk, h = task / chunks % p.nheads, b = task / chunks / p.nheads;
        kernels.forward[element](p, b, h, i, i + kernels.chunk, scratch);
    });
}

// Each element of the bias gradient is summed up by one task.
inline void backward_with_bias(const CpuKernels& kernels, const AttentionParams& p, int element, int threads) {
    const int group = p.nheads / p.nheads_k, sums = p.dbias.batch == 1 ? p.dbias.copies : p.batch;
    const int parts = p.dbias.heads == 1 ? 1 : p.nheads_k, heads = p.nheads_k / parts;
    for_each_task(
        static_cast<long>(sums) * parts, kernels.backward_scratch(p), threads, [&](long task, float* scratch) {
            const int first = task % parts * heads;
            for (int b = task / parts; b < p.batch; b += sums)
                for (int h = first * group; h < (first + heads) * group; h += group)
                    kernels.backward[element](p, b, {h, h + group, 0, p.seqlen_q, 0, p.seqlen_k, true, true}, scratch);
        });
}

// A task for each key head, of five products.
inline void backward_by_heads(const CpuKernels& kernels, const AttentionParams& p, int element, int threads) {
    const int group = p.nheads / p.nheads_k;
    const long heads = static_cast<long>(p.batch) * p.nheads_k;
    for_each_task(heads, kernels.backward_scratch(p), threads, [&](long task, float* scratch) {
        const int b = task / p.nheads_k, h = task % p.nheads_k * group;
        kernels.backward[element](p, b, {h, h + group, 0, p.seqlen_q, 0, p.seqlen_k, true, true}, scratch);
    });
}

// Where there are too few heads: a task for each block of keys, then one for each chunk of queries, of seven products.
inline void backward_by_blocks(const CpuKernels& kernels, const AttentionParams& p, int element, int threads) {
    const int group = p.nheads / p.nheads_k, blocks = count_blocks(p.seqlen_k, kernels.block_n);
    const int chunks = count_blocks(p.seqlen_q, kernels.chunk);
    const long scratch_floats = kernels.backward_scratch(p), batch = p.batch;
    for_each_task(batch * p.nheads_k * blocks, scratch_floats, threads, [&](long task, float* scratch) {
        const int j = task % blocks * kernels.block_n, h = task / blocks % p.nheads_k * group;
        const int b = task / blocks / p.nheads_k;
        kernels.backward[element](p, b, {h, h + group, 0, p.seqlen_q, j, j + kernels.block_n, false, true}, scratch);
    });
    for_each_task(batch * p.nheads * chunks, scratch_floats, threads, [&](long task, float* scratch) {
        const int i = task % chunks * kernels.chunk, h = task / chunks % p.nheads, b = task / chunks / p.nheads;
        kernels.backward[element](p, b, {h, h + 1, i, i + kernels.chunk, 0, p.seqlen_k, true, false}, scratch);
    });
}

inline void backward(const CpuKernels& kernels, const AttentionParams& p, int element, int element_size, int threads) {
    if (p.cu_seqlens_q != nullptr) {
        clear_rows_behind(p.dq, p.nheads, p.head_dim, element_size, p.cu_seqlens_q, p.batch, p.total_q);
        clear_rows_behind(p.dk, p.nheads_k, p.head_dim, element_size, p.cu_seqlens_k, p.batch, p.total_k);
        clear_rows_behind(p.dv, p.nheads_k, p.head_dim_v, element_size, p.cu_seqlens_k, p.batch, p.total_k);
    }
    threads = useful_threads(p, 5, kOperations, threads);
    const bool is_one_block = p.seqlen_k <= kernels.block_n && p.seqlen_q <= kernels.chunk;
    if (p.dbias.partial != nullptr)
        backward_with_bias(kernels, p, element, threads);
    else if (is_one_block || static_cast<long>(p.batch) * p.nheads_k >= threads)
        backward_by_heads(kernels, p, element, threads);
    else
        backward_by_blocks(kernels, p, element, threads);
}

}  // namespace fastattn
