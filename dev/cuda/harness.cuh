// harness.cuh: what every program in dev/cuda is made of: random inputs, guarded and poisoned device buffers,
// comparison with float64, one greppable line a check, timings with a flushed L2 as per cent of this GPU's own copy
// bandwidth.
//
// A program lists its variants from naive to the one that ships and hands three things to run_variants:
//     int main(int argc, char** argv) { return run_variants(argc, argv, "swiglu_forward", VARIANTS, check, measure); }
//   VARIANTS  std::vector<Variant<Launcher>>: number, idea, launcher; the last entry calls the header in llmc/
//   check     void(Harness&, const Variant<Launcher>&): runs it on shapes that hurt, calls harness.compare and the like
//   measure   void(Harness&, const Variant<Launcher>&): calls harness.measure_bandwidth or measure_flops
// Options: --list, --variant N (repeatable), --check_only, --measure_only, --small, --seed N, --multiprocessors N: as
// on a GPU that has so many, on which blocks that stay take more of the work each. All checks come before the first
// timing. Exit status 1 when a check failed; last line 'N passed, N failed'.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "llmc/cuda_common.cuh"
#include "llmc/gpu_properties.cuh"

// ---- random inputs -----------------------------------------------------------------------------
// The same bits on host and device: integer arithmetic up to one exact conversion.
__host__ __device__ inline uint64_t random_bits(uint64_t seed, uint64_t index) {  // SplitMix64's finaliser
    uint64_t z = (seed + 1) * 0x9e3779b97f4a7c15ull + index * 0xd1342543de82ef95ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
// Near enough to a standard normal: the sum of four uniforms, in [-3.46, 3.46].
__host__ __device__ inline float random_normal(uint64_t seed, uint64_t index) {
    const uint64_t bits = random_bits(seed, index);
    const int sum = (int)(bits & 0xffff) + (int)(bits >> 16 & 0xffff) + (int)(bits >> 32 & 0xffff) + (int)(bits >> 48);
    return (float)(2 * sum - 4 * 65535) * (1.7320508f / 131072.0f);
}
template <class Element>
__global__ void fill_random_kernel(Element* out, int64_t num_elements, uint64_t seed, float scale) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < num_elements;
         i += (int64_t)gridDim.x * blockDim.x) {
        out[i] = (Element)(scale * random_normal(seed, i));
    }
}
// scale times standard normals, rounded to Element.
template <class Element>
std::vector<Element> random_vector(int64_t num_elements, uint64_t seed, float scale = 1.0f) {
    std::vector<Element> values(num_elements);
    for (int64_t i = 0; i < num_elements; ++i) {
        values[i] = (Element)(scale * random_normal(seed, i));
    }
    return values;
}
// Uniform in [0, bound).
inline std::vector<int32_t> random_indices(int64_t num_elements, uint64_t seed, int64_t bound) {
    std::vector<int32_t> values(num_elements);
    for (int64_t i = 0; i < num_elements; ++i) {
        values[i] = (int32_t)(random_bits(seed, i) % (uint64_t)bound);
    }
    return values;
}

template <class To, class From>
std::vector<To> convert(const std::vector<From>& from) {
    std::vector<To> to(from.size());
    for (size_t i = 0; i < from.size(); ++i) {
        if constexpr (std::is_same_v<From, bf16>) {
            to[i] = (To)__bfloat162float(from[i]);
        } else {
            to[i] = (To)from[i];  // also float to bf16
        }
    }
    return to;
}
template <class Element>
std::vector<double> to_double(const std::vector<Element>& from) {
    return convert<double>(from);
}

// ---- sizes -------------------------------------------------------------------------------------
// Rows of which the last few, those a check then looks at, lie beyond 2^31 elements, where a 32-bit offset ends; and a
// width that is no power of two.
constexpr int64_t MANY_ROWS = (1 << 21) + 5, LAST_ROWS = 50;
constexpr int MANY_ROWS_WIDTH = 1032;
static_assert((MANY_ROWS - LAST_ROWS) * MANY_ROWS_WIDTH > (int64_t)1 << 31,
              "the last rows must lie beyond 2^31 elements");

// ---- device buffers ----------------------------------------------------------------------------
// num_elements on the device between two guards that a stray write destroys; filled with NaN (int: -1) until written.
// Whatever fills it is complete on return: the harness's stream does not wait for the default stream, and a copy from
// pageable memory may return before its last bytes have arrived.
template <class Element>
class DeviceBuffer {
  public:
    explicit DeviceBuffer(int64_t num_elements) : num_elements_(num_elements) {
        CUDA_CHECK(cudaMalloc(&memory_, num_bytes() + 2 * GUARD_BYTES));
        CUDA_CHECK(cudaMemset(memory_, GUARD_BYTE, num_bytes() + 2 * GUARD_BYTES));
        poison();
    }
    explicit DeviceBuffer(const std::vector<Element>& values) : DeviceBuffer((int64_t)values.size()) { upload(values); }
    ~DeviceBuffer() { cudaFree(memory_); }
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;

    Element* data() const { return reinterpret_cast<Element*>(memory_ + GUARD_BYTES); }
    operator Element*() const { return data(); }
    int64_t size() const { return num_elements_; }
    size_t num_bytes() const { return num_elements_ * sizeof(Element); }

    void poison() {
        CUDA_CHECK(cudaMemset(data(), 0xff, num_bytes()));
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    void upload(const std::vector<Element>& values) {
        CHECK((int64_t)values.size() == num_elements_, "upload of %zu elements into a buffer of %lld", values.size(),
              (long long)num_elements_);
        CUDA_CHECK(cudaMemcpy(data(), values.data(), num_bytes(), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    std::vector<Element> download() const { return download(0, num_elements_); }
    std::vector<Element> download(int64_t first, int64_t count) const {
        std::vector<Element> values(count);
        CUDA_CHECK(cudaDeviceSynchronize());  // whatever writes it, on whatever stream
        CUDA_CHECK(cudaMemcpy(values.data(), data() + first, count * sizeof(Element), cudaMemcpyDeviceToHost));
        return values;
    }
    void fill_random(uint64_t seed, float scale = 1.0f) {
        fill_random_kernel<<<1024, 256>>>(data(), num_elements_, seed, scale);
        CUDA_CHECK_LAUNCH();
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    bool guards_intact() const {
        std::vector<unsigned char> front(GUARD_BYTES), back(GUARD_BYTES);
        CUDA_CHECK(cudaMemcpy(front.data(), memory_, GUARD_BYTES, cudaMemcpyDeviceToHost));
        CUDA_CHECK(cudaMemcpy(back.data(), memory_ + GUARD_BYTES + num_bytes(), GUARD_BYTES, cudaMemcpyDeviceToHost));
        return front == std::vector<unsigned char>(GUARD_BYTES, GUARD_BYTE) && front == back;
    }

  private:
    static constexpr size_t GUARD_BYTES = 4096;
    static constexpr unsigned char GUARD_BYTE = 0xa5;
    unsigned char* memory_ = nullptr;
    int64_t num_elements_;
};

// ---- errors ------------------------------------------------------------------------------------
// Unit roundoff: the largest relative error of rounding to the type, which has 8, 24 or 53 significant bits.
template <class Element>
constexpr double unit_roundoff() {
    return std::is_same_v<Element, bf16> ? 0x1p-8 : std::is_same_v<Element, float> ? 0x1p-24 : 0x1p-53;
}

// How far values are from what they should be. The error of an element is |actual - expected| / (|expected| + floor):
// relative for large ones, absolute for those that cancel to almost nothing. NaN counts as infinite.
struct Difference {
    double max_error = 0.0;
    double mean_error = 0.0;
    int64_t worst = -1;      // index of max_error
    int64_t num_beyond = 0;  // elements whose error is not <= limit
};
// The floor that fits most outputs: their root mean square.
inline double root_mean_square(const std::vector<double>& values) {
    double sum = 0.0;
    for (double v : values) {
        sum += v * v;
    }
    return values.empty() ? 0.0 : std::sqrt(sum / (double)values.size());
}
template <class Element>
Difference difference(const std::vector<Element>& actual, const std::vector<double>& expected, double floor,
                      double limit = INFINITY) {
    CHECK(actual.size() == expected.size(), "comparison of %zu elements with %zu", actual.size(), expected.size());
    Difference d;
    for (size_t i = 0; i < actual.size(); ++i) {
        double value;
        if constexpr (std::is_same_v<Element, bf16>) {
            value = __bfloat162float(actual[i]);
        } else {
            value = (double)actual[i];
        }
        double error = 0.0;
        if (value != expected[i]) {
            error = std::abs(value - expected[i]) / (std::abs(expected[i]) + floor);
        }
        if (!(error < INFINITY)) {  // NaN too
            error = INFINITY;
        }
        d.num_beyond += !(error <= limit);
        if (d.worst < 0 || error > d.max_error) {
            d.max_error = error;
            d.worst = (int64_t)i;
        }
        d.mean_error += error / (double)actual.size();
    }
    return d;
}
// Whether these refuse anything. Where an expectation or the plain result that a limit comes from is not finite, limit
// or floor are not either, and no error is beyond them.
inline bool can_refuse(double limit, double floor) { return std::isfinite(limit) && std::isfinite(floor); }

// The limit of a result of Element: twice the error of a plain float implementation, rounded to Element.
template <class Element>
double twice_plain_error(const std::vector<float>& plain, const std::vector<double>& expected, double floor = -1.0) {
    floor = floor < 0 ? root_mean_square(expected) : floor;
    return 2.0 * std::max(difference(convert<Element>(plain), expected, floor).max_error, unit_roundoff<Element>());
}

// ---- the harness -------------------------------------------------------------------------------
template <class Launcher>
struct Variant {
    int number;
    const char* idea;
    Launcher launch;
};

class Harness {
  public:
    cudaStream_t stream = nullptr;
    uint64_t seed = 1;
    bool small = false;  // --small: only what compute-sanitizer, some hundred times slower, gets through in a minute

    Harness(std::string program, std::string operation) : program_(program), operation_(operation) {
        CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CUDA_CHECK(cudaEventCreate(&begin_));
        CUDA_CHECK(cudaEventCreate(&end_));
    }
    ~Harness() {
        cudaFree(flush_buffer_);
        cudaEventDestroy(end_);
        cudaEventDestroy(begin_);
        cudaStreamDestroy(stream);
    }
    Harness(const Harness&) = delete;
    Harness& operator=(const Harness&) = delete;

    // Whether --small leaves out a case of so many elements.
    bool leaves_out(int64_t num_elements) const { return small && num_elements > SMALL_ELEMENTS; }

    void set_variant(int number) { variant_ = number; }
    int num_passed() const { return num_passed_; }
    int num_failed() const { return num_failed_; }

    // One check line. name: the output; label: shape and type; detail: numbers, or what is wrong.
    bool expect(bool passed, const std::string& name, const std::string& label, const std::string& detail = "") {
        ++(passed ? num_passed_ : num_failed_);
        std::printf("%s %s %d %s  %s  %s\n", passed ? "ok  " : "FAIL", operation_.c_str(), variant_, name.c_str(),
                    label.c_str(), detail.c_str());
        std::fflush(stdout);
        return passed;
    }

    // Compares an output with float64. limit bounds the error that Difference defines; floor < 0: the expected values'
    // root mean square. dims: the output's shape, to print an index. Stray writes fail, and a limit or floor that is
    // not finite. Checks itself, once for each name, with an error planted just beyond the limit, which must be found.
    template <class Element>
    bool compare(const std::string& name, const std::string& label, const DeviceBuffer<Element>& actual,
                 const std::vector<double>& expected, double limit, const std::vector<int64_t>& dims = {},
                 double floor = -1.0) {
        CUDA_CHECK(cudaStreamSynchronize(stream));
        if (!actual.guards_intact()) {
            return expect(false, name, label, "stray write around the output");
        }
        return compare(name, label, actual.download(), expected, limit, dims, floor);
    }
    template <class Element>
    bool compare(const std::string& name, const std::string& label, const std::vector<Element>& actual,
                 const std::vector<double>& expected, double limit, const std::vector<int64_t>& dims = {},
                 double floor = -1.0) {
        if (floor < 0) {
            floor = root_mean_square(expected);
        }
        const Difference d = difference(actual, expected, floor, limit);
        const bool passed = d.num_beyond == 0 && can_refuse(limit, floor);
        std::string detail = format_string("max_err %.2e mean_err %.1e limit %.2e", d.max_error, d.mean_error, limit);
        if (!can_refuse(limit, floor)) {
            detail += format_string(" floor %.2e: not finite, so nothing is refused", floor);
        }
        expect(passed, name, label, detail);
        if (!passed && !actual.empty()) {
            std::printf(
                "     at %s got %g, expected %g; %.4g %% of %zu wrong; rerun: %s --variant %d --check_only --seed "
                "%llu\n",
                index_text(d.worst, dims).c_str(), to_double(std::vector<Element>{actual[d.worst]})[0],
                expected[d.worst], 100.0 * (double)d.num_beyond / (double)actual.size(), actual.size(),
                program_.c_str(), variant_, (unsigned long long)seed);
        } else if (!actual.empty() && planted_.emplace(name, true).second) {
            check_planted(name, label, actual, expected, limit, floor);
        }
        return passed;
    }
    // Every element equal, bit for bit.
    template <class Element>
    bool compare_exact(const std::string& name, const std::string& label, const DeviceBuffer<Element>& actual,
                       const std::vector<Element>& expected) {
        CUDA_CHECK(cudaStreamSynchronize(stream));
        const std::vector<Element> values = actual.download();
        CHECK(values.size() == expected.size(), "comparison of %zu elements with %zu", values.size(), expected.size());
        int64_t first = -1, num_different = 0;
        for (size_t i = 0; i < values.size(); ++i) {
            if (std::memcmp(&values[i], &expected[i], sizeof(Element)) != 0) {
                first = first < 0 ? (int64_t)i : first;
                ++num_different;
            }
        }
        const bool intact = actual.guards_intact();
        return expect(num_different == 0 && intact, name, label,
                      !intact              ? "stray write around the output"
                      : num_different == 0 ? format_string("%zu elements equal", values.size())
                                           : format_string("%lld of %zu elements differ, the first at [%lld]",
                                                           (long long)num_different, values.size(), (long long)first));
    }
    // launch(): sets the output's initial state, if that matters, and computes it. Repeated runs must give the bits
    // that the output holds now.
    template <class Element>
    bool compare_repeats(const std::string& name, const std::string& label, DeviceBuffer<Element>& out,
                         const std::function<void()>& launch, int repeats = 3) {
        CUDA_CHECK(cudaStreamSynchronize(stream));
        const std::vector<Element> first = out.download();
        for (int i = 0; i < repeats; ++i) {
            out.poison();
            CUDA_CHECK(cudaDeviceSynchronize());
            launch();
            CUDA_CHECK(cudaStreamSynchronize(stream));
            const std::vector<Element> again = out.download();
            if (!first.empty() && std::memcmp(first.data(), again.data(), first.size() * sizeof(Element)) != 0) {
                return expect(false, name, label, format_string("repeat %d gives other bits", i + 1));
            }
        }
        return expect(true, name, label, format_string("%d repeats give the same bits", repeats));
    }

    // Median milliseconds of launch(), each run on its own after the L2 cache was flushed. launch() may be timed many
    // times, so it must not need a reset. At least min_runs, more for about 50 ms in total.
    double time_ms(const std::function<void()>& launch, int min_runs = 5, int max_runs = 30) {
        launch();  // loads the kernel
        CUDA_CHECK(cudaStreamSynchronize(stream));
        std::vector<float> times;
        double total_ms = 0.0;
        while ((int)times.size() < min_runs || ((int)times.size() < max_runs && total_ms < 50.0)) {
            flush_l2();
            CUDA_CHECK(cudaEventRecord(begin_, stream));
            launch();
            CUDA_CHECK(cudaEventRecord(end_, stream));
            CUDA_CHECK(cudaEventSynchronize(end_));
            float ms;
            CUDA_CHECK(cudaEventElapsedTime(&ms, begin_, end_));
            times.push_back(ms);
            total_ms += ms;
        }
        std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
        return times[times.size() / 2];
    }
    // GB/s (read plus written) of a device-to-device copy that moves num_bytes in all, on this GPU in this run: the
    // ceiling of a memory-bound kernel that moves as much.
    double copy_bandwidth(double num_bytes) {
        const size_t half = round_up<size_t>(std::max<size_t>((size_t)(num_bytes / 2), 1 << 20), 1 << 20);
        auto found = copy_bandwidths_.find(half);
        if (found == copy_bandwidths_.end()) {
            DeviceBuffer<float> from((int64_t)(half / 4)), to((int64_t)(half / 4));
            from.fill_random(seed);
            CUDA_CHECK(cudaDeviceSynchronize());
            const double ms =
                time_ms([&] { CUDA_CHECK(cudaMemcpyAsync(to, from, half, cudaMemcpyDeviceToDevice, stream)); }, 11);
            found = copy_bandwidths_.emplace(half, 2.0 * (double)half / ms * 1e-6).first;
        }
        return found->second;
    }

    // Times a memory-bound variant that must move num_bytes; prints GB/s and per cent of copy bandwidth.
    void measure_bandwidth(const std::string& label, double num_bytes, const std::string& idea,
                           const std::function<void()>& launch) {
        const double ceiling = copy_bandwidth(num_bytes);
        const double ms = time_ms(launch), gbps = num_bytes / ms * 1e-6;
        std::printf("time %s %d  %s  %.4f ms  %.0f GB/s  %.1f %% of copy  (%s)\n", operation_.c_str(), variant_,
                    label.c_str(), ms, gbps, 100.0 * gbps / ceiling, idea.c_str());
        std::fflush(stdout);
    }
    // Times a compute-bound variant; prints TFLOP/s, and per cent of peak_tflops when that is known (> 0).
    void measure_flops(const std::string& label, double num_flops, double peak_tflops, const std::string& idea,
                       const std::function<void()>& launch) {
        const double ms = time_ms(launch), tflops = num_flops / ms * 1e-9;
        std::printf(
            "time %s %d  %s  %.4f ms  %.1f TFLOP/s%s  (%s)\n", operation_.c_str(), variant_, label.c_str(), ms, tflops,
            peak_tflops > 0 ? format_string("  %.1f %% of %.0f", 100.0 * tflops / peak_tflops, peak_tflops).c_str()
                            : "",
            idea.c_str());
        std::fflush(stdout);
    }

    // The checkers checked: each kind of fault, planted, must be found. One check line.
    void check_self() {
        std::vector<double> expected = to_double(random_vector<float>(1000, seed));
        DeviceBuffer<float> buffer(1000);
        const bool finds_unwritten = difference(buffer.download(), expected, 1.0, 1e-3).num_beyond == 1000;
        buffer.upload(convert<float>(expected));
        const bool passes_correct = difference(buffer.download(), expected, 1.0, 1e-3).num_beyond == 0;
        const float nan = NAN;
        CUDA_CHECK(cudaMemcpy(buffer + 999, &nan, sizeof nan, cudaMemcpyHostToDevice));
        const bool finds_nan = difference(buffer.download(), expected, 1.0, 1e-3).num_beyond == 1;
        const bool intact_before = buffer.guards_intact();
        CUDA_CHECK(cudaMemcpy(buffer + 1000, &nan, sizeof nan, cudaMemcpyHostToDevice));
        const bool finds_stray = intact_before && !buffer.guards_intact();
        // What a plain result that overflows and an expectation that is not finite make of limit and floor.
        std::vector<float> plain = convert<float>(expected);
        plain[0] = INFINITY;
        const double no_limit = twice_plain_error<float>(plain, expected);
        expected[0] = INFINITY;
        const double no_floor = root_mean_square(expected);
        const bool finds_no_limit = can_refuse(1e-3, 1.0) && !can_refuse(no_limit, 1.0) && !can_refuse(1e-3, no_floor);
        expect(finds_unwritten && passes_correct && finds_nan && finds_stray && finds_no_limit, "harness",
               "planted faults",
               format_string("found: unwritten %d, NaN %d, stray write %d, no limit %d; correct passes %d",
                             finds_unwritten, finds_nan, finds_stray, finds_no_limit, passes_correct));
    }

  private:
    template <class Element>
    void check_planted(const std::string& name, const std::string& label, std::vector<Element> values,
                       const std::vector<double>& expected, double limit, double floor) {
        size_t at = 0;  // the largest: there the rounding to Element cannot hide the plant
        for (size_t i = 0; i < expected.size(); ++i) {
            at = std::abs(expected[i]) > std::abs(expected[at]) ? i : at;
        }
        const double size = std::abs(expected[at]) + floor;
        const double off = (2.0 * limit + 4.0 * unit_roundoff<Element>()) * size + 1e-30;
        values[at] = convert<Element>(std::vector<double>{expected[at] + (expected[at] > 0 ? off : -off)})[0];
        const bool found = difference(values, expected, floor, limit).num_beyond >= 1;
        expect(found, name, label, found ? "planted error found" : "an error planted beyond the limit was not found");
    }

    static std::string index_text(int64_t index, const std::vector<int64_t>& dims) {
        if (dims.empty()) {
            return format_string("[%lld]", (long long)index);
        }
        std::string text;
        for (size_t i = dims.size(); i-- > 0;) {
            text = std::to_string(i == 0 ? index : index % dims[i]) + (text.empty() ? "" : ", ") + text;
            index /= dims[i];
        }
        return "[" + text + "]";
    }

    // Reads more than twice the L2 cache, so that what is timed next finds neither its inputs nor dirty lines in it.
    void flush_l2();

    // 129 rows, one more than two tiles of 64 have, of 512 elements: with fewer, no case of two tiles would be left.
    static constexpr int64_t SMALL_ELEMENTS = 129 * 4 * 128;

    std::string program_, operation_;
    int variant_ = 0;
    int num_passed_ = 0, num_failed_ = 0;
    cudaEvent_t begin_ = nullptr, end_ = nullptr;
    int4* flush_buffer_ = nullptr;
    size_t flush_bytes_ = 0;
    std::map<size_t, double> copy_bandwidths_;
    std::map<std::string, bool> planted_;
};

// Keeps a stream busy for that many clocks. Launch: one thread.
__global__ void delay_kernel(int64_t clocks) {
    for (const int64_t begin = clock64(); clock64() - begin < clocks;) {
    }
}
__global__ void flush_l2_kernel(int4* buffer, int64_t num_packs) {
    int found = 0;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < num_packs;
         i += (int64_t)gridDim.x * blockDim.x) {
        const int4 pack = buffer[i];
        found |= pack.x ^ pack.y ^ pack.z ^ pack.w;
    }
    if (found == 1) {  // never: every word is equal; keeps the loads
        buffer[0] = make_int4(found, 0, 0, 0);
    }
}
inline void Harness::flush_l2() {
    if (flush_buffer_ == nullptr) {
        int device, l2_bytes;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device));
        flush_bytes_ = round_up<size_t>(2 * (size_t)l2_bytes + 1, 16 << 20);
        CUDA_CHECK(cudaMalloc(&flush_buffer_, flush_bytes_));
        CUDA_CHECK(cudaMemset(flush_buffer_, 0x5a, flush_bytes_));
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    flush_l2_kernel<<<1024, 256, 0, stream>>>(flush_buffer_, (int64_t)(flush_bytes_ / sizeof(int4)));
    CUDA_CHECK_LAUNCH();
}

// ---- main --------------------------------------------------------------------------------------
template <class Launcher, class Check, class Measure>
int run_variants(int argc, char** argv, const char* operation, const std::vector<Variant<Launcher>>& variants,
                 Check check, Measure measure) {
    try {
        std::vector<int> wanted;
        bool list = false, check_only = false, measure_only = false, small = false;
        uint64_t seed = 1;
        for (int i = 1; i < argc; ++i) {
            const std::string option = argv[i];
            auto number = [&] {
                char* end = nullptr;
                const long long value = i + 1 < argc ? std::strtoll(argv[i + 1], &end, 10) : -1;
                CHECK(end != nullptr && *end == 0 && end != argv[i + 1] && value >= 0,
                      "%s needs a number from 0 up, as in %s 1", option.c_str(), option.c_str());
                ++i;
                return value;
            };
            if (option == "--list") {
                list = true;
            } else if (option == "--check_only") {
                check_only = true;
            } else if (option == "--measure_only") {
                measure_only = true;
            } else if (option == "--small") {
                small = true;
            } else if (option == "--variant") {
                wanted.push_back((int)number());
            } else if (option == "--seed") {
                seed = (uint64_t)number();
            } else if (option == "--multiprocessors") {
                most_gpu_properties().num_sms = (int)std::clamp<long long>(number(), 1, INT_MAX);
            } else {
                fail(
                    "%s: no such option; there are --list, --variant N, --check_only, --measure_only, --small, --seed "
                    "N, --multiprocessors N",
                    option.c_str());
            }
        }
        std::vector<Variant<Launcher>> selected;
        for (const Variant<Launcher>& v : variants) {
            if (list) {
                std::printf("%s %d  %s\n", operation, v.number, v.idea);
            }
            if (wanted.empty() || std::find(wanted.begin(), wanted.end(), v.number) != wanted.end()) {
                selected.push_back(v);
            }
        }
        if (list) {
            return 0;
        }
        CHECK(!selected.empty(), "--variant: %s has no such variant; --list shows them", operation);

        int device, driver, runtime;
        cudaDeviceProp properties;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
        CUDA_CHECK(cudaDriverGetVersion(&driver));
        CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
        std::printf("%s on %s, %d SMs, CUDA %d.%d, driver for CUDA %d.%d\n", operation, properties.name,
                    properties.multiProcessorCount, runtime / 1000, runtime % 1000 / 10, driver / 1000,
                    driver % 1000 / 10);

        Harness harness(argv[0], operation);
        harness.seed = seed;
        harness.small = small;
        // One variant's failure must not hide the others' results.
        auto guarded = [&](const Variant<Launcher>& v, const char* what, auto& body) {
            harness.set_variant(v.number);
            try {
                body(harness, v);
                CUDA_CHECK(cudaDeviceSynchronize());
            } catch (const Error& error) {
                harness.expect(false, what, v.idea, error.what());
            }
        };
        if (!measure_only) {
            harness.check_self();
            for (const Variant<Launcher>& v : selected) {
                const int checks = harness.num_passed() + harness.num_failed();
                guarded(v, "check", check);
                if (harness.num_passed() + harness.num_failed() == checks) {
                    harness.expect(false, "cases", v.idea, "none was checked");
                }
            }
        }
        if (!check_only) {
            for (const Variant<Launcher>& v : selected) {
                guarded(v, "measure", measure);
            }
        }
        std::printf("%d passed, %d failed\n", harness.num_passed(), harness.num_failed());
        return harness.num_failed() == 0 ? 0 : 1;
    } catch (const Error& error) {
        std::fprintf(stderr, "%s: %s\n", operation, error.what());
        return 2;
    }
}
