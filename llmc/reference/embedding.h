// reference/embedding.h: the row of a table for every token, and its gradient, which adds up the rows of equal tokens.
// Shapes: tokens [rows] in [0, V), weight [V, C], out [rows, C]; rows = B * T.
#pragma once
#include <algorithm>
#include <cstdint>

namespace reference {

// out (=) [rows, C]: the rows of weight [V, C] that tokens [rows] name; every token must be in [0, V).
template <class Real>
void embedding_forward(Real* out, const int32_t* tokens, const Real* weight, int64_t rows, int C) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const Real* from = weight + (int64_t)tokens[row] * C;
        std::copy(from, from + C, out + row * C);
    }
}

// dweight (+=) [V, C]: row v gains the sum of the rows of dout [rows, C] whose token is v. Threads take columns and
// walk the rows in order, so the sum does not depend on their number.
template <class Real>
void embedding_backward(Real* dweight, const Real* dout, const int32_t* tokens, int64_t rows, int C) {
    constexpr int COLUMNS = 16;
#pragma omp parallel for schedule(static)
    for (int begin = 0; begin < C; begin += COLUMNS) {
        const int end = std::min(begin + COLUMNS, C);
        for (int64_t row = 0; row < rows; ++row) {
            Real* to = dweight + (int64_t)tokens[row] * C;
            for (int c = begin; c < end; ++c) {
                to[c] += dout[row * C + c];
            }
        }
    }
}

}  // namespace reference
