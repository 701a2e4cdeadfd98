// Vector types, arithmetic and bit functions of CUDA. The fast approximations are computed at full precision here: a
// test that needs a GPU's approximation error needs a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define SIMT_VECTORS(type, vector2, vector4, align2, align4)         \
    struct __attribute__((aligned(align2))) vector2 {                \
        type x, y;                                                   \
    };                                                               \
    struct __attribute__((aligned(align4))) vector4 {                \
        type x, y, z, w;                                             \
    };                                                               \
    inline vector2 make_##vector2(type x, type y) { return {x, y}; } \
    inline vector4 make_##vector4(type x, type y, type z, type w) { return {x, y, z, w}; }
SIMT_VECTORS(float, float2, float4, 8, 16)
SIMT_VECTORS(int, int2, int4, 8, 16)
SIMT_VECTORS(unsigned, uint2, uint4, 8, 16)
#undef SIMT_VECTORS

#define SIMT_MIN_MAX(type)                                    \
    inline type min(type a, type b) { return a < b ? a : b; } \
    inline type max(type a, type b) { return a > b ? a : b; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// Macros, because the C library's <math.h> declares functions of these names in some versions.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __fdividef(x, y) ((x) / (y))
#define rsqrtf(x) (1.0f / sqrtf(x))

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __frcp_rn(float x) { return 1.0f / x; }

namespace simt {
template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same number of bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace simt

inline float __int_as_float(int bits) { return simt::bits_as<float>(bits); }
inline float __uint_as_float(unsigned bits) { return simt::bits_as<float>(bits); }
inline int __float_as_int(float x) { return simt::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bits_as<unsigned>(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
