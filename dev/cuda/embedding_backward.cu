// embedding_backward.cu: dweight[v] += the sum of the rows of dout whose token is v. Bound: bandwidth, C elements of
// bf16 a row, and C float elements read and written for each token that occurs.
#include "dev/cuda/harness.cuh"
#include "llmc/embedding.cuh"
#include "llmc/ptx.cuh"
#include "llmc/reference/embedding.h"

struct Launcher {
    void (*run)(float* dweight, const bf16* dout, const int32_t* tokens, void* scratch, int64_t rows, int C, int64_t V,
                cudaStream_t stream);
    size_t (*scratch_bytes)(int64_t rows, int C, int64_t V) = embedding_backward_scratch_bytes;
};

// ---- 1: one block a vocabulary entry reads all tokens ------------------------------------------
__global__ void embedding_backward_kernel1(float* dweight, const bf16* dout, const int32_t* tokens, int64_t rows,
                                           int C) {
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = 0.0f;
        for (int64_t row = 0; row < rows; ++row) {
            if (tokens[row] == (int)blockIdx.x) {
                sum += __bfloat162float(dout[row * C + c]);
            }
        }
        dweight[(int64_t)blockIdx.x * C + c] += sum;
    }
}
static void embedding_backward1(float* dweight, const bf16* dout, const int32_t* tokens, void*, int64_t rows, int C,
                                int64_t V, cudaStream_t stream) {
    embedding_backward_kernel1<<<V, 1024, 0, stream>>>(dweight, dout, tokens, rows, C);
    CUDA_CHECK_LAUNCH();
}

// ---- 2: atomic additions: fast for a large vocabulary, but not bit-repeatable ------------------
__global__ void embedding_backward_kernel2(float* dweight, const bf16* dout, const int32_t* tokens, int64_t num_packs,
                                           int packs_per_row) {
    const int64_t pack = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (pack < num_packs) {
        const int64_t row = pack / packs_per_row, column = (pack - row * packs_per_row) * 8;
        const bf16x8 values = load128(dout + pack * 8);
        for (int k = 0; k < 8; ++k) {
            atomicAdd(dweight + (int64_t)tokens[row] * packs_per_row * 8 + column + k, __bfloat162float(values[k]));
        }
    }
}
static void embedding_backward2(float* dweight, const bf16* dout, const int32_t* tokens, void*, int64_t rows, int C,
                                int64_t, cudaStream_t stream) {
    const int64_t num_packs = rows * (C / 8);
    embedding_backward_kernel2<<<ceil_div<int64_t>(num_packs, 256), 256, 0, stream>>>(dweight, dout, tokens, num_packs,
                                                                                      C / 8);
    CUDA_CHECK_LAUNCH();
}

// ---- 4 to 8: as many chunks as blocks that fit ---------------------------------------------------
// What bounds 3 at 98304 x 1024: the join, which starts a block of 512 threads for every chunk and 32 columns, 49152 of
// them, of which nearly all find nothing to do after two loads one after the other (about 1 us, four blocks a
// multiprocessor: 100 us, where dout takes 66); a run that ends waits for its row of dweight before the next row of
// dout is added; 1.9 waves.
//   chunks: equal, one wave (or WAVES) of blocks. A warp's lanes hold the next 32 positions' tokens and rows.
//   a run inside a chunk: added to dweight by a reduction that nobody waits for (RED); exactly one is made to an
//   element, so the result has one order. Or loaded, added and stored, as in 3. rows of dout: eight loads, then eight
//   additions; or a ring in shared memory that cp.async keeps full (STAGES rows). join: a warp a chunk, 16 chunks and
//   128 columns a block, 6336 warps' worth of blocks at 98304 x 1024; a run of many chunks is added up by the whole
//   block.
// The sort (5 launches for 8 bits of token, 2 for each 8 more) remains and is printed apart: about 20 us.
// Predicted, without the sort: 98304 x 1024 V 256 75 us (3: 180), 1048576 rows 760 us, V 50304 uniform 125 us; the ring
// 3 % faster than plain loads, RED 10 % faster at V 50304 and equal at 256, four waves 2 % slower.
constexpr int CHUNK_THREADS = 128;  // 8 columns each
constexpr int CHUNK_ROWS = 8;       // rows loaded before the first is added, without a ring
constexpr int JOIN_WARPS = 16;
constexpr int JOIN_SHORT = 8;  // chunks that a warp adds up alone

struct ChunkPlan : EmbeddingBackwardPlan {
    int column_tiles, threads;

    ChunkPlan(int64_t rows, int C, int64_t V, int blocks_per_sm, int waves) : EmbeddingBackwardPlan(rows, C, V) {
        int device, num_sms;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
        column_tiles = ceil_div(C, CHUNK_THREADS * 8);
        threads = round_up(ceil_div(C / 8, column_tiles), WARP_SIZE);
        const int64_t most_chunks = std::max(1, num_sms * blocks_per_sm * waves / column_tiles);
        chunk = (int)std::max<int64_t>(WARP_SIZE, ceil_div(rows, most_chunks));
        num_chunks = ceil_div<int64_t>(rows, chunk);
        total_bytes = partials + 2 * num_chunks * C * sizeof(float);
    }
};

// address[0..3] (+=) value without waiting; no other addition to these elements is under way.
__device__ __forceinline__ void add_unwaited(float* address, const float* value) {
#if __CUDA_ARCH__ >= 900
    red_add_f32x4(address, make_float4(value[0], value[1], value[2], value[3]));
#else
    for (int k = 0; k < 4; ++k) {
        red_add_f32(address + k, value[k]);
    }
#endif
}

// The sum of the run that a thread is in, and where it goes.
template <bool RED>
struct RunSum {
    float* dweight;   // this thread's columns of row 0
    float* partials;  // this thread's columns of the chunk's two partial sums
    int C;
    bool has_columns;
    bool came_in;  // the run began in an earlier chunk
    float sum[8] = {};

    __device__ __forceinline__ void add(const bf16x8& row) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            sum[k] += __bfloat162float(row[k]);
        }
    }
    __device__ __forceinline__ void finish(uint32_t token, bool leaves) {
        if (has_columns) {
            float* to = came_in ? partials : leaves ? partials + C : dweight + (int64_t)token * C;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (RED && !came_in && !leaves) {
                    add_unwaited(to + half * 4, sum + half * 4);
                } else {
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
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            sum[k] = 0.0f;
        }
        came_in = false;
    }
};

// Launch: block (column tile, chunk) along x, column tiles fastest, of ChunkPlan's threads. STAGES: of the ring in
// dynamic shared memory, [STAGES][threads] packs, a power of two up to 32; 0 without. Bound: bandwidth.
template <int STAGES, bool RED, int BLOCKS_PER_SM>
__global__ void __launch_bounds__(CHUNK_THREADS, BLOCKS_PER_SM)
    chunk_kernel(float* dweight, float* partials, const bf16* dout, const uint32_t* sorted_tokens,
                 const int32_t* sorted_row_of, int rows, int chunk, int num_column_tiles, int C) {
    extern __shared__ int4 chunk_ring[];
    const int64_t chunk_index = blockIdx.x / num_column_tiles;
    const int column = (int)(blockIdx.x % num_column_tiles * blockDim.x + threadIdx.x) * 8;
    const int lane = threadIdx.x % WARP_SIZE;
    const int begin = (int)(chunk_index * chunk), end = (int)min((int64_t)begin + chunk, (int64_t)rows);
    const bool last_run_leaves = end < rows && sorted_tokens[end] == sorted_tokens[end - 1];
    RunSum<RED> run = {dweight + column, partials + chunk_index * 2 * C + column, C,
                       column<C, begin> 0 && sorted_tokens[begin - 1] == sorted_tokens[begin]};
    uint32_t run_token = sorted_tokens[begin];
    const bf16* dout_columns = dout + column;

    // Lane i holds the token and the row of position base + i, and of base + 32 + i.
    auto look_up = [&](int64_t position, uint32_t& token, int& row) {
        const int64_t inside = min(position + lane, (int64_t)end - 1);
        token = sorted_tokens[inside];
        row = sorted_row_of[inside];
    };
    uint32_t token, next_token;
    int row, next_row;
    look_up(begin, token, row);
    look_up((int64_t)begin + WARP_SIZE, next_token, next_row);
    auto add_row = [&](uint32_t row_token, const bf16x8& pack) {
        if (row_token != run_token) {  // the same in every thread
            run.finish(run_token, false);
            run_token = row_token;
        }
        run.add(pack);
    };
    if constexpr (STAGES > 0) {
        constexpr int AHEAD = STAGES - 1;
        const uint32_t own = shared_address(chunk_ring + threadIdx.x), slot_bytes = blockDim.x * 16;
        auto load_row = [&](int i, int index, bool exists) {
            if (exists && run.has_columns) {
                cp_async_16(own + i % STAGES * slot_bytes, dout_columns + (int64_t)index * C);
            }
            cp_async_commit();
        };
        for (int i = 0; i < AHEAD; ++i) {
            load_row(i, __shfl_sync(FULL_WARP, row, i), i < end - begin);
        }
        for (int base = begin; base < end; base += WARP_SIZE) {
            uint32_t after_token;
            int after_row;
            look_up((int64_t)base + 2 * WARP_SIZE, after_token, after_row);
            const int count = min(WARP_SIZE, end - base);
#pragma unroll 4
            for (int i = 0; i < count; ++i) {
                const int ahead = i + AHEAD;
                load_row(ahead, __shfl_sync(FULL_WARP, ahead < WARP_SIZE ? row : next_row, ahead % WARP_SIZE),
                         ahead < end - base);
                cp_async_wait<AHEAD>();
                bf16x8 pack;
                *reinterpret_cast<int4*>(pack.data) = load_shared_b128(own + i % STAGES * slot_bytes);
                add_row(__shfl_sync(FULL_WARP, token, i), pack);
            }
            token = next_token, row = next_row;
            next_token = after_token, next_row = after_row;
        }
    } else {
        for (int base = begin; base < end; base += WARP_SIZE) {
            for (int first = 0; first < min(WARP_SIZE, end - base); first += CHUNK_ROWS) {
                bf16x8 packs[CHUNK_ROWS];
#pragma unroll
                for (int i = 0; i < CHUNK_ROWS; ++i) {
                    const int64_t index = __shfl_sync(FULL_WARP, row, first + i);
                    packs[i] = {};  // beyond the end: zeros, added to the last run
                    if (first + i < end - base && run.has_columns) {
                        packs[i] = load128_streaming(dout_columns + index * C);
                    }
                }
#pragma unroll
                for (int i = 0; i < CHUNK_ROWS; ++i) {
                    add_row(__shfl_sync(FULL_WARP, token, first + i), packs[i]);
                }
            }
            token = next_token, row = next_row;
            look_up((int64_t)base + 2 * WARP_SIZE, next_token, next_row);
        }
    }
    run.finish(run_token, last_run_leaves);
}

// How many chunks the run touches that starts in this chunk and leaves it; 0 where there is none. A whole warp calls
// it.
__device__ __forceinline__ int chunks_of_leaving_run(const uint32_t* sorted_tokens, int rows, int chunk, int num_chunks,
                                                     int first) {
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

// Launch: block (tile of 128 columns, JOIN_WARPS chunks) along x, column tiles fastest; a lane owns 4 columns. Adds up
// the partial sums of the runs that start in these chunks and leave them: a short run in its chunk's warp, a long one
// by all warps, every JOIN_WARPS-th chunk each, whose sums are added in order.
__global__ void __launch_bounds__(JOIN_WARPS* WARP_SIZE)
    join_kernel(float* dweight, const float* partials, const uint32_t* sorted_tokens, int rows, int chunk,
                int num_chunks, int num_column_tiles, int C) {
    __shared__ int touched[JOIN_WARPS];
    __shared__ float4x warp_sums[JOIN_WARPS][WARP_SIZE];
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    const int column = (int)(blockIdx.x % num_column_tiles * WARP_SIZE + lane) * 4;
    const bool has_columns = column < C;
    const int first_of_block = (int)(blockIdx.x / num_column_tiles) * JOIN_WARPS;
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
    const int num = chunks_of_leaving_run(sorted_tokens, rows, chunk, num_chunks, own);
    if (num > 0 && num <= JOIN_SHORT && has_columns) {
        float4x sum = first_sum(own);
        sum_chunks(sum, own + 1, own + num, 1);
        add_to_dweight(own, sum);
    }
    if (lane == 0) {
        touched[warp] = num;
    }
    __syncthreads();
    for (int i = 0; i < JOIN_WARPS; ++i) {
        if (touched[i] <= JOIN_SHORT) {
            continue;
        }
        const int first = first_of_block + i;
        float4x sum = {};
        if (has_columns) {
            if (warp == 0) {
                sum = first_sum(first);
            }
            sum_chunks(sum, first + 1 + warp, first + touched[i], JOIN_WARPS);
        }
        warp_sums[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && has_columns) {
            for (int other = 1; other < JOIN_WARPS; ++other) {
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

static void sort_tokens(const EmbeddingBackwardPlan& plan, const int32_t* tokens, void* scratch, int64_t rows,
                        cudaStream_t stream) {
    char* base = (char*)scratch;
    embedding_backward_rows_kernel<<<ceil_div<int64_t>(rows, EMBEDDING_THREADS), EMBEDDING_THREADS, 0, stream>>>(
        (int32_t*)(base + plan.row_of), (int)rows);
    CUDA_CHECK_LAUNCH();
    size_t sort_bytes = plan.sort_bytes;
    CUDA_CHECK(
        cub::DeviceRadixSort::SortPairs(scratch, sort_bytes, (const uint32_t*)tokens,
                                        (uint32_t*)(base + plan.sorted_tokens), (const int32_t*)(base + plan.row_of),
                                        (int32_t*)(base + plan.sorted_row_of), (int)rows, 0, plan.token_bits, stream));
}

template <int STAGES, bool RED, int BLOCKS_PER_SM, int WAVES>
size_t chunks_scratch_bytes(int64_t rows, int C, int64_t V) {
    return ChunkPlan(rows, C, V, BLOCKS_PER_SM, WAVES).total_bytes;
}
template <int STAGES, bool RED, int BLOCKS_PER_SM, int WAVES>
void chunks_backward(float* dweight, const bf16* dout, const int32_t* tokens, void* scratch, int64_t rows, int C,
                     int64_t V, cudaStream_t stream) {
    const ChunkPlan plan(rows, C, V, BLOCKS_PER_SM, WAVES);
    char* base = (char*)scratch;
    const uint32_t* sorted_tokens = (const uint32_t*)(base + plan.sorted_tokens);
    float* partials = (float*)(base + plan.partials);
    sort_tokens(plan, tokens, scratch, rows, stream);
    const auto kernel = chunk_kernel<STAGES, RED, BLOCKS_PER_SM>;
    const int shared_bytes = STAGES * plan.threads * 16;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    STAGES > 0 ? cudaSharedmemCarveoutMaxShared : cudaSharedmemCarveoutDefault));
    kernel<<<plan.num_chunks * plan.column_tiles, plan.threads, shared_bytes, stream>>>(
        dweight, partials, dout, sorted_tokens, (const int32_t*)(base + plan.sorted_row_of), (int)rows, plan.chunk,
        plan.column_tiles, C);
    CUDA_CHECK_LAUNCH();
    const int join_tiles = ceil_div(C, WARP_SIZE * 4);
    join_kernel<<<ceil_div<int64_t>(plan.num_chunks, JOIN_WARPS) * join_tiles, JOIN_WARPS * WARP_SIZE, 0, stream>>>(
        dweight, partials, sorted_tokens, (int)rows, plan.chunk, (int)plan.num_chunks, join_tiles, C);
    CUDA_CHECK_LAUNCH();
}
template <int STAGES, bool RED, int BLOCKS_PER_SM, int WAVES>
constexpr Launcher CHUNKS = {chunks_backward<STAGES, RED, BLOCKS_PER_SM, WAVES>,
                             chunks_scratch_bytes<STAGES, RED, BLOCKS_PER_SM, WAVES>};

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one block a vocabulary entry reads all tokens", {embedding_backward1}},
    {2, "atomic additions: not repeatable", {embedding_backward2}},
    {4, "stable sort, one wave of chunks, a join of few blocks", CHUNKS<0, false, 4, 1>},
    {5, "runs inside a chunk added by reductions", CHUNKS<0, true, 4, 1>},
    {6, "the same from a ring of 8 rows", CHUNKS<8, true, 8, 1>},
    {7, "from a ring of 16 rows", CHUNKS<16, true, 6, 1>},
    {8, "from a ring of 8 rows, four waves", CHUNKS<8, true, 8, 4>},
    {3, "stable sort, runs in chunks, partial sums joined in order (llmc/embedding.cuh)", {embedding_backward}},
};

// Tokens as text has them: half of them one token, the rest uniform; or all one token; or all uniform.
enum class TokenMix { uniform, half_one, all_one };
static std::vector<int32_t> make_tokens(int64_t rows, int64_t V, TokenMix mix, uint64_t seed) {
    std::vector<int32_t> tokens = random_indices(rows, seed, V);
    for (int64_t i = 0; i < rows; ++i) {
        if (mix == TokenMix::all_one || (mix == TokenMix::half_one && random_bits(seed + 1, i) % 2 == 0)) {
            tokens[i] = (int32_t)(V / 2);
        }
    }
    return tokens;
}
static const char* mix_name(TokenMix mix) {
    return mix == TokenMix::uniform ? "uniform" : mix == TokenMix::half_one ? "half one token" : "all one token";
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    struct Case {
        int64_t rows;
        int C;
        int64_t V;
        TokenMix mix;
    };
    for (const Case& c :
         {Case{1, 8, 2, TokenMix::uniform}, Case{64, 8, 2, TokenMix::all_one}, Case{65, 1000, 3, TokenMix::uniform},
          Case{1000, 72, 259, TokenMix::half_one}, Case{12345, 64, 256, TokenMix::all_one},
          Case{3000, 1032, 128256, TokenMix::half_one}, Case{200000, 16, 100, TokenMix::half_one}}) {
        if (h.leaves_out(c.rows * c.C / 4)) {
            continue;
        }
        const std::string label =
            format_string("rows%lld C%d V%lld %s", (long long)c.rows, c.C, (long long)c.V, mix_name(c.mix));
        const std::vector<int32_t> tokens = make_tokens(c.rows, c.V, c.mix, h.seed);
        const std::vector<bf16> dout = random_vector<bf16>(c.rows * c.C, h.seed + 2);
        const std::vector<float> initial = random_vector<float>(c.V * c.C, h.seed + 3);
        std::vector<double> expected = to_double(initial);
        std::vector<float> plain = initial;
        reference::embedding_backward<double>(expected.data(), to_double(dout).data(), tokens.data(), c.rows, c.C);
        reference::embedding_backward<float>(plain.data(), convert<float>(dout).data(), tokens.data(), c.rows, c.C);
        DeviceBuffer<float> dweight(initial);
        DeviceBuffer<bf16> dout_device(dout);
        DeviceBuffer<int32_t> tokens_device(tokens);
        DeviceBuffer<unsigned char> scratch(variant.launch.scratch_bytes(c.rows, c.C, c.V));
        auto launch = [&] {
            dweight.upload(initial);
            scratch.poison();
            CUDA_CHECK(cudaDeviceSynchronize());
            variant.launch.run(dweight, dout_device, tokens_device, scratch, c.rows, c.C, c.V, h.stream);
        };
        launch();
        // Atomic additions come in any order: their error may be that of any order.
        const double limit = twice_plain_error<float>(plain, expected) * (variant.number == 2 ? 4.0 : 1.0);
        h.compare("dweight", label, dweight, expected, limit, {c.V, c.C});
        h.expect(scratch.guards_intact(), "scratch", label, "within its bytes");
        if (variant.number != 2) {
            h.compare_repeats("dweight", label, dweight, launch);
        }
    }
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    struct Shape {
        int64_t rows;
        int C;
        int64_t V;
        TokenMix mix;
    };
    for (const auto [rows, C, V, mix] :
         {Shape{98304, 1024, 256, TokenMix::uniform}, Shape{98304, 1024, 256, TokenMix::half_one},
          Shape{98304, 1024, 128256, TokenMix::half_one}, Shape{1048576, 1024, 256, TokenMix::half_one},
          Shape{65536, 768, 50304, TokenMix::uniform}}) {
        if (variant.number == 1 && V > 1000) {
            continue;  // V times rows: seconds
        }
        const std::vector<int32_t> tokens = make_tokens(rows, V, mix, h.seed);
        std::vector<bool> occurs(V);
        for (int32_t token : tokens) {
            occurs[token] = true;
        }
        const double num_bytes =
            ((double)rows * sizeof(bf16) + std::count(occurs.begin(), occurs.end(), true) * 2.0 * sizeof(float)) * C;
        DeviceBuffer<float> dweight(V * C);
        DeviceBuffer<bf16> dout(rows * C);
        dweight.fill_random(h.seed);
        dout.fill_random(h.seed + 1);
        DeviceBuffer<int32_t> tokens_device(tokens);
        DeviceBuffer<unsigned char> scratch(variant.launch.scratch_bytes(rows, C, V));
        h.measure_bandwidth(format_string("rows%lld C%d V%lld %s", (long long)rows, C, (long long)V, mix_name(mix)),
                            num_bytes, variant.idea, [&, rows = rows, C = C, V = V] {
                                variant.launch.run(dweight, dout, tokens_device, scratch, rows, C, V, h.stream);
                            });
        if (variant.number == VARIANTS.back().number) {
            const EmbeddingBackwardPlan plan(rows, C, V);
            h.measure_bandwidth(format_string("rows%lld V%lld", (long long)rows, (long long)V),
                                rows * 4.0 * sizeof(int32_t), "the sort alone",
                                [&, rows = rows] { sort_tokens(plan, tokens_device, scratch, rows, h.stream); });
        }
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "embedding_backward", VARIANTS, check, measure); }
