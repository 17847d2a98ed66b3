// trainable_model.h: what the training loop needs from a model, so that one loop (train_loop.h) drives both the CPU
// reference (reference/model.h) and the GPU model (model.cuh).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "adamw_settings.h"
#include "check.h"
#include "model_config.h"
#include "parameters.h"

// ---- tokens ------------------------------------------------------------------------------------
// The columns of tokens [B, T + 1] as token_losses takes them, each [B, T].
struct InputsAndTargets {
    std::vector<int32_t> inputs, targets;

    InputsAndTargets(const int32_t* tokens, int B, int64_t T) {
        for (int b = 0; b < B; ++b) {
            const int32_t* const row = tokens + b * (T + 1);
            inputs.insert(inputs.end(), row, row + T);
            targets.insert(targets.end(), row + 1, row + T + 1);
        }
    }
};

// Throws Error unless the vocabulary has all inputs and, unless null, targets: B rows of T, row_stride apart.
inline void check_tokens(const int32_t* inputs, const int32_t* targets, int64_t row_stride, int B, int64_t T,
                         int64_t vocab_size) {
    const auto check_from = [&](int64_t begin, const int32_t* rows) {
        for (int b = 0; b < B; ++b) {
            const int32_t* const row = rows + b * row_stride;
            for (int64_t t = begin; t < T; ++t) {
                CHECK(row[t] >= 0 && row[t] < vocab_size, "token %d at position %lld: --vocab_size is %lld", row[t],
                      (long long)t, (long long)vocab_size);
            }
        }
    };
    check_from(0, inputs);
    if (targets != nullptr) {
        const bool next_inputs = targets == inputs + 1;  // all but a row's last
        check_from(next_inputs ? T - 1 : 0, targets);
    }
}

// ---- the model ---------------------------------------------------------------------------------
struct StepResult {
    double loss = 0.0;             // mean over the tokens of the step, nats
    double grad_norm = 0.0;        // global, before clipping
    bool skipped = false;          // loss or grad_norm was not finite: nothing was updated
    std::string first_bad_tensor;  // when skipped: "loss", or the first tensor whose gradient is not finite
};

// The float32 state of one tensor: weights (the master copy) and AdamW's two running means.
enum class StateKind { master, exp_avg, exp_avg_sq };
inline const char* state_kind_name(StateKind kind) {
    return kind == StateKind::master ? "master" : kind == StateKind::exp_avg ? "exp_avg" : "exp_avg_sq";
}

// Elements [begin, begin + num_elements) of a tensor, row-major.
struct StatePiece {
    int64_t begin = 0;
    int64_t num_elements = 0;
};

class TrainableModel {
  public:
    virtual ~TrainableModel() = default;
    virtual const ModelConfig& config() const = 0;
    virtual const ParameterTable& parameters() const = 0;

    // Which attention the following calls use. Lighthouse needs a legal geometry for T (checked at start-up).
    virtual void set_attention(AttentionMode mode) = 0;

    // One optimizer step is begin_step, accumulate_gradients for each micro-batch, update.
    // num_micro_batches: how many; ranks that train together add up their gradients during the last.
    virtual void begin_step(int64_t num_micro_batches = 1) = 0;
    // tokens: host [B, T + 1]; inputs are columns 0..T-1, targets 1..T. Adds the gradient of loss_weight * (mean loss
    // of this micro-batch) to the gradients and loss_weight * (its mean loss) to the step's loss.
    virtual void accumulate_gradients(const int32_t* tokens, int B, int64_t T, double loss_weight) = 0;
    // Clips, applies AdamW, or skips everything when loss or norm is not finite. Waits for the device.
    virtual StepResult update(const AdamWSettings& settings) = 0;

    // Mean loss in nats of one batch; tokens as above. Touches neither gradients nor the step's loss.
    virtual double evaluate(const int32_t* tokens, int B, int64_t T) = 0;
    // losses (=), inputs, targets: host [B, T]. The loss of each target after the inputs up to its place: with the
    // columns of `tokens` those that evaluate gives the mean of.
    virtual void token_losses(float* losses, const int32_t* inputs, const int32_t* targets, int B, int64_t T) = 0;
    // Logits [V] after the last of T tokens (host [T]; at most max_sequence_length()): for sampling.
    virtual void next_token_logits(const int32_t* tokens, int64_t T, float* logits) = 0;
    virtual int64_t max_sequence_length() const = 0;

    // Copies one whole tensor [rows, cols] between host float32 and the model. Writing master also sets the weights
    // used by the forward pass. Where ranks hold shards of the state, all of them call gather_state(kind) before
    // read_state, which then works until the next step or the next gather.
    virtual void gather_state(StateKind) {}
    virtual void read_state(StateKind kind, int tensor, float* out) = 0;
    virtual void write_state(StateKind kind, int tensor, const float* in) = 0;
    // The parts of a tensor whose state this rank holds, in order: with one rank all of it.
    virtual std::vector<StatePiece> state_pieces(int tensor) const {
        return {{0, parameters().tensors[tensor].num_elements()}};
    }
    virtual void read_state_piece(StateKind kind, int tensor, const StatePiece&, float* out) {
        read_state(kind, tensor, out);
    }
    virtual void write_state_piece(StateKind kind, int tensor, const StatePiece&, const float* in) {
        write_state(kind, tensor, in);
    }
    // The accumulated gradient of one tensor, [rows, cols]: for tests. All ranks call it.
    virtual void read_gradient(int tensor, float* out) = 0;

    virtual double peak_memory_gib() const = 0;  // in use by the model on its device
    // By a thread other than the one that made the model, before it calls anything else of it.
    virtual void enter_thread() {}
};
