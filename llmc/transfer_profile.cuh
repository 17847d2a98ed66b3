// transfer_profile.cuh: how much of the transfers between ranks is hidden behind computation (--profile of several
// ranks): CUDA events around what runs on the stream of transfers and around what runs, or waits, on that of the
// computation. A transfer's time is from its start on this rank to its end, so it includes waiting for a rank that is
// late; a wait is time in which this rank's computation stood still. Hidden is what of the transfers no wait shows.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "cuda_common.cuh"

enum class TransferLane { computation, transfers, waits };
constexpr int NUM_TRANSFER_LANES = 3;

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

    // Milliseconds of a step, of the operations of a name in one lane; 0 when there were none.
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
            row.ms[(int)spans_[i].lane] += length;
            row.last.push_back({spans_[i], to_begin, to_begin + length});
        }
    }
    // One line a lane: where the digits of its steps stand, something runs (or waits).
    static std::string timeline(const Row& row) {
        constexpr int WIDTH = 88;
        constexpr const char* NAMES[NUM_TRANSFER_LANES] = {"computation", "transfers", "waits"};
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
                        line[i] = (char)('0' + s.span.step % 10);
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
