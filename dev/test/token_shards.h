// token_shards.h: llm.c token shards for tests, right ones and such whose header lies.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

// magic 20240801: 4 bytes a token, any other: 2. stated: the number of tokens that the header names.
inline std::string shard_bytes(uint32_t magic, uint32_t version, uint32_t stated, const std::vector<uint32_t>& tokens) {
    std::vector<uint32_t> header(256, 0);
    header[0] = magic, header[1] = version, header[2] = stated;
    std::string bytes((const char*)header.data(), 1024);
    for (const uint32_t token : tokens) {
        bytes.append((const char*)&token, magic == 20240801 ? 4 : 2);
    }
    return bytes;
}
