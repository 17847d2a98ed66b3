#!/usr/bin/env python3
"""Full optimizer steps: train_gpt and its PyTorch peer (pytorch_llama.py), one after the other on this machine's GPU.

Prints a table of tokens/s, their ratio and peak memory, and saves it as step.json and step.png. The tokens are random:
a shard in llm.c's format is written first, so both programs see data of the same kind (never zeros).

    make train_gpt && python3 dev/bench/step.py                 every row
    python3 dev/bench/step.py --rows 124m_1k,530m_8k_v256       some rows
    python3 dev/bench/step.py --list                            what there is
    python3 dev/bench/step.py --from_json a/step.json b/step.json       table and plot of earlier runs; needs no GPU

    python3 dev/bench/step.py --lighthouse_peer 'python3 other.py'      another implementation of Lighthouse attention

--lighthouse_peer names a third program, for the rows under Lighthouse attention. It is given what pytorch_llama.py is
given (--num_layers ... --vocab_size, --steps, --warmup_steps), the row's --lighthouse_levels, --lighthouse_pool,
--lighthouse_topk and --lighthouse_dense_layers, and --recompute block where the trainer recomputes more than norms and
gate; flags in COMMAND come before these. Its last line of output must be JSON with at least tokens_per_second, ms and
peak_gib; a field "recompute" is shown. PyTorch's own column stays dense.

Twenty steps of short sequences are timed, after ten: for about a second a GPU at its power limit runs at a lower clock
than then for good. From 65536 tokens on it is five after three, from 262144, where a step takes seconds to minutes, two
after one. --steps says otherwise of those that are timed. What has been measured when --time_limit ends a run counts,
with a word about it.

GiB of train_gpt are what it planned and took before the first step, without kernels and CUDA's context (about half a
GiB); of PyTorch the largest sum of its tensors, without these, and without what its allocator holds beyond them.

--from_json merges: of a row that several files have, each program's result is that of the last file which timed it.
"""
import argparse
import json
import os
import random
import shlex
import statistics
import struct
import sys
import tempfile

from built import require_built
from limited import run_limited
from plotting import pyplot
from scratch import checkpoint_bytes, scratch_folder

LLAMA_530M = dict(num_layers=30, width=1024, num_heads=8, num_kv_heads=8, head_dim=128, ffn_width=1536,
                  tied_embeddings="false")
LLAMA_124M = dict(num_layers=12, width=768, num_heads=12, num_kv_heads=12, head_dim=64, ffn_width=2048,
                  tied_embeddings="true")
LIGHTHOUSE = ["--attention", "lighthouse", "--lighthouse_pool", "4", "--lighthouse_dense_layers", "0,1,-2,-1"]
LIGHTHOUSE_98K = LIGHTHOUSE + ["--lighthouse_levels", "3", "--lighthouse_topk", "1536"]
LIGHTHOUSE_LONG = LIGHTHOUSE + ["--lighthouse_levels", "4", "--lighthouse_topk", "4096"]
ALL_BUT_ATTENTION = ["--recompute", "all_but_attention"]

# name: model, T, B, V, further flags of train_gpt, whether the peer (always dense) can run it.
ROWS = {
    "124m_1k": (LLAMA_124M, 1024, 64, 50304, [], True),
    "530m_8k_v256": (LLAMA_530M, 8192, 4, 256, [], True),
    "530m_8k_v128k": (LLAMA_530M, 8192, 4, 128256, [], True),
    "530m_98k_dense": (LLAMA_530M, 98304, 1, 256, [], True),
    "530m_98k_lighthouse": (LLAMA_530M, 98304, 1, 256, LIGHTHOUSE_98K, True),
    "530m_98k_lighthouse_v128k": (LLAMA_530M, 98304, 1, 128256,
                                  LIGHTHOUSE_98K + ["--recompute", "norms_and_gate"], False),
    "530m_256k_dense": (LLAMA_530M, 262144, 1, 256, ALL_BUT_ATTENTION, False),
    "530m_256k_lighthouse": (LLAMA_530M, 262144, 1, 256, LIGHTHOUSE_LONG + ALL_BUT_ATTENTION, False),
    "530m_512k_lighthouse": (LLAMA_530M, 524288, 1, 256, LIGHTHOUSE_LONG + ALL_BUT_ATTENTION, False),
    # 62 GiB of the GPU and 56 of the host; without offload 118 of the GPU.
    "530m_1m_lighthouse": (LLAMA_530M, 1048576, 1, 128256,
                           LIGHTHOUSE_LONG + ALL_BUT_ATTENTION + ["--offload", "activations"], False),
    # 70 GiB of the GPU and 112 of the host.
    "530m_2m_lighthouse": (LLAMA_530M, 2097152, 1, 128256,
                           LIGHTHOUSE_LONG + ["--recompute", "block", "--offload", "activations"], False),
}
# A step of two million tokens takes minutes, so it is asked for by name.
DEFAULT_ROWS = [name for name in ROWS if name != "530m_2m_lighthouse"]
SHORT, LONG = 65536, 262144  # tokens of a sequence below which steps are many, from which they are few


def steps_to_time(asked, T):
    return asked or (20 if T < SHORT else 5 if T < LONG else 2)


def steps_to_warm_up(T):
    return 10 if T < SHORT else 3 if T < LONG else 1


def write_random_shard(path, num_tokens, vocab_size):
    """llm.c token shard: 256 int32 of header, then uint16 (version 1) or uint32 (version 7) tokens."""
    wide = vocab_size > 65536
    magic, version = (20240801, 7) if wide else (20240520, 1)
    generator = random.Random(1)
    with open(path, "wb") as file:
        file.write(struct.pack("<256i", magic, version, num_tokens, *[0] * 253))
        # Token = high bits of a random word times V: no bias worth the name, and fast enough without numpy.
        for begin in range(0, num_tokens, 65536):
            count = min(65536, num_tokens - begin)
            words = struct.unpack(f"<{count}I", generator.getrandbits(32 * count).to_bytes(4 * count, "little"))
            file.write(struct.pack(f"<{count}{'I' if wide else 'H'}", *[word * vocab_size >> 32 for word in words]))


def model_flags(model, T, B, V):
    flags = []
    for name, value in {**model, "seq_len": T, "batch_size": B, "vocab_size": V}.items():
        flags += [f"--{name}", str(value)]
    return flags


def run_trainer(launch, model, T, B, V, extra, steps, limit, data_parallel=1, env=None):
    """launch: the trainer, or what starts its ranks, as a list; data_parallel: sequences that they train on side by
    side, for each of B; env: of its processes."""
    warm_up = steps_to_warm_up(T)
    tokens = T * B * data_parallel
    shard_tokens = max(4 * tokens, 2 * tokens + 4096) + 1
    # Not in memory where the run wants the host's memory for itself.
    with (tempfile.TemporaryDirectory() if "--offload" in extra else
          scratch_folder(checkpoint_bytes(model, V) + 4 * shard_tokens)) as folder:
        shard = os.path.join(folder, "random.bin")
        write_random_shard(shard, shard_tokens, V)
        out = os.path.join(folder, "run")
        command = [*launch, *model_flags(model, T, B, V), "--train_data", shard, "--data_format", "shards",
                   "--val_fraction", "0", "--eval_every", "0", "--sample_tokens", "0", "--max_steps",
                   str(warm_up + steps), "--warmup_steps", "0", "--learning_rate", "1e-4", "--output_dir", out,
                   "--plain", *extra]
        note = ""
        status, stdout, stderr = run_limited(command, limit, env)
        if status is None:
            note = f"ended after {limit:.0f} s"
        timed = timed_steps(os.path.join(out, "metrics.jsonl"), warm_up)
        if status:
            error = error_line(stderr.strip() or stdout.strip())
            if len(timed) < steps:
                return {"error": error}
            note = f"failed after the last step: {error}"  # in its checkpoint, which is not timed
    if not timed:
        return {"error": f"{note}, before a step could be timed"}
    ms = statistics.median(line["elapsed_ms"] for line in timed)
    return {"tokens_per_second": 1e3 * tokens / ms, "ms": ms, "peak_gib": max(line["memory_gib"] for line in timed),
            "mfu": statistics.median(line.get("mfu") or 0.0 for line in timed), "last_loss": timed[-1]["loss"],
            "steps": len(timed), "note": note, "output": stdout}


def error_line(output):
    """The line that says what went wrong: the first that calls itself an error, of several ranks' words about it; else
    the last."""
    lines = output.splitlines() or ["?"]
    return next((line for line in lines if "error" in line.lower()), lines[-1])[:300]


def timed_steps(path, warm_up):
    """The steps of metrics.jsonl after the first warm_up; its last line may be cut off."""
    steps = []
    if os.path.exists(path):
        with open(path) as file:
            for line in file:
                if line.endswith("\n"):
                    steps.append(json.loads(line))
    return [line for line in steps if line["event"] == "step"][warm_up:]


def run_peer(command, model, T, B, V, steps, limit):
    """command: a program that takes pytorch_llama.py's flags and prints its JSON line, as a list."""
    try:
        status, stdout, stderr = run_limited(
            [*command, *model_flags(model, T, B, V), "--steps", str(steps), "--warmup_steps",
             str(steps_to_warm_up(T))], limit)
    except OSError as error:
        return {"error": str(error)}
    if status is None:
        return {"error": f"over {limit:.0f} s"}
    if status != 0:
        error = stderr.strip().splitlines()
        return {"error": "out of memory" if "OutOfMemoryError" in stderr else error[-1][:200] if error else "?"}
    lines = stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1])
        return {**result, **{key: float(result[key]) for key in ("tokens_per_second", "ms", "peak_gib")}}
    except (IndexError, KeyError, TypeError, ValueError):
        return {"error": f"its last line is not the JSON asked for: {lines[-1][:100] if lines else 'no output'}"}


def run_pytorch(model, T, B, V, steps, limit):
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pytorch_llama.py")
    return run_peer([sys.executable, script], model, T, B, V, steps, limit)


def run_lighthouse_peer(command, model, T, B, V, extra, steps, limit):
    """extra: the trainer's further flags; the peer gets those of the attention, and the one recompute it has."""
    flags = [word for name, value in zip(extra[::2], extra[1::2]) if name.startswith("--lighthouse_")
             for word in (name, value)]
    if "--recompute" in extra and "norms_and_gate" not in extra:
        flags += ["--recompute", "block"]
    return run_peer([*command, *flags], model, T, B, V, steps, limit)


def plot(results, path):
    plt = pyplot("no matplotlib: no plot")
    if plt is None:
        return
    programs = [("train_gpt", "tab:blue"), ("pytorch", "tab:orange")]
    if any("lighthouse_peer" in row for row in results.values()):
        programs.append(("lighthouse_peer", "tab:green"))
    width = 0.8 / len(programs)
    names = [name for name in results if "ms" in results[name]["train_gpt"]]
    figure, axes = plt.subplots(1, 2, figsize=(13, 0.3 * len(programs) * len(names) + 2), sharey=True)
    for axis, key, label in ((axes[0], "tokens_per_second", "tokens/s"),
                             (axes[1], "peak_gib", "GiB (train_gpt: planned, PyTorch: most in tensors)")):
        for index, (program, color) in enumerate(programs):
            offset = 0.4 - width * (index + 0.5)  # from above
            values = [(results[name].get(program) or {}).get(key, 0.0) for name in names]
            bars = axis.barh([i + offset for i in range(len(names))], values, 0.95 * width, color=color,
                             label=program)
            axis.bar_label(bars, [f"{value:,.0f}" if value else "-" for value in values], padding=2)
        axis.set_xlabel(label)
        axis.margins(x=0.15)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def cell(result, key, form):
    return form.format(result[key]) if result and key in result else "-"


def ratio(ours, peer):
    both = ours and peer and "ms" in ours and "ms" in peer
    return f"{ours['tokens_per_second'] / peer['tokens_per_second']:.2f}" if both else "-"


def print_header(with_lighthouse_peer):
    print(f"{'row':28} {'train_gpt tok/s':>16} {'PyTorch tok/s':>14} {'ratio':>6} {'ms':>9} {'MFU %':>6} {'GiB':>7} "
          f"{'PyTorch GiB':>11}" + (f" {'Lighthouse peer tok/s':>22} {'ratio':>6} {'peer GiB':>9}"
                                  if with_lighthouse_peer else ""))


def print_row(name, row, with_lighthouse_peer):
    ours, peer, lighthouse_peer = row["train_gpt"], row["pytorch"], row.get("lighthouse_peer")
    mfu = f"{100 * ours['mfu']:.1f}" if ours.get("mfu") else "-"
    line = (f"{name:28} {cell(ours, 'tokens_per_second', '{:16.0f}'):>16} "
            f"{cell(peer, 'tokens_per_second', '{:14.0f}'):>14} {ratio(ours, peer):>6} "
            f"{cell(ours, 'ms', '{:9.1f}'):>9} {mfu:>6} "
            f"{cell(ours, 'peak_gib', '{:7.2f}'):>7} {cell(peer, 'peak_gib', '{:11.2f}'):>11}")
    if with_lighthouse_peer:
        line += (f" {cell(lighthouse_peer, 'tokens_per_second', '{:22.0f}'):>22} "
                 f"{ratio(ours, lighthouse_peer):>6} {cell(lighthouse_peer, 'peak_gib', '{:9.2f}'):>9}")
    print(line, flush=True)
    for program, result in row.items():
        if result and "error" in result:
            print(f"    {program}: {result['error']}", flush=True)
        elif result and result.get("note"):
            print(f"    {program}: {result['note']}, {result['steps']} steps timed", flush=True)
        elif result and result.get("recompute", "none") != "none":
            print(f"    {program}: recompute {result['recompute']}", flush=True)


def merged(paths):
    """The rows of several step.json, in the order of ROWS; an error never replaces a time."""
    results = {}
    for path in paths:
        with open(path) as file:
            for name, row in json.load(file).items():
                known = results.setdefault(name, {"train_gpt": {}, "pytorch": None})
                known.update((program, result) for program, result in row.items()
                             if result and ("ms" in result or not known.get(program)))
    order = [*ROWS, *results]
    return {name: results[name] for name in sorted(results, key=order.index)}


def show_saved(options):
    """The table and the plot of --from_json."""
    results = merged(options.from_json)
    if options.rows:
        results = {name: results[name] for name in options.rows.split(",") if name in results}
    with_lighthouse_peer = any(row.get("lighthouse_peer") for row in results.values())
    print_header(with_lighthouse_peer)
    for name, row in results.items():
        print_row(name, row, with_lighthouse_peer)
    plot(results, os.path.join(options.out, "step.png"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="names with commas between them [all but 530m_2m_lighthouse]")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--train_gpt", default="./train_gpt", help="the trainer's binary")
    parser.add_argument("--steps", type=int,
                        help="timed steps; the median counts [20, from 65536 tokens on 5, from 262144 on 2]")
    parser.add_argument("--time_limit", type=float, default=600, help="seconds a program may take [600]")
    parser.add_argument("--only", choices=("all", "train_gpt", "pytorch", "lighthouse_peer"), default="all")
    parser.add_argument("--lighthouse_peer", type=shlex.split, metavar="COMMAND",
                        help="another trainer with Lighthouse attention, for the rows under it; see above")
    parser.add_argument("--out", default=".", help="folder for step.json and step.png")
    parser.add_argument("--from_json", nargs="+", metavar="FILE",
                        help="step.json of earlier runs: table and plot of all of them, nothing is run")
    options = parser.parse_args()
    if options.list:
        for name, (_, T, B, V, extra, peer) in ROWS.items():
            print(f"{name}: T {T}, B {B}, V {V} {' '.join(extra)}{'' if peer else ' (no peer)'}")
        return 0
    names = options.rows.split(",") if options.rows else DEFAULT_ROWS
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}; --list shows them")
    if options.only == "lighthouse_peer" and not options.lighthouse_peer:
        parser.error("--only lighthouse_peer: needs --lighthouse_peer")
    if options.only in ("all", "train_gpt") and not options.from_json:
        require_built(parser, "--train_gpt", options.train_gpt)
    os.makedirs(options.out, exist_ok=True)

    if options.from_json:
        show_saved(options)
        return 0

    results, failed = {}, False
    wanted = lambda program: options.only in ("all", program)
    print_header(options.lighthouse_peer)
    for name in names:
        model, T, B, V, extra, has_peer = ROWS[name]
        row = results[name] = {"train_gpt": {}, "pytorch": None}
        steps = steps_to_time(options.steps, T)
        if wanted("train_gpt"):
            row["train_gpt"] = run_trainer([options.train_gpt], model, T, B, V, extra, steps, options.time_limit)
            row["train_gpt"].pop("output", None)
        if wanted("pytorch") and has_peer:
            row["pytorch"] = run_pytorch(model, T, B, V, steps, options.time_limit)
        if wanted("lighthouse_peer") and options.lighthouse_peer and "lighthouse" in extra:
            row["lighthouse_peer"] = run_lighthouse_peer(options.lighthouse_peer, model, T, B, V, extra, steps,
                                                         options.time_limit)
        print_row(name, row, options.lighthouse_peer)
        failed = failed or "error" in row["train_gpt"]
        with open(os.path.join(options.out, "step.json"), "w") as file:
            json.dump(results, file, indent=1)
    plot(results, os.path.join(options.out, "step.png"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
