// rope.cuh: rotary positions, in place: in each head, elements i and i + D/2 turn by position * inverse frequency i
// (Hugging Face's half-rotation convention). Backward is the inverse rotation.
// Shapes: qkv [rows, row_width], row_width = (H + 2 Hkv) D; the first num_rotated_heads = H + Hkv heads of D turn, v
// does not; rows = B * T, positions as RopePositions says; D a multiple of 8 up to 256. Cost: memory bound; reads and
// writes num_rotated_heads * D elements a row. There is no table of T rows: each block computes sine and cosine once
// for each (position, frequency) of its rows and shares them among the heads. The angle is reduced in double precision,
// in turns, so that it is exact at 10^6 positions. Reference: reference/rope.h. Variants: dev/cuda/rope_forward.cu.
//
// Kernels that write rows which then turn turn them themselves where they can, and spare this pass: the qkv product
// (fused_gemm.cuh), the backward of attention (flash_attention.cuh) and that of Lighthouse's gather
// (lighthouse_gather.cuh). What they share stands here too.
#pragma once
#include <algorithm>

#include "cuda_common.cuh"
#include "model_config.h"

// ---- constants ---------------------------------------------------------------------------------
constexpr int ROPE_THREADS = 256;
constexpr int ROPE_HEADS_PER_THREAD = 4;  // in flight: a vector of each half of a head
constexpr int ROPE_MAX_HEAD_DIM = 256;

// Turns a position advances, for each i < D / 2: inverse frequency / (2 pi).
struct RopeFrequencies {
    double turns_per_position[ROPE_MAX_HEAD_DIM / 2];
};
inline RopeFrequencies make_rope_frequencies(const ModelConfig& config) {
    const double pi = 3.14159265358979323846;
    RopeFrequencies f = {};
    const std::vector<double> inverse_frequencies = rope_inverse_frequencies(config);
    for (size_t i = 0; i < inverse_frequencies.size() && i < ROPE_MAX_HEAD_DIM / 2; ++i) {
        f.turns_per_position[i] = inverse_frequencies[i] / (2.0 * pi);
    }
    return f;
}

// Which positions rows have: a sequence's T rows here are one run of consecutive positions, or two (what a rank holds
// that shares the sequence with others, context_partition.h).
struct RopePositions {
    int64_t T;
    int64_t run_rows;           // of the first run, of the second T - run_rows
    int64_t first_position[2];  // of each run

    // Of row t of a sequence.
    __host__ __device__ int64_t at(int64_t t) const {
        return t < run_rows ? first_position[0] + t : first_position[1] + t - run_rows;
    }
    // Of row `row` of [B * T].
    __device__ int64_t of(int64_t row) const { return at(row % T); }
};
// T rows of consecutive positions.
inline RopePositions rope_one_run(int64_t T, int64_t first_position = 0) {
    return {T, T, {first_position, first_position + T}};
}

// How rows turn: for kernels that turn what they write.
struct RopeRotation {
    RopeFrequencies frequencies;
    RopePositions positions;
};

// ---- device functions --------------------------------------------------------------------------
// Cosine and sine of the angle at a position, of a frequency in turns a position: the angle is reduced in double.
__device__ __forceinline__ float2 rope_cos_sin(int64_t position, double turns_per_position) {
    const double turns = (double)position * turns_per_position;
    float2 cs;
    sincospif(2.0f * (float)(turns - rint(turns)), &cs.y, &cs.x);
    return cs;
}
// Cosine and sine of the sum of two angles: so that one exact angle serves the rows near it. Adds 2^-23.
__device__ __forceinline__ float2 rope_add_angles(float2 a, float2 b) {
    return make_float2(a.x * b.x - a.y * b.y, a.y * b.x + a.x * b.y);
}
// A pair of elements i and i + D/2 turned back.
__device__ __forceinline__ void rope_turn_back(float& low, float& high, float2 angle) {
    const float a = low, b = high;
    low = a * angle.x + b * angle.y;
    high = b * angle.x - a * angle.y;
}

// ---- forward and backward ----------------------------------------------------------------------
// VECTOR bf16 elements moved by one instruction.
template <int VECTOR>
struct alignas(VECTOR * sizeof(bf16)) RopeVector {
    bf16 data[VECTOR];
};

// Launch: rows_per_block consecutive rows a block, 1-D grid; threads are [row][lane][vector], each for one place in the
// heads lane, lane + lanes, ...: VECTOR elements of a head's first half and the same of its second; VECTOR is 8, or 4
// where D / 2 is no multiple of 8. A thread's sines and cosines stay in its registers for all its heads. Bound:
// bandwidth.
template <int VECTOR, bool INVERSE>
__global__ void __launch_bounds__(ROPE_THREADS)
    rope_kernel(bf16* qkv, int64_t rows, int num_rotated_heads, int row_width, int D, int lanes,
                const __grid_constant__ RopeFrequencies frequencies, const RopePositions positions) {
    __shared__ float2 cos_sin[ROPE_THREADS * VECTOR];  // [row][D / 2]: computed once for all lanes of a row
    const int half = D / 2, vectors_per_half = half / VECTOR;
    const int threads_per_row = lanes * vectors_per_half, rows_per_block = blockDim.x / threads_per_row;
    const int64_t block_row = (int64_t)blockIdx.x * rows_per_block;
    const int num_rows = (int)min((int64_t)rows_per_block, rows - block_row);
    const int64_t block_t = block_row % positions.T;
    for (int i = threadIdx.x; i < num_rows * half; i += blockDim.x) {
        const int64_t t = block_t + i / half;
        const int64_t position = t < positions.T ? positions.at(t) : positions.of(t);
        const float2 cs = rope_cos_sin(position, frequencies.turns_per_position[i % half]);
        cos_sin[i] = make_float2(cs.x, INVERSE ? -cs.y : cs.y);
    }
    const int row_in_block = threadIdx.x / threads_per_row, in_row = threadIdx.x % threads_per_row;
    const int lane = in_row / vectors_per_half, column = in_row % vectors_per_half * VECTOR;
    bf16* const begin = qkv + (block_row + row_in_block) * row_width + column;
    const bool active = row_in_block < num_rows;
    RopeVector<VECTOR> low[ROPE_HEADS_PER_THREAD], high[ROPE_HEADS_PER_THREAD];
    auto load_heads = [&](int first_head) {
#pragma unroll
        for (int j = 0; j < ROPE_HEADS_PER_THREAD; ++j) {
            const int head = first_head + j * lanes;
            if (active && head < num_rotated_heads) {
                low[j] = *(const RopeVector<VECTOR>*)(begin + head * D);
                high[j] = *(const RopeVector<VECTOR>*)(begin + head * D + half);
            }
        }
    };
    load_heads(lane);  // on its way while the sines are shared
    __syncthreads();
    if (!active) {
        return;
    }
    float cosines[VECTOR], sines[VECTOR];
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
        const float2 cs = cos_sin[row_in_block * half + column + k];
        cosines[k] = cs.x;
        sines[k] = cs.y;
    }
    for (int first_head = lane; first_head < num_rotated_heads; first_head += lanes * ROPE_HEADS_PER_THREAD) {
        if (first_head != lane) {
            load_heads(first_head);
        }
#pragma unroll
        for (int j = 0; j < ROPE_HEADS_PER_THREAD; ++j) {
            const int head = first_head + j * lanes;
            if (head < num_rotated_heads) {
#pragma unroll
                for (int k = 0; k < VECTOR; ++k) {
                    const float a = __bfloat162float(low[j].data[k]), b = __bfloat162float(high[j].data[k]);
                    low[j].data[k] = __float2bfloat16(a * cosines[k] - b * sines[k]);
                    high[j].data[k] = __float2bfloat16(b * cosines[k] + a * sines[k]);
                }
                *(RopeVector<VECTOR>*)(begin + head * D) = low[j];
                *(RopeVector<VECTOR>*)(begin + head * D + half) = high[j];
            }
        }
    }
}

template <bool INVERSE>
inline void launch_rope(bf16* qkv, int64_t rows, int num_rotated_heads, int row_width, int D,
                        const RopeFrequencies& frequencies, const RopePositions& positions, cudaStream_t stream) {
    CHECK(D >= 8 && D % 8 == 0 && D <= ROPE_MAX_HEAD_DIM && rows >= 1 && num_rotated_heads >= 1 && row_width % 8 == 0 &&
              (int64_t)num_rotated_heads * D <= row_width,
          "rope: head dim %d must be a multiple of 8 up to %d, and %d heads of it must fit into a row of %d", D,
          ROPE_MAX_HEAD_DIM, num_rotated_heads, row_width);
    CHECK(positions.T >= 1 && positions.run_rows >= 0 && positions.run_rows <= positions.T,
          "rope: a first run of %lld rows of a sequence's %lld", (long long)positions.run_rows, (long long)positions.T);
    const int vector = D % 16 == 0 ? 8 : 4;
    const int vectors_per_half = D / 2 / vector;
    const int lanes = std::min(ceil_div(num_rotated_heads, ROPE_HEADS_PER_THREAD), ROPE_THREADS / vectors_per_half);
    const int rows_per_block = ROPE_THREADS / (lanes * vectors_per_half);
    const int threads = rows_per_block * lanes * vectors_per_half;
    auto* kernel = vector == 8 ? rope_kernel<8, INVERSE> : rope_kernel<4, INVERSE>;
    kernel<<<ceil_div<int64_t>(rows, rows_per_block), threads, 0, stream>>>(qkv, rows, num_rotated_heads, row_width, D,
                                                                            lanes, frequencies, positions);
    CUDA_CHECK_LAUNCH();
}

// qkv (in place) [rows, row_width], rows = B * T: the first num_rotated_heads heads of D of every row turn forward by
// the row's position. D a multiple of 8 up to 256; row_width a multiple of 8; rows below 2^31.
inline void rope_forward(bf16* qkv, int64_t rows, int num_rotated_heads, int row_width, int D,
                         const RopeFrequencies& frequencies, const RopePositions& positions, cudaStream_t stream) {
    NVTX_RANGE();
    launch_rope<false>(qkv, rows, num_rotated_heads, row_width, D, frequencies, positions, stream);
}

// dqkv (in place): the same rows turned back, which is the gradient of rope_forward.
inline void rope_backward(bf16* dqkv, int64_t rows, int num_rotated_heads, int row_width, int D,
                          const RopeFrequencies& frequencies, const RopePositions& positions, cudaStream_t stream) {
    NVTX_RANGE();
    launch_rope<true>(dqkv, rows, num_rotated_heads, row_width, D, frequencies, positions, stream);
}

// ---- angles for fragments of tensor cores --------------------------------------------------------
// A warp's accumulators hold rows g and g + 8 of 16 (g = lane / 4), so a kernel that turns them composes the exact
// angle of the 16's first row, the angle of g positions and that of eight. All three come from a table, exact, float2
// (cosine, sine): [9][D / 2] of 0 to 8 positions, then [tiles of 16 rows][D / 2]. Two sums of angles: 2^-21.
constexpr int ROPE_TILE_ROWS = 16, ROPE_TABLE_OFFSETS = 9;
// Tiles of the table: those of whole blocks of 128 rows, so that kernels need not look whether a row exists.
inline int64_t rope_table_tiles(int64_t T) { return round_up<int64_t>(T, 128) / ROPE_TILE_ROWS; }
// Bytes for T rows of a sequence: D / 4 a row.
inline size_t rope_table_bytes(int64_t T, int D) {
    return (ROPE_TABLE_OFFSETS + rope_table_tiles(T)) * (D / 2) * sizeof(float2);
}
// Whether all rows of every tile have consecutive positions.
inline bool rope_table_fits(const RopePositions& positions) {
    return positions.run_rows == positions.T || positions.run_rows % ROPE_TILE_ROWS == 0;
}

// Launch: one thread an angle, flat grid. Bound: nothing, it takes microseconds.
__global__ void __launch_bounds__(ROPE_THREADS)
    rope_table_kernel(float2* table, int64_t num_angles, int half, const __grid_constant__ RopeFrequencies frequencies,
                      const RopePositions positions) {
    const int64_t i = (int64_t)blockIdx.x * ROPE_THREADS + threadIdx.x;
    if (i >= num_angles) {
        return;
    }
    const int64_t row = i / half, tile = row - ROPE_TABLE_OFFSETS;
    table[i] = rope_cos_sin(tile < 0 ? row : positions.at(tile * ROPE_TILE_ROWS),
                            frequencies.turns_per_position[i - row * half]);
}
// table (=) rope_table_bytes(positions.T, D), aligned to 16 bytes; rope_table_fits(positions).
inline void rope_make_table(float2* table, int D, const RopeRotation& rotation, cudaStream_t stream) {
    NVTX_RANGE();
    const RopePositions& positions = rotation.positions;
    CHECK(rope_table_fits(positions), "rope: the second run of rows starts at row %lld, which must be a multiple of %d",
          (long long)positions.run_rows, ROPE_TILE_ROWS);
    const int64_t num_angles = (int64_t)(rope_table_bytes(positions.T, D) / sizeof(float2));
    rope_table_kernel<<<ceil_div<int64_t>(num_angles, ROPE_THREADS), ROPE_THREADS, 0, stream>>>(
        table, num_angles, D / 2, rotation.frequencies, positions);
    CUDA_CHECK_LAUNCH();
}

// Angles of frequencies i and i + 1 (i even) at rows g and g + 8 of a tile of 16 rows; D / 2 frequencies a row.
struct RopeFragmentAngles {
    float2 row[2][2];  // [g, g + 8][i, i + 1]
};
template <int D>
__device__ __forceinline__ RopeFragmentAngles rope_fragment_angles(const float2* table, int64_t tile, int g, int i) {
    constexpr int HALF = D / 2;
    auto load = [&](int64_t row) { return __ldg(reinterpret_cast<const float4*>(table + row * HALF + i)); };
    const float4 first = load(ROPE_TABLE_OFFSETS + tile), offset = load(g), eight = load(ROPE_TABLE_OFFSETS - 1);
    RopeFragmentAngles a;
    a.row[0][0] = rope_add_angles(make_float2(first.x, first.y), make_float2(offset.x, offset.y));
    a.row[0][1] = rope_add_angles(make_float2(first.z, first.w), make_float2(offset.z, offset.w));
    a.row[1][0] = rope_add_angles(a.row[0][0], make_float2(eight.x, eight.y));
    a.row[1][1] = rope_add_angles(a.row[0][1], make_float2(eight.z, eight.w));
    return a;
}
