// lighthouse_pool.cuh: the first pass of Lighthouse attention: l2 norms of query and key rows, the token scores, and
// the coarsest level of the pyramid: the means of q, k, v over windows of c = pool^(levels - 1) tokens and the windows'
// scores, the maxima of their tokens'. Scores of the levels between are maxima too: select takes them where it needs
// them. Means of the levels between are kept nowhere: gather makes the few that are selected from the tokens again,
// which moves fewer bytes than writing and reading whole levels (at L=3, p=4, k=T/64: 1/4 of q, k, v against 3/8).
// Shapes: scores [B, heads, T] and coarsest_scores [B, heads, T / c] float32; pooled [B, T / c, H + 2 Hkv, D] bf16, the
// heads of q, k, v in this order.
// Cost: memory bound: reads q, k, v once, writes 1 / c of them and one float a query or key row.
// Reference: lighthouse_norms and lighthouse_gather of reference/lighthouse.h. Variants: dev/cuda/lighthouse_pool.cu.
#pragma once
#include "lighthouse_rows.cuh"

// Rows in flight and blocks on a multiprocessor. On an H100 at T=98304, H=8: 8 rows and 2 blocks 71 % of copy
// bandwidth, 8 and 3 80 %, 4 and 5 84.5 % (the last two spill registers), this 86.5 %.
constexpr int LIGHTHOUSE_POOL_CHUNK = 4, LIGHTHOUSE_POOL_MIN_BLOCKS = 4;

struct LighthousePoolArguments {
    bf16* pooled;            // [B, T / c, num_heads, D], or nullptr: no means
    float* scores;           // [B, scored_heads, T] of the first scored_heads heads
    float* coarsest_scores;  // [B, scored_heads, T / c]
    QkvHeads<const bf16> qkv;
    LighthouseShape shape;
    LighthouseLevels levels;
    int scored_heads;  // H + Hkv, or fewer
    RowGrid grid;
};

// The sums of CHUNK values over the ROW_LANES lanes of a group, that of value i in the lanes from
// i * ROW_LANES / CHUNK on: every exchange halves the values a lane still has to add up.
template <int ROW_LANES, int CHUNK>
__device__ inline float sum_over_lanes(float (&values)[CHUNK], int lane) {
#pragma unroll
    for (int count = CHUNK / 2, offset = ROW_LANES / 2; count > 0; count /= 2, offset /= 2) {
        const bool upper = (lane & offset) != 0;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const float kept = upper ? values[i + count] : values[i], sent = upper ? values[i] : values[i + count];
            values[i] = kept + __shfl_xor_sync(FULL_WARP, sent, offset);
        }
    }
#pragma unroll
    for (int offset = ROW_LANES / CHUNK / 2; offset > 0; offset /= 2) {
        values[0] += __shfl_xor_sync(FULL_WARP, values[0], offset);
    }
    return values[0];
}

// Launch: one group of ROW_LANES lanes a piece of max(c, LIGHTHOUSE_CHUNK) tokens of a head; 1-D grid. Memory bound.
// CHUNK: tokens whose rows are in flight; MIN_BLOCKS: on a multiprocessor.
template <int ROW_LANES, int CHUNK, int MIN_BLOCKS>
__global__ void __launch_bounds__(LIGHTHOUSE_ROW_THREADS, MIN_BLOCKS)
    lighthouse_pool_kernel(const __grid_constant__ LighthousePoolArguments a) {
    constexpr int LANES_PER_SCORE = ROW_LANES / CHUNK;
    const LighthouseLevels& g = a.levels;
    const RowGroup<ROW_LANES> group(a.grid, a.shape.D);
    const int num_heads = a.grid.num_heads;
    const int window_bits = g.bits[g.levels - 1], window = 1 << window_bits, num_windows = g.size[g.levels - 1];
    const HeadView<const bf16> view = a.qkv.head(a.shape, group.head);
    const bf16* x = view.row(group.b, 0, 0) + group.lane * 8;
    bf16* pooled = a.pooled + (group.b * num_windows * num_heads + group.head) * a.shape.D + group.lane * 8;
    const int64_t pooled_stride = (int64_t)num_heads * a.shape.D;
    const bool scored = group.head < a.scored_heads;
    const int64_t score_row = group.b * a.scored_heads + group.head;
    const int own = group.lane / LANES_PER_SCORE;  // the token of a chunk whose score this lane gets

    FloatRow sum;
    float best = 0.0f;  // NaN counts as 0, see lighthouse_select.cuh
    for (int done = 0; done < a.grid.piece_tokens; done += CHUNK) {
        const int first = group.piece * a.grid.piece_tokens + done;
        bf16x8 rows[CHUNK];
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            rows[i] = {};
            if (group.columns && first + i < g.T) {
                rows[i] = load128_streaming(x + (first + i) * view.stride_t);
            }
        }
        float squares[CHUNK];
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            sum.add(rows[i]);
            squares[i] = 0.0f;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float value = __bfloat162float(rows[i][e]);
                squares[i] = fmaf(value, value, squares[i]);
            }
            // A window is two tokens or more.
            if (i % 2 == 1 && ((done + i + 1) & (window - 1)) == 0) {
                if (a.pooled != nullptr && group.columns && first + i < g.T) {
                    store128(pooled + ((first + i) >> window_bits) * pooled_stride, sum.pack(1.0f / (float)window));
                }
                sum = {};
            }
        }
        if (scored) {
            const float score = sqrtf(sum_over_lanes<ROW_LANES>(squares, group.lane));
            const int place = first + own;
            const bool writes = group.exists && place < g.T && group.lane % LANES_PER_SCORE == 0;
            if (writes) {
                a.scores[score_row * g.T + place] = score;
            }
            best = fmaxf(best, score);
            if (((done + CHUNK) & (window - 1)) == 0 || window < CHUNK) {
                const int tokens = min(window, CHUNK);
                for (int offset = LANES_PER_SCORE; offset < tokens * LANES_PER_SCORE; offset *= 2) {
                    best = fmaxf(best, __shfl_xor_sync(FULL_WARP, best, offset));
                }
                if (writes && own % tokens == 0) {
                    a.coarsest_scores[score_row * num_windows + (place >> window_bits)] = best;
                }
                best = 0.0f;
            }
        }
    }
}

// num_heads: of a.qkv, from the first.
template <int CHUNK = LIGHTHOUSE_POOL_CHUNK, int MIN_BLOCKS = LIGHTHOUSE_POOL_MIN_BLOCKS>
inline void launch_lighthouse_pool(LighthousePoolArguments a, int num_heads, cudaStream_t stream) {
    const LighthouseGeometry& g = a.shape.geometry;
    launch_row_groups(g.T, lighthouse_piece_tokens(g), num_heads, a.shape,
                      [&](auto row_lanes, auto, const RowGrid& grid, unsigned blocks) {
                          a.grid = grid;
                          lighthouse_pool_kernel<decltype(row_lanes)::value, CHUNK, MIN_BLOCKS>
                              <<<blocks, LIGHTHOUSE_ROW_THREADS, 0, stream>>>(a);
                      });
    CUDA_CHECK_LAUNCH();
}

// Token scores and those of the coarsest level, which select reads first.
struct LighthouseScores {
    float* tokens = nullptr;    // [B, heads, T]
    float* coarsest = nullptr;  // [B, heads, T / c]
};

// pooled (=) [B, T / c, H + 2 Hkv, D] bf16: float32 means, rounded once. scores (=) of H + Hkv heads: the norms of q's
// heads, then k's; without pointers none. qkv: q [B, T, H, D], k and v [B, T, Hkv, D].
inline void lighthouse_pool(bf16* pooled, const LighthouseScores& scores, const QkvHeads<const bf16>& qkv,
                            const LighthouseShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    launch_lighthouse_pool({pooled,
                            scores.tokens,
                            scores.coarsest,
                            qkv,
                            shape,
                            LighthouseLevels(shape.geometry),
                            scores.tokens ? shape.H + shape.Hkv : 0,
                            {}},
                           shape.num_heads(), stream);
}

// scores (=) of H heads: the l2 norms of the rows of x [B, T, H, D].
inline void lighthouse_norms(const LighthouseScores& scores, HeadView<const bf16> x, const LighthouseShape& shape,
                             cudaStream_t stream) {
    NVTX_RANGE();
    launch_lighthouse_pool(
        {nullptr, scores.tokens, scores.coarsest, {x, {}, {}}, shape, LighthouseLevels(shape.geometry), shape.H, {}},
        shape.H, stream);
}
