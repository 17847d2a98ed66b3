#!/usr/bin/env python3
"""Lighthouse attention against dense attention, on this machine's GPU, all in one run of about three minutes.

Three tables, saved with a plot (latency against context, as in Figure 3 of arXiv:2605.06554):
  contexts  one layer, H=8, D=128, L=3, p=4, k=T/64: this project's layer, its dense attention, cuDNN's dense attention
  stages    where the layer's time goes
  blocks    one decoder block at the shapes of 530M, 8B, 70B and 405B: matrix products (cuBLAS through PyTorch, timed on
            32768 tokens and scaled: they are linear in tokens) plus attention, dense or Lighthouse; norms, rotation and
            gate are left out, they are equal in both

--published names a program that times another implementation of the layer at the same shapes: a further column and
line. It takes no further flags and prints a JSON line for each T, {"T": 98304, "forward_ms": 2.5,
"forward_backward_ms": 7.5} or {"T": 98304, "error": "why not"}; other fields and other lines are ignored.

Every time is a median of CUDA-event timings in milliseconds on random data with a flushed L2 cache; of what takes
seconds, one timing. A part that fails is reported, the rest goes on, and the exit status is 1.

    make dev && python3 dev/bench/lighthouse.py
    python3 dev/bench/lighthouse.py --contexts 32768,98304 --blocks ""
    python3 dev/bench/lighthouse.py --published 'python3 other_layer.py'
    python3 dev/bench/lighthouse.py --from_json lighthouse.json        tables and plot of an earlier run; needs no GPU
"""
import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time

from built import require_built
from plotting import pyplot
from limited import run_limited

# name: width, query heads, key/value heads, FFN width; head dim 128.
BLOCKS = {
    "530M": (1024, 8, 8, 1536),
    "8B": (4096, 32, 8, 14336),
    "70B": (8192, 64, 8, 28672),
    "405B": (16384, 128, 8, 53248),
}
HEAD_DIM, LEVELS, POOL = 128, 3, 4
PRODUCT_TOKENS = 32768
STAGES = ["pool", "select", "gather", "attention", "scatter", "scatter_backward", "attention_backward",
          "gather_backward"]


def run_layer(binary, T, heads, kv_heads, with_dense, limit):
    """Milliseconds by stage name, from lighthouse_layer's lines 'stage NAME  shape  X ms'."""
    shape = f"{T},{LEVELS},{POOL},{T // 64},{heads},{kv_heads},{HEAD_DIM}"
    command = [binary] + ([] if with_dense else ["--without_dense"]) + ["--shape", shape]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        output, error = done.stdout, None
        if done.returncode != 0:
            error = (done.stderr.strip() or "failed without a word").splitlines()[-1][:200]
    except subprocess.TimeoutExpired as expired:
        output, error = (expired.stdout or b"").decode(), f"over {limit:.0f} s"
    except OSError as missing:
        output, error = "", str(missing)
    found = {name: float(ms) for name, ms in re.findall(r"^stage (\S+) .* ([\d.]+) ms$", output, re.M)}
    return {**found, "error": error} if error else found


def run_published(command, limit):
    """What the program of --published says: milliseconds by T, as fields of its row, and what failed, as texts."""
    try:
        status, stdout, stderr = run_limited(command, limit)
    except OSError as missing:
        return {}, [f"--published: {missing}"]
    found, failures = {}, []
    for line in stdout.splitlines():
        try:
            said = json.loads(line)
            T = int(said["T"])
            if "error" in said:
                failures.append(f"--published, T {T}: {str(said['error'])[:200]}")
            else:
                found[T] = {"published": float(said["forward_ms"]),
                            "published_both": float(said["forward_backward_ms"])}
        except (KeyError, TypeError, ValueError):
            continue
    if status is None:
        failures.append(f"--published: ended after {limit:.0f} s")
    elif not found and not failures:
        words = (stderr.strip() or stdout.strip() or "no output").splitlines()
        failures.append(f"--published: no line with times: {words[-1][:200]}")
    return found, failures


class Peer:
    """cuDNN attention and cuBLAS matrix products through PyTorch."""

    def __init__(self):
        import torch
        import torch.nn.functional as F
        from torch.nn.attention import SDPBackend, sdpa_kernel
        self.torch, self.F, self.backend, self.sdpa_kernel = torch, F, SDPBackend.CUDNN_ATTENTION, sdpa_kernel
        self.flush = torch.full((64 << 20,), 7, dtype=torch.int32, device="cuda")

    def description(self):
        return {"device": self.torch.cuda.get_device_name(), "torch": self.torch.__version__,
                "cuda": self.torch.version.cuda, "cudnn": self.torch.backends.cudnn.version()}

    def once_ms(self, launch):
        self.flush.sum()
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launch()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def time_ms(self, launch, max_runs=11, budget_ms=200.0):
        """A median. The first launch, which also loads and compiles, does not count."""
        self.once_ms(launch)
        times = []
        while not times or (len(times) < max_runs and sum(times) < budget_ms):
            times.append(self.once_ms(launch))
        return statistics.median(times)

    def dense(self, T, heads, kv_heads):
        """Milliseconds of cuDNN's causal attention, forward and backward."""
        torch = self.torch
        try:
            make = lambda h: torch.randn(1, h, T, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            q, k, v, dout = make(heads), make(kv_heads), make(kv_heads), make(heads)
            for tensor in (q, k, v):
                tensor.requires_grad_()
            with self.sdpa_kernel(self.backend):
                attend = lambda: self.F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                                     enable_gqa=heads != kv_heads)
                kept = []
                forward = self.time_ms(lambda: (kept.clear(), kept.append(attend())))
                backward = self.time_ms(lambda: torch.autograd.grad(kept[0], (q, k, v), dout, retain_graph=True))
            return {"cudnn": forward, "cudnn_backward": backward}
        except Exception as error:  # what cuDNN cannot run is a result too
            return {"cudnn_error": (str(error).splitlines() or [type(error).__name__])[0][:120]}
        finally:
            torch.cuda.empty_cache()

    def matrix_products(self, width, heads, kv_heads, ffn):
        """Milliseconds for PRODUCT_TOKENS of a block's four linear layers, forward and backward."""
        torch = self.torch
        forward = backward = 0.0
        for columns, rows in ((width, (heads + 2 * kv_heads) * HEAD_DIM), (heads * HEAD_DIM, width), (width, 2 * ffn),
                              (ffn, width)):
            x = torch.randn(PRODUCT_TOKENS, columns, device="cuda", dtype=torch.bfloat16)
            weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
            dy = torch.randn(PRODUCT_TOKENS, rows, device="cuda", dtype=torch.bfloat16)
            forward += self.time_ms(lambda: x @ weight.T)
            backward += self.time_ms(lambda: dy @ weight) + self.time_ms(lambda: dy.T @ x)
            del x, weight, dy
            torch.cuda.empty_cache()
        return {"products": forward, "products_backward": backward}


def times(result, kind):
    """Forward, and forward plus backward."""
    if kind + "_both" in result:
        return result.get(kind), result[kind + "_both"]
    forward, backward = result.get(kind), result.get(kind + "_backward")
    return forward, forward + backward if forward and backward else None


def ratio(over, under):
    return f"{over / under:.1f}x" if over and under else "-"


def number(value):
    return f"{value:.3g}" if value and value < 100 else f"{value:.0f}" if value else "-"


def markdown(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def context_table(results):
    with_published = any("published" in r for r in results.values())
    rows = []
    for T, r in results.items():
        layer, dense, cudnn, published = (times(r, kind) for kind in ("layer", "dense", "cudnn", "published"))
        rows.append([str(T)] + [number(x) for pair in (layer, dense, cudnn) for x in pair] +
                    [ratio(cudnn[0], layer[0]), ratio(cudnn[1], layer[1]), ratio(dense[0], layer[0]),
                     ratio(dense[1], layer[1])])
        if with_published:
            rows[-1] += [number(x) for x in published] + [ratio(published[0], layer[0]), ratio(published[1], layer[1])]
    header = ["T", "Lighthouse fwd ms", "fwd+bwd", "dense fwd", "fwd+bwd", "cuDNN dense fwd", "fwd+bwd",
              "cuDNN / Lighthouse fwd", "fwd+bwd", "dense / Lighthouse fwd", "fwd+bwd"]
    if with_published:
        header += ["published fwd", "fwd+bwd", "published / Lighthouse fwd", "fwd+bwd"]
    return markdown(header, rows)


def stage_table(results):
    rows = [[str(T)] + [number(r.get(stage)) for stage in STAGES + ["around", "around_backward"]]
            for T, r in results.items() if set(r) - {"published", "published_both"}]
    return markdown(["T"] + STAGES + ["all but attention, fwd", "bwd"], rows)


def block_table(results):
    rows = []
    for name, by_context in results.items():
        for T, r in by_context.items():
            total = lambda kind: (sum(r[key] for key in ("products", "products_backward", kind, kind + "_backward"))
                                  if all(key in r for key in ("products", kind, kind + "_backward")) else None)
            rows.append([name, str(T), number(times(r, "products")[1]), number(times(r, "layer")[1]),
                         number(times(r, "dense")[1]), number(times(r, "cudnn")[1]), number(total("layer")),
                         number(total("dense")), ratio(total("dense"), total("layer")),
                         ratio(total("cudnn"), total("layer"))])
    return markdown(["block", "T", "products fwd+bwd ms", "Lighthouse", "dense", "cuDNN dense",
                     "block with Lighthouse", "with dense", "dense / Lighthouse", "cuDNN / Lighthouse"], rows)


def tables(results):
    return "\n\n".join([context_table(results["contexts"]), stage_table(results["contexts"]),
                        block_table(results["blocks"])])


def plot(results, path):
    plt = pyplot("no matplotlib here: --from_json makes the plot on a machine that has it")
    if plt is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for axis, index, title in ((axes[0], 0, "forward"), (axes[1], 1, "forward + backward")):
        for kind, label, style in (("layer", "Lighthouse", "o-"), ("dense", "dense", "s-"),
                                   ("cudnn", "cuDNN dense", "^--"), ("published", "Lighthouse, published", "d:")):
            points = [(int(T), times(r, kind)[index]) for T, r in results["contexts"].items()]
            points = [(T, ms) for T, ms in points if ms]
            if points:
                axis.plot(*zip(*points), style, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"one attention layer, {title}")
        axis.set_xlabel("context, tokens")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("ms")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def commit():
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def measure(options, results, save):
    """Fills results; returns what failed, as texts."""
    start, failures = time.monotonic(), []
    try:
        peer = Peer()
        results["peer"] = peer.description()
    except Exception as error:
        peer = None
        failures.append(f"no cuDNN times and no block table: {error}")

    def fits(what):
        if time.monotonic() - start < options.budget:
            return True
        print(f"{what}: left out, {options.budget:.0f} s are over (--budget)", flush=True)
        return False

    def attention(what, T, heads, kv_heads):
        with_dense = T <= options.dense_up_to
        found = run_layer(options.layer, T, heads, kv_heads, with_dense, options.time_limit)
        if peer and with_dense:
            found.update(peer.dense(T, heads, kv_heads))
        failures.extend(f"{what}: {found[key]}" for key in ("error", "cudnn_error") if key in found)
        print(f"{what}: Lighthouse {number(times(found, 'layer')[0])} / {number(times(found, 'layer')[1])} ms, dense "
              f"{number(times(found, 'dense')[0])} / {number(times(found, 'dense')[1])}, cuDNN "
              f"{number(times(found, 'cudnn')[0])} / {number(times(found, 'cudnn')[1])}  "
              f"[{time.monotonic() - start:.0f} s]", flush=True)
        return found

    for T in options.contexts:
        if fits(f"T {T}"):
            results["contexts"][T] = attention(f"T {T}", T, 8, 8)
            save()
    if options.published and fits("--published"):
        found, failed = run_published(options.published, options.published_time_limit)
        failures.extend(failed)
        for T, ms in found.items():
            results["contexts"].setdefault(T, {}).update(ms)
            print(f"T {T}: published {number(ms['published'])} / {number(ms['published_both'])} ms", flush=True)
        results["contexts"] = dict(sorted(results["contexts"].items()))
        save()
    products = {}
    for T in options.block_contexts:  # the dearest come last
        for name in options.blocks:
            width, heads, kv_heads, ffn = BLOCKS[name]
            if peer is None or not fits(f"block {name} T {T}"):
                continue
            found = attention(f"block {name} T {T}", T, heads, kv_heads)
            try:
                products[name] = products.get(name) or peer.matrix_products(width, heads, kv_heads, ffn)
                found.update({key: ms * T / PRODUCT_TOKENS for key, ms in products[name].items()})
            except Exception as error:
                failures.append(f"block {name}, matrix products: {str(error).splitlines()[0][:120]}")
            results["blocks"].setdefault(name, {})[T] = found
            save()
    return failures


def main():
    numbers = lambda text: [int(word) for word in text.split(",") if word]
    names = lambda text: [word for word in text.split(",") if word]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=numbers, default="8192,16384,32768,65536,98304,131072,262144,524288,1048576")
    parser.add_argument("--dense_up_to", type=int, default=1048576,
                        help="longest context that dense attention is timed at")
    parser.add_argument("--blocks", type=names, default=",".join(BLOCKS), help="names with commas between them")
    parser.add_argument("--block_contexts", type=numbers, default="32768,65536,131072,262144")
    parser.add_argument("--layer", default="build/dev/lighthouse_layer", help="the binary that times the layer")
    parser.add_argument("--budget", type=float, default=180, help="seconds after which no further shape is begun")
    parser.add_argument("--time_limit", type=float, default=120, help="seconds one shape may take")
    parser.add_argument("--published", type=shlex.split, metavar="COMMAND",
                        help="a program that times another implementation of the layer; see above")
    parser.add_argument("--published_time_limit", type=float, default=300, help="seconds it may take, for all T [300]")
    parser.add_argument("--out", default=".", help="folder for lighthouse.json, lighthouse.md and lighthouse.png")
    parser.add_argument("--from_json", help="an earlier run's lighthouse.json: tables and plot of it, nothing is timed")
    options = parser.parse_args()
    unknown = [name for name in options.blocks if name not in BLOCKS]
    if unknown:
        parser.error(f"--blocks: no such block: {', '.join(unknown)}; there are {', '.join(BLOCKS)}")
    if not options.from_json:
        require_built(parser, "--layer", options.layer)
    os.makedirs(options.out, exist_ok=True)
    path = lambda extension: os.path.join(options.out, "lighthouse." + extension)

    results, failures = {"commit": commit(), "contexts": {}, "blocks": {}}, []
    if options.from_json:
        with open(options.from_json) as file:
            results = json.load(file)
    else:
        def save():
            with open(path("json"), "w") as file:
                json.dump(results, file, indent=1)
        failures = measure(options, results, save)
        results["failures"] = failures
        save()
    text = tables(results)
    with open(path("md"), "w") as file:
        file.write(text + "\n")
    print("\n" + text)
    plot(results, path("png"))
    for failure in failures:
        print("FAILED " + failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
