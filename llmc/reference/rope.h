// reference/rope.h: rotary positions (Su et al. 2021), in place: in each head, elements i and i + D/2 turn by
// position * inverse_frequencies[i] (Hugging Face's half-rotation convention). Backward is the inverse rotation.
// Shapes: qkv [rows, row_width], row_width = (H + 2 Hkv) D; the first num_rotated_heads = H + Hkv heads of D turn, v
// does not; rows = B * T, position = first_position + row mod T; D even.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace reference {

// qkv (in place): every rotated head turns by sign * angle. Angles are formed in double: right at 10^6 positions.
template <class Real>
void rope_rotate(Real* qkv, int64_t B, int64_t T, int num_rotated_heads, int row_width, int D,
                 const std::vector<double>& inverse_frequencies, int64_t first_position, double sign) {
    const int half = D / 2;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; ++t) {
        std::vector<Real> cosine(half), sine(half);
        for (int i = 0; i < half; ++i) {
            const double angle = sign * (double)(first_position + t) * inverse_frequencies[i];
            cosine[i] = (Real)std::cos(angle);
            sine[i] = (Real)std::sin(angle);
        }
        for (int64_t b = 0; b < B; ++b) {
            for (int h = 0; h < num_rotated_heads; ++h) {
                Real* low = qkv + (b * T + t) * row_width + h * D;
                Real* high = low + half;
                for (int i = 0; i < half; ++i) {
                    const Real x = low[i], y = high[i];
                    low[i] = x * cosine[i] - y * sine[i];
                    high[i] = y * cosine[i] + x * sine[i];
                }
            }
        }
    }
}

// qkv (in place) [B * T, row_width]; inverse_frequencies [D / 2], radians a position (rope_inverse_frequencies).
template <class Real>
void rope_forward(Real* qkv, int64_t B, int64_t T, int num_rotated_heads, int row_width, int D,
                  const std::vector<double>& inverse_frequencies, int64_t first_position) {
    rope_rotate(qkv, B, T, num_rotated_heads, row_width, D, inverse_frequencies, first_position, 1.0);
}

// dqkv (in place): the same rows turned back, which is the gradient of rope_forward.
template <class Real>
void rope_backward(Real* dqkv, int64_t B, int64_t T, int num_rotated_heads, int row_width, int D,
                   const std::vector<double>& inverse_frequencies, int64_t first_position) {
    rope_rotate(dqkv, B, T, num_rotated_heads, row_width, D, inverse_frequencies, first_position, -1.0);
}

}  // namespace reference
