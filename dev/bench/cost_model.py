#!/usr/bin/env python3
"""What a training step should take on many GPUs: a model on paper, from rates that were measured on one (dev/RESULTS.md).

Prints, for 1M and 4M tokens, dense and Lighthouse attention, and meshes of 8, 32 and 256 GPUs: bytes that a GPU sends for
a layer, computation and transfer of a step of the ring, the time of an optimizer step and the efficiency against GPUs
that need not talk. Every number that goes in is a field of Machine or Model below, or an option.

    python3 dev/bench/cost_model.py                    the table of doc/context_parallel.md
    python3 dev/bench/cost_model.py --network 12.5     slower links between nodes, GB/s a GPU
    python3 dev/bench/cost_model.py --exchange heads   by heads instead, the meshes whose ranks divide the key/value heads
    python3 dev/bench/cost_model.py --check            against steps that were measured on one GPU
"""
import argparse
import dataclasses
import sys


@dataclasses.dataclass
class Machine:
    gpus_of_node: int = 8
    nvlink: float = 150e9  # bytes/s, one way, between two GPUs of a node: a third of the data sheet's 450 of an H100
    network: float = 40e9  # bytes/s, one way, a GPU between nodes: 80 % of a 400 Gbit/s adapter each
    latency: float = 20e-6  # seconds that an exchange takes beside its bytes
    memory: float = 3.05e12  # bytes/s of a copy, measured
    attention_forward: float = 650e12  # FLOP/s, D = 128, measured: 709 at 128K, 609 at 512K
    attention_backward: float = 590e12  # measured: 591 to 618 at 128K


@dataclasses.dataclass
class Model:
    layers: int = 30
    width: int = 1024
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 128
    ffn_width: int = 1536
    vocabulary: int = 258
    # Seconds a token of everything but attention, forward and backward, and of computing it again in the backward; both
    # scale with the matrices. Measured at T = 98304: steps less their attention.
    other: float = 3.4e-6
    recompute: float = 0.4e-6
    # Seconds a token and Lighthouse layer around the inner attention (pool, select, gather, scatter), measured.
    lighthouse_around: float = (0.474e-3 + 0.343e-3) / 98304
    lighthouse_dense_layers: int = 4
    lighthouse_levels: int = 4
    lighthouse_pool: int = 4
    exchange: str = "auto"  # or "heads", as --context_exchange

    @property
    def layer_parameters(self):
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.width * self.ffn_width

    @property
    def parameters(self):
        return self.layers * self.layer_parameters + 2 * self.vocabulary * self.width

    # topk for W ranks: 2W chunks of whole tiles, 128 a tile.
    def lighthouse_topk(self, W, least=4096):
        unit = 2 * W * 128
        return -(-least // unit) * unit

    def lighthouse_rows(self, T, W):
        top = self.lighthouse_levels - 1
        return T // self.lighthouse_pool**top + top * self.lighthouse_pool * self.lighthouse_topk(W)


@dataclasses.dataclass
class Attention:
    """One layer's attention of `rows` causal rows on W ranks, on the slowest of them."""
    forward: float = 0.0  # seconds, with what is not hidden
    backward: float = 0.0
    forward_alone: float = 0.0  # seconds of the products, without any exchange or overhead
    backward_alone: float = 0.0
    forward_bytes: float = 0.0  # sent by a rank, mean
    backward_bytes: float = 0.0
    compute_step: tuple = (0.0, 0.0)  # seconds of one step of the ring, forward and backward
    transfer_step: tuple = (0.0, 0.0)
    exchange: str = "-"


def attention(machine, model, rows, W):
    a = Attention()
    width, kv_width = model.heads * model.head_dim, 2 * model.kv_heads * model.head_dim
    flops = 2.0 * rows**2 * width / W  # causal: half of 4 rows^2 width
    a.forward_alone = a.forward = flops / machine.attention_forward
    a.backward_alone = a.backward = 2.5 * flops / machine.attention_backward
    if W == 1:
        return a
    n = rows / (2 * W)  # of a chunk; a rank holds two
    link = machine.nvlink if W <= machine.gpus_of_node else machine.network
    if model.exchange == "heads":
        return attention_by_heads(a, machine, model, n, W, link)
    # Chunks that others hold and this rank sees: r heads and 2 (W - 1 - r) chunks, 1.5 (W - 1) in the mean, 2 in the
    # largest step. Keys bf16; gradients float32, from whoever saw them.
    a.forward_bytes = 1.5 * (W - 1) * n * kv_width * 2
    a.backward_bytes = 1.5 * (W - 1) * n * kv_width * (2 + 4)
    compute = (a.forward_alone / W, a.backward_alone / W)
    keys, gradients = 2 * n * kv_width * 2 / link, 2 * n * kv_width * 4 / link
    transfer = (keys + machine.latency, keys + gradients + machine.latency)
    # What partial results cost beside the products: forward, the part and the running sum (bf16, float32) of 1.5 n
    # queries in the mean; backward, statistics, dq's accumulator and sum, and the gradients of keys written and added.
    merge = (1.5 * n * width * 12 / machine.memory, 1.5 * n * (width * 26 + kv_width * 16) / machine.memory)
    ring = [W * compute[i] + (W - 1) * merge[i] + (W - 1) * max(0.0, transfer[i] - compute[i]) for i in range(2)]
    # Backward, the first keys come beside three quarters of step 0, the last gradients beside the other quarter.
    ring[1] += (max(0.0, keys + machine.latency - 0.75 * compute[1]) - max(0.0, transfer[1] - compute[1]) +
                max(0.0, gradients + machine.latency - 0.25 * compute[1]))
    gather = [W * compute[i] + a_bytes / link + machine.latency * (1 + i)
              for i, a_bytes in enumerate((2 * a.forward_bytes / 1.5, 2 * a.backward_bytes / 1.5))]
    gathers = min(compute[0], keys) < machine.latency  # the trainer's rule, choose_ring_or_gather()
    a.forward, a.backward = gather if gathers else ring
    a.exchange = "gather" if gathers else "ring"
    a.compute_step, a.transfer_step = compute, transfer
    return a


def attention_by_heads(a, machine, model, n, W, link):
    """A part, one key/value head of each rank with its queries, is brought and taken while others attend: what shows are
    the first part's rows and the last one's results, or all transfers where they take longer than the computation."""
    parts = model.kv_heads // W
    row = 2 * n * (W - 1) / W * model.head_dim * 2  # bytes of a head of the local rows that travel
    q, kv = model.heads, model.kv_heads
    passes = []
    for alone, brought, taken in ((a.forward_alone, q + 2 * kv, q), (a.backward_alone, 3 * q + 2 * kv, q + 2 * kv)):
        num_bytes = row * (brought + taken)
        transfers = num_bytes / link + 2 * parts * machine.latency
        shown = num_bytes / parts / link + 2 * machine.latency
        passes.append((num_bytes, max(alone + shown, transfers + alone / parts), alone / parts, transfers / parts))
    (a.forward_bytes, a.backward_bytes), (a.forward, a.backward), a.compute_step, a.transfer_step = zip(*passes)
    a.exchange = "heads"
    return a


@dataclasses.dataclass
class Step:
    layer: Attention  # of the kind that most layers are
    seconds: float
    alone: float  # the same work without exchange
    tokens_per_second: float
    efficiency: float
    forwards: int


def step(machine, model, T, W, data_parallel, lighthouse, recompute):
    """recompute: none, all_but_attention or block, as the trainer's flag; norms_and_gate is between the first two."""
    local = T / W
    dense = attention(machine, model, T, W)
    forwards = 2 if recompute == "block" else 1  # of attention
    scale = model.layers * model.layer_parameters / (30 * (4 * 1024 * 1024 + 3 * 1024 * 1536))
    other = scale * local * (model.other + (0.0 if recompute == "none" else model.recompute))
    num_dense = model.lighthouse_dense_layers if lighthouse else model.layers

    def of_layers(which, alone):
        forward, backward = (which.forward_alone, which.backward_alone) if alone else (which.forward, which.backward)
        return forwards * forward + backward

    inner = attention(machine, model, model.lighthouse_rows(T, W), W) if lighthouse else None
    around = model.lighthouse_around * local * model.heads * model.head_dim / 1024
    total = {}
    for alone in (True, False):
        seconds = other + num_dense * of_layers(dense, alone)
        if lighthouse:
            borders = 0.0 if alone or W == 1 else 2 * machine.latency  # a few rows a head, forward and backward
            seconds += (model.layers - num_dense) * (of_layers(inner, alone) + around + borders)
        total[alone] = seconds
    # The sharded optimizer. Gradients (float32) are summed beside the backward pass; what of them takes longer than half
    # of the step, its backward, shows. Weights (bf16) come at the end, beside little.
    N = W * data_parallel
    if N > 1:
        link = machine.nvlink if N <= machine.gpus_of_node else machine.network
        share = model.parameters * (N - 1) / N
        total[False] += max(0.0, 4 * share / link - total[False] / 2) + 2 * share / link
    adam = 28 * model.parameters / N / machine.memory
    total[True] += adam
    total[False] += adam
    return Step(inner if lighthouse else dense, total[False], total[True], data_parallel * T / total[False],
                total[True] / total[False], forwards)


def check(machine, model):
    """Steps of one GPU that were measured (dev/RESULTS.md): T, L, topk, recompute, milliseconds."""
    measured = ((98304, 0, 0, "all_but_attention", 3783.7), (98304, 3, 1536, "none", 911.2),
                (98304, 3, 1536, "block", 1117.7))
    worst = 0.0
    for T, levels, topk, recompute, ms in measured:
        of_row = dataclasses.replace(model, lighthouse_levels=levels or 4)
        of_row.lighthouse_topk = lambda W, topk=topk: topk
        found = 1e3 * step(machine, of_row, T, 1, 1, levels > 0, recompute).seconds
        worst = max(worst, abs(found / ms - 1))
        print(f"T {T} {'Lighthouse' if levels else 'dense':10} recompute {recompute:17} model {found:7.1f} ms, "
              f"measured {ms:7.1f} ms: {100 * (found / ms - 1):+.1f} %")
    print("within 10 %" if worst < 0.1 else "FAIL: off by more than 10 %")
    return 0 if worst < 0.1 else 1


def print_table(machine, model, lengths, meshes):
    piece = "step of the ring" if model.exchange == "auto" else "part"
    print(f"| tokens | attention | GPUs | data x context | rows of a chunk | sent a layer, MB | {piece}: compute, "
          "transfer, ms | exchange | step, s | tokens/s | efficiency |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for T in lengths:
        for lighthouse in (False, True):
            for data_parallel, W in meshes:
                if model.exchange == "heads" and model.kv_heads % W != 0:
                    continue
                # Attention's outputs of every layer fit beside the rest up to about 256K tokens a GPU.
                recompute = "all_but_attention" if lighthouse or T / W <= 262144 else "block"
                s = step(machine, model, T, W, data_parallel, lighthouse, recompute)
                a = s.layer
                rows = (model.lighthouse_rows(T, W) if lighthouse else T) // (2 * W)
                sent = (s.forwards * a.forward_bytes + a.backward_bytes) / 1e6
                pair = "{:.3g}, {:.3g} / {:.3g}, {:.3g}".format(*(1e3 * x for i in range(2) for x in
                                                                  (a.compute_step[i], a.transfer_step[i])))
                print(f"| {T // 1048576}M | {'Lighthouse' if lighthouse else 'dense'} | {W * data_parallel} | "
                      f"{data_parallel} x {W} | {rows} | {sent:.0f} | {pair} | {a.exchange} | {s.seconds:.3g} | "
                      f"{s.tokens_per_second:.3g} | {100 * s.efficiency:.1f} % |")


def print_overlap(machine, model):
    """The shortest chunk whose computation hides its transfer: both grow with n D, computation once more with n."""
    ratio = model.kv_heads / model.heads
    print("| link | GB/s | forward: rows of a chunk | backward |")
    print("|---|---|---|---|")
    for name, link in (("NVLink", machine.nvlink), ("network", machine.network)):
        print(f"| {name} | {link / 1e9:g} | {ratio * machine.attention_forward / link:.0f} | "
              f"{1.2 * ratio * machine.attention_backward / link:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvlink", type=float, help="GB/s one way between two GPUs of a node [150]")
    parser.add_argument("--network", type=float, help="GB/s one way of a GPU between nodes [40]")
    parser.add_argument("--kv_heads", type=int, help="key/value heads of the model's 8 [8]")
    parser.add_argument("--exchange", choices=("auto", "heads"), default="auto", help="as --context_exchange [auto]")
    parser.add_argument("--check", action="store_true", help="compare with measured steps of one GPU; status 1 if off")
    options = parser.parse_args()
    machine, model = Machine(), Model()
    if options.nvlink:
        machine.nvlink = 1e9 * options.nvlink
    if options.network:
        machine.network = 1e9 * options.network
    if options.kv_heads:
        model.kv_heads = options.kv_heads
    model.exchange = options.exchange
    if options.check:
        return check(machine, model)
    print_overlap(machine, model)
    print()
    print_table(machine, model, (1 << 20, 4 << 20), ((1, 8), (4, 8), (1, 32), (32, 8), (8, 32), (1, 256)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
