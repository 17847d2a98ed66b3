// rmsnorm_backward.cu: dx = dresidual + rstd * (g - n * mean(g * n)), dweight += sum(dout * n), with g = dout * weight
// and n = x * rstd. Bound: bandwidth, 4C elements a row (8C bytes), 3C without dresidual.
#include "dev/cuda/harness.cuh"
#include "llmc/ptx.cuh"
#include "llmc/reference/rmsnorm.h"
#include "llmc/rmsnorm.cuh"
#ifdef LLMC_HOPPER
#include "llmc/ptx_hopper.cuh"
#endif

struct Launcher {
    void (*run)(bf16* dx, float* dweight, const bf16* dresidual, const bf16* dout, const bf16* x, const bf16* weight,
                const float* rstd, void* scratch, int64_t rows, int C, cudaStream_t stream);
    size_t (*scratch_bytes)(int64_t rows, int C) = rmsnorm_backward_scratch_bytes;
};

// ---- 1: one thread a row, then one thread a column ---------------------------------------------
__global__ void rmsnorm_backward_kernel1(bf16* dx, const bf16* dresidual, const bf16* dout, const bf16* x,
                                         const bf16* weight, const float* rstd, int64_t rows, int C) {
    const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) {
        return;
    }
    float sum = 0.0f;
    for (int c = 0; c < C; ++c) {
        sum += (float)dout[row * C + c] * (float)weight[c] * (float)x[row * C + c] * rstd[row];
    }
    for (int c = 0; c < C; ++c) {
        const int64_t i = row * C + c;
        const float gradient = rstd[row] * ((float)dout[i] * (float)weight[c] - (float)x[i] * rstd[row] * (sum / C));
        dx[i] = (bf16)((dresidual != nullptr ? (float)dresidual[i] : 0.0f) + gradient);
    }
}
__global__ void rmsnorm_backward_dweight_kernel1(float* dweight, const bf16* dout, const bf16* x, const float* rstd,
                                                 int64_t rows, int C) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c < C) {
        float sum = 0.0f;
        for (int64_t row = 0; row < rows; ++row) {
            sum += (float)dout[row * C + c] * (float)x[row * C + c] * rstd[row];
        }
        dweight[c] += sum;
    }
}
static void rmsnorm_backward1(bf16* dx, float* dweight, const bf16* dresidual, const bf16* dout, const bf16* x,
                              const bf16* weight, const float* rstd, void*, int64_t rows, int C, cudaStream_t stream) {
    rmsnorm_backward_dweight_kernel1<<<ceil_div(C, 32), 32, 0, stream>>>(dweight, dout, x, rstd, rows, C);
    CUDA_CHECK_LAUNCH();
    rmsnorm_backward_kernel1<<<ceil_div<int64_t>(rows, 128), 128, 0, stream>>>(dx, dresidual, dout, x, weight, rstd,
                                                                               rows, C);
    CUDA_CHECK_LAUNCH();
}

// ---- 2: one block a row for dx; dweight in a second pass over memory ----------------------------
__global__ void rmsnorm_backward_kernel2(bf16* dx, const bf16* dresidual, const bf16* dout, const bf16* x,
                                         const bf16* weight, const float* rstd, int C) {
    const int64_t begin = (int64_t)blockIdx.x * C;
    const float row_rstd = rstd[blockIdx.x];
    float sum = 0.0f;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        sum += (float)dout[begin + c] * (float)weight[c] * (float)x[begin + c];
    }
    const float mean = block_sum(sum) * row_rstd / C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        const float gradient =
            row_rstd * ((float)dout[begin + c] * (float)weight[c] - (float)x[begin + c] * row_rstd * mean);
        dx[begin + c] = (bf16)((dresidual != nullptr ? (float)dresidual[begin + c] : 0.0f) + gradient);
    }
}
// Launch: 32 columns x 8 slices of rows a block along x; every gridDim.y-th group of 8 rows; partials [gridDim.y, C].
__global__ void rmsnorm_backward_dweight_kernel2(float* partials, const bf16* dout, const bf16* x, const float* rstd,
                                                 int64_t rows, int C) {
    __shared__ float slices[8][32];
    const int c = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    for (int64_t row = blockIdx.y * 8 + threadIdx.y; c < C && row < rows; row += gridDim.y * 8) {
        sum += (float)dout[row * C + c] * (float)x[row * C + c] * rstd[row];
    }
    slices[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < C) {
        for (int slice = 1; slice < 8; ++slice) {
            sum += slices[slice][threadIdx.x];
        }
        partials[(int64_t)blockIdx.y * C + c] = sum;
    }
}
static void rmsnorm_backward2(bf16* dx, float* dweight, const bf16* dresidual, const bf16* dout, const bf16* x,
                              const bf16* weight, const float* rstd, void* scratch, int64_t rows, int C,
                              cudaStream_t stream) {
    // As many partial sums as the shipped version's scratch memory holds.
    const int num_partials = (int)(rmsnorm_backward_scratch_bytes(rows, C) / (C * sizeof(float)));
    rmsnorm_backward_dweight_kernel2<<<dim3(ceil_div(C, 32), num_partials), dim3(32, 8), 0, stream>>>(
        (float*)scratch, dout, x, rstd, rows, C);
    CUDA_CHECK_LAUNCH();
    rmsnorm_backward_dweight_kernel<<<ceil_div(C, RMSNORM_DWEIGHT_COLUMNS),
                                      dim3(RMSNORM_DWEIGHT_COLUMNS, RMSNORM_DWEIGHT_SLICES), 0, stream>>>(
        dweight, (const float*)scratch, num_partials, C);
    CUDA_CHECK_LAUNCH();
    rmsnorm_backward_kernel2<<<rows, 256, 0, stream>>>(dx, dresidual, dout, x, weight, rstd, C);
    CUDA_CHECK_LAUNCH();
}

// ---- 4 to 8: a ring in shared memory -----------------------------------------------------------
// What bounds 3: at C = 4096 only two of its five blocks a multiprocessor fit, so the fifth runs alone; at 8192 one
// block is resident and its loads stop while it computes; at 768 a quarter of the threads idle.
//   A row belongs to a warp where a warp can hold it (any C to 256 PACKS), else to a block of as many warps as it
//   takes. The three operands of the next rows are on their way (cp.async) into a ring in shared memory while this row
//   is worked on; a thread reads only what it copied itself, so nothing but the row's sum needs a barrier, one a row.
//   The row is read from the ring twice, which leaves registers for dweight's sums and the weight. As many blocks as
//   fit. The rows of a warp are joined in the block: one partial sum of dweight a block.
// Predicted, of copy: C 768 92 %, 1024 93 %, 4096 92 %, 8192 90 %, 16384 (two passes in 3) 88 %; three stages within 1
// % of two (bytes in flight a multiprocessor: 98 KB, and 20 would do); two packs better than four at 8192 (twice the
// warps hide the barrier); bulk copies as good as cp.async, for fewer instructions.
constexpr int RING_WARP_ROWS = 4;  // rows of a block whose rows are a warp each
constexpr int RING_MAX_THREADS = 512;

struct RingGeometry {
    int packs, threads_per_row, threads;
    size_t shared_bytes;

    RingGeometry(int C, int max_packs, int stages) {
        packs = std::min(max_packs, ceil_div(C, WARP_SIZE * 8));
        threads_per_row = round_up(ceil_div(C, packs * 8), WARP_SIZE);
        // One pack fewer, where that leaves fewer lanes idle.
        if (threads_per_row > WARP_SIZE && packs > 2) {
            const int other = round_up(ceil_div(C, (packs - 1) * 8), WARP_SIZE);
            if (other * (packs - 1) < threads_per_row * packs && other <= RING_MAX_THREADS) {
                --packs;
                threads_per_row = other;
            }
        }
        threads = threads_per_row == WARP_SIZE ? WARP_SIZE * RING_WARP_ROWS : threads_per_row;
        shared_bytes = (size_t)stages * 3 * packs * threads * 16;
    }
    int rows_per_block() const { return threads / threads_per_row; }
};

// The sum over a row's threads, in each of them; fixed order. Every thread of the block calls it, with parity 0 and 1
// in turn: one barrier then does.
__device__ __forceinline__ float ring_row_sum(float value, bool row_is_block, int parity) {
    __shared__ float warp_sums[2][RING_MAX_THREADS / WARP_SIZE];
    value = warp_sum(value);
    if (row_is_block) {
        const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
        if (lane == 0) {
            warp_sums[parity][warp] = value;
        }
        __syncthreads();
        value = warp_sum(lane < (int)blockDim.x / WARP_SIZE ? warp_sums[parity][lane] : 0.0f);
    }
    return value;
}

// dx of a thread's packs of one row, and what they add to dweight. operand(i, which): the pack i of x (0), dout (1) or
// dresidual (2).
template <int PACKS, class Operand>
__device__ __forceinline__ void ring_finish_row(bf16* dx_row, float (&dweight)[PACKS][8], const bf16x8 (&w)[PACKS],
                                                float row_rstd, float mean, bool with_residual, int first_column,
                                                int column_step, int C, Operand operand) {
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        const int column = first_column + i * column_step;
        if (column < C) {
            const bf16x8 x_pack = operand(i, 0), dout_pack = operand(i, 1);
            const bf16x8 dresidual_pack = with_residual ? operand(i, 2) : bf16x8{};
            bf16x8 result;
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const float n = __bfloat162float(x_pack[k]) * row_rstd;
                const float d = __bfloat162float(dout_pack[k]);
                dweight[i][k] += d * n;
                result[k] = __float2bfloat16(__bfloat162float(dresidual_pack[k]) +
                                             row_rstd * (d * __bfloat162float(w[i][k]) - n * mean));
            }
            store128(dx_row + column, result);
        }
    }
}
// The same threads' part of the sum of dout * weight * x.
template <int PACKS, class Operand>
__device__ __forceinline__ float ring_dot(const bf16x8 (&w)[PACKS], int first_column, int column_step, int C,
                                          Operand operand) {
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        if (first_column + i * column_step < C) {
            const bf16x8 x_pack = operand(i, 0), dout_pack = operand(i, 1);
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                dot += __bfloat162float(dout_pack[k]) * __bfloat162float(w[i][k]) * __bfloat162float(x_pack[k]);
            }
        }
    }
    return dot;
}
// partials [gridDim.x, C] (=) dweight, summed over the rows of the block in order; shared: rows_per_block * C floats.
template <int PACKS>
__device__ __forceinline__ void ring_write_partials(float* partials, const float (&dweight)[PACKS][8], float* shared,
                                                    int threads_per_row, int first_column, int column_step, int C) {
    const int rows_per_block = blockDim.x / threads_per_row;
    float* own = shared + threadIdx.x / threads_per_row * C;
    __syncthreads();  // the ring is no longer read
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        const int column = first_column + i * column_step;
        if (column < C) {
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                own[column + k] = dweight[i][k];
            }
        }
    }
    __syncthreads();
    for (int column = threadIdx.x; column < C; column += blockDim.x) {
        float sum = shared[column];
        for (int row = 1; row < rows_per_block; ++row) {
            sum += shared[row * C + column];
        }
        partials[(int64_t)blockIdx.x * C + column] = sum;
    }
}

// Launch: blocks of RingGeometry's threads, as many as fit, 1-D; a block takes every gridDim.x-th group of rows.
// Dynamic shared memory: the ring, [STAGES][3 operands][PACKS][threads] packs. Bound: bandwidth.
template <int PACKS, int STAGES, int MIN_BLOCKS>
__global__ void __launch_bounds__(RING_MAX_THREADS, MIN_BLOCKS)
    ring_kernel(bf16* dx, float* partials, const bf16* dresidual, const bf16* dout, const bf16* x, const bf16* weight,
                const float* rstd, int64_t rows, int C, int threads_per_row) {
    extern __shared__ int4 ring[];
    const int first_column = threadIdx.x % threads_per_row * 8, column_step = threads_per_row * 8;
    const int64_t row_step = (int64_t)gridDim.x * (blockDim.x / threads_per_row);
    const uint32_t own = shared_address(ring + threadIdx.x), pack_bytes = blockDim.x * 16;
    const bool with_residual = dresidual != nullptr, row_is_block = (int)blockDim.x == threads_per_row;
    auto address = [&](int stage, int operand, int i) {
        return own + ((stage * 3 + operand) * PACKS + i) * pack_bytes;
    };
    auto load_row = [&](int64_t row, int stage) {
        if (row < rows) {
#pragma unroll
            for (int i = 0; i < PACKS; ++i) {
                const int column = first_column + i * column_step;
                if (column < C) {
                    cp_async_16(address(stage, 0, i), x + row * C + column);
                    cp_async_16(address(stage, 1, i), dout + row * C + column);
                    if (with_residual) {
                        cp_async_16(address(stage, 2, i), dresidual + row * C + column);
                    }
                }
            }
        }
        cp_async_commit();  // an empty group keeps the count
    };
    float dweight[PACKS][8] = {};
    bf16x8 w[PACKS];
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        w[i] = first_column + i * column_step < C ? load128(weight + first_column + i * column_step) : bf16x8{};
    }
    int64_t row = (int64_t)blockIdx.x * (blockDim.x / threads_per_row) + threadIdx.x / threads_per_row;
    float row_rstd = row < rows ? rstd[row] : 0.0f;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        load_row(row + stage * row_step, stage);
    }
    for (int stage = 0, parity = 0; row < rows; row += row_step, parity ^= 1) {
        load_row(row + (STAGES - 1) * row_step, stage == 0 ? STAGES - 1 : stage - 1);  // read a row ago, by this thread
        const float next_rstd = row + row_step < rows ? rstd[row + row_step] : 0.0f;
        cp_async_wait<STAGES - 1>();
        auto operand = [&](int i, int which) {
            bf16x8 pack;
            *reinterpret_cast<int4*>(pack.data) = load_shared_b128(address(stage, which, i));
            return pack;
        };
        const float dot = ring_dot<PACKS>(w, first_column, column_step, C, operand);
        const float mean = ring_row_sum(dot, row_is_block, parity) * row_rstd / C;
        ring_finish_row<PACKS>(dx + row * C, dweight, w, row_rstd, mean, with_residual, first_column, column_step, C,
                               operand);
        row_rstd = next_rstd;
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    ring_write_partials<PACKS>(partials, dweight, reinterpret_cast<float*>(ring), threads_per_row, first_column,
                               column_step, C);
}

#ifdef LLMC_HOPPER
// The same with one thread's bulk copies of whole rows, announced by an mbarrier a stage. A row is a block. The slot of
// the row before is refilled after this row's barrier, which every thread reaches when it has read that slot.
template <int PACKS, int STAGES, int MIN_BLOCKS>
__global__ void __launch_bounds__(RING_MAX_THREADS, MIN_BLOCKS)
    ring_bulk_kernel(bf16* dx, float* partials, const bf16* dresidual, const bf16* dout, const bf16* x,
                     const bf16* weight, const float* rstd, int64_t rows, int C, int threads_per_row) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ int4 ring[];  // [STAGES][3 operands][PACKS][threads]
    __shared__ uint64_t barriers[STAGES];
    const int first_column = threadIdx.x * 8, column_step = threads_per_row * 8;
    const uint32_t operand_bytes = PACKS * blockDim.x * 16, row_bytes = C * sizeof(bf16);
    const bool with_residual = dresidual != nullptr;
    auto load_row = [&](int64_t row, int stage) {
        if (threadIdx.x == 0 && row < rows) {
            const uint32_t barrier = shared_address(barriers + stage);
            const uint32_t to = shared_address(ring) + stage * 3 * operand_bytes;
            mbarrier_arrive_expect(barrier, (with_residual ? 3 : 2) * row_bytes);
            bulk_load(to, x + row * C, row_bytes, barrier);
            bulk_load(to + operand_bytes, dout + row * C, row_bytes, barrier);
            if (with_residual) {
                bulk_load(to + 2 * operand_bytes, dresidual + row * C, row_bytes, barrier);
            }
        }
    };
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(shared_address(barriers + stage), 1);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    float dweight[PACKS][8] = {};
    bf16x8 w[PACKS];
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        w[i] = first_column + i * column_step < C ? load128(weight + first_column + i * column_step) : bf16x8{};
    }
    int64_t row = blockIdx.x;
    float row_rstd = row < rows ? rstd[row] : 0.0f;
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        load_row(row + (int64_t)stage * gridDim.x, stage);
    }
    PipelineState<STAGES> now;
    for (int parity = 0; row < rows; row += gridDim.x, parity ^= 1) {
        const float next_rstd = row + gridDim.x < rows ? rstd[row + gridDim.x] : 0.0f;
        mbarrier_wait(shared_address(barriers + now.stage), now.parity);
        const uint32_t own = shared_address(ring) + now.stage * 3 * operand_bytes + threadIdx.x * 16;
        auto operand = [&](int i, int which) {
            bf16x8 pack;
            *reinterpret_cast<int4*>(pack.data) =
                load_shared_b128(own + which * operand_bytes + i * threads_per_row * 16);
            return pack;
        };
        const float dot = ring_dot<PACKS>(w, first_column, column_step, C, operand);
        const float mean = ring_row_sum(dot, true, parity) * row_rstd / C;
        load_row(row + (int64_t)(STAGES - 1) * gridDim.x, now.stage == 0 ? STAGES - 1 : now.stage - 1);
        ring_finish_row<PACKS>(dx + row * C, dweight, w, row_rstd, mean, with_residual, first_column, column_step, C,
                               operand);
        row_rstd = next_rstd;
        now.advance();
    }
    ring_write_partials<PACKS>(partials, dweight, reinterpret_cast<float*>(ring), threads_per_row, first_column,
                               column_step, C);
#else
    __trap();  // built for sm_90a alone
#endif
}
#endif

using RingKernel = void (*)(bf16*, float*, const bf16*, const bf16*, const bf16*, const bf16*, const float*, int64_t,
                            int, int);

// What a variant launches for rows of C: nullptr where the ring or the block would be too large.
struct RingPlan {
    RingGeometry geometry;
    RingKernel kernel = nullptr;
    int num_blocks = 0;

    template <class Choose>
    RingPlan(int64_t rows, int C, int max_packs, int stages, Choose choose) : geometry(C, max_packs, stages) {
        int device, num_sms, most_shared_bytes, blocks_per_sm;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
        CUDA_CHECK(cudaDeviceGetAttribute(&most_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
        const RingKernel chosen = choose(geometry);
        if (geometry.threads > RING_MAX_THREADS || geometry.shared_bytes + 1024 > (size_t)most_shared_bytes) {
            return;
        }
        CUDA_CHECK(cudaFuncSetAttribute(chosen, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes - 1024));
        CUDA_CHECK(cudaFuncSetAttribute(chosen, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, chosen, geometry.threads,
                                                                 geometry.shared_bytes));
        num_blocks =
            (int)std::min<int64_t>(num_sms * blocks_per_sm, ceil_div<int64_t>(rows, geometry.rows_per_block()));
        kernel = num_blocks > 0 ? chosen : nullptr;
    }
};
// The kernel of max_packs and fewer; bulk copies where the variant has them and a row is a block.
template <int MAX_PACKS, int STAGES, bool BULK>
RingPlan ring_plan(int64_t rows, int C) {
    return RingPlan(rows, C, MAX_PACKS, STAGES, [](const RingGeometry& g) -> RingKernel {
        // 512 threads of two packs can be resident twice.
        constexpr int MIN_BLOCKS = MAX_PACKS <= 2 ? 2 : 1;
#ifdef LLMC_HOPPER
        if constexpr (BULK) {
            if (g.threads_per_row > WARP_SIZE) {
                return g.packs == MAX_PACKS ? ring_bulk_kernel<MAX_PACKS, STAGES, MIN_BLOCKS>
                                            : ring_bulk_kernel<MAX_PACKS - 1, STAGES, MIN_BLOCKS>;
            }
        }
#endif
        if constexpr (MAX_PACKS >= 4) {
            if (g.packs >= 3) {
                return g.packs == 4 ? ring_kernel<4, STAGES, MIN_BLOCKS> : ring_kernel<3, STAGES, MIN_BLOCKS>;
            }
        }
        return g.packs == 2 ? ring_kernel<2, STAGES, MIN_BLOCKS> : ring_kernel<1, STAGES, MIN_BLOCKS>;
    });
}
template <int MAX_PACKS, int STAGES, bool BULK = false>
size_t ring_scratch_bytes(int64_t rows, int C) {
    const RingPlan plan = ring_plan<MAX_PACKS, STAGES, BULK>(rows, C);
    return plan.kernel != nullptr ? (size_t)plan.num_blocks * C * sizeof(float)
                                  : rmsnorm_backward_scratch_bytes(rows, C);
}
template <int MAX_PACKS, int STAGES, bool BULK = false>
void ring_backward(bf16* dx, float* dweight, const bf16* dresidual, const bf16* dout, const bf16* x, const bf16* weight,
                   const float* rstd, void* scratch, int64_t rows, int C, cudaStream_t stream) {
    const RingPlan plan = ring_plan<MAX_PACKS, STAGES, BULK>(rows, C);
    if (plan.kernel == nullptr) {  // a row too long for the ring
        rmsnorm_backward(dx, dweight, dresidual, dout, x, weight, rstd, scratch, rows, C, stream);
        return;
    }
    plan.kernel<<<plan.num_blocks, plan.geometry.threads, plan.geometry.shared_bytes, stream>>>(
        dx, (float*)scratch, dresidual, dout, x, weight, rstd, rows, C, plan.geometry.threads_per_row);
    CUDA_CHECK_LAUNCH();
    rmsnorm_backward_dweight_kernel<<<ceil_div(C, RMSNORM_DWEIGHT_COLUMNS),
                                      dim3(RMSNORM_DWEIGHT_COLUMNS, RMSNORM_DWEIGHT_SLICES), 0, stream>>>(
        dweight, (const float*)scratch, plan.num_blocks, C);
    CUDA_CHECK_LAUNCH();
}
template <int MAX_PACKS, int STAGES, bool BULK = false>
constexpr Launcher RING = {ring_backward<MAX_PACKS, STAGES, BULK>, ring_scratch_bytes<MAX_PACKS, STAGES, BULK>};

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one thread a row, then one thread a column", {rmsnorm_backward1}},
    {2, "one block a row; dweight in a second pass over memory", {rmsnorm_backward2}},
    {4, "rows through a ring in shared memory: 4 packs a thread, 2 stages", RING<4, 2>},
    {5, "4 packs a thread, 3 stages", RING<4, 3>},
    {6, "2 packs a thread, 2 stages", RING<2, 2>},
    {7, "2 packs a thread, 3 stages", RING<2, 3>},
#ifdef LLMC_HOPPER
    {8, "variant 5 with bulk copies where a row is a block", RING<4, 3, true>},
#endif
    {3,
     "one pass, 16 bytes an access, dweight in registers, joined in two stages (llmc/rmsnorm.cuh)",
     {rmsnorm_backward}},
};

static void check(Harness& h, const Variant<Launcher>& variant) {
    struct Case {
        int64_t rows;
        int C;
        float scale;  // of x
    };
    for (const Case& c : {Case{1, 8, 1.0f}, Case{13, 264, 1.0f}, Case{3000, 1000, 1.0f}, Case{777, 1024, 1e4f},
                          Case{9, 4104, 1e-2f}, Case{300, 8192, 1.0f}, Case{300, 8200, 1.0f}, Case{2, 131072, 1.0f}}) {
        if (h.leaves_out(c.rows * c.C / 4)) {
            continue;
        }
        const std::vector<bf16> x = random_vector<bf16>(c.rows * c.C, h.seed, c.scale);
        const std::vector<bf16> dout = random_vector<bf16>(c.rows * c.C, h.seed + 1);
        const std::vector<bf16> dresidual = random_vector<bf16>(c.rows * c.C, h.seed + 2);
        const std::vector<bf16> weight = random_vector<bf16>(c.C, h.seed + 3);
        const std::vector<float> initial = random_vector<float>(c.C, h.seed + 4);
        std::vector<double> out(x.size()), rstd_double(c.rows);
        reference::rmsnorm_forward<double>(out.data(), rstd_double.data(), to_double(x).data(),
                                           to_double(weight).data(), c.rows, c.C, 1e-5);
        const std::vector<float> rstd = convert<float>(rstd_double);
        DeviceBuffer<bf16> x_device(x), dout_device(dout), dresidual_device(dresidual), weight_device(weight);
        DeviceBuffer<float> rstd_device(rstd);
        for (bool with_residual : {true, false}) {
            const std::string label = format_string("rows%lld C%d scale %g%s bf16", (long long)c.rows, c.C, c.scale,
                                                    with_residual ? " with residual" : "");
            std::vector<double> expected(x.size()), expected_dweight = to_double(initial);
            std::vector<float> plain(x.size()), plain_dweight = initial;
            const std::vector<double> dresidual_double = to_double(dresidual);
            const std::vector<float> dresidual_float = convert<float>(dresidual);
            reference::rmsnorm_backward<double>(expected.data(), expected_dweight.data(),
                                                with_residual ? dresidual_double.data() : nullptr,
                                                to_double(dout).data(), to_double(x).data(), to_double(weight).data(),
                                                to_double(rstd).data(), c.rows, c.C);
            reference::rmsnorm_backward<float>(plain.data(), plain_dweight.data(),
                                               with_residual ? dresidual_float.data() : nullptr,
                                               convert<float>(dout).data(), convert<float>(x).data(),
                                               convert<float>(weight).data(), rstd.data(), c.rows, c.C);
            DeviceBuffer<bf16> dx(c.rows * c.C);
            DeviceBuffer<float> dweight(initial);
            DeviceBuffer<unsigned char> scratch(variant.launch.scratch_bytes(c.rows, c.C));
            auto launch = [&] {
                dweight.upload(initial);
                scratch.poison();
                CUDA_CHECK(cudaDeviceSynchronize());
                variant.launch.run(dx, dweight, with_residual ? dresidual_device.data() : nullptr, dout_device,
                                   x_device, weight_device, rstd_device, scratch, c.rows, c.C, h.stream);
            };
            launch();
            h.compare("dx", label, dx, expected, twice_plain_error<bf16>(plain, expected), {c.rows, c.C});
            h.compare("dweight", label, dweight, expected_dweight,
                      twice_plain_error<float>(plain_dweight, expected_dweight), {c.C});
            h.expect(scratch.guards_intact(), "scratch", label, "within its bytes");
            h.compare_repeats("dweight", label, dweight, launch);
            if (with_residual && variant.number >= 3) {
                DeviceBuffer<bf16> in_place(dresidual);
                dweight.upload(initial);
                CUDA_CHECK(cudaDeviceSynchronize());
                variant.launch.run(in_place, dweight, in_place, dout_device, x_device, weight_device, rstd_device,
                                   scratch, c.rows, c.C, h.stream);
                h.compare_exact("dx in place", label, in_place, dx.download());
            }
        }
    }
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    struct Shape {
        int64_t rows;
        int C;
    };
    for (const auto [rows, C] :
         {Shape{98304, 1024}, Shape{65536, 768}, Shape{65536, 4096}, Shape{32768, 8192}, Shape{16384, 16384}}) {
        DeviceBuffer<bf16> dx(rows * C), dresidual(rows * C), dout(rows * C), x(rows * C), weight(C);
        DeviceBuffer<float> dweight(C), rstd(rows);
        DeviceBuffer<unsigned char> scratch(variant.launch.scratch_bytes(rows, C));
        dresidual.fill_random(h.seed);
        dout.fill_random(h.seed + 1);
        x.fill_random(h.seed + 2);
        weight.fill_random(h.seed + 3);
        dweight.fill_random(h.seed + 4);
        rstd.upload(std::vector<float>(rows, 1.0f));
        h.measure_bandwidth(
            format_string("rows%lld C%d", (long long)rows, C), 8.0 * rows * C, variant.idea, [&, rows = rows, C = C] {
                variant.launch.run(dx, dweight, dresidual, dout, x, weight, rstd, scratch, rows, C, h.stream);
            });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "rmsnorm_backward", VARIANTS, check, measure); }
