// grad_norm.cu: the 2-norm of all gradients. Bound: bandwidth, 4 bytes a parameter, read.
#include "dev/cuda/harness.cuh"
#include "llmc/grad_norm.cuh"
#include "llmc/reference/grad_norm.h"

using Launcher = void (*)(float* norm, const float* grads, int64_t num_elements, void* scratch, cudaStream_t stream);

// ---- 1: one block ------------------------------------------------------------------------------
__global__ void grad_norm_kernel1(float* norm, const float* grads, int64_t num_elements) {
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < num_elements; i += blockDim.x) {
        sum += (double)grads[i] * grads[i];
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) {
        *norm = (float)sqrt(sum);
    }
}
static void grad_norm1(float* norm, const float* grads, int64_t num_elements, void*, cudaStream_t stream) {
    grad_norm_kernel1<<<1, 1024, 0, stream>>>(norm, grads, num_elements);
    CUDA_CHECK_LAUNCH();
}

// ---- 2: blocks over the whole GPU, 4 bytes an access -------------------------------------------
__global__ void grad_norm_kernel2(double* partials, const float* grads, int64_t num_elements) {
    double sum = 0.0;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < num_elements;
         i += (int64_t)gridDim.x * blockDim.x) {
        sum += (double)grads[i] * grads[i];
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) {
        partials[blockIdx.x] = sum;
    }
}
static void grad_norm2(float* norm, const float* grads, int64_t num_elements, void* scratch, cudaStream_t stream) {
    grad_norm_kernel2<<<GRAD_NORM_BLOCKS, 512, 0, stream>>>((double*)scratch, grads, num_elements);
    CUDA_CHECK_LAUNCH();
    grad_norm_kernel<<<1, GRAD_NORM_THREADS, 0, stream>>>(norm, (const double*)scratch);
    CUDA_CHECK_LAUNCH();
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one block", grad_norm1},
    {2, "two stages, 4 bytes an access", grad_norm2},
    {3, "two stages, 16 bytes an access, several in flight (llmc/grad_norm.cuh)", grad_norm},
};

static void check(Harness& h, const Variant<Launcher>& variant) {
    DeviceBuffer<float> norm(1);
    for (int64_t n : {1, 2, 3, 4, 5, 1023, 1000003, 9000000}) {
        if (h.leaves_out(n / 16)) {
            continue;
        }
        for (float scale : {1.0f, 1e30f, 1e-30f}) {  // squares of the last two leave float's range
            const std::vector<float> grads = random_vector<float>(n, h.seed, scale);
            const double expected = reference::grad_norm(grads.data(), n);
            DeviceBuffer<float> grads_device(grads);
            DeviceBuffer<unsigned char> scratch(grad_norm_scratch_bytes());
            auto launch = [&] { variant.launch(norm, grads_device, n, scratch, h.stream); };
            launch();
            const std::string label = format_string("n%lld scale %g", (long long)n, scale);
            h.compare("norm", label, norm, {expected}, unit_roundoff<float>() * 1.01, {1}, 0.0);
            h.compare_repeats("norm", label, norm, launch);
        }
    }
    if (variant.number == VARIANTS.back().number && !h.small) {
        // Offsets beyond 2^31: nothing but the last elements counts.
        const int64_t n = ((int64_t)1 << 31) + 4099, tail = 1001;
        const std::vector<float> last = random_vector<float>(tail, h.seed);
        DeviceBuffer<float> grads_device(n);
        DeviceBuffer<unsigned char> scratch(grad_norm_scratch_bytes());
        CUDA_CHECK(cudaMemset(grads_device, 0, grads_device.num_bytes()));
        CUDA_CHECK(cudaMemcpy(grads_device + (n - tail), last.data(), tail * sizeof(float), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaDeviceSynchronize());
        variant.launch(norm, grads_device, n, scratch, h.stream);
        CUDA_CHECK(cudaStreamSynchronize(h.stream));
        h.compare("norm", format_string("n%lld, zero but for the last %lld", (long long)n, (long long)tail), norm,
                  {reference::grad_norm(last.data(), tail)}, unit_roundoff<float>() * 1.01, {1}, 0.0);
    }
    for (float bad : {NAN, INFINITY, -INFINITY}) {
        for (int64_t at : {0, 1002, 1006}) {
            std::vector<float> grads = random_vector<float>(1007, h.seed);
            grads[at] = bad;
            DeviceBuffer<float> grads_device(grads);
            DeviceBuffer<unsigned char> scratch(grad_norm_scratch_bytes());
            variant.launch(norm, grads_device, 1007, scratch, h.stream);
            CUDA_CHECK(cudaStreamSynchronize(h.stream));
            h.expect(!std::isfinite(norm.download()[0]), "norm", format_string("%g at %lld", bad, (long long)at),
                     "is not finite");
        }
    }
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    for (int64_t n : {(int64_t)124000000, (int64_t)530000000}) {
        DeviceBuffer<float> grads(n), norm(1);
        DeviceBuffer<unsigned char> scratch(grad_norm_scratch_bytes());
        grads.fill_random(h.seed);
        h.measure_bandwidth(format_string("n%lld", (long long)n), 4.0 * n, variant.idea,
                            [&] { variant.launch(norm, grads, n, scratch, h.stream); });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "grad_norm", VARIANTS, check, measure); }
