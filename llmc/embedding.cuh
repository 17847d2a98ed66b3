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
constexpr int EMBEDDING_BACKWARD_THREADS = 128;      // of a block, at most: 8 columns each
constexpr int EMBEDDING_BACKWARD_BLOCKS_PER_SM = 4;  // one wave of them: more chunks are slower (H100)
constexpr int EMBEDDING_BACKWARD_ROWS = 8;           // rows of dout loaded before the first is added
constexpr int EMBEDDING_MIN_CHUNK = WARP_SIZE;       // sorted positions of a chunk
constexpr int EMBEDDING_JOIN_WARPS = 16;             // chunks that a block of the second stage looks at
constexpr int EMBEDDING_JOIN_SHORT = 8;              // chunks of a run that a warp adds up alone

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

// How embedding_backward cuts its work, and where it keeps what in its scratch memory.
struct EmbeddingBackwardPlan {
    int column_tiles, threads;  // of the blocks: threads own 8 columns each
    int chunk;                  // sorted positions a chunk
    int num_chunks;
    int token_bits;  // that the sort looks at
    size_t sort_bytes;
    size_t sorted_tokens, row_of, sorted_row_of, partials, total_bytes;  // byte offsets; the sort's own memory is at 0

    EmbeddingBackwardPlan(int64_t rows, int C, int64_t V) {
        CHECK(
            rows >= 1 && rows < (int64_t)1 << 31 && C >= 8 && C % 8 == 0 && V >= 1 && V <= (int64_t)1 << 31,
            "embedding: width %d must be a multiple of 8, rows %lld from 1 to 2^31 - 1, vocabulary %lld from 1 to 2^31",
            C, (long long)rows, (long long)V);
        column_tiles = ceil_div(C, EMBEDDING_BACKWARD_THREADS * 8);
        threads = round_up(ceil_div(C / 8, column_tiles), WARP_SIZE);
        const int64_t one_wave =
            std::max(1, gpu_properties().num_sms * EMBEDDING_BACKWARD_BLOCKS_PER_SM / column_tiles);
        chunk = (int)std::max<int64_t>(EMBEDDING_MIN_CHUNK, ceil_div(rows, one_wave));
        num_chunks = (int)ceil_div<int64_t>(rows, chunk);
        // Of any number of rows up to these: fewer may make more chunks.
        const int64_t most_chunks = std::min(one_wave, ceil_div<int64_t>(rows, EMBEDDING_MIN_CHUNK));
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
        total_bytes = partials + 2 * most_chunks * C * sizeof(float);
    }
};

// Launch: one thread a row. row_of (=) 0, 1, 2, ...
__global__ void __launch_bounds__(EMBEDDING_THREADS) embedding_backward_rows_kernel(int32_t* row_of, int rows) {
    const int64_t i = (int64_t)blockIdx.x * EMBEDDING_THREADS + threadIdx.x;
    if (i < rows) {
        row_of[i] = (int32_t)i;
    }
}

// A thread's sum, over its 8 columns, of the run of equal tokens that it is in.
struct EmbeddingRun {
    float* dweight;   // these columns of row 0
    float* partials;  // of the chunk's two partial sums
    int C;
    bool has_columns;
    bool came_in;  // the run began in an earlier chunk
    float sum[8];

    __device__ __forceinline__ void add(const bf16x8& row) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            sum[k] += __bfloat162float(row[k]);
        }
    }
    // The sum goes to dweight, if no other chunk has a part in the run, else to partials; the next run begins.
    __device__ __forceinline__ void finish(uint32_t token, bool leaves) {
        if (has_columns) {
            float* const to = came_in ? partials : leaves ? partials + C : dweight + (int64_t)token * C;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float4x value = {};
                if (!came_in && !leaves) {
                    value = load128(to + half * 4);
                }
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    value[k] += sum[half * 4 + k];
                }
                store128(to + half * 4, value);
            }
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            sum[k] = 0.0f;
        }
        came_in = false;
    }
};

// Launch: block (column tile, chunk) along x, column tiles fastest, of the plan's threads; a thread owns 8 columns and
// walks the chunk's sorted positions. Bound: bandwidth, reading rows * C elements of dout. A run of equal tokens inside
// the chunk is added to dweight here: no other block has that token. A run that goes on beyond the chunk leaves its sum
// in partials [num_chunks, 2, C]: 0 the run that came in from the chunk before (the whole chunk may be inside it), 1
// the one that starts here and leaves.
__global__ void __launch_bounds__(EMBEDDING_BACKWARD_THREADS, EMBEDDING_BACKWARD_BLOCKS_PER_SM)
    embedding_backward_chunk_kernel(float* dweight, float* partials, const bf16* dout, const uint32_t* sorted_tokens,
                                    const int32_t* sorted_row_of, int rows, int chunk, int num_column_tiles, int C) {
    const int64_t chunk_index = blockIdx.x / num_column_tiles;
    const int column = (int)(blockIdx.x % num_column_tiles * blockDim.x + threadIdx.x) * 8;
    const int lane = threadIdx.x % WARP_SIZE;
    const int begin = (int)(chunk_index * chunk), end = (int)min((int64_t)begin + chunk, (int64_t)rows);
    const bool first_run_came_in = begin > 0 && sorted_tokens[begin - 1] == sorted_tokens[begin];
    const bool last_run_leaves = end < rows && sorted_tokens[end] == sorted_tokens[end - 1];
    EmbeddingRun run = {
        dweight + column, partials + chunk_index * 2 * C + column, C, column < C, first_run_came_in, {}};
    uint32_t run_token = sorted_tokens[begin];

    // Lane i holds the token and the row of position base + i, and already those of base + 32 + i.
    auto look_up = [&](int64_t position, uint32_t& token, int& row) {
        const int64_t inside = min(position + lane, (int64_t)end - 1);
        token = sorted_tokens[inside];
        row = sorted_row_of[inside];
    };
    uint32_t token, next_token;
    int row, next_row;
    look_up(begin, token, row);
    look_up((int64_t)begin + WARP_SIZE, next_token, next_row);
    for (int64_t base = begin; base < end; base += WARP_SIZE) {
        for (int first = 0; first < min((int64_t)WARP_SIZE, end - base); first += EMBEDDING_BACKWARD_ROWS) {
            bf16x8 packs[EMBEDDING_BACKWARD_ROWS];
#pragma unroll
            for (int i = 0; i < EMBEDDING_BACKWARD_ROWS; ++i) {
                const int64_t index = __shfl_sync(FULL_WARP, row, first + i);
                packs[i] = {};  // beyond the end: zeros, added to the last run
                if (first + i < end - base && run.has_columns) {
                    packs[i] = load128_streaming(dout + index * C + column);
                }
            }
#pragma unroll
            for (int i = 0; i < EMBEDDING_BACKWARD_ROWS; ++i) {
                const uint32_t row_token = __shfl_sync(FULL_WARP, token, first + i);
                if (row_token != run_token) {  // the same in every thread
                    run.finish(run_token, false);
                    run_token = row_token;
                }
                run.add(packs[i]);
            }
        }
        token = next_token, row = next_row;
        look_up(base + 2 * WARP_SIZE, next_token, next_row);
    }
    run.finish(run_token, last_run_leaves);
}

// How many chunks the run touches that starts in this chunk and leaves it; 0 where there is none. A whole warp calls
// it.
__device__ __forceinline__ int embedding_chunks_of_leaving_run(const uint32_t* sorted_tokens, int rows, int chunk,
                                                               int num_chunks, int first) {
    const int64_t begin = (int64_t)first * chunk, end = begin + chunk;
    if (end >= rows) {
        return 0;  // nothing leaves the last chunk
    }
    const uint32_t token = sorted_tokens[end - 1];
    if (sorted_tokens[end] != token || (begin > 0 && sorted_tokens[begin - 1] == token)) {
        return 0;
    }
    int last = first + 1, beyond = num_chunks;  // chunk `last` begins inside the run, `beyond` does not
    while (beyond - last > 1) {
        const int step = (beyond - last + WARP_SIZE - 1) / WARP_SIZE;
        const int probe = last + (threadIdx.x % WARP_SIZE + 1) * step;
        const bool inside = probe < beyond && sorted_tokens[(int64_t)probe * chunk] == token;
        const int count = __popc(__ballot_sync(FULL_WARP, inside));  // of the nearest ones
        beyond = min(beyond, last + (count + 1) * step);
        last += count * step;
    }
    return last - first + 1;
}

// Launch: block (tile of 128 columns, EMBEDDING_JOIN_WARPS chunks) along x, column tiles fastest; a lane owns 4
// columns. Adds up the partial sums of the runs that start in these chunks and leave them: a short run in its chunk's
// warp, a long one by all warps, every EMBEDDING_JOIN_WARPS-th chunk each, whose sums are added in order.
__global__ void __launch_bounds__(EMBEDDING_JOIN_WARPS* WARP_SIZE)
    embedding_backward_join_kernel(float* dweight, const float* partials, const uint32_t* sorted_tokens, int rows,
                                   int chunk, int num_chunks, int num_column_tiles, int C) {
    __shared__ int touched[EMBEDDING_JOIN_WARPS];
    __shared__ float4x warp_sums[EMBEDDING_JOIN_WARPS][WARP_SIZE];
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    const int column = (int)(blockIdx.x % num_column_tiles * WARP_SIZE + lane) * 4;
    const bool has_columns = column < C;
    const int first_of_block = (int)(blockIdx.x / num_column_tiles) * EMBEDDING_JOIN_WARPS;
    // The partial sums of chunk i after the first of its run, and of the first.
    auto sum_chunks = [&](float4x& sum, int from, int to, int step) {
#pragma unroll 8
        for (int i = from; i < to; i += step) {
            const float4x more = load128(partials + (int64_t)i * 2 * C + column);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                sum[k] += more[k];
            }
        }
    };
    auto first_sum = [&](int first) { return load128(partials + ((int64_t)first * 2 + 1) * C + column); };
    auto add_to_dweight = [&](int first, const float4x& sum) {
        float* to = dweight + (int64_t)sorted_tokens[((int64_t)first + 1) * chunk] * C + column;
        float4x value = load128(to);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            value[k] += sum[k];
        }
        store128(to, value);
    };
    const int own = first_of_block + warp;
    const int num = embedding_chunks_of_leaving_run(sorted_tokens, rows, chunk, num_chunks, own);
    if (num > 0 && num <= EMBEDDING_JOIN_SHORT && has_columns) {
        float4x sum = first_sum(own);
        sum_chunks(sum, own + 1, own + num, 1);
        add_to_dweight(own, sum);
    }
    if (lane == 0) {
        touched[warp] = num;
    }
    __syncthreads();
    for (int i = 0; i < EMBEDDING_JOIN_WARPS; ++i) {
        if (touched[i] <= EMBEDDING_JOIN_SHORT) {
            continue;
        }
        const int first = first_of_block + i;
        float4x sum = {};
        if (has_columns) {
            if (warp == 0) {
                sum = first_sum(first);
            }
            sum_chunks(sum, first + 1 + warp, first + touched[i], EMBEDDING_JOIN_WARPS);
        }
        warp_sums[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && has_columns) {
            for (int other = 1; other < EMBEDDING_JOIN_WARPS; ++other) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    sum[k] += warp_sums[other][lane][k];
                }
            }
            add_to_dweight(first, sum);
        }
        __syncthreads();
    }
}

// sorted_tokens and sorted_row_of (=) in scratch: the tokens in order, and which rows they are of; equal tokens keep
// the order of their rows.
inline void embedding_sort(const EmbeddingBackwardPlan& plan, void* scratch, const int32_t* tokens, int64_t rows,
                           cudaStream_t stream) {
    char* const base = (char*)scratch;
    int32_t* const row_of = (int32_t*)(base + plan.row_of);
    embedding_backward_rows_kernel<<<ceil_div<int64_t>(rows, EMBEDDING_THREADS), EMBEDDING_THREADS, 0, stream>>>(
        row_of, (int)rows);
    CUDA_CHECK_LAUNCH();
    size_t sort_bytes = plan.sort_bytes;
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(
        scratch, sort_bytes, (const uint32_t*)tokens, (uint32_t*)(base + plan.sorted_tokens), (const int32_t*)row_of,
        (int32_t*)(base + plan.sorted_row_of), (int)rows, 0, plan.token_bits, stream));
}

// Bytes of scratch that embedding_backward needs for so many rows or fewer; 256-byte aligned.
inline size_t embedding_backward_scratch_bytes(int64_t rows, int C, int64_t V) {
    return EmbeddingBackwardPlan(rows, C, V).total_bytes;
}

// dweight (+=) [V, C]: row v gains the sum of the rows of dout [rows, C] whose token is v. Bit-repeatable on one kind
// of GPU. C a multiple of 8; rows below 2^31; scratch as embedding_backward_scratch_bytes says.
inline void embedding_backward(float* dweight, const bf16* dout, const int32_t* tokens, void* scratch, int64_t rows,
                               int C, int64_t V, cudaStream_t stream) {
    NVTX_RANGE();
    const EmbeddingBackwardPlan plan(rows, C, V);
    char* base = (char*)scratch;
    const uint32_t* sorted_tokens = (const uint32_t*)(base + plan.sorted_tokens);
    const int32_t* sorted_row_of = (const int32_t*)(base + plan.sorted_row_of);
    float* partials = (float*)(base + plan.partials);
    embedding_sort(plan, scratch, tokens, rows, stream);
    embedding_backward_chunk_kernel<<<plan.num_chunks * plan.column_tiles, plan.threads, 0, stream>>>(
        dweight, partials, dout, sorted_tokens, sorted_row_of, (int)rows, plan.chunk, plan.column_tiles, C);
    CUDA_CHECK_LAUNCH();
    const int join_tiles = ceil_div(C, WARP_SIZE * 4);
    embedding_backward_join_kernel<<<ceil_div(plan.num_chunks, EMBEDDING_JOIN_WARPS) * join_tiles,
                                     EMBEDDING_JOIN_WARPS * WARP_SIZE, 0, stream>>>(
        dweight, partials, sorted_tokens, (int)rows, plan.chunk, plan.num_chunks, join_tiles, C);
    CUDA_CHECK_LAUNCH();
}
