// ring_emulation.h: one rank's ring attention in plain loops and double, by the schedule of llmc/context_partition.h:
// what llmc/ring_attention.cuh does with kernels and streams. How keys come from their owners and gradients go home is
// the caller's: arrays of one process, or messages between several.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "llmc/context_partition.h"
#include "llmc/reference/attention.h"

using reference::View;

// [B, rows, heads, D], contiguous.
struct Rows {
    int64_t B = 1, rows = 0;
    int heads = 1, D = 1;
    std::vector<double> values;

    Rows() = default;
    Rows(int64_t B, int64_t rows, int heads, int D, double value = std::numeric_limits<double>::quiet_NaN())
        : B(B), rows(rows), heads(heads), D(D), values((size_t)(B * rows * heads * D), value) {}
    int64_t width() const { return (int64_t)heads * D; }
    size_t num_bytes() const { return values.size() * sizeof(double); }
    // From row `first` on.
    View<double> view(int64_t first = 0) { return {values.data() + first * width(), rows * width(), width(), D}; }
    View<const double> view(int64_t first = 0) const {
        return {values.data() + first * width(), rows * width(), width(), D};
    }
    // Rows [first, first + count) of every sequence.
    Rows slice(int64_t first, int64_t count) const {
        Rows part(B, count, heads, D);
        for (int64_t b = 0; b < B; ++b) {
            std::copy_n(values.begin() + (b * rows + first) * width(), count * width(),
                        part.values.begin() + b * count * width());
        }
        return part;
    }
    void set(int64_t first, const Rows& part) {
        for (int64_t b = 0; b < B; ++b) {
            std::copy_n(part.values.begin() + b * part.rows * width(), part.rows * width(),
                        values.begin() + (b * rows + first) * width());
        }
    }
};

// A rank's rows of a whole sequence's, and back.
inline Rows local_rows(const Rows& whole, const ContextPartition& p) {
    Rows local(whole.B, p.local_rows(), whole.heads, whole.D);
    for (int half = 0; half < p.halves(); ++half) {
        local.set(half * p.chunk_rows(), whole.slice(p.first_position(half), p.chunk_rows()));
    }
    return local;
}
inline void put_local_rows(Rows& whole, const Rows& local, const ContextPartition& p) {
    for (int half = 0; half < p.halves(); ++half) {
        whole.set(p.first_position(half), local.slice(half * p.chunk_rows(), p.chunk_rows()));
    }
}

struct KeyRows {
    Rows k, v;
};

class RingEmulation {
  public:
    Rows out, dq;
    KeyRows dkv;
    std::vector<double> lse;  // [B, H, local rows]
    // What becomes of out and dq of one step, and of every output: a kernel's rounding.
    std::function<double(double)> round = [](double value) { return value; };

    RingEmulation(const ContextPartition& partition, Rows q, KeyRows kv)
        : p_(partition), q_(std::move(q)), kv_(std::move(kv)), steps_(make_ring_schedule(p_.W, p_.rank)) {}
    const std::vector<RingStep>& steps() const { return steps_; }
    // What goes to the reader of a step.
    KeyRows keys_to_send(int s) const {
        const HalfRange halves = steps_[s].keys_sent;
        return {slice(kv_.k, halves), slice(kv_.v, halves)};
    }

    // fetch(s): the keys and values of steps()[s].source that are seen, its keys_to_send.
    template <class Fetch>
    void forward(Fetch fetch) {
        attend(q_, kv_, true, out, lse);
        Rows sum(q_.B, q_.rows, q_.heads, q_.D);  // NaN until the first contribution
        for (int s = 1; s < p_.W; ++s) {
            const RingStep& step = steps_[s];
            Rows part;
            std::vector<double> part_lse;
            attend(slice(q_, step.queries), fetch(s), false, part, part_lse);
            for (int half = 0; half < HALVES; ++half) {
                if (step.to_queries[half].any) {
                    merge(sum, part, part_lse, half, step);
                }
            }
        }
    }

    // dq (=), and dkv (=) of step 0; take(s, gradients): those of the keys of steps()[s].source, to be sent home.
    template <class Fetch, class Take>
    void backward(const Rows& dout, Fetch fetch, Take take) {
        dout_ = dout;
        attend_backward(BOTH_HALVES, kv_, true, dq, dkv);
        Rows sum(q_.B, q_.rows, q_.heads, q_.D);
        for (int s = 1; s < p_.W; ++s) {
            const RingStep& step = steps_[s];
            Rows part;
            KeyRows gradients;
            attend_backward(step.queries, fetch(s), false, part, gradients);
            add(dq, sum, part, step.queries, step.to_queries);
            take(s, gradients);
        }
        for (int half = 0; half < HALVES; ++half) {
            if (std::none_of(steps_.begin(), steps_.end(), [&](const RingStep& s) { return s.to_keys[half].any; })) {
                round_half(dkv.k, half);
                round_half(dkv.v, half);
            }
        }
    }
    // What the reader of step s found for this rank's keys; in the order of steps.
    void add_returned(int s, const KeyRows& gradients) {
        if (s == 1) {
            key_sum_ = {Rows(kv_.k.B, kv_.k.rows, kv_.k.heads, kv_.k.D),
                        Rows(kv_.v.B, kv_.v.rows, kv_.v.heads, kv_.v.D)};
        }
        add(dkv.k, key_sum_.k, gradients.k, steps_[s].keys_sent, steps_[s].to_keys);
        add(dkv.v, key_sum_.v, gradients.v, steps_[s].keys_sent, steps_[s].to_keys);
    }

  private:
    Rows slice(const Rows& rows, HalfRange halves) const {
        return rows.slice(halves.first_row(p_.chunk_rows()), halves.num_rows(p_.chunk_rows()));
    }
    reference::AttentionShape shape(const Rows& q, const Rows& k, bool causal) const {
        reference::AttentionShape shape;
        shape.B = (int)q.B, shape.H = q.heads, shape.Hkv = k.heads, shape.D = q.D;
        shape.Tq = q.rows, shape.Tk = k.rows;
        shape.scale = 1.0 / std::sqrt((double)q.D);
        shape.causal = causal;
        return shape;
    }
    void attend(const Rows& q, const KeyRows& kv, bool causal, Rows& result, std::vector<double>& result_lse) const {
        result = Rows(q.B, q.rows, q.heads, q.D);
        result_lse.assign((size_t)(q.B * q.heads * q.rows), std::numeric_limits<double>::quiet_NaN());
        reference::attention_forward<double>(result.view(), result_lse.data(), q.view(), kv.k.view(), kv.v.view(),
                                             shape(q, kv.k, causal));
        round_all(result);
    }
    void round_all(Rows& rows) const {
        for (double& value : rows.values) {
            value = round(value);
        }
    }
    // Rows of `half` of part: this step's result for step.queries.
    void merge(Rows& sum, const Rows& part, const std::vector<double>& part_lse, int half, const RingStep& step) {
        const int64_t n = p_.chunk_rows(), first_of_part = (half - step.queries.first) * n;
        const Contribution c = step.to_queries[half];
        for (int64_t b = 0; b < q_.B; ++b) {
            for (int h = 0; h < q_.heads; ++h) {
                for (int64_t t = 0; t < n; ++t) {
                    double& total_lse = lse[(b * q_.heads + h) * q_.rows + half * n + t];
                    const double other = part_lse[(b * q_.heads + h) * part.rows + first_of_part + t];
                    const double largest = std::max(total_lse, other);
                    const double merged = largest + std::log(std::exp(total_lse - largest) + std::exp(other - largest));
                    const double* from = part.view().row(b, first_of_part + t, h);
                    double* result = out.view().row(b, half * n + t, h);
                    double* running = sum.view().row(b, half * n + t, h);
                    for (int d = 0; d < q_.D; ++d) {
                        running[d] = (c.first ? result[d] : running[d]) * std::exp(total_lse - merged) +
                                     from[d] * std::exp(other - merged);
                        result[d] = c.last ? round(running[d]) : result[d];
                    }
                    total_lse = merged;
                }
            }
        }
    }
    void attend_backward(HalfRange queries, const KeyRows& kv, bool causal, Rows& dq_part, KeyRows& dkv_part) const {
        const Rows q = slice(q_, queries), o = slice(out, queries), grad = slice(dout_, queries);
        Rows lse_rows(q_.B * q_.heads, q_.rows, 1, 1);
        lse_rows.values = lse;
        const std::vector<double> part_lse = slice(lse_rows, queries).values;
        dq_part = Rows(q.B, q.rows, q.heads, q.D);
        dkv_part = {Rows(kv.k.B, kv.k.rows, kv.k.heads, kv.k.D), Rows(kv.v.B, kv.v.rows, kv.v.heads, kv.v.D)};
        reference::attention_backward<double>(dq_part.view(), dkv_part.k.view(), dkv_part.v.view(), grad.view(),
                                              q.view(), kv.k.view(), kv.v.view(), o.view(), part_lse.data(),
                                              shape(q, kv.k, causal));
        round_all(dq_part);
    }
    void round_half(Rows& rows, int half) const {
        Rows part = rows.slice(half * p_.chunk_rows(), p_.chunk_rows());
        round_all(part);
        rows.set(half * p_.chunk_rows(), part);
    }
    // part: rows of `halves`, added to the halves that take a contribution.
    void add(Rows& result, Rows& sum, const Rows& part, HalfRange halves,
             const std::array<Contribution, HALVES>& contributions) const {
        const int64_t n = p_.chunk_rows();
        for (int half = 0; half < HALVES; ++half) {
            const Contribution c = contributions[half];
            if (!c.any) {
                continue;
            }
            Rows total = (c.first ? result : sum).slice(half * n, n);
            const Rows more = part.slice((half - halves.first) * n, n);
            for (size_t i = 0; i < total.values.size(); ++i) {
                total.values[i] += more.values[i];
            }
            sum.set(half * n, total);
            if (c.last) {
                round_all(total);
                result.set(half * n, total);
            }
        }
    }

    ContextPartition p_;
    Rows q_, dout_;
    KeyRows kv_, key_sum_;
    std::vector<RingStep> steps_;
};
