#!/usr/bin/env python3
"""Random models, batches and modes through the programs themselves: ./train_gpt against ./train_gpt_cpu.

Every run draws a model, a batch and how it is trained (attention, recompute, offload, several ranks on one GPU by the
host transport), all legal, and trains a few steps with each program: losses and gradient norms must agree. The GPU
trains twice, once plainly and once as drawn: with --deterministic and on one rank both must give the same numbers.
Needs a GPU; a run takes a second or two, --jobs side by side.

    make train_gpt train_gpt_cpu && dev/test/random_runs.py --runs 100
    dev/test/random_runs.py --seed 7 --runs 1 --verbose         one of them again
    dev/test/random_runs.py --planted                           the GPU gets twice the rope_theta: it must be noticed

The limits: bf16 activations are off by 2^-9 each, and a loss is a mean over tokens of what they do to it. Later steps
drift apart by what Adam makes of them, and under Lighthouse attention entries whose scores differ by less than rounding
are ranked either way. In 15 runs on an H200 first losses were off by at most 0.0038 nats (Lighthouse 0.0081), later
ones by 0.025 (0.013), norms by 0.5 % (0.8 %): at most half of a limit. Of the next 24 one, under Lighthouse attention at
8192 tokens, had later norms off by 6.6 % while its first was off by 0.7 % and all its modes on the GPU agreed within 1.2
%: a step of Adam at 1e-3 away from random weights, of which the loss falls from 6.5 to 5.3. So later norms have a limit
of their own. Twice the rope_theta went beyond one in all six dense runs of 63 tokens or more.
"""
import argparse
import concurrent.futures
import itertools
import json
import os
import random
import shlex
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "bench"))
from limited import run_limited  # noqa: E402

STEPS = 3
EQUAL = {"loss": (0, 0), "norm": (0, 0)}  # limits of runs that must give the same numbers
PLANTED_TOKENS = 63  # of the shortest sequence under dense attention in which a planted error should be seen
RUN_LIMIT = 300  # seconds
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
        "classifier_chunk_rows": r.choice([0, 0, 1, 64, 1000]),
        "learning_rate": r.choice([1e-3, 3e-4]),
        "seed": r.randint(0, 99),
    }
    # Scores of attention vary by a few nats, so that it is sharp: at init_std 0.02 it is nearly a mean, and nobody
    # notices what becomes of it.
    flags["init_std"] = round(r.choice([1.25, 1.5, 1.75]) / flags["width"] ** 0.5, 4)
    if r.random() < 0.2:
        flags.update(rope_scaling_factor=8, rope_original_max_positions=64)
    batch, accumulated = r.choice([1, 1, 2, 3]), r.choice([1, 1, 2])
    ranks, context = r.choice([(1, 1), (1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (3, 3), (4, 4)])
    if r.random() < 0.4:
        few = [(2, 2), (2, 2), (2, 4), (3, 2)]  # of more ranks each has its two tiles, and T is long enough
        levels, pool = r.choice(few if context > 2 else few + [(2, 8), (3, 4), (4, 2)])
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
    mode = {"recompute": r.choice(["none", "norms_and_gate", "all_but_attention", "block"]),
            "offload": r.choice(["none", "activations", "optimizer", "all"] if ranks == 1 else ["none", "activations"])}
    if context > 1:
        by_heads = ["heads"] if flags["num_kv_heads"] % context == 0 else []
        mode["context_exchange"] = r.choice(["ring", "gather", "auto"] + by_heads)
        mode["context_parallel"] = context
    return flags, mode, ranks


def command_line(program, flags):
    return [program] + [word for name, value in flags.items() for word in ("--" + name, str(value))]


def train(command, out):
    """The step lines of metrics.jsonl, or a text that says what went wrong."""
    try:
        status, stdout, stderr = run_limited(command + ["--output_dir", out, "--plain"], RUN_LIMIT,
                                             {**os.environ, "OMP_NUM_THREADS": "2"})
    except OSError as error:
        return str(error)[-600:]
    if status is None:
        return f"not over after {RUN_LIMIT} s"
    if status != 0:
        return f"status {status}: {(stderr.strip() or stdout.strip())[-600:]}"
    with open(os.path.join(out, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    steps = [line for line in lines if line.get("event") == "step"]
    if len(steps) != STEPS or any(step["loss"] is None or step["grad_norm"] is None for step in steps):
        return f"{len(steps)} steps instead of {STEPS}, or one that is not finite"
    return steps


def limits(flags):
    """How far losses may be apart, in nats, and norms, relative, of the first step and of later ones: what all tokens
    have in common, and what a mean over them makes smaller."""
    few = (flags["seq_len"] * flags["global_batch"]) ** -0.5
    scale = 3 if flags.get("attention") == "lighthouse" else 1
    return {"loss": (scale * (0.005 + 0.05 * few), scale * (0.03 + 0.3 * few)),
            "norm": (scale * (0.015 + 0.1 * few), scale * (0.04 + 0.2 * few))}


def compare(found, expected, allowed):
    """What differs by more than is allowed, and the largest differences, of the first step and of later ones."""
    wrong, largest = [], {"loss": [0.0, 0.0], "norm": [0.0, 0.0]}
    for i, (a, b) in enumerate(zip(found, expected)):
        later = i > 0
        for what, key, scale in (("loss", "loss", 1.0), ("norm", "grad_norm", b["grad_norm"])):
            difference = abs(a[key] - b[key]) / scale
            largest[what][later] = max(largest[what][later], difference)
            if not difference <= allowed[what][later]:
                wrong.append(f"step {i + 1}: {what} {a[key]:.6f} and {b[key]:.6f}")
    return wrong, "loss {:.2g}, later {:.2g}, norm {:.2g}, later {:.2g}".format(*largest["loss"], *largest["norm"])


def run(seed, o, corpus):
    """'ok', 'FAIL' or, of a planted error that may go unseen, 'pass', and a text that says more."""
    flags, mode, ranks = draw(seed)
    common = {**flags, "train_data": corpus, "val_fraction": 0, "max_steps": STEPS, "warmup_steps": 0,
              "schedule": "constant", "sample_tokens": 0, "eval_every": 0, "eval_batches": 1}
    gpu = {**common, "deterministic": "true"}
    cpu = {name: value for name, value in common.items() if name != "classifier_chunk_rows"}  # of the GPU alone
    commands = {"cpu": command_line(o.cpu, cpu)}
    if o.planted:
        commands["planted"] = command_line(o.gpu, {**gpu, "rope_theta": 2 * gpu["rope_theta"]})
    else:
        drawn = command_line(o.gpu, {**gpu, **mode, **({"comm_transport": "host"} if ranks > 1 else {})})
        commands["plain"] = command_line(o.gpu, gpu)
        commands["drawn"] = ([SPAWN, str(ranks)] if ranks > 1 else []) + drawn
    with tempfile.TemporaryDirectory() as folder:
        results = {name: train(command, os.path.join(folder, name)) for name, command in commands.items()}
    wrong = [f"{name}: {said}" for name, said in results.items() if isinstance(said, str)]
    said, status = "", "FAIL" if wrong else "ok"
    if not wrong and o.planted:
        wrong, said = compare(results["planted"], results["cpu"], limits(flags))
        said = f"{'seen' if wrong else 'not seen'}: {said}"
        status = "ok" if wrong else "pass"
    elif not wrong:
        wrong, said = compare(results["plain"], results["cpu"], limits(flags))
        apart, said_apart = compare(results["drawn"], results["plain"], EQUAL if ranks == 1 else limits(flags))
        said = f"GPU and CPU apart: {said}; drawn and plain: {said_apart}"
        wrong = ["GPU and CPU, " + text for text in wrong] + ["drawn and plain, " + text for text in apart]
        status = "FAIL" if wrong else "ok"
    reasons = "".join(f" {line};" for line in wrong) if status == "FAIL" else ""
    text = f"{status:4} seed {seed}:{reasons} {ranks} ranks, {flags}, {mode}: {said}"
    if status == "FAIL" or o.verbose:
        text += "".join(f"\n     {name}: {shlex.join(command)}" for name, command in commands.items())
    return status, text


def planted_seeds(first):
    """Those from `first` on whose runs should show a planted error."""
    for seed in itertools.count(first):
        flags, _, _ = draw(seed)
        if flags["seq_len"] >= PLANTED_TOKENS and "attention" not in flags:
            yield seed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="./train_gpt", help="the trainer for GPUs")
    parser.add_argument("--cpu", default="./train_gpt_cpu", help="the trainer for CPUs")
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the others' follow")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="runs side by side")
    parser.add_argument("--planted", action="store_true", help="plant an error on the GPU")
    parser.add_argument("--verbose", action="store_true", help="print every run's commands")
    o = parser.parse_args()
    if o.runs < 1 or o.jobs < 1:
        parser.error("--runs and --jobs must be at least 1")
    o.gpu, o.cpu = os.path.abspath(o.gpu), os.path.abspath(o.cpu)
    seeds = list(itertools.islice(planted_seeds(o.seed) if o.planted else itertools.count(o.seed), o.runs))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = os.path.join(folder, "corpus.txt")
        with open(corpus, "wb") as file:  # text, more or less: words of a small vocabulary
            r = random.Random(0)
            words = [bytes(r.randrange(97, 123) for _ in range(r.randint(1, 9))) for _ in range(300)]
            file.write(b" ".join(words[min(299, int(r.expovariate(0.02)))] for _ in range(60000)))
        with concurrent.futures.ThreadPoolExecutor(o.jobs) as pool:
            for status, text in pool.map(lambda seed: run(seed, o, corpus), seeds):
                print(text, flush=True)
                found.append(status)
    passed, failed = found.count("ok"), found.count("FAIL")
    if o.planted:
        few = 2 * passed < o.runs
        print(f"{'FAIL' if few else 'ok  '} the planted error was seen in {passed} of {o.runs} runs, at least half are asked")
        return failed > 0 or few
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
