// profile.cuh: where the GPU's time of a training step goes (--profile): CUDA events between the stages of the step,
// added up by stage and pass. An event costs the GPU about a microsecond, so short steps look a little longer than they
// are.
#pragma once
#include <string>
#include <vector>

#include "cuda_common.cuh"

enum class StepPass { forward, recompute, backward, update };
constexpr int NUM_STEP_PASSES = 4;

class StepProfile {
  public:
    StepProfile() = default;
    ~StepProfile() {
        for (const Mark& mark : marks_) {
            cudaEventDestroy(mark.event);
        }
    }
    StepProfile(const StepProfile&) = delete;
    StepProfile& operator=(const StepProfile&) = delete;

    // What is enqueued on the stream from here on, up to the next mark, belongs to `stage`; nullptr: to none.
    void mark(StepPass pass, const char* stage, cudaStream_t stream) {
        if (num_marks_ == marks_.size()) {
            marks_.emplace_back();
            CUDA_CHECK(cudaEventCreate(&marks_.back().event));
        }
        Mark& mark = marks_[num_marks_++];
        mark.pass = pass, mark.stage = stage;
        CUDA_CHECK(cudaEventRecord(mark.event, stream));
    }

    // The end of a step whose last mark has been waited for: adds its times up. The first step is left out: kernels are
    // loaded and algorithms chosen in it.
    void end_step() {
        for (size_t i = 0; i + 1 < num_marks_ && num_steps_ >= 0; ++i) {
            if (marks_[i].stage != nullptr) {
                float ms;
                CUDA_CHECK(cudaEventElapsedTime(&ms, marks_[i].event, marks_[i + 1].event));
                row(marks_[i].stage).ms[(int)marks_[i].pass] += ms;
            }
        }
        num_steps_ += 1;
        num_marks_ = 0;
    }

    // Milliseconds of a step by stage, in the order in which stages first ran, and their share of all.
    std::string table() const {
        if (num_steps_ < 1) {
            return "profile: no step after the first, which warms up\n";
        }
        Row all{"all"};
        for (const Row& row : rows_) {
            for (int pass = 0; pass < NUM_STEP_PASSES; ++pass) {
                all.ms[pass] += row.ms[pass];
            }
        }
        std::string text =
            format_string("%-24s %10s %10s %10s %10s %10s %7s   mean of %lld steps\n", "ms of a step", "forward",
                          "recompute", "backward", "update", "all", "%", (long long)num_steps_);
        for (const Row& row : rows_) {
            text += line(row, all.sum());
        }
        return text + line(all, all.sum());
    }

  private:
    struct Mark {
        cudaEvent_t event = nullptr;
        StepPass pass = StepPass::forward;
        const char* stage = nullptr;
    };
    struct Row {
        std::string stage;
        double ms[NUM_STEP_PASSES] = {};

        double sum() const {
            double total = 0.0;
            for (double pass_ms : ms) {
                total += pass_ms;
            }
            return total;
        }
    };

    Row& row(const std::string& stage) {
        for (Row& row : rows_) {
            if (row.stage == stage) {
                return row;
            }
        }
        rows_.push_back({stage});
        return rows_.back();
    }
    std::string line(const Row& row, double all_ms) const {
        std::string text = format_string("%-24s", row.stage.c_str());
        for (double pass_ms : row.ms) {
            text +=
                pass_ms == 0.0 ? format_string(" %10s", "-") : format_string(" %10.3f", pass_ms / (double)num_steps_);
        }
        return text + format_string(" %10.3f %7.1f\n", row.sum() / (double)num_steps_, 100.0 * row.sum() / all_ms);
    }

    std::vector<Mark> marks_;  // events are made once and used in every step
    size_t num_marks_ = 0;     // of this step
    std::vector<Row> rows_;
    int64_t num_steps_ = -1;  // added up; -1: the first has not ended
};
