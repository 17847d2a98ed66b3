// gpt_checks.cuh: how test_gpt.cu compares: tensors with the truth, whose limits come from a plain implementation;
// bits; losses. One line a check.
#pragma once
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "dev/test/gpt_cases.cuh"

using Tensors = std::vector<std::vector<double>>;  // one for each of the parameter table

// ---- checks ------------------------------------------------------------------------------------
struct Checks {
    uint64_t seed = 1;
    int num_passed = 0, num_failed = 0;

    bool expect(bool passed, const std::string& what, const std::string& label, const std::string& detail = "") {
        ++(passed ? num_passed : num_failed);
        std::printf("%s test_gpt %s  %s  %s\n", passed ? "ok  " : "FAIL", what.c_str(), label.c_str(), detail.c_str());
        if (!passed) {
            std::printf("     rerun: test_gpt --seed %llu\n", (unsigned long long)seed);
        }
        std::fflush(stdout);
        return passed;
    }
};

// How far values are from the truth, relative to its 2-norm and, of single elements, to its root mean square.
struct TensorError {
    double norm = 0.0, largest = 0.0;
};
inline TensorError error_of(const std::vector<double>& values, const std::vector<double>& truth) {
    CHECK(values.size() == truth.size(), "comparison of %zu elements with %zu", values.size(), truth.size());
    double squares = 0.0, largest = 0.0;
    for (size_t i = 0; i < truth.size(); ++i) {
        const double error = std::abs(values[i] - truth[i]);
        squares += error * error;
        largest = std::isnan(largest) || error <= largest ? largest : error;  // NaN stays
    }
    const double rms = std::max(root_mean_square(truth), 1e-30);
    return {std::sqrt(squares / (double)truth.size()) / rms, largest / rms};
}
inline TensorError limit_of(const std::vector<double>& plain, const std::vector<double>& truth) {
    const TensorError error = error_of(plain, truth);
    const double one_rounding = unit_roundoff<bf16>();
    return {2.0 * std::max(error.norm, one_rounding), 4.0 * std::max(error.largest, one_rounding)};
}
inline bool within(const TensorError& error, const TensorError& limit) {
    return error.norm <= limit.norm && error.largest <= limit.largest;
}

// One tensor; the check itself is checked: two planted errors and a NaN must be found.
inline void compare(Checks& checks, const std::string& what, const std::string& label,
                    const std::vector<double>& values, const std::vector<double>& truth, const TensorError& limit) {
    const TensorError error = error_of(values, truth);
    std::vector<double> scaled = truth, spoilt = truth, not_a_number = truth;
    for (double& value : scaled) {
        value *= 1.0 + 1.5 * limit.norm;
    }
    spoilt[truth.size() / 2] += 1.5 * limit.largest * root_mean_square(truth);
    not_a_number.back() = NAN;
    const bool finds_planted = !within(error_of(scaled, truth), limit) && !within(error_of(spoilt, truth), limit) &&
                               !within(error_of(not_a_number, truth), limit);
    checks.expect(within(error, limit) && finds_planted, what, label,
                  format_string("error %.2e limit %.2e, largest %.2e limit %.2e%s", error.norm, limit.norm,
                                error.largest, limit.largest, finds_planted ? "" : ", misses a planted error"));
}

// Floats as doubles are equal exactly when their bits are, but for zeros' signs; NaN is never equal.
inline std::string first_difference(const Tensors& a, const Tensors& b) {
    for (size_t i = 0; i < a.size(); ++i) {
        for (size_t k = 0; k < a[i].size(); ++k) {
            if (!(a[i][k] == b[i][k])) {
                return format_string("tensor %zu element %zu: %.9g and %.9g", i, k, a[i][k], b[i][k]);
            }
        }
    }
    return "";
}
inline void expect_equal(Checks& checks, const std::string& what, const std::string& label, const Tensors& a,
                         const Tensors& b) {
    const std::string difference = first_difference(a, b);
    checks.expect(difference.empty(), what, label, difference.empty() ? "equal bits" : difference);
}

// plain_error: of the plain implementation. The mean of R losses: a token's is off by the rounding of its logits, which
// are of the size of the loss, and of what they are made of; two roundings of bf16, independent from token to token.
inline void compare_loss(Checks& checks, const std::string& what, const Case& c, double loss, double truth,
                         double plain_error) {
    const double tokens = (double)(c.B * c.T * c.num_micro_batches);
    const double limit = 2.0 * std::max(plain_error, 2.0 * unit_roundoff<bf16>() * truth / std::sqrt(tokens));
    auto passes = [&](double value) { return std::abs(value - truth) <= limit; };
    checks.expect(
        passes(loss) && !passes(truth + 1.5 * limit) && !passes(NAN), what, c.name,
        format_string("%.6f, expected %.6f, error %.1e limit %.1e", loss, truth, std::abs(loss - truth), limit));
}
