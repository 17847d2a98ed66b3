// test_train_loop.cpp: the training loop around a model that does as told: what is skipped, counted, logged, saved,
// restored, switched and stopped, and when.
#include <gtest/gtest.h>
#include <omp.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <fstream>
#include <functional>
#include <numeric>
#include <sstream>

#include "llmc/train_loop.h"
#include "pseudo_terminal.h"
#include "token_shards.h"

namespace {

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
    std::function<void()> on_evaluate;
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
        const int status = run_training(model, config, device_);
        out_ = testing::internal::GetCapturedStdout();
        err_ = testing::internal::GetCapturedStderr();
        return status;
    }
    RunConfig resumed(RunConfig config) const {
        config.resume = true;
        config.checkpoint = find_newest_checkpoint(config.output_dir).value_or("");
        EXPECT_FALSE(config.checkpoint.empty());
        return config;
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

}  // namespace

TEST_F(TrainLoop, FreshRunInitializesFromTheSeed) {
    FakeModel model(config_.model), again(config_.model), other(config_.model);
    RunConfig no_steps = config_;
    no_steps.max_steps = 0;
    run(model, no_steps), run(again, no_steps);
    no_steps.seed = 1;
    run(other, no_steps);
    EXPECT_EQ(model.state(StateKind::master), again.state(StateKind::master));
    EXPECT_NE(model.state(StateKind::master), other.state(StateKind::master));
    const ParameterTable& table = model.parameters();
    for (size_t i = 0; i < table.tensors.size(); ++i) {
        double sum = 0.0, squares = 0.0;
        for (const float x : model.state(StateKind::master)[i]) {
            sum += x, squares += (double)x * x;
        }
        const double n = (double)table.tensors[i].num_elements(), std = table.tensors[i].init_std;
        if (std == 0.0) {
            EXPECT_EQ(sum, n) << table.tensors[i].name;
        } else {
            EXPECT_NEAR(sum / n, 0.0, 5 * std / std::sqrt(n)) << table.tensors[i].name;
            EXPECT_NEAR(std::sqrt(squares / n), std, 5 * std / std::sqrt(2 * n)) << table.tensors[i].name;
        }
        for (const float x : model.state(StateKind::exp_avg_sq)[i]) {
            ASSERT_EQ(x, 0.0f);
        }
    }
    EXPECT_FALSE(std::filesystem::exists(config_.output_dir)) << "--max_steps 0 writes nothing";
    EXPECT_NE(out_.find("validation loss 1.000000"), std::string::npos) << out_;
    EXPECT_NE(err_.find("random initial weights of --seed"), std::string::npos) << err_;
}

TEST_F(TrainLoop, ResumeIsBitIdentical) {
    FakeModel whole(config_.model);
    EXPECT_EQ(run(whole, config_), 0);
    const std::vector<double> expected = losses();
    ASSERT_EQ(expected.size(), 8u);
    for (int stop = 1; stop < 8; ++stop) {
        std::filesystem::remove_all(config_.output_dir);
        RunConfig first = config_;
        first.max_steps = stop, first.decay_steps = 8;
        FakeModel before(config_.model), after(config_.model);
        run(before, first);
        EXPECT_EQ(run(after, resumed(config_)), 0);
        EXPECT_EQ(losses(), expected) << "stopped after " << stop;
        for (const StateKind kind : {StateKind::master, StateKind::exp_avg, StateKind::exp_avg_sq}) {
            EXPECT_EQ(after.state(kind), whole.state(kind)) << state_kind_name(kind);
        }
    }
}

TEST_F(TrainLoop, GoingOnWithOtherDataIsSaid) {
    const auto write = [&](const std::string& name, int num_bytes) {
        std::ofstream(folder_ + "/" + name, std::ios::binary) << std::string(num_bytes, 'x');
        return folder_ + "/" + name;
    };
    RunConfig first = config_;
    first.train_data = {write("a.txt", 5000), write("b.txt", 3000), write("c.txt", 3000)};
    first.max_steps = 1;
    FakeModel model(config_.model);
    run(model, first);
    EXPECT_EQ(err_, "");
    const auto said = [&](std::vector<std::string> train_data, double val_fraction) {
        RunConfig next = resumed(first);
        next.train_data = std::move(train_data), next.val_fraction = val_fraction, next.max_steps += 1;
        FakeModel again(config_.model);
        EXPECT_EQ(run(again, next), 0);
        std::filesystem::remove_all(config_.output_dir + "/" + checkpoint::folder_name(next.max_steps));
        return err_;
    };
    const double f = config_.val_fraction;
    EXPECT_EQ(said(first.train_data, f), "");
    std::filesystem::create_directory(folder_ + "/moved");
    for (const char* name : {"a.txt", "b.txt", "c.txt"}) {
        std::filesystem::copy_file(folder_ + "/" + name, folder_ + "/moved/" + name);
    }
    EXPECT_EQ(said({folder_ + "/moved/*.txt"}, f), "") << "the same in another folder";
    const auto warned = [&](const std::vector<std::string>& train_data, double val_fraction, const std::string& words) {
        const std::string warning = said(train_data, val_fraction);
        EXPECT_EQ(std::count(warning.begin(), warning.end(), '\n'), 1) << warning;
        EXPECT_NE(warning.find("--train_data: " + config_.output_dir +
                               "/step00000001 was trained on other data (3 "
                               "files of bytes, \"a.txt\" to \"c.txt\", names and lengths "),
                  std::string::npos)
            << warning;
        EXPECT_NE(warning.find(words), std::string::npos) << warning;
    };
    warned({folder_ + "/data.txt"}, f, "(1 file of bytes, \"data.txt\", names and lengths ");
    warned({folder_ + "/a.txt", write("d.txt", 3000), folder_ + "/c.txt"}, f,
           "from here on (3 files of bytes, \"a.txt\"");
    warned(first.train_data, 0.0, "11006 tokens): their order is another");
    write("moved/b.txt", 3001);
    warned({folder_ + "/moved/*.txt"}, f, "from here on (3 files of bytes");

    // A checkpoint of before these were written down; and evaluation, which trains on none.
    const std::string old = find_newest_checkpoint(config_.output_dir).value(), path = old + "/state.json";
    Json state = Json::parse(read_text_file(path));
    state.erase("data");
    std::ofstream(path) << state.dump();
    const std::string manifest_path = old + "/manifest.json";
    checkpoint::Manifest manifest = checkpoint::parse_manifest(read_text_file(manifest_path), manifest_path);
    manifest["state.json"] = digest_file(path);
    std::ofstream(manifest_path) << checkpoint::manifest_text(manifest);
    EXPECT_EQ(said({folder_ + "/data.txt"}, f), "");
}

TEST_F(TrainLoop, ALongerRunSaysWhatItsLearningRateBecomes) {
    config_.learning_rate = 0.6, config_.schedule = ScheduleKind::linear, config_.final_learning_rate_fraction = 0.1;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    const auto said = [&](int64_t decay_steps, ScheduleKind schedule) {
        RunConfig next = resumed(config_);
        next.max_steps = 2 * config_.max_steps, next.decay_steps = decay_steps, next.schedule = schedule;
        FakeModel again(config_.model);
        EXPECT_EQ(run(again, next), 0);
        std::filesystem::remove_all(config_.output_dir + "/" + checkpoint::folder_name(next.max_steps));
        return err_;
    };
    const std::string warning = said(0, ScheduleKind::linear);
    EXPECT_NE(warning.find("the decay of the learning rate ends at step 16"), std::string::npos) << warning;
    EXPECT_NE(warning.find("at 8: the next step's is 0.369, and would have been 0.06 "), std::string::npos) << warning;
    EXPECT_EQ(said(config_.max_steps, ScheduleKind::linear), "");
    EXPECT_EQ(said(0, ScheduleKind::constant), "") << "another schedule was asked for";
}

TEST_F(TrainLoop, UpdatesGetTheSettingsAndTheLearningRateOfTheirStep) {
    config_.learning_rate = 0.6, config_.schedule = ScheduleKind::linear, config_.final_learning_rate_fraction = 0.0;
    config_.beta1 = 0.7, config_.beta2 = 0.8, config_.adam_eps = 1e-5, config_.weight_decay = 0.3;
    config_.max_grad_norm = 0.25;
    FakeModel model(config_.model);
    model.is_bad = [](int n) { return n == 4; };
    EXPECT_EQ(run(model, config_), 0);
    // Two steps of warm-up, 0.6 (step + 1) / 2; then 0.6 (1 - (step - 2) / 6). A skipped step counts.
    const std::vector<double> rates = {0.3, 0.6, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1};
    ASSERT_EQ(model.settings_of_updates.size(), rates.size());
    for (size_t step = 0; step < rates.size(); ++step) {
        const AdamWSettings& given = model.settings_of_updates[step];
        EXPECT_NEAR(given.learning_rate, rates[step], 1e-15) << "step " << step;
        EXPECT_EQ(given.beta1, 0.7);
        EXPECT_EQ(given.beta2, 0.8);
        EXPECT_EQ(given.eps, 1e-5);
        EXPECT_EQ(given.weight_decay, 0.3);
        EXPECT_EQ(given.max_grad_norm, 0.25);
    }
    EXPECT_EQ(model.adam_steps(), (std::vector<int64_t>{1, 2, 3, 4, 4, 5, 6, 7}));
    const std::vector<Json> steps = events("step");
    ASSERT_EQ(steps.size(), 7u) << "and one that is skipped";
    for (const Json& step : steps) {
        EXPECT_NEAR(step["learning_rate"].get<double>(), rates[step["step"].get<int>() - 1], 1e-15) << step;
    }
}

TEST_F(TrainLoop, AStepsLineSaysWhatItDidAndHowFast) {
    config_.global_batch = 6, config_.max_steps = 2;
    device_.peak_tflops = 1e-6;  // a million a second
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    ASSERT_EQ(events("step").size(), 2u);
    const Json step = events("step")[1];
    std::vector<std::string> names;
    for (const auto& [name, value] : step.items()) {
        names.push_back(name);
    }
    std::sort(names.begin(), names.end());
    EXPECT_EQ(names,
              (std::vector<std::string>{"attention", "data_position", "elapsed_ms", "epoch", "event", "grad_norm",
                                        "learning_rate", "loss", "memory_gib", "mfu", "mfu_dense_equivalent",
                                        "seconds_left", "skipped", "step", "tokens", "tokens_per_second"}));
    EXPECT_EQ(step["step"], 2);
    EXPECT_EQ(step["attention"], "dense");
    EXPECT_EQ(step["data_position"], 6) << "its first sequence";
    EXPECT_EQ(step["tokens"], 192) << "2 steps of 6 sequences of 16";
    EXPECT_EQ(step["skipped"], 0);
    // 20002 tokens with both markers; all but the last 1000, which validate, are 1187 sequences of 16 and targets.
    EXPECT_NEAR(step["epoch"].get<double>(), 6.0 / 1187.0, 1e-12);
    const double seconds = step["elapsed_ms"].get<double>() / 1e3;
    EXPECT_NEAR(step["tokens_per_second"].get<double>() * seconds, 96.0, 1e-9) << "6 sequences of 16";
    // One layer: V 258, C = F = D = 8, H = Hkv = 1: 8 x 24 + 8 x 8 + 3 x 8 x 8 + 258 x 8 = 2512 elements of matrices.
    // 6 sequences of 6 x 2512 x 16 + 3.5 x 2 x 16^2 x 8 = 255488 FLOPs
    EXPECT_NEAR(step["mfu"].get<double>() * seconds * 1e6, 1532928.0, 1e-3);
    EXPECT_EQ(step["mfu"], step["mfu_dense_equivalent"]);
}

TEST_F(TrainLoop, TheTimeLeftIsByTheStepsOfThisProcess) {
    config_.decay_steps = config_.max_steps;
    RunConfig first = config_;
    first.max_steps = 4;
    FakeModel model(config_.model), after(config_.model);
    model.on_update = after.on_update = [](int) { usleep(10000); };
    const auto start = std::chrono::steady_clock::now();
    EXPECT_EQ(run(model, first), 0);
    EXPECT_EQ(run(after, resumed(config_)), 0);
    const double both_runs = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const std::vector<double> left = of_steps<double>("seconds_left"), elapsed_ms = of_steps<double>("elapsed_ms");
    ASSERT_EQ(left.size(), 8u);
    for (const int begin : {0, 4}) {
        EXPECT_NEAR(left[begin], 3e-3 * elapsed_ms[begin], 1e-9) << "three more like the first";
        EXPECT_GE(left[begin + 1], 2 * 0.01);
        EXPECT_LE(left[begin + 1], 2 * both_runs);
        EXPECT_GE(left[begin + 2], 0.01);
        EXPECT_LE(left[begin + 2], both_runs);
        EXPECT_EQ(left[begin + 3], 0.0);
    }
}

TEST_F(TrainLoop, ATerminalHasAProgressBar) {
    PseudoTerminal terminal;
    const pid_t child = fork();  // a terminal holds little that is not read yet
    if (child == 0) {
        dup2(terminal.terminal(), STDOUT_FILENO);
        FakeModel model(config_.model);
        const int status = run_training(model, config_, device_);
        std::fflush(stdout);
        _exit(status);
    }
    const std::string text = terminal.read_to_the_end();
    int status;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
    EXPECT_NE(text.find("[####################....................]  50 %, "), std::string::npos) << text;
}

TEST_F(TrainLoop, SkippedStepsAreCountedLoggedAndNotApplied) {
    FakeModel model(config_.model);
    model.is_bad = [](int n) { return n == 3 || n == 4; };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_EQ(model.adam_steps(), (std::vector<int64_t>{1, 2, 3, 3, 3, 4, 5, 6}));
    const std::vector<Json> skips = events("skip");
    ASSERT_EQ(skips.size(), 2u);
    EXPECT_EQ(skips[0]["step"], 3);
    EXPECT_EQ(skips[0]["data_position"], 4);
    EXPECT_EQ(skips[0]["first_bad_tensor"], "layer0.qkv");
    EXPECT_TRUE(skips[0]["loss"].is_null());
    EXPECT_EQ(skips[1]["skipped"], 2);
    EXPECT_EQ(losses().size(), 6u);
    EXPECT_NE(out_.find("layer0.qkv"), std::string::npos);
}

TEST_F(TrainLoop, TooManySkipsInARowStopWithACheckpoint) {
    config_.max_skipped = 3;
    FakeModel model(config_.model);
    model.is_bad = [](int n) { return n == 1 || n == 2 || n >= 4; };
    EXPECT_EQ(run(model, config_), 1);
    EXPECT_EQ(model.num_updates, 6) << "two, one good, three";
    EXPECT_NE(err_.find("layer0.qkv"), std::string::npos) << err_;
    EXPECT_NE(err_.find("sequence 6"), std::string::npos) << err_;
    FakeModel after(config_.model);
    EXPECT_EQ(run(after, resumed(config_)), 0) << "a checkpoint was written";
    EXPECT_EQ(after.adam_steps(), (std::vector<int64_t>{2, 3}));
}

TEST_F(TrainLoop, ARunOfNothingButSkipsFails) {
    FakeModel bad(config_.model), good(config_.model), bad_again(config_.model), last_bad(config_.model);
    bad.is_bad = bad_again.is_bad = [](int) { return true; };
    EXPECT_EQ(run(bad, config_), 1) << "8 steps are fewer than --max_skipped";
    EXPECT_NE(err_.find("all 8 steps was not finite (last: layer0.qkv): " + config_.output_dir + "/step00000008"),
              std::string::npos)
        << err_;
    EXPECT_NE(err_.find("from sequence 0 on"), std::string::npos) << err_;
    EXPECT_EQ(std::count(err_.begin(), err_.end(), '\n'), 1) << err_;
    EXPECT_EQ(events("stop").at(0)["skipped_in_a_row"], 8);
    RunConfig longer = resumed(config_);
    longer.max_steps = 10;
    EXPECT_EQ(run(good, longer), 0);
    EXPECT_EQ(good.adam_steps(), (std::vector<int64_t>{1, 2}));
    longer = resumed(longer);
    longer.max_steps = 12;
    EXPECT_EQ(run(bad_again, longer), 1);
    EXPECT_NE(err_.find("all 2 steps"), std::string::npos) << err_;
    EXPECT_NE(err_.find("from sequence 20 on"), std::string::npos) << err_;
    longer = resumed(longer);
    longer.max_steps = 14;
    last_bad.is_bad = [](int n) { return n == 2; };
    EXPECT_EQ(run(last_bad, longer), 0) << "one of two";
}

// A run that is resumed on weights that are bad tries as often as any, and removes no checkpoint that may be good.
TEST_F(TrainLoop, GoingOnAfterTooManySkipsCostsNoCheckpoint) {
    config_.max_skipped = 2, config_.keep_checkpoints = 1, config_.checkpoint_every = 1;
    RunConfig first = config_;
    first.max_steps = 2;
    FakeModel good(config_.model);
    EXPECT_EQ(run(good, first), 0);
    const std::string last_good = find_newest_checkpoint(config_.output_dir).value();
    for (int attempt = 0; attempt < 3; ++attempt) {
        FakeModel bad(config_.model);
        bad.is_bad = [](int) { return true; };
        RunConfig longer = resumed(config_);
        longer.max_steps = 100;
        EXPECT_EQ(run(bad, longer), 1);
        EXPECT_EQ(bad.num_updates, 2);
        EXPECT_TRUE(std::filesystem::exists(last_good)) << attempt;
    }
}

TEST_F(TrainLoop, WhatIsTrainedIsSavedBeforeWhatMayFail) {
    FakeModel model(config_.model);
    config_.val_data = config_.train_data;
    model.on_evaluate = [] { fail("the validation data are bad"); };
    EXPECT_THROW(run(model, config_), Error);
    testing::internal::GetCapturedStdout();
    testing::internal::GetCapturedStderr();
    EXPECT_NE(find_newest_checkpoint(config_.output_dir).value().find("step00000008"), std::string::npos);
}

TEST_F(TrainLoop, ValidationDataThatProveBadCostNoSteps) {
    config_.train_data = {write_shard("/train.bin", 8)};
    config_.val_data = {write_shard("/validation.bin", config_.model.vocab_size)};
    config_.data_format = DataFormat::shards, config_.eval_every = 3;
    FakeModel model(config_.model);
    EXPECT_THROW(run(model, config_), Error);
    testing::internal::GetCapturedStdout();
    testing::internal::GetCapturedStderr();
    EXPECT_EQ(model.num_updates, 3);
    EXPECT_NE(find_newest_checkpoint(config_.output_dir).value().find("step00000003"), std::string::npos);
}

TEST_F(TrainLoop, TrainingDataThatProveBadCostNoSteps) {
    config_.train_data = {write_shard("/train.bin", config_.model.vocab_size)};
    config_.data_format = DataFormat::shards, config_.max_steps = 59;  // all 118 sequences of 16
    FakeModel model(config_.model);
    EXPECT_THROW(run(model, config_), Error);
    testing::internal::GetCapturedStdout();
    testing::internal::GetCapturedStderr();
    EXPECT_GT(model.num_updates, 0);
    EXPECT_EQ(find_newest_checkpoint(config_.output_dir).value_or("no checkpoint"),
              config_.output_dir + "/" + checkpoint::folder_name(model.num_updates));
}

TEST_F(TrainLoop, AFolderThatIsAnotherRunsMeanwhileStaysAsItIs) {
    config_.checkpoint_every = 2;
    FakeModel model(config_.model);
    model.on_update = [&](int n) {
        if (n == 5) {
            std::filesystem::remove_all(config_.output_dir);
            RunConfig other = config_;
            other.seed = 9, other.max_steps = 2;
            FakeModel other_model(config_.model);
            EXPECT_EQ(run_training(other_model, other, device_), 0);
        }
    };
    testing::internal::CaptureStdout();
    try {
        run_training(model, config_, device_);
        ADD_FAILURE() << "this run's checkpoints would take the place of another's";
    } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find("is another run's folder now"), std::string::npos) << error.what();
    }
    testing::internal::GetCapturedStdout();
    ASSERT_EQ(checkpoint::list(config_.output_dir).size(), 1u);
    EXPECT_EQ(checkpoint::list(config_.output_dir).begin()->first, 2);
}

TEST_F(TrainLoop, ACheckpointIsWrittenWhereMetricsCannotBe) {
    FakeModel model(config_.model);
    rlimit before;
    ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
    const auto limit = [&](rlim_t num_bytes) {
        const rlimit now = {num_bytes, before.rlim_max};
        ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &now), 0);
    };
    std::signal(SIGXFSZ, SIG_IGN);  // as trainers have it
    // metrics.jsonl reaches it before any of this model's files would.
    config_.max_steps = 100000;
    limit(60000);
    testing::internal::CaptureStdout();
    EXPECT_THROW(run_training(model, config_, device_), Error);
    testing::internal::GetCapturedStdout();
    limit(before.rlim_cur);
    const std::optional<std::string> newest = find_newest_checkpoint(config_.output_dir);
    ASSERT_TRUE(newest) << "what was trained is lost";
    EXPECT_EQ(*newest, config_.output_dir + "/" + checkpoint::folder_name(model.num_updates));
}

TEST_F(TrainLoop, AnotherShuffleSeedIsSaid) {
    FakeModel model(config_.model), after(config_.model);
    config_.max_steps = 2, config_.decay_steps = 100;
    run(model, config_);
    RunConfig other = resumed(config_);
    other.max_steps = 4, other.shuffle_seed = 7;
    EXPECT_EQ(run(after, other), 0);
    EXPECT_NE(err_.find("--shuffle_seed 7: "), std::string::npos) << err_;
    EXPECT_NE(err_.find("was trained with 0"), std::string::npos) << err_;
    FakeModel same(config_.model);
    RunConfig third = resumed(other);
    third.max_steps = 6;
    EXPECT_EQ(run(same, third), 0);
    EXPECT_EQ(err_, "") << "it is saved with the run";
}

TEST_F(TrainLoop, WeightsAreSavedInTheTypeOfTheDeviceUnlessToldOtherwise) {
    config_.max_steps = 1;
    const auto saved = [&](bool is_gpu, SaveDtype choice) {
        std::filesystem::remove_all(config_.output_dir);
        device_.is_gpu = is_gpu, config_.save_dtype = choice;
        FakeModel model(config_.model);
        EXPECT_EQ(run(model, config_), 0);
        const std::string folder = find_newest_checkpoint(config_.output_dir).value();
        return SafetensorsFile(folder + "/model.safetensors").tensors().at(0).dtype;
    };
    EXPECT_EQ(saved(false, SaveDtype::automatic), Dtype::F32);
    EXPECT_EQ(saved(true, SaveDtype::automatic), Dtype::BF16);
    EXPECT_EQ(saved(false, SaveDtype::bf16), Dtype::BF16);
    EXPECT_EQ(saved(true, SaveDtype::fp32), Dtype::F32);
}

TEST_F(TrainLoop, RawTextForAModelWithATokenizerOfItsOwnIsSaid) {
    FakeModel model(config_.model), after(config_.model), again(config_.model);
    config_.max_steps = 1;
    run(model, config_);
    const std::string foreign = folder_ + "/foreign";
    std::filesystem::copy(*find_newest_checkpoint(config_.output_dir), foreign);
    std::filesystem::remove(foreign + "/manifest.json");
    RunConfig from = config_;
    from.init_from = from.checkpoint = foreign, from.output_dir = folder_ + "/second";
    EXPECT_EQ(run(after, from), 0);
    EXPECT_EQ(err_, "") << "the tokenizer is that of bytes";
    std::ofstream(foreign + "/tokenizer.json") << "{\"model\": {\"type\": \"BPE\"}}";
    from.output_dir = folder_ + "/third";
    EXPECT_EQ(run(again, from), 0);
    EXPECT_NE(err_.find("has a tokenizer of its own"), std::string::npos) << err_;
    std::filesystem::remove(foreign + "/tokenizer.json");
    for (const char* name : {"tokenizer.model", "vocab.json"}) {
        std::ofstream(foreign + "/" + name) << "of others";
        from.output_dir = folder_ + "/of_" + name;
        FakeModel third(config_.model);
        EXPECT_EQ(run(third, from), 0);
        EXPECT_NE(err_.find("has a tokenizer of its own"), std::string::npos) << name << ": " << err_;
        FakeModel evaluated(config_.model);
        RunConfig evaluation = from;
        evaluation.max_steps = 0, evaluation.output_dir.clear();
        EXPECT_EQ(run(evaluated, evaluation), 0);
        EXPECT_NE(err_.find("but the validation data are raw text"), std::string::npos) << name << ": " << err_;
        std::filesystem::remove(foreign + "/" + name);
    }
}

// Whoever has moved a running run's folder can go on from it there, also where that run was resumed itself.
TEST_F(TrainLoop, AFolderThatIsMovedIsLetGo) {
    FakeModel model(config_.model), after(config_.model);
    RunConfig first = config_;
    first.max_steps = 2;
    run(model, first);
    RunConfig second = resumed(config_);
    second.output_lock = lock_output(second);  // as resolve_run passes it on
    const std::string moved = folder_ + "/moved";
    after.on_update = [&](int n) {
        if (n == 1) {
            std::filesystem::rename(config_.output_dir, moved);
        }
    };
    bool was_free = false;
    after.on_evaluate = [&] {  // behind a checkpoint
        was_free = true;
        EXPECT_NO_THROW(OutputLock lock(moved));
    };
    EXPECT_EQ(run(after, second), 0);
    EXPECT_TRUE(was_free);
}

TEST_F(TrainLoop, AFolderThatIsRemovedIsMadeAndLockedAgain) {
    FakeModel model(config_.model), after(config_.model);
    model.on_update = [&](int n) {
        if (n == 3) {
            std::filesystem::remove_all(config_.output_dir);
        }
    };
    model.on_evaluate = [&] { EXPECT_THROW(OutputLock other(config_.output_dir), Error) << "behind the checkpoint"; };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_NE(err_.find("has been removed or moved"), std::string::npos) << err_;
    EXPECT_TRUE(std::filesystem::exists(saved_settings_path(config_.output_dir)));
    EXPECT_EQ(events("checkpoint").size(), 1u);
    RunConfig longer = resumed(config_);
    longer.max_steps += 2;
    EXPECT_EQ(run(after, longer), 0);
    EXPECT_EQ(after.num_updates, 2);
}

TEST_F(TrainLoop, LayersThatAreAllDenseAreSaid) {
    FakeModel model(config_.model);
    config_.attention = AttentionMode::lighthouse, config_.seq_len = 256;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers.resize(config_.model.num_layers);
    std::iota(config_.lighthouse.dense_layers.begin(), config_.lighthouse.dense_layers.end(), 0);
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_NE(err_.find("layers dense, so nothing is different"), std::string::npos) << err_;
}

TEST_F(TrainLoop, ARunThatIsOverIsNotWrittenToAgain) {
    FakeModel model(config_.model), after(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    const size_t starts = events("start").size();
    EXPECT_EQ(run(after, resumed(config_)), 0);
    EXPECT_EQ(after.num_updates, 0);
    EXPECT_NE(out_.find("already at step 8"), std::string::npos) << out_;
    EXPECT_EQ(events("start").size(), starts);
}

TEST_F(TrainLoop, TwoAtOnceInOneFolderAreRefused) {
    std::filesystem::create_directory(config_.output_dir);
    const auto refused = [&](const RunConfig& config, const char* words) {
        FakeModel model(config_.model);
        try {
            run(model, config);
            FAIL() << "was accepted";
        } catch (const Error& error) {
            testing::internal::GetCapturedStdout();
            testing::internal::GetCapturedStderr();
            EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
        }
        EXPECT_EQ(model.num_updates, 0);
    };
    {
        const OutputLock other(config_.output_dir);
        refused(config_, "another process is training into this folder");
    }
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0) << "a folder with nothing but the lock's file holds no run";
    {
        const OutputLock other(config_.output_dir);
        try {
            check_holds_no_run(config_, true);
            FAIL() << "was accepted";
        } catch (const Error& error) {
            EXPECT_NE(std::string(error.what()).find("another process is training"), std::string::npos)
                << "not that it should be removed: " << error.what();
        }
    }
    refused(config_, "already holds a run");  // of a process that came and went while this one read its data
    RunConfig settings_alone = config_;
    settings_alone.output_dir = folder_ + "/settings";
    std::filesystem::create_directory(settings_alone.output_dir);
    std::ofstream(settings_alone.output_dir + "/settings.toml") << "# mine\n";
    refused(settings_alone, "holds a settings.toml, which this run would replace");
    EXPECT_EQ(read_text_file(settings_alone.output_dir + "/settings.toml"), "# mine\n");
    RunConfig longer = resumed(config_);
    longer.max_steps += 1;
    {
        const auto lock = std::make_shared<OutputLock>(config_.output_dir);
        refused(longer, "another process is training into this folder");
        longer.output_lock = lock;  // as resolve_run passes it on
        EXPECT_EQ(run(model, longer), 0);
    }
}

TEST_F(TrainLoop, SkipsInARowAreCountedAcrossAResume) {
    config_.max_skipped = 3;
    RunConfig first = config_;
    first.max_steps = 2;
    FakeModel before(config_.model), after(config_.model);
    before.is_bad = after.is_bad = [](int) { return true; };
    run(before, first);
    EXPECT_EQ(run(after, resumed(config_)), 1);
    EXPECT_EQ(after.num_updates, 1);
}

TEST_F(TrainLoop, SignalFinishesTheStepAndSaves) {
    std::signal(SIGHUP, SIG_DFL);  // whoever runs the tests may ignore it
    for (const int signal_number : {SIGINT, SIGTERM, SIGUSR1, SIGHUP}) {
        std::filesystem::remove_all(config_.output_dir);
        stop_signal::received = 0;
        FakeModel model(config_.model);
        model.on_update = [&](int n) {
            if (n == 3) {
                std::raise(signal_number);
                std::raise(signal_number);  // no second signal: wrappers pass on what has come already
                std::raise(SIGHUP);         // nor this one: a closed terminal may send two
            }
        };
        EXPECT_EQ(run(model, config_), 0);
        EXPECT_EQ(model.num_updates, 3);
        EXPECT_EQ(losses().size(), 3u);
        EXPECT_NE(out_.find("--resume --output_dir " + config_.output_dir), std::string::npos) << out_;
        stop_signal::received = 0;
        FakeModel after(config_.model);
        EXPECT_EQ(run(after, resumed(config_)), 0);
        EXPECT_EQ(after.num_updates, 5);
    }
}

TEST_F(TrainLoop, WhatASignalKeptFromBeingDoneIsMadeUpFor) {
    config_.eval_every = config_.sample_every = 3, config_.sample_tokens = 4;
    const auto steps_of = [&](const char* event) {
        std::string steps;
        for (const Json& line : events(event)) {
            steps += std::to_string(line["step"].get<int>()) + " ";
        }
        return steps;
    };
    stop_signal::received = SIGINT;  // before the first step, where nothing is due
    FakeModel unstarted(config_.model);
    EXPECT_EQ(run(unstarted, config_), 0);
    stop_signal::received = 0;
    FakeModel model(config_.model);
    model.on_update = [](int n) { n == 3 ? std::raise(SIGINT) : 0; };
    EXPECT_EQ(run(model, resumed(config_)), 0);
    EXPECT_EQ(steps_of("validation") + steps_of("sample"), "");
    stop_signal::received = 0;
    FakeModel after(config_.model);
    after.on_update = [](int n) { n == 4 ? std::raise(SIGINT) : 0; };  // at step 7, where nothing is due
    EXPECT_EQ(run(after, resumed(config_)), 0);
    EXPECT_EQ(steps_of("validation"), "3 6 ");
    stop_signal::received = 0;
    FakeModel last(config_.model);
    EXPECT_EQ(run(last, resumed(config_)), 0);
    EXPECT_EQ(steps_of("validation"), "3 6 8 ");
    EXPECT_EQ(steps_of("sample"), "3 6 8 ");
}

// There is nothing to go on with then, but an evaluation that did not end.
TEST_F(TrainLoop, SignalAfterTheLastStepSaysHowToEvaluate) {
    config_.val_data = config_.train_data;
    FakeModel model(config_.model);
    model.on_evaluate = [] { std::raise(SIGINT); };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_EQ(model.num_updates, 8);
    EXPECT_NE(out_.find("after the last step"), std::string::npos) << out_;
    EXPECT_NE(out_.find("--resume --output_dir " + config_.output_dir + " --max_steps 0"), std::string::npos) << out_;
    EXPECT_EQ(out_.find("| validation loss"), std::string::npos) << "of a part of the data: " << out_;
    EXPECT_TRUE(events("validation").empty());
    stop_signal::received = 0;
    FakeModel after(config_.model);
    RunConfig evaluation = resumed(config_);
    evaluation.max_steps = 0;
    EXPECT_EQ(run(after, evaluation), 0);
    EXPECT_NE(out_.find("validation loss 1.0"), std::string::npos) << out_;

    config_.val_data.clear(), config_.val_fraction = 0.0;
    std::filesystem::remove_all(config_.output_dir);
    FakeModel nothing_to_evaluate(config_.model);
    nothing_to_evaluate.on_update = [](int n) { n == 8 ? std::raise(SIGINT) : 0; };
    EXPECT_EQ(run(nothing_to_evaluate, config_), 0);
    EXPECT_NE(out_.find("after the last step"), std::string::npos) << out_;
    EXPECT_EQ(out_.find("--max_steps 0"), std::string::npos) << out_;
    stop_signal::received = 0;
}

TEST_F(TrainLoop, AnEvaluationOfBadWeightsFails) {
    config_.val_data = config_.train_data, config_.max_steps = 0;
    FakeModel model(config_.model);
    model.validation_loss = NAN;
    EXPECT_THROW(run(model, config_), Error);
    testing::internal::GetCapturedStdout();
    testing::internal::GetCapturedStderr();
}

TEST_F(TrainLoop, ARunWhoseLastValidationLossIsNotFiniteFails) {
    config_.val_data = config_.train_data, config_.eval_every = 4;
    FakeModel bad(config_.model), bad_in_between(config_.model);
    bad.validation_loss = NAN;
    EXPECT_EQ(run(bad, config_), 1);
    EXPECT_NE(err_.find("the last validation loss is not finite"), std::string::npos) << err_;
    EXPECT_NE(err_.find(config_.output_dir + "/step00000008"), std::string::npos) << "it is saved, and named: " << err_;
    config_.output_dir += "_in_between";
    bad_in_between.on_evaluate = [&] { bad_in_between.validation_loss = bad_in_between.num_updates == 4 ? NAN : 1.0; };
    EXPECT_EQ(run(bad_in_between, config_), 0) << err_;
}

TEST_F(TrainLoop, AnotherSequenceLengthIsSaidAndGoesOnBehindTheTokensSeen) {
    FakeModel model(config_.model), same(config_.model), longer(config_.model), longer_again(config_.model);
    config_.decay_steps = 100;
    RunConfig first = config_;
    first.max_steps = 2;
    EXPECT_EQ(run(model, first), 0);
    RunConfig second = resumed(config_);
    second.max_steps = 4;
    EXPECT_EQ(run(same, second), 0);
    EXPECT_EQ(err_, "");
    EXPECT_EQ(of_steps<int64_t>("data_position"), (std::vector<int64_t>{0, 2, 4, 6}));
    second = resumed(config_);
    second.seq_len = 24, second.max_steps = 6;
    EXPECT_EQ(run(longer, second), 0);
    EXPECT_NE(err_.find("was trained on sequences of 16"), std::string::npos) << err_;
    // 8 sequences of 16 have been seen: the tokens of 5 1/3 of 24, so the next is the seventh.
    EXPECT_EQ(of_steps<int64_t>("data_position"), (std::vector<int64_t>{0, 2, 4, 6, 6, 8}));
    EXPECT_EQ(of_steps<int64_t>("tokens").back(), 240) << "10 sequences of 24";
    RunConfig third = resumed(second);
    third.max_steps = 7;
    EXPECT_EQ(run(longer_again, third), 0);
    EXPECT_EQ(err_, "");
    EXPECT_EQ(of_steps<int64_t>("data_position"), (std::vector<int64_t>{0, 2, 4, 6, 6, 8, 10}));
}

TEST_F(TrainLoop, SecondSignalEndsTheProcess) {
    FakeModel model(config_.model);
    model.on_update = [](int) {
        std::raise(SIGTERM);
        usleep(600000);  // what comes within half a second is the same request
        std::raise(SIGTERM);
    };
    testing::internal::CaptureStdout();
    EXPECT_EXIT(run_training(model, config_, DeviceInfo()), testing::ExitedWithCode(128 + SIGTERM),
                "without a checkpoint");
    testing::internal::GetCapturedStdout();
}

TEST_F(TrainLoop, SwitchesToDenseAttention) {
    config_.attention = AttentionMode::lighthouse, config_.lighthouse_steps = 3, config_.eval_every = 2;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers = {};
    config_.seq_len = 256, config_.max_steps = 5;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    const AttentionMode L = AttentionMode::lighthouse, D = AttentionMode::dense;
    EXPECT_EQ(model.attention_of_steps, (std::vector<AttentionMode>{L, L, L, D, D}));
    const std::vector<Json> switches = events("attention_switch"), validations = events("validation");
    ASSERT_EQ(switches.size(), 1u);
    EXPECT_EQ(switches[0]["step"], 3);
    ASSERT_EQ(validations.size(), 3u) << "steps 2 and 4 and the end";
    EXPECT_EQ(validations[0]["loss"], 2.0) << "under Lighthouse attention";
    EXPECT_EQ(validations[0]["dense_loss"], 1.0);
    EXPECT_EQ(validations[1]["loss"], 1.0);
    // S = T / 2 + 2 x 128
    EXPECT_NE(out_.find("\nlighthouse  T 256, S 384, 1 tiles; 1 of 1 layers; "), std::string::npos) << out_;
}

TEST_F(TrainLoop, TheStartSaysWhatLighthouseSaves) {
    config_.attention = AttentionMode::lighthouse, config_.seq_len = 1024, config_.val_fraction = 0.2;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers = {0};
    config_.model.num_layers = 2, config_.max_steps = 1;
    device_.peak_tflops = 1e-6;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    // S = 1024 / 2 + 2 x 128 = 768, and (768 / 1024)^2 of the dense work. FLOPs of a sequence, with 2 x 448 + 258 x 8 =
    // 2960 elements of matrices, dense: 6 x 2960 x 1024 + 2 x 7 x 1024^2 x 8 = 135626752; with the second layer on 768
    // rows: 6 x 2960 x 1024 + 7 x 1024^2 x 8 + 7 x 768^2 x 8 = 109936640; their ratio is 1.2337.
    EXPECT_NE(
        out_.find("\nlighthouse  T 1024, S 768, 1 tiles; 1 of 2 layers; their attention does 56.25 % of the dense "
                  "work; expected speed-up of a step 1.23x\n"),
        std::string::npos)
        << out_;
    const Json step = events("step").at(0);
    const double flops = 1e6 * step["elapsed_ms"].get<double>() / 1e3;  // of the device, while the step took place
    EXPECT_NEAR(step["mfu"].get<double>() * flops, 2.0 * 109936640.0, 1e-2);
    EXPECT_NEAR(step["mfu_dense_equivalent"].get<double>() * flops, 2.0 * 135626752.0, 1e-2);
    EXPECT_EQ(step["attention"], "lighthouse");
}

TEST_F(TrainLoop, SamplesAndNoStepsOfStageOneAreUnderDenseAttention) {
    config_.attention = AttentionMode::lighthouse, config_.lighthouse_steps = 3;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers = {};
    config_.seq_len = 256, config_.max_steps = 4, config_.sample_every = 1, config_.sample_tokens = 2;
    config_.eval_every = 2, config_.eval_batches = 1;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    const AttentionMode L = AttentionMode::lighthouse, D = AttentionMode::dense;
    EXPECT_EQ(model.attention_of_samples, std::vector<AttentionMode>(8, D)) << "two tokens behind each step";
    EXPECT_EQ(model.attention_of_steps, (std::vector<AttentionMode>{L, L, L, D}));
    EXPECT_EQ(model.attention_of_evaluations, (std::vector<AttentionMode>{L, D, D}))
        << "step 2 under both, and the end";
}

// A signal at the step of the switch: its evaluation is made up for by a process whose steps are all dense.
TEST_F(TrainLoop, WhatIsMadeUpForAtASwitchIsOfTheAttentionBefore) {
    config_.attention = AttentionMode::lighthouse, config_.lighthouse_steps = 3;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers = {};
    config_.seq_len = 256, config_.max_steps = 5, config_.eval_every = 3, config_.eval_batches = 1;
    FakeModel model(config_.model), after(config_.model);
    model.on_update = [](int n) { n == 3 ? std::raise(SIGINT) : 0; };
    EXPECT_EQ(run(model, config_), 0);
    stop_signal::received = 0;
    EXPECT_EQ(run(after, resumed(config_)), 0);
    const AttentionMode L = AttentionMode::lighthouse, D = AttentionMode::dense;
    EXPECT_EQ(after.attention_of_evaluations, (std::vector<AttentionMode>{L, D, D}))
        << "step 3 under both, and the end";
    EXPECT_EQ(after.attention_of_steps, (std::vector<AttentionMode>{D, D}));
}

TEST_F(TrainLoop, InfluenceIsLoggedWithTheValidationLoss) {
    config_.attention = AttentionMode::lighthouse, config_.seq_len = 256, config_.max_steps = 1;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers = {};
    config_.print_influence = true;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    const Json influence = events("validation").at(0).value("influence", Json::object());
    EXPECT_EQ(influence.value("tile_tokens", 0), 256) << influence;
    EXPECT_EQ(influence.value("next_token", Json::object()).value("loss", 0.0), 2.0) << "under Lighthouse attention";
}

// The step of the switch is where stage 1 ends, and often where its process does.
TEST_F(TrainLoop, ASwitchWhereARunGoesOnIsSaid) {
    config_.attention = AttentionMode::lighthouse, config_.seq_len = 256;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers = {};
    config_.max_steps = 3;
    RunConfig by_steps = config_, by_flag = config_;
    by_steps.lighthouse_steps = 3, by_flag.attention = AttentionMode::dense;
    const auto switches_after = [&](RunConfig first, RunConfig next) {
        std::filesystem::remove_all(config_.output_dir);
        FakeModel model(config_.model);
        EXPECT_EQ(run(model, first), 0);
        EXPECT_EQ(events("attention_switch").size(), 0u);
        next = resumed(next);
        next.max_steps = 5;
        FakeModel killed(config_.model), again(config_.model);
        killed.on_update = [](int) { fail("killed"); };  // and leaves what it wrote behind the checkpoint
        EXPECT_THROW(run(killed, next), Error);
        testing::internal::GetCapturedStdout(), testing::internal::GetCapturedStderr();
        EXPECT_EQ(run(again, next), 0);
        return events("attention_switch");
    };
    for (const RunConfig& next : {by_steps, by_flag}) {
        const std::vector<Json> switches = switches_after(config_, next);
        ASSERT_EQ(switches.size(), 1u);
        EXPECT_EQ(switches[0]["step"], 3);
        EXPECT_EQ(switches[0]["attention"], "dense");
        EXPECT_NE(out_.find("step 3 | attention is dense from here on"), std::string::npos) << out_;
    }
    const std::vector<Json> back = switches_after(by_flag, config_);
    ASSERT_EQ(back.size(), 1u);
    EXPECT_EQ(back[0]["attention"], "lighthouse");
    EXPECT_EQ(switches_after(config_, config_).size(), 0u);
    EXPECT_EQ(switches_after(by_flag, by_flag).size(), 0u);
}

TEST_F(TrainLoop, EvaluationCoversAsManyBatchesAsAsked) {
    config_.max_steps = 1;  // 1000 tokens, 62 sequences of 16, batches of 2
    for (const auto& [batches, sequences] :
         std::vector<std::pair<int64_t, int64_t>>{{0, 62}, {1, 2}, {30, 60}, {31, 62}, {32, 62}, {INT64_MAX, 62}}) {
        std::filesystem::remove_all(config_.output_dir);
        config_.eval_batches = batches;
        FakeModel model(config_.model);
        EXPECT_EQ(run(model, config_), 0);
        EXPECT_EQ(events("validation").at(0)["tokens"], 16 * sequences) << batches << " batches";
        EXPECT_EQ((int64_t)model.attention_of_evaluations.size(), sequences / 2);
    }
}

TEST_F(TrainLoop, CheckpointsAreKeptAsAsked) {
    config_.checkpoint_every = 1, config_.keep_checkpoints = 2;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    int folders = 0;
    for (const auto& entry : std::filesystem::directory_iterator(config_.output_dir)) {
        folders += entry.is_directory();
    }
    EXPECT_EQ(folders, 2);
    EXPECT_EQ(events("checkpoint").size(), 8u);
}

TEST_F(TrainLoop, SamplesAreLoggedAndReproducible) {
    config_.sample_every = 3, config_.sample_tokens = 5, config_.sample_prompt = "ab";
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    const std::vector<Json> samples = events("sample");
    ASSERT_EQ(samples.size(), 3u) << "steps 3 and 6 and the end";
    EXPECT_EQ(samples[0]["text"], "abxxxxx");
}

TEST_F(TrainLoop, SamplesAreRandomBySeedAndStep) {
    config_.sample_every = 4, config_.sample_tokens = 8;
    const auto samples = [&](uint64_t seed) {
        std::filesystem::remove_all(config_.output_dir);
        config_.seed = seed;
        FakeModel model(config_.model);
        model.on_logits = [](float* logits) { logits['x'] = 0.0f; };  // all tokens are as likely
        EXPECT_EQ(run(model, config_), 0);
        std::vector<std::string> texts;
        for (const Json& sample : events("sample")) {
            texts.push_back(sample["text"]);
        }
        return texts;
    };
    const std::vector<std::string> texts = samples(0);
    ASSERT_EQ(texts.size(), 2u) << "step 4 and the end";
    EXPECT_NE(texts[0], texts[1]);
    EXPECT_EQ(samples(0), texts);
    EXPECT_NE(samples(1)[0], texts[0]);
}

TEST_F(TrainLoop, ASampleEndsWithItsText) {
    config_.max_steps = 1, config_.sample_tokens = 5;
    FakeModel model(config_.model);
    model.on_logits = [&](float* logits) {
        if (model.contexts_of_samples.size() == 3) {
            logits[END_MARKER] = 100.0f;
        }
    };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_EQ(events("sample").at(0)["text"], "xx");
    EXPECT_EQ(model.contexts_of_samples.size(), 3u);
}

TEST_F(TrainLoop, ASampleEndsBeforeALogitThatIsNotFinite) {
    config_.max_steps = 1, config_.sample_tokens = 5;
    FakeModel model(config_.model);
    model.on_logits = [&](float* logits) {
        if (model.contexts_of_samples.size() == 3) {
            logits['z'] = NAN;
        }
    };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_EQ(events("sample").at(0)["text"], "xx");
    EXPECT_NE(out_.find("the sample ends early: a logit is not finite"), std::string::npos) << out_;
}

TEST_F(TrainLoop, SamplesUseTemperatureAndTopP) {
    config_.max_steps = 1, config_.sample_tokens = 400;
    const auto count = [&](char letter) {
        const std::string text = events("sample").at(0)["text"];
        return std::count(text.begin(), text.end(), letter);
    };
    // The likeliest alone reaches top_p, at any temperature.
    config_.temperature = 1.0, config_.top_p = 0.01;
    FakeModel first(config_.model), second(config_.model);
    first.logit_of_y = 49.99f;
    EXPECT_EQ(run(first, config_), 0);
    EXPECT_EQ(count('x'), 400);
    // At temperature 0.5 'y' is e^-1 times as likely as 'x', which is 0.269 of both, and all others are impossible:
    // 107.6 of 400 are expected, with a standard deviation of sqrt(400 x 0.269 x 0.731) = 8.9. Temperature 1 would give
    // 151, and top_p 0.5 none.
    std::filesystem::remove_all(config_.output_dir);
    config_.temperature = 0.5, config_.top_p = 1.0;
    second.logit_of_y = 49.5f;
    EXPECT_EQ(run(second, config_), 0);
    EXPECT_EQ(count('x') + count('y'), 400);
    EXPECT_NEAR(count('y'), 107.6, 4 * 8.9);
}

TEST_F(TrainLoop, SamplesGoOnFromAsMuchAsTheModelTakes) {
    config_.max_steps = 1, config_.sample_tokens = 4, config_.sample_prompt = "abc";
    FakeModel model(config_.model);
    model.longest_context = 5;
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_EQ(
        model.contexts_of_samples,
        (std::vector<std::vector<int32_t>>{
            {256, 'a', 'b', 'c'}, {256, 'a', 'b', 'c', 'x'}, {'a', 'b', 'c', 'x', 'x'}, {'b', 'c', 'x', 'x', 'x'}}))
        << "256 marks the beginning";
    EXPECT_EQ(events("sample").at(0)["text"], "abcxxxx");
}

TEST_F(TrainLoop, GradientAccumulationCoversTheSameSequences) {
    config_.global_batch = 6;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_EQ(model.attention_of_steps.size(), 24u) << "three micro-batches a step";
    EXPECT_EQ(events("step")[1]["data_position"], 6);
}

TEST_F(TrainLoop, ResumeBeyondTheLastStepChangesNothing) {
    FakeModel model(config_.model), after(config_.model);
    run(model, config_);
    EXPECT_EQ(run(after, resumed(config_)), 0);
    EXPECT_EQ(after.num_updates, 0);
    EXPECT_EQ(losses().size(), 8u);
}
