// transfer_profile.cuh: how much of the transfers between ranks is hidden behind computation (--profile of several
// ranks): CUDA events around what runs on the stream of transfers and on those of the computation. A transfer's time is
// from its start on this rank to its end, so it includes waiting for a rank that is late. A wait is time in which this
// rank's computation stood still: the part of the transfers beside which none of the recorded computation ran, or, of
// operations that record no computation, what they record as waits. Hidden is what of the transfers no wait shows.
#pragma once
#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "cuda_common.cuh"

// computation_beside: what runs on a second stream beside the computation.
enum class TransferLane { computation, computation_beside, transfers, waits };
constexpr int NUM_TRANSFER_LANES = 4;

class TransferProfile {
  public:
    TransferProfile() = default;
    ~TransferProfile() {
        for (cudaEvent_t event : events_) {
            cudaEventDestroy(event);
        }
    }
    TransferProfile(const TransferProfile&) = delete;
    TransferProfile& operator=(const TransferProfile&) = delete;

    // Whether what follows is recorded: a training step's, but not an evaluation's.
    void record(bool on) { recording_ = on; }
    // What follows is one of the operations of this name, until the next.
    void begin_operation(const std::string& name) {
        if (recording_) {
            operations_.push_back({row(name), num_spans_});
        }
    }
    // What is enqueued on the stream between the two belongs to the lane. step: of the operation, for the reader.
    void begin_span(TransferLane lane, int step, cudaStream_t stream) {
        if (recording_) {
            open_[(int)lane] = num_spans_;
            if (num_spans_ == spans_.size()) {
                spans_.push_back({});
                for (int i = 0; i < 2; ++i) {
                    events_.push_back(nullptr);
                    CUDA_CHECK(cudaEventCreate(&events_.back()));
                }
            }
            spans_[num_spans_] = {lane, step};
            CUDA_CHECK(cudaEventRecord(events_[2 * num_spans_], stream));
            ++num_spans_;
        }
    }
    void end_span(TransferLane lane, cudaStream_t stream) {
        if (recording_) {
            CUDA_CHECK(cudaEventRecord(events_[2 * open_[(int)lane] + 1], stream));
        }
    }

    // The end of a step, once the device has done all of it: adds its times up. The first step is left out: connections
    // are opened and kernels loaded in it.
    void end_step() {
        if (num_steps_ >= 0) {
            for (size_t i = 0; i < operations_.size(); ++i) {
                const size_t end = i + 1 < operations_.size() ? operations_[i + 1].first_span : num_spans_;
                add_operation(rows_[operations_[i].row], operations_[i].first_span, end);
            }
        }
        num_steps_ += 1;
        num_spans_ = 0;
        operations_.clear();
    }

    // Milliseconds of a step, of the operations of a name in one lane; 0 when there were none. computation: on either
    // stream, counted once where both run.
    double step_ms(const std::string& name, TransferLane lane) const {
        for (const Row& row : rows_) {
            if (row.name == name && num_steps_ > 0) {
                return row.ms[(int)lane] / (double)num_steps_;
            }
        }
        return 0.0;
    }
    // Share of the transfers in which the computation did not wait for them.
    double hidden(const std::string& name) const {
        const double transfers = step_ms(name, TransferLane::transfers), waits = step_ms(name, TransferLane::waits);
        return transfers > 0.0 ? std::max(0.0, 1.0 - waits / transfers) : 1.0;
    }

    // These times, and the last operation of each name on a time axis; empty when nothing was transferred.
    std::string table() const {
        if (num_steps_ < 1 || rows_.empty()) {
            return "";
        }
        std::string text =
            format_string("%-32s %8s %12s %10s %10s %9s   this rank, mean of %lld steps\n", "ms of a step: transfers",
                          "number", "computation", "transfers", "waits", "hidden %", (long long)num_steps_);
        for (const Row& row : rows_) {
            text += format_string("%-32s %8.1f %12.3f %10.3f %10.3f %9.1f\n", row.name.c_str(),
                                  (double)row.number / (double)num_steps_, step_ms(row.name, TransferLane::computation),
                                  step_ms(row.name, TransferLane::transfers), step_ms(row.name, TransferLane::waits),
                                  100.0 * hidden(row.name));
        }
        for (const Row& row : rows_) {
            text += timeline(row);
        }
        return text;
    }

  private:
    struct Span {
        TransferLane lane = TransferLane::computation;
        int step = 0;
    };
    struct TimedSpan {
        Span span;
        double begin_ms, end_ms;  // from the operation's first event
    };
    using Intervals = std::vector<std::pair<double, double>>;  // [begin, end) in ms, ordered, apart
    struct Operation {
        size_t row, first_span;
    };
    struct Row {
        std::string name;
        int64_t number = 0;
        double ms[NUM_TRANSFER_LANES] = {};
        std::vector<TimedSpan> last;  // operation
    };

    size_t row(const std::string& name) {
        size_t i = 0;
        while (i < rows_.size() && rows_[i].name != name) {
            ++i;
        }
        if (i == rows_.size()) {
            rows_.emplace_back();
            rows_.back().name = name;
        }
        return i;
    }
    void add_operation(Row& row, size_t begin, size_t end) {
        row.number += 1;
        row.last.clear();
        for (size_t i = begin; i < end; ++i) {
            float to_begin, length;
            CUDA_CHECK(cudaEventElapsedTime(&to_begin, events_[2 * begin], events_[2 * i]));
            CUDA_CHECK(cudaEventElapsedTime(&length, events_[2 * i], events_[2 * i + 1]));
            row.last.push_back({spans_[i], to_begin, to_begin + length});
        }
        const Intervals computation = covered(row.last, {TransferLane::computation, TransferLane::computation_beside});
        const Intervals transfers = covered(row.last, {TransferLane::transfers});
        if (!computation.empty()) {
            for (const auto& [begin_ms, end_ms] : without(transfers, computation)) {
                row.last.push_back({{TransferLane::waits, 0}, begin_ms, end_ms});
            }
        }
        row.ms[(int)TransferLane::computation] += length_of(computation);
        row.ms[(int)TransferLane::transfers] += length_of(transfers);
        row.ms[(int)TransferLane::waits] += length_of(covered(row.last, {TransferLane::waits}));
    }
    // When something ran in one of the lanes.
    static Intervals covered(const std::vector<TimedSpan>& spans, std::initializer_list<TransferLane> lanes) {
        Intervals all;
        for (const TimedSpan& s : spans) {
            if (std::find(lanes.begin(), lanes.end(), s.span.lane) != lanes.end()) {
                all.push_back({s.begin_ms, s.end_ms});
            }
        }
        std::sort(all.begin(), all.end());
        Intervals merged;
        for (const auto& next : all) {
            if (merged.empty() || next.first > merged.back().second) {
                merged.push_back(next);
            } else {
                merged.back().second = std::max(merged.back().second, next.second);
            }
        }
        return merged;
    }
    // What of `intervals` lies in none of `others`.
    static Intervals without(const Intervals& intervals, const Intervals& others) {
        Intervals rest;
        for (auto [begin, end] : intervals) {
            for (const auto& other : others) {
                if (other.second > begin && other.first < end) {
                    if (other.first > begin) {
                        rest.push_back({begin, other.first});
                    }
                    begin = other.second;
                }
            }
            if (begin < end) {
                rest.push_back({begin, end});
            }
        }
        return rest;
    }
    static double length_of(const Intervals& intervals) {
        double sum = 0.0;
        for (const auto& [begin, end] : intervals) {
            sum += end - begin;
        }
        return sum;
    }
    // One line a lane: where the digits of its steps stand, something runs; where stars stand, nothing does.
    static std::string timeline(const Row& row) {
        constexpr int WIDTH = 88;
        constexpr const char* NAMES[NUM_TRANSFER_LANES] = {"computation", " beside it", "transfers", "waits"};
        double first = 0.0, last = 0.0;
        for (const TimedSpan& s : row.last) {
            first = std::min(first, s.begin_ms);
            last = std::max(last, s.end_ms);
        }
        const bool computes = std::any_of(row.last.begin(), row.last.end(),
                                          [](const TimedSpan& s) { return s.span.lane == TransferLane::computation; });
        if (!computes || last <= first) {
            return "";
        }
        std::string text = format_string("\nlast %s, %.3f ms; digits: steps\n", row.name.c_str(), last - first);
        for (int lane = 0; lane < NUM_TRANSFER_LANES; ++lane) {
            std::string line(WIDTH, ' ');
            for (const TimedSpan& s : row.last) {
                const int begin = (int)((s.begin_ms - first) / (last - first) * WIDTH);
                const int end = (int)((s.end_ms - first) / (last - first) * WIDTH + 0.5);
                if ((int)s.span.lane == lane) {
                    for (int i = begin; i < std::min(end, WIDTH); ++i) {
                        line[i] = s.span.lane == TransferLane::waits ? '*' : (char)('0' + s.span.step % 10);
                    }
                }
            }
            text += format_string("  %-12s|%s|\n", NAMES[lane], line.c_str());
        }
        return text;
    }

    bool recording_ = false;
    std::vector<cudaEvent_t> events_;  // two a span; made once and used in every step
    std::vector<Span> spans_;
    size_t num_spans_ = 0;  // of this step
    size_t open_[NUM_TRANSFER_LANES] = {};
    std::vector<Operation> operations_;  // of this step
    std::vector<Row> rows_;
    int64_t num_steps_ = -1;  // added up; -1: the first has not ended
};

// What an object records through; does nothing until it is given a profile, which must outlive it.
class TransferProbe {
  public:
    // name: what the object's operations have in common.
    void attach(TransferProfile* profile, const std::string& name) { profile_ = profile, name_ = name; }
    void begin_operation(const char* name) const {
        if (profile_ != nullptr) {
            profile_->begin_operation(name_ + ", " + name);
        }
    }
    void begin(TransferLane lane, int step, cudaStream_t stream) const {
        if (profile_ != nullptr) {
            profile_->begin_span(lane, step, stream);
        }
    }
    void end(TransferLane lane, cudaStream_t stream) const {
        if (profile_ != nullptr) {
            profile_->end_span(lane, stream);
        }
    }

  private:
    TransferProfile* profile_ = nullptr;
    std::string name_;
};
