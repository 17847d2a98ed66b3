// test_safetensors.cpp: the 16-bit float formats on all their values, files written and read back, and every way a file
// can lie about itself.
#include <gtest/gtest.h>

#include <sys/resource.h>

#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>

#include "llmc/safetensors.h"

namespace {

// ---- helpers

uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The value of a float format with these field widths, by its definition.
double value_of(uint32_t bits, int exponent_bits, int mantissa_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = (int)(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
    const double mantissa = (double)(bits & ((1u << mantissa_bits) - 1));
    const double sign = bits >> (exponent_bits + mantissa_bits) ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1) {
        return mantissa == 0 ? sign * INFINITY : NAN;
    }
    return exponent == 0
               ? sign * std::ldexp(mantissa, 1 - bias - mantissa_bits)
               : sign * std::ldexp(mantissa + std::ldexp(1.0, mantissa_bits), exponent - bias - mantissa_bits);
}

// Floats that conversions find hard: each 16-bit value, the midpoints to its neighbour, a float above and below those,
// and random bits.
template <class Widen>
std::vector<float> hard_floats(Widen widen, uint32_t ulp_bits) {
    std::vector<float> floats;
    for (uint32_t i = 0; i < 65536; ++i) {
        const uint32_t bits = bits_of(widen((uint16_t)i));
        for (const uint32_t offset : {0u, 1u, ulp_bits / 2 - 1, ulp_bits / 2, ulp_bits / 2 + 1, ulp_bits - 1}) {
            floats.push_back(float_of(bits + offset));
        }
    }
    std::mt19937 generator(1);
    for (int i = 0; i < 200000; ++i) {
        floats.push_back(float_of((uint32_t)generator()));
        // In the range of binary16, subnormals included.
        floats.push_back(std::ldexp((float)((int32_t)generator()), -31 - (int)(generator() % 45) + 18));
    }
    return floats;
}

// Whether `rounded` is the nearest value of a 16-bit format to x; of two, the one with an even last bit. Beyond the
// largest finite value the format continues as if its exponent went on.
void expect_nearest(float x, uint16_t rounded, int exponent_bits, int mantissa_bits) {
    const auto value = [&](uint16_t magnitude) {
        const uint16_t infinity = (uint16_t)(((1 << exponent_bits) - 1) << mantissa_bits);
        const int bias = (1 << (exponent_bits - 1)) - 1;
        return magnitude == infinity ? std::ldexp(1.0, bias + 1) : value_of(magnitude, exponent_bits, mantissa_bits);
    };
    if (std::isnan(x)) {
        ASSERT_TRUE(std::isnan(value_of(rounded, exponent_bits, mantissa_bits))) << bits_of(x);
        return;
    }
    ASSERT_EQ(rounded >> 15, (int)std::signbit(x)) << x;
    const uint16_t magnitude = rounded & 0x7fff, infinity = (uint16_t)(((1 << exponent_bits) - 1) << mantissa_bits);
    ASSERT_LE(magnitude, infinity) << x;
    const double exact = std::fabs((double)x);
    if (std::isinf(x)) {
        ASSERT_EQ(magnitude, infinity);
        return;
    }
    const double error = std::fabs(value(magnitude) - exact);
    if (magnitude > 0) {
        const double below = exact - value(magnitude - 1);
        ASSERT_TRUE(error < below || (error == below && magnitude % 2 == 0)) << x;
    }
    if (magnitude < infinity) {
        const double above = value(magnitude + 1) - exact;
        ASSERT_TRUE(error < above || (error == above && magnitude % 2 == 0)) << x;
    }
}

// The bytes of a file with this header text and `data_bytes` of data.
std::string file_bytes(const std::string& header, size_t data_bytes) {
    std::string bytes;
    for (int i = 0; i < 8; ++i) {
        bytes += (char)((uint64_t)header.size() >> 8 * i);
    }
    bytes += header;
    for (size_t i = 0; i < data_bytes; ++i) {
        bytes += (char)(i * 37 + 11);
    }
    return bytes;
}

SafetensorsHeader parse(const std::string& bytes) {
    // A buffer of exactly this size, so that sanitizers see a read beyond it.
    const std::vector<unsigned char> copy(bytes.begin(), bytes.end());
    return parse_safetensors_header(copy.data(), copy.size(), "file");
}
std::string refusal(const std::string& bytes) {
    try {
        parse(bytes);
    } catch (const Error& error) {
        EXPECT_EQ(std::string(error.what()).rfind("file", 0), 0u) << error.what();
        EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
        return error.what();
    }
    return "(accepted)";
}
#define EXPECT_REFUSED(bytes, words) EXPECT_NE(refusal(bytes).find(words), std::string::npos) << refusal(bytes)

std::string read_bytes(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
}

class Safetensors : public testing::Test {
  protected:
    void SetUp() override {
        ASSERT_NE(mkdtemp(folder_.data()), nullptr);
        path_ = folder_ + "/x.safetensors";
    }
    void TearDown() override { EXPECT_EQ(std::system(("rm -rf '" + folder_ + "'").c_str()), 0); }

    std::string folder_ = testing::TempDir() + "llmc_safetensors_XXXXXX", path_;
};

std::vector<float> random_floats(size_t n, uint32_t seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(n);
    for (float& value : values) {
        value = normal(generator);
    }
    return values;
}

const char* const ONE = R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}})";

}  // namespace

// ---- float formats

TEST(FloatFormats, EveryBf16AndFp16HasItsValue) {
    for (uint32_t i = 0; i < 65536; ++i) {
        const double bf16 = value_of(i, 8, 7), fp16 = value_of(i, 5, 10);
        const float as_bf16 = bf16_to_float((uint16_t)i), as_fp16 = fp16_to_float((uint16_t)i);
        if (std::isnan(bf16)) {
            ASSERT_TRUE(std::isnan(as_bf16)) << i;
        } else {
            ASSERT_EQ((double)as_bf16, bf16) << i;
        }
        if (std::isnan(fp16)) {
            ASSERT_TRUE(std::isnan(as_fp16)) << i;
        } else {
            ASSERT_EQ((double)as_fp16, fp16) << i;
        }
        ASSERT_EQ(std::signbit(as_bf16), i >> 15 != 0);
        ASSERT_EQ(std::signbit(as_fp16), i >> 15 != 0);
        // There and back is the same; of a NaN, its kind and sign.
        if (std::isnan(bf16)) {
            ASSERT_EQ(float_to_bf16(as_bf16), i | 0x40) << i;
        } else {
            ASSERT_EQ(float_to_bf16(as_bf16), i);
        }
        if (std::isnan(fp16)) {
            ASSERT_EQ(float_to_fp16(as_fp16), i | 0x200) << i;
        } else {
            ASSERT_EQ(float_to_fp16(as_fp16), i);
        }
    }
}

TEST(FloatFormats, RoundToNearestEven) {
    for (const float x : hard_floats(bf16_to_float, 1u << 16)) {
        ASSERT_NO_FATAL_FAILURE(expect_nearest(x, float_to_bf16(x), 8, 7)) << bits_of(x);
    }
    for (const float x : hard_floats(fp16_to_float, 1u << 13)) {
        ASSERT_NO_FATAL_FAILURE(expect_nearest(x, float_to_fp16(x), 5, 10)) << bits_of(x);
    }
    EXPECT_EQ(float_to_fp16(65519.99f), 0x7bff);
    EXPECT_EQ(float_to_fp16(65520.0f), 0x7c00);
    EXPECT_EQ(float_to_fp16(0x1p-25f), 0) << "half the smallest: to even";
    EXPECT_EQ(float_to_fp16(0x1.8p-24f), 2);
    EXPECT_EQ(float_to_bf16(3.4e38f), 0x7f80);
}

// ---- there and back

TEST_F(Safetensors, WrittenBytesAreTheFormat) {
    SafetensorsWriter writer(path_, {{"b", Dtype::F32, {2}, 0, 0}, {"a", Dtype::BF16, {1, 2}, 0, 0}},
                             {{"format", "pt"}});
    const float values[] = {1.0f, -2.0f, 0.5f, 1.00390625f};
    writer.write(values, 4);
    const FileDigest digest = writer.finish();
    std::string header = R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                         R"("a":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}})";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    std::string expected = file_bytes(header, 0);
    expected += std::string("\x00\x00\x80\x3f\x00\x00\x00\xc0", 8) + std::string("\x00\x3f\x80\x3f", 4);
    EXPECT_EQ(read_bytes(path_), expected) << "1.00390625 is halfway between two bfloat16: to even";
    EXPECT_EQ(digest.num_bytes, expected.size());
    EXPECT_EQ(digest.xxh3, XXH3_64bits(expected.data(), expected.size()));
    EXPECT_EQ(digest_file(path_).xxh3, digest.xxh3);
}

TEST_F(Safetensors, WhatIsWrittenIsReadBack) {
    const std::vector<SafetensorsTensor> tensors = {{"layer0.\"quoted\"", Dtype::F32, {3, 5}, 0, 0},
                                                    {"empty", Dtype::F16, {4, 0}, 0, 0},
                                                    {"scalar", Dtype::BF16, {}, 0, 0},
                                                    {"\xc3\xa9", Dtype::F16, {7}, 0, 0},
                                                    {"large", Dtype::BF16, {3, 700001}, 0, 0}};
    const std::vector<float> values = random_floats(15 + 0 + 1 + 7 + 2100003, 2);
    SafetensorsWriter writer(path_, tensors, {{"format", "pt"}, {"note", "\"\\\n"}});
    // In pieces that end inside tensors and go over several.
    for (size_t begin = 0, count = 1; begin < values.size(); begin += count, count = count * 3 + 1) {
        count = std::min(count, values.size() - begin);
        writer.write(values.data() + begin, count);
    }
    writer.finish();

    const SafetensorsFile file(path_);
    EXPECT_EQ(file.metadata().at("note"), "\"\\\n");
    ASSERT_EQ(file.tensors().size(), tensors.size());
    size_t offset = 0;
    for (const SafetensorsTensor& expected : tensors) {
        const SafetensorsTensor& tensor = file.at(expected.name);
        EXPECT_EQ(tensor.shape, expected.shape);
        EXPECT_EQ(tensor.dtype, expected.dtype);
        std::vector<float> read(tensor.num_elements, NAN);
        file.read_floats(tensor, read.data());
        for (size_t i = 0; i < read.size(); ++i, ++offset) {
            const float x = values[offset];
            const float stored = expected.dtype == Dtype::F32    ? x
                                 : expected.dtype == Dtype::BF16 ? bf16_to_float(float_to_bf16(x))
                                                                 : fp16_to_float(float_to_fp16(x));
            ASSERT_EQ(read[i], stored) << expected.name << " " << i;
        }
    }
    EXPECT_EQ(offset, values.size());
    EXPECT_EQ(file.find("none"), nullptr);
    EXPECT_THROW(file.at("none"), Error);
}

// Read in parts of 2^24 elements.
TEST_F(Safetensors, ATensorOfMoreThanOnePart) {
    const uint64_t n = ((uint64_t)1 << 24) + 3;
    std::vector<float> values(n, 1.0f), read(n, NAN);
    values[0] = 2.0f, values[n - 1] = 3.0f;
    SafetensorsWriter writer(path_, {{"a", Dtype::BF16, {n}, 0, 0}}, {});
    writer.write(values.data(), n);
    writer.finish();
    const SafetensorsFile file(path_);
    file.read_floats(file.at("a"), read.data());
    EXPECT_TRUE(read == values);
}

TEST_F(Safetensors, UnalignedElementsAreRead) {
    const std::string header = R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
                               R"("b":{"dtype":"F32","shape":[2],"data_offsets":[3,11]},)"
                               R"("c":{"dtype":"F16","shape":[1],"data_offsets":[11,13]}}  )";
    std::string bytes = file_bytes(header, 3);
    bytes += std::string("\x00\x00\x80\x3f\x00\x00\x00\xc0\x00\x3c", 10);
    std::ofstream(path_, std::ios::binary) << bytes;
    const SafetensorsFile file(path_);
    float b[2], c;
    file.read_floats(file.at("b"), b);
    file.read_floats(file.at("c"), &c);
    EXPECT_EQ(b[0], 1.0f);
    EXPECT_EQ(b[1], -2.0f);
    EXPECT_EQ(c, 1.0f);
    EXPECT_THROW(file.read_floats(file.at("a"), b), Error) << "weights are not U8";
}

TEST_F(Safetensors, WriterRefusesTooManyTooFewAndTwice) {
    const float values[3] = {};
    {
        SafetensorsWriter writer(path_, {{"a", Dtype::F32, {2}, 0, 0}}, {});
        writer.write(values, 1);
        EXPECT_THROW(writer.finish(), Error) << "one is missing";
        EXPECT_THROW(writer.write(values, 2), Error) << "one too many";
    }
    EXPECT_FALSE(std::filesystem::exists(path_)) << "half a file";
    SafetensorsWriter(path_, {}, {}).finish();
    EXPECT_THROW(SafetensorsWriter(path_, {}, {}), Error) << "the file exists";
    EXPECT_TRUE(std::filesystem::exists(path_)) << "another's stays";
    const std::string other = folder_ + "/y.safetensors";
    EXPECT_THROW(SafetensorsWriter(other, {{"a", Dtype::F32, {}, 0, 0}, {"a", Dtype::F32, {}, 0, 0}}, {}), Error);
    EXPECT_THROW(SafetensorsWriter(folder_ + "/none/y.safetensors", {}, {}), Error);
}

TEST_F(Safetensors, FullDiskIsAnError) {
    // A limit on the size of files stands for the disk.
    rlimit before;
    ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
    const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
    rlimit limit = before;
    limit.rlim_cur = 1000;
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
    std::string message;
    try {
        SafetensorsWriter writer(path_, {{"a", Dtype::F32, {1000}, 0, 0}}, {});
        const std::vector<float> values(1000);
        writer.write(values.data(), 1000);
        writer.finish();
    } catch (const Error& error) {
        message = error.what();
    }
    setrlimit(RLIMIT_FSIZE, &before);
    std::signal(SIGXFSZ, old_handler);
    EXPECT_NE(message.find(path_ + ": cannot write: File too large"), std::string::npos) << message;
}

// ---- files that lie

TEST(SafetensorsHeaders, WholeFileIsAccepted) {
    const SafetensorsHeader header = parse(file_bytes(ONE, 24));
    ASSERT_EQ(header.tensors.size(), 1u);
    EXPECT_EQ(header.tensors[0].num_elements, 6u);
    EXPECT_EQ(parse(file_bytes("{}", 0)).tensors.size(), 0u);
    EXPECT_EQ(parse(file_bytes(std::string(ONE) + "   ", 24)).data_begin, 8 + strlen(ONE) + 3);
    // Entries in any order, empty tensors anywhere.
    EXPECT_EQ(parse(file_bytes(R"({"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]},
        "e":{"dtype":"F32","shape":[0,5],"data_offsets":[1,1]},"f":{"dtype":"F32","shape":[9,0],"data_offsets":[3,3]},
        "a":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}})",
                               3))
                  .tensors[1]
                  .name,
              "e");
}

TEST(SafetensorsHeaders, CutOffAnywhereIsRefused) {
    const std::string whole = file_bytes(ONE, 24);
    for (size_t length = 0; length < whole.size(); ++length) {
        ASSERT_NE(refusal(whole.substr(0, length)), "(accepted)") << length;
    }
    EXPECT_REFUSED(whole + "x", "belong to no tensor");
}

TEST(SafetensorsHeaders, EveryFlippedBitOfTheHeaderIsRefusedOrHarmless) {
    const std::string whole = file_bytes(ONE, 24);
    int accepted = 0;
    for (size_t bit = 0; bit < 8 * (whole.size() - 24); ++bit) {
        std::string flipped = whole;
        flipped[bit / 8] = (char)(flipped[bit / 8] ^ 1 << bit % 8);
        if (refusal(flipped) == "(accepted)") {
            ++accepted;  // another name, a dtype of the same size, another shape of as many elements
            ASSERT_EQ(parse(flipped).tensors[0].num_bytes(), 24u);
        }
    }
    EXPECT_GT(accepted, 0);
    EXPECT_LT(accepted, 16);
}

TEST(SafetensorsHeaders, LengthsThatLieAreRefused) {
    std::string bytes = file_bytes(ONE, 24);
    const auto with_length = [&](uint64_t length) {
        std::string lying = bytes;
        std::memcpy(lying.data(), &length, 8);
        return lying;
    };
    const uint64_t header = strlen(ONE);
    for (const uint64_t length :
         {(uint64_t)0, (uint64_t)1, header - 1, header + 1, header + 24, header + 25, (uint64_t)100'000'000,
          (uint64_t)100'000'001, (uint64_t)1 << 32, (uint64_t)1 << 63, UINT64_MAX - 8, UINT64_MAX - 7, UINT64_MAX}) {
        EXPECT_NE(refusal(with_length(length)), "(accepted)") << length;
    }
    EXPECT_REFUSED(with_length(100'000'001), "not a safetensors file");
    EXPECT_REFUSED(with_length(header + 25), "cut off");
}

TEST(SafetensorsHeaders, InconsistentHeadersAreRefused) {
    const auto tensor = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
        return "{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
    };
    const auto one = [&](const std::string& dtype, const std::string& shape, const std::string& offsets) {
        return file_bytes("{\"a\":" + tensor(dtype, shape, offsets) + "}", 24);
    };
    const auto two = [&](const std::string& a, const std::string& b, size_t data_bytes) {
        return file_bytes("{\"a\":" + tensor("U8", "[4]", a) + ",\"b\":" + tensor("U8", "[4]", b) + "}", data_bytes);
    };
    EXPECT_EQ(refusal(one("F32", "[6]", "[0,24]")), "(accepted)");
    EXPECT_REFUSED(one("F31", "[6]", "[0,24]"), "unknown dtype 'F31'");
    EXPECT_REFUSED(one("f32", "[6]", "[0,24]"), "unknown dtype");
    EXPECT_REFUSED(one("F32", "[5]", "[0,24]"), "do not hold 20 bytes");
    EXPECT_REFUSED(one("F32", "[7]", "[0,28]"), "is cut off");
    EXPECT_REFUSED(one("F32", "[6]", "[24,0]"), "do not hold");
    EXPECT_REFUSED(one("F32", "[-6]", "[0,24]"), "not negative");
    EXPECT_REFUSED(one("F32", "[6.0]", "[0,24]"), "whole numbers");
    EXPECT_REFUSED(one("F32", "6", "[0,24]"), "\"shape\" must be an array");
    EXPECT_REFUSED(one("F32", "[6]", "[0]"), "data_offsets");
    EXPECT_REFUSED(one("F32", "[6]", "[0,24,24]"), "data_offsets");
    EXPECT_REFUSED(one("F32", "[6]", "[0.0,24.0]"), "data_offsets");
    EXPECT_REFUSED(one("F32", "[6]", "[\"0\",\"24\"]"), "data_offsets");
    EXPECT_REFUSED(one("F32", "[6]", "[-24,0]"), "data_offsets");
    EXPECT_REFUSED(one("F32", "[6]", "[0,18446744073709551616]"), "data_offsets");
    // Products and sums that pass 2^64.
    EXPECT_REFUSED(one("F32", "[4294967296,4294967296]", "[0,0]"), "overflows");
    EXPECT_REFUSED(one("F32", "[4611686018427387904]", "[0,0]"), "overflows");
    EXPECT_REFUSED(one("U8", "[18446744073709551615,18446744073709551615,0]", "[0,0]"), "overflows");
    EXPECT_REFUSED(one("U8", "[18446744073709551592]", "[24,0]"), "do not hold");
    EXPECT_REFUSED(one("U8", "[24]", "[18446744073709551592,0]"), "do not hold");
    EXPECT_REFUSED(one("U8", "[24]", "[18446744073709551591,18446744073709551615]"), "begins at byte");
    // Gaps, overlaps, bytes that are nobody's.
    EXPECT_EQ(refusal(two("[4,8]", "[0,4]", 8)), "(accepted)");
    EXPECT_REFUSED(two("[0,4]", "[5,9]", 9), "begins at byte 5, but the one before ends at byte 4");
    EXPECT_REFUSED(two("[0,4]", "[3,7]", 7), "begins at byte 3");
    EXPECT_REFUSED(two("[0,4]", "[0,4]", 4), "begins at byte 0");
    EXPECT_REFUSED(two("[1,5]", "[5,9]", 9), "begins at byte 1, but the one before ends at byte 0");
    EXPECT_REFUSED(two("[0,4]", "[4,8]", 9), "belong to no tensor");
    EXPECT_REFUSED(two("[0,4]", "[4,8]", 7), "cut off");
    // Names.
    EXPECT_REFUSED(
        file_bytes("{\"a\":" + tensor("U8", "[1]", "[0,1]") + ",\"a\":" + tensor("U8", "[1]", "[1,2]") + "}", 2),
        "the name 'a' twice");
    EXPECT_REFUSED(
        file_bytes("{\"a\":" + tensor("U8", "[1]", "[0,1]") + ",\"\\u0061\":" + tensor("U8", "[1]", "[1,2]") + "}", 2),
        "the name 'a' twice");
    EXPECT_REFUSED(file_bytes(R"({"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}})", 1),
                   "'dtype' twice");
    // What is missing or of another kind.
    EXPECT_REFUSED(file_bytes(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", 1), "lacks \"dtype\"");
    EXPECT_REFUSED(file_bytes(R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", 1), "lacks \"shape\"");
    EXPECT_REFUSED(file_bytes(R"({"a":{"dtype":"U8","shape":[1]}})", 1), "lacks \"data_offsets\"");
    EXPECT_REFUSED(file_bytes(R"({"a":[]})", 0), "object");
    EXPECT_REFUSED(file_bytes(R"({"__metadata__":{"a":1}})", 0), "__metadata__");
    EXPECT_REFUSED(file_bytes(R"({"__metadata__":[]})", 0), "__metadata__");
    EXPECT_REFUSED(file_bytes("[]", 0), "no safetensors header");
    EXPECT_REFUSED(file_bytes(" {}", 0), "no safetensors header");
    EXPECT_REFUSED(file_bytes("", 0), "no safetensors header");
    EXPECT_REFUSED(file_bytes("{", 0), "not valid JSON");
    EXPECT_REFUSED(file_bytes("{}x", 0), "not valid JSON");
    EXPECT_REFUSED(file_bytes("{\"a\xff\":{}}", 0), "not valid JSON");
    EXPECT_REFUSED(file_bytes("{\"a\":1e999}", 0), "out of range");
    EXPECT_REFUSED(file_bytes("{\"a\":" + std::string(5000, '['), 0), "nests deeper");
    EXPECT_REFUSED(file_bytes("{\"a\\nb\":1}", 0), "a?b");
}

TEST_F(Safetensors, FilesThatAreNoneAreRefused) {
    EXPECT_THROW(SafetensorsFile(folder_ + "/none"), Error);
    EXPECT_THROW(SafetensorsFile{folder_}, Error) << "a folder";
    std::ofstream(path_).close();
    EXPECT_THROW(SafetensorsFile{path_}, Error) << "empty";
}
