// Vectors of kLanes floats, in the compiler's own vector types, as wide as the instruction set that is compiled for.
// Everything is in an unnamed namespace, here and in the headers that include this one, and no function of the standard
// library is used: the linker would take such a function from any one instruction set for all of them.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastattn {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

#define FASTATTN_INLINE inline __attribute__((always_inline))

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int __attribute__((vector_size(4 * kLanes)));
using Words = unsigned __attribute__((vector_size(4 * kLanes)));
using Longs = unsigned long long __attribute__((vector_size(4 * kLanes)));

// Of kLanes elements that lie anywhere in memory.
template <class E>
struct InMemory {
    using Vector __attribute__((vector_size(sizeof(E) * kLanes), aligned(sizeof(E)), may_alias)) = E;
};

template <class E>
FASTATTN_INLINE auto load_vector(const E* p) {
    return *reinterpret_cast<const typename InMemory<E>::Vector*>(p);
}
template <class E, class V>
FASTATTN_INLINE void store_vector(E* p, V x) {
    *reinterpret_cast<typename InMemory<E>::Vector*>(p) = x;
}
FASTATTN_INLINE Floats load(const float* p) { return load_vector(p); }
FASTATTN_INLINE Words load(const unsigned* p) { return load_vector(p); }
FASTATTN_INLINE void store(float* p, Floats x) { store_vector(p, x); }
FASTATTN_INLINE void store(unsigned* p, Words x) { store_vector(p, x); }

FASTATTN_INLINE Floats splat(float x) { return x - Floats{}; }
FASTATTN_INLINE Words splat(unsigned x) { return x - Words{}; }
FASTATTN_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }

FASTATTN_INLINE int min(int a, int b) { return a < b ? a : b; }
FASTATTN_INLINE int max(int a, int b) { return a > b ? a : b; }
FASTATTN_INLINE int round_up(int n, int step) { return (n + step - 1) / step * step; }
FASTATTN_INLINE int padded(int n) { return round_up(n, kLanes); }

FASTATTN_INLINE Ints iota() {
    Ints x{};
    for (int i = 0; i < kLanes; ++i) x[i] = i;
    return x;
}

// 2^x for x < 127.5; 0 below 2^-126, also of -inf; NaN of NaN. The polynomial is minimax in relative error over
// [-1/2, 1/2]: 1.9e-9 by itself, 1.74 * 2^-24 with its rounding, 1.34 * 2^-24 where products are fused into sums.
FASTATTN_INLINE Floats exp2(Floats x) {
    const Floats shifted = x + 12583039.0f;  // 1.5 * 2^23 + 127: the last bits of the sum are x, rounded, + 127
    const Floats f = x - (shifted - 12583039.0f);
    Floats y = 1.5345812426e-4f * f + 1.3399930904e-3f;
    y = y * f + 9.6184890717e-3f;
    y = y * f + 5.5503286421e-2f;
    y = y * f + 0.24022646248f;
    y = y * f + 0.69314718246f;
    y = y * f + 1.0f;
    y = y * reinterpret_cast<Floats>(reinterpret_cast<Ints>(shifted) << 23);
    return x < -126.0f ? Floats{} : y;
}

// ---- the order of elements

template <int... I>
struct Indices {};
template <int N, int... I>
struct IndicesTo : IndicesTo<N - 1, N - 1, I...> {};
template <int... I>
struct IndicesTo<0, I...> {
    using Type = Indices<I...>;
};
using AllLanes = IndicesTo<kLanes>::Type;

// Elements I of a and b, one behind the other.
template <int... I, class V>
FASTATTN_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, Ints{I...});
#endif
}
template <int kStep, int... I>
FASTATTN_INLINE Floats swap_lanes(Floats x, Indices<I...>) {
    return shuffle<(I ^ kStep)...>(x, x);
}
template <class V, int... I>
FASTATTN_INLINE V zip_low(V a, V b, Indices<I...>) {
    return shuffle<(I / 2 + I % 2 * kLanes)...>(a, b);
}
template <class V, int... I>
FASTATTN_INLINE V zip_high(V a, V b, Indices<I...>) {
    return shuffle<(kLanes / 2 + I / 2 + I % 2 * kLanes)...>(a, b);
}
// a0 b0 a1 b1 ...: the first half of it, and the second.
template <class V>
FASTATTN_INLINE V zip_low(V a, V b) {
    return zip_low(a, b, AllLanes{});
}
template <class V>
FASTATTN_INLINE V zip_high(V a, V b) {
    return zip_high(a, b, AllLanes{});
}

// Reductions whose result is in every lane.
template <int kStep = kLanes / 2>
FASTATTN_INLINE Floats sum(Floats x) {
    if constexpr (kStep == 0)
        return x;
    else
        return sum<kStep / 2>(x + swap_lanes<kStep>(x, AllLanes{}));
}
template <int kStep = kLanes / 2>
FASTATTN_INLINE Floats largest(Floats x) {
    if constexpr (kStep == 0)
        return x;
    else
        return largest<kStep / 2>(max(x, swap_lanes<kStep>(x, AllLanes{})));
}

// A square of kLanes vectors, in place.
FASTATTN_INLINE void transpose(Floats (&x)[kLanes]) {
#pragma GCC unroll 4
    for (int step = kLanes / 2; step > 0; step /= 2) {
        Floats y[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes / 2; ++i) {
            y[2 * i] = zip_low(x[i], x[i + kLanes / 2]);
            y[2 * i + 1] = zip_high(x[i], x[i + kLanes / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) x[i] = y[i];
    }
}

// The sums of kLanes vectors, one in each lane.
template <int kCount = kLanes>
FASTATTN_INLINE Floats sums(Floats (&x)[kLanes]) {
    if constexpr (kCount == 1) {
        return x[0];
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < kCount / 2; ++i)
            x[i] = zip_low(x[i], x[i + kCount / 2]) + zip_high(x[i], x[i + kCount / 2]);
        return sums<kCount / 2>(x);
    }
}

// ---- integers

// Products of the even elements, 64 bits each.
FASTATTN_INLINE Longs multiply_even(Words a, Words b) {
#if defined(__AVX512F__)
    return reinterpret_cast<Longs>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<Longs>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
    return reinterpret_cast<Longs>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
    return (reinterpret_cast<Longs>(a) & 0xffffffffull) * (reinterpret_cast<Longs>(b) & 0xffffffffull);
#endif
}

}  // namespace
}  // namespace fastattn
