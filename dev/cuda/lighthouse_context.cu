// lighthouse_context.cu: Lighthouse attention of sequences on W ranks (llmc/lighthouse_context.cuh) against one GPU's
// layer on the same sequences: the same entries, outputs and gradients equal up to the rounding of partial results, and
// no byte sent beyond the least; dq and dk turned back by their positions. The ranks are threads on one GPU
// (loopback_comm.cuh).
//   build/dev/lighthouse_context [--variant N] [--check_only] [--small] [--seed N]
#include "dev/cuda/lighthouse_cases.cuh"
#include "dev/cuda/loopback_comm.cuh"
#include "dev/cuda/rope_cases.cuh"
#include "llmc/lighthouse_context.cuh"

using Launcher = ContextExchange;

struct ContextCase {
    int W;
    LighthouseCase layer;
    std::string label() const { return format_string("W%d %s", W, layer.label().c_str()); }
    LighthouseConfig config() const {
        LighthouseConfig config;
        config.levels = layer.levels, config.pool = layer.pool, config.topk = layer.topk;
        return config;
    }
};
// Four, six and eight chunks of one and of two tiles, half of the coarsest entries selected, grouped queries, levels
// whose windows reach far over a border.
static std::vector<ContextCase> context_cases(bool small) {
    if (small) {
        return {{2, {1, 2048, 2, 2, 512, 1, 1, 8}}, {2, {1, 2048, 2, 2, 512, 2, 2, 8}}};
    }
    return {{2, {1, 2048, 2, 2, 512, 1, 1, 8}},    {2, {2, 16384, 3, 4, 512, 4, 2, 64}},
            {2, {1, 16384, 4, 2, 1024, 3, 3, 80}}, {3, {1, 6144, 2, 2, 768, 2, 1, 128}},
            {4, {1, 4096, 2, 2, 1024, 2, 1, 128}}, {4, {2, 16384, 3, 2, 1024, 4, 4, 64}}};
}

// By which dq and dk come out turned back; positions: of all rows or of a rank's two chunks.
static RopeRotation rotation_of(const LighthouseShape& shape, const RopePositions& positions) {
    return {make_rope_frequencies(rope_config(shape.H, shape.Hkv, shape.D)), positions};
}

// What the layer makes of packed qkv and dout; all of it on the host, in the order of the sequence.
struct LayerResults {
    std::vector<bf16> out, dqkv;
    std::vector<int32_t> entries;  // [B, Hkv, S]
    ExchangedBytes bytes;
    bool guards_intact = true;
    bool repeats = true;  // output_again gives the forward's bits
};

static LayerResults run_one_gpu(const std::vector<bf16>& qkv_rows, const std::vector<bf16>& dout_rows,
                                const LighthouseShape& shape) {
    const int64_t T = shape.geometry.T;
    CudaStream stream;
    DeviceBuffer<bf16> qkv(qkv_rows), dout(dout_rows), out(dout.size()), dqkv(qkv.size());
    DeviceBuffer<char> saved((int64_t)lighthouse_saved_bytes(shape));
    DeviceBuffer<char> forward_scratch((int64_t)lighthouse_forward_scratch_bytes(shape));
    DeviceBuffer<char> backward_scratch((int64_t)lighthouse_backward_scratch_bytes(shape, true));
    const QkvHeads<bf16> in = packed_heads(qkv.data(), T, shape), d = packed_heads(dqkv.data(), T, shape);
    lighthouse_forward(plain_heads(out.data(), T, shape.H, shape.D), saved, in.q, in.k, in.v, forward_scratch, shape,
                       stream);
    const RopeRotation rotation = rotation_of(shape, rope_one_run(T));
    lighthouse_backward(d.q, d.k, d.v, plain_heads(dout.data(), T, shape.H, shape.D), saved, backward_scratch, shape,
                        true, stream, &rotation);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    LayerResults result;
    result.out = out.download(), result.dqkv = dqkv.download();
    MemoryArea area(saved.data());
    const LighthouseSaved s(area, shape);
    result.entries.resize(shape.num_selections() * shape.geometry.S);
    CUDA_CHECK(
        cudaMemcpy(result.entries.data(), s.entries, result.entries.size() * sizeof(int32_t), cudaMemcpyDeviceToHost));
    return result;
}

// Copies the rows of a rank between [B, T, width] and its own [B, 2n, width].
template <class Element>
std::vector<Element> local_part(const std::vector<Element>& whole, int64_t width, const ContextPartition& p) {
    std::vector<Element> local(whole.size() / p.W);
    for (int64_t row = 0; row < (int64_t)local.size() / width; ++row) {
        const int64_t from = row / p.local_rows() * p.T + p.position(row % p.local_rows());
        std::copy_n(whole.data() + from * width, width, local.data() + row * width);
    }
    return local;
}
template <class Element>
void put_local(std::vector<Element>& whole, const std::vector<Element>& local, int64_t width,
               const ContextPartition& p) {
    whole.resize(local.size() * p.W);
    for (int64_t row = 0; row < (int64_t)local.size() / width; ++row) {
        const int64_t to = row / p.local_rows() * p.T + p.position(row % p.local_rows());
        std::copy_n(local.data() + row * width, width, whole.data() + to * width);
    }
}

// The pyramid address in the whole sequence of an entry of chunk number `chunk`.
static int32_t whole_entry(int32_t entry, int64_t chunk, const LighthouseGeometry& part,
                           const LighthouseGeometry& whole) {
    int level = part.levels - 1;
    while (level > 0 && entry < part.level_offset(level)) {
        --level;
    }
    const int64_t index = entry - part.level_offset(level) + chunk * part.level_size(level);
    return (int32_t)(whole.level_offset(level) + index);
}

// What one rank works on.
struct RankWork {
    LoopbackComm& comm;
    const ContextPartition partition;
    const LighthouseShape whole, chunks;
    CudaStream stream;
    LighthouseContext layer;
    DeviceBuffer<bf16> qkv, dout, out, again, dqkv;
    DeviceBuffer<char> saved, forward_scratch, backward_scratch;
    int64_t forward_bytes = 0, backward_bytes = 0;  // received

    RankWork(LoopbackComm& comm, const ContextCase& c, const LighthouseShape& whole, ContextExchange exchange,
             const std::vector<bf16>& qkv_rows, const std::vector<bf16>& dout_rows)
        : RankWork(comm, c, whole, exchange, qkv_rows, dout_rows,
                   *make_context_attention_plan(c.W, comm.rank(), exchange)) {}

    void run(int64_t delay_cycles) {
        const int64_t rows = partition.local_rows();
        const QkvHeads<bf16> in = packed_heads(qkv.data(), rows, whole), d = packed_heads(dqkv.data(), rows, whole);
        layer.forward(plain_heads(out.data(), rows, whole.H, whole.D), saved, in.q, in.k, in.v, forward_scratch, chunks,
                      stream);
        forward_bytes = comm.bytes_received();
        layer.output_again(plain_heads(again.data(), rows, whole.H, whole.D), saved, chunks, stream);
        if (delay_cycles > 0) {
            delay_kernel<<<1, 1, 0, stream>>>(3 * delay_cycles * comm.rank());
            CUDA_CHECK_LAUNCH();
        }
        const RopeRotation rotation = rotation_of(
            whole, {rows, partition.chunk_rows(), {partition.first_position(0), partition.first_position(1)}});
        layer.backward(d.q, d.k, d.v, plain_heads(dout.data(), rows, whole.H, whole.D), saved, backward_scratch, chunks,
                       true, stream, &rotation);
        backward_bytes = comm.bytes_received() - forward_bytes;
    }
    // [2 B, Hkv, S], addresses within the chunks.
    std::vector<int32_t> entries() const {
        MemoryArea area(saved.data());
        const LighthouseContextSaved s(area, chunks);
        std::vector<int32_t> entries(chunks.num_selections() * chunks.geometry.S);
        CUDA_CHECK(
            cudaMemcpy(entries.data(), s.chunks.entries, entries.size() * sizeof(int32_t), cudaMemcpyDeviceToHost));
        return entries;
    }
    bool guards_intact() const {
        return out.guards_intact() && again.guards_intact() && dqkv.guards_intact() && saved.guards_intact() &&
               forward_scratch.guards_intact() && backward_scratch.guards_intact();
    }

  private:
    RankWork(LoopbackComm& comm, const ContextCase& c, const LighthouseShape& whole, ContextExchange exchange,
             const std::vector<bf16>& qkv_rows, const std::vector<bf16>& dout_rows, const ContextAttentionPlan& inner)
        : comm(comm),
          partition(make_context_partition(whole.geometry.T, c.W, comm.rank())),
          whole(whole),
          chunks(make_lighthouse_chunk_shape(whole, c.config(), c.W, comm.rank())),
          layer(comm, exchange),
          qkv(local_part(qkv_rows, (int64_t)whole.num_heads() * whole.D, partition)),
          dout(local_part(dout_rows, (int64_t)whole.H * whole.D, partition)),
          out(dout.size()),
          again(dout.size()),
          dqkv(qkv.size()),
          saved((int64_t)lighthouse_context_saved_bytes(chunks)),
          forward_scratch((int64_t)lighthouse_context_forward_scratch_bytes(inner, chunks)),
          backward_scratch((int64_t)lighthouse_context_backward_scratch_bytes(inner, chunks, true)) {}
};

static LayerResults run_ranks(const std::vector<bf16>& qkv_rows, const std::vector<bf16>& dout_rows,
                              const ContextCase& c, const LighthouseShape& whole, ContextExchange exchange,
                              int64_t delay_cycles) {
    LoopbackRanks<RankWork> ranks(c.W, delay_cycles, c, whole, exchange, qkv_rows, dout_rows);
    ranks.run([&](RankWork& rank) { rank.run(delay_cycles); });
    LayerResults result;
    result.entries.resize(whole.num_selections() * whole.geometry.S);
    for (const auto& rank : ranks.work()) {
        const ContextPartition& p = rank->partition;
        const std::vector<bf16> out = rank->out.download(), again = rank->again.download();
        put_local(result.out, out, (int64_t)whole.H * whole.D, p);
        put_local(result.dqkv, rank->dqkv.download(), (int64_t)whole.num_heads() * whole.D, p);
        const int64_t S = rank->chunks.geometry.S;
        const std::vector<int32_t> entries = rank->entries();
        for (int64_t i = 0; i < (int64_t)entries.size(); ++i) {
            const int64_t n = i % S, selection = i / S, h = selection % whole.Hkv, b = selection / whole.Hkv;
            const int64_t chunk = p.chunk((int)(b % HALVES));
            result.entries[((b / HALVES) * whole.Hkv + h) * whole.geometry.S + chunk * S + n] =
                whole_entry(entries[i], chunk, rank->chunks.geometry, whole.geometry);
        }
        result.bytes.forward += rank->forward_bytes;
        result.bytes.backward += rank->backward_bytes;
        result.repeats = result.repeats && std::memcmp(out.data(), again.data(), out.size() * sizeof(bf16)) == 0;
        result.guards_intact = result.guards_intact && rank->guards_intact();
    }
    return result;
}

// Of the sub-sequence's keys, and of the rows that go over the borders between chunks of two ranks: 2W - 2 of the 2W -
// 1 borders, levels - 1 rows a head, bf16 forward and float32 backward.
// By heads the sub-sequence's rows travel as context_attention.cu says.
static ExchangedBytes least_bytes(const ContextCase& c, const LighthouseShape& whole, ContextExchange exchange) {
    const LeastExchange least(c.W, whole.geometry.S);
    const int64_t border_elements =
        (2 * c.W - 2) * (int64_t)c.layer.B * (whole.geometry.levels - 1) * whole.H * whole.D;
    if (exchange == ContextExchange::heads) {
        const int64_t S = whole.geometry.S,
                      elements = c.layer.B * (S - S / c.W) * (2 * whole.H + 2 * whole.Hkv) * whole.D;
        return {(elements + border_elements) * (int64_t)sizeof(bf16),
                2 * elements * (int64_t)sizeof(bf16) + border_elements * (int64_t)sizeof(float)};
    }
    return {least.forward_bytes(c.layer.B, whole.Hkv, whole.D) + border_elements * (int64_t)sizeof(bf16),
            least.backward_bytes(c.layer.B, whole.Hkv, whole.D) + border_elements * (int64_t)sizeof(float)};
}

static void check_case(Harness& h, const ContextCase& c, ContextExchange exchange) {
    const LighthouseShape whole = c.layer.shape();
    const int64_t rows = c.layer.B * c.layer.T, qkv_width = (int64_t)whole.num_heads() * whole.D;
    const int64_t q_width = (int64_t)whole.H * whole.D, k_width = (int64_t)whole.Hkv * whole.D;
    const std::string label = c.label();
    std::vector<bf16> qkv, dout;
    {
        DeviceBuffer<bf16> random(rows * qkv_width);
        random.fill_random(h.seed);
        qkv = random.download();
        DeviceBuffer<bf16> other(rows * q_width);
        other.fill_random(h.seed + 1);
        dout = other.download();
    }
    const LayerResults expected = run_one_gpu(qkv, dout, whole);
    const LayerResults found = run_ranks(qkv, dout, c, whole, exchange, 0);
    h.expect(found.entries == expected.entries, "selection", label, "the same entries in the same order");

    // Both sides are flash attention's, a few bf16 roundings from the truth; each of up to 2 W partial results of out
    // and dq is rounded once more, and dS differs with out. What is rounded of out are the weights of the rows of v:
    // where these cancel, its error is still of their size. So the floor is v's root mean square.
    const double limit = (8.0 + 2.0 * c.W) * 0x1p-9;
    const auto part = [&](const std::vector<bf16>& packed, int64_t begin, int64_t width) {
        std::vector<bf16> values(rows * width);
        for (int64_t row = 0; row < rows; ++row) {
            std::copy_n(packed.data() + row * qkv_width + begin, width, values.data() + row * width);
        }
        return values;
    };
    h.compare("out", label, found.out, to_double(expected.out), limit, {c.layer.B, c.layer.T, whole.H, whole.D},
              root_mean_square(to_double(part(qkv, q_width + k_width, k_width))));
    // An element of dk or dv is a sum over queries whose terms are as large as its row's elements, and those of the
    // first tokens are many times the mean: the error counts relative to the row where that is larger than most.
    const auto compare_part = [&](const char* name, int64_t begin, int64_t width, int heads) {
        std::vector<double> actual = to_double(part(found.dqkv, begin, width));
        std::vector<double> right = to_double(part(expected.dqkv, begin, width));
        const double typical = root_mean_square(right);
        for (size_t row = 0; row < right.size(); row += whole.D) {
            double squares = 0.0;
            for (int d = 0; d < whole.D; ++d) {
                squares += right[row + d] * right[row + d];
            }
            const double size = std::max(typical, std::sqrt(squares / whole.D));
            for (int d = 0; d < whole.D; ++d) {
                actual[row + d] /= size;
                right[row + d] /= size;
            }
        }
        h.compare(name, label, convert<float>(actual), right, limit, {c.layer.B, c.layer.T, heads, whole.D}, 1.0);
    };
    compare_part("dq", 0, q_width, whole.H);
    compare_part("dk", q_width, k_width, whole.Hkv);
    compare_part("dv", q_width + k_width, k_width, whole.Hkv);
    expect_least_bytes(h, label, found.bytes, least_bytes(c, whole, exchange));
    h.expect(found.guards_intact, "guards", label, found.guards_intact ? "intact" : "stray write");
    h.expect(found.repeats, "output_again", label, found.repeats ? "the same bits" : "other bits");

    // Other timing, the same bits.
    const LayerResults slow = run_ranks(qkv, dout, c, whole, exchange, 200000);
    const bool same = std::memcmp(slow.out.data(), found.out.data(), slow.out.size() * sizeof(bf16)) == 0 &&
                      std::memcmp(slow.dqkv.data(), found.dqkv.data(), slow.dqkv.size() * sizeof(bf16)) == 0;
    h.expect(same, "repeats", label, same ? "the same bits" : "other bits");
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    for (const ContextCase& c : context_cases(h.small)) {
        if (variant.launch != ContextExchange::heads || c.layer.Hkv % c.W == 0) {
            check_case(h, c, variant.launch);
        }
    }
}
// What a rank adds to one GPU's layer is its attention's, timed by context_attention.cu, and a few dozen rows.
static void measure(Harness&, const Variant<Launcher>&) {}

int main(int argc, char** argv) {
    static const std::vector<Variant<Launcher>> VARIANTS = {
        {1, "gather all keys of the sub-sequence", ContextExchange::gather},
        {2, "ring over the sub-sequence", ContextExchange::ring},
        {3, "heads of the sub-sequence", ContextExchange::heads},
    };
    return run_variants(argc, argv, "lighthouse_context", VARIANTS, check, measure);
}
