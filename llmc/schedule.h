// schedule.h: the learning rate of a step.
#pragma once
#include <cmath>

#include "config.h"

// Step `step` (0 is the first) of a run: linear warm-up from learning_rate / warmup_steps to learning_rate, then a
// decay that reaches final_learning_rate_fraction * learning_rate at step decay_end() and stays there:
//   cosine    half a cosine wave
//   linear    a straight line
//   constant  no decay
inline double learning_rate_at(const RunConfig& c, int64_t step) {
    if (step < c.warmup_steps) {
        return c.learning_rate * (double)(step + 1) / (double)c.warmup_steps;
    }
    if (c.schedule == ScheduleKind::constant) {
        return c.learning_rate;
    }
    const int64_t decay_length = c.decay_end() - c.warmup_steps;
    const double progress =
        decay_length <= 0 ? 1.0 : std::fmin(1.0, (double)(step - c.warmup_steps) / (double)decay_length);
    const double remaining =  // from 1 to 0
        c.schedule == ScheduleKind::linear ? 1.0 - progress : 0.5 * (1.0 + std::cos(3.14159265358979323846 * progress));
    const double floor = c.final_learning_rate_fraction;
    return c.learning_rate * (floor + (1.0 - floor) * remaining);
}
