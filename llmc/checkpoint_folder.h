// checkpoint_folder.h: the checkpoint folders of a run: their names, the manifest with a hash of every file, which of
// them are whole, which is the newest, and which go beyond --keep_checkpoints. Their files: checkpoint.h.
#pragma once
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "check.h"         // errors
#include "durable_file.h"  // lengths and hashes of files
#include "json.h"          // manifest.json
#include "regular_file.h"  // which errors are damage

namespace checkpoint {

namespace fs = std::filesystem;

constexpr const char* MANIFEST = "manifest.json";
constexpr const char* MANIFEST_FORMAT = "llmc checkpoint";  // what it begins with
constexpr const char* STATE = "state.json";
constexpr const char* WEIGHTS = "model.safetensors";
constexpr const char* WEIGHTS_INDEX = "model.safetensors.index.json";
constexpr const char* OPTIMIZER = "optimizer-";  // what its files begin with
constexpr const char* PARTIAL = ".partial-";

// ---- the manifest ------------------------------------------------------------------------------

using Manifest = std::map<std::string, FileDigest>;  // by file name

// Whether a name out of a file names a file in its own folder.
inline bool is_plain_name(const std::string& name) {
    return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
           name.find('\0') == std::string::npos;
}

// Without a line end: whatever is cut off, it is no JSON any more.
inline std::string manifest_text(const Manifest& manifest) {
    Json files = Json::object();
    for (const auto& [name, digest] : manifest) {
        files[name] = {{"bytes", digest.num_bytes},
                       {"xxh3", format_string("%016llx", (unsigned long long)digest.xxh3)}};
    }
    return Json({{"format", MANIFEST_FORMAT}, {"version", 1}, {"files", files}}).dump(1);
}

// Throws Error, naming `path`, for text that is not a manifest.
inline Manifest parse_manifest(std::string_view text, const std::string& path) {
    const JsonValue json = parse_json(text, path);
    const JsonObject object(json, path);
    CHECK(object.text("format") == MANIFEST_FORMAT && object.integer("version", 0, INT64_MAX) == 1,
          "%s: is not a checkpoint's manifest of version 1", path.c_str());
    const JsonObject files = object.object("files");
    Manifest manifest;
    for (const auto& [name, value] : object.at("files").items()) {
        CHECK(is_plain_name(name), "%s: '%s' is not the name of a file in this folder", path.c_str(),
              printable(name).c_str());
        const JsonObject entry(value, path + ": " + printable(name));
        const std::string hash = entry.text("xxh3");
        CHECK(hash.size() == 16 && hash.find_first_not_of("0123456789abcdef") == std::string::npos,
              "%s: the hash of %s must be 16 hexadecimal digits", path.c_str(), printable(name).c_str());
        manifest[name] = {(uint64_t)entry.integer("bytes", 0, INT64_MAX), std::stoull(hash, nullptr, 16)};
    }
    return manifest;
}

// Throws Error when `name` in `folder` is missing, has another length than the manifest says or, with `contents`, other
// bytes; UnreadableFile when that cannot be known. progress: as of digest_file.
inline void verify_file(const std::string& folder, const std::string& name, const FileDigest& expected, bool contents,
                        std::atomic<uint64_t>* progress = nullptr) {
    const std::string path = folder + "/" + name;
    const uint64_t num_bytes = RegularFile(path).num_bytes();
    CHECK(num_bytes == expected.num_bytes, "%s: has %llu bytes and not the %llu that %s says", path.c_str(),
          (unsigned long long)num_bytes, (unsigned long long)expected.num_bytes, MANIFEST);
    CHECK(!contents || digest_file(path, progress).xxh3 == expected.xxh3,
          "%s: is damaged: its bytes are not those that %s says (to start from it all the same with --init_from, "
          "delete %s/%s)",
          path.c_str(), MANIFEST, folder.c_str(), MANIFEST);
}

// As verify_file, with contents, for all files. Large checkpoints are read by all threads.
inline void verify_contents(const std::string& folder, const Manifest& manifest, std::atomic<uint64_t>* progress) {
    const std::vector<std::pair<std::string, FileDigest>> files(manifest.begin(), manifest.end());
    uint64_t num_bytes = 0;
    for (const auto& [name, digest] : files) {
        num_bytes += digest.num_bytes;
    }
    std::vector<std::exception_ptr> errors(files.size());
#pragma omp parallel for schedule(dynamic) if (num_bytes > (uint64_t)64 << 20)
    for (size_t i = 0; i < files.size(); ++i) {
        try {
            verify_file(folder, files[i].first, files[i].second, true, progress);
        } catch (...) {
            errors[i] = std::current_exception();
        }
    }
    for (const std::exception_ptr& error : errors) {
        if (error) {
            std::rethrow_exception(error);
        }
    }
}

// A symbolic link to what is not there, as when the disk it leads to is not mounted.
inline bool is_link_to_nothing(const std::string& path) {
    std::error_code error;
    return fs::is_symlink(fs::symlink_status(path, error)) &&
           fs::status(path, error).type() == fs::file_type::not_found;
}

// The manifest of a checkpoint all of whose files are there and have the stated lengths and, with `contents`, hashes.
// Throws Error saying what is wrong otherwise, UnreadableFile when that cannot be known. progress: as of digest_file.
inline Manifest verify(const std::string& folder, bool contents, std::atomic<uint64_t>* progress = nullptr) {
    if (is_link_to_nothing(folder)) {
        throw UnreadableFile(folder + ": is a link to nothing");
    }
    const std::string path = folder + "/" + MANIFEST;
    const Manifest manifest = parse_manifest(read_text_file(path), path);
    for (const char* name : {"config.json", WEIGHTS, STATE}) {
        CHECK(manifest.count(name) > 0, "%s: lacks %s", path.c_str(), name);
    }
    for (const auto& [name, digest] : manifest) {
        verify_file(folder, name, digest, false);
    }
    if (contents) {
        verify_contents(folder, manifest, progress);
    }
    return manifest;
}

// ---- folders of an output folder ---------------------------------------------------------------

inline bool exists(const std::string& path) {
    std::error_code error;
    return fs::exists(path, error);
}

// "step00000400"
inline std::string folder_name(int64_t step) { return format_string("step%08lld", (long long)step); }

// The step of a folder's name; no value for other names.
inline std::optional<int64_t> step_of(const std::string& name) {
    const std::string digits = name.substr(0, 4) == "step" ? name.substr(4) : "";
    if (digits.empty() || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos) {
        return std::nullopt;
    }
    const int64_t step = std::stoll(digits);
    return name == folder_name(step) ? std::optional<int64_t>(step) : std::nullopt;
}

// The names in a folder; none when it does not exist.
inline std::vector<std::string> names_in(const std::string& folder) {
    std::vector<std::string> names;
    std::error_code error;
    for (fs::directory_iterator it(folder, error); !error && it != fs::directory_iterator(); it.increment(error)) {
        names.push_back(it->path().filename().string());
    }
    CHECK(!error || error == std::errc::no_such_file_or_directory, "%s: cannot list this folder: %s", folder.c_str(),
          error.message().c_str());
    return names;
}

// The manifest of a folder that was written here; no value without one, or with a manifest.json of another tool's.
// Throws Error for one of ours that is damaged: what its first line does not say any more, the files beside it do,
// which checkpoints alone have.
inline std::optional<Manifest> own_manifest(const std::string& folder) {
    const std::string path = folder + "/" + MANIFEST;
    if (!exists(path)) {
        return std::nullopt;
    }
    const std::string text = read_text_file(path);
    bool is_ours = text.find(MANIFEST_FORMAT) != std::string::npos;
    for (const std::string& name : names_in(folder)) {
        is_ours = is_ours || name == STATE || name.rfind(OPTIMIZER, 0) == 0;
    }
    return is_ours ? std::optional<Manifest>(parse_manifest(text, path)) : std::nullopt;
}

// What in a folder has the name of a checkpoint, by step.
inline std::map<int64_t, std::string> named_as_checkpoints(const std::string& output_dir) {
    std::map<int64_t, std::string> paths;
    for (const std::string& name : names_in(output_dir)) {
        if (const std::optional<int64_t> step = step_of(name)) {
            paths[*step] = output_dir + "/" + name;
        }
    }
    return paths;
}

// All checkpoint folders by step, whole or not, and what may be one but cannot be looked at; empty when the output
// folder does not exist.
inline std::map<int64_t, std::string> list(const std::string& output_dir) {
    std::map<int64_t, std::string> folders;
    for (const auto& [step, path] : named_as_checkpoints(output_dir)) {
        std::error_code error;
        const fs::file_status status = fs::status(path, error);
        if (fs::is_directory(status) || !fs::status_known(status) || is_link_to_nothing(path)) {
            folders[step] = path;
        }
    }
    return folders;
}

// Throws Error for a file where a checkpoint may have to go, which would replace it.
inline void check_has_no_file_named_as_one(const std::string& output_dir) {
    for (const auto& [step, path] : named_as_checkpoints(output_dir)) {
        std::error_code error;
        const fs::file_status status = fs::status(path, error);
        CHECK(!fs::exists(status) || fs::is_directory(status),
              "%s: is a file, and has the name of a checkpoint's folder: move it away", path.c_str());
    }
}

inline void remove_folder(const std::string& folder) {
    std::error_code error;
    fs::remove_all(folder, error);
    CHECK(!error, "%s: cannot remove this folder: %s", folder.c_str(), error.message().c_str());
}

inline void rename_folder(const std::string& from, const std::string& to) {
    CHECK(std::rename(from.c_str(), to.c_str()) == 0, "%s: cannot rename it to %s: %s", from.c_str(), to.c_str(),
          std::strerror(errno));
}

// What is not needed any more: that it stays costs space alone, so that is said and training goes on. Whether it went.
inline bool remove_if_possible(const std::string& folder) {
    try {
        remove_folder(folder);
    } catch (const Error& error) {
        std::fprintf(stderr, "%s; it stays\n", error.what());
        return false;
    }
    return true;
}

// What an interrupted save or removal has left.
inline void remove_leftovers(const std::string& output_dir) {
    for (const std::string& name : names_in(output_dir)) {
        if (name.rfind(std::string(PARTIAL) + "step", 0) == 0) {
            remove_if_possible(output_dir + "/" + name);
        }
    }
}

// By the lengths of its files.
inline bool is_whole(const std::string& folder) {
    try {
        verify(folder, false);
    } catch (const Error&) {
        return false;
    }
    return true;
}

// Never half a checkpoint under its name. One that cannot be removed stays.
inline void remove_checkpoint(const std::string& output_dir, int64_t step, const std::string& folder) {
    const std::string partial = output_dir + "/" + PARTIAL + folder_name(step);
    try {
        rename_folder(folder, partial);
        if (!remove_if_possible(partial) && is_whole(partial)) {
            rename_folder(partial, folder);
        }
    } catch (const Error& error) {
        std::fprintf(stderr, "%s; it stays\n", error.what());
    }
}

// Removes the oldest checkpoints: `keep` stay, `newest` (just written) among them. Those that cannot be whole, by their
// files' lengths or as steps of `damaged`, neither count nor go; nor do those of later steps, which a resumed run has
// passed over. One that cannot be removed stays.
inline void prune(const std::string& output_dir, int64_t newest, int64_t keep, const std::set<int64_t>& damaged = {}) {
    const std::map<int64_t, std::string> folders = list(output_dir);
    int64_t num_kept = 1;
    for (auto it = folders.rbegin(); it != folders.rend(); ++it) {
        const auto& [step, folder] = *it;
        if (step >= newest) {
            continue;
        }
        if (damaged.count(step) == 0 && is_whole(folder) && ++num_kept > keep) {
            remove_checkpoint(output_dir, step, folder);
        }
    }
}

}  // namespace checkpoint

// ---- what a run calls --------------------------------------------------------------------------

// The newest checkpoint in `output_dir` that is whole: every file's hash is compared with its manifest, which reads it
// once. No value when there is none. Newer ones that are damaged are passed over; `damaged` gets a sentence for each,
// by its step. Throws Error for a newer one that cannot be read: it may be whole, and a run that went on from an older
// one would prune it later. progress: as of digest_file. Who evaluates has no lock: where a run under way prunes what
// is being read, it has written a newer one, which is looked for, looks_left times.
inline std::optional<std::string> find_newest_checkpoint(const std::string& output_dir,
                                                         std::map<int64_t, std::string>* damaged = nullptr,
                                                         std::atomic<uint64_t>* progress = nullptr,
                                                         int looks_left = 8) {
    const std::map<int64_t, std::string> folders = checkpoint::list(output_dir);
    for (auto it = folders.rbegin(); it != folders.rend(); ++it) {
        try {
            checkpoint::verify(it->second, true, progress);
            return it->second;
        } catch (const UnreadableFile& error) {
            fail(
                "%s; so nobody knows whether this checkpoint is whole: make it readable, or move its folder away to "
                "go on from the one before",
                error.what());
        } catch (const Error& error) {
            if (looks_left > 0 && !checkpoint::exists(it->second)) {
                return find_newest_checkpoint(output_dir, damaged, progress, looks_left - 1);
            }
            if (damaged != nullptr) {
                (*damaged)[it->first] = error.what();
            }
        }
    }
    return std::nullopt;
}

// read(), which reads the checkpoint in `folder`. Throws its Error or, where the folder is gone by then, one that says
// so.
template <class Read>
auto read_while_it_is_there(const std::string& folder, const Read& read) {
    try {
        return read();
    } catch (const Error&) {
        CHECK(checkpoint::exists(folder),
              "%s: was removed while it was read, as a run under way does with --keep_checkpoints: start again",
              folder.c_str());
        throw;
    }
}
