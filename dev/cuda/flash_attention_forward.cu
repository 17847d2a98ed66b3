// flash_attention_forward.cu: out = softmax(scale q k^T + mask) v. Bound: tensor cores, 4 Tq Tk D H operations (half of
// them when causal); exponentials come close at D = 64. On Hopper mma.sync stops at about 62 % of the tensor cores'
// rate: what is left above that is for wgmma.
#include "flash_attention_cases.cuh"
#include "llmc/flash_attention.cuh"

struct Launcher {
    void (*launch)(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k,
                   HeadView<const bf16> v, const AttentionShape& shape, cudaStream_t stream);
    bool only_64_and_128;     // head dims it exists for
    int64_t longest_to_time;  // sequences

    bool runs(const AttentionShape& s) const { return !only_64_and_128 || s.D == 64 || s.D == 128; }
};

// ---- 1: one warp a query row, one key at a time ------------------------------------------------
// Launch: one warp a row of a head, flat grid.
__global__ void flash_attention_forward_kernel1(MmaForwardArguments args, int64_t num_rows) {
    constexpr int MAX_PER_LANE = 256 / WARP_SIZE;
    const int64_t row = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;
    if (row >= num_rows) {
        return;
    }
    const int64_t head = row / args.Tq, t = row % args.Tq, b = head / args.H, h = head % args.H;
    const bf16* q = args.q.row(b, t, h);
    float sums[MAX_PER_LANE] = {};
    float maximum = -INFINITY, denominator = 0.0f;
    const int64_t end = min(args.Tk, t + 1 + args.key_offset);
    for (int64_t j = 0; j < end; ++j) {
        const bf16* k = args.k.row(b, j, h / args.heads_per_kv_head);
        const bf16* v = args.v.row(b, j, h / args.heads_per_kv_head);
        float score = 0.0f;
        for (int d = lane; d < args.D; d += WARP_SIZE) {
            score += __bfloat162float(q[d]) * __bfloat162float(k[d]);
        }
        score = warp_sum(score) * args.scale_log2;
        const float new_maximum = fmaxf(maximum, score);
        const float factor = exp2f(maximum - new_maximum), p = exp2f(score - new_maximum);
        maximum = new_maximum;
        denominator = denominator * factor + p;
#pragma unroll
        for (int i = 0; i < MAX_PER_LANE; ++i) {
            const int d = lane + i * WARP_SIZE;
            sums[i] = sums[i] * factor + (d < args.D ? p * __bfloat162float(v[d]) : 0.0f);
        }
    }
#pragma unroll
    for (int i = 0; i < MAX_PER_LANE; ++i) {
        const int d = lane + i * WARP_SIZE;
        if (d < args.D) {
            args.out.row(b, t, h)[d] = __float2bfloat16(end > 0 ? sums[i] / denominator : 0.0f);
        }
    }
    if (lane == 0) {
        args.lse[row] = end > 0 ? (maximum + log2f(denominator)) * LN_2 : -INFINITY;
    }
}
static void flash_attention_forward1(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k,
                                     HeadView<const bf16> v, const AttentionShape& shape, cudaStream_t stream) {
    const int64_t num_rows = (int64_t)shape.B * shape.H * shape.Tq;
    flash_attention_forward_kernel1<<<ceil_div<int64_t>(num_rows, 8), 256, 0, stream>>>(
        mma_forward_arguments(out, lse, q, k, v, shape), num_rows);
    CUDA_CHECK_LAUNCH();
}

// ---- other tiles of the mma.sync kernel --------------------------------------------------------
template <int M_TILES, int BLOCK_N, int STAGES>
static void flash_attention_forward_tile(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k,
                                         HeadView<const bf16> v, const AttentionShape& shape, cudaStream_t stream) {
    const MmaForwardArguments args = mma_forward_arguments(out, lse, q, k, v, shape);
    if (shape.D == 64) {
        mma_launch_forward<MmaForwardTile<64, M_TILES, BLOCK_N, STAGES>>(args, shape, stream);
    } else {
        mma_launch_forward<MmaForwardTile<128, M_TILES, BLOCK_N, STAGES>>(args, shape, stream);
    }
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one warp a query row, one key at a time, float32", {flash_attention_forward1, false, 1024}},
    {2, "mma.sync, 16 query rows a warp, 64 keys", {flash_attention_forward_tile<1, 64, 1>, true, 32768}},
    {3,
     "32 query rows a warp: a fragment of k or v feeds two products",
     {flash_attention_forward_tile<2, 32, 1>, true, 32768}},
    {4, "two stages of k and v, one barrier a tile", {flash_attention_forward_tile<2, 32, 2>, true, 32768}},
    {5, "48 keys", {flash_attention_forward_tile<2, 48, 2>, true, 32768}},
    {6, "the best of these for each D (llmc/flash_attention_mma.cuh)", {flash_attention_mma_forward, false, 131072}},
    {7, "what this GPU gets (llmc/flash_attention.cuh)", {flash_attention_forward, false, 131072}},
};

static void check(Harness& h, const Variant<Launcher>& variant) {
    for (const PreparedCase& c : prepared_cases(h.seed)) {
        const AttentionShape& s = c.shape();
        if (!variant.launch.runs(s)) {
            continue;
        }
        const std::string label = c.attention_case.label();
        DeviceBuffer<bf16> out(padded_elements(s));
        DeviceBuffer<float> lse((int64_t)s.B * s.H * s.Tq);
        const PackedViews in = c.operands();
        auto launch = [&] { variant.launch.launch(padded_view(out, s), lse, in.q, in.k, in.v, s, h.stream); };
        launch();
        CUDA_CHECK(cudaStreamSynchronize(h.stream));
        const std::vector<bf16> buffer = out.download();
        std::vector<char> read(buffer.size(), 0);
        const std::vector<bf16> values = read_view(buffer, out, padded_view(out, s), s.B, s.Tq, s.H, s.D, &read);
        const double floor = root_mean_square(c.exact.out);
        h.compare("out", label, values, c.exact.out, c.limit(c.exact.out, c.rounded.out, floor), {s.B, s.Tq, s.H, s.D},
                  floor);
        if (!out.guards_intact() || !rest_untouched(buffer, read)) {
            h.expect(false, "out", label, "stray write");
        }
        // float32: a few roundings of the largest score and of the sum.
        h.compare("lse", label, lse, c.exact.lse, 0x1p-21 * (4.0 + c.max_score), {s.B, s.H, s.Tq}, 1.0);
        h.compare_repeats("out", label, out, launch, s.Tk == 1000 ? 50 : 2);
    }
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    for (const AttentionShape& s : attention_timings()) {
        if (!variant.launch.runs(s) || s.Tq > variant.launch.longest_to_time) {
            continue;
        }
        DeviceBuffer<bf16> qkv(packed_elements(s)), out(s.B * s.Tq * s.H * s.D);
        DeviceBuffer<float> lse((int64_t)s.B * s.H * s.Tq);
        qkv.fill_random(h.seed);
        const PackedViews in = packed_views(qkv, s);
        const HeadView<bf16> out_view(out, s.Tq * s.H * s.D, (int64_t)s.H * s.D, s.D);
        h.measure_flops(format_string("B%d T%lld H%d D%d causal", s.B, (long long)s.Tq, s.H, s.D), attention_flops(s),
                        peak_bf16_tflops(), variant.idea,
                        [&] { variant.launch.launch(out_view, lse, in.q, in.k, in.v, s, h.stream); });
    }
}

int main(int argc, char** argv) {
    return run_variants(argc, argv, "flash_attention_forward", VARIANTS, check, measure);
}
