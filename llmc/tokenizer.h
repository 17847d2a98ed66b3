// tokenizer.h: text to tokens and back, for prompts and samples.
//
// Data of bytes: each byte is a token. Data of shards: whoever made them knew a tokenizer, the shards do not say which,
// so tokens are shown, and prompts given, as numbers. Reading a Hugging Face tokenizer.json (merges, pre-tokenizer
// patterns, normalisation) is left out: training does not need it, and a checkpoint here is one that Hugging Face tools
// sample from with the tokenizer beside it.
#pragma once
#include <cstdint>
#include <cstdlib>
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
        : is_bytes_(stream.is_bytes()), has_markers_(is_bytes_ && byte_markers), vocab_size_(vocab_size) {
        stream.read(0, 1, &first_token_);
    }

    // What a sample goes on from: at least one token. Throws Error for a prompt that is not in the vocabulary.
    std::vector<int32_t> encode_prompt(const std::string& prompt) const {
        std::vector<int32_t> tokens;
        if (is_bytes_) {
            if (has_markers_) {
                tokens.push_back(BEGIN_MARKER);
            }
            for (const unsigned char byte : prompt) {
                tokens.push_back(byte);
            }
        } else {
            std::istringstream words(prompt);
            for (std::string word; words >> word;) {
                char* end;
                const long long token = std::strtoll(word.c_str(), &end, 10);
                CHECK(*end == '\0' && token >= 0 && token < vocab_size_,
                      "--sample_prompt: '%s' must be a token number from 0 to %lld: the data are token shards, which "
                      "do not "
                      "say how text becomes tokens",
                      word.c_str(), (long long)vocab_size_ - 1);
                tokens.push_back((int32_t)token);
            }
        }
        if (tokens.empty()) {
            tokens.push_back(first_token_);
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
    int32_t first_token_ = 0;
};

// `text` with its control characters, other than line ends and tabs, written as \x1b: a sample cannot command the
// terminal.
inline std::string terminal_safe(const std::string& text) {
    std::string result;
    for (const unsigned char c : text) {
        const bool is_control = (c < 0x20 && c != '\n' && c != '\t') || c == 0x7f;
        result += is_control ? format_string("\\x%02x", c) : std::string(1, (char)c);
    }
    return result;
}
