// reference/adamw.h: AdamW with decoupled decay (Loshchilov & Hutter 2019) and clipping by the global norm.
//   g = grad * min(1, max_grad_norm / norm);  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//   master -= learning_rate * (m / beta1_correction / (sqrt(v / beta2_correction) + eps) + weight_decay * master)
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace reference {

struct AdamWArguments {
    double learning_rate;
    double beta1;
    double beta2;
    double eps;
    double weight_decay;
    double max_grad_norm;     // 0: no clipping
    double beta1_correction;  // 1 - beta1^step, step counting from 1
    double beta2_correction;  // 1 - beta2^step
};

// master, exp_avg, exp_avg_sq (in place) [num_elements] from grads [num_elements], unclipped. When grad_norm or loss is
// not finite nothing is written.
template <class Real>
void adamw_update(Real* master, Real* exp_avg, Real* exp_avg_sq, const Real* grads, double grad_norm, double loss,
                  int64_t num_elements, const AdamWArguments& arguments) {
    if (!std::isfinite(grad_norm) || !std::isfinite(loss)) {
        return;
    }
    const AdamWArguments& a = arguments;
    const Real clip =
        a.max_grad_norm > 0 && grad_norm > a.max_grad_norm ? (Real)(a.max_grad_norm / grad_norm) : (Real)1;
    const Real learning_rate = (Real)a.learning_rate, eps = (Real)a.eps, weight_decay = (Real)a.weight_decay;
    const Real beta1 = (Real)a.beta1, new1 = 1 - beta1, beta1_correction = (Real)a.beta1_correction;
    const Real beta2 = (Real)a.beta2, new2 = 1 - beta2, beta2_correction = (Real)a.beta2_correction;
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < num_elements; ++i) {
        const Real g = grads[i] * clip;
        const Real m = beta1 * exp_avg[i] + new1 * g;
        // Never infinite, where it would stay: without clipping a finite gradient may be that large.
        const Real v = std::min(beta2 * exp_avg_sq[i] + new2 * g * g, std::numeric_limits<Real>::max());
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        const Real step = m / beta1_correction / (std::sqrt(v / beta2_correction) + eps);
        master[i] -= learning_rate * (step + weight_decay * master[i]);
    }
}

}  // namespace reference
