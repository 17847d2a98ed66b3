// softmax_reference.cuh: how far the reference of a row's online softmax may lag behind the row's largest score, in
// both attention forwards.
//
// P = 2^(scale_log2 (score - reference)) is rounded to bf16 for its product with v. Where the reference is the row's
// largest score, its P is one, and exact; a power of two is as good. A reference that stays behind spares rescaling the
// output, but then the largest P, which may be most of the row's sum, is rounded too (dev/RESULTS.md, "Errors"). So
// references follow the maxima that matter: those that will weigh something in the sum of the whole row, which grows
// with the keys to come.
#pragma once
#ifdef __CUDACC__
#include "cuda_common.cuh"
#endif

// Over the four threads that have a row's scores; a whole warp calls it.
template <class Number>
__device__ __forceinline__ Number row_max(Number x) {
    x = max(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return max(x, __shfl_xor_sync(FULL_WARP, x, 2));
}

// Which scores move a row's reference.
enum class References {
    ANY,         // every maximum, whatever the scores
    EVERY_TILE,  // every maximum, by less work, of rows whose references are not negative; Hopper's kernel alone
    WHERE_HEAVY  // a maximum that will be more than LIGHT_SHARE of its row's sum
};
// A part of a row's sum that may be rounded; of fewer keys than MANY_KEYS proportionally less. With it out's error is
// cuDNN's. H200, Hopper's kernel, D = 128, T = 8192, TFLOP/s of a 64th, 96th, 128th: 714, 709, 700; no reference ever
// moved: 719.
constexpr float LIGHT_SHARE = 1.0f / 64;
constexpr int MANY_KEYS = 2048;
// By how many powers of two a score passes its reference at most.
constexpr float MOST_LAG = 8.0f;

// How many of a row's key tiles have been seen, with this one, and how many there are.
struct KeyProgress {
    int seen, all;
};

// A part of the sum so far that may be rounded, if the sum grows on as it has.
template <int TILE_KEYS>
__device__ __forceinline__ float light_share(const KeyProgress& progress) {
    const float all = (float)progress.all;
    return LIGHT_SHARE * fminf(1.0f, all * TILE_KEYS / MANY_KEYS) * __fdividef(all, (float)progress.seen);
}
// By how many powers of two a score may pass its row's reference and weigh no more than such a part. thread_sum: what
// the thread has of the row's sum; a whole warp calls it, four threads a row, and all four get the same.
__device__ __forceinline__ float light_lag(float thread_sum, float share) {
    // Near enough: the sum of the first of the four, times four.
    const float sum = 4.0f * __shfl_sync(FULL_WARP, thread_sum, threadIdx.x % WARP_SIZE / 4 * 4);
    return fminf(fmaxf(__log2f(share * sum), 0.0f), MOST_LAG);
}
