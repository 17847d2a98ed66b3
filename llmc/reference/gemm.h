// reference/gemm.h: the three matrix products of a linear layer.
//   gemm_forward          out [M, N]     = in [M, K] weight [N, K]^T
//   gemm_backward_input   din [M, K]     = dout [M, N] weight [N, K]
//   gemm_backward_weight  dweight [N, K] = dout [M, N]^T in [M, K]
// All are one product of matrices with strides, computed in the manner of Goto & van de Geijn (2008): both operands are
// copied into panels that the innermost loop reads in order, and a tile of the result stays in registers while it runs
// over k. Every element is summed by one thread in one order, so the bits do not depend on the number of threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

namespace reference {

// ---- constants ---------------------------------------------------------------------------------
// The tile of the result that stays in registers: GEMM_TILE_ROWS rows of two vectors.
#ifdef __AVX512F__
constexpr int GEMM_VECTOR_BYTES = 64;
constexpr int GEMM_TILE_ROWS = 12;  // 24 of 32 registers
#else
constexpr int GEMM_VECTOR_BYTES = 32;
constexpr int GEMM_TILE_ROWS = 6;  // 12 of 16 registers
#endif
template <class Real>
constexpr int GEMM_TILE_COLUMNS = 2 * GEMM_VECTOR_BYTES / (int)sizeof(Real);
constexpr int64_t GEMM_BLOCK_K = 256;                   // a panel of b stays in the first-level cache
constexpr int64_t GEMM_TASK_ROWS = 4 * GEMM_TILE_ROWS;  // of the result, a thread's piece of work: small, so that few
constexpr int64_t GEMM_TASK_COLUMNS = 64;  // rows keep all threads busy too; its panels stay in the second level
// Copied at a time, to bound the memory of the copies: rows of a, columns of b, and how deep.
constexpr int64_t GEMM_PACKED_ROWS = 24 * GEMM_TASK_ROWS;
constexpr int64_t GEMM_PACKED_COLUMNS = 32 * GEMM_TASK_COLUMNS;
constexpr int64_t GEMM_PACKED_DEPTH = 4 * GEMM_BLOCK_K;

// ---- operands ----------------------------------------------------------------------------------
// Element (row, column) of a matrix lies at data[row * row_stride + column * column_stride].
template <class Real>
struct Matrix {
    const Real* data;
    int64_t row_stride;
    int64_t column_stride;

    Matrix block(int64_t row, int64_t column) const {
        return {data + row * row_stride + column * column_stride, row_stride, column_stride};
    }
    Matrix transposed() const { return {data, column_stride, row_stride}; }
};

// packed (=) [K][WIDTH]: column k of the first WIDTH rows of x [num_rows, K], of fewer and zeros when it has fewer.
template <int WIDTH, class Real>
void gemm_pack_panel(Real* packed, Matrix<Real> x, int64_t num_rows, int64_t K) {
    if (num_rows >= WIDTH && x.row_stride == 1) {
        for (int64_t k = 0; k < K; ++k) {
            std::memcpy(packed + k * WIDTH, x.data + k * x.column_stride, WIDTH * sizeof(Real));
        }
        return;
    }
    if (num_rows >= WIDTH && x.column_stride == 1) {
        for (int64_t k = 0; k < K; ++k) {
            for (int row = 0; row < WIDTH; ++row) {
                packed[k * WIDTH + row] = x.data[row * x.row_stride + k];
            }
        }
        return;
    }
    for (int64_t k = 0; k < K; ++k) {
        for (int64_t row = 0; row < WIDTH; ++row) {
            packed[k * WIDTH + row] = row < num_rows ? x.data[row * x.row_stride + k * x.column_stride] : 0;
        }
    }
}

// ---- the innermost loop ------------------------------------------------------------------------
template <class Real>
struct GemmVector;
template <>
struct GemmVector<float> {
    typedef float type __attribute__((vector_size(GEMM_VECTOR_BYTES)));
};
template <>
struct GemmVector<double> {
    typedef double type __attribute__((vector_size(GEMM_VECTOR_BYTES)));
};

// out (= or +=) [rows, columns], rows at most GEMM_TILE_ROWS, columns at most GEMM_TILE_COLUMNS, from packed panels
// a [K][GEMM_TILE_ROWS] and b [K][GEMM_TILE_COLUMNS].
template <class Real>
void gemm_tile(Real* out, int64_t out_stride, const Real* a, const Real* b, int64_t rows, int64_t columns, int64_t K,
               bool accumulate) {
    using Vector = typename GemmVector<Real>::type;
    constexpr int COLUMNS = GEMM_TILE_COLUMNS<Real>, LANES = COLUMNS / 2;
    Vector sum[GEMM_TILE_ROWS][2] = {};
    for (int64_t k = 0; k < K; ++k) {
        Vector b0, b1;
        std::memcpy(&b0, b + k * COLUMNS, sizeof(Vector));
        std::memcpy(&b1, b + k * COLUMNS + LANES, sizeof(Vector));
        for (int i = 0; i < GEMM_TILE_ROWS; ++i) {
            const Real a_value = a[k * GEMM_TILE_ROWS + i];
            sum[i][0] += a_value * b0;
            sum[i][1] += a_value * b1;
        }
    }
    for (int64_t i = 0; i < rows; ++i) {
        Real values[COLUMNS];
        std::memcpy(values, &sum[i], sizeof(values));
        Real* out_row = out + i * out_stride;
        for (int64_t n = 0; n < columns; ++n) {
            out_row[n] = accumulate ? out_row[n] + values[n] : values[n];
        }
    }
}

// ---- products ----------------------------------------------------------------------------------
constexpr int64_t gemm_padded(int64_t n, int64_t width) { return (n + width - 1) / width * width; }

// Memory for copies of operands in panels, kept from product to product.
template <class Real>
struct GemmScratch {
    std::unique_ptr<Real[]> a, b;
    size_t a_size = 0, b_size = 0;

    // Room for M rows of a and N columns of b, K deep. Not initialised: that would cost as much as filling it.
    void reserve(int64_t M, int64_t N, int64_t K) {
        reserve_panels(a, a_size, (size_t)(gemm_padded(M, GEMM_TILE_ROWS) * K));
        reserve_panels(b, b_size, (size_t)(gemm_padded(N, GEMM_TILE_COLUMNS<Real>) * K));
    }

  private:
    static void reserve_panels(std::unique_ptr<Real[]>& panels, size_t& size, size_t needed) {
        if (size < needed) {
            panels.reset(new Real[needed]);
            size = needed;
        }
    }
};

// out (= or +=) [M, N], rows out_stride apart, from consecutive panels of a and of b, K deep.
template <class Real>
void gemm_panels(Real* out, int64_t out_stride, const Real* a, const Real* b, int64_t M, int64_t N, int64_t K,
                 bool accumulate) {
    for (int64_t n = 0; n < N; n += GEMM_TILE_COLUMNS<Real>) {
        for (int64_t m = 0; m < M; m += GEMM_TILE_ROWS) {
            gemm_tile(out + m * out_stride + n, out_stride, a + m * K, b + n * K,
                      std::min<int64_t>(GEMM_TILE_ROWS, M - m), std::min<int64_t>(GEMM_TILE_COLUMNS<Real>, N - n), K,
                      accumulate);
        }
    }
}

// out (= or +=) [M, N], rows out_stride apart, of a [M, K] and b [K, N]; on the calling thread, for blocks that fit
// into its cache.
template <class Real>
void gemm_block(Real* out, int64_t out_stride, Matrix<Real> a, Matrix<Real> b, int64_t M, int64_t N, int64_t K,
                bool accumulate, GemmScratch<Real>& scratch) {
    scratch.reserve(M, N, K);
    for (int64_t m = 0; m < M; m += GEMM_TILE_ROWS) {
        gemm_pack_panel<GEMM_TILE_ROWS>(scratch.a.get() + m * K, a.block(m, 0), M - m, K);
    }
    for (int64_t n = 0; n < N; n += GEMM_TILE_COLUMNS<Real>) {
        gemm_pack_panel<GEMM_TILE_COLUMNS<Real>>(scratch.b.get() + n * K, b.block(0, n).transposed(), N - n, K);
    }
    gemm_panels(out, out_stride, scratch.a.get(), scratch.b.get(), M, N, K, accumulate);
}

// packed (=) the panels of x [num_rows, K], GEMM_BLOCK_K deep: all panels of the first block of columns, then those of
// the second, ... Shared among the threads that call it; they may leave before others are done.
template <int WIDTH, class Real>
void gemm_pack_shared(Real* packed, Matrix<Real> x, int64_t num_rows, int64_t K) {
#pragma omp for collapse(2) schedule(static) nowait
    for (int64_t k = 0; k < K; k += GEMM_BLOCK_K) {
        for (int64_t row = 0; row < num_rows; row += WIDTH) {
            const int64_t depth = std::min(GEMM_BLOCK_K, K - k);
            gemm_pack_panel<WIDTH>(packed + gemm_padded(num_rows, WIDTH) * k + row * depth, x.block(row, k),
                                   num_rows - row, depth);
        }
    }
}

// out (= or +=) [M, N] row-major, of a [M, K] and b [K, N]; on all threads.
template <class Real>
void gemm(Real* out, Matrix<Real> a, Matrix<Real> b, int64_t M, int64_t N, int64_t K, bool accumulate) {
    constexpr int TILE_COLUMNS = GEMM_TILE_COLUMNS<Real>;
    GemmScratch<Real> scratch;
    scratch.reserve(std::min(M, GEMM_PACKED_ROWS), std::min(N, GEMM_PACKED_COLUMNS), std::min(K, GEMM_PACKED_DEPTH));
#pragma omp parallel
    for (int64_t m0 = 0; m0 < M; m0 += GEMM_PACKED_ROWS) {
        const int64_t rows = std::min(GEMM_PACKED_ROWS, M - m0), padded_rows = gemm_padded(rows, GEMM_TILE_ROWS);
        for (int64_t n0 = 0; n0 < N; n0 += GEMM_PACKED_COLUMNS) {
            const int64_t columns = std::min(GEMM_PACKED_COLUMNS, N - n0);
            const int64_t padded_columns = gemm_padded(columns, TILE_COLUMNS);
            for (int64_t k0 = 0; k0 < K; k0 += GEMM_PACKED_DEPTH) {
                const int64_t depth = std::min(GEMM_PACKED_DEPTH, K - k0);
                gemm_pack_shared<GEMM_TILE_ROWS>(scratch.a.get(), a.block(m0, k0), rows, depth);
                gemm_pack_shared<TILE_COLUMNS>(scratch.b.get(), b.block(k0, n0).transposed(), columns, depth);
#pragma omp barrier
#pragma omp for collapse(2) schedule(dynamic)
                for (int64_t m = 0; m < rows; m += GEMM_TASK_ROWS) {
                    for (int64_t n = 0; n < columns; n += GEMM_TASK_COLUMNS) {
                        for (int64_t k = 0; k < depth; k += GEMM_BLOCK_K) {
                            const int64_t block_depth = std::min(GEMM_BLOCK_K, depth - k);
                            gemm_panels(out + (m0 + m) * N + n0 + n, N,
                                        scratch.a.get() + padded_rows * k + m * block_depth,
                                        scratch.b.get() + padded_columns * k + n * block_depth,
                                        std::min(GEMM_TASK_ROWS, rows - m), std::min(GEMM_TASK_COLUMNS, columns - n),
                                        block_depth, accumulate || k0 + k > 0);
                        }
                    }
                }
            }
        }
    }
}

// out (= or +=) [M, N] = in [M, K] weight [N, K]^T.
template <class Real>
void gemm_forward(Real* out, const Real* in, const Real* weight, int64_t M, int64_t N, int64_t K, bool accumulate) {
    gemm<Real>(out, {in, K, 1}, {weight, 1, K}, M, N, K, accumulate);
}

// din (= or +=) [M, K] = dout [M, N] weight [N, K].
template <class Real>
void gemm_backward_input(Real* din, const Real* dout, const Real* weight, int64_t M, int64_t N, int64_t K,
                         bool accumulate) {
    gemm<Real>(din, {dout, N, 1}, {weight, K, 1}, M, K, N, accumulate);
}

// dweight (= or +=) [N, K] = dout [M, N]^T in [M, K].
template <class Real>
void gemm_backward_weight(Real* dweight, const Real* dout, const Real* in, int64_t M, int64_t N, int64_t K,
                          bool accumulate) {
    gemm<Real>(dweight, {dout, 1, N}, {in, K, 1}, N, K, M, accumulate);
}

}  // namespace reference
