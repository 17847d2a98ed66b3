// classifier.cuh: the last product and the loss. The logits of all rows never exist at once: chunks of rows go through
// logits GEMM, cross-entropy with its gradient in place (cross_entropy.cuh), and both backward GEMMs.
// Shapes: classifier_operands.cuh; Vp = classifier_padded_vocab(V), so that every row of logits is aligned and the
// product's tiles are full.
// Cost: the products, 6 rows Vp C operations; and one read and one write of the logits, which a large vocabulary on
// sm_90a saves (classifier_hopper.cuh).
// Reference: reference/classifier.h. Variants: dev/cuda/classifier.cu.
#pragma once
#include <algorithm>

#include "classifier_operands.cuh"
#include "cross_entropy.cuh"
#include "cuda_common.cuh"
#include "gemm.cuh"
#include "gpu_properties.cuh"
#ifdef LLMC_HOPPER
#include "classifier_hopper.cuh"
#endif

// ---- constants ---------------------------------------------------------------------------------
// The vocabulary from which on classifier_hopper.cuh is used: this, and so many times the width. It spares 4 V bytes a
// row and moves 12 C.
constexpr int64_t CLASSIFIER_HOPPER_VOCAB = 16384, CLASSIFIER_HOPPER_WIDTHS = 8;
constexpr int MEAN_LOSS_THREADS = 512;
constexpr int MEAN_LOSS_BLOCKS = 128;

// ---- mean of the losses ------------------------------------------------------------------------
// Launch: MEAN_LOSS_BLOCKS blocks; block b sums losses b * threads + thread, + blocks * threads, ... Bound:
// latency; a thread has 16 losses where there are a million.
__global__ void __launch_bounds__(MEAN_LOSS_THREADS)
    mean_loss_partial_kernel(double* partials, const float* losses, int64_t rows) {
    double sum = 0.0;
    for (int64_t i = (int64_t)blockIdx.x * MEAN_LOSS_THREADS + threadIdx.x; i < rows;
         i += (int64_t)MEAN_LOSS_BLOCKS * MEAN_LOSS_THREADS) {
        sum += losses[i];
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) {
        partials[blockIdx.x] = sum;
    }
}

// Launch: one block. Bound: latency.
__global__ void __launch_bounds__(MEAN_LOSS_THREADS)
    mean_loss_kernel(float* out, const double* partials, int64_t rows, float weight) {
    const double sum = block_sum_double(threadIdx.x < MEAN_LOSS_BLOCKS ? partials[threadIdx.x] : 0.0);
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
// Whether training takes classifier_hopper.cuh: by GPU and shape alone.
inline bool classifier_is_hopper(const ClassifierShape& shape) {
#ifdef LLMC_HOPPER
    return gpu_properties().compute_capability == 90 && shape.V >= CLASSIFIER_HOPPER_VOCAB &&
           shape.V >= CLASSIFIER_HOPPER_WIDTHS * shape.C &&
           gemm_hopper_takes(nullptr, nullptr, nullptr, shape.rows, shape.padded_vocab(), shape.C);
#else
    return (void)shape, false;
#endif
}
// Bytes of scratch of classifier_forward_backward beside the logits; BUFFER_ALIGNMENT aligned. 0: none.
inline size_t classifier_scratch_bytes(const ClassifierShape& shape) {
#ifdef LLMC_HOPPER
    return classifier_is_hopper(shape) ? classifier_hopper_scratch_bytes(shape.chunk_rows, shape.padded_vocab()) : 0;
#else
    return (void)shape, 0;
#endif
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

// One chunk of the next function, on any GPU.
inline void classifier_chunk_forward_backward(const ClassifierOperands& x, const ClassifierShape& chunk, Gemm& gemm,
                                              cudaStream_t stream) {
    const int64_t rows = chunk.rows, Vp = chunk.padded_vocab(), C = chunk.C;
    gemm.forward(x.logits, x.hidden, x.weight, nullptr, rows, Vp, C, stream);
    cross_entropy_forward_backward(x.losses, x.logits, x.targets, rows, chunk.V, Vp, x.dloss, true, stream);
    gemm.backward_weight(x.dweight, x.logits, x.hidden, rows, Vp, C, true, stream);
    gemm.backward_input(x.dhidden, x.logits, x.weight, rows, Vp, C, stream);
}

// losses, and in dhidden and dweight the gradients of dloss * (sum of the losses). Rows of dweight from V on gain
// exactly 0.
inline void classifier_forward_backward(const ClassifierOperands& operands, const ClassifierShape& shape, Gemm& gemm,
                                        cudaStream_t stream) {
    NVTX_RANGE();
    for_each_classifier_chunk(operands, shape, [&](const ClassifierOperands& x, const ClassifierShape& chunk) {
#ifdef LLMC_HOPPER
        if (classifier_is_hopper(shape)) {
            return classifier_hopper_forward_backward(x, chunk, gemm, stream);
        }
#endif
        classifier_chunk_forward_backward(x, chunk, gemm, stream);
    });
}
