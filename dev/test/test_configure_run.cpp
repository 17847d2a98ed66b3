// test_configure_run.cpp: what settings become once the checkpoint and the ranks are known.
#include "train_loop_testing.h"

class ConfigureRun : public TrainLoop {
  protected:
    // A checkpoint of one step at --seq_len 16.
    std::string trained_checkpoint() {
        config_.max_steps = 1;
        FakeModel model(config_.model);
        EXPECT_EQ(run(model, config_), 0);
        return find_newest_checkpoint(config_.output_dir).value();
    }
    // What these flags resolve to, on one rank; err_: what was said about it.
    RunConfig resolved(std::vector<std::string> flags) {
        std::vector<const char*> words = {"train_gpt"};
        for (const std::string& flag : flags) {
            words.push_back(flag.c_str());
        }
        testing::internal::CaptureStderr();
        const RunConfig config = resolve_run(parse_flags((int)words.size(), words.data()), RunRanks());
        err_ = testing::internal::GetCapturedStderr();
        return config;
    }
};

TEST_F(ConfigureRun, ACheckpointIsLookedAtAtTheLengthItWasTrainedAt) {
    const std::string folder = trained_checkpoint();
    const std::vector<std::string> evaluation = {"--init_from", folder,       "--max_steps",
                                                 "0",           "--val_data", config_.train_data[0]};
    EXPECT_EQ(resolved(evaluation).seq_len, 16);
    std::vector<std::string> shorter = evaluation;
    shorter.insert(shorter.end(), {"--seq_len", "8"});
    EXPECT_EQ(resolved(shorter).seq_len, 8);
    std::filesystem::remove(folder + "/manifest.json");
    std::filesystem::remove(folder + "/state.json");
    EXPECT_EQ(resolved(evaluation).seq_len, 16) << "config.json says how many positions it knows";
}

TEST_F(ConfigureRun, ASampleNeedsNoMoreThanItsPromptAndItsTokens) {
    const std::string folder = trained_checkpoint();
    const auto length = [&](const std::vector<std::string>& from, const char* sample_tokens) {
        std::vector<std::string> flags = {"--max_steps",     "0",          "--sample_prompt", "abc",
                                          "--sample_tokens", sample_tokens};
        flags.insert(flags.end(), from.begin(), from.end());
        const RunConfig config = resolved(flags);
        EXPECT_EQ(config.attention, AttentionMode::dense);
        return config.seq_len;
    };
    for (const std::vector<std::string>& from :
         {std::vector<std::string>{"--init_from", folder}, {"--resume", "--output_dir", config_.output_dir}}) {
        EXPECT_EQ(length(from, "4"), 8) << "with the marker of the beginning";
        EXPECT_EQ(length(from, "400"), 16) << "the model knows no later positions";
    }
    EXPECT_EQ(length({"--init_from", folder, "--seq_len", "12"}, "400"), 12);
}

TEST_F(ConfigureRun, APatternForDataLeavesOutWhatTheRunWrites) {
    std::filesystem::create_directories(folder_ + "/text/run");
    std::filesystem::create_directory_symlink(folder_ + "/text", folder_ + "/link");
    std::filesystem::copy_file(config_.train_data[0], folder_ + "/text/a.txt");
    std::filesystem::copy_file(config_.train_data[0], folder_ + "/text/metrics.txt");
    const auto refusal = [&](const char* flag, const std::string& pattern, const std::string& output) -> std::string {
        const std::string text = folder_ + "/text/a.txt";
        std::vector<std::string> flags = {flag, folder_ + pattern, "--output_dir", folder_ + output, "--seq_len", "16"};
        if (std::string(flag) == "--val_data") {
            flags.insert(flags.end(), {"--train_data", text});
        }
        try {
            resolved(flags);
        } catch (const Error& error) {
            testing::internal::GetCapturedStderr();  // resolved() has not come to it
            return error.what();
        }
        return "";
    };
    const std::string first = folder_ + "/text/metrics.jsonl";
    EXPECT_EQ(refusal("--train_data", "/text/*", "/text").find("--train_data '" + folder_ + "/text/*': stands for "),
              0u);
    EXPECT_NE(refusal("--train_data", "/text/*", "/text").find(first), std::string::npos);
    EXPECT_NE(refusal("--val_data", "/text/m*", "/text").find(first), std::string::npos);
    EXPECT_NE(refusal("--train_data", "/link/*", "/text").find(first), std::string::npos) << "under another name";
    EXPECT_NE(refusal("--train_data", "/text/*", "/text/run/..").find(first), std::string::npos);
    EXPECT_NE(refusal("--train_data", "/t*t/[a-z]*", "/text").find(first), std::string::npos);
    EXPECT_NE(refusal("--train_data", "/text/*", "/link").find(first), std::string::npos);
    for (const char* pattern : {"/text/*.txt", "/text/[ab]*", "/text/?.*t"}) {
        EXPECT_EQ(refusal("--train_data", pattern, "/text"), "") << pattern;
    }
    EXPECT_EQ(refusal("--train_data", "/text/*", "/text/run"), "") << "folders do not count";
    EXPECT_NE(refusal("--train_data", "/*/*/*", "/text").find("/text/step00000000/config.json"), std::string::npos);
    EXPECT_NE(refusal("--train_data", "/*/*/*.safetensors", "/text").find("/model.safetensors"), std::string::npos);
    EXPECT_NE(refusal("--val_data", "/text/step*/tok*", "/text").find("/tokenizer.json"), std::string::npos);
    EXPECT_EQ(refusal("--train_data", "/text/metrics.txt", "/text"), "") << "a name";
}

TEST_F(ConfigureRun, PositionsThatAreNewToAModelAreSaid) {
    const std::string folder = trained_checkpoint();
    const std::vector<std::string> training = {"--init_from", folder, "--train_data", config_.train_data[0],
                                               "--seq_len"};
    const auto with = [&](const std::vector<std::string>& more) {
        std::vector<std::string> flags = training;
        flags.insert(flags.end(), more.begin(), more.end());
        return resolved(flags);
    };
    EXPECT_EQ(with({"16"}).model.max_positions, 16);
    EXPECT_EQ(err_, "");
    EXPECT_EQ(with({"32"}).model.max_positions, 32);
    EXPECT_NE(err_.find("--seq_len 32: " + folder + " is for up to 16 positions"), std::string::npos) << err_;
    resolved({"--init_from", folder, "--max_steps", "0", "--val_data", config_.train_data[0], "--seq_len", "32"});
    EXPECT_NE(err_.find("--seq_len 32: " + folder + " is for up to 16 positions"), std::string::npos) << "to evaluate";
    std::filesystem::remove(folder + "/state.json");
    EXPECT_EQ(resolved({"--init_from", folder, "--max_steps", "0", "--val_data", config_.train_data[0]}).seq_len, 16)
        << "no more than it knows";
    EXPECT_EQ(with({"32", "--rope_theta", "80000"}).model.rope_theta, 8e4);
    EXPECT_NE(err_.find("--rope_theta 80000 (10000): not as in " + folder), std::string::npos) << err_;
    EXPECT_EQ(std::count(err_.begin(), err_.end(), '\n'), 1) << err_;
    const RunConfig preset = resolved(
        {"--model", "llama3-8b", "--seq_len", "16384", "--val_fraction", "0", "--train_data", config_.train_data[0]});
    EXPECT_EQ(preset.model.max_positions, 16384) << "the preset's 8192 are no limit";
}

TEST_F(ConfigureRun, ARunGoesOnWithAsManyRanksASequenceAsThereAre) {
    std::ofstream(folder_ + "/settings.toml") << "context_parallel = 4\ntrain_data = ['x']\n" << SETTINGS_END;
    const char* const words[] = {"train_gpt", "--resume", "--output_dir", folder_.c_str(), "--context_parallel", "4"};
    const auto fits = [&](int num_words, int num_ranks) {
        ParsedFlags parsed = parse_flags(num_words, words);
        const std::string said = fit_context_parallel(parsed, num_ranks);
        EXPECT_EQ(said.empty(), parsed.config.context_parallel == 4) << said;
        return parsed.config.context_parallel;
    };
    EXPECT_EQ(fits(4, 8), 4);
    EXPECT_EQ(fits(4, 6), 2);
    EXPECT_EQ(fits(4, 1), 1);
    EXPECT_EQ(fits(6, 6), 4) << "what was typed is refused where it does not fit";
}
