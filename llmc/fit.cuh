// fit.cuh: whether a plan fits into the memory that is there, what would, and how long sequences may be (--fit).
#pragma once
#include <algorithm>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "config.h"          // MAX_SEQ_LEN
#include "flags.h"           // words of the modes
#include "host_memory.h"     // what the host has left
#include "model_memory.cuh"  // the plan

// Bytes that are there to be taken.
struct FreeMemory {
    size_t gpu = 0, host = 0;
    size_t gpu_kept = DEVICE_MEMORY_RESERVE;  // of gpu (gpu_bytes_kept)

    // Some of both is kept: by the host for checkpoints on their way and all else that runs.
    size_t usable_gpu() const { return gpu > gpu_kept ? gpu - gpu_kept : 0; }
    size_t usable_host() const { return host > HOST_MEMORY_RESERVE ? host - HOST_MEMORY_RESERVE : 0; }
    bool holds(const MemoryPlan& plan) const {
        return plan.num_bytes() <= usable_gpu() &&
               (plan.num_host_bytes() == 0 || plan.num_host_bytes() <= usable_host());
    }
};

// What a rank keeps free of its GPU: for the driver, and for the communicators where it will have some.
inline size_t gpu_bytes_kept(const GpuModelSettings& settings) {
    return DEVICE_MEMORY_RESERVE + (settings.by_nccl ? NCCL_MEMORY_ESTIMATE : 0);
}

// For a rank with these settings: gpu_bytes are free on its GPU.
inline FreeMemory free_memory(const GpuModelSettings& settings, size_t gpu_bytes) {
    auto limited = [](size_t bytes, size_t limit) { return limit > 0 ? std::min(bytes, limit) : bytes; };
    return {limited(gpu_bytes, settings.gpu_memory),
            limited(available_host_bytes("", settings.ranks_on_host, settings.in_memory_groups), settings.host_memory),
            gpu_bytes_kept(settings)};
}

// What counts as free of the GPU where free_bytes are by now: what streams, kernels and communicators have taken since
// it was opened is what memory is kept free for, so it counts still, as far as that goes. What has been planned or
// printed (--fit) for the GPU as it was opened fits therefore.
inline size_t counted_as_free(const GpuModelSettings& settings, size_t free_bytes) {
    return std::clamp(settings.free_at_start, free_bytes, free_bytes + gpu_bytes_kept(settings));
}

// With --offload of the optimizer: how many elements of its state there is room for on the GPU beside all else. They
// stay there, and need not travel in every step. All of them may fit where a part would not: only the others need
// memory to pass through.
inline int64_t resident_state_that_fits(const ModelConfig& config, GpuModelSettings settings, const FreeMemory& free) {
    if (!offloads_optimizer(settings.offload)) {
        return 0;
    }
    settings.resident_state_elements = INT64_MAX;
    if (planned_memory(config, settings).num_bytes() <= free.usable_gpu()) {
        return INT64_MAX;
    }
    settings.resident_state_elements = 0;
    const size_t needed = planned_memory(config, settings).num_bytes();
    if (needed >= free.usable_gpu()) {
        return 0;
    }
    constexpr size_t unit = BUFFER_ALIGNMENT / sizeof(float);  // of elements, so that no array is padded
    return (int64_t)((free.usable_gpu() - needed) / (3 * sizeof(float)) / unit * unit);
}

// The plan of the rank that needs most, with as much of AdamW's state on the GPU as a run would keep there: what it
// leaves to the host is the least.
inline MemoryPlan plan_to_fit(const ModelConfig& config, GpuModelSettings settings, const FreeMemory& free) {
    settings.resident_state_elements = resident_state_that_fits(config, settings, free);
    return largest_planned_memory(config, settings);
}

// What --seq_len must be a multiple of, and the shortest there is; max_seq_len is legal.
struct LegalLengths {
    int64_t unit, shortest;
};
inline LegalLengths legal_lengths(const GpuModelSettings& settings) {
    if (!settings.lighthouse) {
        const int64_t num_chunks = ContextPartition{settings.mesh.context_parallel, 0, 0}.num_chunks();
        return {num_chunks, num_chunks};
    }
    const LighthouseGeometry g = make_lighthouse_geometry(settings.max_seq_len, *settings.lighthouse);
    const int64_t windows = g.tiles * g.window(g.levels - 1);
    const bool dilated = settings.lighthouse->scorer == LighthouseScorer::dilated;
    const int64_t unit = dilated ? std::lcm(windows, (int64_t)settings.lighthouse->dilation) : windows;
    return {unit, round_up(LIGHTHOUSE_TILE_BUDGET * windows, unit)};
}

// The longest --seq_len that these settings leave room for on every rank, a multiple of 128 or of what the Lighthouse
// geometry asks; 0: none.
inline int64_t longest_seq_len(const ModelConfig& config, const GpuModelSettings& settings, const FreeMemory& free) {
    const LegalLengths legal = legal_lengths(settings);
    const int64_t unit = legal.unit * (settings.lighthouse ? 1 : 128), smallest = ceil_div(legal.shortest, unit);
    auto with_length = [&](int64_t units) {
        GpuModelSettings longer = settings;
        longer.max_seq_len = units * unit;
        return longer;
    };
    auto fits = [&](int64_t units) { return free.holds(plan_to_fit(config, with_length(units), free)); };
    auto fits_with_least_logits = [&](int64_t units) {
        GpuModelSettings least = with_length(units);
        least.classifier_chunk_rows = 1;
        return free.holds(plan_to_fit(config, least, free));
    };
    auto pace = [&](int64_t units) { return attention_pace(config, with_length(units)); };
    auto num_chunks = [&](int64_t units) {
        return settings.classifier_chunk_rows > 0
                   ? 1
                   : classifier_num_chunks(with_length(units).max_rows(), config.vocab_size);
    };
    // The most units from first to last that fit, or 0. Longer sequences need more, but where attention takes them
    // another way, and where the classifier has one more chunk, of fewer rows.
    const std::function<int64_t(int64_t, int64_t)> most = [&](int64_t first, int64_t last) -> int64_t {
        if (first > last) {
            return 0;
        }
        const bool same_pace = pace(first) == pace(last);
        if (same_pace && !fits_with_least_logits(first)) {
            return 0;
        }
        if (!same_pace || num_chunks(first) != num_chunks(last)) {
            const int64_t middle = (first + last) / 2, longer = most(middle + 1, last);
            return longer > 0 ? longer : most(first, middle);
        }
        int64_t fitting = first - 1, beyond = last + 1;
        while (beyond - fitting > 1) {
            const int64_t middle = fitting + (beyond - fitting) / 2;
            (fits(middle) ? fitting : beyond) = middle;
        }
        return fitting < first ? 0 : fitting;
    };
    // Of the lengths that --seq_len and --batch_size may have.
    return unit * most(smallest, std::min(MAX_SEQ_LEN / unit, (int64_t)INT32_MAX / settings.max_batch_size / unit));
}

// The ways of offloading that these ranks have.
inline std::vector<std::pair<const char*, Offload>> offload_choices(const ParallelMesh& mesh) {
    std::vector<std::pair<const char*, Offload>> ways;
    for (const auto& [word, offload] : choices(Offload())) {
        GpuModelSettings settings;
        settings.offload = offload;
        if (mesh.size() == 1 || !offloads_optimizer(settings.offload)) {
            ways.push_back({word, offload});
        }
    }
    return ways;
}

// The table of --fit: the longest sequence for each way to save memory, all else as in `settings`.
inline std::string fit_table(const ModelConfig& config, const GpuModelSettings& settings, const FreeMemory& free) {
    std::string text = format_string(
        "the longest --seq_len with --batch_size %d in %.2f GiB of GPU memory and, for --offload, %.2f GiB of the "
        "host's (of these %.2f and %.2f GiB stay free%s)\n%-28s",
        settings.max_batch_size, free.gpu / BYTES_PER_GIB, free.host / BYTES_PER_GIB,
        (free.gpu - free.usable_gpu()) / BYTES_PER_GIB, (free.host - free.usable_host()) / BYTES_PER_GIB,
        settings.by_nccl
            ? format_string(", %.2f of the first for NCCL, an estimate", NCCL_MEMORY_ESTIMATE / BYTES_PER_GIB).c_str()
            : "",
        "");
    const auto ways = offload_choices(settings.mesh);
    for (const auto& way : ways) {
        text += format_string(" %21s", format_string("--offload %s", way.first).c_str());
    }
    for (const auto& [word, recompute] : choices(Recompute())) {
        text += format_string("\n%-28s", format_string("--recompute %s", word).c_str());
        for (const auto& way : ways) {
            GpuModelSettings other = settings;
            other.recompute = recompute, other.offload = way.second;
            const int64_t longest = longest_seq_len(config, other, free);
            text += format_string(" %21s", longest == 0 ? "-" : std::to_string(longest).c_str());
        }
    }
    return text + "\n";
}

// Throws when the plan needs more than there is, naming the settings that would fit.
inline void check_fits(const MemoryPlan& plan, const FreeMemory& free, const ModelConfig& config,
                       const GpuModelSettings& settings) {
    if (free.holds(plan)) {
        return;
    }
    std::string advice;
    auto suggest = [&](const GpuModelSettings& other) {
        const MemoryPlan needed = plan_to_fit(config, other, free);
        if (advice.empty() && free.holds(needed)) {
            advice = format_string("; --recompute %s --offload %s --batch_size %d --seq_len %lld would need %.2f GiB",
                                   choice_name(other.recompute), choice_name(other.offload), other.max_batch_size,
                                   (long long)other.max_seq_len, needed.num_bytes() / BYTES_PER_GIB);
        }
    };
    // Least loss first: recompute, then offload, then fewer sequences, then shorter ones.
    auto suggest_modes = [&](GpuModelSettings other) {
        for (const auto& way : offload_choices(settings.mesh)) {
            other.offload = way.second;
            for (const auto& [word, recompute] : choices(Recompute())) {
                other.recompute = recompute;
                suggest(other);
            }
        }
    };
    GpuModelSettings other = settings;
    suggest_modes(other);
    while (advice.empty() && other.max_batch_size > 1) {
        do {  // divisors: --global_batch is a multiple of them too
            --other.max_batch_size;
        } while (settings.max_batch_size % other.max_batch_size != 0);
        suggest_modes(other);
    }
    const LegalLengths legal = legal_lengths(settings);
    while (advice.empty() && other.max_seq_len > legal.shortest) {
        other.max_seq_len = std::max(other.max_seq_len / 2 / legal.unit * legal.unit, legal.shortest);
        suggest_modes(other);
    }
    if (advice.empty()) {
        advice = format_string("; not even --batch_size 1 --seq_len %lld fits", (long long)legal.shortest);
    }
    const bool host = plan.num_bytes() <= free.usable_gpu();
    const size_t needed = host ? plan.num_host_bytes() : plan.num_bytes();
    const size_t there = host ? free.host : free.gpu, usable = host ? free.usable_host() : free.usable_gpu();
    fail(
        "not enough %s memory%s: this run needs %.2f GiB and %.2f GiB are free (less %.2f GiB kept for %s)%s; "
        "--print_memory shows what needs how much, --fit what would fit",
        host ? "host" : "GPU", host ? format_string(" for --offload %s", choice_name(settings.offload)).c_str() : "",
        needed / BYTES_PER_GIB, there / BYTES_PER_GIB, (there - usable) / BYTES_PER_GIB,
        host               ? "other uses"
        : settings.by_nccl ? "the driver and NCCL"
                           : "the driver",
        advice.c_str());
}
