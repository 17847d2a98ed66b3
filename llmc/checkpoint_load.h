// checkpoint_load.h: weights from any Hugging Face Llama folder into a model (load_model), or everything that a run
// goes on with from a checkpoint (load_checkpoint). All is checked before the model is touched.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "checkpoint_contents.h"  // names and shapes of tensors, state.json
#include "checkpoint_folder.h"    // names of files, the manifest
#include "hf_config.h"            // config.json
#include "json.h"                 // the index of sharded weights
#include "ranks.h"                // processes that load together
#include "safetensors.h"          // tensors
#include "trainable_model.h"      // where they go

namespace checkpoint {

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
        CHECK(!set_.has(name), "%s: the pieces of tensor %s are there, and the whole of it too", folder_.c_str(),
              name.c_str());
        CHECK(end == (uint64_t)tensor.num_elements(),
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

// Throws Error where a model that shares its classifier with the embedding has another one beside it: nobody knows
// which is meant. set: checked. progress (+=): elements, as they are read; may be null.
inline void check_shared_classifier(const TensorSet& set, const std::string& folder, std::atomic<uint64_t>* progress) {
    if (!set.has("lm_head.weight")) {
        return;
    }
    const TensorSet::Place &head = set.all().at("lm_head.weight"),
                           &embedding = set.all().at("model.embed_tokens.weight");
    bool same = head.tensor->shape == embedding.tensor->shape && is_weight_dtype(head.tensor->dtype);
    constexpr uint64_t PART = 1 << 20;  // elements at a time
    std::vector<float> of_head(PART), of_embedding(PART);
    for (uint64_t begin = 0; same && begin < head.tensor->num_elements; begin += PART) {
        const uint64_t count = std::min(PART, head.tensor->num_elements - begin);
        head.file->read_floats(*head.tensor, begin, count, of_head.data());
        embedding.file->read_floats(*embedding.tensor, begin, count, of_embedding.data());
        same = std::equal(of_head.begin(), of_head.begin() + (std::ptrdiff_t)count, of_embedding.begin());
        if (progress != nullptr) {
            *progress += count;
        }
    }
    CHECK(same,
          "%s: config.json says tie_word_embeddings, but lm_head.weight is another than model.embed_tokens.weight: say "
          "false there to train both, or leave lm_head.weight out",
          folder.c_str());
}

// Throws Error unless config.json describes the model, but for how positions are rotated, which a run may change, and
// the weights are its tensors, all and only, in these shapes.
// Allowed beside them: the table of RoPE frequencies in old folders, which transformers does not read, and the
// classifier of a model that shares it with the embedding (check_shared_classifier).
inline void check_weights(const TensorSet& set, const ModelConfig& model, const ParameterTable& parameters,
                          const std::string& folder) {
    ModelConfig stored = load_hf_config(folder);
    stored.rope_theta = model.rope_theta, stored.rope_scaling = model.rope_scaling;
    const std::string difference = first_difference(stored, model);
    CHECK(difference.empty(), "%s/config.json: does not fit this model: %s", folder.c_str(), difference.c_str());
    std::set<std::string> names;
    for (const ParameterTensor& tensor : parameters.tensors) {
        for (const HuggingFaceSlice& slice : tensor.slices) {
            set.at(slice.name, slice_shape(tensor, slice), folder);
            names.insert(slice.name);
        }
    }
    for (const auto& [name, place] : set.all()) {
        const std::string_view frequencies = ".rotary_emb.inv_freq";
        const bool is_unused =
            (model.tied_embeddings && name == "lm_head.weight") ||
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

}  // namespace checkpoint

// ---- what a run calls --------------------------------------------------------------------------

// Throws Error unless the weights of a folder are those of its config.json's model, `model`, as far as can be said
// without reading them: our manifest says it with the hash of config.json, else names and shapes of all tensors do.
inline void check_holds_model(const std::string& folder, const ModelConfig& model) {
    const std::optional<checkpoint::Manifest> manifest = checkpoint::own_manifest(folder);
    if (!manifest) {
        checkpoint::check_weights(checkpoint::open_weights(folder), model, make_parameter_table(model), folder);
        return;
    }
    if (const auto config = manifest->find("config.json"); config != manifest->end()) {
        checkpoint::verify_file(folder, config->first, config->second, true);
    }
}

// Sets the model's weights, and nothing else, from any Hugging Face Llama folder, one of ours included: then what is
// read must also be what its manifest says. F16 and BF16 become float32 exactly. Throws Error, before the model is
// touched, when the folder is damaged or does not hold this model.
inline void load_model(TrainableModel& model, const std::string& folder, const RunRanks& ranks = RunRanks()) {
    const auto verify_what_is_read = [&](std::atomic<uint64_t>* progress) -> std::string {
        const std::optional<checkpoint::Manifest> manifest = checkpoint::own_manifest(folder);
        for (const auto& [name, digest] : manifest.value_or(checkpoint::Manifest())) {
            if (name == "config.json" || name == checkpoint::WEIGHTS) {
                checkpoint::verify_file(folder, name, digest, true, progress);
            }
        }
        if (model.config().tied_embeddings) {
            const checkpoint::TensorSet weights = checkpoint::open_weights(folder);
            checkpoint::check_weights(weights, model.config(), model.parameters(), folder);
            checkpoint::check_shared_classifier(weights, folder, progress);
        }
        return "";
    };
    ranks.first_decides_at_length(verify_what_is_read, "verification of the weights");
    const checkpoint::TensorSet weights = checkpoint::open_weights(folder);
    checkpoint::check_weights(weights, model.config(), model.parameters(), folder);
    checkpoint::read_weights(model, weights, folder);
}

// Sets master weights and both means of AdamW from a checkpoint, and returns where training stood. Throws Error, before
// the model is touched, when the checkpoint is damaged (its files are read and compared with the manifest first) or is
// not of this model. was_read: find_newest_checkpoint has just compared them; their lengths are enough.
inline TrainingState load_checkpoint(TrainableModel& model, const std::string& folder,
                                     const RunRanks& ranks = RunRanks(), bool was_read = false) {
    // One rank reads every byte, the others what they need.
    const auto verify_all = [&](std::atomic<uint64_t>* progress) {
        return checkpoint::manifest_text(checkpoint::verify(folder, !was_read, progress));
    };
    const checkpoint::Manifest manifest =
        checkpoint::parse_manifest(ranks.first_decides_at_length(verify_all, "verification of the checkpoint"),
                                   folder + "/" + checkpoint::MANIFEST);
    const std::string state_path = folder + "/" + checkpoint::STATE;
    const TrainingState state = checkpoint::parse_state(read_text_file(state_path), state_path);
    const std::optional<int64_t> named = checkpoint::step_of(checkpoint::fs::path(folder).filename());
    CHECK(!named || *named == state.step,
          "%s: is the checkpoint of step %lld by its %s: name the folder %s again, or --resume will never find a newer "
          "one",
          folder.c_str(), (long long)state.step, checkpoint::STATE, checkpoint::folder_name(state.step).c_str());
    const checkpoint::TensorSet weights = checkpoint::open_weights(folder);
    checkpoint::check_weights(weights, model.config(), model.parameters(), folder);
    checkpoint::TensorSet optimizer;
    for (const auto& [name, digest] : manifest) {
        if (name.rfind(checkpoint::OPTIMIZER, 0) == 0) {
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
