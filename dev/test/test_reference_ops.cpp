// Every operation of llmc/reference: gradients against finite differences in double, values against plain formulas,
// edges, and the same bits for any number of threads.
#include <gtest/gtest.h>
#include <omp.h>

#include <limits>

#include "dev/test/reference_testing.h"
#include "llmc/model_config.h"
#include "llmc/reference/adamw.h"
#include "llmc/reference/attention.h"
#include "llmc/reference/classifier.h"
#include "llmc/reference/embedding.h"
#include "llmc/reference/gemm.h"
#include "llmc/reference/grad_norm.h"
#include "llmc/reference/rmsnorm.h"
#include "llmc/reference/rope.h"
#include "llmc/reference/swiglu.h"

namespace {

const SingleThread one_thread_unless_said_otherwise;

using Values = std::vector<double>;
constexpr double GRADIENT_LIMIT = 1e-6;  // of gradient_error, for every operation

// Runs work with 1, 2, 3 and 7 threads; the result must always be the same, bit for bit.
template <class Real>
void expect_same_bits_for_any_threads(const std::function<std::vector<Real>()>& work) {
    const int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    const std::vector<Real> expected = work();
    for (const int n : {2, 3, 7, 1}) {
        omp_set_num_threads(n);
        EXPECT_TRUE(same_bits(work(), expected)) << "with " << n << " threads";
    }
    omp_set_num_threads(threads);
}

TEST(GradientError, FindsAPlantedError) {
    Values x = random_values(5, 1.0, 1), dx(5);
    const auto f = [&] { return x[0] * x[0] * x[1] + std::sin(x[2]) * x[3]; };
    dx = {2 * x[0] * x[1], x[0] * x[0], std::cos(x[2]) * x[3], std::sin(x[2]), 0.0};
    EXPECT_LT(gradient_error(x, dx, f), 1e-10);
    dx[1] *= 1.0 + 1e-4;
    EXPECT_GT(gradient_error(x, dx, f), 1e-6);
    dx[1] = std::numeric_limits<double>::quiet_NaN();
    EXPECT_FALSE(gradient_error(x, dx, f) <= 1e300);
}

// ---- gemm --------------------------------------------------------------------------------------
struct GemmShape {
    int64_t M, N, K;
};
// Single elements, sizes off the tile and the block in each dimension, more than one block of everything.
const GemmShape GEMM_SHAPES[] = {{1, 1, 1},     {5, 3, 2},     {12, 32, 256}, {13, 33, 257},
                                 {100, 7, 600}, {2500, 9, 11}, {3, 4200, 5},  {97, 130, 70}};

template <class Real>
void check_gemm(const GemmShape& s, bool accumulate, double limit) {
    SCOPED_TRACE(testing::Message() << "M" << s.M << " N" << s.N << " K" << s.K << " accumulate " << accumulate);
    const std::vector<Real> in = converted<Real>(random_values(s.M * s.K, 1.0, 1));
    const std::vector<Real> weight = converted<Real>(random_values(s.N * s.K, 1.0, 2));
    const std::vector<Real> dout = converted<Real>(random_values(s.M * s.N, 1.0, 3));
    const Real start = accumulate ? Real(0.5) : std::numeric_limits<Real>::quiet_NaN();
    std::vector<Real> out(s.M * s.N, start), din(s.M * s.K, start), dweight(s.N * s.K, start);
    reference::gemm_forward(out.data(), in.data(), weight.data(), s.M, s.N, s.K, accumulate);
    reference::gemm_backward_input(din.data(), dout.data(), weight.data(), s.M, s.N, s.K, accumulate);
    reference::gemm_backward_weight(dweight.data(), dout.data(), in.data(), s.M, s.N, s.K, accumulate);
    const double first = accumulate ? 0.5 : 0.0;
    Values out_expected(out.size(), first), din_expected(din.size(), first), dweight_expected(dweight.size(), first);
    for (int64_t m = 0; m < s.M; ++m) {
        for (int64_t n = 0; n < s.N; ++n) {
            for (int64_t k = 0; k < s.K; ++k) {
                out_expected[m * s.N + n] += (double)in[m * s.K + k] * weight[n * s.K + k];
                din_expected[m * s.K + k] += (double)dout[m * s.N + n] * weight[n * s.K + k];
                dweight_expected[n * s.K + k] += (double)dout[m * s.N + n] * in[m * s.K + k];
            }
        }
    }
    EXPECT_LE(relative_error(out, out_expected), limit);
    EXPECT_LE(relative_error(din, din_expected), limit);
    EXPECT_LE(relative_error(dweight, dweight_expected), limit);
}

TEST(Gemm, EqualsPlainLoops) {
    for (const GemmShape& shape : GEMM_SHAPES) {
        for (const bool accumulate : {false, true}) {
            check_gemm<double>(shape, accumulate, 1e-13);
            check_gemm<float>(shape, accumulate, 2e-6);  // at most 2500 terms of size 1, summed in blocks
        }
    }
}

TEST(Gemm, LargerThanThePackedPart) {
    // Copies hold GEMM_PACKED_ROWS x GEMM_PACKED_DEPTH of one operand: one more of each starts a second copy.
    check_gemm<double>({reference::GEMM_PACKED_ROWS + 1, 17, reference::GEMM_PACKED_DEPTH + 1}, true, 1e-13);
    check_gemm<double>({5, reference::GEMM_PACKED_COLUMNS + 1, reference::GEMM_PACKED_DEPTH + 1}, false, 1e-13);
}

TEST(Gemm, SameBitsForAnyThreads) {
    const std::vector<float> in = converted<float>(random_values(500 * 300, 1.0, 1));
    const std::vector<float> weight = converted<float>(random_values(200 * 300, 1.0, 2));
    expect_same_bits_for_any_threads<float>([&] {
        std::vector<float> out(500 * 200), dweight(200 * 300);
        reference::gemm_forward(out.data(), in.data(), weight.data(), 500, 200, 300, false);
        reference::gemm_backward_weight(dweight.data(), out.data(), in.data(), 500, 200, 300, false);
        return dweight;
    });
}

// ---- embedding ---------------------------------------------------------------------------------
TEST(Embedding, ForwardCopiesRowsAndBackwardAddsThem) {
    const int64_t rows = 70, V = 11;
    const int C = 24;
    const std::vector<int32_t> tokens = random_tokens(rows, V, 1);
    const Values weight = random_values(V * C, 1.0, 2), dout = random_values(rows * C, 1.0, 3);
    Values out(rows * C), dweight(V * C, 1.0), expected(V * C, 1.0);
    reference::embedding_forward(out.data(), tokens.data(), weight.data(), rows, C);
    reference::embedding_backward(dweight.data(), dout.data(), tokens.data(), rows, C);
    for (int64_t row = 0; row < rows; ++row) {
        for (int c = 0; c < C; ++c) {
            ASSERT_EQ(out[row * C + c], weight[tokens[row] * C + c]);
            expected[tokens[row] * C + c] += dout[row * C + c];
        }
    }
    EXPECT_TRUE(same_bits(dweight, expected));
}

TEST(Embedding, GradientEqualsFiniteDifferences) {
    const int64_t rows = 9, V = 5;
    const int C = 8;
    const std::vector<int32_t> tokens = random_tokens(rows, V, 4);
    const Values dout = random_values(rows * C, 1.0, 5);
    Values weight = random_values(V * C, 1.0, 6), dweight(V * C, 0.0);
    reference::embedding_backward(dweight.data(), dout.data(), tokens.data(), rows, C);
    EXPECT_LE(gradient_error(weight, dweight,
                             [&] {
                                 Values out(rows * C);
                                 reference::embedding_forward(out.data(), tokens.data(), weight.data(), rows, C);
                                 return dot(out, dout);
                             }),
              GRADIENT_LIMIT);
}

// ---- rmsnorm -----------------------------------------------------------------------------------
TEST(RmsNorm, GradientEqualsFiniteDifferences) {
    for (const auto& [rows, C] : {std::pair<int64_t, int>{1, 8}, {3, 24}, {20, 40}}) {
        SCOPED_TRACE(testing::Message() << "rows " << rows << " C " << C);
        const double eps = 1e-2;  // large enough to matter
        Values x = random_values(rows * C, 2.0, 1), weight = random_values(C, 1.5, 2);
        const Values dout = random_values(rows * C, 1.0, 3), dresidual = random_values(rows * C, 1.0, 4);
        Values out(rows * C), rstd(rows), dx(rows * C), dweight(C, 0.25);
        reference::rmsnorm_forward(out.data(), rstd.data(), x.data(), weight.data(), rows, C, eps);
        reference::rmsnorm_backward(dx.data(), dweight.data(), dresidual.data(), dout.data(), x.data(), weight.data(),
                                    rstd.data(), rows, C);
        for (double& d : dweight) {
            d -= 0.25;  // it is added to
        }
        const auto loss = [&] {
            Values again(rows * C), rstd_again(rows);
            reference::rmsnorm_forward(again.data(), rstd_again.data(), x.data(), weight.data(), rows, C, eps);
            return dot(again, dout) + dot(x, dresidual);
        };
        EXPECT_LE(gradient_error(x, dx, loss), GRADIENT_LIMIT);
        EXPECT_LE(gradient_error(weight, dweight, loss), GRADIENT_LIMIT);

        Values in_place = dresidual, without_residual(rows * C), recomputed(rows * C), ignored(C);
        reference::rmsnorm_backward(in_place.data(), ignored.data(), in_place.data(), dout.data(), x.data(),
                                    weight.data(), rstd.data(), rows, C);
        EXPECT_TRUE(same_bits(in_place, dx));
        reference::rmsnorm_backward(without_residual.data(), ignored.data(), (const double*)nullptr, dout.data(),
                                    x.data(), weight.data(), rstd.data(), rows, C);
        for (size_t i = 0; i < dx.size(); ++i) {
            EXPECT_NEAR(without_residual[i] + dresidual[i], dx[i], 1e-14);
        }
        reference::rmsnorm_recompute(recomputed.data(), x.data(), weight.data(), rstd.data(), rows, C);
        EXPECT_LE(relative_error(recomputed, out), 1e-15);
    }
}

TEST(RmsNorm, SameBitsForAnyThreads) {
    const int64_t rows = 333;
    const int C = 72;
    const std::vector<float> x = converted<float>(random_values(rows * C, 1.0, 1));
    const std::vector<float> weight = converted<float>(random_values(C, 1.0, 2));
    expect_same_bits_for_any_threads<float>([&] {
        std::vector<float> out(rows * C), rstd(rows), result(rows * C + C);
        reference::rmsnorm_forward(out.data(), rstd.data(), x.data(), weight.data(), rows, C, 1e-5);
        reference::rmsnorm_backward(result.data(), result.data() + rows * C, (const float*)nullptr, out.data(),
                                    x.data(), weight.data(), rstd.data(), rows, C);
        return result;
    });
}

// ---- rope --------------------------------------------------------------------------------------
TEST(Rope, GradientEqualsFiniteDifferences) {
    ModelConfig config;
    config.head_dim = 8, config.num_heads = 2, config.num_kv_heads = 1;
    const int64_t B = 2, T = 5, first_position = 3;
    const int rotated = 3, width = config.qkv_width();
    const std::vector<double> frequencies = rope_inverse_frequencies(config);
    Values qkv = random_values(B * T * width, 1.0, 1), dqkv = random_values(B * T * width, 1.0, 2);
    const Values dout = dqkv;
    reference::rope_backward(dqkv.data(), B, T, rotated, width, config.head_dim, frequencies, first_position);
    EXPECT_LE(gradient_error(qkv, dqkv,
                             [&] {
                                 Values out = qkv;
                                 reference::rope_forward(out.data(), B, T, rotated, width, config.head_dim, frequencies,
                                                         first_position);
                                 return dot(out, dout);
                             }),
              GRADIENT_LIMIT);
}

TEST(Rope, TurnsEachPairByItsAngleAndLeavesValuesAlone) {
    ModelConfig config = model_preset("llama3.2-1b");  // with Llama-3 frequency scaling
    config.num_heads = 3, config.num_kv_heads = 1;
    const int D = config.head_dim, half = D / 2, width = config.qkv_width();
    const int64_t T = 3, first_position = 1000000;
    const std::vector<double> frequencies = rope_inverse_frequencies(config);
    const Values before = random_values(T * width, 1.0, 1);
    Values after = before;
    reference::rope_forward(after.data(), 1, T, 4, width, D, frequencies, first_position);
    for (int64_t t = 0; t < T; ++t) {
        for (int h = 0; h < 5; ++h) {
            for (int i = 0; i < half; ++i) {
                const int64_t low = t * width + h * D + i, high = low + half;
                const double angle = h < 4 ? (double)(first_position + t) * frequencies[i] : 0.0;
                EXPECT_NEAR(after[low], before[low] * std::cos(angle) - before[high] * std::sin(angle), 1e-15);
                EXPECT_NEAR(after[high], before[high] * std::cos(angle) + before[low] * std::sin(angle), 1e-15);
            }
        }
    }
    reference::rope_backward(after.data(), 1, T, 4, width, D, frequencies, first_position);
    EXPECT_LE(relative_error(after, before), 1e-15);
}

// ---- swiglu ------------------------------------------------------------------------------------
TEST(Swiglu, GradientEqualsFiniteDifferences) {
    const int64_t rows = 7;
    const int F = 24;
    Values gate_up = random_values(rows * 2 * F, 4.0, 1), dgate_up(rows * 2 * F);
    const Values dout = random_values(rows * F, 1.0, 2);
    reference::swiglu_backward(dgate_up.data(), dout.data(), gate_up.data(), rows, F);
    EXPECT_LE(gradient_error(gate_up, dgate_up,
                             [&] {
                                 Values out(rows * F);
                                 reference::swiglu_forward(out.data(), gate_up.data(), rows, F);
                                 return dot(out, dout);
                             }),
              GRADIENT_LIMIT);
    Values in_place = gate_up;
    reference::swiglu_backward(in_place.data(), dout.data(), in_place.data(), rows, F);
    EXPECT_TRUE(same_bits(in_place, dgate_up));
}

TEST(Swiglu, LargeGatesDoNotOverflow) {
    const std::vector<float> gate_up = {-1000.0f, 1000.0f, 2.0f, 3.0f}, dout = {1.0f, 1.0f};  // F = 2
    std::vector<float> out(2), dgate_up(4);
    reference::swiglu_forward(out.data(), gate_up.data(), 1, 2);
    reference::swiglu_backward(dgate_up.data(), dout.data(), gate_up.data(), 1, 2);
    EXPECT_EQ(out, (std::vector<float>{0.0f, 3000.0f}));
    EXPECT_EQ(dgate_up, (std::vector<float>{0.0f, 3.0f, 0.0f, 1000.0f}));
}

// ---- attention ---------------------------------------------------------------------------------
struct AttentionCase {
    int B, H, Hkv, D;
    int64_t Tq, Tk;
    bool causal;
    int64_t offset;
    double magnitude;  // of q, k, v
};

reference::AttentionShape shape_of(const AttentionCase& c) {
    reference::AttentionShape shape;
    shape.B = c.B, shape.H = c.H, shape.Hkv = c.Hkv, shape.D = c.D, shape.Tq = c.Tq, shape.Tk = c.Tk;
    shape.causal = c.causal, shape.causal_offset = c.offset, shape.scale = 1.0 / std::sqrt((double)c.D);
    return shape;
}

// Random inputs and results of one case; packed [B, T, heads, D].
template <class Real>
struct AttentionData {
    AttentionCase c;
    reference::AttentionShape shape;
    std::vector<Real> q, k, v, dout, out, lse, dq, dk, dv;

    explicit AttentionData(const AttentionCase& c) : c(c), shape(shape_of(c)) {
        const int64_t q_size = c.B * c.Tq * c.H * c.D, k_size = c.B * c.Tk * c.Hkv * c.D;
        q = converted<Real>(random_values(q_size, c.magnitude, 1));
        k = converted<Real>(random_values(k_size, c.magnitude, 2));
        v = converted<Real>(random_values(k_size, c.magnitude, 3));
        dout = converted<Real>(random_values(q_size, 1.0, 4));
        const Real poison = std::numeric_limits<Real>::quiet_NaN();
        out.assign(q_size, poison), lse.assign(c.B * c.H * c.Tq, poison);
        dq.assign(q_size, poison), dk.assign(k_size, poison), dv.assign(k_size, poison);
    }
    reference::View<Real> query_rows(std::vector<Real>& x) const {
        return {x.data(), c.Tq * c.H * c.D, (int64_t)c.H * c.D, c.D};
    }
    reference::View<Real> key_rows(std::vector<Real>& x) const {
        return {x.data(), c.Tk * c.Hkv * c.D, (int64_t)c.Hkv * c.D, c.D};
    }
    void forward() {
        reference::attention_forward<Real>(query_rows(out), lse.data(), query_rows(q), key_rows(k), key_rows(v), shape);
    }
    void backward() {
        reference::attention_backward<Real>(query_rows(dq), key_rows(dk), key_rows(dv), query_rows(dout), query_rows(q),
                                            key_rows(k), key_rows(v), query_rows(out), lse.data(), shape);
    }
};

// What attention is, in the plainest loops: the scores of one query at a time. Gradients are accumulated likewise.
struct PlainAttention {
    Values out, lse, dq, dk, dv;

    explicit PlainAttention(const AttentionData<double>& a)
        : out(a.q.size()), lse(a.lse.size()), dq(a.q.size()), dk(a.k.size()), dv(a.k.size()) {
        const AttentionCase& c = a.c;
        for (int64_t i = 0; i < (int64_t)lse.size(); ++i) {
            const int64_t b = i / (c.H * c.Tq), h = i / c.Tq % c.H, t = i % c.Tq;
            const int64_t query = ((b * c.Tq + t) * c.H + h) * c.D;
            const auto key = [&](int64_t j) { return ((b * c.Tk + j) * c.Hkv + h / (c.H / c.Hkv)) * c.D; };
            const int64_t seen = c.causal ? std::max<int64_t>(0, std::min(t + c.offset + 1, c.Tk)) : c.Tk;
            Values p(seen), dp(seen, 0.0);
            double maximum = -INFINITY, sum = 0.0, delta = 0.0;
            for (int64_t j = 0; j < seen; ++j) {
                for (int d = 0; d < c.D; ++d) {
                    p[j] += a.shape.scale * a.q[query + d] * a.k[key(j) + d];
                    dp[j] += a.dout[query + d] * a.v[key(j) + d];
                }
                maximum = std::max(maximum, p[j]);
            }
            for (double& score : p) {
                score = std::exp(score - maximum);
                sum += score;
            }
            lse[i] = seen == 0 ? -INFINITY : maximum + std::log(sum);
            for (int64_t j = 0; j < seen; ++j) {
                p[j] /= sum;
                delta += p[j] * dp[j];
            }
            for (int64_t j = 0; j < seen; ++j) {
                const double ds = a.shape.scale * p[j] * (dp[j] - delta);
                for (int d = 0; d < c.D; ++d) {
                    out[query + d] += p[j] * a.v[key(j) + d];
                    dq[query + d] += ds * a.k[key(j) + d];
                    dk[key(j) + d] += ds * a.q[query + d];
                    dv[key(j) + d] += p[j] * a.dout[query + d];
                }
            }
        }
    }
};

constexpr int64_t QUERIES = reference::ATTENTION_BLOCK_QUERIES, KEYS = reference::ATTENTION_BLOCK_KEYS;
const AttentionCase ATTENTION_CASES[] = {
    {2, 4, 2, 8, 1, 1, true, 0, 1.0},           // one token
    {1, 8, 1, 16, 17, 17, true, 0, 2.0},        // a group of 8
    {2, 2, 2, 24, 33, 47, false, 0, 2.0},       // full, more keys than queries
    {1, 2, 1, 8, 40, 90, true, 50, 2.0},        // ring attention's chunk: keys from before the queries
    {1, 2, 1, 8, 60, 40, true, -20, 2.0},       // queries that see nothing
    {1, 1, 1, 8, 30, 30, true, -30, 2.0},       // no query sees anything
    {1, 1, 1, 8, QUERIES, KEYS, true, 0, 2.0},  // whole blocks
    {1, 2, 1, 32, 2 * QUERIES + 1, 2 * KEYS + 1, true, 0, 2.0},
    {1, 2, 1, 8, 20, 2 * KEYS + 3, false, 0, 40.0},  // one key takes all: differences of scores in the thousands
};

std::string name_of(const AttentionCase& c) {
    return "B" + std::to_string(c.B) + " H" + std::to_string(c.H) + "/" + std::to_string(c.Hkv) + " D" +
           std::to_string(c.D) + " T" + std::to_string(c.Tq) + "," + std::to_string(c.Tk) +
           (c.causal ? " causal offset " + std::to_string(c.offset) : " full");
}

TEST(Attention, EqualsPlainLoops) {
    for (const AttentionCase& c : ATTENTION_CASES) {
        SCOPED_TRACE(name_of(c));
        AttentionData<double> a(c);
        a.forward();
        a.backward();
        const PlainAttention expected(a);
        EXPECT_LE(relative_error(a.out, expected.out), 1e-13);
        EXPECT_LE(relative_error(a.dq, expected.dq), 1e-11);
        EXPECT_LE(relative_error(a.dk, expected.dk), 1e-11);
        EXPECT_LE(relative_error(a.dv, expected.dv), 1e-11);
        for (size_t i = 0; i < a.lse.size(); ++i) {
            if (std::isinf(expected.lse[i])) {
                EXPECT_EQ(a.lse[i], expected.lse[i]);
            } else {
                EXPECT_NEAR(a.lse[i], expected.lse[i], 1e-12 * (1.0 + std::abs(expected.lse[i])));
            }
        }
    }
}

TEST(Attention, GradientsEqualFiniteDifferences) {
    const AttentionCase cases[] = {{2, 2, 1, 8, 1, 1, true, 0, 1.0},   {1, 4, 2, 8, 9, 9, true, 0, 1.0},
                                   {1, 2, 1, 16, 5, 7, false, 0, 1.0}, {1, 2, 2, 8, 6, 9, true, 2, 1.0},
                                   {1, 1, 1, 8, 8, 6, true, -3, 1.0},  {1, 1, 1, 8, 2, KEYS + 2, true, KEYS, 1.0}};
    for (const AttentionCase& c : cases) {
        SCOPED_TRACE(name_of(c));
        AttentionData<double> a(c);
        a.forward();
        a.backward();
        const auto loss = [&] {
            a.forward();
            return dot(a.out, a.dout);
        };
        EXPECT_LE(gradient_error(a.q, a.dq, loss), GRADIENT_LIMIT);
        EXPECT_LE(gradient_error(a.k, a.dk, loss), GRADIENT_LIMIT);
        EXPECT_LE(gradient_error(a.v, a.dv, loss), GRADIENT_LIMIT);
    }
}

TEST(Attention, ReadsAndWritesPackedRowsInPlace) {
    const AttentionCase c = {2, 4, 2, 8, 37, 37, true, 0, 1.0};
    AttentionData<double> a(c);
    a.forward();
    a.backward();
    const int64_t width = (c.H + 2 * c.Hkv) * c.D, k_begin = c.H * c.D, v_begin = k_begin + c.Hkv * c.D;
    Values qkv(c.B * c.Tq * width), dqkv(qkv.size());
    const auto view = [&](Values& packed, int64_t begin) {
        return reference::View<double>(packed.data() + begin, c.Tq * width, width, c.D);
    };
    for (int64_t row = 0; row < c.B * c.Tq; ++row) {
        std::copy_n(a.q.data() + row * c.H * c.D, c.H * c.D, qkv.data() + row * width);
        std::copy_n(a.k.data() + row * c.Hkv * c.D, c.Hkv * c.D, qkv.data() + row * width + k_begin);
        std::copy_n(a.v.data() + row * c.Hkv * c.D, c.Hkv * c.D, qkv.data() + row * width + v_begin);
    }
    Values out(a.out.size()), lse(a.lse.size());
    reference::attention_forward<double>(a.query_rows(out), lse.data(), view(qkv, 0), view(qkv, k_begin),
                                         view(qkv, v_begin), a.shape);
    reference::attention_backward<double>(view(dqkv, 0), view(dqkv, k_begin), view(dqkv, v_begin), a.query_rows(a.dout),
                                          view(qkv, 0), view(qkv, k_begin), view(qkv, v_begin), a.query_rows(out),
                                          lse.data(), a.shape);
    EXPECT_TRUE(same_bits(out, a.out) && same_bits(lse, a.lse));
    for (int64_t row = 0; row < c.B * c.Tq; ++row) {
        const double* packed = dqkv.data() + row * width;
        EXPECT_TRUE(std::equal(packed, packed + k_begin, a.dq.data() + row * c.H * c.D));
        EXPECT_TRUE(std::equal(packed + k_begin, packed + v_begin, a.dk.data() + row * c.Hkv * c.D));
        EXPECT_TRUE(std::equal(packed + v_begin, packed + width, a.dv.data() + row * c.Hkv * c.D));
    }
}

TEST(Attention, SameBitsForAnyThreads) {
    expect_same_bits_for_any_threads<float>([] {
        AttentionData<float> a({2, 4, 2, 16, 2 * QUERIES + 5, 2 * QUERIES + 5, true, 0, 1.0});
        a.forward();
        a.backward();
        std::vector<float> all = a.out;
        for (const std::vector<float>* part : {&a.lse, &a.dq, &a.dk, &a.dv}) {
            all.insert(all.end(), part->begin(), part->end());
        }
        return all;
    });
}

// ---- classifier --------------------------------------------------------------------------------
TEST(CrossEntropy, GradientEqualsFiniteDifferences) {
    for (const int64_t V : {2, 17, 258}) {
        const int64_t rows = 3;
        const double dloss = 0.7;
        Values logits = random_values(rows * V, 3.0, 1), losses(rows);
        const std::vector<int32_t> targets = random_tokens(rows, V, 2);
        Values dlogits = logits;
        reference::cross_entropy_forward_backward(losses.data(), dlogits.data(), targets.data(), rows, V, V, dloss,
                                                  true);
        EXPECT_LE(gradient_error(logits, dlogits,
                                 [&] {
                                     Values again = logits, loss(rows);
                                     reference::cross_entropy_forward_backward(loss.data(), again.data(),
                                                                               targets.data(), rows, V, V, 0.0, false);
                                     EXPECT_TRUE(same_bits(again, logits));  // without gradient logits stay
                                     return dloss * rows * reference::mean_loss(loss.data(), rows);
                                 }),
                  GRADIENT_LIMIT);
    }
}

TEST(CrossEntropy, PaddedRowsBadTargetsAndLargeLogits) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    Values logits = {1000.0, 0.0, -1000.0, nan, nan, 5.0, 5.0, 5.0, nan, nan}, losses(2);  // V = 3, stride 5
    const std::vector<int32_t> targets = {2, 3};
    reference::cross_entropy_forward_backward(losses.data(), logits.data(), targets.data(), 2, 3, 5, 1.0, true);
    EXPECT_DOUBLE_EQ(losses[0], 2000.0);
    EXPECT_TRUE(std::isnan(losses[1]));  // there is no class 3
    const Values expected = {1.0, 0.0, -1.0, 0.0, 0.0, 1.0 / 3, 1.0 / 3, 1.0 / 3, 0.0, 0.0};
    EXPECT_LE(relative_error(logits, expected), 1e-15);
}

TEST(Classifier, GradientsEqualFiniteDifferences) {
    const int64_t rows = 7, V = 11;
    const int C = 8;
    const double dloss = 0.3;
    for (const int64_t chunk_rows : {1, 3, 7}) {
        Values hidden = random_values(rows * C, 1.0, 1), weight = random_values(V * C, 1.0, 2);
        const std::vector<int32_t> targets = random_tokens(rows, V, 3);
        Values losses(rows), dhidden(rows * C), dweight(V * C, 0.0), logits(chunk_rows * V);
        reference::classifier_forward_backward(losses.data(), dhidden.data(), dweight.data(), logits.data(),
                                               hidden.data(), weight.data(), targets.data(), rows, V, C, chunk_rows,
                                               dloss);
        const auto loss = [&] {
            Values again(rows);
            reference::classifier_loss(again.data(), logits.data(), hidden.data(), weight.data(), targets.data(), rows,
                                       V, C, chunk_rows);
            return dloss * rows * reference::mean_loss(again.data(), rows);
        };
        EXPECT_NEAR(loss(), dloss * rows * reference::mean_loss(losses.data(), rows), 1e-14);
        EXPECT_LE(gradient_error(hidden, dhidden, loss), GRADIENT_LIMIT);
        EXPECT_LE(gradient_error(weight, dweight, loss), GRADIENT_LIMIT);
        Values in_place = hidden;
        reference::classifier_forward_backward(losses.data(), in_place.data(), dweight.data(), logits.data(),
                                               in_place.data(), weight.data(), targets.data(), rows, V, C, chunk_rows,
                                               dloss);
        EXPECT_TRUE(same_bits(in_place, dhidden));
    }
}

// ---- optimizer ---------------------------------------------------------------------------------
TEST(GradNorm, IsTheRootOfTheSumOfSquares) {
    const Values grads = random_values(10001, 1.0, 1);
    EXPECT_NEAR(reference::grad_norm(grads.data(), 10001), std::sqrt(dot(grads, grads)), 1e-12);
    const std::vector<float> large(5000, 1e30f);
    EXPECT_NEAR(reference::grad_norm(large.data(), 5000) / (1e30 * std::sqrt(5000.0)), 1.0, 1e-6);
    std::vector<float> bad(5000, 1.0f);
    bad[4999] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_TRUE(std::isnan(reference::grad_norm(bad.data(), 5000)));
    bad[4999] = std::numeric_limits<float>::infinity();
    EXPECT_TRUE(std::isinf(reference::grad_norm(bad.data(), 5000)));
    expect_same_bits_for_any_threads<double>([&] { return Values{reference::grad_norm(grads.data(), 10001)}; });
}

TEST(AdamW, FollowsItsFormula) {
    AdamWSettings settings;
    settings.learning_rate = 0.01, settings.adam_step = 2;
    const int64_t n = 5001;
    const Values grads = random_values(n, 1.0, 1), before = random_values(n, 1.0, 2), m = random_values(n, 0.1, 3);
    Values v = random_values(n, 0.1, 4);
    for (double& value : v) {
        value = std::abs(value);
    }
    for (const double norm : {0.5, 4.0}) {  // below and above max_grad_norm
        Values master = before, exp_avg = m, exp_avg_sq = v;
        reference::adamw_update(master.data(), exp_avg.data(), exp_avg_sq.data(), grads.data(), norm, 1.0, n, settings);
        for (int64_t i = 0; i < n; ++i) {
            const double g = grads[i] * std::min(1.0, 1.0 / norm);
            const double m_new = 0.9 * m[i] + 0.1 * g, v_new = 0.95 * v[i] + 0.05 * g * g;
            const double step = m_new / (1.0 - 0.9 * 0.9) / (std::sqrt(v_new / (1.0 - 0.95 * 0.95)) + 1e-8);
            ASSERT_NEAR(exp_avg[i], m_new, 1e-15);
            ASSERT_NEAR(exp_avg_sq[i], v_new, 1e-15);
            ASSERT_NEAR(master[i], before[i] - 0.01 * (step + 0.1 * before[i]), 1e-14);
        }
    }
    expect_same_bits_for_any_threads<double>([&] {
        Values master = before, exp_avg = m, exp_avg_sq = v;
        reference::adamw_update(master.data(), exp_avg.data(), exp_avg_sq.data(), grads.data(), 4.0, 1.0, n, settings);
        return master;
    });
}

// In float32 0.9999999 is 1 - 1.19e-7.
TEST(AdamW, BetasNearOneKeepTheirDistanceFromIt) {
    AdamWSettings settings;
    settings.learning_rate = 0.01, settings.beta1 = settings.beta2 = 0.9999999, settings.max_grad_norm = 0.0;
    const float grad = 2.0f;
    float master = 1.0f, exp_avg = 0.0f, exp_avg_sq = 0.0f;
    reference::adamw_update(&master, &exp_avg, &exp_avg_sq, &grad, 2.0, 1.0, 1, settings);
    EXPECT_NEAR(exp_avg, 2e-7f, 1e-12f);
    EXPECT_NEAR(exp_avg_sq, 4e-7f, 1e-12f);
    EXPECT_NEAR(master, 1.0f - 0.01f * (1.0f + 0.1f), 1e-6f);
}

TEST(AdamW, ALargeGradientLeavesAFiniteMeanOfSquares) {
    AdamWSettings settings;
    settings.learning_rate = 0.01, settings.max_grad_norm = 0.0;
    const float grad = 1e30f;
    float master = 1.0f, exp_avg = 0.0f, exp_avg_sq = 0.0f;
    reference::adamw_update(&master, &exp_avg, &exp_avg_sq, &grad, 1e30, 1.0, 1, settings);
    EXPECT_EQ(exp_avg_sq, std::numeric_limits<float>::max());
    EXPECT_TRUE(std::isfinite(master));
}

TEST(AdamW, ChangesNothingWhenLossOrNormIsNotFinite) {
    AdamWSettings settings;
    settings.learning_rate = 0.01;
    const Values ones(10, 1.0);
    for (const auto& [norm, loss] : {std::pair<double, double>{NAN, 1.0}, {INFINITY, 1.0}, {1.0, NAN}}) {
        Values master = ones, exp_avg = ones, exp_avg_sq = ones;
        reference::adamw_update(master.data(), exp_avg.data(), exp_avg_sq.data(), ones.data(), norm, loss, 10,
                                settings);
        EXPECT_TRUE(same_bits(master, ones) && same_bits(exp_avg, ones) && same_bits(exp_avg_sq, ones));
    }
}

}  // namespace
