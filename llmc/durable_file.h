// durable_file.h: files that are on the disk when they are said to be, and their XXH3 checksums.
#pragma once
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

// GCC 12 takes the undefined operands of its own AVX-512 intrinsics for uninitialized variables once they are inlined
// (GCC bug 105593), and warns of each where -march=native has AVX-512.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define XXH_INLINE_ALL
#include <xxhash.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include "check.h"
#include "regular_file.h"

// What a file is recognised by: its length and the XXH3 hash (64 bits) of its bytes.
struct FileDigest {
    uint64_t num_bytes = 0;
    uint64_t xxh3 = 0;
};

// XXH3 of bytes that arrive in pieces.
class Xxh3Stream {
  public:
    Xxh3Stream() { XXH3_64bits_reset(&state_); }
    void update(const void* data, uint64_t num_bytes) {
        XXH3_64bits_update(&state_, data, num_bytes);
        num_bytes_ += num_bytes;
    }
    FileDigest digest() const { return {num_bytes_, XXH3_64bits_digest(&state_)}; }

  private:
    XXH3_state_t state_;
    uint64_t num_bytes_ = 0;
};

// fsync, once more where a signal that asks for a checkpoint has interrupted it. False: see errno.
inline bool sync_to_disk(int file) {
    int status;
    do {
        status = fsync(file);
    } while (status != 0 && errno == EINTR);
    return status == 0;
}

// Bytes that this process has written into durable files, and again as they reach the disk: how long work goes on.
inline std::atomic<uint64_t> durable_bytes{0};

// A new file that is written from its beginning to its end. Whatever fails throws Error with the path and the reason;
// what was not finished goes again.
class DurableFile {
  public:
    // There must be no file at `path`. part_bytes: how much goes to the disk at a time.
    explicit DurableFile(const std::string& path, uint64_t part_bytes = (uint64_t)64 << 20)
        : path_(path),
          part_bytes_(part_bytes),
          file_(open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)) {
        check(file_ >= 0);
    }
    ~DurableFile() {
        if (file_ >= 0) {
            close(file_);
            unlink(path_.c_str());
        }
    }
    DurableFile(const DurableFile&) = delete;
    DurableFile& operator=(const DurableFile&) = delete;

    void write(const void* data, uint64_t num_bytes) {
        const char* next = (const char*)data;
        for (uint64_t left = num_bytes; left > 0;) {
            constexpr uint64_t MAX_CALL = (uint64_t)1 << 30;  // Linux writes at most 2 GiB a call
            const ssize_t written = ::write(file_, next, left < MAX_CALL ? left : MAX_CALL);
            check(written > 0 || (written < 0 && errno == EINTR));
            const uint64_t advance = written > 0 ? (uint64_t)written : 0;
            next += advance, left -= advance, written_ += advance, durable_bytes += advance;
            send_to_disk();
        }
        hash_.update(data, num_bytes);
    }
    // Who may read and write it: as of the file that it is to replace, if there is one and the file system knows.
    void take_permissions_of(const std::string& other) const {
        struct stat status;
        if (stat(other.c_str(), &status) == 0) {
            fchmod(file_, status.st_mode & 07777);
        }
    }
    // Waits until the bytes are on the disk. Nothing can be written afterwards.
    FileDigest finish() {
        check(sync_to_disk(file_));
        durable_bytes += written_ - on_disk_;
        const int file = file_;
        file_ = -1;
        check(close(file) == 0);
        return hash_.digest();
    }

  private:
    // Every part that is written goes on its way to the disk, and the one before it is waited for: so finish() has
    // little left to wait for, without a sign of life, on a disk that is slow.
    void send_to_disk() {
        for (; written_ - sent_ >= part_bytes_; sent_ += part_bytes_) {
            sync_range(sent_, SYNC_FILE_RANGE_WRITE);
            if (sent_ > 0) {
                sync_range(sent_ - part_bytes_,
                           SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
                on_disk_ += part_bytes_, durable_bytes += part_bytes_;
            }
        }
    }
    void sync_range(uint64_t begin, unsigned flags) const {
        const bool done = sync_file_range(file_, (off64_t)begin, part_bytes_, flags) == 0;
        // Where the call is not known or not allowed, finish() does all of it.
        check(done || (errno != EIO && errno != ENOSPC && errno != EDQUOT));
    }
    void check(bool done) const { CHECK(done, "%s: cannot write: %s", path_.c_str(), std::strerror(errno)); }

    std::string path_;
    uint64_t part_bytes_;
    int file_;
    uint64_t written_ = 0, sent_ = 0, on_disk_ = 0;
    Xxh3Stream hash_;
};

// Waits until the names of the files in `folder` are on the disk: after files are made, renamed or removed in it. Some
// file systems (vboxsf, OrangeFS) know no such thing for folders.
inline void sync_folder(const std::string& folder) {
    const int file = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(file >= 0, "%s: cannot open this folder: %s", folder.c_str(), std::strerror(errno));
    const bool synced = sync_to_disk(file) || errno == EINVAL || errno == ENOTSUP;
    const int error = errno;
    close(file);
    CHECK(synced, "%s: cannot write this folder to the disk: %s", folder.c_str(), std::strerror(error));
}

// Length and hash of a file's bytes as they are read now. By read() rather than mmap(): a disk that cannot give them is
// an error, not a signal. progress (+=): the bytes, as they are read; may be null.
inline FileDigest digest_file(const std::string& path, std::atomic<uint64_t>* progress = nullptr) {
    RegularFile file(path);
    Xxh3Stream hash;
    std::vector<char> buffer((size_t)256 << 10);
    while (const size_t num_bytes = file.read(buffer.data(), buffer.size())) {
        hash.update(buffer.data(), num_bytes);
        if (progress != nullptr) {
            *progress += num_bytes;
        }
    }
    return hash.digest();
}
