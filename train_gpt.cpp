// train_gpt.cpp: the trainer on the CPU: flags -> model -> run. Its twin train_gpt.cu differs in the device and the
// model. What a run does, step by step, is in llmc/train_loop.h; the model, written for reading, in llmc/reference/.
#include <omp.h>

#include <exception>
#include <new>

#include "llmc/comm_launch.h"      // whether a launcher started several
#include "llmc/host_memory.h"      // what is there to be taken
#include "llmc/reference/model.h"  // Llama forward, backward and update in plain C++
#include "llmc/train_loop.h"       // settings, data, steps, evaluation, checkpoints

// A launcher's ranks would each train alone, and all write the same files.
static void refuse_ranks() {
    for (const char* variable : {"LLMC_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"}) {
        const char* const size = launch::several_ranks(variable);
        CHECK(size == nullptr, "started as one of %s ranks (%s): on the CPU training is one process", size, variable);
    }
}

static int train(int argc, char** argv) {
    refuse_ranks();
    const std::optional<RunConfig> config = configure_run(argc, argv);
    if (!config) {
        return 0;  // --help
    }
    set_num_threads(*config);
    // The system would rather end this process than refuse it what it asks for.
    const double needed =
        reference::ReferenceModel<float>::planned_bytes(config->model, config->batch_size, config->seq_len);
    const uint64_t there = available_host_bytes();
    CHECK(
        needed <= (double)there,
        "not enough memory: this run needs %.2f GiB and %.2f GiB are free: lower --batch_size or --seq_len, or take a "
        "smaller model",
        needed / (1 << 30), (double)there / (1 << 30));
    DeviceInfo device;
    device.name = format_string("CPU, %d threads", omp_get_max_threads());
    reference::ReferenceModel<float> model(config->model, config->attention, config->lighthouse, config->batch_size,
                                           config->seq_len);
    return run_training(model, *config, device);
}

int main(int argc, char** argv) {
    try {
        return train(argc, argv);
    } catch (const std::bad_alloc&) {
        std::fprintf(stderr, "%s: out of memory: lower --batch_size or --seq_len, or take a smaller model\n", argv[0]);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    }
    return 1;
}
