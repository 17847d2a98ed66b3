// context_rows.cuh: how the kernels of attention over several ranks (ring_attention.cuh, head_attention.cuh,
// lighthouse_border.cuh) handle rows of D bf16 or float: eight elements a lane (16 bytes of bf16); a row has a power of
// two of lanes, so that it lies in one warp, and those beyond D / 8 rest.
#pragma once
#include "attention_shape.cuh"

constexpr int ROW_THREADS = 256;

struct RowBlock {  // the rows [B, num_rows, heads, D] that a launch works on
    int B;
    int64_t num_rows;
    int heads, D;
    int log2_lanes;  // a row

    RowBlock(int B, int64_t num_rows, int heads, int D) : B(B), num_rows(num_rows), heads(heads), D(D), log2_lanes(0) {
        while (8 << log2_lanes < D) {
            ++log2_lanes;
        }
        CHECK(1 << log2_lanes <= WARP_SIZE, "attention over several ranks: head dim %d is longer than a warp", D);
    }
    int64_t count() const { return B * num_rows * heads; }
    unsigned num_blocks() const {
        const int64_t blocks = ceil_div<int64_t>(count() << log2_lanes, ROW_THREADS);
        CHECK(blocks < (int64_t)1 << 31,
              "attention over several ranks: %lld rows of %d heads are more than a grid holds",
              (long long)(B * num_rows), heads);
        return (unsigned)blocks;
    }
};
// Launches kernel(arguments..., rows), a row's lanes side by side.
template <class Kernel, class... Arguments>
void launch_rows(Kernel kernel, const RowBlock& rows, cudaStream_t stream, const Arguments&... arguments) {
    kernel<<<rows.num_blocks(), ROW_THREADS, 0, stream>>>(arguments..., rows);
    CUDA_CHECK_LAUNCH();
}
// Where this thread stands in it.
struct RowPlace {
    int64_t b, t;
    int h, d;
    bool active;  // false beyond the last row and beyond D

    __device__ explicit RowPlace(const RowBlock& rows) {
        const int64_t thread = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x;
        const int64_t row = thread >> rows.log2_lanes;
        d = 8 * (int)(thread & ((1 << rows.log2_lanes) - 1));
        h = (int)(row % rows.heads);
        t = row / rows.heads % rows.num_rows;
        b = row / rows.heads / rows.num_rows;
        active = b < rows.B && d < rows.D;
    }
};

struct alignas(16) EightFloats {
    float value[8];
};
__device__ inline EightFloats load_eight(const float* address) {
    const float4x low = load128(address), high = load128(address + 4);
    return {{low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]}};
}
__device__ inline EightFloats load_eight(const bf16* address) {
    const bf16x8 packed = load128(address);
    EightFloats row;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        row.value[i] = __bfloat162float(packed[i]);
    }
    return row;
}
// sum (+=) what is there.
template <class Element>
__device__ inline void add_eight(EightFloats& sum, const Element* address) {
    const EightFloats row = load_eight(address);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        sum.value[i] += row.value[i];
    }
}
__device__ inline void store_eight(float* address, const EightFloats& row) {
    store128(address, load128(row.value));
    store128(address + 4, load128(row.value + 4));
}
__device__ inline void store_eight(bf16* address, const EightFloats& row) {
    bf16x8 packed;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        packed[i] = __float2bfloat16(row.value[i]);
    }
    store128(address, packed);
}
