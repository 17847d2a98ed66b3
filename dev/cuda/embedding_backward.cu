// embedding_backward.cu: dweight[v] += the sum of the rows of dout whose token is v. Bound: bandwidth, C elements of
// bf16 a row, and C float elements read and written for each token that occurs.
#include <numeric>

#include "dev/cuda/harness.cuh"
#include "llmc/embedding_backward.cuh"
#include "llmc/reference/embedding.h"

struct Launcher {
    void (*backward)(float* dweight, const bf16* dout, const int32_t* tokens, void* scratch, int64_t rows, int C,
                     int64_t V, cudaStream_t stream);
    size_t (*scratch_bytes)(int64_t rows, int C, int64_t V);
    bool (*takes)(int64_t rows, int C, int64_t V) = [](int64_t, int, int64_t) { return true; };
};
static size_t no_scratch_bytes(int64_t, int, int64_t) { return 0; }

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

// ---- 3 to 7: the two paths of llmc/embedding_backward.cuh --------------------------------------
static size_t sort_scratch_bytes(int64_t rows, int C, int64_t V) { return EmbeddingSortPlan(rows, C, V).total_bytes; }
template <class Tile>
static size_t ranges_scratch_bytes(int64_t rows, int C, int64_t V) {
    return EmbeddingRangePlan<Tile>(rows, C, V).total_bytes;
}
template <class Tile>
static Launcher ranges_launcher() {
    return {embedding_backward_by_ranges<Tile>, ranges_scratch_bytes<Tile>, EmbeddingRangePlan<Tile>::takes};
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one block a vocabulary entry reads all tokens", {embedding_backward1, no_scratch_bytes}},
    {2, "atomic additions: not repeatable", {embedding_backward2, no_scratch_bytes}},
    {3,
     "stable sort, runs in one wave of chunks, partial sums joined in order",
     {embedding_backward_by_sort, sort_scratch_bytes}},
    {4, "ranges sorted by their blocks, two blocks an SM, 2 columns a lane",
     ranges_launcher<EmbeddingRangeTile<2, 16>>()},
    {5, "the same, 4 columns a lane", ranges_launcher<EmbeddingRangeTile<4, 16>>()},
    {6, "the same, 8 columns a lane", ranges_launcher<EmbeddingRangeTile<8, 16>>()},
    {7,
     "sorted by cub or, for few tokens, by blocks of 32 warps, 4 columns a lane (llmc/embedding_backward.cuh)",
     {embedding_backward, embedding_backward_scratch_bytes}},
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

// Offsets beyond 2^31, of dout and of dweight: tokens that occur once, in the last rows or with the highest numbers,
// have dout itself as their sum.
static void check_last_rows(Harness& h, const Variant<Launcher>& variant) {
    const int64_t tail = LAST_ROWS;
    const int C = MANY_ROWS_WIDTH;
    for (const auto& [rows, V] : {std::pair(MANY_ROWS, (int64_t)1000), std::pair(tail, MANY_ROWS)}) {
        std::vector<int32_t> tokens(rows, 3);
        std::iota(tokens.end() - tail, tokens.end(), (int32_t)(V - tail));
        DeviceBuffer<int32_t> tokens_device(tokens);
        DeviceBuffer<bf16> dout(rows * C);
        DeviceBuffer<float> dweight(V * C);
        DeviceBuffer<unsigned char> scratch(variant.launch.scratch_bytes(rows, C, V));
        dout.fill_random(h.seed);
        CUDA_CHECK(cudaMemset(dweight, 0, dweight.num_bytes()));
        CUDA_CHECK(cudaDeviceSynchronize());
        variant.launch.backward(dweight, dout, tokens_device, scratch, rows, C, V, h.stream);
        CUDA_CHECK(cudaStreamSynchronize(h.stream));
        const std::string label = format_string("rows%lld C%d V%lld last tokens", (long long)rows, C, (long long)V);
        const std::vector<float> sums = dweight.download((V - tail) * C, tail * C);
        h.expect(sums == convert<float>(dout.download((rows - tail) * C, tail * C)) && dweight.guards_intact(),
                 "dweight", label, "rows of dout");
    }
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    struct Case {
        int64_t rows;
        int C;
        int64_t V;
        TokenMix mix;
        int64_t scratch_rows = 0;  // that the scratch memory was asked for, if more
    };
    // From the fourteenth on for ranges: one that is not full, several, the longest (on 132 SMs); more column tiles
    // than SMs; warps without a row or a position; runs over all warps, over some, within one; tokens that do not
    // occur.
    for (const Case& c :
         {Case{1, 8, 2, TokenMix::uniform}, Case{64, 8, 2, TokenMix::all_one}, Case{65, 1000, 3, TokenMix::uniform},
          Case{33, 1032, 1024, TokenMix::uniform},  // two tiles of columns, sorted
          Case{1000, 72, 259, TokenMix::half_one}, Case{12345, 64, 256, TokenMix::all_one},
          Case{3000, 1032, 128256, TokenMix::half_one}, Case{200000, 16, 100, TokenMix::half_one},
          Case{50000, 40, 3000, TokenMix::uniform}, Case{16896, 1032, 500, TokenMix::half_one},
          // Runs over 8 and over 9 chunks; fewer rows that make more chunks (on 132 SMs).
          Case{8 * 32, 72, 1024, TokenMix::all_one}, Case{9 * 32, 72, 1024, TokenMix::all_one},
          Case{132 * 4 * 32, 72, 1024, TokenMix::uniform, 132 * 4 * 32 + 1}, Case{1, 8, 1, TokenMix::uniform},
          Case{7, 72, 512, TokenMix::uniform}, Case{17, 1000, 1, TokenMix::all_one},
          Case{255, 8, 256, TokenMix::uniform}, Case{257, 72, 512, TokenMix::half_one},
          Case{523, 1032, 259, TokenMix::all_one}, Case{4099, 1000, 2, TokenMix::half_one},
          Case{33333, 72, 512, TokenMix::uniform}, Case{2 * 16384 + 3, 1032, 256, TokenMix::uniform},
          Case{5 * 16384 + 3, 72, 259, TokenMix::half_one}, Case{700, 16904, 3, TokenMix::half_one},
          Case{132 * 16384 - 5, 8, 512, TokenMix::uniform}, Case{264 * 16384 - 5, 8, 512, TokenMix::uniform}}) {
        if (!variant.launch.takes(c.rows, c.C, c.V) || h.leaves_out(c.rows * c.C / 4)) {
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
        DeviceBuffer<unsigned char> scratch(variant.launch.scratch_bytes(std::max(c.rows, c.scratch_rows), c.C, c.V));
        auto launch = [&] {
            dweight.upload(initial);
            scratch.poison();
            CUDA_CHECK(cudaDeviceSynchronize());
            variant.launch.backward(dweight, dout_device, tokens_device, scratch, c.rows, c.C, c.V, h.stream);
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
    if (!h.small && variant.number == VARIANTS.back().number) {
        check_last_rows(h, variant);
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
          Shape{98304, 1024, 512, TokenMix::uniform}, Shape{98304, 1024, 128256, TokenMix::half_one},
          Shape{1048576, 1024, 256, TokenMix::half_one}, Shape{65536, 768, 50304, TokenMix::uniform}}) {
        if (!variant.launch.takes(rows, C, V) || (variant.number == 1 && V > 1000)) {
            continue;  // variant 1 reads V times rows: seconds
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
        DeviceBuffer<unsigned char> scratch(variant.launch.scratch_bytes(rows, C, V));
        h.measure_bandwidth(format_string("rows%lld C%d V%lld %s", (long long)rows, C, (long long)V, mix_name(mix)),
                            num_bytes, variant.idea, [&, rows = rows, C = C, V = V] {
                                variant.launch.backward(dweight, dout, tokens_device, scratch, rows, C, V, h.stream);
                            });
        if (variant.launch.backward == embedding_backward_by_sort) {
            const EmbeddingSortPlan plan(rows, C, V);
            h.measure_bandwidth(format_string("rows%lld V%lld", (long long)rows, (long long)V),
                                rows * 4.0 * sizeof(int32_t), "the sort alone",
                                [&, rows = rows] { embedding_sort(plan, scratch, tokens_device, rows, h.stream); });
        }
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "embedding_backward", VARIANTS, check, measure); }
