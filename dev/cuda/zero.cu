// zero.cu: the sharded optimizer (llmc/zero.cuh) on several ranks against one AdamW on sums over ranks: gradients,
// norm, loss, weights and state. The ranks are threads of this process that share one GPU (loopback_comm.cuh), which
// adds in the order of ranks, so everything but the norm's last bit must be equal.
#include "harness.cuh"
#include "llmc/zero.cuh"
#include "loopback_comm.cuh"

static std::vector<ZeroTensor> tensors_of(int num_layers, int64_t width) {
    std::vector<ZeroTensor> tensors = {{300 * width, false, -1}};  // embedding
    for (int l = 0; l < num_layers; ++l) {
        tensors.push_back({width, false, -1});
        tensors.push_back({3 * width * width, true, l});
        tensors.push_back({width * width + 5, true, l});
    }
    tensors.push_back({300 * width, true, num_layers});  // classifier
    return tensors;
}

using Launcher = int;  // ranks

struct Run {
    std::vector<float> gradients, state[3];  // flat; as gathered
    std::vector<bf16> weights;
    float norm = 0.0f, loss = 0.0f;
    bool guards_intact = true, ranks_agree = true;
};
static AdamWSettings settings_of(int step) {
    AdamWSettings settings;
    settings.learning_rate = 0.01, settings.adam_step = step;
    return settings;
}
// The gradient of `rank` at `step`, flat; zero in the padding, as the model's are.
static std::vector<float> gradient_of(const ZeroLayout& layout, int rank, int step, uint64_t seed) {
    std::vector<float> flat(layout.num_elements, 0.0f);
    for (size_t i = 0; i < layout.offsets.size(); ++i) {
        for (int64_t j = 0; j < layout.sizes[i]; ++j) {
            flat[layout.offsets[i] + j] = random_normal(seed + 1000 * step + rank, layout.offsets[i] + j);
        }
    }
    return flat;
}
static std::vector<float> initial_state(const ZeroLayout& layout, uint64_t seed) {
    return random_vector<float>(layout.num_elements, seed + 77);
}

static std::vector<float> initial_shard(const ZeroLayout& layout, int rank, uint64_t seed) {
    const std::vector<float> whole = initial_state(layout, seed);
    std::vector<float> shard(layout.shard_elements());
    for (const ZeroBucket& bucket : layout.buckets) {
        std::copy_n(whole.begin() + layout.slice_begin(bucket, rank), layout.slice_elements(bucket),
                    shard.begin() + bucket.shard_begin);
    }
    return shard;
}

constexpr int STEPS = 3;

// What one rank works on.
struct RankWork {
    LoopbackComm& comm;
    const ZeroLayout& layout;
    CudaStream stream;
    ZeroOptimizer zero;
    DeviceBuffer<float> master, exp_avg, exp_avg_sq, gradients, gathered, norm, loss;
    DeviceBuffer<bf16> weights;
    DeviceBuffer<char> scratch;
    std::vector<float> state[3];  // as gathered

    RankWork(LoopbackComm& comm, const ZeroLayout& layout, uint64_t seed)
        : comm(comm),
          layout(layout),
          zero(comm, layout),
          master(initial_shard(layout, comm.rank(), seed)),
          exp_avg(std::vector<float>(layout.shard_elements(), 0.0f)),
          exp_avg_sq(std::vector<float>(layout.shard_elements(), 0.0f)),
          gradients(layout.num_elements),
          gathered(layout.num_elements),
          norm(1),
          loss(1),
          weights(layout.num_elements),
          scratch((int64_t)zero_scratch_bytes(layout)) {}

    void run(int num_layers, uint64_t seed, bool poison_one) {
        for (int step = 1; step <= STEPS; ++step) {
            std::vector<float> gradient = gradient_of(layout, comm.rank(), step, seed);
            if (poison_one && step == STEPS && comm.rank() == layout.num_ranks - 1) {
                gradient[layout.offsets[1]] = INFINITY;
            }
            CUDA_CHECK(
                cudaMemcpyAsync(gradients, gradient.data(), gradients.num_bytes(), cudaMemcpyHostToDevice, stream));
            const float own_loss = 0.25f * (float)(comm.rank() + step);
            CUDA_CHECK(cudaMemcpyAsync(loss, &own_loss, sizeof own_loss, cudaMemcpyHostToDevice, stream));
            for (int layer = num_layers; layer >= -1; --layer) {
                zero.reduce_gradients_after(layer, gradients, stream);
            }
            zero.grad_norm(norm, loss, gradients, scratch, stream);
            zero.update(weights, master, exp_avg, exp_avg_sq, gradients, norm, loss, settings_of(step), stream);
        }
        int i = 0;
        for (const DeviceBuffer<float>* part : {&master, &exp_avg, &exp_avg_sq}) {
            zero.gather_state(gathered, *part, stream);
            state[i].resize(layout.num_elements);
            CUDA_CHECK(
                cudaMemcpyAsync(state[i++].data(), gathered, gathered.num_bytes(), cudaMemcpyDeviceToHost, stream));
            CUDA_CHECK(cudaStreamSynchronize(stream));
        }
        zero.gather_slices(gradients, stream);
    }
    bool guards_intact() const {
        return master.guards_intact() && exp_avg.guards_intact() && exp_avg_sq.guards_intact() &&
               gradients.guards_intact() && weights.guards_intact() && scratch.guards_intact();
    }
};

static Run run_ranks(const ZeroLayout& layout, int num_layers, uint64_t seed, bool poison_one, int64_t delay_cycles) {
    LoopbackRanks<RankWork> ranks(layout.num_ranks, delay_cycles, layout, seed);
    ranks.run([&](RankWork& rank) { rank.run(num_layers, seed, poison_one); });
    Run result;
    for (const auto& rank : ranks.work()) {
        const float norm = rank->norm.download()[0], loss = rank->loss.download()[0];
        const std::vector<bf16> weights = rank->weights.download();
        if (rank->comm.rank() == 0) {
            result.gradients = rank->gradients.download(), result.weights = weights;
            result.norm = norm, result.loss = loss;
            std::copy(rank->state, rank->state + 3, result.state);
        }
        result.ranks_agree = result.ranks_agree && std::memcmp(&norm, &result.norm, sizeof norm) == 0 &&
                             std::memcmp(&loss, &result.loss, sizeof loss) == 0 &&
                             std::memcmp(weights.data(), result.weights.data(), rank->weights.num_bytes()) == 0;
        result.guards_intact = result.guards_intact && rank->guards_intact();
    }
    return result;
}

// The same on one rank without shards: sums in the order of ranks, one AdamW of each kind of parameters.
static Run run_whole(const ZeroLayout& layout, uint64_t seed, bool poison_one) {
    Run result;
    DeviceBuffer<float> master(initial_state(layout, seed)), exp_avg(layout.num_elements),
        exp_avg_sq(layout.num_elements);
    CUDA_CHECK(cudaMemset(exp_avg, 0, exp_avg.num_bytes()));
    CUDA_CHECK(cudaMemset(exp_avg_sq, 0, exp_avg_sq.num_bytes()));
    DeviceBuffer<bf16> weights(layout.num_elements);
    DeviceBuffer<float> norm(1), loss(1);
    DeviceBuffer<char> scratch((int64_t)grad_norm_scratch_bytes());
    for (int step = 1; step <= STEPS; ++step) {
        result.gradients = gradient_of(layout, 0, step, seed);
        result.loss = 0.25f * (float)step;
        for (int rank = 1; rank < layout.num_ranks; ++rank) {
            const std::vector<float> more = gradient_of(layout, rank, step, seed);
            for (int64_t i = 0; i < layout.num_elements; ++i) {
                result.gradients[i] += more[i];
            }
            result.loss += 0.25f * (float)(rank + step);
        }
        if (poison_one && step == STEPS) {
            result.gradients[layout.offsets[1]] = INFINITY;
        }
        DeviceBuffer<float> gradients(result.gradients);
        loss.upload({result.loss});
        grad_norm(norm, gradients, layout.num_elements, scratch, nullptr);
        for (const ZeroBucket& bucket : layout.buckets) {
            adamw_update(master + bucket.begin, exp_avg + bucket.begin, exp_avg_sq + bucket.begin,
                         weights + bucket.begin, gradients + bucket.begin, norm, loss, bucket.num_elements,
                         settings_of(step).with_decay(bucket.decay), nullptr);
        }
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    result.norm = norm.download()[0];
    result.weights = weights.download();
    result.state[0] = master.download(), result.state[1] = exp_avg.download(), result.state[2] = exp_avg_sq.download();
    return result;
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    const int num_layers = h.small ? 1 : 5, width = h.small ? 24 : 72;
    for (const int64_t bucket_elements : {(int64_t)1, (int64_t)20000, ZERO_BUCKET_ELEMENTS}) {
        if (h.small && bucket_elements == 20000) {
            continue;  // as many buckets as the next gives
        }
        const ZeroLayout layout = make_zero_layout(tensors_of(num_layers, width), variant.launch, bucket_elements);
        for (const bool poison_one : {false, true}) {
            const std::string label = format_string("ranks %d, %zu buckets%s", variant.launch, layout.buckets.size(),
                                                    poison_one ? ", a gradient that is infinite" : "");
            const Run whole = run_whole(layout, h.seed, poison_one);
            const Run found = run_ranks(layout, num_layers, h.seed, poison_one, 0);
            const auto same = [](const auto& a, const auto& b) {
                return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
            };
            h.expect(same(found.gradients, whole.gradients), "gradients", label, "sums over ranks, bit for bit");
            h.expect(found.loss == whole.loss, "loss", label, format_string("%g, expected %g", found.loss, whole.loss));
            // Double sums in other orders, rounded to float once.
            const bool close = poison_one ? found.norm == INFINITY && whole.norm == INFINITY
                                          : std::abs(found.norm - whole.norm) <= 0x1p-23f * whole.norm;
            h.expect(close, "norm", label, format_string("%.9g, expected %.9g", found.norm, whole.norm));
            // The norm scales every gradient: its last bit may show in the last bits of all else.
            const auto compare = [&](const char* name, const std::vector<float>& values,
                                     const std::vector<float>& expected) {
                h.compare(name, label, values, to_double(expected), 0x1p-21);
            };
            compare("master", found.state[0], whole.state[0]);
            compare("exp_avg", found.state[1], whole.state[1]);
            compare("exp_avg_sq", found.state[2], whole.state[2]);
            h.compare("weights", label, found.weights, to_double(whole.weights), 0x1p-7);
            h.expect(found.ranks_agree, "ranks", label, found.ranks_agree ? "agree" : "disagree");
            h.expect(found.guards_intact, "guards", label, found.guards_intact ? "intact" : "stray write");
            const Run late = run_ranks(layout, num_layers, h.seed, poison_one, 100000);
            bool repeats = same(late.gradients, found.gradients) && same(late.weights, found.weights) &&
                           late.norm == found.norm && late.loss == found.loss;
            for (int i = 0; i < 3; ++i) {
                repeats = repeats && same(late.state[i], found.state[i]);
            }
            h.expect(repeats, "repeats", label, "slow transfers, the same bits");
        }
    }
}
static void measure(Harness&, const Variant<Launcher>&) {}

int main(int argc, char** argv) {
    static const std::vector<Variant<Launcher>> VARIANTS = {
        {1, "one rank (llmc/zero.cuh)", 1}, {2, "two ranks", 2}, {3, "three ranks", 3}, {4, "four ranks", 4}};
    return run_variants(argc, argv, "zero", VARIANTS, check, measure);
}
