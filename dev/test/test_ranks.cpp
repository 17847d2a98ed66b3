// test_ranks.cpp: a whole run on several ranks without a GPU, each rank a process: the same sequences, losses,
// checkpoints and end whatever the mesh, checkpoints that go on on any other number of ranks, and failures that lose
// nothing.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <functional>
#include <set>
#include <thread>

#include "llmc/comm_launch.h"
#include "llmc/train_loop.h"
#include "llmc/zero_layout.h"

namespace {

// A model without layers whose state is sharded as the GPU's is. A step's loss depends on all of its tokens and on a
// weight, and moves every element of the state by an amount of its own. Loss terms are multiples of 2^-20 below 1, so
// their sums do not depend on the order.
class ShardedModel : public TrainableModel {
  public:
    ShardedModel(const ModelConfig& config, const RunRanks& ranks)
        : config_(config), table_(make_parameter_table(config)), ranks_(ranks) {
        std::vector<ZeroTensor> tensors;
        for (const ParameterTensor& tensor : table_.tensors) {
            tensors.push_back({tensor.num_elements(), tensor.decay, -1});
        }
        layout_ = make_zero_layout(tensors, ranks.size(), 1000);
        weights_.resize(layout_.num_elements);
        for (std::vector<float>& shard : shards_) {
            shard.assign(layout_.shard_elements(), -7.0f);  // until it is set
        }
    }
    const ModelConfig& config() const override { return config_; }
    const ParameterTable& parameters() const override { return table_; }
    void set_attention(AttentionMode) override {}

    void begin_step(int64_t num_micro_batches) override { loss_ = 0.0, micro_batches_ = num_micro_batches; }
    void accumulate_gradients(const int32_t* tokens, int B, int64_t T, double loss_weight) override {
        loss_ += loss_weight * mean_loss(tokens, B, T) / ranks_.size();
        --micro_batches_;
    }
    StepResult update(const AdamWSettings&) override {
        CHECK(micro_batches_ == 0, "%lld micro-batches are missing", (long long)micro_batches_);
        ranks_.world().all_reduce_sum(&loss_, 1, "loss");
        for_each_piece([&](int tensor, const ZeroPiece& piece) {
            for (int64_t i = 0; i < piece.num_elements; ++i) {
                for (int kind = 0; kind < 3; ++kind) {
                    float& x = shards_[kind][piece.shard_begin + i];
                    x = (float)(0.5 * x + loss_ * (kind + 1) * (double)((piece.tensor_begin + i) % 13 + tensor));
                }
            }
        });
        gather(weights_, StateKind::master);
        std::transform(weights_.begin(), weights_.end(), weights_.begin(), rounded);
        gathered_.reset();
        StepResult result;
        result.loss = loss_, result.grad_norm = 1.0;
        if (on_update) {
            on_update();
        }
        return result;
    }
    double evaluate(const int32_t* tokens, int B, int64_t T) override {
        if (on_evaluate) {
            on_evaluate();
        }
        // All ranks of a sequence take part.
        double mean = mean_loss(tokens, B, T) / ranks_.mesh().context_parallel;
        HostGroup(ranks_.world().comm(), ranks_.mesh().context_group()).all_reduce_sum(&mean, 1, "evaluation");
        return mean;
    }
    void token_losses(float*, const int32_t*, const int32_t*, int, int64_t) override {}
    void next_token_logits(const int32_t*, int64_t, float* logits) override {
        std::fill_n(logits, config_.vocab_size, 0.0f);
    }
    int64_t max_sequence_length() const override { return 512; }

    void gather_state(StateKind kind) override {
        gather(whole_, kind);
        gathered_ = kind;
    }
    void read_state(StateKind kind, int tensor, float* out) override {
        CHECK(gathered_ == kind, "read before it was gathered");
        std::copy_n(whole_.data() + layout_.offsets[tensor], layout_.sizes[tensor], out);
    }
    void write_state(StateKind kind, int tensor, const float* in) override {
        for (const StatePiece& piece : state_pieces(tensor)) {
            write_state_piece(kind, tensor, piece, in + piece.begin);
        }
        if (kind == StateKind::master) {
            std::transform(in, in + layout_.sizes[tensor], weights_.data() + layout_.offsets[tensor], rounded);
        }
    }
    std::vector<StatePiece> state_pieces(int tensor) const override {
        std::vector<StatePiece> pieces;
        for (const ZeroPiece& piece : layout_.pieces(tensor, ranks_.world().rank())) {
            pieces.push_back({piece.tensor_begin, piece.num_elements});
        }
        return pieces;
    }
    void read_state_piece(StateKind kind, int tensor, const StatePiece& piece, float* out) override {
        if (on_read) {
            on_read();
        }
        std::copy_n(place(kind, tensor, piece), piece.num_elements, out);
    }
    void write_state_piece(StateKind kind, int tensor, const StatePiece& piece, const float* in) override {
        std::copy_n(in, piece.num_elements, place(kind, tensor, piece));
        if (kind == StateKind::master) {
            std::transform(in, in + piece.num_elements, weights_.data() + layout_.offsets[tensor] + piece.begin,
                           rounded);
        }
    }
    void read_gradient(int, float*) override {}
    double peak_memory_gib() const override { return 0.0; }

    std::function<void()> on_update, on_evaluate, on_read;

  private:
    // The weights of the forward pass are bfloat16.
    static float rounded(float master) { return bf16_to_float(float_to_bf16(master)); }
    double mean_loss(const int32_t* tokens, int B, int64_t T) const {
        double sum = 0.0;
        for (int b = 0; b < B; ++b) {
            uint64_t hash = 1;
            for (int64_t t = 0; t <= T; ++t) {
                hash = hash * 6364136223846793005ull + (uint64_t)tokens[b * (T + 1) + t] + 1;
            }
            sum += (double)(hash >> 44) * 0x1p-20;
        }
        // Rounded, so that sums stay exact.
        return sum / B + std::round(std::fmod(std::fabs((double)weights_[0]), 1.0) * 0x1p20) * 0x1p-20;
    }
    template <class Visit>
    void for_each_piece(Visit visit) {
        for (int tensor = 0; tensor < (int)layout_.offsets.size(); ++tensor) {
            for (const ZeroPiece& piece : layout_.pieces(tensor, ranks_.world().rank())) {
                visit(tensor, piece);
            }
        }
    }
    float* place(StateKind kind, int tensor, const StatePiece& of) {
        for (const ZeroPiece& piece : layout_.pieces(tensor, ranks_.world().rank())) {
            if (piece.tensor_begin == of.begin && piece.num_elements == of.num_elements) {
                return shards_[(int)kind].data() + piece.shard_begin;
            }
        }
        fail("no such piece");
    }
    void gather(std::vector<float>& whole, StateKind kind) const {
        whole.resize(layout_.num_elements);
        for (const ZeroBucket& bucket : layout_.buckets) {
            ranks_.world().all_gather(whole.data() + bucket.begin, shards_[(int)kind].data() + bucket.shard_begin,
                                      layout_.slice_elements(bucket) * sizeof(float), "state");
        }
    }

    ModelConfig config_;
    ParameterTable table_;
    const RunRanks& ranks_;
    ZeroLayout layout_;
    std::vector<float> weights_, whole_;
    std::vector<float> shards_[3];
    std::optional<StateKind> gathered_;
    int64_t micro_batches_ = 0;
    double loss_ = 0.0;
};

struct Mesh {
    int ranks, context_parallel, batch_size;
};
using Prepare = std::function<void(ShardedModel&, int rank)>;

class Ranks : public testing::Test {
  protected:
    void SetUp() override {
        ASSERT_NE(mkdtemp(folder_.data()), nullptr);
        std::ofstream data(folder_ + "/data.txt", std::ios::binary);
        for (int i = 0; i < 20000; ++i) {
            data << (char)(32 + i * 7919 % 90);
        }
    }
    void TearDown() override { EXPECT_EQ(std::system(("rm -rf '" + folder_ + "'").c_str()), 0); }

    // One run of all ranks, each a process; their statuses: 0, 1 for an Error, -SIGNAL.
    std::vector<int> run(const std::string& name, const Mesh& mesh, int max_steps, std::vector<std::string> more = {},
                         const Prepare& prepare = nullptr) {
        static int number = 0;
        const std::string rendezvous = folder_ + "/meet" + std::to_string(number++);
        const auto body = [&](int rank) {
            std::vector<std::string> words = {"train",
                                              "--train_data",
                                              folder_ + "/data.txt",
                                              "--output_dir",
                                              folder_ + "/" + name,
                                              "--max_steps",
                                              std::to_string(max_steps),
                                              "--batch_size",
                                              std::to_string(mesh.batch_size),
                                              "--seq_len",
                                              "16",
                                              "--context_parallel",
                                              std::to_string(mesh.context_parallel),
                                              "--global_batch",
                                              "8",
                                              "--num_layers",
                                              "2",
                                              "--width",
                                              "24",
                                              "--ffn_width",
                                              "40",
                                              "--num_heads",
                                              "3",
                                              "--num_kv_heads",
                                              "1",
                                              "--head_dim",
                                              "8",
                                              "--eval_every",
                                              "2",
                                              "--eval_batches",
                                              "0",
                                              "--sample_tokens",
                                              "0",
                                              "--schedule",
                                              "constant",
                                              "--save_dtype",
                                              "fp32"};
            words.insert(words.end(), more.begin(), more.end());
            if (vary_) {
                vary_(words, rank);
            }
            std::vector<const char*> argv;
            for (const std::string& word : words) {
                argv.push_back(word.c_str());
            }
            const std::optional<ParsedFlags> parsed = read_command_line((int)argv.size(), argv.data());
            std::unique_ptr<HostComm> comm;
            if (mesh.ranks > 1) {
                comm = std::make_unique<TcpComm>(rank, mesh.ranks, rendezvous, 10.0);
            } else {
                comm = std::make_unique<SingleComm>();
            }
            const RunRanks ranks(*comm, mesh.context_parallel);
            const RunConfig config = resolve_run(*parsed, ranks);
            ShardedModel model(config.model, ranks);
            if (prepare) {
                prepare(model, rank);
            }
            return run_training(model, config, device_, ranks);
        };
        std::vector<pid_t> processes;
        for (int rank = 0; rank < mesh.ranks; ++rank) {
            const pid_t process = fork();
            if (process == 0) {
                const std::string out = folder_ + "/out" + std::to_string(rank);
                if (std::freopen(out.c_str(), "w", stdout) == nullptr) {
                    _exit(3);
                }
                int status = 1;
                try {
                    status = body(rank);
                } catch (const std::exception& error) {
                    std::printf("%s\n", error.what());
                }
                std::fflush(stdout);
                _exit(status);
            }
            processes.push_back(process);
        }
        std::vector<int> statuses;
        for (const pid_t process : processes) {
            int status;
            waitpid(process, &status, 0);
            statuses.push_back(WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status));
        }
        return statuses;
    }
    void expect_run(const std::string& name, const Mesh& mesh, int max_steps, std::vector<std::string> more = {}) {
        const std::vector<int> statuses = run(name, mesh, max_steps, std::move(more));
        EXPECT_EQ(statuses, std::vector<int>(mesh.ranks, 0)) << name << ": " << said(0);
    }
    // What a rank of the last run has printed.
    std::string said(int rank) const { return read_text_file(folder_ + "/out" + std::to_string(rank)); }

    // Every loss of a run's steps and evaluations, as text.
    std::vector<std::string> losses(const std::string& name) const {
        std::vector<std::string> found;
        std::ifstream file(folder_ + "/" + name + "/metrics.jsonl");
        for (std::string line; std::getline(file, line);) {
            const Json object = Json::parse(line);
            if (object["event"] == "step" || object["event"] == "validation") {
                found.push_back(object["event"].get<std::string>() + " " + object["step"].dump() + " " +
                                object["loss"].dump());
            }
        }
        return found;
    }
    // The line of a run's first step in metrics.jsonl.
    Json first_step(const std::string& name) const {
        std::ifstream file(folder_ + "/" + name + "/metrics.jsonl");
        for (std::string line; std::getline(file, line);) {
            const Json object = Json::parse(line);
            if (object["event"] == "step") {
                return object;
            }
        }
        fail("no step");
    }
    // All state of a checkpoint, read by one rank.
    std::vector<float> state(const std::string& name, int step) const {
        const std::string folder = folder_ + "/" + name + "/" + checkpoint::folder_name(step);
        const RunRanks alone;
        ShardedModel model(load_hf_config(folder), alone);
        load_checkpoint(model, folder);
        std::vector<float> all;
        for (const StateKind kind : {StateKind::master, StateKind::exp_avg, StateKind::exp_avg_sq}) {
            model.gather_state(kind);
            for (int i = 0; i < (int)model.parameters().tensors.size(); ++i) {
                std::vector<float> values(model.parameters().tensors[i].num_elements());
                model.read_state(kind, i, values.data());
                all.insert(all.end(), values.begin(), values.end());
            }
        }
        return all;
    }
    bool has_step(const std::string& name, int step) const {
        return checkpoint::exists(folder_ + "/" + name + "/" + checkpoint::folder_name(step));
    }

    std::function<void(std::vector<std::string>& words, int rank)> vary_;  // the command line of some ranks
    DeviceInfo device_;                                                    // of each rank
    std::string folder_ = testing::TempDir() + "llmc_ranks_XXXXXX";
};

constexpr Mesh ONE = {1, 1, 2};
constexpr Mesh MESHES[] = {{2, 1, 2}, {2, 2, 4}, {3, 3, 8}, {4, 1, 1}, {4, 2, 2}, {4, 4, 8}};

TEST_F(Ranks, EveryMeshGivesTheSameRun) {
    expect_run("one", ONE, 5);
    const std::vector<std::string> expected = losses("one");
    ASSERT_EQ(expected.size(), 8u);  // five steps, evaluations after two, four and at the end
    for (const Mesh& mesh : MESHES) {
        const bool divides = 16 % (2 * mesh.context_parallel) == 0;
        const std::string name = format_string("r%d_c%d", mesh.ranks, mesh.context_parallel);
        if (!divides) {
            EXPECT_EQ(run(name, mesh, 5), std::vector<int>(mesh.ranks, 1));
            EXPECT_NE(said(mesh.ranks - 1).find("multiple of 6"), std::string::npos) << said(mesh.ranks - 1);
            continue;
        }
        expect_run(name, mesh, 5);
        EXPECT_EQ(losses(name), expected) << name;
        EXPECT_EQ(state(name, 5), state("one", 5)) << name;
    }
}

TEST_F(Ranks, CheckpointsGoOnOnAnyMesh) {
    for (const char* const dtype : {"fp32", "bf16"}) {
        const std::vector<std::string> save = {"--save_dtype", dtype};
        const std::string one = std::string("one_") + dtype;
        expect_run(one, ONE, 6, save);
        const Mesh order[] = {{4, 2, 2}, {2, 1, 4}, {1, 1, 8}, {4, 4, 1}, {2, 2, 1}, {1, 1, 1}};
        const std::string name = std::string("moving_") + dtype;
        for (int step = 1; step <= 6; ++step) {
            std::vector<std::string> flags = save;
            if (step > 1) {
                flags.push_back("--resume");
            }
            expect_run(name, order[step - 1], step, flags);
        }
        EXPECT_EQ(state(name, 6), state(one, 6)) << dtype;
    }
}

TEST_F(Ranks, RanksWithOtherSettingsAreRefused) {
    vary_ = [](std::vector<std::string>& words, int rank) {
        if (rank == 1) {
            words.insert(words.end(), {"--weight_decay", "0.5"});
        }
    };
    EXPECT_EQ(run("different", {3, 1, 2}, 3, {"--global_batch", "6"}), std::vector<int>(3, 1));
    EXPECT_NE(said(2).find("the ranks differ in settings"), std::string::npos) << said(2);
    vary_ = nullptr;
    expect_run("different", {2, 1, 2}, 3);
    // A run is in the way now: all ranks say so, and none waits.
    EXPECT_EQ(run("different", {2, 1, 2}, 3), (std::vector<int>{1, 1}));
    EXPECT_NE(said(1).find("already holds a run"), std::string::npos) << said(1);
    // Another process, on its way to the next step: nobody waits either.
    {
        const OutputLock other(folder_ + "/different");
        EXPECT_EQ(run("different", {2, 1, 2}, 4, {"--resume"}), (std::vector<int>{1, 1}));
        EXPECT_NE(said(1).find("another process is training into this folder"), std::string::npos) << said(1);
    }
    expect_run("different", {2, 1, 2}, 4, {"--resume"});
    EXPECT_EQ(run("uneven", {4, 3, 2}, 3), std::vector<int>(4, 1));
    EXPECT_NE(said(0).find("what does: 1, 2, 4"), std::string::npos) << said(0);
    EXPECT_EQ(run("batch", {4, 1, 4}, 3), std::vector<int>(4, 1));
    EXPECT_NE(said(3).find("times the 4 groups of ranks; the nearest is 16"), std::string::npos) << said(3);
}

// The same names, on machines whose disks do not hold the same.
TEST_F(Ranks, RanksWithOtherDataAreRefused) {
    std::filesystem::create_directory(folder_ + "/rank1");
    std::ofstream(folder_ + "/rank1/data.txt") << std::string(19999, 'x');
    vary_ = [&](std::vector<std::string>& words, int rank) {
        *(std::find(words.begin(), words.end(), "--train_data") + 1) = "data.txt";
        ASSERT_EQ(chdir((folder_ + (rank == 1 ? "/rank1" : "")).c_str()), 0);
    };
    const auto expect_refusal = [&](const char* what, const Mesh& mesh, const std::vector<std::string>& more = {}) {
        EXPECT_EQ(run("other_data", mesh, 3, more), std::vector<int>(mesh.ranks, 1));
        for (int rank = 0; rank < mesh.ranks; ++rank) {
            EXPECT_NE(said(rank).find(what), std::string::npos) << said(rank);
            EXPECT_EQ(said(rank).find("step 1/3"), std::string::npos) << said(rank);
        }
        std::filesystem::remove_all(folder_ + "/other_data");
    };
    expect_refusal("the ranks differ in settings or data", {2, 1, 2});
    // As long in all, in other files.
    const auto write = [&](const char* name, size_t size, char fill) {
        std::ofstream(folder_ + "/rank1/" + name) << std::string(size, fill);
    };
    std::ofstream(folder_ + "/more.txt") << std::string(9000, 'x');
    write("data.txt", 19000, 'x');
    write("more.txt", 10000, 'x');
    expect_refusal("the ranks differ in settings or data", {2, 1, 2}, {"--train_data", "more.txt"});
    // What only reading tells.
    write("data.txt", 20000, 'x');
    const char* const differ = "compute on the same sequences and have read different tokens";
    expect_refusal(differ, {2, 2, 2});
    EXPECT_EQ(said(1).rfind("--train_data: ranks 0 (", 0), 0u) << said(1);
    expect_refusal(differ, {4, 2, 2});
    write("more.txt", 9000, 'y');
    std::filesystem::copy_file(folder_ + "/data.txt", folder_ + "/rank1/data.txt",
                               std::filesystem::copy_options::overwrite_existing);
    EXPECT_EQ(run("other_validation", {2, 2, 2}, 3, {"--val_data", "more.txt"}), (std::vector<int>{1, 1}));
    EXPECT_EQ(said(1).rfind("--val_data: ranks 0 (", 0), 0u) << said(1);
}

// Machines whose folders have the same name, and no more in common.
TEST_F(Ranks, AnOutputFolderThatIsNotSharedIsRefusedAtTheStart) {
    std::filesystem::create_directory(folder_ + "/machine1");
    std::filesystem::copy(folder_ + "/data.txt", folder_ + "/machine1/data.txt");
    const auto take_own = [](std::vector<std::string>& words, const std::string& folder) {
        *(std::find(words.begin(), words.end(), "--train_data") + 1) = "data.txt";
        *(std::find(words.begin(), words.end(), "--output_dir") + 1) = "out";
        ASSERT_EQ(chdir(folder.c_str()), 0);
    };
    const auto expect_refusal = [&](const std::string& what) {
        EXPECT_EQ(run("out", {4, 2, 2}, 4), std::vector<int>(4, 1));
        EXPECT_NE(said(0).find(what), std::string::npos) << said(0);
        EXPECT_EQ(said(0).find("step 1/4"), std::string::npos) << said(0);
        EXPECT_EQ(checkpoint::names_in(folder_ + "/out"), std::vector<std::string>{".lock"});
    };
    vary_ = [&](std::vector<std::string>& words, int rank) {
        take_own(words, rank >= 2 ? folder_ + "/machine1" : folder_);
    };
    expect_refusal("rank 2 (" + host_name() + ") does not see what rank 0 (" + host_name() +
                   ") wrote into --output_dir out: it must be a folder that all machines share");
    EXPECT_NE(said(3).find("rank 2 ("), std::string::npos) << said(3);
    EXPECT_FALSE(checkpoint::exists(folder_ + "/machine1/out"));
    std::filesystem::create_directory(folder_ + "/machine1/out");
    expect_refusal("rank 2 (" + host_name() + ") does not see");
    EXPECT_TRUE(checkpoint::names_in(folder_ + "/machine1/out").empty());
    vary_ = [&](std::vector<std::string>& words, int rank) {
        take_own(words, folder_);
        const rlimit none = {0, 0};  // bytes of a file
        ASSERT_TRUE(rank != 3 || (std::signal(SIGXFSZ, SIG_IGN) != SIG_ERR && setrlimit(RLIMIT_FSIZE, &none) == 0));
    };
    expect_refusal("rank 3 (" + host_name() + ") cannot write into --output_dir out");
    // One that a network file system shows late.
    std::filesystem::remove(folder_ + "/machine1/out");
    vary_ = [&](std::vector<std::string>& words, int rank) {
        take_own(words, rank >= 2 ? folder_ + "/machine1" : folder_);
        if (rank == 2) {
            std::thread([] {
                std::this_thread::sleep_for(std::chrono::milliseconds(500));
                std::filesystem::create_directory_symlink("../out", "out");
            }).detach();
        }
    };
    expect_run("out", {4, 2, 2}, 2);
    EXPECT_TRUE(has_step("out", 2));
    for (const std::string& name : checkpoint::names_in(folder_ + "/out")) {
        EXPECT_NE(name.rfind(".shared", 0), 0u) << name;
    }
}

TEST_F(Ranks, SpeedIsOfAllRanksAndUtilisationOfAllDevices) {
    device_.peak_tflops = 1e-6;  // a million a second
    const auto flops_of_step = [&](const std::string& name, const Mesh& mesh) {
        expect_run(name, mesh, 1);
        const Json step = first_step(name);
        const double seconds = step["elapsed_ms"].get<double>() / 1e3;
        EXPECT_NEAR(step["tokens_per_second"].get<double>() * seconds, 128.0, 1e-9) << "8 sequences of 16; " << name;
        return step["mfu"].get<double>() * seconds * mesh.ranks * 1e6;
    };
    const double expected = flops_of_step("one", ONE);
    EXPECT_NEAR(flops_of_step("two", {2, 1, 2}), expected, 1e-6 * expected);
    EXPECT_NEAR(flops_of_step("two_that_share", {2, 2, 2}), expected, 1e-6 * expected);
}

// What it evaluates meanwhile does not count.
TEST_F(Ranks, AGroupWithoutAValidationBatchIsAsBusyAsTheOthers) {
    const std::vector<std::string> one_batch = {"--eval_batches", "1"};
    expect_run("one", ONE, 2, one_batch);
    const Prepare count = [](ShardedModel& model, int) {
        model.on_evaluate = [n = 0]() mutable { std::printf("evaluates %d times\n", ++n); };
    };
    EXPECT_EQ(run("four", {4, 2, 2}, 2, one_batch, count), std::vector<int>(4, 0)) << said(0);
    for (int rank = 0; rank < 4; ++rank) {
        EXPECT_NE(said(rank).find("evaluates 1 times"), std::string::npos) << said(rank);
    }
    EXPECT_EQ(losses("four"), losses("one"));
}

TEST_F(Ranks, WithoutAnOutputFolderAllTakeTheSameNewOne) {
    vary_ = [&](std::vector<std::string>& words, int) {
        const auto output_dir = std::find(words.begin(), words.end(), "--output_dir");
        words.erase(output_dir, output_dir + 2);
        ASSERT_EQ(chdir(folder_.c_str()), 0);
    };
    for (int n = 1; n <= 2; ++n) {
        expect_run("new", {4, 2, 2}, 2);
        std::set<std::string> names;
        for (const std::string& name : checkpoint::names_in(folder_ + "/runs")) {
            names.insert(name);
            EXPECT_TRUE(has_step("runs/" + name, 2)) << name;
        }
        EXPECT_EQ((int)names.size(), n);
    }
}

TEST_F(Ranks, AFailedSaveFailsEverywhereAndLosesNothing) {
    for (const int failing : {0, 2}) {
        const std::string name = "full" + std::to_string(failing);
        expect_run(name, {4, 2, 2}, 2);
        const std::vector<float> before = state(name, 2);
        const std::vector<int> statuses = run(name, {4, 2, 2}, 4, {"--resume"}, [&](ShardedModel& model, int rank) {
            if (rank == failing) {
                model.on_read = [] { fail("no space left on device"); };
            }
        });
        EXPECT_EQ(statuses, std::vector<int>(4, 1));
        EXPECT_NE(said(3).find("no space left on device"), std::string::npos) << said(3);
        EXPECT_FALSE(has_step(name, 4));
        EXPECT_FALSE(checkpoint::exists(folder_ + "/" + name + "/.partial-step00000004"));
        EXPECT_EQ(state(name, 2), before);
        expect_run(name, {2, 2, 2}, 4, {"--resume"});
        EXPECT_TRUE(has_step(name, 4));
    }
}

// All ranks ask whether the folder is gone, whichever of them has failed, and all write once more.
TEST_F(Ranks, AFolderThatIsMovedDuringASaveCostsNoStep) {
    for (const int mover : {0, 2}) {
        const std::string name = "moved" + std::to_string(mover), folder = folder_ + "/" + name;
        const std::vector<int> statuses =
            run(name, {4, 2, 2}, 4, {"--checkpoint_every", "2"}, [&](ShardedModel& model, int rank) {
                if (rank == mover) {
                    model.on_read = [folder, has_moved = false]() mutable {
                        if (!has_moved) {
                            std::filesystem::rename(folder, folder + "_away");
                        }
                        has_moved = true;
                    };
                }
            });
        EXPECT_EQ(statuses, std::vector<int>(4, 0)) << said(0);
        EXPECT_TRUE(has_step(name, 2) && has_step(name, 4));
        expect_run(name, {2, 1, 2}, 5, {"--resume"});
    }
}

TEST_F(Ranks, WhatWasDueAfterTheLastStepIsMadeUpForByAll) {
    expect_run("ended", {4, 2, 2}, 4);
    const std::vector<std::string> whole = losses("ended");
    const std::string path = folder_ + "/ended/metrics.jsonl", text = read_text_file(path);
    ASSERT_EQ(whole.back().rfind("validation 4 ", 0), 0u) << whole.back();
    std::filesystem::resize_file(path, text.rfind("{", text.rfind("\"validation\"")));
    EXPECT_NE(losses("ended"), whole);
    expect_run("ended", {4, 2, 2}, 4, {"--resume"});
    EXPECT_EQ(losses("ended"), whole);
    expect_run("ended", {4, 2, 2}, 4, {"--resume"});
    EXPECT_NE(said(0).find("nothing is left to train"), std::string::npos) << said(0);
    EXPECT_EQ(losses("ended"), whole);
}

TEST_F(Ranks, AKilledRankEndsAllAndLosesNothing) {
    expect_run("whole", ONE, 5);
    for (const int killed : {0, 3}) {
        for (const bool while_saving : {false, true}) {
            const std::string name = format_string("killed%d_%d", killed, while_saving);
            const Prepare prepare = [&](ShardedModel& model, int rank) {
                if (rank == killed) {
                    // In the third step; or in the middle of the third checkpoint.
                    int reads = 0;  // of a checkpoint: two running means
                    for (int i = 0; i < (int)model.parameters().tensors.size(); ++i) {
                        reads += 2 * (int)model.state_pieces(i).size();
                    }
                    (while_saving ? model.on_read : model.on_update) =
                        [count = 0, last = while_saving ? 2 * reads + reads / 2 : 3]() mutable {
                            if (++count == last) {
                                raise(SIGKILL);
                            }
                        };
                }
            };
            const auto start = std::chrono::steady_clock::now();
            std::vector<int> statuses = run(name, {4, 2, 2}, 100000, {"--checkpoint_every", "1"}, prepare);
            EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 15.0);
            for (int rank = 0; rank < 4; ++rank) {
                EXPECT_EQ(statuses[rank], rank == killed ? -SIGKILL : 1) << said(rank);
            }
            EXPECT_NE(said(1).find("rank 1 ("), std::string::npos) << said(1);
            EXPECT_TRUE(has_step(name, 1));
            expect_run(name, {2, 1, 2}, 5, {"--resume"});
            EXPECT_EQ(losses(name).back(), losses("whole").back());
            EXPECT_EQ(state(name, 5), state("whole", 5));
        }
    }
}

TEST_F(Ranks, ASignalToOneRankStopsAll) {
    const std::vector<int> statuses = run("stopped", {4, 2, 2}, 100000, {}, [](ShardedModel& model, int rank) {
        if (rank == 2) {
            model.on_update = [count = 0]() mutable {
                if (++count == 3) {
                    raise(SIGTERM);
                }
            };
        }
    });
    EXPECT_EQ(statuses, std::vector<int>(4, 0));
    EXPECT_NE(said(0).find("stopped by SIGTERM after step 3"), std::string::npos) << said(0);
    EXPECT_TRUE(said(1).empty()) << said(1);
    EXPECT_TRUE(has_step("stopped", 3));
}

}  // namespace
