// output_lock.h: one process at a time trains into an output folder. Two would prune and replace each other's
// checkpoints, and mix their lines in metrics.jsonl.
#pragma once
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <string>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "regular_file.h"

// The kernel's lock (flock) of the file .lock in a folder, from construction to the end of the object or of the
// process, however that ends. The file stays: were it removed, a process that had just opened it would lock what nobody
// sees. On network file systems the lock holds as far as they keep it.
class OutputLock {
  public:
    // `output_dir` exists. Throws Error when another process has the lock, or the file cannot be made. A file system
    // that has no locks is no reason not to train there: see warning(). lock: flock(), or what a test puts in its
    // place.
    explicit OutputLock(const std::string& output_dir, int (*lock)(int, int) = flock) {
        const std::string path = lock_path(output_dir);
        // For writing: network file systems ask for it. Not for programs that this one may start.
        file_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
        CHECK(file_ >= 0, "--output_dir %s: cannot open %s: %s", output_dir.c_str(), path.c_str(),
              std::strerror(errno));
        if (stat(output_dir.c_str(), &folder_) != 0 || fstat(file_, &locked_) != 0) {
            const int error = errno;
            close(file_);
            fail("--output_dir %s: cannot look there: %s", output_dir.c_str(), std::strerror(error));
        }
        int status;
        do {
            status = lock(file_, LOCK_EX | LOCK_NB);
        } while (status != 0 && errno == EINTR);
        if (status == 0) {
            return;
        }
        const int error = errno;
        const bool unsupported = error == ENOLCK || error == EOPNOTSUPP || error == ENOSYS;
        if (unsupported) {
            warning_ = format_string(
                "--output_dir %s: its file system has no locks (%s), so nothing keeps a second "
                "process from training into it",
                output_dir.c_str(), std::strerror(error));
            return;
        }
        close(file_);
        CHECK(error == EWOULDBLOCK, "--output_dir %s: cannot lock %s: %s", output_dir.c_str(), path.c_str(),
              std::strerror(error));
        fail(
            "--output_dir %s: another process is training into this folder (it holds %s): wait until it has ended, or "
            "name another folder",
            output_dir.c_str(), path.c_str());
    }
    ~OutputLock() { release(); }
    OutputLock(const OutputLock&) = delete;
    OutputLock& operator=(const OutputLock&) = delete;

    // Gives the folder back, whoever else holds this object.
    void release() {
        if (file_ >= 0) {
            close(file_);
        }
        file_ = -1;
    }
    // Whether the folder of that name is still the one that was locked.
    bool is_of(const std::string& output_dir) const { return is_at(output_dir, folder_); }
    // Whether another process that wants it comes upon this lock: not where its file has been removed.
    bool holds(const std::string& output_dir) const {
        return file_ >= 0 && is_of(output_dir) && is_at(lock_path(output_dir), locked_);
    }
    // A sentence for the user when there is no lock after all; empty when there is.
    const std::string& warning() const { return warning_; }

  private:
    static std::string lock_path(const std::string& output_dir) { return output_dir + "/.lock"; }
    static bool is_at(const std::string& path, const struct stat& what) {
        struct stat now;
        return stat(path.c_str(), &now) == 0 && identity_of(now) == identity_of(what);
    }

    int file_;
    struct stat folder_, locked_;  // the folder, and the lock's file in it
    std::string warning_;
};
