// Products of units of 16 x 16 by tensor cores: elements of 16 bits, sums in float. An instruction set of its own for
// each generation, with the same members:
//
//   Mma8x8x4    7.0            four quad pairs of eight lanes each, two by two
//   Mma16x8x8   7.5            two side by side
//   Mma16x8x16  8.0 and newer  the same, with twice the k and bfloat16, too
//
// Of a unit a lane holds rows 2 y and 2 y + 1 and the columns 4 x to 4 x + 3, as Lane<T> says; so masks, softmax and
// dropout need not know what multiplied. The instructions scatter a lane's part over the unit. What is contiguous in a
// tensor is therefore apart in shared memory, where rows lie in the order of row_line(), and keys and dimensions in
// that of column_line(); the contracted index may have any order, if it has the same on both sides:
//
//        the unit, as lanes hold it              its 16 columns in a line, Mma16x8x8 and Mma16x8x16
//        column  0 1 2 3   4 5 6 7  ...         0 1  4 5  8 9  12 13 | 2 3  6 7  10 11  14 15
//     row 0, 1   lane x=0  lane x=1 ...         x=0  x=1  x=2  x=3   | x=0  x=1  x=2    x=3
//         2, 3   y = 1                          lower half           | upper half of the instruction's columns
#pragma once

#include "tile_copy.cuh"

namespace fastattn {

// ---- two elements in a register

template <class E>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<__half> = true;

template <class E>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<__half>(float low, float high) {
    const __half2 x = __floats2half2_rn(low, high);
    return reinterpret_cast<const unsigned&>(x);
}
template <>
__device__ __forceinline__ unsigned pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const unsigned&>(x);
}

// How the operands of a product lie in lines: a line for each of its rows, and one for each column or for each k.
enum Operands { kRowsRows, kRowsColumns };

// ---- 7.5 and newer: 16 x 8 products, operands by ldmatrix

// What Mma16x8x8 and Mma16x8x16 have in common: everything but the instruction.
struct Mma16x8 {
    static constexpr int kRegisters = 4;  // of a lane, for 16 x 16 elements of an operand
    static constexpr int column_bit(int n) { return n / 2; }
    static constexpr int x(int lane) { return lane % 4; }
    static constexpr int y(int lane) { return lane / 4; }

    // The line of row 2 y + i of a unit, and that of its column or of the contracted index.
    static constexpr int row_line(int row) { return row % 2 * 8 + row / 2; }
    static constexpr int column_line(int n) { return n / 2 % 2 * 8 + n / 4 * 2 + n % 2; }

    // Eight contiguous elements of a row, whose first one's index is a multiple of eight, to their places in a line.
    static __device__ __forceinline__ void store_eight(unsigned char* line, int chunk, uint4 x) {
        unsigned char* to = line + chunk / 2 * 32 + chunk % 2 * 8;
        *reinterpret_cast<uint2*>(to) = make_uint2(x.x, x.z);
        *reinterpret_cast<uint2*>(to + 16) = make_uint2(x.y, x.w);
    }

    // Where a lane's loads begin.
    template <int kLine>
    static __device__ __forceinline__ int left_rows(int lane) {
        return lane % 16 * kLine + lane / 16 * 16;
    }
    template <int kLine>
    static __device__ __forceinline__ int right_rows(int lane) {
        return left_rows<kLine>(lane);
    }
    template <int kLine>
    static __device__ __forceinline__ int right_columns(int lane) {
        return left_rows<kLine>(lane);
    }

    // 16 elements of 16 lines, which are rows of the left or columns of the right operand.
    template <int kLine>
    static __device__ __forceinline__ void load_rows(unsigned (&r)[4], const unsigned char* from) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(from))
                     : "memory");
    }
    // 16 elements of 16 lines, which are k of either operand.
    template <int kLine>
    static __device__ __forceinline__ void load_columns(unsigned (&r)[4], const unsigned char* from) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %2, %1, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(from))
                     : "memory");
    }

    // A unit of weights as left operand, with its columns as k: they are there already.
    template <class E>
    static __device__ __forceinline__ void to_left(unsigned (&a)[4], const float* upper, const float* lower, int) {
        a[0] = pack<E>(upper[0], upper[1]), a[1] = pack<E>(lower[0], lower[1]);
        a[2] = pack<E>(upper[2], upper[3]), a[3] = pack<E>(lower[2], lower[3]);
    }

  private:
    static __device__ __forceinline__ unsigned shared_address(const unsigned char* p) {
        return static_cast<unsigned>(__cvta_generic_to_shared(p));
    }
};

struct Mma16x8x8 : Mma16x8 {
    // A lane's part of a unit, four columns of two rows, += left right.
    template <class E, Operands>
    static __device__ __forceinline__ void multiply(float* upper, float* lower, const unsigned (&a)[4],
                                                    const unsigned (&b)[4]) {
        mma(upper, lower, a[0], a[1], b[0]);
        mma(upper + 2, lower + 2, a[0], a[1], b[1]);
        mma(upper, lower, a[2], a[3], b[2]);
        mma(upper + 2, lower + 2, a[2], a[3], b[3]);
    }

  private:
    static __device__ __forceinline__ void mma(float* upper, float* lower, unsigned a0, unsigned a1, unsigned b) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(upper[0]), "+f"(upper[1]), "+f"(lower[0]), "+f"(lower[1])
            : "r"(a0), "r"(a1), "r"(b));
    }
};

#define FASTATTN_MMA_16X8X16(type)                                             \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(upper[0]), "+f"(upper[1]), "+f"(lower[0]), "+f"(lower[1])       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

struct Mma16x8x16 : Mma16x8 {
    template <class E, Operands>
    static __device__ __forceinline__ void multiply(float* upper, float* lower, const unsigned (&a)[4],
                                                    const unsigned (&b)[4]) {
        mma<E>(upper, lower, a, b[0], b[2]);
        mma<E>(upper + 2, lower + 2, a, b[1], b[3]);
    }

  private:
    template <class E>
    static __device__ __forceinline__ void mma(float* upper, float* lower, const unsigned (&a)[4], unsigned b0,
                                               unsigned b1) {
        if constexpr (kIsHalf<E>)
            FASTATTN_MMA_16X8X16("f16");
        else
            FASTATTN_MMA_16X8X16("bf16");
    }
};

// ---- 7.0: 8 x 8 products of k = 4 by each quad pair (lanes 4 n to 4 n + 3, and those plus 16)

#define FASTATTN_MMA_8X8X4(left, right)                                                                          \
    asm("mma.sync.aligned.m8n8k4." left "." right                                                                \
        ".f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, {%10, %11}, {%0, %1, %2, %3, %4, %5, %6, " \
        "%7};"                                                                                                   \
        : "+f"(upper[0]), "+f"(upper[1]), "+f"(lower[0]), "+f"(lower[1]), "+f"(upper[2]), "+f"(upper[3]),        \
          "+f"(lower[2]), "+f"(lower[3])                                                                         \
        : "r"(a[2 * step]), "r"(a[2 * step + 1]), "r"(b[2 * step]), "r"(b[2 * step + 1]))

// Lane bit 2 says which eight rows of the unit a quad pair has, bit 3 which columns. Within eight, bit 4 is the upper
// half of rows and the upper half of an operand's lines.
struct Mma8x8x4 {
    static constexpr int kRegisters = 8;
    static constexpr int column_bit(int n) { return n == 2 ? 2 : 8; }
    static constexpr int x(int lane) { return lane / 2 % 2 + lane / 8 % 2 * 2; }
    static constexpr int y(int lane) { return lane % 2 + lane / 16 * 2 + lane / 4 % 2 * 4; }

    static constexpr int row_line(int row) { return row / 2 % 2 + row % 2 * 2 + row / 4 * 4; }
    static constexpr int column_line(int n) { return n / 8 * 8 + n / 2 % 2 * 4 + n % 8 / 4 * 2 + n % 2; }

    static __device__ __forceinline__ void store_eight(unsigned char* line, int chunk, uint4 x) {
        *reinterpret_cast<uint4*>(line + chunk * 16) = make_uint4(x.x, x.z, x.y, x.w);
    }

    template <int kLine>
    static __device__ __forceinline__ int left_rows(int lane) {
        return (lane % 4 + lane / 16 * 4 + lane / 4 % 2 * 8) * kLine;
    }
    template <int kLine>
    static __device__ __forceinline__ int right_rows(int lane) {
        return (lane % 4 + lane / 16 * 4 + lane / 8 % 2 * 8) * kLine;
    }
    template <int kLine>
    static __device__ __forceinline__ int right_columns(int lane) {
        return lane % 4 * kLine + lane / 8 % 2 * 16 + lane / 16 * 8;
    }

    template <int kLine>
    static __device__ __forceinline__ void load_rows(unsigned (&r)[8], const unsigned char* from) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 x = *reinterpret_cast<const uint4*>(from + 16 * half);
            r[4 * half] = x.x, r[4 * half + 1] = x.y, r[4 * half + 2] = x.z, r[4 * half + 3] = x.w;
        }
    }
    template <int kLine>
    static __device__ __forceinline__ void load_columns(unsigned (&r)[8], const unsigned char* from) {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const uint2 x = *reinterpret_cast<const uint2*>(from + 4 * step * kLine);
            r[2 * step] = x.x, r[2 * step + 1] = x.y;
        }
    }

    // A lane needs one row of 16 columns, and has four of two rows: two exchanges within its quad pair, four with the
    // one beside it.
    template <class E>
    static __device__ __forceinline__ void to_left(unsigned (&a)[8], const float* upper, const float* lower, int lane) {
        const bool is_odd = lane / 2 % 2 != 0, is_right = lane / 8 % 2 != 0;
        unsigned own[4];
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const unsigned up = pack<E>(upper[2 * b], upper[2 * b + 1]), low = pack<E>(lower[2 * b], lower[2 * b + 1]);
            const unsigned other = __shfl_xor_sync(0xffffffffu, is_odd ? up : low, 2);
            own[2 * b] = is_odd ? other : up, own[2 * b + 1] = is_odd ? low : other;
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const unsigned beside = __shfl_xor_sync(0xffffffffu, own[n], 8);
            a[n] = is_right ? beside : own[n], a[4 + n] = is_right ? own[n] : beside;
        }
    }

    template <class E, Operands kOperands>
    static __device__ __forceinline__ void multiply(float* upper, float* lower, const unsigned (&a)[8],
                                                    const unsigned (&b)[8]) {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            if constexpr (kOperands == kRowsRows)
                FASTATTN_MMA_8X8X4("row", "col");
            else
                FASTATTN_MMA_8X8X4("row", "row");
        }
    }
};

}  // namespace fastattn
