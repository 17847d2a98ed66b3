// flash_attention_hopper_backward_launch.cuh: the calls of the backward of attention for sm_90a, D = 64 and 128:
// scratch, the pieces in which the work is done, the three kernels of each (flash_attention_hopper_backward.cuh).
//
// dq is summed in float32 in scratch, which a call goes over three times: zeroed, added to, rounded. An accumulator of
// all queries is larger than the L2 cache (B = 4, T = 8192, H = 8, D = 128: 134 MB, the H100's cache 50 MB) and would
// each time go out to memory and back. So a call with much of it works in pieces, one after another with the same
// scratch: groups of sequences or, of one sequence, of kv heads. The price is the end of each piece, where
// multiprocessors run out of items. Gradients do not depend on the pieces: a block's sums are its own, and so is the
// order of each of dq's.
#pragma once
#include <algorithm>
#include <utility>

#include "flash_attention_hopper_backward.cuh"
#include "gpu_properties.cuh"

// ---- pieces -----------------------------------------------------------------------------------
struct PieceLimits {
    int64_t dq_bytes;   // the most of dq's accumulator in a piece
    int64_t num_items;  // in pieces only where so many items (HopperBackwardTile::BLOCK_N keys of a kv head) have that
};
constexpr PieceLimits ONE_PIECE{INT64_MAX, 0};
// Bytes: less than the L2 cache of an H100, through which q, k, v, dout, dk and dv pass meanwhile. Items: four for each
// of its 132 multiprocessors, nearly, so that the end of a piece is short. So these are pieces at D = 128 without
// groups of query heads, and at D = 64 with groups of one or two. Both are computed, not timed; others can be timed by
// dev/cuda/attention_timing.cu.
constexpr PieceLimits HOPPER_PIECE_LIMITS{32 << 20, 512};

// What a call does; the same on every GPU. In one piece: beside transfers, where another stream's work fills what the
// end of a kernel leaves; without causality, where items are equal and all end together; deterministic, where the
// longest come last.
inline PieceLimits hopper_piece_limits(const AttentionShape& s, bool deterministic) {
    return s.yields || !s.causal || deterministic ? ONE_PIECE : HOPPER_PIECE_LIMITS;
}

inline int hopper_backward_block_m(int D) {
    return D == 128 ? HopperBackwardTile<128>::BLOCK_M : HopperBackwardTile<64>::BLOCK_M;
}
// Of a kv head's query heads in a sequence.
inline int64_t hopper_dq_bytes(const AttentionShape& s) {
    return round_up<int64_t>(s.Tq, hopper_backward_block_m(s.D)) * (s.H / s.Hkv) * s.D * (int64_t)sizeof(float);
}
inline bool hopper_takes_pieces(const AttentionShape& s, const PieceLimits& limits) {
    const int64_t item_bytes = (int64_t)HopperBackwardTile<128>::BLOCK_N * (s.H / s.Hkv) * s.D * sizeof(float);
    return limits.dq_bytes / item_bytes >= limits.num_items;
}

// of_batch groups of sequences; when each is one sequence, of_heads groups of kv heads of it. As even as they come.
struct BackwardPieces {
    int of_batch = 1;
    int of_heads = 1;
};
// The fewest pieces within the limits; where one kv head exceeds them, pieces of a sequence.
inline BackwardPieces hopper_split_backward(const AttentionShape& s, const PieceLimits& limits) {
    BackwardPieces pieces;
    if (hopper_takes_pieces(s, limits)) {
        const int64_t head_bytes = hopper_dq_bytes(s);
        const auto groups = [&](int64_t count, int64_t num_bytes) {
            return (int)ceil_div(count, std::clamp<int64_t>(limits.dq_bytes / num_bytes, 1, count));
        };
        pieces.of_batch = groups(s.B, s.Hkv * head_bytes);
        if (pieces.of_batch == s.B && head_bytes <= limits.dq_bytes) {
            pieces.of_heads = groups(s.Hkv, head_bytes);
        }
    }
    return pieces;
}

// ---- scratch ----------------------------------------------------------------------------------
constexpr size_t HOPPER_NEXT_ITEM_BYTES = 256;  // keeps the rest aligned to cache lines
inline size_t hopper_backward_statistics_bytes(const AttentionShape& s) {
    return (size_t)s.B * s.H * round_up<int64_t>(s.Tq, hopper_backward_block_m(s.D)) * 2 * sizeof(float);
}
// 256 bytes, and 8 + 4 D a query row and head, rows rounded up to a tile; deterministic: and 4 a tile. That for all
// rows, or the largest piece that any shape of fewer sequences or tokens could have: what is enough for a shape is
// enough for smaller ones.
inline size_t hopper_backward_scratch_bytes(const AttentionShape& s, const PieceLimits& limits, bool deterministic) {
    const int64_t head_bytes = hopper_dq_bytes(s), sequence_bytes = s.Hkv * head_bytes;
    const size_t dq_bytes = !hopper_takes_pieces(s, limits) ? s.B * sequence_bytes
                            : head_bytes <= limits.dq_bytes ? std::min(s.B * sequence_bytes, limits.dq_bytes)
                                                            : sequence_bytes;
    const size_t row_bytes = s.D * sizeof(float), num_rows = dq_bytes / row_bytes;
    return HOPPER_NEXT_ITEM_BYTES + num_rows * (2 * sizeof(float) + row_bytes) +
           (deterministic ? num_rows / hopper_backward_block_m(s.D) * sizeof(int) : 0);
}
inline size_t flash_attention_hopper_backward_scratch_bytes(const AttentionShape& s, bool deterministic) {
    return hopper_backward_scratch_bytes(s, hopper_piece_limits(s, deterministic), deterministic);
}

// ---- operands ---------------------------------------------------------------------------------
struct HopperBackwardOperands {
    HeadView<bf16> dq;
    KeyGradientView dk, dv;
    HeadView<const bf16> dout, q, k, v, out;
    const float* lse;
    void* scratch;
};
// The view from sequence b, head h on; one without data stays so.
template <class Element>
inline HeadView<Element> view_from(HeadView<Element> view, int b, int h) {
    view.data = view.data == nullptr ? nullptr : view.row(b, 0, h);
    return view;
}
inline KeyGradientView view_from(KeyGradientView view, int b, int h) {
    view.rounded = view_from(view.rounded, b, h);
    view.whole = view_from(view.whole, b, h);
    return view;
}
// The operands from sequence b, kv head kv_head on, which is 0 unless a piece is of one sequence: its lse is then
// contiguous.
inline HopperBackwardOperands operands_from(const HopperBackwardOperands& x, const AttentionShape& s, int b,
                                            int kv_head) {
    const int h = kv_head * (s.H / s.Hkv);
    return {view_from(x.dq, b, h),
            view_from(x.dk, b, kv_head),
            view_from(x.dv, b, kv_head),
            view_from(x.dout, b, h),
            view_from(x.q, b, h),
            view_from(x.k, b, kv_head),
            view_from(x.v, b, kv_head),
            view_from(x.out, b, h),
            x.lse + ((int64_t)b * s.H + h) * s.Tq,
            x.scratch};
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
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
    CUDA_CHECK_LAUNCH();
}

// Checks the operands, fills the statistics and zeroes dq's accumulator. overlaps: the kernel before is
// hopper_finish_dq's of a piece of the same call.
template <class Tile>
inline HopperBackwardArguments hopper_begin_backward(const HopperBackwardOperands& x, const AttentionShape& s,
                                                     BackwardBlocks blocks, bool overlaps, cudaStream_t stream) {
    attention_check_shape(s);
    CHECK(s.D == Tile::D, "attention on Hopper: head dim D = %d, expected %d", s.D, Tile::D);
    CHECK(s.Tq <= INT32_MAX / 4 && s.Tk <= INT32_MAX / 4,
          "attention on Hopper: Tq = %lld, Tk = %lld must be below 2^29", (long long)s.Tq, (long long)s.Tk);
    attention_check_view("dq", x.dq);
    attention_check_view("out", x.out);
    attention_check_key_gradients(x.dk, x.dv);
    const bool whole = x.dk.whole.data != nullptr;
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
    args.num_query_tiles = (int)num_query_tiles;
    args.scale = s.scale, args.scale_log2 = s.scale * LOG2_E;
    // What the blocks of a head share: q, dout and dq's accumulator.
    args.order =
        attention_tile_order(ceil_div<int64_t>(s.Tk, Tile::BLOCK_N), s.B, s.Hkv, 1,
                             s.Tq * args.heads_per_kv_head * s.D * (int64_t)(2 * sizeof(bf16) + sizeof(float)));

    args.num_items = args.order.num_tiles * args.order.num_heads;
    args.num_blocks =
        blocks == BackwardBlocks::ONE_AN_ITEM ? args.num_items : std::min(args.num_items, gpu_properties().num_sms);
    args.next_item = static_cast<int*>(x.scratch);
    float* statistics = reinterpret_cast<float*>(static_cast<char*>(x.scratch) + HOPPER_NEXT_ITEM_BYTES);
    args.statistics = statistics;
    args.dq_accumulator = statistics + hopper_backward_statistics_bytes(s) / sizeof(float);
    const int64_t padded_Tq = (int64_t)args.num_query_tiles * Tile::BLOCK_M, num_tile_rows = s.B * s.H * padded_Tq;
    if (Tile::DETERMINISTIC) {
        args.dq_parts = reinterpret_cast<int*>(args.dq_accumulator + num_tile_rows * s.D);
    }
    const int64_t num_row_blocks = ceil_div<int64_t>(num_tile_rows, HOPPER_ROWS_THREADS / ATTENTION_DELTA_LANES);
    CHECK(num_row_blocks <= INT32_MAX, "attention: %lld query rows are more than a grid holds",
          (long long)num_tile_rows);
    hopper_launch_kernel(hopper_backward_prepare_kernel<Tile::D, Tile::BLOCK_M>, overlaps, num_row_blocks,
                         HOPPER_ROWS_THREADS, 0, stream, statistics, args.dq_accumulator, args.dq_parts, args.next_item,
                         Tile::DETERMINISTIC ? 0 : args.num_blocks, x.dout, x.out, x.lse, num_tile_rows, s.Tq,
                         padded_Tq, s.H);
    return args;
}
// dq (=) from its accumulator. Beside transfers it starts late: blocks that wait would hold what others could use.
template <class Tile>
inline void hopper_finish_dq(HeadView<bf16> dq, const HopperBackwardArguments& args, const AttentionShape& s,
                             cudaStream_t stream) {
    const int64_t num_tiles = (int64_t)s.B * s.H * args.num_query_tiles;
    const int64_t num_blocks = num_tiles * (Tile::BLOCK_M * Tile::D / 16) / HOPPER_ROWS_THREADS;
    CHECK(num_blocks <= INT32_MAX, "attention: %lld query tiles are more than a grid holds", (long long)num_tiles);
    hopper_launch_kernel(hopper_backward_dq_kernel<Tile::D, Tile::BLOCK_M>, !s.yields, num_blocks, HOPPER_ROWS_THREADS,
                         0, stream, dq, args.dq_accumulator, num_tiles, s.Tq, args.num_query_tiles, s.H, s.scale);
}

// The whole call. Pieces can share scratch because each kernel, before it touches it, waits for the one before, which
// is over only after all before that.
template <class Tile>
inline void hopper_launch_backward(const HopperBackwardOperands& x, const AttentionShape& shape, BackwardBlocks blocks,
                                   const PieceLimits& limits, cudaStream_t stream) {
    constexpr int SHARED_BYTES = sizeof(typename Tile::Shared);
    const auto kernel = flash_attention_hopper_backward_kernel<Tile>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
    const BackwardPieces pieces = hopper_split_backward(shape, limits);
    // The first of sequences, or of kv heads, in piece i of n.
    const auto first = [](int count, int i, int n) { return (int)((int64_t)count * i / n); };
    for (int i = 0; i < pieces.of_batch; ++i) {
        const int b = first(shape.B, i, pieces.of_batch);
        for (int j = 0; j < pieces.of_heads; ++j) {
            const int kv_head = first(shape.Hkv, j, pieces.of_heads);
            AttentionShape piece = shape;
            piece.B = first(shape.B, i + 1, pieces.of_batch) - b;
            piece.Hkv = first(shape.Hkv, j + 1, pieces.of_heads) - kv_head;
            piece.H = piece.Hkv * (shape.H / shape.Hkv);
            const HopperBackwardOperands part = operands_from(x, shape, b, kv_head);
            const bool is_first = i == 0 && j == 0;
            const HopperBackwardArguments args = hopper_begin_backward<Tile>(part, piece, blocks, !is_first, stream);
            hopper_launch_kernel(kernel, true, args.num_blocks, Tile::THREADS, SHARED_BYTES, stream, args);
            hopper_finish_dq<Tile>(part.dq, args, piece, stream);
        }
    }
}
// Within these limits, with hopper_backward_scratch_bytes of scratch.
inline void hopper_backward_within(const PieceLimits& limits, const HopperBackwardOperands& x,
                                   const AttentionShape& shape, bool deterministic, cudaStream_t stream) {
    attention_check_shape(shape);
    const BackwardBlocks blocks = hopper_backward_blocks(shape, deterministic);
    auto launch = [&](auto tile) { hopper_launch_backward<decltype(tile)>(x, shape, blocks, limits, stream); };
    // clang-format off
    if (shape.D == 64) { deterministic ? launch(HopperBackwardTile<64, true>())  : launch(HopperBackwardTile<64>()); }
    else               { deterministic ? launch(HopperBackwardTile<128, true>()) : launch(HopperBackwardTile<128>()); }
    // clang-format on
}

// dq, dk, dv (=), D = 64 or 128. out and lse are the forward's (or, of a chunk of keys, those of all keys together: the
// gradients are then the chunk's share). scratch: flash_attention_hopper_backward_scratch_bytes, aligned to 16 bytes,
// need not be zero. dk and dv always repeat bit for bit; dq does when deterministic.
inline void flash_attention_hopper_backward(HeadView<bf16> dq, KeyGradientView dk, KeyGradientView dv,
                                            HeadView<const bf16> dout, HeadView<const bf16> q, HeadView<const bf16> k,
                                            HeadView<const bf16> v, HeadView<const bf16> out, const float* lse,
                                            void* scratch, const AttentionShape& shape, bool deterministic,
                                            cudaStream_t stream) {
    NVTX_RANGE();
    hopper_backward_within(hopper_piece_limits(shape, deterministic), {dq, dk, dv, dout, q, k, v, out, lse, scratch},
                           shape, deterministic, stream);
}
