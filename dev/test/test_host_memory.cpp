// test_host_memory.cpp: what is left of the host's memory, from files as Linux writes them.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "llmc/host_memory.h"

namespace {

constexpr uint64_t MIB = 1 << 20;

// A root folder that is removed at the end.
struct FakeRoot {
    std::string path = testing::TempDir() + "llmc_host_memory_XXXXXX";
    FakeRoot() {
        EXPECT_NE(mkdtemp(path.data()), nullptr);
        write("/proc/meminfo", "MemTotal:       16384000 kB\nMemFree:  1024 kB\nMemAvailable:    8192000 kB\n");
    }
    ~FakeRoot() { std::filesystem::remove_all(path); }
    void write(const std::string& file, const std::string& text) const {
        std::filesystem::create_directories(std::filesystem::path(path + file).parent_path());
        std::ofstream(path + file) << text;
    }
    // Of a control group of version 2, by its folder under the mount.
    void limit(const std::string& group, uint64_t max, uint64_t current) const {
        write("/sys/fs/cgroup" + group + "/memory.max", std::to_string(max) + "\n");
        write("/sys/fs/cgroup" + group + "/memory.current", std::to_string(current) + "\n");
    }
    // Of version 1.
    void limit_v1(const std::string& group, uint64_t limit, uint64_t usage) const {
        write("/sys/fs/cgroup/memory" + group + "/memory.limit_in_bytes", std::to_string(limit) + "\n");
        write("/sys/fs/cgroup/memory" + group + "/memory.usage_in_bytes", std::to_string(usage) + "\n");
    }
};

}  // namespace

TEST(HostMemory, WithoutLimitsIsWhatLinuxSays) {
    const FakeRoot root;
    EXPECT_EQ(available_host_bytes(root.path), 8192000ull * 1024);
    root.write("/proc/self/cgroup", "0::/\n");
    root.write("/sys/fs/cgroup/memory.max", "max\n");
    root.write("/sys/fs/cgroup/memory.current", "123456\n");
    EXPECT_EQ(available_host_bytes(root.path), 8192000ull * 1024);
}

TEST(HostMemory, VersionTwoCountsDroppableCacheAsFree) {
    const FakeRoot root;
    root.write("/proc/self/cgroup", "0::/\n");
    root.limit("", 1000 * MIB, 700 * MIB);
    EXPECT_EQ(available_host_bytes(root.path), 300 * MIB);
    root.write("/sys/fs/cgroup/memory.stat", "anon 5\ninactive_file " + std::to_string(150 * MIB) + "\nactive_file " +
                                                 std::to_string(50 * MIB) + "\nslab 1\n");
    EXPECT_EQ(available_host_bytes(root.path), 500 * MIB);
    root.limit("", 1000 * MIB, 1300 * MIB);
    EXPECT_EQ(available_host_bytes(root.path), 0u);
}

TEST(HostMemory, TheGroupsAboveCountToo) {
    const FakeRoot root;
    root.write("/proc/self/cgroup", "0::/job/step\n");
    root.limit("/job/step", 900 * MIB, 100 * MIB);
    EXPECT_EQ(available_host_bytes(root.path), 800 * MIB);
    root.limit("/job", 400 * MIB, 100 * MIB);
    EXPECT_EQ(available_host_bytes(root.path), 300 * MIB);
}

TEST(HostMemory, VersionOne) {
    const FakeRoot root;
    root.write("/proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/box/one\n0::/\n");
    root.limit_v1("", 9223372036854771712ull, 5000 * MIB);
    EXPECT_EQ(available_host_bytes(root.path), 8192000ull * 1024);
    root.limit_v1("/box/one", 2000 * MIB, 1500 * MIB);
    root.write("/sys/fs/cgroup/memory/box/one/memory.stat",
               "inactive_file 7\ntotal_inactive_file " + std::to_string(250 * MIB) + "\n");
    EXPECT_EQ(available_host_bytes(root.path), 750 * MIB);
}

// Four ranks on a machine of 8000 MiB, two of them in this one's container.
TEST(HostMemory, RanksDivideWhatTheyShare) {
    const FakeRoot root;
    root.write("/proc/self/cgroup", "0::/job/box\n");
    root.limit("/job", 6000 * MIB, 0);
    root.limit("/job/box", 2600 * MIB, 0);
    const std::vector<MemoryLimit> limits = memory_limits(root.path);
    ASSERT_EQ(limits.size(), 2u);
    EXPECT_EQ(limits[0].left, 2600 * MIB);
    EXPECT_NE(limits[0].group, limits[1].group);
    EXPECT_EQ(available_host_bytes(root.path, 4, {{limits[0].group, 2}, {limits[1].group, 4}}), 1300 * MIB);
    EXPECT_EQ(available_host_bytes(root.path, 4, {{limits[0].group, 1}, {limits[1].group, 4}}), 1500 * MIB);
    EXPECT_EQ(available_host_bytes(root.path, 4, {{limits[0].group, 1}, {limits[1].group, 1}}), 2000 * MIB);
    EXPECT_EQ(available_host_bytes(root.path, 4), 650 * MIB);  // it is not known who is in it
    const FakeRoot inside;                                     // the same group as its container sees it
    inside.write("/proc/self/cgroup", "0::/\n");
    std::filesystem::create_directories(inside.path + "/sys/fs");
    std::filesystem::create_directory_symlink(root.path + "/sys/fs/cgroup/job/box", inside.path + "/sys/fs/cgroup");
    ASSERT_EQ(memory_limits(inside.path).size(), 1u);
    EXPECT_EQ(memory_limits(inside.path)[0].group, limits[0].group);
}

TEST(HostMemory, NoProcIsAnError) {
    const FakeRoot root;
    std::filesystem::remove(root.path + "/proc/meminfo");
    EXPECT_THROW(available_host_bytes(root.path), Error);
}

TEST(HostMemory, ThisMachine) {
    const uint64_t available = available_host_bytes();
    EXPECT_GT(available, 16 * MIB);
    EXPECT_LT(available, (uint64_t)1 << 50);
}
