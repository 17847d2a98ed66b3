// swiglu.cuh: the feed-forward gate, out = gate * s * up with s = 1 / (1 + exp(-gate)).
//   dgate = dout * up * s * (1 + gate * (1 - s)),   dup = dout * gate * s
// Shapes: gate_up [rows, 2F], gate in columns [0, F), up in [F, 2F); out [rows, F]; rows = B * T; F a multiple of 8.
// Cost: memory bound; forward moves 3F elements a row, backward 5F, 6F with the output.
// Reference: reference/swiglu.h. Variants: dev/cuda/swiglu_forward.cu, dev/cuda/swiglu_backward.cu.
#pragma once
#include "cuda_common.cuh"
#include "ptx.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr int SWIGLU_THREADS = 256;
constexpr int SWIGLU_FORWARD_PACKS = 2;   // 16-byte packs of out a thread makes: four loads in flight
constexpr int SWIGLU_BACKWARD_PACKS = 2;  // six loads in flight

// ---- device functions --------------------------------------------------------------------------
// To 2 ulp and an error of the exponential of 2^-23 for each unit of gate; no instruction for denormal numbers, which
// __expf and __fdividef spend half of theirs on.
__device__ inline float swiglu_sigmoid(float gate) { return reciprocal_approx(1.0f + exp2_approx(-LOG2_E * gate)); }
// One expression for all kernels: the same bits.
__device__ inline float swiglu_value(float gate, float up) { return gate * swiglu_sigmoid(gate) * up; }

// Eight elements of the backward, and of the forward again.
__device__ __forceinline__ void swiglu_backward_pack(bf16x8& dgates, bf16x8& dups, bf16x8& outs, const bf16x8& douts,
                                                     const bf16x8& gates, const bf16x8& ups) {
#pragma unroll
    for (int k = 0; k < bf16x8::size; ++k) {
        const float gate = __bfloat162float(gates[k]), up = __bfloat162float(ups[k]);
        const float d = __bfloat162float(douts[k]), s = swiglu_sigmoid(gate), gated = gate * s;
        dgates[k] = __float2bfloat16(d * up * (s + gated * (1.0f - s)));
        dups[k] = __float2bfloat16(d * gated);
        outs[k] = __float2bfloat16(swiglu_value(gate, up));
    }
}

// ---- forward -----------------------------------------------------------------------------------
// Launch: 1-D grid over 16-byte packs of out, SWIGLU_FORWARD_PACKS a thread, a block's packs contiguous. Bound:
// bandwidth.
__global__ void __launch_bounds__(SWIGLU_THREADS)
    swiglu_forward_kernel(bf16* out, const bf16* gate_up, int64_t num_packs, int packs_per_row) {
    const int64_t block_pack = (int64_t)blockIdx.x * (SWIGLU_THREADS * SWIGLU_FORWARD_PACKS);
    const int64_t block_row = block_pack / packs_per_row;  // the 64-bit division once, 32-bit ones from here
    const int block_column = (int)(block_pack - block_row * packs_per_row);
    bf16x8 gates[SWIGLU_FORWARD_PACKS], ups[SWIGLU_FORWARD_PACKS];
#pragma unroll
    for (int i = 0; i < SWIGLU_FORWARD_PACKS; ++i) {
        const int local = i * SWIGLU_THREADS + threadIdx.x;
        if (block_pack + local < num_packs) {
            const int row = (block_column + local) / packs_per_row;
            const int column = (block_column + local) % packs_per_row;
            const bf16* gate = gate_up + ((block_row + row) * 2 * packs_per_row + column) * 8;
            gates[i] = load128_streaming(gate);
            ups[i] = load128_streaming(gate + (int64_t)packs_per_row * 8);
        }
    }
#pragma unroll
    for (int i = 0; i < SWIGLU_FORWARD_PACKS; ++i) {
        const int64_t pack = block_pack + i * SWIGLU_THREADS + threadIdx.x;
        if (pack < num_packs) {
            bf16x8 result;
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const float gate = __bfloat162float(gates[i][k]);
                result[k] = __float2bfloat16(swiglu_value(gate, __bfloat162float(ups[i][k])));
            }
            store128(out + pack * 8, result);
        }
    }
}

// out (=) [rows, F] from gate_up [rows, 2F]. F a multiple of 8; rows * F below 2^42.
inline void swiglu_forward(bf16* out, const bf16* gate_up, int64_t rows, int F, cudaStream_t stream) {
    NVTX_RANGE();
    CHECK(rows >= 1 && F >= 8 && F % 8 == 0, "swiglu: width %d must be a multiple of 8 and rows %lld positive", F,
          (long long)rows);
    const int64_t num_packs = rows * (F / 8);
    const int64_t num_blocks = ceil_div<int64_t>(num_packs, SWIGLU_THREADS * SWIGLU_FORWARD_PACKS);
    swiglu_forward_kernel<<<num_blocks, SWIGLU_THREADS, 0, stream>>>(out, gate_up, num_packs, F / 8);
    CUDA_CHECK_LAUNCH();
}

// ---- backward ----------------------------------------------------------------------------------
// Launch: as forward, SWIGLU_BACKWARD_PACKS a thread. A thread reads what it overwrites, so results may replace inputs.
__global__ void __launch_bounds__(SWIGLU_THREADS)
    swiglu_backward_kernel(bf16* dgate_up, bf16* out, const bf16* dout, const bf16* gate_up, int64_t num_packs,
                           int packs_per_row) {
    const int64_t block_pack = (int64_t)blockIdx.x * (SWIGLU_THREADS * SWIGLU_BACKWARD_PACKS);
    const int64_t block_row = block_pack / packs_per_row;
    const int block_column = (int)(block_pack - block_row * packs_per_row);
    bf16x8 gates[SWIGLU_BACKWARD_PACKS], ups[SWIGLU_BACKWARD_PACKS], douts[SWIGLU_BACKWARD_PACKS];
    int64_t gate_offset[SWIGLU_BACKWARD_PACKS];
    const int64_t up_offset = (int64_t)packs_per_row * 8;
#pragma unroll
    for (int i = 0; i < SWIGLU_BACKWARD_PACKS; ++i) {
        const int local = i * SWIGLU_THREADS + threadIdx.x;
        if (block_pack + local < num_packs) {
            const int row = (block_column + local) / packs_per_row;
            const int column = (block_column + local) % packs_per_row;
            gate_offset[i] = ((block_row + row) * 2 * packs_per_row + column) * 8;
            gates[i] = load128_streaming(gate_up + gate_offset[i]);
            ups[i] = load128_streaming(gate_up + gate_offset[i] + up_offset);
            douts[i] = load128_streaming(dout + (block_pack + local) * 8);
        }
    }
#pragma unroll
    for (int i = 0; i < SWIGLU_BACKWARD_PACKS; ++i) {
        const int64_t pack = block_pack + i * SWIGLU_THREADS + threadIdx.x;
        if (pack < num_packs) {
            bf16x8 dgates, dups, outs;
            swiglu_backward_pack(dgates, dups, outs, douts[i], gates[i], ups[i]);
            store128(dgate_up + gate_offset[i], dgates);
            store128(dgate_up + gate_offset[i] + up_offset, dups);
            if (out != nullptr) {
                store128(out + pack * 8, outs);
            }
        }
    }
}

// dgate_up (=) [rows, 2F] from dout [rows, F] and gate_up [rows, 2F]; out (=) [rows, F] what swiglu_forward gave, bit
// for bit: the weight gradient of the product behind needs it, so that forward need not keep it; nullptr: not wanted.
// dgate_up may be gate_up, out may be dout. F a multiple of 8; rows * F below 2^42.
inline void swiglu_backward(bf16* dgate_up, bf16* out, const bf16* dout, const bf16* gate_up, int64_t rows, int F,
                            cudaStream_t stream) {
    NVTX_RANGE();
    CHECK(rows >= 1 && F >= 8 && F % 8 == 0, "swiglu: width %d must be a multiple of 8 and rows %lld positive", F,
          (long long)rows);
    const int64_t num_packs = rows * (F / 8);
    const int64_t num_blocks = ceil_div<int64_t>(num_packs, SWIGLU_THREADS * SWIGLU_BACKWARD_PACKS);
    swiglu_backward_kernel<<<num_blocks, SWIGLU_THREADS, 0, stream>>>(dgate_up, out, dout, gate_up, num_packs, F / 8);
    CUDA_CHECK_LAUNCH();
}
