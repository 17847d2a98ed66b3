// comm_peer.cuh: copies between the GPUs of one host by their copy engines: no multiprocessor works for them, where
// NCCL's blocks hold some, wait until some are free, and are slower beside a computation (dev/RESULTS.md, "By copy
// engines"). Used by comm_nccl.cuh for large transfers into memory that ranks have shared (PeerMemory); the rest is
// NCCL's.
//
// A rank's memory is mapped into the processes of its host (CUDA IPC), and the sender writes. For every transfer the
// receiver's host tells the sender's where it goes; hosts run ahead of their GPUs, so that this waits for nothing but
// the other host. On the GPUs two counts in memory of either rank keep order, written and waited for by the streams
// themselves (cuStreamWriteValue32, cuStreamWaitValue32):
//   ready  the receiver's stream has come so far: its memory may be written
//   done   the sender's copies are complete
// Of a call first all ready counts are written, then the copies wait for theirs, and last the stream waits for what
// others send. Calls of a communicator follow one another in the order in which they were enqueued, on whatever
// streams. All ranks make all calls, of all communicators together, in the same order: so hosts meet, and what was
// enqueued earliest can always go on, also where streams share a queue of the hardware. Checked by
// dev/cuda/peer_copies.cu.
#pragma once
#include <cudaTypedefs.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "comm.cuh"  // messages, ranks on the host

// ---- the driver --------------------------------------------------------------------------------
inline void driver_check(CUresult status, const char* what) {
    CHECK(status == CUDA_SUCCESS, "CUDA driver error %d from %s", (int)status, what);
}
// *count (=) value, once what is on `stream` before is done and visible everywhere.
inline CUresult try_stream_write_count(cudaStream_t stream, uint32_t* count, uint32_t value) {
    static const auto write = driver_function<PFN_cuStreamWriteValue32_v11070>("cuStreamWriteValue32", 11070);
    return write(stream, (CUdeviceptr)count, value, CU_STREAM_WRITE_VALUE_DEFAULT);
}
inline void stream_write_count(cudaStream_t stream, uint32_t* count, uint32_t value) {
    driver_check(try_stream_write_count(stream, count, value), "cuStreamWriteValue32");
}
// What follows on `stream` waits until *count has reached value, and sees what others wrote before they wrote that;
// counts may wrap around.
inline void stream_wait_count(cudaStream_t stream, uint32_t* count, uint32_t value) {
    static const auto wait = driver_function<PFN_cuStreamWaitValue32_v11070>("cuStreamWaitValue32", 11070);
    static const unsigned flush = [] {  // where the driver does not offer it, writes arrive in order without
        int device, can_flush;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&can_flush, cudaDevAttrCanFlushRemoteWrites, device));
        return can_flush ? (unsigned)CU_STREAM_WAIT_VALUE_FLUSH : 0u;
    }();
    driver_check(wait(stream, (CUdeviceptr)count, value, CU_STREAM_WAIT_VALUE_GEQ | flush), "cuStreamWaitValue32");
}

// ---- sums --------------------------------------------------------------------------------------
constexpr int PEER_SUM_THREADS = 256;

// out (=) [count]: `own`, of rank `rank`, and the parts of all others, [num_ranks - 1, count], added in the order of
// ranks. out may be own. Launch: 1-D grid, a thread four elements at a time. Bound: bandwidth.
__global__ void __launch_bounds__(PEER_SUM_THREADS)
    peer_sum_kernel(float* out, const float* own, const float* parts, int rank, int num_ranks, int64_t count) {
    const int64_t stride = (int64_t)gridDim.x * PEER_SUM_THREADS * 4;
    for (int64_t i = ((int64_t)blockIdx.x * PEER_SUM_THREADS + threadIdx.x) * 4; i < count; i += stride) {
        const auto of_rank = [&](int r) { return r == rank ? own + i : parts + (r - (r > rank)) * count + i; };
        float4x sum = load128(of_rank(0));
        for (int r = 1; r < num_ranks; ++r) {
            const float4x part = load128(of_rank(r));
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                sum[e] += part[e];
            }
        }
        store128(out + i, sum);
    }
}
// count: a multiple of 4; all 16-byte aligned.
inline void peer_sum(float* out, const float* own, const float* parts, int rank, int num_ranks, int64_t count,
                     cudaStream_t stream) {
    constexpr int64_t MOST_BLOCKS = 1024;
    CHECK(count % 4 == 0, "sum over ranks: %lld elements, not a multiple of 4", (long long)count);
    const int64_t blocks = std::min<int64_t>(ceil_div<int64_t>(count, 4 * PEER_SUM_THREADS), MOST_BLOCKS);
    peer_sum_kernel<<<(unsigned)blocks, PEER_SUM_THREADS, 0, stream>>>(out, own, parts, rank, num_ranks, count);
    CUDA_CHECK_LAUNCH();
}

// ---- memory that ranks of a host share ---------------------------------------------------------
class PeerMemory {
  public:
    struct Place {           // in what a rank has shared
        int32_t range = -1;  // -1: it is not shared
        int64_t offset = 0;
    };

    using Pair = std::pair<int, int>;  // of ranks

    // Maps what the ranks of this host share, each any number of ranges of device memory. All ranks of `host` call it.
    // num_communicators: for how many counts are kept. left_out: for tests, pairs that are taken not to reach each
    // other.
    PeerMemory(HostComm& host, const std::vector<DeviceRange>& ranges, int num_communicators,
               const std::vector<Pair>& left_out = {})
        : host_(host),
          ranges_(ranges),
          num_counts_((size_t)num_communicators * host.size()),
          token_((uint64_t)std::random_device()() << 32 | std::random_device()()),
          counts_(std::max(OWN_ALLOCATION, num_counts_ * sizeof(Counts) + sizeof token_)),
          peers_(host.size()) {
        CUDA_CHECK(cudaMemset(counts_.data(), 0, num_counts_ * sizeof(Counts)));
        CUDA_CHECK(cudaMemcpy(token_in(counts_.data()), &token_, sizeof token_, cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaDeviceSynchronize());  // others read both as soon as they know of them
        const std::vector<std::string> offers =
            HostGroup(host).gather_texts(offer(), "sharing of GPU memory between ranks of a host");
        const size_t size = host.size();
        std::vector<unsigned char> opened(size);
        for (int rank = 0; rank < host.size(); ++rank) {
            const Pair pair = std::minmax(rank, host.rank());
            const bool may = std::find(left_out.begin(), left_out.end(), pair) == left_out.end();
            opened[rank] = rank != host.rank() && may && open(rank, offers[rank]);
        }
        // Every rank says the first rank's: where one does not reach another, that one may not know.
        const std::vector<std::string> obstacles =
            HostGroup(host).gather_texts(obstacle_, "sharing of GPU memory between ranks of a host");
        obstacle_.clear();
        for (int rank = 0; rank < host.size() && obstacle_.empty(); ++rank) {
            obstacle_ = obstacles[rank].empty() ? "" : format_string("rank %d: %s", rank, obstacles[rank].c_str());
        }
        reached_.resize(size * size);
        HostGroup(host).all_gather(reached_.data(), opened.data(), size, "which GPUs reach each other");
        for (size_t a = 0; a < size; ++a) {  // a pair does when both can
            for (size_t b = 0; b < a; ++b) {
                reached_[a * size + b] = reached_[b * size + a] = reached_[a * size + b] && reached_[b * size + a];
            }
        }
    }
    PeerMemory(const PeerMemory&) = delete;
    PeerMemory& operator=(const PeerMemory&) = delete;
    ~PeerMemory() { close(); }

    // Whether two ranks, any two, copy into each other's memory: the same answer everywhere.
    bool reach(int a, int b) const { return reached_[(size_t)a * host_.size() + b]; }
    int num_pairs_reached() const { return (int)std::count(reached_.begin(), reached_.end(), 1) / 2; }
    // Why the first rank that does not reach all others of its host does not, as CUDA says it; empty when all do. The
    // same on all ranks.
    const std::string& obstacle() const { return obstacle_; }

    Place place_of(const void* data, size_t num_bytes) const {
        const auto* const begin = static_cast<const std::byte*>(data);
        for (size_t i = 0; i < ranges_.size(); ++i) {
            if (begin >= ranges_[i].data && begin + num_bytes <= ranges_[i].data + ranges_[i].num_bytes) {
                return {(int32_t)i, begin - ranges_[i].data};
            }
        }
        return {};
    }
    std::byte* address(int rank, Place place) const { return peers_[rank].ranges[place.range] + place.offset; }

    // Of the rank `owner` and a communicator: what `writer` has to say to it.
    struct Counts {
        uint32_t ready, done;
    };
    Counts* counts(int owner, int communicator, int writer) const {
        std::byte* const all = owner == host_.rank() ? counts_.data() : peers_[owner].counts;
        return reinterpret_cast<Counts*>(all) + (size_t)communicator * host_.size() + writer;
    }

    // Unmaps everything. All ranks call it before any frees what it has shared; its copies must be over.
    void finish() {
        close();
        HostGroup(host_).barrier("end of sharing GPU memory");
    }

  private:
    static constexpr size_t OWN_ALLOCATION = (size_t)2 << 20;  // smaller ones share what is mapped with others

    struct Handle {
        cudaIpcMemHandle_t handle;
        int64_t offset;  // of the range in the allocation that the handle stands for
    };
    struct Peer {
        std::vector<std::byte*> ranges;
        std::byte* counts = nullptr;
    };

    std::byte* token_in(std::byte* counts) const { return counts + num_counts_ * sizeof(Counts); }
    // Whether a call succeeded. It is no error of the run when not: NCCL does it then.
    bool succeeds(cudaError_t status, const char* call) {
        if (status == cudaSuccess) {
            return true;
        }
        cudaGetLastError();
        if (obstacle_.empty()) {
            obstacle_ = format_string("%s: %s", call, cudaGetErrorName(status));
        }
        return false;
    }
    // No value: this GPU or system shares no memory.
    std::optional<Handle> handle_of(const std::byte* data) {
        static const auto address_range = driver_function<PFN_cuMemGetAddressRange_v3020>("cuMemGetAddressRange", 3020);
        CUdeviceptr base;
        driver_check(address_range(&base, nullptr, (CUdeviceptr)data), "cuMemGetAddressRange");
        Handle handle{{}, (int64_t)((CUdeviceptr)data - base)};
        if (!succeeds(cudaIpcGetMemHandle(&handle.handle, reinterpret_cast<void*>(base)), "cudaIpcGetMemHandle")) {
            return {};
        }
        return handle;
    }
    // The token, handles of the counts and of all ranges; or nothing.
    std::string offer() {
        std::string text(reinterpret_cast<const char*>(&token_), sizeof token_);
        std::vector<const std::byte*> offered = {counts_.data()};
        for (const DeviceRange& range : ranges_) {
            offered.push_back(range.data);
        }
        for (const std::byte* data : offered) {
            const std::optional<Handle> handle = handle_of(data);
            if (!handle) {
                return "";
            }
            text.append(reinterpret_cast<const char*>(&*handle), sizeof *handle);
        }
        return text;
    }
    // Whether all that a rank offers could be mapped, and is what the rank has there.
    bool open(int rank, const std::string& offer) {
        const std::vector<std::string>& machines = host_.identity().machines;
        if (machines[rank] != machines[host_.rank()] || offer.empty()) {
            return false;
        }
        const char* next = offer.data();
        uint64_t token, found = 0;
        std::memcpy(&token, next, sizeof token);
        next += sizeof token;
        Peer& peer = peers_[rank];
        for (int i = 0; next < offer.data() + offer.size(); ++i, next += sizeof(Handle)) {
            Handle handle;
            std::memcpy(&handle, next, sizeof handle);
            std::byte* const base = map(handle.handle);
            if (base == nullptr) {
                return false;
            }
            if (i == 0) {
                peer.counts = base + handle.offset;
            } else {
                peer.ranges.push_back(base + handle.offset);
            }
        }
        CUDA_CHECK(cudaMemcpy(&found, token_in(peer.counts), sizeof found, cudaMemcpyDefault));
        if (found != token && obstacle_.empty()) {
            obstacle_ = "what cudaIpcOpenMemHandle gives is other memory";
        }
        return found == token;
    }
    // Once an allocation, however many ranges lie in it; nullptr: this GPU does not reach it.
    std::byte* map(const cudaIpcMemHandle_t& handle) {
        const std::string key(reinterpret_cast<const char*>(&handle), sizeof handle);
        if (const auto known = mapped_.find(key); known != mapped_.end()) {
            return known->second;
        }
        void* base = nullptr;
        if (!succeeds(cudaIpcOpenMemHandle(&base, handle, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle")) {
            return nullptr;
        }
        return mapped_[key] = static_cast<std::byte*>(base);
    }
    void close() {
        for (const auto& [key, base] : mapped_) {
            cudaIpcCloseMemHandle(base);
        }
        mapped_.clear();
    }

    HostComm& host_;
    std::vector<DeviceRange> ranges_;
    size_t num_counts_;
    uint64_t token_;       // by which others see that what they have mapped is this
    DeviceMemory counts_;  // [communicators, ranks] Counts, then the token
    std::vector<Peer> peers_;
    std::map<std::string, std::byte*> mapped_;
    std::vector<unsigned char> reached_;  // [ranks, ranks], 1 or 0
    std::string obstacle_;
};

// ---- the copies of a communicator --------------------------------------------------------------
class PeerCopies {
  public:
    // communicator: its number among those that `memory` keeps counts for. group: its ranks.
    PeerCopies(PeerMemory& memory, HostGroup group, int communicator)
        : memory_(memory),
          group_(std::move(group)),
          communicator_(communicator),
          all_reach_(group_.size() > 1),
          ready_(group_.size()),
          done_(group_.size()) {
        for (int a = 0; a < group_.size(); ++a) {
            for (int b = 0; b < a; ++b) {
                all_reach_ = all_reach_ && reaches(a, b);
            }
        }
    }

    // What a call copies, and what is left to others.
    struct Round {
        struct Copy {
            int peer;
            std::byte* to;  // in the peer's memory
            const void* from;
            size_t num_bytes;
        };
        std::vector<Copy> copies;
        std::vector<int> sources;  // ranks that copy into this one's memory
        std::vector<DeviceSend> other_sends;
        std::vector<DeviceReceive> other_receives;

        bool copies_nothing() const { return copies.empty() && sources.empty(); }
    };

    // Agrees with the other ranks' hosts on what is copied: what is large enough, between GPUs that reach each other,
    // into shared memory. All ranks call it in the same order.
    Round agree(const std::vector<DeviceSend>& sends, const std::vector<DeviceReceive>& receives,
                const char* operation) const {
        const auto may_be_copied = [&](const auto& message) {
            return message.num_bytes >= LEAST_BYTES && message.peer != group_.rank() &&
                   reaches(group_.rank(), message.peer);
        };
        Round round;
        std::vector<std::vector<Landing>> told(group_.size()), heard(group_.size());
        for (const DeviceReceive& receive : receives) {
            if (may_be_copied(receive)) {
                const PeerMemory::Place place = memory_.place_of(receive.data, receive.num_bytes);
                told[receive.peer].push_back({place, receive.num_bytes});
                if (place.range >= 0) {
                    if (std::find(round.sources.begin(), round.sources.end(), receive.peer) == round.sources.end()) {
                        round.sources.push_back(receive.peer);
                    }
                    continue;
                }
            }
            round.other_receives.push_back(receive);
        }
        for (const DeviceSend& send : sends) {
            if (may_be_copied(send)) {
                heard[send.peer].emplace_back();
            }
        }
        tell(told, heard, operation);
        std::vector<size_t> next(group_.size());
        for (const DeviceSend& send : sends) {
            if (may_be_copied(send)) {
                const Landing& landing = heard[send.peer][next[send.peer]++];
                CHECK(landing.num_bytes == send.num_bytes, "%s: sends rank %d %zu bytes where it expects %zu",
                      group_.comm().identity().where(operation).c_str(), group_.world_rank(send.peer), send.num_bytes,
                      (size_t)landing.num_bytes);
                if (landing.place.range >= 0) {
                    std::byte* const to = memory_.address(group_.world_rank(send.peer), landing.place);
                    round.copies.push_back({send.peer, to, send.data, send.num_bytes});
                    continue;
                }
            }
            round.other_sends.push_back(send);
        }
        // Beginning with the next rank: so that not all write to the same one.
        std::stable_sort(round.copies.begin(), round.copies.end(), [&](const Round::Copy& a, const Round::Copy& b) {
            return distance_to(a.peer) < distance_to(b.peer);
        });
        return round;
    }

    // Enqueues what this rank sends.
    void send(const Round& round, cudaStream_t stream) {
        if (round.copies_nothing()) {
            return;
        }
        CUDA_CHECK(cudaStreamWaitEvent(stream, last_));
        for (const int source : round.sources) {
            stream_write_count(stream, &written_at(source)->ready, ++ready_[source].written);
        }
        for (size_t i = 0; i < round.copies.size(); ++i) {
            const Round::Copy& copy = round.copies[i];
            const bool first = i == 0 || round.copies[i - 1].peer != copy.peer;
            const bool last = i + 1 == round.copies.size() || round.copies[i + 1].peer != copy.peer;
            if (first) {
                stream_wait_count(stream, &read_from(copy.peer)->ready, ++ready_[copy.peer].read);
            }
            CUDA_CHECK(cudaMemcpyAsync(copy.to, copy.from, copy.num_bytes, cudaMemcpyDefault, stream));
            if (last) {
                stream_write_count(stream, &written_at(copy.peer)->done, ++done_[copy.peer].written);
            }
        }
    }
    // Enqueues the wait for what other ranks send.
    void receive(const Round& round, cudaStream_t stream) {
        if (round.copies_nothing()) {
            return;
        }
        for (const int source : round.sources) {
            stream_wait_count(stream, &read_from(source)->done, ++done_[source].read);
        }
        CUDA_CHECK(cudaEventRecord(last_, stream));
    }

    // Lets what waits here now go on, with whatever is there: when the job has failed, so also where CUDA has. The host
    // waits for nothing; whether `stream` does, behind what waits in the same queue of the hardware, is CUDA's affair.
    void release(cudaStream_t stream) const noexcept {
        constexpr uint32_t AHEAD = 1u << 30;
        for (int rank = 0; rank < group_.size(); ++rank) {
            try_stream_write_count(stream, &read_from(rank)->ready, ready_[rank].read + AHEAD);
            try_stream_write_count(stream, &read_from(rank)->done, done_[rank].read + AHEAD);
        }
    }

    // Whether the communicator's ranks, two or more, all reach each other: the same answer on all of them.
    bool all_reach() const { return all_reach_; }

    // Smaller messages are NCCL's: it takes as long for one as the counts alone would here.
    static constexpr size_t LEAST_BYTES = (size_t)64 << 10;

  private:
    struct Landing {  // where a message is to go, as hosts say it to each other
        PeerMemory::Place place;
        uint64_t num_bytes = 0;
    };
    struct Count {
        uint32_t written = 0, read = 0;
    };

    void tell(const std::vector<std::vector<Landing>>& told, std::vector<std::vector<Landing>>& heard,
              const char* operation) const {
        std::vector<HostSend> sends;
        std::vector<HostReceive> receives;
        for (int rank = 0; rank < group_.size(); ++rank) {
            if (!told[rank].empty()) {
                sends.push_back({rank, told[rank].data(), told[rank].size() * sizeof(Landing)});
            }
            if (!heard[rank].empty()) {
                receives.push_back({rank, heard[rank].data(), heard[rank].size() * sizeof(Landing)});
            }
        }
        if (!sends.empty() || !receives.empty()) {
            group_.exchange(sends, receives, operation);
        }
    }
    bool reaches(int a, int b) const { return memory_.reach(group_.world_rank(a), group_.world_rank(b)); }
    int distance_to(int rank) const { return (rank - group_.rank() + group_.size()) % group_.size(); }
    PeerMemory::Counts* written_at(int rank) const {
        return memory_.counts(group_.world_rank(rank), communicator_, group_.world_rank(group_.rank()));
    }
    PeerMemory::Counts* read_from(int rank) const {
        return memory_.counts(group_.world_rank(group_.rank()), communicator_, group_.world_rank(rank));
    }

    PeerMemory& memory_;
    HostGroup group_;
    int communicator_;
    bool all_reach_;
    std::vector<Count> ready_, done_;  // of each rank: what this one has written there, and waits to read from it
    CudaEvent last_;                   // the end of the last call
};
