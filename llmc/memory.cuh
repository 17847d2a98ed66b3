// memory.cuh: device memory. One plan made at start-up names every buffer and gives it an address; it prints as a
// table, is held against what the device has free before anything is allocated, and then becomes one allocation a use.
// Nothing else here calls cudaMalloc, and nothing is allocated after start-up. Pointers and views never own; the owners
// (device and pinned memory, stream, event) are below.
#pragma once
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "cuda_common.cuh"

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

// Page-locked host memory: the only kind that copies to the device without the host waiting.
template <class Element>
class PinnedMemory {
  public:
    PinnedMemory() = default;
    explicit PinnedMemory(size_t num_elements) { CUDA_CHECK(cudaMallocHost(&data_, num_elements * sizeof(Element))); }
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

class CudaStream {
  public:
    CudaStream() { CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
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

// ---- the plan ----------------------------------------------------------------------------------
enum class MemoryUse { weights, optimizer, gradients, activations, workspace };
constexpr int NUM_MEMORY_USES = 5;
inline const char* memory_use_name(MemoryUse use) {
    constexpr const char* names[NUM_MEMORY_USES] = {"weights", "optimizer", "gradients", "activations", "workspace"};
    return names[(int)use];
}

constexpr double BYTES_PER_GIB = 1024.0 * 1024.0 * 1024.0;
// Every buffer starts on this: TMA and 128-bit accesses ask for less, cuBLASLt's fastest kernels for no more.
constexpr size_t BUFFER_ALIGNMENT = 256;
// Left free on the device: kernels are loaded when first launched, cuBLASLt and the driver keep memory of their own.
constexpr size_t DEVICE_MEMORY_RESERVE = (size_t)512 << 20;

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
    size_t num_bytes() const {
        size_t total = 0;
        for (size_t end : ends_) {
            total += end;
        }
        return total;
    }

    // The table of --print_memory.
    std::string table() const {
        std::string text = format_string("%-12s %-34s %-30s %6s %12s\n", "use", "buffer", "shape", "number", "GiB");
        for (int u = 0; u < NUM_MEMORY_USES; ++u) {
            for (const Row& row : rows_) {
                if ((int)row.use == u) {
                    text += format_string("%-12s %-34s %-30s %6d %12.4f%s\n", memory_use_name(row.use),
                                          row.name.c_str(), row.shape.c_str(), row.count,
                                          (double)row.num_bytes / BYTES_PER_GIB, row.shared ? " *" : "");
                }
            }
            text += format_string("%-12s %-34s %-30s %6s %12.4f\n", memory_use_name((MemoryUse)u), "all", "", "",
                                  (double)ends_[u] / BYTES_PER_GIB);
        }
        text +=
            format_string("%-12s %-34s %-30s %6s %12.4f\n", "total", "", "", "", (double)num_bytes() / BYTES_PER_GIB);
        return text + "* shares memory with buffers that are never needed at the same time\n";
    }

    // Allocates, sets every pointer, and zeroes what lives across steps (padding must be zero; weights and optimizer
    // state are written next). Activations and workspace are not trusted to be zero: LLMC_DEBUG and LLMC_POISON (of
    // tests) fill them with NaN.
    void allocate() {
        for (int u = 0; u < NUM_MEMORY_USES; ++u) {
            arenas_[u] = DeviceMemory(ends_[u]);
            if (ends_[u] == 0) {
                continue;
            }
            const bool lives_across_steps = u <= (int)MemoryUse::gradients;
#if defined(LLMC_DEBUG) || defined(LLMC_POISON)
            constexpr bool poison = true;
#else
            constexpr bool poison = false;
#endif
            if (lives_across_steps || poison) {
                CUDA_CHECK(cudaMemset(arenas_[u].data(), lives_across_steps ? 0 : 0xff, ends_[u]));
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
    std::array<DeviceMemory, NUM_MEMORY_USES> arenas_;
    std::vector<Buffer> buffers_;
    std::vector<Alias> aliases_;
    std::vector<Row> rows_;
    std::vector<Alternatives> alternatives_;
};
