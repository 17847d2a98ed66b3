// train_loop.h: one training run, top to bottom, for both trainers: settings -> data -> weights -> steps -> evaluation,
// samples, checkpoints -> summary. The model is whatever implements TrainableModel.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "checkpoint.h"       // folders of weights, optimizer and training state
#include "config.h"           // every setting
#include "configure_run.h"    // settings from the command line
#include "durable_file.h"     // a hash
#include "influence.h"        // of later tokens on earlier losses
#include "metrics.h"          // terminal, and what is logged
#include "mfu.h"              // FLOPs and peaks
#include "random.h"           // initial weights, samples
#include "ranks.h"            // processes that train together
#include "run_folder.h"       // settings.toml, metrics.jsonl
#include "sampler.h"          // next token from logits
#include "schedule.h"         // learning rate
#include "settings.h"         // as text
#include "shared_folder.h"    // one output folder for all ranks
#include "signals.h"          // stopping from outside
#include "tokenizer.h"        // text to tokens and back
#include "tokens.h"           // files to sequences of tokens
#include "trainable_model.h"  // the model

class TrainingRun {
  public:
    TrainingRun(TrainableModel& model, const RunConfig& config, const DeviceInfo& device, const RunRanks& ranks)
        : model_(model),
          config_(config),
          device_(device),
          ranks_(ranks),
          folder_(config_),
          terminal_(config.plain, !ranks.is_first(), ranks.size() > 1) {}

    // Returns the status main ends with.
    int run() {
        stop_signal::install_handlers();
        open_data();
        load_or_initialize();
        first_step_ = state_.step;
        const bool is_trained = config_.max_steps > 0 && state_.step >= config_.max_steps;
        attention_ = config_.attention_at(is_trained ? state_.step - 1 : state_.step);
        model_.set_attention(attention_);
        if (config_.resume && config_.max_steps > 0) {
            read_events_at_start();
        }
        const bool is_over = is_trained && !lacks_its_end();
        if (config_.max_steps > 0 && !is_over) {
            open_output();
        }
        print_start();  // with the output folder, which may have got its name just now
        if (config_.max_steps == 0) {
            return evaluate_and_sample();
        }
        if (is_trained) {
            terminal_.print(format_string("already at step %lld of --max_steps %lld: %s", (long long)state_.step,
                                          (long long)config_.max_steps,
                                          is_over ? "nothing is left to train; with a larger one the run goes on"
                                                  : "what was due after the last step is made up for"));
        }
        if (is_over) {
            return 0;
        }
        if (config_.resume && state_.step > 0) {
            make_up_for_what_was_due();
        }
        while (state_.step < config_.max_steps && !stop_requested()) {
            switch_attention_when_due();
            const StepResult result = training_step();
            if (result.skipped && state_.skipped_in_a_row >= config_.max_skipped) {
                return stop_after_skips(result);
            }
            if (state_.step == config_.max_steps && state_.adam_step == 0) {
                return end_untrained(result);
            }
            if (is_due(config_.eval_every)) {
                evaluate();
            }
            if (is_due(config_.sample_every)) {
                sample();
            }
            if (is_due(config_.checkpoint_every)) {
                save();
            }
        }
        return stop_requested() ? stop_on_signal() : finish();
    }

  private:
    using Clock = std::chrono::steady_clock;
    static double seconds_since(Clock::time_point start) {
        return std::chrono::duration<double>(Clock::now() - start).count();
    }

    // Whether any rank was asked to stop. All ranks ask at the same places, and get the same answer.
    bool stop_requested() {
        if (stop_signal_ == 0) {
            stop_signal_ = stop_signal::received;
            if (ranks_.size() > 1) {
                stop_signal_ = ranks_.largest(stop_signal_, "whether to stop");
            }
        }
        return stop_signal_ != 0;
    }
    void warn(const std::string& sentence) const {
        if (ranks_.is_first()) {
            print_warning(config_.program, sentence);
        }
    }
    // Into metrics.jsonl, which rank 0 writes. Where that cannot be, the disk may yet have room for a checkpoint.
    void log(const char* event, const Json& fields) {
        if (!folder_.keeps_metrics()) {
            return;
        }
        try {
            folder_.log(event, state_.step, fields);
        } catch (const Error&) {
            if (ranks_.size() == 1 && state_.step > first_step_) {
                save();
            }
            throw;
        }
    }

    // ---- start

    void open_data() {
        data_ = ::open_data(config_);
        if (data_.train || config_.asks_for_sample) {
            tokenizer_ = make_tokenizer();
            prompt_ = tokenizer_->encode_prompt(config_.sample_prompt);
            const int64_t longest = model_.max_sequence_length();
            if ((int64_t)prompt_.size() > longest) {
                warn(format_string("--sample_prompt has %zu tokens: samples continue its last %lld (--seq_len)",
                                   prompt_.size(), (long long)longest));
            }
        }
    }
    // Of the data; without any, of bytes, if the checkpoint has their tokenizer, else of numbers.
    Tokenizer make_tokenizer() const {
        const std::optional<SequenceSet>& data = data_.train ? data_.train : data_.validation;
        if (data) {
            return Tokenizer(data->stream(), config_.byte_markers, config_.model.vocab_size);
        }
        const checkpoint::Companions companions = read_while_it_is_there(config_.checkpoint, [&] {
            return checkpoint::read_companions(config_.checkpoint, config_, model_.config(), true);
        });
        const bool is_bytes = checkpoint::has_tokenizer(companions) && checkpoint::reads_bytes(companions);
        return Tokenizer(is_bytes, companions.tokens.begin == BEGIN_MARKER, config_.model.vocab_size);
    }

    // Weights and optimizer of a fresh run, of --init_from or of --resume.
    void load_or_initialize() {
        if (config_.resume) {
            state_ = read_while_it_is_there(config_.checkpoint, [&] {
                return load_checkpoint(model_, config_.checkpoint, ranks_, true);  // read when it was found
            });
            skipped_at_start_ = state_.skipped_in_a_row;
            if (state_.skipped_in_a_row >= config_.max_skipped) {
                state_.skipped_in_a_row = 0;  // that ended the run before; this one may try as often
            }
            note_schedule();
            const bool is_recut = state_.seq_len > 0 && state_.seq_len != config_.seq_len;
            if (is_recut && config_.max_steps > 0) {  // on behind as many tokens as it has seen
                warn(format_string(
                    "--seq_len %lld: %s was trained on sequences of %lld: data are cut and shuffled anew, so of this "
                    "epoch some tokens come again and as many do not",
                    (long long)config_.seq_len, config_.checkpoint.c_str(), (long long)state_.seq_len));
                const uint64_t tokens = checked_mul((uint64_t)state_.data_position, (uint64_t)state_.seq_len, "tokens");
                state_.data_position = (int64_t)ceil_div<uint64_t>(tokens, (uint64_t)config_.seq_len);
            }
            state_.seq_len = config_.seq_len;
            note_batch();
            checkpoint_ = config_.checkpoint, saved_step_ = state_.step;
            note_data();
            return;
        }
        if (config_.checkpoint.empty()) {
            initialize_weights();
        } else {
            load_model(model_, config_.checkpoint, ranks_);
        }
        clear_optimizer();
        note_data();
    }

    // The learning rate goes by --max_steps: where that alone has changed, it jumps.
    void note_schedule() const {
        if (config_.max_steps == 0 || !state_.schedule) {
            return;
        }
        const RunConfig& before = *state_.schedule;
        const bool asked_for = config_.learning_rate != before.learning_rate || config_.schedule != before.schedule ||
                               config_.warmup_steps != before.warmup_steps ||
                               config_.final_learning_rate_fraction != before.final_learning_rate_fraction;
        const double now = learning_rate_at(config_, state_.step), then = learning_rate_at(before, state_.step);
        if (!asked_for && std::fabs(now - then) > 0.01 * std::max(now, then)) {
            warn(format_string(
                "the decay of the learning rate ends at step %lld, and that of %s at %lld: the next "
                "step's is %.3g, and would have been %.3g (--decay_steps says when it ends)",
                (long long)config_.decay_end(), config_.checkpoint.c_str(), (long long)before.decay_end(), now, then));
        }
    }

    // A step may have another number of sequences without anyone having asked for it: with --global_batch 0 it goes by
    // the number of ranks.
    void note_batch() const {
        const int64_t before = state_.sequences_per_step, now = config_.sequences_per_step();
        if (config_.max_steps > 0 && before > 0 && before != now) {
            const bool can_go_on = before % config_.sequences_at_once() == 0;
            warn(format_string(
                "a step has %lld sequences from here on, and had %lld in %s%s", (long long)now, (long long)before,
                config_.checkpoint.c_str(),
                can_go_on ? format_string(" (--global_batch %lld goes on with as many)", (long long)before).c_str()
                          : ""));
        }
    }

    // What checkpoints say of the training data. Others than before are allowed, as data grow, but not meant by whoever
    // has mistaken a file.
    void note_data() {
        if (!data_.train) {
            note_validated_part();
            return;
        }
        const std::string now = checkpoint::data_identity(*data_.train);
        if (!state_.data.empty() && state_.data != now) {
            warn(format_string(
                "--train_data: %s was trained on other data (%s) than this run reads from here on (%s): "
                "their order is another, and some sequences may come again%s",
                config_.checkpoint.c_str(), terminal_safe(state_.data).c_str(), now.c_str(),
                config_.val_data.empty() && data_.validation ? "; --val_fraction's part may hold what was trained on"
                                                             : ""));
        }
        state_.data = now;
        if (state_.shuffle_seed && *state_.shuffle_seed != config_.shuffle_seed) {
            warn(
                format_string("--shuffle_seed %llu: %s was trained with %llu: the order of sequences is another from "
                              "here on, and some may come again",
                              (unsigned long long)config_.shuffle_seed, config_.checkpoint.c_str(),
                              (unsigned long long)*state_.shuffle_seed));
        }
        state_.shuffle_seed = config_.shuffle_seed;
    }

    // An evaluation of --val_fraction's part trusts that the run was trained on what comes before it.
    void note_validated_part() const {
        if (!config_.splits_train_data() || !data_.validation || state_.data.empty()) {
            return;
        }
        const TokenStream& stream = data_.validation->stream();
        const std::string now = checkpoint::data_identity(stream, stream.num_tokens() - data_.validation->num_tokens());
        if (state_.data != now) {
            warn(
                format_string("--train_data: %s was trained on other data (%s) than what comes before "
                              "--val_fraction's part here (%s), which may hold what was trained on",
                              config_.checkpoint.c_str(), terminal_safe(state_.data).c_str(), now.c_str()));
        }
    }

    // Normal random numbers that depend on seed, tensor and element alone; norms are 1.
    void initialize_weights() {
        const std::vector<ParameterTensor>& tensors = model_.parameters().tensors;
        std::vector<float> values(largest_tensor());
        for (size_t i = 0; i < tensors.size(); ++i) {
            const int64_t num_elements = tensors[i].num_elements();
            if (tensors[i].init_std > 0.0) {
                const RandomStream random(config_.seed, RandomUse::initial_weights, i);
                fill_normal(values.data(), num_elements, tensors[i].init_std, random);
            } else {
                std::fill_n(values.begin(), num_elements, 1.0f);
            }
            model_.write_state(StateKind::master, (int)i, values.data());
        }
    }
    void clear_optimizer() {
        const std::vector<float> zeros(largest_tensor(), 0.0f);
        for (size_t i = 0; i < model_.parameters().tensors.size(); ++i) {
            model_.write_state(StateKind::exp_avg, (int)i, zeros.data());
            model_.write_state(StateKind::exp_avg_sq, (int)i, zeros.data());
        }
    }
    int64_t largest_tensor() const {
        int64_t largest = 0;
        for (const ParameterTensor& tensor : model_.parameters().tensors) {
            largest = std::max(largest, tensor.num_elements());
        }
        return largest;
    }

    void print_start() {
        terminal_.print(settings_table(config_));
        terminal_.print(format_string("device      %s%s", device_.name.c_str(),
                                      device_.is_gpu && device_.peak_tflops == 0.0 ? " (peak not known: no MFU)" : ""));
        if (ranks_.size() > 1) {
            const ParallelMesh& mesh = ranks_.mesh();
            terminal_.print(format_string("ranks       %d: data parallel %d x context parallel %d%s%s", mesh.size(),
                                          mesh.data_parallel, mesh.context_parallel,
                                          device_.transfers.empty() ? "" : ", transfers ", device_.transfers.c_str()));
            const std::string placement =
                placement_warning(ranks_.world().comm().identity().machines, mesh.context_parallel);
            if (!placement.empty()) {
                warn(placement);
            }
        }
        terminal_.print(format_string("model       %.1f M parameters, %.2f GiB on the device",
                                      (double)model_.parameters().num_elements() / 1e6, model_.peak_memory_gib()));
        print_data("train       ", data_.train);
        print_data("validation  ", data_.validation);
        if (config_.attention == AttentionMode::lighthouse) {
            print_lighthouse();
        }
        if (!config_.checkpoint.empty()) {
            terminal_.print(format_string("%s %s, step %lld", config_.resume ? "resumed from" : "weights from",
                                          config_.checkpoint.c_str(), (long long)state_.step));
        }
    }

    void print_data(const char* heading, const std::optional<SequenceSet>& set) {
        if (set) {
            terminal_.print(format_string("%s%s, %lld tokens; %lld sequences of %lld", heading,
                                          set->stream().description().c_str(), (long long)set->num_tokens(),
                                          (long long)set->num_sequences(), (long long)config_.seq_len));
        }
    }

    void print_lighthouse() {
        const LighthouseGeometry g = make_lighthouse_geometry(config_.seq_len, config_.lighthouse);
        const int all_layers = config_.model.num_layers;
        const int lighthouse_layers = config_.lighthouse.num_lighthouse_layers(all_layers);
        const SequenceFlops flops =
            sequence_flops(config_.model, config_.seq_len, AttentionMode::lighthouse, config_.lighthouse);
        terminal_.print(format_string(
            "lighthouse  T %lld, S %lld, %lld tiles; %d of %d layers; their attention does %.2f %% of "
            "the dense work; expected speed-up of a step %.2fx%s",
            (long long)g.T, (long long)g.S, (long long)g.tiles, lighthouse_layers, all_layers,
            100.0 * g.dense_work_fraction(), flops.dense_equivalent / flops.work, lighthouse_span().c_str()));
        if (lighthouse_layers == 0) {
            warn(format_string(
                "--attention lighthouse: all layers are dense (--lighthouse_dense_layers %s), so nothing is different "
                "from --attention dense",
                text(config_.lighthouse.dense_layers).c_str()));
        }
    }

    // Until which step the layers are not dense.
    std::string lighthouse_span() const {
        if (config_.max_steps == 0 || config_.lighthouse_steps < 0) {
            return "";
        }
        const long long end = config_.lighthouse_steps;
        return attention_ == AttentionMode::dense
                   ? format_string("; dense since step %lld (--lighthouse_steps; -1: never)", end)
                   : format_string("; dense from step %lld on", end);
    }

    void open_output() {
        config_.output_dir = ranks_.first_decides([&] { return take_output(); }, "choice of the output folder");
        check_all_share(config_.output_dir, ranks_);  // while it can be taken again: it holds no run yet
        ranks_.first_does([&] { begin_run(); }, "preparation of the output folder");
        if (state_.attention && *state_.attention != attention_) {  // the checkpoint's last step was under the other
            report_switch();
        }
    }

    // The output folder, locked. Rank 0 alone calls it. Without --output_dir the folder is named here: what is refused
    // before has left none. Returns its name.
    std::string take_output() {
        // Now: a file that cannot be read is not to be found out by the first checkpoint.
        companions_ = checkpoint::read_companions(checkpoint::companion_source(config_.checkpoint, config_.output_dir),
                                                  config_, model_.config(), data_.train->stream().is_bytes());
        warn_of_tokenizer(*companions_, *data_.train, "--train_data");
        if (!data_.train->stream().is_bytes() && checkpoint::reads_bytes(*companions_) &&
            checkpoint::has_tokenizer(*companions_)) {
            warn(config_.checkpoint +
                 " has the tokenizer of bytes, and --train_data are token shards: this run's "
                 "checkpoints have no tokenizer");
            companions_.emplace();
        }
        folder_.take();
        return config_.output_dir;
    }
    // The settings of the run and its metrics file. Rank 0 alone calls it.
    void begin_run() {
        folder_.begin_files(state_.step, {{"program", config_.program},
                                          {"device", device_.name},
                                          {"checkpoint", config_.checkpoint},
                                          {"parameters", model_.parameters().num_elements()},
                                          {"data_parallel", ranks_.mesh().data_parallel},
                                          {"settings", settings_toml(config_)}});
    }

    // Raw text for a model that was trained on other tokens than bytes, as far as its folder says.
    void warn_of_tokenizer(const checkpoint::Companions& companions, const SequenceSet& data, const char* flag) const {
        if (!data.stream().is_bytes() || config_.checkpoint.empty()) {
            return;
        }
        const std::optional<TrainingState> state = checkpoint::find_state(config_.checkpoint);
        const std::string why =
            !checkpoint::reads_bytes(companions)                          ? "has a tokenizer of its own"
            : state && state->data.find(TOKEN_SHARD) != std::string::npos ? "was trained on token shards"
            : !state && !checkpoint::has_tokenizer(companions) ? "says of no tokenizer which it was trained with"
                                                               : "";
        if (!why.empty()) {
            warn(
                format_string("%s %s, but %s are raw text: its bytes are taken as token numbers, which mean something "
                              "else there (dev/data/prepare.py makes shards)",
                              config_.checkpoint.c_str(), why.c_str(), flag));
        }
    }

    void read_events_at_start() {
        const auto read = [&] {
            std::string events;
            for (const std::string& event : events_of_step(metrics_path(config_.output_dir), state_.step)) {
                events += event + "\n";
            }
            return events;
        };
        std::istringstream events(ranks_.first_decides(read, "look at the metrics"));
        for (std::string event; std::getline(events, event);) {
            events_at_start_.insert(event);
        }
    }
    // Whether the metrics lack an event of this step that is logged once.
    bool is_missing(const char* event) const { return state_.step > first_step_ || events_at_start_.count(event) == 0; }
    // Whether a run that has done all its steps was ended before what is due after the last. After --max_skipped
    // skipped ones, or where all were, nothing was due.
    bool lacks_its_end() const {
        return state_.step == config_.max_steps && skipped_at_start_ < config_.max_skipped && state_.adam_step > 0 &&
               ((data_.validation && is_missing("validation")) || (config_.sample_tokens > 0 && is_missing("sample")));
    }

    // A signal ends a run before the evaluation and the sample that are due at the step it came in.
    void make_up_for_what_was_due() {
        const AttentionMode next = attention_;  // what is due was due under the attention of the step before
        attention_ = config_.attention_at(state_.step - 1);
        if (is_due(config_.eval_every) && is_missing("validation")) {
            evaluate();
        }
        if (is_due(config_.sample_every) && is_missing("sample")) {
            sample();
        }
        attention_ = next;
        model_.set_attention(attention_);
    }

    // ---- one step

    bool is_due(int64_t every) {
        return every > 0 && state_.step % every == 0 && state_.step < config_.max_steps && !stop_requested();
    }

    // The attention that the next step trains with.
    void switch_attention_when_due() {
        const AttentionMode mode = config_.attention_at(state_.step);
        if (mode != attention_) {
            attention_ = mode;
            model_.set_attention(mode);
            report_switch();
        }
    }
    void report_switch() {
        terminal_.print(format_string("step %lld | attention is %s from here on: the loss jumps and recovers",
                                      (long long)state_.step, choice_name(attention_)));
        log("attention_switch", {{"attention", choice_name(attention_)}});
    }

    StepResult training_step() {
        const Clock::time_point start = Clock::now();
        const int64_t position = state_.data_position, num_micro_batches = config_.micro_batches_per_step();
        ranks_.set_step(state_.step + 1);
        model_.begin_step(num_micro_batches);
        for (int64_t i = 0; i < num_micro_batches; ++i) {
            // Ranks that share sequences read the same; a step's sequences are the same however many ranks there are.
            const int64_t begin =
                position + i * config_.sequences_at_once() + ranks_.mesh().data_rank() * config_.batch_size;
            read_training_batch(begin);
            if (state_.step == first_step_) {  // names and lengths of files say nothing of what is in them
                ranks_.check_share_sequences(hash_of_batch(config_.batch_size), "--train_data");
            }
            model_.accumulate_gradients(tokens_.data(), config_.batch_size, config_.seq_len,
                                        1.0 / (double)num_micro_batches);
            read_ahead(begin + config_.sequences_at_once());  // while a GPU computes what it was given
        }
        const StepResult result = model_.update(optimizer_settings());
        const double elapsed_ms = 1e3 * seconds_since(start);

        state_.step += 1;
        state_.data_position += config_.sequences_per_step();
        if (result.skipped) {
            state_.skipped += 1, state_.skipped_in_a_row += 1;
        } else {
            state_.adam_step += 1, state_.skipped_in_a_row = 0;
        }
        report(result, position, elapsed_ms);
        return result;
    }

    // What has been trained so far is kept where the data proves bad. Not of several ranks: the others know nothing.
    template <class Read>
    void keep_if_bad(Read read) {
        try {
            read();
        } catch (const Error&) {
            if (ranks_.size() == 1 && folder_.keeps_metrics() && state_.step > first_step_) {
                save();
            }
            throw;
        }
    }
    void read_training_batch(int64_t position) {
        if (position == position_ahead_) {
            return;  // tokens_ holds it
        }
        keep_if_bad([&] { read_batch(*data_.train, position, config_.batch_size); });
    }
    void read_ahead(int64_t position) {
        try {
            read_batch(*data_.train, position, config_.batch_size);
            position_ahead_ = position;
        } catch (const Error&) {
            // is thrown again when it is needed
        }
    }
    // The B sequences from `position` on, into tokens_.
    void read_batch(const SequenceSet& set, int64_t position, int B) {
        position_ahead_ = -1;
        const int64_t row = config_.seq_len + 1;
        tokens_.resize(config_.batch_size * row);
        for (int b = 0; b < B; ++b) {
            set.read(position + b, tokens_.data() + b * row);
        }
    }

    // Of the B sequences in tokens_.
    uint64_t hash_of_batch(int B) const {
        Xxh3Stream hash;
        hash.update(tokens_.data(), (uint64_t)B * (config_.seq_len + 1) * sizeof(int32_t));
        return hash.digest().xxh3;
    }

    AdamWSettings optimizer_settings() const {
        AdamWSettings s;
        s.learning_rate = learning_rate_at(config_, state_.step);
        s.beta1 = config_.beta1, s.beta2 = config_.beta2, s.eps = config_.adam_eps;
        s.weight_decay = config_.weight_decay, s.decay_all = config_.decay_all;
        s.max_grad_norm = config_.max_grad_norm;
        s.adam_step = state_.adam_step + 1;
        return s;
    }

    // `position`: of the step's first sequence.
    void report(const StepResult& result, int64_t position, double elapsed_ms) {
        StepMetrics m;
        m.step = state_.step, m.max_steps = config_.max_steps;
        m.loss = result.loss, m.grad_norm = result.grad_norm;
        m.learning_rate = learning_rate_at(config_, state_.step - 1);
        m.elapsed_ms = elapsed_ms;
        m.tokens_per_second = (double)config_.tokens_per_step() / (1e-3 * elapsed_ms);
        if (device_.peak_tflops > 0.0) {
            const SequenceFlops flops = sequence_flops(config_.model, config_.seq_len, attention_, config_.lighthouse);
            const double peak_of_step = ranks_.size() * 1e12 * device_.peak_tflops * 1e-3 * elapsed_ms;
            m.mfu = flops.work * (double)config_.sequences_per_step() / peak_of_step;
            m.mfu_dense_equivalent = flops.dense_equivalent * (double)config_.sequences_per_step() / peak_of_step;
        }
        m.memory_gib = model_.peak_memory_gib();
        m.seconds_left = seconds_left(elapsed_ms);

        terminal_.progress(m.step, m.max_steps, m.seconds_left);
        Json json = step_json(m);
        json["attention"] = choice_name(attention_);
        json["data_position"] = position;
        json["epoch"] = (double)position / (double)data_.train->num_sequences();
        json["tokens"] = state_.data_position * config_.seq_len;
        json["skipped"] = state_.skipped;
        if (result.skipped) {  // fabs: NaN is printed without a sign
            json["first_bad_tensor"] = result.first_bad_tensor;
            terminal_.print(format_string(
                "step %lld/%lld | skipped: loss %g, gradient norm %g; first not finite: %s; sequences %lld to %lld; "
                "%lld in a row, %lld in all",
                (long long)m.step, (long long)m.max_steps, std::fabs(m.loss), std::fabs(m.grad_norm),
                result.first_bad_tensor.c_str(), (long long)position, (long long)(state_.data_position - 1),
                (long long)state_.skipped_in_a_row, (long long)state_.skipped));
        } else {
            terminal_.print(step_line(m));
        }
        log(result.skipped ? "skip" : "step", json);
    }

    // By the mean time of this process's steps, evaluations and checkpoints included, but not of its first, which warms
    // up.
    double seconds_left(double elapsed_ms) {
        const int64_t steps_done = state_.step - first_step_, steps_left = config_.max_steps - state_.step;
        if (steps_done == 1) {
            second_step_start_ = Clock::now();
            return 1e-3 * elapsed_ms * (double)steps_left;
        }
        return seconds_since(second_step_start_) / (double)(steps_done - 1) * (double)steps_left;
    }

    // ---- evaluation, samples

    // Mean loss in nats a token over the validation sequences, in their order in the files, batches in turn on the
    // groups of ranks; no value when a signal came before the end.
    std::optional<double> validation_loss(AttentionMode mode) {
        model_.set_attention(mode);
        const ParallelMesh& mesh = ranks_.mesh();
        const int64_t num_sequences = num_validation_sequences();
        double sum = 0.0;
        bool complete = true;
        for (int64_t at = 0; at < num_sequences && complete; at += config_.sequences_at_once()) {
            // A group for which none is left evaluates the first of this turn, for nothing: it would wait for the
            // others all the same, and, should they need longer than --comm_timeout, take them for gone.
            const int64_t own = at + mesh.data_rank() * config_.batch_size, begin = own < num_sequences ? own : at;
            const int B = (int)std::min<int64_t>(config_.batch_size, num_sequences - begin);
            keep_if_bad([&] { read_batch(*data_.validation, begin, B); });
            if (at == 0) {
                ranks_.check_share_sequences(hash_of_batch(B),
                                             config_.val_data.empty() ? "--train_data" : "--val_data");
            }
            const double loss = model_.evaluate(tokens_.data(), B, config_.seq_len);
            sum += begin == own ? B * loss : 0.0;
            complete = !stop_requested();
        }
        if (ranks_.size() > 1) {
            sum = mesh.context_rank() == 0 ? sum : 0.0;  // all ranks of a sequence have its loss
            ranks_.world().all_reduce_sum(&sum, 1, "sum of validation losses");
        }
        model_.set_attention(attention_);
        return complete ? std::optional<double>(sum / (double)num_sequences) : std::nullopt;
    }

    int64_t num_validation_sequences() const {
        const int64_t all = data_.validation->num_sequences();
        const bool some = config_.eval_batches > 0 && config_.eval_batches <= all / config_.batch_size;
        return some ? config_.eval_batches * config_.batch_size : all;
    }

    // Prints and logs the validation loss; under Lighthouse attention also that of the same weights under dense
    // attention. Returns it; no value without validation data, or when a signal came before the end.
    std::optional<double> evaluate() {
        if (!data_.validation) {
            return std::nullopt;
        }
        const Clock::time_point start = Clock::now();
        const int64_t num_tokens = num_validation_sequences() * config_.seq_len;
        const std::optional<double> loss = validation_loss(attention_);
        const bool also_dense = loss && attention_ != AttentionMode::dense;
        const std::optional<double> dense_loss = also_dense ? validation_loss(AttentionMode::dense) : loss;
        if (!loss || !dense_loss) {
            return std::nullopt;  // stopped by a signal
        }
        std::string line = format_string("step %lld | validation loss %.6f", (long long)state_.step, *loss);
        Json json = {{"loss", *loss},
                     {"attention", choice_name(attention_)},
                     {"dense_loss", *dense_loss},
                     {"tokens", num_tokens},
                     {"seconds", seconds_since(start)}};
        if (also_dense) {
            line += format_string(" under lighthouse attention, %.6f under dense", *dense_loss);
        }
        terminal_.print(line + format_string(" | %lld tokens, %.1f s", (long long)num_tokens, seconds_since(start)));
        if (config_.print_influence && attention_ == AttentionMode::lighthouse) {
            const std::optional<Json> influence = print_influence();
            if (!influence) {
                return std::nullopt;  // the resumed run makes up for both
            }
            json["influence"] = *influence;
        }
        log("validation", json);
        return loss;
    }

    // How much later tokens change earlier losses through selection, and what is read of the next one, on the first
    // validation batch; nothing when a signal came before the end.
    std::optional<Json> print_influence() {
        const int B = (int)std::min<int64_t>(config_.batch_size, data_.validation->num_sequences());
        read_batch(*data_.validation, 0, B);
        const int64_t tiles = config_.lighthouse.topk / LIGHTHOUSE_TILE_BUDGET;
        const SelectionInfluence i = measure_selection_influence(model_, tokens_, B, config_.seq_len, tiles);
        const RandomStream random(config_.seed, RandomUse::replaced_tokens, (uint64_t)state_.step);
        const std::optional<NextTokenInfluence> next = measure_next_token_influence(
            model_, tokens_, B, config_.seq_len, tiles, random, [&] { return stop_requested(); });
        if (!next) {
            return std::nullopt;
        }
        for (const std::string& text : {text_of(i), text_of(*next)}) {
            terminal_.print(format_string("step %lld | influence: %s", (long long)state_.step, text.c_str()));
        }
        return Json{{"next_token",
                     {{"places", next->num_places},
                      {"loss", next->loss},
                      {"rise", next->rise},
                      {"standard_error", next->standard_error}}},
                    {"tile_tokens", i.tile_tokens},
                    {"split", i.split},
                    {"changed_fraction", i.changed_fraction},
                    {"mean_change", i.mean_change},
                    {"max_change", i.max_change},
                    {"mean_benefit", i.mean_benefit},
                    {"earlier_max_change", i.earlier_max_change}};
    }

    int evaluate_and_sample() {
        if (config_.checkpoint.empty()) {  // as a baseline, or because a flag was forgotten
            warn(
                format_string("--max_steps 0 without --resume or --init_from takes the random initial weights of "
                              "--seed %llu",
                              (unsigned long long)config_.seed));
        }
        if (ranks_.is_first() && !config_.checkpoint.empty() && data_.validation) {
            const SequenceSet& data = *data_.validation;
            warn_of_tokenizer(
                checkpoint::read_companions(config_.checkpoint, config_, model_.config(), data.stream().is_bytes()),
                data, "the validation data");
        }
        if (config_.print_influence && attention_ != AttentionMode::lighthouse) {
            warn(
                "--print_influence: the attention of this step is dense, in which later tokens have none (--attention "
                "lighthouse --lighthouse_steps -1 measures under Lighthouse attention)");
        }
        const std::optional<double> loss = evaluate();
        if (config_.asks_for_sample) {
            sample();
        }
        if (stop_requested()) {
            std::fprintf(stderr, "%s: stopped by %s before the end\n", config_.program.c_str(),
                         stop_signal::name_of(stop_signal_));
            return 1;
        }
        CHECK(!data_.validation || (loss && std::isfinite(*loss)),
              "the validation loss is not finite: these weights are bad");
        check_printed();
        return 0;
    }

    // Prints and logs a continuation of --sample_prompt. Samples run under dense attention, which takes any length, on
    // rank 0 alone.
    void sample() {
        if (config_.sample_tokens == 0) {
            return;
        }
        const auto work = [&] {
            if (ranks_.is_first()) {
                model_.enter_thread();
                print_sample();
            }
        };
        ranks_.at_length(work, num_sampled_, "a sample");
    }
    void print_sample() {
        const Clock::time_point start = Clock::now();
        model_.set_attention(AttentionMode::dense);
        std::vector<int32_t> tokens = prompt_;
        std::vector<float> logits(config_.model.vocab_size);
        const RandomStream random(config_.seed, RandomUse::samples, (uint64_t)state_.step);
        bool ended = false;
        for (int64_t i = 0; i < config_.sample_tokens && !ended && stop_signal::received == 0; ++i) {
            const int64_t length = std::min<int64_t>((int64_t)tokens.size(), model_.max_sequence_length());
            model_.next_token_logits(tokens.data() + (int64_t)tokens.size() - length, length, logits.data());
            const std::optional<int32_t> token =
                sample_token(logits.data(), config_.model.vocab_size, config_.temperature, config_.top_p,
                             random.uniform((uint64_t)i));
            CHECK(token || !config_.asks_for_sample,
                  "the sample ends after %lld tokens: a logit is not finite: these weights are bad", (long long)i);
            if (!token) {
                terminal_.print("the sample ends early: a logit is not finite");
                break;
            }
            tokens.push_back(*token);
            ++num_sampled_;
            ended = tokenizer_->ends_text(*token);
        }
        model_.set_attention(attention_);
        if (stop_signal::received != 0) {
            return;  // cut short
        }
        const std::string text = tokenizer_->decode(tokens);
        terminal_.print(format_string("step %lld | sample, %.1f s:\n%s", (long long)state_.step, seconds_since(start),
                                      terminal_safe(text).c_str()));
        log("sample", {{"text", text}, {"seconds", seconds_since(start)}});
    }

    // ---- checkpoints and the end

    // Unless the newest checkpoint is of this step.
    void save() {
        if (saved_step_ == state_.step) {
            return;
        }
        const Clock::time_point start = Clock::now();
        try {
            write_checkpoint();
        } catch (const Error&) {
            if (!has_lost_folder()) {
                throw;
            }
            write_checkpoint();
        }
        saved_step_ = state_.step;
        terminal_.print(format_string("step %lld | checkpoint %s, %.1f s", (long long)state_.step, checkpoint_.c_str(),
                                      seconds_since(start)));
        log("checkpoint", {{"path", checkpoint_}, {"seconds", seconds_since(start)}});
    }

    void write_checkpoint() {
        ranks_.first_does([&] { folder_.hold(state_.step); }, "look at the output folder");
        const bool weights_bf16 =
            config_.save_dtype == SaveDtype::bf16 || (config_.save_dtype == SaveDtype::automatic && device_.is_gpu);
        checkpoint_ = save_checkpoint(model_, state_, config_, weights_bf16, config_.output_dir,
                                      checkpoint::OPTIMIZER_SHARD_BYTES, ranks_, companions_ ? &*companions_ : nullptr);
        config_.damaged_checkpoints.erase(state_.step);  // another is in its place
    }
    // Whether a save failed because someone removed or moved the folder meanwhile. All ranks ask, as all have failed;
    // where they cannot, what went wrong first is what to say.
    bool has_lost_folder() const {
        try {
            const int lost = folder_.is_lost();
            return (ranks_.size() == 1 ? lost : ranks_.largest(lost, "whether the output folder is there")) != 0;
        } catch (const Error&) {
            return false;
        }
    }

    std::string resume_command() const {
        const std::string& folder = config_.output_dir;
        const char* const joint = folder.compare(0, 1, "-") == 0 ? "=" : " ";  // or it would be taken for a flag
        return shell_quote(config_.program) + " --resume --output_dir" + joint + shell_quote(folder) +
               (config_.print_influence ? " --print_influence" : "");  // which is not saved with the run
    }

    // The step is finished: checkpoint and leave. A second signal ends the process meanwhile.
    int stop_on_signal() {
        save();
        terminal_.end_progress();
        const char* const name = stop_signal::name_of(stop_signal_);
        log("stop", {{"signal", name}});
        if (state_.step >= config_.max_steps) {
            const bool had_more_to_do = data_.validation || config_.sample_tokens > 0;
            terminal_.print(format_string("stopped by %s after the last step%s%s", name,
                                          had_more_to_do ? "; what was due after it is made up for by:\n  " : "",
                                          had_more_to_do ? resume_command().c_str() : ""));
            return 0;
        }
        const std::string how =
            ranks_.size() == 1
                ? "go on with:"
                : format_string("go on, started as before (%d ranks; others may do), with:", ranks_.size());
        terminal_.print(format_string("stopped by %s after step %lld of %lld; %s\n  %s", name, (long long)state_.step,
                                      (long long)config_.max_steps, how.c_str(), resume_command().c_str()));
        return 0;
    }

    // Says, on rank 0, why the run is no success after all. Returns the status to end with.
    int fail_saying(const std::string& sentence) const {
        if (ranks_.is_first()) {
            std::fprintf(stderr, "%s: %s\n", config_.program.c_str(), sentence.c_str());
        }
        return 1;
    }

    // Ends a run because steps were skipped. why(): what rank 0 says, once the checkpoint is written.
    template <class Why>
    int stop_because(const StepResult& result, Why why) {
        save();
        terminal_.end_progress();
        log("stop", {{"skipped_in_a_row", state_.skipped_in_a_row}, {"first_bad_tensor", result.first_bad_tensor}});
        return fail_saying(why());
    }
    // Where the data of the last num_steps steps begin.
    int64_t position_before(int64_t num_steps) const {
        return state_.data_position - num_steps * config_.sequences_per_step();
    }
    // From weights that may be bad. save_checkpoint has left one checkpoint of them.
    std::string way_back() const {
        const std::map<int64_t, std::string> checkpoints = checkpoint::list(config_.output_dir);
        const auto newer = checkpoints.lower_bound(state_.step);
        return newer == checkpoints.begin()
                   ? "begin anew: there is no checkpoint before it"
                   : "remove that folder to go on from the one before, " + std::prev(newer)->second;
    }
    int stop_after_skips(const StepResult& result) {
        return stop_because(result, [&] {
            return format_string(
                "%lld steps in a row had a loss or gradient norm that is not finite (first: %s): stopped at "
                "--max_skipped after writing %s; look at the data from sequence %lld on, or lower --learning_rate; if "
                "these weights are bad already, %s",
                (long long)state_.skipped_in_a_row, result.first_bad_tensor.c_str(), checkpoint_.c_str(),
                (long long)position_before(state_.skipped_in_a_row), way_back().c_str());
        });
    }
    // All steps of the run were skipped, if fewer in a row than --max_skipped: whoever waits for a trained model is
    // told.
    int end_untrained(const StepResult& result) {
        return stop_because(result, [&] {
            return format_string(
                "nothing was trained: the loss or gradient norm of all %lld steps was not finite (last: %s): %s holds "
                "the weights this run began with; look at them, and at the data from sequence %lld on",
                (long long)state_.step, result.first_bad_tensor.c_str(), checkpoint_.c_str(),
                (long long)position_before(state_.step - first_step_));
        });
    }

    int finish() {
        terminal_.end_progress();
        save();  // before what may fail
        const std::optional<double> loss = is_missing("validation") ? evaluate() : std::nullopt;
        if (loss && !std::isfinite(*loss)) {
            return fail_saying(
                format_string("the last validation loss is not finite: the weights in %s are bad, or the validation "
                              "data are: look at both before going on from there",
                              checkpoint_.c_str()));
        }
        if (is_missing("sample")) {
            sample();
        }
        if (stop_requested()) {
            return stop_on_signal();
        }
        terminal_.print(format_string("checkpoint  %s\nmetrics     %s", checkpoint_.c_str(),
                                      metrics_path(config_.output_dir).c_str()));
        return 0;
    }

    TrainableModel& model_;
    RunConfig config_;
    const DeviceInfo device_;
    const RunRanks& ranks_;
    RunFolder folder_;  // rank 0's
    Terminal terminal_;
    RunData data_;
    std::optional<Tokenizer> tokenizer_;                // of the training data
    std::vector<int32_t> prompt_;                       // of samples
    std::set<std::string> events_at_start_;             // of the step that this process began with
    TrainingState state_;                               // what a checkpoint restores, beside the model's
    AttentionMode attention_ = AttentionMode::dense;    // of the next step
    std::vector<int32_t> tokens_;                       // [B, T + 1], the batch at hand
    std::atomic<uint64_t> num_sampled_{0};              // tokens of all samples: how long one goes on
    int64_t position_ahead_ = -1;                       // of the training sequences in it, if the next step's
    std::optional<checkpoint::Companions> companions_;  // rank 0's, of all checkpoints
    std::string checkpoint_;                            // the newest this run has written
    int64_t saved_step_ = -1;                           // its step
    int64_t first_step_ = 0;                            // of this process
    int64_t skipped_at_start_ = 0;                      // steps in a row, of the checkpoint it goes on from
    int stop_signal_ = 0;                               // what asked to stop, once all ranks know
    Clock::time_point second_step_start_;
};

// Trains, evaluates or samples, as `config` (from configure_run) says. Returns the status for main: 0 when the run
// ended or a signal stopped its training, 1 when a signal stopped an evaluation, too many steps in a row were skipped,
// or all, or the last validation loss is not finite. Throws Error. All ranks call it.
inline int run_training(TrainableModel& model, const RunConfig& config, const DeviceInfo& device,
                        const RunRanks& ranks = RunRanks()) {
    return TrainingRun(model, config, device, ranks).run();
}
