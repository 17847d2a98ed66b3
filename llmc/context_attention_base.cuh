// context_attention_base.cuh: causal attention of one sequence that lies on several ranks, as it is called whichever
// way it goes: its plan, and the operation. The ways: context_attention.cuh. Shapes: the local rows of each sequence,
// head chunk then tail chunk: q, out [B, 2n, H, D]; k, v [B, 2n, Hkv, D], each a HeadView; lse as large as [B, H, 2n].
// n: rows of a chunk. `local`: the shape of the local rows on each other: Tq = Tk = 2n, causal, no offset.
#pragma once
#include <string>

#include "attention_shape.cuh"   // operands
#include "context_partition.h"   // chunks
#include "transfer_profile.cuh"  // what is hidden

// ---- sizes -------------------------------------------------------------------------------------
// What one rank's attention needs, known before there are other ranks: to plan memory.
class ContextAttentionPlan {
  public:
    virtual ~ContextAttentionPlan() = default;

    // Fewer sequences need no more, but shorter ones may, as they go in larger parts.
    virtual size_t forward_scratch_bytes(const AttentionShape& local) const = 0;
    virtual size_t backward_scratch_bytes(const AttentionShape& local, bool deterministic) const = 0;
    // A number that is never smaller for longer sequences; where it is the same, longer sequences need more scratch.
    virtual int64_t pace(const AttentionShape& local) const = 0;
    // Bytes that this rank receives in one forward, and in one backward.
    virtual int64_t forward_bytes_received(const AttentionShape& local) const = 0;
    virtual int64_t backward_bytes_received(const AttentionShape& local) const = 0;
};

// ---- the operation -----------------------------------------------------------------------------
// One object a rank, for all layers; calls are in the same order on all ranks of the communicator.
class ContextAttention {
  public:
    virtual ~ContextAttention() = default;
    virtual const ContextAttentionPlan& plan() const = 0;

    // From here on `profile`, which must outlive this, sees every call: as operations called `name`, and the pass.
    void set_profile(TransferProfile* profile, const std::string& name) { probe_.attach(profile, name); }

    // out (=) of the local queries over all keys of the sequence; lse (=), for the backward of the same way. scratch:
    // forward_scratch_bytes, aligned to BUFFER_ALIGNMENT, of any content. out must not overlap q, k, v.
    virtual void forward(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k,
                         HeadView<const bf16> v, void* scratch, const AttentionShape& local, cudaStream_t stream) = 0;

    // dq, dk, dv (=) of the local rows, from dout, the forward's operands, out and lse. scratch:
    // backward_scratch_bytes. dq, dk, dv must not overlap what is read. deterministic: as in flash_attention_backward.
    virtual void backward(HeadView<bf16> dq, HeadView<bf16> dk, HeadView<bf16> dv, HeadView<const bf16> dout,
                          HeadView<const bf16> q, HeadView<const bf16> k, HeadView<const bf16> v,
                          HeadView<const bf16> out, const float* lse, void* scratch, const AttentionShape& local,
                          bool deterministic, cudaStream_t stream) = 0;

  protected:
    static void check_local_rows(const AttentionShape& s) {
        CHECK(s.Tq == s.Tk && s.Tq % HALVES == 0 && s.Tq > 0 && s.causal && s.causal_offset == 0,
              "attention over ranks: the local rows must be two equal chunks, causal on each other, not %lld queries "
              "and %lld keys",
              (long long)s.Tq, (long long)s.Tk);
    }

    TransferProbe probe_;
};
