// lighthouse_pool.cu: norms of q and k rows and the coarsest means of q, k, v; what ships is llmc/lighthouse_pool.cuh.
// Bound: memory; q, k, v are read once, 1/16 of them and the scores are written.
#include "dev/cuda/lighthouse_cases.cuh"
#include "llmc/lighthouse_pool.cuh"

using Launcher = void (*)(bf16*, const LighthouseScores&, const QkvHeads<const bf16>&, const LighthouseShape&,
                          cudaStream_t);

// ---- 1: one warp a token row for the norms, then one thread eight columns of a window for the means -----------------
__global__ void norms_kernel1(float* scores, QkvHeads<const bf16> qkv, LighthouseShape shape) {
    const int heads = shape.H + shape.Hkv, lane = threadIdx.x % WARP_SIZE;
    const int64_t row = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP_SIZE;  // (b, head, t)
    if (row >= shape.B * heads * shape.geometry.T) {
        return;
    }
    const int64_t t = row % shape.geometry.T, b = row / shape.geometry.T / heads;
    const bf16* x = qkv.head(shape, (int)(row / shape.geometry.T % heads)).row(b, t, 0);
    float squares = 0.0f;
    for (int d = lane; d < shape.D; d += WARP_SIZE) {
        const float value = __bfloat162float(x[d]);
        squares += value * value;
    }
    squares = warp_sum(squares);
    if (lane == 0) {
        scores[row] = sqrtf(squares);
    }
}
__global__ void means_kernel1(bf16* pooled, QkvHeads<const bf16> qkv, LighthouseShape shape, int window_bits) {
    const int64_t num_windows = shape.geometry.T >> window_bits;
    const int packs = shape.D / 8;
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;  // (b, window, head, pack)
    if (i >= shape.B * num_windows * shape.num_heads() * packs) {
        return;
    }
    const int64_t w = i / packs / shape.num_heads();
    const HeadView<const bf16> view = qkv.head(shape, (int)(i / packs % shape.num_heads()));
    FloatRow sum;
    for (int64_t t = 0; t < 1 << window_bits; ++t) {
        sum.add(load128(view.row(w / num_windows, (w % num_windows << window_bits) + t, 0) + i % packs * 8));
    }
    store128(pooled + i * 8, sum.pack(1.0f / (float)(1 << window_bits)));
}
__global__ void coarsest_scores_kernel1(LighthouseScores scores, int64_t num_windows, int window_bits) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;  // (b, head, window)
    if (i >= num_windows) {
        return;
    }
    float best = 0.0f;
    for (int64_t t = i << window_bits; t < (i + 1) << window_bits; ++t) {
        best = fmaxf(best, scores.tokens[t]);
    }
    scores.coarsest[i] = best;
}
static void pool1(bf16* pooled, const LighthouseScores& scores, const QkvHeads<const bf16>& qkv,
                  const LighthouseShape& shape, cudaStream_t stream) {
    const LighthouseGeometry& g = shape.geometry;
    const int64_t rows = shape.B * (shape.H + shape.Hkv) * g.T, bits = g.window_bits(g.levels - 1);
    norms_kernel1<<<(unsigned)ceil_div<int64_t>(rows * WARP_SIZE, 256), 256, 0, stream>>>(scores.tokens, qkv, shape);
    CUDA_CHECK_LAUNCH();
    const int64_t scored_windows = rows >> bits;
    coarsest_scores_kernel1<<<(unsigned)ceil_div<int64_t>(scored_windows, 256), 256, 0, stream>>>(
        scores, scored_windows, (int)bits);
    CUDA_CHECK_LAUNCH();
    const int64_t packs = shape.B * (g.T >> bits) * shape.num_heads() * (shape.D / 8);
    means_kernel1<<<(unsigned)ceil_div<int64_t>(packs, 256), 256, 0, stream>>>(pooled, qkv, shape, (int)bits);
    CUDA_CHECK_LAUNCH();
}

// ---- 2: the shipped kernel with twice the rows in flight and half the blocks on a multiprocessor
// ---------------------
template <int CHUNK, int MIN_BLOCKS>
static void pool2(bf16* pooled, const LighthouseScores& scores, const QkvHeads<const bf16>& qkv,
                  const LighthouseShape& shape, cudaStream_t stream) {
    launch_lighthouse_pool<CHUNK, MIN_BLOCKS>(
        {pooled, scores.tokens, scores.coarsest, qkv, shape, LighthouseLevels(shape.geometry), shape.H + shape.Hkv, {}},
        shape.num_heads(), stream);
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "norms, their maxima and means in three passes", pool1},
    {2, "one pass, 8 rows in flight, 2 blocks", pool2<8, 2>},
    {3, "4 rows, 4 blocks (llmc/lighthouse_pool.cuh)", lighthouse_pool},
};

// A row that is not a number has a score that is none, and counts as 0 for its window; no other score changes.
static void check_not_a_number(Harness& h, const Variant<Launcher>& variant) {
    const LighthouseCase c = {2, 512, 3, 2, 128, 2, 1, 80};
    const LighthouseShape shape = c.shape();
    const LighthouseGeometry& g = shape.geometry;
    const int64_t width = (int64_t)shape.num_heads() * c.D, windows = g.level_size(g.levels - 1),
                  window = c.T / windows;
    const std::vector<bf16> numbers = random_vector<bf16>(c.B * c.T * width, h.seed);
    std::vector<bf16> broken = numbers;
    auto break_row = [&](int64_t b, int64_t t, int head) {
        broken[(b * c.T + t) * width + head * c.D + 3] = __float2bfloat16(NAN);
    };
    break_row(0, 0, 0), break_row(0, 5, 1), break_row(1, c.T - 1, 0);
    for (int64_t t = 4 * window; t < 5 * window; ++t) {
        break_row(1, t, c.H);  // of k, a whole window
    }
    DeviceBuffer<bf16> qkv(broken), pooled(c.B * windows * width);
    DeviceBuffer<float> scores(c.B * (c.H + c.Hkv) * c.T), coarsest_scores(c.B * (c.H + c.Hkv) * windows);
    const auto scores_of = [&](const std::vector<bf16>& values) {
        qkv.upload(values);
        variant.launch(pooled, {scores, coarsest_scores}, packed_heads<const bf16>(qkv, c.T, shape), shape, h.stream);
        CUDA_CHECK(cudaStreamSynchronize(h.stream));
        return scores.download();
    };
    const std::vector<float> expected = scores_of(numbers), found = scores_of(broken);
    int num_broken = 0, num_changed = 0;
    for (size_t i = 0; i < found.size(); ++i) {
        num_broken += std::isnan(found[i]);
        num_changed += !std::isnan(found[i]) && found[i] != expected[i];
    }
    h.expect(
        num_broken == 3 + window && num_changed == 0, "scores", c.label() + " with NaN",
        format_string("%d of %lld not numbers, %d others changed", num_broken, (long long)(3 + window), num_changed));
    h.compare_exact("coarsest_scores", c.label() + " with NaN", coarsest_scores, window_maxima(found, g));
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    for (const LighthouseCase& c : lighthouse_cases(h)) {
        const LighthouseShape shape = c.shape();
        const LighthouseGeometry& g = shape.geometry;
        const int heads = shape.num_heads(), level = g.levels - 1;
        const int64_t windows = g.level_size(level), width = (int64_t)heads * c.D;
        for (const bool integers : {true, false}) {
            const std::vector<bf16> qkv =
                integers ? small_integers(c.B * c.T * width, h.seed) : random_vector<bf16>(c.B * c.T * width, h.seed);
            const std::string label = c.label() + (integers ? " integers" : " normals");
            std::vector<double> x = to_double(qkv), means(c.B * windows * width), norms;
            const reference::View<const double> all_heads(x.data(), c.T * width, width, c.D);
            std::vector<float> float_norms(c.B * (c.H + c.Hkv) * c.T);
            reference::lighthouse_norms<double>(float_norms.data(), all_heads, c.B, c.T, c.H + c.Hkv, c.D);
            norms = to_double(float_norms);
            std::vector<int32_t> coarsest(c.B * windows);  // entries as lighthouse_gather takes them: S = T / c
            LighthouseGeometry only_coarsest = g;
            only_coarsest.S = windows;
            for (int64_t i = 0; i < c.B * windows; ++i) {
                coarsest[i] = (int32_t)g.slot(level, i % windows);
            }
            reference::lighthouse_gather<double>({means.data(), windows * width, width, c.D}, all_heads,
                                                 coarsest.data(), c.B, heads, 1, c.D, only_coarsest);

            DeviceBuffer<bf16> qkv_device(qkv), pooled(means.size());
            DeviceBuffer<float> scores(norms.size()), coarsest_scores(c.B * (c.H + c.Hkv) * windows);
            const auto launch = [&] {
                variant.launch(pooled, {scores, coarsest_scores}, packed_heads<const bf16>(qkv_device, c.T, shape),
                               shape, h.stream);
            };
            launch();
            if (integers) {
                h.compare_exact("pooled", label, pooled, to_bf16(means));
                h.compare_exact("scores", label, scores, float_norms);
            } else {
                // Sums of up to 1024 in float32, then one rounding.
                h.compare("pooled", label, pooled, means, unit_roundoff<bf16>() + 1e-4, {c.B, windows, heads, c.D});
                h.compare("scores", label, scores, norms, 256 * unit_roundoff<float>(), {c.B, c.H + c.Hkv, c.T});
            }
            h.compare_exact("coarsest_scores", label, coarsest_scores, window_maxima(scores.download(), g));
            h.compare_repeats("pooled", label, pooled, launch);
            h.compare_repeats("scores", label, scores, launch);
        }
    }
    if (variant.number > 1) {
        check_not_a_number(h, variant);
    }
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    for (const LighthouseCase& c : LIGHTHOUSE_TIMED) {
        const LighthouseShape shape = c.shape();
        const int64_t width = (int64_t)shape.num_heads() * c.D;
        const int64_t windows = shape.geometry.level_size(shape.geometry.levels - 1);
        DeviceBuffer<bf16> qkv(c.B * c.T * width), pooled(c.B * windows * width);
        DeviceBuffer<float> scores(c.B * (c.H + c.Hkv) * c.T), coarsest_scores(scores.size() / c.T * windows);
        qkv.fill_random(h.seed);
        h.measure_bandwidth(c.label(), (double)(qkv.num_bytes() + pooled.num_bytes() + scores.num_bytes()),
                            variant.idea, [&] {
                                variant.launch(pooled, {scores, coarsest_scores},
                                               packed_heads<const bf16>(qkv, c.T, shape), shape, h.stream);
                            });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "lighthouse_pool", VARIANTS, check, measure); }
