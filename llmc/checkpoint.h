// checkpoint.h: folders of weights. Any Hugging Face Llama folder is loaded; what is saved is one too, with what a
// resumed run needs beside the model:
//
//   config.json, model.safetensors   as transformers, vLLM and llama.cpp read them; weights float32 or bfloat16
//   generation_config.json, tokenizer files   of the folder the run started from, or of bytes
//   optimizer-00001-of-00002.safetensors ...   float32: "layer0.qkv.exp_avg", ".exp_avg_sq" and, with bfloat16 weights,
//                                    ".master"; names as in parameters.h. A tensor is whole, in whichever file; or,
//                                    of a run on several ranks, in pieces: "layer0.qkv.exp_avg[4096:8192]" are
//                                    elements 4096 to 8191, and every rank has written its own
//   state.json                       step, position in the data, seeds, every resolved setting
//   manifest.json                    length and XXH3 hash of each file above; a folder that agrees with it is whole
//
// A folder is written under another name, each file and the folder are waited for until they are on the disk, and then
// it is renamed: OUTPUT_DIR/step00000400 is whole or is not there, whatever fails. Names that begin with ".partial-"
// are folders on their way in or out; the next save removes what a crash has left of them. One run at a time may save
// into an output folder, which all its ranks must see. Any number of ranks goes on from what any other has written.
#pragma once
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <sys/stat.h>
#include <unordered_map>
#include <utility>
#include <vector>

#include "config.h"           // settings of the run
#include "durable_file.h"     // files that are on the disk, checksums
#include "flags.h"            // the settings by name
#include "hf_config.h"        // config.json
#include "hf_tokenizer.h"     // tokenizer.json of bytes
#include "json.h"             // state.json, manifest.json, the index of sharded weights
#include "ranks.h"            // processes that save and load together
#include "safetensors.h"      // tensors
#include "trainable_model.h"  // where they go and come from

// What a run needs beside the model's tensors to go on where it stopped. Random numbers depend on seeds and positions
// alone, so these are the state of all generators too.
struct TrainingState {
    int64_t step = 0;              // steps done, skipped ones included
    int64_t adam_step = 0;         // updates applied: AdamW's bias correction
    int64_t data_position = 0;     // sequences consumed
    int64_t skipped = 0;           // steps with a non-finite loss or gradient norm
    int64_t skipped_in_a_row = 0;  // of those, the last ones without an applied update between
};

namespace checkpoint {

namespace fs = std::filesystem;

constexpr const char* MANIFEST = "manifest.json";
constexpr const char* STATE = "state.json";
constexpr const char* WEIGHTS = "model.safetensors";
constexpr const char* WEIGHTS_INDEX = "model.safetensors.index.json";
constexpr const char* PARTIAL = ".partial-";
constexpr uint64_t OPTIMIZER_SHARD_BYTES = (uint64_t)4 << 30;  // a file is closed when it holds this much

// ---- the manifest ------------------------------------------------------------------------------

using Manifest = std::map<std::string, FileDigest>;  // by file name

// Whether a name out of a file names a file in its own folder.
inline bool is_plain_name(const std::string& name) {
    return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
           name.find('\0') == std::string::npos;
}

// Without a line end: whatever is cut off, it is no JSON any more.
inline std::string manifest_text(const Manifest& manifest) {
    Json files = Json::object();
    for (const auto& [name, digest] : manifest) {
        files[name] = {{"bytes", digest.num_bytes},
                       {"xxh3", format_string("%016llx", (unsigned long long)digest.xxh3)}};
    }
    return Json({{"format", "llmc checkpoint"}, {"version", 1}, {"files", files}}).dump(1);
}

// Throws Error, naming `path`, for text that is not a manifest.
inline Manifest parse_manifest(std::string_view text, const std::string& path) {
    const JsonValue json = parse_json(text, path);
    const JsonObject object(json, path);
    CHECK(object.text("format") == "llmc checkpoint" && object.integer("version", 0, INT64_MAX) == 1,
          "%s: is not a checkpoint's manifest of version 1", path.c_str());
    const JsonObject files = object.object("files");
    Manifest manifest;
    for (const auto& [name, value] : object.at("files").items()) {
        CHECK(is_plain_name(name), "%s: '%s' is not the name of a file in this folder", path.c_str(),
              printable(name).c_str());
        const JsonObject entry(value, path + ": " + printable(name));
        const std::string hash = entry.text("xxh3");
        CHECK(hash.size() == 16 && hash.find_first_not_of("0123456789abcdef") == std::string::npos,
              "%s: the hash of %s must be 16 hexadecimal digits", path.c_str(), printable(name).c_str());
        manifest[name] = {(uint64_t)entry.integer("bytes", 0, INT64_MAX), std::stoull(hash, nullptr, 16)};
    }
    return manifest;
}

// Throws Error when `name` in `folder` has another length than the manifest says or, with `contents`, other bytes.
inline void verify_file(const std::string& folder, const std::string& name, const FileDigest& expected, bool contents) {
    const std::string path = folder + "/" + name;
    std::error_code error;
    const uint64_t num_bytes = fs::file_size(path, error);
    CHECK(!error, "%s: cannot be read: %s", path.c_str(), error.message().c_str());
    CHECK(num_bytes == expected.num_bytes, "%s: has %llu bytes and not the %llu that %s says", path.c_str(),
          (unsigned long long)num_bytes, (unsigned long long)expected.num_bytes, MANIFEST);
    CHECK(!contents || digest_file(path).xxh3 == expected.xxh3,
          "%s: is damaged: its bytes are not those that %s says (delete that file if you changed this one on purpose)",
          path.c_str(), MANIFEST);
}

// Throws Error when a file's hash is another than the manifest says. Large checkpoints are read by all threads.
inline void verify_contents(const std::string& folder, const Manifest& manifest) {
    const std::vector<std::pair<std::string, FileDigest>> files(manifest.begin(), manifest.end());
    uint64_t num_bytes = 0;
    for (const auto& [name, digest] : files) {
        num_bytes += digest.num_bytes;
    }
    std::vector<std::string> errors(files.size());
#pragma omp parallel for schedule(dynamic) if (num_bytes > (uint64_t)64 << 20)
    for (size_t i = 0; i < files.size(); ++i) {
        try {
            verify_file(folder, files[i].first, files[i].second, true);
        } catch (const Error& error) {
            errors[i] = error.what();
        }
    }
    for (const std::string& error : errors) {
        CHECK(error.empty(), "%s", error.c_str());
    }
}

// The manifest of a checkpoint all of whose files are there and have the stated lengths and, with `contents`, hashes.
// Throws Error saying what is wrong otherwise.
inline Manifest verify(const std::string& folder, bool contents) {
    const std::string path = folder + "/" + MANIFEST;
    const Manifest manifest = parse_manifest(read_text_file(path), path);
    for (const char* name : {"config.json", WEIGHTS, STATE}) {
        CHECK(manifest.count(name) > 0, "%s: lacks %s", path.c_str(), name);
    }
    for (const auto& [name, digest] : manifest) {
        verify_file(folder, name, digest, false);
    }
    if (contents) {
        verify_contents(folder, manifest);
    }
    return manifest;
}

// ---- folders of an output folder ---------------------------------------------------------------

inline bool exists(const std::string& path) {
    std::error_code error;
    return fs::exists(path, error);
}

// "step00000400"
inline std::string folder_name(int64_t step) { return format_string("step%08lld", (long long)step); }

// The names in a folder; none when it does not exist.
inline std::vector<std::string> names_in(const std::string& folder) {
    std::vector<std::string> names;
    std::error_code error;
    for (fs::directory_iterator it(folder, error); !error && it != fs::directory_iterator(); it.increment(error)) {
        names.push_back(it->path().filename().string());
    }
    CHECK(!error || error == std::errc::no_such_file_or_directory, "%s: cannot list this folder: %s", folder.c_str(),
          error.message().c_str());
    return names;
}

// All checkpoint folders by step, whole or not; empty when the output folder does not exist.
inline std::map<int64_t, std::string> list(const std::string& output_dir) {
    std::map<int64_t, std::string> folders;
    for (const std::string& name : names_in(output_dir)) {
        const std::string digits = name.substr(0, 4) == "step" ? name.substr(4) : "";
        if (digits.empty() || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos) {
            continue;
        }
        const int64_t step = std::stoll(digits);
        std::error_code error;
        if (name == folder_name(step) && fs::is_directory(output_dir + "/" + name, error)) {
            folders[step] = output_dir + "/" + name;
        }
    }
    return folders;
}

inline void remove_folder(const std::string& folder) {
    std::error_code error;
    fs::remove_all(folder, error);
    CHECK(!error, "%s: cannot remove this folder: %s", folder.c_str(), error.message().c_str());
}

inline void rename_folder(const std::string& from, const std::string& to) {
    CHECK(std::rename(from.c_str(), to.c_str()) == 0, "%s: cannot rename it to %s: %s", from.c_str(), to.c_str(),
          std::strerror(errno));
}

// What an interrupted save or removal has left.
inline void remove_leftovers(const std::string& output_dir) {
    for (const std::string& name : names_in(output_dir)) {
        if (name.rfind(PARTIAL, 0) == 0) {
            remove_folder(output_dir + "/" + name);
        }
    }
}

// Removes the oldest checkpoints: `keep` stay, `newest` (just written) among them. Those that cannot be whole, by their
// files' lengths, neither count nor go; nor do those of later steps, which a resumed run has passed over.
inline void prune(const std::string& output_dir, int64_t newest, int64_t keep) {
    const std::map<int64_t, std::string> folders = list(output_dir);
    int64_t num_kept = 1;
    for (auto it = folders.rbegin(); it != folders.rend(); ++it) {
        const auto& [step, folder] = *it;
        if (step >= newest) {
            continue;
        }
        bool whole = true;
        try {
            verify(folder, false);
        } catch (const Error&) {
            whole = false;
        }
        if (whole && ++num_kept > keep) {
            const std::string partial = output_dir + "/" + PARTIAL + folder_name(step);
            rename_folder(folder, partial);  // never half a checkpoint under its name
            remove_folder(partial);
        }
    }
}

// ---- tensors of a folder -----------------------------------------------------------------------

// The tensors of several safetensors files as one set.
class TensorSet {
  public:
    // Throws Error when a tensor is in two files.
    void add(const std::string& path) {
        files_.push_back(std::make_unique<SafetensorsFile>(path));
        for (const SafetensorsTensor& tensor : files_.back()->tensors()) {
            const auto [found, is_new] = tensors_.insert({tensor.name, {files_.back().get(), &tensor}});
            CHECK(is_new, "%s: has the tensor %s, which is also in %s", path.c_str(), printable(tensor.name).c_str(),
                  found->second.file->path().c_str());
        }
    }

    struct Place {
        const SafetensorsFile* file = nullptr;
        const SafetensorsTensor* tensor = nullptr;
    };
    bool has(const std::string& name) const { return tensors_.count(name) > 0; }
    const std::unordered_map<std::string, Place>& all() const { return tensors_; }

    // Throws Error when it is missing, in words that begin with `folder`, is of another shape or not of a weight dtype.
    const Place& at(const std::string& name, const std::vector<uint64_t>& shape, const std::string& folder) const {
        const auto found = tensors_.find(name);
        CHECK(found != tensors_.end(), "%s: lacks the tensor %s, which this model has", folder.c_str(), name.c_str());
        const Place& place = found->second;
        CHECK(place.tensor->shape == shape, "%s: tensor %s has shape %s, this model's is %s",
              place.file->path().c_str(), name.c_str(), printable(shape_text(place.tensor->shape)).c_str(),
              shape_text(shape).c_str());
        CHECK(is_weight_dtype(place.tensor->dtype), "%s: tensor %s is %s; weights must be F32, F16 or BF16",
              place.file->path().c_str(), name.c_str(), dtype_info(place.tensor->dtype).name);
        return place;
    }

  private:
    std::vector<std::unique_ptr<SafetensorsFile>> files_;
    std::unordered_map<std::string, Place> tensors_;
};

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

// The optimizer's state of all tensors, whole or in pieces, whoever has written them.
class StateSet {
  public:
    // The tensors of `set`, which outlives this; messages begin with `folder`. Throws Error for a name that is none.
    StateSet(const TensorSet& set, const std::string& folder) : set_(set), folder_(folder) {
        for (const auto& [name, place] : set.all()) {
            const size_t bracket = name.find('[');
            if (bracket == std::string::npos) {
                continue;
            }
            unsigned long long begin = 0, end = 0;
            int length = 0;
            const bool parsed = std::sscanf(name.c_str() + bracket, "[%18llu:%18llu]%n", &begin, &end, &length) == 2;
            CHECK(parsed && bracket + length == name.size() && begin < end && place.tensor->num_elements == end - begin,
                  "%s: tensor %s: its name does not say which %llu elements it holds", place.file->path().c_str(),
                  printable(name).c_str(), (unsigned long long)place.tensor->num_elements);
            CHECK(is_weight_dtype(place.tensor->dtype), "%s: tensor %s is %s; state must be F32, F16 or BF16",
                  place.file->path().c_str(), printable(name).c_str(), dtype_info(place.tensor->dtype).name);
            pieces_[name.substr(0, bracket)][begin] = place;
        }
    }

    bool has(const ParameterTensor& tensor, StateKind kind) const {
        const std::string name = state_name(tensor, kind);
        return set_.has(name) || pieces_.count(name) > 0;
    }
    // Throws Error unless all elements are there, each once.
    void check(const ParameterTensor& tensor, StateKind kind) const {
        const std::string name = state_name(tensor, kind);
        const auto found = pieces_.find(name);
        if (found == pieces_.end()) {
            set_.at(name, state_shape(tensor), folder_);
            return;
        }
        uint64_t end = 0;
        for (const auto& [begin, place] : found->second) {
            CHECK(begin == end, "%s: of tensor %s, element %llu is %s", folder_.c_str(), name.c_str(),
                  (unsigned long long)std::min(begin, end), begin < end ? "there twice" : "missing");
            end = begin + place.tensor->num_elements;
        }
        CHECK(end == (uint64_t)tensor.num_elements() && !set_.has(name),
              "%s: the pieces of tensor %s have %llu elements, this model's has %lld", folder_.c_str(), name.c_str(),
              (unsigned long long)end, (long long)tensor.num_elements());
    }
    // out (=) a part of a tensor that was checked.
    void read(const ParameterTensor& tensor, StateKind kind, const StatePiece& part, float* out) const {
        const std::string name = state_name(tensor, kind);
        const auto found = pieces_.find(name);
        if (found == pieces_.end()) {
            const TensorSet::Place& place = set_.at(name, state_shape(tensor), folder_);
            place.file->read_floats(*place.tensor, part.begin, part.num_elements, out);
            return;
        }
        const uint64_t part_begin = part.begin, part_end = part_begin + part.num_elements;
        for (const auto& [begin, place] : found->second) {
            const uint64_t first = std::max(begin, part_begin);
            const uint64_t last = std::min(begin + place.tensor->num_elements, part_end);
            if (first < last) {
                place.file->read_floats(*place.tensor, first - begin, last - first, out + (first - part_begin));
            }
        }
    }

  private:
    const TensorSet& set_;
    std::string folder_;
    std::map<std::string, std::map<uint64_t, TensorSet::Place>> pieces_;  // of a tensor, by their first element
};

// The file of each tensor in the index of sharded weights. Throws Error, naming `path`, for text that is no such index.
inline std::map<std::string, std::string> parse_weight_map(std::string_view text, const std::string& path) {
    const JsonValue json = parse_json(text, path);
    const JsonValue& weight_map = JsonObject(json, path).at("weight_map");
    CHECK(weight_map.is_object(), "%s: \"weight_map\" must give a file for every tensor", path.c_str());
    std::map<std::string, std::string> files;
    for (const auto& [name, file] : weight_map.items()) {
        CHECK(file.is_string() && is_plain_name(file.get<std::string>()),
              "%s: the file of tensor %s must be a name in this folder", path.c_str(), printable(name).c_str());
        files[name] = file.get<std::string>();
    }
    return files;
}

// The weights of a folder: model.safetensors, or the files that its index names.
inline TensorSet open_weights(const std::string& folder) {
    TensorSet set;
    if (exists(folder + "/" + WEIGHTS)) {
        set.add(folder + "/" + WEIGHTS);
        return set;
    }
    const std::string path = folder + "/" + WEIGHTS_INDEX;
    CHECK(exists(path), "%s: holds neither %s nor %s", folder.c_str(), WEIGHTS, WEIGHTS_INDEX);
    const std::map<std::string, std::string> weight_map = parse_weight_map(read_text_file(path), path);
    std::set<std::string> files;
    for (const auto& [name, file] : weight_map) {
        files.insert(file);
    }
    for (const std::string& file : files) {
        set.add(folder + "/" + file);
    }
    for (const auto& [name, file] : weight_map) {
        CHECK(set.has(name) && set.all().at(name).file->path() == folder + "/" + file, "%s: tensor %s is not in %s",
              path.c_str(), printable(name).c_str(), printable(file).c_str());
    }
    return set;
}

// Throws Error unless config.json describes the model and the weights are its tensors, all and only, in these shapes.
// Allowed beside them: the table of RoPE frequencies in old folders, and the classifier of a model that shares it with
// the embedding (transformers reads neither).
inline void check_weights(const TensorSet& set, const TrainableModel& model, const std::string& folder) {
    const std::string difference = first_difference(load_hf_config(folder), model.config());
    CHECK(difference.empty(), "%s/config.json: does not fit this model: %s", folder.c_str(), difference.c_str());
    std::set<std::string> names;
    for (const ParameterTensor& tensor : model.parameters().tensors) {
        for (const HuggingFaceSlice& slice : tensor.slices) {
            set.at(slice.name, slice_shape(tensor, slice), folder);
            names.insert(slice.name);
        }
    }
    for (const auto& [name, place] : set.all()) {
        const std::string_view frequencies = ".rotary_emb.inv_freq";
        const bool is_unused =
            (model.config().tied_embeddings && name == "lm_head.weight") ||
            (name.size() > frequencies.size() && name.substr(name.size() - frequencies.size()) == frequencies);
        CHECK(names.count(name) > 0 || is_unused, "%s: has the tensor %s, which a Llama of its config.json has not",
              place.file->path().c_str(), printable(name).c_str());
    }
}

// Sets the master weights from checked weights, one tensor at a time.
inline void read_weights(TrainableModel& model, const TensorSet& set, const std::string& folder) {
    const std::vector<ParameterTensor>& tensors = model.parameters().tensors;
    std::vector<float> values;
    for (size_t i = 0; i < tensors.size(); ++i) {
        values.resize(tensors[i].num_elements());
        for (const HuggingFaceSlice& slice : tensors[i].slices) {
            const TensorSet::Place& place = set.at(slice.name, slice_shape(tensors[i], slice), folder);
            place.file->read_floats(*place.tensor, values.data() + slice.row_begin * tensors[i].cols);
        }
        model.write_state(StateKind::master, (int)i, values.data());
    }
}

// ---- state.json --------------------------------------------------------------------------------

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
                       {"skipped", state.skipped},
                       {"skipped_in_a_row", state.skipped_in_a_row},
                       {"seed", config.seed},
                       {"shuffle_seed", config.shuffle_seed},
                       {"settings", settings}};
    return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

// Throws Error, naming `path`, for text that is not a training state.
inline TrainingState parse_state(std::string_view text, const std::string& path) {
    const JsonValue json = parse_json(text, path);
    const JsonObject object(json, path);
    CHECK(object.text("format") == "llmc training state" && object.integer("version", 0, INT64_MAX) == 1,
          "%s: is not a training state of version 1", path.c_str());
    TrainingState state;
    state.step = object.integer("step", 0, INT64_MAX);
    state.adam_step = object.integer("adam_step", 0, state.step);
    state.data_position = object.integer("data_position", 0, INT64_MAX);
    state.skipped = object.integer("skipped", 0, state.step);
    state.skipped_in_a_row = object.integer("skipped_in_a_row", 0, state.skipped);
    return state;
}

// ---- writing -----------------------------------------------------------------------------------

// Files beside the weights that say how to use them: of the folder a run started from, they belong to its checkpoints.
constexpr const char* COMPANIONS[] = {"generation_config.json",
                                      "tokenizer.json",
                                      "tokenizer_config.json",
                                      "tokenizer.model",
                                      "special_tokens_map.json",
                                      "added_tokens.json",
                                      "vocab.json",
                                      "merges.txt",
                                      "chat_template.jinja"};

// A folder in the making; removed again unless it was kept. Several processes may write into one: the first makes it,
// removes it and has the whole manifest, the others `join`.
class PartialFolder {
  public:
    enum Part { makes, joins };
    explicit PartialFolder(std::string path, Part part = makes) : path_(std::move(path)), kept_(part == joins) {
        CHECK(part == joins || mkdir(path_.c_str(), 0777) == 0, "%s: cannot make this folder: %s", path_.c_str(),
              std::strerror(errno));
    }
    ~PartialFolder() {
        if (!kept_) {
            std::error_code ignored;  // an exception is on its way; the next save tries again
            fs::remove_all(path_, ignored);
        }
    }
    PartialFolder(const PartialFolder&) = delete;
    PartialFolder& operator=(const PartialFolder&) = delete;

    const std::string& path() const { return path_; }
    void keep() { kept_ = true; }

    void write_text(const std::string& name, const std::string& text) {
        DurableFile file(path_ + "/" + name);
        file.write(text.data(), text.size());
        add(name, file.finish());
    }
    void add(const std::string& name, const FileDigest& digest) { manifest_[name] = digest; }
    const Manifest& files() const { return manifest_; }
    // The last file: all that were added.
    void write_manifest() {
        const std::string text = manifest_text(manifest_);
        DurableFile file(path_ + "/" + MANIFEST);
        file.write(text.data(), text.size());
        file.finish();
    }

  private:
    std::string path_;
    Manifest manifest_;
    bool kept_;
};

// Puts the finished folder in the place of `folder`, which may exist: its old contents stay until the new ones stand.
inline void publish(PartialFolder& partial, const std::string& folder, const std::string& output_dir) {
    sync_folder(partial.path());
    if (!exists(folder)) {
        rename_folder(partial.path(), folder);
        partial.keep();
        sync_folder(output_dir);
        return;
    }
    std::string old = partial.path();
    if (renameat2(AT_FDCWD, partial.path().c_str(), AT_FDCWD, folder.c_str(), RENAME_EXCHANGE) != 0) {
        old += "-old";  // a file system that cannot swap two names, such as NFS
        rename_folder(folder, old);
        rename_folder(partial.path(), folder);
    }
    partial.keep();
    sync_folder(output_dir);
    remove_folder(old);
}

// The folder whose tokenizer and special tokens a run's checkpoints carry on: the one it started from or, when that is
// gone, an earlier checkpoint of this run. Empty when there is none.
inline std::string companion_source(const std::string& started_from, const std::string& output_dir) {
    if (!started_from.empty() && exists(started_from)) {
        return started_from;
    }
    const std::map<int64_t, std::string> folders = list(output_dir);
    for (auto it = folders.rbegin(); it != folders.rend(); ++it) {
        const std::string& folder = it->second;
        try {
            for (const auto& [name, digest] : verify(folder, false)) {
                verify_file(folder, name, digest, fs::path(name).extension() != ".safetensors");
            }
            return folder;
        } catch (const Error&) {
            continue;  // a damaged one: the one before
        }
    }
    return "";
}

// Whether a vocabulary is that of bytes, with the two markers or without.
inline bool is_byte_vocabulary(int64_t vocab_size) { return vocab_size == 256 || vocab_size == END_MARKER + 1; }
inline bool has_byte_markers(const RunConfig& config, int64_t vocab_size) {
    return config.byte_markers && vocab_size == END_MARKER + 1;
}

// Those in the config.json of `source`; without a source those of a byte vocabulary.
inline SpecialTokens special_tokens(const std::string& source, const RunConfig& config, int64_t vocab_size) {
    SpecialTokens tokens;
    if (source.empty()) {
        if (has_byte_markers(config, vocab_size)) {
            tokens.begin = BEGIN_MARKER, tokens.end = END_MARKER;
        }
        return tokens;
    }
    const std::string path = source + "/config.json";
    const JsonValue json = parse_json(read_text_file(path), path);
    const auto token = [&](const char* name) {
        const JsonValue value = json.is_object() ? json.value(name, JsonValue()) : JsonValue();
        const JsonValue first = value.is_array() && !value.empty() ? value[0] : value;  // Llama 3 has several ends
        return first.is_number_integer() ? first.get<int64_t>() : -1;
    };
    tokens.begin = token("bos_token_id"), tokens.end = token("eos_token_id");
    return tokens;
}

// config.json, and the files that say how to use the weights: those of `source`; without one, of a byte vocabulary.
inline void write_companions(PartialFolder& folder, const std::string& source, const RunConfig& config,
                             const ModelConfig& m, bool weights_bf16) {
    const SpecialTokens tokens = special_tokens(source, config, m.vocab_size);
    const int64_t max_positions = m.max_positions > 0 ? m.max_positions : config.seq_len;
    const auto write = [&](const char* name, const Json& json) { folder.write_text(name, json.dump(1) + "\n"); };
    write("config.json", hf_config_json(m, max_positions, weights_bf16, tokens));
    if (!source.empty()) {
        for (const char* name : COMPANIONS) {
            if (exists(source + "/" + name)) {
                folder.write_text(name, read_text_file(source + "/" + name));
            }
        }
    } else if (is_byte_vocabulary(m.vocab_size)) {
        const bool markers = has_byte_markers(config, m.vocab_size);
        write("tokenizer.json", byte_tokenizer_json(markers));
        write("tokenizer_config.json", byte_tokenizer_config_json(markers, max_positions));
        if (markers) {
            write("generation_config.json", {{"bos_token_id", tokens.begin}, {"eos_token_id", tokens.end}});
        }
    }
}

inline void write_weights(PartialFolder& folder, TrainableModel& model, bool weights_bf16) {
    const std::vector<ParameterTensor>& tensors = model.parameters().tensors;
    std::vector<SafetensorsTensor> slices;
    for (const ParameterTensor& tensor : tensors) {
        for (const HuggingFaceSlice& slice : tensor.slices) {
            slices.push_back({slice.name, weights_bf16 ? Dtype::BF16 : Dtype::F32, slice_shape(tensor, slice), 0, 0});
        }
    }
    SafetensorsWriter writer(folder.path() + "/" + WEIGHTS, slices, {{"format", "pt"}});
    std::vector<float> values;
    for (size_t i = 0; i < tensors.size(); ++i) {
        values.resize(tensors[i].num_elements());
        model.read_state(StateKind::master, (int)i, values.data());
        for (const HuggingFaceSlice& slice : tensors[i].slices) {
            writer.write(values.data() + slice.row_begin * tensors[i].cols, slice.num_rows * tensors[i].cols);
        }
    }
    folder.add(WEIGHTS, writer.finish());
}

// This rank's part of the optimizer's state, tensor by tensor, in files of about shard_bytes.
struct OptimizerFiles {
    struct Entry {
        StateKind kind;
        int tensor;
        StatePiece piece;
    };
    std::vector<std::vector<Entry>> files;
    size_t first = 0, total = 0;  // number of the first among those of all ranks

    // All ranks call it.
    OptimizerFiles(const TrainableModel& model, bool with_master, uint64_t shard_bytes, const RunRanks& ranks)
        : files(1) {
        std::vector<StateKind> kinds = {StateKind::exp_avg, StateKind::exp_avg_sq};
        if (with_master) {
            kinds.insert(kinds.begin(), StateKind::master);
        }
        uint64_t num_bytes = 0;
        for (int i = 0; i < (int)model.parameters().tensors.size(); ++i) {
            const std::vector<StatePiece> pieces = model.state_pieces(i);
            for (const StateKind kind : kinds) {
                for (const StatePiece& piece : pieces) {
                    if (num_bytes >= shard_bytes) {
                        files.emplace_back(), num_bytes = 0;
                    }
                    files.back().push_back({kind, i, piece});
                    num_bytes += 4 * (uint64_t)piece.num_elements;
                }
            }
        }
        std::vector<uint64_t> counts(ranks.size());
        const uint64_t own = files.size();
        ranks.world().all_gather(counts.data(), &own, sizeof own, "numbering of optimizer files");
        for (int i = 0; i < ranks.size(); ++i) {
            first += i < ranks.world().rank() ? counts[i] : 0;
            total += counts[i];
        }
    }

    void write(PartialFolder& folder, TrainableModel& model) const {
        const std::vector<ParameterTensor>& tensors = model.parameters().tensors;
        std::vector<float> values;
        for (size_t f = 0; f < files.size(); ++f) {
            std::vector<SafetensorsTensor> header;
            for (const Entry& e : files[f]) {
                const ParameterTensor& tensor = tensors[e.tensor];
                const bool whole = e.piece.num_elements == tensor.num_elements();
                header.push_back({piece_name(tensor, e.kind, e.piece), Dtype::F32,
                                  whole ? state_shape(tensor) : std::vector<uint64_t>{(uint64_t)e.piece.num_elements},
                                  0, 0});
            }
            const std::string name = format_string("optimizer-%05zu-of-%05zu.safetensors", first + f + 1, total);
            SafetensorsWriter writer(folder.path() + "/" + name, header, {});
            for (const Entry& e : files[f]) {
                values.resize(e.piece.num_elements);
                model.read_state_piece(e.kind, e.tensor, e.piece, values.data());
                writer.write(values.data(), values.size());
            }
            folder.add(name, writer.finish());
        }
    }
};

}  // namespace checkpoint

// ---- what a run calls --------------------------------------------------------------------------

// The newest checkpoint in `output_dir` that is whole: every file's hash is compared with its manifest, which reads it
// once. No value when there is none. Newer ones that are damaged are passed over; `damaged` gets a sentence for each.
inline std::optional<std::string> find_newest_checkpoint(const std::string& output_dir,
                                                         std::vector<std::string>* damaged = nullptr) {
    const std::map<int64_t, std::string> folders = checkpoint::list(output_dir);
    for (auto it = folders.rbegin(); it != folders.rend(); ++it) {
        try {
            checkpoint::verify(it->second, true);
            return it->second;
        } catch (const Error& error) {
            if (damaged != nullptr) {
                damaged->push_back(error.what());
            }
        }
    }
    return std::nullopt;
}

// Sets the model's weights, and nothing else, from any Hugging Face Llama folder, one of ours included: then what is
// read must also be what its manifest says. F16 and BF16 become float32 exactly. Throws Error, before the model is
// touched, when the folder is damaged or does not hold this model.
inline void load_model(TrainableModel& model, const std::string& folder, const RunRanks& ranks = RunRanks()) {
    const std::string path = folder + "/" + checkpoint::MANIFEST;
    const auto verify_what_is_read = [&]() -> std::string {
        if (checkpoint::exists(path)) {
            for (const auto& [name, digest] : checkpoint::parse_manifest(read_text_file(path), path)) {
                if (name == "config.json" || name == checkpoint::WEIGHTS) {
                    checkpoint::verify_file(folder, name, digest, true);
                }
            }
        }
        return "";
    };
    ranks.first_decides(verify_what_is_read, "verification of the weights");
    const checkpoint::TensorSet weights = checkpoint::open_weights(folder);
    checkpoint::check_weights(weights, model, folder);
    checkpoint::read_weights(model, weights, folder);
}

// Sets master weights and both means of AdamW from a checkpoint, and returns where training stood. Throws Error, before
// the model is touched, when the checkpoint is damaged (its files are read and compared with the manifest first) or is
// not of this model.
inline TrainingState load_checkpoint(TrainableModel& model, const std::string& folder,
                                     const RunRanks& ranks = RunRanks()) {
    // One rank reads every byte, the others what they need.
    const auto verify_all = [&] { return checkpoint::manifest_text(checkpoint::verify(folder, true)); };
    const checkpoint::Manifest manifest = checkpoint::parse_manifest(
        ranks.first_decides(verify_all, "verification of the checkpoint"), folder + "/" + checkpoint::MANIFEST);
    const std::string state_path = folder + "/" + checkpoint::STATE;
    const TrainingState state = checkpoint::parse_state(read_text_file(state_path), state_path);
    const checkpoint::TensorSet weights = checkpoint::open_weights(folder);
    checkpoint::check_weights(weights, model, folder);
    checkpoint::TensorSet optimizer;
    for (const auto& [name, digest] : manifest) {
        if (name.rfind("optimizer-", 0) == 0) {
            optimizer.add(folder + "/" + name);
        }
    }
    // With float32 weights those are the master; the kinds that are then in the optimizer's files.
    const std::vector<ParameterTensor>& tensors = model.parameters().tensors;
    const checkpoint::StateSet state_set(optimizer, folder);
    const bool has_master = state_set.has(tensors[0], StateKind::master);
    std::vector<StateKind> kinds = {StateKind::exp_avg, StateKind::exp_avg_sq};
    if (has_master) {
        kinds.push_back(StateKind::master);
    }
    for (const ParameterTensor& tensor : tensors) {
        for (const StateKind kind : kinds) {
            state_set.check(tensor, kind);
        }
    }
    if (!has_master) {
        for (const auto& [name, place] : weights.all()) {
            CHECK(place.tensor->dtype == Dtype::F32, "%s: holds no float32 weights to go on with: %s is %s",
                  folder.c_str(), printable(name).c_str(), dtype_info(place.tensor->dtype).name);
        }
    }
    // Every rank needs all weights; with a master beside them they are its rounded values.
    if (!has_master || ranks.size() > 1) {
        checkpoint::read_weights(model, weights, folder);
    }
    std::vector<float> values;
    for (int i = 0; i < (int)tensors.size(); ++i) {
        for (const StatePiece& piece : model.state_pieces(i)) {
            values.resize(piece.num_elements);
            for (const StateKind kind : kinds) {
                state_set.read(tensors[i], kind, piece, values.data());
                model.write_state_piece(kind, i, piece, values.data());
            }
        }
    }
    return state;
}

// Writes a checkpoint of `state.step` into `output_dir` (made when missing) and returns its folder; then removes those
// that --keep_checkpoints does not keep. weights_bf16: model.safetensors in bfloat16, the float32 master beside it.
// Holds one tensor at a time. All ranks call it: each writes its part of the optimizer's state, rank 0 the rest. Throws
// Error, on all ranks, when anything fails on any: what was there before then still is.
inline std::string save_checkpoint(TrainableModel& model, const TrainingState& state, const RunConfig& config,
                                   bool weights_bf16, const std::string& output_dir,
                                   uint64_t optimizer_shard_bytes = checkpoint::OPTIMIZER_SHARD_BYTES,
                                   const RunRanks& ranks = RunRanks()) {
    const std::string name = checkpoint::folder_name(state.step), folder = output_dir + "/" + name;
    const std::string partial_path = output_dir + "/" + checkpoint::PARTIAL + name;
    std::string source;
    std::optional<checkpoint::PartialFolder> partial;
    const auto make_folder = [&]() -> std::string {
        std::error_code error;
        std::filesystem::create_directories(output_dir, error);
        CHECK(!error, "--output_dir %s: cannot make this folder: %s", output_dir.c_str(), error.message().c_str());
        checkpoint::remove_leftovers(output_dir);
        source = checkpoint::companion_source(config.checkpoint, output_dir);
        partial.emplace(partial_path);
        return "";
    };
    const char* const advice =
        "; earlier checkpoints are as they were: with room to write, --resume goes on from the newest";
    try {
        ranks.first_decides(make_folder, "a new checkpoint");
        if (!ranks.is_first()) {
            partial.emplace(partial_path, checkpoint::PartialFolder::joins);
        }
        model.gather_state(StateKind::master);
        const checkpoint::OptimizerFiles optimizer(model, weights_bf16, optimizer_shard_bytes, ranks);
        // '+' and the files that this rank has written, or '-' and what went wrong.
        std::string outcome;
        try {
            if (ranks.is_first()) {
                checkpoint::write_companions(*partial, source, config, model.config(), weights_bf16);
                checkpoint::write_weights(*partial, model, weights_bf16);
            }
            optimizer.write(*partial, model);
            outcome = "+" + checkpoint::manifest_text(partial->files());
        } catch (const Error& what) {
            outcome = std::string("-") + what.what();
        }
        for (const std::string& of_rank : ranks.world().gather_texts(outcome, "end of the checkpoint")) {
            CHECK(of_rank[0] == '+', "%s", of_rank.c_str() + 1);
            for (const auto& [file, digest] : checkpoint::parse_manifest(of_rank.substr(1), partial_path)) {
                partial->add(file, digest);
            }
        }
        const auto publish_folder = [&]() -> std::string {
            partial->write_text(checkpoint::STATE, checkpoint::state_text(state, config));
            partial->write_manifest();
            checkpoint::publish(*partial, folder, output_dir);
            return "";
        };
        ranks.first_decides(publish_folder, "publication of the checkpoint");
    } catch (const Error& what) {
        fail("%s%s", what.what(), advice);
    }
    if (config.keep_checkpoints > 0 && ranks.is_first()) {
        checkpoint::prune(output_dir, state.step, config.keep_checkpoints);
    }
    return folder;
}
