// lighthouse_scatter.cu: outputs of the sub-sequence back to the tokens, and the gradient's way; what ships is
// llmc/lighthouse_scatter.cuh. Bound: memory.
#include "dev/cuda/lighthouse_cases.cuh"
#include "llmc/lighthouse_scatter.cuh"

struct Launcher {
    void (*forward)(HeadView<bf16>, HeadView<const bf16>, const int32_t*, const LighthouseShape&, cudaStream_t);
    void (*backward)(HeadView<bf16>, HeadView<const bf16>, const int32_t*, const LighthouseShape&, cudaStream_t);
};

// ---- 1: one thread an element --------------------------------------------------------------------
__global__ void forward_kernel1(HeadView<bf16> out, HeadView<const bf16> x, const int32_t* positions,
                                LighthouseShape shape) {
    const LighthouseGeometry& g = shape.geometry;
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, row = i / shape.D;
    const int64_t h = row % shape.H, j = row / shape.H % g.T, b = row / shape.H / g.T;
    if (b >= shape.B) {
        return;
    }
    positions += (b * shape.Hkv + lighthouse_kv_head(shape, (int)h)) * g.num_slots;
    float sum = 0.0f;
    for (int l = g.levels - 1; l >= 0; --l) {
        const int64_t index = ((j + 1) >> g.window_bits(l)) - 1;
        const int32_t n = index >= 0 ? positions[g.slot(l, index)] : -1;
        sum += n < 0 ? 0.0f : __bfloat162float(x.row(b, n, h)[i % shape.D]);
    }
    out.row(b, j, h)[i % shape.D] = __float2bfloat16(sum);
}
__global__ void backward_kernel1(HeadView<bf16> dx, HeadView<const bf16> dout, const int32_t* positions,
                                 LighthouseShape shape) {
    const LighthouseGeometry& g = shape.geometry;
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, row = i / shape.D;
    int64_t index = row / shape.H % g.num_slots;
    const int64_t h = row % shape.H, b = row / shape.H / g.num_slots;
    if (b >= shape.B) {
        return;
    }
    const int32_t n = positions[(b * shape.Hkv + lighthouse_kv_head(shape, (int)h)) * g.num_slots + index];
    if (n < 0) {
        return;
    }
    const int64_t window = g.window(g.level_of_slot(index)), first = (index + 1) * window - 1;
    float sum = 0.0f;
    for (int64_t t = first; t < min(first + window, g.T); ++t) {
        sum += __bfloat162float(dout.row(b, t, h)[i % shape.D]);
    }
    dx.row(b, n, h)[i % shape.D] = __float2bfloat16(sum);
}
static unsigned blocks1(const LighthouseShape& shape, int64_t rows) {
    return (unsigned)ceil_div<int64_t>(shape.B * rows * shape.H * shape.D, 256);
}
static void forward1(HeadView<bf16> out, HeadView<const bf16> x, const int32_t* positions, const LighthouseShape& shape,
                     cudaStream_t stream) {
    forward_kernel1<<<blocks1(shape, shape.geometry.T), 256, 0, stream>>>(out, x, positions, shape);
    CUDA_CHECK_LAUNCH();
}
static void backward1(HeadView<bf16> dx, HeadView<const bf16> dout, const int32_t* positions,
                      const LighthouseShape& shape, cudaStream_t stream) {
    backward_kernel1<<<blocks1(shape, shape.geometry.num_slots), 256, 0, stream>>>(dx, dout, positions, shape);
    CUDA_CHECK_LAUNCH();
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one thread an element", {forward1, backward1}},
    {2,
     "shared entries of a run of tokens once; tokens read once; one head a block (llmc/lighthouse_scatter.cuh)",
     {lighthouse_scatter, lighthouse_scatter_backward}},
};

static void check(Harness& h, const Variant<Launcher>& variant) {
    for (const LighthouseCase& c : lighthouse_cases(h)) {
        const LighthouseShape shape = c.shape();
        const LighthouseGeometry& g = shape.geometry;
        const HostSelection selection(shape, h.seed + 7);
        DeviceBuffer<int32_t> positions(selection.positions);
        const std::vector<bf16> x = small_integers(c.B * g.S * c.H * c.D, h.seed);
        const std::vector<bf16> dout = small_integers(c.B * c.T * c.H * c.D, h.seed + 1);
        std::vector<double> x_double = to_double(x), dout_double = to_double(dout);
        std::vector<double> expected(dout.size()), expected_dx(x.size());
        const auto gathered = [&](auto* data) { return plain_heads(data, g.S, c.H, c.D); };
        const auto tokens = [&](auto* data) { return plain_heads(data, c.T, c.H, c.D); };
        reference::lighthouse_scatter<double>(reference_view(tokens(expected.data())),
                                              reference_view(gathered(x_double.data())), selection.positions.data(),
                                              c.B, c.H, c.Hkv, c.D, g);
        reference::lighthouse_scatter_backward<double>(reference_view(gathered(expected_dx.data())),
                                                       reference_view(tokens(dout_double.data())),
                                                       selection.entries.data(), c.B, c.H, c.Hkv, c.D, g);
        DeviceBuffer<bf16> x_device(x), dout_device(dout), out(expected.size()), dx(expected_dx.size());
        const auto forward = [&] {
            variant.launch.forward(tokens(out.data()), gathered(x_device.data()), positions, shape, h.stream);
        };
        const auto backward = [&] {
            variant.launch.backward(gathered(dx.data()), tokens(dout_device.data()), positions, shape, h.stream);
        };
        forward();
        backward();
        h.compare_exact("forward", c.label() + " integers", out, to_bf16(expected));
        h.compare_exact("backward", c.label() + " integers", dx, to_bf16(expected_dx));
        h.compare_repeats("forward", c.label(), out, forward);
        h.compare_repeats("backward", c.label(), dx, backward);
    }
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    for (const LighthouseCase& c : LIGHTHOUSE_TIMED) {
        const LighthouseShape shape = c.shape();
        const LighthouseGeometry& g = shape.geometry;
        const HostSelection selection(shape, h.seed + 7);
        DeviceBuffer<int32_t> positions(selection.positions);
        DeviceBuffer<bf16> rows(c.B * g.S * c.H * c.D), tokens(c.B * c.T * c.H * c.D);
        rows.fill_random(h.seed);
        h.measure_bandwidth("forward " + c.label(),
                            (double)(rows.num_bytes() + tokens.num_bytes() + positions.num_bytes()), variant.idea, [&] {
                                variant.launch.forward(plain_heads(tokens.data(), c.T, c.H, c.D),
                                                       plain_heads(rows.data(), g.S, c.H, c.D), positions, shape,
                                                       h.stream);
                            });
        tokens.fill_random(h.seed);
        h.measure_bandwidth("backward " + c.label(),
                            (double)(rows.num_bytes() + tokens.num_bytes() + positions.num_bytes()), variant.idea, [&] {
                                variant.launch.backward(plain_heads(rows.data(), g.S, c.H, c.D),
                                                        plain_heads(tokens.data(), c.T, c.H, c.D), positions, shape,
                                                        h.stream);
                            });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "lighthouse_scatter", VARIANTS, check, measure); }
