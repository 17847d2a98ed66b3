// reference/classifier.h: the last product and the loss. The logits of all rows never exist at once: chunks of rows go
// through logits product, softmax cross-entropy with its gradient in place, and both backward products.
//   loss = lse - logit[target],   dlogit = (exp(logit - lse) - [column == target]) * dloss
// Shapes: hidden [rows, C], weight [V, C], logits [chunk_rows, V], targets and losses [rows].
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "exponential.h"
#include "gemm.h"

namespace reference {

// losses (=) [rows]; logits [rows, row_stride]: with write_gradient replaced by their gradient times dloss, and by 0 in
// columns from V on. A target outside [0, V) gives the loss NaN.
template <class Real>
void cross_entropy_forward_backward(Real* losses, Real* logits, const int32_t* targets, int64_t rows, int64_t V,
                                    int64_t row_stride, double dloss, bool write_gradient) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        Real* z = logits + row * row_stride;
        const int64_t target = targets[row];
        const bool target_exists = target >= 0 && target < V;
        const Real target_logit = target_exists ? z[target] : std::numeric_limits<Real>::quiet_NaN();
        Real maximum = z[0], sum = 0;
#pragma omp simd reduction(max : maximum)
        for (int64_t i = 1; i < V; ++i) {
            maximum = z[i] > maximum ? z[i] : maximum;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < V; ++i) {
            sum += exponential(z[i] - maximum);
        }
        const Real lse = maximum + std::log(sum);
        losses[row] = lse - target_logit;
        if (write_gradient) {
#pragma omp simd
            for (int64_t i = 0; i < V; ++i) {
                z[i] = exponential(z[i] - lse) * (Real)dloss;
            }
            if (target_exists) {
                z[target] -= (Real)dloss;
            }
            std::fill(z + V, z + row_stride, Real(0));
        }
    }
}

// losses (=) [rows] of hidden [rows, C] against targets [rows]; weight [V, C]. logits: scratch [chunk_rows, V].
template <class Real>
void classifier_loss(Real* losses, Real* logits, const Real* hidden, const Real* weight, const int32_t* targets,
                     int64_t rows, int64_t V, int C, int64_t chunk_rows) {
    for (int64_t begin = 0; begin < rows; begin += chunk_rows) {
        const int64_t chunk = std::min(chunk_rows, rows - begin);
        gemm_forward(logits, hidden + begin * C, weight, chunk, V, C, false);
        cross_entropy_forward_backward(losses + begin, logits, targets + begin, chunk, V, V, 0.0, false);
    }
}

// losses (=) [rows]; dhidden (=) [rows, C] and dweight (+=) [V, C]: the gradients of dloss * (sum of the losses), so
// dloss is loss_weight / rows for a mean. dhidden may be hidden. logits: scratch [chunk_rows, V].
template <class Real>
void classifier_forward_backward(Real* losses, Real* dhidden, Real* dweight, Real* logits, const Real* hidden,
                                 const Real* weight, const int32_t* targets, int64_t rows, int64_t V, int C,
                                 int64_t chunk_rows, double dloss) {
    for (int64_t begin = 0; begin < rows; begin += chunk_rows) {
        const int64_t chunk = std::min(chunk_rows, rows - begin);
        const Real* chunk_hidden = hidden + begin * C;
        gemm_forward(logits, chunk_hidden, weight, chunk, V, C, false);
        cross_entropy_forward_backward(losses + begin, logits, targets + begin, chunk, V, V, dloss, true);
        gemm_backward_weight(dweight, logits, chunk_hidden, chunk, V, C, true);
        gemm_backward_input(dhidden + begin * C, logits, weight, chunk, V, C, false);
    }
}

// The mean of losses [rows], summed in double in order.
template <class Real>
double mean_loss(const Real* losses, int64_t rows) {
    double sum = 0.0;
    for (int64_t row = 0; row < rows; ++row) {
        sum += (double)losses[row];
    }
    return sum / (double)rows;
}

}  // namespace reference
