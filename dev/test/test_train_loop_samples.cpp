// test_train_loop_samples.cpp: the texts that a run samples: from which tokens, by which random numbers, how they end.
#include <csignal>

#include "train_loop_testing.h"

TEST_F(TrainLoop, SamplesAreLoggedAndReproducible) {
    config_.sample_every = 3, config_.sample_tokens = 5, config_.sample_prompt = "ab";
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    const std::vector<Json> samples = events("sample");
    ASSERT_EQ(samples.size(), 3u) << "steps 3 and 6 and the end";
    EXPECT_EQ(samples[0]["text"], "abxxxxx");
}

TEST_F(TrainLoop, SamplesAreRandomBySeedAndStep) {
    config_.sample_every = 4, config_.sample_tokens = 8;
    const auto samples = [&](uint64_t seed) {
        std::filesystem::remove_all(config_.output_dir);
        config_.seed = seed;
        FakeModel model(config_.model);
        model.on_logits = [](float* logits) { logits['x'] = 0.0f; };  // all tokens are as likely
        EXPECT_EQ(run(model, config_), 0);
        std::vector<std::string> texts;
        for (const Json& sample : events("sample")) {
            texts.push_back(sample["text"]);
        }
        return texts;
    };
    const std::vector<std::string> texts = samples(0);
    ASSERT_EQ(texts.size(), 2u) << "step 4 and the end";
    EXPECT_NE(texts[0], texts[1]);
    EXPECT_EQ(samples(0), texts);
    EXPECT_NE(samples(1)[0], texts[0]);
}

TEST_F(TrainLoop, ASampleEndsWithItsText) {
    config_.max_steps = 1, config_.sample_tokens = 5;
    FakeModel model(config_.model);
    model.on_logits = [&](float* logits) {
        if (model.contexts_of_samples.size() == 3) {
            logits[END_MARKER] = 100.0f;
        }
    };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_EQ(events("sample").at(0)["text"], "xx");
    EXPECT_EQ(model.contexts_of_samples.size(), 3u);
}

TEST_F(TrainLoop, ASampleEndsBeforeALogitThatIsNotFinite) {
    config_.max_steps = 1, config_.sample_tokens = 5;
    FakeModel model(config_.model);
    model.on_logits = [&](float* logits) {
        if (model.contexts_of_samples.size() == 3) {
            logits['z'] = NAN;
        }
    };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_EQ(events("sample").at(0)["text"], "xx");
    EXPECT_NE(out_.find("the sample ends early: a logit is not finite"), std::string::npos) << out_;
}

TEST_F(TrainLoop, ASampleThatASignalCutsShortIsMadeUpFor) {
    config_.sample_every = 3, config_.sample_tokens = 4;
    FakeModel model(config_.model), after(config_.model);
    model.on_logits = [&](float*) { model.contexts_of_samples.size() == 2 ? std::raise(SIGINT) : 0; };
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_TRUE(events("sample").empty());
    stop_signal::received = 0;
    EXPECT_EQ(run(after, resumed(config_)), 0);
    ASSERT_EQ(events("sample").size(), 3u) << "steps 3 and 6 and the end";
    EXPECT_EQ(events("sample")[0]["text"], "xxxx");
}

TEST_F(TrainLoop, SamplesUseTemperatureAndTopP) {
    config_.max_steps = 1, config_.sample_tokens = 400;
    const auto count = [&](char letter) {
        const std::string text = events("sample").at(0)["text"];
        return std::count(text.begin(), text.end(), letter);
    };
    // The likeliest alone reaches top_p, at any temperature.
    config_.temperature = 1.0, config_.top_p = 0.01;
    FakeModel first(config_.model), second(config_.model);
    first.logit_of_y = 49.99f;
    EXPECT_EQ(run(first, config_), 0);
    EXPECT_EQ(count('x'), 400);
    // At temperature 0.5 'y' is e^-1 times as likely as 'x', which is 0.269 of both, and all others are impossible:
    // 107.6 of 400 are expected, with a standard deviation of sqrt(400 x 0.269 x 0.731) = 8.9. Temperature 1 would give
    // 151, and top_p 0.5 none.
    std::filesystem::remove_all(config_.output_dir);
    config_.temperature = 0.5, config_.top_p = 1.0;
    second.logit_of_y = 49.5f;
    EXPECT_EQ(run(second, config_), 0);
    EXPECT_EQ(count('x') + count('y'), 400);
    EXPECT_NEAR(count('y'), 107.6, 4 * 8.9);
}

TEST_F(TrainLoop, SamplesGoOnFromAsMuchAsTheModelTakes) {
    config_.max_steps = 1, config_.sample_tokens = 4, config_.sample_prompt = "abc";
    FakeModel model(config_.model);
    model.longest_context = 5;
    EXPECT_EQ(run(model, config_), 0);
    EXPECT_EQ(
        model.contexts_of_samples,
        (std::vector<std::vector<int32_t>>{
            {256, 'a', 'b', 'c'}, {256, 'a', 'b', 'c', 'x'}, {'a', 'b', 'c', 'x', 'x'}, {'b', 'c', 'x', 'x', 'x'}}))
        << "256 marks the beginning";
    EXPECT_EQ(events("sample").at(0)["text"], "abcxxxx");
    EXPECT_EQ(err_, "");
    config_.sample_prompt = "abcdef", config_.output_dir += "2";
    FakeModel again(config_.model);
    again.longest_context = 5;
    EXPECT_EQ(run(again, config_), 0);
    EXPECT_EQ(again.contexts_of_samples.at(0), (std::vector<int32_t>{'b', 'c', 'd', 'e', 'f'}));
    EXPECT_NE(err_.find("--sample_prompt has 7 tokens: samples continue its last 5"), std::string::npos) << err_;
}

TEST_F(TrainLoop, SamplesAndNoStepsOfStageOneAreUnderDenseAttention) {
    config_.attention = AttentionMode::lighthouse, config_.lighthouse_steps = 3;
    config_.lighthouse.levels = 2, config_.lighthouse.pool = 2, config_.lighthouse.topk = 128;
    config_.lighthouse.dense_layers = {};
    config_.seq_len = 256, config_.max_steps = 4, config_.sample_every = 1, config_.sample_tokens = 2;
    config_.eval_every = 2, config_.eval_batches = 1;
    FakeModel model(config_.model);
    EXPECT_EQ(run(model, config_), 0);
    const AttentionMode L = AttentionMode::lighthouse, D = AttentionMode::dense;
    EXPECT_EQ(model.attention_of_samples, std::vector<AttentionMode>(8, D)) << "two tokens behind each step";
    EXPECT_EQ(model.attention_of_steps, (std::vector<AttentionMode>{L, L, L, D}));
    EXPECT_EQ(model.attention_of_evaluations, (std::vector<AttentionMode>{L, D, D}))
        << "step 2 under both, and the end";
}

TEST_F(TrainLoop, ACheckpointIsSampledWithoutData) {
    FakeModel model(config_.model), after(config_.model);
    config_.max_steps = 2;
    ASSERT_EQ(run(model, config_), 0) << err_;
    RunConfig sampled;
    sampled.model = config_.model, sampled.seq_len = 16, sampled.max_steps = 0, sampled.temperature = 0.0;
    sampled.checkpoint = *find_newest_checkpoint(config_.output_dir);
    sampled.sample_tokens = 3, sampled.sample_prompt = "ab", sampled.asks_for_sample = true;
    ASSERT_EQ(run(after, sampled), 0) << err_;
    EXPECT_NE(out_.find("\nabxxx\n"), std::string::npos) << out_;
    EXPECT_EQ(after.contexts_of_samples.at(0), (std::vector<int32_t>{BEGIN_MARKER, 'a', 'b'}));
    EXPECT_EQ(after.attention_of_evaluations.size(), 0u);

    after.on_logits = [](float* logits) { logits['x'] = NAN; };
    EXPECT_THROW(run(after, sampled), Error) << "these weights are bad";
    after.on_logits = nullptr;

    // Without the tokenizer of bytes its tokens are numbers.
    std::filesystem::remove(sampled.checkpoint + "/tokenizer.json");
    std::filesystem::remove(sampled.checkpoint + "/tokenizer.model");
    EXPECT_THROW(run(after, sampled), Error);
    sampled.sample_prompt = "97 98";
    ASSERT_EQ(run(after, sampled), 0) << err_;
    EXPECT_NE(out_.find("\n97 98 120 120 120\n"), std::string::npos) << out_;
}
