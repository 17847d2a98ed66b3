// pseudo_terminal.h: a terminal for tests of what is shown on one.
#pragma once
#include <fcntl.h>
#include <gtest/gtest.h>
#include <termios.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>

class PseudoTerminal {
  public:
    PseudoTerminal() : reader_(posix_openpt(O_RDWR | O_NOCTTY)) {
        EXPECT_TRUE(reader_ >= 0 && grantpt(reader_) == 0 && unlockpt(reader_) == 0) << std::strerror(errno);
        terminal_ = open(ptsname(reader_), O_RDWR | O_NOCTTY);
        termios settings = {};
        EXPECT_EQ(tcgetattr(terminal_, &settings), 0);
        cfmakeraw(&settings);  // line ends as they are written
        EXPECT_EQ(tcsetattr(terminal_, TCSANOW, &settings), 0);
    }
    PseudoTerminal(const PseudoTerminal&) = delete;
    PseudoTerminal& operator=(const PseudoTerminal&) = delete;
    ~PseudoTerminal() {
        close_terminal();
        close(reader_);
    }

    // The file that programs write to.
    int terminal() const { return terminal_; }
    // Everything that was written, once nobody else can write any more: reading then ends, with an error.
    std::string read_to_the_end() {
        close_terminal();
        std::string text;
        char piece[1024];
        for (ssize_t num_bytes; (num_bytes = read(reader_, piece, sizeof piece)) > 0;) {
            text.append(piece, (size_t)num_bytes);
        }
        return text;
    }

  private:
    void close_terminal() {
        if (terminal_ >= 0) {
            close(terminal_);
        }
        terminal_ = -1;
    }
    int reader_, terminal_ = -1;
};
