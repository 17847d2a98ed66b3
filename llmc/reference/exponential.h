// reference/exponential.h: e^x without a branch or a call, so that the compiler turns loops over it into vector code;
// std::exp stays scalar unless all of a program's arithmetic is allowed to be inexact. Error: 2 units in the last
// place.
//   e^x = 2^n e^r,  n = round(x / ln 2),  r = x - n ln 2 in [-0.35, 0.35]: the Taylor series of e^r
#pragma once
#include <cstdint>
#include <cstring>

namespace reference {

// What the format of Real asks for.
template <class Real>
struct ExponentialConstants;
template <>
struct ExponentialConstants<float> {
    using Integer = int32_t;
    using Bits = uint32_t;
    static constexpr int MANTISSA_BITS = 23, EXPONENT_BIAS = 127;
    static constexpr float ROUNDER = 12582912.0f;               // 1.5 * 2^23: adding it rounds to an integer
    static constexpr float LOWEST = -105.0f, HIGHEST = 89.0f;   // e^x is 0, infinite beyond
    static constexpr float LN2_HIGH = 0.693359375f;             // few bits, so that n LN2_HIGH is exact
    static constexpr float LN2_LOW = -2.12194440054690583e-4f;  // ln 2 - LN2_HIGH
};
template <>
struct ExponentialConstants<double> {
    using Integer = int64_t;
    using Bits = uint64_t;
    static constexpr int MANTISSA_BITS = 52, EXPONENT_BIAS = 1023;
    static constexpr double ROUNDER = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double LOWEST = -746.0, HIGHEST = 710.0;
    static constexpr double LN2_HIGH = 0.693145751953125;
    static constexpr double LN2_LOW = 1.42860682030941723e-6;
};

// The Taylor series of e^r from the term of degree `degree` on, divided by r^degree / degree!; as many terms as count.
template <class Real, int degree = 0>
inline Real exponential_series(Real r) {
    constexpr int last_degree = sizeof(Real) == 4 ? 7 : 13;
    if constexpr (degree == last_degree) {
        return 1;
    } else {
        return 1 + r * (Real(1) / Real(degree + 1)) * exponential_series<Real, degree + 1>(r);
    }
}

// 2^n for n within the exponents of Real.
template <class Real>
inline Real power_of_two(typename ExponentialConstants<Real>::Integer n) {
    using Constants = ExponentialConstants<Real>;
    const auto bits = (typename Constants::Bits)(n + Constants::EXPONENT_BIAS) << Constants::MANTISSA_BITS;
    Real power;
    std::memcpy(&power, &bits, sizeof(power));
    return power;
}

// e^x for any x: 0 and infinity where the format ends, NaN for NaN.
template <class Real>
inline Real exponential(Real x) {
    using Constants = ExponentialConstants<Real>;
    using Integer = typename Constants::Integer;
    x = x < Constants::LOWEST ? Constants::LOWEST : x;  // NaN stays
    x = x > Constants::HIGHEST ? Constants::HIGHEST : x;
    const Real shifted = x * Real(1.44269504088896340736) + Constants::ROUNDER;
    Integer shifted_bits, rounder_bits;
    const Real rounder = Constants::ROUNDER;
    std::memcpy(&shifted_bits, &shifted, sizeof(shifted_bits));
    std::memcpy(&rounder_bits, &rounder, sizeof(rounder_bits));
    const Integer n = shifted_bits - rounder_bits;
    const Real n_real = shifted - Constants::ROUNDER;
    const Real r = (x - n_real * Constants::LN2_HIGH) - n_real * Constants::LN2_LOW;
    // In two factors: 2^n alone may lie outside the format where e^x does not.
    return exponential_series(r) * power_of_two<Real>(n >> 1) * power_of_two<Real>(n - (n >> 1));
}

}  // namespace reference
