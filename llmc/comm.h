// comm.h: processes that train together, seen from the host: who takes part, and how small host data moves between
// them. Tensors on GPUs move through comm.cuh. No CUDA here, so the whole of it is tested on CPUs.
//   comm_mpi.h  ranks started by mpirun or srun --mpi (compiled in with LLMC_MPI)
//   comm_tcp.h  ranks started by anything, that find each other at LLMC_RENDEZVOUS
// Both do one thing, exchange(): every rank names what it sends and what it receives, and returns when both are done.
// Everything else is built on it here, once: so sums are added in the order of ranks, whatever the transport.
// Nothing waits for ever: without progress for comm_timeout an exchange throws, naming rank, host, operation and step.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "check.h"
#include "host_memory.h"

// ---- who takes part ----------------------------------------------------------------------------
// What error messages say of this process; shared by everything that communicates.
struct CommIdentity {
    int rank = 0;
    int size = 1;
    std::vector<std::string> hosts;               // names, of every rank, once they are known
    std::vector<std::string> machines;            // and which machines those are: machine_id()
    std::map<std::string, int> in_memory_groups;  // how many ranks of this machine are in each (MemoryLimit)
    double timeout_seconds = 600.0;               // --comm_timeout: no progress for so long is a failure
    std::atomic<int64_t> step{-1};                // the training step; -1: before the first

    std::string host_of(int of_rank) const {
        return of_rank < (int)hosts.size() ? hosts[of_rank] : std::string("unknown host");
    }
    // "rank 3 (node1), all_gather of weights, step 17"
    std::string where(const std::string& operation) const {
        const int64_t at = step.load();
        return format_string("rank %d (%s), %s, %s", rank, host_of(rank).c_str(), operation.c_str(),
                             at < 0 ? "at start-up" : format_string("step %lld", (long long)at).c_str());
    }
};

inline std::string host_name() {
    char name[256] = {};
    return gethostname(name, sizeof name - 1) == 0 ? name : "unknown host";
}
// Names of hosts can be the same, or different in containers of one machine; this is the same in these alone.
inline std::string machine_id() {
    std::ifstream file("/proc/sys/kernel/random/boot_id");
    std::string id;
    std::getline(file, id);
    return id.empty() ? host_name() : id;
}

// ---- the transport's interface -----------------------------------------------------------------
struct HostSend {
    int peer;  // rank; this rank's own is allowed
    const void* data;
    size_t num_bytes;
};
struct HostReceive {
    int peer;
    void* data;
    size_t num_bytes;
};

class HostComm {
  public:
    virtual ~HostComm() = default;
    // The n-th send to a rank meets that rank's n-th receive from this one; their sizes must be equal. Data must not
    // overlap. Throws Error when a peer is gone, says something else than expected, or lets the time-out pass.
    virtual void exchange(const std::vector<HostSend>& sends, const std::vector<HostReceive>& receives,
                          const std::string& operation) = 0;
    // All ranks call it once, at the end of a run in which nothing failed.
    virtual void finish() {}

    int rank() const { return identity_->rank; }
    int size() const { return identity_->size; }
    CommIdentity& identity() const { return *identity_; }
    std::shared_ptr<CommIdentity> shared_identity() const { return identity_; }

  protected:
    HostComm(int rank, int size, double timeout_seconds) : identity_(std::make_shared<CommIdentity>()) {
        CHECK(size >= 1 && rank >= 0 && rank < size, "rank %d of %d ranks: there is no such rank", rank, size);
        CHECK(timeout_seconds > 0.0, "--comm_timeout %g: must be greater than 0 seconds", timeout_seconds);
        identity_->rank = rank, identity_->size = size, identity_->timeout_seconds = timeout_seconds;
    }

    // What a rank sends to itself. Transports leave these out of what they move.
    void exchange_with_self(const std::vector<HostSend>& sends, const std::vector<HostReceive>& receives,
                            const std::string& operation) const {
        size_t at = 0;
        const auto next_send = [&] {
            while (at < sends.size() && sends[at].peer != rank()) {
                ++at;
            }
            return at < sends.size() ? &sends[at++] : nullptr;
        };
        for (const HostReceive& receive : receives) {
            if (receive.peer == rank()) {
                const HostSend* const send = next_send();
                CHECK(send != nullptr && send->num_bytes == receive.num_bytes,
                      "%s: sends itself other data than it receives", identity_->where(operation).c_str());
                std::memcpy(receive.data, send->data, receive.num_bytes);
            }
        }
        CHECK(next_send() == nullptr, "%s: sends itself other data than it receives",
              identity_->where(operation).c_str());
    }

  private:
    std::shared_ptr<CommIdentity> identity_;
};

// The only rank there is.
class SingleComm : public HostComm {
  public:
    SingleComm() : HostComm(0, 1, 1.0) { identity().hosts = {host_name()}, identity().machines = {machine_id()}; }
    void exchange(const std::vector<HostSend>& sends, const std::vector<HostReceive>& receives,
                  const std::string& operation) override {
        exchange_with_self(sends, receives, operation);
    }
};

// ---- collectives -------------------------------------------------------------------------------
// Some of the ranks, in an order: the group's ranks are 0 .. size() - 1. All of them call the same functions in the
// same order.
class HostGroup {
  public:
    // All ranks.
    explicit HostGroup(HostComm& comm) : comm_(&comm), ranks_(comm.size()), rank_(comm.rank()) {
        std::iota(ranks_.begin(), ranks_.end(), 0);
    }
    // This rank must be one of them.
    HostGroup(HostComm& comm, std::vector<int> ranks) : comm_(&comm), ranks_(std::move(ranks)) {
        const auto found = std::find(ranks_.begin(), ranks_.end(), comm.rank());
        CHECK(found != ranks_.end(), "rank %d is not one of its group of %zu ranks", comm.rank(), ranks_.size());
        rank_ = (int)(found - ranks_.begin());
    }

    int rank() const { return rank_; }
    int size() const { return (int)ranks_.size(); }
    int world_rank(int rank) const { return ranks_[rank]; }
    HostComm& comm() const { return *comm_; }

    // As HostComm::exchange, between ranks of the group.
    void exchange(std::vector<HostSend> sends, std::vector<HostReceive> receives, const std::string& operation) const {
        for (HostSend& send : sends) {
            send.peer = ranks_[send.peer];
        }
        for (HostReceive& receive : receives) {
            receive.peer = ranks_[receive.peer];
        }
        comm_->exchange(sends, receives, operation);
    }

    // data (=) root's, everywhere.
    void broadcast(void* data, size_t num_bytes, int root, const std::string& operation) const {
        std::vector<HostSend> sends;
        std::vector<HostReceive> receives;
        if (rank_ == root) {
            for (int i = 0; i < size(); ++i) {
                if (i != root) {
                    sends.push_back({i, data, num_bytes});
                }
            }
        } else {
            receives.push_back({root, data, num_bytes});
        }
        exchange(sends, receives, operation);
    }

    // out (=) [size, num_bytes]: every rank's `in` [num_bytes]. `in` may be its place in out.
    void all_gather(void* out, const void* in, size_t num_bytes, const std::string& operation) const {
        unsigned char* const all = static_cast<unsigned char*>(out);
        unsigned char* const own = all + rank_ * num_bytes;
        if (own != in && num_bytes > 0) {
            std::memcpy(own, in, num_bytes);
        }
        std::vector<HostSend> sends;
        std::vector<HostReceive> receives;
        for (int i = 0; i < size(); ++i) {
            if (i != rank_) {
                sends.push_back({i, own, num_bytes});
                receives.push_back({i, all + i * num_bytes, num_bytes});
            }
        }
        exchange(sends, receives, operation);
    }

    // out (=) [count]: of `in` [size, count], the sum over ranks of this rank's part, added in the order of ranks. out
    // may be this rank's part of in; the other parts are left as they are.
    template <class Real>
    void reduce_scatter_sum(Real* out, const Real* in, int64_t count, const std::string& operation) const {
        const size_t num_bytes = count * sizeof(Real);
        std::vector<Real> parts((size_t)size() * count);
        std::vector<HostSend> sends;
        std::vector<HostReceive> receives;
        for (int i = 0; i < size(); ++i) {
            sends.push_back({i, in + i * count, num_bytes});
            receives.push_back({i, parts.data() + i * count, num_bytes});
        }
        exchange(sends, receives, operation);
        add_parts(out, parts.data(), size(), count);
    }

    // data (=) [count], the sum over ranks, added in the order of ranks: the same bits everywhere. For few elements:
    // everyone sends everything to everyone.
    template <class Real>
    void all_reduce_sum(Real* data, int64_t count, const std::string& operation) const {
        std::vector<Real> parts((size_t)size() * count);
        all_gather(parts.data(), data, count * sizeof(Real), operation);
        add_parts(data, parts.data(), size(), count);
    }

    // Nobody returns before all have come.
    void barrier(const std::string& operation) const {
        std::vector<unsigned char> all(size());
        const unsigned char here = 1;
        all_gather(all.data(), &here, 1, operation);
    }

    // root's text, everywhere.
    std::string broadcast_text(std::string text, int root, const std::string& operation) const {
        uint64_t num_bytes = text.size();
        broadcast(&num_bytes, sizeof num_bytes, root, operation);
        text.resize(num_bytes);
        broadcast(text.data(), num_bytes, root, operation);
        return text;
    }

    // Every rank's text, everywhere.
    std::vector<std::string> gather_texts(const std::string& text, const std::string& operation) const {
        std::vector<std::string> all(size());
        for (int i = 0; i < size(); ++i) {
            all[i] = broadcast_text(i == rank_ ? text : "", i, operation);
        }
        return all;
    }

    // Whether all ranks hold the same; for what must not differ, such as settings.
    bool all_equal(const std::string& text, const std::string& operation) const {
        int64_t different = broadcast_text(text, 0, operation) == text ? 0 : 1;
        all_reduce_sum(&different, 1, operation);
        return different == 0;
    }

  private:
    // out [count] (=) parts [num_parts, count] added in order.
    template <class Real>
    static void add_parts(Real* out, const Real* parts, int num_parts, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            Real sum = parts[i];
            for (int p = 1; p < num_parts; ++p) {
                sum += parts[p * count + i];
            }
            out[i] = sum;
        }
    }

    HostComm* comm_;
    std::vector<int> ranks_;
    int rank_;
};

// Tells everyone everyone's host: error messages name them from here on.
inline void exchange_hosts(HostComm& comm) {
    const HostGroup all(comm);
    comm.identity().hosts = all.gather_texts(host_name(), "exchange of host names");
    comm.identity().machines = all.gather_texts(machine_id(), "exchange of machines");
    std::string groups;
    for (const MemoryLimit& limit : memory_limits()) {
        groups += limit.group + "\n";
    }
    const std::vector<std::string> of_ranks = all.gather_texts(groups, "exchange of memory limits");
    const std::vector<std::string>& machines = comm.identity().machines;
    for (int rank = 0; rank < comm.size(); ++rank) {
        std::istringstream lines(machines[rank] == machines[comm.rank()] ? of_ranks[rank] : "");
        for (std::string group; std::getline(lines, group);) {
            ++comm.identity().in_memory_groups[group];
        }
    }
}

// Which of the GPUs that it sees each rank takes. seen: of every rank, the names of those, name_bytes each. One after
// the other, those that see fewest first, ranks take the first of theirs that the fewest before them have taken: so the
// ranks of a machine take its GPUs in turn, also where some see fewer or others.
inline std::vector<int> assign_devices(const std::vector<std::string>& seen, size_t name_bytes) {
    std::vector<size_t> order(seen.size());
    std::iota(order.begin(), order.end(), (size_t)0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return seen[a].size() < seen[b].size(); });
    std::map<std::string, int> num_taken;
    std::vector<int> devices(seen.size());
    for (const size_t rank : order) {
        const auto taken = [&](int device) -> int& {
            return num_taken[seen[rank].substr(device * name_bytes, name_bytes)];
        };
        for (int device = 1; device < (int)(seen[rank].size() / name_bytes); ++device) {
            devices[rank] = taken(device) < taken(devices[rank]) ? device : devices[rank];
        }
        ++taken(devices[rank]);
    }
    return devices;
}

// How many ranks share this rank's machine, itself included.
inline int num_ranks_on_machine(const CommIdentity& identity) {
    return (int)std::count(identity.machines.begin(), identity.machines.end(), identity.machines[identity.rank]);
}
