// reference/lighthouse.h: Lighthouse attention (arXiv:2605.06554) in plain loops: score, select, gather, attend on the
// gathered sub-sequence, scatter back; forward and backward. What lighthouse*.cuh is tested against.
//
// Entry (l, i) of the pyramid stands for tokens [i c, (i + 1) c - 1], c = pool^l. Query head h uses the selection of
// key/value head h / (H / Hkv). No gradient flows through scores and selection.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "../lighthouse_geometry.h"
#include "attention.h"

namespace reference {

// What forward leaves for backward.
template <class Real>
struct LighthouseState {
    std::vector<int32_t> entries;    // [B, Hkv, S] pyramid address of each row of the sub-sequence, causal order
    std::vector<int32_t> positions;  // [B, Hkv, num_slots] the inverse: row of each pyramid address, -1 when absent
    std::vector<Real> q;             // [B, S, H, D] gathered
    std::vector<Real> k, v;          // [B, S, Hkv, D]
    std::vector<Real> out;           // [B, S, H, D] of the inner attention
    std::vector<Real> lse;           // [B, H, S]
};

// Causal attention of the sub-sequence on itself.
inline AttentionShape lighthouse_attention_shape(int64_t B, int H, int Hkv, int D, int64_t S, double scale) {
    AttentionShape shape;
    shape.B = (int)B, shape.H = H, shape.Hkv = Hkv, shape.D = D;
    shape.Tq = shape.Tk = S;
    shape.scale = scale;
    return shape;
}

// ---- score -------------------------------------------------------------------------------------
// scores (=) [B, heads, T] float32: the l2 norm of every row of x.
template <class Real>
void lighthouse_norms(float* scores, View<const Real> x, int64_t B, int64_t T, int heads, int D) {
#pragma omp parallel for collapse(3)
    for (int64_t b = 0; b < B; ++b) {
        for (int h = 0; h < heads; ++h) {
            for (int64_t t = 0; t < T; ++t) {
                const Real* row = x.row(b, t, h);
                double sum = 0.0;
                for (int d = 0; d < D; ++d) {
                    sum += (double)row[d] * row[d];
                }
                scores[(b * heads + h) * T + t] = (float)std::sqrt(sum);
            }
        }
    }
}

// The dilated scorer (paper Sec. 4): tokens of equal t mod `dilation` form a sequence; the norms of causal attention's
// output on it as (q, k, v) are the query scores, as (k, q, v) the key scores. Both (=) [B, H, T]: with grouped queries
// the key's role is played once for each query head of its group.
template <class Real>
void lighthouse_dilated_scores(float* q_scores, float* k_scores, View<const Real> q, View<const Real> k,
                               View<const Real> v, int64_t B, int64_t T, int H, int Hkv, int D, int dilation,
                               double scale) {
    const int group = H / Hkv;
    std::vector<Real> out((size_t)(T * H * D)), lse((size_t)(H * (T / dilation)));
    const View<Real> out_view{out.data(), T * H * D, (int64_t)H * D, D};
    const auto phase = [&](auto view, int64_t b, int r) {  // tokens r, r + dilation, ... of sequence b
        view.data = view.row(b, r, 0);
        view.stride_t *= dilation;
        return view;
    };
    AttentionShape shape = lighthouse_attention_shape(1, H, Hkv, D, T / dilation, scale);
    for (int64_t b = 0; b < B; ++b) {
        for (int r = 0; r < dilation; ++r) {
            shape.H = H;
            attention_forward<Real>(phase(out_view, 0, r), lse.data(), phase(q, b, r), phase(k, b, r), phase(v, b, r),
                                    shape);
        }
        lighthouse_norms<Real>(q_scores + b * H * T, out_view, 1, T, H, D);
        for (int member = 0; member < group; ++member) {  // query head `member` of every group
            View<const Real> query = q;
            query.data += member * q.stride_h, query.stride_h *= group;
            View<Real> member_out = out_view;
            member_out.data += member * D, member_out.stride_h *= group;
            for (int r = 0; r < dilation; ++r) {
                shape.H = Hkv;
                attention_forward<Real>(phase(member_out, 0, r), lse.data(), phase(k, b, r), phase(query, b, r),
                                        phase(v, b, r), shape);
            }
        }
        lighthouse_norms<Real>(k_scores + b * H * T, out_view, 1, T, H, D);
    }
}

// ---- select ------------------------------------------------------------------------------------
// The scores of level 1 and up: each the maximum over its window. Returns [levels][T / p^l]; level 0 is the maximum
// over the `heads` rows of token_scores [heads, T] (the query heads of one group). NaN counts as 0.
inline std::vector<std::vector<float>> lighthouse_score_pyramid(const float* token_scores, int heads,
                                                                const LighthouseGeometry& g) {
    std::vector<std::vector<float>> levels(g.levels);
    levels[0].resize(g.T, 0.0f);
    for (int64_t i = 0; i < heads * g.T; ++i) {
        float& score = levels[0][i % g.T];
        score = std::fmax(score, token_scores[i]);
    }
    for (int l = 1; l < g.levels; ++l) {
        for (int64_t i = 0; i < g.level_size(l); ++i) {
            const float* window = levels[l - 1].data() + i * g.pool;
            levels[l].push_back(*std::max_element(window, window + g.pool));
        }
    }
    return levels;
}

// Moves the n candidates of highest score to the front, best first; equal scores go to the lower index.
inline void lighthouse_top(std::vector<int64_t>& candidates, const std::vector<float>& scores, int64_t n) {
    std::partial_sort(candidates.begin(), candidates.begin() + n, candidates.end(),
                      [&](int64_t a, int64_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; });
}

// The selection of one sequence and key/value head. entries (=) [S], positions (=) [num_slots]; q_scores [q_heads, T]
// and k_scores [k_heads, T]: token scores of the heads that share the selection. starts_sequence: false for a chunk
// that is not a sequence's first.
inline void lighthouse_select(int32_t* entries, int32_t* positions, const float* q_scores, int q_heads,
                              const float* k_scores, int k_heads, const LighthouseGeometry& g,
                              bool starts_sequence = true) {
    auto q_levels = lighthouse_score_pyramid(q_scores, q_heads, g);
    for (int level = 1; starts_sequence && level < g.levels; ++level) {
        q_levels[level][0] = INFINITY;  // always descends, or the first tokens would have no contributor
    }
    const auto k_levels = lighthouse_score_pyramid(k_scores, k_heads, g);
    const int64_t half = LIGHTHOUSE_TILE_BUDGET / 2;
    std::vector<std::pair<int, int64_t>> kept;  // (level, index)
    for (int64_t tile = 0; tile < g.tiles; ++tile) {
        std::vector<int64_t> candidates(g.tile_coarsest());
        for (int64_t i = 0; i < g.tile_coarsest(); ++i) {
            candidates[i] = tile * g.tile_coarsest() + i;
        }
        for (int level = g.levels - 1; level >= 0; --level) {
            for (const int64_t i : candidates) {
                kept.emplace_back(level, i);
            }
            if (level == 0) {
                break;
            }
            std::vector<int64_t> parents = candidates;
            lighthouse_top(parents, q_levels[level], half);
            std::vector<int64_t> rest(parents.begin() + half, parents.end());
            lighthouse_top(rest, k_levels[level], half);
            std::copy(rest.begin(), rest.begin() + half, parents.begin() + half);
            parents.resize(2 * half);
            std::sort(parents.begin(), parents.end());
            candidates.clear();
            for (const int64_t parent : parents) {
                for (int child = 0; child < g.pool; ++child) {
                    candidates.push_back(parent * g.pool + child);
                }
            }
        }
    }
    // Causal order: by the last token an entry stands for, children before their parent.
    std::sort(kept.begin(), kept.end(), [&](const auto& a, const auto& b) {
        const int64_t a_end = (a.second + 1) * g.window(a.first), b_end = (b.second + 1) * g.window(b.first);
        return a_end != b_end ? a_end < b_end : a.first < b.first;
    });
    std::fill(positions, positions + g.num_slots, -1);
    for (int64_t n = 0; n < g.S; ++n) {
        entries[n] = (int32_t)g.slot(kept[n].first, kept[n].second);
        positions[entries[n]] = (int32_t)n;
    }
}

// ---- gather ------------------------------------------------------------------------------------
// out (=) [B, S, heads, D]: the mean of x [B, T, heads, D] over each entry's window. Heads h of x use the selection of
// key/value head h / (heads / Hkv).
template <class Real>
void lighthouse_gather(View<Real> out, View<const Real> x, const int32_t* entries, int64_t B, int heads, int Hkv, int D,
                       const LighthouseGeometry& g) {
#pragma omp parallel for collapse(3)
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t n = 0; n < g.S; ++n) {
            for (int h = 0; h < heads; ++h) {
                int64_t index = entries[(b * Hkv + h / (heads / Hkv)) * g.S + n];
                const int64_t window = g.window(g.level_of_slot(index));
                Real* row = out.row(b, n, h);
                std::fill(row, row + D, Real(0));
                for (int64_t t = index * window; t < (index + 1) * window; ++t) {
                    const Real* token = x.row(b, t, h);
                    for (int d = 0; d < D; ++d) {
                        row[d] += token[d];
                    }
                }
                for (int d = 0; d < D; ++d) {
                    row[d] /= (Real)window;
                }
            }
        }
    }
}

// dx (=) [B, T, heads, D]: token j takes from every level the gradient of the entry whose window holds it, where
// present, divided by the window.
template <class Real>
void lighthouse_gather_backward(View<Real> dx, View<const Real> dout, const int32_t* positions, int64_t B, int heads,
                                int Hkv, int D, const LighthouseGeometry& g) {
#pragma omp parallel for collapse(3)
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t j = 0; j < g.T; ++j) {
            for (int h = 0; h < heads; ++h) {
                const int32_t* head_positions = positions + (b * Hkv + h / (heads / Hkv)) * g.num_slots;
                Real* row = dx.row(b, j, h);
                std::fill(row, row + D, Real(0));
                for (int l = 0; l < g.levels; ++l) {
                    const int32_t n = head_positions[g.slot(l, j >> g.window_bits(l))];
                    for (int d = 0; n >= 0 && d < D; ++d) {
                        row[d] += dout.row(b, n, h)[d] / (Real)g.window(l);
                    }
                }
            }
        }
    }
}

// ---- scatter -----------------------------------------------------------------------------------
// out (=) [B, T, H, D]: token j is the sum over levels of the row of entry (j + 1) / c - 1, where present (Eq. 10, 11).
template <class Real>
void lighthouse_scatter(View<Real> out, View<const Real> x, const int32_t* positions, int64_t B, int H, int Hkv, int D,
                        const LighthouseGeometry& g) {
#pragma omp parallel for collapse(3)
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t j = 0; j < g.T; ++j) {
            for (int h = 0; h < H; ++h) {
                const int32_t* head_positions = positions + (b * Hkv + h / (H / Hkv)) * g.num_slots;
                Real* row = out.row(b, j, h);
                std::fill(row, row + D, Real(0));
                for (int l = 0; l < g.levels; ++l) {
                    const int64_t index = ((j + 1) >> g.window_bits(l)) - 1;
                    const int32_t n = index >= 0 ? head_positions[g.slot(l, index)] : -1;
                    for (int d = 0; n >= 0 && d < D; ++d) {
                        row[d] += x.row(b, n, h)[d];
                    }
                }
            }
        }
    }
}

// dx (=) [B, S, H, D]: entry (l, i) takes the sum of dout over the tokens it was added to, [i c + c - 1, i c + 2c - 2]
// clipped to T.
template <class Real>
void lighthouse_scatter_backward(View<Real> dx, View<const Real> dout, const int32_t* entries, int64_t B, int H,
                                 int Hkv, int D, const LighthouseGeometry& g) {
#pragma omp parallel for collapse(3)
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t n = 0; n < g.S; ++n) {
            for (int h = 0; h < H; ++h) {
                int64_t index = entries[(b * Hkv + h / (H / Hkv)) * g.S + n];
                const int64_t window = g.window(g.level_of_slot(index));
                const int64_t first = (index + 1) * window - 1, last = std::min(first + window, g.T);
                Real* row = dx.row(b, n, h);
                std::fill(row, row + D, Real(0));
                for (int64_t t = first; t < last; ++t) {
                    const Real* token = dout.row(b, t, h);
                    for (int d = 0; d < D; ++d) {
                        row[d] += token[d];
                    }
                }
            }
        }
    }
}

// ---- the layer ---------------------------------------------------------------------------------
template <class Real>
View<Real> lighthouse_rows(std::vector<Real>& rows, int64_t S, int heads, int D) {
    return {rows.data(), S * heads * D, (int64_t)heads * D, D};
}
template <class Real>
View<const Real> lighthouse_rows(const std::vector<Real>& rows, int64_t S, int heads, int D) {
    return {rows.data(), S * heads * D, (int64_t)heads * D, D};
}

// Fills state.entries and state.positions from q, k, v.
template <class Real>
void lighthouse_make_selection(LighthouseState<Real>& state, View<const Real> q, View<const Real> k, View<const Real> v,
                               int64_t B, int H, int Hkv, int D, double scale, const LighthouseConfig& config,
                               const LighthouseGeometry& g) {
    const int k_heads = config.scorer == LighthouseScorer::dilated ? H : Hkv;
    std::vector<float> q_scores((size_t)(B * H * g.T)), k_scores((size_t)(B * k_heads * g.T));
    if (config.scorer == LighthouseScorer::dilated) {
        lighthouse_dilated_scores<Real>(q_scores.data(), k_scores.data(), q, k, v, B, g.T, H, Hkv, D, config.dilation,
                                        scale);
    } else {
        lighthouse_norms<Real>(q_scores.data(), q, B, g.T, H, D);
        lighthouse_norms<Real>(k_scores.data(), k, B, g.T, Hkv, D);
    }
    state.entries.resize((size_t)(B * Hkv * g.S));
    state.positions.resize((size_t)(B * Hkv * g.num_slots));
#pragma omp parallel for
    for (int64_t i = 0; i < B * Hkv; ++i) {  // (sequence, key/value head)
        lighthouse_select(state.entries.data() + i * g.S, state.positions.data() + i * g.num_slots,
                          q_scores.data() + i * (H / Hkv) * g.T, H / Hkv, k_scores.data() + i * (k_heads / Hkv) * g.T,
                          k_heads / Hkv, g);
    }
}

// out (=) [B, T, H, D] from state.entries and state.positions; fills the rest of state.
template <class Real>
void lighthouse_attend(View<Real> out, LighthouseState<Real>& state, View<const Real> q, View<const Real> k,
                       View<const Real> v, int64_t B, int H, int Hkv, int D, double scale,
                       const LighthouseGeometry& g) {
    const int64_t S = g.S;
    state.q.resize((size_t)(B * S * H * D)), state.out.resize(state.q.size());
    state.k.resize((size_t)(B * S * Hkv * D)), state.v.resize(state.k.size());
    state.lse.resize((size_t)(B * H * S));
    const View<Real> gathered_q = lighthouse_rows(state.q, S, H, D), gathered_out = lighthouse_rows(state.out, S, H, D);
    const View<Real> gathered_k = lighthouse_rows(state.k, S, Hkv, D), gathered_v = lighthouse_rows(state.v, S, Hkv, D);
    lighthouse_gather<Real>(gathered_q, q, state.entries.data(), B, H, Hkv, D, g);
    lighthouse_gather<Real>(gathered_k, k, state.entries.data(), B, Hkv, Hkv, D, g);
    lighthouse_gather<Real>(gathered_v, v, state.entries.data(), B, Hkv, Hkv, D, g);
    attention_forward<Real>(gathered_out, state.lse.data(), gathered_q, gathered_k, gathered_v,
                            lighthouse_attention_shape(B, H, Hkv, D, S, scale));
    lighthouse_scatter<Real>(out, gathered_out, state.positions.data(), B, H, Hkv, D, g);
}

// out (=) [B, T, H, D] of q [B, T, H, D] and k, v [B, T, Hkv, D], all after RoPE; state (=) what backward needs.
template <class Real>
void lighthouse_forward(View<Real> out, LighthouseState<Real>& state, View<const Real> q, View<const Real> k,
                        View<const Real> v, int64_t B, int H, int Hkv, int D, double scale,
                        const LighthouseConfig& config, const LighthouseGeometry& g) {
    lighthouse_make_selection<Real>(state, q, k, v, B, H, Hkv, D, scale, config, g);
    lighthouse_attend<Real>(out, state, q, k, v, B, H, Hkv, D, scale, g);
}

// dq (=) [B, T, H, D], dk, dv (=) [B, T, Hkv, D] from dout [B, T, H, D] and the state of the same forward.
template <class Real>
void lighthouse_backward(View<Real> dq, View<Real> dk, View<Real> dv, View<const Real> dout,
                         const LighthouseState<Real>& state, int64_t B, int H, int Hkv, int D, double scale,
                         const LighthouseGeometry& g) {
    const int64_t S = g.S;
    std::vector<Real> gathered_dout(state.q.size()), gathered_dq(state.q.size());
    std::vector<Real> gathered_dk(state.k.size()), gathered_dv(state.v.size());
    lighthouse_scatter_backward<Real>(lighthouse_rows(gathered_dout, S, H, D), dout, state.entries.data(), B, H, Hkv, D,
                                      g);
    attention_backward<Real>(lighthouse_rows(gathered_dq, S, H, D), lighthouse_rows(gathered_dk, S, Hkv, D),
                             lighthouse_rows(gathered_dv, S, Hkv, D), lighthouse_rows(gathered_dout, S, H, D),
                             lighthouse_rows(state.q, S, H, D), lighthouse_rows(state.k, S, Hkv, D),
                             lighthouse_rows(state.v, S, Hkv, D), lighthouse_rows(state.out, S, H, D), state.lse.data(),
                             lighthouse_attention_shape(B, H, Hkv, D, S, scale));
    const int32_t* positions = state.positions.data();
    lighthouse_gather_backward<Real>(dq, lighthouse_rows(gathered_dq, S, H, D), positions, B, H, Hkv, D, g);
    lighthouse_gather_backward<Real>(dk, lighthouse_rows(gathered_dk, S, Hkv, D), positions, B, Hkv, Hkv, D, g);
    lighthouse_gather_backward<Real>(dv, lighthouse_rows(gathered_dv, S, Hkv, D), positions, B, Hkv, Hkv, D, g);
}

}  // namespace reference
