// cross_entropy.cu: losses and, in place, the gradient of the logits. Bound: bandwidth, V elements of
// bf16 read and written a row (4V bytes).
#include "dev/cuda/block_reduce.cuh"
#include "dev/cuda/harness.cuh"
#include "llmc/classifier.cuh"  // the padded vocabulary
#include "llmc/reference/classifier.h"

using Launcher = void (*)(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int64_t V,
                          int64_t row_stride, float dloss, bool write_gradient, cudaStream_t stream);

// ---- 1: one block a row, three passes: maximum, sum, gradient ----------------------------------
__global__ void cross_entropy_kernel1(float* losses, bf16* logits, const int32_t* targets, int V, int64_t row_stride,
                                      float dloss, bool write_gradient) {
    bf16* row = logits + blockIdx.x * row_stride;
    float maximum = -INFINITY, sum = 0.0f;
    for (int c = threadIdx.x; c < V; c += blockDim.x) {
        maximum = fmaxf(maximum, (float)row[c]);
    }
    maximum = block_max(maximum);
    for (int c = threadIdx.x; c < V; c += blockDim.x) {
        sum += expf((float)row[c] - maximum);
    }
    const float lse = maximum + logf(block_sum(sum));
    const int target = targets[blockIdx.x];
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = lse - (float)row[target];
    }
    __syncthreads();  // the target's logit is read before it is overwritten
    for (int64_t c = threadIdx.x; write_gradient && c < row_stride; c += blockDim.x) {
        row[c] = (bf16)(c < V ? (expf((float)row[c] - lse) - (c == target ? 1.0f : 0.0f)) * dloss : 0.0f);
    }
}
static void cross_entropy1(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int64_t V,
                           int64_t row_stride, float dloss, bool write_gradient, cudaStream_t stream) {
    cross_entropy_kernel1<<<rows, 256, 0, stream>>>(losses, logits, targets, (int)V, row_stride, dloss, write_gradient);
    CUDA_CHECK_LAUNCH();
}

// ---- 2: maximum and sum in one pass, 16 bytes an access; the row is read again for the gradient -
__global__ void cross_entropy_kernel2(float* losses, bf16* logits, const int32_t* targets, int V, int64_t row_stride,
                                      float dloss, bool write_gradient) {
    bf16* row = logits + blockIdx.x * row_stride;
    const int target = targets[blockIdx.x];
    const float target_logit = row[target];
    SoftmaxState state;
    for (int c = threadIdx.x * 8; c < V; c += blockDim.x * 8) {
        const bf16x8 pack = load128(row + c);
        for (int k = 0; k < 8 && c + k < V; ++k) {
            state.join((float)pack[k], 1.0f);
        }
    }
    state = cross_entropy_row_state(state, 0);
    const float lse = state.maximum + logf(state.sum);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = lse - target_logit;
    }
    for (int c = threadIdx.x * 8; write_gradient && c < row_stride; c += blockDim.x * 8) {
        bf16x8 pack = load128(row + c);
        for (int k = 0; k < 8; ++k) {
            const float gradient = (__expf((float)pack[k] - lse) - (c + k == target ? 1.0f : 0.0f)) * dloss;
            pack[k] = (bf16)(c + k < V ? gradient : 0.0f);
        }
        store128(row + c, pack);
    }
}
static void cross_entropy2(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int64_t V,
                           int64_t row_stride, float dloss, bool write_gradient, cudaStream_t stream) {
    cross_entropy_kernel2<<<rows, 512, 0, stream>>>(losses, logits, targets, (int)V, row_stride, dloss, write_gradient);
    CUDA_CHECK_LAUNCH();
}

// ---- 3: what ships -----------------------------------------------------------------------------
static void cross_entropy3(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int64_t V,
                           int64_t row_stride, float dloss, bool write_gradient, cudaStream_t stream) {
    cross_entropy_forward_backward(losses, logits, targets, rows, V, row_stride, dloss, write_gradient, stream);
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one block a row, three passes", cross_entropy1},
    {2, "online maximum and sum, 16 bytes an access, the row read twice", cross_entropy2},
    {3,
     "short rows in registers; of long ones the next flows in as this one's gradient goes out (llmc/cross_entropy.cuh)",
     cross_entropy3},
};

// Logits that hurt: one dominant entry a row; a row of -infinity but for one; or plain random ones.
enum class LogitKind { random, dominant, masked };
static const char* kind_name(LogitKind kind) {
    return kind == LogitKind::random ? "" : kind == LogitKind::dominant ? " one dominant" : " -inf but one";
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    struct Case {
        int64_t rows, V;
        float scale;
        LogitKind kind;
    };
    for (const Case& c : {Case{1, 2, 1.0f, LogitKind::random}, Case{13, 3, 30.0f, LogitKind::random},
                          Case{13, 384, 1.0f, LogitKind::random}, Case{13, 1000, 1.0f, LogitKind::random},
                          Case{13, 2048, 1.0f, LogitKind::random}, Case{100, 257, 1.0f, LogitKind::random},
                          Case{70, 1000, 100.0f, LogitKind::random}, Case{60, 2048, 1.0f, LogitKind::dominant},
                          Case{60, 2049, 1.0f, LogitKind::masked}, Case{9, 5003, 1.0f, LogitKind::dominant},
                          Case{9, 5003, 1.0f, LogitKind::masked}, Case{600, 50257, 5.0f, LogitKind::random},
                          Case{300, 128255, 1.0f, LogitKind::random}, Case{2, 1 << 20, 1.0f, LogitKind::random}}) {
        if (h.leaves_out(c.rows * c.V)) {
            continue;
        }
        const int64_t row_stride = classifier_padded_vocab(c.V);
        const float dloss = 1.0f / 768;
        const std::string label = format_string("rows%lld V%lld scale %g%s bf16", (long long)c.rows, (long long)c.V,
                                                c.scale, kind_name(c.kind));
        const std::vector<int32_t> targets = random_indices(c.rows, h.seed, c.V);
        // The padding holds NaN: nobody may look at it.
        std::vector<bf16> logits(c.rows * row_stride, __float2bfloat16(NAN));
        std::vector<double> expected(logits.size());
        for (int64_t row = 0; row < c.rows; ++row) {
            for (int64_t v = 0; v < c.V; ++v) {
                float value = c.scale * random_normal(h.seed + 1, row * c.V + v);
                if (c.kind == LogitKind::dominant && v == targets[row] / 2) {
                    value = 300.0f;
                } else if (c.kind == LogitKind::masked && v != targets[row]) {
                    value = -INFINITY;
                }
                logits[row * row_stride + v] = __float2bfloat16(value);
            }
        }
        expected = to_double(logits);
        std::vector<double> expected_losses(c.rows);
        reference::cross_entropy_forward_backward<double>(expected_losses.data(), expected.data(), targets.data(),
                                                          c.rows, c.V, row_stride, dloss, true);
        DeviceBuffer<float> losses(c.rows);
        DeviceBuffer<bf16> logits_device(logits);
        DeviceBuffer<int32_t> targets_device(targets);
        auto launch = [&] {
            logits_device.upload(logits);
            CUDA_CHECK(cudaDeviceSynchronize());
            variant.launch(losses, logits_device, targets_device, c.rows, c.V, row_stride, dloss, true, h.stream);
        };
        launch();
        // The logarithm of a float sum, of terms good to 2^-20, next to a maximum of up to 3.5 scale.
        const double loss_limit = 0x1p-19 + 3.5 * c.scale * 0x1p-23;
        h.compare("losses", label, losses, expected_losses, loss_limit, {c.rows}, 1.0);
        // exp(logit - lse): relative error as the argument's absolute one; then one rounding to bf16.
        const double limit = unit_roundoff<bf16>() + 2.0 * loss_limit * (1.0 + 7.0 * c.scale) + 0x1p-15;
        h.compare("dlogits", label, logits_device, expected, limit, {c.rows, row_stride}, 1e-3 * dloss);
        h.compare_repeats("dlogits", label, logits_device, launch);
        logits_device.upload(logits);
        losses.poison();
        CUDA_CHECK(cudaDeviceSynchronize());
        variant.launch(losses, logits_device, targets_device, c.rows, c.V, row_stride, 0.0f, false, h.stream);
        h.compare("losses alone", label, losses, expected_losses, loss_limit, {c.rows}, 1.0);
        h.compare_exact("logits untouched", label, logits_device, logits);
        if (variant.number == 3) {
            const DeviceBuffer<int> condition(std::vector<int>{0});
            cross_entropy_forward_backward(losses, logits_device, targets_device, c.rows, c.V, row_stride, dloss, true,
                                           h.stream, condition.data());
            h.compare_exact("logits untouched under a condition", label, logits_device, logits);
        }
    }
    if (!h.small) {  // offsets beyond 2^31: the last rows are looked at
        const int64_t rows = 40001, V = 60000, row_stride = classifier_padded_vocab(V), tail = 20;
        const std::vector<int32_t> targets = random_indices(rows, h.seed, V);
        DeviceBuffer<float> losses(rows);
        DeviceBuffer<bf16> logits(rows * row_stride);
        DeviceBuffer<int32_t> targets_device(targets);
        logits.fill_random(h.seed);
        CUDA_CHECK(cudaDeviceSynchronize());
        std::vector<double> expected = to_double(logits.download((rows - tail) * row_stride, tail * row_stride));
        std::vector<double> expected_losses(tail);
        reference::cross_entropy_forward_backward<double>(expected_losses.data(), expected.data(),
                                                          targets.data() + rows - tail, tail, V, row_stride, 1.0, true);
        variant.launch(losses, logits, targets_device, rows, V, row_stride, 1.0f, true, h.stream);
        CUDA_CHECK(cudaStreamSynchronize(h.stream));
        h.compare("dlogits", format_string("rows%lld V%lld last rows", (long long)rows, (long long)V),
                  logits.download((rows - tail) * row_stride, tail * row_stride), expected,
                  unit_roundoff<bf16>() + 0x1p-14, {tail, row_stride}, 1e-3);
        // The limit of losses above.
        h.compare("losses", format_string("rows%lld V%lld last rows", (long long)rows, (long long)V),
                  losses.download(rows - tail, tail), expected_losses, 0x1p-19 + 3.5 * 0x1p-23, {tail}, 1.0);
    }
    if (variant.number < 3) {
        return;
    }
    // A target outside the vocabulary is refused by a loss of NaN: the first beyond it, with and without padding, in
    // short rows and in long ones. Losses start as numbers: untouched memory is NaN already.
    for (const int V : {60, 64, 4096, 20000, 50304}) {
        const int row_stride = (int)classifier_padded_vocab(V);
        const std::vector<int32_t> bad = {-1, 5, V, V - 1, row_stride, INT32_MAX, INT32_MIN, 0};
        const int64_t rows = (int64_t)bad.size() * 100;
        if (h.leaves_out(rows * V / 16)) {
            continue;
        }
        std::vector<int32_t> targets;
        for (int64_t row = 0; row < rows; ++row) {
            targets.push_back(bad[row % bad.size()]);
        }
        DeviceBuffer<float> losses(std::vector<float>(rows, -1.0f));
        DeviceBuffer<bf16> logits(rows * row_stride);
        DeviceBuffer<int32_t> targets_device(targets);
        logits.fill_random(h.seed);
        variant.launch(losses, logits, targets_device, rows, V, row_stride, 1.0f, true, h.stream);
        CUDA_CHECK(cudaStreamSynchronize(h.stream));
        const std::vector<float> values = losses.download();
        int num_wrong = 0;
        for (int64_t row = 0; row < rows; ++row) {
            const bool is_bad = targets[row] < 0 || targets[row] >= V;
            num_wrong += is_bad ? !std::isnan(values[row]) : !(values[row] > 0.0f && std::isfinite(values[row]));
        }
        h.expect(num_wrong == 0 && losses.guards_intact(), "losses",
                 format_string("targets outside the vocabulary, V%d", V),
                 format_string("%d of %lld wrong", num_wrong, (long long)rows));
    }
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    struct Shape {
        int64_t rows, V;
    };
    for (const auto [rows, V] : {Shape{98304, 258}, Shape{65536, 1000}, Shape{16384, 50304}, Shape{8192, 128256}}) {
        const int64_t row_stride = classifier_padded_vocab(V);
        DeviceBuffer<float> losses(rows);
        DeviceBuffer<bf16> logits(rows * row_stride);
        DeviceBuffer<int32_t> targets(random_indices(rows, h.seed, V));
        logits.fill_random(h.seed);
        // dloss 1 keeps the logits of the next repetition, which are these gradients, from vanishing.
        h.measure_bandwidth(format_string("rows%lld V%lld", (long long)rows, (long long)V), 4.0 * rows * row_stride,
                            variant.idea, [&, rows = rows, V = V] {
                                variant.launch(losses, logits, targets, rows, V, row_stride, 1.0f, true, h.stream);
                            });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "cross_entropy", VARIANTS, check, measure); }
