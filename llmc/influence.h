// influence.h: how much the tokens after a place change the model's outputs before it. Under dense attention they
// cannot. Under Lighthouse attention no content flows back either, but which entries a tile keeps depends on the scores
// of all its tokens: the choice, and so an earlier output, may change with later ones, and a model may learn to read
// from it. Two measures, on real tokens:
//
// measure_selection_influence: the tokens after the middle of a tile are replaced by the same tokens in reverse order;
// the losses of the tokens before are compared with what they were. Those in earlier tiles may not change by a bit;
// those in the first half of the tile may. All of these keep the token that they predict.
//
// measure_next_token_influence: the token to predict is replaced, as an input, by another one, and stays what it was as
// a target.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "random.h"
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

inline void check_influence_arguments(const std::vector<int32_t>& tokens, int B, int64_t T, int64_t tiles) {
    CHECK((int64_t)tokens.size() >= B * (T + 1) && tiles >= 1 && T % tiles == 0 && T / tiles >= 4,
          "influence: %zu tokens for %d sequences of %lld in %lld tiles", tokens.size(), B, (long long)T,
          (long long)tiles);
}

// For tokens [B, T + 1] under the model's present attention; `tiles` of its geometry, which divide T.
inline SelectionInfluence measure_selection_influence(TrainableModel& model, const std::vector<int32_t>& tokens, int B,
                                                      int64_t T, int64_t tiles) {
    check_influence_arguments(tokens, B, T, tiles);
    SelectionInfluence influence;
    influence.tile_tokens = T / tiles;
    const int64_t tile_begin = tiles / 2 * influence.tile_tokens;
    influence.split = tile_begin + influence.tile_tokens / 2;
    const InputsAndTargets columns(tokens.data(), B, T);
    std::vector<int32_t> replaced = columns.inputs;
    for (int b = 0; b < B; ++b) {
        const auto row = replaced.begin() + b * T;
        std::reverse(row + influence.split + 1, row + T);
    }
    std::vector<float> before(B * T), after(B * T);
    model.token_losses(before.data(), columns.inputs.data(), columns.targets.data(), B, T);
    model.token_losses(after.data(), replaced.data(), columns.targets.data(), B, T);

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

inline std::string text_of(const SelectionInfluence& i) {
    return format_string(
        "later tokens replaced from %lld on: %.1f %% of the losses before them in their tile of %lld change, on "
        "average by "
        "%.2e nats, at most by %.2e; the true ones help by %.1e; in earlier tiles at most %.1e",
        (long long)i.split + 1, 100.0 * i.changed_fraction, (long long)i.tile_tokens, i.mean_change, i.max_change,
        i.mean_benefit, i.earlier_max_change);
}

struct NextTokenInfluence {
    int64_t num_places = 0;
    double loss = 0.0;            // mean at these places, with the true next token as an input, nats
    double rise = 0.0;            // by how much it is higher with another one there: what is read of it
    double standard_error = 0.0;  // of rise
};

// Arguments as above; `random` chooses places and tokens. A sequence is cut into spans of about 512 tokens inside its
// tiles, and the token after a random place of each is replaced in one of two forwards, a coin says in which. So either
// has as many replaced tokens elsewhere, on average, and what these change cancels: under dense attention the rise is 0
// within its standard error. Pairs of forwards until there are min_places; nothing where stop() ends them before. A
// replacement is a token from elsewhere in `tokens` that is not the true one (where all are the same, nothing is
// replaced).
inline std::optional<NextTokenInfluence> measure_next_token_influence(
    TrainableModel& model, const std::vector<int32_t>& tokens, int B, int64_t T, int64_t tiles,
    const RandomStream& random, const std::function<bool()>& stop, int64_t min_places = 128) {
    check_influence_arguments(tokens, B, T, tiles);
    const int64_t tile_tokens = T / tiles, spans = std::max<int64_t>(1, tile_tokens / 512), span = tile_tokens / spans;
    uint64_t num_drawn = 0;
    const auto draw = [&](int64_t n) {  // of 0 to n - 1
        return std::min((int64_t)(random.uniform(num_drawn++) * (double)n), n - 1);
    };
    const InputsAndTargets columns(tokens.data(), B, T);
    struct Place {
        int64_t index;  // of its loss in [B, T]
        int replaced_in;
    };
    std::vector<double> rises;
    std::vector<float> losses[2] = {std::vector<float>(B * T), std::vector<float>(B * T)};
    NextTokenInfluence influence;
    while ((int64_t)rises.size() < min_places) {
        if (stop()) {
            return std::nullopt;
        }
        std::vector<Place> places;
        std::vector<int32_t> inputs[2] = {columns.inputs, columns.inputs};
        for (int64_t i = 0; i < B * tiles * spans; ++i) {
            const Place place = {i / spans * tile_tokens + i % spans * span + draw(span - 1), (int)draw(2)};
            const int64_t next = place.index + 1;
            const auto differs = [&](int32_t token) { return token != columns.inputs[next]; };
            const auto from = columns.inputs.begin() + draw(B * T);
            auto other = std::find_if(from, columns.inputs.end(), differs);
            if (other == columns.inputs.end()) {
                other = std::find_if(columns.inputs.begin(), from, differs);
            }
            inputs[place.replaced_in][next] = *other;
            places.push_back(place);
        }
        for (int pass = 0; pass < 2; ++pass) {
            model.token_losses(losses[pass].data(), inputs[pass].data(), columns.targets.data(), B, T);
        }
        for (const Place& place : places) {
            const double loss = losses[1 - place.replaced_in][place.index];
            influence.loss += loss;
            rises.push_back(losses[place.replaced_in][place.index] - loss);
        }
    }
    const double n = (double)rises.size();
    influence.num_places = (int64_t)rises.size();
    influence.loss /= n;
    influence.rise = std::accumulate(rises.begin(), rises.end(), 0.0) / n;
    double squares = 0.0;
    for (const double rise : rises) {
        squares += (rise - influence.rise) * (rise - influence.rise);
    }
    influence.standard_error = n > 1.0 ? std::sqrt(squares / (n - 1.0) / n) : 0.0;
    return influence;
}

inline std::string text_of(const NextTokenInfluence& i) {
    return format_string("the next token replaced: the loss at %lld places, %.4f, rises by %+.4f (+- %.4f)",
                         (long long)i.num_places, i.loss, i.rise, i.standard_error);
}
