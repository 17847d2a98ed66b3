// cross_entropy.cu: losses and, in place, the gradient of the logits; and the mean of the losses. Bound: bandwidth, V
// elements of bf16 read and written a row (4V bytes).
#include "dev/cuda/harness.cuh"
#include "llmc/classifier.cuh"
#include "llmc/reference/classifier.h"

using Launcher = void (*)(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int64_t V,
                          int64_t row_stride, float dloss, bool write_gradient, cudaStream_t stream);

// ---- 1: one block a row, three passes: maximum, sum, gradient ----------------------------------
__global__ void cross_entropy_kernel1(float* losses, bf16* logits, const int32_t* targets, int V, int64_t row_stride,
                                      float dloss, bool write_gradient) {
    bf16* row = logits + blockIdx.x * row_stride;
    float maximum = -INFINITY, sum = 0.0f;
    for (int c = threadIdx.x; c < V; c += blockDim.x) {
        maximum = fmaxf(maximum, (float)row[c]);
    }
    maximum = block_max(maximum);
    for (int c = threadIdx.x; c < V; c += blockDim.x) {
        sum += expf((float)row[c] - maximum);
    }
    const float lse = maximum + logf(block_sum(sum));
    const int target = targets[blockIdx.x];
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = lse - (float)row[target];
    }
    __syncthreads();  // the target's logit is read before it is overwritten
    for (int64_t c = threadIdx.x; write_gradient && c < row_stride; c += blockDim.x) {
        row[c] = (bf16)(c < V ? (expf((float)row[c] - lse) - (c == target ? 1.0f : 0.0f)) * dloss : 0.0f);
    }
}
static void cross_entropy1(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int64_t V,
                           int64_t row_stride, float dloss, bool write_gradient, cudaStream_t stream) {
    cross_entropy_kernel1<<<rows, 256, 0, stream>>>(losses, logits, targets, (int)V, row_stride, dloss, write_gradient);
    CUDA_CHECK_LAUNCH();
}

// ---- 2: maximum and sum in one pass, 16 bytes an access; the row is read again for the gradient -
__global__ void __launch_bounds__(CROSS_ENTROPY_MAX_THREADS)
    cross_entropy_kernel2(float* losses, bf16* logits, const int32_t* targets, int V, int64_t row_stride, float dloss,
                          bool write_gradient) {
    bf16* row = logits + blockIdx.x * row_stride;
    const int target = targets[blockIdx.x];
    const float target_logit = row[target];
    SoftmaxState state;
    for (int c = threadIdx.x * 8; c < V; c += blockDim.x * 8) {
        const bf16x8 pack = load128(row + c);
        for (int k = 0; k < 8 && c + k < V; ++k) {
            state.join((float)pack[k], 1.0f);
        }
    }
    state = cross_entropy_row_state<CROSS_ENTROPY_MAX_THREADS>(state, blockDim.x);
    const float lse = state.maximum + logf(state.sum);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = lse - target_logit;
    }
    for (int c = threadIdx.x * 8; write_gradient && c < row_stride; c += blockDim.x * 8) {
        bf16x8 pack = load128(row + c);
        for (int k = 0; k < 8; ++k) {
            const float gradient = (__expf((float)pack[k] - lse) - (c + k == target ? 1.0f : 0.0f)) * dloss;
            pack[k] = (bf16)(c + k < V ? gradient : 0.0f);
        }
        store128(row + c, pack);
    }
}
static void cross_entropy2(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int64_t V,
                           int64_t row_stride, float dloss, bool write_gradient, cudaStream_t stream) {
    cross_entropy_kernel2<<<rows, CROSS_ENTROPY_MAX_THREADS, 0, stream>>>(losses, logits, targets, (int)V, row_stride,
                                                                          dloss, write_gradient);
    CUDA_CHECK_LAUNCH();
}

// ---- 4 to 6: short rows stay in registers ------------------------------------------------------
// What bounds 3 at V = 258: a row is 33 packs, so 32 lanes load once (the 33rd pack a second time), then wait for the
// target's logit, which waits for the target; 17 KB a multiprocessor are in flight where 20 are needed all the time.
//   lanes_per_row lanes of a warp hold a row, up to MAX_PACKS packs each: several rows a warp. Maximum first, then the
//   sum: no rescaling. The lane that holds the target's logit writes the loss: no load waits for another.
// Predicted, of copy: V 258 90 % (33 of 40 packs are read, 40 counted), V 1000 90 %; eight packs a lane at least as
// good as four, two worse at 258 (two warps' worth of shuffles a row for 33 loads).
constexpr int REGISTER_ROW_THREADS = 256;

__device__ __forceinline__ float bf16_max(const bf16x8& pack, float maximum) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        maximum = fmaxf(maximum, __bfloat162float(pack[k]));
    }
    return maximum;
}
// Element k of a pack, k not a constant.
__device__ __forceinline__ float element_of(const bf16x8& pack, int k) {
    float value = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        value = i == k ? __bfloat162float(pack[i]) : value;
    }
    return value;
}
// The gradient of eight logits. pack: which of the row's; target_pack: -1 where the row has no valid target.
__device__ __forceinline__ bf16x8 cross_entropy_gradient(const bf16x8& logits, float lse_log2, float dloss, int pack,
                                                         int target_pack, int target, int V) {
    float gradients[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        gradients[k] = exp2_approx(__bfloat162float(logits[k]) * LOG2_E - lse_log2) * dloss;
    }
    // Two packs of a row at most are special: that of the target, and the one in which the padding begins.
    if (pack == target_pack || pack * 8 + 8 > V) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const int column = pack * 8 + k;
            gradients[k] = column < V ? gradients[k] - (column == target ? dloss : 0.0f) : 0.0f;
        }
    }
    bf16x8 result;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        result[k] = __float2bfloat16(gradients[k]);
    }
    return result;
}

// Hides from the compiler that these packs were unpacked before: it would keep the floats, twice the registers.
template <int PACKS>
__device__ __forceinline__ void forget_unpacked(bf16x8 (&packs)[PACKS]) {
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        int4& words = *reinterpret_cast<int4*>(packs[i].data);
        asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
    }
}

// Launch: lanes_per_row lanes a row, 8, 16 or 32, 1-D grid over rows. row_packs <= lanes_per_row * PACKS.
template <int PACKS>
__global__ void __launch_bounds__(REGISTER_ROW_THREADS, 4)
    register_rows_kernel(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int V, int row_packs,
                         int lanes_per_row, float dloss, bool write_gradient) {
    const int rows_per_block = REGISTER_ROW_THREADS / lanes_per_row, lane = threadIdx.x % lanes_per_row;
    const int64_t row = (int64_t)blockIdx.x * rows_per_block + threadIdx.x / lanes_per_row;
    const bool active = row < rows;  // the others stay for the shuffles
    const int num_packs = active ? (V + 7) / 8 : 0;
    bf16* row_logits = logits + row * row_packs * 8;
    const int target = active ? targets[row] : -1;
    const int target_pack = target >= 0 && target < V ? target / 8 : -1;

    bf16x8 packs[PACKS];
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        const int pack = lane + i * lanes_per_row;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            packs[i][k] = __ushort_as_bfloat16(0xff80);  // -infinity
        }
        if (pack < num_packs) {
            packs[i] = load128_streaming(row_logits + pack * 8);
        }
    }
    float maximum = -INFINITY;
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        const int pack = lane + i * lanes_per_row;
        if (pack < num_packs && pack * 8 + 8 > V) {
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                packs[i][k] = pack * 8 + k < V ? packs[i][k] : __ushort_as_bfloat16(0xff80);
            }
        }
        maximum = bf16_max(packs[i], maximum);
    }
    for (int offset = lanes_per_row / 2; offset > 0; offset /= 2) {
        maximum = fmaxf(maximum, __shfl_xor_sync(FULL_WARP, maximum, offset));
    }
    forget_unpacked(packs);
    const float shift_log2 = maximum == -INFINITY ? 0.0f : maximum * LOG2_E;  // -inf - -inf would be NaN
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            sum += exp2_approx(__bfloat162float(packs[i][k]) * LOG2_E - shift_log2);
        }
    }
    for (int offset = lanes_per_row / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(FULL_WARP, sum, offset);
    }
    if (!active) {
        return;
    }
    forget_unpacked(packs);
    const float lse = maximum + logf(sum);
    if (target_pack < 0 && lane == 0) {
        losses[row] = NAN;
    }
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        const int pack = lane + i * lanes_per_row;
        if (pack == target_pack) {
            losses[row] = lse - element_of(packs[i], target % 8);
        }
        if (write_gradient && pack < row_packs) {
            store128(row_logits + pack * 8,
                     cross_entropy_gradient(packs[i], lse * LOG2_E, dloss, pack, target_pack, target, V));
        }
    }
}

using RegisterRowsKernel = void (*)(float*, bf16*, const int32_t*, int64_t, int, int, int, float, bool);
template <int PACKS>
RegisterRowsKernel register_rows_of(int packs) {
    if constexpr (PACKS > 1) {
        return packs == PACKS ? register_rows_kernel<PACKS> : register_rows_of<PACKS - 1>(packs);
    } else {
        return register_rows_kernel<1>;
    }
}
// Rows of at most 32 * MAX_PACKS packs; others as LONG_ROWS does.
template <int MAX_PACKS, Launcher LONG_ROWS>
void register_rows(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int64_t V, int64_t row_stride,
                   float dloss, bool write_gradient, cudaStream_t stream) {
    const int row_packs = (int)(row_stride / 8);
    int lanes_per_row = 8;
    while (lanes_per_row < WARP_SIZE && lanes_per_row * MAX_PACKS < row_packs) {
        lanes_per_row *= 2;
    }
    if (row_packs > lanes_per_row * MAX_PACKS) {
        LONG_ROWS(losses, logits, targets, rows, V, row_stride, dloss, write_gradient, stream);
        return;
    }
    const RegisterRowsKernel kernel = register_rows_of<MAX_PACKS>(ceil_div(row_packs, lanes_per_row));
    kernel<<<ceil_div<int64_t>(rows, REGISTER_ROW_THREADS / lanes_per_row), REGISTER_ROW_THREADS, 0, stream>>>(
        losses, logits, targets, rows, (int)V, row_packs, lanes_per_row, dloss, write_gradient);
    CUDA_CHECK_LAUNCH();
}

// ---- 7 to 11: long rows flow through shared memory ---------------------------------------------
// What bounds 3 at V = 128256: two blocks a multiprocessor keep 44 % of their rows in shared memory; the rest is read
// again when 264 rows of 256 KB, 67 MB, have gone through an L2 cache of 50 MB.
//   7: the same kernel with all of a multiprocessor's shared memory for one block: 89 % of the row stays.
//   8 to 11: blocks that stay. A thread's packs have slots in shared memory; as it replaces a pack by its gradient it
//   starts copying the same pack of the block's next row into the slot, and a few slots later adds that to the next
//   row's sum. So reads, writes and arithmetic go on all the time; one barrier a row. What has no slot is read at the
//   end of one row and again, from L2, at the start of the next.
// Predicted, of copy at V 128256 / 50304: 7 86 / 88 %, 8 92 / 93 %, with half the loads in flight (9) 90 / 92 %, with
// 512 threads (10) 88 / 93 %, two blocks a multiprocessor (11) 84 / 94 %.
//
// The state of all threads of the block, in each of them; fixed order. With parity 0 and 1 in turn one barrier does.
__device__ __forceinline__ SoftmaxState flow_row_state(SoftmaxState state, int parity) {
    __shared__ float2 warp_states[2][WARP_SIZE];
    auto join_warp = [&] {
#pragma unroll
        for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
            const float maximum = __shfl_xor_sync(FULL_WARP, state.maximum, offset);
            const float sum = __shfl_xor_sync(FULL_WARP, state.sum, offset);
            state.join(maximum, sum);
        }
    };
    join_warp();
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    if (lane == 0) {
        warp_states[parity][warp] = make_float2(state.maximum, state.sum);
    }
    __syncthreads();
    state = SoftmaxState();
    if (lane < (int)blockDim.x / WARP_SIZE) {
        state.maximum = warp_states[parity][lane].x;
        state.sum = warp_states[parity][lane].y;
    }
    join_warp();
    return state;
}

// Launch: as many blocks as fit, of 32 to FLOW_MAX_THREADS threads, 1-D; a block takes every gridDim.x-th row. Dynamic
// shared memory: [slots][threads] packs. AHEAD: slots on their way.
constexpr int FLOW_MAX_THREADS = 1024;

template <int AHEAD>
__global__ void __launch_bounds__(FLOW_MAX_THREADS)
    flow_rows_kernel(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int V, int row_packs, int slots,
                     float dloss, bool write_gradient) {
    extern __shared__ int4 flow_slots[];
    const int threads = blockDim.x, num_packs = (V + 7) / 8;
    const uint32_t own = shared_address(flow_slots + threadIdx.x), slot_bytes = threads * 16;
    float lse = 0.0f;
    int target = -1, target_pack = -1;
    int parity = 0;
    // In a round the gradient of `row` is written (not in the first) and the state of `next` is gathered.
    for (int64_t row = (int64_t)blockIdx.x - gridDim.x; row < rows; row += gridDim.x, parity ^= 1) {
        const int64_t next = row + gridDim.x;
        const bool gathers = next < rows, writes = row >= 0 && write_gradient;
        bf16* row_logits = logits + row * row_packs * 8;
        const bf16* next_logits = logits + next * row_packs * 8;
        const int next_target = gathers ? targets[next] : -1;
        const int next_target_pack = next_target >= 0 && next_target < V ? next_target / 8 : -1;
        const float lse_log2 = lse * LOG2_E;
        SoftmaxState state;
        float target_logit = 0.0f;
        auto add = [&](const bf16x8& logits_pack, int pack) {
            float values[8];
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                values[k] = __bfloat162float(logits_pack[k]);
            }
            if (pack * 8 + 8 > V) {
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    values[k] = pack * 8 + k < V ? values[k] : -INFINITY;
                }
            }
            state.add(values);
            if (pack == next_target_pack) {
                target_logit = element_of(logits_pack, next_target % 8);
            }
        };
        auto read_slot = [&](int slot) {
            bf16x8 pack;
            *reinterpret_cast<int4*>(pack.data) = load_shared_b128(own + slot * slot_bytes);
            return pack;
        };
        auto add_slot = [&](int slot) {
            const int pack = threadIdx.x + slot * threads;
            if (gathers && pack < num_packs) {
                add(read_slot(slot), pack);
            }
        };
        auto write = [&](const bf16x8& logits_pack, int pack) {
            store128(row_logits + (int64_t)pack * 8,
                     cross_entropy_gradient(logits_pack, lse_log2, dloss, pack, target_pack, target, V));
        };
        // What has no slot was read last: L2 has it.
        for (int pack = threadIdx.x + slots * threads; writes && pack < row_packs; pack += threads) {
            write(pack < num_packs ? load128(row_logits + (int64_t)pack * 8) : bf16x8{}, pack);
        }
        for (int slot = 0; slot < slots; ++slot) {
            const int pack = threadIdx.x + slot * threads;
            if (writes && pack < row_packs) {
                write(read_slot(slot), pack);
            }
            if (gathers && pack < num_packs) {
                cp_async_16(own + slot * slot_bytes, next_logits + (int64_t)pack * 8);
            }
            cp_async_commit();
            cp_async_wait<AHEAD>();
            if (slot >= AHEAD) {
                add_slot(slot - AHEAD);
            }
        }
        for (int pack = threadIdx.x + slots * threads; gathers && pack < num_packs; pack += threads) {
            add(load128(next_logits + (int64_t)pack * 8), pack);
        }
        cp_async_wait<0>();
        for (int slot = max(slots - AHEAD, 0); slot < slots; ++slot) {
            add_slot(slot);
        }
        if (gathers) {
            state = flow_row_state(state, parity);
            lse = state.maximum + logf(state.sum);
            target = next_target;
            target_pack = next_target_pack;
            if (target_pack < 0 && threadIdx.x == 0) {
                losses[next] = NAN;
            } else if (target_pack >= 0 && target_pack % threads == (int)threadIdx.x) {
                losses[next] = lse - target_logit;
            }
        }
    }
}

// LONG_THREADS: of a block that has a multiprocessor for itself, as one has whose row takes more than half of the
// shared memory. HALVES: shorter rows run two or more blocks a multiprocessor.
template <int AHEAD, int LONG_THREADS, bool HALVES>
void flow_rows(float* losses, bf16* logits, const int32_t* targets, int64_t rows, int64_t V, int64_t row_stride,
               float dloss, bool write_gradient, cudaStream_t stream) {
    const int row_packs = (int)(row_stride / 8);
    int device, num_sms, sm_bytes, reserved_bytes, blocks_per_sm;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&reserved_bytes, cudaDevAttrReservedSharedMemoryPerBlock, device));
    const int static_bytes = 2 * WARP_SIZE * sizeof(float2);
    const int most_bytes = sm_bytes - reserved_bytes - static_bytes;
    int threads = LONG_THREADS;
    if (HALVES && row_packs * 16 <= sm_bytes / 2 - reserved_bytes - static_bytes) {
        threads = 64;
        while (threads < LONG_THREADS / 2 && threads * 8 < row_packs) {
            threads *= 2;
        }
    }
    const int slots = std::min(ceil_div(row_packs, threads), most_bytes / (threads * 16));
    const int shared_bytes = slots * threads * 16;
    CUDA_CHECK(cudaFuncSetAttribute(flow_rows_kernel<AHEAD>, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes));
    CUDA_CHECK(cudaFuncSetAttribute(flow_rows_kernel<AHEAD>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared));
    CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, flow_rows_kernel<AHEAD>, threads, shared_bytes));
    CHECK(blocks_per_sm > 0, "cross-entropy: %d threads and %d bytes of shared memory do not fit", threads,
          shared_bytes);
    const int num_blocks = (int)std::min<int64_t>(rows, (int64_t)num_sms * blocks_per_sm);
    flow_rows_kernel<AHEAD><<<num_blocks, threads, shared_bytes, stream>>>(losses, logits, targets, rows, (int)V,
                                                                           row_packs, slots, dloss, write_gradient);
    CUDA_CHECK_LAUNCH();
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one block a row, three passes", cross_entropy1},
    {2, "online maximum and sum, 16 bytes an access, the row read twice", cross_entropy2},
    {4, "short rows in registers, up to 8 packs a lane", register_rows<8, cross_entropy_forward_backward>},
    {5, "short rows in registers, up to 4 packs a lane", register_rows<4, cross_entropy_forward_backward>},
    {6, "short rows in registers, up to 2 packs a lane", register_rows<2, cross_entropy_forward_backward>},
    {7, "variant 3 with one block of 1024 threads an SM", launch_cross_entropy<1024, 1>},
    {8, "the next row flows in as this one's gradient goes out, 4 slots ahead",
     register_rows<8, flow_rows<4, 1024, true>>},
    {9, "2 slots ahead", register_rows<8, flow_rows<2, 1024, true>>},
    {10, "8 slots ahead, at most 512 threads", register_rows<8, flow_rows<8, 512, true>>},
    {11, "4 slots ahead, one block an SM for any row", register_rows<8, flow_rows<4, 1024, false>>},
    {3, "several packs in flight, the row kept in shared memory, two blocks an SM (llmc/classifier.cuh)",
     cross_entropy_forward_backward},
};

// Logits that hurt: one dominant entry a row; a row of -infinity but for one; or plain random ones.
enum class LogitKind { random, dominant, masked };
static const char* kind_name(LogitKind kind) {
    return kind == LogitKind::random ? "" : kind == LogitKind::dominant ? " one dominant" : " -inf but one";
}

// The classifier as a whole, in chunks of rows, against the reference.
static void check_classifier(Harness& h) {
    const ClassifierShape shape = {500, 1003, 136, 192};
    const int64_t Vp = shape.padded_vocab(), rows = shape.rows, V = shape.V;
    const int C = shape.C;
    const float dloss = 1.0f / rows;
    const std::string label = format_string("rows%lld V%lld C%d chunk%lld bf16", (long long)rows, (long long)V, C,
                                            (long long)shape.chunk_rows);
    const std::vector<bf16> hidden = random_vector<bf16>(rows * C, h.seed);
    std::vector<bf16> weight = random_vector<bf16>(Vp * C, h.seed + 1, 0.1f);
    std::fill(weight.begin() + V * C, weight.end(), __float2bfloat16(0.0f));
    std::vector<float> initial = random_vector<float>(Vp * C, h.seed + 2, 1e-3f);
    const std::vector<int32_t> targets = random_indices(rows, h.seed + 3, V);
    std::vector<double> losses(rows), dhidden(rows * C), dweight = to_double(initial), logits(rows * V);
    reference::classifier_forward_backward<double>(losses.data(), dhidden.data(), dweight.data(), logits.data(),
                                                   to_double(hidden).data(), to_double(weight).data(), targets.data(),
                                                   rows, V, C, rows, dloss);

    DeviceBuffer<bf16> hidden_device(hidden), weight_device(weight), dhidden_device(rows * C);
    DeviceBuffer<bf16> logits_device((int64_t)(classifier_logits_bytes(shape) / sizeof(bf16)));
    DeviceBuffer<float> losses_device(rows), dweight_device(initial);
    DeviceBuffer<int32_t> targets_device(targets);
    DeviceBuffer<unsigned char> workspace(GEMM_WORKSPACE_BYTES);
    Gemm gemm(workspace, GEMM_WORKSPACE_BYTES);
    auto launch = [&] {
        dweight_device.upload(initial);
        CUDA_CHECK(cudaDeviceSynchronize());
        classifier_forward_backward(losses_device, dhidden_device, dweight_device, logits_device, hidden_device,
                                    weight_device, targets_device, shape, dloss, gemm, h.stream);
    };
    launch();
    // Logits of up to 5 are rounded to bf16 (an absolute error of 2^-6 at most, which is the relative error of a
    // probability), gradients of logits once more; the sums over rows and vocabulary average over both.
    const double probability_error = 0x1p-6 + unit_roundoff<bf16>();
    h.compare("classifier losses", label, losses_device, losses, probability_error, {rows}, 1.0);
    h.compare("classifier dhidden", label, dhidden_device, dhidden, probability_error, {rows, C});
    h.compare("classifier dweight", label, dweight_device, dweight, probability_error, {Vp, C});
    h.compare_repeats("classifier dweight", label, dweight_device, launch);
    losses_device.poison();
    classifier_loss(losses_device, logits_device, hidden_device, weight_device, targets_device, shape, gemm, h.stream);
    h.compare("classifier_loss", label, losses_device, losses, probability_error, {rows}, 1.0);
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    struct Case {
        int64_t rows, V;
        float scale;
        LogitKind kind;
    };
    for (const Case& c : {Case{1, 2, 1.0f, LogitKind::random}, Case{13, 3, 30.0f, LogitKind::random},
                          Case{100, 257, 1.0f, LogitKind::random}, Case{70, 1000, 100.0f, LogitKind::random},
                          Case{9, 5003, 1.0f, LogitKind::dominant}, Case{9, 5003, 1.0f, LogitKind::masked},
                          Case{33, 50257, 5.0f, LogitKind::random}, Case{5, 128255, 1.0f, LogitKind::random},
                          Case{2, 1 << 20, 1.0f, LogitKind::random}}) {
        if (h.leaves_out(c.rows * c.V)) {
            continue;
        }
        const int64_t row_stride = classifier_padded_vocab(c.V);
        const float dloss = 1.0f / 768;
        const std::string label = format_string("rows%lld V%lld scale %g%s bf16", (long long)c.rows, (long long)c.V,
                                                c.scale, kind_name(c.kind));
        const std::vector<int32_t> targets = random_indices(c.rows, h.seed, c.V);
        // The padding holds NaN: nobody may look at it.
        std::vector<bf16> logits(c.rows * row_stride, __float2bfloat16(NAN));
        std::vector<double> expected(logits.size());
        for (int64_t row = 0; row < c.rows; ++row) {
            for (int64_t v = 0; v < c.V; ++v) {
                float value = c.scale * random_normal(h.seed + 1, row * c.V + v);
                if (c.kind == LogitKind::dominant && v == targets[row] / 2) {
                    value = 300.0f;
                } else if (c.kind == LogitKind::masked && v != targets[row]) {
                    value = -INFINITY;
                }
                logits[row * row_stride + v] = __float2bfloat16(value);
            }
        }
        expected = to_double(logits);
        std::vector<double> expected_losses(c.rows);
        reference::cross_entropy_forward_backward<double>(expected_losses.data(), expected.data(), targets.data(),
                                                          c.rows, c.V, row_stride, dloss, true);
        DeviceBuffer<float> losses(c.rows);
        DeviceBuffer<bf16> logits_device(logits);
        DeviceBuffer<int32_t> targets_device(targets);
        auto launch = [&] {
            logits_device.upload(logits);
            CUDA_CHECK(cudaDeviceSynchronize());
            variant.launch(losses, logits_device, targets_device, c.rows, c.V, row_stride, dloss, true, h.stream);
        };
        launch();
        // The logarithm of a float sum, of terms good to 2^-20, next to a maximum of up to 3.5 scale.
        const double loss_limit = 0x1p-19 + 3.5 * c.scale * 0x1p-23;
        h.compare("losses", label, losses, expected_losses, loss_limit, {c.rows}, 1.0);
        // exp(logit - lse): relative error as the argument's absolute one; then one rounding to bf16.
        const double limit = unit_roundoff<bf16>() + 2.0 * loss_limit * (1.0 + 7.0 * c.scale) + 0x1p-15;
        h.compare("dlogits", label, logits_device, expected, limit, {c.rows, row_stride}, 1e-3 * dloss);
        h.compare_repeats("dlogits", label, logits_device, launch);
        logits_device.upload(logits);
        losses.poison();
        CUDA_CHECK(cudaDeviceSynchronize());
        variant.launch(losses, logits_device, targets_device, c.rows, c.V, row_stride, 0.0f, false, h.stream);
        h.compare("losses alone", label, losses, expected_losses, loss_limit, {c.rows}, 1.0);
        h.compare_exact("logits untouched", label, logits_device, logits);
    }
    if (!h.small) {  // offsets beyond 2^31: the last rows are looked at
        const int64_t rows = 40001, V = 60000, row_stride = classifier_padded_vocab(V), tail = 20;
        const std::vector<int32_t> targets = random_indices(rows, h.seed, V);
        DeviceBuffer<float> losses(rows);
        DeviceBuffer<bf16> logits(rows * row_stride);
        DeviceBuffer<int32_t> targets_device(targets);
        logits.fill_random(h.seed);
        CUDA_CHECK(cudaDeviceSynchronize());
        std::vector<double> expected = to_double(logits.download((rows - tail) * row_stride, tail * row_stride));
        std::vector<double> expected_losses(tail);
        reference::cross_entropy_forward_backward<double>(expected_losses.data(), expected.data(),
                                                          targets.data() + rows - tail, tail, V, row_stride, 1.0, true);
        variant.launch(losses, logits, targets_device, rows, V, row_stride, 1.0f, true, h.stream);
        CUDA_CHECK(cudaStreamSynchronize(h.stream));
        h.compare("dlogits", format_string("rows%lld V%lld last rows", (long long)rows, (long long)V),
                  logits.download((rows - tail) * row_stride, tail * row_stride), expected,
                  unit_roundoff<bf16>() + 0x1p-14, {tail, row_stride}, 1e-3);
    }
    if (variant.number < 3) {
        return;
    }
    {  // a target outside the vocabulary is refused by a loss of NaN
        DeviceBuffer<float> losses(3);
        DeviceBuffer<bf16> logits(random_vector<bf16>(3 * 64, h.seed));
        DeviceBuffer<int32_t> targets(std::vector<int32_t>{-1, 5, 64});
        variant.launch(losses, logits, targets, 3, 60, 64, 1.0f, true, h.stream);
        CUDA_CHECK(cudaStreamSynchronize(h.stream));
        const std::vector<float> values = losses.download();
        h.expect(std::isnan(values[0]) && std::isfinite(values[1]) && std::isnan(values[2]), "losses",
                 "targets outside the vocabulary", "NaN");
    }
    if (variant.number != VARIANTS.back().number) {
        return;
    }
    for (int64_t rows : {(int64_t)1, (int64_t)1000, (int64_t)300001}) {
        if (h.leaves_out(rows)) {
            continue;
        }
        const std::vector<float> losses = random_vector<float>(rows, h.seed);
        double mean = 0.0;
        for (float loss : losses) {
            mean += loss / (double)rows;
        }
        DeviceBuffer<float> losses_device(losses), out(1);
        DeviceBuffer<unsigned char> scratch(mean_loss_scratch_bytes());
        auto launch = [&] {
            out.upload({2.0f});
            CUDA_CHECK(cudaDeviceSynchronize());
            mean_loss(out, losses_device, rows, 0.25f, scratch, h.stream);
        };
        launch();
        const std::string label = format_string("rows%lld", (long long)rows);
        h.compare("mean_loss", label, out, {2.0 + 0.25 * mean}, unit_roundoff<float>() * 1.01, {1}, 0.0);
        h.compare_repeats("mean_loss", label, out, launch);
    }
    check_classifier(h);
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    struct Shape {
        int64_t rows, V;
    };
    for (const auto [rows, V] : {Shape{98304, 258}, Shape{65536, 1000}, Shape{16384, 50304}, Shape{8192, 128256}}) {
        const int64_t row_stride = classifier_padded_vocab(V);
        DeviceBuffer<float> losses(rows);
        DeviceBuffer<bf16> logits(rows * row_stride);
        DeviceBuffer<int32_t> targets(random_indices(rows, h.seed, V));
        logits.fill_random(h.seed);
        // dloss 1 keeps the logits of the next repetition, which are these gradients, from vanishing.
        h.measure_bandwidth(format_string("rows%lld V%lld", (long long)rows, (long long)V), 4.0 * rows * row_stride,
                            variant.idea, [&, rows = rows, V = V] {
                                variant.launch(losses, logits, targets, rows, V, row_stride, 1.0f, true, h.stream);
                            });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "cross_entropy", VARIANTS, check, measure); }
