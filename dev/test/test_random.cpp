// test_random.cpp: the generator against its published answers, the distributions, the order of data as a bijection.
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "llmc/random.h"

namespace {
RandomStream any_stream(uint64_t index = 0) { return RandomStream(std::random_device{}(), RandomUse::samples, index); }
}  // namespace

// The known-answer vectors of the Random123 distribution (kat_vectors, philox4x32 10).
TEST(Random, PhiloxKnownAnswers) {
    EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}), (RandomBlock{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
    EXPECT_EQ(philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
              (RandomBlock{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
    EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
              (RandomBlock{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Random, StreamsDifferInSeedUseAndIndex) {
    std::set<RandomBlock> blocks;
    for (const uint64_t seed : {0ull, 1ull, 1ull << 32, 1ull << 62}) {
        for (const RandomUse use : {RandomUse::initial_weights, RandomUse::data_order, RandomUse::samples}) {
            for (const uint64_t index : {0ull, 1ull, 1ull << 32, (1ull << 56) - 1}) {
                for (const uint64_t n : {0ull, 1ull, 1ull << 32, ~0ull}) {
                    blocks.insert(RandomStream(seed, use, index).block(n));
                }
            }
        }
    }
    EXPECT_EQ(blocks.size(), 4u * 3 * 4 * 4);
}

TEST(Random, UniformFillsTheUnitIntervalEvenly) {
    const RandomStream random = any_stream();
    const int n = 100000, num_bins = 100;
    std::vector<int> bins(num_bins);
    for (int i = 0; i < n; ++i) {
        const double u = random.uniform(i);
        ASSERT_TRUE(u >= 0.0 && u < 1.0);
        ++bins[(int)(u * num_bins)];
    }
    double chi_squared = 0.0;  // 99 degrees of freedom: mean 99, standard deviation 14
    for (const int count : bins) {
        chi_squared += (count - 1000.0) * (count - 1000.0) / 1000.0;
    }
    EXPECT_LT(chi_squared, 99 + 7 * 14.1);
}

TEST(Random, NumbersOfAPairAreTheTwoHalvesOfABlock) {
    const RandomStream random = any_stream();
    for (const uint64_t n : {0, 1, 5}) {
        const RandomBlock b = random.block(n);
        const auto unit = [](uint64_t high, uint64_t low) { return (double)((high << 32 | low) >> 11) * 0x1p-53; };
        EXPECT_EQ(random.uniform(2 * n), unit(b[0], b[1]));
        EXPECT_EQ(random.uniform(2 * n + 1), unit(b[2], b[3]));
    }
}

TEST(Random, NormalHasTheMomentsOfANormalDistribution) {
    const int64_t n = 200001;  // odd: the last pair is cut
    std::vector<float> values(n, NAN);
    fill_normal(values.data(), n, 0.5, any_stream());
    double mean = 0.0, square = 0.0, fourth = 0.0, neighbours = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        const double z = values[i] / 0.5;
        mean += z / n, square += z * z / n, fourth += z * z * z * z / n;
        neighbours += i == 0 ? 0.0 : z * values[i - 1] / 0.5 / n;
    }
    const double s = 1.0 / std::sqrt((double)n);  // seven standard errors: 1, sqrt(2), sqrt(96), 1
    EXPECT_LE(std::fabs(mean), 7 * s);
    EXPECT_LE(std::fabs(square - 1.0), 7 * std::sqrt(2.0) * s);
    EXPECT_LE(std::fabs(fourth - 3.0), 7 * std::sqrt(96.0) * s);
    EXPECT_LE(std::fabs(neighbours), 7 * s);
}

TEST(Random, FillDoesNotDependOnThreads) {
    const RandomStream random = any_stream();
    std::vector<float> one(1001, NAN), three(1001, NAN);
    const int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    fill_normal(one.data(), 1001, 1.0, random);
    omp_set_num_threads(3);
    fill_normal(three.data(), 1001, 1.0, random);
    omp_set_num_threads(threads);
    EXPECT_EQ(one, three);
    std::vector<float> shorter(10, NAN);
    fill_normal(shorter.data(), 9, 1.0, random);
    EXPECT_TRUE(std::equal(shorter.begin(), shorter.begin() + 9, one.begin()));
    EXPECT_TRUE(std::isnan(shorter[9])) << "written past the end";
}

TEST(Random, PermutationVisitsEverythingOnce) {
    for (const uint64_t n : {1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097}) {
        const RandomPermutation permutation(n, any_stream(n));
        std::vector<bool> seen(n);
        for (uint64_t i = 0; i < n; ++i) {
            const uint64_t x = permutation(i);
            ASSERT_LT(x, n);
            ASSERT_FALSE(seen[x]) << "n " << n << ", " << x << " twice";
            seen[x] = true;
        }
    }
}

TEST(Random, PermutationOfHugeRanges) {
    for (const uint64_t n : {(1ull << 32) + 1, (1ull << 48) - 3, (1ull << 62) + 1, ~0ull}) {
        const RandomPermutation permutation(n, any_stream());
        std::set<uint64_t> seen;
        for (uint64_t i = 0; i < 200; ++i) {
            const uint64_t x = permutation(n - 1 - i);
            EXPECT_LT(x, n);
            seen.insert(x);
        }
        EXPECT_EQ(seen.size(), 200u);
        EXPECT_GT(*seen.rbegin() - *seen.begin(), n / 2) << "spread over the range";
    }
}

// All orders of few elements come about equally often: 2400 draws of 24, each expected 100 times; chi squared of 23
// degrees of freedom has mean 23 and standard deviation 6.8.
TEST(Random, PermutationsAreAllLikely) {
    std::map<std::vector<uint64_t>, int> counts;
    const uint64_t seed = std::random_device{}();
    for (uint64_t epoch = 0; epoch < 2400; ++epoch) {
        const RandomPermutation permutation(4, RandomStream(seed, RandomUse::data_order, epoch));
        ++counts[{permutation(0), permutation(1), permutation(2), permutation(3)}];
    }
    EXPECT_EQ(counts.size(), 24u);
    double chi_squared = 0.0;
    for (const auto& [order, count] : counts) {
        chi_squared += (count - 100.0) * (count - 100.0) / 100.0;
    }
    EXPECT_LT(chi_squared, 23 + 7 * 6.8) << "seed " << seed;
}
