// signals.h: stopping a run from outside. The first SIGINT, SIGTERM, SIGUSR1 or SIGHUP (a closed terminal) asks the
// training loop to finish its step, write a checkpoint and end; a second one ends the process at once. What follows the
// first within half a second is the same request: `timeout` signals its child and then the group of both, and wrappers
// pass on a Ctrl-C that the terminal has sent already.
#pragma once
#include <csignal>
#include <ctime>
#include <initializer_list>
#include <unistd.h>

namespace stop_signal {

// Signal handlers can reach nothing but globals: the signal that asked to stop, 0 when none did.
inline volatile std::sig_atomic_t received = 0;
inline timespec received_at{};  // written before `received`

inline void on_signal(int signal_number) {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);  // which a handler may call
    if (received != 0) {
        const double seconds =
            (double)(now.tv_sec - received_at.tv_sec) + 1e-9 * (double)(now.tv_nsec - received_at.tv_nsec);
        if (signal_number == SIGHUP || seconds < 0.5) {
            return;  // of a closed terminal both the kernel and the shell may send one, at any time
        }
        static const char message[] = "\nsecond signal: stopped without a checkpoint\n";
        if (write(STDERR_FILENO, message, sizeof message - 1) < 0) {
            // nothing is left to be done about it
        }
        _exit(128 + signal_number);  // the status a shell reports for a process ended by this signal
    }
    received_at = now;
    received = signal_number;
}

// Installs the handlers. A write to a closed pipe (`train_gpt | head`) or beyond a limit of file sizes is an error of
// the write rather than a silent death.
inline void install_handlers() {
    struct sigaction action = {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESTART;
    sigemptyset(&action.sa_mask);
    for (const int signal_number : {SIGINT, SIGTERM, SIGUSR1, SIGHUP}) {
        sigaddset(&action.sa_mask, signal_number);  // one handler at a time
    }
    for (const int signal_number : {SIGINT, SIGTERM, SIGUSR1}) {
        sigaction(signal_number, &action, nullptr);
    }
    struct sigaction of_hangup = {};
    if (sigaction(SIGHUP, nullptr, &of_hangup) == 0 && of_hangup.sa_handler != SIG_IGN) {  // nohup stays as it is
        sigaction(SIGHUP, &action, nullptr);
    }
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
}

inline const char* name_of(int signal_number) {
    return signal_number == SIGINT    ? "SIGINT"
           : signal_number == SIGTERM ? "SIGTERM"
           : signal_number == SIGUSR1 ? "SIGUSR1"
           : signal_number == SIGHUP  ? "SIGHUP"
                                      : "none";
}

}  // namespace stop_signal
