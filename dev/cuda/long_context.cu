// long_context.cu: what only length can break: offsets beyond 2^31 elements, sums over a million keys, copies to the
// host that kernels overtake. Nothing can compute all of it a second time, so chosen rows are computed again on the CPU
// in float64 from everything they depend on: the first and the last, those at the borders of tiles, and random ones.
//   attention   forward and backward at T = 2^20 in packed rows, and at B T H D beyond 2^31
//   Lighthouse  every stage of forward and backward at T = 2^20 and B T H D beyond 2^31, each from what it was given
//   the model   one dense block at T = 2^20: losses of chosen tokens, from the tokens and the weights
//   all modes   four blocks at T = 2^20: loss, gradients and weights are the same bits however memory is saved
// Takes about 30 s and 35 GiB of the GPU. It has one variant, what ships, and times nothing.
#define LLMC_POISON  // activations and workspace start as NaN
#include <memory>
#include <numeric>

#include "dev/cuda/flash_attention_cases.cuh"
#include "dev/cuda/lighthouse_cases.cuh"
#include "llmc/flash_attention.cuh"
#include "llmc/lighthouse.cuh"
#include "llmc/model.cuh"
#include "llmc/reference/rmsnorm.h"
#include "llmc/reference/rope.h"
#include "llmc/reference/swiglu.h"

constexpr double ROUNDING = unit_roundoff<bf16>();

// ---- chosen rows -------------------------------------------------------------------------------
// Of [0, n): the ends, the borders of tiles of 64 and 128 and of 32-bit halves, random ones.
static std::vector<int64_t> chosen_rows(int64_t n, int num_random, uint64_t seed) {
    std::vector<int64_t> rows;
    for (const int64_t row : {(int64_t)0, (int64_t)1, (int64_t)63, (int64_t)64, (int64_t)127, (int64_t)128, n / 2 - 1,
                              n / 2, n - 129, n - 128, n - 65, n - 2, n - 1}) {
        if (row >= 0 && row < n) {
            rows.push_back(row);
        }
    }
    for (int i = 0; i < num_random; ++i) {
        rows.push_back((int64_t)(random_bits(seed, i) % (uint64_t)n));
    }
    std::sort(rows.begin(), rows.end());
    rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
    return rows;
}

// Chosen rows [rows, width] with a bound on the error of each element.
struct BoundedRows {
    std::vector<double> values, bounds;
    BoundedRows(size_t num_rows, int width) : values(num_rows * width, 0.0), bounds(num_rows * width, 0.0) {}
};

// The largest error in units of its bound; NaN counts as infinite.
static double worst_of(const std::vector<double>& actual, const BoundedRows& truth) {
    double worst = 0.0;
    for (size_t i = 0; i < actual.size(); ++i) {
        const double error = std::abs(actual[i] - truth.values[i]) / (truth.bounds[i] + 1e-30);
        worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
    }
    return worst;
}
// actual [rows, width]. The check is checked: every row taken for the next one must be refused.
static void expect_rows(Harness& h, const std::string& name, const std::string& label,
                        const std::vector<double>& actual, const BoundedRows& truth, int width) {
    const double worst = worst_of(actual, truth);
    std::vector<double> shifted(actual.begin() + width, actual.end());
    shifted.insert(shifted.end(), actual.begin(), actual.begin() + width);
    const double worst_shifted = worst_of(shifted, truth);
    h.expect(worst <= 1.0 && worst_shifted > 1.0, name, label,
             format_string("%zu rows, largest error %.2f of its bound; of other rows %.0f", actual.size() / width,
                           worst, worst_shifted));
}

// ---- attention ---------------------------------------------------------------------------------
// One head of one sequence, [T, D] floats.
static std::vector<float> download_head(HeadView<const bf16> view, int64_t b, int64_t head, int64_t T, int D) {
    std::vector<bf16> rows(T * D);
    CUDA_CHECK(cudaMemcpy2D(rows.data(), D * sizeof(bf16), view.row(b, 0, head), view.stride_t * sizeof(bf16),
                            D * sizeof(bf16), T, cudaMemcpyDeviceToHost));
    return convert<float>(rows);
}
static std::vector<double> chosen(const std::vector<float>& head, const std::vector<int64_t>& rows, int D) {
    std::vector<double> values;
    for (const int64_t row : rows) {
        values.insert(values.end(), head.begin() + row * D, head.begin() + (row + 1) * D);
    }
    return values;
}
static double dot(const float* a, const float* b, int D) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int d = 0; d < D; ++d) {
        sum += (double)a[d] * (double)b[d];
    }
    return sum;
}
static double norm(const float* a, int D) { return std::sqrt(dot(a, a, D)); }

// A query head with everything that its rows and gradients depend on.
struct HostHead {
    std::vector<float> q, k, v, out, dout, lse;  // [T, D]; out and lse as the forward left them
};

// Rows of the forward and of dq. Errors: probabilities, ds and results are rounded to bf16, one relative rounding each,
// and twice that is allowed; sums are float32, whose error is far below, but for dp - delta, which may cancel.
constexpr double CANCELLED =
    1e-3;  // roundings of bf16, of the vectors' sizes: more than a dot product in float32 is off
static void query_rows(const HostHead& head, const std::vector<int64_t>& rows, int D, double scale, BoundedRows& out,
                       BoundedRows& dq, std::vector<double>& lse) {
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < rows.size(); ++i) {
        const int64_t t = rows[i];
        const float *const q = &head.q[t * D], *const dout = &head.dout[t * D];
        std::vector<double> scores(t + 1);
        double largest = -INFINITY, sum = 0.0;
        for (int64_t j = 0; j <= t; ++j) {
            scores[j] = scale * dot(q, &head.k[j * D], D);
            largest = std::max(largest, scores[j]);
        }
        for (int64_t j = 0; j <= t; ++j) {
            sum += std::exp(scores[j] - largest);
        }
        lse[i] = largest + std::log(sum);
        const double delta = dot(dout, &head.out[t * D], D), dout_size = norm(dout, D);
        const double out_size = norm(&head.out[t * D], D);
        std::vector<double> o(D), o_sizes(D), g(D), g_sizes(D);
        for (int64_t j = 0; j <= t; ++j) {
            const float *const k = &head.k[j * D], *const v = &head.v[j * D];
            const double p = std::exp(scores[j] - lse[i]), ds = scale * p * (dot(dout, v, D) - delta);
            const double ds_size = std::abs(ds) + CANCELLED * scale * p * dout_size * (norm(v, D) + out_size);
#pragma omp simd
            for (int d = 0; d < D; ++d) {
                o[d] += p * v[d], o_sizes[d] += std::abs(p * v[d]);
                g[d] += ds * k[d], g_sizes[d] += ds_size * std::abs(k[d]);
            }
        }
        for (int d = 0; d < D; ++d) {
            out.values[i * D + d] = o[d], out.bounds[i * D + d] = 2 * ROUNDING * (std::abs(o[d]) + o_sizes[d]);
            dq.values[i * D + d] = g[d], dq.bounds[i * D + d] = 2 * ROUNDING * (std::abs(g[d]) + g_sizes[d]);
        }
    }
}

// Rows of dk and dv: of all query heads that read this key head.
static void key_rows(const std::vector<HostHead>& heads, const std::vector<int64_t>& rows, int64_t T, int D,
                     double scale, BoundedRows& dk, BoundedRows& dv) {
    for (const HostHead& head : heads) {
        std::vector<double> delta(T), cancelled(T);
#pragma omp parallel for
        for (int64_t t = 0; t < T; ++t) {
            const float *const dout = &head.dout[t * D], *const out = &head.out[t * D];
            delta[t] = dot(dout, out, D);
            cancelled[t] = CANCELLED * norm(dout, D);
        }
#pragma omp parallel for schedule(dynamic)
        for (size_t i = 0; i < rows.size(); ++i) {
            const float *const k = &head.k[rows[i] * D], *const v = &head.v[rows[i] * D];
            const double v_size = norm(v, D);
            std::vector<double> sizes(2 * D);
            for (int64_t t = rows[i]; t < T; ++t) {
                const float *const q = &head.q[t * D], *const dout = &head.dout[t * D];
                const double p = std::exp(scale * dot(q, k, D) - head.lse[t]);
                const double ds = scale * p * (dot(dout, v, D) - delta[t]);
                const double ds_size = std::abs(ds) + cancelled[t] * scale * p * (v_size + norm(&head.out[t * D], D));
#pragma omp simd
                for (int d = 0; d < D; ++d) {
                    dk.values[i * D + d] += ds * q[d], sizes[d] += ds_size * std::abs(q[d]);
                    dv.values[i * D + d] += p * dout[d], sizes[D + d] += std::abs(p * dout[d]);
                }
            }
            for (int d = 0; d < D; ++d) {
                dk.bounds[i * D + d] += 2 * ROUNDING * sizes[d];
                dv.bounds[i * D + d] += 2 * ROUNDING * sizes[D + d];
            }
        }
    }
    for (size_t i = 0; i < dk.values.size(); ++i) {
        dk.bounds[i] += 2 * ROUNDING * std::abs(dk.values[i]), dv.bounds[i] += 2 * ROUNDING * std::abs(dv.values[i]);
    }
}

// Attention of the last s.H query heads, and as many key heads as they read, of packed rows that hold `packed_heads`
// query heads. The last key head of the last sequence is checked.
static void check_attention(Harness& h, const std::string& label, const AttentionShape& s, int packed_heads) {
    AttentionShape packed = s;
    packed.H = packed_heads, packed.Hkv = packed_heads / (s.H / s.Hkv);
    const int D = s.D, group = s.H / s.Hkv, first = packed.H - s.H, first_key = packed.Hkv - s.Hkv;
    const int64_t T = s.Tq, b = s.B - 1, out_width = (int64_t)packed.H * D;
    DeviceBuffer<bf16> qkv(packed_elements(packed)), dqkv(qkv.size()), out(s.B * T * out_width), dout(out.size());
    DeviceBuffer<float> lse((int64_t)s.B * s.H * T);
    DeviceBuffer<unsigned char> scratch((int64_t)flash_attention_backward_scratch_bytes(s, false));
    // Scores of standard deviation 3.5: of a million keys a handful count, so a wrong one shows.
    qkv.fill_random(h.seed, 1.87f);
    dout.fill_random(h.seed + 1);
    auto from = [](HeadView<bf16> view, int head) {
        view.data += head * view.stride_h;
        return view;
    };
    auto views = [&](bf16* data) {
        const PackedViews all = packed_views(data, packed);
        return PackedViews{from(all.q, first), from(all.k, first_key), from(all.v, first_key)};
    };
    const PackedViews in = views(qkv.data()), din = views(dqkv.data());
    const HeadView<bf16> out_view = from({out.data(), T * out_width, out_width, D}, first);
    const HeadView<bf16> dout_view = from({dout.data(), T * out_width, out_width, D}, first);
    flash_attention_forward(out_view, lse.data(), in.q, in.k, in.v, s, h.stream);
    flash_attention_backward(din.q, din.k, din.v, dout_view, in.q, in.k, in.v, out_view, lse.data(), scratch.data(), s,
                             false, h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));

    std::vector<HostHead> heads;
    for (int head = s.H - group; head < s.H; ++head) {
        HostHead host;
        host.q = download_head(in.q, b, head, T, D);
        host.k = download_head(in.k, b, s.Hkv - 1, T, D), host.v = download_head(in.v, b, s.Hkv - 1, T, D);
        host.out = download_head(out_view, b, head, T, D), host.dout = download_head(dout_view, b, head, T, D);
        host.lse = lse.download((b * s.H + head) * T, T);
        heads.push_back(std::move(host));
    }
    const std::vector<int64_t> rows = chosen_rows(T, 12, h.seed);
    BoundedRows true_out(rows.size(), D), true_dq(rows.size(), D), true_dk(rows.size(), D), true_dv(rows.size(), D);
    std::vector<double> true_lse(rows.size());
    query_rows(heads.back(), rows, D, s.scale, true_out, true_dq, true_lse);
    key_rows(heads, rows, T, D, s.scale, true_dk, true_dv);
    expect_rows(h, "out", label, chosen(heads.back().out, rows, D), true_out, D);
    expect_rows(h, "dq", label, chosen(download_head(din.q, b, s.H - 1, T, D), rows, D), true_dq, D);
    expect_rows(h, "dk", label, chosen(download_head(din.k, b, s.Hkv - 1, T, D), rows, D), true_dk, D);
    expect_rows(h, "dv", label, chosen(download_head(din.v, b, s.Hkv - 1, T, D), rows, D), true_dv, D);
    double lse_error = 0.0;
    for (size_t i = 0; i < rows.size(); ++i) {
        const double error = std::abs(heads.back().lse[rows[i]] - true_lse[i]);
        lse_error = std::max(lse_error, std::isnan(error) ? INFINITY : error);
    }
    // A log-sum-exp near 10, in float32, from exponentials that are good to a few roundings.
    h.expect(lse_error <= 1e-4, "lse", label, format_string("largest error %.1e limit 1e-4", lse_error));
    h.expect(qkv.guards_intact() && dqkv.guards_intact() && out.guards_intact() && lse.guards_intact() &&
                 scratch.guards_intact(),
             "around the buffers", label, "nothing is written");
}

// ---- Lighthouse attention ------------------------------------------------------------------------
// Each stage from what the one before it left: entries and positions are each other's inverse; gathered rows are means
// of tokens; the inner attention; tokens are sums of rows; and back.
static void check_lighthouse(Harness& h, const std::string& label, const LighthouseShape& s) {
    const LighthouseGeometry& g = s.geometry;
    const int D = s.D, head = s.H - 1, key_head = s.Hkv - 1;
    const int64_t T = g.T, S = g.S, b = s.B - 1, width = (int64_t)s.num_heads() * D, out_width = (int64_t)s.H * D;
    DeviceBuffer<bf16> qkv(s.B * T * width), dqkv(qkv.size()), out(s.B * T * out_width), dout(out.size());
    DeviceBuffer<unsigned char> saved((int64_t)lighthouse_saved_bytes(s));
    DeviceBuffer<unsigned char> forward_scratch((int64_t)lighthouse_forward_scratch_bytes(s));
    DeviceBuffer<unsigned char> backward_scratch((int64_t)lighthouse_backward_scratch_bytes(s, false));
    qkv.fill_random(h.seed + 2, 1.87f);
    dout.fill_random(h.seed + 3);
    const QkvHeads<const bf16> in = packed_heads<const bf16>(qkv.data(), T, s);
    const QkvHeads<bf16> din = packed_heads<bf16>(dqkv.data(), T, s);
    const HeadView<bf16> out_view = plain_heads<bf16>(out.data(), T, s.H, D);
    const HeadView<bf16> dout_view = plain_heads<bf16>(dout.data(), T, s.H, D);
    lighthouse_forward(out_view, saved.data(), in.q, in.k, in.v, forward_scratch.data(), s, h.stream);
    lighthouse_backward(din.q, din.k, din.v, dout_view, saved.data(), backward_scratch.data(), s, false, h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    MemoryArea saved_area(saved.data()), scratch_area(backward_scratch.data());
    const LighthouseSaved kept(saved_area, s);
    const LighthouseBackwardScratch scratch(scratch_area, s, false);

    auto download = [](const int32_t* from, int64_t n) {
        std::vector<int32_t> values(n);
        CUDA_CHECK(cudaMemcpy(values.data(), from, n * sizeof(int32_t), cudaMemcpyDeviceToHost));
        return values;
    };
    const int64_t selection = b * s.Hkv + key_head;
    const std::vector<int32_t> entries = download(kept.entries + selection * S, S);
    const std::vector<int32_t> positions = download(kept.positions + selection * g.num_slots, g.num_slots);
    int64_t num_present = 0, num_wrong = 0;
    for (int64_t slot = 0; slot < g.num_slots; ++slot) {
        num_present += positions[slot] >= 0;
    }
    for (int64_t n = 0; n < S; ++n) {
        num_wrong += entries[n] < 0 || entries[n] >= g.num_slots || positions[entries[n]] != n;
    }
    if (!h.expect(num_wrong == 0 && num_present == S, "selection", label,
                  format_string("of %lld entries %lld are not at their position, %lld positions are taken",
                                (long long)S, (long long)num_wrong, (long long)num_present))) {
        return;
    }

    // Gathered rows: means of bf16 tokens in float32, rounded once.
    auto gathered = [&](bf16* rows, int heads, int which) {
        return download_head(lighthouse_gathered_view<const bf16>(rows, heads, s), b, which, S, D);
    };
    HostHead inner;
    inner.q = gathered(kept.q, s.H, head), inner.out = gathered(kept.out, s.H, head);
    inner.k = gathered(kept.k, s.Hkv, key_head), inner.v = gathered(kept.v, s.Hkv, key_head);
    inner.dout = gathered(scratch.dout, s.H, head);
    const std::vector<int64_t> rows = chosen_rows(S, 40, h.seed + 4);
    const std::vector<float> q = download_head(in.q, b, head, T, D), v = download_head(in.v, b, key_head, T, D);
    const std::vector<float> token_dout = download_head(dout_view, b, head, T, D);
    BoundedRows mean_q(rows.size(), D), mean_v(rows.size(), D), sum_dout(rows.size(), D);
    for (size_t i = 0; i < rows.size(); ++i) {
        int64_t index = entries[rows[i]];
        const int64_t window = g.window(g.level_of_slot(index));
        auto sum_of = [&](BoundedRows& truth, const std::vector<float>& tokens, int64_t first, double factor) {
            for (int d = 0; d < D; ++d) {
                double sum = 0.0, sizes = 0.0;
                for (int64_t t = first; t < std::min(first + window, T); ++t) {
                    sum += tokens[t * D + d], sizes += std::abs(tokens[t * D + d]);
                }
                truth.values[i * D + d] = sum * factor;
                truth.bounds[i * D + d] = (ROUNDING * std::abs(sum) + 1e-5 * sizes) * factor;
            }
        };
        sum_of(mean_q, q, index * window, 1.0 / (double)window);
        sum_of(mean_v, v, index * window, 1.0 / (double)window);
        sum_of(sum_dout, token_dout, (index + 1) * window - 1, 1.0);
    }
    expect_rows(h, "gathered q", label, chosen(inner.q, rows, D), mean_q, D);
    expect_rows(h, "gathered v", label, chosen(inner.v, rows, D), mean_v, D);
    expect_rows(h, "gathered dout", label, chosen(inner.dout, rows, D), sum_dout, D);

    // The inner attention and its gradient of q.
    BoundedRows inner_out(rows.size(), D), inner_dq(rows.size(), D);
    std::vector<double> lse(rows.size());
    query_rows(inner, rows, D, s.scale, inner_out, inner_dq, lse);
    const std::vector<float> gathered_dq = gathered(scratch.dq, s.H, head);
    expect_rows(h, "inner out", label, chosen(inner.out, rows, D), inner_out, D);
    expect_rows(h, "inner dq", label, chosen(gathered_dq, rows, D), inner_dq, D);

    // Tokens: sums over levels of bf16 rows in float32, rounded once.
    const std::vector<int64_t> tokens = chosen_rows(T, 60, h.seed + 5);
    BoundedRows token_out(tokens.size(), D), token_dq(tokens.size(), D), token_dk(tokens.size(), D);
    const std::vector<float> gathered_dk = gathered(scratch.dk, s.Hkv, key_head);
    for (size_t i = 0; i < tokens.size(); ++i) {
        auto add = [&](BoundedRows& truth, const std::vector<float>& from, int32_t row, double factor) {
            for (int d = 0; row >= 0 && d < D; ++d) {
                truth.values[i * D + d] += from[(int64_t)row * D + d] * factor;
                truth.bounds[i * D + d] += 1e-5 * std::abs(from[(int64_t)row * D + d]) * factor;
            }
        };
        for (int level = 0; level < g.levels; ++level) {
            const int64_t before = ((tokens[i] + 1) >> g.window_bits(level)) - 1;
            add(token_out, inner.out, before >= 0 ? positions[g.slot(level, before)] : -1, 1.0);
            const int32_t around = positions[g.slot(level, tokens[i] >> g.window_bits(level))];
            add(token_dq, gathered_dq, around, 1.0 / (double)g.window(level));
            add(token_dk, gathered_dk, around, 1.0 / (double)g.window(level));
        }
    }
    for (BoundedRows* truth : {&token_out, &token_dq, &token_dk}) {
        for (size_t i = 0; i < truth->values.size(); ++i) {
            truth->bounds[i] += ROUNDING * std::abs(truth->values[i]);
        }
    }
    expect_rows(h, "out", label, chosen(download_head(out_view, b, head, T, D), tokens, D), token_out, D);
    expect_rows(h, "dq", label, chosen(download_head(din.q, b, head, T, D), tokens, D), token_dq, D);
    expect_rows(h, "dk", label, chosen(download_head(din.k, b, key_head, T, D), tokens, D), token_dk, D);
    h.expect(qkv.guards_intact() && dqkv.guards_intact() && out.guards_intact() && saved.guards_intact() &&
                 forward_scratch.guards_intact() && backward_scratch.guards_intact(),
             "around the buffers", label, "nothing is written");
}

// ---- a whole model of one block ------------------------------------------------------------------
// The loss of one token of a model of one dense block, from the tokens and the weights. Rounded: activations are
// rounded to bf16 where the GPU stores them; the error that this makes is what the GPU may make twice.
struct OneBlock {
    ModelConfig config;
    std::vector<std::vector<double>> weights;  // of the parameter table, rounded to bf16
    ParameterTable table;
    std::vector<double> inverse_frequencies;
    std::vector<int32_t> tokens;  // [T + 1]

    int64_t T() const { return (int64_t)tokens.size() - 1; }
};
template <bool ROUNDED>
class OneBlockLosses {
  public:
    explicit OneBlockLosses(const OneBlock& model) : m_(model), C_(model.config.width), D_(model.config.head_dim) {
        // Before rotation q, k and v depend on the token alone.
        const int64_t V = model.config.vocab_size;
        for (int64_t token = 0; token < V; ++token) {
            const double* embedding = &weight(m_.table.embedding)[token * C_];
            const std::vector<double> normed = norm({embedding, embedding + C_}, m_.table.layers[0].attention_norm);
            qkv_.push_back(product(normed, m_.table.layers[0].qkv, 3 * D_));
        }
        keys_.resize(m_.T() * D_);
#pragma omp parallel for
        for (int64_t t = 0; t < m_.T(); ++t) {
            rotate(&keys_[t * D_], t, D_);
        }
    }
    double loss(int64_t t) const {
        const LayerParameters& p = m_.table.layers[0];
        std::vector<float> q(D_);
        rotate(q.data(), t, 0);
        std::vector<double> scores(t + 1), attention(D_, 0.0);
        double largest = -INFINITY, sum = 0.0;
        for (int64_t j = 0; j <= t; ++j) {
            scores[j] = dot(q.data(), &keys_[j * D_], D_) / std::sqrt((double)D_);
            largest = std::max(largest, scores[j]);
        }
        for (int64_t j = 0; j <= t; ++j) {
            const double e = std::exp(scores[j] - largest);
            const double* v = &qkv_[m_.tokens[j]][2 * D_];
            sum += e;
            for (int d = 0; d < D_; ++d) {
                attention[d] += e * v[d];
            }
        }
        for (double& value : attention) {
            value = stored(value / sum);
        }
        const double* embedding = &weight(m_.table.embedding)[(int64_t)m_.tokens[t] * C_];
        const std::vector<double> residual_in(embedding, embedding + C_);
        const std::vector<double> residual_mid = product(attention, p.attention_out, C_, residual_in);
        const int F = m_.config.ffn_width;
        const std::vector<double> gate_up = product(norm(residual_mid, p.ffn_norm), p.gate_up, 2 * F);
        std::vector<double> swiglu(F);
        reference::swiglu_forward(swiglu.data(), gate_up.data(), 1, F);
        for (double& value : swiglu) {
            value = stored(value);
        }
        const std::vector<double> residual_out = product(swiglu, p.down, C_, residual_mid);
        const std::vector<double> logits =
            product(norm(residual_out, m_.table.final_norm), m_.table.classifier, (int)m_.config.vocab_size);
        double denominator = 0.0;
        for (const double logit : logits) {
            denominator += std::exp(logit);
        }
        return std::log(denominator) - logits[m_.tokens[t + 1]];
    }

  private:
    static double stored(double value) {
        return ROUNDED ? (double)__bfloat162float(__float2bfloat16((float)value)) : value;
    }
    const std::vector<double>& weight(int tensor) const { return m_.weights[tensor]; }
    std::vector<double> norm(const std::vector<double>& x, int tensor) const {
        std::vector<double> out(C_);
        double rstd;
        reference::rmsnorm_forward(out.data(), &rstd, x.data(), weight(tensor).data(), 1, C_, m_.config.norm_eps);
        for (double& value : out) {
            value = stored(value);
        }
        return out;
    }
    // [rows] of weight [rows, x.size()] times x, plus residual.
    std::vector<double> product(const std::vector<double>& x, int tensor, int rows,
                                const std::vector<double>& residual = {}) const {
        std::vector<double> out(rows);
        for (int row = 0; row < rows; ++row) {
            const double* w = &weight(tensor)[row * x.size()];
            out[row] = stored(std::inner_product(x.begin(), x.end(), w, residual.empty() ? 0.0 : residual[row]));
        }
        return out;
    }
    // out (=) [D]: the head that begins at `first` of token t's packed row, rotated; float, as bf16 and more need no
    // more.
    void rotate(float* out, int64_t t, int first) const {
        const double* row = &qkv_[m_.tokens[t]][first];
        for (int i = 0; i < D_ / 2; ++i) {
            const double angle = (double)t * m_.inverse_frequencies[i], x = row[i], y = row[i + D_ / 2];
            out[i] = (float)stored(x * std::cos(angle) - y * std::sin(angle));
            out[i + D_ / 2] = (float)stored(y * std::cos(angle) + x * std::sin(angle));
        }
    }

    const OneBlock& m_;
    int C_, D_;
    std::vector<std::vector<double>> qkv_;  // [V][3 D]
    std::vector<float> keys_;               // [T, D], rotated
};

static ModelConfig small_model(int64_t V, int layers, int C, int H, int Hkv, int D, int F) {
    ModelConfig m;
    m.vocab_size = V, m.num_layers = layers, m.width = C, m.num_heads = H, m.num_kv_heads = Hkv, m.head_dim = D;
    m.ffn_width = F;
    return m;
}
// Matrices keep the size of what they multiply; queries are query_scale as large, so that attention has preferences.
static std::vector<std::vector<float>> model_weights(const ParameterTable& table, const ModelConfig& config,
                                                     float query_scale, uint64_t seed) {
    std::vector<std::vector<float>> weights;
    for (const ParameterTensor& tensor : table.tensors) {
        const bool is_embedding = (int)weights.size() == table.embedding;
        const float scale = tensor.is_vector ? 0.2f : is_embedding ? 1.0f : 1.0f / std::sqrt((float)tensor.cols);
        std::vector<float> values = random_vector<float>(tensor.num_elements(), seed + weights.size(), scale);
        for (float& value : values) {
            value += tensor.is_vector ? 1.0f : 0.0f;
        }
        weights.push_back(std::move(values));
    }
    for (const LayerParameters& layer : table.layers) {
        for (int64_t i = 0; i < config.attention_width() * config.width; ++i) {
            weights[layer.qkv][i] *= query_scale;
        }
    }
    return weights;
}
static void set_weights(GpuModel& model, const std::vector<std::vector<float>>& weights) {
    for (size_t i = 0; i < weights.size(); ++i) {
        model.write_state(StateKind::master, (int)i, weights[i].data());
    }
}

static void check_one_block(Harness& h, int64_t T) {
    OneBlock block;
    block.config = small_model(96, 1, 64, 1, 1, 64, 64);
    block.table = make_parameter_table(block.config);
    block.inverse_frequencies = rope_inverse_frequencies(block.config);
    block.tokens = random_indices(T + 1, h.seed + 6, block.config.vocab_size);
    const auto weights = model_weights(block.table, block.config, 3.5f, h.seed + 7);
    for (const std::vector<float>& tensor : weights) {
        block.weights.push_back(to_double(convert<bf16>(tensor)));
    }
    GpuModelSettings settings;
    settings.max_seq_len = T;
    std::vector<float> losses(T, NAN);
    {
        GpuModel model(block.config, settings);
        set_weights(model, weights);
        model.token_losses(losses.data(), block.tokens.data(), block.tokens.data() + 1, 1, T);
    }
    const OneBlockLosses<false> truth(block);
    const OneBlockLosses<true> plain(block);
    const std::vector<int64_t> rows = chosen_rows(T, 20, h.seed + 8);
    std::vector<double> expected(rows.size()), rounded(rows.size());
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < rows.size(); ++i) {
        expected[i] = truth.loss(rows[i]), rounded[i] = plain.loss(rows[i]);
    }
    // The root of the mean square of the errors; shift: of another row's loss.
    auto error_of = [&](auto&& value) {
        double squares = 0.0;
        for (size_t i = 0; i < rows.size(); ++i) {
            squares += (value(i) - expected[i]) * (value(i) - expected[i]);
        }
        return std::sqrt(squares / (double)rows.size());
    };
    const double error = error_of([&](size_t i) { return losses[rows[i]]; });
    const double shifted = error_of([&](size_t i) { return losses[rows[(i + 1) % rows.size()]]; });
    const double limit =
        2.0 * std::max(error_of([&](size_t i) { return rounded[i]; }), ROUNDING * root_mean_square(expected));
    h.expect(
        error <= limit && shifted > limit, "losses of tokens", format_string("one dense block, T %lld", (long long)T),
        format_string("%zu tokens, error %.1e limit %.1e; of other tokens %.1e", rows.size(), error, limit, shifted));
}

// ---- ways to save memory -------------------------------------------------------------------------
static void check_modes(Harness& h, int64_t T, const LighthouseConfig& lighthouse) {
    const ModelConfig config = small_model(258, 4, 128, 2, 1, 64, 128);
    const auto weights = model_weights(make_parameter_table(config), config, 2.0f, h.seed + 9);
    const std::vector<int32_t> tokens = random_indices(T + 1, h.seed + 10, config.vocab_size);
    std::vector<std::vector<float>> expected;
    std::string expected_mode;
    for (const auto& [recompute, offload] :
         {std::pair(Recompute::none, Offload::none), std::pair(Recompute::norms_and_gate, Offload::optimizer),
          std::pair(Recompute::all_but_attention, Offload::activations), std::pair(Recompute::block, Offload::all)}) {
        GpuModelSettings settings;
        settings.max_seq_len = T, settings.deterministic = true;
        settings.recompute = recompute, settings.offload = offload, settings.lighthouse = lighthouse;
        settings.trains_dense = false, settings.optimizer_chunk_elements = 1 << 14;
        GpuModel model(config, settings);
        set_weights(model, weights);
        model.set_attention(AttentionMode::lighthouse);
        model.begin_step();
        model.accumulate_gradients(tokens.data(), 1, T, 1.0);
        std::vector<std::vector<float>> found;
        auto read = [&](auto&& reader) {
            for (size_t i = 0; i < weights.size(); ++i) {
                found.emplace_back(weights[i].size(), NAN);
                reader((int)i, found.back().data());
            }
        };
        read([&](int i, float* out) { model.read_gradient(i, out); });
        AdamWSettings adamw;
        adamw.learning_rate = 1e-3;
        const StepResult result = model.update(adamw);
        found.push_back({(float)result.loss, (float)result.grad_norm});
        read([&](int i, float* out) { model.read_state(StateKind::master, i, out); });
        const std::string mode =
            format_string("--recompute %s --offload %s", choice_name(recompute), choice_name(offload));
        const bool is_first = expected.empty();
        if (is_first) {
            expected = found, expected_mode = mode;
        }
        // Equal as numbers, so NaN is not; the first run with itself says that all are numbers, and moved the weights.
        const bool moved = found.back() != weights.back();
        h.expect(found == expected && !result.skipped && moved, is_first ? "numbers" : "bits of " + expected_mode,
                 format_string("four blocks, T %lld, %s", (long long)T, mode.c_str()),
                 format_string("loss %.6f, norm %.6f", result.loss, result.grad_norm));
    }
}

// ---- the program ---------------------------------------------------------------------------------
struct Shipped {};
static const std::vector<Variant<Shipped>> VARIANTS = {{1, "what ships", {}}};

static AttentionShape attention_of(int B, int64_t T, int H, int Hkv, int D) {
    AttentionShape s;
    s.B = B, s.H = H, s.Hkv = Hkv, s.D = D, s.Tq = s.Tk = T;
    s.scale = 1.0f / std::sqrt((float)D);
    return s;
}

static void check(Harness& h, const Variant<Shipped>&) {
    const int64_t T = h.small ? 1 << 9 : 1 << 20;
    LighthouseConfig lighthouse;
    lighthouse.levels = h.small ? 3 : 4, lighthouse.pool = h.small ? 2 : 4, lighthouse.topk = h.small ? 128 : 4096;
    lighthouse.dense_layers = {0};
    check_attention(h, format_string("T %lld, one of 8 packed heads of 128", (long long)T),
                    attention_of(1, T, 1, 1, 128), 8);
    const AttentionShape many = h.small ? attention_of(3, 200, 8, 1, 64) : attention_of(520, 4096, 8, 1, 128);
    check_attention(h, format_string("B T H D %lld", (long long)many.B * many.Tq * many.H * many.D), many, many.H);
    const int B = h.small ? 1 : 3, D = h.small ? 64 : 128;
    check_lighthouse(h, format_string("B T H D %lld", (long long)B * T * 8 * D),
                     make_lighthouse_shape(make_lighthouse_geometry(T, lighthouse), lighthouse, B, 8, 1, D,
                                           1.0f / std::sqrt((float)D)));
    check_one_block(h, T);
    check_modes(h, T, lighthouse);
}

int main(int argc, char** argv) {
    return run_variants(argc, argv, "long_context", VARIANTS, check, [](Harness&, const Variant<Shipped>&) {});
}
