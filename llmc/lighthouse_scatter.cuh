// lighthouse_scatter.cuh: from the sub-sequence back to the tokens. The output of entry (l, i), window c = pool^l, is
// added to tokens [i c + c - 1, i c + 2c - 2] (Eq. 10, 11). Read from the token: token j takes, from each level l with
// j >= c - 1, entry (j + 1) / c - 1 where it is present: at most `levels` terms in a fixed order, each output written
// once, no atomics. Backward, an entry takes the sum of the gradients of its tokens.
// Shapes: out, dout [B, T, H, D]; x, dx [B, S, H, D]; positions [B, Hkv, num_slots]; entries [B, Hkv, S].
// Cost: memory bound. Forward reads S rows (again from L2) and writes T; backward reads T rows and writes S.
// Reference: reference/lighthouse.h. Variants: dev/cuda/lighthouse_scatter.cu.
#pragma once
#include "lighthouse_rows.cuh"

// ---- forward -----------------------------------------------------------------------------------
struct LighthouseScatterArguments {
    HeadView<bf16> out;
    HeadView<const bf16> x;
    const int32_t* positions;
    LighthouseShape shape;
};

// Launch: one group of ROW_LANES lanes a (run, head), heads fastest; 1-D grid. Run r is the tokens j with
// (j + 1) / pool = r: they share their entries of every level above 0, which are added up once. There are T / pool + 1
// runs, the first one token short and the last a single token. Memory bound.
template <int ROW_LANES>
__global__ void __launch_bounds__(LIGHTHOUSE_ROW_THREADS)
    lighthouse_scatter_kernel(const __grid_constant__ LighthouseScatterArguments a) {
    const LighthouseShape& shape = a.shape;
    const LighthouseGeometry& g = shape.geometry;
    const int64_t num_runs = g.level_size(1) + 1;
    const RowGroup<ROW_LANES> group(shape.B * num_runs, shape.H, shape.D);
    if (!group.active) {
        return;
    }
    const int64_t b = group.index / num_runs, run = group.index - b * num_runs;
    const int32_t* positions = a.positions + (b * shape.Hkv + lighthouse_kv_head(shape, group.head)) * g.num_slots;
    const HeadView<const bf16> x = head_of(a.x, group.head);
    const HeadView<bf16> out = head_of(a.out, group.head);
    FloatRow shared_sum;
    int64_t offset = g.T;
    for (int level = 1; level < g.levels; ++level) {
        const int64_t index = (run >> g.window_bits(level - 1)) - 1;
        const int32_t n = index >= 0 ? positions[offset + index] : -1;
        if (n >= 0) {
            shared_sum.add(load128(x.row(b, n, 0) + group.lane * 8));
        }
        offset += g.level_size(level);
    }
    const int64_t first = (run << g.log2_pool) - 1;
    add_token_rows(positions, max(first, (int64_t)0), min(first + g.pool, g.T), shared_sum, x, out, b, group.lane);
}

// out (=) [B, T, H, D] from x [B, S, H, D]: float32 sums, rounded once.
inline void lighthouse_scatter(HeadView<bf16> out, HeadView<const bf16> x, const int32_t* positions,
                               const LighthouseShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    const LighthouseScatterArguments arguments = {out, x, positions, shape};
    launch_row_groups(shape.B * (shape.geometry.level_size(1) + 1), shape.H, shape.D,
                      [&](auto row_lanes, unsigned blocks) {
                          lighthouse_scatter_kernel<decltype(row_lanes)::value>
                              <<<blocks, LIGHTHOUSE_ROW_THREADS, 0, stream>>>(arguments);
                      });
    CUDA_CHECK_LAUNCH();
}

// ---- backward ----------------------------------------------------------------------------------
constexpr int LIGHTHOUSE_SCATTER_ROWS = 4;   // gathered rows of one head that a group of lanes makes
constexpr int LIGHTHOUSE_SCATTER_CHUNK = 4;  // further tokens of one of them in flight

struct LighthouseScatterBackwardArguments {
    HeadView<bf16> dx;
    HeadView<const bf16> dout;
    const int32_t* entries;
    LighthouseShape shape;
    int64_t num_strips;  // of LIGHTHOUSE_SCATTER_ROWS rows a sequence
};

// Launch: one group of ROW_LANES lanes for LIGHTHOUSE_SCATTER_ROWS rows of a head, heads fastest; 1-D grid. Memory
// bound.
template <int ROW_LANES>
__global__ void __launch_bounds__(LIGHTHOUSE_ROW_THREADS)
    lighthouse_scatter_backward_kernel(const __grid_constant__ LighthouseScatterBackwardArguments a) {
    const LighthouseShape& shape = a.shape;
    const LighthouseGeometry& g = shape.geometry;
    const RowGroup<ROW_LANES> group(shape.B * a.num_strips, shape.H, shape.D);
    if (!group.active) {
        return;
    }
    const int64_t b = group.index / a.num_strips,
                  first_row = (group.index - b * a.num_strips) * LIGHTHOUSE_SCATTER_ROWS;
    const int32_t* entries = a.entries + (b * shape.Hkv + lighthouse_kv_head(shape, group.head)) * g.S;
    RowWindow windows[LIGHTHOUSE_SCATTER_ROWS];
#pragma unroll
    for (int i = 0; i < LIGHTHOUSE_SCATTER_ROWS; ++i) {
        if (first_row + i < g.S) {
            int64_t index = entries[first_row + i];
            const int64_t window = g.window(g.level_of_slot(index)), first = (index + 1) * window - 1;
            // The last entry of a level would reach past the end.
            windows[i] = {a.dout.row(b, first, group.head) + group.lane * 8, (int)min(window, g.T - first)};
        }
    }
    sum_row_windows<LIGHTHOUSE_SCATTER_CHUNK>(windows, a.dout.stride_t, [&](int i, const FloatRow& sum) {
        store128(a.dx.row(b, first_row + i, group.head) + group.lane * 8, sum.pack());
    });
}

// dx (=) [B, S, H, D] from dout [B, T, H, D]: float32 sums, rounded once.
inline void lighthouse_scatter_backward(HeadView<bf16> dx, HeadView<const bf16> dout, const int32_t* entries,
                                        const LighthouseShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    const int64_t num_strips = ceil_div<int64_t>(shape.geometry.S, LIGHTHOUSE_SCATTER_ROWS);
    const LighthouseScatterBackwardArguments arguments = {dx, dout, entries, shape, num_strips};
    launch_row_groups(shape.B * num_strips, shape.H, shape.D, [&](auto row_lanes, unsigned blocks) {
        lighthouse_scatter_backward_kernel<decltype(row_lanes)::value>
            <<<blocks, LIGHTHOUSE_ROW_THREADS, 0, stream>>>(arguments);
    });
    CUDA_CHECK_LAUNCH();
}
