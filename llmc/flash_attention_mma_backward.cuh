// flash_attention_mma_backward.cuh: the gradients of attention without a T x T matrix, for every GPU with bf16 tensor
// cores (sm_80 and up):
//   P = exp(scale q k^T - lse),  dP = dout v^T,  dS = P (dP - delta),  delta = rowsum(dout out)
//   dv = P^T dout,  dk = scale dS^T q,  dq = scale dS k
// Shapes: q, out, dout, dq [B, Tq, H, D]; k, v, dk, dv [B, Tk, Hkv, D], each a HeadView (any strides, rows aligned to
// 16 bytes); lse [B, H, Tq]. D is a multiple of 8 up to 256: 64 and 128 are the fast ones, others are padded with zeros
// in shared memory to the next instantiation. Storage bf16, products on mma.sync m16n8k16 with float32 accumulation,
// statistics float32.
//
// A block owns a key tile and walks over the query tiles of every query head of its group, so dk and dv are sums in one
// block, in a fixed order; the warp owns keys (scores transposed), and P^T and dS^T go from accumulators to operands in
// registers. Only dS crosses warps, through shared memory, for dq, which is summed over blocks: by float32 atomics in
// scratch (fast; the order, so the last bits, vary), or, when deterministic, by a second kernel that owns query rows
// and computes scores and dP again (7 products instead of 5, and no scratch of the size of dq in float32).
//
// Bound: tensor cores, of which mma.sync reaches about 62 % on Hopper; then shared memory, because every warp reads
// every tile. 10 Tq Tk D H operations, half of them when causal. Reference: reference/attention.h. Variants:
// dev/cuda/flash_attention_backward.cu.
#pragma once
#include <utility>

#include "flash_attention_mma_tiles.cuh"
#include "gpu_properties.cuh"

struct MmaBackwardArguments {
    HeadView<bf16> dq, dk, dv;
    HeadView<float> dk_whole, dv_whole;  // where dk and dv go instead, if these have data
    HeadView<const bf16> dout, q, k, v;
    const float2* row_statistics;  // [B, H, Tq]: lse in powers of two, delta
    float* dq_accumulator;         // in fragment order, see dq_fragment; nullptr: do not compute dq
    int64_t Tq, Tk, key_offset;
    int H, heads_per_kv_head, D;
    float scale, scale_log2;
    TileOrder order;
};

// ---- tiles --------------------------------------------------------------------------------------
// Stores a warp's accumulators, times a factor for each row, as they are: chunks [first_chunk, first_chunk + N_TILES)
// of the first num_rows rows and D columns.
template <int M_TILES, int N_TILES>
__device__ __forceinline__ void store_whole_fragments(float* first_row, int64_t stride_t,
                                                      const float (&c)[M_TILES][N_TILES][4],
                                                      const float (&factor)[M_TILES][2], int64_t num_rows, int D,
                                                      int first_chunk) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * m + 8 * half + lane / 4;
            float* const to = first_row + row * stride_t + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                const int column = (first_chunk + n) * 8;
                if (row < num_rows && column < D) {
                    *reinterpret_cast<float2*>(to + column) =
                        make_float2(c[m][n][2 * half] * factor[m][half], c[m][n][2 * half + 1] * factor[m][half]);
                }
            }
        }
    }
}

// As mask_scores, for transposed scores: 16 M_TILES keys from `key` on, query rows from `row` on.
template <int M_TILES, int N_TILES>
__device__ __forceinline__ void mask_scores_transposed(float (&scores)[M_TILES][N_TILES][4], int64_t key, int64_t row,
                                                       int64_t key_offset, int64_t Tk) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t this_key = key + 16 * m + 8 * half + lane / 4;
            // The first row that sees the key, counted from this lane's first column.
            const int64_t first = this_key < Tk ? this_key - key_offset - row : INT64_MAX;
            const int hidden = (int)max((int64_t)0, min(first, (int64_t)(8 * N_TILES))) - lane % 4 * 2;
            hide_columns(scores[m], half, [&](int column) { return column < hidden; });
        }
    }
}

// ---- before and after ---------------------------------------------------------------------------
// One m16n8 fragment of dq is 128 floats in the accumulator, in the order in which a warp adds them: coalesced, four
// floats a lane at once where the GPU can add four. Fragments are [B * H][Tq / 16, rounded up][padded D / 8].
__host__ __device__ inline int64_t dq_fragment(int64_t head, int64_t row, int64_t Tq, int chunk, int num_chunks) {
    return ((head * ((Tq + 15) / 16) + row / 16) * num_chunks + chunk) * 128;
}
// Element i of a lane's four.
__device__ __forceinline__ int dq_within_fragment(int lane, int i) {
#if __CUDA_ARCH__ >= 900
    return lane * 4 + i;
#else
    return i * WARP_SIZE + lane;
#endif
}
__device__ __forceinline__ void add_dq_fragment(float* fragment, int lane, const float (&value)[4]) {
#if __CUDA_ARCH__ >= 900
    red_add_f32x4(fragment + dq_within_fragment(lane, 0), make_float4(value[0], value[1], value[2], value[3]));
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        red_add_f32(fragment + dq_within_fragment(lane, i), value[i]);
    }
#endif
}

constexpr int MMA_ROWS_THREADS = 256;

// row_statistics (=) {lse log2(e), rowsum(dout out)}. A row that sees no key gets +infinity, which makes its P zero.
// Launch: 8 threads a row, flat grid over B * H * Tq rows. Bound: bandwidth, 4D + 12 bytes a row.
__global__ void __launch_bounds__(MMA_ROWS_THREADS)
    flash_attention_mma_statistics_kernel(float2* row_statistics, HeadView<const bf16> dout, HeadView<const bf16> out,
                                          const float* lse, int64_t num_rows, int64_t Tq, int H, int D) {
    const int64_t thread = (int64_t)blockIdx.x * MMA_ROWS_THREADS + threadIdx.x;
    const int64_t row = thread / ATTENTION_DELTA_LANES;
    const bool exists = row < num_rows;
    const int64_t head = row / Tq, t = row % Tq;
    const float delta = attention_delta(exists ? dout.row(head / H, t, head % H) : nullptr,
                                        exists ? out.row(head / H, t, head % H) : nullptr, D);
    if (exists && thread % ATTENTION_DELTA_LANES == 0) {
        row_statistics[row] = {lse[row] == -INFINITY ? INFINITY : lse[row] * LOG2_E, delta};
    }
}

// dq (=) scale * accumulator, from fragment order. Launch: one thread 8 columns of a row, flat grid. Bound: bandwidth,
// 6D bytes a row.
__global__ void __launch_bounds__(MMA_ROWS_THREADS)
    flash_attention_mma_dq_kernel(HeadView<bf16> dq, const float* accumulator, int64_t num_rows, int64_t Tq, int H,
                                  int D, int num_chunks, float scale) {
    const int64_t thread = (int64_t)blockIdx.x * MMA_ROWS_THREADS + threadIdx.x;
    const int64_t row = thread / (D / 8);
    const int chunk = (int)(thread - row * (D / 8));
    if (row >= num_rows) {
        return;
    }
    const int64_t head = row / Tq, t = row % Tq;
    const float* fragment = accumulator + dq_fragment(head, t, Tq, chunk, num_chunks);
    bf16x8 result;
#pragma unroll
    for (int column = 0; column < 8; ++column) {
        const int lane = (int)(t % 8) * 4 + column / 2, i = (int)(t % 16) / 8 * 2 + column % 2;
        result[column] = __float2bfloat16(scale * fragment[dq_within_fragment(lane, i)]);
    }
    store128(dq.row(head / H, t, head % H) + chunk * 8, result);
}

// Starts copying the statistics of ROWS rows of a head, from first_row on. Those past the end become zero: there q,
// dout and delta are zero too, so whatever P is, it adds nothing.
template <int ROWS>
__device__ __forceinline__ void load_row_statistics(float2* shared, const float2* head_statistics, int64_t first_row,
                                                    int64_t Tq) {
    if (threadIdx.x < ROWS) {
        const int64_t row = first_row + threadIdx.x;
        cp_async_8(shared_address(shared + threadIdx.x), head_statistics + row, row < Tq);
    }
}

// ---- dk, dv, and dq by atomics ------------------------------------------------------------------
// D: padded head dim. KEY_TILES: 16-row tiles of keys a warp. Above D = 128 the accumulators of all columns do not fit
// the registers: two blocks share a key tile, each computes the scores and half of the columns of dk, dv and dq.
template <int D_, int WARPS_, int KEY_TILES_, int BLOCK_M_>
struct MmaBackwardTile {
    static constexpr int D = D_, WARPS = WARPS_, KEY_TILES = KEY_TILES_, BLOCK_M = BLOCK_M_;
    static constexpr int THREADS = WARPS * WARP_SIZE, BLOCK_N = WARPS * 16 * KEY_TILES;
    static constexpr int D_SPLITS = D > 128 ? 2 : 1, D_OUT = D / D_SPLITS;
    static constexpr int SUB_M = std::min(BLOCK_M, 64 / KEY_TILES);  // query rows in registers at once
    static constexpr int MIN_BLOCKS = WARPS <= 4 ? 2 : 1;
    // dq's product: warps over query rows, then over columns.
    static constexpr int DQ_WARPS_M = BLOCK_M >= 32 ? 2 : 1, DQ_WARPS_D = WARPS / DQ_WARPS_M;
    static constexpr int DQ_ROWS = BLOCK_M / DQ_WARPS_M, DQ_COLUMNS = D_OUT / DQ_WARPS_D;
    static_assert(DQ_ROWS % 16 == 0 && DQ_COLUMNS % 16 == 0, "whole mma tiles");
    struct Shared {
        alignas(128) bf16 k[BLOCK_N * D];  // at the end the tile of dk
        alignas(128) bf16 v[BLOCK_N * D];  // at the end the tile of dv
        alignas(128) bf16 q[2][BLOCK_M * D];
        alignas(128) bf16 dout[2][BLOCK_M * D];
        alignas(128) bf16 ds[BLOCK_N * BLOCK_M];  // [key][query]
        alignas(128) float2 row_statistics[2][BLOCK_M];
    };
};

// WHOLE: dk and dv go to dk_whole and dv_whole.
// Launch: D_SPLITS blocks a tile of BLOCK_N keys of one kv head, in TileOrder. Bound: tensor cores, closely followed by
// shared memory.
template <class Tile, bool WHOLE>
__global__ void __launch_bounds__(Tile::THREADS, Tile::MIN_BLOCKS)
    flash_attention_mma_backward_kernel(const __grid_constant__ MmaBackwardArguments args) {
    constexpr int D = Tile::D, D_OUT = Tile::D_OUT, BLOCK_M = Tile::BLOCK_M, BLOCK_N = Tile::BLOCK_N;
    constexpr int THREADS = Tile::THREADS, KEY_TILES = Tile::KEY_TILES, WARP_KEYS = 16 * KEY_TILES, SUB_M = Tile::SUB_M;
    extern __shared__ __align__(128) unsigned char shared_memory[];
    typename Tile::Shared& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;

    const TileOrder::Place place = args.order.place(blockIdx.x / Tile::D_SPLITS);
    const int first_chunk = blockIdx.x % Tile::D_SPLITS * (D_OUT / 8);
    const int num_kv_heads = args.H / args.heads_per_kv_head;
    const int b = place.head / num_kv_heads, kv_head = place.head % num_kv_heads;
    const int64_t first_key = (int64_t)place.tile * BLOCK_N;
    const int64_t num_keys = min((int64_t)BLOCK_N, args.Tk - first_key);
    // The query tiles in which some row sees some key of this tile: from the first row that sees the first key.
    const int num_query_tiles = (int)((args.Tq + BLOCK_M - 1) / BLOCK_M);
    const int first_tile = (int)min((int64_t)num_query_tiles, max((int64_t)0, first_key - args.key_offset) / BLOCK_M);

    const uint32_t k_tile = shared_address(shared.k), v_tile = shared_address(shared.v);
    const uint32_t ds_tile = shared_address(shared.ds);
    constexpr int WARP_BYTES = WARP_KEYS * SwizzledTile<D>::ROW_BYTES;
    auto load_queries = [&](int h, int tile, int stage) {
        const int64_t row = (int64_t)tile * BLOCK_M;
        load_rows<BLOCK_M, D, THREADS>(shared_address(shared.q[stage]), args.q.row(b, row, h), args.q.stride_t,
                                       args.Tq - row, args.D);
        load_rows<BLOCK_M, D, THREADS>(shared_address(shared.dout[stage]), args.dout.row(b, row, h), args.dout.stride_t,
                                       args.Tq - row, args.D);
        load_row_statistics<BLOCK_M>(shared.row_statistics[stage],
                                     args.row_statistics + ((int64_t)b * args.H + h) * args.Tq, row, args.Tq);
        cp_async_commit();
    };

    float dk[KEY_TILES][D_OUT / 8][4], dv[KEY_TILES][D_OUT / 8][4];
    set_zero(dk);
    set_zero(dv);
    const int end_head = (kv_head + 1) * args.heads_per_kv_head;
    int h = first_tile < num_query_tiles ? kv_head * args.heads_per_kv_head : end_head;
    if (h < end_head) {
        load_rows<BLOCK_N, D, THREADS>(k_tile, args.k.row(b, first_key, kv_head), args.k.stride_t, num_keys, args.D);
        load_rows<BLOCK_N, D, THREADS>(v_tile, args.v.row(b, first_key, kv_head), args.v.stride_t, num_keys, args.D);
        load_queries(h, first_tile, 0);
    }
    for (int tile = first_tile, stage = 0; h < end_head; stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile has arrived, and every warp is done with the one before and with ds
        const int this_head = h;
        const int64_t row = (int64_t)tile * BLOCK_M;
        if (++tile == num_query_tiles) {
            tile = first_tile;
            ++h;
        }
        if (h < end_head) {
            load_queries(h, tile, stage ^ 1);
        }
        const uint32_t q_tile = shared_address(shared.q[stage]), dout_tile = shared_address(shared.dout[stage]);
        const bool masked = first_key + BLOCK_N > args.Tk || first_key + BLOCK_N - 1 > row + args.key_offset;
#pragma unroll
        for (int sub = 0; sub < BLOCK_M; sub += SUB_M) {
            float p[KEY_TILES][SUB_M / 8][4], ds[KEY_TILES][SUB_M / 8][4];
            multiply_rows(p, FragmentReader<D>::rows_first(k_tile + warp * WARP_BYTES, lane),
                          FragmentReader<D>::chunks_first(q_tile, lane), sub);
            multiply_rows(ds, FragmentReader<D>::rows_first(v_tile + warp * WARP_BYTES, lane),
                          FragmentReader<D>::chunks_first(dout_tile, lane), sub);
            if (masked) {
                mask_scores_transposed(p, first_key + warp * WARP_KEYS, row + sub, args.key_offset, args.Tk);
            }
#pragma unroll
            for (int n = 0; n < SUB_M / 8; ++n) {
                // Of this lane's two columns: lse, delta, lse, delta.
                const float4 statistics =
                    *reinterpret_cast<const float4*>(&shared.row_statistics[stage][sub + 8 * n + lane % 4 * 2]);
#pragma unroll
                for (int m = 0; m < KEY_TILES; ++m) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float lse = i % 2 == 0 ? statistics.x : statistics.z;
                        const float delta = i % 2 == 0 ? statistics.y : statistics.w;
                        p[m][n][i] = exp2_approx(fmaf(p[m][n][i], args.scale_log2, -lse));
                        ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - delta);
                    }
                }
            }
            uint32_t operand[KEY_TILES][SUB_M / 16][4];
            pack_operand(operand, p);
            multiply_add(dv, operand, FragmentReader<D>::rows_first(dout_tile, lane), sub, first_chunk);
            pack_operand(operand, ds);
            if (args.dq_accumulator != nullptr) {
#pragma unroll
                for (int m = 0; m < KEY_TILES; ++m) {
#pragma unroll
                    for (int i = 0; i < SUB_M / 4; ++i) {  // operand[m][.][i % 4]: row half i % 2, chunk i / 2
                        const int key = warp * WARP_KEYS + 16 * m + 8 * (i % 2) + lane / 4;
                        store_shared_b32(
                            ds_tile + SwizzledTile<BLOCK_M>::offset(key, sub / 8 + i / 2) + lane % 4 * sizeof(uint32_t),
                            operand[m][i / 4][i % 4]);
                    }
                }
            }
            multiply_add(dk, operand, FragmentReader<D>::rows_first(q_tile, lane), sub, first_chunk);
        }
        if (args.dq_accumulator != nullptr) {
            __syncthreads();  // ds is whole
            constexpr int M_TILES = Tile::DQ_ROWS / 16, N_TILES = Tile::DQ_COLUMNS / 8;
            const int dq_row = warp % Tile::DQ_WARPS_M * Tile::DQ_ROWS;
            const int dq_chunk = first_chunk + warp / Tile::DQ_WARPS_M * N_TILES;
            const auto ds_reader = FragmentReader<BLOCK_M>::chunks_first(ds_tile, lane);
            float dq[M_TILES][N_TILES][4];
            set_zero(dq);
#pragma unroll
            for (int key = 0; key < BLOCK_N; key += 16) {
                uint32_t operand[M_TILES][1][4];
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    ldmatrix_x4_trans(operand[m][0], ds_reader.address(key, dq_row / 8 + 2 * m));
                }
                multiply_add(dq, operand, FragmentReader<D>::rows_first(k_tile, lane), key, dq_chunk);
            }
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                const int64_t fragment_row = row + dq_row + 16 * m;
                if (fragment_row < args.Tq) {
#pragma unroll
                    for (int n = 0; n < N_TILES; ++n) {
                        add_dq_fragment(args.dq_accumulator + dq_fragment((int64_t)b * args.H + this_head, fragment_row,
                                                                          args.Tq, dq_chunk + n, D / 8),
                                        lane, dq[m][n]);
                    }
                }
            }
        }
    }

    float dk_factor[KEY_TILES][2], dv_factor[KEY_TILES][2];
#pragma unroll
    for (int i = 0; i < 2 * KEY_TILES; ++i) {
        dk_factor[i / 2][i % 2] = args.scale;
        dv_factor[i / 2][i % 2] = 1.0f;
    }
    const int64_t warp_key = first_key + warp * WARP_KEYS;
    if constexpr (WHOLE) {
        store_whole_fragments(args.dk_whole.row(b, warp_key, kv_head), args.dk_whole.stride_t, dk, dk_factor,
                              args.Tk - warp_key, args.D, first_chunk);
        store_whole_fragments(args.dv_whole.row(b, warp_key, kv_head), args.dv_whole.stride_t, dv, dv_factor,
                              args.Tk - warp_key, args.D, first_chunk);
    } else {
        __syncthreads();  // every warp is done with k
        const uint32_t dk_tile = k_tile + warp * WARP_BYTES, dv_tile = v_tile + warp * WARP_BYTES;
        store_fragments<D>(dk_tile, dk, dk_factor, first_chunk);
        store_fragments<D>(dv_tile, dv, dv_factor, first_chunk);
        __syncwarp();
        store_rows<D, WARP_KEYS, D_OUT / 8>(args.dk.row(b, warp_key, kv_head), args.dk.stride_t, dk_tile,
                                            args.Tk - warp_key, args.D, first_chunk);
        store_rows<D, WARP_KEYS, D_OUT / 8>(args.dv.row(b, warp_key, kv_head), args.dv.stride_t, dv_tile,
                                            args.Tk - warp_key, args.D, first_chunk);
    }
}

// ---- dq in a fixed order ------------------------------------------------------------------------
// D: padded head dim. M_TILES: 16-row tiles of queries a warp.
template <int D_, int M_TILES_, int BLOCK_N_>
struct MmaBackwardQueryTile {
    static constexpr int D = D_, M_TILES = M_TILES_, BLOCK_N = BLOCK_N_;
    static constexpr int WARPS = 4, THREADS = WARPS * WARP_SIZE, BLOCK_M = WARPS * 16 * M_TILES;
    static constexpr int MIN_BLOCKS = 2;
    struct Shared {
        alignas(128) bf16 q[BLOCK_M * D];  // at the end the tile of dq
        alignas(128) bf16 dout[BLOCK_M * D];
        alignas(128) bf16 k[2][BLOCK_N * D];
        alignas(128) bf16 v[2][BLOCK_N * D];
        alignas(128) float2 row_statistics[BLOCK_M];
    };
};

// Launch: one block a tile of BLOCK_M query rows of one head, in TileOrder. Bound: tensor cores.
template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, Tile::MIN_BLOCKS)
    flash_attention_mma_backward_query_kernel(const __grid_constant__ MmaBackwardArguments args) {
    constexpr int D = Tile::D, M_TILES = Tile::M_TILES, BLOCK_M = Tile::BLOCK_M, BLOCK_N = Tile::BLOCK_N;
    constexpr int THREADS = Tile::THREADS, WARP_ROWS = 16 * M_TILES;
    extern __shared__ __align__(128) unsigned char shared_memory[];
    typename Tile::Shared& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;

    const QueryBlock<Tile> block(args, blockIdx.x);
    const int num_key_tiles = (int)((block.last_seen + BLOCK_N - 1) / BLOCK_N);
    const int num_unmasked = (int)(block.first_seen / BLOCK_N);

    const uint32_t q_tile = shared_address(shared.q), dout_tile = shared_address(shared.dout);
    const uint32_t warp_offset = warp * WARP_ROWS * SwizzledTile<D>::ROW_BYTES;
    // Tiles of k and v are loaded one after the other, from the last down.
    const int64_t last_key = (int64_t)(num_key_tiles - 1) * BLOCK_N;
    const bf16* k_position = tile_position<D>(args.k.row(block.b, last_key, block.kv_head), args.k.stride_t);
    const bf16* v_position = tile_position<D>(args.v.row(block.b, last_key, block.kv_head), args.v.stride_t);
    auto load_keys = [&](int tile) {
        const int64_t num_keys = args.Tk - (int64_t)tile * BLOCK_N;
        load_tile<BLOCK_N, D, THREADS>(shared_address(shared.k[tile % 2]), k_position, args.k.stride_t, num_keys,
                                       args.D);
        load_tile<BLOCK_N, D, THREADS>(shared_address(shared.v[tile % 2]), v_position, args.v.stride_t, num_keys,
                                       args.D);
        cp_async_commit();
        k_position -= BLOCK_N * args.k.stride_t;
        v_position -= BLOCK_N * args.v.stride_t;
    };

    float dq[M_TILES][D / 8][4];
    set_zero(dq);
    if (num_key_tiles > 0) {
        load_rows<BLOCK_M, D, THREADS>(q_tile, args.q.row(block.b, block.first_row, block.h), args.q.stride_t,
                                       args.Tq - block.first_row, args.D);
        load_rows<BLOCK_M, D, THREADS>(dout_tile, args.dout.row(block.b, block.first_row, block.h), args.dout.stride_t,
                                       args.Tq - block.first_row, args.D);
        load_row_statistics<BLOCK_M>(shared.row_statistics, args.row_statistics + (int64_t)block.head * args.Tq,
                                     block.first_row, args.Tq);
        load_keys(num_key_tiles - 1);
    }
    for (int tile = num_key_tiles - 1; tile >= 0; --tile) {
        const int stage = tile % 2;
        cp_async_wait<0>();
        __syncthreads();  // this tile has arrived, and every warp is done with the one before
        if (tile > 0) {
            load_keys(tile - 1);
        }
        const uint32_t k_tile = shared_address(shared.k[stage]), v_tile = shared_address(shared.v[stage]);
        float p[M_TILES][BLOCK_N / 8][4], ds[M_TILES][BLOCK_N / 8][4];
        multiply_rows(p, FragmentReader<D>::rows_first(q_tile + warp_offset, lane),
                      FragmentReader<D>::chunks_first(k_tile, lane), 0);
        multiply_rows(ds, FragmentReader<D>::rows_first(dout_tile + warp_offset, lane),
                      FragmentReader<D>::chunks_first(v_tile, lane), 0);
        if (tile >= num_unmasked) {
            mask_scores(p, QueryBlock<Tile>(args, opaque(blockIdx.x)).warp_row, (int64_t)tile * BLOCK_N,
                        args.key_offset, args.Tk);
        }
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 statistics =
                    shared.row_statistics[warp * WARP_ROWS + 16 * m + 8 * half + lane / 4];  // lse, delta
#pragma unroll
                for (int n = 0; n < BLOCK_N / 8; ++n) {
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        const float probability = exp2_approx(fmaf(p[m][n][i], args.scale_log2, -statistics.x));
                        ds[m][n][i] = probability * (ds[m][n][i] - statistics.y);
                    }
                }
            }
        }
        uint32_t operand[M_TILES][BLOCK_N / 16][4];
        pack_operand(operand, ds);
        multiply_add(dq, operand, FragmentReader<D>::rows_first(k_tile, lane), 0, 0);
    }

    const QueryBlock<Tile> again(args, opaque(blockIdx.x));
    float factor[M_TILES][2];
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; ++i) {
        factor[i / 2][i % 2] = args.scale;
    }
    __syncwarp();
    store_fragments<D>(q_tile + warp_offset, dq, factor, 0);
    __syncwarp();
    store_rows<D, WARP_ROWS, D / 8>(args.dq.row(again.b, again.warp_row, again.h), args.dq.stride_t,
                                    q_tile + warp_offset, args.Tq - again.warp_row, args.D, 0);
}

// ---- launchers ----------------------------------------------------------------------------------
template <class Tile>
inline void mma_launch_backward(MmaBackwardArguments args, const AttentionShape& shape, cudaStream_t stream) {
    const int64_t row_bytes = shape.D * (2 * sizeof(bf16) + (args.dq_accumulator != nullptr ? sizeof(float) : 0));
    args.order = attention_tile_order(ceil_div<int64_t>(shape.Tk, Tile::BLOCK_N), shape.B, shape.Hkv, 1,
                                      shape.Tq * args.heads_per_kv_head * row_bytes);
    mma_launch<Tile>(args.dk_whole.data != nullptr ? flash_attention_mma_backward_kernel<Tile, true>
                                                   : flash_attention_mma_backward_kernel<Tile, false>,
                     args, Tile::D_SPLITS, stream);
}
template <class Tile>
inline void mma_launch_backward_query(MmaBackwardArguments args, const AttentionShape& shape, cudaStream_t stream) {
    args.order = attention_tile_order(ceil_div<int64_t>(shape.Tq, Tile::BLOCK_M), shape.B, shape.H,
                                      args.heads_per_kv_head, shape.Tk * shape.D * 2 * (int64_t)sizeof(bf16));
    mma_launch<Tile>(flash_attention_mma_backward_query_kernel<Tile>, args, 1, stream);
}

// The padded head dim of the backward.
inline int mma_backward_padded_D(int D) { return D <= 32 ? 32 : D <= 64 ? 64 : D <= 96 ? 96 : D <= 128 ? 128 : 256; }
inline size_t mma_statistics_bytes(const AttentionShape& s) {
    return round_up<size_t>((size_t)s.B * s.H * s.Tq * sizeof(float2), 256);
}
// Exact. Deterministic: 8 bytes a query row and head; otherwise also the float32 accumulator of dq.
inline size_t flash_attention_mma_backward_scratch_bytes(const AttentionShape& s, bool deterministic) {
    const size_t accumulator_rows = (size_t)s.B * s.H * round_up<int64_t>(s.Tq, 16);
    return mma_statistics_bytes(s) +
           (deterministic ? 0 : accumulator_rows * mma_backward_padded_D(s.D) * sizeof(float));
}

// What the backward does before the products: fills the statistics, zeroes dq's accumulator, checks the operands.
inline MmaBackwardArguments mma_begin_backward(HeadView<bf16> dq, KeyGradientView dk, KeyGradientView dv,
                                               HeadView<const bf16> dout, HeadView<const bf16> q,
                                               HeadView<const bf16> k, HeadView<const bf16> v, HeadView<const bf16> out,
                                               const float* lse, void* scratch, const AttentionShape& shape,
                                               bool deterministic, cudaStream_t stream) {
    attention_check_shape(shape);
    attention_check_key_gradients(dk, dv);
    const std::pair<const char*, HeadView<const bf16>> views[] = {{"dq", dq}, {"dout", dout}, {"q", q},
                                                                  {"k", k},   {"v", v},       {"out", out}};
    for (const auto& [name, view] : views) {
        attention_check_view(name, view);
    }
    CHECK(reinterpret_cast<uintptr_t>(scratch) % 16 == 0, "attention: scratch must be aligned to 16 bytes");
    MmaBackwardArguments args{};
    args.dq = dq, args.dk = dk.rounded, args.dv = dv.rounded, args.dout = dout, args.q = q, args.k = k, args.v = v;
    args.dk_whole = dk.whole, args.dv_whole = dv.whole;
    args.Tq = shape.Tq, args.Tk = shape.Tk, args.key_offset = attention_key_offset(shape);
    args.H = shape.H, args.heads_per_kv_head = shape.H / shape.Hkv, args.D = shape.D;
    args.scale = shape.scale, args.scale_log2 = shape.scale * LOG2_E;

    float2* row_statistics = static_cast<float2*>(scratch);
    const int64_t num_rows = (int64_t)shape.B * shape.H * shape.Tq;
    const int64_t num_blocks = ceil_div<int64_t>(num_rows, MMA_ROWS_THREADS / ATTENTION_DELTA_LANES);
    CHECK(num_blocks <= INT32_MAX, "attention: %lld query rows are more than a grid holds", (long long)num_rows);
    flash_attention_mma_statistics_kernel<<<num_blocks, MMA_ROWS_THREADS, 0, stream>>>(
        row_statistics, dout, out, lse, num_rows, shape.Tq, shape.H, shape.D);
    CUDA_CHECK_LAUNCH();
    args.row_statistics = row_statistics;
    if (!deterministic) {
        const size_t statistics_bytes = mma_statistics_bytes(shape);
        args.dq_accumulator = reinterpret_cast<float*>(static_cast<char*>(scratch) + statistics_bytes);
        CUDA_CHECK(cudaMemsetAsync(args.dq_accumulator, 0,
                                   flash_attention_mma_backward_scratch_bytes(shape, false) - statistics_bytes,
                                   stream));
    }
    return args;
}
// dq (=) from its accumulator.
inline void mma_finish_dq(const MmaBackwardArguments& args, const AttentionShape& shape, cudaStream_t stream) {
    const int64_t num_rows = (int64_t)shape.B * shape.H * shape.Tq;
    const int64_t num_blocks = ceil_div<int64_t>(num_rows * (shape.D / 8), MMA_ROWS_THREADS);
    CHECK(num_blocks <= INT32_MAX, "attention: %lld query rows are more than a grid holds", (long long)num_rows);
    flash_attention_mma_dq_kernel<<<num_blocks, MMA_ROWS_THREADS, 0, stream>>>(
        args.dq, args.dq_accumulator, num_rows, shape.Tq, shape.H, shape.D, mma_backward_padded_D(shape.D) / 8,
        shape.scale);
    CUDA_CHECK_LAUNCH();
}

// dq, dk, dv (=). out and lse are the forward's (or, of a chunk of keys, those of all keys together: the gradients are
// then the chunk's share). scratch: flash_attention_mma_backward_scratch_bytes, aligned to 16 bytes, need not be zero.
// dk and dv always repeat bit for bit; dq does when deterministic.
inline void flash_attention_mma_backward(HeadView<bf16> dq, KeyGradientView dk, KeyGradientView dv,
                                         HeadView<const bf16> dout, HeadView<const bf16> q, HeadView<const bf16> k,
                                         HeadView<const bf16> v, HeadView<const bf16> out, const float* lse,
                                         void* scratch, const AttentionShape& shape, bool deterministic,
                                         cudaStream_t stream) {
    NVTX_RANGE();
    const MmaBackwardArguments args =
        mma_begin_backward(dq, dk, dv, dout, q, k, v, out, lse, scratch, shape, deterministic, stream);
    const int shared_limit = gpu_properties().shared_bytes_per_block();
    using Tile128 = MmaBackwardTile<128, 8, 1, 64>;       // 145 KB: sm_80, sm_90, sm_100
    using SmallTile128 = MmaBackwardTile<128, 4, 1, 32>;  // 69 KB: where a block may have 99 KB
    // clang-format off
    if      (shape.D <= 32)  { mma_launch_backward<MmaBackwardTile<32, 4, 2, 64>>(args, shape, stream); }
    else if (shape.D <= 64)  { mma_launch_backward<MmaBackwardTile<64, 4, 2, 64>>(args, shape, stream); }
    else if (shape.D <= 96)  { mma_launch_backward<MmaBackwardTile<96, 4, 1, 64>>(args, shape, stream); }
    else if (shape.D > 128)  { mma_launch_backward<MmaBackwardTile<256, 4, 1, 16>>(args, shape, stream); }
    else if ((int)sizeof(Tile128::Shared) <= shared_limit) { mma_launch_backward<Tile128>(args, shape, stream); }
    else                     { mma_launch_backward<SmallTile128>(args, shape, stream); }

    if      (!deterministic) { mma_finish_dq(args, shape, stream); }
    else if (shape.D <= 32)  { mma_launch_backward_query<MmaBackwardQueryTile<32, 2, 64>>(args, shape, stream); }
    else if (shape.D <= 64)  { mma_launch_backward_query<MmaBackwardQueryTile<64, 2, 32>>(args, shape, stream); }
    else if (shape.D <= 96)  { mma_launch_backward_query<MmaBackwardQueryTile<96, 2, 32>>(args, shape, stream); }
    else if (shape.D <= 128) { mma_launch_backward_query<MmaBackwardQueryTile<128, 2, 32>>(args, shape, stream); }
    else if (shape.D <= 192) { mma_launch_backward_query<MmaBackwardQueryTile<192, 1, 32>>(args, shape, stream); }
    else                     { mma_launch_backward_query<MmaBackwardQueryTile<256, 1, 16>>(args, shape, stream); }
    // clang-format on
}
