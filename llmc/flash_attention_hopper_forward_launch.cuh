// flash_attention_hopper_forward_launch.cuh: the call of the attention forward for sm_90a, D = 64 and 128
// (flash_attention_hopper_forward.cuh): the tiles that ship, and which of them a launch gets.
#pragma once
#include <algorithm>
#include <cmath>

#include "flash_attention_hopper_forward.cuh"
#include "gpu_properties.cuh"

// ---- a launch of a tile ------------------------------------------------------------------------
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
    args.inverse_scale_log2 = 1.0f / args.scale_log2;
    args.order = attention_tile_order(ceil_div<int64_t>(s.Tq, Tile::BLOCK_M), s.B, s.H, args.heads_per_kv_head,
                                      s.Tk * s.D * 2 * (int64_t)sizeof(bf16));
    args.order.share_multiprocessors(Tile::BLOCKS_PER_SM, gpu_properties().num_sms);
    return args;
}

// From so many keys on, each tile is a block, started when another ends. Persistent blocks, whose lists are fixed,
// drift apart, some multiprocessors being a little slower, and no longer read the same keys at about the same time:
// H200, H = 8, D = 128, tiles of 128 rows, T = 524288: 1.90 TB from memory and 578 to 642 TFLOP/s, one block a tile
// 666; at 131072 651 and 663, 98304 689 and 686, 32768 686 and 676, 8192 695 and 672. Tiles of 192 rows: 98304 756 and
// 754, 32768 822 and 820, 8192 721 and 688; beyond 98304 not compared.
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

// ---- which tile a launch gets -------------------------------------------------------------------
// Tiles, by the tiles a launch has. Where there are few it takes as long as its longest, otherwise as long as all
// together; then a tile of more rows reads each key from L2 for more of them, and three or four consumers hide more of
// one another's softmax than two. But larger tiles see more masked keys, and come out less even.
//
// TFLOP/s, one H200, causal, at B, H, T. D = 128, FEW and MEDIUM: 1, 8, 512 57, 42; 1024 169, 119; 2048 357, 291; 3072
// 431, 472; 1, 2, 8192 575, 370. LONG and MEDIUM: 8, 8, 2048 554, 574; 1, 8, 4096 503, 619; 6144 725, 667; 4, 8, 8192
// 780, 749; 1, 8, 32768 838, 772; 98304 756, 689; 131072 751, 651. Tried beside LONG: 64 keys 1 to 2 % less, a third
// stage up to 2 % less, without turns the same; 96 keys are spilled, and no two products overlap (C7512).
// D = 64, FEW and SHORT: 1, 16, 512 58, 57; 1024 157, 146; 2048 285, 300; 1, 2, 4096 152, 108. SHORT, MEDIUM, LONG: 1,
// 8, 4096 350, 337, 268; 1, 16, 3072 396, 428, 381; 4096 402, 465, 481; 64, 12, 1024 339, 360, 392; 4, 16, 8192 469,
// 580, 582. Tried beside LONG: 48 keys 6 to 9 % less; three consumers with 96 keys or, without turns, 128 as MEDIUM or
// less. FEW with 64 keys: C7512.
using HopperForwardTile64Few = HopperForwardTile<64, 2, 48, 6, 2, QueryOperand::SHARED, 2>;
using HopperForwardTile64Short = HopperForwardTile<64, 1, 64, 3, 3>;
using HopperForwardTile64Medium = HopperForwardTile<64, 3, 128, 4>;
using HopperForwardTile64Long = HopperForwardTile<64, 4, 64, 4>;
using HopperForwardTile128Few = HopperForwardTile<128, 2, 64, 4, 1, QueryOperand::SHARED, 2>;
using HopperForwardTile128Medium = HopperForwardTile<128, 2, 128, 2, 1, QueryOperand::REGISTERS>;
using HopperForwardTile128Long = HopperForwardTile<128, 3, 80, 2>;

// A tile for rows of few keys.
template <class Tile>
struct EveryTile : Tile {
    static constexpr References REFERENCES = References::EVERY_TILE;
};

// How many keys the mean tile of so many rows sees, by the longest's. Where the first queries see no key, or the last
// ones all do before their diagonal, as no launch of the trainer has it, this is less exact.
inline double forward_tile_share(const AttentionShape& s, int rows) {
    if (!s.causal) {
        return 1.0;
    }
    const double end = (double)std::max<int64_t>(1, std::min(s.Tk, s.Tq + attention_key_offset(s)));
    const double begin = (double)std::max<int64_t>(0, std::min(s.Tk, attention_key_offset(s)));
    return std::min(1.0, (begin + end + rows) / (2.0 * end));
}
inline double forward_tiles_an_sm(const AttentionShape& s, int rows) {
    return (double)(ceil_div<int64_t>(s.Tq, rows) * s.B * s.H) / gpu_properties().num_sms;
}
// How long a launch takes if an SM has one tile at a time, in rows of the longest tile: long tiles with short ones
// beside them, or all alike. speed: of a full SM, of the same D.
template <class Tile>
inline double forward_launch_rows(const AttentionShape& s, double speed) {
    const double share = forward_tile_share(s, Tile::BLOCK_M), tiles_an_sm = forward_tiles_an_sm(s, Tile::BLOCK_M);
    return (share > 0.75 ? std::ceil(tiles_an_sm) : std::max(1.0, tiles_an_sm * share)) * Tile::BLOCK_M / speed;
}
enum class ForwardTile { FEW, SHORT, MEDIUM, LONG };
inline ForwardTile hopper_forward_tile(const AttentionShape& s) {
    const double tiles_an_sm = forward_tiles_an_sm(s, CONSUMER_ROWS);
    const bool all_alike = forward_tile_share(s, 0) > 0.75;
    if (tiles_an_sm <= (s.D == 128 && all_alike ? 1 : 2)) {
        return ForwardTile::FEW;
    }
    if (s.D == 64 && (s.Tk <= 512 || (tiles_an_sm <= 4 && !all_alike))) {
        return ForwardTile::SHORT;
    }
    const bool is_medium = s.D == 64 ? forward_launch_rows<HopperForwardTile64Medium>(s, 1.0) <=
                                           forward_launch_rows<HopperForwardTile64Long>(s, 1.03)
                                     : forward_launch_rows<HopperForwardTile128Medium>(s, 1.0) <=
                                           forward_launch_rows<HopperForwardTile128Long>(s, 1.05);
    return is_medium ? ForwardTile::MEDIUM : ForwardTile::LONG;
}

// ---- the call ----------------------------------------------------------------------------------
// out (=), lse (=) [B, H, Tq], natural, of the scaled scores. A query that sees no key gets out 0 and lse -infinity.
// Repeats bit for bit. Takes what flash_attention_hopper_forward_takes accepts.
inline void flash_attention_hopper_forward(HeadView<bf16> out, float* lse, HeadView<const bf16> q,
                                           HeadView<const bf16> k, HeadView<const bf16> v, const AttentionShape& shape,
                                           cudaStream_t stream) {
    NVTX_RANGE();
    auto launch = [&](auto tile) {
        using Tile = decltype(tile);
        shape.Tk <= EVERY_TILE_KEYS ? hopper_launch_forward<EveryTile<Tile>>(out, lse, q, k, v, shape, stream)
                                    : hopper_launch_forward<Tile>(out, lse, q, k, v, shape, stream);
    };
    const bool is_64 = shape.D == 64;
    switch (hopper_forward_tile(shape)) {
        case ForwardTile::FEW:
            return is_64 ? launch(HopperForwardTile64Few()) : launch(HopperForwardTile128Few());
        case ForwardTile::SHORT:  // of D = 64 alone
            return launch(HopperForwardTile64Short());
        case ForwardTile::MEDIUM:
            return is_64 ? launch(HopperForwardTile64Medium()) : launch(HopperForwardTile128Medium());
        case ForwardTile::LONG:
            return is_64 ? launch(HopperForwardTile64Long()) : launch(HopperForwardTile128Long());
    }
}
