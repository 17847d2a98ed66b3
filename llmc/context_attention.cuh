// context_attention.cuh: causal attention of one sequence that lies on W ranks (context_partition.h): which of the
// three ways it goes. All take the same operands and give the same results, up to rounding.
//   ring    ring_attention.cuh: keys travel, a step's beside the attention of the step before
//   gather  the same file: all keys first, for short sequences
//   heads   head_attention.cuh: every rank gets all rows of some heads and attends as one GPU does
// By itself the trainer takes ring or gather (choose_ring_or_gather): they send less where heads are grouped and ranks
// few (doc/context_parallel.md), and take any number of heads. On two GPUs of a host heads is as fast (dev/RESULTS.md).
//
// lse: of ring and gather [B, H, 2n] of the local rows, of heads [B, H / W, T] of this rank's heads; as large either
// way, and of use to the backward of the same way alone.
#pragma once
#include <memory>
#include <optional>

#include "context_attention_base.cuh"  // how attention is called
#include "head_attention.cuh"          // rows of some heads
#include "ring_attention.cuh"          // keys

// Of rank `rank` of W that share every sequence. exchange: not automatic. part_keys: for tests; otherwise the way's
// own.
inline std::unique_ptr<ContextAttentionPlan> make_context_attention_plan(int W, int rank, ContextExchange exchange,
                                                                         std::optional<int64_t> part_keys = {}) {
    if (exchange == ContextExchange::heads) {
        return std::make_unique<HeadAttentionPlan>(W, rank, part_keys.value_or(HEAD_PART_KEYS));
    }
    return std::make_unique<RingAttentionPlan>(W, rank, exchange, part_keys.value_or(RING_PART_KEYS));
}
// The ranks of `context` share every sequence. exchange, part_keys: as of the plan.
inline std::unique_ptr<ContextAttention> make_context_attention(Comm& context, ContextExchange exchange,
                                                                std::optional<int64_t> part_keys = {}) {
    if (exchange == ContextExchange::heads) {
        return std::make_unique<HeadAttention>(context, part_keys.value_or(HEAD_PART_KEYS));
    }
    return std::make_unique<RingAttention>(context, exchange, part_keys.value_or(RING_PART_KEYS));
}
