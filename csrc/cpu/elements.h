// The elements of tensors, as vectors of floats: float, and the two half types by their bits.
#pragma once

#include "vectors.h"

namespace fastattn {
namespace {

struct Float16 {
    unsigned short bits;
};
struct Bfloat16 {
    unsigned short bits;
};

using Shorts = unsigned short __attribute__((vector_size(2 * kLanes)));
using Bytes = unsigned char __attribute__((vector_size(kLanes)));

// ---- half types to floats and back, to nearest and half to even

FASTATTN_INLINE Floats to_floats(Words bits, Bfloat16) { return reinterpret_cast<Floats>(bits << 16); }

FASTATTN_INLINE Floats to_floats(Words bits, Float16) {
    const Words magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
    const Words normal = (magnitude << 13) + (112u << 23), infinite = (magnitude << 13) | 0x7f800000u;
    const Floats subnormal = __builtin_convertvector(reinterpret_cast<Ints>(magnitude), Floats) * 0x1p-24f;
    Words x = magnitude < 0x0400u ? reinterpret_cast<Words>(subnormal) : normal;
    x = magnitude < 0x7c00u ? x : infinite;
    return reinterpret_cast<Floats>(x | sign);
}

FASTATTN_INLINE Words to_bits(Floats x, Bfloat16) {
    const Words bits = reinterpret_cast<Words>(x), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return x == x ? rounded : splat(0x7fc0u);
}

FASTATTN_INLINE Words to_bits(Floats x, Float16) {
    const Words bits = reinterpret_cast<Words>(x), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
    const Words normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    // Their last bit is that of 1/2 in a float, whose addition rounds.
    const Words subnormal = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) + 0.5f) - 0x3f000000u;
    Words y = magnitude < (113u << 23) ? subnormal : normal;
    y = magnitude < 0x477ff000u ? y : splat(0x7c00u);  // 65520 is rounded up
    y = magnitude <= 0x7f800000u ? y : splat(0x7e00u);
    return y | sign;
}

// ---- loads and stores

template <class E>
FASTATTN_INLINE Floats load(const E* p) {
    return to_floats(__builtin_convertvector(load_vector(&p->bits), Words), E{});
}
template <class E>
FASTATTN_INLINE void store(E* p, Floats x) {
    store_vector(&p->bits, __builtin_convertvector(to_bits(x, E{}), Shorts));
}

// The first `count` elements, at least 1, and zeros.
FASTATTN_INLINE Floats load_some(const float* p, int count) {
    if (count >= kLanes) return load(p);
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_maskz_loadu_ps(static_cast<unsigned short>((1 << count) - 1), p));
#elif defined(__AVX2__)
    return reinterpret_cast<Floats>(_mm256_maskload_ps(p, reinterpret_cast<__m256i>(iota() < count)));
#else
    Floats x{};
    __builtin_memcpy(&x, p, sizeof *p * count);
    return x;
#endif
}
FASTATTN_INLINE void store_some(float* p, Floats x, int count) {
    if (count >= kLanes) return store(p, x);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<unsigned short>((1 << count) - 1), reinterpret_cast<__m512>(x));
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(iota() < count), reinterpret_cast<__m256>(x));
#else
    __builtin_memcpy(p, &x, sizeof *p * count);
#endif
}
template <class E>
FASTATTN_INLINE Floats load_some(const E* p, int count) {
    if (count >= kLanes) return load(p);
    Shorts x{};
    __builtin_memcpy(&x, p, sizeof *p * count);
    return to_floats(__builtin_convertvector(x, Words), E{});
}
template <class E>
FASTATTN_INLINE void store_some(E* p, Floats x, int count) {
    if (count >= kLanes) return store(p, x);
    const Shorts y = __builtin_convertvector(to_bits(x, E{}), Shorts);
    __builtin_memcpy(p, &y, sizeof *p * count);
}

// Of a mask: all bits of an element whose byte is not 0.
FASTATTN_INLINE Ints load_some(const unsigned char* p, int count) {
    Bytes x{};
    if (count >= kLanes)
        x = load_vector(p);
    else
        __builtin_memcpy(&x, p, count);
    return __builtin_convertvector(x, Ints) != 0;
}

}  // namespace
}  // namespace fastattn
