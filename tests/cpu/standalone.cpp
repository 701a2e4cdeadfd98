// Both passes of the kernels of one instruction set without Python, beside a plain computation in double, in several
// numbers of the pool's threads and from several callers at once. For sanitizers that Python does not run under, and
// for machines that are emulated.
#include <cstdio>
#include <random>

#include "driver.cpp"

namespace {

struct Problem {
    const char* name;
    int batch, nheads, nheads_k, seqlen_q, seqlen_k, head_dim, head_dim_v;
    bool is_causal;
    double dropout_p;
    bool has_mask;
};

const Problem kProblems[] = {
    {"plain", 2, 2, 2, 70, 75, 24, 20, false, 0.0, false},
    {"causal", 1, 2, 1, 130, 140, 16, 33, true, 0.0, false},
    {"few heads", 1, 2, 1, 300, 530, 16, 16, true, 0.25, true},
    {"few queries", 2, 4, 2, 3, 300, 20, 40, false, 0.25, true},
    {"one key", 3, 1, 1, 5, 1, 7, 1, false, 0.0, false},
};

std::vector<float> random_numbers(long count, int seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x(count);
    for (float& number : x) number = normal(generator);
    return x;
}

// A word of Philox4x32-10.
unsigned random_word(unsigned long long seed, unsigned b, unsigned h, unsigned i, unsigned j) {
    unsigned c[4] = {j / 4, i, h, b}, key0 = static_cast<unsigned>(seed), key1 = static_cast<unsigned>(seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
        const unsigned long long p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
        const unsigned next[4] = {static_cast<unsigned>(p1 >> 32) ^ c[1] ^ key0, static_cast<unsigned>(p1),
                                  static_cast<unsigned>(p0 >> 32) ^ c[3] ^ key1, static_cast<unsigned>(p0)};
        std::copy(next, next + 4, c);
    }
    return c[j % 4];
}

// The tensors of a problem, dense and contiguous, with one mask for all queries.
class Tensors {
  public:
    explicit Tensors(const Problem& x)
        : x(x),
          rows_q(static_cast<long>(x.batch) * x.nheads * x.seqlen_q),
          rows_k(static_cast<long>(x.batch) * x.nheads_k * x.seqlen_k),
          q(random_numbers(rows_q * x.head_dim, 1)),
          k(random_numbers(rows_k * x.head_dim, 2)),
          v(random_numbers(rows_k * x.head_dim_v, 3)),
          dout(random_numbers(rows_q * x.head_dim_v, 4)),
          mask(x.seqlen_k),
          out(dout.size(), NAN),
          lse(rows_q, NAN),
          dq(q.size(), NAN),
          dk(k.size(), NAN),
          dv(v.size(), NAN) {
        for (int j = 0; j < x.seqlen_k; ++j) mask[j] = j % 7 != 3;
    }

    AttentionParams params() {
        AttentionParams p{};
        p.batch = x.batch, p.nheads = x.nheads, p.nheads_k = x.nheads_k;
        p.seqlen_q = x.seqlen_q, p.seqlen_k = x.seqlen_k, p.head_dim = x.head_dim, p.head_dim_v = x.head_dim_v;
        p.q = rows(q, x.nheads, x.seqlen_q, x.head_dim), p.dq = rows(dq, x.nheads, x.seqlen_q, x.head_dim);
        p.k = rows(k, x.nheads_k, x.seqlen_k, x.head_dim), p.dk = rows(dk, x.nheads_k, x.seqlen_k, x.head_dim);
        p.v = rows(v, x.nheads_k, x.seqlen_k, x.head_dim_v), p.dv = rows(dv, x.nheads_k, x.seqlen_k, x.head_dim_v);
        p.out = rows(out, x.nheads, x.seqlen_q, x.head_dim_v), p.dout = rows(dout, x.nheads, x.seqlen_q, x.head_dim_v);
        p.lse = {lse.data(), static_cast<index_t>(x.nheads) * x.seqlen_q, x.seqlen_q};
        if (x.has_mask) p.mask = {mask.data(), 0, 0, 0, 1};
        p.scale = kScale, p.left = 0x7fffffff, p.right = x.is_causal ? 0 : 0x7fffffff, p.bottom_right = 1;
        p.dropout_threshold = static_cast<unsigned>(x.dropout_p * 0x1p32), p.dropout_rescale = 1 / (1 - x.dropout_p);
        if (x.dropout_p > 0) p.seed = &kSeed;
        return p;
    }

    void run(int threads) {
        const AttentionParams p = params();
        fastattn_run(&p, 0, 0, threads);
        fastattn_run(&p, 1, 0, threads);
    }

    bool equals(const Tensors& other) const {
        const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
            return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
        };
        return same(out, other.out) && same(lse, other.lse) && same(dq, other.dq) && same(dk, other.dk) &&
               same(dv, other.dv);
    }

    // The largest distance from what double gives.
    double error() const {
        std::vector<double> exact_dq(q.size()), exact_dk(k.size()), exact_dv(v.size());
        double largest = 0;
        for (int b = 0; b < x.batch; ++b)
            for (int h = 0; h < x.nheads; ++h)
                for (int i = 0; i < x.seqlen_q; ++i) add_row(b, h, i, exact_dq, exact_dk, exact_dv, largest);
        compare(dq, exact_dq, largest), compare(dk, exact_dk, largest), compare(dv, exact_dv, largest);
        return largest;
    }

  private:
    static constexpr float kScale = 0.3f;
    static constexpr index_t kSeed = 0x123456789abcdef;

    static Rows rows(std::vector<float>& data, index_t heads, index_t seqlen, index_t dims) {
        return {data.data(), heads * seqlen * dims, seqlen * dims, dims, 0};
    }
    static void compare(const std::vector<float>& actual, const std::vector<double>& exact, double& largest) {
        for (std::size_t n = 0; n < actual.size(); ++n) note(actual[n], exact[n], largest);
    }
    static void note(float actual, double exact, double& largest) {
        const double error = std::fabs(actual - exact);
        if (!(error <= largest)) largest = error;  // NaN stays
    }
    bool is_allowed(int i, int j) const {
        return (!x.has_mask || mask[j]) && (!x.is_causal || j - i <= x.seqlen_k - x.seqlen_q);
    }

    void add_row(int b, int h, int i, std::vector<double>& exact_dq, std::vector<double>& exact_dk,
                 std::vector<double>& exact_dv, double& largest) const {
        const int h_k = h / (x.nheads / x.nheads_k), d = x.head_dim, dv_dims = x.head_dim_v;
        const long row = (static_cast<long>(b) * x.nheads + h) * x.seqlen_q + i;
        const long first = (static_cast<long>(b) * x.nheads_k + h_k) * x.seqlen_k;
        std::vector<double> weights(x.seqlen_k), kept(x.seqlen_k), dp(x.seqlen_k), result(dv_dims);
        double sum = 0, delta = 0;
        for (int j = 0; j < x.seqlen_k; ++j) {
            if (!is_allowed(i, j)) continue;
            double score = 0;
            for (int n = 0; n < d; ++n) score += double(q[row * d + n]) * k[(first + j) * d + n];
            sum += weights[j] = std::exp(kScale * score);
        }
        for (int j = 0; j < x.seqlen_k; ++j) {
            weights[j] /= sum;
            const bool keeps = random_word(kSeed, b, h, i, j) >= x.dropout_p * 0x1p32;
            kept[j] = keeps ? 1 / (1 - x.dropout_p) : 0;
            for (int n = 0; n < dv_dims; ++n) {
                const double value = v[(first + j) * dv_dims + n], upstream = dout[row * dv_dims + n];
                result[n] += weights[j] * kept[j] * value;
                dp[j] += kept[j] * upstream * value;
                exact_dv[(first + j) * dv_dims + n] += weights[j] * kept[j] * upstream;
            }
            delta += weights[j] * dp[j];
        }
        for (int j = 0; j < x.seqlen_k; ++j)
            for (int n = 0; n < d; ++n) {
                const double gradient = kScale * weights[j] * (dp[j] - delta);
                exact_dq[row * d + n] += gradient * k[(first + j) * d + n];
                exact_dk[(first + j) * d + n] += gradient * q[row * d + n];
            }
        note(lse[row], std::log(sum), largest);
        for (int n = 0; n < dv_dims; ++n) note(out[row * dv_dims + n], result[n], largest);
    }

    Problem x;
    long rows_q, rows_k;
    std::vector<float> q, k, v, dout;
    std::vector<unsigned char> mask;
    std::vector<float> out, lse, dq, dk, dv;
};

bool is_the_same_in_any_number_of_threads(const Problem& problem, const Tensors& expected) {
    for (int threads : {2, 3, 7}) {
        Tensors again(problem);
        again.run(threads);
        if (!again.equals(expected)) return false;
    }
    return true;
}

bool is_the_same_from_several_callers(const Problem& problem, const Tensors& expected) {
    std::atomic<int> right{0};
    std::vector<std::thread> callers;
    for (int n = 0; n < 3; ++n)
        callers.emplace_back([&] {
            Tensors again(problem);
            again.run(3);
            right += again.equals(expected);
        });
    for (std::thread& caller : callers) caller.join();
    return right == 3;
}

}  // namespace

int main() {
    fastattn_use_pool();
    bool is_right = true;
    for (const Problem& problem : kProblems) {
        Tensors expected(problem);
        expected.run(1);
        const double error = expected.error();
        const bool same = is_the_same_in_any_number_of_threads(problem, expected);
        const bool from_several = is_the_same_from_several_callers(problem, expected);
        std::printf("%s: error %.1e%s%s\n", problem.name, error, same ? "" : ", other bits in threads",
                    from_several ? "" : ", other bits from several callers");
        is_right = is_right && error < 2e-5 && same && from_several;
    }
    std::puts(is_right ? "right" : "wrong");
    return is_right ? 0 : 1;
}
