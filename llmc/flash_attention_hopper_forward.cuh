// flash_attention_hopper_forward.cuh: the attention forward for sm_90a: out = softmax(scale q k^T + mask) v, and lse.
// Shapes: q, out [B, Tq, H, D]; k, v [B, Tk, Hkv, D], each a HeadView; lse [B, H, Tq] float32, natural. D is 64 or 128.
// Storage bf16, products on wgmma with float32 accumulation, statistics float32.
//
// A block owns BLOCK_M query rows of a head and walks over key tiles from the last visible one down, so masked tiles
// come first and the running maximum settles early. The rows are divided from the last 64 up: where they do not come
// out even, it is the first tile, with the fewest keys, that has consumers without rows. One warpgroup only moves data,
// by TMA: a warp loads, a warp stores. Each of the others owns 64 rows, whose scores, softmax and output never leave
// its registers:
//   issue S' = q k'^T of the next key tile | issue out += P v of this one | softmax of S' while P v runs | S' becomes P
// and the consumers take turns in issuing, so one's softmax runs under another's products. Blocks are persistent, below
// FORWARD_DRIFT_KEYS keys: each has a fixed list of tiles (TileWalk). Nothing drains between two tiles: k' above is
// then the first of the next tile, and the finished output leaves through shared memory while the other consumer's
// products run.
//
// Bound: tensor cores at D = 128 (BLOCK_M x BLOCK_N x 2 D products against half as many clocks of exponentials and 75 %
// as many of shared memory); tensor cores and exponentials alike at D = 64. From 32K up the chip's power limit lowers
// the clock, so work that is left out counts twice. 4 Tq Tk D H operations, half of them when causal.
// Reference: reference/attention.h. Variants: dev/cuda/flash_attention_forward.cu.
#pragma once
#include <climits>

#include "flash_attention_launch.cuh"
#include "gpu_properties.cuh"
#include "ptx_hopper.cuh"

// ---- what a block works through ----------------------------------------------------------------
// The tiles of a block, without communication between blocks. Where there are as many blocks as tiles,
// each has one, in TileOrder. Persistent blocks: in each group of heads the tiles lie from longest to shortest and are
// dealt out in rounds of one a block, so that long and short ones add up; the next group starts where the last one
// ended. Of causal attention with 132 blocks, the most a block has above the mean is 0.1 % from 64K up, 1.2 % at 18K.
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

// A tile of query rows and the key tiles it visits, [0, num_key_tiles), of which those below num_full_tiles are seen
// whole by every row. At least one is visited: where nobody sees anything, all of it is masked. 0: the end of the list.
struct ForwardWork {
    int b, h, first_row, num_key_tiles, num_full_tiles;  // first_row: negative where the first consumers have no rows
};

// Where the scores' products read the queries. REGISTERS: every warp loads its 16 rows once a tile, D / 4 registers a
// thread, and the products of a key tile read a fifth less of shared memory, which saves power: at D = 128 0.9 to 1.7 %
// (H200, T = 8192 to 98304). A thread has 32 registers left there beside output, scores and P. With 160 keys ptxas
// spills and lets no two products overlap (C7512); so it does at D = 64 with three consumers, whose threads have 160.
enum class QueryOperand { SHARED, REGISTERS };

// What variants of dev/cuda replace stands below Shared. Chosen on an H100, TFLOP/s at 8K / 32K / 128K: D = 128 705 /
// 767 / 713, D = 64 495 / 610 / 568 (with rows still divided from the first one down). Tried beside: 160 keys at D =
// 128 (689 / 703 / 713); two consumers at D = 64 (415 / 488 / 500), two stages there (422 / 567 / 578), a quarter of
// the exponentials there by polynomials on the arithmetic pipes (460 / 559 / 516); key tiles multicast to a cluster of
// two blocks at D = 128 (423 / 469 / 456, probably because both blocks wait for the slowest of four consumers).
//
// With few and short sequences the launch takes as long as its longest work: one consumer's steps are short, and
// several blocks an SM run under one another's. They read k and v once for 64 rows: from L2, more than it gives once
// all SMs are full. 104 registers, as with four consumers an SM, are too few for 64 keys.
template <int D_, int CONSUMERS_, int BLOCK_N_, int STAGES_, int BLOCKS_PER_SM_ = 1,
          QueryOperand QUERIES_ = QueryOperand::SHARED>
struct HopperForwardTile {
    static constexpr int D = D_;
    static constexpr int CONSUMERS = CONSUMERS_;  // warpgroups that compute, of 64 query rows each
    static constexpr int BLOCK_M = CONSUMER_ROWS * CONSUMERS;
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
    static_assert(D % 64 == 0 && BLOCK_N % 16 == 0 && CONSUMERS >= 1 && CONSUMERS <= 3, "tile");
    static_assert(CONSUMER_REGISTERS >= LAUNCH_REGISTERS && LOADER_REGISTERS <= LAUNCH_REGISTERS, "registers");

    struct Shared {
        alignas(1024) bf16 k[STAGES][BLOCK_N * D];
        alignas(1024) bf16 v[STAGES][BLOCK_N * D];
        alignas(1024) bf16 q[Q_SLOTS][CONSUMERS][64 * D];  // a consumer's rows; its output leaves through them
        uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES], q_full[Q_SLOTS], q_empty[Q_SLOTS];
        ForwardWork
            work[Q_SLOTS];  // what q_full announces; one lane of a warp reads it and says on q_empty that it has
    };

    static constexpr bool PING_PONG = CONSUMERS > 1;  // consumers issue products in turn
    static constexpr bool LAZY = true;  // rescale only when a row's maximum moves by more than a threshold
    // BLOCKS_PER_SM an SM, unless the shape yields or has FORWARD_DRIFT_KEYS keys; otherwise one a tile.
    static constexpr bool PERSISTENT = true;
};

struct HopperForwardArguments {
    CUtensorMap q, k, v, out;  // boxes of CONSUMER_ROWS, BLOCK_N, BLOCK_N and CONSUMER_ROWS rows
    float* lse;
    int Tq, Tk, key_offset;  // query t sees keys below min(Tk, t + 1 + key_offset)
    int end_row;             // Tq up to whole consumers
    int H, heads_per_kv_head;
    float scale_log2;         // scale * log2(e)
    float rescale_threshold;  // RESCALE_THRESHOLD_LOG2 in units of q.k
    TileOrder order;
};

// Named barriers; 0 is __syncthreads.
enum HopperForwardBarrier { TURN_BARRIER = 1, CONSUMER_BARRIER = 4, OUT_BARRIER = 7 };  // + consumer

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
    work.num_full_tiles = max(0, min(args.Tk, work.first_row + 1 + args.key_offset)) / Tile::BLOCK_N;
    return work;
}

// The work that a warp's first lane has.
__device__ __forceinline__ ForwardWork work_of_first_lane(const ForwardWork& work) {
    const auto of_first = [](int value) { return __shfl_sync(FULL_WARP, value, 0); };
    return {of_first(work.b), of_first(work.h), of_first(work.first_row), of_first(work.num_key_tiles),
            of_first(work.num_full_tiles)};
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
        for (int consumer = 0; consumer < Tile::CONSUMERS; ++consumer) {
            tma_load(shared_address(shared.q[slot][consumer]), &args.q, consumer_row(work, consumer, args), work.h,
                     work.b, full, l2_policy_evict_first());
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
// Of a thread's two rows, 8 apart: the reference (of q.k; the same in the four threads of a row), this thread's part of
// the sum of 2^(scale_log2 (q.k - reference)), the bits of the largest score the reference serves for, and of this
// thread's largest score behind the first key tile, which are right where that is not negative.
struct SoftmaxRows {
    float reference[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.0f, 0.0f};
    int limit[2] = {INT_MIN, INT_MIN};
    int top[2] = {INT_MIN, INT_MIN};
};

// Moves the references of rows whose scores pass their limit to the scores' maxima, and makes `factor` what sums of P
// so far, the output among them, are to be multiplied by. LAZY: a reference somewhat below zero becomes one from
// -threshold on, so that the limit is positive, higher by a whole number of powers of two, so that P of the largest
// score is one.
template <bool LAZY, int count>
__device__ __forceinline__ void move_references(const float (&scores)[count], SoftmaxRows& rows, float (&factor)[2],
                                                float scale_log2, float threshold) {
    float maximum[2] = {scores[0], scores[2]};
#pragma unroll
    for (int i = 0; i < count; ++i) {
        maximum[i / 2 % 2] = fmaxf(maximum[i / 2 % 2], scores[i]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float m = maximum[half];
        m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, 1));
        m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, 2));
        if (LAZY) {
            const bool stays = rows.limit[half] != INT_MIN && m < __int_as_float(rows.limit[half]);
            m = stays ? rows.reference[half] : fmaxf(m, rows.reference[half]);
            const float steps_below = (-threshold - m) * scale_log2;
            if (steps_below > 0.0f && steps_below < 64.0f) {
                m += ceilf(steps_below) / scale_log2;
            }
            rows.limit[half] = m >= -threshold ? __float_as_int(m + threshold) : INT_MIN;
        } else {
            m = fmaxf(m, rows.reference[half]);
        }
        // -infinity - -infinity is not a number; while a row has seen no key there is nothing to multiply.
        factor[half] = m == -INFINITY ? 1.0f : exp2_approx((rows.reference[half] - m) * scale_log2);
        rows.reference[half] = m;
        rows.sum[half] *= factor[half];
    }
}

// Whether a score of this thread passes its row's limit. As integers, floats are in order from zero up, and negative
// ones are below all of those; limits are positive or, where the reference has to move with every tile, INT_MIN. Three
// integers have a maximum in one instruction, three floats do not.
template <int count>
__device__ __forceinline__ bool passes_limit(const float (&scores)[count], SoftmaxRows& rows) {
    int top[2] = {INT_MIN, INT_MIN};
#pragma unroll
    for (int i = 0; i < count; i += 4) {
        top[0] = __vimax3_s32(top[0], __float_as_int(scores[i]), __float_as_int(scores[i + 1]));
        top[1] = __vimax3_s32(top[1], __float_as_int(scores[i + 2]), __float_as_int(scores[i + 3]));
    }
    rows.top[0] = max(rows.top[0], top[0]), rows.top[1] = max(rows.top[1], top[1]);
    return top[0] >= rows.limit[0] || top[1] >= rows.limit[1];
}

// scores become P = 2^(scale_log2 (score - reference)), added to the sums. Returns whether references moved, for some
// row of the warp. MASKED: rows may have seen no key at all. FIRST: nothing came before. LAZY: references move only
// when a score passes its limit; P is at most 2^(scale_log2 threshold).
template <bool MASKED, bool FIRST, bool LAZY, int count>
__device__ __forceinline__ bool softmax_tile(float (&scores)[count], SoftmaxRows& rows, float (&factor)[2],
                                             float scale_log2, float threshold) {
    const bool moves = FIRST || !LAZY || __any_sync(FULL_WARP, passes_limit(scores, rows));
    if (moves) {
        move_references<LAZY>(scores, rows, factor, scale_log2, threshold);
    }
    float shift[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        // A row that has seen no key yet has only scores of -infinity: any finite shift gives P = 0.
        shift[half] = MASKED && rows.reference[half] == -INFINITY ? 0.0f : rows.reference[half] * scale_log2;
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
        scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -shift[i / 2 % 2]));
        sum[i / 2 % 2] += scores[i];
    }
    rows.sum[0] += sum[0];
    rows.sum[1] += sum[1];
    return moves;
}

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
// By how much P of a row's largest score changed as it was rounded to bf16 for its product with v: by nothing where the
// reference is that score, or a whole number of powers of two from it. Since that score came the reference has not
// moved. A whole warp calls it, rows that see no key included.
__device__ __forceinline__ float rounding_of_largest(const SoftmaxRows& rows, int half, float scale_log2) {
    int top = rows.top[half];
    top = max(top, __shfl_xor_sync(FULL_WARP, top, 1));
    top = max(top, __shfl_xor_sync(FULL_WARP, top, 2));
    const float score = __int_as_float(top), reference = rows.reference[half];
    if (top < 0 || score <= reference) {
        return 0.0f;
    }
    const float p = exp2_approx(fmaf(score, scale_log2, -(reference * scale_log2)));
    return __bfloat162float(__float2bfloat16(p)) - p;
}
// Normalises a warpgroup's 64 rows of the output, writes their lse, and leaves the rows as a TMA tile at `staging`,
// which the warpgroup's own products have read. lse is that of the head, first_row the thread's first row, which need
// not be one of its Tq. The output is divided by a sum with the largest P as it was rounded: with references that lag
// behind, that rounding would otherwise be most of a peaked row's error.
template <int D>
__device__ __forceinline__ void finish_rows(float (&out)[D / 2], SoftmaxRows& rows, float scale_log2, uint32_t staging,
                                            float* lse, int first_row, int Tq) {
    const int lane = threadIdx.x % WARP_SIZE;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = rows.sum[half];
        sum += __shfl_xor_sync(FULL_WARP, sum, 1);
        sum += __shfl_xor_sync(FULL_WARP, sum, 2);
        const float rounding = rounding_of_largest(rows, half, scale_log2);
        const bool sees_nothing = sum == 0.0f;
        inverse[half] = sees_nothing ? 0.0f : __fdividef(1.0f, sum + rounding);
        const int row = first_row + 8 * half;
        if (lane % 4 == 0 && row >= 0 && row < Tq) {
            lse[row] = sees_nothing ? -INFINITY : (rows.reference[half] * scale_log2 + __log2f(sum)) * LN_2;
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
        for (int consumer = 0; consumer < Tile::CONSUMERS; ++consumer) {
            named_barrier_sync(OUT_BARRIER + consumer, WARPGROUP_SIZE + WARP_SIZE);
            if (threadIdx.x % WARP_SIZE == 0) {
                tma_store(&args.out, shared_address(shared.q[slot][consumer]), consumer_row(work, consumer, args),
                          work.h, work.b);
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

    Shared& shared;
    const HopperForwardArguments& args;
    const int consumer, lane, thread_row;  // thread_row: the thread's first row within BLOCK_M
    PipelineState<Tile::STAGES> k_state, v_state;
    PipelineState<Tile::Q_SLOTS> q_state;

    __device__ ForwardConsumer(Shared& shared, const HopperForwardArguments& args, int consumer)
        : shared(shared),
          args(args),
          consumer(consumer),
          lane(threadIdx.x % WARP_SIZE),
          thread_row(CONSUMER_ROWS * consumer + threadIdx.x / WARP_SIZE % 4 * 16 + lane / 4) {}

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
    // Tells the loader that this warp is done with a stage.
    __device__ __forceinline__ void release(const uint64_t& empty) const {
        if (lane == 0) {
            mbarrier_arrive(shared_address(&empty));
        }
    }
    __device__ __forceinline__ void wait_k() const {
        mbarrier_wait(shared_address(&shared.k_full[k_state.stage]), k_state.parity);
    }
    // Takes the tile's queries out of their slot, if it is from registers that products read them. While no product
    // runs, which might still read those of the tile before.
    __device__ __forceinline__ void take_queries(TileQueries& queries) const {
        if constexpr (Tile::QUERIES == QueryOperand::REGISTERS) {
            const uint32_t tile = shared_address(shared.q[q_state.stage][consumer]);
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
                                     wgmma_descriptor_k_major(shared_address(shared.q[q_state.stage][consumer])),
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
    __device__ __forceinline__ void finish(float (&out)[D / 2], SoftmaxRows& rows, const ForwardWork& work) const {
        float* lse = args.lse + ((int64_t)work.b * args.H + work.h) * args.Tq;
        const int slot = q_state.stage ^ 1;
        finish_rows<D>(out, rows, args.scale_log2, shared_address(shared.q[slot][consumer]), lse,
                       work.first_row + thread_row, args.Tq);
        named_barrier_arrive(OUT_BARRIER + consumer, WARPGROUP_SIZE + WARP_SIZE);
    }

    // Scores and softmax of key tile n of `work` under the product of the key tile before it, whose P is p. NEW_TILE:
    // the key tile before it was the last of `finished`, which rows belong to on entry.
    template <bool MASKED, bool NEW_TILE>
    __device__ __forceinline__ void step(float (&out)[D / 2], uint32_t (&p)[BLOCK_N / 16][4], SoftmaxRows& rows,
                                         const TileQueries& queries, const ForwardWork& work, int n,
                                         const ForwardWork& finished) {
        float scores[BLOCK_N / 2], factor[2] = {1.0f, 1.0f};
        wait_k();
        wait_turn();
        issue_scores_of(scores, queries);
        issue_out_of(out, p);
        pass_turn();
        wgmma_wait<1>();
        wgmma_pin(scores);
        release(shared.k_empty[k_state.stage]);
        k_state.advance();
        if (MASKED) {
            mask(scores, work, n);
        }
        SoftmaxRows new_rows;
        SoftmaxRows& score_rows = NEW_TILE ? new_rows : rows;
        const bool moves = softmax_tile<MASKED, NEW_TILE, Tile::LAZY>(scores, score_rows, factor, args.scale_log2,
                                                                      args.rescale_threshold);
        complete_before_wait(score_rows.sum[0] + score_rows.sum[1]);
        wgmma_wait<0>();
        wgmma_pin(out);
        release(shared.v_empty[v_state.stage]);
        v_state.advance();
        round_to_operand(p, scores);
        if (NEW_TILE) {
            if (!Tile::PING_PONG && Tile::QUERIES == QueryOperand::SHARED) {
                // All warps' products have read q; otherwise the wait for the turn has seen to it.
                named_barrier_sync(CONSUMER_BARRIER + consumer, WARPGROUP_SIZE);
            }
            finish(out, rows, finished);
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
    // Gives back what the loader has brought of k or v of key tiles that only other consumers see. A warp's lanes wait
    // for each on their own, so all have to have seen it before one gives it back.
    __device__ __forceinline__ void skip_k(int num_tiles) {
        for (int i = 0; i < num_tiles; ++i) {
            wait_k();
            wait_turn();
            pass_turn();
            __syncwarp();
            release(shared.k_empty[k_state.stage]);
            k_state.advance();
        }
    }
    __device__ __forceinline__ void skip_v(int num_tiles) {
        for (int i = 0; i < num_tiles; ++i) {
            mbarrier_wait(shared_address(&shared.v_full[v_state.stage]), v_state.parity);
            __syncwarp();
            release(shared.v_empty[v_state.stage]);
            v_state.advance();
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

    __device__ __forceinline__ void run() {
        ForwardWork work = next_work();
        if (work.num_key_tiles == 0) {
            return;
        }
        int own_tiles = own_key_tiles(work);
        float out[D / 2];
        uint32_t p[BLOCK_N / 16][4];
        SoftmaxRows rows;
        TileQueries queries;
        take_queries(queries);
#pragma unroll
        for (int i = 0; i < D / 2; ++i) {
            out[i] = 0.0f;
        }
        {
            float scores[BLOCK_N / 2], factor[2];
            skip_k(work.num_key_tiles - own_tiles);
            skip_v(work.num_key_tiles - own_tiles);
            wait_k();
            issue_scores_of(scores, queries);
            wgmma_wait<0>();
            wgmma_pin(scores);
            release(shared.k_empty[k_state.stage]);
            k_state.advance();
            mask(scores, work, own_tiles - 1);
            softmax_tile<true, true, Tile::LAZY>(scores, rows, factor, args.scale_log2, args.rescale_threshold);
            round_to_operand(p, scores);
        }
        while (true) {
            int n = own_tiles - 2;
            for (; n >= work.num_full_tiles; --n) {
                step<true, false>(out, p, rows, queries, work, n, work);
            }
            for (; n >= 0; --n) {
                step<false, false>(out, p, rows, queries, work, n, work);
            }
            q_state.advance();
            const ForwardWork next = Tile::PERSISTENT ? next_work() : ForwardWork{};
            if (next.num_key_tiles == 0) {
                break;
            }
            take_queries(queries);
            own_tiles = own_key_tiles(next);
            skip_k(next.num_key_tiles - own_tiles);
            step<true, true>(out, p, rows, queries, next, own_tiles - 1, work);
            skip_v(next.num_key_tiles - own_tiles);
            work = next;
        }
        issue_out_of(out, p);
        wgmma_wait<0>();
        wgmma_pin(out);
        if (Tile::QUERIES == QueryOperand::SHARED) {
            named_barrier_sync(CONSUMER_BARRIER + consumer, WARPGROUP_SIZE);  // all warps' products have read q
        }
        finish(out, rows, work);
    }
};
#endif  // sm_90a

// ---- kernel ------------------------------------------------------------------------------------
// Launch: THREADS threads; BLOCKS_PER_SM blocks an SM, or one a tile (TileWalk).
template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS_PER_SM)
    flash_attention_hopper_forward_kernel(const __grid_constant__ HopperForwardArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using Shared = typename Tile::Shared;
    constexpr int NUM_CONSUMER_WARPS = 4 * Tile::CONSUMERS;
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
            mbarrier_init(shared_address(&shared.k_empty[i]), NUM_CONSUMER_WARPS);
            mbarrier_init(shared_address(&shared.v_empty[i]), NUM_CONSUMER_WARPS);
        }
#pragma unroll
        for (int i = 0; i < Tile::Q_SLOTS; ++i) {
            mbarrier_init(shared_address(&shared.q_full[i]), 1);
            mbarrier_init(shared_address(&shared.q_empty[i]), NUM_CONSUMER_WARPS + 1);  // and the warp that stores
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

// ---- launchers ---------------------------------------------------------------------------------
// Whether these kernels can run on the operands: D 64 or 128, and views that TMA can map.
inline bool flash_attention_hopper_forward_takes(HeadView<const bf16> out, HeadView<const bf16> q,
                                                 HeadView<const bf16> k, HeadView<const bf16> v,
                                                 const AttentionShape& s) {
    return (s.D == 64 || s.D == 128) && tma_can_map(out, s.B, s.Tq, s.H) && tma_can_map(q, s.B, s.Tq, s.H) &&
           tma_can_map(k, s.B, s.Tk, s.Hkv) && tma_can_map(v, s.B, s.Tk, s.Hkv);
}

template <class Tile>
inline HopperForwardArguments hopper_forward_arguments(HeadView<bf16> out, float* lse, HeadView<const bf16> q,
                                                       HeadView<const bf16> k, HeadView<const bf16> v,
                                                       const AttentionShape& s) {
    attention_check_shape(s);
    CHECK(s.D == Tile::D && flash_attention_hopper_forward_takes(out, q, k, v, s),
          "attention forward on Hopper: D = %d must be %d, rows aligned to 16 bytes, strides positive", s.D, Tile::D);
    constexpr int LONGEST = (1 << 30) - 256;  // row + key offset fits an int
    CHECK(s.Tq <= LONGEST && s.Tk <= LONGEST, "attention: Tq = %lld and Tk = %lld may be at most %d", (long long)s.Tq,
          (long long)s.Tk, LONGEST);
    HopperForwardArguments args{};
    args.q = head_tensor_map(q, s.B, s.Tq, s.H, s.D, CONSUMER_ROWS);
    args.k = head_tensor_map(k, s.B, s.Tk, s.Hkv, s.D, Tile::BLOCK_N);
    args.v = head_tensor_map(v, s.B, s.Tk, s.Hkv, s.D, Tile::BLOCK_N);
    args.out = head_tensor_map(out, s.B, s.Tq, s.H, s.D, CONSUMER_ROWS);
    args.lse = lse;
    args.Tq = (int)s.Tq, args.Tk = (int)s.Tk, args.key_offset = (int)attention_key_offset(s);
    args.end_row = round_up(args.Tq, CONSUMER_ROWS);
    args.H = s.H, args.heads_per_kv_head = s.H / s.Hkv;
    args.scale_log2 = s.scale * LOG2_E;
    args.rescale_threshold = RESCALE_THRESHOLD_LOG2 / args.scale_log2;
    args.order = attention_tile_order(ceil_div<int64_t>(s.Tq, Tile::BLOCK_M), s.B, s.H, args.heads_per_kv_head,
                                      s.Tk * s.D * 2 * (int64_t)sizeof(bf16));
    return args;
}

// From so many keys on, each tile is a block, started when another ends. Persistent blocks, whose lists are fixed,
// drift apart, some multiprocessors being a little slower, and no longer read the same keys at about the same time:
// H200, H = 8, D = 128, T = 524288: 1.90 TB from memory and 578 to 642 TFLOP/s, one block a tile 666; at 131072 651 and
// 663, 98304 689 and 686, 32768 686 and 676, 8192 695 and 672.
constexpr int64_t FORWARD_DRIFT_KEYS = 131072;

template <class Tile>
inline void hopper_launch_forward(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k,
                                  HeadView<const bf16> v, const AttentionShape& shape, cudaStream_t stream) {
    const HopperForwardArguments args = hopper_forward_arguments<Tile>(out, lse, q, k, v, shape);
    const auto kernel = flash_attention_hopper_forward_kernel<Tile>;
    constexpr int num_bytes = (int)sizeof(typename Tile::Shared);
    allow_dynamic_shared_bytes(kernel, num_bytes);
    int num_blocks = args.order.num_tiles * args.order.num_heads;
    if (Tile::PERSISTENT && !shape.yields && shape.Tk < FORWARD_DRIFT_KEYS) {
        num_blocks = std::min(num_blocks, Tile::BLOCKS_PER_SM * gpu_properties().num_sms);
    }
    kernel<<<num_blocks, Tile::THREADS, num_bytes, stream>>>(args);
    CUDA_CHECK_LAUNCH();
}

using HopperForwardTile64 = HopperForwardTile<64, 3, 128, 4>;
using HopperForwardTile64Short = HopperForwardTile<64, 1, 64, 3, 3>;  // few and short sequences
using HopperForwardTile128 = HopperForwardTile<128, 2, 128, 2, 1, QueryOperand::REGISTERS>;

// Whether the short tile is faster. H200, ms at (B, H, T), the short tile's and the usual one's: (1, 16, 1024) 0.017
// and 0.022, (1, 16, 2048) 0.032 and 0.034, (32, 8, 512) 0.037 and 0.044; (64, 12, 1024) 0.297 and 0.291, (8, 12, 2048)
// 0.129 and 0.123.
inline bool hopper_forward_is_short(const AttentionShape& s) {
    constexpr int64_t SHORT_KEYS = 512;       // of any number of sequences
    constexpr int64_t FEW_TILES_KEYS = 2048;  // of usual tiles no more than
    constexpr int64_t FEW_TILES_AN_SM = 2;    // so that the longest decide
    const int64_t num_tiles = ceil_div<int64_t>(s.Tq, HopperForwardTile64::BLOCK_M) * s.B * s.H;
    return s.D == 64 &&
           (s.Tk <= SHORT_KEYS || (s.Tk <= FEW_TILES_KEYS && num_tiles <= FEW_TILES_AN_SM * gpu_properties().num_sms));
}

// out (=), lse (=) [B, H, Tq], natural, of the scaled scores. A query that sees no key gets out 0 and lse -infinity.
// Repeats bit for bit. Takes what flash_attention_hopper_forward_takes accepts.
inline void flash_attention_hopper_forward(HeadView<bf16> out, float* lse, HeadView<const bf16> q,
                                           HeadView<const bf16> k, HeadView<const bf16> v, const AttentionShape& shape,
                                           cudaStream_t stream) {
    NVTX_RANGE();
    if (hopper_forward_is_short(shape)) {
        hopper_launch_forward<HopperForwardTile64Short>(out, lse, q, k, v, shape, stream);
    } else if (shape.D == 64) {
        hopper_launch_forward<HopperForwardTile64>(out, lse, q, k, v, shape, stream);
    } else {
        hopper_launch_forward<HopperForwardTile128>(out, lse, q, k, v, shape, stream);
    }
}
