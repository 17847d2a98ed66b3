// flash_attention_hopper_softmax.cuh: the online softmax of the attention forward for sm_90a, of 16 rows a warp: scores
// become P, references move, sums and what the output is divided by.
//
// A thread has two rows' scores as wgmma leaves them (ptx_hopper.cuh), four threads a row. References follow the maxima
// that matter (softmax_reference.cuh); but for those between a row's first, if that is negative, and zero, which
// integers do not put in order.
//
// Bound: the exponentials, and all else that a score costs: a conversion, a fused multiply-add, a sum, half a maximum.
// On a CPU, without CUDA, dev/test/test_hopper_softmax.cpp compiles it with a warp of its own.
#pragma once
#include <climits>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#include "ptx.cuh"
#endif
#include "softmax_reference.cuh"

// Rows of at most so many keys take EVERY_TILE, which has no branch: that costs them more than rescaling.
constexpr int EVERY_TILE_KEYS = 2048;
// ANY, which a row's first key tile and those with masks take, and rows whose references are negative: by how many
// powers of two a reference is raised at most so as not to be negative.
constexpr float MOST_RAISE = 64.0f;

// ---- a tile of scores --------------------------------------------------------------------------
// Of a thread's two rows, 8 apart.
struct SoftmaxRows {
    float reference[2] = {-INFINITY, -INFINITY};  // of q.k; the same in the four threads of a row
    float sum[2] = {0.0f, 0.0f};                  // this thread's part of the sum of P
    float rounding[2] = {0.0f, 0.0f};             // what rounding P adds to it: of rows with a single key tile
    int limit[2];                                 // WHERE_HEAVY: bits of the largest score that moves nothing
};

// The largest scores of a thread's rows.
template <int count>
__device__ __forceinline__ void find_maxima(const float (&scores)[count], float (&maximum)[2]) {
    maximum[0] = scores[0], maximum[1] = scores[2];
#pragma unroll
    for (int i = 0; i < count; ++i) {
        maximum[i / 2 % 2] = fmaxf(maximum[i / 2 % 2], scores[i]);
    }
}
// Their bits; where all are negative, those of any. As integers, floats are in order from zero up, and negative ones
// are below all of those. Three integers have a maximum in one instruction, three floats do not.
template <int count>
__device__ __forceinline__ void find_maxima(const float (&scores)[count], int (&maximum)[2]) {
    maximum[0] = maximum[1] = INT_MIN;
#pragma unroll
    for (int i = 0; i < count; i += 4) {
        maximum[0] = __vimax3_s32(maximum[0], __float_as_int(scores[i]), __float_as_int(scores[i + 1]));
        maximum[1] = __vimax3_s32(maximum[1], __float_as_int(scores[i + 2]), __float_as_int(scores[i + 3]));
    }
}

// Moves a reference. Returns the factor that the output so far is due; the row's sum has had it.
__device__ __forceinline__ float move_reference(SoftmaxRows& rows, int half, float reference, float scale_log2) {
    // -infinity - -infinity is not a number; while a row has seen no key there is nothing to multiply.
    const float factor = reference == -INFINITY ? 1.0f : exp2_approx((rows.reference[half] - reference) * scale_log2);
    rows.reference[half] = reference;
    rows.sum[half] *= factor;
    return factor;
}
// References::ANY. A maximum below zero counts for more, by a whole number of powers of two, so as not to be negative,
// if MOST_RAISE suffices. No reference is -0, whose bits are below any.
template <int count>
__device__ __forceinline__ void follow_any(const float (&scores)[count], SoftmaxRows& rows, float (&factor)[2],
                                           float scale_log2, float inverse_scale_log2) {
    float maximum[2];
    find_maxima(scores, maximum);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float m = row_max(maximum[half]);
        const float raise = ceilf(-m * scale_log2);
        if (raise > 0.0f && raise <= MOST_RAISE) {
            m = fmaxf(m + raise * inverse_scale_log2, 0.0f);
        }
        factor[half] = move_reference(rows, half, fmaxf(m, rows.reference[half]) + 0.0f, scale_log2);
    }
}
// References::EVERY_TILE.
template <int count>
__device__ __forceinline__ void follow_every_tile(const float (&scores)[count], SoftmaxRows& rows, float (&factor)[2],
                                                  float scale_log2) {
    int maximum[2];
    find_maxima(scores, maximum);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int m = row_max(max(maximum[half], __float_as_int(rows.reference[half])));
        factor[half] = move_reference(rows, half, __int_as_float(m), scale_log2);
    }
}
// rows.limit (=): as far above the references as P stays light, if the sums grow on as they have.
template <int BLOCK_N>
__device__ __forceinline__ void find_limits(SoftmaxRows& rows, float inverse_scale_log2, const KeyProgress& progress) {
    const float share = light_share<BLOCK_N>(progress);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        rows.limit[half] = __float_as_int(rows.reference[half] + light_lag(rows.sum[half], share) * inverse_scale_log2);
    }
}
// References::WHERE_HEAVY. Returns whether any reference of the warp has moved; where none has, factor is as it was.
template <int count>
__device__ __forceinline__ bool follow_heavy(const float (&scores)[count], SoftmaxRows& rows, float (&factor)[2],
                                             float scale_log2, float inverse_scale_log2, const KeyProgress& progress) {
    int maximum[2];
    find_maxima(scores, maximum);
    if (!__any_sync(FULL_WARP, maximum[0] > rows.limit[0] || maximum[1] > rows.limit[1])) {
        return false;
    }
    find_limits<2 * count>(rows, inverse_scale_log2, progress);  // those at hand are of fewer keys
    bool moves = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int m = row_max(maximum[half]);
        const bool is_heavy = m > rows.limit[half];
        factor[half] = move_reference(rows, half, is_heavy ? __int_as_float(m) : rows.reference[half], scale_log2);
        rows.limit[half] = is_heavy ? m : rows.limit[half];
        moves |= is_heavy;
    }
    return __any_sync(FULL_WARP, moves);
}

// scores become P, added to the sums. Returns whether the output so far is to be multiplied by `factor`. MASKED: rows
// may have seen no key at all.
template <bool MASKED, References REFERENCES, int count>
__device__ __forceinline__ bool softmax_tile(float (&scores)[count], SoftmaxRows& rows, float (&factor)[2],
                                             float scale_log2, float inverse_scale_log2, const KeyProgress& progress) {
    bool moves = true;
    if constexpr (REFERENCES == References::WHERE_HEAVY) {
        moves = follow_heavy(scores, rows, factor, scale_log2, inverse_scale_log2, progress);
    } else if constexpr (REFERENCES == References::EVERY_TILE) {
        follow_every_tile(scores, rows, factor, scale_log2);
    } else {
        follow_any(scores, rows, factor, scale_log2, inverse_scale_log2);
    }
    float shift[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        // A row that has seen no key yet has only scores of -infinity: any finite shift gives P = 0.
        shift[half] = MASKED && rows.reference[half] == -INFINITY ? 0.0f : rows.reference[half] * scale_log2;
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
        scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -shift[i / 2 % 2]));
        sum[i / 2 % 2] += scores[i];
    }
    rows.sum[0] += sum[0];
    rows.sum[1] += sum[1];
    return moves;
}

// rows.rounding (=), of all that was summed, which as an operand is p.
template <int steps>
__device__ __forceinline__ void find_rounding(const uint32_t (&p)[steps][4], SoftmaxRows& rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * steps; ++i) {
            const uint32_t pair = p[i / 2][i % 2 * 2 + half];
            sum += __uint_as_float(pair << 16) + __uint_as_float(pair & 0xffff0000);
        }
        rows.rounding[half] = sum - rows.sum[half];
    }
}

// ---- a whole row -------------------------------------------------------------------------------
// Of a thread's two rows, 8 apart, over the whole row: the sum of P, for lse, and what the output is divided by. Where
// there is a single key tile, that is the sum of P as they were rounded: few and large weights of a mean had better add
// up to one (error of out, T = 8192: 0.4 % less at D = 128, 0.8 % at D = 64).
struct RowTotals {
    float reference[2], sum[2], divisor[2];
};
// A whole warp calls it.
__device__ __forceinline__ RowTotals row_totals(const SoftmaxRows& rows) {
    const auto row_sum = [](float x) {
        x += __shfl_xor_sync(FULL_WARP, x, 1);
        return x + __shfl_xor_sync(FULL_WARP, x, 2);
    };
    RowTotals totals;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        totals.reference[half] = rows.reference[half];
        totals.sum[half] = row_sum(rows.sum[half]);
        totals.divisor[half] = totals.sum[half] + row_sum(rows.rounding[half]);
    }
    return totals;
}
