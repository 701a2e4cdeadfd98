// Where a head's rows lie, and their way into scratch memory and back.
#pragma once

#include "../attention.h"
#include "elements.h"

namespace fastattn {
namespace {

FASTATTN_INLINE index_t clamp(index_t token, index_t total) { return token < 0 ? 0 : token > total ? total : token; }

// Where sequence b lies and how long it is. Lengths that do not fit the tensors are cut, so nothing outside is touched.
struct Sequence {
    int b;
    index_t first_q = 0, first_k = 0;  // tokens before it; 0 when dense
    int seqlen_q, seqlen_k;
    int shift;  // key i + shift is on the diagonal of query i

    Sequence(const AttentionParams& p, int b) : b(b), seqlen_q(p.seqlen_q), seqlen_k(p.seqlen_k) {
        if (p.cu_seqlens_q != nullptr) {
            first_q = clamp(p.cu_seqlens_q[b], p.total_q);
            first_k = clamp(p.cu_seqlens_k[b], p.total_k);
            seqlen_q = static_cast<int>(clamp(clamp(p.cu_seqlens_q[b + 1], p.total_q) - first_q, p.seqlen_q));
            seqlen_k = static_cast<int>(clamp(clamp(p.cu_seqlens_k[b + 1], p.total_k) - first_k, p.seqlen_k));
        }
        if (p.seqused_k != nullptr) seqlen_k = static_cast<int>(clamp(p.seqused_k[b], seqlen_k));
        shift = p.bottom_right ? seqlen_k - seqlen_q : 0;
    }
};

FASTATTN_INLINE int key_head(const AttentionParams& p, int h) { return h / (p.nheads / p.nheads_k); }

template <class E>
FASTATTN_INLINE E* rows_of(const Rows& x, int b, int h, index_t token) {
    return static_cast<E*>(x.data) + b * x.batch + h * x.head + token * x.row;
}
FASTATTN_INLINE index_t row_index(const PerRow& x, const Sequence& s, int h) {
    return s.b * x.batch + h * x.head + s.first_q;
}

// ---- copies; `to_row` and `from_row` are the distances of rows

template <class E>
void copy_rows(float* to, int to_row, const E* from, index_t from_row, int rows, int dims, float factor) {
    for (int i = 0; i < rows; ++i, to += to_row, from += from_row)
        for (int d = 0; d < dims; d += kLanes) store(to + d, load_some(from + d, dims - d) * factor);
}

// Row d of `to` gets element d of all rows, and zeros up to a whole vector.
template <class E>
void copy_transposed(float* to, int to_row, const E* from, index_t from_row, int rows, int dims) {
    for (int i = 0; i < rows; i += kLanes)
        for (int d = 0; d < dims; d += kLanes) {
            Floats x[kLanes];
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; ++r)
                x[r] = i + r < rows ? load_some(from + (i + r) * from_row + d, dims - d) : Floats{};
            transpose(x);
            if (d + kLanes <= dims) {
#pragma GCC unroll 16
                for (int r = 0; r < kLanes; ++r) store(to + (d + r) * to_row + i, x[r]);
            } else {
                for (int r = 0; r < dims - d; ++r) store(to + (d + r) * to_row + i, x[r]);
            }
        }
}

FASTATTN_INLINE void fill_zero(float* x, long count) {
    for (long i = 0; i < count; i += kLanes) store(x + i, Floats{});
}

// to (+)= factor * from
template <class E>
void store_rows(E* to, index_t to_row, const float* from, int from_row, int rows, int dims, float factor, bool adds) {
    for (int i = 0; i < rows; ++i, to += to_row, from += from_row)
        for (int d = 0; d < dims; d += kLanes) {
            Floats x = load(from + d) * factor;
            if (adds) x += load_some(to + d, dims - d);
            store_some(to + d, x, dims - d);
        }
}

// Scratch memory, handed out piece by piece, in whole lines of the cache.
struct Scratch {
    float* next;
    float* take(long count) {
        float* const taken = next;
        next += (count + 15) / 16 * 16;
        return taken;
    }
};

// ---- rows of what comes next

// The head that comes next if tasks are taken in order.
struct Following {
    int h, h_k;
    Sequence s;
    Following(const AttentionParams& p, int b, int h_now, int heads)
        : h(h_now + heads < p.nheads ? h_now + heads : 0),
          h_k(key_head(p, h)),
          s(p, h == 0 ? min(b + 1, p.batch - 1) : b) {}
};

// Rows that are fetched into the second-level cache, one of each tensor at a time, while something else is computed: of
// short sequences the hardware sees no pattern in time, and all rows at once would wait for each other.
class Ahead {
  public:
    template <class E>
    void add(const Rows& x, int b, int h, index_t token, int rows, int dims) {
        tensors_[count_++] = {reinterpret_cast<const char*>(rows_of<E>(x, b, h, token)),
                              x.row * static_cast<index_t>(sizeof(E)), rows, dims * static_cast<int>(sizeof(E))};
    }
    // Of the tensors begin ... end - 1.
    void fetch_row(int begin = 0, int end = kMost) {
        for (int i = begin; i < min(end, count_); ++i) {
            Tensor& x = tensors_[i];
            if (x.rows-- <= 0) continue;
            for (int byte = 0; byte < x.bytes; byte += 64) __builtin_prefetch(x.row + byte, 0, 2);
            x.row += x.step;
        }
    }

  private:
    static constexpr int kMost = 8;
    struct Tensor {
        const char* row;
        index_t step;
        int rows, bytes;
    } tensors_[kMost];
    int count_ = 0;
};

}  // namespace
}  // namespace fastattn
