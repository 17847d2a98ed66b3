// offload.cuh: what lives in page-locked host memory and visits the GPU when it is needed (--offload), and the copies,
// which run on streams of their own beside the kernels of the step. The host waits for none of them. Results are the
// same bits as without: only where a value lies between its uses differs.
//
// InputOffload: the inputs of blocks. The forward writes them in turn into a few slots on the GPU; each goes to the
// host while the next blocks run, and comes back in the backward one block ahead. The last blocks' are still there when
// the backward begins.
//
// OptimizerOffload: master weights and AdamW's two means, as far as the GPU has no room for them. They stream through
// it in chunks, in, updated, out: the first come while the backward still runs, and both directions of the bus are busy
// at once.
//
// Bound: the bus. At 50 GB/s an input of 2^20 tokens of 1024 channels takes 43 ms either way, less than its block; a
// step of AdamW 0.24 ms a million parameters.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "adamw.cuh"          // the update
#include "memory.cuh"         // streams, events
#include "trainable_model.h"  // kinds of state

// ---- inputs of blocks ----------------------------------------------------------------------------
constexpr int INPUT_SLOTS = 2;  // one is read and written by kernels while the other is copied
inline int num_input_slots(int num_blocks) { return std::min(num_blocks, INPUT_SLOTS); }

// Block l's input is in slot l % slots from begin_write(l) on until block l + slots is written, and again from
// begin_read(l) to end_read(l); behind the last block there is nothing to do. `compute` is the stream of the kernels.
// Calls of a forward: begin_write (block 0's may be left out), end_write of blocks 0, 1, ...; of a backward:
// begin_read, end_read from the last block to the first. A forward that no backward follows makes none of these calls,
// and its kernels write the slots as they like.
class InputOffload {
  public:
    // slots: of the GPU; host: an input each of the blocks but the last slots.size(). All outlive this.
    InputOffload(std::vector<bf16*> slots, std::vector<bf16*> host) : slots_(std::move(slots)), host_(std::move(host)) {
        CHECK(!slots_.empty() && slots_.size() <= INPUT_SLOTS, "offload of block inputs: %zu slots", slots_.size());
    }
    InputOffload(const InputOffload&) = delete;
    InputOffload& operator=(const InputOffload&) = delete;
    ~InputOffload() { cudaStreamSynchronize(stream_); }  // before the memory goes

    void begin_write(int block, cudaStream_t compute) {
        if (block >= num_slots() && block < num_blocks()) {  // the slot's last input must have left
            CUDA_CHECK(cudaStreamWaitEvent(compute, copied(block)));
        }
    }
    void end_write(int block, int64_t num_elements, cudaStream_t compute) {
        if (is_offloaded(block)) {
            copy(host_[block], slots_[block % num_slots()], num_elements, block, cudaMemcpyDeviceToHost, compute);
        }
    }
    void begin_read(int block, cudaStream_t compute) {
        if (is_offloaded(block)) {
            CUDA_CHECK(cudaStreamWaitEvent(compute, copied(block)));
        }
    }
    void end_read(int block, int64_t num_elements, cudaStream_t compute) {
        const int next = block - num_slots();
        if (next >= 0) {
            copy(slots_[next % num_slots()], host_[next], num_elements, next, cudaMemcpyHostToDevice, compute);
        }
    }

  private:
    int num_slots() const { return (int)slots_.size(); }
    int num_blocks() const { return num_slots() + (int)host_.size(); }
    bool is_offloaded(int block) const { return block < (int)host_.size(); }
    CudaEvent& copied(int block) { return copied_[block % num_slots()]; }
    void copy(bf16* to, const bf16* from, int64_t num_elements, int block, cudaMemcpyKind kind, cudaStream_t compute) {
        wait_for(stream_, compute, computed_);
        CUDA_CHECK(cudaMemcpyAsync(to, from, num_elements * sizeof(bf16), kind, stream_));
        CUDA_CHECK(cudaEventRecord(copied(block), stream_));
    }

    std::vector<bf16*> slots_, host_;
    CudaStream stream_;
    std::array<CudaEvent, INPUT_SLOTS> copied_;  // of each slot the last copy, either way
    CudaEvent computed_;
};

// ---- the optimizer's state -----------------------------------------------------------------------
constexpr int OPTIMIZER_SLOTS = 2;  // one comes while the other goes
constexpr int64_t OPTIMIZER_CHUNK_ELEMENTS = (int64_t)1
                                             << 22;  // 16 MiB a copy: well past where the bus is at its fastest
// Of all slots' arrays together.
inline int64_t optimizer_offload_elements(int64_t chunk_elements) { return OPTIMIZER_SLOTS * 3 * chunk_elements; }

// One float32 each an element of the parameters' layout.
struct OptimizerArrays {
    float *master = nullptr, *exp_avg = nullptr, *exp_avg_sq = nullptr;

    float* of(StateKind kind) const {
        return kind == StateKind::master ? master : kind == StateKind::exp_avg ? exp_avg : exp_avg_sq;
    }
};

class OptimizerOffload {
  public:
    // Of elements [first, end) of a model's, both multiples of 64: host [end - first]; chunks: device
    // [optimizer_offload_elements(chunk_elements)]. chunk_elements: a multiple of 64. All outlive this.
    OptimizerOffload(const OptimizerArrays& host, int64_t first, int64_t end, float* chunks, int64_t chunk_elements)
        : host_{host.master, host.exp_avg, host.exp_avg_sq}, first_(first), end_(end), chunk_elements_(chunk_elements) {
        CHECK(chunk_elements >= 64 && chunk_elements % 64 == 0 && first % 64 == 0,
              "offload of the optimizer: chunks of %lld elements from %lld on: both must be multiples of 64",
              (long long)chunk_elements, (long long)first);
        for (Slot& slot : slots_) {
            for (float*& array : slot.arrays) {
                array = chunks;
                chunks += chunk_elements_;
            }
        }
    }

    OptimizerOffload(const OptimizerOffload&) = delete;
    OptimizerOffload& operator=(const OptimizerOffload&) = delete;
    ~OptimizerOffload() { cudaStreamSynchronize(out_); }

    // One AdamW step of these elements: weights (=), bf16, and gradients: all of the model's, from its first on; the
    // host's state in place; norm and loss device [1], as adamw_update takes them. The settings' weight_decay: of
    // elements [0, num_decayed).
    void update(bf16* weights, const float* gradients, const float* norm, const float* loss,
                const AdamWSettings& settings, int64_t num_decayed, cudaStream_t stream) {
        NVTX_RANGE();
        // Counted from 0 in every step, so that a chunk's way in follows its way out in the step before.
        int64_t chunk = 0;
        for (int64_t begin = first_; begin < end_; ++chunk) {
            const int64_t range_end = begin < num_decayed ? num_decayed : end_;
            const int64_t n = std::min(chunk_elements_, range_end - begin);
            Slot& slot = slots_[chunk % OPTIMIZER_SLOTS];
            CUDA_CHECK(cudaStreamWaitEvent(in_, slot.left));
            copy_arrays(slot, begin, n, cudaMemcpyHostToDevice, in_);
            wait_for(stream, in_, slot.arrived);
            adamw_update(slot.arrays[0], slot.arrays[1], slot.arrays[2], weights + begin, gradients + begin, norm, loss,
                         n, settings.with_decay(begin < num_decayed), stream);
            wait_for(out_, stream, slot.updated);
            copy_arrays(slot, begin, n, cudaMemcpyDeviceToHost, out_);
            CUDA_CHECK(cudaEventRecord(slot.left, out_));
            begin += n;
        }
    }

    // The host waits until its copy of the state is that of the last update: before it reads or writes it.
    void wait() { CUDA_CHECK(cudaStreamSynchronize(out_)); }

  private:
    struct Slot {
        std::array<float*, 3> arrays;  // [chunk] each, on the GPU
        CudaEvent arrived, updated, left;
    };
    void copy_arrays(const Slot& slot, int64_t begin, int64_t n, cudaMemcpyKind kind, cudaStream_t stream) {
        for (size_t i = 0; i < host_.size(); ++i) {
            float *const host = host_[i] + (begin - first_), *const device = slot.arrays[i];
            const bool in = kind == cudaMemcpyHostToDevice;
            CUDA_CHECK(cudaMemcpyAsync(in ? device : host, in ? host : device, n * sizeof(float), kind, stream));
        }
    }

    std::array<float*, 3> host_;
    int64_t first_, end_, chunk_elements_;
    std::array<Slot, OPTIMIZER_SLOTS> slots_;
    CudaStream in_, out_;
};
