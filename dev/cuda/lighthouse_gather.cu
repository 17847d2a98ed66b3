// lighthouse_gather.cu: rows of the sub-sequence from tokens and pooled windows, and back; what ships is
// llmc/lighthouse_gather.cuh. Bound: memory.
#include "dev/cuda/lighthouse_cases.cuh"
#include "dev/cuda/rope_cases.cuh"
#include "llmc/lighthouse_gather.cuh"

struct Launcher {
    void (*forward)(const QkvHeads<bf16>&, const QkvHeads<const bf16>&, const bf16*, const int32_t*,
                    const LighthouseShape&, cudaStream_t);
    // rotation: of variants that turn dq and dk back, which have no forward of their own; else nullptr.
    void (*backward)(const QkvHeads<bf16>&, const QkvHeads<const bf16>&, const int32_t*, const LighthouseShape&,
                     cudaStream_t, const RopeRotation* rotation);

    bool turns_back() const { return forward == nullptr; }
};

// ---- 1: one thread an element --------------------------------------------------------------------
struct Element1 {
    int64_t b, row;
    int head, d;
    bool valid;

    __device__ Element1(const LighthouseShape& shape, int64_t rows) {
        const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
        d = (int)(i % shape.D);
        head = (int)(i / shape.D % shape.num_heads());
        row = i / shape.D / shape.num_heads() % rows;
        b = i / shape.D / shape.num_heads() / rows;
        valid = b < shape.B;
    }
};
__global__ void forward_kernel1(QkvHeads<bf16> out, QkvHeads<const bf16> qkv, const int32_t* positions,
                                LighthouseShape shape) {
    const LighthouseGeometry& g = shape.geometry;
    const Element1 e(shape, g.num_slots);
    if (!e.valid) {
        return;
    }
    const int32_t n = positions[(e.b * shape.Hkv + lighthouse_kv_head(shape, e.head)) * g.num_slots + e.row];
    int64_t index = e.row;
    const int64_t window = g.window(g.level_of_slot(index));
    if (n < 0) {
        return;
    }
    float sum = 0.0f;
    for (int64_t t = index * window; t < (index + 1) * window; ++t) {
        sum += __bfloat162float(qkv.head(shape, e.head).row(e.b, t, 0)[e.d]);
    }
    out.head(shape, e.head).row(e.b, n, 0)[e.d] = __float2bfloat16(sum / (float)window);
}
__global__ void backward_kernel1(QkvHeads<bf16> dqkv, QkvHeads<const bf16> dout, const int32_t* positions,
                                 LighthouseShape shape) {
    const LighthouseGeometry& g = shape.geometry;
    const Element1 e(shape, g.T);
    if (!e.valid) {
        return;
    }
    positions += (e.b * shape.Hkv + lighthouse_kv_head(shape, e.head)) * g.num_slots;
    float sum = 0.0f;
    for (int l = g.levels - 1; l >= 0; --l) {
        const int32_t n = positions[g.slot(l, e.row >> g.window_bits(l))];
        sum += n < 0 ? 0.0f : __bfloat162float(dout.head(shape, e.head).row(e.b, n, 0)[e.d]) / (float)g.window(l);
    }
    dqkv.head(shape, e.head).row(e.b, e.row, 0)[e.d] = __float2bfloat16(sum);
}
static unsigned blocks1(const LighthouseShape& shape, int64_t rows) {
    return (unsigned)ceil_div<int64_t>(shape.B * rows * shape.num_heads() * shape.D, 256);
}
static void forward1(const QkvHeads<bf16>& out, const QkvHeads<const bf16>& qkv, const bf16*, const int32_t* positions,
                     const LighthouseShape& shape, cudaStream_t stream) {
    forward_kernel1<<<blocks1(shape, shape.geometry.num_slots), 256, 0, stream>>>(out, qkv, positions, shape);
    CUDA_CHECK_LAUNCH();
}
static void backward1(const QkvHeads<bf16>& dqkv, const QkvHeads<const bf16>& dout, const int32_t* positions,
                      const LighthouseShape& shape, cudaStream_t stream, const RopeRotation*) {
    backward_kernel1<<<blocks1(shape, shape.geometry.T), 256, 0, stream>>>(dqkv, dout, positions, shape);
    CUDA_CHECK_LAUNCH();
}

// ---- 3: the turn a pass of its own --------------------------------------------------------------
static void backward3(const QkvHeads<bf16>& dqkv, const QkvHeads<const bf16>& dout, const int32_t* positions,
                      const LighthouseShape& shape, cudaStream_t stream, const RopeRotation* rotation) {
    lighthouse_gather_backward(dqkv, dout, positions, shape, stream);
    rope_backward(dqkv.q.data, shape.B * shape.geometry.T, shape.H + shape.Hkv, (int)dqkv.q.stride_t, shape.D,
                  rotation->frequencies, rotation->positions, stream);
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one thread an element, every entry from its tokens", {forward1, backward1}},
    {2,
     "coarsest rows from the pool pass, tokens read once, shared entries once, one head a block, "
     "8 rows in flight, 4 blocks, 3 at L = 4, forward: wanted pieces shared by a block (llmc/lighthouse_gather.cuh)",
     {lighthouse_gather, lighthouse_gather_backward}},
    {3, "backward of variant 2, then rope_backward", {nullptr, backward3}},
    {4,
     "backward of variant 2, dq and dk turned back (llmc/lighthouse_gather.cuh)",
     {nullptr, lighthouse_gather_backward}},
};

// dqkv [B, T, (H + 2 Hkv) D] of dout [B, S, (H + 2 Hkv) D].
static std::vector<double> exact_backward(const LighthouseShape& shape, const std::vector<bf16>& dout,
                                          const HostSelection& selection) {
    const LighthouseGeometry& g = shape.geometry;
    std::vector<double> dx((int64_t)shape.B * g.T * shape.num_heads() * shape.D), dgathered = to_double(dout);
    const auto din = packed_heads<const double>(dgathered.data(), g.S, shape);
    const auto dqkv = packed_heads<double>(dx.data(), g.T, shape);
    const auto spread = [&](const HeadView<double>& to, const HeadView<const double>& from, int heads) {
        reference::lighthouse_gather_backward<double>(reference_view(to), reference_view(from),
                                                      selection.positions.data(), shape.B, heads, shape.Hkv, shape.D,
                                                      g);
    };
    spread(dqkv.q, din.q, shape.H);
    spread(dqkv.k, din.k, shape.Hkv);
    spread(dqkv.v, din.v, shape.Hkv);
    return dx;
}

static void check_turned_back(Harness& h, const Variant<Launcher>& variant, const LighthouseCase& c,
                              const HostSelection& selection, const int32_t* positions) {
    const LighthouseShape shape = c.shape();
    const LighthouseGeometry& g = shape.geometry;
    const int width = shape.num_heads() * c.D;
    const ModelConfig config = rope_config(c.H, c.Hkv, c.D);
    const std::vector<bf16> dout = random_vector<bf16>(c.B * g.S * width, h.seed + 1);
    const std::vector<double> sums = exact_backward(shape, dout, selection);
    DeviceBuffer<bf16> dout_device(dout), dqkv(sums.size());
    for (const int64_t first_position : {0, 1000003}) {
        const RopeRotation rotation{make_rope_frequencies(config), rope_one_run(c.T, first_position)};
        const std::string label = c.label() + " turned back " + positions_label(rotation.positions);
        const auto turned = [&](std::vector<double> rows) {
            reference_turn(rows, c.B, rotation.positions, c.H + c.Hkv, width, c.D, rope_inverse_frequencies(config),
                           true);
            return rows;
        };
        const auto backward = [&] {
            variant.launch.backward(packed_heads<bf16>(dqkv, c.T, shape),
                                    packed_heads<const bf16>(dout_device, g.S, shape), positions, shape, h.stream,
                                    &rotation);
        };
        backward();
        // Twice the error of rounding the sums, then what they turn into: more than both variants do.
        const std::vector<double> expected = turned(sums);
        const std::vector<float> plain = convert<float>(turned(to_double(to_bf16(sums))));
        h.compare("backward", label, dqkv, expected, twice_plain_error<bf16>(plain, expected), {c.B, c.T, width});
        h.compare_repeats("backward", label, dqkv, backward);
    }
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    for (const LighthouseCase& c : lighthouse_cases(h)) {
        const LighthouseShape shape = c.shape();
        const LighthouseGeometry& g = shape.geometry;
        const HostSelection selection(shape, h.seed + 7);
        const int64_t width = (int64_t)shape.num_heads() * c.D, windows = g.level_size(g.levels - 1);
        const int c_window = 1 << g.window_bits(g.levels - 1);
        DeviceBuffer<int32_t> positions(selection.positions);

        if (variant.launch.turns_back()) {
            check_turned_back(h, variant, c, selection, positions);
            continue;
        }
        // Forward. The coarsest means, exact too: the mean of small integers, which the kernel copies.
        const std::vector<bf16> qkv = small_integers(c.B * c.T * width, h.seed);
        std::vector<double> x = to_double(qkv), expected(c.B * g.S * width), coarsest(c.B * windows * width, 0.0);
        for (size_t i = 0; i < x.size(); ++i) {
            const int64_t token = (int64_t)i / width;
            coarsest[token / c_window * width + i % width] += x[i] / c_window;  // whole windows: T is a multiple
        }
        const auto in = packed_heads<const double>(x.data(), c.T, shape);
        const auto out = packed_heads<double>(expected.data(), g.S, shape);
        reference::lighthouse_gather<double>(reference_view(out.q), reference_view(in.q), selection.entries.data(), c.B,
                                             c.H, c.Hkv, c.D, g);
        reference::lighthouse_gather<double>(reference_view(out.k), reference_view(in.k), selection.entries.data(), c.B,
                                             c.Hkv, c.Hkv, c.D, g);
        reference::lighthouse_gather<double>(reference_view(out.v), reference_view(in.v), selection.entries.data(), c.B,
                                             c.Hkv, c.Hkv, c.D, g);
        DeviceBuffer<bf16> qkv_device(qkv), pooled(to_bf16(coarsest)), gathered(expected.size());
        const auto forward = [&] {
            variant.launch.forward(packed_heads<bf16>(gathered, g.S, shape),
                                   packed_heads<const bf16>(qkv_device, c.T, shape), pooled, positions, shape,
                                   h.stream);
        };
        forward();
        h.compare_exact("forward", c.label() + " integers", gathered, to_bf16(expected));
        h.compare_repeats("forward", c.label(), gathered, forward);

        // Backward: float32 sums of at most six quotients by powers of two are exact.
        const std::vector<bf16> dout = small_integers(c.B * g.S * width, h.seed + 1);
        const std::vector<double> dx = exact_backward(shape, dout, selection);
        DeviceBuffer<bf16> dout_device(dout), dqkv_device(dx.size());
        const auto backward = [&] {
            variant.launch.backward(packed_heads<bf16>(dqkv_device, c.T, shape),
                                    packed_heads<const bf16>(dout_device, g.S, shape), positions, shape, h.stream,
                                    nullptr);
        };
        backward();
        h.compare_exact("backward", c.label() + " integers", dqkv_device, to_bf16(dx));
        h.compare_repeats("backward", c.label(), dqkv_device, backward);
    }
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    for (const LighthouseCase& c : LIGHTHOUSE_TIMED) {
        const LighthouseShape shape = c.shape();
        const LighthouseGeometry& g = shape.geometry;
        const HostSelection selection(shape, h.seed + 7);
        const int64_t width = (int64_t)shape.num_heads() * c.D, windows = g.level_size(g.levels - 1);
        DeviceBuffer<int32_t> positions(selection.positions);
        DeviceBuffer<bf16> qkv(c.B * c.T * width), pooled(c.B * windows * width), gathered(c.B * g.S * width);
        qkv.fill_random(h.seed);
        pooled.fill_random(h.seed);
        // Tokens under the coarsest entries that are selected, each once; the coarsest rows; the gathered rows.
        const double selected_tokens = (double)g.tiles * LIGHTHOUSE_TILE_BUDGET * (double)g.window(g.levels - 1);
        const double token_bytes = g.levels > 2 ? selected_tokens : (double)g.topk * g.pool;
        if (!variant.launch.turns_back()) {
            h.measure_bandwidth("forward " + c.label(),
                                2.0 * c.B * (double)width * (token_bytes + (double)windows + (double)g.S), variant.idea,
                                [&] {
                                    variant.launch.forward(packed_heads<bf16>(gathered, g.S, shape),
                                                           packed_heads<const bf16>(qkv, c.T, shape), pooled, positions,
                                                           shape, h.stream);
                                });
        }
        const RopeRotation rotation{make_rope_frequencies(rope_config(c.H, c.Hkv, c.D)), rope_one_run(c.T)};
        h.measure_bandwidth("backward " + c.label(),
                            (double)(qkv.num_bytes() + gathered.num_bytes() + positions.num_bytes()), variant.idea,
                            [&] {
                                variant.launch.backward(
                                    packed_heads<bf16>(qkv, c.T, shape), packed_heads<const bf16>(gathered, g.S, shape),
                                    positions, shape, h.stream, variant.launch.turns_back() ? &rotation : nullptr);
                            });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "lighthouse_gather", VARIANTS, check, measure); }
