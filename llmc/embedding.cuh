// embedding.cuh: the row of a table for every token, and its gradient, which adds up the rows of equal tokens.
// Shapes: tokens [rows] in [0, V), weight [V, C], out [rows, C]; rows = B * T; C a multiple of 8.
// Cost: memory bound; forward moves 2C elements a row. Backward reads each row of dout once, wherever it lies.
// Backward is deterministic: a stable sort brings equal tokens together, and every sum has a fixed order. A run of
// equal tokens may be as long as the batch (byte-level text), so runs are cut into chunks that are summed in parallel.
// Reference: reference/embedding.h. Variants: dev/cuda/embedding_forward.cu, dev/cuda/embedding_backward.cu.
#pragma once
#include <algorithm>
#include <cub/device/device_radix_sort.cuh>

#include "cuda_common.cuh"
#include "gpu_properties.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr int EMBEDDING_THREADS = 256;
constexpr int EMBEDDING_PACKS = 4;  // 16-byte packs a thread moves, all loads in flight before the first store
constexpr int EMBEDDING_BACKWARD_THREADS = 128;  // a block's columns: 8 a thread
constexpr int EMBEDDING_BACKWARD_ROWS = 8;       // rows of dout loaded before the first is added
constexpr int EMBEDDING_MIN_CHUNK = 64;          // sorted positions a block sums
constexpr int EMBEDDING_MAX_CHUNKS = 2048;       // so that partial sums take little memory however many rows there are
constexpr int EMBEDDING_JOIN_COLUMNS = 32;       // a block of the second stage: columns x slices of a run's chunks
constexpr int EMBEDDING_JOIN_SLICES = 16;

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

// ---- backward ----------------------------------------------------------------------------------
// What cub's sort of (token, row) pairs asks for on the current device. Where there is none, an estimate from above: a
// second copy of both arrays, and counts of 256 digits for every few thousand elements.
inline size_t embedding_sort_bytes(int64_t rows, int token_bits) {
    if (assumed_gpu()) {
        return rows * (2 * sizeof(int32_t) + 1) + ((size_t)1 << 20);
    }
    size_t num_bytes = 0;
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(nullptr, num_bytes, (const uint32_t*)nullptr, (uint32_t*)nullptr,
                                               (const int32_t*)nullptr, (int32_t*)nullptr, (int)rows, 0, token_bits));
    return num_bytes;
}

// Where embedding_backward keeps what, in its scratch memory.
struct EmbeddingBackwardPlan {
    int chunk;  // sorted positions a chunk
    int64_t num_chunks;
    int token_bits;  // that the sort looks at
    size_t sort_bytes;
    size_t sorted_tokens, row_of, sorted_row_of, partials, total_bytes;  // byte offsets; the sort's own memory is at 0

    EmbeddingBackwardPlan(int64_t rows, int C, int64_t V) {
        CHECK(
            rows >= 1 && rows < (int64_t)1 << 31 && C >= 8 && C % 8 == 0 && V >= 1 && V <= (int64_t)1 << 31,
            "embedding: width %d must be a multiple of 8, rows %lld from 1 to 2^31 - 1, vocabulary %lld from 1 to 2^31",
            C, (long long)rows, (long long)V);
        chunk = (int)std::max<int64_t>(EMBEDDING_MIN_CHUNK, ceil_div<int64_t>(rows, EMBEDDING_MAX_CHUNKS));
        num_chunks = ceil_div<int64_t>(rows, chunk);
        token_bits = 1;
        while (((int64_t)1 << token_bits) < V) {
            ++token_bits;
        }
        sort_bytes = embedding_sort_bytes(rows, token_bits);
        const size_t index_bytes = round_up<size_t>(rows * sizeof(int32_t), 256);
        sorted_tokens = round_up<size_t>(sort_bytes, 256);
        row_of = sorted_tokens + index_bytes;
        sorted_row_of = row_of + index_bytes;
        partials = sorted_row_of + index_bytes;
        total_bytes = partials + 2 * num_chunks * C * sizeof(float);
    }
};

// Launch: one thread a row. row_of (=) 0, 1, 2, ...
__global__ void __launch_bounds__(EMBEDDING_THREADS) embedding_backward_rows_kernel(int32_t* row_of, int rows) {
    const int64_t i = (int64_t)blockIdx.x * EMBEDDING_THREADS + threadIdx.x;
    if (i < rows) {
        row_of[i] = (int32_t)i;
    }
}

// Launch: block (column tile, chunk) along x, column tiles fastest; a thread owns 8 columns and walks the chunk's
// sorted positions. Bound: bandwidth, reading rows * C elements of dout. A run of equal tokens inside the chunk is
// added to dweight here: no other block has that token. A run that goes on beyond the chunk leaves its sum in partials
// [num_chunks, 2, C]: 0 the run that came in from the chunk before (the whole chunk may be inside it), 1 the one that
// starts here and leaves.
__global__ void __launch_bounds__(EMBEDDING_BACKWARD_THREADS)
    embedding_backward_chunk_kernel(float* dweight, float* partials, const bf16* dout, const uint32_t* sorted_tokens,
                                    const int32_t* sorted_row_of, int rows, int chunk, int num_column_tiles, int C) {
    const int64_t chunk_index = blockIdx.x / num_column_tiles;
    const int column = (int)(blockIdx.x % num_column_tiles * EMBEDDING_BACKWARD_THREADS + threadIdx.x) * 8;
    const int64_t begin = chunk_index * chunk;
    const int64_t end = min(begin + chunk, (int64_t)rows);
    if (column >= C) {
        return;
    }
    const bool first_run_came_in = begin > 0 && sorted_tokens[begin - 1] == sorted_tokens[begin];
    const bool last_run_leaves = end < rows && sorted_tokens[end] == sorted_tokens[end - 1];
    bool is_first_run = true;
    float sum[8] = {};
    auto finish_run = [&](uint32_t token, bool leaves) {
        const bool came_in = is_first_run && first_run_came_in;
        float* to = dweight + (int64_t)token * C + column;
        if (came_in || leaves) {
            to = partials + (chunk_index * 2 + (came_in ? 0 : 1)) * C + column;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float4x old = {};
            if (!(came_in || leaves)) {
                old = load128(to + half * 4);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                old[k] += sum[half * 4 + k];
                sum[half * 4 + k] = 0.0f;
            }
            store128(to + half * 4, old);
        }
        is_first_run = false;
    };
    uint32_t run_token = sorted_tokens[begin];
    for (int64_t position = begin; position < end; position += EMBEDDING_BACKWARD_ROWS) {
        uint32_t token[EMBEDDING_BACKWARD_ROWS];
        bf16x8 row[EMBEDDING_BACKWARD_ROWS];
#pragma unroll
        for (int i = 0; i < EMBEDDING_BACKWARD_ROWS; ++i) {
            token[i] = sorted_tokens[min(position + i, end - 1)];
            row[i] = {};  // beyond the end: zeros, added to the last run
            if (position + i < end) {
                row[i] = load128_streaming(dout + (int64_t)sorted_row_of[position + i] * C + column);
            }
        }
#pragma unroll
        for (int i = 0; i < EMBEDDING_BACKWARD_ROWS; ++i) {
            if (token[i] != run_token) {
                finish_run(run_token, false);
                run_token = token[i];
            }
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                sum[k] += __bfloat162float(row[i][k]);
            }
        }
    }
    finish_run(run_token, last_run_leaves);
}

// Launch: block (column tile, chunk) along x, column tiles fastest; threads EMBEDDING_JOIN_COLUMNS x
// EMBEDDING_JOIN_SLICES. The block of a chunk in which a run starts that leaves it adds up that run's partial sums:
// each slice takes every EMBEDDING_JOIN_SLICES-th chunk, then the slices are added in order.
__global__ void __launch_bounds__(EMBEDDING_JOIN_COLUMNS* EMBEDDING_JOIN_SLICES)
    embedding_backward_join_kernel(float* dweight, const float* partials, const uint32_t* sorted_tokens, int rows,
                                   int chunk, int num_column_tiles, int C) {
    __shared__ float slice_sums[EMBEDDING_JOIN_SLICES][EMBEDDING_JOIN_COLUMNS];
    const int64_t first_chunk = blockIdx.x / num_column_tiles;
    const int64_t begin = first_chunk * chunk, end = begin + chunk;
    if (end >= rows) {
        return;  // nothing leaves the last chunk
    }
    const uint32_t token = sorted_tokens[end - 1];
    const bool run_starts_here = sorted_tokens[begin] != token || begin == 0 || sorted_tokens[begin - 1] != token;
    if (sorted_tokens[end] != token || !run_starts_here) {
        return;
    }
    // The last chunk that starts inside the run, by bisection over the sorted tokens.
    int64_t last_chunk = first_chunk + 1, beyond = (rows + (int64_t)chunk - 1) / chunk;
    while (beyond - last_chunk > 1) {
        const int64_t middle = (last_chunk + beyond) / 2;
        (sorted_tokens[middle * chunk] == token ? last_chunk : beyond) = middle;
    }
    const int column = blockIdx.x % num_column_tiles * EMBEDDING_JOIN_COLUMNS + threadIdx.x;
    float sum = 0.0f;
    if (column < C) {
        if (threadIdx.y == 0) {
            sum = partials[(first_chunk * 2 + 1) * C + column];
        }
#pragma unroll 8
        for (int64_t i = first_chunk + 1 + threadIdx.y; i <= last_chunk; i += EMBEDDING_JOIN_SLICES) {
            sum += partials[i * 2 * C + column];
        }
    }
    slice_sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < C) {
        for (int slice = 1; slice < EMBEDDING_JOIN_SLICES; ++slice) {
            sum += slice_sums[slice][threadIdx.x];
        }
        dweight[(int64_t)token * C + column] += sum;
    }
}

// Bytes of scratch that embedding_backward needs; 256-byte aligned.
inline size_t embedding_backward_scratch_bytes(int64_t rows, int C, int64_t V) {
    return EmbeddingBackwardPlan(rows, C, V).total_bytes;
}

// dweight (+=) [V, C]: row v gains the sum of the rows of dout [rows, C] whose token is v. Bit-repeatable.
// C a multiple of 8; rows below 2^31; scratch as embedding_backward_scratch_bytes says.
inline void embedding_backward(float* dweight, const bf16* dout, const int32_t* tokens, void* scratch, int64_t rows,
                               int C, int64_t V, cudaStream_t stream) {
    NVTX_RANGE();
    EmbeddingBackwardPlan plan(rows, C, V);
    char* base = (char*)scratch;
    uint32_t* sorted_tokens = (uint32_t*)(base + plan.sorted_tokens);
    int32_t* row_of = (int32_t*)(base + plan.row_of);
    int32_t* sorted_row_of = (int32_t*)(base + plan.sorted_row_of);
    float* partials = (float*)(base + plan.partials);

    embedding_backward_rows_kernel<<<ceil_div<int64_t>(rows, EMBEDDING_THREADS), EMBEDDING_THREADS, 0, stream>>>(
        row_of, (int)rows);
    CUDA_CHECK_LAUNCH();
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(scratch, plan.sort_bytes, (const uint32_t*)tokens, sorted_tokens,
                                               (const int32_t*)row_of, sorted_row_of, (int)rows, 0, plan.token_bits,
                                               stream));
    const int chunk_tiles = ceil_div(C, EMBEDDING_BACKWARD_THREADS * 8);
    embedding_backward_chunk_kernel<<<plan.num_chunks * chunk_tiles, EMBEDDING_BACKWARD_THREADS, 0, stream>>>(
        dweight, partials, dout, sorted_tokens, sorted_row_of, (int)rows, plan.chunk, chunk_tiles, C);
    CUDA_CHECK_LAUNCH();
    const int join_tiles = ceil_div(C, EMBEDDING_JOIN_COLUMNS);
    embedding_backward_join_kernel<<<plan.num_chunks * join_tiles, dim3(EMBEDDING_JOIN_COLUMNS, EMBEDDING_JOIN_SLICES),
                                     0, stream>>>(dweight, partials, sorted_tokens, (int)rows, plan.chunk, join_tiles,
                                                  C);
    CUDA_CHECK_LAUNCH();
}
