// flags.h: the settings of config.h as flags and as lines of a settings file: one table (list_settings) that serves the
// command line, `--config run.toml`, --help, the table printed at start-up and the settings saved with a run.
#pragma once
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "config.h"
#include "mfu.h"
#include "toml.h"

// ---- values as text -----------------------------------------------------------------------------

// The words of each setting that is a choice.
template <class Enum>
using Choices = std::vector<std::pair<const char*, Enum>>;
inline Choices<AttentionMode> choices(AttentionMode) {
    return {{"dense", AttentionMode::dense}, {"lighthouse", AttentionMode::lighthouse}};
}
inline Choices<LighthouseScorer> choices(LighthouseScorer) {
    return {{"norm", LighthouseScorer::norm}, {"dilated", LighthouseScorer::dilated}};
}
inline Choices<DataFormat> choices(DataFormat) {
    return {{"auto", DataFormat::automatic}, {"bytes", DataFormat::bytes}, {"shards", DataFormat::shards}};
}
inline Choices<ScheduleKind> choices(ScheduleKind) {
    return {{"cosine", ScheduleKind::cosine}, {"linear", ScheduleKind::linear}, {"constant", ScheduleKind::constant}};
}
inline Choices<SaveDtype> choices(SaveDtype) {
    return {{"auto", SaveDtype::automatic}, {"fp32", SaveDtype::fp32}, {"bf16", SaveDtype::bf16}};
}
inline Choices<Recompute> choices(Recompute) {
    return {
        {"none", Recompute::none}, {"all_but_attention", Recompute::all_but_attention}, {"block", Recompute::block}};
}
inline Choices<Offload> choices(Offload) {
    return {{"none", Offload::none},
            {"activations", Offload::activations},
            {"optimizer", Offload::optimizer},
            {"all", Offload::all}};
}

inline Choices<CommTransport> choices(CommTransport) {
    return {{"auto", CommTransport::automatic}, {"nccl", CommTransport::nccl}, {"host", CommTransport::host}};
}
inline Choices<ContextExchange> choices(ContextExchange) {
    return {{"auto", ContextExchange::automatic}, {"ring", ContextExchange::ring}, {"gather", ContextExchange::gather}};
}

// The word for a choice: choice_name(ScheduleKind::cosine) is "cosine".
template <class Enum>
const char* choice_name(Enum value) {
    for (const auto& [word, choice] : choices(value)) {
        if (choice == value) {
            return word;
        }
    }
    return "?";
}

using Words = std::vector<std::string>;  // the values given to one setting

// parse(words, value): throws Error with the rule a value breaks, to follow "--flag value: must be ".
// text(value): the value as settings files write it.
template <class Integer, std::enable_if_t<std::is_integral_v<Integer> && !std::is_same_v<Integer, bool>, int> = 0>
void parse(const Words& words, Integer& value) {
    const std::string& word = words.back();
    const size_t digits = word.size() > 1 && word[0] == '-' ? 1 : 0;
    CHECK(!word.empty() && word.find_first_not_of("0123456789", digits) == std::string::npos, "a whole number");
    CHECK(digits == 0 || std::is_signed_v<Integer>, "a whole number that is not negative");
    errno = 0;
    const long long parsed = std::strtoll(word.c_str(), nullptr, 10);
    value = (Integer)parsed;
    CHECK(errno == 0 && (long long)value == parsed, "a whole number that fits %zu bits", 8 * sizeof(Integer));
}
inline void parse(const Words& words, double& value) {
    char* end;
    value = std::strtod(words.back().c_str(), &end);
    CHECK(
        !words.back().empty() && *end == '\0' && !std::isspace((unsigned char)words.back()[0]) && std::isfinite(value),
        "a number");
}
inline void parse(const Words& words, bool& value) {
    CHECK(words.back() == "true" || words.back() == "false", "true or false");
    value = words.back() == "true";
}
inline void parse(const Words& words, std::string& value) { value = words.back(); }
inline void parse(const Words& words, std::vector<std::string>& value) { value = words; }
// Layer numbers: words with commas between them, or "none".
inline void parse(const Words& words, std::vector<int>& value) {
    value.clear();
    for (const std::string& word : words) {
        if (word == "none" || word.empty()) {
            continue;
        }
        for (size_t begin = 0; begin <= word.size();) {
            const size_t end = std::min(word.find(',', begin), word.size());
            int number;
            try {
                parse(Words{word.substr(begin, end - begin)}, number);
            } catch (const Error&) {
                fail("whole numbers with commas between them, such as 0,1,-2,-1, or none");
            }
            value.push_back(number);
            begin = end + 1;
        }
    }
}
template <class Enum, std::enable_if_t<std::is_enum_v<Enum>, int> = 0>
void parse(const Words& words, Enum& value) {
    std::string known;
    for (const auto& [word, choice] : choices(value)) {
        if (words.back() == word) {
            value = choice;
            return;
        }
        known += std::string(known.empty() ? "" : " or ") + word;
    }
    fail("%s", known.c_str());
}

template <class Integer, std::enable_if_t<std::is_integral_v<Integer> && !std::is_same_v<Integer, bool>, int> = 0>
std::string text(Integer value) {
    return std::to_string(value);
}
inline std::string text(double value) {  // the shortest form that reads back as the same number
    if (value == std::floor(value) && std::fabs(value) < 1e9) {
        return format_string("%.0f", value);
    }
    for (int digits = 1; digits < 17; ++digits) {
        const std::string shorter = format_string("%.*g", digits, value);
        if (std::strtod(shorter.c_str(), nullptr) == value) {
            return shorter;
        }
    }
    return format_string("%.17g", value);
}
inline std::string text(bool value) { return value ? "true" : "false"; }
inline std::string text(const std::string& value) { return toml_quote(value); }
inline std::string text(const std::vector<std::string>& values) {
    std::string joined = "[";
    for (const std::string& value : values) {
        joined += (joined.size() > 1 ? ", " : "") + toml_quote(value);
    }
    return joined + "]";
}
inline std::string text(const std::vector<int>& values) {
    std::string joined;
    for (const int value : values) {
        joined += (joined.empty() ? "" : ",") + std::to_string(value);
    }
    return toml_quote(joined.empty() ? "none" : joined);
}
template <class Enum, std::enable_if_t<std::is_enum_v<Enum>, int> = 0>
std::string text(Enum value) {
    return toml_quote(choice_name(value));
}

// What --help shows in the place of a value.
template <class Value>
std::string value_name(const Value& value) {
    if constexpr (std::is_same_v<Value, bool>) {
        return "";
    } else if constexpr (std::is_enum_v<Value>) {
        std::string words;
        for (const auto& choice : choices(value)) {
            words += (words.empty() ? "" : "|") + std::string(choice.first);
        }
        return words;
    } else if constexpr (std::is_integral_v<Value>) {
        return "N";
    } else if constexpr (std::is_same_v<Value, double>) {
        return "X";
    } else if constexpr (std::is_same_v<Value, std::vector<int>>) {
        return "N,N,...";
    } else if constexpr (std::is_same_v<Value, std::vector<std::string>>) {
        return "FILE...";
    } else {
        return "TEXT";
    }
}

// ---- the table ----------------------------------------------------------------------------------

struct Setting {
    std::string name;   // --name, and the name in settings files
    std::string group;  // the heading in --help
    std::string help;
    std::string value_name;
    bool is_list = false;    // takes several values
    bool is_toggle = false;  // the value may be left out: true
    bool saved = true;       // false: what to do now, rather than how the run is set up
    std::function<void(const Words&)> set;
    std::function<std::string()> get;  // as settings files write it
};

// Every setting, reading and writing the fields of `c`, which must outlive the table.
inline std::vector<Setting> list_settings(RunConfig& c) {
    std::vector<Setting> settings;
    std::string group;
    auto add = [&](const char* name, auto& field, const char* help, const char* shown = nullptr) {
        using Value = std::decay_t<decltype(field)>;
        Setting s;
        s.name = name, s.group = group, s.help = help;
        s.value_name = shown ? shown : value_name(field);
        s.is_list = std::is_same_v<Value, std::vector<std::string>> || std::is_same_v<Value, std::vector<int>>;
        s.is_toggle = std::is_same_v<Value, bool>;
        s.set = [&field](const Words& words) { parse(words, field); };
        s.get = [&field] { return text(field); };
        settings.push_back(std::move(s));
    };
    auto add_unsaved = [&](const char* name, auto& field, const char* help, const char* shown = nullptr) {
        add(name, field, help, shown);
        settings.back().saved = false;
    };

    group = "Model (with --init_from and --resume the shape comes from the checkpoint)";
    add_unsaved("model", c.model_preset, "shape by name; the flags below change single fields of it",
                "tiny|lighthouse-530m|llama3.2-1b|llama3-8b");
    add("vocab_size", c.model.vocab_size, "tokens in the vocabulary; 258: bytes, begin and end markers");
    add("num_layers", c.model.num_layers, "decoder blocks");
    add("width", c.model.width, "channels of the residual stream; a multiple of 8");
    add("num_heads", c.model.num_heads, "query heads");
    add("num_kv_heads", c.model.num_kv_heads, "key/value heads; must divide --num_heads");
    add("head_dim", c.model.head_dim, "channels of a head; a multiple of 8 up to 256, on the GPU 64 and 128 are fast");
    add("ffn_width", c.model.ffn_width, "channels inside the feed-forward (SwiGLU) layer; a multiple of 8");
    add("tied_embeddings", c.model.tied_embeddings, "the classifier shares the embedding's weight");
    add("rope_theta", c.model.rope_theta, "base of the rotary position frequencies");
    add("rope_scaling_factor", c.model.rope_scaling.factor, "Llama-3 frequency scaling; 1: off");
    add("rope_low_freq_factor", c.model.rope_scaling.low_freq_factor, "of Llama-3 frequency scaling");
    add("rope_high_freq_factor", c.model.rope_scaling.high_freq_factor, "of Llama-3 frequency scaling");
    add("rope_original_max_positions", c.model.rope_scaling.original_max_positions,
        "of Llama-3 frequency scaling, tokens");
    add("norm_eps", c.model.norm_eps, "added to the mean square in RMSNorm");
    add("init_std", c.model.init_std, "standard deviation of initial matrices");
    add("max_positions", c.model.max_positions, "written to config.json, tokens; 0: --seq_len");

    group = "Attention";
    add("attention", c.attention, "lighthouse: arXiv:2605.06554, for the first stage of training");
    add("lighthouse_levels", c.lighthouse.levels, "levels of the pyramid, tokens included");
    add("lighthouse_pool", c.lighthouse.pool, "entries pooled into one of the next level; a power of two");
    add("lighthouse_topk", c.lighthouse.topk, "entries a level hands down in the whole sequence; a multiple of 128");
    add("lighthouse_scorer", c.lighthouse.scorer, "what ranks the entries");
    add("lighthouse_dilation", c.lighthouse.dilation, "of the dilated scorer, tokens");
    add("lighthouse_dense_layers", c.lighthouse.dense_layers,
        "layers that stay dense, negative from the last; or none");
    add("lighthouse_steps", c.lighthouse_steps, "the step at which all layers become dense; -1: never");

    group = "Data";
    add("train_data", c.train_data, "files or quoted patterns ('corpus/*.txt'): raw bytes, or llm.c token shards");
    add("val_data", c.val_data, "the same for validation");
    add("val_fraction", c.val_fraction,
        "of the training data, from its end, for validation when --val_data is not given");
    add("data_format", c.data_format, "auto: shards where a file starts with their magic number, else bytes");
    add("byte_markers", c.byte_markers, "tokens 256 and 257 mark the begin and end of each file of bytes");
    add("shuffle_seed", c.shuffle_seed, "of the order of training sequences");

    group = "Training";
    add("seq_len", c.seq_len, "tokens of a sequence");
    add("batch_size", c.batch_size, "sequences of one forward and backward pass");
    add("global_batch", c.global_batch, "sequences of one optimizer step (gradients accumulate); 0: --batch_size");
    add("max_steps", c.max_steps, "optimizer steps in all; 0: only evaluate");
    add("seed", c.seed, "of initial weights and samples");
    add("max_skipped", c.max_skipped, "steps in a row with a non-finite loss or gradient norm that stop the run");
    add("recompute", c.recompute, "what backward computes again to save memory; block: all from its input (GPU)");
    add("offload", c.offload, "in host memory: inputs of blocks, AdamW's 12 bytes a parameter, or both (GPU)");
    add("deterministic", c.deterministic, "every step repeats bit for bit (GPU; the CPU always does)");

    group = "Optimizer (AdamW)";
    add("learning_rate", c.learning_rate, "peak, after the warm-up");
    add("warmup_steps", c.warmup_steps, "steps of linear warm-up");
    add("schedule", c.schedule, "how the learning rate falls after the warm-up");
    add("final_learning_rate_fraction", c.final_learning_rate_fraction, "of --learning_rate, where the decay ends");
    add("decay_steps", c.decay_steps, "the step at which the decay ends; 0: --max_steps");
    add("beta1", c.beta1, "decay of the running mean of gradients");
    add("beta2", c.beta2, "decay of the running mean of squared gradients");
    add("adam_eps", c.adam_eps, "added to the root of the mean square");
    add("weight_decay", c.weight_decay, "a step, times the learning rate; not on norms and embeddings");
    add("max_grad_norm", c.max_grad_norm, "clip the global gradient norm to this; 0: off");

    group = "Checkpoints";
    add_unsaved("init_from", c.init_from, "start from the weights in this Hugging Face Llama folder", "FOLDER");
    add_unsaved("resume", c.resume, "go on from the newest checkpoint in --output_dir, with that run's settings");
    add("output_dir", c.output_dir, "checkpoints, metrics.jsonl, settings.toml [runs/DATE-TIME]", "FOLDER");
    add("checkpoint_every", c.checkpoint_every, "steps between checkpoints; 0: only at the end");
    add("keep_checkpoints", c.keep_checkpoints, "the newest N stay; 0: all");
    add("save_dtype", c.save_dtype, "of model.safetensors; auto: fp32 on the CPU, bf16 on the GPU");

    group = "Evaluation and samples";
    add("eval_every", c.eval_every, "steps between validation losses; 0: only at the end");
    add("eval_batches", c.eval_batches, "validation batches of --batch_size sequences; 0: all (as with --max_steps 0)");
    add("sample_every", c.sample_every, "steps between samples; 0: only at the end");
    add("sample_tokens", c.sample_tokens, "tokens of a sample; 0: no samples");
    add("sample_prompt", c.sample_prompt, "text that samples continue");
    add("temperature", c.temperature, "of samples; 0: always the likeliest token");
    add("top_p", c.top_p, "samples take the likeliest tokens that together have this probability");

    group = "Many GPUs (one process each: scripts/mpirun_train.sh, slurm_train.sh, spawn_ranks.sh)";
    add("context_parallel", c.context_parallel, "processes that share each sequence; must divide their number");
    add("context_exchange", c.context_exchange, "how keys of a shared sequence travel; auto: by the cost of both");
    add("comm_transport", c.comm_transport, "auto: nccl; host: through host memory, slow, for tests");
    add("comm_timeout", c.comm_timeout, "seconds without progress between processes that end the job");

    group = "Device and terminal";
    add("device", c.device, "index of the GPU");
    add("num_threads", c.num_threads, "CPU threads; 0: all");
    add("classifier_chunk_rows", c.classifier_chunk_rows, "tokens whose logits exist at once on the GPU; 0: chosen");
    add_unsaved("print_influence", c.print_influence,
                "at evaluations: how much later tokens change earlier losses through selection");
    add("print_memory", c.print_memory, "print the plan of GPU and host memory, every buffer by name");
    add_unsaved("fit", c.fit, "print the longest --seq_len for each --recompute and --offload, and end");
    add("gpu_memory", c.gpu_memory, "GiB of GPU memory the run may use; 0: all that is free; --fit then needs no GPU");
    add("host_memory", c.host_memory, "GiB of host memory --offload may use; 0: all that is available");
    add("profile", c.profile,
        "at the end, print where the GPU's time of a step went, by stage; of several processes, also what of their "
        "transfers was hidden");
    add("plain", c.plain, "no progress bar on a terminal");
    return settings;
}

inline const Setting* find_setting(const std::vector<Setting>& settings, const std::string& name) {
    for (const Setting& s : settings) {
        if (s.name == name) {
            return &s;
        }
    }
    return nullptr;
}

// ---- messages -----------------------------------------------------------------------------------

// How many letters must be inserted, removed, replaced or swapped with a neighbour to turn `a` into `b`.
inline int edit_distance(const std::string& a, const std::string& b) {
    std::vector<std::vector<int>> d(a.size() + 1, std::vector<int>(b.size() + 1));
    for (size_t i = 0; i <= a.size(); ++i) {
        for (size_t j = 0; j <= b.size(); ++j) {
            if (i == 0 || j == 0) {
                d[i][j] = (int)(i + j);
                continue;
            }
            d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
                d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
            }
        }
    }
    return d[a.size()][b.size()];
}

// The setting whose name is nearest to a mistyped one: dashes count as underscores, initials ("lr") stand for their
// words, and a name that contains the typed one, or is contained in it, is nearer than its length says.
inline std::string nearest_setting(const std::vector<Setting>& settings, std::string typed) {
    std::replace(typed.begin(), typed.end(), '-', '_');
    std::string nearest;
    int best = 1 << 20;
    auto consider = [&](const std::string& name) {
        int distance = 2 * edit_distance(typed, name);
        if (typed.size() >= 3 && (name.find(typed) != std::string::npos || typed.find(name) != std::string::npos)) {
            distance /= 2;
        }
        std::string initials;
        for (size_t i = 0; i < name.size(); ++i) {
            initials += i == 0 || name[i - 1] == '_' ? std::string(1, name[i]) : "";
        }
        distance = typed == initials ? 0 : distance;
        if (distance < best) {
            best = distance, nearest = name;
        }
    };
    for (const Setting& s : settings) {
        consider(s.name);
    }
    consider("config");
    consider("help");
    return nearest;
}

// The text of --help: every setting by group with its default, and how MFU is counted.
inline std::string help_text(const std::string& program) {
    RunConfig defaults;
    const std::vector<Setting> settings = list_settings(defaults);
    std::string help = "Trains a Llama on raw bytes or token shards.\n\n  " + program +
                       " --train_data 'corpus/*.txt' [--flag value ...]\n  " + program +
                       " --resume --output_dir runs/mine\n\n"
                       "  --config FILE: settings from a TOML file, `name = value` lines with the names below. The "
                       "command line wins.\n"
                       "  Toggles take true or false; --toggle alone means true. Defaults in brackets.\n";
    const size_t help_column = 33;
    std::string group;
    for (const Setting& s : settings) {
        if (s.group != group) {
            group = s.group;
            help += "\n" + group + "\n";
        }
        std::string left = "  --" + s.name + (s.value_name.empty() ? "" : " " + s.value_name);
        left += left.size() + 2 > help_column ? "\n" + std::string(help_column, ' ')
                                              : std::string(help_column - left.size(), ' ');
        std::string value = s.get();
        value.erase(std::remove(value.begin(), value.end(), '"'), value.end());
        const bool show_default = !value.empty() && value != "[]";
        help += left + s.help + (show_default ? " [" + value + "]" : "") + "\n";
    }
    return help + "\nMFU\n" + mfu_help_text();
}

// The resolved settings as a settings file.
inline std::string settings_toml(const RunConfig& config) {
    RunConfig copy = config;
    std::string toml = "# The settings of this run, as --config reads them.\n", group;
    for (const Setting& s : list_settings(copy)) {
        if (!s.saved) {
            continue;
        }
        if (s.group != group) {
            group = s.group;
            toml += "\n# " + group + "\n";
        }
        toml += s.name + " = " + s.get() + "\n";
    }
    return toml;
}

// The resolved settings as a table for the terminal: several `name value` columns under each group's heading.
inline std::string settings_table(const RunConfig& config) {
    RunConfig copy = config;
    const std::vector<Setting> settings = list_settings(copy);
    std::string table, group, line;
    const size_t column_width = 38, max_width = 3 * column_width;
    auto end_line = [&] {
        table += line.empty() ? "" : line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
        line.clear();
    };
    for (const Setting& s : settings) {
        const std::string value = s.get();
        if (value == "\"\"" || value == "[]") {
            continue;
        }
        if (s.group != group) {
            end_line();
            group = s.group;
            table += group.substr(0, group.find(" (")) + "\n";
        }
        std::string cell = "  " + s.name + " " + value;
        cell.resize(round_up(cell.size() + 1, column_width), ' ');
        if (line.size() + cell.size() > max_width) {
            end_line();
        }
        line += cell;
    }
    end_line();
    return table;
}

// ---- reading ------------------------------------------------------------------------------------

// The settings given in one place; earlier layers give way to later ones.
struct SettingsLayer {
    std::map<std::string, Words> values;
    std::map<std::string, std::string> origin;  // "--seq_len" or "run.toml line 3: seq_len", for messages
};

inline SettingsLayer layer_from_file(const std::vector<Setting>& settings, const std::string& path) {
    SettingsLayer layer;
    for (const TomlEntry& entry : read_toml(path)) {
        const Setting* s = find_setting(settings, entry.name);
        CHECK(s != nullptr, "%s line %d: there is no setting '%s'; the nearest is '%s'", path.c_str(), entry.line,
              entry.name.c_str(), nearest_setting(settings, entry.name).c_str());
        CHECK(s->is_list || entry.values.size() == 1, "%s line %d: %s takes one value, not an array", path.c_str(),
              entry.line, entry.name.c_str());
        layer.values[entry.name] = entry.values;
        layer.origin[entry.name] = format_string("%s line %d: %s", path.c_str(), entry.line, entry.name.c_str());
    }
    return layer;
}

struct ParsedFlags {
    RunConfig config;             // not validated yet
    std::set<std::string> given;  // names set on the command line or in the --config file
    bool help = false;            // --help was given: print help_text() and end
};

// The name of the settings file inside a run's folder.
inline std::string saved_settings_path(const std::string& output_dir) { return output_dir + "/settings.toml"; }

// Reads the command line. A setting's value comes from, the first that has it: the command line, the --config file,
// with
// --resume the settings saved with the run, the --model preset, the defaults. Throws Error for an unknown flag (naming
// the nearest), a missing or unreadable value, and flags that contradict each other by being given at all.
inline ParsedFlags parse_flags(int argc, const char* const* argv) {
    ParsedFlags parsed;
    const std::vector<Setting> settings = list_settings(parsed.config);

    CLI::App app;
    app.set_help_flag();
    app.allow_extras();
    bool help = false;
    app.add_flag("--help,-h", help);
    std::string config_file;
    std::map<std::string, CLI::Option*> options;
    std::map<std::string, Words> sink;  // CLI11 wants a variable for each option; the values are read from the options
    options["config"] = app.add_option("--config", config_file)->expected(1);
    for (const Setting& s : settings) {
        CLI::Option* option = app.add_option("--" + s.name, sink[s.name]);
        option->expected(s.is_toggle ? 0 : 1, s.is_list ? 1 << 20 : 1);
        // Scripts append flags to override theirs; a repeated list goes on.
        option->multi_option_policy(s.is_list ? CLI::MultiOptionPolicy::TakeAll : CLI::MultiOptionPolicy::TakeLast);
        options[s.name] = option;
    }
    options["config"]->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
    try {
        app.parse(argc, argv);
    } catch (const CLI::ArgumentMismatch& error) {  // "--seq_len: 1 required TEXT missing"
        const std::string what = error.what();
        fail("%s: its value is missing", what.substr(0, what.find(':')).c_str());
    } catch (const CLI::ParseError& error) {
        fail("%s", error.what());
    }
    if (help) {
        parsed.help = true;
        return parsed;
    }
    for (const std::string& extra : app.remaining()) {
        CHECK(extra.size() > 1 && extra[0] == '-', "'%s': every value follows its flag, e.g. --train_data '%s'",
              extra.c_str(), extra.c_str());
        const std::string name = extra.substr(0, extra.find('='));
        fail("%s: there is no such flag; the nearest is --%s (--help lists all)", name.c_str(),
             nearest_setting(
                 settings, name.substr(name.find_first_not_of('-') == std::string::npos ? name.size()
                                                                                        : name.find_first_not_of('-')))
                 .c_str());
    }

    SettingsLayer command_line;
    for (const Setting& s : settings) {
        if (options[s.name]->count() > 0) {
            Words words = options[s.name]->results();
            if (s.is_toggle && words.back().empty()) {
                words.back() = "true";
            }
            command_line.values[s.name] = words;
            command_line.origin[s.name] = "--" + s.name;
        }
    }
    SettingsLayer file;
    if (!config_file.empty()) {
        file = layer_from_file(settings, config_file);
    }
    auto value_given = [&](const char* name) -> const Words* {
        for (const SettingsLayer* layer : {&command_line, &file}) {
            const auto found = layer->values.find(name);
            if (found != layer->values.end()) {
                return &found->second;
            }
        }
        return nullptr;
    };
    SettingsLayer saved;
    const Words* resume = value_given("resume");
    if (resume != nullptr && resume->back() == "true") {
        const Words* output_dir = value_given("output_dir");
        CHECK(output_dir != nullptr, "--resume: say with --output_dir which run to continue");
        saved = layer_from_file(settings, saved_settings_path(output_dir->back()));
    }

    auto apply = [&](const Setting& s) {
        for (const SettingsLayer* layer : {&command_line, &file, &saved}) {
            const auto found = layer->values.find(s.name);
            if (found == layer->values.end()) {
                continue;
            }
            if (layer != &saved) {
                parsed.given.insert(s.name);
            }
            try {
                s.set(found->second);
            } catch (const Error& rule) {
                fail("%s '%s': must be %s", layer->origin.at(s.name).c_str(), found->second.back().c_str(),
                     rule.what());
            }
            return;
        }
    };
    apply(*find_setting(settings, "model"));
    parsed.config.model = model_preset(parsed.config.model_preset);
    for (const Setting& s : settings) {
        apply(s);
    }
    return parsed;
}

// Throws Error when flags that were given contradict each other whatever their values: a setting that nothing would
// read.
inline void check_given_flags(const ParsedFlags& parsed) {
    const RunConfig& c = parsed.config;
    auto given = [&](const char* name) { return parsed.given.count(name) > 0; };
    // A Lighthouse run may be resumed under dense attention with its other flags as they were.
    if (c.attention == AttentionMode::dense && !c.resume) {
        for (const char* name : {"lighthouse_levels", "lighthouse_pool", "lighthouse_topk", "lighthouse_scorer",
                                 "lighthouse_dilation", "lighthouse_dense_layers", "lighthouse_steps"}) {
            CHECK(!given(name),
                  "--%s and --attention dense contradict each other: add --attention lighthouse, or leave it out",
                  name);
        }
    }
    CHECK(!given("val_fraction") || c.val_fraction == 0.0 || c.val_data.empty(),
          "--val_fraction and --val_data contradict each other: validation data comes from one place; leave one out");
    CHECK(!given("eval_every") || c.eval_every == 0 || !c.val_data.empty() || c.val_fraction > 0.0,
          "--eval_every %lld needs validation data: give --val_data, or a --val_fraction above 0",
          (long long)c.eval_every);
    CHECK(!given("sample_every") || c.sample_every == 0 || c.sample_tokens > 0,
          "--sample_every %lld and --sample_tokens 0 contradict each other", (long long)c.sample_every);
    CHECK(!given("decay_steps") || c.decay_steps == 0 || c.schedule != ScheduleKind::constant,
          "--decay_steps and --schedule constant contradict each other: a constant learning rate does not decay");
}

// Takes the model's shape from a checkpoint, `stored` as `where`/config.json has it. Throws Error when a flag that was
// given says otherwise. --init_std (nothing is initialised) and --max_positions (weights do not depend on it) may
// differ.
inline void take_model_shape(ParsedFlags& parsed, const ModelConfig& stored, const std::string& where) {
    RunConfig as_stored = parsed.config;
    as_stored.model = stored;
    const std::vector<Setting> asked = list_settings(parsed.config), has = list_settings(as_stored);
    for (size_t i = 0; i < asked.size(); ++i) {
        const std::string& name = asked[i].name;
        const bool is_shape =
            asked[i].group == asked[0].group && name != "model" && name != "init_std" && name != "max_positions";
        const bool asked_for = parsed.given.count(name) > 0 || parsed.given.count("model") > 0;
        CHECK(
            !is_shape || !asked_for || asked[i].get() == has[i].get(),
            "--%s %s contradicts the checkpoint %s, which has %s: leave the model's flags out, its shape is read from "
            "there",
            name.c_str(), asked[i].get().c_str(), where.c_str(), has[i].get().c_str());
    }
    const int64_t max_positions = parsed.given.count("max_positions") > 0
                                      ? parsed.config.model.max_positions
                                      : std::max(stored.max_positions, parsed.config.seq_len);
    parsed.config.model = stored;
    parsed.config.model.max_positions = max_positions;
}
