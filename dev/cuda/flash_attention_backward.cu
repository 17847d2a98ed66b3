// flash_attention_backward.cu: dq, dk, dv of attention from dout, out and lse. Bound: tensor cores, 10 Tq Tk D H
// operations (half of them when causal); shared memory comes close, because five products read their operands from it.
#define LLMC_WATCHDOG  // a deadlock becomes an error
#include "dev/cuda/rope_cases.cuh"
#include "flash_attention_cases.cuh"
#include "llmc/flash_attention.cuh"

// What sets a variant apart, for what it is launched on and what is checked of it.
enum Trait : unsigned {
    ONLY_64_AND_128 = 1,  // head dims it exists for
    ONLY_HOPPER = 2,      // and these of a GPU
    DQ_REPEATS = 4,       // the same bits every launch
    KEY_SUMS_VARY = 8,    // of dk and dv not
    TAKES_FLOAT32 = 16,   // views of dk and dv
    TURNS_BACK = 32,      // dq and dk, by the rotation it is given
    SHIPS = 64,           // trained with: checked as on a GPU of few multiprocessors too, and more of it with --small
};
struct Launcher {
    void (*launch)(const AttentionBackwardOperands& x, const AttentionShape& shape, cudaStream_t stream);
    size_t (*scratch_bytes)(const AttentionShape& shape);
    int64_t longest_to_time;  // sequences
    unsigned traits = 0;

    bool has(Trait trait) const { return (traits & trait) != 0; }
    bool runs(const AttentionShape& s) const {
        return (!has(ONLY_64_AND_128) || s.D == 64 || s.D == 128) &&
               (!has(ONLY_HOPPER) || flash_attention_is_hopper(s)) && (!has(TURNS_BACK) || s.Tq == s.Tk);
    }
};

// Turns dq and dk, heads of packed rows, back by the rotation that x has.
static void turn_back_packed(const AttentionBackwardOperands& x, const AttentionShape& shape, cudaStream_t stream) {
    rope_backward(x.dq.data, shape.B * shape.Tq, shape.H + shape.Hkv, (int)x.dq.stride_t, shape.D,
                  x.rotation->frequencies, x.rotation->positions, stream);
}

// ---- 1: one warp a row of dq, then one warp a row of dk and dv ---------------------------------
// P and dS of a query row and a key row: the lanes share the columns.
__device__ static float2 p_and_ds(const MmaBackwardArguments& args, const bf16* q, const bf16* k, const bf16* v,
                                  const bf16* dout, float2 statistics) {
    float score = 0.0f, dp = 0.0f;
    for (int d = threadIdx.x % WARP_SIZE; d < args.D; d += WARP_SIZE) {
        score += __bfloat162float(q[d]) * __bfloat162float(k[d]);
        dp += __bfloat162float(dout[d]) * __bfloat162float(v[d]);
    }
    const float p = exp2f(warp_sum(score) * args.scale_log2 - statistics.x);
    return make_float2(p, p * (warp_sum(dp) - statistics.y));
}
// Launch: one warp a query row of a head, flat grid.
__global__ void flash_attention_backward_dq_kernel1(MmaBackwardArguments args, int64_t num_rows) {
    constexpr int MAX_PER_LANE = 256 / WARP_SIZE;
    const int64_t row = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP_SIZE;
    if (row >= num_rows) {
        return;
    }
    const int64_t head = row / args.Tq, t = row % args.Tq, b = head / args.H, h = head % args.H;
    float dq[MAX_PER_LANE] = {};
    for (int64_t j = 0; j < min(args.Tk, t + 1 + args.key_offset); ++j) {
        const bf16* k = args.k.row(b, j, h / args.heads_per_kv_head);
        const float ds = p_and_ds(args, args.q.row(b, t, h), k, args.v.row(b, j, h / args.heads_per_kv_head),
                                  args.dout.row(b, t, h), args.row_statistics[row])
                             .y;
#pragma unroll
        for (int i = 0; i < MAX_PER_LANE; ++i) {
            const int d = threadIdx.x % WARP_SIZE + i * WARP_SIZE;
            dq[i] += d < args.D ? ds * __bfloat162float(k[d]) : 0.0f;
        }
    }
#pragma unroll
    for (int i = 0; i < MAX_PER_LANE; ++i) {
        const int d = threadIdx.x % WARP_SIZE + i * WARP_SIZE;
        if (d < args.D) {
            args.dq.row(b, t, h)[d] = __float2bfloat16(args.scale * dq[i]);
        }
    }
}
// Launch: one warp a key row of a kv head, flat grid.
__global__ void flash_attention_backward_dkv_kernel1(MmaBackwardArguments args, int64_t num_rows) {
    constexpr int MAX_PER_LANE = 256 / WARP_SIZE;
    const int64_t row = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP_SIZE;
    if (row >= num_rows) {
        return;
    }
    const int num_kv_heads = args.H / args.heads_per_kv_head;
    const int64_t head = row / args.Tk, j = row % args.Tk, b = head / num_kv_heads, kv_head = head % num_kv_heads;
    float dk[MAX_PER_LANE] = {}, dv[MAX_PER_LANE] = {};
    for (int64_t h = kv_head * args.heads_per_kv_head; h < (kv_head + 1) * args.heads_per_kv_head; ++h) {
        for (int64_t t = max((int64_t)0, j - args.key_offset); t < args.Tq; ++t) {
            const bf16 *q = args.q.row(b, t, h), *dout = args.dout.row(b, t, h);
            const float2 p_ds = p_and_ds(args, q, args.k.row(b, j, kv_head), args.v.row(b, j, kv_head), dout,
                                         args.row_statistics[(b * args.H + h) * args.Tq + t]);
#pragma unroll
            for (int i = 0; i < MAX_PER_LANE; ++i) {
                const int d = threadIdx.x % WARP_SIZE + i * WARP_SIZE;
                dk[i] += d < args.D ? p_ds.y * __bfloat162float(q[d]) : 0.0f;
                dv[i] += d < args.D ? p_ds.x * __bfloat162float(dout[d]) : 0.0f;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < MAX_PER_LANE; ++i) {
        const int d = threadIdx.x % WARP_SIZE + i * WARP_SIZE;
        if (d < args.D) {
            args.dk.row(b, j, kv_head)[d] = __float2bfloat16(args.scale * dk[i]);
            args.dv.row(b, j, kv_head)[d] = __float2bfloat16(dv[i]);
        }
    }
}
static MmaBackwardArguments begin_backward(const AttentionBackwardOperands& x, const AttentionShape& shape,
                                           bool deterministic, cudaStream_t stream) {
    return mma_begin_backward(x.dq, x.dk, x.dv, x.dout, x.q, x.k, x.v, x.out, x.lse, x.scratch, shape, deterministic,
                              stream);
}
static void flash_attention_backward1(const AttentionBackwardOperands& x, const AttentionShape& shape,
                                      cudaStream_t stream) {
    const MmaBackwardArguments args = begin_backward(x, shape, true, stream);
    const int64_t num_rows = (int64_t)shape.B * shape.H * shape.Tq;
    const int64_t num_key_rows = (int64_t)shape.B * shape.Hkv * shape.Tk;
    flash_attention_backward_dq_kernel1<<<ceil_div<int64_t>(num_rows, 8), 256, 0, stream>>>(args, num_rows);
    CUDA_CHECK_LAUNCH();
    flash_attention_backward_dkv_kernel1<<<ceil_div<int64_t>(num_key_rows, 8), 256, 0, stream>>>(args, num_key_rows);
    CUDA_CHECK_LAUNCH();
}

// ---- other tiles of the mma.sync kernel --------------------------------------------------------
template <class Tile64, class Tile128>
static void flash_attention_backward_tile(const AttentionBackwardOperands& x, const AttentionShape& shape,
                                          cudaStream_t stream) {
    const MmaBackwardArguments args = begin_backward(x, shape, false, stream);
    if (shape.D == 64) {
        mma_launch_backward<Tile64>(args, shape, stream);
    } else {
        mma_launch_backward<Tile128>(args, shape, stream);
    }
    mma_finish_dq(args, shape, stream);
}

#ifdef LLMC_HOPPER
// ---- 7: wgmma and TMA, nothing overlaps --------------------------------------------------------
// Two warpgroups; thread 0 loads a tile when all are done with the one before; P and dS go through shared memory, so
// that every operand of every product is there; dq is added from registers.
// Launch: as flash_attention_hopper_backward_kernel, 256 threads.
template <class Tile>
__global__ void __launch_bounds__(Tile::CONSUMERS* WARPGROUP_SIZE, 1)
    flash_attention_backward_kernel7(const __grid_constant__ HopperBackwardArguments args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int D = Tile::D, BLOCK_M = Tile::BLOCK_M;
    extern __shared__ __align__(1024) unsigned char hopper_backward_shared[];
    typename Tile::Shared& shared = *reinterpret_cast<typename Tile::Shared*>(hopper_backward_shared);
    const uint32_t full = shared_address(&shared.kv_full);
    if (threadIdx.x == 0) {
        find_key_block<Tile>(shared.block[0], args, blockIdx.x);
        mbarrier_init(full, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    const KeyBlock& block = shared.block[0];
    const int warpgroup = threadIdx.x / WARPGROUP_SIZE, thread = threadIdx.x % WARPGROUP_SIZE;
    const uint32_t k = shared_address(shared.k), v = shared_address(shared.v);
    const uint32_t q = shared_address(shared.q[0]), dout = shared_address(shared.dout[0]);
    const uint32_t p_tile = shared_address(shared.ds[0]), ds_tile = shared_address(shared.ds[1]);
    uint32_t parity = 0;
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(full, sizeof(shared.k) + sizeof(shared.v));
        tma_load(k, &args.k, block.first_key, block.kv_head, block.b, full);
        tma_load(v, &args.v, block.first_key, block.kv_head, block.b, full);
    }
    mbarrier_wait(full, parity);
    parity ^= 1;
    float dk[D / 2] = {}, dv[D / 2] = {};
    for (int h = block.kv_head * args.heads_per_kv_head; h < (block.kv_head + 1) * args.heads_per_kv_head; ++h) {
        const int64_t first_tile = ((int64_t)block.b * args.H + h) * args.num_query_tiles;
        for (int tile = block.first_tile; tile < block.end_tile; ++tile) {
            __syncthreads();
            if (threadIdx.x == 0) {
                mbarrier_arrive_expect(full,
                                       sizeof(shared.q[0]) + sizeof(shared.dout[0]) + sizeof(shared.statistics[0]));
                tma_load(q, &args.q, tile * BLOCK_M, h, block.b, full);
                tma_load(dout, &args.dout, tile * BLOCK_M, h, block.b, full);
                bulk_load(shared_address(&shared.statistics[0]),
                          static_cast<const typename Tile::Statistics*>(args.statistics) + first_tile + tile,
                          sizeof(shared.statistics[0]), full);
            }
            mbarrier_wait(full, parity);
            parity ^= 1;
            float p[BLOCK_M / 2], dp[BLOCK_M / 2];
            wgmma_fence();
            start_scores<Tile, FirstStep::ZERO>(p, RowFragments<0>(), k + warpgroup * (64 * 128), q);
            start_scores<Tile, FirstStep::ZERO>(dp, RowFragments<0>(), v + warpgroup * (64 * 128), dout);
            wgmma_wait<0>();
            wgmma_pin(p);
            wgmma_pin(dp);
            mask_key_rows<Tile>(p, args, block.first_key + 64 * warpgroup, tile * BLOCK_M);
            float2 lse[BLOCK_M / 8], delta[BLOCK_M / 8];
            read_statistics(lse, shared.statistics[0].lse);
            read_statistics(delta, shared.statistics[0].delta);
            exponentiate(p, lse, args.scale_log2);
            differentiate(dp, p, delta);
            uint32_t operand[BLOCK_M / 16][4];
            round_to_operand(operand, p);
            store_transposed<Tile>(p_tile, operand, warpgroup);
            round_to_operand(operand, dp);
            store_transposed<Tile>(ds_tile, operand, warpgroup);
            fence_async_shared();
            __syncthreads();

            // P^T and dS^T: operands whose rows, the keys, are contiguous in memory.
            const uint64_t p_start = wgmma_descriptor_mn_major(p_tile + warpgroup * (BLOCK_M * 128), BLOCK_M * 128);
            const uint64_t ds_start = wgmma_descriptor_mn_major(ds_tile + warpgroup * (BLOCK_M * 128), BLOCK_M * 128);
            const uint64_t q_start = wgmma_descriptor_mn_major(q, BLOCK_M * 128);
            const uint64_t dout_start = wgmma_descriptor_mn_major(dout, BLOCK_M * 128);
            float dq[Tile::DQ_ELEMENTS / WARPGROUP_SIZE];
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < BLOCK_M / 16; ++step) {
                wgmma<1, 1>(dv, wgmma_advance(p_start, step * 2048), wgmma_advance(dout_start, step * 2048));
                wgmma<1, 1>(dk, wgmma_advance(ds_start, step * 2048), wgmma_advance(q_start, step * 2048));
            }
            start_dq<Tile>(dq, ds_tile, k, warpgroup);
            wgmma_wait<0>();
            wgmma_pin(dk);
            wgmma_pin(dv);
            wgmma_pin(dq);
            float* part = args.dq_accumulator +
                          ((first_tile + tile) * Tile::CONSUMERS + warpgroup) * Tile::DQ_ELEMENTS + 4 * thread;
#pragma unroll
            for (int i = 0; i < Tile::DQ_ELEMENTS / WARPGROUP_SIZE / 4; ++i) {
                red_add_f32x4(part + i * 4 * WARPGROUP_SIZE,
                              make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]));
            }
        }
    }
    __syncthreads();  // nobody reads k and v any more
    const uint32_t dk_tile = k + warpgroup * (64 * D * 2), dv_tile = v + warpgroup * (64 * D * 2);
    store_key_gradient<Tile>(dk_tile, dk, args.scale);
    store_key_gradient<Tile>(dv_tile, dv, 1.0f);
    fence_async_shared();
    __syncthreads();
    if (thread == 0) {
        tma_store(&args.dk, dk_tile, block.first_key + 64 * warpgroup, block.kv_head, block.b);
        tma_store(&args.dv, dv_tile, block.first_key + 64 * warpgroup, block.kv_head, block.b);
        bulk_commit();
        bulk_wait<0>();
    }
#endif
}
template <int D>
static void launch_kernel7(const AttentionBackwardOperands& x, const AttentionShape& shape, cudaStream_t stream) {
    using Tile = HopperBackwardTile<D, false, DvStart::AFTER_DS, 1, 0, DeltaTerm::SUBTRACTED>;
    const HopperBackwardArguments args =
        hopper_begin_backward<Tile>(x, shape, BackwardBlocks::ONE_AN_ITEM, KeySums::IN_A_BLOCK, stream);
    // Every part of dq is added here.
    const int64_t num_tiles = (int64_t)shape.B * shape.H * args.num_query_tiles;
    CUDA_CHECK(cudaMemsetAsync(args.dq_accumulator, 0, num_tiles * Tile::BLOCK_M * D * sizeof(float), stream));
    constexpr int SHARED_BYTES = sizeof(typename Tile::Shared);
    const auto kernel = flash_attention_backward_kernel7<Tile>;
    allow_dynamic_shared_bytes(kernel, SHARED_BYTES);
    kernel<<<args.num_blocks, Tile::CONSUMERS * WARPGROUP_SIZE, SHARED_BYTES, stream>>>(args);
    CUDA_CHECK_LAUNCH();
    hopper_finish_backward<Tile>(x, args, shape, stream);
}
static void flash_attention_backward7(const AttentionBackwardOperands& x, const AttentionShape& shape,
                                      cudaStream_t stream) {
    shape.D == 64 ? launch_kernel7<64>(x, shape, stream) : launch_kernel7<128>(x, shape, stream);
}

// ---- 8 and up: specialised warps (llmc/flash_attention_hopper_backward.cuh) --------------------
// V_STEPS: at D = 128.
template <DvStart DV_START, int TILES_A_TURN, int V_STEPS = 0, BackwardBlocks blocks = BackwardBlocks::ONE_AN_ITEM>
static void flash_attention_backward_wgmma(const AttentionBackwardOperands& x, const AttentionShape& shape,
                                           cudaStream_t stream) {
    auto launch = [&](auto tile) {
        hopper_launch_backward<decltype(tile)>(x, shape, blocks, KeySums::IN_A_BLOCK, stream);
    };
    if (shape.D == 64) {
        launch(HopperBackwardTile<64, false, DV_START, TILES_A_TURN, 0, DeltaTerm::SUBTRACTED>());
    } else {
        launch(HopperBackwardTile<128, false, DV_START, TILES_A_TURN, V_STEPS, DeltaTerm::SUBTRACTED>());
    }
}
// dk and dv of every query head added in memory; dq and dk turned back where the positions allow it, else by a pass.
static void flash_attention_backward_in_memory(const AttentionBackwardOperands& x, const AttentionShape& shape,
                                               cudaStream_t stream) {
    AttentionBackwardOperands operands = x;
    const bool fused = x.rotation == nullptr || rope_table_fits(x.rotation->positions);
    operands.rotation = fused ? x.rotation : nullptr;
    auto launch = [&](auto tile) {
        hopper_launch_backward<decltype(tile)>(operands, shape, BackwardBlocks::ONE_AN_ITEM, KeySums::IN_MEMORY,
                                               stream);
    };
    shape.D == 64 ? launch(HopperBackwardTile<64>()) : launch(HopperBackwardTile<128>());
    if (!fused) {
        turn_back_packed(x, shape, stream);
    }
}
template <KeySums key_sums = KeySums::IN_A_BLOCK, bool turns_back = false>
static size_t hopper_scratch(const AttentionShape& shape) {
    return flash_attention_hopper_backward_scratch_bytes(shape, false, turns_back, key_sums);
}
#endif

// ---- what ships --------------------------------------------------------------------------------
template <bool deterministic>
static void flash_attention_backward_mma(const AttentionBackwardOperands& x, const AttentionShape& shape,
                                         cudaStream_t stream) {
    flash_attention_mma_backward(x.dq, x.dk, x.dv, x.dout, x.q, x.k, x.v, x.out, x.lse, x.scratch, shape, deterministic,
                                 stream);
}
template <bool deterministic>
static size_t mma_scratch(const AttentionShape& shape) {
    return flash_attention_mma_backward_scratch_bytes(shape, deterministic);
}
template <bool deterministic>
static void flash_attention_backward_chosen(const AttentionBackwardOperands& x, const AttentionShape& shape,
                                            cudaStream_t stream) {
    flash_attention_backward(x.dq, x.dk, x.dv, x.dout, x.q, x.k, x.v, x.out, x.lse, x.scratch, shape, deterministic,
                             stream, x.rotation);
}
template <bool deterministic, bool turns_back = false>
static size_t chosen_scratch(const AttentionShape& shape) {
    return flash_attention_backward_scratch_bytes(shape, deterministic, turns_back);
}
static void flash_attention_backward_then_rope(const AttentionBackwardOperands& x, const AttentionShape& shape,
                                               cudaStream_t stream) {
    flash_attention_backward(x.dq, x.dk, x.dv, x.dout, x.q, x.k, x.v, x.out, x.lse, x.scratch, shape, false, stream);
    turn_back_packed(x, shape, stream);
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1,
     "one warp a row of dq, then one a row of dk and dv, float32",
     {flash_attention_backward1, mma_scratch<true>, 1024, DQ_REPEATS}},
    {2,
     "mma.sync, 64 keys a block of 4 warps, 32 queries",
     {flash_attention_backward_tile<MmaBackwardTile<64, 4, 1, 32>, MmaBackwardTile<128, 4, 1, 32>>, mma_scratch<false>,
      32768, ONLY_64_AND_128}},
    {3,
     "64 queries at a time",
     {flash_attention_backward_tile<MmaBackwardTile<64, 4, 1, 64>, MmaBackwardTile<128, 4, 1, 64>>, mma_scratch<false>,
      32768, ONLY_64_AND_128}},
    {4,
     "128 keys a block of 8 warps: half the additions to dq",
     {flash_attention_backward_tile<MmaBackwardTile<64, 8, 1, 64>, MmaBackwardTile<128, 8, 1, 64>>, mma_scratch<false>,
      32768, ONLY_64_AND_128}},
    {5,
     "the best of these for each D (llmc/flash_attention_mma_backward.cuh)",
     {flash_attention_backward_mma<false>, mma_scratch<false>, 131072, TAKES_FLOAT32 | SHIPS}},
    {6,
     "the same, deterministic: dq by a second kernel that owns query rows",
     {flash_attention_backward_mma<true>, mma_scratch<true>, 131072, TAKES_FLOAT32 | DQ_REPEATS | SHIPS}},
#ifdef LLMC_HOPPER
    {7,
     "wgmma and TMA, every operand in shared memory, nothing overlaps",
     {flash_attention_backward7, hopper_scratch<>, 32768, ONLY_HOPPER}},
    {8,
     "producer and writer warps, P and dS in registers, two tiles in flight, masked tiles apart",
     {flash_attention_backward_wgmma<DvStart::AFTER_DS, 1>, hopper_scratch<>, 131072, ONLY_HOPPER}},
    {9,
     "dv's product starts before dS is computed",
     {flash_attention_backward_wgmma<DvStart::BEFORE_DS, 1>, hopper_scratch<>, 131072, ONLY_HOPPER}},
    {10,
     "variant 8, every second tile's scores start in the shadow of dk's product",
     {flash_attention_backward_wgmma<DvStart::AFTER_DS, 2>, hopper_scratch<>, 131072, ONLY_HOPPER}},
    {11,
     "three of four tiles' scores",
     {flash_attention_backward_wgmma<DvStart::AFTER_DS, 4>, hopper_scratch<>, 131072, ONLY_HOPPER}},
    {12,
     "variant 10, one block an SM that takes items",
     {flash_attention_backward_wgmma<DvStart::AFTER_DS, 2, 0, BackwardBlocks::ONE_AN_SM>, hopper_scratch<>, 131072,
      ONLY_HOPPER}},
    {13,
     "variant 10, P rounded once dS is stored",
     {flash_attention_backward_wgmma<DvStart::ROUNDED_AFTER_DS, 2>, hopper_scratch<>, 131072, ONLY_HOPPER}},
    {14,
     "D = 128: five of eight steps of v from registers",
     {flash_attention_backward_wgmma<DvStart::ROUNDED_AFTER_DS, 2, 5>, hopper_scratch<>, 131072, ONLY_HOPPER}},
    {15,
     "what ships, an item of one query head adding its dk and dv in memory",
     {flash_attention_backward_in_memory, hopper_scratch<KeySums::IN_MEMORY>, 131072,
      ONLY_HOPPER | TAKES_FLOAT32 | KEY_SUMS_VARY | SHIPS}},
    {16,
     "the same, turning dq and dk back",
     {flash_attention_backward_in_memory, hopper_scratch<KeySums::IN_MEMORY, true>, 131072,
      ONLY_HOPPER | TURNS_BACK | KEY_SUMS_VARY | SHIPS}},
#endif
    {20,
     "what this GPU gets (llmc/flash_attention.cuh); Hopper: 14, at D = 64 variant 11 with delta in dP's product",
     {flash_attention_backward_chosen<false>, chosen_scratch<false>, 131072, TAKES_FLOAT32 | SHIPS}},
    {21,
     "the same, deterministic",
     {flash_attention_backward_chosen<true>, chosen_scratch<true>, 131072, TAKES_FLOAT32 | DQ_REPEATS | SHIPS}},
    {22,
     "variant 20, then rope_backward",
     {flash_attention_backward_then_rope, chosen_scratch<false>, 131072, TURNS_BACK}},
    {23,
     "variant 20, dq and dk turned back (llmc/flash_attention.cuh)",
     {flash_attention_backward_chosen<false>, chosen_scratch<false, true>, 131072, TURNS_BACK | SHIPS}},
    {24,
     "the same, deterministic",
     {flash_attention_backward_chosen<true>, chosen_scratch<true, true>, 131072, TURNS_BACK | DQ_REPEATS | SHIPS}},
};

// With --small one shape for each kernel: of the Hopper kernels with two tiles without masks, which their loops take
// together; one with four, as the loop of D = 64 takes, and one with masks, whose queries are the last of a sequence.
// These two are all that variants get that do not ship.
static const std::vector<PreparedCase>& backward_cases(const Harness& h) {
    if (!h.small) {
        static const std::vector<PreparedCase> all_cases = prepare_cases(h, attention_cases());
        return all_cases;
    }
    static const std::vector<PreparedCase> small_cases = [&] {
        std::vector<PreparedCase> prepared;
        for (const int D : {64, 128}) {
            prepared.push_back(prepare_case(attention_case(2, 333, 333, 4, 2, D), h.seed));
            prepared.push_back(prepare_case(attention_case(1, 140, 270, 2, 1, D, true, 130), h.seed));
            const int Tq = D == 64 ? 385 : 193;
            prepared.push_back(prepare_case(attention_case(1, Tq, Tq + 127, 1, 1, D, true, 127), h.seed));
        }
        for (const int D : {8, 72, 160, 256}) {
            prepared.push_back(prepare_case(attention_case(2, 129, 129, 3, 1, D), h.seed));
        }
        return prepared;
    }();
    return small_cases;
}

// One of dq, dk and dv: what a first launch left of it, and what it should be.
struct Gradient {
    const char* name;
    HeadView<bf16> view;
    int64_t T;
    int heads;
    std::vector<double> expected;
    double floor, limit;
    bool repeats;
    std::vector<bf16> values = {};
};

// More launches, for races: each must give the bits of the first or, where sums are added in an order that varies, what
// is within the limit again, of which only elements that are not the first's need a look.
static void check_repeats(Harness& h, const std::string& label, DeviceBuffer<bf16>& gradients,
                          const std::vector<Gradient>& parts, const AttentionShape& s,
                          const std::function<void()>& launch, int repeats) {
    std::vector<std::string> wrong(parts.size());
    std::vector<double> max_error(parts.size(), 0.0);
    for (int i = 1; i <= repeats; ++i) {
        gradients.poison();
        launch();
        CUDA_CHECK(cudaStreamSynchronize(h.stream));
        const std::vector<bf16> buffer = gradients.download();
        std::vector<char> read(buffer.size(), 0);
        for (size_t p = 0; p < parts.size(); ++p) {
            const Gradient& part = parts[p];
            const std::vector<bf16> values =
                read_view(buffer, gradients, part.view, s.B, part.T, part.heads, s.D, &read);
            std::vector<bf16> others;
            std::vector<double> expected;
            for (size_t e = 0; e < values.size(); ++e) {
                if (std::memcmp(&values[e], &part.values[e], sizeof(bf16)) != 0) {
                    others.push_back(values[e]);
                    expected.push_back(part.expected[e]);
                }
            }
            const Difference d = difference(others, expected, part.floor, part.limit);
            max_error[p] = std::max(max_error[p], d.max_error);
            if (part.repeats ? !others.empty() : d.num_beyond > 0) {
                wrong[p] =
                    format_string("repeat %d: %zu elements differ from the first launch, max_err %.2e limit %.2e", i,
                                  others.size(), d.max_error, part.limit);
            }
        }
    }
    for (size_t p = 0; p < parts.size(); ++p) {
        const std::string right =
            parts[p].repeats
                ? format_string("%d repeats give the same bits", repeats)
                : format_string("%d repeats: what differs from the first launch has max_err %.2e limit %.2e", repeats,
                                max_error[p], parts[p].limit);
        h.expect(wrong[p].empty(), parts[p].name, label, wrong[p].empty() ? right : wrong[p]);
    }
    if (!gradients.guards_intact()) {
        h.expect(false, "dq dk dv", label, "stray write");
    }
}

// positions: of the rows of q and k, where dq and dk are turned back; else nullptr.
static void check_case(Harness& h, const Variant<Launcher>& variant, const PreparedCase& c,
                       const RopePositions* positions, const char* more = "") {
    const AttentionShape& s = c.shape();
    const ModelConfig config = rope_config(s.H, s.Hkv, s.D);
    RopeRotation rotation;
    std::string label = c.attention_case.label() + more;
    if (positions != nullptr) {
        rotation = {make_rope_frequencies(config), *positions};
        label += " turned back " + positions_label(*positions);
    }
    // The backward's inputs are the exact forward's, rounded: what is checked here is the backward alone.
    DeviceBuffer<bf16> out(convert<bf16>(convert<float>(c.exact.out)));
    DeviceBuffer<float> lse(convert<float>(c.exact.lse));
    DeviceBuffer<bf16> gradients(packed_elements(s));
    DeviceBuffer<char> scratch((int64_t)variant.launch.scratch_bytes(s));
    const PackedViews in = c.operands(), d = packed_views(gradients, s);
    const HeadView<bf16> out_view(out, s.Tq * s.H * s.D, (int64_t)s.H * s.D, s.D);
    auto launch = [&] {
        variant.launch.launch({d.q, d.k, d.v, c.dout_view(), in.q, in.k, in.v, out_view, lse, scratch,
                               positions != nullptr ? &rotation : nullptr},
                              s, h.stream);
    };
    launch();
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    const std::vector<bf16> buffer = gradients.download();
    std::vector<char> read(buffer.size(), 0);
    // dq or dk as it should come out; of the plain result what a pass after attention makes, which rounds once more.
    auto turned = [&](std::vector<double> rows, int heads) {
        if (positions != nullptr) {
            reference_turn(rows, s.B, *positions, heads, heads * s.D, s.D, rope_inverse_frequencies(config), true);
        }
        return rows;
    };
    auto rounded = [](const std::vector<double>& rows) { return to_double(convert<bf16>(convert<float>(rows))); };
    const bool dq_repeats = variant.launch.has(DQ_REPEATS), keys_repeat = !variant.launch.has(KEY_SUMS_VARY);
    std::vector<Gradient> parts;
    auto add_part = [&](const char* name, HeadView<bf16> view, int64_t T, int heads,
                        const std::vector<double>& expected, const std::vector<double>& plain, bool repeats) {
        const double floor = c.gradient_floor(expected);
        parts.push_back({name, view, T, heads, expected, floor, c.limit(expected, plain, floor), repeats});
        parts.back().values = read_view(buffer, gradients, view, s.B, T, heads, s.D, &read);
        h.compare(name, label, parts.back().values, expected, parts.back().limit, {s.B, T, heads, s.D}, floor);
    };
    add_part("dq", d.q, s.Tq, s.H, turned(c.exact.dq, s.H), turned(rounded(c.rounded.dq), s.H), dq_repeats);
    add_part("dk", d.k, s.Tk, s.Hkv, turned(c.exact.dk, s.Hkv), turned(rounded(c.rounded.dk), s.Hkv), keys_repeat);
    add_part("dv", d.v, s.Tk, s.Hkv, c.exact.dv, c.rounded.dv, keys_repeat);
    if (!gradients.guards_intact() || !scratch.guards_intact() || !rest_untouched(buffer, read)) {
        h.expect(false, "dq dk dv", label, "stray write");
    }
    if (variant.launch.has(TAKES_FLOAT32)) {  // the same sums before they are rounded
        const int64_t num_elements = s.B * s.Tk * s.Hkv * s.D;
        DeviceBuffer<float> whole(2 * num_elements);
        const auto view = [&](int64_t first) {
            return HeadView<float>(whole + first, s.Tk * s.Hkv * s.D, (int64_t)s.Hkv * s.D, s.D);
        };
        variant.launch.launch(
            {d.q, view(0), view(num_elements), c.dout_view(), in.q, in.k, in.v, out_view, lse, scratch}, s, h.stream);
        CUDA_CHECK(cudaStreamSynchronize(h.stream));
        const std::vector<float> sums = whole.download();
        const std::vector<bf16> rounded = convert<bf16>(sums);
        std::vector<bf16> expected = parts[1].values;
        expected.insert(expected.end(), parts[2].values.begin(), parts[2].values.end());
        const bool same = std::memcmp(rounded.data(), expected.data(), expected.size() * sizeof(bf16)) == 0;
        h.expect((same || !keys_repeat) && whole.guards_intact(), "dk dv float32", label,
                 same ? "rounded, the bits of dk and dv" : "rounded, other bits than dk and dv");
        if (!keys_repeat) {
            auto compare_whole = [&](const char* name, const float* from, const std::vector<double>& exact,
                                     const std::vector<double>& plain) {
                const double floor = c.gradient_floor(exact);
                h.compare(name, label, std::vector<float>(from, from + num_elements), exact,
                          c.limit(exact, plain, floor), {s.B, s.Tk, s.Hkv, s.D}, floor);
            };
            compare_whole("dk float32", sums.data(), c.exact.dk, c.rounded.dk);
            compare_whole("dv float32", sums.data() + num_elements, c.exact.dv, c.rounded.dv);
        }
    }
    const int repeats = h.small ? 1 : s.Tk == 1000 ? 50 : 2;
    if (dq_repeats && keys_repeat) {
        h.compare_repeats("dq dk dv", label, gradients, launch, repeats);
    } else {
        check_repeats(h, label, gradients, parts, s, launch, repeats);
    }
}

// Of the T rows of q and of k: far from the start; and two runs, of which the second starts inside a tile or with one.
static std::vector<RopePositions> backward_positions(int64_t T) {
    return {rope_one_run(T, 1000003), {T, T / 2, {5, 70000}}};
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    if (variant.number == VARIANTS.front().number) {
        check_attention_truth(h);
    }
    for (const PreparedCase& c : backward_cases(h)) {
        const AttentionShape& s = c.shape();
        // What turns back has as many queries as keys: of D that are neither 64 nor 128.
        const bool for_what_ships = variant.launch.has(TURNS_BACK) ? s.D == 64 || s.D == 128 : s.Tq == s.Tk;
        if (!variant.launch.runs(s) || (h.small && !variant.launch.has(SHIPS) && for_what_ships)) {
            continue;
        }
        if (!variant.launch.has(TURNS_BACK)) {
            check_case(h, variant, c, nullptr);
            if (variant.launch.has(SHIPS) && FewMultiprocessors::concern(s)) {
                const FewMultiprocessors few;
                check_case(h, variant, c, nullptr, few.LABEL);
            }
            continue;
        }
        for (const RopePositions& positions : backward_positions(s.Tq)) {
            check_case(h, variant, c, &positions);
        }
    }
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    for (const AttentionShape& s : attention_timings()) {
        if (!variant.launch.runs(s) || s.Tq > variant.launch.longest_to_time) {
            continue;
        }
        DeviceBuffer<bf16> qkv(packed_elements(s)), gradients(packed_elements(s));
        DeviceBuffer<bf16> out(s.B * s.Tq * s.H * s.D), dout(s.B * s.Tq * s.H * s.D);
        DeviceBuffer<float> lse((int64_t)s.B * s.H * s.Tq);
        DeviceBuffer<char> scratch((int64_t)variant.launch.scratch_bytes(s));
        qkv.fill_random(h.seed);
        dout.fill_random(h.seed + 1);
        const PackedViews in = packed_views(qkv, s), d = packed_views(gradients, s);
        const RopeRotation rotation{make_rope_frequencies(rope_config(s.H, s.Hkv, s.D)), rope_one_run(s.Tq)};
        auto rows = [&](bf16* data) { return HeadView<bf16>(data, s.Tq * s.H * s.D, (int64_t)s.H * s.D, s.D); };
        flash_attention_mma_forward(rows(out), lse, in.q, in.k, in.v, s, h.stream);
        h.measure_flops(format_string("B%d T%lld H%d D%d causal", s.B, (long long)s.Tq, s.H, s.D),
                        2.5 * attention_flops(s), peak_bf16_tflops(), variant.idea, [&] {
                            variant.launch.launch({d.q, d.k, d.v, rows(dout), in.q, in.k, in.v, rows(out), lse, scratch,
                                                   variant.launch.has(TURNS_BACK) ? &rotation : nullptr},
                                                  s, h.stream);
                        });
    }
}

int main(int argc, char** argv) {
    return run_variants(argc, argv, "flash_attention_backward", VARIANTS, check, measure);
}
