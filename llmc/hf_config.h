// hf_config.h: a Llama's shape in Hugging Face's config.json, read and written. Everything that would compute other
// numbers than llmc's model does is refused by name.
//
// RoPE stands in "rope_theta" and "rope_scaling" (transformers up to 4), or in "rope_parameters" (from 5 on). Both are
// read; both are written, so that tools of either kind agree.
#pragma once
#include <algorithm>
#include <limits>
#include <string>
#include <string_view>
#include <utility>

#include "json.h"
#include "model_config.h"

// ---- reading -----------------------------------------------------------------------------------

namespace hf_config {

// Throws Error when `name` is there with another value than `allowed`, the only one llmc's model computes.
inline void require(const JsonObject& config, const char* name, const JsonValue& allowed, const char* why) {
    CHECK(!config.has(name) || config.at(name) == allowed, "%s: \"%s\" is %s: %s", config.where().c_str(), name,
          JsonObject::shown(config.at(name)).c_str(), why);
}

// The frequency scaling in the entry `name`: "rope_scaling" or "rope_parameters".
inline RopeScaling parse_rope_scaling(const JsonObject& config, const char* name) {
    const JsonObject rope = config.object(name);
    for (const auto& [entry, value] : config.at(name).items()) {
        CHECK(!value.is_object(), "%s: \"%s\" is %s: RoPE that differs by the type of layer is not supported",
              rope.where().c_str(), printable(entry).c_str(), JsonObject::shown(value).c_str());
    }
    require(rope, "partial_rotary_factor", 1.0, "heads are rotated whole, or not at all");
    const std::string type = rope.text_or(rope.text_or("default", "type"), "rope_type");
    RopeScaling scaling;
    if (type == "default") {
        return scaling;
    }
    CHECK(type == "llama3", "%s: rope type '%s' is not supported, only 'default' and 'llama3'", rope.where().c_str(),
          printable(type).c_str());
    scaling.factor = rope.real("factor");
    scaling.low_freq_factor = rope.real("low_freq_factor");
    scaling.high_freq_factor = rope.real("high_freq_factor");
    scaling.original_max_positions = rope.integer("original_max_position_embeddings", 1, INT64_MAX);
    return scaling;
}

inline bool same_rope_scaling(const RopeScaling& a, const RopeScaling& b) {
    return a.factor == b.factor &&
           (!a.enabled() || (a.low_freq_factor == b.low_freq_factor && a.high_freq_factor == b.high_freq_factor &&
                             a.original_max_positions == b.original_max_positions));
}

inline void parse_rope(ModelConfig& m, const JsonObject& config) {
    const bool has_scaling = config.has("rope_scaling"), has_parameters = config.has("rope_parameters");
    m.rope_theta = config.real_or(m.rope_theta, "rope_theta");
    if (has_scaling) {
        m.rope_scaling = parse_rope_scaling(config, "rope_scaling");
        CHECK(config.object("rope_scaling").real_or(m.rope_theta, "rope_theta") == m.rope_theta,
              "%s: the \"rope_theta\" in \"rope_scaling\" contradicts the one beside it, which is %g where there is "
              "none: put it there",
              config.where().c_str(), m.rope_theta);
    }
    if (has_parameters) {
        const RopeScaling scaling = parse_rope_scaling(config, "rope_parameters");
        const double theta = config.object("rope_parameters").real_or(m.rope_theta, "rope_theta");
        CHECK((!has_scaling || same_rope_scaling(scaling, m.rope_scaling)) &&
                  (!config.has("rope_theta") || theta == m.rope_theta),
              "%s: \"rope_parameters\" contradicts \"rope_theta\" or \"rope_scaling\": leave one of them",
              config.where().c_str());
        m.rope_scaling = scaling, m.rope_theta = theta;
    }
}

}  // namespace hf_config

// The model that a config.json with this text describes. Throws Error, naming `path` and the entry, for text that is no
// such file, for another kind of model, and for a shape that breaks a rule of validate(ModelConfig).
inline ModelConfig parse_hf_config(std::string_view text, const std::string& path) {
    const JsonValue json = parse_json(text, path);
    const JsonObject config(json, path);

    CHECK(config.has("model_type"), "%s: lacks \"model_type\": not the config.json of a Hugging Face model",
          path.c_str());
    hf_config::require(config, "model_type", "llama", "only Llama models (\"llama\") are supported");
    if (config.has("architectures")) {
        const JsonValue& architectures = config.at("architectures");
        CHECK(architectures.is_array() && architectures.size() == 1 && architectures[0] == "LlamaForCausalLM",
              "%s: \"architectures\" is %s: only [\"LlamaForCausalLM\"] is supported", path.c_str(),
              JsonObject::shown(architectures).c_str());
    }
    hf_config::require(config, "hidden_act", "silu", "only \"silu\" is supported");
    hf_config::require(config, "attention_bias", false, "biases are not supported");
    hf_config::require(config, "mlp_bias", false, "biases are not supported");
    hf_config::require(config, "attention_dropout", 0.0, "dropout is not supported");
    hf_config::require(config, "sliding_window", nullptr, "attention windows are not supported");
    hf_config::require(config, "partial_rotary_factor", 1.0, "heads are rotated whole, or not at all");
    hf_config::require(config, "quantization_config", nullptr,
                       "quantized weights are not supported; take the model's F32, F16 or BF16 weights");

    constexpr int64_t MAX_INT = std::numeric_limits<int>::max();
    const auto size = [&](const char* name) { return (int)config.integer(name, 1, MAX_INT); };
    ModelConfig m;
    m.vocab_size = config.integer("vocab_size", 1, MAX_INT);
    m.num_layers = size("num_hidden_layers");
    m.width = size("hidden_size");
    m.ffn_width = size("intermediate_size");
    m.num_heads = size("num_attention_heads");
    m.num_kv_heads = config.has("num_key_value_heads") ? size("num_key_value_heads") : m.num_heads;
    if (config.has("head_dim")) {
        m.head_dim = size("head_dim");
    } else {
        CHECK(m.width % m.num_heads == 0,
              "%s: \"hidden_size\" %d is not a multiple of \"num_attention_heads\" %d, and there is no \"head_dim\"",
              path.c_str(), m.width, m.num_heads);
        m.head_dim = m.width / m.num_heads;
    }
    // What transformers' LlamaConfig takes for absent entries.
    m.norm_eps = config.real_or(1e-6, "rms_norm_eps");
    m.tied_embeddings = config.boolean_or(false, "tie_word_embeddings");
    m.init_std = config.real_or(0.02, "initializer_range");
    m.max_positions = config.integer_or(2048, "max_position_embeddings", 1, INT64_MAX);
    m.rope_theta = 10000.0;
    hf_config::parse_rope(m, config);
    try {
        validate(m);
    } catch (const Error& error) {
        fail("%s: this shape is not supported: %s", path.c_str(), error.what());
    }
    return m;
}

// The model of a Hugging Face folder, from its config.json.
inline ModelConfig load_hf_config(const std::string& folder) {
    const std::string path = folder + "/config.json";
    return parse_hf_config(read_text_file(path), path);
}

// ---- comparing ---------------------------------------------------------------------------------

// The first entry of config.json, with both values, in which two models compute different numbers; empty when none.
inline std::string first_difference(const ModelConfig& a, const ModelConfig& b) {
    std::string difference;
    const auto compare = [&](const char* name, double x, double y) {
        if (x != y && difference.empty()) {
            difference = format_string("%s is %.10g and not %.10g", name, x, y);
        }
    };
    compare("vocab_size", (double)a.vocab_size, (double)b.vocab_size);
    compare("num_hidden_layers", a.num_layers, b.num_layers);
    compare("hidden_size", a.width, b.width);
    compare("intermediate_size", a.ffn_width, b.ffn_width);
    compare("num_attention_heads", a.num_heads, b.num_heads);
    compare("num_key_value_heads", a.num_kv_heads, b.num_kv_heads);
    compare("head_dim", a.head_dim, b.head_dim);
    compare("tie_word_embeddings", a.tied_embeddings, b.tied_embeddings);
    compare("rms_norm_eps", a.norm_eps, b.norm_eps);
    compare("rope_theta", a.rope_theta, b.rope_theta);
    compare("the RoPE scaling's factor", a.rope_scaling.factor, b.rope_scaling.factor);
    if (difference.empty() && !hf_config::same_rope_scaling(a.rope_scaling, b.rope_scaling)) {
        difference = "the RoPE scaling is another";
    }
    return difference;
}

// ---- writing -----------------------------------------------------------------------------------

// Special tokens of the vocabulary as config.json has them: a number, a list of numbers (Llama 3 has several ends), or
// null: none. Training does not look at them; they are carried on.
struct SpecialTokens {
    Json begin;    // "bos_token_id"
    Json end;      // "eos_token_id"
    Json padding;  // "pad_token_id"
};

// Those in a config.json; what is neither a number nor a list of numbers counts as none.
inline SpecialTokens parse_special_tokens(const JsonValue& config) {
    const auto token = [&](const char* name) -> Json {
        const JsonValue value = config.is_object() ? config.value(name, JsonValue()) : JsonValue();
        const auto is_number = [](const JsonValue& v) { return v.is_number_integer(); };
        const bool is_list = value.is_array() && !value.empty() && std::all_of(value.begin(), value.end(), is_number);
        return is_number(value) || is_list ? Json(value) : Json();
    };
    return {token("bos_token_id"), token("eos_token_id"), token("pad_token_id")};
}

// config.json of a LlamaForCausalLM. max_positions: the longest sequence it was made for, tokens; weights_bf16: the
// type of model.safetensors, else float32.
inline Json hf_config_json(const ModelConfig& m, int64_t max_positions, bool weights_bf16,
                           const SpecialTokens& tokens) {
    Json rope = {{"rope_type", m.rope_scaling.enabled() ? "llama3" : "default"}};
    if (m.rope_scaling.enabled()) {
        rope["factor"] = m.rope_scaling.factor;
        rope["low_freq_factor"] = m.rope_scaling.low_freq_factor;
        rope["high_freq_factor"] = m.rope_scaling.high_freq_factor;
        rope["original_max_position_embeddings"] = m.rope_scaling.original_max_positions;
    }
    const Json rope_scaling = m.rope_scaling.enabled() ? rope : Json(nullptr);
    rope["rope_theta"] = m.rope_theta;
    return {{"architectures", Json::array({"LlamaForCausalLM"})},
            {"model_type", "llama"},
            {"vocab_size", m.vocab_size},
            {"num_hidden_layers", m.num_layers},
            {"hidden_size", m.width},
            {"intermediate_size", m.ffn_width},
            {"num_attention_heads", m.num_heads},
            {"num_key_value_heads", m.num_kv_heads},
            {"head_dim", m.head_dim},
            {"hidden_act", "silu"},
            {"attention_bias", false},
            {"attention_dropout", 0.0},
            {"mlp_bias", false},
            {"rms_norm_eps", m.norm_eps},
            {"max_position_embeddings", max_positions},
            {"rope_theta", m.rope_theta},
            {"rope_scaling", rope_scaling},
            {"rope_parameters", rope},
            {"tie_word_embeddings", m.tied_embeddings},
            {"initializer_range", m.init_std},
            {"bos_token_id", tokens.begin},
            {"eos_token_id", tokens.end},
            {"pad_token_id", tokens.padding},
            {"torch_dtype", weights_bf16 ? "bfloat16" : "float32"},
            {"use_cache", true}};
}
