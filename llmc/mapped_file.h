// mapped_file.h: the bytes of a file as memory, read as they are touched (mmap): nothing is copied, files may be larger
// than memory, and processes of one machine share the pages.
#pragma once
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include "check.h"

// The file must not become shorter while it is mapped: the kernel answers a read beyond its end with SIGBUS.
class MappedFile {
  public:
    // Throws Error when `path` is not a regular file that can be read. An empty file has size 0 and no memory.
    explicit MappedFile(const std::string& path) : path_(path) {
        const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe is refused, not waited for
        CHECK(file >= 0, "%s: cannot open: %s", path.c_str(), std::strerror(errno));
        struct stat status;
        const bool known = fstat(file, &status) == 0, is_file = known && S_ISREG(status.st_mode);
        int error = known ? 0 : errno;
        if (is_file && status.st_size > 0) {
            size_ = (uint64_t)status.st_size;
            void* memory = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
            error = memory == MAP_FAILED ? errno : 0;
            data_ = error == 0 ? (const unsigned char*)memory : nullptr;
        }
        close(file);
        CHECK(error == 0, "%s: cannot read into memory: %s%s", path.c_str(), std::strerror(error),
              error == ENOMEM ? " (of very many files, join some: sysctl vm.max_map_count is the limit)" : "");
        CHECK(is_file, "%s: is %s, not a file", path.c_str(),
              S_ISDIR(status.st_mode) ? "a folder" : "a device or pipe");
    }
    ~MappedFile() {
        if (data_ != nullptr) {
            munmap((void*)data_, size_);
        }
    }
    MappedFile(MappedFile&& other) noexcept
        : path_(std::move(other.path_)),
          data_(std::exchange(other.data_, nullptr)),
          size_(std::exchange(other.size_, 0)) {}
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    MappedFile& operator=(MappedFile&&) = delete;

    const std::string& path() const { return path_; }
    const unsigned char* data() const { return data_; }
    uint64_t size() const { return size_; }

  private:
    std::string path_;
    const unsigned char* data_ = nullptr;
    uint64_t size_ = 0;
};
