// context_parts.h: the parts in which attention over several ranks takes a batch, one after another, so that scratch
// memory is that of a few of them (ring_attention.cuh, head_attention.cuh). A part is as few sequences as have
// part_keys keys together; of longer sequences it is one and, with its queries, as few of its key/value heads as have
// so many and divide all. Arithmetic only: no CUDA.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"

// Shape: AttentionShape, of attention_shape.cuh or of the reference.
template <class Shape>
struct ContextPart {
    Shape shape;
    int b, head, kv_head;  // where it begins: its first sequence, query head and key/value head
    int64_t lse_begin;     // the same in lse [B, H, Tq]

    // Of what belongs to the whole batch, from the part's begin on.
    template <class View>
    View queries(View view) const {
        view.data = view.row(b, 0, head);
        return view;
    }
    template <class View>
    View keys(View view) const {
        view.data = view.row(b, 0, kv_head);
        return view;
    }
    template <class Float>
    Float* lse(Float* of_all) const {
        return of_all + lse_begin;
    }
};

template <class Shape>
class ContextParts {
  public:
    // whole: sequences and heads that are to be taken. rows: of each sequence and head, how many keys count.
    ContextParts(const Shape& whole, int64_t rows, int64_t part_keys) : whole_(whole), largest_(whole) {
        largest_.B = (int)std::min<int64_t>(whole.B, ceil_div(part_keys, whole.Hkv * rows));
        if (whole.Hkv * rows >= part_keys) {
            largest_.Hkv = (int)ceil_div(part_keys, rows);
            while (whole.Hkv % largest_.Hkv != 0) {
                ++largest_.Hkv;
            }
            largest_.H = whole.H / whole.Hkv * largest_.Hkv;
        }
    }

    // The last parts may have fewer sequences. With fewer sequences in all it is no larger.
    const Shape& largest() const { return largest_; }
    int64_t count() const { return (int64_t)ceil_div(whole_.B, largest_.B) * (whole_.Hkv / largest_.Hkv); }
    // A number that is never smaller for longer sequences; where it is the same, so are the heads and sequences of
    // every part. (Count alone does not see that the largest part has fewer sequences: of five, four and one, then
    // three and two.)
    int64_t pace() const { return count() + whole_.B - largest_.B; }
    // In their order.
    std::vector<ContextPart<Shape>> all() const {
        std::vector<ContextPart<Shape>> parts;
        Shape shape = largest_;
        for (int b = 0; b < whole_.B; b += largest_.B) {
            shape.B = std::min(largest_.B, whole_.B - b);
            for (int kv_head = 0; kv_head < whole_.Hkv; kv_head += shape.Hkv) {
                const int head = whole_.H / whole_.Hkv * kv_head;
                parts.push_back({shape, b, head, kv_head, ((int64_t)b * whole_.H + head) * whole_.Tq});
            }
        }
        return parts;
    }

  private:
    Shape whole_, largest_;
};
