// classifier_operands.cuh: the shapes and buffers of the classifier, and how its rows are cut into chunks. Who works on
// them: classifier.cuh, classifier_hopper.cuh.
#pragma once
#include <algorithm>

#include "cuda_common.cuh"

// ---- shape -------------------------------------------------------------------------------------
constexpr size_t CLASSIFIER_CHUNK_BYTES = (size_t)2 << 30;  // of logits, by default

// The rows of weight and the columns of logits: V rounded up to a multiple of 64.
constexpr int64_t classifier_padded_vocab(int64_t V) { return round_up<int64_t>(V, 64); }

struct ClassifierShape {
    int64_t rows = 0;        // B * T
    int64_t V = 0;           // vocabulary
    int C = 0;               // width
    int64_t chunk_rows = 0;  // rows whose logits exist at a time

    int64_t padded_vocab() const { return classifier_padded_vocab(V); }
};

// Chunks of rows whose logits take at most max_bytes each, or have 128 rows.
inline int64_t classifier_num_chunks(int64_t rows, int64_t V, size_t max_bytes = CLASSIFIER_CHUNK_BYTES) {
    const int64_t most = std::max<int64_t>(128, max_bytes / (classifier_padded_vocab(V) * sizeof(bf16)) / 128 * 128);
    return ceil_div(rows, most);
}
// Rows of such a chunk: all rows, or a multiple of 128, spread evenly: with one chunk more they are fewer.
inline int64_t classifier_chunk_rows(int64_t rows, int64_t V, size_t max_bytes = CLASSIFIER_CHUNK_BYTES) {
    return std::min(rows, round_up<int64_t>(ceil_div(rows, classifier_num_chunks(rows, V, max_bytes)), 128));
}
// Bytes of the logits buffer.
inline size_t classifier_logits_bytes(const ClassifierShape& shape) {
    return (size_t)shape.chunk_rows * shape.padded_vocab() * sizeof(bf16);
}

// ---- operands ----------------------------------------------------------------------------------
// In device memory, matrices 16-byte aligned. C is a multiple of 8.
struct ClassifierOperands {
    float* losses;           // (=) [rows]
    bf16* dhidden;           // (=) [rows, C]; may be hidden
    float* dweight;          // (+=) [Vp, C]
    bf16* logits;            // [chunk_rows, Vp], of any content, and afterwards
    const bf16* hidden;      // [rows, C]
    const bf16* weight;      // [Vp, C], zero from row V on
    const int32_t* targets;  // [rows]
    float dloss;             // of each loss: loss_weight / rows for a mean
    void* scratch;           // of classifier_scratch_bytes, BUFFER_ALIGNMENT aligned

    // From row `begin` on.
    ClassifierOperands from(int64_t begin, int C) const {
        ClassifierOperands x = *this;
        x.losses += begin, x.dhidden += begin * C, x.hidden += begin * C, x.targets += begin;
        return x;
    }
};

// work(operands, shape) for each chunk, whose rows they have.
template <class Work>
inline void for_each_classifier_chunk(const ClassifierOperands& x, const ClassifierShape& shape, Work work) {
    for (int64_t begin = 0; begin < shape.rows; begin += shape.chunk_rows) {
        ClassifierShape chunk = shape;
        chunk.rows = std::min(shape.chunk_rows, shape.rows - begin);
        work(x.from(begin, shape.C), chunk);
    }
}
