// attention_truth.cuh: attention forward and backward in float64 on the GPU, for checking kernels at sizes where a CPU
// loop would take minutes. Naive: the whole score matrix is kept, a thread an output. Itself checked against
// llmc/reference/attention.h at small sizes, first of all in flash_attention_forward.cu and flash_attention_backward.cu
// (check_attention_truth in flash_attention_cases.cuh).
//
// With `rounded`, P and dS are rounded to bf16 before they are multiplied and out to bf16 before delta, as any
// attention with bf16 operands does: the distance of this result from the exact one is the error that the format itself
// costs, and kernels are allowed twice that.
#pragma once
#include <vector>

#include "harness.cuh"
#include "llmc/attention_shape.cuh"

struct AttentionTruth {
    // [B, T, H, D] contiguous (dk, dv: Hkv), lse [B, H, Tq]
    std::vector<double> out, lse, dq, dk, dv;
};

__device__ inline double truth_round(double x, bool rounded) {
    return rounded ? (double)__bfloat162float(__float2bfloat16((float)x)) : x;
}

struct TruthArguments {
    HeadView<const bf16> q, k, v, dout;
    AttentionShape shape;
    double *p, *ds;  // [B, H, Tq, Tk]
    double *out, *lse, *dq, *dk, *dv;
    bool rounded;
};

// A block of 256 threads a query row of a head: its row of P, its out and lse; then its row of dS.
static __global__ void truth_rows_kernel(TruthArguments a) {
    __shared__ double partial[256];
    const int64_t row = blockIdx.x, t = row % a.shape.Tq, head = row / a.shape.Tq;
    const int64_t b = head / a.shape.H, h = head % a.shape.H, h_kv = h / (a.shape.H / a.shape.Hkv);
    const int D = a.shape.D;
    const int64_t keys = a.shape.causal ? max((int64_t)0, min(a.shape.Tk, t + a.shape.causal_offset + 1)) : a.shape.Tk;
    double* p = a.p + row * a.shape.Tk;
    double* ds = a.ds + row * a.shape.Tk;
    auto reduce = [&](double value, bool take_max) {
        partial[threadIdx.x] = value;
        __syncthreads();
        for (int width = 128; width > 0; width /= 2) {
            if ((int)threadIdx.x < width) {
                const double other = partial[threadIdx.x + width];
                partial[threadIdx.x] = take_max ? fmax(partial[threadIdx.x], other) : partial[threadIdx.x] + other;
            }
            __syncthreads();
        }
        const double result = partial[0];
        __syncthreads();
        return result;
    };
    double largest = -INFINITY;
    for (int64_t j = threadIdx.x; j < a.shape.Tk; j += 256) {
        double score = 0.0;
        for (int d = 0; d < D; ++d) {
            score += (double)__bfloat162float(a.q.row(b, t, h)[d]) * (double)__bfloat162float(a.k.row(b, j, h_kv)[d]);
        }
        p[j] = j < keys ? score * a.shape.scale : -INFINITY;
        largest = fmax(largest, p[j]);
    }
    largest = reduce(largest, true);
    double sum = 0.0;
    for (int64_t j = threadIdx.x; j < a.shape.Tk; j += 256) {
        p[j] = j < keys ? exp(p[j] - largest) : 0.0;
        sum += p[j];
    }
    sum = reduce(sum, false);
    if (threadIdx.x == 0) {
        a.lse[row] = keys > 0 ? largest + log(sum) : -INFINITY;
    }
    for (int64_t j = threadIdx.x; j < a.shape.Tk; j += 256) {
        p[j] = keys > 0 ? p[j] / sum : 0.0;
    }
    __syncthreads();
    double delta = 0.0;
    for (int d = threadIdx.x; d < D; d += 256) {
        double value = 0.0;
        for (int64_t j = 0; j < keys; ++j) {
            value += truth_round(p[j], a.rounded) * (double)__bfloat162float(a.v.row(b, j, h_kv)[d]);
        }
        value = truth_round(value, a.rounded);
        a.out[((b * a.shape.Tq + t) * a.shape.H + h) * D + d] = value;
        delta += value * (double)__bfloat162float(a.dout.row(b, t, h)[d]);
    }
    delta = reduce(delta, false);
    for (int64_t j = threadIdx.x; j < a.shape.Tk; j += 256) {
        double dp = 0.0;
        for (int d = 0; d < D; ++d) {
            dp += (double)__bfloat162float(a.dout.row(b, t, h)[d]) * (double)__bfloat162float(a.v.row(b, j, h_kv)[d]);
        }
        ds[j] = truth_round(p[j] * (dp - delta), a.rounded);
        p[j] = truth_round(p[j], a.rounded);
    }
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += 256) {
        double value = 0.0;
        for (int64_t j = 0; j < keys; ++j) {
            value += ds[j] * (double)__bfloat162float(a.k.row(b, j, h_kv)[d]);
        }
        a.dq[((b * a.shape.Tq + t) * a.shape.H + h) * D + d] = value * a.shape.scale;
    }
}
// A block of D threads a key row of a key/value head: its dk and dv.
static __global__ void truth_keys_kernel(TruthArguments a) {
    const int64_t j = blockIdx.x % a.shape.Tk, head = blockIdx.x / a.shape.Tk;
    const int64_t b = head / a.shape.Hkv, h_kv = head % a.shape.Hkv;
    const int d = threadIdx.x, group = a.shape.H / a.shape.Hkv;
    double dk = 0.0, dv = 0.0;
    for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
        for (int64_t t = 0; t < a.shape.Tq; ++t) {
            const int64_t at = ((b * a.shape.H + h) * a.shape.Tq + t) * a.shape.Tk + j;
            dk += a.ds[at] * (double)__bfloat162float(a.q.row(b, t, h)[d]);
            dv += a.p[at] * (double)__bfloat162float(a.dout.row(b, t, h)[d]);
        }
    }
    const int64_t at = ((b * a.shape.Tk + j) * a.shape.Hkv + h_kv) * a.shape.D + d;
    a.dk[at] = dk * a.shape.scale;
    a.dv[at] = dv;
}

inline AttentionTruth attention_truth(HeadView<const bf16> q, HeadView<const bf16> k, HeadView<const bf16> v,
                                      HeadView<const bf16> dout, const AttentionShape& s, bool rounded) {
    const int64_t rows = (int64_t)s.B * s.H * s.Tq, key_rows = (int64_t)s.B * s.Hkv * s.Tk;
    DeviceBuffer<double> p(rows * s.Tk), ds(rows * s.Tk), out(rows * s.D), lse(rows), dq(rows * s.D),
        dk(key_rows * s.D), dv(key_rows * s.D);
    const TruthArguments a{q, k, v, dout, s, p, ds, out, lse, dq, dk, dv, rounded};
    truth_rows_kernel<<<(unsigned)rows, 256>>>(a);
    CUDA_CHECK_LAUNCH();
    truth_keys_kernel<<<(unsigned)key_rows, s.D>>>(a);
    CUDA_CHECK_LAUNCH();
    CUDA_CHECK(cudaDeviceSynchronize());
    return {out.download(), lse.download(), dq.download(), dk.download(), dv.download()};
}
