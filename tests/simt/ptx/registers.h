// The data types of PTX under their own names, and registers: a register holds bits, which every instruction reads and
// writes as the type it names.
#pragma once

#include <limits>

#include "checks.h"

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using f16 = simt::Half;
using bf16 = simt::Bfloat16;
using f16x2 = simt::Pair<f16>;
using bf16x2 = simt::Pair<bf16>;
using f32 = float;
using f64 = double;
using pred = bool;

template <size_t bytes>
struct UnsignedOf;
template <>
struct UnsignedOf<1> {
    using Type = u8;
};
template <>
struct UnsignedOf<2> {
    using Type = u16;
};
template <>
struct UnsignedOf<4> {
    using Type = u32;
};
template <>
struct UnsignedOf<8> {
    using Type = u64;
};
template <class T>
using Bits = typename UnsignedOf<sizeof(T)>::Type;

// The low bits of a register, as a T.
template <class T, class Register>
__forceinline__ constexpr T as(Register from) {
    static_assert(sizeof(T) <= sizeof(Register), "a register is read by no wider type");
    if constexpr (std::is_same<T, Register>::value)
        return from;
    else
        return __builtin_bit_cast(T, static_cast<Bits<T>>(__builtin_bit_cast(Bits<Register>, from)));
}

// A narrower value is extended: a signed integer by its sign, everything else by zeros.
template <class Register, class T>
__forceinline__ void set(Register& to, T value) {
    static_assert(sizeof(T) <= sizeof(Register), "a register is written by no wider type");
    if constexpr (std::is_integral<T>::value)
        to = __builtin_bit_cast(Register, static_cast<Bits<Register>>(value));
    else
        to = __builtin_bit_cast(Register, static_cast<Bits<Register>>(__builtin_bit_cast(Bits<T>, value)));
}

template <class Part, class Whole>
__forceinline__ Part part(Whole whole, int i) {
    return static_cast<Part>(__builtin_bit_cast(Bits<Whole>, whole) >> (8 * sizeof(Part) * i));
}
template <class Whole, class Part, size_t count>
__forceinline__ Whole joined(const Part (&parts)[count]) {
    static_assert(count * sizeof(Part) == sizeof(Whole), "the parts fill the whole");
    Bits<Whole> bits = 0;
    for (size_t i = 0; i < count; ++i) bits |= Bits<Whole>{parts[i]} << (8 * sizeof(Part) * i);
    return __builtin_bit_cast(Whole, bits);
}

}  // namespace ptx
