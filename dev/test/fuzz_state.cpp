// fuzz_state.cpp: any text as a checkpoint's state.json, manifest.json or index of sharded weights. What is accepted is
// in range, names files of its own folder only, and is the same after it was written and read again.
#include <cstdlib>

#include "dev/test/fuzz_seeds.h"
#include "llmc/checkpoint.h"

namespace {

void require(bool condition) {
    if (!condition) {
        std::abort();
    }
}

std::vector<std::string> make_seeds() {
    TrainingState state;
    state.step = 400, state.adam_step = 397, state.data_position = 3200, state.skipped = 3, state.skipped_in_a_row = 1;
    state.data = "1 file of bytes, \"\\u00e4.txt\"";
    Json short_state = Json::parse(checkpoint::state_text(state, RunConfig()));
    short_state.erase("settings");
    return {checkpoint::state_text(state, RunConfig()), short_state.dump(),
            checkpoint::manifest_text({{"config.json", {17, 1}}, {"model.safetensors", {(uint64_t)1 << 40, ~0ull}}}),
            R"({"metadata":{"total_size":9},"weight_map":{"lm_head.weight":"model-00001-of-00002.safetensors",)"
            R"("model.norm.weight":"model-00002-of-00002.safetensors"}})"};
}

template <class Function>
void refused_or(Function function) {
    try {
        function();
    } catch (const Error& error) {
        require(std::string(error.what()).find('\n') == std::string::npos);
    }
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
    static const std::vector<std::string> seeds = make_seeds();
    return mutate_from_seeds(seeds, data, size, max_size, seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::string_view text((const char*)data, size);
    refused_or([&] {
        const TrainingState state = checkpoint::parse_state(text, "state.json");
        require(state.step >= 0 && state.adam_step >= 0 && state.data_position >= 0 && state.skipped_in_a_row >= 0);
        require(state.adam_step <= state.step && state.skipped <= state.step &&
                state.skipped_in_a_row <= state.skipped);
        static const RunConfig config;
        const TrainingState again =
            checkpoint::parse_state(checkpoint::state_text(state, config), "written state.json");
        require(again.step == state.step && again.adam_step == state.adam_step &&
                again.data_position == state.data_position && again.skipped == state.skipped &&
                again.skipped_in_a_row == state.skipped_in_a_row);
    });
    refused_or([&] {
        const checkpoint::Manifest manifest = checkpoint::parse_manifest(text, "manifest.json");
        const checkpoint::Manifest again =
            checkpoint::parse_manifest(checkpoint::manifest_text(manifest), "written manifest.json");
        require(again.size() == manifest.size());
        for (const auto& [name, digest] : manifest) {
            require(name.find('/') == std::string::npos && name != ".." && name != "." && !name.empty());
            require(again.at(name).num_bytes == digest.num_bytes && again.at(name).xxh3 == digest.xxh3);
        }
    });
    refused_or([&] {
        for (const auto& [name, file] : checkpoint::parse_weight_map(text, "model.safetensors.index.json")) {
            require(file.find('/') == std::string::npos && file != ".." && file != "." && !file.empty());
        }
    });
    return 0;
}
