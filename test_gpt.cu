// test_gpt.cu: the whole model on the GPU against the CPU reference: loss and every parameter's gradient, ten AdamW
// steps, saving and resuming, over shapes that hurt; what must agree bit for bit: recompute modes, offload to the host,
// repetition, dense attention with and without room for Lighthouse; and steps that must not be applied.
//
// The truth is reference/model.h in double on weights rounded to bf16. How far bf16 storage must be from it is measured
// on the same data by a plain implementation, dev/test/bf16_model.h: the GPU's error, relative to the truth's 2-norm,
// may be twice that, or twice one rounding of bf16; the largest error of an element, as the luck of single elements
// differs more, four times.
//   test_gpt [--small] [--seed N]     --small: for compute-sanitizer: few models, all of D 16 with the norm scorer; the
//                                     kernels of others are run by dev/cuda's programs with --small
//   test_gpt --part gradients|bits|training   one of three parts that may run side by side
//   test_gpt --as a100|a10            on a larger GPU: with the kernels and as much shared memory as such a one has
//   test_gpt --memory                 the plan of memory alone; nothing else may use the GPU meanwhile
#define LLMC_POISON  // activations and workspace start as NaN
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dev/test/gpt_cases.cuh"   // shapes, weights, tokens
#include "dev/test/gpt_checks.cuh"  // comparisons
#include "dev/test/gpt_models.cuh"  // the GPU's model, the truth, a plain one
#include "llmc/checkpoint.h"        // saving and resuming
#include "llmc/device.cuh"          // the GPU

// ---- tests -------------------------------------------------------------------------------------
// Deterministic; and as training is by default: with a search of algorithms, launches replayed. Small: one of the two
// modes, so that each is run by one of the compared cases, and without graphs, whose kernels are the same.
static void test_gradients(Checks& checks, const Case& c, bool small) {
    const auto weights = random_weights(c, checks.seed);
    const auto batches = random_batches(c, checks.seed);
    Truth truth(c, weights);
    Plain plain(c, weights);
    truth.accumulate(c, batches);
    plain.accumulate(c, batches);
    for (const bool deterministic : {true, false}) {
        if (small && deterministic == c.lighthouse.has_value()) {
            continue;
        }
        GpuModelSettings settings = c.settings(Recompute::none, deterministic);
        settings.cuda_graphs = !deterministic && !small;
        const auto model = make_model(c, settings, weights);
        // With graphs the same step three times: the first launches, the second is captured, the third only replays.
        for (int i = 0; i < (settings.cuda_graphs ? 3 : 1); ++i) {
            accumulate(*model, c, batches);
        }
        const Tensors gradients = gradients_of(*model);
        const std::string label = c.name + (deterministic ? ", deterministic" : "");
        for (size_t i = 0; i < gradients.size(); ++i) {
            compare(checks, "gradient " + model->parameters().tensors[i].name, label, gradients[i], truth.gradients[i],
                    limit_of(to_double(plain.gradients[i]), truth.gradients[i]));
        }
        double squares = 0.0;
        for (const std::vector<double>& gradient : gradients) {
            const double rms = root_mean_square(gradient);
            squares += rms * rms * (double)gradient.size();
        }
        const int64_t num_replays = model->num_graph_replays();
        checks.expect((num_replays > 0) == (settings.cuda_graphs && MicroBatchGraph::captures_launches()),
                      "launches are replayed", label, format_string("%lld times", (long long)num_replays));
        const StepResult result = model->update(adamw_settings(1));
        compare_loss(checks, "loss", c, result.loss, truth.loss, std::abs(plain.loss - truth.loss));
        checks.expect(std::abs(result.grad_norm - std::sqrt(squares)) <= 1e-6 * std::sqrt(squares) && !result.skipped,
                      "gradient norm", label,
                      format_string("%.7g, expected %.7g", result.grad_norm, std::sqrt(squares)));
    }
}

// Evaluation and the logits for sampling, at full length and shorter.
static void test_evaluation(Checks& checks, const Case& c) {
    const auto weights = random_weights(c, checks.seed);
    const std::vector<int32_t> tokens = random_batches(c, checks.seed)[0];
    Truth truth(c, weights);
    Plain plain(c, weights);
    truth.set_weights(), plain.set_weights();
    const auto model = make_model(c, Recompute::block, false, weights);
    plain.model.zero_gradients();
    const double plain_loss = plain.model.accumulate(tokens.data(), c.B, c.T, 1.0);
    const double true_loss = truth.model->evaluate(tokens.data(), c.B, c.T);
    compare_loss(checks, "evaluation", c, model->evaluate(tokens.data(), c.B, c.T), true_loss,
                 std::abs(plain_loss - true_loss));
    // The loss of each token, for targets of one's own: another target changes the loss of its place alone.
    InputsAndTargets columns(tokens.data(), c.B, c.T);
    std::vector<float> losses(c.B * c.T, NAN), others(losses), expected_losses(losses);
    model->token_losses(losses.data(), columns.inputs.data(), columns.targets.data(), c.B, c.T);
    truth.model->token_losses(expected_losses.data(), columns.inputs.data(), columns.targets.data(), c.B, c.T);
    compare(checks, "losses of tokens", c.name, to_double(losses), to_double(expected_losses),
            limit_of(to_double(plain.model.token_losses()), to_double(expected_losses)));
    const int64_t place = c.B * c.T / 2;
    columns.targets[place] = (int32_t)((columns.targets[place] + 1) % c.config.vocab_size);
    model->token_losses(others.data(), columns.inputs.data(), columns.targets.data(), c.B, c.T);
    int64_t num_changed = 0;
    for (size_t i = 0; i < losses.size(); ++i) {
        num_changed += losses[i] != others[i];
    }
    checks.expect(num_changed == 1 && losses[place] != others[place], "another target", c.name,
                  format_string("%lld losses changed", (long long)num_changed));
    for (const int64_t T : {c.T, (c.T + 2) / 3}) {
        if (c.lighthouse && T != c.T) {
            continue;  // not a length of this geometry
        }
        std::vector<float> logits(c.config.vocab_size, NAN), expected(logits);
        model->next_token_logits(tokens.data(), T, logits.data());
        truth.model->next_token_logits(tokens.data(), T, expected.data());
        compare(checks, "next_token_logits", format_string("%s, %lld tokens", c.name.c_str(), (long long)T),
                to_double(logits), to_double(expected),
                limit_of(to_double(plain.model.next_token_logits(tokens.data(), T)), to_double(expected)));
    }
}

// What must be the same bits as a deterministic model that keeps everything. Small: in each comparison one recompute
// mode, and each mode in one of them.
static void test_bits(Checks& checks, const Case& c, bool small) {
    const auto weights = random_weights(c, checks.seed);
    const auto batches = random_batches(c, checks.seed);
    const auto model = make_model(c, Recompute::none, true, weights);
    accumulate(*model, c, batches);
    const Tensors gradients = gradients_of(*model);
    checks.expect(first_difference(gradients, gradients).empty(), "gradients are numbers", c.name);
    const double loss = model->evaluate(batches[0].data(), c.B, c.T);
    accumulate(*model, c, batches);
    expect_equal(checks, "repetition, after an evaluation", c.name, gradients_of(*model), gradients);
    for (const auto& [name, recompute] : choices(Recompute())) {
        if (recompute == Recompute::none || (small && recompute != Recompute::block)) {
            continue;
        }
        const auto other = make_model(c, recompute, true, weights);
        const double other_loss = other->evaluate(batches[0].data(), c.B, c.T);
        accumulate(*other, c, batches);
        expect_equal(checks, std::string("--recompute ") + name, c.name, gradients_of(*other), gradients);
        checks.expect(other_loss == loss, std::string("evaluation, --recompute ") + name, c.name,
                      format_string("%.9g and %.9g", other_loss, loss));
    }
    if (!c.lighthouse) {
        return;
    }
    // The second stage in a plan that has room for both, and an evaluation in one that never trains it.
    Case dense = c;
    dense.lighthouse.reset();
    const auto dense_model = make_model(dense, Recompute::none, true, weights);
    accumulate(*dense_model, c, batches);
    const Tensors dense_gradients = gradients_of(*dense_model);
    for (const auto& [name, recompute] : choices(Recompute())) {
        if (small && recompute != Recompute::all_but_attention) {
            continue;
        }
        const auto both = make_model(c, recompute, true, weights);
        accumulate(*both, c, batches);
        both->set_attention(AttentionMode::dense);
        accumulate(*both, c, batches);
        expect_equal(checks, format_string("dense after Lighthouse, --recompute %s", name), c.name, gradients_of(*both),
                     dense_gradients);
        both->set_attention(AttentionMode::lighthouse);
        accumulate(*both, c, batches);
        expect_equal(checks, format_string("Lighthouse after dense, --recompute %s", name), c.name, gradients_of(*both),
                     gradients);
    }
    for (const auto& [name, recompute] : choices(Recompute())) {
        if (small && recompute != Recompute::norms_and_gate) {
            continue;
        }
        GpuModelSettings settings = c.settings(recompute, true);
        settings.trains_dense = false;
        const auto first_stage = make_model(c, settings, weights);
        first_stage->set_attention(AttentionMode::dense);
        const double dense_loss = first_stage->evaluate(batches[0].data(), c.B, c.T);
        first_stage->set_attention(AttentionMode::lighthouse);
        accumulate(*first_stage, c, batches);
        expect_equal(checks, format_string("first stage alone, --recompute %s", name), c.name,
                     gradients_of(*first_stage), gradients);
        const double expected = dense_model->evaluate(batches[0].data(), c.B, c.T);
        checks.expect(dense_loss == expected, "dense evaluation in the first stage", c.name,
                      format_string("%.9g and %.9g", dense_loss, expected));
    }
}

// Three steps, each after an evaluation, which leaves other inputs on the GPU: their losses and norms, the gradients of
// the last, and where they lead.
static std::pair<std::vector<double>, Tensors> three_steps(GpuModel& model, const Case& c, uint64_t seed) {
    std::vector<double> numbers;
    Tensors tensors;
    for (int64_t step = 1; step <= 3; ++step) {
        const auto batches = random_batches(c, seed + step);
        numbers.push_back(model.evaluate(batches[0].data(), c.B, c.T));
        accumulate(model, c, batches);
        if (step == 3) {
            tensors = gradients_of(model);
        }
        const StepResult result = model.update(adamw_settings(step));
        numbers.push_back(result.loss), numbers.push_back(result.grad_norm);
    }
    for (std::vector<double>& tensor : whole_state(model)) {
        tensors.push_back(std::move(tensor));
    }
    return {numbers, tensors};
}

// Launches that are replayed must give the same bits as those that are not: micro-batches of a step, steps, the switch
// to the other attention and back.
static void test_cuda_graphs(Checks& checks, const Case& c) {
    const auto weights = random_weights(c, checks.seed);
    const auto run = [&](bool cuda_graphs) {
        GpuModelSettings settings = c.settings(Recompute::norms_and_gate, true);
        settings.cuda_graphs = cuda_graphs;
        const auto model = make_model(c, settings, weights);
        std::vector<double> numbers;
        Tensors tensors;
        for (const AttentionMode attention : {c.attention(), AttentionMode::dense, c.attention()}) {
            model->set_attention(attention);
            auto [some_numbers, some_tensors] = three_steps(*model, c, checks.seed);
            numbers.insert(numbers.end(), some_numbers.begin(), some_numbers.end());
            for (std::vector<double>& tensor : some_tensors) {
                tensors.push_back(std::move(tensor));
            }
        }
        return std::tuple(numbers, tensors, model->num_graph_replays());
    };
    const auto [numbers, tensors, no_replays] = run(false);
    const auto [replayed_numbers, replayed_tensors, num_replays] = run(true);
    checks.expect(replayed_numbers == numbers, "replayed losses and norms", c.name,
                  format_string("the last %.9g and %.9g", replayed_numbers.back(), numbers.back()));
    expect_equal(checks, "replayed gradients and state", c.name, replayed_tensors, tensors);
    // One by one go, under each attention, the launches of the first step's first two micro-batches; the third differs
    // from the second in its tokens alone.
    const int64_t num_attentions = c.lighthouse ? 2 : 1, later = 9 * (c.num_micro_batches - 1);
    const int64_t replayed = 9 - num_attentions + (later > 0 ? later - num_attentions : 0);
    const int64_t expected = MicroBatchGraph::captures_launches() ? replayed : 0;
    checks.expect(no_replays == 0 && num_replays == expected, "launches are replayed", c.name,
                  format_string("%lld and %lld times, not 0 and %lld", (long long)no_replays, (long long)num_replays,
                                (long long)expected));
}

// An element of the optimizer's state, a multiple of 64, with elements of the same tensor on both sides.
static int64_t middle_of_largest_tensor(const Case& c) {
    const ParameterLayout layout = make_parameter_layout(make_parameter_table(c.config));
    const size_t largest = std::max_element(layout.sizes.begin(), layout.sizes.end()) - layout.sizes.begin();
    return (layout.offsets[largest] + layout.sizes[largest] / 2) / 64 * 64;
}

// What lies in host memory between its uses must be the same bits as what stays.
static void test_offload(Checks& checks, const Case& c, const std::vector<Recompute>& recomputes,
                         const std::vector<Offload>& offloads) {
    const auto weights = random_weights(c, checks.seed);
    for (const Recompute recompute : recomputes) {
        const auto model = make_model(c, recompute, true, weights);
        const auto [numbers, tensors] = three_steps(*model, c, checks.seed);
        for (const Offload offload : offloads) {
            // All of the optimizer's state in host memory; and as much as does not fit, from the middle of a tensor on.
            for (const int64_t resident : {(int64_t)0, middle_of_largest_tensor(c)}) {
                if (resident > 0 && !offloads_optimizer(offload)) {
                    continue;
                }
                GpuModelSettings settings = c.settings(recompute, true, offload);
                settings.resident_state_elements = resident;
                const std::string what =
                    format_string("--offload %s --recompute %s, %lld elements stay", choice_name(offload),
                                  choice_name(recompute), (long long)resident);
                const auto other = make_model(c, settings, weights);
                const auto [other_numbers, other_tensors] = three_steps(*other, c, checks.seed);
                checks.expect(other_numbers == numbers, what + ", losses and norms", c.name,
                              format_string("the last %.9g and %.9g", other_numbers.back(), numbers.back()));
                expect_equal(checks, what + ", gradients and state", c.name, other_tensors, tensors);
            }
        }
    }
}
// Small: of the modes only the one in which most is computed again and offloaded.
static void test_offload_modes(Checks& checks, const Case& c, bool small) {
    std::vector<Recompute> recomputes;
    std::vector<Offload> offloads;
    for (const auto& [name, recompute] : choices(Recompute())) {
        if (!small || recompute == Recompute::block) {
            recomputes.push_back(recompute);
        }
    }
    for (const auto& [name, offload] : choices(Offload())) {
        if (offload == Offload::all || (!small && offload != Offload::none)) {
            offloads.push_back(offload);
        }
    }
    test_offload(checks, c, recomputes, offloads);
}

// AdamW, tensor by tensor, against the reference on the gradients that the GPU found; and where the steps lead, against
// the truth. AdamW divides by the gradient's size, so a single weight whose gradient is all rounding may go anywhere:
// where the steps lead is compared over all weights together, and with how far plain implementations are off that begin
// with weights one rounding apart: of six such the loss of a step was off by 2.3e-3 to 5.9e-3 (D 128, step 4), so one
// of them alone says little. Small: fewer steps, fewer of these, and no second search of algorithms beside
// test_gradients'.
static void test_steps(Checks& checks, const Case& c, bool small) {
    const int num_steps = small ? 2 : 10;
    const auto weights = random_weights(c, checks.seed);
    Truth truth(c, weights);
    std::vector<std::unique_ptr<Plain>> plains;
    for (int i = 0; i < (small ? 1 : 4); ++i) {
        plains.push_back(std::make_unique<Plain>(c, i == 0 ? weights : one_rounding_apart(weights, checks.seed + i)));
    }
    CpuOptimizer<double> optimizer(weights);
    const auto model = make_model(c, Recompute::all_but_attention, small, weights);
    const ParameterTable& table = model->parameters();
    double plain_error = 0.0;  // the largest of all and of all steps so far: one may be small by luck
    for (int64_t step = 1; step <= num_steps; ++step) {
        const AdamWSettings settings = adamw_settings(step);
        const auto batches = random_batches(c, checks.seed + step);
        truth.accumulate(c, batches);
        truth.optimizer.update(truth.gradients, truth.loss, table, settings);
        for (const std::unique_ptr<Plain>& plain : plains) {
            plain->accumulate(c, batches);
            plain->optimizer.update(plain->gradients, plain->loss, table, settings);
            plain_error = std::max(plain_error, std::abs(plain->loss - truth.loss));
        }
        accumulate(*model, c, batches);
        optimizer.update(gradients_of(*model), truth.loss, table, settings);
        compare_loss(checks, format_string("loss of step %lld", (long long)step), c, model->update(settings).loss,
                     truth.loss, plain_error);
    }
    const std::string label = format_string("%s, %d steps", c.name.c_str(), num_steps);
    const Tensors master = state_of(*model, StateKind::master);
    const Tensors exp_avg = state_of(*model, StateKind::exp_avg);
    const Tensors exp_avg_sq = state_of(*model, StateKind::exp_avg_sq);
    std::vector<double> all_changes, all_plain_changes, all_true_changes;
    for (size_t i = 0; i < weights.size(); ++i) {
        auto change = [&](std::vector<double> values) {  // what the steps have changed
            for (size_t k = 0; k < values.size(); ++k) {
                values[k] -= (double)weights[i][k];
            }
            return values;
        };
        // A step rounds a weight near 1 by 2^-24, next to changes of about the learning rate, 3e-3: 2e-5 a step, of
        // any sign. The means are good to a few units of 2^-24.
        const TensorError float_limit = {1e-4, 1e-3};
        const std::string& name = table.tensors[i].name;
        compare(checks, "AdamW master " + name, label, change(master[i]), change(optimizer.master[i]), float_limit);
        compare(checks, "AdamW exp_avg " + name, label, exp_avg[i], optimizer.exp_avg[i], float_limit);
        compare(checks, "AdamW exp_avg_sq " + name, label, exp_avg_sq[i], optimizer.exp_avg_sq[i], float_limit);
        for (auto& [all, values] : {std::pair(&all_changes, master[i]),
                                    std::pair(&all_plain_changes, to_double(plains[0]->optimizer.master[i])),
                                    std::pair(&all_true_changes, truth.optimizer.master[i])}) {
            const std::vector<double> changes = change(values);
            all->insert(all->end(), changes.begin(), changes.end());
        }
    }
    TensorError limit = limit_of(all_plain_changes, all_true_changes);
    limit.largest = 2.0 * (double)num_steps;  // learning rates, each way; a change's root mean square is near one
    compare(checks, "change of all weights", label, all_changes, all_true_changes, limit);
}

// A run that was saved and resumed ends with the bits of one that was not. Small: one step either way, and one of the
// two kinds of weights, which differ only on the host.
static void test_resume(Checks& checks, const Case& c, Offload offload, bool small) {
    namespace fs = std::filesystem;
    const fs::path folder = fs::temp_directory_path() / format_string("test_gpt-%d", (int)getpid());
    const auto weights = random_weights(c, checks.seed);
    const auto straight = make_model(c, Recompute::none, true, weights);
    const int64_t saved_step = small ? 1 : 2, last_step = 2 * saved_step;
    for (int64_t step = 1; step <= last_step; ++step) {
        train_step(*straight, c, checks.seed, step);
    }
    for (const bool weights_bf16 : {false, true}) {
        if (small && weights_bf16) {
            continue;
        }
        const auto first = make_model(c, Recompute::none, true, weights, offload);
        for (int64_t step = 1; step <= saved_step; ++step) {
            train_step(*first, c, checks.seed, step);
        }
        RunConfig run;
        run.model = c.config;
        TrainingState state;
        state.step = state.adam_step = saved_step;
        fs::create_directories(folder);
        const std::string saved = save_checkpoint(*first, state, run, weights_bf16, folder.string());
        const auto second = make_model(c, Recompute::none, true, random_weights(c, checks.seed + 50), offload);
        const TrainingState loaded = load_checkpoint(*second, saved);
        for (int64_t step = loaded.adam_step + 1; step <= last_step; ++step) {
            train_step(*second, c, checks.seed, step);
        }
        expect_equal(
            checks,
            format_string("resumed, %s weights, --offload %s", weights_bf16 ? "bf16" : "float32", choice_name(offload)),
            c.name, whole_state(*second), whole_state(*straight));
        fs::remove_all(folder);
    }
}

// Steps that must change nothing: the loss is not a number; the loss is one, but a gradient is not.
static void test_skipped_steps(Checks& checks, const Case& c, Offload offload) {
    const auto weights = random_weights(c, checks.seed);
    const auto model = make_model(c, Recompute::none, true, weights, offload);
    const LayerParameters& layer = model->parameters().layers[0];
    train_step(*model, c, checks.seed, 1);
    const Tensors before = whole_state(*model);
    // One step, of `loss_weight`, with some tensors of the first layer filled with a value.
    auto step_with = [&](const std::vector<std::pair<int, float>>& fills, double loss_weight) {
        for (const auto& [tensor, value] : fills) {
            const std::vector<float> filled(before[tensor].size(), value);
            model->write_state(StateKind::master, tensor, filled.data());
        }
        model->begin_step();
        model->accumulate_gradients(random_batches(c, checks.seed)[0].data(), c.B, c.T, loss_weight);
        const StepResult result = model->update(adamw_settings(2));
        for (const auto& [tensor, value] : fills) {
            model->write_state(StateKind::master, tensor, convert<float>(before[tensor]).data());
        }
        return result;
    };
    auto expect_skipped = [&](const char* what, const StepResult& result, const std::string& first_bad) {
        checks.expect(result.skipped && result.first_bad_tensor == first_bad, what, c.name,
                      format_string("skipped %d, loss %g, norm %g, first bad '%s'", result.skipped, result.loss,
                                    result.grad_norm, result.first_bad_tensor.c_str()));
        expect_equal(checks, std::string("state after ") + what, c.name, whole_state(*model), before);
    };
    expect_skipped("a loss that is not finite", step_with({{layer.down, INFINITY}}, 1.0), "loss");
    // The feed-forward multiplies two numbers near 1e18 and adds nothing to the residual stream, so the loss is as
    // any; the gradient of the weights it is multiplied with is beyond float.
    const StepResult large = step_with({{layer.ffn_norm, 1e18f}, {layer.down, 0.0f}}, 1e6);
    expect_skipped("a gradient that is not finite", large, model->parameters().tensors[layer.down].name);
    checks.expect(std::isfinite(large.loss), "the loss of that step is finite", c.name, std::to_string(large.loss));

    // And the next step is as if they had not been.
    const auto untroubled = make_model(c, Recompute::none, true, weights);
    train_step(*untroubled, c, checks.seed, 1);
    train_step(*untroubled, c, checks.seed, 2);
    train_step(*model, c, checks.seed, 2);
    expect_equal(checks, "the step after skipped ones", c.name, whole_state(*model), whole_state(*untroubled));
}

// What the model refuses, by one sentence.
static void test_refusals(Checks& checks) {
    const Case c = compared_cases(true)[0];
    const auto model = make_model(c, Recompute::none, true, random_weights(c, checks.seed));
    auto refuses = [&](const char* what, const std::string& named, const std::function<void()>& call) {
        std::string message = "nothing was refused";
        try {
            call();
        } catch (const Error& error) {
            message = error.what();
        }
        checks.expect(message.find(named) != std::string::npos, what, c.name, message);
    };
    std::vector<int32_t> tokens(c.B * (c.T + 1) + 1, 0);
    refuses("longer than planned", "planned", [&] { model->evaluate(tokens.data(), 1, c.T + 1); });
    tokens[3] = (int32_t)c.config.vocab_size;
    refuses("token outside the vocabulary", "--vocab_size", [&] { model->evaluate(tokens.data(), c.B, c.T); });
    refuses("Lighthouse without a plan", "--attention", [&] { model->set_attention(AttentionMode::lighthouse); });
    refuses("too little memory", "--print_memory", [&] {
        GpuModelSettings settings = c.settings(Recompute::none, false);
        settings.max_seq_len = (int64_t)1 << 29;
        GpuModel too_large(c.config, settings);
    });
    refuses("more than --gpu_memory", "not enough GPU memory", [&] {
        GpuModelSettings settings = c.settings(Recompute::none, false);
        settings.gpu_memory = DEVICE_MEMORY_RESERVE + 1000;
        GpuModel too_large(c.config, settings);
    });
    refuses("more than --host_memory", "not enough host memory for --offload optimizer", [&] {
        GpuModelSettings settings = c.settings(Recompute::none, false, Offload::optimizer);
        settings.host_memory = HOST_MEMORY_RESERVE + 1000;
        GpuModel too_large(c.config, settings);
    });
}

// Of no smaller batch do the logits of a chunk need more than the plan has for the largest.
static void test_chunks_of_smaller_batches(Checks& checks) {
    Case c{"vocabulary 128256", model_config(128256, 1, 64, 1, 1, 64, 64, true), 9, 600};
    const GpuModelSettings settings = c.settings(Recompute::none, false);
    const auto num_bytes = [&](int64_t rows) {
        const ClassifierShape shape = classifier_shape(c.config, settings, rows);
        return classifier_logits_bytes(shape) + classifier_scratch_bytes(shape);
    };
    const size_t planned = num_bytes(settings.max_rows());
    int64_t most = 1;
    for (int64_t rows = 1; rows < settings.max_rows(); ++rows) {
        most = num_bytes(rows) > num_bytes(most) ? rows : most;
    }
    checks.expect(num_bytes(most) <= planned, "logits of smaller batches", c.name,
                  format_string("%zu bytes planned, %zu for %lld rows", planned, num_bytes(most), (long long)most));
}

// The plan against what is then used, as the driver counts it: within 3 %, CUDA's context left out, kernels and what
// cuBLASLt keeps for itself included. And the plan made for an H100 where there is no GPU, against that on one.
static void test_memory(Checks& checks) {
    Case c{"eight blocks, 1024 wide", model_config(32000, 8, 1024, 8, 8, 128, 1536, false), 1, 32768};
    for (const bool with_lighthouse : {false, true}) {
        c.lighthouse.reset();
        if (with_lighthouse) {
            c.lighthouse = lighthouse_config(3, 4, 1024, {0, -1});
        }
        for (const auto& [recompute_name, recompute] : choices(Recompute())) {
            for (const Offload offload : {Offload::none, Offload::all}) {
                GpuModelSettings settings = c.settings(recompute, false, offload);
                settings.optimizer_chunk_elements = OPTIMIZER_CHUNK_ELEMENTS;
                const std::string label =
                    format_string("%s, %s, --recompute %s --offload %s", c.name.c_str(), choice_name(c.attention()),
                                  recompute_name, choice_name(offload));
                size_t before, built, trained, total;
                CUDA_CHECK(cudaMemGetInfo(&before, &total));
                GpuModel model(c.config, settings);
                CUDA_CHECK(cudaMemGetInfo(&built, &total));
                model.set_attention(c.attention());
                accumulate(model, c, random_batches(c, checks.seed));
                model.update(adamw_settings(1));
                CUDA_CHECK(cudaMemGetInfo(&trained, &total));
                const double planned = model.peak_memory_gib();
                const double allocated = ((double)before - (double)built) / BYTES_PER_GIB;
                const double used = ((double)before - (double)trained) / BYTES_PER_GIB;
                auto agrees = [&](double gib) { return std::abs(gib - planned) <= 0.03 * planned; };
                checks.expect(agrees(allocated) && agrees(used) && !agrees(1.04 * planned), "plan of memory", label,
                              format_string("%.3f GiB planned, %.3f allocated, %.3f used after a step", planned,
                                            allocated, used));
                const GpuProperties here = gpu_properties();
                if (here.compute_capability == H100_PROPERTIES.compute_capability) {
                    assumed_gpu() = H100_PROPERTIES;
                    const double elsewhere = planned_memory(c.config, settings).num_bytes() / BYTES_PER_GIB;
                    assumed_gpu().reset();
                    checks.expect(std::abs(elsewhere - planned) <= 1e-3 * planned, "plan without a GPU", label,
                                  format_string("%.4f GiB and %.4f", elsewhere, planned));
                }
            }
        }
    }
}

// On a GPU that another has filled but for a little, what was planned for what is free before anything is loaded still
// fits when the model holds its plan against what is free then: as much of AdamW's state on the GPU as there is room
// for, and the longest sequence that --fit prints.
static void test_full_gpu(Checks& checks) {
    size_t at_start, total_bytes;
    CUDA_CHECK(cudaMemGetInfo(&at_start, &total_bytes));
    Case c{"eight blocks, 1024 wide", model_config(32000, 8, 1024, 8, 8, 128, 1536, false), 1, 1024};
    // work(bytes that are free) beside another that has left so many, and what every GPU keeps.
    const auto with_free = [&](size_t num_bytes, const std::function<void(size_t)>& work) {
        const size_t left = DEVICE_MEMORY_RESERVE + num_bytes;
        CHECK(at_start > left, "%zu bytes of GPU memory are free, and this test needs %zu", at_start, left);
        constexpr size_t page = (size_t)2 << 20;  // that cudaMalloc takes at least
        const size_t taken = (at_start - left) / page * page;
        const DeviceMemory another(taken);
        work(at_start - taken);
    };
    const auto trains = [&](const char* what, GpuModelSettings settings, size_t free_at_start, const std::string& how) {
        settings.free_at_start = free_at_start;
        std::string message = "it fits";
        try {
            GpuModel model(c.config, settings);
            accumulate(model, c, random_batches(c, checks.seed));
            model.update(adamw_settings(1));
        } catch (const Error& error) {
            message = error.what();
        }
        checks.expect(message == "it fits", what, c.name, how + ": " + message);
    };
    GpuModelSettings offloading = c.settings(Recompute::none, false, Offload::optimizer);
    offloading.optimizer_chunk_elements = OPTIMIZER_CHUNK_ELEMENTS;
    const int64_t num_elements = make_parameter_layout(make_parameter_table(c.config)).state_elements();
    const size_t half_of_state = 3 * sizeof(float) * num_elements / 2;
    with_free(planned_memory(c.config, offloading).num_bytes() + half_of_state, [&](size_t free_at_start) {
        offloading.resident_state_elements =
            resident_state_that_fits(c.config, offloading, free_memory(offloading, free_at_start));
        const double share = (double)offloading.resident_state_elements / (double)num_elements;
        checks.expect(share > 0.49 && share < 0.51, "share of the state on a full GPU", c.name,
                      format_string("%.3f, where there is room for half", share));
        trains("state on a full GPU", offloading, free_at_start, format_string("%.1f %% of it there", 100.0 * share));
    });
    const GpuModelSettings plain = c.settings(Recompute::block, false);
    with_free(planned_memory(c.config, plain).num_bytes() + ((size_t)256 << 20), [&](size_t free_at_start) {
        c.T = longest_seq_len(c.config, plain, free_memory(plain, free_at_start));
        checks.expect(c.T > 1024, "longest sequence on a full GPU", c.name, std::to_string(c.T));
        trains("the longest sequence that fits", c.settings(Recompute::block, false), free_at_start,
               std::to_string(c.T) + " tokens");
    });
}

// ---- parts -------------------------------------------------------------------------------------
static void test_all_gradients(Checks& checks, bool small) {
    for (const Case& c : compared_cases(small)) {
        test_gradients(checks, c, small);
        test_evaluation(checks, c);
        if (!small) {
            test_bits(checks, c, small);
            test_cuda_graphs(checks, c);
        }
    }
    test_chunks_of_smaller_batches(checks);
}
static void test_all_bits(Checks& checks, bool small) {
    for (const Case& c : selecting_cases(small)) {
        test_bits(checks, c, small);
        if (!small) {  // small: Lighthouse attention meets offload in test_resume
            test_offload_modes(checks, c, small);
        }
    }
    test_offload_modes(checks, many_blocks_case(small), small);
    if (!small) {
        test_offload(checks, slow_copies_case(), {Recompute::block}, {Offload::activations, Offload::all});
    }
}
static void test_training(Checks& checks, bool small) {
    const std::vector<Case> cases = compared_cases(small);
    for (size_t i = small ? 1 : 0; i < cases.size(); i += 3) {  // small: the one with Lighthouse
        test_steps(checks, cases[i], small);
        for (const Offload offload : {Offload::none, Offload::all}) {
            if (small && offload == Offload::none) {
                continue;
            }
            test_resume(checks, cases[i], offload, small);
            test_skipped_steps(checks, cases[i], offload);
        }
    }
    test_refusals(checks);
}
static const std::vector<std::pair<std::string, void (*)(Checks& checks, bool small)>> PARTS = {
    {"gradients", test_all_gradients}, {"bits", test_all_bits}, {"training", test_training}};

int main(int argc, char** argv) {
    try {
        Checks checks;
        bool small = false, memory = false;
        std::string part;
        for (int i = 1; i < argc; ++i) {
            const std::string option = argv[i];
            if (option == "--small") {
                small = true;
            } else if (option == "--as" && i + 1 < argc) {
                const std::string gpu = argv[++i];
                CHECK(gpu == "a100" || gpu == "a10", "--as %s: there are a100 and a10", gpu.c_str());
                most_gpu_properties() = gpu == "a100" ? A100_PROPERTIES : A10_PROPERTIES;
            } else if (option == "--part" && i + 1 < argc) {
                part = argv[++i];
                CHECK(std::any_of(PARTS.begin(), PARTS.end(), [&](const auto& p) { return p.first == part; }),
                      "--part %s: there are gradients, bits and training", part.c_str());
            } else if (option == "--memory") {
                memory = true;
            } else if (option == "--seed" && i + 1 < argc) {
                checks.seed = std::strtoull(argv[++i], nullptr, 10);
            } else {
                fail("%s: no such option; there are --small, --part PART, --as GPU, --memory and --seed N",
                     option.c_str());
            }
        }
        const GpuDevice device = open_device(0);
        std::printf("test_gpt on %s\n", device.name.c_str());
        if (memory) {
            test_full_gpu(checks);  // first: nothing is loaded yet
            test_memory(checks);
        } else {
            for (const auto& [name, test] : PARTS) {
                if (part.empty() || part == name) {
                    test(checks, small);
                }
            }
        }
        std::printf("%d passed, %d failed\n", checks.num_passed, checks.num_failed);
        return checks.num_failed == 0 ? 0 : 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "test_gpt: %s\n", error.what());
        return 2;
    }
}
