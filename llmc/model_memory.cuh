// model_memory.cuh: every buffer of the GPU model: settings that decide sizes, what a recompute mode keeps, the plan.
// One plan serves dense and Lighthouse attention of one run: what a block keeps for the one and for the other shares
// memory. Where ranks share sequences, T is what one of them holds of each. Notation: rows = B T of a micro-batch, Vp =
// V rounded up to a multiple of 64 (rows V..Vp-1 of the embedding and the classifier are zero and stay zero: their
// gradients are).
#pragma once
#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "adamw.cuh"               // weights are updated
#include "classifier.cuh"          // chunk and scratch sizes
#include "config.h"                // Recompute
#include "embedding_backward.cuh"  // scratch size
#include "flash_attention.cuh"     // scratch size of the backward
#include "gemm.cuh"                // workspace size
#include "grad_norm.cuh"           // scratch size
#include "lighthouse.cuh"          // sizes of its three areas
#include "lighthouse_context.cuh"  // the same over several ranks
#include "memory.cuh"              // the plan
#include "model_config.h"          // the model's shape
#include "offload.cuh"             // sizes of what stays on the GPU of what does not
#include "parameters.h"            // the table of tensors
#include "rmsnorm.cuh"             // scratch size of the backward
#include "zero.cuh"                // shards of the optimizer's state

// ---- settings ----------------------------------------------------------------------------------
struct GpuModelSettings {
    int max_batch_size = 1;      // B, sequences in a micro-batch
    int64_t max_seq_len = 1024;  // T
    Recompute recompute = Recompute::none;
    Offload offload = Offload::none;
    // Of AdamW's state offloaded: elements that are on the GPU all the same (resident_state_that_fits), a multiple of
    // 64 or more than there are, and at a time of the others.
    int64_t resident_state_elements = 0, optimizer_chunk_elements = OPTIMIZER_CHUNK_ELEMENTS;
    bool deterministic = false;
    bool cuda_graphs = false;           // replay what a micro-batch enqueues, where that is always the same
    bool profile = false;               // time the stages of training steps
    int64_t classifier_chunk_rows = 0;  // rows whose logits exist at once; 0: as many as fit CLASSIFIER_CHUNK_BYTES
    // Lighthouse attention, in the layers it applies to; without it every layer is always dense.
    std::optional<LighthouseConfig> lighthouse;
    // With Lighthouse: whether steps under dense attention are trained too (the second stage), not only evaluated.
    bool trains_dense = true;
    // Several GPUs: this rank's place among them, and how attention reaches over the ranks that share a sequence.
    ParallelMesh mesh;
    ContextExchange context_exchange = ContextExchange::automatic;
    bool by_nccl = false;      // several ranks, which take memory for it
    bool peer_copies = false;  // large transfers go into memory that GPUs of a host share
    // Bytes of GPU and host that this rank may use, of what is free; 0: all. Ranks of one host divide what it has.
    size_t gpu_memory = 0, host_memory = 0;
    size_t free_at_start = 0;  // of the GPU, when it was opened (counted_as_free); 0: it was not looked at
    int ranks_on_host = 1;
    std::map<std::string, int> in_memory_groups;  // of these ranks, those that share a limit (available_host_bytes)

    // Gradients are summed so only where all ranks share a host.
    bool sums_by_copies() const { return peer_copies && ranks_on_host == mesh.size(); }
    int64_t local_seq_len() const { return max_seq_len / mesh.context_parallel; }
    int64_t max_rows() const { return max_batch_size * local_seq_len(); }
};
inline GpuModelSettings gpu_model_settings(const RunConfig& c, const ParallelMesh& mesh = ParallelMesh()) {
    GpuModelSettings settings;
    settings.mesh = mesh;
    settings.context_exchange = c.context_exchange;
    settings.by_nccl = mesh.size() > 1 && c.comm_transport != CommTransport::host;
    settings.peer_copies = mesh.size() > 1 && c.comm_transport == CommTransport::automatic;
    settings.max_batch_size = c.batch_size;
    settings.max_seq_len = c.seq_len;
    settings.recompute = c.recompute;
    settings.offload = c.offload;
    settings.deterministic = c.deterministic;
    settings.cuda_graphs = c.cuda_graphs;
    settings.profile = c.profile;
    settings.classifier_chunk_rows = c.classifier_chunk_rows;
    settings.gpu_memory = (size_t)std::ceil(c.gpu_memory * BYTES_PER_GIB);
    settings.host_memory = (size_t)std::ceil(c.host_memory * BYTES_PER_GIB);
    if (c.attention == AttentionMode::lighthouse) {
        settings.lighthouse = c.lighthouse;
        settings.trains_dense = c.lighthouse_steps >= 0 && c.lighthouse_steps < c.max_steps;
    }
    return settings;
}

// What the forward keeps of a block for the backward, beside the block's input and the norms' statistics, which are
// always kept. What is not kept lies in one buffer that all blocks share, and is computed again from what is.
struct KeptActivations {
    bool qkv;
    bool attention_state;  // dense: the log-sum-exp; Lighthouse: its saved area
    bool attention;        // attention's output
    bool feed_forward;     // residual_mid, its input, and gate_up
    bool norms_and_gate;   // the norms' outputs and swiglu
};
// The backward of a Lighthouse layer reads its saved area and no q, k, v; its output is one cheap pass over that area.
inline KeptActivations kept_activations(Recompute mode, AttentionMode attention) {
    const bool dense = attention == AttentionMode::dense, all = mode == Recompute::none;
    const bool products = all || mode == Recompute::norms_and_gate, attention_result = mode != Recompute::block;
    return {products && dense, attention_result, dense ? attention_result : products, products, all};
}

// ---- parameters --------------------------------------------------------------------------------
// Where each tensor of the table lies in the arenas of weights and gradients: the tensors with weight decay first, so
// that AdamW is two launches. On one rank the optimizer's arenas have the same layout; several hold a shard each.
struct ParameterLayout {
    std::vector<int64_t> offsets;  // of each tensor, in elements
    std::vector<int64_t> sizes;    // of each tensor, padding included
    int64_t num_decayed = 0;       // elements [0, num_decayed) have weight decay
    int64_t num_elements = 0;
    std::optional<ZeroLayout> zero;  // of several ranks

    int64_t state_elements() const { return zero ? zero->shard_elements() : num_elements; }
};
// The same tensors where num_ranks hold a shard of the optimizer's state each.
inline void shard_parameter_layout(ParameterLayout& layout, const ParameterTable& table, int num_ranks) {
    std::vector<ZeroTensor> tensors;
    for (size_t i = 0; i < table.tensors.size(); ++i) {
        tensors.push_back({layout.sizes[i], table.tensors[i].decay, -1});
    }
    // Norms are small: their gradients go with the embedding's.
    for (int l = 0; l < (int)table.layers.size(); ++l) {
        const LayerParameters& p = table.layers[l];
        for (const int tensor : {p.qkv, p.attention_out, p.gate_up, p.down}) {
            tensors[tensor].final_after = l;
        }
    }
    if (table.classifier != table.embedding) {
        tensors[table.classifier].final_after = (int)table.layers.size();
    }
    layout.zero = make_zero_layout(tensors, num_ranks);
    layout.offsets = layout.zero->offsets;
    layout.num_elements = layout.num_decayed = layout.zero->num_elements;
    for (const ZeroBucket& bucket : layout.zero->buckets) {
        if (!bucket.decay) {
            layout.num_decayed = std::min(layout.num_decayed, bucket.begin);
        }
    }
}
inline ParameterLayout make_parameter_layout(const ParameterTable& table, int num_ranks = 1) {
    constexpr int64_t alignment = BUFFER_ALIGNMENT / sizeof(bf16);
    ParameterLayout layout;
    layout.offsets.resize(table.tensors.size());
    layout.sizes.resize(table.tensors.size());
    for (bool decay : {true, false}) {
        for (size_t i = 0; i < table.tensors.size(); ++i) {
            const ParameterTensor& tensor = table.tensors[i];
            if (tensor.decay != decay) {
                continue;
            }
            const bool has_vocabulary_rows = (int)i == table.embedding || (int)i == table.classifier;
            const int64_t rows = has_vocabulary_rows ? classifier_padded_vocab(tensor.rows) : tensor.rows;
            layout.offsets[i] = layout.num_elements;
            layout.sizes[i] = round_up(rows * tensor.cols, alignment);
            layout.num_elements += layout.sizes[i];
        }
        if (decay) {
            layout.num_decayed = layout.num_elements;
        }
    }
    if (num_ranks > 1) {
        shard_parameter_layout(layout, table, num_ranks);
    }
    return layout;
}

// ---- buffers -----------------------------------------------------------------------------------
struct BlockActivations {
    bf16* residual_in;         // [rows, C]
    float* attention_rstd;     // [rows]
    bf16* attention_norm_out;  // [rows, C]
    bf16* qkv;                 // [rows, (H + 2 Hkv) D], q and k rotated
    bf16* attention;           // [rows, H D]
    float* lse;                // [B, H, T] of dense attention
    std::byte* lighthouse;     // lighthouse_saved_bytes of Lighthouse attention
    bf16* residual_mid;        // [rows, C] between attention and feed-forward
    float* ffn_rstd;           // [rows]
    bf16* ffn_norm_out;        // [rows, C]
    bf16* gate_up;             // [rows, 2 F]
    bf16* swiglu;              // [rows, F]
};

struct ModelBuffers {
    // live across steps: one element each of ParameterLayout
    bf16* weights;
    OptimizerArrays state, host_state;  // with --offload the last elements are in host memory
    float* gradients;
    // --offload: of the GPU the places where blocks' inputs are in turn, [rows, C] each, and the inputs of the first
    // blocks in host memory; AdamW's state on its way, [2, 3, chunk]
    std::vector<bf16*> input_slots, host_inputs;
    float* optimizer_chunks;
    // kept from forward to backward, of each block: under dense attention, and under Lighthouse where it can switch
    std::vector<BlockActivations> dense_blocks, lighthouse_blocks;
    BlockActivations shared;  // what the blocks do not keep
    bf16* final_residual;     // [rows, C]
    float* final_rstd;        // [rows]
    // inputs and results
    int32_t* tokens;      // [2, rows]: inputs, then targets
    float* losses;        // [rows]
    float* step_results;  // [2]: the step's loss, the gradient's norm
    float* eval_loss;     // [1]
    // workspace, always
    std::byte* gemm_workspace;
    std::byte* rmsnorm_scratch;
    std::byte* mean_loss_scratch;
    bf16* norm_out;   // [rows, C] of whichever norm came last, among those that no block keeps
    bf16* dresidual;  // [rows, C] gradient of the residual stream
    // workspace of the forward, and of recomputing
    std::byte* lighthouse_forward_scratch;
    std::byte* context_forward_scratch;
    // workspace of the classifier
    bf16* dhidden;  // [rows, C]
    bf16* logits;   // [chunk, Vp], then their gradient
    std::byte* classifier_scratch;
    // workspace of the backward of feed-forward
    bf16* dswiglu;          // [rows, F], then swiglu again, where blocks do not keep it
    bf16* dffn_norm_out;    // [rows, C]
    float* gradient_parts;  // of other ranks, on their way into sums
    // workspace of the backward of attention
    bf16* dqkv;        // [rows, (H + 2 Hkv) D]
    bf16* dattention;  // [rows, H D]
    std::byte* attention_scratch;
    std::byte* lighthouse_backward_scratch;
    bf16* dattention_norm_out;  // [rows, C]
    // workspace at the ends of the backward
    std::byte* embedding_scratch;
    std::byte* grad_norm_scratch;
};

// ---- the plan ----------------------------------------------------------------------------------
inline AttentionShape dense_attention_shape(const ModelConfig& config, int B, int64_t T) {
    AttentionShape shape;
    shape.B = B;
    shape.H = config.num_heads;
    shape.Hkv = config.num_kv_heads;
    shape.D = config.head_dim;
    shape.Tq = shape.Tk = T;
    shape.scale = (float)(1.0 / std::sqrt((double)config.head_dim));
    return shape;
}

// How the ranks that share a sequence exchange rows: one way for all batches, as scratch is planned once.
inline ContextExchange context_exchange(const GpuModelSettings& settings, const AttentionShape& largest) {
    const bool automatic = settings.context_exchange == ContextExchange::automatic;
    return automatic ? choose_ring_or_gather(largest) : settings.context_exchange;
}
inline std::unique_ptr<ContextAttentionPlan> context_attention_plan(const GpuModelSettings& settings,
                                                                    const AttentionShape& largest) {
    return make_context_attention_plan(settings.mesh.context_parallel, settings.mesh.context_rank(),
                                       context_exchange(settings, largest));
}

// Of a batch of B sequences of T tokens, or of this rank's chunks of them. The geometry must be legal for T.
inline LighthouseShape lighthouse_shape(const ModelConfig& config, const LighthouseConfig& lighthouse,
                                        const ParallelMesh& mesh, int B, int64_t T) {
    const LighthouseShape whole =
        make_lighthouse_shape(make_lighthouse_geometry(T, lighthouse), lighthouse, B, config.num_heads,
                              config.num_kv_heads, config.head_dim, dense_attention_shape(config, B, T).scale);
    return mesh.context_parallel == 1
               ? whole
               : make_lighthouse_chunk_shape(whole, lighthouse, mesh.context_parallel, mesh.context_rank());
}

// Of a batch of `rows`. Its chunks are no larger than those of the largest batch, which memory is planned for.
inline ClassifierShape classifier_shape(const ModelConfig& config, const GpuModelSettings& settings, int64_t rows) {
    const int64_t asked = settings.classifier_chunk_rows;
    const int64_t chunk_rows = asked > 0 ? asked : classifier_chunk_rows(settings.max_rows(), config.vocab_size);
    return {rows, config.vocab_size, config.width, std::min(chunk_rows, rows)};
}

// One activation of all blocks: a buffer for each block that keeps it, one for all blocks that do not.
template <class Member>
struct BlockActivation {
    Member member;  // of BlockActivations
    const char* name;
    const char* shape;
    int64_t num_elements;
    bool is_shared = false;  // by some blocks

    void add_block(MemoryPlan& plan, BlockActivations& block, bool kept, BlockActivations& shared) {
        if (kept) {
            plan.add(&(block.*member), MemoryUse::activations, name, shape, num_elements);
        } else {
            is_shared = true;
            plan.add_alias(&(block.*member), &(shared.*member));
        }
    }
    void add_shared(MemoryPlan& plan, BlockActivations& shared) const {
        if (is_shared) {
            plan.add(&(shared.*member), MemoryUse::workspace, std::string(name) + ", of one block", shape,
                     num_elements);
        }
    }
};
template <class Member>
BlockActivation(Member, const char*, const char*, int64_t) -> BlockActivation<Member>;

// How many elements of AdamW's state, from the first on, are on the GPU.
inline int64_t resident_state_elements(const ParameterLayout& layout, const GpuModelSettings& settings) {
    const int64_t all = layout.state_elements();
    return offloads_optimizer(settings.offload) ? std::min(settings.resident_state_elements, all) : all;
}

// Adds every buffer of a model to the plan.
inline void plan_buffers(MemoryPlan& plan, ModelBuffers& m, const ModelConfig& config, const ParameterLayout& layout,
                         const GpuModelSettings& settings) {
    const int64_t rows = settings.max_rows(), C = config.width, F = config.ffn_width;
    const int64_t attention_width = config.attention_width(), qkv_width = config.qkv_width();
    const int64_t num_parameters = layout.num_elements;
    const AttentionShape dense_shape = dense_attention_shape(config, settings.max_batch_size, settings.local_seq_len());
    std::unique_ptr<ContextAttentionPlan> context;
    if (settings.mesh.context_parallel > 1) {
        context = context_attention_plan(settings, dense_shape);
    }
    std::optional<LighthouseShape> lighthouse;
    if (settings.lighthouse && settings.lighthouse->num_lighthouse_layers(config.num_layers) > 0) {
        lighthouse = lighthouse_shape(config, *settings.lighthouse, settings.mesh, settings.max_batch_size,
                                      settings.max_seq_len);
    }
    const char* const optimizer_shape = layout.zero ? "[parameters / ranks] float32" : "[parameters] float32";
    size_t lighthouse_saved_size = 0, lighthouse_forward_size = 0, lighthouse_backward_size = 0;
    if (lighthouse && context) {
        const auto inner = context_attention_plan(settings, lighthouse_context_inner_shape(*lighthouse));
        lighthouse_saved_size = lighthouse_context_saved_bytes(*lighthouse);
        lighthouse_forward_size = lighthouse_context_forward_scratch_bytes(*inner, *lighthouse);
        lighthouse_backward_size =
            lighthouse_context_backward_scratch_bytes(*inner, *lighthouse, settings.deterministic);
    } else if (lighthouse) {
        lighthouse_saved_size = lighthouse_saved_bytes(*lighthouse);
        lighthouse_forward_size = lighthouse_forward_scratch_bytes(*lighthouse);
        lighthouse_backward_size = lighthouse_backward_scratch_bytes(*lighthouse, settings.deterministic);
    }
    plan.add(&m.weights, MemoryUse::weights, "weights", "[parameters] bf16", num_parameters);
    const int64_t on_host = layout.state_elements() - resident_state_elements(layout, settings);
    const auto add_state = [&](OptimizerArrays& arrays, MemoryUse use, const char* shape, int64_t num_elements) {
        plan.add(&arrays.master, use, "master weights", shape, num_elements);
        plan.add(&arrays.exp_avg, use, "exp_avg", shape, num_elements);
        plan.add(&arrays.exp_avg_sq, use, "exp_avg_sq", shape, num_elements);
    };
    add_state(m.state, MemoryUse::optimizer, on_host == 0 ? optimizer_shape : "[first parameters] float32",
              layout.state_elements() - on_host);
    add_state(m.host_state, MemoryUse::host_optimizer, "[other parameters] float32", on_host);
    plan.add(&m.optimizer_chunks, MemoryUse::optimizer, "optimizer state on its way", "[2, 3, chunk] float32",
             on_host > 0 ? optimizer_offload_elements(settings.optimizer_chunk_elements) : 0);
    plan.add(&m.gradients, MemoryUse::gradients, "gradients", "[parameters] float32", num_parameters);

    // Activations of the blocks.
    using Block = BlockActivations;
    BlockActivation residual_in{&Block::residual_in, "block input", "[B T, C] bf16", rows * C};
    BlockActivation attention_rstd{&Block::attention_rstd, "attention_rstd", "[B T] float32", rows};
    BlockActivation attention_norm_out{&Block::attention_norm_out, "attention_norm_out", "[B T, C] bf16", rows * C};
    BlockActivation qkv{&Block::qkv, "qkv", "[B T, (H + 2 Hkv) D] bf16", rows * qkv_width};
    BlockActivation attention{&Block::attention, "attention", "[B T, H D] bf16", rows * attention_width};
    BlockActivation lse{&Block::lse, "lse", "[B, H, T] float32", rows * config.num_heads};
    BlockActivation lighthouse_saved{&Block::lighthouse, "Lighthouse rows", "bytes", (int64_t)lighthouse_saved_size};
    BlockActivation residual_mid{&Block::residual_mid, "residual_mid", "[B T, C] bf16", rows * C};
    BlockActivation ffn_rstd{&Block::ffn_rstd, "ffn_rstd", "[B T] float32", rows};
    BlockActivation ffn_norm_out{&Block::ffn_norm_out, "ffn_norm_out", "[B T, C] bf16", rows * C};
    BlockActivation gate_up{&Block::gate_up, "gate_up", "[B T, 2 F] bf16", rows * 2 * F};
    BlockActivation swiglu{&Block::swiglu, "swiglu", "[B T, F] bf16", rows * F};
    for (bf16** shared : {&m.shared.attention_norm_out, &m.shared.ffn_norm_out}) {
        plan.add_alias(shared, &m.norm_out);
    }
    m.dense_blocks.resize(config.num_layers);
    m.lighthouse_blocks.resize(config.num_layers);
    const KeptActivations dense_kept = kept_activations(settings.recompute, AttentionMode::dense);
    const KeptActivations lighthouse_kept = kept_activations(settings.recompute, AttentionMode::lighthouse);
    if (offloads_inputs(settings.offload)) {
        m.input_slots.resize(num_input_slots(config.num_layers));
        m.host_inputs.resize(config.num_layers - m.input_slots.size());
    }
    for (bf16*& slot : m.input_slots) {
        plan.add(&slot, MemoryUse::activations, "block input, in turn", "[B T, C] bf16", rows * C);
    }
    for (bf16*& input : m.host_inputs) {
        plan.add(&input, MemoryUse::host_activations, "block input", "[B T, C] bf16", rows * C);
    }
    bool any_trains_dense = false;
    for (int l = 0; l < config.num_layers; ++l) {
        const bool can_switch = lighthouse && settings.lighthouse->applies_to(l, config.num_layers);
        Block &dense = m.dense_blocks[l], &switched = m.lighthouse_blocks[l];
        auto add_to_both = [&](bool kept, auto& activation) {
            activation.add_block(plan, dense, kept, m.shared);
            if (can_switch) {
                plan.add_alias(&(switched.*activation.member), &(dense.*activation.member));
            }
        };
        if (offloads_inputs(settings.offload)) {
            plan.add_alias(&dense.residual_in, &m.input_slots[l % m.input_slots.size()]);
            plan.add_alias(&switched.residual_in, &dense.residual_in);
        } else {
            add_to_both(true, residual_in);
        }
        add_to_both(true, attention_rstd);
        add_to_both(true, ffn_rstd);
        add_to_both(dense_kept.feed_forward, residual_mid);
        add_to_both(dense_kept.feed_forward, gate_up);
        add_to_both(dense_kept.norms_and_gate, attention_norm_out);
        add_to_both(dense_kept.norms_and_gate, ffn_norm_out);
        add_to_both(dense_kept.norms_and_gate, swiglu);

        const bool trains_dense = !can_switch || settings.trains_dense;
        any_trains_dense = any_trains_dense || trains_dense;
        if (can_switch) {
            plan.begin_alternatives(MemoryUse::activations);
            qkv.add_block(plan, switched, lighthouse_kept.qkv, m.shared);
            attention.add_block(plan, switched, lighthouse_kept.attention, m.shared);
            lighthouse_saved.add_block(plan, switched, lighthouse_kept.attention_state, m.shared);
            plan.next_alternative();
        }
        qkv.add_block(plan, dense, trains_dense && dense_kept.qkv, m.shared);
        attention.add_block(plan, dense, trains_dense && dense_kept.attention, m.shared);
        lse.add_block(plan, dense, trains_dense && dense_kept.attention_state, m.shared);
        if (can_switch) {
            plan.end_alternatives();
        }
    }

    // Other inputs and results of a step.
    const MemoryUse kept_use = MemoryUse::activations;
    plan.add(&m.final_residual, kept_use, "final residual", "[B T, C] bf16", rows * C);
    plan.add(&m.final_rstd, kept_use, "final_rstd", "[B T] float32", rows);
    plan.add(&m.losses, kept_use, "losses", "[B T] float32", rows);
    plan.add(&m.tokens, kept_use, "tokens and targets", "[2, B T] int32", 2 * rows);
    plan.add(&m.step_results, kept_use, "loss and gradient norm", "[2] float32", 2);
    plan.add(&m.eval_loss, kept_use, "evaluation loss", "[1] float32", 1);

    // Workspace: what is always there, then what the phases of a step use in turn.
    const MemoryUse use = MemoryUse::workspace;
    plan.add(&m.gradient_parts, use, "other ranks' parts of gradients", "float32",
             settings.sums_by_copies() ? zero_landing_elements(*layout.zero) : 0);
    auto add_scratch = [&](std::byte** pointer, const char* name, size_t num_bytes) {
        plan.add(pointer, use, name, "bytes", (int64_t)num_bytes);
    };
    add_scratch(&m.gemm_workspace, "cuBLASLt workspace", GEMM_WORKSPACE_BYTES);
    add_scratch(&m.rmsnorm_scratch, "rmsnorm_backward scratch", rmsnorm_backward_scratch_bytes(rows, config.width));
    add_scratch(&m.mean_loss_scratch, "mean_loss scratch", mean_loss_scratch_bytes());
    plan.add(&m.norm_out, use, "norm output", "[B T, C] bf16", rows * C);
    plan.add(&m.dresidual, use, "dresidual", "[B T, C] bf16", rows * C);
    qkv.add_shared(plan, m.shared);
    attention.add_shared(plan, m.shared);
    lse.add_shared(plan, m.shared);
    lighthouse_saved.add_shared(plan, m.shared);
    plan.begin_alternatives(use);  // forward, recomputing, and the backward of feed-forward
    residual_mid.add_shared(plan, m.shared);
    gate_up.add_shared(plan, m.shared);
    plan.begin_alternatives(use);  // attention
    add_scratch(&m.lighthouse_forward_scratch, "lighthouse_forward scratch", lighthouse_forward_size);
    plan.next_alternative();
    add_scratch(&m.context_forward_scratch, "attention scratch, of several ranks",
                context ? context->forward_scratch_bytes(dense_shape) : 0);
    plan.next_alternative();  // feed-forward
    swiglu.add_shared(plan, m.shared);
    plan.next_alternative();  // the backward of feed-forward
    plan.add(&m.dswiglu, use, "dswiglu", "[B T, F] bf16", rows * F);
    plan.next_alternative();
    plan.add(&m.dffn_norm_out, use, "dffn_norm_out", "[B T, C] bf16", rows * C);
    plan.end_alternatives();
    plan.next_alternative();  // classifier
    plan.add(&m.dhidden, use, "dhidden", "[B T, C] bf16", rows * C);
    const ClassifierShape classifier = classifier_shape(config, settings, rows);
    plan.add(&m.logits, use, "logits of a chunk", "[chunk, Vp] bf16",
             (int64_t)(classifier_logits_bytes(classifier) / sizeof(bf16)));
    add_scratch(&m.classifier_scratch, "classifier scratch", classifier_scratch_bytes(classifier));
    plan.next_alternative();  // the backward of attention
    plan.add(&m.dqkv, use, "dqkv", "[B T, (H + 2 Hkv) D] bf16", rows * qkv_width);
    plan.begin_alternatives(use);
    plan.add(&m.dattention, use, "dattention", "[B T, H D] bf16", rows * attention_width);
    plan.begin_alternatives(use);
    add_scratch(&m.attention_scratch,
                context ? "attention scratch, of several ranks" : "flash_attention_backward scratch",
                !any_trains_dense ? 0
                : context         ? context->backward_scratch_bytes(dense_shape, settings.deterministic)
                                  : flash_attention_backward_scratch_bytes(dense_shape, settings.deterministic, true));
    plan.next_alternative();
    add_scratch(&m.lighthouse_backward_scratch, "lighthouse_backward scratch", lighthouse_backward_size);
    plan.end_alternatives();
    plan.next_alternative();
    plan.add(&m.dattention_norm_out, use, "dattention_norm_out", "[B T, C] bf16", rows * C);
    plan.end_alternatives();
    plan.next_alternative();  // the backward of the embedding
    add_scratch(&m.embedding_scratch, "embedding_backward scratch",
                embedding_backward_scratch_bytes(rows, config.width, config.vocab_size));
    plan.next_alternative();  // update
    // Of several ranks also a flag for each tensor.
    add_scratch(&m.grad_norm_scratch, "grad_norm scratch",
                layout.zero ? std::max({zero_scratch_bytes(*layout.zero), grad_norm_scratch_bytes(),
                                        layout.sizes.size() * sizeof(float)})
                            : grad_norm_scratch_bytes());
    plan.end_alternatives();
}

// The plan of a model that is not there yet: to be printed, or held against other settings.
inline MemoryPlan planned_memory(const ModelConfig& config, const GpuModelSettings& settings) {
    MemoryPlan plan;
    ModelBuffers buffers;
    plan_buffers(plan, buffers, config, make_parameter_layout(make_parameter_table(config), settings.mesh.size()),
                 settings);
    return plan;
}
// Of the ranks that share a sequence, the plan of one that needs most: their steps of attention differ.
inline MemoryPlan largest_planned_memory(const ModelConfig& config, const GpuModelSettings& settings) {
    GpuModelSettings of_rank = settings;
    std::optional<MemoryPlan> largest;
    for (int rank = 0; rank < settings.mesh.context_parallel; ++rank) {
        of_rank.mesh.rank = rank;
        MemoryPlan plan = planned_memory(config, of_rank);
        if (!largest || plan.num_bytes() > largest->num_bytes()) {
            largest = std::move(plan);
        }
    }
    return std::move(*largest);
}
// A number that is never smaller for longer sequences; where it is the same, attention needs more memory for them. Of
// the attention of dense and of Lighthouse layers.
inline int64_t attention_pace(const ModelConfig& config, const GpuModelSettings& settings) {
    if (settings.mesh.context_parallel == 1) {
        return 1;
    }
    auto pace_of = [&](const AttentionShape& shape) { return context_attention_plan(settings, shape)->pace(shape); };
    int64_t pace = pace_of(dense_attention_shape(config, settings.max_batch_size, settings.local_seq_len()));
    if (settings.lighthouse) {
        pace += pace_of(lighthouse_context_inner_shape(lighthouse_shape(
            config, *settings.lighthouse, settings.mesh, settings.max_batch_size, settings.max_seq_len)));
    }
    return pace;
}
