// lighthouse_border.cuh: what Lighthouse attention of a chunk owes to its neighbours when a sequence is cut into chunks
// (context parallelism). Pooling, scores, selection and gather stay within a chunk. Of the scatter, the last entry of
// every level above 0 is also added to the first c - 1 tokens of the chunk that follows, c the level's window: levels -
// 1 rows a head go to the next chunk forward, and the gradients of as many come back. After lighthouse_scatter, which
// knows nothing of neighbours, the few tokens and entries at a border are made again with what came from there.
// Shapes: B chunks, each a sequence of `shape`; out, dout [B, T, H, D], x, dx [B, S, H, D], positions
// [B, Hkv, num_slots]; border rows [B, levels - 1, H, D], level 1 first: bf16 forward, float32 sums backward.
// Cost: latency; a few dozen rows a head. Reference: reference/lighthouse_border.h.
#pragma once
#include "comm.cuh"             // the exchange
#include "context_rows.cuh"     // rows in launches
#include "lighthouse_rows.cuh"  // the layer's shape

struct LighthouseBorderArguments {
    HeadView<const bf16> tokens;   // dout
    HeadView<const bf16> entries;  // x
    HeadView<bf16> out;            // of tokens or of entries
    const int32_t* positions;
    LighthouseShape shape;
};

// The row of the sub-sequence that holds entry `index` of `level`; -1: absent.
__device__ inline int32_t lighthouse_border_row(const LighthouseBorderArguments& a, int64_t b, int head, int level,
                                                int64_t index) {
    const LighthouseGeometry& g = a.shape.geometry;
    const int64_t selection = b * a.shape.Hkv + head / (a.shape.H / a.shape.Hkv);
    return a.positions[selection * g.num_slots + g.slot(level, index)];
}
// Element d of a border row.
__device__ inline int64_t lighthouse_border_offset(const LighthouseShape& shape, int64_t b, int level, int head,
                                                   int d) {
    return ((b * (shape.geometry.levels - 1) + level - 1) * shape.H + head) * shape.D + d;
}
inline RowBlock lighthouse_border_rows(const LighthouseShape& shape) {
    return {shape.B, shape.geometry.levels - 1, shape.H, shape.D};
}
inline int64_t lighthouse_border_elements(const LighthouseShape& shape) {
    return lighthouse_border_rows(shape).count() * shape.D;
}

// ---- forward -----------------------------------------------------------------------------------
// Launch: one row a (chunk, level above 0, head).
__global__ void __launch_bounds__(ROW_THREADS)
    lighthouse_border_kernel(bf16* border, const __grid_constant__ LighthouseBorderArguments a, RowBlock rows) {
    const RowPlace place(rows);
    if (place.active) {
        const int level = 1 + (int)place.t;
        const int32_t n = lighthouse_border_row(a, place.b, place.h, level, a.shape.geometry.level_size(level) - 1);
        const bf16x8 row = n >= 0 ? load128(a.entries.row(place.b, n, place.h) + place.d) : bf16x8{};
        store128(border + lighthouse_border_offset(a.shape, place.b, level, place.h, place.d), row);
    }
}
// border (=) what each chunk passes on: the rows of its last entries, zero where absent.
inline void lighthouse_border(bf16* border, HeadView<const bf16> x, const int32_t* positions,
                              const LighthouseShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    launch_rows(lighthouse_border_kernel, lighthouse_border_rows(shape), stream, border,
                LighthouseBorderArguments{{}, x, {}, positions, shape});
}

// Launch: one row a (chunk, token of the first c - 1 of the coarsest level, head). In the order of lighthouse_scatter,
// so with the bits of a sequence that is not cut.
__global__ void __launch_bounds__(ROW_THREADS)
    lighthouse_border_scatter_kernel(const __grid_constant__ LighthouseBorderArguments a, const bf16* before,
                                     RowBlock rows) {
    const RowPlace place(rows);
    if (!place.active) {
        return;
    }
    const LighthouseGeometry& g = a.shape.geometry;
    EightFloats sum{};
    for (int l = 1; l <= g.levels; ++l) {
        const int level = l % g.levels;  // level 0 comes last
        const int64_t index = ((place.t + 1) >> g.window_bits(level)) - 1;
        if (index < 0) {
            add_eight(sum, before + lighthouse_border_offset(a.shape, place.b, level, place.h, place.d));
            continue;
        }
        const int32_t n = lighthouse_border_row(a, place.b, place.h, level, index);
        if (n >= 0) {
            add_eight(sum, a.entries.row(place.b, n, place.h) + place.d);
        }
    }
    store_eight(a.out.row(place.b, place.t, place.h) + place.d, sum);
}
// out (=) the first tokens of every chunk, those that take rows of the chunk before: `before`, zero at a sequence's
// start.
inline void lighthouse_border_scatter(HeadView<bf16> out, HeadView<const bf16> x, const int32_t* positions,
                                      const bf16* before, const LighthouseShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    const LighthouseGeometry& g = shape.geometry;
    const RowBlock rows(shape.B, g.window(g.levels - 1) - 1, shape.H, shape.D);
    launch_rows(lighthouse_border_scatter_kernel, rows, stream, LighthouseBorderArguments{{}, x, out, positions, shape},
                before);
}

// ---- backward ----------------------------------------------------------------------------------
// Launch: one row a (chunk, level above 0, head), which adds the c - 1 rows of its tokens.
__global__ void __launch_bounds__(ROW_THREADS)
    lighthouse_border_backward_kernel(float* dborder, const __grid_constant__ LighthouseBorderArguments a,
                                      RowBlock rows) {
    const RowPlace place(rows);
    if (!place.active) {
        return;
    }
    const int level = 1 + (int)place.t;
    EightFloats sum{};
    for (int64_t t = 0; t < a.shape.geometry.window(level) - 1; ++t) {
        add_eight(sum, a.tokens.row(place.b, t, place.h) + place.d);
    }
    store_eight(dborder + lighthouse_border_offset(a.shape, place.b, level, place.h, place.d), sum);
}
// dborder (=) what each chunk sends back: float32 sums of dout over the tokens that took a row from before.
inline void lighthouse_border_backward(float* dborder, HeadView<const bf16> dout, const LighthouseShape& shape,
                                       cudaStream_t stream) {
    NVTX_RANGE();
    launch_rows(lighthouse_border_backward_kernel, lighthouse_border_rows(shape), stream, dborder,
                LighthouseBorderArguments{dout, {}, {}, nullptr, shape});
}

// Launch: one row a (chunk, level above 0, head).
__global__ void __launch_bounds__(ROW_THREADS)
    lighthouse_border_scatter_backward_kernel(const __grid_constant__ LighthouseBorderArguments a, const float* after,
                                              RowBlock rows) {
    const RowPlace place(rows);
    if (!place.active) {
        return;
    }
    const LighthouseGeometry& g = a.shape.geometry;
    const int level = 1 + (int)place.t;
    const int32_t n = lighthouse_border_row(a, place.b, place.h, level, g.level_size(level) - 1);
    if (n < 0) {
        return;
    }
    EightFloats sum = load_eight(a.tokens.row(place.b, g.T - 1, place.h) + place.d);
    add_eight(sum, after + lighthouse_border_offset(a.shape, place.b, level, place.h, place.d));
    store_eight(a.out.row(place.b, n, place.h) + place.d, sum);
}
// dx (=) the rows of the last entries of every chunk, from its last token and what the chunk after sends back: `after`,
// zero at a sequence's end.
inline void lighthouse_border_scatter_backward(HeadView<bf16> dx, HeadView<const bf16> dout, const int32_t* positions,
                                               const float* after, const LighthouseShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    launch_rows(lighthouse_border_scatter_backward_kernel, lighthouse_border_rows(shape), stream,
                LighthouseBorderArguments{dout, {}, dx, positions, shape}, after);
}

// ---- the exchange ------------------------------------------------------------------------------
// in (=) what the neighbours of the local chunks have in their `out`; zero where there is none. Both [B sequences,
// 2 halves, chunk_elements]. from, to: chunk_before and its opposite chunk_after forward, the other way round backward.
using ChunkNeighbour = std::optional<ChunkPlace> (*)(const ContextPartition&, int half);
template <class Element>
void exchange_borders(Comm& context, Element* in, const Element* out, int64_t chunk_elements, int B,
                      ChunkNeighbour from, ChunkNeighbour to, const char* operation, cudaStream_t stream) {
    const ContextPartition p = make_context_partition(HALVES * context.size(), context.size(), context.rank());
    const size_t num_bytes = chunk_elements * sizeof(Element);
    CUDA_CHECK(cudaMemsetAsync(in, 0, HALVES * B * num_bytes, stream));
    std::vector<DeviceSend> sends;
    std::vector<DeviceReceive> receives;
    for (int b = 0; b < B; ++b) {
        for (int half = 0; half < HALVES; ++half) {
            const int64_t chunk = b * HALVES + half;
            if (const std::optional<ChunkPlace> place = to(p, half)) {
                sends.push_back({place->rank, out + chunk * chunk_elements, num_bytes});
            }
            if (const std::optional<ChunkPlace> place = from(p, half)) {
                receives.push_back({place->rank, in + chunk * chunk_elements, num_bytes});
            }
        }
    }
    context.exchange(sends, receives, operation, stream);
}
