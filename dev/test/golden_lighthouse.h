// golden_lighthouse.h: outputs of the published Lighthouse implementation in a safetensors file, and the CPU
// reference held against them.
// The file: q, k, v, dout [T, H, D] bf16 or float32; out, dq, dk, dv [T, H, D] float32; indices [H, S] int32, pyramid
// addresses in causal order, level 0 first; metadata T, H, D, levels, pool, topk as decimal numbers.
#pragma once
#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "llmc/check.h"
#include "llmc/reference/lighthouse.h"

struct GoldenLighthouse {
    int64_t T = 0;
    int H = 0, D = 0;
    LighthouseConfig config;
    std::map<std::string, std::vector<float>> tensors;  // by name
    std::vector<int32_t> indices;                       // [H, S]
};

// Throws Error naming the file and what is wrong with it.
inline GoldenLighthouse read_golden_lighthouse(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    CHECK(file.good(), "%s: cannot be read", path.c_str());
    const std::string bytes((std::istreambuf_iterator<char>(file)), {});
    uint64_t header_size = 0;
    CHECK(bytes.size() >= 8, "%s: shorter than a safetensors header", path.c_str());
    std::memcpy(&header_size, bytes.data(), 8);
    CHECK(header_size <= bytes.size() - 8, "%s: its header is cut off", path.c_str());
    const nlohmann::json header = nlohmann::json::parse(bytes.substr(8, header_size), nullptr, false);
    CHECK(header.is_object() && header.contains("__metadata__"), "%s: its header is not JSON with metadata",
          path.c_str());
    const auto metadata = [&](const char* name) {
        CHECK(header["__metadata__"].contains(name), "%s: its metadata lack %s", path.c_str(), name);
        return std::stoll(header["__metadata__"][name].get<std::string>());
    };
    GoldenLighthouse golden;
    golden.T = metadata("T"), golden.H = (int)metadata("H"), golden.D = (int)metadata("D");
    golden.config.levels = (int)metadata("levels"), golden.config.pool = (int)metadata("pool");
    golden.config.topk = metadata("topk");
    // The elements of one tensor, widened to 32 bits: a bf16 is the upper half of a float.
    const auto words = [&](const char* name, int64_t num_elements) {
        CHECK(header.contains(name), "%s: it lacks the tensor %s", path.c_str(), name);
        const size_t element = header[name]["dtype"] == "BF16" ? 2 : 4;
        const size_t begin = header[name]["data_offsets"][0], end = header[name]["data_offsets"][1];
        CHECK(begin <= end && end <= bytes.size() - 8 - header_size && end - begin == num_elements * element,
              "%s: tensor %s does not have %lld elements", path.c_str(), name, (long long)num_elements);
        std::vector<uint32_t> values(num_elements, 0);
        for (int64_t i = 0; i < num_elements; ++i) {
            std::memcpy((char*)&values[i] + 4 - element, bytes.data() + 8 + header_size + begin + i * element, element);
        }
        return values;
    };
    for (const char* name : {"q", "k", "v", "dout", "out", "dq", "dk", "dv"}) {
        const auto values = words(name, golden.T * golden.H * golden.D);
        golden.tensors[name].resize(values.size());
        std::memcpy(golden.tensors[name].data(), values.data(), values.size() * sizeof(float));
    }
    const LighthouseGeometry g = make_lighthouse_geometry(golden.T, golden.config);
    const auto indices = words("indices", golden.H * g.S);
    golden.indices.assign(indices.begin(), indices.end());
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
