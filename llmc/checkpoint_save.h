// checkpoint_save.h: writing a checkpoint (save_checkpoint): every file into a folder under another name, which gets
// its own when all of it is on the disk.
#pragma once
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <sys/stat.h>
#include <utility>
#include <vector>

#include "checkpoint_contents.h"  // names and shapes of tensors, state.json
#include "checkpoint_folder.h"    // names of files, the manifest, removing old folders
#include "config.h"               // settings of the run
#include "durable_file.h"         // files that are on the disk
#include "hf_config.h"            // config.json
#include "hf_tokenizer.h"         // tokenizer.json and tokenizer.model of bytes
#include "ranks.h"                // processes that save together
#include "safetensors.h"          // tensors
#include "trainable_model.h"      // where they come from

namespace checkpoint {

constexpr uint64_t OPTIMIZER_SHARD_BYTES = (uint64_t)4 << 30;  // a file is closed when it holds this much
// ---- a folder in the making --------------------------------------------------------------------

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

// Gives a folder that has a checkpoint's name, but nothing that a checkpoint has, another one.
inline void move_aside(const std::string& folder) {
    std::string aside = folder + "-moved";
    for (int i = 2; exists(aside); ++i) {
        aside = folder + "-moved" + std::to_string(i);
    }
    rename_folder(folder, aside);
    std::fprintf(stderr, "%s: is no checkpoint, and a checkpoint gets its name: it is called %s now\n", folder.c_str(),
                 aside.c_str());
}

// Puts the finished folder in the place of `folder`, which may exist: its old contents stay until the new ones stand.
inline void publish(PartialFolder& partial, const std::string& folder, const std::string& output_dir) {
    sync_folder(partial.path());
    const auto has = [&](const char* name) { return exists(folder + "/" + name); };
    if (exists(folder) && !has(MANIFEST) && !has(STATE) && !has(WEIGHTS)) {
        move_aside(folder);
    }
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
        try {
            rename_folder(partial.path(), folder);
        } catch (const Error&) {
            rename_folder(old, folder);
            throw;
        }
    }
    partial.keep();
    sync_folder(output_dir);
    remove_if_possible(old);
}

// ---- files beside the weights ------------------------------------------------------------------

// Files beside the weights that say how to use them: of the folder a run started from, they belong to its checkpoints.
constexpr const char* TOKENIZER = "tokenizer.json";
constexpr const char* TOKENIZER_CONFIG = "tokenizer_config.json";
constexpr const char* SENTENCEPIECE = "tokenizer.model";
constexpr const char* COMPANIONS[] = {"generation_config.json",  TOKENIZER,           TOKENIZER_CONFIG, SENTENCEPIECE,
                                      "special_tokens_map.json", "added_tokens.json", "vocab.json",     "merges.txt",
                                      "chat_template.jinja"};

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

// What says how to use the weights: files by name, and the special tokens of config.json.
struct Companions {
    SpecialTokens tokens;
    std::map<std::string, std::string> files;
};
inline int64_t max_positions_of(const RunConfig& config, const ModelConfig& m) {
    return m.max_positions > 0 ? m.max_positions : config.seq_len;
}
// A tokenizer_config.json that lets texts be as long as the model was trained on: as it is where it does, or where it
// says nothing of the kind.
inline std::string with_max_length(const std::string& text, int64_t max_positions) {
    Json json = parse_or_discard(text);
    const char* const key = "model_max_length";
    if (!json.is_object() || !json.contains(key) || !json[key].is_number_integer() ||
        json[key].get<double>() >= (double)max_positions) {
        return text;
    }
    json[key] = max_positions;
    return json_text(json);
}

// Those of `source`; without one, of text as bytes, if it is that. Throws Error for a file that cannot be read and, of
// a folder written here, for one that is not what its manifest says.
inline Companions read_companions(const std::string& source, const RunConfig& config, const ModelConfig& m,
                                  bool is_bytes) {
    Companions companions;
    if (!source.empty()) {
        const std::string path = source + "/config.json";
        companions.tokens = parse_special_tokens(parse_json(read_text_file(path), path));
        const Manifest manifest = own_manifest(source).value_or(Manifest());
        for (const char* name : COMPANIONS) {
            if (!exists(source + "/" + name)) {
                continue;
            }
            if (const auto listed = manifest.find(name); listed != manifest.end()) {
                verify_file(source, name, listed->second, true);  // what is carried on is said to be whole
            }
            companions.files[name] = read_text_file(source + "/" + name);
        }
        if (const auto found = companions.files.find(TOKENIZER_CONFIG); found != companions.files.end()) {
            found->second = with_max_length(found->second, max_positions_of(config, m));
        }
    } else if (is_bytes) {
        const bool markers = config.byte_markers && m.vocab_size > END_MARKER;
        const auto add = [&](const char* name, const Json& json) { companions.files[name] = json_text(json); };
        add(TOKENIZER, byte_tokenizer_json(markers));
        add(TOKENIZER_CONFIG, byte_tokenizer_config_json(markers, max_positions_of(config, m)));
        companions.files[SENTENCEPIECE] = byte_sentencepiece_model(markers);
        if (markers) {
            companions.tokens.begin = BEGIN_MARKER, companions.tokens.end = END_MARKER;
            add("generation_config.json", {{"bos_token_id", BEGIN_MARKER}, {"eos_token_id", END_MARKER}});
        }
    }
    return companions;
}
inline bool has_tokenizer(const Companions& companions) {
    return companions.files.count(TOKENIZER) > 0 || companions.files.count(SENTENCEPIECE) > 0;
}
// Whether their tokenizer, if they have one, takes bytes as they are: in each file that could hold one, as tools differ
// in which they read. A folder of before there was a tokenizer.model has a tokenizer.json alone.
inline bool reads_bytes(const Companions& companions) {
    const auto holds_no_other = [&](const char* name, const std::string& marked, const std::string& unmarked) {
        const auto found = companions.files.find(name);
        return found == companions.files.end() || found->second == marked || found->second == unmarked;
    };
    return holds_no_other(TOKENIZER, json_text(byte_tokenizer_json(true)), json_text(byte_tokenizer_json(false))) &&
           holds_no_other(SENTENCEPIECE, byte_sentencepiece_model(true), byte_sentencepiece_model(false)) &&
           companions.files.count("vocab.json") == 0;
}
inline void write_companions(PartialFolder& folder, const Companions& companions, const RunConfig& config,
                             const ModelConfig& m, bool weights_bf16) {
    const Json json = hf_config_json(m, max_positions_of(config, m), weights_bf16, companions.tokens);
    folder.write_text("config.json", json_text(json));
    for (const auto& [name, text] : companions.files) {
        folder.write_text(name, text);
    }
}

// ---- tensors -----------------------------------------------------------------------------------

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
            const std::string name = format_string("%s%05zu-of-%05zu.safetensors", OPTIMIZER, first + f + 1, total);
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

// Of checkpoints of the same updates, all but the one of `newest`, in which steps were being skipped: a run that is
// started again and again on bad weights leaves one.
inline void prune_skipped(const std::string& output_dir, const TrainingState& newest) {
    for (const auto& [step, folder] : list(output_dir)) {
        const std::optional<TrainingState> state = step < newest.step ? find_state(folder) : std::nullopt;
        if (state && state->adam_step == newest.adam_step && state->skipped_in_a_row > 0) {
            remove_checkpoint(output_dir, step, folder);
        }
    }
}

}  // namespace checkpoint

// ---- what a run calls --------------------------------------------------------------------------

// Writes a checkpoint of `state.step` into `output_dir`, which exists (one that is not there any more is not made anew:
// its lock and settings would be missing), and returns its folder; then removes those that --keep_checkpoints does not
// keep, unless steps are being skipped: then these weights may be what is wrong, and only those go that have the same.
// weights_bf16: model.safetensors in bfloat16, the float32 master beside it.
// Holds one tensor at a time. All ranks call it: each writes its part of the optimizer's state, rank 0 the rest. Throws
// Error, on all ranks, when anything fails on any: what was there before then still is. companions: what lies beside
// the weights, read when the run began; nullptr: read now, a vocabulary of 256 or 258 taken for bytes.
inline std::string save_checkpoint(TrainableModel& model, const TrainingState& state, const RunConfig& config,
                                   bool weights_bf16, const std::string& output_dir,
                                   uint64_t optimizer_shard_bytes = checkpoint::OPTIMIZER_SHARD_BYTES,
                                   const RunRanks& ranks = RunRanks(),
                                   const checkpoint::Companions* companions = nullptr) {
    const std::string name = checkpoint::folder_name(state.step), folder = output_dir + "/" + name;
    const std::string partial_path = output_dir + "/" + checkpoint::PARTIAL + name;
    std::optional<checkpoint::Companions> companions_now;
    std::optional<checkpoint::PartialFolder> partial;
    const auto make_folder = [&] {
        checkpoint::remove_leftovers(output_dir);
        if (companions == nullptr) {
            const int64_t V = model.config().vocab_size;
            companions_now = checkpoint::read_companions(checkpoint::companion_source(config.checkpoint, output_dir),
                                                         config, model.config(), V == 256 || V == END_MARKER + 1);
        }
        partial.emplace(partial_path);
    };
    const auto advice = [&] {
        try {
            return checkpoint::list(output_dir).empty() ? "; there is no earlier checkpoint"
                                                        : "; earlier checkpoints are as they were: with room to write, "
                                                          "--resume goes on from the newest";
        } catch (const Error&) {
            return "";  // what is wrong with the folder is said already
        }
    };
    try {
        ranks.first_does(make_folder, "a new checkpoint");
        if (!ranks.is_first()) {
            partial.emplace(partial_path, checkpoint::PartialFolder::joins);
        }
        model.gather_state(StateKind::master);
        const checkpoint::OptimizerFiles optimizer(model, weights_bf16, optimizer_shard_bytes, ranks);
        // '+' and the files that this rank has written, or '-' and what went wrong.
        std::string outcome;
        const auto write = [&] {
            try {
                model.enter_thread();
                if (ranks.is_first()) {
                    checkpoint::write_companions(*partial, companions != nullptr ? *companions : *companions_now,
                                                 config, model.config(), weights_bf16);
                    checkpoint::write_weights(*partial, model, weights_bf16);
                }
                optimizer.write(*partial, model);
                outcome = "+" + checkpoint::manifest_text(partial->files());
            } catch (const Error& what) {
                outcome = std::string("-") + what.what();
            }
        };
        ranks.at_length(write, durable_bytes, "writing of the checkpoint");
        for (const std::string& of_rank : ranks.world().gather_texts(outcome, "end of the checkpoint")) {
            CHECK(of_rank[0] == '+', "%s", of_rank.c_str() + 1);
            for (const auto& [file, digest] : checkpoint::parse_manifest(of_rank.substr(1), partial_path)) {
                partial->add(file, digest);
            }
        }
        const auto publish_folder = [&] {
            partial->write_text(checkpoint::STATE, checkpoint::state_text(state, config));
            partial->write_manifest();
            checkpoint::publish(*partial, folder, output_dir);
        };
        ranks.first_does(publish_folder, "publication of the checkpoint");
    } catch (const Error& what) {
        fail("%s%s", what.what(), advice());
    }
    if (config.keep_checkpoints > 0 && ranks.is_first()) {
        if (state.skipped_in_a_row == 0) {
            checkpoint::prune(output_dir, state.step, config.keep_checkpoints, config.damaged_checkpoints);
        } else {
            checkpoint::prune_skipped(output_dir, state);
        }
    }
    return folder;
}
