// embedding.cuh: the row of a table for every token. Its gradient: embedding_backward.cuh.
// Shapes: tokens [rows] in [0, V), weight [V, C], out [rows, C]; rows = B * T; C a multiple of 8.
// Cost: memory bound, moves 2C elements a row.
// Reference: reference/embedding.h. Variants: dev/cuda/embedding_forward.cu.
#pragma once
#include "cuda_common.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr int EMBEDDING_THREADS = 256;
constexpr int EMBEDDING_PACKS = 4;  // 16-byte packs a thread moves, all loads in flight before the first store

// ---- forward -----------------------------------------------------------------------------------
// Launch: 1-D grid over 16-byte packs of out, EMBEDDING_PACKS a thread, a block's packs contiguous. Bound: bandwidth.
__global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_forward_kernel(bf16* out, const int32_t* tokens, const bf16* weight, int64_t num_packs,
                             int packs_per_row) {
    const int64_t block_pack = (int64_t)blockIdx.x * (EMBEDDING_THREADS * EMBEDDING_PACKS);
    const int64_t block_row = block_pack / packs_per_row;  // the 64-bit division once, 32-bit ones from here
    const int block_column = (int)(block_pack - block_row * packs_per_row);
    bf16x8 packs[EMBEDDING_PACKS];
#pragma unroll
    for (int i = 0; i < EMBEDDING_PACKS; ++i) {
        const int local = i * EMBEDDING_THREADS + threadIdx.x;
        if (block_pack + local < num_packs) {
            const int row = (block_column + local) / packs_per_row;
            const int column = (block_column + local) % packs_per_row;
            packs[i] = load128(weight + ((int64_t)tokens[block_row + row] * packs_per_row + column) * 8);
        }
    }
#pragma unroll
    for (int i = 0; i < EMBEDDING_PACKS; ++i) {
        const int64_t pack = block_pack + i * EMBEDDING_THREADS + threadIdx.x;
        if (pack < num_packs) {
            store128(out + pack * 8, packs[i]);
        }
    }
}

// out (=) [rows, C]: the rows of weight [V, C] that tokens [rows] name; every token must be in [0, V).
// C a multiple of 8; rows * C below 2^43.
inline void embedding_forward(bf16* out, const int32_t* tokens, const bf16* weight, int64_t rows, int C,
                              cudaStream_t stream) {
    NVTX_RANGE();
    CHECK(rows >= 1 && C >= 8 && C % 8 == 0, "embedding: width %d must be a multiple of 8 and rows %lld positive", C,
          (long long)rows);
    const int64_t num_packs = rows * (C / 8);
    const int64_t num_blocks = ceil_div<int64_t>(num_packs, EMBEDDING_THREADS * EMBEDDING_PACKS);
    embedding_forward_kernel<<<num_blocks, EMBEDDING_THREADS, 0, stream>>>(out, tokens, weight, num_packs, C / 8);
    CUDA_CHECK_LAUNCH();
}
