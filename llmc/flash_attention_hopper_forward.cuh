// flash_attention_hopper_forward.cuh: the attention forward for sm_90a: out = softmax(scale q k^T + mask) v, and lse.
// What calls it, with the tiles that ship: flash_attention_hopper_forward_launch.cuh.
// Shapes: q, out [B, Tq, H, D]; k, v [B, Tk, Hkv, D], each a HeadView; lse [B, H, Tq] float32, natural. D is 64 or 128.
// Storage bf16, products on wgmma with float32 accumulation, statistics float32.
//
// A block owns BLOCK_M query rows of a head and walks over key tiles from the last visible one down, so masked tiles
// come first and the running maximum settles early. The rows are divided from the last 64 up: where they do not come
// out even, it is the first tile, with the fewest keys, that has consumers without rows. One warpgroup only moves data,
// by TMA: a warp loads, a warp stores. Each of the others owns 64 rows, whose scores, softmax and output never leave
// its registers:
//   issue S' = q k'^T of the next key tile | issue out += P v of this one | softmax of S' while P v runs | S' becomes P
// so that one's softmax runs under the others' products. Blocks are persistent, below FORWARD_DRIFT_KEYS keys: each has
// a fixed list of tiles (TileWalk). Nothing drains between two tiles: k' above is then the first of the next tile, and
// the finished output leaves through shared memory while the other consumers' products run. Where there are few tiles,
// two consumers have the same 64 rows and every second key tile each, and add up what they found (KEY_TURNS).
//
// Bound: tensor cores at D = 128 (BLOCK_M x BLOCK_N x 2 D products against half as many clocks of exponentials and 75
// to 87 % as many of shared memory); tensor cores and exponentials alike at D = 64. From 32K up the chip's power limit
// lowers the clock, so work that is left out counts twice, and so do bytes: tiles of 192 rows, which read keys from L2
// less often than those of 128, are worth 4 to 10 %. 4 Tq Tk D H operations, half of them when causal.
// Reference: reference/attention.h. Variants: dev/cuda/flash_attention_forward.cu.
#pragma once
#include <type_traits>

#include "flash_attention_hopper_softmax.cuh"
#include "flash_attention_launch.cuh"
#include "ptx_hopper.cuh"

// ---- what a block works through ----------------------------------------------------------------
// The tiles of a block, without communication between blocks. Where there are as many blocks as tiles,
// each has one, in TileOrder. Persistent blocks: in each group of heads the tiles lie from longest to shortest and are
// dealt out in rounds of one a block, so that long and short ones add up; the next group starts where the last one
// ended. Of causal attention of 8 heads with 132 blocks, tiles of 192 rows, the most a block has above the mean is 8 %
// at 8K, 1.3 % at 16K, 0.5 % at 32K, 0.1 % at 98K.
struct TileWalk {
    int first_head = 0, round = 0, start = blockIdx.x;

    // A place in 0 .. n-1 for each start in 0 .. n-1, n blocks. Over two rounds, to and fro, or over three (of an odd
    // number) the places add up to the same for every start, give or take one.
    __device__ static int deal(int round, bool odd_rounds, int start, int n) {
        if (odd_rounds && round < 3) {
            const bool first_half = 2 * start < n;
            return round == 0   ? start
                   : round == 1 ? n - 1 - (first_half ? 2 * start : 2 * start - n + (n % 2 == 0))
                   : first_half ? start + n / 2
                                : start - (n - n / 2);
        }
        return (round + odd_rounds) % 2 == 0 ? start : n - 1 - start;
    }

    // The next tile of this block, if there is one.
    __device__ bool next(const TileOrder& order, TileOrder::Place* place) {
        const int num_blocks = gridDim.x;
        if (num_blocks == order.num_tiles * order.num_heads) {
            *place = order.place(start);
            return round++ == 0;
        }
        while (first_head < order.num_heads) {
            const int heads = min(order.heads_per_group, order.num_heads - first_head);
            const int num_places = order.num_tiles * heads;
            const int nearest_rounds = (num_places + num_blocks / 2) / num_blocks;
            while (round * num_blocks < num_places) {
                const bool odd_rounds = nearest_rounds >= 3 && nearest_rounds % 2 == 1;
                const int position = round * num_blocks + deal(round, odd_rounds, start, num_blocks);
                ++round;
                if (position < num_places) {
                    *place = {position / heads, first_head + position % heads};
                    return true;
                }
            }
            first_head += heads;
            round = 0;
            start = (start + num_blocks - num_places % num_blocks) % num_blocks;
        }
        return false;
    }
};

// ---- tiles -------------------------------------------------------------------------------------
constexpr int CONSUMER_ROWS = 64;  // query rows of a consumer warpgroup

// A tile of query rows and the key tiles it visits, [0, num_key_tiles). At least one is visited: where nobody sees
// anything, all of it is masked. 0: the end of the list.
struct ForwardWork {
    int b, h, first_row, num_key_tiles;  // first_row: negative where the first consumers have no rows
};

// Where the scores' products read the queries. REGISTERS: every warp loads its 16 rows once a tile, D / 4 registers a
// thread, and the products of a key tile read a fifth less of shared memory, which saves power: with two consumers at D
// = 128, whose threads have 32 registers left beside output, scores and P, 0.9 to 1.7 % (H200, T = 8192 to 98304).
enum class QueryOperand { SHARED, REGISTERS };

// What variants of dev/cuda replace stands below Shared.
template <int D_, int CONSUMERS_, int BLOCK_N_, int STAGES_, int BLOCKS_PER_SM_ = 1,
          QueryOperand QUERIES_ = QueryOperand::SHARED, int KEY_TURNS_ = 1>
struct HopperForwardTile {
    static constexpr int D = D_;
    static constexpr int CONSUMERS = CONSUMERS_;  // warpgroups that compute
    // More than one: all consumers, so many, have the same 64 query rows and take their key tiles in turn, without
    // waiting for one another; at the end the first adds up what they have found. A tile has that many times fewer
    // steps: for launches of so few tiles that the longest decides.
    static constexpr int KEY_TURNS = KEY_TURNS_;
    static constexpr int ROW_GROUPS = CONSUMERS / KEY_TURNS;  // of 64 query rows
    static constexpr int BLOCK_M = CONSUMER_ROWS * ROW_GROUPS;
    static constexpr int BLOCK_N = BLOCK_N_;
    static constexpr int STAGES = STAGES_;  // of k and of v
    static constexpr int BLOCKS_PER_SM = BLOCKS_PER_SM_;
    static constexpr QueryOperand QUERIES = QUERIES_;
    static constexpr int Q_SLOTS = 2;  // the tile that is finished and the one that has begun
    static constexpr int THREADS = WARPGROUP_SIZE * (1 + CONSUMERS);
    // At launch all threads have the same, an SM's 65536 over its threads, rounded down to a multiple of 8; the loader
    // gives up what the consumers then take. Were there less than they ask for, they would wait for ever.
    static constexpr int LAUNCH_REGISTERS = 65536 / (THREADS * BLOCKS_PER_SM) / 8 * 8;
    static constexpr int LOADER_REGISTERS = CONSUMERS == 2 && BLOCKS_PER_SM == 1 ? 40 : 32;
    static constexpr int CONSUMER_REGISTERS =
        std::min(232, ((1 + CONSUMERS) * LAUNCH_REGISTERS - LOADER_REGISTERS) / CONSUMERS / 8 * 8);
    static_assert(D % 64 == 0 && BLOCK_N % 16 == 0 && CONSUMERS >= 1 && CONSUMERS <= 4, "tile");
    static_assert(CONSUMER_REGISTERS >= LAUNCH_REGISTERS && LOADER_REGISTERS <= LAUNCH_REGISTERS, "registers");
    static_assert(KEY_TURNS == 1 || KEY_TURNS == CONSUMERS, "rows or keys are divided");
    static_assert(STAGES % KEY_TURNS == 0 && (KEY_TURNS == 1 || STAGES / KEY_TURNS * BLOCK_N >= 2 * CONSUMER_ROWS),
                  "a turn has stages of its own, in which its output fits at the end");

    struct Shared {
        alignas(1024) bf16 k[STAGES][BLOCK_N * D];
        alignas(1024) bf16 v[STAGES][BLOCK_N * D];
        alignas(1024) bf16 q[Q_SLOTS][ROW_GROUPS][64 * D];  // a consumer's rows; its output leaves through them
        uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES], q_full[Q_SLOTS], q_empty[Q_SLOTS];
        uint64_t parts_full;  // what the other turns have found
        // What q_full announces; one lane of a warp reads it and says on q_empty that it has.
        ForwardWork work[Q_SLOTS];
    };

    // Consumers issue products in turn. Four do better without (D = 64, B = 64, T = 1024: 3 %).
    static constexpr bool PING_PONG = (CONSUMERS == 2 || CONSUMERS == 3) && KEY_TURNS == 1;
    static constexpr References REFERENCES = References::WHERE_HEAVY;
    // BLOCKS_PER_SM an SM, unless the shape yields or has FORWARD_DRIFT_KEYS keys; otherwise one a tile.
    static constexpr bool PERSISTENT = KEY_TURNS == 1;
};

struct HopperForwardArguments {
    CUtensorMap q, k, v, out;  // boxes of CONSUMER_ROWS, BLOCK_N, BLOCK_N and CONSUMER_ROWS rows
    float* lse;
    int Tq, Tk, key_offset;  // query t sees keys below min(Tk, t + 1 + key_offset)
    int end_row;             // Tq up to whole consumers
    int H, heads_per_kv_head;
    float scale_log2, inverse_scale_log2;  // scale * log2(e), and its inverse
    TileOrder order;
};

// Named barriers; 0 is __syncthreads.
enum HopperForwardBarrier { TURN_BARRIER = 1, CONSUMER_BARRIER = 5, OUT_BARRIER = 9 };  // + which

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A consumer's first row for TMA: of one without rows, past the end, where zeros are read and nothing is written. (A
// coordinate before the start is an illegal instruction.)
__device__ inline int consumer_row(const ForwardWork& work, int consumer, const HopperForwardArguments& args) {
    const int row = work.first_row + CONSUMER_ROWS * consumer;
    return row >= 0 ? row : args.Tq;
}
template <class Tile>
__device__ inline ForwardWork forward_work(const TileOrder::Place& place, const HopperForwardArguments& args) {
    ForwardWork work;
    work.b = place.head / args.H;
    work.h = place.head % args.H;
    work.first_row = args.end_row - (place.tile + 1) * Tile::BLOCK_M;
    const int end = min(args.Tk, min(work.first_row + Tile::BLOCK_M, args.Tq) + args.key_offset);
    work.num_key_tiles = max(1, (end + Tile::BLOCK_N - 1) / Tile::BLOCK_N);
    return work;
}

// The work that a warp's first lane has.
__device__ __forceinline__ ForwardWork work_of_first_lane(const ForwardWork& work) {
    const auto of_first = [](int value) { return __shfl_sync(FULL_WARP, value, 0); };
    return {of_first(work.b), of_first(work.h), of_first(work.first_row), of_first(work.num_key_tiles)};
}

// ---- load --------------------------------------------------------------------------------------
// One thread. k runs a tile ahead of v, also from one work to the next.
template <class Tile>
struct ForwardLoader {
    using Shared = typename Tile::Shared;
    static constexpr uint32_t TILE_BYTES = Tile::BLOCK_N * Tile::D * sizeof(bf16);
    static constexpr uint32_t Q_BYTES = Tile::BLOCK_M * Tile::D * sizeof(bf16);

    Shared& shared;
    const HopperForwardArguments& args;
    uint32_t num_k = 0, num_v = 0, num_q = 0;  // loaded so far: fewer registers than a stage and a parity each

    __device__ ForwardLoader(Shared& shared, const HopperForwardArguments& args) : shared(shared), args(args) {}

    // Waits until the next of `count` buffers is empty. Returns which it is.
    template <int count>
    __device__ static int wait_empty(const uint64_t (&empty)[count], uint32_t& num_loaded) {
        const uint32_t buffer = num_loaded % count, lap = num_loaded / count;
        while (!mbarrier_try_wait(shared_address(&empty[buffer]), lap % 2 ^ 1)) {
            // no watchdog, for want of registers: a deadlock shows in the consumers' waits
        }
        ++num_loaded;
        return buffer;
    }
    // Announces the work, with its q.
    __device__ void load_q(const ForwardWork& work) {
        const int slot = wait_empty(shared.q_empty, num_q);
        shared.work[slot] = work;
        const uint32_t full = shared_address(&shared.q_full[slot]);
        mbarrier_arrive_expect(full, Q_BYTES);
#pragma unroll
        for (int group = 0; group < Tile::ROW_GROUPS; ++group) {
            tma_load(shared_address(shared.q[slot][group]), &args.q, consumer_row(work, group, args), work.h, work.b,
                     full, l2_policy_evict_first());
        }
    }
    __device__ void announce_end() {
        const int slot = wait_empty(shared.q_empty, num_q);
        shared.work[slot].num_key_tiles = 0;
        mbarrier_arrive(shared_address(&shared.q_full[slot]));
    }
    // Key tile n of a key/value head into a stage.
    __device__ void load_keys(const CUtensorMap& map, bf16* tile, const uint64_t& full_barrier, int b, int head,
                              int n) {
        const uint32_t full = shared_address(&full_barrier);
        mbarrier_arrive_expect(full, TILE_BYTES);
        tma_load(shared_address(tile), &map, n * Tile::BLOCK_N, head, b, full);
    }
    __device__ void load_k(int b, int head, int n) {
        const int stage = wait_empty(shared.k_empty, num_k);
        load_keys(args.k, shared.k[stage], shared.k_full[stage], b, head, n);
    }
    __device__ void load_v(int b, int head, int n) {
        const int stage = wait_empty(shared.v_empty, num_v);
        load_keys(args.v, shared.v[stage], shared.v_full[stage], b, head, n);
    }
    __device__ void run() {
        TileWalk walk;
        TileOrder::Place place;
        int b = 0, head = -1;  // of the work before; -1: there was none
        while (walk.next(args.order, &place)) {
            const ForwardWork work = forward_work<Tile>(place, args);
            const int next_head = work.h / args.heads_per_kv_head;
            load_k(work.b, next_head, work.num_key_tiles - 1);
            load_q(work);
            if (head >= 0) {
                load_v(b, head, 0);
            }
            b = work.b, head = next_head;
            for (int n = work.num_key_tiles - 1; n > 0; --n) {
                load_k(b, head, n - 1);
                load_v(b, head, n);
            }
        }
        announce_end();
        if (head >= 0) {
            load_v(b, head, 0);
        }
    }
};

// ---- score -------------------------------------------------------------------------------------
// What a thread holds of its tile's queries: fragments of A, or nothing.
template <int D, QueryOperand QUERIES>
struct Queries {};
template <int D>
struct Queries<D, QueryOperand::REGISTERS> {
    uint32_t fragments[D / 16][4];
};

// Issues scores = q k^T of 64 query rows.
template <int D, int BLOCK_N>
__device__ __forceinline__ void issue_scores(float (&scores)[BLOCK_N / 2], uint64_t q, uint64_t k) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        const uint64_t a = wgmma_advance(q, step / 4 * 64 * 128 + step % 4 * 32);
        const uint64_t b = wgmma_advance(k, step / 4 * BLOCK_N * 128 + step % 4 * 32);
        if (step == 0) {
            wgmma_zero<0, 0>(scores, a, b);
        } else {
            wgmma<0, 0>(scores, a, b);
        }
    }
    wgmma_commit();
}
template <int D, int BLOCK_N>
__device__ __forceinline__ void issue_scores(float (&scores)[BLOCK_N / 2], const uint32_t (&q)[D / 16][4], uint64_t k) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        const uint64_t b = wgmma_advance(k, step / 4 * BLOCK_N * 128 + step % 4 * 32);
        if (step == 0) {
            wgmma_zero<0>(scores, q[step], b);
        } else {
            wgmma<0>(scores, q[step], b);
        }
    }
    wgmma_commit();
}
// Issues out += p v.
template <int D, int BLOCK_N>
__device__ __forceinline__ void issue_out(float (&out)[D / 2], const uint32_t (&p)[BLOCK_N / 16][4], uint64_t v) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < BLOCK_N / 16; ++step) {
        wgmma<1>(out, p[step], wgmma_advance(v, step * 16 * 128));
    }
    wgmma_commit();
}
// Scores of keys that the row does not see become -infinity. first_limit: keys visible to the thread's first row, from
// this tile's first key and the thread's first column on; second_limit: the same of its second row, 8 further down.
template <int count>
__device__ __forceinline__ void mask_scores(float (&scores)[count], int first_limit, int second_limit) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const int column = i / 4 * 8 + i % 2;
        if (column >= (i / 2 % 2 == 0 ? first_limit : second_limit)) {
            scores[i] = -INFINITY;
        }
    }
}

// ---- softmax -----------------------------------------------------------------------------------
// The softmax itself: flash_attention_hopper_softmax.cuh.
//
// What `value` (never negative) is computed from is computed before what follows. ptxas moves arithmetic past waits for
// products, here the exponentials out from under P v; it does not move it past a branch, even one never taken.
__device__ __forceinline__ void complete_before_wait(float value) {
    while (__any_sync(FULL_WARP, value < 0.0f)) {
        asm volatile("" : "+f"(value));
    }
}

template <int count>
__device__ __forceinline__ void scale_rows(float (&out)[count], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
        out[i] *= factor[i / 2 % 2];
    }
}

// ---- store -------------------------------------------------------------------------------------
// Normalises a warpgroup's 64 rows of the output, writes their lse, and leaves the rows as a TMA tile at `staging`,
// which products have read. lse is that of the head, first_row the thread's first row, which need not be one of its Tq.
template <int D>
__device__ __forceinline__ void finish_rows(float (&out)[D / 2], const RowTotals& totals, float scale_log2,
                                            uint32_t staging, float* lse, int first_row, int Tq) {
    const int lane = threadIdx.x % WARP_SIZE;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum = totals.sum[half];
        const bool sees_nothing = sum == 0.0f;
        inverse[half] = sees_nothing ? 0.0f : __fdividef(1.0f, totals.divisor[half]);
        const int row = first_row + 8 * half;
        if (lane % 4 == 0 && row >= 0 && row < Tq) {
            lse[row] = sees_nothing ? -INFINITY : (totals.reference[half] * scale_log2 + __log2f(sum)) * LN_2;
        }
    }
    scale_rows(out, inverse);
#pragma unroll
    for (int group = 0; group < D / 16; ++group) {
        uint32_t fragment[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            fragment[i] = pack_bf16x2(out[8 * group + 2 * i], out[8 * group + 2 * i + 1]);
        }
        stmatrix_x4(fragment_address(staging, group), fragment);
    }
    fence_async_shared();
}

// One warp: stores every tile that the consumers have left in their rows of q, then gives the slot back.
template <class Tile>
__device__ inline void store_tiles(typename Tile::Shared& shared, const HopperForwardArguments& args) {
    PipelineState<Tile::Q_SLOTS> q_state;
    while (true) {
        const int slot = q_state.stage;
        mbarrier_wait(shared_address(&shared.q_full[slot]), q_state.parity);
        ForwardWork work = {};
        if (threadIdx.x % WARP_SIZE == 0) {
            work = shared.work[slot];
        }
        work = work_of_first_lane(work);
        if (work.num_key_tiles == 0) {
            return;
        }
        for (int group = 0; group < Tile::ROW_GROUPS; ++group) {
            named_barrier_sync(OUT_BARRIER + group, WARPGROUP_SIZE + WARP_SIZE);
            if (threadIdx.x % WARP_SIZE == 0) {
                tma_store(&args.out, shared_address(shared.q[slot][group]), consumer_row(work, group, args), work.h,
                          work.b);
                bulk_commit();
            }
        }
        if (threadIdx.x % WARP_SIZE == 0) {
            bulk_wait_read<0>();
            mbarrier_arrive(shared_address(&shared.q_empty[slot]));
        }
        __syncwarp();
        q_state.advance();
    }
}

// ---- compute -----------------------------------------------------------------------------------
// A consumer warpgroup.
template <class Tile>
struct ForwardConsumer {
    using Shared = typename Tile::Shared;
    using TileQueries = Queries<Tile::D, Tile::QUERIES>;
    static constexpr int D = Tile::D, BLOCK_N = Tile::BLOCK_N;
    static constexpr int KEY_TURNS = Tile::KEY_TURNS, ROW_GROUPS = Tile::ROW_GROUPS;

    Shared& shared;
    const HopperForwardArguments& args;
    const int consumer, row_group, turn;  // which 64 rows are its own, and which of every KEY_TURNS key tiles
    const int lane, thread_row;           // thread_row: the thread's first row within BLOCK_M
    PipelineState<Tile::STAGES> k_state, v_state;
    PipelineState<Tile::Q_SLOTS> q_state;

    __device__ ForwardConsumer(Shared& shared, const HopperForwardArguments& args, int consumer)
        : shared(shared),
          args(args),
          consumer(consumer),
          row_group(consumer % ROW_GROUPS),
          turn(consumer / ROW_GROUPS),
          lane(threadIdx.x % WARP_SIZE),
          thread_row(CONSUMER_ROWS * row_group + threadIdx.x / WARP_SIZE % 4 * 16 + lane / 4) {
        k_state.stage = v_state.stage = turn;
    }

    __device__ __forceinline__ void wait_turn() const {
        if constexpr (Tile::PING_PONG) {
            named_barrier_sync(TURN_BARRIER + consumer, 2 * WARPGROUP_SIZE);
        }
    }
    __device__ __forceinline__ void pass_turn() const {
        if constexpr (Tile::PING_PONG) {
            named_barrier_arrive(TURN_BARRIER + (consumer + 1) % Tile::CONSUMERS, 2 * WARPGROUP_SIZE);
        }
    }
    // Tells the loader that this warp is done with a stage of k or v, and goes on to this consumer's next one.
    __device__ __forceinline__ void release_stage(const uint64_t (&empty)[Tile::STAGES],
                                                  PipelineState<Tile::STAGES>& state) {
        if (lane == 0) {
            mbarrier_arrive(shared_address(&empty[state.stage]));
        }
#pragma unroll
        for (int i = 0; i < KEY_TURNS; ++i) {
            state.advance();
        }
    }
    __device__ __forceinline__ void wait_k() const {
        mbarrier_wait(shared_address(&shared.k_full[k_state.stage]), k_state.parity);
    }
    // Takes the tile's queries out of their slot, if it is from registers that products read them. While no product
    // runs, which might still read those of the tile before.
    __device__ __forceinline__ void take_queries(TileQueries& queries) const {
        if constexpr (Tile::QUERIES == QueryOperand::REGISTERS) {
            const uint32_t tile = shared_address(shared.q[q_state.stage][row_group]);
#pragma unroll
            for (int step = 0; step < D / 16; ++step) {
                ldmatrix_x4(queries.fragments[step], fragment_address(tile, step));
            }
        }
    }
    __device__ __forceinline__ void issue_scores_of(float (&scores)[BLOCK_N / 2], const TileQueries& queries) const {
        const auto& k = shared.k[k_state.stage];
        if constexpr (Tile::QUERIES == QueryOperand::REGISTERS) {
            issue_scores<D, BLOCK_N>(scores, queries.fragments, wgmma_descriptor_k_major(shared_address(k)));
        } else {
            issue_scores<D, BLOCK_N>(scores,
                                     wgmma_descriptor_k_major(shared_address(shared.q[q_state.stage][row_group])),
                                     wgmma_descriptor_k_major(shared_address(k)));
        }
    }
    __device__ __forceinline__ void issue_out_of(float (&out)[D / 2], const uint32_t (&p)[BLOCK_N / 16][4]) const {
        mbarrier_wait(shared_address(&shared.v_full[v_state.stage]), v_state.parity);
        issue_out<D, BLOCK_N>(out, p,
                              wgmma_descriptor_mn_major(shared_address(shared.v[v_state.stage]), BLOCK_N * 128));
    }
    __device__ __forceinline__ void mask(float (&scores)[BLOCK_N / 2], const ForwardWork& work, int n) const {
        const int row_limit = work.first_row + thread_row + 1 + args.key_offset;
        const int first_column = n * BLOCK_N + lane % 4 * 2;
        mask_scores(scores, min(args.Tk, row_limit) - first_column, min(args.Tk, row_limit + 8) - first_column);
    }
    // The output leaves through the slot of the q it belongs to, q_state's being the next one's. Queries in shared
    // memory: after all of the consumer's products have read them; from registers, a warp overwrites its own rows
    // alone.
    __device__ __forceinline__ void finish(float (&out)[D / 2], const RowTotals& totals,
                                           const ForwardWork& work) const {
        float* lse = args.lse + ((int64_t)work.b * args.H + work.h) * args.Tq;
        const int slot = q_state.stage ^ 1;
        finish_rows<D>(out, totals, args.scale_log2, shared_address(shared.q[slot][row_group]), lse,
                       work.first_row + thread_row, args.Tq);
        named_barrier_arrive(OUT_BARRIER + row_group, WARPGROUP_SIZE + WARP_SIZE);
    }

    // Scores and softmax of key tile n of `work` under the product of the key tile before it, whose P is p. NEW_TILE:
    // the key tile before it was the last of `finished`, which rows belong to on entry. has_negative: of the warp's
    // references.
    template <bool MASKED, bool NEW_TILE>
    __device__ __forceinline__ void step(float (&out)[D / 2], uint32_t (&p)[BLOCK_N / 16][4], SoftmaxRows& rows,
                                         const TileQueries& queries, const ForwardWork& work, int n,
                                         const KeyProgress& progress, bool has_negative, const ForwardWork& finished) {
        float scores[BLOCK_N / 2], factor[2] = {1.0f, 1.0f};
        wait_k();
        wait_turn();
        issue_scores_of(scores, queries);
        issue_out_of(out, p);
        pass_turn();
        wgmma_wait<1>();
        wgmma_pin(scores);
        release_stage(shared.k_empty, k_state);
        if (MASKED) {
            mask(scores, work, n);
        }
        SoftmaxRows new_rows;
        SoftmaxRows& score_rows = NEW_TILE ? new_rows : rows;
        auto softmax = [&](auto references) {
            return softmax_tile<MASKED, decltype(references)::value>(scores, score_rows, factor, args.scale_log2,
                                                                     args.inverse_scale_log2, progress);
        };
        const bool moves = MASKED || has_negative ? softmax(std::integral_constant<References, References::ANY>())
                                                  : softmax(std::integral_constant<References, Tile::REFERENCES>());
        complete_before_wait(score_rows.sum[0] + score_rows.sum[1]);
        wgmma_wait<0>();
        wgmma_pin(out);
        release_stage(shared.v_empty, v_state);
        round_to_operand(p, scores);
        if (NEW_TILE) {
            if (!Tile::PING_PONG && Tile::QUERIES == QueryOperand::SHARED) {
                // All warps' products have read q; otherwise the wait for the turn has seen to it.
                named_barrier_sync(CONSUMER_BARRIER + consumer, WARPGROUP_SIZE);
            }
            finish(out, row_totals(rows), finished);
            rows = new_rows;
#pragma unroll
            for (int i = 0; i < D / 2; ++i) {
                out[i] = 0.0f;
            }
        } else if (moves) {
            scale_rows(out, factor);
        }
    }
    // How many key tiles of `work`, from the first on, any row of this consumer sees, but at least one: the tile's last
    // ones may lie beyond the diagonal of its first rows.
    __device__ __forceinline__ int own_key_tiles(const ForwardWork& work) const {
        const int last_key = work.first_row + CONSUMER_ROWS * (consumer + 1) - 1 + args.key_offset;
        return max(1, min(work.num_key_tiles, last_key / BLOCK_N + 1));
    }
    // Of those from the first on, how many all of this consumer's rows see whole.
    __device__ __forceinline__ int own_full_tiles(const ForwardWork& work) const {
        const int first_row = work.first_row + CONSUMER_ROWS * row_group;
        return max(0, min(args.Tk, first_row + 1 + args.key_offset)) / BLOCK_N;
    }
    // Gives back what the loader has brought of k or v of key tiles that only other consumers see. A warp's lanes wait
    // for each on their own, so all have to have seen it before one gives it back.
    __device__ __forceinline__ void skip_k(int num_tiles) {
        for (int i = 0; i < num_tiles; ++i) {
            wait_k();
            wait_turn();
            pass_turn();
            __syncwarp();
            release_stage(shared.k_empty, k_state);
        }
    }
    __device__ __forceinline__ void skip_v(int num_tiles) {
        for (int i = 0; i < num_tiles; ++i) {
            mbarrier_wait(shared_address(&shared.v_full[v_state.stage]), v_state.parity);
            __syncwarp();
            release_stage(shared.v_empty, v_state);
        }
    }
    __device__ __forceinline__ ForwardWork next_work() const {
        mbarrier_wait(shared_address(&shared.q_full[q_state.stage]), q_state.parity);
        ForwardWork work = {};
        if (lane == 0) {
            work = shared.work[q_state.stage];
            mbarrier_arrive(shared_address(&shared.q_empty[q_state.stage]));
        }
        return work_of_first_lane(work);
    }

    // Scores and softmax of the first key tile of a tile that nothing came before. Leaves its P.
    __device__ __forceinline__ void first_step(uint32_t (&p)[BLOCK_N / 16][4], SoftmaxRows& rows,
                                               const TileQueries& queries, const ForwardWork& work, int n) {
        float scores[BLOCK_N / 2], factor[2];
        wait_k();
        issue_scores_of(scores, queries);
        wgmma_wait<0>();
        wgmma_pin(scores);
        release_stage(shared.k_empty, k_state);
        mask(scores, work, n);
        softmax_tile<true, References::ANY>(scores, rows, factor, args.scale_log2, args.inverse_scale_log2, {});
        round_to_operand(p, scores);
    }

    // All steps of `work`, of num_tiles key tiles, but the first, whose P is p: key tiles n, n - KEY_TURNS, ...
    __device__ __forceinline__ void walk_keys(float (&out)[D / 2], uint32_t (&p)[BLOCK_N / 16][4], SoftmaxRows& rows,
                                              const TileQueries& queries, const ForwardWork& work, int n,
                                              int num_tiles) {
        if (num_tiles == 1) {
            find_rounding(p, rows);
        }
        const int num_full_tiles = own_full_tiles(work);
        auto progress = [&] { return KeyProgress{(num_tiles - 1 - n) / KEY_TURNS + 1, num_tiles}; };
        for (; n >= num_full_tiles; n -= KEY_TURNS) {
            step<true, false>(out, p, rows, queries, work, n, progress(), true, work);
        }
        if (n < 0) {
            return;
        }
        const bool has_negative = __any_sync(FULL_WARP, rows.reference[0] < 0.0f || rows.reference[1] < 0.0f);
        if constexpr (Tile::REFERENCES == References::WHERE_HEAVY) {
            find_limits<BLOCK_N>(rows, args.inverse_scale_log2, progress());
        }
        for (; n >= 0; n -= KEY_TURNS) {
            step<false, false>(out, p, rows, queries, work, n, progress(), has_negative, work);
        }
    }

    // Tiles whose rows are divided, one after another.
    __device__ __forceinline__ void run_rows() {
        ForwardWork work = next_work();
        if (work.num_key_tiles == 0) {
            return;
        }
        int own_tiles = own_key_tiles(work);
        float out[D / 2] = {};
        uint32_t p[BLOCK_N / 16][4];
        SoftmaxRows rows;
        TileQueries queries;
        take_queries(queries);
        skip_k(work.num_key_tiles - own_tiles);
        skip_v(work.num_key_tiles - own_tiles);
        first_step(p, rows, queries, work, own_tiles - 1);
        while (true) {
            walk_keys(out, p, rows, queries, work, own_tiles - 2, own_tiles);
            q_state.advance();
            const ForwardWork next = Tile::PERSISTENT ? next_work() : ForwardWork{};
            if (next.num_key_tiles == 0) {
                break;
            }
            take_queries(queries);
            own_tiles = own_key_tiles(next);
            skip_k(next.num_key_tiles - own_tiles);
            step<true, true>(out, p, rows, queries, next, own_tiles - 1, {}, true, work);
            skip_v(next.num_key_tiles - own_tiles);
            work = next;
        }
        issue_out_of(out, p);
        wgmma_wait<0>();
        wgmma_pin(out);
        if (Tile::QUERIES == QueryOperand::SHARED) {
            named_barrier_sync(CONSUMER_BARRIER + consumer, WARPGROUP_SIZE);  // all warps' products have read q
        }
        finish(out, row_totals(rows), work);
    }

    // What a thread of the consumer of turn `from` hands to the first one's: the i-th float of its output where that
    // turn's keys were, its totals where its first values were.
    __device__ __forceinline__ float& part_of_out(int from, int i) const {
        constexpr int STAGE_FLOATS = BLOCK_N * D / 2 / WARPGROUP_SIZE;  // of a thread
        return reinterpret_cast<float*>(
            shared.k[from + KEY_TURNS * (i / STAGE_FLOATS)])[i % STAGE_FLOATS * WARPGROUP_SIZE +
                                                             threadIdx.x % WARPGROUP_SIZE];
    }
    __device__ __forceinline__ RowTotals& part_of_totals(int from) const {
        return reinterpret_cast<RowTotals*>(shared.v[from])[threadIdx.x % WARPGROUP_SIZE];
    }
    // out and totals of keys that the consumer of another turn has seen, added.
    __device__ __forceinline__ void add_part(float (&out)[D / 2], RowTotals& totals, int from) const {
        const RowTotals part = part_of_totals(from);
        float own_factor[2], factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float m = fmaxf(totals.reference[half], part.reference[half]);
            const auto factor_of = [&](float r) {
                return m == -INFINITY ? 1.0f : exp2_approx((r - m) * args.scale_log2);
            };
            own_factor[half] = factor_of(totals.reference[half]), factor[half] = factor_of(part.reference[half]);
            totals.reference[half] = m;
            totals.sum[half] = totals.sum[half] * own_factor[half] + part.sum[half] * factor[half];
            totals.divisor[half] = totals.divisor[half] * own_factor[half] + part.divisor[half] * factor[half];
        }
#pragma unroll
        for (int i = 0; i < D / 2; ++i) {
            out[i] = out[i] * own_factor[i / 2 % 2] + part_of_out(from, i) * factor[i / 2 % 2];
        }
    }
    // The block's tile, whose key tiles consumers take in turn. There may be fewer than consumers.
    __device__ __forceinline__ void run_keys() {
        const ForwardWork work = next_work();
        float out[D / 2] = {};
        SoftmaxRows rows;
        TileQueries queries;
        take_queries(queries);
        int n = work.num_key_tiles - 1 - turn;
        if (n >= 0) {
            uint32_t p[BLOCK_N / 16][4];
            first_step(p, rows, queries, work, n);
            walk_keys(out, p, rows, queries, work, n - KEY_TURNS, work.num_key_tiles);
            issue_out_of(out, p);
            wgmma_wait<0>();
            wgmma_pin(out);
        }
        RowTotals totals = row_totals(rows);
        if (turn > 0) {
            named_barrier_sync(CONSUMER_BARRIER + turn, WARPGROUP_SIZE);  // all warps' products have read its stages
#pragma unroll
            for (int i = 0; i < D / 2; ++i) {
                part_of_out(turn, i) = out[i];
            }
            part_of_totals(turn) = totals;
            // Each thread, for what it wrote: racecheck follows that.
            mbarrier_arrive(shared_address(&shared.parts_full));
            return;
        }
        // The other turns' products have read q by then, too, but this one's warps wait for one another.
        mbarrier_wait(shared_address(&shared.parts_full), 0);
        named_barrier_sync(CONSUMER_BARRIER + turn, WARPGROUP_SIZE);
#pragma unroll
        for (int from = 1; from < KEY_TURNS; ++from) {
            add_part(out, totals, from);
        }
        q_state.advance();
        finish(out, totals, work);
    }

    __device__ __forceinline__ void run() {
        if constexpr (KEY_TURNS > 1) {
            run_keys();
        } else {
            run_rows();
        }
    }
};
#endif  // sm_90a

// ---- kernel ------------------------------------------------------------------------------------
// Launch: THREADS threads; BLOCKS_PER_SM blocks an SM, or one a tile (TileWalk; always where keys are taken in turn).
template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS_PER_SM)
    flash_attention_hopper_forward_kernel(const __grid_constant__ HopperForwardArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using Shared = typename Tile::Shared;
    constexpr int NUM_CONSUMER_WARPS = 4 * Tile::CONSUMERS;
    constexpr int NUM_STAGE_WARPS = 4 * Tile::ROW_GROUPS;  // that read a stage of k or v
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const int warpgroup = __shfl_sync(FULL_WARP, threadIdx.x / WARPGROUP_SIZE, 0);

    if (threadIdx.x == 0) {
        if (shared_address(&shared) % 1024 != 0) {
            __trap();  // the swizzle is a function of the address
        }
        prefetch_tensor_map(&args.q);
        prefetch_tensor_map(&args.k);
        prefetch_tensor_map(&args.v);
        prefetch_tensor_map(&args.out);
#pragma unroll
        for (int i = 0; i < Tile::STAGES; ++i) {
            mbarrier_init(shared_address(&shared.k_full[i]), 1);
            mbarrier_init(shared_address(&shared.v_full[i]), 1);
            mbarrier_init(shared_address(&shared.k_empty[i]), NUM_STAGE_WARPS);
            mbarrier_init(shared_address(&shared.v_empty[i]), NUM_STAGE_WARPS);
        }
#pragma unroll
        for (int i = 0; i < Tile::Q_SLOTS; ++i) {
            mbarrier_init(shared_address(&shared.q_full[i]), 1);
            mbarrier_init(shared_address(&shared.q_empty[i]), NUM_CONSUMER_WARPS + 1);  // and the warp that stores
        }
        if (Tile::KEY_TURNS > 1) {
            mbarrier_init(shared_address(&shared.parts_full), (Tile::KEY_TURNS - 1) * WARPGROUP_SIZE);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == 0) {
        registers_decrease<Tile::LOADER_REGISTERS>();
        if (threadIdx.x == 0) {
            ForwardLoader<Tile>(shared, args).run();
        } else if (threadIdx.x / WARP_SIZE == 1) {
            store_tiles<Tile>(shared, args);
        }
    } else {
        registers_increase<Tile::CONSUMER_REGISTERS>();
        ForwardConsumer<Tile> consumer(shared, args, Tile::CONSUMERS == 1 ? 0 : warpgroup - 1);
        if (warpgroup == Tile::CONSUMERS) {
            consumer.pass_turn();  // the first consumer begins
        }
        consumer.run();
    }
#endif
}
