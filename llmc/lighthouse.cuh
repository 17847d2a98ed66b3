// lighthouse.cuh: Lighthouse attention (arXiv:2605.06554), the layer that stands in for dense attention in the first
// stage of training: pool and score -> select -> gather -> flash attention on the sub-sequence -> scatter, and back.
// It has no parameters. Every launch is on one stream, nothing waits for the host, nothing is allocated: the caller
// plans three areas, whose sizes are exact functions of the shape.
// Shapes: q, out [B, T, H, D]; k, v [B, T, Hkv, D], after RoPE, each a HeadView, so packed qkv is read in place. S rows
// are gathered for every key/value head, S = T / p^(L-1) + (L-1) p k.
// Reference: reference/lighthouse.h. Checked and timed by dev/cuda/lighthouse_layer.cu.
#pragma once
#include "flash_attention.cuh"     // the inner attention
#include "lighthouse_gather.cuh"   // tokens to sub-sequence
#include "lighthouse_pool.cuh"     // scores and coarsest means
#include "lighthouse_scatter.cuh"  // sub-sequence to tokens
#include "lighthouse_select.cuh"   // which entries, in which order
#include "memory.cuh"              // pieces of an area

inline LighthouseShape make_lighthouse_shape(const LighthouseGeometry& geometry, const LighthouseConfig& config, int B,
                                             int H, int Hkv, int D, float scale) {
    CHECK(B >= 1 && Hkv >= 1 && H % Hkv == 0, "Lighthouse attention: %d query heads on %d key/value heads", H, Hkv);
    LighthouseShape shape;
    shape.geometry = geometry;
    shape.B = B, shape.H = H, shape.Hkv = Hkv, shape.D = D;
    shape.scale = scale;
    shape.scorer = config.scorer, shape.dilation = config.dilation;
    return shape;
}

// ---- memory --------------------------------------------------------------------------------------
// What forward leaves for backward, in the area `saved`.
struct LighthouseSaved {
    int32_t* entries;    // [B, Hkv, S] pyramid address of each gathered row
    int32_t* positions;  // [B, Hkv, num_slots] gathered row of each pyramid address, -1: absent
    bf16* q;             // [B, S, H, D]
    bf16* k;             // [B, S, Hkv, D]
    bf16* v;             // [B, S, Hkv, D]
    bf16* out;           // [B, S, H, D], the inner attention's
    float* lse;          // [B, H, S]

    LighthouseSaved(MemoryArea& area, const LighthouseShape& shape) {
        const LighthouseGeometry& g = shape.geometry;
        const int64_t q_elements = shape.B * g.S * shape.H * shape.D, k_elements = shape.B * g.S * shape.Hkv * shape.D;
        entries = area.take<int32_t>(shape.num_selections() * g.S);
        positions = area.take<int32_t>(shape.num_selections() * g.num_slots);
        q = area.take<bf16>(q_elements);
        k = area.take<bf16>(k_elements);
        v = area.take<bf16>(k_elements);
        out = area.take<bf16>(q_elements);
        lse = area.take<float>((int64_t)shape.B * shape.H * g.S);
    }
};

// Forward's scratch.
struct LighthouseForwardScratch {
    LighthouseScores scores;    // of H + Hkv heads, query heads first; with the dilated scorer of H query heads
    LighthouseScores k_scores;  // the dilated scorer's of H key heads
    void* select_scratch;
    bf16* pooled;        // [B, T / p^(L-1), H + 2 Hkv, D]
    bf16* dilated_out;   // [T, H, D], one sequence at a time
    float* dilated_lse;  // [dilation, H, T / dilation]

    LighthouseForwardScratch(MemoryArea& area, const LighthouseShape& shape) {
        const LighthouseGeometry& g = shape.geometry;
        const bool dilated = shape.scorer == LighthouseScorer::dilated;
        const int64_t num_coarsest = g.level_size(g.levels - 1), B = shape.B, H = shape.H;
        const int64_t heads = dilated ? H : H + shape.Hkv;
        scores = {area.take<float>(B * heads * g.T), area.take<float>(B * heads * num_coarsest)};
        if (dilated) {
            k_scores = {area.take<float>(B * H * g.T), area.take<float>(B * H * num_coarsest)};
        }
        select_scratch = area.take<unsigned char>((int64_t)lighthouse_select_scratch_bytes(shape));
        pooled = area.take<bf16>(B * num_coarsest * shape.num_heads() * shape.D);
        dilated_out = dilated ? area.take<bf16>(g.T * H * shape.D) : nullptr;
        dilated_lse = dilated ? area.take<float>(g.T * H) : nullptr;
    }

    // What select reads.
    LighthouseHeadScores q_heads(const LighthouseShape& shape) const {
        const bool dilated = shape.scorer == LighthouseScorer::dilated;
        return {scores.tokens, scores.coarsest, dilated ? shape.H : shape.H + shape.Hkv, shape.H / shape.Hkv};
    }
    LighthouseHeadScores k_heads(const LighthouseShape& shape) const {
        const LighthouseGeometry& g = shape.geometry;
        if (shape.scorer == LighthouseScorer::dilated) {
            return {k_scores.tokens, k_scores.coarsest, shape.H, shape.H / shape.Hkv};
        }
        return {scores.tokens + shape.H * g.T, scores.coarsest + shape.H * g.level_size(g.levels - 1),
                shape.H + shape.Hkv, 1};
    }
};

inline AttentionShape lighthouse_inner_shape(const LighthouseShape& shape) {
    AttentionShape inner;
    inner.B = shape.B, inner.H = shape.H, inner.Hkv = shape.Hkv, inner.D = shape.D;
    inner.Tq = inner.Tk = shape.geometry.S;
    inner.scale = shape.scale;
    return inner;
}

// Backward's scratch: the gradients of the gathered rows, and the inner attention's own.
struct LighthouseBackwardScratch {
    bf16* dout;  // [B, S, H, D]
    bf16* dq;    // [B, S, H, D]
    bf16* dk;    // [B, S, Hkv, D]
    bf16* dv;    // [B, S, Hkv, D]
    void* attention_scratch;

    LighthouseBackwardScratch(MemoryArea& area, const LighthouseShape& shape, bool deterministic) {
        const int64_t rows = shape.B * shape.geometry.S;
        dout = area.take<bf16>(rows * shape.H * shape.D);
        dq = area.take<bf16>(rows * shape.H * shape.D);
        dk = area.take<bf16>(rows * shape.Hkv * shape.D);
        dv = area.take<bf16>(rows * shape.Hkv * shape.D);
        attention_scratch = area.take<unsigned char>(
            (int64_t)flash_attention_backward_scratch_bytes(lighthouse_inner_shape(shape), deterministic));
    }
};

// Bytes of the three areas: kept from forward to backward, and scratch of one call.
inline size_t lighthouse_saved_bytes(const LighthouseShape& shape) {
    MemoryArea area(nullptr);
    LighthouseSaved saved(area, shape);
    return area.num_bytes();
}
inline size_t lighthouse_forward_scratch_bytes(const LighthouseShape& shape) {
    MemoryArea area(nullptr);
    LighthouseForwardScratch scratch(area, shape);
    return area.num_bytes();
}
inline size_t lighthouse_backward_scratch_bytes(const LighthouseShape& shape, bool deterministic) {
    MemoryArea area(nullptr);
    LighthouseBackwardScratch scratch(area, shape, deterministic);
    return area.num_bytes();
}

template <class Element>
HeadView<Element> lighthouse_gathered_view(Element* rows, int heads, const LighthouseShape& shape) {
    const int64_t width = (int64_t)heads * shape.D;
    return {rows, shape.geometry.S * width, width, shape.D};
}

// ---- the dilated scorer ----------------------------------------------------------------------------
// Tokens t = r, r + dilation, ... of a sequence form sequence r of a batch of `dilation`.
template <class Element>
HeadView<Element> lighthouse_dilated_view(HeadView<Element> view, int64_t b, int dilation) {
    return {view.row(b, 0, 0), view.stride_t, view.stride_t * dilation, view.stride_h};
}
// Every group-th head, from `member`.
template <class Element>
HeadView<Element> lighthouse_group_member(HeadView<Element> view, int member, int group) {
    return {view.row(0, 0, member), view.stride_b, view.stride_t, view.stride_h * group};
}

// scratch.scores, scratch.k_scores (=) of H heads: the norms of causal attention on every dilated sequence, as (q, k,
// v) and as (k, q, v). With grouped queries the key's role is played once for each query head of its group.
inline void lighthouse_dilated_scores(const LighthouseForwardScratch& scratch, const QkvHeads<const bf16>& qkv,
                                      const LighthouseShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    const int64_t T = shape.geometry.T;
    const int dilation = shape.dilation, group = shape.H / shape.Hkv;
    const HeadView<bf16> out = {scratch.dilated_out, 0, (int64_t)shape.H * shape.D, shape.D};
    LighthouseShape one_sequence = shape;
    one_sequence.B = 1;
    const auto scores_of = [&](const LighthouseScores& scores, int64_t b) -> LighthouseScores {
        const int64_t num_coarsest = shape.geometry.level_size(shape.geometry.levels - 1);
        return {scores.tokens + b * shape.H * T, scores.coarsest + b * shape.H * num_coarsest};
    };
    AttentionShape inner = lighthouse_inner_shape(shape);
    inner.B = dilation;
    inner.Tq = inner.Tk = T / dilation;
    for (int64_t b = 0; b < shape.B; ++b) {
        const auto dilated = [&](auto view, int64_t sequence) {
            return lighthouse_dilated_view(view, sequence, dilation);
        };
        const HeadView<const bf16> k = dilated(qkv.k, b), v = dilated(qkv.v, b);
        inner.H = shape.H;
        flash_attention_forward(dilated(out, 0), scratch.dilated_lse, dilated(qkv.q, b), k, v, inner, stream);
        lighthouse_norms(scores_of(scratch.scores, b), out, one_sequence, stream);
        inner.H = shape.Hkv;
        for (int member = 0; member < group; ++member) {
            flash_attention_forward(dilated(lighthouse_group_member(out, member, group), 0), scratch.dilated_lse, k,
                                    dilated(lighthouse_group_member(qkv.q, member, group), b), v, inner, stream);
        }
        lighthouse_norms(scores_of(scratch.k_scores, b), out, one_sequence, stream);
    }
}

// ---- forward -----------------------------------------------------------------------------------
// Scores, selection and gathered rows: saved.entries, positions, q, k and v (=) from qkv.
inline void lighthouse_gather_forward(const LighthouseSaved& saved, const LighthouseForwardScratch& scratch,
                                      const QkvHeads<const bf16>& qkv, const LighthouseShape& shape,
                                      cudaStream_t stream) {
    NVTX_RANGE();
    const int H = shape.H, Hkv = shape.Hkv;
    if (shape.scorer == LighthouseScorer::dilated) {
        lighthouse_dilated_scores(scratch, qkv, shape, stream);
        lighthouse_pool(scratch.pooled, {}, qkv, shape, stream);
    } else {
        lighthouse_pool(scratch.pooled, scratch.scores, qkv, shape, stream);
    }
    lighthouse_select(saved.entries, saved.positions, scratch.q_heads(shape), scratch.k_heads(shape),
                      scratch.select_scratch, shape, stream);
    const QkvHeads<bf16> gathered = {lighthouse_gathered_view(saved.q, H, shape),
                                     lighthouse_gathered_view(saved.k, Hkv, shape),
                                     lighthouse_gathered_view(saved.v, Hkv, shape)};
    lighthouse_gather(gathered, qkv, scratch.pooled, saved.positions, shape, stream);
}

// out (=) [B, T, H, D]; saved (=) lighthouse_saved_bytes that backward needs; scratch:
// lighthouse_forward_scratch_bytes. Both areas 256-byte aligned, of any content. Repeats bit for bit.
inline void lighthouse_forward(HeadView<bf16> out, void* saved, HeadView<const bf16> q, HeadView<const bf16> k,
                               HeadView<const bf16> v, void* scratch, const LighthouseShape& shape,
                               cudaStream_t stream) {
    NVTX_RANGE();
    MemoryArea saved_area(saved), scratch_area(scratch);
    const LighthouseSaved s(saved_area, shape);
    lighthouse_gather_forward(s, LighthouseForwardScratch(scratch_area, shape), {q, k, v}, shape, stream);
    const HeadView<bf16> inner_out = lighthouse_gathered_view(s.out, shape.H, shape);
    flash_attention_forward(inner_out, s.lse, lighthouse_gathered_view(s.q, shape.H, shape),
                            lighthouse_gathered_view(s.k, shape.Hkv, shape),
                            lighthouse_gathered_view(s.v, shape.Hkv, shape), lighthouse_inner_shape(shape), stream);
    lighthouse_scatter(out, inner_out, s.positions, shape, stream);
}

// out (=) [B, T, H, D]: what the forward that left `saved` gave, bit for bit, so that it need not be kept.
inline void lighthouse_output_again(HeadView<bf16> out, void* saved, const LighthouseShape& shape,
                                    cudaStream_t stream) {
    NVTX_RANGE();
    MemoryArea saved_area(saved);
    const LighthouseSaved s(saved_area, shape);
    lighthouse_scatter(out, lighthouse_gathered_view(s.out, shape.H, shape), s.positions, shape, stream);
}

// ---- backward ----------------------------------------------------------------------------------
// dq (=) [B, T, H, D], dk, dv (=) [B, T, Hkv, D] from dout [B, T, H, D] and what the same forward saved; scratch:
// lighthouse_backward_scratch_bytes, 256-byte aligned. No gradient flows through the selection. deterministic: as in
// flash_attention_backward; everything around it repeats bit for bit in any case. rotation: as in
// lighthouse_gather_backward.
inline void lighthouse_backward(HeadView<bf16> dq, HeadView<bf16> dk, HeadView<bf16> dv, HeadView<const bf16> dout,
                                void* saved, void* scratch, const LighthouseShape& shape, bool deterministic,
                                cudaStream_t stream, const RopeRotation* rotation = nullptr) {
    NVTX_RANGE();
    MemoryArea saved_area(saved), scratch_area(scratch);
    const LighthouseSaved s(saved_area, shape);
    const LighthouseBackwardScratch d(scratch_area, shape, deterministic);
    const auto q_view = [&](bf16* rows) { return lighthouse_gathered_view(rows, shape.H, shape); };
    const auto k_view = [&](bf16* rows) { return lighthouse_gathered_view(rows, shape.Hkv, shape); };
    lighthouse_scatter_backward(q_view(d.dout), dout, s.positions, shape, stream);
    flash_attention_backward(q_view(d.dq), k_view(d.dk), k_view(d.dv), q_view(d.dout), q_view(s.q), k_view(s.k),
                             k_view(s.v), q_view(s.out), s.lse, d.attention_scratch, lighthouse_inner_shape(shape),
                             deterministic, stream);
    lighthouse_gather_backward({dq, dk, dv}, {q_view(d.dq), k_view(d.dk), k_view(d.dv)}, s.positions, shape, stream,
                               rotation);
}
