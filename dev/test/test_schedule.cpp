// test_schedule.cpp: the learning rate at the borders of warm-up and decay, and between.
#include <gtest/gtest.h>

#include "llmc/schedule.h"

namespace {
RunConfig make_config(ScheduleKind kind) {
    RunConfig c;
    c.learning_rate = 2.0, c.warmup_steps = 10, c.max_steps = 110, c.final_learning_rate_fraction = 0.1,
    c.schedule = kind;
    return c;
}
}  // namespace

TEST(Schedule, WarmUpIsLinearAndNeverZero) {
    const RunConfig c = make_config(ScheduleKind::cosine);
    EXPECT_DOUBLE_EQ(learning_rate_at(c, 0), 0.2);
    EXPECT_DOUBLE_EQ(learning_rate_at(c, 4), 1.0);
    EXPECT_DOUBLE_EQ(learning_rate_at(c, 9), 2.0);
    EXPECT_DOUBLE_EQ(learning_rate_at(c, 10), 2.0);
}

TEST(Schedule, CosineHalfWayIsTheMeanOfPeakAndEnd) {
    const RunConfig c = make_config(ScheduleKind::cosine);
    EXPECT_NEAR(learning_rate_at(c, 60), 1.1, 1e-12);
    EXPECT_NEAR(learning_rate_at(c, 110), 0.2, 1e-12);
    EXPECT_NEAR(learning_rate_at(c, 100000), 0.2, 1e-12);
    EXPECT_GT(learning_rate_at(c, 30), learning_rate_at(make_config(ScheduleKind::linear), 30));
}

TEST(Schedule, LinearAndConstant) {
    const RunConfig linear = make_config(ScheduleKind::linear), constant = make_config(ScheduleKind::constant);
    EXPECT_NEAR(learning_rate_at(linear, 35), 2.0 - 0.25 * 1.8, 1e-12);
    EXPECT_NEAR(learning_rate_at(linear, 110), 0.2, 1e-12);
    EXPECT_DOUBLE_EQ(learning_rate_at(constant, 0), 0.2);
    EXPECT_DOUBLE_EQ(learning_rate_at(constant, 109), 2.0);
}

TEST(Schedule, DecayEndsWhereAsked) {
    RunConfig c = make_config(ScheduleKind::linear);
    c.decay_steps = 20;
    EXPECT_NEAR(learning_rate_at(c, 15), 1.1, 1e-12);
    EXPECT_NEAR(learning_rate_at(c, 20), 0.2, 1e-12);
    EXPECT_NEAR(learning_rate_at(c, 100), 0.2, 1e-12);
}

TEST(Schedule, NoWarmUpAndWarmUpLongerThanTheRun) {
    RunConfig c = make_config(ScheduleKind::cosine);
    c.warmup_steps = 0;
    EXPECT_DOUBLE_EQ(learning_rate_at(c, 0), 2.0);
    c.warmup_steps = 1000;
    EXPECT_DOUBLE_EQ(learning_rate_at(c, 109), 0.22);
    EXPECT_NEAR(learning_rate_at(c, 1000), 0.2, 1e-12);
}

TEST(Schedule, NeverRisesAfterTheWarmUp) {
    for (const ScheduleKind kind : {ScheduleKind::cosine, ScheduleKind::linear, ScheduleKind::constant}) {
        const RunConfig c = make_config(kind);
        for (int64_t step = 10; step < 200; ++step) {
            EXPECT_LE(learning_rate_at(c, step + 1), learning_rate_at(c, step)) << "step " << step;
        }
    }
}
