// adamw.cu: clipping, AdamW on float32 master weights and the bf16 weights. Bound: bandwidth, 30 bytes a parameter.
#include "dev/cuda/harness.cuh"
#include "llmc/adamw.cuh"
#include "llmc/reference/adamw.h"

using Launcher = void (*)(float* master, float* exp_avg, float* exp_avg_sq, bf16* weights, const float* grads,
                          const float* grad_norm, const float* loss, int64_t num_elements,
                          const AdamWSettings& settings, cudaStream_t stream);

// ---- 1: one thread an element ------------------------------------------------------------------
__global__ void adamw_kernel1(float* master, float* exp_avg, float* exp_avg_sq, bf16* weights, const float* grads,
                              const float* grad_norm, const float* loss, int64_t num_elements, AdamWArguments a) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_elements || !isfinite(*grad_norm) || !isfinite(*loss)) {
        return;
    }
    const float clip = a.max_grad_norm > 0.0f && *grad_norm > a.max_grad_norm ? a.max_grad_norm / *grad_norm : 1.0f;
    adamw_element(master[i], exp_avg[i], exp_avg_sq[i], grads[i] * clip, a);
    weights[i] = __float2bfloat16(master[i]);
}
static void adamw1(float* master, float* exp_avg, float* exp_avg_sq, bf16* weights, const float* grads,
                   const float* grad_norm, const float* loss, int64_t num_elements, const AdamWSettings& settings,
                   cudaStream_t stream) {
    adamw_kernel1<<<ceil_div<int64_t>(num_elements, 256), 256, 0, stream>>>(
        master, exp_avg, exp_avg_sq, weights, grads, grad_norm, loss, num_elements, AdamWArguments(settings));
    CUDA_CHECK_LAUNCH();
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one thread an element", adamw1},
    {2, "four elements a thread, 16 bytes an access (llmc/adamw.cuh)", adamw_update},
};

static AdamWSettings settings_of(double beta2, double max_grad_norm) {
    AdamWSettings settings;
    settings.learning_rate = 3e-3, settings.beta2 = beta2, settings.max_grad_norm = max_grad_norm;
    settings.adam_step = 3;
    return settings;
}

// Without clipping, gradients whose squares float32 does not hold: nothing becomes infinite.
static void check_large_gradients(Harness& h, const Variant<Launcher>& variant) {
    const AdamWSettings settings = settings_of(0.95, 0.0);
    const std::vector<float> large = {9e19f, -3e38f, 1.0f, 8e19f, 2e19f};
    const int64_t n = (int64_t)large.size();
    DeviceBuffer<float> master(n), m(n), v(n), grads(large), norm(std::vector<float>{3e38f}),
        loss(std::vector<float>{3.0f});
    DeviceBuffer<bf16> weights(n);
    master.fill_random(h.seed);
    m.fill_random(h.seed + 1);
    v.upload(std::vector<float>(n, 0.5f));
    CUDA_CHECK(cudaDeviceSynchronize());
    variant.launch(master, m, v, weights, grads, norm, loss, n, settings, h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    bool finite = true;
    for (DeviceBuffer<float>* buffer : {&master, &m, &v}) {
        for (const float value : buffer->download()) {
            finite = finite && std::isfinite(value);
        }
    }
    h.expect(finite, "large gradients", "no clipping", "all state is finite");
}

// Elements, what beta2 is (of the last, 1 - beta2 in float32 would be a fifth too large), and the gradient's norm:
// below the clipping norm, above it, or refused.
static void check_case(Harness& h, const Variant<Launcher>& variant, int64_t n, double beta2, float norm_value) {
    const AdamWSettings settings = settings_of(beta2, 1.0);
    const std::vector<float> master = random_vector<float>(n, h.seed), m = random_vector<float>(n, h.seed + 1, 0.1f);
    const std::vector<float> grads = random_vector<float>(n, h.seed + 2, 0.1f);
    std::vector<float> v = random_vector<float>(n, h.seed + 3, 0.1f);
    for (float& value : v) {
        value *= value * (float)settings.correction(beta2);  // as large as three such gradients leave it
    }
    const std::vector<bf16> weights = convert<bf16>(master);
    std::vector<double> expected[3] = {to_double(master), to_double(m), to_double(v)};
    std::vector<float> plain[3] = {master, m, v};
    reference::adamw_update<double>(expected[0].data(), expected[1].data(), expected[2].data(), to_double(grads).data(),
                                    norm_value, 3.0, n, settings);
    reference::adamw_update<float>(plain[0].data(), plain[1].data(), plain[2].data(), grads.data(), norm_value, 3.0, n,
                                   settings);
    DeviceBuffer<float> master_device(master), m_device(m), v_device(v), grads_device(grads);
    DeviceBuffer<float> norm(std::vector<float>{norm_value}), loss(std::vector<float>{3.0f});
    DeviceBuffer<bf16> weights_device(weights);
    auto launch = [&] {
        master_device.upload(master);
        m_device.upload(m);
        v_device.upload(v);
        CUDA_CHECK(cudaDeviceSynchronize());
        variant.launch(master_device, m_device, v_device, weights_device, grads_device, norm, loss, n, settings,
                       h.stream);
    };
    launch();
    const std::string label = format_string("n%lld beta2 %.7f norm %g", (long long)n, beta2, norm_value);
    if (!std::isfinite(norm_value)) {
        h.compare_exact("master", label, master_device, master);
        h.compare_exact("exp_avg", label, m_device, m);
        h.compare_exact("exp_avg_sq", label, v_device, v);
        h.compare_exact("weights", label, weights_device, weights);
        return;
    }
    h.compare("master", label, master_device, expected[0], twice_plain_error<float>(plain[0], expected[0]));
    h.compare("exp_avg", label, m_device, expected[1], twice_plain_error<float>(plain[1], expected[1]));
    h.compare("exp_avg_sq", label, v_device, expected[2], twice_plain_error<float>(plain[2], expected[2]));
    h.compare_exact("weights", label, weights_device, convert<bf16>(master_device.download()));
    h.compare_repeats("master", label, master_device, launch);
    const std::vector<float> before = master_device.download();
    loss.upload({NAN});
    CUDA_CHECK(cudaDeviceSynchronize());
    variant.launch(master_device, m_device, v_device, weights_device, grads_device, norm, loss, n, settings, h.stream);
    h.compare_exact("master", label + ", loss NaN", master_device, before);
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    check_large_gradients(h, variant);
    for (int64_t n : {1, 3, 4, 1023, 1025, 100001}) {
        for (double beta2 : {0.95, 0.9999999}) {
            for (float norm_value : {0.5f, 4.0f, INFINITY, NAN}) {
                if (!h.leaves_out(n)) {
                    check_case(h, variant, n, beta2, norm_value);
                }
            }
        }
    }
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    for (int64_t n : {(int64_t)124000000, (int64_t)530000000}) {
        DeviceBuffer<float> master(n), m(n), v(n), grads(n), norm(std::vector<float>{2.0f}),
            loss(std::vector<float>{3.0f});
        DeviceBuffer<bf16> weights(n);
        master.fill_random(h.seed);
        m.fill_random(h.seed + 1, 0.1f);
        CUDA_CHECK(cudaMemcpy(v, m, m.num_bytes(), cudaMemcpyDeviceToDevice));
        grads.fill_random(h.seed + 2, 0.1f);
        h.measure_bandwidth(format_string("n%lld", (long long)n), 30.0 * n, variant.idea, [&] {
            variant.launch(master, m, v, weights, grads, norm, loss, n, settings_of(0.95, 1.0), h.stream);
        });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "adamw", VARIANTS, check, measure); }
