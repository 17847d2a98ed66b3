// flash_attention_hopper_backward.cuh: the backward of attention for sm_90a, D = 64 and 128: wgmma, TMA, warps with
// separate jobs. What calls it: flash_attention_hopper_backward_launch.cuh.
//   P = exp(scale q k^T - lse),  dP = dout v^T,  dS = P (dP - delta),  delta = rowsum(dout out)
//   dv = P^T dout,  dk = scale dS^T q,  dq = scale dS k
// Shapes: q, out, dout, dq [B, Tq, H, D]; k, v, dk, dv [B, Tk, Hkv, D], each a HeadView (16-byte aligned rows, positive
// strides); lse [B, H, Tq]. Storage bf16, float32 accumulation and statistics. Where q and k were turned by their
// positions (rope.cuh), dq and dk can be turned back as they are rounded, which spares a pass over them.
//
// A block owns 128 keys of a kv head, keeps their k and v in shared memory, and walks over the query tiles of every
// query head of the group, so dk and dv are sums in one block, in a fixed order; or of one query head, when its dk and
// dv are added to float32 accumulators in scratch (KeySums). Two consumer warpgroups own 64 keys each. Scores are
// computed transposed, so that P^T and dS^T, once rounded, are register operands of the products that make dv and dk.
// dS also goes to shared memory, once, for dq, which needs both warpgroups' keys. A producer warp loads q, dout and
// statistics two tiles ahead; a writer warp adds the finished tiles of dq to a float32 accumulator in scratch by bulk
// reductions, whose order, and so the last bits of dq, vary. Where that pays (DqStart), the first part of a query
// tile's sum is stored, and nobody has to zero the accumulator.
//
// Deterministic calls fix that order: a query tile's sum takes the blocks of keys from the last that it sees to the
// first, a writer waiting until the one before has said that its part is in memory. Blocks start in that order too:
// causal, a block then reaches a query tile a tile (D = 128: two) later than the block of the keys after its own, and
// waits for nobody once under way. The price: the longest items start last, and the end of the kernel is less even.
//
// Products of a query tile, a warpgroup, D = 128 (64 queries) and D = 64 (128 queries):
//   S^T  = k q^T     m64n64, 8 steps    m64n128, 4    both in shared memory, contraction along the rows' columns
//   dP^T = v dout^T  m64n64, 8          m64n128, 5    the same, but of D = 128 v of the first five steps in registers,
//                                                     and of D = 64 a step for delta
//   dv  += P^T dout  m64n128, 4         m64n64, 8     P^T in registers, dout along its rows
//   dk  += dS^T q    m64n128, 4         m64n64, 8     dS^T in registers, q along its rows
//   dq   = dS k      m64n64, 8          m64n64, 8     warpgroup w: columns 64 w of 64 queries; queries 64 w of 128
//
// Bound: a query tile takes 2560 clocks of tensor cores (D = 64: and 128 for delta, see DeltaTerm). It reads and writes
// 348 KB (360 KB) of shared memory, and every warp reads lse and delta (lse alone) on top, which takes as long as 32
// KB: 3040 (3136) clocks at 128 bytes a clock, about 84 (86) % of the tensor cores' rate at best. 10 Tq Tk D H
// operations, half of them when causal. Two kernels beside it (flash_attention_hopper_backward_rows.cuh) are bound by
// bandwidth: 14 D bytes a query row and head, or 10.
//
// What lost: scores ahead in no tile; dq rounded in this kernel by idle warps; sequences or heads one after another, so
// that dq's accumulator stays in the L2 cache; and whatever keeps more work before the tensor cores (all of P computed
// before dP is waited for, dv or dk started earlier, the next scores before dq is stored, dq added from registers, a
// barrier in two halves): dev/RESULTS.md, "The backward's order". Variants: dev/cuda/flash_attention_backward.cu.
#pragma once
#include <cmath>

#include "flash_attention_hopper_backward_rows.cuh"
#include "flash_attention_launch.cuh"
#include "ptx_hopper.cuh"

// ---- constants ---------------------------------------------------------------------------------
// When dv's product is started. AFTER_DS: once dS is stored, to run while the warpgroups wait for each other.
// BEFORE_DS: as soon as P is rounded, so that the tensor cores have work while dS is computed and stored.
// ROUNDED_AFTER_DS: as AFTER_DS, and P is rounded only then, so that its operand's registers are those of dP.
enum class DvStart { AFTER_DS, BEFORE_DS, ROUNDED_AFTER_DS };

// ONE_AN_ITEM: the GPU starts a block when another is over. ONE_AN_SM: blocks take items until there are none; an
// item's first loads overlap the end of the one before. It wins where items are short: H100, D = 64, TFLOP/s at B = 32,
// T = 1024: 260 instead of 240; not at D = 128.
// Deterministic blocks wait for each other's items, and take theirs in the order in which they run: ONE_AN_SM.
enum class BackwardBlocks { ONE_AN_ITEM, ONE_AN_SM };
inline BackwardBlocks hopper_backward_blocks(const AttentionShape& s, bool deterministic) {
    constexpr int64_t SHORT_ITEM_QUERIES = 8192;
    return deterministic || (s.D == 64 && s.Tq * (s.H / s.Hkv) <= SHORT_ITEM_QUERIES) ? BackwardBlocks::ONE_AN_SM
                                                                                      : BackwardBlocks::ONE_AN_ITEM;
}

// Where dk and dv of a kv head's query heads become one sum. IN_A_BLOCK: an item has all heads of the group, one after
// another. IN_MEMORY: an item has one head, and adds. Items of all heads drift apart, because those of later keys have
// fewer queries: once a group's q, dout and dq's accumulator do not fit the L2 cache, nothing is read twice from it (H
// = 128, Hkv = 8, T = 32768 on an H200: 293 GB from and to memory and 474 TFLOP/s, where 128 kv heads have 590; taking
// all heads' tiles a few at a time, from the last down, 557). The price: 8 D bytes a key to zero and to round, and H /
// Hkv times that to add, in an order that varies.
enum class KeySums { IN_A_BLOCK, IN_MEMORY };
// What the items of the same query heads share: q, dout and dq's accumulator.
inline int64_t hopper_shared_bytes(const AttentionShape& s, int num_heads) {
    return s.Tq * num_heads * s.D * (int64_t)(2 * sizeof(bf16) + sizeof(float));
}
inline KeySums hopper_key_sums(const AttentionShape& s, bool deterministic) {
    const int heads_a_group = s.H / s.Hkv;
    return heads_a_group == 1 || deterministic || hopper_shared_bytes(s, heads_a_group) <= L2_GROUP_BYTES
               ? KeySums::IN_A_BLOCK
               : KeySums::IN_MEMORY;
}

// How a query tile's sum of dq starts. ZEROED: every part is added. FIRST_STORED: a part that finds none there is
// stored, not added, which spares 4 D bytes a query row and head. But a writer that looks first is later, and at D =
// 128 it has no time to spare. H200, ms, zeroed and stored, B = 64, 32, 16, 4 with H = 12, 12, 12, 16 and D = 64: T =
// 1024 0.775, 0.739; 2048 1.18, 1.15; 4096 2.11, 1.99; 8192 2.58, 2.57; D = 128, H = 8: B = 4, T = 8192 2.21, 2.38; B =
// 1, 98304 80, 92. Deterministic calls look anyway: 0.861, 0.776 and 2.77, 2.67 for the first and the last but one.
enum class DqStart { ZEROED, FIRST_STORED };
// Whether kernels can look at all.
constexpr bool hopper_may_store_dq(int D, bool deterministic) { return deterministic || D == 64; }
inline DqStart hopper_dq_start(const AttentionShape& s, bool deterministic) {
    constexpr int64_t SHORT_QUERIES = 4096;
    return hopper_may_store_dq(s.D, deterministic) && (deterministic || s.Tq <= SHORT_QUERIES) ? DqStart::FIRST_STORED
                                                                                               : DqStart::ZEROED;
}

// An item of work: BLOCK_N keys of a kv head and, for heads_an_item query heads of its group from first_head on, the
// query tiles [first_tile, end_tile) that see any of them. Tiles from first_unmasked on see all of them. b = -1: there
// is no more work.
struct KeyBlock {
    int b, kv_head, first_head, first_key;
    int first_tile, first_unmasked, end_tile;
};

// TILES_A_TURN: query tiles in a body of the loop without masks (1, 2 or 4); all but the last start the scores of the
// next. ptxas serialises every wgmma (C7514, C7515) when one is in flight across the loop's end, so one of them drains.
// DETERMINISTIC: the sums of dq are made in a fixed order. V_STEPS: of the D / 16 steps of dP^T = v dout^T, how many
// read v from registers, four a step and thread, which a warpgroup loads once an item; a tile then reads 4 KB less of
// shared memory a step. ptxas has R24 to R239 for what wgmma reads and writes, of which dk, dv, the scores and dP take
// 192: five steps at most, and those only at D = 128 and ROUNDED_AFTER_DS, otherwise four, at D = 64 three.
template <int D_, bool DETERMINISTIC_ = false,
          DvStart DV_START_ = D_ == 128 && !DETERMINISTIC_ ? DvStart::ROUNDED_AFTER_DS : DvStart::AFTER_DS,
          int TILES_A_TURN_ = D_ == 64 && !DETERMINISTIC_ ? 4 : 2, int V_STEPS_ = D_ == 128 && !DETERMINISTIC_ ? 5 : 0,
          DeltaTerm DELTA_ = D_ == 64 && !DETERMINISTIC_ ? DeltaTerm::IN_PRODUCT : DeltaTerm::SUBTRACTED>
struct HopperBackwardTile {
    static_assert(D_ == 64 || D_ == 128, "tiles are chosen for these head dims");
    static constexpr int D = D_;
    static constexpr bool DETERMINISTIC = DETERMINISTIC_;
    static constexpr bool MAY_STORE_DQ = hopper_may_store_dq(D, DETERMINISTIC);
    static constexpr DvStart DV_START = DV_START_;
    static constexpr int TILES_A_TURN = TILES_A_TURN_;
    static constexpr int V_STEPS = V_STEPS_;
    static constexpr DeltaTerm DELTA = DELTA_;
    static_assert(V_STEPS <= D / 16, "steps of a contraction");
    // Whether the scores ahead get dq's registers: see wgmma_anew. They then start only once dq is stored, so the wait
    // for the next tile's q and dout, which takes a while also when they are there, comes before.
    static constexpr bool NEXT_IN_DQ = D == 128 && V_STEPS > 0;
    // lse is read, where registers are short, only when the scores are there.
    static constexpr bool LSE_LATE = D == 64 || V_STEPS > 4;
    static constexpr int BLOCK_M = D == 128 ? 64 : 128;    // queries a tile: 8192 elements of q
    static constexpr int BLOCK_N = 128;                    // keys a block, 64 a consumer warpgroup
    static constexpr int STAGES = 2;                       // tiles of q, dout and dS in flight
    static constexpr int CONSUMERS = 2;                    // warpgroups
    static constexpr int WRITERS = DETERMINISTIC ? 2 : 1;  // warps
    static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP_SIZE;
    static constexpr int Q_EMPTY_THREADS = CONSUMERS * WARPGROUP_SIZE + WARP_SIZE;  // the loading thread as a warp
    // At launch all threads have the same, 65536 / THREADS rounded down to a multiple of 8: consumers that ask for more
    // than the producer's warpgroup gives up would wait for ever.
    static constexpr int LAUNCH_REGISTERS = 65536 / THREADS / 8 * 8;
    static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
    static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (1 + CONSUMERS) * LAUNCH_REGISTERS,
                  "registers");
    static constexpr int DQ_ELEMENTS = BLOCK_M * D / CONSUMERS;  // of a tile of dq, a warpgroup: 64 x 64

    using Statistics = QueryStatistics<BLOCK_M, DELTA>;

    struct Shared {
        // Not last: memcheck takes a product's read of delta, whose columns overlap, for one of twice as many bytes.
        alignas(1024) Statistics statistics[STAGES];
        alignas(1024) bf16 k[BLOCK_N * D];
        alignas(1024) bf16 v[BLOCK_N * D];
        alignas(1024) bf16 q[STAGES][BLOCK_M * D];
        alignas(1024) bf16 dout[STAGES][BLOCK_M * D];
        alignas(1024) bf16 ds[STAGES][BLOCK_M * BLOCK_N];  // [keys / 64][query][64 keys]
        alignas(1024) float out[CONSUMERS][DQ_ELEMENTS];   // dq on its way to the accumulator, then dv, then dk
        KeyBlock block[2];                                 // of even and odd items; here because registers are short
        uint64_t kv_full, kv_empty;                        // k, v and the item
        uint64_t q_full[STAGES];                           // q and the statistics
        uint64_t dout_full[STAGES], dout_empty[STAGES];
    };
};

struct HopperBackwardArguments {
    CUtensorMap q, dout;     // copies of BLOCK_M rows
    CUtensorMap k, v;        // of BLOCK_N rows
    CUtensorMap dk, dv;      // of 64 rows
    const void* statistics;  // Tile::Statistics of [B * H][query tiles]
    float* dq_accumulator;   // [B * H][query tiles][CONSUMERS][DQ_ELEMENTS], see hopper_backward_round_kernel
    int* next_item;          // the first that no block has taken; see backward_load
    int* dq_parts;           // [B * H][query tiles], what is in dq_accumulator: see DqParts; nullptr: DqStart::ZEROED
    const float2* angles;    // rope_make_table's: dq and dk are turned back; nullptr: they are not
    int64_t Tq, Tk, key_offset;
    int H, heads_per_kv_head, heads_an_item, num_query_tiles, num_key_blocks, num_items, num_blocks;
    float scale, scale_log2;
    TileOrder order;
    // Where dk and dv go instead when these have data: of KeySums::IN_MEMORY [B * Hkv][key blocks][consumer][D / 64]
    // parts of 64 x 64, see hopper_backward_round_kernel; otherwise rows.
    float *dk_accumulator, *dv_accumulator;
    HeadView<float> dk_whole, dv_whole;
};

// The first query tile that sees a key of those from first_key on; num_tiles when none does.
template <class Tile>
__host__ __device__ __forceinline__ int first_tile_to_see(int first_key, int key_offset, int Tq, int num_tiles) {
    const int first_query = first_key > key_offset ? first_key - key_offset : 0;
    return first_query < Tq ? first_query / Tile::BLOCK_M : num_tiles;
}

// What dq_parts says of a query tile. Deterministic: how many blocks of keys have their part of its sum in memory.
// Otherwise: nothing is there; a block has taken it on itself to store the first part; it is there, so others may add.
enum DqParts { DQ_PARTS_NONE, DQ_PARTS_FIRST_TAKEN, DQ_PARTS_FIRST_STORED };

// ---- backward ----------------------------------------------------------------------------------
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)  // device code below: sm_90a alone

// Named barriers. OUT_FULL and OUT_EMPTY: one a consumer warpgroup, between it and the writer whose turn it is.
// WRITER_DUE: one a writer warp, its turn. Q_EMPTY: one a stage, between the consumers, who have read its q and
// statistics, and the loading thread. No mbarrier, on which a warp's leader arrives for its warp: racecheck takes that
// for the leader's own reads alone, and statistics are read by every lane.
enum HopperBackwardBarrier { DS_WRITTEN = 1, OUT_FULL = 2, OUT_EMPTY = 4, WRITER_DUE = 6, Q_EMPTY = 8 };

// block (=) the item's; in shared memory, where it need not fit the loading thread's registers.
template <class Tile>
__device__ __forceinline__ void find_key_block(KeyBlock& block, const HopperBackwardArguments& args, int item) {
    const TileOrder::Place place = args.order.place(item);
    const int items_a_key_block = args.H / args.heads_an_item;
    block.b = place.head / items_a_key_block;
    block.first_head = place.head % items_a_key_block * args.heads_an_item;
    block.kv_head = block.first_head / args.heads_per_kv_head;
    // The first keys are seen by most queries: they start first, unless the order of the sums asks for the reverse.
    const int key_block = Tile::DETERMINISTIC ? args.order.num_tiles - 1 - place.tile : place.tile;
    const int first_key = key_block * Tile::BLOCK_N;
    block.first_key = first_key;
    const int end_tile = args.num_query_tiles, key_offset = (int)args.key_offset;
    block.end_tile = end_tile;
    const int first_tile = first_tile_to_see<Tile>(first_key, key_offset, (int)args.Tq, end_tile);
    block.first_tile = first_tile;
    const bool whole = first_key + Tile::BLOCK_N <= (int)args.Tk;
    const int first_to_see_all = max(0, first_key + Tile::BLOCK_N - 1 - key_offset);
    const int first_unmasked = whole ? min(end_tile, (first_to_see_all + Tile::BLOCK_M - 1) / Tile::BLOCK_M) : end_tile;
    block.first_unmasked = max(first_unmasked, first_tile);
}

// Loads, item after item, k and v, and q, dout and the statistics of every query tile. The first item is the block's
// number, the others are those that nobody has taken yet; deterministic, the first is too: an item waits for earlier
// ones alone, so the earliest that is not over is always in a block that runs, and waits for nobody. An item's first
// query tile comes before its k and v, which must wait until the item before is done with its own. One thread, which
// counts as its warp in named barriers: the others have exited.
template <class Tile>
__device__ __forceinline__ void backward_load(typename Tile::Shared& shared, const HopperBackwardArguments& args) {
    constexpr int TILE_BYTES = sizeof(shared.q[0]), STATISTICS_BYTES = sizeof(shared.statistics[0]);
    const uint32_t kv_full = shared_address(&shared.kv_full), kv_empty = shared_address(&shared.kv_empty);
    PipelineState<Tile::STAGES> state;
    int item = Tile::DETERMINISTIC ? atomicAdd(args.next_item, 1) : blockIdx.x, slot = 0;
#pragma unroll 1
    for (; item < args.num_items; slot ^= 1) {
        // The item two before, which had this slot, is over: the one before could not have been started otherwise.
        KeyBlock& block = shared.block[slot];
        find_key_block<Tile>(block, args, item);
        bool kv_to_come = true;
        int heads_to_come = block.first_tile < block.end_tile ? args.heads_an_item : 0, tile = block.first_tile;
#pragma unroll 1
        while (heads_to_come > 0 || kv_to_come) {
            if (heads_to_come > 0) {
                const int stage = state.stage, row = tile * Tile::BLOCK_M;
                const int h = block.first_head + args.heads_an_item - heads_to_come;
                const uint32_t q_full = shared_address(&shared.q_full[stage]);
                // The one lane that is here stands for its warp: the barrier counts warps, whoever of them arrives.
                named_barrier_sync(Q_EMPTY + stage, Tile::Q_EMPTY_THREADS);
                mbarrier_arrive_expect(q_full, TILE_BYTES + STATISTICS_BYTES);
                tma_load(shared_address(shared.q[stage]), &args.q, row, h, block.b, q_full);
                const int64_t query_tile = ((int64_t)block.b * args.H + h) * args.num_query_tiles + tile;
                bulk_load(shared_address(&shared.statistics[stage]),
                          static_cast<const typename Tile::Statistics*>(args.statistics) + query_tile, STATISTICS_BYTES,
                          q_full);
                const uint32_t dout_full = shared_address(&shared.dout_full[stage]);
                mbarrier_wait(shared_address(&shared.dout_empty[stage]), state.parity ^ 1);
                mbarrier_arrive_expect(dout_full, TILE_BYTES);
                tma_load(shared_address(shared.dout[stage]), &args.dout, row, h, block.b, dout_full);
                state.advance();
                if (++tile == block.end_tile) {
                    tile = block.first_tile;
                    --heads_to_come;
                }
            }
            if (kv_to_come) {
                mbarrier_wait(kv_empty, slot ^ 1);
                mbarrier_arrive_expect(kv_full, sizeof(shared.k) + sizeof(shared.v));
                tma_load(shared_address(shared.k), &args.k, block.first_key, block.kv_head, block.b, kv_full);
                tma_load(shared_address(shared.v), &args.v, block.first_key, block.kv_head, block.b, kv_full);
                kv_to_come = false;
            }
        }
        // Two query tiles before this one is over: blocks that took the next item earlier would not share the last ones
        // evenly (taken at the item's start, 497 TFLOP/s at D = 128, T = 8192, where one block an item has 592).
        item = atomicAdd(args.next_item, 1);
    }
    start_next_kernel();  // dq's, once every block is at its last item: multiprocessors become free
    mbarrier_wait(kv_empty, slot ^ 1);
    shared.block[slot].b = -1;
    mbarrier_arrive(kv_full);
}

// The last block of keys that queries of this tile see.
template <class Tile>
__device__ __forceinline__ int last_key_block(const HopperBackwardArguments& args, int tile) {
    const int last_query = min((tile + 1) * Tile::BLOCK_M, (int)args.Tq) - 1;
    return min((int)args.Tk - 1, last_query + (int)args.key_offset) / Tile::BLOCK_N;
}

// Whether this block is to store the first part of a query tile's dq and to count it once it is in memory; if not, it
// is there. Who waits here waits for a block that does not wait.
__device__ __forceinline__ bool take_first_part(int* parts) {
    if (load_acquire(parts) == DQ_PARTS_FIRST_STORED) {
        return false;
    }
    if (atomicCAS(parts, DQ_PARTS_NONE, DQ_PARTS_FIRST_TAKEN) == DQ_PARTS_NONE) {
        return true;
    }
    wait_for_count(parts, DQ_PARTS_FIRST_STORED);
    return false;
}

// Moves what the consumers put into shared.out to global memory: their parts of dq, tile after tile, then dv, then dk
// (to accumulators, in KEY_PARTS parts each). WRITERS warps in turn, of which this is number `writer`. Deterministic
// there are two: while one waits until its part of dq is in memory, to say so, the other looks whether the next is due.
template <class Tile>
__device__ __forceinline__ void backward_write(typename Tile::Shared& shared, const HopperBackwardArguments& args,
                                               int writer) {
    constexpr int THREADS = WARPGROUP_SIZE + WARP_SIZE, KEY_PARTS = Tile::D / 64;
    const bool leader = threadIdx.x % WARP_SIZE == 0;
    bool due = writer == 0;
    // start(w): by the leader, for each warpgroup w once it has filled its part. finish: by the leader, when both are
    // on their way and their memory is free again.
    auto write = [&](auto start, auto finish) {
        if (Tile::WRITERS > 1) {
            due = !due;
            if (due) {
                return;  // next time
            }
            named_barrier_sync(WRITER_DUE + writer, Tile::WRITERS * WARP_SIZE);
        }
#pragma unroll 1
        for (int w = 0; w < Tile::CONSUMERS; ++w) {
            named_barrier_sync(OUT_FULL + w, THREADS);
            if (leader) {
                start(w);
                bulk_commit();
            }
            __syncwarp();
        }
        if (leader) {
            bulk_wait_read<1>();
        }
        __syncwarp();
        named_barrier_arrive(OUT_EMPTY, THREADS);
        if (leader) {
            bulk_wait_read<0>();
        }
        __syncwarp();
        named_barrier_arrive(OUT_EMPTY + 1, THREADS);
        if (Tile::WRITERS > 1) {
            named_barrier_arrive(WRITER_DUE + (writer ^ 1), Tile::WRITERS * WARP_SIZE);
        }
        if (leader) {
            finish();
        }
        __syncwarp();
    };
    if (writer == 0) {
        named_barrier_arrive(OUT_EMPTY, THREADS);
        named_barrier_arrive(OUT_EMPTY + 1, THREADS);
    } else {
        named_barrier_arrive(WRITER_DUE, Tile::WRITERS * WARP_SIZE);
    }
#pragma unroll 1
    for (int slot = 0;; slot ^= 1) {
        mbarrier_wait(shared_address(&shared.kv_full), slot);
        // The leader reads and arrives: racecheck takes an arrival for the arriving lane's own reads alone. (All lanes
        // arriving costs the writers' 24 registers a spill.) Of the others' block only what they need is there.
        KeyBlock block = {};
        if (leader) {
            block = shared.block[slot];
        }
        block.b = __shfl_sync(FULL_WARP, block.b, 0);
        if (block.b < 0) {
            break;
        }
        block.first_tile = __shfl_sync(FULL_WARP, block.first_tile, 0);
        block.end_tile = __shfl_sync(FULL_WARP, block.end_tile, 0);
        if (leader) {
            mbarrier_arrive(shared_address(&shared.kv_empty));
        }
        // Deterministic, both are the same: what is computed anew, or constant, is not kept in one of 24 registers.
#pragma unroll 1
        for (int i = 0; i < (Tile::DETERMINISTIC ? args.heads_per_kv_head : args.heads_an_item); ++i) {
#pragma unroll 1
            for (int tile = block.first_tile; tile < block.end_tile; ++tile) {
                const int first_head = Tile::DETERMINISTIC ? block.kv_head * args.heads_per_kv_head : block.first_head;
                const int head = block.b * args.H + first_head + i;
                const int query_tile = opaque(head) * args.num_query_tiles + tile;
                bool is_first = false;
                write(
                    [&](int w) {
                        if (Tile::DETERMINISTIC) {
                            const int before = last_key_block<Tile>(args, tile) - block.first_key / Tile::BLOCK_N;
                            is_first = before == 0;
                            if (w == 0) {
                                wait_for_count(args.dq_parts + query_tile, before);
                                fence_async_global();
                            }
                        } else if (Tile::MAY_STORE_DQ && w == 0 && args.dq_parts != nullptr) {
                            is_first = take_first_part(args.dq_parts + query_tile);
                            fence_async_global();
                        }
                        float* const to =
                            args.dq_accumulator + ((int64_t)query_tile * Tile::CONSUMERS + w) * Tile::DQ_ELEMENTS;
                        const uint32_t from = shared_address(shared.out[w]);
                        if (Tile::MAY_STORE_DQ && is_first) {
                            bulk_store(to, from, sizeof(shared.out[w]));
                        } else {
                            bulk_reduce_add_f32(to, from, sizeof(shared.out[w]));
                        }
                    },
                    [&] {
                        if (Tile::DETERMINISTIC || is_first) {
                            bulk_wait<0>();
                            fence_async_global();  // what was written before the count
                            add_release(args.dq_parts + query_tile, 1);
                        }
                    });
            }
        }
        if (!Tile::DETERMINISTIC && args.dk_accumulator != nullptr) {
#pragma unroll 1
            for (int i = 0; i < 2 * KEY_PARTS; ++i) {
                write(
                    [&](int w) {
                        const int num_kv_heads = args.H / args.heads_per_kv_head;
                        const int64_t head = (int64_t)block.b * num_kv_heads + block.kv_head;
                        const int64_t first_part = (head * args.num_key_blocks + block.first_key / Tile::BLOCK_N) *
                                                   (Tile::CONSUMERS * KEY_PARTS);
                        bulk_reduce_add_f32((i < KEY_PARTS ? args.dv_accumulator : args.dk_accumulator) +
                                                (first_part + w * KEY_PARTS + i % KEY_PARTS) * Tile::DQ_ELEMENTS,
                                            shared_address(shared.out[w]), sizeof(shared.out[w]));
                    },
                    [] {});
            }
            continue;
        }
        if (args.dk_whole.data != nullptr) {
            continue;  // the consumers store them
        }
        write(
            [&](int w) {
                tma_store(&args.dv, shared_address(shared.out[w]), block.first_key + 64 * w, block.kv_head, block.b);
            },
            [] {});
        write(
            [&](int w) {
                tma_store(&args.dk, shared_address(shared.out[w]), block.first_key + 64 * w, block.kv_head, block.b);
            },
            [] {});
    }
    if (leader) {
        bulk_wait<0>();  // the block's shared memory must outlive its reading
    }
}

// A warpgroup's 64 rows of v as the A operand of a product's first STEPS steps.
template <int STEPS>
struct RowFragments {
    uint32_t step[std::max(STEPS, 1)][4];  // of STEPS = 0 untouched
};
// rows (=) those of a [BLOCK_N][D] tile; a: the first.
template <class Tile, int STEPS>
__device__ __forceinline__ void load_rows(RowFragments<STEPS>& rows, uint32_t a) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        ldmatrix_x4(rows.step[step], fragment_address<Tile::BLOCK_N>(a, step));
    }
}
// What a product's first step does with its accumulators: see wgmma_zero, wgmma_anew and wgmma.
enum class FirstStep { ZERO, ANEW, ADD };
// s (=, with ADD +=) a b^T, started: 64 rows of a [BLOCK_N][D] tile, of the first STEPS steps in registers, and BLOCK_M
// rows of the other.
template <class Tile, FirstStep FIRST, int STEPS>
__device__ __forceinline__ void start_scores(float (&s)[Tile::BLOCK_M / 2], const RowFragments<STEPS>& rows, uint32_t a,
                                             uint32_t b) {
    static_assert(STEPS == 0 || FIRST != FirstStep::ANEW, "wgmma_anew takes both operands from shared memory");
    const uint64_t a_start = wgmma_descriptor_k_major(a), b_start = wgmma_descriptor_k_major(b);
#pragma unroll
    for (int step = 0; step < Tile::D / 16; ++step) {
        const uint64_t a_step = wgmma_advance(a_start, step / 4 * (Tile::BLOCK_N * 128) + step % 4 * 32);
        const uint64_t b_step = wgmma_advance(b_start, step / 4 * (Tile::BLOCK_M * 128) + step % 4 * 32);
        const bool adds = step > 0 || FIRST == FirstStep::ADD;
        if (step < STEPS) {
            adds ? wgmma<0>(s, rows.step[step], b_step) : wgmma_zero<0>(s, rows.step[step], b_step);
        } else if (adds) {
            wgmma<0, 0>(s, a_step, b_step);
        } else if (FIRST == FirstStep::ANEW) {
            wgmma_anew<0, 0>(s, a_step, b_step);
        } else {
            wgmma_zero<0, 0>(s, a_step, b_step);
        }
    }
    wgmma_commit();
}
// dp (=) -delta in every row, part of the product that follows, fenced: a step whose A is ones in columns 0 to 2 and
// zeros in 3 to 15, and whose B is the three summands of each query's.
template <class Tile>
__device__ __forceinline__ void start_at_minus_delta(float (&dp)[Tile::BLOCK_M / 2],
                                                     const typename Tile::Statistics& statistics) {
    const uint32_t lane = opaque((uint32_t)threadIdx.x) % 4;  // opaque: not kept in registers from tile to tile
    const uint32_t ones = pack_bf16x2(lane < 2 ? 1.0f : 0.0f, lane == 0 ? 1.0f : 0.0f);
    const uint32_t a[4] = {ones, ones, 0, 0};
    wgmma_fence();  // A's registers are written
    wgmma_zero<0>(dp, a, wgmma_descriptor_8_columns(shared_address(statistics.delta)));
}
// dp (=) v dout^T, of DeltaTerm::IN_PRODUCT minus delta, fenced and started: this warpgroup's keys and a query tile. v,
// dout: the tiles.
template <class Tile>
__device__ __forceinline__ void start_dp(float (&dp)[Tile::BLOCK_M / 2], const RowFragments<Tile::V_STEPS>& v_rows,
                                         uint32_t v, uint32_t dout, const typename Tile::Statistics& statistics,
                                         int warpgroup) {
    const uint32_t v_part = v + warpgroup * (64 * 128);
    if constexpr (Tile::DELTA == DeltaTerm::IN_PRODUCT) {
        start_at_minus_delta<Tile>(dp, statistics);
        start_scores<Tile, FirstStep::ADD>(dp, v_rows, v_part, dout);
    } else {
        wgmma_fence();
        start_scores<Tile, FirstStep::ZERO>(dp, v_rows, v_part, dout);
    }
}
// sum (+=) p tile, started: P^T or dS^T of 64 keys and BLOCK_M queries in registers, a [BLOCK_M][D] tile.
template <class Tile>
__device__ __forceinline__ void start_key_gradient(float (&sum)[Tile::D / 2],
                                                   const uint32_t (&p)[Tile::BLOCK_M / 16][4], uint32_t tile) {
    const uint64_t start = wgmma_descriptor_mn_major(tile, Tile::BLOCK_M * 128);
#pragma unroll
    for (int step = 0; step < Tile::BLOCK_M / 16; ++step) {
        wgmma<1>(sum, p[step], wgmma_advance(start, step * 2048));
    }
    wgmma_commit();
}
// dq (=) dS k, started: this warpgroup's part. ds, k: the whole tiles.
template <class Tile>
__device__ __forceinline__ void start_dq(float (&dq)[Tile::DQ_ELEMENTS / WARPGROUP_SIZE], uint32_t ds, uint32_t k,
                                         int warpgroup) {
    const uint32_t ds_part = Tile::D == 128 ? ds : ds + warpgroup * (64 * 128);
    const uint32_t k_part = Tile::D == 128 ? k + warpgroup * (Tile::BLOCK_N * 128) : k;
    const uint64_t ds_start = wgmma_descriptor_k_major(ds_part);
    const uint64_t k_start = wgmma_descriptor_mn_major(k_part, Tile::BLOCK_N * 128);
#pragma unroll
    for (int step = 0; step < Tile::BLOCK_N / 16; ++step) {
        const uint64_t ds_step = wgmma_advance(ds_start, step / 4 * (Tile::BLOCK_M * 128) + step % 4 * 32);
        const uint64_t k_step = wgmma_advance(k_start, step * 2048);
        if (step == 0) {
            wgmma_zero<0, 1>(dq, ds_step, k_step);
        } else {
            wgmma<0, 1>(dq, ds_step, k_step);
        }
    }
    wgmma_commit();
}

// Scores of this warpgroup's keys, from first_key on, and the tile's queries become -infinity where the query does not
// see the key or there is no such key.
template <class Tile>
__device__ __forceinline__ void mask_key_rows(float (&s)[Tile::BLOCK_M / 2], const HopperBackwardArguments& args,
                                              int first_key, int first_query) {
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x % WARPGROUP_SIZE / WARP_SIZE;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int key = first_key + 16 * warp + 8 * half + lane / 4;
        // Queries of the tile that do not see it, counted from this lane's first column.
        const int hidden =
            (key < (int)args.Tk ? key - (int)args.key_offset - first_query : Tile::BLOCK_M) - 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < Tile::BLOCK_M / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& score = s[4 * j + 2 * half + i];
                score = 8 * j + i < hidden ? -INFINITY : score;
            }
        }
    }
}
// pairs (=) what `statistics`, of a tile's queries, shared memory, holds of this lane's columns.
template <int COUNT>
__device__ __forceinline__ void read_statistics(float2 (&pairs)[COUNT], const float* statistics) {
    const float2* const from = reinterpret_cast<const float2*>(statistics) + threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
        pairs[j] = from[4 * j];
    }
}
// s (=) P^T = 2^(scale_log2 s - lse); lse: of this lane's columns.
template <int COUNT>
__device__ __forceinline__ void exponentiate(float (&s)[COUNT], const float2 (&lse)[COUNT / 4], float scale_log2) {
#pragma unroll
    for (int j = 0; j < COUNT / 4; ++j) {
        const float2 pair = lse[j];
        s[4 * j] = exp2_approx(fmaf(s[4 * j], scale_log2, -pair.x));
        s[4 * j + 1] = exp2_approx(fmaf(s[4 * j + 1], scale_log2, -pair.y));
        s[4 * j + 2] = exp2_approx(fmaf(s[4 * j + 2], scale_log2, -pair.x));
        s[4 * j + 3] = exp2_approx(fmaf(s[4 * j + 3], scale_log2, -pair.y));
    }
}
// dp (=) dS^T = P^T (dp - delta); delta: of this lane's columns.
template <int COUNT>
__device__ __forceinline__ void differentiate(float (&dp)[COUNT], const float (&p)[COUNT],
                                              const float2 (&delta)[COUNT / 4]) {
#pragma unroll
    for (int j = 0; j < COUNT / 4; ++j) {
        const float2 pair = delta[j];
        dp[4 * j] = p[4 * j] * (dp[4 * j] - pair.x);
        dp[4 * j + 1] = p[4 * j + 1] * (dp[4 * j + 1] - pair.y);
        dp[4 * j + 2] = p[4 * j + 2] * (dp[4 * j + 2] - pair.x);
        dp[4 * j + 3] = p[4 * j + 3] * (dp[4 * j + 3] - pair.y);
    }
}
// dp (=) dS^T, delta being subtracted already.
template <int COUNT>
__device__ __forceinline__ void differentiate(float (&dp)[COUNT], const float (&p)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        dp[i] *= p[i];
    }
}
// Stores such an operand, rows keys and columns queries, transposed into this warpgroup's 64 columns of a tile of dS.
template <class Tile>
__device__ __forceinline__ void store_transposed(uint32_t tile, const uint32_t (&operand)[Tile::BLOCK_M / 16][4],
                                                 int warpgroup) {
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x % WARPGROUP_SIZE / WARP_SIZE;
    const int query = lane % 8 + lane / 16 * 8, chunk = 2 * warp + lane / 8 % 2;
    const uint32_t address = tile + warpgroup * (Tile::BLOCK_M * 128) + query * 128 + (chunk ^ query % 8) * 16;
#pragma unroll
    for (int step = 0; step < Tile::BLOCK_M / 16; ++step) {
        stmatrix_x4_trans(address + step * 16 * 128, operand[step]);
    }
}
// sum (in place) of this warpgroup's 64 keys, from first_key on, turned back: a lane holds both elements of every pair.
template <class Tile>
__device__ __forceinline__ void turn_back_key_gradient(float (&sum)[Tile::D / 2], const float2* angles, int first_key) {
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x % WARPGROUP_SIZE / WARP_SIZE;
#pragma unroll
    for (int j = 0; j < Tile::D / 16; ++j) {
        const RopeFragmentAngles angle =
            rope_fragment_angles<Tile::D>(angles, first_key / ROPE_TILE_ROWS + warp, lane / 4, 8 * j + 2 * (lane % 4));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            rope_turn_back(sum[4 * j + e], sum[4 * j + e + Tile::D / 4], angle.row[e / 2][e % 2]);
        }
    }
}
// tile (=) factor * sum of this warpgroup's 64 keys, rounded.
template <class Tile>
__device__ __forceinline__ void store_key_gradient(uint32_t tile, const float (&sum)[Tile::D / 2], float factor) {
#pragma unroll
    for (int step = 0; step < Tile::D / 16; ++step) {
        uint32_t fragment[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            fragment[i] = pack_bf16x2(factor * sum[8 * step + 2 * i], factor * sum[8 * step + 2 * i + 1]);
        }
        stmatrix_x4(fragment_address(tile, step), fragment);
    }
}
// rows (=) factor * sum of this warpgroup's 64 keys, as they are: 32 bytes of each of 8 rows at a time.
template <class Tile>
__device__ __forceinline__ void store_whole_key_gradient(const HeadView<float>& rows, const float (&sum)[Tile::D / 2],
                                                         float factor, const KeyBlock& block, int warpgroup,
                                                         int64_t Tk) {
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x % WARPGROUP_SIZE / WARP_SIZE;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int key = block.first_key + 64 * warpgroup + 16 * warp + 8 * half + lane / 4;
        if (key < Tk) {
            float* const row = rows.row(block.b, key, block.kv_head) + 2 * (lane % 4);
#pragma unroll
            for (int j = 0; j < Tile::D / 8; ++j) {
                *reinterpret_cast<float2*>(row + 8 * j) =
                    make_float2(factor * sum[4 * j + 2 * half], factor * sum[4 * j + 2 * half + 1]);
            }
        }
    }
}
// part (=) 64 columns of a warpgroup's 64 rows, from FIRST_COLUMN on, in the order of its registers.
template <class Tile, int FIRST_COLUMN, int COUNT>
__device__ __forceinline__ void store_part(float* part, const float (&rows)[COUNT]) {
    float4* const out = reinterpret_cast<float4*>(part) + threadIdx.x % WARPGROUP_SIZE;
#pragma unroll
    for (int i = 0; i < Tile::DQ_ELEMENTS / WARPGROUP_SIZE / 4; ++i) {
        const float* const from = rows + FIRST_COLUMN / 2 + 4 * i;
        out[i * WARPGROUP_SIZE] = make_float4(from[0], from[1], from[2], from[3]);
    }
}
// Gives this warpgroup's part of shared.out, which fill() fills, to the writer warp.
template <class Tile, class Fill>
__device__ __forceinline__ void give_to_writer(int warpgroup, Fill fill) {
    constexpr int THREADS = WARPGROUP_SIZE + WARP_SIZE;
    named_barrier_sync(OUT_EMPTY + warpgroup, THREADS);
    fill();
    fence_async_shared();
    named_barrier_arrive(OUT_FULL + warpgroup, THREADS);
}

// scores (=) those of the tile in that stage, whose q has come, of this warpgroup's keys, started. k: opaque.
template <class Tile, FirstStep FIRST>
__device__ __forceinline__ void start_scores_of(float (&scores)[Tile::BLOCK_M / 2], typename Tile::Shared& shared,
                                                uint32_t k, int warpgroup, int stage) {
    wgmma_fence();
    start_scores<Tile, FIRST>(scores, RowFragments<0>(), k + warpgroup * (64 * 128), shared_address(shared.q[stage]));
}

// One query tile of a consumer warpgroup. p: the tile's scores, which STARTED says are being computed already; next:
// with START_NEXT the next tile's scores are started in the shadow of dk's product.
template <class Tile, bool MASKED, bool STARTED, bool START_NEXT>
__device__ __forceinline__ void backward_tile(float (&dk)[Tile::D / 2], float (&dv)[Tile::D / 2],
                                              float (&p)[Tile::BLOCK_M / 2], float (&next)[Tile::BLOCK_M / 2],
                                              const RowFragments<Tile::V_STEPS>& v_rows, typename Tile::Shared& shared,
                                              const HopperBackwardArguments& args, const KeyBlock& block, int warpgroup,
                                              int tile, PipelineState<Tile::STAGES>& state) {
    constexpr int BLOCK_M = Tile::BLOCK_M, CONSUMER_THREADS = Tile::CONSUMERS * WARPGROUP_SIZE;
    const int thread = threadIdx.x % WARPGROUP_SIZE;
    const bool warp_leader = thread % WARP_SIZE == 0;
    const int stage = state.stage;
    // Opaque: what is computed from these is not kept in registers from tile to tile.
    const uint32_t k = opaque(shared_address(shared.k)), v = opaque(shared_address(shared.v));
    const uint32_t q = shared_address(shared.q[stage]), dout = shared_address(shared.dout[stage]);
    const uint32_t ds = shared_address(shared.ds[stage]);

    auto wait_for_q = [&] { mbarrier_wait(shared_address(&shared.q_full[state.stage]), state.parity); };
    auto wait_for_dout = [&] { mbarrier_wait(shared_address(&shared.dout_full[state.stage]), state.parity); };

    if (!STARTED) {
        wait_for_q();
        start_scores_of<Tile, FirstStep::ZERO>(p, shared, k, warpgroup, stage);
    }
    float2 lse[BLOCK_M / 8];
    if constexpr (!Tile::LSE_LATE) {
        read_statistics(lse, shared.statistics[stage].lse);
    }
    float dp[BLOCK_M / 2];
    if (!STARTED || !Tile::NEXT_IN_DQ) {
        wait_for_dout();
    }
    start_dp<Tile>(dp, v_rows, v, dout, shared.statistics[stage], warpgroup);
    wgmma_wait<1>();  // the scores
    wgmma_pin(p);
    if (MASKED) {
        mask_key_rows<Tile>(p, args, block.first_key + 64 * warpgroup, tile * BLOCK_M);
    }
    if constexpr (Tile::LSE_LATE) {
        read_statistics(lse, shared.statistics[stage].lse);
    }
    exponentiate(p, lse, args.scale_log2);
    uint32_t p_operand[BLOCK_M / 16][4], ds_operand[BLOCK_M / 16][4];
    if (Tile::DV_START != DvStart::ROUNDED_AFTER_DS) {
        round_to_operand(p_operand, p);
    }
    if (Tile::DV_START == DvStart::BEFORE_DS) {
        wgmma_fence();
        start_key_gradient<Tile>(dv, p_operand, dout);
        wgmma_wait<1>();
    } else {
        wgmma_wait<0>();
    }
    wgmma_pin(dp);
    if constexpr (Tile::DELTA == DeltaTerm::IN_PRODUCT) {
        differentiate(dp, p);
    } else {
        float2 delta[BLOCK_M / 8];
        read_statistics(delta, shared.statistics[stage].delta);
        differentiate(dp, p, delta);
    }
    round_to_operand(ds_operand, dp);
    store_transposed<Tile>(ds, ds_operand, warpgroup);
    if (Tile::DV_START == DvStart::ROUNDED_AFTER_DS) {
        round_to_operand(p_operand, p);
    }
    if (Tile::DV_START != DvStart::BEFORE_DS) {
        wgmma_fence();
        start_key_gradient<Tile>(dv, p_operand, dout);
    }
    fence_async_shared();
    named_barrier_sync(DS_WRITTEN, CONSUMER_THREADS);

    float dq[Tile::DQ_ELEMENTS / WARPGROUP_SIZE];
    wgmma_fence();
    start_dq<Tile>(dq, ds, k, warpgroup);
    wgmma_wait<1>();  // dv: dout's stage is free before dk's product is even started, and the next dout comes sooner
    if (warp_leader) {
        mbarrier_arrive(shared_address(&shared.dout_empty[stage]));
    }
    start_key_gradient<Tile>(dk, ds_operand, q);
    state.advance();
    if (START_NEXT && Tile::NEXT_IN_DQ) {
        wait_for_q();
        wait_for_dout();
    }
    wgmma_wait<1>();  // dq
    wgmma_pin(dq);
    give_to_writer<Tile>(warpgroup, [&] { store_part<Tile, 0>(shared.out[warpgroup], dq); });
    if (START_NEXT) {
        if constexpr (Tile::NEXT_IN_DQ) {
#pragma unroll
            for (int i = 0; i < BLOCK_M / 2; ++i) {
                next[i] = dq[i];
            }
        } else {
            wait_for_q();
        }
        constexpr FirstStep FIRST = Tile::NEXT_IN_DQ ? FirstStep::ANEW : FirstStep::ZERO;
        start_scores_of<Tile, FIRST>(next, shared, k, warpgroup, state.stage);
        wgmma_wait<1>();  // dk
    } else {
        wgmma_wait<0>();
    }
    named_barrier_arrive(Q_EMPTY + stage, Tile::Q_EMPTY_THREADS);
}

// dk and dv of every item's keys, and their share of dq. Two warpgroups.
template <class Tile>
__device__ __forceinline__ void backward_consume(typename Tile::Shared& shared, const HopperBackwardArguments& args) {
    const int warpgroup = __shfl_sync(FULL_WARP, threadIdx.x / WARPGROUP_SIZE, 0) - 1;  // known to be uniform
    float p[2][Tile::BLOCK_M / 2];
    PipelineState<Tile::STAGES> state;
#pragma unroll
    for (int stage = 0; stage < Tile::STAGES; ++stage) {
        named_barrier_arrive(Q_EMPTY + stage, Tile::Q_EMPTY_THREADS);
    }
#pragma unroll 1
    for (int slot = 0;; slot ^= 1) {
        mbarrier_wait(shared_address(&shared.kv_full), slot);
        const KeyBlock& block = shared.block[slot];
        if (block.b < 0) {
            break;
        }
        float dk[Tile::D / 2] = {}, dv[Tile::D / 2] = {};
        RowFragments<Tile::V_STEPS> v_rows;
        load_rows<Tile>(v_rows, shared_address(shared.v) + warpgroup * (64 * 128));
#pragma unroll 1
        for (int i = 0; i < args.heads_an_item; ++i) {
            // Whole groups of TILES_A_TURN remain for the second loop.
            const int masked_end = block.first_unmasked + (block.end_tile - block.first_unmasked) % Tile::TILES_A_TURN;
            int tile = block.first_tile;
#pragma unroll 1
            for (; tile < masked_end; ++tile) {
                backward_tile<Tile, true, false, false>(dk, dv, p[0], p[1], v_rows, shared, args, block, warpgroup,
                                                        tile, state);
            }
#pragma unroll 1
            for (; tile < block.end_tile; tile += Tile::TILES_A_TURN) {
                if constexpr (Tile::TILES_A_TURN == 1) {
                    backward_tile<Tile, false, false, false>(dk, dv, p[0], p[1], v_rows, shared, args, block, warpgroup,
                                                             tile, state);
                } else {
                    backward_tile<Tile, false, false, true>(dk, dv, p[0], p[1], v_rows, shared, args, block, warpgroup,
                                                            tile, state);
                    if constexpr (Tile::TILES_A_TURN == 4) {
                        backward_tile<Tile, false, true, true>(dk, dv, p[1], p[0], v_rows, shared, args, block,
                                                               warpgroup, tile, state);
                        backward_tile<Tile, false, true, true>(dk, dv, p[0], p[1], v_rows, shared, args, block,
                                                               warpgroup, tile, state);
                    }
                    backward_tile<Tile, false, true, false>(dk, dv, p[1], p[0], v_rows, shared, args, block, warpgroup,
                                                            tile, state);
                }
            }
        }
        wgmma_pin(dk);
        wgmma_pin(dv);
        const bool whole = args.dk_accumulator == nullptr && args.dk_whole.data != nullptr;
        const int first_key = block.first_key + 64 * warpgroup;
        if (whole) {  // before `block` may change
            store_whole_key_gradient<Tile>(args.dv_whole, dv, 1.0f, block, warpgroup, args.Tk);
            store_whole_key_gradient<Tile>(args.dk_whole, dk, args.scale, block, warpgroup, args.Tk);
        }
        mbarrier_arrive(shared_address(&shared.kv_empty));
        if (whole) {
            continue;
        }
        if (!Tile::DETERMINISTIC && args.dk_accumulator != nullptr) {
            float* const part = shared.out[warpgroup];
            give_to_writer<Tile>(warpgroup, [&] { store_part<Tile, 0>(part, dv); });
            if constexpr (Tile::D == 128) {
                give_to_writer<Tile>(warpgroup, [&] { store_part<Tile, 64>(part, dv); });
            }
            give_to_writer<Tile>(warpgroup, [&] { store_part<Tile, 0>(part, dk); });
            if constexpr (Tile::D == 128) {
                give_to_writer<Tile>(warpgroup, [&] { store_part<Tile, 64>(part, dk); });
            }
            continue;
        }
        const uint32_t out = shared_address(shared.out[warpgroup]);
        give_to_writer<Tile>(warpgroup, [&] { store_key_gradient<Tile>(out, dv, 1.0f); });
        if (args.angles != nullptr) {  // while dv is on its way
            turn_back_key_gradient<Tile>(dk, args.angles, first_key);
        }
        give_to_writer<Tile>(warpgroup, [&] { store_key_gradient<Tile>(out, dk, args.scale); });
    }
}
#endif

// Launch: blocks of one producer and two consumer warpgroups, as BackwardBlocks says: one for each 128 keys of a kv
// head (KeySums::IN_MEMORY: of a query head), in TileOrder, or one an SM; an SM holds one at a time. Bound: see the
// head of this file.
template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1)
    flash_attention_hopper_backward_kernel(const __grid_constant__ HopperBackwardArguments args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) unsigned char hopper_backward_shared[];
    typename Tile::Shared& shared = *reinterpret_cast<typename Tile::Shared*>(hopper_backward_shared);
    if (threadIdx.x == 0) {
        constexpr int CONSUMER_WARPS = Tile::CONSUMERS * WARPGROUP_SIZE / WARP_SIZE;
        mbarrier_init(shared_address(&shared.kv_full), 1);
        // Of consumers every lane arrives: every lane reads `block`, to the end.
        mbarrier_init(shared_address(&shared.kv_empty), Tile::CONSUMERS * WARPGROUP_SIZE + Tile::WRITERS);
        for (int stage = 0; stage < Tile::STAGES; ++stage) {
            mbarrier_init(shared_address(&shared.q_full[stage]), 1);
            mbarrier_init(shared_address(&shared.dout_full[stage]), 1);
            mbarrier_init(shared_address(&shared.dout_empty[stage]), CONSUMER_WARPS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    wait_for_kernel_before();
    if (threadIdx.x < WARPGROUP_SIZE) {
        registers_decrease<Tile::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            backward_load<Tile>(shared, args);
        } else if (threadIdx.x < WARP_SIZE) {
            return;
        } else if (const int writer = (int)threadIdx.x / WARP_SIZE - 1; writer >= 0 && writer < Tile::WRITERS) {
            backward_write<Tile>(shared, args, writer);
        }
    } else {
        registers_increase<Tile::CONSUMER_REGISTERS>();
        backward_consume<Tile>(shared, args);
    }
#endif
}
