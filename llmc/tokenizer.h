// tokenizer.h: text to tokens and back, for prompts and samples.
//
// Data of bytes: each byte is a token. Data of shards: whoever made them knew a tokenizer, the shards do not say which,
// so tokens are shown, and prompts given, as numbers. Reading a Hugging Face tokenizer.json (merges, pre-tokenizer
// patterns, normalisation) is left out: training does not need it, and a checkpoint here is one that Hugging Face tools
// sample from with the tokenizer beside it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "check.h"
#include "tokens.h"

class Tokenizer {
  public:
    // Of the data in `stream`, with its markers; with shards an empty prompt becomes the stream's first token, which by
    // the custom of llm.c ends a document.
    Tokenizer(const TokenStream& stream, bool byte_markers, int64_t vocab_size)
        : Tokenizer(stream.is_bytes(), byte_markers, vocab_size) {
        stream.read(0, 1, &first_token_.emplace());
    }
    // Without data.
    Tokenizer(bool is_bytes, bool byte_markers, int64_t vocab_size)
        : is_bytes_(is_bytes), has_markers_(is_bytes && byte_markers), vocab_size_(vocab_size) {}

    // What a sample goes on from: at least one token. Throws Error for a prompt that is not in the vocabulary.
    std::vector<int32_t> encode_prompt(const std::string& prompt) const {
        std::vector<int32_t> tokens;
        if (is_bytes_) {
            if (has_markers_) {
                tokens.push_back(BEGIN_MARKER);
            }
            for (const unsigned char byte : prompt) {
                CHECK(byte < vocab_size_, "--sample_prompt: has the byte %d, and --vocab_size is %lld", (int)byte,
                      (long long)vocab_size_);
                tokens.push_back(byte);
            }
        } else {
            std::istringstream words(prompt);
            for (std::string word; words >> word;) {
                char* end;
                const long long token = std::strtoll(word.c_str(), &end, 10);
                CHECK(*end == '\0' && token >= 0 && token < vocab_size_,
                      "--sample_prompt: '%s' must be a token number from 0 to %lld: tokens are not bytes here, and how "
                      "text becomes such tokens is not known",
                      word.c_str(), (long long)vocab_size_ - 1);
                tokens.push_back((int32_t)token);
            }
        }
        if (tokens.empty()) {
            CHECK(first_token_, "--sample_prompt: is empty, and without data nothing says what a text begins with");
            tokens.push_back(*first_token_);
        }
        return tokens;
    }

    // Whether a sample ends with this token.
    bool ends_text(int32_t token) const { return has_markers_ && token == END_MARKER; }

    // The text of tokens; what is no byte shows as <number>, markers not at all.
    std::string decode(const std::vector<int32_t>& tokens) const {
        std::string text;
        for (const int32_t token : tokens) {
            if (!is_bytes_) {
                text += (text.empty() ? "" : " ") + std::to_string(token);
            } else if (token < 256) {
                text += (char)token;
            } else if (!has_markers_ || token > END_MARKER) {
                text += "<" + std::to_string(token) + ">";
            }
        }
        return text;
    }

  private:
    bool is_bytes_, has_markers_;
    int64_t vocab_size_;
    std::optional<int32_t> first_token_;  // of the data
};

// Bytes of the UTF-8 character that begins at text[at]; 0 where none does, cut short or in disguise included.
inline size_t utf8_length(const std::string& text, size_t at) {
    const unsigned char first = text[at];
    const size_t length = first < 0x80                    ? 1
                          : first >= 0xc2 && first < 0xe0 ? 2
                          : first >= 0xe0 && first < 0xf0 ? 3
                          : first >= 0xf0 && first < 0xf5 ? 4
                                                          : 0;
    if (at + length > text.size()) {
        return 0;
    }
    for (size_t i = 1; i < length; ++i) {
        if (((unsigned char)text[at + i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    // Written longer than it is, half of a surrogate pair, or beyond U+10FFFF.
    const unsigned char second = length > 2 ? text[at + 1] : 0;
    const bool in_disguise = (first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f) ||
                             (first == 0xf0 && second < 0x90) || (first == 0xf4 && second > 0x8f);
    return in_disguise ? 0 : length;
}

// `text` with its control characters, other than line ends and tabs, and what is not UTF-8 written as \x1b: a sample
// cannot command the terminal.
inline std::string terminal_safe(const std::string& text) {
    std::string result;
    for (size_t at = 0; at < text.size();) {
        const unsigned char c = text[at];
        const size_t length = utf8_length(text, at), num_bytes = std::max<size_t>(length, 1);
        const bool is_c1 = length == 2 && c == 0xc2 && (unsigned char)text[at + 1] < 0xa0;  // U+0080 to U+009F
        const bool is_control = (c < 0x20 && c != '\n' && c != '\t') || c == 0x7f || is_c1;
        for (size_t i = 0; i < num_bytes; ++i) {
            const bool escaped = length == 0 || is_control;
            result += escaped ? format_string("\\x%02x", (unsigned char)text[at + i]) : std::string(1, text[at + i]);
        }
        at += num_bytes;
    }
    return result;
}
