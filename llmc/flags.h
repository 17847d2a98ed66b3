// flags.h: from the command line and the settings file it names to a RunConfig; the sentences for flags that do not
// exist or contradict each other, and --help.
#pragma once
#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "config.h"    // what is filled
#include "json.h"      // a file's text
#include "mfu.h"       // its part of --help
#include "settings.h"  // every setting by name
#include "toml.h"      // settings files

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
inline std::string nearest_setting(const std::vector<Setting>& settings, std::string typed, bool on_command_line) {
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
    if (on_command_line) {
        consider("config");
        consider("help");
    }
    return nearest;
}

// The text of --help: every setting by group with its default, and how MFU is counted.
inline std::string help_text(const std::string& program) {
    RunConfig defaults;
    const std::vector<Setting> settings = list_settings(defaults);
    std::string help =
        "Trains a Llama on raw bytes or token shards.\n\n  " + program +
        " --train_data 'corpus/*.txt' [--flag value ...]\n  " + program +
        " --resume --output_dir runs/mine\n\n"
        "  --config FILE: settings from a TOML file, `name = value` lines with the names below. The "
        "command line wins.\n"
        "  Toggles take true or false; --toggle alone means true. Defaults in brackets.\n"
        "  (GPU): of train_gpt alone; train_gpt_cpu refuses what it cannot do, and warns of it in a settings file.\n";
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
        help += left + s.help + (s.gpu_only ? " (GPU)" : "") + (show_default ? " [" + value + "]" : "") + "\n";
    }
    return help + "\nMFU\n" + mfu_help_text();
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
        CHECK(entry.name != "config", "%s line %d: a settings file cannot name another", path.c_str(), entry.line);
        const Setting* s = find_setting(settings, entry.name);
        CHECK(s != nullptr, "%s line %d: there is no setting '%s'; the nearest is '%s'", path.c_str(), entry.line,
              entry.name.c_str(), nearest_setting(settings, entry.name, false).c_str());
        CHECK(s->is_list || entry.values.size() == 1, "%s line %d: %s takes one value, not an array", path.c_str(),
              entry.line, entry.name.c_str());
        layer.values[entry.name] = entry.values;
        layer.origin[entry.name] = format_string("%s line %d: %s", path.c_str(), entry.line, entry.name.c_str());
    }
    return layer;
}

struct ParsedFlags {
    RunConfig config;              // not validated yet
    std::set<std::string> given;   // names set on the command line or in the --config file
    std::set<std::string> typed;   // of these, on the command line
    std::set<std::string> others;  // of those, with --resume: with other values than the run has saved
    std::set<std::string> saved;   // with --resume, of those not given: what the run has saved
    bool help = false;             // --help was given: print help_text() and end
};

// The command line, word by word: CLI11 sorts the words to their flags, the values are read from its options.
class CommandLine {
  public:
    explicit CommandLine(const std::vector<Setting>& settings) : settings_(settings) {
        app_.set_help_flag();
        app_.allow_extras();
        app_.add_flag("--help,-h", help);
        options_["config"] = app_.add_option("--config", config_file)->expected(1)->allow_extra_args(false);
        for (const Setting& s : settings) {
            CLI::Option* option = app_.add_option("--" + s.name, sink_[s.name]);
            option->expected(s.is_toggle ? 0 : 1, s.goes_on ? 1 << 20 : 1);
            option->allow_extra_args(false);  // or "[INST]" would lose its brackets, which CLI11 takes for a list's
            // Scripts append flags to override theirs.
            option->multi_option_policy(s.goes_on ? CLI::MultiOptionPolicy::TakeAll : CLI::MultiOptionPolicy::TakeLast);
            options_[s.name] = option;
        }
        options_["config"]->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);  // of several: refused in check()
    }

    // Throws Error for a value that is missing.
    void read(int argc, const char* const* argv) {
        try {
            app_.parse(split(argc, argv));
        } catch (const CLI::ArgumentMismatch& error) {  // "--seq_len: 1 required TEXT missing"
            const std::string what = error.what();
            fail("%s: its value is missing", what.substr(0, what.find(':')).c_str());
        } catch (const CLI::ParseError& error) {
            fail("%s", error.what());
        }
    }

    // Throws Error for a flag in the place of a value, and for one that does not exist (naming the nearest).
    void check() const {
        for (const auto& [name, option] : options_) {
            const Words& all = option->results();
            for (const std::string& word : all) {
                // CLI11 gives a flag the next word, whatever it is: of `--output_dir --plain` the value is missing.
                const std::string other = word.rfind("--", 0) == 0 ? word.substr(2, word.find('=') - 2) : "";
                const bool is_attached =
                    (size_t)std::count(all.begin(), all.end(), word) <= attached_.count({name, word});
                CHECK((other != "help" && options_.count(other) == 0) || is_attached,
                      "--%s: its value is missing ('%s' is a flag)", name.c_str(), word.c_str());
            }
        }
        const size_t num_files = options_.at("config")->count();
        CHECK(num_files <= 1, "--config: there is one settings file, and it is given %zu times", num_files);
        // Most likely of a variable that the shell did not know; without the flag the run would be another.
        for (const char* name : {"config", "init_from", "output_dir"}) {
            const CLI::Option& option = *options_.at(name);
            CHECK(option.count() == 0 || !option.results().back().empty(), "--%s '': must name a %s, or be left out",
                  name, name == std::string("config") ? "file" : "folder");
        }
        CHECK(toggles_without_word_.empty(), "--%s '': must be true or false, or have nothing behind it",
              toggles_without_word_.front().c_str());
        for (const std::string& extra : app_.remaining()) {
            CHECK(extra.size() > 1 && extra[0] == '-', "'%s': every value follows its flag, e.g. --train_data '%s'",
                  extra.c_str(), extra.c_str());
            const std::string name = extra.substr(0, extra.find('='));
            const std::string bare = name.substr(std::min(name.find_first_not_of('-'), name.size()));
            fail("%s: there is no such flag; the nearest is --%s (--help lists all)", name.c_str(),
                 nearest_setting(settings_, bare, true).c_str());
        }
    }

    SettingsLayer layer() const {
        SettingsLayer layer;
        for (const Setting& s : settings_) {
            if (options_.at(s.name)->count() == 0) {
                continue;
            }
            Words words = options_.at(s.name)->results();  // of every time it was given
            if (!s.goes_on) {
                words = {words.back()};
            }
            if (s.is_toggle && words.back().empty()) {
                words.back() = "true";
            }
            layer.values[s.name] = words;
            layer.origin[s.name] = "--" + s.name;
        }
        return layer;
    }

    bool help = false;
    std::string config_file;  // of --config; empty: none

  private:
    // The words as CLI11 takes them, the last first.
    Words split(int argc, const char* const* argv) {
        Words words;
        for (int i = argc - 1; i > 0; --i) {
            const std::string word = argv[i];
            const size_t equals = word.find('=');
            const std::string name = word.rfind("--", 0) == 0 ? word.substr(2, equals - 2) : "";
            const Setting* const s = find_setting(settings_, name);
            const bool is_toggle = s != nullptr && s->is_toggle, is_joint = equals != word.npos;
            // As of a shell's variable that is not set.
            const bool is_empty = is_joint ? equals + 1 == word.size() : i + 1 < argc && *argv[i + 1] == '\0';
            if (is_toggle && is_empty) {
                toggles_without_word_.push_back(name);
            }
            const bool has_value = is_joint && (name == "config" || (s != nullptr && !is_toggle));
            if (has_value) {
                attached_.insert({name, word.substr(equals + 1)});
            }
            if (has_value && is_empty) {
                words.push_back("");  // or CLI11 would take the word behind it
                words.push_back("--" + name);
            } else {
                words.push_back(word);
            }
        }
        return words;
    }

    const std::vector<Setting>& settings_;
    Words toggles_without_word_;  // names of those before an empty one
    CLI::App app_;
    std::map<std::string, CLI::Option*> options_;
    std::map<std::string, Words> sink_;                            // CLI11 wants a variable for each option
    std::multiset<std::pair<std::string, std::string>> attached_;  // given as --name=VALUE, which is no mistake
};

// The settings saved with the run that --resume continues; none without it.
inline SettingsLayer layer_of_resumed_run(const std::vector<Setting>& settings, const SettingsLayer& command_line,
                                          const SettingsLayer& file) {
    const auto given = [&](const char* name) -> const Words* {
        for (const SettingsLayer* layer : {&command_line, &file}) {
            const auto found = layer->values.find(name);
            if (found != layer->values.end()) {
                return &found->second;
            }
        }
        return nullptr;
    };
    const Words* resume = given("resume");
    if (resume == nullptr || resume->back() != "true") {
        return {};
    }
    const Words* output_dir = given("output_dir");
    CHECK(output_dir != nullptr, "--resume: say with --output_dir which run to continue");
    const std::string path = saved_settings_path(output_dir->back());
    std::error_code error;
    CHECK(std::filesystem::exists(path, error) || error, "--resume: --output_dir %s holds no run: there is no %s",
          output_dir->back().c_str(), path.c_str());
    const bool is_file = std::filesystem::is_regular_file(path, error);
    CHECK(!error, "%s: cannot look at it: %s", path.c_str(), error.message().c_str());
    CHECK(is_file, "%s: is no file", path.c_str());
    // Without some of its settings the run would go on with defaults in their place.
    const std::string text = read_text_file(path);
    const std::string whole = text.substr(0, text.find_last_not_of(" \t\r\n") + 1), end = SETTINGS_END;
    CHECK(whole.size() >= end.size() && whole.compare(whole.size() - end.size(), end.size(), end) == 0,
          "%s: is cut off: it does not end with the line '%s' (add it if nothing is missing)", path.c_str(),
          SETTINGS_END);
    return layer_from_file(settings, path);
}

// Sets a setting from a layer that has it, and returns its value as text.
inline std::string set_from(const SettingsLayer& layer, const Setting& s) {
    const Words& words = layer.values.at(s.name);
    try {
        s.set(words);
    } catch (const Error& rule) {
        fail("%s '%s': must be %s", layer.origin.at(s.name).c_str(), words.back().c_str(), rule.what());
    }
    return s.get();
}

// Whether two layers name the same folder, if in other words.
inline bool is_same_folder(const SettingsLayer& a, const SettingsLayer& b, const std::string& name) {
    std::error_code error;  // of what is not there: compared as it is written
    const auto canonical = [&](const SettingsLayer& layer) {
        const std::filesystem::path path = std::filesystem::absolute(layer.values.at(name).back(), error);
        const std::filesystem::path found = std::filesystem::weakly_canonical(path, error);
        return (error ? path : found) / "";  // with or without a slash at its end
    };
    return canonical(a) == canonical(b);
}

// Reads the command line. A setting's value comes from, the first that has it: the command line, the --config file,
// with --resume the settings saved with the run, the --model preset, the defaults. Throws Error for an unknown flag
// (naming the nearest) and a missing or unreadable value.
inline ParsedFlags parse_flags(int argc, const char* const* argv) {
    ParsedFlags parsed;
    const std::vector<Setting> settings = list_settings(parsed.config);
    CommandLine words(settings);
    words.read(argc, argv);
    if (words.help) {
        parsed.help = true;
        return parsed;
    }
    words.check();
    const SettingsLayer command_line = words.layer();
    const SettingsLayer file =
        words.config_file.empty() ? SettingsLayer() : layer_from_file(settings, words.config_file);
    const SettingsLayer saved = layer_of_resumed_run(settings, command_line, file);

    // A preset on the command line stands for the whole shape, which settings.toml of a run has field by field.
    const Setting& model = *find_setting(settings, "model");
    const bool shape_is_typed = command_line.values.count(model.name) > 0;
    const auto apply = [&](const Setting& s) {
        const bool was_saved = saved.values.count(s.name) > 0;
        if (command_line.values.count(s.name) > 0) {
            parsed.given.insert(s.name), parsed.typed.insert(s.name);
            const std::string before = was_saved ? set_from(saved, s) : "";
            const bool is_other = set_from(command_line, s) != before;
            if (was_saved && is_other && !(s.name == "init_from" && is_same_folder(saved, command_line, s.name))) {
                parsed.others.insert(s.name);
            }
        } else if (shape_is_typed && s.group == model.group) {
            return;
        } else if (file.values.count(s.name) > 0) {
            parsed.given.insert(s.name);
            set_from(file, s);
        } else if (was_saved) {
            parsed.saved.insert(s.name);
            set_from(saved, s);
        }
    };
    apply(model);
    parsed.config.model = model_preset(parsed.config.model_preset);
    for (const Setting& s : settings) {
        apply(s);
    }
    const auto overrides_val_data = [&](const std::set<std::string>& names) {
        return parsed.config.val_fraction > 0.0 && names.count("val_fraction") > 0 && names.count("val_data") == 0;
    };
    if (overrides_val_data(parsed.typed) || overrides_val_data(parsed.given)) {
        parsed.config.val_data.clear();  // of the saved run, or of a file
    }
    return parsed;
}

// ---- contradictions ------------------------------------------------------------------------------

// `name`, which nothing reads because of the value of `other`: whether that is a mistake.
inline bool is_given_in_vain(const ParsedFlags& parsed, const char* name, const char* other) {
    RunConfig of_run = parsed.config, of_default;
    const std::vector<Setting> values = list_settings(of_run), defaults = list_settings(of_default);
    const bool typed = parsed.typed.count(name) > 0, given = parsed.given.count(name) > 0;
    const bool decided = parsed.given.count(other) > 0;
    const bool is_default = find_setting(values, name)->get() == find_setting(defaults, name)->get();
    return typed || (given && !decided && !is_default);
}

// Throws Error for how frequencies are scaled when they are not.
inline void check_rope_scaling(const ParsedFlags& parsed) {
    if (parsed.config.model.rope_scaling.factor != 1.0) {
        return;
    }
    for (const char* name : {"rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_positions"}) {
        CHECK(!is_given_in_vain(parsed, name, "rope_scaling_factor"),
              "--%s and --rope_scaling_factor 1 contradict each other: give the factor, or leave it out", name);
    }
}

// Throws Error when flags that were given contradict each other whatever their values: a setting that nothing would
// read. In a file that is a mistake only where the one that decides about it is left out: settings.toml of a run, which
// may have been resumed under another decision, has them all.
inline void check_given_flags(const ParsedFlags& parsed) {
    const RunConfig& c = parsed.config;
    const auto contradicts = [&](const char* name, const char* other) { return is_given_in_vain(parsed, name, other); };
    // A Lighthouse run may be resumed under dense attention with its other flags as they were saved.
    if (c.attention == AttentionMode::dense) {
        for (const char* name : {"lighthouse_levels", "lighthouse_pool", "lighthouse_topk", "lighthouse_scorer",
                                 "lighthouse_dilation", "lighthouse_dense_layers", "lighthouse_steps"}) {
            CHECK(c.resume ? parsed.others.count(name) == 0 : !contradicts(name, "attention"),
                  "--%s and --attention dense contradict each other: add --attention lighthouse, or leave it out",
                  name);
        }
    }
    // The same where the run began, so that the line that started it goes on with --resume alone added.
    CHECK(!c.resume || parsed.others.count("init_from") == 0,
          "--resume and --init_from %s contradict each other: the run in %s began elsewhere, and goes on from its "
          "newest checkpoint; leave one out",
          c.init_from.c_str(), c.output_dir.c_str());
    CHECK(!contradicts("val_fraction", "val_data") || c.val_fraction == 0.0 || c.val_data.empty(),
          "--val_fraction and --val_data contradict each other: validation data comes from one place; leave one out");
    CHECK(
        !contradicts("eval_every", "val_fraction") || c.eval_every == 0 || !c.val_data.empty() || c.val_fraction > 0.0,
        "--eval_every %lld needs validation data: give --val_data, or a --val_fraction above 0",
        (long long)c.eval_every);
    CHECK(!contradicts("sample_every", "sample_tokens") || c.sample_every == 0 || c.sample_tokens > 0,
          "--sample_every %lld and --sample_tokens 0 contradict each other", (long long)c.sample_every);
    for (const char* name : {"sample_prompt", "temperature", "top_p"}) {
        CHECK(
            !contradicts(name, "sample_tokens") || c.sample_tokens > 0,
            "--%s and --sample_tokens 0%s contradict each other: there is no sample; give --sample_tokens, or leave it "
            "out",
            name, c.resume && parsed.given.count("sample_tokens") == 0 ? ", saved with the run," : "");
    }
    CHECK(!contradicts("top_p", "temperature") || c.temperature > 0.0,
          "--top_p and --temperature 0 contradict each other: the likeliest token needs no choice");
    CHECK(!contradicts("decay_all", "weight_decay") || c.weight_decay > 0.0 || !c.decay_all,
          "--decay_all and --weight_decay 0 contradict each other");
    CHECK(!contradicts("decay_steps", "schedule") || c.decay_steps == 0 || c.schedule != ScheduleKind::constant,
          "--decay_steps and --schedule constant contradict each other: a constant learning rate does not decay");
    CHECK(!contradicts("final_learning_rate_fraction", "schedule") || c.schedule != ScheduleKind::constant,
          "--final_learning_rate_fraction and --schedule constant contradict each other: a constant learning rate does "
          "not decay");
    CHECK(!contradicts("lighthouse_dilation", "lighthouse_scorer") || c.attention == AttentionMode::dense ||
              c.lighthouse.scorer == LighthouseScorer::dilated,
          "--lighthouse_dilation and --lighthouse_scorer norm contradict each other: add --lighthouse_scorer dilated, "
          "or leave it out");
    if (c.init_from.empty() && !c.resume) {  // otherwise the checkpoint may have the factor (take_model_shape)
        check_rope_scaling(parsed);
    }
}

// For the trainer on the CPU: throws Error for what was typed and only the one on a GPU can do. A settings file may ask
// for it, as it may be of a run on a GPU: returns a sentence that names what then has no effect; empty: nothing.
inline std::string check_cpu_flags(const ParsedFlags& parsed) {
    CHECK(!parsed.config.fit,
          "--fit: is about the memory of a GPU; train_gpt answers it, with --gpu_memory also without one");
    RunConfig of_run = parsed.config, of_default;
    const std::vector<Setting> values = list_settings(of_run), defaults = list_settings(of_default);
    std::string typed, from_files;
    int num_typed = 0;
    for (size_t i = 0; i < values.size(); ++i) {
        if (!values[i].gpu_only || values[i].get() == defaults[i].get()) {
            continue;
        }
        const bool is_typed = parsed.typed.count(values[i].name) > 0;
        num_typed += is_typed;
        std::string& names = is_typed ? typed : from_files;
        names += (names.empty() ? "--" : ", --") + values[i].name;
    }
    CHECK(num_typed == 0, "%s: %s about a GPU, and this trainer runs on the CPU: leave %s out, or start train_gpt",
          typed.c_str(), num_typed == 1 ? "is" : "are", num_typed == 1 ? "it" : "them");
    return from_files.empty() ? "" : from_files + " (of a settings file): about a GPU, without effect on the CPU";
}

// Takes the model's shape from a checkpoint, `stored` as `where`/config.json has it. Throws Error when a flag that was
// given says otherwise. --init_std (nothing is initialised) and --max_positions (weights do not depend on it) may
// differ, and so may how positions are rotated (--rope_...), which extends a model's context: returns, for a warning,
// what of it differs; empty: nothing.
inline std::string take_model_shape(ParsedFlags& parsed, const ModelConfig& stored, const std::string& where) {
    RunConfig as_stored = parsed.config;
    as_stored.model = stored;
    // Without a factor, what else there is of scaling says nothing.
    const bool has_factor =
        parsed.given.count("rope_scaling_factor") > 0 || parsed.saved.count("rope_scaling_factor") > 0;
    if ((has_factor ? parsed.config : as_stored).model.rope_scaling.factor == 1.0) {
        for (RopeScaling* const scaling : {&parsed.config.model.rope_scaling, &as_stored.model.rope_scaling}) {
            const double factor = scaling->factor;
            *scaling = RopeScaling();
            scaling->factor = factor;
        }
    }
    const std::vector<Setting> asked = list_settings(parsed.config), has = list_settings(as_stored);
    std::string rotated;
    for (size_t i = 0; i < asked.size(); ++i) {
        const std::string &name = asked[i].name, ours = asked[i].get(), theirs = has[i].get();
        const bool is_shape =
            asked[i].group == asked[0].group && name != "model" && name != "init_std" && name != "max_positions";
        const bool is_given = parsed.given.count(name) > 0;
        if (!is_shape || ours == theirs) {
            continue;
        }
        if (name.rfind("rope_", 0) == 0 && (is_given || parsed.saved.count(name) > 0)) {
            has[i].set({ours});
            rotated += (rotated.empty() ? "--" : ", --") + name + " " + ours + " (" + theirs + ")";
            continue;
        }
        CHECK(!is_given && parsed.given.count("model") == 0,
              "--%s %s contradicts the checkpoint %s, which has %s: leave the model's flags out, its shape is read "
              "from there",
              name.c_str(), ours.c_str(), where.c_str(), theirs.c_str());
        CHECK(parsed.saved.count(name) == 0,
              "%s: says %s = %s, and the run's checkpoint %s has %s: a model that is trained keeps its shape",
              saved_settings_path(parsed.config.output_dir).c_str(), name.c_str(), ours.c_str(), where.c_str(),
              theirs.c_str());
    }
    // What is scaled are the positions that the weights know, unless another number was asked for.
    RopeScaling& scaling = as_stored.model.rope_scaling;
    if (scaling.enabled() && !stored.rope_scaling.enabled() && stored.max_positions > 0 &&
        parsed.given.count("rope_original_max_positions") == 0 &&
        scaling.original_max_positions == RopeScaling().original_max_positions) {
        scaling.original_max_positions = stored.max_positions;
    }
    const int64_t max_positions = parsed.given.count("max_positions") > 0
                                      ? parsed.config.model.max_positions
                                      : std::max(stored.max_positions, parsed.config.seq_len);
    parsed.config.model = as_stored.model;
    parsed.config.model.max_positions = max_positions;
    check_rope_scaling(parsed);
    return rotated;
}

// Of the default list, the layers that the model has. One that was given is checked as it is.
inline void fit_default_dense_layers(ParsedFlags& parsed) {
    std::vector<int>& layers = parsed.config.lighthouse.dense_layers;
    const int n = parsed.config.model.num_layers;
    if (parsed.given.count("lighthouse_dense_layers") == 0 && layers == LighthouseConfig().dense_layers) {
        layers.erase(std::remove_if(layers.begin(), layers.end(), [&](int layer) { return layer < -n || layer >= n; }),
                     layers.end());
    }
}
