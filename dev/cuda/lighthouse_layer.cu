// lighthouse_layer.cu: the whole layer of llmc/lighthouse.cuh: forward and backward against the CPU reference on the
// selection the GPU made, causality, repetition, golden files; timings of every stage, of the layer and of dense
// attention on the same tokens. Bound: memory around the inner attention, tensor cores inside.
//   lighthouse_layer [--without_dense] --shape T,levels,pool,topk,H,Hkv[,D] ...   times these shapes, checks nothing
// Where the golden files are: dev/test/golden_lighthouse.h.
#include <climits>
#include <memory>

#include "dev/cuda/attention_truth.cuh"
#include "dev/cuda/lighthouse_cases.cuh"
#include "dev/cuda/rope_cases.cuh"
#include "dev/test/golden_lighthouse.h"
#include "llmc/lighthouse.cuh"

// ---- one layer on the device -----------------------------------------------------------------------
struct DeviceLayer {
    LighthouseShape shape;
    DeviceBuffer<bf16> qkv, dqkv, out, dout;
    DeviceBuffer<unsigned char> saved, forward_scratch, backward_scratch;

    explicit DeviceLayer(const LighthouseShape& shape)
        : shape(shape),
          qkv(shape.B * shape.geometry.T * shape.num_heads() * shape.D),
          dqkv(qkv.size()),
          out(shape.B * shape.geometry.T * shape.H * shape.D),
          dout(out.size()),
          saved((int64_t)lighthouse_saved_bytes(shape)),
          forward_scratch((int64_t)lighthouse_forward_scratch_bytes(shape)),
          backward_scratch((int64_t)std::max(lighthouse_backward_scratch_bytes(shape, true),
                                             lighthouse_backward_scratch_bytes(shape, false))) {}

    template <class Element = bf16>
    HeadView<Element> tokens(const DeviceBuffer<bf16>& rows) const {
        return plain_heads<Element>(rows.data(), shape.geometry.T, shape.H, shape.D);
    }
    QkvHeads<const bf16> in() const { return packed_heads<const bf16>(qkv.data(), shape.geometry.T, shape); }
    QkvHeads<bf16> din() const { return packed_heads<bf16>(dqkv.data(), shape.geometry.T, shape); }

    void forward(cudaStream_t stream) {
        lighthouse_forward(tokens(out), saved.data(), in().q, in().k, in().v, forward_scratch.data(), shape, stream);
    }
    void backward(cudaStream_t stream, bool deterministic = true, const RopeRotation* rotation = nullptr) {
        lighthouse_backward(din().q, din().k, din().v, tokens<const bf16>(dout), saved.data(), backward_scratch.data(),
                            shape, deterministic, stream, rotation);
    }
    LighthouseSaved saved_parts() const {
        MemoryArea area(saved.data());
        return LighthouseSaved(area, shape);
    }
    template <class Element>
    std::vector<Element> download(const Element* from, int64_t num_elements) const {
        std::vector<Element> values(num_elements);
        CUDA_CHECK(cudaMemcpy(values.data(), from, num_elements * sizeof(Element), cudaMemcpyDeviceToHost));
        return values;
    }
};

struct HostResult {
    std::vector<double> out, dqkv;
};
inline void round_to_bf16(std::vector<double>& values) {
    for (double& value : values) {
        value = __bfloat162float(__float2bfloat16((float)value));
    }
}
// [B, T, heads, D] of packed qkv, and rows of contiguous heads, as the reference takes them.
struct HostViews {
    const LighthouseShape& shape;

    reference::View<double> packed(std::vector<double>& rows, int first) const {
        const int64_t width = (int64_t)shape.num_heads() * shape.D;
        return {rows.data() + first * shape.D, shape.geometry.T * width, width, shape.D};
    }
    reference::View<double> tokens(std::vector<double>& rows) const {
        return reference::lighthouse_rows(rows, shape.geometry.T, shape.H, shape.D);
    }
    reference::View<double> gathered(std::vector<double>& rows, int heads) const {
        return reference::lighthouse_rows(rows, shape.geometry.S, heads, shape.D);
    }
};

// The layer on a given selection, in float64.
static HostResult exact_layer(const LighthouseShape& shape, const std::vector<bf16>& qkv, const std::vector<bf16>& dout,
                              const std::vector<int32_t>& entries, const std::vector<int32_t>& positions) {
    const int B = shape.B, H = shape.H, Hkv = shape.Hkv, D = shape.D;
    const HostViews views = {shape};
    std::vector<double> x = to_double(qkv), dy = to_double(dout);
    HostResult result;
    result.out.resize(dy.size());
    result.dqkv.resize(x.size());
    reference::LighthouseState<double> state;
    state.entries = entries, state.positions = positions;
    reference::lighthouse_attend<double>(views.tokens(result.out), state, views.packed(x, 0), views.packed(x, H),
                                         views.packed(x, H + Hkv), B, H, Hkv, D, shape.scale, shape.geometry);
    reference::lighthouse_backward<double>(views.packed(result.dqkv, 0), views.packed(result.dqkv, H),
                                           views.packed(result.dqkv, H + Hkv), views.tokens(dy), state, B, H, Hkv, D,
                                           shape.scale, shape.geometry);
    return result;
}

// The same as any implementation in bf16 computes it: rounded wherever a row is stored, and inside attention where P
// and dS are multiplied.
static HostResult plain_layer(const LighthouseShape& shape, const std::vector<bf16>& qkv, const std::vector<bf16>& dout,
                              const std::vector<int32_t>& entries, const std::vector<int32_t>& positions) {
    const LighthouseGeometry& g = shape.geometry;
    const int B = shape.B, H = shape.H, Hkv = shape.Hkv, D = shape.D;
    const HostViews views = {shape};
    std::vector<double> x = to_double(qkv), dy = to_double(dout);
    const auto device_rows = [&](int heads, auto&& fill) {
        std::vector<double> rows(B * g.S * heads * D);
        fill(views.gathered(rows, heads));
        return std::make_unique<DeviceBuffer<bf16>>(to_bf16(rows));
    };
    const auto gather = [&](int first, int heads) {
        return device_rows(heads, [&](const reference::View<double>& rows) {
            reference::lighthouse_gather<double>(rows, views.packed(x, first), entries.data(), B, heads, Hkv, D, g);
        });
    };
    const auto q = gather(0, H), k = gather(H, Hkv), v = gather(H + Hkv, Hkv);
    const auto dgathered = device_rows(H, [&](const reference::View<double>& rows) {
        reference::lighthouse_scatter_backward<double>(rows, views.tokens(dy), entries.data(), B, H, Hkv, D, g);
    });
    const auto rows_of = [&](const std::unique_ptr<DeviceBuffer<bf16>>& rows, int heads) {
        return plain_heads<const bf16>(rows->data(), g.S, heads, D);
    };
    CUDA_CHECK(cudaDeviceSynchronize());
    AttentionTruth inner = attention_truth(rows_of(q, H), rows_of(k, Hkv), rows_of(v, Hkv), rows_of(dgathered, H),
                                           lighthouse_inner_shape(shape), true);
    for (auto* rows : {&inner.out, &inner.dq, &inner.dk, &inner.dv}) {
        round_to_bf16(*rows);
    }
    HostResult result;
    result.out.resize(dy.size());
    result.dqkv.resize(x.size());
    reference::lighthouse_scatter<double>(views.tokens(result.out), views.gathered(inner.out, H), positions.data(), B,
                                          H, Hkv, D, g);
    const auto spread = [&](int first, std::vector<double>& rows, int heads) {
        reference::lighthouse_gather_backward<double>(views.packed(result.dqkv, first), views.gathered(rows, heads),
                                                      positions.data(), B, heads, Hkv, D, g);
    };
    spread(0, inner.dq, H);
    spread(H, inner.dk, Hkv);
    spread(H + Hkv, inner.dv, Hkv);
    round_to_bf16(result.out);
    round_to_bf16(result.dqkv);
    return result;
}

// ---- checks ------------------------------------------------------------------------------------
// Errors are relative to the root mean square; the limit is twice the error of the plain computation in bf16.
static void check_against_host(Harness& h, const std::string& label, const std::vector<bf16>& actual,
                               const std::vector<double>& exact, const std::vector<double>& plain, const char* name) {
    const double floor = root_mean_square(exact);
    const double plain_error = difference(plain, exact, floor).max_error;
    h.compare(name, label, actual, exact, 2.0 * std::max(plain_error, unit_roundoff<bf16>()), {}, floor);
}

// Launch of both: a thread an element, flat grid. Bound: bandwidth.
__global__ void fill_kernel(bf16* data, int64_t num_elements, float value) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < num_elements) {
        data[i] = __float2bfloat16(value);
    }
}
// range (=) the least and the largest, of whole numbers; begins as {INT_MAX, INT_MIN}.
__global__ void range_kernel(int* range, const bf16* data, int64_t num_elements) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int value = (int)__bfloat162float(data[min(i, num_elements - 1)]);
    const int least = __reduce_min_sync(FULL_WARP, value), largest = __reduce_max_sync(FULL_WARP, value);
    if (threadIdx.x % WARP_SIZE == 0) {
        atomicMin(range, least);
        atomicMax(range + 1, largest);
    }
}
// No token is left out, and none has more contributors than levels: rows of ones scattered by the layer's selection
// count them. Overwrites what the layer has saved of attention's output, and its output.
static void check_contributors(Harness& h, const DeviceLayer& layer, const std::string& label) {
    const LighthouseShape& shape = layer.shape;
    const LighthouseSaved saved = layer.saved_parts();
    const int64_t num_rows = shape.B * shape.geometry.S * shape.H * shape.D;
    DeviceBuffer<int> range(std::vector<int>{INT_MAX, INT_MIN});
    CUDA_CHECK(cudaDeviceSynchronize());
    fill_kernel<<<ceil_div<int64_t>(num_rows, 256), 256, 0, h.stream>>>(saved.out, num_rows, 1.0f);
    CUDA_CHECK_LAUNCH();
    lighthouse_scatter(layer.tokens(layer.out), lighthouse_gathered_view<const bf16>(saved.out, shape.H, shape),
                       saved.positions, shape, h.stream);
    range_kernel<<<ceil_div<int64_t>(layer.out.size(), 256), 256, 0, h.stream>>>(range, layer.out.data(),
                                                                                 layer.out.size());
    CUDA_CHECK_LAUNCH();
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    const std::vector<int> counts = range.download();
    h.expect(counts[0] >= 1 && counts[1] <= shape.geometry.levels, "contributors", label,
             format_string("%d to %d of %d levels", counts[0], counts[1], shape.geometry.levels));
}

static void check_case(Harness& h, const LighthouseCase& c, LighthouseScorer scorer) {
    const LighthouseShape shape = c.shape(scorer);
    const LighthouseGeometry& g = shape.geometry;
    const std::string label = c.label() + (scorer == LighthouseScorer::dilated ? " dilated" : " norm");
    DeviceLayer layer(shape);
    const std::vector<bf16> qkv = random_vector<bf16>(layer.qkv.size(), h.seed);
    const std::vector<bf16> dout = random_vector<bf16>(layer.dout.size(), h.seed + 1);
    layer.qkv.upload(qkv);
    layer.dout.upload(dout);
    layer.forward(h.stream);
    layer.backward(h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));

    // The selection is exact for the scores the GPU computed.
    const LighthouseSaved saved = layer.saved_parts();
    const auto entries = layer.download(saved.entries, shape.num_selections() * g.S);
    const auto positions = layer.download(saved.positions, shape.num_selections() * g.num_slots);
    MemoryArea area(layer.forward_scratch.data());
    const LighthouseForwardScratch scratch(area, shape);
    const bool dilated = scorer == LighthouseScorer::dilated;
    const int k_heads = dilated ? c.H : c.Hkv;
    // [B, heads, T] of the query or of the key heads.
    const auto scores_of = [&](const LighthouseHeadScores& stored, int heads) {
        std::vector<float> scores;
        for (int64_t b = 0; b < c.B; ++b) {
            const auto part = layer.download(stored.tokens + b * stored.stored_heads * c.T, heads * c.T);
            scores.insert(scores.end(), part.begin(), part.end());
        }
        return scores;
    };
    const std::vector<float> q_scores = scores_of(scratch.q_heads(shape), c.H);
    const std::vector<float> k_scores = scores_of(scratch.k_heads(shape), k_heads);
    const HostSelection expected(shape, q_scores, k_scores, k_heads);
    h.expect(entries == expected.entries && positions == expected.positions, "selection", label,
             "given the GPU's own scores");
    // The scores themselves.
    std::vector<double> x = to_double(qkv);
    const int64_t width = (int64_t)shape.num_heads() * c.D;
    const auto part = [&](int first) {
        return reference::View<const double>(x.data() + first * c.D, c.T * width, width, c.D);
    };
    std::vector<float> q_expected(q_scores.size()), k_expected(k_scores.size());
    if (dilated) {
        reference::lighthouse_dilated_scores<double>(q_expected.data(), k_expected.data(), part(0), part(c.H),
                                                     part(c.H + c.Hkv), c.B, c.T, c.H, c.Hkv, c.D, shape.dilation,
                                                     shape.scale);
    } else {
        reference::lighthouse_norms<double>(q_expected.data(), part(0), c.B, c.T, c.H, c.D);
        reference::lighthouse_norms<double>(k_expected.data(), part(c.H), c.B, c.T, c.Hkv, c.D);
    }
    // Dilated: the norm of an output row rounded to bf16, made of probabilities rounded to bf16.
    const double score_limit = dilated ? 4.0 * unit_roundoff<bf16>() : 256 * unit_roundoff<float>();
    h.compare("q_scores", label, q_scores, to_double(q_expected), score_limit);
    h.compare("k_scores", label, k_scores, to_double(k_expected), score_limit);

    const HostResult exact = exact_layer(shape, qkv, dout, entries, positions);
    const HostResult plain = plain_layer(shape, qkv, dout, entries, positions);
    check_against_host(h, label, layer.out.download(), exact.out, plain.out, "out");
    check_against_host(h, label, layer.dqkv.download(), exact.dqkv, plain.dqkv, "dqkv");
    h.expect(layer.out.guards_intact() && layer.dqkv.guards_intact() && layer.saved.guards_intact() &&
                 layer.forward_scratch.guards_intact() && layer.backward_scratch.guards_intact(),
             "guards", label);
    const auto both = [&] {
        layer.forward_scratch.poison();
        layer.backward_scratch.poison();
        CUDA_CHECK(cudaDeviceSynchronize());
        layer.forward(h.stream);
        layer.backward(h.stream);
    };
    h.compare_repeats("out", label, layer.out, both, 2);
    h.compare_repeats("dqkv", label, layer.dqkv, both, 2);

    const ModelConfig config = rope_config(c.H, c.Hkv, c.D);
    const RopeRotation rotation{make_rope_frequencies(config), rope_one_run(c.T, 70000)};
    const auto turned = [&](std::vector<double> rows) {
        reference_turn(rows, c.B, rotation.positions, c.H + c.Hkv, (int)width, c.D, rope_inverse_frequencies(config),
                       true);
        return rows;
    };
    layer.dqkv.poison();
    layer.backward(h.stream, true, &rotation);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    check_against_host(h, label, layer.dqkv.download(), turned(exact.dqkv), turned(plain.dqkv), "dqkv turned back");
}

// A token's content may reach no output before it: signs of q and k and the whole of v change, the norms do not.
static void check_causality(Harness& h, const LighthouseCase& c) {
    const LighthouseShape shape = c.shape();
    DeviceLayer layer(shape);
    const std::vector<bf16> qkv = random_vector<bf16>(layer.qkv.size(), h.seed);
    layer.qkv.upload(qkv);
    layer.forward(h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    const std::vector<bf16> before = layer.out.download();
    for (const int64_t j : {(int64_t)0, c.T / 2 - 1, c.T / 2, c.T - 1}) {
        std::vector<bf16> changed = qkv;
        const int64_t width = (int64_t)shape.num_heads() * c.D;
        for (int64_t i = 0; i < width; ++i) {
            bf16& value = changed[j * width + i];
            value = i >= (c.H + c.Hkv) * c.D ? __float2bfloat16(__bfloat162float(value) + 1.0f)
                                             : __float2bfloat16((i % 2 ? 1.0f : -1.0f) * __bfloat162float(value));
        }
        layer.qkv.upload(changed);
        layer.forward(h.stream);
        CUDA_CHECK(cudaStreamSynchronize(h.stream));
        const std::vector<bf16> after = layer.out.download();
        const size_t first = j * c.H * c.D;
        const bool earlier_equal = std::memcmp(before.data(), after.data(), first * sizeof(bf16)) == 0;
        const bool later_differ =
            std::memcmp(before.data() + first, after.data() + first, (before.size() - first) * sizeof(bf16)) != 0;
        h.expect(earlier_equal && later_differ, "causality", c.label(),
                 format_string("token %lld changed: earlier outputs %s, later ones %s", (long long)j,
                               earlier_equal ? "equal" : "DIFFER", later_differ ? "differ" : "EQUAL"));
    }
}

// A captured forward and backward replays to the same bits: nothing in the layer needs the host.
static void check_graph(Harness& h, const LighthouseCase& c) {
    DeviceLayer layer(c.shape());
    layer.qkv.fill_random(h.seed);
    layer.dout.fill_random(h.seed + 1);
    CUDA_CHECK(cudaDeviceSynchronize());
    layer.forward(h.stream);
    layer.backward(h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    const std::vector<bf16> out = layer.out.download(), dqkv = layer.dqkv.download();
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CUDA_CHECK(cudaStreamBeginCapture(h.stream, cudaStreamCaptureModeThreadLocal));
    layer.forward(h.stream);
    layer.backward(h.stream);
    CUDA_CHECK(cudaStreamEndCapture(h.stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    layer.out.poison();
    layer.dqkv.poison();
    CUDA_CHECK(cudaGraphLaunch(executable, h.stream));
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    const auto same = [](const std::vector<bf16>& a, const std::vector<bf16>& b) {
        return std::memcmp(a.data(), b.data(), a.size() * sizeof(bf16)) == 0;
    };
    h.expect(same(out, layer.out.download()) && same(dqkv, layer.dqkv.download()), "graph", c.label(),
             "replayed to the same bits");
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
}

// Rows here and there of a layer with more than 2^31 elements, the first and the last among them: every stage's result
// from the stored operands of that stage. What the inner attention computes is checked elsewhere.
static void check_large(Harness& h, const LighthouseCase& c) {
    const LighthouseShape shape = c.shape();
    const LighthouseGeometry& g = shape.geometry;
    const int64_t qkv_elements = c.B * c.T * shape.num_heads() * c.D, out_elements = c.B * c.T * c.H * c.D;
    const double needed = 4.0 * (double)(qkv_elements + out_elements) + (double)lighthouse_saved_bytes(shape) +
                          (double)lighthouse_forward_scratch_bytes(shape) +
                          (double)std::max(lighthouse_backward_scratch_bytes(shape, true),
                                           lighthouse_backward_scratch_bytes(shape, false));
    size_t free_bytes, total_bytes;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    if (needed > 0.95 * (double)free_bytes) {
        std::printf("skip large offsets  %s: takes %.1f GiB, %.1f are free\n", c.label().c_str(), needed / (1 << 30),
                    (double)free_bytes / (1 << 30));
        return;
    }
    DeviceLayer layer(shape);
    layer.qkv.fill_random(h.seed);
    layer.dout.fill_random(h.seed + 1);
    CUDA_CHECK(cudaDeviceSynchronize());
    layer.forward(h.stream);
    layer.backward(h.stream, false);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    h.expect(layer.out.guards_intact() && layer.dqkv.guards_intact() && layer.saved.guards_intact() &&
                 layer.forward_scratch.guards_intact() && layer.backward_scratch.guards_intact(),
             "large guards", c.label());

    const LighthouseSaved s = layer.saved_parts();
    MemoryArea backward_area(layer.backward_scratch.data());
    const LighthouseBackwardScratch d(backward_area, shape, false);
    const auto gathered = [&](bf16* rows, int heads) { return lighthouse_gathered_view(rows, heads, shape); };
    const auto row_of = [&](const HeadView<const bf16>& view, int64_t b, int64_t row, int head) {
        return to_double(layer.download(view.row(b, row, head), c.D));
    };
    const auto add = [&](std::vector<double>& sum, const std::vector<double>& row, double factor) {
        for (int i = 0; i < c.D; ++i) {
            sum[i] += factor * row[i];
        }
    };
    std::vector<bf16> rows_got, tokens_got;
    std::vector<double> rows_expected, tokens_expected;
    const auto collect = [](auto& got, auto& expected, const std::vector<bf16>& row, const std::vector<double>& sum) {
        got.insert(got.end(), row.begin(), row.end());
        expected.insert(expected.end(), sum.begin(), sum.end());
    };
    bool inverse = true;
    // A head of tokens and its gathered rows, forward; and the gradients of both.
    const auto check_head = [&](int head, int kv_head, const HeadView<const bf16>& x,
                                const HeadView<const bf16>& x_rows, const HeadView<const bf16>& dx,
                                const HeadView<const bf16>& dx_rows, bool is_query) {
        for (int i = 0; i < 24; ++i) {
            const int64_t b = i % 2 ? c.B - 1 : 0, selection = b * c.Hkv + kv_head;
            const int32_t* positions = s.positions + selection * g.num_slots;
            const int64_t n = i < 2 ? 0 : i < 4 ? g.S - 1 : (int64_t)(random_bits(h.seed + 2, i) % (uint64_t)g.S);
            const int64_t slot = layer.download(s.entries + selection * g.S + n, 1)[0];
            inverse = inverse && layer.download(positions + slot, 1)[0] == n;
            int64_t index = slot;
            const int level = g.level_of_slot(index);
            const int64_t window = g.window(level);
            std::vector<double> sum(c.D, 0.0);
            for (int64_t t = index * window; t < (index + 1) * window; ++t) {
                add(sum, row_of(x, b, t, head), 1.0 / (double)window);
            }
            collect(rows_got, rows_expected, layer.download(x_rows.row(b, n, head), c.D), sum);
            if (is_query) {
                const int64_t first = (index + 1) * window - 1;
                sum.assign(c.D, 0.0);
                for (int64_t t = first; t < std::min(first + window, c.T); ++t) {
                    add(sum, row_of(layer.tokens<const bf16>(layer.dout), b, t, head), 1.0);
                }
                collect(rows_got, rows_expected, layer.download(gathered(d.dout, c.H).row(b, n, head), c.D), sum);
            }

            const int64_t j = i < 2 ? 0 : i < 4 ? c.T - 1 : (int64_t)(random_bits(h.seed + 3, i) % (uint64_t)c.T);
            std::vector<double> gradient(c.D, 0.0), out(c.D, 0.0);
            for (int l = 0; l < g.levels; ++l) {
                const int32_t own = layer.download(positions + g.slot(l, j >> g.window_bits(l)), 1)[0];
                if (own >= 0) {
                    add(gradient, row_of(dx_rows, b, own, head), 1.0 / (double)g.window(l));
                }
                const int64_t entry = ((j + 1) >> g.window_bits(l)) - 1;
                const int32_t from = entry < 0 ? -1 : layer.download(positions + g.slot(l, entry), 1)[0];
                if (is_query && from >= 0) {
                    add(out, row_of(gathered(s.out, c.H), b, from, head), 1.0);
                }
            }
            collect(tokens_got, tokens_expected, layer.download(dx.row(b, j, head), c.D), gradient);
            if (is_query) {
                collect(tokens_got, tokens_expected, layer.download(layer.tokens(layer.out).row(b, j, head), c.D), out);
            }
        }
    };
    const auto in = layer.in();
    const auto din = layer.din();
    check_head(0, 0, in.q, gathered(s.q, c.H), din.q, gathered(d.dq, c.H), true);
    check_head(c.H - 1, c.Hkv - 1, in.q, gathered(s.q, c.H), din.q, gathered(d.dq, c.H), true);
    check_head(c.Hkv - 1, c.Hkv - 1, in.k, gathered(s.k, c.Hkv), din.k, gathered(d.dk, c.Hkv), false);
    check_head(c.Hkv - 1, c.Hkv - 1, in.v, gathered(s.v, c.Hkv), din.v, gathered(d.dv, c.Hkv), false);
    h.expect(inverse, "large positions", c.label(), "positions are the inverse of entries");
    // Float32 sums of up to a window's rows, rounded once.
    h.compare("large gathered rows", c.label(), rows_got, rows_expected, unit_roundoff<bf16>() + 1e-4);
    h.compare("large token rows", c.label(), tokens_got, tokens_expected, unit_roundoff<bf16>() + 1e-4);
    check_contributors(h, layer, c.label());
}

static void check_golden(Harness& h, const std::string& file) {
    const GoldenLighthouse golden = read_golden_lighthouse(file);
    const std::string label = std::filesystem::path(file).filename().string();
    const int H = golden.H, D = golden.D;
    const LighthouseShape shape = make_lighthouse_shape(make_lighthouse_geometry(golden.T, golden.config),
                                                        golden.config, 1, H, H, D, 1.0f / std::sqrt((float)D));
    DeviceLayer layer(shape);
    const int64_t width = (int64_t)H * D;
    const auto pack = [&](const char* q, const char* k, const char* v) {
        std::vector<float> packed;
        for (int64_t t = 0; t < golden.T; ++t) {
            for (const char* name : {q, k, v}) {
                const float* row = golden.tensors.at(name).data() + t * width;
                packed.insert(packed.end(), row, row + width);
            }
        }
        return packed;
    };
    const std::vector<bf16> qkv = to_bf16(convert<double>(pack("q", "k", "v")));
    const std::vector<bf16> dout = to_bf16(convert<double>(golden.tensors.at("dout")));
    layer.qkv.upload(qkv);
    layer.dout.upload(dout);
    layer.forward(h.stream);
    layer.backward(h.stream);
    CUDA_CHECK(cudaStreamSynchronize(h.stream));
    const LighthouseSaved saved = layer.saved_parts();
    const auto entries = layer.download(saved.entries, (int64_t)golden.indices.size());
    h.expect(entries == golden.indices, "golden selection", label, "entry for entry");
    const auto positions = layer.download(saved.positions, H * shape.geometry.num_slots);
    const HostResult plain = plain_layer(shape, qkv, dout, entries, positions);
    check_against_host(h, label, layer.out.download(), convert<double>(golden.tensors.at("out")), plain.out,
                       "golden out");
    check_against_host(h, label, layer.dqkv.download(), convert<double>(pack("dq", "dk", "dv")), plain.dqkv,
                       "golden dqkv");
}

using Launcher = int;  // one implementation: the shipped one
static void check(Harness& h, const Variant<Launcher>&) {
    if (h.small) {
        check_case(h, {1, 256, 2, 2, 128, 1, 1, 64}, LighthouseScorer::norm);
        check_case(h, {1, 512, 3, 2, 128, 2, 1, 64}, LighthouseScorer::dilated);
        check_large(h, {2, 512, 3, 2, 128, 2, 1, 64});
        return;
    }
    for (const LighthouseCase& c : std::vector<LighthouseCase>{{1, 256, 2, 2, 128, 1, 1, 64},
                                                               {2, 129 * 2 * 4, 3, 2, 256, 4, 2, 64},
                                                               {1, 4096, 3, 4, 256, 4, 1, 128},
                                                               {2, 1056, 4, 2, 128, 3, 3, 80},
                                                               {1, 1024, 2, 4, 256, 2, 1, 128},  // all selected
                                                               {1, 2048, 2, 4, 128, 2, 2, 128},
                                                               {1, 4096, 5, 2, 128, 2, 1, 64},
                                                               {1, 32768, 3, 16, 128, 2, 1, 64}}) {
        check_case(h, c, LighthouseScorer::norm);
        check_case(h, c, LighthouseScorer::dilated);
    }
    check_causality(h, {1, 4096, 3, 4, 256, 4, 2, 128});
    check_causality(h, {1, 1032, 3, 2, 256, 2, 1, 64});
    check_graph(h, {1, 4096, 3, 4, 256, 4, 2, 128});
    check_large(h, {1, 1 << 20, 4, 4, 4096, 20, 2, 128});
    check_large(h, {1, 1 << 21, 4, 4, 4096, 2, 1, 128});
    check_large(h, {3, 98304, 3, 4, 1536, 64, 8, 128});
    const std::vector<std::string> golden = golden_lighthouse_files();
    for (const std::string& path : golden) {
        check_golden(h, path);
    }
    if (golden.empty()) {
        std::printf("skip golden: %s\n", no_golden_files().c_str());
    }
}

// ---- timings -----------------------------------------------------------------------------------
// One greppable line a stage: "stage NAME  shape  ms".
static void measure_shape(Harness& h, const LighthouseCase& c, LighthouseScorer scorer, bool with_dense) {
    const LighthouseShape shape = c.shape(scorer);
    const int64_t T = c.T;
    DeviceLayer layer(shape);
    layer.qkv.fill_random(h.seed);
    layer.dout.fill_random(h.seed + 1);
    CUDA_CHECK(cudaDeviceSynchronize());
    layer.forward(h.stream);
    layer.backward(h.stream);
    const std::string label = c.label() + (scorer == LighthouseScorer::dilated ? " dilated" : "");
    const auto time = [&](const char* stage, const std::function<void()>& launch) {
        const double ms = h.time_ms(launch);
        std::printf("stage %-22s  %s  %.4f ms\n", stage, label.c_str(), ms);
        std::fflush(stdout);
        return ms;
    };
    const auto time_once = [&](const char* stage, const std::function<void()>& launch) {
        cudaEvent_t begin, end;
        CUDA_CHECK(cudaEventCreate(&begin));
        CUDA_CHECK(cudaEventCreate(&end));
        CUDA_CHECK(cudaEventRecord(begin, h.stream));
        launch();
        CUDA_CHECK(cudaEventRecord(end, h.stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        CUDA_CHECK(cudaEventDestroy(begin));
        CUDA_CHECK(cudaEventDestroy(end));
        std::printf("stage %-22s  %s  %.4f ms\n", stage, label.c_str(), ms);
        std::fflush(stdout);
    };
    const LighthouseSaved s = layer.saved_parts();
    MemoryArea area(layer.forward_scratch.data()), backward_area(layer.backward_scratch.data());
    const LighthouseForwardScratch scratch(area, shape);
    const LighthouseBackwardScratch d(backward_area, shape, false);
    const auto q_view = [&](bf16* rows) { return lighthouse_gathered_view(rows, c.H, shape); };
    const auto k_view = [&](bf16* rows) { return lighthouse_gathered_view(rows, c.Hkv, shape); };
    const AttentionShape inner = lighthouse_inner_shape(shape);
    double around = 0.0, around_backward = 0.0;
    if (scorer == LighthouseScorer::dilated) {
        around += time("dilated_scores", [&] { lighthouse_dilated_scores(scratch, layer.in(), shape, h.stream); });
    }
    around += time("pool", [&] {
        lighthouse_pool(scratch.pooled, scorer == LighthouseScorer::norm ? scratch.scores : LighthouseScores(),
                        layer.in(), shape, h.stream);
    });
    around += time("select", [&] {
        lighthouse_select(s.entries, s.positions, scratch.q_heads(shape), scratch.k_heads(shape),
                          scratch.select_scratch, shape, h.stream);
    });
    around += time("gather", [&] {
        lighthouse_gather({q_view(s.q), k_view(s.k), k_view(s.v)}, layer.in(), scratch.pooled, s.positions, shape,
                          h.stream);
    });
    time("attention", [&] {
        flash_attention_forward(q_view(s.out), s.lse, q_view(s.q), k_view(s.k), k_view(s.v), inner, h.stream);
    });
    around += time("scatter",
                   [&] { lighthouse_scatter(layer.tokens(layer.out), q_view(s.out), s.positions, shape, h.stream); });
    around_backward += time("scatter_backward", [&] {
        lighthouse_scatter_backward(q_view(d.dout), layer.tokens<const bf16>(layer.dout), s.positions, shape, h.stream);
    });
    time("attention_backward", [&] {
        flash_attention_backward(q_view(d.dq), k_view(d.dk), k_view(d.dv), q_view(d.dout), q_view(s.q), k_view(s.k),
                                 k_view(s.v), q_view(s.out), s.lse, d.attention_scratch, inner, false, h.stream);
    });
    around_backward += time("gather_backward", [&] {
        lighthouse_gather_backward(layer.din(), {q_view(d.dq), k_view(d.dk), k_view(d.dv)}, s.positions, shape,
                                   h.stream);
    });
    std::printf("stage %-22s  %s  %.4f ms\n", "around", label.c_str(), around);
    std::printf("stage %-22s  %s  %.4f ms\n", "around_backward", label.c_str(), around_backward);
    time("layer", [&] { layer.forward(h.stream); });
    time("layer_backward", [&] { layer.backward(h.stream, false); });
    if (!with_dense) {
        return;
    }
    AttentionShape dense = inner;
    dense.Tq = dense.Tk = T;
    DeviceBuffer<float> lse(c.B * c.H * T);
    DeviceBuffer<unsigned char> dense_scratch((int64_t)flash_attention_backward_scratch_bytes(dense, false));
    const auto in = layer.in();
    const auto forward = [&] {
        flash_attention_forward(layer.tokens(layer.out), lse, in.q, in.k, in.v, dense, h.stream);
    };
    const auto backward = [&] {
        flash_attention_backward(layer.din().q, layer.din().k, layer.din().v, layer.tokens<const bf16>(layer.dout),
                                 in.q, in.k, in.v, layer.tokens<const bf16>(layer.out), lse, dense_scratch.data(),
                                 dense, false, h.stream);
    };
    // Seconds long, one run is enough, and the inner attention has already loaded the kernels.
    if ((double)c.B * c.H * T * T > 0x1p41) {
        time_once("dense", forward);
        time_once("dense_backward", backward);
    } else {
        time("dense", forward);
        time("dense_backward", backward);
    }
}

static void measure(Harness& h, const Variant<Launcher>&) {
    measure_shape(h, {1, 98304, 3, 4, 1536, 8, 8, 128}, LighthouseScorer::norm, true);
    measure_shape(h, {1, 98304, 3, 4, 1536, 8, 8, 128}, LighthouseScorer::dilated, false);
}

// --shape T,levels,pool,topk,H,Hkv[,D]
static LighthouseCase parse_shape(const std::string& text) {
    LighthouseCase c = {1, 0, 0, 0, 0, 0, 0, 128};
    long long T, topk;
    const int found =
        std::sscanf(text.c_str(), "%lld,%d,%d,%lld,%d,%d,%d", &T, &c.levels, &c.pool, &topk, &c.H, &c.Hkv, &c.D);
    CHECK(found >= 6, "--shape %s: give T,levels,pool,topk,H,Hkv[,D]", text.c_str());
    c.T = T, c.topk = topk;
    return c;
}

int main(int argc, char** argv) {
    std::vector<std::string> arguments(argv + 1, argv + argc);
    const bool with_dense = arguments.empty() || arguments[0] != "--without_dense";
    if (!with_dense) {
        arguments.erase(arguments.begin());
    }
    if (!arguments.empty() && arguments[0] == "--shape") {
        try {
            Harness harness(argv[0], "lighthouse_layer");
            for (size_t i = 1; i < arguments.size(); ++i) {
                measure_shape(harness, parse_shape(arguments[i]), LighthouseScorer::norm, with_dense);
            }
            return 0;
        } catch (const Error& error) {
            std::fprintf(stderr, "lighthouse_layer: %s\n", error.what());
            return 2;
        }
    }
    static const std::vector<Variant<Launcher>> VARIANTS = {{1, "the layer (llmc/lighthouse.cuh)", 0}};
    return run_variants(argc, argv, "lighthouse_layer", VARIANTS, check, measure);
}
