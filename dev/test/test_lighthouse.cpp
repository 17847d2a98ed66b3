// test_lighthouse.cpp: the CPU reference of Lighthouse attention: geometry and its refusals, selection against its
// definition, the layer against a direct computation, finite differences, causality, holes, repetition, golden files.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <optional>
#include <set>

#include "dev/test/golden_lighthouse.h"
#include "dev/test/reference_testing.h"
#include "llmc/reference/lighthouse.h"

using reference::LighthouseState;
using reference::View;

namespace {

LighthouseConfig make_config(int levels, int pool, int64_t topk) {
    LighthouseConfig config;
    config.levels = levels, config.pool = pool, config.topk = topk;
    return config;
}
LighthouseGeometry make_geometry(int64_t T, int levels, int pool, int64_t topk) {
    return make_lighthouse_geometry(T, make_config(levels, pool, topk));
}

// Legal geometries of all kinds that fit a test: every level count, tiles that just fill and tiles that do not, T no
// power of two.
std::vector<LighthouseGeometry> small_geometries() {
    std::vector<LighthouseGeometry> all;
    for (const int levels : {2, 3, 4, 5, 6}) {
        for (const int pool : {2, 4, 8, 16, 32}) {
            for (const int64_t tiles : {1, 2, 3}) {
                for (const int64_t coarsest : {128, 129, 200}) {  // a tile
                    int64_t T = tiles * coarsest;
                    for (int l = 1; l < levels; ++l) {
                        T *= pool;
                    }
                    if (T <= 40000) {
                        all.push_back(make_geometry(T, levels, pool, 128 * tiles));
                    }
                }
            }
        }
    }
    return all;
}

// Scores with many equal values when num_values is small.
std::vector<float> random_scores(int64_t n, int num_values, uint64_t seed) {
    std::mt19937_64 generator(seed);
    std::vector<float> scores(n);
    for (float& score : scores) {
        score = (float)(generator() % (uint64_t)num_values);
    }
    return scores;
}

struct Selection {
    std::vector<int32_t> entries, positions;

    Selection(const std::vector<float>& q, int q_heads, const std::vector<float>& k, int k_heads,
              const LighthouseGeometry& g)
        : entries(g.S), positions(g.num_slots) {
        reference::lighthouse_select(entries.data(), positions.data(), q.data(), q_heads, k.data(), k_heads, g);
    }
};

// The score of an entry, straight from the tokens.
float entry_score(const std::vector<float>& scores, const LighthouseGeometry& g, int level, int64_t index) {
    float best = 0.0f;
    for (size_t i = 0; i < scores.size(); ++i) {
        if ((int64_t)i % g.T / g.window(level) == index) {
            best = std::max(best, scores[i]);
        }
    }
    return best;
}

// By definition: a candidate is selected when fewer than half the budget are better; an entry's place in the causal
// order is how many kept entries end before it, or with it on a finer level.
std::vector<int32_t> expected_entries(const std::vector<float>& q, const std::vector<float>& k,
                                      const LighthouseGeometry& g) {
    struct Entry {
        int level;
        int64_t index, end;
    };
    std::vector<Entry> kept;
    const int half = LIGHTHOUSE_TILE_BUDGET / 2;
    for (int64_t tile = 0; tile < g.tiles; ++tile) {
        std::set<int64_t> candidates;
        for (int64_t i = 0; i < g.tile_coarsest(); ++i) {
            candidates.insert(tile * g.tile_coarsest() + i);
        }
        for (int level = g.levels - 1; level >= 0; --level) {
            std::map<int64_t, float> by_query, by_key;
            std::set<int64_t> selected, children;
            for (const int64_t i : candidates) {
                kept.push_back({level, i, (i + 1) * g.window(level)});
                by_query[i] = i == 0 ? INFINITY : entry_score(q, g, level, i);
                by_key[i] = entry_score(k, g, level, i);
            }
            for (const auto* scores : {&by_query, &by_key}) {
                std::set<int64_t> chosen;
                for (const auto& [i, score] : *scores) {
                    int better = 0;
                    for (const auto& [j, other] : *scores) {
                        better += !selected.count(j) && (other > score || (other == score && j < i));
                    }
                    if (!selected.count(i) && better < half) {
                        chosen.insert(i);
                    }
                }
                selected.insert(chosen.begin(), chosen.end());
            }
            for (const int64_t i : selected) {
                for (int c = 0; c < g.pool; ++c) {
                    children.insert(i * g.pool + c);
                }
            }
            candidates = children;
        }
    }
    std::vector<int32_t> entries(g.S, -1);
    for (const Entry& e : kept) {
        int64_t place = 0;
        for (const Entry& other : kept) {
            place += other.end < e.end || (other.end == e.end && other.level < e.level);
        }
        entries[place] = (int32_t)g.slot(e.level, e.index);
    }
    return entries;
}

TEST(LighthouseGeometry, SizesOfThePaper) {
    const LighthouseGeometry g = make_geometry(98304, 3, 4, 1536);
    EXPECT_EQ(g.tiles, 12);
    EXPECT_EQ(g.S, 18432);
    EXPECT_EQ(g.num_slots, 98304 + 24576 + 6144);
    EXPECT_EQ(make_geometry(1 << 20, 4, 4, 4096).S, 65536);
    int64_t slot = g.slot(2, 17);
    EXPECT_EQ(g.level_of_slot(slot), 2);
    EXPECT_EQ(slot, 17);
}

// Pyramid addresses stay in 32 bits up to the longest sequence that is accepted; elements do not.
TEST(LighthouseGeometry, LongSequences) {
    for (const int64_t T : {(int64_t)1 << 20, (int64_t)1 << 21, (int64_t)1 << 29}) {
        for (const int levels : {2, 6}) {
            const LighthouseGeometry g = make_geometry(T, levels, 2, 4096);
            EXPECT_EQ(g.tiles, 32);
            EXPECT_LT(g.num_slots, (int64_t)1 << 31);
            int64_t slot = g.num_slots - 1;
            EXPECT_EQ(g.level_of_slot(slot), levels - 1);
            EXPECT_EQ(slot, g.level_size(levels - 1) - 1);
            EXPECT_EQ(g.tile_rows() * g.tiles, g.S);
        }
    }
    EXPECT_THROW(make_geometry((int64_t)1 << 30, 2, 2, 4096), Error);
}

TEST(LighthouseGeometry, RefusesByFlagAndNearestValue) {
    const auto message = [](int64_t T, int levels, int pool, int64_t topk) -> std::string {
        try {
            make_geometry(T, levels, pool, topk);
        } catch (const Error& error) {
            return error.what();
        }
        return "accepted";
    };
    EXPECT_EQ(message(98304, 1, 4, 1536), "--lighthouse_levels 1: must be from 2 to 6; the nearest that works is 2");
    EXPECT_EQ(message(98304, 3, 6, 1536),
              "--lighthouse_pool 6: must be a power of two from 2 to 32; the nearest that works is 4");
    EXPECT_EQ(message(98304, 3, 4, 1500),
              "--lighthouse_topk 1500: must be a positive multiple of 128; the nearest that works is 1536");
    EXPECT_NE(message(100000, 3, 4, 1536).find("the nearest are 99840 and 100032"), std::string::npos);
    EXPECT_NE(message(100000, 3, 4, 1536).find("--lighthouse_topk 1280"), std::string::npos);
    EXPECT_NE(message(0, 3, 4, 1536).find("the nearest that works is 24576"), std::string::npos);
    for (const int64_t T : {99840, 100032, 24576}) {
        EXPECT_EQ(message(T, 3, 4, 1536), "accepted");
    }
    EXPECT_EQ(message(100000, 3, 4, 1280), "accepted");
    LighthouseConfig dilated = make_config(2, 2, 128);
    dilated.scorer = LighthouseScorer::dilated;
    EXPECT_THROW(make_lighthouse_geometry(258, dilated), Error);
}

// The rules in the words of the algorithm, and what is near by trying everything.
struct EveryValue {
    int64_t num_chunks, longest;

    bool is_legal(const lighthouse_rules::Values& v) const {
        const auto [L, p, k, T, dilation] = v;
        const int64_t m = LIGHTHOUSE_TILE_BUDGET, tiles = k / m;
        const bool is_power = p == 2 || p == 4 || p == 8 || p == 16 || p == 32;
        if (L < 2 || L > 6 || !is_power || k <= 0 || k % m != 0 || T <= 0 || T > longest || tiles % num_chunks != 0 ||
            T % tiles != 0) {
            return false;
        }
        int64_t tile = T / tiles;  // tokens, then windows of each level
        for (int level = 1; level < L; ++level) {
            if (tile % p != 0) {
                return false;
            }
            tile /= p;
        }
        return tile >= m && dilation > 0 && T % dilation == 0;
    }

    // All values of a flag that may be the nearest legal ones; tests ask for small dilations.
    std::vector<int64_t> values(int flag, int64_t asked) const {
        const int64_t unit = flag == lighthouse_rules::TOPK ? LIGHTHOUSE_TILE_BUDGET * num_chunks : 1;
        const std::map<int, int64_t> largest = {{lighthouse_rules::LEVELS, 6},
                                                {lighthouse_rules::POOL, 32},
                                                {lighthouse_rules::TOPK, longest / unit},
                                                {lighthouse_rules::SEQ_LEN, longest},
                                                {lighthouse_rules::DILATION, asked == 1 ? 1 : 8}};
        std::vector<int64_t> all;
        for (int64_t i = 1; i <= largest.at(flag); ++i) {
            all.push_back(i * unit);
        }
        return all;
    }
    // Of legal values that differ from `v` in free[0], and maybe in the other flags of `free`, the nearest.
    std::optional<lighthouse_rules::Values> nearest(const lighthouse_rules::Values& v, const std::vector<int>& free,
                                                    size_t first = 0) const {
        if (first == free.size()) {
            return is_legal(v) ? std::optional<lighthouse_rules::Values>(v) : std::nullopt;
        }
        const int64_t asked = std::clamp<int64_t>(v[free[first]], -(1 << 30), 1 << 30);
        std::vector<int64_t> all = values(free[first], asked);
        std::stable_sort(all.begin(), all.end(),
                         [&](int64_t a, int64_t b) { return std::abs(a - asked) < std::abs(b - asked); });
        for (const int64_t value : all) {
            lighthouse_rules::Values changed = v;
            changed[free[first]] = value;
            if (free[first] == lighthouse_rules::POOL && (value & (value - 1)) != 0) {
                continue;
            }
            const auto found = first == 0 && value == asked ? std::nullopt : nearest(changed, free, first + 1);
            if (found) {
                return found;
            }
        }
        return std::nullopt;
    }
};

TEST(LighthouseRules, SuggestsTheNearestThatIsLegal) {
    using namespace lighthouse_rules;
    std::mt19937_64 generator(1);
    const auto any_of = [&](const std::vector<int64_t>& values) { return values[generator() % values.size()]; };
    std::map<int, int> num_refused;
    for (int i = 0; i < 500; ++i) {
        const EveryValue every = {any_of({1, 1, 2, 6}), any_of({700, 1600, 2048})};
        const int64_t tiles = every.num_chunks * any_of({1, 1, 2}), L = any_of({2, 2, 3}), p = 2;
        Values v = {L, p, 128 * tiles, (int64_t)std::pow(p, L - 1) * tiles * any_of({128, 129, 150}), 1};
        const Values wild = {any_of({-1, 3, 4, 6, 9}), any_of({0, 4, 6, 16, 33}),
                             any_of({-128, 100, 128, 256, 384, 500, 1536, INT64_MAX}),
                             any_of({1, 256, 500, 768, 1000, 1030, 2048, 3000, INT64_MIN}), any_of({-2, 0, 3, 4, 7})};
        for (size_t flag = 0; flag < NUM_FLAGS; ++flag) {
            v[flag] = any_of({0, 0, 1}) == 1 ? wild[flag] : v[flag];
        }
        const SequenceLimits limits = {every.num_chunks, every.longest};
        const std::optional<Refusal> refusal = refuse(v, limits);
        ASSERT_EQ(!refusal, every.is_legal(v)) << i;
        if (!refusal) {
            continue;
        }
        ++num_refused[refusal->flag];
        // With as few other flags as can be; sets of them in an order of no meaning.
        std::vector<Values> expected;
        if (refusal->flag == SEQ_LEN) {
            for (const bool above : {false, true}) {
                Values nearest = v;
                nearest[SEQ_LEN] = above ? every.longest + 1 : 0;
                for (int64_t T = 1; T <= every.longest; ++T) {
                    Values other = v;
                    other[SEQ_LEN] = T;
                    const bool nearer = above ? T > v[SEQ_LEN] && T < nearest[SEQ_LEN] : T < v[SEQ_LEN];
                    nearest = nearer && every.is_legal(other) ? other : nearest;
                }
                if (every.is_legal(nearest)) {
                    expected.push_back(nearest);
                }
            }
            EXPECT_EQ(refusal->instead, every.nearest(v, {TOPK})) << i;
        }
        for (size_t num_others = 0; num_others < NUM_FLAGS && expected.empty(); ++num_others) {
            std::vector<Values> found;
            for (int set = 0; set < 1 << NUM_FLAGS; ++set) {
                std::vector<int> free = {refusal->flag};
                for (int other = 0; other < NUM_FLAGS; ++other) {
                    if ((set >> other & 1) != 0) {
                        free.push_back(other);
                    }
                }
                const bool is_other = (set >> refusal->flag & 1) == 0;
                if (const auto nearest =
                        is_other && free.size() == num_others + 1 ? every.nearest(v, free) : std::nullopt) {
                    found.push_back(*nearest);
                }
            }
            if (!found.empty()) {
                ASSERT_EQ(refusal->nearest.size(), 1u) << i << ": " << sentence(v, *refusal);
                ASSERT_EQ(std::count(found.begin(), found.end(), refusal->nearest[0]), 1)
                    << i << ": " << sentence(v, *refusal);
                expected = refusal->nearest;
            }
        }
        EXPECT_EQ(refusal->nearest, expected) << i << ": " << sentence(v, *refusal);
    }
    for (const int flag : {LEVELS, POOL, TOPK, SEQ_LEN, DILATION}) {
        EXPECT_GT(num_refused[flag], 10) << FLAG_NAMES[flag];
    }
}

TEST(LighthouseSelect, MatchesItsDefinition) {
    const SingleThread single_thread;
    for (const LighthouseGeometry& g :
         {make_geometry(258, 2, 2, 128), make_geometry(512, 3, 2, 128), make_geometry(1200, 2, 4, 256),
          make_geometry(1032, 4, 2, 128), make_geometry(2048, 3, 4, 128)}) {
        for (const int num_values : {1, 3, 1 << 20}) {
            for (const int group : {1, 2}) {
                const auto q = random_scores(group * g.T, num_values, 1), k = random_scores(g.T, num_values, 2);
                const Selection selection(q, group, k, 1, g);
                ASSERT_EQ(selection.entries, expected_entries(q, k, g))
                    << "T " << g.T << " levels " << g.levels << " values " << num_values << " group " << group;
            }
        }
    }
}

TEST(LighthouseSelect, PositionsAreTheInverse) {
    for (const LighthouseGeometry& g : small_geometries()) {
        const Selection s(random_scores(g.T, 50, 1), 1, random_scores(g.T, 50, 2), 1, g);
        for (int64_t n = 0; n < g.S; ++n) {
            ASSERT_EQ(s.positions[s.entries[n]], n);
        }
        ASSERT_EQ(std::count_if(s.positions.begin(), s.positions.end(), [](int32_t n) { return n >= 0; }), g.S);
    }
}

// Each token's number of contributors is what the scatter makes of rows of ones.
TEST(LighthouseSelect, NoHolesAndFanInAtMostLevels) {
    for (const LighthouseGeometry& g : small_geometries()) {
        std::vector<float> rising(g.T);  // the worst case for the first entry: its scores are the lowest
        for (int64_t t = 0; t < g.T; ++t) {
            rising[t] = (float)t;
        }
        for (const auto& scores : {rising, random_scores(g.T, 1 << 20, 3), std::vector<float>(g.T, 1.0f)}) {
            const Selection s(scores, 1, scores, 1, g);
            std::vector<float> ones(g.S, 1.0f), contributors(g.T);
            reference::lighthouse_scatter<float>({contributors.data(), g.T, 1, 1}, {ones.data(), g.S, 1, 1},
                                                 s.positions.data(), 1, 1, 1, 1, g);
            ASSERT_GE(*std::min_element(contributors.begin(), contributors.end()), 1.0f)
                << "T " << g.T << " levels " << g.levels << " pool " << g.pool;
            ASSERT_LE(*std::max_element(contributors.begin(), contributors.end()), (float)g.levels);
        }
    }
}

// A step whose norms are NaN must still make a whole sub-sequence, the same one each time.
TEST(LighthouseSelect, NaNScoresRankLowest) {
    const LighthouseGeometry g = make_geometry(2 * 200 * 4, 2, 4, 256);
    std::vector<float> broken = random_scores(g.T, 7, 1), mended = broken;
    for (int64_t t = 0; t < g.T; t += 3) {
        broken[t] = NAN, mended[t] = 0.0f;
    }
    broken[100] = mended[100] = INFINITY;
    const std::vector<float> k = random_scores(g.T, 7, 2), all_nan(g.T, NAN), all_equal(g.T, 1.0f);
    EXPECT_EQ(Selection(broken, 1, k, 1, g).entries, Selection(mended, 1, k, 1, g).entries);
    EXPECT_EQ(Selection(k, 1, broken, 1, g).entries, Selection(k, 1, mended, 1, g).entries);
    EXPECT_EQ(Selection(all_nan, 1, all_nan, 1, g).entries, Selection(all_equal, 1, all_equal, 1, g).entries);
}

TEST(LighthouseSelect, EveryEntryDescends) {
    const LighthouseGeometry g = make_geometry(2 * 128 * 4, 2, 4, 256);
    const Selection s(random_scores(g.T, 9, 1), 1, random_scores(g.T, 9, 2), 1, g);
    EXPECT_EQ(g.S, g.num_slots);
    EXPECT_EQ(std::count(s.positions.begin(), s.positions.end(), -1), 0);
}

// ---- the layer ---------------------------------------------------------------------------------
// Packed qkv [B, T, (H + 2 Hkv) D], as the model has it.
struct Layer {
    int64_t B = 1;
    int H = 2, Hkv = 1, D = 8;
    LighthouseConfig config;
    LighthouseGeometry g;
    std::vector<double> qkv, dout;
    LighthouseState<double> state;

    Layer(int64_t T, const LighthouseConfig& config, int64_t B = 1, int H = 2, int Hkv = 1, int D = 8,
          uint64_t seed = 1)
        : B(B),
          H(H),
          Hkv(Hkv),
          D(D),
          config(config),
          g(make_lighthouse_geometry(T, config)),
          qkv(random_values(B * T * width(), 2.0, seed)),
          dout(random_values(B * T * H * D, 1.0, seed + 1)) {}

    int64_t width() const { return (H + 2 * Hkv) * D; }
    double scale() const { return 1.0 / std::sqrt((double)D); }
    template <class Element>
    View<Element> head(std::vector<double>& rows, int first) const {
        return {rows.data() + first * D, g.T * width(), width(), D};
    }
    View<const double> q() { return head<const double>(qkv, 0); }
    View<const double> k() { return head<const double>(qkv, H); }
    View<const double> v() { return head<const double>(qkv, H + Hkv); }
    View<double> tokens(std::vector<double>& rows) const {
        rows.resize(B * g.T * H * D);
        return {rows.data(), g.T * H * D, (int64_t)H * D, D};
    }

    std::vector<double> forward() {
        std::vector<double> out;
        reference::lighthouse_forward<double>(tokens(out), state, q(), k(), v(), B, H, Hkv, D, scale(), config, g);
        return out;
    }
    std::vector<double> forward_with_selection_fixed() {
        std::vector<double> out;
        reference::lighthouse_attend<double>(tokens(out), state, q(), k(), v(), B, H, Hkv, D, scale(), g);
        return out;
    }
    std::vector<double> backward() {
        std::vector<double> dqkv(qkv.size());
        reference::lighthouse_backward<double>(head<double>(dqkv, 0), head<double>(dqkv, H),
                                               head<double>(dqkv, H + Hkv), tokens(dout), state, B, H, Hkv, D, scale(),
                                               g);
        return dqkv;
    }
};

// The layer written from the entries' side, as the paper states it: pool, softmax, add to the shifted window.
std::vector<double> expected_output(Layer& layer) {
    const LighthouseGeometry& g = layer.g;
    std::vector<double> out;
    const View<double> out_view = layer.tokens(out);
    std::fill(out.begin(), out.end(), 0.0);
    for (int64_t b = 0; b < layer.B; ++b) {
        for (int h = 0; h < layer.H; ++h) {
            const int h_kv = h / (layer.H / layer.Hkv);
            const int32_t* entries = layer.state.entries.data() + (b * layer.Hkv + h_kv) * g.S;
            const auto pooled = [&](View<const double> x, int head) {
                std::vector<std::vector<double>> rows;
                for (int64_t n = 0; n < g.S; ++n) {
                    int64_t i = entries[n];
                    const int64_t c = g.window(g.level_of_slot(i));
                    std::vector<double> mean(layer.D, 0.0);
                    for (int64_t t = i * c; t < (i + 1) * c; ++t) {
                        for (int d = 0; d < layer.D; ++d) {
                            mean[d] += x.row(b, t, head)[d] / (double)c;
                        }
                    }
                    rows.push_back(mean);
                }
                return rows;
            };
            const auto q = pooled(layer.q(), h), k = pooled(layer.k(), h_kv), v = pooled(layer.v(), h_kv);
            for (int64_t n = 0; n < g.S; ++n) {
                std::vector<double> row(layer.D, 0.0);
                double sum = 0.0;
                for (int64_t m = 0; m <= n; ++m) {
                    const double p = std::exp(layer.scale() * dot(q[n], k[m]));
                    sum += p;
                    for (int d = 0; d < layer.D; ++d) {
                        row[d] += p * v[m][d];
                    }
                }
                int64_t i = entries[n];
                const int64_t c = g.window(g.level_of_slot(i));
                for (int64_t j = i * c + c - 1; j < std::min(i * c + 2 * c - 1, g.T); ++j) {
                    for (int d = 0; d < layer.D; ++d) {
                        out_view.row(b, j, h)[d] += row[d] / sum;
                    }
                }
            }
        }
    }
    return out;
}

TEST(LighthouseLayer, MatchesADirectComputation) {
    for (const bool dilated : {false, true}) {
        LighthouseConfig config = make_config(3, 2, 128);
        config.scorer = dilated ? LighthouseScorer::dilated : LighthouseScorer::norm;
        Layer layer(516, config, 2, 4, 2, 4);
        const std::vector<double> out = layer.forward();
        EXPECT_LT(relative_error(out, expected_output(layer)), 1e-12);
    }
}

TEST(LighthouseLayer, GroupsOfHeadsSelectForThemselves) {
    Layer layer(1032, make_config(3, 2, 128), 2, 4, 2, 4);
    layer.forward();
    const auto norms = [&](View<const double> x, int heads) {
        std::vector<float> scores(layer.B * heads * layer.g.T);
        reference::lighthouse_norms<double>(scores.data(), x, layer.B, layer.g.T, heads, layer.D);
        return scores;
    };
    const auto q = norms(layer.q(), 4), k = norms(layer.k(), 2);
    const int64_t T = layer.g.T, S = layer.g.S;
    for (int i = 0; i < 4; ++i) {  // (sequence, key/value head)
        const std::vector<float> group_q(q.begin() + 2 * i * T, q.begin() + 2 * (i + 1) * T);
        const std::vector<float> head_k(k.begin() + i * T, k.begin() + (i + 1) * T);
        const std::vector<int32_t> entries(layer.state.entries.begin() + i * S,
                                           layer.state.entries.begin() + (i + 1) * S);
        EXPECT_EQ(entries, expected_entries(group_q, head_k, layer.g));
    }
}

TEST(LighthouseLayer, GroupsOfHeadsSelectForThemselvesByDilatedScores) {
    LighthouseConfig config = make_config(3, 2, 128);
    config.scorer = LighthouseScorer::dilated;
    Layer layer(1032, config, 2, 4, 2, 4);
    layer.forward();
    const int64_t T = layer.g.T, S = layer.g.S;
    std::vector<float> q(layer.B * 4 * T), k(q.size());  // both of each query head
    reference::lighthouse_dilated_scores<double>(q.data(), k.data(), layer.q(), layer.k(), layer.v(), layer.B, T, 4, 2,
                                                 layer.D, config.dilation, layer.scale());
    for (int i = 0; i < 4; ++i) {  // (sequence, key/value head)
        const auto group = [&](const std::vector<float>& x) {
            return std::vector<float>(x.begin() + 2 * i * T, x.begin() + 2 * (i + 1) * T);
        };
        const std::vector<int32_t> entries(layer.state.entries.begin() + i * S,
                                           layer.state.entries.begin() + (i + 1) * S);
        EXPECT_EQ(entries, expected_entries(group(q), group(k), layer.g));
    }
}

// The dilated scorer against attention written out.
TEST(LighthouseLayer, DilatedScores) {
    const int64_t T = 24;
    const int H = 4, Hkv = 2, D = 4, dilation = 4, width = (H + 2 * Hkv) * D;
    const std::vector<double> qkv = random_values(T * width, 2.0, 5);
    const auto head = [&](int first) { return View<const double>(qkv.data() + first * D, T * width, width, D); };
    const View<const double> q = head(0), k = head(H), v = head(H + Hkv);
    std::vector<float> q_scores(H * T), k_scores(H * T);
    reference::lighthouse_dilated_scores<double>(q_scores.data(), k_scores.data(), q, k, v, 1, T, H, Hkv, D, dilation,
                                                 0.5);
    const auto norm = [&](View<const double> queries, int query_head, View<const double> keys, int key_head, int h_kv,
                          int64_t t) {
        std::vector<double> out(D, 0.0);
        double sum = 0.0;
        for (int64_t s = t % dilation; s <= t; s += dilation) {
            double score = 0.0;
            for (int d = 0; d < D; ++d) {
                score += 0.5 * queries.row(0, t, query_head)[d] * keys.row(0, s, key_head)[d];
            }
            sum += std::exp(score);
            for (int d = 0; d < D; ++d) {
                out[d] += std::exp(score) * v.row(0, s, h_kv)[d];
            }
        }
        return std::sqrt(dot(out, out)) / sum;
    };
    for (int h = 0; h < H; ++h) {
        for (int64_t t = 0; t < T; ++t) {
            EXPECT_NEAR(q_scores[h * T + t], norm(q, h, k, h / 2, h / 2, t), 1e-6);
            EXPECT_NEAR(k_scores[h * T + t], norm(k, h / 2, q, h, h / 2, t), 1e-6);
        }
    }
}

TEST(LighthouseLayer, FiniteDifferencesWithTheSelectionFixed) {
    for (const LighthouseConfig& config : {make_config(2, 2, 128), make_config(3, 2, 128), make_config(2, 4, 128)}) {
        Layer layer(config.levels == 3 ? 520 : 129 * config.pool, config, 1, 2, 1, 4);
        layer.forward();
        const std::vector<double> dqkv = layer.backward(), at = layer.qkv;
        const auto derivative = [&](const std::vector<double>& direction) {
            return derivative_at_zero(
                [&](double step) {
                    for (size_t i = 0; i < at.size(); ++i) {
                        layer.qkv[i] = at[i] + step * direction[i];
                    }
                    return dot(layer.forward_with_selection_fixed(), layer.dout);
                },
                1e-3);
        };
        for (int trial = 0; trial < 2; ++trial) {
            const std::vector<double> direction = random_values(at.size(), 1.0, 10 + trial);
            EXPECT_NEAR(derivative(direction) / dot(dqkv, direction), 1.0, 1e-7);
        }
        for (int trial = 0; trial < 6; ++trial) {  // single elements, the first and the last among them
            std::vector<double> direction(at.size(), 0.0);
            const size_t i = trial == 0 ? 0 : trial == 1 ? at.size() - 1 : (size_t)trial * 7919 % at.size();
            direction[i] = 1.0;
            EXPECT_NEAR(derivative(direction), dqkv[i], 1e-8);
        }
    }
}

// A token's content may reach no output before it. Signs and order of q and k change, which keeps the norms' bits that
// the selection looks at; v changes freely.
TEST(LighthouseLayer, ContentIsCausal) {
    for (const LighthouseConfig& config : {make_config(2, 4, 128), make_config(3, 2, 256), make_config(4, 2, 128)}) {
        Layer layer(config.levels == 3 ? 1032 : config.levels == 4 ? 1032 : 520, config, 1, 2, 1, 4);
        const std::vector<double> before = layer.forward();
        const std::vector<int32_t> entries = layer.state.entries;
        for (const int64_t j : {(int64_t)0, (int64_t)1, (int64_t)7, layer.g.T / 2 - 1, layer.g.T / 2, layer.g.T - 1}) {
            const std::vector<double> original = layer.qkv;
            double* row = layer.qkv.data() + j * layer.width();
            for (int i = 0; i < (layer.H + layer.Hkv) * layer.D; i += 2) {
                row[i] = -row[i];
            }
            for (int i = (layer.H + layer.Hkv) * layer.D; i < layer.width(); ++i) {
                row[i] += 1.0;
            }
            const std::vector<double> after = layer.forward();
            EXPECT_EQ(layer.state.entries, entries);
            const int64_t changed_from = j * layer.H * layer.D;
            EXPECT_EQ(std::memcmp(before.data(), after.data(), changed_from * sizeof(double)), 0) << "token " << j;
            EXPECT_NE(std::memcmp(before.data() + changed_from, after.data() + changed_from,
                                  (before.size() - changed_from) * sizeof(double)),
                      0)
                << "token " << j << " reaches nothing";
            layer.qkv = original;
        }
    }
}

TEST(LighthouseLayer, RepeatsBitForBit) {
    Layer layer(1032, make_config(3, 2, 128), 2, 4, 2, 8);
    const std::vector<double> out = layer.forward(), dqkv = layer.backward();
    const std::vector<int32_t> entries = layer.state.entries;
    EXPECT_TRUE(same_bits(out, layer.forward()));
    EXPECT_TRUE(same_bits(dqkv, layer.backward()));
    EXPECT_EQ(entries, layer.state.entries);
    const SingleThread single_thread;
    EXPECT_TRUE(same_bits(out, layer.forward()));
    EXPECT_TRUE(same_bits(dqkv, layer.backward()));
}

TEST(GoldenReport, PlantedFaultsFail) {
    GoldenReport report;
    report.errors = {{"out", 1e-6}};
    EXPECT_TRUE(report.passed());
    report.errors["dq"] = NAN;
    EXPECT_FALSE(report.passed());
    report.errors["dq"] = 2e-5;
    EXPECT_FALSE(report.passed());
    report.errors["dq"] = 0.0, report.entries_different = 1;
    EXPECT_FALSE(report.passed());
}

// Sets a variable of the environment, or with null removes it, and restores it at the end.
class WithVariable {
  public:
    WithVariable(const char* name, const char* value) : name_(name) {
        if (const char* before = std::getenv(name)) {
            before_ = before;
        }
        set(value);
    }
    ~WithVariable() { set(before_ ? before_->c_str() : nullptr); }

  private:
    void set(const char* value) const { value ? setenv(name_, value, 1) : unsetenv(name_); }

    const char* name_;
    std::optional<std::string> before_;
};

TEST(GoldenFiles, AreWhereTheVariableSays) {
    std::string folder = testing::TempDir() + "llmc_golden_XXXXXX";
    ASSERT_NE(mkdtemp(folder.data()), nullptr);
    for (const char* name : {"peer_lighthouse_b.safetensors", "peer_lighthouse_a.safetensors", "other.safetensors"}) {
        std::ofstream(folder + "/" + name) << "x";
    }
    {
        const WithVariable named("LLMC_GOLDEN_DIR", folder.c_str());
        EXPECT_EQ(golden_lighthouse_files(), (std::vector<std::string>{folder + "/peer_lighthouse_a.safetensors",
                                                                       folder + "/peer_lighthouse_b.safetensors"}));
    }
    const std::string nowhere = folder + "/nowhere";
    for (const char* none : {(const char*)nullptr, "", nowhere.c_str()}) {
        const WithVariable named("LLMC_GOLDEN_DIR", none);
        EXPECT_TRUE(golden_lighthouse_files().empty());
        EXPECT_NE(no_golden_files().find(none ? "'" + std::string(none) + "'" : "''"), std::string::npos);
    }
    std::filesystem::remove_all(folder);
}

TEST(LighthouseLayer, MatchesThePublishedImplementation) {
    const std::vector<std::string> files = golden_lighthouse_files();
    for (const std::string& path : files) {
        const GoldenReport report = check_golden_lighthouse(path);
        EXPECT_TRUE(report.passed()) << report.text();
    }
    if (files.empty()) {
        GTEST_SKIP() << no_golden_files();
    }
}

}  // namespace
