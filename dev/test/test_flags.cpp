// test_flags.cpp: settings from command line and file: layers, refusals and their sentences, saving and reading back.
#include <gtest/gtest.h>

#include <climits>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>
#include <sstream>
#include <unistd.h>

#include "llmc/flags.h"

namespace {

ParsedFlags parse_line(std::vector<const char*> arguments) {
    arguments.insert(arguments.begin(), "train_gpt_cpu");
    return parse_flags((int)arguments.size(), arguments.data());
}

// The sentence that parsing, checking and validating these flags ends with; "" when they are accepted.
std::string refusal(const std::vector<const char*>& arguments) {
    try {
        const ParsedFlags parsed = parse_line(arguments);
        check_given_flags(parsed);
        validate(parsed.config);
    } catch (const Error& error) {
        return error.what();
    }
    return "";
}

void expect_refused(const std::vector<const char*>& arguments, const std::string& part_of_sentence) {
    const std::string sentence = refusal(arguments);
    EXPECT_NE(sentence.find(part_of_sentence), std::string::npos) << "got: '" << sentence << "'";
    EXPECT_EQ(sentence.find('\n'), std::string::npos) << "more than a line: " << sentence;
}

// A folder that is removed at the end.
struct TemporaryFolder {
    std::string path = testing::TempDir() + "llmc_flags_XXXXXX";
    TemporaryFolder() { EXPECT_NE(mkdtemp(path.data()), nullptr); }
    ~TemporaryFolder() { EXPECT_EQ(std::system(("rm -rf '" + path + "'").c_str()), 0); }
    std::string write(const std::string& name, const std::string& text) const {
        std::ofstream(path + "/" + name, std::ios::binary) << text;
        return path + "/" + name;
    }
};

}  // namespace

TEST(Flags, DefaultsAreTheTinyPreset) {
    const ParsedFlags parsed = parse_line({"--train_data", "x"});
    EXPECT_EQ(parsed.config.model.vocab_size, 258);
    EXPECT_EQ(parsed.config.train_data, std::vector<std::string>{"x"});
    EXPECT_EQ(parsed.given, std::set<std::string>{"train_data"});
    EXPECT_EQ(refusal({"--train_data", "x"}), "");
}

TEST(Flags, TheDefaultDenseLayersAreThoseOfTheModel) {
    const auto fitted = [](std::vector<const char*> arguments) {
        ParsedFlags parsed = parse_line(std::move(arguments));
        fit_default_dense_layers(parsed);
        return parsed.config.lighthouse.dense_layers;
    };
    EXPECT_EQ(fitted({}), (std::vector<int>{0, 1, -2, -1}));
    EXPECT_EQ(fitted({"--num_layers", "2"}), (std::vector<int>{0, 1, -2, -1}));
    EXPECT_EQ(fitted({"--num_layers", "1"}), (std::vector<int>{0, -1}));
    EXPECT_EQ(fitted({"--num_layers", "1", "--lighthouse_dense_layers", "0,1,-2,-1"}), (std::vector<int>{0, 1, -2, -1}))
        << "which is refused";
}

TEST(Flags, ATextBehindAnEqualsSignIsItsValueWhateverItIs) {
    const auto prompt_of = [](std::vector<const char*> arguments) {
        return parse_line(std::move(arguments)).config.sample_prompt;
    };
    EXPECT_EQ(prompt_of({"--sample_prompt=a", "--sample_prompt="}), "") << "the last one";
    EXPECT_EQ(prompt_of({"--sample_prompt=", "--sample_prompt", "a"}), "a");
    EXPECT_EQ(prompt_of({"--sample_prompt=--plain"}), "--plain");
    EXPECT_EQ(prompt_of({"--sample_prompt=--help=x"}), "--help=x");
    for (const char* text : {"--", "=", "[INST]", "a=b", " ", "-x"}) {
        EXPECT_EQ(prompt_of({(std::string("--sample_prompt=") + text).c_str()}), text);
    }
    const ParsedFlags parsed = parse_line({"--sample_prompt=", "--plain"});
    EXPECT_TRUE(parsed.config.plain) << "no value of the flag before it";
    EXPECT_EQ(parsed.typed, (std::set<std::string>{"plain", "sample_prompt"}));
    expect_refused({"--sample_prompt", "--plain"}, "--sample_prompt: its value is missing ('--plain' is a flag)");
    expect_refused({"--train_data", "--sample_prompt="}, "--train_data: its value is missing");
    expect_refused({"--output_dir="}, "--output_dir '': must name a folder");
    expect_refused({"--config=", "--plain"}, "--config '': must name a file");
    expect_refused({"--seq_len="}, "--seq_len");
}

TEST(Flags, EveryKindOfValue) {
    const RunConfig c = parse_line({"--seq_len=98304",
                                    "--learning_rate",
                                    "2e-3",
                                    "--resume",
                                    "false",
                                    "--deterministic",
                                    "--attention",
                                    "lighthouse",
                                    "--train_data",
                                    "a",
                                    "b",
                                    "--train_data",
                                    "c",
                                    "--seed",
                                    "18446744073709551",
                                    "--tied_embeddings",
                                    "false",
                                    "--lighthouse_steps",
                                    "-1",
                                    "--lighthouse_dense_layers",
                                    "-2,-1,0"})
                            .config;
    EXPECT_EQ(c.seq_len, 98304);
    EXPECT_EQ(c.learning_rate, 2e-3);
    EXPECT_TRUE(c.deterministic);
    EXPECT_FALSE(c.resume);
    EXPECT_EQ(c.attention, AttentionMode::lighthouse);
    EXPECT_EQ(c.train_data, (std::vector<std::string>{"a", "b", "c"}));
    EXPECT_EQ(c.seed, 18446744073709551u);
    EXPECT_FALSE(c.model.tied_embeddings);
    EXPECT_EQ(c.lighthouse_steps, -1);
    EXPECT_EQ(c.lighthouse.dense_layers, (std::vector<int>{-2, -1, 0}));
    EXPECT_TRUE(parse_line({"--lighthouse_dense_layers", "none"}).config.lighthouse.dense_layers.empty());
}

TEST(Flags, BracketsAreOrdinaryLetters) {
    const RunConfig c =
        parse_line({"--train_data", "[a-z]*", "b", "--sample_prompt", "[INST] hi [/INST]", "--output_dir", "[run1]"})
            .config;
    EXPECT_EQ(c.train_data, (std::vector<std::string>{"[a-z]*", "b"}));
    EXPECT_EQ(c.sample_prompt, "[INST] hi [/INST]");
    EXPECT_EQ(c.output_dir, "[run1]");
}

TEST(Flags, ScriptsMayAppendFlagsThatWin) {
    EXPECT_EQ(parse_line({"--max_steps", "420", "--max_steps", "1000"}).config.max_steps, 1000);
    EXPECT_EQ(parse_line({"--lighthouse_dense_layers", "0,1", "--lighthouse_dense_layers", "2"})
                  .config.lighthouse.dense_layers,
              (std::vector<int>{2}));
    EXPECT_TRUE(parse_line({"--lighthouse_dense_layers", "0,1", "--lighthouse_dense_layers", "none"})
                    .config.lighthouse.dense_layers.empty());
    EXPECT_EQ(parse_line({"--train_data", "a", "--train_data", "b"}).config.train_data,
              (std::vector<std::string>{"a", "b"}))
        << "files go on";
}

TEST(Flags, PresetThenFields) {
    const RunConfig c = parse_line({"--width", "64", "--model", "llama3-8b"}).config;
    EXPECT_EQ(c.model.width, 64);
    EXPECT_EQ(c.model.ffn_width, 14336);
    expect_refused({"--model", "llama4"}, "lighthouse-530m");
}

TEST(Flags, UnknownFlagsNameTheNearest) {
    expect_refused({"--seq_length", "3"}, "--seq_length: there is no such flag; the nearest is --seq_len ");
    expect_refused({"--lr", "3"}, "the nearest is --learning_rate ");
    expect_refused({"--train-data=x"}, "the nearest is --train_data ");
    expect_refused({"--lighthouse_pol", "3"}, "the nearest is --lighthouse_pool ");
    expect_refused({"-x"}, "-x: there is no such flag");
    expect_refused({"corpus.txt"}, "'corpus.txt': every value follows its flag");
}

TEST(Flags, UnreadableValues) {
    expect_refused({"--seq_len", "12abc"}, "--seq_len '12abc': must be a whole number");
    expect_refused({"--seq_len", "1e6"}, "must be a whole number");
    expect_refused({"--seq_len", "99999999999999999999"}, "fits 64 bits");
    expect_refused({"--batch_size", "4294967297"}, "fits 32 bits");
    expect_refused({"--seed", "-1"}, "not negative");
    expect_refused({"--learning_rate", "fast"}, "must be a number");
    expect_refused({"--learning_rate", "nan"}, "must be a number");
    expect_refused({"--learning_rate", "inf"}, "must be a number");
    expect_refused({"--tied_embeddings", "maybe"}, "must be true or false");
    expect_refused({"--schedule", "cosin"}, "must be cosine or linear or constant");
    expect_refused({"--lighthouse_dense_layers", "0,x"}, "whole numbers with commas");
    expect_refused({"--lighthouse_dense_layers", ""}, "whole numbers with commas");
    expect_refused({"--seq_len"}, "--seq_len: its value is missing");
    // Smaller than a double holds: not 0, which would mean something else.
    expect_refused({"--max_grad_norm", "1e-400"},
                   "--max_grad_norm '1e-400': must be 0 or a number that a double holds");
    EXPECT_EQ(parse_line({"--max_grad_norm", "0e-400"}).config.max_grad_norm, 0.0);
    // Of a variable that the shell does not know.
    expect_refused({"--byte_markers="}, "--byte_markers '': must be true or false");
    expect_refused({"--byte_markers", "", "--seq_len", "5"}, "--byte_markers '': must be true or false");
    EXPECT_TRUE(parse_line({"--deterministic", "--sample_prompt", ""}).config.deterministic);
}

TEST(Flags, ValuesThatBreakARule) {
    expect_refused({}, "--train_data");
    expect_refused({"--train_data", "x", "--seq_len", "0"}, "--seq_len 0");
    expect_refused({"--train_data", "x", "--global_batch", "12"},
                   "--global_batch 12: must be a multiple of --batch_size 8; the nearest is 16");
    expect_refused({"--train_data", "x", "--global_batch", "3"}, "the nearest is 8");
    expect_refused({"--train_data", "x", "--num_kv_heads", "3"}, "the nearest that does is 2");
    expect_refused({"--train_data", "x", "--num_heads", "8", "--num_kv_heads", "7"}, "the nearest that does is 8");
    expect_refused({"--train_data", "x", "--num_kv_heads", "-2147483648"}, "the nearest that does is 1");
    expect_refused({"--train_data", "x", "--head_dim", "30"}, "the nearest is 32");
    expect_refused({"--train_data", "x", "--width", "2147483647"}, "the nearest is 131072");
    expect_refused({"--train_data", "x", "--beta1", "1"}, "--beta1 1");
    expect_refused({"--train_data", "x", "--top_p", "0"}, "--top_p 0");
    expect_refused({"--train_data", "x", "--top_p", "1.0000001"}, "--top_p 1.0000001: must be");
    expect_refused({"--train_data", "x", "--norm_eps", "1.0000001"}, "--norm_eps 1.0000001: must be");
    expect_refused({"--train_data", "x", "--temperature", "3.0000001e38"}, "--temperature 3.0000001e+38: must be");
    expect_refused({"--train_data", "x", "--val_fraction", "1"}, "--val_fraction 1");
    expect_refused({"--train_data", "x", "--learning_rate", "-1"}, "--learning_rate -1");
    expect_refused({"--train_data", "x", "--max_positions", "100"},
                   "--max_positions 100: must be at least --seq_len 256");
    expect_refused({"--train_data", "x", "--seq_len", "16000000", "--batch_size", "1000"}, "2^31 tokens");
    expect_refused({"--train_data", "x", "--max_skipped", "0"}, "--max_skipped 0");
}

TEST(Flags, Contradictions) {
    expect_refused({"--train_data", "x", "--resume", "--init_from", "y", "--output_dir", "z"},
                   "--output_dir z holds no run: there is no z/settings.toml");
    expect_refused({"--train_data", "x", "--resume"}, "--output_dir");
    expect_refused({"--train_data", "x", "--lighthouse_topk", "128"}, "--attention lighthouse");
    expect_refused({"--train_data", "x", "--lighthouse_steps", "5"}, "--attention lighthouse");
    expect_refused({"--train_data", "x", "--val_data", "y", "--val_fraction", "0.1"}, "leave one out");
    expect_refused({"--train_data", "x", "--val_fraction", "0", "--eval_every", "10"},
                   "--eval_every 10 needs validation data");
    expect_refused({"--train_data", "x", "--val_fraction", "0", "--eval_every", "0", "--attention", "lighthouse",
                    "--seq_len", "2048", "--lighthouse_topk", "128", "--print_influence"},
                   "--print_influence: needs validation data");
    expect_refused({"--train_data", "x", "--sample_every", "5", "--sample_tokens", "0"}, "--sample_tokens 0");
    expect_refused({"--train_data", "x", "--schedule", "constant", "--decay_steps", "5"}, "--schedule constant");
    expect_refused({"--train_data", "x", "--warmup_steps", "9", "--decay_steps", "5"}, "--decay_steps 5");
    expect_refused({"--max_steps", "0"}, "--val_data");
    // A file may say what it does not use as it is anyway, and the command line overrules it.
    TemporaryFolder folder;
    const std::string as_saved = folder.write("saved.toml",
                                              "train_data = ['x']\nval_data = ['y']\nval_fraction = 0.05\n"
                                              "attention = 'dense'\nlighthouse_levels = 3\n");
    EXPECT_EQ(refusal({"--config", as_saved.c_str()}), "");
    EXPECT_TRUE(parse_line({"--config", as_saved.c_str(), "--val_fraction", "0.1"}).config.val_data.empty());
    expect_refused({"--config", as_saved.c_str(), "--lighthouse_levels", "3"}, "--attention lighthouse");
    const std::string lighthouse = folder.write(
        "lighthouse.toml", "train_data = ['x']\nattention = 'lighthouse'\nlighthouse_topk = 128\nseq_len = 2048\n");
    EXPECT_EQ(refusal({"--config", lighthouse.c_str(), "--attention", "dense"}), "");
    const std::string unused = folder.write("unused.toml", "train_data = ['x']\nlighthouse_topk = 128\n");
    expect_refused({"--config", unused.c_str()}, "--attention lighthouse");
    for (const char* flag : {"--sample_prompt", "--temperature", "--top_p"}) {
        expect_refused({"--train_data", "x", "--sample_tokens", "0", flag, "0.5"}, "and --sample_tokens 0 contradict");
    }
    expect_refused({"--train_data", "x", "--temperature", "0", "--top_p", "0.5"}, "--top_p and --temperature 0");
    expect_refused({"--train_data", "x", "--weight_decay", "0", "--decay_all"}, "--decay_all and --weight_decay 0");
    EXPECT_EQ(refusal({"--train_data", "x", "--sample_tokens", "8", "--temperature", "0.5", "--top_p", "0.5"}), "");
}

TEST(Flags, ARunGoesOnWithTheLineThatStartedIt) {
    const TemporaryFolder folder;
    std::vector<const char*> line = {"--train_data", "x", "--init_from", "hf", "--output_dir", folder.path.c_str()};
    folder.write("settings.toml", settings_toml(parse_line(line).config));
    line.push_back("--resume");
    EXPECT_EQ(refusal(line), "");
    EXPECT_EQ(parse_line({"--resume", "--output_dir", folder.path.c_str()}).config.init_from, "hf");
    const std::string here = std::filesystem::current_path();
    for (const std::string& same : {std::string("hf/"), std::string("./hf"), here + "/hf", std::string("x/../hf//")}) {
        line[3] = same.c_str();
        EXPECT_EQ(refusal(line), "") << same;
    }
    line[3] = "another";
    expect_refused(line, "--resume and --init_from another contradict each other");
    folder.write("settings.toml", std::string("train_data = ['x']\nsample_tokens = 0\n") + SETTINGS_END);
    expect_refused({"--resume", "--output_dir", folder.path.c_str(), "--sample_prompt", "a"},
                   "--sample_prompt and --sample_tokens 0, saved with the run, contradict");
}

TEST(Flags, TheCpuRefusesWhatOnlyAGpuHas) {
    const auto said = [](const std::vector<const char*>& arguments) { return check_cpu_flags(parse_line(arguments)); };
    const auto refused = [&](const std::vector<const char*>& arguments, const std::string& words) {
        try {
            ADD_FAILURE() << "was accepted: '" << said(arguments) << "'";
        } catch (const Error& error) {
            EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
        }
    };
    refused({"--profile"}, "--profile: is about a GPU");
    refused({"--gpu_memory", "80", "--device", "1"}, "--device, --gpu_memory: are about a GPU");
    refused({"--print_memory"}, "--print_memory: ");
    refused({"--host_memory", "8"}, "--host_memory: ");
    refused({"--recompute", "block", "--offload", "all"}, "--recompute, --offload: ");
    refused({"--classifier_chunk_rows", "64"}, "--classifier_chunk_rows: ");
    refused({"--cuda_graphs", "false"}, "--cuda_graphs: ");
    refused({"--comm_transport", "host", "--comm_timeout", "9"}, "--comm_transport, --comm_timeout: ");
    refused({"--fit", "--gpu_memory", "80"}, "--fit: is about the memory of a GPU; train_gpt answers it");
    // What the CPU does anyway.
    EXPECT_EQ(said({"--train_data", "x", "--profile", "false", "--device", "0", "--recompute", "none"}), "");
    TemporaryFolder folder;
    const std::string file = folder.write("gpu.toml", "profile = true\nrecompute = 'block'\ndevice = 0\n");
    EXPECT_EQ(said({"--config", file.c_str()}),
              "--recompute, --profile (of a settings file): about a GPU, without effect on the CPU");
    EXPECT_EQ(said({"--config", file.c_str(), "--profile", "false", "--recompute", "none"}), "");
    refused({"--config", file.c_str(), "--recompute", "all_but_attention"}, "--recompute: is about a GPU");
    refused({"--config", folder.write("fit.toml", "fit = true\n").c_str()}, "--fit: ");
    folder.write("settings.toml", std::string("offload = 'all'\n") + SETTINGS_END);
    EXPECT_EQ(said({"--resume", "--output_dir", folder.path.c_str()}),
              "--offload (of a settings file): about a GPU, without effect on the CPU");
}

TEST(Flags, HeadsAreDividedAmongRanks) {
    expect_refused(
        {"--train_data", "x", "--num_kv_heads", "2", "--context_parallel", "4", "--context_exchange", "heads"},
        "--context_exchange heads: --num_kv_heads 2 must be a multiple of --context_parallel 4");
    EXPECT_EQ(
        refusal({"--train_data", "x", "--num_kv_heads", "2", "--context_parallel", "4", "--context_exchange", "ring"}),
        "");
    EXPECT_EQ(
        refusal({"--train_data", "x", "--num_kv_heads", "2", "--context_parallel", "2", "--context_exchange", "heads"}),
        "");
}

TEST(Flags, LighthouseGeometryIsCheckedAtStartUp) {
    expect_refused({"--train_data", "x", "--attention", "lighthouse", "--lighthouse_topk", "128", "--seq_len", "2000"},
                   "--seq_len 2000");
    expect_refused({"--train_data", "x", "--attention", "lighthouse", "--lighthouse_topk", "100", "--seq_len", "2048"},
                   "--lighthouse_topk 100");
    expect_refused(
        {"--train_data", "x", "--attention", "lighthouse", "--lighthouse_levels", "6", "--lighthouse_pool", "8",
         "--lighthouse_topk", "2251799813685248"},
        "--lighthouse_topk 2251799813685248: with --lighthouse_levels 6 and --lighthouse_pool 8 it must be at "
        "most 512 for a --seq_len of at most 16777216; the nearest that works is 512, with --seq_len 16777216");
    expect_refused({"--train_data", "x", "--attention", "lighthouse", "--lighthouse_topk", "128", "--seq_len", "2048",
                    "--lighthouse_dense_layers", "7"},
                   "--lighthouse_dense_layers 7: with --num_layers 4 layers are from -4 to 3; the nearest is 3");
    expect_refused({"--train_data", "x", "--attention", "lighthouse", "--lighthouse_topk", "128", "--seq_len", "2048",
                    "--lighthouse_dense_layers", "0,-7"},
                   "--lighthouse_dense_layers -7: with --num_layers 4 layers are from -4 to 3; the nearest is -4");
    expect_refused({"--train_data", "x", "--attention", "lighthouse", "--lighthouse_topk", "128", "--seq_len", "2048",
                    "--lighthouse_scorer", "dilated", "--lighthouse_dilation", "3"},
                   "--lighthouse_dilation 3: must be positive and divide --seq_len 2048; the nearest that works is 2");
    expect_refused({"--train_data", "x", "--attention", "lighthouse", "--lighthouse_pool", "2", "--lighthouse_topk",
                    "256", "--seq_len", "2048", "--context_parallel", "4"},
                   "--lighthouse_topk 256: must be a positive multiple of 1024 (whole tiles in each of the 8 chunks of "
                   "--context_parallel); the nearest that works is 1024, with --seq_len 4096");
    EXPECT_EQ(
        refusal({"--train_data", "x", "--attention", "lighthouse", "--lighthouse_topk", "128", "--seq_len", "2048"}),
        "");
}

// Whatever is refused: with what the message suggests in its place the run is accepted.
TEST(Flags, WhatAMessageSuggestsIsAccepted) {
    std::mt19937_64 generator(1);
    const auto any_of = [&](const std::vector<int64_t>& values) { return values[generator() % values.size()]; };
    const auto message = [](const RunConfig& c) -> std::string {
        try {
            validate(c);
        } catch (const Error& error) {
            return error.what();
        }
        return "";
    };
    const auto expect_accepted = [&](RunConfig c, const std::vector<std::string>& flags_and_values,
                                     const std::string& of) {
        const std::vector<Setting> settings = list_settings(c);
        for (size_t i = 0; i < flags_and_values.size(); i += 2) {
            find_setting(settings, flags_and_values[i])->set({flags_and_values[i + 1]});
        }
        EXPECT_EQ(message(c), "") << "after: " << of;
    };
    std::map<std::string, int> refused;
    for (int i = 0; i < 8000; ++i) {
        RunConfig c;
        c.train_data = {"x"};
        c.attention = any_of({0, 1, 1}) == 1 ? AttentionMode::lighthouse : AttentionMode::dense;
        c.lighthouse.levels = (int)any_of({1, 2, 2, 3, 3, 4, 5, 6, 7}),
        c.lighthouse.pool = (int)any_of({2, 2, 4, 4, 7, 8, 32, 64});
        c.lighthouse.topk = any_of({128, 128, 256, 1024, 1280, 1536, 1000, 4096, 65536, 1 << 20, 12800000, INT64_MAX});
        c.seq_len = any_of({1, 512, 2000, 2048, 4096, 10240, 98304, 100000, 1 << 20, (1 << 24) - 1, 1 << 24});
        if (any_of({0, 0, 1}) == 1) {
            c.lighthouse.scorer = LighthouseScorer::dilated,
            c.lighthouse.dilation = (int)any_of({-1, 1, 3, 4, 1000, INT_MAX});
        } else {
            c.context_parallel = (int)any_of({1, 1, 2, 3, 4, 8, 100});
        }
        c.batch_size = (int)any_of({1, 1, 2, 127});
        c.model.max_positions = any_of({0, 0, 0, c.seq_len});
        const std::string sentence = message(c);
        if (sentence.empty()) {
            continue;
        }
        const size_t nearest = sentence.find("; the nearest "), instead = sentence.find("; this --seq_len works with ");
        if (nearest == std::string::npos) {  // no length, whatever the other settings
            EXPECT_FALSE(c.batch_size == 1 && c.model.max_positions == 0) << sentence;
            continue;
        }
        const std::string flag = sentence.substr(2, sentence.find(' ') - 2);
        ++refused[flag];
        std::map<std::string, std::vector<std::string>> suggested;  // a number is of the flag named last
        std::string name = flag;
        std::istringstream words(sentence.substr(nearest, instead - nearest));
        for (std::string word; words >> word;) {
            if (word.rfind("--", 0) == 0) {
                name = word.substr(2);
            } else if (std::isdigit((unsigned char)word[0])) {
                suggested[name].push_back(word.substr(0, word.find(',')));
            }
        }
        EXPECT_FALSE(suggested[flag].empty()) << sentence;
        for (const std::string& value : suggested[flag]) {
            std::vector<std::string> changes;
            for (const auto& [other, values] : suggested) {
                changes.insert(changes.end(), {other, other == flag ? value : values.at(0)});
            }
            expect_accepted(c, changes, sentence);
        }
        if (instead != std::string::npos) {
            expect_accepted(c, {"lighthouse_topk", sentence.substr(sentence.rfind(' ') + 1)}, sentence);
        }
    }
    for (const char* flag :
         {"lighthouse_levels", "lighthouse_pool", "lighthouse_topk", "seq_len", "lighthouse_dilation"}) {
        EXPECT_GT(refused[flag], 30) << flag;
    }
}

TEST(Flags, SettingsFile) {
    TemporaryFolder folder;
    const std::string file = folder.write("run.toml",
                                          "# a run\n"
                                          "train_data = [\"a#1/*.txt\", 'b,c',  # two\n"
                                          "    \"d\"]\n"
                                          "seq_len = 1024   # tokens\n"
                                          "learning_rate = 1e-3\n"
                                          "sample_prompt = \"#include <a, b>\\n\\\"q\\\" \\u00e9\"\n"
                                          "deterministic = true\n"
                                          "lighthouse_dense_layers = [0, -1]\r\n"
                                          "schedule = 'linear'");
    const ParsedFlags parsed = parse_line({"--config", file.c_str(), "--seq_len", "64"});
    const RunConfig& c = parsed.config;
    EXPECT_EQ(c.train_data, (std::vector<std::string>{"a#1/*.txt", "b,c", "d"}));
    EXPECT_EQ(c.seq_len, 64) << "the command line wins";
    EXPECT_EQ(c.learning_rate, 1e-3);
    EXPECT_EQ(c.sample_prompt, "#include <a, b>\n\"q\" \xc3\xa9");
    EXPECT_TRUE(c.deterministic);
    EXPECT_EQ(c.lighthouse.dense_layers, (std::vector<int>{0, -1}));
    EXPECT_EQ(c.schedule, ScheduleKind::linear);
    EXPECT_EQ(parsed.given.count("learning_rate"), 1u);
}

TEST(Flags, SettingsFileErrorsNameTheLine) {
    TemporaryFolder folder;
    auto refused = [&](const std::string& text, const std::string& part) {
        const std::string file = folder.write("run.toml", text);
        expect_refused({"--config", file.c_str()}, part);
    };
    refused("seq_len = 4\nseq_lenn = 5\n", "run.toml line 2: there is no setting 'seq_lenn'; the nearest is 'seq_len'");
    refused("[model]\n", "line 1: sections are not used");
    refused("seq_len = 4\nseq_len = 5\n", "line 2: 'seq_len' is already set in line 1");
    refused("seq_len 4\n", "line 1: expected '='");
    refused("schedule = cosine\n", "line 1: expected a number, true, false, or a string in quotes, not cosine");
    refused("\n\nsample_prompt = \"abc\n", "line 3: the string has no closing quote");
    refused("train_data = [\"a\"\n", "the array");
    refused("seq_len = [1, 2]\n", "line 1: seq_len takes one value");
    refused("seq_len = 4 5\n", "expected the end of the line");
    refused("seq_len = \"x\"\n", "run.toml line 1: seq_len 'x': must be a whole number");
    refused("sample_prompt = \"\\q\"\n", "unknown escape");
    refused("sample_prompt = \"\\ud800\"\n", "no Unicode character");
    refused(std::string("seq_len = \0 4\n", 13), "expected a number");
    expect_refused({"--config", "/no/such/run.toml"}, "/no/such/run.toml: cannot open this settings file");
}

TEST(Flags, SavedSettingsReadBack) {
    TemporaryFolder folder;
    const RunConfig original = parse_line({"--train_data", "we\"ird#, file", "b", "--width", "192", "--learning_rate",
                                           "0.1234567890123", "--sample_prompt", "line\nline\ttab \x01 'q'",
                                           "--attention", "lighthouse", "--lighthouse_dense_layers", "none",
                                           "--tied_embeddings", "false", "--output_dir", folder.path.c_str()})
                                   .config;
    const std::string toml = settings_toml(original);
    folder.write("settings.toml", toml);
    const std::string saved = saved_settings_path(folder.path);
    EXPECT_EQ(settings_toml(parse_line({"--config", saved.c_str()}).config), toml);

    // A run that was resumed knows the positions of its checkpoint; its settings are good for longer sequences too.
    RunConfig resumed_once = original;
    resumed_once.model.max_positions = resumed_once.seq_len;
    EXPECT_EQ(settings_toml(resumed_once), toml);
    resumed_once.model.max_positions = 2 * resumed_once.seq_len;
    EXPECT_NE(settings_toml(resumed_once).find("max_positions = 512\n"), std::string::npos);

    const ModelConfig typed = parse_line({"--config", saved.c_str(), "--model", "llama3-8b"}).config.model;
    EXPECT_EQ(typed.width, 4096) << "a preset that is typed stands for the whole shape";
    EXPECT_EQ(typed.init_std, model_preset("llama3-8b").init_std);
    EXPECT_EQ(parse_line({"--config", saved.c_str(), "--model", "llama3-8b", "--width", "64"}).config.model.width, 64);
    expect_refused({"--resume", "--output_dir", "no/such/run"}, "--output_dir no/such/run holds no run");
    const ParsedFlags resumed = parse_line({"--resume", "--output_dir", folder.path.c_str(), "--max_steps", "7"});
    EXPECT_EQ(resumed.config.train_data, original.train_data);
    EXPECT_EQ(resumed.config.max_steps, 7) << "the command line wins over the saved settings";
    EXPECT_EQ(resumed.given.count("width"), 0u) << "saved settings do not count as given";
    EXPECT_TRUE(resumed.config.resume);
}

// A run may be resumed with what makes others of its settings idle; the file keeps these, and is read all the same.
// With defaults in the place of what is missing another run would go on under its name.
TEST(Flags, SavedSettingsThatAreCutOffAreRefused) {
    TemporaryFolder folder;
    const std::vector<const char*> resume = {"--resume", "--output_dir", folder.path.c_str()};
    const std::string toml = settings_toml(parse_line({"--train_data", "x", "--learning_rate", "1e-4"}).config);
    for (size_t length = 0; length + 1 < toml.size(); ++length) {
        folder.write("settings.toml", toml.substr(0, length));
        ASSERT_NE(refusal(resume).find("/settings.toml: is cut off"), std::string::npos) << length;
    }
    for (const char* end : {"", "\n", "\r\n\n "}) {
        folder.write("settings.toml", toml.substr(0, toml.size() - 1) + end);
        EXPECT_EQ(parse_line(resume).config.learning_rate, 1e-4);
    }
}

TEST(Flags, SettingsOfAResumedRunReadBack) {
    using Line = std::vector<const char*>;
    struct Case {
        Line start, resume;
        const char* idle;  // the flag that nothing reads then, a contradiction where it is typed; null: none
    };
    const Line lighthouse = {"--attention", "lighthouse", "--seq_len", "2048", "--lighthouse_topk", "128"};
    const Line dilated = {"--attention",           "lighthouse", "--seq_len",           "2048",
                          "--lighthouse_topk",     "128",        "--lighthouse_scorer", "dilated",
                          "--lighthouse_dilation", "2"};
    const std::vector<Case> cases = {
        {lighthouse, {"--attention", "dense"}, "--lighthouse_topk"},
        {dilated, {"--attention", "dense"}, "--lighthouse_dilation"},
        {dilated, {"--lighthouse_scorer", "norm"}, "--lighthouse_dilation"},
        {{"--val_fraction", "0.1"}, {"--val_data", "y"}, nullptr},
        {{"--eval_every", "10"}, {"--val_fraction", "0"}, "--eval_every"},
        {{"--val_fraction", "0"}, {}, "--eval_every"},
        {{"--sample_every", "10"}, {"--sample_tokens", "0"}, "--sample_every"},
        {{"--decay_steps", "100"}, {"--schedule", "constant"}, "--decay_steps"},
        {{"--final_learning_rate_fraction", "0.5"}, {"--schedule", "constant"}, "--final_learning_rate_fraction"},
        {{"--rope_scaling_factor", "8", "--rope_low_freq_factor", "2"},
         {"--rope_scaling_factor", "1"},
         "--rope_low_freq_factor"},
    };
    TemporaryFolder folder;
    const std::string saved = saved_settings_path(folder.path);
    const auto joined = [](Line line, const Line& more) {
        line.insert(line.end(), more.begin(), more.end());
        return line;
    };
    for (const Case& run : cases) {
        const Line start = joined({"--train_data", "x", "--output_dir", folder.path.c_str()}, run.start);
        EXPECT_EQ(refusal(start), "");
        folder.write("settings.toml", settings_toml(parse_line(start).config));
        const Line resume = joined({"--resume", "--output_dir", folder.path.c_str()}, run.resume);
        EXPECT_EQ(refusal(resume), "");
        const std::string toml = settings_toml(parse_line(resume).config);
        folder.write("settings.toml", toml);
        EXPECT_EQ(refusal({"--config", saved.c_str()}), "");
        EXPECT_EQ(settings_toml(parse_line({"--config", saved.c_str()}).config), toml);
        if (run.idle != nullptr) {
            expect_refused({"--config", saved.c_str(), run.idle, "2"}, run.idle);
        }
    }
}

TEST(Flags, SettingsAreListedOnceAndReadBackAsWritten) {
    RunConfig c;
    std::set<std::string> names;
    for (const Setting& s : list_settings(c)) {
        EXPECT_TRUE(names.insert(s.name).second) << s.name << " is listed twice";
        EXPECT_FALSE(s.help.empty()) << s.name;
        const std::string before = s.get();
        const std::vector<TomlEntry> entries = TomlReader(s.name + " = " + before, "text").read();
        s.set(entries.at(0).values);
        EXPECT_EQ(s.get(), before) << s.name;
    }
}

TEST(Flags, HelpFitsATerminalAndNamesEverySetting) {
    const std::string help = help_text("train_gpt");
    RunConfig c;
    for (const Setting& s : list_settings(c)) {
        EXPECT_NE(help.find("--" + s.name), std::string::npos) << s.name;
    }
    EXPECT_NE(help.find("6 N T"), std::string::npos) << "the formula of MFU";
    std::istringstream lines(help);
    for (std::string line; std::getline(lines, line);) {
        EXPECT_LE(line.size(), 120u) << line;
    }
    EXPECT_TRUE(parse_line({"--help"}).help);
}

TEST(Flags, NumbersAsTextReadBackExactly) {
    for (const double value : {0.1, 1e-8, 3e-3, 1.0 / 3.0, 10000.0, 500000.0, 1e300, 5e-324, 0.0, 123456789.5}) {
        double back;
        parse(Words{text(value)}, back);
        EXPECT_EQ(back, value) << text(value);
    }
    EXPECT_EQ(text(10000.0), "10000");
    EXPECT_EQ(text(0.003), "0.003");
}

TEST(Flags, ModelShapeComesFromTheCheckpoint) {
    ModelConfig stored = model_preset("tiny");
    stored.width = 192, stored.max_positions = 64;
    ParsedFlags parsed = parse_line({"--train_data", "x"});
    take_model_shape(parsed, stored, "hf");
    EXPECT_EQ(parsed.config.model.width, 192);
    EXPECT_EQ(parsed.config.model.max_positions, 256) << "raised to --seq_len";

    parsed = parse_line({"--train_data", "x", "--width", "192"});
    EXPECT_NO_THROW(take_model_shape(parsed, stored, "hf"));
    for (const std::vector<const char*>& contradiction :
         {std::vector<const char*>{"--width", "128"}, {"--model", "tiny"}, {"--norm_eps", "1e-6"}}) {
        parsed = parse_line(contradiction);
        try {
            take_model_shape(parsed, stored, "hf");
            FAIL() << "accepted " << contradiction[0];
        } catch (const Error& error) {
            EXPECT_NE(std::string(error.what()).find("contradicts the checkpoint hf"), std::string::npos)
                << error.what();
        }
    }
}

TEST(Flags, SavedSettingsThatSomeoneHasGivenAnotherShapeAreRefused) {
    const TemporaryFolder folder;
    RunConfig edited = parse_line({"--train_data", "x"}).config;
    edited.model.width = 256;
    folder.write("settings.toml", settings_toml(edited));
    ParsedFlags parsed = parse_line({"--resume", "--output_dir", folder.path.c_str()});
    try {
        take_model_shape(parsed, model_preset("tiny"), "step1");
        FAIL() << "accepted";
    } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find("settings.toml: says width = 256, and the run's checkpoint step1 has"),
                  std::string::npos)
            << error.what();
    }
}

TEST(Flags, PositionsOfACheckpointMayBeRotatedOtherwise) {
    ModelConfig stored = model_preset("tiny");
    stored.rope_theta = 5e5;
    ParsedFlags parsed = parse_line({"--train_data", "x"});
    EXPECT_EQ(take_model_shape(parsed, stored, "hf"), "");
    EXPECT_EQ(parsed.config.model.rope_theta, 5e5);

    const TemporaryFolder folder;
    const std::vector<const char*> line = {"--train_data",          "x", "--rope_theta", "1000000",
                                           "--rope_scaling_factor", "4"};
    folder.write("settings.toml", settings_toml(parse_line(line).config));
    for (const std::vector<const char*>& words :
         {line, std::vector<const char*>{"--resume", "--output_dir", folder.path.c_str()}}) {
        parsed = parse_line(words);  // typed, or saved by a run that has not written a checkpoint since
        EXPECT_EQ(take_model_shape(parsed, stored, "hf"), "--rope_theta 1000000 (500000), --rope_scaling_factor 4 (1)");
        EXPECT_EQ(parsed.config.model.rope_theta, 1e6);
        EXPECT_EQ(parsed.config.model.rope_scaling.factor, 4.0);
    }
    stored.max_positions = 64;
    for (const char* original : {"", "96"}) {
        std::vector<const char*> words = {"--train_data", "x", "--rope_scaling_factor", "4"};
        if (*original != 0) {
            words.insert(words.end(), {"--rope_original_max_positions", original});
        }
        parsed = parse_line(words);
        take_model_shape(parsed, stored, "hf");
        EXPECT_EQ(parsed.config.model.rope_scaling.original_max_positions, *original == 0 ? 64 : 96);
    }
    // A run that was trained without: its settings have the default.
    ParsedFlags saved = parse_line({"--train_data", "x"});
    folder.write("settings.toml", settings_toml(saved.config));
    parsed = parse_line({"--resume", "--output_dir", folder.path.c_str(), "--rope_scaling_factor", "4"});
    take_model_shape(parsed, stored, "hf");
    EXPECT_EQ(parsed.config.model.rope_scaling.original_max_positions, 64);
    // And one with: what it has stays.
    stored.rope_scaling.factor = 2.0, stored.rope_scaling.original_max_positions = 32;
    parsed = parse_line({"--train_data", "x", "--rope_scaling_factor", "4"});
    take_model_shape(parsed, stored, "hf");
    EXPECT_EQ(parsed.config.model.rope_scaling.original_max_positions, 32);
    // Without a factor the rest says nothing: neither is it told, nor kept for a later one.
    parsed = parse_line({"--train_data", "x", "--rope_scaling_factor", "1"});
    EXPECT_EQ(take_model_shape(parsed, stored, "hf"), "--rope_scaling_factor 1 (2)");
    EXPECT_EQ(parsed.config.model.rope_scaling.original_max_positions, RopeScaling().original_max_positions);
    stored.rope_scaling = RopeScaling();
    saved.config.model.rope_theta = stored.rope_theta;
    saved.config.model.rope_scaling.original_max_positions = 32;  // of a file that has it all the same
    folder.write("settings.toml", settings_toml(saved.config));
    parsed = parse_line({"--resume", "--output_dir", folder.path.c_str()});
    EXPECT_EQ(take_model_shape(parsed, stored, "hf"), "");

    const auto factors = [&](double factor) {
        stored.rope_scaling.factor = factor;
        parsed = parse_line({"--train_data", "x", "--init_from", "hf", "--rope_low_freq_factor", "2"});
        check_given_flags(parsed);
        return take_model_shape(parsed, stored, "hf");
    };
    EXPECT_EQ(factors(8.0), "--rope_low_freq_factor 2 (1)");
    EXPECT_THROW(factors(1.0), Error) << "nothing reads it";
}

TEST(Memory, OffloadIsOneOfFour) {
    EXPECT_EQ(parse_line({"--train_data", "x"}).config.offload, Offload::none);
    for (const auto& [word, offload] : choices(Offload())) {
        EXPECT_EQ(parse_line({"--offload", word}).config.offload, offload);
    }
    expect_refused({"--train_data", "x", "--offload", "weights"}, "--offload 'weights': must be none or activations");
    expect_refused({"--train_data", "x", "--gpu_memory", "-1"}, "--gpu_memory -1");
    expect_refused({"--train_data", "x", "--host_memory", "-1"}, "--host_memory -1");
}

TEST(Memory, RanksShardTheOptimizerRatherThanOffloadIt) {
    for (const auto& [word, offload] : choices(Offload())) {
        RunConfig c = parse_line({"--train_data", "x", "--offload", word}).config;
        c.data_parallel = 2;
        const bool refused = offload == Offload::optimizer || offload == Offload::all;
        try {
            validate(c);
            EXPECT_FALSE(refused) << word;
        } catch (const Error& error) {
            EXPECT_TRUE(refused) << error.what();
            EXPECT_EQ(std::string(error.what()).find(format_string("--offload %s: with 2 ranks", word)), 0u);
        }
    }
}

TEST(Memory, FitNeedsNoData) {
    EXPECT_EQ(refusal({"--fit"}), "");
    EXPECT_EQ(refusal({"--fit", "--max_steps", "0"}), "");
    expect_refused({"--fit", "--num_heads", "3", "--num_kv_heads", "2"}, "--num_kv_heads");
}

TEST(Memory, TheShortestLighthouseLengthIsTheShortest) {
    for (const int levels : {2, 3, 4}) {
        for (const int pool : {2, 4, 8}) {
            LighthouseConfig lighthouse;
            lighthouse.levels = levels, lighthouse.pool = pool, lighthouse.topk = 256;
            const int64_t T = shortest_lighthouse_length(lighthouse);
            const LighthouseGeometry g = make_lighthouse_geometry(T, lighthouse);
            EXPECT_THROW(make_lighthouse_geometry(T - g.tiles * g.window(levels - 1), lighthouse), Error);
        }
    }
    LighthouseConfig wrong;
    wrong.levels = 1000, wrong.pool = -7, wrong.topk = -5;
    EXPECT_GE(shortest_lighthouse_length(wrong), 1);
}

TEST(Mfu, FormulaByHand) {
    ModelConfig m;  // 4 layers, C 128, H 4, Hkv 2, D 32, F 384, V 258
    const double block = 128.0 * 256 + 128.0 * 128 + 3.0 * 128 * 384;
    EXPECT_EQ(matrix_elements(m), 4 * block + 258.0 * 128);
    const double T = 256;
    const SequenceFlops dense = sequence_flops(m, 256, AttentionMode::dense, LighthouseConfig());
    EXPECT_DOUBLE_EQ(dense.work, 6 * matrix_elements(m) * T + 4 * 3.5 * 2 * T * T * 32 * 4);
    EXPECT_EQ(dense.work, dense.dense_equivalent);
}

TEST(Mfu, LighthouseCountsTheGatheredRowsOfItsLayers) {
    const ModelConfig m = model_preset("lighthouse-530m");
    LighthouseConfig lighthouse;  // T=98304, L=3, p=4, k=1536: S=18432; layers 0, 1, 28, 29 dense
    const SequenceFlops flops = sequence_flops(m, 98304, AttentionMode::lighthouse, lighthouse);
    const double dense_layer = attention_flops(m, 98304), lighthouse_layer = attention_flops(m, 18432);
    EXPECT_DOUBLE_EQ(flops.dense_equivalent - flops.work, 26 * (dense_layer - lighthouse_layer));
}

TEST(Mfu, OnlyKnownGpus) {
    EXPECT_EQ(gpu_peak_tflops("NVIDIA H200"), 989.4);
    EXPECT_EQ(gpu_peak_tflops("NVIDIA H100 80GB HBM3"), 989.4);
    EXPECT_EQ(gpu_peak_tflops("NVIDIA H100 PCIe"), 756.0);
    EXPECT_EQ(gpu_peak_tflops("NVIDIA B200"), 2250.0);
    EXPECT_EQ(gpu_peak_tflops("NVIDIA A100-SXM4-80GB"), 312.0);
    EXPECT_EQ(gpu_peak_tflops("NVIDIA H100 80GB HBM3 MIG 1g.10gb"), 0.0);
    EXPECT_EQ(gpu_peak_tflops("NVIDIA GeForce RTX 4090 Laptop GPU"), 0.0);
    EXPECT_EQ(gpu_peak_tflops("Some GPU"), 0.0);
}
