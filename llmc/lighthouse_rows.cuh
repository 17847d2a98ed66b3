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

// One head as a tensor of one head.
template <class Element>
__host__ __device__ HeadView<Element> head_of(HeadView<Element> view, int head) {
    view.data = view.row(0, 0, head);
    return view;
}

// q [B, *, H, D], k and v [B, *, Hkv, D] as one list of H + 2 Hkv heads, in this order.
template <class Element>
struct QkvHeads {
    HeadView<Element> q, k, v;

    __device__ HeadView<Element> head(const LighthouseShape& shape, int head) const {
        return head < shape.H ? head_of(q, head)
                              : head_of(head < shape.H + shape.Hkv ? k : v, (head - shape.H) % shape.Hkv);
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

// `count` rows from `first`, to be added up; none when count is 0.
struct RowWindow {
    const bf16* first = nullptr;
    int count = 0;
};
// Calls finish(i, sum) for every window that has rows, in order; the rows of a window are added in order. stride:
// elements between rows. The first rows of all windows are in flight together, then those of one window, CHUNK at a
// time: that hides the latency of windows of one row without starving on long ones.
template <int CHUNK, int NUM_WINDOWS, class Finish>
__device__ inline void sum_row_windows(const RowWindow (&windows)[NUM_WINDOWS], int64_t stride, Finish finish) {
    bf16x8 first[NUM_WINDOWS];
#pragma unroll
    for (int i = 0; i < NUM_WINDOWS; ++i) {
        if (windows[i].count > 0) {
            first[i] = load128(windows[i].first);
        }
    }
#pragma unroll
    for (int i = 0; i < NUM_WINDOWS; ++i) {
        if (windows[i].count == 0) {
            continue;
        }
        FloatRow sum;
        sum.add(first[i]);
        const bf16* row = windows[i].first + stride;
        for (int done = 1; done < windows[i].count; done += CHUNK) {
            bf16x8 rows[CHUNK];
#pragma unroll
            for (int c = 0; c < CHUNK; ++c) {
                rows[c] = {};
                if (done + c < windows[i].count) {
                    rows[c] = load128(row);
                    row += stride;
                }
            }
#pragma unroll
            for (int c = 0; c < CHUNK; ++c) {
                sum.add(rows[c]);
            }
        }
        finish(i, sum);
    }
}

// Tokens [begin, end) of one head: out row j (=) shared_sum plus x row positions[j], where that is not negative. The
// positions, then the rows of four tokens are in flight together.
__device__ inline void add_token_rows(const int32_t* positions, int64_t begin, int64_t end, const FloatRow& shared_sum,
                                      const HeadView<const bf16>& x, const HeadView<bf16>& out, int64_t b, int lane) {
    constexpr int CHUNK = 4;
    for (int64_t first = begin; first < end; first += CHUNK) {
        int32_t found[CHUNK];
        bf16x8 rows[CHUNK];
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            found[i] = first + i < end ? positions[first + i] : -1;
        }
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            rows[i] = {};
            if (found[i] >= 0) {
                rows[i] = load128(x.row(b, found[i], 0) + lane * 8);
            }
        }
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            if (first + i < end) {
                FloatRow sum = shared_sum;
                sum.add(rows[i]);
                store128_streaming(out.row(b, first + i, 0) + lane * 8, sum.pack());
            }
        }
    }
}

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
