// fuzz_safetensors.cpp: any bytes as a safetensors file. What is accepted must be consistent, every tensor readable to
// its last byte, and no two tensors may share one.
#include <cstdlib>

#include "dev/test/fuzz_seeds.h"
#include "llmc/safetensors.h"

namespace {

void require(bool condition) {
    if (!condition) {
        std::abort();
    }
}

std::string with_length(const std::string& header, size_t data_bytes) {
    std::string bytes;
    for (int i = 0; i < 8; ++i) {
        bytes += (char)((uint64_t)header.size() >> 8 * i);
    }
    return bytes + header + std::string(data_bytes, '\x3f');
}

const std::vector<std::string> SEEDS = {
    with_length("{}", 0),
    with_length(R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}})", 24),
    with_length(R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[4],"data_offsets":[6,14]},)"
                R"("a":{"dtype":"F16","shape":[1,3],"data_offsets":[0,6]}}   )",
                14),
    with_length(
        R"({"s":{"dtype":"I64","shape":[],"data_offsets":[0,8]},"e":{"dtype":"U8","shape":[0,18446744073709551615],)"
        R"("data_offsets":[8,8]}})",
        8),
};

}  // namespace

// Half of the changed files get a length that is right for their header, or nothing but the length would ever be tried.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
    size = mutate_from_seeds(SEEDS, data, size, max_size, seed);
    if (seed % 2 == 0 && size > 8) {
        size_t end = size;
        while (end > 8 && data[end - 1] != '}') {
            --end;
        }
        const uint64_t length = end - 8;
        for (int i = 0; i < 8; ++i) {
            data[i] = (uint8_t)(length >> 8 * i);
        }
    }
    return size;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    SafetensorsHeader header;
    try {
        header = parse_safetensors_header(data, size, "file");
    } catch (const Error& error) {
        require(std::string(error.what()).find('\n') == std::string::npos);
        return 0;
    }
    uint64_t num_bytes = header.data_begin;
    for (const SafetensorsTensor& tensor : header.tensors) {
        require(header.data_begin + tensor.begin == num_bytes);
        num_bytes += tensor.num_bytes();
        require(num_bytes <= size);
        if (is_weight_dtype(tensor.dtype)) {
            std::vector<float> values(tensor.num_elements);
            convert_to_floats(values.data(), data + header.data_begin + tensor.begin, tensor.dtype,
                              tensor.num_elements);
        }
    }
    require(num_bytes == size);
    return 0;
}
