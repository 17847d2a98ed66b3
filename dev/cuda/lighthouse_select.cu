// lighthouse_select.cu: which entries form the sub-sequence, and their causal order; what ships is
// llmc/lighthouse_select.cuh. Bound: latency; the bytes are few.
#include "dev/cuda/lighthouse_cases.cuh"
#include "llmc/lighthouse_select.cuh"

using Launcher = void (*)(int32_t*, int32_t*, const LighthouseHeadScores&, const LighthouseHeadScores&, void*,
                          const LighthouseShape&, cudaStream_t);

// ---- 1: by counting: an entry's rank is how many are better, its place how many end before it ----------------------
struct Kept1 {
    int32_t level, index;
    float q, k;
};
__device__ float score1(const float* scores, int heads, const LighthouseGeometry& g, int level, int64_t index) {
    float best = 0.0f;
    for (int h = 0; h < heads; ++h) {
        for (int64_t t = index * g.window(level); t < (index + 1) * g.window(level); ++t) {
            best = fmaxf(best, scores[h * g.T + t]);
        }
    }
    return best;
}
// Launch: one block a tile. kept [blocks, tile_rows] is workspace.
__global__ void select_kernel1(LighthouseSelectArguments a, LighthouseGeometry g, Kept1* kept) {
    const int64_t selection = blockIdx.x / g.tiles, tile = blockIdx.x % g.tiles;
    const float* q_scores = a.q.tokens + a.q.first_head(selection / a.Hkv, selection % a.Hkv) * g.T;
    const float* k_scores = a.k.tokens + a.k.first_head(selection / a.Hkv, selection % a.Hkv) * g.T;
    int32_t* entries = a.entries + selection * g.S;
    int32_t* positions = a.positions + selection * g.num_slots;
    __shared__ int32_t parents[LIGHTHOUSE_TILE_BUDGET];
    kept += blockIdx.x * g.tile_rows();
    for (int level = 0; level < g.levels; ++level) {
        const int64_t size = g.tile_tokens() >> g.window_bits(level);
        for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
            positions[g.slot(level, tile * size + i)] = -1;
        }
    }
    Kept1* candidates = kept;
    for (int level = g.levels - 1; level >= 0; --level) {
        const int64_t n = g.tile_candidates(level);
        const int half = LIGHTHOUSE_TILE_BUDGET / 2;
        for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
            const int64_t index =
                level == g.levels - 1 ? tile * n + j : (int64_t)parents[j / g.pool] * g.pool + j % g.pool;
            const float q = index == 0 ? INFINITY : score1(q_scores, a.q.group, g, level, index);
            candidates[j] = {level, (int32_t)index, q, score1(k_scores, a.k.group, g, level, index)};
        }
        __syncthreads();
        if (level == 0) {
            break;
        }
        for (const bool by_query : {true, false}) {  // a chosen candidate's key score becomes -1, then -2
            for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
                const Kept1 own = candidates[j];
                int better = 0;
                for (int64_t i = 0; i < n; ++i) {
                    const float other = by_query ? candidates[i].q : candidates[i].k;
                    const float score = by_query ? own.q : own.k;
                    better += other > score || (other == score && i < j);
                }
                if (better < half && (by_query || own.k >= 0.0f)) {
                    positions[g.slot(level, own.index)] = -2;  // selected, for now
                }
            }
            __syncthreads();
            for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
                if (positions[g.slot(level, candidates[j].index)] == -2) {
                    candidates[j].k = -1.0f;
                }
            }
            __syncthreads();
        }
        for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
            if (candidates[j].k < 0.0f) {
                int place = 0;
                for (int64_t i = 0; i < j; ++i) {
                    place += candidates[i].k < 0.0f;
                }
                parents[place] = candidates[j].index;
            }
        }
        __syncthreads();
        candidates += n;
    }
    for (int64_t n = threadIdx.x; n < g.tile_rows(); n += blockDim.x) {
        const int level = kept[n].level;
        const int64_t end = ((int64_t)kept[n].index + 1) << g.window_bits(level);
        int64_t place = tile * g.tile_rows();
        for (int64_t i = 0; i < g.tile_rows(); ++i) {
            const int64_t other = ((int64_t)kept[i].index + 1) << g.window_bits(kept[i].level);
            place += other < end || (other == end && kept[i].level < level);
        }
        const int64_t slot = g.slot(level, kept[n].index);
        entries[place] = (int32_t)slot;
        positions[slot] = (int32_t)place;
    }
}
static void select1(int32_t* entries, int32_t* positions, const LighthouseHeadScores& q, const LighthouseHeadScores& k,
                    void*, const LighthouseShape& shape, cudaStream_t stream) {
    static Kept1* kept = nullptr;
    static int64_t num_kept = 0;
    const LighthouseGeometry& g = shape.geometry;
    if (num_kept < shape.num_selections() * g.S) {
        num_kept = shape.num_selections() * g.S;
        CUDA_CHECK(cudaFree(kept));
        CUDA_CHECK(cudaMalloc(&kept, num_kept * sizeof(Kept1)));
    }
    const LighthouseSelectArguments arguments(entries, positions, nullptr, q, k, shape);
    select_kernel1<<<(unsigned)(shape.num_selections() * g.tiles), 512, 0, stream>>>(arguments, g, kept);
    CUDA_CHECK_LAUNCH();
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "by counting, all pairs of candidates", select1},
    {2, "thresholds bit by bit, order from counts of the selected (llmc/lighthouse_select.cuh)", lighthouse_select},
};

static void check(Harness& h, const Variant<Launcher>& variant) {
    std::vector<LighthouseCase> cases = lighthouse_cases(h);
    if (!h.small) {
        cases.push_back({1, 1 << 21, 6, 4, 1024, 1, 1, 8});  // a long sequence, with five levels above the tokens
    }
    for (const LighthouseCase& c : cases) {
        const LighthouseShape shape = c.shape();
        const int64_t candidates = shape.geometry.tile_candidates(shape.geometry.levels - 1);
        if (variant.number == 1 && h.leaves_out(candidates * candidates)) {
            continue;
        }
        // Scores all equal, few values, many, and some of few NaN or infinite (num_values 0); the key scores of the
        // dilated scorer, one row a query head.
        for (const int num_values : {1, 5, 1 << 22, 0}) {
            if (h.small && num_values == 5) {
                continue;  // 0 has these too
            }
            for (const int k_heads : {c.Hkv, c.H}) {
                const bool broken = num_values == 0;
                const auto q = tied_scores(c.B * c.H * c.T, broken ? 5 : num_values, h.seed, broken);
                const auto k = tied_scores(c.B * k_heads * c.T, broken ? 5 : num_values, h.seed + 1, broken);
                const HostSelection expected(shape, q, k, k_heads);
                DeviceBuffer<float> q_device(q), k_device(k), q_coarsest(window_maxima(q, shape.geometry)),
                    k_coarsest(window_maxima(k, shape.geometry));
                DeviceBuffer<int32_t> entries(expected.entries.size()), positions(expected.positions.size());
                DeviceBuffer<unsigned char> scratch((int64_t)lighthouse_select_scratch_bytes(shape));
                const auto launch = [&] {
                    variant.launch(entries, positions, {q_device, q_coarsest, c.H, c.H / c.Hkv},
                                   {k_device, k_coarsest, k_heads, k_heads / c.Hkv}, scratch.data(), shape, h.stream);
                };
                launch();
                const std::string label = c.label() + format_string(" values %d key heads %d", num_values, k_heads);
                h.compare_exact("entries", label, entries, expected.entries);
                h.compare_exact("positions", label, positions, expected.positions);
                h.compare_repeats("entries", label, entries, launch, 2);
            }
        }
    }
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    for (const LighthouseCase& c : LIGHTHOUSE_TIMED) {
        const LighthouseShape shape = c.shape();
        const LighthouseGeometry& g = shape.geometry;
        // Scores as close to each other as norms are.
        auto q_scores = tied_scores(c.B * c.H * c.T, 1 << 22, h.seed);
        auto k_scores = tied_scores(c.B * c.Hkv * c.T, 1 << 22, h.seed + 1);
        for (auto* scores : {&q_scores, &k_scores}) {
            for (float& score : *scores) {
                score = 8.0f + 0x1p-19f * score;
            }
        }
        DeviceBuffer<float> q(q_scores), k(k_scores), q_coarsest(window_maxima(q_scores, g)),
            k_coarsest(window_maxima(k_scores, g));
        DeviceBuffer<int32_t> entries(shape.num_selections() * g.S), positions(shape.num_selections() * g.num_slots);
        DeviceBuffer<unsigned char> scratch((int64_t)lighthouse_select_scratch_bytes(shape));
        // Token scores are read under selected entries of all levels but the coarsest, those of all levels at level 1.
        const int64_t token_scores = g.levels > 2 ? g.topk * g.window(g.levels - 1) * c.B * (c.H + c.Hkv) : 0;
        h.measure_bandwidth(c.label(),
                            (double)(4 * token_scores + q_coarsest.num_bytes() + k_coarsest.num_bytes() +
                                     entries.num_bytes() + positions.num_bytes()),
                            variant.idea, [&] {
                                variant.launch(entries, positions, {q, q_coarsest, c.H, c.H / c.Hkv},
                                               {k, k_coarsest, c.Hkv, 1}, scratch.data(), shape, h.stream);
                            });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "lighthouse_select", VARIANTS, check, measure); }
