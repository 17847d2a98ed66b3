// fuzz_tokens.cpp: any bytes as a data file: refused with an Error, or every token of it can be read and lies in the
// vocabulary, in one piece and in two. The first byte chooses format, markers, vocabulary and the cut.
#include <cstdlib>

#include "llmc/tokens.h"

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
