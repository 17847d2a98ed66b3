// metrics.h: what a run says about itself: a line a step on the terminal, with a progress bar below when it is a
// terminal, and metrics.jsonl, one JSON object a line, which also holds evaluations, checkpoints, skips and switches.
#pragma once
#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <poll.h>
#include <set>
#include <string>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "durable_file.h"
#include "json.h"
#include "signals.h"

// ---- metrics.jsonl ------------------------------------------------------------------------------

// What a line says of itself; no value for one that is not whole. An event of another type than text is "".
struct MetricsLine {
    std::string event;
    int64_t step;
    bool is_finite;  // its loss, if it has one
};
inline std::optional<MetricsLine> parse_metrics_line(const std::string& line) {
    const Json object = parse_or_discard(line);
    if (!object.is_object() || !object.contains("step") || !object["step"].is_number_integer()) {
        return std::nullopt;
    }
    const Json event = object.value("event", Json());
    return MetricsLine{event.is_string() ? event.get<std::string>() : "", object["step"].get<int64_t>(),
                       !object.contains("loss") || !object["loss"].is_null()};
}

// The file, to be read; not open where there is none. Throws Error when it cannot be read.
inline std::ifstream open_metrics(const std::string& path) {
    struct stat status;
    if (stat(path.c_str(), &status) != 0) {
        return std::ifstream();
    }
    CHECK(S_ISREG(status.st_mode), "%s: is not a file", path.c_str());
    std::ifstream file(path, std::ios::binary);
    CHECK(file.good(), "%s: cannot read: %s", path.c_str(), std::strerror(errno));
    return file;
}

// The events of `step` in a file of metrics, which stays as it is; not those whose loss is not finite: to go on from
// there is to meet it again. Throws Error when it cannot be read.
inline std::set<std::string> events_of_step(const std::string& path, int64_t step) {
    std::set<std::string> events;
    std::ifstream file = open_metrics(path);
    for (std::string line; std::getline(file, line);) {
        const std::optional<MetricsLine> parsed = parse_metrics_line(line);
        if (parsed && parsed->step == step && parsed->is_finite) {
            events.insert(parsed->event);
        }
    }
    return events;
}

// Appends to a file of one JSON object a line, each flushed as it is written. Every object has "event" and "step". Room
// for the next lines is taken beforehand, where the file system can: that a disk is full shows while the line of a step
// that is done still fits.
class MetricsLog {
  public:
    // Opens or creates `path`. Of a file that exists, lines of steps after `last_step` are dropped, as is a last line
    // cut off by a crash: a resumed run writes those steps again, and whether attention switches behind `last_step`. A
    // symbolic link stays one. Throws Error when it cannot be read or written.
    MetricsLog(const std::string& path, int64_t last_step) : path_(path) {
        drop_lines_after(last_step);
        file_.reset(std::fopen(path.c_str(), "ab"));
        CHECK(file_ != nullptr, "%s: cannot write: %s", path.c_str(), std::strerror(errno));
        take_room();
    }

    // Whether another file has its name by now, as after an editor's or a log rotation's work.
    bool is_replaced() const {
        struct stat own, named;
        return fstat(fileno(file_.get()), &own) == 0 && stat(path_.c_str(), &named) == 0 &&
               identity_of(own) != identity_of(named);
    }

    // One line {"event": event, "step": step, ...fields}. Numbers that are not finite become null: JSON has no others.
    // Throws Error when the line does not reach the file, or the next one would not.
    void write(const char* event, int64_t step, const Json& fields) {
        Json object = {{"event", event}, {"step", step}};
        object.update(fields);
        const std::string line = to_text(object) + "\n";
        std::FILE* const file = file_.get();
        check(std::fwrite(line.data(), 1, line.size(), file) == line.size() && std::fflush(file) == 0);
        take_room();
    }

  private:
    static constexpr off_t ROOM = 16 << 10;  // bytes, of many lines

    void check(bool done) const {
        CHECK(done, "%s: cannot write: %s; make room; from the newest checkpoint, if there is one, --resume goes on",
              path_.c_str(), std::strerror(errno));
    }
    void take_room() {
        const int file = fileno(file_.get());
        struct stat status;
        if (fstat(file, &status) != 0 || status.st_size + ROOM / 2 <= end_of_room_) {
            return;
        }
        rlimit limit;  // of a file's size, which the call does not look at
        getrlimit(RLIMIT_FSIZE, &limit);
        errno = EFBIG;
        const bool taken = (limit.rlim_cur == RLIM_INFINITY || (rlim_t)(status.st_size + ROOM) <= limit.rlim_cur) &&
                           fallocate(file, FALLOC_FL_KEEP_SIZE, status.st_size, ROOM) == 0;
        check(taken ||
              (errno != ENOSPC && errno != EDQUOT && errno != EFBIG));  // others: it cannot be taken beforehand
        end_of_room_ = status.st_size + ROOM;
    }
    struct Close {
        void operator()(std::FILE* file) const {
            struct stat status;
            if (fstat(fileno(file), &status) == 0) {
                (void)!ftruncate(fileno(file), status.st_size);  // gives the rest of the room back
            }
            std::fclose(file);
        }
    };

    // Samples may hold any bytes; those that are not UTF-8 are replaced.
    static std::string to_text(const Json& object) {
        return object.dump(-1, ' ', false, Json::error_handler_t::replace);
    }

    void drop_lines_after(int64_t last_step) {
        std::ifstream old = open_metrics(path_);
        if (!old.is_open()) {
            return;
        }
        std::error_code error;
        const std::string real_path = std::filesystem::canonical(path_, error).string(), kept_path = real_path + ".new";
        CHECK(!error, "%s: cannot find: %s", path_.c_str(), error.message().c_str());
        std::remove(kept_path.c_str());  // of a run that was killed here
        DurableFile kept(kept_path);
        kept.take_permissions_of(real_path);
        for (std::string line; std::getline(old, line);) {
            const std::optional<MetricsLine> parsed = parse_metrics_line(line);
            const bool is_whole = !old.eof();  // others' lines, such as notes, stay where they are
            if (parsed ? parsed->step <= (parsed->event == "attention_switch" ? last_step - 1 : last_step) : is_whole) {
                line += '\n';
                kept.write(line.data(), line.size());
            }
        }
        kept.finish();
        CHECK(!old.bad() && std::rename(kept_path.c_str(), real_path.c_str()) == 0, "%s: cannot write: %s",
              kept_path.c_str(), std::strerror(errno));
    }

    std::string path_;
    std::unique_ptr<std::FILE, Close> file_;
    off_t end_of_room_ = 0;  // of the file
};

// ---- terminal -----------------------------------------------------------------------------------

// "1:02:03" or "2:03" for a number of seconds.
inline std::string format_duration(double seconds) {
    const long long s = seconds > 0 ? (long long)(seconds + 0.5) : 0;
    return s >= 3600 ? format_string("%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60)
                     : format_string("%lld:%02lld", s / 60, s % 60);
}

// What one optimizer step was like.
struct StepMetrics {
    int64_t step = 0;  // 1 for the first
    int64_t max_steps = 0;
    double loss = 0.0;       // nats a token
    double grad_norm = 0.0;  // before clipping
    double learning_rate = 0.0;
    double elapsed_ms = 0.0;
    double tokens_per_second = 0.0;
    double mfu = 0.0;                   // 0..1 of the work done; 0: no peak known
    double mfu_dense_equivalent = 0.0;  // above mfu only under Lighthouse attention
    double memory_gib = 0.0;
    double seconds_left = 0.0;
};

// The terminal's line of a step.
inline std::string step_line(const StepMetrics& m) {
    const int width = (int)std::to_string(m.max_steps).size();
    std::string line = format_string("step %*lld/%lld | loss %.4f | norm %.4f | lr %.2e | %.1f ms | %.0f tok/s", width,
                                     (long long)m.step, (long long)m.max_steps, m.loss, m.grad_norm, m.learning_rate,
                                     m.elapsed_ms, m.tokens_per_second);
    if (m.mfu > 0.0) {
        line += format_string(" | MFU %.1f %%", 100.0 * m.mfu);
        if (m.mfu_dense_equivalent > m.mfu) {
            line += format_string(" (dense equivalent %.1f %%)", 100.0 * m.mfu_dense_equivalent);
        }
    }
    return line + format_string(" | %.2f GiB | left %s", m.memory_gib, format_duration(m.seconds_left).c_str());
}

inline Json step_json(const StepMetrics& m) {
    Json json = {{"loss", m.loss},
                 {"grad_norm", m.grad_norm},
                 {"learning_rate", m.learning_rate},
                 {"elapsed_ms", m.elapsed_ms},
                 {"tokens_per_second", m.tokens_per_second},
                 {"memory_gib", m.memory_gib},
                 {"seconds_left", m.seconds_left}};
    if (m.mfu > 0.0) {
        json["mfu"] = m.mfu;
        json["mfu_dense_equivalent"] = m.mfu_dense_equivalent;
    }
    return json;
}

// Lines on standard output, and below them, on a terminal, a progress bar.
class Terminal {
  public:
    // silent: of a process that leaves speaking to another. others_wait: processes that would wait too while nobody
    // reads what this one says; what finds no room within a second is then left out.
    explicit Terminal(bool plain, bool silent = false, bool others_wait = false)
        : silent_(silent), has_bar_(!plain && !silent && isatty(STDOUT_FILENO)), others_wait_(others_wait) {}
    ~Terminal() { clear_bar(); }

    // Prints whole lines (`text` may hold several; a line end is added) above the bar.
    void print(const std::string& text) {
        if (silent_ || !takes_output()) {
            return;
        }
        clear_bar();
        // As much at a time as a pipe with room takes for certain.
        const std::string lines = (was_cut_ ? "\n" : "") + text + "\n";
        size_t at = 0;
        for (; at < lines.size() && (at == 0 || takes_output()); at += PIPE_BUF) {
            std::fwrite(lines.data() + at, 1, std::min<size_t>(PIPE_BUF, lines.size() - at), stdout);
            std::fflush(stdout);
        }
        was_cut_ = at < lines.size();
        draw_bar();
        std::fflush(stdout);
    }

    // Sets what the bar shows: step of max_steps.
    void progress(int64_t step, int64_t max_steps, double seconds_left) {
        const int cells = 40, full = max_steps > 0 ? (int)(cells * step / max_steps) : cells;
        bar_ = "[" + std::string(full, '#') + std::string(cells - full, '.') + "] " +
               format_string("%3d %%, %s left", max_steps > 0 ? (int)(100 * step / max_steps) : 100,
                             format_duration(seconds_left).c_str());
    }
    // From here on there is no bar.
    void end_progress() {
        clear_bar();
        bar_.clear();
        std::fflush(stdout);
    }

  private:
    // Waits for room in a pipe that nobody reads just now, but not beyond a signal that asks the run to stop: its
    // checkpoint must not wait for a reader. Anything else that is wrong the write will say.
    bool takes_output() {
        pollfd out = {STDOUT_FILENO, POLLOUT, 0};
        // Where others wait: ten, and once these were in vain none until there is room again.
        const int most_waits = !others_wait_ ? INT_MAX : was_full_ ? 0 : 10;
        for (int waits = 0; true; ++waits) {
            const int ready = poll(&out, 1, waits < most_waits ? 100 : 0);  // ms
            was_full_ = ready == 0 || (ready < 0 && errno == EINTR);
            if (!was_full_ || waits == most_waits || stop_signal::received != 0) {
                return !was_full_;
            }
        }
    }
    void clear_bar() {
        if (bar_drawn_) {
            std::fputs("\r\033[K", stdout);  // to column 0, erase the line
            bar_drawn_ = false;
        }
    }
    void draw_bar() {
        if (has_bar_ && !bar_.empty()) {
            std::fputs(bar_.c_str(), stdout);
            bar_drawn_ = true;
        }
    }

    bool silent_ = false, has_bar_ = false, bar_drawn_ = false;
    bool others_wait_ = false, was_full_ = false;
    bool was_cut_ = false;  // the text before, within a line
    std::string bar_;
};
