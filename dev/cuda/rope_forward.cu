// rope_forward.cu: rotary positions in place, forward and its inverse, backward. Bound: bandwidth, the rotated heads
// read and written: 4 (H + Hkv) D bytes a row.
#include "dev/cuda/rope_cases.cuh"

using Launcher = void (*)(bf16* qkv, int64_t rows, int num_rotated_heads, int row_width, int D,
                          const RopeFrequencies& frequencies, const RopePositions& positions, bool inverse,
                          cudaStream_t stream);

// ---- 1: one thread a pair, its own sine and cosine ---------------------------------------------
__global__ void rope_kernel1(bf16* qkv, int64_t num_pairs, int num_rotated_heads, int row_width, int D,
                             const __grid_constant__ RopeFrequencies frequencies, RopePositions positions,
                             bool inverse) {
    const int64_t pair = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pair >= num_pairs) {
        return;
    }
    const int i = (int)(pair % (D / 2)), head = (int)(pair / (D / 2) % num_rotated_heads);
    const int64_t row = pair / (D / 2) / num_rotated_heads;
    const float2 angle = rope_cos_sin(positions.of(row), frequencies.turns_per_position[i]);
    const float cosine = angle.x, sine = inverse ? -angle.y : angle.y;
    bf16* low = qkv + row * row_width + head * D + i;
    const float a = low[0], b = low[D / 2];
    low[0] = (bf16)(a * cosine - b * sine);
    low[D / 2] = (bf16)(b * cosine + a * sine);
}
static void rope1(bf16* qkv, int64_t rows, int num_rotated_heads, int row_width, int D,
                  const RopeFrequencies& frequencies, const RopePositions& positions, bool inverse,
                  cudaStream_t stream) {
    const int64_t num_pairs = rows * num_rotated_heads * (D / 2);
    rope_kernel1<<<ceil_div<int64_t>(num_pairs, 256), 256, 0, stream>>>(qkv, num_pairs, num_rotated_heads, row_width, D,
                                                                        frequencies, positions, inverse);
    CUDA_CHECK_LAUNCH();
}

// ---- 2: what ships -----------------------------------------------------------------------------
static void rope2(bf16* qkv, int64_t rows, int num_rotated_heads, int row_width, int D,
                  const RopeFrequencies& frequencies, const RopePositions& positions, bool inverse,
                  cudaStream_t stream) {
    (inverse ? rope_backward : rope_forward)(qkv, rows, num_rotated_heads, row_width, D, frequencies, positions,
                                             stream);
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one thread a pair, its own sine and cosine", rope1},
    {2, "16 bytes an access, sines in registers for four heads a thread (llmc/rope.cuh)", rope2},
};

static void check(Harness& h, const Variant<Launcher>& variant) {
    struct Case {
        int64_t B, T;
        int H, Hkv, D;
        RopePositions positions;
        bool scaled;
    };
    for (const Case& c :
         {Case{1, 1, 1, 1, 8, rope_one_run(1, 5), false}, Case{2, 1000, 4, 2, 64, rope_one_run(1000), false},
          Case{3, 77, 3, 1, 24, rope_one_run(77, 12345), true},
          Case{1, 300, 8, 8, 128, rope_one_run(300, 1048576 - 300), false},
          Case{2, 65, 12, 4, 256, rope_one_run(65, 1 << 24), true}, Case{1, 130, 128, 8, 128, rope_one_run(130), false},
          Case{1, 5, 64, 1, 256, rope_one_run(5, 77), false}, Case{2, 65, 4, 2, 64, {65, 33, {1000, 77}}, false},
          Case{5, 3, 2, 2, 128, {3, 1, {9, 1 << 20}}, true}}) {
        const ModelConfig config = rope_config(c.H, c.Hkv, c.D, c.scaled);
        if (h.leaves_out(c.B * c.T * config.qkv_width() / 8)) {
            continue;
        }
        const RopeFrequencies frequencies = make_rope_frequencies(config);
        const int num_rotated = c.H + c.Hkv, width = config.qkv_width();
        const std::vector<bf16> qkv = random_vector<bf16>(c.B * c.T * width, h.seed);
        for (bool inverse : {false, true}) {
            const std::string label =
                format_string("%s B%lld T%lld H%d/%d D%d %s bf16", inverse ? "backward" : "forward", (long long)c.B,
                              (long long)c.T, c.H, c.Hkv, c.D, positions_label(c.positions).c_str());
            std::vector<double> expected = to_double(qkv);
            reference_turn(expected, c.B, c.positions, num_rotated, width, c.D, rope_inverse_frequencies(config),
                           inverse);
            DeviceBuffer<bf16> qkv_device(qkv);
            auto launch = [&] {
                qkv_device.upload(qkv);
                CUDA_CHECK(cudaDeviceSynchronize());
                variant.launch(qkv_device, c.B * c.T, num_rotated, width, c.D, frequencies, c.positions, inverse,
                               h.stream);
            };
            launch();
            // One rounding to bf16; the float sine and cosine of an angle reduced in double are good to 2^-22; the
            // products of position and frequency in double to 2^-52 * position turns.
            h.compare("qkv", label, qkv_device, expected, unit_roundoff<bf16>() + 1e-6, {c.B, c.T, width});
            h.compare_repeats("qkv", label, qkv_device, launch);
        }
    }
    if (h.small) {
        return;
    }
    // Offsets beyond 2^31: the last rows are looked at.
    const int64_t T = MANY_ROWS, tail = LAST_ROWS;
    const int H = 8, D = 64;
    const ModelConfig config = rope_config(H, H, D);
    const int width = config.qkv_width();
    DeviceBuffer<bf16> qkv(T * width);
    qkv.fill_random(h.seed);
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<double> expected = to_double(qkv.download((T - tail) * width, tail * width));
    reference::rope_forward<double>(expected.data(), 1, tail, 2 * H, width, D, rope_inverse_frequencies(config),
                                    T - tail);
    variant.launch(qkv, T, 2 * H, width, D, make_rope_frequencies(config), rope_one_run(T), false, h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    h.compare("qkv", format_string("T%lld H%d/%d D%d last rows", (long long)T, H, H, D),
              qkv.download((T - tail) * width, tail * width), expected, unit_roundoff<bf16>() + 1e-6, {tail, width});
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    struct Shape {
        int64_t B, T;
        int H, Hkv, D;
    };
    for (const auto [B, T, H, Hkv, D] :
         {Shape{1, 98304, 8, 8, 128}, Shape{64, 1024, 12, 12, 64}, Shape{1, 32768, 32, 8, 128}}) {
        const ModelConfig config = rope_config(H, Hkv, D);
        const RopeFrequencies frequencies = make_rope_frequencies(config);
        DeviceBuffer<bf16> qkv(B * T * config.qkv_width());
        qkv.fill_random(h.seed);
        h.measure_bandwidth(format_string("B%lld T%lld H%d/%d D%d", (long long)B, (long long)T, H, Hkv, D),
                            4.0 * B * T * (H + Hkv) * D, variant.idea, [&, B = B, T = T, H = H, Hkv = Hkv, D = D] {
                                variant.launch(qkv, B * T, H + Hkv, config.qkv_width(), D, frequencies, rope_one_run(T),
                                               false, h.stream);
                            });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "rope_forward", VARIANTS, check, measure); }
