// rmsnorm_backward.cu: dx = dresidual + rstd * (g - n * mean(g * n)), dweight += sum(dout * n), with g = dout * weight
// and n = x * rstd; and, where wanted, norm_out = n * weight again. Bound: bandwidth, 4C elements a row (8C bytes), 3C
// without dresidual, C more with norm_out.
#include "dev/cuda/block_reduce.cuh"
#include "dev/cuda/harness.cuh"
#include "llmc/reference/rmsnorm.h"
#include "llmc/rmsnorm.cuh"

using Launcher = void (*)(bf16* dx, float* dweight, bf16* norm_out, const bf16* dresidual, const bf16* dout,
                          const bf16* x, const bf16* weight, const float* rstd, void* scratch, int64_t rows, int C,
                          cudaStream_t stream);

// out (=) an element of the output again.
__device__ static void write_norm_out(bf16* norm_out, int64_t i, bf16 x, float rstd, bf16 weight) {
    if (norm_out != nullptr) {
        norm_out[i] = (bf16)((float)x * rstd * (float)weight);
    }
}

// ---- 1: one thread a row, then one thread a column ---------------------------------------------
__global__ void rmsnorm_backward_kernel1(bf16* dx, bf16* norm_out, const bf16* dresidual, const bf16* dout,
                                         const bf16* x, const bf16* weight, const float* rstd, int64_t rows, int C) {
    const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) {
        return;
    }
    float sum = 0.0f;
    for (int c = 0; c < C; ++c) {
        sum += (float)dout[row * C + c] * (float)weight[c] * (float)x[row * C + c] * rstd[row];
    }
    for (int c = 0; c < C; ++c) {
        const int64_t i = row * C + c;
        const float gradient = rstd[row] * ((float)dout[i] * (float)weight[c] - (float)x[i] * rstd[row] * (sum / C));
        dx[i] = (bf16)((dresidual != nullptr ? (float)dresidual[i] : 0.0f) + gradient);
        write_norm_out(norm_out, i, x[i], rstd[row], weight[c]);
    }
}
__global__ void rmsnorm_backward_dweight_kernel1(float* dweight, const bf16* dout, const bf16* x, const float* rstd,
                                                 int64_t rows, int C) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c < C) {
        float sum = 0.0f;
        for (int64_t row = 0; row < rows; ++row) {
            sum += (float)dout[row * C + c] * (float)x[row * C + c] * rstd[row];
        }
        dweight[c] += sum;
    }
}
static void rmsnorm_backward1(bf16* dx, float* dweight, bf16* norm_out, const bf16* dresidual, const bf16* dout,
                              const bf16* x, const bf16* weight, const float* rstd, void*, int64_t rows, int C,
                              cudaStream_t stream) {
    rmsnorm_backward_dweight_kernel1<<<ceil_div(C, 32), 32, 0, stream>>>(dweight, dout, x, rstd, rows, C);
    CUDA_CHECK_LAUNCH();
    rmsnorm_backward_kernel1<<<ceil_div<int64_t>(rows, 128), 128, 0, stream>>>(dx, norm_out, dresidual, dout, x, weight,
                                                                               rstd, rows, C);
    CUDA_CHECK_LAUNCH();
}

// ---- 2: one block a row for dx; dweight in a second pass over memory ----------------------------
__global__ void rmsnorm_backward_kernel2(bf16* dx, bf16* norm_out, const bf16* dresidual, const bf16* dout,
                                         const bf16* x, const bf16* weight, const float* rstd, int C) {
    const int64_t begin = (int64_t)blockIdx.x * C;
    const float row_rstd = rstd[blockIdx.x];
    float sum = 0.0f;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        sum += (float)dout[begin + c] * (float)weight[c] * (float)x[begin + c];
    }
    const float mean = block_sum(sum) * row_rstd / C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        const float gradient =
            row_rstd * ((float)dout[begin + c] * (float)weight[c] - (float)x[begin + c] * row_rstd * mean);
        dx[begin + c] = (bf16)((dresidual != nullptr ? (float)dresidual[begin + c] : 0.0f) + gradient);
        write_norm_out(norm_out, begin + c, x[begin + c], row_rstd, weight[c]);
    }
}
// Launch: 32 columns x 8 slices of rows a block along x; every gridDim.y-th group of 8 rows; partials [gridDim.y, C].
__global__ void rmsnorm_backward_dweight_kernel2(float* partials, const bf16* dout, const bf16* x, const float* rstd,
                                                 int64_t rows, int C) {
    __shared__ float slices[8][32];
    const int c = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    for (int64_t row = blockIdx.y * 8 + threadIdx.y; c < C && row < rows; row += gridDim.y * 8) {
        sum += (float)dout[row * C + c] * (float)x[row * C + c] * rstd[row];
    }
    slices[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < C) {
        for (int slice = 1; slice < 8; ++slice) {
            sum += slices[slice][threadIdx.x];
        }
        partials[(int64_t)blockIdx.y * C + c] = sum;
    }
}
static void rmsnorm_backward2(bf16* dx, float* dweight, bf16* norm_out, const bf16* dresidual, const bf16* dout,
                              const bf16* x, const bf16* weight, const float* rstd, void* scratch, int64_t rows, int C,
                              cudaStream_t stream) {
    // As many partial sums as the shipped version's scratch memory holds.
    const int num_partials = (int)(rmsnorm_backward_scratch_bytes(rows, C) / (C * sizeof(float)));
    rmsnorm_backward_dweight_kernel2<<<dim3(ceil_div(C, 32), num_partials), dim3(32, 8), 0, stream>>>(
        (float*)scratch, dout, x, rstd, rows, C);
    CUDA_CHECK_LAUNCH();
    rmsnorm_backward_dweight_kernel<<<ceil_div(C, RMSNORM_DWEIGHT_COLUMNS),
                                      dim3(RMSNORM_DWEIGHT_COLUMNS, RMSNORM_DWEIGHT_SLICES), 0, stream>>>(
        dweight, (const float*)scratch, num_partials, C);
    CUDA_CHECK_LAUNCH();
    rmsnorm_backward_kernel2<<<rows, 256, 0, stream>>>(dx, norm_out, dresidual, dout, x, weight, rstd, C);
    CUDA_CHECK_LAUNCH();
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one thread a row, then one thread a column", rmsnorm_backward1},
    {2, "one block a row; dweight in a second pass over memory", rmsnorm_backward2},
    {3, "one pass: rows through a ring in shared memory, dweight in registers, joined in two stages (llmc/rmsnorm.cuh)",
     rmsnorm_backward},
};

// Offsets beyond 2^31: dx of the last rows.
static void check_last_rows(Harness& h, const Variant<Launcher>& variant) {
    const int64_t rows = MANY_ROWS, tail = LAST_ROWS, first = rows - tail;
    const int C = MANY_ROWS_WIDTH;
    DeviceBuffer<bf16> x(rows * C), dout(rows * C), dx(rows * C), weight(C);
    DeviceBuffer<float> rstd(rows), dweight(std::vector<float>(C, 0.0f));
    DeviceBuffer<unsigned char> scratch(rmsnorm_backward_scratch_bytes(rows, C));
    x.fill_random(h.seed);
    dout.fill_random(h.seed + 1);
    weight.fill_random(h.seed + 3);
    rmsnorm_forward(dx, rstd, x, weight, rows, C, 1e-5f, h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    dx.poison();
    variant.launch(dx, dweight, nullptr, nullptr, dout, x, weight, rstd, scratch, rows, C, h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    const std::vector<bf16> last_x = x.download(first * C, tail * C), last_dout = dout.download(first * C, tail * C);
    const std::vector<float> last_rstd = rstd.download(first, tail);
    std::vector<double> expected(tail * C), expected_dweight(C);
    std::vector<float> plain(tail * C), plain_dweight(C);
    reference::rmsnorm_backward<double>(expected.data(), expected_dweight.data(), nullptr, to_double(last_dout).data(),
                                        to_double(last_x).data(), to_double(weight.download()).data(),
                                        to_double(last_rstd).data(), tail, C);
    reference::rmsnorm_backward<float>(plain.data(), plain_dweight.data(), nullptr, convert<float>(last_dout).data(),
                                       convert<float>(last_x).data(), convert<float>(weight.download()).data(),
                                       last_rstd.data(), tail, C);
    h.compare("dx", format_string("rows%lld C%d last rows", (long long)rows, C), dx.download(first * C, tail * C),
              expected, twice_plain_error<bf16>(plain, expected), {tail, C});
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    struct Case {
        int64_t rows;
        int C;
        float scale;  // of x
    };
    for (const Case& c : {Case{1, 8, 1.0f}, Case{13, 264, 1.0f}, Case{25, 768, 1.0f}, Case{100, 1024, 1.0f},
                          Case{3000, 1000, 1.0f}, Case{777, 1024, 1e4f}, Case{4000, 768, 1.0f}, Case{9, 4104, 1e-2f},
                          Case{300, 8192, 1.0f}, Case{300, 8200, 1.0f}, Case{300, 12800, 1.0f}, Case{300, 16384, 1.0f},
                          Case{300, 16392, 1.0f}, Case{2, 131072, 1.0f}}) {
        const bool one_thread_a_row = variant.number == 1;
        if (h.leaves_out(c.rows * c.C / 4) || (one_thread_a_row && h.leaves_out(c.C * 16))) {
            continue;
        }
        const std::vector<bf16> x = random_vector<bf16>(c.rows * c.C, h.seed, c.scale);
        const std::vector<bf16> dout = random_vector<bf16>(c.rows * c.C, h.seed + 1);
        const std::vector<bf16> dresidual = random_vector<bf16>(c.rows * c.C, h.seed + 2);
        const std::vector<bf16> weight = random_vector<bf16>(c.C, h.seed + 3);
        const std::vector<float> initial = random_vector<float>(c.C, h.seed + 4);
        std::vector<double> out(x.size()), rstd_double(c.rows);
        reference::rmsnorm_forward<double>(out.data(), rstd_double.data(), to_double(x).data(),
                                           to_double(weight).data(), c.rows, c.C, 1e-5);
        const std::vector<float> rstd = convert<float>(rstd_double);
        DeviceBuffer<bf16> x_device(x), dout_device(dout), dresidual_device(dresidual), weight_device(weight);
        DeviceBuffer<float> rstd_device(rstd);
        DeviceBuffer<bf16> expected_norm_out(c.rows * c.C);
        rmsnorm_recompute(expected_norm_out, x_device, weight_device, rstd_device, c.rows, c.C, h.stream);
        for (bool with_residual : {true, false}) {
            const std::string label = format_string("rows%lld C%d scale %g%s bf16", (long long)c.rows, c.C, c.scale,
                                                    with_residual ? " with residual" : "");
            std::vector<double> expected(x.size()), expected_dweight = to_double(initial);
            std::vector<float> plain(x.size()), plain_dweight = initial;
            const std::vector<double> dresidual_double = to_double(dresidual);
            const std::vector<float> dresidual_float = convert<float>(dresidual);
            reference::rmsnorm_backward<double>(expected.data(), expected_dweight.data(),
                                                with_residual ? dresidual_double.data() : nullptr,
                                                to_double(dout).data(), to_double(x).data(), to_double(weight).data(),
                                                to_double(rstd).data(), c.rows, c.C);
            reference::rmsnorm_backward<float>(plain.data(), plain_dweight.data(),
                                               with_residual ? dresidual_float.data() : nullptr,
                                               convert<float>(dout).data(), convert<float>(x).data(),
                                               convert<float>(weight).data(), rstd.data(), c.rows, c.C);
            DeviceBuffer<bf16> dx(c.rows * c.C), norm_out(c.rows * c.C);
            DeviceBuffer<float> dweight(initial);
            DeviceBuffer<unsigned char> scratch(rmsnorm_backward_scratch_bytes(c.rows, c.C));
            auto launch = [&] {
                dweight.upload(initial);
                scratch.poison();
                CUDA_CHECK(cudaDeviceSynchronize());
                variant.launch(dx, dweight, norm_out, with_residual ? dresidual_device.data() : nullptr, dout_device,
                               x_device, weight_device, rstd_device, scratch, c.rows, c.C, h.stream);
            };
            launch();
            h.compare("dx", label, dx, expected, twice_plain_error<bf16>(plain, expected), {c.rows, c.C});
            h.compare("dweight", label, dweight, expected_dweight,
                      twice_plain_error<float>(plain_dweight, expected_dweight), {c.C});
            h.compare_exact("norm_out", label, norm_out, expected_norm_out.download());
            h.expect(scratch.guards_intact(), "scratch", label, "within its bytes");
            h.compare_repeats("dweight", label, dweight, launch);
            if (variant.number >= 3) {  // in place, and without norm_out: the same bits
                DeviceBuffer<bf16> in_place(with_residual ? dresidual : dout);
                dweight.upload(initial);
                CUDA_CHECK(cudaDeviceSynchronize());
                variant.launch(in_place, dweight, nullptr, with_residual ? in_place.data() : nullptr,
                               with_residual ? dout_device.data() : in_place.data(), x_device, weight_device,
                               rstd_device, scratch, c.rows, c.C, h.stream);
                h.compare_exact("dx in place", label, in_place, dx.download());
            }
        }
    }
    if (variant.number >= 3 && !h.small) {
        check_last_rows(h, variant);
    }
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    struct Shape {
        int64_t rows;
        int C;
    };
    for (const auto [rows, C] :
         {Shape{98304, 1024}, Shape{65536, 768}, Shape{65536, 4096}, Shape{32768, 8192}, Shape{16384, 16384}}) {
        DeviceBuffer<bf16> dx(rows * C), norm_out(rows * C), dresidual(rows * C), dout(rows * C), x(rows * C),
            weight(C);
        DeviceBuffer<float> dweight(C), rstd(rows);
        DeviceBuffer<unsigned char> scratch(rmsnorm_backward_scratch_bytes(rows, C));
        dresidual.fill_random(h.seed);
        dout.fill_random(h.seed + 1);
        x.fill_random(h.seed + 2);
        weight.fill_random(h.seed + 3);
        dweight.fill_random(h.seed + 4);
        rstd.upload(std::vector<float>(rows, 1.0f));
        for (bool with_norm_out : {false, true}) {
            h.measure_bandwidth(
                format_string("rows%lld C%d%s", (long long)rows, C, with_norm_out ? " with norm_out" : ""),
                (with_norm_out ? 10.0 : 8.0) * rows * C, variant.idea, [&, rows = rows, C = C] {
                    variant.launch(dx, dweight, with_norm_out ? norm_out.data() : nullptr, dresidual, dout, x, weight,
                                   rstd, scratch, rows, C, h.stream);
                });
        }
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "rmsnorm_backward", VARIANTS, check, measure); }
