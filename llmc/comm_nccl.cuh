// comm_nccl.cuh: the auto and nccl transports of comm.cuh. Communicators are non-blocking, and a thread watches what
// was enqueued: a transfer that has started and does not end within comm_timeout, or an error that NCCL reports, ends
// the job: the communicators are aborted, which frees the kernels that wait for the missing rank, and check() throws an
// error that names rank, host, operation and step. A process that then does not come to check() is ended by the thread.
// A transfer's clock starts when it does: waiting behind this rank's own computation is not hanging. Another rank's
// longer computation is waited for, so comm_timeout must be longer than the longest difference between ranks.
#pragma once
#include <nccl.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <future>
#include <mutex>
#include <thread>
#include <utility>

#include "comm_peer.cuh"  // copies between GPUs of a host

inline void nccl_check(ncclResult_t status, ncclComm_t comm, const char* statement, const char* file, int line) {
    CHECK(status == ncclSuccess || status == ncclInProgress, "NCCL error: %s (%s) from %s at %s:%d",
          ncclGetErrorString(status), ncclGetLastError(comm), statement, file, line);
}
#define NCCL_CHECK(comm, statement) nccl_check((statement), (comm), #statement, __FILE__, __LINE__)

// All NCCL communicators of this process, and the thread that watches them.
class NcclJob {
  public:
    explicit NcclJob(HostComm& host) : host_(host), identity_(host.shared_identity()) {
        CUDA_CHECK(cudaGetDevice(&device_));
        watcher_ = std::thread([this] { watch(); });
    }
    NcclJob(const NcclJob&) = delete;
    NcclJob& operator=(const NcclJob&) = delete;
    // After finish() nothing is left to do; without it this rank leaves others in the lurch, and must not wait for
    // them.
    ~NcclJob() {
        {
            const Lock lock(mutex_);
            stop_ = true;
            abort_all();
        }
        watcher_.join();
        for (const Operation& operation : operations_) {
            release(operation);
        }
        for (cudaEvent_t event : free_events_) {
            cudaEventDestroy(event);
        }
    }

    // The communicator of all ranks; all of them call it.
    std::unique_ptr<Comm> open_world() {
        ncclUniqueId id{};
        if (host_.rank() == 0) {
            NCCL_CHECK(nullptr, ncclGetUniqueId(&id));
        }
        HostGroup(host_).broadcast(&id, sizeof id, 0, "exchange of the NCCL id");
        ncclComm_t comm = nullptr;
        ncclConfig_t config = non_blocking();
        NCCL_CHECK(nullptr, ncclCommInitRankConfig(&comm, host_.size(), id, host_.rank(), &config));
        return adopt(comm, "opening the communicator of all ranks");
    }
    // The communicator of the ranks of one color, numbered by key; all ranks call it, after open_world.
    std::unique_ptr<Comm> split(int color, int key) {
        ncclComm_t comm = nullptr;
        ncclConfig_t config = non_blocking();
        {
            const Lock lock(mutex_);  // the watcher asks comms_[0] too
            throw_if_failed();
            NCCL_CHECK(comms_[0], ncclCommSplit(comms_[0], color, key, &comm, &config));
            wait_until_ready(comms_[0], "splitting the communicator of all ranks");
        }
        return adopt(comm, "opening the communicator of a sequence's ranks");
    }

    // Enqueues what enqueue() calls and has it watched. One thread at a time.
    template <class Enqueue>
    void run(ncclComm_t comm, const char* operation, cudaStream_t stream, Enqueue enqueue) {
        const Lock lock(mutex_);
        throw_if_failed();
        Operation watched{operation, identity_->step.load(), take_event(), take_event(), false, {}};
        try {
            CUDA_CHECK(cudaEventRecord(watched.begin, stream));
            enqueue();
            wait_until_ready(comm, operation);
            CUDA_CHECK(cudaEventRecord(watched.end, stream));
        } catch (const std::exception& error) {  // part of it may be enqueued, and wait
            fail_with(error.what());
            throw;
        }
        operations_.push_back(watched);
    }

    // copies.release() when something has failed; until it is forgotten.
    void release_on_failure(const PeerCopies& copies) {
        const Lock lock(mutex_);
        copies_.push_back(&copies);
    }
    void forget(const PeerCopies& copies) {
        const Lock lock(mutex_);
        copies_.erase(std::find(copies_.begin(), copies_.end(), &copies));
    }

    // This rank has failed, elsewhere, and will leave the others in the lurch: what waits for them here is let go. The
    // reason is what is printed should the process not end by itself, as where its GPU has much to do yet.
    void abandon(const std::string& reason) {
        const Lock lock(mutex_);
        if (error_.empty()) {
            fail_with(reason);
        }
    }

    // Throws when anything has failed.
    void check() {
        const Lock lock(mutex_);
        throw_if_failed();
    }

    // Closes the communicators when all ranks do.
    void finish() {
        CUDA_CHECK(cudaDeviceSynchronize());
        const Lock lock(mutex_);
        throw_if_failed();
        while (!comms_.empty()) {  // those split off first
            NCCL_CHECK(comms_.back(), ncclCommFinalize(comms_.back()));
            wait_until_ready(comms_.back(), "closing a communicator");
            NCCL_CHECK(nullptr, ncclCommDestroy(comms_.back()));
            comms_.pop_back();
        }
    }

  private:
    using Clock = std::chrono::steady_clock;
    using Lock = std::lock_guard<std::timed_mutex>;
    static double seconds_since(Clock::time_point start) {
        return std::chrono::duration<double>(Clock::now() - start).count();
    }
    static constexpr double GRACE_SECONDS = 15.0;  // from a failure to the end of a process that does not notice it

    struct Operation {
        const char* name;
        int64_t step;
        cudaEvent_t begin, end;  // on its stream, around it
        bool has_begun;
        Clock::time_point begun;
    };

    static ncclConfig_t non_blocking() {
        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
        config.blocking = 0;
        return config;
    }
    std::unique_ptr<Comm> adopt(ncclComm_t comm, const char* operation);

    // Polls until what was called is under way (a first transfer opens connections). Holds mutex_, or is alone.
    void wait_until_ready(ncclComm_t comm, const char* operation) const {
        const Clock::time_point start = Clock::now();
        while (true) {
            ncclResult_t state;
            NCCL_CHECK(comm, ncclCommGetAsyncError(comm, &state));
            if (state == ncclSuccess) {
                return;
            }
            CHECK(state == ncclInProgress, "%s: NCCL error: %s (%s)", identity_->where(operation).c_str(),
                  ncclGetErrorString(state), ncclGetLastError(comm));
            CHECK(seconds_since(start) < identity_->timeout_seconds,
                  "%s: NCCL made no progress for %g s (--comm_timeout): another rank hangs or is gone",
                  identity_->where(operation).c_str(), identity_->timeout_seconds);
            std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
    }

    cudaEvent_t take_event() {
        if (free_events_.empty()) {
            cudaEvent_t event;
            CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
            return event;
        }
        const cudaEvent_t event = free_events_.back();
        free_events_.pop_back();
        return event;
    }
    void release(const Operation& operation) {
        free_events_.push_back(operation.begin);
        free_events_.push_back(operation.end);
    }

    void throw_if_failed() const {
        if (!error_.empty()) {
            throw Error(error_);
        }
    }
    // Frees the kernels that wait for other ranks. NCCL may itself wait in it; not longer than the grace.
    void abort_all() {
        std::promise<void> aborted;
        const std::future<void> done = aborted.get_future();
        std::thread([comms = std::exchange(comms_, {}), aborted = std::move(aborted)]() mutable {
            for (ncclComm_t comm : comms) {
                ncclCommAbort(comm);
            }
            aborted.set_value();
        }).detach();
        done.wait_for(std::chrono::duration<double>(GRACE_SECONDS));
    }

    // Holds mutex_.
    void fail_with(const std::string& error) {
        error_ = error;
        failed_ = Clock::now();
        for (const PeerCopies* copies : copies_) {
            copies->release(release_stream_);
        }
        abort_all();
    }
    [[noreturn]] static void end_process(const std::string& error) {
        std::fprintf(stderr, "error: %s\n", error.c_str());
        std::_Exit(1);
    }

    // The thread: looks every few milliseconds.
    void watch() {
        cudaSetDevice(device_);
        while (true) {
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            const std::unique_lock<std::timed_mutex> lock(
                mutex_, std::chrono::duration<double>(identity_->timeout_seconds + GRACE_SECONDS));
            if (!lock) {  // CUDA takes no more launches, behind something that waits
                end_process(identity_->where("a transfer") + ": cannot be enqueued: another rank hangs or is gone");
            }
            if (stop_) {
                return;
            }
            if (error_.empty()) {
                if (const std::string error = find_failure(); !error.empty()) {
                    fail_with(error);
                }
            } else if (seconds_since(failed_) > GRACE_SECONDS) {
                end_process(error_);
            }
        }
    }
    // Drops what is done; empty when nothing is wrong.
    std::string find_failure() {
        for (size_t i = 0; i < operations_.size();) {
            Operation& operation = operations_[i];
            if (cudaEventQuery(operation.end) == cudaSuccess) {
                release(operation);
                operations_.erase(operations_.begin() + (std::ptrdiff_t)i);
                continue;
            }
            if (!operation.has_begun && cudaEventQuery(operation.begin) == cudaSuccess) {
                operation.has_begun = true;
                operation.begun = Clock::now();
            }
            if (operation.has_begun && seconds_since(operation.begun) > identity_->timeout_seconds) {
                return format_string("%s: did not end within %g s (--comm_timeout): another rank hangs or is gone",
                                     place(operation).c_str(), identity_->timeout_seconds);
            }
            ++i;
        }
        for (ncclComm_t comm : comms_) {
            ncclResult_t state;
            if (ncclCommGetAsyncError(comm, &state) == ncclSuccess && state != ncclSuccess && state != ncclInProgress) {
                return format_string(
                    "%s: NCCL error: %s (%s)",
                    (operations_.empty() ? identity_->where("between transfers") : place(operations_.front())).c_str(),
                    ncclGetErrorString(state), ncclGetLastError(comm));
            }
        }
        return "";
    }
    // With the step in which it was enqueued, which may be before the one that the host is at.
    std::string place(const Operation& operation) const {
        return format_string(
            "rank %d (%s), %s, %s", identity_->rank, identity_->host_of(identity_->rank).c_str(), operation.name,
            operation.step < 0 ? "at start-up" : format_string("step %lld", (long long)operation.step).c_str());
    }

    HostComm& host_;
    std::shared_ptr<CommIdentity> identity_;
    int device_ = 0;
    std::timed_mutex mutex_;  // of everything below
    std::vector<ncclComm_t> comms_;
    std::deque<Operation> operations_;
    std::vector<cudaEvent_t> free_events_;
    std::vector<const PeerCopies*> copies_;
    CudaStream release_stream_;
    std::string error_;
    Clock::time_point failed_;
    bool stop_ = false;
    std::thread watcher_;
};

class NcclComm : public Comm {
  public:
    NcclComm(NcclJob& job, ncclComm_t comm, int rank, int size) : Comm(rank, size), job_(job), comm_(comm) {}
    ~NcclComm() override {
        if (copies_) {
            job_.forget(*copies_);
        }
    }

    void exchange(const std::vector<DeviceSend>& sends, const std::vector<DeviceReceive>& receives,
                  const char* operation, cudaStream_t stream) override {
        if (sends.empty() && receives.empty()) {
            return;
        }
        if (!copies_) {
            job_.run(comm_, operation, stream, [&] { exchange_by_nccl(sends, receives, stream); });
            return;
        }
        job_.check();  // before this host waits for others
        const PeerCopies::Round round = copies_->agree(sends, receives, operation);
        job_.run(comm_, operation, stream, [&] {
            copies_->send(round, stream);
            exchange_by_nccl(round.other_sends, round.other_receives, stream);
            copies_->receive(round, stream);
        });
    }
    void reduce_scatter_sum(float* out, const float* in, int64_t count, const char* operation,
                            cudaStream_t stream) override {
        if (copies_all(count * sizeof(float)) && count % 4 == 0 && landing_.num_bytes > 0) {
            sum_of_copies(out, in, count, operation, stream);
            return;
        }
        job_.run(comm_, operation, stream,
                 [&] { NCCL_CHECK(comm_, ncclReduceScatter(in, out, count, ncclFloat, ncclSum, comm_, stream)); });
    }
    void all_gather(void* out, const void* in, size_t num_bytes, const char* operation, cudaStream_t stream) override {
        if (copies_all(num_bytes)) {
            all_gather_by_exchange(out, in, num_bytes, operation, stream);
            return;
        }
        job_.run(comm_, operation, stream,
                 [&] { NCCL_CHECK(comm_, ncclAllGather(in, out, num_bytes, ncclUint8, comm_, stream)); });
    }
    void all_reduce_sum(float* data, int64_t count, const char* operation, cudaStream_t stream) override {
        job_.run(comm_, operation, stream,
                 [&] { NCCL_CHECK(comm_, ncclAllReduce(data, data, count, ncclFloat, ncclSum, comm_, stream)); });
    }
    void all_reduce_sum(double* data, int64_t count, const char* operation, cudaStream_t stream) override {
        job_.run(comm_, operation, stream,
                 [&] { NCCL_CHECK(comm_, ncclAllReduce(data, data, count, ncclDouble, ncclSum, comm_, stream)); });
    }

    // From now on copies go into what ranks share. landing: of this rank's memory, for parts of sums on their way;
    // without it sums are NCCL's.
    void share(PeerMemory& memory, HostGroup group, int communicator, DeviceRange landing) {
        copies_ = std::make_unique<PeerCopies>(memory, std::move(group), communicator);
        landing_ = landing;
        job_.release_on_failure(*copies_);
    }

  private:
    void exchange_by_nccl(const std::vector<DeviceSend>& sends, const std::vector<DeviceReceive>& receives,
                          cudaStream_t stream) {
        if (sends.empty() && receives.empty()) {
            return;
        }
        NCCL_CHECK(comm_, ncclGroupStart());
        for (const DeviceSend& s : sends) {
            NCCL_CHECK(comm_, ncclSend(s.data, s.num_bytes, ncclUint8, s.peer, comm_, stream));
        }
        for (const DeviceReceive& r : receives) {
            NCCL_CHECK(comm_, ncclRecv(r.data, r.num_bytes, ncclUint8, r.peer, comm_, stream));
        }
        NCCL_CHECK(comm_, ncclGroupEnd());
    }
    // Whether copies do a collective with messages of that size: between the GPUs of several hosts NCCL knows better.
    bool copies_all(size_t num_bytes) const {
        return copies_ && num_bytes >= PeerCopies::LEAST_BYTES && copies_->all_reach();
    }
    // As reduce_scatter_sum, a piece that fits `landing` at a time.
    void sum_of_copies(float* out, const float* in, int64_t count, const char* operation, cudaStream_t stream) {
        float* const parts = reinterpret_cast<float*>(landing_.data);
        const int64_t longest = (int64_t)(landing_.num_bytes / sizeof(float)) / (size() - 1) / 4 * 4;
        CHECK(longest > 0, "%s: no memory for the parts of other ranks", operation);
        for (int64_t begin = 0; begin < count; begin += longest) {
            const int64_t length = std::min(longest, count - begin);
            std::vector<DeviceSend> sends;
            std::vector<DeviceReceive> receives;
            for (int peer = 0; peer < size(); ++peer) {
                if (peer != rank()) {
                    sends.push_back({peer, in + peer * count + begin, length * sizeof(float)});
                    receives.push_back({peer, parts + (peer - (peer > rank())) * length, length * sizeof(float)});
                }
            }
            exchange(sends, receives, operation, stream);
            peer_sum(out + begin, in + rank() * count + begin, parts, rank(), size(), length, stream);
        }
    }

    NcclJob& job_;
    ncclComm_t comm_;
    std::unique_ptr<PeerCopies> copies_;  // with the transport auto
    DeviceRange landing_;
};

inline std::unique_ptr<Comm> NcclJob::adopt(ncclComm_t comm, const char* operation) {
    wait_until_ready(comm, operation);
    {
        const Lock lock(mutex_);
        comms_.push_back(comm);
    }
    int rank, size;
    NCCL_CHECK(comm, ncclCommUserRank(comm, &rank));
    NCCL_CHECK(comm, ncclCommCount(comm, &size));
    return std::make_unique<NcclComm>(*this, comm, rank, size);
}
