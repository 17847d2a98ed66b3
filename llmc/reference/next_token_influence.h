// reference/next_token_influence.h: how much of later tokens, above all of the one to predict, a model has learned to
// read from Lighthouse attention's choice of entries, which depends on them; influence.h measures what tokens further
// on do.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "../check.h"
#include "classifier.h"  // the loss

namespace reference {

// How much the loss at a place rises when later input tokens are replaced and the token to predict stays what it was:
// what the model has read of them from the choice of entries. 0 under dense attention.
class NextTokenInfluence {
  public:
    enum Replaced { NEXT, ALL_LATER, ALL_LATER_BUT_NEXT, NUM_REPLACED };

    // Looks at one place of each of B sequences, tokens [B, T + 1] and places [B] in [0, T - 2]. Replaced by the tokens
    // that the next sequence has in the same places; B at least 2. model.all_logits (model.h) has V columns.
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
        std::vector<double> row(logits, logits + V);
        double loss;
        cross_entropy_forward_backward(&loss, row.data(), &target, 1, V, V, 0.0, false);
        return loss;
    }

    int64_t num_places_ = 0;
    double sum_ = 0.0;
    std::array<double, NUM_REPLACED> rises_ = {}, squares_ = {};
};

}  // namespace reference
