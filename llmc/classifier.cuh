// classifier.cuh: the last product and the loss. The logits of all rows never exist at once: chunks of rows go through
// logits GEMM, softmax cross-entropy with its gradient in place, and both backward GEMMs.
//   loss = lse - logit[target],   dlogit = (exp(logit - lse) - [column == target]) * dloss
// Shapes: hidden [rows, C], weight [Vp, C] with zero rows from V on, logits [chunk_rows, Vp], targets and losses
// [rows]; Vp = classifier_padded_vocab(V), so that every row of logits is aligned and the product's tiles are full.
// Cost: the products 6 rows Vp C operations; cross-entropy is memory bound, one read and one write of the logits: a row
// stays in shared memory between the pass that sums and the pass that writes, as far as it fits.
// Reference: reference/classifier.h. Variants: dev/cuda/cross_entropy.cu.
#pragma once
#include <algorithm>

#include "cuda_common.cuh"
#include "gemm.cuh"
#include "ptx.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr int CROSS_ENTROPY_THREADS = 256;      // of a block, unless one row takes more
constexpr int CROSS_ENTROPY_MAX_THREADS = 512;  // two blocks a multiprocessor: one reads while the other writes
constexpr int CROSS_ENTROPY_PACKS = 4;          // 16-byte packs in flight a thread
constexpr size_t CLASSIFIER_CHUNK_BYTES = (size_t)1 << 30;  // of logits, by default
constexpr int MEAN_LOSS_THREADS = 512;
constexpr int MEAN_LOSS_BLOCKS = 128;

// The rows of weight and the columns of logits: V rounded up to a multiple of 64.
constexpr int64_t classifier_padded_vocab(int64_t V) { return round_up<int64_t>(V, 64); }

// ---- cross-entropy -----------------------------------------------------------------------------
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

// The state of all threads_per_row threads of a row, in each of them; fixed order. Every thread of the block calls it.
template <int MAX_THREADS>
__device__ inline SoftmaxState cross_entropy_row_state(SoftmaxState state, int threads_per_row) {
    __shared__ float2 warp_states[MAX_THREADS / WARP_SIZE];
#pragma unroll
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
        const float maximum = __shfl_xor_sync(FULL_WARP, state.maximum, offset);
        const float sum = __shfl_xor_sync(FULL_WARP, state.sum, offset);
        state.join(maximum, sum);
    }
    if (threads_per_row > WARP_SIZE) {
        const int warp = threadIdx.x / WARP_SIZE, warps_per_row = threads_per_row / WARP_SIZE;
        if (threadIdx.x % WARP_SIZE == 0) {
            warp_states[warp] = make_float2(state.maximum, state.sum);
        }
        __syncthreads();
        const int first_warp = warp / warps_per_row * warps_per_row;
        state = SoftmaxState();
        for (int i = 0; i < warps_per_row; ++i) {
            state.join(warp_states[first_warp + i].x, warp_states[first_warp + i].y);
        }
    }
    return state;
}

// Launch: threads_per_row threads a row (a power of two from 32 to the block), 1-D grid over rows; dynamic shared
// memory holds cached_packs packs of each of the block's rows. Bound: bandwidth. A thread rereads only packs it read
// itself.
template <int MAX_THREADS>
__global__ void __launch_bounds__(MAX_THREADS)
    cross_entropy_kernel(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int V, int row_packs,
                         int cached_packs, int threads_per_row, float dloss, bool write_gradient) {
    extern __shared__ int4 cross_entropy_cache[];
    const int rows_per_block = blockDim.x / threads_per_row;
    const int row_in_block = threadIdx.x / threads_per_row, thread = threadIdx.x % threads_per_row;
    const int64_t row = (int64_t)blockIdx.x * rows_per_block + row_in_block;
    const bool active = row < rows;  // the others stay for the barrier
    bf16x8* cache = reinterpret_cast<bf16x8*>(cross_entropy_cache) + (int64_t)row_in_block * cached_packs;
    bf16* row_logits = logits + row * row_packs * 8;
    const int num_packs = active ? (V + 7) / 8 : 0;
    const int target = active ? targets[row] : 0;
    // Read before anyone writes. A target outside [0, V) is the data's fault: its loss is NaN and the step is skipped.
    const float target_logit = active && target >= 0 && target < V ? __bfloat162float(row_logits[target]) : NAN;

    SoftmaxState state;
    for (int first = thread; first < num_packs; first += threads_per_row * CROSS_ENTROPY_PACKS) {
        bf16x8 packs[CROSS_ENTROPY_PACKS];
#pragma unroll
        for (int i = 0; i < CROSS_ENTROPY_PACKS; ++i) {
            const int pack = first + i * threads_per_row;
            if (pack < num_packs) {
                packs[i] = load128(row_logits + (int64_t)pack * 8);
            }
        }
#pragma unroll
        for (int i = 0; i < CROSS_ENTROPY_PACKS; ++i) {
            const int pack = first + i * threads_per_row;
            if (pack < num_packs) {
                if (pack < cached_packs) {
                    cache[pack] = packs[i];
                }
                float values[8];
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    values[k] = __bfloat162float(packs[i][k]);
                }
                if (pack * 8 + 8 > V) {
#pragma unroll
                    for (int k = 0; k < 8; ++k) {
                        values[k] = pack * 8 + k < V ? values[k] : -INFINITY;
                    }
                }
                state.add(values);
            }
        }
    }
    state = cross_entropy_row_state<MAX_THREADS>(state, threads_per_row);
    if (!active) {
        return;
    }
    const float lse = state.maximum + logf(state.sum);
    if (thread == 0) {
        losses[row] = lse - target_logit;
    }
    if (!write_gradient) {
        return;
    }
    const float lse_log2 = lse * LOG2_E;
    // Backwards, so that what did not fit into shared memory is what L2 saw last.
    const int last = thread < row_packs ? (row_packs - 1 - thread) / threads_per_row * threads_per_row + thread : -1;
    for (int pack = last; pack >= 0; pack -= threads_per_row) {
        bf16x8 packed = {};
        if (pack < num_packs) {
            packed = pack < cached_packs ? cache[pack] : load128(row_logits + (int64_t)pack * 8);
        }
        float gradients[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            gradients[k] = exp2_approx(__bfloat162float(packed[k]) * LOG2_E - lse_log2) * dloss;
        }
        // Two packs of a row at most are special: that of the target, and the one in which the padding begins.
        if (pack == target / 8 || pack * 8 + 8 > V) {
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const int column = pack * 8 + k;
                gradients[k] = column < V ? gradients[k] - (column == target ? dloss : 0.0f) : 0.0f;
            }
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            packed[k] = __float2bfloat16(gradients[k]);
        }
        store128(row_logits + (int64_t)pack * 8, packed);
    }
}

// BLOCKS_PER_SM blocks of MAX_THREADS threads share a multiprocessor's shared memory.
template <int MAX_THREADS, int BLOCKS_PER_SM>
inline void launch_cross_entropy(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int64_t V,
                                 int64_t row_stride, float dloss, bool write_gradient, cudaStream_t stream) {
    CHECK(rows >= 1 && V >= 1 && V <= row_stride && row_stride % 8 == 0 && row_stride <= (int64_t)1 << 30,
          "cross-entropy: %lld logits a row do not fit a row stride of %lld, which must be a multiple of 8 up to 2^30",
          (long long)V, (long long)row_stride);
    const int row_packs = (int)(row_stride / 8);
    int threads_per_row = WARP_SIZE;
    while (threads_per_row < MAX_THREADS && threads_per_row * CROSS_ENTROPY_PACKS < row_packs) {
        threads_per_row *= 2;
    }
    const int threads = std::max(threads_per_row, CROSS_ENTROPY_THREADS);
    const int rows_per_block = threads / threads_per_row;
    int device, shared_bytes_per_sm, reserved_bytes;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&shared_bytes_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&reserved_bytes, cudaDevAttrReservedSharedMemoryPerBlock, device));
    const int static_bytes = MAX_THREADS / WARP_SIZE * sizeof(float2);
    const int max_shared_bytes = shared_bytes_per_sm / BLOCKS_PER_SM - reserved_bytes - static_bytes;
    const int cached_packs = write_gradient ? std::min(row_packs, max_shared_bytes / 16 / rows_per_block) : 0;
    const int shared_bytes = cached_packs * rows_per_block * 16;
    CUDA_CHECK(cudaFuncSetAttribute(cross_entropy_kernel<MAX_THREADS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    max_shared_bytes));
    cross_entropy_kernel<MAX_THREADS><<<ceil_div<int64_t>(rows, rows_per_block), threads, shared_bytes, stream>>>(
        losses, logits, targets, rows, (int)V, row_packs, cached_packs, threads_per_row, dloss, write_gradient);
    CUDA_CHECK_LAUNCH();
}

// losses (=) [rows]; logits [rows, row_stride]: with write_gradient replaced by their gradient times dloss, and by 0 in
// columns from V on. A target outside [0, V) gives the loss NaN. V from 1 to 2^30; row_stride a multiple of 8, >= V.
inline void cross_entropy_forward_backward(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int64_t V,
                                           int64_t row_stride, float dloss, bool write_gradient, cudaStream_t stream) {
    NVTX_RANGE();
    launch_cross_entropy<CROSS_ENTROPY_MAX_THREADS, 2>(losses, logits, targets, rows, V, row_stride, dloss,
                                                       write_gradient, stream);
}

// ---- mean of the losses ------------------------------------------------------------------------
__device__ inline double mean_loss_block_sum(double value) {
    __shared__ double values[MEAN_LOSS_THREADS];
    values[threadIdx.x] = value;
    for (int half = MEAN_LOSS_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            values[threadIdx.x] += values[threadIdx.x + half];
        }
    }
    return values[0];  // valid in thread 0
}

// Launch: MEAN_LOSS_BLOCKS blocks; block b sums losses b * threads + thread, + blocks * threads, ...
__global__ void __launch_bounds__(MEAN_LOSS_THREADS)
    mean_loss_partial_kernel(double* partials, const float* losses, int64_t rows) {
    double sum = 0.0;
    for (int64_t i = (int64_t)blockIdx.x * MEAN_LOSS_THREADS + threadIdx.x; i < rows;
         i += (int64_t)MEAN_LOSS_BLOCKS * MEAN_LOSS_THREADS) {
        sum += losses[i];
    }
    sum = mean_loss_block_sum(sum);
    if (threadIdx.x == 0) {
        partials[blockIdx.x] = sum;
    }
}

// Launch: one block.
__global__ void __launch_bounds__(MEAN_LOSS_THREADS)
    mean_loss_kernel(float* out, const double* partials, int64_t rows, float weight) {
    const double sum = mean_loss_block_sum(threadIdx.x < MEAN_LOSS_BLOCKS ? partials[threadIdx.x] : 0.0);
    if (threadIdx.x == 0) {
        *out += (float)(weight * (sum / (double)rows));
    }
}

// Bytes of scratch that mean_loss needs, for any number of rows; 8-byte aligned.
constexpr size_t mean_loss_scratch_bytes() { return MEAN_LOSS_BLOCKS * sizeof(double); }

// out (+=) device [1]: weight * mean of losses [rows]. Summed in double in a fixed order.
inline void mean_loss(float* out, const float* losses, int64_t rows, float weight, void* scratch, cudaStream_t stream) {
    NVTX_RANGE();
    CHECK(rows >= 1, "mean loss of %lld rows: there must be at least one", (long long)rows);
    mean_loss_partial_kernel<<<MEAN_LOSS_BLOCKS, MEAN_LOSS_THREADS, 0, stream>>>((double*)scratch, losses, rows);
    CUDA_CHECK_LAUNCH();
    mean_loss_kernel<<<1, MEAN_LOSS_THREADS, 0, stream>>>(out, (const double*)scratch, rows, weight);
    CUDA_CHECK_LAUNCH();
}

// ---- the classifier ----------------------------------------------------------------------------
struct ClassifierShape {
    int64_t rows = 0;        // B * T
    int64_t V = 0;           // vocabulary
    int C = 0;               // width
    int64_t chunk_rows = 0;  // rows whose logits exist at a time

    int64_t padded_vocab() const { return classifier_padded_vocab(V); }
};

// Rows of a chunk whose logits take at most max_bytes: all rows, or a multiple of 128, spread evenly over the chunks.
inline int64_t classifier_chunk_rows(int64_t rows, int64_t V, size_t max_bytes = CLASSIFIER_CHUNK_BYTES) {
    const int64_t most = std::max<int64_t>(128, max_bytes / (classifier_padded_vocab(V) * sizeof(bf16)) / 128 * 128);
    return std::min(rows, round_up<int64_t>(ceil_div(rows, ceil_div(rows, most)), 128));
}
// Bytes of the logits buffer.
inline size_t classifier_logits_bytes(const ClassifierShape& shape) {
    return (size_t)shape.chunk_rows * shape.padded_vocab() * sizeof(bf16);
}

// losses (=) [rows] of hidden [rows, C] against targets [rows]; weight [Vp, C]. logits: scratch of
// classifier_logits_bytes.
inline void classifier_loss(float* losses, bf16* logits, const bf16* hidden, const bf16* weight, const int32_t* targets,
                            const ClassifierShape& shape, Gemm& gemm, cudaStream_t stream) {
    NVTX_RANGE();
    const int64_t Vp = shape.padded_vocab();
    for (int64_t begin = 0; begin < shape.rows; begin += shape.chunk_rows) {
        const int64_t chunk = std::min(shape.chunk_rows, shape.rows - begin);
        gemm.forward(logits, hidden + begin * shape.C, weight, nullptr, chunk, Vp, shape.C, stream);
        cross_entropy_forward_backward(losses + begin, logits, targets + begin, chunk, shape.V, Vp, 0.0f, false,
                                       stream);
    }
}

// losses (=) [rows]; dhidden (=) [rows, C] and dweight (+=) [Vp, C]: the gradients of dloss * (sum of the losses), so
// dloss is loss_weight / rows for a mean. dhidden may be hidden. Rows of dweight from V on gain exactly 0.
inline void classifier_forward_backward(float* losses, bf16* dhidden, float* dweight, bf16* logits, const bf16* hidden,
                                        const bf16* weight, const int32_t* targets, const ClassifierShape& shape,
                                        float dloss, Gemm& gemm, cudaStream_t stream) {
    NVTX_RANGE();
    const int64_t Vp = shape.padded_vocab();
    for (int64_t begin = 0; begin < shape.rows; begin += shape.chunk_rows) {
        const int64_t chunk = std::min(shape.chunk_rows, shape.rows - begin);
        const bf16* chunk_hidden = hidden + begin * shape.C;
        gemm.forward(logits, chunk_hidden, weight, nullptr, chunk, Vp, shape.C, stream);
        cross_entropy_forward_backward(losses + begin, logits, targets + begin, chunk, shape.V, Vp, dloss, true,
                                       stream);
        gemm.backward_weight(dweight, logits, chunk_hidden, chunk, Vp, shape.C, true, stream);
        gemm.backward_input(dhidden + begin * shape.C, logits, weight, chunk, Vp, shape.C, stream);
    }
}
