// What a core can do at most: independent multiply-adds of whole vectors, all in registers.

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr int kChains = 12;  // enough for two units of a latency of four to six, few enough for sixteen registers

}  // namespace

// The floating-point operations of so many rounds; the sum keeps the compiler from dropping them.
extern "C" double multiply_add(long rounds, float* sum) {
    Vector x[kChains], factor = Vector{} + *sum, term = factor;
    for (int i = 0; i < kChains; ++i) x[i] = Vector{} + static_cast<float>(i);
    for (long round = 0; round < rounds; ++round)
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) x[i] = x[i] * factor + term;
    for (int i = 0; i < kChains; ++i)
        for (int lane = 0; lane < kBytes / 4; ++lane) *sum += x[i][lane];
    return 2.0 * rounds * kChains * (kBytes / 4);
}
