#!/usr/bin/env python3
"""Checkpoints against the Python package transformers, in both directions: a folder that train_gpt_cpu wrote gives the same
logits there, and a folder that transformers wrote (sharded, bf16, fp16, tied or not) gives the same logits here.

    make train_gpt_cpu build/dump_logits && python3 dev/test/check_transformers.py

Exits 0 with a message when torch or transformers are not installed. Both sides compute in float32 from the same stored
weights. Limit: 1e-5, the largest error relative to the logits' root mean square; each side rounds some hundred operations
to 2^-24, in another order. A changed weight must be found out."""
import json
import os
import random
import subprocess
import sys
import tempfile

os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
try:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
except ImportError as error:
    print(f"skip check_transformers: {error}")
    sys.exit(0)
try:
    import sentencepiece
except ImportError:
    sentencepiece = None
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LIMIT = 1e-5
passed = failed = 0


def report(name, good, measured=""):
    global passed, failed
    passed, failed = passed + good, failed + (not good)
    print(f"{'ok  ' if good else 'FAIL'} {name:<64} {measured}")


def our_logits(folder, tokens):
    with tempfile.TemporaryDirectory() as work:
        with open(f"{work}/tokens.txt", "w") as file:
            file.write(" ".join(map(str, tokens)))
        subprocess.run(["build/dump_logits", folder, f"{work}/tokens.txt", f"{work}/logits.safetensors"], check=True)
        return load_file(f"{work}/logits.safetensors")["logits"]


def their_logits(folder, tokens):
    model = LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


def relative_error(ours, theirs):
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours - theirs).abs().max() / theirs.pow(2).mean().sqrt()).item()


def compare(name, folder, vocab_size):
    tokens = [random.randrange(vocab_size) for _ in range(48)]
    error = relative_error(our_logits(folder, tokens), their_logits(folder, tokens))
    report(name, error <= LIMIT, f"max_err/rms {error:.1e} limit {LIMIT:.0e}")  # NaN fails


def newest(folder):
    return max(entry.path for entry in os.scandir(folder) if entry.is_dir())


def written_here(work):
    with open(f"{work}/corpus.txt", "wb") as corpus:
        for name in ["train_gpt.cpp", "llmc/train_loop.h", "llmc/flags.h"]:
            corpus.write(open(name, "rb").read())
    small = "--num_layers 2 --width 64 --num_heads 4 --head_dim 32 --ffn_width 128 --seq_len 64 --batch_size 4 " \
            "--max_steps 8 --warmup_steps 0 --learning_rate 1e-2 --sample_tokens 0 --eval_batches 1"
    cases = {
        "tied, grouped queries": "--num_kv_heads 2",
        "untied, one kv head": "--num_kv_heads 1 --tied_embeddings false",
        "Llama-3 frequency scaling": "--num_kv_heads 4 --rope_theta 500000 --rope_scaling_factor 8 "
                                     "--rope_original_max_positions 16 --max_positions 64",
        "bf16, head_dim not width / heads": "--num_kv_heads 2 --head_dim 48 --save_dtype bf16",
    }
    for i, (name, flags) in enumerate(cases.items()):
        folder = f"{work}/here{i}"
        subprocess.run(["./train_gpt_cpu", "--train_data", f"{work}/corpus.txt", "--output_dir", folder, *small.split(),
                        *flags.split()], check=True, stdout=subprocess.DEVNULL)
        compare(f"written here: {name}", newest(folder), 258)
    stored = LlamaForCausalLM.from_pretrained(newest(f"{work}/here3"), torch_dtype="auto")
    report("written here: the type of the weights is known there", stored.dtype == torch.bfloat16)
    report("written here: special tokens are known there",
           (stored.generation_config.bos_token_id, stored.generation_config.eos_token_id) == (256, 257))
    tokenizer = AutoTokenizer.from_pretrained(newest(f"{work}/here3"))
    text = "".join(map(chr, range(256))) + " \u00e9\u4e2d\U0001f600<|end|> \n\n  x"
    tokens = tokenizer(text)["input_ids"]
    expected = [256] + [token for part in text.split("<|end|>") for token in [*part.encode(), 257]][:-1]
    report("written here: the tokenizer makes bytes", tokens == expected)
    report("written here: and bytes make the text", tokenizer.decode(tokens) == "<|begin|>" + text)
    if sentencepiece:
        piece_model = sentencepiece.SentencePieceProcessor(model_file=newest(f"{work}/here3") + "/tokenizer.model")
        tokens = piece_model.encode(text)
        report("written here: tokenizer.model makes bytes too", tokens == list(text.encode()))
        report("written here: and makes the text of them", piece_model.decode(tokens) == text)
        report("written here: and knows the markers", (piece_model.bos_id(), piece_model.eos_id()) == (256, 257))
    else:
        print("skip written here: tokenizer.model: sentencepiece is not installed")
    inputs = tokenizer("int main", return_tensors="pt")
    continued = stored.generate(**inputs, max_new_tokens=5, do_sample=False)
    report("written here: transformers samples from it",
           tokenizer.decode(continued[0], skip_special_tokens=True).startswith("int main"))


def written_by_transformers(work):
    base = dict(vocab_size=131, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=96, max_position_embeddings=128, rms_norm_eps=1e-5, initializer_range=0.1)
    llama3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position_embeddings=32)
    # transformers up to 4 has rope_theta and rope_scaling, from 5 on rope_parameters.
    is_new = int(transformers.__version__.split(".")[0]) >= 5
    scaled = dict(rope_parameters=dict(llama3, rope_theta=500000.0)) if is_new else \
        dict(rope_theta=500000.0, rope_scaling=llama3)
    cases = {
        "sharded, float32": (dict(tie_word_embeddings=False), torch.float32, "100KB"),
        "one file, bf16, tied": (dict(tie_word_embeddings=True), torch.bfloat16, "5GB"),
        "sharded, fp16": (dict(tie_word_embeddings=False), torch.float16, "50KB"),
        "Llama-3 frequency scaling": (scaled, torch.float32, "5GB"),
    }
    for i, (name, (extra, dtype, shard_size)) in enumerate(cases.items()):
        torch.manual_seed(i)
        folder = f"{work}/there{i}"
        LlamaForCausalLM(LlamaConfig(**base, **extra)).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
        compare(f"written by transformers: {name}", folder, 131)

    # The same model with the other layout of RoPE in its config.json.
    folder = f"{work}/there3"
    config = json.load(open(f"{folder}/config.json"))
    if is_new:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope
    else:
        config["rope_parameters"] = dict(config.pop("rope_scaling"), rope_theta=config.pop("rope_theta"))
    tokens = list(range(48))
    theirs = their_logits(folder, tokens)
    with open(f"{folder}/config.json", "w") as file:
        json.dump(config, file)
    error = relative_error(our_logits(folder, tokens), theirs)
    report("the same with RoPE in the other layout", error <= LIMIT, f"max_err/rms {error:.1e} limit {LIMIT:.0e}")

    # One weight of some 60000, off by a tenth.
    weights = load_file(f"{folder}/model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][3, 5] += 0.1
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    error = relative_error(our_logits(folder, tokens), theirs)
    report("a changed weight is found out", error > LIMIT, f"max_err/rms {error:.1e}")


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
random.seed(0)
with tempfile.TemporaryDirectory() as work:
    written_here(work)
    written_by_transformers(work)
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
