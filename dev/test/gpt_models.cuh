// gpt_models.cuh: the three models that test_gpt.cu steps side by side: the GPU's, the truth in double, a plain one in
// bf16; and AdamW for the two of the CPU.
#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "dev/test/bf16_model.h"  // the error that bf16 makes
#include "dev/test/gpt_cases.cuh"
#include "dev/test/gpt_checks.cuh"
#include "llmc/model.cuh"          // what is tested
#include "llmc/reference/model.h"  // the truth

// ---- the GPU's side ----------------------------------------------------------------------------
inline std::unique_ptr<GpuModel> make_model(const Case& c, const GpuModelSettings& settings,
                                            const std::vector<std::vector<float>>& weights) {
    auto model = std::make_unique<GpuModel>(c.config, settings);
    model->set_attention(c.attention());
    for (size_t i = 0; i < weights.size(); ++i) {
        model->write_state(StateKind::master, (int)i, weights[i].data());
    }
    return model;
}
inline std::unique_ptr<GpuModel> make_model(const Case& c, Recompute recompute, bool deterministic,
                                            const std::vector<std::vector<float>>& weights,
                                            Offload offload = Offload::none) {
    return make_model(c, c.settings(recompute, deterministic, offload), weights);
}
inline void accumulate(GpuModel& model, const Case& c, const std::vector<std::vector<int32_t>>& batches) {
    model.begin_step();
    for (size_t i = 0; i < batches.size(); ++i) {
        model.accumulate_gradients(batches[i].data(), c.B, c.T, c.loss_weight((int)i));
    }
}
inline Tensors read_all(GpuModel& model, const std::function<void(int, float*)>& read) {
    Tensors tensors;
    for (const ParameterTensor& tensor : model.parameters().tensors) {
        std::vector<float> values(tensor.num_elements(), NAN);
        read((int)tensors.size(), values.data());
        tensors.push_back(convert<double>(values));
    }
    return tensors;
}
inline Tensors gradients_of(GpuModel& model) {
    return read_all(model, [&](int i, float* out) { model.read_gradient(i, out); });
}
inline Tensors state_of(GpuModel& model, StateKind kind) {
    return read_all(model, [&](int i, float* out) { model.read_state(kind, i, out); });
}
// All three kinds of state.
inline Tensors whole_state(GpuModel& model) {
    Tensors all;
    for (StateKind kind : {StateKind::master, StateKind::exp_avg, StateKind::exp_avg_sq}) {
        for (std::vector<double>& tensor : state_of(model, kind)) {
            all.push_back(std::move(tensor));
        }
    }
    return all;
}
inline AdamWSettings adamw_settings(int64_t step) {
    AdamWSettings settings;
    settings.learning_rate = 3e-3, settings.adam_step = step;
    return settings;
}
inline StepResult train_step(GpuModel& model, const Case& c, uint64_t seed, int64_t step) {
    accumulate(model, c, random_batches(c, seed + step));
    return model.update(adamw_settings(step));
}

// ---- the CPU's side ----------------------------------------------------------------------------
// Master weights and AdamW's state in Real, for either of the CPU's models.
template <class Real>
struct CpuOptimizer {
    std::vector<std::vector<Real>> master, exp_avg, exp_avg_sq;

    explicit CpuOptimizer(const std::vector<std::vector<float>>& weights) {
        for (const std::vector<float>& tensor : weights) {
            master.push_back(convert<Real>(tensor));
            exp_avg.emplace_back(tensor.size(), Real(0)), exp_avg_sq.emplace_back(tensor.size(), Real(0));
        }
    }
    std::vector<float> rounded_weight(size_t i) const {
        std::vector<float> weight = convert<float>(master[i]);
        reference::round_to_bf16(weight);
        return weight;
    }
    void update(const std::vector<std::vector<Real>>& gradients, double loss, const ParameterTable& table,
                const AdamWSettings& s) {
        double squares = 0.0;
        for (const std::vector<Real>& gradient : gradients) {
            const double norm = reference::grad_norm(gradient.data(), (int64_t)gradient.size());
            squares += norm * norm;
        }
        for (size_t i = 0; i < master.size(); ++i) {
            reference::adamw_update(master[i].data(), exp_avg[i].data(), exp_avg_sq[i].data(), gradients[i].data(),
                                    std::sqrt(squares), loss, (int64_t)master[i].size(),
                                    s.with_decay(table.tensors[i].decay));
        }
    }
};

// The truth: loss and gradients of one step in double.
struct Truth {
    std::unique_ptr<reference::ReferenceModel<double>> model;
    CpuOptimizer<double> optimizer;
    double loss = 0.0;
    Tensors gradients;

    Truth(const Case& c, const std::vector<std::vector<float>>& weights) : optimizer(weights) {
        model = std::make_unique<reference::ReferenceModel<double>>(
            c.config, c.attention(), c.lighthouse.value_or(LighthouseConfig()), c.B, c.T);
    }
    void set_weights() {
        for (size_t i = 0; i < optimizer.master.size(); ++i) {
            model->write_state(StateKind::master, (int)i, optimizer.rounded_weight(i).data());
        }
    }
    void accumulate(const Case& c, const std::vector<std::vector<int32_t>>& batches) {
        set_weights();
        model->begin_step();
        loss = 0.0;
        for (size_t i = 0; i < batches.size(); ++i) {
            loss += c.loss_weight((int)i) * model->evaluate(batches[i].data(), c.B, c.T);
            model->accumulate_gradients(batches[i].data(), c.B, c.T, c.loss_weight((int)i));
        }
        gradients.clear();
        for (size_t i = 0; i < optimizer.master.size(); ++i) {
            const double* gradient = model->gradient((int)i);
            gradients.emplace_back(gradient, gradient + optimizer.master[i].size());
        }
    }
};
// Weights of which every second one, by the seed, is the next float up or down.
inline std::vector<std::vector<float>> one_rounding_apart(std::vector<std::vector<float>> weights, uint64_t seed) {
    for (std::vector<float>& tensor : weights) {
        for (size_t i = 0; i < tensor.size(); ++i) {
            const uint64_t bits = random_bits(seed, (int64_t)i);
            if (bits % 2 == 0) {
                tensor[i] = std::nextafter(tensor[i], bits / 2 % 2 == 0 ? INFINITY : -INFINITY);
            }
        }
    }
    return weights;
}
// The same in plain bf16.
struct Plain {
    reference::Bf16Model model;
    CpuOptimizer<float> optimizer;
    double loss = 0.0;
    std::vector<std::vector<float>> gradients;

    Plain(const Case& c, const std::vector<std::vector<float>>& weights)
        : model(c.config, c.attention(), c.lighthouse.value_or(LighthouseConfig())), optimizer(weights) {}
    void set_weights() {
        for (size_t i = 0; i < optimizer.master.size(); ++i) {
            model.set_weight((int)i, optimizer.master[i]);
        }
    }
    void accumulate(const Case& c, const std::vector<std::vector<int32_t>>& batches) {
        set_weights();
        model.zero_gradients();
        loss = 0.0;
        for (size_t i = 0; i < batches.size(); ++i) {
            const double weight = c.loss_weight((int)i);
            loss += weight * model.accumulate(batches[i].data(), c.B, c.T, weight);
        }
        gradients.clear();
        for (size_t i = 0; i < optimizer.master.size(); ++i) {
            gradients.push_back(model.gradient((int)i));
        }
    }
};
