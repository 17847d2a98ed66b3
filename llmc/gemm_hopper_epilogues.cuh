// gemm_hopper_epilogues.cuh: what the products of gemm_hopper.cuh do with a tile before it leaves the chip: nothing,
// the exponentials of a softmax, the rotation of q and k, the feed-forward gate, its backward; and the tile itself. How
// a tile comes and goes is written there.
#pragma once
#include <type_traits>

#include "cuda_common.cuh"
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
