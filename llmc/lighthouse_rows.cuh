// lighthouse_rows.cuh: what the Lighthouse stages that move rows (pool, gather, scatter) have in common: the shape of
// the layer, its operands seen as one list of heads, and rows of D elements handled by a group of lanes.
#pragma once
#include "attention_shape.cuh"
#include "lighthouse_geometry.h"

// The layer's sizes; a kernel argument.
struct LighthouseShape {
    LighthouseGeometry geometry;
    int B = 1;           // sequences
    int H = 1;           // query heads
    int Hkv = 1;         // key/value heads, each with its own selection; H % Hkv == 0
    int D = 128;         // head dim, a multiple of 8 up to 256
    float scale = 1.0f;  // of the scores q k^T
    LighthouseScorer scorer = LighthouseScorer::norm;
    int dilation = 4;  // of the dilated scorer

    __host__ __device__ int num_heads() const { return H + 2 * Hkv; }  // of q, k and v together
    __host__ __device__ int64_t num_selections() const { return (int64_t)B * Hkv; }
};

// q [B, *, H, D], k and v [B, *, Hkv, D] as one list of H + 2 Hkv heads, in this order.
template <class Element>
struct QkvHeads {
    HeadView<Element> q, k, v;

    // One head of the list, as a tensor of one head.
    __device__ HeadView<Element> head(const LighthouseShape& shape, int head) const {
        HeadView<Element> view = head < shape.H ? q : head < shape.H + shape.Hkv ? k : v;
        const int within = head < shape.H ? head : (head - shape.H) % shape.Hkv;
        view.data = view.row(0, 0, within);
        return view;
    }
};
// The key/value head whose selection a head of that list follows.
__device__ inline int lighthouse_kv_head(const LighthouseShape& shape, int head) {
    return head < shape.H ? head / (shape.H / shape.Hkv) : (head - shape.H) % shape.Hkv;
}

// ---- rows in registers ---------------------------------------------------------------------------
// A row of D bf16 is spread over ROW_LANES lanes, eight elements each; lanes beyond D / 8 hold zeros. ROW_LANES is 8,
// 16 or 32; smaller rows leave lanes idle.
constexpr int LIGHTHOUSE_ROW_THREADS = 256;

struct FloatRow {  // one lane's eight elements
    float value[8] = {};

    __device__ void add(const bf16x8& packed) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            value[i] += __bfloat162float(packed[i]);
        }
    }
    __device__ void add(const FloatRow& other) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            value[i] += other.value[i];
        }
    }
    __device__ void scale(float factor) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            value[i] *= factor;
        }
    }
    __device__ bf16x8 pack() const {
        bf16x8 packed;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            packed[i] = __float2bfloat16(value[i]);
        }
        return packed;
    }
};

// Where this thread stands in a 1-D launch of one group of ROW_LANES lanes a row, heads varying fastest.
template <int ROW_LANES>
struct RowGroup {
    int lane;       // within the row
    int head;       // 0 .. num_heads - 1
    int64_t index;  // the row, 0 .. num_rows - 1
    bool active;    // false in the last block's surplus groups and in lanes beyond D

    __device__ RowGroup(int64_t num_rows, int num_heads, int D) {
        constexpr int groups = LIGHTHOUSE_ROW_THREADS / ROW_LANES;
        const int64_t group = (int64_t)blockIdx.x * groups + threadIdx.x / ROW_LANES;
        lane = threadIdx.x % ROW_LANES;
        index = group / num_heads;
        head = (int)(group - index * num_heads);
        active = index < num_rows && lane * 8 < D;
    }
};

// Calls launch(integral_constant ROW_LANES, blocks) for the narrowest group that holds a row of D.
template <class Launch>
inline void launch_row_groups(int64_t num_rows, int num_heads, int D, Launch&& launch) {
    CHECK(D % 8 == 0 && D >= 8 && D <= 256, "Lighthouse attention: head dim %d must be a multiple of 8 from 8 to 256",
          D);
    const auto with_lanes = [&](auto row_lanes) {
        constexpr int groups = LIGHTHOUSE_ROW_THREADS / decltype(row_lanes)::value;
        const int64_t blocks = ceil_div(num_rows * num_heads, (int64_t)groups);
        CHECK(blocks < (int64_t)1 << 31, "Lighthouse attention: %lld rows of %d heads are more than one launch holds",
              (long long)num_rows, num_heads);
        launch(row_lanes, (unsigned)blocks);
    };
    if (D <= 64) {
        with_lanes(std::integral_constant<int, 8>());
    } else if (D <= 128) {
        with_lanes(std::integral_constant<int, 16>());
    } else {
        with_lanes(std::integral_constant<int, 32>());
    }
}
