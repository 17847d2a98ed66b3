// swiglu_backward.cu: dgate and dup from dout, gate and up, and forward's output again. Bound: bandwidth, 6F elements a
// row (12F bytes).
#include "dev/cuda/harness.cuh"
#include "llmc/reference/swiglu.h"
#include "llmc/swiglu.cuh"

using Launcher = void (*)(bf16* dgate_up, bf16* out, const bf16* dout, const bf16* gate_up, int64_t rows, int F,
                          cudaStream_t stream);

// ---- 1: one thread an element ------------------------------------------------------------------
__global__ void swiglu_backward_kernel1(bf16* dgate_up, bf16* out, const bf16* dout, const bf16* gate_up,
                                        int64_t num_elements, int F) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < num_elements) {
        const int64_t at = i / F * 2 * F + i % F;
        const float gate = gate_up[at], up = gate_up[at + F], d = dout[i];
        const float s = 1.0f / (1.0f + expf(-gate));
        dgate_up[at] = (bf16)(d * up * s * (1.0f + gate * (1.0f - s)));
        dgate_up[at + F] = (bf16)(d * gate * s);
        out[i] = (bf16)(gate * s * up);
    }
}
static void swiglu_backward1(bf16* dgate_up, bf16* out, const bf16* dout, const bf16* gate_up, int64_t rows, int F,
                             cudaStream_t stream) {
    swiglu_backward_kernel1<<<ceil_div<int64_t>(rows * F, 256), 256, 0, stream>>>(dgate_up, out, dout, gate_up,
                                                                                  rows * F, F);
    CUDA_CHECK_LAUNCH();
}

// ---- 2: 16 bytes an access, fast exponential ---------------------------------------------------
__global__ void swiglu_backward_kernel2(bf16* dgate_up, bf16* out, const bf16* dout, const bf16* gate_up,
                                        int64_t num_packs, int packs_per_row) {
    const int64_t pack = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pack < num_packs) {
        const int64_t row = pack / packs_per_row;
        const int64_t gate_at = (row * 2 * packs_per_row + pack - row * packs_per_row) * 8;
        const int64_t up_at = gate_at + (int64_t)packs_per_row * 8;
        const bf16x8 gates = load128(gate_up + gate_at), ups = load128(gate_up + up_at);
        const bf16x8 douts = load128(dout + pack * 8);
        bf16x8 dgates, dups, outs;
        for (int k = 0; k < 8; ++k) {
            const float gate = __bfloat162float(gates[k]), up = __bfloat162float(ups[k]);
            const float d = __bfloat162float(douts[k]), s = swiglu_sigmoid(gate);
            dgates[k] = __float2bfloat16(d * up * s * (1.0f + gate * (1.0f - s)));
            dups[k] = __float2bfloat16(d * gate * s);
            outs[k] = __float2bfloat16(gate * s * up);
        }
        store128(dgate_up + gate_at, dgates);
        store128(dgate_up + up_at, dups);
        store128(out + pack * 8, outs);
    }
}
static void swiglu_backward2(bf16* dgate_up, bf16* out, const bf16* dout, const bf16* gate_up, int64_t rows, int F,
                             cudaStream_t stream) {
    const int64_t num_packs = rows * (F / 8);
    swiglu_backward_kernel2<<<ceil_div<int64_t>(num_packs, 256), 256, 0, stream>>>(dgate_up, out, dout, gate_up,
                                                                                   num_packs, F / 8);
    CUDA_CHECK_LAUNCH();
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one thread an element", swiglu_backward1},
    {2, "16 bytes an access, fast exponential", swiglu_backward2},
    {3, "two packs a thread in flight, one 64-bit division a block (llmc/swiglu.cuh)", swiglu_backward},
};

static void check(Harness& h, const Variant<Launcher>& variant) {
    struct Case {
        int64_t rows;
        int F;
        float scale;  // of the inputs: large ones saturate the sigmoid
    };
    for (const Case& c :
         {Case{1, 8, 1.0f}, Case{3, 1000, 1.0f}, Case{7, 1000, 1.0f}, Case{517, 1536, 3.0f}, Case{65, 14336, 20.0f}}) {
        if (h.leaves_out(c.rows * c.F)) {
            continue;
        }
        const std::string label = format_string("rows%lld F%d scale %g bf16", (long long)c.rows, c.F, c.scale);
        const std::vector<bf16> gate_up = random_vector<bf16>(c.rows * 2 * c.F, h.seed, c.scale);
        const std::vector<bf16> dout = random_vector<bf16>(c.rows * c.F, h.seed + 1);
        std::vector<double> expected(gate_up.size()), expected_out(dout.size());
        std::vector<float> plain(gate_up.size());
        reference::swiglu_backward<double>(expected.data(), to_double(dout).data(), to_double(gate_up).data(), c.rows,
                                           c.F);
        reference::swiglu_backward<float>(plain.data(), convert<float>(dout).data(), convert<float>(gate_up).data(),
                                          c.rows, c.F);
        reference::swiglu_forward<double>(expected_out.data(), to_double(gate_up).data(), c.rows, c.F);
        DeviceBuffer<bf16> dout_device(dout), gate_up_device(gate_up), dgate_up(c.rows * 2 * c.F), out(c.rows * c.F);
        auto launch = [&] { variant.launch(dgate_up, out, dout_device, gate_up_device, c.rows, c.F, h.stream); };
        launch();
        h.compare("dgate_up", label, dgate_up, expected, twice_plain_error<bf16>(plain, expected), {c.rows, 2 * c.F});
        // As in swiglu_forward.cu.
        const double out_limit = unit_roundoff<bf16>() + 3.5 * c.scale * 0x1p-21;
        h.compare("out", label, out, expected_out, out_limit, {c.rows, c.F}, 1e-30);
        h.compare_repeats("dgate_up", label, dgate_up, launch);
        if (variant.number == VARIANTS.back().number) {
            DeviceBuffer<bf16> forward_out(c.rows * c.F);
            swiglu_forward(forward_out, gate_up_device, c.rows, c.F, h.stream);
            h.compare_exact("out as forward's", label, out, forward_out.download());
        }
        variant.launch(gate_up_device, dout_device, dout_device, gate_up_device, c.rows, c.F, h.stream);
        h.compare_exact("dgate_up in place", label, gate_up_device, dgate_up.download());
        h.compare_exact("out in place", label, dout_device, out.download());
    }
    if (h.small) {
        return;
    }
    // Offsets beyond 2^31: the last rows are looked at.
    const int64_t rows = 700001, tail = 50;
    const int F = 1536;
    DeviceBuffer<bf16> dgate_up(rows * 2 * F), out(rows * F), dout(rows * F), gate_up(rows * 2 * F);
    dout.fill_random(h.seed);
    gate_up.fill_random(h.seed + 1);
    CUDA_CHECK(cudaDeviceSynchronize());
    variant.launch(dgate_up, out, dout, gate_up, rows, F, h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    std::vector<double> expected(tail * 2 * F);
    reference::swiglu_backward<double>(expected.data(), to_double(dout.download((rows - tail) * F, tail * F)).data(),
                                       to_double(gate_up.download((rows - tail) * 2 * F, tail * 2 * F)).data(), tail,
                                       F);
    h.compare("dgate_up", format_string("rows%lld F%d last rows", (long long)rows, F),
              dgate_up.download((rows - tail) * 2 * F, tail * 2 * F), expected, 2 * unit_roundoff<bf16>(),
              {tail, 2 * F});
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    struct Shape {
        int64_t rows;
        int F;
    };
    for (const auto [rows, F] : {Shape{98304, 1536}, Shape{65536, 2048}, Shape{16384, 14336}}) {
        DeviceBuffer<bf16> dgate_up(rows * 2 * F), out(rows * F), dout(rows * F), gate_up(rows * 2 * F);
        dout.fill_random(h.seed);
        gate_up.fill_random(h.seed + 1);
        h.measure_bandwidth(
            format_string("rows%lld F%d", (long long)rows, F), 12.0 * rows * F, variant.idea,
            [&, rows = rows, F = F] { variant.launch(dgate_up, out, dout, gate_up, rows, F, h.stream); });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "swiglu_backward", VARIANTS, check, measure); }
