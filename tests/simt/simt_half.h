// float16 and bfloat16 under CUDA's names. Values are stored as 16 bits; arithmetic is done in float and rounded once
// to the nearest even, which is exact for one operation (24 bits >= 2 * 11 + 2), and in double for the fused
// multiply-add.
#pragma once

#include "simt_math.h"

namespace simt {

struct Half {
    _Float16 value;
    Half() = default;  // trivial, so that arrays of it can be __shared__
    Half(float x) : value(static_cast<_Float16>(x)) {}
    operator float() const { return value; }
    static Half from_double(double x) {
        Half h;
        h.value = static_cast<_Float16>(x);
        return h;
    }
};

struct Bfloat16 {
    uint16_t bits;
    Bfloat16() = default;
    Bfloat16(float x) {
        const uint32_t wide = bits_as<uint32_t>(x);
        const uint32_t nearest_even = (wide + 0x7fffu + (wide >> 16 & 1)) >> 16;
        bits = static_cast<uint16_t>(x == x ? nearest_even : 0x7fffu);  // one NaN for all NaNs
    }
    operator float() const { return bits_as<float>(uint32_t{bits} << 16); }
    // To float by rounding to odd, which leaves the second rounding exact.
    static Bfloat16 from_double(double x) {
        float narrow = static_cast<float>(x);
        const bool exact = narrow == x || !std::isfinite(narrow);
        if (!exact && std::fabs(static_cast<double>(narrow)) > std::fabs(x)) narrow = std::nextafterf(narrow, 0.0f);
        return exact ? Bfloat16(narrow) : Bfloat16(bits_as<float>(bits_as<uint32_t>(narrow) | 1u));
    }
};

template <class T>
struct __attribute__((aligned(4))) Pair {
    T x, y;
    Pair() = default;
    Pair(T x, T y) : x(x), y(y) {}
};

template <class T>
inline constexpr bool kIs16Bit = std::is_same<T, Half>::value || std::is_same<T, Bfloat16>::value;
template <class T>
using Only16Bit = std::enable_if_t<kIs16Bit<T>, T>;

}  // namespace simt

using __half = simt::Half;
using half = simt::Half;
using __half2 = simt::Pair<simt::Half>;
using half2 = __half2;
using __nv_bfloat16 = simt::Bfloat16;
using __nv_bfloat162 = simt::Pair<simt::Bfloat16>;

// ---- arithmetic: the same names for both types, alone and in pairs

#define SIMT_ARITHMETIC(name, op)                              \
    template <class T>                                         \
    simt::Only16Bit<T> name(T a, T b) {                        \
        return static_cast<float>(a) op static_cast<float>(b); \
    }                                                          \
    template <class T>                                         \
    simt::Pair<T> name##2(simt::Pair<T> a, simt::Pair<T> b) {  \
        return {name(a.x, b.x), name(a.y, b.y)};               \
    }                                                          \
    namespace simt {                                           \
    template <class T>                                         \
    Only16Bit<T> operator op(T a, T b) {                       \
        return name(a, b);                                     \
    }                                                          \
    template <class T>                                         \
    Pair<T> operator op(Pair<T> a, Pair<T> b) {                \
        return name##2(a, b);                                  \
    }                                                          \
    }
SIMT_ARITHMETIC(__hadd, +)
SIMT_ARITHMETIC(__hsub, -)
SIMT_ARITHMETIC(__hmul, *)
SIMT_ARITHMETIC(__hdiv, /)
#undef SIMT_ARITHMETIC

template <class T>
simt::Only16Bit<T> __hfma(T a, T b, T c) {
    return T::from_double(static_cast<double>(float(a)) * float(b) + float(c));
}
template <class T>
simt::Pair<T> __hfma2(simt::Pair<T> a, simt::Pair<T> b, simt::Pair<T> c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
template <class T>
simt::Only16Bit<T> __hmax(T a, T b) {
    return fmaxf(a, b);
}
template <class T>
simt::Only16Bit<T> __hmin(T a, T b) {
    return fminf(a, b);
}
template <class T>
simt::Pair<T> __hmax2(simt::Pair<T> a, simt::Pair<T> b) {
    return {__hmax(a.x, b.x), __hmax(a.y, b.y)};
}
template <class T>
simt::Pair<T> __hmin2(simt::Pair<T> a, simt::Pair<T> b) {
    return {__hmin(a.x, b.x), __hmin(a.y, b.y)};
}
template <class T>
simt::Only16Bit<T> hexp2(T a) {
    return exp2f(a);
}
template <class T>
simt::Pair<T> h2exp2(simt::Pair<T> a) {
    return {hexp2(a.x), hexp2(a.y)};
}

// ---- conversions

template <class T>
float __low2float(simt::Pair<T> a) {
    return a.x;
}
template <class T>
float __high2float(simt::Pair<T> a) {
    return a.y;
}

inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half2 __float2half2_rn(float x) { return {x, x}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline unsigned short __half_as_ushort(__half x) { return simt::bits_as<unsigned short>(x); }
inline __half __ushort_as_half(unsigned short bits) { return simt::bits_as<__half>(bits); }

inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {x, x}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return simt::bits_as<__nv_bfloat16>(bits); }
