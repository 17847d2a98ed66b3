// train_gpt.cu: the trainer on a GPU: flags -> ranks -> device -> memory plan -> model -> run. Its twin train_gpt.cpp
// runs on the CPU. What a run does, step by step, is in llmc/train_loop.h; the step itself, kernel by kernel, in
// llmc/model.cuh.
#include <exception>
#include <new>

#include "llmc/comm.cuh"       // GPUs that train together
#include "llmc/comm_launch.h"  // and their processes
#include "llmc/device.cuh"     // the GPU
#include "llmc/model.cuh"      // Llama forward, backward and update on it
#include "llmc/train_loop.h"   // settings, data, steps, evaluation, checkpoints

// The plan, and what else would fit; also of a run that does not.
static void print_memory(const RunConfig& config, const GpuModelSettings& settings, const GpuDevice& gpu) {
    std::string text = planned_memory(config.model, settings).table();
    text += format_string("%.2f GiB are free; the longest --seq_len that fits", gpu.free_bytes / BYTES_PER_GIB);
    for (const auto& [word, recompute] : choices(Recompute())) {
        GpuModelSettings other = settings;
        other.recompute = recompute;
        text += format_string("%s %lld with --recompute %s", recompute == Recompute::none ? ":" : ",",
                              (long long)longest_seq_len(config.model, other, gpu.free_bytes), word);
    }
    std::printf("%s\n", text.c_str());
    std::fflush(stdout);
}

static int train(int argc, char** argv) {
    const std::optional<ParsedFlags> parsed = read_command_line(argc, argv);
    if (!parsed) {
        return 0;  // --help
    }
    // One process a GPU: alone, or as many as a launcher has started.
    const std::unique_ptr<HostComm> host = open_host_comm(parsed->config.comm_timeout);
    const bool alone = host->size() == 1;
    const RunRanks ranks(*host, parsed->config.context_parallel);
    const RunConfig config = resolve_run(*parsed, ranks);
    const GpuDevice gpu = open_device(alone ? config.device : choose_device(*host));
    const GpuModelSettings settings = gpu_model_settings(config, ranks.mesh());
    if (config.print_memory && ranks.is_first()) {
        print_memory(config, settings, gpu);
    }
    std::optional<Communicators> comms;
    if (!alone) {
        comms.emplace(*host, ranks.mesh(), config.comm_transport);
    }
    int status;
    {
        GpuModel model(config.model, settings, alone ? nullptr : &*comms);
        DeviceInfo device;
        device.name = gpu.name;
        device.is_gpu = true;
        device.peak_tflops = gpu_peak_tflops(gpu.name);
        status = run_training(model, config, device, ranks);
        if (ranks.is_first()) {
            std::printf("%s", model.profile_table().c_str());
        }
    }
    if (!alone) {
        comms->finish();
    }
    host->finish();
    return status;
}

int main(int argc, char** argv) {
    try {
        return train(argc, argv);
    } catch (const std::bad_alloc&) {
        std::fprintf(stderr, "%s: out of host memory\n", argv[0]);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    }
    return 1;
}
