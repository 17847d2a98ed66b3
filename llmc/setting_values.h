// setting_values.h: the value of one setting as text and back, as flags, settings files and --help have it: numbers,
// truths, words of a choice, texts and lists.
#pragma once
#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "setting_choices.h"  // words of choices
#include "toml.h"             // quoting

using Words = std::vector<std::string>;  // the values given to one setting

// ---- text to value and back ---------------------------------------------------------------------

// parse(words, value): throws Error with the rule a value breaks, to follow "--flag value: must be ".
// text(value): the value as settings files write it.
template <class Integer, std::enable_if_t<std::is_integral_v<Integer> && !std::is_same_v<Integer, bool>, int> = 0>
void parse(const Words& words, Integer& value) {
    const std::string& word = words.back();
    const size_t digits = word.size() > 1 && word[0] == '-' ? 1 : 0;
    CHECK(!word.empty() && word.find_first_not_of("0123456789", digits) == std::string::npos, "a whole number");
    CHECK(digits == 0 || std::is_signed_v<Integer>, "a whole number that is not negative");
    errno = 0;
    const long long parsed = std::strtoll(word.c_str(), nullptr, 10);
    value = (Integer)parsed;
    CHECK(std::is_signed_v<Integer> || errno == 0, "a whole number up to 2^63 - 1");
    CHECK(errno == 0 && (long long)value == parsed, "a whole number that fits %zu bits", 8 * sizeof(Integer));
}
inline void parse(const Words& words, double& value) {
    char* end;
    errno = 0;
    value = std::strtod(words.back().c_str(), &end);
    CHECK(
        !words.back().empty() && *end == '\0' && !std::isspace((unsigned char)words.back()[0]) && std::isfinite(value),
        "a number");
    CHECK(value != 0.0 || errno != ERANGE, "0 or a number that a double holds: at least 4.94e-324");
}
inline void parse(const Words& words, bool& value) {
    CHECK(words.back() == "true" || words.back() == "false", "true or false");
    value = words.back() == "true";
}
inline void parse(const Words& words, std::string& value) { value = words.back(); }
inline void parse(const Words& words, std::vector<std::string>& value) { value = words; }
// Layer numbers: words with commas between them, or "none".
inline void parse(const Words& words, std::vector<int>& value) {
    value.clear();
    for (const std::string& word : words) {
        if (word == "none") {
            continue;
        }
        for (size_t begin = 0; begin <= word.size();) {
            const size_t end = std::min(word.find(',', begin), word.size());
            int number;
            try {
                parse(Words{word.substr(begin, end - begin)}, number);
            } catch (const Error&) {
                fail("whole numbers with commas between them, such as 0,1,-2,-1, or none");
            }
            value.push_back(number);
            begin = end + 1;
        }
    }
}
template <class Enum, std::enable_if_t<std::is_enum_v<Enum>, int> = 0>
void parse(const Words& words, Enum& value) {
    std::string known;
    for (const auto& [word, choice] : choices(value)) {
        if (words.back() == word) {
            value = choice;
            return;
        }
        known += std::string(known.empty() ? "" : " or ") + word;
    }
    fail("%s", known.c_str());
}

template <class Integer, std::enable_if_t<std::is_integral_v<Integer> && !std::is_same_v<Integer, bool>, int> = 0>
std::string text(Integer value) {
    return std::to_string(value);
}
inline std::string text(double value) { return number_text(value); }
inline std::string text(bool value) { return value ? "true" : "false"; }
inline std::string text(const std::string& value) { return toml_quote(value); }
inline std::string text(const std::vector<std::string>& values) {
    std::string joined = "[";
    for (const std::string& value : values) {
        joined += (joined.size() > 1 ? ", " : "") + toml_quote(value);
    }
    return joined + "]";
}
inline std::string text(const std::vector<int>& values) {
    std::string joined;
    for (const int value : values) {
        joined += (joined.empty() ? "" : ",") + std::to_string(value);
    }
    return toml_quote(joined.empty() ? "none" : joined);
}
template <class Enum, std::enable_if_t<std::is_enum_v<Enum>, int> = 0>
std::string text(Enum value) {
    return toml_quote(choice_name(value));
}

// What --help shows in the place of a value.
template <class Value>
std::string value_name(const Value& value) {
    if constexpr (std::is_same_v<Value, bool>) {
        return "";
    } else if constexpr (std::is_enum_v<Value>) {
        std::string words;
        for (const auto& choice : choices(value)) {
            words += (words.empty() ? "" : "|") + std::string(choice.first);
        }
        return words;
    } else if constexpr (std::is_integral_v<Value>) {
        return "N";
    } else if constexpr (std::is_same_v<Value, double>) {
        return "X";
    } else if constexpr (std::is_same_v<Value, std::vector<int>>) {
        return "N,N,...";
    } else if constexpr (std::is_same_v<Value, std::vector<std::string>>) {
        return "FILE...";
    } else {
        return "TEXT";
    }
}
