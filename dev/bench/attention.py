#!/usr/bin/env python3
"""Causal attention: this project's kernels, cuDNN and FlashAttention-2 (both through PyTorch), in turn on this GPU.

For every shape and pass the programs take turns, a few timed runs each, several rounds; medians of all rounds count. Prints
a table (ms, TFLOP/s, ratio to the faster peer) and saves attention.json and attention.png.

    make build/dev/attention_timing && python3 dev/bench/attention.py        every shape up to 131072
    python3 dev/bench/attention.py --shapes d128,gqa32 --longest 524288      some shapes, further
    python3 dev/bench/attention.py --peer fa3=PROGRAM                        with one more peer, any program that
                                                                             speaks as attention_timing does
    python3 dev/bench/attention.py --errors                                  no times: errors against float64
    python3 dev/bench/attention.py --list                                    what there is
    python3 dev/bench/attention.py --from_json a.json,b.json                 plot of earlier runs; needs no GPU

FLOP: 4 T^2 D H / 2 forward, 2.5 times that backward, per sequence.

--errors: each program's out, dq, dk and dv of the same random operands (bf16) against attention in float64: norm of the
difference by norm of the truth, and largest difference by largest element. All round their results to bf16, which alone
makes about 0.0017. Ends with status 1 where this project's norm is more than 1.01 times the best peer's for out, 1.02
times for the gradients: what dev/RESULTS.md ("Errors") records, up to 1.000 and 1.009, and a little for other peers.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile

from built import require_built
from plotting import pyplot

# name: B, H, Hkv, D, lengths
POWERS = [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288]
SHAPES = {
    "d128": (1, 8, 8, 128, sorted(POWERS + [18432, 98304])),
    "d64": (1, 16, 16, 64, POWERS),
    "gqa32": (1, 32, 8, 128, [8192, 32768, 131072]),
    "gqa64": (1, 64, 8, 128, [32768, 131072]),
    "gqa128": (1, 128, 8, 128, [32768, 131072]),
    "short": (64, 12, 12, 64, [1024]),
    "batch4": (4, 8, 8, 128, [8192]),
}
# B, H, Hkv, D, T, standard deviation of the scores
ERROR_SHAPES = [(1, 8, 8, 128, 8192, 1.0), (1, 8, 8, 128, 8192, 2.0), (1, 8, 8, 128, 4096, 4.0),
                (2, 16, 4, 128, 1000, 1.0), (1, 16, 16, 64, 8192, 1.0), (2, 8, 8, 64, 4096, 4.0),
                (2, 16, 4, 64, 1000, 1.0)]
WORST_RATIO = {"out": 1.01, "dq": 1.02, "dk": 1.02, "dv": 1.02}
PASSES = ("forward", "backward")
COLORS = {"this": "tab:green", "cudnn": "tab:orange", "fa2": "tab:blue"}  # the programs there always are
PEER_COLORS = ["tab:red", "tab:purple", "tab:brown", "tab:gray"]  # of what --peer names, in turn


def flops(B, H, D, T, direction):
    return 2.0 * B * H * D * T * T * (2.5 if direction != "forward" else 1.0)


class LineProgram:
    """dev/cuda/attention_timing.cu, or a peer that speaks as it does: a line in, a line out."""

    def __init__(self, binary, spread=1.0):
        self.binary, self.spread = binary, spread
        self.process = subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line):
        """What follows 'ok' in the answer."""
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline().split(maxsplit=1)
        except BrokenPipeError:
            answer = []
        if not answer or answer[0] != "ok":
            raise RuntimeError(answer[1].strip() if len(answer) > 1 else f"{self.binary} ended")
        return "".join(answer[1:])

    def time(self, direction, shape, T, runs):
        B, H, Hkv, D = shape
        spread = "" if self.spread == 1 else f" {self.spread}"
        return [float(word) for word in self.ask(f"{direction} {B} {H} {Hkv} {D} {T} 1 {runs}{spread}").split()]

    def results(self, q, k, v, dout):
        """out, dq, dk, dv of operands [B, T, heads, D] in bf16."""
        import torch
        (B, T, H, D), Hkv = q.shape, k.shape[2]
        with tempfile.TemporaryDirectory() as folder:
            for name, tensor in (("qkv", torch.cat((q, k, v), dim=2)), ("dout", dout)):
                with open(os.path.join(folder, name), "wb") as file:
                    file.write(tensor.contiguous().view(torch.int16).cpu().numpy().tobytes())
            self.ask(f"results {B} {H} {Hkv} {D} {T} 1 {folder}")

            def read(name, heads):
                values = torch.frombuffer(bytearray(open(os.path.join(folder, name), "rb").read()), dtype=torch.bfloat16)
                return values.cuda().view(B, T, heads, D)
            return [read("out", H), *read("dqkv", H + 2 * Hkv).split((H, Hkv, Hkv), dim=2)]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class TorchPeer:
    """scaled_dot_product_attention with one backend."""

    def __init__(self, backend, spread=1.0):
        self.backend, self.spread = backend, spread
        self.key = None

    def prepare(self, shape, T):
        import torch
        if self.key == (shape, T):
            return
        self.drop()
        B, H, Hkv, D = shape
        make = lambda heads, scale=1.0: (torch.randn(B, T, heads, D, device="cuda") * scale).bfloat16()
        self.q, self.k, self.v = [x.transpose(1, 2).requires_grad_()
                                  for x in (make(H, self.spread), make(Hkv), make(Hkv))]
        self.dout = make(H).transpose(1, 2)
        self.key = (shape, T)

    def drop(self):
        import torch
        self.key = self.q = self.k = self.v = self.dout = None
        torch.cuda.empty_cache()

    def results(self, q, k, v, dout):
        import torch
        self.q, self.k, self.v = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
        out = self.forward()
        gradients = torch.autograd.grad(out, (self.q, self.k, self.v), dout.transpose(1, 2))
        self.drop()
        return [x.detach().transpose(1, 2) for x in (out, *gradients)]

    def forward(self):
        import torch.nn.functional as F
        from torch.nn.attention import sdpa_kernel
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True,
                                                  enable_gqa=self.q.shape[1] != self.k.shape[1])

    def time(self, direction, shape, T, runs):
        import torch
        self.prepare(shape, T)
        if direction == "forward":
            with torch.no_grad():
                return [event_ms(self.forward) for _ in range(runs + 1)][1:]
        out = self.forward()
        gradients = lambda: torch.autograd.grad(out, (self.q, self.k, self.v), self.dout, retain_graph=True)
        return [event_ms(gradients) for _ in range(runs + 1)][1:]


HOLD_CLOCKS = 2_000_000  # about 1 ms: Python's launches take that long; attention_timing.cu holds it as long


def event_ms(run):
    """Time on the GPU alone: it is held busy until the launches are queued."""
    import torch
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HOLD_CLOCKS)
    begin.record()
    result = run()
    end.record()
    end.synchronize()
    del result
    return begin.elapsed_time(end)


def measure(programs, direction, shape, T, options):
    """Medians in ms; programs that cannot run the shape: a sentence."""
    estimate_ms = flops(shape[0], shape[1], shape[3], T, direction) / 400e12 * 1e3
    runs = max(1, min(20, math.ceil(options.slice_ms / estimate_ms)))
    times = {name: [] for name in programs}
    for turn in range(options.rounds):
        # Every second round backwards: a program that draws less power leaves the next one a cooler GPU.
        for name, program in list(programs.items())[:: 1 if turn % 2 == 0 else -1]:
            if isinstance(times[name], str):
                continue
            try:
                times[name] += program.time(direction, shape, T, runs)
            except Exception as error:  # a peer without memory or without such a kernel: the others go on
                times[name] = (str(error).strip() or repr(error)).splitlines()[0][:160]
    return {name: statistics.median(value) if isinstance(value, list) else value for name, value in times.items()}


def true_results(q, k, v, dout):
    """out, dq, dk, dv in float64, a query head at a time: its scores are a T x T matrix."""
    import torch
    B, T, H, D = q.shape
    group = H // k.shape[2]
    q, k, v, dout = [x.double() for x in (q, k, v, dout)]
    out, dq, dk, dv = [torch.zeros_like(x) for x in (q, q, k, v)]
    masked = torch.ones(T, T, dtype=torch.bool, device="cuda").triu(1)
    for b in range(B):
        for h in range(H):
            kv = h // group
            scores = q[b, :, h] @ k[b, :, kv].T / math.sqrt(D)
            p = scores.masked_fill_(masked, -math.inf).softmax(-1)
            out[b, :, h] = p @ v[b, :, kv]
            delta = (dout[b, :, h] * out[b, :, h]).sum(-1, keepdim=True)
            ds = p * (dout[b, :, h] @ v[b, :, kv].T - delta) / math.sqrt(D)
            dq[b, :, h] = ds @ k[b, :, kv]
            dk[b, :, kv] += ds.T @ q[b, :, h]
            dv[b, :, kv] += p.T @ dout[b, :, h]
    return out, dq, dk, dv


def compare_errors(programs):
    """The table of --errors; whether this project's are as near to the best peer's as they have been."""
    import torch
    torch.manual_seed(1)
    good = True
    print(f"{'B':>2} {'H':>5} {'D':>4} {'T':>6} {'scores':>6}      " +
          " ".join(f"{name + ' norm':>12} {'largest':>8}" for name in programs) + "  ratio")
    for B, H, Hkv, D, T, spread in ERROR_SHAPES:
        make = lambda heads, scale=1.0: torch.randn(B, T, heads, D, device="cuda").mul_(scale).bfloat16()
        operands = make(H, spread), make(Hkv), make(Hkv), make(H)
        truth = true_results(*operands)
        found = {name: program.results(*operands) for name, program in programs.items()}
        for i, what in enumerate(WORST_RATIO):
            norms, cells = {}, []
            for name in programs:
                difference = found[name][i].double() - truth[i]
                norms[name] = (difference.norm() / truth[i].norm()).item()
                largest = (difference.abs().max() / truth[i].abs().max()).item()
                cells.append(f"{norms[name]:12.6f} {largest:8.5f}")
            best = min((norm for name, norm in norms.items() if name != "this"), default=None)
            ratio = norms["this"] / best if "this" in norms and best else None
            good = good and (ratio is None or ratio <= WORST_RATIO[what])
            print(f"{B:2} {f'{H}/{Hkv}':>5} {D:4} {T:6} {spread:6} {what:>4} " + " ".join(cells) +
                  (f"  {ratio:.3f}" if ratio else "  -"), flush=True)
    return good


def plot(results, path):
    plt = pyplot("no matplotlib: no plot")
    if plt is None:
        return
    names = [name for name in results if len({row["T"] for row in results[name]}) > 2]
    if not names:
        return
    figure, axes = plt.subplots(len(names), 2, figsize=(13, 4.5 * len(names)), squeeze=False)
    measured = dict.fromkeys(program for name in names for row in results[name] for program in row["tflops"])
    peers = [program for program in measured if program not in COLORS]
    colors = {**COLORS, **{peer: PEER_COLORS[i % len(PEER_COLORS)] for i, peer in enumerate(peers)}}
    for line, name in zip(axes, names):
        for axis, direction in zip(line, PASSES):
            for program in measured:
                points = [(row["T"], row["tflops"][program]) for row in results[name]
                          if row["pass"] == direction and program in row["tflops"]]
                if points:
                    axis.plot(*zip(*points), "o-", color=colors[program], label=program)
            B, H, Hkv, D = SHAPES[name][:4]
            axis.set_title(f"{direction}, causal, B={B} H={H}/{Hkv} D={D}")
            axis.set_xscale("log", base=2)
            axis.set_xlabel("T")
            axis.set_ylabel("TFLOP/s")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="names with commas between them")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--passes", default=",".join(PASSES), help="forward, backward, deterministic")
    parser.add_argument("--errors", action="store_true", help="errors against float64 instead of times; see above")
    parser.add_argument("--spread", type=float, default=1.0, help="standard deviation of the scores that are timed")
    parser.add_argument("--shortest", type=int, default=0)
    parser.add_argument("--longest", type=int, default=131072)
    parser.add_argument("--rounds", type=int, default=6, help="turns each program gets, best an even number")
    parser.add_argument("--slice_ms", type=float, default=20.0, help="a turn's timed runs, at least one")
    parser.add_argument("--only", default=",".join(COLORS), help="programs, with commas between them")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PROGRAM", help="one more, always run")
    parser.add_argument("--timing", default="build/dev/attention_timing", help="this project's timing program")
    parser.add_argument("--out", default=".", help="folder for attention.json and attention.png")
    parser.add_argument("--from_json", help="attention.json of earlier runs, commas between them: only the plot of them")
    options = parser.parse_args()
    if options.list:
        for name, (B, H, Hkv, D, lengths) in SHAPES.items():
            print(f"{name}: B {B}, H {H}/{Hkv}, D {D}, T {' '.join(map(str, lengths))}")
        return 0
    for wanted, known, flag in ((options.shapes, SHAPES, "--shapes"), (options.only, COLORS, "--only"),
                                (options.passes, PASSES + ("deterministic",), "--passes")):
        unknown = [name for name in wanted.split(",") if name not in known]
        if unknown:
            parser.error(f"{flag}: no such {', '.join(unknown)}; there are {', '.join(known)}")
    if not options.from_json:
        require_built(parser, "--timing", options.timing)
    if options.errors and options.peer:
        parser.error("--peer: --errors compares with PyTorch's attention alone")
    peers = {}
    for peer in options.peer:
        name, _, binary = peer.partition("=")
        if not name or name in COLORS or name in peers or not os.access(binary, os.X_OK):
            parser.error(f"--peer {peer}: expected NAME=PROGRAM, a new name and a program that can be run")
        peers[name] = binary
    os.makedirs(options.out, exist_ok=True)
    if options.from_json:
        results = {}
        for path in options.from_json.split(","):
            with open(path) as file:
                for name, rows in json.load(file).items():
                    results.setdefault(name, []).extend(rows)
        plot(results, os.path.join(options.out, "attention.png"))
        return 0

    programs = {}
    selected = options.only.split(",")
    if "this" in selected:
        programs["this"] = LineProgram(options.timing, options.spread)
    if "cudnn" in selected or "fa2" in selected:
        import torch
        from torch.nn.attention import SDPBackend
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, "
              f"cuDNN {torch.backends.cudnn.version()}")
        if "cudnn" in selected:
            programs["cudnn"] = TorchPeer(SDPBackend.CUDNN_ATTENTION, options.spread)
        if "fa2" in selected:
            programs["fa2"] = TorchPeer(SDPBackend.FLASH_ATTENTION, options.spread)
    if options.errors:
        good = compare_errors(programs)
        if "this" in programs:
            programs["this"].close()
        return 0 if good else 1
    programs.update((name, LineProgram(binary, options.spread)) for name, binary in peers.items())

    results, failed = {}, False
    names = list(programs)
    print(f"{'shape':8} {'pass':13} {'T':>7} " + " ".join(f"{name + ' ms':>10} {'TFLOP/s':>8}" for name in names) +
          f" {'ratio':>6}")
    for name in options.shapes.split(","):
        B, H, Hkv, D, lengths = SHAPES[name]
        rows = results.setdefault(name, [])
        for T in lengths:
            if not options.shortest <= T <= options.longest:
                continue
            for direction in options.passes.split(","):
                peers = {key: value for key, value in programs.items() if key == "this" or direction != "deterministic"}
                ms = measure(peers, direction, (B, H, Hkv, D), T, options)
                work = flops(B, H, D, T, direction)
                tflops = {key: work / value * 1e-9 for key, value in ms.items() if not isinstance(value, str)}
                best = max((value for key, value in tflops.items() if key != "this"), default=None)
                ratio = tflops["this"] / best if "this" in tflops and best else None
                cells = " ".join(f"{ms[key]:10.3f} {tflops[key]:8.1f}" if key in tflops else f"{'-':>10} {'-':>8}"
                                 for key in names)
                print(f"{name:8} {direction:13} {T:7} {cells} {f'{ratio:.3f}' if ratio else '-':>6}", flush=True)
                for key, value in ms.items():
                    if isinstance(value, str):
                        failed = failed or key == "this"
                        print(f"    {key}: {value}", flush=True)
                rows.append({"T": T, "pass": direction, "ms": ms, "tflops": tflops, "ratio": ratio})
                with open(os.path.join(options.out, "attention.json"), "w") as file:
                    json.dump(results, file, indent=1)
            for program in programs.values():
                if isinstance(program, TorchPeer):
                    program.drop()
    for program in programs.values():
        if isinstance(program, LineProgram):
            program.close()
    plot(results, os.path.join(options.out, "attention.png"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
