// fuzz_hf_config.cpp: any text as a config.json. A model that is accepted obeys every rule, and is the same after it
// was written and read again, from either layout of RoPE.
#include <cstdlib>

#include "dev/test/fuzz_seeds.h"
#include "llmc/hf_config.h"

namespace {

void require(bool condition) {
    if (!condition) {
        std::abort();
    }
}

std::vector<std::string> make_seeds() {
    std::vector<std::string> seeds;
    for (const char* preset : {"tiny", "llama3.2-1b", "llama3-8b"}) {
        const Json json = hf_config_json(model_preset(preset), 8192, true, {1, {2, 3}, -1});
        Json old_layout = json, new_layout = json;
        old_layout.erase("rope_parameters");
        new_layout.erase("rope_scaling");
        new_layout.erase("rope_theta");
        seeds.insert(seeds.end(), {json.dump(), old_layout.dump(), new_layout.dump()});
    }
    return seeds;
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
    static const std::vector<std::string> seeds = make_seeds();
    return mutate_from_seeds(seeds, data, size, max_size, seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    ModelConfig model;
    try {
        model = parse_hf_config(std::string_view((const char*)data, size), "config.json");
    } catch (const Error& error) {
        require(std::string(error.what()).find('\n') == std::string::npos);
        return 0;
    }
    validate(model);
    const std::string_view text((const char*)data, size);
    const SpecialTokens tokens = parse_special_tokens(parse_json(text, "config.json"));
    const Json json = hf_config_json(model, model.max_positions, false, tokens);
    Json old_layout = json, new_layout = json;
    old_layout.erase("rope_parameters");
    new_layout.erase("rope_scaling");
    new_layout.erase("rope_theta");
    for (const Json& layout : {json, old_layout, new_layout}) {
        const ModelConfig again = parse_hf_config(layout.dump(), "written config.json");
        require(first_difference(model, again).empty() && again.max_positions == model.max_positions);
        const SpecialTokens same = parse_special_tokens(parse_json(layout.dump(), "written config.json"));
        require(same.begin == tokens.begin && same.end == tokens.end && same.padding == tokens.padding);
    }
    return 0;
}
