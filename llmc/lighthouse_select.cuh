// lighthouse_select.cuh: which entries of the pyramid form the sub-sequence, and where each stands in it.
// In every tile and at every level above 0, of the candidates the 64 of highest query score and, of the rest, the 64 of
// highest key score are selected; equal scores go to the lower index; the sequence's first entry always is. The
// children of the selected are the next level's candidates, and every candidate of every level is kept. Shapes: scores
// [B, heads, T] float32 of tokens; an entry's score is the maximum over its window and the heads of its group. entries
// [B, Hkv, S]: pyramid address of each row in causal order; positions [B, Hkv, num_slots]: the inverse. Cost: one
// thread block a tile; latency bound, about 10 us; reads the scores once, writes S + num_slots integers a head.
// Reference: lighthouse_select of reference/lighthouse.h. Variants: dev/cuda/lighthouse_select.cu.
#pragma once
#include "lighthouse_rows.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr int LIGHTHOUSE_SELECT_THREADS = 512;
// Candidates whose keys fit in shared memory; tiles with more (few tiles, fine coarsest level) keep them in scratch.
constexpr int LIGHTHOUSE_SHARED_CANDIDATES = 4096;
constexpr int RADIX_BITS = 8;
constexpr int RADIX_BINS = 1 << RADIX_BITS;

struct LighthouseSelectArguments {
    int32_t* entries;
    int32_t* positions;
    uint32_t* scratch;  // [B * Hkv * tiles, 2, tile_coarsest], only when tile_coarsest > LIGHTHOUSE_SHARED_CANDIDATES
    const float* q_scores;           // [q_group, T] of selection 0
    const float* k_scores;           // [k_group, T]
    int64_t q_stride_b, k_stride_b;  // elements between sequences
    int q_group, k_group;            // heads that share a selection; its scores lie together
    int Hkv;
    LighthouseGeometry geometry;
};

struct LighthouseSelectShared {
    uint32_t keys[2][LIGHTHOUSE_SHARED_CANDIDATES];                  // by query, by key
    int32_t parents[LIGHTHOUSE_MAX_LEVELS][LIGHTHOUSE_TILE_BUDGET];  // selected at each level, ascending
    int32_t histogram[RADIX_BINS];
    int32_t warp_counts[2][LIGHTHOUSE_SELECT_THREADS / WARP_SIZE];
    uint32_t digit;
    int32_t remaining;
};

// ---- parts of the kernel -----------------------------------------------------------------------
// The keys that rank candidates: larger is better, 0 means taken. Norms are not negative, so their bits rank as they
// do.
constexpr uint32_t LIGHTHOUSE_KEY_TAKEN = 0, LIGHTHOUSE_KEY_FORCED = 0xffffffffu;
__device__ inline uint32_t lighthouse_key(float score) { return __float_as_uint(score) + 1; }

// The maximum of scores [heads, T] over the window of entry `index`, in every lane of a group of `lanes` neighbours.
// NaN counts as 0, as fmaxf has it: a step whose norms are NaN still makes a whole sub-sequence.
__device__ inline float lighthouse_window_score(const float* scores, int heads, int64_t T, int64_t index,
                                                int window_bits, int lanes, int lane) {
    const int window = 1 << window_bits;
    float score = 0.0f;
    for (int h = 0; h < heads; ++h) {
        const float* row = scores + h * T + (index << window_bits);
        if (window < 4) {
            score = fmaxf(score, fmaxf(row[0], row[window - 1]));
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

// Exclusive prefix sum of a flag over the block, and its total. Contains one __syncthreads; a caller
// that uses warp_counts again puts another between.
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

// The value of the num_top-th largest of n keys, and in num_equal how many of those equal to it belong to the top.
// Radix select, most significant digit first.
__device__ inline uint32_t lighthouse_threshold(LighthouseSelectShared& shared, const uint32_t* keys, int64_t n,
                                                int num_top, int& num_equal) {
    uint32_t prefix = 0, mask = 0;
    int remaining = num_top;
    for (int shift = 32 - RADIX_BITS; shift >= 0; shift -= RADIX_BITS) {
        if (threadIdx.x < RADIX_BINS) {
            shared.histogram[threadIdx.x] = 0;
        }
        __syncthreads();
        for (int64_t j = threadIdx.x; j < n; j += LIGHTHOUSE_SELECT_THREADS) {
            if ((keys[j] & mask) == prefix) {
                atomicAdd(&shared.histogram[keys[j] >> shift & (RADIX_BINS - 1)], 1);  // a count: order does not matter
            }
        }
        __syncthreads();
        if (threadIdx.x < WARP_SIZE) {  // lane 0 holds the highest bins
            constexpr int bins = RADIX_BINS / WARP_SIZE;
            const int top_bin = RADIX_BINS - 1 - (int)threadIdx.x * bins;
            int sum = 0;
            for (int i = 0; i < bins; ++i) {
                sum += shared.histogram[top_bin - i];
            }
            int before = sum;  // becomes the count in higher lanes' bins
            for (int offset = 1; offset < WARP_SIZE; offset *= 2) {
                const int other = __shfl_up_sync(FULL_WARP, before, offset);
                before += (int)threadIdx.x >= offset ? other : 0;
            }
            before -= sum;
            for (int i = 0; i < bins; ++i) {
                const int count = shared.histogram[top_bin - i];
                if (before < remaining && remaining <= before + count) {  // true in exactly one lane and bin
                    shared.digit = (uint32_t)(top_bin - i);
                    shared.remaining = remaining - before;
                }
                before += count;
            }
        }
        __syncthreads();
        prefix |= shared.digit << shift;
        mask |= (uint32_t)(RADIX_BINS - 1) << shift;
        remaining = shared.remaining;
    }
    num_equal = remaining;
    return prefix;
}

// How many of the tile's kept entries of `level` have an index below `bound`.
__device__ inline int64_t lighthouse_count_below(const LighthouseSelectShared& shared, const LighthouseGeometry& g,
                                                 int64_t tile, int level, int64_t bound) {
    if (level == g.levels - 1) {
        return bound - tile * g.tile_coarsest();
    }
    const int32_t* parents = shared.parents[level + 1];
    const int64_t parent = bound >> g.log2_pool;
    int below = 0;  // of the parents; binary search
#pragma unroll
    for (int step = LIGHTHOUSE_TILE_BUDGET / 2; step > 0; step /= 2) {
        below += parents[below + step - 1] < parent ? step : 0;
    }
    below += parents[below] < parent;
    const bool partial = below < LIGHTHOUSE_TILE_BUDGET && parents[below] == parent;
    return ((int64_t)below << g.log2_pool) + (partial ? bound & (g.pool - 1) : 0);
}

// ---- kernel ------------------------------------------------------------------------------------
// Launch: one block of LIGHTHOUSE_SELECT_THREADS a (sequence, key/value head, tile), 1-D grid. Latency bound: a dozen
// block-wide steps a level.
__global__ void __launch_bounds__(LIGHTHOUSE_SELECT_THREADS)
    lighthouse_select_kernel(const __grid_constant__ LighthouseSelectArguments a) {
    __shared__ LighthouseSelectShared shared;
    const LighthouseGeometry& g = a.geometry;
    const int64_t selection = blockIdx.x / g.tiles, tile = blockIdx.x % g.tiles;
    const int64_t b = selection / a.Hkv, kv_head = selection % a.Hkv;
    const float* q_scores = a.q_scores + b * a.q_stride_b + kv_head * a.q_group * g.T;
    const float* k_scores = a.k_scores + b * a.k_stride_b + kv_head * a.k_group * g.T;
    int32_t* entries = a.entries + selection * g.S;
    int32_t* positions = a.positions + selection * g.num_slots;

    // Absent until found present, below; the barriers between order the two stores.
    for (int level = 0; level < g.levels - 1; ++level) {
        const int64_t size = g.tile_tokens() >> g.window_bits(level), first = g.slot(level, tile * size);
        for (int64_t i = threadIdx.x; i < size; i += LIGHTHOUSE_SELECT_THREADS) {
            positions[first + i] = -1;
        }
    }
    const auto candidate = [&](int level, int64_t j) -> int64_t {  // the tile's j-th candidate of a level
        return level == g.levels - 1
                   ? tile * g.tile_coarsest() + j
                   : ((int64_t)shared.parents[level + 1][j >> g.log2_pool] << g.log2_pool) + (j & (g.pool - 1));
    };

    for (int level = g.levels - 1; level > 0; --level) {
        const int64_t n = g.tile_candidates(level);
        uint32_t *q_keys = shared.keys[0], *k_keys = shared.keys[1];
        if (n > LIGHTHOUSE_SHARED_CANDIDATES) {
            q_keys = a.scratch + (int64_t)blockIdx.x * 2 * n;
            k_keys = q_keys + n;
        }
        // A group of neighbouring lanes a candidate, so that a warp reads adjacent addresses.
        const int window_bits = g.window_bits(level);
        const int lanes = window_bits >= 7 ? WARP_SIZE : window_bits >= 2 ? 1 << (window_bits - 2) : 1;
        const int lane = threadIdx.x % lanes, groups = LIGHTHOUSE_SELECT_THREADS / lanes;
        for (int64_t first = 0; first < n; first += groups) {
            const int64_t j = first + threadIdx.x / lanes, index = candidate(level, min(j, n - 1));
            const float q = lighthouse_window_score(q_scores, a.q_group, g.T, index, window_bits, lanes, lane);
            const float k = lighthouse_window_score(k_scores, a.k_group, g.T, index, window_bits, lanes, lane);
            if (j < n && lane == 0) {
                q_keys[j] = index == 0 ? LIGHTHOUSE_KEY_FORCED : lighthouse_key(q);
                k_keys[j] = lighthouse_key(k);
            }
        }
        __syncthreads();

        int num_equal, total;
        uint32_t threshold = lighthouse_threshold(shared, q_keys, n, LIGHTHOUSE_TILE_BUDGET / 2, num_equal);
        int equal_before = 0;
        for (int64_t first = 0; first < n; first += LIGHTHOUSE_SELECT_THREADS) {
            const int64_t j = first + threadIdx.x;
            const uint32_t key = j < n ? q_keys[j] : 0;
            const int rank = equal_before + block_rank(j < n && key == threshold, shared.warp_counts[0], total);
            if (j < n && (key > threshold || (key == threshold && rank < num_equal))) {
                k_keys[j] = LIGHTHOUSE_KEY_TAKEN;
            }
            equal_before += total;
            __syncthreads();
        }
        threshold = lighthouse_threshold(shared, k_keys, n, LIGHTHOUSE_TILE_BUDGET / 2, num_equal);
        equal_before = 0;
        int selected_before = 0;
        for (int64_t first = 0; first < n; first += LIGHTHOUSE_SELECT_THREADS) {
            const int64_t j = first + threadIdx.x;
            const uint32_t key = j < n ? k_keys[j] : 0;
            const int rank = equal_before + block_rank(j < n && key == threshold, shared.warp_counts[0], total);
            equal_before += total;
            const bool selected =
                j < n && (key == LIGHTHOUSE_KEY_TAKEN || key > threshold || (key == threshold && rank < num_equal));
            const int place = selected_before + block_rank(selected, shared.warp_counts[1], total);
            selected_before += total;
            if (selected) {
                shared.parents[level][place] = (int32_t)candidate(level, j);
            }
            __syncthreads();
        }
    }

    // Causal order: an entry stands after all kept entries that end before it or, finer ones, with it.
    const int64_t tile_first = tile * g.tile_rows();
    for (int level = 0; level < g.levels; ++level) {
        const int64_t n = g.tile_candidates(level), level_offset = g.level_offset(level);
        for (int64_t j = threadIdx.x; j < n; j += LIGHTHOUSE_SELECT_THREADS) {
            const int64_t index = candidate(level, j), end = (index + 1) << g.window_bits(level);
            int64_t position = tile_first - 1;  // itself is counted
            for (int l = 0; l < g.levels; ++l) {
                const int64_t last = l <= level ? end : end - 1;
                position += lighthouse_count_below(shared, g, tile, l, last >> g.window_bits(l));
            }
            entries[position] = (int32_t)(level_offset + index);
            positions[level_offset + index] = (int32_t)position;
        }
    }
}

// ---- launchers ---------------------------------------------------------------------------------
inline size_t lighthouse_select_scratch_bytes(const LighthouseShape& shape) {
    const LighthouseGeometry& g = shape.geometry;
    return g.tile_coarsest() <= LIGHTHOUSE_SHARED_CANDIDATES
               ? 0
               : (size_t)(shape.num_selections() * g.tiles * 2 * g.tile_coarsest()) * sizeof(uint32_t);
}

// entries (=) [B, Hkv, S], positions (=) [B, Hkv, num_slots], -1 where absent. q_scores [B, H, T] and k_scores
// [B, Hkv * k_group, T] float32, not negative, start q_stride_b and k_stride_b elements apart from one sequence to the
// next. k_group: heads of k_scores that share a selection (1, or H / Hkv with the dilated scorer).
inline void lighthouse_select(int32_t* entries, int32_t* positions, const float* q_scores, int64_t q_stride_b,
                              const float* k_scores, int64_t k_stride_b, int k_group, void* scratch,
                              const LighthouseShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    const int64_t blocks = shape.num_selections() * shape.geometry.tiles;
    CHECK(blocks < (int64_t)1 << 31, "Lighthouse attention: %lld tiles in one launch; at most 2^31 - 1",
          (long long)blocks);
    const LighthouseSelectArguments arguments = {entries,  positions,  (uint32_t*)scratch, q_scores,
                                                 k_scores, q_stride_b, k_stride_b,         shape.H / shape.Hkv,
                                                 k_group,  shape.Hkv,  shape.geometry};
    lighthouse_select_kernel<<<(unsigned)blocks, LIGHTHOUSE_SELECT_THREADS, 0, stream>>>(arguments);
    CUDA_CHECK_LAUNCH();
}
