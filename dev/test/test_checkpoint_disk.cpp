// test_checkpoint_disk.cpp: checkpoints survive whatever cuts a save short, are on the disk before they have their
// name, and are not believed when damaged.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <set>

#include "checkpoint_testing.h"

namespace {

// What was asked of the disk, in order, by the last names of paths: whether bytes survive a power cut shows nowhere
// else.
std::vector<std::string> disk_log;
std::set<std::string> disk_fails_at;  // the calls that fail
int disk_error = EIO;                 // with this; EINTR: once each

bool disk_takes(const std::string& call) {
    disk_log.push_back(call);
    const bool fails = disk_fails_at.count(call) > 0;
    if (fails) {
        errno = disk_error;
    }
    if (disk_error == EINTR) {
        disk_fails_at.erase(call);
    }
    return !fails;
}
std::string last_name(const std::string& path) { return fs::path(path).filename().string(); }

}  // namespace

// In the place of the C library's.
extern "C" int fsync(int file) {
    const std::string path = fs::read_symlink("/proc/self/fd/" + std::to_string(file)).string();
    return disk_takes("fsync " + last_name(path)) ? (int)syscall(SYS_fsync, file) : -1;
}
extern "C" int sync_file_range(int file, off64_t begin, off64_t length, unsigned flags) {
    const bool waits = (flags & SYNC_FILE_RANGE_WAIT_AFTER) != 0;
    const std::string call = format_string("%s %lld", waits ? "wait for" : "send", (long long)begin);
    if (disk_fails_at.count("sync_file_range") > 0) {
        errno = EPERM;
        return -1;
    }
    return disk_takes(call) ? (int)syscall(SYS_sync_file_range, file, begin, length, flags) : -1;
}
extern "C" int rename(const char* from, const char* to) noexcept {
    const bool taken = disk_takes("rename " + last_name(from) + " to " + last_name(to));
    return taken ? renameat(AT_FDCWD, from, AT_FDCWD, to) : -1;
}
extern "C" int renameat2(int folder, const char* from, int to_folder, const char* to, unsigned flags) noexcept {
    const bool taken = disk_takes("swap " + last_name(from) + " with " + last_name(to));
    return taken ? (int)syscall(SYS_renameat2, folder, from, to_folder, to, flags) : -1;
}
extern "C" int unlinkat(int folder, const char* name, int flags) noexcept {  // of remove_all; not in the log
    if (disk_fails_at.count("remove") > 0) {
        errno = EIO;
        return -1;
    }
    return (int)syscall(SYS_unlinkat, folder, name, flags);
}

// ---- what reaches the disk

// Whoever waits for a long file sees it go on, part by part, on a slow disk too.
TEST_F(Checkpoint, LongFilesGoToTheDiskAsTheyAreWritten) {
    const auto write = [&](const std::string& name) {
        disk_log.clear();
        const uint64_t before = durable_bytes;
        DurableFile file(folder_ + "/" + name, 1000);
        const std::string piece(700, 'x');
        for (int i = 0; i < 5; ++i) {
            file.write(piece.data(), piece.size());
        }
        file.finish();
        EXPECT_EQ(durable_bytes - before, 2u * 3500u);
        return disk_log;
    };
    using Log = std::vector<std::string>;
    EXPECT_EQ(write("long"), (Log{"send 0", "send 1000", "wait for 0", "send 2000", "wait for 1000", "fsync long"}));
    disk_fails_at = {"sync_file_range"};  // as in a container that does not allow it
    EXPECT_EQ(write("without"), (Log{"fsync without"}));
    disk_fails_at = {"wait for 0"};
    EXPECT_THROW(write("broken"), Error);
    disk_fails_at.clear();
}

TEST_F(Checkpoint, FoldersThatCannotBeSyncedAndSignalsCostNone) {
    StateModel model(small_model(true), 1);
    const auto save_when = [&](int error, const std::set<std::string>& calls) {
        fs::remove_all(run_);
        fs::create_directories(run_);
        disk_error = error, disk_fails_at = calls;
        try {
            return save(model, 5);
        } catch (const Error& failure) {
            return std::string(failure.what());
        }
    };
    const std::string folder = run_ + "/step00000005";
    const std::set<std::string> folders = {"fsync .partial-step00000005", "fsync run"};
    for (const int unknown : {EINVAL, ENOTSUP}) {  // as vboxsf says it
        EXPECT_EQ(save_when(unknown, folders), folder);
    }
    EXPECT_NE(save_when(EIO, folders).find(": cannot write this folder to the disk: "), std::string::npos);
    EXPECT_NE(save_when(EINVAL, {"fsync state.json"}).find("state.json: cannot write: "), std::string::npos);
    EXPECT_EQ(save_when(EINTR, {"fsync state.json", "fsync .partial-step00000005"}), folder) << "a signal came";
    EXPECT_EQ(find_newest_checkpoint(run_), folder);
    disk_error = EIO, disk_fails_at.clear();
}

TEST_F(Checkpoint, IsOnTheDiskBeforeItHasItsName) {
    StateModel model(small_model(true), 1);
    for (const bool exists : {false, true}) {
        disk_log.clear();
        save(model, 5);
        std::vector<std::string> log = disk_log, expected;
        for (const std::string& name : names(run_ + "/step00000005")) {
            expected.push_back("fsync " + name);
        }
        ASSERT_GT(log.size(), expected.size());
        std::sort(log.begin(), log.begin() + (int64_t)expected.size());
        expected.push_back("fsync .partial-step00000005");  // the names of these files
        if (!exists) {
            expected.push_back("rename .partial-step00000005 to step00000005");
        } else {
            expected.push_back("swap .partial-step00000005 with step00000005");
            const auto renamed = [](const std::string& entry) { return entry.rfind("rename ", 0) == 0; };
            log.erase(std::remove_if(log.begin(), log.end(), renamed), log.end());  // where names cannot be swapped
        }
        expected.push_back("fsync run");  // its own name
        EXPECT_EQ(log, expected);
    }
}

TEST_F(Checkpoint, WhatTheDiskRefusesIsNoCheckpoint) {
    StateModel model(small_model(true), 1);
    save(model, 1);
    for (const char* call : {"fsync model.safetensors", "fsync state.json", "fsync manifest.json",
                             "fsync .partial-step00000002", "rename .partial-step00000002 to step00000002"}) {
        disk_fails_at = {call};
        EXPECT_MESSAGE(save(model, 2), "Input/output error; earlier checkpoints are as they were");
        EXPECT_EQ(disk_log.back(), call) << "and nothing is tried after it";
        EXPECT_EQ(names(run_), std::vector<std::string>{"step00000001"});
    }
    disk_fails_at = {"fsync run"};
    EXPECT_MESSAGE(save(model, 2), "cannot write this folder to the disk: Input/output error");
    disk_fails_at.clear();
}

TEST_F(Checkpoint, AnOldOneThatCannotBeRemovedStays) {
    StateModel model(small_model(true), 1);
    config_.keep_checkpoints = 1;
    save(model, 1);
    const std::map<std::string, std::string> before = contents(run_);
    disk_fails_at = {"remove"};
    testing::internal::CaptureStderr();
    save(model, 2);
    EXPECT_NE(testing::internal::GetCapturedStderr().find("it stays"), std::string::npos);
    disk_fails_at.clear();
    EXPECT_EQ(names(run_), (std::vector<std::string>{"step00000001", "step00000002"}));
    fs::remove_all(run_ + "/step00000002");
    EXPECT_EQ(contents(run_), before);
}

// As on NFS.
TEST_F(Checkpoint, SameStepIsReplacedWhereNamesCannotBeSwapped) {
    StateModel first(small_model(true), 1), second(small_model(true), 2), loaded(small_model(true), 0);
    save(first, 5);
    disk_fails_at = {"swap .partial-step00000005 with step00000005"};
    save(second, 5);
    disk_fails_at.clear();
    EXPECT_EQ(names(run_), std::vector<std::string>{"step00000005"});
    load_checkpoint(loaded, run_ + "/step00000005");
    EXPECT_EQ(loaded.state[0], second.state[0]);
    // Where the new one does not get its name, the old one has it back.
    disk_fails_at = {"swap .partial-step00000005 with step00000005", "rename .partial-step00000005 to step00000005"};
    EXPECT_THROW(save(first, 5), Error);
    disk_fails_at.clear();
    StateModel again(small_model(true), 0);
    load_checkpoint(again, run_ + "/step00000005");
    EXPECT_EQ(again.state[0], second.state[0]);
}

// ---- saves that end early

TEST_F(Checkpoint, FullDiskLeavesWhatWasThere) {
    StateModel model(small_model(true), 1);
    config_.keep_checkpoints = 1;
    save(model, 1);
    const std::map<std::string, std::string> before = contents(folder_);
    for (const uint64_t num_bytes : {0, 1, 100, 1000, 5000}) {
        for (const int64_t step : {1, 2}) {
            const FileSizeLimit full(num_bytes);
            EXPECT_MESSAGE(save(model, step), "File too large; earlier checkpoints are as they were");
        }
    }
    EXPECT_EQ(contents(folder_), before);
    EXPECT_EQ(names(run_), std::vector<std::string>{"step00000001"}) << "nothing is left behind";
}

TEST_F(Checkpoint, FoldersThatCannotBeWrittenAreRefused) {
    StateModel model(small_model(true), 1);
    run_ += "/file";
    write_bytes(run_, "no folder");
    EXPECT_MESSAGE(save(model, 1), run_ + ": cannot list this folder: Not a directory");
    run_ = "/proc";
    EXPECT_MESSAGE(save(model, 1), "/proc/.partial-step00000001: cannot make this folder: No such file or directory");
    if (geteuid() != 0) {
        run_ = folder_ + "/read_only";
        fs::create_directory(run_);
        fs::permissions(run_, fs::perms::owner_read | fs::perms::owner_exec);
        EXPECT_MESSAGE(save(model, 1), "Permission denied");
        fs::permissions(run_, fs::perms::owner_all);
    }
}

// A folder made anew would have no lock and no settings.
TEST_F(Checkpoint, AFolderThatIsNotThereIsNotMade) {
    StateModel model(small_model(true), 1);
    fs::remove(run_);
    EXPECT_MESSAGE(save(model, 1), "cannot make this folder: No such file or directory; there is no earlier");
    EXPECT_FALSE(fs::exists(run_));
}

TEST_F(Checkpoint, ProcessThatDiesWhileSavingLeavesTheOldOne) {
    StateModel model(small_model(true), 1), loaded(small_model(true), 0);
    save(model, 1);
    const std::map<std::string, std::string> before = contents(run_ + "/step00000001");
    int num_leftovers = 0;
    for (uint64_t num_bytes = 0; num_bytes < 6000; num_bytes += 251) {
        const pid_t child = fork();
        ASSERT_GE(child, 0);
        if (child == 0) {
            // The signal of a file that grows too large ends the process wherever it is.
            rlimit none = {};
            setrlimit(RLIMIT_CORE, &none);
            rlimit limit = {num_bytes, RLIM_INFINITY};
            setrlimit(RLIMIT_FSIZE, &limit);
            std::signal(SIGXFSZ, SIG_DFL);
            TrainingState state;
            state.step = 2;
            save_checkpoint(model, state, config_, false, run_);
            _exit(0);
        }
        int status = 0;
        ASSERT_EQ(waitpid(child, &status, 0), child);
        ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGXFSZ) << status;
        num_leftovers += (int)names(run_).size() - 1;
        ASSERT_EQ(find_newest_checkpoint(run_), run_ + "/step00000001") << num_bytes;
    }
    EXPECT_GT(num_leftovers, 10) << "saves were cut short";
    EXPECT_EQ(contents(run_ + "/step00000001"), before);
    save(model, 3);
    EXPECT_EQ(names(run_), (std::vector<std::string>{"step00000001", "step00000003"})) << "leftovers are removed";
}

// ---- damage

TEST_F(Checkpoint, CutOffAtAnyByteIsPassedOver) {
    StateModel model(small_model(true), 1), loaded(small_model(true), 0);
    save(model, 1);
    const std::string newest = save(model, 2, true);
    for (const std::string& name : names(newest)) {
        const std::string path = newest + "/" + name, whole = read_bytes(path);
        // At every byte of both ends, and in between.
        const size_t step = whole.size() > 4000 ? 211 : 13;
        for (size_t length = 0; length < whole.size(); length += length + 40 < whole.size() && length > 40 ? step : 1) {
            fs::resize_file(path, length);
            std::map<int64_t, std::string> damaged;
            ASSERT_EQ(find_newest_checkpoint(run_, &damaged), run_ + "/step00000001") << name << " " << length;
            ASSERT_EQ(damaged.size(), 1u);
            ASSERT_EQ(damaged[2].rfind(path, 0), 0u) << damaged[2];
            write_bytes(path, whole);
        }
        fs::remove(path);
        EXPECT_EQ(find_newest_checkpoint(run_), run_ + "/step00000001") << name;
        EXPECT_THROW(load_checkpoint(loaded, newest), Error) << name;
        write_bytes(path, whole + "x");
        if (name != checkpoint::MANIFEST) {
            EXPECT_EQ(find_newest_checkpoint(run_), run_ + "/step00000001") << name;
        }
        EXPECT_THROW(load_checkpoint(loaded, newest), Error) << name;
        write_bytes(path, whole);
    }
    EXPECT_TRUE(loaded.untouched()) << "a checkpoint that is refused changes nothing";
    EXPECT_EQ(find_newest_checkpoint(run_), newest);
}

// What was found is not read through a second time: a bit that flips in between is loaded, a length that changes is
// not.
TEST_F(Checkpoint, WhatWasReadWhenItWasFoundIsNotReadAgain) {
    StateModel model(small_model(true), 1), loaded(small_model(true), 0), cut_off(small_model(true), 0);
    const std::string folder = save(model, 2), path = folder + "/" + checkpoint::WEIGHTS;
    std::string bytes = read_bytes(path);
    bytes.back() = (char)(bytes.back() ^ 1);
    write_bytes(path, bytes);
    EXPECT_THROW(load_checkpoint(loaded, folder), Error);
    EXPECT_TRUE(loaded.untouched());
    load_checkpoint(loaded, folder, RunRanks(), true);
    EXPECT_FALSE(loaded.untouched());
    bytes.pop_back();
    write_bytes(path, bytes);
    EXPECT_THROW(load_checkpoint(cut_off, folder, RunRanks(), true), Error);
    EXPECT_TRUE(cut_off.untouched());
}

TEST_F(Checkpoint, EveryFlippedBitIsFound) {
    StateModel model(small_model(true), 1), loaded(small_model(true), 0);
    const std::string folder = save(model, 2);
    std::mt19937 generator(1);
    for (const std::string& name : names(folder)) {
        const std::string path = folder + "/" + name, whole = read_bytes(path);
        for (int i = 0; i < 200; ++i) {
            const size_t byte = generator() % whole.size();
            std::string flipped = whole;
            flipped[byte] = (char)(flipped[byte] ^ 1 << generator() % 8);
            write_bytes(path, flipped);
            if (name == checkpoint::MANIFEST && find_newest_checkpoint(run_)) {
                // Between its words a manifest may change: a space that became another.
                const checkpoint::Manifest changed = checkpoint::parse_manifest(flipped, path);
                ASSERT_TRUE(whole[byte] == ' ' || whole[byte] == '\n') << byte;
                ASSERT_EQ(changed.size(), checkpoint::parse_manifest(whole, path).size());
                continue;
            }
            ASSERT_EQ(find_newest_checkpoint(run_), std::nullopt) << name << " byte " << byte;
            ASSERT_THROW(load_checkpoint(loaded, folder), Error) << name << " byte " << byte;
        }
        write_bytes(path, whole);
    }
    EXPECT_TRUE(loaded.untouched());
}

// Of a file that could not be finished nothing is left; one that replaces another may be read by the same.
TEST_F(Checkpoint, FilesAreWholeOrGone) {
    const std::string path = folder_ + "/file", other = folder_ + "/other";
    { DurableFile(path).write("abc", 3); }
    EXPECT_FALSE(fs::exists(path));
    write_bytes(other, "old");
    fs::permissions(other, fs::perms::owner_read);
    DurableFile file(path);
    file.take_permissions_of(folder_ + "/none");
    file.take_permissions_of(other);
    file.finish();
    EXPECT_EQ(fs::status(path).permissions(), fs::perms::owner_read);
}

TEST_F(Checkpoint, AFileWithTheNameOfOneIsNotReplaced) {
    StateModel model(small_model(true), 1);
    save(model, 1);
    EXPECT_NO_THROW(checkpoint::check_has_no_file_named_as_one(run_));
    write_bytes(run_ + "/step00000007", "notes");
    write_bytes(run_ + "/step7", "no such name");
    EXPECT_MESSAGE(checkpoint::check_has_no_file_named_as_one(run_), run_ + "/step00000007: is a file");
    EXPECT_EQ(checkpoint::list(run_).size(), 1u);
}

// What cannot be read may be whole: going on from an older one would waste what it holds.
TEST_F(Checkpoint, OneThatCannotBeReadIsNotPassedOver) {
    StateModel model(small_model(true), 1), loaded(small_model(true), 0);
    const std::string before = save(model, 1), newest = save(model, 2), aside = folder_ + "/aside";
    const auto refused = [&](const std::string& path, const std::string& words) {
        EXPECT_MESSAGE(find_newest_checkpoint(run_), path + ": " + words);
        EXPECT_MESSAGE(find_newest_checkpoint(run_), "whole: make it readable, or move its folder away");
        EXPECT_MESSAGE(load_checkpoint(loaded, newest), path + ": " + words);
        EXPECT_TRUE(loaded.untouched());
    };
    for (const std::string& name : names(newest)) {
        const std::string path = newest + "/" + name;
        fs::rename(path, aside);
        EXPECT_EQ(find_newest_checkpoint(run_), before) << "a file that is missing is damage";
        fs::create_directory(path);
        refused(path, "is a folder, not a file");
        fs::remove(path);
        fs::create_symlink(path, path);
        refused(path, "cannot open: Too many levels of symbolic links");
        fs::remove(path);
        ASSERT_EQ(mkfifo(path.c_str(), 0666), 0);
        refused(path, "is a device or pipe, not a file");
        fs::remove(path);
        fs::rename(aside, path);
        if (geteuid() != 0) {
            fs::permissions(path, fs::perms::none);
            refused(path, "cannot open: Permission denied");
            fs::permissions(path, fs::perms::owner_read | fs::perms::owner_write);
        }
        EXPECT_EQ(find_newest_checkpoint(run_), newest);
    }
    EXPECT_MESSAGE(digest_file("/proc/self/mem"), "/proc/self/mem: cannot read: Input/output error");
    EXPECT_THROW(digest_file("/proc/self/mem"), UnreadableFile);
    // The folder itself; and those that are removed for their age are not those.
    fs::rename(newest, aside);
    fs::create_symlink(newest, newest);
    EXPECT_MESSAGE(find_newest_checkpoint(run_), "Too many levels of symbolic links; so nobody knows");
    fs::remove(newest);
    fs::create_symlink("/not/mounted", newest);
    EXPECT_MESSAGE(find_newest_checkpoint(run_), newest + ": is a link to nothing; so nobody knows");
    config_.keep_checkpoints = 1;
    save(model, 3);
    EXPECT_EQ(names(run_), (std::vector<std::string>{"step00000002", "step00000003"}));
}
