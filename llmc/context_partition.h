// context_partition.h: how one sequence is spread over W ranks (context parallelism): which rank holds which tokens,
// who meets whose keys when, and who must tell whom what at the borders. Arithmetic only: no communication, no CUDA.
//
// The sequence is cut into 2W equal chunks; rank r holds chunk r (its head) and chunk 2W-1-r (its tail), in this order.
// Under a causal mask the first chunk does the least work and the last the most, so every rank gets the same. The rows
// of a rank are in the order of their positions.
//
// Attention takes W steps. At step 0 the local queries meet the local keys: an ordinary causal attention over both
// halves. At step s they meet the keys of rank r-s (mod W), and there only two cases exist, of equal work:
//   source < r   its head is in everyone's past, its tail in everyone's future: both query halves see its head
//   source > r   it lies between head and tail: only the tail's queries see it, and they see all of it
// No pair is masked within; those wholly in the future are skipped. Keys go straight from their owner to whoever
// needs them, so that only what is needed travels: the least that any schedule can send.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "lighthouse_geometry.h"
#include "lighthouse_rules.h"

// ---- the mesh ----------------------------------------------------------------------------------
// Ranks as data parallel x context parallel: ranks that share a sequence are neighbours, so they share a node's links.
struct ParallelMesh {
    int data_parallel = 1;     // groups of ranks with different sequences
    int context_parallel = 1;  // W, ranks that share a sequence
    int rank = 0;              // 0 .. size() - 1

    int size() const { return data_parallel * context_parallel; }
    int data_rank() const { return rank / context_parallel; }
    int context_rank() const { return rank % context_parallel; }
    // The ranks of this rank's context group, by context rank.
    std::vector<int> context_group() const {
        std::vector<int> group;
        for (int i = 0; i < context_parallel; ++i) {
            group.push_back(data_rank() * context_parallel + i);
        }
        return group;
    }
};

// num_ranks ranks with context_parallel of them on a sequence. Throws Error with the values that work.
inline ParallelMesh make_parallel_mesh(int num_ranks, int rank, int context_parallel) {
    CHECK(context_parallel >= 1, "--context_parallel %d: must be at least 1", context_parallel);
    if (num_ranks % context_parallel != 0) {
        std::string divisors;
        for (int i = 1; i <= num_ranks; ++i) {
            if (num_ranks % i == 0) {
                divisors += (divisors.empty() ? "" : ", ") + std::to_string(i);
            }
        }
        fail("--context_parallel %d: must divide the number of ranks, %d; what does: %s%s", context_parallel, num_ranks,
             divisors.c_str(), num_ranks == 1 ? " (scripts/spawn_ranks.sh and mpirun_train.sh start several)" : "");
    }
    return {num_ranks / context_parallel, context_parallel, rank};
}

// ---- who holds what ----------------------------------------------------------------------------
constexpr int HALVES = 2;  // chunks of a rank: its head, 0, and its tail, 1

struct ContextPartition {
    int W = 1;      // ranks that share the sequence
    int rank = 0;   // among them
    int64_t T = 0;  // tokens of the whole sequence

    int halves() const { return W == 1 ? 1 : HALVES; }  // alone, a rank holds the sequence as one chunk
    int num_chunks() const { return halves() * W; }
    int64_t chunk_rows() const { return T / num_chunks(); }
    int64_t local_rows() const { return T / W; }

    int chunk(int half) const { return chunk_of(rank, half); }
    int chunk_of(int of_rank, int half) const { return half == 0 ? of_rank : num_chunks() - 1 - of_rank; }
    int owner(int chunk) const { return std::min(chunk, num_chunks() - 1 - chunk); }
    int half_of(int chunk) const { return chunk < W ? 0 : 1; }

    // Position in the sequence of local row t, and the first of a half.
    int64_t position(int64_t t) const {
        const int half = t < chunk_rows() ? 0 : 1;
        return first_position(half) + t - half * chunk_rows();
    }
    int64_t first_position(int half) const { return chunk(half) * chunk_rows(); }
    // The local row of a position; none when another rank holds it.
    std::optional<int64_t> local_row(int64_t position) const {
        const int c = (int)(position / chunk_rows());
        if (owner(c) != rank) {
            return std::nullopt;
        }
        return half_of(c) * chunk_rows() + position % chunk_rows();
    }
};

// The partition of T tokens over W ranks. Throws Error with the nearest lengths that work, none above `longest`.
inline ContextPartition make_context_partition(int64_t T, int W, int rank, int64_t longest = INT64_MAX) {
    CHECK(W >= 1 && rank >= 0 && rank < W, "context partition: rank %d of %d", rank, W);
    const int64_t unit = ContextPartition{W, rank, T}.num_chunks();
    CHECK(T >= unit && T % unit == 0,
          "--seq_len %lld: with --context_parallel %d it must be a positive multiple of %lld (two chunks a rank)%s",
          (long long)T, W, (long long)unit, nearest_text(nearest_multiples(T, unit, unit, longest)).c_str());
    return {W, rank, T};
}

// The geometry of one chunk of a sequence under Lighthouse attention: a tile never crosses a chunk, so a chunk is a
// shorter sequence with its share of the tiles, and selects what the whole sequence would. Throws Error with the
// nearest budget that works. `whole` is the legal geometry of T tokens.
inline LighthouseGeometry make_chunk_geometry(const LighthouseGeometry& whole, const LighthouseConfig& config, int W) {
    const int64_t chunks = ContextPartition{W, 0, whole.T}.num_chunks();
    make_lighthouse_geometry(whole.T, config, {chunks});  // refuses tiles that cross chunks
    LighthouseConfig share = config;
    share.topk = config.topk / chunks;
    return make_lighthouse_geometry(whole.T / chunks, share);
}

// ---- the ring ----------------------------------------------------------------------------------
// Some of the two halves of a rank: [first, first + count).
struct HalfRange {
    int first = 0;
    int count = HALVES;

    bool has(int half) const { return half >= first && half < first + count; }
    int64_t first_row(int64_t chunk_rows) const { return first * chunk_rows; }
    int64_t num_rows(int64_t chunk_rows) const { return count * chunk_rows; }
    bool operator==(const HalfRange& other) const { return first == other.first && count == other.count; }
};
constexpr HalfRange HEAD = {0, 1}, TAIL = {1, 1}, BOTH_HALVES = {0, HALVES};

// Which halves of a rank's keys another rank's queries see, and which of its queries see them.
inline HalfRange keys_seen(int reader, int source) { return source < reader ? HEAD : BOTH_HALVES; }
inline HalfRange queries_seeing(int reader, int source) { return source > reader ? TAIL : BOTH_HALVES; }

// What one contribution does to a half's running result: the first adds to the result of step 0, the last rounds it.
struct Contribution {
    bool any = false;
    bool first = false;
    bool last = false;
};

// One step of rank r. Step 0 is the causal attention of all local rows on each other: source and reader are r.
struct RingStep {
    int source = 0;  // whose keys the local queries meet
    HalfRange keys;  // the halves of them that are seen; causal at step 0, full at all others
    HalfRange queries;
    int reader = 0;       // who meets this rank's keys in the same step: they are sent there before,
    HalfRange keys_sent;  // these halves, and their gradients come back after
    std::array<Contribution, HALVES> to_queries;  // of this step's partial results to the local queries' halves
    std::array<Contribution, HALVES> to_keys;     // of the gradients that come back to the local keys' halves
};

// The W steps of a rank.
inline std::vector<RingStep> make_ring_schedule(int W, int rank) {
    std::vector<RingStep> steps(W);
    for (int s = 0; s < W; ++s) {
        RingStep& step = steps[s];
        step.source = (rank - s + W) % W;
        step.reader = (rank + s) % W;
        step.keys = keys_seen(rank, step.source);
        step.queries = queries_seeing(rank, step.source);
        step.keys_sent = keys_seen(step.reader, rank);
    }
    // Which of the contributions after step 0 is a half's first, and which its last.
    const auto mark = [&](HalfRange RingStep::*halves, std::array<Contribution, HALVES> RingStep::*contributions) {
        for (int half = 0; half < HALVES; ++half) {
            Contribution* last = nullptr;
            for (int s = 1; s < W; ++s) {
                if ((steps[s].*halves).has(half)) {
                    Contribution& c = (steps[s].*contributions)[half];
                    c.any = true;
                    c.first = last == nullptr;
                    last = &c;
                }
            }
            if (last != nullptr) {
                last->last = true;
            }
        }
    };
    mark(&RingStep::queries, &RingStep::to_queries);
    mark(&RingStep::keys_sent, &RingStep::to_keys);
    return steps;
}

// Chunks of keys that the queries of `half` of a rank see, counted from the start of the sequence; the last of them is
// the half's own, causal.
inline int chunks_seen(const ContextPartition& p, int half) { return p.chunk(half) + 1; }

// ---- the borders -------------------------------------------------------------------------------
// A chunk's neighbour in the sequence: who holds it, and as which half. `rank` may be this rank's own.
struct ChunkPlace {
    int rank = 0;
    int half = 0;
};
inline std::optional<ChunkPlace> place_of(const ContextPartition& p, int chunk) {
    if (chunk < 0 || chunk >= p.num_chunks()) {
        return std::nullopt;
    }
    return ChunkPlace{p.owner(chunk), p.half_of(chunk)};
}
// Of a local half: none before the first chunk of the sequence and after the last.
inline std::optional<ChunkPlace> chunk_before(const ContextPartition& p, int half) {
    return place_of(p, p.chunk(half) - 1);
}
inline std::optional<ChunkPlace> chunk_after(const ContextPartition& p, int half) {
    return place_of(p, p.chunk(half) + 1);
}
