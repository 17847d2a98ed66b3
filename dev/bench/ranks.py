#!/usr/bin/env python3
"""Several GPUs of this machine against one: full optimizer steps of train_gpt, without MPI (scripts/spawn_ranks.sh).

For every sequence length and attention, first each GPU alone, side by side, then each mesh:
    data N            N ranks with a sequence each; ideal: N times the tokens/s of one GPU
    context N ring    N ranks share one sequence, keys travel while attention computes
    context N gather  the same, all keys first
    context N heads   the same, each rank attends with all rows of some heads
With ":nccl" (data:nccl, context:ring:nccl) all transfers go by NCCL, none by the GPUs' copy engines.
"one GPU" is their mean, and efficiency a mesh's tokens/s over the sum of all GPUs alone on the same sequence length:
GPUs of one host differ by some per cent, and the slowest decides. What --profile says of the transfers is
kept: the share that is hidden behind attention goes into the table, the rest, with its time axes, into ranks.json.
Prints the table, and saves it after every row as ranks.json, at the end as ranks.png. A row that takes too long is
ended with what it has timed; --keep goes on where an earlier call with the same --out stopped. Of a row that several
files of --from_json have, the last counts.

    python3 dev/bench/ranks.py --ranks 2                                   every row
    python3 dev/bench/ranks.py --ranks 2 --seq_lens 98304 --attention lighthouse --meshes data,context:ring:nccl
    python3 dev/bench/ranks.py --ranks 4 --meshes context:ring,data --keep --out bench
    python3 dev/bench/ranks.py --from_json a/ranks.json b/ranks.json       table and plot of earlier runs; needs no GPU
"""
import argparse
import concurrent.futures
import datetime
import json
import os
import re
import statistics
import subprocess
import sys

from built import require_built
from plotting import pyplot
from step import ALL_BUT_ATTENTION, LIGHTHOUSE_98K, LIGHTHOUSE_LONG, LLAMA_530M, LONG, cell, run_trainer, steps_to_time

SPAWN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts", "spawn_ranks.sh")
MESHES = ("data", "context:ring", "context:gather", "context:heads")
BY_NCCL = ":nccl"
ALL_MESHES = MESHES + tuple(mesh + BY_NCCL for mesh in MESHES)
VOCABULARY = 256


def attention_flags(attention, T, ranks):
    """What a GPU of 80 GB trains up to 524288 tokens of the 530M model with, the same alone and among others."""
    if attention == "dense":
        return ALL_BUT_ATTENTION
    if T >= LONG:
        return LIGHTHOUSE_LONG + ALL_BUT_ATTENTION
    # 12 tiles fill the four chunks of two ranks, 16 those of up to eight.
    return LIGHTHOUSE_98K + (["--lighthouse_topk", "2048"] if ranks > 2 else [])


def mesh_label(mesh, ranks):
    if mesh == "one":
        return "one GPU"
    return "{} {} {}".format(mesh.split(":")[0], ranks, " ".join(mesh.split(":")[1:])).strip()


def transfers_of(output):
    """{operation: milliseconds of a step and hidden share} of the table that --profile prints for several ranks."""
    found = {}
    lines = iter(output.splitlines())
    for line in lines:
        if line.startswith("ms of a step: transfers"):
            break
    for line in lines:
        numbers = re.match(r"(.{32}) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", line)
        if not numbers:
            break
        number, computation, transfers, waits, hidden = map(float, numbers.groups()[1:])
        found[numbers.group(1).strip()] = {"number": number, "computation_ms": computation, "transfers_ms": transfers,
                                           "waits_ms": waits, "hidden": hidden / 100}
    return found


def attention_hidden(transfers):
    """The hidden share of all transfers of attention, both passes."""
    rows = [row for name, row in transfers.items() if "attention" in name and row["transfers_ms"] > 0]
    total = sum(row["transfers_ms"] for row in rows)
    return max(0.0, 1 - sum(row["waits_ms"] for row in rows) / total) if total else None


def row_flags(options, mesh, attention, T):
    flags = attention_flags(attention, T, options.ranks) + ["--profile"]
    if mesh != "one":
        flags = flags + ["--comm_timeout", str(options.comm_timeout)]
        if mesh.endswith(BY_NCCL):
            flags += ["--comm_transport", "nccl"]
        kind, _, exchange = mesh.replace(BY_NCCL, "").partition(":")
        if kind != "data":
            flags += ["--context_parallel", str(options.ranks), "--context_exchange", exchange]
    return flags + options.flags.split()


def run_each_alone(count, run):
    """The mean over the first `count` GPUs of what run(env) times on each, all at once; of the rest the first GPU's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]
    with concurrent.futures.ThreadPoolExecutor(len(visible)) as pool:
        each = list(pool.map(lambda gpu: run({**os.environ, "CUDA_VISIBLE_DEVICES": gpu}), visible))
    result = next((row for row in each if "error" in row), each[0])
    if "error" not in result:
        for key in ("tokens_per_second", "ms", "mfu"):
            result["each_" + key] = [row[key] for row in each]
            result[key] = statistics.mean(result["each_" + key])
    return result


def run_row(options, mesh, attention, T):
    flags, steps = row_flags(options, mesh, attention, T), steps_to_time(options.steps, T)

    def run(launch, env=None):
        return run_trainer(launch, LLAMA_530M, T, 1, VOCABULARY, flags, steps, options.time_limit,
                           options.ranks if mesh.startswith("data") else 1, env)

    if mesh == "one":
        result = run_each_alone(options.ranks, lambda env: run([options.train_gpt], env))
    else:
        result = run(["bash", SPAWN, str(options.ranks), options.train_gpt])
    result.update(mesh=mesh, ranks=1 if mesh == "one" else options.ranks, attention=attention, T=T, flags=flags,
                  steps_asked=steps)
    output = result.pop("output", "")
    result["transfers"] = transfers_of(output)
    begin = output.find("ms of a step")
    result["profile"] = output[begin:].splitlines() if begin >= 0 else []
    return result


def timed_as_asked(options, row):
    steps = row.get("steps_asked", row["steps"])  # older files have only those timed
    return row["flags"] == row_flags(options, row["mesh"], row["attention"], row["T"]) and \
        steps == steps_to_time(options.steps, row["T"])


def add_efficiency(rows):
    alone = {(row["attention"], row["T"]): row for row in rows if row["mesh"] == "one" and "ms" in row}
    for row in rows:
        one = alone.get((row["attention"], row["T"]))
        row.pop("efficiency", None)
        if one and "ms" in row:
            row["efficiency"] = row["tokens_per_second"] / (row["ranks"] * one["tokens_per_second"])


def gpu_names():
    try:
        listed = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True,
                                text=True, check=True)
        return listed.stdout.split("\n")[:-1]
    except (OSError, subprocess.CalledProcessError):
        return []


def save(options, rows):
    path = os.path.join(options.out, "ranks.json")
    with open(path + ".new", "w") as file:
        json.dump({"date": datetime.date.today().isoformat(), "gpus": gpu_names(), "ranks": options.ranks,
                   "command": sys.argv, "rows": rows}, file, indent=1)
    os.replace(path + ".new", path)


def load(options):
    path = os.path.join(options.out, "ranks.json")
    if not options.keep or not os.path.exists(path):
        return []
    with open(path) as file:
        saved = json.load(file)
    if saved["gpus"] != gpu_names() or saved["ranks"] != options.ranks:
        sys.exit(f"{path} is of {saved['ranks']} ranks on {saved['gpus']}: another --out, or without --keep")
    return [row for row in saved["rows"] if "ms" in row]


def plot(rows, ranks, path):
    plt = pyplot("no matplotlib: no plot")
    timed = [row for row in rows if "ms" in row]
    if plt is None or not timed:
        return
    attentions = sorted({row["attention"] for row in timed})
    figure, axes = plt.subplots(2, len(attentions), figsize=(6.5 * len(attentions), 8), squeeze=False)
    for column, attention in enumerate(attentions):
        for mesh in ("one",) + ALL_MESHES:
            of_mesh = sorted((row for row in timed if row["attention"] == attention and row["mesh"] == mesh),
                             key=lambda row: row["T"])
            if not of_mesh:
                continue
            color = "black" if mesh == "one" else f"C{ALL_MESHES.index(mesh)}"
            axes[0][column].plot([row["T"] for row in of_mesh], [row["tokens_per_second"] for row in of_mesh], "o-",
                                 color=color, label=mesh_label(mesh, ranks))
            with_one = [row for row in of_mesh if "efficiency" in row]
            if mesh != "one":
                axes[1][column].plot([row["T"] for row in with_one], [100 * row["efficiency"] for row in with_one],
                                     "o-", color=color, label=mesh_label(mesh, ranks))
        axes[0][column].set_title(f"530M, {attention}, {ranks} GPUs")
        axes[0][column].set_ylabel("tokens/s")
        axes[0][column].set_yscale("log")
        axes[1][column].set_ylabel("% of all GPUs alone")
        efficiencies = [row.get("efficiency", 1) for row in timed if row["attention"] == attention]
        axes[1][column].set_ylim(100 * min(efficiencies + [0.9]) - 5, 102)
        axes[1][column].axhline(100, color="gray", linewidth=0.8)
        lengths = sorted({row["T"] for row in timed})
        for axis in axes[:, column]:
            axis.set_xlim(lengths[0] / 1.5, lengths[-1] * 1.5)  # also where no mesh was timed: an empty log axis fails
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, lengths)
            axis.set_xlabel("tokens of a sequence")
            if axis.get_legend_handles_labels()[0]:
                axis.legend()
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def print_header():
    print(f"{'T':>8} {'attention':10} {'mesh':20} {'tokens/s':>10} {'ms':>10} {'efficiency %':>12} {'hidden %':>9} "
          f"{'GiB':>7}")


def print_row(row):
    def percent(share):
        return "-" if share is None else f"{100 * share:.1f}"

    print(f"{row['T']:>8} {row['attention']:10} {mesh_label(row['mesh'], row['ranks']):20} "
          f"{cell(row, 'tokens_per_second', '{:.0f}'):>10} {cell(row, 'ms', '{:.1f}'):>10} "
          f"{percent(row.get('efficiency')):>12} {percent(attention_hidden(row['transfers'])):>9} "
          f"{cell(row, 'peak_gib', '{:.2f}'):>7}", flush=True)
    if row.get("error") or row.get("note"):
        print(f"         {row.get('error') or row['note']}", flush=True)


def show_saved(options):
    """The table and the plot of --from_json."""
    rows, machines = {}, set()
    for path in options.from_json:
        with open(path) as file:
            saved = json.load(file)
        machines.add(f"{saved['ranks']} ranks on {' and '.join(sorted(set(saved['gpus'])))}")
        rows.update(((row["T"], row["attention"], row["mesh"]), row) for row in saved["rows"] if "ms" in row)
    if len(machines) > 1:
        sys.exit(f"--from_json: these cannot be compared: {'; '.join(sorted(machines))}")
    rows = list(rows.values())
    add_efficiency(rows)
    print_header()
    for row in rows:
        print_row(row)
    plot(rows, saved["ranks"], os.path.join(options.out, "ranks.png"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="GPUs of a mesh [2]")
    parser.add_argument("--seq_lens", default="98304,262144,524288", help="tokens of a sequence, commas between them")
    parser.add_argument("--attention", default="lighthouse,dense", help="of lighthouse and dense")
    parser.add_argument("--meshes", default=",".join(MESHES),
                        help="beside one GPU: none, or of " + ", ".join(ALL_MESHES))
    parser.add_argument("--train_gpt", default="./train_gpt", help="the trainer's binary")
    parser.add_argument("--steps", type=int,
                        help="timed steps; the median counts [20, from 65536 tokens on 5, from 262144 on 2]")
    parser.add_argument("--time_limit", type=float, default=240, help="seconds a row may take [240]")
    parser.add_argument("--comm_timeout", type=float, default=120, help="seconds without progress that end a row [120]")
    parser.add_argument("--flags", default="", help="further flags of the trainer, in one argument")
    parser.add_argument("--keep", action="store_true", help="rows that --out has are not run again")
    parser.add_argument("--out", default=".", help="folder for ranks.json and ranks.png")
    parser.add_argument("--from_json", nargs="+", metavar="FILE",
                        help="ranks.json of earlier runs: table and plot of all of them, nothing is run")
    options = parser.parse_args()
    meshes, attentions = [mesh for mesh in options.meshes.split(",") if mesh], options.attention.split(",")
    lengths = [int(T) for T in options.seq_lens.split(",")]
    if not set(meshes) <= set(ALL_MESHES) or not set(attentions) <= {"dense", "lighthouse"} or options.ranks < 2:
        parser.error("--meshes, --attention or --ranks: see --help")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast over NVLink needs rights that a container may lack
    if not options.from_json:
        require_built(parser, "--train_gpt", options.train_gpt)
    os.makedirs(options.out, exist_ok=True)
    if options.from_json:
        show_saved(options)
        return 0
    rows, failed = load(options), False

    print_header()
    for T in lengths:
        for attention in attentions:
            for mesh in ["one"] + meshes:
                row = next((row for row in rows if (row["T"], row["attention"], row["mesh"]) == (T, attention, mesh)),
                           None)
                if row is not None and not timed_as_asked(options, row):
                    rows.remove(row)
                    row = None
                if row is None:
                    row = run_row(options, mesh, attention, T)
                    rows.append(row)
                add_efficiency(rows)
                print_row(row)
                failed = failed or "ms" not in row
                save(options, rows)
    plot(rows, options.ranks, os.path.join(options.out, "ranks.png"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
