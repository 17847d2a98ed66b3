// test_tokens.cpp: files, shards and patterns as one stream; what is refused; sequences, their order, the split.
#include <gtest/gtest.h>

#include <cstdlib>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <unistd.h>

#include "llmc/tokens.h"
#include "token_shards.h"

namespace {

class Tokens : public testing::Test {
  protected:
    void SetUp() override { ASSERT_NE(mkdtemp(folder_.data()), nullptr); }
    void TearDown() override { EXPECT_EQ(std::system(("rm -rf '" + folder_ + "'").c_str()), 0); }

    std::string write(const std::string& name, const std::string& bytes) const {
        std::ofstream(folder_ + "/" + name, std::ios::binary) << bytes;
        return folder_ + "/" + name;
    }
    std::string write_u16(const std::string& name, const std::vector<uint32_t>& tokens) const {
        return write(name, shard_bytes(20240520, 1, (uint32_t)tokens.size(), tokens));
    }
    std::string write_u32(const std::string& name, const std::vector<uint32_t>& tokens) const {
        return write(name, shard_bytes(20240801, 7, (uint32_t)tokens.size(), tokens));
    }
    // A file of `size` bytes that takes no room on the disk: zeros, but for `bytes` at `offset`.
    std::string write_sparse(const std::string& name, int64_t size, const std::map<int64_t, std::string>& parts) const {
        const std::string path = folder_ + "/" + name;
        const int file = open(path.c_str(), O_CREAT | O_WRONLY, 0600);
        EXPECT_EQ(ftruncate(file, size), 0);
        for (const auto& [offset, bytes] : parts) {
            EXPECT_EQ(pwrite(file, bytes.data(), bytes.size(), offset), (ssize_t)bytes.size());
        }
        close(file);
        return path;
    }

    static TokenStream stream(const std::vector<std::string>& patterns, bool markers = true, int64_t vocab_size = 70000,
                              DataFormat format = DataFormat::automatic) {
        return TokenStream("--train_data", patterns, format, markers, vocab_size);
    }
    static std::vector<int32_t> read(const TokenStream& s, int64_t begin, int64_t count) {
        std::vector<int32_t> tokens(count + 2, -7);
        s.read(begin, count, tokens.data() + 1);
        EXPECT_EQ(tokens.front(), -7);
        EXPECT_EQ(tokens.back(), -7) << "written outside";
        return std::vector<int32_t>(tokens.begin() + 1, tokens.end() - 1);
    }
    static std::vector<int32_t> read_all(const TokenStream& s) { return read(s, 0, s.num_tokens()); }
    static std::string error(const std::function<void()>& f) {
        try {
            f();
        } catch (const Error& e) {
            return e.what();
        }
        ADD_FAILURE() << "nothing was refused";
        return "";
    }
    // The sentence that refuses these files has every one of `words`.
    void expect_refused(const std::vector<std::string>& patterns, const std::vector<std::string>& words,
                        DataFormat format = DataFormat::automatic, int64_t vocab_size = 70000) const {
        const std::string what = error([&] { read_all(stream(patterns, true, vocab_size, format)); });
        for (const std::string& word : words) {
            EXPECT_NE(what.find(word), std::string::npos) << "'" << what << "' lacks '" << word << "'";
        }
    }

    std::string folder_ = testing::TempDir() + "llmc_tokens_XXXXXX";
};

using Ids = std::vector<int32_t>;

}  // namespace

TEST_F(Tokens, BytesWithAndWithoutMarkers) {
    const std::string a = write("a", "hi"), b = write("b", std::string("\0\xff", 2));
    EXPECT_EQ(read_all(stream({a, b})), (Ids{256, 'h', 'i', 257, 256, 0, 255, 257}));
    EXPECT_EQ(read_all(stream({a, b}, false, 256)), (Ids{'h', 'i', 0, 255}));
    EXPECT_TRUE(stream({a}).is_bytes());
    EXPECT_EQ(stream({a, b}).description(), "2 files of bytes");
}

TEST_F(Tokens, ShardsOfBothKindsAreOneStream) {
    const std::string u16 = write_u16("u16", {0, 65535, 7}), u32 = write_u32("u32", {69999, 1});
    const TokenStream s = stream({u16, u32, u16});
    EXPECT_EQ(read_all(s), (Ids{0, 65535, 7, 69999, 1, 0, 65535, 7}));
    EXPECT_FALSE(s.is_bytes());
    EXPECT_EQ(s.description(), "3 token shards");
}

TEST_F(Tokens, FormatCanBeForced) {
    const std::string shard = write_u16("shard", {5, 6}), text = write("text", "plain text, longer than a header? no");
    EXPECT_EQ(stream({shard}, false, 256, DataFormat::bytes).num_tokens(), 1028);
    EXPECT_EQ(read_all(stream({shard}, true, 70000, DataFormat::shards)), (Ids{5, 6}));
    expect_refused({text}, {text, "20240520", "20240801"}, DataFormat::shards);
}

// Every range of a stream of small files, some of one token, is the same part of the whole.
TEST_F(Tokens, EveryRangeAcrossFiles) {
    std::mt19937 generator(std::random_device{}());
    for (const bool bytes : {true, false}) {
        std::vector<std::string> paths;
        for (int i = 0; i < 9; ++i) {
            const std::string name = (bytes ? "b" : "s") + std::to_string(i);
            std::vector<uint32_t> tokens(1 + generator() % 4);
            std::string text;
            for (uint32_t& token : tokens) {
                token = generator() % 60000;
                text += (char)token;
            }
            paths.push_back(bytes ? write(name, text) : i % 2 ? write_u16(name, tokens) : write_u32(name, tokens));
        }
        for (const bool markers : {true, false}) {
            const TokenStream s = stream(paths, markers);
            const Ids all = read_all(s);
            for (int64_t begin = 0; begin <= s.num_tokens(); ++begin) {
                for (int64_t end = begin; end <= s.num_tokens(); ++end) {
                    ASSERT_EQ(read(s, begin, end - begin), Ids(all.begin() + begin, all.begin() + end));
                }
            }
        }
    }
}

TEST_F(Tokens, PatternsAreSortedAndKeepTheirOrder) {
    write("b2.txt", "2"), write("b10.txt", "3"), write("a.txt", "1"), write("c.text", "4"),
        write("[odd] name*.txt", "5");
    std::filesystem::create_directory(folder_ + "/sub");
    write("sub/d.txt", "6");
    EXPECT_EQ(read_all(stream({folder_ + "/[ab]*.txt", folder_ + "/c.text"}, false)), (Ids{'1', '3', '2', '4'}));
    EXPECT_EQ(read_all(stream({folder_ + "/c.text", folder_ + "/?*/*.txt"}, false)), (Ids{'4', '6'}));
    EXPECT_EQ(read_all(stream({folder_ + "/[odd] name*.txt"}, false)), (Ids{'5'})) << "the name of a file as it is";
}

TEST_F(Tokens, MissingFilesAreRefusedByFlag) {
    expect_refused({folder_ + "/no*"}, {"--train_data", folder_ + "/no*", "no file matches"});
    expect_refused({folder_ + "/no.txt"}, {"--train_data", folder_ + "/no.txt", "No such file"});
    expect_refused({folder_}, {"--train_data", folder_, "is a folder"});
    std::filesystem::create_directory(folder_ + "/sub");
    expect_refused({folder_ + "/s*"}, {folder_ + "/s*", "no file with anything in it matches"});
    expect_refused({folder_ + "/**/*.txt"}, {"**", "name each depth"});
    expect_refused({"no.txt"}, {"no.txt", "from " + std::filesystem::current_path().string()});
    expect_refused({"/dev/null"}, {"/dev/null", "not a file"});
    expect_refused({write("empty", "")}, {"empty"});
    const std::string pipe = folder_ + "/pipe";
    ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
    expect_refused({pipe}, {pipe, "not a file"});
}

// What nobody means by a pattern: folders, and files without anything to read.
TEST_F(Tokens, PatternsLeaveOutFoldersAndEmptyFiles) {
    std::filesystem::create_directory(folder_ + "/p_folder");
    const std::string text = write("p_text", "abc"), empty = write("p_empty", "");
    const TokenStream found = stream({folder_ + "/p_*"});
    ASSERT_EQ(found.files().size(), 1u);
    EXPECT_EQ(found.files()[0].path, text);
    EXPECT_EQ(found.empty(), std::vector<std::string>{empty});
    expect_refused({folder_ + "/p_e*"}, {"no file with anything in it matches"});
}

TEST_F(Tokens, PackedFilesAreRefusedUnlessAskedFor) {
    using namespace std::string_literals;
    const std::pair<std::string, const char*> begins[] = {{"\x1f\x8b", "unpack"},       {"\x28\xb5\x2f\xfd", "unpack"},
                                                          {"\xfd\x37zXZ\0"s, "unpack"}, {"PK\3\4", "unpack"},
                                                          {"PAR1", "Parquet"},          {"\x93NUMPY", "NumPy"}};
    for (const auto& [begin, words] : begins) {
        const std::string path = write("packed", begin + "rest of the file");
        expect_refused({path}, {"/packed", words, "--data_format bytes"});
        EXPECT_EQ(stream({path}, false, 256, DataFormat::bytes).num_tokens(), (int64_t)begin.size() + 16);
        const std::string cut = write("cut", begin.substr(0, begin.size() - 1));
        EXPECT_EQ(stream({cut}, false).num_tokens(), (int64_t)begin.size() - 1) << "text may begin so";
    }
    expect_refused({write("tokens.bin", "abcdefgh")}, {"/tokens.bin", "20240520"});
    EXPECT_EQ(stream({write("tokens_bin", "abcdefgh")}, false).num_tokens(), 8);
}

TEST_F(Tokens, DamagedShardsAreRefused) {
    const std::vector<uint32_t> tokens(1000, 9);
    const std::string good = shard_bytes(20240520, 1, 1000, tokens);
    EXPECT_EQ(stream({write("good", good)}).num_tokens(), 1000);
    for (const size_t length : {4u, 5u, 12u, 1023u}) {
        expect_refused({write("cut", good.substr(0, length))}, {"/cut", "header"});
    }
    for (const size_t length : {1024u, 1025u, 2000u, 3023u}) {
        expect_refused({write("cut", good.substr(0, length))}, {"/cut", "cut off"});
    }
    expect_refused({write("long", good + "x")}, {"/long", "too long", "3024", "3025"});
    for (const uint32_t stated : {1001u, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
        expect_refused({write("lies", shard_bytes(20240520, 1, stated, tokens))}, {"/lies", "cut off"});
        expect_refused({write("lies", shard_bytes(20240801, 7, stated, tokens))}, {"/lies", "cut off"});
    }
    expect_refused({write("none", shard_bytes(20240520, 1, 0, {}))}, {"/none", "without tokens"});
    expect_refused({write("version", shard_bytes(20240520, 7, 1000, tokens))}, {"/version", "version 7"});
    expect_refused({write("version", shard_bytes(20240801, 1, 1000, tokens))}, {"/version", "version 1"});
    // llm.c's model checkpoint; as bytes only when asked for
    const std::string foreign = write("foreign", shard_bytes(20240326, 5, 1000, tokens));
    expect_refused({foreign}, {"/foreign", "20240326", "--data_format bytes"});
    expect_refused({foreign}, {"/foreign", "20240520"}, DataFormat::shards);
    EXPECT_EQ(stream({foreign}, false, 256, DataFormat::bytes).num_tokens(), 3024);
}

TEST_F(Tokens, TokensOutsideTheVocabularyAreRefused) {
    const std::string u16 = write_u16("u16", {1, 2, 99, 100, 200}), u32 = write_u32("u32", {1, 0xffffffffu, 5});
    expect_refused({u16}, {u16, "token 100 ", "position 3 ", "--vocab_size is 100"}, DataFormat::automatic, 100);
    expect_refused({u32}, {u32, "token 4294967295 ", "position 1 "});
    EXPECT_EQ(read(stream({u16}, true, 100), 0, 3), (Ids{1, 2, 99})) << "what is not read is not refused";
    // the position is that in its file
    EXPECT_NE(error([&] {
                  read(stream({u16, u32}), 4, 3);
              }).find("u32: token 4294967295 at position 1"),
              std::string::npos);
    const std::string text = write("text", "abc");
    expect_refused({text}, {"--vocab_size 255", text}, DataFormat::automatic, 255);
    expect_refused({text}, {"--byte_markers", "257"}, DataFormat::automatic, 257);
    EXPECT_EQ(stream({text}, false, 256).num_tokens(), 3);
    EXPECT_EQ(stream({text}, true, 258).num_tokens(), 5);
}

TEST_F(Tokens, BytesAndShardsDoNotMix) {
    expect_refused({write("text", "abc"), write_u16("shard", {1})}, {"/text", "/shard", "--train_data"});
}

// Offsets past 4 GiB, in files that take no room.
TEST_F(Tokens, FilesBeyondFourGibibytes) {
    const int64_t big = ((int64_t)5 << 30) + 3, four = (int64_t)1 << 32;
    const std::string bytes = write_sparse("bytes", big, {{four - 1, "xyz"}, {big - 1, "e"}});
    const std::string after = write("after", "A");
    const TokenStream b = stream({bytes, after});
    ASSERT_EQ(b.num_tokens(), big + 2 + 3);
    EXPECT_EQ(read(b, four - 1, 5), (Ids{0, 'x', 'y', 'z', 0})) << "the begin marker shifts by one";
    EXPECT_EQ(read(b, big, 5), (Ids{'e', 257, 256, 'A', 257}));

    const uint32_t stated = (1u << 31) + 5;  // 8 GiB of uint32 tokens
    const std::string header = shard_bytes(20240801, 7, stated, {});
    const uint32_t last[2] = {11, 12};
    const std::string u32 =
        write_sparse("u32", 1024 + 4 * (int64_t)stated,
                     {{0, header}, {1024 + 4 * ((int64_t)stated - 2), std::string((const char*)last, 8)}});
    const std::string u16 = write_u16("u16", {13});
    const TokenStream s = stream({u32, u16});
    ASSERT_EQ(s.num_tokens(), (int64_t)stated + 1);
    EXPECT_EQ(read(s, (int64_t)stated - 3, 4), (Ids{0, 11, 12, 13}));

    // A sequence of it, by index.
    const auto shared = std::make_shared<const TokenStream>(stream({bytes, after}));
    const int64_t T = 1000;
    const SequenceSet set(shared, 0, shared->num_tokens(), T, std::nullopt, "--train_data");
    Ids sequence(T + 1);
    set.read(four / T, sequence.data());
    EXPECT_EQ(sequence[four % T], 'x');
}

// ---- sequences

TEST_F(Tokens, SequencesShareTheirBorderToken) {
    const auto s = std::make_shared<const TokenStream>(stream({write("text", "abcdefghijkl")}, false));
    for (int64_t T = 1; T <= 11; ++T) {
        const SequenceSet set(s, 0, 12, T, std::nullopt, "--train_data");
        EXPECT_EQ(set.num_sequences(), 11 / T);
        Ids tokens(T + 1);
        for (int64_t i = 0; i < 3 * set.num_sequences(); ++i) {
            set.read(i, tokens.data());
            const int64_t first = i % set.num_sequences() * T;
            EXPECT_EQ(tokens.front(), 'a' + first);
            EXPECT_EQ(tokens.back(), 'a' + first + T);
        }
    }
    const std::string what = error([&] { SequenceSet(s, 0, 12, 12, std::nullopt, "--train_data"); });
    EXPECT_NE(what.find("--seq_len 12"), std::string::npos) << what;
    EXPECT_NE(what.find("--train_data has only 12"), std::string::npos) << what;
    EXPECT_THROW(SequenceSet(s, 5, 5, 1, std::nullopt, "x"), Error);
}

TEST_F(Tokens, ASequenceLongerThanAnyFile) {
    std::vector<std::string> paths;
    for (int i = 0; i < 50; ++i) {
        paths.push_back(write("f" + std::to_string(100 + i), std::string(20, (char)('A' + i))));
    }
    const auto s = std::make_shared<const TokenStream>(stream({folder_ + "/f*"}, false));
    const SequenceSet set(s, 0, s->num_tokens(), 999, std::nullopt, "--train_data");
    ASSERT_EQ(set.num_sequences(), 1);
    Ids tokens(1000);
    set.read(0, tokens.data());
    for (int i = 0; i < 1000; ++i) {
        ASSERT_EQ(tokens[i], 'A' + i / 20);
    }
}

TEST_F(Tokens, ShuffledEpochsVisitEverySequenceOnceInAnotherOrder) {
    const auto s = std::make_shared<const TokenStream>(stream({write("text", std::string(1001, 'x'))}, false));
    const uint64_t seed = std::random_device{}() >> 1;
    const SequenceSet set(s, 0, 1001, 10, seed, "d"), same(s, 0, 1001, 10, seed, "d"),
        other(s, 0, 1001, 10, seed + 1, "d");
    ASSERT_EQ(set.num_sequences(), 100);
    std::set<std::vector<int64_t>> orders;
    for (int64_t epoch = 0; epoch < 5; ++epoch) {
        std::vector<int64_t> order, order_of_other;
        for (int64_t i = 0; i < 100; ++i) {
            order.push_back(set.sequence_at(100 * epoch + i));
            order_of_other.push_back(other.sequence_at(100 * epoch + i));
            EXPECT_EQ(same.sequence_at(100 * epoch + i), order.back());
        }
        EXPECT_EQ(std::set<int64_t>(order.begin(), order.end()).size(), 100u);
        EXPECT_NE(order, order_of_other);
        orders.insert(order);
    }
    EXPECT_EQ(orders.size(), 5u);
}

// ---- what a run reads

TEST_F(Tokens, ValidationIsTheEndOfTheTrainingData) {
    RunConfig c;
    std::string text;
    for (int i = 0; i < 1000; ++i) {
        text += i < 900 ? 't' : 'v';
    }
    c.train_data = {write("text", text)};
    c.seq_len = 9, c.val_fraction = 0.1, c.byte_markers = false;
    const RunData data = open_data(c);
    ASSERT_TRUE(data.train && data.validation);
    EXPECT_EQ(data.train->num_sequences(), 99);       // (900 - 1) / 9
    EXPECT_EQ(data.validation->num_sequences(), 11);  // (100 - 1) / 9
    Ids tokens(10);
    for (int64_t i = 0; i < 99; ++i) {
        data.train->read(i, tokens.data());
        EXPECT_EQ(tokens, Ids(10, 't'));
        data.validation->read(i, tokens.data());
        EXPECT_EQ(tokens, Ids(10, 'v'));
    }
    c.val_fraction = 0.0;
    EXPECT_FALSE(open_data(c).validation);
    EXPECT_EQ(open_data(c).train->num_sequences(), 111);
    c.val_fraction = 0.009;  // 9 tokens
    const std::string what = error([&] { open_data(c); });
    EXPECT_NE(what.find("--seq_len 9"), std::string::npos) << what;
    EXPECT_NE(what.find("--val_fraction 0.009"), std::string::npos) << what;
}

TEST_F(Tokens, DataOfAnotherVocabularyAreRefusedWhenTheyAreOpened) {
    RunConfig c;
    c.model.vocab_size = 100, c.seq_len = 4;
    const std::string good = write_u16("good", std::vector<uint32_t>(50, 7));
    const std::string bad = write_u16("bad", {7, 7, 300, 7, 7});  // of one sequence
    c.train_data = {bad}, c.val_fraction = 0.0;
    EXPECT_NE(error([&] { open_data(c); }).find("token 300 "), std::string::npos);
    c.train_data = {good}, c.val_data = {bad};
    EXPECT_NE(error([&] { open_data(c); }).find("token 300 "), std::string::npos);
}

TEST_F(Tokens, AFileThatBecomesShorterIsNamedBeforeItIsRead) {
    const std::string first = write("first", std::string(5000, 'a')), second = write("second", std::string(5000, 'b'));
    const TokenStream s = stream({first, second}, false);
    EXPECT_EQ(read(s, 9000, 1), (Ids{'b'}));
    ASSERT_EQ(truncate(second.c_str(), 100), 0);
    const std::string what = error([&] { read(s, 9000, 1); });
    EXPECT_EQ(what.find(second + ": became shorter"), 0u) << what;
    EXPECT_EQ(read(s, 0, 1), (Ids{'a'}));
    std::filesystem::remove(first);
    EXPECT_EQ(read(s, 4999, 1), (Ids{'a'})) << "is whole until nobody reads it";
    write("first", "a");
    EXPECT_EQ(read(s, 4999, 1), (Ids{'a'})) << "another file of this name";
}

TEST_F(Tokens, SeparateValidationDataAreReadInFileOrder) {
    RunConfig c;
    c.train_data = {write("train", std::string(100, 't'))};
    c.val_data = {write("val", "abcdefg")};
    c.seq_len = 2, c.byte_markers = false;
    const RunData data = open_data(c);
    EXPECT_EQ(data.train->num_sequences(), 49) << "--val_fraction takes nothing away";
    ASSERT_EQ(data.validation->num_sequences(), 3);
    Ids tokens(3);
    data.validation->read(1, tokens.data());
    EXPECT_EQ(tokens, (Ids{'c', 'd', 'e'}));

    c.max_steps = 0, c.train_data.clear();
    EXPECT_FALSE(open_data(c).train);
    EXPECT_EQ(open_data(c).validation->num_sequences(), 3);
    c.seq_len = 7;
    EXPECT_NE(error([&] { open_data(c); }).find("--val_data has only 7"), std::string::npos);
    c.max_steps = 1, c.seq_len = 2, c.train_data = {write_u16("shard", {1, 2, 3, 4})};
    EXPECT_NE(error([&] { open_data(c); }).find("--val_data"), std::string::npos) << "bytes beside shards";
}
