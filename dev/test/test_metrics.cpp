// test_metrics.cpp: metrics.jsonl (resume drops what will be written again, failed writes are errors), the step's line
// and the progress bar.
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <fcntl.h>
#include <functional>
#include <poll.h>
#include <sstream>
#include <sys/resource.h>
#include <thread>

#include "llmc/metrics.h"
#include "pseudo_terminal.h"

namespace {

struct TemporaryFolder {
    std::string path = testing::TempDir() + "llmc_metrics_XXXXXX";
    TemporaryFolder() { EXPECT_NE(mkdtemp(path.data()), nullptr); }
    ~TemporaryFolder() { EXPECT_EQ(std::system(("rm -rf '" + path + "'").c_str()), 0); }
};

std::string read_all(const std::string& path) {
    std::ostringstream text;
    text << std::ifstream(path, std::ios::binary).rdbuf();
    return text.str();
}

// What `say` leaves on standard output when that is a terminal.
template <class Say>
std::string on_a_terminal(Say say) {
    PseudoTerminal terminal;
    const int before = dup(STDOUT_FILENO);
    std::fflush(stdout);
    dup2(terminal.terminal(), STDOUT_FILENO);
    say();
    std::fflush(stdout);
    dup2(before, STDOUT_FILENO);
    close(before);
    return terminal.read_to_the_end();
}

}  // namespace

TEST(MetricsLog, OneObjectALine) {
    TemporaryFolder folder;
    const std::string path = folder.path + "/metrics.jsonl";
    MetricsLog log(path, 0);
    log.write("step", 1, {{"loss", 0.1}});
    EXPECT_EQ(read_all(path), "{\"event\":\"step\",\"step\":1,\"loss\":0.1}\n") << "flushed at once";
    log.write("sample", 1, {{"text", "a\nb\xff"}});
    EXPECT_EQ(read_all(path).substr(37), "{\"event\":\"sample\",\"step\":1,\"text\":\"a\\nb\xef\xbf\xbd\"}\n");
}

TEST(MetricsLog, FullPrecisionAndNoNaN) {
    TemporaryFolder folder;
    const std::string path = folder.path + "/metrics.jsonl";
    const double loss = 5.0 / 3.0;
    MetricsLog(path, 0).write("step", 1, {{"loss", loss}, {"grad_norm", std::nan("")}, {"x", INFINITY}});
    const Json object = Json::parse(read_all(path));
    EXPECT_EQ(object["loss"].get<double>(), loss);
    EXPECT_TRUE(object["grad_norm"].is_null());
    EXPECT_TRUE(object["x"].is_null());
}

TEST(MetricsLog, ResumeDropsLaterStepsAndCutLines) {
    TemporaryFolder folder;
    const std::string path = folder.path + "/metrics.jsonl";
    {
        MetricsLog log(path, 0);
        for (int step = 0; step <= 5; ++step) {
            log.write("step", step, {{"loss", step}});
        }
    }
    // Nested deeper than any stack is, and cut off.
    std::ofstream(path, std::ios::app) << "{\"step\":1,\"event\":" << std::string(300000, '[') << "\n"
                                       << "{\"step\":1,\"event\":" << std::string(300000, '[')
                                       << std::string(300000, ']') << "}\n"
                                       << "{\"event\":\"step\",\"st";
    MetricsLog log(path, 3);
    log.write("step", 4, {{"loss", 40}});
    std::istringstream lines(read_all(path));
    std::string steps;
    for (std::string line; std::getline(lines, line);) {
        steps += line.size() > 300000 ? "?" : std::to_string(Json::parse(line)["step"].get<int>());
    }
    EXPECT_EQ(steps, "0123??4") << "a step that cannot be read is not a later one";
    EXPECT_NE(read_all(path).find("40}"), std::string::npos);
}

TEST(MetricsLog, ResumeKeepsLinesOfOthers) {
    TemporaryFolder folder;
    const std::string path = folder.path + "/metrics.jsonl";
    MetricsLog(path, 0).write("step", 1, {{"loss", 1}});
    const std::string notes =
        "{\"note\":\"other data from here on\"}\n# by hand\n\n{\"event\":\"mine\",\"step\":\"2\"}\n";
    std::ofstream(path, std::ios::app) << notes;
    const std::string kept = read_all(path);
    MetricsLog(path, 1).write("step", 2, {{"loss", 2}});
    std::ofstream(path, std::ios::app) << "cut of";
    MetricsLog(path, 1);
    EXPECT_EQ(read_all(path), kept) << "neither what is written again nor what a crash cut off";
}

TEST(MetricsLog, TheEventsOfAStep) {
    TemporaryFolder folder;
    const std::string path = folder.path + "/metrics.jsonl";
    {
        MetricsLog log(path, 0);
        log.write("step", 3, Json::object());
        log.write("validation", 3, Json::object());
        log.write("sample", 2, Json::object());
        log.write("checkpoint", 4, Json::object());
    }
    std::ofstream(path, std::ios::app) << "{\"event\":5,\"step\":3}\n";  // of somebody else
    const std::string before = read_all(path);
    EXPECT_EQ(events_of_step(path, 3), (std::set<std::string>{"", "step", "validation"}));
    EXPECT_EQ(read_all(path), before);
    EXPECT_TRUE(events_of_step(folder.path + "/none", 3).empty());
    EXPECT_THROW(events_of_step(folder.path, 3), Error);
    const MetricsLog log(path, 3);
    EXPECT_NE(read_all(path).find("{\"event\":5,"), std::string::npos);
}

TEST(MetricsLog, ASymbolicLinkStaysOne) {
    TemporaryFolder folder;
    std::filesystem::create_directory(folder.path + "/elsewhere");
    const std::string real = folder.path + "/elsewhere/real.jsonl", path = folder.path + "/metrics.jsonl";
    std::filesystem::create_symlink("elsewhere/real.jsonl", path);
    for (int step = 1; step <= 2; ++step) {
        MetricsLog log(path, 1);
        log.write("step", step, Json::object());
    }
    EXPECT_TRUE(std::filesystem::is_symlink(path));
    EXPECT_EQ(read_all(real), read_all(path));
    EXPECT_NE(read_all(real).find("\"step\":2"), std::string::npos) << read_all(real);
}

TEST(MetricsLog, ASwitchIsOfTheStepsBehindIt) {
    TemporaryFolder folder;
    const std::string path = folder.path + "/metrics.jsonl";
    {
        MetricsLog log(path, 0);
        for (const int step : {2, 3, 4}) {
            log.write("checkpoint", step, Json::object());
            log.write("attention_switch", step, Json::object());
        }
    }
    MetricsLog(path, 3);
    EXPECT_EQ(read_all(path),
              "{\"event\":\"checkpoint\",\"step\":2}\n{\"event\":\"attention_switch\",\"step\":2}\n"
              "{\"event\":\"checkpoint\",\"step\":3}\n");
}

TEST(MetricsLog, KnowsWhenItsFileIsReplaced) {
    TemporaryFolder folder;
    const std::string path = folder.path + "/metrics.jsonl", other = folder.path + "/other";
    MetricsLog log(path, 0);
    log.write("step", 1, Json::object());
    EXPECT_FALSE(log.is_replaced());
    std::ofstream(path, std::ios::app) << "a line of another's\n";
    EXPECT_FALSE(log.is_replaced());
    std::filesystem::copy_file(path, other);
    std::filesystem::rename(other, path);
    EXPECT_TRUE(log.is_replaced());
    std::filesystem::remove(path);
    EXPECT_FALSE(log.is_replaced()) << "removed is something else";
}

TEST(MetricsLog, FailedWritesAreErrors) {
    EXPECT_THROW(MetricsLog("/no/such/folder/metrics.jsonl", 0), Error);
    TemporaryFolder folder;
    EXPECT_THROW(MetricsLog(folder.path, 0), Error) << "a folder is not a file";

    // A limit on the size of files stands for a full disk.
    const std::string path = folder.path + "/metrics.jsonl";
    rlimit unlimited, full;
    ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &unlimited), 0);
    full = unlimited;
    signal(SIGXFSZ, SIG_IGN);
    {
        MetricsLog log(path, 0);
        full.rlim_cur = 10;
        ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &full), 0);
        EXPECT_THROW(log.write("step", 1, {{"loss", 0.1}}), Error);
        ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &unlimited), 0);
    }
    // Wherever the disk ends, the last line that was tried is there, as those before.
    for (const rlim_t room : {20000, 20001, 30000, 40000}) {
        std::filesystem::remove(path);
        full.rlim_cur = room;
        ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &full), 0);
        int last = 0;
        {
            MetricsLog log(path, 0);
            EXPECT_THROW(
                while (true) {
                    log.write("step", ++last, {{"text", std::string(last % 97, 'x')}});
                },
                Error);
        }
        ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &unlimited), 0);
        EXPECT_EQ(events_of_step(path, last).size(), 1u) << "of " << last << " with room for " << room;
        EXPECT_EQ(events_of_step(path, last + 1).size(), 0u);
        EXPECT_GT(last, 50);
        struct stat status;
        ASSERT_EQ(stat(path.c_str(), &status), 0);
        EXPECT_LE(512 * status.st_blocks, status.st_size + 8192) << "what was not needed is given back";
    }
}

TEST(StepLine, Text) {
    StepMetrics m;
    m.step = 7, m.max_steps = 400, m.loss = 2.5, m.grad_norm = 1.25, m.learning_rate = 3e-3, m.elapsed_ms = 310.06;
    m.tokens_per_second = 6605, m.memory_gib = 0.5, m.seconds_left = 3723;
    EXPECT_EQ(
        step_line(m),
        "step   7/400 | loss 2.5000 | norm 1.2500 | lr 3.00e-03 | 310.1 ms | 6605 tok/s | 0.50 GiB | left 1:02:03");
    m.mfu = m.mfu_dense_equivalent = 0.4567;
    EXPECT_NE(step_line(m).find("| MFU 45.7 % |"), std::string::npos);
    m.mfu_dense_equivalent = 2.0;
    EXPECT_NE(step_line(m).find("| MFU 45.7 % (dense equivalent 200.0 %) |"), std::string::npos);
}

TEST(StepLine, Durations) {
    EXPECT_EQ(format_duration(0), "0:00");
    EXPECT_EQ(format_duration(59.6), "1:00");
    EXPECT_EQ(format_duration(3600), "1:00:00");
    EXPECT_EQ(format_duration(-5), "0:00");
    EXPECT_EQ(format_duration(std::nan("")), "0:00");
}

TEST(StepLine, Json) {
    StepMetrics m;
    m.step = 7, m.max_steps = 400, m.loss = 2.5, m.grad_norm = 1.25, m.learning_rate = 3e-3, m.elapsed_ms = 310.0;
    m.tokens_per_second = 6605, m.memory_gib = 0.5, m.seconds_left = 3723;
    Json expected = {{"loss", 2.5},           {"grad_norm", 1.25},           {"learning_rate", 3e-3},
                     {"elapsed_ms", 310.0},   {"tokens_per_second", 6605.0}, {"memory_gib", 0.5},
                     {"seconds_left", 3723.0}};
    EXPECT_EQ(step_json(m), expected) << "the step is added by MetricsLog";
    m.mfu = 0.25, m.mfu_dense_equivalent = 0.75;
    expected["mfu"] = 0.25, expected["mfu_dense_equivalent"] = 0.75;
    EXPECT_EQ(step_json(m), expected);
}

TEST(ProgressBar, IsBelowTheLinesOfATerminalAndGoneAtTheEnd) {
    const auto say = [](bool plain, bool silent) {
        Terminal terminal(plain, silent);
        terminal.print("start");
        terminal.progress(5, 20, 61.0);
        terminal.print("step  5");
        terminal.progress(10, 20, 40.0);
        terminal.print("step 10\nvalidation");
        terminal.end_progress();
        terminal.print("end");
    };
    const std::string erase = "\r\033[K";  // to column 0, erase the line
    EXPECT_EQ(on_a_terminal([&] { say(false, false); }),
              "start\nstep  5\n"
              "[##########..............................]  25 %, 1:01 left" +
                  erase +
                  "step 10\nvalidation\n"
                  "[####################....................]  50 %, 0:40 left" +
                  erase + "end\n");
    const std::string lines = "start\nstep  5\nstep 10\nvalidation\nend\n";
    EXPECT_EQ(on_a_terminal([&] { say(true, false); }), lines) << "--plain";
    EXPECT_EQ(on_a_terminal([&] { say(false, true); }), "") << "another process speaks";
    testing::internal::CaptureStdout();
    say(false, false);
    EXPECT_EQ(testing::internal::GetCapturedStdout(), lines) << "a file is no terminal";
}

TEST(ProgressBar, IsErasedWhenAnErrorEndsTheRun) {
    const std::string text = on_a_terminal([] {
        Terminal terminal(false);
        terminal.progress(20, 20, 0.0);
        terminal.print("step");
    });
    EXPECT_EQ(text, "step\n[########################################] 100 %, 0:00 left\r\033[K");
}

namespace {

// Standard output into a pipe; how much of it nobody has read is up to the test.
class PipedOutput {
  public:
    PipedOutput() : before_(dup(STDOUT_FILENO)) {
        std::fflush(stdout);
        EXPECT_EQ(pipe2(ends_, O_NONBLOCK), 0);
        fcntl(ends_[1], F_SETFL, 0);  // writes wait
        dup2(ends_[1], STDOUT_FILENO);
    }
    ~PipedOutput() {
        std::fflush(stdout);
        dup2(before_, STDOUT_FILENO);
        for (const int file : {before_, ends_[0], ends_[1]}) {
            close(file);
        }
        stop_signal::received = 0;
    }
    void fill() {
        const std::string page(4096, '.');
        for (pollfd out = {ends_[1], POLLOUT, 0}; poll(&out, 1, 0) > 0;) {
            if (write(ends_[1], page.data(), page.size()) <= 0) {
                break;
            }
        }
    }
    std::string read_all() {
        std::string text;
        char buffer[4096];
        for (ssize_t n; (n = read(ends_[0], buffer, sizeof buffer)) > 0;) {
            text.append(buffer, (size_t)n);
        }
        return text;
    }

  private:
    int before_, ends_[2];
};
double seconds_of(const std::function<void()>& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

// Ranks that wait for this one would give up on it. (Nothing is expected while a failure's words would go into the
// pipe.)
TEST(Terminal, LinesThatNobodyReadsAreLeftOutWhereOthersWait) {
    double first, second, fourth;
    std::string third, after_a_cut;
    {
        PipedOutput output;
        Terminal terminal(true, false, true);
        output.fill();
        first = seconds_of([&] { terminal.print("first"); });
        second = seconds_of([&] { terminal.print("second"); });
        output.read_all();
        terminal.print("third");
        third = output.read_all();
        output.fill();
        fourth = seconds_of([&] { terminal.print("fourth"); });
        output.read_all();
        terminal.print(std::string(1 << 20, 'x'));  // some of it finds room
        output.read_all();
        terminal.print("sixth");
        after_a_cut = output.read_all();
    }
    EXPECT_GT(first, 0.5);
    EXPECT_LT(second, 0.5) << "it has waited once";
    EXPECT_EQ(third, "third\n");
    EXPECT_GT(fourth, 0.5) << "somebody reads again";
    EXPECT_EQ(after_a_cut, "\nsixth\n") << "a line of its own";
}

// A checkpoint must not wait for whoever reads the rest of a long sample.
TEST(Terminal, ATextLongerThanAPipeEndsWithASignal) {
    std::string taken;
    {
        PipedOutput output;
        Terminal terminal(true);
        std::thread signal([] {
            std::this_thread::sleep_for(std::chrono::milliseconds(300));
            stop_signal::received = SIGTERM;
        });
        alarm(60);  // ends a test that waits for ever
        terminal.print(std::string(1 << 20, 'x'));
        alarm(0);
        signal.join();
        taken = output.read_all();
    }
    EXPECT_GE(taken.size(), 4096u) << "what the pipe took";
    EXPECT_LT(taken.size(), (size_t)1 << 20);
}
