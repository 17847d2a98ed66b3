// lighthouse_cases.cuh: what the Lighthouse programs of dev/cuda share: the shapes that hurt, packed operands on host
// and device, selections made by the CPU reference.
#pragma once
#include "dev/cuda/harness.cuh"
#include "llmc/lighthouse_rows.cuh"
#include "llmc/reference/lighthouse.h"

struct LighthouseCase {
    int64_t B, T;
    int levels, pool;
    int64_t topk;
    int H, Hkv, D;

    LighthouseShape shape(LighthouseScorer scorer = LighthouseScorer::norm) const {
        LighthouseConfig config;
        config.levels = levels, config.pool = pool, config.topk = topk;
        LighthouseShape shape;
        shape.geometry = make_lighthouse_geometry(T, config);
        shape.B = (int)B, shape.H = H, shape.Hkv = Hkv, shape.D = D;
        shape.scale = 1.0f / std::sqrt((float)D);
        shape.scorer = scorer;
        return shape;
    }
    std::string label() const {
        return format_string("B%lld T%lld L%d p%d k%lld H%d/%d D%d", (long long)B, (long long)T, levels, pool,
                             (long long)topk, H, Hkv, D);
    }
};

// Two levels to six, every pool size, odd tile sizes, one head and groups of 4, D that leaves lanes idle, long coarsest
// windows, more candidates than fit in shared memory, T that is no multiple of 8.
static const std::vector<LighthouseCase> LIGHTHOUSE_CASES = {
    {1, 256, 2, 2, 128, 1, 1, 8},          {2, 129 * 2 * 4, 3, 2, 256, 2, 2, 64},
    {1, 2048, 3, 4, 128, 4, 1, 128},       {3, 512, 2, 4, 128, 6, 3, 80},
    {1, 132 * 32, 6, 2, 128, 2, 1, 32},    {1, 128 * 1024, 3, 32, 128, 1, 1, 16},
    {1, 2 * 5000 * 2, 2, 2, 256, 1, 1, 8}, {2, 3 * 200 * 64, 3, 8, 384, 4, 2, 256},
    {1, 12288, 4, 4, 128, 8, 8, 128},      {1, 128 * 256, 3, 16, 128, 2, 1, 64},
    {2, 8192, 5, 2, 256, 4, 2, 128},       {2, 258, 2, 2, 128, 2, 1, 64},
};
// The least that launches every kernel: three ranges of D, each with three ranges of levels; more candidates than fit
// in shared memory; the pool that runs have; two kv heads and T that is no multiple of 8.
static const std::vector<LighthouseCase> LIGHTHOUSE_SMALL_CASES = {
    {1, 256, 2, 2, 128, 1, 1, 8},          {1, 512, 3, 2, 128, 2, 1, 80},   {1, 512, 3, 2, 128, 1, 1, 256},
    {1, 1024, 4, 2, 128, 1, 1, 64},        {1, 1024, 4, 2, 128, 2, 1, 128}, {1, 1024, 4, 2, 128, 1, 1, 192},
    {1, 2048, 5, 2, 128, 1, 1, 8},         {1, 2048, 5, 2, 128, 1, 1, 104}, {1, 2048, 5, 2, 128, 1, 1, 256},
    {1, 2 * 5000 * 2, 2, 2, 256, 1, 1, 8}, {1, 2048, 3, 4, 128, 1, 1, 64},  {1, 258, 2, 2, 128, 2, 2, 64},
};
// Those a program checks.
inline const std::vector<LighthouseCase>& lighthouse_cases(const Harness& h) {
    return h.small ? LIGHTHOUSE_SMALL_CASES : LIGHTHOUSE_CASES;
}
// The shape of the paper's runs, one with grouped queries, one long.
static const std::vector<LighthouseCase> LIGHTHOUSE_TIMED = {
    {1, 98304, 3, 4, 1536, 8, 8, 128}, {1, 98304, 3, 4, 1536, 32, 8, 128}, {1, 524288, 4, 4, 2048, 8, 8, 128}};

// Packed rows [B, rows, (H + 2 Hkv) D] of q, k and v as views; reference::View has the same members.
template <class Element>
QkvHeads<Element> packed_heads(Element* data, int64_t rows, const LighthouseShape& shape) {
    const int64_t width = (int64_t)shape.num_heads() * shape.D;
    const auto part = [&](int first) {
        return HeadView<Element>(data + first * shape.D, rows * width, width, shape.D);
    };
    return {part(0), part(shape.H), part(shape.H + shape.Hkv)};
}
template <class Element>
HeadView<Element> plain_heads(Element* data, int64_t rows, int heads, int D) {
    return {data, rows * heads * D, (int64_t)heads * D, D};
}
template <class Element>
reference::View<Element> reference_view(const HeadView<Element>& view) {
    return {view.data, view.stride_b, view.stride_t, view.stride_h};
}

// -1, 0 or 1: sums of a few hundred are exact, and so are their quotients by powers of two.
inline std::vector<bf16> small_integers(int64_t num_elements, uint64_t seed) {
    std::vector<bf16> values(num_elements);
    for (int64_t i = 0; i < num_elements; ++i) {
        values[i] = __float2bfloat16((float)(random_bits(seed, i) % 3) - 1.0f);
    }
    return values;
}
inline std::vector<bf16> to_bf16(const std::vector<double>& values) {
    std::vector<bf16> rounded(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
        rounded[i] = __float2bfloat16((float)values[i]);
    }
    return rounded;
}
// num_values different scores: few make ties. With `broken` one in 64 is NaN, one infinite.
inline std::vector<float> tied_scores(int64_t num_elements, uint64_t num_values, uint64_t seed, bool broken = false) {
    std::vector<float> scores(num_elements);
    for (int64_t i = 0; i < num_elements; ++i) {
        const uint64_t bits = random_bits(seed, i), kind = broken ? bits >> 58 : 63;
        scores[i] = kind == 0 ? NAN : kind == 1 ? INFINITY : (float)(bits % num_values);
    }
    return scores;
}

// The scores [*, T / c] of the coarsest level from those of tokens [*, T].
inline std::vector<float> window_maxima(const std::vector<float>& scores, const LighthouseGeometry& g) {
    const int64_t window = g.window(g.levels - 1);
    std::vector<float> maxima((int64_t)scores.size() / window, 0.0f);
    for (size_t i = 0; i < scores.size(); ++i) {
        maxima[i / window] = std::fmax(maxima[i / window], scores[i]);
    }
    return maxima;
}

// The reference's selection for token scores q [B, H, T] and k [B, k_heads, T].
struct HostSelection {
    std::vector<int32_t> entries, positions;

    HostSelection(const LighthouseShape& shape, const std::vector<float>& q, const std::vector<float>& k, int k_heads)
        : entries(shape.num_selections() * shape.geometry.S),
          positions(shape.num_selections() * shape.geometry.num_slots) {
        const LighthouseGeometry& g = shape.geometry;
        const int q_group = shape.H / shape.Hkv, k_group = k_heads / shape.Hkv;
#pragma omp parallel for
        for (int64_t i = 0; i < shape.num_selections(); ++i) {
            reference::lighthouse_select(entries.data() + i * g.S, positions.data() + i * g.num_slots,
                                         q.data() + i * q_group * g.T, q_group, k.data() + i * k_group * g.T, k_group,
                                         g);
        }
    }
    HostSelection(const LighthouseShape& shape, uint64_t seed)
        : HostSelection(shape, tied_scores(shape.B * shape.H * shape.geometry.T, 1 << 20, seed),
                        tied_scores(shape.B * shape.Hkv * shape.geometry.T, 1 << 20, seed + 1), shape.Hkv) {}
};
