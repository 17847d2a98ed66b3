// test_comm.cpp: ranks without MPI, each a process of its own: how they meet, exchange and add, and how they fail.
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>

#include <csignal>
#include <filesystem>
#include <functional>
#include <thread>

#include "llmc/comm_launch.h"
#include "llmc/ranks.h"

namespace {

bool connects_from_its_goal = false;
std::string other_name;  // of this machine, unless it is empty

}  // namespace

// In the place of the C library's: the kernel may take any free port of this machine as this end of a connection, that
// which is asked for too.
extern "C" int connect(int socket, const sockaddr* to, socklen_t size) {
    if (connects_from_its_goal) {
        EXPECT_EQ(bind(socket, to, size), 0);
    }
    return (int)syscall(SYS_connect, socket, to, size);
}
extern "C" int gethostname(char* name, size_t size) noexcept {
    utsname system;
    if (uname(&system) != 0) {
        return -1;
    }
    std::snprintf(name, size, "%s", other_name.empty() ? system.nodename : other_name.c_str());
    return 0;
}

namespace {

// Nobody listens there.
uint16_t free_port() {
    uint16_t port = 0;
    tcp::listen_on(port);
    return port;
}
// A path that does not exist, for ranks to meet at.
std::string rendezvous_path() {
    static int number = 0;
    return (std::filesystem::temp_directory_path() /
            ("llmc_test_comm_" + std::to_string(getpid()) + "_" + std::to_string(number++)))
        .string();
}

// What became of a rank's process: its status and what it threw.
struct Ended {
    bool killed = false;
    int status = -1;
    std::string error;
};

// Runs body(rank) in `size` processes and waits for all of them. A body that returns ends with 0, one that throws
// with 1.
std::vector<Ended> run_ranks(int size, const std::function<void(int)>& body) {
    std::vector<pid_t> processes;
    std::vector<int> pipes;
    for (int rank = 0; rank < size; ++rank) {
        int ends[2];
        EXPECT_EQ(pipe(ends), 0);
        const pid_t process = fork();
        if (process == 0) {
            close(ends[0]);
            try {
                body(rank);
            } catch (const std::exception& error) {
                const ssize_t written = write(ends[1], error.what(), std::strlen(error.what()));
                _exit(written < 0 ? 3 : 1);
            }
            _exit(0);
        }
        close(ends[1]);
        processes.push_back(process);
        pipes.push_back(ends[0]);
    }
    std::vector<Ended> ended(size);
    for (int rank = 0; rank < size; ++rank) {
        char text[4096];
        for (ssize_t count; (count = read(pipes[rank], text, sizeof text)) > 0;) {
            ended[rank].error.append(text, count);
        }
        close(pipes[rank]);
        int status;
        waitpid(processes[rank], &status, 0);
        ended[rank].killed = WIFSIGNALED(status);
        ended[rank].status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    }
    return ended;
}
void expect_all_well(const std::vector<Ended>& ended) {
    for (size_t rank = 0; rank < ended.size(); ++rank) {
        EXPECT_EQ(ended[rank].status, 0) << "rank " << rank << ": " << ended[rank].error;
    }
}
bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST(SingleComm, CollectivesOfOneRank) {
    SingleComm comm;
    const HostGroup group(comm);
    double value = 3.0;
    group.all_reduce_sum(&value, 1, "test");
    EXPECT_EQ(value, 3.0);
    group.barrier("test");
    EXPECT_TRUE(group.all_equal("text", "test"));
    EXPECT_EQ(num_ranks_on_machine(comm.identity()), 1);
}

TEST(AssignDevices, EveryRankItsOwnWhereThatCanBe) {
    using Devices = std::vector<int>;
    EXPECT_EQ(assign_devices({"abcd", "abcd", "abcd", "abcd"}, 1), (Devices{0, 1, 2, 3}));
    EXPECT_EQ(assign_devices({"aabb", "aabb", "ccdd", "ccdd"}, 2), (Devices{0, 1, 0, 1})) << "two machines";
    EXPECT_EQ(assign_devices({"ab", "cd", "ab", "cd"}, 1), (Devices{0, 0, 1, 1})) << "in turn";
    EXPECT_EQ(assign_devices({"a", "b", "c"}, 1), (Devices{0, 0, 0})) << "one each is all they see";
    EXPECT_EQ(assign_devices({"ab", "a"}, 1), (Devices{1, 0})) << "who sees less goes first";
    EXPECT_EQ(assign_devices({"ab", "ab", "ab", "ab", "ab"}, 1), (Devices{0, 1, 0, 1, 0})) << "more ranks than GPUs";
}

// Sums in the order of ranks: 1e17 + 1 - 1e17 + 1 depends on it.
TEST(TcpComm, CollectivesInTheOrderOfRanks) {
    for (const int size : {1, 2, 4, 5}) {
        const std::string path = rendezvous_path();
        expect_all_well(run_ranks(size, [&](int rank) {
            TcpComm comm(rank, size, path, 20.0);
            const HostGroup group(comm);
            const std::vector<double> terms = {1e17, 1.0, -1e17, 1.0, 7.0};
            double expected = terms[0];
            for (int r = 1; r < size; ++r) {
                expected += terms[r];
            }
            double sum = terms[rank];
            group.all_reduce_sum(&sum, 1, "sum");
            CHECK(sum == expected, "all_reduce_sum is %g, not %g", sum, expected);

            const int64_t count = 100003;  // more than a socket's buffer
            std::vector<float> parts(size * count), total(count);
            for (int64_t i = 0; i < size * count; ++i) {
                parts[i] = (float)(i % 1000 + rank);
            }
            group.reduce_scatter_sum(total.data(), parts.data(), count, "reduce");
            std::vector<float> all(size * count);
            group.all_gather(all.data(), total.data(), count * sizeof(float), "gather");
            for (int64_t i = 0; i < size * count; ++i) {
                CHECK(all[i] == (float)(size * (i % 1000) + size * (size - 1) / 2), "element %lld is %g", (long long)i,
                      all[i]);
            }

            int32_t word = rank == size - 1 ? 42 : 0;
            group.broadcast(&word, sizeof word, size - 1, "broadcast");
            CHECK(word == 42, "broadcast gave %d", word);
            CHECK(group.all_equal("the same", "compare"), "equal texts differ");
            CHECK(size == 1 || !group.all_equal("rank " + std::to_string(rank), "compare"),
                  "different texts are equal");
            CHECK(num_ranks_on_machine(comm.identity()) == size, "ranks on this machine");
            CHECK(comm.identity().host_of(size - 1) == host_name(), "names of hosts");
            for (const MemoryLimit& limit : memory_limits()) {
                CHECK(comm.identity().in_memory_groups.at(limit.group) == size, "ranks under a limit of memory");
            }
            comm.finish();
        }));
        EXPECT_FALSE(std::filesystem::exists(path));
    }
}

TEST(TcpComm, GroupsAndSeveralMessagesToOnePeer) {
    const std::string path = rendezvous_path();
    expect_all_well(run_ranks(4, [&](int rank) {
        TcpComm comm(rank, 4, path, 20.0);
        const int first = rank / 2 * 2;
        const HostGroup pair(comm, {first, first + 1});
        int32_t sum = rank;
        pair.all_reduce_sum(&sum, 1, "pair");
        CHECK(sum == 2 * first + 1, "the pair's sum is %d", sum);
        const int other = 1 - pair.rank();
        const int32_t out[3] = {10 * rank, 10 * rank + 1, 10 * rank + 2};
        int32_t in[3] = {-1, -1, -1}, self = -1;
        pair.exchange({{other, &out[0], 4}, {pair.rank(), &out[2], 4}, {other, &out[1], 4}, {other, nullptr, 0}},
                      {{other, &in[0], 4}, {other, &in[1], 4}, {other, nullptr, 0}, {pair.rank(), &self, 4}},
                      "messages");
        const int32_t theirs = 10 * pair.world_rank(other);
        CHECK(in[0] == theirs && in[1] == theirs + 1 && in[2] == -1 && self == out[2], "messages are mixed up");
        comm.finish();
    }));
}

TEST(TcpComm, MeetsAtAPort) {
    const int port = 20000 + getpid() % 20000;
    expect_all_well(run_ranks(3, [&](int rank) {
        TcpComm comm(rank, 3, "localhost:" + std::to_string(port), 20.0);
        HostGroup(comm).barrier("test");
        comm.finish();
    }));
}

TEST(TcpComm, ARankIsNotConnectedToItself) {
    connects_from_its_goal = true;
    EXPECT_LT((int)tcp::try_connect({"127.0.0.1", free_port()}), 0);
    connects_from_its_goal = false;
}

// At the address that its name stands for, and not at this machine's own.
TEST(TcpComm, FindsAMachineOfTheSameName) {
    const Socket listener(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(0x7f000002);
    socklen_t size = sizeof address;
    ASSERT_EQ(bind(listener, reinterpret_cast<sockaddr*>(&address), size), 0);
    ASSERT_EQ(listen(listener, 8), 0);
    ASSERT_EQ(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size), 0);
    const uint16_t port = ntohs(address.sin_port);
    EXPECT_LT((int)tcp::try_connect({"127.0.0.1", port}), 0);
    other_name = "127.0.0.2";
    EXPECT_GE((int)tcp::try_connect({host_name(), port}), 0);
    other_name.clear();
}

// Something that looks for open ports, before a rank comes.
TEST(TcpComm, AStrangerIsTurnedAway) {
    const uint16_t port = free_port();
    expect_all_well(run_ranks(2, [&](int rank) {
        Socket stranger;
        for (int tries = 0; rank == 1 && stranger < 0 && tries < 1000; ++tries) {
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
            stranger = tcp::try_connect({"127.0.0.1", port});
        }
        const std::string words(1000, 'x');
        CHECK(rank == 0 || send(stranger, words.data(), words.size(), 0) == 1000, "cannot speak to rank 0");
        TcpComm comm(rank, 2, "127.0.0.1:" + std::to_string(port), 20.0);
        HostGroup(comm).barrier("test");
        comm.finish();
    }));
}

TEST(TcpComm, NamesARankThatIsKilled) {
    const std::string path = rendezvous_path();
    const std::vector<Ended> ended = run_ranks(3, [&](int rank) {
        TcpComm comm(rank, 3, path, 20.0);
        comm.identity().step = 17;
        if (rank == 1) {
            raise(SIGKILL);
        }
        HostGroup(comm).barrier("all-gather of weights");
        comm.finish();
    });
    EXPECT_TRUE(ended[1].killed);
    for (const int rank : {0, 2}) {
        EXPECT_EQ(ended[rank].status, 1);
        EXPECT_TRUE(contains(ended[rank].error, "all-gather of weights, step 17")) << ended[rank].error;
        EXPECT_TRUE(contains(ended[rank].error, "is gone")) << ended[rank].error;
    }
    EXPECT_TRUE(contains(ended[0].error + ended[2].error, "rank 1 (" + host_name() + ")"));
}

TEST(TcpComm, NamesARankThatHangs) {
    const std::string path = rendezvous_path();
    const std::vector<Ended> ended = run_ranks(2, [&](int rank) {
        TcpComm comm(rank, 2, path, 1.0);
        if (rank == 1) {
            std::this_thread::sleep_for(std::chrono::seconds(3));
            return;
        }
        HostGroup(comm).barrier("meeting");
    });
    EXPECT_EQ(ended[0].status, 1);
    EXPECT_TRUE(contains(ended[0].error, "meeting, at start-up: nothing from rank 1")) << ended[0].error;
    EXPECT_TRUE(contains(ended[0].error, "1 s (--comm_timeout)")) << ended[0].error;
}

TEST(RunRanks, KnowWhenTheyLieOnMoreMachinesThanTheyMust) {
    EXPECT_EQ(placement_warning({"b", "b", "a", "a"}, 2), "");
    EXPECT_EQ(placement_warning({"b", "b", "a", "a"}, 4), "");
    EXPECT_EQ(placement_warning({"a", "b", "a", "b"}, 1), "");
    EXPECT_EQ(placement_warning({"a", "b", "a", "b"}, 4), "");  // both, in whatever order
    EXPECT_TRUE(contains(placement_warning({"a", "b", "a", "b"}, 2),
                         "lie on 2 machines (the mean of all groups), and on 1 if"));
    // Two machines of three ranks each, by twos: one pair has to lie on both.
    EXPECT_EQ(placement_warning({"a", "a", "a", "b", "b", "b"}, 2), "");
    EXPECT_TRUE(contains(placement_warning({"a", "b", "a", "b", "a", "b"}, 2), "lie on 2 machines"));
    EXPECT_TRUE(contains(placement_warning({"a", "b", "a", "b", "a", "b"}, 2), "and on 1.33 if"));
}

TEST(RunRanks, KnowTheLargestAndTheLeastOfAll) {
    const std::string path = rendezvous_path();
    expect_all_well(run_ranks(3, [&](int rank) {
        TcpComm comm(rank, 3, path, 10.0);
        const RunRanks ranks(comm, 1);
        const int values[] = {-5, 7, 2};
        CHECK(ranks.largest(values[rank], "comparison") == 7, "not the largest");
        const uint64_t bytes[] = {(uint64_t)1 << 40, UINT64_MAX, ((uint64_t)1 << 40) - 1};
        CHECK(ranks.least(bytes[rank], "comparison") == bytes[2], "not the least");
        comm.finish();
    }));
    EXPECT_EQ(RunRanks().least(3, "comparison"), 3u);
}

// A checkpoint that takes longer to read than the time-out is, beside one whose disk stands still.
TEST(RunRanks, WaitForALongDecisionThatGoesOn) {
    std::string path = rendezvous_path();
    const auto decide_in = [](int tenths, bool goes_on, const std::string& answer) {
        return [=](std::atomic<uint64_t>* progress) {
            for (int i = 0; i < tenths; ++i) {
                std::this_thread::sleep_for(std::chrono::milliseconds(100));
                *progress += goes_on ? 1 : 0;
            }
            CHECK(answer != "bad", "the answer is bad");
            return answer;
        };
    };
    expect_all_well(run_ranks(3, [&](int rank) {
        TcpComm comm(rank, 3, path, 1.0);
        const RunRanks ranks(comm, 1);
        CHECK(ranks.first_decides_at_length(decide_in(25, true, "found"), "choice") == "found", "another answer");
        CHECK(ranks.first_decides_at_length(decide_in(0, true, ""), "choice").empty(), "another answer");
        comm.finish();
    }));
    path = rendezvous_path();
    std::vector<Ended> ended = run_ranks(3, [&](int rank) {
        TcpComm comm(rank, 3, path, 1.0);
        RunRanks(comm, 1).first_decides_at_length(decide_in(15, true, "bad"), "choice");
    });
    for (const Ended& rank : ended) {
        EXPECT_EQ(rank.error, "the answer is bad");
    }
    path = rendezvous_path();
    ended = run_ranks(2, [&](int rank) {
        TcpComm comm(rank, 2, path, 1.0);
        RunRanks(comm, 1).first_decides_at_length(decide_in(30, false, "too late"), "choice");
    });
    EXPECT_TRUE(contains(ended[1].error, "choice, at start-up: nothing from rank 0")) << ended[1].error;
    EXPECT_EQ(RunRanks().first_decides_at_length([](std::atomic<uint64_t>*) { return std::string("alone"); }, "choice"),
              "alone");
}

// Files that one rank writes for longer than the time-out, beside a disk that stands still.
TEST(RunRanks, WaitForLongWorkThatGoesOn) {
    std::string path = rendezvous_path();
    std::atomic<uint64_t> progress{0};  // of a rank's process
    const auto work_for = [&](int tenths, bool goes_on) {
        return [&progress, tenths, goes_on] {
            for (int i = 0; i < tenths; ++i) {
                std::this_thread::sleep_for(std::chrono::milliseconds(100));
                progress += goes_on ? 1 : 0;
            }
        };
    };
    expect_all_well(run_ranks(3, [&](int rank) {
        TcpComm comm(rank, 3, path, 1.0);
        const RunRanks ranks(comm, 1);
        for (const int slow : {0, 2}) {
            progress = 0;
            ranks.at_length(work_for(rank == slow ? 25 : 1, true), progress, "save");
            CHECK(progress == (rank == slow ? 25 : 1), "the work was not done");
        }
        comm.finish();
    }));
    path = rendezvous_path();
    const std::vector<Ended> ended = run_ranks(2, [&](int rank) {
        TcpComm comm(rank, 2, path, 1.0);
        RunRanks(comm, 1).at_length(work_for(rank == 0 ? 30 : 1, false), progress, "save");
    });
    EXPECT_TRUE(contains(ended[1].error, "save, at start-up: nothing from rank 0")) << ended[1].error;
    bool alone = false;
    RunRanks().at_length([&] { alone = true; }, progress, "save");
    EXPECT_TRUE(alone);
}

TEST(TcpComm, NamesRanksThatNeverCome) {
    const std::string path = rendezvous_path();
    const std::vector<Ended> ended = run_ranks(2, [&](int rank) { TcpComm(rank, 4, path, 1.0); });
    EXPECT_TRUE(contains(ended[0].error, "did not come within 1 s (--comm_timeout): rank 2 3")) << ended[0].error;
    EXPECT_EQ(ended[1].status, 1);
}

TEST(TcpComm, RefusesTwoOfOneRankAndOtherSizes) {
    std::string path = rendezvous_path();
    std::vector<Ended> ended = run_ranks(3, [&](int i) { TcpComm(std::min(i, 1), 3, path, 2.0); });
    EXPECT_TRUE(contains(ended[0].error, "two processes say that they are rank 1")) << ended[0].error;
    path = rendezvous_path();
    ended = run_ranks(2, [&](int rank) { TcpComm(rank, 2 + rank, path, 2.0); });
    EXPECT_TRUE(contains(ended[0].error, "rank 0 expects 2 ranks, rank 1 expects 3")) << ended[0].error;
}

TEST(TcpComm, NamesMessagesOfOtherSizes) {
    const std::string path = rendezvous_path();
    const std::vector<Ended> ended = run_ranks(2, [&](int rank) {
        TcpComm comm(rank, 2, path, 5.0);
        char data[16];
        comm.exchange({{1 - rank, data, (size_t)(rank == 0 ? 8 : 16)}}, {{1 - rank, data, 8}}, "talk");
    });
    EXPECT_TRUE(contains(ended[0].error, "rank 1 (" + host_name() + ") sends 16 bytes where 8 are expected"))
        << ended[0].error;
}

TEST(Launch, SaysWhatIsMissing) {
    const auto error_of = [](std::map<std::string, std::string> variables) {
        const std::vector<Ended> ended = run_ranks(1, [&](int) {
            for (const char* name : {"LLMC_RENDEZVOUS", "LLMC_RANK", "LLMC_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS",
                                     "SLURM_STEP_NUM_TASKS", "PMI_SIZE"}) {
                unsetenv(name);
            }
            for (const auto& [name, value] : variables) {
                setenv(name.c_str(), value.c_str(), 1);
            }
            open_host_comm(1.0);
        });
        return ended[0].status == 0 ? std::string("no error") : ended[0].error;
    };
    EXPECT_EQ(error_of({}), "no error");
    EXPECT_TRUE(contains(error_of({{"LLMC_RENDEZVOUS", "x:1"}}), "LLMC_RANK must be set too"));
    EXPECT_TRUE(contains(error_of({{"LLMC_RENDEZVOUS", "x:1"}, {"LLMC_RANK", "one"}}), "LLMC_RANK=one"));
    EXPECT_TRUE(contains(error_of({{"LLMC_RENDEZVOUS", "nowhere"}, {"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "2"}}),
                         "LLMC_RENDEZVOUS 'nowhere': must be HOST:PORT"));
    EXPECT_TRUE(contains(error_of({{"LLMC_RENDEZVOUS", "x:1"}, {"LLMC_RANK", "2"}, {"LLMC_WORLD_SIZE", "2"}}),
                         "rank 2 of 2 ranks: there is no such rank"));
    EXPECT_EQ(error_of({{"SLURM_NTASKS", "4"}}), "no error");  // a batch script of four tasks, not one of them
    EXPECT_EQ(error_of({{"SLURM_STEP_NUM_TASKS", "1"}}), "no error");
    EXPECT_TRUE(contains(error_of({{"SLURM_STEP_NUM_TASKS", "4"}}), "started by srun as one of 4 ranks"));
    EXPECT_EQ(error_of({{"LLMC_WORLD_SIZE", ""}}), "no error");
    EXPECT_TRUE(contains(error_of({{"LLMC_WORLD_SIZE", "4"}}), "started as one of 4 ranks (LLMC_WORLD_SIZE)"));
    EXPECT_TRUE(contains(error_of({{"PMI_SIZE", "3"}}), "one of 3 ranks"));  // of MPICH's launcher
}

}  // namespace
