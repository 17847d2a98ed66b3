// loopback_comm.cuh: the ranks of a communicator as threads of one process on one GPU, for checking what is built on
// llmc/comm.cuh without other processes. Like NCCL's, its transfers run on the caller's stream and the host does not
// wait for them, so a missing dependency between streams shows; optional delays on the device make it show reliably.
#pragma once
#include <condition_variable>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <queue>
#include <thread>

#include "harness.cuh"
#include "llmc/comm.cuh"

// What the ranks of one communicator share.
class LoopbackHub {
  public:
    explicit LoopbackHub(int size) : size_(size), events_(NUM_EVENTS) {
        for (const CudaEvent& event : events_) {
            free_events_.push_back(event);
        }
    }
    int size() const { return size_; }
    // A rank has failed: nobody waits for it.
    void give_up() {
        const std::lock_guard<std::mutex> lock(mutex_);
        given_up_ = true;
        changed_.notify_all();
    }

  private:
    friend class LoopbackComm;
    struct Message {
        const void* data;
        size_t num_bytes;
        cudaEvent_t ready;  // on the sender's stream
    };
    using Ends = std::pair<int, int>;  // (from, to)

    // Of messages that are on their way, and of their acknowledgements. All are made before the ranks start, as their
    // memory is: nothing is created beside running kernels.
    static constexpr int NUM_EVENTS = 2048;
    // To be given back by wait.
    cudaEvent_t record(cudaStream_t stream) {
        const std::lock_guard<std::mutex> lock(mutex_);
        CHECK(!free_events_.empty(), "loopback: more than %d messages are on their way", NUM_EVENTS);
        const cudaEvent_t event = free_events_.back();
        free_events_.pop_back();
        CUDA_CHECK(cudaEventRecord(event, stream));
        return event;
    }
    // What the stream waits for is settled when this returns, so that the event may be recorded anew.
    void wait(cudaStream_t stream, cudaEvent_t event) {
        const std::lock_guard<std::mutex> lock(mutex_);
        CUDA_CHECK(cudaStreamWaitEvent(stream, event));
        free_events_.push_back(event);
    }
    template <class Item>
    void push(std::map<Ends, std::queue<Item>>& queues, Ends ends, const Item& item) {
        const std::lock_guard<std::mutex> lock(mutex_);
        queues[ends].push(item);
        changed_.notify_all();
    }
    template <class Item>
    Item pop(std::map<Ends, std::queue<Item>>& queues, Ends ends) {
        std::unique_lock<std::mutex> lock(mutex_);
        const bool came =
            changed_.wait_for(lock, std::chrono::seconds(30), [&] { return given_up_ || !queues[ends].empty(); });
        CHECK(came && !given_up_, "loopback: rank %d waits in vain for rank %d", ends.second, ends.first);
        const Item item = queues[ends].front();
        queues[ends].pop();
        return item;
    }

    int size_;
    std::mutex mutex_;
    std::condition_variable changed_;
    bool given_up_ = false;
    std::map<Ends, std::queue<Message>> messages_;
    std::map<Ends, std::queue<cudaEvent_t>> received_;  // acknowledged to the sender
    std::vector<CudaEvent> events_;
    std::vector<cudaEvent_t> free_events_;
};

class LoopbackComm : public Comm {
  public:
    // delay_cycles: before the data is taken, on the receiver's stream.
    LoopbackComm(LoopbackHub& hub, int rank, int64_t delay_cycles)
        : Comm(rank, hub.size()), hub_(hub), delay_cycles_(delay_cycles) {}
    int64_t bytes_received() const { return bytes_received_; }  // from other ranks, by the calls so far

    // Here what is received may also go to host memory.
    void exchange(const std::vector<DeviceSend>& sends, const std::vector<DeviceReceive>& receives,
                  const char* operation, cudaStream_t stream) override {
        for (const DeviceSend& s : sends) {
            hub_.push(hub_.messages_, {rank(), s.peer}, LoopbackHub::Message{s.data, s.num_bytes, hub_.record(stream)});
        }
        if (delay_cycles_ > 0) {
            delay_kernel<<<1, 1, 0, stream>>>(delay_cycles_);
            CUDA_CHECK_LAUNCH();
        }
        for (const DeviceReceive& r : receives) {
            const LoopbackHub::Message message = hub_.pop(hub_.messages_, {r.peer, rank()});
            CHECK(message.num_bytes == r.num_bytes, "loopback, %s: rank %d sends %zu bytes where rank %d expects %zu",
                  operation, r.peer, message.num_bytes, rank(), r.num_bytes);
            hub_.wait(stream, message.ready);
            CUDA_CHECK(cudaMemcpyAsync(r.data, message.data, r.num_bytes, cudaMemcpyDefault, stream));
            hub_.push(hub_.received_, {rank(), r.peer}, hub_.record(stream));
            bytes_received_ += r.peer == rank() ? 0 : (int64_t)r.num_bytes;
        }
        for (const DeviceSend& s : sends) {
            hub_.wait(stream, hub_.pop(hub_.received_, {s.peer, rank()}));
        }
    }
    void all_gather(void* out, const void* in, size_t num_bytes, const char* operation, cudaStream_t stream) override {
        all_gather_by_exchange(out, in, num_bytes, operation, stream);
    }
    void reduce_scatter_sum(float* out, const float* in, int64_t count, const char* operation,
                            cudaStream_t stream) override {
        sum_in_order(out, in, count, count, operation, stream);
    }
    void all_reduce_sum(float* data, int64_t count, const char* operation, cudaStream_t stream) override {
        sum_in_order(data, data, 0, count, operation, stream);
    }
    void all_reduce_sum(double* data, int64_t count, const char* operation, cudaStream_t stream) override {
        sum_in_order(data, data, 0, count, operation, stream);
    }

  private:
    // out (=) [count]: the sum, in the order of ranks, of what all of them have for this one; this one has in + i *
    // stride for rank i. On the host: what it adds is small.
    template <class Real>
    void sum_in_order(Real* out, const Real* in, int64_t stride, int64_t count, const char* operation,
                      cudaStream_t stream) {
        std::vector<Real> parts(size() * count);
        std::vector<DeviceSend> sends;
        std::vector<DeviceReceive> receives;
        for (int i = 0; i < size(); ++i) {
            sends.push_back({i, in + i * stride, count * sizeof(Real)});
            receives.push_back({i, parts.data() + i * count, count * sizeof(Real)});
        }
        exchange(sends, receives, operation, stream);
        CUDA_CHECK(cudaStreamSynchronize(stream));
        for (int64_t i = 0; i < count; ++i) {
            for (int r = 1; r < size(); ++r) {
                parts[i] += parts[r * count + i];
            }
        }
        CUDA_CHECK(cudaMemcpyAsync(out, parts.data(), count * sizeof(Real), cudaMemcpyHostToDevice, stream));
        CUDA_CHECK(cudaStreamSynchronize(stream));
    }

    LoopbackHub& hub_;
    int64_t delay_cycles_;
    int64_t bytes_received_ = 0;
};

// The ranks of one case. Each has a Work of its own: its memory on the GPU, its stream, the object that is tested. All
// are made before the first rank's thread starts and outlive the last one's end: an allocation or a free may wait for
// other ranks' kernels, which hides dependencies that are missing, and what a rank that failed has sent may still be
// copied.
template <class Work>
class LoopbackRanks {
  public:
    // Every rank's work is Work(comm, arguments...). delay_cycles: as LoopbackComm's.
    template <class... Arguments>
    LoopbackRanks(int size, int64_t delay_cycles, const Arguments&... arguments) : hub_(size) {
        for (int rank = 0; rank < size; ++rank) {
            comms_.push_back(std::make_unique<LoopbackComm>(hub_, rank, delay_cycles));
            work_.push_back(std::make_unique<Work>(*comms_.back(), arguments...));
        }
        CUDA_CHECK(cudaDeviceSynchronize());  // buffers hold what they begin with
    }

    // Runs body(work) of every rank in a thread of its own, and waits for all that they enqueued. Throws what the first
    // of them threw. To be called once.
    void run(const std::function<void(Work&)>& body) {
        int device;
        CUDA_CHECK(cudaGetDevice(&device));
        std::vector<std::thread> threads;
        std::mutex mutex;
        std::exception_ptr error;
        for (const std::unique_ptr<Work>& work : work_) {
            threads.emplace_back([&] {
                try {
                    CUDA_CHECK(cudaSetDevice(device));
                    body(*work);
                } catch (...) {
                    const std::lock_guard<std::mutex> lock(mutex);
                    error = error ? error : std::current_exception();
                    hub_.give_up();
                }
            });
        }
        for (std::thread& thread : threads) {
            thread.join();
        }
        const cudaError_t status = cudaDeviceSynchronize();
        if (error) {
            std::rethrow_exception(error);
        }
        CUDA_CHECK(status);
    }
    const std::vector<std::unique_ptr<Work>>& work() const { return work_; }  // of each rank

  private:
    LoopbackHub hub_;
    std::vector<std::unique_ptr<LoopbackComm>> comms_;
    std::vector<std::unique_ptr<Work>> work_;
};

// What the ranks of one sequence must send each other at least, counted row by row: a rank needs every key before its
// last query that it does not hold, and whoever holds a key needs a float32 gradient of it from every rank that saw it.
struct LeastExchange {
    int64_t rows = 0;  // of a sequence, over all ranks

    LeastExchange(int W, int64_t T) {
        for (int rank = 0; rank < W; ++rank) {
            const ContextPartition p = make_context_partition(T, W, rank);
            const int64_t last_query = p.position(p.local_rows() - 1);
            for (int64_t key = 0; key <= last_query; ++key) {
                rows += !p.local_row(key);
            }
        }
    }
    int64_t forward_bytes(int B, int Hkv, int D) const { return B * rows * 2 * Hkv * D * (int64_t)sizeof(bf16); }
    int64_t backward_bytes(int B, int Hkv, int D) const {
        return forward_bytes(B, Hkv, D) + B * rows * 2 * Hkv * D * (int64_t)sizeof(float);
    }
};
// Bytes that all ranks received in a layer's forward and backward.
struct ExchangedBytes {
    int64_t forward = 0, backward = 0;
};
// One check: no more than the least, in either pass; and no less, which would be a miscount.
inline void expect_least_bytes(Harness& h, const std::string& label, const ExchangedBytes& found,
                               const ExchangedBytes& least) {
    h.expect(found.forward == least.forward && found.backward == least.backward, "bytes a layer", label,
             format_string("forward %lld, backward %lld: %.4f and %.4f of the least", (long long)found.forward,
                           (long long)found.backward, (double)found.forward / (double)least.forward,
                           (double)found.backward / (double)least.backward));
}
