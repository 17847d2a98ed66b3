// classifier.cu: the last product, the loss and its gradients, in chunks of rows; and the mean of the losses. Bound:
// tensor cores, 6 rows Vp C operations.
#include "dev/cuda/harness.cuh"
#include "llmc/classifier.cuh"
#include "llmc/reference/classifier.h"

using Launcher = void (*)(const ClassifierOperands& x, const ClassifierShape& shape, Gemm& gemm, cudaStream_t stream);

// ---- 1: cross-entropy between the products -----------------------------------------------------
static void classifier1(const ClassifierOperands& x, const ClassifierShape& shape, Gemm& gemm, cudaStream_t stream) {
    for_each_classifier_chunk(x, shape, [&](const ClassifierOperands& operands, const ClassifierShape& chunk) {
        classifier_chunk_forward_backward(operands, chunk, gemm, stream);
    });
}

// ---- 2: exponentials and their sums in the product, on sm_90a ----------------------------------
static void classifier2(const ClassifierOperands& x, const ClassifierShape& shape, Gemm& gemm, cudaStream_t stream) {
#ifdef LLMC_HOPPER
    if (gpu_properties().compute_capability == 90) {
        return for_each_classifier_chunk(x, shape,
                                         [&](const ClassifierOperands& operands, const ClassifierShape& chunk) {
                                             classifier_hopper_forward_backward(operands, chunk, gemm, stream);
                                         });
    }
#endif
    classifier1(x, shape, gemm, stream);
}

static const std::vector<Variant<Launcher>> VARIANTS = {
    {1, "cross-entropy between the products", classifier1},
    {2, "exponentials in the product's epilogue (llmc/classifier_hopper.cuh)", classifier2},
    {3, "one of the two, by the vocabulary (llmc/classifier.cuh)", classifier_forward_backward},
};

// Scratch for any of them.
static int64_t scratch_bytes(const ClassifierShape& shape) {
#ifdef LLMC_HOPPER
    return (int64_t)classifier_hopper_scratch_bytes(shape.chunk_rows, shape.padded_vocab());
#else
    return (int64_t)std::max<size_t>(classifier_scratch_bytes(shape), 1);
#endif
}

// ---- checks ------------------------------------------------------------------------------------
struct Case {
    ClassifierShape shape;
    float weight_scale;  // a power of two
    // From this row on hidden is eight times as large: where losses pass 55, a chunk's product is made again.
    int64_t large_from = INT64_MAX;
    std::string label() const {
        return format_string(
            "rows%lld V%lld C%d chunk%lld scale %g%s bf16", (long long)shape.rows, (long long)shape.V, shape.C,
            (long long)shape.chunk_rows, weight_scale,
            large_from < shape.rows ? format_string(", 8 from row %lld", (long long)large_from).c_str() : "");
    }
};
struct CaseData {
    std::vector<bf16> hidden, weight;
    std::vector<int32_t> targets;
    std::vector<float> dweight;  // what is there before
};
// Of hidden from -2 to 2 and weights of -1, 0 and 1, times powers of two, logits are exact in bf16, up to 256 times
// these: the limits need not forgive their rounding.
static CaseData case_data(const Case& c, uint64_t seed) {
    const int64_t rows = c.shape.rows, V = c.shape.V, Vp = c.shape.padded_vocab(), C = c.shape.C;
    CaseData data;
    for (const int32_t i : random_indices(rows * C, seed, 5)) {
        const int64_t row = (int64_t)data.hidden.size() / C;
        data.hidden.push_back(__float2bfloat16((float)(i - 2) * (row >= c.large_from ? 8.0f : 1.0f)));
    }
    for (const int32_t i : random_indices(V * C, seed + 1, 3)) {
        data.weight.push_back(__float2bfloat16((float)(i - 1) * c.weight_scale));
    }
    data.weight.resize(Vp * C, __float2bfloat16(0.0f));
    data.targets = random_indices(rows, seed + 2, V);
    data.dweight = random_vector<float>(Vp * C, seed + 3, 1e-3f);
    return data;
}

// One case's buffers on the device.
struct DeviceCase {
    const ClassifierShape shape;
    const float dloss;
    DeviceBuffer<bf16> hidden, weight, dhidden, logits;
    DeviceBuffer<float> losses, dweight;
    DeviceBuffer<int32_t> targets;
    DeviceBuffer<char> scratch;
    DeviceCase(const Case& c, const CaseData& data)
        : shape(c.shape),
          dloss(1.0f / (float)c.shape.rows),
          hidden(data.hidden),
          weight(data.weight),
          dhidden(c.shape.rows * c.shape.C),
          logits((int64_t)(classifier_logits_bytes(c.shape) / sizeof(bf16))),
          losses(c.shape.rows),
          dweight(data.dweight),
          targets(data.targets),
          scratch(scratch_bytes(c.shape)) {}
    ClassifierOperands operands() {
        return {losses, dhidden, dweight, logits, hidden, weight, targets, dloss, scratch};
    }
};

static void check_case(Harness& h, const Variant<Launcher>& variant, Gemm& gemm, const Case& c) {
    const ClassifierShape& shape = c.shape;
    const int64_t rows = shape.rows, V = shape.V, Vp = shape.padded_vocab(), C = shape.C;
    if (h.leaves_out(rows * V * C / 16)) {
        return;
    }
    const CaseData data = case_data(c, h.seed);
    DeviceCase device(c, data);
    std::vector<double> losses(rows), dhidden(rows * C), dweight = to_double(data.dweight), logits(rows * V);
    reference::classifier_forward_backward<double>(losses.data(), dhidden.data(), dweight.data(), logits.data(),
                                                   to_double(data.hidden).data(), to_double(data.weight).data(),
                                                   data.targets.data(), rows, V, C, rows, device.dloss);
    auto launch = [&] {
        device.dweight.upload(data.dweight);
        CUDA_CHECK(cudaDeviceSynchronize());
        variant.launch(device.operands(), shape, gemm, h.stream);
    };
    launch();
    // The logarithm of a float32 sum of terms good to 2^-20, beside logits of up to 256 scale.
    const double scale = c.weight_scale * (c.large_from < rows ? 8.0 : 1.0);
    const double loss_limit = 0x1p-18 + 256.0 * scale * 0x1p-22;
    h.compare("losses", c.label(), device.losses, losses, loss_limit, {rows}, 1.0);
    // A stored exponential, or probability, is rounded once, what is made of it once or twice more, and all are off as
    // far as the loss is. dweight adds up, for a target of at most three rows, terms of up to twice dloss or, of the
    // large rows, eight times that.
    const double rounding = 3.0 * unit_roundoff<bf16>() + 2.0 * loss_limit;
    h.compare("dhidden", c.label(), device.dhidden, dhidden, rounding + C / 16 * 0x1p-23, {rows, C});
    h.compare("dweight", c.label(), device.dweight, dweight, 6.0 * rounding, {Vp, C},
              device.dloss * (c.large_from < rows ? 8.0 : 1.0));
    h.compare_repeats("dweight", c.label(), device.dweight, launch);
    h.compare_repeats("dhidden", c.label(), device.dhidden, launch);
    // In the place of hidden.
    const std::vector<bf16> apart = device.dhidden.download();
    ClassifierOperands in_place = device.operands();
    in_place.dhidden = device.hidden;
    variant.launch(in_place, shape, gemm, h.stream);
    h.compare_exact("dhidden in the place of hidden", c.label(), device.hidden, apart);
    if (variant.number == 3) {
        device.hidden.upload(data.hidden);
        device.losses.poison();
        CUDA_CHECK(cudaDeviceSynchronize());
        classifier_loss(device.losses, device.logits, device.hidden, device.weight, device.targets, shape, gemm,
                        h.stream);
        h.compare("classifier_loss", c.label(), device.losses, losses, loss_limit, {rows}, 1.0);
    }
}

// A target outside the vocabulary, and a row that is not a number, give a loss of NaN and leave the others alone.
static void check_bad_rows(Harness& h, const Variant<Launcher>& variant, Gemm& gemm) {
    for (const bool nan_row : {false, true}) {
        const Case c = {{70, 4100, 64, 70}, 0.25f};
        CaseData data = case_data(c, h.seed);
        data.targets[3] = -1, data.targets[40] = 4100;
        if (nan_row) {
            data.hidden[50 * 64 + 7] = __float2bfloat16(NAN);
        }
        DeviceCase device(c, data);
        device.losses.upload(std::vector<float>(70, -1.0f));  // untouched memory is NaN already
        variant.launch(device.operands(), c.shape, gemm, h.stream);
        CUDA_CHECK(cudaStreamSynchronize(h.stream));
        const std::vector<float> losses = device.losses.download();
        int num_wrong = 0;
        for (int row = 0; row < 70; ++row) {
            const bool bad = row == 3 || row == 40 || (nan_row && row == 50);
            num_wrong += bad ? !std::isnan(losses[row]) : !(losses[row] > 0.0f && std::isfinite(losses[row]));
        }
        h.expect(num_wrong == 0 && device.losses.guards_intact(), "losses",
                 nan_row ? "targets outside the vocabulary and a row that is not a number"
                         : "targets outside the vocabulary",
                 format_string("%d of 70 wrong", num_wrong));
    }
}

// Offsets beyond 2^31: rows of zeros, which give dweight nothing, before those of a case.
static void check_last_rows(Harness& h, const Variant<Launcher>& variant, Gemm& gemm) {
    const Case tail = {{LAST_ROWS, 40, MANY_ROWS_WIDTH, LAST_ROWS}, 0.25f};
    const int64_t rows = MANY_ROWS, V = tail.shape.V, C = tail.shape.C, first = rows - LAST_ROWS;
    const ClassifierShape shape = {rows, V, (int)C, 1 << 19};
    const CaseData data = case_data(tail, h.seed);
    const float dloss = 1.0f / (float)LAST_ROWS;
    std::vector<double> losses(LAST_ROWS), dhidden(LAST_ROWS * C), logits(LAST_ROWS * V);
    std::vector<double> dweight = to_double(data.dweight);
    reference::classifier_forward_backward<double>(losses.data(), dhidden.data(), dweight.data(), logits.data(),
                                                   to_double(data.hidden).data(), to_double(data.weight).data(),
                                                   data.targets.data(), LAST_ROWS, V, C, LAST_ROWS, dloss);
    std::vector<int32_t> targets(rows, 7);
    std::copy(data.targets.begin(), data.targets.end(), targets.begin() + first);
    DeviceBuffer<bf16> hidden(rows * C), weight(data.weight), dhidden_device(rows * C),
        logits_device((int64_t)(classifier_logits_bytes(shape) / sizeof(bf16)));
    DeviceBuffer<float> losses_device(rows), dweight_device(data.dweight);
    DeviceBuffer<int32_t> targets_device(targets);
    DeviceBuffer<char> scratch(scratch_bytes(shape));
    CUDA_CHECK(cudaMemset(hidden, 0, hidden.num_bytes()));
    CUDA_CHECK(
        cudaMemcpy(hidden + first * C, data.hidden.data(), data.hidden.size() * sizeof(bf16), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaDeviceSynchronize());
    variant.launch(
        {losses_device, dhidden_device, dweight_device, logits_device, hidden, weight, targets_device, dloss, scratch},
        shape, gemm, h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    // The limits of check_case.
    const std::string label =
        format_string("rows%lld V%lld C%lld last rows", (long long)rows, (long long)V, (long long)C);
    const double loss_limit = 0x1p-18 + 256.0 * 0.25 * 0x1p-22,
                 rounding = 3.0 * unit_roundoff<bf16>() + 2.0 * loss_limit;
    h.compare("losses", label, losses_device.download(first, LAST_ROWS), losses, loss_limit, {LAST_ROWS}, 1.0);
    h.compare("dhidden", label, dhidden_device.download(first * C, LAST_ROWS * C), dhidden, rounding + C / 16 * 0x1p-23,
              {LAST_ROWS, C});
    h.compare("dweight", label, dweight_device, dweight, 6.0 * rounding, {shape.padded_vocab(), C}, dloss);
}

static void check_mean_loss(Harness& h) {
    for (int64_t rows : {(int64_t)1, (int64_t)1000, (int64_t)300001}) {
        if (h.leaves_out(rows)) {
            continue;
        }
        const std::vector<float> losses = random_vector<float>(rows, h.seed);
        double mean = 0.0;
        for (float loss : losses) {
            mean += loss / (double)rows;
        }
        DeviceBuffer<float> losses_device(losses), out(1);
        DeviceBuffer<unsigned char> scratch(mean_loss_scratch_bytes());
        auto launch = [&] {
            out.upload({2.0f});
            CUDA_CHECK(cudaDeviceSynchronize());
            mean_loss(out, losses_device, rows, 0.25f, scratch, h.stream);
        };
        launch();
        const std::string label = format_string("rows%lld", (long long)rows);
        h.compare("mean_loss", label, out, {2.0 + 0.25 * mean}, unit_roundoff<float>() * 1.01, {1}, 0.0);
        h.compare_repeats("mean_loss", label, out, launch);
    }
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    DeviceBuffer<unsigned char> workspace(GEMM_WORKSPACE_BYTES);
    Gemm gemm(workspace, GEMM_WORKSPACE_BYTES);
    for (const Case& c : {Case{{1, 2, 8, 1}, 1.0f}, Case{{70, 300, 40, 64}, 0.25f}, Case{{500, 1003, 136, 192}, 0.25f},
                          Case{{300, 5003, 136, 128}, 0.0625f}, Case{{300, 5003, 136, 128}, 0.25f},
                          // all chunks, and the second of three, whose losses are too large
                          Case{{200, 5003, 136, 128}, 2.0f}, Case{{300, 5003, 136, 128}, 0.25f, 200},
                          Case{{257, 50257, 72, 257}, 0.25f}, Case{{130, 128255, 64, 128}, 0.125f}}) {
        check_case(h, variant, gemm, c);
    }
    check_bad_rows(h, variant, gemm);
    if (!h.small) {
        check_last_rows(h, variant, gemm);
    }
    if (variant.number == VARIANTS.back().number) {
        check_mean_loss(h);
    }
}

// ---- timing ------------------------------------------------------------------------------------
static void measure(Harness& h, const Variant<Launcher>& variant) {
    DeviceBuffer<unsigned char> workspace(GEMM_WORKSPACE_BYTES);
    Gemm gemm(workspace, GEMM_WORKSPACE_BYTES);
    gemm.set_search(true);
    struct Timed {
        int64_t rows, V;
        int C;
    };
    for (const auto [rows, V, C] :
         {Timed{65536, 50304, 768}, Timed{32768, 128256, 1024}, Timed{32768, 50304, 2048}, Timed{98304, 8192, 1024},
          Timed{98304, 4096, 1024}, Timed{98304, 1024, 1024}, Timed{98304, 258, 1024}}) {
        const ClassifierShape shape = {rows, V, C, classifier_chunk_rows(rows, V)};
        DeviceBuffer<bf16> hidden(rows * C), weight(shape.padded_vocab() * C), dhidden(rows * C),
            logits((int64_t)(classifier_logits_bytes(shape) / sizeof(bf16)));
        DeviceBuffer<float> losses(rows), dweight(shape.padded_vocab() * C);
        DeviceBuffer<int32_t> targets(random_indices(rows, h.seed, V));
        DeviceBuffer<char> scratch(scratch_bytes(shape));
        hidden.fill_random(h.seed);
        weight.upload(random_vector<bf16>(shape.padded_vocab() * C, h.seed + 1, 0.02f));
        CUDA_CHECK(cudaMemset(dweight, 0, dweight.size() * sizeof(float)));
        CUDA_CHECK(cudaDeviceSynchronize());
        const ClassifierOperands x = {losses, dhidden, dweight, logits, hidden, weight, targets, 1.0f / (float)rows,
                                      scratch};
        h.measure_flops(format_string("rows%lld V%lld C%d", (long long)rows, (long long)V, C),
                        6.0 * (double)rows * (double)shape.padded_vocab() * C, 0.0, variant.idea,
                        [&] { variant.launch(x, shape, gemm, h.stream); });
    }
}

int main(int argc, char** argv) { return run_variants(argc, argv, "classifier", VARIANTS, check, measure); }
