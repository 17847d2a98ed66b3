// reference_testing.h: what the tests of the CPU reference share: repeatable random numbers, gradients by finite
// differences, comparison.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "llmc/trainable_model.h"

// Uniform in [-scale, scale); the same numbers with every standard library.
inline std::vector<double> random_values(int64_t n, double scale, uint64_t seed) {
    std::mt19937_64 generator(seed);
    std::vector<double> values(n);
    for (double& value : values) {
        value = scale * (2.0 * (double)(generator() >> 11) * 0x1p-53 - 1.0);
    }
    return values;
}
inline std::vector<int32_t> random_tokens(int64_t n, int64_t V, uint64_t seed) {
    std::mt19937_64 generator(seed);
    std::vector<int32_t> tokens(n);
    for (int32_t& token : tokens) {
        token = (int32_t)(generator() % (uint64_t)V);
    }
    return tokens;
}
template <class To, class From>
std::vector<To> converted(const std::vector<From>& values) {
    return std::vector<To>(values.begin(), values.end());
}

// Weights larger than a trainer's, so that nothing is nearly linear; those of vectors around 1.
inline void set_random_weights(TrainableModel& model, double matrix_scale) {
    for (size_t i = 0; i < model.parameters().tensors.size(); ++i) {
        const ParameterTensor& tensor = model.parameters().tensors[i];
        std::vector<double> values =
            random_values(tensor.num_elements(), tensor.is_vector ? 0.5 : matrix_scale, 100 + i);
        for (double& value : values) {
            value += tensor.is_vector ? 1.0 : 0.0;
        }
        model.write_state(StateKind::master, (int)i, converted<float>(values).data());
    }
}

template <class Real>
double dot(const std::vector<Real>& a, const std::vector<Real>& b) {
    double sum = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        sum += (double)a[i] * (double)b[i];
    }
    return sum;
}

// Errors are relative to the largest expected value, but at least to this: where all are zero rounding is left.
constexpr double SMALLEST_SCALE = 1e-3;

// The larger of two; NaN when one of them is.
inline double larger_or_nan(double a, double b) { return std::isnan(a) || a >= b ? a : b; }

// One thread while it lives: on small shapes threads only wait for each other.
struct SingleThread {
    const int threads = omp_get_max_threads();
    SingleThread() { omp_set_num_threads(1); }
    ~SingleThread() { omp_set_num_threads(threads); }
    SingleThread(const SingleThread&) = delete;
    SingleThread& operator=(const SingleThread&) = delete;
};

// The derivative of f at 0 from four values: its error is of order step^4.
inline double derivative_at_zero(const std::function<double(double)>& f, double step) {
    return (8.0 * (f(step) - f(-step)) - (f(2.0 * step) - f(-2.0 * step))) / (12.0 * step);
}

// The largest difference between dx and the derivative of f() by each element of x, relative to the largest derivative.
// f reads x; it is left as it was.
inline double gradient_error(std::vector<double>& x, const std::vector<double>& dx, const std::function<double()>& f,
                             double step = 1e-3) {
    double largest_difference = 0.0, largest = SMALLEST_SCALE;
    for (size_t i = 0; i < x.size(); ++i) {
        const double value = x[i];
        const double expected = derivative_at_zero(
            [&](double offset) {
                x[i] = value + offset;
                return f();
            },
            step);
        x[i] = value;
        const double difference = std::abs(dx[i] - expected);
        largest_difference = larger_or_nan(largest_difference, difference);
        largest = std::max(largest, std::abs(expected));
    }
    return largest_difference / largest;
}

// The largest difference relative to the largest magnitude of `expected`; NaN when there is one.
template <class A, class B>
double relative_error(const std::vector<A>& values, const std::vector<B>& expected) {
    double largest_difference = 0.0, largest = SMALLEST_SCALE;
    for (size_t i = 0; i < expected.size(); ++i) {
        const double difference = std::abs((double)values[i] - (double)expected[i]);
        largest_difference = larger_or_nan(largest_difference, difference);
        largest = std::max(largest, std::abs((double)expected[i]));
    }
    return largest_difference / largest;
}

template <class Real>
bool same_bits(const std::vector<Real>& a, const std::vector<Real>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(Real)) == 0;
}
