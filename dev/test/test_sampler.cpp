// test_sampler.cpp: which token is drawn, by hand and by frequency.
#include <gtest/gtest.h>

#include <random>

#include "llmc/random.h"
#include "llmc/sampler.h"

namespace {

std::optional<int32_t> draw(const std::vector<float>& logits, double temperature, double top_p, double u) {
    return sample_token(logits.data(), (int64_t)logits.size(), temperature, top_p, u);
}
const double almost_one = 1.0 - 0x1p-53;

}  // namespace

TEST(Sampler, TemperatureZeroTakesTheLargest) {
    EXPECT_EQ(draw({1, 5, 2}, 0.0, 1.0, almost_one), 1);
    EXPECT_EQ(draw({5, 1, 5}, 0.0, 1.0, 0.5), 0) << "of equal ones the first";
    EXPECT_EQ(draw({-3}, 0.0, 1.0, 0.5), 0);
}

TEST(Sampler, FollowsTheProbabilities) {
    // probabilities 1/8, 2/8, 5/8
    const std::vector<float> logits = {std::log(1.0f), std::log(2.0f), std::log(5.0f)};
    EXPECT_EQ(draw(logits, 1.0, 1.0, 0.0), 0);
    EXPECT_EQ(draw(logits, 1.0, 1.0, 0.124), 0);
    EXPECT_EQ(draw(logits, 1.0, 1.0, 0.126), 1);
    EXPECT_EQ(draw(logits, 1.0, 1.0, 0.374), 1);
    EXPECT_EQ(draw(logits, 1.0, 1.0, 0.376), 2);
    EXPECT_EQ(draw(logits, 1.0, 1.0, almost_one), 2);
}

TEST(Sampler, TemperatureSharpensAndFlattens) {
    const std::vector<float> logits = {0.0f, std::log(3.0f)};  // 1/4, 3/4; at temperature 1/2: 1/10, 9/10
    EXPECT_EQ(draw(logits, 0.5, 1.0, 0.099), 0);
    EXPECT_EQ(draw(logits, 0.5, 1.0, 0.101), 1);
    EXPECT_EQ(draw(logits, 1e9, 1.0, 0.499), 0);
    EXPECT_EQ(draw(logits, 1e9, 1.0, 0.501), 1);
    EXPECT_EQ(draw(logits, 1e-300, 1.0, 0.0), 1);
}

TEST(Sampler, TopPKeepsTheSmallestSetThatReachesIt) {
    const std::vector<float> logits = {std::log(1.0f), std::log(2.0f), std::log(5.0f)};
    for (const double u : {0.0, 0.5, almost_one}) {
        EXPECT_EQ(draw(logits, 1.0, 0.6, u), 2) << "5/8 reach 0.6 alone";
        EXPECT_EQ(draw(logits, 1.0, 1e-9, u), 2) << "one is always kept";
    }
    EXPECT_EQ(draw({0, 0}, 1.0, 0.5, almost_one), 0) << "one of two reaches 1/2";
    // 5/8 + 2/8 reach 0.7: of the two the likeliest has 5/7
    EXPECT_EQ(draw(logits, 1.0, 0.7, 0.713), 2);
    EXPECT_EQ(draw(logits, 1.0, 0.7, 0.715), 1);
    EXPECT_EQ(draw(logits, 1.0, 0.7, almost_one), 1);
}

TEST(Sampler, NeverDrawsTheImpossible) {
    const std::vector<float> logits = {0.0f, 0.0f, -1e30f};
    for (const double top_p : {0.5, 0.999999, 1.0}) {
        EXPECT_NE(draw(logits, 1.0, top_p, almost_one), 2) << top_p;
    }
    EXPECT_EQ(draw({3e38f, -3e38f}, 1.0, 1.0, almost_one), 0) << "differences beyond float";
}

TEST(Sampler, NothingFromLogitsThatAreNotFinite) {
    EXPECT_EQ(draw({0, NAN, 1}, 1.0, 1.0, 0.5), std::nullopt);
    EXPECT_EQ(draw({0, INFINITY, 1}, 0.0, 1.0, 0.5), std::nullopt);
}

// Frequencies against softmax over random logits, six standard deviations.
TEST(Sampler, FrequenciesAreThoseOfSoftmax) {
    std::mt19937 generator(std::random_device{}());
    std::normal_distribution<float> normal;
    const int V = 50, n = 20000;
    std::vector<float> logits(V);
    double total = 0.0;
    for (float& logit : logits) {
        logit = normal(generator);
        total += std::exp((double)logit / 0.7);
    }
    const RandomStream random(generator(), RandomUse::samples, 0);
    std::vector<int> counts(V);
    for (int i = 0; i < n; ++i) {
        ++counts[draw(logits, 0.7, 1.0, random.uniform(i)).value()];
    }
    for (int v = 0; v < V; ++v) {
        const double p = std::exp((double)logits[v] / 0.7) / total;
        EXPECT_NEAR(counts[v], n * p, 6 * std::sqrt(n * p * (1 - p)) + 1) << v;
    }
}
