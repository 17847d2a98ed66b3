// check.h: how everything here fails. One exception type whose text is a whole sentence for the user; main catches it
// once, prints it and ends with a non-zero status. Also numbers, and words as a shell reads them, for such texts, and
// the overflow-safe arithmetic that sizes read from files go through.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

// An error to show to the user as it is: it names the file, flag or call, what is wrong, and what to do about it.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// printf into a std::string.
inline std::string format_string_v(const char* format, va_list arguments) {
    va_list again;
    va_copy(again, arguments);
    const int length = std::vsnprintf(nullptr, 0, format, arguments);
    std::string text(length > 0 ? (size_t)length : 0, '\0');
    std::vsnprintf(text.data(), text.size() + 1, format, again);
    va_end(again);
    return text;
}
__attribute__((format(printf, 1, 2))) inline std::string format_string(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::string text = format_string_v(format, arguments);
    va_end(arguments);
    return text;
}

// Throws Error with a printf-formatted sentence.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::string text = format_string_v(format, arguments);
    va_end(arguments);
    throw Error(text);
}

// A number as short as reads back as the same one: what a sentence calls wrong must look it.
inline std::string number_text(double value) {
    if (value == std::floor(value) && std::fabs(value) < 1e9) {
        return format_string("%.0f", value);
    }
    for (int digits = 1; digits < 17; ++digits) {
        const std::string shorter = format_string("%.*g", digits, value);
        if (std::strtod(shorter.c_str(), nullptr) == value) {
            return shorter;
        }
    }
    return format_string("%.17g", value);
}

// CHECK(rows > 0, "--batch_size %d: must be positive", rows): for input. Our own mistakes use assert.
#define CHECK(condition, ...)  \
    do {                       \
        if (!(condition)) {    \
            fail(__VA_ARGS__); \
        }                      \
    } while (0)

// a * b and a + b of sizes that come from a file; `what` names the quantity when it passes 2^64.
inline uint64_t checked_mul(uint64_t a, uint64_t b, const char* what) {
    uint64_t product;
    CHECK(!__builtin_mul_overflow(a, b, &product), "%s: size overflows 64 bits", what);
    return product;
}
inline uint64_t checked_add(uint64_t a, uint64_t b, const char* what) {
    uint64_t sum;
    CHECK(!__builtin_add_overflow(a, b, &sum), "%s: size overflows 64 bits", what);
    return sum;
}

// A word as a shell reads it.
inline std::string shell_quote(const std::string& word) {
    const bool plain = !word.empty() && word.find_first_not_of(
                                            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                            "0123456789_-./=,:+@%") == std::string::npos;
    if (plain) {
        return word;
    }
    std::string quoted = "'";
    for (const char c : word) {
        quoted += c == '\'' ? "'\\''" : std::string(1, c);
    }
    return quoted + "'";
}

template <class Integer>
constexpr Integer ceil_div(Integer a, Integer b) {
    return (a + b - 1) / b;
}
template <class Integer>
constexpr Integer round_up(Integer a, Integer multiple) {
    return ceil_div(a, multiple) * multiple;
}
