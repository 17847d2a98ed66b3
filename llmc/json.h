// json.h: JSON of files that others may have written or damaged: strict reading, and named values with messages that
// say file, entry and rule.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"
#include "regular_file.h"

using Json = nlohmann::ordered_json;  // to write: keys stay in the order they are written
using JsonValue = nlohmann::json;     // to read: finds a key among many fast

// A name out of a file as messages show it: without line ends or other control characters, at most 80 bytes.
inline std::string printable(std::string_view text) {
    std::string shown;
    for (const char c : text.substr(0, 80)) {
        const unsigned char byte = c;
        if (!shown.empty() && shown.back() == '\xc2' && byte >= 0x80 && byte < 0xa0) {  // U+0080 to U+009F
            shown.back() = '?';
        } else {
            shown += byte < 0x20 || byte == 0x7f ? '?' : c;
        }
    }
    return text.size() > 80 ? shown + "..." : shown;
}

constexpr int JSON_MAX_DEPTH = 32;  // deeper than any format here nests values

// The value of a text that is only looked into, its keys in order; discarded where it is not JSON, or nests deeper.
inline Json parse_or_discard(std::string_view text) {
    bool is_shallow = true;
    const auto keep = [&](int depth, Json::parse_event_t, Json&) {
        is_shallow = is_shallow && depth <= JSON_MAX_DEPTH;
        return is_shallow;
    };
    Json value = Json::parse(text.begin(), text.end(), keep, false);
    return is_shallow ? value : Json(Json::value_t::discarded);
}
// As a file holds it.
inline std::string json_text(const Json& json) { return json.dump(1) + "\n"; }

// Throws Error, naming `source`, for text that is not JSON, gives a name twice in one object, or nests values deeper
// than any format here does.
inline JsonValue parse_json(std::string_view text, const std::string& source) {
    std::vector<std::set<std::string>> names;  // of the objects that are open
    const auto check_event = [&](int depth, JsonValue::parse_event_t event, JsonValue& value) {
        using Event = JsonValue::parse_event_t;
        if (event == Event::object_start || event == Event::array_start) {
            CHECK(depth < JSON_MAX_DEPTH, "%s: its JSON nests deeper than %d levels", source.c_str(), JSON_MAX_DEPTH);
        }
        if (event == Event::object_start) {
            names.emplace_back();
        } else if (event == Event::object_end) {
            names.pop_back();
        } else if (event == Event::key) {
            const std::string& name = value.get_ref<const std::string&>();
            CHECK(names.back().insert(name).second, "%s: its JSON has the name '%s' twice", source.c_str(),
                  printable(name).c_str());
        }
        return true;
    };
    try {
        return JsonValue::parse(text.begin(), text.end(), check_event);
    } catch (const JsonValue::parse_error& error) {
        CHECK(error.byte <= text.size(), "%s: is not valid JSON: it ends, after %zu bytes, before its value does",
              source.c_str(), text.size());
        fail("%s: is not valid JSON at byte %zu of %zu", source.c_str(), error.byte, text.size());
    } catch (const JsonValue::exception&) {
        fail("%s: its JSON has a number that is out of range", source.c_str());
    }
}

// The whole of a small text file. Throws Error when it is no regular file, cannot be read or is larger than any file of
// its kind.
inline std::string read_text_file(const std::string& path) {
    constexpr uint64_t MAX_BYTES = (uint64_t)100 << 20;
    RegularFile file(path);
    CHECK(file.num_bytes() <= MAX_BYTES, "%s: is not a text file of at most 100 MiB", path.c_str());
    std::string text((size_t)file.num_bytes(), '\0');
    size_t length = 0;
    while (const size_t num_bytes = file.read(text.data() + length, text.size() - length)) {
        length += num_bytes;
    }
    text.resize(length);
    return text;
}

// The values of one JSON object by name. A value that is null counts as absent, as in Hugging Face files. All functions
// throw Error, naming `where` and the entry, for a value of the wrong kind or out of range.
class JsonObject {
  public:
    JsonObject(const JsonValue& object, std::string where) : object_(object), where_(std::move(where)) {
        CHECK(object.is_object(), "%s: must hold a JSON object, {...}", where_.c_str());
    }

    const std::string& where() const { return where_; }
    bool has(const char* name) const { return object_.contains(name) && !object_.at(name).is_null(); }

    const JsonValue& at(const char* name) const {
        CHECK(has(name), "%s: lacks \"%s\"", where_.c_str(), name);
        return object_.at(name);
    }
    int64_t integer(const char* name, int64_t minimum, int64_t maximum) const {
        const JsonValue& value = at(name);
        const bool fits = value.is_number_integer() &&
                          !(value.is_number_unsigned() && value.get<uint64_t>() > (uint64_t)maximum) &&
                          value.get<int64_t>() >= minimum && value.get<int64_t>() <= maximum;
        CHECK(fits, "%s: \"%s\" is %s, must be a whole number from %lld to %lld", where_.c_str(), name,
              shown(value).c_str(), (long long)minimum, (long long)maximum);
        return value.get<int64_t>();
    }
    double real(const char* name) const {
        const JsonValue& value = at(name);
        CHECK(value.is_number(), "%s: \"%s\" is %s, must be a number", where_.c_str(), name, shown(value).c_str());
        return value.get<double>();
    }
    bool boolean(const char* name) const {
        const JsonValue& value = at(name);
        CHECK(value.is_boolean(), "%s: \"%s\" is %s, must be true or false", where_.c_str(), name,
              shown(value).c_str());
        return value.get<bool>();
    }
    std::string text(const char* name) const {
        const JsonValue& value = at(name);
        CHECK(value.is_string(), "%s: \"%s\" is %s, must be a text", where_.c_str(), name, shown(value).c_str());
        return value.get<std::string>();
    }
    JsonObject object(const char* name) const { return JsonObject(at(name), where_ + ": \"" + name + "\""); }

    // The same with a value for an absent entry.
    int64_t integer_or(int64_t otherwise, const char* name, int64_t minimum, int64_t maximum) const {
        return has(name) ? integer(name, minimum, maximum) : otherwise;
    }
    double real_or(double otherwise, const char* name) const { return has(name) ? real(name) : otherwise; }
    bool boolean_or(bool otherwise, const char* name) const { return has(name) ? boolean(name) : otherwise; }
    std::string text_or(const std::string& otherwise, const char* name) const {
        return has(name) ? text(name) : otherwise;
    }

    // A value as messages show it.
    static std::string shown(const JsonValue& value) {
        return printable(value.dump(-1, ' ', true, JsonValue::error_handler_t::replace));
    }

  private:
    const JsonValue& object_;
    std::string where_;
};
