// context_attention.cuh: causal attention of one sequence that lies on W ranks (context_partition.h): which of the
// three ways it goes. All take the same operands and give the same results, up to rounding.
//   ring    ring_attention.cuh: keys travel, a step's beside the attention of the step before
//   gather  the same file: all keys first, for short sequences
//   heads   head_attention.cuh: every rank gets all rows of some heads: head by head the bits of flash attention on
//           one GPU
// By itself the trainer takes ring or gather (choose_ring_or_gather): they send less where heads are grouped and ranks
// few (doc/context_parallel.md), and take any number of heads. On two GPUs of a host heads is as fast (dev/RESULTS.md).
//
// lse: of ring and gather [B, H, 2n] of the local rows, of heads [B, H / W, T] of this rank's heads; as large either
// way, and of use to the backward of the same way alone.
#pragma once
#include "head_attention.cuh"  // rows of some heads
#include "ring_attention.cuh"  // keys

// ---- sizes -------------------------------------------------------------------------------------
// What one rank's attention needs, known before there are other ranks: to plan memory.
class ContextAttentionPlan {
  public:
    // Rank `rank` of W that share every sequence. exchange: not automatic. part_keys: for tests; as each way's own.
    ContextAttentionPlan(int W, int rank, ContextExchange exchange, std::optional<int64_t> part_keys = {})
        : exchange_(exchange),
          ring_(W, rank, exchange == ContextExchange::heads ? ContextExchange::ring : exchange,
                part_keys.value_or(RING_PART_KEYS)),
          heads_(W, rank, part_keys.value_or(HEAD_PART_KEYS)) {}

    ContextExchange exchange() const { return exchange_; }

    // `local`: causal, no offset. Fewer sequences need no more, but shorter ones may, as they go in larger parts.
    size_t forward_scratch_bytes(const AttentionShape& local) const {
        return by_heads() ? heads_.forward_scratch_bytes(local) : ring_.forward_scratch_bytes(local);
    }
    size_t backward_scratch_bytes(const AttentionShape& local, bool deterministic) const {
        return by_heads() ? heads_.backward_scratch_bytes(local, deterministic)
                          : ring_.backward_scratch_bytes(local, deterministic);
    }
    // A number that is never smaller for longer sequences; where it is the same, longer sequences need more scratch.
    int64_t pace(const AttentionShape& local) const { return by_heads() ? heads_.pace(local) : ring_.pace(local); }
    // Bytes that this rank receives in one forward, and in one backward.
    int64_t forward_bytes_received(const AttentionShape& local) const {
        return by_heads() ? heads_.forward_bytes_received(local) : ring_.forward_bytes_received(local);
    }
    int64_t backward_bytes_received(const AttentionShape& local) const {
        return by_heads() ? heads_.backward_bytes_received(local) : ring_.backward_bytes_received(local);
    }

  private:
    bool by_heads() const { return exchange_ == ContextExchange::heads; }

    ContextExchange exchange_;
    RingAttentionPlan ring_;
    HeadAttentionPlan heads_;
};

// ---- the operation -----------------------------------------------------------------------------
// One object a rank, for all layers; calls are in the same order on all ranks of the communicator.
class ContextAttention : public ContextAttentionPlan {
  public:
    // The ranks of `context` share every sequence. exchange, part_keys: as of the plan.
    ContextAttention(Comm& context, ContextExchange exchange, std::optional<int64_t> part_keys = {})
        : ContextAttentionPlan(context.size(), context.rank(), exchange, part_keys) {
        if (exchange == ContextExchange::heads) {
            heads_ = std::make_unique<HeadAttention>(context, part_keys.value_or(HEAD_PART_KEYS));
        } else {
            ring_ = std::make_unique<RingAttention>(context, exchange, part_keys.value_or(RING_PART_KEYS));
        }
    }

    // From here on `profile`, which must outlive this, sees every call: as operations called `name`, and the pass.
    void set_profile(TransferProfile* profile, const std::string& name) {
        heads_ ? heads_->set_profile(profile, name) : ring_->set_profile(profile, name);
    }

    // out (=), lse (=) of the local queries over all keys of the sequence. scratch: forward_scratch_bytes, aligned to
    // BUFFER_ALIGNMENT, of any content. out must not overlap q, k, v.
    void forward(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k, HeadView<const bf16> v,
                 void* scratch, const AttentionShape& local, cudaStream_t stream) {
        heads_ ? heads_->forward(out, lse, q, k, v, scratch, local, stream)
               : ring_->forward(out, lse, q, k, v, scratch, local, stream);
    }

    // dq, dk, dv (=) of the local rows, from dout, the forward's operands, out and lse. scratch:
    // backward_scratch_bytes. dq, dk, dv must not overlap what is read. deterministic: as in flash_attention_backward.
    void backward(HeadView<bf16> dq, HeadView<bf16> dk, HeadView<bf16> dv, HeadView<const bf16> dout,
                  HeadView<const bf16> q, HeadView<const bf16> k, HeadView<const bf16> v, HeadView<const bf16> out,
                  const float* lse, void* scratch, const AttentionShape& local, bool deterministic,
                  cudaStream_t stream) {
        heads_ ? heads_->backward(dq, dk, dv, dout, q, k, v, out, lse, scratch, local, deterministic, stream)
               : ring_->backward(dq, dk, dv, dout, q, k, v, out, lse, scratch, local, deterministic, stream);
    }

  private:
    std::unique_ptr<RingAttention> ring_;  // one of the two
    std::unique_ptr<HeadAttention> heads_;
};
