// rope_cases.cuh: what the checks of kernels that turn rows share: models with their frequencies, and the CPU reference
// on rows of two runs of positions.
#pragma once
#include "dev/cuda/harness.cuh"
#include "llmc/reference/rope.h"
#include "llmc/rope.cuh"

// scaled: as Llama 3 does.
inline ModelConfig rope_config(int H, int Hkv, int D, bool scaled = false) {
    ModelConfig config;
    config.num_heads = H, config.num_kv_heads = Hkv, config.head_dim = D, config.rope_theta = 500000.0;
    if (scaled) {
        config.rope_scaling = {32.0, 1.0, 4.0, 8192};
    }
    return config;
}

inline std::string positions_label(const RopePositions& p) {
    std::string text = format_string("from %lld", (long long)p.first_position[0]);
    if (p.run_rows < p.T) {
        text += format_string(" and, row %lld, %lld", (long long)p.run_rows, (long long)p.first_position[1]);
    }
    return text;
}

// rows (in place) [B * T, heads of D]: the first num_rotated_heads turn, back when `inverse`.
template <class Real>
void reference_turn(std::vector<Real>& rows, int64_t B, const RopePositions& positions, int num_rotated_heads,
                    int row_width, int D, const std::vector<double>& inverse_frequencies, bool inverse) {
    const int64_t T = positions.T, run_rows = positions.run_rows;
    for (int64_t b = 0; b < B; ++b) {
        Real* const first = rows.data() + b * T * row_width;
        const auto turn = inverse ? reference::rope_backward<Real> : reference::rope_forward<Real>;
        turn(first, 1, run_rows, num_rotated_heads, row_width, D, inverse_frequencies, positions.first_position[0]);
        turn(first + run_rows * row_width, 1, T - run_rows, num_rotated_heads, row_width, D, inverse_frequencies,
             positions.first_position[1]);
    }
}
