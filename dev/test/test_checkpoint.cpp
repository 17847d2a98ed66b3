// test_checkpoint.cpp: checkpoints come back bit for bit, as folders that others can load; which is the newest, which
// stay, and who may write. What the disk does: test_checkpoint_disk.cpp; folders of others:
// test_checkpoint_folders.cpp.
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <set>

#include "checkpoint_testing.h"
#include "llmc/output_lock.h"

// ---- there and back

TEST_F(Checkpoint, ComesBackBitForBit) {
    for (const bool tied : {true, false}) {
        for (const bool bf16 : {false, true}) {
            for (const uint64_t shard_bytes : {(uint64_t)1, (uint64_t)3000, checkpoint::OPTIMIZER_SHARD_BYTES}) {
                fs::remove_all(run_);
                make_folder("run");
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
    const std::string tied_folder = save_checkpoint(tied, state_, config_, false, make_folder("tied"));
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
    EXPECT_EQ(read_bytes(folder + "/tokenizer.model"), byte_sentencepiece_model(true));
    EXPECT_EQ(read_json(folder + "/tokenizer_config.json")["add_bos_token"], true);

    config_.byte_markers = false;
    folder = save_checkpoint(model, state_, config_, false, make_folder("unmarked"));
    EXPECT_TRUE(read_json(folder + "/config.json")["bos_token_id"].is_null());
    EXPECT_TRUE(read_json(folder + "/tokenizer.json")["post_processor"].is_null());
    EXPECT_EQ(read_bytes(folder + "/tokenizer.model"), byte_sentencepiece_model(false));
    EXPECT_EQ(read_json(folder + "/tokenizer_config.json")["add_bos_token"], false);
    folder = save_checkpoint(other, state_, config_, false, make_folder("other"));
    EXPECT_TRUE(read_json(folder + "/config.json")["eos_token_id"].is_null());
    EXPECT_FALSE(fs::exists(folder + "/tokenizer.json")) << "which tokenizer is not known";
    EXPECT_FALSE(fs::exists(folder + "/tokenizer.model"));
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

// Of the two files that can hold the tokenizer of bytes one may be missing; neither may be another's.
TEST_F(Checkpoint, EveryTokenizerFileMustBeThatOfBytes) {
    ModelConfig bytes = small_model(true);
    bytes.vocab_size = 258;
    StateModel model(bytes, 1);
    for (const bool markers : {false, true}) {
        config_.byte_markers = markers;
        const std::string folder =
            save_checkpoint(model, state_, config_, false, make_folder(markers ? "marked" : "unmarked"));
        using checkpoint::reads_bytes;
        const checkpoint::Companions again = checkpoint::read_companions(folder, config_, bytes, false);
        EXPECT_EQ(again.files, checkpoint::read_companions("", config_, bytes, true).files);
        EXPECT_TRUE(reads_bytes(again));
        checkpoint::Companions without_model = again, without_json = again;
        without_model.files.erase("tokenizer.model"), without_json.files.erase("tokenizer.json");
        EXPECT_TRUE(reads_bytes(without_model)) << "of before it was written";
        EXPECT_TRUE(reads_bytes(without_json));
        for (checkpoint::Companions companions : {again, without_json}) {
            companions.files["tokenizer.model"].pop_back();
            EXPECT_FALSE(reads_bytes(companions));
        }
        for (const char* name : {"tokenizer.json", "tokenizer.model", "vocab.json"}) {
            checkpoint::Companions companions = again;
            companions.files[name] = "of others";
            EXPECT_FALSE(reads_bytes(companions)) << name;
        }
    }
    EXPECT_TRUE(checkpoint::reads_bytes(checkpoint::Companions())) << "no tokenizer at all";
}

// A model that is extended takes longer texts than its tokenizer's settings say; all else in them stays.
TEST_F(Checkpoint, TheTokenizerTakesTextsAsLongAsTheModel) {
    StateModel model(small_model(true), 1);
    const std::string start = save_checkpoint(model, state_, config_, false, make_folder("start"));
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
    const std::string start = save_checkpoint(model, state_, config_, false, make_folder("start"));
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

TEST_F(Checkpoint, CompanionsAreNotTakenFromADamagedCheckpoint) {
    ModelConfig bytes = small_model(true);
    bytes.vocab_size = 258;
    StateModel model(bytes, 1);
    const std::string before = save(model, 1), path = save(model, 2) + "/tokenizer.json";
    std::string text = read_bytes(path);
    text[text.size() / 2] ^= 1;
    write_bytes(path, text);
    EXPECT_EQ(checkpoint::companion_source(folder_ + "/gone", run_), before);
}

TEST_F(Checkpoint, CompanionsOfACheckpointToStartFromAreWhatItsManifestSays) {
    ModelConfig bytes = small_model(true);
    bytes.vocab_size = 258;
    StateModel model(bytes, 1);
    const std::string folder = save(model, 1), path = folder + "/tokenizer.json", whole = read_bytes(path);
    const auto refusal = [&]() -> std::string {
        try {
            checkpoint::read_companions(folder, config_, bytes, true);
            return "";
        } catch (const Error& error) {
            return error.what();
        }
    };
    EXPECT_EQ(refusal(), "");
    write_bytes(path, whole.substr(0, whole.size() / 2));
    EXPECT_NE(refusal().find("/tokenizer.json: has "), std::string::npos) << refusal();
    write_bytes(path, std::string(whole.size(), ' '));
    EXPECT_NE(refusal().find("/tokenizer.json: is damaged"), std::string::npos) << refusal();
    fs::remove(path);
    EXPECT_EQ(refusal(), "") << "someone wants none";
    write_bytes(path, "{}");
    fs::remove(folder + "/manifest.json");
    fs::remove(folder + "/state.json");
    for (const std::string& name : names(folder)) {
        if (name.rfind("optimizer-", 0) == 0) {
            fs::remove(folder + "/" + name);
        }
    }
    EXPECT_EQ(refusal(), "") << "as another program may have left it";
}

TEST_F(Checkpoint, AFolderOfItsNameThatIsNoneIsKept) {
    StateModel model(small_model(true), 1);
    for (const char* aside : {"/step00000003-moved", "/step00000003-moved2"}) {
        fs::remove_all(run_ + "/step00000003");
        fs::create_directories(run_ + "/step00000003/mine");
        write_bytes(run_ + "/step00000003/mine/notes.txt", aside);
        testing::internal::CaptureStderr();
        EXPECT_EQ(save(model, 3), run_ + "/step00000003");
        EXPECT_NE(testing::internal::GetCapturedStderr().find("step00000003: is no checkpoint"), std::string::npos);
        EXPECT_EQ(read_bytes(run_ + aside + "/mine/notes.txt"), aside);
        EXPECT_EQ(find_newest_checkpoint(run_), run_ + "/step00000003");
    }
    save(model, 3);
    EXPECT_EQ(names(run_).size(), 3u) << "a checkpoint is replaced";
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
    std::map<int64_t, std::string> damaged;
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

// ---- the state

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
    refused("data_position", INT64_MAX, "\"data_position\" is 9223372036854775807");
    refused("sequences_per_step", 0, "\"sequences_per_step\" is 0");
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
