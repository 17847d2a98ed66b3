// test_train_loop_stages.cpp: Lighthouse attention, then dense: what a run says, measures and does at the switch.
#include <csignal>
#include <numeric>

#include "train_loop_testing.h"

TEST_F(TrainLoop, LayersThatAreAllDenseAreSaid) {
    FakeModel model(config_.model);
    config_.attention = AttentionMode::lighthouse, config_.seq_len = 256;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers.resize(config_.model.num_layers);
    std::iota(config_.lighthouse.dense_layers.begin(), config_.lighthouse.dense_layers.end(), 0);
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_NE(err_.find("all layers are dense (--lighthouse_dense_layers \"0\"), so nothing is different"),
              std::string::npos)
        << err_;
}

TEST_F(TrainLoop, TheStartSaysWhatLighthouseSaves) {
    config_.attention = AttentionMode::lighthouse, config_.seq_len = 1024, config_.val_fraction = 0.2;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers = {0};
    config_.model.num_layers = 2, config_.max_steps = 1;
    device_.peak_tflops = 1e-6;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    // S = 1024 / 2 + 2 x 128 = 768, and (768 / 1024)^2 of the dense work. FLOPs of a sequence, with 2 x 448 + 258 x 8 =
    // 2960 elements of matrices, dense: 6 x 2960 x 1024 + 2 x 7 x 1024^2 x 8 = 135626752; with the second layer on 768
    // rows: 6 x 2960 x 1024 + 7 x 1024^2 x 8 + 7 x 768^2 x 8 = 109936640; their ratio is 1.2337.
    EXPECT_NE(
        out_.find("\nlighthouse  T 1024, S 768, 1 tiles; 1 of 2 layers; their attention does 56.25 % of the dense "
                  "work; expected speed-up of a step 1.23x\n"),
        std::string::npos)
        << out_;
    const Json step = events("step").at(0);
    const double flops = 1e6 * step["elapsed_ms"].get<double>() / 1e3;  // of the device, while the step took place
    EXPECT_NEAR(step["mfu"].get<double>() * flops, 2.0 * 109936640.0, 1e-2);
    EXPECT_NEAR(step["mfu_dense_equivalent"].get<double>() * flops, 2.0 * 135626752.0, 1e-2);
    EXPECT_EQ(step["attention"], "lighthouse");
}

TEST_F(TrainLoop, SwitchesToDenseAttention) {
    config_.attention = AttentionMode::lighthouse, config_.lighthouse_steps = 3, config_.eval_every = 2;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers = {};
    config_.seq_len = 256, config_.max_steps = 5;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    const AttentionMode L = AttentionMode::lighthouse, D = AttentionMode::dense;
    EXPECT_EQ(model.attention_of_steps, (std::vector<AttentionMode>{L, L, L, D, D}));
    const std::vector<Json> switches = events("attention_switch"), validations = events("validation");
    ASSERT_EQ(switches.size(), 1u);
    EXPECT_EQ(switches[0]["step"], 3);
    ASSERT_EQ(validations.size(), 3u) << "steps 2 and 4 and the end";
    EXPECT_EQ(validations[0]["loss"], 2.0) << "under Lighthouse attention";
    EXPECT_EQ(validations[0]["dense_loss"], 1.0);
    EXPECT_EQ(validations[1]["loss"], 1.0);
    // S = T / 2 + 2 x 128
    EXPECT_NE(out_.find("\nlighthouse  T 256, S 384, 1 tiles; 1 of 1 layers; "), std::string::npos) << out_;
    EXPECT_NE(out_.find("x; dense from step 3 on\n"), std::string::npos) << out_;
    RunConfig longer = resumed(config_);
    longer.max_steps = 6;
    FakeModel after(config_.model);
    EXPECT_EQ(run(after, longer), 0);
    EXPECT_NE(out_.find("x; dense since step 3 (--lighthouse_steps; -1: never)\n"), std::string::npos) << out_;
}

TEST_F(TrainLoop, ASwitchAtStepZeroIsBeforeTheFirstStep) {
    config_.attention = AttentionMode::lighthouse, config_.lighthouse_steps = 0;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers = {};
    config_.seq_len = 256, config_.max_steps = 2;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_EQ(model.attention_of_steps, std::vector<AttentionMode>(2, AttentionMode::dense));
}

// A signal at the step of the switch: its evaluation is made up for by a process whose steps are all dense.
TEST_F(TrainLoop, WhatIsMadeUpForAtASwitchIsOfTheAttentionBefore) {
    config_.attention = AttentionMode::lighthouse, config_.lighthouse_steps = 3;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers = {};
    config_.seq_len = 256, config_.max_steps = 5, config_.eval_every = 3, config_.eval_batches = 1;
    FakeModel model(config_.model), after(config_.model);
    model.on_update = [](int n) { n == 3 ? std::raise(SIGINT) : 0; };
    EXPECT_EQ(run(model, config_), 0);
    stop_signal::received = 0;
    EXPECT_EQ(run(after, resumed(config_)), 0);
    const AttentionMode L = AttentionMode::lighthouse, D = AttentionMode::dense;
    EXPECT_EQ(after.attention_of_evaluations, (std::vector<AttentionMode>{L, D, D}))
        << "step 3 under both, and the end";
    EXPECT_EQ(after.attention_of_steps, (std::vector<AttentionMode>{D, D}));
}

// The step of the switch is where stage 1 ends, and often where its process does.
TEST_F(TrainLoop, ASwitchWhereARunGoesOnIsSaid) {
    config_.attention = AttentionMode::lighthouse, config_.seq_len = 256;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers = {};
    config_.max_steps = 3;
    RunConfig by_steps = config_, by_flag = config_;
    by_steps.lighthouse_steps = 3, by_flag.attention = AttentionMode::dense;
    const auto switches_after = [&](RunConfig first, RunConfig next) {
        std::filesystem::remove_all(config_.output_dir);
        FakeModel model(config_.model);
        EXPECT_EQ(run(model, first), 0);
        EXPECT_EQ(events("attention_switch").size(), 0u);
        next = resumed(next);
        next.max_steps = 5;
        FakeModel killed(config_.model), again(config_.model);
        killed.on_update = [](int) { fail("killed"); };  // and leaves what it wrote behind the checkpoint
        EXPECT_THROW(run(killed, next), Error);
        EXPECT_EQ(run(again, next), 0);
        return events("attention_switch");
    };
    for (const RunConfig& next : {by_steps, by_flag}) {
        const std::vector<Json> switches = switches_after(config_, next);
        ASSERT_EQ(switches.size(), 1u);
        EXPECT_EQ(switches[0]["step"], 3);
        EXPECT_EQ(switches[0]["attention"], "dense");
        EXPECT_NE(out_.find("step 3 | attention is dense from here on"), std::string::npos) << out_;
    }
    const std::vector<Json> back = switches_after(by_flag, config_);
    ASSERT_EQ(back.size(), 1u);
    EXPECT_EQ(back[0]["attention"], "lighthouse");
    EXPECT_EQ(switches_after(config_, config_).size(), 0u);
    EXPECT_EQ(switches_after(by_flag, by_flag).size(), 0u);
}

TEST_F(TrainLoop, InfluenceIsLoggedWithTheValidationLoss) {
    config_.attention = AttentionMode::lighthouse, config_.seq_len = 256, config_.max_steps = 1;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers = {};
    config_.print_influence = true;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    const Json influence = events("validation").at(0).value("influence", Json::object());
    EXPECT_EQ(influence.value("tile_tokens", 0), 256) << influence;
    EXPECT_EQ(influence.value("next_token", Json::object()).value("loss", 0.0), 2.0) << "under Lighthouse attention";
}

TEST_F(TrainLoop, AnInfluenceThatASignalCutsShortIsMadeUpForWithItsValidationLoss) {
    config_.attention = AttentionMode::lighthouse, config_.lighthouse.dense_layers.clear();
    config_.seq_len = 512, config_.lighthouse.topk = 128, config_.lighthouse.levels = 2, config_.lighthouse.pool = 2;
    config_.eval_every = 3, config_.print_influence = true;
    FakeModel model(config_.model), after(config_.model);
    model.on_token_losses = [] { std::raise(SIGINT); };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_TRUE(events("validation").empty());
    EXPECT_NE(out_.find("--resume --output_dir " + config_.output_dir + " --print_influence\n"), std::string::npos)
        << out_;
    stop_signal::received = 0;
    EXPECT_EQ(run(after, resumed(config_)), 0);
    ASSERT_EQ(events("validation").size(), 3u);
    for (const Json& validation : events("validation")) {
        EXPECT_TRUE(validation.contains("influence")) << validation;
    }
}
