// rmsnorm_forward.cu: out = x * rstd * weight. Bound: bandwidth, 2C elements a row (4C bytes).
#include "dev/cuda/block_reduce.cuh"
#include "dev/cuda/harness.cuh"
#include "llmc/reference/rmsnorm.h"
#include "llmc/rmsnorm.cuh"

using Launcher = void (*)(bf16* out, float* rstd, const bf16* x, const bf16* weight, int64_t rows, int C, float eps,
                          cudaStream_t stream);

// ---- 1: one thread a row -----------------------------------------------------------------------
__global__ void rmsnorm_forward_kernel1(bf16* out, float* rstd, const bf16* x, const bf16* weight, int64_t rows, int C,
                                        float eps) {
    const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) {
        return;
    }
    float sum = 0.0f;
    for (int64_t i = row * C; i < (row + 1) * C; ++i) {
        sum += (float)x[i] * (float)x[i];
    }
    rstd[row] = 1.0f / sqrtf(sum / C + eps);
    for (int64_t i = row * C; i < (row + 1) * C; ++i) {
        out[i] = (bf16)((float)x[i] * rstd[row] * (float)weight[i - row * C]);
    }
}
static void rmsnorm_forward1(bf16* out, float* rstd, const bf16* x, const bf16* weight, int64_t rows, int C, float eps,
                             cudaStream_t stream) {
    rmsnorm_forward_kernel1<<<ceil_div<int64_t>(rows, 128), 128, 0, stream>>>(out, rstd, x, weight, rows, C, eps);
    CUDA_CHECK_LAUNCH();
}

// ---- 2: one block a row, two passes, 2 bytes an access -----------------------------------------
__global__ void rmsnorm_forward_kernel2(bf16* out, float* rstd, const bf16* x, const bf16* weight, int C, float eps) {
    const int64_t begin = (int64_t)blockIdx.x * C;
    float sum = 0.0f;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        sum += (float)x[begin + c] * (float)x[begin + c];
    }
    const float row_rstd = 1.0f / sqrtf(block_sum(sum) / C + eps);
    if (threadIdx.x == 0) {
        rstd[blockIdx.x] = row_rstd;
    }
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        out[begin + c] = (bf16)((float)x[begin + c] * row_rstd * (float)weight[c]);
    }
}
static void rmsnorm_forward2(bf16* out, float* rstd, const bf16* x, const bf16* weight, int64_t rows, int C, float eps,
                             cudaStream_t stream) {
    rmsnorm_forward_kernel2<<<rows, 256, 0, stream>>>(out, rstd, x, weight, C, eps);
    CUDA_CHECK_LAUNCH();
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one thread a row", rmsnorm_forward1},
    {2, "one block a row, two passes", rmsnorm_forward2},
    {3, "16 bytes an access, the row in registers, a warp for rows up to 1024 (llmc/rmsnorm.cuh)", rmsnorm_forward},
};

static void check(Harness& h, const Variant<Launcher>& variant) {
    struct Case {
        int64_t rows;
        int C;
        float scale;  // of x
        float eps;
    };
    for (const Case& c : {Case{1, 8, 1.0f, 1e-5f}, Case{13, 264, 1.0f, 1e-5f}, Case{1000, 1000, 1.0f, 1e-5f},
                          Case{77, 1024, 1e4f, 1e-5f}, Case{9, 4104, 1e-4f, 1e-6f}, Case{40, 12800, 1.0f, 1e-5f},
                          Case{5, 16384, 1.0f, 1e-5f}, Case{3, 20008, 1.0f, 1e-5f}, Case{2, 131072, 1.0f, 1e-5f}}) {
        if (h.leaves_out(c.rows * c.C / 4)) {
            continue;
        }
        const std::vector<bf16> x = random_vector<bf16>(c.rows * c.C, h.seed, c.scale);
        const std::vector<bf16> weight = random_vector<bf16>(c.C, h.seed + 1);
        const std::string label = format_string("rows%lld C%d scale %g bf16", (long long)c.rows, c.C, c.scale);
        std::vector<double> expected(x.size()), expected_rstd(c.rows);
        reference::rmsnorm_forward<double>(expected.data(), expected_rstd.data(), to_double(x).data(),
                                           to_double(weight).data(), c.rows, c.C, c.eps);
        DeviceBuffer<bf16> x_device(x), weight_device(weight), out(c.rows * c.C);
        DeviceBuffer<float> rstd(c.rows);
        auto launch = [&] { variant.launch(out, rstd, x_device, weight_device, c.rows, c.C, c.eps, h.stream); };
        launch();
        // A sum of C squares by up to 512 threads, then a reciprocal square root good to 2 units in the last place:
        // 1e-6 covers both; variant 1 adds the squares one by one, each addition off by 2^-24 of the sum, which the
        // root halves. out is rounded to bf16 once.
        const double rstd_limit = 1e-6 + (variant.number == 1 ? c.C * 0x1p-25 : 0.0);
        h.compare("rstd", label, rstd, expected_rstd, rstd_limit, {c.rows}, 0.0);
        h.compare("out", label, out, expected, unit_roundoff<bf16>() + rstd_limit + 1e-6, {c.rows, c.C}, 1e-30);
        h.compare_repeats("out", label, out, launch);
        if (variant.number == VARIANTS.back().number) {
            DeviceBuffer<bf16> again(c.rows * c.C);
            rmsnorm_recompute(again, x_device, weight_device, rstd, c.rows, c.C, h.stream);
            h.compare_exact("rmsnorm_recompute", label, again, out.download());
        }
    }
    if (h.small) {
        return;
    }
    // Offsets beyond 2^31: the last rows are looked at.
    const int64_t rows = MANY_ROWS, tail = LAST_ROWS;
    const int C = MANY_ROWS_WIDTH;
    DeviceBuffer<bf16> x(rows * C), weight(C), out(rows * C);
    DeviceBuffer<float> rstd(rows);
    x.fill_random(h.seed);
    weight.fill_random(h.seed + 1);
    CUDA_CHECK(cudaDeviceSynchronize());
    variant.launch(out, rstd, x, weight, rows, C, 1e-5f, h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    std::vector<double> expected(tail * C), expected_rstd(tail);
    reference::rmsnorm_forward<double>(expected.data(), expected_rstd.data(),
                                       to_double(x.download((rows - tail) * C, tail * C)).data(),
                                       to_double(weight.download()).data(), tail, C, 1e-5);
    h.compare("out", format_string("rows%lld C%d last rows", (long long)rows, C),
              out.download((rows - tail) * C, tail * C), expected, unit_roundoff<bf16>() + 2e-6, {tail, C}, 1e-30);
    if (variant.number == VARIANTS.back().number) {
        const std::vector<bf16> last_rows = out.download((rows - tail) * C, tail * C);
        out.poison();
        rmsnorm_recompute(out, x, weight, rstd, rows, C, h.stream);
        h.compare("rmsnorm_recompute", format_string("rows%lld C%d last rows", (long long)rows, C),
                  out.download((rows - tail) * C, tail * C), to_double(last_rows), 0.0, {tail, C});
    }
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    struct Shape {
        int64_t rows;
        int C;
    };
    for (const auto [rows, C] : {Shape{98304, 1024}, Shape{65536, 768}, Shape{65536, 4096}, Shape{16384, 16384}}) {
        DeviceBuffer<bf16> x(rows * C), weight(C), out(rows * C);
        DeviceBuffer<float> rstd(rows);
        x.fill_random(h.seed);
        weight.fill_random(h.seed + 1);
        h.measure_bandwidth(
            format_string("rows%lld C%d", (long long)rows, C), 4.0 * rows * C, variant.idea,
            [&, rows = rows, C = C] { variant.launch(out, rstd, x, weight, rows, C, 1e-5f, h.stream); });
        if (variant.number == VARIANTS.back().number) {
            h.measure_bandwidth(
                format_string("rows%lld C%d rmsnorm_recompute", (long long)rows, C), 4.0 * rows * C, variant.idea,
                [&, rows = rows, C = C] { rmsnorm_recompute(out, x, weight, rstd, rows, C, h.stream); });
        }
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "rmsnorm_forward", VARIANTS, check, measure); }
