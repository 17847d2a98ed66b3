// lighthouse_rules.h: the rules that the settings of Lighthouse attention obey, and for settings that break one the
// nearest that do not, as values and as a sentence.
#pragma once
#include <algorithm>
#include <array>
#include <bitset>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "model_config.h"

constexpr int LIGHTHOUSE_TILE_BUDGET = 128;  // m: entries selected per tile and level, half by query, half by key score
constexpr int LIGHTHOUSE_MAX_LEVELS = 6;
constexpr int LIGHTHOUSE_MAX_POOL = 32;
constexpr int64_t LIGHTHOUSE_MAX_LENGTH = (int64_t)1 << 29;  // tokens: entries are counted in 32 bits

// The multiples of `unit` from `least` to `most` that are nearest to x: the last below or at it, the first above.
inline std::vector<int64_t> nearest_multiples(int64_t x, int64_t unit, int64_t least, int64_t most) {
    const int64_t first = (least + unit - 1) / unit * unit, last = most / unit * unit;
    if (first > last) {
        return {};
    }
    const int64_t below = std::clamp(x / unit * unit, first, last), above = std::clamp(below + unit, first, last);
    return x < first || below == above ? std::vector<int64_t>{below} : std::vector<int64_t>{below, above};
}

// "; the nearest is 96", "; the nearest are 96 and 112"; of none, nothing.
inline std::string nearest_text(const std::vector<int64_t>& values) {
    std::string text;
    for (const int64_t value : values) {
        text += (text.empty() ? "" : " and ") + std::to_string(value);
    }
    return text.empty() ? text : (values.size() == 1 ? "; the nearest is " : "; the nearest are ") + text;
}

// What bounds sequences beside their geometry.
struct SequenceLimits {
    int64_t num_chunks = 1;                   // equal parts of whole tiles, on ranks (context_partition.h)
    int64_t longest = LIGHTHOUSE_MAX_LENGTH;  // that --seq_len may be
};

namespace lighthouse_rules {

// ---- rules --------------------------------------------------------------------------------------

// What a geometry follows from, by flag, in the order in which values are checked.
enum Flag { LEVELS, POOL, TOPK, SEQ_LEN, DILATION };
constexpr int NUM_FLAGS = 5;
constexpr const char* FLAG_NAMES[NUM_FLAGS] = {"--lighthouse_levels", "--lighthouse_pool", "--lighthouse_topk",
                                               "--seq_len", "--lighthouse_dilation"};
using Values = std::array<int64_t, NUM_FLAGS>;

inline Values values_of(int64_t T, const LighthouseConfig& c) {
    return {c.levels, c.pool, c.topk, T, c.scorer == LighthouseScorer::dilated ? c.dilation : 1};
}

// In the order of checks; each takes it that those before hold.
enum class Rule { levels, pool, widest_pool, most_levels, topk, largest_topk, seq_len, dilation, none };

inline Flag flag_of(Rule rule) {
    constexpr Flag FLAGS[] = {LEVELS, POOL, POOL, LEVELS, TOPK, TOPK, SEQ_LEN, DILATION};
    return FLAGS[(int)rule];
}

// p^(L-1), of levels and a pool that are legal.
inline int64_t coarsest_window(const Values& v) {
    int64_t window = 1;
    for (int64_t l = 1; l < v[LEVELS]; ++l) {
        window *= v[POOL];
    }
    return window;
}
// Every chunk holds whole tiles: what the budget is a multiple of.
inline int64_t topk_unit(const SequenceLimits& limits) { return LIGHTHOUSE_TILE_BUDGET * limits.num_chunks; }
// Every tile holds as many whole windows as others: what T is a multiple of.
inline int64_t length_unit(const Values& v) { return v[TOPK] / LIGHTHOUSE_TILE_BUDGET * coarsest_window(v); }
// And at least as many windows as it hands down: the shortest T.
inline int64_t shortest_length(const Values& v) { return v[TOPK] * coarsest_window(v); }

// The first rule that `v` breaks.
inline Rule broken_rule(const Values& v, const SequenceLimits& limits) {
    const int64_t p = v[POOL], T = v[SEQ_LEN];
    if (v[LEVELS] < 2 || v[LEVELS] > LIGHTHOUSE_MAX_LEVELS) {
        return Rule::levels;
    }
    if (p < 2 || p > LIGHTHOUSE_MAX_POOL || (p & (p - 1)) != 0) {
        return Rule::pool;
    }
    if (topk_unit(limits) > limits.longest / p) {  // with two levels
        return Rule::widest_pool;
    }
    const int64_t largest_topk = limits.longest / coarsest_window(v);
    if (topk_unit(limits) > largest_topk) {
        return Rule::most_levels;
    }
    if (v[TOPK] < topk_unit(limits) || v[TOPK] % topk_unit(limits) != 0) {
        return Rule::topk;
    }
    if (v[TOPK] > largest_topk) {
        return Rule::largest_topk;
    }
    if (T > limits.longest || T < shortest_length(v) || T % length_unit(v) != 0) {
        return Rule::seq_len;
    }
    return v[DILATION] < 1 || T % v[DILATION] != 0 ? Rule::dilation : Rule::none;
}

// A broken rule in words, to follow "--flag value: ".
inline std::string rule_text(Rule rule, const Values& v, const SequenceLimits& limits) {
    const long long L = v[LEVELS], p = v[POOL], k = v[TOPK], longest = limits.longest;
    const std::string chunks = limits.num_chunks == 1
                                   ? ""
                                   : format_string(" (whole tiles in each of the %lld chunks of --context_parallel)",
                                                   (long long)limits.num_chunks);
    switch (rule) {
        case Rule::levels:
            return format_string("must be from 2 to %d", LIGHTHOUSE_MAX_LEVELS);
        case Rule::pool:
            return format_string("must be a power of two from 2 to %d", LIGHTHOUSE_MAX_POOL);
        case Rule::widest_pool:
            return format_string("sequences have at least %lld tokens%s, and --seq_len may be at most %lld",
                                 (long long)topk_unit(limits) * p, chunks.c_str(), longest);
        case Rule::most_levels:
            return format_string(
                "with --lighthouse_pool %lld sequences have at least %lld tokens%s, and --seq_len may be at most %lld",
                p, (long long)(topk_unit(limits) * coarsest_window(v)), chunks.c_str(), longest);
        case Rule::topk:
            return format_string("must be a positive multiple of %lld%s", (long long)topk_unit(limits), chunks.c_str());
        case Rule::largest_topk:
            return format_string(
                "with --lighthouse_levels %lld and --lighthouse_pool %lld it must be at most %lld for "
                "a --seq_len of at most %lld",
                L, p, (long long)(longest / coarsest_window(v) / topk_unit(limits) * topk_unit(limits)), longest);
        case Rule::seq_len:
            return format_string(
                "with --lighthouse_topk %lld (%lld tiles), --lighthouse_levels %lld and "
                "--lighthouse_pool %lld it must be a multiple of %lld from %lld to %lld",
                k, k / LIGHTHOUSE_TILE_BUDGET, L, p, (long long)length_unit(v), (long long)shortest_length(v), longest);
        case Rule::dilation:
            return format_string("must be positive and divide --seq_len %lld", (long long)v[SEQ_LEN]);
        case Rule::none:
            break;
    }
    return "";
}

// ---- suggestions --------------------------------------------------------------------------------

// Values for `flag` beside the others of `v`, those among them that any rule could let through, the nearest to v[flag]
// first and of two as near the lesser. Whoever takes one may yet change T when length_is_free.
inline std::vector<int64_t> candidates(Flag flag, const Values& v, bool length_is_free, const SequenceLimits& limits) {
    std::vector<int64_t> found;
    const Rule broken = broken_rule(v, limits);
    const int64_t asked = std::clamp<int64_t>(v[flag], 0, 2 * LIGHTHOUSE_MAX_LENGTH);  // others are below
    if (flag == LEVELS) {
        for (int L = 2; L <= LIGHTHOUSE_MAX_LEVELS; ++L) {
            found.push_back(L);
        }
    } else if (flag == POOL) {
        for (int p = 2; p <= LIGHTHOUSE_MAX_POOL; p *= 2) {
            found.push_back(p);
        }
    } else if (flag == TOPK && broken > Rule::most_levels) {
        const int64_t length = length_is_free ? limits.longest : std::min(v[SEQ_LEN], limits.longest);
        for (int64_t k = topk_unit(limits); k <= length / coarsest_window(v); k += topk_unit(limits)) {
            found.push_back(k);
        }
    } else if (flag == SEQ_LEN && broken >= Rule::seq_len) {
        const int64_t unit = length_unit(v), both = std::lcm(unit, std::max<int64_t>(v[DILATION], 1));
        for (const int64_t step : {unit, both}) {
            for (const int64_t T : nearest_multiples(asked, step, shortest_length(v), limits.longest)) {
                found.push_back(T);
            }
        }
    } else if (flag == DILATION && broken >= Rule::dilation) {
        for (int64_t i = 1; i * i <= v[SEQ_LEN]; ++i) {
            if (v[SEQ_LEN] % i == 0) {
                found.push_back(i), found.push_back(v[SEQ_LEN] / i);
            }
        }
    }
    std::sort(found.begin(), found.end(), [&](int64_t a, int64_t b) {
        const int64_t to_a = std::abs(a - asked), to_b = std::abs(b - asked);
        return to_a != to_b ? to_a < to_b : a < b;
    });
    return found;
}

// The legal values nearest to `v` with another one for free[0], and maybe for the rest of `free`: nearest in the first
// of these, then in the next. Those before free[first] are chosen.
inline std::optional<Values> nearest_of(Values v, const std::vector<Flag>& free, size_t first,
                                        const SequenceLimits& limits) {
    if (first == free.size()) {
        return broken_rule(v, limits) == Rule::none ? std::optional<Values>(v) : std::nullopt;
    }
    const bool length_is_free = std::count(free.begin() + first + 1, free.end(), SEQ_LEN) > 0;
    for (const int64_t value : candidates(free[first], v, length_is_free, limits)) {
        if (first == 0 && value == v[free[0]]) {
            continue;
        }
        Values changed = v;
        changed[free[first]] = value;
        if (const std::optional<Values> found = nearest_of(changed, free, first + 1, limits)) {
            return found;
        }
    }
    return std::nullopt;
}

// The nearest legal values with another one for `flag`: alone if that can be, or else with as few others as can be,
// those that are checked last sooner.
inline std::optional<Values> nearest_with(const Values& v, Flag flag, const SequenceLimits& limits) {
    for (size_t num_others = 0; num_others < NUM_FLAGS; ++num_others) {
        for (unsigned long set = 1u << NUM_FLAGS; set-- > 0;) {
            const std::bitset<NUM_FLAGS> others(set);
            if (others.count() != num_others || others[flag]) {
                continue;
            }
            std::vector<Flag> free = {flag};
            for (int other = 0; other < NUM_FLAGS; ++other) {
                if (others[other]) {
                    free.push_back((Flag)other);
                }
            }
            if (const std::optional<Values> found = nearest_of(v, free, 0, limits)) {
                return found;
            }
        }
    }
    return std::nullopt;
}

// Why values cannot be, and what can instead.
struct Refusal {
    Flag flag;                      // whose value breaks the rule
    std::string rule;               // to follow "--flag value: "
    std::vector<Values> nearest;    // legal, with another value of the flag; of T, the nearest below and above
    std::optional<Values> instead;  // legal, with this T and another budget
};

inline std::optional<Refusal> refuse(const Values& v, const SequenceLimits& limits) {
    const Rule rule = broken_rule(v, limits);
    if (rule == Rule::none) {
        return std::nullopt;
    }
    Refusal refusal = {flag_of(rule), rule_text(rule, v, limits), {}, std::nullopt};
    if (rule == Rule::seq_len) {
        std::optional<Values> below, above;
        for (const int64_t T : candidates(SEQ_LEN, v, false, limits)) {
            Values changed = v;
            changed[SEQ_LEN] = T;
            std::optional<Values>& side = T < v[SEQ_LEN] ? below : above;
            if (!side && broken_rule(changed, limits) == Rule::none) {
                side = changed;
            }
        }
        for (const std::optional<Values>& side : {below, above}) {
            if (side) {
                refusal.nearest.push_back(*side);
            }
        }
        refusal.instead = nearest_of(v, {TOPK}, 0, limits);
    }
    if (refusal.nearest.empty()) {
        if (const std::optional<Values> nearest = nearest_with(v, refusal.flag, limits)) {
            refusal.nearest.push_back(*nearest);
        }
    }
    return refusal;
}

// The refusal of `asked` as a sentence. What a flag's nearest value takes beside it comes behind: "the nearest that
// works is 1024, with --seq_len 4096".
inline std::string sentence(const Values& asked, const Refusal& refusal) {
    std::string text =
        format_string("%s %lld: %s", FLAG_NAMES[refusal.flag], (long long)asked[refusal.flag], refusal.rule.c_str());
    const std::vector<Values>& nearest = refusal.nearest;
    if (nearest.size() == 2) {
        text += nearest_text({nearest[0][SEQ_LEN], nearest[1][SEQ_LEN]});
    } else if (!nearest.empty()) {
        text += format_string("; the nearest that works is %lld", (long long)nearest[0][refusal.flag]);
    }
    const char* joint = ", with ";
    for (int other = 0; other < NUM_FLAGS && !nearest.empty(); ++other) {
        if (other != refusal.flag && nearest[0][other] != asked[other]) {
            text += joint + format_string("%s %lld", FLAG_NAMES[other], (long long)nearest[0][other]);
            joint = " and ";
        }
    }
    if (refusal.instead) {
        text +=
            format_string("; this --seq_len works with %s %lld", FLAG_NAMES[TOPK], (long long)(*refusal.instead)[TOPK]);
    }
    return text;
}

}  // namespace lighthouse_rules
