// comm_mpi.h: ranks started by mpirun or srun --mpi. Only point-to-point calls are used, from one thread; waiting is
// polling, so that a rank that hangs is noticed. (One that dies takes the job with it: that is the launcher's work.)
#pragma once
#define OMPI_SKIP_MPICXX 1  // of MPI the C functions only
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

#include <chrono>
#include <cstdlib>
#include <thread>

#include "comm.h"

inline void mpi_check(int status, const char* statement, const char* file, int line) {
    if (status != MPI_SUCCESS) {
        char text[MPI_MAX_ERROR_STRING] = {};
        int length;
        MPI_Error_string(status, text, &length);
        fail("MPI error: %s from %s at %s:%d", text, statement, file, line);
    }
}
#define MPI_CHECK(statement) mpi_check((statement), #statement, __FILE__, __LINE__)

// Whether an MPI launcher started this process. Without one MPI is not initialised: it would only cost time.
inline bool started_by_mpi() {
    for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "MPI_LOCALRANKID"}) {
        if (std::getenv(name) != nullptr) {
            return true;
        }
    }
    return false;
}

class MpiComm : public HostComm {
  public:
    // One object a process, until it ends.
    explicit MpiComm(double timeout_seconds) : MpiComm(initialize(), timeout_seconds) {}
    // After an error the process ends without MPI_Finalize, which the launcher takes as the order to end the others.
    void finish() override { MPI_CHECK(MPI_Finalize()); }

    void exchange(const std::vector<HostSend>& sends, const std::vector<HostReceive>& receives,
                  const std::string& operation) override {
        std::vector<MPI_Request> requests;
        std::vector<Message> messages;                                                         // of the requests
        const auto in_pieces = [&](int peer, size_t num_bytes, bool is_receive, auto start) {  // MPI counts in int
            constexpr size_t PIECE = (size_t)1 << 30;
            for (size_t at = 0; at < num_bytes; at += PIECE) {
                const int count = (int)std::min(PIECE, num_bytes - at);
                requests.push_back(MPI_REQUEST_NULL);
                messages.push_back({peer, count, is_receive});
                start(at, count, &requests.back());
            }
        };
        for (const HostReceive& r : receives) {
            if (r.peer != rank()) {
                in_pieces(r.peer, r.num_bytes, true, [&](size_t at, int count, MPI_Request* request) {
                    MPI_CHECK(MPI_Irecv(static_cast<char*>(r.data) + at, count, MPI_BYTE, r.peer, TAG, MPI_COMM_WORLD,
                                        request));
                });
            }
        }
        for (const HostSend& s : sends) {
            if (s.peer != rank()) {
                in_pieces(s.peer, s.num_bytes, false, [&](size_t at, int count, MPI_Request* request) {
                    MPI_CHECK(MPI_Isend(static_cast<const char*>(s.data) + at, count, MPI_BYTE, s.peer, TAG,
                                        MPI_COMM_WORLD, request));
                });
            }
        }
        exchange_with_self(sends, receives, operation);
        wait(requests, messages, operation);
    }

  private:
    static constexpr int TAG = 1;
    // What a request is of.
    struct Message {
        int peer, num_bytes;
        bool is_receive;
    };
    struct World {
        int rank, size;
    };
    static World initialize() {
        int provided;
        MPI_CHECK(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided));
        MPI_CHECK(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
        World world;
        MPI_CHECK(MPI_Comm_rank(MPI_COMM_WORLD, &world.rank));
        MPI_CHECK(MPI_Comm_size(MPI_COMM_WORLD, &world.size));
        return world;
    }
    MpiComm(World world, double timeout_seconds) : HostComm(world.rank, world.size, timeout_seconds) {
        exchange_hosts(*this);
    }

    // Done, or throws when nothing at all was completed for the time-out. Polls at once at first, then with rests that
    // leave the processor to ranks that share it.
    void wait(std::vector<MPI_Request>& requests, const std::vector<Message>& messages, const std::string& operation) {
        using Clock = std::chrono::steady_clock;
        Clock::time_point progress = Clock::now();
        size_t num_done = 0;
        std::vector<int> completed(requests.size());
        std::vector<MPI_Status> statuses(requests.size());
        for (int polls = 0; num_done < requests.size(); ++polls) {
            int count = 0;
            MPI_CHECK(MPI_Testsome((int)requests.size(), requests.data(), &count, completed.data(), statuses.data()));
            if (count > 0 && count != MPI_UNDEFINED) {
                for (int i = 0; i < count; ++i) {
                    const Message& m = messages[completed[i]];
                    int num_bytes = m.num_bytes;
                    if (m.is_receive) {
                        MPI_CHECK(MPI_Get_count(&statuses[i], MPI_BYTE, &num_bytes));
                    }
                    CHECK(num_bytes == m.num_bytes, "%s: rank %d (%s) sends %d bytes where %d are expected",
                          identity().where(operation).c_str(), m.peer, identity().host_of(m.peer).c_str(), num_bytes,
                          m.num_bytes);
                }
                num_done += count;
                progress = Clock::now();
                polls = 0;
                continue;
            }
            const double waited = std::chrono::duration<double>(Clock::now() - progress).count();
            if (waited > identity().timeout_seconds) {
                const size_t open = std::find_if(requests.begin(), requests.end(),
                                                 [](MPI_Request request) { return request != MPI_REQUEST_NULL; }) -
                                    requests.begin();
                fail("%s: nothing from rank %d (%s) for %g s (--comm_timeout): it hangs or is gone",
                     identity().where(operation).c_str(), messages[open].peer,
                     identity().host_of(messages[open].peer).c_str(), identity().timeout_seconds);
            }
            if (polls > 1000) {
                std::this_thread::sleep_for(std::chrono::microseconds(20));
            }
        }
    }
};
