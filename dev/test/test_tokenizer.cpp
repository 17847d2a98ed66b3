// test_tokenizer.cpp: prompts to tokens and tokens to text, for bytes and for shards; the tokenizer.model of bytes;
// what reaches the terminal.
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>

#include "llmc/hf_tokenizer.h"
#include "llmc/json.h"
#include "llmc/tokenizer.h"

namespace {

class TokenizerTest : public testing::Test {
  protected:
    void SetUp() override {
        ASSERT_NE(mkdtemp(folder_.data()), nullptr);
        std::ofstream(folder_ + "/text", std::ios::binary) << "Zebra";
        std::vector<uint32_t> shard(256, 0);
        shard[0] = 20240801, shard[1] = 7, shard[2] = 2;
        shard.push_back(50256), shard.push_back(3);
        std::ofstream(folder_ + "/shard", std::ios::binary)
            .write((const char*)shard.data(), (std::streamsize)shard.size() * 4);
    }
    void TearDown() override { EXPECT_EQ(std::system(("rm -rf '" + folder_ + "'").c_str()), 0); }

    Tokenizer tokenizer(const std::string& file, bool markers) const {
        return Tokenizer(TokenStream("--train_data", {folder_ + "/" + file}, DataFormat::automatic, markers, 50257),
                         markers, 50257);
    }

    std::string folder_ = testing::TempDir() + "llmc_tokenizer_XXXXXX";
};

using Ids = std::vector<int32_t>;

// A field of a protocol buffer: a number, or bytes.
struct Field {
    int id;
    int64_t number;
    std::string bytes;
    bool operator==(const Field& other) const {
        return id == other.id && number == other.number && bytes == other.bytes;
    }
};
std::vector<Field> parse_message(const std::string& message) {
    size_t at = 0;
    const auto varint = [&] {
        uint64_t value = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            const unsigned char byte = message.at(at++);
            value |= (uint64_t)(byte & 0x7f) << shift;
            if (byte < 0x80) {
                break;
            }
        }
        return value;
    };
    std::vector<Field> fields;
    while (at < message.size()) {
        const uint64_t tag = varint(), value = varint();
        EXPECT_TRUE(tag % 8 == 0 || tag % 8 == 2) << tag;
        if (tag % 8 == 0) {
            fields.push_back({(int)(tag / 8), (int64_t)value, ""});
        } else {
            EXPECT_LE(value, message.size() - at);
            fields.push_back({(int)(tag / 8), 0, message.substr(at, value)});
            at += value;
        }
    }
    return fields;
}

}  // namespace

TEST_F(TokenizerTest, BytesWithMarkers) {
    const Tokenizer t = tokenizer("text", true);
    EXPECT_EQ(t.encode_prompt("a\xc3\xa9"), (Ids{256, 'a', 0xc3, 0xa9}));
    EXPECT_EQ(t.encode_prompt(""), (Ids{256}));
    EXPECT_EQ(t.decode({256, 'a', 0xc3, 0xa9, 0, 257, 300}), std::string("a\xc3\xa9\0<300>", 9));
    EXPECT_TRUE(t.ends_text(257));
    EXPECT_FALSE(t.ends_text(256) || t.ends_text('a'));
}

TEST_F(TokenizerTest, BytesWithoutMarkers) {
    const Tokenizer t = tokenizer("text", false);
    EXPECT_EQ(t.encode_prompt("ab"), (Ids{'a', 'b'}));
    EXPECT_EQ(t.encode_prompt(""), (Ids{'Z'})) << "what the data begin with";
    EXPECT_EQ(t.decode({'a', 257}), "a<257>");
    EXPECT_FALSE(t.ends_text(257));
}

TEST_F(TokenizerTest, WithoutDataAnEmptyPromptNeedsAMarker) {
    EXPECT_EQ(Tokenizer(true, true, 258).encode_prompt(""), (Ids{256}));
    EXPECT_EQ(Tokenizer(true, false, 256).encode_prompt("a"), (Ids{'a'}));
    EXPECT_THROW(Tokenizer(true, false, 256).encode_prompt(""), Error);
    EXPECT_EQ(Tokenizer(true, false, 98).encode_prompt("a"), (Ids{'a'}));
    EXPECT_THROW(Tokenizer(true, false, 97).encode_prompt("a"), Error) << "not in the vocabulary";
    EXPECT_THROW(Tokenizer(false, true, 258).encode_prompt(""), Error);
}

TEST_F(TokenizerTest, ShardsAreNumbers) {
    const Tokenizer t = tokenizer("shard", true);
    EXPECT_EQ(t.encode_prompt(" 464\t3290\n0 "), (Ids{464, 3290, 0}));
    EXPECT_EQ(t.encode_prompt(""), (Ids{50256})) << "what the data begin with";
    EXPECT_EQ(t.decode({50256, 7, 257}), "50256 7 257");
    EXPECT_FALSE(t.ends_text(257));
    for (const char* prompt : {"The", "1 x", "-1", "50257", "99999999999999999999", "1.5", "7x"}) {
        EXPECT_THROW(t.encode_prompt(prompt), Error) << prompt;
    }
}

// As sentencepiece_model.proto numbers them.
TEST_F(TokenizerTest, SentencePieceModelOfBytes) {
    constexpr int NORMAL = 1, UNKNOWN = 2, CONTROL = 3, BYTE = 6;
    for (const bool markers : {false, true}) {
        const std::string model = byte_sentencepiece_model(markers);
        EXPECT_EQ(model.substr(0, 12), "\x0a\x0a\x0a\x06<0x00>\x18\x06") << "a piece, byte by byte";
        const std::vector<Field> fields = parse_message(model);
        const int V = markers ? 258 : 256;
        ASSERT_EQ(fields.size(), V + 4u) << "two pieces more than tokens, and two messages";
        const auto expect_piece = [&](int id, const std::string& text, int kind) {
            EXPECT_EQ(fields[id].id, 1);
            EXPECT_EQ(parse_message(fields[id].bytes), (std::vector<Field>{{1, 0, text}, {3, kind, ""}})) << id;
        };
        for (int byte = 0; byte < 256; ++byte) {
            expect_piece(byte, byte == ' ' ? "\u2581" : format_string("<0x%02X>", byte), byte == ' ' ? NORMAL : BYTE);
        }
        if (markers) {
            expect_piece(256, "<|begin|>", CONTROL);
            expect_piece(257, "<|end|>", CONTROL);
        }
        expect_piece(V, "<0x20>", BYTE);
        expect_piece(V + 1, "<unk>", UNKNOWN);

        EXPECT_EQ(fields[V + 2].id, 2);
        std::vector<Field> trainer = {{3, 2, ""},      {4, V + 2, ""}, {35, 1, ""},
                                      {40, V + 1, ""}, {41, -1, ""},   {42, -1, ""}};
        if (markers) {
            trainer[4].number = 256, trainer[5].number = 257;
            trainer.push_back({46, 0, "<|begin|>"}), trainer.push_back({47, 0, "<|end|>"});
        }
        EXPECT_EQ(parse_message(fields[V + 2].bytes), trainer);
        EXPECT_EQ(fields[V + 3].id, 3);
        EXPECT_EQ(parse_message(fields[V + 3].bytes), (std::vector<Field>{{1, 0, "identity"}, {3, 0, ""}, {4, 0, ""}}))
            << "no space is added or removed";
    }
}

TEST_F(TokenizerTest, TextCannotCommandTheTerminal) {
    EXPECT_EQ(terminal_safe("a\tb\n\x1b[2J\r\x7f\xc3\xa9" + std::string(1, '\0')),
              "a\tb\n\\x1b[2J\\x0d\\x7f\xc3\xa9\\x00");
    EXPECT_EQ(terminal_safe("\xc2\x9b"
                            "2J\x9b"
                            "\xe2\x82\xac\xe2\x82\xf0\x9f\x98\x80\xc0\xaf\xc2"),
              "\\xc2\\x9b2J\\x9b\xe2\x82\xac\\xe2\\x82\xf0\x9f\x98\x80\\xc0\\xaf\\xc2")
        << "controls of two bytes, and bytes that are no character";
    EXPECT_EQ(terminal_safe("\xe0\x80\x9b\xf0\x80\x80\x9b\xed\xa0\x80\xf4\x90\x80\x80\xf4\x8f\xbf\xbf"),
              "\\xe0\\x80\\x9b\\xf0\\x80\\x80\\x9b\\xed\\xa0\\x80\\xf4\\x90\\x80\\x80\xf4\x8f\xbf\xbf")
        << "written longer than they are, half of a pair, and beyond the last";
    EXPECT_EQ(printable("a\n\xc2\x9b\xc3\xa9\xc2"
                        "z"),
              "a??\xc3\xa9\xc2z")
        << "names in messages";
}
