// lighthouse_geometry.h: the sizes of Lighthouse attention (arXiv:2605.06554) that follow from the sequence length, the
// number of levels, the pooling factor and the top-K budget, and the rules these must obey. Host and device.
//
// Level 0 is the tokens, level l has one entry for each window of pool^l tokens. The sequence is cut into
// topk / tile_budget tiles; in every tile and at every level above 0, tile_budget entries are selected and descend.
// An entry's address in the pyramid is one number: the levels lie one after the other, level 0 first.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"
#include "model_config.h"

#ifdef __CUDACC__
#define LLMC_HOST_DEVICE __host__ __device__
#else
#define LLMC_HOST_DEVICE
#endif

constexpr int LIGHTHOUSE_TILE_BUDGET = 128;  // m: entries selected per tile and level, half by query, half by key score
constexpr int LIGHTHOUSE_MAX_LEVELS = 6;
constexpr int LIGHTHOUSE_MAX_POOL = 32;
constexpr int64_t LIGHTHOUSE_MAX_LENGTH = (int64_t)1 << 29;  // tokens: entries are counted in 32 bits

struct LighthouseGeometry {
    int64_t T = 0;          // tokens
    int levels = 0;         // L
    int pool = 0;           // p, a power of two
    int log2_pool = 0;      // windows are powers of two, so divisions by them are shifts
    int64_t topk = 0;       // k
    int64_t tiles = 0;      // k / m
    int64_t S = 0;          // rows of the gathered sub-sequence: T / p^(L-1) + (L-1) p k (Eq. 8)
    int64_t num_slots = 0;  // entries of the whole pyramid, all levels

    // Tokens that an entry of `level` stands for: p^level.
    LLMC_HOST_DEVICE int64_t window(int level) const { return (int64_t)1 << window_bits(level); }
    LLMC_HOST_DEVICE int window_bits(int level) const { return level * log2_pool; }
    // Entries of one level, and the pyramid address of its first.
    LLMC_HOST_DEVICE int64_t level_size(int level) const { return T >> window_bits(level); }
    LLMC_HOST_DEVICE int64_t level_offset(int level) const {
        int64_t offset = 0;
        for (int l = 0; l < level; ++l) {
            offset += level_size(l);
        }
        return offset;
    }
    LLMC_HOST_DEVICE int64_t slot(int level, int64_t index) const { return level_offset(level) + index; }
    // The level of a pyramid address; `slot` becomes the index within it.
    LLMC_HOST_DEVICE int level_of_slot(int64_t& slot) const {
        int level = 0;
        while (slot >= level_size(level)) {
            slot -= level_size(level++);
        }
        return level;
    }

    LLMC_HOST_DEVICE int64_t tile_tokens() const { return T / tiles; }
    LLMC_HOST_DEVICE int64_t tile_coarsest() const { return level_size(levels - 1) / tiles; }
    LLMC_HOST_DEVICE int64_t tile_rows() const {
        return S / tiles;
    }  // of the gathered sub-sequence; a tile's are adjacent
    // Entries of one tile at `level` that are in the sub-sequence.
    LLMC_HOST_DEVICE int64_t tile_candidates(int level) const {
        return level == levels - 1 ? tile_coarsest() : (int64_t)LIGHTHOUSE_TILE_BUDGET * pool;
    }

    // Score-and-value work of the inner attention as a fraction of dense causal attention's.
    double dense_work_fraction() const { return (double)S / (double)T * ((double)S / (double)T); }
};

namespace lighthouse_detail {
// The legal top-K budget nearest to `topk` when the sequence has `coarsest` coarsest entries; 0 when none is.
inline int64_t nearest_topk(int64_t coarsest, int64_t topk) {
    const int64_t m = LIGHTHOUSE_TILE_BUDGET;
    int64_t nearest = 0;
    for (int64_t tiles = 1; tiles * m <= coarsest; ++tiles) {
        const bool nearer = nearest == 0 || std::abs(tiles * m - topk) < std::abs(nearest - topk);
        if (coarsest % tiles == 0 && nearer) {
            nearest = tiles * m;
        }
    }
    return nearest;
}

// ", the nearest ..." of the message that refuses T: the multiples of `unit` on both sides, at least `minimum`.
inline std::string nearest_lengths(int64_t T, int64_t unit, int64_t minimum) {
    const int64_t below = T / unit * unit, above = below + unit;
    if (below < minimum) {
        return format_string("the nearest is %lld", (long long)minimum);
    }
    return format_string("the nearest are %lld and %lld", (long long)below, (long long)above);
}
}  // namespace lighthouse_detail

// The least T that has a geometry; for settings that no T has one for, a number that it refuses.
inline int64_t shortest_lighthouse_length(const LighthouseConfig& config) {
    int64_t T = std::clamp<int64_t>(config.topk, 1, LIGHTHOUSE_MAX_LENGTH);
    for (int l = 1; l < std::min(config.levels, LIGHTHOUSE_MAX_LEVELS); ++l) {
        T = std::min(T * std::max(config.pool, 1), LIGHTHOUSE_MAX_LENGTH);
    }
    return T;
}

// The geometry of a sequence of T tokens. Throws Error naming the first flag whose value breaks a rule, the rule and
// the nearest values that work.
inline LighthouseGeometry make_lighthouse_geometry(int64_t T, const LighthouseConfig& config) {
    const int64_t m = LIGHTHOUSE_TILE_BUDGET;
    const int L = config.levels, p = config.pool;
    CHECK(L >= 2 && L <= LIGHTHOUSE_MAX_LEVELS, "--lighthouse_levels %d: must be from 2 to %d; the nearest is %d", L,
          LIGHTHOUSE_MAX_LEVELS, L < 2 ? 2 : LIGHTHOUSE_MAX_LEVELS);
    if (p < 2 || p > LIGHTHOUSE_MAX_POOL || (p & (p - 1)) != 0) {
        int below = 2;
        while (below * 2 <= p && below * 2 <= LIGHTHOUSE_MAX_POOL) {
            below *= 2;
        }
        const int above = p < 2 || below == LIGHTHOUSE_MAX_POOL ? below : below * 2;
        fail("--lighthouse_pool %d: must be a power of two from 2 to %d; the nearest is %d", p, LIGHTHOUSE_MAX_POOL,
             p - below <= above - p ? below : above);
    }
    CHECK(config.topk >= m && config.topk % m == 0,
          "--lighthouse_topk %lld: must be a positive multiple of %lld; the nearest is %lld", (long long)config.topk,
          (long long)m,
          (long long)(config.topk < m ? m : (std::min(config.topk, LIGHTHOUSE_MAX_LENGTH) + m / 2) / m * m));
    CHECK(config.topk <= LIGHTHOUSE_MAX_LENGTH,
          "--lighthouse_topk %lld: must be at most %lld, more than any sequence has", (long long)config.topk,
          (long long)LIGHTHOUSE_MAX_LENGTH);
    CHECK(T <= LIGHTHOUSE_MAX_LENGTH, "--seq_len %lld: Lighthouse attention counts entries in 32 bits; at most %lld",
          (long long)T, (long long)LIGHTHOUSE_MAX_LENGTH);

    LighthouseGeometry g;
    g.T = T, g.levels = L, g.pool = p, g.topk = config.topk, g.tiles = config.topk / m;
    while (1 << g.log2_pool < p) {
        ++g.log2_pool;
    }
    const int64_t coarsest_window = g.window(L - 1), unit = g.tiles * coarsest_window, minimum = unit * m;
    if (T % unit != 0 || T < minimum) {
        const int64_t other_topk =
            T > 0 && T % coarsest_window == 0 ? lighthouse_detail::nearest_topk(T / coarsest_window, g.topk) : 0;
        fail(
            "--seq_len %lld: with --lighthouse_topk %lld (%lld tiles), --lighthouse_levels %d and --lighthouse_pool %d "
            "it must be a multiple of %lld and at least %lld; %s%s",
            (long long)T, (long long)g.topk, (long long)g.tiles, L, p, (long long)unit, (long long)minimum,
            lighthouse_detail::nearest_lengths(T, unit, minimum).c_str(),
            other_topk == 0
                ? ""
                : format_string("; this --seq_len works with --lighthouse_topk %lld", (long long)other_topk).c_str());
    }
    if (config.scorer == LighthouseScorer::dilated) {
        CHECK(config.dilation >= 1 && T % config.dilation == 0,
              "--lighthouse_dilation %d: must be positive and divide --seq_len %lld", config.dilation, (long long)T);
    }
    g.S = g.level_size(L - 1) + (int64_t)(L - 1) * p * g.topk;
    g.num_slots = g.level_offset(L);
    return g;
}
