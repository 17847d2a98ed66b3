// embedding_forward.cu: the weight's row of every token. Bound: bandwidth, 2C elements a row (4C bytes).
#include <numeric>

#include "dev/cuda/harness.cuh"
#include "llmc/embedding.cuh"
#include "llmc/reference/embedding.h"

using Launcher = void (*)(bf16* out, const int32_t* tokens, const bf16* weight, int64_t rows, int C,
                          cudaStream_t stream);

// ---- 1: one thread an element ------------------------------------------------------------------
__global__ void embedding_forward_kernel1(bf16* out, const int32_t* tokens, const bf16* weight, int64_t num_elements,
                                          int C) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < num_elements) {
        out[i] = weight[(int64_t)tokens[i / C] * C + i % C];
    }
}
static void embedding_forward1(bf16* out, const int32_t* tokens, const bf16* weight, int64_t rows, int C,
                               cudaStream_t stream) {
    embedding_forward_kernel1<<<ceil_div<int64_t>(rows * C, 256), 256, 0, stream>>>(out, tokens, weight, rows * C, C);
    CUDA_CHECK_LAUNCH();
}

// ---- 2: 16 bytes an access ---------------------------------------------------------------------
__global__ void embedding_forward_kernel2(bf16* out, const int32_t* tokens, const bf16* weight, int64_t num_packs,
                                          int packs_per_row) {
    const int64_t pack = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pack < num_packs) {
        const int64_t row = pack / packs_per_row, column = pack - row * packs_per_row;
        store128(out + pack * 8, load128(weight + (tokens[row] * (int64_t)packs_per_row + column) * 8));
    }
}
static void embedding_forward2(bf16* out, const int32_t* tokens, const bf16* weight, int64_t rows, int C,
                               cudaStream_t stream) {
    const int64_t num_packs = rows * (C / 8);
    embedding_forward_kernel2<<<ceil_div<int64_t>(num_packs, 256), 256, 0, stream>>>(out, tokens, weight, num_packs,
                                                                                     C / 8);
    CUDA_CHECK_LAUNCH();
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one thread an element", embedding_forward1},
    {2, "16 bytes an access", embedding_forward2},
    {3, "four packs a thread in flight, one 64-bit division a block (llmc/embedding.cuh)", embedding_forward},
};

static void check(Harness& h, const Variant<Launcher>& variant) {
    struct Case {
        int64_t rows;
        int C;
        int64_t V;
    };
    for (const Case& c :
         {Case{1, 8, 2}, Case{200, 1000, 259}, Case{1000, 1000, 259}, Case{777, 1024, 128256}, Case{33, 16384, 1000}}) {
        if (h.leaves_out((c.rows + c.V) * c.C / 16)) {
            continue;
        }
        const std::string label = format_string("rows%lld C%d V%lld bf16", (long long)c.rows, c.C, (long long)c.V);
        const std::vector<int32_t> tokens = random_indices(c.rows, h.seed, c.V);
        const std::vector<bf16> weight = random_vector<bf16>(c.V * c.C, h.seed + 1);
        std::vector<double> expected(c.rows * c.C);
        reference::embedding_forward<double>(expected.data(), tokens.data(), to_double(weight).data(), c.rows, c.C);
        DeviceBuffer<int32_t> tokens_device(tokens);
        DeviceBuffer<bf16> weight_device(weight), out(c.rows * c.C);
        auto launch = [&] { variant.launch(out, tokens_device, weight_device, c.rows, c.C, h.stream); };
        launch();
        h.compare("out", label, out, expected, 0.0, {c.rows, c.C});
        h.compare_repeats("out", label, out, launch);
    }
    if (h.small) {
        return;
    }
    // Offsets beyond 2^31: the last rows are looked at.
    const int64_t rows = MANY_ROWS, V = 300, tail = LAST_ROWS;
    const int C = MANY_ROWS_WIDTH;
    const std::vector<int32_t> tokens = random_indices(rows, h.seed, V);
    DeviceBuffer<int32_t> tokens_device(tokens);
    DeviceBuffer<bf16> weight(V * C), out(rows * C);
    weight.fill_random(h.seed + 1);
    CUDA_CHECK(cudaDeviceSynchronize());
    variant.launch(out, tokens_device, weight, rows, C, h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    std::vector<double> expected(tail * C);
    reference::embedding_forward<double>(expected.data(), tokens.data() + rows - tail,
                                         to_double(weight.download()).data(), tail, C);
    h.compare("out", format_string("rows%lld C%d last rows", (long long)rows, C),
              out.download((rows - tail) * C, tail * C), expected, 0.0, {tail, C});

    const int64_t long_V = MANY_ROWS;  // and of the table
    DeviceBuffer<bf16> long_weight(long_V * C), last(tail * C);
    std::vector<int32_t> last_tokens(tail);
    std::iota(last_tokens.begin(), last_tokens.end(), (int32_t)(long_V - tail));
    DeviceBuffer<int32_t> last_tokens_device(last_tokens);
    long_weight.fill_random(h.seed + 2);
    variant.launch(last, last_tokens_device, long_weight, tail, C, h.stream);
    h.compare_exact("out", format_string("V%lld C%d last rows", (long long)long_V, C), last,
                    long_weight.download((long_V - tail) * C, tail * C));
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    struct Shape {
        int64_t rows;
        int C;
        int64_t V;
    };
    for (const auto [rows, C, V] : {Shape{98304, 1024, 128256}, Shape{1048576, 1024, 256}, Shape{65536, 768, 50304}}) {
        DeviceBuffer<int32_t> tokens(random_indices(rows, h.seed, V));
        DeviceBuffer<bf16> weight(V * C), out(rows * C);
        weight.fill_random(h.seed + 1);
        // Rows of a small table come from L2.
        const double num_bytes = (double)(rows + std::min(V, rows)) * C * sizeof(bf16);
        h.measure_bandwidth(format_string("rows%lld C%d V%lld", (long long)rows, C, (long long)V), num_bytes,
                            variant.idea,
                            [&, rows = rows, C = C] { variant.launch(out, tokens, weight, rows, C, h.stream); });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "embedding_forward", VARIANTS, check, measure); }
