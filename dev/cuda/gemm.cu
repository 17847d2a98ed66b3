// gemm.cu: the three products of a linear layer. Bound: tensor cores, 2 M N K operations each.
#include "dev/cuda/gemm_cases.cuh"
#include "llmc/reference/gemm.h"

// One product; out is bf16, or float for backward_weight; a and b as Gemm's arguments.
using Launcher = void (*)(Gemm& gemm, GemmOperation operation, void* out, const bf16* a, const bf16* b, int64_t M,
                          int64_t N, int64_t K, bool accumulate, cudaStream_t stream);

// ---- 1: one thread an element of the result ----------------------------------------------------
static void gemm1(Gemm&, GemmOperation operation, void* out, const bf16* a, const bf16* b, int64_t M, int64_t N,
                  int64_t K, bool accumulate, cudaStream_t stream) {
    naive_gemm(operation, out, a, b, M, N, K, accumulate, stream);
}

// ---- 2, 3: cuBLASLt ----------------------------------------------------------------------------
static void gemm2(Gemm& gemm, GemmOperation operation, void* out, const bf16* a, const bf16* b, int64_t M, int64_t N,
                  int64_t K, bool accumulate, cudaStream_t stream) {
    switch (operation) {
        case GemmOperation::forward:
            gemm.forward((bf16*)out, a, b, accumulate ? (bf16*)out : nullptr, M, N, K, stream);
            break;
        case GemmOperation::backward_input:
            gemm.backward_input((bf16*)out, a, b, M, N, K, stream);
            break;
        case GemmOperation::backward_weight:
            gemm.backward_weight((float*)out, a, b, M, N, K, accumulate, stream);
            break;
    }
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "one thread an element of the result", gemm1},
    {2, "cuBLASLt, the first algorithm of its list (llmc/gemm.cuh)", gemm2},
    {3, "cuBLASLt, the fastest of its list (llmc/gemm.cuh with search)", gemm2},
};
constexpr int SEARCH_VARIANT = 3;

static const char* operation_name(GemmOperation operation) {
    return operation == GemmOperation::forward          ? "forward"
           : operation == GemmOperation::backward_input ? "backward_input"
                                                        : "backward_weight";
}
static const GemmOperation OPERATIONS[] = {GemmOperation::forward, GemmOperation::backward_input,
                                           GemmOperation::backward_weight};

// Elements of a, b and the result.
struct OperandSizes {
    int64_t a, b, out;
    OperandSizes(GemmOperation operation, int64_t M, int64_t N, int64_t K) {
        a = operation == GemmOperation::forward ? M * K : M * N;
        b = operation == GemmOperation::backward_weight ? M * K : N * K;
        out = operation == GemmOperation::forward ? M * N : operation == GemmOperation::backward_input ? M * K : N * K;
    }
};

template <class Real>
static void reference_product(GemmOperation operation, std::vector<Real>& out, const std::vector<Real>& a,
                              const std::vector<Real>& b, int64_t M, int64_t N, int64_t K, bool accumulate) {
    switch (operation) {
        case GemmOperation::forward:
            reference::gemm_forward<Real>(out.data(), a.data(), b.data(), M, N, K, accumulate);
            break;
        case GemmOperation::backward_input:
            reference::gemm_backward_input<Real>(out.data(), a.data(), b.data(), M, N, K, accumulate);
            break;
        case GemmOperation::backward_weight:
            reference::gemm_backward_weight<Real>(out.data(), a.data(), b.data(), M, N, K, accumulate);
            break;
    }
}

template <class Element>
static void check_product(Harness& h, const Variant<Launcher>& variant, Gemm& gemm, GemmOperation operation, int64_t M,
                          int64_t N, int64_t K, bool accumulate) {
    const OperandSizes sizes(operation, M, N, K);
    const std::string label = format_string("M%lld N%lld K%lld%s bf16", (long long)M, (long long)N, (long long)K,
                                            accumulate ? " accumulate" : "");
    const std::vector<bf16> a = random_vector<bf16>(sizes.a, h.seed), b = random_vector<bf16>(sizes.b, h.seed + 1);
    const std::vector<Element> initial = random_vector<Element>(sizes.out, h.seed + 2);
    std::vector<double> expected = to_double(initial);
    std::vector<float> plain = convert<float>(initial);
    reference_product<double>(operation, expected, to_double(a), to_double(b), M, N, K, accumulate);
    reference_product<float>(operation, plain, convert<float>(a), convert<float>(b), M, N, K, accumulate);
    DeviceBuffer<bf16> a_device(a), b_device(b);
    DeviceBuffer<Element> out(sizes.out);
    auto launch = [&] {
        if (accumulate) {
            out.upload(initial);
            CUDA_CHECK(cudaDeviceSynchronize());
        }
        variant.launch(gemm, operation, out.data(), a_device, b_device, M, N, K, accumulate, h.stream);
    };
    gemm.set_search(variant.number == SEARCH_VARIANT);
    launch();  // after the search, if any, which leaves the operands as they were
    // Tensor cores cut off rather than round when they add: one unit in the last place of the sum for every 16 terms.
    const int64_t depth = operation == GemmOperation::forward ? K : operation == GemmOperation::backward_input ? N : M;
    const double limit = twice_plain_error<Element>(plain, expected) + (double)depth / 16 * 0x1p-23;
    h.compare(operation_name(operation), label, out, expected, limit,
              {(int64_t)sizes.out / (operation == GemmOperation::forward ? N : K),
               operation == GemmOperation::forward ? N : K});
    h.compare_repeats(operation_name(operation), label, out, launch);
}

// The addend in memory of its own: it stays as it was.
static void check_other_addend(Harness& h, const Variant<Launcher>& variant, Gemm& gemm, int64_t M, int64_t N,
                               int64_t K) {
    const std::string label =
        format_string("M%lld N%lld K%lld other addend bf16", (long long)M, (long long)N, (long long)K);
    const std::vector<bf16> in = random_vector<bf16>(M * K, h.seed), weight = random_vector<bf16>(N * K, h.seed + 1);
    const std::vector<bf16> initial = random_vector<bf16>(M * N, h.seed + 2);
    std::vector<double> expected = to_double(initial);
    std::vector<float> plain = convert<float>(initial);
    reference_product<double>(GemmOperation::forward, expected, to_double(in), to_double(weight), M, N, K, true);
    reference_product<float>(GemmOperation::forward, plain, convert<float>(in), convert<float>(weight), M, N, K, true);
    DeviceBuffer<bf16> in_device(in), weight_device(weight), addend(initial), out(M * N);
    gemm.set_search(variant.number == SEARCH_VARIANT);
    auto launch = [&] { gemm.forward(out, in_device, weight_device, addend, M, N, K, h.stream); };
    launch();
    const double limit = twice_plain_error<bf16>(plain, expected) + (double)K / 16 * 0x1p-23;
    h.compare("forward", label, out, expected, limit, {M, N});
    h.compare_exact("addend", label, addend, initial);
    h.compare_repeats("forward", label, out, launch);
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    GemmWithWorkspace gemm;
    struct Case {
        int64_t M, N, K;
    };
    for (const Case& c :
         {Case{1, 8, 8}, Case{7, 72, 40}, Case{333, 200, 136}, Case{1000, 1024, 256}, Case{40001, 16, 24}}) {
        if (h.leaves_out(c.M * c.N * c.K / 16)) {
            continue;
        }
        for (bool accumulate : {false, true}) {
            check_product<bf16>(h, variant, gemm, GemmOperation::forward, c.M, c.N, c.K, accumulate);
            check_product<float>(h, variant, gemm, GemmOperation::backward_weight, c.M, c.N, c.K, accumulate);
        }
        check_product<bf16>(h, variant, gemm, GemmOperation::backward_input, c.M, c.N, c.K, false);
        if (variant.number != 1) {
            check_other_addend(h, variant, gemm, c.M, c.N, c.K);
        }
    }
    if (variant.number == 1 || h.small) {
        return;
    }
    // Offsets beyond 2^31: more than two million rows of 1536; the last rows are looked at.
    const int64_t M = (1 << 21) + 40, N = 1536, K = 64, tail = 100;
    DeviceBuffer<bf16> in(M * K), weight(N * K), out(M * N);
    in.fill_random(h.seed);
    weight.fill_random(h.seed + 1);
    CUDA_CHECK(cudaDeviceSynchronize());
    gemm.forward(out, in, weight, nullptr, M, N, K, h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    std::vector<double> expected(tail * N);
    reference_product<double>(GemmOperation::forward, expected, to_double(in.download((M - tail) * K, tail * K)),
                              to_double(weight.download()), tail, N, K, false);
    h.compare("forward", format_string("M%lld N%lld K%lld last rows", (long long)M, (long long)N, (long long)K),
              out.download((M - tail) * N, tail * N), expected, unit_roundoff<bf16>() + 1e-5, {tail, N});
    gemm.backward_input(in, out, weight, M, N, K, h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    std::vector<double> expected_input(tail * K);
    reference_product<double>(GemmOperation::backward_input, expected_input,
                              to_double(out.download((M - tail) * N, tail * N)), to_double(weight.download()), tail, N,
                              K, false);
    h.compare("backward_input", format_string("M%lld N%lld K%lld last rows", (long long)M, (long long)N, (long long)K),
              in.download((M - tail) * K, tail * K), expected_input, unit_roundoff<bf16>() + 1e-4, {tail, K});
}

static void measure(Harness& h, const Variant<Launcher>& variant) {
    if (variant.number == 1) {
        return;  // minutes
    }
    GemmWithWorkspace gemm;
    struct Case {
        const char* what;
        int64_t M, N, K;
    };
    for (const Case& c : {Case{"530M qkv", 98304, 3072, 1024}, Case{"530M out", 98304, 1024, 1024},
                          Case{"530M gate_up", 98304, 3072, 1024}, Case{"530M down", 98304, 1024, 1536},
                          Case{"124M qkv", 65536, 2304, 768}, Case{"124M gate_up", 65536, 4096, 768},
                          Case{"124M down", 65536, 768, 2048}, Case{"124M classifier", 10240, 50304, 768},
                          Case{"530M classifier", 98304, 256, 1024}, Case{"classifier 128256", 4096, 128256, 1024}}) {
        for (GemmOperation operation : OPERATIONS) {
            const OperandSizes sizes(operation, c.M, c.N, c.K);
            const bool is_weight = operation == GemmOperation::backward_weight;
            DeviceBuffer<bf16> a(sizes.a), b(sizes.b), out(sizes.out * (is_weight ? 2 : 1));
            a.fill_random(h.seed);
            b.fill_random(h.seed + 1);
            if (is_weight) {
                CUDA_CHECK(cudaMemset(out.data(), 0, out.num_bytes()));  // a sum to add to
            }
            CUDA_CHECK(cudaDeviceSynchronize());
            gemm.set_search(variant.number == SEARCH_VARIANT);
            h.measure_flops(format_string("%s %s M%lld N%lld K%lld", c.what, operation_name(operation), (long long)c.M,
                                          (long long)c.N, (long long)c.K),
                            2.0 * c.M * c.N * c.K, 0.0, variant.idea, [&] {
                                variant.launch(gemm, operation, out.data(), a, b, c.M, c.N, c.K, is_weight, h.stream);
                            });
        }
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "gemm", VARIANTS, check, measure); }
