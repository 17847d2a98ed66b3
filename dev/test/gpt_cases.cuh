// gpt_cases.cuh: the models and batches that test_gpt.cu runs: shapes that hurt, random weights, random tokens.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "dev/cuda/harness.cuh"  // random numbers
#include "llmc/model.cuh"        // settings

// ---- cases -------------------------------------------------------------------------------------
struct Case {
    std::string name;
    ModelConfig config;
    int B;
    int64_t T;
    int num_micro_batches = 1;
    int64_t classifier_chunk_rows = 0;
    std::optional<LighthouseConfig> lighthouse = {};

    AttentionMode attention() const { return lighthouse ? AttentionMode::lighthouse : AttentionMode::dense; }
    GpuModelSettings settings(Recompute recompute, bool deterministic, Offload offload = Offload::none) const {
        GpuModelSettings s;
        s.max_batch_size = B, s.max_seq_len = T;
        s.recompute = recompute, s.deterministic = deterministic, s.offload = offload;
        s.optimizer_chunk_elements = 4096;  // several, in models as small as these
        s.classifier_chunk_rows = classifier_chunk_rows;
        s.lighthouse = lighthouse;
        return s;
    }
    double loss_weight(int micro_batch) const {  // not all the same; their sum is 1
        return num_micro_batches == 1 ? 1.0 : micro_batch == 0 ? 0.75 : 0.25 / (num_micro_batches - 1);
    }
};

inline ModelConfig model_config(int64_t V, int layers, int C, int H, int Hkv, int D, int F, bool tied) {
    ModelConfig m;
    m.vocab_size = V, m.num_layers = layers, m.width = C, m.num_heads = H, m.num_kv_heads = Hkv, m.head_dim = D;
    m.ffn_width = F, m.tied_embeddings = tied;
    return m;
}
inline LighthouseConfig lighthouse_config(int levels, int pool, int64_t topk, std::vector<int> dense_layers) {
    LighthouseConfig lighthouse;
    lighthouse.levels = levels, lighthouse.pool = pool, lighthouse.topk = topk;
    lighthouse.dense_layers = std::move(dense_layers);
    return lighthouse;
}

// Gradients under Lighthouse attention are compared with a truth that selects on its own, so every entry must be
// selected: with two levels and 128 coarsest entries a tile all are, and rounding cannot change the choice. The
// layer on selections that leave entries out: dev/cuda/lighthouse_layer.cu.
inline std::vector<Case> compared_cases(bool small) {
    std::vector<Case> cases = {
        {"T past a tile, grouped queries, odd vocabulary, tied", model_config(37, 2, 32, 4, 2, 16, 40, true), 2, 70},
        {"Lighthouse in the middle, two micro-batches", model_config(19, 3, 32, 2, 1, 16, 24, false), 1, 256, 2, 0,
         lighthouse_config(2, 2, 128, {0, -1})},
    };
    if (small) {
        return cases;
    }
    cases.push_back(
        {"D 64, grouped queries, odd vocabulary, tied", model_config(1003, 3, 256, 8, 2, 64, 512, true), 2, 200});
    cases.push_back({"D 128, untied, chunks of rows in the classifier, three micro-batches",
                     model_config(517, 2, 256, 4, 4, 128, 384, false), 1, 333, 3, 128});
    cases.push_back({"D 40, a group of 8", model_config(50, 2, 136, 8, 1, 40, 72, false), 3, 65});
    cases.push_back({"D 256, one head", model_config(300, 1, 64, 1, 1, 256, 128, true), 1, 129});
    cases.push_back({"T = 1", model_config(12, 2, 64, 2, 1, 64, 64, true), 3, 1});
    Case scaled{"Llama-3 frequency scaling, D 64", model_config(130, 2, 128, 2, 2, 64, 128, true), 2, 384};
    scaled.config.rope_theta = 1000.0;
    scaled.config.rope_scaling = {4.0, 1.0, 4.0, 64};
    cases.push_back(scaled);
    cases.push_back({"Lighthouse, D 64, grouped queries, two tiles", model_config(77, 4, 128, 4, 2, 64, 192, true), 2,
                     1024, 1, 0, lighthouse_config(2, 4, 256, {0, -1})});
    cases.push_back({"Lighthouse in all layers, D 128", model_config(64, 2, 128, 2, 2, 128, 128, true), 1, 1024, 1, 0,
                     lighthouse_config(2, 8, 128, {})});
    cases.push_back({"vocabulary 16401, chunks of rows in the classifier, two micro-batches",
                     model_config(16401, 1, 64, 1, 1, 64, 64, true), 1, 200, 2, 128});
    return cases;
}
// Of these only bits are compared: selections that leave entries out, every scorer. Small: as short as leaves out some,
// 128 of 192.
inline std::vector<Case> selecting_cases(bool small) {
    const ModelConfig narrow = model_config(19, 3, 32, 2, 1, 16, 24, true);
    if (small) {
        return {{"Lighthouse, two levels", narrow, 1, 384, 1, 0, lighthouse_config(2, 2, 128, {1})}};
    }
    Case dilated{"Lighthouse, four levels, dilated", model_config(90, 3, 128, 4, 2, 64, 128, true), 2, 4096, 2, 0,
                 lighthouse_config(4, 2, 256, {0})};
    dilated.lighthouse->scorer = LighthouseScorer::dilated;
    return {{"Lighthouse, three levels", narrow, 1, 1024, 1, 0, lighthouse_config(3, 2, 128, {1})}, dilated};
}

// Blocks whose inputs come and go, more than there are places for them on the GPU; dense.
inline Case many_blocks_case(bool small) {
    if (small) {
        return {"four blocks, two micro-batches", model_config(101, 4, 32, 2, 1, 16, 64, false), 2, 40, 2};
    }
    return {"seven blocks, two micro-batches", model_config(101, 7, 256, 2, 1, 128, 64, false), 2, 1500, 2};
}

// Blocks that take less time than the copy of an input, so that kernels that did not wait for it would read what has
// not come yet and overwrite what has not left. An input is 2^15 x 1024 x 2 bytes = 67 MB, 1.2 ms at the 55 GB/s of a
// bus; all else is narrow. A block reads and writes 10 tensors of that size forward and, computed again, 25 backward:
// 0.17 and 0.42 ms at 4 TB/s.
inline Case slow_copies_case() {
    return {"seven blocks of little work", model_config(101, 7, 1024, 1, 1, 16, 8, false), 32, 1024};
}

// ---- data --------------------------------------------------------------------------------------
inline std::vector<float> random_weight(const ParameterTensor& tensor, uint64_t seed) {
    const float scale = tensor.is_vector ? 0.2f : 1.0f / std::sqrt((float)tensor.cols);
    std::vector<float> values = random_vector<float>(tensor.num_elements(), seed, scale);
    for (float& value : values) {
        value += tensor.is_vector ? 1.0f : 0.0f;
    }
    return values;
}
inline std::vector<std::vector<float>> random_weights(const Case& c, uint64_t seed) {
    std::vector<std::vector<float>> weights;
    for (const ParameterTensor& tensor : make_parameter_table(c.config).tensors) {
        weights.push_back(random_weight(tensor, seed + 100 + weights.size()));
    }
    return weights;
}
// [micro-batch][B, T + 1] of one step.
inline std::vector<std::vector<int32_t>> random_batches(const Case& c, uint64_t seed) {
    std::vector<std::vector<int32_t>> batches;
    for (int i = 0; i < c.num_micro_batches; ++i) {
        batches.push_back(random_indices(c.B * (c.T + 1), seed * 1000 + i, c.config.vocab_size));
    }
    return batches;
}
