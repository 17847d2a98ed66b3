// configure_run.h: everything that is decided before a model exists: from the command line to settings that are known
// to work together.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <fnmatch.h>
#include <map>
#include <numeric>
#include <omp.h>
#include <optional>
#include <set>
#include <string>
#include <sys/stat.h>
#include <system_error>
#include <utility>
#include <vector>

#include "checkpoint_contents.h"  // where training stood in it, what tells data from others
#include "checkpoint_folder.h"    // the checkpoint to go on from
#include "checkpoint_load.h"      // whether it holds what its config.json says
#include "config.h"               // every setting
#include "flags.h"                // settings from the command line
#include "hf_config.h"            // the model's shape in a checkpoint
#include "ranks.h"                // processes that train together
#include "run_folder.h"           // where a run may write
#include "settings.h"             // as text, to compare
#include "standard_files.h"       // where messages go
#include "tokenizer.h"            // names of files for the terminal
#include "tokens.h"               // whether the data can be read

// The CPU's threads of this process, by --num_threads.
inline void set_num_threads(const RunConfig& config) {
    if (config.num_threads > 0) {
        omp_set_num_threads(config.num_threads);
    }
}

// Throws Error when `flag` names what is no folder; with may_be_missing one that is not there yet is right.
inline void check_names_folder(const char* flag, const std::string& folder, bool may_be_missing) {
    std::error_code error;
    const std::filesystem::file_status status = std::filesystem::status(folder, error);
    const bool is_missing = status.type() == std::filesystem::file_type::not_found &&
                            (!error || error == std::errc::no_such_file_or_directory);
    CHECK(!is_missing || may_be_missing, "%s %s: there is no such folder", flag, folder.c_str());
    CHECK(!error || is_missing, "%s %s: cannot look there: %s", flag, folder.c_str(), error.message().c_str());
    CHECK(is_missing || std::filesystem::is_directory(status), "%s %s: is no folder", flag, folder.c_str());
}

// Throws Error when --init_from names the folder of a run, not of weights.
inline void check_holds_weights(const std::string& folder) {
    const std::map<int64_t, std::string> checkpoints = checkpoint::list(folder);
    CHECK(checkpoints.empty() || checkpoint::exists(folder + "/config.json"),
          "--init_from %s: is the folder of a run; name one of its checkpoints, the newest is %s", folder.c_str(),
          checkpoints.rbegin()->second.c_str());
}

// The newest whole checkpoint in --output_dir. Damaged ones are passed over, with a line each on stderr, and kept in
// mind; when there is no other, that is the Error. progress: as of digest_file.
inline std::string find_checkpoint_to_resume(RunConfig& config, std::atomic<uint64_t>* progress) {
    std::map<int64_t, std::string> damaged;
    const std::optional<std::string> found = find_newest_checkpoint(config.output_dir, &damaged, progress);
    CHECK(found, "--resume: %s holds no whole checkpoint%s%s", config.output_dir.c_str(),
          damaged.empty() ? ", one is written at the end and every --checkpoint_every steps: begin anew" : ": ",
          damaged.empty() ? "" : damaged.rbegin()->second.c_str());
    for (auto it = damaged.rbegin(); it != damaged.rend(); ++it) {
        std::fprintf(stderr, "%s: passed over a damaged checkpoint: %s\n", config.program.c_str(), it->second.c_str());
        config.damaged_checkpoints.insert(it->first);
    }
    return *found;
}

// The command line alone: what is asked for, before it is known whether it can be done. No value: --help was printed.
// Both trainers begin with it: nothing is open yet.
inline std::optional<ParsedFlags> read_command_line(int argc, const char* const* argv) {
    open_standard_files();
    ParsedFlags parsed = parse_flags(argc, argv);
    if (parsed.help) {
        std::fputs(help_text(argv[0]).c_str(), stdout);
        check_printed();
        return std::nullopt;
    }
    check_given_flags(parsed);
    parsed.config.program = argv[0];
    return parsed;
}

// Whether a pattern for data stands for the file of this canonical path, which need not be there.
inline bool stands_for(const std::string& pattern, const std::string& path) {
    namespace fs = std::filesystem;
    const size_t wildcard = pattern.find_first_of("*?[");
    if (wildcard == std::string::npos || checkpoint::exists(pattern)) {
        return false;  // a name
    }
    // The folders before the first wildcard as they are, whatever they are called by.
    const size_t slash = pattern.rfind('/', wildcard), begin = slash == std::string::npos ? 0 : slash + 1;
    std::error_code error;  // of a folder that cannot be looked into: it is taken by its name
    const fs::path folder = fs::weakly_canonical(begin == 0 ? "." : pattern.substr(0, begin), error);
    const std::string whole = (fs::path(glob_escape(folder.string())) / pattern.substr(begin)).string();
    return fnmatch(whole.c_str(), path.c_str(), FNM_PATHNAME | FNM_PERIOD) == 0;
}

// Throws Error when a pattern for data stands for what the run itself writes, too: once resumed it would train on that.
inline void check_data_leaves_out_output(const RunConfig& config) {
    std::error_code error;
    const std::string folder = config.output_dir.empty() ? "runs/00000000-000000" : config.output_dir;
    const std::string output = std::filesystem::weakly_canonical(folder, error).string();
    const auto check = [&](const char* flag, const std::vector<std::string>& patterns, const std::string& written) {
        for (const std::string& pattern : patterns) {
            CHECK(!stands_for(pattern, written),
                  "%s '%s': stands for %s, too, which the run writes: name a pattern that leaves it out, or another "
                  "--output_dir",
                  flag, pattern.c_str(), written.c_str());
        }
    };
    std::vector<std::string> files = {metrics_path(output), saved_settings_path(output)};
    for (const char* name :
         {"config.json", checkpoint::WEIGHTS, checkpoint::STATE, checkpoint::MANIFEST, checkpoint::TOKENIZER,
          checkpoint::SENTENCEPIECE, "optimizer-00000-of-00001.safetensors"}) {
        files.push_back(output + "/" + checkpoint::folder_name(0) + "/" + name);
    }
    for (const std::string& written : files) {
        check("--train_data", config.train_data, written);
        check("--val_data", config.val_data, written);
    }
}

// One line for all files of which the same is to be said.
inline void warn_of_each(const RunConfig& config, const char* flag, const std::vector<std::string>& files,
                         const std::string& what, const std::string& so) {
    if (!files.empty()) {
        const std::string others = files.size() == 1   ? ""
                                   : files.size() == 2 ? " (so is another)"
                                                       : format_string(" (so are %zu others)", files.size() - 1);
        print_warning(config.program,
                      std::string(flag) + ": " + terminal_safe(files[0]) + " " + what + others + ": " + so);
    }
}

// Says which files have nothing in them, come twice in what is trained on, or validate what was trained on:
// --val_fraction's part among it, which is cut off the end.
inline void warn_of_files(const RunConfig& config, const RunData& data) {
    const auto identity = [](const TokenFile& file) {
        struct stat status = {};  // zeros where the file is gone by now
        stat(file.path.c_str(), &status);
        return identity_of(status);
    };
    std::set<FileIdentity> trained, said;
    std::vector<std::string> twice, validated;
    if (data.train) {
        warn_of_each(config, "--train_data", data.train->stream().empty(), "is empty", "left out");
        for (const TokenFile& file : data.train->stream().files()) {
            if (!trained.insert(identity(file)).second && said.insert(identity(file)).second) {
                twice.push_back(file.path);
            }
        }
    }
    if (!config.val_data.empty()) {
        warn_of_each(config, "--val_data", data.validation->stream().empty(), "is empty", "left out");
        for (const TokenFile& file : data.validation->stream().files()) {
            if (trained.count(identity(file)) > 0) {
                validated.push_back(file.path);
            }
        }
    }
    warn_of_each(config, "--train_data", twice, "is there more than once",
                 std::string("its text counts as often") +
                     (config.splits_train_data() ? ", and --val_fraction may validate what is trained on" : ""));
    warn_of_each(config, "--val_data", validated, "is trained on too", "its loss says nothing of other text");
}

// Says what this program trains and transformers does not load (5.24: rules of its LlamaConfig).
inline void warn_of_shape(const RunConfig& config) {
    const ModelConfig& m = config.model;
    if (m.width % m.num_heads != 0) {
        print_warning(config.program,
                      format_string("--width %d is no multiple of --num_heads %d: transformers refuses such a "
                                    "config.json; other programs may, too",
                                    m.width, m.num_heads));
    }
    if (m.init_std > 1.0) {
        print_warning(config.program,
                      format_string("--init_std %s: transformers refuses a config.json in which it is above 1",
                                    number_text(m.init_std).c_str()));
    }
}

// Says where the model will meet positions that it was not trained on.
inline void warn_of_positions(const RunConfig& config, const ModelConfig& stored, const std::string& rotated) {
    if (!rotated.empty()) {
        print_warning(config.program,
                      format_string("%s: not as in %s, given in brackets: positions are rotated otherwise from "
                                    "here on",
                                    rotated.c_str(), config.checkpoint.c_str()));
    } else if (!config.fit && stored.max_positions > 0 && config.seq_len > stored.max_positions) {
        print_warning(
            config.program,
            format_string("--seq_len %lld: %s is for up to %lld positions, the others are new to it "
                          "(--rope_theta and --rope_scaling_factor change how they are rotated)",
                          (long long)config.seq_len, config.checkpoint.c_str(), (long long)stored.max_positions));
    }
}

// Without --seq_len a checkpoint is evaluated at the length that it was trained at, if its state says, else at no more
// positions than it knows. A sample alone, which is made under dense attention, needs no more than its prompt and its
// tokens on each rank.
inline void take_length_to_look_at(ParsedFlags& parsed, const ModelConfig& stored) {
    RunConfig& config = parsed.config;
    const std::optional<TrainingState> state = checkpoint::find_state(config.checkpoint);
    const int64_t trained = state ? state->seq_len : 0;
    if (!config.resume) {  // which has it among the run's settings
        if (trained > 0) {
            config.seq_len = trained;
        } else if (stored.max_positions > 0) {
            config.seq_len = std::min(config.seq_len, stored.max_positions);
        }
    }
    if (config.asks_for_sample && !config.has_validation_data() && parsed.given.count("attention") == 0) {
        config.attention = AttentionMode::dense;
        const int64_t chunks = ContextPartition{config.context_parallel, 0, 0}.num_chunks();
        const bool is_known = config.resume || trained > 0 || stored.max_positions == 0;
        const int64_t longest = is_known ? config.seq_len : stored.max_positions;
        const int64_t needed =
            std::min((int64_t)config.sample_prompt.size() + 1 + std::min(config.sample_tokens, longest), longest);
        config.seq_len =
            std::max(chunks, std::min(round_up(needed * config.context_parallel, chunks), longest / chunks * chunks));
    }
}

// Of the settings saved with a run that goes on on other ranks: as many of them share a sequence as both allow.
// Returns a sentence about it; empty: as it was.
inline std::string fit_context_parallel(ParsedFlags& parsed, int num_ranks) {
    int& W = parsed.config.context_parallel;
    const int saved = W, fits = W >= 1 ? std::gcd(W, num_ranks) : W;
    if (parsed.saved.count("context_parallel") == 0 || fits == saved) {
        return "";
    }
    W = fits;
    return format_string("--context_parallel %d, saved with the run, does not divide the %d ranks of now: it is %d",
                         saved, num_ranks, fits);
}

// The rest of what is decided before a model exists: finds the checkpoint to start from and takes the model's shape
// from it, checks all rules; with --fit data and output folder are not looked at. Writes nothing but a
// lock's file, with --resume or where the folder holds a run; --resume also removes what an interrupted save has left.
// All ranks call it, and get the same. Throws Error for anything that cannot be run as asked.
inline RunConfig resolve_run(ParsedFlags parsed, const RunRanks& ranks) {
    RunConfig& config = parsed.config;
    config.data_parallel = ranks.mesh().data_parallel;
    if (!config.init_from.empty() && !config.resume) {
        check_names_folder("--init_from", config.init_from, false);
        check_holds_weights(config.init_from);
    }
    if (!config.output_dir.empty() && !config.fit) {
        check_names_folder("--output_dir", config.output_dir, true);
    }
    if (config.max_steps > 0 && !config.fit) {
        check_is_in_no_checkpoint(config.output_dir);
    }
    if (config.resume) {
        const auto find = [&](std::atomic<uint64_t>* progress) {
            const bool may_train = config.max_steps > 0 && !config.fit;
            if (may_train) {  // first: a run that is about to end may yet write a newer one
                config.output_lock = lock_output(config);
            }
            const std::string found = find_checkpoint_to_resume(config, progress);
            if (may_train) {
                checkpoint::remove_leftovers(config.output_dir);  // no save may come that would
            }
            return found;
        };
        config.checkpoint = ranks.first_decides_at_length(find, "choice of the checkpoint");
    } else {
        config.checkpoint = config.init_from;
    }
    const auto is_given = [&](const char* name) { return parsed.given.count(name) > 0; };
    // Evaluation alone covers all validation data unless told otherwise.
    if (config.max_steps == 0 && !is_given("eval_batches")) {
        config.eval_batches = 0;
    }
    config.asks_for_sample = config.max_steps == 0 && parsed.typed.count("sample_prompt") > 0;
    if (config.asks_for_sample && !is_given("train_data") && !is_given("val_data") && !is_given("val_fraction") &&
        !is_given("eval_batches")) {
        config.train_data.clear(), config.val_data.clear();  // those of --resume's run, which evaluate it
    }
    if (!config.checkpoint.empty()) {
        const ModelConfig stored =
            read_while_it_is_there(config.checkpoint, [&] { return load_hf_config(config.checkpoint); });
        if (config.max_steps == 0 && !config.fit && !is_given("seq_len")) {
            take_length_to_look_at(parsed, stored);
        }
        const std::string rotated = take_model_shape(parsed, stored, config.checkpoint);
        // Before memory is taken for what only config.json knows.
        read_while_it_is_there(config.checkpoint, [&] { check_holds_model(config.checkpoint, config.model); });
        if (ranks.is_first()) {
            warn_of_positions(config, stored, rotated);
        }
    }
    fit_default_dense_layers(parsed);
    if (config.checkpoint.empty() && config.model.max_positions > 0 && !is_given("max_positions")) {
        config.model.max_positions = std::max(config.model.max_positions, config.seq_len);  // the preset's
    }
    if (config.fit && !is_given("seq_len")) {  // the default may not be a legal one
        const ContextPartition partition{config.context_parallel, 0, 0};
        config.seq_len = config.attention == AttentionMode::lighthouse
                             ? std::min(shortest_lighthouse_length(config.lighthouse), MAX_SEQ_LEN)
                             : round_up<int64_t>(config.seq_len, partition.num_chunks());
    }
    validate(config);
    if (config.fit) {
        return config;
    }
    if (config.max_steps > 0 && !config.output_dir.empty()) {
        check_holds_no_run(config, ranks.size() == 1);
    }
    if (!config.output_dir.empty() || config.max_steps > 0) {
        check_data_leaves_out_output(config);
    }
    const RunData data = open_data(config);  // for what it refuses: before the time and memory that a model takes
    if (ranks.is_first()) {
        warn_of_files(config, data);
    }
    if (ranks.is_first() && config.max_steps > 0) {
        warn_of_shape(config);
        if (config.warmup_steps >= config.max_steps && is_given("warmup_steps")) {
            print_warning(config.program,
                          format_string("--warmup_steps %lld: the run ends before them, at --max_steps %lld",
                                        (long long)config.warmup_steps, (long long)config.max_steps));
        }
    }
    std::string common = settings_toml(config) + config.checkpoint;
    for (const std::optional<SequenceSet>* set : {&data.train, &data.validation}) {
        common += *set ? "\n" + checkpoint::data_identity(**set) : "";
    }
    ranks.check_equal(common, "settings or data");
    return config;
}

// Both, for the trainer on the CPU, which is one process.
inline std::optional<RunConfig> configure_run(int argc, const char* const* argv) {
    std::optional<ParsedFlags> parsed = read_command_line(argc, argv);
    if (!parsed) {
        return std::nullopt;
    }
    const std::string without_effect = check_cpu_flags(*parsed);
    if (!without_effect.empty()) {
        print_warning(parsed->config.program, without_effect);
    }
    parsed->config.context_parallel = 1;
    return resolve_run(*parsed, RunRanks());
}
