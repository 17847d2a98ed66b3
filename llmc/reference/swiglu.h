// reference/swiglu.h: the feed-forward gate (Shazeer 2020), out = gate * s * up with s = 1 / (1 + exp(-gate)).
//   dgate = dout * up * s * (1 + gate * (1 - s)),   dup = dout * gate * s
// Shapes: gate_up [rows, 2F], gate in columns [0, F), up in [F, 2F); out [rows, F]; rows = B * T.
#pragma once
#include <cstdint>

#include "exponential.h"

namespace reference {

// out (=) [rows, F] from gate_up [rows, 2F].
template <class Real>
void swiglu_forward(Real* out, const Real* gate_up, int64_t rows, int F) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const Real *gate = gate_up + row * 2 * F, *up = gate + F;
        Real* out_row = out + row * F;
#pragma omp simd
        for (int f = 0; f < F; ++f) {
            const Real s = 1 / (1 + exponential(-gate[f]));
            out_row[f] = gate[f] * s * up[f];
        }
    }
}

// dgate_up (=) [rows, 2F] from dout [rows, F] and gate_up [rows, 2F]; dgate_up may be gate_up.
template <class Real>
void swiglu_backward(Real* dgate_up, const Real* dout, const Real* gate_up, int64_t rows, int F) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const Real *gate = gate_up + row * 2 * F, *up = gate + F;
        Real *dgate = dgate_up + row * 2 * F, *dup = dgate + F;
        const Real* dout_row = dout + row * F;
#pragma omp simd
        for (int f = 0; f < F; ++f) {
            const Real g = gate[f], u = up[f], d = dout_row[f];
            const Real s = 1 / (1 + exponential(-g));
            dgate[f] = d * u * s * (1 + g * (1 - s));
            dup[f] = d * g * s;
        }
    }
}

}  // namespace reference
