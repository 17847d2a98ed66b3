// comm_launch.h: which ranks this process belongs to, by how it was started.
#pragma once
#include <cstdlib>

#ifdef LLMC_MPI
#include "comm_mpi.h"
#endif
#include "comm_tcp.h"

namespace launch {
// The number in an environment variable, or in the second when the first is not set.
inline int number_of(const char* variable, const char* otherwise) {
    const char* const name = std::getenv(variable) != nullptr ? variable : otherwise;
    const char* const text = std::getenv(name);
    CHECK(text != nullptr, "LLMC_RENDEZVOUS is set, so %s must be set too (or the program started by srun)", variable);
    char* end;
    const long value = std::strtol(text, &end, 10);
    CHECK(end != text && *end == '\0' && value >= 0 && value < 1 << 20, "%s=%s: must be a whole number", name, text);
    return (int)value;
}
// How many ranks a launcher says that it started, as it says it; nullptr where it names none or this one alone.
inline const char* several_ranks(const char* variable) {
    const char* const size = std::getenv(variable);
    return size == nullptr || *size == '\0' || std::string(size) == "1" ? nullptr : size;
}
}  // namespace launch

// All ranks of the job: those at LLMC_RENDEZVOUS when that is set (comm_tcp.h), else those of the MPI launcher, else
// this process alone. Throws Error when a launcher started several and this program cannot join them: each would train
// alone, and all write the same files.
inline std::unique_ptr<HostComm> open_host_comm(double timeout_seconds) {
    if (const char* const rendezvous = std::getenv("LLMC_RENDEZVOUS")) {
        const int rank = launch::number_of("LLMC_RANK", "SLURM_PROCID");
        const int size = launch::number_of("LLMC_WORLD_SIZE", "SLURM_NTASKS");
        return std::make_unique<TcpComm>(rank, size, rendezvous, timeout_seconds);
    }
#ifdef LLMC_MPI
    if (started_by_mpi()) {
        auto comm = std::make_unique<MpiComm>(timeout_seconds);
        const char* const size = launch::several_ranks("PMI_SIZE");
        CHECK(
            comm->size() > 1 || size == nullptr,
            "started by the mpiexec of another MPI as one of %s ranks, so each would train alone: start them with the "
            "mpirun of the MPI that this program was built with",
            size);
        return comm;
    }
#else
    const char* const mpi_size = launch::several_ranks("OMPI_COMM_WORLD_SIZE");
    CHECK(
        mpi_size == nullptr,
        "started by mpirun as one of %s ranks, but built without MPI, so each would train alone: install MPI (Debian: "
        "libopenmpi-dev) and build again, or start the ranks with LLMC_RENDEZVOUS set (see llmc/comm_tcp.h)",
        mpi_size);
#endif
    for (const char* variable : {"PMI_SIZE", "LLMC_WORLD_SIZE"}) {
        const char* const size = launch::several_ranks(variable);
        CHECK(size == nullptr,
              "started as one of %s ranks (%s) that this program cannot join: set LLMC_RENDEZVOUS too (see "
              "llmc/comm_tcp.h)",
              size, variable);
    }
    const char* const step_size = launch::several_ranks("SLURM_STEP_NUM_TASKS");  // of srun, not of a batch script
    CHECK(step_size == nullptr,
          "started by srun as one of %s ranks that do not know of each other, so each would train alone: start them "
          "with scripts/slurm_train.sh, with srun --mpi=pmix when built with MPI, or with LLMC_RENDEZVOUS set (see "
          "llmc/comm_tcp.h)",
          step_size);
    return std::make_unique<SingleComm>();
}
