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
#include <string>
#include <utility>

#include "comm.h"               // processes on the host
#include "context_partition.h"  // the mesh

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
    // The same for what may take longer than the time-out of the ranks that wait, such as reading a large checkpoint:
    // `decide` counts in its argument (may be null) what it has done, and as long as that grows they are told. A
    // standstill ends the run as everywhere.
    std::string first_decides_at_length(const std::function<std::string(std::atomic<uint64_t>* progress)>& decide,
                                        const std::string& operation) const {
        if (size() == 1) {
            return decide(nullptr);
        }
        const std::string still_deciding = ".";
        std::string outcome;
        if (is_first()) {
            std::atomic<uint64_t> progress{0};
            // Beside this thread, which alone may send: MPI is told so.
            std::future<std::string> decided =
                std::async(std::launch::async, [&] { return outcome_of([&] { return decide(&progress); }); });
            const std::chrono::duration<double> interval(
                std::min(60.0, 0.25 * world_.comm().identity().timeout_seconds));
            for (uint64_t told = 0; decided.wait_for(interval) != std::future_status::ready;) {
                const uint64_t now = progress;
                if (now != told) {
                    told = now;
                    world_.broadcast_text(still_deciding, 0, operation);
                }
            }
            outcome = decided.get();
        }
        do {
            outcome = world_.broadcast_text(outcome, 0, operation);
        } while (outcome == still_deciding);
        return answer_of(outcome);
    }
    // What each rank does by itself, and some for longer than the time-out of the others: `work` runs beside this
    // thread, which alone may send, and all wait for each other as long as what any of them counts in `progress` grows.
    void at_length(const std::function<void()>& work, const std::atomic<uint64_t>& progress,
                   const std::string& operation) const {
        if (size() == 1) {
            return work();
        }
        using Clock = std::chrono::steady_clock;
        std::future<void> done = std::async(std::launch::async, work);
        const double timeout = world_.comm().identity().timeout_seconds;
        const std::chrono::duration<double> interval(std::min(60.0, 0.25 * timeout));
        constexpr uint64_t READY = UINT64_MAX;
        std::vector<uint64_t> all(size());
        Clock::time_point grown = Clock::now();
        while (std::count(all.begin(), all.end(), READY) < size()) {
            const std::vector<uint64_t> before = all;
            const uint64_t own = done.wait_for(interval) == std::future_status::ready ? READY : progress.load();
            world_.all_gather(all.data(), &own, sizeof own, operation);
            grown = all != before ? Clock::now() : grown;
            CHECK(std::chrono::duration<double>(Clock::now() - grown).count() < timeout,
                  "%s: no progress for %g s (--comm_timeout)", operation.c_str(), timeout);
        }
        done.get();
    }
    // Throws Error on all ranks when they differ in what must be equal everywhere.
    void check_equal(const std::string& text, const char* what) const {
        CHECK(size() == 1 || world_.all_equal(text, std::string("comparison of ") + what),
              "the ranks differ in %s: start all of them with the same flags and files", what);
    }
    // The largest value of any rank.
    int largest(int value, const std::string& operation) const {
        std::vector<int> all(size());
        world_.all_gather(all.data(), &value, sizeof value, operation);
        return *std::max_element(all.begin(), all.end());
    }

  private:
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
