// ranks.h: the processes of a run, as everything on the host sees them: who this one is, and how all decide together.
// A run of one process is the same with one rank: nothing is sent, nothing waits.
#pragma once
#include <algorithm>
#include <functional>
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
        std::string answer;  // '+' and what was found, or '-' and what went wrong
        if (is_first()) {
            try {
                answer = "+" + decide();
            } catch (const Error& error) {
                answer = std::string("-") + error.what();
            }
        }
        answer = world_.broadcast_text(answer, 0, operation);
        CHECK(answer[0] == '+', "%s", answer.c_str() + 1);
        return answer.substr(1);
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
    std::unique_ptr<SingleComm> alone_;
    HostGroup world_;
    ParallelMesh mesh_;
};
