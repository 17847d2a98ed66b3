// flash_attention_mma_forward.cuh: attention without a T x T matrix, for every GPU with bf16 tensor cores (sm_80 and
// up):
//   out = softmax(scale q k^T + mask) v,  lse = log of the softmax's denominator
// Shapes: q, out [B, Tq, H, D]; k, v [B, Tk, Hkv, D], each a HeadView (any strides, rows aligned to
// 16 bytes); lse [B, H, Tq]. D is a multiple of 8 up to 256: 64 and 128 are the fast ones, others are padded with zeros
// in shared memory to the next instantiation. Storage bf16, products on mma.sync m16n8k16 with float32 accumulation,
// statistics float32.
//
// A block owns BLOCK_M query rows and walks over key tiles; a warp owns 16 or 32 of those rows, so scores, their
// softmax and the output never leave its registers.
//
// Bound: tensor cores, of which mma.sync reaches about 62 % on Hopper; then shared memory, because every warp reads
// every tile. 4 Tq Tk D H operations, half of them when causal. Reference: reference/attention.h. Variants:
// dev/cuda/flash_attention_forward.cu.
#pragma once
#include "flash_attention_mma_tiles.cuh"
#include "softmax_reference.cuh"

struct MmaForwardArguments {
    HeadView<bf16> out;
    float* lse;
    HeadView<const bf16> q, k, v;
    int64_t Tq, Tk, key_offset;
    int H, heads_per_kv_head, D;
    float scale_log2, inverse_scale_log2;  // scale * log2(e): 2^(scale_log2 q.k) is what the softmax adds up
    TileOrder order;
};

// ---- forward -----------------------------------------------------------------------------------
// D: padded head dim. M_TILES: 16-row tiles of queries a warp. STAGES: tiles of k and v in flight; with 1, k loads
// while the softmax and the second product run, and v while the first does.
template <int D_, int M_TILES_, int BLOCK_N_, int STAGES_>
struct MmaForwardTile {
    static constexpr int D = D_, M_TILES = M_TILES_, BLOCK_N = BLOCK_N_, STAGES = STAGES_;
    static constexpr int WARPS = 4, THREADS = WARPS * WARP_SIZE;
    static constexpr int BLOCK_M = WARPS * 16 * M_TILES;
    static constexpr int MIN_BLOCKS = 2;  // resident on an SM: 255 registers a thread
    // Without a branch, every maximum costs what it takes to multiply the output: little at a small D. H200, TFLOP/s at
    // T = 1024, 2048, 4096, 8192 of no reference moved below 2^8, ANY, WHERE_HEAVY, the last with scores of deviation 1
    // and 2: D = 64 90, 171, 271, 305; 88, 165, 275, 306; 83, 161, 257, 306 and 83, 156, 249, 283. D = 128 59, 134,
    // 222, 371; 55, 125, 204, 339; 54, 128, 223, 375 and 54, 122, 204, 348.
    static constexpr References REFERENCES = D <= 64 ? References::ANY : References::WHERE_HEAVY;
    struct Shared {
        alignas(128) bf16 q[BLOCK_M * D];  // at the end the output's tile
        alignas(128) bf16 k[STAGES][BLOCK_N * D];
        alignas(128) bf16 v[STAGES][BLOCK_N * D];
        int num_unmasked;  // key tiles that every row sees whole; here because registers are short
    };
};

// A warp's rows. A thread has 2 M_TILES of them, four threads a row.
template <int M_TILES>
struct MmaSoftmaxRows {
    float reference[M_TILES][2];  // of q.k; the same in the four threads of a row
    float limit[M_TILES][2];      // WHERE_HEAVY: the largest score that does not move it, as of when one last passed it
    float sum[M_TILES][2];        // this thread's part of the sum of P
};

// Online softmax of one tile: scores become P = 2^(scale_log2 (score - reference)), added to the rows' sums. Where a
// score passes its row's reference, or will then weigh enough, that becomes the row's largest and the sum and out are
// rescaled.
template <References REFERENCES, int M_TILES, int N_TILES, int OUT_TILES>
__device__ __forceinline__ void online_softmax(float (&scores)[M_TILES][N_TILES][4],
                                               float (&out)[M_TILES][OUT_TILES][4], MmaSoftmaxRows<M_TILES>& rows,
                                               float scale_log2, float inverse_scale_log2,
                                               const KeyProgress& progress) {
    float tile_max[M_TILES][2];
    bool passes = false;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float maximum = -INFINITY;
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                maximum = fmaxf(maximum, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
            }
            tile_max[m][half] = maximum;
            passes |= maximum > rows.limit[m][half];
        }
    }
    if (REFERENCES == References::ANY || __any_sync(FULL_WARP, passes)) {
        const float share = light_share<8 * N_TILES>(progress);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float maximum = row_max(tile_max[m][half]);
                float& reference = rows.reference[m][half];
                const float limit = REFERENCES == References::ANY
                                        ? reference
                                        : reference + light_lag(rows.sum[m][half], share) * inverse_scale_log2;
                const bool moves = maximum > limit;
                const float factor = moves ? exp2_approx((reference - maximum) * scale_log2) : 1.0f;
                reference = moves ? maximum : reference;
                rows.limit[m][half] = moves ? maximum : limit;
                rows.sum[m][half] *= factor;
#pragma unroll
                for (int n = 0; n < OUT_TILES; ++n) {
                    out[m][n][2 * half] *= factor;
                    out[m][n][2 * half + 1] *= factor;
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // A row that has seen no key yet has only scores of -infinity: any finite shift gives P = 0.
            const float reference = rows.reference[m][half];
            const float shift = reference == -INFINITY ? 0.0f : reference * scale_log2;
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = scores[m][n][2 * half + i];
                    score = exp2_approx(fmaf(score, scale_log2, -shift));
                    rows.sum[m][half] += score;
                }
            }
        }
    }
}

// Launch: one block a tile of BLOCK_M query rows of one head, in TileOrder. Bound: tensor cores.
template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, Tile::MIN_BLOCKS)
    flash_attention_mma_forward_kernel(const __grid_constant__ MmaForwardArguments args) {
    constexpr int D = Tile::D, M_TILES = Tile::M_TILES, BLOCK_M = Tile::BLOCK_M, BLOCK_N = Tile::BLOCK_N;
    constexpr int THREADS = Tile::THREADS, STAGES = Tile::STAGES, WARP_ROWS = 16 * M_TILES;
    extern __shared__ __align__(128) unsigned char shared_memory[];
    typename Tile::Shared& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;

    const QueryBlock<Tile> block(args, blockIdx.x);
    const int num_key_tiles = (int)((block.last_seen + BLOCK_N - 1) / BLOCK_N);
    if (threadIdx.x == 0) {
        shared.num_unmasked = (int)(block.first_seen / BLOCK_N);
    }

    const uint32_t q_tile = shared_address(shared.q);
    const uint32_t q_warp_tile = q_tile + warp * WARP_ROWS * SwizzledTile<D>::ROW_BYTES;
    const auto q_reader = FragmentReader<D>::rows_first(q_warp_tile, lane);
    // Tiles of k and of v are loaded one after the other, from the last down.
    const int64_t last_key = (int64_t)(num_key_tiles - 1) * BLOCK_N;
    const bf16* k_position = tile_position<D>(args.k.row(block.b, last_key, block.kv_head), args.k.stride_t);
    const bf16* v_position = tile_position<D>(args.v.row(block.b, last_key, block.kv_head), args.v.stride_t);
    auto load_k = [&](int tile) {
        load_tile<BLOCK_N, D, THREADS>(shared_address(shared.k[tile % STAGES]), k_position, args.k.stride_t,
                                       args.Tk - (int64_t)tile * BLOCK_N, args.D);
        k_position -= BLOCK_N * args.k.stride_t;
    };
    auto load_v = [&](int tile) {
        load_tile<BLOCK_N, D, THREADS>(shared_address(shared.v[tile % STAGES]), v_position, args.v.stride_t,
                                       args.Tk - (int64_t)tile * BLOCK_N, args.D);
        v_position -= BLOCK_N * args.v.stride_t;
    };

    float out[M_TILES][D / 8][4];
    MmaSoftmaxRows<M_TILES> rows;
    set_zero(out);
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; ++i) {
        rows.reference[i / 2][i % 2] = rows.limit[i / 2][i % 2] = -INFINITY;
        rows.sum[i / 2][i % 2] = 0.0f;
    }
    if (num_key_tiles > 0) {
        load_rows<BLOCK_M, D, THREADS>(q_tile, args.q.row(block.b, block.first_row, block.h), args.q.stride_t,
                                       args.Tq - block.first_row, args.D);
        load_k(num_key_tiles - 1);
        if (STAGES > 1) {
            load_v(num_key_tiles - 1);
        }
        cp_async_commit();
    }
    // From the last key tile down: the masked ones come first, and near keys tend to hold the maximum.
    for (int tile = num_key_tiles - 1; tile >= 0; --tile) {
        const int stage = tile % STAGES;
        cp_async_wait<0>();
        __syncthreads();  // this tile has arrived, and every warp is done with the one before
        if (STAGES == 1) {
            load_v(tile);
            cp_async_commit();
        } else if (tile > 0) {
            load_k(tile - 1);
            load_v(tile - 1);
            cp_async_commit();
        }
        float scores[M_TILES][BLOCK_N / 8][4];
        multiply_rows(scores, q_reader, FragmentReader<D>::chunks_first(shared_address(shared.k[stage]), lane), 0);
        if (STAGES == 1) {
            cp_async_wait<0>();
            __syncthreads();  // v has arrived, and every warp is done with k
            if (tile > 0) {
                load_k(tile - 1);
                cp_async_commit();
            }
        }
        if (tile >= shared.num_unmasked) {
            mask_scores(scores, QueryBlock<Tile>(args, opaque(blockIdx.x)).warp_row, (int64_t)tile * BLOCK_N,
                        args.key_offset, args.Tk);
        }
        online_softmax<Tile::REFERENCES>(scores, out, rows, args.scale_log2, args.inverse_scale_log2,
                                         {num_key_tiles - tile, num_key_tiles});
        uint32_t p[M_TILES][BLOCK_N / 16][4];
        pack_operand(p, scores);
        multiply_add(out, p, FragmentReader<D>::rows_first(shared_address(shared.v[stage]), lane), 0, 0);
    }

    // The output goes through this warp's own rows of the q tile to be stored 16 bytes at a time.
    const QueryBlock<Tile> again(args, opaque(blockIdx.x));  // not kept through the loop: registers are short
    float factor[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = rows.sum[m][half];
            sum += __shfl_xor_sync(FULL_WARP, sum, 1);
            sum += __shfl_xor_sync(FULL_WARP, sum, 2);
            factor[m][half] = sum == 0.0f ? 0.0f : 1.0f / sum;  // 0: a row that sees no key
            const int64_t row = again.warp_row + 16 * m + 8 * half + lane / 4;
            if (lane % 4 == 0 && row < args.Tq) {
                args.lse[(int64_t)again.head * args.Tq + row] =
                    sum == 0.0f ? -INFINITY : (rows.reference[m][half] * args.scale_log2 + log2f(sum)) * LN_2;
            }
        }
    }
    __syncwarp();
    store_fragments<D>(q_warp_tile, out, factor, 0);
    __syncwarp();
    store_rows<D, WARP_ROWS, D / 8>(args.out.row(again.b, again.warp_row, again.h), args.out.stride_t, q_warp_tile,
                                    args.Tq - again.warp_row, args.D, 0);
}

// ---- launchers ----------------------------------------------------------------------------------
template <class Tile>
inline void mma_launch_forward(MmaForwardArguments args, const AttentionShape& shape, cudaStream_t stream) {
    args.order = attention_tile_order(ceil_div<int64_t>(shape.Tq, Tile::BLOCK_M), shape.B, shape.H,
                                      args.heads_per_kv_head, shape.Tk * shape.D * 2 * (int64_t)sizeof(bf16));
    mma_launch<Tile>(flash_attention_mma_forward_kernel<Tile>, args, 1, stream);
}
inline MmaForwardArguments mma_forward_arguments(HeadView<bf16> out, float* lse, HeadView<const bf16> q,
                                                 HeadView<const bf16> k, HeadView<const bf16> v,
                                                 const AttentionShape& shape) {
    attention_check_shape(shape);
    attention_check_view("out", out);
    attention_check_view("q", q);
    attention_check_view("k", k);
    attention_check_view("v", v);
    MmaForwardArguments args{};
    args.out = out, args.lse = lse, args.q = q, args.k = k, args.v = v;
    args.Tq = shape.Tq, args.Tk = shape.Tk, args.key_offset = attention_key_offset(shape);
    args.H = shape.H, args.heads_per_kv_head = shape.H / shape.Hkv, args.D = shape.D;
    args.scale_log2 = shape.scale * LOG2_E;
    args.inverse_scale_log2 = 1.0f / args.scale_log2;
    return args;
}

// out (=), lse (=) [B, H, Tq], natural, of the scaled scores. A query that sees no key gets out 0 and lse -infinity.
// Repeats bit for bit.
inline void flash_attention_mma_forward(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k,
                                        HeadView<const bf16> v, const AttentionShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    const MmaForwardArguments args = mma_forward_arguments(out, lse, q, k, v, shape);
    // clang-format off
    if      (shape.D <= 32)  { mma_launch_forward<MmaForwardTile<32, 2, 64, 2>>(args, shape, stream); }
    else if (shape.D <= 64)  { mma_launch_forward<MmaForwardTile<64, 2, 64, 2>>(args, shape, stream); }
    else if (shape.D <= 96)  { mma_launch_forward<MmaForwardTile<96, 2, 64, 1>>(args, shape, stream); }
    else if (shape.D <= 128) { mma_launch_forward<MmaForwardTile<128, 2, 48, 2>>(args, shape, stream); }
    else if (shape.D <= 192) { mma_launch_forward<MmaForwardTile<192, 1, 64, 1>>(args, shape, stream); }
    else                     { mma_launch_forward<MmaForwardTile<256, 1, 64, 1>>(args, shape, stream); }
    // clang-format on
}
