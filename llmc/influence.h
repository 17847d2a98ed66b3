// influence.h: how much the tokens after a place change the model's outputs before it. Under dense attention they
// cannot. Under Lighthouse attention no content flows back either, but which entries a tile keeps depends on the scores
// of all its tokens: the choice, and so an earlier output, may change with later ones. This measures by how much, on
// real tokens.
//
// The tokens after the middle of a tile are replaced by the same tokens in reverse order; the losses of the tokens
// before are compared with what they were. Those in earlier tiles may not change by a bit; those in the first half of
// the tile may. All but one of these keep the token that they predict: what a model has learned to read of that one
// from the choice shows only where it alone is replaced (NextTokenInfluence).
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "trainable_model.h"

struct SelectionInfluence {
    int64_t tile_tokens = 0;        // T / tiles
    int64_t split = 0;              // the last token that was kept
    double changed_fraction = 0.0;  // of the losses in the tile's first half: those that changed at all
    double mean_change = 0.0;       // mean |change| of these losses, nats
    double max_change = 0.0;        // the largest
    double mean_benefit = 0.0;  // mean loss with the replaced tokens minus that with the true ones: above 0, the true
                                // later tokens helped
    double earlier_max_change = 0.0;  // the largest in the tiles before, which must be 0
};

// For tokens [B, T + 1] under the model's present attention; `tiles` of its geometry, which divide T.
inline SelectionInfluence measure_influence(TrainableModel& model, const std::vector<int32_t>& tokens, int B, int64_t T,
                                            int64_t tiles) {
    CHECK((int64_t)tokens.size() >= B * (T + 1) && tiles >= 1 && T % tiles == 0 && T / tiles >= 4,
          "influence: %zu tokens for %d sequences of %lld in %lld tiles", tokens.size(), B, (long long)T,
          (long long)tiles);
    SelectionInfluence influence;
    influence.tile_tokens = T / tiles;
    const int64_t tile_begin = tiles / 2 * influence.tile_tokens;
    influence.split = tile_begin + influence.tile_tokens / 2;
    std::vector<int32_t> replaced(tokens.begin(), tokens.begin() + B * (T + 1));
    for (int b = 0; b < B; ++b) {
        int32_t* row = replaced.data() + b * (T + 1);
        std::reverse(row + influence.split + 1, row + T + 1);
    }
    std::vector<float> before(B * T), after(B * T);
    model.token_losses(before.data(), tokens.data(), B, T);
    model.token_losses(after.data(), replaced.data(), B, T);

    int64_t num_compared = 0, num_changed = 0;
    for (int b = 0; b < B; ++b) {
        for (int64_t t = 0; t < influence.split; ++t) {  // the loss at t is of token t + 1
            const double difference = (double)after[b * T + t] - (double)before[b * T + t];
            const double change = std::isnan(difference) ? INFINITY : std::fabs(difference);
            if (t < tile_begin) {
                influence.earlier_max_change = std::max(influence.earlier_max_change, change);
                continue;
            }
            ++num_compared;
            num_changed += change > 0.0;
            influence.mean_change += change;
            influence.mean_benefit += difference;
            influence.max_change = std::max(influence.max_change, change);
        }
    }
    influence.changed_fraction = (double)num_changed / (double)num_compared;
    influence.mean_change /= (double)num_compared;
    influence.mean_benefit /= (double)num_compared;
    return influence;
}

inline std::string influence_text(const SelectionInfluence& i) {
    return format_string(
        "later tokens replaced from %lld on: %.1f %% of the losses before them in their tile of %lld change, on "
        "average by "
        "%.2e nats, at most by %.2e; the true ones help by %.1e; in earlier tiles at most %.1e",
        (long long)i.split + 1, 100.0 * i.changed_fraction, (long long)i.tile_tokens, i.mean_change, i.max_change,
        i.mean_benefit, i.earlier_max_change);
}

// ---- the next token ----------------------------------------------------------------------------

// How much the loss at a place rises when later input tokens are replaced and the token to predict stays what it was:
// what the model has read of them from the choice of entries. 0 under dense attention.
class NextTokenInfluence {
  public:
    enum Replaced { NEXT, ALL_LATER, ALL_LATER_BUT_NEXT, NUM_REPLACED };

    // Looks at one place of each of B sequences, tokens [B, T + 1] and places [B] in [0, T - 2]. Replaced by the tokens
    // that the next sequence has in the same places; B at least 2. model.all_logits (reference/model.h) has V columns.
    template <class Model>
    void add(Model& model, const std::vector<int32_t>& tokens, const std::vector<int64_t>& places, int B, int64_t T,
             int64_t V) {
        CHECK(B >= 2 && T >= 2 && (int64_t)tokens.size() >= B * (T + 1) && (int64_t)places.size() >= B,
              "influence of the next token: %d sequences of %lld", B, (long long)T);
        std::vector<float> logits(B * T * V);
        std::vector<double> true_losses(B);
        for (int replaced = -1; replaced < NUM_REPLACED; ++replaced) {  // -1: nothing
            std::vector<int32_t> inputs(B * T);
            for (int b = 0; b < B; ++b) {
                const int32_t *const row = tokens.data() + b * (T + 1), *const other = &tokens[(b + 1) % B * (T + 1)];
                const int64_t begin = places[b] + (replaced == ALL_LATER_BUT_NEXT ? 2 : 1);
                const int64_t end = replaced < 0 ? begin : replaced == NEXT ? begin + 1 : T;
                for (int64_t t = 0; t < T; ++t) {
                    inputs[b * T + t] = t >= begin && t < end ? other[t] : row[t];
                }
            }
            model.all_logits(logits.data(), inputs.data(), B, T);
            for (int b = 0; b < B; ++b) {
                const double loss = loss_of(&logits[(b * T + places[b]) * V], V, tokens[b * (T + 1) + places[b] + 1]);
                if (replaced < 0) {
                    true_losses[b] = loss;
                    sum_ += loss;
                } else {
                    const double rise = loss - true_losses[b];
                    rises_[replaced] += rise;
                    squares_[replaced] += rise * rise;
                }
            }
        }
        num_places_ += B;
    }
    int64_t num_places() const { return num_places_; }
    double loss() const { return sum_ / (double)num_places_; }  // mean, with all tokens as they are
    double rise(Replaced replaced) const { return rises_[replaced] / (double)num_places_; }
    double standard_error(Replaced replaced) const {
        const double n = (double)num_places_, mean = rise(replaced);
        return std::sqrt(std::max(0.0, squares_[replaced] / n - mean * mean) / n);
    }
    std::string text() const {
        const auto of = [&](Replaced r) { return format_string("%+.4f (+- %.4f)", rise(r), standard_error(r)); };
        return format_string(
            "%lld places, mean loss %.4f; it rises by, when the next token is replaced: %s; all later ones: %s; all "
            "later ones but the next: %s",
            (long long)num_places_, loss(), of(NEXT).c_str(), of(ALL_LATER).c_str(), of(ALL_LATER_BUT_NEXT).c_str());
    }

  private:
    static double loss_of(const float* logits, int64_t V, int32_t target) {
        const double most = *std::max_element(logits, logits + V);
        double sum = 0.0;
        for (int64_t v = 0; v < V; ++v) {
            sum += std::exp(logits[v] - most);
        }
        return std::log(sum) + most - logits[target];
    }

    int64_t num_places_ = 0;
    double sum_ = 0.0;
    std::array<double, NUM_REPLACED> rises_ = {}, squares_ = {};
};
