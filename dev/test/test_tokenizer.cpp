// test_tokenizer.cpp: prompts to tokens and tokens to text, for bytes and for shards; what reaches the terminal.
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>

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
