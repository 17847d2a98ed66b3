// memory.cuh: device memory, and page-locked host memory. One plan made at start-up names every buffer and gives it an
// address; it prints as a table, is held against what device and host have free before anything is allocated, and then
// becomes one allocation a use. Nothing else here calls cudaMalloc, and no device memory is allocated after start-up.
// (Outside the plan: page-locked places for tokens on their way, 16 bytes a row, and for --comm_transport host what is
// on its way; with copy engines 2 MiB of the GPU for counts, comm_peer.cuh. NCCL allocates by itself, some of it when
// ranks first meet in a call of a kind: NCCL_MEMORY_ESTIMATE.)
// Pointers and views never own; the owners (device and pinned memory, stream, event) are below.
#pragma once
#include <array>
#include <climits>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cuda_common.cuh"

constexpr double BYTES_PER_GIB = 1024.0 * 1024.0 * 1024.0;

// ---- owners ------------------------------------------------------------------------------------
class DeviceMemory {
  public:
    DeviceMemory() = default;
    explicit DeviceMemory(size_t num_bytes) {
        if (num_bytes > 0) {
            CUDA_CHECK(cudaMalloc(&data_, num_bytes));
        }
    }
    DeviceMemory(DeviceMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
    DeviceMemory& operator=(DeviceMemory&& other) noexcept {
        std::swap(data_, other.data_);
        return *this;
    }
    ~DeviceMemory() { cudaFree(data_); }
    std::byte* data() const { return static_cast<std::byte*>(data_); }

  private:
    void* data_ = nullptr;
};

// Some device memory, whoever owns it.
struct DeviceRange {
    std::byte* data = nullptr;
    size_t num_bytes = 0;
};

// Page-locked host memory: the only kind that copies to the device without the host waiting. Throws, naming `what` it
// is for, when the host has not that much.
template <class Element>
class PinnedMemory {
  public:
    PinnedMemory() = default;
    explicit PinnedMemory(size_t num_elements, const char* what = "the GPU's inputs and results") {
        if (num_elements == 0) {
            return;
        }
        const size_t num_bytes = num_elements * sizeof(Element);
        const cudaError_t status = cudaHostAlloc(&data_, num_bytes, cudaHostAllocDefault);
        CHECK(status == cudaSuccess, "%s: %.2f GiB of page-locked host memory cannot be had: %s", what,
              num_bytes / BYTES_PER_GIB, cudaGetErrorString(status));
    }
    PinnedMemory(PinnedMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
    PinnedMemory& operator=(PinnedMemory&& other) noexcept {
        std::swap(data_, other.data_);
        return *this;
    }
    ~PinnedMemory() { cudaFreeHost(data_); }
    Element* data() const { return data_; }

  private:
    Element* data_ = nullptr;
};

// Where kernels of two streams want the same multiprocessors, those of the lower priority's number go first.
class CudaStream {
  public:
    // TRANSFERS: before all others, since they need few multiprocessors and the computation waits for them. CUDA takes
    // the highest priority that there is.
    static constexpr int DEFAULT_PRIORITY = 0, BEFORE_DEFAULT = -1, TRANSFERS = INT_MIN;
    explicit CudaStream(int priority = DEFAULT_PRIORITY) {
        CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, priority));
    }
    CudaStream(const CudaStream&) = delete;
    CudaStream& operator=(const CudaStream&) = delete;
    ~CudaStream() { cudaStreamDestroy(stream_); }
    operator cudaStream_t() const { return stream_; }

  private:
    cudaStream_t stream_ = nullptr;
};

class CudaEvent {
  public:
    CudaEvent() { CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
    CudaEvent(const CudaEvent&) = delete;
    CudaEvent& operator=(const CudaEvent&) = delete;
    ~CudaEvent() { cudaEventDestroy(event_); }
    operator cudaEvent_t() const { return event_; }

  private:
    cudaEvent_t event_ = nullptr;
};

// `waiter` goes on only after what is on `stream` now.
inline void wait_for(cudaStream_t waiter, cudaStream_t stream, CudaEvent& event) {
    CUDA_CHECK(cudaEventRecord(event, stream));
    CUDA_CHECK(cudaStreamWaitEvent(waiter, event));
}

// ---- the plan ----------------------------------------------------------------------------------
enum class MemoryUse { weights, optimizer, gradients, activations, workspace, host_optimizer, host_activations };
constexpr int NUM_MEMORY_USES = 7;
inline const char* memory_use_name(MemoryUse use) {
    constexpr const char* names[NUM_MEMORY_USES] = {"weights",   "optimizer",      "gradients",       "activations",
                                                    "workspace", "host optimizer", "host activations"};
    return names[(int)use];
}
inline bool is_host_memory(MemoryUse use) {
    return use == MemoryUse::host_optimizer || use == MemoryUse::host_activations;
}
inline bool lives_across_steps(MemoryUse use) {
    return use == MemoryUse::weights || use == MemoryUse::optimizer || use == MemoryUse::gradients ||
           use == MemoryUse::host_optimizer;
}

// Every buffer starts on this: TMA and 128-bit accesses ask for less, cuBLASLt's fastest kernels for no more.
constexpr size_t BUFFER_ALIGNMENT = 256;
// Left free on the device: kernels are loaded when first launched, cuBLASLt and the driver keep memory of their own.
constexpr size_t DEVICE_MEMORY_RESERVE = (size_t)512 << 20;
// What NCCL is taken to need with several ranks, part of it before the plan is held against what is free: two H200
// had 1.2 to 1.8 GiB more in use than was planned (dev/RESULTS.md). More ranks on a machine, and more machines, may
// need more.
constexpr size_t NCCL_MEMORY_ESTIMATE = (size_t)1792 << 20;
// Left to the host: a checkpoint's tensor on its way to the disk, and whatever else runs.
constexpr size_t HOST_MEMORY_RESERVE = (size_t)2 << 30;

// Hands out pieces of one area, planned elsewhere, in order, each aligned to BUFFER_ALIGNMENT. With no area it only
// adds up their sizes: what takes its pieces from one in its constructor also says how large the area must be.
class MemoryArea {
  public:
    explicit MemoryArea(void* begin) : begin_(static_cast<std::byte*>(begin)) {}
    template <class Element>
    Element* take(int64_t num_elements) {
        std::byte* const piece = begin_ == nullptr ? nullptr : begin_ + num_bytes_;
        num_bytes_ += round_up<size_t>((size_t)num_elements * sizeof(Element), BUFFER_ALIGNMENT);
        return reinterpret_cast<Element*>(piece);
    }
    size_t num_bytes() const { return num_bytes_; }

  private:
    std::byte* begin_;
    size_t num_bytes_ = 0;
};

class MemoryPlan {
  public:
    // Names a buffer; allocate() sets *pointer, which must live until then. Buffers of one name (one a layer) are one
    // row of the table. `shape` is for the reader: "[B T, C] bf16". A buffer of 0 elements gets nullptr.
    template <class Element>
    void add(Element** pointer, MemoryUse use, const std::string& name, const std::string& shape,
             int64_t num_elements) {
        *pointer = nullptr;
        if (num_elements == 0) {
            return;
        }
        const size_t num_bytes = checked_mul((uint64_t)num_elements, sizeof(Element), name.c_str());
        size_t& end = ends_[(int)use];
        buffers_.push_back({reinterpret_cast<void**>(pointer), use, end});
        end += round_up(num_bytes, BUFFER_ALIGNMENT);
        Row& row = row_of(use, name, shape);
        row.count += 1;
        row.num_bytes += num_bytes;
        row.shared = row.shared || !alternatives_.empty();
    }

    // *pointer gets the address of *owner, a buffer of this plan: where several are, in turn, one.
    template <class Element>
    void add_alias(Element** pointer, Element** owner) {
        *pointer = nullptr;
        aliases_.push_back({reinterpret_cast<void**>(pointer), reinterpret_cast<void**>(owner)});
    }

    // Buffers that are never needed at the same time share memory:
    //   begin_alternatives(use); add(...); next_alternative(); add(...); end_alternatives();
    // Blocks nest; inside one, everything is added to its use.
    void begin_alternatives(MemoryUse use) { alternatives_.push_back({use, ends_[(int)use], ends_[(int)use]}); }
    void next_alternative() {
        Alternatives& block = alternatives_.back();
        block.furthest_end = std::max(block.furthest_end, ends_[(int)block.use]);
        ends_[(int)block.use] = block.begin;
    }
    void end_alternatives() {
        next_alternative();
        ends_[(int)alternatives_.back().use] = alternatives_.back().furthest_end;
        alternatives_.pop_back();
    }

    size_t num_bytes(MemoryUse use) const { return ends_[(int)use]; }
    // What allocate() has allocated on the device.
    std::vector<DeviceRange> device_ranges() const {
        std::vector<DeviceRange> ranges;
        for (int u = 0; u < NUM_MEMORY_USES; ++u) {
            if (!is_host_memory((MemoryUse)u) && ends_[u] > 0) {
                ranges.push_back({arenas_[u].data(), ends_[u]});
            }
        }
        return ranges;
    }
    // Of the GPU, and of the host.
    size_t num_bytes() const { return total(false); }
    size_t num_host_bytes() const { return total(true); }

    // The table of --print_memory.
    std::string table() const {
        std::string text;
        auto add_line = [&](const char* use, const std::string& name, const std::string& shape,
                            const std::string& number, size_t num_bytes, bool shared) {
            text += format_string("%-16s %-34s %-30s %6s %12.4f%s\n", use, name.c_str(), shape.c_str(), number.c_str(),
                                  (double)num_bytes / BYTES_PER_GIB, shared ? " *" : "");
        };
        text += format_string("%-16s %-34s %-30s %6s %12s\n", "use", "buffer", "shape", "number", "GiB");
        for (int u = 0; u < NUM_MEMORY_USES; ++u) {
            if (ends_[u] == 0) {
                continue;
            }
            const char* const use = memory_use_name((MemoryUse)u);
            for (const Row& row : rows_) {
                if ((int)row.use == u) {
                    add_line(use, row.name, row.shape, std::to_string(row.count), row.num_bytes, row.shared);
                }
            }
            add_line(use, "all", "", "", ends_[u], false);
        }
        add_line("total", "", "", "", num_bytes(), false);
        if (num_host_bytes() > 0) {
            add_line("host total", "page-locked", "", "", num_host_bytes(), false);
        }
        return text + "* shares memory with buffers that are never needed at the same time\n";
    }

    // Allocates, sets every pointer, and zeroes what lives across steps (padding must be zero; weights and optimizer
    // state are written next). Activations and workspace are not trusted to be zero: LLMC_DEBUG and LLMC_POISON (of
    // tests) fill them with NaN.
    void allocate() {
#if defined(LLMC_DEBUG) || defined(LLMC_POISON)
        constexpr bool poison = true;
#else
        constexpr bool poison = false;
#endif
        for (int u = 0; u < NUM_MEMORY_USES; ++u) {
            const bool on_host = is_host_memory((MemoryUse)u), lives = lives_across_steps((MemoryUse)u);
            if (on_host) {
                arenas_[u].host = PinnedMemory<std::byte>(ends_[u], "--offload");
            } else {
                arenas_[u].device = DeviceMemory(ends_[u]);
            }
            if (ends_[u] > 0 && (lives || poison)) {
                const int value = lives ? 0 : 0xff;
                if (on_host) {
                    std::memset(arenas_[u].data(), value, ends_[u]);
                } else {
                    CUDA_CHECK(cudaMemset(arenas_[u].data(), value, ends_[u]));
                }
            }
        }
        CUDA_CHECK(cudaDeviceSynchronize());
        for (const Buffer& buffer : buffers_) {
            *buffer.pointer = arenas_[(int)buffer.use].data() + buffer.offset;
        }
        for (const Alias& alias : aliases_) {
            *alias.pointer = *alias.owner;
        }
    }

  private:
    struct Arena {  // one of the two
        DeviceMemory device;
        PinnedMemory<std::byte> host;
        std::byte* data() const { return host.data() != nullptr ? host.data() : device.data(); }
    };
    struct Buffer {
        void** pointer;
        MemoryUse use;
        size_t offset;
    };
    struct Alias {
        void** pointer;
        void** owner;
    };
    struct Row {
        MemoryUse use;
        std::string name, shape;
        int count = 0;
        size_t num_bytes = 0;
        bool shared = false;
    };
    struct Alternatives {
        MemoryUse use;
        size_t begin, furthest_end;
    };

    size_t total(bool on_host) const {
        size_t sum = 0;
        for (int u = 0; u < NUM_MEMORY_USES; ++u) {
            sum += is_host_memory((MemoryUse)u) == on_host ? ends_[u] : 0;
        }
        return sum;
    }
    Row& row_of(MemoryUse use, const std::string& name, const std::string& shape) {
        for (Row& row : rows_) {
            if (row.use == use && row.name == name && row.shape == shape) {
                return row;
            }
        }
        rows_.push_back({use, name, shape});
        return rows_.back();
    }

    std::array<size_t, NUM_MEMORY_USES> ends_{};
    std::array<Arena, NUM_MEMORY_USES> arenas_;
    std::vector<Buffer> buffers_;
    std::vector<Alias> aliases_;
    std::vector<Row> rows_;
    std::vector<Alternatives> alternatives_;
};
