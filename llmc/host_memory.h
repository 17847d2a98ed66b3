// host_memory.h: how much memory this process can still take from the host before the system ends it: what --offload
// is held against, as page-locked memory that is not there does not fail, it gets the process killed.
#pragma once
#include <algorithm>
#include <cstdint>
#include <fstream>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <sys/stat.h>
#include <vector>

#include "check.h"

namespace host_memory_detail {
// The number behind `key` in a file of "key number" lines ("key:" too); with no key the file's first word. Nothing when
// it is not there, or no number ("max": no limit).
inline std::optional<uint64_t> read_number(const std::string& path, const std::string& key = "") {
    std::ifstream file(path);
    std::string line;
    while (std::getline(file, line)) {
        std::istringstream words(line);
        std::string first;
        uint64_t number;
        if (!key.empty() && (!(words >> first) || (first != key && first != key + ":"))) {
            continue;
        }
        return words >> number ? std::optional<uint64_t>(number) : std::nullopt;
    }
    return std::nullopt;
}

// What a control group's limit leaves, file cache that can be dropped counted as free.
inline std::optional<uint64_t> left_in_group(const std::string& folder, const char* limit_name, const char* used_name,
                                             const std::string& prefix) {
    const std::optional<uint64_t> limit = read_number(folder + "/" + limit_name);
    const std::optional<uint64_t> used = read_number(folder + "/" + used_name);
    if (!limit || !used) {
        return std::nullopt;
    }
    uint64_t cache = 0;  // pages that were read once, and more often
    for (const char* kind : {"inactive_file", "active_file"}) {
        cache += read_number(folder + "/memory.stat", prefix + kind).value_or(0);
    }
    const uint64_t taken = *used > cache ? *used - cache : 0;
    return *limit > taken ? *limit - taken : 0;
}
}  // namespace host_memory_detail

// What the limit of a control group leaves to all that are in it. group: the same for all processes of a machine that
// are, also where containers give it other names.
struct MemoryLimit {
    std::string group;
    uint64_t left = 0;
};

// Those of this process's control groups (of containers and job schedulers; version 1 and 2, every group above it too)
// that limit its memory. `root` is put before every path, for tests.
inline std::vector<MemoryLimit> memory_limits(const std::string& root = "") {
    using namespace host_memory_detail;
    std::vector<MemoryLimit> limits;
    auto consider = [&](const std::string& hierarchy, const std::string& group, const char* limit_name,
                        const char* used_name, const char* prefix) {
        for (std::string folder = group;; folder.erase(folder.rfind('/'))) {
            const auto left = left_in_group(hierarchy + folder, limit_name, used_name, prefix);
            struct stat status;
            if (left && stat((hierarchy + folder).c_str(), &status) == 0) {
                limits.push_back({limit_name + (" " + std::to_string(status.st_ino)), *left});
            }
            if (folder.empty()) {
                return;
            }
        }
    };
    const std::string mount = root + "/sys/fs/cgroup";
    std::ifstream groups(root + "/proc/self/cgroup");  // lines of "number:controllers:/path"
    std::string line;
    while (std::getline(groups, line)) {
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) {
            continue;
        }
        const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
        std::string path = line.substr(second + 1);
        if (path.empty() || path.back() == '/') {
            path.clear();
        }
        if (controllers == ",,") {
            consider(mount, path, "memory.max", "memory.current", "");
        } else if (controllers.find(",memory,") != std::string::npos) {
            consider(mount + "/memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_");
        }
    }
    return limits;
}

// Bytes: the least of what Linux calls available and of what the limits of this process's control groups leave, each
// divided by the processes of a run that share it: on_machine, and of a group that in_groups does not name as many.
// Throws Error where there is no /proc/meminfo.
inline uint64_t available_host_bytes(const std::string& root = "", int on_machine = 1,
                                     const std::map<std::string, int>& in_groups = {}) {
    const std::optional<uint64_t> kib = host_memory_detail::read_number(root + "/proc/meminfo", "MemAvailable");
    CHECK(kib, "%s/proc/meminfo: says nothing of MemAvailable, so it is not known how much host memory is left",
          root.c_str());
    uint64_t available = *kib * 1024 / on_machine;
    for (const MemoryLimit& limit : memory_limits(root)) {
        const auto found = in_groups.find(limit.group);
        available = std::min(available, limit.left / (found == in_groups.end() ? on_machine : found->second));
    }
    return available;
}
