// test_context_partition.cpp: sequences over several ranks: who holds what, the rules and what they say, the ring's
// schedule, the parts of a batch, the borders of Lighthouse attention, and the ring itself, emulated in double, against
// one process.
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <tuple>

#include "dev/test/reference_testing.h"
#include "dev/test/ring_emulation.h"
#include "llmc/context_parts.h"
#include "llmc/reference/lighthouse_border.h"

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
    EXPECT_NE(message_of([] { make_context_partition(999, 5, 0, 999); }).find("; the nearest is 990"),
              std::string::npos)
        << "none that is longer than a sequence may be";
    EXPECT_EQ(message_of([] { make_parallel_mesh(12, 0, 5); }),
              "--context_parallel 5: must divide the number of ranks, 12; what does: 1, 2, 3, 4, 6, 12");
    EXPECT_EQ(message_of([] { make_parallel_mesh(12, 0, 0); }), "--context_parallel 0: must be at least 1");
    LighthouseConfig config;
    config.levels = 3, config.pool = 4, config.topk = 1536;
    const LighthouseGeometry whole = make_lighthouse_geometry(98304, config);
    EXPECT_EQ(message_of([&] { make_chunk_geometry(whole, config, 8); }),
              "--lighthouse_topk 1536: must be a positive multiple of 2048 (whole tiles in each of the 16 chunks of "
              "--context_parallel); the nearest that works is 2048");
    config.topk = 1536 + 1536;
    EXPECT_EQ(message_of([&] { make_chunk_geometry(make_lighthouse_geometry(98304, config), config, 5); }),
              "--lighthouse_topk 3072: must be a positive multiple of 1280 (whole tiles in each of the 10 chunks of "
              "--context_parallel); the nearest that works is 2560, with --seq_len 98240");
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

// The gradients that every rank found for the others' keys, brought home.
void return_gradients(std::vector<RingEmulation>& ranks, const std::map<std::pair<int, int>, KeyRows>& returned) {
    for (int r = 0; r < (int)ranks.size(); ++r) {
        for (int s = 1; s < (int)ranks.size(); ++s) {
            ranks[r].add_returned(s, returned.at({r, s}));
        }
    }
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
        return_gradients(ranks, returned);
        for (int r = 0; r < W; ++r) {
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

// ---- parts of a batch --------------------------------------------------------------------------
using Parts = ContextParts<reference::AttentionShape>;
using Part = ContextPart<reference::AttentionShape>;

// check(batch, rows, part_keys) for batches of every size, each ever longer, whose parts are some sequences, then some
// heads of one.
template <class Check>
void for_each_batch(Check check) {
    reference::AttentionShape batch;
    for (batch.B = 1; batch.B <= 9; ++batch.B) {
        for (batch.Hkv = 1; batch.Hkv <= 8; ++batch.Hkv) {
            batch.H = (1 + batch.B % 3) * batch.Hkv;
            for (const int64_t part_keys : {1, 16, 60}) {
                for (int64_t rows = 1; rows <= 64; ++rows) {
                    batch.Tq = batch.Tk = 2 * rows;
                    check(batch, rows, part_keys);
                }
            }
        }
    }
}

TEST(ContextParts, TakeEachSequenceAndHeadOnce) {
    for_each_batch([](const reference::AttentionShape& batch, int64_t rows, int64_t part_keys) {
        const Parts parts(batch, rows, part_keys);
        std::set<std::pair<int, int>> taken;  // sequence and key/value head
        for (const Part& part : parts.all()) {
            ASSERT_EQ(part.head * batch.Hkv, part.kv_head * batch.H);
            ASSERT_EQ(part.shape.H * batch.Hkv, part.shape.Hkv * batch.H);
            ASSERT_TRUE(part.shape.Hkv == batch.Hkv || part.shape.B == 1);
            ASSERT_TRUE(part.shape.Hkv == parts.largest().Hkv && part.shape.B <= parts.largest().B);
            for (int b = part.b; b < part.b + part.shape.B; ++b) {
                for (int h = part.kv_head; h < part.kv_head + part.shape.Hkv; ++h) {
                    ASSERT_TRUE(b < batch.B && h < batch.Hkv && taken.insert({b, h}).second);
                }
            }
        }
        ASSERT_EQ((int)taken.size(), batch.B * batch.Hkv);
        ASSERT_EQ((int64_t)parts.all().size(), parts.count());
    });
}

TEST(ContextParts, AreAsSmallAsHaveSoManyKeys) {
    for_each_batch([](const reference::AttentionShape& batch, int64_t rows, int64_t part_keys) {
        const reference::AttentionShape part = Parts(batch, rows, part_keys).largest();
        const auto num_keys = [&](int B, int Hkv) { return B * Hkv * rows; };
        if (num_keys(part.B, part.Hkv) < part_keys) {
            ASSERT_TRUE(part.B == batch.B && part.Hkv == batch.Hkv);
        }
        ASSERT_TRUE(part.B == 1 || num_keys(part.B - 1, part.Hkv) < part_keys);
        for (int Hkv = 1; Hkv < part.Hkv; ++Hkv) {
            ASSERT_TRUE(batch.Hkv % Hkv != 0 || num_keys(1, Hkv) < part_keys);
        }
    });
}

TEST(ContextParts, KeepTheirSizesWhileThePaceIsTheSame) {
    int64_t last_pace = 0;
    reference::AttentionShape last;
    for_each_batch([&](const reference::AttentionShape& batch, int64_t rows, int64_t part_keys) {
        const Parts parts(batch, rows, part_keys);
        const reference::AttentionShape part = parts.largest();
        if (rows > 1) {
            ASSERT_GE(parts.pace(), last_pace);
            ASSERT_EQ(parts.pace() == last_pace, part.B == last.B && part.Hkv == last.Hkv);
        }
        last_pace = parts.pace(), last = part;
    });
}

TEST(ContextParts, BeginWhereTheirRowsLie) {
    reference::AttentionShape batch;
    batch.B = 3, batch.H = 8, batch.Hkv = 4, batch.Tq = batch.Tk = 6;
    std::vector<float> rows(batch.B * batch.Tq * batch.H), lse(batch.B * batch.H * batch.Tq);
    const View<float> q(rows.data(), batch.Tq * batch.H, batch.H, 1),
        k(rows.data(), batch.Tk * batch.Hkv, batch.Hkv, 1);
    for (const int64_t part_keys : {1, 6, 20}) {
        for (const Part& part : Parts(batch, 3, part_keys).all()) {
            EXPECT_EQ(part.queries(q).row(0, 5, 1), q.row(part.b, 5, part.head + 1));
            EXPECT_EQ(part.keys(k).row(0, 5, 0), k.row(part.b, 5, part.kv_head));
            EXPECT_EQ(part.lse(lse.data()), lse.data() + (part.b * batch.H + part.head) * batch.Tq);
        }
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

// ---- Lighthouse attention ----------------------------------------------------------------------
// One rank's Lighthouse layer: its two chunks are two sequences of the stages around attention, and two halves of the
// gathered sub-sequence in the ring.
struct LighthouseRank {
    ContextPartition tokens, gathered;  // of T tokens, of S rows
    LighthouseGeometry chunk;
    std::vector<int32_t> entries, positions;  // [2 B, Hkv, ...]
    Rows q, k, v, dout;                       // [2 B, chunk rows, ...]
};
// [B, 2n, ...] as [2 B, n, ...], and back.
Rows as_chunks(Rows rows) {
    rows.B *= HALVES, rows.rows /= HALVES;
    return rows;
}
Rows as_halves(Rows rows) {
    rows.B /= HALVES, rows.rows *= HALVES;
    return rows;
}

TEST(LighthouseChunks, SelectionAndLayerEqualOneProcess) {
    const SingleThread single_thread;
    struct Case {
        int W, levels, pool;
        int64_t tiles, coarsest;  // of a tile
        int B, H, Hkv, D;
    };
    for (const Case& c : {Case{2, 2, 4, 4, 128, 2, 2, 1, 8}, Case{2, 4, 2, 4, 128, 1, 2, 2, 8},
                          Case{3, 3, 2, 6, 130, 1, 2, 1, 8}, Case{4, 2, 2, 8, 128, 1, 1, 1, 8}}) {
        LighthouseConfig config;
        config.levels = c.levels, config.pool = c.pool, config.topk = c.tiles * LIGHTHOUSE_TILE_BUDGET;
        int64_t T = c.tiles * c.coarsest;
        for (int l = 1; l < c.levels; ++l) {
            T *= c.pool;
        }
        const int B = c.B, H = c.H, Hkv = c.Hkv, D = c.D, W = c.W, CHUNKS = HALVES * B;
        const LighthouseGeometry g = make_lighthouse_geometry(T, config);
        const double scale = 1.0 / std::sqrt((double)D);
        const Rows q = random_rows(B, T, H, D, 1), k = random_rows(B, T, Hkv, D, 2), v = random_rows(B, T, Hkv, D, 3);
        const Rows dout = random_rows(B, T, H, D, 4);
        Rows out(B, T, H, D), dq(B, T, H, D), dk(B, T, Hkv, D), dv(B, T, Hkv, D);
        reference::LighthouseState<double> whole;
        reference::lighthouse_forward<double>(out.view(), whole, q.view(), k.view(), v.view(), B, H, Hkv, D, scale,
                                              config, g);
        reference::lighthouse_backward<double>(dq.view(), dk.view(), dv.view(), dout.view(), whole, B, H, Hkv, D, scale,
                                               g);

        std::vector<LighthouseRank> ranks(W);
        std::vector<RingEmulation> rings;
        int64_t num_different = 0;
        for (int r = 0; r < W; ++r) {
            LighthouseRank& rank = ranks[r];
            rank.tokens = make_context_partition(T, W, r);
            rank.chunk = make_chunk_geometry(g, config, W);
            rank.gathered = make_context_partition(g.S, W, r);
            const LighthouseGeometry& chunk = rank.chunk;
            ASSERT_EQ(chunk.S, rank.gathered.chunk_rows());
            rank.q = as_chunks(local_rows(q, rank.tokens)), rank.k = as_chunks(local_rows(k, rank.tokens));
            rank.v = as_chunks(local_rows(v, rank.tokens)), rank.dout = as_chunks(local_rows(dout, rank.tokens));
            std::vector<float> q_scores((size_t)(CHUNKS * H * chunk.T)), k_scores((size_t)(CHUNKS * Hkv * chunk.T));
            const LighthouseRank& in = rank;
            reference::lighthouse_norms<double>(q_scores.data(), in.q.view(), CHUNKS, chunk.T, H, D);
            reference::lighthouse_norms<double>(k_scores.data(), in.k.view(), CHUNKS, chunk.T, Hkv, D);
            rank.entries.resize((size_t)(CHUNKS * Hkv * chunk.S));
            rank.positions.resize((size_t)(CHUNKS * Hkv * chunk.num_slots));
            for (int i = 0; i < CHUNKS * Hkv; ++i) {
                const int half = i / Hkv % HALVES, number = rank.tokens.chunk(half);
                int32_t* const entries = rank.entries.data() + i * chunk.S;
                reference::lighthouse_select(entries, rank.positions.data() + i * chunk.num_slots,
                                             q_scores.data() + i * (H / Hkv) * chunk.T, H / Hkv,
                                             k_scores.data() + i * chunk.T, 1, chunk, number == 0);
                // The entries of the whole sequence, moved to the chunk's place.
                const int32_t* const expected =
                    whole.entries.data() + (i / Hkv / HALVES * Hkv + i % Hkv) * g.S + number * chunk.S;
                for (int64_t n = 0; n < chunk.S; ++n) {
                    int64_t index = entries[n];
                    const int level = chunk.level_of_slot(index);
                    num_different += expected[n] != g.slot(level, number * chunk.level_size(level) + index);
                }
            }
            const auto gathered = [&](const Rows& x) {
                Rows rows(CHUNKS, chunk.S, x.heads, D);
                reference::lighthouse_gather<double>(rows.view(), x.view(), rank.entries.data(), CHUNKS, x.heads, Hkv,
                                                     D, chunk);
                return as_halves(rows);
            };
            rings.emplace_back(rank.gathered, gathered(rank.q), KeyRows{gathered(rank.k), gathered(rank.v)});
        }
        EXPECT_EQ(num_different, 0) << "of the selection, W " << W;

        const int64_t border_size = (int64_t)(c.levels - 1) * H * D;  // of a chunk
        using Borders = std::vector<std::vector<double>>;             // of each rank's chunks
        Borders passed_on(W), sent_back(W);
        const auto fetch_of = [&](int r) {
            return [&rings, r](int s) { return rings[rings[r].steps()[s].source].keys_to_send(s); };
        };
        // Rows of the neighbours' chunks, zero at the sequence's ends.
        const auto from_neighbours = [&](const Borders& borders, int r, auto neighbour) {
            std::vector<double> rows((size_t)(CHUNKS * border_size), 0.0);
            for (int i = 0; i < CHUNKS; ++i) {
                if (const std::optional<ChunkPlace> place = neighbour(ranks[r].tokens, i % HALVES)) {
                    std::copy_n(borders[place->rank].begin() + (i / HALVES * HALVES + place->half) * border_size,
                                border_size, rows.begin() + i * border_size);
                }
            }
            return rows;
        };
        for (int r = 0; r < W; ++r) {
            rings[r].forward(fetch_of(r));
            const Rows inner = as_chunks(rings[r].out);
            passed_on[r].resize((size_t)(CHUNKS * border_size));
            reference::lighthouse_border<double>(passed_on[r].data(), inner.view(), ranks[r].positions.data(), CHUNKS,
                                                 H, Hkv, D, ranks[r].chunk);
            sent_back[r].resize(passed_on[r].size());
            reference::lighthouse_border_backward<double>(sent_back[r].data(), std::as_const(ranks[r].dout).view(),
                                                          CHUNKS, H, D, ranks[r].chunk);
        }
        Rows found_out(B, T, H, D), found_dq(B, T, H, D), found_dk(B, T, Hkv, D), found_dv(B, T, Hkv, D);
        std::map<std::pair<int, int>, KeyRows> returned;  // (owner, step)
        for (int r = 0; r < W; ++r) {
            const LighthouseRank& rank = ranks[r];
            const Rows inner = as_chunks(rings[r].out);
            Rows local(CHUNKS, rank.chunk.T, H, D);
            reference::lighthouse_scatter<double>(local.view(), inner.view(), rank.positions.data(), CHUNKS, H, Hkv, D,
                                                  rank.chunk);
            reference::lighthouse_add_border<double>(local.view(), from_neighbours(passed_on, r, chunk_before).data(),
                                                     CHUNKS, H, D, rank.chunk);
            put_local_rows(found_out, as_halves(local), rank.tokens);

            Rows inner_dout(CHUNKS, rank.chunk.S, H, D);
            reference::lighthouse_scatter_backward<double>(inner_dout.view(), rank.dout.view(), rank.entries.data(),
                                                           CHUNKS, H, Hkv, D, rank.chunk);
            reference::lighthouse_add_border_backward<double>(inner_dout.view(),
                                                              from_neighbours(sent_back, r, chunk_after).data(),
                                                              rank.positions.data(), CHUNKS, H, Hkv, D, rank.chunk);
            rings[r].backward(as_halves(inner_dout), fetch_of(r), [&](int s, const KeyRows& gradients) {
                returned[{rings[r].steps()[s].source, s}] = gradients;
            });
        }
        return_gradients(rings, returned);
        for (int r = 0; r < W; ++r) {
            const LighthouseRank& rank = ranks[r];
            const auto tokens_of = [&](Rows& whole_rows, const Rows& gathered) {
                const Rows chunks = as_chunks(gathered);
                Rows local(CHUNKS, rank.chunk.T, gathered.heads, D);
                reference::lighthouse_gather_backward<double>(local.view(), chunks.view(), rank.positions.data(),
                                                              CHUNKS, gathered.heads, Hkv, D, rank.chunk);
                put_local_rows(whole_rows, as_halves(local), rank.tokens);
            };
            tokens_of(found_dq, rings[r].dq);
            tokens_of(found_dk, rings[r].dkv.k);
            tokens_of(found_dv, rings[r].dkv.v);
        }
        EXPECT_LT(relative_error(found_out.values, out.values), 1e-12) << "W " << W;
        EXPECT_LT(relative_error(found_dq.values, dq.values), 1e-11) << "W " << W;
        EXPECT_LT(relative_error(found_dk.values, dk.values), 1e-11) << "W " << W;
        EXPECT_LT(relative_error(found_dv.values, dv.values), 1e-11) << "W " << W;
    }
}

}  // namespace
