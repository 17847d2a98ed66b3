#!/usr/bin/env python3
"""Gradients of the first step of two runs, tensor by tensor, as their checkpoints of step 1 hold them: AdamW's exp_avg is
then (1 - beta1) times the gradient, unclipped with --max_grad_norm 0. Whole or in the pieces of several ranks.

    dev/test/compare_gradients.py CHECKPOINT OTHER LIMIT

Exits 1 where a tensor of OTHER is missing or differs by more than LIMIT, norm of the difference by norm of the gradient. Both
runs round what they store to bf16 (2^-9 of each value), other ranks at other places; how much of that is left in a gradient,
a sum of thousands of such values, dev/RESULTS.md says. A sum that lacks one of two ranks, or has it twice, is off by about
half or more, as is a wrong factor; one that lacks a row of a thousand, by about 3 %."""
import array
import glob
import json
import math
import os
import re
import struct
import sys


def read_gradients(folder):
    """{tensor: values}, of the state files' exp_avg."""
    pieces = {}
    for path in sorted(glob.glob(os.path.join(folder, "optimizer*.safetensors"))):
        with open(path, "rb") as file:
            header_bytes, = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
            for name, entry in header.items():
                match = re.fullmatch(r"(.*)\[(\d+):\d+\]", name)
                tensor, first = (match[1], int(match[2])) if match else (name, 0)
                if tensor.endswith(".exp_avg"):
                    begin, end = entry["data_offsets"]
                    file.seek(8 + header_bytes + begin)
                    values = array.array("f")
                    values.frombytes(file.read(end - begin))
                    pieces.setdefault(tensor, []).append((first, values))
    gradients = {}
    for tensor, parts in pieces.items():
        gradients[tensor] = array.array("f")
        for first, values in sorted(parts, key=lambda part: part[0]):
            if first != len(gradients[tensor]):
                sys.exit(f"FAIL {folder}: {tensor} has no element {len(gradients[tensor])}")
            gradients[tensor].extend(values)
    return gradients


def main():
    ours, theirs = [read_gradients(folder) for folder in sys.argv[1:3]]
    limit = float(sys.argv[3])
    worst, worst_tensor, good = 0.0, "none", bool(ours) and ours.keys() == theirs.keys()
    for tensor in ours.keys() & theirs.keys():
        x, y = ours[tensor], theirs[tensor]
        norm = math.sqrt(math.fsum(b * b for b in y))
        distance = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(x, y)))
        comparable = len(x) == len(y) and norm > 0.0 and distance < math.inf  # of NaN neither is true
        difference = distance / norm if comparable else math.inf
        if difference > worst:
            worst, worst_tensor = difference, tensor
    good = good and worst <= limit
    print(f"{len(ours)} gradients, the one that differs most: {worst_tensor} by {worst:.4f}, of {limit} at most")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
