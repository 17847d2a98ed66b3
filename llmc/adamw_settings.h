// adamw_settings.h: what one AdamW step is told, in float64, on the CPU (reference/adamw.h) and the GPU (adamw.cuh).
#pragma once
#include <cmath>
#include <cstdint>

// AdamW (Loshchilov & Hutter 2019, decoupled decay), its schedule already applied.
struct AdamWSettings {
    double learning_rate = 0.0;
    double beta1 = 0.9;
    double beta2 = 0.95;
    double eps = 1e-8;
    double weight_decay = 0.1;   // a model's: of tensors with ParameterTensor::decay
    bool decay_all = false;      // and of the others
    double max_grad_norm = 1.0;  // clip by global norm; 0: off
    int64_t adam_step = 1;       // 1 for the first applied update: the bias correction's exponent

    // What a running mean with this beta, which began at 0, has to be divided by.
    double correction(double beta) const { return 1.0 - std::pow(beta, (double)adam_step); }
    // The same step for tensors that do not decay, or that do.
    AdamWSettings with_decay(bool decays) const {
        AdamWSettings settings = *this;
        settings.weight_decay = decays || decay_all ? weight_decay : 0.0;
        return settings;
    }
};
