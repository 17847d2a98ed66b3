// classifier_hopper.cuh: a chunk of the classifier on sm_90a without a pass over its logits. The product's epilogue
// turns each logit x into e = exp(x - shift), with the row's shift close to the logit of its target, found beforehand,
// and adds up the row (gemm_hopper.cuh). With the sum of a row the rest is linear in what is stored:
//   loss = log(sum) + shift - x[target],   dlogit = (e - [column == target] sum) dloss / sum
// The target's element is set in place. The row's factor dloss / sum goes where rows are short: into hidden before it
// is multiplied with e for dweight, and into dhidden after.
//   As e of the target is about 1, sum is about exp(loss): it leaves float32's range only where a loss does (NaN
// included). Such a chunk's product is made again, and the rest by cross_entropy.cuh; what decides it stays on the GPU,
// and kernels that are not needed return at once.
// Precision: e is rounded to bf16, as dlogit is elsewhere, and so are hidden's scaled rows; logits are not rounded.
// Results repeat bit for bit.
// Who calls it, and what serves other GPUs and vocabularies: classifier.cuh. Checks and timings:
// dev/cuda/classifier.cu.
#pragma once
#include "classifier_operands.cuh"
#include "cross_entropy.cuh"
#include "cuda_common.cuh"
#include "gemm.cuh"
#include "gemm_hopper.cuh"
#include "memory.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr int CLASSIFIER_ROW_THREADS = 256;  // of blocks in which a warp has a row
constexpr int CLASSIFIER_SUM_WARPS = 8;      // that share the sums of 32 rows
// The largest sum of a row, e^55: its factor, times any hidden, is then a normal number in bf16.
constexpr float CLASSIFIER_MOST_SUM = 0x1p80f;

// ---- memory ------------------------------------------------------------------------------------
// Of a chunk of `rows`; Vp: columns of its logits.
struct ClassifierHopperScratch {
    float* shift_log2;     // [rows]
    float* target_logits;  // [rows]
    float* tile_sums;      // [tiles of columns, rows]
    float* sums;           // [rows]
    int* out_of_range;     // [1]: whether any sum is
    ClassifierHopperScratch(MemoryArea& area, int64_t rows, int64_t Vp)
        : shift_log2(area.take<float>(rows)),
          target_logits(area.take<float>(rows)),
          tile_sums(area.take<float>(gemm_hopper_column_tiles(Vp) * rows)),
          sums(area.take<float>(rows)),
          out_of_range(area.take<int>(1)) {}
};

// ---- kernels -----------------------------------------------------------------------------------
// The row of a launch with a warp a row.
__device__ __forceinline__ int64_t classifier_warp_row() {
    return (int64_t)blockIdx.x * (CLASSIFIER_ROW_THREADS / WARP_SIZE) + threadIdx.x / WARP_SIZE;
}
// Launch: a warp a row, 1-D. shift_log2 (=) log2(e) times the logit of the target, near enough; 0 without a target.
// Bound: bandwidth, rows of hidden and as many of weight.
__global__ void __launch_bounds__(CLASSIFIER_ROW_THREADS)
    classifier_shift_kernel(float* shift_log2, int* out_of_range, const bf16* hidden, const bf16* weight,
                            const int32_t* targets, int64_t rows, int V, int C) {
    const int64_t row = classifier_warp_row();
    if (row == 0) {
        *out_of_range = 0;
    }
    if (row >= rows) {
        return;
    }
    const int target = cross_entropy_target(targets[row], V);
    float sum = 0.0f;
    for (int c = threadIdx.x % WARP_SIZE * bf16x8::size; target >= 0 && c < C; c += WARP_SIZE * bf16x8::size) {
        const bf16x8 a = load128(hidden + row * C + c), b = load128(weight + (int64_t)target * C + c);
#pragma unroll
        for (int k = 0; k < bf16x8::size; ++k) {
            sum += __bfloat162float(a[k]) * __bfloat162float(b[k]);
        }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP_SIZE == 0) {
        shift_log2[row] = sum * LOG2_E;
    }
}

// Launch: 32 rows a block, of which warp w adds tiles w, w + CLASSIFIER_SUM_WARPS, ...; 1-D. sums (=), losses (=).
// Bound: bandwidth, num_tiles float32 a row.
__global__ void __launch_bounds__(CLASSIFIER_SUM_WARPS* WARP_SIZE)
    classifier_sum_kernel(float* losses, ClassifierHopperScratch scratch, const int32_t* targets, int64_t rows,
                          int num_tiles, int V) {
    __shared__ float warp_sums[CLASSIFIER_SUM_WARPS][WARP_SIZE];
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const int64_t row = (int64_t)blockIdx.x * WARP_SIZE + lane;
    float sum = 0.0f;
    for (int tile = warp; tile < num_tiles && row < rows; tile += CLASSIFIER_SUM_WARPS) {
        sum += scratch.tile_sums[tile * rows + row];
    }
    warp_sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || row >= rows) {
        return;
    }
#pragma unroll
    for (int i = 1; i < CLASSIFIER_SUM_WARPS; ++i) {
        sum += warp_sums[i][lane];
    }
    scratch.sums[row] = sum;
    if (!(sum > 1.0f / CLASSIFIER_MOST_SUM && sum < CLASSIFIER_MOST_SUM)) {
        *scratch.out_of_range = 1;
    }
    const bool has_target = cross_entropy_target(targets[row], V) >= 0;
    losses[row] = has_target ? logf(sum) + (scratch.shift_log2[row] / LOG2_E - scratch.target_logits[row]) : NAN;
}

// Launch: a warp a row, 1-D. out (=) [rows, C] = in times the row's factor; it may be in. Bound: bandwidth.
__global__ void __launch_bounds__(CLASSIFIER_ROW_THREADS)
    classifier_scale_rows_kernel(bf16* out, const bf16* in, ClassifierHopperScratch scratch, int64_t rows, int C,
                                 float dloss) {
    const int64_t row = classifier_warp_row();
    if (row >= rows) {
        return;
    }
    // cross_entropy.cuh has divided by the sum where it has taken over.
    const float scale = *scratch.out_of_range != 0 ? dloss : dloss / scratch.sums[row];
    for (int c = threadIdx.x % WARP_SIZE * bf16x8::size; c < C; c += WARP_SIZE * bf16x8::size) {
        bf16x8 pack = load128(in + row * C + c);
#pragma unroll
        for (int k = 0; k < bf16x8::size; ++k) {
            pack[k] = __float2bfloat16(__bfloat162float(pack[k]) * scale);
        }
        store128(out + row * C + c, pack);
    }
}
// Launch: a thread a row, 1-D. exponentials [rows, Vp]: the target's becomes itself less the sum. Bound: latency.
__global__ void __launch_bounds__(CLASSIFIER_ROW_THREADS)
    classifier_target_kernel(bf16* exponentials, ClassifierHopperScratch scratch, const int32_t* targets, int64_t rows,
                             int V, int64_t Vp) {
    const int64_t row = (int64_t)blockIdx.x * CLASSIFIER_ROW_THREADS + threadIdx.x;
    const int target = row < rows ? cross_entropy_target(targets[row], V) : -1;
    if (target >= 0 && *scratch.out_of_range == 0) {
        const float exponential = exp2_approx(scratch.target_logits[row] * LOG2_E - scratch.shift_log2[row]);
        exponentials[row * Vp + target] = __float2bfloat16(exponential - scratch.sums[row]);
    }
}

// ---- launcher ----------------------------------------------------------------------------------
// Bytes of scratch for chunks of `rows` logits of Vp, BUFFER_ALIGNMENT aligned.
inline size_t classifier_hopper_scratch_bytes(int64_t rows, int64_t Vp) {
    MemoryArea area(nullptr);
    ClassifierHopperScratch(area, rows, Vp);
    return area.num_bytes();
}

// One chunk of classifier_forward_backward. What gemm_hopper_takes refuses it does not take.
inline void classifier_hopper_forward_backward(const ClassifierOperands& x, const ClassifierShape& chunk, Gemm& gemm,
                                               cudaStream_t stream) {
    NVTX_RANGE();
    const int64_t rows = chunk.rows, Vp = chunk.padded_vocab();
    const int V = (int)chunk.V, C = chunk.C;
    MemoryArea area(x.scratch);
    const ClassifierHopperScratch s(area, rows, Vp);
    const int64_t row_blocks = ceil_div<int64_t>(rows, CLASSIFIER_ROW_THREADS / WARP_SIZE);
    classifier_shift_kernel<<<row_blocks, CLASSIFIER_ROW_THREADS, 0, stream>>>(s.shift_log2, s.out_of_range, x.hidden,
                                                                               x.weight, x.targets, rows, V, C);
    CUDA_CHECK_LAUNCH();
    gemm_hopper_exponentials(x.logits, s.tile_sums, s.target_logits, x.hidden, x.weight, s.shift_log2, x.targets, rows,
                             Vp, V, C, stream);
    classifier_sum_kernel<<<ceil_div<int64_t>(rows, WARP_SIZE), CLASSIFIER_SUM_WARPS * WARP_SIZE, 0, stream>>>(
        x.losses, s, x.targets, rows, (int)gemm_hopper_column_tiles(Vp), V);
    CUDA_CHECK_LAUNCH();
    gemm_hopper_plain(x.logits, x.hidden, x.weight, rows, Vp, C, s.out_of_range, stream);
    cross_entropy_forward_backward(x.losses, x.logits, x.targets, rows, V, Vp, 1.0f, true, stream, s.out_of_range);
    classifier_target_kernel<<<ceil_div<int64_t>(rows, CLASSIFIER_ROW_THREADS), CLASSIFIER_ROW_THREADS, 0, stream>>>(
        x.logits, s, x.targets, rows, V, Vp);
    CUDA_CHECK_LAUNCH();
    // dhidden's place has hidden's scaled rows first.
    auto scale_rows = [&](const bf16* in) {
        classifier_scale_rows_kernel<<<row_blocks, CLASSIFIER_ROW_THREADS, 0, stream>>>(x.dhidden, in, s, rows, C,
                                                                                        x.dloss);
        CUDA_CHECK_LAUNCH();
    };
    scale_rows(x.hidden);
    gemm.backward_weight(x.dweight, x.logits, x.dhidden, rows, Vp, C, true, stream);
    gemm.backward_input(x.dhidden, x.logits, x.weight, rows, Vp, C, stream);
    scale_rows(x.dhidden);
}
