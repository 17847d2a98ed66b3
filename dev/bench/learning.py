#!/usr/bin/env python3
"""Does training under Lighthouse attention and then under dense attention learn as well as dense attention from the start?

Trains one small byte-level Llama at 32768 tokens of context on text found on this machine (headers and Python sources,
each once): dense from scratch, and Lighthouse switched to dense at three points of the run; equal tokens, data order, seed and
schedule. A few steps of each attention are timed first, and the number of steps is what fits the budget.
With --equal_seconds also, for each Lighthouse run, dense attention for as many seconds: fewer steps, a schedule of its own.
Writes learning.json, learning.md (loss, wall-clock, the jump at the switch and the recovery, and what later tokens do
to earlier losses at the last evaluation under Lighthouse attention: --print_influence) and learning.png.

    make train_gpt && python3 dev/bench/learning.py --budget 360 --out results
    python3 dev/bench/learning.py --gpus 2 --out results              a run on each of two GPUs at a time
    python3 dev/bench/learning.py --from_json results/learning.json --out results     table and plot of an earlier run
"""
import argparse
import concurrent.futures
import hashlib
import itertools
import json
import os
import queue
import random
import site
import subprocess
import sys
import tempfile

from built import require_built
from plotting import pyplot
from scratch import checkpoint_bytes, scratch_folder

MODEL = dict(num_layers=8, width=512, num_heads=8, num_kv_heads=8, head_dim=64, ffn_width=1408, vocab_size=258)
TRAINING = dict(learning_rate="1.5e-3", schedule="cosine", final_learning_rate_fraction="0.1", weight_decay="0.1",
                beta1="0.9", beta2="0.95", max_grad_norm="1.0")


# ---- corpus

FOLDERS = ["/usr/include", "/usr/local/include", "/usr/lib/gcc", "/usr/local/cuda/include", os.path.dirname(os.__file__),
           *site.getsitepackages()]
ENDINGS = (".h", ".hh", ".hpp", ".tcc", ".cuh", ".py")
LARGEST_SOURCE = 512 << 10  # larger ones are tables


def make_corpus(path, mib):
    """Headers and Python sources of this machine, each text once, shuffled as wholes: the validation split, the end of the
    file, is then of the same kind as the rest."""
    names = set()
    for folder in FOLDERS:
        for directory, _, files in os.walk(folder):
            names.update(os.path.realpath(os.path.join(directory, name)) for name in files if name.endswith(ENDINGS))
    names = sorted(names)
    random.Random(1).shuffle(names)
    size, seen = 0, set()
    with open(path, "wb") as out:
        for name in names:
            if size >= mib << 20:
                break
            try:
                with open(name, "rb") as file:
                    text = file.read(LARGEST_SOURCE + 1)
            except OSError:
                continue
            digest = hashlib.sha256(text).digest()
            if len(text) > LARGEST_SOURCE or digest in seen:
                continue
            seen.add(digest)
            out.write(text)
            size += len(text)
    if size < 4 << 20:
        raise SystemExit(f"{path}: only {size} bytes of text found here; give a file with --corpus")


# ---- runs

def trainer_flags(options, steps, corpus, folder, switch):
    flags = {**MODEL, **TRAINING, "seq_len": options.seq_len, "batch_size": options.batch_size,
             "global_batch": options.global_batch, "max_steps": steps, "warmup_steps": max(1, steps // 20),
             "train_data": corpus, "val_fraction": 0.05, "eval_every": max(1, steps // options.evaluations),
             "eval_batches": options.eval_batches, "sample_tokens": 0, "output_dir": folder, "seed": 1}
    if switch > 0:
        flags.update(attention="lighthouse", lighthouse_steps=switch, lighthouse_levels=3, lighthouse_pool=4,
                     lighthouse_topk=options.seq_len // 64, lighthouse_dense_layers=options.dense_layers,
                     print_influence="true")
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))] + ["--plain"]


def train(options, steps, corpus, scratch, name, switch, gpu=0):
    """Runs train_gpt on a GPU, Lighthouse until step `switch` (0: dense from the start), and returns its metrics."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        command = [options.train_gpt, *trainer_flags(options, steps, corpus, folder, switch), "--device", str(gpu)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.time_limit)
        if done.returncode != 0:
            raise RuntimeError(f"{name}: " +
                               (done.stderr.strip() or done.stdout.strip() or "failed").splitlines()[-1][:300])
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            lines = [json.loads(line) for line in file]
    steps_run = [line for line in lines if line["event"] == "step"]
    return {"switch": switch, "steps": [line["step"] for line in steps_run], "loss": [line["loss"] for line in steps_run],
            "elapsed_ms": [line["elapsed_ms"] for line in steps_run],
            "skipped": sum(line["event"] == "skip" for line in lines),
            "validation": [{key: line[key] for key in ("step", "loss", "dense_loss", "attention", "influence") if key in line}
                           for line in lines if line["event"] == "validation"]}


def train_side_by_side(options, corpus, scratch, runs):
    """Trains `runs`, (steps, switch) each, one at a time on each GPU; yields ((steps, switch), metrics or the error) as
    they end."""
    free_gpus = queue.SimpleQueue()
    for gpu in range(options.gpus):
        free_gpus.put(gpu)

    def train_on_free_gpu(steps, switch):
        gpu = free_gpus.get()
        try:
            return (steps, switch), train(options, steps, corpus, scratch, f"run_{steps}_{switch}", switch, gpu)
        except (RuntimeError, subprocess.TimeoutExpired, OSError) as error:
            return (steps, switch), error
        finally:
            free_gpus.put(gpu)

    with concurrent.futures.ThreadPoolExecutor(options.gpus) as pool:
        for ended in concurrent.futures.as_completed([pool.submit(train_on_free_gpu, *run) for run in runs]):
            yield ended.result()


# ---- what came out

def smooth(values, width):
    """Mean of the last `width` values, at every place."""
    return [sum(values[max(0, i + 1 - width):i + 1]) / (i + 1 - max(0, i + 1 - width)) for i in range(len(values))]


def seconds_of(run):
    return sum(run["elapsed_ms"]) / 1e3


def seconds_at(run):
    """Of training, after each step."""
    return [ms / 1e3 for ms in itertools.accumulate(run["elapsed_ms"])]


def summary(run, dense):
    """Final losses, seconds, the jump at the switch and when the loss is back where it was before, the last influence."""
    last = run["validation"][-1]
    row = {"validation": last["dense_loss"], "seconds": seconds_of(run),
           "train": smooth(run["loss"], 20)[-1], "against_dense": last["dense_loss"] - dense["validation"][-1]["dense_loss"]}
    switch = run["switch"]
    if 0 < switch < len(run["loss"]):
        before = smooth(run["loss"][:switch], 20)[-1]
        after = run["loss"][switch:]
        smoothed = smooth(run["loss"], 20)
        row["jump"] = max(after[:20]) - before
        row["recovered_after"] = next((i + 1 - switch for i in range(switch + 20, len(smoothed)) if smoothed[i] <= before),
                                      None)
    influences = [v["influence"] for v in run["validation"] if "influence" in v]
    if influences:
        row["influence"] = influences[-1]
    return row


def table(results):
    dense = results["runs"].get("dense")
    if dense is None:
        return "no dense run: nothing to compare with"
    header = ["run", "validation loss (dense attention)", "against dense", "training loss", "wall-clock s",
              "jump at the switch", "steps to recover", "dense for as long", "later tokens change, help", "next token replaced"]
    equal_seconds = results.get("equal_seconds", {})
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, run in results["runs"].items():
        row = summary(run, dense)
        as_long = equal_seconds.get(name)
        influence = row.get("influence")
        next_token = influence.get("next_token") if influence else None
        lines.append("| " + " | ".join([
            name, f"{row['validation']:.4f}", f"{row['against_dense']:+.4f}", f"{row['train']:.4f}",
            f"{row['seconds']:.1f}", f"{row['jump']:+.3f}" if "jump" in row else "-",
            str(row.get("recovered_after") or "not yet") if "jump" in row else "-",
            f"{as_long['validation'][-1]['dense_loss']:.4f} ({as_long['steps'][-1]} steps)" if as_long else "-",
            f"{influence['mean_change']:.3f}, {influence['mean_benefit']:+.4f}" if influence else "-",
            f"{next_token['rise']:+.3f} (+- {next_token['standard_error']:.3f})" if next_token else "-"]) + " |")
    settings = results["settings"]
    note = (f"{settings['steps']} steps of {settings['tokens_per_step']} tokens at T={settings['seq_len']}, "
            f"{settings['corpus_bytes']} bytes of text; losses in nats a byte. Recovered: the mean training loss of 20 steps "
            "is again what it was before the switch. Later tokens: mean change of the losses before them in their tile when "
            "they are replaced, and how much the true ones help. Next token replaced: how much its loss rises when it is "
            "another one as an input.")
    return "\n".join(lines) + "\n\n" + note


def plot(results, path):
    plt = pyplot("no matplotlib here: --from_json makes the plot on a machine that has it")
    if plt is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), sharey=True)
    for name, run in results["runs"].items():
        line, = axes[0].plot(run["steps"], smooth(run["loss"], 5), lw=1, label=name)
        axes[1].plot(seconds_at(run), smooth(run["loss"], 5), lw=1, color=line.get_color(), label=name)
        as_long = results.get("equal_seconds", {}).get(name)
        if as_long:
            axes[1].plot(seconds_at(as_long), smooth(as_long["loss"], 5), lw=1, ls="--", color=line.get_color())
        points = [v for v in run["validation"]]
        axes[0].plot([v["step"] for v in points], [v["dense_loss"] for v in points], "o", ms=3, color=line.get_color())
        if run["switch"]:
            axes[0].axvline(run["switch"], color=line.get_color(), ls=":", lw=0.8)
    losses = sorted(loss for run in results["runs"].values() for loss in run["loss"])
    axes[0].set_ylim(losses[0] - 0.05, losses[int(0.93 * len(losses))] + 0.3)
    axes[0].set_xlabel("step (dots: validation loss under dense attention)")
    axes[1].set_xlabel("seconds of training" +
                       (" (dashed: dense for as long)" if results.get("equal_seconds") else ""))
    axes[0].set_ylabel("training loss, nats a byte")
    for axis in axes:
        axis.grid(True, alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_gpt", default="./train_gpt", help="the trainer's binary")
    parser.add_argument("--budget", type=float, default=360, help="seconds of training in all, about")
    parser.add_argument("--steps", type=int, help="of each run, instead of what fits the budget")
    parser.add_argument("--switches", default="0.5,0.7,0.85", help="where Lighthouse ends, as parts of the run")
    parser.add_argument("--seq_len", type=int, default=32768)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--global_batch", type=int, default=2)
    parser.add_argument("--dense_layers", default="0,-1", help="of the 8 layers, dense throughout")
    parser.add_argument("--evaluations", type=int, default=12, help="validation losses of a run")
    parser.add_argument("--eval_batches", type=int, default=16)
    parser.add_argument("--corpus", help="a text file, instead of what is found on this machine")
    parser.add_argument("--corpus_mib", type=int, default=96)
    parser.add_argument("--equal_seconds", action="store_true", help="also dense runs as long as each Lighthouse run")
    parser.add_argument("--gpus", type=int, default=1, help="runs side by side, each on a GPU of its own")
    parser.add_argument("--time_limit", type=float, default=900, help="seconds one run may take")
    parser.add_argument("--out", default=".", help="folder for learning.json, learning.md and learning.png")
    parser.add_argument("--from_json", help="an earlier run's learning.json: table and plot of it, nothing is trained")
    options = parser.parse_args()
    switches = [float(word) for word in options.switches.split(",") if word]
    if not options.from_json:
        require_built(parser, "--train_gpt", options.train_gpt)
    os.makedirs(options.out, exist_ok=True)
    path = lambda extension: os.path.join(options.out, "learning." + extension)

    failed = False
    if options.from_json:
        with open(options.from_json) as file:
            results = json.load(file)
    else:
        num_bytes = (options.corpus_mib << 20) + options.gpus * checkpoint_bytes(MODEL, MODEL["vocab_size"])
        with scratch_folder(num_bytes) as scratch:
            corpus = options.corpus or os.path.join(scratch, "corpus.txt")
            if not options.corpus:
                make_corpus(corpus, options.corpus_mib)
            steps = options.steps
            if steps is None:
                pace = {}
                for name, switch in (("dense", 0), ("lighthouse", 8)):
                    times = train(options, 8, corpus, scratch, "pace_" + name, switch)["elapsed_ms"][3:]
                    pace[name] = sorted(times)[len(times) // 2] / 1e3
                    print(f"{name}: {pace[name]:.3f} s a step", flush=True)
                dense_parts = 1.0 + sum(1.0 - part for part in switches)
                # A fifth of the budget is for starts, evaluations and checkpoints.
                steps = max(20, int(0.8 * options.budget / (dense_parts * pace["dense"] + sum(switches) * pace["lighthouse"])))
            all_switches = [round(part * steps) for part in [0.0] + switches]
            if len(set(all_switches)) < len(all_switches):
                parser.error(f"--switches {options.switches}: of {steps} steps these are one run twice, or dense: "
                             f"Lighthouse to step {', '.join(map(str, all_switches[1:]))}")
            results = {"settings": {"steps": steps, "tokens_per_step": options.global_batch * options.seq_len,
                                    "seq_len": options.seq_len, "corpus_bytes": os.path.getsize(corpus),
                                    "model": MODEL, "training": TRAINING, "dense_layers": options.dense_layers}, "runs": {}}
            names = {switch: f"Lighthouse to step {switch}, then dense" if switch else "dense" for switch in all_switches}
            finished = {}

            def train_and_report(runs, name_of):
                """Trains them and prints a line for each; yields those that did not fail."""
                nonlocal failed
                for key, run in train_side_by_side(options, corpus, scratch, runs):
                    if isinstance(run, Exception):
                        failed = True
                        print(f"FAILED {name_of(*key)}: {run}", flush=True)
                        continue
                    print(f"{name_of(*key)}: validation loss {run['validation'][-1]['dense_loss']:.4f}, "
                          f"{seconds_of(run):.1f} s", flush=True)
                    yield key, run

            def save():
                with open(path("json"), "w") as file:
                    json.dump(results, file)

            for (_, switch), run in train_and_report([(steps, switch) for switch in all_switches], lambda _, s: names[s]):
                finished[switch] = run
                results["runs"] = {names[done]: finished[done] for done in all_switches if done in finished}
                save()
            if options.equal_seconds and 0 in finished:
                step_seconds = seconds_of(finished[0]) / steps
                as_long = {names[switch]: max(1, round(seconds_of(run) / step_seconds))
                           for switch, run in finished.items() if switch}
                # A dense run of as many steps as the others have is there already.
                results["equal_seconds"] = {name: finished[0] for name, n in as_long.items() if n == steps}
                save()
                dense_runs = [(n, 0) for n in sorted(set(as_long.values()) - {steps})]
                for (some_steps, _), run in train_and_report(dense_runs, lambda n, _: f"dense, {n} steps"):
                    results["equal_seconds"].update({name: run for name, n in as_long.items() if n == some_steps})
                    save()
    text = table(results)
    with open(path("md"), "w") as file:
        file.write(text + "\n")
    print("\n" + text)
    plot(results, path("png"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
