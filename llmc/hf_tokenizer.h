// hf_tokenizer.h: the tokenizer of byte vocabularies as Hugging Face's tokenizer.json: a byte is the token of its
// number, 256 and 257 begin and end a text. So tools that sample from a checkpoint need nothing beside it.
#pragma once
#include <string>
#include <utility>

#include "json.h"
#include "tokens.h"  // the markers

namespace hf_tokenizer {

// The markers as text.
constexpr const char* BEGIN_TEXT = "<|begin|>";
constexpr const char* END_TEXT = "<|end|>";

// The character that byte-level tokenizers show a byte as, in UTF-8: printable ones of Latin-1 as they are, the others
// in their order from U+0100 on (openai/gpt-2, src/encoder.py, bytes_to_unicode).
inline std::string byte_character(int byte) {
    const auto is_shown = [](int b) { return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174; };
    int code = byte;
    if (!is_shown(byte)) {
        code = 256;
        for (int b = 0; b < byte; ++b) {
            code += !is_shown(b);
        }
    }
    if (code < 0x80) {
        return std::string(1, (char)code);
    }
    return {(char)(0xc0 | code >> 6), (char)(0x80 | (code & 0x3f))};
}

}  // namespace hf_tokenizer

// tokenizer.json of bytes; with markers, 256 is put before every text. A byte-level BPE without merges.
inline Json byte_tokenizer_json(bool markers) {
    using namespace hf_tokenizer;
    Json vocabulary = Json::object();
    for (int byte = 0; byte < 256; ++byte) {
        vocabulary[byte_character(byte)] = byte;
    }
    const Json byte_level = {
        {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", false}, {"use_regex", false}};
    Json added = Json::array();
    Json begin_each_text = nullptr;
    if (markers) {
        for (const auto& [id, text] : {std::pair(BEGIN_MARKER, BEGIN_TEXT), std::pair(END_MARKER, END_TEXT)}) {
            added.push_back({{"id", id},
                             {"content", text},
                             {"single_word", false},
                             {"lstrip", false},
                             {"rstrip", false},
                             {"normalized", false},
                             {"special", true}});
        }
        const auto piece = [](const char* kind, const char* id, int type) {
            return Json({{kind, {{"id", id}, {"type_id", type}}}});
        };
        const Json begin = piece("SpecialToken", BEGIN_TEXT, 0);
        const Json token = {
            {"id", BEGIN_TEXT}, {"ids", Json::array({BEGIN_MARKER})}, {"tokens", Json::array({Json(BEGIN_TEXT)})}};
        begin_each_text = {{"type", "TemplateProcessing"},
                           {"single", Json::array({begin, piece("Sequence", "A", 0)})},
                           {"pair", Json::array({begin, piece("Sequence", "A", 0), piece("Sequence", "B", 1)})},
                           {"special_tokens", {{BEGIN_TEXT, token}}}};
    }
    return {{"version", "1.0"},
            {"truncation", nullptr},
            {"padding", nullptr},
            {"added_tokens", added},
            {"normalizer", nullptr},
            {"pre_tokenizer", byte_level},
            {"post_processor", begin_each_text},
            {"decoder", byte_level},
            {"model",
             {{"type", "BPE"},
              {"dropout", nullptr},
              {"unk_token", nullptr},
              {"continuing_subword_prefix", nullptr},
              {"end_of_word_suffix", nullptr},
              {"fuse_unk", false},
              {"byte_fallback", false},
              {"vocab", vocabulary},
              {"merges", Json::array()}}}};
}

// The tokenizer_config.json beside it. max_positions: tokens.
inline Json byte_tokenizer_config_json(bool markers, int64_t max_positions) {
    Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                   {"clean_up_tokenization_spaces", false},
                   {"model_input_names", Json::array({Json("input_ids"), Json("attention_mask")})},
                   {"model_max_length", max_positions}};
    if (markers) {
        config["bos_token"] = hf_tokenizer::BEGIN_TEXT;
        config["eos_token"] = hf_tokenizer::END_TEXT;
    }
    return config;
}
