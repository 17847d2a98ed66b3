// checkpoint_testing.h: what the tests of checkpoints share: a model that only holds its state, a small one's shape,
// files as strings, a disk that is full, and the fixture with a folder of its own.
#pragma once
#include <gtest/gtest.h>

#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "llmc/checkpoint.h"

namespace fs = std::filesystem;

// A model that only holds its state: random numbers, or NaN until they are set.
class StateModel : public TrainableModel {
  public:
    StateModel(const ModelConfig& config, int seed) : config_(config), table_(make_parameter_table(config)) {
        std::mt19937 generator(seed);
        std::normal_distribution<float> normal;
        for (auto& kind : state) {
            for (const ParameterTensor& tensor : table_.tensors) {
                kind.emplace_back(tensor.num_elements());
                for (float& value : kind.back()) {
                    value = seed > 0 ? normal(generator) : NAN;
                }
            }
        }
    }
    const ModelConfig& config() const override { return config_; }
    const ParameterTable& parameters() const override { return table_; }
    void set_attention(AttentionMode) override {}
    void begin_step(int64_t) override {}
    void accumulate_gradients(const int32_t*, int, int64_t, double) override {}
    StepResult update(const AdamWSettings&) override { return {}; }
    double evaluate(const int32_t*, int, int64_t) override { return 0.0; }
    void token_losses(float*, const int32_t*, const int32_t*, int, int64_t) override {}
    void next_token_logits(const int32_t*, int64_t, float*) override {}
    int64_t max_sequence_length() const override { return 1; }
    void read_state(StateKind kind, int tensor, float* out) override {
        const std::vector<float>& from = state[(int)kind][tensor];
        std::copy(from.begin(), from.end(), out);
    }
    void write_state(StateKind kind, int tensor, const float* in) override {
        std::copy_n(in, state[(int)kind][tensor].size(), state[(int)kind][tensor].begin());
    }
    void read_gradient(int, float*) override {}
    double peak_memory_gib() const override { return 0.0; }

    bool untouched() const {
        for (const auto& kind : state) {
            for (const auto& tensor : kind) {
                if (!std::all_of(tensor.begin(), tensor.end(), [](float x) { return std::isnan(x); })) {
                    return false;
                }
            }
        }
        return true;
    }

    std::vector<std::vector<float>> state[3];

  private:
    ModelConfig config_;
    ParameterTable table_;
};

inline ModelConfig small_model(bool tied) {
    ModelConfig m;
    m.vocab_size = 11, m.num_layers = 2, m.width = 8, m.num_heads = 2, m.num_kv_heads = 1, m.head_dim = 8;
    m.ffn_width = 16, m.tied_embeddings = tied;
    return m;
}

inline std::string read_bytes(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    EXPECT_TRUE(file.good()) << path;
    return std::string(std::istreambuf_iterator<char>(file), {});
}
// Over what is there, rather than into an empty file: some file systems wait for the disk then.
inline void write_bytes(const std::string& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary | std::ios::app).close();
    std::ofstream(path, std::ios::binary | std::ios::in) << bytes;
    fs::resize_file(path, bytes.size());
}
// The contents of all files below a folder, by path.
inline std::map<std::string, std::string> contents(const std::string& folder) {
    std::map<std::string, std::string> files;
    for (const auto& entry : fs::recursive_directory_iterator(folder)) {
        if (entry.is_regular_file()) {
            files[entry.path().string()] = read_bytes(entry.path().string());
        }
    }
    return files;
}
inline std::vector<std::string> names(const std::string& folder) {
    std::vector<std::string> found = checkpoint::names_in(folder);
    std::sort(found.begin(), found.end());
    return found;
}

template <class Function>
std::string message_of(Function function) {
    try {
        function();
    } catch (const Error& error) {
        EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
        return error.what();
    }
    return "(no error)";
}
#define EXPECT_MESSAGE(statement, words)                              \
    do {                                                              \
        const std::string message = message_of([&] { statement; });   \
        EXPECT_NE(message.find(words), std::string::npos) << message; \
    } while (0)

// While it lives no file can grow beyond `num_bytes`: a full disk, or with `kill` the end of the process.
class FileSizeLimit {
  public:
    explicit FileSizeLimit(uint64_t num_bytes) {
        getrlimit(RLIMIT_FSIZE, &before_);
        handler_ = std::signal(SIGXFSZ, SIG_IGN);
        rlimit limit = before_;
        limit.rlim_cur = num_bytes;
        setrlimit(RLIMIT_FSIZE, &limit);
    }
    ~FileSizeLimit() {
        setrlimit(RLIMIT_FSIZE, &before_);
        std::signal(SIGXFSZ, handler_);
    }

  private:
    rlimit before_;
    void (*handler_)(int);
};

class Checkpoint : public testing::Test {
  protected:
    void SetUp() override {
        ASSERT_NE(mkdtemp(folder_.data()), nullptr);
        run_ = make_folder("run");
        config_.keep_checkpoints = 0;
        state_.step = 400, state_.adam_step = 397, state_.data_position = ((int64_t)1 << 40) + 3, state_.skipped = 3;
        state_.skipped_in_a_row = 1, state_.data = "1 file of bytes";
    }
    void TearDown() override { EXPECT_EQ(std::system(("rm -rf '" + folder_ + "'").c_str()), 0); }

    std::string make_folder(const std::string& name) const {
        fs::create_directory(folder_ + "/" + name);
        return folder_ + "/" + name;
    }
    std::string save(StateModel& model, int64_t step, bool bf16 = false) {
        TrainingState state = state_;
        state.step = step, state.adam_step = state.skipped = state.skipped_in_a_row = 0;
        return save_checkpoint(model, state, config_, bf16, run_, 6000);
    }

    std::string folder_ = testing::TempDir() + "llmc_checkpoint_XXXXXX", run_;
    RunConfig config_;
    TrainingState state_;
};
