// hf_tokenizer.h: the tokenizer of byte vocabularies as Hugging Face's tokenizer.json, and as the tokenizer.model that
// llama.cpp's converter wants: a byte is the token of its number, 256 and 257 begin and end a text. So tools that
// sample from a checkpoint need nothing beside it.
#pragma once
#include <cstdint>
#include <string>
#include <utility>

#include "check.h"
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

// Protocol buffers on the wire (protobuf.dev/programming-guides/encoding): a message is its fields one after another; a
// field is the varint of 8 x its number + its kind, then the value. Kind 0 is a varint: 7 bits a byte, the lowest
// first, the top bit set in all but the last; negative numbers as 64 bits. Kind 2 is a length and as many bytes: text,
// or a message.
inline std::string varint(uint64_t value) {
    std::string bytes;
    for (; value >= 0x80; value >>= 7) {
        bytes += (char)(value | 0x80);
    }
    return bytes + (char)value;
}
inline std::string number_field(int field, int64_t value) { return varint(field << 3) + varint((uint64_t)value); }
inline std::string bytes_field(int field, const std::string& value) {
    return varint(field << 3 | 2) + varint(value.size()) + value;
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

// tokenizer.model: the same tokens as a SentencePiece model without merges; the numbers of fields and types are those
// of its sentencepiece_model.proto. It is for llama.cpp, whose converter knows a tokenizer.json only by a hash of what
// it makes of one text, but takes any tokenizer.model; transformers prefers tokenizer.json.
//
// SentencePiece and llama.cpp write a space as U+2581 before they look it up, so that is the piece of token 32 (a
// U+2581 in a text becomes a space, then). But SentencePiece also wants a piece for each of the 256 bytes and one for
// what is unknown: no text leads to these last two, so they stand behind the tokens, where the converter leaves them
// out. Without markers llama.cpp ends a text by its default, token 2, which no file here can take away.
inline std::string byte_sentencepiece_model(bool markers) {
    using namespace hf_tokenizer;
    enum ModelField { PIECES = 1, TRAINER_SPEC = 2, NORMALIZER_SPEC = 3 };
    enum PieceField { PIECE = 1, TYPE = 3 };
    enum PieceType { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, BYTE = 6 };
    enum TrainerField {
        MODEL_TYPE = 3,
        VOCAB_SIZE = 4,
        BYTE_FALLBACK = 35,
        UNK_ID = 40,
        BOS_ID = 41,
        EOS_ID = 42,
        BOS_PIECE = 46,
        EOS_PIECE = 47
    };
    enum NormalizerField { NAME = 1, ADD_DUMMY_PREFIX = 3, REMOVE_EXTRA_WHITESPACES = 4 };
    constexpr int BPE = 2, NONE = -1;
    std::string pieces;
    int num_pieces = 0;
    const auto add_piece = [&](const std::string& text, PieceType type) {
        pieces += bytes_field(PIECES, bytes_field(PIECE, text) + number_field(TYPE, type));
        ++num_pieces;
    };
    const auto byte_text = [](int byte) { return format_string("<0x%02X>", byte); };
    for (int byte = 0; byte < 256; ++byte) {
        if (byte == ' ') {
            add_piece("\xe2\x96\x81", NORMAL);
        } else {
            add_piece(byte_text(byte), BYTE);
        }
    }
    if (markers) {
        add_piece(BEGIN_TEXT, CONTROL);
        add_piece(END_TEXT, CONTROL);
    }
    add_piece(byte_text(' '), BYTE);
    add_piece("<unk>", UNKNOWN);

    std::string trainer = number_field(MODEL_TYPE, BPE) + number_field(VOCAB_SIZE, num_pieces) +
                          number_field(BYTE_FALLBACK, true) + number_field(UNK_ID, num_pieces - 1) +
                          number_field(BOS_ID, markers ? BEGIN_MARKER : NONE) +
                          number_field(EOS_ID, markers ? END_MARKER : NONE);
    if (markers) {
        trainer += bytes_field(BOS_PIECE, BEGIN_TEXT) + bytes_field(EOS_PIECE, END_TEXT);
    }
    const std::string normalizer = bytes_field(NAME, "identity") + number_field(ADD_DUMMY_PREFIX, false) +
                                   number_field(REMOVE_EXTRA_WHITESPACES, false);
    return pieces + bytes_field(TRAINER_SPEC, trainer) + bytes_field(NORMALIZER_SPEC, normalizer);
}

// The tokenizer_config.json beside them. max_positions: tokens. add_prefix_space and add_bos_token are for llama.cpp,
// which otherwise begins every text with a space and, where nothing names a first token, with token 1.
inline Json byte_tokenizer_config_json(bool markers, int64_t max_positions) {
    Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                   {"add_prefix_space", false},
                   {"add_bos_token", markers},
                   {"clean_up_tokenization_spaces", false},
                   {"model_input_names", Json::array({Json("input_ids"), Json("attention_mask")})},
                   {"model_max_length", max_positions}};
    if (markers) {
        config["bos_token"] = hf_tokenizer::BEGIN_TEXT;
        config["eos_token"] = hf_tokenizer::END_TEXT;
    }
    return config;
}
