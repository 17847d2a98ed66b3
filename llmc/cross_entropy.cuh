// cross_entropy.cuh: softmax cross-entropy of rows of logits, with the gradient in place of the logits.
//   loss = lse - logit[target],   dlogit = (exp(logit - lse) - [column == target]) * dloss
// Shapes: logits [rows, row_stride], of which columns [0, V) count; targets and losses [rows].
// Cost: memory bound, one read and one write of the logits. A short row stays in registers between the pass that sums
// and the pass that writes; a long one stays in shared memory, as far as it fits.
// Reference: reference/classifier.h. Variants: dev/cuda/cross_entropy.cu.
#pragma once
#include <algorithm>

#include "cuda_common.cuh"
#include "gpu_properties.cuh"
#include "ptx.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr int CROSS_ENTROPY_THREADS = 256;  // of a block, for short rows
constexpr int CROSS_ENTROPY_PACKS = 8;      // 16-byte packs of a short row that a lane holds, at most; with 4 V = 258
                                            // loses 15 % of copy (H100), with 2 37 %
constexpr int CROSS_ENTROPY_MAX_THREADS = 1024;  // of a block, for long rows
constexpr int CROSS_ENTROPY_SLOTS_AHEAD = 2;     // of a thread's copies of the next row; 4 and 8 lose 2 % at V = 50304

// ---- device functions --------------------------------------------------------------------------
// The larger of maximum and a pack's elements.
__device__ __forceinline__ float cross_entropy_max(const bf16x8& pack, float maximum) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        maximum = fmaxf(maximum, __bfloat162float(pack[k]));
    }
    return maximum;
}
// Element k of a pack, k not a constant.
__device__ __forceinline__ float cross_entropy_element(const bf16x8& pack, int k) {
    float value = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        value = i == k ? __bfloat162float(pack[i]) : value;
    }
    return value;
}
// The target, or -1 where the data names none of the V columns.
__device__ __forceinline__ int cross_entropy_target(int target, int V) {
    return target >= 0 && target < V ? target : -1;
}
// Which of a row's packs holds it; -1 for target -1.
__device__ __forceinline__ int cross_entropy_target_pack(int target) { return target >> 3; }

// The gradient of eight logits, the row's pack `pack`.
__device__ __forceinline__ bf16x8 cross_entropy_gradient(const bf16x8& logits, float lse_log2, float dloss, int pack,
                                                         int target, int V) {
    float gradients[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        gradients[k] = exp2_approx(__bfloat162float(logits[k]) * LOG2_E - lse_log2) * dloss;
    }
    // Few packs of a row are special: that of the target, and those with padding.
    if (pack == cross_entropy_target_pack(target) || pack * 8 + 8 > V) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const int column = pack * 8 + k;
            gradients[k] = column < V ? gradients[k] - (column == target ? dloss : 0.0f) : 0.0f;
        }
    }
    bf16x8 result;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        result[k] = __float2bfloat16(gradients[k]);
    }
    return result;
}

// Hides from the compiler that these packs were unpacked before: it would keep the floats, twice the registers.
template <int PACKS>
__device__ __forceinline__ void forget_unpacked(bf16x8 (&packs)[PACKS]) {
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        int4& words = *reinterpret_cast<int4*>(packs[i].data);
        words = make_int4(opaque(words.x), opaque(words.y), opaque(words.z), opaque(words.w));
    }
}

// ---- short rows: in registers ------------------------------------------------------------------
// Launch: lanes_per_row lanes a row, 8, 16 or 32, 1-D grid over rows. row_packs <= lanes_per_row * PACKS. Bound:
// bandwidth. The maximum first, then the sum: no rescaling. The lane that holds the target's logit writes the loss: no
// load waits for another.
template <int PACKS>
__global__ void __launch_bounds__(CROSS_ENTROPY_THREADS, 4)
    cross_entropy_short_rows_kernel(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int V,
                                    int row_packs, int lanes_per_row, float dloss, bool write_gradient,
                                    const int* condition) {
    if (condition != nullptr && *condition == 0) {
        return;
    }
    const int rows_per_block = CROSS_ENTROPY_THREADS / lanes_per_row, lane = threadIdx.x % lanes_per_row;
    const int64_t row = (int64_t)blockIdx.x * rows_per_block + threadIdx.x / lanes_per_row;
    const bool active = row < rows;  // the others stay for the shuffles
    const int num_packs = active ? (V + 7) / 8 : 0;
    bf16* row_logits = logits + row * row_packs * 8;
    const int target = active ? cross_entropy_target(targets[row], V) : -1;

    bf16x8 packs[PACKS];
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        const int pack = lane + i * lanes_per_row;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            packs[i][k] = __ushort_as_bfloat16(0xff80);  // -infinity
        }
        if (pack < num_packs) {
            packs[i] = load128_streaming(row_logits + pack * 8);
        }
    }
    float maximum = -INFINITY;
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        const int pack = lane + i * lanes_per_row;
        if (pack < num_packs && pack * 8 + 8 > V) {
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                packs[i][k] = pack * 8 + k < V ? packs[i][k] : __ushort_as_bfloat16(0xff80);
            }
        }
        maximum = cross_entropy_max(packs[i], maximum);
    }
    for (int offset = lanes_per_row / 2; offset > 0; offset /= 2) {
        maximum = fmaxf(maximum, __shfl_xor_sync(FULL_WARP, maximum, offset));
    }
    forget_unpacked(packs);
    const float shift_log2 = maximum == -INFINITY ? 0.0f : maximum * LOG2_E;  // -inf - -inf would be NaN
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            sum += exp2_approx(__bfloat162float(packs[i][k]) * LOG2_E - shift_log2);
        }
    }
    for (int offset = lanes_per_row / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(FULL_WARP, sum, offset);
    }
    if (!active) {
        return;
    }
    forget_unpacked(packs);
    const float lse = maximum + logf(sum);
    if (target < 0 && lane == 0) {
        losses[row] = NAN;
    }
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        const int pack = lane + i * lanes_per_row;
        if (pack == cross_entropy_target_pack(target)) {
            losses[row] = lse - cross_entropy_element(packs[i], target % 8);
        }
        if (write_gradient && pack < row_packs) {
            store128(row_logits + pack * 8, cross_entropy_gradient(packs[i], lse * LOG2_E, dloss, pack, target, V));
        }
    }
}

// ---- long rows: through shared memory ----------------------------------------------------------
// Maximum and sum of exp(value - maximum) of a set of logits; joining two sets is exact but for rounding.
struct SoftmaxState {
    float maximum = -INFINITY;
    float sum = 0.0f;

    __device__ void join(float other_maximum, float other_sum) {
        const float joined = fmaxf(maximum, other_maximum);
        const float shift = joined == -INFINITY ? 0.0f : joined;  // nothing yet: -inf - -inf would be NaN
        sum = sum * __expf(maximum - shift) + other_sum * __expf(other_maximum - shift);
        maximum = joined;
    }
    // Eight more logits at once: nine exponentials.
    __device__ void add(const float (&values)[8]) {
        float joined = maximum;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            joined = fmaxf(joined, values[k]);
        }
        const float shift_log2 = joined == -INFINITY ? 0.0f : joined * LOG2_E;
        sum *= exp2_approx(maximum * LOG2_E - shift_log2);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            sum += exp2_approx(values[k] * LOG2_E - shift_log2);
        }
        maximum = joined;
    }
};

// The state of all threads of the block, in each of them; fixed order. With parity 0 and 1 in turn one barrier does.
__device__ __forceinline__ SoftmaxState cross_entropy_row_state(SoftmaxState state, int parity) {
    __shared__ float2 warp_states[2][WARP_SIZE];
    auto join_warp = [&] {
#pragma unroll
        for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
            const float maximum = __shfl_xor_sync(FULL_WARP, state.maximum, offset);
            const float sum = __shfl_xor_sync(FULL_WARP, state.sum, offset);
            state.join(maximum, sum);
        }
    };
    join_warp();
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    if (lane == 0) {
        warp_states[parity][warp] = make_float2(state.maximum, state.sum);
    }
    __syncthreads();
    state = SoftmaxState();
    if (lane < (int)blockDim.x / WARP_SIZE) {
        state.maximum = warp_states[parity][lane].x;
        state.sum = warp_states[parity][lane].y;
    }
    join_warp();
    return state;
}

// A thread's packs of a row have slots in shared memory. As it replaces a pack by its gradient it starts copying the
// same pack of the block's next row into the slot, and a few slots later adds that to the next row's sum: reads, writes
// and arithmetic go on all the time, with one barrier a row. What has no slot is read at the end of one row and again,
// from L2, at the start of the next.
// Launch: as many blocks as fit, 1-D; a block takes every gridDim.x-th row. Dynamic shared memory: [slots][threads]
// packs. Bound: bandwidth.
__global__ void __launch_bounds__(CROSS_ENTROPY_MAX_THREADS)
    cross_entropy_long_rows_kernel(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int V,
                                   int row_packs, int slots, float dloss, bool write_gradient, const int* condition) {
    if (condition != nullptr && *condition == 0) {
        return;
    }
    extern __shared__ int4 cross_entropy_slots[];
    constexpr int AHEAD = CROSS_ENTROPY_SLOTS_AHEAD;
    const int threads = blockDim.x, num_packs = (V + 7) / 8;
    const uint32_t own = shared_address(cross_entropy_slots + threadIdx.x), slot_bytes = threads * 16;
    float lse = 0.0f;
    int target = -1;
    int parity = 0;
    // In a round the gradient of `row` is written (not in the first) and the state of `next` is gathered.
    for (int64_t row = (int64_t)blockIdx.x - gridDim.x; row < rows; row += gridDim.x, parity ^= 1) {
        const int64_t next = row + gridDim.x;
        const bool gathers = next < rows, writes = row >= 0 && write_gradient;
        bf16* row_logits = logits + row * row_packs * 8;
        const bf16* next_logits = logits + next * row_packs * 8;
        const int next_target = gathers ? cross_entropy_target(targets[next], V) : -1;
        const float lse_log2 = lse * LOG2_E;
        SoftmaxState state;
        float target_logit = 0.0f;
        auto add = [&](const bf16x8& logits_pack, int pack) {
            float values[8];
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                values[k] = __bfloat162float(logits_pack[k]);
            }
            if (pack * 8 + 8 > V) {
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    values[k] = pack * 8 + k < V ? values[k] : -INFINITY;
                }
            }
            state.add(values);
            if (pack == cross_entropy_target_pack(next_target)) {
                target_logit = cross_entropy_element(logits_pack, next_target % 8);
            }
        };
        auto read_slot = [&](int slot) { return load128_shared(own + slot * slot_bytes); };
        auto add_slot = [&](int slot) {
            const int pack = threadIdx.x + slot * threads;
            if (gathers && pack < num_packs) {
                add(read_slot(slot), pack);
            }
        };
        auto write = [&](const bf16x8& logits_pack, int pack) {
            store128(row_logits + (int64_t)pack * 8,
                     cross_entropy_gradient(logits_pack, lse_log2, dloss, pack, target, V));
        };
        // What has no slot was read last: L2 has it.
        for (int pack = threadIdx.x + slots * threads; writes && pack < row_packs; pack += threads) {
            write(pack < num_packs ? load128(row_logits + (int64_t)pack * 8) : bf16x8{}, pack);
        }
        for (int slot = 0; slot < slots; ++slot) {
            const int pack = threadIdx.x + slot * threads;
            if (writes && pack < row_packs) {
                write(read_slot(slot), pack);
            }
            if (gathers && pack < num_packs) {
                cp_async_16(own + slot * slot_bytes, next_logits + (int64_t)pack * 8);
            }
            cp_async_commit();
            cp_async_wait<AHEAD>();
            if (slot >= AHEAD) {
                add_slot(slot - AHEAD);
            }
        }
        for (int pack = threadIdx.x + slots * threads; gathers && pack < num_packs; pack += threads) {
            add(load128(next_logits + (int64_t)pack * 8), pack);
        }
        cp_async_wait<0>();
        for (int slot = max(slots - AHEAD, 0); slot < slots; ++slot) {
            add_slot(slot);
        }
        if (gathers) {
            state = cross_entropy_row_state(state, parity);
            lse = state.maximum + logf(state.sum);
            target = next_target;
            if (target < 0 && threadIdx.x == 0) {
                losses[next] = NAN;
            } else if (target >= 0 && cross_entropy_target_pack(target) % threads == (int)threadIdx.x) {
                losses[next] = lse - target_logit;
            }
        }
    }
}

// ---- launcher ----------------------------------------------------------------------------------
using CrossEntropyShortRowsKernel = void (*)(float*, bf16*, const int32_t*, int64_t, int, int, int, float, bool,
                                             const int*);
template <int PACKS = CROSS_ENTROPY_PACKS>
inline CrossEntropyShortRowsKernel cross_entropy_short_rows_kernel_of(int packs) {
    if constexpr (PACKS > 1) {
        return packs == PACKS ? cross_entropy_short_rows_kernel<PACKS>
                              : cross_entropy_short_rows_kernel_of<PACKS - 1>(packs);
    } else {
        return cross_entropy_short_rows_kernel<1>;
    }
}

inline void launch_cross_entropy_long_rows(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int V,
                                           int row_packs, float dloss, bool write_gradient, const int* condition,
                                           cudaStream_t stream) {
    const GpuProperties gpu = gpu_properties();
    const int most_bytes = gpu.shared_bytes_per_block() - STATIC_SHARED_BYTES_PER_BLOCK;
    // A row of which half a multiprocessor's shared memory holds all leaves room for other blocks.
    int threads = CROSS_ENTROPY_MAX_THREADS;
    if ((int64_t)row_packs * 16 <=
        gpu.shared_bytes_per_sm / 2 - RESERVED_SHARED_BYTES_PER_BLOCK - STATIC_SHARED_BYTES_PER_BLOCK) {
        threads = 64;
        while (threads < CROSS_ENTROPY_MAX_THREADS / 2 && threads * 8 < row_packs) {
            threads *= 2;
        }
    }
    const int slots = std::min(ceil_div(row_packs, threads), most_bytes / (threads * 16));
    const int shared_bytes = slots * threads * 16;
    allow_dynamic_shared_bytes(cross_entropy_long_rows_kernel, most_bytes);
    CUDA_CHECK(cudaFuncSetAttribute(cross_entropy_long_rows_kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared));
    int blocks_per_sm;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, cross_entropy_long_rows_kernel, threads,
                                                             shared_bytes));
    CHECK(blocks_per_sm > 0, "cross-entropy: %d threads and %d bytes of shared memory do not fit", threads,
          shared_bytes);
    const int num_blocks = (int)std::min<int64_t>(rows, (int64_t)gpu.num_sms * blocks_per_sm);
    cross_entropy_long_rows_kernel<<<num_blocks, threads, shared_bytes, stream>>>(
        losses, logits, targets, rows, V, row_packs, slots, dloss, write_gradient, condition);
    CUDA_CHECK_LAUNCH();
}

// losses (=) [rows]; logits [rows, row_stride]: with write_gradient replaced by their gradient times dloss, and by 0 in
// columns from V on. A target outside [0, V) is the data's fault: it gives the loss NaN, and the step is skipped. V
// from 1 to 2^30; row_stride a multiple of 8, >= V. condition: in device memory; where it is 0 nothing is done.
inline void cross_entropy_forward_backward(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int64_t V,
                                           int64_t row_stride, float dloss, bool write_gradient, cudaStream_t stream,
                                           const int* condition = nullptr) {
    NVTX_RANGE();
    CHECK(rows >= 1 && V >= 1 && V <= row_stride && row_stride % 8 == 0 && row_stride <= (int64_t)1 << 30,
          "cross-entropy: %lld logits a row do not fit a row stride of %lld, which must be a multiple of 8 up to 2^30",
          (long long)V, (long long)row_stride);
    const int row_packs = (int)(row_stride / 8);
    if (row_packs > WARP_SIZE * CROSS_ENTROPY_PACKS) {
        launch_cross_entropy_long_rows(losses, logits, targets, rows, (int)V, row_packs, dloss, write_gradient,
                                       condition, stream);
        return;
    }
    int lanes_per_row = 8;
    while (lanes_per_row * CROSS_ENTROPY_PACKS < row_packs) {
        lanes_per_row *= 2;
    }
    const CrossEntropyShortRowsKernel kernel = cross_entropy_short_rows_kernel_of(ceil_div(row_packs, lanes_per_row));
    kernel<<<ceil_div<int64_t>(rows, CROSS_ENTROPY_THREADS / lanes_per_row), CROSS_ENTROPY_THREADS, 0, stream>>>(
        losses, logits, targets, rows, (int)V, row_packs, lanes_per_row, dloss, write_gradient, condition);
    CUDA_CHECK_LAUNCH();
}
