// checkpoint_contents.h: what writing and reading a checkpoint have in common: names and shapes of the tensors in its
// files, and state.json.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint_folder.h"  // state.json's name
#include "config.h"             // settings of the run
#include "durable_file.h"       // a hash
#include "json.h"               // state.json
#include "parameters.h"         // tensors, their parts in Hugging Face's names
#include "settings.h"           // the settings by name
#include "tokens.h"             // training data
#include "trainable_model.h"    // kinds of state, pieces of a tensor

// What a run needs beside the model's tensors to go on where it stopped. Random numbers depend on seeds and positions
// alone, so these are the state of all generators too.
struct TrainingState {
    int64_t step = 0;                        // steps done, skipped ones included
    int64_t adam_step = 0;                   // updates applied: AdamW's bias correction
    int64_t data_position = 0;               // sequences consumed, of seq_len tokens
    int64_t seq_len = 0;                     // 0: not known
    std::optional<RunConfig> schedule;       // what its learning rate went by (saved_schedule); no value: not known
    int64_t skipped = 0;                     // steps with a non-finite loss or gradient norm
    int64_t skipped_in_a_row = 0;            // of those, the last ones without an applied update between
    std::string data;                        // data_identity of what was trained on; empty: not known
    std::optional<AttentionMode> attention;  // of the checkpoint's last step; no value: not known, or it has none
    std::optional<uint64_t> shuffle_seed;    // that its data came in the order of; no value: not known
    int64_t sequences_per_step = 0;          // 0: not known
};

namespace checkpoint {

// ---- names and shapes of tensors ---------------------------------------------------------------

inline std::vector<uint64_t> slice_shape(const ParameterTensor& tensor, const HuggingFaceSlice& slice) {
    return tensor.is_vector ? std::vector<uint64_t>{(uint64_t)tensor.cols}
                            : std::vector<uint64_t>{(uint64_t)slice.num_rows, (uint64_t)tensor.cols};
}
inline std::vector<uint64_t> state_shape(const ParameterTensor& tensor) {
    return {(uint64_t)tensor.rows, (uint64_t)tensor.cols};
}
inline std::string state_name(const ParameterTensor& tensor, StateKind kind) {
    return tensor.name + "." + state_kind_name(kind);
}

// "layer0.qkv.exp_avg" or, of a part of the tensor, "layer0.qkv.exp_avg[4096:8192]".
inline std::string piece_name(const ParameterTensor& tensor, StateKind kind, const StatePiece& piece) {
    const std::string name = state_name(tensor, kind);
    return piece.num_elements == tensor.num_elements()
               ? name
               : format_string("%s[%lld:%lld]", name.c_str(), (long long)piece.begin,
                               (long long)(piece.begin + piece.num_elements));
}

// ---- state.json --------------------------------------------------------------------------------

// What tells training data from others without reading them, in words: number, names (not folders: data may move) and
// lengths of the files, and how many of their tokens are trained on. ASCII, so that JSON gives it back as it is.
inline std::string data_identity(const TokenStream& stream, int64_t num_tokens) {
    const std::vector<TokenFile>& files = stream.files();
    const auto name_of = [](const TokenFile& file) { return file.path.substr(file.path.rfind('/') + 1); };
    const auto shown = [&](const TokenFile& file) { return JsonObject::shown(name_of(file)); };
    Xxh3Stream hash;  // of all files: those between the first and the last are not shown
    for (const TokenFile& file : files) {
        const std::string entry = format_string("%s/%lld/", name_of(file).c_str(), (long long)file.num_tokens());
        hash.update(entry.data(), entry.size());
    }
    const std::string last = files.size() > 1 ? " to " + shown(files.back()) : "";
    return format_string("%s, %s%s, names and lengths %016llx, %lld tokens", stream.description().c_str(),
                         shown(files.front()).c_str(), last.c_str(), (unsigned long long)hash.digest().xxh3,
                         (long long)num_tokens);
}
inline std::string data_identity(const SequenceSet& data) { return data_identity(data.stream(), data.num_tokens()); }

inline std::string state_text(const TrainingState& state, const RunConfig& config) {
    RunConfig copy = config;
    Json settings = Json::object();
    for (const Setting& s : list_settings(copy)) {
        const std::string value = s.get();
        const Json parsed = Json::parse(value, nullptr, false);  // numbers, truths and quoted texts are JSON
        settings[s.name] = parsed.is_discarded() ? Json(value) : parsed;
    }
    const Json json = {{"format", "llmc training state"},
                       {"version", 1},
                       {"step", state.step},
                       {"adam_step", state.adam_step},
                       {"data_position", state.data_position},
                       {"sequences_per_step", config.sequences_per_step()},
                       {"skipped", state.skipped},
                       {"skipped_in_a_row", state.skipped_in_a_row},
                       {"data", state.data},
                       {"seed", config.seed},
                       {"shuffle_seed", config.shuffle_seed},
                       {"settings", settings}};
    return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

// The attention of the last of `step` steps, by the settings of the run that did them.
inline std::optional<AttentionMode> last_attention(const JsonObject& settings, int64_t step) {
    if (step == 0 || !settings.has("attention")) {
        return std::nullopt;
    }
    RunConfig run;
    try {
        parse(Words{settings.text("attention")}, run.attention);
    } catch (const Error& rule) {
        fail("%s: \"attention\" must be %s", settings.where().c_str(), rule.what());
    }
    run.lighthouse_steps = settings.integer_or(run.lighthouse_steps, "lighthouse_steps", -1, INT64_MAX);
    return run.attention_at(step - 1);
}

// The settings that the learning rate of a run went by (learning_rate_at), all others as they are by default; no value
// where its settings do not say.
inline std::optional<RunConfig> saved_schedule(const JsonObject& settings) {
    RunConfig run;
    if (!settings.has("schedule") || !settings.has("max_steps")) {
        return std::nullopt;
    }
    try {
        parse(Words{settings.text("schedule")}, run.schedule);
    } catch (const Error& rule) {
        fail("%s: \"schedule\" must be %s", settings.where().c_str(), rule.what());
    }
    run.max_steps = settings.integer("max_steps", 0, INT64_MAX);
    run.decay_steps = settings.integer_or(run.decay_steps, "decay_steps", 0, INT64_MAX);
    run.warmup_steps = settings.integer_or(run.warmup_steps, "warmup_steps", 0, INT64_MAX);
    run.learning_rate = settings.real_or(run.learning_rate, "learning_rate");
    run.final_learning_rate_fraction =
        settings.real_or(run.final_learning_rate_fraction, "final_learning_rate_fraction");
    return run;
}

// Half of what numbers an epoch's order (RandomStream), so that no run gets there.
constexpr int64_t MAX_DATA_POSITION = (int64_t)1 << 55;

// Throws Error, naming `path`, for text that is not a training state.
inline TrainingState parse_state(std::string_view text, const std::string& path) {
    const JsonValue json = parse_json(text, path);
    const JsonObject object(json, path);
    CHECK(object.text("format") == "llmc training state" && object.integer("version", 0, INT64_MAX) == 1,
          "%s: is not a training state of version 1", path.c_str());
    TrainingState state;
    state.step = object.integer("step", 0, INT64_MAX);
    state.adam_step = object.integer("adam_step", 0, state.step);
    state.data_position = object.integer("data_position", 0, MAX_DATA_POSITION);
    state.sequences_per_step = object.integer_or(0, "sequences_per_step", 1, INT64_MAX);
    if (object.has("settings")) {
        const JsonObject settings = object.object("settings");
        state.seq_len = settings.integer_or(0, "seq_len", 1, INT64_MAX);
        state.schedule = saved_schedule(settings);
        state.attention = last_attention(settings, state.step);
    }
    state.skipped = object.integer("skipped", 0, state.step);
    state.skipped_in_a_row = object.integer("skipped_in_a_row", 0, state.skipped);
    state.data = object.text_or("", "data");
    if (object.has("shuffle_seed")) {
        state.shuffle_seed = (uint64_t)object.integer("shuffle_seed", 0, INT64_MAX);
    }
    return state;
}

// Where training stood in a folder with weights; no value where its state.json does not say, as it need not be one of
// ours.
inline std::optional<TrainingState> find_state(const std::string& folder) {
    const std::string path = folder + "/" + STATE;
    try {
        return parse_state(read_text_file(path), path);
    } catch (const Error&) {
        return std::nullopt;
    }
}

}  // namespace checkpoint
