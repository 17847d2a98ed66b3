// context_attention.cu: attention of one sequence on several ranks (llmc/context_attention.cuh), forward and backward,
// against attention of the whole sequence in float64. The ranks are threads of this process that share one GPU
// (loopback_comm.cuh).
//
// The limit of an output: what flash attention itself may be off (flash_attention_cases.cuh), and twice what rounding
// every rank's partial results of out and dq to bf16 costs, found by the same schedule in double with that rounding and
// nothing else (dev/test/ring_emulation.h). Gathering and exchanging heads are held to the same limits, though they
// round less; heads, taken one by one, also to the bits of flash attention on one GPU. Ring and gather must send the
// least that any way can that moves keys (loopback_comm.cuh); exchanging heads, each row of another rank's heads once
// each way.
#include "dev/test/ring_emulation.h"
#include "flash_attention_cases.cuh"
#include "llmc/context_attention.cuh"
#include "loopback_comm.cuh"

// ---- what should come out ----------------------------------------------------------------------
struct ContextCase {
    AttentionCase attention_case;
    int W;
    std::string label() const { return format_string("W%d %s", W, attention_case.label().c_str()); }
};
static ContextCase context_case(int W, int B, int64_t T, int H, int Hkv, int D, Scores scores = Scores::ordinary) {
    return {attention_case(B, T, T, H, Hkv, D, true, 0, scores), W};
}
static std::vector<ContextCase> context_cases(bool small) {
    if (small) {
        return {context_case(2, 1, 64, 2, 1, 64), context_case(3, 2, 60, 2, 2, 40), context_case(2, 2, 64, 4, 4, 64),
                context_case(4, 1, 64, 2, 1, 64)};
    }
    return {
        context_case(2, 1, 4, 2, 1, 64),
        context_case(2, 2, 1000, 4, 2, 128),
        context_case(2, 3, 516, 2, 1, 64),  // of variant 4's parts the last is smaller
        context_case(2, 1, 516, 6, 6, 64),  // and heads go in twos
        context_case(4, 1, 1024, 4, 4, 64),
        context_case(4, 2, 776, 8, 2, 128),
        context_case(3, 1, 606, 3, 1, 96),
        context_case(8, 1, 1040, 4, 1, 128),
        context_case(4, 1, 520, 2, 1, 72),
        context_case(2, 1, 516, 2, 2, 256),
        context_case(4, 1, 1024, 2, 2, 128, Scores::large),
        context_case(4, 1, 800, 4, 2, 64, Scores::dominant),
        context_case(2, 3, 516, 8, 4, 64),  // six parts of variants 6 and 7
        context_case(2, 3, 300, 4, 2, 64),  // of variants 4 and 7 two: two sequences, and one
        context_case(4, 2, 776, 8, 4, 128),
        context_case(3, 1, 606, 6, 3, 96),
        context_case(8, 1, 1040, 8, 8, 128),
        context_case(4, 1, 800, 4, 4, 64, Scores::dominant),
    };
}

static AttentionShape local_shape(AttentionShape whole, int W) {
    whole.Tq /= W, whole.Tk /= W;
    return whole;
}

// [B, T, heads, D] doubles of a view of host memory.
static Rows to_rows(HeadView<const bf16> view, int B, int64_t T, int heads, int D) {
    Rows rows(B, T, heads, D);
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t t = 0; t < T; ++t) {
            for (int h = 0; h < heads; ++h) {
                for (int d = 0; d < D; ++d) {
                    rows.view().row(b, t, h)[d] = __bfloat162float(view.row(b, t, h)[d]);
                }
            }
        }
    }
    return rows;
}
static std::vector<bf16> to_bf16(const Rows& rows) { return convert<bf16>(convert<float>(rows.values)); }

struct WholeRows {  // of the sequence
    Rows q, k, v, dout, out, dq, dk, dv, lse;
};
static Rows empty_like(const Rows& rows) { return Rows(rows.B, rows.rows, rows.heads, rows.D); }

// The ring in double, with the partial results of out and dq in bf16.
static WholeRows emulate(const WholeRows& in, int W) {
    WholeRows whole = in;
    whole.out = empty_like(in.q), whole.dq = empty_like(in.q);
    whole.dk = empty_like(in.k), whole.dv = empty_like(in.v);
    std::vector<RingEmulation> ranks;
    for (int r = 0; r < W; ++r) {
        const ContextPartition p = make_context_partition(in.q.rows, W, r);
        ranks.emplace_back(p, local_rows(in.q, p), KeyRows{local_rows(in.k, p), local_rows(in.v, p)});
        ranks.back().round = [](double x) { return (double)__bfloat162float(__float2bfloat16((float)x)); };
    }
    std::map<std::pair<int, int>, KeyRows> returned;  // (owner, step)
    for (int r = 0; r < W; ++r) {
        const auto fetch = [&](int s) { return ranks[ranks[r].steps()[s].source].keys_to_send(s); };
        ranks[r].forward(fetch);
        ranks[r].backward(local_rows(in.dout, make_context_partition(in.q.rows, W, r)), fetch,
                          [&](int s, const KeyRows& gradients) {
                              returned[{ranks[r].steps()[s].source, s}] = gradients;
                          });
    }
    for (int r = 0; r < W; ++r) {
        for (int s = 1; s < W; ++s) {
            ranks[r].add_returned(s, returned.at({r, s}));
        }
        const ContextPartition p = make_context_partition(in.q.rows, W, r);
        put_local_rows(whole.out, ranks[r].out, p);
        put_local_rows(whole.dq, ranks[r].dq, p);
        put_local_rows(whole.dk, ranks[r].dkv.k, p);
        put_local_rows(whole.dv, ranks[r].dkv.v, p);
    }
    return whole;
}

// ---- what comes out ----------------------------------------------------------------------------
// Packed local rows [B, rows, H + 2 Hkv, D] of q, k, v.
static std::vector<bf16> pack_local(const WholeRows& in, const ContextPartition& p, const AttentionShape& local) {
    std::vector<bf16> packed(packed_elements(local));
    const PackedViews views = packed_views(packed.data(), local);
    const auto put = [&](HeadView<bf16> view, const Rows& whole) {
        const Rows rows = local_rows(whole, p);
        const std::vector<bf16> values = to_bf16(rows);
        for (int64_t i = 0; i < (int64_t)values.size(); ++i) {
            const int64_t row = i / rows.D, h = row % rows.heads, t = row / rows.heads % rows.rows;
            view.row(row / rows.heads / rows.rows, t, h)[i % rows.D] = values[i];
        }
    };
    put(views.q, in.q);
    put(views.k, in.k);
    put(views.v, in.v);
    return packed;
}

struct ContextOutputs {
    WholeRows rows;
    ExchangedBytes bytes, planned_bytes;
    bool guards_intact = true;
};

// What travels, and how many keys a part of the batch has at least.
struct Launcher {
    ContextExchange exchange;
    std::optional<int64_t> part_keys = {};

    bool by_heads() const { return exchange == ContextExchange::heads; }
    bool takes(const ContextCase& c) const { return !by_heads() || c.attention_case.shape.Hkv % c.W == 0; }
    // Received by all ranks in a layer.
    ExchangedBytes least_bytes(const AttentionShape& whole, int W) const {
        if (!by_heads()) {
            const LeastExchange least(W, whole.Tq);
            return {least.forward_bytes(whole.B, whole.Hkv, whole.D),
                    least.backward_bytes(whole.B, whole.Hkv, whole.D)};
        }
        // Rows of one head that lie on another rank than the one that attends with it.
        const int64_t rows = whole.B * (whole.Tq - whole.Tq / W) * whole.D * (int64_t)sizeof(bf16);
        return {rows * (2 * whole.H + 2 * whole.Hkv), rows * (4 * whole.H + 4 * whole.Hkv)};
    }
};

// What one rank works on. Operands lie packed; outputs in buffers of NaN.
struct RankWork {
    LoopbackComm& comm;
    const ContextPartition partition;
    const AttentionShape local;
    CudaStream stream;
    std::unique_ptr<ContextAttention> attention;
    DeviceBuffer<bf16> qkv, dout, out, dqkv;
    DeviceBuffer<float> lse;
    DeviceBuffer<char> forward_scratch, backward_scratch;
    int64_t forward_bytes = 0, backward_bytes = 0;  // received

    RankWork(LoopbackComm& comm, const WholeRows& in, const AttentionShape& whole, Launcher launch, bool deterministic)
        : comm(comm),
          partition(make_context_partition(whole.Tq, comm.size(), comm.rank())),
          local(local_shape(whole, comm.size())),
          attention(make_context_attention(comm, launch.exchange, launch.part_keys)),
          qkv(pack_local(in, partition, local)),
          dout(to_bf16(local_rows(in.dout, partition))),
          out(dout.size()),
          dqkv(qkv.size()),
          lse((int64_t)local.B * local.H * local.Tq),
          forward_scratch((int64_t)attention->plan().forward_scratch_bytes(local)),
          backward_scratch((int64_t)attention->plan().backward_scratch_bytes(local, deterministic)) {}

    void run(bool deterministic, int64_t delay_cycles) {
        const PackedViews operands = packed_views(qkv, local), gradients = packed_views(dqkv, local);
        attention->forward(rows(out), lse, operands.q, operands.k, operands.v, forward_scratch, local, stream);
        forward_bytes = comm.bytes_received();
        if (delay_cycles > 0) {
            delay_kernel<<<1, 1, 0, stream>>>(3 * delay_cycles * comm.rank());
            CUDA_CHECK_LAUNCH();
        }
        attention->backward(gradients.q, gradients.k, gradients.v, rows(dout), operands.q, operands.k, operands.v,
                            rows(out), lse, backward_scratch, local, deterministic, stream);
        backward_bytes = comm.bytes_received() - forward_bytes;
    }
    HeadView<bf16> rows(bf16* data) const {
        return {data, local.Tq * local.H * local.D, (int64_t)local.H * local.D, local.D};
    }
    bool guards_intact() const {
        return out.guards_intact() && dqkv.guards_intact() && lse.guards_intact() && forward_scratch.guards_intact() &&
               backward_scratch.guards_intact();
    }
};

// Forward and backward on W ranks.
static ContextOutputs run_ranks(const WholeRows& in, const AttentionShape& whole, int W, Launcher launch,
                                bool deterministic, int64_t delay_cycles) {
    LoopbackRanks<RankWork> ranks(W, delay_cycles, in, whole, launch, deterministic);
    ranks.run([&](RankWork& rank) { rank.run(deterministic, delay_cycles); });
    ContextOutputs result;
    result.rows.out = empty_like(in.q), result.rows.dq = empty_like(in.q);
    result.rows.dk = empty_like(in.k), result.rows.dv = empty_like(in.v);
    result.rows.lse = Rows(in.q.B * in.q.heads, in.q.rows, 1, 1);
    for (const auto& rank : ranks.work()) {
        const AttentionShape& local = rank->local;
        std::vector<bf16> out = rank->out.download(), dqkv = rank->dqkv.download();
        const PackedViews gradients = packed_views(dqkv.data(), local);
        const auto put = [&](Rows& rows, HeadView<const bf16> view, int heads) {
            put_local_rows(rows, to_rows(view, local.B, local.Tq, heads, local.D), rank->partition);
        };
        put(result.rows.out, rank->rows(out.data()), local.H);
        put(result.rows.dq, gradients.q, local.H);
        put(result.rows.dk, gradients.k, local.Hkv);
        put(result.rows.dv, gradients.v, local.Hkv);
        const std::vector<double> lse_values = to_double(rank->lse.download());
        if (launch.by_heads()) {  // [B, H / W, T]
            const int64_t T = whole.Tq, heads = whole.H / W, first = rank->comm.rank() * heads;
            for (int64_t b = 0; b < whole.B; ++b) {
                std::copy_n(lse_values.begin() + b * heads * T, heads * T,
                            result.rows.lse.values.begin() + (b * whole.H + first) * T);
            }
        } else {
            Rows lse((int64_t)local.B * local.H, local.Tq, 1, 1);
            lse.values = lse_values;
            put_local_rows(result.rows.lse, lse, rank->partition);
        }
        result.bytes.forward += rank->forward_bytes;
        result.bytes.backward += rank->backward_bytes;
        result.planned_bytes.forward += rank->attention->plan().forward_bytes_received(local);
        result.planned_bytes.backward += rank->attention->plan().backward_bytes_received(local);
        result.guards_intact = result.guards_intact && rank->guards_intact();
    }
    return result;
}
static bool same_rows(const Rows& a, const Rows& b) {
    return std::memcmp(a.values.data(), b.values.data(), a.num_bytes()) == 0;
}

// Flash attention of the whole sequence, one sequence and key/value head after another, as a rank calls it that has
// them from an exchange of heads one by one.
static WholeRows attend_one_by_one(const PreparedCase& c) {
    const AttentionShape& s = c.shape();
    const int group = s.H / s.Hkv;
    const PackedViews operands = c.operands();
    DeviceBuffer<bf16> out(s.B * s.Tq * s.H * s.D), dqkv(packed_elements(s));
    DeviceBuffer<float> lse(s.B * s.H * s.Tq);
    AttentionShape one = s;
    one.B = one.Hkv = 1, one.H = group, one.yields = true;
    DeviceBuffer<char> scratch((int64_t)flash_attention_backward_scratch_bytes(one, true));
    const HeadView<bf16> out_rows = {out, s.Tq * s.H * s.D, (int64_t)s.H * s.D, s.D};
    const PackedViews gradients = packed_views(dqkv, s);
    const auto head_of = [](auto view, int64_t b, int64_t h) {
        view.data = view.row(b, 0, h);
        return view;
    };
    CudaStream stream;
    for (int64_t b = 0; b < s.B; ++b) {
        for (int64_t kv = 0; kv < s.Hkv; ++kv) {
            const int64_t h = kv * group;
            const HeadView<const bf16> q = head_of(operands.q, b, h), k = head_of(operands.k, b, kv),
                                       v = head_of(operands.v, b, kv);
            float* const head_lse = lse + (b * s.H + h) * s.Tq;
            flash_attention_forward(head_of(out_rows, b, h), head_lse, q, k, v, one, stream);
            flash_attention_backward(head_of(gradients.q, b, h), head_of(gradients.k, b, kv),
                                     head_of(gradients.v, b, kv), head_of(c.dout_view(), b, h), q, k, v,
                                     head_of(out_rows, b, h), head_lse, scratch, one, true, stream);
        }
    }
    CUDA_CHECK(cudaStreamSynchronize(stream));
    const std::vector<bf16> out_values = out.download();
    std::vector<bf16> gradient_values = dqkv.download();
    const PackedViews found = packed_views(gradient_values.data(), s);
    WholeRows whole;
    whole.out =
        to_rows({out_values.data(), out_rows.stride_b, out_rows.stride_t, out_rows.stride_h}, s.B, s.Tq, s.H, s.D);
    whole.dq = to_rows(found.q, s.B, s.Tq, s.H, s.D);
    whole.dk = to_rows(found.k, s.B, s.Tk, s.Hkv, s.D);
    whole.dv = to_rows(found.v, s.B, s.Tk, s.Hkv, s.D);
    whole.lse = Rows(s.B * s.H, s.Tq, 1, 1);
    whole.lse.values = to_double(lse.download());
    return whole;
}

// ---- the checks --------------------------------------------------------------------------------
static bool same_results(const WholeRows& a, const WholeRows& b) {
    return same_rows(a.out, b.out) && same_rows(a.lse, b.lse) && same_rows(a.dq, b.dq) && same_rows(a.dk, b.dk) &&
           same_rows(a.dv, b.dv);
}

static void check_case(Harness& h, const ContextCase& context, Launcher launch) {
    const PreparedCase c = prepare_case(context.attention_case, h.seed);
    const AttentionShape& s = c.shape();
    const int W = context.W;
    const std::string label = context.label();
    WholeRows in;
    {
        std::vector<bf16> qkv = c.qkv->download(), dout = c.dout->download();
        const PackedViews views = packed_views(qkv.data(), s);
        in.q = to_rows(views.q, s.B, s.Tq, s.H, s.D);
        in.k = to_rows(views.k, s.B, s.Tk, s.Hkv, s.D);
        in.v = to_rows(views.v, s.B, s.Tk, s.Hkv, s.D);
        in.dout = to_rows(padded_view(dout.data(), s), s.B, s.Tq, s.H, s.D);
    }
    const WholeRows plain = emulate(in, W);
    const ContextOutputs found = run_ranks(in, s, W, launch, true, 0);
    const auto compare = [&](const char* name, const Rows& rows, const Rows& ring_plain,
                             const std::vector<double>& expected, const std::vector<double>& rounded, double floor) {
        const double ring_error = difference(to_bf16(ring_plain), expected, floor).max_error;
        h.compare(name, label, to_bf16(rows), expected, c.limit(expected, rounded, floor) + 2.0 * ring_error,
                  {s.B, rows.rows, rows.heads, s.D}, floor);
    };
    compare("out", found.rows.out, plain.out, c.exact.out, c.rounded.out, root_mean_square(c.exact.out));
    compare("dq", found.rows.dq, plain.dq, c.exact.dq, c.rounded.dq, c.gradient_floor(c.exact.dq));
    compare("dk", found.rows.dk, plain.dk, c.exact.dk, c.rounded.dk, c.gradient_floor(c.exact.dk));
    compare("dv", found.rows.dv, plain.dv, c.exact.dv, c.rounded.dv, c.gradient_floor(c.exact.dv));
    // Scores of magnitude s are off by 2^-22 s, and their sum's logarithm by as much, and a few roundings of its own.
    h.compare("lse", label, convert<float>(found.rows.lse.values), c.exact.lse, c.max_score * 0x1p-22 + 16 * 0x1p-24,
              {s.B, s.H, s.Tq}, 1.0);
    h.expect(found.guards_intact, "guards", label, found.guards_intact ? "intact" : "stray write");
    expect_least_bytes(h, label, found.bytes, launch.least_bytes(s, W));
    h.expect(
        found.planned_bytes.forward == found.bytes.forward && found.planned_bytes.backward == found.bytes.backward,
        "planned bytes", label,
        format_string("%lld, %lld", (long long)found.planned_bytes.forward, (long long)found.planned_bytes.backward));

    if (launch.by_heads() && launch.part_keys == 1) {
        const bool same = same_results(attend_one_by_one(c), found.rows);
        h.expect(same, "one GPU's bits", label, same ? "the same" : "others");
    }

    // Other timing, the same bits: transfers slowed down, and ranks that lag.
    for (const int64_t delay : {(int64_t)0, (int64_t)200000}) {
        const ContextOutputs again = run_ranks(in, s, W, launch, true, delay);
        const bool same = same_results(again.rows, found.rows);
        h.expect(same, "repeats", label,
                 format_string("delay %lld cycles: %s", (long long)delay, same ? "the same bits" : "other bits"));
    }
    // The fast backward, whose dq is summed in any order.
    const ContextOutputs fast = run_ranks(in, s, W, launch, false, 0);
    const double floor = c.gradient_floor(c.exact.dq);
    const double ring_error = difference(to_bf16(plain.dq), c.exact.dq, floor).max_error;
    h.compare("dq_fast", label, to_bf16(fast.rows.dq), c.exact.dq,
              c.limit(c.exact.dq, c.rounded.dq, floor) + 2.0 * ring_error, {s.B, s.Tq, s.H, s.D}, floor);
    h.expect(fast.guards_intact, "guards_fast", label, fast.guards_intact ? "intact" : "stray write");
}

// What runs on two streams at once, and when, by events of its own.
struct TimedPair {
    cudaEvent_t transfer_begin, transfer_end, computation_begin, computation_end;

    TimedPair() {
        for (cudaEvent_t* event : {&transfer_begin, &transfer_end, &computation_begin, &computation_end}) {
            CUDA_CHECK(cudaEventCreate(event));
        }
    }
    TimedPair(const TimedPair&) = delete;
    TimedPair& operator=(const TimedPair&) = delete;
    ~TimedPair() {
        for (cudaEvent_t event : {transfer_begin, transfer_end, computation_begin, computation_end}) {
            cudaEventDestroy(event);
        }
    }
    double transfer_ms() const { return between(transfer_begin, transfer_end); }
    // Milliseconds in which both ran.
    double overlap_ms() const {
        const double computation_from = between(transfer_begin, computation_begin);
        const double computation_to = between(transfer_begin, computation_end);
        return std::max(0.0, std::min(transfer_ms(), computation_to) - std::max(0.0, computation_from));
    }

  private:
    static double between(cudaEvent_t first, cudaEvent_t second) {
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, first, second));
        return ms;
    }
};

// The profile of transfers: one half as long as what it runs beside, one three times as long, and one that nothing runs
// beside. How long they take on a GPU that others use too, events around them say; on an idle one 1, 1/3 and 0 of them
// are hidden.
static void check_profile(Harness& h) {
    constexpr int64_t CYCLES = 40000000;  // 20 ms: far above what launches take
    CudaStream stream, transfers;
    CudaEvent event;
    TransferProfile profile;
    profile.record(true);
    const auto operation = [&](const char* name, const TimedPair& timed, int64_t computation_cycles,
                               int64_t transfer_cycles) {
        profile.begin_operation(name);
        wait_for(transfers, stream, event);
        profile.begin_span(TransferLane::transfers, 0, transfers);
        CUDA_CHECK(cudaEventRecord(timed.transfer_begin, transfers));
        delay_kernel<<<1, 1, 0, transfers>>>(transfer_cycles);
        CUDA_CHECK(cudaEventRecord(timed.transfer_end, transfers));
        profile.end_span(TransferLane::transfers, transfers);
        profile.begin_span(TransferLane::computation, 0, stream);
        CUDA_CHECK(cudaEventRecord(timed.computation_begin, stream));
        delay_kernel<<<1, 1, 0, stream>>>(computation_cycles);
        CUDA_CHECK(cudaEventRecord(timed.computation_end, stream));
        profile.end_span(TransferLane::computation, stream);
        wait_for(stream, transfers, event);
    };
    const char* const names[] = {"shorter", "longer", "alone"};
    const int64_t computation_cycles[] = {2 * CYCLES, CYCLES, 1}, transfer_cycles[] = {CYCLES, 3 * CYCLES, CYCLES};
    TimedPair timed[3];
    double transfer_ms[3] = {}, overlap_ms[3] = {};
    for (int step = 0; step < 3; ++step) {
        for (int i = 0; i < 3; ++i) {
            operation(names[i], timed[i], computation_cycles[i], transfer_cycles[i]);
        }
        CUDA_CHECK_LAUNCH();
        CUDA_CHECK(cudaStreamSynchronize(stream));
        profile.end_step();
        for (int i = 0; i < 3 && step > 0; ++i) {  // the profile leaves out the first step
            transfer_ms[i] += timed[i].transfer_ms();
            overlap_ms[i] += timed[i].overlap_ms();
        }
    }
    for (int i = 0; i < 3; ++i) {
        const double hidden = profile.hidden(names[i]), expected = overlap_ms[i] / transfer_ms[i];
        h.expect(std::abs(hidden - expected) < 0.05, "profile", format_string("a transfer, %s", names[i]),
                 format_string("hidden %.3f, by events around it %.3f", hidden, expected));
    }
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    if (h.small) {  // times nothing: under compute-sanitizer, beside other programs, lengths are any
        std::printf("     left out with --small: the profile of transfers, which is measured\n");
    } else {
        check_profile(h);
    }
    for (const ContextCase& c : context_cases(h.small)) {
        if (variant.launch.takes(c)) {
            check_case(h, c, variant.launch);
        }
    }
}

// ---- timing ------------------------------------------------------------------------------------
// All threads of a group meet here.
class ThreadBarrier {
  public:
    explicit ThreadBarrier(int size) : size_(size) {}
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const int64_t meeting = meeting_;
        if (++waiting_ == size_) {
            waiting_ = 0;
            ++meeting_;
            changed_.notify_all();
        }
        CHECK(changed_.wait_for(lock, std::chrono::seconds(60), [&] { return meeting_ != meeting; }),
              "a rank is missing");
    }

  private:
    int size_;
    std::mutex mutex_;
    std::condition_variable changed_;
    int waiting_ = 0;
    int64_t meeting_ = 0;
};

// Operands and results of one rank's attention, or of one GPU's.
struct TimedAttention {
    AttentionShape shape;
    DeviceBuffer<bf16> qkv, dqkv, out, dout;
    DeviceBuffer<float> lse;
    PackedViews in, d;

    TimedAttention(const AttentionShape& shape, uint64_t seed)
        : shape(shape),
          qkv(packed_elements(shape)),
          dqkv(packed_elements(shape)),
          out(shape.Tq * shape.H * shape.D),
          dout(shape.Tq * shape.H * shape.D),
          lse(shape.H * shape.Tq),
          in(packed_views(qkv, shape)),
          d(packed_views(dqkv, shape)) {
        qkv.fill_random(seed);
        dout.fill_random(seed + 1);
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    HeadView<bf16> rows(bf16* data) const {
        return {data, shape.Tq * shape.H * shape.D, (int64_t)shape.H * shape.D, shape.D};
    }
};

// One of the ranks whose attention is timed.
struct TimedRank {
    LoopbackComm& comm;
    CudaStream stream;
    std::unique_ptr<ContextAttention> attention;
    TimedAttention a;
    DeviceBuffer<char> scratch;
    std::vector<double> times[2];  // milliseconds of forward, of backward
    int64_t bytes[2] = {};         // received in one

    TimedRank(LoopbackComm& comm, const AttentionShape& local, Launcher launch, uint64_t seed)
        : comm(comm),
          attention(make_context_attention(comm, launch.exchange, launch.part_keys)),
          a(local, seed + 2 * comm.rank()),
          scratch((int64_t)std::max(attention->plan().forward_scratch_bytes(local),
                                    attention->plan().backward_scratch_bytes(local, false))) {}
    void forward() { attention->forward(a.rows(a.out), a.lse, a.in.q, a.in.k, a.in.v, scratch, a.shape, stream); }
    void backward() {
        attention->backward(a.d.q, a.d.k, a.d.v, a.rows(a.dout), a.in.q, a.in.k, a.in.v, a.rows(a.out), a.lse, scratch,
                            a.shape, false, stream);
    }
};

// What the path costs beside its attention, where transfers cost next to nothing: W ranks share this GPU, so together
// they do the work of one GPU's attention of the whole sequence, and what is left is the overhead of packing, partial
// outputs, sums, copies, and more and smaller launches.
static void measure_shape(Harness& h, const Variant<Launcher>& variant, int W, int64_t T) {
    AttentionShape whole;
    whole.H = whole.Hkv = 8, whole.D = 128;
    whole.Tq = whole.Tk = T;
    whole.scale = 1.0f / std::sqrt((float)whole.D);
    double one_rank_ms[2];
    {
        TimedAttention a(whole, h.seed);
        DeviceBuffer<char> scratch((int64_t)flash_attention_backward_scratch_bytes(whole, false));
        one_rank_ms[0] =
            h.time_ms([&] { flash_attention_forward(a.rows(a.out), a.lse, a.in.q, a.in.k, a.in.v, whole, h.stream); });
        one_rank_ms[1] = h.time_ms([&] {
            flash_attention_backward(a.d.q, a.d.k, a.d.v, a.rows(a.dout), a.in.q, a.in.k, a.in.v, a.rows(a.out), a.lse,
                                     scratch, whole, false, h.stream);
        });
    }
    constexpr int RUNS = 5;
    ThreadBarrier barrier(W);
    LoopbackRanks<TimedRank> ranks(W, 0, local_shape(whole, W), variant.launch, h.seed);
    ranks.run([&](TimedRank& rank) {
        for (int run = 0; run < 2 * (1 + RUNS); ++run) {  // forward and backward in turn; the first ones warm up
            CUDA_CHECK(cudaDeviceSynchronize());
            barrier.wait();
            const int64_t bytes_before = rank.comm.bytes_received();
            const auto start = std::chrono::steady_clock::now();
            run % 2 == 0 ? rank.forward() : rank.backward();
            CUDA_CHECK(cudaStreamSynchronize(rank.stream));
            barrier.wait();
            const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            if (run >= 2) {
                rank.times[run % 2].push_back(1e3 * seconds);
            }
            rank.bytes[run % 2] = rank.comm.bytes_received() - bytes_before;
        }
    });
    std::vector<double>* const times = ranks.work()[0]->times;
    int64_t bytes[2] = {};  // received by all ranks in one forward, one backward
    for (const auto& rank : ranks.work()) {
        bytes[0] += rank->bytes[0], bytes[1] += rank->bytes[1];
    }
    for (int i = 0; i < 2; ++i) {
        std::nth_element(times[i].begin(), times[i].begin() + RUNS / 2, times[i].end());
        const double ms = times[i][RUNS / 2];
        const ExchangedBytes least = variant.launch.least_bytes(whole, W);
        const int64_t least_bytes = i == 0 ? least.forward : least.backward;
        std::printf(
            "time context_attention %d  W%d T%lld H%d D%d %s  %.3f ms, on one rank %.3f ms: %+.1f %%, %.2f MiB a rank, "
            "%.4f of the least  (%s)\n",
            variant.number, W, (long long)T, whole.H, whole.D, i == 0 ? "forward" : "backward", ms, one_rank_ms[i],
            100.0 * (ms / one_rank_ms[i] - 1.0), (double)bytes[i] / W / (1 << 20),
            (double)bytes[i] / (double)least_bytes, variant.idea);
    }
}
static void measure(Harness& h, const Variant<Launcher>& variant) {
    measure_shape(h, variant, 2, 98304);
    measure_shape(h, variant, 4, 32768);
    measure_shape(h, variant, 8, 131072);
}

int main(int argc, char** argv) {
    static const std::vector<Variant<Launcher>> VARIANTS = {
        {1, "gather all keys, then attention as on one GPU", {ContextExchange::gather}},
        {2, "ring: a step's transfer beside a step's attention", {ContextExchange::ring}},
        {3, "the same, one sequence and key/value head after another", {ContextExchange::ring, 1}},
        {4, "the same, as few sequences or heads as have 256 keys a chunk", {ContextExchange::ring, 256}},
        {5, "heads: a part's transfers beside another's attention", {ContextExchange::heads}},
        {6, "the same, one sequence and key/value head after another", {ContextExchange::heads, 1}},
        {7, "the same, as few sequences or heads as have 512 keys", {ContextExchange::heads, 512}},
    };
    return run_variants(argc, argv, "context_attention", VARIANTS, check, measure);
}
