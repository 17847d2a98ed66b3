// test_context_partition.cpp: sequences over several ranks: who holds what, the rules and what they say, the ring's
// schedule, the borders of Lighthouse attention, and the ring itself, emulated in double, against one process.
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <tuple>

#include "dev/test/reference_testing.h"
#include "dev/test/ring_emulation.h"
#include "llmc/reference/lighthouse.h"

namespace {

std::string message_of(const std::function<void()>& call) {
    try {
        call();
    } catch (const Error& error) {
        return error.what();
    }
    return "no error";
}

// ---- who holds what ----------------------------------------------------------------------------
TEST(ContextPartition, EveryPositionHasOneOwnerAndRowsAreInOrder) {
    for (const int W : {1, 2, 3, 4, 7, 8}) {
        const int64_t T = W * 2 * 5;
        std::set<int64_t> positions;
        for (int rank = 0; rank < W; ++rank) {
            const ContextPartition p = make_context_partition(T, W, rank);
            ASSERT_EQ(p.local_rows() * W, T);
            for (int64_t t = 0; t < p.local_rows(); ++t) {
                EXPECT_TRUE(positions.insert(p.position(t)).second);
                EXPECT_EQ(p.local_row(p.position(t)), t);
                EXPECT_TRUE(t == 0 || p.position(t) > p.position(t - 1));
                for (int other = 0; other < W; ++other) {
                    if (other != rank) {
                        EXPECT_FALSE(make_context_partition(T, W, other).local_row(p.position(t)).has_value());
                    }
                }
            }
        }
        EXPECT_EQ((int64_t)positions.size(), T);
        EXPECT_EQ(*positions.rbegin(), T - 1);
    }
}

TEST(ContextPartition, OneRankTakesAnyLength) {
    for (const int64_t T : {1, 5, 96}) {
        const ContextPartition p = make_context_partition(T, 1, 0);
        EXPECT_EQ(p.local_rows(), T);
        EXPECT_EQ(p.position(T - 1), T - 1);
        EXPECT_FALSE(chunk_before(p, 0).has_value());
        EXPECT_FALSE(chunk_after(p, 0).has_value());
    }
}

TEST(ContextPartition, RefusesByFlagAndNearestValue) {
    EXPECT_EQ(message_of([] { make_context_partition(100, 8, 0); }),
              "--seq_len 100: with --context_parallel 8 it must be a positive multiple of 16 (two chunks a rank); the "
              "nearest "
              "are 96 and 112");
    EXPECT_EQ(
        message_of([] { make_context_partition(9, 8, 0); }),
        "--seq_len 9: with --context_parallel 8 it must be a positive multiple of 16 (two chunks a rank); the nearest "
        "is 16");
    EXPECT_EQ(message_of([] { make_parallel_mesh(12, 0, 5); }),
              "--context_parallel 5: must divide the number of ranks, 12; what does: 1, 2, 3, 4, 6, 12");
    EXPECT_EQ(message_of([] { make_parallel_mesh(12, 0, 0); }), "--context_parallel 0: must be at least 1");
    LighthouseConfig config;
    config.levels = 3, config.pool = 4, config.topk = 1536;
    const LighthouseGeometry whole = make_lighthouse_geometry(98304, config);
    EXPECT_EQ(
        message_of([&] { make_chunk_geometry(whole, config, 8); }),
        "--lighthouse_topk 1536: with --context_parallel 8 its 12 tiles must fill 16 equal chunks, so it must be a "
        "multiple of 2048; the nearest is 2048");
    config.topk = 1536 + 1536;
    EXPECT_EQ(
        message_of([&] { make_chunk_geometry(make_lighthouse_geometry(98304, config), config, 5); }),
        "--lighthouse_topk 3072: with --context_parallel 5 its 24 tiles must fill 10 equal chunks, so it must be a "
        "multiple of 1280; the nearest are 2560 and 3840");
}

TEST(ParallelMesh, RanksOfASequenceAreNeighbours) {
    const ParallelMesh mesh = make_parallel_mesh(12, 7, 4);
    EXPECT_EQ(mesh.data_parallel, 3);
    EXPECT_EQ(mesh.data_rank(), 1);
    EXPECT_EQ(mesh.context_rank(), 3);
    EXPECT_EQ(mesh.context_group(), (std::vector<int>{4, 5, 6, 7}));
}

// ---- the schedule ------------------------------------------------------------------------------
// Every query chunk meets every key chunk of its past exactly once, and none of its future.
TEST(RingSchedule, MeetsThePastOnceAndTheFutureNever) {
    for (const int W : {1, 2, 3, 4, 5, 8}) {
        std::map<std::pair<int, int>, int> meetings;  // (query chunk, key chunk)
        for (int rank = 0; rank < W; ++rank) {
            const ContextPartition p = make_context_partition(2 * W, W, rank);
            const std::vector<RingStep> steps = make_ring_schedule(W, rank);
            for (int s = 1; s < W; ++s) {
                for (int q = 0; q < HALVES; ++q) {
                    for (int k = 0; k < HALVES; ++k) {
                        if (steps[s].queries.has(q) && steps[s].keys.has(k)) {
                            ++meetings[{p.chunk(q), p.chunk_of(steps[s].source, k)}];
                        }
                    }
                }
            }
            // Step 0: causal on local rows.
            for (int q = 0; q < p.halves(); ++q) {
                for (int k = 0; k <= q; ++k) {
                    ++meetings[{p.chunk(q), p.chunk(k)}];
                }
            }
        }
        const int chunks = make_context_partition(2 * W, W, 0).num_chunks();
        EXPECT_EQ((int)meetings.size(), chunks * (chunks + 1) / 2);
        for (const auto& [pair, count] : meetings) {
            EXPECT_LE(pair.second, pair.first);
            EXPECT_EQ(count, 1);
        }
    }
}

TEST(RingSchedule, StepsAreEqualWorkAndPeersAgree) {
    for (const int W : {2, 3, 4, 8}) {
        for (int rank = 0; rank < W; ++rank) {
            const std::vector<RingStep> steps = make_ring_schedule(W, rank);
            for (int s = 1; s < W; ++s) {
                EXPECT_EQ(steps[s].queries.count * steps[s].keys.count,
                          2);  // chunk pairs; step 0 has two whole ones, too
                const RingStep theirs = make_ring_schedule(W, steps[s].source)[s];
                EXPECT_EQ(theirs.reader, rank);
                EXPECT_TRUE(theirs.keys_sent == steps[s].keys);
            }
        }
    }
}

// ---- the ring in double ------------------------------------------------------------------------
struct Whole {
    Rows q, dout, out, dq;
    KeyRows kv, dkv;
    std::vector<double> lse;
};
Rows random_rows(int64_t B, int64_t rows, int heads, int D, uint64_t seed) {
    Rows r(B, rows, heads, D);
    r.values = random_values((int64_t)r.values.size(), 1.5, seed);
    return r;
}
Whole attend_whole(int64_t B, int64_t T, int H, int Hkv, int D, uint64_t seed) {
    Whole w;
    w.q = random_rows(B, T, H, D, seed), w.dout = random_rows(B, T, H, D, seed + 1);
    w.kv = {random_rows(B, T, Hkv, D, seed + 2), random_rows(B, T, Hkv, D, seed + 3)};
    w.out = Rows(B, T, H, D), w.dq = Rows(B, T, H, D);
    w.dkv = {Rows(B, T, Hkv, D), Rows(B, T, Hkv, D)};
    w.lse.resize((size_t)(B * H * T));
    reference::AttentionShape shape;
    shape.B = (int)B, shape.H = H, shape.Hkv = Hkv, shape.D = D;
    shape.Tq = shape.Tk = T;
    shape.scale = 1.0 / std::sqrt((double)D);
    const Whole& in = w;
    reference::attention_forward<double>(w.out.view(), w.lse.data(), in.q.view(), in.kv.k.view(), in.kv.v.view(),
                                         shape);
    reference::attention_backward<double>(w.dq.view(), w.dkv.k.view(), w.dkv.v.view(), in.dout.view(), in.q.view(),
                                          in.kv.k.view(), in.kv.v.view(), in.out.view(), w.lse.data(), shape);
    return w;
}

TEST(RingEmulation, EqualsOneProcess) {
    const SingleThread single_thread;
    const std::tuple<int, int64_t, int64_t, int, int, int> cases[] = {{2, 1, 4, 1, 1, 8},   {2, 2, 52, 4, 2, 16},
                                                                      {3, 1, 30, 3, 1, 8},  {4, 2, 72, 4, 4, 8},
                                                                      {5, 1, 40, 8, 1, 16}, {8, 1, 112, 2, 2, 8}};
    for (const auto& [W, B, T, H, Hkv, D] : cases) {
        const Whole whole = attend_whole(B, T, H, Hkv, D, 7 * W);
        std::vector<RingEmulation> ranks;
        for (int r = 0; r < W; ++r) {
            const ContextPartition p = make_context_partition(T, W, r);
            ranks.emplace_back(p, local_rows(whole.q, p),
                               KeyRows{local_rows(whole.kv.k, p), local_rows(whole.kv.v, p)});
        }
        std::map<std::pair<int, int>, KeyRows> returned;  // (owner, step)
        Rows out(B, T, H, D), dq(B, T, H, D);
        KeyRows dkv{Rows(B, T, Hkv, D), Rows(B, T, Hkv, D)};
        for (int r = 0; r < W; ++r) {
            const ContextPartition p = make_context_partition(T, W, r);
            const auto fetch = [&](int s) { return ranks[ranks[r].steps()[s].source].keys_to_send(s); };
            ranks[r].forward(fetch);
            ranks[r].backward(local_rows(whole.dout, p), fetch, [&](int s, const KeyRows& gradients) {
                returned[{ranks[r].steps()[s].source, s}] = gradients;
            });
            put_local_rows(out, ranks[r].out, p);
            put_local_rows(dq, ranks[r].dq, p);
            Rows lse(B * H, p.local_rows(), 1, 1), whole_lse(B * H, T, 1, 1);
            lse.values = ranks[r].lse, whole_lse.values = whole.lse;
            EXPECT_LT(relative_error(lse.values, local_rows(whole_lse, p).values), 1e-13);
        }
        for (int r = 0; r < W; ++r) {
            for (int s = 1; s < W; ++s) {
                ranks[r].add_returned(s, returned.at({r, s}));
            }
            const ContextPartition p = make_context_partition(T, W, r);
            put_local_rows(dkv.k, ranks[r].dkv.k, p);
            put_local_rows(dkv.v, ranks[r].dkv.v, p);
        }
        EXPECT_LT(relative_error(out.values, whole.out.values), 1e-13) << "W " << W;
        EXPECT_LT(relative_error(dq.values, whole.dq.values), 1e-12) << "W " << W;
        EXPECT_LT(relative_error(dkv.k.values, whole.dkv.k.values), 1e-12) << "W " << W;
        EXPECT_LT(relative_error(dkv.v.values, whole.dkv.v.values), 1e-12) << "W " << W;
    }
}

// ---- the borders -------------------------------------------------------------------------------
TEST(Borders, NeighboursAgreeAndFormTheSequence) {
    for (const int W : {2, 3, 8}) {
        int num_borders = 0;
        for (int rank = 0; rank < W; ++rank) {
            const ContextPartition p = make_context_partition(2 * W, W, rank);
            for (int half = 0; half < HALVES; ++half) {
                const std::optional<ChunkPlace> after = chunk_after(p, half);
                EXPECT_EQ(after.has_value(), p.chunk(half) + 1 < p.num_chunks());
                if (after) {
                    const ContextPartition theirs = make_context_partition(2 * W, W, after->rank);
                    EXPECT_EQ(theirs.chunk(after->half), p.chunk(half) + 1);
                    EXPECT_LE(std::abs(after->rank - rank), 1);  // never far
                    const std::optional<ChunkPlace> back = chunk_before(theirs, after->half);
                    ASSERT_TRUE(back.has_value());
                    EXPECT_EQ(back->rank, rank);
                    EXPECT_EQ(back->half, half);
                    ++num_borders;
                }
            }
        }
        EXPECT_EQ(num_borders, 2 * W - 1);
    }
}

}  // namespace
