// reference/grad_norm.h: the global gradient norm, sqrt(sum of g^2).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace reference {

// The 2-norm of grads [num_elements]; not finite when one of them is not. Squares are formed and added in double, so
// that finite floats cannot overflow it; chunks of fixed size make the order of additions independent of the threads.
template <class Real>
double grad_norm(const Real* grads, int64_t num_elements) {
    constexpr int64_t CHUNK = 4096;
    const int64_t num_chunks = (num_elements + CHUNK - 1) / CHUNK;
    std::vector<double> partials(num_chunks);
#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        const int64_t end = std::min((chunk + 1) * CHUNK, num_elements);
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = chunk * CHUNK; i < end; ++i) {
            sum += (double)grads[i] * (double)grads[i];
        }
        partials[chunk] = sum;
    }
    double sum = 0.0;
    for (const double partial : partials) {
        sum += partial;
    }
    return std::sqrt(sum);
}

}  // namespace reference
