// parameters.h: every trainable tensor, once: name, shape, initialisation, weight decay and Hugging Face names. The
// structs of both trainers, their sizes, checkpoints and tests all come from this table.
//
// Every matrix is [rows, cols] = [outputs, inputs] row-major, as in Hugging Face. Fused matrices (q, k, v; gate, up)
// are stacked by rows, so each Hugging Face tensor is a contiguous range of rows of one of ours.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "model_config.h"

// One Hugging Face tensor: rows [row_begin, row_begin + num_rows) of the fused one.
struct HuggingFaceSlice {
    std::string name;
    int64_t row_begin = 0;
    int64_t num_rows = 0;
};

struct ParameterTensor {
    std::string name;        // "layer3.qkv"
    int64_t rows = 0;        // outputs; 1 for a norm's weight
    int64_t cols = 0;        // inputs
    double init_std = 0.0;   // of a normal distribution; 0: all ones
    bool is_vector = false;  // a norm's weight: Hugging Face shape [cols] rather than [rows, cols]
    bool decay = false;      // weight decay by default: matrices yes, norms and embeddings no
    std::vector<HuggingFaceSlice> slices;

    int64_t num_elements() const { return rows * cols; }
};

// Indices into ParameterTable::tensors of one decoder block.
struct LayerParameters {
    int attention_norm;  // [C]
    int qkv;             // [(H + 2 Hkv) D, C]
    int attention_out;   // [C, H D]
    int ffn_norm;        // [C]
    int gate_up;         // [2 F, C]
    int down;            // [C, F]
};

struct ParameterTable {
    std::vector<ParameterTensor> tensors;  // in order of execution
    int embedding = 0;                     // [V, C]
    std::vector<LayerParameters> layers;
    int final_norm = 0;  // [C]
    int classifier = 0;  // [V, C]; the embedding's index when tied

    int64_t num_elements() const {
        int64_t n = 0;
        for (const ParameterTensor& t : tensors) {
            n += t.num_elements();
        }
        return n;
    }
};

inline ParameterTable make_parameter_table(const ModelConfig& m) {
    ParameterTable table;
    auto add = [&](std::string name, int64_t rows, int64_t cols, double init_std, bool is_vector, bool decay,
                   std::vector<HuggingFaceSlice> slices) {
        table.tensors.push_back({std::move(name), rows, cols, init_std, is_vector, decay, std::move(slices)});
        return (int)table.tensors.size() - 1;
    };
    auto add_norm = [&](const std::string& name, const std::string& hf) {
        return add(name, 1, m.width, 0.0, true, false, {{hf, 0, 1}});
    };
    const int64_t V = m.vocab_size, C = m.width, F = m.ffn_width;
    const int64_t q_rows = m.attention_width(), kv_rows = (int64_t)m.num_kv_heads * m.head_dim;
    const double residual_std = m.init_std / std::sqrt(2.0 * m.num_layers);

    table.embedding = add("embedding", V, C, m.init_std, false, false, {{"model.embed_tokens.weight", 0, V}});
    for (int l = 0; l < m.num_layers; ++l) {
        const std::string name = "layer" + std::to_string(l) + ".";
        const std::string hf = "model.layers." + std::to_string(l) + ".";
        LayerParameters layer;
        layer.attention_norm = add_norm(name + "attention_norm", hf + "input_layernorm.weight");
        layer.qkv = add(name + "qkv", q_rows + 2 * kv_rows, C, m.init_std, false, true,
                        {{hf + "self_attn.q_proj.weight", 0, q_rows},
                         {hf + "self_attn.k_proj.weight", q_rows, kv_rows},
                         {hf + "self_attn.v_proj.weight", q_rows + kv_rows, kv_rows}});
        layer.attention_out =
            add(name + "attention_out", C, q_rows, residual_std, false, true, {{hf + "self_attn.o_proj.weight", 0, C}});
        layer.ffn_norm = add_norm(name + "ffn_norm", hf + "post_attention_layernorm.weight");
        layer.gate_up = add(name + "gate_up", 2 * F, C, m.init_std, false, true,
                            {{hf + "mlp.gate_proj.weight", 0, F}, {hf + "mlp.up_proj.weight", F, F}});
        layer.down = add(name + "down", C, F, residual_std, false, true, {{hf + "mlp.down_proj.weight", 0, C}});
        table.layers.push_back(layer);
    }
    table.final_norm = add_norm("final_norm", "model.norm.weight");
    table.classifier = m.tied_embeddings ? table.embedding
                                         : add("classifier", V, C, m.init_std, false, true, {{"lm_head.weight", 0, V}});
    return table;
}
