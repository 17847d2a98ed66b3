// zero_layout.h: which rank holds which part of the optimizer's state (ZeRO-1, Rajbhandari et al. 2020). Arithmetic
// only.
//
// All parameters lie in one flat array. It is cut into buckets, and every bucket into one equal slice a rank: a bucket
// is what is summed over ranks in one call, as soon as the backward pass has finished its gradients, and every rank
// then updates its slice of each bucket. So communication is balanced and overlaps, and a rank's shard is its slices,
// one after the other, in the order of buckets.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"

// What the layout must know of a tensor.
struct ZeroTensor {
    int64_t num_elements = 0;
    bool decay = false;  // has weight decay
    // The backward pass runs from layer num_layers (the classifier) over num_layers - 1, ..., 0 to -1 (the embedding,
    // and what is collected to the end): after this one the gradient is final.
    int final_after = -1;
};

struct ZeroBucket {
    int64_t begin = 0;  // in the flat array
    int64_t num_elements = 0;
    bool decay = false;       // of all its tensors
    int final_after = -1;     // the last of its tensors'
    int64_t shard_begin = 0;  // of its slice, in every rank's shard
};

// Some elements of a tensor and where a rank keeps their state.
struct ZeroPiece {
    int64_t tensor_begin = 0, num_elements = 0;  // of the tensor's elements
    int64_t shard_begin = 0;
};

struct ZeroLayout {
    int num_ranks = 1;
    std::vector<int64_t> offsets;  // of each tensor, in the flat array
    std::vector<int64_t> sizes;    // of each tensor
    int64_t num_elements = 0;      // of the flat array, with padding
    std::vector<ZeroBucket> buckets;

    int64_t shard_elements() const { return num_elements / num_ranks; }
    int64_t slice_elements(const ZeroBucket& bucket) const { return bucket.num_elements / num_ranks; }
    // Where a rank's slice of a bucket begins, in the flat array.
    int64_t slice_begin(const ZeroBucket& bucket, int rank) const {
        return bucket.begin + rank * slice_elements(bucket);
    }

    // The parts of a tensor that a rank holds, in order; of all ranks together they are the tensor.
    std::vector<ZeroPiece> pieces(int tensor, int rank) const {
        std::vector<ZeroPiece> found;
        const int64_t begin = offsets[tensor], end = begin + sizes[tensor];
        for (const ZeroBucket& bucket : buckets) {
            const int64_t slice = slice_begin(bucket, rank);
            const int64_t first = std::max(begin, slice), last = std::min(end, slice + slice_elements(bucket));
            if (first < last) {
                found.push_back({first - begin, last - first, bucket.shard_begin + first - slice});
            }
        }
        return found;
    }
};

constexpr int64_t ZERO_ALIGNMENT = 128;  // elements: 256 bytes of bf16
// Buckets of layers are at least so large, if there are that many parameters: smaller sums are latency.
constexpr int64_t ZERO_BUCKET_ELEMENTS = 4 << 20;

// The layout for num_ranks ranks: tensors with weight decay first, each kind in the order given; neighbours that are
// final after the same or the next layer share a bucket until it is large enough. Every tensor begins aligned.
inline ZeroLayout make_zero_layout(const std::vector<ZeroTensor>& tensors, int num_ranks,
                                   int64_t bucket_elements = ZERO_BUCKET_ELEMENTS) {
    CHECK(num_ranks >= 1, "optimizer shards: %d ranks", num_ranks);
    ZeroLayout layout;
    layout.num_ranks = num_ranks;
    layout.offsets.resize(tensors.size());
    layout.sizes.resize(tensors.size());
    const int64_t unit = num_ranks * ZERO_ALIGNMENT;
    const auto close = [&](ZeroBucket& bucket) {
        bucket.num_elements = round_up(layout.num_elements - bucket.begin, unit);
        layout.num_elements = bucket.begin + bucket.num_elements;
        layout.buckets.push_back(bucket);
    };
    for (const bool decay : {true, false}) {
        ZeroBucket open;
        bool is_open = false;
        for (size_t i = 0; i < tensors.size(); ++i) {
            const ZeroTensor& tensor = tensors[i];
            if (tensor.decay != decay) {
                continue;
            }
            const bool other_layer = is_open && tensor.final_after != open.final_after;
            if (other_layer && (layout.num_elements - open.begin >= bucket_elements || open.final_after == -1 ||
                                tensor.final_after == -1)) {
                close(open);
                is_open = false;
            }
            if (!is_open) {
                open = {layout.num_elements, 0, decay, tensor.final_after, 0};
                is_open = true;
            }
            open.final_after = std::min(open.final_after, tensor.final_after);
            layout.offsets[i] = layout.num_elements;
            layout.sizes[i] = tensor.num_elements;
            layout.num_elements += round_up(tensor.num_elements, ZERO_ALIGNMENT);
        }
        if (is_open) {
            close(open);
        }
    }
    int64_t shard_begin = 0;
    for (ZeroBucket& bucket : layout.buckets) {
        bucket.shard_begin = shard_begin;
        shard_begin += layout.slice_elements(bucket);
    }
    return layout;
}
