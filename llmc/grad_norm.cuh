// grad_norm.cuh: the global gradient norm, sqrt(sum of g^2), on the device, for clipping and for refusing a bad step.
// Squares are formed and added in double, so the norm of finite float gradients is finite unless it exceeds float's
// range itself, and it is infinite or NaN when any gradient is. The order of additions is fixed.
// Cost: memory bound; reads 4 bytes a parameter.
// Reference: reference/grad_norm.h. Variants: dev/cuda/grad_norm.cu.
#pragma once
#include "cuda_common.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr int GRAD_NORM_THREADS = 512;
constexpr int GRAD_NORM_BLOCKS = 1056;  // fixed, so that the result does not depend on the GPU; 8 for each of 132 SMs
constexpr int GRAD_NORM_PACKS = 4;      // 16-byte packs in flight a thread

// ---- kernels -----------------------------------------------------------------------------------
// Launch: GRAD_NORM_BLOCKS blocks; each takes every GRAD_NORM_BLOCKS-th tile of threads * packs * 4 elements, and the
// first the up to 3 elements behind the last pack. partials (=) [GRAD_NORM_BLOCKS]. Bound: bandwidth.
__global__ void __launch_bounds__(GRAD_NORM_THREADS)
    grad_norm_partial_kernel(double* partials, const float* grads, int64_t num_elements) {
    const int64_t num_packs = num_elements / 4;
    constexpr int TILE = GRAD_NORM_THREADS * GRAD_NORM_PACKS;
    double sum = 0.0;
    for (int64_t tile = (int64_t)blockIdx.x * TILE; tile < num_packs; tile += (int64_t)GRAD_NORM_BLOCKS * TILE) {
        float4x packs[GRAD_NORM_PACKS];
#pragma unroll
        for (int i = 0; i < GRAD_NORM_PACKS; ++i) {
            const int64_t pack = tile + i * GRAD_NORM_THREADS + threadIdx.x;
            packs[i] = pack < num_packs ? load128_streaming(grads + pack * 4) : float4x{};
        }
#pragma unroll
        for (int i = 0; i < GRAD_NORM_PACKS; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const double value = packs[i][k];
                sum += value * value;
            }
        }
    }
    if (blockIdx.x == 0 && threadIdx.x < num_elements % 4) {
        const double value = grads[num_packs * 4 + threadIdx.x];
        sum += value * value;
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) {
        partials[blockIdx.x] = sum;
    }
}

// Launch: one block. norm (=) the square root of the sum of partials [GRAD_NORM_BLOCKS]. Bound: latency.
__global__ void __launch_bounds__(GRAD_NORM_THREADS) grad_norm_kernel(float* norm, const double* partials) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < GRAD_NORM_BLOCKS; i += GRAD_NORM_THREADS) {
        sum += partials[i];
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) {
        *norm = (float)sqrt(sum);
    }
}

// ---- launchers ---------------------------------------------------------------------------------
// Bytes of scratch that grad_norm needs, for any number of elements; 8-byte aligned.
inline size_t grad_norm_scratch_bytes() { return GRAD_NORM_BLOCKS * sizeof(double); }

// norm (=) device [1]: the 2-norm of grads [num_elements], 16-byte aligned. Not finite when one of them is not.
inline void grad_norm(float* norm, const float* grads, int64_t num_elements, void* scratch, cudaStream_t stream) {
    NVTX_RANGE();
    CHECK(num_elements >= 1, "gradient norm of %lld elements: there must be at least one", (long long)num_elements);
    grad_norm_partial_kernel<<<GRAD_NORM_BLOCKS, GRAD_NORM_THREADS, 0, stream>>>((double*)scratch, grads, num_elements);
    CUDA_CHECK_LAUNCH();
    grad_norm_kernel<<<1, GRAD_NORM_THREADS, 0, stream>>>(norm, (const double*)scratch);
    CUDA_CHECK_LAUNCH();
}
