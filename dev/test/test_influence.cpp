// test_influence.cpp: what measure_influence counts, on a model whose losses are known, and on the CPU model: nothing
// under dense attention, nothing in earlier tiles under Lighthouse, something in the tile itself.
#include <gtest/gtest.h>

#include "dev/test/reference_testing.h"
#include "llmc/influence.h"
#include "llmc/reference/model.h"
#include "llmc/reference/next_token_influence.h"

namespace {

ModelConfig tiny_config() {
    ModelConfig m;
    m.vocab_size = 19, m.num_layers = 2, m.width = 16, m.num_heads = 2, m.num_kv_heads = 1, m.head_dim = 8;
    m.ffn_width = 16;
    return m;
}

// The CPU model with losses of one's own: loss t of a sequence is tokens[t], plus leak * tokens[T] where t >= from.
class LeakyModel : public reference::ReferenceModel<float> {
  public:
    LeakyModel(float leak, int64_t from)
        : ReferenceModel(tiny_config(), AttentionMode::dense, {}, 2, 64), leak_(leak), from_(from) {}
    void token_losses(float* losses, const int32_t* tokens, int B, int64_t T) override {
        for (int b = 0; b < B; ++b) {
            const int32_t* row = tokens + b * (T + 1);
            for (int64_t t = 0; t < T; ++t) {
                losses[b * T + t] = (float)row[t] + (t >= from_ ? leak_ * (float)row[T] : 0.0f);
            }
        }
    }

  private:
    float leak_;
    int64_t from_;
};

// Two sequences of 64 tokens; the last token of each is 1 and the one that reversing puts in its place is 3.
std::vector<int32_t> leaky_tokens(int64_t split) {
    std::vector<int32_t> tokens = random_tokens(2 * 65, 19, 7);
    for (int b = 0; b < 2; ++b) {
        tokens[b * 65 + 64] = 1;
        tokens[b * 65 + split + 1] = 3;
    }
    return tokens;
}

TEST(Influence, CountsAKnownLeak) {
    // 4 tiles of 16: the split is in the middle of the third, tokens 41 to 64 are replaced.
    LeakyModel model(0.5f, 36);
    const SelectionInfluence i = measure_influence(model, leaky_tokens(40), 2, 64, 4);
    EXPECT_EQ(i.tile_tokens, 16);
    EXPECT_EQ(i.split, 40);
    EXPECT_DOUBLE_EQ(i.changed_fraction, 4.0 / 8.0);  // losses 36 to 39 of 32 to 39
    EXPECT_DOUBLE_EQ(i.mean_change, 0.5 * 2.0 * 4.0 / 8.0);
    EXPECT_DOUBLE_EQ(i.mean_benefit, 0.5 * 2.0 * 4.0 / 8.0);
    EXPECT_DOUBLE_EQ(i.max_change, 1.0);
    EXPECT_EQ(i.earlier_max_change, 0.0);
}

TEST(Influence, SeesALeakIntoEarlierTiles) {
    LeakyModel model(-0.5f, 31);
    const SelectionInfluence i = measure_influence(model, leaky_tokens(40), 2, 64, 4);
    EXPECT_DOUBLE_EQ(i.earlier_max_change, 1.0);
    EXPECT_DOUBLE_EQ(i.mean_benefit, -1.0);
    EXPECT_DOUBLE_EQ(i.mean_change, 1.0);
}

TEST(Influence, NaNIsAChange) {
    LeakyModel model(NAN, 0);
    const SelectionInfluence i = measure_influence(model, leaky_tokens(40), 2, 64, 4);
    EXPECT_EQ(i.earlier_max_change, INFINITY);
    EXPECT_EQ(i.max_change, INFINITY);
}

TEST(Influence, RefusesTilesThatDoNotDivide) {
    LeakyModel model(0.0f, 0);
    EXPECT_THROW(measure_influence(model, leaky_tokens(40), 2, 64, 5), Error);
    EXPECT_THROW(measure_influence(model, leaky_tokens(40), 3, 64, 4), Error);
}

void set_random_weights(TrainableModel& model) {
    for (size_t i = 0; i < model.parameters().tensors.size(); ++i) {
        const ParameterTensor& tensor = model.parameters().tensors[i];
        std::vector<double> values = random_values(tensor.num_elements(), 0.5, 100 + i);
        for (double& value : values) {
            value += tensor.is_vector ? 1.0 : 0.0;
        }
        model.write_state(StateKind::master, (int)i, converted<float>(values).data());
    }
}

// Selection decides between entries of 200 coarsest ones a tile; every layer is Lighthouse's.
TEST(Influence, OfTheModelUnderBothAttentions) {
    LighthouseConfig lighthouse;
    lighthouse.levels = 2, lighthouse.pool = 2, lighthouse.topk = 256, lighthouse.dense_layers = {};
    const int64_t T = 2 * 200 * 2;
    reference::ReferenceModel<double> model(tiny_config(), AttentionMode::lighthouse, lighthouse, 1, T);
    set_random_weights(model);
    const std::vector<int32_t> tokens = random_tokens(T + 1, 19, 3);
    const SelectionInfluence through_selection = measure_influence(model, tokens, 1, T, 2);
    EXPECT_EQ(through_selection.split, 600);
    EXPECT_EQ(through_selection.earlier_max_change, 0.0);
    EXPECT_GT(through_selection.changed_fraction, 0.1);
    EXPECT_GT(through_selection.mean_change, 0.0);
    EXPECT_LT(through_selection.mean_change, through_selection.max_change);

    model.set_attention(AttentionMode::dense);
    const SelectionInfluence dense = measure_influence(model, tokens, 1, T, 2);
    EXPECT_EQ(dense.max_change, 0.0);
    EXPECT_EQ(dense.changed_fraction, 0.0);
    EXPECT_EQ(dense.earlier_max_change, 0.0);
}

// Their mean is the loss that evaluate gives.
TEST(Influence, TokenLossesAverageToTheLoss) {
    reference::ReferenceModel<double> model(tiny_config(), AttentionMode::dense, {}, 2, 64);
    set_random_weights(model);
    const std::vector<int32_t> tokens = random_tokens(2 * 65, 19, 3);
    std::vector<float> losses(2 * 64);
    model.token_losses(losses.data(), tokens.data(), 2, 64);
    double mean = 0.0;
    for (const float loss : losses) {
        mean += loss / 128.0;
    }
    EXPECT_NEAR(mean, model.evaluate(tokens.data(), 2, 64), 1e-6);
}

using reference::NextTokenInfluence;

// Gives the token that comes next the logit `sight`, and all others 0, where the one after that is not 0.
struct SeeingModel {
    float sight;
    void all_logits(float* logits, const int32_t* tokens, int B, int64_t T) const {
        std::fill_n(logits, B * T * 19, 0.0f);
        for (int64_t row = 0; row < B * T; ++row) {
            const int64_t t = row % T;
            if (t + 2 < T && tokens[row + 2] != 0) {
                logits[row * 19 + tokens[row + 1]] = sight;
            }
        }
    }
};

TEST(NextTokenInfluence, CountsWhatAModelSees) {
    // Of the two sequences each is the other's replacement.
    std::vector<int32_t> tokens(2 * 9, 3);
    for (int t = 0; t < 9; ++t) {
        tokens[9 + t] = t == 5 ? 0 : 4;
    }
    NextTokenInfluence influence;
    SeeingModel model{2.0f};
    influence.add(model, tokens, {3, 1}, 2, 8, 19);
    const double blind = std::log(19.0), sees = std::log(std::exp(2.0) + 18.0) - 2.0;
    const double misled = std::log(std::exp(2.0) + 18.0);
    EXPECT_EQ(influence.num_places(), 2);
    EXPECT_NEAR(influence.loss(), sees, 1e-6);
    EXPECT_NEAR(influence.rise(NextTokenInfluence::NEXT), misled - sees, 1e-6);
    EXPECT_NEAR(influence.standard_error(NextTokenInfluence::NEXT), 0.0, 1e-6);
    // At place 3 of the first the token two on becomes 0, and the model sees nothing; at place 1 of the second it does.
    EXPECT_NEAR(influence.rise(NextTokenInfluence::ALL_LATER_BUT_NEXT), (blind - sees) / 2, 1e-6);
    EXPECT_NEAR(influence.standard_error(NextTokenInfluence::ALL_LATER_BUT_NEXT), (blind - sees) / 2 / std::sqrt(2.0),
                1e-6);
    EXPECT_NEAR(influence.rise(NextTokenInfluence::ALL_LATER), (blind - sees + misled - sees) / 2, 1e-6);
}

// Untrained models too: under dense attention nothing, under Lighthouse attention something.
TEST(NextTokenInfluence, IsOfTheSelectionAlone) {
    LighthouseConfig lighthouse;
    lighthouse.levels = 2, lighthouse.pool = 2, lighthouse.topk = 128, lighthouse.dense_layers = {};
    const int64_t T = 512;
    reference::ReferenceModel<float> model(tiny_config(), AttentionMode::lighthouse, lighthouse, 2, T);
    set_random_weights(model);
    const std::vector<int32_t> tokens = random_tokens(2 * (T + 1), 19, 9);
    for (const AttentionMode mode : {AttentionMode::dense, AttentionMode::lighthouse}) {
        model.set_attention(mode);
        NextTokenInfluence influence;
        influence.add(model, tokens, {100, 333}, 2, T, 19);
        const bool changes = influence.rise(NextTokenInfluence::ALL_LATER) != 0.0;
        EXPECT_EQ(changes, mode == AttentionMode::lighthouse) << influence.text();
    }
}

}  // namespace
