// The whole model on the CPU: every gradient against finite differences in double over shapes that hurt, micro-batches,
// evaluation and sampling, the update and when it is refused, the same bits for any number of threads.
#include <gtest/gtest.h>
#include <omp.h>

#include <memory>
#include <set>

#include "dev/test/reference_testing.h"
#include "llmc/reference/model.h"

namespace {

const SingleThread one_thread_unless_said_otherwise;

using Model = reference::ReferenceModel<double>;

struct Case {
    std::string name;
    ModelConfig config;
    int B;
    int64_t T;
    AttentionMode attention = AttentionMode::dense;
    LighthouseConfig lighthouse = {};
};

ModelConfig small_config(int64_t V, int layers, int C, int H, int Hkv, int D, int F, bool tied) {
    ModelConfig m;
    m.vocab_size = V, m.num_layers = layers, m.width = C, m.num_heads = H, m.num_kv_heads = Hkv, m.head_dim = D;
    m.ffn_width = F, m.tied_embeddings = tied, m.norm_eps = 1e-3;
    return m;
}

std::vector<Case> cases() {
    std::vector<Case> list;
    list.push_back({"grouped queries, odd vocabulary, tied", small_config(37, 2, 24, 4, 2, 8, 40, true), 2, 9});
    list.push_back({"one head, untied, attention wider than C", small_config(11, 1, 8, 1, 1, 24, 8, false), 1, 6});
    list.push_back({"a group of 8, untied", small_config(16, 2, 16, 8, 1, 8, 24, false), 2, 5});
    list.push_back({"T = 1", small_config(5, 2, 16, 2, 1, 8, 16, true), 3, 1});
    list.push_back({"T past a block of attention", small_config(9, 1, 8, 2, 1, 8, 8, true), 1,
                    reference::ATTENTION_BLOCK_QUERIES + 5});
    Case scaled{"Llama-3 frequency scaling", small_config(13, 2, 16, 2, 1, 16, 16, true), 1, 12};
    scaled.config.rope_theta = 1000.0;
    scaled.config.rope_scaling = {4.0, 1.0, 4.0, 64};  // of the 8 frequencies some are kept, blended and divided
    list.push_back(scaled);
    // 128 coarsest entries of two tokens, all selected; the first and the last layer stay dense.
    Case lighthouse{"Lighthouse in the middle layer", small_config(7, 3, 8, 2, 1, 8, 8, true), 1, 256};
    lighthouse.attention = AttentionMode::lighthouse;
    lighthouse.lighthouse.levels = 2, lighthouse.lighthouse.pool = 2, lighthouse.lighthouse.topk = 128;
    lighthouse.lighthouse.dense_layers = {0, -1};
    list.push_back(lighthouse);
    return list;
}

// A model with random weights.
template <class Real>
std::unique_ptr<reference::ReferenceModel<Real>> make_model(const Case& c) {
    auto model = std::make_unique<reference::ReferenceModel<Real>>(c.config, c.attention, c.lighthouse, c.B, c.T);
    set_random_weights(*model, 0.4);
    return model;
}
std::vector<int32_t> batch_of(const Case& c, uint64_t seed) {
    return random_tokens(c.B * (c.T + 1), c.config.vocab_size, seed);
}
template <class Real>
std::vector<float> all_state(reference::ReferenceModel<Real>& model, StateKind kind) {
    std::vector<float> all;
    for (size_t i = 0; i < model.parameters().tensors.size(); ++i) {
        std::vector<float> values(model.parameters().tensors[i].num_elements());
        model.read_state(kind, (int)i, values.data());
        all.insert(all.end(), values.begin(), values.end());
    }
    return all;
}

AdamWSettings settings_of_step(int64_t adam_step) {
    AdamWSettings settings;
    settings.learning_rate = 1e-2, settings.adam_step = adam_step;
    return settings;
}

// ---- gradients ---------------------------------------------------------------------------------
// The gradient of a tensor is held against derivatives along random directions of +-1, which every element enters;
// relative to the gradient's 2-norm, which is what such a derivative is expected to be.
double direction_error(Model& model, int tensor, const std::vector<int32_t>& tokens, const Case& c, uint64_t seed) {
    const int64_t n = model.parameters().tensors[tensor].num_elements();
    double* weight = model.weight(tensor);
    const double* gradient = model.gradient(tensor);
    const std::vector<double> before(weight, weight + n);
    std::vector<double> direction = random_values(n, 1.0, seed);
    double expected = 0.0, squares = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        direction[i] = direction[i] < 0.0 ? -1.0 : 1.0;
        expected += direction[i] * gradient[i];
        squares += gradient[i] * gradient[i];
    }
    const double found = derivative_at_zero(
        [&](double offset) {
            for (int64_t i = 0; i < n; ++i) {
                weight[i] = before[i] + offset * direction[i];
            }
            return model.evaluate(tokens.data(), c.B, c.T);
        },
        1e-4);
    std::copy(before.begin(), before.end(), weight);
    return std::abs(found - expected) / std::max(std::sqrt(squares), SMALLEST_SCALE);
}

TEST(ReferenceModel, GradientsEqualFiniteDifferences) {
    for (const Case& c : cases()) {
        const auto model = make_model<double>(c);
        const std::vector<int32_t> tokens = batch_of(c, 1);
        model->begin_step();
        model->accumulate_gradients(tokens.data(), c.B, c.T, 1.0);
        for (size_t i = 0; i < model->parameters().tensors.size(); ++i) {
            for (const uint64_t seed : {1, 2}) {
                EXPECT_LE(direction_error(*model, (int)i, tokens, c, seed), 1e-6)
                    << c.name << ": " << model->parameters().tensors[i].name;
            }
        }
    }
}

TEST(ReferenceModel, ThatTestFindsAPlantedError) {
    const Case c = cases()[0];
    const auto model = make_model<double>(c);
    const std::vector<int32_t> tokens = batch_of(c, 1);
    model->begin_step();
    model->accumulate_gradients(tokens.data(), c.B, c.T, 1.0);
    const int tensor = model->parameters().layers[1].gate_up;
    double* gradient = model->gradient(tensor);
    gradient[5] += 1e-4 * std::sqrt((double)model->parameters().tensors[tensor].num_elements());
    EXPECT_GT(direction_error(*model, tensor, tokens, c, 1), 1e-6);
}

TEST(ReferenceModel, MicroBatchesAddUpToTheBatch) {
    Case c = cases()[0];
    c.B = 4;
    const auto model = make_model<double>(c);
    const std::vector<int32_t> tokens = batch_of(c, 2);
    const auto step = [&](int micro_batch) {
        model->begin_step();
        for (int b = 0; b < c.B; b += micro_batch) {
            model->accumulate_gradients(tokens.data() + b * (c.T + 1), micro_batch, c.T, (double)micro_batch / c.B);
        }
        const int64_t n = model->parameters().num_elements();
        return std::vector<double>(model->gradient(0), model->gradient(0) + n);
    };
    const std::vector<double> whole = step(4);
    const double loss = model->evaluate(tokens.data(), c.B, c.T);
    EXPECT_LE(relative_error(step(1), whole), 1e-13);
    EXPECT_LE(relative_error(step(2), whole), 1e-13);
    EXPECT_NEAR(model->update(settings_of_step(1)).loss, loss, 1e-13);
}

TEST(ReferenceModel, FloatIsCloseToDouble) {
    for (const Case& c : cases()) {
        const auto in_double = make_model<double>(c);
        const auto in_float = make_model<float>(c);
        const std::vector<int32_t> tokens = batch_of(c, 3);
        in_double->begin_step(), in_float->begin_step();
        in_double->accumulate_gradients(tokens.data(), c.B, c.T, 1.0);
        in_float->accumulate_gradients(tokens.data(), c.B, c.T, 1.0);
        for (size_t i = 0; i < in_double->parameters().tensors.size(); ++i) {
            const int64_t n = in_double->parameters().tensors[i].num_elements();
            const std::vector<double> expected(in_double->gradient((int)i), in_double->gradient((int)i) + n);
            std::vector<float> values(n);
            in_float->read_gradient((int)i, values.data());
            EXPECT_LE(relative_error(values, expected), 1e-4)
                << c.name << ": " << in_double->parameters().tensors[i].name;
        }
    }
}

// 130 coarsest entries, of which two do not descend: Lighthouse attention of a layer gives another loss than dense
// does.
TEST(ReferenceModel, TheLayersThatStayDenseAreThoseOfTheList) {
    Case c = cases()[6];
    c.T = 260;
    const std::vector<int32_t> tokens = batch_of(c, 1);
    const auto loss = [&](const std::vector<int>& dense_layers) {
        c.lighthouse.dense_layers = dense_layers;
        return make_model<double>(c)->evaluate(tokens.data(), c.B, c.T);
    };
    const double middle = loss({0, -1}), last = loss({0, 1}), none = loss({0, 1, 2}), all = loss({});
    EXPECT_EQ(middle, loss({0, 2}));
    EXPECT_EQ(last, loss({-3, -2}));
    EXPECT_EQ(std::set<double>({middle, last, none, all}).size(), 4u);
    c.attention = AttentionMode::dense;
    EXPECT_EQ(none, loss({})) << "all layers are dense";
}

// ---- evaluation and sampling -------------------------------------------------------------------
TEST(ReferenceModel, EvaluationTouchesNeitherGradientsNorTheLossOfTheStep) {
    const Case c = cases()[0];
    const auto model = make_model<double>(c);
    const std::vector<int32_t> tokens = batch_of(c, 1), others = batch_of(c, 2);
    const int64_t n = model->parameters().num_elements();
    model->begin_step();
    model->accumulate_gradients(tokens.data(), c.B, c.T, 1.0);
    const std::vector<double> before(model->gradient(0), model->gradient(0) + n);
    const double other_loss = model->evaluate(others.data(), c.B, c.T);
    const double loss = model->evaluate(tokens.data(), c.B, c.T);
    EXPECT_NE(loss, other_loss);
    EXPECT_TRUE(same_bits(std::vector<double>(model->gradient(0), model->gradient(0) + n), before));
    EXPECT_EQ(model->update(settings_of_step(1)).loss, loss);
}

TEST(ReferenceModel, LogitsDependOnEarlierTokensOnlyAndGiveTheLoss) {
    const Case c = cases()[0];
    const auto model = make_model<double>(c);
    const int64_t V = c.config.vocab_size;
    std::vector<int32_t> tokens = random_tokens(c.T + 1, V, 1);
    std::vector<double> logits(c.T * V), changed(c.T * V);
    model->all_logits(logits.data(), tokens.data(), 1, c.T);
    double loss = 0.0;
    for (int64_t t = 0; t < c.T; ++t) {
        double sum = 0.0;
        for (int64_t i = 0; i < V; ++i) {
            sum += std::exp(logits[t * V + i]);
        }
        loss += (std::log(sum) - logits[t * V + tokens[t + 1]]) / (double)c.T;
    }
    EXPECT_NEAR(model->evaluate(tokens.data(), 1, c.T), loss, 1e-13);

    const int64_t position = c.T / 2;
    std::vector<float> next(V);
    model->next_token_logits(tokens.data(), position, next.data());
    for (int64_t i = 0; i < V; ++i) {
        EXPECT_NEAR(next[i], logits[(position - 1) * V + i], 1e-5);
    }
    tokens[position] = (tokens[position] + 1) % (int32_t)V;
    model->all_logits(changed.data(), tokens.data(), 1, c.T);
    EXPECT_TRUE(std::equal(changed.begin(), changed.begin() + position * V, logits.begin()));
    EXPECT_FALSE(std::equal(changed.begin() + position * V, changed.end(), logits.begin() + position * V));
}

// ---- the update --------------------------------------------------------------------------------
TEST(ReferenceModel, UpdateClipsAndDecaysMatricesOnly) {
    const Case c = cases()[1];
    const auto model = make_model<double>(c);
    const std::vector<int32_t> tokens = batch_of(c, 1);
    const std::vector<float> before = all_state(*model, StateKind::master);
    model->begin_step();
    model->accumulate_gradients(tokens.data(), c.B, c.T, 1.0);
    const int64_t n = model->parameters().num_elements();
    const std::vector<double> gradient(model->gradient(0), model->gradient(0) + n);
    AdamWSettings settings = settings_of_step(1);
    settings.max_grad_norm = 0.01, settings.weight_decay = 0.5, settings.eps = 1e-3;
    const StepResult result = model->update(settings);
    EXPECT_FALSE(result.skipped);
    EXPECT_NEAR(result.grad_norm, std::sqrt(dot(gradient, gradient)), 1e-13);
    ASSERT_GT(result.grad_norm, settings.max_grad_norm);
    const std::vector<float> after = all_state(*model, StateKind::master);
    int64_t i = 0;
    for (const ParameterTensor& tensor : model->parameters().tensors) {
        for (const int64_t end = i + tensor.num_elements(); i < end; ++i) {
            // The first step's means, corrected, are the gradient and its square.
            const double g = gradient[i] * settings.max_grad_norm / result.grad_norm;
            const double decay = tensor.decay ? settings.weight_decay * before[i] : 0.0;
            const double step = settings.learning_rate * (g / (std::abs(g) + settings.eps) + decay);
            ASSERT_NEAR(after[i], before[i] - step, 1e-7) << tensor.name;
        }
    }
}

TEST(ReferenceModel, TakesTheMemoryThatIsPlanned) {
    for (const Case& c : cases()) {
        EXPECT_EQ(reference::ReferenceModel<float>::planned_bytes(c.config, c.B, c.T) / (1 << 30),
                  reference::ReferenceModel<float>(c.config, AttentionMode::dense, {}, c.B, c.T).peak_memory_gib());
    }
    ModelConfig largest = cases()[0].config;
    largest.num_layers = largest.num_heads = largest.num_kv_heads = 1024, largest.head_dim = 256;
    largest.width = 1 << 17, largest.ffn_width = 1 << 18;
    validate(largest);
    EXPECT_GT(reference::ReferenceModel<float>::planned_bytes(largest, 127, (int64_t)1 << 24), std::ldexp(1.0, 63));
}

// Three steps, of which the second is not clipped, by the formula of Loshchilov & Hutter 2019.
TEST(ReferenceModel, UpdatesFollowAdamWFromStepToStep) {
    const Case c = cases()[1];
    const auto model = make_model<double>(c);
    const int64_t n = model->parameters().num_elements();
    std::vector<double> weight(model->weight(0), model->weight(0) + n), mean(n), mean_of_squares(n);
    AdamWSettings settings;
    settings.learning_rate = 0.01, settings.beta1 = 0.8, settings.beta2 = 0.9, settings.eps = 1e-3;
    settings.weight_decay = 0.5;
    for (int step = 1; step <= 3; ++step) {
        const std::vector<int32_t> tokens = batch_of(c, step);
        model->begin_step();
        model->accumulate_gradients(tokens.data(), c.B, c.T, 1.0);
        const std::vector<double> gradient(model->gradient(0), model->gradient(0) + n);
        const double norm = std::sqrt(dot(gradient, gradient));
        settings.adam_step = step, settings.max_grad_norm = step == 2 ? 2.0 * norm : 0.1 * norm;
        const double clip = step == 2 ? 1.0 : 0.1;
        EXPECT_FALSE(model->update(settings).skipped);
        int64_t i = 0;
        for (const ParameterTensor& tensor : model->parameters().tensors) {
            const double decay = tensor.is_vector || tensor.name == "embedding" ? 0.0 : 0.5;
            for (const int64_t end = i + tensor.num_elements(); i < end; ++i) {
                const double g = clip * gradient[i];
                mean[i] = 0.8 * mean[i] + 0.2 * g;
                mean_of_squares[i] = 0.9 * mean_of_squares[i] + 0.1 * g * g;
                const double unbiased = mean[i] / (1.0 - std::pow(0.8, step));
                const double unbiased_squares = mean_of_squares[i] / (1.0 - std::pow(0.9, step));
                weight[i] -= 0.01 * (unbiased / (std::sqrt(unbiased_squares) + 1e-3) + decay * weight[i]);
                ASSERT_NEAR(model->weight(0)[i], weight[i], 1e-13) << tensor.name << ", step " << step;
            }
        }
    }
}

TEST(ReferenceModel, ANonFiniteStepIsNotApplied) {
    const Case c = cases()[0];
    const auto model = make_model<float>(c);
    const std::vector<int32_t> tokens = batch_of(c, 1);
    const auto state = [&] {
        std::vector<float> all;
        for (const StateKind kind : {StateKind::master, StateKind::exp_avg, StateKind::exp_avg_sq}) {
            const std::vector<float> part = all_state(*model, kind);
            all.insert(all.end(), part.begin(), part.end());
        }
        return all;
    };
    const auto accumulate = [&] {
        model->begin_step();
        model->accumulate_gradients(tokens.data(), c.B, c.T, 1.0);
    };
    accumulate();
    EXPECT_FALSE(model->update(settings_of_step(1)).skipped);
    const std::vector<float> before = state();

    const int tensor = model->parameters().layers[1].down;
    for (const float bad : {NAN, INFINITY}) {
        accumulate();
        model->gradient(tensor)[7] = bad;
        const StepResult result = model->update(settings_of_step(2));
        EXPECT_TRUE(result.skipped);
        EXPECT_EQ(result.first_bad_tensor, "layer1.down");
        EXPECT_TRUE(std::isfinite(result.loss));
        EXPECT_TRUE(same_bits(state(), before));
    }
    const int norm = model->parameters().final_norm;
    const float weight = *model->weight(norm);
    *model->weight(norm) = NAN;
    accumulate();
    const StepResult result = model->update(settings_of_step(2));
    EXPECT_TRUE(result.skipped);
    EXPECT_EQ(result.first_bad_tensor, "loss");
    *model->weight(norm) = weight;
    EXPECT_TRUE(same_bits(state(), before));

    accumulate();
    std::fill_n(model->gradient(tensor), 2, 3e38f);  // finite floats whose norm is none
    EXPECT_TRUE(model->update(settings_of_step(2)).skipped);
    EXPECT_TRUE(same_bits(state(), before));

    accumulate();  // and nothing of it stays
    EXPECT_FALSE(model->update(settings_of_step(2)).skipped);
    EXPECT_FALSE(same_bits(state(), before));
}

TEST(ReferenceModel, LearnsAndRepeatsBitForBitWithAnyThreads) {
    for (const Case& c : {cases()[0], cases()[6]}) {
        const std::vector<int32_t> tokens = batch_of(c, 1);
        double first_loss = 0.0, last_loss = 0.0;
        const auto train = [&] {
            const auto model = make_model<float>(c);
            for (int step = 1; step <= 8; ++step) {
                model->begin_step();
                model->accumulate_gradients(tokens.data(), c.B, c.T, 1.0);
                last_loss = model->update(settings_of_step(step)).loss;
                first_loss = step == 1 ? last_loss : first_loss;
            }
            return all_state(*model, StateKind::master);
        };
        const std::vector<float> expected = train();
        EXPECT_LT(last_loss, first_loss - 0.1) << c.name;
        const int threads = omp_get_max_threads();
        for (const int n : {1, 2, 3}) {
            omp_set_num_threads(n);
            EXPECT_TRUE(same_bits(train(), expected)) << c.name << " with " << n << " threads";
        }
        omp_set_num_threads(threads);
    }
}

// ---- state and input ---------------------------------------------------------------------------
TEST(ReferenceModel, StateIsReadAsItWasWritten) {
    const Case c = cases()[1];
    const auto model = make_model<float>(c);
    for (const StateKind kind : {StateKind::master, StateKind::exp_avg, StateKind::exp_avg_sq}) {
        for (size_t i = 0; i < model->parameters().tensors.size(); ++i) {
            const int64_t n = model->parameters().tensors[i].num_elements();
            const std::vector<float> values = converted<float>(random_values(n, 1.0, i + 10 * (uint64_t)kind));
            std::vector<float> read(n);
            model->write_state(kind, (int)i, values.data());
            model->read_state(kind, (int)i, read.data());
            EXPECT_TRUE(same_bits(read, values));
        }
    }
}

TEST(ReferenceModel, RefusesWhatItCannotTake) {
    const Case c = cases()[0];
    const auto model = make_model<float>(c);
    std::vector<int32_t> tokens = batch_of(c, 1);
    const auto message = [&](int B, int64_t T) {
        try {
            model->evaluate(tokens.data(), B, T);
        } catch (const Error& error) {
            return std::string(error.what());
        }
        return std::string();
    };
    EXPECT_EQ(message(c.B, c.T), "");
    EXPECT_NE(message(c.B, c.T + 1).find("at most 2 of 9"), std::string::npos);
    EXPECT_NE(message(c.B + 1, c.T).find("3 sequences"), std::string::npos);
    tokens[4] = 37;
    EXPECT_NE(message(c.B, c.T).find("token 37 at position 4"), std::string::npos);
    tokens[4] = -1;
    EXPECT_NE(message(c.B, c.T).find("token -1 at position 4"), std::string::npos);
    tokens = batch_of(c, 1);
    tokens.back() = 37;  // no input: the last target
    EXPECT_NE(message(c.B, c.T).find("token 37 at position 8"), std::string::npos);

    const Case lighthouse = cases()[6];
    const auto sparse = make_model<float>(lighthouse);
    const std::vector<int32_t> sequence = batch_of(lighthouse, 1);
    EXPECT_THROW(sparse->evaluate(sequence.data(), 1, 250), Error);
    sparse->set_attention(AttentionMode::dense);
    EXPECT_NO_THROW(sparse->evaluate(sequence.data(), 1, 250));
}

}  // namespace
