// flash_attention_hopper_backward_rows.cuh: what the backward of attention on Hopper does before and after its
// products, a row at a time: statistics of the query rows, and gradients from their float32 accumulators to rows.
#pragma once
#include <cmath>
#include <type_traits>

#include "flash_attention_launch.cuh"
#include "ptx_hopper.cuh"

// How delta gets out of dS = P (dP - delta). SUBTRACTED: from dP, once that is there. IN_PRODUCT: dP's product has one
// step more, of 16 columns, where one operand is ones and the other is -delta as three bf16, which add up to it to 24
// bits. Every warp reads the statistics of all of a tile's queries, which at 2 clocks for 8 bytes keeps shared memory
// busy for 512 clocks a tile of 128; the step spares half of that and takes 128 clocks of the tensor cores instead.
// H200, D = 64: 1, 2, 3, 3 and 4 % faster at T = 2048, 4096, 8192, 18432 and 98304; with lse in the scores' product as
// well, 4 to 5 % less than that. D = 128, which then has registers for fewer steps of v: 1 to 3 % slower.
// Deterministic: no difference.
enum class DeltaTerm { SUBTRACTED, IN_PRODUCT };

// Of a tile of COUNT_ query rows, as hopper_backward_prepare_kernel leaves them.
template <int COUNT_, DeltaTerm DELTA_>
struct QueryStatistics {
    static constexpr int COUNT = COUNT_;
    static constexpr DeltaTerm DELTA = DELTA_;
    alignas(16) float lse[COUNT];                                                    // in powers of two
    std::conditional_t<DELTA == DeltaTerm::IN_PRODUCT, bf16x8, float> delta[COUNT];  // bf16x8: three_summands(-delta)
};

constexpr int HOPPER_ROWS_THREADS = 256;

// value as three bf16 that add up to it, but for 2^-24 of it, and five zeros.
__device__ __forceinline__ bf16x8 three_summands(float value) {
    bf16x8 summands;
#pragma unroll
    for (int i = 0; i < bf16x8::size; ++i) {
        summands[i] = __float2bfloat16(i < 3 ? value : 0.0f);
        value -= __bfloat162float(summands[i]);
    }
    return summands;
}

// statistics (=) lse log2(e) and delta = rowsum(dout out) of every query tile; dq_parts (=) 0 or, where that is
// nullptr, dq_accumulator (=) 0; next_item (=) first_free_item. A row that sees no key, and rows of the last tile that
// do not exist, get lse +infinity, which makes their P zero, and the latter delta 0. Launch: 8 threads a row, flat grid
// over the rows of all tiles. Bound: bandwidth, 4D bytes read and, of dq_accumulator, 4D written a row.
template <int D, class Statistics>
__global__ void __launch_bounds__(HOPPER_ROWS_THREADS)
    hopper_backward_prepare_kernel(Statistics* statistics, float* dq_accumulator, int* dq_parts, int* next_item,
                                   int first_free_item, HeadView<const bf16> dout, HeadView<const bf16> out,
                                   const float* lse, int64_t num_tile_rows, int64_t Tq, int64_t padded_Tq, int H) {
    start_next_kernel();
    const int64_t row = ((int64_t)blockIdx.x * HOPPER_ROWS_THREADS + threadIdx.x) / ATTENTION_DELTA_LANES;
    const int lane = threadIdx.x % ATTENTION_DELTA_LANES;
    const int64_t head = row / padded_Tq, t = row % padded_Tq;
    const bool exists = row < num_tile_rows && t < Tq;
    const bf16* dout_row = exists ? dout.row(head / H, t, head % H) : nullptr;
    const bf16* out_row = exists ? out.row(head / H, t, head % H) : nullptr;
    const float delta = attention_delta(dout_row, out_row, D);
    if (row >= num_tile_rows) {
        return;
    }
    if (row == 0 && lane == 0) {
        *next_item = first_free_item;
    }
    const int64_t tile = row / Statistics::COUNT;
    const int place = (int)(row % Statistics::COUNT);
    if (dq_parts != nullptr && place == 0 && lane == 0) {
        dq_parts[tile] = 0;
    }
    if (lane == 0) {
        const float row_lse = exists ? lse[head * Tq + t] : -INFINITY;
        statistics[tile].lse[place] = row_lse == -INFINITY ? INFINITY : row_lse * LOG2_E;
        if constexpr (Statistics::DELTA == DeltaTerm::IN_PRODUCT) {
            statistics[tile].delta[place] = three_summands(-delta);
        } else {
            statistics[tile].delta[place] = delta;
        }
    }
    if (dq_parts == nullptr) {
#pragma unroll
        for (int d = lane * float4x::size; d < D; d += ATTENTION_DELTA_LANES * float4x::size) {
            *reinterpret_cast<float4*>(dq_accumulator + row * D + d) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }
}

// Heads a block of the rounding kernel: those that turn read their angles once.
template <bool TURNS_BACK>
constexpr int HOPPER_ROUND_HEADS = TURNS_BACK ? 4 : 1;
__device__ __forceinline__ void store_8_columns(bf16* to, const float (&values)[8]) {
    bf16x8 pack;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        pack[e] = __float2bfloat16(values[e]);
    }
    store128(to, pack);
}
__device__ __forceinline__ void store_8_columns(float* to, const float (&values)[8]) {
    reinterpret_cast<float4*>(to)[0] = make_float4(values[0], values[1], values[2], values[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(values[4], values[5], values[6], values[7]);
}
// rows (=) factor * accumulator, of H heads of T rows; TURNS_BACK: turned back by the rows' angles, from
// rope_make_table. Element: bf16 or float. A warpgroup's 64 x 64 part of a tile is in the order of its registers:
// float4 i (of 8) of thread t is float4 128 i + t: columns 8 i + 2 (t % 4) and the next of row 16 (t / 32) + t % 32 /
// 4, then of the row 8 further down. Parts of a tile are its halves of columns (D = 128) or of rows (D = 64). Launch: a
// block a tile, of several heads that turn by the same angles; a thread reads the eight float4 that hold 8 columns of
// the first half of such two rows and the same of the second half, with which they turn. Bound: bandwidth, 4D bytes a
// row read and D elements written.
template <int D, int TILE_ROWS, bool TURNS_BACK, class Element>
__global__ void __launch_bounds__(HOPPER_ROWS_THREADS)
    hopper_backward_round_kernel(HeadView<Element> rows, const float* accumulator, const float2* angles, int64_t T,
                                 int num_tiles, int H, float factor) {
    constexpr int VECTORS = D / 16, PART_FLOAT4 = 64 * 64 / 4;  // 8 columns each, of half a row
    constexpr int HEADS = HOPPER_ROUND_HEADS<TURNS_BACK>;
    static_assert(TILE_ROWS * D == 32 * HOPPER_ROWS_THREADS, "two rows of 16 columns a thread");
    const int group = blockIdx.x / num_tiles, num_groups = (H + HEADS - 1) / HEADS;
    const int tile = blockIdx.x - group * num_tiles, b = group / num_groups;
    const int first_head = (group - b * num_groups) * HEADS, end_head = min(first_head + HEADS, H);
    const int i = threadIdx.x % VECTORS, quad = threadIdx.x / VECTORS % 32;
    const int first_part = D == 128 ? 0 : threadIdx.x / (32 * VECTORS);  // D = 128: the halves of a row are two parts
    const int64_t row = (int64_t)tile * TILE_ROWS + 64 * first_part + quad / 8 * 16 + quad % 8;
    RopeFragmentAngles angle[4];
    wait_for_kernel_before();
    if constexpr (TURNS_BACK) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            angle[t] = rope_fragment_angles<D>(angles, row / ROPE_TILE_ROWS, quad % 8, 8 * i + 2 * t);
        }
    }
    for (int head = first_head; head < end_head; ++head) {
        const float* part = accumulator + (((int64_t)b * H + head) * num_tiles + tile) * (TILE_ROWS * D);
        const float4* low =
            reinterpret_cast<const float4*>(part) + first_part * PART_FLOAT4 + i * WARPGROUP_SIZE + quad * 4;
        const float4* high = low + (D == 128 ? PART_FLOAT4 : VECTORS * WARPGROUP_SIZE);
        float out[2][2][8];  // of the upper and the lower row, low and high columns
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const float4 lows = __ldcs(low + t), highs = __ldcs(high + t);
            float turned[2][2][2] = {{{lows.x, lows.y}, {highs.x, highs.y}},
                                     {{lows.z, lows.w}, {highs.z, highs.w}}};  // [row][half][column]
            if constexpr (TURNS_BACK) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    rope_turn_back(turned[e / 2][0][e % 2], turned[e / 2][1][e % 2], angle[t].row[e / 2][e % 2]);
                }
            }
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                out[e / 4][e / 2 % 2][2 * t + e % 2] = factor * turned[e / 4][e / 2 % 2][e % 2];
            }
        }
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
            if (row + 8 * lower < T) {
                Element* const to = rows.row(b, row + 8 * lower, head) + 8 * i;
                store_8_columns(to, out[lower][0]);
                store_8_columns(to + D / 2, out[lower][1]);
            }
        }
    }
}
