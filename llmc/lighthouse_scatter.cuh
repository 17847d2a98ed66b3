// lighthouse_scatter.cuh: from the sub-sequence back to the tokens. The output of entry (l, i), window c = pool^l, is
// added to tokens [i c + c - 1, i c + 2c - 2] (Eq. 10, 11). Read from the token: token j takes, from each level l with
// j >= c - 1, entry (j + 1) / c - 1 where it is present: at most `levels` terms in a fixed order, each output written
// once, no atomics. Backward, an entry takes the sum of the gradients of its tokens.
// Shapes: out, dout [B, T, H, D]; x, dx [B, S, H, D]; positions [B, Hkv, num_slots] from lighthouse_select.
// Cost: memory bound. Forward reads S rows (again from L2) and writes T; backward reads T rows and writes S.
// Reference: reference/lighthouse.h. Variants: dev/cuda/lighthouse_scatter.cu.
#pragma once
#include "lighthouse_rows.cuh"

struct LighthouseScatterArguments {
    HeadView<bf16> out;       // forward: [B, T, H, D], backward: [B, S, H, D]
    HeadView<const bf16> in;  // forward: [B, S, H, D], backward: [B, T, H, D]
    const int32_t* positions;
    LighthouseShape shape;
    LighthouseLevels levels;
    RowGrid grid;
};

// ---- forward -----------------------------------------------------------------------------------
// Launch: one group of ROW_LANES lanes for as many tokens of a head; 1-D grid. Memory bound.
template <int ROW_LANES, int MAX_LEVELS>
__global__ void __launch_bounds__(LIGHTHOUSE_ROW_THREADS, entries_to_tokens_blocks(MAX_LEVELS))
    lighthouse_scatter_kernel(const __grid_constant__ LighthouseScatterArguments a) {
    const LighthouseShape& shape = a.shape;
    const RowGroup<ROW_LANES> group(a.grid, shape.D);
    const int64_t selection = group.b * shape.Hkv + lighthouse_kv_head(shape, group.head);
    add_entries_to_tokens<ROW_LANES, MAX_LEVELS, EntryOf::shifted_window>(
        a.levels, group, a.positions + selection * a.levels.num_slots, a.in.row(group.b, 0, group.head), a.in.stride_t,
        a.out.row(group.b, 0, group.head), a.out.stride_t, AdjacentColumns());
}

// out (=) [B, T, H, D] from x [B, S, H, D]: float32 sums, rounded once.
inline void lighthouse_scatter(HeadView<bf16> out, HeadView<const bf16> x, const int32_t* positions,
                               const LighthouseShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    const LighthouseGeometry& g = shape.geometry;
    launch_row_groups(g.T + 1, 0, shape.H, shape,
                      [&](auto row_lanes, auto max_levels, const RowGrid& grid, unsigned blocks) {
                          const LighthouseScatterArguments a = {out, x, positions, shape, LighthouseLevels(g), grid};
                          lighthouse_scatter_kernel<decltype(row_lanes)::value, decltype(max_levels)::value>
                              <<<blocks, LIGHTHOUSE_ROW_THREADS, 0, stream>>>(a);
                      });
    CUDA_CHECK_LAUNCH();
}

// ---- backward ----------------------------------------------------------------------------------
// Launch: one group of ROW_LANES lanes a piece of max(c, LIGHTHOUSE_CHUNK) places of a head, and one more: the shifted
// window of the last entry of every level holds the last token alone. 1-D grid. Memory bound.
template <int ROW_LANES, int MAX_LEVELS>
__global__ void __launch_bounds__(LIGHTHOUSE_ROW_THREADS, tokens_to_entries_blocks(MAX_LEVELS))
    lighthouse_scatter_backward_kernel(const __grid_constant__ LighthouseScatterArguments a) {
    const LighthouseShape& shape = a.shape;
    const LighthouseLevels& g = a.levels;
    RowGroup<ROW_LANES> group(a.grid, shape.D);
    const int32_t* positions =
        a.positions + (group.b * shape.Hkv + lighthouse_kv_head(shape, group.head)) * (int64_t)g.num_slots;
    const bf16* in = a.in.row(group.b, 0, group.head) + group.lane * 8;
    bf16* out = a.out.row(group.b, 0, group.head) + group.lane * 8;
    if (group.piece == a.grid.num_pieces - 1) {
        for (int level = 0; level < g.levels; ++level) {
            const int n = positions[g.offset[level] + g.size[level] - 1];
            if (n >= 0 && group.columns) {
                store128(out + n * a.out.stride_t, load128(in + (int64_t)(g.T - 1) * a.in.stride_t));
            }
        }
        group.exists = group.columns = false;
    }
    // Place 0 is no token, nor are those from T on: the last token's is T, done above.
    const auto wanted = [&](int first) {
        return (first == 0 ? ~1u : ~0u) & ((1u << min(max(g.T - first, 0), 31)) - 1);
    };
    add_tokens_to_entries<ROW_LANES, MAX_LEVELS, EntryOf::shifted_window>(
        g, group, g.levels, a.grid.piece_tokens, positions, in, a.in.stride_t, out, a.out.stride_t, wanted);
}

// dx (=) [B, S, H, D] from dout [B, T, H, D]: float32 sums, rounded once.
inline void lighthouse_scatter_backward(HeadView<bf16> dx, HeadView<const bf16> dout, const int32_t* positions,
                                        const LighthouseShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    const LighthouseGeometry& g = shape.geometry;
    const int piece_tokens = lighthouse_piece_tokens(g);
    launch_row_groups(g.T + piece_tokens, piece_tokens, shape.H, shape,
                      [&](auto row_lanes, auto max_levels, const RowGrid& grid, unsigned blocks) {
                          const LighthouseScatterArguments a = {dx, dout, positions, shape, LighthouseLevels(g), grid};
                          lighthouse_scatter_backward_kernel<decltype(row_lanes)::value, decltype(max_levels)::value>
                              <<<blocks, LIGHTHOUSE_ROW_THREADS, 0, stream>>>(a);
                      });
    CUDA_CHECK_LAUNCH();
}
