// ring_attention.cuh: causal attention of one sequence that lies on W ranks, by the schedule of context_partition.h; on
// top of flash_attention.cuh. Only key/value heads travel, and only those rows of them that the receiver's queries see.
//
// ring    W steps; at each the local queries meet one rank's keys while the next rank's are on their way: sends and
//         receives run on a stream of their own into two buffers in turn. Partial outputs merge by log-sum-exp:
//           lse = log(exp(lse_a) + exp(lse_b)),   out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
//         Backward, the gradients of a step's keys go back to their owner in float32 while the next step computes. With
//         lse and out of all keys, a step's gradients are its share of the whole ones: they only add up. Step 0, which
//         waits for nobody, is split: the tail's queries come first, beside the first keys, the head's come last,
//         beside the last gradients.
//         Steps run on two streams in turn, each as soon as its keys are there: where the last blocks of one leave
//         multiprocessors idle, the next one's begin. All blocks of a step are equally long, so that on 132
//         multiprocessors 1536 of them take the time of 1584, and each of a few hundred short ones counts.
//         Long sequences go round in parts, one after another, each a sequence and some of its key/value heads with
//         their queries: scratch memory is that of one part, and a part's steps are long enough to lose nothing.
// gather  for short shards, where a step's computation could not hide what it costs to start one: all keys first, then
//         one attention for each half of the queries, exactly as on one GPU, the two side by side; backward, one sum
//         over all ranks, float32.
//
// Precision: all sums are float32, and each output is rounded once at the end. Flash attention rounds partial results
// of out and dq to bf16: the weights of the partial outputs add up to 1, so out is within two bf16 roundings of the
// largest of them, and a query's shares of dq are as many as ranks. dk and dv of a key are shares of all ranks that may
// be large and cancel: they are float32 from the registers of the kernel to the sum. Sums run in the order of steps
// (gather: of ranks), so results repeat bit for bit wherever flash attention's do, whatever the timing.
// Shapes: the local rows of each sequence, head chunk then tail chunk: q, out [B, 2n, H, D]; k, v [B, 2n, Hkv, D], each
// a HeadView; lse [B, H, 2n]. n: rows of a chunk. Checked by dev/cuda/context_attention.cu.
#pragma once
#include "comm.cuh"                    // ranks
#include "context_attention_base.cuh"  // how it is called
#include "context_parts.h"             // parts of a batch
#include "context_rows.cuh"            // rows in launches
#include "flash_attention.cuh"         // the attention of two chunks on each other

// ---- rows --------------------------------------------------------------------------------------
// The view from row t on.
template <class Element>
HeadView<Element> rows_from(HeadView<Element> view, int64_t t) {
    view.data = view.row(0, t, 0);
    return view;
}

// ---- kernels -----------------------------------------------------------------------------------
// Launch: 2^log2_lanes lanes a row of kv [B, num_rows, 2 Hkv, D]; 1-D grid. kv (=) the heads of k, then those of v.
// Bound: bandwidth.
__global__ void __launch_bounds__(ROW_THREADS)
    ring_pack_kernel(HeadView<bf16> kv, HeadView<const bf16> k, HeadView<const bf16> v, RowBlock rows) {
    const RowPlace place(rows);
    if (place.active) {
        const int Hkv = rows.heads / 2;
        const bf16* const from =
            place.h < Hkv ? k.row(place.b, place.t, place.h) : v.row(place.b, place.t, place.h - Hkv);
        store128(kv.row(place.b, place.t, place.h) + place.d, load128(from + place.d));
    }
}
inline void ring_pack(HeadView<bf16> kv, HeadView<const bf16> k, HeadView<const bf16> v, const RowBlock& rows,
                      cudaStream_t stream) {
    launch_rows(ring_pack_kernel, rows, stream, kv, k, v);
}

// What a partial result is added to, and where the sum goes.
struct RingSum {
    HeadView<const bf16> base;  // when first: the result so far
    HeadView<float> sum;        // otherwise; and the sum, unless last
    HeadView<bf16> out;         // when last: the sum, rounded
    bool first, last;
};

// Launch: as above, one row of H heads. lse and part_lse: [B, H, ...] with lse_stride and part_lse_stride rows a head.
// Bound: bandwidth.
__global__ void __launch_bounds__(ROW_THREADS)
    ring_merge_kernel(RingSum s, float* lse, int64_t lse_stride, HeadView<const bf16> part, const float* part_lse,
                      int64_t part_lse_stride, RowBlock rows) {
    const RowPlace place(rows);
    const int64_t head = place.b * rows.heads + place.h;
    float a = -INFINITY, b = -INFINITY;
    if (place.active) {
        a = lse[head * lse_stride + place.t];
        b = part_lse[head * part_lse_stride + place.t];
    }
    __syncwarp();  // a row's lanes have read its lse
    if (!place.active) {
        return;
    }
    const float largest = fmaxf(a, b);
    const bool sees_keys = largest > -INFINITY;
    const float merged = sees_keys ? largest + logf(expf(a - largest) + expf(b - largest)) : -INFINITY;
    const float weight_a = sees_keys ? expf(a - merged) : 0.0f, weight_b = sees_keys ? expf(b - merged) : 0.0f;
    EightFloats row = s.first ? load_eight(s.base.row(place.b, place.t, place.h) + place.d)
                              : load_eight(s.sum.row(place.b, place.t, place.h) + place.d);
    const EightFloats other = load_eight(part.row(place.b, place.t, place.h) + place.d);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        row.value[i] = weight_a * row.value[i] + weight_b * other.value[i];
    }
    if (s.last) {
        store_eight(s.out.row(place.b, place.t, place.h) + place.d, row);
    } else {
        store_eight(s.sum.row(place.b, place.t, place.h) + place.d, row);
    }
    if (place.d == 0) {
        lse[head * lse_stride + place.t] = merged;
    }
}
inline void ring_merge(const RingSum& sum, float* lse, int64_t lse_stride, HeadView<const bf16> part,
                       const float* part_lse, int64_t part_lse_stride, const RowBlock& rows, cudaStream_t stream) {
    launch_rows(ring_merge_kernel, rows, stream, sum, lse, lse_stride, part, part_lse, part_lse_stride);
}

// Launch: as above. Adds num_parts partial results, part_stride elements apart, in their order. Bound: bandwidth.
template <class Part>
__global__ void __launch_bounds__(ROW_THREADS)
    ring_add_kernel(RingSum s, HeadView<const Part> parts, int64_t part_stride, int num_parts, RowBlock rows) {
    const RowPlace place(rows);
    if (!place.active) {
        return;
    }
    EightFloats row = s.first ? load_eight(s.base.row(place.b, place.t, place.h) + place.d)
                              : load_eight(s.sum.row(place.b, place.t, place.h) + place.d);
    const Part* part = parts.row(place.b, place.t, place.h) + place.d;
    for (int p = 0; p < num_parts; ++p, part += part_stride) {
        add_eight(row, part);
    }
    if (s.last) {
        store_eight(s.out.row(place.b, place.t, place.h) + place.d, row);
    } else {
        store_eight(s.sum.row(place.b, place.t, place.h) + place.d, row);
    }
}
template <class Part>
void ring_add(const RingSum& sum, HeadView<Part> parts, int64_t part_stride, int num_parts, const RowBlock& rows,
              cudaStream_t stream) {
    launch_rows(ring_add_kernel<std::remove_const_t<Part>>, rows, stream, sum, parts, part_stride, num_parts);
}

// ---- ring or gather ----------------------------------------------------------------------------
// All that the ring can hide of a step is the shorter of its computation and its transfer; when that is less than what
// a step costs to start (launches, the merge, the hand-shake of two ranks), gathering is quicker. As a rule the
// computation decides: with H = Hkv = 8 and D = 128 it takes that long from n = 1105 on, the transfer from 367 on at
// NCCL's rate, the one below, and from 733 on at that of copy engines. (Lighthouse attention at T = 98304 on two H200,
// far above it: 453 ms by the ring, 462 gathering.)
constexpr double RING_STEP_SECONDS = 20e-6;
constexpr double RING_FLOPS = 500e12;        // of flash attention on one GPU
constexpr double RING_BYTES_SECOND = 150e9;  // between two GPUs of a node, one way

// `local`: the shape of the local rows on each other (Tq = Tk = 2n).
inline ContextExchange choose_ring_or_gather(const AttentionShape& local) {
    const double n = 0.5 * (double)local.Tq;
    const double flops = 4.0 * local.B * local.H * local.D * 2.0 * n * n;
    const double num_bytes = 2.0 * local.B * local.Hkv * local.D * 2.0 * n * sizeof(bf16);
    const double hidden_seconds = std::min(flops / RING_FLOPS, num_bytes / RING_BYTES_SECOND);
    return hidden_seconds < RING_STEP_SECONDS ? ContextExchange::gather : ContextExchange::ring;
}

// ---- sizes -------------------------------------------------------------------------------------
// Keys of a chunk, over all heads of a part: as few heads as have so many. 4096 tiles of 128 keys take 132
// multiprocessors 32 rounds instead of 31.03, but the next step fills what the last round leaves idle: without
// transfers (H200, n = 131072, 8 heads) parts of four heads are no slower than all heads at once, and need half of
// their scratch memory.
constexpr int64_t RING_PART_KEYS = (int64_t)1 << 19;

class RingAttentionPlan : public ContextAttentionPlan {
  public:
    // Rank `rank` of W that share every sequence. exchange: ring or gather.
    RingAttentionPlan(int W, int rank, ContextExchange exchange, int64_t part_keys)
        : W_(W),
          rank_(rank),
          gathers_(exchange == ContextExchange::gather),
          part_keys_(part_keys),
          steps_(make_ring_schedule(W, rank)) {
        CHECK(W >= 2, "ring attention: needs at least 2 ranks on a sequence, not %d", W);
    }

    size_t forward_scratch_bytes(const AttentionShape& local) const override {
        MemoryArea area(nullptr);
        gathers_ ? (void)GatherForward(area, sizes(local)) : (void)RingForward(area, sizes(parts_of(local).largest()));
        return area.num_bytes();
    }
    size_t backward_scratch_bytes(const AttentionShape& local, bool deterministic) const override {
        MemoryArea area(nullptr);
        if (gathers_) {
            GatherBackward(area, sizes(local), gather_scratch_bytes(local, deterministic));
        } else {
            const AttentionShape part = parts_of(local).largest();
            RingBackward(area, sizes(part), ring_scratch_bytes(part, deterministic));
        }
        return area.num_bytes();
    }

    // Short sequences are gathered.
    int64_t pace(const AttentionShape& local) const override { return gathers_ ? 0 : parts_of(local).pace(); }

    // In the backward the keys again, and float32 gradients of its own keys from all who see them. What a rank sends is
    // the same with keys and their readers exchanged, so over all ranks as much.
    int64_t forward_bytes_received(const AttentionShape& local) const override {
        return row_elements(&RingStep::keys, local) * (int64_t)sizeof(bf16);
    }
    int64_t backward_bytes_received(const AttentionShape& local) const override {
        return forward_bytes_received(local) + row_elements(&RingStep::keys_sent, local) * (int64_t)sizeof(float);
    }

  protected:
    // ---- sizes and buffers

    struct Sizes {
        int W, rank, B, H, Hkv, D;
        int64_t n;  // rows of a chunk

        int64_t q_elements() const { return B * HALVES * n * H * D; }
        int64_t kv_width() const { return 2 * (int64_t)Hkv * D; }
        int64_t kv_elements() const { return B * HALVES * n * kv_width(); }  // of a rank's keys and values
        int64_t half_rows() const { return (int64_t)B * H * n; }             // query rows and heads of a half
        int64_t T() const { return HALVES * W * n; }
        ContextPartition partition() const { return {W, rank, T()}; }
    };
    Sizes sizes(const AttentionShape& local) const {
        return {W_, rank_, local.B, local.H, local.Hkv, local.D, local.Tq / HALVES};
    }
    // Elements of k and v in what all steps after the first take or give.
    int64_t row_elements(HalfRange RingStep::*halves, const AttentionShape& local) const {
        int64_t rows = 0;
        for (size_t s = 1; s < steps_.size(); ++s) {
            rows += (steps_[s].*halves).num_rows(local.Tq / HALVES);
        }
        return rows * local.B * sizes(local).kv_width();
    }
    // Keys and values, or their gradients, as they travel: [B, rows, 2 Hkv, D], the heads of k, then those of v.
    template <class Element>
    struct KeyBuffer {
        Element* data;
        KeyBuffer(MemoryArea& area, int64_t num_elements) : data(area.take<Element>(num_elements)) {}
    };

    // What is there twice is for even and odd steps, which run side by side.
    using AttentionBytes = std::array<size_t, 2>;  // scratch of flash attention
    struct QueryPart {
        bf16* rows;  // [B, up to 2n, H, D]
        float* lse;  // [B, H, up to 2n]
        QueryPart(MemoryArea& area, const Sizes& s, bool used)
            : rows(used ? area.take<bf16>(s.q_elements()) : nullptr),
              lse(used ? area.take<float>(HALVES * s.half_rows()) : nullptr) {}
    };
    struct RingForward {
        KeyBuffer<bf16> own, in[2];  // of two ranks, only [1] is used
        QueryPart part[2];           // step 0 writes to its place
        float* sum;                  // [B, 2n, H, D]; two partial results need none
        RingForward(MemoryArea& area, const Sizes& s)
            : own(area, s.kv_elements()),
              in{{area, s.W > 2 ? s.kv_elements() : 0}, {area, s.kv_elements()}},
              part{{area, s, s.W > 2}, {area, s, true}},
              sum(s.W > 2 ? area.take<float>(s.q_elements()) : nullptr) {}
    };
    // Of two ranks, step 1 is the only one whose keys come and whose gradients leave.
    struct RingBackward {
        KeyBuffer<bf16> own, in[2];
        KeyBuffer<float> gradients_out[2];  // of two ranks, [0] is for the keys of the own head alone
        KeyBuffer<float> gradients_in[2];
        KeyBuffer<float> sum;     // of the local keys' gradients, [B, 2n, 2 Hkv, D]
        bf16* dq_part[2];         // [B, up to 2n, H, D]; step 0 writes to its place
        int64_t dq_sum_rows;      // of two ranks the tail's sum is whole after its first part
        float* dq_sum;            // [B, dq_sum_rows, H, D]
        float* half_lse[HALVES];  // [B, H, n]
        std::byte* attention[2];
        RingBackward(MemoryArea& area, const Sizes& s, const AttentionBytes& attention_bytes)
            : own(area, s.kv_elements()),
              in{{area, s.W > 2 ? s.kv_elements() : 0}, {area, s.kv_elements()}},
              gradients_out{{area, s.W > 2 ? s.kv_elements() : s.kv_elements() / HALVES}, {area, s.kv_elements()}},
              gradients_in{{area, s.kv_elements()}, {area, s.W > 2 ? s.kv_elements() : 0}},
              sum(area, s.kv_elements()),
              dq_part{s.W > 2 ? area.take<bf16>(s.q_elements()) : nullptr, area.take<bf16>(s.q_elements())},
              dq_sum_rows(s.W > 2 ? HALVES * s.n : s.n),
              dq_sum(area.take<float>(s.B * dq_sum_rows * s.H * s.D)),
              half_lse{area.take<float>(s.half_rows()), area.take<float>(s.half_rows())},
              attention{area.take<std::byte>((int64_t)attention_bytes[0]),
                        area.take<std::byte>((int64_t)attention_bytes[1])} {}
    };
    struct GatherForward {
        KeyBuffer<bf16> all;      // in the order of the sequence, [B, T, 2 Hkv, D]
        float* half_lse[HALVES];  // [B, H, n]
        GatherForward(MemoryArea& area, const Sizes& s)
            : all(area, s.W * s.kv_elements()),
              half_lse{area.take<float>(s.half_rows()), area.take<float>(s.half_rows())} {}
    };
    struct GatherBackward {
        KeyBuffer<bf16> all;              // [B, T, 2 Hkv, D]
        KeyBuffer<float> gradients;       // [B, T, 2 Hkv, D], of what the tail sees, then of all local queries
        KeyBuffer<float> head_gradients;  // [B, T / 2, 2 Hkv, D]
        KeyBuffer<float> gradients_in;    // [W - 1] x [B, 2n, 2 Hkv, D], from the other ranks in their order
        float* half_lse[HALVES];          // [B, H, n]
        std::byte* attention[HALVES];
        GatherBackward(MemoryArea& area, const Sizes& s, const AttentionBytes& attention_bytes)
            : all(area, s.W * s.kv_elements()),
              gradients(area, s.W * s.kv_elements()),
              head_gradients(area, s.W * s.kv_elements() / HALVES),
              gradients_in(area, (s.W - 1) * s.kv_elements()),
              half_lse{area.take<float>(s.half_rows()), area.take<float>(s.half_rows())},
              attention{area.take<std::byte>((int64_t)attention_bytes[0]),
                        area.take<std::byte>((int64_t)attention_bytes[1])} {}
    };

    // What the ring takes at once, by the keys of a chunk.
    using Part = ContextPart<AttentionShape>;
    ContextParts<AttentionShape> parts_of(const AttentionShape& local) const {
        return {local, local.Tq / HALVES, part_keys_};
    }

    // ---- attention of some of the local queries on some of the keys

    static AttentionShape full_shape(const AttentionShape& local, int64_t num_queries, int64_t num_keys) {
        AttentionShape shape = local;
        shape.Tq = num_queries, shape.Tk = num_keys;
        shape.causal = false;
        return shape;
    }
    // Of the ring's step s.
    AttentionShape step_shape(const AttentionShape& local, const RingStep& step) const {
        const int64_t n = local.Tq / HALVES;
        return beside_others(full_shape(local, step.queries.num_rows(n), step.keys.num_rows(n)));
    }
    // Transfers and another attention run beside it.
    static AttentionShape beside_others(AttentionShape shape) {
        shape.yields = true;
        return shape;
    }
    // Of one half of the queries on the rank's own keys that they see: step 0's.
    AttentionShape own_shape(const AttentionShape& local, int half) const {
        const int64_t n = local.Tq / HALVES;
        AttentionShape shape = full_shape(local, n, (half + 1) * n);
        shape.causal = true;
        shape.causal_offset = half * n;
        return beside_others(shape);
    }
    // Of one half of the queries on all keys from the start of the sequence to its own last.
    AttentionShape half_shape(const AttentionShape& local, int half) const {
        const Sizes s = sizes(local);
        const int chunks = chunks_seen(s.partition(), half);
        AttentionShape shape = full_shape(local, s.n, chunks * s.n);
        shape.causal = true;
        shape.causal_offset = (chunks - 1) * s.n;
        return beside_others(shape);
    }
    // Scratch of flash attention in what the ring takes at once, and in gathering.
    AttentionBytes ring_scratch_bytes(const AttentionShape& part, bool deterministic) const {
        AttentionBytes num_bytes = {};
        const auto include = [&](int step, const AttentionShape& shape) {
            size_t& largest = num_bytes[step % 2];
            largest = std::max(largest, flash_attention_backward_scratch_bytes(shape, deterministic));
        };
        include(0, own_shape(part, 1));
        for (int s = 1; s < W_; ++s) {
            include(s, step_shape(part, steps_[s]));
        }
        include(W_, own_shape(part, 0));
        return num_bytes;
    }
    AttentionBytes gather_scratch_bytes(const AttentionShape& local, bool deterministic) const {
        return {flash_attention_backward_scratch_bytes(half_shape(local, 0), deterministic),
                flash_attention_backward_scratch_bytes(half_shape(local, 1), deterministic)};
    }

    int W_, rank_;
    bool gathers_;
    int64_t part_keys_;
    std::vector<RingStep> steps_;
};

// ---- the operation -----------------------------------------------------------------------------
class RingAttention : public ContextAttention, private RingAttentionPlan {
  public:
    // The ranks of `context` share every sequence. exchange: ring or gather.
    RingAttention(Comm& context, ContextExchange exchange, int64_t part_keys)
        : RingAttentionPlan(context.size(), context.rank(), exchange, part_keys), comm_(context) {}

    const ContextAttentionPlan& plan() const override { return *this; }

    // lse: of the local queries.
    void forward(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k, HeadView<const bf16> v,
                 void* scratch, const AttentionShape& local, cudaStream_t stream) override {
        NVTX_RANGE();
        check_local_rows(local);
        if (gathers_) {
            probe_.begin_operation("forward");
            return gather_forward(out, lse, q, k, v, scratch, local, stream);
        }
        for (const Part& part : parts_of(local).all()) {
            probe_.begin_operation("forward");
            ring_forward(part.queries(out), part.lse(lse), part.queries(q), part.keys(k), part.keys(v), scratch,
                         part.shape, stream);
        }
    }

    void backward(HeadView<bf16> dq, HeadView<bf16> dk, HeadView<bf16> dv, HeadView<const bf16> dout,
                  HeadView<const bf16> q, HeadView<const bf16> k, HeadView<const bf16> v, HeadView<const bf16> out,
                  const float* lse, void* scratch, const AttentionShape& local, bool deterministic,
                  cudaStream_t stream) override {
        NVTX_RANGE();
        check_local_rows(local);
        if (gathers_) {
            probe_.begin_operation("backward");
            return gather_backward({dq, dk, dv}, {dout, q, k, v, out, lse}, scratch, local, deterministic, stream);
        }
        for (const Part& part : parts_of(local).all()) {
            const Gradients gradients = {part.queries(dq), part.keys(dk), part.keys(dv)};
            const Saved saved = {part.queries(dout), part.queries(q),   part.keys(k),
                                 part.keys(v),       part.queries(out), part.lse(lse)};
            probe_.begin_operation("backward");
            ring_backward(gradients, saved, scratch, part.shape, deterministic, stream);
        }
    }

  private:
    template <class Element>
    struct KeyViews {
        HeadView<Element> k, v;
    };
    // num_rows: of each sequence in the buffer.
    template <class Element>
    static HeadView<Element> key_heads(Element* kv, int64_t num_rows, const Sizes& s) {
        return {kv, num_rows * s.kv_width(), s.kv_width(), s.D};
    }
    template <class Element>
    static KeyViews<Element> key_views(Element* kv, int64_t num_rows, const Sizes& s) {
        return {key_heads(kv, num_rows, s), key_heads(kv + (int64_t)s.Hkv * s.D, num_rows, s)};
    }
    template <class Element>
    static HeadView<Element> query_view(Element* rows, int64_t num_rows, const Sizes& s) {
        return {rows, num_rows * s.H * s.D, (int64_t)s.H * s.D, s.D};
    }

    // lse [B, H, n] of one half (=) from lse [B, H, 2n], and back.
    static void take_half_lse(float* half_lse, const float* lse, int half, const Sizes& s, cudaStream_t stream) {
        const size_t row = s.n * sizeof(float);
        CUDA_CHECK(cudaMemcpy2DAsync(half_lse, row, lse + half * s.n, HALVES * row, row, (size_t)s.B * s.H,
                                     cudaMemcpyDeviceToDevice, stream));
    }
    static void put_half_lse(float* lse, const float* half_lse, int half, const Sizes& s, cudaStream_t stream) {
        const size_t row = s.n * sizeof(float);
        CUDA_CHECK(cudaMemcpy2DAsync(lse + half * s.n, HALVES * row, half_lse, row, row, (size_t)s.B * s.H,
                                     cudaMemcpyDeviceToDevice, stream));
    }

    // ---- the ring

    // Both lists of one round: what goes out and comes in together.
    struct Transfers {
        std::vector<DeviceSend> sends;
        std::vector<DeviceReceive> receives;
    };
    // piece(offset, number of elements) of `halves` of [B, 2n, 2 Hkv, D], as one piece where they lie together.
    template <class Piece>
    static void for_each_piece(HalfRange halves, const Sizes& s, Piece piece) {
        const int64_t sequence = HALVES * s.n * s.kv_width();
        if (halves == BOTH_HALVES) {
            piece(0, s.B * sequence);
            return;
        }
        for (int64_t b = 0; b < s.B; ++b) {
            piece(b * sequence + halves.first_row(s.n) * s.kv_width(), halves.num_rows(s.n) * s.kv_width());
        }
    }
    // The keys of step `step`, from own to its reader and from its source to `in`, which they fill without gaps.
    static void add_keys(Transfers& transfers, const bf16* own, bf16* in, const RingStep& step, const Sizes& s) {
        for_each_piece(step.keys_sent, s, [&](int64_t offset, int64_t num_elements) {
            transfers.sends.push_back({step.reader, own + offset, num_elements * sizeof(bf16)});
        });
        for_each_piece(step.keys, s, [&](int64_t, int64_t num_elements) {
            transfers.receives.push_back({step.source, in, num_elements * sizeof(bf16)});
            in += num_elements;
        });
    }
    // The gradients of step `step`'s keys, back to their source; and what its reader found, to `in`.
    static void add_gradients(Transfers& transfers, const float* out, float* in, const RingStep& step, const Sizes& s) {
        for_each_piece(step.keys, s, [&](int64_t, int64_t num_elements) {
            transfers.sends.push_back({step.source, out, num_elements * sizeof(float)});
            out += num_elements;
        });
        for_each_piece(step.keys_sent, s, [&](int64_t, int64_t num_elements) {
            transfers.receives.push_back({step.reader, in, num_elements * sizeof(float)});
            in += num_elements;
        });
    }

    // Both streams beside the caller's go on where that is now.
    void begin_rounds(cudaStream_t stream) {
        wait_for(stream_, stream, start_);
        CUDA_CHECK(cudaStreamWaitEvent(beside_, start_));
    }
    // own (=) the local keys as they travel. The computation on `stream` begins only now, just after the transfer that
    // is enqueued next: its blocks would leave that no multiprocessor until the first of them are over.
    void pack_keys(bf16* own, HeadView<const bf16> k, HeadView<const bf16> v, const Sizes& size, cudaStream_t stream) {
        ring_pack(key_heads(own, HALVES * size.n, size), k, v, {size.B, HALVES * size.n, 2 * size.Hkv, size.D},
                  stream_);
        wait_for(stream, stream_, packed_);
    }
    // Round s: what step s + 1 needs comes while step s computes, and what step s - 1 found goes out. It begins once
    // the attention of step s - 1 is over; step 0's sends no results. The events of even and odd s take turns.
    void run_round(int s, const Transfers& transfers, const char* operation) {
        if (s > 1) {
            CUDA_CHECK(cudaStreamWaitEvent(stream_, attended_[(s - 1) % 2]));
        }
        if (!transfers.sends.empty() || !transfers.receives.empty()) {
            probe_.begin(TransferLane::transfers, s, stream_);
            comm_.exchange(transfers.sends, transfers.receives, operation, stream_);
            probe_.end(TransferLane::transfers, stream_);
        }
        CUDA_CHECK(cudaEventRecord(arrived_[s % 2], stream_));
    }
    void wait_for_round(int s, cudaStream_t stream) { CUDA_CHECK(cudaStreamWaitEvent(stream, arrived_[s % 2])); }
    // Even steps run on the caller's stream, odd ones on the one beside it.
    cudaStream_t stream_of(int s, cudaStream_t stream) const { return s % 2 == 0 ? stream : (cudaStream_t)beside_; }
    // work(): enqueues what step s computes.
    template <class Work>
    void compute(int s, cudaStream_t on, Work work) {
        const TransferLane lane = s % 2 == 0 ? TransferLane::computation : TransferLane::computation_beside;
        probe_.begin(lane, s, on);
        work();
        probe_.end(lane, on);
    }
    // The attention of step s is over when what is on its stream now is.
    void end_attention(int s, cudaStream_t on) { CUDA_CHECK(cudaEventRecord(attended_[s % 2], on)); }
    // And so is the whole step; sums follow one another in the order of steps.
    void end_step(int s, cudaStream_t on) { CUDA_CHECK(cudaEventRecord(computed_[s % 2], on)); }
    void wait_for_step(int s, cudaStream_t on) { CUDA_CHECK(cudaStreamWaitEvent(on, computed_[s % 2])); }

    void ring_forward(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k,
                      HeadView<const bf16> v, void* scratch, const AttentionShape& local, cudaStream_t stream) {
        const Sizes size = sizes(local);
        MemoryArea area(scratch);
        const RingForward m(area, size);
        const int W = size.W;
        const int64_t n = size.n;
        const auto send_keys_of = [&](int s) {
            Transfers transfers;
            if (s < W) {
                add_keys(transfers, m.own.data, m.in[s % 2].data, steps_[s], size);
            }
            run_round(s - 1, transfers, "ring attention: keys");
        };

        begin_rounds(stream);
        pack_keys(m.own.data, k, v, size, stream);
        send_keys_of(1);
        compute(0, stream, [&] { flash_attention_forward(out, lse, q, k, v, beside_others(local), stream); });
        end_step(0, stream);
        for (int s = 1; s < W; ++s) {
            const RingStep& step = steps_[s];
            const cudaStream_t on = stream_of(s, stream);
            const AttentionShape shape = step_shape(local, step);
            const KeyViews<bf16> keys = key_views(m.in[s % 2].data, shape.Tk, size);
            const QueryPart& found = m.part[s % 2];
            const HeadView<bf16> part = query_view(found.rows, shape.Tq, size);
            send_keys_of(s + 1);
            wait_for_round(s - 1, on);
            compute(s, on, [&] {
                flash_attention_forward(part, found.lse, rows_from(q, step.queries.first_row(n)), keys.k, keys.v, shape,
                                        on);
            });
            end_attention(s, on);
            wait_for_step(s - 1, on);
            compute(s, on, [&] {
                for (int half = 0; half < HALVES; ++half) {
                    const Contribution c = step.to_queries[half];
                    if (c.any) {
                        const int64_t row = half * n, part_row = row - step.queries.first_row(n);
                        const HeadView<bf16> half_out = rows_from(out, row);
                        const HeadView<float> sum = rows_from(query_view(m.sum, HALVES * n, size), row);
                        ring_merge({half_out, sum, half_out, c.first, c.last}, lse + row, HALVES * n,
                                   rows_from(part, part_row), found.lse + part_row, shape.Tq,
                                   {size.B, n, size.H, size.D}, on);
                    }
                }
            });
            end_step(s, on);
        }
        wait_for_step(W - 1, stream);
        wait_for_round(W - 1, stream);
    }

    struct Gradients {
        HeadView<bf16> dq, dk, dv;
    };
    struct Saved {
        HeadView<const bf16> dout, q, k, v, out;
        const float* lse;
    };

    // Parts of the gradients of one half of the local keys, added to their sum, and with the last of them dk and dv
    // (=).
    void add_to_half(const Gradients& gradients, float* sum, const KeyViews<const float>& parts, int num_parts,
                     int half, bool last, const Sizes& size, cudaStream_t stream) const {
        const int64_t row = half * size.n;
        const KeyViews<float> sums = key_views(sum, HALVES * size.n, size);
        const RowBlock rows(size.B, size.n, size.Hkv, size.D);
        ring_add({{}, rows_from(sums.k, row), rows_from(gradients.dk, row), false, last}, parts.k, 0, num_parts, rows,
                 stream);
        ring_add({{}, rows_from(sums.v, row), rows_from(gradients.dv, row), false, last}, parts.v, 0, num_parts, rows,
                 stream);
    }
    // What the reader of a step found for the local keys, in `in`.
    void add_returned(const Gradients& gradients, float* sum, const float* in, const RingStep& step, const Sizes& size,
                      cudaStream_t stream) const {
        const KeyViews<const float> parts = key_views(in, step.keys_sent.num_rows(size.n), size);
        for (int half = 0; half < HALVES; ++half) {
            const Contribution c = step.to_keys[half];
            if (c.any) {
                const int64_t row = half * size.n - step.keys_sent.first_row(size.n);
                add_to_half(gradients, sum, {rows_from(parts.k, row), rows_from(parts.v, row)}, 1, half, c.last, size,
                            stream);
            }
        }
    }
    // Whether other ranks see this half of the local keys.
    bool is_seen_elsewhere(int half) const {
        return std::any_of(steps_.begin(), steps_.end(), [&](const RingStep& step) { return step.to_keys[half].any; });
    }
    // Whether this half of the local queries sees keys of other ranks.
    bool sees_others(int half) const {
        return std::any_of(steps_.begin(), steps_.end(),
                           [&](const RingStep& step) { return step.to_queries[half].any; });
    }

    void ring_backward(const Gradients& gradients, const Saved& saved, void* scratch, const AttentionShape& local,
                       bool deterministic, cudaStream_t stream) {
        const Sizes size = sizes(local);
        MemoryArea area(scratch);
        const RingBackward m(area, size, ring_scratch_bytes(local, deterministic));
        const int W = size.W;
        const int64_t n = size.n;
        // The keys of step s + 1 and the gradients of step s - 1.
        const auto round = [&](int s) {
            Transfers transfers;
            if (s + 1 < W) {
                add_keys(transfers, m.own.data, m.in[(s + 1) % 2].data, steps_[s + 1], size);
            }
            if (s - 1 >= 1) {
                add_gradients(transfers, m.gradients_out[(s - 1) % 2].data, m.gradients_in[s % 2].data, steps_[s - 1],
                              size);
            }
            if (s >= 4) {
                wait_for_step(s - 2, stream_);  // which added up the gradients that came in round s - 2
            }
            run_round(s, transfers, "ring attention: keys and their gradients");
        };
        // Step `s`, of the queries of a half on the local keys that they see: dq (=) at its place, gradients of keys
        // (=).
        const auto backward_of_half = [&](int s, int half, const KeyViews<float>& dkeys, cudaStream_t on) {
            const int64_t row = half * n;
            flash_attention_backward(rows_from(gradients.dq, row), dkeys.k, dkeys.v, rows_from(saved.dout, row),
                                     rows_from(saved.q, row), saved.k, saved.v, rows_from(saved.out, row),
                                     m.half_lse[half], m.attention[s % 2], own_shape(local, half), deterministic, on);
        };
        const HeadView<float> dq_sum = query_view(m.dq_sum, m.dq_sum_rows, size);
        const RowBlock half_rows(size.B, n, size.H, size.D);

        for (int half = 0; half < HALVES; ++half) {
            take_half_lse(m.half_lse[half], saved.lse, half, size, stream);
        }
        begin_rounds(stream);
        pack_keys(m.own.data, saved.k, saved.v, size, stream);
        round(0);
        compute(0, stream, [&] {
            backward_of_half(0, 1, key_views(m.sum.data, HALVES * n, size), stream);
            if (!is_seen_elsewhere(1)) {
                add_to_half(gradients, m.sum.data, {}, 0, 1, true, size, stream);
            }
        });
        end_step(0, stream);
        for (int s = 1; s < W; ++s) {
            const RingStep& step = steps_[s];
            const cudaStream_t on = stream_of(s, stream);
            const AttentionShape shape = step_shape(local, step);
            const int64_t first = step.queries.first_row(n);
            const KeyViews<bf16> keys = key_views(m.in[s % 2].data, shape.Tk, size);
            const KeyViews<float> dkeys = key_views(m.gradients_out[s % 2].data, shape.Tk, size);
            const HeadView<bf16> part = query_view(m.dq_part[s % 2], shape.Tq, size);
            round(s);
            wait_for_round(s - 1, on);
            compute(s, on, [&] {
                flash_attention_backward(part, dkeys.k, dkeys.v, rows_from(saved.dout, first),
                                         rows_from(saved.q, first), keys.k, keys.v, rows_from(saved.out, first),
                                         step.queries == TAIL ? m.half_lse[1] : saved.lse, m.attention[s % 2], shape,
                                         deterministic, on);
            });
            end_attention(s, on);
            wait_for_step(s - 1, on);
            compute(s, on, [&] {
                if (const Contribution c = step.to_queries[0]; c.any) {  // the part of step 0 comes last
                    ring_add({part, dq_sum, {}, c.first, false}, part, 0, c.first ? 0 : 1, half_rows, on);
                }
                if (const Contribution c = step.to_queries[1]; c.any) {
                    const HeadView<bf16> dq = rows_from(gradients.dq, n);
                    ring_add({dq, rows_from(dq_sum, n), dq, c.first, c.last}, rows_from(part, n - first), 0, 1,
                             half_rows, on);
                }
            });
            wait_for_round(s, on);
            if (s > 1) {
                compute(s, on, [&] {
                    add_returned(gradients, m.sum.data, m.gradients_in[s % 2].data, steps_[s - 1], size, on);
                });
            }
            end_step(s, on);
        }
        round(W);
        const cudaStream_t on = stream_of(W, stream);
        const KeyViews<float> own = key_views(m.gradients_out[W % 2].data, n, size);
        if (W > 2) {
            wait_for_round(W - 1, on);  // in which the gradients that were in `own` went out
        }
        compute(W, on, [&] { backward_of_half(W, 0, own, on); });
        wait_for_step(W - 1, on);
        compute(W, on, [&] {
            add_to_half(gradients, m.sum.data, {own.k, own.v}, 1, 0, false, size, on);
            if (sees_others(0)) {
                ring_add<float>({gradients.dq, {}, gradients.dq, true, true}, dq_sum, 0, 1, half_rows, on);
            }
        });
        wait_for_round(W, on);
        compute(W, on,
                [&] { add_returned(gradients, m.sum.data, m.gradients_in[W % 2].data, steps_[W - 1], size, on); });
        end_step(W, on);
        wait_for_step(W, stream);
    }

    // ---- gather

    // all (=) the keys of the sequence that the local queries see, each at its place.
    void gather_keys(bf16* all, HeadView<const bf16> k, HeadView<const bf16> v, const Sizes& size,
                     cudaStream_t stream) {
        const ContextPartition p = size.partition();
        const int64_t n = size.n;
        const auto place = [&](int rank, int half, int64_t b) {
            return all + (b * size.T() + p.chunk_of(rank, half) * n) * size.kv_width();
        };
        for (int half = 0; half < HALVES; ++half) {
            ring_pack(key_heads(place(size.rank, half, 0), size.T(), size), rows_from(k, half * n),
                      rows_from(v, half * n), {size.B, n, 2 * size.Hkv, size.D}, stream);
        }
        Transfers transfers;
        const size_t chunk_bytes = n * size.kv_width() * sizeof(bf16);
        for_each_peer(size, [&](int peer) {
            for (int half = 0; half < HALVES; ++half) {
                for (int64_t b = 0; b < size.B; ++b) {
                    if (keys_seen(peer, size.rank).has(half)) {
                        transfers.sends.push_back({peer, place(size.rank, half, b), chunk_bytes});
                    }
                    if (keys_seen(size.rank, peer).has(half)) {
                        transfers.receives.push_back({peer, place(peer, half, b), chunk_bytes});
                    }
                }
            }
        });
        exchange_now(0, transfers, "attention: gathering keys", stream);
    }
    // On the stream of the computation, which waits.
    void exchange_now(int s, const Transfers& transfers, const char* operation, cudaStream_t stream) {
        probe_.begin(TransferLane::transfers, s, stream);
        comm_.exchange(transfers.sends, transfers.receives, operation, stream);
        probe_.end(TransferLane::transfers, stream);
    }
    template <class Visit>
    static void for_each_peer(const Sizes& size, Visit visit) {
        for (int peer = 0; peer < size.W; ++peer) {
            if (peer != size.rank) {
                visit(peer);
            }
        }
    }

    void gather_forward(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k,
                        HeadView<const bf16> v, void* scratch, const AttentionShape& local, cudaStream_t stream) {
        const Sizes size = sizes(local);
        MemoryArea area(scratch);
        const GatherForward m(area, size);
        gather_keys(m.all.data, k, v, size, stream);
        const KeyViews<bf16> keys = key_views(m.all.data, size.T(), size);
        for_both_halves(stream, [&](int half, cudaStream_t on) {
            const int64_t row = half * size.n;
            flash_attention_forward(rows_from(out, row), m.half_lse[half], rows_from(q, row), keys.k, keys.v,
                                    half_shape(local, half), on);
            put_half_lse(lse, m.half_lse[half], half, size, on);
        });
    }
    // work(half, stream) for both, side by side, each on a stream of its own.
    template <class Work>
    void for_both_halves(cudaStream_t stream, Work work) {
        wait_for(beside_, stream, start_);
        for (int half = 0; half < HALVES; ++half) {
            const cudaStream_t on = stream_of(half, stream);
            compute(half, on, [&] { work(half, on); });
        }
        end_step(1, beside_);
        wait_for_step(1, stream);
    }

    void gather_backward(const Gradients& gradients, const Saved& saved, void* scratch, const AttentionShape& local,
                         bool deterministic, cudaStream_t stream) {
        const Sizes size = sizes(local);
        MemoryArea area(scratch);
        const GatherBackward m(area, size, gather_scratch_bytes(local, deterministic));
        const ContextPartition p = size.partition();
        const int64_t n = size.n;
        gather_keys(m.all.data, saved.k, saved.v, size, stream);
        const KeyViews<bf16> keys = key_views(m.all.data, size.T(), size);
        for_both_halves(stream, [&](int half, cudaStream_t on) {
            const int64_t row = half * n;
            const KeyViews<float> dkeys = half == 0 ? key_views(m.head_gradients.data, size.T() / HALVES, size)
                                                    : key_views(m.gradients.data, size.T(), size);
            take_half_lse(m.half_lse[half], saved.lse, half, size, on);
            flash_attention_backward(rows_from(gradients.dq, row), dkeys.k, dkeys.v, rows_from(saved.dout, row),
                                     rows_from(saved.q, row), keys.k, keys.v, rows_from(saved.out, row),
                                     m.half_lse[half], m.attention[half], half_shape(local, half), deterministic, on);
        });
        // The tail sees all that the head sees.
        const HeadView<float> found = key_heads(m.gradients.data, size.T(), size);
        compute(0, stream, [&] {
            ring_add({{}, found, {}, false, false}, key_heads(m.head_gradients.data, size.T() / HALVES, size), 0, 1,
                     {size.B, chunks_seen(p, 0) * n, 2 * size.Hkv, size.D}, stream);
        });

        Transfers transfers;
        const size_t chunk_bytes = n * size.kv_width() * sizeof(float);
        float* in = m.gradients_in.data;
        for_each_peer(size, [&](int peer) {
            for (int half = 0; half < HALVES; ++half) {
                for (int64_t b = 0; b < size.B; ++b) {
                    if (keys_seen(size.rank, peer).has(half)) {
                        transfers.sends.push_back({peer, found.row(b, p.chunk_of(peer, half) * n, 0), chunk_bytes});
                    }
                    if (keys_seen(peer, size.rank).has(half)) {
                        transfers.receives.push_back(
                            {peer, key_heads(in, HALVES * n, size).row(b, half * n, 0), chunk_bytes});
                    }
                }
            }
            in += size.kv_elements();
        });
        exchange_now(1, transfers, "attention: gradients of gathered keys", stream);

        const KeyViews<float> own = key_views(m.gradients.data, size.T(), size);
        const KeyViews<float> parts = key_views(m.gradients_in.data, HALVES * n, size);
        for (int half = 0; half < HALVES; ++half) {
            // All other ranks see a head, those before this one also its tail.
            const int num_parts = half == 0 ? size.W - 1 : size.rank;
            const int64_t row = half * n, position = p.first_position(half);
            const RowBlock rows(size.B, n, size.Hkv, size.D);
            ring_add({{}, rows_from(own.k, position), rows_from(gradients.dk, row), false, true},
                     rows_from(parts.k, row), size.kv_elements(), num_parts, rows, stream);
            ring_add({{}, rows_from(own.v, position), rows_from(gradients.dv, row), false, true},
                     rows_from(parts.v, row), size.kv_elements(), num_parts, rows, stream);
        }
    }

    Comm& comm_;
    CudaStream stream_{CudaStream::TRANSFERS};       // of transfers
    CudaStream beside_{CudaStream::BEFORE_DEFAULT};  // of odd steps: a first step's results are the first to travel
    CudaEvent start_, packed_, attended_[2], computed_[2], arrived_[2];
};
