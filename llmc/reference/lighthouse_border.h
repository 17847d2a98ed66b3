// reference/lighthouse_border.h: what Lighthouse attention of a chunk owes to its neighbours when a sequence is cut
// into chunks (context parallelism). Pooling, scores, selection and gather stay within a chunk. Of the scatter, the
// last entry of every level above 0 is also added to the first window - 1 tokens of the chunk that follows: levels - 1
// rows a head go to the next chunk forward, and the gradients of as many come back. What lighthouse_border.cuh is
// tested against. Shapes: B chunks, each a sequence of geometry g; border rows [B, levels - 1, H, D], level 1 first.
#pragma once
#include "lighthouse.h"

namespace reference {

// The row of the sub-sequence that holds the last entry of `level`; -1 when it is absent.
inline int32_t lighthouse_last_row(const int32_t* head_positions, int level, const LighthouseGeometry& g) {
    return head_positions[g.slot(level, g.level_size(level) - 1)];
}

// border (=) what each chunk passes on: the rows of x [B, S, H, D] of its last entries, zero where absent.
template <class Real>
void lighthouse_border(Real* border, View<const Real> x, const int32_t* positions, int64_t B, int H, int Hkv, int D,
                       const LighthouseGeometry& g) {
    for (int64_t b = 0; b < B; ++b) {
        for (int level = 1; level < g.levels; ++level) {
            for (int h = 0; h < H; ++h, border += D) {
                const int32_t n = lighthouse_last_row(positions + (b * Hkv + h / (H / Hkv)) * g.num_slots, level, g);
                for (int d = 0; d < D; ++d) {
                    border[d] = n >= 0 ? x.row(b, n, h)[d] : Real(0);
                }
            }
        }
    }
}

// out (+=) [B, T, H, D] what the chunks before pass on.
template <class Real>
void lighthouse_add_border(View<Real> out, const Real* border_before, int64_t B, int H, int D,
                           const LighthouseGeometry& g) {
    for (int64_t b = 0; b < B; ++b) {
        for (int level = 1; level < g.levels; ++level) {
            for (int h = 0; h < H; ++h, border_before += D) {
                for (int64_t t = 0; t < g.window(level) - 1; ++t) {
                    for (int d = 0; d < D; ++d) {
                        out.row(b, t, h)[d] += border_before[d];
                    }
                }
            }
        }
    }
}

// dborder (=) what each chunk sends back: the sums of dout [B, T, H, D] over the tokens that took a row from before.
template <class Real>
void lighthouse_border_backward(Real* dborder, View<const Real> dout, int64_t B, int H, int D,
                                const LighthouseGeometry& g) {
    for (int64_t b = 0; b < B; ++b) {
        for (int level = 1; level < g.levels; ++level) {
            for (int h = 0; h < H; ++h, dborder += D) {
                std::fill(dborder, dborder + D, Real(0));
                for (int64_t t = 0; t < g.window(level) - 1; ++t) {
                    for (int d = 0; d < D; ++d) {
                        dborder[d] += dout.row(b, t, h)[d];
                    }
                }
            }
        }
    }
}

// dx (+=) [B, S, H, D], in the rows of the last entries, what the chunks after send back.
template <class Real>
void lighthouse_add_border_backward(View<Real> dx, const Real* dborder_after, const int32_t* positions, int64_t B,
                                    int H, int Hkv, int D, const LighthouseGeometry& g) {
    for (int64_t b = 0; b < B; ++b) {
        for (int level = 1; level < g.levels; ++level) {
            for (int h = 0; h < H; ++h, dborder_after += D) {
                const int32_t n = lighthouse_last_row(positions + (b * Hkv + h / (H / Hkv)) * g.num_slots, level, g);
                for (int d = 0; n >= 0 && d < D; ++d) {
                    dx.row(b, n, h)[d] += dborder_after[d];
                }
            }
        }
    }
}

}  // namespace reference
