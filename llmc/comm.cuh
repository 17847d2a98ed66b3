// comm.cuh: tensors between the GPUs of ranks that train together: one small interface, and what opens it.
//   auto   comm_nccl.cuh: in production, one GPU a rank (compiled in with LLMC_NCCL): large transfers between GPUs of a
//          host by their copy engines (comm_peer.cuh), all others by NCCL
//   nccl   the same file: all by NCCL
//   host   here: every call staged through page-locked host memory and the ranks' host transport (comm.h): several
//          ranks can share one GPU or run where NCCL is absent. For tests and debugging: the host waits in every call.
// Calls are enqueued on a stream like kernels: they start when what was enqueued before is done. Sums are float32 or
// double; by copy engines and with `host` they are added in the order of ranks, by NCCL in an order fixed by its
// topology.
// All ranks of a communicator make the same calls in the same order, and of several communicators together: with `auto`
// a large one returns when the hosts of those that send and receive have come to it, too. A call names its operation
// for error messages.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "comm.h"               // ranks on the host
#include "config.h"             // the transport asked for
#include "context_partition.h"  // the mesh
#include "memory.cuh"           // pinned memory

// ---- the interface -----------------------------------------------------------------------------
struct DeviceSend {
    int peer;  // rank of the communicator; this rank's own is allowed
    const void* data;
    size_t num_bytes;
};
struct DeviceReceive {
    int peer;
    void* data;
    size_t num_bytes;
};

class Comm {
  public:
    virtual ~Comm() = default;
    int rank() const { return rank_; }
    int size() const { return size_; }

    // The n-th send to a rank meets that rank's n-th receive from this one. All are in flight together; both lists may
    // be empty. No buffer may overlap one that is received into.
    virtual void exchange(const std::vector<DeviceSend>& sends, const std::vector<DeviceReceive>& receives,
                          const char* operation, cudaStream_t stream) = 0;
    // out (=) [count]: the sum over ranks of this rank's part of `in` [size, count]. out may be that part of in; the
    // other parts of in are left as they are.
    virtual void reduce_scatter_sum(float* out, const float* in, int64_t count, const char* operation,
                                    cudaStream_t stream) = 0;
    // out (=) [size, num_bytes]: every rank's `in` [num_bytes], which may be its place in out.
    virtual void all_gather(void* out, const void* in, size_t num_bytes, const char* operation,
                            cudaStream_t stream) = 0;
    // data (=) [count], the sum over ranks. For few elements.
    virtual void all_reduce_sum(float* data, int64_t count, const char* operation, cudaStream_t stream) = 0;
    virtual void all_reduce_sum(double* data, int64_t count, const char* operation, cudaStream_t stream) = 0;

  protected:
    Comm(int rank, int size) : rank_(rank), size_(size) {}

    // all_gather as one exchange of all ranks with all.
    void all_gather_by_exchange(void* out, const void* in, size_t num_bytes, const char* operation,
                                cudaStream_t stream) {
        std::byte* const all = static_cast<std::byte*>(out);
        std::byte* const own = all + rank() * num_bytes;
        if (own != in) {
            CUDA_CHECK(cudaMemcpyAsync(own, in, num_bytes, cudaMemcpyDeviceToDevice, stream));
        }
        std::vector<DeviceSend> sends;
        std::vector<DeviceReceive> receives;
        for (int peer = 0; peer < size(); ++peer) {
            if (peer != rank()) {
                sends.push_back({peer, own, num_bytes});
                receives.push_back({peer, all + peer * num_bytes, num_bytes});
            }
        }
        exchange(sends, receives, operation, stream);
    }

  private:
    int rank_, size_;
};

// ---- through the host --------------------------------------------------------------------------
class HostStagedComm : public Comm {
  public:
    explicit HostStagedComm(HostGroup group) : Comm(group.rank(), group.size()), group_(std::move(group)) {}

    void exchange(const std::vector<DeviceSend>& sends, const std::vector<DeviceReceive>& receives,
                  const char* operation, cudaStream_t stream) override {
        std::vector<HostSend> host_sends;
        std::vector<HostReceive> host_receives;
        size_t num_bytes = 0;
        for (const DeviceSend& s : sends) {
            num_bytes += s.num_bytes;
        }
        for (const DeviceReceive& r : receives) {
            num_bytes += r.num_bytes;
        }
        std::byte* next = stage(num_bytes);
        for (const DeviceSend& s : sends) {
            copy(next, s.data, s.num_bytes, stream);
            host_sends.push_back({s.peer, next, s.num_bytes});
            next += s.num_bytes;
        }
        for (const DeviceReceive& r : receives) {
            host_receives.push_back({r.peer, next, r.num_bytes});
            next += r.num_bytes;
        }
        CUDA_CHECK(cudaStreamSynchronize(stream));
        group_.exchange(host_sends, host_receives, operation);
        for (size_t i = 0; i < receives.size(); ++i) {
            copy(receives[i].data, host_receives[i].data, receives[i].num_bytes, stream);
        }
        CUDA_CHECK(cudaStreamSynchronize(stream));
    }

    void reduce_scatter_sum(float* out, const float* in, int64_t count, const char* operation,
                            cudaStream_t stream) override {
        float* const parts = reinterpret_cast<float*>(stage((size() + 1) * count * sizeof(float)));
        float* const sum = parts + size() * count;
        copy(parts, in, size() * count * sizeof(float), stream);
        CUDA_CHECK(cudaStreamSynchronize(stream));
        group_.reduce_scatter_sum(sum, parts, count, operation);
        copy(out, sum, count * sizeof(float), stream);
        CUDA_CHECK(cudaStreamSynchronize(stream));
    }

    void all_gather(void* out, const void* in, size_t num_bytes, const char* operation, cudaStream_t stream) override {
        std::byte* const all = stage(size() * num_bytes);
        std::byte* const own = all + rank() * num_bytes;
        copy(own, in, num_bytes, stream);
        CUDA_CHECK(cudaStreamSynchronize(stream));
        group_.all_gather(all, own, num_bytes, operation);
        copy(out, all, size() * num_bytes, stream);
        CUDA_CHECK(cudaStreamSynchronize(stream));
    }

    void all_reduce_sum(float* data, int64_t count, const char* operation, cudaStream_t stream) override {
        reduce(data, count, operation, stream);
    }
    void all_reduce_sum(double* data, int64_t count, const char* operation, cudaStream_t stream) override {
        reduce(data, count, operation, stream);
    }

  private:
    template <class Real>
    void reduce(Real* data, int64_t count, const char* operation, cudaStream_t stream) {
        Real* const staged = reinterpret_cast<Real*>(stage(count * sizeof(Real)));
        copy(staged, data, count * sizeof(Real), stream);
        CUDA_CHECK(cudaStreamSynchronize(stream));
        group_.all_reduce_sum(staged, count, operation);
        copy(data, staged, count * sizeof(Real), stream);
        CUDA_CHECK(cudaStreamSynchronize(stream));
    }
    static void copy(void* to, const void* from, size_t num_bytes, cudaStream_t stream) {
        CUDA_CHECK(cudaMemcpyAsync(to, from, num_bytes, cudaMemcpyDefault, stream));
    }
    // Page-locked memory, as large as the largest call so far. Every call waits for its copies, so it is free here.
    std::byte* stage(size_t num_bytes) {
        if (num_bytes > staged_bytes_) {
            staging_.reset();
            staging_ = std::make_unique<PinnedMemory<std::byte>>(num_bytes);
            staged_bytes_ = num_bytes;
        }
        return staging_ ? staging_->data() : nullptr;
    }

    HostGroup group_;
    std::unique_ptr<PinnedMemory<std::byte>> staging_;
    size_t staged_bytes_ = 0;
};

#ifdef LLMC_NCCL
#include "comm_nccl.cuh"
#endif

// ---- which GPU ---------------------------------------------------------------------------------
// The GPU of this rank (assign_devices). All ranks call it.
inline int choose_device(HostComm& host) {
    int num_devices = 0;
    const cudaError_t status = cudaGetDeviceCount(&num_devices);
    CHECK(status == cudaSuccess && num_devices > 0, "rank %d: no usable NVIDIA GPU on host %s: %s", host.rank(),
          host.identity().host_of(host.rank()).c_str(), cudaGetErrorString(status));
    std::string seen;
    for (int device = 0; device < num_devices; ++device) {
        cudaDeviceProp properties;
        CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
        seen.append(properties.uuid.bytes, sizeof properties.uuid);
    }
    return assign_devices(HostGroup(host).gather_texts(seen, "exchange of GPU names"), sizeof(cudaUUID_t))[host.rank()];
}
// Throws Error when two ranks share a GPU, which nccl refuses with less clear words. All ranks call it.
inline void check_devices_differ(HostComm& host, int device) {
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    std::vector<cudaUUID_t> all(host.size());
    HostGroup(host).all_gather(all.data(), &properties.uuid, sizeof properties.uuid, "exchange of GPU names");
    for (int i = 0; i < host.size(); ++i) {
        for (int j = 0; j < i; ++j) {
            CHECK(std::memcmp(&all[i], &all[j], sizeof all[i]) != 0,
                  "ranks %d and %d would share a GPU of host %s: start at most one rank a GPU, or use --comm_transport "
                  "host, which is slow and for tests",
                  j, i, host.identity().host_of(i).c_str());
        }
    }
}

// ---- a job's communicators ---------------------------------------------------------------------
// All ranks, and those that share this rank's sequence, where others do. These are a communicator of their own also
// where they are all ranks: of one communicator calls follow one another, and attention's would wait behind the sums of
// gradients that go on beside the backward. The current device must be this rank's.
class Communicators {
  public:
    Communicators(HostComm& host, const ParallelMesh& mesh, CommTransport transport)
        : host_(host), mesh_(mesh), transport_(transport) {
        const bool shares_sequences = mesh.context_parallel > 1;
        if (transport == CommTransport::host) {
            world_ = std::make_unique<HostStagedComm>(HostGroup(host));
            if (shares_sequences) {
                context_ = std::make_unique<HostStagedComm>(HostGroup(host, mesh.context_group()));
            }
            return;
        }
#ifdef LLMC_NCCL
        int device;
        CUDA_CHECK(cudaGetDevice(&device));
        check_devices_differ(host, device);
        nccl_ = std::make_unique<NcclJob>(host);
        world_ = nccl_->open_world();
        if (shares_sequences) {
            context_ = nccl_->split(mesh.data_rank(), mesh.context_rank());
        }
#else
        fail(
            "several ranks, but built without NCCL: install it (Debian, Ubuntu: libnccl-dev) and build again, or use "
            "--comm_transport host, which is slow and for tests");
#endif
    }

    Comm& world() const { return *world_; }
    Comm& context() const {
        CHECK(context_, "communicators: no other rank has this one's sequences");
        return *context_;
    }
    // The host waits until all ranks are here.
    void barrier(const std::string& operation) const { HostGroup(host_).barrier(operation); }
    // With `auto`: what comes into these ranges of device memory from now on may be copied there by the other GPUs of
    // the host. landing: one of them, or a part, for parts of the world's sums that are on their way. All ranks call
    // it, once; the memory must live until finish() or abandon().
    void share_memory([[maybe_unused]] const std::vector<DeviceRange>& ranges, [[maybe_unused]] DeviceRange landing) {
#ifdef LLMC_NCCL
        if (transport_ == CommTransport::automatic) {
            CHECK(!peers_, "communicators: memory is shared once");
            peers_ = std::make_unique<PeerMemory>(host_, ranges, context_ ? 2 : 1);
            static_cast<NcclComm&>(*world_).share(*peers_, HostGroup(host_), 0, landing);
            if (context_) {
                static_cast<NcclComm&>(*context_).share(*peers_, HostGroup(host_, mesh_.context_group()), 1, {});
            }
        }
#endif
    }
    // How tensors move, for the user.
    std::string description() const {
        if (transport_ == CommTransport::host) {
            return "through host memory";
        }
        std::string text = "by NCCL";
#ifdef LLMC_NCCL
        const int num_pairs = mesh_.size() * (mesh_.size() - 1) / 2, reached = peers_ ? peers_->num_pairs_reached() : 0;
        if (reached > 0) {
            text = "by the GPUs' copy engines";
        }
        if (reached > 0 && reached < num_pairs) {
            text += format_string(" between %d of %d pairs, by NCCL between the others", reached, num_pairs);
        }
        if (peers_ && !peers_->obstacle().empty()) {
            text += format_string(" (not all GPUs of a host reach each other; %s)", peers_->obstacle().c_str());
        }
#endif
        return text;
    }
    // Throws when a transfer has failed or is overdue. To be called where the host has waited for the device.
    void check() const {
#ifdef LLMC_NCCL
        if (nccl_) {
            nccl_->check();
        }
#endif
    }
    // This rank has failed, for this reason: lets go what waits for others here, which would keep memory from being
    // freed.
    void abandon([[maybe_unused]] const std::string& reason) {
#ifdef LLMC_NCCL
        if (nccl_) {
            nccl_->abandon(reason);
        }
#endif
    }
    // All ranks call it once, at the end of a run in which nothing failed, before they free what they have shared.
    void finish() {
#ifdef LLMC_NCCL
        if (nccl_) {
            nccl_->finish();
        }
        if (peers_) {
            peers_->finish();
        }
#endif
    }

  private:
    HostComm& host_;
    ParallelMesh mesh_;
    CommTransport transport_;
#ifdef LLMC_NCCL
    std::unique_ptr<PeerMemory> peers_;  // outlives the communicators' copies
    std::unique_ptr<NcclJob> nccl_;      // and this its communicators
#endif
    std::unique_ptr<Comm> world_, context_;  // context_ null: no other rank has this one's sequences
};

// Declared after what owns shared memory: where finish() is not reached, abandons the communicators before that memory
// is freed.
class CommunicatorsEnd {
  public:
    explicit CommunicatorsEnd(Communicators* comms) : comms_(comms) {}
    CommunicatorsEnd(const CommunicatorsEnd&) = delete;
    CommunicatorsEnd& operator=(const CommunicatorsEnd&) = delete;
    ~CommunicatorsEnd() { abandon("this rank has failed, and does not end"); }
    // With the text of the error that is on its way, while it can be told: the process may be ended before main is
    // reached.
    void abandon(const std::string& reason) {
        if (comms_ != nullptr) {
            comms_->abandon(reason);
            comms_ = nullptr;
        }
    }
    void finish() {
        if (comms_ != nullptr) {
            comms_->finish();
            comms_ = nullptr;
        }
    }

  private:
    Communicators* comms_;  // null: one rank, or over
};
