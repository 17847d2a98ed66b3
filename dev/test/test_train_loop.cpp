// test_train_loop.cpp: the training loop around a model that does as told: what is skipped, counted, logged, saved and
// stopped, and when. Runs that go on, stages and samples: test_train_loop_*.cpp.
#include <sys/resource.h>
#include <sys/wait.h>

#include <chrono>
#include <csignal>

#include "pseudo_terminal.h"
#include "train_loop_testing.h"

TEST_F(TrainLoop, FreshRunInitializesFromTheSeed) {
    FakeModel model(config_.model), again(config_.model), other(config_.model);
    RunConfig no_steps = config_;
    no_steps.max_steps = 0;
    run(model, no_steps), run(again, no_steps);
    no_steps.seed = 1;
    run(other, no_steps);
    EXPECT_EQ(model.state(StateKind::master), again.state(StateKind::master));
    EXPECT_NE(model.state(StateKind::master), other.state(StateKind::master));
    const ParameterTable& table = model.parameters();
    for (size_t i = 0; i < table.tensors.size(); ++i) {
        double sum = 0.0, squares = 0.0;
        for (const float x : model.state(StateKind::master)[i]) {
            sum += x, squares += (double)x * x;
        }
        const double n = (double)table.tensors[i].num_elements(), std = table.tensors[i].init_std;
        if (std == 0.0) {
            EXPECT_EQ(sum, n) << table.tensors[i].name;
        } else {
            EXPECT_NEAR(sum / n, 0.0, 5 * std / std::sqrt(n)) << table.tensors[i].name;
            EXPECT_NEAR(std::sqrt(squares / n), std, 5 * std / std::sqrt(2 * n)) << table.tensors[i].name;
        }
        for (const StateKind kind : {StateKind::exp_avg, StateKind::exp_avg_sq}) {
            for (const float x : model.state(kind)[i]) {
                ASSERT_EQ(x, 0.0f) << state_kind_name(kind);
            }
        }
        for (size_t other = 0; other < i; ++other) {  // a stream of random numbers each: not scaled copies
            const float a = model.state(StateKind::master)[i][0], b = model.state(StateKind::master)[other][0];
            if (std != 0.0 && table.tensors[other].init_std != 0.0) {
                EXPECT_NE((float)(a / std), (float)(b / table.tensors[other].init_std));
            }
        }
    }
    EXPECT_FALSE(std::filesystem::exists(config_.output_dir)) << "--max_steps 0 writes nothing";
    EXPECT_NE(out_.find("validation loss 1.000000"), std::string::npos) << out_;
    EXPECT_NE(err_.find("random initial weights of --seed"), std::string::npos) << err_;
}

TEST_F(TrainLoop, ARunFromWeightsBeginsWithAnEmptyOptimizer) {
    FakeModel model(config_.model), after(config_.model);
    config_.max_steps = 1;
    EXPECT_EQ(run(model, config_), 0);
    RunConfig from = config_;
    from.init_from = from.checkpoint = *find_newest_checkpoint(config_.output_dir), from.max_steps = 0;
    EXPECT_EQ(run(after, from), 0);
    EXPECT_EQ(after.state(StateKind::master), model.state(StateKind::master));
    for (const StateKind kind : {StateKind::exp_avg, StateKind::exp_avg_sq}) {
        for (const std::vector<float>& tensor : after.state(kind)) {
            EXPECT_EQ(tensor, std::vector<float>(tensor.size(), 0.0f)) << state_kind_name(kind);
        }
    }
}

TEST_F(TrainLoop, UpdatesGetTheSettingsAndTheLearningRateOfTheirStep) {
    config_.learning_rate = 0.6, config_.schedule = ScheduleKind::linear, config_.final_learning_rate_fraction = 0.0;
    config_.beta1 = 0.7, config_.beta2 = 0.8, config_.adam_eps = 1e-5, config_.weight_decay = 0.3;
    config_.max_grad_norm = 0.25;
    FakeModel model(config_.model);
    model.is_bad = [](int n) { return n == 4; };
    EXPECT_EQ(run(model, config_), 0);
    // Two steps of warm-up, 0.6 (step + 1) / 2; then 0.6 (1 - (step - 2) / 6). A skipped step counts.
    const std::vector<double> rates = {0.3, 0.6, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1};
    ASSERT_EQ(model.settings_of_updates.size(), rates.size());
    for (size_t step = 0; step < rates.size(); ++step) {
        const AdamWSettings& given = model.settings_of_updates[step];
        EXPECT_NEAR(given.learning_rate, rates[step], 1e-15) << "step " << step;
        EXPECT_EQ(given.beta1, 0.7);
        EXPECT_EQ(given.beta2, 0.8);
        EXPECT_EQ(given.eps, 1e-5);
        EXPECT_EQ(given.weight_decay, 0.3);
        EXPECT_EQ(given.max_grad_norm, 0.25);
    }
    EXPECT_EQ(model.adam_steps(), (std::vector<int64_t>{1, 2, 3, 4, 4, 5, 6, 7}));
    const std::vector<Json> steps = events("step");
    ASSERT_EQ(steps.size(), 7u) << "and one that is skipped";
    for (const Json& step : steps) {
        EXPECT_NEAR(step["learning_rate"].get<double>(), rates[step["step"].get<int>() - 1], 1e-15) << step;
    }
}

TEST_F(TrainLoop, AStepsLineSaysWhatItDidAndHowFast) {
    config_.global_batch = 6, config_.max_steps = 2;
    device_.peak_tflops = 1e-6;  // a million a second
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    ASSERT_EQ(events("step").size(), 2u);
    const Json step = events("step")[1];
    std::vector<std::string> names;
    for (const auto& [name, value] : step.items()) {
        names.push_back(name);
    }
    std::sort(names.begin(), names.end());
    EXPECT_EQ(names,
              (std::vector<std::string>{"attention", "data_position", "elapsed_ms", "epoch", "event", "grad_norm",
                                        "learning_rate", "loss", "memory_gib", "mfu", "mfu_dense_equivalent",
                                        "seconds_left", "skipped", "step", "tokens", "tokens_per_second"}));
    EXPECT_EQ(step["step"], 2);
    EXPECT_EQ(step["attention"], "dense");
    EXPECT_EQ(step["data_position"], 6) << "its first sequence";
    EXPECT_EQ(step["tokens"], 192) << "2 steps of 6 sequences of 16";
    EXPECT_EQ(step["skipped"], 0);
    // 20002 tokens with both markers; all but the last 1000, which validate, are 1187 sequences of 16 and targets.
    EXPECT_NEAR(step["epoch"].get<double>(), 6.0 / 1187.0, 1e-12);
    const double seconds = step["elapsed_ms"].get<double>() / 1e3;
    EXPECT_NEAR(step["tokens_per_second"].get<double>() * seconds, 96.0, 1e-9) << "6 sequences of 16";
    // One layer: V 258, C = F = D = 8, H = Hkv = 1: 8 x 24 + 8 x 8 + 3 x 8 x 8 + 258 x 8 = 2512 elements of matrices.
    // 6 sequences of 6 x 2512 x 16 + 3.5 x 2 x 16^2 x 8 = 255488 FLOPs
    EXPECT_NEAR(step["mfu"].get<double>() * seconds * 1e6, 1532928.0, 1e-3);
    EXPECT_EQ(step["mfu"], step["mfu_dense_equivalent"]);
}

TEST_F(TrainLoop, TheTimeLeftIsByTheStepsOfThisProcess) {
    config_.decay_steps = config_.max_steps;
    RunConfig first = config_;
    first.max_steps = 4;
    FakeModel model(config_.model), after(config_.model);
    model.on_update = after.on_update = [](int) { usleep(10000); };
    const auto start = std::chrono::steady_clock::now();
    EXPECT_EQ(run(model, first), 0);
    EXPECT_EQ(run(after, resumed(config_)), 0);
    const double both_runs = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const std::vector<double> left = of_steps<double>("seconds_left"), elapsed_ms = of_steps<double>("elapsed_ms");
    ASSERT_EQ(left.size(), 8u);
    for (const int begin : {0, 4}) {
        EXPECT_NEAR(left[begin], 3e-3 * elapsed_ms[begin], 1e-9) << "three more like the first";
        EXPECT_GE(left[begin + 1], 2 * 0.01);
        EXPECT_LE(left[begin + 1], 2 * both_runs);
        EXPECT_GE(left[begin + 2], 0.01);
        EXPECT_LE(left[begin + 2], both_runs);
        EXPECT_EQ(left[begin + 3], 0.0);
    }
}

TEST_F(TrainLoop, ATerminalHasAProgressBar) {
    PseudoTerminal terminal;
    const pid_t child = fork();  // a terminal holds little that is not read yet
    if (child == 0) {
        dup2(terminal.terminal(), STDOUT_FILENO);
        FakeModel model(config_.model);
        const int status = run_training(model, config_, device_);
        std::fflush(stdout);
        _exit(status);
    }
    const std::string text = terminal.read_to_the_end();
    int status;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
    EXPECT_NE(text.find("[####################....................]  50 %, "), std::string::npos) << text;
}

TEST_F(TrainLoop, SkippedStepsAreCountedLoggedAndNotApplied) {
    FakeModel model(config_.model);
    model.is_bad = [](int n) { return n == 3 || n == 4; };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_EQ(model.adam_steps(), (std::vector<int64_t>{1, 2, 3, 3, 3, 4, 5, 6}));
    const std::vector<Json> skips = events("skip");
    ASSERT_EQ(skips.size(), 2u);
    EXPECT_EQ(skips[0]["step"], 3);
    EXPECT_EQ(skips[0]["data_position"], 4);
    EXPECT_EQ(skips[0]["first_bad_tensor"], "layer0.qkv");
    EXPECT_TRUE(skips[0]["loss"].is_null());
    EXPECT_EQ(skips[1]["skipped"], 2);
    EXPECT_EQ(losses().size(), 6u);
    EXPECT_NE(out_.find("layer0.qkv"), std::string::npos);
}

TEST_F(TrainLoop, TooManySkipsInARowStopWithACheckpoint) {
    config_.max_skipped = 3;
    FakeModel model(config_.model);
    model.is_bad = [](int n) { return n == 1 || n == 2 || n >= 4; };
    EXPECT_EQ(run(model, config_), 1);
    EXPECT_EQ(model.num_updates, 6) << "two, one good, three";
    EXPECT_NE(err_.find("layer0.qkv"), std::string::npos) << err_;
    EXPECT_NE(err_.find("sequence 6"), std::string::npos) << err_;
    FakeModel after(config_.model);
    EXPECT_EQ(run(after, resumed(config_)), 0) << "a checkpoint was written";
    EXPECT_EQ(after.adam_steps(), (std::vector<int64_t>{2, 3}));
}

TEST_F(TrainLoop, ARunOfNothingButSkipsFails) {
    FakeModel bad(config_.model), good(config_.model), bad_again(config_.model), last_bad(config_.model);
    bad.is_bad = bad_again.is_bad = [](int) { return true; };
    EXPECT_EQ(run(bad, config_), 1) << "8 steps are fewer than --max_skipped";
    EXPECT_NE(err_.find("all 8 steps was not finite (last: layer0.qkv): " + config_.output_dir + "/step00000008"),
              std::string::npos)
        << err_;
    EXPECT_NE(err_.find("from sequence 0 on"), std::string::npos) << err_;
    EXPECT_EQ(std::count(err_.begin(), err_.end(), '\n'), 1) << err_;
    EXPECT_EQ(events("stop").at(0)["skipped_in_a_row"], 8);
    EXPECT_EQ(run(good, resumed(config_)), 0);
    EXPECT_NE(out_.find("nothing is left to train"), std::string::npos) << "and nothing was due: " << out_;
    EXPECT_EQ(events("validation").size(), 0u);
    RunConfig longer = resumed(config_);
    longer.max_steps = 10;
    EXPECT_EQ(run(good, longer), 0);
    EXPECT_EQ(good.adam_steps(), (std::vector<int64_t>{1, 2}));
    longer = resumed(longer);
    longer.max_steps = 12;
    EXPECT_EQ(run(bad_again, longer), 0) << "as a run of 12 steps that nobody interrupted: its weights are trained";
    EXPECT_EQ(err_.find("nothing was trained"), std::string::npos) << err_;
    longer = resumed(longer);
    longer.max_steps = 14;
    last_bad.is_bad = [](int n) { return n == 2; };
    EXPECT_EQ(run(last_bad, longer), 0) << "one of two";
}

TEST_F(TrainLoop, WhatIsTrainedIsSavedBeforeWhatMayFail) {
    FakeModel model(config_.model);
    config_.val_data = config_.train_data;
    model.on_evaluate = [] { fail("the validation data are bad"); };
    EXPECT_THROW(run(model, config_), Error);
    EXPECT_NE(find_newest_checkpoint(config_.output_dir).value().find("step00000008"), std::string::npos);
}

TEST_F(TrainLoop, ValidationDataThatProveBadCostNoSteps) {
    config_.train_data = {write_shard("/train.bin", 8)};
    config_.val_data = {write_shard("/validation.bin", config_.model.vocab_size)};
    config_.data_format = DataFormat::shards, config_.eval_every = 3;
    FakeModel model(config_.model);
    EXPECT_THROW(run(model, config_), Error);
    EXPECT_EQ(model.num_updates, 3);
    EXPECT_NE(find_newest_checkpoint(config_.output_dir).value().find("step00000003"), std::string::npos);
}

TEST_F(TrainLoop, TrainingDataThatProveBadCostNoSteps) {
    config_.train_data = {write_shard("/train.bin", config_.model.vocab_size)};
    config_.data_format = DataFormat::shards, config_.max_steps = 59;  // all 118 sequences of 16
    FakeModel model(config_.model);
    EXPECT_THROW(run(model, config_), Error);
    EXPECT_GT(model.num_updates, 0);
    EXPECT_EQ(find_newest_checkpoint(config_.output_dir).value_or("no checkpoint"),
              config_.output_dir + "/" + checkpoint::folder_name(model.num_updates));
}

TEST_F(TrainLoop, ACheckpointIsWrittenWhereMetricsCannotBe) {
    FakeModel model(config_.model);
    rlimit before;
    ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
    const auto limit = [&](rlim_t num_bytes) {
        const rlimit now = {num_bytes, before.rlim_max};
        ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &now), 0);
    };
    std::signal(SIGXFSZ, SIG_IGN);  // as trainers have it
    // metrics.jsonl reaches it before any of this model's files would.
    config_.max_steps = 100000;
    limit(60000);
    testing::internal::CaptureStdout();
    EXPECT_THROW(run_training(model, config_, device_), Error);
    testing::internal::GetCapturedStdout();
    limit(before.rlim_cur);
    const std::optional<std::string> newest = find_newest_checkpoint(config_.output_dir);
    ASSERT_TRUE(newest) << "what was trained is lost";
    EXPECT_EQ(*newest, config_.output_dir + "/" + checkpoint::folder_name(model.num_updates));
}

TEST_F(TrainLoop, WeightsAreSavedInTheTypeOfTheDeviceUnlessToldOtherwise) {
    config_.max_steps = 1;
    const auto saved = [&](bool is_gpu, SaveDtype choice) {
        std::filesystem::remove_all(config_.output_dir);
        device_.is_gpu = is_gpu, config_.save_dtype = choice;
        FakeModel model(config_.model);
        EXPECT_EQ(run(model, config_), 0);
        const std::string folder = find_newest_checkpoint(config_.output_dir).value();
        return SafetensorsFile(folder + "/model.safetensors").tensors().at(0).dtype;
    };
    EXPECT_EQ(saved(false, SaveDtype::automatic), Dtype::F32);
    EXPECT_EQ(saved(true, SaveDtype::automatic), Dtype::BF16);
    EXPECT_EQ(saved(false, SaveDtype::bf16), Dtype::BF16);
    EXPECT_EQ(saved(true, SaveDtype::fp32), Dtype::F32);
}

TEST_F(TrainLoop, SignalFinishesTheStepAndSaves) {
    std::signal(SIGHUP, SIG_DFL);  // whoever runs the tests may ignore it
    for (const int signal_number : {SIGINT, SIGTERM, SIGUSR1, SIGHUP}) {
        std::filesystem::remove_all(config_.output_dir);
        stop_signal::received = 0;
        FakeModel model(config_.model);
        model.on_update = [&](int n) {
            if (n == 3) {
                std::raise(signal_number);
                std::raise(signal_number);  // no second signal: wrappers pass on what has come already
                std::raise(SIGHUP);         // nor this one: a closed terminal may send two
            }
        };
        EXPECT_EQ(run(model, config_), 0);
        EXPECT_EQ(model.num_updates, 3);
        EXPECT_EQ(losses().size(), 3u);
        EXPECT_NE(out_.find("--resume --output_dir " + config_.output_dir), std::string::npos) << out_;
        stop_signal::received = 0;
        FakeModel after(config_.model);
        EXPECT_EQ(run(after, resumed(config_)), 0);
        EXPECT_EQ(after.num_updates, 5);
    }
}

// There is nothing to train then, but an evaluation that did not end.
TEST_F(TrainLoop, SignalAfterTheLastStepSaysHowToMakeUpForTheEnd) {
    config_.val_data = config_.train_data;
    FakeModel model(config_.model);
    model.on_evaluate = [] { std::raise(SIGINT); };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_EQ(model.num_updates, 8);
    EXPECT_NE(out_.find("after the last step"), std::string::npos) << out_;
    EXPECT_NE(out_.find("--resume --output_dir " + config_.output_dir + "\n"), std::string::npos) << out_;
    EXPECT_EQ(out_.find("| validation loss"), std::string::npos) << "of a part of the data: " << out_;
    EXPECT_TRUE(events("validation").empty());
    stop_signal::received = 0;
    FakeModel after(config_.model);
    EXPECT_EQ(run(after, resumed(config_)), 0);
    EXPECT_NE(out_.find("validation loss 1.0"), std::string::npos) << out_;
    EXPECT_EQ(events("validation").size(), 1u);

    config_.val_data.clear(), config_.val_fraction = 0.0;
    std::filesystem::remove_all(config_.output_dir);
    FakeModel nothing_to_evaluate(config_.model);
    nothing_to_evaluate.on_update = [](int n) { n == 8 ? std::raise(SIGINT) : 0; };
    EXPECT_EQ(run(nothing_to_evaluate, config_), 0);
    EXPECT_NE(out_.find("after the last step"), std::string::npos) << out_;
    EXPECT_EQ(out_.find("--resume"), std::string::npos) << out_;
    stop_signal::received = 0;
}

TEST_F(TrainLoop, AnEvaluationOfBadWeightsFails) {
    config_.val_data = config_.train_data, config_.max_steps = 0;
    FakeModel model(config_.model);
    model.validation_loss = NAN;
    EXPECT_THROW(run(model, config_), Error);
}

TEST_F(TrainLoop, ARunWhoseLastValidationLossIsNotFiniteFails) {
    config_.val_data = config_.train_data, config_.eval_every = 4;
    FakeModel bad(config_.model), bad_in_between(config_.model);
    bad.validation_loss = NAN;
    EXPECT_EQ(run(bad, config_), 1);
    EXPECT_NE(err_.find("the last validation loss is not finite"), std::string::npos) << err_;
    EXPECT_NE(err_.find(config_.output_dir + "/step00000008"), std::string::npos) << "it is saved, and named: " << err_;
    EXPECT_EQ(run(bad, resumed(config_)), 1) << "to go on is not to get over it";
    EXPECT_NE(err_.find("the last validation loss is not finite"), std::string::npos) << err_;
    config_.output_dir += "_in_between";
    bad_in_between.on_evaluate = [&] { bad_in_between.validation_loss = bad_in_between.num_updates == 4 ? NAN : 1.0; };
    EXPECT_EQ(run(bad_in_between, config_), 0) << err_;
}

TEST_F(TrainLoop, SecondSignalEndsTheProcess) {
    FakeModel model(config_.model);
    model.on_update = [](int) {
        std::raise(SIGTERM);
        usleep(600000);  // what comes within half a second is the same request
        std::raise(SIGTERM);
    };
    testing::internal::CaptureStdout();
    EXPECT_EXIT(run_training(model, config_, DeviceInfo()), testing::ExitedWithCode(128 + SIGTERM),
                "without a checkpoint");
    testing::internal::GetCapturedStdout();
}

TEST_F(TrainLoop, EvaluationCoversAsManyBatchesAsAsked) {
    config_.max_steps = 1;  // 1000 tokens, 62 sequences of 16, batches of 2
    for (const auto& [batches, sequences] :
         std::vector<std::pair<int64_t, int64_t>>{{0, 62}, {1, 2}, {30, 60}, {31, 62}, {32, 62}, {INT64_MAX, 62}}) {
        std::filesystem::remove_all(config_.output_dir);
        config_.eval_batches = batches;
        FakeModel model(config_.model);
        EXPECT_EQ(run(model, config_), 0);
        EXPECT_EQ(events("validation").at(0)["tokens"], 16 * sequences) << batches << " batches";
        EXPECT_EQ((int64_t)model.attention_of_evaluations.size(), sequences / 2);
    }
}

TEST_F(TrainLoop, CheckpointsAreKeptAsAsked) {
    config_.checkpoint_every = 1, config_.keep_checkpoints = 2;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    int folders = 0;
    for (const auto& entry : std::filesystem::directory_iterator(config_.output_dir)) {
        folders += entry.is_directory();
    }
    EXPECT_EQ(folders, 2);
    EXPECT_EQ(events("checkpoint").size(), 8u);
}

TEST_F(TrainLoop, GradientAccumulationCoversTheSameSequences) {
    config_.global_batch = 6;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_EQ(model.attention_of_steps.size(), 24u) << "three micro-batches a step";
    EXPECT_EQ(events("step")[1]["data_position"], 6);
}
