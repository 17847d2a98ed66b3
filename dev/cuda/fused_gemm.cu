// fused_gemm.cu: a product and what follows it: the rotation of q and k, or the feed-forward gate, or its backward; and
// the product alone, to compare with. Bound: tensor cores, 2 M N K operations.
#include "dev/cuda/gemm_cases.cuh"
#include "dev/cuda/rope_cases.cuh"
#include "llmc/fused_gemm.cuh"
#include "llmc/reference/gemm.h"
#include "llmc/reference/swiglu.h"

// ---- problems ----------------------------------------------------------------------------------
enum class Follows { nothing, rotation, gate, gate_backward };

struct Problem {
    Follows follows;
    int64_t M, K;
    int64_t N;                 // with a gate 2F, of its backward F
    bool wants_swiglu = true;  // of a gate's backward: swiglu again
    // Of a rotation.
    int D = 0, num_rotated_heads = 0;
    ModelConfig config = {};
    RopeRotation rotation = {};

    ProductRotation rotated() const { return {D, num_rotated_heads, rotation}; }
    std::string label() const {
        std::string text = format_string("M%lld N%lld K%lld", (long long)M, (long long)N, (long long)K);
        if (follows == Follows::rotation) {
            text +=
                format_string(" D%d T%lld ", D, (long long)rotation.positions.T) + positions_label(rotation.positions);
        }
        return text + (follows == Follows::gate            ? " gate"
                       : follows != Follows::gate_backward ? ""
                       : wants_swiglu                      ? " gate backward and swiglu"
                                                           : " gate backward");
    }
};
static Problem plain_problem(int64_t M, int64_t N, int64_t K) { return {Follows::nothing, M, K, N}; }
static Problem gated_problem(int64_t M, int64_t F, int64_t K) { return {Follows::gate, M, K, 2 * F}; }
static Problem gate_backward_problem(int64_t M, int64_t F, int64_t K, bool wants_swiglu = true) {
    return {Follows::gate_backward, M, K, F, wants_swiglu};
}
static Problem rotated_problem(int64_t B, int H, int Hkv, int D, int64_t K, const RopePositions& positions) {
    Problem p = {Follows::rotation, B * positions.T, K, (int64_t)(H + 2 * Hkv) * D};
    p.D = D, p.num_rotated_heads = H + Hkv;
    p.config = rope_config(H, Hkv, D);
    p.rotation = {make_rope_frequencies(p.config), positions};
    return p;
}

// out [M, N], weight [N, K]; swiglu [M, N / 2], of a gate. Of its backward out is dgate_up [M, 2 N], swiglu [M, N] or
// scratch, in dout, weight [K, N], gate_up [M, 2 N].
struct Operands {
    bf16 *out, *swiglu;
    const bf16 *in, *weight, *gate_up = nullptr;
};
using Launcher = void (*)(Gemm& gemm, const Problem& p, const Operands& x, cudaStream_t stream);

static void follow(const Problem& p, const Operands& x, cudaStream_t stream) {
    if (p.follows == Follows::rotation) {
        rope_forward(x.out, p.M, p.num_rotated_heads, (int)p.N, p.D, p.rotation.frequencies, p.rotation.positions,
                     stream);
    } else if (p.follows == Follows::gate) {
        swiglu_forward(x.swiglu, x.out, p.M, (int)p.N / 2, stream);
    } else if (p.follows == Follows::gate_backward) {
        swiglu_backward(x.out, p.wants_swiglu ? x.swiglu : nullptr, x.swiglu, x.gate_up, p.M, (int)p.N, stream);
    }
}

// ---- 1: one thread an element, then a kernel for what follows ----------------------------------
static void fused_gemm1(Gemm&, const Problem& p, const Operands& x, cudaStream_t stream) {
    if (p.follows == Follows::gate_backward) {
        naive_gemm(GemmOperation::backward_input, x.swiglu, x.in, x.weight, p.M, p.K, p.N, false, stream);
    } else {
        naive_gemm(GemmOperation::forward, x.out, x.in, x.weight, p.M, p.N, p.K, false, stream);
    }
    follow(p, x, stream);
}

// ---- 2: cuBLASLt, the fastest of its list, then a kernel for what follows ----------------------
static void fused_gemm2(Gemm& gemm, const Problem& p, const Operands& x, cudaStream_t stream) {
    gemm.set_search(true);
    if (p.follows == Follows::gate_backward) {
        gemm.backward_input(x.swiglu, x.in, x.weight, p.M, p.K, p.N, stream);
    } else {
        gemm.forward(x.out, x.in, x.weight, nullptr, p.M, p.N, p.K, stream);
    }
    follow(p, x, stream);
}

// ---- 3: what ships, and the product alone by the same kernel ------------------------------------
static void fused_gemm3(Gemm& gemm, const Problem& p, const Operands& x, cudaStream_t stream) {
    switch (p.follows) {
        case Follows::nothing:
#ifdef LLMC_HOPPER
            if (fused_gemm_is_hopper(x.out, x.in, x.weight, p.M, p.N, p.K)) {
                return gemm_hopper_plain(x.out, x.in, x.weight, p.M, p.N, p.K, nullptr, stream);
            }
#endif
            return gemm.forward(x.out, x.in, x.weight, nullptr, p.M, p.N, p.K, stream);
        case Follows::rotation:
            return rotated_product(x.out, x.in, x.weight, p.rotated(), p.M, p.N, p.K, gemm, stream);
        case Follows::gate:
            return gated_product(x.out, x.swiglu, x.in, x.weight, p.M, p.N / 2, p.K, gemm, stream);
        case Follows::gate_backward:
            return gated_product_backward(x.out, x.swiglu, p.wants_swiglu, x.in, x.weight, x.gate_up, p.M, p.N, p.K,
                                          gemm, stream);
    }
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one thread an element, then a kernel for what follows", fused_gemm1},
    {2, "cuBLASLt with search, then a kernel for what follows", fused_gemm2},
    {3, "one kernel on sm_90a (llmc/fused_gemm.cuh)", fused_gemm3},
};

// ---- checks ------------------------------------------------------------------------------------
template <class Real>
static std::vector<Real> reference_result(const Problem& p, const std::vector<bf16>& in,
                                          const std::vector<bf16>& weight) {
    std::vector<Real> out(p.M * p.N);
    reference::gemm_forward<Real>(out.data(), convert<Real>(in).data(), convert<Real>(weight).data(), p.M, p.N, p.K,
                                  false);
    if (p.follows == Follows::rotation) {
        reference_turn(out, p.M / p.rotation.positions.T, p.rotation.positions, p.num_rotated_heads, (int)p.N, p.D,
                       rope_inverse_frequencies(p.config), false);
    }
    return out;
}

static void check_problem(Harness& h, const Variant<Launcher>& variant, Gemm& gemm, const Problem& p) {
    if (h.leaves_out(p.M * p.N * p.K / 16)) {
        return;
    }
    const int64_t F = p.N / 2;
    const std::vector<bf16> in = random_vector<bf16>(p.M * p.K, h.seed),
                            weight = random_vector<bf16>(p.N * p.K, h.seed + 1);
    const std::vector<double> expected = reference_result<double>(p, in, weight);
    DeviceBuffer<bf16> in_device(in), weight_device(weight), out(p.M * p.N), swiglu(p.M * F);
    auto launch = [&] { variant.launch(gemm, p, {out, swiglu, in_device, weight_device}, h.stream); };
    launch();
    // Tensor cores cut off rather than round when they add: one unit in the last place of the sum for every 16 terms.
    // Angles are right to 2^-21. A product rounded before it turns brings its rounding, at most six standard deviations
    // of a pair, along.
    double limit = twice_plain_error<bf16>(reference_result<float>(p, in, weight), expected) + p.K / 16 * 0x1p-23;
    if (p.follows == Follows::rotation) {
        limit += 6.0 * (0x1p-21 + unit_roundoff<bf16>());
    }
    h.compare("out", p.label(), out, expected, limit, {p.M, p.N});
    h.compare_repeats("out", p.label(), out, launch);
    if (p.follows == Follows::gate) {
        const std::vector<bf16> gate_up = out.download(), gated = swiglu.download();
        std::vector<double> expected_gated(p.M * F);
        reference::swiglu_forward<double>(expected_gated.data(), to_double(gate_up).data(), p.M, (int)F);
        // As in swiglu_forward.cu, for gates up to six standard deviations.
        const double scale = 6.0 * std::sqrt((double)p.K);
        h.compare("swiglu", p.label(), swiglu, expected_gated, unit_roundoff<bf16>() + scale * 0x1p-21, {p.M, F},
                  1e-30);
        DeviceBuffer<bf16> separate(p.M * F);
        swiglu_forward(separate, out, p.M, (int)F, h.stream);
        h.compare_exact("swiglu, as by a kernel of its own", p.label(), separate, gated);
        h.compare_repeats("swiglu", p.label(), swiglu, launch);
    }
}

// dgate_up in memory of its own, in the place of gate_up, and without swiglu.
static void check_gate_backward(Harness& h, const Variant<Launcher>& variant, Gemm& gemm, const Problem& p) {
    if (h.leaves_out(p.M * p.N * p.K / 16)) {
        return;
    }
    const int64_t F = p.N;
    const std::vector<bf16> dout = random_vector<bf16>(p.M * p.K, h.seed),
                            weight = random_vector<bf16>(p.K * F, h.seed + 1, 1.0f / std::sqrt((float)p.K)),
                            gate_up = random_vector<bf16>(p.M * 2 * F, h.seed + 2, 2.0f);
    std::vector<double> dswiglu(p.M * F), expected(p.M * 2 * F), expected_swiglu(p.M * F);
    reference::gemm_backward_input<double>(dswiglu.data(), to_double(dout).data(), to_double(weight).data(), p.M, p.K,
                                           F, false);
    reference::swiglu_backward<double>(expected.data(), dswiglu.data(), to_double(gate_up).data(), p.M, (int)F);
    reference::swiglu_forward<double>(expected_swiglu.data(), to_double(gate_up).data(), p.M, (int)F);
    DeviceBuffer<bf16> dout_device(dout), weight_device(weight), gate_up_device(gate_up), dgate_up(p.M * 2 * F),
        swiglu(p.M * F);
    auto launch = [&] {
        variant.launch(gemm, p, {dgate_up, swiglu, dout_device, weight_device, gate_up_device}, h.stream);
    };
    launch();
    // dswiglu is rounded, and what is made of it. Its own sums are off by one unit in the last place for every 16
    // terms, of sums of up to six standard deviations; an element's error is held to its size and the root mean square,
    // of which the gate's derivative, at most 1.1, and up, seven, make at most eight.
    const double limit = 8.0 * (2.0 * unit_roundoff<bf16>() + 6.0 * (double)p.K / 16 * 0x1p-23 + 0x1p-19);
    h.compare("dgate_up", p.label(), dgate_up, expected, limit, {p.M, 2 * F});
    h.compare("swiglu", p.label(), swiglu, expected_swiglu, unit_roundoff<bf16>() + 7 * 0x1p-21, {p.M, F}, 1e-30);
    h.compare_repeats("dgate_up", p.label(), dgate_up, launch);
    h.compare_repeats("swiglu", p.label(), swiglu, launch);
    const std::vector<bf16> apart = dgate_up.download();
    DeviceBuffer<bf16> alone(p.M * 2 * F);
    const Problem without = gate_backward_problem(p.M, F, p.K, false);
    variant.launch(gemm, without, {alone, swiglu, dout_device, weight_device, gate_up_device}, h.stream);
    h.compare_exact("dgate_up without swiglu", p.label(), alone, apart);
    variant.launch(gemm, p, {gate_up_device, swiglu, dout_device, weight_device, gate_up_device}, h.stream);
    h.compare_exact("dgate_up in place", p.label(), gate_up_device, apart);
}

// Offsets beyond 2^31: the last rows are looked at.
static void check_last_rows(Harness& h, const Variant<Launcher>& variant, Gemm& gemm) {
    const int64_t M = (1 << 21) + 40, F = 768, K = 64, tail = 100;
    const Problem p = gated_problem(M, F, K);
    DeviceBuffer<bf16> in(M * K), weight(p.N * K), out(M * p.N), swiglu(M * F);
    in.fill_random(h.seed);
    weight.fill_random(h.seed + 1);
    variant.launch(gemm, p, {out, swiglu, in, weight}, h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    std::vector<double> expected(tail * p.N), expected_gated(tail * F);
    reference::gemm_forward<double>(expected.data(), to_double(in.download((M - tail) * K, tail * K)).data(),
                                    to_double(weight.download()).data(), tail, p.N, K, false);
    const std::vector<bf16> last = out.download((M - tail) * p.N, tail * p.N);
    h.compare("out", p.label() + " last rows", last, expected, unit_roundoff<bf16>() + 1e-5, {tail, p.N});
    reference::swiglu_forward<double>(expected_gated.data(), to_double(last).data(), tail, (int)F);
    h.compare("swiglu", p.label() + " last rows", swiglu.download((M - tail) * F, tail * F), expected_gated,
              unit_roundoff<bf16>() + 48 * 0x1p-21, {tail, F}, 1e-30);
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    GemmWithWorkspace gemm;
    for (const auto& [M, N, K] : {std::array<int64_t, 3>{1, 8, 8},
                                  {7, 72, 40},
                                  {7, 8, 264},  // a ring of stages is used again
                                  {333, 200, 136},
                                  {1000, 1024, 256},
                                  {40001, 16, 24},
                                  {2500, 2560, 192}}) {
        check_problem(h, variant, gemm, plain_problem(M, N, K));
        check_problem(h, variant, gemm, gated_problem(M, N, K));
        check_gate_backward(h, variant, gemm, gate_backward_problem(M, N, K));
    }
    // T that is no multiple of 64, and D that is neither 64 nor 128, are for the kernels of their own.
    for (const Problem& p :
         {rotated_problem(1, 1, 1, 64, 8, rope_one_run(64, 5)), rotated_problem(1, 1, 1, 128, 8, rope_one_run(64, 5)),
          rotated_problem(2, 4, 2, 64, 136, rope_one_run(1024)),
          rotated_problem(3, 3, 1, 128, 200, {576, 256, {1040000, 7000}}),
          rotated_problem(1, 8, 8, 128, 512, rope_one_run(2112, 1 << 24)),
          rotated_problem(2, 5, 5, 64, 72, rope_one_run(264)),
          rotated_problem(2, 2, 1, 128, 64, rope_one_run(77, 12345)),
          rotated_problem(1, 3, 1, 24, 64, rope_one_run(128))}) {
        check_problem(h, variant, gemm, p);
    }
    if (variant.number != 1 && !h.small) {
        check_last_rows(h, variant, gemm);
    }
}

// ---- timings -----------------------------------------------------------------------------------
static void measure(Harness& h, const Variant<Launcher>& variant) {
    if (variant.number == 1) {
        return;  // minutes
    }
    GemmWithWorkspace gemm;
    struct Case {
        const char* what;
        Problem problem;
    };
    const Case cases[] = {
        {"530M qkv", plain_problem(98304, 3072, 1024)},
        {"530M qkv", rotated_problem(1, 8, 8, 128, 1024, rope_one_run(98304))},
        {"530M qkv", rotated_problem(4, 8, 8, 128, 1024, rope_one_run(8192))},
        {"530M gate_up", gated_problem(98304, 1536, 1024)},
        {"530M gate_up", gated_problem(32768, 1536, 1024)},
        {"530M down, input", gate_backward_problem(98304, 1536, 1024)},
        {"530M down, input", gate_backward_problem(98304, 1536, 1024, false)},
        {"530M down, input", gate_backward_problem(32768, 1536, 1024)},
        {"530M down, input", gate_backward_problem(32768, 1536, 1024, false)},
        {"124M qkv", plain_problem(65536, 2304, 768)},
        {"124M qkv", rotated_problem(64, 12, 12, 64, 768, rope_one_run(1024))},
        {"124M gate_up", gated_problem(65536, 2048, 768)},
        {"124M down, input", gate_backward_problem(65536, 2048, 768)},
        {"124M down, input", gate_backward_problem(65536, 2048, 768, false)},
        {"8B qkv", rotated_problem(1, 32, 8, 128, 4096, rope_one_run(32768))},
        {"8B gate_up", gated_problem(32768, 14336, 4096)},
        {"8B down, input", gate_backward_problem(32768, 14336, 4096)},
        {"8B down, input", gate_backward_problem(32768, 14336, 4096, false)},
    };
    for (const auto& [what, p] : cases) {
        const bool gates = p.follows == Follows::gate, backward = p.follows == Follows::gate_backward;
        DeviceBuffer<bf16> in(p.M * p.K), weight(p.N * p.K), out(p.M * p.N * (backward ? 2 : 1)),
            swiglu(gates      ? p.M * p.N / 2
                   : backward ? p.M * p.N
                              : 8),
            gate_up(backward ? p.M * 2 * p.N : 8);
        gate_up.fill_random(h.seed + 2);
        in.fill_random(h.seed);
        weight.fill_random(h.seed + 1, 1.0f / std::sqrt((float)p.K));
        h.measure_flops(what + (" " + p.label()), 2.0 * p.M * p.N * p.K, 0.0, variant.idea, [&, &p = p] {
            variant.launch(gemm, p, {out, swiglu, in, weight, gate_up}, h.stream);
        });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "fused_gemm", VARIANTS, check, measure); }
