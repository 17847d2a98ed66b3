// rmsnorm.cuh: out = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps); its output again from the stored rstd;
// its backward, which can give the output again too.
//   with n = x * rstd and g = dout * weight:
//   dx = dresidual + rstd * (g - n * mean(g * n)),   dweight += sum over rows of dout * n
// Shapes: x, out, their gradients [rows, C]; weight [C]; rstd [rows]; rows = B * T; C any multiple of 8.
// Cost: memory bound; forward moves 2C elements a row, backward 4C, 5C with the output.
// A row is read once: it stays in registers (forward, up to 16384 elements) or shared memory (backward, up to 16384 on
// an H100, 13312 on an A100, 8192 where there are 100 KiB of shared memory); longer rows are read twice.
// Reference: reference/rmsnorm.h. Variants: dev/cuda/rmsnorm_forward.cu, dev/cuda/rmsnorm_backward.cu.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cuda_common.cuh"
#include "gpu_properties.cuh"
#include "ptx.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr int RMSNORM_THREADS = 256;  // of a block of the forward, unless one row needs more
constexpr int RMSNORM_MAX_THREADS_PER_ROW = 512;
constexpr int RMSNORM_FORWARD_PACKS = 4;       // 16-byte packs of a row that a thread holds, at most
constexpr int RMSNORM_BACKWARD_PACKS = 4;      // with 2, rows of 768 and 1024 lose 4 and 1 % of copy (H100)
constexpr int RMSNORM_BACKWARD_STAGES = 2;     // rows of a thread in the ring; 3 gain nothing
constexpr int RMSNORM_BACKWARD_WARP_ROWS = 4;  // rows of a block where a row is a warp's
constexpr int RMSNORM_DWEIGHT_COLUMNS = 32;    // a block of the second stage: columns x slices of the partial sums
constexpr int RMSNORM_DWEIGHT_SLICES = 32;

// How threads share rows in the forward: threads_per_row of them hold one row, packs each (or as much of it as they
// can).
struct RmsnormGeometry {
    int packs;            // of 8 elements: 1, 2, 4 ... RMSNORM_FORWARD_PACKS
    int threads_per_row;  // a power of two from 32 to RMSNORM_MAX_THREADS_PER_ROW
    int threads;          // of a block

    explicit RmsnormGeometry(int C) {
        packs = 1;
        while (packs < RMSNORM_FORWARD_PACKS && WARP_SIZE * packs * 8 < C) {
            packs *= 2;
        }
        threads_per_row = WARP_SIZE;
        while (threads_per_row < RMSNORM_MAX_THREADS_PER_ROW && threads_per_row * packs * 8 < C) {
            threads_per_row *= 2;
        }
        threads = std::max(RMSNORM_THREADS, threads_per_row);
    }
    int rows_per_block() const { return threads / threads_per_row; }
    // Calls launch with packs as a constant: kernels keep their packs in registers.
    template <class Launch>
    void with_packs(Launch launch) const {
        static_assert(RMSNORM_FORWARD_PACKS == 4, "every power of two up to it has a kernel");
        if (packs == 1) {
            launch(std::integral_constant<int, 1>());
        } else if (packs == 2) {
            launch(std::integral_constant<int, 2>());
        } else {
            launch(std::integral_constant<int, RMSNORM_FORWARD_PACKS>());
        }
    }
};

// ---- device functions --------------------------------------------------------------------------
// Eight elements of the output: the same bits wherever they are computed.
__device__ __forceinline__ bf16x8 rmsnorm_output(const bf16x8& x, float rstd, const bf16x8& weight) {
    bf16x8 out;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        out[k] = __float2bfloat16(__bfloat162float(x[k]) * rstd * __bfloat162float(weight[k]));
    }
    return out;
}

// The sum over the threads_per_row threads of a row, in each of them; the order of additions is fixed. Every thread of
// the block must call it.
__device__ inline float rmsnorm_row_sum(float value, int threads_per_row) {
    __shared__ float warp_sums[RMSNORM_MAX_THREADS_PER_ROW / WARP_SIZE];
    value = warp_sum(value);
    if (threads_per_row > WARP_SIZE) {
        const int warp = threadIdx.x / WARP_SIZE, warps_per_row = threads_per_row / WARP_SIZE;
        __syncthreads();  // the previous use of warp_sums is over
        if (threadIdx.x % WARP_SIZE == 0) {
            warp_sums[warp] = value;
        }
        __syncthreads();
        const int first_warp = warp / warps_per_row * warps_per_row;
        value = 0.0f;
        for (int i = 0; i < warps_per_row; ++i) {
            value += warp_sums[first_warp + i];
        }
    }
    return value;
}

// ---- forward -----------------------------------------------------------------------------------
// Launch: threads_per_row threads a row, blockDim.x / threads_per_row rows a block, 1-D grid over rows. A thread's
// packs lie threads_per_row apart. Bound: bandwidth.
template <int PACKS>
__global__ void rmsnorm_forward_kernel(bf16* out, float* rstd, const bf16* x, const bf16* weight, int64_t rows, int C,
                                       int threads_per_row, float eps) {
    const int rows_per_block = blockDim.x / threads_per_row;
    const int64_t row = (int64_t)blockIdx.x * rows_per_block + threadIdx.x / threads_per_row;
    const bool active = row < rows;  // the others stay for the barriers
    const int64_t row_begin = row * C;
    const int span = threads_per_row * PACKS * 8;
    const int first_column = threadIdx.x % threads_per_row * 8;
    const int last_base = (C - 1) / span * span;

    bf16x8 packs[PACKS];
    float sum_of_squares = 0.0f;
    for (int base = 0; base < C; base += span) {
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int column = base + first_column + i * threads_per_row * 8;
            packs[i] = active && column < C ? load128(x + row_begin + column) : bf16x8{};
        }
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const float value = __bfloat162float(packs[i][k]);
                sum_of_squares += value * value;
            }
        }
    }
    const float row_rstd = rsqrtf(rmsnorm_row_sum(sum_of_squares, threads_per_row) / C + eps);
    if (!active) {
        return;
    }
    if (first_column == 0) {
        rstd[row] = row_rstd;
    }
    // The last span is still in registers; earlier ones, if any, are read again.
    for (int base = last_base; base >= 0; base -= span) {
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int column = base + first_column + i * threads_per_row * 8;
            if (column < C) {
                if (base != last_base) {
                    packs[i] = load128(x + row_begin + column);
                }
                store128(out + row_begin + column, rmsnorm_output(packs[i], row_rstd, load128(weight + column)));
            }
        }
    }
}

inline void check_rmsnorm_shape(int64_t rows, int C) {
    CHECK(rows >= 1 && C >= 8 && C % 8 == 0, "rmsnorm: width %d must be a multiple of 8 and rows %lld positive", C,
          (long long)rows);
}

// out (=) [rows, C], rstd (=) [rows] from x [rows, C] and weight [C]. out may be x. C a multiple of 8; rows below 2^31.
inline void rmsnorm_forward(bf16* out, float* rstd, const bf16* x, const bf16* weight, int64_t rows, int C, float eps,
                            cudaStream_t stream) {
    NVTX_RANGE();
    check_rmsnorm_shape(rows, C);
    const RmsnormGeometry geometry(C);
    const int64_t num_blocks = ceil_div<int64_t>(rows, geometry.rows_per_block());
    geometry.with_packs([&](auto packs) {
        rmsnorm_forward_kernel<packs.value>
            <<<num_blocks, geometry.threads, 0, stream>>>(out, rstd, x, weight, rows, C, geometry.threads_per_row, eps);
    });
    CUDA_CHECK_LAUNCH();
}

// ---- the output again --------------------------------------------------------------------------
// Launch: as the forward kernel, without its reduction: no thread waits for another. Bound: bandwidth.
template <int PACKS>
__global__ void rmsnorm_recompute_kernel(bf16* out, const bf16* x, const bf16* weight, const float* rstd, int64_t rows,
                                         int C, int threads_per_row) {
    const int64_t row = (int64_t)blockIdx.x * (blockDim.x / threads_per_row) + threadIdx.x / threads_per_row;
    if (row >= rows) {
        return;
    }
    const float row_rstd = rstd[row];
    const int first_column = threadIdx.x % threads_per_row * 8;
    for (int base = first_column; base < C; base += threads_per_row * PACKS * 8) {
        bf16x8 packs[PACKS];
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int column = base + i * threads_per_row * 8;
            if (column < C) {
                packs[i] = load128(x + row * C + column);
            }
        }
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int column = base + i * threads_per_row * 8;
            if (column < C) {
                store128(out + row * C + column, rmsnorm_output(packs[i], row_rstd, load128(weight + column)));
            }
        }
    }
}

// out (=) [rows, C]: what rmsnorm_forward gave for this x [rows, C], weight [C] and rstd [rows], bit for bit. The
// weight gradient of the product behind the norm needs it, so that forward need not keep it. C a multiple of 8; rows
// below 2^31.
inline void rmsnorm_recompute(bf16* out, const bf16* x, const bf16* weight, const float* rstd, int64_t rows, int C,
                              cudaStream_t stream) {
    NVTX_RANGE();
    check_rmsnorm_shape(rows, C);
    const RmsnormGeometry geometry(C);
    const int64_t num_blocks = ceil_div<int64_t>(rows, geometry.rows_per_block());
    geometry.with_packs([&](auto packs) {
        rmsnorm_recompute_kernel<packs.value>
            <<<num_blocks, geometry.threads, 0, stream>>>(out, x, weight, rstd, rows, C, geometry.threads_per_row);
    });
    CUDA_CHECK_LAUNCH();
}

// ---- backward ----------------------------------------------------------------------------------
// A row belongs to a warp where a warp can hold it, else to a block of as many warps as it takes. While a thread works
// on its packs of one row, those of the next are on their way into a ring in shared memory; a thread reads only what it
// copied itself, so nothing but the row's sum needs a barrier, one a row. The row is read from the ring twice, for the
// sum and for the results, which leaves the registers to the weight and to dweight's sums.
constexpr int RMSNORM_BACKWARD_OPERANDS = 3;  // x, dout, dresidual

// Threads of rmsnorm_backward_kernel that the registers of a multiprocessor are enough for.
constexpr int rmsnorm_backward_threads_per_sm(int packs) { return (packs == 1 ? 2 : 1) * RMSNORM_MAX_THREADS_PER_ROW; }

struct RmsnormBackwardPlan {
    int packs, threads_per_row, threads;  // of a thread, of a row, of a block
    size_t ring_bytes;  // of a block: [STAGES][OPERANDS][packs][threads] packs; 0: the row is too long
    int num_blocks;

    // Arithmetic on the GPU's properties, as scratch memory is also planned where there is none.
    RmsnormBackwardPlan(int64_t rows, int C) {
        check_rmsnorm_shape(rows, C);
        packs = std::min(RMSNORM_BACKWARD_PACKS, ceil_div(C, WARP_SIZE * 8));
        threads_per_row = round_up(ceil_div(C, packs * 8), WARP_SIZE);
        if (threads_per_row > WARP_SIZE) {  // one pack fewer, where that leaves fewer lanes idle
            const int other = round_up(ceil_div(C, (packs - 1) * 8), WARP_SIZE);
            if (other * (packs - 1) < threads_per_row * packs && other <= RMSNORM_MAX_THREADS_PER_ROW) {
                packs -= 1;
                threads_per_row = other;
            }
        }
        threads = threads_per_row == WARP_SIZE ? WARP_SIZE * RMSNORM_BACKWARD_WARP_ROWS : threads_per_row;
        ring_bytes = (size_t)RMSNORM_BACKWARD_STAGES * RMSNORM_BACKWARD_OPERANDS * packs * threads * sizeof(bf16x8);
        const GpuProperties gpu = gpu_properties();
        const size_t block_bytes = ring_bytes + RESERVED_SHARED_BYTES_PER_BLOCK + STATIC_SHARED_BYTES_PER_BLOCK;
        int blocks_per_sm =
            std::min<int>(rmsnorm_backward_threads_per_sm(packs) / threads, gpu.shared_bytes_per_sm / block_bytes);
        if (blocks_per_sm == 0) {  // rmsnorm_backward_long_rows_kernel
            packs = 0, ring_bytes = 0;
            threads = threads_per_row = RMSNORM_MAX_THREADS_PER_ROW;
            blocks_per_sm = 2;
        }
        num_blocks = (int)std::min<int64_t>((int64_t)gpu.num_sms * blocks_per_sm,
                                            ceil_div<int64_t>(rows, threads / threads_per_row));
    }
    size_t scratch_bytes(int C) const { return (size_t)num_blocks * C * sizeof(float); }
};

// The sum over a row's threads, in each of them; fixed order. Where the row is a block's, every thread of it calls this
// with parity 0 and 1 in turn: one barrier then does.
__device__ __forceinline__ float rmsnorm_backward_row_sum(float value, bool row_is_block, int parity) {
    __shared__ float warp_sums[2][RMSNORM_MAX_THREADS_PER_ROW / WARP_SIZE];
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

// A pack's part of the sum of dout * weight * x.
__device__ __forceinline__ float rmsnorm_backward_dot(const bf16x8& x, const bf16x8& dout, const bf16x8& weight) {
    float dot = 0.0f;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        dot += __bfloat162float(dout[k]) * __bfloat162float(weight[k]) * __bfloat162float(x[k]);
    }
    return dot;
}
// A pack of dx; dweight (+=) what the pack adds to it. mean: of g * n.
__device__ __forceinline__ bf16x8 rmsnorm_backward_pack(float (&dweight)[8], const bf16x8& x, const bf16x8& dout,
                                                        const bf16x8& dresidual, const bf16x8& weight, float rstd,
                                                        float mean) {
    bf16x8 dx;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const float n = __bfloat162float(x[k]) * rstd;
        const float d = __bfloat162float(dout[k]);
        dweight[k] += d * n;
        dx[k] = __float2bfloat16(__bfloat162float(dresidual[k]) + rstd * (d * __bfloat162float(weight[k]) - n * mean));
    }
    return dx;
}

// partials [gridDim.x, C] (=) the threads' sums, those of a block's rows added in order. shared: rows_per_block * C
// floats.
template <int PACKS>
__device__ __forceinline__ void rmsnorm_backward_write_partials(float* partials, const float (&dweight)[PACKS][8],
                                                                float* shared, int threads_per_row, int C) {
    float* own = shared + threadIdx.x / threads_per_row * C;
    __syncthreads();  // the ring, which this memory was, is no longer read
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        const int column = (threadIdx.x % threads_per_row + i * threads_per_row) * 8;
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
        for (int row = 1; row < (int)blockDim.x / threads_per_row; ++row) {
            sum += shared[row * C + column];
        }
        partials[(int64_t)blockIdx.x * C + column] = sum;
    }
}

// Launch: RmsnormBackwardPlan's blocks, as many as fit, 1-D; a block takes every gridDim.x-th group of rows. Dynamic
// shared memory: the ring. partials (=) [gridDim.x, C]. Bound: bandwidth.
template <int PACKS>
__global__ void __launch_bounds__(RMSNORM_MAX_THREADS_PER_ROW,
                                  rmsnorm_backward_threads_per_sm(PACKS) / RMSNORM_MAX_THREADS_PER_ROW)
    rmsnorm_backward_kernel(bf16* dx, float* partials, bf16* norm_out, const bf16* dresidual, const bf16* dout,
                            const bf16* x, const bf16* weight, const float* rstd, int64_t rows, int C,
                            int threads_per_row) {
    extern __shared__ int4 rmsnorm_ring[];
    constexpr int STAGES = RMSNORM_BACKWARD_STAGES;
    enum Operand { X, DOUT, DRESIDUAL };
    const int first_column = threadIdx.x % threads_per_row * 8, column_step = threads_per_row * 8;
    const int rows_per_block = blockDim.x / threads_per_row;
    const int64_t row_step = (int64_t)gridDim.x * rows_per_block;
    const uint32_t own = shared_address(rmsnorm_ring + threadIdx.x), pack_bytes = blockDim.x * sizeof(bf16x8);
    const bool with_residual = dresidual != nullptr, row_is_block = rows_per_block == 1;
    auto address = [&](int stage, Operand operand, int i) {
        return own + ((stage * RMSNORM_BACKWARD_OPERANDS + operand) * PACKS + i) * pack_bytes;
    };
    auto read = [&](int stage, Operand operand, int i) { return load128_shared(address(stage, operand, i)); };
    auto start_loading = [&](int64_t row, int stage) {
        if (row < rows) {
#pragma unroll
            for (int i = 0; i < PACKS; ++i) {
                const int column = first_column + i * column_step;
                if (column < C) {
                    cp_async_16(address(stage, X, i), x + row * C + column);
                    cp_async_16(address(stage, DOUT, i), dout + row * C + column);
                    if (with_residual) {
                        cp_async_16(address(stage, DRESIDUAL, i), dresidual + row * C + column);
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
        const int column = first_column + i * column_step;
        w[i] = column < C ? load128(weight + column) : bf16x8{};
    }
    int64_t row = (int64_t)blockIdx.x * rows_per_block + threadIdx.x / threads_per_row;
    float row_rstd = row < rows ? rstd[row] : 0.0f;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        start_loading(row + stage * row_step, stage);
    }
    for (int stage = 0, parity = 0; row < rows; row += row_step, parity ^= 1) {
        // Into the place of the row before, which this thread has read.
        start_loading(row + (STAGES - 1) * row_step, stage == 0 ? STAGES - 1 : stage - 1);
        const float next_rstd = row + row_step < rows ? rstd[row + row_step] : 0.0f;
        cp_async_wait<STAGES - 1>();
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            if (first_column + i * column_step < C) {
                dot += rmsnorm_backward_dot(read(stage, X, i), read(stage, DOUT, i), w[i]);
            }
        }
        const float mean = rmsnorm_backward_row_sum(dot, row_is_block, parity) * row_rstd / C;
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int column = first_column + i * column_step;
            if (column < C) {
                const bf16x8 x_pack = read(stage, X, i);
                const bf16x8 dresidual_pack = with_residual ? read(stage, DRESIDUAL, i) : bf16x8{};
                store128(dx + row * C + column, rmsnorm_backward_pack(dweight[i], x_pack, read(stage, DOUT, i),
                                                                      dresidual_pack, w[i], row_rstd, mean));
                if (norm_out != nullptr) {
                    store128(norm_out + row * C + column, rmsnorm_output(x_pack, row_rstd, w[i]));
                }
            }
        }
        row_rstd = next_rstd;
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    rmsnorm_backward_write_partials<PACKS>(partials, dweight, reinterpret_cast<float*>(rmsnorm_ring), threads_per_row,
                                           C);
}

// Rows that no block can hold: x and dout are read twice, and dweight adds up in partials (=) [gridDim.x, C].
// Launch: a row a block, as many blocks as fit, 1-D; a block takes every gridDim.x-th row. Bound: bandwidth.
__global__ void __launch_bounds__(RMSNORM_MAX_THREADS_PER_ROW, 2)
    rmsnorm_backward_long_rows_kernel(bf16* dx, float* partials, bf16* norm_out, const bf16* dresidual,
                                      const bf16* dout, const bf16* x, const bf16* weight, const float* rstd,
                                      int64_t rows, int C) {
    const int first_column = threadIdx.x * 8, column_step = blockDim.x * 8;
    float* const partial = partials + (int64_t)blockIdx.x * C;
    int parity = 0;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, parity ^= 1) {
        const bf16 *const x_row = x + row * C, *const dout_row = dout + row * C;
        float dot = 0.0f;
#pragma unroll 4
        for (int column = first_column; column < C; column += column_step) {
            dot += rmsnorm_backward_dot(load128(x_row + column), load128(dout_row + column), load128(weight + column));
        }
        const float row_rstd = rstd[row];
        const float mean = rmsnorm_backward_row_sum(dot, true, parity) * row_rstd / C;
        for (int column = first_column; column < C; column += column_step) {
            float sums[8] = {};
            if (row != blockIdx.x) {
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    sums[k] = partial[column + k];
                }
            }
            const bf16x8 x_pack = load128(x_row + column), w = load128(weight + column);
            const bf16x8 dresidual_pack = dresidual != nullptr ? load128(dresidual + row * C + column) : bf16x8{};
            store128(dx + row * C + column, rmsnorm_backward_pack(sums, x_pack, load128(dout_row + column),
                                                                  dresidual_pack, w, row_rstd, mean));
            if (norm_out != nullptr) {
                store128(norm_out + row * C + column, rmsnorm_output(x_pack, row_rstd, w));
            }
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                partial[column + k] = sums[k];
            }
        }
    }
}

// Launch: RMSNORM_DWEIGHT_COLUMNS columns a block, 1-D grid over C. Slice s adds partial sums s, s + slices, ..., then
// the slices are added in order. Bound: latency: few blocks, whose partial sums the kernel before has left in L2.
__global__ void __launch_bounds__(RMSNORM_DWEIGHT_COLUMNS* RMSNORM_DWEIGHT_SLICES)
    rmsnorm_backward_dweight_kernel(float* dweight, const float* partials, int num_partials, int C) {
    __shared__ float slice_sums[RMSNORM_DWEIGHT_SLICES][RMSNORM_DWEIGHT_COLUMNS];
    const int column = blockIdx.x * RMSNORM_DWEIGHT_COLUMNS + threadIdx.x;
    float sum = 0.0f;
    if (column < C) {
#pragma unroll 8
        for (int i = threadIdx.y; i < num_partials; i += RMSNORM_DWEIGHT_SLICES) {
            sum += partials[(int64_t)i * C + column];
        }
    }
    slice_sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < C) {
        for (int slice = 1; slice < RMSNORM_DWEIGHT_SLICES; ++slice) {
            sum += slice_sums[slice][threadIdx.x];
        }
        dweight[column] += sum;
    }
}

// Bytes of scratch that rmsnorm_backward needs; 16-byte aligned.
inline size_t rmsnorm_backward_scratch_bytes(int64_t rows, int C) {
    return RmsnormBackwardPlan(rows, C).scratch_bytes(C);
}

// dx (=) [rows, C]: dresidual plus the gradient that comes through the norm; dresidual may be nullptr (zero) and dx may
// be dresidual or dout. dweight (+=) [C], bit-repeatable on one kind of GPU. norm_out (=) [rows, C]: the forward's
// output again, the bits of rmsnorm_recompute; nullptr: not wanted; it overlaps nothing else. x, weight, rstd as in
// forward. C a multiple of 8; rows below 2^31; scratch as rmsnorm_backward_scratch_bytes says.
inline void rmsnorm_backward(bf16* dx, float* dweight, bf16* norm_out, const bf16* dresidual, const bf16* dout,
                             const bf16* x, const bf16* weight, const float* rstd, void* scratch, int64_t rows, int C,
                             cudaStream_t stream) {
    NVTX_RANGE();
    const RmsnormBackwardPlan plan(rows, C);
    float* const partials = (float*)scratch;
    if (plan.ring_bytes > 0) {
        auto* kernel = plan.packs == 1   ? rmsnorm_backward_kernel<1>
                       : plan.packs == 2 ? rmsnorm_backward_kernel<2>
                       : plan.packs == 3 ? rmsnorm_backward_kernel<3>
                                         : rmsnorm_backward_kernel<RMSNORM_BACKWARD_PACKS>;
        allow_dynamic_shared_bytes(kernel, (int)plan.ring_bytes);
        // The kernel has no use for an L1 cache; by itself the driver may leave it room that the last block needs.
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
        kernel<<<plan.num_blocks, plan.threads, plan.ring_bytes, stream>>>(dx, partials, norm_out, dresidual, dout, x,
                                                                           weight, rstd, rows, C, plan.threads_per_row);
    } else {
        rmsnorm_backward_long_rows_kernel<<<plan.num_blocks, plan.threads, 0, stream>>>(
            dx, partials, norm_out, dresidual, dout, x, weight, rstd, rows, C);
    }
    CUDA_CHECK_LAUNCH();
    rmsnorm_backward_dweight_kernel<<<ceil_div(C, RMSNORM_DWEIGHT_COLUMNS),
                                      dim3(RMSNORM_DWEIGHT_COLUMNS, RMSNORM_DWEIGHT_SLICES), 0, stream>>>(
        dweight, partials, plan.num_blocks, C);
    CUDA_CHECK_LAUNCH();
}
