// test_checkpoint_folders.cpp: folders of other models and other tools: Llamas load, whatever their types and files,
// and what is none is refused.
#include "checkpoint_testing.h"

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
    refused([](ModelConfig& m) { m.norm_eps = 1e-6; }, "rms_norm_eps is 1e-05 and not 1e-06");
    ModelConfig rotated = small_model(false);
    rotated.rope_theta = 5e5, rotated.rope_scaling.factor = 8.0;
    StateModel extended(rotated, 0);
    EXPECT_NO_THROW(load_checkpoint(extended, folder)) << "a model's context may be extended";

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

// Compared in parts of 2^20 elements.
TEST_F(Checkpoint, AClassifierThatIsTheEmbeddingIsComparedToItsEnd) {
    ModelConfig large = small_model(false), tied = small_model(true);
    large.vocab_size = tied.vocab_size = ((int64_t)1 << 17) + 5;  // of 8 channels
    StateModel model(large, 1);
    const ParameterTable& table = model.parameters();
    model.state[0][table.classifier] = model.state[0][table.embedding];
    const auto message = [&] {
        const std::string folder = folder_ + "/shared";
        write_foreign_folder(folder, model, Dtype::BF16, 1);
        write_bytes(folder + "/config.json", hf_config_json(tied, 64, false, {}).dump());
        StateModel loaded(tied, 0);
        const std::string said = message_of([&] { load_model(loaded, folder); });
        fs::remove_all(folder);
        return said;
    };
    EXPECT_EQ(message(), "(no error)");
    model.state[0][table.classifier].back() += 1.0f;
    EXPECT_NE(message().find("lm_head.weight is another than"), std::string::npos);
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
