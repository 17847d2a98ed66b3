// setting_choices.h: the settings of a run that are a choice of a few, and the words for them on the command line, in
// settings files and in messages.
#pragma once
#include <utility>
#include <vector>

#include "model_config.h"  // AttentionMode, LighthouseScorer

// ---- the choices --------------------------------------------------------------------------------
enum class DataFormat { automatic, bytes, shards };  // automatic: by each file's magic number
enum class ScheduleKind { cosine, linear, constant };
enum class SaveDtype { automatic, fp32, bf16 };  // automatic: fp32 on the CPU, bf16 on the GPU
// What the backward pass computes again rather than keep from the forward pass: nothing; of a block the outputs of the
// norms and of the gate, which take no product; all of it but attention; all of it.
enum class Recompute { none, norms_and_gate, all_but_attention, block };
// What lives in page-locked host memory and visits the GPU when it is needed: nothing; the inputs of blocks that the
// backward reads; the optimizer's state; both.
enum class Offload { none, activations, optimizer, all };
// Between GPUs: by their copy engines where they share a host and reach each other, and NCCL; by NCCL alone; staged
// through the host (for tests and debugging).
enum class CommTransport { automatic, nccl, host };
// How attention reaches over the ranks of a sequence (context_attention.cuh).
enum class ContextExchange { automatic, ring, gather, heads };  // automatic: ring or gather

// Whether the inputs of blocks, and the optimizer's state, are among what is offloaded.
inline bool offloads_inputs(Offload offload) { return offload == Offload::activations || offload == Offload::all; }
inline bool offloads_optimizer(Offload offload) { return offload == Offload::optimizer || offload == Offload::all; }

// ---- their words --------------------------------------------------------------------------------
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
    return {{"none", Recompute::none},
            {"norms_and_gate", Recompute::norms_and_gate},
            {"all_but_attention", Recompute::all_but_attention},
            {"block", Recompute::block}};
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
    return {{"auto", ContextExchange::automatic},
            {"ring", ContextExchange::ring},
            {"gather", ContextExchange::gather},
            {"heads", ContextExchange::heads}};
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
