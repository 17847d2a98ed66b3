// gemm_hopper.cuh: products of a linear layer on sm_90a whose results are worked on before they leave the chip:
//   out [M, N] = f(in [M, K] weight [N, K]^T), or of a weight [K, N]; bf16 in and out, float32 accumulation
// f is an epilogue: the rotation of q and k (rope.cuh), the feed-forward gate or its backward (swiglu.cuh), the
// exponentials of a softmax (classifier.cuh), or nothing. What a kernel of its own would read and write again costs
// little here, as long as the product is what a tile waits for.
//
// A block makes tiles of 128 rows, persistent. One thread loads blocks of 64 of the contraction by TMA into a ring of
// stages; two warpgroups of 64 rows each, the consumers, multiply them. Two blocks are a cluster: their tiles lie one
// below the other, so each loads half of the weight for both, and L2 is read once for two tiles. The consumers leave a
// tile, rounded, in shared memory and go on with the next; other warps, the finishers, do what follows and write it out
// beside the products of the next tile. The consumers run some stages apart, so that one has the tensor cores while the
// other rounds.
//
// Cost: 2 M N K floating-point operations. Bound: the tensor cores, and nearly as much shared memory at 128 bytes a
// clock. For 16 of the contraction a 128 x 256 tile takes 256 clocks of the former; its products read 20 KiB, TMA
// writes 12, 256 clocks; what goes out comes on top: 1024 a tile that is stored as it is, 2048 with a rotation. Who
// calls it, and what serves other GPUs and shapes: fused_gemm.cuh. Checks and timings: dev/cuda/fused_gemm.cu.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cuda_common.cuh"
#include "gpu_properties.cuh"
#include "ptx_hopper.cuh"
#include "rope.cuh"
#include "swiglu.cuh"

// ---- the tile ----------------------------------------------------------------------------------
// Of 128 rows. HELPERS: warpgroups that load, with one warp, and finish, with the others.
template <int BLOCK_N_, int STAGES_, int HELPERS_, int FINISHER_REGISTERS_, int CONSUMER_REGISTERS_>
struct HopperGemmTile {
    static constexpr int CONSUMERS = 2;  // warpgroups that multiply
    static constexpr int BLOCK_M = 64 * CONSUMERS, BLOCK_N = BLOCK_N_, BLOCK_K = 64;
    static constexpr int STAGES = STAGES_;
    static constexpr int CLUSTER = 2;  // each block of it loads half of the weight's rows for both
    static constexpr int HELPERS = HELPERS_, THREADS = WARPGROUP_SIZE * (HELPERS + CONSUMERS);
    static constexpr int FINISHER_WARPS = 4 * HELPERS - 1, FINISHER_THREADS = FINISHER_WARPS * WARP_SIZE;
    // At launch all threads have the same; the helpers give up what the consumers then take. Were there less than they
    // ask for, they would wait for ever.
    static constexpr int LAUNCH_REGISTERS = 65536 / THREADS / 8 * 8;
    static constexpr int FINISHER_REGISTERS = FINISHER_REGISTERS_, CONSUMER_REGISTERS = CONSUMER_REGISTERS_;
    static_assert(HELPERS * FINISHER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <=
                      (HELPERS + CONSUMERS) * LAUNCH_REGISTERS,
                  "registers");
    static constexpr int HEAD_START = 2;  // blocks of the contraction that the first consumer has before the second
    static_assert(HEAD_START <= STAGES, "the first would wait for blocks whose places the second has not given back");
    static constexpr uint32_t STAGE_BYTES = (BLOCK_M + BLOCK_N) * BLOCK_K * sizeof(bf16);
    // A consumer's results: blocks of OUT_COLUMNS columns.
    static constexpr int OUT_ROWS = 64, OUT_COLUMNS = 64, OUT_BLOCKS = BLOCK_N / OUT_COLUMNS;
    static constexpr int MAX_ANGLES = 128;  // that the finishers share
    static constexpr int OUT_BLOCK_BYTES = OUT_ROWS * OUT_COLUMNS * sizeof(bf16);
    static_assert(BLOCK_N % 64 == 0, "tile");

    struct Shared {
        alignas(1024) bf16 in[STAGES][BLOCK_M * BLOCK_K];
        alignas(1024) bf16 weight[STAGES][BLOCK_N * BLOCK_K];
        alignas(1024) bf16 out[CONSUMERS][OUT_BLOCKS][OUT_ROWS * OUT_COLUMNS];
        float2 angles[MAX_ANGLES];
        uint64_t full[STAGES], empty[STAGES];
    };
    static_assert(sizeof(Shared) <= 227 * 1024, "shared memory");
};
// The usual one: it reads shared memory least. No more helpers: for m64n256k16 ptxas wants 160 registers a thread at
// launch.
using HopperGemmWideTile = HopperGemmTile<256, 3, 1, 120, 192>;
// For what takes the finishers long: with three warps they, not the products, decided how long a tile takes.
using HopperGemmHelpedTile = HopperGemmTile<192, 4, 2, 128, 128>;

template <class Epilogue>
struct HopperGemmArguments {
    CUtensorMap in, weight;       // boxes of BLOCK_M rows; of half of a tile's rows, of a weight [K, N] half a BLOCK_K
    int num_depths;               // blocks of the contraction
    int row_tiles, column_tiles;  // of a cluster, CLUSTER * BLOCK_M rows each
    // Rows of a weight [N, K] that a tile needs, or columns of one [K, N]: from column tile * weight_step on; of a
    // weight [N, K] the second half of them from weight_half further on.
    int weight_step, weight_half;
    Epilogue epilogue;
    const int* condition;  // in device memory; where it is 0 the kernel does nothing. nullptr: it always works

    // The tiles in an order in which those that are made at the same time share most of what they read: down
    // GROUP_ROWS rows of tiles, then the next column.
    static constexpr int GROUP_ROWS = 8;
    __device__ int num_tiles() const { return row_tiles * column_tiles; }
    __device__ void find(int tile, int& row_tile, int& column_tile) const {
        const int first_row = tile / (GROUP_ROWS * column_tiles) * GROUP_ROWS;
        const int rows = min(GROUP_ROWS, row_tiles - first_row), within = tile - first_row * column_tiles;
        row_tile = first_row + within % rows;
        column_tile = within / rows;
    }
};

// Named barriers: the second consumer may begin; a consumer's results are in shared memory; it may leave some there;
// and one among the finishers.
enum HopperGemmBarrier {
    HOPPER_GEMM_HEAD_START = 1,
    HOPPER_GEMM_STAGED = 2,
    HOPPER_GEMM_FREE = 4,
    HOPPER_GEMM_DONE = 6
};

// ---- epilogues ---------------------------------------------------------------------------------
// WEIGHT_IS_TRANSPOSED: the weight is [K, N]. TRANSFORMS: the consumers change their results on the way to shared
// memory: load_rows before the products, begin_rows, transform of a few columns at a time, end_rows. What the finishers
// do with a consumer's 64 rows: prepare, before they are there; finish: `blocks` is the address of OUT_BLOCKS blocks of
// 64 x 64 (tiles as ptx_hopper.cuh has them), which may be overwritten, and `next` is where it will be called for next.
// By `free` a thread says once in each call which blocks the consumer may have back: these, or those of the call
// before. What is computed from a tile in place leaves by TMA: stored by the finishers, sparing shared memory a write
// and a read, it costs 1 to 3 % more clocks.
template <class Tile>
struct HopperGemmFinisher;
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
// 64 rows of a tile, of one consumer.
struct HopperGemmPlace {
    int row, column_tile;
};
// Gives blocks back to the consumers: see hopper_gemm_finish.
template <class FreeThese, class FreeBefore>
struct HopperGemmFree {
    FreeThese these;
    FreeBefore before;
};
// Which finisher a thread is, and what the finishers share.
template <class Tile>
struct HopperGemmFinisher {
    // The packs of 16 bytes of a consumer's results, a line of a block after the other: a warp has WARP_LINES lines at
    // a time and every LINE_STEP-th such group, so warps have as many each, or one more.
    static constexpr int LINE_PACKS = Tile::OUT_COLUMNS / bf16x8::size, WARP_LINES = WARP_SIZE / LINE_PACKS;
    static constexpr int LINE_STEP = WARP_LINES * Tile::FINISHER_WARPS;

    int warp, lane;
    float2* angles;  // [MAX_ANGLES]

    // The first of the warp's i-th lines; the lane's among them, and which pack of it the lane has.
    __device__ __forceinline__ int warp_line(int i) const { return warp * WARP_LINES + i * LINE_STEP; }
    __device__ __forceinline__ int line(int i) const { return warp_line(i) + lane / LINE_PACKS; }
    __device__ __forceinline__ int line_pack() const { return lane % LINE_PACKS; }
    template <int LINES>
    static constexpr int OWN_LINES = (LINES + LINE_STEP - 1) / LINE_STEP;  // of so many, that a lane has at most

    __device__ __forceinline__ void sync() const { named_barrier_sync(HOPPER_GEMM_DONE, Tile::FINISHER_THREADS); }
    __device__ __forceinline__ bool stores() const { return warp == 0 && lane == 0; }
};
// Of an epilogue that keeps nothing from tile to tile and prepares nothing.
struct HopperGemmNoState {
    template <class Epilogue, class Finisher>
    __device__ HopperGemmNoState(const Epilogue&, const Finisher&) {}
    template <class Epilogue, class Finisher>
    __device__ void prepare(const Epilogue&, const Finisher&, const HopperGemmPlace&) {}
};
// The address of the 16 bytes that hold columns 8 pack to 8 pack + 7 of a row of a block.
__device__ __forceinline__ uint32_t hopper_gemm_pack_address(uint32_t block, int row, int pack) {
    return block + row * 128 + (pack ^ row % 8) * 16;
}
// Starts writing NUM_BLOCKS blocks side by side, the first to (row, column) of a map with boxes of OUT_ROWS. One lane.
template <class Tile, int NUM_BLOCKS = Tile::OUT_BLOCKS>
__device__ __forceinline__ void hopper_gemm_write(const CUtensorMap* map, uint32_t blocks, int row, int column) {
#pragma unroll
    for (int i = 0; i < NUM_BLOCKS; ++i) {
        tma_store_block(map, blocks + i * Tile::OUT_BLOCK_BYTES, row, column + i * Tile::OUT_COLUMNS);
    }
    bulk_commit();
}
// Waits until all but the last PENDING writes have read what they send. All finishers.
template <int PENDING, class Tile>
__device__ __forceinline__ void hopper_gemm_wait_read(const HopperGemmFinisher<Tile>& self) {
    if (self.stores()) {
        bulk_wait_read<PENDING>();
    }
    __syncwarp();
}
// Writes a tile's blocks like that and waits until their place may be used again. All finishers.
template <class Tile, int NUM_BLOCKS = Tile::OUT_BLOCKS>
__device__ __forceinline__ void hopper_gemm_write_all(const CUtensorMap* map, const HopperGemmFinisher<Tile>& self,
                                                      uint32_t blocks, int row, int column) {
    if (self.stores()) {
        hopper_gemm_write<Tile, NUM_BLOCKS>(map, blocks, row, column);
    }
    hopper_gemm_wait_read<0>(self);
}
#endif

// out = in weight^T.
struct PlainEpilogue {
    using Tile = HopperGemmWideTile;
    using Finisher = HopperGemmFinisher<Tile>;
    static constexpr bool WEIGHT_IS_TRANSPOSED = false, TRANSFORMS = false;
    CUtensorMap out;

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using State = HopperGemmNoState;
    template <class Free>
    __device__ __forceinline__ void finish(State&, const Finisher& self, uint32_t blocks, const HopperGemmPlace& place,
                                           const HopperGemmPlace&, const Free& free) const {
        hopper_gemm_write_all<Tile>(&out, self, blocks, place.row, place.column_tile * Tile::BLOCK_N);
        free.these();
    }
#endif
};

// out = exp(in weight^T - shift of the row) in columns [0, V), 0 beyond; and of each row and tile of columns the sum of
// these exponentials, in float32 and in a fixed order, and the product itself in one column of each row. The consumers
// do it, in their registers: one while the other multiplies. By the finishers, beside all else that goes through shared
// memory, a tile of K = 768 took 13 % more clocks.
struct ExponentialEpilogue {
    using Tile = HopperGemmWideTile;
    using Finisher = HopperGemmFinisher<Tile>;
    static constexpr bool WEIGHT_IS_TRANSPOSED = false, TRANSFORMS = true;
    CUtensorMap out;
    const float* shift_log2;  // [rows], of the exponent to base 2
    const int32_t* targets;   // [rows], that column; outside [0, V): none
    float* sums;              // [tiles of columns, rows]
    float* target_values;     // [rows]
    int rows, V;

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using State = HopperGemmNoState;
    template <class Free>
    __device__ __forceinline__ void finish(State&, const Finisher& self, uint32_t blocks, const HopperGemmPlace& place,
                                           const HopperGemmPlace&, const Free& free) const {
        hopper_gemm_write_all<Tile>(&out, self, blocks, place.row, place.column_tile * Tile::BLOCK_N);
        free.these();
    }
    // Of the two rows that a consumer's lane has, 8 apart.
    struct Rows {
        float shift_log2[2], sums[2];
        int targets[2], num_columns;
    };
    __device__ __forceinline__ Rows load_rows(int first_row) const {
        Rows r;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + 8 * half;
            r.shift_log2[half] = row < rows ? shift_log2[row] : 0.0f;
            r.targets[half] = row < rows ? targets[row] : -1;
        }
        return r;
    }
    // values: a lane's of the tile, in the order of wgmma's accumulators. Stores the targets' before they change.
    __device__ __forceinline__ void begin_rows(const float (&values)[Tile::BLOCK_N / 2], Rows& r, int first_row,
                                               int column_tile) const {
        const int first_column = column_tile * Tile::BLOCK_N;
        r.num_columns = min(Tile::BLOCK_N, V - first_column);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int target = r.targets[half] - first_column;
            r.sums[half] = 0.0f;
            if (target >= 0 && target < r.num_columns) {
#pragma unroll
                for (int i = 0; i < Tile::BLOCK_N / 2; ++i) {
                    if (i / 2 % 2 == half && column_of(i) == target) {
                        target_values[first_row + 8 * half] = values[i];
                    }
                }
            }
        }
    }
    // Of values from FIRST on, COUNT. WHOLE: all columns of the tile are below V.
    template <int FIRST, int COUNT, bool WHOLE>
    __device__ __forceinline__ void transform(float (&values)[Tile::BLOCK_N / 2], Rows& r) const {
#pragma unroll
        for (int i = FIRST; i < FIRST + COUNT; ++i) {
            const int half = i / 2 % 2;
            values[i] =
                WHOLE || column_of(i) < r.num_columns ? exp2_approx(values[i] * LOG2_E - r.shift_log2[half]) : 0.0f;
            r.sums[half] += values[i];
        }
    }
    __device__ __forceinline__ void end_rows(const Rows& r, int first_row, int column_tile) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = r.sums[half];
#pragma unroll
            for (int offset = 2; offset > 0; offset /= 2) {
                sum += __shfl_xor_sync(FULL_WARP, sum, offset);
            }
            const int row = first_row + 8 * half;
            if (threadIdx.x % 4 == 0 && row < rows) {
                sums[(int64_t)column_tile * rows + row] = sum;
            }
        }
    }

  private:
    // Of a lane's i-th value.
    __device__ __forceinline__ static int column_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }
#endif
};

// out = in weight^T, then the first rotated_columns, whole heads of D, turned by the positions of their rows, which of
// 64 rows from a multiple of 64 on follow each other. A lane has eight frequencies and every ROW_STEP-th row; of 64
// rows the first one's angles are exact, the others' are found by adding the angles of some positions.
template <int D>
struct RotationEpilogue {
    using Tile = HopperGemmWideTile;
    using Finisher = HopperGemmFinisher<Tile>;
    static constexpr bool WEIGHT_IS_TRANSPOSED = false, TRANSFORMS = false;
    CUtensorMap out;
    RopeRotation rotation;
    int rotated_columns;

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    static constexpr int PACKS = D / 2 / bf16x8::size;  // of half a head
    static constexpr int WARP_ROWS = WARP_SIZE / PACKS, ROW_STEP = WARP_ROWS * Tile::FINISHER_WARPS;
    struct State {
        float2 angles[bf16x8::size];  // of the row at hand
        // Of as many positions as to a lane's first row, and from row to row.
        float2 first[bf16x8::size], step[bf16x8::size];
        int parity = 0;

        __device__ State(const RotationEpilogue& e, const Finisher& self) {
#pragma unroll
            for (int k = 0; k < bf16x8::size; ++k) {
                const double turns = e.rotation.frequencies.turns_per_position[self.lane % PACKS * bf16x8::size + k];
                first[k] = rope_cos_sin(first_line(self), turns);
                step[k] = rope_cos_sin(ROW_STEP, turns);
            }
        }
        // The first row's angles, one a lane, shared; in two places by turns, so that one barrier is enough.
        __device__ __forceinline__ void prepare(const RotationEpilogue& e, const Finisher& self,
                                                const HopperGemmPlace& place) {
            static_assert(D / 2 <= Tile::FINISHER_THREADS && D <= Tile::MAX_ANGLES, "angles");
            float2* const shared = self.angles + parity * (D / 2);
            parity ^= 1;
            const int i = self.warp * WARP_SIZE + self.lane;
            if (i < D / 2) {
                shared[i] =
                    rope_cos_sin(e.rotation.positions.of(place.row), e.rotation.frequencies.turns_per_position[i]);
            }
            self.sync();
#pragma unroll
            for (int k = 0; k < bf16x8::size; k += 2) {
                const float4 two = *reinterpret_cast<const float4*>(shared + self.lane % PACKS * bf16x8::size + k);
                angles[k] = rope_add_angles(make_float2(two.x, two.y), first[k]);
                angles[k + 1] = rope_add_angles(make_float2(two.z, two.w), first[k + 1]);
            }
        }
        __device__ __forceinline__ void advance() {
#pragma unroll
            for (int k = 0; k < bf16x8::size; ++k) {
                angles[k] = rope_add_angles(angles[k], step[k]);
            }
        }
    };
    // Rows that a warp has at a time lie in different banks of shared memory.
    __device__ __forceinline__ static int first_line(const Finisher& self) {
        const int line = self.lane / PACKS;
        return self.warp * WARP_ROWS + (D == 128 ? line : line / 2 + line % 2 * 4);
    }
    template <class Free>
    __device__ __forceinline__ void finish(State& state, const Finisher& self, uint32_t blocks,
                                           const HopperGemmPlace& place, const HopperGemmPlace&,
                                           const Free& free) const {
        const int column = place.column_tile * Tile::BLOCK_N;
        if (column < rotated_columns) {
            for (int line = first_line(self); line < Tile::OUT_ROWS; line += ROW_STEP) {
#pragma unroll
                for (int head = 0; head < Tile::BLOCK_N / D; ++head) {
                    if (column + head * D < rotated_columns) {
                        turn(state, self, blocks + head * (D / Tile::OUT_COLUMNS * Tile::OUT_BLOCK_BYTES), line);
                    }
                }
                state.advance();
            }
            fence_async_shared();
            self.sync();
        }
        hopper_gemm_wait_read<0>(self);  // those of the call before: long since
        free.before();
        if (self.stores()) {
            hopper_gemm_write<Tile>(&out, blocks, place.row, column);
        }
    }

  private:
    // Eight pairs of the head that begins at `block`, of one of its lines.
    __device__ __forceinline__ static void turn(const State& state, const Finisher& self, uint32_t block, int line) {
        const int pack = self.lane % PACKS;
        const uint32_t low_address = hopper_gemm_pack_address(block, line, pack);
        const uint32_t high_address =
            D == 128 ? low_address + Tile::OUT_BLOCK_BYTES : hopper_gemm_pack_address(block, line, pack + PACKS);
        bf16x8 low = load128_shared(low_address), high = load128_shared(high_address);
#pragma unroll
        for (int k = 0; k < bf16x8::size; ++k) {
            const float2 cs = state.angles[k];
            const float a = __bfloat162float(low[k]), b = __bfloat162float(high[k]);
            low[k] = __float2bfloat16(a * cs.x - b * cs.y);
            high[k] = __float2bfloat16(b * cs.x + a * cs.y);
        }
        store128_shared(low_address, low);
        store128_shared(high_address, high);
    }
#endif
};

// gate = in weight[0, F)^T and up = in weight[F, 2F)^T, and swiglu of them. A tile is 128 columns of gate, then the
// same of up. swiglu takes gate's place in shared memory once that has left.
struct SwigluEpilogue {
    using Tile = HopperGemmWideTile;
    using Finisher = HopperGemmFinisher<Tile>;
    static constexpr bool WEIGHT_IS_TRANSPOSED = false, TRANSFORMS = false;
    CUtensorMap gate, up, swiglu;

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using State = HopperGemmNoState;
    template <class Free>
    __device__ __forceinline__ void finish(State&, const Finisher& self, uint32_t blocks, const HopperGemmPlace& place,
                                           const HopperGemmPlace&, const Free& free) const {
        constexpr int HALF = Tile::OUT_BLOCKS / 2;
        constexpr int LINES = HALF * Tile::OUT_ROWS, OWN_LINES = Finisher::template OWN_LINES<LINES>;
        const int column = place.column_tile * (Tile::BLOCK_N / 2);
        const uint32_t up_blocks = blocks + HALF * Tile::OUT_BLOCK_BYTES;
        if (self.stores()) {
            hopper_gemm_write<Tile, HALF>(&gate, blocks, place.row, column);
            hopper_gemm_write<Tile, HALF>(&up, up_blocks, place.row, column);
        }
        // Blocks lie one behind the other, so their lines are numbered on.
        bf16x8 results[OWN_LINES];
        auto for_own_lines = [&](auto&& work) {
#pragma unroll
            for (int i = 0; i < OWN_LINES; ++i) {
                const int line = self.line(i);
                if (line < LINES) {
                    work(results[i], hopper_gemm_pack_address(0, line, self.line_pack()));
                }
            }
        };
        for_own_lines([&](bf16x8& result, uint32_t at) {
            const bf16x8 gates = load128_shared(blocks + at), ups = load128_shared(up_blocks + at);
#pragma unroll
            for (int k = 0; k < bf16x8::size; ++k) {
                result[k] = __float2bfloat16(swiglu_value(__bfloat162float(gates[k]), __bfloat162float(ups[k])));
            }
        });
        hopper_gemm_wait_read<1>(self);  // gate
        self.sync();
        for_own_lines([&](const bf16x8& result, uint32_t at) { store128_shared(blocks + at, result); });
        fence_async_shared();
        self.sync();
        hopper_gemm_write_all<Tile, HALF>(&swiglu, self, blocks, place.row, column);
        free.these();
    }
#endif
};

// dswiglu = in weight, never written: it becomes dgate_up and swiglu, as swiglu_backward has them. gate_up comes
// straight to the registers of the lane that needs it, a tile ahead; dgate_up leaves from there, so it may be
// gate_up, and so does swiglu, so that a consumer has its blocks back as soon as they are read.
template <bool WANTS_SWIGLU>
struct SwigluBackwardEpilogue {
    using Tile = HopperGemmHelpedTile;
    using Finisher = HopperGemmFinisher<Tile>;
    static constexpr bool WEIGHT_IS_TRANSPOSED = true, TRANSFORMS = false;
    bf16* swiglu;         // [rows, F]
    bf16* dgate_up;       // [rows, 2 F]
    const bf16* gate_up;  // the same
    int rows, F;

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    // Lines are numbered along the blocks, then down the rows: after PERIOD steps a lane is in the same column again,
    // LINE_STEP rows further down. So its places are PERIOD ones and what is added to them; instructions, of which
    // finding each place anew took a third, are what these warps are short of.
    static constexpr int LINES = Tile::OUT_ROWS * Tile::OUT_BLOCKS, LINE_STEP = Finisher::LINE_STEP;
    static constexpr int OWN_LINES = Finisher::template OWN_LINES<LINES>, PERIOD = Tile::OUT_BLOCKS;
    // Of one of the PERIOD lines of a lane.
    struct Line {
        int row, column;

        __device__ __forceinline__ Line(const Finisher& self, int i) {
            row = self.line(i) / Tile::OUT_BLOCKS;
            column = self.line(i) % Tile::OUT_BLOCKS * Tile::OUT_COLUMNS + self.line_pack() * bf16x8::size;
        }
    };
    // This lane's packs of 64 rows of a tile: where they are in gate_up from `first` on, and which of them exist.
    struct Packs {
        int64_t first;
        uint32_t offsets[PERIOD], step;
        int end_rows[PERIOD];  // of those that exist

        __device__ __forceinline__ Packs(const SwigluBackwardEpilogue& e, const Finisher& self,
                                         const HopperGemmPlace& place) {
            const int first_column = place.column_tile * Tile::BLOCK_N;
            first = (int64_t)place.row * (2 * e.F) + first_column;
            step = (uint32_t)LINE_STEP * 2 * e.F;
#pragma unroll
            for (int i = 0; i < PERIOD; ++i) {
                const Line line(self, i);
                offsets[i] = (uint32_t)line.row * 2 * e.F + line.column;
                end_rows[i] = line.column < e.F - first_column ? min(e.rows - place.row, Tile::OUT_ROWS) - line.row : 0;
            }
        }
        __device__ __forceinline__ bool exists(int i) const { return i / PERIOD * LINE_STEP < end_rows[i % PERIOD]; }
        __device__ __forceinline__ uint32_t offset(int i) const { return offsets[i % PERIOD] + i / PERIOD * step; }
    };
    struct State {
        // Packs of the next tile, each loaded when that of the last is used. No bf16: each would get a register.
        int4 gates[OWN_LINES], ups[OWN_LINES];
        bool loaded = false;

        __device__ State(const SwigluBackwardEpilogue&, const Finisher&) {}
        __device__ __forceinline__ void prepare(const SwigluBackwardEpilogue& e, const Finisher& self,
                                                const HopperGemmPlace& place) {
            if (!loaded) {
                const Packs packs(e, self, place);
#pragma unroll
                for (int i = 0; i < OWN_LINES; ++i) {
                    load(e, packs, i);
                }
            }
            loaded = true;
        }
        __device__ __forceinline__ void load(const SwigluBackwardEpilogue& e, const Packs& packs, int i) {
            if (packs.exists(i)) {
                const bf16* const from = e.gate_up + packs.first;
                gates[i] = __ldcs(reinterpret_cast<const int4*>(from + packs.offset(i)));
                ups[i] = __ldcs(reinterpret_cast<const int4*>(from + e.F + packs.offset(i)));
            }
        }
    };
    // A pack of dswiglu is read while the one before is worked on: shared memory, which the products fill, answers
    // late. Behind the last one the consumer has its blocks back.
    template <class Free>
    __device__ __forceinline__ void finish(State& state, const Finisher& self, uint32_t blocks,
                                           const HopperGemmPlace& place, const HopperGemmPlace& next,
                                           const Free& free) const {
        uint32_t lines[PERIOD];
#pragma unroll
        for (int i = 0; i < PERIOD; ++i) {
            const Line line(self, i);
            lines[i] = hopper_gemm_pack_address(blocks + line.column / Tile::OUT_COLUMNS * Tile::OUT_BLOCK_BYTES,
                                                line.row, self.line_pack());
        }
        // LINE_STEP is a multiple of 4, so the swizzle of a line so many rows down differs in its highest bit, or not.
        static_assert(LINE_STEP % 4 == 0, "swizzle");
        auto load_douts = [&](int i) {
            const int rows_down = i / PERIOD * LINE_STEP;
            return load128_shared((lines[i % PERIOD] ^ rows_down % 8 * 16) + rows_down * 128);
        };
        const Packs packs(*this, self, place), next_packs(*this, self, next);
        bf16x8 douts = load_douts(0);
#pragma unroll
        for (int i = 0; i < OWN_LINES; ++i) {
            const bf16x8 own_douts = douts;
            if (i + 1 == OWN_LINES) {
                free.these();
            } else if (LINE_STEP * (i + 2) <= LINES || self.warp_line(i + 1) < LINES) {
                douts = load_douts(i + 1);
            }
            // Packs that do not exist too: a branch would keep their neighbours' instructions apart.
            bf16x8 gates, ups, dgates, dups, outs;
            *reinterpret_cast<int4*>(gates.data) = state.gates[i];
            *reinterpret_cast<int4*>(ups.data) = state.ups[i];
            swiglu_backward_pack(dgates, dups, outs, own_douts, gates, ups);
            if (packs.exists(i)) {
                bf16* const to = dgate_up + packs.first;
                store128(to + packs.offset(i), dgates);
                store128(to + F + packs.offset(i), dups);
                if constexpr (WANTS_SWIGLU) {
                    const uint32_t row = Line(self, i % PERIOD).row + i / PERIOD * LINE_STEP;
                    store128(swiglu + (packs.first - (int64_t)place.row * F) + (packs.offset(i) - row * F), outs);
                }
            }
            state.load(*this, next_packs, i);
        }
    }
#endif
};

// ---- kernel ------------------------------------------------------------------------------------
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
// The loading thread: this block's rows of `in`, and its half of the weight's rows for both blocks of the cluster.
template <class Epilogue>
__device__ __forceinline__ void hopper_gemm_load(typename Epilogue::Tile::Shared& shared,
                                                 const HopperGemmArguments<Epilogue>& args) {
    using Tile = typename Epilogue::Tile;
    const int rank = (int)cluster_rank();
    PipelineState<Tile::STAGES> state;
    for (int tile = blockIdx.x / Tile::CLUSTER; tile < args.num_tiles(); tile += gridDim.x / Tile::CLUSTER) {
        int row_tile, column_tile;
        args.find(tile, row_tile, column_tile);
        const int row = (row_tile * Tile::CLUSTER + rank) * Tile::BLOCK_M;
        const int weight_begin =
            column_tile * args.weight_step + (Epilogue::WEIGHT_IS_TRANSPOSED ? 0 : rank * args.weight_half);
        for (int depth = 0; depth < args.num_depths; ++depth, state.advance()) {
            const uint32_t full = shared_address(&shared.full[state.stage]);
            mbarrier_wait(shared_address(&shared.empty[state.stage]), state.parity ^ 1);
            mbarrier_arrive_expect(full, Tile::STAGE_BYTES);
            tma_load_block(shared_address(shared.in[state.stage]), &args.in, row, depth * Tile::BLOCK_K, full);
            constexpr uint16_t WHOLE_CLUSTER = (1 << Tile::CLUSTER) - 1;
            if constexpr (Epilogue::WEIGHT_IS_TRANSPOSED) {
                constexpr int OWN_DEPTHS = Tile::BLOCK_K / Tile::CLUSTER;
#pragma unroll
                for (int i = 0; i < Tile::BLOCK_N / 64; ++i) {
                    const int place = (i * Tile::BLOCK_K + rank * OWN_DEPTHS) * 64;
                    tma_load_block_multicast(shared_address(shared.weight[state.stage] + place), &args.weight,
                                             depth * Tile::BLOCK_K + rank * OWN_DEPTHS, weight_begin + 64 * i, full,
                                             WHOLE_CLUSTER);
                }
            } else {
                tma_load_block_multicast(
                    shared_address(shared.weight[state.stage] + rank * (Tile::BLOCK_N / Tile::CLUSTER * Tile::BLOCK_K)),
                    &args.weight, weight_begin, depth * Tile::BLOCK_K, full, WHOLE_CLUSTER);
            }
        }
    }
}

// work(std::integral_constant<int, i>()) for i = 0 to COUNT - 1.
template <int COUNT, class Work, int I = 0>
__device__ __forceinline__ void hopper_gemm_for(const Work& work) {
    if constexpr (I < COUNT) {
        work(std::integral_constant<int, I>());
        hopper_gemm_for<COUNT, Work, I + 1>(work);
    }
}
// What an epilogue that transforms keeps of a lane's rows; of others nothing.
template <class Epilogue, bool TRANSFORMS = Epilogue::TRANSFORMS>
struct HopperGemmRows {
    struct type {};
};
template <class Epilogue>
struct HopperGemmRows<Epilogue, true> {
    using type = typename Epilogue::Rows;
};
// A consumer: its 64 rows of each tile.
template <class Epilogue>
__device__ __forceinline__ void hopper_gemm_multiply(typename Epilogue::Tile::Shared& shared,
                                                     const HopperGemmArguments<Epilogue>& args, int consumer) {
    using Tile = typename Epilogue::Tile;
    constexpr bool WEIGHT_IS_TRANSPOSED = Epilogue::WEIGHT_IS_TRANSPOSED;
    const int num_depths = args.num_depths, num_tiles = args.num_tiles();
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE % 4;
    const uint32_t out = shared_address(shared.out[consumer]);
    PipelineState<Tile::STAGES> state;
    // A block of the contraction has been read by this warp: both blocks of the cluster may write where it was.
    auto release = [&](int stage) {
        if (lane < Tile::CLUSTER) {
            mbarrier_arrive_at(shared_address(&shared.empty[stage]), lane);
        }
    };
    bool leads = consumer == 0;  // and has to let the other begin
    if (!leads) {
        named_barrier_sync(HOPPER_GEMM_HEAD_START, Tile::CONSUMERS * WARPGROUP_SIZE);
    }
    auto let_other_begin = [&] {
        named_barrier_arrive(HOPPER_GEMM_HEAD_START, Tile::CONSUMERS * WARPGROUP_SIZE);
        leads = false;
    };
    for (int tile = blockIdx.x / Tile::CLUSTER; tile < num_tiles; tile += gridDim.x / Tile::CLUSTER) {
        float sums[Tile::BLOCK_N / 2];
        [[maybe_unused]] int first_row, column_tile;  // of this lane
        [[maybe_unused]] typename HopperGemmRows<Epilogue>::type rows;
        if constexpr (Epilogue::TRANSFORMS) {
            int row_tile;
            args.find(tile, row_tile, column_tile);
            first_row = (row_tile * Tile::CLUSTER + (int)cluster_rank()) * Tile::BLOCK_M + Tile::OUT_ROWS * consumer +
                        16 * warp + lane / 4;
            rows = args.epilogue.load_rows(first_row);
        }
        auto multiply = [&](auto is_first) {
            mbarrier_wait(shared_address(&shared.full[state.stage]), state.parity);
            const uint64_t in =
                wgmma_descriptor_k_major(shared_address(shared.in[state.stage] + consumer * (64 * Tile::BLOCK_K)));
            const uint32_t weight_tile = shared_address(shared.weight[state.stage]);
            const uint64_t weight = WEIGHT_IS_TRANSPOSED ? wgmma_descriptor_mn_major(weight_tile, Tile::BLOCK_K * 128)
                                                         : wgmma_descriptor_k_major(weight_tile);
            constexpr int TRANSPOSED = WEIGHT_IS_TRANSPOSED, WEIGHT_STEP = WEIGHT_IS_TRANSPOSED ? 16 * 128 : 32;
            wgmma_fence();
            if constexpr (decltype(is_first)::value) {
                wgmma_zero<0, TRANSPOSED>(sums, in, weight);
            } else {
                wgmma<0, TRANSPOSED>(sums, in, weight);
            }
#pragma unroll
            for (int k = 1; k < Tile::BLOCK_K / 16; ++k) {
                wgmma<0, TRANSPOSED>(sums, wgmma_advance(in, 32 * k), wgmma_advance(weight, WEIGHT_STEP * k));
            }
            wgmma_commit();
        };
        multiply(std::true_type());
        int previous = state.stage;
        state.advance();
        for (int depth = 1; depth < num_depths; ++depth, state.advance()) {
            multiply(std::false_type());
            wgmma_wait<1>();
            release(previous);
            previous = state.stage;
            if (leads && depth + 1 == Tile::HEAD_START) {
                let_other_begin();
            }
        }
        wgmma_wait<0>();
        wgmma_pin(sums);
        release(previous);
        if (leads) {
            let_other_begin();
        }
        if constexpr (Epilogue::TRANSFORMS) {
            args.epilogue.begin_rows(sums, rows, first_row, column_tile);
        }
        named_barrier_sync(HOPPER_GEMM_FREE + consumer, WARPGROUP_SIZE + Tile::FINISHER_THREADS);
        auto stage = [&](auto is_whole) {
            hopper_gemm_for<Tile::BLOCK_N / 16>([&](auto step) {  // 16 columns each
                constexpr int FIRST = decltype(step)::value * 8;
                if constexpr (Epilogue::TRANSFORMS) {
                    args.epilogue.template transform<FIRST, 8, decltype(is_whole)::value>(sums, rows);
                }
                uint32_t fragment[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    fragment[i] = pack_bf16x2(sums[FIRST + 2 * i], sums[FIRST + 2 * i + 1]);
                }
                constexpr int PACK = FIRST / 4;
                stmatrix_x4(hopper_gemm_pack_address(out + PACK / 8 * Tile::OUT_BLOCK_BYTES, 16 * warp + lane % 16,
                                                     PACK % 8 + lane / 16),
                            fragment);
            });
        };
        if constexpr (Epilogue::TRANSFORMS) {
            rows.num_columns == Tile::BLOCK_N ? stage(std::true_type()) : stage(std::false_type());
        } else {
            stage(std::true_type());
        }
        fence_async_shared();
        named_barrier_arrive(HOPPER_GEMM_STAGED + consumer, WARPGROUP_SIZE + Tile::FINISHER_THREADS);
        if constexpr (Epilogue::TRANSFORMS) {
            args.epilogue.end_rows(rows, first_row, column_tile);
        }
    }
}

// The finishers.
template <class Epilogue>
__device__ __forceinline__ void hopper_gemm_finish(typename Epilogue::Tile::Shared& shared,
                                                   const HopperGemmArguments<Epilogue>& args) {
    using Tile = typename Epilogue::Tile;
    const HopperGemmFinisher<Tile> self{(int)threadIdx.x / WARP_SIZE - 1, (int)threadIdx.x % WARP_SIZE, shared.angles};
    const int rank = (int)cluster_rank(), num_tiles = args.num_tiles(), tile_step = gridDim.x / Tile::CLUSTER;
    typename Epilogue::State state(args.epilogue, self);
    auto free_for = [&](int consumer, bool has_another_tile) {
        if (has_another_tile) {
            named_barrier_arrive(HOPPER_GEMM_FREE + consumer, WARPGROUP_SIZE + Tile::FINISHER_THREADS);
        }
    };
    free_for(0, true);
    free_for(1, true);
    // The rows of this block's `consumer` in a tile; beyond all rows when there is no such tile.
    auto find = [&](int tile, int consumer) {
        int row_tile = args.row_tiles, column_tile = 0;
        if (tile < num_tiles) {
            args.find(tile, row_tile, column_tile);
        }
        return HopperGemmPlace{(row_tile * Tile::CLUSTER + rank) * Tile::BLOCK_M + Tile::OUT_ROWS * consumer,
                               column_tile};
    };
    int tile = blockIdx.x / Tile::CLUSTER;
    HopperGemmPlace place = find(tile, 0);
    bool before_has_another_tile = false;
    for (int consumer = 0; tile < num_tiles; consumer = 1 - consumer) {
        const int next_tile = consumer == 0 ? tile : tile + tile_step;
        const HopperGemmPlace next = find(next_tile, 1 - consumer);
        const bool has_another_tile = tile + tile_step < num_tiles;
        state.prepare(args.epilogue, self, place);
        named_barrier_sync(HOPPER_GEMM_STAGED + consumer, WARPGROUP_SIZE + Tile::FINISHER_THREADS);
        auto free_these = [&] { free_for(consumer, has_another_tile); };
        auto free_before = [&] { free_for(1 - consumer, before_has_another_tile); };
        args.epilogue.finish(state, self, shared_address(shared.out[consumer]), place, next,
                             HopperGemmFree<decltype(free_these), decltype(free_before)>{free_these, free_before});
        before_has_another_tile = has_another_tile;
        tile = next_tile;
        place = next;
    }
    hopper_gemm_wait_read<0>(self);
}
#endif  // sm_90a

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HOPPER_GEMM_CLUSTERS __cluster_dims__(Epilogue::Tile::CLUSTER)
#else  // an error there
#define HOPPER_GEMM_CLUSTERS
#endif
// Launch: THREADS threads, clusters of two blocks, at most one block an SM. Bound: see above.
template <class Epilogue>
__global__ void HOPPER_GEMM_CLUSTERS __launch_bounds__(Epilogue::Tile::THREADS, 1)
    gemm_hopper_kernel(const __grid_constant__ HopperGemmArguments<Epilogue> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (args.condition != nullptr && *args.condition == 0) {
        return;
    }
    using Tile = typename Epilogue::Tile;
    using Shared = typename Tile::Shared;
    extern __shared__ __align__(1024) unsigned char gemm_shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(gemm_shared_bytes);
    const int warpgroup = __shfl_sync(FULL_WARP, threadIdx.x / WARPGROUP_SIZE, 0);
    if (threadIdx.x == 0) {
        if (shared_address(&shared) % 1024 != 0) {
            __trap();  // the swizzle is a function of the address
        }
        prefetch_tensor_map(&args.in);
        prefetch_tensor_map(&args.weight);
#pragma unroll
        for (int i = 0; i < Tile::STAGES; ++i) {
            mbarrier_init(shared_address(&shared.full[i]), 1);
            mbarrier_init(shared_address(&shared.empty[i]), 4 * Tile::CONSUMERS * Tile::CLUSTER);
        }
        mbarrier_init_fence();
    }
    __syncwarp();
    cluster_sync();
    if (warpgroup < Tile::HELPERS) {
        registers_decrease<Tile::FINISHER_REGISTERS>();
        if (threadIdx.x == 0) {
            hopper_gemm_load(shared, args);
        } else if (threadIdx.x >= WARP_SIZE) {
            hopper_gemm_finish(shared, args);
        }
        __syncwarp();
    } else {
        registers_increase<Tile::CONSUMER_REGISTERS>();
        hopper_gemm_multiply(shared, args, warpgroup - Tile::HELPERS);
    }
    cluster_sync();  // the other block may still write here
#endif
}

// ---- launchers ---------------------------------------------------------------------------------
// Whether these kernels can run on the operands, on a GPU of compute capability 9.0: rows aligned to 16 bytes.
inline bool gemm_hopper_takes(const bf16* in, const bf16* weight, const bf16* out, int64_t M, int64_t N, int64_t K) {
    auto aligned = [](const bf16* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    constexpr int64_t LONGEST = (1 << 30) - 256;  // a row's number fits an int
    return M >= 1 && M <= LONGEST && N >= 8 && N <= LONGEST && N % 8 == 0 && K >= 8 && K <= LONGEST && K % 8 == 0 &&
           aligned(in) && aligned(weight) && aligned(out);
}

// column_tiles tiles in a row of them; weight has weight_rows rows, or columns of a weight [K, N].
template <class Epilogue>
inline void hopper_launch_gemm(const bf16* in, const bf16* weight, int64_t weight_rows, int64_t M, int64_t K,
                               int64_t column_tiles, int weight_step, int weight_half, const Epilogue& epilogue,
                               cudaStream_t stream, const int* condition = nullptr) {
    using Tile = typename Epilogue::Tile;
    HopperGemmArguments<Epilogue> args{};
    args.in = matrix_tensor_map(in, M, K, K, Tile::BLOCK_M);
    args.weight = Epilogue::WEIGHT_IS_TRANSPOSED
                      ? matrix_tensor_map(weight, K, weight_rows, weight_rows, Tile::BLOCK_K / Tile::CLUSTER)
                      : matrix_tensor_map(weight, weight_rows, K, K, Tile::BLOCK_N / Tile::CLUSTER);
    args.num_depths = (int)ceil_div<int64_t>(K, Tile::BLOCK_K);
    const int64_t row_tiles = ceil_div<int64_t>(M, Tile::CLUSTER * Tile::BLOCK_M), num_tiles = row_tiles * column_tiles;
    CHECK(num_tiles <= INT32_MAX / 2, "matrix product on Hopper: %lld tiles are too many", (long long)num_tiles);
    args.row_tiles = (int)row_tiles, args.column_tiles = (int)column_tiles;
    args.weight_step = weight_step, args.weight_half = weight_half;
    args.epilogue = epilogue;
    args.condition = condition;
    const auto kernel = gemm_hopper_kernel<Epilogue>;
    constexpr int SHARED_BYTES = sizeof(typename Tile::Shared);
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
    const int most = std::max(1, gpu_properties().num_sms / Tile::CLUSTER);
    const int num_clusters = (int)std::min<int64_t>(num_tiles, most);
    kernel<<<num_clusters * Tile::CLUSTER, Tile::THREADS, SHARED_BYTES, stream>>>(args);
    CUDA_CHECK_LAUNCH();
}
// A map for results [M, columns] in rows of row_stride.
inline CUtensorMap gemm_hopper_out_map(bf16* out, int64_t M, int64_t columns, int64_t row_stride) {
    return matrix_tensor_map(out, M, columns, row_stride, HopperGemmWideTile::OUT_ROWS);
}

// out (=) [M, N] = in [M, K] weight [N, K]^T, unless *condition is 0. All of these take what gemm_hopper_takes accepts,
// and repeat bit for bit.
inline void gemm_hopper_plain(bf16* out, const bf16* in, const bf16* weight, int64_t M, int64_t N, int64_t K,
                              const int* condition, cudaStream_t stream) {
    NVTX_RANGE();
    using Tile = HopperGemmWideTile;
    hopper_launch_gemm(in, weight, N, M, K, ceil_div<int64_t>(N, Tile::BLOCK_N), Tile::BLOCK_N, Tile::BLOCK_N / 2,
                       PlainEpilogue{gemm_hopper_out_map(out, M, N, N)}, stream, condition);
}

// The rows of `sums` in the next function.
constexpr int64_t gemm_hopper_column_tiles(int64_t N) { return ceil_div<int64_t>(N, HopperGemmWideTile::BLOCK_N); }
// out (=) [M, N]: 2^(log2(e) x - shift_log2 [M]) of x = in [M, K] weight [N, K]^T in columns [0, V), 0
// beyond. sums (=) [gemm_hopper_column_tiles(N), M]: of each row's exponentials, before they are rounded, in a tile of
// columns. target_values (=) [M]: x in column targets [M]; untouched where that is not in [0, V).
inline void gemm_hopper_exponentials(bf16* out, float* sums, float* target_values, const bf16* in, const bf16* weight,
                                     const float* shift_log2, const int32_t* targets, int64_t M, int64_t N, int64_t V,
                                     int64_t K, cudaStream_t stream) {
    NVTX_RANGE();
    using Tile = HopperGemmWideTile;
    const ExponentialEpilogue epilogue{
        gemm_hopper_out_map(out, M, N, N), shift_log2, targets, sums, target_values, (int)M, (int)V};
    hopper_launch_gemm(in, weight, N, M, K, gemm_hopper_column_tiles(N), Tile::BLOCK_N, Tile::BLOCK_N / 2, epilogue,
                       stream);
}

// out (=) [M, N] = in [M, K] weight [N, K]^T, its first num_rotated_heads heads of D (64 or 128) turned: T and run_rows
// of the positions multiples of 64.
inline void gemm_hopper_rotated(bf16* out, const bf16* in, const bf16* weight, int64_t M, int64_t N, int64_t K, int D,
                                int num_rotated_heads, const RopeRotation& rotation, cudaStream_t stream) {
    NVTX_RANGE();
    using Tile = HopperGemmWideTile;
    const RopePositions& positions = rotation.positions;
    CHECK((D == 64 || D == 128) && positions.T % 64 == 0 && positions.run_rows % 64 == 0,
          "product with rotation on Hopper: head dim %d must be 64 or 128, and %lld and %lld rows multiples of 64", D,
          (long long)positions.T, (long long)positions.run_rows);
    auto launch = [&](auto epilogue) {
        epilogue.out = gemm_hopper_out_map(out, M, N, N);
        epilogue.rotation = rotation;
        epilogue.rotated_columns = num_rotated_heads * D;
        hopper_launch_gemm(in, weight, N, M, K, ceil_div<int64_t>(N, Tile::BLOCK_N), Tile::BLOCK_N, Tile::BLOCK_N / 2,
                           epilogue, stream);
    };
    D == 64 ? launch(RotationEpilogue<64>{}) : launch(RotationEpilogue<128>{});
}

// gate_up (=) [M, 2F] = in [M, K] weight [2F, K]^T; swiglu (=) [M, F] of it, the bits of swiglu_forward.
inline void gemm_hopper_swiglu(bf16* gate_up, bf16* swiglu, const bf16* in, const bf16* weight, int64_t M, int64_t F,
                               int64_t K, cudaStream_t stream) {
    NVTX_RANGE();
    using Tile = HopperGemmWideTile;
    constexpr int COLUMNS = Tile::BLOCK_N / 2;
    const SwigluEpilogue epilogue{gemm_hopper_out_map(gate_up, M, F, 2 * F),
                                  gemm_hopper_out_map(gate_up + F, M, F, 2 * F), gemm_hopper_out_map(swiglu, M, F, F)};
    hopper_launch_gemm(in, weight, 2 * F, M, K, ceil_div<int64_t>(F, COLUMNS), COLUMNS, (int)F, epilogue, stream);
}

// The widest gate of the next function: places in a tile are 32 bits.
constexpr int64_t GEMM_HOPPER_WIDEST_GATE = (int64_t)1 << 24;
// dgate_up (=) [M, 2F] and swiglu (=) [M, F]: what swiglu_backward makes of gate_up [M, 2F] and of dswiglu = dout [M,
// K] weight [K, F], rounded. dgate_up may be gate_up; swiglu may be nullptr: not wanted.
inline void gemm_hopper_swiglu_backward(bf16* dgate_up, bf16* swiglu, const bf16* dout, const bf16* weight,
                                        const bf16* gate_up, int64_t M, int64_t F, int64_t K, cudaStream_t stream) {
    NVTX_RANGE();
    using Tile = HopperGemmHelpedTile;
    CHECK(F <= GEMM_HOPPER_WIDEST_GATE, "gate's backward on Hopper: F = %lld may be at most %lld", (long long)F,
          (long long)GEMM_HOPPER_WIDEST_GATE);
    auto launch = [&](const auto& epilogue) {
        hopper_launch_gemm(dout, weight, F, M, K, ceil_div<int64_t>(F, Tile::BLOCK_N), Tile::BLOCK_N, 0, epilogue,
                           stream);
    };
    swiglu != nullptr ? launch(SwigluBackwardEpilogue<true>{swiglu, dgate_up, gate_up, (int)M, (int)F})
                      : launch(SwigluBackwardEpilogue<false>{swiglu, dgate_up, gate_up, (int)M, (int)F});
}
