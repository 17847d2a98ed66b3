// standard_files.h: standard input, output and error are what they say, however a program was started; warnings.
#pragma once
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <string>
#include <unistd.h>

#include "check.h"

// To be called before any file is opened. Where one of the three is closed (`train_gpt ... >&-`, a launcher that has no
// terminal to give), the next file would take its number, and lines for the terminal would land in metrics.jsonl.
// /dev/null takes it instead: opened the wrong way round, so that reading from it or writing to it stays an error.
inline void open_standard_files() {
    for (const int file : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
        const bool is_open = fcntl(file, F_GETFD) >= 0;
        CHECK(is_open || open("/dev/null", file == STDIN_FILENO ? O_WRONLY : O_RDONLY) == file,
              "descriptor %d is closed, and /dev/null cannot be opened in its place: %s", file, std::strerror(errno));
    }
}

// For the user of `program`, who may have meant something else; it goes on. Of several ranks one calls it.
inline void print_warning(const std::string& program, const std::string& sentence) {
    std::fprintf(stderr, "%s: warning: %s\n", program.c_str(), sentence.c_str());
}

// Throws Error when what was printed did not get where it goes: for those whose output is all they are run for.
inline void check_printed() {
    CHECK(std::fflush(stdout) == 0 && !std::ferror(stdout), "the output cannot be written: %s", std::strerror(errno));
}
