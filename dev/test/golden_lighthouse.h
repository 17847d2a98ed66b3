// golden_lighthouse.h: outputs of the published Lighthouse implementation in safetensors files, where these are, and
// the CPU reference held against them. The file: q, k, v, dout [T, H, D] bf16 or float32; out, dq, dk, dv [T, H, D]
// float32; indices [H, S] int32, pyramid addresses in causal order, level 0 first; metadata T, H, D, levels, pool, topk
// as decimal numbers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "llmc/check.h"
#include "llmc/reference/lighthouse.h"
#include "llmc/safetensors.h"

// Where the files are, which are not part of the repository; empty: nowhere.
inline std::string golden_folder() {
    const char* named = std::getenv("LLMC_GOLDEN_DIR");
    return named != nullptr ? named : "";
}

// The peer_lighthouse_*.safetensors there, sorted; none where there is no such folder.
inline std::vector<std::string> golden_lighthouse_files() {
    std::vector<std::string> paths;
    std::error_code no_folder;
    for (const auto& file : std::filesystem::directory_iterator(golden_folder(), no_folder)) {
        const std::filesystem::path& path = file.path();
        if (path.filename().string().rfind("peer_lighthouse_", 0) == 0 && path.extension() == ".safetensors") {
            paths.push_back(path.string());
        }
    }
    std::sort(paths.begin(), paths.end());
    return paths;
}

// What a test says when there are none.
inline std::string no_golden_files() {
    return format_string("LLMC_GOLDEN_DIR '%s': names no folder with peer_lighthouse_*.safetensors",
                         golden_folder().c_str());
}

struct GoldenLighthouse {
    int64_t T = 0;
    int H = 0, D = 0;
    LighthouseConfig config;
    std::map<std::string, std::vector<float>> tensors;  // by name
    std::vector<int32_t> indices;                       // [H, S]
};

// Throws Error naming the file and what is wrong with it.
inline GoldenLighthouse read_golden_lighthouse(const std::string& path) {
    const SafetensorsFile file(path);
    const auto metadata = [&](const char* name, long long maximum) {
        const auto found = file.metadata().find(name);
        CHECK(found != file.metadata().end(), "%s: its metadata lack %s", path.c_str(), name);
        const std::string& text = found->second;
        const bool is_number =
            !text.empty() && text.size() <= 18 && text.find_first_not_of("0123456789") == std::string::npos;
        const long long number = is_number ? std::stoll(text) : 0;
        CHECK(number >= 1 && number <= maximum, "%s: metadata %s is '%s', must be a number from 1 to %lld",
              path.c_str(), name, printable(text).c_str(), maximum);
        return number;
    };
    GoldenLighthouse golden;
    golden.T = metadata("T", 1ll << 31), golden.H = (int)metadata("H", 1 << 16), golden.D = (int)metadata("D", 1 << 16);
    golden.config.levels = (int)metadata("levels", 64), golden.config.pool = (int)metadata("pool", 1 << 20);
    golden.config.topk = metadata("topk", 1ll << 31);
    const auto find = [&](const char* name, const std::vector<uint64_t>& shape) -> const SafetensorsTensor& {
        const SafetensorsTensor& tensor = file.at(name);
        CHECK(tensor.shape == shape, "%s: tensor %s has shape %s and not %s", path.c_str(), name,
              shape_text(tensor.shape).c_str(), shape_text(shape).c_str());
        return tensor;
    };
    const uint64_t T = (uint64_t)golden.T, H = (uint64_t)golden.H, D = (uint64_t)golden.D;
    for (const char* name : {"q", "k", "v", "dout", "out", "dq", "dk", "dv"}) {
        const SafetensorsTensor& tensor = find(name, {T, H, D});
        golden.tensors[name].resize(tensor.num_elements);
        file.read_floats(tensor, golden.tensors[name].data());
    }
    const LighthouseGeometry g = make_lighthouse_geometry(golden.T, golden.config);
    const SafetensorsTensor& indices = find("indices", {H, (uint64_t)g.S});
    CHECK(indices.dtype == Dtype::I32, "%s: indices must be I32", path.c_str());
    golden.indices.resize(indices.num_elements);
    std::memcpy(golden.indices.data(), file.data(indices), indices.num_bytes());
    return golden;
}

struct GoldenReport {
    static constexpr double LIMIT = 1e-5;
    std::string file;
    int64_t entries_different = 0, num_entries = 0;
    std::map<std::string, double> errors;  // largest difference over largest value

    bool passed() const {
        for (const auto& [name, error] : errors) {
            if (!(error <= LIMIT)) {
                return false;
            }
        }
        return entries_different == 0;
    }
    std::string text() const {
        std::string line = format_string(
            "%s %s  selection %s", passed() ? "ok  " : "FAIL", file.c_str(),
            entries_different == 0
                ? format_string("equal, %lld entries", (long long)num_entries).c_str()
                : format_string("differs in %lld of %lld entries", (long long)entries_different, (long long)num_entries)
                      .c_str());
        for (const auto& [name, error] : errors) {
            line += format_string("  %s %.1e", name.c_str(), error);
        }
        return line + format_string("  limit %.0e", LIMIT);
    }
};

// Runs the reference in float64 (scores in float32, as everywhere) on the file's q, k, v and dout.
inline GoldenReport check_golden_lighthouse(const std::string& path) {
    const GoldenLighthouse golden = read_golden_lighthouse(path);
    const LighthouseGeometry g = make_lighthouse_geometry(golden.T, golden.config);
    const int H = golden.H, D = golden.D;
    std::map<std::string, std::vector<double>> x;
    for (const auto& [name, values] : golden.tensors) {
        x[name].assign(values.begin(), values.end());
    }
    std::map<std::string, std::vector<double>> results;
    for (const char* name : {"out", "dq", "dk", "dv"}) {
        results[name].resize(x[name].size());
    }
    const auto view = [&](std::vector<double>& rows) {
        return reference::View<double>(rows.data(), g.T * H * D, (int64_t)H * D, D);
    };
    reference::LighthouseState<double> state;
    const double scale = 1.0 / std::sqrt((double)D);
    reference::lighthouse_forward<double>(view(results["out"]), state, view(x["q"]), view(x["k"]), view(x["v"]), 1, H,
                                          H, D, scale, golden.config, g);
    reference::lighthouse_backward<double>(view(results["dq"]), view(results["dk"]), view(results["dv"]),
                                           view(x["dout"]), state, 1, H, H, D, scale, g);
    GoldenReport report;
    report.file = path;
    report.num_entries = (int64_t)golden.indices.size();
    for (size_t i = 0; i < golden.indices.size(); ++i) {
        report.entries_different += state.entries[i] != golden.indices[i];
    }
    for (const auto& [name, values] : results) {
        double largest = 0.0, difference = 0.0;
        for (size_t i = 0; i < values.size(); ++i) {
            largest = std::max(largest, std::abs(x[name][i]));
            const double error = std::abs(values[i] - x[name][i]);
            difference = std::isnan(difference) || error <= difference ? difference : error;
        }
        report.errors[name] = difference / largest;
    }
    return report;
}
