// train_loop_testing.h: what the tests of the training loop share: a model that does as told and records what it is
// given, and the fixture with data and an output folder.
#pragma once
#include <gtest/gtest.h>
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "llmc/train_loop.h"
#include "token_shards.h"

// One number is trained: the first weight, which moves by a rule that depends on the step's tokens. Everything a step
// was given is recorded.
class FakeModel : public TrainableModel {
  public:
    explicit FakeModel(const ModelConfig& config) : config_(config), table_(make_parameter_table(config)) {
        for (std::vector<std::vector<float>>& kind : state_) {
            for (const ParameterTensor& tensor : table_.tensors) {
                kind.emplace_back(tensor.num_elements(), -7.0f);  // until it is set
            }
        }
    }
    const ModelConfig& config() const override { return config_; }
    const ParameterTable& parameters() const override { return table_; }
    void set_attention(AttentionMode mode) override { attention = mode; }

    void begin_step(int64_t) override { loss_ = 0.0; }
    void accumulate_gradients(const int32_t* tokens, int B, int64_t T, double loss_weight) override {
        double sum = 0.0;
        for (int64_t i = 0; i < B * (T + 1); ++i) {
            sum += std::sin((double)tokens[i] * (double)(i + 1));
        }
        loss_ += loss_weight * (sum + state_[0][0][0]);
        attention_of_steps.push_back(attention);
    }
    StepResult update(const AdamWSettings& settings) override {
        ++num_updates;
        settings_of_updates.push_back(settings);
        if (on_update) {
            on_update(num_updates);
        }
        StepResult result;
        result.loss = loss_, result.grad_norm = std::fabs(loss_);
        result.skipped = is_bad && is_bad(num_updates);
        if (result.skipped) {
            result.loss = NAN;
            result.first_bad_tensor = "layer0.qkv";
            return result;
        }
        for (int kind = 0; kind < 3; ++kind) {
            float& x = state_[kind][0][0];
            x = (float)(0.9 * x + settings.learning_rate * loss_ * (kind + 1) / (double)settings.adam_step);
        }
        return result;
    }

    double evaluate(const int32_t*, int, int64_t) override {
        if (on_evaluate) {
            on_evaluate();
        }
        attention_of_evaluations.push_back(attention);
        return attention == AttentionMode::dense ? validation_loss : 2.0;
    }
    void token_losses(float* losses, const int32_t*, const int32_t*, int B, int64_t T) override {
        if (on_token_losses) {
            on_token_losses();
        }
        std::fill_n(losses, B * T, attention == AttentionMode::dense ? 1.0f : 2.0f);
    }
    void next_token_logits(const int32_t* tokens, int64_t T, float* logits) override {
        contexts_of_samples.emplace_back(tokens, tokens + T);
        attention_of_samples.push_back(attention);
        std::fill_n(logits, config_.vocab_size, 0.0f);
        logits['x'] = 50.0f;
        logits['y'] = logit_of_y;
        if (on_logits) {
            on_logits(logits);
        }
    }
    int64_t max_sequence_length() const override { return longest_context; }
    void read_state(StateKind kind, int tensor, float* out) override {
        if (on_read_state) {
            on_read_state();
        }
        std::copy(state_[(int)kind][tensor].begin(), state_[(int)kind][tensor].end(), out);
    }
    void write_state(StateKind kind, int tensor, const float* in) override {
        std::copy_n(in, state_[(int)kind][tensor].size(), state_[(int)kind][tensor].begin());
    }
    void read_gradient(int, float*) override {}
    double peak_memory_gib() const override { return 0.0; }

    const std::vector<std::vector<float>>& state(StateKind kind) const { return state_[(int)kind]; }
    std::vector<int64_t> adam_steps() const {
        std::vector<int64_t> steps;
        for (const AdamWSettings& settings : settings_of_updates) {
            steps.push_back(settings.adam_step);
        }
        return steps;
    }

    std::function<bool(int)> is_bad;  // whether update n (1 is the first) is not finite
    std::function<void(int)> on_update;
    std::function<void()> on_evaluate, on_token_losses, on_read_state;
    std::function<void(float*)> on_logits;  // makes others of them
    double validation_loss = 1.0;           // under dense attention
    float logit_of_y = 0.0f;                // that of 'x' is 50, those of all other tokens 0
    int64_t longest_context = 512;
    int num_updates = 0;
    std::vector<AdamWSettings> settings_of_updates;
    std::vector<std::vector<int32_t>> contexts_of_samples;  // the tokens that a next one was asked for
    AttentionMode attention = AttentionMode::dense;
    std::vector<AttentionMode> attention_of_steps, attention_of_evaluations, attention_of_samples;

  private:
    ModelConfig config_;
    ParameterTable table_;
    std::vector<std::vector<float>> state_[3];
    double loss_ = 0.0;
};

class TrainLoop : public testing::Test {
  protected:
    void SetUp() override {
        omp_set_num_threads(1);  // the process that SecondSignalEndsTheProcess forks has no other threads
        ASSERT_NE(mkdtemp(folder_.data()), nullptr);
        std::ofstream data(folder_ + "/data.txt", std::ios::binary);
        for (int i = 0; i < 20000; ++i) {
            data << (char)(32 + i * 7919 % 90);
        }
        config_.model.width = config_.model.ffn_width = config_.model.head_dim = 8;
        config_.model.num_layers = config_.model.num_heads = config_.model.num_kv_heads = 1;
        config_.train_data = {folder_ + "/data.txt"};
        config_.output_dir = folder_ + "/run";
        config_.warmup_steps = 2, config_.seq_len = 16, config_.batch_size = 2, config_.max_steps = 8,
        config_.eval_every = 0, config_.sample_tokens = 0;
        stop_signal::received = 0;
    }
    void TearDown() override { EXPECT_EQ(std::system(("rm -rf '" + folder_ + "'").c_str()), 0); }

    int run(FakeModel& model, const RunConfig& config) {
        validate(config);
        testing::internal::CaptureStdout();
        testing::internal::CaptureStderr();
        const auto end_capture = [&] {
            out_ = testing::internal::GetCapturedStdout();
            err_ = testing::internal::GetCapturedStderr();
        };
        int status;
        try {
            status = run_training(model, config, device_);
        } catch (...) {
            end_capture();
            throw;
        }
        end_capture();
        return status;
    }
    RunConfig resumed(RunConfig config) const {
        config.resume = true;
        config.checkpoint = find_newest_checkpoint(config.output_dir).value_or("");
        EXPECT_FALSE(config.checkpoint.empty());
        return config;
    }
    // A new process goes on from the output folder.
    void expect_two_more_steps() {
        FakeModel model(config_.model);
        RunConfig longer = resumed(config_);
        longer.max_steps += 2;
        EXPECT_EQ(run(model, longer), 0);
        EXPECT_EQ(model.num_updates, 2);
    }
    // The lines of metrics.jsonl with this event.
    std::vector<Json> events(const std::string& event) const {
        std::vector<Json> found;
        std::ifstream file(config_.output_dir + "/metrics.jsonl");
        for (std::string line; std::getline(file, line);) {
            const Json object = Json::parse(line);
            if (object["event"] == event) {
                found.push_back(object);
            }
        }
        return found;
    }
    template <class Value>
    std::vector<Value> of_steps(const char* field) const {
        std::vector<Value> values;
        for (const Json& step : events("step")) {
            values.push_back(step[field].get<Value>());
        }
        return values;
    }
    std::vector<double> losses() const { return of_steps<double>("loss"); }
    // A file of 2000 tokens, all 7 but the middle one.
    std::string write_shard(const char* name, int64_t middle_token) const {
        std::vector<uint32_t> tokens(2000, 7);
        tokens[tokens.size() / 2] = (uint32_t)middle_token;
        std::ofstream(folder_ + name, std::ios::binary) << shard_bytes(20240520, 1, (uint32_t)tokens.size(), tokens);
        return folder_ + name;
    }

    std::string folder_ = testing::TempDir() + "llmc_loop_XXXXXX", out_, err_;
    RunConfig config_;
    DeviceInfo device_;
};
