// shared_folder.h: whether the output folder is one and the same for all ranks. Each writes its part of a checkpoint
// into it, so machines that have a folder of that name each would lose a whole run at its first save.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <optional>
#include <random>
#include <string>
#include <thread>

#include "durable_file.h"  // files that others see
#include "ranks.h"         // processes that write together

namespace shared_folder_detail {
// A small new file; removed again, also when it could be written only in part.
class PassingFile {
  public:
    explicit PassingFile(const std::string& path) : path_(path) {}
    ~PassingFile() { std::remove(path_.c_str()); }
    PassingFile(const PassingFile&) = delete;
    PassingFile& operator=(const PassingFile&) = delete;
    void write(const std::string& text) const {
        DurableFile file(path_);
        file.write(text.data(), text.size());
        file.finish();
    }

  private:
    std::string path_;
};

// Whether a file comes to be there with this text. A client of NFS may go on for up to a minute (acdirmax) without a
// folder that it has looked for before there was one.
inline bool comes_to_hold(const std::string& path, const std::string& text, double patience_seconds) {
    const std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
    while (true) {
        std::string found;
        std::ifstream file(path);
        if (std::getline(file, found) && found == text) {
            return true;
        }
        if (std::chrono::steady_clock::now() - start > std::chrono::duration<double>(patience_seconds)) {
            return false;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
}
}  // namespace shared_folder_detail

// Throws Error on all ranks when one of them does not see what rank 0 writes into `output_dir`, which it has made, or
// cannot write there. Leaves nothing there. All ranks call it.
inline void check_all_share(const std::string& output_dir, const RunRanks& ranks) {
    using namespace shared_folder_detail;
    if (ranks.size() == 1) {
        return;
    }
    const CommIdentity& identity = ranks.world().comm().identity();
    std::optional<PassingFile> of_first;
    const auto path_of = [&](const std::string& token) { return output_dir + "/.shared-" + token; };
    const auto write_token = [&] {
        std::random_device random;
        const std::string token = format_string("%08x%08x", random(), random());
        of_first.emplace(path_of(token));
        of_first->write(token);
        return token;
    };
    const std::string token = ranks.first_decides(write_token, "a file for all ranks in the output folder");
    const std::string self = format_string("rank %d (%s)", identity.rank, identity.host_of(identity.rank).c_str());
    // What is wrong on this rank.
    const auto look = [&]() -> std::string {
        const double patience_seconds = std::min(70.0, 0.25 * identity.timeout_seconds);  // the others wait meanwhile
        if (!comes_to_hold(path_of(token), token, patience_seconds)) {
            return format_string(
                "%s does not see what rank 0 (%s) wrote into --output_dir %s: it must be a folder that all machines "
                "share",
                self.c_str(), identity.host_of(0).c_str(), output_dir.c_str());
        }
        try {
            PassingFile(path_of(token) + "-" + std::to_string(identity.rank)).write(token);
            return "";
        } catch (const Error& error) {
            return format_string("%s cannot write into --output_dir %s, as every rank does: %s", self.c_str(),
                                 output_dir.c_str(), error.what());
        }
    };
    for (const std::string& of_rank : ranks.world().gather_texts(look(), "look at the output folder")) {
        CHECK(of_rank.empty(), "%s", of_rank.c_str());
    }
}
