// embedding_backward.cu: dweight[v] += the sum of the rows of dout whose token is v. Bound: bandwidth, C elements of
// bf16 a row, and C float elements read and written for each token that occurs.
#include <cub/block/block_scan.cuh>

#include "dev/cuda/harness.cuh"
#include "llmc/embedding.cuh"
#include "llmc/reference/embedding.h"

using Launcher = void (*)(float* dweight, const bf16* dout, const int32_t* tokens, void* scratch, int64_t rows, int C,
                          int64_t V, cudaStream_t stream);

// ---- 1: one block a vocabulary entry reads all tokens ------------------------------------------
__global__ void embedding_backward_kernel1(float* dweight, const bf16* dout, const int32_t* tokens, int64_t rows,
                                           int C) {
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = 0.0f;
        for (int64_t row = 0; row < rows; ++row) {
            if (tokens[row] == (int)blockIdx.x) {
                sum += __bfloat162float(dout[row * C + c]);
            }
        }
        dweight[(int64_t)blockIdx.x * C + c] += sum;
    }
}
static void embedding_backward1(float* dweight, const bf16* dout, const int32_t* tokens, void*, int64_t rows, int C,
                                int64_t V, cudaStream_t stream) {
    embedding_backward_kernel1<<<V, 1024, 0, stream>>>(dweight, dout, tokens, rows, C);
    CUDA_CHECK_LAUNCH();
}

// ---- 2: atomic additions: fast for a large vocabulary, but not bit-repeatable ------------------
__global__ void embedding_backward_kernel2(float* dweight, const bf16* dout, const int32_t* tokens, int64_t num_packs,
                                           int packs_per_row) {
    const int64_t pack = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pack < num_packs) {
        const int64_t row = pack / packs_per_row, column = (pack - row * packs_per_row) * 8;
        const bf16x8 values = load128(dout + pack * 8);
        for (int k = 0; k < 8; ++k) {
            atomicAdd(dweight + (int64_t)tokens[row] * packs_per_row * 8 + column + k, __bfloat162float(values[k]));
        }
    }
}
static void embedding_backward2(float* dweight, const bf16* dout, const int32_t* tokens, void*, int64_t rows, int C,
                                int64_t, cudaStream_t stream) {
    const int64_t num_packs = rows * (C / 8);
    embedding_backward_kernel2<<<ceil_div<int64_t>(num_packs, 256), 256, 0, stream>>>(dweight, dout, tokens, num_packs,
                                                                                      C / 8);
    CUDA_CHECK_LAUNCH();
}

// ---- 3: a counting sort for few tokens ---------------------------------------------------------
// At 98304 rows of byte-level text the sort takes a fourth of the time: the numbering of rows and cub's passes over 0.4
// MB, each of which waits for the one before. Where a block can count every token two launches do. Expected: 0.010 ms
// for 0.026.
constexpr int COUNTING_THREADS = 1024, COUNTING_WARPS = COUNTING_THREADS / WARP_SIZE;
constexpr int COUNTING_MAX_V = 512;

// How many lanes have this lane's token, and how many of them are before it. Lanes beyond the rows have token -1.
struct EqualLanes {
    int count, before;
    __device__ explicit EqualLanes(int token) {
        const unsigned mask = __match_any_sync(FULL_WARP, token);
        count = __popc(mask);
        before = __popc(mask & ((1u << threadIdx.x % WARP_SIZE) - 1));
    }
};

// Launch: one block a tile of tile_rows rows, a multiple of COUNTING_THREADS; V at most COUNTING_MAX_V. Latency bound.
// counts (=) [tiles, V]: how often each token occurs.
static __global__ void __launch_bounds__(COUNTING_THREADS)
    counting_sort_count_kernel(int32_t* counts, const int32_t* tokens, int64_t rows, int64_t tile_rows, int V) {
    __shared__ int found[COUNTING_MAX_V];
    if (threadIdx.x < V) {
        found[threadIdx.x] = 0;
    }
    __syncthreads();
    const int64_t begin = blockIdx.x * tile_rows, end = min(begin + tile_rows, rows);
    for (int64_t first = begin; first < end; first += COUNTING_THREADS) {
        const int token = first + threadIdx.x < end ? tokens[first + threadIdx.x] : -1;
        const EqualLanes equal(token);
        if (token >= 0 && equal.before == 0) {
            atomicAdd(&found[token], equal.count);
        }
    }
    __syncthreads();
    if (threadIdx.x < V) {
        counts[blockIdx.x * V + threadIdx.x] = found[threadIdx.x];
    }
}

// Launch: as the count's. Every block adds up the counts of all tiles, then goes through its own rows, COUNTING_THREADS
// at a time. padded_V: the power of two from V up. sorted_tokens, sorted_row_of (=) as embedding_sort.
static __global__ void __launch_bounds__(COUNTING_THREADS)
    counting_sort_place_kernel(uint32_t* sorted_tokens, int32_t* sorted_row_of, const int32_t* counts,
                               const int32_t* tokens, int64_t rows, int64_t tile_rows, int V, int padded_V) {
    using Scan = cub::BlockScan<int, COUNTING_THREADS>;
    __shared__ Scan::TempStorage scan;
    __shared__ int totals[COUNTING_THREADS], befores[COUNTING_THREADS];
    __shared__ int next[COUNTING_MAX_V];                                       // place of a token's next row
    __shared__ alignas(16) uint16_t in_warps[COUNTING_WARPS][COUNTING_MAX_V];  // of each warp, then of those before it
    const int thread = threadIdx.x, warp = thread / WARP_SIZE;

    // Neighbouring threads a token each, several such groups, each a part of the tiles.
    const int v = thread % padded_V, groups = COUNTING_THREADS / padded_V;
    int total = 0, before = 0;  // in all tiles, in those before this one
#pragma unroll 8
    for (int tile = thread / padded_V; tile < gridDim.x; tile += groups) {
        const int count = v < V ? counts[tile * V + v] : 0;
        total += count;
        before += tile < blockIdx.x ? count : 0;
    }
    totals[thread] = total, befores[thread] = before;
    __syncthreads();
    total = before = 0;
    for (int i = thread; thread < padded_V && i < COUNTING_THREADS; i += padded_V) {
        total += totals[i], before += befores[i];
    }
    int smaller;  // rows of smaller tokens
    Scan(scan).ExclusiveSum(total, smaller);
    if (thread < V) {
        next[thread] = smaller + before;
    }

    const int64_t begin = blockIdx.x * tile_rows, end = min(begin + tile_rows, rows);
    for (int64_t first = begin; first < end; first += COUNTING_THREADS) {
        for (int i = thread; i < (int)(sizeof in_warps / sizeof(int4)); i += COUNTING_THREADS) {
            reinterpret_cast<int4*>(in_warps)[i] = make_int4(0, 0, 0, 0);
        }
        const int64_t row = first + thread;
        const int token = row < end ? tokens[row] : -1;
        const EqualLanes equal(token);
        __syncthreads();
        if (token >= 0 && equal.before == 0) {
            in_warps[warp][token] = (uint16_t)equal.count;
        }
        __syncthreads();
        int sum = 0;
        if (thread < V) {
#pragma unroll
            for (int w = 0; w < COUNTING_WARPS; ++w) {
                const int count = in_warps[w][thread];
                in_warps[w][thread] = (uint16_t)sum;
                sum += count;
            }
        }
        __syncthreads();
        if (token >= 0) {
            const int place = next[token] + in_warps[warp][token] + equal.before;
            sorted_tokens[place] = (uint32_t)token;
            sorted_row_of[place] = (int32_t)row;
        }
        __syncthreads();
        if (thread < V) {
            next[thread] += sum;
        }
    }
}

// Whether the counts fit where cub's sort has the numbers of rows: at most half as many as rows, or V of one tile.
static bool counting_sort_applies(int64_t rows, int64_t V) { return V <= std::min<int64_t>(rows, COUNTING_MAX_V); }
static void counting_sort(const EmbeddingBackwardPlan& plan, void* scratch, const int32_t* tokens, int64_t rows,
                          int64_t V, cudaStream_t stream) {
    char* const base = (char*)scratch;
    int32_t* const counts = (int32_t*)(base + plan.row_of);
    const int64_t tile_rows =
        round_up<int64_t>(ceil_div<int64_t>(rows, gpu_properties().num_sms), (int64_t)COUNTING_THREADS);
    const int tiles = (int)ceil_div(rows, tile_rows);
    int padded_V = 1;
    while (padded_V < V) {
        padded_V *= 2;
    }
    counting_sort_count_kernel<<<tiles, COUNTING_THREADS, 0, stream>>>(counts, tokens, rows, tile_rows, (int)V);
    CUDA_CHECK_LAUNCH();
    counting_sort_place_kernel<<<tiles, COUNTING_THREADS, 0, stream>>>((uint32_t*)(base + plan.sorted_tokens),
                                                                       (int32_t*)(base + plan.sorted_row_of), counts,
                                                                       tokens, rows, tile_rows, (int)V, padded_V);
    CUDA_CHECK_LAUNCH();
}
static void embedding_backward3(float* dweight, const bf16* dout, const int32_t* tokens, void* scratch, int64_t rows,
                                int C, int64_t V, cudaStream_t stream) {
    const EmbeddingBackwardPlan plan(rows, C, V);
    if (counting_sort_applies(rows, V)) {
        counting_sort(plan, scratch, tokens, rows, V, stream);
    } else {
        embedding_sort(plan, scratch, tokens, rows, stream);
    }
    embedding_add_sorted(plan, dweight, dout, scratch, rows, C, stream);
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one block a vocabulary entry reads all tokens", embedding_backward1},
    {2, "atomic additions: not repeatable", embedding_backward2},
    {3, "what ships, after a counting sort where V is at most 512", embedding_backward3},
    {4, "stable sort, runs in one wave of chunks, partial sums joined in order (llmc/embedding.cuh)",
     embedding_backward},
};

// Tokens as text has them: half of them one token, the rest uniform; or all one token; or all uniform.
enum class TokenMix { uniform, half_one, all_one };
static std::vector<int32_t> make_tokens(int64_t rows, int64_t V, TokenMix mix, uint64_t seed) {
    std::vector<int32_t> tokens = random_indices(rows, seed, V);
    for (int64_t i = 0; i < rows; ++i) {
        if (mix == TokenMix::all_one || (mix == TokenMix::half_one && random_bits(seed + 1, i) % 2 == 0)) {
            tokens[i] = (int32_t)(V / 2);
        }
    }
    return tokens;
}
static const char* mix_name(TokenMix mix) {
    return mix == TokenMix::uniform ? "uniform" : mix == TokenMix::half_one ? "half one token" : "all one token";
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    struct Case {
        int64_t rows;
        int C;
        int64_t V;
        TokenMix mix;
    };
    for (const Case& c :
         {Case{1, 8, 2, TokenMix::uniform}, Case{64, 8, 2, TokenMix::all_one}, Case{65, 1000, 3, TokenMix::uniform},
          Case{1000, 72, 259, TokenMix::half_one}, Case{12345, 64, 256, TokenMix::all_one},
          Case{3000, 1032, 128256, TokenMix::half_one}, Case{200000, 16, 100, TokenMix::half_one},
          Case{50000, 40, 3000, TokenMix::uniform}, Case{16896, 1032, 500, TokenMix::half_one}}) {
        if (h.leaves_out(c.rows * c.C / 4)) {
            continue;
        }
        const std::string label =
            format_string("rows%lld C%d V%lld %s", (long long)c.rows, c.C, (long long)c.V, mix_name(c.mix));
        const std::vector<int32_t> tokens = make_tokens(c.rows, c.V, c.mix, h.seed);
        const std::vector<bf16> dout = random_vector<bf16>(c.rows * c.C, h.seed + 2);
        const std::vector<float> initial = random_vector<float>(c.V * c.C, h.seed + 3);
        std::vector<double> expected = to_double(initial);
        std::vector<float> plain = initial;
        reference::embedding_backward<double>(expected.data(), to_double(dout).data(), tokens.data(), c.rows, c.C);
        reference::embedding_backward<float>(plain.data(), convert<float>(dout).data(), tokens.data(), c.rows, c.C);
        DeviceBuffer<float> dweight(initial);
        DeviceBuffer<bf16> dout_device(dout);
        DeviceBuffer<int32_t> tokens_device(tokens);
        DeviceBuffer<unsigned char> scratch(embedding_backward_scratch_bytes(c.rows, c.C, c.V));
        auto launch = [&] {
            dweight.upload(initial);
            scratch.poison();
            CUDA_CHECK(cudaDeviceSynchronize());
            variant.launch(dweight, dout_device, tokens_device, scratch, c.rows, c.C, c.V, h.stream);
        };
        launch();
        // Atomic additions come in any order: their error may be that of any order.
        const double limit = twice_plain_error<float>(plain, expected) * (variant.number == 2 ? 4.0 : 1.0);
        h.compare("dweight", label, dweight, expected, limit, {c.V, c.C});
        h.expect(scratch.guards_intact(), "scratch", label, "within its bytes");
        if (variant.number != 2) {
            h.compare_repeats("dweight", label, dweight, launch);
        }
    }
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    struct Shape {
        int64_t rows;
        int C;
        int64_t V;
        TokenMix mix;
    };
    for (const auto [rows, C, V, mix] :
         {Shape{98304, 1024, 256, TokenMix::uniform}, Shape{98304, 1024, 256, TokenMix::half_one},
          Shape{98304, 1024, 128256, TokenMix::half_one}, Shape{1048576, 1024, 256, TokenMix::half_one},
          Shape{65536, 768, 50304, TokenMix::uniform}}) {
        if (variant.number == 1 && V > 1000) {
            continue;  // V times rows: seconds
        }
        const std::vector<int32_t> tokens = make_tokens(rows, V, mix, h.seed);
        std::vector<bool> occurs(V);
        for (int32_t token : tokens) {
            occurs[token] = true;
        }
        const double num_bytes =
            ((double)rows * sizeof(bf16) + std::count(occurs.begin(), occurs.end(), true) * 2.0 * sizeof(float)) * C;
        DeviceBuffer<float> dweight(V * C);
        DeviceBuffer<bf16> dout(rows * C);
        dweight.fill_random(h.seed);
        dout.fill_random(h.seed + 1);
        DeviceBuffer<int32_t> tokens_device(tokens);
        DeviceBuffer<unsigned char> scratch(embedding_backward_scratch_bytes(rows, C, V));
        h.measure_bandwidth(format_string("rows%lld C%d V%lld %s", (long long)rows, C, (long long)V, mix_name(mix)),
                            num_bytes, variant.idea, [&, rows = rows, C = C, V = V] {
                                variant.launch(dweight, dout, tokens_device, scratch, rows, C, V, h.stream);
                            });
        const EmbeddingBackwardPlan plan(rows, C, V);
        const auto measure_sort = [&, rows = rows, V = V](const char* idea, const std::function<void()>& sort) {
            h.measure_bandwidth(format_string("rows%lld V%lld", (long long)rows, (long long)V),
                                rows * 4.0 * sizeof(int32_t), idea, sort);
        };
        if (variant.launch == embedding_backward) {
            measure_sort("the sort alone",
                         [&, rows = rows] { embedding_sort(plan, scratch, tokens_device, rows, h.stream); });
        } else if (variant.launch == embedding_backward3 && counting_sort_applies(rows, V)) {
            measure_sort("the counting sort alone",
                         [&, rows = rows, V = V] { counting_sort(plan, scratch, tokens_device, rows, V, h.stream); });
        }
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "embedding_backward", VARIANTS, check, measure); }
