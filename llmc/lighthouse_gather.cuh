// lighthouse_gather.cuh: the rows of the sub-sequence, and back. Row n of q~, k~, v~ is the mean of q, k, v over the
// window of entry n; backward, token j takes from every level the gradient of the entry that holds it, over its window.
// Shapes: out q [B, S, H, D], k and v [B, S, Hkv, D]; qkv the same with T for S; pooled [B, T / c, H + 2 Hkv, D] from
// lighthouse_pool: the coarsest entries are copied from it, the finer averaged from tokens.
// Cost: memory bound. Forward reads the tokens under selected coarsest entries (neighbouring entries find them in L2),
// reads and writes S rows; backward reads S rows and writes T.
// Reference: reference/lighthouse.h. Variants: dev/cuda/lighthouse_gather.cu, dev/cuda/lighthouse_scatter.cu.
#pragma once
#include "lighthouse_rows.cuh"

// ---- forward -----------------------------------------------------------------------------------
constexpr int LIGHTHOUSE_GATHER_ROWS = 4;   // gathered rows of one head that a group of lanes makes
constexpr int LIGHTHOUSE_GATHER_CHUNK = 4;  // further tokens of one of them in flight

struct LighthouseGatherArguments {
    QkvHeads<bf16> out;
    QkvHeads<const bf16> qkv;
    const bf16* pooled;
    const int32_t* entries;
    LighthouseShape shape;
    int64_t num_strips;  // of LIGHTHOUSE_GATHER_ROWS rows a sequence
};

// Launch: one group of ROW_LANES lanes for LIGHTHOUSE_GATHER_ROWS rows of a head, heads fastest; 1-D grid. Memory
// bound.
template <int ROW_LANES>
__global__ void __launch_bounds__(LIGHTHOUSE_ROW_THREADS)
    lighthouse_gather_kernel(const __grid_constant__ LighthouseGatherArguments a) {
    const LighthouseShape& shape = a.shape;
    const LighthouseGeometry& g = shape.geometry;
    const int num_heads = shape.num_heads();
    const RowGroup<ROW_LANES> group(shape.B * a.num_strips, num_heads, shape.D);
    if (!group.active) {
        return;
    }
    const int64_t b = group.index / a.num_strips, first_row = (group.index - b * a.num_strips) * LIGHTHOUSE_GATHER_ROWS;
    const int32_t* entries = a.entries + (b * shape.Hkv + lighthouse_kv_head(shape, group.head)) * g.S;
    const HeadView<const bf16> view = a.qkv.head(shape, group.head);
    RowWindow windows[LIGHTHOUSE_GATHER_ROWS];
    float shares[LIGHTHOUSE_GATHER_ROWS];
#pragma unroll
    for (int i = 0; i < LIGHTHOUSE_GATHER_ROWS; ++i) {
        if (first_row + i >= g.S) {
            continue;
        }
        int64_t index = entries[first_row + i];
        const int level = g.level_of_slot(index);
        if (level == g.levels - 1) {
            const int64_t pooled_row = (b * g.level_size(level) + index) * num_heads + group.head;
            windows[i] = {a.pooled + pooled_row * shape.D + group.lane * 8, 1};
            shares[i] = 1.0f;
        } else {
            const int window = 1 << g.window_bits(level);
            windows[i] = {view.row(b, index << g.window_bits(level), 0) + group.lane * 8, window};
            shares[i] = 1.0f / (float)window;  // a power of two: exact
        }
    }
    const HeadView<bf16> out = a.out.head(shape, group.head);
    sum_row_windows<LIGHTHOUSE_GATHER_CHUNK>(windows, view.stride_t, [&](int i, FloatRow& sum) {
        sum.scale(shares[i]);
        store128(out.row(b, first_row + i, 0) + group.lane * 8, sum.pack());
    });
}

// out (=) the rows of the sub-sequence, bf16 of float32 means, for every entry of entries [B, Hkv, S].
inline void lighthouse_gather(const QkvHeads<bf16>& out, const QkvHeads<const bf16>& qkv, const bf16* pooled,
                              const int32_t* entries, const LighthouseShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    const int64_t num_strips = ceil_div<int64_t>(shape.geometry.S, LIGHTHOUSE_GATHER_ROWS);
    const LighthouseGatherArguments arguments = {out, qkv, pooled, entries, shape, num_strips};
    launch_row_groups(shape.B * num_strips, shape.num_heads(), shape.D, [&](auto row_lanes, unsigned blocks) {
        lighthouse_gather_kernel<decltype(row_lanes)::value><<<blocks, LIGHTHOUSE_ROW_THREADS, 0, stream>>>(arguments);
    });
    CUDA_CHECK_LAUNCH();
}

// ---- backward ----------------------------------------------------------------------------------
struct LighthouseGatherBackwardArguments {
    QkvHeads<bf16> dqkv;
    QkvHeads<const bf16> dout;
    const int32_t* positions;
    LighthouseShape shape;
};

// Launch: one group of ROW_LANES lanes a (level-1 window, head), heads fastest; 1-D grid. The pool tokens of a level-1
// window share every entry but their own, so those are added up once. Memory bound.
template <int ROW_LANES>
__global__ void __launch_bounds__(LIGHTHOUSE_ROW_THREADS)
    lighthouse_gather_backward_kernel(const __grid_constant__ LighthouseGatherBackwardArguments a) {
    const LighthouseShape& shape = a.shape;
    const LighthouseGeometry& g = shape.geometry;
    const int64_t num_windows = g.level_size(1);
    const RowGroup<ROW_LANES> group(shape.B * num_windows, shape.num_heads(), shape.D);
    if (!group.active) {
        return;
    }
    const int64_t b = group.index / num_windows, window = group.index - b * num_windows;
    const int32_t* positions = a.positions + (b * shape.Hkv + lighthouse_kv_head(shape, group.head)) * g.num_slots;
    const HeadView<const bf16> dout = a.dout.head(shape, group.head);
    const HeadView<bf16> dqkv = a.dqkv.head(shape, group.head);
    FloatRow shared_sum;
    int64_t offset = g.T;
    float share = 1.0f / (float)g.pool;
    for (int level = 1; level < g.levels; ++level) {
        const int32_t n = positions[offset + (window >> g.window_bits(level - 1))];
        if (n >= 0) {
            FloatRow row;
            row.add(load128(dout.row(b, n, 0) + group.lane * 8));
            row.scale(share);  // a power of two: exact
            shared_sum.add(row);
        }
        offset += g.level_size(level);
        share /= (float)g.pool;
    }
    add_token_rows(positions, window << g.log2_pool, (window + 1) << g.log2_pool, shared_sum, dout, dqkv, b,
                   group.lane);
}

// dqkv (=) [B, T, ...] from dout, the gradients of the gathered rows [B, S, ...], by positions [B, Hkv, num_slots].
inline void lighthouse_gather_backward(const QkvHeads<bf16>& dqkv, const QkvHeads<const bf16>& dout,
                                       const int32_t* positions, const LighthouseShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    const LighthouseGatherBackwardArguments arguments = {dqkv, dout, positions, shape};
    launch_row_groups(shape.B * shape.geometry.level_size(1), shape.num_heads(), shape.D,
                      [&](auto row_lanes, unsigned blocks) {
                          lighthouse_gather_backward_kernel<decltype(row_lanes)::value>
                              <<<blocks, LIGHTHOUSE_ROW_THREADS, 0, stream>>>(arguments);
                      });
    CUDA_CHECK_LAUNCH();
}
