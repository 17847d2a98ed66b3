// check_golden.cpp: holds the CPU reference of Lighthouse attention against outputs of another implementation.
//   check_golden FILE.safetensors...     the format: golden_lighthouse.h
// One line a file: is the selection equal entry for entry, and the relative errors. Exit status 1 when one differs or
// is beyond 1e-5, 2 when a file cannot be used.
#include <cstdio>

#include "dev/test/golden_lighthouse.h"

int main(int argc, char** argv) {
    if (argc < 2) {
        std::fprintf(stderr, "usage: check_golden FILE.safetensors...\n");
        return 2;
    }
    bool passed = true;
    for (int i = 1; i < argc; ++i) {
        try {
            const GoldenReport report = check_golden_lighthouse(argv[i]);
            std::printf("%s\n", report.text().c_str());
            passed = passed && report.passed();
        } catch (const Error& error) {
            std::fprintf(stderr, "check_golden: %s\n", error.what());
            return 2;
        }
    }
    return passed ? 0 : 1;
}
