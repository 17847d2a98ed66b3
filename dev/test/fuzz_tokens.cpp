// fuzz_tokens.cpp: any bytes as a data file: refused with an Error, or every token of it can be read and lies in the
// vocabulary, in one piece and in two. The first byte chooses format, markers, vocabulary and the cut.
#include <cstdlib>

#include "dev/test/fuzz_seeds.h"
#include "llmc/tokens.h"

namespace {

// A choice and a whole shard: how the rest is changed, the fuzzer finds out.
std::string shard_seed(uint8_t choice, const ShardKind& kind, uint32_t num_tokens) {
    std::string bytes(1 + SHARD_HEADER_BYTES + (uint64_t)num_tokens * kind.width, '\1');
    const uint32_t header[3] = {kind.magic, kind.version, num_tokens};
    bytes[0] = (char)choice;
    std::memcpy(bytes.data() + 1, header, sizeof header);
    return bytes;
}

std::vector<std::string> make_seeds() {
    std::vector<std::string> seeds = {"text of a file"};
    for (const ShardKind& kind : SHARD_KINDS) {
        for (const uint8_t choice : {(uint8_t)24, (uint8_t)116}) {  // vocabulary 2^30; in one piece, and cut at 3/8
            seeds.push_back(shard_seed(choice, kind, 1));
            seeds.push_back(shard_seed(choice, kind, 40));
        }
    }
    return seeds;
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
    static const std::vector<std::string> seeds = make_seeds();
    return mutate_from_seeds(seeds, data, size, max_size, seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) {
        return 0;
    }
    const uint8_t choice = data[0];
    const DataFormat formats[] = {DataFormat::automatic, DataFormat::bytes, DataFormat::shards};
    const int64_t vocab_sizes[] = {2, 256, 258, 50257, (int64_t)1 << 30};
    const int64_t vocab_size = vocab_sizes[choice / 6 % 5];
    try {
        const TokenFile file =
            parse_token_file("input", data + 1, size - 1, formats[choice % 3], choice / 3 % 2 == 1, vocab_size);
        const int64_t n = file.num_tokens(), cut = n * (choice / 30) / 8;
        std::vector<int32_t> whole(n), parts(n);
        file.read(0, n, whole.data());
        file.read(0, cut, parts.data());
        file.read(cut, n - cut, parts.data() + cut);
        bool good = whole == parts;
        for (const int32_t token : whole) {
            good = good && token >= 0 && token < vocab_size;
        }
        if (!good) {
            std::abort();
        }
    } catch (const Error&) {
    }
    return 0;
}
