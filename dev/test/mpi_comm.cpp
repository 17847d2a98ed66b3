// mpi_comm.cpp: what ranks in processes of their own do together, under mpirun or any other launcher that
// llmc/comm_launch.h knows: sums in the order of ranks, groups of a data x context mesh, the ring of attention and the
// borders of Lighthouse attention, each against one process.
//   mpirun -np 4 build/mpi_comm             build/mpi_comm --hang: rank 1 stops answering, the others must say so
// Ends with a status that is not zero when a check failed on any rank.
#include <chrono>
#include <cstdio>
#include <functional>
#include <thread>

#include "dev/test/reference_testing.h"
#include "dev/test/ring_emulation.h"
#include "llmc/comm_launch.h"

namespace {

// A check of all ranks: it fails where any rank says so.
class Checks {
  public:
    explicit Checks(const HostGroup& world) : world_(world) {}
    void expect(bool passed, const std::string& what) {
        int32_t num_failed = passed ? 0 : 1;
        world_.all_reduce_sum(&num_failed, 1, "check");
        num_failed_ += num_failed > 0;
        if (world_.rank() == 0) {
            std::printf("%s mpi_comm %s  %d ranks%s\n", num_failed == 0 ? "ok  " : "FAIL", what.c_str(), world_.size(),
                        num_failed == 0 ? "" : format_string(", wrong on %d", num_failed).c_str());
            std::fflush(stdout);
        }
    }
    int num_failed() const { return num_failed_; }

  private:
    const HostGroup& world_;
    int num_failed_ = 0;
};

// Terms whose float sum depends on the order.
float term(int rank, int64_t i) {
    return (rank % 2 == 0 ? 1.0f : -1.0f) * (float)(1 << (rank * 7 + i) % 25) + 0.3f * (float)rank;
}

void check_sums(const HostGroup& world, Checks& checks) {
    const int64_t count = 4099;
    std::vector<float> parts(world.size() * count), sums(count), all(parts.size());
    const auto expected = [&](int64_t i) {
        float sum = term(0, i);
        for (int r = 1; r < world.size(); ++r) {
            sum += term(r, i);
        }
        return sum;
    };
    for (int64_t i = 0; i < (int64_t)parts.size(); ++i) {
        parts[i] = term(world.rank(), i);
    }
    world.reduce_scatter_sum(sums.data(), parts.data(), count, "reduce-scatter");
    world.all_gather(all.data(), sums.data(), count * sizeof(float), "all-gather");
    bool same = true;
    for (int64_t i = 0; i < (int64_t)all.size(); ++i) {
        same = same && all[i] == expected(i);
    }
    checks.expect(same, "reduce_scatter_sum and all_gather");
    float value = term(world.rank(), 5);
    world.all_reduce_sum(&value, 1, "all-reduce");
    checks.expect(value == expected(5), "all_reduce_sum");
}

// The mean loss of a step over a mesh: every rank has as many tokens, each of its sequences' parts counts once.
void check_mesh(const HostGroup& world, Checks& checks) {
    for (int W = 1; W <= world.size(); ++W) {
        if (world.size() % W != 0) {
            continue;
        }
        const ParallelMesh mesh = make_parallel_mesh(world.size(), world.rank(), W);
        const HostGroup context(world.comm(), mesh.context_group());
        int32_t sum = world.rank();
        context.all_reduce_sum(&sum, 1, "context sum");
        int32_t expected = 0;
        for (const int rank : mesh.context_group()) {
            expected += rank;
        }
        const int64_t T = 12 * world.size();
        const ContextPartition p = make_context_partition(T, W, mesh.context_rank());
        double loss = 0.0;  // of token t of sequence s: 1000 s + t
        for (int64_t t = 0; t < p.local_rows(); ++t) {
            loss += (1000.0 * mesh.data_rank() + (double)p.position(t)) / (double)p.local_rows();
        }
        loss /= world.size();
        world.all_reduce_sum(&loss, 1, "loss");
        const double mean = 500.0 * (mesh.data_parallel - 1) + 0.5 * (double)(T - 1);
        checks.expect(sum == expected && context.rank() == mesh.context_rank() && std::abs(loss - mean) < 1e-9 * mean,
                      format_string("groups and loss of DP %d x CP %d", mesh.data_parallel, W));
    }
}

// ---- the ring ----------------------------------------------------------------------------------
Rows random_rows(int64_t B, int64_t rows, int heads, int D, uint64_t seed) {
    Rows r(B, rows, heads, D);
    r.values = random_values((int64_t)r.values.size(), 1.5, seed);
    return r;
}

// Keys and values to one rank, from another.
KeyRows exchange_keys(const HostGroup& group, int to, const KeyRows& out, int from, const KeyRows& like,
                      const char* operation) {
    KeyRows in = like;
    group.exchange({{to, out.k.values.data(), out.k.num_bytes()}, {to, out.v.values.data(), out.v.num_bytes()}},
                   {{from, in.k.values.data(), in.k.num_bytes()}, {from, in.v.values.data(), in.v.num_bytes()}},
                   operation);
    return in;
}

void check_ring(const HostGroup& group, Checks& checks, int64_t B, int64_t rows_per_chunk, int H, int Hkv, int D) {
    const int W = group.size();
    const int64_t T = HALVES * W * rows_per_chunk;
    const Rows q = random_rows(B, T, H, D, 1), dout = random_rows(B, T, H, D, 2);
    const KeyRows kv{random_rows(B, T, Hkv, D, 3), random_rows(B, T, Hkv, D, 4)};
    Rows out(B, T, H, D), dq(B, T, H, D), dk(B, T, Hkv, D), dv(B, T, Hkv, D);
    std::vector<double> lse((size_t)(B * H * T));
    reference::AttentionShape shape;
    shape.B = (int)B, shape.H = H, shape.Hkv = Hkv, shape.D = D;
    shape.Tq = shape.Tk = T;
    shape.scale = 1.0 / std::sqrt((double)D);
    reference::attention_forward<double>(out.view(), lse.data(), q.view(), kv.k.view(), kv.v.view(), shape);
    reference::attention_backward<double>(dq.view(), dk.view(), dv.view(), dout.view(), q.view(), kv.k.view(),
                                          kv.v.view(), std::as_const(out).view(), lse.data(), shape);

    const ContextPartition p = make_context_partition(T, W, group.rank());
    RingEmulation ring(p, local_rows(q, p), {local_rows(kv.k, p), local_rows(kv.v, p)});
    const auto keys_like = [&](HalfRange halves) {
        const int64_t n = halves.num_rows(p.chunk_rows());
        return KeyRows{Rows(B, n, Hkv, D), Rows(B, n, Hkv, D)};
    };
    const auto fetch = [&](int s) {
        const RingStep& step = ring.steps()[s];
        return exchange_keys(group, step.reader, ring.keys_to_send(s), step.source, keys_like(step.keys), "keys");
    };
    ring.forward(fetch);
    ring.backward(local_rows(dout, p), fetch, [&](int s, const KeyRows& gradients) {
        const RingStep& step = ring.steps()[s];
        ring.add_returned(
            s, exchange_keys(group, step.source, gradients, step.reader, keys_like(step.keys_sent), "gradients"));
    });
    const auto error = [&](const Rows& found, const Rows& whole) {
        return relative_error(found.values, local_rows(whole, p).values);
    };
    checks.expect(error(ring.out, out) < 1e-13 && error(ring.dq, dq) < 1e-12 && error(ring.dkv.k, dk) < 1e-12 &&
                      error(ring.dkv.v, dv) < 1e-12,
                  format_string("ring attention B%lld T%lld H%d/%d D%d", (long long)B, (long long)T, H, Hkv, D));
}

// ---- the borders -------------------------------------------------------------------------------
// What each chunk passes on reaches the chunk after it, and comes back.
void check_borders(const HostGroup& group, Checks& checks) {
    const ContextPartition p = make_context_partition(HALVES * group.size(), group.size(), group.rank());
    bool right = true;
    int32_t own[HALVES], before[HALVES] = {-1, -1}, back[HALVES] = {-1, -1};
    std::vector<HostSend> sends, returns;
    std::vector<HostReceive> receives, returned;
    for (int half = 0; half < HALVES; ++half) {
        own[half] = p.chunk(half);
    }
    for (int half = 0; half < HALVES; ++half) {
        if (const auto after = chunk_after(p, half)) {
            sends.push_back({after->rank, &own[half], sizeof own[half]});
            returned.push_back({after->rank, &back[half], sizeof back[half]});
        }
        if (const auto place = chunk_before(p, half)) {
            receives.push_back({place->rank, &before[half], sizeof before[half]});
            returns.push_back({place->rank, &before[half], sizeof before[half]});
        }
    }
    group.exchange(sends, receives, "borders");
    group.exchange(returns, returned, "borders back");
    for (int half = 0; half < HALVES; ++half) {
        right = right && before[half] == p.chunk(half) - 1 &&
                back[half] == (p.chunk(half) + 1 < p.num_chunks() ? own[half] : -1);
    }
    checks.expect(right, "borders of chunks");
}

int run(HostComm& comm, bool hang) {
    const HostGroup world(comm);
    if (hang) {
        comm.identity().step = 3;
        if (comm.rank() == 1) {
            std::this_thread::sleep_for(std::chrono::seconds(60));
        }
        world.barrier("a meeting that rank 1 misses");
        return 0;
    }
    Checks checks(world);
    check_sums(world, checks);
    check_mesh(world, checks);
    if (comm.size() > 1) {
        check_ring(world, checks, 1, 7, 4, 2, 16);
        check_ring(world, checks, 2, 13, 3, 3, 8);
        check_borders(world, checks);
    }
    const std::string big(3 << 20, (char)('a' + comm.rank()));
    std::string all((size_t)comm.size() * big.size(), '?');
    world.all_gather(all.data(), big.data(), big.size(), "3 MiB from everyone");
    bool right = true;
    for (size_t i = 0; i < all.size(); ++i) {
        right = right && all[i] == (char)('a' + i / big.size());
    }
    checks.expect(right, "long messages");
    return checks.num_failed() == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    const SingleThread single_thread;
    try {
        const bool hang = argc == 2 && std::string(argv[1]) == "--hang";
        CHECK(argc == 1 || hang, "usage: mpi_comm [--hang], started as several ranks");
        const std::unique_ptr<HostComm> comm = open_host_comm(hang ? 2.0 : 60.0);
        const int status = run(*comm, hang);
        comm->finish();
        return status;
    } catch (const Error& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
}
