// reference/rmsnorm.h: out = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019), and its
// backward.
//   with n = x * rstd and g = dout * weight:
//   dx = dresidual + rstd * (g - n * mean(g * n)),   dweight += sum over rows of dout * n
// Shapes: x, out, their gradients [rows, C]; weight [C]; rstd [rows]; rows = B * T.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace reference {

// ---- forward -----------------------------------------------------------------------------------
// out (=) [rows, C] and rstd (=) [rows] from x [rows, C] and weight [C]. out may be x.
template <class Real>
void rmsnorm_forward(Real* out, Real* rstd, const Real* x, const Real* weight, int64_t rows, int C, double eps) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const Real* x_row = x + row * C;
        Real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; ++c) {
            sum += x_row[c] * x_row[c];
        }
        const Real r = 1 / std::sqrt(sum / (Real)C + (Real)eps);
        rstd[row] = r;
        Real* out_row = out + row * C;
#pragma omp simd
        for (int c = 0; c < C; ++c) {
            out_row[c] = x_row[c] * r * weight[c];
        }
    }
}

// out (=) [rows, C]: the norm's output again, from x and the rstd that forward left.
template <class Real>
void rmsnorm_recompute(Real* out, const Real* x, const Real* weight, const Real* rstd, int64_t rows, int C) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        for (int c = 0; c < C; ++c) {
            out[row * C + c] = x[row * C + c] * rstd[row] * weight[c];
        }
    }
}

// ---- backward ----------------------------------------------------------------------------------
// dx (=) [rows, C], dweight (+=) [C] from dout, x [rows, C], weight [C], rstd [rows]. dresidual [rows, C]: the gradient
// that reaches x directly, nullptr for none. dx may be dresidual, and dout when nothing else needs it.
template <class Real>
void rmsnorm_backward(Real* dx, Real* dweight, const Real* dresidual, const Real* dout, const Real* x,
                      const Real* weight, const Real* rstd, int64_t rows, int C) {
    // Threads take columns here and add the rows in order, so the sum does not depend on their number.
    constexpr int COLUMNS = 16;
#pragma omp parallel for schedule(static)
    for (int begin = 0; begin < C; begin += COLUMNS) {
        const int end = std::min(begin + COLUMNS, C);
        Real sum[COLUMNS] = {};
        for (int64_t row = 0; row < rows; ++row) {
            for (int c = begin; c < end; ++c) {
                sum[c - begin] += dout[row * C + c] * (x[row * C + c] * rstd[row]);
            }
        }
        for (int c = begin; c < end; ++c) {
            dweight[c] += sum[c - begin];
        }
    }
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const Real *dout_row = dout + row * C, *x_row = x + row * C;
        const Real r = rstd[row];
        Real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; ++c) {
            sum += dout_row[c] * weight[c] * (x_row[c] * r);
        }
        const Real mean = sum / (Real)C;
        for (int c = 0; c < C; ++c) {
            const Real g = dout_row[c] * weight[c], n = x_row[c] * r;
            dx[row * C + c] = (dresidual == nullptr ? 0 : dresidual[row * C + c]) + r * (g - n * mean);
        }
    }
}

}  // namespace reference
