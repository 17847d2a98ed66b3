// test_train_loop_resume.cpp: runs that go on: to the same bits, or saying what is another; and their folders, which
// may have moved, be gone, or be another run's.
#include <csignal>

#include "train_loop_testing.h"

// ---- the same run

TEST_F(TrainLoop, ResumeIsBitIdentical) {
    FakeModel whole(config_.model);
    EXPECT_EQ(run(whole, config_), 0);
    const std::vector<double> expected = losses();
    ASSERT_EQ(expected.size(), 8u);
    for (int stop = 1; stop < 8; ++stop) {
        std::filesystem::remove_all(config_.output_dir);
        RunConfig first = config_;
        first.max_steps = stop, first.decay_steps = 8;
        FakeModel before(config_.model), after(config_.model);
        run(before, first);
        EXPECT_EQ(run(after, resumed(config_)), 0);
        EXPECT_EQ(losses(), expected) << "stopped after " << stop;
        for (const StateKind kind : {StateKind::master, StateKind::exp_avg, StateKind::exp_avg_sq}) {
            EXPECT_EQ(after.state(kind), whole.state(kind)) << state_kind_name(kind);
        }
    }
}

TEST_F(TrainLoop, ResumeBeyondTheLastStepChangesNothing) {
    FakeModel model(config_.model), after(config_.model);
    run(model, config_);
    EXPECT_EQ(run(after, resumed(config_)), 0);
    EXPECT_EQ(after.num_updates, 0);
    EXPECT_EQ(losses().size(), 8u);
}

// ---- what is another is said

TEST_F(TrainLoop, ALongerRunSaysWhatItsLearningRateBecomes) {
    config_.learning_rate = 0.6, config_.schedule = ScheduleKind::linear, config_.final_learning_rate_fraction = 0.1;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    const auto said = [&](int64_t decay_steps, ScheduleKind schedule) {
        RunConfig next = resumed(config_);
        next.max_steps = 2 * config_.max_steps, next.decay_steps = decay_steps, next.schedule = schedule;
        FakeModel again(config_.model);
        EXPECT_EQ(run(again, next), 0);
        std::filesystem::remove_all(config_.output_dir + "/" + checkpoint::folder_name(next.max_steps));
        return err_;
    };
    const std::string warning = said(0, ScheduleKind::linear);
    EXPECT_NE(warning.find("the decay of the learning rate ends at step 16"), std::string::npos) << warning;
    EXPECT_NE(warning.find("at 8: the next step's is 0.369, and would have been 0.06 "), std::string::npos) << warning;
    EXPECT_EQ(said(config_.max_steps, ScheduleKind::linear), "");
    EXPECT_EQ(said(0, ScheduleKind::constant), "") << "another schedule was asked for";
}

TEST_F(TrainLoop, AnotherSequenceLengthIsSaidAndGoesOnBehindTheTokensSeen) {
    FakeModel model(config_.model), same(config_.model), longer(config_.model), longer_again(config_.model);
    config_.decay_steps = 100;
    RunConfig first = config_;
    first.max_steps = 2;
    EXPECT_EQ(run(model, first), 0);
    RunConfig second = resumed(config_);
    second.max_steps = 4;
    EXPECT_EQ(run(same, second), 0);
    EXPECT_EQ(err_, "");
    EXPECT_EQ(of_steps<int64_t>("data_position"), (std::vector<int64_t>{0, 2, 4, 6}));
    second = resumed(config_);
    second.seq_len = 24, second.max_steps = 6;
    EXPECT_EQ(run(longer, second), 0);
    EXPECT_NE(err_.find("was trained on sequences of 16"), std::string::npos) << err_;
    // 8 sequences of 16 have been seen: the tokens of 5 1/3 of 24, so the next is the seventh.
    EXPECT_EQ(of_steps<int64_t>("data_position"), (std::vector<int64_t>{0, 2, 4, 6, 6, 8}));
    EXPECT_EQ(of_steps<int64_t>("tokens").back(), 240) << "10 sequences of 24";
    RunConfig third = resumed(second);
    third.max_steps = 7;
    EXPECT_EQ(run(longer_again, third), 0);
    EXPECT_EQ(err_, "");
    EXPECT_EQ(of_steps<int64_t>("data_position"), (std::vector<int64_t>{0, 2, 4, 6, 6, 8, 10}));
}

TEST_F(TrainLoop, GoingOnWithOtherDataIsSaid) {
    const auto write = [&](const std::string& name, int num_bytes) {
        std::ofstream(folder_ + "/" + name, std::ios::binary) << std::string(num_bytes, 'x');
        return folder_ + "/" + name;
    };
    RunConfig first = config_;
    first.train_data = {write("a.txt", 5000), write("b.txt", 3000), write("c.txt", 3000)};
    first.max_steps = 1;
    FakeModel model(config_.model);
    run(model, first);
    EXPECT_EQ(err_, "");
    const auto said = [&](std::vector<std::string> train_data, double val_fraction) {
        RunConfig next = resumed(first);
        next.train_data = std::move(train_data), next.val_fraction = val_fraction, next.max_steps += 1;
        FakeModel again(config_.model);
        EXPECT_EQ(run(again, next), 0);
        std::filesystem::remove_all(config_.output_dir + "/" + checkpoint::folder_name(next.max_steps));
        return err_;
    };
    const double f = config_.val_fraction;
    EXPECT_EQ(said(first.train_data, f), "");
    std::filesystem::create_directory(folder_ + "/moved");
    for (const char* name : {"a.txt", "b.txt", "c.txt"}) {
        std::filesystem::copy_file(folder_ + "/" + name, folder_ + "/moved/" + name);
    }
    EXPECT_EQ(said({folder_ + "/moved/*.txt"}, f), "") << "the same in another folder";
    const auto warned = [&](const std::vector<std::string>& train_data, double val_fraction, const std::string& words) {
        const std::string warning = said(train_data, val_fraction);
        EXPECT_EQ(std::count(warning.begin(), warning.end(), '\n'), 1) << warning;
        EXPECT_NE(warning.find("--train_data: " + config_.output_dir +
                               "/step00000001 was trained on other data (3 "
                               "files of bytes, \"a.txt\" to \"c.txt\", names and lengths "),
                  std::string::npos)
            << warning;
        EXPECT_NE(warning.find(words), std::string::npos) << warning;
    };
    warned({folder_ + "/data.txt"}, f, "(1 file of bytes, \"data.txt\", names and lengths ");
    warned({folder_ + "/a.txt", write("d.txt", 3000), folder_ + "/c.txt"}, f,
           "from here on (3 files of bytes, \"a.txt\"");
    warned(first.train_data, 0.0, "11006 tokens): their order is another");
    write("moved/b.txt", 3001);
    warned({folder_ + "/moved/*.txt"}, f, "from here on (3 files of bytes");

    // Evaluation trains on none, but --val_fraction's part of other data may hold what was trained on.
    const auto said_of_evaluation = [&](std::vector<std::string> train_data, std::vector<std::string> val_data) {
        RunConfig evaluation = resumed(first);
        evaluation.max_steps = 0;
        evaluation.train_data = std::move(train_data), evaluation.val_data = std::move(val_data);
        FakeModel again(config_.model);
        EXPECT_EQ(run(again, evaluation), 0);
        return err_;
    };
    EXPECT_EQ(said_of_evaluation(first.train_data, {}), "");
    EXPECT_NE(said_of_evaluation({folder_ + "/moved/*.txt"}, {}).find("which may hold what was trained on"),
              std::string::npos)
        << err_;
    EXPECT_EQ(said_of_evaluation({folder_ + "/moved/*.txt"}, {folder_ + "/data.txt"}), "") << "that is validated";

    // A checkpoint of before these were written down.
    const std::string old = find_newest_checkpoint(config_.output_dir).value(), path = old + "/state.json";
    Json state = Json::parse(read_text_file(path));
    state.erase("data");
    std::ofstream(path) << state.dump();
    const std::string manifest_path = old + "/manifest.json";
    checkpoint::Manifest manifest = checkpoint::parse_manifest(read_text_file(manifest_path), manifest_path);
    manifest["state.json"] = digest_file(path);
    std::ofstream(manifest_path) << checkpoint::manifest_text(manifest);
    EXPECT_EQ(said({folder_ + "/data.txt"}, f), "");
}

TEST_F(TrainLoop, ACheckpointThatIsRemovedBeforeItIsReadIsSaid) {
    FakeModel model(config_.model), again(config_.model);
    config_.max_steps = 1;
    run(model, config_);
    RunConfig evaluation = resumed(config_);
    evaluation.max_steps = 0;
    std::filesystem::remove_all(evaluation.checkpoint);
    try {
        run(again, evaluation);
        FAIL() << "what is gone was read";
    } catch (const Error& error) {
        EXPECT_EQ(std::string(error.what()).find(evaluation.checkpoint + ": was removed while it was read"), 0u)
            << error.what();
    }
}

TEST_F(TrainLoop, AnotherShuffleSeedIsSaid) {
    FakeModel model(config_.model), after(config_.model);
    config_.max_steps = 2, config_.decay_steps = 100;
    run(model, config_);
    RunConfig other = resumed(config_);
    other.max_steps = 4, other.shuffle_seed = 7;
    EXPECT_EQ(run(after, other), 0);
    EXPECT_NE(err_.find("--shuffle_seed 7: "), std::string::npos) << err_;
    EXPECT_NE(err_.find("was trained with 0"), std::string::npos) << err_;
    FakeModel same(config_.model);
    RunConfig third = resumed(other);
    third.max_steps = 6;
    EXPECT_EQ(run(same, third), 0);
    EXPECT_EQ(err_, "") << "it is saved with the run";
}

TEST_F(TrainLoop, AnotherNumberOfSequencesAStepIsSaid) {
    config_.max_steps = 2, config_.decay_steps = 100;
    FakeModel model(config_.model), after(config_.model), same(config_.model);
    run(model, config_);
    RunConfig other = resumed(config_);
    other.max_steps = 4, other.global_batch = 6;
    EXPECT_EQ(run(after, other), 0);
    EXPECT_NE(err_.find("a step has 6 sequences from here on, and had 2 in " + config_.output_dir +
                        "/step00000002 "
                        "(--global_batch 2 goes on with as many)"),
              std::string::npos)
        << err_;
    RunConfig third = resumed(other);
    third.max_steps = 6;
    EXPECT_EQ(run(same, third), 0);
    EXPECT_EQ(err_, "");
}

TEST_F(TrainLoop, RawTextForAModelWithATokenizerOfItsOwnIsSaid) {
    FakeModel model(config_.model), after(config_.model), again(config_.model);
    config_.max_steps = 1;
    run(model, config_);
    const std::string foreign = folder_ + "/foreign";
    std::filesystem::copy(*find_newest_checkpoint(config_.output_dir), foreign);
    std::filesystem::remove(foreign + "/manifest.json");
    RunConfig from = config_;
    from.init_from = from.checkpoint = foreign, from.output_dir = folder_ + "/second";
    EXPECT_EQ(run(after, from), 0);
    EXPECT_EQ(err_, "") << "the tokenizer is that of bytes";
    std::ofstream(foreign + "/tokenizer.json") << "{\"model\": {\"type\": \"BPE\"}}";
    from.output_dir = folder_ + "/third";
    EXPECT_EQ(run(again, from), 0);
    EXPECT_NE(err_.find("has a tokenizer of its own"), std::string::npos) << err_;
    std::filesystem::remove(foreign + "/tokenizer.json");
    for (const char* name : {"tokenizer.model", "vocab.json"}) {
        std::ofstream(foreign + "/" + name) << "of others";
        from.output_dir = folder_ + "/of_" + name;
        FakeModel third(config_.model);
        EXPECT_EQ(run(third, from), 0);
        EXPECT_NE(err_.find("has a tokenizer of its own"), std::string::npos) << name << ": " << err_;
        FakeModel evaluated(config_.model);
        RunConfig evaluation = from;
        evaluation.max_steps = 0, evaluation.output_dir.clear();
        EXPECT_EQ(run(evaluated, evaluation), 0);
        EXPECT_NE(err_.find("but the validation data are raw text"), std::string::npos) << name << ": " << err_;
        std::filesystem::remove(foreign + "/" + name);
    }
    // Without a tokenizer, what the state says of the data.
    int run_number = 0;
    const auto said = [&] {
        from.output_dir = folder_ + "/untold" + std::to_string(++run_number);
        FakeModel untold(config_.model);
        EXPECT_EQ(run(untold, from), 0);
        return err_;
    };
    EXPECT_EQ(said(), "") << "it was trained on bytes";
    std::string state = read_text_file(foreign + "/state.json");
    const size_t at = state.find("1 file of bytes");
    ASSERT_NE(at, std::string::npos) << state;
    std::ofstream(foreign + "/state.json") << state.replace(at, 15, "3 token shards");
    EXPECT_NE(said().find(foreign + " was trained on token shards, but --train_data are raw text"), std::string::npos);
    std::filesystem::remove(foreign + "/state.json");
    EXPECT_NE(said().find("says of no tokenizer which it was trained with"), std::string::npos);
}

// And the other way round: what their tokenizer would make of the numbers is not what was trained on.
TEST_F(TrainLoop, ShardsForAModelOfBytesLeaveItNoTokenizer) {
    FakeModel model(config_.model), after(config_.model), again(config_.model);
    config_.max_steps = 1;
    run(model, config_);
    EXPECT_TRUE(std::filesystem::exists(*find_newest_checkpoint(config_.output_dir) + "/tokenizer.json"));
    RunConfig from = config_;
    from.init_from = from.checkpoint = *find_newest_checkpoint(config_.output_dir);
    from.train_data = {write_shard("/shard.bin", 8)}, from.output_dir = folder_ + "/second";
    EXPECT_EQ(run(after, from), 0);
    EXPECT_NE(err_.find(from.checkpoint + " has the tokenizer of bytes, and --train_data are token shards"),
              std::string::npos)
        << err_;
    for (const char* name : {"tokenizer.json", "tokenizer.model", "generation_config.json"}) {
        EXPECT_FALSE(std::filesystem::exists(from.output_dir + "/step00000001/" + name)) << name;
    }
    from = resumed(from), from.max_steps = 2;
    EXPECT_EQ(run(again, from), 0);
    EXPECT_EQ(err_.find("tokenizer"), std::string::npos) << "said once: " << err_;
}

// ---- what was left undone

TEST_F(TrainLoop, SkipsInARowAreCountedAcrossAResume) {
    config_.max_skipped = 3;
    RunConfig first = config_;
    first.max_steps = 2;
    FakeModel before(config_.model), after(config_.model);
    before.is_bad = after.is_bad = [](int) { return true; };
    run(before, first);
    EXPECT_EQ(run(after, resumed(config_)), 1);
    EXPECT_EQ(after.num_updates, 1);
}

// A run that is resumed on weights that are bad tries as often as any, and removes no checkpoint that may be good.
TEST_F(TrainLoop, GoingOnAfterTooManySkipsCostsNoCheckpoint) {
    config_.max_skipped = 2, config_.keep_checkpoints = 1, config_.checkpoint_every = 1;
    RunConfig first = config_;
    first.max_steps = 2;
    FakeModel good(config_.model);
    EXPECT_EQ(run(good, first), 0);
    const std::string last_good = find_newest_checkpoint(config_.output_dir).value();
    for (int attempt = 0; attempt < 3; ++attempt) {
        FakeModel bad(config_.model);
        bad.is_bad = [](int) { return true; };
        RunConfig longer = resumed(config_);
        longer.max_steps = 100;
        EXPECT_EQ(run(bad, longer), 1);
        EXPECT_EQ(bad.num_updates, 2);
        EXPECT_TRUE(std::filesystem::exists(last_good)) << attempt;
        EXPECT_EQ(checkpoint::list(config_.output_dir).size(), 2u) << attempt << ": of these weights one is enough";
        EXPECT_NE(err_.find("remove that folder to go on from the one before, " + last_good), std::string::npos)
            << err_;
    }
}

TEST_F(TrainLoop, WhatASignalKeptFromBeingDoneIsMadeUpFor) {
    config_.eval_every = config_.sample_every = 3, config_.sample_tokens = 4;
    const auto steps_of = [&](const char* event) {
        std::string steps;
        for (const Json& line : events(event)) {
            steps += std::to_string(line["step"].get<int>()) + " ";
        }
        return steps;
    };
    stop_signal::received = SIGINT;  // before the first step, where nothing is due
    FakeModel unstarted(config_.model);
    EXPECT_EQ(run(unstarted, config_), 0);
    stop_signal::received = 0;
    FakeModel model(config_.model);
    model.on_update = [](int n) { n == 3 ? std::raise(SIGINT) : 0; };
    EXPECT_EQ(run(model, resumed(config_)), 0);
    EXPECT_EQ(steps_of("validation") + steps_of("sample"), "");
    stop_signal::received = 0;
    FakeModel after(config_.model);
    after.on_update = [](int n) { n == 4 ? std::raise(SIGINT) : 0; };  // at step 7, where nothing is due
    EXPECT_EQ(run(after, resumed(config_)), 0);
    EXPECT_EQ(steps_of("validation"), "3 6 ");
    stop_signal::received = 0;
    FakeModel last(config_.model);
    EXPECT_EQ(run(last, resumed(config_)), 0);
    EXPECT_EQ(steps_of("validation"), "3 6 8 ");
    EXPECT_EQ(steps_of("sample"), "3 6 8 ");
}

// A process that is killed behind the last checkpoint leaves the metrics as they were at any of these lines.
TEST_F(TrainLoop, WhatAKilledRunLacksAtItsEndIsMadeUpFor) {
    config_.attention = AttentionMode::lighthouse, config_.lighthouse_steps = config_.max_steps;
    config_.seq_len = 512, config_.lighthouse.topk = 128, config_.lighthouse.levels = 2, config_.lighthouse.pool = 2;
    config_.lighthouse.dense_layers.clear();
    config_.sample_tokens = 4;
    FakeModel whole(config_.model);
    EXPECT_EQ(run(whole, config_), 0);
    const auto lines = [&] {
        std::vector<std::string> all;
        std::ifstream file(config_.output_dir + "/metrics.jsonl");
        for (std::string line; std::getline(file, line);) {
            all.push_back(line);
        }
        return all;
    };
    const std::vector<std::string> written = lines();
    const auto is = [](const std::string& line, const char* event) { return Json::parse(line)["event"] == event; };
    ASSERT_TRUE(is(written.end()[-3], "checkpoint") && is(written.end()[-2], "validation") &&
                is(written.back(), "sample"));
    const auto cut_off = [&](int num_lines) {
        std::ofstream file(config_.output_dir + "/metrics.jsonl");
        for (size_t i = 0; i + num_lines < written.size(); ++i) {
            file << written[i] << "\n";
        }
    };
    for (const int lost : {1, 2, 3}) {
        cut_off(lost);
        FakeModel after(config_.model), again(config_.model);
        EXPECT_EQ(run(after, resumed(config_)), 0);
        EXPECT_EQ(after.num_updates, 0);
        EXPECT_NE(out_.find("what was due after the last step is made up for"), std::string::npos) << out_;
        ASSERT_EQ(events("validation").size(), 1u);
        EXPECT_EQ(events("validation")[0]["attention"], "lighthouse") << "that of the last step";
        EXPECT_EQ(events("validation")[0]["loss"], Json::parse(written.end()[-2])["loss"]);
        ASSERT_EQ(events("sample").size(), 1u);
        EXPECT_EQ(events("sample")[0]["text"], Json::parse(written.back())["text"]);
        EXPECT_TRUE(events("attention_switch").empty());
        const std::vector<std::string> whole_again = lines();
        EXPECT_EQ(run(again, resumed(config_)), 0);
        EXPECT_NE(out_.find("nothing is left to train"), std::string::npos) << out_;
        EXPECT_EQ(lines(), whole_again);
    }
    cut_off(2);
    FakeModel bad(config_.model);
    bad.validation_loss = NAN;
    bad.on_evaluate = [&] { bad.set_attention(AttentionMode::dense); };
    EXPECT_EQ(run(bad, resumed(config_)), 1);
    EXPECT_NE(err_.find("the last validation loss is not finite"), std::string::npos) << err_;
    // Another end than that which it was killed before.
    cut_off(2);
    FakeModel beyond(config_.model);
    RunConfig shorter = resumed(config_);
    shorter.max_steps -= 1;
    EXPECT_EQ(run(beyond, shorter), 0);
    EXPECT_NE(out_.find("nothing is left to train"), std::string::npos) << out_;
}

// As the run that nobody interrupted: its last step was skipped, and it ends as any other.
TEST_F(TrainLoop, ALastStepThatWasSkippedEndsARunAsAnyOtherDoes) {
    config_.val_data = config_.train_data, config_.checkpoint_every = config_.max_steps - 1;
    config_.keep_checkpoints = 0;
    FakeModel model(config_.model), again(config_.model), after(config_.model);
    model.is_bad = [&](int n) { return n == config_.max_steps; };
    again.is_bad = [](int) { return true; };
    EXPECT_EQ(run(model, config_), 0);
    ASSERT_EQ(events("validation").size(), 1u);
    const std::string last = config_.output_dir + "/" + checkpoint::folder_name(config_.max_steps);
    ASSERT_TRUE(std::filesystem::exists(last));
    std::filesystem::remove_all(last);
    EXPECT_EQ(run(again, resumed(config_)), 0) << err_;
    EXPECT_EQ(again.num_updates, 1);
    EXPECT_EQ(events("validation").size(), 1u);
    // Killed between its last save and its evaluation.
    std::vector<std::string> lines;
    std::ifstream metrics(config_.output_dir + "/metrics.jsonl");
    for (std::string line; std::getline(metrics, line);) {
        lines.push_back(line);
    }
    std::ofstream file(config_.output_dir + "/metrics.jsonl");
    for (const std::string& line : lines) {
        if (Json::parse(line)["event"] != "validation") {
            file << line << "\n";
        }
    }
    file.close();
    EXPECT_EQ(run(after, resumed(config_)), 0);
    EXPECT_NE(out_.find("what was due after the last step is made up for"), std::string::npos) << out_;
    EXPECT_EQ(events("validation").size(), 1u);
}

TEST_F(TrainLoop, WhatAnInterruptedSaveLeftGoesWhenTheRunIsResumed) {
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    const std::string left = config_.output_dir + "/.partial-step00000004";
    const auto resume_with = [&](const char* max_steps) {
        std::filesystem::create_directory(left);
        const char* const words[] = {"train_gpt",   "--resume", "--output_dir", config_.output_dir.c_str(),
                                     "--max_steps", max_steps};
        resolve_run(parse_flags(6, words), RunRanks());
        return std::filesystem::exists(left);
    };
    EXPECT_TRUE(resume_with("0")) << "an evaluation writes nothing";
    EXPECT_FALSE(resume_with("8")) << "nor does a run that is over save again";
    {
        const OutputLock other(config_.output_dir);
        EXPECT_THROW(resume_with("8"), Error);
        EXPECT_TRUE(std::filesystem::exists(left)) << "of the one that has the lock";
    }
    std::filesystem::remove_all(config_.output_dir + "/step00000008");
    EXPECT_THROW(resume_with("8"), Error);
    EXPECT_TRUE(std::filesystem::exists(left)) << "where nothing else is, somebody may want that";
}

// Of the right lengths, but known to be damaged: whole ones are not removed for it. What takes its place is whole.
TEST_F(TrainLoop, ACheckpointThatWasPassedOverIsNoneOfThoseThatAreKept) {
    config_.checkpoint_every = 2, config_.keep_checkpoints = 2, config_.max_steps = 4;
    FakeModel model(config_.model), after(config_.model), again(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    const auto resume_with = [&](FakeModel& with, const char* max_steps, const char* every) {
        const char* const words[] = {"train_gpt",   "--resume", "--output_dir",       config_.output_dir.c_str(),
                                     "--max_steps", max_steps,  "--checkpoint_every", every};
        testing::internal::CaptureStderr();
        const RunConfig config = resolve_run(parse_flags(8, words), RunRanks());
        EXPECT_NE(testing::internal::GetCapturedStderr().find("passed over a damaged checkpoint: "), std::string::npos);
        EXPECT_EQ(run(with, config), 0);
        std::vector<int64_t> steps;
        for (const auto& [step, folder] : checkpoint::list(config_.output_dir)) {
            steps.push_back(step);
        }
        return steps;
    };
    const auto damage = [&](int64_t step) {
        const std::string path = config_.output_dir + "/" + checkpoint::folder_name(step) + "/model.safetensors";
        std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
        file.seekp(-1, std::ios::end);
        file.put('x');
    };
    damage(4);
    EXPECT_EQ(resume_with(after, "5", "0"), (std::vector<int64_t>{2, 4, 5}));
    EXPECT_EQ(after.num_updates, 3) << "from step 2 on";
    damage(5);
    damage(4);
    EXPECT_EQ(resume_with(again, "6", "1"), (std::vector<int64_t>{5, 6})) << "3, 4 and 5 were written anew";
}

// ---- folders

TEST_F(TrainLoop, AFolderThatIsAnotherRunsMeanwhileStaysAsItIs) {
    config_.checkpoint_every = 2;
    FakeModel model(config_.model);
    model.on_update = [&](int n) {
        if (n == 5) {
            std::filesystem::remove_all(config_.output_dir);
            RunConfig other = config_;
            other.seed = 9, other.max_steps = 2;
            FakeModel other_model(config_.model);
            EXPECT_EQ(run_training(other_model, other, device_), 0);
        }
    };
    testing::internal::CaptureStdout();
    try {
        run_training(model, config_, device_);
        ADD_FAILURE() << "this run's checkpoints would take the place of another's";
    } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find("is another run's folder now"), std::string::npos) << error.what();
    }
    testing::internal::GetCapturedStdout();
    ASSERT_EQ(checkpoint::list(config_.output_dir).size(), 1u);
    EXPECT_EQ(checkpoint::list(config_.output_dir).begin()->first, 2);
}

// Whoever has moved a running run's folder can go on from it there, also where that run was resumed itself.
TEST_F(TrainLoop, AFolderThatIsMovedIsLetGo) {
    FakeModel model(config_.model), after(config_.model);
    RunConfig first = config_;
    first.max_steps = 2;
    run(model, first);
    RunConfig second = resumed(config_);
    second.output_lock = lock_output(second);  // as resolve_run passes it on
    const std::string moved = folder_ + "/moved";
    after.on_update = [&](int n) {
        if (n == 1) {
            std::filesystem::rename(config_.output_dir, moved);
        }
    };
    bool was_free = false;
    after.on_evaluate = [&] {  // behind a checkpoint
        was_free = true;
        EXPECT_NO_THROW(OutputLock lock(moved));
    };
    EXPECT_EQ(run(after, second), 0);
    EXPECT_TRUE(was_free);
}

TEST_F(TrainLoop, AFolderThatIsRemovedIsMadeAndLockedAgain) {
    FakeModel model(config_.model);
    model.on_update = [&](int n) {
        if (n == 3) {
            std::filesystem::remove_all(config_.output_dir);
        }
    };
    model.on_evaluate = [&] { EXPECT_THROW(OutputLock other(config_.output_dir), Error) << "behind the checkpoint"; };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_NE(err_.find("has been removed or moved"), std::string::npos) << err_;
    EXPECT_TRUE(std::filesystem::exists(saved_settings_path(config_.output_dir)));
    EXPECT_EQ(events("checkpoint").size(), 1u);
    expect_two_more_steps();
}

// As where that is done between two saves: nothing of what was trained is lost.
TEST_F(TrainLoop, AFolderThatIsMovedWhileACheckpointIsWrittenIsMadeAndLockedAgain) {
    FakeModel probe(config_.model);
    int reads = 0;
    probe.on_read_state = [&] { ++reads; };
    EXPECT_EQ(run(probe, config_), 0);
    for (const int at : {1, reads / 2, reads}) {
        std::filesystem::remove_all(config_.output_dir);
        const std::string moved = folder_ + "/moved" + std::to_string(at);
        FakeModel model(config_.model);
        int n = 0;
        model.on_read_state = [&] { ++n == at ? std::filesystem::rename(config_.output_dir, moved) : void(); };
        model.on_evaluate = [&] { EXPECT_THROW(OutputLock other(config_.output_dir), Error) << "behind it"; };
        EXPECT_EQ(run(model, config_), 0);
        EXPECT_NE(err_.find("has been removed or moved"), std::string::npos) << err_;
        EXPECT_LE(n, 2 * reads) << "once more, and no more";
        EXPECT_TRUE(checkpoint::list(moved).empty());
        expect_two_more_steps();
    }
}

// What a process leaves that is killed before its new settings and metrics have their names.
TEST_F(TrainLoop, FilesThatAKilledRunWasWritingAreInNobodysWay) {
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    for (const char* name : {"/settings.toml.new", "/metrics.jsonl.new"}) {
        std::ofstream(config_.output_dir + name) << "cut off";
    }
    expect_two_more_steps();
    EXPECT_EQ(losses().size(), 10u);
}

TEST_F(TrainLoop, MetricsThatAreRemovedBeginAnew) {
    FakeModel model(config_.model);
    config_.checkpoint_every = 4;
    model.on_update = [&](int n) { n == 3 ? std::filesystem::remove(config_.output_dir + "/metrics.jsonl") : false; };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_NE(err_.find("/metrics.jsonl has been removed: it begins anew"), std::string::npos) << err_;
    EXPECT_EQ(losses().size(), (size_t)config_.max_steps - 4) << "those after the checkpoint";
    EXPECT_EQ(events("checkpoint").size(), 2u);
}

TEST_F(TrainLoop, MetricsThatAreReplacedGoOnInTheNewFile) {
    FakeModel model(config_.model);
    const std::string metrics = config_.output_dir + "/metrics.jsonl", other = folder_ + "/other";
    model.on_update = [&](int n) {
        if (n == 3) {  // as sed -i does
            std::filesystem::copy_file(metrics, other);
            std::filesystem::rename(other, metrics);
        }
    };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_NE(err_.find("/metrics.jsonl has been replaced by another file: that one goes on"), std::string::npos)
        << err_;
    EXPECT_EQ(losses().size(), (size_t)config_.max_steps);
    EXPECT_EQ(events("start").size(), 1u);
}

TEST_F(TrainLoop, AStartThatFailsLeavesNothingOfARun) {
    const std::string settings = saved_settings_path(config_.output_dir);
    std::filesystem::create_directories(config_.output_dir);
    std::filesystem::create_symlink("/no/such/folder/x", config_.output_dir + "/metrics.jsonl");
    FakeModel model(config_.model);
    EXPECT_THROW(run(model, config_), Error);
    EXPECT_FALSE(std::filesystem::exists(settings));
    std::filesystem::remove(config_.output_dir + "/metrics.jsonl");
    std::filesystem::create_directory(settings + ".new");  // the settings cannot be written
    std::ofstream(settings + ".new/x") << "";
    EXPECT_THROW(run(model, config_), Error);
    EXPECT_FALSE(std::filesystem::exists(config_.output_dir + "/metrics.jsonl"));
    std::filesystem::remove_all(settings + ".new");
    EXPECT_EQ(run(model, config_), 0) << "the folder is as good as new";
}

TEST_F(TrainLoop, SettingsThatAreRemovedAreMadeAgain) {
    FakeModel model(config_.model);
    model.on_update = [&](int n) { n == 3 ? std::filesystem::remove(saved_settings_path(config_.output_dir)) : false; };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_NE(err_.find("/settings.toml has been removed: it is made again"), std::string::npos) << err_;
    EXPECT_EQ(err_.find("metrics.jsonl"), std::string::npos) << err_;
    EXPECT_TRUE(std::filesystem::exists(saved_settings_path(config_.output_dir)));
    EXPECT_EQ(losses().size(), 8u) << "metrics go on";
}

// Whoever has removed the lock's file could start a second run there.
TEST_F(TrainLoop, ALockWhoseFileIsRemovedIsTakenAgain) {
    config_.checkpoint_every = 4;
    FakeModel model(config_.model), other(config_.model);
    model.on_update = [&](int n) { n == 3 ? std::filesystem::remove(config_.output_dir + "/.lock") : false; };
    model.on_evaluate = [&] { EXPECT_THROW(OutputLock second(config_.output_dir), Error) << "behind a checkpoint"; };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_EQ(err_, "");
    EXPECT_EQ(events("checkpoint").size(), 2u);

    RunConfig longer = resumed(config_);
    longer.max_steps += 4;
    std::optional<OutputLock> second;
    other.on_update = [&](int n) {
        if (n == 3) {
            std::filesystem::remove(config_.output_dir + "/.lock");
            second.emplace(config_.output_dir);
        }
    };
    EXPECT_THROW(run(other, longer), Error);
    EXPECT_EQ(checkpoint::list(config_.output_dir).size(), 2u);
}

TEST_F(TrainLoop, ARunThatIsOverIsNotWrittenToAgain) {
    FakeModel model(config_.model), after(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    const size_t starts = events("start").size();
    EXPECT_EQ(run(after, resumed(config_)), 0);
    EXPECT_EQ(after.num_updates, 0);
    EXPECT_NE(out_.find("already at step 8"), std::string::npos) << out_;
    EXPECT_EQ(events("start").size(), starts);
}

TEST_F(TrainLoop, TwoAtOnceInOneFolderAreRefused) {
    std::filesystem::create_directory(config_.output_dir);
    const auto refused = [&](const RunConfig& config, const char* words) {
        FakeModel model(config_.model);
        try {
            run(model, config);
            FAIL() << "was accepted";
        } catch (const Error& error) {
            EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
        }
        EXPECT_EQ(model.num_updates, 0);
    };
    {
        const OutputLock other(config_.output_dir);
        refused(config_, "another process is training into this folder");
    }
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0) << "a folder with nothing but the lock's file holds no run";
    {
        const OutputLock other(config_.output_dir);
        try {
            check_holds_no_run(config_, true);
            FAIL() << "was accepted";
        } catch (const Error& error) {
            EXPECT_NE(std::string(error.what()).find("another process is training"), std::string::npos)
                << "not that it should be removed: " << error.what();
        }
    }
    refused(config_, "already holds a run");  // of a process that came and went while this one read its data
    RunConfig settings_alone = config_;
    settings_alone.output_dir = folder_ + "/settings";
    std::filesystem::create_directory(settings_alone.output_dir);
    std::ofstream(settings_alone.output_dir + "/settings.toml") << "# mine\n";
    refused(settings_alone, "holds a settings.toml, which this run would replace");
    EXPECT_EQ(read_text_file(settings_alone.output_dir + "/settings.toml"), "# mine\n");
    RunConfig longer = resumed(config_);
    longer.max_steps += 1;
    {
        const auto lock = std::make_shared<OutputLock>(config_.output_dir);
        refused(longer, "another process is training into this folder");
        longer.output_lock = lock;  // as resolve_run passes it on
        EXPECT_EQ(run(model, longer), 0);
    }
}
