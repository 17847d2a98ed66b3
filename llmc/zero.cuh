// zero.cuh: the optimizer's state sharded over all ranks (ZeRO-1), by the layout of zero_layout.h.
//   backward   as soon as a bucket's gradients are final, their sum over ranks goes to each slice's owner (a
//              reduce-scatter of float32), on a stream of its own beside the rest of the backward pass. With several
//              micro-batches only during the last: until then they add up locally.
//   norm       every rank's share of the sum of squares, added up in double
//   update     every rank its slices (AdamW), then the bf16 weights of all (all-gather), each bucket's beside the next
//              one's update
// A rank's gradient must already carry its share of the mean (its loss times 1 / ranks), so plain sums are right for
// every data x context mesh. Loss and norm are the same bits on all ranks: they skip the same steps.
// The flat arrays of weights and gradients are whole on every rank; master weights and running means are shards.
#pragma once
#include "adamw.cuh"             // the update
#include "comm.cuh"              // ranks
#include "grad_norm.cuh"         // sums of squares
#include "transfer_profile.cuh"  // what is hidden
#include "zero_layout.h"         // buckets and slices

// ---- kernels -----------------------------------------------------------------------------------
// Launch: one block. sum (=) [1] of partials [num_partials], in a fixed order. Bound: latency: 8 KB
// of partials a bucket, read by one block.
__global__ void __launch_bounds__(GRAD_NORM_THREADS)
    zero_sum_kernel(double* sum, const double* partials, int64_t num_partials) {
    double value = 0.0;
    for (int64_t i = threadIdx.x; i < num_partials; i += GRAD_NORM_THREADS) {
        value += partials[i];
    }
    value = block_sum_double(value);
    if (threadIdx.x == 0) {
        *sum = value;
    }
}
// Launch: one thread. norm (=) [1]. Bound: its launch.
__global__ void zero_root_kernel(float* norm, const double* sum) { *norm = (float)sqrt(*sum); }

// Scratch of ZeroOptimizer::grad_norm(), to be 8-byte aligned.
inline size_t zero_scratch_bytes(const ZeroLayout& layout) {
    return (1 + layout.buckets.size() * GRAD_NORM_BLOCKS) * sizeof(double);
}

// Where other ranks' parts of sums land when they are copied (Comm::reduce_scatter_sum): those of the largest bucket,
// or of a piece of it.
constexpr int64_t ZERO_LANDING_ELEMENTS = (int64_t)16 << 20;
inline int64_t zero_landing_elements(const ZeroLayout& layout) {
    int64_t largest = 0;
    for (const ZeroBucket& bucket : layout.buckets) {
        largest = std::max(largest, layout.slice_elements(bucket));
    }
    const int64_t others = layout.num_ranks - 1;
    return others *
           std::min(largest, ZERO_LANDING_ELEMENTS / std::max<int64_t>(others, 1) / ZERO_ALIGNMENT * ZERO_ALIGNMENT);
}

// ---- the optimizer's part of a step ------------------------------------------------------------
class ZeroOptimizer {
  public:
    ZeroOptimizer(Comm& world, const ZeroLayout& layout) : comm_(world), layout_(layout) {
        CHECK(layout.num_ranks == world.size(), "optimizer shards: laid out for %d ranks, not %d", layout.num_ranks,
              world.size());
    }

    // From here on `profile`, which must outlive this, sees every transfer of gradients and weights.
    void set_profile(TransferProfile* profile) { probe_.attach(profile, "optimizer"); }

    // During the last micro-batch's backward, after each layer of ZeroTensor::final_after: begins to sum the buckets
    // that are final now. gradients: the flat array; of each bucket this rank's slice (=) its sum over ranks, and the
    // rest may not be read again. `stream`: where the backward runs.
    void reduce_gradients_after(int layer, float* gradients, cudaStream_t stream) {
        bool waited = false;
        for (const ZeroBucket& bucket : layout_.buckets) {
            if (bucket.final_after == layer) {
                if (!waited) {
                    wait_for(stream_, stream, backward_);
                    waited = true;
                    probe_.begin_operation(GRADIENTS);
                }
                probe_.begin(TransferLane::transfers, 0, stream_);
                comm_.reduce_scatter_sum(gradients + layout_.slice_begin(bucket, comm_.rank()),
                                         gradients + bucket.begin, layout_.slice_elements(bucket), "sum of gradients",
                                         stream_);
                probe_.end(TransferLane::transfers, stream_);
            }
        }
    }

    // norm (=) device [1]: the 2-norm of the gradients summed over ranks; loss (=) device [1], its sum over ranks.
    // `stream` goes on when all sums are done.
    void grad_norm(float* norm, float* loss, const float* gradients, void* scratch, cudaStream_t stream) {
        NVTX_RANGE();
        probe_.begin_operation(GRADIENTS);
        wait_for_transfers(stream, reduced_);
        double* const sum = static_cast<double*>(scratch);
        double* const partials = sum + 1;
        for (size_t b = 0; b < layout_.buckets.size(); ++b) {
            const ZeroBucket& bucket = layout_.buckets[b];
            grad_norm_partial_kernel<<<GRAD_NORM_BLOCKS, GRAD_NORM_THREADS, 0, stream>>>(
                partials + b * GRAD_NORM_BLOCKS, gradients + layout_.slice_begin(bucket, comm_.rank()),
                layout_.slice_elements(bucket));
            CUDA_CHECK_LAUNCH();
        }
        zero_sum_kernel<<<1, GRAD_NORM_THREADS, 0, stream>>>(sum, partials,
                                                             (int64_t)layout_.buckets.size() * GRAD_NORM_BLOCKS);
        CUDA_CHECK_LAUNCH();
        comm_.all_reduce_sum(sum, 1, "gradient norm", stream);
        comm_.all_reduce_sum(loss, 1, "loss", stream);
        zero_root_kernel<<<1, 1, 0, stream>>>(norm, sum);
        CUDA_CHECK_LAUNCH();
    }

    // One AdamW step of all parameters: weights (=) [num_elements] bf16; master, exp_avg, exp_avg_sq: shards, in place;
    // gradients, norm and loss as grad_norm() left them. The settings' weight_decay: of the buckets that have it.
    // `stream` goes on when the last weights have come.
    void update(bf16* weights, float* master, float* exp_avg, float* exp_avg_sq, const float* gradients,
                const float* norm, const float* loss, const AdamWSettings& settings, cudaStream_t stream) {
        NVTX_RANGE();
        probe_.begin_operation("weights of all ranks");
        for (const ZeroBucket& bucket : layout_.buckets) {
            const int64_t slice = layout_.slice_begin(bucket, comm_.rank()), shard = bucket.shard_begin;
            adamw_update(master + shard, exp_avg + shard, exp_avg_sq + shard, weights + slice, gradients + slice, norm,
                         loss, layout_.slice_elements(bucket), settings.with_decay(bucket.decay), stream);
            wait_for(stream_, stream, updated_);
            probe_.begin(TransferLane::transfers, 0, stream_);
            comm_.all_gather(weights + bucket.begin, weights + slice, layout_.slice_elements(bucket) * sizeof(bf16),
                             "weights of all ranks", stream_);
            probe_.end(TransferLane::transfers, stream_);
        }
        wait_for_transfers(stream, gathered_);
    }

    // whole (=) [num_elements]: the shards of all ranks, each slice in its place. All ranks call it.
    void gather_state(float* whole, const float* shard, cudaStream_t stream) {
        NVTX_RANGE();
        for (const ZeroBucket& bucket : layout_.buckets) {
            comm_.all_gather(whole + bucket.begin, shard + bucket.shard_begin,
                             layout_.slice_elements(bucket) * sizeof(float), "optimizer state of all ranks", stream);
        }
    }
    // whole [num_elements] (=) in every bucket all ranks' slices, where each holds its own in place: gradients, for
    // tests.
    void gather_slices(float* whole, cudaStream_t stream) {
        wait_for(stream, stream_, reduced_);
        for (const ZeroBucket& bucket : layout_.buckets) {
            comm_.all_gather(whole + bucket.begin, whole + layout_.slice_begin(bucket, comm_.rank()),
                             layout_.slice_elements(bucket) * sizeof(float), "gradients of all ranks", stream);
        }
    }

  private:
    static constexpr const char* GRADIENTS = "sum of gradients";
    void wait_for_transfers(cudaStream_t stream, CudaEvent& event) {
        probe_.begin(TransferLane::waits, 0, stream);
        wait_for(stream, stream_, event);
        probe_.end(TransferLane::waits, stream);
    }

    Comm& comm_;
    ZeroLayout layout_;
    TransferProbe probe_;
    CudaStream stream_{CudaStream::TRANSFERS};  // of transfers
    CudaEvent backward_, reduced_, updated_, gathered_;
};
