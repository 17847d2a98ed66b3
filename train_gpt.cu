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

// --print_memory: the plan, and what else would fit; also of a run that does not. --fit: what would fit.
static void print_memory(const RunConfig& config, const GpuModelSettings& settings, const FreeMemory& free) {
    const std::string plan = config.print_memory ? largest_planned_memory(config.model, settings).table() : "";
    std::printf("%s%s", plan.c_str(), fit_table(config.model, settings, free).c_str());
    std::fflush(stdout);
}

static GpuDevice open_own_device(const RunConfig& config, HostComm& host) {
    return open_device(host.size() == 1 ? config.device : choose_device(host));
}

// What every rank has: the least of any. All ranks call it.
static FreeMemory least_free(const FreeMemory& own, const RunRanks& ranks) {
    FreeMemory least = own;
    least.gpu = ranks.least(own.gpu, "comparison of free GPU memory");
    least.host = ranks.least(own.host, "comparison of free host memory");
    return least;
}

// --fit asks for the ranks' GPUs, or for such as --gpu_memory says: then there need not be one here. All ranks call it.
static void print_fit(const RunConfig& config, GpuModelSettings settings, HostComm& host, const RunRanks& ranks) {
    size_t gpu_bytes = settings.gpu_memory;
    if (ranks.largest(has_gpu(), "comparison of who has a GPU") == 0) {
        CHECK(settings.gpu_memory > 0,
              "--fit: there is no NVIDIA GPU here; say with --gpu_memory how many GiB the GPU in question has free");
        assumed_gpu() = H100_PROPERTIES;
        if (ranks.is_first()) {
            std::printf("no GPU here: as for an H100\n");
        }
    } else {
        const GpuDevice gpu = open_own_device(config, host);
        gpu_bytes = gpu_bytes > 0 ? gpu_bytes : gpu.free_bytes;
    }
    FreeMemory free = least_free(free_memory(settings, gpu_bytes), ranks);
    if (settings.host_memory > 0) {
        free.host = settings.host_memory;  // also more than this machine has
    }
    settings.resident_state_elements = resident_state_that_fits(config.model, settings, free);
    if (ranks.is_first()) {
        print_memory(config, settings, free);
        check_printed();
    }
}

// What the run has taken of the GPU since it was opened: its plan, and what kernels and cuBLASLt need beside it. Other
// processes that came meanwhile count too.
static std::string used_memory(const GpuModel& model, const GpuDevice& gpu) {
    size_t free_bytes, total_bytes;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    const double used = gpu.free_bytes / BYTES_PER_GIB - free_bytes / BYTES_PER_GIB;
    return format_string("GPU memory: %.3f GiB planned, %.3f GiB more in use than at the start\n",
                         model.peak_memory_gib(), used);
}

static int train(int argc, char** argv) {
    std::optional<ParsedFlags> parsed = read_command_line(argc, argv);
    if (!parsed) {
        return 0;  // --help
    }
    // One process a GPU: alone, or as many as a launcher has started.
    const std::unique_ptr<HostComm> host = open_host_comm(parsed->config.comm_timeout);
    const bool alone = host->size() == 1;
    CHECK(alone || parsed->typed.count("device") == 0,
          "--device is for one process, and there are %d ranks, which take the GPUs of their machine in turn: leave it "
          "out (CUDA_VISIBLE_DEVICES says which GPUs there are)",
          host->size());
    const std::string other_mesh = fit_context_parallel(*parsed, host->size());
    const RunRanks ranks(*host, parsed->config.context_parallel);
    if (ranks.is_first() && !other_mesh.empty()) {
        print_warning(parsed->config.program, other_mesh);
    }
    const RunConfig config = resolve_run(*parsed, ranks);
    set_num_threads(config);
    GpuModelSettings settings = gpu_model_settings(config, ranks.mesh());
    settings.ranks_on_host = num_ranks_on_machine(host->identity());
    settings.in_memory_groups = host->identity().in_memory_groups;
    if (config.fit) {
        print_fit(config, settings, *host, ranks);
        host->finish();
        return 0;
    }
    const GpuDevice gpu = open_own_device(config, *host);
    settings.free_at_start = gpu.free_bytes;
    const FreeMemory free = free_memory(settings, gpu.free_bytes);
    settings.resident_state_elements = resident_state_that_fits(config.model, settings, free);
    if (config.print_memory) {
        const FreeMemory least = least_free(free, ranks);
        if (ranks.is_first()) {
            print_memory(config, settings, least);
        }
    }
    std::optional<Communicators> comms;
    if (!alone) {
        comms.emplace(*host, ranks.mesh(), config.comm_transport);
    }
    int status;
    {
        GpuModel model(config.model, settings, alone ? nullptr : &*comms);
        CommunicatorsEnd end(alone ? nullptr : &*comms);
        DeviceInfo device;
        device.name = gpu.name;
        device.is_gpu = true;
        device.peak_tflops = gpu_peak_tflops(gpu.name);
        device.transfers = alone ? "" : comms->description();
        try {
            status = run_training(model, config, device, ranks);
        } catch (const std::exception& error) {
            end.abandon(error.what());
            throw;
        }
        if (ranks.is_first()) {
            std::printf("%s", model.profile_table().c_str());
            if (config.profile || config.print_memory) {
                std::printf("%s", used_memory(model, gpu).c_str());
            }
        }
        end.finish();
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
