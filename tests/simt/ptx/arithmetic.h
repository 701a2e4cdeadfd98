// What PTX instructions compute. Integers wrap around (the code is compiled with -fwrapv). Floating-point operations
// are those of IEEE 754; the approximate ones (ex2.approx and others) are computed at full precision. The bits of a NaN
// are not modelled.
#pragma once

#include <cfenv>

#include "registers.h"

namespace ptx {

// ---- integers

template <class T>
T mul_hi(T a, T b) {
    using Wide = std::conditional_t<std::is_signed<T>::value, __int128, unsigned __int128>;
    return static_cast<T>(Wide{a} * b >> (8 * sizeof(T)));
}
// Division by zero has no specified result; -2^31 / -1 overflows, which traps in C++.
template <class T>
T divide(T a, T b) {
    if (b == 0) return static_cast<T>(-1);
    return std::is_signed<T>::value && b == static_cast<T>(-1) ? static_cast<T>(-a) : static_cast<T>(a / b);
}
template <class T>
T remainder(T a, T b) {
    if (b == 0) return a;
    return std::is_signed<T>::value && b == static_cast<T>(-1) ? T{0} : static_cast<T>(a % b);
}
template <class To, class From>
To clamp(From value) {
    const __int128 low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max(), wide = value;
    return static_cast<To>(wide < low ? low : wide > high ? high : wide);
}
template <class T>
std::enable_if_t<std::is_integral<T>::value, T> minimum(T a, T b) {
    return a < b ? a : b;
}
template <class T>
std::enable_if_t<std::is_integral<T>::value, T> maximum(T a, T b) {
    return a > b ? a : b;
}

// ---- bits

template <class T>
T shift_left(T a, u32 count) {
    return count >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << count);
}
template <class T>
T shift_right(T a, u32 count) {
    constexpr u32 kBits = 8 * sizeof(T);
    if (count >= kBits) return a < 0 ? static_cast<T>(-1) : T{0};
    return static_cast<T>(a >> count);
}
inline u32 funnel_left(u32 low, u32 high, u32 count) {
    const u64 both = u64{high} << 32 | low;
    return count >= 32 ? low : static_cast<u32>(both << count >> 32);
}
inline u32 funnel_right(u32 low, u32 high, u32 count) {
    const u64 both = u64{high} << 32 | low;
    return count >= 32 ? high : static_cast<u32>(both >> count);
}
// Bit i of `table` is the result where a, b, c have the bits of the number i.
inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
    u32 result = 0;
    for (int i = 0; i < 8; ++i)
        if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}
// Each half-byte of `selection` names a byte of {b, a}; its highest bit takes that byte's sign instead.
inline u32 prmt(u32 a, u32 b, u32 selection) {
    const u64 bytes = u64{b} << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 selected = selection >> (4 * i) & 15;
        u32 byte = bytes >> (8 * (selected & 7)) & 0xff;
        if (selected & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}
template <class T>
u32 count_leading_zeros(T a) {
    return a == 0 ? 8 * sizeof(T) : __builtin_clzll(a) - (64 - 8 * sizeof(T));
}
template <class T>
T reverse_bits(T a) {
    T result = 0;
    for (unsigned i = 0; i < 8 * sizeof(T); ++i) result |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
    return result;
}
// The highest bit that differs from the sign; all ones if there is none.
template <class T>
u32 find_leading_bit(T a) {
    const Bits<T> bits = static_cast<Bits<T>>(a < 0 ? ~a : a);
    return bits == 0 ? ~u32{0} : 8 * sizeof(T) - 1 - count_leading_zeros(bits);
}
template <class T>
u32 find_leading_bit_shift(T a) {
    const u32 bit = find_leading_bit(a);
    return bit == ~u32{0} ? bit : 8 * sizeof(T) - 1 - bit;
}
// Bits past the end are copies of the sign, which is the last bit of the field, or of the operand.
template <class T>
T extract_bits(T a, u32 position, u32 length) {
    constexpr u32 kBits = 8 * sizeof(T);
    position &= 0xff;
    length &= 0xff;
    if (length == 0) return 0;
    const u32 last = position + length < kBits ? position + length - 1 : kBits - 1;
    const bool sign = std::is_signed<T>::value && (a >> last & 1);
    Bits<T> result = 0;
    for (u32 i = 0; i < kBits; ++i) {
        const bool bit = i < length && position + i < kBits ? (a >> (position + i) & 1) : sign;
        result |= Bits<T>{bit} << i;
    }
    return static_cast<T>(result);
}
template <class T>
T insert_bits(T from, T into, u32 position, u32 length) {
    position &= 0xff;
    length &= 0xff;
    for (u32 i = 0; i < length && position + i < 8 * sizeof(T); ++i) {
        const T bit = T{1} << (position + i);
        into = (from >> i & 1) ? into | bit : into & ~bit;
    }
    return into;
}

// ---- floating point

// While it lives, operations round in this direction.
class Rounding {
  public:
    explicit Rounding(int mode) : before_(std::fegetround()) { std::fesetround(mode); }
    ~Rounding() { std::fesetround(before_); }
    Rounding(const Rounding&) = delete;
    Rounding& operator=(const Rounding&) = delete;

  private:
    int before_;
};

// Subnormal numbers become zeros of the same sign.
__forceinline__ f32 flush(f32 x) { return std::fabs(x) < std::numeric_limits<f32>::min() ? std::copysign(0.0f, x) : x; }
template <class T>
T saturate(T x) {
    return f64(x) > 0.0 ? (f64(x) < 1.0 ? x : T(1.0f)) : T(0.0f);  // of NaN, 0
}
template <class T>
bool is_nan(T x) {
    return x != x;
}
inline f64 fma(f64 a, f64 b, f64 c) { return std::fma(a, b, c); }
inline f32 divide_approx(f32 a, f32 b) {
    const f32 size = std::fabs(b);
    if (size > 0x1p126f && std::isfinite(size)) return std::isinf(a) ? a * 0.0f : std::copysign(0.0f, a) * b;
    return a / b;
}

// A NaN gives way to a number, and -0 < +0.
template <class T>
std::enable_if_t<!std::is_integral<T>::value, T> minimum(T a, T b) {
    if (is_nan(a)) return b;
    if (is_nan(b)) return a;
    if (a == b) return std::signbit(f64(a)) ? a : b;
    return a < b ? a : b;
}
template <class T>
std::enable_if_t<!std::is_integral<T>::value, T> maximum(T a, T b) {
    if (is_nan(a)) return b;
    if (is_nan(b)) return a;
    if (a == b) return std::signbit(f64(a)) ? b : a;
    return a > b ? a : b;
}
template <class T>
T or_nan(T result, T a, T b) {
    return is_nan(a) || is_nan(b) ? T(std::numeric_limits<f32>::quiet_NaN()) : result;
}

// ---- float16 and bfloat16; the operators + - * are those of simt_half.h

// The exact a * b + c rounded to odd, which leaves the rounding to 16 bits exact.
template <class T>
simt::Only16Bit<T> fma(T a, T b, T c) {
    const f64 product = f64(f32(a)) * f32(b), addend = f32(c), sum = product + addend;
    const f64 of_product = sum - addend, error = (product - of_product) + (addend - (sum - of_product));
    f64 odd = sum;
    if (std::isfinite(sum) && error != 0.0 && !(as<u64>(sum) & 1))
        odd = std::nextafter(sum, error > 0.0 ? HUGE_VAL : -HUGE_VAL);
    return T::from_double(odd);
}
template <class T>
simt::Only16Bit<T> flip_signs(T a) {
    return as<T>(static_cast<u16>(as<u16>(a) ^ 0x8000));
}
template <class T>
simt::Only16Bit<T> clear_signs(T a) {
    return as<T>(static_cast<u16>(as<u16>(a) & 0x7fff));
}

template <class T>
simt::Pair<T> fma(simt::Pair<T> a, simt::Pair<T> b, simt::Pair<T> c) {
    return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)};
}
template <class T>
simt::Pair<T> flip_signs(simt::Pair<T> a) {
    return {flip_signs(a.x), flip_signs(a.y)};
}
template <class T>
simt::Pair<T> clear_signs(simt::Pair<T> a) {
    return {clear_signs(a.x), clear_signs(a.y)};
}
template <class T>
simt::Pair<T> minimum(simt::Pair<T> a, simt::Pair<T> b) {
    return {minimum(a.x, b.x), minimum(a.y, b.y)};
}
template <class T>
simt::Pair<T> maximum(simt::Pair<T> a, simt::Pair<T> b) {
    return {maximum(a.x, b.x), maximum(a.y, b.y)};
}
template <class T>
simt::Pair<T> or_nan(simt::Pair<T> result, simt::Pair<T> a, simt::Pair<T> b) {
    return {or_nan(result.x, a.x, b.x), or_nan(result.y, a.y, b.y)};
}

// ---- conversions

// A number outside of the range gives the nearest one inside. NaN gives 0, or 2^63 where 64 bits are involved.
template <class To, class From>
To to_integer(f64 whole) {
    constexpr bool is_wide = sizeof(To) == 8 || sizeof(From) == 8;
    constexpr To lowest = std::numeric_limits<To>::min(), highest = std::numeric_limits<To>::max();
    if (whole != whole) return is_wide ? static_cast<To>(Bits<To>{1} << (8 * sizeof(To) - 1)) : To{0};
    if (whole <= static_cast<f64>(lowest)) return lowest;
    return whole >= static_cast<f64>(highest) ? highest : static_cast<To>(whole);
}
// To or from a 16-bit type, to nearest; from wider ones by one rounding.
template <class To, class From>
To narrow(From from) {
    if constexpr (std::is_same<To, f16>::value || std::is_same<To, bf16>::value) {
        if constexpr (std::is_same<From, f64>::value || (std::is_integral<From>::value && sizeof(From) >= 4))
            return To::from_double(static_cast<f64>(from));
        else
            return To(static_cast<f32>(from));
    } else {
        return static_cast<To>(static_cast<f32>(from));
    }
}
// In the given direction; a 16-bit result is the nearest one or its neighbour.
template <class To, class From>
To rounded(From from, int mode) {
    if constexpr (sizeof(To) == 2) {
        const f64 exact = static_cast<f64>(from);
        const To nearest = To::from_double(exact);
        if (is_nan(nearest) || f64(nearest) == exact) return nearest;
        const bool is_larger = std::fabs(f64(nearest)) > std::fabs(exact);
        const bool must_be_larger = mode == FE_UPWARD ? exact > 0 : mode == FE_DOWNWARD && exact < 0;
        const int step = is_larger == must_be_larger ? 0 : must_be_larger ? 1 : -1;
        return as<To>(static_cast<u16>(as<u16>(nearest) + step));
    } else {
        const Rounding rounding(mode);
        volatile From before = from;
        volatile To after = static_cast<To>(before);
        return after;
    }
}
// 10 bits of fraction, to nearest, ties away from zero.
inline b32 to_tf32(f32 x) { return is_nan(x) ? 0x7fffffffu : (as<u32>(x) + 0x1000u) & ~0x1fffu; }

}  // namespace ptx
