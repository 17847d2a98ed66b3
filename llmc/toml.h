// toml.h: settings files. The part of TOML (toml.io, 1.0) that a flat list of settings needs: `name = value` lines with
// strings in either quotes, integers, decimals, true and false, arrays of those, and comments. Sections, dates and
// tables are refused, as is everything else, by line number. (CLI11's own reader cuts strings at '#' and ','.)
#pragma once
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "check.h"

struct TomlEntry {
    std::string name;
    std::vector<std::string> values;  // one, or the elements of an array; strings without quotes, numbers as written
    int line = 0;                     // of the file, from 1
};

class TomlReader {
  public:
    // `source` names the text in errors.
    TomlReader(std::string text, std::string source) : text_(std::move(text)), source_(std::move(source)) {}

    // All entries in order. Throws Error for what is not in the subset above and for a name given twice.
    std::vector<TomlEntry> read() {
        std::vector<TomlEntry> entries;
        while (skip_blank(true), at_ < text_.size()) {
            TomlEntry entry;
            entry.line = line_;
            entry.name = read_name();
            skip_blank(false);
            check(next() == '=', "expected '=' after the name '" + entry.name + "'");
            ++at_;
            skip_blank(false);
            if (next() == '[') {
                read_array(entry.values);
            } else {
                entry.values.push_back(read_value());
            }
            skip_blank(false);
            check(at_ == text_.size() || next() == '\n', "expected the end of the line after the value of '" +
                                                             entry.name + "' (a string needs quotes around it)");
            for (const TomlEntry& earlier : entries) {
                check(earlier.name != entry.name,
                      "'" + entry.name + "' is already set in line " + std::to_string(earlier.line));
            }
            entries.push_back(std::move(entry));
        }
        return entries;
    }

  private:
    char next() const { return at_ < text_.size() ? text_[at_] : '\0'; }
    void check(bool condition, const std::string& what) const {
        CHECK(condition, "%s line %d: %s", source_.c_str(), line_, what.c_str());
    }

    // Spaces and comments, and with `lines` also line ends.
    void skip_blank(bool lines) {
        while (at_ < text_.size()) {
            const char c = text_[at_];
            if (c == '#') {
                while (at_ < text_.size() && text_[at_] != '\n') {
                    ++at_;
                }
            } else if (c == '\n' && lines) {
                ++line_, ++at_;
            } else if (c == ' ' || c == '\t' || c == '\r') {
                ++at_;
            } else {
                return;
            }
        }
    }

    static bool is_bare(char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
               c == '+' || c == '.';
    }
    std::string read_bare() {
        const size_t begin = at_;
        while (is_bare(next())) {
            ++at_;
        }
        return text_.substr(begin, at_ - begin);
    }
    std::string read_name() {
        check(next() != '[', "sections are not used here: write 'name = value' lines only");
        const std::string name = read_bare();
        check(!name.empty(), "expected a setting, 'name = value'");
        return name;
    }

    void read_array(std::vector<std::string>& values) {
        ++at_;  // [
        while (skip_blank(true), next() != ']') {
            check(at_ < text_.size(), "the array has no closing ']'");
            values.push_back(read_value());
            skip_blank(true);
            check(next() == ',' || next() == ']', "expected ',' or ']' in the array");
            if (next() == ',') {
                ++at_;
            }
        }
        ++at_;  // ]
    }

    std::string read_value() {
        if (next() == '"' || next() == '\'') {
            return read_string();
        }
        const std::string value = read_bare();
        const bool is_number =
            !value.empty() && (value[0] == '-' || value[0] == '+' || (value[0] >= '0' && value[0] <= '9'));
        check(is_number || value == "true" || value == "false",
              "expected a number, true, false, or a string in quotes" + (value.empty() ? "" : ", not " + value));
        return value;
    }

    // "..." with escapes, or '...' as it stands.
    std::string read_string() {
        const char quote = text_[at_++];
        std::string value;
        while (next() != quote) {
            check(at_ < text_.size() && next() != '\n', "the string has no closing quote");
            if (quote == '"' && next() == '\\') {
                ++at_;
                read_escape(value);
            } else {
                value += text_[at_++];
            }
        }
        ++at_;
        return value;
    }
    void read_escape(std::string& value) {
        const char c = next();
        ++at_;
        switch (c) {
            case 'n':
                value += '\n';
                return;
            case 't':
                value += '\t';
                return;
            case 'r':
                value += '\r';
                return;
            case 'b':
                value += '\b';
                return;
            case 'f':
                value += '\f';
                return;
            case '"':
                value += '"';
                return;
            case '\\':
                value += '\\';
                return;
            case 'u':
                append_code_point(value, 4);
                return;
            case 'U':
                append_code_point(value, 8);
                return;
            default:
                check(false, "the string has an unknown escape; write \\\\ for a backslash");
        }
    }
    // \uXXXX or \UXXXXXXXX as UTF-8.
    void append_code_point(std::string& value, int num_digits) {
        uint32_t code = 0;
        for (int i = 0; i < num_digits; ++i) {
            const char c = next();
            const int digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            check(digit >= 0, "the string has an incomplete \\u escape");
            code = code * 16 + (uint32_t)digit;
            ++at_;
        }
        check(code <= 0x10ffff && (code < 0xd800 || code > 0xdfff),
              "the string has an escape that is no Unicode character");
        if (code < 0x80) {
            value += (char)code;
        } else if (code < 0x800) {
            value += (char)(0xc0 | code >> 6);
            value += (char)(0x80 | (code & 0x3f));
        } else if (code < 0x10000) {
            value += (char)(0xe0 | code >> 12);
            value += (char)(0x80 | (code >> 6 & 0x3f));
            value += (char)(0x80 | (code & 0x3f));
        } else {
            value += (char)(0xf0 | code >> 18);
            value += (char)(0x80 | (code >> 12 & 0x3f));
            value += (char)(0x80 | (code >> 6 & 0x3f));
            value += (char)(0x80 | (code & 0x3f));
        }
    }

    std::string text_, source_;
    size_t at_ = 0;
    int line_ = 1;
};

// The entries of a settings file. Throws Error when it cannot be read or is not in the subset above.
inline std::vector<TomlEntry> read_toml(const std::string& path) {
    errno = 0;
    std::ifstream file(path, std::ios::binary);
    CHECK(file.good(), "%s: cannot open this settings file: %s", path.c_str(), std::strerror(errno));
    constexpr size_t MAX_BYTES = (size_t)16 << 20;  // devices never end
    std::string all(MAX_BYTES + 1, '\0');
    file.read(all.data(), (std::streamsize)all.size());  // an empty file gives no settings
    all.resize((size_t)file.gcount());
    CHECK(!file.bad(), "%s: cannot read this settings file", path.c_str());
    CHECK(all.size() <= MAX_BYTES, "%s: is not a settings file of at most 16 MiB", path.c_str());
    const std::string mark = "\xef\xbb\xbf";  // of UTF-8, as some editors write it
    return TomlReader(all.compare(0, mark.size(), mark) == 0 ? all.substr(mark.size()) : all, path).read();
}

// A TOML string literal with this value.
inline std::string toml_quote(const std::string& value) {
    std::string quoted = "\"";
    for (const char c : value) {
        if (c == '"' || c == '\\') {
            quoted += '\\';
            quoted += c;
        } else if (c == '\n') {
            quoted += "\\n";
        } else if ((unsigned char)c < 0x20 || c == 0x7f) {
            quoted += format_string("\\u%04x", c);
        } else {
            quoted += c;
        }
    }
    return quoted + '"';
}
