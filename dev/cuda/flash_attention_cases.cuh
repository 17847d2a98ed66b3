// flash_attention_cases.cuh: what the checks of every attention kernel share: shapes that hurt, packed and guarded
// operands, the exact result, and the error a kernel may make.
//
// The limit of an output is twice the error that a plain implementation makes against float64 when it rounds to bf16
// what any kernel on bf16 tensor cores rounds (P, dS, and the outputs) and nothing else: attention_truth with
// `rounded`. To it come what only float32 scores cost: a score of magnitude s is off by about 2^-22 s (products are
// exact, the sum of D of them and the scaling are not), which is the relative error of its P. An error counts relative
// to the element plus the output's root mean square, and never is less than one rounding allowed.
#pragma once
#include <memory>

#include "attention_truth.cuh"
#include "llmc/gpu_properties.cuh"
#include "llmc/reference/attention.h"

// dominant: one key that every query that sees it attends to. below: negative scores, those of the second half of the
// keys so far below zero that powers of two of what the others are above them overflow.
enum class Scores { ordinary, large, dominant, below };

struct AttentionCase {
    AttentionShape shape;
    Scores scores = Scores::ordinary;

    std::string label() const {
        const AttentionShape& s = shape;
        const std::string mask = s.causal ? format_string("causal%+lld", (long long)s.causal_offset) : "full";
        const char* kinds[] = {"", " large scores", " dominant key", " scores below zero"};
        return format_string("B%d T%lldx%lld H%d/%d D%d %s%s", s.B, (long long)s.Tq, (long long)s.Tk, s.H, s.Hkv, s.D,
                             mask.c_str(), kinds[(int)scores]);
    }
};

inline AttentionCase attention_case(int B, int64_t Tq, int64_t Tk, int H, int Hkv, int D, bool causal = true,
                                    int64_t causal_offset = 0, Scores scores = Scores::ordinary) {
    return {{B, H, Hkv, D, Tq, Tk, 1.0f / std::sqrt((float)D), causal, causal_offset}, scores};
}

inline std::vector<AttentionCase> attention_cases() {
    std::vector<AttentionCase> cases;
    const int heads[][2] = {{4, 2}, {3, 1}, {2, 2}, {8, 1}};
    int i = 0;
    for (const int D : {64, 128, 8, 40, 72, 96, 160, 192, 256}) {
        for (const int64_t T : {1, 17, 127, 128, 129, 1000}) {
            const auto& [H, Hkv] = heads[i++ % 4];
            if (D == 64 || D == 128 || (T == 17 || T == 129 || T == 1000)) {
                cases.push_back(attention_case(T < 1000 ? 2 : 1, T, T, H, Hkv, D));
            }
        }
    }
    for (const int D : {64, 128, 72, 256}) {
        cases.push_back(attention_case(2, 129, 300, 4, 2, D, true, 171));    // the last queries of a sequence
        cases.push_back(attention_case(2, 300, 129, 2, 1, D, true, -150));   // rows, and whole tiles, that see nothing
        cases.push_back(attention_case(1, 200, 333, 2, 2, D, true, -1000));  // nobody sees anything
        // Of the first row of a tile just the last key of a tile of 64 or of 128 is masked.
        cases.push_back(attention_case(1, 200, 262, 2, 1, D, true, 62));
        cases.push_back(attention_case(1, 200, 326, 2, 1, D, true, 126));
        cases.push_back(attention_case(2, 77, 500, 2, 1, D, false));
        cases.push_back(attention_case(1, 100, 63, 2, 1, D, false));  // tiles that lack one key
        cases.push_back(attention_case(1, 100, 127, 2, 1, D, false));
        cases.push_back(attention_case(1, 500, 3, 2, 2, D, false));
        cases.push_back(attention_case(1, 1, 700, 4, 1, D, true, 699));
        cases.push_back(attention_case(1, 333, 333, 2, 1, D, true, 0, Scores::large));
        cases.push_back(attention_case(1, 333, 333, 2, 1, D, true, 0, Scores::dominant));
    }
    // The Hopper forward's tiles with --small (hopper_forward_tile): on 3 multiprocessors those of 192 and of 256 rows,
    // with a second one for a block; on any those of 64 rows whose consumers take several key tiles each.
    cases.push_back(attention_case(1, 769, 769, 1, 1, 64));
    cases.push_back(attention_case(1, 193, 513, 4, 2, 64, true, 320));
    cases.push_back(attention_case(1, 64, 194, 1, 1, 64, true, 130));
    cases.push_back(attention_case(1, 64, 300, 2, 1, 128, true, 236));
    cases.push_back(attention_case(1, 333, 333, 1, 1, 128, true, 0, Scores::large));
    cases.push_back(attention_case(1, 333, 333, 1, 1, 128, true, 0, Scores::dominant));
    // On an H200 a second wave of tiles beside the first (TileOrder), of 64 rows and of 128.
    cases.push_back(attention_case(2, 775, 775, 10, 5, 64));
    cases.push_back(attention_case(1, 4097, 4097, 2, 1, 128));
    cases.push_back(attention_case(1, 4097, 4097, 2, 1, 64));
    return cases;
}

// Those, and what makes a difference to the forward alone. (Of many queries that all attend to one key, that key's
// gradient is what their roundings leave of almost nothing: its error may be several times a plain implementation's.)
inline std::vector<AttentionCase> forward_attention_cases() {
    std::vector<AttentionCase> cases = attention_cases();
    for (const int D : {64, 128, 72, 256}) {
        cases.push_back(attention_case(1, 333, 333, 2, 1, D, true, 0, Scores::below));
    }
    // The Hopper forward's tiles with more than EVERY_TILE_KEYS keys: on 3 multiprocessors those of 256 rows, of 192
    // and, of 128 keys, with two and three consumers; on others those of 64 rows.
    cases.push_back(attention_case(1, 65, 2113, 4, 2, 64, true, 2048));
    cases.push_back(attention_case(1, 65, 2113, 4, 2, 128, true, 2048));
    for (const Scores scores : {Scores::ordinary, Scores::below, Scores::large, Scores::dominant}) {
        const int Hkv = scores == Scores::ordinary || scores == Scores::below ? 1 : 4;  // the others not with --small
        cases.push_back(attention_case(1, 193, 2241, 2 * Hkv, Hkv, 64, true, 2048, scores));
        cases.push_back(attention_case(1, 129, 2177, 4 * Hkv, Hkv, 128, true, 2048, scores));
    }
    cases.push_back(attention_case(1, 2112, 2112, 16, 16, 64));  // and, on an H200, D = 64's one consumer
    return cases;
}

// While it lives, launchers see a GPU of 3 multiprocessors: blocks that stay take many tiles each, of several groups of
// heads, of cases small enough to be checked as a whole.
struct FewMultiprocessors {
    static constexpr int NUM = 3;
    const int before = most_gpu_properties().num_sms;
    FewMultiprocessors() { most_gpu_properties().num_sms = NUM; }
    ~FewMultiprocessors() { most_gpu_properties().num_sms = before; }
    FewMultiprocessors(const FewMultiprocessors&) = delete;
    FewMultiprocessors& operator=(const FewMultiprocessors&) = delete;

    static constexpr const char* LABEL = ", 3 multiprocessors";
    // Whether a case has more tiles of 192 rows than that, and this GPU more multiprocessors.
    static bool concern(const AttentionShape& s) {
        return s.B * s.H * ceil_div<int64_t>(s.Tq, 192) > NUM && gpu_properties().num_sms > NUM;
    }
};

// Views of [B, T, H + 2 Hkv, D] packed rows: operands as the fused projection leaves them. T: max(Tq, Tk).
struct PackedViews {
    HeadView<bf16> q, k, v;
};
inline int64_t packed_width(const AttentionShape& s) { return (int64_t)(s.H + 2 * s.Hkv) * s.D; }
inline int64_t packed_elements(const AttentionShape& s) { return s.B * std::max(s.Tq, s.Tk) * packed_width(s); }
inline PackedViews packed_views(bf16* data, const AttentionShape& s) {
    const int64_t stride_t = packed_width(s), stride_b = std::max(s.Tq, s.Tk) * stride_t;
    auto view = [&](int64_t first_head) { return HeadView<bf16>(data + first_head * s.D, stride_b, stride_t, s.D); };
    return {view(0), view(s.H), view(s.H + s.Hkv)};
}
// [B, Tq, H, D], contiguous but for 8 elements between rows, which a kernel must leave alone.
inline int64_t padded_elements(const AttentionShape& s) { return s.B * s.Tq * ((int64_t)s.H * s.D + 8); }
inline HeadView<bf16> padded_view(bf16* data, const AttentionShape& s) {
    const int64_t stride_t = (int64_t)s.H * s.D + 8;
    return HeadView<bf16>(data, s.Tq * stride_t, stride_t, s.D);
}

// Reads [B, T, heads, D] out of a downloaded buffer that starts at `data`, marking what was read.
inline std::vector<bf16> read_view(const std::vector<bf16>& buffer, const bf16* data, HeadView<bf16> view, int B,
                                   int64_t T, int heads, int D, std::vector<char>* read) {
    std::vector<bf16> values;
    values.reserve(B * T * heads * D);
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t t = 0; t < T; ++t) {
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t at = view.row(b, t, h) - data;
                values.insert(values.end(), buffer.begin() + at, buffer.begin() + at + D);
                std::fill_n(read->begin() + at, D, 1);
            }
        }
    }
    return values;
}
// Whether everything that was not read still holds the poison.
inline bool rest_untouched(const std::vector<bf16>& buffer, const std::vector<char>& read) {
    for (size_t i = 0; i < buffer.size(); ++i) {
        uint16_t bits;
        std::memcpy(&bits, &buffer[i], sizeof bits);
        if (!read[i] && bits != 0xffff) {
            return false;
        }
    }
    return true;
}

// A case with its operands on the device and what should come out of them.
struct PreparedCase {
    AttentionCase attention_case;
    std::unique_ptr<DeviceBuffer<bf16>> qkv, dout;
    AttentionTruth exact, rounded;
    double max_score = 0.0;  // bound on |scale q.k|

    const AttentionShape& shape() const { return attention_case.shape; }
    PackedViews operands() const { return packed_views(*qkv, shape()); }
    HeadView<bf16> dout_view() const { return padded_view(*dout, shape()); }

    // See the head of this file. `expected` and `plain` are the two results; result_floor: added to the root mean
    // square.
    double limit(const std::vector<double>& expected, const std::vector<double>& plain, double floor) const {
        const std::vector<bf16> plain_bf16 = convert<bf16>(convert<float>(plain));
        const double plain_error = difference(plain_bf16, expected, floor).max_error;
        return 2.0 * std::max(plain_error, unit_roundoff<bf16>()) + max_score * 0x1p-22;
    }
    // The error floor: gradients through the softmax are differences that may cancel to nothing (with one key they are
    // zero), so an eighth of a bf16 rounding of what was subtracted always is allowed for. v, k, dout have variance 1.
    double gradient_floor(const std::vector<double>& expected) const {
        return root_mean_square(expected) + std::sqrt((double)shape().D) * shape().scale / 256.0;
    }
};

inline PreparedCase prepare_case(const AttentionCase& c, uint64_t seed) {
    const AttentionShape& s = c.shape;
    PreparedCase prepared;
    prepared.attention_case = c;
    constexpr float BELOW = 48.0f;  // its square, scaled, is 200 and more up to D = 128
    const float q_scale = c.scores == Scores::large ? 300.0f : 1.0f;
    std::vector<bf16> qkv = random_vector<bf16>(packed_elements(s), seed);
    const PackedViews views = packed_views(qkv.data(), s);
    for (int64_t b = 0; b < s.B; ++b) {
        for (int64_t t = 0; t < s.Tq; ++t) {
            for (int64_t h = 0; h < s.H; ++h) {
                for (int d = 0; d < s.D; ++d) {
                    bf16& q = views.q.row(b, t, h)[d];
                    q = __float2bfloat16(__bfloat162float(q) * q_scale + (c.scores == Scores::dominant ? 1.0f : 0.0f));
                }
            }
        }
        if (c.scores == Scores::below) {
            for (int64_t t = 0; t < s.Tq; ++t) {
                for (int64_t h = 0; h < s.H; ++h) {
                    views.q.row(b, t, h)[0] = __float2bfloat16(-BELOW);
                }
            }
            for (int64_t t = 0; t < s.Tk; ++t) {
                for (int64_t h = 0; h < s.Hkv; ++h) {
                    views.k.row(b, t, h)[0] = __float2bfloat16(t < s.Tk / 2 ? 1.0f : BELOW);
                }
            }
        }
        if (c.scores == Scores::dominant) {
            for (int64_t h = 0; h < s.Hkv; ++h) {
                for (int d = 0; d < s.D; ++d) {
                    views.k.row(b, s.Tk / 3, h)[d] = __float2bfloat16(12.0f / std::sqrt((float)s.D));
                }
            }
        }
    }
    prepared.max_score = s.scale * (s.D * q_scale * 3.0 + (c.scores == Scores::below ? BELOW * BELOW : 0.0));
    prepared.qkv = std::make_unique<DeviceBuffer<bf16>>(qkv);
    prepared.dout = std::make_unique<DeviceBuffer<bf16>>(random_vector<bf16>(padded_elements(s), seed + 1));
    const PackedViews operands = prepared.operands();
    for (const bool rounded : {false, true}) {
        (rounded ? prepared.rounded : prepared.exact) =
            attention_truth(operands.q, operands.k, operands.v, prepared.dout_view(), s, rounded);
    }
    return prepared;
}
// The cases, or with --small those of few elements, each head dim among them.
inline std::vector<PreparedCase> prepare_cases(const Harness& h, const std::vector<AttentionCase>& cases) {
    std::vector<PreparedCase> prepared;
    for (const AttentionCase& c : cases) {
        if (!h.leaves_out(c.shape.B * c.shape.Tq * c.shape.H * c.shape.D)) {
            prepared.push_back(prepare_case(c, h.seed));
        }
    }
    return prepared;
}

// ---- the truth ---------------------------------------------------------------------------------
// attention_truth against the CPU reference in double: all that kernels are compared with rests on it. Small enough for
// --small.
//
// Both round to double, in other orders. Partial sums of D products of numbers of variance one grow to sqrt(D), and D
// roundings of them, each of up to u = 2^-53, add up to about u D: so much an element of dP and delta are off. A
// gradient is off by that times scale, as the P that it is weighted with adds up to one, and counts relative to at
// least gradient_floor's sqrt(D) scale / 256: 256 u sqrt(D). What P is off by is less: a score of size one by u
// sqrt(D). 32 times that, for two sides, sums over the queries of a group, and the worst of some ten thousand elements.
// A float anywhere costs 2^-24, thousands of times the limit.
inline void check_attention_truth(Harness& h) {
    for (const AttentionCase& c :
         {attention_case(1, 129, 300, 4, 2, 64, true, 171),  // more keys than a block of the truth has threads
          attention_case(1, 170, 33, 2, 1, 40, true, -150),  // rows that see nothing
          attention_case(1, 20, 33, 2, 2, 64, true, -1000),  // nobody sees anything
          attention_case(2, 77, 50, 2, 1, 128, false), attention_case(1, 65, 65, 8, 1, 128),
          attention_case(2, 1, 1, 2, 1, 64)}) {
        const PreparedCase prepared = prepare_case(c, h.seed);
        const AttentionShape& s = c.shape;
        const std::vector<double> qkv = to_double(prepared.qkv->download()),
                                  dout = to_double(prepared.dout->download());
        // The same place in the copy.
        auto copied = [](const std::vector<double>& rows, const bf16* data, HeadView<const bf16> view) {
            return reference::View<const double>(rows.data() + (view.data - data), view.stride_b, view.stride_t,
                                                 view.stride_h);
        };
        const PackedViews in = prepared.operands();
        const auto q = copied(qkv, *prepared.qkv, in.q), k = copied(qkv, *prepared.qkv, in.k),
                   v = copied(qkv, *prepared.qkv, in.v), dout_view = copied(dout, *prepared.dout, prepared.dout_view());
        auto contiguous = [&](std::vector<double>& rows, int64_t T, int heads) {
            rows.assign(s.B * T * heads * s.D, NAN);
            return reference::View<double>(rows.data(), T * heads * s.D, (int64_t)heads * s.D, s.D);
        };
        AttentionTruth expected;
        const auto out = contiguous(expected.out, s.Tq, s.H), dq = contiguous(expected.dq, s.Tq, s.H),
                   dk = contiguous(expected.dk, s.Tk, s.Hkv), dv = contiguous(expected.dv, s.Tk, s.Hkv);
        expected.lse.assign(s.B * s.H * s.Tq, NAN);
        const reference::AttentionShape shape{s.B, s.H, s.Hkv, s.D, s.Tq, s.Tk, s.scale, s.causal, s.causal_offset};
        reference::attention_forward<double>(out, expected.lse.data(), q, k, v, shape);
        reference::attention_backward<double>(dq, dk, dv, dout_view, q, k, v, out, expected.lse.data(), shape);

        const double limit = 0x1p-40 * std::sqrt((double)s.D);
        const AttentionTruth& truth = prepared.exact;
        h.compare("truth out", c.label(), truth.out, expected.out, limit, {s.B, s.Tq, s.H, s.D});
        h.compare("truth lse", c.label(), truth.lse, expected.lse, limit, {s.B, s.H, s.Tq}, 1.0);
        auto compare_gradient = [&](const char* name, const std::vector<double>& actual,
                                    const std::vector<double>& right, int64_t T, int heads) {
            h.compare(name, c.label(), actual, right, limit, {s.B, T, heads, s.D}, prepared.gradient_floor(right));
        };
        compare_gradient("truth dq", truth.dq, expected.dq, s.Tq, s.H);
        compare_gradient("truth dk", truth.dk, expected.dk, s.Tk, s.Hkv);
        compare_gradient("truth dv", truth.dv, expected.dv, s.Tk, s.Hkv);
    }
}

// ---- timing ------------------------------------------------------------------------------------
// Shapes timed, causal: short sequences in a batch, then ever longer ones.
inline std::vector<AttentionShape> attention_timings() {
    std::vector<AttentionShape> shapes;
    for (const int D : {128, 64}) {
        for (const int64_t T : {1024, 8192, 32768, 131072, 524288}) {
            shapes.push_back({T == 1024 ? 32 : 1, 8, 8, D, T, T, 1.0f / std::sqrt((float)D), true, 0});
        }
    }
    return shapes;
}
// Products of a causal forward; the backward has 2.5 times as many.
inline double attention_flops(const AttentionShape& s) { return 2.0 * s.B * s.H * s.D * (double)s.Tq * (double)s.Tk; }
// Dense bf16 peak of the GPUs whose data sheets were read; 0 for others.
inline double peak_bf16_tflops() {
    int device;
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    const std::string name = properties.name;
    return name.find("H200") != std::string::npos || name.find("H100 80GB HBM3") != std::string::npos ? 989.4
           : name.find("A100") != std::string::npos                                                   ? 312.0
                                                                                                      : 0.0;
}
