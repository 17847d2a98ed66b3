// run_folder.h: the output folder of a training run: which folders it may be, its lock, settings.toml and
// metrics.jsonl. The checkpoints in it are checkpoint_folder.h's.
#pragma once
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <sys/stat.h>
#include <system_error>

#include "checkpoint_folder.h"  // which checkpoints are there
#include "config.h"             // every setting
#include "durable_file.h"       // settings.toml
#include "metrics.h"            // metrics.jsonl
#include "output_lock.h"        // one process at a time
#include "settings.h"           // as text
#include "standard_files.h"     // where warnings go

// ---- which folder -------------------------------------------------------------------------------

inline std::string metrics_path(const std::string& output_dir) { return output_dir + "/metrics.jsonl"; }

// Whether a folder holds what a run writes: starting another run there would mix the two.
inline bool holds_a_run(const std::string& output_dir) {
    return checkpoint::exists(metrics_path(output_dir)) || !checkpoint::list(output_dir).empty();
}

// Throws Error when another process trains into --output_dir, which exists.
inline std::shared_ptr<OutputLock> lock_output(const RunConfig& config) {
    auto lock = std::make_shared<OutputLock>(config.output_dir);
    if (!lock->warning().empty()) {
        print_warning(config.program, lock->warning());
    }
    return lock;
}

// Throws Error when --output_dir is a checkpoint or lies in one, which goes as a whole when its run removes it, or has
// the name that a checkpoint of a run gets.
inline void check_is_in_no_checkpoint(const std::string& output_dir) {
    std::error_code error;
    std::filesystem::path folder = std::filesystem::absolute(output_dir.empty() ? "runs" : output_dir, error);
    if (!error) {
        folder = std::filesystem::weakly_canonical(folder, error);
    }
    for (; !error && folder.has_relative_path(); folder = folder.parent_path()) {
        CHECK(!checkpoint::exists(folder / checkpoint::STATE) || !checkpoint::exists(folder / checkpoint::MANIFEST),
              "--output_dir %s: would lie in %s, a checkpoint, which its own run may remove with all that is in it: "
              "name a folder outside",
              output_dir.empty() ? "runs/DATE" : output_dir.c_str(), folder.c_str());
        const std::string parent = folder.parent_path().string();
        const bool is_of_a_run =
            checkpoint::exists(metrics_path(parent)) || checkpoint::exists(saved_settings_path(parent));
        CHECK(!is_of_a_run || !checkpoint::step_of(folder.filename().string()),
              "--output_dir %s: %s is the name of a checkpoint of the run in %s: name a folder outside",
              output_dir.empty() ? "runs/DATE" : output_dir.c_str(), folder.c_str(), parent.c_str());
    }
}

// Throws Error when a run that is not resumed would mix with another, or replace settings that someone has put there.
// alone: no other rank asks at the same time.
inline void check_holds_no_run(const RunConfig& config, bool alone) {
    if (config.resume) {
        return;
    }
    const bool holds = holds_a_run(config.output_dir);
    if (holds && alone) {
        lock_output(config);  // a run that is under way is not to be removed: that is said instead
    }
    const std::map<int64_t, std::string> checkpoints = checkpoint::list(config.output_dir);
    const bool has_settings = checkpoint::exists(saved_settings_path(config.output_dir));
    CHECK(checkpoints.empty() || has_settings,
          "--output_dir %s holds checkpoints but no settings.toml, without which there is no --resume: name another "
          "folder, and go on from the newest with --init_from %s",
          config.output_dir.c_str(), checkpoints.rbegin()->second.c_str());
    CHECK(!holds, "--output_dir %s already holds a run%s or name another folder", config.output_dir.c_str(),
          checkpoints.empty() ? " that has written no checkpoint: remove it," : ": give --resume to go on with it,");
    CHECK(!has_settings,
          "--output_dir %s holds a settings.toml, which this run would replace: move it away (--config reads it from "
          "anywhere), or name another folder",
          config.output_dir.c_str());
}

// Makes runs/DATE-TIME, with a number behind it when that exists: of runs that start in the same second each gets one
// of its own.
inline std::string make_output_dir() {
    const std::time_t now = std::time(nullptr);
    char date_time[32];
    std::strftime(date_time, sizeof date_time, "%Y%m%d-%H%M%S", std::localtime(&now));
    const std::string base = std::string("runs/") + date_time;
    std::string folder = base;
    std::error_code error;
    std::filesystem::create_directories("runs", error);
    CHECK(!error, "runs: cannot make this folder: %s; name another with --output_dir", error.message().c_str());
    for (int i = 2; mkdir(folder.c_str(), 0777) != 0; ++i) {
        CHECK(errno == EEXIST, "%s: cannot make this folder: %s; name another with --output_dir", folder.c_str(),
              std::strerror(errno));
        folder = base + "-" + std::to_string(i);
    }
    return folder;
}

// ---- what a run keeps there ---------------------------------------------------------------------

// Of the process that writes there: of several ranks the first one's; the others' stays closed.
class RunFolder {
  public:
    // config: the run's, which outlives this.
    explicit RunFolder(RunConfig& config) : config_(config) {}

    // Makes config.output_dir, names it where it has no name yet, and locks it. Throws Error when it holds another run,
    // or what a checkpoint would replace.
    void take() {
        if (config_.output_dir.empty()) {
            config_.output_dir = make_output_dir();
        } else {
            make_folder();
        }
        lock_ = config_.output_lock ? config_.output_lock : lock_output(config_);  // of --resume, long since
        check_holds_no_run(config_, false);  // again: another may have been there since the settings were checked
        checkpoint::check_has_no_file_named_as_one(config_.output_dir);
    }

    // What --resume and the reader of the metrics look for. Of metrics that are there, those up to `step` stay; start:
    // what the line says that begins this process's. Where a new run fails in it, there is nothing of it.
    void begin_files(int64_t step, const Json& start) {
        const std::string settings = saved_settings_path(config_.output_dir),
                          metrics = metrics_path(config_.output_dir);
        try {
            metrics_.emplace(metrics, step);
            log("start", step, start);
            write_settings();
        } catch (const Error&) {
            metrics_.reset();
            if (!config_.resume) {
                std::remove(settings.c_str());
                std::remove(metrics.c_str());
            }
            throw;
        }
    }

    // Whether log() writes: from begin_files() on, until it fails.
    bool keeps_metrics() const { return metrics_.has_value(); }
    // A line of metrics.jsonl. Throws Error when it does not reach the file.
    void log(const char* event, int64_t step, const Json& fields) {
        try {
            if (metrics_->is_replaced()) {
                const std::string metrics = metrics_path(config_.output_dir);
                print_warning(config_.program, metrics + " has been replaced by another file: that one goes on");
                metrics_.emplace(metrics, step + 1);  // with all lines that it has
            }
            metrics_->write(event, step, fields);
        } catch (const Error&) {
            metrics_.reset();
            throw;
        }
    }

    // Whether someone has removed or moved the folder, or is about to: the lock's file may go first.
    bool is_lost() const { return lock_ && !lock_->holds(config_.output_dir); }

    // Before a checkpoint is written into it, at `step`. A lost folder is made again and locked like the first, unless
    // it is another run's by now, whose checkpoints must not be pruned; and it gets again what belongs there, as does
    // one that lacks a single file.
    void hold(int64_t step) {
        const std::string& folder = config_.output_dir;
        if (is_lost()) {
            const bool is_same = lock_->is_of(folder);  // without the lock's file
            make_folder();
            lock_->release();
            lock_ = lock_output(config_);
            CHECK(is_same || !holds_a_run(folder),
                  "--output_dir %s has been removed or moved, and is another run's folder now: this run's next "
                  "checkpoint has no place",
                  folder.c_str());
        }
        if (!metrics_) {
            return;
        }
        const std::string settings = saved_settings_path(folder), metrics = metrics_path(folder);
        const bool has_settings = checkpoint::exists(settings), has_metrics = checkpoint::exists(metrics);
        if (!has_settings && !has_metrics) {
            print_warning(config_.program, "--output_dir " + folder +
                                               " has been removed or moved: it is made again, and metrics.jsonl "
                                               "begins anew");
        } else if (!has_settings) {
            print_warning(config_.program, settings + " has been removed: it is made again");
        } else if (!has_metrics) {
            print_warning(config_.program, metrics + " has been removed: it begins anew");
        }
        if (!has_settings) {
            write_settings();
        }
        if (!has_metrics) {
            metrics_.emplace(metrics, step);
        }
    }

  private:
    void make_folder() const {
        CHECK(!checkpoint::is_link_to_nothing(config_.output_dir), "--output_dir %s: is a link to nothing",
              config_.output_dir.c_str());
        std::error_code error;
        std::filesystem::create_directories(config_.output_dir, error);
        CHECK(!error, "--output_dir %s: cannot make this folder: %s", config_.output_dir.c_str(),
              error.message().c_str());
    }

    // Complete under a temporary name first: a full disk leaves the old settings.
    void write_settings() const {
        const std::string path = saved_settings_path(config_.output_dir), temporary = path + ".new";
        const std::string text = settings_toml(config_);
        std::remove(temporary.c_str());  // of a run that was killed here
        DurableFile file(temporary);
        file.take_permissions_of(path);
        file.write(text.data(), text.size());
        file.finish();
        CHECK(std::rename(temporary.c_str(), path.c_str()) == 0, "%s: cannot write: %s", path.c_str(),
              std::strerror(errno));
    }

    RunConfig& config_;
    std::shared_ptr<OutputLock> lock_;
    std::optional<MetricsLog> metrics_;
};
