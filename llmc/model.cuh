// model.cuh: THE STEP on the GPU: forward, backward and update, in order of execution, one launcher a line; the
// backward is the forward's list reversed. What every pointer is: model_memory.cuh.
//
// Precision: storage bf16 (residual stream too), float32 accumulation in every product, gradients of weights
// accumulated in float32, statistics (norms, log-sum-exp, loss) float32, AdamW on float32 master weights. Asynchrony:
// everything is enqueued on one stream, which waits for those of offloading and of transfers between ranks. The host
// waits in update(), evaluate(), token_losses() and next_token_logits() for their results; and in
// accumulate_gradients() for the token copy of two micro-batches before, for the search of products' algorithms when a
// shape is met first, and, with several ranks, for other hosts (comm.cuh). With
// settings.cuda_graphs a micro-batch's launches, always the same, are replayed as one (micro_batch_graph.cuh). Order of
// additions into a gradient: micro-batches as they come; a tied embedding first gets the classifier's part, chunk by
// chunk, then the embedding's. With settings.deterministic a step repeats bit for bit; without it the attention
// backward may differ, and between runs all products, as the algorithms of the first step's search are chosen by the
// clock.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "embedding.cuh"          // rows of the table
#include "fit.cuh"                // whether the plan fits
#include "fused_gemm.cuh"         // products and what follows them
#include "micro_batch_graph.cuh"  // launches replayed
#include "model_memory.cuh"       // settings, buffers, plan
#include "offload.cuh"            // what lives in host memory
#include "profile.cuh"            // times of the step's stages
#include "rope.cuh"               // rotary positions
#include "swiglu.cuh"             // feed-forward gate
#include "transfer_profile.cuh"   // transfers between ranks, and what hides them
#include "trainable_model.h"      // the interface of the training loop

class GpuModel : public TrainableModel {
  public:
    // Plans, holds the plan against the current device's free memory, allocates. Weights are zero until write_state()
    // sets them.
    // comms: of settings.mesh, when that has several ranks; it outlives the model. Then all ranks make the same calls,
    // but for evaluate, which those of a sequence make, and next_token_logits, which is any rank's own.
    GpuModel(const ModelConfig& config, const GpuModelSettings& settings, Communicators* comms = nullptr);

    const ModelConfig& config() const override { return config_; }
    const ParameterTable& parameters() const override { return table_; }
    // What next_token_logits takes: what fits on this rank alone.
    int64_t max_sequence_length() const override { return settings_.local_seq_len(); }
    double peak_memory_gib() const override { return plan_.num_bytes() / BYTES_PER_GIB; }
    void enter_thread() override { CUDA_CHECK(cudaSetDevice(device_)); }
    // Micro-batches so far whose launches were replayed.
    int64_t num_graph_replays() const {
        int64_t sum = 0;
        for (const auto& of_attention : graphs_) {
            sum += of_attention[0].num_replays() + of_attention[1].num_replays();
        }
        return sum;
    }
    // Times of the training steps so far, with settings.profile; else empty.
    std::string profile_table() const { return settings_.profile ? profile_.table() + transfers_.table() : ""; }
    void set_attention(AttentionMode mode) override;

    void begin_step(int64_t num_micro_batches = 1) override;
    void accumulate_gradients(const int32_t* tokens, int B, int64_t T, double loss_weight) override;
    StepResult update(const AdamWSettings& settings) override;

    double evaluate(const int32_t* tokens, int B, int64_t T) override;
    void token_losses(float* losses, const int32_t* inputs, const int32_t* targets, int B, int64_t T) override;
    void next_token_logits(const int32_t* tokens, int64_t T, float* logits) override;

    void gather_state(StateKind kind) override;
    void read_state(StateKind kind, int tensor, float* out) override;
    void write_state(StateKind kind, int tensor, const float* in) override;
    std::vector<StatePiece> state_pieces(int tensor) const override;
    void read_state_piece(StateKind kind, int tensor, const StatePiece& piece, float* out) override;
    void write_state_piece(StateKind kind, int tensor, const StatePiece& piece, const float* in) override;
    void read_gradient(int tensor, float* out) override;

  private:
    // The micro-batch at hand: what this rank holds of it.
    struct Batch {
        int B;
        int64_t T;
        bool shared;                 // with other ranks: T tokens of each sequence are here
        ContextPartition partition;  // of a sequence
        bool keeps_inputs = false;   // a backward follows, which reads the inputs of blocks
        int64_t rows() const { return B * T; }
    };
    // Token copies: the host fills one of two while the other is on its way.
    struct TokenStage {
        PinnedMemory<int32_t> tokens;
        CudaEvent copied;
    };

    Batch upload(const int32_t* inputs, const int32_t* targets, int64_t row_stride, int B, int64_t T, bool shared);
    Batch upload_columns(const int32_t* tokens, int B, int64_t T) {  // of [B, T + 1]
        return upload(tokens, tokens + 1, T + 1, B, T, context_ != nullptr);
    }
    void forward(const Batch& batch);
    void forward_losses(const Batch& batch);
    void forward_block(int l, const Batch& batch, bf16* residual_out);
    void recompute_block(int l, const Batch& batch);
    void backward(const Batch& batch, double loss_weight);
    void backward_block(int l, const Batch& batch);
    void set_profiling(bool on) {
        profiling_ = on;
        transfers_.record(on);
    }
    // With settings.profile: what is enqueued from here on belongs to this stage of the step.
    void stage(const char* name) {
        if (profiling_) {
            profile_.mark(pass_, name, stream_);
        }
    }
    void qkv_forward(int l, const Batch& batch);
    RopeRotation rope_rotation(const Batch& batch) const;
    void attention_forward(int l, const Batch& batch);
    void attention_output_again(int l, const Batch& batch);
    void attention_backward(int l, const Batch& batch);
    void reduce_gradients_after(int layer);
    void update_parameters(const AdamWSettings& settings);
    void write_weights(bf16* to, const float* masters, int64_t num_elements);
    std::string first_bad_tensor(double loss);
    bool is_bad_tensor(int tensor);

    // Whether forward and backward enqueue the same each time, on this stream alone, and it can be captured.
    bool replays_launches() const {
        return captures_launches_ && settings_.cuda_graphs && comms_ == nullptr && !inputs_ && !settings_.profile;
    }
    bool uses_lighthouse(int l) const {
        return attention_ == AttentionMode::lighthouse && settings_.lighthouse->applies_to(l, config_.num_layers);
    }
    const BlockActivations& block_activations(int l) const {
        return uses_lighthouse(l) ? buffers_.lighthouse_blocks[l] : buffers_.dense_blocks[l];
    }
    KeptActivations kept_activations_of(int l) const {
        return kept_activations(settings_.recompute,
                                uses_lighthouse(l) ? AttentionMode::lighthouse : AttentionMode::dense);
    }
    LighthouseShape lighthouse_shape_of(const Batch& batch) const {
        return lighthouse_shape(config_, *settings_.lighthouse, settings_.mesh, batch.B, batch.partition.T);
    }
    bf16* weight(int tensor) const { return buffers_.weights + layout_.offsets[tensor]; }
    float* gradient(int tensor) const { return buffers_.gradients + layout_.offsets[tensor]; }
    // What of a tensor's piece of the state lies in one place.
    struct StatePart {
        float* at;
        bool on_host;
        int64_t begin, num_elements;  // in the piece
    };
    std::vector<StatePart> state_parts(StateKind kind, int tensor, const StatePiece& piece) const;
    int64_t state_offset(int tensor, int64_t begin) const;
    void wait();
    void read_floats(float* out, const float* device, int64_t num_elements);

    ModelConfig config_;
    GpuModelSettings settings_;
    int device_ = 0;  // the GPU that all of this is on
    ParameterTable table_;
    ParameterLayout layout_;
    int64_t num_resident_;  // elements of the optimizer's state that are on the GPU, the first; all but with --offload
    RopeFrequencies rope_;
    CudaStream stream_;
    ModelBuffers buffers_;
    MemoryPlan plan_;
    std::unique_ptr<Gemm> gemm_;
    std::unique_ptr<InputOffload> inputs_;              // with --offload of activations
    std::unique_ptr<OptimizerOffload> host_optimizer_;  // with --offload of the optimizer
    const Communicators* comms_;                        // null: one rank
    std::unique_ptr<ZeroOptimizer> zero_;               // of several ranks
    std::unique_ptr<ContextAttention> context_;         // of several ranks that share sequences
    std::unique_ptr<LighthouseContext> lighthouse_context_;
    AttentionMode attention_ = AttentionMode::dense;
    bool first_micro_batch_ = true;      // of the step: it writes the gradients of the blocks' matrices, later ones add
    int64_t micro_batches_left_ = 0;     // of the step
    std::optional<StateKind> gathered_;  // what the arena of gradients holds between two steps instead of them
    bool gradients_are_whole_ = false;   // rather than this rank's slices of their sum
    StepProfile profile_;
    TransferProfile transfers_;  // of several ranks
    bool profiling_ = false;     // inside a training step with settings.profile
    StepPass pass_ = StepPass::forward;
    const bool captures_launches_ = MicroBatchGraph::captures_launches();
    // Under each attention of a step's first micro-batch, and of the others.
    std::array<std::array<MicroBatchGraph, 2>, 2> graphs_;
    std::array<TokenStage, 2> stages_;
    int next_stage_ = 0;
    PinnedMemory<float> results_;  // [2]: what update() and evaluate() wait for
};

// ---- construction ------------------------------------------------------------------------------
inline GpuModel::GpuModel(const ModelConfig& config, const GpuModelSettings& settings, Communicators* comms)
    : config_(config),
      settings_(settings),
      table_(make_parameter_table(config)),
      layout_(make_parameter_layout(table_, settings.mesh.size())),
      num_resident_(resident_state_elements(layout_, settings)),
      rope_(make_rope_frequencies(config)),
      comms_(comms) {
    CHECK((settings.mesh.size() > 1) == (comms != nullptr), "a model on %d ranks: communicators are %s",
          settings.mesh.size(), comms == nullptr ? "missing" : "for several");
    CUDA_CHECK(cudaGetDevice(&device_));
    plan_buffers(plan_, buffers_, config_, layout_, settings_);
    size_t free_bytes, total_bytes;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    check_fits(plan_, free_memory(settings_, counted_as_free(settings_, free_bytes)), config_, settings_);
    if (comms != nullptr) {  // or a rank would divide what a host has left after another has taken its share
        comms->barrier("check of memory");
    }
    plan_.allocate();
    if (settings.peer_copies) {
        DeviceRange landing;
        if (settings.sums_by_copies()) {
            landing = {reinterpret_cast<std::byte*>(buffers_.gradient_parts),
                       zero_landing_elements(*layout_.zero) * sizeof(float)};
        }
        comms->share_memory(plan_.device_ranges(), landing);
    }
    if (offloads_inputs(settings.offload)) {
        inputs_ = std::make_unique<InputOffload>(buffers_.input_slots, buffers_.host_inputs);
    }
    if (num_resident_ < layout_.state_elements()) {
        host_optimizer_ =
            std::make_unique<OptimizerOffload>(buffers_.host_state, num_resident_, layout_.num_elements,
                                               buffers_.optimizer_chunks, settings.optimizer_chunk_elements);
    }
    for (TokenStage& stage : stages_) {
        stage.tokens = PinnedMemory<int32_t>(2 * settings.max_rows());
    }
    results_ = PinnedMemory<float>(2);
    gemm_ = std::make_unique<Gemm>(buffers_.gemm_workspace, GEMM_WORKSPACE_BYTES);
    if (comms != nullptr) {
        zero_ = std::make_unique<ZeroOptimizer>(comms->world(), *layout_.zero);
    }
    if (settings.mesh.context_parallel > 1) {
        const AttentionShape largest =
            dense_attention_shape(config_, settings.max_batch_size, settings.local_seq_len());
        context_ = make_context_attention(comms->context(), context_exchange(settings, largest));
        if (settings.lighthouse) {
            const AttentionShape inner = lighthouse_context_inner_shape(lighthouse_shape(
                config_, *settings.lighthouse, settings.mesh, settings.max_batch_size, settings.max_seq_len));
            lighthouse_context_ =
                std::make_unique<LighthouseContext>(comms->context(), context_exchange(settings, inner));
        }
    }
    if (settings.profile) {
        if (zero_) {
            zero_->set_profile(&transfers_);
        }
        if (context_) {
            context_->set_profile(&transfers_, "dense attention");
        }
        if (lighthouse_context_) {
            lighthouse_context_->set_profile(&transfers_, "Lighthouse attention");
        }
    }
}

inline void GpuModel::set_attention(AttentionMode mode) {
    CHECK(mode == AttentionMode::dense || settings_.lighthouse,
          "Lighthouse attention: memory was planned for a model that is dense throughout (--attention dense)");
    attention_ = mode;
}

// ---- the step ----------------------------------------------------------------------------------
inline void GpuModel::begin_step(int64_t num_micro_batches) {
    NVTX_RANGE();
    first_micro_batch_ = true;
    micro_batches_left_ = num_micro_batches;
    gathered_.reset();
    gradients_are_whole_ = false;
    // The first micro-batch writes the gradients of the blocks' matrices; the others' are added to. Padding too: after
    // a step that was not finite it is NaN.
    auto zero = [&](float* begin, int64_t num_elements) {
        CUDA_CHECK(cudaMemsetAsync(begin, 0, num_elements * sizeof(float), stream_));
    };
    zero(buffers_.gradients + layout_.num_decayed, layout_.num_elements - layout_.num_decayed);
    if (table_.classifier != table_.embedding) {
        zero(gradient(table_.classifier), layout_.sizes[table_.classifier]);
    }
    zero(buffers_.step_results, 2);
}

inline void GpuModel::accumulate_gradients(const int32_t* tokens, int B, int64_t T, double loss_weight) {
    NVTX_RANGE();
    Batch batch = upload_columns(tokens, B, T);
    batch.keeps_inputs = true;
    micro_batches_left_ -= 1;
    // A training batch's shape comes again and again, so its products are worth a search: it happens when they are met
    // for the first time. Its choice depends on the clock, so a deterministic run goes without.
    gemm_->set_search(!settings_.deterministic);
    set_profiling(settings_.profile);
    const auto enqueue = [&] {
        forward(batch);
        // Sums over ranks are means: every rank has as many tokens of the step.
        backward(batch, loss_weight / settings_.mesh.size());
    };
    if (replays_launches()) {
        graphs_[(size_t)attention_][first_micro_batch_ ? 0 : 1].run({B, T, loss_weight}, stream_, enqueue);
    } else {
        enqueue();
    }
    stage(nullptr);
    set_profiling(false);
    gemm_->set_search(false);
    first_micro_batch_ = false;
}

inline StepResult GpuModel::update(const AdamWSettings& settings) {
    NVTX_RANGE();
    const ModelBuffers& m = buffers_;
    float* const step_loss = m.step_results;
    float* const norm = m.step_results + 1;
    set_profiling(settings_.profile);
    pass_ = StepPass::update;
    stage("gradient norm");
    if (zero_) {
        CHECK(micro_batches_left_ == 0, "a step of several ranks: %lld micro-batches are missing",
              (long long)micro_batches_left_);
        zero_->grad_norm(norm, step_loss, m.gradients, m.grad_norm_scratch, stream_);
        stage("AdamW and weights of all ranks");
    } else {
        grad_norm(norm, m.gradients, layout_.num_elements, m.grad_norm_scratch, stream_);
        stage("AdamW");
    }
    update_parameters(settings);
    stage(nullptr);
    set_profiling(false);

    read_floats(results_.data(), m.step_results, 2);
    if (settings_.profile) {
        profile_.end_step();
        transfers_.end_step();
    }
    StepResult result;
    result.loss = results_.data()[0];
    result.grad_norm = results_.data()[1];
    result.skipped = !std::isfinite(result.loss) || !std::isfinite(result.grad_norm);
    if (result.skipped) {
        result.first_bad_tensor = first_bad_tensor(result.loss);
    }
    return result;
}

inline void GpuModel::update_parameters(const AdamWSettings& settings) {
    const ModelBuffers& m = buffers_;
    const float *const loss = m.step_results, *const norm = m.step_results + 1;
    if (zero_) {
        zero_->update(m.weights, m.state.master, m.state.exp_avg, m.state.exp_avg_sq, m.gradients, norm, loss, settings,
                      stream_);
        return;
    }
    auto update_range = [&](int64_t begin, int64_t end, bool decays) {
        if (begin < end) {
            adamw_update(m.state.master + begin, m.state.exp_avg + begin, m.state.exp_avg_sq + begin, m.weights + begin,
                         m.gradients + begin, norm, loss, end - begin, settings.with_decay(decays), stream_);
        }
    };
    const int64_t num_decayed = std::min(layout_.num_decayed, num_resident_);
    update_range(0, num_decayed, true);
    update_range(num_decayed, num_resident_, false);
    if (host_optimizer_) {
        host_optimizer_->update(m.weights, m.gradients, norm, loss, settings, layout_.num_decayed, stream_);
    }
}

// ---- forward -----------------------------------------------------------------------------------
// Leaves the final norm's output, the hidden state of every token, in norm_out.
inline void GpuModel::forward(const Batch& batch) {
    NVTX_RANGE();
    const ModelBuffers& m = buffers_;
    const int64_t rows = batch.rows();
    const int C = config_.width;
    const float eps = (float)config_.norm_eps;
    pass_ = StepPass::forward;
    const BlockActivations& first = block_activations(0);
    stage("embedding");
    embedding_forward(first.residual_in, m.tokens, weight(table_.embedding), rows, C, stream_);
    stage("norms");
    rmsnorm_forward(first.attention_norm_out, first.attention_rstd, first.residual_in,
                    weight(table_.layers[0].attention_norm), rows, C, eps, stream_);
    for (int l = 0; l < config_.num_layers; ++l) {
        const bool last = l + 1 == config_.num_layers;
        if (inputs_ && batch.keeps_inputs) {
            inputs_->end_write(l, rows * C, stream_);
        }
        bf16* const residual_out = last ? m.final_residual : block_activations(l + 1).residual_in;
        forward_block(l, batch, residual_out);
        bf16* const norm_out = last ? m.norm_out : block_activations(l + 1).attention_norm_out;
        float* const rstd = last ? m.final_rstd : block_activations(l + 1).attention_rstd;
        const int norm = last ? table_.final_norm : table_.layers[l + 1].attention_norm;
        stage("norms");
        rmsnorm_forward(norm_out, rstd, residual_out, weight(norm), rows, C, eps, stream_);
    }
}

// residual_out (=) [rows, C], the block's output, from its input and the attention norm's output. The products that end
// attention and feed-forward add the residual stream to theirs.
inline void GpuModel::forward_block(int l, const Batch& batch, bf16* residual_out) {
    NVTX_RANGE();
    const BlockActivations& block = block_activations(l);
    const LayerParameters& p = table_.layers[l];
    const int64_t rows = batch.rows();
    const int C = config_.width, F = config_.ffn_width;
    qkv_forward(l, batch);
    attention_forward(l, batch);
    stage("output product");
    gemm_->forward(block.residual_mid, block.attention, weight(p.attention_out), block.residual_in, rows, C,
                   config_.attention_width(), stream_);
    stage("norms");
    rmsnorm_forward(block.ffn_norm_out, block.ffn_rstd, block.residual_mid, weight(p.ffn_norm), rows, C,
                    (float)config_.norm_eps, stream_);
    stage("gate and up product, gate");
    gated_product(block.gate_up, block.swiglu, block.ffn_norm_out, weight(p.gate_up), rows, F, C, *gemm_, stream_);
    if (inputs_ && batch.keeps_inputs) {
        stage("wait for copies");
        inputs_->begin_write(l + 1, stream_);
    }
    stage("down product");
    gemm_->forward(residual_out, block.swiglu, weight(p.down), block.residual_mid, rows, C, F, stream_);
}

// What the forward did not keep of a block, again from what it kept: the same kernels, so the same bits. Where that
// includes feed-forward, its norm's output is left there.
inline void GpuModel::recompute_block(int l, const Batch& batch) {
    NVTX_RANGE();
    const BlockActivations& block = block_activations(l);
    const LayerParameters& p = table_.layers[l];
    const int64_t rows = batch.rows();
    const int C = config_.width, F = config_.ffn_width;
    pass_ = StepPass::recompute;
    const KeptActivations kept = kept_activations_of(l);
    const bool needs_qkv = !uses_lighthouse(l) || !kept.attention_state;
    if (needs_qkv && !kept.qkv) {
        stage("norms");
        rmsnorm_recompute(block.attention_norm_out, block.residual_in, weight(p.attention_norm), block.attention_rstd,
                          rows, C, stream_);
        qkv_forward(l, batch);
    }
    if (!kept.attention_state) {
        attention_forward(l, batch);
    } else if (!kept.attention) {
        attention_output_again(l, batch);
    }
    if (!kept.feed_forward) {
        stage("output product");
        gemm_->forward(block.residual_mid, block.attention, weight(p.attention_out), block.residual_in, rows, C,
                       config_.attention_width(), stream_);
        stage("norms");
        rmsnorm_recompute(block.ffn_norm_out, block.residual_mid, weight(p.ffn_norm), block.ffn_rstd, rows, C, stream_);
        stage("gate and up product, gate");
        gated_product(block.gate_up, block.swiglu, block.ffn_norm_out, weight(p.gate_up), rows, F, C, *gemm_, stream_);
    }
}

// ---- backward ----------------------------------------------------------------------------------
inline void GpuModel::backward(const Batch& batch, double loss_weight) {
    NVTX_RANGE();
    const ModelBuffers& m = buffers_;
    const int64_t rows = batch.rows();
    const int C = config_.width;
    pass_ = StepPass::backward;
    stage("classifier");
    const float dloss = (float)(loss_weight / (double)rows);
    classifier_forward_backward({m.losses, m.dhidden, gradient(table_.classifier), m.logits, m.norm_out,
                                 weight(table_.classifier), m.tokens + rows, dloss, m.classifier_scratch},
                                classifier_shape(config_, settings_, rows), *gemm_, stream_);
    mean_loss(m.step_results, m.losses, rows, (float)loss_weight, m.mean_loss_scratch, stream_);
    stage("norms");
    rmsnorm_backward(m.dresidual, gradient(table_.final_norm), nullptr, nullptr, m.dhidden, m.final_residual,
                     weight(table_.final_norm), m.final_rstd, m.rmsnorm_scratch, rows, C, stream_);
    reduce_gradients_after(config_.num_layers);
    for (int l = config_.num_layers - 1; l >= 0; --l) {
        if (inputs_) {
            stage("wait for copies");
            inputs_->begin_read(l, stream_);
        }
        recompute_block(l, batch);
        backward_block(l, batch);
        if (inputs_) {
            inputs_->end_read(l, rows * C, stream_);
        }
        reduce_gradients_after(l);
    }
    stage("embedding");
    embedding_backward(gradient(table_.embedding), m.dresidual, m.tokens, m.embedding_scratch, rows, C,
                       config_.vocab_size, stream_);
    reduce_gradients_after(-1);
}

// With several ranks, in the last micro-batch: what is final now is summed beside the rest of the backward.
inline void GpuModel::reduce_gradients_after(int layer) {
    if (zero_ && micro_batches_left_ == 0) {
        zero_->reduce_gradients_after(layer, buffers_.gradients, stream_);
    }
}

// dresidual: from the gradient of the block's output to that of its input. recompute_block has been called. A norm's
// backward comes between the two products behind the norm: where the norm's output was not kept it writes it again, and
// the weight's gradient reads it.
inline void GpuModel::backward_block(int l, const Batch& batch) {
    NVTX_RANGE();
    const ModelBuffers& m = buffers_;
    const BlockActivations& block = block_activations(l);
    const LayerParameters& p = table_.layers[l];
    const int64_t rows = batch.rows();
    const int C = config_.width, F = config_.ffn_width;
    const int attention_width = config_.attention_width(), qkv_width = config_.qkv_width();
    const bool add = !first_micro_batch_;
    const KeptActivations kept = kept_activations_of(l);

    pass_ = StepPass::backward;
    stage("down product, gate");
    bf16* const dgate_up = block.gate_up;  // in place: gate_up is needed no more
    gated_product_backward(dgate_up, m.dswiglu, !kept.norms_and_gate, m.dresidual, weight(p.down), block.gate_up, rows,
                           F, C, *gemm_, stream_);
    const bf16* const swiglu = kept.norms_and_gate ? block.swiglu : m.dswiglu;
    stage("down product");
    gemm_->backward_weight(gradient(p.down), m.dresidual, swiglu, rows, C, F, add, stream_);
    stage("gate and up product");
    gemm_->backward_input(m.dffn_norm_out, dgate_up, weight(p.gate_up), rows, 2 * F, C, stream_);
    stage("norms");
    // Without feed-forward, recompute_block has left it there.
    bf16* const missing_ffn_norm_out = kept.feed_forward && !kept.norms_and_gate ? block.ffn_norm_out : nullptr;
    rmsnorm_backward(m.dresidual, gradient(p.ffn_norm), missing_ffn_norm_out, m.dresidual, m.dffn_norm_out,
                     block.residual_mid, weight(p.ffn_norm), block.ffn_rstd, m.rmsnorm_scratch, rows, C, stream_);
    stage("gate and up product");
    gemm_->backward_weight(gradient(p.gate_up), dgate_up, block.ffn_norm_out, rows, 2 * F, C, add, stream_);

    stage("output product");
    gemm_->backward_weight(gradient(p.attention_out), m.dresidual, block.attention, rows, C, attention_width, add,
                           stream_);
    gemm_->backward_input(m.dattention, m.dresidual, weight(p.attention_out), rows, C, attention_width, stream_);
    attention_backward(l, batch);
    stage("qkv product");
    gemm_->backward_input(m.dattention_norm_out, m.dqkv, weight(p.qkv), rows, qkv_width, C, stream_);
    stage("norms");
    bf16* const missing_attention_norm_out = kept.norms_and_gate ? nullptr : block.attention_norm_out;
    rmsnorm_backward(m.dresidual, gradient(p.attention_norm), missing_attention_norm_out, m.dresidual,
                     m.dattention_norm_out, block.residual_in, weight(p.attention_norm), block.attention_rstd,
                     m.rmsnorm_scratch, rows, C, stream_);
    stage("qkv product");
    gemm_->backward_weight(gradient(p.qkv), m.dqkv, block.attention_norm_out, rows, qkv_width, C, add, stream_);
}

// ---- attention ---------------------------------------------------------------------------------
// The three parts of packed rows [B T, (H + 2 Hkv) D].
template <class Element>
struct QkvViews {
    HeadView<Element> q, k, v;
    QkvViews(Element* qkv, const ModelConfig& config, int64_t T) {
        const int64_t width = config.qkv_width(), D = config.head_dim;
        const int64_t k_begin = config.num_heads * D, v_begin = k_begin + config.num_kv_heads * D;
        q = {qkv, T * width, width, D};
        k = {qkv + k_begin, T * width, width, D};
        v = {qkv + v_begin, T * width, width, D};
    }
};
// Rows [B T, H D].
template <class Element>
HeadView<Element> head_view(Element* rows, const ModelConfig& config, int64_t T) {
    const int64_t width = config.attention_width();
    return {rows, T * width, width, config.head_dim};
}

// A rank that shares sequences holds two chunks of each.
inline RopeRotation GpuModel::rope_rotation(const Batch& batch) const {
    const ContextPartition& p = batch.partition;
    return {rope_, p.halves() == 1
                       ? rope_one_run(batch.T)
                       : RopePositions{batch.T, p.chunk_rows(), {p.first_position(0), p.first_position(1)}}};
}
inline void GpuModel::qkv_forward(int l, const Batch& batch) {
    const RopeRotation rotation = rope_rotation(batch);
    stage("qkv product, rotation");
    const BlockActivations& block = block_activations(l);
    rotated_product(block.qkv, block.attention_norm_out, weight(table_.layers[l].qkv),
                    {config_.head_dim, config_.num_heads + config_.num_kv_heads, rotation}, batch.rows(),
                    config_.qkv_width(), config_.width, *gemm_, stream_);
}

inline void GpuModel::attention_forward(int l, const Batch& batch) {
    const BlockActivations& block = block_activations(l);
    const QkvViews<const bf16> in(block.qkv, config_, batch.T);
    const HeadView<bf16> out = head_view(block.attention, config_, batch.T);
    stage(uses_lighthouse(l) ? "Lighthouse attention" : "dense attention");
    if (uses_lighthouse(l) && batch.shared) {
        lighthouse_context_->forward(out, block.lighthouse, in.q, in.k, in.v, buffers_.lighthouse_forward_scratch,
                                     lighthouse_shape_of(batch), stream_);
    } else if (uses_lighthouse(l)) {
        lighthouse_forward(out, block.lighthouse, in.q, in.k, in.v, buffers_.lighthouse_forward_scratch,
                           lighthouse_shape_of(batch), stream_);
    } else if (batch.shared) {
        context_->forward(out, block.lse, in.q, in.k, in.v, buffers_.context_forward_scratch,
                          dense_attention_shape(config_, batch.B, batch.T), stream_);
    } else {
        flash_attention_forward(out, block.lse, in.q, in.k, in.v, dense_attention_shape(config_, batch.B, batch.T),
                                stream_);
    }
}

// Of a Lighthouse layer, from what its forward saved.
inline void GpuModel::attention_output_again(int l, const Batch& batch) {
    const BlockActivations& block = block_activations(l);
    stage("Lighthouse attention");
    const HeadView<bf16> out = head_view(block.attention, config_, batch.T);
    if (batch.shared) {
        lighthouse_context_->output_again(out, block.lighthouse, lighthouse_shape_of(batch), stream_);
    } else {
        lighthouse_output_again(out, block.lighthouse, lighthouse_shape_of(batch), stream_);
    }
}

// m.dqkv (=) the gradient of the qkv product: dq and dk come turned back by attention itself or, of dense attention
// whose ranks share sequences, are turned back afterwards, which rounds them once more: ring and gather sum dk over
// ranks first, and exchanging heads brings them home first.
inline void GpuModel::attention_backward(int l, const Batch& batch) {
    const ModelBuffers& m = buffers_;
    const RopeRotation rotation = rope_rotation(batch);
    const BlockActivations& block = block_activations(l);
    const QkvViews<bf16> din(m.dqkv, config_, batch.T);
    const HeadView<const bf16> dout = head_view(m.dattention, config_, batch.T);
    stage(uses_lighthouse(l) ? "Lighthouse attention" : "dense attention");
    if (uses_lighthouse(l) && batch.shared) {
        lighthouse_context_->backward(din.q, din.k, din.v, dout, block.lighthouse, m.lighthouse_backward_scratch,
                                      lighthouse_shape_of(batch), settings_.deterministic, stream_, &rotation);
    } else if (uses_lighthouse(l)) {
        lighthouse_backward(din.q, din.k, din.v, dout, block.lighthouse, m.lighthouse_backward_scratch,
                            lighthouse_shape_of(batch), settings_.deterministic, stream_, &rotation);
    } else {
        const QkvViews<const bf16> in(block.qkv, config_, batch.T);
        const HeadView<const bf16> out = head_view(block.attention, config_, batch.T);
        const AttentionShape shape = dense_attention_shape(config_, batch.B, batch.T);
        if (batch.shared) {
            context_->backward(din.q, din.k, din.v, dout, in.q, in.k, in.v, out, block.lse, m.attention_scratch, shape,
                               settings_.deterministic, stream_);
        } else {
            flash_attention_backward(din.q, din.k, din.v, dout, in.q, in.k, in.v, out, block.lse, m.attention_scratch,
                                     shape, settings_.deterministic, stream_, &rotation);
        }
    }
    if (batch.shared && !uses_lighthouse(l)) {
        stage("rotation");
        rope_backward(m.dqkv, batch.rows(), config_.num_heads + config_.num_kv_heads, config_.qkv_width(),
                      config_.head_dim, rotation.frequencies, rotation.positions, stream_);
    }
}

// ---- tokens ------------------------------------------------------------------------------------
// inputs, and targets unless null: host, B rows of T, row_stride apart. Enqueues the copy to m.tokens of what this rank
// holds of them, all or, when they are shared with other ranks, two chunks of each sequence: inputs, then targets.
inline GpuModel::Batch GpuModel::upload(const int32_t* inputs, const int32_t* targets, int64_t row_stride, int B,
                                        int64_t T, bool shared) {
    NVTX_RANGE();
    const int64_t max_T = shared ? settings_.max_seq_len : settings_.local_seq_len();
    CHECK(B >= 1 && B <= settings_.max_batch_size && T >= (shared ? max_T : 1) && T <= max_T,
          "a batch of %d sequences of %lld tokens: memory was planned for at most %d of %s%lld", B, (long long)T,
          settings_.max_batch_size, shared ? "exactly " : "at most ", (long long)max_T);
    check_tokens(inputs, targets, row_stride, B, T, config_.vocab_size);
    const ContextPartition partition =
        shared ? make_context_partition(T, settings_.mesh.context_parallel, settings_.mesh.context_rank())
               : ContextPartition{1, 0, T};
    const Batch batch{B, partition.local_rows(), shared, partition};
    TokenStage& stage = stages_[next_stage_];
    next_stage_ = 1 - next_stage_;
    CUDA_CHECK(cudaEventSynchronize(stage.copied));
    const auto fill = [&](int32_t* staged, const int32_t* rows) {
        for (int b = 0; b < B; ++b) {
            const int32_t* const row = rows + b * row_stride;
            for (int half = 0; half < partition.halves(); ++half) {
                std::copy_n(row + partition.first_position(half), partition.chunk_rows(),
                            staged + b * batch.T + half * partition.chunk_rows());
            }
        }
    };
    fill(stage.tokens.data(), inputs);
    if (targets != nullptr) {
        fill(stage.tokens.data() + batch.rows(), targets);
    }
    const int64_t num_tokens = (targets != nullptr ? 2 : 1) * batch.rows();
    CUDA_CHECK(cudaMemcpyAsync(buffers_.tokens, stage.tokens.data(), num_tokens * sizeof(int32_t),
                               cudaMemcpyHostToDevice, stream_));
    CUDA_CHECK(cudaEventRecord(stage.copied, stream_));
    return batch;
}

// ---- evaluation and sampling -------------------------------------------------------------------
// Leaves the loss of every token in losses.
inline void GpuModel::forward_losses(const Batch& batch) {
    const ModelBuffers& m = buffers_;
    forward(batch);
    const int64_t rows = batch.rows();
    classifier_loss(m.losses, m.logits, m.norm_out, weight(table_.classifier), m.tokens + rows,
                    classifier_shape(config_, settings_, rows), *gemm_, stream_);
}

inline double GpuModel::evaluate(const int32_t* tokens, int B, int64_t T) {
    NVTX_RANGE();
    const ModelBuffers& m = buffers_;
    const Batch batch = upload_columns(tokens, B, T);
    forward_losses(batch);
    CUDA_CHECK(cudaMemsetAsync(m.eval_loss, 0, sizeof(float), stream_));
    mean_loss(m.eval_loss, m.losses, batch.rows(), 1.0f / (float)settings_.mesh.context_parallel, m.mean_loss_scratch,
              stream_);
    if (batch.shared) {
        comms_->context().all_reduce_sum(m.eval_loss, 1, "loss of a sequence", stream_);
    }
    read_floats(results_.data(), m.eval_loss, 1);
    return results_.data()[0];
}

inline void GpuModel::token_losses(float* losses, const int32_t* inputs, const int32_t* targets, int B, int64_t T) {
    NVTX_RANGE();
    CHECK(context_ == nullptr, "losses of tokens: no rank has those of a sequence that is shared with others");
    forward_losses(upload(inputs, targets, T, B, T, false));
    read_floats(losses, buffers_.losses, B * T);
}

inline void GpuModel::next_token_logits(const int32_t* tokens, int64_t T, float* logits) {
    NVTX_RANGE();
    const ModelBuffers& m = buffers_;
    forward(upload(tokens, nullptr, T, 1, T, false));
    const int64_t V = config_.vocab_size, C = config_.width;
    gemm_->forward(m.logits, m.norm_out + (T - 1) * C, weight(table_.classifier), nullptr, 1,
                   classifier_padded_vocab(V), C, stream_);
    std::vector<bf16> last_row(V);
    CUDA_CHECK(cudaMemcpyAsync(last_row.data(), m.logits, V * sizeof(bf16), cudaMemcpyDeviceToHost, stream_));
    wait();
    std::transform(last_row.begin(), last_row.end(), logits, [](bf16 logit) { return __bfloat162float(logit); });
}

// ---- state -------------------------------------------------------------------------------------
// Where, in the optimizer's arrays, the piece of a tensor is that begins there.
inline int64_t GpuModel::state_offset(int tensor, int64_t begin) const {
    if (!zero_) {
        return layout_.offsets[tensor] + begin;
    }
    for (const ZeroPiece& piece : layout_.zero->pieces(tensor, settings_.mesh.rank)) {
        if (piece.tensor_begin == begin) {
            return piece.shard_begin;
        }
    }
    fail("rank %d holds no state of tensor %s from element %lld on", settings_.mesh.rank,
         table_.tensors[tensor].name.c_str(), (long long)begin);
}
inline std::vector<GpuModel::StatePart> GpuModel::state_parts(StateKind kind, int tensor,
                                                              const StatePiece& piece) const {
    const int64_t begin = state_offset(tensor, piece.begin), end = begin + piece.num_elements;
    const int64_t border = std::clamp(num_resident_, begin, end);
    std::vector<StatePart> parts;
    if (begin < border) {
        parts.push_back({buffers_.state.of(kind) + begin, false, 0, border - begin});
    }
    if (border < end) {
        parts.push_back({buffers_.host_state.of(kind) + (border - num_resident_), true, border - begin, end - border});
    }
    return parts;
}
inline std::vector<StatePiece> GpuModel::state_pieces(int tensor) const {
    const int64_t num_elements = table_.tensors[tensor].num_elements();
    if (!zero_) {
        return {{0, num_elements}};
    }
    std::vector<StatePiece> pieces;
    for (const ZeroPiece& piece : layout_.zero->pieces(tensor, settings_.mesh.rank)) {
        if (piece.tensor_begin < num_elements) {  // behind that is padding
            pieces.push_back({piece.tensor_begin, std::min(piece.num_elements, num_elements - piece.tensor_begin)});
        }
    }
    return pieces;
}

// Waits for what is enqueued. Throws when a transfer between ranks has failed.
inline void GpuModel::wait() {
    const cudaError_t status = cudaStreamSynchronize(stream_);
    if (comms_ != nullptr) {
        comms_->check();
    }
    CUDA_CHECK(status);
}
inline void GpuModel::read_floats(float* out, const float* device, int64_t num_elements) {
    CUDA_CHECK(cudaMemcpyAsync(out, device, num_elements * sizeof(float), cudaMemcpyDeviceToHost, stream_));
    wait();
}

inline void GpuModel::gather_state(StateKind kind) {
    if (zero_) {
        zero_->gather_state(buffers_.gradients, buffers_.state.of(kind), stream_);
        gathered_ = kind;
    }
}
inline void GpuModel::read_state(StateKind kind, int tensor, float* out) {
    CHECK(!zero_ || gathered_ == kind, "the state of several ranks must be gathered before it is read");
    const int64_t num_elements = table_.tensors[tensor].num_elements();
    if (zero_) {
        read_floats(out, gradient(tensor), num_elements);
    } else {
        read_state_piece(kind, tensor, {0, num_elements}, out);
    }
}
inline void GpuModel::read_state_piece(StateKind kind, int tensor, const StatePiece& piece, float* out) {
    for (const StatePart& part : state_parts(kind, tensor, piece)) {
        if (part.on_host) {
            host_optimizer_->wait();
            std::copy_n(part.at, part.num_elements, out + part.begin);
        } else {
            read_floats(out + part.begin, part.at, part.num_elements);
        }
    }
}
inline void GpuModel::read_gradient(int tensor, float* out) {
    CHECK(!gathered_, "the gradients of this step are gone: their memory holds gathered state");
    if (zero_ && !gradients_are_whole_) {
        zero_->gather_slices(buffers_.gradients, stream_);
        gradients_are_whole_ = true;
    }
    read_floats(out, gradient(tensor), table_.tensors[tensor].num_elements());
}
inline void GpuModel::write_state_piece(StateKind kind, int tensor, const StatePiece& piece, const float* in) {
    const int64_t num_elements = piece.num_elements;
    for (const StatePart& part : state_parts(kind, tensor, piece)) {
        const float* const from = in + part.begin;
        if (part.on_host) {
            host_optimizer_->wait();
#pragma omp parallel for schedule(static)
            for (int64_t i = 0; i < part.num_elements; ++i) {
                part.at[i] = from[i];
            }
        } else {
            CUDA_CHECK(
                cudaMemcpyAsync(part.at, from, part.num_elements * sizeof(float), cudaMemcpyHostToDevice, stream_));
            CUDA_CHECK(cudaStreamSynchronize(stream_));
        }
    }
    if (kind == StateKind::master) {
        write_weights(weight(tensor) + piece.begin, in, num_elements);
    }
}
// to (=) on the device, num_elements masters rounded. All threads: models of billions of parameters start with it.
inline void GpuModel::write_weights(bf16* to, const float* masters, int64_t num_elements) {
    const std::unique_ptr<bf16[]> rounded(new bf16[num_elements]);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < num_elements; ++i) {
        rounded[i] = __float2bfloat16(masters[i]);
    }
    CUDA_CHECK(cudaMemcpyAsync(to, rounded.get(), num_elements * sizeof(bf16), cudaMemcpyHostToDevice, stream_));
    CUDA_CHECK(cudaStreamSynchronize(stream_));
}
inline void GpuModel::write_state(StateKind kind, int tensor, const float* in) {
    gathered_.reset();
    if (zero_ && kind == StateKind::master) {  // weights are whole on every rank
        write_weights(weight(tensor), in, table_.tensors[tensor].num_elements());
    }
    for (const StatePiece& piece : state_pieces(tensor)) {
        write_state_piece(kind, tensor, piece, in + piece.begin);
    }
}

// After a skipped step, so it may take its time: a norm a tensor.
inline std::string GpuModel::first_bad_tensor(double loss) {
    if (!std::isfinite(loss)) {
        return "loss";
    }
    const int num_tensors = (int)table_.tensors.size();
    std::vector<float> bad(num_tensors);
    for (int i = 0; i < num_tensors; ++i) {
        bad[i] = is_bad_tensor(i) ? 1.0f : 0.0f;
        if (bad[i] != 0.0f && !zero_) {
            return table_.tensors[i].name;
        }
    }
    if (zero_) {  // every rank has looked at its slices
        float* const flags = reinterpret_cast<float*>(buffers_.grad_norm_scratch);
        CUDA_CHECK(cudaMemcpyAsync(flags, bad.data(), num_tensors * sizeof(float), cudaMemcpyHostToDevice, stream_));
        comms_->world().all_reduce_sum(flags, num_tensors, "search for what is not finite", stream_);
        read_floats(bad.data(), flags, num_tensors);
        const auto first = std::find_if(bad.begin(), bad.end(), [](float flag) { return flag > 0.0f; });
        if (first != bad.end()) {
            return table_.tensors[first - bad.begin()].name;
        }
    }
    return "the norm of all gradients";
}

// Whether what this rank holds of a tensor's gradient is not finite.
inline bool GpuModel::is_bad_tensor(int tensor) {
    float* const norm = buffers_.step_results + 1;
    for (const StatePiece& piece : state_pieces(tensor)) {
        grad_norm(norm, gradient(tensor) + piece.begin, piece.num_elements, buffers_.grad_norm_scratch, stream_);
        read_floats(results_.data(), norm, 1);
        if (!std::isfinite(results_.data()[0])) {
            return true;
        }
    }
    return false;
}
