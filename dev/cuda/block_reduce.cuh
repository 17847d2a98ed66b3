// block_reduce.cuh: the sum and the maximum over a block, for the variants that give a row to a block; what ships
// reduces in ways of its own.
#pragma once
#include "llmc/cuda_common.cuh"

// Over a block of at most 1024 threads, a multiple of 32; result in every thread; the order of additions is fixed. Two
// __syncthreads.
template <float (*warp_reduce)(float)>
__device__ inline float block_reduce(float value, float identity) {
    __shared__ float warp_results[WARP_SIZE];
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const int num_warps = blockDim.x / WARP_SIZE;
    value = warp_reduce(value);
    __syncthreads();  // the previous use of warp_results is over
    if (lane == 0) {
        warp_results[warp] = value;
    }
    __syncthreads();
    return warp_reduce(lane < num_warps ? warp_results[lane] : identity);
}
__device__ inline float block_sum(float value) { return block_reduce<warp_sum>(value, 0.0f); }
__device__ inline float block_max(float value) { return block_reduce<warp_max>(value, -INFINITY); }
