// peer_copies.cu: copies between the memory of ranks of one host (llmc/comm_peer.cuh): random messages of every size
// and to every kind of place, between processes of their own, on streams that run ahead of each other; every byte of
// every rank's memory against what should have come. The program starts three more processes like itself before it
// touches a GPU; all run the same checks, on the GPUs in turn or on one, and the first speaks for all.
#include <sys/wait.h>

#include <array>
#include <fstream>
#include <memory>
#include <numeric>
#include <thread>

#include "harness.cuh"
#include "llmc/comm_peer.cuh"
#include "llmc/comm_tcp.h"

constexpr int NUM_PROCESSES = 4;
static HostComm* all_processes = nullptr;

using Launcher = int;  // ranks that take part

// sum (+=) of data [count], each byte weighed by its place. Launch: any.
__global__ void digest_kernel(unsigned long long* sum, const unsigned char* data, int64_t count) {
    unsigned long long of_thread = 0;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
        of_thread += (unsigned long long)(data[i] + 1) * (2 * i + 1);
    }
    atomicAdd(sum, of_thread);
}
static unsigned long long digest(const std::vector<unsigned char>& data) {
    unsigned long long sum = 0;
    for (size_t i = 0; i < data.size(); ++i) {
        sum += (unsigned long long)(data[i] + 1) * (2 * i + 1);
    }
    return sum;
}

// ---- messages ----------------------------------------------------------------------------------
using Pairs = std::vector<PeerMemory::Pair>;
constexpr int NUM_RANGES = 3;  // the last is not shared
constexpr int64_t RANGE_BYTES[NUM_RANGES] = {(int64_t)9 << 20, (int64_t)300 << 10, (int64_t)2 << 20};

struct Message {
    int from, to, range;
    int64_t offset, num_bytes;  // where it goes
    uint64_t seed;
    bool is_copied(const Pairs& left_out) const {
        const PeerMemory::Pair pair = std::minmax(from, to);
        return from != to && range < NUM_RANGES - 1 && num_bytes >= (int64_t)PeerCopies::LEAST_BYTES &&
               std::find(left_out.begin(), left_out.end(), pair) == left_out.end();
    }
};
// The same on all ranks: up to three messages for each pair, a rank's own too, that do not overlap.
static std::vector<Message> messages_of(int round, int num_ranks, uint64_t seed, bool small) {
    std::vector<Message> messages;
    uint64_t draws = 0;
    const auto draw = [&](int64_t bound) {
        return (int64_t)(random_bits(seed + 7919 * (uint64_t)(round + 1), draws++) % (uint64_t)bound);
    };
    std::vector<std::array<int64_t, NUM_RANGES>> used(num_ranks);
    for (int from = 0; from < num_ranks; ++from) {
        for (int to = 0; to < num_ranks; ++to) {
            for (int64_t i = draw(4); i > 0; --i) {
                const int64_t least = PeerCopies::LEAST_BYTES;
                const int64_t sizes[] = {1 + draw(100), least - 1, least, least + 16 * draw(1000) + draw(16),
                                         (1 + draw(small ? 2 : 6)) * 131072 + draw(64)};
                const int range = (int)draw(NUM_RANGES);
                const int64_t gap = draw(2) * (1 + draw(500));
                const Message m = {from, to, range, used[to][range] + gap, sizes[draw(5)], random_bits(seed, draws++)};
                if (m.offset + m.num_bytes <= RANGE_BYTES[range]) {
                    used[to][range] = m.offset + m.num_bytes;
                    messages.push_back(m);
                }
            }
        }
    }
    return messages;
}
static std::vector<unsigned char> content_of(const Message& m) {
    std::vector<unsigned char> bytes(m.num_bytes);
    for (int64_t i = 0; i < m.num_bytes; i += 8) {
        const uint64_t word = random_bits(m.seed, i);
        std::memcpy(&bytes[i], &word, (size_t)std::min<int64_t>(8, m.num_bytes - i));
    }
    return bytes;
}

// ---- checks ------------------------------------------------------------------------------------
// What a rank has: its ranges, and what they should hold.
struct RankMemory {
    std::vector<std::unique_ptr<DeviceBuffer<unsigned char>>> ranges;
    std::vector<std::vector<unsigned char>> expected;
    RankMemory() {
        for (const int64_t num_bytes : RANGE_BYTES) {
            ranges.push_back(std::make_unique<DeviceBuffer<unsigned char>>(num_bytes));
            expected.emplace_back(num_bytes, (unsigned char)0xff);
        }
    }
    std::vector<DeviceRange> shared() const {
        std::vector<DeviceRange> found;
        for (int i = 0; i < NUM_RANGES - 1; ++i) {
            found.push_back({reinterpret_cast<std::byte*>(ranges[i]->data()), ranges[i]->num_bytes()});
        }
        return found;
    }
};

struct Outcome {
    bool divided = true;   // each round into what is copied and what is not, as it should be
    bool in_order = true;  // memory was the old one before each round, and the new one right after it
};
// Rounds of one communicator, enqueued one after another, some late, as far ahead of the GPUs as the hosts get: on two
// streams in turn, or on one that looks at memory before and after each.
static Outcome run_rounds(PeerCopies& copies, const HostGroup& group, uint64_t seed, RankMemory& memory, int num_rounds,
                          const Pairs& left_out, bool on_one_stream, bool small) {
    CudaStream first, second;
    const cudaStream_t streams[2] = {first, second};
    DeviceBuffer<unsigned long long> digests(std::vector<unsigned long long>(2 * num_rounds, 0));
    std::vector<unsigned long long> expected_digests;
    const auto look = [&](int i, cudaStream_t stream) {
        unsigned long long expected = 0;
        for (int range = 0; range < NUM_RANGES; ++range) {
            digest_kernel<<<64, 256, 0, stream>>>(digests + i, memory.ranges[range]->data(), RANGE_BYTES[range]);
            CUDA_CHECK_LAUNCH();
            expected += digest(memory.expected[range]);
        }
        expected_digests.push_back(expected);
    };
    std::vector<std::unique_ptr<DeviceBuffer<unsigned char>>> sources;
    for (int number = 0; number < num_rounds; ++number) {
        for (const Message& m : messages_of(number, group.size(), seed, small)) {
            if (m.from == group.rank()) {
                sources.push_back(std::make_unique<DeviceBuffer<unsigned char>>(content_of(m)));
            }
        }
    }
    Outcome outcome;
    size_t next_source = 0;
    for (int number = 0; number < num_rounds; ++number) {
        const cudaStream_t stream = streams[on_one_stream ? 0 : number % 2];
        if (random_bits(seed, 50 + number * group.size() + group.rank()) % 3 == 0) {
            delay_kernel<<<1, 1, 0, stream>>>(200000);
            CUDA_CHECK_LAUNCH();
        }
        if (on_one_stream) {
            look(2 * number, stream);
        }
        std::vector<DeviceSend> sends;
        std::vector<DeviceReceive> receives;
        size_t copies_sent = 0, others_sent = 0, others_received = 0;
        for (const Message& m : messages_of(number, group.size(), seed, small)) {
            if (m.from == group.rank()) {
                sends.push_back({m.to, sources[next_source++]->data(), (size_t)m.num_bytes});
                ++(m.is_copied(left_out) ? copies_sent : others_sent);
            }
            if (m.to == group.rank()) {
                receives.push_back({m.from, memory.ranges[m.range]->data() + m.offset, (size_t)m.num_bytes});
                others_received += !m.is_copied(left_out);
                if (m.is_copied(left_out)) {  // over what earlier rounds have brought
                    const std::vector<unsigned char> bytes = content_of(m);
                    std::copy(bytes.begin(), bytes.end(), memory.expected[m.range].begin() + m.offset);
                }
            }
        }
        const PeerCopies::Round round = copies.agree(sends, receives, "test");
        outcome.divided = outcome.divided && round.copies.size() == copies_sent &&
                          round.other_sends.size() == others_sent && round.other_receives.size() == others_received;
        copies.send(round, stream);
        copies.receive(round, stream);
        if (on_one_stream) {
            look(2 * number + 1, stream);
        }
    }
    outcome.in_order = !on_one_stream || digests.download() == expected_digests;
    CUDA_CHECK(cudaDeviceSynchronize());
    return outcome;
}

static void check_rounds(Harness& h, int num_ranks, const Pairs& left_out) {
    constexpr int NUM_PAIRS = NUM_PROCESSES * (NUM_PROCESSES - 1) / 2;
    std::vector<int> ranks(num_ranks);
    std::iota(ranks.begin(), ranks.end(), 0);
    RankMemory memory;
    PeerMemory peers(*all_processes, memory.shared(), 2, left_out);
    const std::string label =
        format_string("%d ranks of %d, %zu pairs left out", num_ranks, NUM_PROCESSES, left_out.size());
    h.expect(peers.num_pairs_reached() == NUM_PAIRS - (int)left_out.size() && peers.obstacle().empty(), "reached",
             label, format_string("%d of %d pairs%s", peers.num_pairs_reached(), NUM_PAIRS, peers.obstacle().c_str()));
    if (all_processes->rank() < num_ranks) {
        const HostGroup group(*all_processes, ranks);
        for (int communicator = 0; communicator < 2; ++communicator) {
            PeerCopies copies(peers, group, communicator);
            h.expect(copies.all_reach() == left_out.empty(), "all reach", label, "as they should");
            const bool on_one_stream = communicator == 1;
            const Outcome outcome = run_rounds(copies, group, h.seed + 1000003 * (uint64_t)(communicator + 1), memory,
                                               h.small ? 3 : 12, left_out, on_one_stream, h.small);
            h.expect(outcome.divided, "division", label,
                     "large messages into shared memory are copied, others are not");
            if (on_one_stream) {
                h.expect(outcome.in_order, "order", label, "nothing comes before its receive, all before it is over");
            }
            for (int i = 0; i < NUM_RANGES; ++i) {
                h.compare_exact(format_string("range %d", i), label, *memory.ranges[i], memory.expected[i]);
            }
            if (!left_out.empty()) {
                continue;
            }
            // Sizes that differ are found by the hosts, before anything is enqueued.
            bool refused = false;
            try {
                const size_t num_bytes = (size_t)1 << 20;
                const int next = (group.rank() + 1) % num_ranks, before = (group.rank() + num_ranks - 1) % num_ranks;
                copies.agree({{next, memory.ranges[0]->data(), num_bytes}},
                             {{before, memory.ranges[0]->data() + num_bytes, num_bytes + 4}}, "test of sizes");
            } catch (const Error& error) {
                refused = std::string(error.what()).find("where it expects") != std::string::npos;
            }
            h.expect(refused, "sizes", label, "a message of another size than expected is refused");
        }
    }
    peers.finish();
}

// What waits for a rank that never comes can be let go.
static void check_release(Harness& h, int num_ranks) {
    RankMemory memory;
    PeerMemory peers(*all_processes, memory.shared(), 1);
    PeerCopies copies(peers, HostGroup(*all_processes), 0);
    CudaStream waiting, releasing;
    PeerCopies::Round round;
    round.sources = {(all_processes->rank() + 1) % NUM_PROCESSES};
    copies.send(round, waiting);
    copies.receive(round, waiting);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const bool waited = cudaStreamQuery(waiting) == cudaErrorNotReady;
    copies.release(releasing);
    cudaError_t status = cudaErrorNotReady;
    for (int i = 0; i < 500 && status == cudaErrorNotReady; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        status = cudaStreamQuery(waiting);
    }
    h.expect(waited && status == cudaSuccess, "release", format_string("%d ranks", num_ranks),
             format_string("waited %d, then %s", waited, cudaGetErrorName(status)));
    CHECK(status == cudaSuccess, "a stream waits for ever");  // and so would all that follows
    peers.finish();
}

static void check_sum(Harness& h, int num_ranks) {
    for (const int64_t count : {(int64_t)4, (int64_t)1000, (int64_t)(h.small ? 5000 : 5000000)}) {
        for (const int rank : {0, num_ranks - 1}) {
            DeviceBuffer<float> own(count), parts(count * (num_ranks - 1));
            own.fill_random(h.seed + 1), parts.fill_random(h.seed + 2);
            const std::vector<float> of_own = own.download(), of_others = parts.download();
            std::vector<float> expected(count);
            for (int r = 0; r < num_ranks; ++r) {
                const float* const part = r == rank ? of_own.data() : of_others.data() + (r - (r > rank)) * count;
                for (int64_t i = 0; i < count; ++i) {
                    expected[i] = r == 0 ? part[i] : expected[i] + part[i];
                }
            }
            DeviceBuffer<float> out(count);
            const std::string label = format_string("rank %d of %d, %lld elements", rank, num_ranks, (long long)count);
            peer_sum(out, own, parts, rank, num_ranks, count, h.stream);
            h.compare_exact("sum", label, out, expected);
            peer_sum(own, own, parts, rank, num_ranks, count, h.stream);
            h.compare_exact("sum in place", label, own, expected);
        }
    }
}

static void check(Harness& h, const Variant<Launcher>& variant) {
    check_rounds(h, variant.launch, {});
    check_rounds(h, variant.launch, {{0, 1}});
    check_release(h, variant.launch);
    check_sum(h, variant.launch);
}

// All ranks exchange with all others at once, each on a GPU of its own.
static void measure(Harness& h, const Variant<Launcher>& variant) {
    int num_devices;
    CUDA_CHECK(cudaGetDeviceCount(&num_devices));
    if (num_devices < variant.launch) {
        std::printf("skip peer_copies %d  its timing needs %d GPUs\n", variant.number, variant.launch);
        return;
    }
    std::vector<int> ranks(variant.launch);
    std::iota(ranks.begin(), ranks.end(), 0);
    constexpr int64_t MOST_BYTES = (int64_t)128 << 20;
    DeviceBuffer<float> from(MOST_BYTES / 4), to(MOST_BYTES / 4 * (variant.launch - 1));
    from.fill_random(h.seed);
    PeerMemory peers(*all_processes, {{reinterpret_cast<std::byte*>(to.data()), to.num_bytes()}}, 1);
    if (all_processes->rank() < variant.launch) {
        const HostGroup group(*all_processes, ranks);
        PeerCopies copies(peers, group, 0);
        CudaStream stream;
        cudaEvent_t begin, end;
        CUDA_CHECK(cudaEventCreate(&begin));
        CUDA_CHECK(cudaEventCreate(&end));
        for (int64_t num_bytes = 128 << 10; num_bytes <= MOST_BYTES; num_bytes *= 4) {
            std::vector<DeviceSend> sends;
            std::vector<DeviceReceive> receives;
            for (int peer = 0; peer < group.size(); ++peer) {
                if (peer != group.rank()) {
                    sends.push_back({peer, from.data(), (size_t)num_bytes});
                    receives.push_back(
                        {peer, to.data() + (peer - (peer > group.rank())) * num_bytes / 4, (size_t)num_bytes});
                }
            }
            constexpr int RUNS = 10;
            for (int i = -1; i < RUNS; ++i) {  // the first one warms up
                if (i == 0) {
                    CUDA_CHECK(cudaStreamSynchronize(stream));
                    group.barrier("begin of the timing");
                    CUDA_CHECK(cudaEventRecord(begin, stream));
                }
                const PeerCopies::Round round = copies.agree(sends, receives, "timing");
                copies.send(round, stream);
                copies.receive(round, stream);
            }
            CUDA_CHECK(cudaEventRecord(end, stream));
            CUDA_CHECK(cudaEventSynchronize(end));
            float ms;
            CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
            std::printf("time peer_copies %d  %lld KiB to each of %d  %.1f us  %.0f GB/s received  (%s)\n",
                        variant.number, (long long)num_bytes >> 10, group.size() - 1, 1e3 * ms / RUNS,
                        (double)(group.size() - 1) * num_bytes * RUNS / ms * 1e-6, variant.idea);
        }
        cudaEventDestroy(begin);
        cudaEventDestroy(end);
    }
    peers.finish();
}

// The processes beside the first one, and what they print: of that, the first one prints what failed.
struct OtherProcess {
    pid_t pid;
    std::string output;
};
// This process's rank: 0 of the program as it was started.
static int start_processes(std::vector<OtherProcess>& others, const std::string& name) {
    for (int rank = 1; rank < NUM_PROCESSES; ++rank) {
        const OtherProcess other = {fork(), name + "." + std::to_string(rank)};
        CHECK(other.pid >= 0, "cannot start another process: %s", std::strerror(errno));
        if (other.pid == 0) {
            CHECK(std::freopen(other.output.c_str(), "w", stdout) != nullptr, "%s: cannot be written: %s",
                  other.output.c_str(), std::strerror(errno));
            others.clear();
            return rank;
        }
        others.push_back(other);
    }
    return 0;
}
// Whether it ended well.
static bool wait_for(const OtherProcess& other) {
    int status = 0;
    const bool ended = waitpid(other.pid, &status, 0) == other.pid && WIFEXITED(status);
    std::ifstream output(other.output);
    for (std::string line; std::getline(output, line);) {
        if (line.compare(0, 4, "FAIL") == 0) {
            std::printf("%s  (in another process)\n", line.c_str());
        }
    }
    unlink(other.output.c_str());
    return ended && WEXITSTATUS(status) == 0;
}

int main(int argc, char** argv) {
    static const std::vector<Variant<Launcher>> VARIANTS = {
        {1, "two ranks", 2}, {2, "four ranks", 4}, {3, "three ranks", 3}};
    try {
        const std::string rendezvous = format_string("/tmp/llmc_peer_copies.%d", (int)getpid());
        std::vector<OtherProcess> others;
        const int rank = start_processes(others, rendezvous);
        TcpComm processes(rank, NUM_PROCESSES, rendezvous, 120.0);
        all_processes = &processes;
        int num_devices = 0;
        if (cudaGetDeviceCount(&num_devices) == cudaSuccess && num_devices > 0) {
            CUDA_CHECK(cudaSetDevice(rank % num_devices));
        }
        int status = run_variants(argc, argv, "peer_copies", VARIANTS, check, measure);
        processes.finish();
        for (const OtherProcess& other : others) {
            if (!wait_for(other)) {
                std::printf("FAIL peer_copies: another process failed\n");
                status = 1;
            }
        }
        return status;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
        return 1;
    }
}
