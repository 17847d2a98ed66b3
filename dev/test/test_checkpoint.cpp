// test_checkpoint.cpp: checkpoints come back bit for bit, survive whatever cuts a save short, and are not believed when
// damaged; folders of others load, whatever their types and files.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <random>
#include <set>

#include "llmc/checkpoint.h"
#include "llmc/output_lock.h"

namespace {

namespace fs = std::filesystem;

// What was asked of the disk, in order, by the last names of paths: whether bytes survive a power cut shows nowhere
// else.
std::vector<std::string> disk_log;
std::set<std::string> disk_fails_at;  // the calls that fail

bool disk_takes(const std::string& call) {
    disk_log.push_back(call);
    const bool fails = disk_fails_at.count(call) > 0;
    if (fails) {
        errno = EIO;
    }
    return !fails;
}
std::string last_name(const std::string& path) { return fs::path(path).filename().string(); }

}  // namespace

// In the place of the C library's.
extern "C" int fsync(int file) {
    const std::string path = fs::read_symlink("/proc/self/fd/" + std::to_string(file)).string();
    return disk_takes("fsync " + last_name(path)) ? (int)syscall(SYS_fsync, file) : -1;
}
extern "C" int sync_file_range(int file, off64_t begin, off64_t length, unsigned flags) {
    const bool waits = (flags & SYNC_FILE_RANGE_WAIT_AFTER) != 0;
    const std::string call = format_string("%s %lld", waits ? "wait for" : "send", (long long)begin);
    if (disk_fails_at.count("sync_file_range") > 0) {
        errno = EPERM;
        return -1;
    }
    return disk_takes(call) ? (int)syscall(SYS_sync_file_range, file, begin, length, flags) : -1;
}
extern "C" int rename(const char* from, const char* to) noexcept {
    const bool taken = disk_takes("rename " + last_name(from) + " to " + last_name(to));
    return taken ? renameat(AT_FDCWD, from, AT_FDCWD, to) : -1;
}
extern "C" int renameat2(int folder, const char* from, int to_folder, const char* to, unsigned flags) noexcept {
    const bool taken = disk_takes("swap " + last_name(from) + " with " + last_name(to));
    return taken ? (int)syscall(SYS_renameat2, folder, from, to_folder, to, flags) : -1;
}
extern "C" int unlinkat(int folder, const char* name, int flags) noexcept {  // of remove_all; not in the log
    if (disk_fails_at.count("remove") > 0) {
        errno = EIO;
        return -1;
    }
    return (int)syscall(SYS_unlinkat, folder, name, flags);
}

namespace {

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

ModelConfig small_model(bool tied) {
    ModelConfig m;
    m.vocab_size = 11, m.num_layers = 2, m.width = 8, m.num_heads = 2, m.num_kv_heads = 1, m.head_dim = 8;
    m.ffn_width = 16, m.tied_embeddings = tied;
    return m;
}

std::string read_bytes(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    EXPECT_TRUE(file.good()) << path;
    return std::string(std::istreambuf_iterator<char>(file), {});
}
// Over what is there, rather than into an empty file: some file systems wait for the disk then.
void write_bytes(const std::string& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary | std::ios::app).close();
    std::ofstream(path, std::ios::binary | std::ios::in) << bytes;
    fs::resize_file(path, bytes.size());
}
// The contents of all files below a folder, by path.
std::map<std::string, std::string> contents(const std::string& folder) {
    std::map<std::string, std::string> files;
    for (const auto& entry : fs::recursive_directory_iterator(folder)) {
        if (entry.is_regular_file()) {
            files[entry.path().string()] = read_bytes(entry.path().string());
        }
    }
    return files;
}
std::vector<std::string> names(const std::string& folder) {
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
        run_ = folder_ + "/run";
        config_.keep_checkpoints = 0;
        state_.step = 400, state_.adam_step = 397, state_.data_position = ((int64_t)1 << 40) + 3, state_.skipped = 3;
        state_.skipped_in_a_row = 1, state_.data = "1 file of bytes";
    }
    void TearDown() override { EXPECT_EQ(std::system(("rm -rf '" + folder_ + "'").c_str()), 0); }

    std::string save(StateModel& model, int64_t step, bool bf16 = false) {
        TrainingState state = state_;
        state.step = step, state.adam_step = state.skipped = state.skipped_in_a_row = 0;
        return save_checkpoint(model, state, config_, bf16, run_, 6000);
    }

    std::string folder_ = testing::TempDir() + "llmc_checkpoint_XXXXXX", run_;
    RunConfig config_;
    TrainingState state_;
};

}  // namespace

// ---- there and back

TEST_F(Checkpoint, ComesBackBitForBit) {
    for (const bool tied : {true, false}) {
        for (const bool bf16 : {false, true}) {
            for (const uint64_t shard_bytes : {(uint64_t)1, (uint64_t)3000, checkpoint::OPTIMIZER_SHARD_BYTES}) {
                fs::remove_all(run_);
                StateModel model(small_model(tied), 1), loaded(small_model(tied), 0);
                const std::string folder = save_checkpoint(model, state_, config_, bf16, run_, shard_bytes);
                EXPECT_EQ(folder, run_ + "/step00000400");
                EXPECT_EQ(find_newest_checkpoint(run_), folder);
                const TrainingState state = load_checkpoint(loaded, folder);
                for (int kind = 0; kind < 3; ++kind) {
                    EXPECT_EQ(loaded.state[kind], model.state[kind]) << kind << tied << bf16 << shard_bytes;
                }
                EXPECT_EQ(state.step, 400);
                EXPECT_EQ(state.adam_step, 397);
                EXPECT_EQ(state.data_position, ((int64_t)1 << 40) + 3);
                EXPECT_EQ(state.skipped, 3);
                EXPECT_EQ(state.skipped_in_a_row, 1);
                EXPECT_EQ(state.data, "1 file of bytes");
                int num_shards = 0;
                for (const std::string& name : names(folder)) {
                    num_shards += name.rfind("optimizer-", 0) == 0;
                }
                const int num_tensors = (int)model.parameters().tensors.size() * (bf16 ? 3 : 2);
                EXPECT_TRUE(shard_bytes == 1      ? num_shards == num_tensors
                            : shard_bytes == 3000 ? num_shards > 1 && num_shards < num_tensors
                                                  : num_shards == 1)
                    << num_shards;
            }
        }
    }
}

TEST_F(Checkpoint, IsAHuggingFaceFolder) {
    config_.seq_len = 96;
    StateModel model(small_model(false), 2);
    const std::string folder = save_checkpoint(model, state_, config_, true, run_);
    EXPECT_EQ(first_difference(load_hf_config(folder), model.config()), "");
    EXPECT_EQ(load_hf_config(folder).max_positions, 96) << "the run's sequence length";
    const SafetensorsFile weights(folder + "/model.safetensors");
    EXPECT_EQ(weights.metadata().at("format"), "pt") << "older transformers ask for it";
    EXPECT_EQ(weights.tensors().size(), 2 * 9 + 3u);
    // k is rows 16..24 of the fused matrix.
    const SafetensorsTensor& k = weights.at("model.layers.1.self_attn.k_proj.weight");
    EXPECT_EQ(k.shape, (std::vector<uint64_t>{8, 8}));
    EXPECT_EQ(k.dtype, Dtype::BF16);
    std::vector<float> values(64);
    weights.read_floats(k, values.data());
    const std::vector<float>& fused = model.state[0][model.parameters().layers[1].qkv];
    for (int i = 0; i < 64; ++i) {
        ASSERT_EQ(values[i], bf16_to_float(float_to_bf16(fused[16 * 8 + i])));
    }
    EXPECT_EQ(weights.at("model.norm.weight").shape, (std::vector<uint64_t>{8})) << "a vector there";
    EXPECT_EQ(weights.at("lm_head.weight").shape, (std::vector<uint64_t>{11, 8}));

    StateModel tied(small_model(true), 2);
    const std::string tied_folder = save_checkpoint(tied, state_, config_, false, folder_ + "/tied");
    EXPECT_EQ(SafetensorsFile(tied_folder + "/model.safetensors").find("lm_head.weight"), nullptr);
}

TEST_F(Checkpoint, StateHasTheSettings) {
    config_.seed = 12, config_.shuffle_seed = (uint64_t)1 << 62, config_.train_data = {"a\"b", "c\xff"};
    config_.learning_rate = 1e-3;
    StateModel model(small_model(true), 1);
    const JsonValue state = parse_json(read_bytes(save(model, 7) + "/state.json"), "state.json");
    EXPECT_EQ(state["step"], 7);
    EXPECT_EQ(state["seed"], 12);
    EXPECT_EQ(state["shuffle_seed"], (uint64_t)1 << 62);
    EXPECT_EQ(state["settings"]["learning_rate"], 1e-3);
    EXPECT_EQ(state["settings"]["schedule"], "cosine");
    EXPECT_EQ(state["settings"]["tied_embeddings"], true);
    EXPECT_TRUE(state["settings"].contains("train_data"));
}

TEST_F(Checkpoint, ByteVocabularyHasItsTokenizer) {
    ModelConfig bytes = small_model(true);
    bytes.vocab_size = 258;
    StateModel model(bytes, 1), other(small_model(true), 1);
    const auto read_json = [](const std::string& path) { return parse_json(read_bytes(path), path); };
    std::string folder = save_checkpoint(model, state_, config_, false, run_);
    EXPECT_EQ(read_json(folder + "/config.json")["eos_token_id"], 257);
    EXPECT_EQ(read_json(folder + "/generation_config.json")["bos_token_id"], 256);
    EXPECT_EQ(read_json(folder + "/tokenizer_config.json")["eos_token"], "<|end|>");
    const JsonValue tokenizer = read_json(folder + "/tokenizer.json");
    EXPECT_EQ(tokenizer["added_tokens"][1]["id"], 257);
    std::set<int> tokens;
    for (const auto& [character, token] : tokenizer["model"]["vocab"].items()) {
        tokens.insert(token.get<int>());
    }
    EXPECT_EQ(tokens.size(), 256u);
    // As GPT-2 shows them.
    EXPECT_EQ(tokenizer["model"]["vocab"]["A"], 'A');
    EXPECT_EQ(tokenizer["model"]["vocab"]["\u0100"], 0);
    EXPECT_EQ(tokenizer["model"]["vocab"]["\u0120"], ' ');
    EXPECT_EQ(tokenizer["model"]["vocab"]["\u010a"], '\n');
    EXPECT_EQ(tokenizer["model"]["vocab"]["\u0143"], 173);
    EXPECT_EQ(tokenizer["model"]["vocab"]["\u00ff"], 255);

    config_.byte_markers = false;
    folder = save_checkpoint(model, state_, config_, false, folder_ + "/unmarked");
    EXPECT_TRUE(read_json(folder + "/config.json")["bos_token_id"].is_null());
    EXPECT_TRUE(read_json(folder + "/tokenizer.json")["post_processor"].is_null());
    folder = save_checkpoint(other, state_, config_, false, folder_ + "/other");
    EXPECT_TRUE(read_json(folder + "/config.json")["eos_token_id"].is_null());
    EXPECT_FALSE(fs::exists(folder + "/tokenizer.json")) << "which tokenizer is not known";
}

// What text is, not the size of the vocabulary, says whether the tokenizer is that of bytes.
TEST_F(Checkpoint, CompanionsFollowTheData) {
    ModelConfig larger = small_model(true), bytes = small_model(true);
    larger.vocab_size = 512, bytes.vocab_size = 258;
    const checkpoint::Companions of_text = checkpoint::read_companions("", config_, larger, true);
    EXPECT_EQ(of_text.files.count("tokenizer.json"), 1u);
    EXPECT_EQ(of_text.tokens.begin, BEGIN_MARKER);
    const checkpoint::Companions of_shards = checkpoint::read_companions("", config_, bytes, false);
    EXPECT_TRUE(of_shards.files.empty());
    EXPECT_NE(of_shards.tokens.begin, BEGIN_MARKER);
    bytes.vocab_size = 256;
    EXPECT_NE(checkpoint::read_companions("", config_, bytes, true).tokens.begin, BEGIN_MARKER);
}

// A model that is extended takes longer texts than its tokenizer's settings say; all else in them stays.
TEST_F(Checkpoint, TheTokenizerTakesTextsAsLongAsTheModel) {
    StateModel model(small_model(true), 1);
    const std::string start = save_checkpoint(model, state_, config_, false, folder_ + "/start");
    fs::remove(start + "/manifest.json");
    const auto lengths = [&](const std::string& text) {
        write_bytes(start + "/tokenizer_config.json", text);
        config_.seq_len = 300;
        return checkpoint::read_companions(start, config_, model.config(), false).files.at("tokenizer_config.json");
    };
    const Json longer = Json::parse(lengths(R"({"z": 1, "model_max_length": 32, "a": "b"})"));
    EXPECT_EQ(longer.dump(), R"({"z":1,"model_max_length":300,"a":"b"})");
    for (const char* as_it_is : {R"({"model_max_length": 2048})", R"({"model_max_length": 1e30})", R"({"a": 2})",
                                 R"({"model_max_length": 18446744073709551615})",
                                 R"({"model_max_length": 1000000000000000019884624838656})", "no JSON"}) {
        EXPECT_EQ(lengths(as_it_is), as_it_is);
    }
}

TEST_F(Checkpoint, TokenizerAndSpecialTokensAreCarriedOn) {
    StateModel model(small_model(true), 1);
    const std::string start = save_checkpoint(model, state_, config_, false, folder_ + "/start");
    Json config = Json::parse(read_bytes(start + "/config.json"));
    config["bos_token_id"] = 3, config["eos_token_id"] = {4, 5}, config["pad_token_id"] = 6;
    fs::remove(start + "/manifest.json");
    write_bytes(start + "/config.json", config.dump());
    write_bytes(start + "/tokenizer.json", "{\"a\": \"tokenizer\"}");
    write_bytes(start + "/tokenizer.model", std::string("\0\1\2", 3));
    config_.checkpoint = config_.init_from = start;
    config_.keep_checkpoints = 1;
    save(model, 1);
    fs::remove_all(start);
    save(model, 2);  // from the checkpoint of step 1, which then goes
    const std::string folder = save(model, 3);
    EXPECT_EQ(names(run_), std::vector<std::string>{"step00000003"});
    EXPECT_EQ(read_bytes(folder + "/tokenizer.json"), "{\"a\": \"tokenizer\"}");
    EXPECT_EQ(read_bytes(folder + "/tokenizer.model"), std::string("\0\1\2", 3));
    const JsonValue carried_on = parse_json(read_bytes(folder + "/config.json"), "");
    EXPECT_EQ(carried_on["bos_token_id"], 3);
    EXPECT_EQ(carried_on["eos_token_id"], (JsonValue{4, 5})) << "all ends of a Llama 3";
    EXPECT_EQ(carried_on["pad_token_id"], 6);
    EXPECT_EQ(find_newest_checkpoint(run_), folder) << "the manifest has them";
}

TEST_F(Checkpoint, VerificationCountsWhatItHasRead) {
    StateModel model(small_model(true), 1);
    const std::string folder = save(model, 1);
    uint64_t num_bytes = 0;
    for (const auto& [path, bytes] : contents(folder)) {
        num_bytes += path == folder + "/manifest.json" ? 0 : bytes.size();
    }
    std::atomic<uint64_t> progress{0};
    EXPECT_EQ(find_newest_checkpoint(run_, nullptr, &progress), folder);
    EXPECT_EQ(progress, num_bytes);
}

// ---- which one

TEST_F(Checkpoint, NewestIsByNumber) {
    EXPECT_EQ(find_newest_checkpoint(folder_ + "/none"), std::nullopt);
    EXPECT_EQ(find_newest_checkpoint(folder_), std::nullopt);
    StateModel model(small_model(true), 1);
    save(model, 9);
    save(model, 100'000'000);  // nine digits
    save(model, 99'999'999);
    EXPECT_EQ(find_newest_checkpoint(run_), run_ + "/step100000000");
    fs::create_directory(run_ + "/step200000000x");
    fs::create_directory(run_ + "/step0200000000");
    fs::create_directory(run_ + "/step");
    write_bytes(run_ + "/step300000000", "a file");
    std::vector<std::string> damaged;
    EXPECT_EQ(find_newest_checkpoint(run_, &damaged), run_ + "/step100000000") << "others are not checkpoints";
    EXPECT_TRUE(damaged.empty());
    EXPECT_THROW(find_newest_checkpoint(run_ + "/step300000000"), Error) << "a file";
}

TEST_F(Checkpoint, OldOnesGoOnlyAfterTheNewStands) {
    StateModel model(small_model(true), 1);
    config_.keep_checkpoints = 2;
    for (int64_t step = 1; step <= 4; ++step) {
        save(model, step);
    }
    EXPECT_EQ(names(run_), (std::vector<std::string>{"step00000003", "step00000004"}));
    {
        const FileSizeLimit full(100);
        EXPECT_THROW(save(model, 5), Error);
    }
    EXPECT_EQ(names(run_), (std::vector<std::string>{"step00000003", "step00000004"}));
    // A damaged one neither counts nor goes; nor does one of a later step.
    fs::resize_file(run_ + "/step00000004/model.safetensors", 10);
    save(model, 3);
    EXPECT_EQ(names(run_), (std::vector<std::string>{"step00000003", "step00000004"}));
    save(model, 6);
    EXPECT_EQ(names(run_), (std::vector<std::string>{"step00000003", "step00000004", "step00000006"}));
    save(model, 7);
    EXPECT_EQ(names(run_), (std::vector<std::string>{"step00000004", "step00000006", "step00000007"}));
}

TEST_F(Checkpoint, AnOldOneThatCannotBeRemovedStays) {
    StateModel model(small_model(true), 1);
    config_.keep_checkpoints = 1;
    save(model, 1);
    const std::map<std::string, std::string> before = contents(run_);
    disk_fails_at = {"remove"};
    testing::internal::CaptureStderr();
    save(model, 2);
    EXPECT_NE(testing::internal::GetCapturedStderr().find("it stays"), std::string::npos);
    disk_fails_at.clear();
    EXPECT_EQ(names(run_), (std::vector<std::string>{"step00000001", "step00000002"}));
    fs::remove_all(run_ + "/step00000002");
    EXPECT_EQ(contents(run_), before);
}

TEST_F(Checkpoint, SameStepIsReplaced) {
    StateModel first(small_model(true), 1), second(small_model(true), 2), loaded(small_model(true), 0);
    save(first, 5);
    write_bytes(run_ + "/step00000005/notes.txt", "of the old one");
    save(second, 5, true);
    load_checkpoint(loaded, run_ + "/step00000005");
    EXPECT_EQ(loaded.state[0], second.state[0]);
    EXPECT_EQ(names(run_), std::vector<std::string>{"step00000005"});
    EXPECT_FALSE(fs::exists(run_ + "/step00000005/notes.txt"));
}

// As on NFS.
TEST_F(Checkpoint, SameStepIsReplacedWhereNamesCannotBeSwapped) {
    StateModel first(small_model(true), 1), second(small_model(true), 2), loaded(small_model(true), 0);
    save(first, 5);
    disk_fails_at = {"swap .partial-step00000005 with step00000005"};
    save(second, 5);
    disk_fails_at.clear();
    EXPECT_EQ(names(run_), std::vector<std::string>{"step00000005"});
    load_checkpoint(loaded, run_ + "/step00000005");
    EXPECT_EQ(loaded.state[0], second.state[0]);
    // Where the new one does not get its name, the old one has it back.
    disk_fails_at = {"swap .partial-step00000005 with step00000005", "rename .partial-step00000005 to step00000005"};
    EXPECT_THROW(save(first, 5), Error);
    disk_fails_at.clear();
    StateModel again(small_model(true), 0);
    load_checkpoint(again, run_ + "/step00000005");
    EXPECT_EQ(again.state[0], second.state[0]);
}

// ---- the disk

// Whoever waits for a long file sees it go on, part by part, on a slow disk too.
TEST_F(Checkpoint, LongFilesGoToTheDiskAsTheyAreWritten) {
    const auto write = [&](const std::string& name) {
        disk_log.clear();
        const uint64_t before = durable_bytes;
        DurableFile file(folder_ + "/" + name, 1000);
        const std::string piece(700, 'x');
        for (int i = 0; i < 5; ++i) {
            file.write(piece.data(), piece.size());
        }
        file.finish();
        EXPECT_EQ(durable_bytes - before, 2u * 3500u);
        return disk_log;
    };
    using Log = std::vector<std::string>;
    EXPECT_EQ(write("long"), (Log{"send 0", "send 1000", "wait for 0", "send 2000", "wait for 1000", "fsync long"}));
    disk_fails_at = {"sync_file_range"};  // as in a container that does not allow it
    EXPECT_EQ(write("without"), (Log{"fsync without"}));
    disk_fails_at = {"wait for 0"};
    EXPECT_THROW(write("broken"), Error);
    disk_fails_at.clear();
}

TEST_F(Checkpoint, IsOnTheDiskBeforeItHasItsName) {
    StateModel model(small_model(true), 1);
    for (const bool exists : {false, true}) {
        disk_log.clear();
        save(model, 5);
        std::vector<std::string> log = disk_log, expected;
        for (const std::string& name : names(run_ + "/step00000005")) {
            expected.push_back("fsync " + name);
        }
        ASSERT_GT(log.size(), expected.size());
        std::sort(log.begin(), log.begin() + (int64_t)expected.size());
        expected.push_back("fsync .partial-step00000005");  // the names of these files
        if (!exists) {
            expected.push_back("rename .partial-step00000005 to step00000005");
        } else {
            expected.push_back("swap .partial-step00000005 with step00000005");
            const auto renamed = [](const std::string& entry) { return entry.rfind("rename ", 0) == 0; };
            log.erase(std::remove_if(log.begin(), log.end(), renamed), log.end());  // where names cannot be swapped
        }
        expected.push_back("fsync run");  // its own name
        EXPECT_EQ(log, expected);
    }
}

TEST_F(Checkpoint, WhatTheDiskRefusesIsNoCheckpoint) {
    StateModel model(small_model(true), 1);
    save(model, 1);
    for (const char* call : {"fsync model.safetensors", "fsync state.json", "fsync manifest.json",
                             "fsync .partial-step00000002", "rename .partial-step00000002 to step00000002"}) {
        disk_fails_at = {call};
        EXPECT_MESSAGE(save(model, 2), "Input/output error; earlier checkpoints are as they were");
        EXPECT_EQ(disk_log.back(), call) << "and nothing is tried after it";
        EXPECT_EQ(names(run_), std::vector<std::string>{"step00000001"});
    }
    disk_fails_at = {"fsync run"};
    EXPECT_MESSAGE(save(model, 2), "cannot write this folder to the disk: Input/output error");
    disk_fails_at.clear();
}

// ---- damage

TEST_F(Checkpoint, CutOffAtAnyByteIsPassedOver) {
    StateModel model(small_model(true), 1), loaded(small_model(true), 0);
    save(model, 1);
    const std::string newest = save(model, 2, true);
    for (const std::string& name : names(newest)) {
        const std::string path = newest + "/" + name, whole = read_bytes(path);
        // At every byte of both ends, and in between.
        const size_t step = whole.size() > 4000 ? 211 : 13;
        for (size_t length = 0; length < whole.size(); length += length + 40 < whole.size() && length > 40 ? step : 1) {
            fs::resize_file(path, length);
            std::vector<std::string> damaged;
            ASSERT_EQ(find_newest_checkpoint(run_, &damaged), run_ + "/step00000001") << name << " " << length;
            ASSERT_EQ(damaged.size(), 1u);
            ASSERT_EQ(damaged[0].rfind(path, 0), 0u) << damaged[0];
            write_bytes(path, whole);
        }
        fs::remove(path);
        EXPECT_EQ(find_newest_checkpoint(run_), run_ + "/step00000001") << name;
        EXPECT_THROW(load_checkpoint(loaded, newest), Error) << name;
        write_bytes(path, whole + "x");
        if (name != checkpoint::MANIFEST) {
            EXPECT_EQ(find_newest_checkpoint(run_), run_ + "/step00000001") << name;
        }
        EXPECT_THROW(load_checkpoint(loaded, newest), Error) << name;
        write_bytes(path, whole);
    }
    EXPECT_TRUE(loaded.untouched()) << "a checkpoint that is refused changes nothing";
    EXPECT_EQ(find_newest_checkpoint(run_), newest);
}

// What was found is not read through a second time: a bit that flips in between is loaded, a length that changes is
// not.
TEST_F(Checkpoint, WhatWasReadWhenItWasFoundIsNotReadAgain) {
    StateModel model(small_model(true), 1), loaded(small_model(true), 0), cut_off(small_model(true), 0);
    const std::string folder = save(model, 2), path = folder + "/" + checkpoint::WEIGHTS;
    std::string bytes = read_bytes(path);
    bytes.back() = (char)(bytes.back() ^ 1);
    write_bytes(path, bytes);
    EXPECT_THROW(load_checkpoint(loaded, folder), Error);
    EXPECT_TRUE(loaded.untouched());
    load_checkpoint(loaded, folder, RunRanks(), true);
    EXPECT_FALSE(loaded.untouched());
    bytes.pop_back();
    write_bytes(path, bytes);
    EXPECT_THROW(load_checkpoint(cut_off, folder, RunRanks(), true), Error);
    EXPECT_TRUE(cut_off.untouched());
}

TEST_F(Checkpoint, EveryFlippedBitIsFound) {
    StateModel model(small_model(true), 1), loaded(small_model(true), 0);
    const std::string folder = save(model, 2);
    std::mt19937 generator(1);
    for (const std::string& name : names(folder)) {
        const std::string path = folder + "/" + name, whole = read_bytes(path);
        for (int i = 0; i < 200; ++i) {
            const size_t byte = generator() % whole.size();
            std::string flipped = whole;
            flipped[byte] = (char)(flipped[byte] ^ 1 << generator() % 8);
            write_bytes(path, flipped);
            if (name == checkpoint::MANIFEST && find_newest_checkpoint(run_)) {
                // Between its words a manifest may change: a space that became another.
                const checkpoint::Manifest changed = checkpoint::parse_manifest(flipped, path);
                ASSERT_TRUE(whole[byte] == ' ' || whole[byte] == '\n') << byte;
                ASSERT_EQ(changed.size(), checkpoint::parse_manifest(whole, path).size());
                continue;
            }
            ASSERT_EQ(find_newest_checkpoint(run_), std::nullopt) << name << " byte " << byte;
            ASSERT_THROW(load_checkpoint(loaded, folder), Error) << name << " byte " << byte;
        }
        write_bytes(path, whole);
    }
    EXPECT_TRUE(loaded.untouched());
}

// What cannot be read may be whole: going on from an older one would waste what it holds.
TEST_F(Checkpoint, OneThatCannotBeReadIsNotPassedOver) {
    StateModel model(small_model(true), 1), loaded(small_model(true), 0);
    const std::string before = save(model, 1), newest = save(model, 2), aside = folder_ + "/aside";
    const auto refused = [&](const std::string& path, const std::string& words) {
        EXPECT_MESSAGE(find_newest_checkpoint(run_), path + ": " + words);
        EXPECT_MESSAGE(find_newest_checkpoint(run_), "whole: make it readable, or move its folder away");
        EXPECT_MESSAGE(load_checkpoint(loaded, newest), path + ": " + words);
        EXPECT_TRUE(loaded.untouched());
    };
    for (const std::string& name : names(newest)) {
        const std::string path = newest + "/" + name;
        fs::rename(path, aside);
        EXPECT_EQ(find_newest_checkpoint(run_), before) << "a file that is missing is damage";
        fs::create_directory(path);
        refused(path, "is a folder, not a file");
        fs::remove(path);
        fs::create_symlink(path, path);
        refused(path, "cannot open: Too many levels of symbolic links");
        fs::remove(path);
        ASSERT_EQ(mkfifo(path.c_str(), 0666), 0);
        refused(path, "is a device or pipe, not a file");
        fs::remove(path);
        fs::rename(aside, path);
        if (geteuid() != 0) {
            fs::permissions(path, fs::perms::none);
            refused(path, "cannot open: Permission denied");
            fs::permissions(path, fs::perms::owner_read | fs::perms::owner_write);
        }
        EXPECT_EQ(find_newest_checkpoint(run_), newest);
    }
    EXPECT_MESSAGE(digest_file("/proc/self/mem"), "/proc/self/mem: cannot read: Input/output error");
    EXPECT_THROW(digest_file("/proc/self/mem"), UnreadableFile);
    // The folder itself; and those that are removed for their age are not those.
    fs::rename(newest, aside);
    fs::create_symlink(newest, newest);
    EXPECT_MESSAGE(find_newest_checkpoint(run_), "Too many levels of symbolic links; so nobody knows");
    config_.keep_checkpoints = 1;
    save(model, 3);
    EXPECT_EQ(names(run_), (std::vector<std::string>{"step00000002", "step00000003"}));
}

TEST_F(Checkpoint, FullDiskLeavesWhatWasThere) {
    StateModel model(small_model(true), 1);
    config_.keep_checkpoints = 1;
    save(model, 1);
    const std::map<std::string, std::string> before = contents(folder_);
    for (const uint64_t num_bytes : {0, 1, 100, 1000, 5000}) {
        for (const int64_t step : {1, 2}) {
            const FileSizeLimit full(num_bytes);
            EXPECT_MESSAGE(save(model, step), "File too large; earlier checkpoints are as they were");
        }
    }
    EXPECT_EQ(contents(folder_), before);
    EXPECT_EQ(names(run_), std::vector<std::string>{"step00000001"}) << "nothing is left behind";
}

TEST_F(Checkpoint, FoldersThatCannotBeWrittenAreRefused) {
    StateModel model(small_model(true), 1);
    write_bytes(run_, "a file");
    EXPECT_MESSAGE(save(model, 1), "--output_dir " + run_);
    run_ += "/below";
    EXPECT_MESSAGE(save(model, 1), "--output_dir " + run_);
    run_ = "/proc/none";
    EXPECT_MESSAGE(save(model, 1), "--output_dir /proc/none");
    if (geteuid() != 0) {
        run_ = folder_ + "/read_only";
        fs::create_directory(run_);
        fs::permissions(run_, fs::perms::owner_read | fs::perms::owner_exec);
        EXPECT_MESSAGE(save(model, 1), "Permission denied");
        fs::permissions(run_, fs::perms::owner_all);
    }
}

TEST_F(Checkpoint, ProcessThatDiesWhileSavingLeavesTheOldOne) {
    StateModel model(small_model(true), 1), loaded(small_model(true), 0);
    save(model, 1);
    const std::map<std::string, std::string> before = contents(run_ + "/step00000001");
    int num_leftovers = 0;
    for (uint64_t num_bytes = 0; num_bytes < 6000; num_bytes += 251) {
        const pid_t child = fork();
        ASSERT_GE(child, 0);
        if (child == 0) {
            // The signal of a file that grows too large ends the process wherever it is.
            rlimit none = {};
            setrlimit(RLIMIT_CORE, &none);
            rlimit limit = {num_bytes, RLIM_INFINITY};
            setrlimit(RLIMIT_FSIZE, &limit);
            std::signal(SIGXFSZ, SIG_DFL);
            TrainingState state;
            state.step = 2;
            save_checkpoint(model, state, config_, false, run_);
            _exit(0);
        }
        int status = 0;
        ASSERT_EQ(waitpid(child, &status, 0), child);
        ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGXFSZ) << status;
        num_leftovers += (int)names(run_).size() - 1;
        ASSERT_EQ(find_newest_checkpoint(run_), run_ + "/step00000001") << num_bytes;
    }
    EXPECT_GT(num_leftovers, 10) << "saves were cut short";
    EXPECT_EQ(contents(run_ + "/step00000001"), before);
    save(model, 3);
    EXPECT_EQ(names(run_), (std::vector<std::string>{"step00000001", "step00000003"})) << "leftovers are removed";
}

// ---- one process at a time

TEST_F(Checkpoint, OneProcessAtATimeHasTheLock) {
    StateModel model(small_model(true), 1);
    const std::string folder = save(model, 1);
    const auto run_child = [](const std::function<void()>& body) {
        const pid_t child = fork();
        if (child == 0) {
            body();
            _exit(0);
        }
        return child;
    };
    // Taken, and released by a process that is killed.
    int pipe_ends[2];
    ASSERT_EQ(pipe(pipe_ends), 0);
    const pid_t holder = run_child([&] {
        const OutputLock lock(run_);
        if (write(pipe_ends[1], "x", 1) == 1) {
            pause();
        }
    });
    char taken;
    ASSERT_EQ(read(pipe_ends[0], &taken, 1), 1);
    EXPECT_MESSAGE(OutputLock lock(run_), "--output_dir " + run_ + ": another process is training into this folder");
    kill(holder, SIGKILL);
    waitpid(holder, nullptr, 0);
    {
        const OutputLock lock(run_);
        EXPECT_EQ(lock.warning(), "");
        EXPECT_MESSAGE(OutputLock second(run_), "another process is training");
        // Programs that the process starts do not get it.
        EXPECT_NE(std::system(("ls -l /proc/self/fd | grep -F '" + run_ + "/.lock' >/dev/null").c_str()), 0);
        // It disturbs nothing.
        config_.keep_checkpoints = 1;
        EXPECT_EQ(find_newest_checkpoint(run_), folder);
        save(model, 2);
        EXPECT_EQ(names(run_), (std::vector<std::string>{".lock", "step00000002"}));
        StateModel loaded(small_model(true), 0);
        load_model(loaded, run_ + "/step00000002");
    }
    const OutputLock again(run_);
}

TEST_F(Checkpoint, LocksThatCannotBe) {
    fs::create_directory(run_);
    for (const auto lock :
         {+[](int, int) { return errno = ENOLCK, -1; }, +[](int, int) { return errno = EOPNOTSUPP, -1; },
          +[](int, int) { return errno = ENOSYS, -1; }}) {
        const OutputLock without(run_, lock);
        EXPECT_NE(without.warning().find("--output_dir " + run_ + ": its file system has no locks"), std::string::npos)
            << without.warning();
    }
    EXPECT_MESSAGE(OutputLock lock(run_, [](int, int) { return errno = EIO, -1; }), "/.lock: Input/output error");
    static int calls = 0;
    EXPECT_EQ(OutputLock(run_, [](int, int) { return errno = EINTR, ++calls < 3 ? -1 : 0; }).warning(), "");
    EXPECT_EQ(calls, 3);
    EXPECT_MESSAGE(OutputLock lock(folder_ + "/none"), "--output_dir " + folder_ + "/none: cannot open");
}

// ---- the optimizer's files

// Writes a checkpoint's optimizer file anew, and its manifest: of the first tensor's exp_avg these pieces, all else of
// both running means as it was when nothing was trained.
void write_optimizer(const std::string& folder, const ParameterTable& parameters,
                     const std::vector<StatePiece>& pieces) {
    std::vector<SafetensorsTensor> header;
    uint64_t num_elements = 0;
    const auto add = [&](const ParameterTensor& tensor, StateKind kind, const StatePiece& piece) {
        const std::string name = checkpoint::piece_name(tensor, kind, piece);
        const bool whole = name.back() != ']';
        header.push_back({name, Dtype::F32,
                          whole ? checkpoint::state_shape(tensor) : std::vector<uint64_t>{(uint64_t)piece.num_elements},
                          0, 0});
        num_elements += (uint64_t)piece.num_elements;
    };
    for (const ParameterTensor& tensor : parameters.tensors) {
        const bool is_first = &tensor == &parameters.tensors[0];
        for (const StatePiece& piece : is_first ? pieces : std::vector<StatePiece>{{0, tensor.num_elements()}}) {
            add(tensor, StateKind::exp_avg, piece);
        }
        add(tensor, StateKind::exp_avg_sq, {0, tensor.num_elements()});
    }
    const std::string name = "optimizer-00001-of-00001.safetensors", manifest_path = folder + "/manifest.json";
    fs::remove(folder + "/" + name);
    SafetensorsWriter writer(folder + "/" + name, header, {});
    writer.write(std::vector<float>(num_elements, 0.0f).data(), num_elements);
    checkpoint::Manifest manifest = checkpoint::parse_manifest(read_bytes(manifest_path), manifest_path);
    manifest[name] = writer.finish();
    write_bytes(manifest_path, checkpoint::manifest_text(manifest));
}

TEST_F(Checkpoint, PiecesThatAreNoWholeTensorAreRefused) {
    StateModel model(small_model(true), 1);
    const std::string folder = save_checkpoint(model, state_, config_, false, run_);
    const auto message_for = [&](const std::vector<StatePiece>& pieces) {
        write_optimizer(folder, model.parameters(), pieces);
        StateModel loaded(small_model(true), 0);
        const std::string message = message_of([&] { load_checkpoint(loaded, folder); });
        EXPECT_EQ(loaded.untouched(), message != "(no error)") << message;
        return message;
    };
    const auto refused = [&](const std::vector<StatePiece>& pieces, const std::string& words) {
        const std::string message = message_for(pieces);
        EXPECT_NE(message.find(words), std::string::npos) << message;
    };
    ASSERT_EQ(model.parameters().tensors[0].num_elements(), 88);
    EXPECT_EQ(message_for({{0, 88}}), "(no error)");
    EXPECT_EQ(message_for({{44, 44}, {0, 44}}), "(no error)") << "in any order";
    refused({{0, 48}, {44, 44}}, "element 44 is there twice");
    refused({{0, 40}, {44, 44}}, "element 40 is missing");
    refused({{4, 84}}, "element 0 is missing");
    refused({{0, 44}, {44, 40}}, "have 84 elements, this model's has 88");
    refused({{0, 44}, {44, 48}}, "have 92 elements, this model's has 88");
    refused({{0, 88}, {0, 44}, {44, 44}}, "the pieces of tensor embedding.exp_avg");  // beside the whole
    refused({}, "lacks the tensor embedding.exp_avg");
}

TEST_F(Checkpoint, RoundedWeightsAreNothingToGoOnWith) {
    StateModel model(small_model(true), 1), loaded(small_model(true), 0);
    const std::string folder = save_checkpoint(model, state_, config_, true, run_);
    write_optimizer(folder, model.parameters(), {{0, 88}});  // without the master
    EXPECT_MESSAGE(load_checkpoint(loaded, folder), "holds no float32 weights to go on with");
    EXPECT_TRUE(loaded.untouched());
}

// ---- other models, other folders

TEST_F(Checkpoint, AnotherModelIsRefused) {
    StateModel model(small_model(false), 1);
    const std::string folder = save(model, 1);
    const auto refused = [&](auto change, const std::string& words) {
        ModelConfig other = small_model(false);
        change(other);
        StateModel loaded(other, 0);
        EXPECT_MESSAGE(load_checkpoint(loaded, folder), words);
        EXPECT_MESSAGE(load_model(loaded, folder), words);
        EXPECT_TRUE(loaded.untouched());
    };
    refused([](ModelConfig& m) { m.width = 16; }, "hidden_size is 8 and not 16");
    refused([](ModelConfig& m) { m.num_layers = 3; }, "num_hidden_layers is 2 and not 3");
    refused([](ModelConfig& m) { m.vocab_size = 12; }, "vocab_size is 11 and not 12");
    refused([](ModelConfig& m) { m.tied_embeddings = true; }, "tie_word_embeddings is 0 and not 1");
    refused([](ModelConfig& m) { m.rope_theta = 5e5; }, "rope_theta is 10000 and not 500000");

    // A config.json that tells of another model than the tensors are.
    StateModel loaded(small_model(false), 0);
    fs::remove(folder + "/manifest.json");
    fs::copy_file(folder + "/config.json", folder_ + "/config.json");
    ModelConfig wider = small_model(false);
    wider.width = 16;
    write_bytes(folder + "/config.json", hf_config_json(wider, 1, false, {}).dump());
    StateModel wide(load_hf_config(folder), 0);
    EXPECT_MESSAGE(load_model(wide, folder), "has shape [11, 8], this model's is [11, 16]");
    ModelConfig deeper = small_model(false);
    deeper.num_layers = 3;
    write_bytes(folder + "/config.json", hf_config_json(deeper, 1, false, {}).dump());
    StateModel deep(load_hf_config(folder), 0);
    EXPECT_MESSAGE(load_model(deep, folder), "lacks the tensor model.layers.2.");
    ModelConfig shallower = small_model(false);
    shallower.num_layers = 1;
    write_bytes(folder + "/config.json", hf_config_json(shallower, 1, false, {}).dump());
    StateModel shallow(load_hf_config(folder), 0);
    EXPECT_MESSAGE(load_model(shallow, folder), "has the tensor model.layers.1.");
    EXPECT_TRUE(wide.untouched() && deep.untouched() && shallow.untouched());
}

// A folder as Hugging Face tools write it, of `model`'s weights in some type, sharded at random, with extra tensors.
void write_foreign_folder(const std::string& folder, const StateModel& model, Dtype dtype, int num_files,
                          const std::vector<std::string>& extra = {}) {
    fs::create_directories(folder);
    write_bytes(folder + "/config.json", hf_config_json(model.config(), 64, false, {}).dump());
    std::vector<std::vector<SafetensorsTensor>> headers(num_files);
    std::vector<std::vector<float>> values(num_files);
    Json weight_map = Json::object();
    std::mt19937 generator(3);
    const auto file_name = [&](int i) {
        return num_files == 1 ? std::string("model.safetensors")
                              : format_string("model-%05d-of-%05d.safetensors", i + 1, num_files);
    };
    const auto add = [&](const std::string& name, const std::vector<uint64_t>& shape, const float* from) {
        const int file = (int)(generator() % num_files);
        uint64_t count = 1;
        for (const uint64_t size : shape) {
            count *= size;
        }
        headers[file].push_back({name, dtype, shape, 0, 0});
        values[file].insert(values[file].end(), from, from + count);
        weight_map[name] = file_name(file);
    };
    const std::vector<ParameterTensor>& tensors = model.parameters().tensors;
    for (size_t i = tensors.size(); i-- > 0;) {
        for (const HuggingFaceSlice& slice : tensors[i].slices) {
            add(slice.name, checkpoint::slice_shape(tensors[i], slice),
                model.state[0][i].data() + slice.row_begin * tensors[i].cols);
        }
    }
    const std::vector<float> nine(9, 9.0f);
    for (const std::string& name : extra) {
        add(name, {9}, nine.data());
    }
    for (int i = 0; i < num_files; ++i) {
        SafetensorsWriter writer(folder + "/" + file_name(i), headers[i], {});
        writer.write(values[i].data(), values[i].size());
        writer.finish();
    }
    if (num_files > 1) {
        write_bytes(folder + "/model.safetensors.index.json",
                    Json({{"metadata", {{"total_size", 1}}}, {"weight_map", weight_map}}).dump());
    }
}

TEST_F(Checkpoint, AnyLlamaFolderLoads) {
    int i = 0;
    for (const bool tied : {true, false}) {
        for (const Dtype dtype : {Dtype::F32, Dtype::F16, Dtype::BF16}) {
            for (const int num_files : {1, 4}) {
                const StateModel model(small_model(tied), 1);
                StateModel loaded(small_model(tied), 0);
                const std::string folder = folder_ + "/foreign" + std::to_string(i++);
                write_foreign_folder(folder, model, dtype, num_files, {"model.layers.0.self_attn.rotary_emb.inv_freq"});
                load_model(loaded, folder);
                for (size_t t = 0; t < model.state[0].size(); ++t) {
                    for (size_t j = 0; j < model.state[0][t].size(); ++j) {
                        const float x = model.state[0][t][j];
                        ASSERT_EQ(loaded.state[0][t][j], dtype == Dtype::F32   ? x
                                                         : dtype == Dtype::F16 ? fp16_to_float(float_to_fp16(x))
                                                                               : bf16_to_float(float_to_bf16(x)));
                    }
                    ASSERT_TRUE(std::isnan(loaded.state[1][t][0])) << "the optimizer is not touched";
                }
            }
        }
    }
}

TEST_F(Checkpoint, ForeignFoldersThatAreNotLlamasAreRefused) {
    const StateModel tied(small_model(true), 1), untied(small_model(false), 1);
    const auto refused = [&](const std::string& folder, bool is_tied, const std::string& words) {
        StateModel loaded(small_model(is_tied), 0);
        EXPECT_MESSAGE(load_model(loaded, folder), words);
        EXPECT_TRUE(loaded.untouched());
    };
    int i = 0;
    const auto next = [&] { return folder_ + "/f" + std::to_string(i++); };
    std::string folder = next();
    {
        // A classifier of its own beside an embedding that config.json says it shares: nobody knows which is meant.
        const auto say_tied = [](const std::string& of) {
            write_bytes(of + "/config.json", hf_config_json(small_model(true), 64, false, {}).dump());
        };
        write_foreign_folder(folder, untied, Dtype::F32, 1);
        say_tied(folder);
        refused(folder, true, "lm_head.weight is another than model.embed_tokens.weight");
        write_foreign_folder(folder = next(), tied, Dtype::F32, 1, {"lm_head.weight"});
        refused(folder, true, "lm_head.weight is another than model.embed_tokens.weight");
        StateModel same(small_model(false), 1);
        const ParameterTable& table = same.parameters();
        same.state[0][table.classifier] = same.state[0][table.embedding];
        write_foreign_folder(folder = next(), same, Dtype::BF16, 3);
        say_tied(folder);
        StateModel loaded(small_model(true), 0);
        load_model(loaded, folder);
        EXPECT_EQ(loaded.state[0][0][1], bf16_to_float(float_to_bf16(same.state[0][table.embedding][1])));
    }
    write_foreign_folder(folder = next(), tied, Dtype::F32, 2, {"model.layers.0.self_attn.q_proj.bias"});
    refused(folder, true, "has the tensor model.layers.0.self_attn.q_proj.bias");
    write_foreign_folder(folder = next(), tied, Dtype::F32, 1, {"model.layers.0.self_attn.q_norm.weight"});
    refused(folder, true, "q_norm.weight, which a Llama of its config.json has not");
    fs::create_directory(folder = next());
    write_bytes(folder + "/config.json", hf_config_json(tied.config(), 1, false, {}).dump());
    refused(folder, true, "holds neither model.safetensors nor model.safetensors.index.json");
    refused(folder_ + "/none", true, "/none");

    // Sharded folders whose index and files disagree.
    const auto sharded = [&] {
        folder = next();
        write_foreign_folder(folder, untied, Dtype::BF16, 3);
        return folder + "/model.safetensors.index.json";
    };
    std::string index = sharded();
    fs::remove(folder + "/model-00002-of-00003.safetensors");
    refused(folder, false, "model-00002-of-00003.safetensors: cannot open");
    index = sharded();
    fs::copy_file(folder + "/model-00002-of-00003.safetensors", folder + "/model-00001-of-00003.safetensors",
                  fs::copy_options::overwrite_existing);
    refused(folder, false, "which is also in");
    const auto change_index = [&](auto change) {
        index = sharded();
        Json json = Json::parse(read_bytes(index));
        change(json["weight_map"]);
        write_bytes(index, json.dump());
    };
    change_index([](Json& map) { map["model.norm.weight"] = "../model-00001-of-00003.safetensors"; });
    refused(folder, false, "the file of tensor model.norm.weight must be a name in this folder");
    change_index([](Json& map) { map["model.norm.weight"] = 3; });
    refused(folder, false, "the file of tensor model.norm.weight must be a name in this folder");
    change_index([](Json& map) { map["none"] = map["model.norm.weight"]; });
    refused(folder, false, "tensor none is not in");
    change_index([](Json& map) { map = "x"; });
    refused(folder, false, "\"weight_map\" must give a file");
    index = sharded();
    write_bytes(index, "{\"weight_map\":{\"a\":\"b\"");
    refused(folder, false, "is not valid JSON");
    index = sharded();
    fs::resize_file(folder + "/model-00003-of-00003.safetensors", 1000);
    refused(folder, false, "model-00003-of-00003.safetensors: ");
}

TEST_F(Checkpoint, ItsOwnWeightsAreVerifiedAsAStart) {
    StateModel model(small_model(true), 1), loaded(small_model(true), 0);
    const std::string folder = save(model, 1), path = folder + "/model.safetensors";
    std::string bytes = read_bytes(path);
    bytes[bytes.size() - 2] ^= 1;
    write_bytes(path, bytes);
    EXPECT_MESSAGE(load_model(loaded, folder), path + ": is damaged");
    EXPECT_TRUE(loaded.untouched());
    fs::remove(folder + "/manifest.json");
    load_model(loaded, folder);
    EXPECT_NE(loaded.state[0], model.state[0]) << "without a manifest it is a folder like others";
}

TEST_F(Checkpoint, AManifestOfAnotherToolIsNotOurs) {
    StateModel model(small_model(true), 1);
    const std::string folder = save(model, 1), path = folder + "/manifest.json", whole = read_bytes(path);
    const auto loads = [&](const std::string& manifest) {
        write_bytes(path, manifest);
        StateModel loaded(small_model(true), 0);
        check_holds_model(folder, loaded.config());
        load_model(loaded, folder);
        EXPECT_EQ(loaded.state[0], model.state[0]) << manifest;
    };
    const auto refused = [&](const std::string& manifest) {
        write_bytes(path, manifest);
        StateModel loaded(small_model(true), 0);
        EXPECT_MESSAGE(check_holds_model(folder, loaded.config()), path + ": ");
        EXPECT_MESSAGE(load_model(loaded, folder), path + ": ");
        EXPECT_TRUE(loaded.untouched()) << manifest;
    };
    const std::string foreign[] = {"{\"files\": {\"model.safetensors\": \"sha256:00\"}}",
                                   "[1, 2]",
                                   "{\"format\": 3}",
                                   "{\"name\": \"x\"",
                                   "schema: 2\n",
                                   ""};
    // Beside the state of a run, whatever is no manifest of ours is a damaged one.
    for (size_t length = 0; length < whole.size(); ++length) {
        refused(whole.substr(0, length));
    }
    for (const std::string& text : foreign) {
        refused(text);
    }
    loads(whole);
    fs::rename(folder + "/state.json", folder_ + "/state.json");
    refused(foreign[0]);  // the optimizer is there
    for (const std::string& name : names(folder)) {
        if (name.rfind("optimizer-", 0) == 0) {
            fs::remove(folder + "/" + name);
        }
    }
    fs::rename(folder_ + "/state.json", folder + "/state.json");
    refused(foreign[0]);
    fs::remove(folder + "/state.json");
    for (const std::string& text : foreign) {
        loads(text);
    }
    loads(whole);
    refused(whole.substr(0, whole.size() / 2));
}

TEST_F(Checkpoint, NamesThatLeaveTheFolderAreRefused) {
    for (const char* name : {"../x", "/etc/passwd", "a/b", "..", ".", ""}) {
        const std::string text = checkpoint::manifest_text({{name, {1, 2}}});
        EXPECT_MESSAGE(checkpoint::parse_manifest(text, "m"), "is not the name of a file in this folder");
    }
}

TEST_F(Checkpoint, StatesThatCannotBeAreRefused) {
    const std::string whole = checkpoint::state_text(state_, config_);
    EXPECT_EQ(checkpoint::parse_state(whole, "s").data_position, state_.data_position);
    const auto refused = [&](const char* name, const Json& value, const std::string& words) {
        Json json = Json::parse(whole);
        json[name] = value;
        EXPECT_MESSAGE(checkpoint::parse_state(json.dump(), "s"), words);
    };
    refused("step", -1, "s: \"step\" is -1");
    refused("step", 3.5, "s: \"step\" is 3.5");
    refused("step", nullptr, "s: lacks \"step\"");
    refused("step", (uint64_t)1 << 63, "s: \"step\" is 9223372036854775808");
    refused("adam_step", 401, "s: \"adam_step\" is 401, must be a whole number from 0 to 400");
    refused("data_position", "x", "\"data_position\"");
    refused("skipped", 401, "\"skipped\"");
    refused("skipped_in_a_row", 4, "\"skipped_in_a_row\" is 4");
    refused("version", 2, "not a training state of version 1");
    refused("format", "x", "not a training state");
    refused("data", 3, "\"data\" is 3, must be a text");
    refused("settings", {{"attention", "sparse"}}, "s: \"settings\": \"attention\" must be dense or lighthouse");
    refused("settings", {{"attention", 1}}, "\"attention\" is 1, must be a text");
    refused("settings", {{"attention", "dense"}, {"lighthouse_steps", "x"}}, "\"lighthouse_steps\"");
}

TEST_F(Checkpoint, AStateSaysTheAttentionOfItsLastStep) {
    const AttentionMode L = AttentionMode::lighthouse, D = AttentionMode::dense;
    const auto read_back = [&] {
        return checkpoint::parse_state(checkpoint::state_text(state_, config_), "s").attention;
    };
    EXPECT_EQ(read_back(), D);
    config_.attention = L;
    EXPECT_EQ(read_back(), L);
    config_.lighthouse_steps = state_.step;
    EXPECT_EQ(read_back(), L) << "the next step switches";
    config_.lighthouse_steps = state_.step - 1;
    EXPECT_EQ(read_back(), D);
    state_ = TrainingState();
    EXPECT_EQ(read_back(), std::nullopt) << "no step";
}
