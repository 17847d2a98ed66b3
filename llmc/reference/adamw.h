// reference/adamw.h: AdamW with decoupled decay (Loshchilov & Hutter 2019) and clipping by the global norm.
//   g = grad * min(1, max_grad_norm / norm);  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//   master -= learning_rate * (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps) + weight_decay * master)
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../adamw_settings.h"

namespace reference {

// master, exp_avg, exp_avg_sq (in place) [num_elements] from grads [num_elements], unclipped. When grad_norm or loss is
// not finite nothing is written.
template <class Real>
void adamw_update(Real* master, Real* exp_avg, Real* exp_avg_sq, const Real* grads, double grad_norm, double loss,
                  int64_t num_elements, const AdamWSettings& settings) {
    if (!std::isfinite(grad_norm) || !std::isfinite(loss)) {
        return;
    }
    const AdamWSettings& s = settings;
    const Real clip =
        s.max_grad_norm > 0 && grad_norm > s.max_grad_norm ? (Real)(s.max_grad_norm / grad_norm) : (Real)1;
    const Real learning_rate = (Real)s.learning_rate, eps = (Real)s.eps, weight_decay = (Real)s.weight_decay;
    // 1 - beta in float64: of a beta near 1 float32 keeps few digits.
    const Real beta1 = (Real)s.beta1, new1 = (Real)(1.0 - s.beta1), beta1_correction = (Real)s.correction(s.beta1);
    const Real beta2 = (Real)s.beta2, new2 = (Real)(1.0 - s.beta2), beta2_correction = (Real)s.correction(s.beta2);
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
