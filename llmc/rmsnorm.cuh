// rmsnorm.cuh: out = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps), alone or fused with the residual addition
// in front of it; its output again from the stored rstd; its backward.
//   with n = x * rstd and g = dout * weight:   dx = dresidual + rstd * (g - n * mean(g * n)),   dweight += sum(dout *
//   n)
// Shapes: x, out, residual, their gradients [rows, C]; weight [C]; rstd [rows]; rows = B * T; C any multiple of 8.
// Cost: memory bound; forward moves 2C elements a row, with the residual 4C, backward 4C.
// A row is held in registers between the pass that sums and the pass that scales; only rows wider than a block can hold
// (16384 elements forward, 8192 backward) are read a second time.
// Reference: reference/rmsnorm.h. Variants: dev/cuda/rmsnorm_forward.cu, dev/cuda/rmsnorm_backward.cu.
#pragma once
#include <algorithm>

#include "cuda_common.cuh"
#include "gpu_properties.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr int RMSNORM_THREADS = 256;  // of a block, unless one row needs more
constexpr int RMSNORM_MAX_THREADS_PER_ROW = 512;
constexpr int RMSNORM_FORWARD_PACKS = 4;           // 16-byte packs of a row that a thread holds, at most
constexpr int RMSNORM_BACKWARD_PACKS = 2;          // 4 would not fit into registers with dweight's sums
constexpr int RMSNORM_BACKWARD_THREADS = 128;      // of a block, unless one row needs more
constexpr int RMSNORM_BACKWARD_BLOCKS_PER_SM = 5;  // of these: up to 102 registers a thread; 6 would spill
constexpr int RMSNORM_DWEIGHT_COLUMNS = 32;        // a block of the second stage: columns x slices of the partial sums
constexpr int RMSNORM_DWEIGHT_SLICES = 32;

// How threads share rows: threads_per_row of them hold one row, packs each (or as much of it as they can).
struct RmsnormGeometry {
    int packs;            // of 8 elements: 1, 2, 4 ... max_packs
    int threads_per_row;  // a power of two from 32 to RMSNORM_MAX_THREADS_PER_ROW
    int threads;          // of a block
    bool wide;            // the row is longer than packs * threads_per_row * 8

    RmsnormGeometry(int C, int max_packs, int min_threads) {
        packs = 1;
        while (packs < max_packs && WARP_SIZE * packs * 8 < C) {
            packs *= 2;
        }
        threads_per_row = WARP_SIZE;
        while (threads_per_row < RMSNORM_MAX_THREADS_PER_ROW && threads_per_row * packs * 8 < C) {
            threads_per_row *= 2;
        }
        threads = std::max(min_threads, threads_per_row);
        wide = C > threads_per_row * packs * 8;
    }
    int rows_per_block() const { return threads / threads_per_row; }
};

// ---- device functions --------------------------------------------------------------------------
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
// packs lie threads_per_row apart. Bound: bandwidth. With RESIDUAL, x + delta is rounded to bf16 first, stored, and
// normalised.
template <int PACKS, bool RESIDUAL>
__global__ void rmsnorm_forward_kernel(bf16* residual, bf16* out, float* rstd, const bf16* x, const bf16* delta,
                                       const bf16* weight, int64_t rows, int C, int threads_per_row, float eps) {
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
        bf16x8 delta_packs[PACKS];
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int column = base + first_column + i * threads_per_row * 8;
            if (active && column < C) {
                packs[i] = load128(x + row_begin + column);
                if (RESIDUAL) {
                    delta_packs[i] = load128(delta + row_begin + column);
                }
            } else {
                packs[i] = {};
                delta_packs[i] = {};
            }
        }
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int column = base + first_column + i * threads_per_row * 8;
            if (RESIDUAL) {
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    packs[i][k] = __float2bfloat16(__bfloat162float(packs[i][k]) + __bfloat162float(delta_packs[i][k]));
                }
                if (active && column < C) {
                    store128(residual + row_begin + column, packs[i]);
                }
            }
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
                    packs[i] = load128((RESIDUAL ? residual : x) + row_begin + column);
                }
                const bf16x8 w = load128(weight + column);
                bf16x8 result;
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    result[k] = __float2bfloat16(__bfloat162float(packs[i][k]) * row_rstd * __bfloat162float(w[k]));
                }
                store128(out + row_begin + column, result);
            }
        }
    }
}

template <bool RESIDUAL>
inline void launch_rmsnorm_forward(bf16* residual, bf16* out, float* rstd, const bf16* x, const bf16* delta,
                                   const bf16* weight, int64_t rows, int C, float eps, cudaStream_t stream) {
    CHECK(rows >= 1 && C >= 8 && C % 8 == 0, "rmsnorm: width %d must be a multiple of 8 and rows %lld positive", C,
          (long long)rows);
    const RmsnormGeometry geometry(C, RMSNORM_FORWARD_PACKS, RMSNORM_THREADS);
    const int64_t num_blocks = ceil_div<int64_t>(rows, geometry.rows_per_block());
    auto* kernel = geometry.packs == 1   ? rmsnorm_forward_kernel<1, RESIDUAL>
                   : geometry.packs == 2 ? rmsnorm_forward_kernel<2, RESIDUAL>
                                         : rmsnorm_forward_kernel<RMSNORM_FORWARD_PACKS, RESIDUAL>;
    kernel<<<num_blocks, geometry.threads, 0, stream>>>(residual, out, rstd, x, delta, weight, rows, C,
                                                        geometry.threads_per_row, eps);
    CUDA_CHECK_LAUNCH();
}

// out (=) [rows, C], rstd (=) [rows] from x [rows, C] and weight [C]. out may be x. C a multiple of 8; rows below 2^31.
inline void rmsnorm_forward(bf16* out, float* rstd, const bf16* x, const bf16* weight, int64_t rows, int C, float eps,
                            cudaStream_t stream) {
    NVTX_RANGE();
    launch_rmsnorm_forward<false>(nullptr, out, rstd, x, nullptr, weight, rows, C, eps, stream);
}

// residual (=) x + delta [rows, C], rounded to bf16; out (=) [rows, C] and rstd (=) [rows] of that residual.
// residual may be x or delta, out may be delta. C a multiple of 8; rows below 2^31.
inline void residual_rmsnorm_forward(bf16* residual, bf16* out, float* rstd, const bf16* x, const bf16* delta,
                                     const bf16* weight, int64_t rows, int C, float eps, cudaStream_t stream) {
    NVTX_RANGE();
    launch_rmsnorm_forward<true>(residual, out, rstd, x, delta, weight, rows, C, eps, stream);
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
                const bf16x8 w = load128(weight + column);
                bf16x8 result;
#pragma unroll
                for (int k = 0; k < 8; ++k) {  // the forward kernel's expression: the same bits
                    result[k] = __float2bfloat16(__bfloat162float(packs[i][k]) * row_rstd * __bfloat162float(w[k]));
                }
                store128(out + row * C + column, result);
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
    CHECK(rows >= 1 && C >= 8 && C % 8 == 0, "rmsnorm: width %d must be a multiple of 8 and rows %lld positive", C,
          (long long)rows);
    const RmsnormGeometry geometry(C, RMSNORM_FORWARD_PACKS, RMSNORM_THREADS);
    const int64_t num_blocks = ceil_div<int64_t>(rows, geometry.rows_per_block());
    auto* kernel = geometry.packs == 1   ? rmsnorm_recompute_kernel<1>
                   : geometry.packs == 2 ? rmsnorm_recompute_kernel<2>
                                         : rmsnorm_recompute_kernel<RMSNORM_FORWARD_PACKS>;
    kernel<<<num_blocks, geometry.threads, 0, stream>>>(out, x, weight, rstd, rows, C, geometry.threads_per_row);
    CUDA_CHECK_LAUNCH();
}

// ---- backward ----------------------------------------------------------------------------------
// Hides from the compiler that this pack was unpacked before: it would keep the floats, twice the registers.
__device__ __forceinline__ void unpack_again(bf16x8& pack) {
    int4& words = *reinterpret_cast<int4*>(pack.data);
    asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
}

// Launch: as many blocks as fit; each takes every gridDim.x-th group of rows and adds up dweight in registers as it
// goes, then writes it to partials [gridDim.x * rows_per_block, C]. Bound: bandwidth, 4C elements a row. WIDE: the row
// is longer than the block's registers; x and dout are then read twice and dweight adds up in partials.
template <int PACKS, bool WIDE, int THREADS>
__global__ void __launch_bounds__(THREADS, THREADS == RMSNORM_BACKWARD_THREADS ? RMSNORM_BACKWARD_BLOCKS_PER_SM : 1)
    rmsnorm_backward_kernel(bf16* dx, float* partials, const bf16* dresidual, const bf16* dout, const bf16* x,
                            const bf16* weight, const float* rstd, int64_t rows, int C, int threads_per_row) {
    const int rows_per_block = blockDim.x / threads_per_row;
    const int row_in_block = threadIdx.x / threads_per_row;
    const int span = threads_per_row * PACKS * 8;
    const int first_column = threadIdx.x % threads_per_row * 8;
    const int last_base = WIDE ? (C - 1) / span * span : 0;
    float* partial = partials + ((int64_t)blockIdx.x * rows_per_block + row_in_block) * C;

    float dweight[PACKS][8] = {};
    const int64_t first_row = (int64_t)blockIdx.x * rows_per_block;
    for (int64_t block_row = first_row; block_row < rows; block_row += (int64_t)gridDim.x * rows_per_block) {
        const int64_t row = block_row + row_in_block;
        const bool active = row < rows;  // the others stay for the barriers
        const int64_t row_begin = row * C;
        const float row_rstd = active ? rstd[row] : 0.0f;
        bf16x8 x_packs[PACKS], dout_packs[PACKS], dresidual_packs[PACKS];
        auto load_span = [&](int base) {
#pragma unroll
            for (int i = 0; i < PACKS; ++i) {
                const int column = base + first_column + i * threads_per_row * 8;
                x_packs[i] = {};
                dout_packs[i] = {};
                if (active && column < C) {
                    x_packs[i] = load128(x + row_begin + column);
                    dout_packs[i] = load128(dout + row_begin + column);
                }
            }
        };
        auto load_dresidual_span = [&](int base) {
#pragma unroll
            for (int i = 0; i < PACKS; ++i) {
                const int column = base + first_column + i * threads_per_row * 8;
                dresidual_packs[i] = {};
                if (dresidual != nullptr && active && column < C) {
                    dresidual_packs[i] = load128(dresidual + row_begin + column);
                }
            }
        };
        load_dresidual_span(last_base);  // with the others: on its way before the threads of a row meet
        float dot = 0.0f;                // sum of dout * weight * x
        for (int base = 0; base <= last_base; base += span) {
            load_span(base);
#pragma unroll
            for (int i = 0; i < PACKS; ++i) {
                const int column = base + first_column + i * threads_per_row * 8;
                const bf16x8 w = column < C ? load128(weight + column) : bf16x8{};
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    dot +=
                        __bfloat162float(dout_packs[i][k]) * __bfloat162float(w[k]) * __bfloat162float(x_packs[i][k]);
                }
            }
        }
        const float mean = rmsnorm_row_sum(dot, threads_per_row) * row_rstd / C;  // of g * n
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            unpack_again(x_packs[i]);
            unpack_again(dout_packs[i]);
        }
        if (!active) {
            continue;
        }
        for (int base = last_base; base >= 0; base -= span) {
            if (base != last_base) {
                load_span(base);
                load_dresidual_span(base);
            }
#pragma unroll
            for (int i = 0; i < PACKS; ++i) {
                const int column = base + first_column + i * threads_per_row * 8;
                if (column < C) {
                    const bf16x8 w = load128(weight + column);
                    bf16x8 result;
                    float products[8];
#pragma unroll
                    for (int k = 0; k < 8; ++k) {
                        const float n = __bfloat162float(x_packs[i][k]) * row_rstd;
                        const float d = __bfloat162float(dout_packs[i][k]);
                        products[k] = d * n;
                        result[k] = __float2bfloat16(__bfloat162float(dresidual_packs[i][k]) +
                                                     row_rstd * (d * __bfloat162float(w[k]) - n * mean));
                    }
                    store128(dx + row_begin + column, result);
#pragma unroll
                    for (int k = 0; k < 8; ++k) {
                        if (WIDE) {
                            partial[column + k] = (block_row == first_row ? 0.0f : partial[column + k]) + products[k];
                        } else {
                            dweight[i][k] += products[k];
                        }
                    }
                }
            }
        }
    }
    if (!WIDE) {
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int column = first_column + i * threads_per_row * 8;
            if (column < C) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float4x sums;
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        sums[k] = dweight[i][half * 4 + k];
                    }
                    store128(partial + column + half * 4, sums);
                }
            }
        }
    }
}

// Launch: RMSNORM_DWEIGHT_COLUMNS columns a block, 1-D grid over C. Slice s adds partial sums s, s + slices, ..., then
// the slices are added in order.
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

// Blocks of rmsnorm_backward_kernel on the current device.
inline int rmsnorm_backward_blocks(int64_t rows, const RmsnormGeometry& geometry) {
    return (int)std::min<int64_t>(gpu_properties().num_sms * RMSNORM_BACKWARD_BLOCKS_PER_SM,
                                  ceil_div<int64_t>(rows, geometry.rows_per_block()));
}

// Bytes of scratch that rmsnorm_backward needs; 16-byte aligned.
inline size_t rmsnorm_backward_scratch_bytes(int64_t rows, int C) {
    const RmsnormGeometry geometry(C, RMSNORM_BACKWARD_PACKS, RMSNORM_BACKWARD_THREADS);
    return (size_t)rmsnorm_backward_blocks(rows, geometry) * geometry.rows_per_block() * C * sizeof(float);
}

// dx (=) [rows, C]: dresidual plus the gradient that comes through the norm; dresidual may be nullptr (zero) and dx may
// be dresidual or dout. dweight (+=) [C], bit-repeatable on one kind of GPU. x, weight, rstd as in forward.
// C a multiple of 8; rows below 2^31; scratch as rmsnorm_backward_scratch_bytes says.
inline void rmsnorm_backward(bf16* dx, float* dweight, const bf16* dresidual, const bf16* dout, const bf16* x,
                             const bf16* weight, const float* rstd, void* scratch, int64_t rows, int C,
                             cudaStream_t stream) {
    NVTX_RANGE();
    CHECK(rows >= 1 && C >= 8 && C % 8 == 0, "rmsnorm: width %d must be a multiple of 8 and rows %lld positive", C,
          (long long)rows);
    const RmsnormGeometry geometry(C, RMSNORM_BACKWARD_PACKS, RMSNORM_BACKWARD_THREADS);
    const int num_blocks = rmsnorm_backward_blocks(rows, geometry);
    auto* kernel = geometry.wide ? rmsnorm_backward_kernel<RMSNORM_BACKWARD_PACKS, true, RMSNORM_MAX_THREADS_PER_ROW>
                   : geometry.threads > RMSNORM_BACKWARD_THREADS
                       ? rmsnorm_backward_kernel<RMSNORM_BACKWARD_PACKS, false, RMSNORM_MAX_THREADS_PER_ROW>
                   : geometry.packs == 1
                       ? rmsnorm_backward_kernel<1, false, RMSNORM_BACKWARD_THREADS>
                       : rmsnorm_backward_kernel<RMSNORM_BACKWARD_PACKS, false, RMSNORM_BACKWARD_THREADS>;
    kernel<<<num_blocks, geometry.threads, 0, stream>>>(dx, (float*)scratch, dresidual, dout, x, weight, rstd, rows, C,
                                                        geometry.threads_per_row);
    CUDA_CHECK_LAUNCH();
    rmsnorm_backward_dweight_kernel<<<ceil_div(C, RMSNORM_DWEIGHT_COLUMNS),
                                      dim3(RMSNORM_DWEIGHT_COLUMNS, RMSNORM_DWEIGHT_SLICES), 0, stream>>>(
        dweight, (const float*)scratch, num_blocks * geometry.rows_per_block(), C);
    CUDA_CHECK_LAUNCH();
}
