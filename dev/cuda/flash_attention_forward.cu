// flash_attention_forward.cu: out = softmax(scale q k^T + mask) v. Bound: tensor cores, 4 Tq Tk D H operations (half of
// them when causal); exponentials come close at D = 64. On Hopper mma.sync stops at about 62 % of the tensor cores'
// rate: what is left above that is for wgmma.
#define LLMC_WATCHDOG  // a deadlock becomes an error
#include "flash_attention_cases.cuh"
#include "llmc/flash_attention.cuh"

struct Launcher {
    void (*launch)(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k,
                   HeadView<const bf16> v, const AttentionShape& shape, cudaStream_t stream);
    std::vector<int> head_dims;  // that it exists for; empty: all
    int64_t longest_to_time;     // sequences

    bool runs(const AttentionShape& s) const {
        return head_dims.empty() || std::find(head_dims.begin(), head_dims.end(), s.D) != head_dims.end();
    }
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

// ---- 7: wgmma and TMA, one thing after the other -----------------------------------------------
#ifdef LLMC_HOPPER
// Launch: CONSUMERS warpgroups, one block a tile, longest first; thread 0 loads, a stage at a time.
template <class Tile>
__global__ void __launch_bounds__(WARPGROUP_SIZE* Tile::CONSUMERS)
    flash_attention_forward_kernel7(const __grid_constant__ HopperForwardArguments args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int D = Tile::D, BLOCK_N = Tile::BLOCK_N;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<typename Tile::Shared*>(shared_bytes);
    const int warpgroup = threadIdx.x / WARPGROUP_SIZE, lane = threadIdx.x % WARP_SIZE;
    const uint32_t k_full = shared_address(&shared.k_full[0]), v_full = shared_address(&shared.v_full[0]);
    const uint32_t q_full = shared_address(&shared.q_full[0]), q = shared_address(shared.q[0][warpgroup]);
    const ForwardWork work = forward_work<Tile>(args.order.place(blockIdx.x), args);
    if (threadIdx.x == 0) {
        mbarrier_init(k_full, 1);
        mbarrier_init(v_full, 1);
        mbarrier_init(q_full, 1);
        mbarrier_init_fence();
        mbarrier_arrive_expect(q_full, Tile::BLOCK_M * D * sizeof(bf16));
        for (int consumer = 0; consumer < Tile::CONSUMERS; ++consumer) {
            tma_load(shared_address(shared.q[0][consumer]), &args.q, consumer_row(work, consumer, args), work.h, work.b,
                     q_full);
        }
    }
    __syncthreads();
    mbarrier_wait(q_full, 0);

    float out[D / 2] = {}, scores[BLOCK_N / 2], factor[2];
    uint32_t p[BLOCK_N / 16][4], parity = 0;
    SoftmaxRows rows;
    const int first_row = work.first_row + 64 * warpgroup + threadIdx.x / WARP_SIZE % 4 * 16 + lane / 4;
    for (int n = work.num_key_tiles - 1; n >= 0; --n, parity ^= 1) {
        if (threadIdx.x == 0) {
            const int key_head = work.h / args.heads_per_kv_head;
            mbarrier_arrive_expect(k_full, BLOCK_N * D * sizeof(bf16));
            tma_load(shared_address(shared.k[0]), &args.k, n * BLOCK_N, key_head, work.b, k_full);
            mbarrier_arrive_expect(v_full, BLOCK_N * D * sizeof(bf16));
            tma_load(shared_address(shared.v[0]), &args.v, n * BLOCK_N, key_head, work.b, v_full);
        }
        mbarrier_wait(k_full, parity);
        issue_scores<D, BLOCK_N>(scores, wgmma_descriptor_k_major(q),
                                 wgmma_descriptor_k_major(shared_address(shared.k[0])));
        wgmma_wait<0>();
        wgmma_pin(scores);
        const int limit = first_row + 1 + args.key_offset, first_column = n * BLOCK_N + lane % 4 * 2;
        mask_scores(scores, min(args.Tk, limit) - first_column, min(args.Tk, limit + 8) - first_column);
        softmax_tile<true, References::ANY>(scores, rows, factor, args.scale_log2, args.inverse_scale_log2, {});
        scale_rows(out, factor);
        round_to_operand(p, scores);
        mbarrier_wait(v_full, parity);
        issue_out<D, BLOCK_N>(out, p, wgmma_descriptor_mn_major(shared_address(shared.v[0]), BLOCK_N * 128));
        wgmma_wait<0>();
        wgmma_pin(out);
        __syncthreads();  // everybody has read k and v (and q)
    }
    finish_rows<D>(out, row_totals(rows), args.scale_log2, q, args.lse + ((int64_t)work.b * args.H + work.h) * args.Tq,
                   first_row, args.Tq);
    named_barrier_sync(CONSUMER_BARRIER + warpgroup, WARPGROUP_SIZE);
    if (threadIdx.x % WARPGROUP_SIZE == 0) {
        tma_store(&args.out, q, consumer_row(work, warpgroup, args), work.h, work.b);
        bulk_commit();
        bulk_wait_read<0>();
    }
#endif
}
template <class Tile>
static void launch_forward7(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k,
                            HeadView<const bf16> v, const AttentionShape& shape, cudaStream_t stream) {
    const HopperForwardArguments args = hopper_forward_arguments<Tile>(out, lse, q, k, v, shape);
    const auto kernel = flash_attention_forward_kernel7<Tile>;
    constexpr int num_bytes = (int)sizeof(typename Tile::Shared);
    allow_dynamic_shared_bytes(kernel, num_bytes);
    kernel<<<args.order.num_tiles * args.order.num_heads, WARPGROUP_SIZE * Tile::CONSUMERS, num_bytes, stream>>>(args);
    CUDA_CHECK_LAUNCH();
}
static void flash_attention_forward7(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k,
                                     HeadView<const bf16> v, const AttentionShape& shape, cudaStream_t stream) {
    if (shape.D == 64) {
        launch_forward7<HopperForwardTile<64, 2, 128, 1>>(out, lse, q, k, v, shape, stream);
    } else {
        launch_forward7<HopperForwardTile<128, 2, 128, 1>>(out, lse, q, k, v, shape, stream);
    }
}

// ---- the Hopper kernel, an idea at a time ------------------------------------------------------
template <class Tile>
struct Overlapped : Tile {  // a loading warpgroup, scores of the next key tile under the softmax of this one
    static constexpr bool PING_PONG = false, PERSISTENT = false;
    static constexpr References REFERENCES = References::ANY;
};
template <class Tile>
struct InTurn : Overlapped<Tile> {
    static constexpr bool PING_PONG = true;
};
template <class Tile>
struct Persistent : InTurn<Tile> {
    static constexpr bool PERSISTENT = true;
};
template <class Tile>
struct OneBlockATile : Tile {
    static constexpr bool PERSISTENT = false;
};
template <class Tile>
struct NoTurns : Tile {
    static constexpr bool PING_PONG = false;
};
template <class Tile64, class Tile128>
static void hopper_forward(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k,
                           HeadView<const bf16> v, const AttentionShape& shape, cudaStream_t stream) {
    if (shape.D == 64) {
        hopper_launch_forward<Tile64>(out, lse, q, k, v, shape, stream);
    } else {
        hopper_launch_forward<Tile128>(out, lse, q, k, v, shape, stream);
    }
}
using Tile64 = HopperForwardTile<64, 3, 128, 2>;
using Tile64Short = HopperForwardTile<64, 1, 64, 3, 3>;
using Tile128 = HopperForwardTile<128, 2, 128, 2>;
template <int BLOCK_N>
using Tile128Registers = HopperForwardTile<128, 2, BLOCK_N, 2, 1, QueryOperand::REGISTERS>;
using Tile64ThreeTurns = HopperForwardTile<64, 3, 64, 6, 1, QueryOperand::SHARED, 3>;
using Tile128ThreeTurns = HopperForwardTile<128, 3, 64, 6, 1, QueryOperand::SHARED, 3>;
#endif

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one warp a query row, one key at a time, float32", {flash_attention_forward1, {}, 1024}},
    {2, "mma.sync, 16 query rows a warp, 64 keys", {flash_attention_forward_tile<1, 64, 1>, {64, 128}, 32768}},
    {3,
     "32 query rows a warp: a fragment of k or v feeds two products",
     {flash_attention_forward_tile<2, 32, 1>, {64, 128}, 32768}},
    {4, "two stages of k and v, one barrier a tile", {flash_attention_forward_tile<2, 32, 2>, {64, 128}, 32768}},
    {5, "48 keys", {flash_attention_forward_tile<2, 48, 2>, {64, 128}, 32768}},
    {6,
     "the best of these for each D (llmc/flash_attention_mma_forward.cuh)",
     {flash_attention_mma_forward, {}, 131072}},
#ifdef LLMC_HOPPER
    {7, "wgmma and TMA, one thing after the other", {flash_attention_forward7, {64, 128}, 131072}},
    {8,
     "a loading warpgroup, two stages, scores of the next keys under the softmax of these",
     {hopper_forward<Overlapped<Tile64>, Overlapped<Tile128>>, {64, 128}, 131072}},
    {9, "consumers issue in turn", {hopper_forward<InTurn<Tile64>, InTurn<Tile128>>, {64, 128}, 131072}},
    {10,
     "persistent blocks, tiles dealt to and fro",
     {hopper_forward<Persistent<Tile64>, Persistent<Tile128>>, {64, 128}, 131072}},
    {11, "rescale only for scores that weigh much in their row", {hopper_forward<Tile64, Tile128>, {64, 128}, 524288}},
    {12,
     "the same, one block a tile",
     {hopper_forward<OneBlockATile<Tile64>, OneBlockATile<Tile128>>, {64, 128}, 524288}},
    {13,
     "D 128: 160 keys; D 64: two consumers, four stages",
     {hopper_forward<HopperForwardTile<64, 2, 128, 4>, HopperForwardTile<128, 2, 160, 2>>, {64, 128}, 131072}},
    {14, "D 64: four stages", {hopper_forward<HopperForwardTile<64, 3, 128, 4>, Tile128>, {64, 128}, 131072}},
    {15, "11 without turns", {hopper_forward<NoTurns<Tile64>, NoTurns<Tile128>>, {64, 128}, 131072}},
    {16, "D 64: one consumer, 64 keys, three blocks an SM", {hopper_launch_forward<Tile64Short>, {64}, 131072}},
    {17, "the same, one block a tile", {hopper_launch_forward<OneBlockATile<Tile64Short>>, {64}, 131072}},
    {18, "D 128: 11, queries in registers", {hopper_launch_forward<Tile128Registers<128>>, {128}, 524288}},
    {19, "the same with 144 keys", {hopper_launch_forward<Tile128Registers<144>>, {128}, 131072}},
    {20,
     "D 128: three consumers, 80 keys; D 64: four, 64 keys, no turns",
     {hopper_forward<HopperForwardTile64Long, HopperForwardTile128Long>, {64, 128}, 524288}},
    {21,
     "two consumers take the key tiles of 64 rows in turn, D 64: 48 keys, two blocks an SM",
     {hopper_forward<HopperForwardTile64Few, HopperForwardTile128Few>, {64, 128}, 131072}},
    {22, "three, 64 keys", {hopper_forward<Tile64ThreeTurns, Tile128ThreeTurns>, {64, 128}, 131072}},
#endif
    {23, "what this GPU gets (llmc/flash_attention.cuh)", {flash_attention_forward, {}, 524288}},
};

static void check_case(Harness& h, const Variant<Launcher>& variant, const PreparedCase& c, const std::string& label) {
    const AttentionShape& s = c.shape();
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

static void check(Harness& h, const Variant<Launcher>& variant) {
    if (variant.number == VARIANTS.front().number) {
        check_attention_truth(h);
    }
    const bool ships = variant.number == VARIANTS.back().number;
    static const std::vector<PreparedCase> cases = prepare_cases(h, forward_attention_cases());
    for (const PreparedCase& c : cases) {
        // With --small what does not ship gets two tiles of queries, of which the second has one, and few keys.
        const bool is_for_all = c.shape().Tq == 129 && c.shape().Tk < 1000;
        if (!variant.launch.runs(c.shape()) || (h.small && !ships && !is_for_all)) {
            continue;
        }
        check_case(h, variant, c, c.attention_case.label());
        if (ships && FewMultiprocessors::concern(c.shape())) {
            const FewMultiprocessors few;
            check_case(h, variant, c, c.attention_case.label() + few.LABEL);
        }
    }
}

// Beside the shapes that the backward is timed at too, those where tiles for short sequences at D = 64 must show what
// they are worth, and where they end.
static std::vector<AttentionShape> timings() {
    std::vector<AttentionShape> shapes = attention_timings();
    const int64_t sizes[][3] = {{64, 12, 1024}, {1, 16, 1024}, {32, 8, 512},
                                {8, 12, 2048},  {1, 16, 2048}, {8, 12, 4096}};
    for (const auto& [B, H, T] : sizes) {
        shapes.push_back({(int)B, (int)H, (int)H, 64, T, T, 0.125f, true, 0});
    }
    return shapes;
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    for (const AttentionShape& s : timings()) {
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
