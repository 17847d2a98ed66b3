// config.h: every setting of a run, once, with its default, and the rules across settings. flags.h fills it from the
// command line and from a file; both trainers read it. A field has the name of its flag.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "context_partition.h"
#include "lighthouse_geometry.h"
#include "model_config.h"
#include "output_lock.h"
#include "setting_choices.h"

constexpr int64_t MAX_SEQ_LEN = (int64_t)1 << 24;  // tokens

struct RunConfig {
    // ---- model: a preset, then every field of its shape
    std::string model_preset = "tiny";  // --model
    ModelConfig model;

    // ---- attention
    AttentionMode attention = AttentionMode::dense;
    LighthouseConfig lighthouse;    // --lighthouse_levels, --lighthouse_pool, ...
    int64_t lighthouse_steps = -1;  // first step under dense attention; -1: Lighthouse to the end

    // ---- data
    std::vector<std::string> train_data;  // files or glob patterns
    std::vector<std::string> val_data;    // the same; empty: the last val_fraction of the training data
    double val_fraction = 0.05;
    DataFormat data_format = DataFormat::automatic;
    bool byte_markers = true;   // tokens 256 (begin) and 257 (end) around each file of bytes
    uint64_t shuffle_seed = 0;  // of the order of training sequences

    // ---- training
    int64_t seq_len = 256;     // T
    int batch_size = 8;        // B: sequences of one forward and backward pass
    int64_t global_batch = 0;  // sequences of one optimizer step; 0: batch_size times data-parallel ranks
    int64_t max_steps = 400;   // 0: only evaluate and sample
    uint64_t seed = 0;         // of initial weights and samples
    int64_t max_skipped = 10;  // steps in a row with a non-finite loss or gradient norm before the run stops
    Recompute recompute = Recompute::none;
    Offload offload = Offload::none;
    bool deterministic = false;

    // ---- optimizer
    double learning_rate = 3e-3;  // the peak, after warm-up
    int64_t warmup_steps = 20;
    ScheduleKind schedule = ScheduleKind::cosine;
    double final_learning_rate_fraction = 0.1;  // of learning_rate, at the end of the decay
    int64_t decay_steps = 0;                    // the step at which the decay ends; 0: max_steps
    double beta1 = 0.9;
    double beta2 = 0.95;
    double adam_eps = 1e-8;
    double weight_decay = 0.1;
    bool decay_all = false;      // of norms and embeddings too
    double max_grad_norm = 1.0;  // 0: no clipping

    // ---- checkpoints
    std::string init_from;         // a Hugging Face Llama directory: weights and shape; with resume: where it began
    bool resume = false;           // from the newest whole checkpoint in output_dir
    std::string output_dir;        // empty: a new folder runs/DATE-TIME
    int64_t checkpoint_every = 0;  // steps; 0: only at the end
    int64_t keep_checkpoints = 3;  // 0: all
    SaveDtype save_dtype = SaveDtype::automatic;

    // ---- evaluation and samples
    int64_t eval_every = 250;    // steps; 0: only at the end
    int64_t eval_batches = 64;   // of batch_size sequences; 0: all validation data
    int64_t sample_every = 0;    // steps; 0: only at the end
    int64_t sample_tokens = 64;  // 0: no samples
    std::string sample_prompt;
    double temperature = 0.8;
    double top_p = 0.95;

    // ---- device
    int device = 0;       // GPU index
    int num_threads = 0;  // of the CPU; 0: all
    int64_t classifier_chunk_rows =
        0;  // token rows whose logits exist at once on the GPU; 0: chosen from the vocabulary
    bool print_memory = false;
    bool fit = false;              // print what would fit, and end
    double gpu_memory = 0.0;       // GiB of the GPU that the run may use; 0: all that is free
    double host_memory = 0.0;      // GiB of the host that --offload may use; 0: this process's share of what is free
    bool print_influence = false;  // with every evaluation under Lighthouse attention
    bool cuda_graphs = true;       // replay what a batch enqueues on the GPU
    bool profile = false;
    bool plain = false;  // no progress bar on a terminal

    // ---- many GPUs
    int context_parallel = 1;  // W: ranks that share a sequence; the ranks / W groups train on different ones
    CommTransport comm_transport = CommTransport::automatic;
    double comm_timeout = 600.0;  // seconds without progress between ranks that are a failure
    ContextExchange context_exchange = ContextExchange::automatic;

    // ---- resolved at start-up, not flags
    std::string program = "train_gpt";        // as it was called
    std::string checkpoint;                   // folder the weights come from: of --init_from, or the newest of --resume
    std::shared_ptr<OutputLock> output_lock;  // of output_dir; null: not taken (yet), or by rank 0
    std::set<int64_t> damaged_checkpoints;    // steps of those in output_dir that --resume passed over; rank 0's
    int data_parallel = 1;                    // groups of ranks with different sequences
    bool asks_for_sample = false;             // --max_steps 0 and a --sample_prompt: no data are needed

    // Without --val_data the last --val_fraction of --train_data.
    bool splits_train_data() const { return val_data.empty() && !train_data.empty() && val_fraction > 0.0; }
    bool has_validation_data() const { return !val_data.empty() || splits_train_data(); }

    // Sequences of one micro-batch of all ranks.
    int64_t sequences_at_once() const { return (int64_t)batch_size * data_parallel; }
    int64_t sequences_per_step() const { return global_batch > 0 ? global_batch : sequences_at_once(); }
    int64_t micro_batches_per_step() const { return sequences_per_step() / sequences_at_once(); }
    int64_t tokens_per_step() const { return sequences_per_step() * seq_len; }
    int64_t decay_end() const { return decay_steps > 0 ? decay_steps : max_steps; }
    // The attention of training step `step` (0 is the first).
    AttentionMode attention_at(int64_t step) const {
        return lighthouse_steps >= 0 && step >= lighthouse_steps ? AttentionMode::dense : attention;
    }
};

// Throws Error for the first setting that breaks a rule: flag, value, rule, and the nearest value that works. The
// model's shape is checked too: call it once the shape is known (with --init_from and --resume it comes from a
// checkpoint).
inline void validate(const RunConfig& c) {
    validate(c.model);
    auto in_range = [](const char* flag, int64_t value, int64_t minimum, int64_t maximum) {
        CHECK(value >= minimum && value <= maximum, "--%s %lld: must be from %lld to %lld", flag, (long long)value,
              (long long)minimum, (long long)maximum);
    };
    auto at_least = [](const char* flag, int64_t value, int64_t minimum) {
        CHECK(value >= minimum, "--%s %lld: must be at least %lld", flag, (long long)value, (long long)minimum);
    };
    auto real_in_range = [](const char* flag, double value, double minimum, double maximum) {
        CHECK(value >= minimum && value <= maximum, "--%s %s: must be from %s to %s", flag, number_text(value).c_str(),
              number_text(minimum).c_str(), number_text(maximum).c_str());
    };
    const double any = 3e38;  // that float32 holds

    in_range("seq_len", c.seq_len, 1, MAX_SEQ_LEN);
    in_range("batch_size", c.batch_size, 1, 1 << 20);
    const int64_t max_batch_tokens = ((int64_t)1 << 31) - 1;
    CHECK(c.seq_len * c.batch_size <= max_batch_tokens,
          "--batch_size %d: times --seq_len %lld must stay under 2^31 tokens; the largest that does is %lld",
          c.batch_size, (long long)c.seq_len, (long long)(max_batch_tokens / c.seq_len));
    const int64_t max_global_batch = (int64_t)1 << 40;
    in_range("global_batch", c.global_batch, 0, max_global_batch);
    const int64_t at_once = c.sequences_at_once();
    CHECK(c.global_batch % at_once == 0,
          "--global_batch %lld: must be a multiple of --batch_size %d%s; the nearest is %lld",
          (long long)c.global_batch, c.batch_size,
          c.data_parallel == 1 ? "" : format_string(" times the %d groups of ranks", c.data_parallel).c_str(),
          (long long)(at_once *
                      std::clamp<int64_t>((c.global_batch + at_once / 2) / at_once, 1, max_global_batch / at_once)));
    CHECK(c.fit || c.model.max_positions == 0 || c.model.max_positions >= c.seq_len,
          "--max_positions %lld: must be at least --seq_len %lld (0: equal to it)", (long long)c.model.max_positions,
          (long long)c.seq_len);
    in_range("max_steps", c.max_steps, 0, (int64_t)1 << 40);
    at_least("max_skipped", c.max_skipped, 1);

    real_in_range("learning_rate", c.learning_rate, 0.0, any);
    at_least("warmup_steps", c.warmup_steps, 0);
    at_least("decay_steps", c.decay_steps, 0);
    CHECK(c.decay_steps == 0 || c.decay_steps >= c.warmup_steps,
          "--decay_steps %lld: must not end before the %lld steps of --warmup_steps", (long long)c.decay_steps,
          (long long)c.warmup_steps);
    real_in_range("final_learning_rate_fraction", c.final_learning_rate_fraction, 0.0, 1.0);
    // As the optimizer has them, in float32.
    CHECK(c.beta1 >= 0.0 && (float)c.beta1 < 1.0f, "--beta1 %s: must be at least 0 and at most 0.9999999",
          number_text(c.beta1).c_str());
    CHECK(c.beta2 >= 0.0 && (float)c.beta2 < 1.0f, "--beta2 %s: must be at least 0 and at most 0.9999999",
          number_text(c.beta2).c_str());
    CHECK((float)c.adam_eps > 0.0f && c.adam_eps <= 1.0, "--adam_eps %s: must be from 1e-45 to 1",
          number_text(c.adam_eps).c_str());
    real_in_range("weight_decay", c.weight_decay, 0.0, any);
    real_in_range("max_grad_norm", c.max_grad_norm, 0.0, any);
    CHECK(c.max_grad_norm == 0.0 || (float)c.max_grad_norm > 0.0f,
          "--max_grad_norm %s: must be 0 (no clipping) or at least 1e-45", number_text(c.max_grad_norm).c_str());

    CHECK(c.val_fraction >= 0.0 && c.val_fraction < 1.0, "--val_fraction %s: must be at least 0 and less than 1",
          number_text(c.val_fraction).c_str());
    CHECK(c.max_steps == 0 || !c.train_data.empty() || c.fit,
          "--train_data: name the files to train on, e.g. --train_data 'corpus/*.txt' (--help lists all flags)");
    CHECK(c.max_steps > 0 || c.has_validation_data() || c.asks_for_sample || c.fit,
          "--max_steps 0 only evaluates and samples: name the data to evaluate with --val_data, or a text to "
          "continue with --sample_prompt, on the command line");
    CHECK(c.shuffle_seed < (uint64_t)1 << 63 && c.seed < (uint64_t)1 << 63,
          "--seed and --shuffle_seed: at most 2^63 - 1");

    CHECK(!c.resume || !c.output_dir.empty(), "--resume: say with --output_dir which run to continue");
    at_least("checkpoint_every", c.checkpoint_every, 0);
    at_least("keep_checkpoints", c.keep_checkpoints, 0);
    at_least("eval_every", c.eval_every, 0);
    at_least("eval_batches", c.eval_batches, 0);
    at_least("sample_every", c.sample_every, 0);
    at_least("sample_tokens", c.sample_tokens, 0);
    real_in_range("temperature", c.temperature, 0.0, any);
    CHECK(c.top_p > 0.0 && c.top_p <= 1.0, "--top_p %s: must be greater than 0 and at most 1",
          number_text(c.top_p).c_str());

    in_range("context_parallel", c.context_parallel, 1, 1 << 16);
    CHECK(c.context_exchange != ContextExchange::heads || c.model.num_kv_heads % c.context_parallel == 0,
          "--context_exchange heads: --num_kv_heads %d must be a multiple of --context_parallel %d; --context_exchange "
          "ring takes any",
          c.model.num_kv_heads, c.context_parallel);
    CHECK(c.comm_timeout > 0.0, "--comm_timeout %s: must be greater than 0 seconds",
          number_text(c.comm_timeout).c_str());
    CHECK(
        c.context_parallel * c.data_parallel == 1 || !offloads_optimizer(c.offload),
        "--offload %s: with %d ranks it must be none or activations; each holds a shard of the optimizer's state only",
        choice_name(c.offload), c.context_parallel * c.data_parallel);
    in_range("device", c.device, 0, 1 << 10);
    real_in_range("gpu_memory", c.gpu_memory, 0.0, 1 << 20);
    real_in_range("host_memory", c.host_memory, 0.0, 1 << 20);
    in_range("num_threads", c.num_threads, 0, 1 << 12);
    at_least("classifier_chunk_rows", c.classifier_chunk_rows, 0);

    at_least("lighthouse_steps", c.lighthouse_steps, -1);
    CHECK(!c.print_influence || c.attention == AttentionMode::lighthouse,
          "--print_influence: is about the selection of Lighthouse attention; add --attention lighthouse, or leave it "
          "out");
    CHECK(!c.print_influence || c.has_validation_data() || c.fit,
          "--print_influence: needs validation data: give --val_data, or a --val_fraction above 0");
    CHECK(!c.print_influence || c.context_parallel == 1,
          "--print_influence: compares the losses of whole sequences; with --context_parallel %d no rank has them",
          c.context_parallel);
    // The longest T beside the other settings, for messages; positions of a checkpoint grow with it.
    const bool positions_bind = c.model.max_positions > 0 && c.checkpoint.empty() && !c.fit;
    const int64_t longest =
        std::min({MAX_SEQ_LEN, max_batch_tokens / c.batch_size, positions_bind ? c.model.max_positions : MAX_SEQ_LEN});
    if (c.attention == AttentionMode::lighthouse) {
        CHECK(c.context_parallel == 1 || c.lighthouse.scorer == LighthouseScorer::norm,
              "--lighthouse_scorer dilated: with --context_parallel %d it must be norm; dilated scores need the whole "
              "sequence on one GPU",
              c.context_parallel);
        // Refuses what it cannot cut into tiles, and a sequence's tiles into the chunks of its ranks.
        const ContextPartition partition{c.context_parallel, 0, c.seq_len};
        make_lighthouse_geometry(c.seq_len, c.lighthouse, {partition.num_chunks(), longest});
        const int n = c.model.num_layers;
        for (const int layer : c.lighthouse.dense_layers) {
            CHECK(layer >= -n && layer < n,
                  "--lighthouse_dense_layers %d: with --num_layers %d layers are from %d to %d; the nearest is %d",
                  layer, n, -n, n - 1, std::clamp(layer, -n, n - 1));
        }
    }
    make_context_partition(c.seq_len, c.context_parallel, 0, longest);
}
