// test_influence.cpp: what the measures of influence.h count, on models whose losses are known, and on the CPU model:
// nothing under dense attention, nothing in earlier tiles under Lighthouse, something in the tile itself.
#include <gtest/gtest.h>

#include <functional>
#include <numeric>
#include <set>

#include "dev/test/reference_testing.h"
#include "llmc/influence.h"
#include "llmc/reference/model.h"

namespace {

ModelConfig tiny_config() {
    ModelConfig m;
    m.vocab_size = 19, m.num_layers = 2, m.width = 16, m.num_heads = 2, m.num_kv_heads = 1, m.head_dim = 8;
    m.ffn_width = 16;
    return m;
}

// The CPU model with losses of one's own: of target t, given a sequence's inputs [T], its targets [T], and t.
class KnownLosses : public reference::ReferenceModel<float> {
  public:
    using Loss = std::function<float(const int32_t* inputs, const int32_t* targets, int64_t t, int64_t T)>;
    explicit KnownLosses(Loss loss)
        : ReferenceModel(tiny_config(), AttentionMode::dense, {}, 2, 64), loss_(std::move(loss)) {}
    void token_losses(float* losses, const int32_t* inputs, const int32_t* targets, int B, int64_t T) override {
        for (int b = 0; b < B; ++b) {
            for (int64_t t = 0; t < T; ++t) {
                losses[b * T + t] = loss_(inputs + b * T, targets + b * T, t, T);
            }
        }
    }

  private:
    Loss loss_;
};

// Loss t is inputs[t], plus leak * the last input where t >= from.
KnownLosses leaky_model(float leak, int64_t from) {
    return KnownLosses([=](const int32_t* inputs, const int32_t*, int64_t t, int64_t T) {
        return (float)inputs[t] + (t >= from ? leak * (float)inputs[T - 1] : 0.0f);
    });
}

// Two sequences of 64 tokens; the last input of each is 1 and the one that reversing puts in its place is 3.
std::vector<int32_t> leaky_tokens(int64_t split) {
    std::vector<int32_t> tokens = random_tokens(2 * 65, 19, 7);
    for (int b = 0; b < 2; ++b) {
        tokens[b * 65 + 63] = 1;
        tokens[b * 65 + split + 1] = 3;
    }
    return tokens;
}

TEST(Influence, CountsAKnownLeak) {
    // 4 tiles of 16: the split is in the middle of the third, tokens 41 to 63 are replaced.
    KnownLosses model = leaky_model(0.5f, 36);
    const SelectionInfluence i = measure_selection_influence(model, leaky_tokens(40), 2, 64, 4);
    EXPECT_EQ(i.tile_tokens, 16);
    EXPECT_EQ(i.split, 40);
    EXPECT_DOUBLE_EQ(i.changed_fraction, 4.0 / 8.0);  // losses 36 to 39 of 32 to 39
    EXPECT_DOUBLE_EQ(i.mean_change, 0.5 * 2.0 * 4.0 / 8.0);
    EXPECT_DOUBLE_EQ(i.mean_benefit, 0.5 * 2.0 * 4.0 / 8.0);
    EXPECT_DOUBLE_EQ(i.max_change, 1.0);
    EXPECT_EQ(i.earlier_max_change, 0.0);
}

TEST(Influence, SeesALeakIntoEarlierTiles) {
    KnownLosses model = leaky_model(-0.5f, 31);
    const SelectionInfluence i = measure_selection_influence(model, leaky_tokens(40), 2, 64, 4);
    EXPECT_DOUBLE_EQ(i.earlier_max_change, 1.0);
    EXPECT_DOUBLE_EQ(i.mean_benefit, -1.0);
    EXPECT_DOUBLE_EQ(i.mean_change, 1.0);
}

TEST(Influence, NaNIsAChange) {
    KnownLosses model = leaky_model(NAN, 0);
    const SelectionInfluence i = measure_selection_influence(model, leaky_tokens(40), 2, 64, 4);
    EXPECT_EQ(i.earlier_max_change, INFINITY);
    EXPECT_EQ(i.max_change, INFINITY);
}

TEST(Influence, RefusesTilesThatDoNotDivide) {
    KnownLosses model = leaky_model(0.0f, 0);
    EXPECT_THROW(measure_selection_influence(model, leaky_tokens(40), 2, 64, 5), Error);
    EXPECT_THROW(measure_selection_influence(model, leaky_tokens(40), 3, 64, 4), Error);
}

// Selection decides between entries of 200 coarsest ones a tile; every layer is Lighthouse's.
TEST(Influence, OfTheModelUnderBothAttentions) {
    LighthouseConfig lighthouse;
    lighthouse.levels = 2, lighthouse.pool = 2, lighthouse.topk = 256, lighthouse.dense_layers = {};
    const int64_t T = 2 * 200 * 2;
    reference::ReferenceModel<double> model(tiny_config(), AttentionMode::lighthouse, lighthouse, 1, T);
    set_random_weights(model, 0.5);
    const std::vector<int32_t> tokens = random_tokens(T + 1, 19, 3);
    const SelectionInfluence through_selection = measure_selection_influence(model, tokens, 1, T, 2);
    EXPECT_EQ(through_selection.split, 600);
    EXPECT_EQ(through_selection.earlier_max_change, 0.0);
    EXPECT_GT(through_selection.changed_fraction, 0.1);
    EXPECT_GT(through_selection.mean_change, 0.0);
    EXPECT_LT(through_selection.mean_change, through_selection.max_change);

    model.set_attention(AttentionMode::dense);
    const SelectionInfluence dense = measure_selection_influence(model, tokens, 1, T, 2);
    EXPECT_EQ(dense.max_change, 0.0);
    EXPECT_EQ(dense.changed_fraction, 0.0);
    EXPECT_EQ(dense.earlier_max_change, 0.0);
}

// With the columns of tokens their mean is the loss that evaluate gives; another target changes the loss of its place.
TEST(Influence, TokenLosses) {
    reference::ReferenceModel<double> model(tiny_config(), AttentionMode::dense, {}, 2, 64);
    set_random_weights(model, 0.5);
    const std::vector<int32_t> tokens = random_tokens(2 * 65, 19, 3);
    InputsAndTargets columns(tokens.data(), 2, 64);
    std::vector<float> losses(2 * 64);
    model.token_losses(losses.data(), columns.inputs.data(), columns.targets.data(), 2, 64);
    double mean = 0.0;
    for (const float loss : losses) {
        mean += loss / 128.0;
    }
    EXPECT_NEAR(mean, model.evaluate(tokens.data(), 2, 64), 1e-6);

    columns.targets[70] = (columns.targets[70] + 1) % 19;
    std::vector<float> others(2 * 64);
    model.token_losses(others.data(), columns.inputs.data(), columns.targets.data(), 2, 64);
    for (int64_t i = 0; i < 128; ++i) {
        EXPECT_EQ(losses[i] != others[i], i == 70) << i;
    }
    columns.targets[70] = 19;
    EXPECT_THROW(model.token_losses(others.data(), columns.inputs.data(), columns.targets.data(), 2, 64), Error);
}

const RandomStream places(1, RandomUse::replaced_tokens, 0);
bool never() { return false; }

// It has 0.5 nats where the next input is the target, and 2 where it is not.
KnownLosses seeing_model() {
    return KnownLosses([](const int32_t* inputs, const int32_t* targets, int64_t t, int64_t T) {
        return t + 1 < T && inputs[t + 1] == targets[t] ? 0.5f : 2.0f;
    });
}

TEST(NextTokenInfluence, CountsWhatAModelSees) {
    KnownLosses model = seeing_model();
    const std::vector<int32_t> tokens = random_tokens(2 * 65, 19, 5);
    for (const int64_t tiles : {1, 4}) {
        const NextTokenInfluence i = *measure_next_token_influence(model, tokens, 2, 64, tiles, places, never, 100);
        EXPECT_GE(i.num_places, 100);
        EXPECT_EQ(i.num_places % (2 * tiles), 0);
        EXPECT_DOUBLE_EQ(i.loss, 0.5);
        EXPECT_DOUBLE_EQ(i.rise, 1.5);
        EXPECT_EQ(i.standard_error, 0.0);
    }
}

// Losses that depend on the inputs up to their place, above all on the last tile's: they differ between two forwards,
// but not on average. The standard error is that of the differences.
TEST(NextTokenInfluence, EarlierReplacementsCancel) {
    KnownLosses model([](const int32_t* inputs, const int32_t*, int64_t t, int64_t) {
        return (float)(std::accumulate(inputs, inputs + t + 1, 0) % 7);
    });
    const std::vector<int32_t> tokens = random_tokens(2 * 65, 19, 6);
    const NextTokenInfluence i = *measure_next_token_influence(model, tokens, 2, 64, 8, places, never, 4000);
    EXPECT_GT(i.standard_error, 0.02);
    EXPECT_LT(i.standard_error, 0.06);
    EXPECT_LT(std::fabs(i.rise), 4.0 * i.standard_error);
}

// Every place but the last of a tile, whose next token has no part in the choice of its entries; every token but the
// true one; and either forward.
TEST(NextTokenInfluence, PlacesAndTokens) {
    std::set<int64_t> replaced_places;
    std::set<int32_t> replacements;
    std::vector<int32_t> tokens(2 * 65, 3);
    tokens[5] = 4, tokens[65 + 63] = 7;
    int num_with = 0, num_without = 0;
    KnownLosses model([&](const int32_t* inputs, const int32_t* targets, int64_t t, int64_t T) {
        if (t + 1 < T && inputs[t + 1] != targets[t]) {
            replaced_places.insert(t), replacements.insert(inputs[t + 1]);
        }
        if (t == 0) {
            (std::equal(inputs + 1, inputs + T, targets) ? num_without : num_with) += 1;
        }
        return 1.0f;
    });
    const NextTokenInfluence i = *measure_next_token_influence(model, tokens, 2, 64, 4, places, never, 2000);
    EXPECT_EQ(i.rise, 0.0);
    EXPECT_EQ(replaced_places.size(), 60u);
    for (const int64_t place : {15, 31, 47, 63}) {
        EXPECT_EQ(replaced_places.count(place), 0u);
    }
    EXPECT_EQ(replacements, (std::set<int32_t>{3, 4, 7}));
    EXPECT_GT(num_with, 10 * num_without);  // of four tiles both ways: all in one forward once in eight times
}

// Where all tokens are the same there is no other.
TEST(NextTokenInfluence, OfOneToken) {
    KnownLosses model = seeing_model();
    const NextTokenInfluence i =
        *measure_next_token_influence(model, std::vector<int32_t>(2 * 65, 3), 2, 64, 1, places, never, 10);
    EXPECT_EQ(i.rise, 0.0);
}

// Two pairs of forwards, of the fifty that so many places take.
TEST(NextTokenInfluence, Stops) {
    int num_losses = 0, num_asked = 0;
    KnownLosses model([&](const int32_t*, const int32_t*, int64_t, int64_t) {
        ++num_losses;
        return 1.0f;
    });
    const auto stop = [&] { return ++num_asked == 3; };
    const std::vector<int32_t> tokens = random_tokens(2 * 65, 19, 5);
    EXPECT_FALSE(measure_next_token_influence(model, tokens, 2, 64, 1, places, stop, 100));
    EXPECT_EQ(num_losses, 2 * 2 * 2 * 64);
}

// Untrained models too: under dense attention nothing, under Lighthouse attention something. One tile of one span, so
// that no other token is replaced.
TEST(NextTokenInfluence, IsOfTheSelection) {
    LighthouseConfig lighthouse;
    lighthouse.levels = 2, lighthouse.pool = 2, lighthouse.topk = 128, lighthouse.dense_layers = {};
    const int64_t T = 512;
    reference::ReferenceModel<float> model(tiny_config(), AttentionMode::lighthouse, lighthouse, 2, T);
    set_random_weights(model, 0.5);
    const std::vector<int32_t> tokens = random_tokens(2 * (T + 1), 19, 9);
    for (const AttentionMode mode : {AttentionMode::dense, AttentionMode::lighthouse}) {
        model.set_attention(mode);
        const NextTokenInfluence i = *measure_next_token_influence(model, tokens, 2, T, 1, places, never, 16);
        EXPECT_EQ(i.num_places, 16);
        EXPECT_EQ(i.standard_error > 0.0, mode == AttentionMode::lighthouse) << text_of(i);
        EXPECT_EQ(i.rise != 0.0, mode == AttentionMode::lighthouse) << text_of(i);
    }
}

}  // namespace
