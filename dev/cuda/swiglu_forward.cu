// swiglu_forward.cu: out = gate / (1 + exp(-gate)) * up. Bound: bandwidth, 3F elements a row (6F bytes).
#include "dev/cuda/harness.cuh"
#include "llmc/reference/swiglu.h"
#include "llmc/swiglu.cuh"

using Launcher = void (*)(bf16* out, const bf16* gate_up, int64_t rows, int F, cudaStream_t stream);

// ---- 1: one thread an element ------------------------------------------------------------------
__global__ void swiglu_forward_kernel1(bf16* out, const bf16* gate_up, int64_t num_elements, int F) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < num_elements) {
        const bf16* row = gate_up + i / F * 2 * F;
        const float gate = row[i % F], up = row[F + i % F];
        out[i] = (bf16)(gate / (1.0f + expf(-gate)) * up);
    }
}
static void swiglu_forward1(bf16* out, const bf16* gate_up, int64_t rows, int F, cudaStream_t stream) {
    swiglu_forward_kernel1<<<ceil_div<int64_t>(rows * F, 256), 256, 0, stream>>>(out, gate_up, rows * F, F);
    CUDA_CHECK_LAUNCH();
}

// ---- 2: 16 bytes an access, fast exponential ---------------------------------------------------
__global__ void swiglu_forward_kernel2(bf16* out, const bf16* gate_up, int64_t num_packs, int packs_per_row) {
    const int64_t pack = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pack < num_packs) {
        const int64_t row = pack / packs_per_row;
        const int column = (int)(pack - row * packs_per_row);
        const bf16x8 gates = load128(gate_up + (row * 2 * packs_per_row + column) * 8);
        const bf16x8 ups = load128(gate_up + ((row * 2 + 1) * packs_per_row + column) * 8);
        bf16x8 result;
        for (int k = 0; k < 8; ++k) {
            const float gate = __bfloat162float(gates[k]);
            result[k] = __float2bfloat16(gate * swiglu_sigmoid(gate) * __bfloat162float(ups[k]));
        }
        store128(out + pack * 8, result);
    }
}
static void swiglu_forward2(bf16* out, const bf16* gate_up, int64_t rows, int F, cudaStream_t stream) {
    const int64_t num_packs = rows * (F / 8);
    swiglu_forward_kernel2<<<ceil_div<int64_t>(num_packs, 256), 256, 0, stream>>>(out, gate_up, num_packs, F / 8);
    CUDA_CHECK_LAUNCH();
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one thread an element", swiglu_forward1},
    {2, "16 bytes an access, fast exponential", swiglu_forward2},
    {3, "two packs a thread in flight, one 64-bit division a block (llmc/swiglu.cuh)", swiglu_forward},
};

static void check(Harness& h, const Variant<Launcher>& variant) {
    struct Case {
        int64_t rows;
        int F;
        float scale;  // of the inputs: large ones saturate the sigmoid
    };
    for (const Case& c :
         {Case{1, 8, 1.0f}, Case{3, 1000, 1.0f}, Case{7, 1000, 1.0f}, Case{517, 1536, 3.0f}, Case{65, 14336, 40.0f}}) {
        if (h.leaves_out(c.rows * c.F)) {
            continue;
        }
        const std::string label = format_string("rows%lld F%d scale %g bf16", (long long)c.rows, c.F, c.scale);
        const std::vector<bf16> gate_up = random_vector<bf16>(c.rows * 2 * c.F, h.seed, c.scale);
        std::vector<double> expected(c.rows * c.F);
        reference::swiglu_forward<double>(expected.data(), to_double(gate_up).data(), c.rows, c.F);
        DeviceBuffer<bf16> gate_up_device(gate_up), out(c.rows * c.F);
        auto launch = [&] { variant.launch(out, gate_up_device, c.rows, c.F, h.stream); };
        launch();
        // One rounding to bf16; the fast exponential is off by 2^-21 for each unit of its argument, at most here.
        const double limit = unit_roundoff<bf16>() + 3.5 * c.scale * 0x1p-21;
        h.compare("out", label, out, expected, limit, {c.rows, c.F}, 1e-30);
        h.compare_repeats("out", label, out, launch);
    }
    if (h.small) {
        return;
    }
    // Offsets beyond 2^31: the last rows are looked at.
    const int64_t rows = 700001, tail = 50;
    const int F = 1536;
    DeviceBuffer<bf16> gate_up(rows * 2 * F), out(rows * F);
    gate_up.fill_random(h.seed);
    CUDA_CHECK(cudaDeviceSynchronize());
    variant.launch(out, gate_up, rows, F, h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    std::vector<double> expected(tail * F);
    reference::swiglu_forward<double>(expected.data(),
                                      to_double(gate_up.download((rows - tail) * 2 * F, tail * 2 * F)).data(), tail, F);
    h.compare("out", format_string("rows%lld F%d last rows", (long long)rows, F),
              out.download((rows - tail) * F, tail * F), expected, unit_roundoff<bf16>() + 0x1p-19, {tail, F}, 1e-30);
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    struct Shape {
        int64_t rows;
        int F;
    };
    for (const auto [rows, F] : {Shape{98304, 1536}, Shape{65536, 2048}, Shape{16384, 14336}}) {
        DeviceBuffer<bf16> gate_up(rows * 2 * F), out(rows * F);
        gate_up.fill_random(h.seed);
        h.measure_bandwidth(format_string("rows%lld F%d", (long long)rows, F), 6.0 * rows * F, variant.idea,
                            [&, rows = rows, F = F] { variant.launch(out, gate_up, rows, F, h.stream); });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "swiglu_forward", VARIANTS, check, measure); }
