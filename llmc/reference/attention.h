// reference/attention.h: softmax attention, causal or full, with grouped queries; forward with an online softmax over
// blocks of keys (Dao et al. 2022), backward from the log-sum-exp. The T x T scores never exist.
//   s = scale q k^T,   lse = log sum exp(s),   p = exp(s - lse),   out = p v
//   delta = dout . out,   dv = p^T dout,   ds = p * (dout v^T - delta),   dq = scale ds k,   dk = scale ds^T q
// Shapes: q, out [B, Tq, H, D]; k, v [B, Tk, Hkv, D]; lse [B, H, Tq]; each a View, so packed qkv is read in place.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "exponential.h"
#include "gemm.h"

namespace reference {

// ---- operands ----------------------------------------------------------------------------------
// A tensor [B, T, heads, D] anywhere in memory, D contiguous; strides in elements.
template <class Element>
struct View {
    Element* data = nullptr;
    int64_t stride_b = 0;
    int64_t stride_t = 0;
    int64_t stride_h = 0;

    View() = default;
    View(Element* data, int64_t stride_b, int64_t stride_t, int64_t stride_h)
        : data(data), stride_b(stride_b), stride_t(stride_t), stride_h(stride_h) {}
    // A view to write to serves where one to read from is asked for.
    template <class Other, class = std::enable_if_t<std::is_convertible_v<Other*, Element*>>>
    View(const View<Other>& other) : View(other.data, other.stride_b, other.stride_t, other.stride_h) {}

    Element* row(int64_t b, int64_t t, int64_t h) const { return data + b * stride_b + t * stride_t + h * stride_h; }
};

// Query row t sees key rows 0 .. t + causal_offset when causal, all otherwise. A query that sees no key gets out = 0,
// lse = -infinity, and no gradient.
struct AttentionShape {
    int B = 1;           // sequences
    int H = 1;           // query heads
    int Hkv = 1;         // key/value heads; query head h reads key/value head h / (H / Hkv)
    int D = 128;         // head dim
    int64_t Tq = 0;      // query rows
    int64_t Tk = 0;      // key rows
    double scale = 1.0;  // of the scores q k^T, usually 1 / sqrt(D)
    bool causal = true;
    int64_t causal_offset = 0;

    // How many keys query row t sees: key rows 0 .. keys_seen(t) - 1.
    int64_t keys_seen(int64_t t) const { return causal ? std::clamp<int64_t>(t + causal_offset + 1, 0, Tk) : Tk; }
    // The first query row that sees key row t; Tq when none does.
    int64_t first_query(int64_t t) const { return causal ? std::clamp<int64_t>(t - causal_offset, 0, Tq) : 0; }
};

constexpr int64_t ATTENTION_BLOCK_QUERIES = 96;  // of a task, and of a block of scores; a multiple of the GEMM's tiles
constexpr int64_t ATTENTION_BLOCK_KEYS = 96;

template <class Real>
Matrix<Real> attention_rows(View<const Real> x, int64_t b, int64_t t, int64_t h) {
    return {x.row(b, t, h), x.stride_t, 1};
}

// ---- forward -----------------------------------------------------------------------------------
// Query rows [begin, end) of one head: out (=) their rows, lse (=) [end - begin].
template <class Real>
void attention_forward_block(View<Real> out, Real* lse, View<const Real> q, View<const Real> k, View<const Real> v,
                             const AttentionShape& shape, int64_t b, int h, int64_t begin, int64_t end,
                             GemmScratch<Real>& scratch) {
    const int h_kv = h / (shape.H / shape.Hkv), D = shape.D;
    const int64_t queries = end - begin;
    const Real infinity = std::numeric_limits<Real>::infinity(), scale = (Real)shape.scale;
    std::vector<Real> scores(queries * ATTENTION_BLOCK_KEYS), sums(queries, Real(0)), maxima(queries, -infinity);
    std::vector<Real> block_out(queries * D, Real(0));
    const int64_t num_keys = shape.keys_seen(end - 1);
    for (int64_t key = 0; key < num_keys; key += ATTENTION_BLOCK_KEYS) {
        const int64_t keys = std::min(ATTENTION_BLOCK_KEYS, num_keys - key);
        gemm_block<Real>(scores.data(), keys, attention_rows(q, b, begin, h),
                         attention_rows(k, b, key, h_kv).transposed(), queries, keys, D, false, scratch);
        // Scores become exp(score - running maximum); what was summed under an older maximum is scaled to the new one.
        for (int64_t i = 0; i < queries; ++i) {
            Real* row = scores.data() + i * keys;
            const int64_t seen = std::clamp<int64_t>(shape.keys_seen(begin + i) - key, 0, keys);
            Real maximum = maxima[i], sum = 0;
#pragma omp simd reduction(max : maximum)
            for (int64_t j = 0; j < seen; ++j) {
                row[j] *= scale;
                maximum = row[j] > maximum ? row[j] : maximum;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < seen; ++j) {
                row[j] = exponential(row[j] - maximum);
                sum += row[j];
            }
            std::fill(row + seen, row + keys, Real(0));
            if (seen > 0 && maximum != maxima[i]) {
                const Real rescale = exponential(maxima[i] - maximum);
                sums[i] *= rescale;
                for (int d = 0; d < D; ++d) {
                    block_out[i * D + d] *= rescale;
                }
                maxima[i] = maximum;
            }
            sums[i] += sum;
        }
        gemm_block<Real>(block_out.data(), D, {scores.data(), keys, 1}, attention_rows(v, b, key, h_kv), queries, D,
                         keys, true, scratch);
    }
    for (int64_t i = 0; i < queries; ++i) {
        const bool sees_none = shape.keys_seen(begin + i) == 0;
        lse[i] = sees_none ? -infinity : maxima[i] + std::log(sums[i]);
        Real* out_row = out.row(b, begin + i, h);
        for (int d = 0; d < D; ++d) {
            out_row[d] = sees_none ? 0 : block_out[i * D + d] / sums[i];
        }
    }
}

// out (=) [B, Tq, H, D] and lse (=) [B, H, Tq], natural log-sum-exp of scaled scores.
template <class Real>
void attention_forward(View<Real> out, Real* lse, View<const Real> q, View<const Real> k, View<const Real> v,
                       const AttentionShape& shape) {
    const int64_t num_blocks = (shape.Tq + ATTENTION_BLOCK_QUERIES - 1) / ATTENTION_BLOCK_QUERIES;
#pragma omp parallel
    {
        GemmScratch<Real> scratch;
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t b = 0; b < shape.B; ++b) {
            for (int h = 0; h < shape.H; ++h) {
                for (int64_t block = 0; block < num_blocks; ++block) {
                    const int64_t begin = block * ATTENTION_BLOCK_QUERIES;
                    const int64_t end = std::min(begin + ATTENTION_BLOCK_QUERIES, shape.Tq);
                    attention_forward_block<Real>(out, lse + (b * shape.H + h) * shape.Tq + begin, q, k, v, shape, b, h,
                                                  begin, end, scratch);
                }
            }
        }
    }
}

// ---- backward ----------------------------------------------------------------------------------
// What the tasks of a backward pass read.
template <class Real>
struct AttentionBackwardInputs {
    View<const Real> dout, q, k, v;
    const Real* lse;    // [B, H, Tq]
    const Real* delta;  // [B, H, Tq]
};

// p (=) the probabilities and ds (=) the gradient of the scaled scores, [queries, keys], of query rows from `query` and
// key rows from `key` of head h.
template <class Real>
void attention_backward_scores(Real* p, Real* ds, const AttentionBackwardInputs<Real>& in, const AttentionShape& shape,
                               int64_t b, int h, int64_t query, int64_t queries, int64_t key, int64_t keys,
                               GemmScratch<Real>& scratch) {
    const int h_kv = h / (shape.H / shape.Hkv);
    const Real* lse = in.lse + (b * shape.H + h) * shape.Tq + query;
    const Real* delta = in.delta + (b * shape.H + h) * shape.Tq + query;
    const Real scale = (Real)shape.scale;
    gemm_block<Real>(p, keys, attention_rows(in.q, b, query, h), attention_rows(in.k, b, key, h_kv).transposed(),
                     queries, keys, shape.D, false, scratch);
    gemm_block<Real>(ds, keys, attention_rows(in.dout, b, query, h), attention_rows(in.v, b, key, h_kv).transposed(),
                     queries, keys, shape.D, false, scratch);
    for (int64_t i = 0; i < queries; ++i) {
        Real *p_row = p + i * keys, *ds_row = ds + i * keys;
        const Real row_lse = lse[i], row_delta = delta[i];
        const int64_t seen = std::clamp<int64_t>(shape.keys_seen(query + i) - key, 0, keys);
#pragma omp simd
        for (int64_t j = 0; j < seen; ++j) {
            p_row[j] = exponential(p_row[j] * scale - row_lse);
            ds_row[j] = p_row[j] * (ds_row[j] - row_delta);
        }
        std::fill(p_row + seen, p_row + keys, Real(0));
        std::fill(ds_row + seen, ds_row + keys, Real(0));
    }
}

// Key rows [begin, end) of one key/value head: dk and dv (=) their rows, summed over the query heads that read them.
template <class Real>
void attention_backward_keys(View<Real> dk, View<Real> dv, const AttentionBackwardInputs<Real>& in,
                             const AttentionShape& shape, int64_t b, int h_kv, int64_t begin, int64_t end,
                             GemmScratch<Real>& scratch) {
    const int D = shape.D, group = shape.H / shape.Hkv;
    const int64_t keys = end - begin;
    std::vector<Real> p(ATTENTION_BLOCK_QUERIES * keys), ds(p.size()), dk_sum(keys * D, Real(0)), dv_sum(dk_sum);
    for (int h = h_kv * group; h < (h_kv + 1) * group; ++h) {
        for (int64_t query = shape.first_query(begin); query < shape.Tq; query += ATTENTION_BLOCK_QUERIES) {
            const int64_t queries = std::min(ATTENTION_BLOCK_QUERIES, shape.Tq - query);
            attention_backward_scores(p.data(), ds.data(), in, shape, b, h, query, queries, begin, keys, scratch);
            gemm_block<Real>(dv_sum.data(), D, {p.data(), 1, keys}, attention_rows(in.dout, b, query, h), keys, D,
                             queries, true, scratch);
            gemm_block<Real>(dk_sum.data(), D, {ds.data(), 1, keys}, attention_rows(in.q, b, query, h), keys, D,
                             queries, true, scratch);
        }
    }
    for (int64_t i = 0; i < keys; ++i) {
        Real *dk_row = dk.row(b, begin + i, h_kv), *dv_row = dv.row(b, begin + i, h_kv);
        for (int d = 0; d < D; ++d) {
            dk_row[d] = dk_sum[i * D + d] * (Real)shape.scale;
            dv_row[d] = dv_sum[i * D + d];
        }
    }
}

// Query rows [begin, end) of one head: dq (=) their rows.
template <class Real>
void attention_backward_queries(View<Real> dq, const AttentionBackwardInputs<Real>& in, const AttentionShape& shape,
                                int64_t b, int h, int64_t begin, int64_t end, GemmScratch<Real>& scratch) {
    const int D = shape.D, h_kv = h / (shape.H / shape.Hkv);
    const int64_t queries = end - begin, num_keys = shape.keys_seen(end - 1);
    std::vector<Real> p(queries * ATTENTION_BLOCK_KEYS), ds(p.size()), dq_sum(queries * D, Real(0));
    for (int64_t key = 0; key < num_keys; key += ATTENTION_BLOCK_KEYS) {
        const int64_t keys = std::min(ATTENTION_BLOCK_KEYS, num_keys - key);
        attention_backward_scores(p.data(), ds.data(), in, shape, b, h, begin, queries, key, keys, scratch);
        gemm_block<Real>(dq_sum.data(), D, {ds.data(), keys, 1}, attention_rows(in.k, b, key, h_kv), queries, D, keys,
                         true, scratch);
    }
    for (int64_t i = 0; i < queries; ++i) {
        Real* dq_row = dq.row(b, begin + i, h);
        for (int d = 0; d < D; ++d) {
            dq_row[d] = dq_sum[i * D + d] * (Real)shape.scale;
        }
    }
}

// dq (=) [B, Tq, H, D], dk, dv (=) [B, Tk, Hkv, D] from dout, the inputs, and out and lse of the forward. Blocks of
// keys and blocks of queries are separate tasks that both form the scores, so that every sum belongs to one task.
template <class Real>
void attention_backward(View<Real> dq, View<Real> dk, View<Real> dv, View<const Real> dout, View<const Real> q,
                        View<const Real> k, View<const Real> v, View<const Real> out, const Real* lse,
                        const AttentionShape& shape) {
    std::vector<Real> delta((size_t)(shape.B * shape.H * shape.Tq));
    const AttentionBackwardInputs<Real> in = {dout, q, k, v, lse, delta.data()};
    const int64_t query_blocks = (shape.Tq + ATTENTION_BLOCK_QUERIES - 1) / ATTENTION_BLOCK_QUERIES;
    const int64_t key_blocks = (shape.Tk + ATTENTION_BLOCK_KEYS - 1) / ATTENTION_BLOCK_KEYS;
#pragma omp parallel
    {
        GemmScratch<Real> scratch;
#pragma omp for collapse(3) schedule(static)
        for (int64_t b = 0; b < shape.B; ++b) {
            for (int h = 0; h < shape.H; ++h) {
                for (int64_t t = 0; t < shape.Tq; ++t) {
                    const Real *dout_row = dout.row(b, t, h), *out_row = out.row(b, t, h);
                    Real sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (int d = 0; d < shape.D; ++d) {
                        sum += dout_row[d] * out_row[d];
                    }
                    delta[(b * shape.H + h) * shape.Tq + t] = sum;
                }
            }
        }
#pragma omp for collapse(3) schedule(dynamic) nowait
        for (int64_t b = 0; b < shape.B; ++b) {
            for (int h = 0; h < shape.Hkv; ++h) {
                for (int64_t block = 0; block < key_blocks; ++block) {
                    const int64_t begin = block * ATTENTION_BLOCK_KEYS;
                    attention_backward_keys(dk, dv, in, shape, b, h, begin,
                                            std::min(begin + ATTENTION_BLOCK_KEYS, shape.Tk), scratch);
                }
            }
        }
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t b = 0; b < shape.B; ++b) {
            for (int h = 0; h < shape.H; ++h) {
                for (int64_t block = 0; block < query_blocks; ++block) {
                    const int64_t begin = block * ATTENTION_BLOCK_QUERIES;
                    attention_backward_queries(dq, in, shape, b, h, begin,
                                               std::min(begin + ATTENTION_BLOCK_QUERIES, shape.Tq), scratch);
                }
            }
        }
    }
}

}  // namespace reference
