// ranks.h: the processes of a run, as everything on the host sees them: who this one is, and how all decide together.
// A run of one process is the same with one rank: nothing is sent, nothing waits.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "comm.h"               // processes on the host
#include "context_partition.h"  // the mesh

// What the user is to know where ranks that share sequences lie on more machines than they would had each machine's
// ranks successive numbers: nothing where they do not. machines: of every rank.
inline std::string placement_warning(const std::vector<std::string>& machines, int context_parallel) {
    std::vector<std::string> in_blocks;
    for (const std::string& machine : machines) {
        if (std::find(in_blocks.begin(), in_blocks.end(), machine) == in_blocks.end()) {
            in_blocks.insert(in_blocks.end(), std::count(machines.begin(), machines.end(), machine), machine);
        }
    }
    const auto mean_of_groups = [&](const std::vector<std::string>& of_ranks) {
        size_t sum = 0;
        for (auto first = of_ranks.begin(); first != of_ranks.end(); first += context_parallel) {
            sum += std::set<std::string>(first, first + context_parallel).size();
        }
        return (double)sum * context_parallel / (double)of_ranks.size();
    };
    const double now = mean_of_groups(machines), in_order = mean_of_groups(in_blocks);
    return now <= in_order
               ? ""
               : format_string(
                     "--context_parallel %d: the ranks that share a sequence lie on %.3g machines (the mean of all "
                     "groups), and on %.3g if those of a machine had successive numbers; what they exchange in every "
                     "layer goes over the network: start them with mpirun --map-by slot or srun --distribution=block",
                     context_parallel, now, in_order);
}

class RunRanks {
  public:
    // This process alone.
    RunRanks() : alone_(std::make_unique<SingleComm>()), world_(*alone_) {}
    // All ranks of `comm`, which outlives this. Throws Error when context_parallel does not divide them.
    RunRanks(HostComm& comm, int context_parallel)
        : world_(comm), mesh_(make_parallel_mesh(comm.size(), comm.rank(), context_parallel)) {}

    int size() const { return world_.size(); }
    bool is_first() const { return world_.rank() == 0; }  // the one that prints and writes what is written once
    const HostGroup& world() const { return world_; }
    const ParallelMesh& mesh() const { return mesh_; }
    // What error messages say from here on.
    void set_step(int64_t step) const { world_.comm().identity().step = step; }

    // What rank 0 finds, on all ranks. An Error there is one everywhere, so that nobody waits for an answer.
    std::string first_decides(const std::function<std::string()>& decide, const std::string& operation) const {
        if (size() == 1) {
            return decide();
        }
        return answer_of(world_.broadcast_text(is_first() ? outcome_of(decide) : "", 0, operation));
    }
    // The same where there is nothing to find, but to do.
    void first_does(const std::function<void()>& work, const std::string& operation) const {
        const auto decide = [&] {
            work();
            return std::string();
        };
        first_decides(decide, operation);
    }
    // As first_decides, for what may take longer than the time-out of the ranks that wait, such as reading a large
    // checkpoint: `decide` counts in its argument (may be null) what it has done; see at_length.
    std::string first_decides_at_length(const std::function<std::string(std::atomic<uint64_t>* progress)>& decide,
                                        const std::string& operation) const {
        if (size() == 1) {
            return decide(nullptr);
        }
        std::atomic<uint64_t> progress{0};
        std::string outcome;
        const auto work = [&] {
            if (is_first()) {
                outcome = outcome_of([&] { return decide(&progress); });
            }
        };
        at_length(work, progress, operation);
        return answer_of(world_.broadcast_text(outcome, 0, operation));
    }
    // What each rank does by itself, and some for longer than the time-out of the others: `work` runs beside this
    // thread, which alone may send, and all wait for each other. A rank tells the others that it is still there as long
    // as what it counts in `progress` grows; where that stands still, they miss it as everywhere. Throws what `work`
    // throws, on that rank.
    void at_length(const std::function<void()>& work, const std::atomic<uint64_t>& progress,
                   const std::string& operation) const {
        if (size() == 1) {
            return work();
        }
        constexpr uint64_t READY = UINT64_MAX;
        uint64_t told = progress;
        std::future<void> done = std::async(std::launch::async, work);  // MPI is told which thread sends
        const std::chrono::duration<double> interval(std::min(60.0, 0.25 * world_.comm().identity().timeout_seconds));
        std::vector<uint64_t> all(size());
        while (std::count(all.begin(), all.end(), READY) < size()) {
            uint64_t now;
            do {
                now = done.wait_for(interval) == std::future_status::ready ? READY : progress.load();
            } while (now == told && now != READY);
            told = now;
            all = of_all(told, operation);
        }
        done.get();
    }
    // Throws Error on all ranks when they differ in what must be equal everywhere.
    void check_equal(const std::string& text, const char* what) const {
        CHECK(size() == 1 || world_.all_equal(text, std::string("comparison of ") + what),
              "the ranks differ in %s: start all of them with the same flags and files", what);
    }
    // Throws Error on all ranks when those of a context group, which compute on one sequence together, have read others
    // than each other by `flag`. hash: of the tokens that this rank has read.
    void check_share_sequences(uint64_t hash, const char* flag) const {
        if (mesh_.context_parallel == 1) {
            return;
        }
        const std::vector<uint64_t> all = of_all(hash, "comparison of sequences");
        for (int rank = 0; rank < size(); ++rank) {
            const int first = rank - rank % mesh_.context_parallel;
            CHECK(
                all[rank] == all[first],
                "%s: ranks %d (%s) and %d (%s) compute on the same sequences and have read different tokens: files of "
                "these names and lengths do not hold the same on all machines",
                flag, first, world_.comm().identity().host_of(first).c_str(), rank,
                world_.comm().identity().host_of(rank).c_str());
        }
    }
    // The largest value of any rank.
    int largest(int value, const std::string& operation) const {
        const std::vector<int> all = of_all(value, operation);
        return *std::max_element(all.begin(), all.end());
    }
    // The least value of any rank.
    uint64_t least(uint64_t value, const std::string& operation) const {
        const std::vector<uint64_t> all = of_all(value, operation);
        return *std::min_element(all.begin(), all.end());
    }

  private:
    // What each rank has, by rank.
    template <class Value>
    std::vector<Value> of_all(const Value& value, const std::string& operation) const {
        std::vector<Value> all(size());
        world_.all_gather(all.data(), &value, sizeof value, operation);
        return all;
    }
    // '+' and what was found, or '-' and what went wrong.
    static std::string outcome_of(const std::function<std::string()>& decide) {
        try {
            return "+" + decide();
        } catch (const Error& error) {
            return std::string("-") + error.what();
        }
    }
    static std::string answer_of(const std::string& outcome) {
        CHECK(outcome[0] == '+', "%s", outcome.c_str() + 1);
        return outcome.substr(1);
    }

    std::unique_ptr<SingleComm> alone_;
    HostGroup world_;
    ParallelMesh mesh_;
};
