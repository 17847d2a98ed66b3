// tokens.h: training data: files -> one stream of tokens -> sequences of T + 1 tokens in a random order.
//
// A file is either raw bytes, each a token, with tokens 256 and 257 before and behind it (--byte_markers), or an llm.c
// token shard: 256 int32 (magic number, version, number of tokens, zeros), then the tokens, all little-endian:
//   magic 20240520, version 1   uint16 tokens
//   magic 20240801, version 7   uint32 tokens
// The stream is all files one behind the other: sequences run across their borders, so a sequence may be longer than
// any file. Files are mapped, nothing is copied but the tokens of the batch at hand, and all offsets are 64 bits.
#pragma once
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <glob.h>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <sys/stat.h>
#include <vector>

#include "check.h"
#include "config.h"
#include "mapped_file.h"
#include "random.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "shards are read as they lie in the file");

constexpr int32_t BEGIN_MARKER = 256, END_MARKER = 257;  // around a file of bytes

// ---- one file -----------------------------------------------------------------------------------

// The tokens of a file whose bytes lie in memory.
struct TokenFile {
    std::string path;             // for messages
    const unsigned char* stored;  // the first token
    int width = 1;                // bytes of a stored token: 1, 2 or 4
    int64_t num_stored = 0;       // tokens in the file
    bool is_bytes = true;         // raw bytes rather than a shard
    bool has_markers = false;     // BEGIN_MARKER before and END_MARKER behind
    int64_t vocab_size = 0;       // every token is below it

    int64_t num_tokens() const { return num_stored + (has_markers ? 2 : 0); }

    // Tokens [begin, begin + count) of the file, which has them. Throws Error for one outside the vocabulary.
    void read(int64_t begin, int64_t count, int32_t* out) const {
        if (has_markers) {
            if (count > 0 && begin == 0) {
                *out++ = BEGIN_MARKER;
                begin += 1, count -= 1;
            }
            begin -= 1;
            if (count > 0 && begin + count == num_stored + 1) {
                out[--count] = END_MARKER;
            }
        }
        switch (width) {
            case 1:
                return read_stored<uint8_t>(begin, count, out);
            case 2:
                return read_stored<uint16_t>(begin, count, out);
            default:
                return read_stored<uint32_t>(begin, count, out);
        }
    }

  private:
    template <class Stored>
    void read_stored(int64_t begin, int64_t count, int32_t* out) const {
        uint32_t largest = 0;
        for (int64_t i = 0; i < count; ++i) {
            Stored token;
            std::memcpy(&token, stored + (begin + i) * (int64_t)sizeof(Stored), sizeof token);
            largest = std::max<uint32_t>(largest, token);
            out[i] = (int32_t)token;
        }
        if (largest >= vocab_size) {
            const int64_t at =
                std::find_if(out, out + count, [&](int32_t t) { return (uint32_t)t >= vocab_size; }) - out;
            fail(
                "%s: token %u at position %lld is outside the vocabulary: --vocab_size is %lld (that of the tokenizer "
                "which made the shard: GPT-2's has 50257 tokens, Llama 3's 128256)",
                path.c_str(), (uint32_t)out[at], (long long)(begin + at), (long long)vocab_size);
        }
    }
};

constexpr const char* TOKEN_SHARD = "token shard";  // in descriptions of data, state.json's among them

// The two kinds of shards.
struct ShardKind {
    uint32_t magic, version;
    int width;
};
constexpr ShardKind SHARD_KINDS[] = {{20240520, 1, 2}, {20240801, 7, 4}};
constexpr uint64_t SHARD_HEADER_BYTES = 256 * sizeof(int32_t);

// Why a file is likely not meant to be trained on as bytes, by how it begins or is named, to follow "FILE: "; empty
// when it may be text.
inline std::string packed_kind(const std::string& path, const unsigned char* data, uint64_t size) {
    using namespace std::string_view_literals;
    const std::string_view begin(reinterpret_cast<const char*>(data), std::min<uint64_t>(size, 16));
    const auto begins = [&](std::string_view with) { return begin.substr(0, with.size()) == with; };
    if (begins("\x1f\x8b"sv) || begins("\x28\xb5\x2f\xfd"sv) || begins("\xfd\x37zXZ\0"sv) || begins("PK\3\4"sv)) {
        return "is packed: unpack it";
    }
    if (begins("PAR1"sv)) {
        return "is a Parquet file: write its texts out (dev/data/prepare.py --dataset does, of Hugging Face's data)";
    }
    if (begins("\x93NUMPY"sv)) {
        return "is a NumPy array: token shards have a header of their own (README, or dev/data/prepare.py)";
    }
    const std::string_view name = path, shard = ".bin";
    return name.size() > shard.size() && name.substr(name.size() - shard.size()) == shard
               ? "is named like a token shard, but does not begin with the number 20240520 (uint16) or 20240801 "
                 "(uint32)"
               : "";
}

// Finds the tokens in a file's bytes data[0, size), which must outlive the result. Throws Error naming `path` when the
// format asked for is not there, the file is cut off or holds no tokens, or its bytes do not fit the vocabulary.
inline TokenFile parse_token_file(const std::string& path, const unsigned char* data, uint64_t size, DataFormat format,
                                  bool byte_markers, int64_t vocab_size) {
    CHECK(size > 0, "%s: is empty; leave it out", path.c_str());
    CHECK(size <= (uint64_t)INT64_MAX - 2, "%s: is too long", path.c_str());
    uint32_t header[3] = {};  // magic, version, number of tokens
    std::memcpy(header, data, std::min<uint64_t>(size, sizeof header));
    const ShardKind* kind = std::find_if(std::begin(SHARD_KINDS), std::end(SHARD_KINDS),
                                         [&](const ShardKind& k) { return size >= 4 && k.magic == header[0]; });
    if (kind == std::end(SHARD_KINDS)) {
        CHECK(format != DataFormat::shards,
              "%s: is no token shard: it does not begin with the number 20240520 (uint16) or 20240801 (uint32)",
              path.c_str());
        // The other files of llm.c begin with a date as a number too. Text does not: its fourth byte is not 1.
        CHECK(
            format == DataFormat::bytes || size < 4 || header[0] < 20230000 || header[0] > 20991231,
            "%s: begins with the number %u, like a file of llm.c that is no token shard; --data_format bytes trains on "
            "its bytes all the same",
            path.c_str(), header[0]);
    }
    if (format == DataFormat::automatic && kind == std::end(SHARD_KINDS)) {
        const std::string what = packed_kind(path, data, size);
        CHECK(what.empty(), "%s: %s; --data_format bytes trains on its bytes all the same", path.c_str(), what.c_str());
    }
    if (kind == std::end(SHARD_KINDS) || format == DataFormat::bytes) {
        CHECK(vocab_size >= 256, "--vocab_size %lld: %s is read as bytes, which need at least 256",
              (long long)vocab_size, path.c_str());
        CHECK(!byte_markers || vocab_size > END_MARKER,
              "--byte_markers: tokens 256 and 257 are outside --vocab_size %lld; give --byte_markers false, or "
              "--vocab_size 258",
              (long long)vocab_size);
        return {path, data, 1, (int64_t)size, true, byte_markers, vocab_size};
    }
    CHECK(size >= SHARD_HEADER_BYTES, "%s: is cut off inside its header: %llu of %llu bytes", path.c_str(),
          (unsigned long long)size, (unsigned long long)SHARD_HEADER_BYTES);
    CHECK(header[1] == kind->version,
          "%s: is a token shard of version %u; with its magic number %u only version %u is known", path.c_str(),
          header[1], kind->magic, kind->version);
    CHECK(header[2] > 0, "%s: is a token shard without tokens; leave it out", path.c_str());
    const uint64_t expected =
        checked_add(SHARD_HEADER_BYTES, checked_mul(header[2], kind->width, path.c_str()), path.c_str());
    CHECK(size == expected, "%s: is %s: its header states %u tokens, which make %llu bytes, but it has %llu",
          path.c_str(), size < expected ? "cut off" : "too long", header[2], (unsigned long long)expected,
          (unsigned long long)size);
    return {path, data + SHARD_HEADER_BYTES, kind->width, (int64_t)header[2], false, false, vocab_size};
}

// ---- many files as one stream -------------------------------------------------------------------

// A pattern that matches this name alone.
inline std::string glob_escape(const std::string& name) {
    std::string pattern;
    for (const char c : name) {
        pattern += std::string("*?[\\").find(c) == std::string::npos ? "" : "\\";
        pattern += c;
    }
    return pattern;
}

// " from FOLDER" behind a relative name that is not there: it may be that of a run which was started elsewhere.
inline std::string looked_for_from(const std::string& name) {
    std::error_code error;
    const std::filesystem::path here = std::filesystem::current_path(error);
    return name[0] == '/' || error ? "" : " from " + here.string();
}

// The files that `patterns`, the values of `flag`, stand for: names of files as they are, patterns (*, ?, [a-z])
// replaced by the files that they match, sorted. Throws Error for one that stands for nothing. Of what a pattern
// matches, folders do not count, and empty files go to `empty`.
inline std::vector<std::string> expand_patterns(const std::string& flag, const std::vector<std::string>& patterns,
                                                std::vector<std::string>& empty) {
    std::vector<std::string> paths;
    for (const std::string& pattern : patterns) {
        struct stat status;
        if (stat(pattern.c_str(), &status) == 0) {
            CHECK(!S_ISDIR(status.st_mode), "%s %s: is a folder; name the files in it: %s %s", flag.c_str(),
                  pattern.c_str(), flag.c_str(), shell_quote(glob_escape(pattern) + "/*").c_str());
            CHECK(S_ISREG(status.st_mode), "%s %s: is a device or pipe, not a file", flag.c_str(), pattern.c_str());
            paths.push_back(pattern);
            continue;
        }
        const int error = errno;
        CHECK(pattern.find_first_of("*?[") != std::string::npos, "%s %s: cannot find this file%s: %s", flag.c_str(),
              pattern.c_str(), looked_for_from(pattern).c_str(), std::strerror(error));
        CHECK(("/" + pattern + "/").find("/**/") == std::string::npos,
              "%s '%s': ** stands for one folder here, as * does; name each depth: 'a/*.txt' 'a/*/*.txt'", flag.c_str(),
              pattern.c_str());
        static thread_local std::string unread;  // of the first folder on the way that cannot be read
        unread.clear();
        const auto note = [](const char* folder, int error) {
            if (unread.empty() && error != ENOENT) {
                unread = format_string("%s cannot be read: %s", folder, std::strerror(error));
            }
            return 0;  // go on
        };
        glob_t found = {};
        const int result = glob(pattern.c_str(), 0, note, &found);
        const std::vector<std::string> matches(found.gl_pathv, found.gl_pathv + (result == 0 ? found.gl_pathc : 0));
        globfree(&found);
        CHECK(result == 0 || result == GLOB_NOMATCH, "%s '%s': cannot list the files of this pattern", flag.c_str(),
              pattern.c_str());
        CHECK(!matches.empty() || unread.empty(), "%s '%s': no file matches this pattern, but %s", flag.c_str(),
              pattern.c_str(), unread.c_str());
        const size_t num_before = paths.size();
        for (const std::string& match : matches) {
            const bool known = stat(match.c_str(), &status) == 0;
            if (known && S_ISREG(status.st_mode) && status.st_size == 0) {
                empty.push_back(match);
            } else if (!known || !S_ISDIR(status.st_mode)) {  // what is wrong with others is said when they are opened
                paths.push_back(match);
            }
        }
        CHECK(paths.size() > num_before, "%s '%s': no file%s matches this pattern%s", flag.c_str(), pattern.c_str(),
              matches.empty() ? "" : " with anything in it", looked_for_from(pattern).c_str());
    }
    return paths;
}

class TokenStream {
  public:
    // The files of `patterns`, the values of `flag`. Throws Error when one cannot be used, and when files of bytes and
    // shards, whose tokens mean different things, are mixed.
    TokenStream(const std::string& flag, const std::vector<std::string>& patterns, DataFormat format, bool byte_markers,
                int64_t vocab_size) {
        for (const std::string& path : expand_patterns(flag, patterns, empty_)) {
            mapped_.emplace_back(path);
            const MappedFile& file = mapped_.back();
            files_.push_back(parse_token_file(path, file.data(), file.size(), format, byte_markers, vocab_size));
            CHECK(files_.back().is_bytes == files_.front().is_bytes,
                  "%s: %s is %s and %s is %s; a run reads one of the two", flag.c_str(), files_.front().path.c_str(),
                  kind_name(files_.front()), path.c_str(), kind_name(files_.back()));
            const uint64_t end =
                checked_add((uint64_t)num_tokens(), (uint64_t)files_.back().num_tokens(), flag.c_str());
            CHECK(end <= (uint64_t)INT64_MAX, "%s: more than 2^63 tokens", flag.c_str());
            ends_.push_back((int64_t)end);
        }
    }

    int64_t num_tokens() const { return ends_.empty() ? 0 : ends_.back(); }
    bool is_bytes() const { return !files_.empty() && files_.front().is_bytes; }
    const std::vector<TokenFile>& files() const { return files_; }    // in their order
    const std::vector<std::string>& empty() const { return empty_; }  // files that a pattern matched, left out

    // Tokens [begin, begin + count) of the stream, which has them. Throws Error, naming file and position, for a token
    // outside the vocabulary, and for a file that has become shorter.
    void read(int64_t begin, int64_t count, int32_t* out) const {
        size_t file = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin();
        while (count > 0) {
            const int64_t file_begin = file == 0 ? 0 : ends_[file - 1];
            const int64_t now = std::min(count, ends_[file] - begin);
            mapped_[file].check_not_shorter();
            files_[file].read(begin - file_begin, now, out);
            begin += now, count -= now, out += now, ++file;
        }
    }

    // "3 token shards"
    std::string description() const {
        const size_t n = files_.size();
        return format_string("%zu %s%s", n, is_bytes() ? "file" : TOKEN_SHARD, n == 1 ? "" : "s") +
               (is_bytes() ? " of bytes" : "");
    }

  private:
    static const char* kind_name(const TokenFile& file) { return file.is_bytes ? "a file of bytes" : "a token shard"; }

    std::vector<MappedFile> mapped_;
    std::vector<TokenFile> files_;
    std::vector<int64_t> ends_;       // the stream's position behind each file
    std::vector<std::string> empty_;  // what was left out
};

// ---- sequences ----------------------------------------------------------------------------------

// Sequences of T + 1 tokens (T inputs, and the same shifted by one as targets) from a part of a stream. Sequence i
// begins T * i tokens into the part, so that every token but the first is a target once an epoch.
class SequenceSet {
  public:
    // Tokens [begin, end) of `stream`, in their order or, with a seed, in a new random order each epoch. `what` names
    // the data in the Error thrown when it is shorter than one sequence.
    SequenceSet(std::shared_ptr<const TokenStream> stream, int64_t begin, int64_t end, int64_t T,
                std::optional<uint64_t> shuffle_seed, const std::string& what)
        : stream_(std::move(stream)),
          begin_(begin),
          T_(T),
          is_shuffled_(shuffle_seed.has_value()),
          shuffle_seed_(shuffle_seed.value_or(0)) {
        CHECK(end - begin > T, "--seq_len %lld: a sequence and its targets are %lld tokens, but %s has only %lld",
              (long long)T, (long long)T + 1, what.c_str(), (long long)(end - begin));
        num_tokens_ = end - begin;
        num_sequences_ = (num_tokens_ - 1) / T;
    }

    int64_t num_sequences() const { return num_sequences_; }  // of an epoch; at least 1
    int64_t num_tokens() const { return num_tokens_; }        // of the part
    const TokenStream& stream() const { return *stream_; }

    // The sequence at `position` of the endless order, epoch after epoch, into out [T + 1]. Which one it is depends on
    // the data, T, the seed and `position` alone.
    void read(int64_t position, int32_t* out) const { stream_->read(begin_ + sequence_at(position) * T_, T_ + 1, out); }

    int64_t sequence_at(int64_t position) const {
        const uint64_t epoch = (uint64_t)(position / num_sequences_), place = (uint64_t)(position % num_sequences_);
        if (!is_shuffled_) {
            return (int64_t)place;
        }
        const RandomStream random(shuffle_seed_, RandomUse::data_order, epoch);
        return (int64_t)RandomPermutation((uint64_t)num_sequences_, random)(place);
    }

  private:
    std::shared_ptr<const TokenStream> stream_;
    int64_t begin_, T_;
    bool is_shuffled_;
    uint64_t shuffle_seed_;
    int64_t num_tokens_ = 0, num_sequences_ = 0;
};

// What a run reads.
struct RunData {
    std::optional<SequenceSet> train;       // shuffled; no value when the run only evaluates
    std::optional<SequenceSet> validation;  // in file order; no value when there is none
};

// Opens the data that `c` names: validation data are --val_data, or else the last --val_fraction of --train_data. Reads
// a sequence of each, so that data of another vocabulary are refused here; a token that is outside it further on is
// when it is read.
inline RunData open_data(const RunConfig& c) {
    auto open_stream = [&](const char* flag, const std::vector<std::string>& patterns) {
        return std::make_shared<const TokenStream>(flag, patterns, c.data_format, c.byte_markers, c.model.vocab_size);
    };
    RunData data;
    const bool split = c.splits_train_data();
    if (c.max_steps > 0 || split) {
        const std::shared_ptr<const TokenStream> stream = open_stream("--train_data", c.train_data);
        const int64_t N = stream->num_tokens(), border = split ? N - (int64_t)(c.val_fraction * (double)N) : N;
        if (c.max_steps > 0) {
            data.train.emplace(
                stream, 0, border, c.seq_len, c.shuffle_seed,
                split ? format_string("--train_data less --val_fraction %g", c.val_fraction) : "--train_data");
        }
        if (split) {
            data.validation.emplace(stream, border, N, c.seq_len, std::nullopt,
                                    format_string("--val_fraction %g of --train_data", c.val_fraction));
        }
    }
    if (!c.val_data.empty()) {
        const std::shared_ptr<const TokenStream> stream = open_stream("--val_data", c.val_data);
        CHECK(!data.train || data.train->stream().is_bytes() == stream->is_bytes(),
              "--val_data: is %s, but --train_data is %s; a loss on other tokens says nothing",
              stream->description().c_str(), data.train->stream().description().c_str());
        data.validation.emplace(stream, 0, stream->num_tokens(), c.seq_len, std::nullopt, "--val_data");
    }
    std::vector<int32_t> sequence(c.seq_len + 1);
    for (const std::optional<SequenceSet>* set : {&data.train, &data.validation}) {
        if (*set) {
            (*set)->read(0, sequence.data());
        }
    }
    return data;
}
