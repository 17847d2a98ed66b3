// lighthouse_context.cuh: Lighthouse attention of sequences that lie on W ranks (context_partition.h), as one GPU
// computes it. A tile never crosses a chunk, so scores, selection and gather of a rank's two chunks are those of two
// shorter sequences and select the same entries as the whole sequence would. The chunks' sub-sequences, in order, are
// the whole one: attention over ranks works on S rows instead of T. Only the scatter looks over a chunk's border
// (lighthouse_border.cuh): a few rows a head go to the next chunk, and their gradients come back.
// The dilated scorer attends over the whole sequence, so it is not for several ranks.
// Shapes: the local rows of each sequence, head chunk then tail chunk: q, out [B, 2n, H, D]; k, v [B, 2n, Hkv, D], each
// a HeadView whose sequences follow one another. n: tokens of a chunk. Checked by dev/cuda/lighthouse_context.cu.
#pragma once
#include "context_attention.cuh"  // the inner attention
#include "lighthouse.cuh"         // the layer's stages
#include "lighthouse_border.cuh"  // rows passed over borders

// ---- shapes ------------------------------------------------------------------------------------
// The layer of a rank's chunks, B' = 2 B sequences, from that of the whole sequences.
inline LighthouseShape make_lighthouse_chunk_shape(const LighthouseShape& whole, const LighthouseConfig& config, int W,
                                                   int rank) {
    CHECK(whole.scorer == LighthouseScorer::norm,
          "Lighthouse attention over %d ranks: the dilated scorer needs the whole sequence on one", W);
    LighthouseShape chunks = whole;
    chunks.geometry = make_chunk_geometry(whole.geometry, config, W);
    chunks.B = HALVES * whole.B;
    chunks.chunks = HALVES;
    chunks.starts = rank == 0;
    return chunks;
}
// Of the local rows of the sub-sequences on each other.
inline AttentionShape lighthouse_context_inner_shape(const LighthouseShape& chunks) {
    AttentionShape local = lighthouse_inner_shape(chunks);
    local.B = chunks.B / HALVES;
    local.Tq = local.Tk = HALVES * chunks.geometry.S;
    return local;
}
// [B, 2n, ...] as [2 B, n, ...].
template <class Element>
HeadView<Element> lighthouse_chunk_view(HeadView<Element> rows, const LighthouseShape& chunks) {
    const int64_t chunk = chunks.geometry.T * rows.stride_t;
    CHECK(chunks.B == HALVES || rows.stride_b == HALVES * chunk,
          "Lighthouse attention over several ranks: sequences must follow one another");
    rows.stride_b = chunk;
    return rows;
}

// ---- memory ------------------------------------------------------------------------------------
// What forward leaves for backward.
struct LighthouseContextSaved {
    LighthouseSaved chunks;
    bf16* before;  // [2 B, L - 1, H, D]: rows from the chunks before
    LighthouseContextSaved(MemoryArea& area, const LighthouseShape& shape)
        : chunks(area, shape), before(area.take<bf16>(lighthouse_border_elements(shape))) {}
};
struct LighthouseContextForwardScratch {
    bf16* border;            // [2 B, L - 1, H, D]: what goes to the chunks after
    unsigned char* in_turn;  // of the gather, then of the inner attention
    LighthouseContextForwardScratch(MemoryArea& area, const ContextAttentionPlan& inner, const LighthouseShape& shape)
        : border(area.take<bf16>(lighthouse_border_elements(shape))),
          in_turn(area.take<unsigned char>(
              (int64_t)std::max(lighthouse_forward_scratch_bytes(shape),
                                inner.forward_scratch_bytes(lighthouse_context_inner_shape(shape))))) {}
};
struct LighthouseContextBackwardScratch {
    float *border, *after;  // [2 B, L - 1, H, D]: gradients that go back, and that come back
    bf16 *dout, *dq;        // [2 B, S, H, D]
    bf16 *dk, *dv;          // [2 B, S, Hkv, D]
    unsigned char* attention;
    LighthouseContextBackwardScratch(MemoryArea& area, const ContextAttentionPlan& inner, const LighthouseShape& shape,
                                     bool deterministic) {
        const int64_t rows = shape.B * shape.geometry.S;
        border = area.take<float>(lighthouse_border_elements(shape));
        after = area.take<float>(lighthouse_border_elements(shape));
        dout = area.take<bf16>(rows * shape.H * shape.D);
        dq = area.take<bf16>(rows * shape.H * shape.D);
        dk = area.take<bf16>(rows * shape.Hkv * shape.D);
        dv = area.take<bf16>(rows * shape.Hkv * shape.D);
        attention = area.take<unsigned char>(
            (int64_t)inner.backward_scratch_bytes(lighthouse_context_inner_shape(shape), deterministic));
    }
};

// Bytes of the three areas. inner: of the same ranks and exchange as LighthouseContext.
inline size_t lighthouse_context_saved_bytes(const LighthouseShape& chunks) {
    MemoryArea area(nullptr);
    LighthouseContextSaved saved(area, chunks);
    return area.num_bytes();
}
inline size_t lighthouse_context_forward_scratch_bytes(const ContextAttentionPlan& inner,
                                                       const LighthouseShape& chunks) {
    MemoryArea area(nullptr);
    LighthouseContextForwardScratch scratch(area, inner, chunks);
    return area.num_bytes();
}
inline size_t lighthouse_context_backward_scratch_bytes(const ContextAttentionPlan& inner,
                                                        const LighthouseShape& chunks, bool deterministic) {
    MemoryArea area(nullptr);
    LighthouseContextBackwardScratch scratch(area, inner, chunks, deterministic);
    return area.num_bytes();
}

// ---- the operation -----------------------------------------------------------------------------
// One object a rank, for all layers; calls are in the same order on all ranks of the communicator.
class LighthouseContext {
  public:
    // exchange: not automatic.
    LighthouseContext(Comm& context, ContextExchange exchange)
        : comm_(context), inner_(make_context_attention(context, exchange)) {}
    // As of context_attention.cuh, on the sub-sequence: the few rows that go over borders are not in it.
    void set_profile(TransferProfile* profile, const std::string& name) { inner_->set_profile(profile, name); }

    // out (=), saved (=) as lighthouse_forward. chunks: of make_lighthouse_chunk_shape. Areas aligned to 256 bytes, of
    // any content.
    void forward(HeadView<bf16> out, void* saved, HeadView<const bf16> q, HeadView<const bf16> k,
                 HeadView<const bf16> v, void* scratch, const LighthouseShape& chunks, cudaStream_t stream) {
        NVTX_RANGE();
        MemoryArea saved_area(saved), scratch_area(scratch);
        const LighthouseContextSaved m(saved_area, chunks);
        const LighthouseSaved& s = m.chunks;
        const LighthouseContextForwardScratch t(scratch_area, inner_->plan(), chunks);
        MemoryArea gather_area(t.in_turn);
        const QkvHeads<const bf16> qkv = {lighthouse_chunk_view(q, chunks), lighthouse_chunk_view(k, chunks),
                                          lighthouse_chunk_view(v, chunks)};
        lighthouse_gather_forward(s, LighthouseForwardScratch(gather_area, chunks), qkv, chunks, stream);
        inner_->forward(local_view(s.out, chunks.H, chunks), s.lse, local_view(s.q, chunks.H, chunks),
                        local_view(s.k, chunks.Hkv, chunks), local_view(s.v, chunks.Hkv, chunks), t.in_turn,
                        lighthouse_context_inner_shape(chunks), stream);
        lighthouse_border(t.border, lighthouse_gathered_view(s.out, chunks.H, chunks), s.positions, chunks, stream);
        exchange_borders(comm_, m.before, t.border, lighthouse_border_elements(chunks) / chunks.B, chunks.B / HALVES,
                         chunk_before, chunk_after, "Lighthouse attention: borders", stream);
        scatter(out, m, chunks, stream);
    }

    // out (=) what the forward that left `saved` gave, bit for bit. Nothing is sent.
    void output_again(HeadView<bf16> out, void* saved, const LighthouseShape& chunks, cudaStream_t stream) const {
        NVTX_RANGE();
        MemoryArea saved_area(saved);
        scatter(out, LighthouseContextSaved(saved_area, chunks), chunks, stream);
    }

    // dq, dk, dv (=) as lighthouse_backward.
    void backward(HeadView<bf16> dq, HeadView<bf16> dk, HeadView<bf16> dv, HeadView<const bf16> dout, void* saved,
                  void* scratch, const LighthouseShape& chunks, bool deterministic, cudaStream_t stream,
                  const RopeRotation* rotation = nullptr) {
        NVTX_RANGE();
        MemoryArea saved_area(saved), scratch_area(scratch);
        const LighthouseContextSaved m(saved_area, chunks);
        const LighthouseSaved& s = m.chunks;
        const LighthouseContextBackwardScratch d(scratch_area, inner_->plan(), chunks, deterministic);
        const HeadView<const bf16> dout_chunks = lighthouse_chunk_view(dout, chunks);
        const HeadView<bf16> dx = lighthouse_gathered_view(d.dout, chunks.H, chunks);
        lighthouse_border_backward(d.border, dout_chunks, chunks, stream);
        exchange_borders(comm_, d.after, d.border, lighthouse_border_elements(chunks) / chunks.B, chunks.B / HALVES,
                         chunk_after, chunk_before, "Lighthouse attention: gradients of borders", stream);
        lighthouse_scatter_backward(dx, dout_chunks, s.positions, chunks, stream);
        lighthouse_border_scatter_backward(dx, dout_chunks, s.positions, d.after, chunks, stream);
        const auto q_view = [&](bf16* rows) { return local_view(rows, chunks.H, chunks); };
        const auto k_view = [&](bf16* rows) { return local_view(rows, chunks.Hkv, chunks); };
        inner_->backward(q_view(d.dq), k_view(d.dk), k_view(d.dv), q_view(d.dout), q_view(s.q), k_view(s.k),
                         k_view(s.v), q_view(s.out), s.lse, d.attention, lighthouse_context_inner_shape(chunks),
                         deterministic, stream);
        const QkvHeads<bf16> gradients = {lighthouse_chunk_view(dq, chunks), lighthouse_chunk_view(dk, chunks),
                                          lighthouse_chunk_view(dv, chunks)};
        lighthouse_gather_backward(
            gradients,
            {lighthouse_gathered_view(d.dq, chunks.H, chunks), lighthouse_gathered_view(d.dk, chunks.Hkv, chunks),
             lighthouse_gathered_view(d.dv, chunks.Hkv, chunks)},
            s.positions, chunks, stream, rotation);
    }

  private:
    // Rows [2 B, S, heads, D] as the local rows of B sub-sequences.
    static HeadView<bf16> local_view(bf16* rows, int heads, const LighthouseShape& chunks) {
        HeadView<bf16> view = lighthouse_gathered_view(rows, heads, chunks);
        view.stride_b *= HALVES;
        return view;
    }
    static void scatter(HeadView<bf16> out, const LighthouseContextSaved& m, const LighthouseShape& chunks,
                        cudaStream_t stream) {
        const HeadView<bf16> tokens = lighthouse_chunk_view(out, chunks);
        const HeadView<bf16> x = lighthouse_gathered_view(m.chunks.out, chunks.H, chunks);
        lighthouse_scatter(tokens, x, m.chunks.positions, chunks, stream);
        lighthouse_border_scatter(tokens, x, m.chunks.positions, m.before, chunks, stream);
    }

    Comm& comm_;
    std::unique_ptr<ContextAttention> inner_;
};
