// influence.h: how much the tokens after a place change the model's outputs before it. Under dense attention they
// cannot. Under Lighthouse attention no content flows back either, but which entries a tile keeps depends on the scores
// of all its tokens: the choice, and so an earlier output, may change with later ones. This measures by how much, on
// real tokens.
//
// The tokens after the middle of a tile are replaced by the same tokens in reverse order; the losses of the tokens
// before are compared with what they were. Those in earlier tiles may not change by a bit; those in the first half of
// the tile may. All but one of these keep the token that they predict: what a model has learned to read of that one
// from the choice shows only where it alone is replaced (reference/next_token_influence.h).
#pragma once
#include <algorithm>
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
