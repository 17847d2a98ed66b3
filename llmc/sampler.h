// sampler.h: the next token from logits: temperature and nucleus (top-p) sampling (Holtzman et al. 2020).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

// Draws from softmax(logits / temperature), cut to the likeliest tokens that together have at least probability top_p.
// logits [V]; temperature 0 takes the largest logit, of equal ones the first; top_p in (0, 1]; u uniform in [0, 1): all
// that is random. No value when a logit is not finite.
inline std::optional<int32_t> sample_token(const float* logits, int64_t V, double temperature, double top_p, double u) {
    if (!std::all_of(logits, logits + V, [](float logit) { return std::isfinite(logit); })) {
        return std::nullopt;
    }
    const int64_t likeliest = std::max_element(logits, logits + V) - logits;
    if (temperature == 0.0) {
        return (int32_t)likeliest;
    }
    std::vector<double> probability(V);  // times a common factor
    double total = 0.0;
    for (int64_t i = 0; i < V; ++i) {
        probability[i] = std::exp(((double)logits[i] - (double)logits[likeliest]) / temperature);
        total += probability[i];
    }
    std::vector<int32_t> order(V);  // the likeliest first, equal ones by number
    std::iota(order.begin(), order.end(), 0);
    int64_t num_kept = V;
    if (top_p < 1.0) {
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return probability[a] > probability[b]; });
        double kept = 0.0;
        for (num_kept = 0; num_kept < V && (num_kept == 0 || kept < top_p * total); ++num_kept) {
            kept += probability[order[num_kept]];
        }
        total = kept;
    }
    double sum = 0.0;
    for (int64_t i = 0; i < num_kept; ++i) {
        sum += probability[order[i]];
        if (u * total < sum) {
            return order[i];
        }
    }
    // Reached only when u * total rounds up to total: the last token that can be drawn at all.
    while (num_kept > 1 && probability[order[num_kept - 1]] == 0.0) {
        --num_kept;
    }
    return order[num_kept - 1];
}
