// rope_forward.cu: rotary positions in place, forward and its inverse, backward. Bound: bandwidth, the rotated heads
// read and written: 4 (H + Hkv) D bytes a row.
#include "dev/cuda/harness.cuh"
#include "llmc/reference/rope.h"
#include "llmc/rope.cuh"

using Launcher = void (*)(bf16* qkv, int64_t B, int64_t T, int num_rotated_heads, int row_width, int D,
                          const RopeFrequencies& frequencies, int64_t first_position, bool inverse,
                          cudaStream_t stream);

// ---- 1: one thread a pair, its own sine and cosine ---------------------------------------------
__global__ void rope_kernel1(bf16* qkv, int64_t num_pairs, int64_t T, int num_rotated_heads, int row_width, int D,
                             const __grid_constant__ RopeFrequencies frequencies, int64_t first_position,
                             bool inverse) {
    const int64_t pair = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pair >= num_pairs) {
        return;
    }
    const int i = (int)(pair % (D / 2)), head = (int)(pair / (D / 2) % num_rotated_heads);
    const int64_t row = pair / (D / 2) / num_rotated_heads;
    const double turns = (double)(first_position + row % T) * frequencies.turns_per_position[i];
    float sine, cosine;
    sincospif(2.0f * (float)(turns - rint(turns)), &sine, &cosine);
    sine = inverse ? -sine : sine;
    bf16* low = qkv + row * row_width + head * D + i;
    const float a = low[0], b = low[D / 2];
    low[0] = (bf16)(a * cosine - b * sine);
    low[D / 2] = (bf16)(b * cosine + a * sine);
}
static void rope1(bf16* qkv, int64_t B, int64_t T, int num_rotated_heads, int row_width, int D,
                  const RopeFrequencies& frequencies, int64_t first_position, bool inverse, cudaStream_t stream) {
    const int64_t num_pairs = B * T * num_rotated_heads * (D / 2);
    rope_kernel1<<<ceil_div<int64_t>(num_pairs, 256), 256, 0, stream>>>(qkv, num_pairs, T, num_rotated_heads, row_width,
                                                                        D, frequencies, first_position, inverse);
    CUDA_CHECK_LAUNCH();
}

// ---- 2: what ships -----------------------------------------------------------------------------
static void rope2(bf16* qkv, int64_t B, int64_t T, int num_rotated_heads, int row_width, int D,
                  const RopeFrequencies& frequencies, int64_t first_position, bool inverse, cudaStream_t stream) {
    (inverse ? rope_backward : rope_forward)(qkv, B, T, num_rotated_heads, row_width, D, frequencies, first_position,
                                             stream);
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one thread a pair, its own sine and cosine", rope1},
    {2, "16 bytes an access, sines in registers for four heads a thread (llmc/rope.cuh)", rope2},
};

static ModelConfig make_config(int H, int Hkv, int D, bool scaled) {
    ModelConfig config;
    config.num_heads = H, config.num_kv_heads = Hkv, config.head_dim = D, config.rope_theta = 500000.0;
    if (scaled) {
        config.rope_scaling = {32.0, 1.0, 4.0, 8192};
    }
    return config;
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    struct Case {
        int64_t B, T;
        int H, Hkv, D;
        int64_t first_position;
        bool scaled;
    };
    for (const Case& c : {Case{1, 1, 1, 1, 8, 5, false}, Case{2, 1000, 4, 2, 64, 0, false},
                          Case{3, 77, 3, 1, 24, 12345, true}, Case{1, 300, 8, 8, 128, 1048576 - 300, false},
                          Case{2, 65, 12, 4, 256, 1 << 24, true}, Case{1, 130, 128, 8, 128, 0, false}}) {
        const ModelConfig config = make_config(c.H, c.Hkv, c.D, c.scaled);
        if (h.leaves_out(c.B * c.T * config.qkv_width() / 8)) {
            continue;
        }
        const RopeFrequencies frequencies = make_rope_frequencies(config);
        const int num_rotated = c.H + c.Hkv, width = config.qkv_width();
        const std::vector<bf16> qkv = random_vector<bf16>(c.B * c.T * width, h.seed);
        for (bool inverse : {false, true}) {
            const std::string label =
                format_string("%s B%lld T%lld H%d/%d D%d from %lld bf16", inverse ? "backward" : "forward",
                              (long long)c.B, (long long)c.T, c.H, c.Hkv, c.D, (long long)c.first_position);
            std::vector<double> expected = to_double(qkv);
            (inverse ? reference::rope_backward<double>
                     : reference::rope_forward<double>)(expected.data(), c.B, c.T, num_rotated, width, c.D,
                                                        rope_inverse_frequencies(config), c.first_position);
            DeviceBuffer<bf16> qkv_device(qkv);
            auto launch = [&] {
                qkv_device.upload(qkv);
                CUDA_CHECK(cudaDeviceSynchronize());
                variant.launch(qkv_device, c.B, c.T, num_rotated, width, c.D, frequencies, c.first_position, inverse,
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
    const int64_t T = (1 << 21) + 5, tail = 50;
    const int H = 8, D = 64;
    const ModelConfig config = make_config(H, H, D, false);
    const int width = config.qkv_width();
    DeviceBuffer<bf16> qkv(T * width);
    qkv.fill_random(h.seed);
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<double> expected = to_double(qkv.download((T - tail) * width, tail * width));
    reference::rope_forward<double>(expected.data(), 1, tail, 2 * H, width, D, rope_inverse_frequencies(config),
                                    T - tail);
    variant.launch(qkv, 1, T, 2 * H, width, D, make_rope_frequencies(config), 0, false, h.stream);
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
        const ModelConfig config = make_config(H, Hkv, D, false);
        const RopeFrequencies frequencies = make_rope_frequencies(config);
        DeviceBuffer<bf16> qkv(B * T * config.qkv_width());
        qkv.fill_random(h.seed);
        h.measure_bandwidth(format_string("B%lld T%lld H%d/%d D%d", (long long)B, (long long)T, H, Hkv, D),
                            4.0 * B * T * (H + Hkv) * D, variant.idea, [&, B = B, T = T, H = H, Hkv = Hkv, D = D] {
                                variant.launch(qkv, B, T, H + Hkv, config.qkv_width(), D, frequencies, 0, false,
                                               h.stream);
                            });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "rope_forward", VARIANTS, check, measure); }
