// test_hf_config.cpp: config.json of Hugging Face Llamas: both layouts of RoPE, defaults, everything that is refused.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "llmc/hf_config.h"

namespace {

// A config.json as transformers 4 writes it, with entries replaced, added (any value) or taken out (discarded).
std::string llama(const Json& changes = Json::object()) {
    Json config = {{"architectures", Json::array({"LlamaForCausalLM"})},
                   {"attention_bias", false},
                   {"attention_dropout", 0.0},
                   {"bos_token_id", 1},
                   {"eos_token_id", 2},
                   {"hidden_act", "silu"},
                   {"hidden_size", 64},
                   {"initializer_range", 0.02},
                   {"intermediate_size", 160},
                   {"max_position_embeddings", 4096},
                   {"mlp_bias", false},
                   {"model_type", "llama"},
                   {"num_attention_heads", 4},
                   {"num_hidden_layers", 3},
                   {"num_key_value_heads", 2},
                   {"pretraining_tp", 1},
                   {"rms_norm_eps", 1e-6},
                   {"rope_scaling", nullptr},
                   {"rope_theta", 500000.0},
                   {"tie_word_embeddings", true},
                   {"torch_dtype", "float32"},
                   {"transformers_version", "4.40.0"},
                   {"use_cache", true},
                   {"vocab_size", 320}};
    for (const auto& [name, value] : changes.items()) {
        config[name] = value;
    }
    return config.dump(2);
}
ModelConfig parse(const Json& changes = Json::object()) { return parse_hf_config(llama(changes), "m/config.json"); }

std::string refusal(const std::string& text) {
    try {
        parse_hf_config(text, "m/config.json");
    } catch (const Error& error) {
        EXPECT_EQ(std::string(error.what()).rfind("m/config.json", 0), 0u) << error.what();
        EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
        return error.what();
    }
    return "(accepted)";
}
#define EXPECT_REFUSED(text, words) EXPECT_NE(refusal(text).find(words), std::string::npos) << refusal(text)

const Json LLAMA3 = {{"rope_type", "llama3"},
                     {"factor", 32.0},
                     {"low_freq_factor", 1.0},
                     {"high_freq_factor", 4.0},
                     {"original_max_position_embeddings", 8192}};
Json with(Json object, const char* name, const Json& value) {
    object[name] = value;
    return object;
}
Json without(Json object, const char* name) {
    object.erase(name);
    return object;
}

}  // namespace

TEST(HfConfig, OldLayout) {
    const ModelConfig m = parse();
    EXPECT_EQ(m.vocab_size, 320);
    EXPECT_EQ(m.num_layers, 3);
    EXPECT_EQ(m.width, 64);
    EXPECT_EQ(m.ffn_width, 160);
    EXPECT_EQ(m.num_heads, 4);
    EXPECT_EQ(m.num_kv_heads, 2);
    EXPECT_EQ(m.head_dim, 16) << "hidden_size / num_attention_heads";
    EXPECT_EQ(m.norm_eps, 1e-6);
    EXPECT_EQ(m.rope_theta, 500000.0);
    EXPECT_TRUE(m.tied_embeddings);
    EXPECT_FALSE(m.rope_scaling.enabled());
    EXPECT_EQ(m.max_positions, 4096);
}

TEST(HfConfig, LlamaThreeScalingInAllLayouts) {
    const auto expect_llama3 = [](const ModelConfig& m) {
        EXPECT_EQ(m.rope_theta, 500000.0);
        EXPECT_EQ(m.rope_scaling.factor, 32.0);
        EXPECT_EQ(m.rope_scaling.low_freq_factor, 1.0);
        EXPECT_EQ(m.rope_scaling.high_freq_factor, 4.0);
        EXPECT_EQ(m.rope_scaling.original_max_positions, 8192);
    };
    const Json parameters = with(LLAMA3, "rope_theta", 500000.0);
    expect_llama3(parse({{"rope_scaling", LLAMA3}}));
    expect_llama3(parse({{"rope_scaling", with(without(LLAMA3, "rope_type"), "type", "llama3")}}));
    expect_llama3(parse({{"rope_parameters", parameters}, {"rope_theta", nullptr}}));
    expect_llama3(parse({{"rope_parameters", LLAMA3}}));                                // theta at the top
    expect_llama3(parse({{"rope_parameters", parameters}, {"rope_scaling", LLAMA3}}));  // both, and they agree
    // The new layout without scaling.
    const ModelConfig m =
        parse({{"rope_theta", nullptr}, {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 10000}}}});
    EXPECT_EQ(m.rope_theta, 10000.0);
    EXPECT_FALSE(m.rope_scaling.enabled());
}

TEST(HfConfig, AbsentEntriesAreWhatTransformersTakes) {
    const ModelConfig m = parse({{"num_key_value_heads", nullptr},
                                 {"rms_norm_eps", nullptr},
                                 {"rope_theta", nullptr},
                                 {"tie_word_embeddings", nullptr},
                                 {"max_position_embeddings", nullptr},
                                 {"initializer_range", nullptr},
                                 {"architectures", nullptr},
                                 {"attention_bias", nullptr},
                                 {"hidden_act", nullptr},
                                 {"head_dim", nullptr}});
    EXPECT_EQ(m.num_kv_heads, 4);
    EXPECT_EQ(m.norm_eps, 1e-6);
    EXPECT_EQ(m.rope_theta, 10000.0);
    EXPECT_FALSE(m.tied_embeddings);
    EXPECT_EQ(m.max_positions, 2048);
    EXPECT_EQ(m.init_std, 0.02);
    EXPECT_EQ(parse({{"head_dim", 24}}).head_dim, 24);
}

TEST(HfConfig, OtherModelsAreRefusedByName) {
    EXPECT_REFUSED(llama({{"model_type", "mistral"}}), "\"model_type\" is \"mistral\"");
    EXPECT_REFUSED(llama({{"model_type", nullptr}}), "lacks \"model_type\"");
    EXPECT_REFUSED(llama({{"architectures", {"LlamaForSequenceClassification", "x"}}}), "\"architectures\"");
    EXPECT_REFUSED(llama({{"architectures", "LlamaForCausalLM"}}), "\"architectures\"");
    EXPECT_REFUSED(llama({{"hidden_act", "gelu"}}), "\"hidden_act\" is \"gelu\"");
    EXPECT_REFUSED(llama({{"attention_bias", true}}), "\"attention_bias\" is true");
    EXPECT_REFUSED(llama({{"mlp_bias", true}}), "\"mlp_bias\" is true");
    EXPECT_REFUSED(llama({{"attention_dropout", 0.1}}), "\"attention_dropout\" is 0.1");
    EXPECT_REFUSED(llama({{"sliding_window", 4096}}), "\"sliding_window\" is 4096");
    EXPECT_REFUSED(llama({{"partial_rotary_factor", 0.5}}), "\"partial_rotary_factor\" is 0.5");
    EXPECT_REFUSED(llama({{"quantization_config", {{"bits", 4}}}}), "\"quantization_config\"");
    for (const char* type : {"linear", "dynamic", "yarn", "longrope", "su"}) {
        EXPECT_REFUSED(llama({{"rope_scaling", with(LLAMA3, "rope_type", type)}}), std::string("rope type '") + type);
        EXPECT_REFUSED(llama({{"rope_scaling", {{"type", type}, {"factor", 2.0}}}}), std::string("rope type '") + type);
        EXPECT_REFUSED(llama({{"rope_parameters", with(LLAMA3, "rope_type", type)}}),
                       std::string("rope type '") + type);
    }
}

TEST(HfConfig, RopeThatIsNotComputedIsRefused) {
    for (const char* name : {"rope_scaling", "rope_parameters"}) {
        const std::string where = std::string("m/config.json: \"") + name + "\": ";
        for (const Json& whole : {Json(1), Json(1.0), Json(nullptr)}) {
            EXPECT_EQ(parse({{name, with(LLAMA3, "partial_rotary_factor", whole)}}).rope_scaling.factor, 32.0);
        }
        for (const Json& part : {Json(0.5), Json(0), Json("1"), Json::array({1.0})}) {
            EXPECT_REFUSED(llama({{name, with(LLAMA3, "partial_rotary_factor", part)}}),
                           where + "\"partial_rotary_factor\" is " + part.dump() + ": heads are rotated whole");
        }
        const Json by_type = {{"full_attention", LLAMA3},
                              {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 10000.0}}}};
        EXPECT_REFUSED(llama({{name, by_type}}), where + "\"full_attention\" is {\"factor\":");
        EXPECT_REFUSED(llama({{name, with(LLAMA3, "sliding_attention", Json::object())}}),
                       where + "\"sliding_attention\" is {}: RoPE that differs by the type of layer");
    }
}

TEST(HfConfig, ContradictionsAreRefused) {
    EXPECT_REFUSED(llama({{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 10000.0}}}}), "contradicts");
    EXPECT_REFUSED(llama({{"rope_scaling", LLAMA3}, {"rope_parameters", with(LLAMA3, "factor", 8.0)}}), "contradicts");
    EXPECT_REFUSED(llama({{"rope_scaling", LLAMA3}, {"rope_parameters", {{"rope_type", "default"}}}}), "contradicts");
    EXPECT_REFUSED(llama({{"rope_scaling", with(LLAMA3, "rope_theta", 10000.0)}}), "contradicts");
}

TEST(HfConfig, ValuesThatCannotBeAreRefused) {
    for (const char* name :
         {"vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"}) {
        const std::string quoted = std::string("\"") + name + "\"";
        EXPECT_REFUSED(llama({{name, nullptr}}), "lacks " + quoted);
        for (const Json& value : {Json(0), Json(-5), Json(64.5), Json(64.0), Json("64"), Json(true), Json(1ll << 31),
                                  Json((uint64_t)-1), Json(INT64_MIN), Json::array({64}), Json::object()}) {
            EXPECT_REFUSED(llama({{name, value}}), quoted + " is");
        }
    }
    EXPECT_REFUSED(llama({{"head_dim", 0}}), "\"head_dim\" is 0");
    EXPECT_REFUSED(llama({{"head_dim", 20}}), "--head_dim 20: must be a multiple of 8");
    EXPECT_REFUSED(llama({{"num_attention_heads", 3}}), "\"hidden_size\" 64 is not a multiple");
    EXPECT_REFUSED(llama({{"num_key_value_heads", 3}}), "--num_kv_heads 3");
    EXPECT_REFUSED(llama({{"hidden_size", 60}, {"head_dim", 16}}), "--width 60");
    EXPECT_REFUSED(llama({{"rms_norm_eps", 0.0}}), "--norm_eps");
    EXPECT_REFUSED(llama({{"rms_norm_eps", "1e-6"}}), "\"rms_norm_eps\" is \"1e-6\"");
    EXPECT_REFUSED(llama({{"rope_theta", -1.0}}), "--rope_theta");
    EXPECT_REFUSED(llama({{"tie_word_embeddings", 1}}), "\"tie_word_embeddings\" is 1");
    EXPECT_REFUSED(llama({{"max_position_embeddings", -1}}), "\"max_position_embeddings\" is -1");
    EXPECT_REFUSED(llama({{"rope_scaling", "llama3"}}), "\"rope_scaling\": must hold a JSON object");
    for (const char* name : {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}) {
        EXPECT_REFUSED(llama({{"rope_scaling", without(LLAMA3, name)}}), std::string("lacks \"") + name);
        EXPECT_REFUSED(llama({{"rope_scaling", with(LLAMA3, name, -2)}}), "m/config.json");
    }
}

TEST(HfConfig, TextThatIsNoConfigIsRefused) {
    EXPECT_REFUSED("", "not valid JSON: it ends, after 0 bytes");
    EXPECT_REFUSED("{\"hidden_size\": 32", "not valid JSON: it ends");
    EXPECT_REFUSED("{\"hidden_size\": x}", "not valid JSON at byte 17 of 18");
    EXPECT_REFUSED("[]", "must hold a JSON object");
    EXPECT_REFUSED("null", "must hold a JSON object");
    EXPECT_REFUSED("{}", "lacks \"model_type\"");
    EXPECT_REFUSED("{\"model_type\":\"llama\",\"model_type\":\"llama\"}", "'model_type' twice");
    EXPECT_REFUSED(llama() + "x", "not valid JSON");
    const std::string whole = llama();
    for (size_t length = 0; length < whole.size(); ++length) {
        ASSERT_NE(refusal(whole.substr(0, length)), "(accepted)") << length;
    }
    EXPECT_THROW(load_hf_config("/nonexistent"), Error);
}

TEST(HfConfig, WhatIsNoFileIsRefusedAndNotWaitedFor) {
    std::string folder = testing::TempDir() + "llmc_hf_config_XXXXXX";
    ASSERT_NE(mkdtemp(folder.data()), nullptr);
    const std::string path = folder + "/config.json";
    const auto said = [&] {
        try {
            load_hf_config(folder);
        } catch (const Error& error) {
            return std::string(error.what());
        }
        return std::string("(accepted)");
    };
    EXPECT_EQ(said(), path + ": cannot open: No such file or directory");
    ASSERT_EQ(mkfifo(path.c_str(), 0666), 0);
    EXPECT_EQ(said(), path + ": is a device or pipe, not a file");
    unlink(path.c_str());
    ASSERT_EQ(mkdir(path.c_str(), 0777), 0);
    EXPECT_EQ(said(), path + ": is a folder, not a file");
    rmdir(path.c_str());
    std::ofstream(path) << llama();
    EXPECT_EQ(load_hf_config(folder).width, 64);
    const std::string link = folder + "/link";
    ASSERT_EQ(symlink(folder.c_str(), link.c_str()), 0);
    EXPECT_EQ(load_hf_config(link).width, 64);
    ASSERT_EQ(truncate(path.c_str(), ((off_t)100 << 20) + 1), 0);
    EXPECT_EQ(said(), path + ": is not a text file of at most 100 MiB");
    EXPECT_EQ(std::system(("rm -r '" + folder + "'").c_str()), 0);
}

TEST(HfConfig, PresetsComeBackAsTheyWere) {
    for (const char* name : {"tiny", "lighthouse-530m", "llama3.2-1b", "llama3-8b"}) {
        const ModelConfig m = model_preset(name);
        const Json json = hf_config_json(m, 777, true, {5, 6, nullptr});
        const ModelConfig read = parse_hf_config(json.dump(), "m/config.json");
        EXPECT_EQ(first_difference(m, read), "") << name;
        EXPECT_EQ(read.init_std, m.init_std);
        EXPECT_EQ(read.max_positions, 777);
        EXPECT_EQ(json["torch_dtype"], "bfloat16");
        EXPECT_EQ(json["eos_token_id"], 6);
        // Tools that know one layout of RoPE only.
        Json old_layout = without(json, "rope_parameters"),
             new_layout = without(without(json, "rope_scaling"), "rope_theta");
        EXPECT_EQ(first_difference(m, parse_hf_config(old_layout.dump(), "m/config.json")), "") << name;
        EXPECT_EQ(first_difference(m, parse_hf_config(new_layout.dump(), "m/config.json")), "") << name;
    }
    EXPECT_TRUE(hf_config_json(ModelConfig(), 1, false, {}).at("bos_token_id").is_null());
}

TEST(HfConfig, SpecialTokensComeBackAsTheyWere) {
    const auto again = [](const JsonValue& config) {
        return hf_config_json(ModelConfig(), 1, false, parse_special_tokens(config));
    };
    const Json several =
        again({{"bos_token_id", 128000}, {"eos_token_id", {128001, 128008}}, {"pad_token_id", 128004}});
    EXPECT_EQ(several["bos_token_id"], 128000);
    EXPECT_EQ(several["eos_token_id"], (Json{128001, 128008}));
    EXPECT_EQ(several["pad_token_id"], 128004);
    const Json old = again({{"eos_token_id", 0}, {"pad_token_id", -1}});  // as the first Llama's had it
    EXPECT_TRUE(old["bos_token_id"].is_null());
    EXPECT_EQ(old["eos_token_id"], 0);
    EXPECT_EQ(old["pad_token_id"], -1);
    const Json none =
        again({{"bos_token_id", "<s>"}, {"eos_token_id", {1, "x"}}, {"pad_token_id", JsonValue::array()}});
    for (const char* name : {"bos_token_id", "eos_token_id", "pad_token_id"}) {
        EXPECT_TRUE(none[name].is_null()) << name;
    }
    EXPECT_TRUE(again(JsonValue::array())["bos_token_id"].is_null());
}

TEST(HfConfig, DifferencesAreNamed) {
    const ModelConfig m = model_preset("llama3.2-1b");
    const auto difference = [&](auto change) {
        ModelConfig other = m;
        change(other);
        return first_difference(other, m);
    };
    EXPECT_EQ(difference([](ModelConfig&) {}), "");
    EXPECT_EQ(difference([](ModelConfig& o) { o.init_std = 1, o.max_positions = 1; }), "")
        << "the numbers are the same";
    EXPECT_EQ(difference([](ModelConfig& o) { o.width = 8; }), "hidden_size is 8 and not 2048");
    EXPECT_NE(difference([](ModelConfig& o) { o.vocab_size++; }), "");
    EXPECT_NE(difference([](ModelConfig& o) { o.num_layers++; }), "");
    EXPECT_NE(difference([](ModelConfig& o) { o.ffn_width++; }), "");
    EXPECT_NE(difference([](ModelConfig& o) { o.num_heads++; }), "");
    EXPECT_NE(difference([](ModelConfig& o) { o.num_kv_heads++; }), "");
    EXPECT_NE(difference([](ModelConfig& o) { o.head_dim++; }), "");
    EXPECT_NE(difference([](ModelConfig& o) { o.tied_embeddings = false; }), "");
    EXPECT_NE(difference([](ModelConfig& o) { o.norm_eps *= 2; }), "");
    EXPECT_NE(difference([](ModelConfig& o) { o.rope_theta++; }), "");
    EXPECT_NE(difference([](ModelConfig& o) { o.rope_scaling.factor++; }), "");
    EXPECT_NE(difference([](ModelConfig& o) { o.rope_scaling.low_freq_factor++; }), "");
    EXPECT_NE(difference([](ModelConfig& o) { o.rope_scaling.high_freq_factor++; }), "");
    EXPECT_NE(difference([](ModelConfig& o) { o.rope_scaling.original_max_positions++; }), "");
}
