// dump_logits.cpp: the logits of a Llama folder on some tokens, as the CPU trainer computes them in float32, for
// comparison with other implementations (check_transformers.py).
//   dump_logits FOLDER TOKENS OUT    FOLDER as --init_from takes it; TOKENS a text of token numbers; OUT a new
//   safetensors
//                                    file with float32 "logits" [T, V]
#include <cstdio>
#include <exception>
#include <fstream>

#include "llmc/checkpoint_load.h"
#include "llmc/hf_config.h"
#include "llmc/reference/model.h"
#include "llmc/safetensors.h"

static void dump_logits(const std::string& folder, const std::string& tokens_path, const std::string& out_path) {
    std::vector<int32_t> tokens;
    std::ifstream file(tokens_path);
    CHECK(file.good(), "%s: cannot open", tokens_path.c_str());
    for (int32_t token; file >> token;) {
        tokens.push_back(token);
    }
    CHECK(file.eof() && !tokens.empty(), "%s: must hold token numbers and nothing else", tokens_path.c_str());

    const ModelConfig config = load_hf_config(folder);
    const int64_t T = (int64_t)tokens.size(), V = config.vocab_size;
    reference::ReferenceModel<float> model(config, AttentionMode::dense, LighthouseConfig(), 1, T);
    load_model(model, folder);
    std::vector<float> logits((size_t)(T * V));
    model.all_logits(logits.data(), tokens.data(), 1, T);
    SafetensorsWriter writer(out_path, {{"logits", Dtype::F32, {(uint64_t)T, (uint64_t)V}, 0, 0}}, {});
    writer.write(logits.data(), logits.size());
    writer.finish();
}

int main(int argc, char** argv) {
    if (argc != 4) {
        std::fprintf(stderr, "usage: dump_logits FOLDER TOKENS OUT\n");
        return 2;
    }
    try {
        dump_logits(argv[1], argv[2], argv[3]);
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "dump_logits: %s\n", error.what());
        return 1;
    }
}
