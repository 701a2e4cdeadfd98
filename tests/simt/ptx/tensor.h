// Tensor cores and what feeds them: mma.sync, ldmatrix, cp.async.
#pragma once

#include "memory.h"

namespace ptx {

struct tf32 {
    b32 bits;
    operator f64() const { return as<f32>(bits & ~0x1fffu); }  // the unit does not see the last 13 bits
};

// Where element i of a lane's part of a matrix lies.
struct Position {
    int row, column;
};

// 16 x 8 x K. Two elements of 16 bits share a register, so they are neighbours along k.
template <int K, class Element>
struct M16N8 {
    static constexpr int kRows = 16, kColumns = 8, kInner = K, kGroups = 1;
    static constexpr int kPacked = sizeof(Element) == 2 ? 2 : 1;
    static int group(int) { return 0; }
    static int inner(int lane, int i, int reg) { return kPacked * (lane & 3) + i % kPacked + 4 * kPacked * reg; }
    static Position a(int lane, int i) {
        const int reg = i / kPacked;
        return {(lane >> 2) + 8 * (reg & 1), inner(lane, i, reg >> 1)};
    }
    static Position b(int lane, int i) { return {inner(lane, i, i / kPacked), lane >> 2}; }
    template <class Sum>
    static Position c(int lane, int i) {
        return {(lane >> 2) + 8 * (i >> 1), 2 * (lane & 3) + (i & 1)};
    }
};

// 8 x 8 x 4, by each of four groups of eight lanes: 4 g ... 4 g + 3, and the same plus 16.
template <bool a_by_rows, bool b_by_rows>
struct M8N8K4 {
    static constexpr int kRows = 8, kColumns = 8, kInner = 4, kGroups = 4;
    static int group(int lane) { return lane >> 2 & 3; }
    static int upper(int lane) { return lane < 16 ? 0 : 4; }
    static Position a(int lane, int i) {
        if (a_by_rows) return {(lane & 3) + upper(lane), i};
        return {i + upper(lane), lane & 3};
    }
    static Position b(int lane, int i) {
        if (b_by_rows) return {lane & 3, i + upper(lane)};
        return {i, (lane & 3) + upper(lane)};
    }
    template <class Sum>
    static Position c(int lane, int i) {
        if (sizeof(Sum) == 2) return {(lane & 3) + upper(lane), i};
        return {(lane & 1) + (i & 2) + upper(lane), (i & 4) + (lane & 2) + (i & 1)};
    }
};

template <class Layout, class Element, class Sum>
struct Fragments {
    static constexpr int kLanes = simt::kWarpSize / Layout::kGroups;
    Vector<Element, Layout::kRows * Layout::kInner / kLanes> a;
    Vector<Element, Layout::kInner * Layout::kColumns / kLanes> b;
    Vector<Sum, Layout::kRows * Layout::kColumns / kLanes> c;
};

inline void need_all_lanes(const char* name, unsigned mask) {
    if (mask != simt::kAllLanes) simt::fail_missing_lane(name, simt::self->lane, __builtin_ctz(~mask));
}

// Products and sums are exact up to one rounding at the end.
template <class Layout, class Element, class Sum>
void multiply_matrices(unsigned mask, const void* const* in, void* const* out) {
    using Part = Fragments<Layout, Element, Sum>;
    need_all_lanes("mma.sync", mask);
    for (int group = 0; group < Layout::kGroups; ++group) {
        f64 a[Layout::kRows][Layout::kInner], b[Layout::kInner][Layout::kColumns], c[Layout::kRows][Layout::kColumns];
        for (int lane = 0; lane < 32; ++lane) {
            if (Layout::group(lane) != group) continue;
            const Part& part = *static_cast<const Part*>(in[lane]);
            const auto fill = [](auto& matrix, const auto& elements, auto position) {
                for (size_t i = 0; i < sizeof elements.elements / sizeof elements[0]; ++i) {
                    const Position p = position(static_cast<int>(i));
                    matrix[p.row][p.column] = elements[static_cast<int>(i)];
                }
            };
            fill(a, part.a, [=](int i) { return Layout::a(lane, i); });
            fill(b, part.b, [=](int i) { return Layout::b(lane, i); });
            fill(c, part.c, [=](int i) { return Layout::template c<Sum>(lane, i); });
        }
        for (int lane = 0; lane < 32; ++lane) {
            if (Layout::group(lane) != group) continue;
            auto& sums = *static_cast<decltype(Part::c)*>(out[lane]);
            for (size_t i = 0; i < sizeof sums / sizeof sums[0]; ++i) {
                const Position p = Layout::template c<Sum>(lane, static_cast<int>(i));
                f64 sum = c[p.row][p.column];
                for (int k = 0; k < Layout::kInner; ++k) sum += a[p.row][k] * b[k][p.column];
                if constexpr (std::is_same<Sum, f32>::value)
                    sums.elements[i] = static_cast<f32>(sum);
                else
                    sums.elements[i] = Sum::from_double(sum);
            }
        }
    }
}

template <class Layout, class Element, class Sum, class A, class B, class C>
C mma(A a, B b, C c, simt::Site site) {
    using Part = Fragments<Layout, Element, Sum>;
    const Part in{__builtin_bit_cast(decltype(Part::a), a), __builtin_bit_cast(decltype(Part::b), b),
                  __builtin_bit_cast(decltype(Part::c), c)};
    C out;
    simt::warp_call({"mma.sync", site, simt::kAllLanes, multiply_matrices<Layout, Element, Sum>, &in, &out, false});
    return out;
}

// ---- ldmatrix: lane 8 m + r reads row r of matrix m for all others

struct MatrixRow {
    b16 elements[8];
};
template <int count, bool transposed>
void distribute_matrices(unsigned mask, const void* const* in, void* const* out) {
    need_all_lanes("ldmatrix", mask);
    for (int lane = 0; lane < 32; ++lane) {
        const int row = lane >> 2, column = 2 * (lane & 3);
        for (int m = 0; m < count; ++m) {
            const auto element = [&](int r, int c) {
                return u32{static_cast<const MatrixRow*>(in[8 * m + r])->elements[c]};
            };
            static_cast<Vector<b32, count>*>(out[lane])->elements[m] =
                transposed ? element(column, row) | element(column + 1, row) << 16
                           : element(row, column) | element(row, column + 1) << 16;
        }
    }
}
template <int count, bool transposed>
__forceinline__ Vector<b32, count> load_matrices(const Byte* address, simt::Site site) {
    MatrixRow row{};
    if (simt::self->lane < 8 * count) row = load<MatrixRow>(address);
    Vector<b32, count> out;
    simt::warp_call({"ldmatrix", site, simt::kAllLanes, distribute_matrices<count, transposed>, &row, &out, false});
    return out;
}

// ---- cp.async: the copies that a thread has started. Each takes place when it is waited for, and until then nobody
// may read where it goes.
class Copies {
  public:
    template <int bytes>
    __forceinline__ void start(Byte* to, const Byte* from, u32 used) {
        static_assert(bytes == 4 || bytes == 8 || bytes == 16, "a copy moves 4, 8 or 16 bytes");
        if (kChecked) {
            simt::check_alignment(from, bytes);
            if (used > 0) simt::check_read(from, used);
            simt::check_access(to, bytes, true);
            simt::forget_writes(to, bytes);
        }
        std::memset(to, 0xff, bytes);
        if (started_ == kCapacity) simt::trap(simt::Site::here());
        copies_[started_++] = {to, from, bytes, used, group_};
    }
    void commit() { ++group_; }
    // All but the last `groups` committed ones.
    __forceinline__ void wait(int groups) { finish_before(group_ - groups); }
    __forceinline__ void wait_all() { finish_before(group_ + 1); }

  private:
    struct Copy {
        Byte* to;
        const Byte* from;
        u32 bytes, used;
        int group;
    };
    __forceinline__ void finish_before(int group) {
        int left = 0;
        for (int i = 0; i < started_; ++i) {
            const Copy copy = copies_[i];
            if (copy.group >= group) {
                copies_[left++] = copy;
                continue;
            }
            if (kChecked) simt::check_access(copy.to, copy.bytes, true);
            std::memset(copy.to, 0, copy.bytes);
            std::memcpy(copy.to, copy.from, copy.used);
        }
        started_ = left;
    }
    static constexpr int kCapacity = 256;
    Copy copies_[kCapacity];
    int started_ = 0, group_ = 0;
};

}  // namespace ptx
