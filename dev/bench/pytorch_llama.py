#!/usr/bin/env python3
"""The PyTorch peer of train_gpt: the same Llama, trained the way PyTorch does it best on one GPU.

torch.compile, cuDNN attention through scaled_dot_product_attention, bf16 autocast over float32 weights, fused AdamW,
gradient clipping. Weights are drawn and decayed as in train_gpt (llmc/parameters.h). The learning rate is constant and
every step has the same random tokens, neither of which costs or saves time; losses are therefore not train_gpt's.
Prints one JSON line: tokens/s (median step), peak memory (PyTorch's allocations), loss of the first and last step.

    python3 dev/bench/pytorch_llama.py --seq_len 8192 --batch_size 4 --vocab_size 256

A program that compares another attention takes the model and the step from here: a subclass of Block with an attend()
of its own, given to train().
"""
import argparse
import json
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


def rotate(x, cos, sin):
    """x [B, T, heads, D], half-rotation convention; cos, sin [T, 1, D / 2] float32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, o):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = o.num_heads, o.num_kv_heads, o.head_dim
        self.attention_norm = RMSNorm(o.width, o.norm_eps)
        self.qkv = nn.Linear(o.width, (o.num_heads + 2 * o.num_kv_heads) * o.head_dim, bias=False)
        self.attention_out = nn.Linear(o.num_heads * o.head_dim, o.width, bias=False)
        self.ffn_norm = RMSNorm(o.width, o.norm_eps)
        self.gate_up = nn.Linear(o.width, 2 * o.ffn_width, bias=False)
        self.down = nn.Linear(o.ffn_width, o.width, bias=False)

    def attend(self, q, k, v):
        """q [B, T, H, D]; k, v [B, T, Hkv, D] -> [B, T, H, D]."""
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True,
                                             enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        H, Hkv, D = self.heads, self.kv_heads, self.head_dim
        q, k, v = self.qkv(self.attention_norm(x)).view(B, T, H + 2 * Hkv, D).split((H, Hkv, Hkv), dim=2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        x = x + self.attention_out(self.attend(q, k, v).reshape(B, T, H * D))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """make_block: the block of a layer, from the options and the layer's number."""

    def __init__(self, o, make_block):
        super().__init__()
        self.recompute = o.recompute == "block"
        self.embedding = nn.Embedding(o.vocab_size, o.width)
        self.blocks = nn.ModuleList(make_block(o, layer) for layer in range(o.num_layers))
        self.final_norm = RMSNorm(o.width, o.norm_eps)
        self.classifier = nn.Linear(o.width, o.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes_residual = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * o.num_layers) if writes_residual else 0.02)
        if o.tied_embeddings == "true":
            self.classifier.weight = self.embedding.weight

    def head(self, x, targets):
        logits = self.classifier(self.final_norm(x))
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.view(-1))

    def forward(self, tokens, targets, cos, sin):
        # Autocast leaves the embedding in float32; the residual stream is bf16, as in train_gpt.
        x = self.embedding(tokens).to(torch.bfloat16)
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin)
        return self.head(x, targets)


def add_arguments(parser):
    parser.add_argument("--num_layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--num_heads", type=int, default=8)
    parser.add_argument("--num_kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--ffn_width", type=int, default=1536)
    parser.add_argument("--vocab_size", type=int, default=256)
    parser.add_argument("--tied_embeddings", choices=("true", "false"), default="false")
    parser.add_argument("--norm_eps", type=float, default=1e-5)
    parser.add_argument("--rope_theta", type=float, default=10000.0)
    parser.add_argument("--seq_len", type=int, default=8192)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="timed steps; the median counts")
    parser.add_argument("--warmup_steps", type=int, default=3)
    parser.add_argument("--compile", choices=("block", "model", "block_alone", "none"), default="block",
                        help="what torch.compile gets: each block and the head, the whole model, each block (the head "
                             "then has all tokens' logits in float32), or nothing")
    parser.add_argument("--recompute", choices=("none", "block"), default="none",
                        help="block: the backward computes each block's forward again, from its input")


def train(o, make_block):
    """Trains on random tokens; returns what is printed, as a dictionary. o: the options of add_arguments."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda")
    with device:
        model = Llama(o, make_block)
        frequencies = o.rope_theta ** (-torch.arange(0, o.head_dim, 2, dtype=torch.float64) / o.head_dim)
        angles = torch.outer(torch.arange(o.seq_len, dtype=torch.float64), frequencies)[:, None, :]
        cos, sin = angles.cos().float(), angles.sin().float()
        tokens = torch.randint(o.vocab_size, (o.batch_size, o.seq_len + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if o.compile in ("block", "block_alone"):
        for block in model.blocks:
            block.compile()
    if o.compile == "block":
        model.head = torch.compile(model.head)
    elif o.compile == "model":
        model.compile()
    decays = lambda p: p.dim() == 2 and p is not model.embedding.weight  # which is the classifier's, too, when tied
    decayed = [p for p in model.parameters() if decays(p)]
    other = [p for p in model.parameters() if not decays(p)]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
                                  lr=1e-4, betas=(0.9, 0.95), fused=True)
    times, losses = [], []
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        for step in range(o.warmup_steps + o.steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(inputs, targets, cos, sin)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if step >= o.warmup_steps:
                times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    return {
        "tokens_per_second": o.batch_size * o.seq_len / seconds,
        "ms": 1e3 * seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "device": torch.cuda.get_device_name(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    print(json.dumps(train(parser.parse_args(), lambda o, layer: Block(o))))


if __name__ == "__main__":
    main()
