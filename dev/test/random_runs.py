#!/usr/bin/env python3
"""Random models, batches and modes through the programs themselves: ./train_gpt against ./train_gpt_cpu.

Every run draws a model, a batch and how it is trained (attention, recompute, offload, several ranks on one GPU by the
host transport), all legal, and trains a few steps with each program: losses and gradient norms must agree. The GPU
trains twice, once plainly and once as drawn: with --deterministic and on one rank both must give the same numbers.
Needs a GPU; a run takes a second or two, --jobs side by side.

    make train_gpt train_gpt_cpu && dev/test/random_runs.py --runs 100
    dev/test/random_runs.py --seed 7 --runs 1 --verbose         one of them again
    dev/test/random_runs.py --planted                           the GPU gets another rope_theta: it must be noticed

Weights are drawn ten to twenty times as large as usual, so that attention is sharp and a token's place matters: at
init_std 0.02 twice the rope_theta moves no loss by more than 0.0003.
"""
import argparse
import concurrent.futures
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile

STEPS = 3
DENSE_LIMITS = (0.02, 0.1, 0.04)  # XX
LIGHTHOUSE_LIMITS = (0.05, 0.15, 0.1)
HERE = os.path.dirname(os.path.abspath(__file__))
SPAWN = os.path.join(HERE, "..", "..", "scripts", "spawn_ranks.sh")


def draw(seed):
    """Flags of both programs, those that the GPU gets when it trains as drawn, and on how many ranks."""
    r = random.Random(seed)
    head_dim = r.choice([8, 16, 24, 40, 64, 64, 72, 96, 128, 128, 160, 256])
    kv_heads, group = r.choice([1, 1, 2, 2, 3, 4]), r.choice([1, 1, 2, 3, 4, 8])
    if head_dim * kv_heads * group > 1024:
        group = 1
    flags = {
        "num_layers": r.randint(1, 4),
        "width": 8 * r.randint(2, 40),
        "num_heads": kv_heads * group,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn_width": 8 * r.randint(1, 60),
        "vocab_size": r.choice([258, 258, 259, 264, 300, 513, 1000]),
        "tied_embeddings": r.choice(["true", "false"]),
        "rope_theta": r.choice([10000, 500000]),
        "init_std": r.choice([0.2, 0.3, 0.4]),
        "classifier_chunk_rows": r.choice([0, 0, 1, 64, 1000]),
        "learning_rate": r.choice([1e-3, 3e-4]),
        "seed": r.randint(0, 99),
    }
    if r.random() < 0.2:
        flags.update(rope_scaling_factor=8, rope_original_max_positions=64)
    batch, accumulated = r.choice([1, 1, 2, 3]), r.choice([1, 1, 2])
    ranks, context = r.choice([(1, 1), (1, 1), (1, 1), (2, 1), (2, 2), (4, 2)])
    if r.random() < 0.4:
        levels, pool = r.choice([(2, 2), (2, 2), (2, 4), (2, 8), (3, 2), (3, 4), (4, 2)])
        tiles = r.choice([1, 2, 3]) if context == 1 else 2 * context
        top = pool ** (levels - 1)
        T = tiles * top * r.randint(128, 160 if top < 8 else 132)
        if T > 2600:
            tiles = 1 if context == 1 else tiles
            T = tiles * top * 128
        flags.update(attention="lighthouse", lighthouse_levels=levels, lighthouse_pool=pool,
                     lighthouse_topk=128 * tiles, lighthouse_scorer=r.choice(["norm", "norm", "dilated"]),
                     lighthouse_dense_layers=r.choice(["none", "0", "0,-1"][:flags["num_layers"]]),
                     lighthouse_steps=r.choice([-1, 2]))
        if context > 1:
            flags["lighthouse_scorer"] = "norm"  # the other runs on one rank
        if flags["lighthouse_scorer"] == "dilated":
            flags["lighthouse_dilation"] = r.choice([d for d in (1, 2, 4) if T % d == 0])
    else:
        T = r.choice([1, 2, 17, 63, 64, 65, 127, 128, 129, 200, 256, 333, 512, r.randint(1, 700)])
        if context > 1:
            T = max(1, T // (2 * context)) * 2 * context
    flags.update(seq_len=T, batch_size=batch, global_batch=batch * accumulated * ranks // context)
    mode = {"recompute": r.choice(["none", "all_but_attention", "block"]),
            "offload": r.choice(["none", "activations", "optimizer", "all"] if ranks == 1 else ["none", "activations"])}
    if context > 1:
        mode["context_exchange"] = r.choice(["ring", "gather", "auto"])
        mode["context_parallel"] = context
    return flags, mode, ranks


def command_line(program, flags):
    return [program] + [word for name, value in flags.items() for word in ("--" + name, str(value))]


def train(command, out):
    """The step lines of metrics.jsonl, or a text that says what went wrong."""
    try:
        done = subprocess.run(command + ["--output_dir", out, "--plain"], capture_output=True, text=True, timeout=300,
                              env={**os.environ, "OMP_NUM_THREADS": "2"})
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)[-600:]
    if done.returncode != 0:
        return f"status {done.returncode}: {(done.stderr.strip() or done.stdout.strip())[-600:]}"
    with open(os.path.join(out, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    steps = [line for line in lines if line.get("event") == "step"]
    if len(steps) != STEPS or any(step["loss"] is None or step["grad_norm"] is None for step in steps):
        return f"{len(steps)} steps instead of {STEPS}, or one that is not finite"
    return steps


def compare(found, expected, limits):
    """What differs by more than is allowed, and the largest differences: of the first loss and of later ones, in nats,
    and of a norm, relative."""
    wrong, largest = [], [0.0, 0.0, 0.0]
    for i, (a, b) in enumerate(zip(found, expected)):
        loss, norm = abs(a["loss"] - b["loss"]), abs(a["grad_norm"] - b["grad_norm"]) / b["grad_norm"]
        largest[i > 0] = max(largest[i > 0], loss)
        largest[2] = max(largest[2], norm)
        if not loss <= limits[i > 0]:
            wrong.append(f"step {i + 1}: loss {a['loss']:.6f} and {b['loss']:.6f}")
        if not norm <= limits[2]:
            wrong.append(f"step {i + 1}: norm {a['grad_norm']:.6f} and {b['grad_norm']:.6f}")
    return wrong, "first loss {:.2g}, later {:.2g}, norm {:.2g}".format(*largest)


def run(seed, o, corpus):
    flags, mode, ranks = draw(seed)
    common = {**flags, "train_data": corpus, "val_fraction": 0, "max_steps": STEPS, "warmup_steps": 0,
              "schedule": "constant", "sample_tokens": 0, "eval_every": 0, "eval_batches": 1}
    gpu = {**common, "deterministic": "true"}
    if o.planted:
        gpu["rope_theta"] *= 2
    drawn = command_line(o.gpu, {**gpu, **mode, **({"comm_transport": "host"} if ranks > 1 else {})})
    commands = {"cpu": command_line(o.cpu, common), "plain": command_line(o.gpu, gpu)}
    if not o.planted:
        commands["drawn"] = ([SPAWN, str(ranks)] if ranks > 1 else []) + drawn
    with tempfile.TemporaryDirectory() as folder:
        results = {name: train(command, os.path.join(folder, name)) for name, command in commands.items()}
    wrong = [f"{name}: {said}" for name, said in results.items() if isinstance(said, str)]
    said = ""
    if not wrong:
        limits = LIGHTHOUSE_LIMITS if flags.get("attention") == "lighthouse" else DENSE_LIMITS
        far, largest = compare(results["plain"], results["cpu"], limits)
        wrong += ["GPU and CPU, " + text for text in far]
        said = f"GPU and CPU apart: {largest}"
        if not o.planted:
            far, largest = compare(results["drawn"], results["plain"], (0.0, 0.0, 0.0) if ranks == 1 else limits)
            wrong += ["drawn and plain, " + text for text in far]
            said += f"; drawn and plain: {largest}"
    text = f"{'FAIL' if wrong else 'ok  '} seed {seed}: {ranks} ranks, {flags}, {mode}: {said}"
    if wrong or o.verbose:
        text += "".join(f"\n     {line}" for line in wrong)
        text += "".join(f"\n     {name}: {shlex.join(command)}" for name, command in commands.items())
    return not wrong, text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="./train_gpt", help="the trainer for GPUs")
    parser.add_argument("--cpu", default="./train_gpt_cpu", help="the trainer for CPUs")
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the others' follow")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="runs side by side")
    parser.add_argument("--planted", action="store_true", help="train with a planted error on the GPU")
    parser.add_argument("--verbose", action="store_true", help="print every run's commands")
    o = parser.parse_args()
    if o.runs < 1 or o.jobs < 1:
        parser.error("--runs and --jobs must be at least 1")
    o.gpu, o.cpu = os.path.abspath(o.gpu), os.path.abspath(o.cpu)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        corpus = os.path.join(folder, "corpus.txt")
        with open(corpus, "wb") as file:  # text, more or less: words of a small vocabulary
            r = random.Random(0)
            words = [bytes(r.randrange(97, 123) for _ in range(r.randint(1, 9))) for _ in range(300)]
            file.write(b" ".join(words[min(299, int(r.expovariate(0.02)))] for _ in range(60000)))
        with concurrent.futures.ThreadPoolExecutor(o.jobs) as pool:
            for ok, text in pool.map(lambda seed: run(seed, o, corpus), range(o.seed, o.seed + o.runs)):
                print(text, flush=True)
                failed += not ok
    print(f"{o.runs - failed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
