// Instructions that a warp's lanes run together.
#pragma once

#include "registers.h"

namespace ptx {

struct Shuffled {
    b32 value;
    bool in_range;  // false: the lane keeps its own value
};

// `control` holds what the manual calls c: in bits 0-4 the last lane that may be read, relative to the segment, and in
// bits 8-12 the bits of a lane's number that name its segment.
struct Segment {
    int lane, last, first, within;
    explicit Segment(b32 control) {
        const int limit = control & 31, segment_bits = control >> 8 & 31;
        lane = static_cast<int>(simt::self->lane);
        first = lane & segment_bits;
        last = first | (limit & ~segment_bits);
        within = ~segment_bits;
    }
};
inline Shuffled shuffle(const char* name, b32 value, int source, bool in_range, b32 mask, simt::Site site) {
    const int from = in_range ? source : static_cast<int>(simt::self->lane);
    return {simt::shuffle(name, mask, value, from, site), in_range};
}
inline Shuffled shuffle_up(const char* name, b32 value, b32 delta, b32 control, b32 mask, simt::Site site) {
    const Segment s(control);
    const int source = s.lane - static_cast<int>(delta & 31);
    return shuffle(name, value, source, source >= s.last, mask, site);
}
inline Shuffled shuffle_down(const char* name, b32 value, b32 delta, b32 control, b32 mask, simt::Site site) {
    const Segment s(control);
    const int source = s.lane + static_cast<int>(delta & 31);
    return shuffle(name, value, source, source <= s.last, mask, site);
}
inline Shuffled shuffle_bfly(const char* name, b32 value, b32 lanes, b32 control, b32 mask, simt::Site site) {
    const Segment s(control);
    const int source = s.lane ^ static_cast<int>(lanes & 31);
    return shuffle(name, value, source, source <= s.last, mask, site);
}
inline Shuffled shuffle_idx(const char* name, b32 value, b32 index, b32 control, b32 mask, simt::Site site) {
    const Segment s(control);
    const int source = s.first | (static_cast<int>(index & 31) & s.within);
    return shuffle(name, value, source, source <= s.last, mask, site);
}

inline bool is_uniform(b32 mask, bool value, simt::Site site = simt::Site::here()) {
    const b32 votes = simt::ballot("vote.sync.uni", mask, value, site);
    const b32 opposite = simt::ballot("vote.sync.uni", mask, !value, site);
    return votes == 0 || opposite == 0;
}

template <class T>
struct Contribution {
    T value;
    T (*combine)(T, T);
};
template <class T>
void reduce_lanes(unsigned mask, const void* const* in, void* const* out) {
    bool is_first = true;
    T sum{};
    for (unsigned lane = 0; lane < simt::kWarpSize; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const auto* mine = static_cast<const Contribution<T>*>(in[lane]);
        sum = is_first ? mine->value : mine->combine(sum, mine->value);
        is_first = false;
    }
    for (unsigned lane = 0; lane < simt::kWarpSize; ++lane)
        if (mask >> lane & 1) *static_cast<T*>(out[lane]) = sum;
}
template <class T>
T reduce(b32 mask, T value, simt::Plain<T (*)(T, T)> combine, simt::Site site = simt::Site::here()) {
    const Contribution<T> in{value, combine};
    T out{};
    simt::warp_call({"redux.sync", site, mask, reduce_lanes<T>, &in, &out, false});
    return out;
}

}  // namespace ptx
