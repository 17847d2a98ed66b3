// lighthouse_select.cuh: which entries of the pyramid form the sub-sequence, and where each stands in it.
// In every tile and at every level above 0, of the candidates the 64 of highest query score and, of the rest, the 64 of
// highest key score are selected; equal scores go to the lower index; the sequence's first entry always is. The
// children of the selected are the next level's candidates, and every candidate of every level is kept.
// Shapes: token scores [B, heads, T] and those of the coarsest level [B, heads, T / c] float32, not negative, NaN
// counts as 0; an entry's score is the maximum over its window and the heads of its group. entries [B, Hkv, S]: pyramid
// address of each row in causal order; positions [B, Hkv, num_slots]: the inverse, -1 where absent. Cost: one thread
// block a tile; latency bound, some tens of block-wide steps a level. Reads the coarsest scores and those of tokens
// under selected entries, writes S + num_slots integers a head. Reference: lighthouse_select of reference/lighthouse.h.
// Variants: dev/cuda/lighthouse_select.cu.
#pragma once
#include "lighthouse_rows.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr int LIGHTHOUSE_SELECT_THREADS = 512;
// Candidates that fit in shared memory; tiles with more (few tiles, fine coarsest level) keep theirs in scratch.
constexpr int LIGHTHOUSE_SHARED_CANDIDATES = 4096;

// Scores of query or of key heads, as lighthouse_pool leaves them.
struct LighthouseHeadScores {
    const float* tokens;    // [B, stored_heads, T] from the first head on
    const float* coarsest;  // [B, stored_heads, T / c]
    int stored_heads;       // in memory for each sequence
    int group;              // neighbouring heads that share a selection

    __device__ int64_t first_head(int64_t b, int kv_head) const { return b * stored_heads + kv_head * group; }
};

// Words of scratch for one tile: LighthouseCandidates of a coarsest level that shared memory does not hold.
inline int64_t lighthouse_tile_scratch_words(const LighthouseGeometry& g) {
    const int64_t n = g.tile_coarsest();
    return n <= LIGHTHOUSE_SHARED_CANDIDATES ? 0 : 2 * n + 2 * ceil_div<int64_t>(n, 32);
}

struct LighthouseSelectArguments {
    int32_t* entries;
    int32_t* positions;
    uint32_t* scratch;
    LighthouseHeadScores q, k;
    int Hkv;
    int chunks;   // of the shape
    bool starts;  // of the shape
    LighthouseLevels levels;
    int64_t S, tile_scratch_words;
    int tiles, tile_coarsest, tile_rows;  // of the geometry

    LighthouseSelectArguments(int32_t* entries, int32_t* positions, uint32_t* scratch, const LighthouseHeadScores& q,
                              const LighthouseHeadScores& k, const LighthouseShape& shape)
        : entries(entries),
          positions(positions),
          scratch(scratch),
          q(q),
          k(k),
          Hkv(shape.Hkv),
          chunks(shape.chunks),
          starts(shape.starts),
          levels(shape.geometry),
          S(shape.geometry.S),
          tile_scratch_words(lighthouse_tile_scratch_words(shape.geometry)),
          tiles((int)shape.geometry.tiles),
          tile_coarsest((int)shape.geometry.tile_coarsest()),
          tile_rows((int)shape.geometry.tile_rows()) {}

    // Candidates of a tile at a level.
    __device__ int num_candidates(int level) const {
        return level == levels.levels - 1 ? tile_coarsest : LIGHTHOUSE_TILE_BUDGET << levels.log2_pool;
    }
};

// The candidates of one level, numbered in ascending order of their index: the keys that rank them, and then which are
// selected: 32 to a word, and how many are in earlier words.
struct LighthouseCandidates {
    uint32_t* q_keys;
    uint32_t* k_keys;
    uint32_t* selected;  // [ceil(n / 32)]
    uint32_t* selected_before;

    __device__ int selected_of_first(int n) const {  // n: 1 or more
        const int last = n - 1;
        return (int)selected_before[last / 32] + __popc(selected[last / 32] & ((2u << last % 32) - 1));
    }
};

struct LighthouseSelectShared {
    uint32_t keys[2][LIGHTHOUSE_SHARED_CANDIDATES];
    uint32_t selected[LIGHTHOUSE_MAX_LEVELS][2][LIGHTHOUSE_SHARED_CANDIDATES / 32];
    // The selected of each level, ascending: their numbers as candidates, and their indices.
    int32_t numbers[LIGHTHOUSE_MAX_LEVELS][LIGHTHOUSE_TILE_BUDGET];
    int32_t indices[LIGHTHOUSE_MAX_LEVELS][LIGHTHOUSE_TILE_BUDGET];
    int32_t warp_counts[2][LIGHTHOUSE_SELECT_THREADS / WARP_SIZE];
};

// ---- parts of the kernel -----------------------------------------------------------------------
// The keys that rank candidates: larger is better, 0 means taken. Norms are not negative, so their bits rank as they
// do.
constexpr uint32_t LIGHTHOUSE_KEY_TAKEN = 0, LIGHTHOUSE_KEY_FORCED = 0xffffffffu;
__device__ inline uint32_t lighthouse_key(float score) { return __float_as_uint(score) + 1; }

// The score of coarsest entry `index`. fmaxf takes NaN for absent: a step whose norms are NaN still makes a whole
// sub-sequence.
__device__ inline float lighthouse_coarsest_score(const LighthouseHeadScores& scores, int64_t first_head,
                                                  int num_coarsest, int index) {
    const float* row = scores.coarsest + first_head * num_coarsest + index;
    float score = 0.0f;
    for (int h = 0; h < scores.group; ++h) {
        score = fmaxf(score, row[(int64_t)h * num_coarsest]);
    }
    return score;
}

// The score of entry `index` of a level with windows of 2^window_bits tokens, in every lane of a group of `lanes`
// neighbours.
__device__ inline float lighthouse_window_score(const LighthouseHeadScores& scores, int64_t first_head, int64_t T,
                                                int index, int window_bits, int lanes, int lane) {
    const int window = 1 << window_bits;
    float score = 0.0f;
    for (int h = 0; h < scores.group; ++h) {
        const float* row = scores.tokens + (first_head + h) * T + (index << window_bits);
        if (window < 4) {
            score = fmaxf(score, fmaxf(row[0], row[1]));
            continue;
        }
        for (int t = lane * 4; t < window; t += lanes * 4) {
            const float4x four = load128(row + t);
            score = fmaxf(score, fmaxf(fmaxf(four[0], four[1]), fmaxf(four[2], four[3])));
        }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
        score = fmaxf(score, __shfl_xor_sync(FULL_WARP, score, offset));
    }
    return score;
}

// Exclusive prefix sum of a flag over the block, and its total. Contains one __syncthreads; a caller that uses
// warp_counts again puts another between.
__device__ inline int block_rank(bool flag, int32_t* warp_counts, int& total) {
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const unsigned ballot = __ballot_sync(FULL_WARP, flag);
    if (lane == 0) {
        warp_counts[warp] = __popc(ballot);
    }
    __syncthreads();
    constexpr int num_warps = LIGHTHOUSE_SELECT_THREADS / WARP_SIZE;
    const int count = lane < num_warps ? warp_counts[lane] : 0;
    total = __reduce_add_sync(FULL_WARP, count);
    const int before = __reduce_add_sync(FULL_WARP, lane < warp ? count : 0);
    return before + __popc(ballot & ((1u << lane) - 1));
}

// A threshold for the num_top largest of n keys: all above it belong to the top, and of those equal to it the first
// num_equal. Found bit by bit, one barrier each for up to LIGHTHOUSE_SELECT_THREADS keys, until exactly num_top keys
// reach it (num_equal: n), which takes all bits only when equal keys straddle the limit. A thread reads only the
// keys j = threadIdx.x modulo LIGHTHOUSE_SELECT_THREADS.
__device__ inline uint32_t lighthouse_threshold(const uint32_t* keys, int n, int num_top, int& num_equal) {
    const int thread = threadIdx.x;
    const uint32_t own = thread < n ? keys[thread] : 0;
    const auto count_from = [&](uint32_t least) {  // least: not 0
        int count = __syncthreads_count(own >= least);
        for (int first = LIGHTHOUSE_SELECT_THREADS; first < n; first += LIGHTHOUSE_SELECT_THREADS) {
            count += __syncthreads_count(first + thread < n && keys[first + thread] >= least);
        }
        return count;
    };
    uint32_t threshold = 0;
    for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
        const int count = count_from(threshold | bit);
        if (count >= num_top) {
            threshold |= bit;
        }
        if (count == num_top) {
            num_equal = n;
            return threshold;
        }
    }
    num_equal = num_top - count_from(threshold + 1);
    return threshold;
}

// ---- kernel ------------------------------------------------------------------------------------
// Launch: one block of LIGHTHOUSE_SELECT_THREADS a (sequence, key/value head, tile), 1-D grid. Latency bound.
__global__ void __launch_bounds__(LIGHTHOUSE_SELECT_THREADS)
    lighthouse_select_kernel(const __grid_constant__ LighthouseSelectArguments a) {
    __shared__ LighthouseSelectShared shared;
    const LighthouseLevels& g = a.levels;
    const int coarsest = g.levels - 1, thread = threadIdx.x;
    const int selection = (int)(blockIdx.x / (unsigned)a.tiles), tile = (int)blockIdx.x - selection * a.tiles;
    const int b = selection / a.Hkv, kv_head = selection - b * a.Hkv;
    const int64_t q_head = a.q.first_head(b, kv_head), k_head = a.k.first_head(b, kv_head);
    int32_t* entries = a.entries + selection * a.S;
    int32_t* positions = a.positions + (int64_t)selection * g.num_slots;

    // Absent until found present, below; the barriers between order the two stores.
    for (int level = 0; level < coarsest; ++level) {
        const int size = a.tile_coarsest << (g.bits[coarsest] - g.bits[level]);
        int32_t* level_positions = positions + g.offset[level] + tile * size;
        for (int i = thread; i < size; i += LIGHTHOUSE_SELECT_THREADS) {
            level_positions[i] = -1;
        }
    }
    const auto candidates_of = [&](int level) {
        const int n = a.num_candidates(level);
        LighthouseCandidates c = {shared.keys[0], shared.keys[1], shared.selected[level][0], shared.selected[level][1]};
        if (n > LIGHTHOUSE_SHARED_CANDIDATES) {
            c.q_keys = a.scratch + blockIdx.x * a.tile_scratch_words;
            c.k_keys = c.q_keys + n;
            c.selected = c.k_keys + n;
            c.selected_before = c.selected + (n + 31) / 32;
        }
        return c;
    };
    const auto index_of = [&](int level, int j) {  // of the tile's j-th candidate
        return level == coarsest
                   ? tile * a.tile_coarsest + j
                   : (shared.indices[level + 1][j >> g.log2_pool] << g.log2_pool) + (j & ((1 << g.log2_pool) - 1));
    };

    for (int level = coarsest; level > 0; --level) {
        const int n = a.num_candidates(level);
        const LighthouseCandidates c = candidates_of(level);
        if (level == coarsest) {
            for (int j = thread; j < n; j += LIGHTHOUSE_SELECT_THREADS) {
                const int index = index_of(level, j);
                c.q_keys[j] = lighthouse_key(lighthouse_coarsest_score(a.q, q_head, g.size[level], index));
                c.k_keys[j] = lighthouse_key(lighthouse_coarsest_score(a.k, k_head, g.size[level], index));
            }
        } else {
            // A group of neighbouring lanes a candidate, so that a warp reads adjacent addresses.
            const int bits = g.bits[level];
            const int lanes = bits >= 7 ? WARP_SIZE : bits >= 2 ? 1 << (bits - 2) : 1;
            const int lane = thread % lanes, groups = LIGHTHOUSE_SELECT_THREADS / lanes;
            for (int first = 0; first < n; first += groups) {
                const int j = first + thread / lanes, index = index_of(level, min(j, n - 1));
                const float q = lighthouse_window_score(a.q, q_head, g.T, index, bits, lanes, lane);
                const float k = lighthouse_window_score(a.k, k_head, g.T, index, bits, lanes, lane);
                if (j < n && lane == 0) {
                    c.q_keys[j] = lighthouse_key(q);
                    c.k_keys[j] = lighthouse_key(k);
                }
            }
        }
        if (tile == 0 && thread == 0 && a.starts &&
            b % a.chunks == 0) {  // its own store: candidate 0 is that of thread 0 above
            c.q_keys[0] = LIGHTHOUSE_KEY_FORCED;
        }
        __syncthreads();

        constexpr int HALF = LIGHTHOUSE_TILE_BUDGET / 2;
        int num_equal, total;
        uint32_t threshold = lighthouse_threshold(c.q_keys, n, HALF, num_equal);
        int equal_before = 0;
        for (int first = 0; first < n; first += LIGHTHOUSE_SELECT_THREADS) {
            const int j = first + thread;
            const uint32_t key = j < n ? c.q_keys[j] : 0;
            int rank = 0;  // among the equal ones
            if (num_equal < n) {
                rank = equal_before + block_rank(j < n && key == threshold, shared.warp_counts[0], total);
                equal_before += total;
                __syncthreads();
            }
            if (j < n && (key > threshold || (key == threshold && rank < num_equal))) {
                c.k_keys[j] = LIGHTHOUSE_KEY_TAKEN;
            }
        }
        threshold = lighthouse_threshold(c.k_keys, n, HALF, num_equal);
        equal_before = 0;
        int selected_before = 0;
        for (int first = 0; first < n; first += LIGHTHOUSE_SELECT_THREADS) {
            const int j = first + thread;
            const uint32_t key = j < n ? c.k_keys[j] : 0;
            int rank = 0;
            if (num_equal < n) {
                rank = equal_before + block_rank(j < n && key == threshold, shared.warp_counts[0], total);
                equal_before += total;
            }
            const bool selected =
                j < n && (key == LIGHTHOUSE_KEY_TAKEN || key > threshold || (key == threshold && rank < num_equal));
            const unsigned word = __ballot_sync(FULL_WARP, selected);
            const int place = selected_before + block_rank(selected, shared.warp_counts[1], total);
            selected_before += total;
            if (j < n && j % WARP_SIZE == 0) {
                c.selected[j / WARP_SIZE] = word;
                c.selected_before[j / WARP_SIZE] = (uint32_t)place;
            }
            if (selected) {
                shared.numbers[level][place] = j;
                shared.indices[level][place] = index_of(level, j);
            }
            __syncthreads();
        }
    }

    // Causal order: after the candidates of its level up to itself and all that descends from those, and after the
    // candidates before its ancestors, whose descendants are among the former's.
    const int tile_first = tile * a.tile_rows;
    for (int level = coarsest; level >= 0; --level) {
        const int n = a.num_candidates(level);
        for (int j = thread; j < n; j += LIGHTHOUSE_SELECT_THREADS) {
            int position = tile_first - 1;  // itself is counted
            for (int l = level, number = j; l < coarsest; ++l) {
                number = shared.numbers[l + 1][number >> g.log2_pool];
                position += number;
            }
            int count = j + 1;
            for (int l = level; count > 0; --l) {
                position += count;
                count = l > 0 ? candidates_of(l).selected_of_first(count) << g.log2_pool : 0;
            }
            const int slot = g.offset[level] + index_of(level, j);
            entries[position] = slot;
            positions[slot] = position;
        }
    }
}

// ---- launchers ---------------------------------------------------------------------------------
inline size_t lighthouse_select_scratch_bytes(const LighthouseShape& shape) {
    const LighthouseGeometry& g = shape.geometry;
    return (size_t)(shape.num_selections() * g.tiles * lighthouse_tile_scratch_words(g)) * sizeof(uint32_t);
}

// entries (=) [B, Hkv, S], positions (=) [B, Hkv, num_slots], -1 where absent, from the scores of query heads, H / Hkv
// for each selection, and of key heads (1 for each, or H / Hkv with the dilated scorer).
inline void lighthouse_select(int32_t* entries, int32_t* positions, const LighthouseHeadScores& q,
                              const LighthouseHeadScores& k, void* scratch, const LighthouseShape& shape,
                              cudaStream_t stream) {
    NVTX_RANGE();
    const int64_t blocks = shape.num_selections() * shape.geometry.tiles;
    CHECK(blocks < (int64_t)1 << 31, "Lighthouse attention: %lld tiles in one launch; at most 2^31 - 1",
          (long long)blocks);
    const LighthouseSelectArguments arguments(entries, positions, (uint32_t*)scratch, q, k, shape);
    lighthouse_select_kernel<<<(unsigned)blocks, LIGHTHOUSE_SELECT_THREADS, 0, stream>>>(arguments);
    CUDA_CHECK_LAUNCH();
}
