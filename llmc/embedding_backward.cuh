// embedding_backward.cuh: the gradient of a table of embeddings, which adds up the rows of equal tokens.
// Shapes: tokens [rows] in [0, V), dout [rows, C], dweight [V, C]; rows = B * T; C a multiple of 8.
// Cost: memory bound; reads each row of dout once, wherever it lies, 2C bytes. Two paths (EmbeddingRangePlan::takes):
//   any vocabulary  a stable sort brings equal tokens together. A run of them may be as long as the batch, so what is
//                   sorted is cut into chunks that are summed in parallel, and what runs leave in several chunks is
//                   joined. The sort takes 0.039 of 0.179 ms at 65536 x 768, V 50304 (H100).
//   few tokens      blocks sort their range of rows on their own, in shared memory, and leave a whole table of partial
//                   sums for each range, which are added: V C floats a range, written and read.
// Deterministic: the sorts are stable, and every sum has a fixed order, which depends on the sizes and the GPU alone.
// Reference: reference/embedding.h. Variants: dev/cuda/embedding_backward.cu.
#pragma once
#include <algorithm>
#include <cub/block/block_scan.cuh>
#include <cub/device/device_radix_sort.cuh>
#include <type_traits>

#include "cuda_common.cuh"
#include "gpu_properties.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr int EMBEDDING_BACKWARD_THREADS = 128;      // of a block, at most: 8 columns each
constexpr int EMBEDDING_BACKWARD_BLOCKS_PER_SM = 4;  // one wave of them: more chunks are slower (H100)
constexpr int EMBEDDING_BACKWARD_ROWS = 8;           // rows of dout loaded before the first is added
constexpr int EMBEDDING_MIN_CHUNK = WARP_SIZE;       // sorted positions of a chunk
constexpr int EMBEDDING_JOIN_WARPS = 16;             // chunks that a block of the second stage looks at
constexpr int EMBEDDING_JOIN_SHORT = 8;              // chunks of a run that a warp adds up alone
constexpr int EMBEDDING_SIMPLE_THREADS = 256;        // of the kernels whose threads have one item each
constexpr int EMBEDDING_FEW_TOKENS = 512;            // that a block can count: its threads own one each
constexpr int EMBEDDING_COUNT_LOADS = 8;             // of 32 tokens, before the first are counted
constexpr int EMBEDDING_MIN_RANGE = 256;             // rows a block sorts: fewer are not worth a table of their own
constexpr int EMBEDDING_MAX_RANGE = 16384;           // 64 KB of shared memory

// ---- sizes -------------------------------------------------------------------------------------
inline void embedding_check_sizes(int64_t rows, int C, int64_t V) {
    CHECK(rows >= 1 && rows < (int64_t)1 << 31 && C >= 8 && C % 8 == 0 && V >= 1 && V <= (int64_t)1 << 31,
          "embedding: width %d must be a multiple of 8, rows %lld from 1 to 2^31 - 1, vocabulary %lld from 1 to 2^31",
          C, (long long)rows, (long long)V);
}

// ---- any vocabulary: a sort --------------------------------------------------------------------
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

// How this path cuts its work, and where it keeps what in its scratch memory.
struct EmbeddingSortPlan {
    int column_tiles, threads;  // of the blocks: threads own 8 columns each
    int chunk;                  // sorted positions a chunk
    int num_chunks;
    int token_bits;  // that the sort looks at
    size_t sort_bytes;
    size_t sorted_tokens, row_of, sorted_row_of, partials, total_bytes;  // byte offsets; the sort's own memory is at 0

    EmbeddingSortPlan(int64_t rows, int C, int64_t V) {
        embedding_check_sizes(rows, C, V);
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

// Launch: one thread a row. row_of (=) 0, 1, 2, ... Bound: bandwidth, 4 bytes written a row; of a few rows, its launch.
__global__ void __launch_bounds__(EMBEDDING_SIMPLE_THREADS) embedding_backward_rows_kernel(int32_t* row_of, int rows) {
    const int64_t i = (int64_t)blockIdx.x * EMBEDDING_SIMPLE_THREADS + threadIdx.x;
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
// warp, a long one by all warps, every EMBEDDING_JOIN_WARPS-th chunk each, whose sums are added in order. Bound:
// latency: at most two partial sums a chunk and column are read, from L2, where the kernel before has left them.
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
inline void embedding_sort(const EmbeddingSortPlan& plan, void* scratch, const int32_t* tokens, int64_t rows,
                           cudaStream_t stream) {
    char* const base = (char*)scratch;
    int32_t* const row_of = (int32_t*)(base + plan.row_of);
    embedding_backward_rows_kernel<<<ceil_div<int64_t>(rows, EMBEDDING_SIMPLE_THREADS), EMBEDDING_SIMPLE_THREADS, 0,
                                     stream>>>(row_of, (int)rows);
    CUDA_CHECK_LAUNCH();
    size_t sort_bytes = plan.sort_bytes;
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(
        scratch, sort_bytes, (const uint32_t*)tokens, (uint32_t*)(base + plan.sorted_tokens), (const int32_t*)row_of,
        (int32_t*)(base + plan.sorted_row_of), (int)rows, 0, plan.token_bits, stream));
}

// embedding_backward by this path; scratch as the plan says.
inline void embedding_backward_by_sort(float* dweight, const bf16* dout, const int32_t* tokens, void* scratch,
                                       int64_t rows, int C, int64_t V, cudaStream_t stream) {
    const EmbeddingSortPlan plan(rows, C, V);
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

// ---- few tokens: ranges of rows ----------------------------------------------------------------
// What a block of the range kernel is. Narrow columns make fewer ranges of a wave, hence fewer tables, from shorter
// reads.
template <int columns, int warps>
struct EmbeddingRangeTile {
    static constexpr int COLUMNS = columns;  // of a lane, contiguous: 2, 4 or 8
    static constexpr int WARPS = warps;
    static constexpr int THREADS = warps * WARP_SIZE;
    static constexpr int BLOCKS_PER_SM = 32 / warps;           // 64 registers a thread
    static constexpr int BLOCK_COLUMNS = WARP_SIZE * columns;  // the same for all warps
    // 64 bytes a lane (8 columns: 48, else it spills), loaded while as many are added.
    static constexpr int ROWS = columns == 8 ? 3 : 32 / columns;
    static_assert(THREADS >= EMBEDDING_FEW_TOKENS, "a thread owns a token");

    using Bits = std::conditional_t<columns == 2, uint32_t, std::conditional_t<columns == 4, uint2, uint4>>;
    struct alignas(2 * columns) Pack {
        bf16 data[columns];
    };
    using Scan = cub::BlockScan<int, THREADS, cub::BLOCK_SCAN_WARP_SCANS>;

    struct Shared {
        union {
            uint16_t counts[warps][EMBEDDING_FEW_TOKENS];  // of a warp's rows, then where its rows of a token go
            float came_in[warps][BLOCK_COLUMNS];           // sum of the run that began in an earlier warp
        };
        typename Scan::TempStorage scan;
        uint32_t sorted[EMBEDDING_MAX_RANGE + ROWS];  // token << 16 | row of the range; the last, repeated ROWS times
    };
    // Of a launch whose ranges have so many rows.
    static size_t shared_bytes(int range_rows) {
        return sizeof(Shared) - (EMBEDDING_MAX_RANGE - range_rows) * sizeof(uint32_t);
    }
};

// How this path cuts its work: as many ranges as make one wave of blocks.
template <class Tile>
struct EmbeddingRangePlan {
    int column_tiles, range_rows, num_ranges;
    size_t total_bytes;  // of scratch, for so many rows or fewer

    static int num_column_tiles(int C) { return ceil_div(C, Tile::BLOCK_COLUMNS); }
    static int64_t most_ranges(int C) {
        return std::max(1, gpu_properties().num_sms * Tile::BLOCKS_PER_SM / num_column_tiles(C));
    }
    // Whether blocks can count so many tokens, and sort the rows in one wave.
    static bool takes(int64_t rows, int C, int64_t V) {
        return V <= EMBEDDING_FEW_TOKENS && rows <= most_ranges(C) * EMBEDDING_MAX_RANGE;
    }

    EmbeddingRangePlan(int64_t rows, int C, int64_t V) {
        embedding_check_sizes(rows, C, V);
        CHECK(takes(rows, C, V), "embedding: %lld rows of %lld tokens are too many for the sums of ranges",
              (long long)rows, (long long)V);
        column_tiles = num_column_tiles(C);
        range_rows = (int)std::max<int64_t>(EMBEDDING_MIN_RANGE, ceil_div(rows, most_ranges(C)));
        num_ranges = (int)ceil_div<int64_t>(rows, range_rows);
        // Of any number of rows up to these: fewer may make more ranges.
        const int64_t most = std::min(most_ranges(C), ceil_div<int64_t>(rows, EMBEDDING_MIN_RANGE));
        total_bytes = most * V * C * sizeof(float);
    }
};

// Goes through the rows from begin to end, a warp's, 32 at a time. visit(row, token, place) for each, place what
// counts[token] was plus how many rows of that token came before; afterwards counts[token] is past the last.
template <class Visit>
__device__ __forceinline__ void embedding_count_rows(uint16_t* counts, const int32_t* tokens, int begin, int end,
                                                     const Visit& visit) {
    const int lane = threadIdx.x % WARP_SIZE;
    for (int first = begin; first < end; first += WARP_SIZE * EMBEDDING_COUNT_LOADS) {
        int batch[EMBEDDING_COUNT_LOADS];
#pragma unroll
        for (int i = 0; i < EMBEDDING_COUNT_LOADS; ++i) {
            const int row = first + i * WARP_SIZE + lane;
            batch[i] = row < end ? tokens[row] : -1;
        }
#pragma unroll
        for (int i = 0; i < EMBEDDING_COUNT_LOADS; ++i) {
            if (first + i * WARP_SIZE >= end) {
                break;
            }
            const int token = batch[i];
            const unsigned equal = __match_any_sync(FULL_WARP, token);
            const int before = __popc(equal & ((1u << lane) - 1));
            const int count = token >= 0 ? counts[token] : 0;
            __syncwarp();  // all have read before one of equal lanes writes
            if (token >= 0) {
                if (before == 0) {
                    counts[token] = (uint16_t)(count + __popc(equal));
                }
                visit(first + i * WARP_SIZE + lane, token, count + before);
            }
            __syncwarp();
        }
    }
}

// sorted (=) the rows of the block's range in the order of their tokens, equal ones in their own order. Returns, in the
// 32 lanes of warp i, whose bits they are: which of tokens 32 i .. 32 i + 31 do not occur. A counting sort: each warp
// counts a part of the rows of its own in counters of its own, so that nothing depends on who is first.
template <class Tile>
__device__ __forceinline__ uint32_t embedding_sort_range(typename Tile::Shared& shared, const int32_t* tokens,
                                                         int num_rows, int V) {
    const int thread = threadIdx.x, warp = thread / WARP_SIZE, lane = thread % WARP_SIZE;
    const int part = (num_rows + Tile::THREADS - 1) / Tile::THREADS * WARP_SIZE;
    const int begin = min(warp * part, num_rows), end = min(begin + part, num_rows);
    uint16_t* const counts = shared.counts[warp];
    for (int v = lane; v < EMBEDDING_FEW_TOKENS; v += WARP_SIZE) {
        counts[v] = 0;
    }
    __syncwarp();
    embedding_count_rows(counts, tokens, begin, end, [](int, int, int) {});
    __syncthreads();

    int total = 0;  // rows of token `thread`
    if (thread < V) {
#pragma unroll
        for (int w = 0; w < Tile::WARPS; ++w) {
            total += shared.counts[w][thread];
        }
    }
    int place;
    typename Tile::Scan(shared.scan).ExclusiveSum(total, place);
    if (thread < V) {
#pragma unroll
        for (int w = 0; w < Tile::WARPS; ++w) {
            const int count = shared.counts[w][thread];
            shared.counts[w][thread] = (uint16_t)place;  // of warp w's first row of the token
            place += count;
        }
    }
    __syncthreads();

    embedding_count_rows(counts, tokens, begin, end, [&](int row, int token, int position) {
        const uint32_t word = (uint32_t)token << 16 | row;
        shared.sorted[position] = word;
        if (position == num_rows - 1) {
            for (int i = 1; i <= Tile::ROWS; ++i) {
                shared.sorted[position + i] = word;
            }
        }
    });
    __syncthreads();  // also: counts are over, came_in begins
    return __ballot_sync(FULL_WARP, thread < V && total == 0);
}

// Launch: block (column tile, range of rows) along x, column tiles fastest, so that blocks that run together read whole
// rows. A block sorts its range's rows, then its warps share the sorted positions evenly; a lane owns Tile::COLUMNS
// columns. Bound: bandwidth, reading rows * C elements of dout and writing the tables. partials (=) [num_ranges, V, C]:
// the sums of the range's rows of each token, zero for those that do not occur. A run of equal tokens that crosses
// warps is added up by the warp it begins in, from what the others leave in shared memory.
template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS_PER_SM)
    embedding_backward_range_kernel(float* partials, const bf16* dout, const int32_t* tokens, int64_t rows,
                                    int range_rows, int num_column_tiles, int V, int C) {
    extern __shared__ __align__(16) unsigned char embedding_range_shared[];
    typename Tile::Shared& shared = *reinterpret_cast<typename Tile::Shared*>(embedding_range_shared);
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    const int range = blockIdx.x / num_column_tiles;
    const int block_column = lane * Tile::COLUMNS;  // the lane's first, of the block's
    const int column = (int)(blockIdx.x % num_column_tiles) * Tile::BLOCK_COLUMNS + block_column;
    const bool has_columns = column < C;  // all or none: both are multiples of the pack
    const int64_t first_row = (int64_t)range * range_rows;
    const int num_rows = (int)min((int64_t)range_rows, rows - first_row);
    dout += first_row * C + column;
    partials += (int64_t)range * V * C + column;

    float sum[Tile::COLUMNS] = {};
    auto store_sum = [&](int64_t token) {
        if (has_columns) {
            float* const to = partials + token * C;
            if constexpr (Tile::COLUMNS == 2) {
                *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[1]);
            } else {
#pragma unroll
                for (int k = 0; k < Tile::COLUMNS; k += 4) {
                    store128(to + k, float4x{sum[k], sum[k + 1], sum[k + 2], sum[k + 3]});
                }
            }
        }
    };
    const uint32_t absent = embedding_sort_range<Tile>(shared, tokens + first_row, num_rows, V);
    for (uint32_t left = absent; left != 0; left &= left - 1) {
        store_sum(warp * WARP_SIZE + __ffs((int)left) - 1);
    }

    // Equal parts of the positions, whole batches: only the last batch of all is not full.
    const int part = (num_rows + Tile::WARPS * Tile::ROWS - 1) / (Tile::WARPS * Tile::ROWS) * Tile::ROWS;
    const int begin = min(warp * part, num_rows), end = min(begin + part, num_rows);
    auto token_at = [&](int position) { return shared.sorted[position] >> 16; };
    const char* const columns_of_dout = reinterpret_cast<const char*>(dout);
    const uint32_t row_bytes = (uint32_t)C * sizeof(bf16);  // so that an address is one multiplication and addition
    auto load = [&](typename Tile::Pack(&packs)[Tile::ROWS], int position) {
#pragma unroll
        for (int i = 0; i < Tile::ROWS; ++i) {
            packs[i] = {};  // beyond the end: zeros, added to the last run
            if (position + i < end && has_columns) {
                const uint64_t row = shared.sorted[position + i] & 0xffff;
                *reinterpret_cast<typename Tile::Bits*>(packs[i].data) =
                    __ldcs(reinterpret_cast<const typename Tile::Bits*>(columns_of_dout + row * row_bytes));
            }
        }
    };
    uint32_t run_token = begin < end ? token_at(begin) : 0;
    bool came_in = begin > 0 && begin < end && token_at(begin - 1) == run_token;
    auto finish_run = [&] {
        if (came_in) {
#pragma unroll
            for (int k = 0; k < Tile::COLUMNS; ++k) {
                shared.came_in[warp][block_column + k] = sum[k];
            }
        } else {
            store_sum(run_token);
        }
#pragma unroll
        for (int k = 0; k < Tile::COLUMNS; ++k) {
            sum[k] = 0.0f;
        }
        came_in = false;
    };
    typename Tile::Pack packs[Tile::ROWS], next_packs[Tile::ROWS];
    load(packs, begin);
    for (int position = begin; position < end; position += Tile::ROWS) {
        load(next_packs, position + Tile::ROWS);
#pragma unroll
        for (int i = 0; i < Tile::ROWS; ++i) {
            const uint32_t token = token_at(position + i);
            if (token != run_token) {  // the same in every lane
                finish_run();
                run_token = token;
            }
#pragma unroll
            for (int k = 0; k < Tile::COLUMNS; ++k) {
                sum[k] += __bfloat162float(packs[i].data[k]);
            }
        }
#pragma unroll
        for (int i = 0; i < Tile::ROWS; ++i) {
            packs[i] = next_packs[i];
        }
    }
    const bool goes_on = begin < end && end < num_rows && token_at(end) == run_token && !came_in;
    if (begin < end && !goes_on) {
        finish_run();
    }
    __syncthreads();
    if (goes_on) {  // into the next warp at least
        for (int w = warp + 1; w * part < num_rows && token_at(w * part) == run_token; ++w) {
#pragma unroll
            for (int k = 0; k < Tile::COLUMNS; ++k) {
                sum[k] += shared.came_in[w][block_column + k];
            }
        }
        store_sum(run_token);
    }
}

// Launch: one thread for 4 elements of dweight. dweight (+=) the tables of partial sums, in order. Bound: bandwidth of
// the L2 cache, where most of them still are.
__global__ void __launch_bounds__(EMBEDDING_SIMPLE_THREADS)
    embedding_backward_add_kernel(float* dweight, const float* partials, int num_ranges, int64_t num_elements) {
    const int64_t i = ((int64_t)blockIdx.x * EMBEDDING_SIMPLE_THREADS + threadIdx.x) * 4;
    if (i >= num_elements) {
        return;
    }
    float4x value = load128(dweight + i), sum = {};
#pragma unroll 8
    for (int range = 0; range < num_ranges; ++range) {
        const float4x more = load128_streaming(partials + range * num_elements + i);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            sum[k] += more[k];
        }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        value[k] += sum[k];
    }
    store128(dweight + i, value);
}

// embedding_backward by this path, V at most EMBEDDING_FEW_TOKENS; scratch as the plan says.
template <class Tile>
inline void embedding_backward_by_ranges(float* dweight, const bf16* dout, const int32_t* tokens, void* scratch,
                                         int64_t rows, int C, int64_t V, cudaStream_t stream) {
    const EmbeddingRangePlan<Tile> plan(rows, C, V);
    float* const partials = (float*)scratch;
    const int shared_bytes = (int)Tile::shared_bytes(plan.range_rows);
    auto* const kernel = embedding_backward_range_kernel<Tile>;
    allow_dynamic_shared_bytes(kernel, shared_bytes);
    // No more than the blocks of a wave need: loads in flight take the rest, the L1 cache.
    CUDA_CHECK(cudaFuncSetAttribute(
        kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
        std::min(100, ceil_div(100 * Tile::BLOCKS_PER_SM * (shared_bytes + RESERVED_SHARED_BYTES_PER_BLOCK),
                               gpu_properties().shared_bytes_per_sm))));
    kernel<<<(int64_t)plan.num_ranges * plan.column_tiles, Tile::THREADS, shared_bytes, stream>>>(
        partials, dout, tokens, rows, plan.range_rows, plan.column_tiles, (int)V, C);
    CUDA_CHECK_LAUNCH();
    const int64_t num_elements = V * C;
    embedding_backward_add_kernel<<<ceil_div<int64_t>(num_elements, EMBEDDING_SIMPLE_THREADS * 4),
                                    EMBEDDING_SIMPLE_THREADS, 0, stream>>>(dweight, partials, plan.num_ranges,
                                                                           num_elements);
    CUDA_CHECK_LAUNCH();
}

// ---- the choice --------------------------------------------------------------------------------
// One block an SM and 256 bytes of a row a warp: a wave has half as many ranges as with two blocks. H200, C = 1024, V =
// 256, ms by ranges and by the sort: 0.070 and 0.093 at 98304 rows; in several waves, at a million, 0.607 and 0.582.
using EmbeddingRanges = EmbeddingRangeTile<4, 32>;

// Bytes of scratch that embedding_backward needs for so many rows or fewer; 256-byte aligned. For either path: of few
// tokens, fewer rows may take the one and more the other.
inline size_t embedding_backward_scratch_bytes(int64_t rows, int C, int64_t V) {
    const size_t sort_bytes = EmbeddingSortPlan(rows, C, V).total_bytes;
    if (V > EMBEDDING_FEW_TOKENS) {
        return sort_bytes;
    }
    const int64_t most_rows = EmbeddingRangePlan<EmbeddingRanges>::most_ranges(C) * EMBEDDING_MAX_RANGE;
    return std::max(sort_bytes, EmbeddingRangePlan<EmbeddingRanges>(std::min(rows, most_rows), C, V).total_bytes);
}

// dweight (+=) [V, C]: row v gains the sum of the rows of dout [rows, C] whose token is v. Bit-repeatable on one kind
// of GPU. C a multiple of 8; rows below 2^31; scratch as embedding_backward_scratch_bytes says.
inline void embedding_backward(float* dweight, const bf16* dout, const int32_t* tokens, void* scratch, int64_t rows,
                               int C, int64_t V, cudaStream_t stream) {
    NVTX_RANGE();
    embedding_check_sizes(rows, C, V);
    if (EmbeddingRangePlan<EmbeddingRanges>::takes(rows, C, V)) {
        embedding_backward_by_ranges<EmbeddingRanges>(dweight, dout, tokens, scratch, rows, C, V, stream);
    } else {
        embedding_backward_by_sort(dweight, dout, tokens, scratch, rows, C, V, stream);
    }
}
