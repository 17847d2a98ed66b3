// lighthouse_pool.cuh: the first pass of Lighthouse attention: l2 norms of query and key rows, the token scores, and
// the coarsest level of the pyramid, the means of q, k, v over windows of c = pool^(levels - 1) tokens.
// Scores of the levels between are maxima of token scores: select takes them where it needs them. Means of the levels
// between are kept nowhere: gather makes the few that are selected from the tokens again, which moves fewer bytes
// than writing and reading whole levels (at L=3, p=4, k=T/64: 1/4 of q, k, v against 3/8).
// Shapes: scores [B, heads, T] float32; pooled [B, T / c, H + 2 Hkv, D] bf16, the heads of q, k, v in this order.
// Cost: memory bound: reads q, k, v once, writes 1 / c of them and one float a query or key row.
// Reference: lighthouse_norms and lighthouse_gather of reference/lighthouse.h. Variants: dev/cuda/lighthouse_pool.cu.
#pragma once
#include "lighthouse_rows.cuh"

// Rows loaded before the first is used. 8 rows of 16 bytes a lane keep enough bytes in flight at half occupancy.
constexpr int LIGHTHOUSE_POOL_CHUNK = 8;

struct LighthousePoolArguments {
    bf16* pooled;   // [B, T / window, num_heads, D], or nullptr: no means
    float* scores;  // [B, scored_heads, T] of the first scored_heads heads, or nullptr: no scores
    QkvHeads<const bf16> qkv;
    LighthouseShape shape;
    int num_heads;     // heads of qkv that are read: H + 2 Hkv, or fewer
    int scored_heads;  // H + Hkv, or 0
    int window_bits;   // log2 c
};

// Launch: one group of ROW_LANES lanes a (window, head), neighbouring groups on neighbouring heads, which lie side by
// side in a packed row; 1-D grid. Memory bound.
template <int ROW_LANES>
__global__ void __launch_bounds__(LIGHTHOUSE_ROW_THREADS)
    lighthouse_pool_kernel(const __grid_constant__ LighthousePoolArguments a) {
    static_assert(LIGHTHOUSE_POOL_CHUNK <= ROW_LANES, "each row's score is kept by a lane of its own");
    const LighthouseShape& shape = a.shape;
    const int64_t T = shape.geometry.T, num_windows = T >> a.window_bits;
    const RowGroup<ROW_LANES> group(shape.B * num_windows, a.num_heads, shape.D);
    const int64_t b = group.index / num_windows, w = group.index - b * num_windows;
    const int window = 1 << a.window_bits;
    const bool scored = group.head < a.scored_heads;
    const HeadView<const bf16> view = a.qkv.head(shape, group.head);
    const bf16* token = view.row(b, w << a.window_bits, 0) + group.lane * 8;
    FloatRow sum;
    for (int first = 0; first < window; first += LIGHTHOUSE_POOL_CHUNK) {
        bf16x8 rows[LIGHTHOUSE_POOL_CHUNK];
#pragma unroll
        for (int i = 0; i < LIGHTHOUSE_POOL_CHUNK; ++i) {
            rows[i] = {};
            if (first + i < window && group.active) {
                rows[i] = load128_streaming(token);
                token += view.stride_t;
            }
        }
        float score = 0.0f;  // lane i keeps the score of row i
#pragma unroll
        for (int i = 0; i < LIGHTHOUSE_POOL_CHUNK; ++i) {
            sum.add(rows[i]);
            float squares = 0.0f;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float x = __bfloat162float(rows[i][e]);
                squares += x * x;
            }
#pragma unroll
            for (int offset = ROW_LANES / 2; offset > 0; offset /= 2) {
                squares += __shfl_xor_sync(FULL_WARP, squares, offset);
            }
            score = group.lane == i ? sqrtf(squares) : score;
        }
        if (scored && group.index < shape.B * num_windows && group.lane < LIGHTHOUSE_POOL_CHUNK &&
            first + group.lane < window) {
            a.scores[(b * a.scored_heads + group.head) * T + (w << a.window_bits) + first + group.lane] = score;
        }
    }
    if (a.pooled != nullptr && group.active) {
        sum.scale(1.0f / (float)window);  // a power of two: exact
        store128(a.pooled + (group.index * a.num_heads + group.head) * shape.D + group.lane * 8, sum.pack());
    }
}

inline void launch_lighthouse_pool(const LighthousePoolArguments& a, cudaStream_t stream) {
    launch_row_groups(a.shape.B * (a.shape.geometry.T >> a.window_bits), a.num_heads, a.shape.D,
                      [&](auto row_lanes, unsigned blocks) {
                          lighthouse_pool_kernel<decltype(row_lanes)::value>
                              <<<blocks, LIGHTHOUSE_ROW_THREADS, 0, stream>>>(a);
                      });
    CUDA_CHECK_LAUNCH();
}

// pooled (=) [B, T / c, H + 2 Hkv, D] bf16: float32 means, rounded once. scores (=) [B, H + Hkv, T] float32: the norms
// of q's heads, then k's; nullptr leaves them out. qkv: q [B, T, H, D], k and v [B, T, Hkv, D].
inline void lighthouse_pool(bf16* pooled, float* scores, const QkvHeads<const bf16>& qkv, const LighthouseShape& shape,
                            cudaStream_t stream) {
    NVTX_RANGE();
    const LighthouseGeometry& g = shape.geometry;
    launch_lighthouse_pool(
        {pooled, scores, qkv, shape, shape.num_heads(), scores ? shape.H + shape.Hkv : 0, g.window_bits(g.levels - 1)},
        stream);
}

// scores (=) [B, H, T] float32: the l2 norms of the rows of x [B, T, H, D].
inline void lighthouse_norms(float* scores, HeadView<const bf16> x, const LighthouseShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    launch_lighthouse_pool({nullptr, scores, {x, {}, {}}, shape, shape.H, shape.H, shape.geometry.window_bits(1)},
                           stream);
}
