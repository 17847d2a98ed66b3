// lighthouse_geometry.h: the sizes of Lighthouse attention (arXiv:2605.06554) that follow from the sequence length, the
// number of levels, the pooling factor and the top-K budget; the rules these obey: lighthouse_rules.h. Host and device.
//
// Level 0 is the tokens, level l has one entry for each window of pool^l tokens. The sequence is cut into
// topk / tile_budget tiles; in every tile and at every level above 0, tile_budget entries are selected and descend.
// An entry's address in the pyramid is one number: the levels lie one after the other, level 0 first.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>

#include "check.h"
#include "lighthouse_rules.h"
#include "model_config.h"

#ifdef __CUDACC__
#define LLMC_HOST_DEVICE __host__ __device__
#else
#define LLMC_HOST_DEVICE
#endif

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

// The least T that has a geometry; for settings that no T has one for, a number that it refuses.
inline int64_t shortest_lighthouse_length(const LighthouseConfig& config) {
    int64_t T = std::clamp<int64_t>(config.topk, 1, LIGHTHOUSE_MAX_LENGTH);
    for (int l = 1; l < std::min(config.levels, LIGHTHOUSE_MAX_LEVELS); ++l) {
        T = std::min(T * std::max(config.pool, 1), LIGHTHOUSE_MAX_LENGTH);
    }
    if (config.scorer == LighthouseScorer::dilated) {  // which the dilation divides
        const int64_t unit = std::max<int64_t>(T / LIGHTHOUSE_TILE_BUDGET, 1);
        T = std::min(round_up(T, std::lcm(unit, std::max<int64_t>(config.dilation, 1))), LIGHTHOUSE_MAX_LENGTH);
    }
    return T;
}

// The geometry of a sequence of T tokens. Throws Error naming the first flag whose value breaks a rule, the rule and
// the nearest values that work.
inline LighthouseGeometry make_lighthouse_geometry(int64_t T, const LighthouseConfig& config,
                                                   const SequenceLimits& limits = {}) {
    const lighthouse_rules::Values values = lighthouse_rules::values_of(T, config);
    if (const auto refusal = lighthouse_rules::refuse(values, limits)) {
        fail("%s", lighthouse_rules::sentence(values, *refusal).c_str());
    }
    LighthouseGeometry g;
    g.T = T, g.levels = config.levels, g.pool = config.pool, g.topk = config.topk;
    g.tiles = config.topk / LIGHTHOUSE_TILE_BUDGET;
    while (1 << g.log2_pool < g.pool) {
        ++g.log2_pool;
    }
    g.S = g.level_size(g.levels - 1) + (int64_t)(g.levels - 1) * g.pool * g.topk;
    g.num_slots = g.level_offset(g.levels);
    return g;
}
