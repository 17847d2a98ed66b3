// random.h: random numbers that depend on (seed, use, index, n) alone. Number n of a stream is computed from n, not
// from the numbers before it: initial weights do not depend on how many threads fill them, and after a resume the order
// of the data and the samples go on as if nothing had happened, with no generator state to save. Source: Philox4x32-10
// of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once
#include <array>
#include <cassert>
#include <cmath>
#include <cstdint>

using RandomBlock = std::array<uint32_t, 4>;

// 128 random bits for a counter: ten rounds of a keyed bijection of 128-bit numbers.
inline RandomBlock philox4x32(RandomBlock counter, std::array<uint32_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = (uint64_t)0xD2511F53u * counter[0], product1 = (uint64_t)0xCD9E8D57u * counter[2];
        counter = {(uint32_t)(product1 >> 32) ^ counter[1] ^ key[0], (uint32_t)product1,
                   (uint32_t)(product0 >> 32) ^ counter[3] ^ key[1], (uint32_t)product0};
        key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};  // golden ratio, sqrt(3) - 1
    }
    return counter;
}

// What numbers are for: streams of different uses have nothing in common. Values are part of what a seed means.
enum class RandomUse : uint64_t { initial_weights = 1, data_order = 2, samples = 3, replaced_tokens = 4 };

// One of 2^56 independent streams of a seed and use.
class RandomStream {
  public:
    // index: below 2^56; the tensor, the epoch, the step.
    RandomStream(uint64_t seed, RandomUse use, uint64_t index)
        : key_{(uint32_t)seed, (uint32_t)(seed >> 32)}, stream_((uint64_t)use << 56 | index) {
        assert(index >> 56 == 0);
    }

    // 128 random bits, block n of the stream.
    RandomBlock block(uint64_t n) const {
        return philox4x32({(uint32_t)n, (uint32_t)(n >> 32), (uint32_t)stream_, (uint32_t)(stream_ >> 32)}, key_);
    }

    // Number n, uniform in [0, 1), a multiple of 2^-53.
    double uniform(uint64_t n) const {
        const RandomBlock b = block(n / 2);
        return n % 2 == 0 ? to_unit(b[0], b[1]) : to_unit(b[2], b[3]);
    }

    // Numbers 2n and 2n + 1 of a normal distribution of mean 0 and standard deviation 1 (Box-Muller).
    std::array<double, 2> normal_pair(uint64_t n) const {
        const RandomBlock b = block(n);
        const double radius = std::sqrt(-2.0 * std::log(1.0 - to_unit(b[0], b[1])));  // the logarithm of (0, 1]
        const double angle = 2.0 * 3.14159265358979323846 * to_unit(b[2], b[3]);
        return {radius * std::cos(angle), radius * std::sin(angle)};
    }

  private:
    static double to_unit(uint32_t high, uint32_t low) {
        return (double)(((uint64_t)high << 32 | low) >> 11) * 0x1p-53;
    }

    std::array<uint32_t, 2> key_;
    uint64_t stream_;
};

// Fills out[0, n) with numbers 0 to n - 1 of a normal distribution of mean 0. All threads; the same with any number.
inline void fill_normal(float* out, int64_t n, double standard_deviation, const RandomStream& random) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < (n + 1) / 2; ++i) {
        const std::array<double, 2> pair = random.normal_pair((uint64_t)i);
        out[2 * i] = (float)(standard_deviation * pair[0]);
        if (2 * i + 1 < n) {
            out[2 * i + 1] = (float)(standard_deviation * pair[1]);
        }
    }
}

// A random order of 0 to n - 1, without a table: a bijection of the numbers of 2h bits, the smallest even number of
// bits that holds n - 1, applied until it lands below n (cycle walking; four times at most on average). The bijection
// is a Feistel network (Luby & Rackoff 1988) whose round function is Philox.
class RandomPermutation {
  public:
    // n: at least 1.
    RandomPermutation(uint64_t n, const RandomStream& random) : n_(n), random_(random) {
        assert(n >= 1);
        while (half_bits_ < 32 && (n - 1) >> (2 * half_bits_) != 0) {
            ++half_bits_;
        }
    }

    // The number at place i of the order; i below n.
    uint64_t operator()(uint64_t i) const {
        assert(i < n_);
        do {
            i = shuffle_bits(i);
        } while (i >= n_);
        return i;
    }

  private:
    // Four rounds look random when halves are wide; narrow halves take more to mix.
    static constexpr uint64_t ROUNDS = 12;

    uint64_t shuffle_bits(uint64_t x) const {
        const uint64_t mask = ((uint64_t)1 << half_bits_) - 1;
        uint64_t left = x >> half_bits_, right = x & mask;
        for (uint64_t round = 0; round < ROUNDS; ++round) {
            const uint64_t mixed = left ^ (random_.block(round << 32 | right)[0] & mask);
            left = right;
            right = mixed;
        }
        return left << half_bits_ | right;
    }

    uint64_t n_;
    RandomStream random_;
    int half_bits_ = 1;
};
