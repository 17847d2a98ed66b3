// fuzz_seeds.h: inputs for a fuzzer to start from, in code rather than in files.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

// What LLVMFuzzerCustomMutator does: mostly libFuzzer's own changes to `data`; now and then, and always to the nearly
// empty inputs of the beginning, to one of `seeds` instead. Returns the new size.
inline size_t mutate_from_seeds(const std::vector<std::string>& seeds, uint8_t* data, size_t size, size_t max_size,
                                unsigned random) {
    if (size < 4 || random % 64 == 0) {
        const std::string& seed = seeds[random / 64 % seeds.size()];
        if (seed.size() <= max_size) {
            std::memcpy(data, seed.data(), seed.size());
            size = seed.size();
            if (random / 64 / seeds.size() % 4 == 0) {
                return size;  // as it is
            }
        }
    }
    return LLVMFuzzerMutate(data, size, max_size);
}
