// safetensors.h: the safetensors format of Hugging Face, read by mapping the file and written as a stream, and the
// conversions between float32 and the 16-bit types that weights are stored in.
//
// A file: the header's length (8 bytes, little-endian), the header (JSON: by tensor name dtype, shape and the range of
// bytes behind the header; "__metadata__" texts by name), the tensors' bytes, row-major, little-endian, without gaps.
// Source: github.com/huggingface/safetensors, README "Format".
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <sys/mman.h>
#include <tuple>
#include <unistd.h>
#include <unordered_map>
#include <vector>

#include "check.h"
#include "durable_file.h"  // writing
#include "json.h"          // the header
#include "mapped_file.h"   // reading

// ---- float formats -----------------------------------------------------------------------------

// bfloat16, the upper half of a float32: exact.
inline float bf16_to_float(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// To the nearest bfloat16, ties to even; beyond the largest, infinity. A NaN stays one, with its sign.
inline uint16_t float_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    return (uint16_t)((is_nan ? bits | 0x400000 : rounded) >> 16);
}

// IEEE 754 binary16: exact.
inline float fp16_to_float(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    // Shifted into float32's fields the exponent is 112 too small; the multiplication mends it, subnormals included.
    const uint32_t shifted = magnitude << 13;
    float value;
    std::memcpy(&value, &shifted, 4);
    value *= 0x1p112f;
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    wide = sign | (magnitude >= 0x7c00 ? 0x7f800000 | shifted : wide);  // infinity and NaN
    std::memcpy(&value, &wide, 4);
    return value;
}

// To the nearest binary16, ties to even; from 65520 on, infinity. A NaN stays one, with its sign.
inline uint16_t float_to_fp16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));  // quiet NaN
    }
    if (magnitude >= 0x47800000) {  // 2^16
        return sign | 0x7c00;
    }
    if (magnitude < 0x38800000) {  // below 2^-14, the smallest normal: adding 0.5 rounds to multiples of 2^-24
        float small;
        std::memcpy(&small, &magnitude, 4);
        small += 0.5f;
        uint32_t sum;
        std::memcpy(&sum, &small, 4);
        return (uint16_t)(sign | (sum - 0x3f000000));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | ((rounded >> 13) - (112 << 10)));
}

// ---- the header --------------------------------------------------------------------------------

enum class Dtype { BOOL, U8, I8, F8_E5M2, F8_E4M3, I16, U16, F16, BF16, I32, U32, F32, F64, I64, U64 };

struct DtypeInfo {
    Dtype dtype;
    const char* name;
    uint64_t num_bytes;  // of one element
};
constexpr DtypeInfo DTYPES[] = {
    {Dtype::BOOL, "BOOL", 1},       {Dtype::U8, "U8", 1},   {Dtype::I8, "I8", 1},   {Dtype::F8_E5M2, "F8_E5M2", 1},
    {Dtype::F8_E4M3, "F8_E4M3", 1}, {Dtype::I16, "I16", 2}, {Dtype::U16, "U16", 2}, {Dtype::F16, "F16", 2},
    {Dtype::BF16, "BF16", 2},       {Dtype::I32, "I32", 4}, {Dtype::U32, "U32", 4}, {Dtype::F32, "F32", 4},
    {Dtype::F64, "F64", 8},         {Dtype::I64, "I64", 8}, {Dtype::U64, "U64", 8},
};
inline const DtypeInfo& dtype_info(Dtype dtype) { return DTYPES[(int)dtype]; }
inline bool is_weight_dtype(Dtype dtype) { return dtype == Dtype::F32 || dtype == Dtype::F16 || dtype == Dtype::BF16; }

struct SafetensorsTensor {
    std::string name;
    Dtype dtype = Dtype::F32;
    std::vector<uint64_t> shape;
    uint64_t begin = 0;         // of its first byte behind the header
    uint64_t num_elements = 0;  // the product of shape
    uint64_t num_bytes() const { return num_elements * dtype_info(dtype).num_bytes; }
};

// "[3, 4]"
inline std::string shape_text(const std::vector<uint64_t>& shape) {
    std::string text;
    for (const uint64_t size : shape) {
        text += (text.empty() ? "" : ", ") + std::to_string(size);
    }
    return "[" + text + "]";
}

struct SafetensorsHeader {
    std::vector<SafetensorsTensor> tensors;       // in the order of their bytes
    std::map<std::string, std::string> metadata;  // "__metadata__"
    uint64_t data_begin = 0;                      // in the file
};

constexpr uint64_t SAFETENSORS_MAX_HEADER = 100'000'000;  // bytes; the limit of the format's own library

// The header of a file with these bytes. Throws Error, naming `path`, for anything but a whole, consistent file: every
// tensor lies inside, has as many bytes as dtype and shape say, and the tensors fill the file without gap or overlap.
inline SafetensorsHeader parse_safetensors_header(const unsigned char* bytes, uint64_t num_bytes,
                                                  const std::string& path) {
    uint64_t header_bytes = 0;
    CHECK(num_bytes >= 8, "%s: has %llu bytes, too short for a safetensors file", path.c_str(),
          (unsigned long long)num_bytes);
    for (int i = 7; i >= 0; --i) {
        header_bytes = header_bytes << 8 | bytes[i];
    }
    CHECK(header_bytes <= SAFETENSORS_MAX_HEADER, "%s: states a header of %llu bytes: not a safetensors file",
          path.c_str(), (unsigned long long)header_bytes);
    CHECK(header_bytes <= num_bytes - 8, "%s: is cut off: states a header of %llu bytes, and has %llu in all",
          path.c_str(), (unsigned long long)header_bytes, (unsigned long long)num_bytes);
    const std::string_view text((const char*)bytes + 8, header_bytes);
    CHECK(!text.empty() && text[0] == '{', "%s: has no safetensors header", path.c_str());
    const JsonValue json = parse_json(text, path + ": header");

    SafetensorsHeader header;
    header.data_begin = 8 + header_bytes;
    for (const auto& [name, value] : json.items()) {
        const std::string where = path + ": tensor " + printable(name);
        if (name == "__metadata__") {
            CHECK(value.is_object(), "%s: __metadata__ must be an object of texts", path.c_str());
            for (const auto& [key, text_value] : value.items()) {
                CHECK(text_value.is_string(), "%s: __metadata__ must be an object of texts", path.c_str());
                header.metadata[key] = text_value.get<std::string>();
            }
            continue;
        }
        const JsonObject entry(value, where);
        SafetensorsTensor tensor;
        tensor.name = name;
        const std::string dtype = entry.text("dtype");
        const auto known =
            std::find_if(std::begin(DTYPES), std::end(DTYPES), [&](const DtypeInfo& d) { return dtype == d.name; });
        CHECK(known != std::end(DTYPES), "%s: has the unknown dtype '%s'", where.c_str(), printable(dtype).c_str());
        tensor.dtype = known->dtype;

        const JsonValue& shape = entry.at("shape");
        CHECK(shape.is_array(), "%s: \"shape\" must be an array", where.c_str());
        tensor.num_elements = 1;
        for (const JsonValue& size : shape) {
            CHECK(size.is_number_unsigned(), "%s: \"shape\" must hold whole numbers that are not negative",
                  where.c_str());
            tensor.shape.push_back(size.get<uint64_t>());
            tensor.num_elements = checked_mul(tensor.num_elements, tensor.shape.back(), where.c_str());
        }
        const uint64_t expected = checked_mul(tensor.num_elements, known->num_bytes, where.c_str());

        const JsonValue& offsets = entry.at("data_offsets");
        CHECK(offsets.is_array() && offsets.size() == 2 && offsets[0].is_number_unsigned() &&
                  offsets[1].is_number_unsigned(),
              "%s: \"data_offsets\" must be two whole numbers that are not negative", where.c_str());
        tensor.begin = offsets[0].get<uint64_t>();
        const uint64_t end = offsets[1].get<uint64_t>();
        CHECK(tensor.begin <= end && end - tensor.begin == expected,
              "%s: bytes %llu to %llu do not hold %llu bytes, those of shape %s in %s", where.c_str(),
              (unsigned long long)tensor.begin, (unsigned long long)end, (unsigned long long)expected,
              printable(shape_text(tensor.shape)).c_str(), known->name);
        header.tensors.push_back(std::move(tensor));
    }

    // Empty tensors before others at the same place; by name among themselves.
    std::sort(header.tensors.begin(), header.tensors.end(), [](const SafetensorsTensor& a, const SafetensorsTensor& b) {
        return std::make_tuple(a.begin, a.num_elements, std::string_view(a.name)) <
               std::make_tuple(b.begin, b.num_elements, std::string_view(b.name));
    });
    uint64_t end = 0;
    for (const SafetensorsTensor& tensor : header.tensors) {
        CHECK(tensor.begin == end, "%s: tensor %s begins at byte %llu, but the one before ends at byte %llu",
              path.c_str(), printable(tensor.name).c_str(), (unsigned long long)tensor.begin, (unsigned long long)end);
        end = tensor.begin + tensor.num_bytes();  // no overflow: equals data_offsets[1]
    }
    CHECK(end == num_bytes - header.data_begin, "%s: %s: its tensors have %llu bytes, behind the header are %llu",
          path.c_str(), end > num_bytes - header.data_begin ? "is cut off" : "has bytes that belong to no tensor",
          (unsigned long long)end, (unsigned long long)(num_bytes - header.data_begin));
    return header;
}

// ---- reading -----------------------------------------------------------------------------------

// out (=) [num_elements] float32 from bytes of one of the three weight dtypes, at any address.
inline void convert_to_floats(float* out, const unsigned char* bytes, Dtype dtype, uint64_t num_elements) {
    if (dtype == Dtype::F32) {
        std::memcpy(out, bytes, num_elements * 4);
        return;
    }
    const bool is_bf16 = dtype == Dtype::BF16;
    for (uint64_t i = 0; i < num_elements; ++i) {
        uint16_t bits;
        std::memcpy(&bits, bytes + 2 * i, 2);
        out[i] = is_bf16 ? bf16_to_float(bits) : fp16_to_float(bits);
    }
}

class SafetensorsFile {
  public:
    // Throws Error when the file cannot be read or is not a whole, consistent safetensors file.
    explicit SafetensorsFile(const std::string& path)
        : file_(path), header_(parse_safetensors_header(file_.data(), file_.size(), path)) {
        for (size_t i = 0; i < header_.tensors.size(); ++i) {
            index_[header_.tensors[i].name] = i;
        }
    }

    const std::string& path() const { return file_.path(); }
    const std::vector<SafetensorsTensor>& tensors() const { return header_.tensors; }
    const std::map<std::string, std::string>& metadata() const { return header_.metadata; }

    // Null when there is none of this name.
    const SafetensorsTensor* find(const std::string& name) const {
        const auto found = index_.find(name);
        return found == index_.end() ? nullptr : &header_.tensors[found->second];
    }
    // Throws Error when there is none of this name.
    const SafetensorsTensor& at(const std::string& name) const {
        const SafetensorsTensor* tensor = find(name);
        CHECK(tensor != nullptr, "%s: lacks the tensor %s", path().c_str(), printable(name).c_str());
        return *tensor;
    }

    // The tensor's bytes, at any alignment.
    const unsigned char* data(const SafetensorsTensor& tensor) const {
        return file_.data() + header_.data_begin + tensor.begin;
    }
    // out (=) its elements, [num_elements] float32. Throws Error for a dtype that weights are not stored in.
    void read_floats(const SafetensorsTensor& tensor, float* out) const {
        read_floats(tensor, 0, tensor.num_elements, out);
    }
    // Of its elements those from `first` on, num_elements; they must be there.
    void read_floats(const SafetensorsTensor& tensor, uint64_t first, uint64_t num_elements, float* out) const {
        CHECK(is_weight_dtype(tensor.dtype), "%s: tensor %s is %s; weights must be F32, F16 or BF16", path().c_str(),
              printable(tensor.name).c_str(), dtype_info(tensor.dtype).name);
        constexpr uint64_t PART = (uint64_t)1 << 24;  // elements; what was read need not stay in memory
        const uint64_t element_bytes = dtype_info(tensor.dtype).num_bytes;
        for (uint64_t begin = 0; begin < num_elements; begin += PART) {
            const uint64_t count = std::min(PART, num_elements - begin);
            const unsigned char* part = data(tensor) + (first + begin) * element_bytes;
            convert_to_floats(out + begin, part, tensor.dtype, count);
            release(part, count * element_bytes);
        }
    }

  private:
    // Takes the whole pages of a range out of this process; they are mapped again when they are touched.
    static void release(const unsigned char* begin, uint64_t num_bytes) {
        const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
        const uintptr_t first = round_up((uintptr_t)begin, page), end = ((uintptr_t)begin + num_bytes) / page * page;
        if (first < end) {
            madvise((void*)first, end - first, MADV_DONTNEED);  // advice: reading is right without it
        }
    }

    MappedFile file_;
    SafetensorsHeader header_;
    std::unordered_map<std::string, size_t> index_;  // into header_.tensors
};

// ---- writing -----------------------------------------------------------------------------------

// Writes a file tensor by tensor from float32, holding no more than a small buffer.
class SafetensorsWriter {
  public:
    // `tensors`: name, dtype (F32, F16 or BF16) and shape, in the order in which their elements will come.
    // Throws Error when the file exists or cannot be written.
    SafetensorsWriter(const std::string& path, std::vector<SafetensorsTensor> tensors,
                      const std::map<std::string, std::string>& metadata)
        : path_(path), tensors_(std::move(tensors)), file_(path) {
        Json header = Json::object();
        if (!metadata.empty()) {
            header["__metadata__"] = metadata;
        }
        uint64_t end = 0;
        std::set<std::string> names;
        for (SafetensorsTensor& tensor : tensors_) {
            CHECK(is_weight_dtype(tensor.dtype) && names.insert(tensor.name).second,
                  "%s: cannot write tensor %s: its dtype or name", path.c_str(), tensor.name.c_str());
            tensor.begin = end;
            tensor.num_elements = 1;
            for (const uint64_t size : tensor.shape) {
                tensor.num_elements = checked_mul(tensor.num_elements, size, tensor.name.c_str());
            }
            end = checked_add(end, tensor.num_bytes(), path.c_str());
            header.push_back({tensor.name,
                              {{"dtype", dtype_info(tensor.dtype).name},
                               {"shape", tensor.shape},
                               {"data_offsets", {tensor.begin, end}}}});
        }
        std::string text = header.dump();
        text.resize(round_up<size_t>(text.size(), 8), ' ');  // elements are aligned in memory
        unsigned char length[8];
        for (int i = 0; i < 8; ++i) {
            length[i] = (unsigned char)((uint64_t)text.size() >> 8 * i);
        }
        file_.write(length, 8);
        file_.write(text.data(), text.size());
    }

    // The next elements in the order of the tensors; may begin and end inside a tensor, or go over several.
    void write(const float* values, uint64_t num_elements) {
        while (num_elements > 0) {
            while (current_ < tensors_.size() && done_ == tensors_[current_].num_elements) {
                ++current_, done_ = 0;
            }
            CHECK(current_ < tensors_.size(), "%s: more elements were written than its header has", path_.c_str());
            const uint64_t count = std::min(num_elements, tensors_[current_].num_elements - done_);
            write_as(tensors_[current_].dtype, values, count);
            values += count, num_elements -= count, done_ += count;
        }
    }

    // Waits until the file is on the disk. Throws Error when elements are missing.
    FileDigest finish() {
        while (current_ < tensors_.size() && done_ == tensors_[current_].num_elements) {
            ++current_, done_ = 0;
        }
        CHECK(current_ == tensors_.size(), "%s: elements of tensor %s were not written", path_.c_str(),
              tensors_[current_].name.c_str());
        return file_.finish();
    }

  private:
    void write_as(Dtype dtype, const float* values, uint64_t num_elements) {
        if (dtype == Dtype::F32) {
            file_.write(values, num_elements * 4);
            return;
        }
        constexpr uint64_t BUFFER = (uint64_t)1 << 20;
        buffer_.resize(std::min(num_elements, BUFFER));
        for (uint64_t begin = 0; begin < num_elements; begin += BUFFER) {
            const uint64_t count = std::min(num_elements - begin, BUFFER);
            for (uint64_t i = 0; i < count; ++i) {
                buffer_[i] = dtype == Dtype::BF16 ? float_to_bf16(values[begin + i]) : float_to_fp16(values[begin + i]);
            }
            file_.write(buffer_.data(), count * 2);
        }
    }

    std::string path_;
    std::vector<SafetensorsTensor> tensors_;
    DurableFile file_;
    size_t current_ = 0;  // the tensor being written
    uint64_t done_ = 0;   // of its elements
    std::vector<uint16_t> buffer_;
};
