// head_attention.cuh: causal attention of one sequence that lies on W ranks (context_partition.h), by exchanging heads:
// every rank gets all rows of a W-th of the heads, attends over the whole sequence as one GPU does, and sends the rows
// of the result home (DeepSpeed Ulysses, arXiv:2309.14509).
//
// bring   the local rows of q, k, v, in the backward of dout and out too, go packed to the ranks that have their heads;
//         what comes lands in the order of the sequence
// attend  flash attention on T rows
// take    the rows of out, in the backward of dq, dk, dv, go home and into their places
//
// One part after another, some key/value heads of each rank with their queries: parts attend on streams in turn, each
// as soon as its rows are there, so that where the last blocks of one leave multiprocessors idle the next one's begin;
// a part is brought while the one before attends, and taken while the next one does. What waits for a transfer is the
// first part and the end of the last: the more key/value heads a rank has, the less.
//
// Against ring attention: nothing is summed over ranks, so there are no partial results: out, dq, dk and dv are the
// bits of flash attention on one GPU, called for a part's heads alone. (Of dense layers the model turns dq and dk back,
// by RoPE, afterwards: one rounding more than on one GPU, whose kernel turns them before it rounds.) But queries and
// outputs travel too. Of each local row a rank receives (W - 1) / W times 2 H + 2 Hkv heads in bf16 forward and 4 H + 4
// Hkv backward; in the ring 3/4 (W - 1) times 2 Hkv forward, and backward these and 2 Hkv in float32. Hkv must be a
// multiple of W.
//
// Shapes: the local rows of each sequence, head chunk then tail chunk: q, out [B, 2n, H, D]; k, v [B, 2n, Hkv, D], each
// a HeadView; lse [B, H / W, T] of the heads that this rank attends with: for the backward alone. Repeats bit for bit
// wherever flash attention does. Checked by dev/cuda/context_attention.cu.
#pragma once
#include "comm.cuh"                    // ranks
#include "context_attention_base.cuh"  // how it is called
#include "context_parts.h"             // parts of a batch
#include "context_rows.cuh"            // rows in launches
#include "flash_attention.cuh"         // the attention of the whole sequence

// ---- messages ----------------------------------------------------------------------------------
// One tensor of what travels. Element: const bf16 of what is sent, bf16 of what comes home.
template <class Element>
struct HeadTensor {
    HeadView<Element> local;  // [B, 2n, heads of all ranks, D], from the part's first head on
    int rank_stride = 0;      // heads from one rank's first to the next one's
    int heads = 0;            // in this part, of each rank
};
constexpr int MAX_HEAD_TENSORS = 5;
template <class Element>
struct HeadMessages {
    HeadTensor<Element> tensors[MAX_HEAD_TENSORS];
    int heads;           // of all tensors
    bf16* whole;         // [B, T, heads, D] in the order of the sequence, of this rank's heads: its local rows of it
    bf16* messages;      // [W - 1, HALVES, B, n, heads, D]: for or from each other rank, in the order of ranks
    int W, rank;         // ranks, and which of them this is
    int chunks[HALVES];  // of the sequence, which this rank holds
    int64_t n;           // rows of a chunk
};

// Launch: 2^log2_lanes lanes a row of [B, 2n, W * heads, D]; 1-D grid. Element const bf16: `whole` and `messages` (=)
// the local rows; bf16: the local rows (=) those. Bound: bandwidth.
template <class Element>
__global__ void __launch_bounds__(ROW_THREADS) head_messages_kernel(HeadMessages<Element> m, RowBlock rows) {
    const RowPlace place(rows);
    if (!place.active) {
        return;
    }
    const int peer = place.h / m.heads, head = place.h - peer * m.heads;
    const int half = place.t >= m.n, slot = peer - (peer > m.rank);
    const int64_t t = place.t - half * m.n;
    const int64_t row = peer == m.rank ? (place.b * HALVES * m.W + m.chunks[half]) * m.n + t
                                       : (((int64_t)slot * HALVES + half) * rows.B + place.b) * m.n + t;
    bf16* const message = (peer == m.rank ? m.whole : m.messages) + (row * m.heads + head) * rows.D + place.d;
    int begin = 0;  // of a tensor's heads
#pragma unroll
    for (int i = 0; i < MAX_HEAD_TENSORS; ++i) {
        const HeadTensor<Element>& tensor = m.tensors[i];
        if (head >= begin && head < begin + tensor.heads) {
            Element* const local =
                tensor.local.row(place.b, place.t, peer * tensor.rank_stride + head - begin) + place.d;
            if constexpr (std::is_const_v<Element>) {
                store128(message, load128(local));
            } else {
                store128(local, load128(message));
            }
        }
        begin += tensor.heads;
    }
}

// ---- sizes -------------------------------------------------------------------------------------
// Keys of a part, over its key/value heads: as few heads as have so many. Fewer keys would not fill 132
// multiprocessors, nor a transfer's blocks. Of one head with less than about twice as many, the longest block takes
// longer than all blocks need of the GPU: then more parts run side by side (Lanes).
constexpr int64_t HEAD_PART_KEYS = (int64_t)1 << 14;

class HeadAttentionPlan : public ContextAttentionPlan {
  public:
    // Rank `rank` of W that share every sequence.
    HeadAttentionPlan(int W, int rank, int64_t part_keys) : W_(W), rank_(rank), part_keys_(part_keys) {
        CHECK(W >= 2, "attention by heads: needs at least 2 ranks on a sequence, not %d", W);
    }

    static bool takes(const AttentionShape& local, int W) { return local.Hkv % W == 0; }

    size_t forward_scratch_bytes(const AttentionShape& local) const override {
        return scratch_bytes(local, FORWARD, 0);
    }
    size_t backward_scratch_bytes(const AttentionShape& local, bool deterministic) const override {
        return scratch_bytes(local, BACKWARD, attention_bytes(local, deterministic));
    }

    int64_t pace(const AttentionShape& local) const override {
        const ContextParts<AttentionShape> parts = parts_of(local);
        return parts.pace() + (lanes_of(parts.largest()).streams == LONG.streams);
    }

    // A rank sends as many.
    int64_t forward_bytes_received(const AttentionShape& local) const override {
        return bytes_received(local, FORWARD);
    }
    int64_t backward_bytes_received(const AttentionShape& local) const override {
        return bytes_received(local, BACKWARD);
    }

  protected:
    // Heads that are brought and taken for each query head, and for each key/value head.
    struct Traffic {
        int q_brought, kv_brought, q_taken, kv_taken;
        int brought(const AttentionShape& s) const { return q_brought * s.H + kv_brought * s.Hkv; }
        int taken(const AttentionShape& s) const { return q_taken * s.H + kv_taken * s.Hkv; }
    };
    static constexpr Traffic FORWARD = {1, 2, 1, 0};   // q, k, v; out
    static constexpr Traffic BACKWARD = {3, 2, 1, 2};  // q, k, v, dout, out; dq, dk, dv

    // What a rank attends over at once, by the keys of the sequence: T rows of some of its heads, which are what a
    // part's heads are counted among.
    using Part = ContextPart<AttentionShape>;
    ContextParts<AttentionShape> parts_of(const AttentionShape& local) const {
        AttentionShape whole = local;
        whole.Tq = whole.Tk = W_ * local.Tq;
        whole.H /= W_, whole.Hkv /= W_;
        whole.yields = true;  // transfers and the next part run beside it
        return {whole, whole.Tk, part_keys_};
    }

    // Streams that parts attend on in turn; slots, the parts under way: of long sequences one whose attention ends, one
    // whose attention runs, and one that is brought.
    struct Lanes {
        int streams, slots;
    };
    static constexpr Lanes SHORT = {4, 4}, LONG = {2, 3};
    Lanes lanes_of(const AttentionShape& part) const { return part.Tk <= 2 * part_keys_ ? SHORT : LONG; }
    struct Slot {
        bf16* brought;   // [B, T, heads, D]
        bf16* sent;      // messages of what is brought
        bf16* found;     // [B, T, heads, D]
        bf16* returned;  // messages of what is taken
        Slot(MemoryArea& area, const AttentionShape& part, int W, const Traffic& traffic) {
            const int64_t row = part.B * part.Tk * part.D;  // elements of a head
            brought = area.take<bf16>(row * traffic.brought(part));
            sent = area.take<bf16>(row / W * (W - 1) * traffic.brought(part));
            found = area.take<bf16>(row * traffic.taken(part));
            returned = area.take<bf16>(row / W * (W - 1) * traffic.taken(part));
        }
    };
    struct Memory {
        Lanes lanes;
        std::vector<Slot> slots;            // of part i: slots[i % lanes.slots]
        std::vector<std::byte*> attention;  // and attention[i % lanes.streams]
        Memory(MemoryArea& area, const AttentionShape& part, int W, int64_t num_parts, Lanes lanes,
               const Traffic& traffic, size_t attention_bytes)
            : lanes(lanes) {
            for (int64_t i = 0; i < std::min<int64_t>(lanes.slots, num_parts); ++i) {
                slots.emplace_back(area, part, W, traffic);
            }
            for (int64_t i = 0; i < std::min<int64_t>(lanes.streams, num_parts); ++i) {
                attention.push_back(area.take<std::byte>((int64_t)attention_bytes));
            }
        }
    };
    Memory memory(MemoryArea& area, const AttentionShape& local, const Traffic& traffic, size_t attention_bytes) const {
        const ContextParts<AttentionShape> parts = parts_of(local);
        return Memory(area, parts.largest(), W_, parts.count(), lanes_of(parts.largest()), traffic, attention_bytes);
    }
    size_t attention_bytes(const AttentionShape& local, bool deterministic) const {
        return flash_attention_backward_scratch_bytes(parts_of(local).largest(), deterministic);
    }

    int W_, rank_;
    int64_t part_keys_;

  private:
    size_t scratch_bytes(const AttentionShape& local, const Traffic& traffic, size_t attention_bytes) const {
        MemoryArea area(nullptr);
        memory(area, local, traffic, attention_bytes);
        return area.num_bytes();
    }
    int64_t bytes_received(const AttentionShape& local, const Traffic& traffic) const {
        // Of the other ranks' rows this rank's heads, and of its own rows the other ranks'.
        const int64_t heads = (traffic.brought(local) + traffic.taken(local)) / W_ * (W_ - 1);
        return local.B * local.Tq * heads * local.D * (int64_t)sizeof(bf16);
    }
};

// ---- the operation -----------------------------------------------------------------------------
class HeadAttention : public ContextAttention, private HeadAttentionPlan {
  public:
    // The ranks of `context` share every sequence.
    HeadAttention(Comm& context, int64_t part_keys)
        : HeadAttentionPlan(context.size(), context.rank(), part_keys), comm_(context) {}

    const ContextAttentionPlan& plan() const override { return *this; }

    // lse: of this rank's heads.
    void forward(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k, HeadView<const bf16> v,
                 void* scratch, const AttentionShape& local, cudaStream_t stream) override {
        NVTX_RANGE();
        check_shape(local);
        probe_.begin_operation("forward");
        MemoryArea area(scratch);
        const auto bring = [&](const Part& part) -> Tensors<const bf16> {
            return {of_queries(q, part, local), of_keys(k, part, local), of_keys(v, part, local)};
        };
        const auto attend = [&](const Part& part, const Slot& slot, std::byte*, cudaStream_t on) {
            const AttentionShape& s = part.shape;
            const HeadView<bf16> in = whole_view(slot.brought, s, FORWARD.brought(s));
            flash_attention_forward(whole_view(slot.found, s, s.H), part.lse(lse), in, heads_from(in, s.H),
                                    heads_from(in, s.H + s.Hkv), s, on);
        };
        const auto take = [&](const Part& part) -> Tensors<bf16> { return {of_queries(out, part, local)}; };
        run(local, memory(area, local, FORWARD, 0), FORWARD, bring, attend, take, stream);
    }

    void backward(HeadView<bf16> dq, HeadView<bf16> dk, HeadView<bf16> dv, HeadView<const bf16> dout,
                  HeadView<const bf16> q, HeadView<const bf16> k, HeadView<const bf16> v, HeadView<const bf16> out,
                  const float* lse, void* scratch, const AttentionShape& local, bool deterministic,
                  cudaStream_t stream) override {
        NVTX_RANGE();
        check_shape(local);
        probe_.begin_operation("backward");
        MemoryArea area(scratch);
        const auto bring = [&](const Part& part) -> Tensors<const bf16> {
            return {of_queries(q, part, local), of_keys(k, part, local), of_keys(v, part, local),
                    of_queries(dout, part, local), of_queries(out, part, local)};
        };
        const auto attend = [&](const Part& part, const Slot& slot, std::byte* attention_scratch, cudaStream_t on) {
            const AttentionShape& s = part.shape;
            const HeadView<bf16> in = whole_view(slot.brought, s, BACKWARD.brought(s));
            const HeadView<bf16> found = whole_view(slot.found, s, BACKWARD.taken(s));
            const int v_head = s.H + s.Hkv, dout_head = v_head + s.Hkv;
            flash_attention_backward(found, heads_from(found, s.H), heads_from(found, v_head),
                                     heads_from(in, dout_head), in, heads_from(in, s.H), heads_from(in, v_head),
                                     heads_from(in, dout_head + s.H), part.lse(lse), attention_scratch, s,
                                     deterministic, on);
        };
        const auto take = [&](const Part& part) -> Tensors<bf16> {
            return {of_queries(dq, part, local), of_keys(dk, part, local), of_keys(dv, part, local)};
        };
        run(local, memory(area, local, BACKWARD, attention_bytes(local, deterministic)), BACKWARD, bring, attend, take,
            stream);
    }

  private:
    template <class Element>
    using Tensors = std::array<HeadTensor<Element>, MAX_HEAD_TENSORS>;

    void check_shape(const AttentionShape& s) const {
        check_local_rows(s);
        CHECK(takes(s, W_), "attention by heads: %d key/value heads are no multiple of %d ranks", s.Hkv, W_);
    }

    // A tensor's part of the local rows.
    template <class Element>
    HeadTensor<Element> of_queries(HeadView<Element> view, const Part& part, const AttentionShape& local) const {
        return {part.queries(view), local.H / W_, part.shape.H};
    }
    template <class Element>
    HeadTensor<Element> of_keys(HeadView<Element> view, const Part& part, const AttentionShape& local) const {
        return {part.keys(view), local.Hkv / W_, part.shape.Hkv};
    }
    // Rows [B, T, heads, D].
    static HeadView<bf16> whole_view(bf16* rows, const AttentionShape& part, int heads) {
        const int64_t row = (int64_t)heads * part.D;
        return {rows, part.Tk * row, row, part.D};
    }

    ContextPartition partition(const AttentionShape& part) const { return {W_, rank_, part.Tk}; }
    // visit(rank, its messages, half, sequence) for all messages of other ranks.
    template <class Visit>
    void for_each_message(bf16* messages, const AttentionShape& part, int heads, Visit visit) const {
        const int64_t num_elements = partition(part).chunk_rows() * heads * part.D;
        for (int peer = 0; peer < W_; ++peer) {
            for (int half = 0; peer != rank_ && half < HALVES; ++half) {
                for (int b = 0; b < part.B; ++b, messages += num_elements) {
                    visit(peer, messages, half, b);
                }
            }
        }
    }
    // Between messages and rows of `whole` that other ranks hold. whole_is_sent: home, otherwise to this rank.
    void exchange(bf16* whole, bf16* messages, int heads, bool whole_is_sent, const Part& part, int i,
                  const char* operation) {
        const ContextPartition p = partition(part.shape);
        const size_t num_bytes = p.chunk_rows() * heads * part.shape.D * sizeof(bf16);
        std::vector<DeviceSend> sends;
        std::vector<DeviceReceive> receives;
        for_each_message(messages, part.shape, heads, [&](int peer, bf16* message, int half, int b) {
            const int64_t row = b * p.T + p.chunk_of(peer, half) * p.chunk_rows();
            bf16* const rows = whole + row * heads * part.shape.D;
            sends.push_back({peer, whole_is_sent ? rows : message, num_bytes});
            receives.push_back({peer, whole_is_sent ? message : rows, num_bytes});
        });
        probe_.begin(TransferLane::transfers, i, stream_);
        comm_.exchange(sends, receives, operation, stream_);
        probe_.end(TransferLane::transfers, stream_);
    }
    template <class Element>
    void copy_messages(const Tensors<Element>& tensors, bf16* whole, bf16* messages, int heads, const Part& part) {
        const ContextPartition p = partition(part.shape);
        HeadMessages<Element> m{};
        std::copy(tensors.begin(), tensors.end(), m.tensors);
        m.heads = heads, m.whole = whole, m.messages = messages;
        m.W = W_, m.rank = rank_, m.n = p.chunk_rows();
        for (int half = 0; half < HALVES; ++half) {
            m.chunks[half] = p.chunk(half);
        }
        launch_rows(head_messages_kernel<Element>, {part.shape.B, p.local_rows(), W_ * heads, part.shape.D}, stream_,
                    m);
    }

    // Every part: bring(part) and take(part) name the tensors, attend(part, slot, scratch, stream) enqueues the
    // attention. Transfers and copies run on a stream of their own. Before that waits for the attention of part i, to
    // take it, as many later parts have been sent as slots hold; the next is packed right after part i is taken, which
    // frees its slot. Part 1 is packed before part 0 is sent: its transfer then begins with the attention of part 0,
    // whose first blocks, the longest, would otherwise be before it.
    template <class Bring, class Attend, class Take>
    void run(const AttentionShape& local, const Memory& m, const Traffic& traffic, const Bring& bring,
             const Attend& attend, const Take& take, cudaStream_t stream) {
        const std::vector<Part> parts = parts_of(local).all();
        const int num_parts = (int)parts.size(), slots = m.lanes.slots, streams = m.lanes.streams;
        const auto pack_part = [&](int i) {
            if (i < num_parts) {
                const Slot& slot = m.slots[i % slots];
                copy_messages(bring(parts[i]), slot.brought, slot.sent, traffic.brought(parts[i].shape), parts[i]);
            }
        };
        const auto send_part = [&](int i) {
            if (i < num_parts) {
                const Slot& slot = m.slots[i % slots];
                exchange(slot.brought, slot.sent, traffic.brought(parts[i].shape), false, parts[i], i,
                         "attention: heads of all ranks");
                CUDA_CHECK(cudaEventRecord(brought_[i % slots], stream_));
            }
        };
        const auto take_part = [&](int i) {
            const Slot& slot = m.slots[i % slots];
            const int heads = traffic.taken(parts[i].shape);
            CUDA_CHECK(cudaStreamWaitEvent(stream_, attended_[i % streams]));
            exchange(slot.found, slot.returned, heads, true, parts[i], i, "attention: results of heads");
            copy_messages(take(parts[i]), slot.found, slot.returned, heads, parts[i]);
        };
        const auto stream_of = [&](int i) {
            return i % streams == 0 ? stream : (cudaStream_t)beside_[i % streams - 1];
        };
        wait_for(stream_, stream, start_);
        for (const CudaStream& beside : beside_) {
            CUDA_CHECK(cudaStreamWaitEvent(beside, start_));
        }
        pack_part(0);
        for (int i = 0; i < slots - 2; ++i) {
            pack_part(i + 1);
            send_part(i);
        }
        for (int i = 0; i < num_parts; ++i) {
            send_part(i + slots - 2);
            if (i > 0) {
                take_part(i - 1);
            }
            pack_part(i + slots - 1);
            const cudaStream_t on = stream_of(i);
            const TransferLane lane = i % 2 == 0 ? TransferLane::computation : TransferLane::computation_beside;
            CUDA_CHECK(cudaStreamWaitEvent(on, brought_[i % slots]));
            probe_.begin(lane, i, on);
            attend(parts[i], m.slots[i % slots], m.attention[i % streams], on);
            probe_.end(lane, on);
            CUDA_CHECK(cudaEventRecord(attended_[i % streams], on));
        }
        take_part(num_parts - 1);
        wait_for(stream, stream_, taken_);
    }

    Comm& comm_;
    CudaStream stream_{CudaStream::TRANSFERS};  // of transfers, and of the copies before and after them
    CudaStream beside_[SHORT.streams - 1];
    CudaEvent start_, brought_[SHORT.slots], attended_[SHORT.streams], taken_;
};
