// settings.h: every setting of config.h by name, in one table (list_settings) that serves the command line, `--config
// run.toml`, --help, the table printed at start-up (settings_table) and the settings saved with a run (settings_toml).
#pragma once
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "config.h"          // where the values are
#include "setting_values.h"  // a value as text and back

// ---- the table ----------------------------------------------------------------------------------

struct Setting {
    std::string name;   // --name, and the name in settings files
    std::string group;  // the heading in --help
    std::string help;
    std::string value_name;
    bool is_list = false;    // takes several values
    bool goes_on = false;    // words that follow, and the flag again, add to the list; numbers come with commas
    bool is_toggle = false;  // the value may be left out: true
    bool saved = true;       // false: what to do now, rather than how the run is set up
    bool gpu_only = false;   // the trainer on the CPU has nothing of the kind
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
        s.goes_on = std::is_same_v<Value, std::vector<std::string>>;
        s.is_list = s.goes_on || std::is_same_v<Value, std::vector<int>>;
        s.is_toggle = std::is_same_v<Value, bool>;
        s.set = [&field](const Words& words) { parse(words, field); };
        s.get = [&field] { return text(field); };
        settings.push_back(std::move(s));
    };
    auto add_unsaved = [&](const char* name, auto& field, const char* help, const char* shown = nullptr) {
        add(name, field, help, shown);
        settings.back().saved = false;
    };
    auto add_of_gpu = [&](const char* name, auto& field, const char* help) {
        add(name, field, help);
        settings.back().gpu_only = true;
    };

    group = "Model (with --init_from and --resume the shape comes from the checkpoint)";
    add_unsaved("model", c.model_preset, "shape by name, instead of a --config file's; the flags below change parts",
                "tiny|lighthouse-530m|llama3.2-1b|llama3-8b");
    add("vocab_size", c.model.vocab_size, "tokens in the vocabulary; 258: bytes, begin and end markers");
    add("num_layers", c.model.num_layers, "decoder blocks");
    add("width", c.model.width, "channels of the residual stream; a multiple of 8");
    add("num_heads", c.model.num_heads, "query heads");
    add("num_kv_heads", c.model.num_kv_heads, "key/value heads; must divide --num_heads");
    add("head_dim", c.model.head_dim, "channels of a head; a multiple of 8 up to 256, on the GPU 64 and 128 are fast");
    add("ffn_width", c.model.ffn_width, "channels inside the feed-forward (SwiGLU) layer; a multiple of 8");
    add("tied_embeddings", c.model.tied_embeddings, "the classifier shares the embedding's weight");
    add("rope_theta", c.model.rope_theta, "base of the rotary position frequencies; it and its scaling may change");
    add("rope_scaling_factor", c.model.rope_scaling.factor, "Llama-3 frequency scaling; 1: off");
    add("rope_low_freq_factor", c.model.rope_scaling.low_freq_factor, "of Llama-3 frequency scaling");
    add("rope_high_freq_factor", c.model.rope_scaling.high_freq_factor, "of Llama-3 frequency scaling");
    add("rope_original_max_positions", c.model.rope_scaling.original_max_positions,
        "of that scaling, tokens; default of a checkpoint without it: its positions");
    add("norm_eps", c.model.norm_eps, "added to the mean square in RMSNorm");
    add("init_std", c.model.init_std, "standard deviation of initial matrices");
    add("max_positions", c.model.max_positions, "written to config.json, tokens; 0: --seq_len");

    group = "Attention";
    add("attention", c.attention, "lighthouse: arXiv:2605.06554, for the first stage of training");
    add("lighthouse_levels", c.lighthouse.levels, "levels of the pyramid, tokens included");
    add("lighthouse_pool", c.lighthouse.pool, "entries pooled into one of the next level; a power of two");
    add("lighthouse_topk", c.lighthouse.topk,
        "entries a level hands down; a multiple of 128, for W ranks a sequence of 256 W");
    add("lighthouse_scorer", c.lighthouse.scorer, "what ranks the entries");
    add("lighthouse_dilation", c.lighthouse.dilation, "of the dilated scorer, tokens");
    add("lighthouse_dense_layers", c.lighthouse.dense_layers,
        "layers that stay dense, negative from the last; or none");
    add("lighthouse_steps", c.lighthouse_steps, "the step at which all layers become dense; -1: never");

    group = "Data";
    add("train_data", c.train_data,
        "files or quoted patterns ('corpus/*.txt'), raw bytes or llm.c shards; again: more");
    add("val_data", c.val_data, "the same for validation");
    add("val_fraction", c.val_fraction,
        "of the training data, from its end, for validation when --val_data is not given");
    add("data_format", c.data_format, "auto: shards where a file starts with their magic number, else bytes, of text");
    add("byte_markers", c.byte_markers, "tokens 256 and 257 mark the begin and end of each file of bytes");
    add("shuffle_seed", c.shuffle_seed, "of the order of training sequences");

    group = "Training";
    add("seq_len", c.seq_len, "tokens of a sequence");
    add("batch_size", c.batch_size, "sequences of one forward and backward pass");
    add("global_batch", c.global_batch,
        "sequences of a step (gradients accumulate); 0: --batch_size x data-parallel ranks");
    add("max_steps", c.max_steps, "optimizer steps in all; 0: only evaluate, and sample if --sample_prompt is given");
    add("seed", c.seed, "of initial weights and samples");
    add("max_skipped", c.max_skipped, "steps in a row with a non-finite loss or gradient norm that stop the run");
    add_of_gpu("recompute", c.recompute, "of a block in the backward; norms_and_gate costs no product");
    add_of_gpu("offload", c.offload, "in host memory: inputs of blocks, what does not fit of AdamW's state, both");
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
    add("decay_all", c.decay_all, "weight decay on these too");
    add("max_grad_norm", c.max_grad_norm, "clip the global gradient norm to this; 0: off");

    group = "Checkpoints";
    add("init_from", c.init_from, "start from the weights in this Hugging Face Llama folder", "FOLDER");
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
    add_of_gpu("context_parallel", c.context_parallel, "processes that share each sequence; must divide their number");
    add_of_gpu("context_exchange", c.context_exchange,
               "how attention reaches over them; auto: ring or gather, by the costs");
    add_of_gpu("comm_transport", c.comm_transport, "auto: copy engines in a host, else nccl; host: slow, for tests");
    add_of_gpu("comm_timeout", c.comm_timeout, "seconds without progress between processes that end the job");

    group = "Device and terminal";
    add_of_gpu("device", c.device, "its index, of one process");
    add("num_threads", c.num_threads, "CPU threads; 0: all");
    add_of_gpu("classifier_chunk_rows", c.classifier_chunk_rows, "tokens whose logits exist at once; 0: chosen");
    add_unsaved("print_influence", c.print_influence,
                "at evaluations: what the model reads of later tokens from the selection");
    add_of_gpu("print_memory", c.print_memory, "print the plan of GPU and host memory, every buffer by name");
    add_unsaved("fit", c.fit, "print the longest --seq_len for each --recompute and --offload, and end");
    settings.back().gpu_only = true;
    add_of_gpu("gpu_memory", c.gpu_memory,
               "GiB of its memory the run may use; 0: all that is free; --fit then needs none");
    add_of_gpu("host_memory", c.host_memory,
               "GiB of host memory for --offload, a process; 0: its share of what is free");
    add_of_gpu("cuda_graphs", c.cuda_graphs, "replay launches, on one GPU (not with --profile, --offload activations)");
    add_of_gpu("profile", c.profile, "at the end, print where the time of a step and of its transfers went");
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

// ---- all settings as text -----------------------------------------------------------------------

// The last line of a run's settings: one that lacks it is cut off.
constexpr const char* SETTINGS_END = "# The end of the settings.";

// The resolved settings as a settings file. As many positions as a sequence has tokens are those of any --seq_len.
inline std::string settings_toml(const RunConfig& config) {
    RunConfig copy = config;
    if (copy.model.max_positions == copy.seq_len) {
        copy.model.max_positions = 0;
    }
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
    return toml + "\n" + SETTINGS_END + "\n";
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

// The name of the settings file inside a run's folder.
inline std::string saved_settings_path(const std::string& output_dir) { return output_dir + "/settings.toml"; }
