// reference/model.h: the step on the CPU: forward, backward and update, in order of execution, one operation a line;
// the backward is the forward's list reversed. What model.cuh is tested against, and what train_gpt.cpp trains with.
//
// Everything is Real: float to train, double to test. Every activation of every block is kept. A step repeats bit for
// bit, whatever the number of threads. A tied embedding's gradient first gets the classifier's part, chunk by chunk,
// then the embedding's.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "../lighthouse_geometry.h"  // the geometry of a Lighthouse layer
#include "../trainable_model.h"      // the interface of the training loop
#include "adamw.h"                   // update
#include "attention.h"               // dense attention
#include "classifier.h"              // logits and loss
#include "embedding.h"               // token rows
#include "gemm.h"                    // linear layers
#include "grad_norm.h"               // clipping
#include "lighthouse.h"              // Lighthouse attention
#include "rmsnorm.h"                 // normalisation
#include "rope.h"                    // rotary positions
#include "swiglu.h"                  // feed-forward gate

namespace reference {

// Rows of logits that exist at a time: at most this many elements, at least one row.
constexpr int64_t CLASSIFIER_CHUNK_ELEMENTS = (int64_t)1 << 22;

// What a decoder block's forward leaves for its backward; rows = B T.
template <class Real>
struct BlockActivations {
    std::vector<Real> residual_in;         // [rows, C], the block's input
    std::vector<Real> attention_rstd;      // [rows]
    std::vector<Real> attention_norm_out;  // [rows, C]
    std::vector<Real> qkv;                 // [rows, (H + 2 Hkv) D], rotated
    std::vector<Real> lse;                 // [B, H, T]
    std::vector<Real> attention;           // [rows, H D]
    std::vector<Real> residual_mid;        // [rows, C], after attention
    std::vector<Real> ffn_rstd;            // [rows]
    std::vector<Real> ffn_norm_out;        // [rows, C]
    std::vector<Real> gate_up;             // [rows, 2F]
    std::vector<Real> swiglu;              // [rows, F]
    LighthouseState<Real> lighthouse;      // of a block that attended in Lighthouse mode
};

// The gradients that backward passes on; all are overwritten in every block.
template <class Real>
struct GradientActivations {
    std::vector<Real> residual;   // [rows, C]
    std::vector<Real> norm_out;   // [rows, C]
    std::vector<Real> swiglu;     // [rows, F]
    std::vector<Real> gate_up;    // [rows, 2F]
    std::vector<Real> attention;  // [rows, H D]
    std::vector<Real> qkv;        // [rows, (H + 2 Hkv) D]
};

// The three parts of packed rows [B T, (H + 2 Hkv) D].
template <class Element>
struct QkvViews {
    View<Element> q, k, v;

    QkvViews(Element* qkv, const ModelConfig& config, int64_t T) {
        const int64_t width = config.qkv_width(), D = config.head_dim;
        const int64_t k_begin = config.num_heads * D, v_begin = k_begin + config.num_kv_heads * D;
        q = {qkv, T * width, width, D};
        k = {qkv + k_begin, T * width, width, D};
        v = {qkv + v_begin, T * width, width, D};
    }
};

template <class Real>
class ReferenceModel : public TrainableModel {
  public:
    // Memory for batches of at most max_batch sequences of max_T tokens. Weights are zero until write_state() sets
    // them. lighthouse is used in Lighthouse mode only.
    ReferenceModel(const ModelConfig& config, AttentionMode attention, const LighthouseConfig& lighthouse,
                   int max_batch, int64_t max_T);

    const ModelConfig& config() const override { return config_; }
    const ParameterTable& parameters() const override { return table_; }
    int64_t max_sequence_length() const override { return max_T_; }
    double peak_memory_gib() const override;
    void set_attention(AttentionMode mode) override { attention_ = mode; }

    void begin_step(int64_t num_micro_batches = 1) override;
    void accumulate_gradients(const int32_t* tokens, int B, int64_t T, double loss_weight) override;
    StepResult update(const AdamWSettings& settings) override;

    double evaluate(const int32_t* tokens, int B, int64_t T) override;
    void token_losses(float* losses, const int32_t* inputs, const int32_t* targets, int B, int64_t T) override;
    void next_token_logits(const int32_t* tokens, int64_t T, float* logits) override;
    // logits (=) [B, T, V] of every position; tokens [B, T].
    void all_logits(Real* logits, const int32_t* tokens, int B, int64_t T);

    void read_state(StateKind kind, int tensor, float* out) override;
    void write_state(StateKind kind, int tensor, const float* in) override;
    void read_gradient(int tensor, float* out) override;

    // Bytes that a model for such batches takes, without what Lighthouse attention adds as it is first used.
    // What is allowed may need more than 2^63.
    static double planned_bytes(const ModelConfig& config, int max_batch, int64_t max_T);

    // One tensor in full precision: for tests.
    Real* weight(int tensor) { return weights_.data() + offsets_[tensor]; }
    Real* gradient(int tensor) { return gradients_.data() + offsets_[tensor]; }

  private:
    // The micro-batch at hand.
    struct Batch {
        int B;
        int64_t T;
        int64_t rows() const { return B * T; }
    };

    Batch take_tokens(const int32_t* inputs, const int32_t* targets, int64_t row_stride, int B, int64_t T);
    Batch take_columns(const int32_t* tokens, int B, int64_t T) {  // of [B, T + 1]
        return take_tokens(tokens, tokens + 1, T + 1, B, T);
    }
    void forward_losses(const Batch& batch);
    void forward(const Batch& batch);
    void forward_block(int l, const Batch& batch);
    void backward(const Batch& batch, double loss_weight);
    void backward_block(int l, const Batch& batch);
    void attention_forward_layer(int l, const Batch& batch);
    void attention_backward_layer(int l, const Batch& batch);
    AttentionShape attention_shape(const Batch& batch) const;
    bool uses_lighthouse(int l) const {
        return attention_ == AttentionMode::lighthouse && lighthouse_.applies_to(l, config_.num_layers);
    }
    static int64_t chunk_rows(int64_t rows, int64_t vocab_size) {
        return std::min(rows, std::max<int64_t>(1, CLASSIFIER_CHUNK_ELEMENTS / vocab_size));
    }
    int64_t chunk_rows(int64_t rows) const { return chunk_rows(rows, config_.vocab_size); }
    std::vector<Real>& state(StateKind kind) {
        return kind == StateKind::master ? weights_ : kind == StateKind::exp_avg ? exp_avg_ : exp_avg_sq_;
    }
    std::string first_bad_tensor();

    ModelConfig config_;
    AttentionMode attention_;
    LighthouseConfig lighthouse_;
    int max_batch_;
    int64_t max_T_;
    ParameterTable table_;
    std::vector<int64_t> offsets_;  // of each tensor in the four vectors below
    std::vector<Real> weights_, gradients_, exp_avg_, exp_avg_sq_;
    std::vector<double> inverse_frequencies_;  // [D / 2] of RoPE

    std::vector<int32_t> tokens_, targets_;  // [rows]
    std::vector<BlockActivations<Real>> blocks_;
    std::vector<Real> final_residual_;  // [rows, C]
    std::vector<Real> final_rstd_;      // [rows]
    std::vector<Real> hidden_;          // [rows, C], the final norm's output
    std::vector<Real> logits_;          // [chunk rows, V]
    std::vector<Real> losses_;          // [rows]
    GradientActivations<Real> d_;
    double step_loss_ = 0.0;
};

// ---- construction ------------------------------------------------------------------------------
template <class Real>
ReferenceModel<Real>::ReferenceModel(const ModelConfig& config, AttentionMode attention,
                                     const LighthouseConfig& lighthouse, int max_batch, int64_t max_T)
    : config_(config),
      attention_(attention),
      lighthouse_(lighthouse),
      max_batch_(max_batch),
      max_T_(max_T),
      table_(make_parameter_table(config)),
      inverse_frequencies_(rope_inverse_frequencies(config)) {
    CHECK(max_batch >= 1 && max_T >= 1, "a model for batches of %d sequences of %lld tokens: both must be positive",
          max_batch, (long long)max_T);
    int64_t num_elements = 0;
    for (const ParameterTensor& tensor : table_.tensors) {
        offsets_.push_back(num_elements);
        num_elements += tensor.num_elements();
    }
    for (std::vector<Real>* arena : {&weights_, &gradients_, &exp_avg_, &exp_avg_sq_}) {
        arena->resize(num_elements);
    }
    const int64_t rows = max_batch * max_T;
    const int64_t C = config_.width, F = config_.ffn_width;
    tokens_.resize(rows), targets_.resize(rows);
    blocks_.resize(config_.num_layers);
    for (BlockActivations<Real>& block : blocks_) {
        block.residual_in.resize(rows * C);
        block.attention_rstd.resize(rows);
        block.attention_norm_out.resize(rows * C);
        block.qkv.resize(rows * config_.qkv_width());
        block.lse.resize(rows * config_.num_heads);
        block.attention.resize(rows * config_.attention_width());
        block.residual_mid.resize(rows * C);
        block.ffn_rstd.resize(rows);
        block.ffn_norm_out.resize(rows * C);
        block.gate_up.resize(rows * 2 * F);
        block.swiglu.resize(rows * F);
    }
    final_residual_.resize(rows * C), final_rstd_.resize(rows), hidden_.resize(rows * C);
    logits_.resize(chunk_rows(rows) * config_.vocab_size), losses_.resize(rows);
    d_.residual.resize(rows * C), d_.norm_out.resize(rows * C);
    d_.swiglu.resize(rows * F), d_.gate_up.resize(rows * 2 * F);
    d_.attention.resize(rows * config_.attention_width()), d_.qkv.resize(rows * config_.qkv_width());
}

// As the constructor has it.
template <class Real>
double ReferenceModel<Real>::planned_bytes(const ModelConfig& c, int max_batch, int64_t max_T) {
    const int64_t rows = max_batch * max_T, C = c.width, F = c.ffn_width;
    const int64_t attention = c.qkv_width() + c.attention_width();
    const int64_t of_block = 4 * C + 2 + attention + c.num_heads + 3 * F, of_ends = 4 * C + 2 + attention + 3 * F;
    const int64_t num_elements = 4 * make_parameter_table(c).num_elements() +
                                 rows * (c.num_layers * of_block + of_ends) +
                                 chunk_rows(rows, c.vocab_size) * c.vocab_size;
    return (double)num_elements * sizeof(Real) + 2.0 * (double)rows * sizeof(int32_t);
}

template <class Real>
double ReferenceModel<Real>::peak_memory_gib() const {
    size_t num_elements = 4 * weights_.size() + final_residual_.size() + final_rstd_.size() + hidden_.size() +
                          logits_.size() + losses_.size() + d_.residual.size() + d_.norm_out.size() + d_.swiglu.size() +
                          d_.gate_up.size() + d_.attention.size() + d_.qkv.size();
    size_t num_indices = tokens_.size() + targets_.size();
    for (const BlockActivations<Real>& block : blocks_) {
        const LighthouseState<Real>& lighthouse = block.lighthouse;
        num_elements += block.residual_in.size() + block.attention_rstd.size() + block.attention_norm_out.size() +
                        block.qkv.size() + block.lse.size() + block.attention.size() + block.residual_mid.size() +
                        block.ffn_rstd.size() + block.ffn_norm_out.size() + block.gate_up.size() + block.swiglu.size() +
                        lighthouse.q.size() + lighthouse.k.size() + lighthouse.v.size() + lighthouse.out.size() +
                        lighthouse.lse.size();
        num_indices += lighthouse.entries.size() + lighthouse.positions.size();
    }
    return (double)(num_elements * sizeof(Real) + num_indices * sizeof(int32_t)) / (double)((int64_t)1 << 30);
}

// ---- the step ----------------------------------------------------------------------------------
template <class Real>
void ReferenceModel<Real>::begin_step(int64_t) {
    std::fill(gradients_.begin(), gradients_.end(), Real(0));
    step_loss_ = 0.0;
}

template <class Real>
void ReferenceModel<Real>::accumulate_gradients(const int32_t* tokens, int B, int64_t T, double loss_weight) {
    const Batch batch = take_columns(tokens, B, T);
    forward(batch);
    backward(batch, loss_weight);
}

template <class Real>
StepResult ReferenceModel<Real>::update(const AdamWSettings& settings) {
    StepResult result;
    result.loss = step_loss_;
    result.grad_norm = grad_norm(gradients_.data(), (int64_t)gradients_.size());
    // As float32 holds them, for the trainer on the GPU has them so.
    result.skipped = !std::isfinite((float)result.loss) || !std::isfinite((float)result.grad_norm);
    if (result.skipped) {
        result.first_bad_tensor = first_bad_tensor();
        return result;
    }
    for (size_t i = 0; i < table_.tensors.size(); ++i) {
        adamw_update(weights_.data() + offsets_[i], exp_avg_.data() + offsets_[i], exp_avg_sq_.data() + offsets_[i],
                     gradients_.data() + offsets_[i], result.grad_norm, result.loss, table_.tensors[i].num_elements(),
                     settings.with_decay(table_.tensors[i].decay));
    }
    return result;
}

template <class Real>
std::string ReferenceModel<Real>::first_bad_tensor() {
    if (!std::isfinite(step_loss_)) {
        return "loss";
    }
    for (size_t i = 0; i < table_.tensors.size(); ++i) {
        if (!std::isfinite(grad_norm(gradient((int)i), table_.tensors[i].num_elements()))) {
            return table_.tensors[i].name;
        }
    }
    return "the norm of all gradients";
}

// ---- forward -----------------------------------------------------------------------------------
// Leaves the final norm's output, the hidden state of every token, in hidden_.
template <class Real>
void ReferenceModel<Real>::forward(const Batch& batch) {
    const int64_t rows = batch.rows();
    const int C = config_.width;
    embedding_forward(blocks_[0].residual_in.data(), tokens_.data(), weight(table_.embedding), rows, C);
    for (int l = 0; l < config_.num_layers; ++l) {
        forward_block(l, batch);
    }
    rmsnorm_forward(hidden_.data(), final_rstd_.data(), final_residual_.data(), weight(table_.final_norm), rows, C,
                    config_.norm_eps);
}

// From block l's residual_in to the residual_in of the next, or final_residual_.
template <class Real>
void ReferenceModel<Real>::forward_block(int l, const Batch& batch) {
    BlockActivations<Real>& block = blocks_[l];
    const LayerParameters& p = table_.layers[l];
    std::vector<Real>& residual_out = l + 1 < config_.num_layers ? blocks_[l + 1].residual_in : final_residual_;
    const int64_t rows = batch.rows();
    const int C = config_.width, F = config_.ffn_width;
    const int attention_width = config_.attention_width(), qkv_width = config_.qkv_width();

    rmsnorm_forward(block.attention_norm_out.data(), block.attention_rstd.data(), block.residual_in.data(),
                    weight(p.attention_norm), rows, C, config_.norm_eps);
    gemm_forward(block.qkv.data(), block.attention_norm_out.data(), weight(p.qkv), rows, qkv_width, C, false);
    rope_forward(block.qkv.data(), batch.B, batch.T, config_.num_heads + config_.num_kv_heads, qkv_width,
                 config_.head_dim, inverse_frequencies_, 0);
    attention_forward_layer(l, batch);
    std::copy_n(block.residual_in.data(), rows * C, block.residual_mid.data());
    gemm_forward(block.residual_mid.data(), block.attention.data(), weight(p.attention_out), rows, C, attention_width,
                 true);

    rmsnorm_forward(block.ffn_norm_out.data(), block.ffn_rstd.data(), block.residual_mid.data(), weight(p.ffn_norm),
                    rows, C, config_.norm_eps);
    gemm_forward(block.gate_up.data(), block.ffn_norm_out.data(), weight(p.gate_up), rows, 2 * F, C, false);
    swiglu_forward(block.swiglu.data(), block.gate_up.data(), rows, F);
    std::copy_n(block.residual_mid.data(), rows * C, residual_out.data());
    gemm_forward(residual_out.data(), block.swiglu.data(), weight(p.down), rows, C, F, true);
}

// ---- backward ----------------------------------------------------------------------------------
template <class Real>
void ReferenceModel<Real>::backward(const Batch& batch, double loss_weight) {
    const int64_t rows = batch.rows();
    const int C = config_.width;
    classifier_forward_backward(losses_.data(), d_.norm_out.data(), gradient(table_.classifier), logits_.data(),
                                hidden_.data(), weight(table_.classifier), targets_.data(), rows, config_.vocab_size, C,
                                chunk_rows(rows), loss_weight / (double)rows);
    step_loss_ += loss_weight * mean_loss(losses_.data(), rows);
    rmsnorm_backward(d_.residual.data(), gradient(table_.final_norm), (const Real*)nullptr, d_.norm_out.data(),
                     final_residual_.data(), weight(table_.final_norm), final_rstd_.data(), rows, C);
    for (int l = config_.num_layers - 1; l >= 0; --l) {
        backward_block(l, batch);
    }
    embedding_backward(gradient(table_.embedding), d_.residual.data(), tokens_.data(), rows, C);
}

// d_.residual: from the gradient of the block's output to that of its input.
template <class Real>
void ReferenceModel<Real>::backward_block(int l, const Batch& batch) {
    const BlockActivations<Real>& block = blocks_[l];
    const LayerParameters& p = table_.layers[l];
    const int64_t rows = batch.rows();
    const int C = config_.width, F = config_.ffn_width;
    const int attention_width = config_.attention_width(), qkv_width = config_.qkv_width();

    gemm_backward_weight(gradient(p.down), d_.residual.data(), block.swiglu.data(), rows, C, F, true);
    gemm_backward_input(d_.swiglu.data(), d_.residual.data(), weight(p.down), rows, C, F, false);
    swiglu_backward(d_.gate_up.data(), d_.swiglu.data(), block.gate_up.data(), rows, F);
    gemm_backward_weight(gradient(p.gate_up), d_.gate_up.data(), block.ffn_norm_out.data(), rows, 2 * F, C, true);
    gemm_backward_input(d_.norm_out.data(), d_.gate_up.data(), weight(p.gate_up), rows, 2 * F, C, false);
    rmsnorm_backward(d_.residual.data(), gradient(p.ffn_norm), d_.residual.data(), d_.norm_out.data(),
                     block.residual_mid.data(), weight(p.ffn_norm), block.ffn_rstd.data(), rows, C);

    gemm_backward_weight(gradient(p.attention_out), d_.residual.data(), block.attention.data(), rows, C,
                         attention_width, true);
    gemm_backward_input(d_.attention.data(), d_.residual.data(), weight(p.attention_out), rows, C, attention_width,
                        false);
    attention_backward_layer(l, batch);
    rope_backward(d_.qkv.data(), batch.B, batch.T, config_.num_heads + config_.num_kv_heads, qkv_width,
                  config_.head_dim, inverse_frequencies_, 0);
    gemm_backward_weight(gradient(p.qkv), d_.qkv.data(), block.attention_norm_out.data(), rows, qkv_width, C, true);
    gemm_backward_input(d_.norm_out.data(), d_.qkv.data(), weight(p.qkv), rows, qkv_width, C, false);
    rmsnorm_backward(d_.residual.data(), gradient(p.attention_norm), d_.residual.data(), d_.norm_out.data(),
                     block.residual_in.data(), weight(p.attention_norm), block.attention_rstd.data(), rows, C);
}

// ---- attention ---------------------------------------------------------------------------------
template <class Real>
AttentionShape ReferenceModel<Real>::attention_shape(const Batch& batch) const {
    AttentionShape shape;
    shape.B = batch.B;
    shape.H = config_.num_heads;
    shape.Hkv = config_.num_kv_heads;
    shape.D = config_.head_dim;
    shape.Tq = shape.Tk = batch.T;
    shape.scale = 1.0 / std::sqrt((double)config_.head_dim);
    return shape;
}

template <class Real>
void ReferenceModel<Real>::attention_forward_layer(int l, const Batch& batch) {
    BlockActivations<Real>& block = blocks_[l];
    const int64_t width = config_.attention_width();
    const QkvViews<const Real> in(block.qkv.data(), config_, batch.T);
    const View<Real> out(block.attention.data(), batch.T * width, width, config_.head_dim);
    const AttentionShape shape = attention_shape(batch);
    if (uses_lighthouse(l)) {
        lighthouse_forward<Real>(out, block.lighthouse, in.q, in.k, in.v, shape.B, shape.H, shape.Hkv, shape.D,
                                 (Real)shape.scale, lighthouse_, make_lighthouse_geometry(batch.T, lighthouse_));
    } else {
        attention_forward<Real>(out, block.lse.data(), in.q, in.k, in.v, shape);
    }
}

template <class Real>
void ReferenceModel<Real>::attention_backward_layer(int l, const Batch& batch) {
    const BlockActivations<Real>& block = blocks_[l];
    const int64_t width = config_.attention_width();
    const QkvViews<const Real> in(block.qkv.data(), config_, batch.T);
    const QkvViews<Real> din(d_.qkv.data(), config_, batch.T);
    const View<const Real> out(block.attention.data(), batch.T * width, width, config_.head_dim);
    const View<const Real> dout(d_.attention.data(), batch.T * width, width, config_.head_dim);
    const AttentionShape shape = attention_shape(batch);
    if (uses_lighthouse(l)) {
        lighthouse_backward<Real>(din.q, din.k, din.v, dout, block.lighthouse, shape.B, shape.H, shape.Hkv, shape.D,
                                  (Real)shape.scale, make_lighthouse_geometry(batch.T, lighthouse_));
    } else {
        attention_backward<Real>(din.q, din.k, din.v, dout, in.q, in.k, in.v, out, block.lse.data(), shape);
    }
}

// ---- tokens ------------------------------------------------------------------------------------
// inputs, and targets unless null: B rows of T, row_stride apart.
template <class Real>
typename ReferenceModel<Real>::Batch ReferenceModel<Real>::take_tokens(const int32_t* inputs, const int32_t* targets,
                                                                       int64_t row_stride, int B, int64_t T) {
    CHECK(B >= 1 && T >= 1 && B <= max_batch_ && T <= max_T_,
          "a batch of %d sequences of %lld tokens: memory was planned for at most %d of %lld", B, (long long)T,
          max_batch_, (long long)max_T_);
    check_tokens(inputs, targets, row_stride, B, T, config_.vocab_size);
    const auto take = [&](int32_t* taken, const int32_t* rows) {
        for (int b = 0; b < B; ++b) {
            std::copy_n(rows + b * row_stride, T, taken + b * T);
        }
    };
    take(tokens_.data(), inputs);
    if (targets != nullptr) {
        take(targets_.data(), targets);
    }
    return {B, T};
}

// ---- evaluation and sampling -------------------------------------------------------------------
// Leaves the loss of every token in losses_.
template <class Real>
void ReferenceModel<Real>::forward_losses(const Batch& batch) {
    forward(batch);
    const int64_t rows = batch.rows();
    classifier_loss(losses_.data(), logits_.data(), hidden_.data(), weight(table_.classifier), targets_.data(), rows,
                    config_.vocab_size, config_.width, chunk_rows(rows));
}

template <class Real>
double ReferenceModel<Real>::evaluate(const int32_t* tokens, int B, int64_t T) {
    const Batch batch = take_columns(tokens, B, T);
    forward_losses(batch);
    return mean_loss(losses_.data(), batch.rows());
}

template <class Real>
void ReferenceModel<Real>::token_losses(float* losses, const int32_t* inputs, const int32_t* targets, int B,
                                        int64_t T) {
    forward_losses(take_tokens(inputs, targets, T, B, T));
    std::copy_n(losses_.data(), B * T, losses);
}

template <class Real>
void ReferenceModel<Real>::next_token_logits(const int32_t* tokens, int64_t T, float* logits) {
    forward(take_tokens(tokens, nullptr, T, 1, T));
    const int64_t V = config_.vocab_size, C = config_.width;
    gemm_forward(logits_.data(), hidden_.data() + (T - 1) * C, weight(table_.classifier), 1, V, C, false);
    std::copy_n(logits_.data(), V, logits);
}

template <class Real>
void ReferenceModel<Real>::all_logits(Real* logits, const int32_t* tokens, int B, int64_t T) {
    const Batch batch = take_tokens(tokens, nullptr, T, B, T);
    forward(batch);
    gemm_forward(logits, hidden_.data(), weight(table_.classifier), batch.rows(), config_.vocab_size, config_.width,
                 false);
}

// ---- state -------------------------------------------------------------------------------------
template <class Real>
void ReferenceModel<Real>::read_state(StateKind kind, int tensor, float* out) {
    std::copy_n(state(kind).data() + offsets_[tensor], table_.tensors[tensor].num_elements(), out);
}
template <class Real>
void ReferenceModel<Real>::write_state(StateKind kind, int tensor, const float* in) {
    std::copy_n(in, table_.tensors[tensor].num_elements(), state(kind).data() + offsets_[tensor]);
}
template <class Real>
void ReferenceModel<Real>::read_gradient(int tensor, float* out) {
    std::copy_n(gradient(tensor), table_.tensors[tensor].num_elements(), out);
}

}  // namespace reference
