// regular_file.h: a file opened for reading. Folders, devices and pipes that stand where a file should are refused.
#pragma once
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include "check.h"

// A file that is there, but whose contents nobody can know now: other than a damaged one, it may be as good as ever
// once its owner, disk or network is back.
struct UnreadableFile : Error {
    using Error::Error;
};

// Which file it is, by whatever name.
using FileIdentity = std::pair<dev_t, ino_t>;
inline FileIdentity identity_of(const struct stat& status) { return {status.st_dev, status.st_ino}; }

class RegularFile {
  public:
    // Throws Error when there is no file of this name, UnreadableFile when it cannot be opened or is no regular file: a
    // pipe is refused, not waited for.
    explicit RegularFile(const std::string& path)
        : path_(path), file_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
        const bool known = file_ >= 0 && fstat(file_, &status_) == 0;
        if (!known || !S_ISREG(status_.st_mode)) {
            const int error = errno;
            close_file();
            const std::string reason = !known                     ? std::string("cannot open: ") + std::strerror(error)
                                       : S_ISDIR(status_.st_mode) ? "is a folder, not a file"
                                                                  : "is a device or pipe, not a file";
            CHECK(known || error != ENOENT, "%s: %s", path.c_str(), reason.c_str());
            throw UnreadableFile(path + ": " + reason);
        }
    }
    ~RegularFile() { close_file(); }
    RegularFile(const RegularFile&) = delete;
    RegularFile& operator=(const RegularFile&) = delete;

    uint64_t num_bytes() const { return (uint64_t)status_.st_size; }  // when it was opened
    FileIdentity identity() const { return identity_of(status_); }
    int descriptor() const { return file_; }

    // The next bytes, at most max_bytes, into `out`; how many: 0 at the end of the file alone. Throws UnreadableFile.
    size_t read(void* out, size_t max_bytes) {
        ssize_t num_bytes;
        do {
            num_bytes = ::read(file_, out, max_bytes);
        } while (num_bytes < 0 && errno == EINTR);
        if (num_bytes < 0) {
            throw UnreadableFile(format_string("%s: cannot read: %s", path_.c_str(), std::strerror(errno)));
        }
        return (size_t)num_bytes;
    }

  private:
    void close_file() const {
        if (file_ >= 0) {
            close(file_);
        }
    }

    std::string path_;
    int file_;
    struct stat status_ = {};
};
