// gemm_hopper.cuh: products of a linear layer on sm_90a whose results are worked on before they leave the chip:
//   out [M, N] = f(in [M, K] weight [N, K]^T), or of a weight [K, N]; bf16 in and out, float32 accumulation
// f is an epilogue: the rotation of q and k (rope.cuh), the feed-forward gate or its backward (swiglu.cuh), the
// exponentials of a softmax (classifier.cuh), or nothing (gemm_hopper_epilogues.cuh). What a kernel of its own would
// read and write again costs little here, as long as the product is what a tile waits for.
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

#include "gemm_hopper_epilogues.cuh"
#include "gpu_properties.cuh"

// ---- tiles -------------------------------------------------------------------------------------
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
    bool leads = consumer == 0;  // and lets the other begin: every block has a tile
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
    allow_dynamic_shared_bytes(kernel, SHARED_BYTES);
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
