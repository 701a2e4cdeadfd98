// What every attention kernel is called with. Kernels, launcher and tests share this one struct; it needs no header, so
// that all their compilers take it.
#pragma once

namespace fastattn {

using index_t = long long;  // offsets into tensors, in elements

// Element (b, h, i, d) lies at data + b * batch + h * head + i * row + d; i counts from the sequence's first token.
// Packed tensors (total, heads, head_dim) have batch = 0.
struct Rows {
    void* data;
    index_t batch, head, row;
    int is_aligned;  // rows may be read and written four elements at a time
};

// Element (b, h, i, j) of a mask or a bias lies at data + b * batch + h * head + i * row + j * key, with stride 0 where
// it broadcasts; i and j are positions inside the sequence. data is null where there is none.
struct Scores {
    const void* data;
    index_t batch, head, row, key;
};

// One float for each (b, h, i), at data + b * batch + h * head + i.
struct PerRow {
    float* data;
    index_t batch, head;
};

enum BiasType { kBiasFloat32, kBiasFloat16, kBiasBfloat16 };

// The bias gradient: `copies` partial sums of (batch, heads, rows, keys) floats each, contiguous. A size of 1 means
// that the bias broadcasts there, and everything is summed; else it is the size of the scores.
struct BiasGrad {
    void* data;  // their sum in the bias's own type, (batch, heads, rows, keys), contiguous
    float* partial;
    int copies, batch, heads, rows, keys;
};

// Key j is allowed for query i iff -left <= j - (i + shift) <= right, where shift is seqlen_k - seqlen_q of that
// sequence if bottom_right, else 0, and iff the mask is true there.
struct AttentionParams {
    Rows q;      // (batch, nheads, seqlen_q, head_dim)
    Rows k;      // (batch, nheads_k, seqlen_k, head_dim)
    Rows v;      // (batch, nheads_k, seqlen_k, head_dim_v)
    Rows out;    // (batch, nheads, seqlen_q, head_dim_v)
    PerRow lse;  // natural logarithm

    Scores mask;  // bytes, not 0 = may attend
    Scores bias;
    BiasType bias_type;

    // Backward only.
    Rows dout;
    Rows dq, dk, dv;
    PerRow dlse;    // null without a gradient of lse
    PerRow delta;   // rowsum(out * dout) - dlse, written by the first backward kernel
    PerRow dq_sum;  // float dq between key tiles, head_dim floats for each (b, h, i); null where dq itself is float
    BiasGrad dbias;

    // Packed only; null when dense. Sequence b owns tokens cu_seqlens[b] ... cu_seqlens[b + 1] - 1.
    const int* cu_seqlens_q;
    const int* cu_seqlens_k;
    index_t total_q, total_k;  // tokens of the packed tensors

    int batch, nheads, nheads_k;
    int seqlen_q, seqlen_k;  // packed: the longest
    int head_dim, head_dim_v;

    float scale;
    int left, right, bottom_right;

    // Dropout: a weight is kept iff its random word >= dropout_threshold, and then multiplied by dropout_rescale.
    const index_t* seed;  // null without dropout
    unsigned dropout_threshold;
    float dropout_rescale;
};

}  // namespace fastattn
