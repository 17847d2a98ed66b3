// test_model_config.cpp: what the presets and the table of parameters are, by numbers from elsewhere: published
// configurations and sizes, and the formulas of frequencies and initial weights.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "llmc/parameters.h"

namespace {

struct Shape {
    int64_t vocab_size;
    int num_layers, width, num_heads, num_kv_heads, head_dim, ffn_width;
    bool tied_embeddings;
    double rope_theta;
    int64_t max_positions;
    int64_t num_parameters;
};

void expect_shape(const std::string& preset, const Shape& shape) {
    SCOPED_TRACE(preset);
    const ModelConfig m = model_preset(preset);
    EXPECT_NO_THROW(validate(m));
    EXPECT_EQ(m.vocab_size, shape.vocab_size);
    EXPECT_EQ(m.num_layers, shape.num_layers);
    EXPECT_EQ(m.width, shape.width);
    EXPECT_EQ(m.num_heads, shape.num_heads);
    EXPECT_EQ(m.num_kv_heads, shape.num_kv_heads);
    EXPECT_EQ(m.head_dim, shape.head_dim);
    EXPECT_EQ(m.ffn_width, shape.ffn_width);
    EXPECT_EQ(m.tied_embeddings, shape.tied_embeddings);
    EXPECT_EQ(m.rope_theta, shape.rope_theta);
    EXPECT_EQ(m.norm_eps, 1e-5);
    EXPECT_EQ(m.init_std, 0.02);
    EXPECT_EQ(m.max_positions, shape.max_positions);
    EXPECT_EQ(make_parameter_table(m).num_elements(), shape.num_parameters);
}

void expect_frequencies(const ModelConfig& m, const std::map<int, double>& expected) {
    const std::vector<double> found = rope_inverse_frequencies(m);
    ASSERT_EQ(found.size(), (size_t)m.head_dim / 2);
    for (const auto& [i, frequency] : expected) {
        EXPECT_NEAR(found[i] / frequency, 1.0, 1e-12) << "pair " << i;
    }
}

}  // namespace

// ---- presets
TEST(ModelPreset, IsThePublishedShape) {
    // config.json of meta-llama/Llama-3.2-1B and of meta-llama/Meta-Llama-3-8B, and the sizes of these models.
    expect_shape("llama3.2-1b", {128256, 16, 2048, 32, 8, 64, 8192, true, 500000.0, 131072, 1235814400});
    expect_shape("llama3-8b", {128256, 32, 4096, 32, 8, 128, 14336, false, 500000.0, 8192, 8030261248});
    // 530 M: 2 x 128256 x 1024 + 30 x (4 x 1024^2 + 3 x 1024 x 1536 + 2 x 1024) + 1024
    expect_shape("lighthouse-530m", {128256, 30, 1024, 8, 8, 128, 1536, false, 10000.0, 0, 530117632});
    // 0.8 M: 258 x 128 + 4 x (128 x 256 + 128^2 + 3 x 128 x 384 + 2 x 128) + 128
    expect_shape("tiny", {258, 4, 128, 4, 2, 32, 384, true, 10000.0, 0, 820608});
}

TEST(ModelPreset, OnlyLlama32ScalesItsFrequencies) {
    const RopeScaling scaling = model_preset("llama3.2-1b").rope_scaling;
    EXPECT_EQ(scaling.factor, 32.0);
    EXPECT_EQ(scaling.low_freq_factor, 1.0);
    EXPECT_EQ(scaling.high_freq_factor, 4.0);
    EXPECT_EQ(scaling.original_max_positions, 8192);
    for (const char* preset : {"tiny", "lighthouse-530m", "llama3-8b"}) {
        EXPECT_EQ(model_preset(preset).rope_scaling.factor, 1.0) << preset;
    }
}

// ---- frequencies
TEST(RopeFrequencies, WithoutScalingArePowersOfTheta) {
    ModelConfig m;
    m.head_dim = 8, m.rope_theta = 10000.0;
    expect_frequencies(m, {{0, 1.0}, {1, 0.1}, {2, 0.01}, {3, 0.001}});
    m.head_dim = 128, m.rope_theta = 500000.0;  // of Llama 3 8B; pair 32 is 500000^-1/2
    expect_frequencies(m, {{0, 1.0}, {32, 0.001414213562373095}});
}

// Of Llama 3.2 1B, by transformers' formula (modeling_rope_utils.py, "llama3") in Python: f = 500000^(-2i/64) is kept
// where a turn takes less than 8192 / 4 positions, divided by 32 where it takes more than 8192, and between is
// (1 - s) f / 32 + s f, s = (8192 f / (2 pi) - 1) / (4 - 1).
TEST(RopeFrequencies, OfLlama32) {
    expect_frequencies(model_preset("llama3.2-1b"), {{0, 1.0},
                                                     {1, 0.66360123769608848},
                                                     {14, 0.0032114459947525913},
                                                     {15, 0.001290547928209264},  // s = 0.593 of 0.00213
                                                     {16, 0.00042955679655936815},
                                                     {17, 9.7082878026276702e-05},  // s = 0.075 of 0.00094
                                                     {18, 1.9461638184831125e-05},  // 0.00062 / 32
                                                     {31, 9.4183067254349087e-08}});
}

// ---- parameters
TEST(ParameterTable, InitialDeviationsAndWeightDecay) {
    ModelConfig m;
    m.num_layers = 8, m.init_std = 0.02, m.tied_embeddings = false;
    struct Kind {
        double init_std;  // 0: ones
        bool decay;
    };
    const std::map<std::string, Kind> kinds = {
        {"embedding", {0.02, false}},     {"attention_norm", {0.0, false}}, {"qkv", {0.02, true}},
        {"attention_out", {0.005, true}},  // writes the residual: 0.02 / sqrt(2 x 8)
        {"ffn_norm", {0.0, false}},       {"gate_up", {0.02, true}},        {"down", {0.005, true}},  // likewise
        {"final_norm", {0.0, false}},     {"classifier", {0.02, true}},
    };
    const ParameterTable untied = make_parameter_table(m);
    EXPECT_EQ(untied.tensors.size(), 3u + 8 * 6);
    for (const ParameterTensor& tensor : untied.tensors) {
        const Kind& kind = kinds.at(tensor.name.substr(tensor.name.find('.') + 1));  // behind "layer7."
        EXPECT_NEAR(tensor.init_std, kind.init_std, 1e-15) << tensor.name;
        EXPECT_EQ(tensor.decay, kind.decay) << tensor.name;
    }
    m.tied_embeddings = true;
    const ParameterTable tied = make_parameter_table(m);
    EXPECT_EQ(tied.tensors.size(), 2u + 8 * 6);
    EXPECT_EQ(tied.classifier, tied.embedding);
    EXPECT_FALSE(tied.tensors[tied.embedding].decay) << "as an embedding, though it is the classifier too";
}
