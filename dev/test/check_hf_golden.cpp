// check_hf_golden.cpp: holds the CPU reference in float32 against what Hugging Face transformers computed in float32
// for a small Llama: loss, logits and every weight's gradient.
//   check_hf_golden FOLDER
// FOLDER: config.json and model.safetensors; row0.bin, row1.bin, ...: llm.c token shards (uint16) of T + 1 tokens each;
// golden.safetensors: "logits" [B, T, V], "loss" [1] (mean over all tokens) and "grad.NAME" of the loss.
// One line each: the largest error relative to the largest expected value. Exit status 1 when one is beyond its limit
// or not a number, 2 when a file cannot be used.
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "llmc/checkpoint_load.h"
#include "llmc/reference/model.h"

namespace {

constexpr double LOGITS_LIMIT = 1e-5, GRADIENT_LIMIT = 1e-4;

std::vector<float> golden_floats(const SafetensorsFile& golden, const std::string& name,
                                 const std::vector<uint64_t>& shape) {
    const SafetensorsTensor& tensor = golden.at(name);
    CHECK(tensor.shape == shape, "%s: %s has shape %s and not %s", golden.path().c_str(), name.c_str(),
          shape_text(tensor.shape).c_str(), shape_text(shape).c_str());
    std::vector<float> values(tensor.num_elements);
    golden.read_floats(tensor, values.data());
    return values;
}

// All tokens of an llm.c shard of uint16.
std::vector<int32_t> read_row(const std::string& path) {
    const MappedFile file(path);
    int32_t header[256];
    CHECK(file.size() >= sizeof header, "%s: is shorter than a shard's header", path.c_str());
    std::memcpy(header, file.data(), sizeof header);
    CHECK(header[0] == 20240520 && header[1] == 1 && header[2] > 1 &&
              file.size() == sizeof header + 2 * (uint64_t)header[2],
          "%s: is not a token shard of uint16", path.c_str());
    std::vector<int32_t> tokens(header[2]);
    for (size_t i = 0; i < tokens.size(); ++i) {
        uint16_t token;
        std::memcpy(&token, file.data() + sizeof header + 2 * i, 2);
        tokens[i] = token;
    }
    return tokens;
}

class Report {
  public:
    void check(const std::string& name, const float* actual, const std::vector<float>& expected, double limit) {
        double largest = 0.0, difference = 0.0;
        for (size_t i = 0; i < expected.size(); ++i) {
            largest = std::max(largest, (double)std::fabs(expected[i]));
            const double error = std::fabs((double)actual[i] - expected[i]);
            difference = std::isnan(difference) || error <= difference ? difference : error;
        }
        const double error = difference / largest;
        const bool good = error <= limit;  // false for NaN
        passed = passed && good;
        std::printf("%s %-52s max_err %.1e limit %.0e\n", good ? "ok  " : "FAIL", name.c_str(), error, limit);
    }
    bool passed = true;
};

bool check_folder(const std::string& folder) {
    const ModelConfig config = load_hf_config(folder);
    std::vector<int32_t> tokens, inputs;  // [B, T + 1] and its first T columns
    int B = 0;
    int64_t T = 0;
    for (; B == 0 || std::filesystem::exists(folder + "/row" + std::to_string(B) + ".bin"); ++B) {
        const std::vector<int32_t> row = read_row(folder + "/row" + std::to_string(B) + ".bin");
        T = B == 0 ? (int64_t)row.size() - 1 : T;
        CHECK((int64_t)row.size() == T + 1, "%s/row%d.bin: has another length than row0.bin", folder.c_str(), B);
        tokens.insert(tokens.end(), row.begin(), row.end());
        inputs.insert(inputs.end(), row.begin(), row.end() - 1);
    }

    reference::ReferenceModel<float> model(config, AttentionMode::dense, LighthouseConfig(), B, T);
    load_model(model, folder);
    const SafetensorsFile golden(folder + "/golden.safetensors");
    const uint64_t V = (uint64_t)config.vocab_size;
    Report report;

    std::vector<float> logits((size_t)(B * T) * V);
    model.all_logits(logits.data(), inputs.data(), B, T);
    report.check("logits", logits.data(), golden_floats(golden, "logits", {(uint64_t)B, (uint64_t)T, V}), LOGITS_LIMIT);

    model.begin_step();
    model.accumulate_gradients(tokens.data(), B, T, 1.0);
    const float loss = (float)model.evaluate(tokens.data(), B, T);
    report.check("loss", &loss, golden_floats(golden, "loss", {1}), LOGITS_LIMIT);
    size_t num_gradients = 0;
    const std::vector<ParameterTensor>& tensors = model.parameters().tensors;
    for (size_t i = 0; i < tensors.size(); ++i) {
        for (const HuggingFaceSlice& slice : tensors[i].slices) {
            report.check("grad." + slice.name, model.gradient((int)i) + slice.row_begin * tensors[i].cols,
                         golden_floats(golden, "grad." + slice.name, checkpoint::slice_shape(tensors[i], slice)),
                         GRADIENT_LIMIT);
            ++num_gradients;
        }
    }
    for (const SafetensorsTensor& tensor : golden.tensors()) {
        num_gradients -= tensor.name.rfind("grad.", 0) == 0;
    }
    CHECK(num_gradients == 0, "%s: has gradients of other tensors than this model's", golden.path().c_str());
    return report.passed;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: check_hf_golden FOLDER\n");
        return 2;
    }
    try {
        return check_folder(argv[1]) ? 0 : 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "check_hf_golden: %s\n", error.what());
        return 2;
    }
}
