// flash_attention_hopper_backward_launch.cuh: the call of the backward of attention for sm_90a, D = 64 and 128: its
// scratch and its kernels (flash_attention_hopper_backward.cuh). Those after the first may start while the last blocks
// of the one before run.
#pragma once
#include <algorithm>
#include <utility>

#include "flash_attention_hopper_backward.cuh"
#include "gpu_properties.cuh"

// ---- scratch ----------------------------------------------------------------------------------
inline int hopper_backward_block_m(int D) {
    return D == 128 ? HopperBackwardTile<128>::BLOCK_M : HopperBackwardTile<64>::BLOCK_M;
}
constexpr size_t HOPPER_NEXT_ITEM_BYTES = 256;  // keeps the rest aligned to cache lines
inline size_t hopper_backward_statistics_bytes(const AttentionShape& s, bool deterministic) {
    const size_t tile_bytes = s.D == 128      ? sizeof(HopperBackwardTile<128>::Statistics)
                              : deterministic ? sizeof(HopperBackwardTile<64, true>::Statistics)
                                              : sizeof(HopperBackwardTile<64>::Statistics);
    return tile_bytes * s.B * s.H * ceil_div<int64_t>(s.Tq, hopper_backward_block_m(s.D));
}
// Of dk and of dv, each, where they are summed in memory.
inline size_t hopper_key_accumulator_bytes(const AttentionShape& s) {
    return (size_t)s.B * s.Hkv * round_up<int64_t>(s.Tk, HopperBackwardTile<128>::BLOCK_N) * s.D * sizeof(float);
}
// Exact: 256 bytes, and 8 + 4 D (D = 64, not deterministic: 20 + 4 D) a query row and head, rows rounded up to a tile;
// with KeySums::IN_MEMORY: and 8 D a key row and head, rows rounded up to a block of keys; with DqStart::FIRST_STORED:
// and 4 a query tile and head; where it turns dq and dk back: and rope_table_bytes.
inline size_t flash_attention_hopper_backward_scratch_bytes(const AttentionShape& s, bool deterministic,
                                                            bool turns_back, KeySums key_sums) {
    const int block_m = hopper_backward_block_m(s.D);
    const size_t num_tiles = (size_t)s.B * s.H * ceil_div<int64_t>(s.Tq, block_m);
    return HOPPER_NEXT_ITEM_BYTES + hopper_backward_statistics_bytes(s, deterministic) +
           num_tiles * block_m * s.D * sizeof(float) +
           (key_sums == KeySums::IN_MEMORY ? 2 * hopper_key_accumulator_bytes(s) : 0) +
           (turns_back ? rope_table_bytes(s.Tq, s.D) : 0) +
           (hopper_dq_start(s, deterministic) == DqStart::FIRST_STORED ? num_tiles * sizeof(int) : 0);
}
inline size_t flash_attention_hopper_backward_scratch_bytes(const AttentionShape& s, bool deterministic,
                                                            bool turns_back = false) {
    return flash_attention_hopper_backward_scratch_bytes(s, deterministic, turns_back,
                                                         hopper_key_sums(s, deterministic));
}

// ---- launches ---------------------------------------------------------------------------------
// overlaps: the kernel's blocks may start while the last ones of the kernel before run, if that one lets them; it calls
// wait_for_kernel_before.
template <class... Parameters, class... Arguments>
inline void hopper_launch_kernel(void (*kernel)(Parameters...), bool overlaps, int64_t num_blocks, int num_threads,
                                 int shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = (unsigned)num_blocks, config.blockDim = (unsigned)num_threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream, config.attrs = &overlap, config.numAttrs = overlaps ? 1 : 0;
    if (shared_bytes == 0) {
        // By itself the driver may leave it the L1 cache of the kernel between, 28 KB, too few for its loads in flight:
        // D = 64, B = 64, T = 1024, 0.758 ms instead of 0.733.
        CUDA_CHECK(
            cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxL1));
    }
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
    CUDA_CHECK_LAUNCH();
}

// Checks the operands, fills the statistics and the table of angles, and zeroes what is added to.
template <class Tile>
inline HopperBackwardArguments hopper_begin_backward(const AttentionBackwardOperands& x, const AttentionShape& s,
                                                     BackwardBlocks blocks, KeySums key_sums, cudaStream_t stream) {
    attention_check_shape(s);
    CHECK(s.D == Tile::D, "attention on Hopper: head dim D = %d, expected %d", s.D, Tile::D);
    CHECK(s.Tq <= INT32_MAX / 4 && s.Tk <= INT32_MAX / 4,
          "attention on Hopper: Tq = %lld, Tk = %lld must be below 2^29", (long long)s.Tq, (long long)s.Tk);
    attention_check_view("dq", x.dq);
    attention_check_view("out", x.out);
    attention_check_key_gradients(x.dk, x.dv);
    const bool whole = x.dk.whole.data != nullptr;
    CHECK(x.rotation == nullptr || (!whole && s.Tq == s.Tk && x.rotation->positions.T == s.Tq),
          "attention: what turns dq and dk back needs bf16 rows of the same %lld positions (Tq = %lld, Tk = %lld)",
          (long long)x.rotation->positions.T, (long long)s.Tq, (long long)s.Tk);
    const std::pair<const char*, HeadView<const bf16>> mapped[] = {
        {"dout", x.dout}, {"q", x.q}, {"k", x.k}, {"v", x.v}, {"dk", x.dk.rounded}, {"dv", x.dv.rounded}};
    for (int i = 0; i < (whole ? 4 : 6); ++i) {
        const bool of_queries = i < 2;
        CHECK(tma_can_map(mapped[i].second, s.B, of_queries ? s.Tq : s.Tk, of_queries ? s.H : s.Hkv),
              "attention on Hopper: rows of %s must be aligned to 16 bytes and its strides (%lld, %lld, %lld elements) "
              "be positive",
              mapped[i].first, (long long)mapped[i].second.stride_b, (long long)mapped[i].second.stride_t,
              (long long)mapped[i].second.stride_h);
    }
    const int64_t num_query_tiles = ceil_div<int64_t>(s.Tq, Tile::BLOCK_M);
    CHECK(num_query_tiles * s.B * s.H <= INT32_MAX, "attention on Hopper: %lld query tiles of %lld heads are too many",
          (long long)num_query_tiles, (long long)s.B * s.H);
    CHECK(reinterpret_cast<uintptr_t>(x.scratch) % 16 == 0, "attention: scratch must be aligned to 16 bytes");

    HopperBackwardArguments args{};
    args.q = head_tensor_map(x.q, s.B, s.Tq, s.H, s.D, Tile::BLOCK_M);
    args.dout = head_tensor_map(x.dout, s.B, s.Tq, s.H, s.D, Tile::BLOCK_M);
    args.k = head_tensor_map(x.k, s.B, s.Tk, s.Hkv, s.D, Tile::BLOCK_N);
    args.v = head_tensor_map(x.v, s.B, s.Tk, s.Hkv, s.D, Tile::BLOCK_N);
    if (whole) {
        args.dk_whole = x.dk.whole, args.dv_whole = x.dv.whole;
    } else {
        args.dk = head_tensor_map(x.dk.rounded, s.B, s.Tk, s.Hkv, s.D, Tile::BLOCK_N / Tile::CONSUMERS);
        args.dv = head_tensor_map(x.dv.rounded, s.B, s.Tk, s.Hkv, s.D, Tile::BLOCK_N / Tile::CONSUMERS);
    }
    args.Tq = s.Tq, args.Tk = s.Tk, args.key_offset = attention_key_offset(s);
    args.H = s.H, args.heads_per_kv_head = s.H / s.Hkv;
    args.heads_an_item = key_sums == KeySums::IN_MEMORY ? 1 : args.heads_per_kv_head;
    args.num_query_tiles = (int)num_query_tiles;
    args.num_key_blocks = (int)ceil_div<int64_t>(s.Tk, Tile::BLOCK_N);
    args.scale = s.scale, args.scale_log2 = s.scale * LOG2_E;
    args.order = attention_tile_order(args.num_key_blocks, s.B, s.H / args.heads_an_item, 1,
                                      hopper_shared_bytes(s, args.heads_an_item));
    args.num_items = args.order.num_tiles * args.order.num_heads;
    args.num_blocks =
        blocks == BackwardBlocks::ONE_AN_ITEM ? args.num_items : std::min(args.num_items, gpu_properties().num_sms);
    args.next_item = static_cast<int*>(x.scratch);
    using Statistics = typename Tile::Statistics;
    static_assert(sizeof(Statistics) <= sizeof(typename HopperBackwardTile<Tile::D, Tile::DETERMINISTIC>::Statistics),
                  "scratch");
    char* const after_next_item = static_cast<char*>(x.scratch) + HOPPER_NEXT_ITEM_BYTES;
    Statistics* const statistics = reinterpret_cast<Statistics*>(after_next_item);
    args.statistics = statistics;
    args.dq_accumulator =
        reinterpret_cast<float*>(after_next_item + hopper_backward_statistics_bytes(s, Tile::DETERMINISTIC));
    const int64_t padded_Tq = (int64_t)args.num_query_tiles * Tile::BLOCK_M, num_tile_rows = s.B * s.H * padded_Tq;
    char* rest = reinterpret_cast<char*>(args.dq_accumulator + num_tile_rows * s.D);
    if (key_sums == KeySums::IN_MEMORY) {
        CHECK(!Tile::DETERMINISTIC, "attention on Hopper: dk and dv of deterministic calls are not summed in memory");
        const size_t num_bytes = hopper_key_accumulator_bytes(s);
        args.dk_accumulator = reinterpret_cast<float*>(rest);
        args.dv_accumulator = reinterpret_cast<float*>(rest + num_bytes);
        CUDA_CHECK(cudaMemsetAsync(rest, 0, 2 * num_bytes, stream));
        rest += 2 * num_bytes;
    }
    if (x.rotation != nullptr) {
        float2* const angles = reinterpret_cast<float2*>(rest);
        rope_make_table(angles, s.D, *x.rotation, stream);
        args.angles = angles;
        rest += rope_table_bytes(s.Tq, s.D);
    }
    if (hopper_dq_start(s, Tile::DETERMINISTIC) == DqStart::FIRST_STORED) {
        args.dq_parts = reinterpret_cast<int*>(rest);
        // Nobody stores those of the tiles whose queries see no key.
        const int64_t num_blind_tiles =
            first_tile_to_see<Tile>(0, (int)args.key_offset, (int)s.Tq, args.num_query_tiles);
        for (int64_t head = 0; num_blind_tiles > 0 && head < (int64_t)s.B * s.H; ++head) {
            CUDA_CHECK(cudaMemsetAsync(args.dq_accumulator + head * padded_Tq * s.D, 0,
                                       num_blind_tiles * Tile::BLOCK_M * s.D * sizeof(float), stream));
        }
    }
    const int64_t num_row_blocks = ceil_div<int64_t>(num_tile_rows, HOPPER_ROWS_THREADS / ATTENTION_DELTA_LANES);
    CHECK(num_row_blocks <= INT32_MAX, "attention: %lld query rows are more than a grid holds",
          (long long)num_tile_rows);
    hopper_launch_kernel(hopper_backward_prepare_kernel<Tile::D, Statistics>, false, num_row_blocks,
                         HOPPER_ROWS_THREADS, 0, stream, statistics, args.dq_accumulator, args.dq_parts, args.next_item,
                         Tile::DETERMINISTIC ? 0 : args.num_blocks, x.dout, x.out, x.lse, num_tile_rows, s.Tq,
                         padded_Tq, s.H);
    return args;
}
// rows (=) factor * accumulator, of H heads; angles: turned back, nullptr: not. Beside transfers it starts late: blocks
// that wait would hold what others could use.
template <class Tile, class Element>
inline void hopper_round(HeadView<Element> rows, const float* accumulator, const float2* angles, int64_t T,
                         int64_t num_tiles, int H, float factor, const AttentionShape& s, cudaStream_t stream) {
    const bool turns_back = angles != nullptr;
    const auto kernel = turns_back ? hopper_backward_round_kernel<Tile::D, Tile::BLOCK_M, true, Element>
                                   : hopper_backward_round_kernel<Tile::D, Tile::BLOCK_M, false, Element>;
    const int64_t num_groups =
        (int64_t)s.B * ceil_div(H, turns_back ? HOPPER_ROUND_HEADS<true> : HOPPER_ROUND_HEADS<false>);
    hopper_launch_kernel(kernel, !s.yields, num_groups * num_tiles, HOPPER_ROWS_THREADS, 0, stream, rows, accumulator,
                         angles, T, (int)num_tiles, H, factor);
}
// dq (=) from its accumulator, and dk, dv (=) from theirs, where they have any.
template <class Tile>
inline void hopper_finish_backward(const AttentionBackwardOperands& x, const HopperBackwardArguments& args,
                                   const AttentionShape& s, cudaStream_t stream) {
    static_assert(Tile::BLOCK_N % Tile::BLOCK_M == 0, "a block of keys is whole tiles of rows");
    hopper_round<Tile>(x.dq, args.dq_accumulator, args.angles, s.Tq, args.num_query_tiles, s.H, s.scale, s, stream);
    if (args.dk_accumulator != nullptr) {
        const int64_t num_tiles = args.num_key_blocks * (int64_t)(Tile::BLOCK_N / Tile::BLOCK_M);
        const auto finish = [&](auto dk, auto dv) {
            hopper_round<Tile>(dk, args.dk_accumulator, args.angles, s.Tk, num_tiles, s.Hkv, s.scale, s, stream);
            hopper_round<Tile>(dv, args.dv_accumulator, nullptr, s.Tk, num_tiles, s.Hkv, 1.0f, s, stream);
        };
        x.dk.whole.data != nullptr ? finish(x.dk.whole, x.dv.whole) : finish(x.dk.rounded, x.dv.rounded);
    }
}

template <class Tile>
inline void hopper_launch_backward(const AttentionBackwardOperands& x, const AttentionShape& shape,
                                   BackwardBlocks blocks, KeySums key_sums, cudaStream_t stream) {
    const HopperBackwardArguments args = hopper_begin_backward<Tile>(x, shape, blocks, key_sums, stream);
    constexpr int SHARED_BYTES = sizeof(typename Tile::Shared);
    const auto kernel = flash_attention_hopper_backward_kernel<Tile>;
    allow_dynamic_shared_bytes(kernel, SHARED_BYTES);
    hopper_launch_kernel(kernel, true, args.num_blocks, Tile::THREADS, SHARED_BYTES, stream, args);
    hopper_finish_backward<Tile>(x, args, shape, stream);
}

// dq, dk, dv (=), D = 64 or 128. out and lse are the forward's (or, of a chunk of keys, those of all keys together: the
// gradients are then the chunk's share). scratch: flash_attention_hopper_backward_scratch_bytes, aligned to 16 bytes,
// need not be zero. Deterministic, all repeat bit for bit; otherwise dq varies, and dk and dv with KeySums::IN_MEMORY.
// rotation: q and k are rows of its positions (Tq = Tk) that it has turned, and dq and dk come out turned back;
// rope_table_fits(its positions).
inline void flash_attention_hopper_backward(HeadView<bf16> dq, KeyGradientView dk, KeyGradientView dv,
                                            HeadView<const bf16> dout, HeadView<const bf16> q, HeadView<const bf16> k,
                                            HeadView<const bf16> v, HeadView<const bf16> out, const float* lse,
                                            void* scratch, const AttentionShape& shape, bool deterministic,
                                            cudaStream_t stream, const RopeRotation* rotation = nullptr) {
    NVTX_RANGE();
    attention_check_shape(shape);
    const AttentionBackwardOperands x{dq, dk, dv, dout, q, k, v, out, lse, scratch, rotation};
    const BackwardBlocks blocks = hopper_backward_blocks(shape, deterministic);
    const KeySums key_sums = hopper_key_sums(shape, deterministic);
    auto launch = [&](auto tile) { hopper_launch_backward<decltype(tile)>(x, shape, blocks, key_sums, stream); };
    // clang-format off
    if (shape.D == 64) { deterministic ? launch(HopperBackwardTile<64, true>())  : launch(HopperBackwardTile<64>()); }
    else               { deterministic ? launch(HopperBackwardTile<128, true>()) : launch(HopperBackwardTile<128>()); }
    // clang-format on
}
