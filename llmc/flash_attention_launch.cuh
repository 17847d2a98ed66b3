// flash_attention_launch.cuh: what the launches of all attention kernels have in common, those for mma.sync and those
// for Hopper: the order of tiles, causality as one number, checks of the operands, constants of the softmax, the row
// sum that starts a backward.
#pragma once
#include <algorithm>
#include <cmath>

#include "attention_shape.cuh"
#include "gpu_properties.cuh"
#include "rope.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr float LN_2 = 0.6931471805599453f;
// What one group of heads may keep in the L2 cache while the blocks of a launch walk over it. Less than the
// caches of an A100 and an H100 hold, 40 and 50 MB.
constexpr int64_t L2_GROUP_BYTES = 32 << 20;
// Tiles a multiprocessor that a group of heads has at least, if there are so many. With several times as many the
// group's operands leave the cache: 2 % less with 128 heads of 16384 rows.
constexpr int GROUP_TILES_AN_SM = 3;

// ---- what a launch works through ----------------------------------------------------------------
// A flat grid over (tile, head), B * heads heads in all. The heads are taken in groups; within a group all heads'
// longest tiles come first, so that the short ones fill the gaps at the end. Where all tiles run at once, several on a
// multiprocessor, there are no gaps; then every second wave of blocks, one a multiprocessor, takes its tiles from the
// shortest up, so that a long one has a short one beside it. H200, Hopper's forward, D = 64, B = 1, H = 16, T = 1024:
// 158 TFLOP/s instead of 144.
struct TileOrder {
    int num_tiles;
    int num_heads;
    int heads_per_group;
    int wave = INT32_MAX;  // tiles

    // Of tiles that are so many blocks each, of which a multiprocessor has room for so many.
    void share_multiprocessors(int blocks_an_sm, int num_sms, int blocks_a_tile = 1) {
        if ((int64_t)num_tiles * num_heads * blocks_a_tile <= (int64_t)blocks_an_sm * num_sms) {
            wave = std::max(1, num_sms / blocks_a_tile);
        }
    }
    struct Place {
        int tile;  // 0: the first to start
        int head;  // b * heads + h
    };
    __device__ Place place(int block) const {
        if (block >= wave && block / wave % 2 == 1) {
            const int first = block / wave * wave, end = min(first + wave, num_tiles * num_heads);
            block = first + (end - 1 - block);
        }
        const int first_head = block / (num_tiles * heads_per_group) * heads_per_group;
        const int heads = min(heads_per_group, num_heads - first_head);
        const int within = block - num_tiles * first_head;
        return {within / heads, first_head + within % heads};
    }
};

// Causality as one number: query t sees keys below min(Tk, t + 1 + key_offset). Full attention is an offset of Tk, and
// no offset need be larger, or smaller than -Tq, so the sum cannot overflow.
inline int64_t attention_key_offset(const AttentionShape& shape) {
    return shape.causal ? std::clamp(shape.causal_offset, -shape.Tq, shape.Tk) : shape.Tk;
}

// What a backward works on: as flash_attention_backward (flash_attention.cuh) says.
struct AttentionBackwardOperands {
    HeadView<bf16> dq;
    KeyGradientView dk, dv;
    HeadView<const bf16> dout, q, k, v, out;
    const float* lse;
    void* scratch;
    const RopeRotation* rotation = nullptr;
};

// ---- checks -------------------------------------------------------------------------------------
// What every attention kernel here assumes of its operands.
inline void attention_check_shape(const AttentionShape& s) {
    CHECK(s.D >= 8 && s.D <= 256 && s.D % 8 == 0, "attention: head dim D = %d must be a multiple of 8 from 8 to 256",
          s.D);
    CHECK(s.B >= 1 && s.Tq >= 1 && s.Tk >= 1, "attention: B = %d, Tq = %lld, Tk = %lld must be positive", s.B,
          (long long)s.Tq, (long long)s.Tk);
    CHECK(s.Hkv >= 1 && s.H >= s.Hkv && s.H % s.Hkv == 0,
          "attention: H = %d query heads must be a multiple of Hkv = %d key/value heads", s.H, s.Hkv);
    CHECK(std::isfinite(s.scale) && s.scale > 0.0f, "attention: scale %g must be positive and finite", s.scale);
}
template <class Element>
inline void attention_check_view(const char* name, const HeadView<Element>& view) {
    CHECK(reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride_b % 8 == 0 && view.stride_t % 8 == 0 &&
              view.stride_h % 8 == 0,
          "attention: rows of %s must be aligned to 16 bytes (strides %lld, %lld, %lld elements)", name,
          (long long)view.stride_b, (long long)view.stride_t, (long long)view.stride_h);
}
inline void attention_check_key_gradients(const KeyGradientView& dk, const KeyGradientView& dv) {
    CHECK((dk.whole.data == nullptr) == (dv.whole.data == nullptr), "attention: dk and dv must be of one kind");
    attention_check_view("dk", dk.rounded);
    attention_check_view("dv", dv.rounded);
    attention_check_view("dk", dk.whole);
    attention_check_view("dv", dv.whole);
}

// num_tiles a head, of `heads` heads a sequence; heads_sharing neighbours read the same operands, of head_bytes. As
// many heads a group as fit the L2 cache together or, where these have few tiles, more: after a group's shortest tiles
// come the next one's longest, and only the last group's short ones even out the end. So no group is left small either.
// (H200, backward, H = 8, D = 128, TFLOP/s with what fits and with this: T = 4608 342 and 504, 9216 516 and 588, 18432
// 588 and 601; H = 32, Hkv = 8, T = 8192: 445 and 574.)
inline TileOrder attention_tile_order(int64_t num_tiles, int B, int heads, int heads_sharing, int64_t head_bytes) {
    const int64_t num_heads = (int64_t)B * heads, num_units = num_heads / heads_sharing;
    CHECK(num_tiles * num_heads <= INT32_MAX / 2, "attention: %lld tiles of %lld heads are more than a grid holds",
          (long long)num_tiles, (long long)num_heads);
    const int64_t least = ceil_div<int64_t>(GROUP_TILES_AN_SM * gpu_properties().num_sms, num_tiles * heads_sharing);
    const auto is_even = [&](int64_t units) { return num_units % units == 0 || num_units % units >= least; };
    int64_t units = std::clamp<int64_t>(L2_GROUP_BYTES / head_bytes, 1, num_units);
    while (units > least && !is_even(units)) {
        --units;
    }
    while (units < num_units && (units < least || !is_even(units))) {
        ++units;
    }
    return {(int)num_tiles, (int)num_heads, (int)(units * heads_sharing)};
}

// ---- delta of the backward ----------------------------------------------------------------------
constexpr int ATTENTION_DELTA_LANES = 8;  // threads a row: 128 bytes of a row at a time
// rowsum(dout out) of a row of D elements, for each of its lanes; rows that are nullptr: 0. All lanes of a warp call
// it.
__device__ __forceinline__ float attention_delta(const bf16* dout_row, const bf16* out_row, int D) {
    float delta = 0.0f;
    if (dout_row != nullptr) {
        const int lane = threadIdx.x % ATTENTION_DELTA_LANES;
        for (int d = lane * bf16x8::size; d < D; d += ATTENTION_DELTA_LANES * bf16x8::size) {
            const bf16x8 a = load128(dout_row + d), b = load128(out_row + d);
#pragma unroll
            for (int i = 0; i < bf16x8::size; ++i) {
                delta += __bfloat162float(a[i]) * __bfloat162float(b[i]);
            }
        }
    }
#pragma unroll
    for (int offset = ATTENTION_DELTA_LANES / 2; offset > 0; offset /= 2) {
        delta += __shfl_xor_sync(FULL_WARP, delta, offset);
    }
    return delta;
}
