// selection_leak.cpp: how much a model trained under Lighthouse attention has learned to read of the token that it is
// to predict from the choice of entries, which depends on it (llmc/reference/next_token_influence.h). On the CPU, in
// float32.
//   selection_leak FLAG ...    flags of the trainer that evaluate a checkpoint under Lighthouse attention on data
//                              (--resume or --init_from, --val_data, --seed: of the places); one place of each
//                              validation sequence, --eval_batches batches of --batch_size, 0: all
//   build/selection_leak --resume --output_dir runs/mine --batch_size 16 --eval_batches 20
#include <cstdio>
#include <exception>

#include "llmc/checkpoint_load.h"
#include "llmc/configure_run.h"
#include "llmc/random.h"
#include "llmc/reference/model.h"
#include "llmc/reference/next_token_influence.h"

static void measure(const RunConfig& config) {
    const int B = config.batch_size;
    const int64_t T = config.seq_len;
    CHECK(!config.checkpoint.empty(), "needs a checkpoint: --resume --output_dir RUN, or --init_from");
    CHECK(B >= 2 && T >= 4,
          "--batch_size %d, --seq_len %lld: must be at least 2 and 4: tokens are replaced by those of "
          "the next sequence",
          B, (long long)T);
    const RunData data = open_data(config);
    CHECK(data.validation, "needs validation data: --val_data");
    set_num_threads(config);
    reference::ReferenceModel<float> model(config.model, config.attention, config.lighthouse, B, T);
    load_model(model, config.checkpoint);
    model.set_attention(config.attention);
    const int64_t all_batches = data.validation->num_sequences() / B;
    CHECK(all_batches >= 1, "--batch_size %d: must be at most the number of validation sequences, %lld", B,
          (long long)data.validation->num_sequences());
    const int64_t num_batches = config.eval_batches == 0 ? all_batches : std::min(config.eval_batches, all_batches);
    reference::NextTokenInfluence influence;
    for (int64_t i = 0; i < num_batches; ++i) {
        const RandomStream random(config.seed, RandomUse::samples, (uint64_t)i);
        std::vector<int32_t> tokens(B * (T + 1));
        std::vector<int64_t> places(B);
        for (int b = 0; b < B; ++b) {
            data.validation->read(i * B + b, tokens.data() + b * (T + 1));
            places[b] = std::min<int64_t>((int64_t)(random.uniform((uint64_t)b) * (double)(T - 1)), T - 2);
        }
        influence.add(model, tokens, places, B, T, config.model.vocab_size);
    }
    std::printf("%s\n", influence.text().c_str());
}

int main(int argc, char** argv) {
    try {
        std::vector<const char*> arguments(argv, argv + argc);
        for (const char* word : {"--max_steps", "0"}) {  // evaluates
            arguments.push_back(word);
        }
        const std::optional<RunConfig> config = configure_run((int)arguments.size(), arguments.data());
        if (config) {
            measure(*config);
        }
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "selection_leak: %s\n", error.what());
        return 1;
    }
}
