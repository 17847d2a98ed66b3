// adamw.cuh: AdamW with decoupled decay (Loshchilov & Hutter 2019) on float32 master weights, clipping by the global
// norm, and the bf16 weights of the next step, in one pass.
//   g = grad * min(1, max_grad_norm / norm);  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//   master -= learning_rate * (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps) + weight_decay * master)
// A step whose loss or norm is not finite changes nothing; the host learns of it later, so nobody waits.
// Cost: memory bound; 16 bytes read and 14 written a parameter.
// Reference: reference/adamw.h. Variants: dev/cuda/adamw.cu.
#pragma once
#include <cfloat>

#include "adamw_settings.h"
#include "cuda_common.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr int ADAMW_THREADS = 256;

// AdamWSettings as the kernel takes them. 1 - beta is found in float64: of a beta near 1 float32 keeps few digits.
struct AdamWArguments {
    float learning_rate, eps, weight_decay, max_grad_norm;
    float beta1, new1, beta1_correction;  // new1 = 1 - beta1; the correction 1 - beta1^step
    float beta2, new2, beta2_correction;

    explicit AdamWArguments(const AdamWSettings& s)
        : learning_rate((float)s.learning_rate),
          eps((float)s.eps),
          weight_decay((float)s.weight_decay),
          max_grad_norm((float)s.max_grad_norm),
          beta1((float)s.beta1),
          new1((float)(1.0 - s.beta1)),
          beta1_correction((float)s.correction(s.beta1)),
          beta2((float)s.beta2),
          new2((float)(1.0 - s.beta2)),
          beta2_correction((float)s.correction(s.beta2)) {}
};

// ---- kernel ------------------------------------------------------------------------------------
// One parameter; grad is already clipped.
__device__ inline void adamw_element(float& master, float& exp_avg, float& exp_avg_sq, float grad,
                                     const AdamWArguments& a) {
    exp_avg = a.beta1 * exp_avg + a.new1 * grad;
    // Never infinite, where it would stay: without clipping a finite gradient may be that large.
    exp_avg_sq = fminf(a.beta2 * exp_avg_sq + a.new2 * grad * grad, FLT_MAX);
    const float mean = exp_avg / a.beta1_correction;
    const float deviation = sqrtf(exp_avg_sq / a.beta2_correction);
    master -= a.learning_rate * (mean / (deviation + a.eps) + a.weight_decay * master);
}

// Launch: 4 elements (16 bytes of each array) a thread, 1-D grid; the last thread may have fewer. Bound: bandwidth.
__global__ void __launch_bounds__(ADAMW_THREADS)
    adamw_kernel(float* master, float* exp_avg, float* exp_avg_sq, bf16* weights, const float* grads,
                 const float* grad_norm, const float* loss, int64_t num_elements, AdamWArguments a) {
    const float norm = *grad_norm;
    if (!isfinite(norm) || !isfinite(*loss)) {
        return;
    }
    const float clip = a.max_grad_norm > 0.0f && norm > a.max_grad_norm ? a.max_grad_norm / norm : 1.0f;
    const int64_t i = ((int64_t)blockIdx.x * ADAMW_THREADS + threadIdx.x) * 4;
    if (i + 4 <= num_elements) {
        const float4x g = load128_streaming(grads + i);
        float4x p = load128_streaming(master + i);
        float4x m = load128_streaming(exp_avg + i);
        float4x v = load128_streaming(exp_avg_sq + i);
        alignas(8) bf16 w[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            adamw_element(p[k], m[k], v[k], g[k] * clip, a);
            w[k] = __float2bfloat16(p[k]);
        }
        store128_streaming(master + i, p);
        store128_streaming(exp_avg + i, m);
        store128_streaming(exp_avg_sq + i, v);
        *reinterpret_cast<uint2*>(weights + i) = *reinterpret_cast<const uint2*>(w);
    } else {
        for (int64_t k = i; k < num_elements; ++k) {
            adamw_element(master[k], exp_avg[k], exp_avg_sq[k], grads[k] * clip, a);
            weights[k] = __float2bfloat16(master[k]);
        }
    }
}

// ---- launcher ----------------------------------------------------------------------------------
// master, exp_avg, exp_avg_sq (in place), weights (=) bf16 of master, all [num_elements]; grads [num_elements]
// unclipped. grad_norm and loss: device [1]; when either is not finite nothing is written. All 16-byte aligned (weights
// 8-byte); num_elements up to 2^40.
inline void adamw_update(float* master, float* exp_avg, float* exp_avg_sq, bf16* weights, const float* grads,
                         const float* grad_norm, const float* loss, int64_t num_elements, const AdamWSettings& settings,
                         cudaStream_t stream) {
    NVTX_RANGE();
    CHECK(num_elements >= 1, "AdamW on %lld elements: there must be at least one", (long long)num_elements);
    adamw_kernel<<<ceil_div<int64_t>(num_elements, ADAMW_THREADS * 4), ADAMW_THREADS, 0, stream>>>(
        master, exp_avg, exp_avg_sq, weights, grads, grad_norm, loss, num_elements, AdamWArguments(settings));
    CUDA_CHECK_LAUNCH();
}
