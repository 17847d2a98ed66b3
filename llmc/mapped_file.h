// mapped_file.h: the bytes of a file as memory, read as they are touched (mmap): nothing is copied, files may be larger
// than memory, and processes of one machine share the pages.
#pragma once
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include "check.h"
#include "regular_file.h"

namespace mapped_files {

// The kernel's answer to a read of what is mapped and no longer there.
inline void on_bus_error(int, siginfo_t* info, void*) {
    static const char message[] =
        "a file that is being read (training data, or a checkpoint) became shorter, or its disk cannot be read: "
        "stopped; the newest checkpoint, if there is one, is as it was\n";
    if (info->si_code == BUS_ADRERR && write(STDERR_FILENO, message, sizeof message - 1) > 0) {
        _exit(1);
    }
    signal(SIGBUS, SIG_DFL);  // ends the process when the read is tried again
}
inline void install_handler() {
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, nullptr);
}

}  // namespace mapped_files

// The file must not become shorter while it is mapped: a read beyond its end ends the process, with a sentence.
class MappedFile {
  public:
    // Throws Error when `path` is not a regular file that can be read. An empty file has size 0 and no memory.
    explicit MappedFile(const std::string& path) : path_(path) {
        const RegularFile file(path);
        size_ = file.num_bytes(), identity_ = file.identity();
        if (size_ == 0) {
            return;
        }
        void* memory = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.descriptor(), 0);
        const int error = errno;
        CHECK(memory != MAP_FAILED, "%s: cannot read into memory: %s%s", path.c_str(), std::strerror(error),
              error != ENOMEM ? ""
              : size_ < MANY_FILES_BYTES
                  ? " (of very many files, join some: sysctl vm.max_map_count is the limit)"
                  : " (a process has no room for so many bytes: divide the file, and read some parts at a time)");
        data_ = (const unsigned char*)memory;
        mapped_files::install_handler();
    }
    ~MappedFile() {
        if (data_ != nullptr) {
            munmap((void*)data_, size_);
        }
    }
    MappedFile(MappedFile&& other) noexcept
        : path_(std::move(other.path_)),
          data_(std::exchange(other.data_, nullptr)),
          size_(std::exchange(other.size_, 0)),
          identity_(other.identity_) {}
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    MappedFile& operator=(MappedFile&&) = delete;

    const std::string& path() const { return path_; }
    const unsigned char* data() const { return data_; }
    uint64_t size() const { return size_; }

    // Throws Error when the file has become shorter since it was mapped, so that whoever is about to read it can still
    // save what he has. One that was removed or replaced stays whole in the mapping.
    void check_not_shorter() const {
        struct stat status;
        const bool is_the_same = stat(path_.c_str(), &status) == 0 && identity_of(status) == identity_;
        CHECK(!is_the_same || (uint64_t)status.st_size >= size_,
              "%s: became shorter while it is read: %lld bytes of %llu are left", path_.c_str(),
              (long long)status.st_size, (unsigned long long)size_);
    }

  private:
    static constexpr uint64_t MANY_FILES_BYTES = (uint64_t)1 << 46;  // half of a process's addresses

    std::string path_;
    const unsigned char* data_ = nullptr;
    uint64_t size_ = 0;
    FileIdentity identity_;
};
