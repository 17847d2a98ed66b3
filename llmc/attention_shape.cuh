// attention_shape.cuh: how attention's operands are described: where a [B, T, H, D] tensor lies, and the sizes.
#pragma once
#include <type_traits>

#include "cuda_common.cuh"

// A tensor [B, T, heads, D] anywhere in memory, D contiguous; strides in elements. Packed qkv, gathered rows and
// dilated views are all this, so attention never copies to transpose. Rows must be 16-byte aligned.
template <class Element>
struct HeadView {
    Element* data = nullptr;
    int64_t stride_b = 0;
    int64_t stride_t = 0;
    int64_t stride_h = 0;

    HeadView() = default;
    __host__ __device__ HeadView(Element* data, int64_t stride_b, int64_t stride_t, int64_t stride_h)
        : data(data), stride_b(stride_b), stride_t(stride_t), stride_h(stride_h) {}
    // A view to write to serves where one to read from is asked for.
    template <class Other, class = std::enable_if_t<std::is_convertible_v<Other*, Element*>>>
    __host__ __device__ HeadView(const HeadView<Other>& other)
        : HeadView(other.data, other.stride_b, other.stride_t, other.stride_h) {}

    __host__ __device__ Element* row(int64_t b, int64_t t, int64_t h) const {
        return data + b * stride_b + t * stride_t + h * stride_h;
    }
};

// The heads of a tensor from `head` on.
template <class Element>
__host__ __device__ HeadView<Element> heads_from(HeadView<Element> view, int head) {
    view.data = view.row(0, 0, head);
    return view;
}

// Where the gradient of k or of v goes: rounded to bf16, or in float32 where it is a part of a sum that is rounded
// later (ring attention). One of the two has no data. dk and dv of a call are of one kind.
struct KeyGradientView {
    HeadView<bf16> rounded;
    HeadView<float> whole;

    KeyGradientView(HeadView<bf16> view) : rounded(view) {}
    KeyGradientView(HeadView<float> view) : whole(view) {}
};

// Query row t sees key rows 0 .. t + causal_offset when causal (ring attention's chunks use the offset), all otherwise.
// A query that sees no key gets out = 0, lse = -infinity, and no gradient.
struct AttentionShape {
    int B = 1;           // sequences
    int H = 1;           // query heads
    int Hkv = 1;         // key/value heads; query head h reads key/value head h / (H / Hkv)
    int D = 128;         // head dim, a multiple of 8 up to 256
    int64_t Tq = 0;      // query rows, at least 1
    int64_t Tk = 0;      // key rows, at least 1
    float scale = 1.0f;  // of the scores q k^T, usually 1 / sqrt(D)
    bool causal = true;
    int64_t causal_offset = 0;
    // Other work runs beside it, transfers between GPUs or another call of attention: its blocks come and go rather
    // than stay on one multiprocessor each until the end, before which nothing else would start. Not those of backwards
    // that are much slower so, deterministic ones and short ones at D = 64 (hopper_backward_blocks).
    bool yields = false;
};
