#!/usr/bin/env python3
"""Whether all lanes of a warp come together where they wait for one another, as far as the compiler knows.

    dev/test/check_divergence.py ./train_gpt build/dev/*

Shuffles, votes and warp barriers hang, or give a lane what is not meant for it, where some of their lanes take another
way; no sanitizer sees that. Where ptxas cannot prove that a warp is together before such an instruction it puts a test
and a branch (BRA.DIV). A kernel that has one is either among those below, whose places have been read, or named here.
Needs cuobjdump of the CUDA toolkit ($CUOBJDUMP names one), no GPU. Other compilers prove other things, so the list is
of CUDA 13.0, of sm_80 and sm_90; what was compiled otherwise is not looked at.
"""
import collections
import os
import re
import shutil
import subprocess
import sys

COMPILER, ARCHITECTURES = "13.0", ("sm_80", "sm_90", "sm_90a")

# Kernels whose places have been read, and what makes their lanes come together.
READ = {
    "embedding_backward_range_kernel": "a warp's part of the rows, of which its lanes take 32 at a time; cub's scan",
    "embedding_backward_join_kernel": "what a run touches is the warp's, or read from shared memory by all",
    "lighthouse_select_kernel": "loops whose bounds are the block's",
    "lighthouse_gather_kernel": "a vote of the warp decides for all of it",
    "rmsnorm_backward_kernel": "whether a row is a warp's or a block's is the launch's choice",
    "gemm_hopper_kernel": "__syncwarp, which gathers the warp, in roles of one warp",
    "flash_attention_hopper_forward_kernel": "the warp that stores: what its first lane has read decides for all",
    "flash_attention_hopper_backward_kernel": "__syncwarp in roles of one warp",
    # The naive variants of dev/: a warp is a row, by which it loops and ends.
    "flash_attention_forward_kernel1": "see above",
    "flash_attention_backward_dq_kernel1": "see above",
    "flash_attention_backward_dkv_kernel1": "see above",
}
CUB = "DeviceRadixSort"  # how the names of cub's own begin


def compiler_version():
    """"13.0", of the nvcc at hand; None without one."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.access(nvcc, os.X_OK):
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found and found.group(1)


def divergent_kernels(cuobjdump, program):
    """(number of kernels, {mangled name: number of places}, the other architectures) of a program's machine code."""
    dump = subprocess.run([cuobjdump, "-sass", program], capture_output=True, text=True, check=False).stdout
    places, kernels, others, kernel, counts = collections.Counter(), set(), set(), None, False
    for line in dump.splitlines():
        architecture = re.match(r"\s*code for (\S+)", line)
        function = re.match(r"\s*Function : (\S+)", line)
        if architecture:
            counts = architecture.group(1) in ARCHITECTURES
            others.update([] if counts else [architecture.group(1)])
        elif function:
            kernel = function.group(1)
            kernels.update([kernel] if counts else [])
        elif counts and "BRA.DIV" in line:
            places[kernel] += 1
    return len(kernels), places, others


def is_read(kernel):
    """Whether one of READ is, whole, a name in a mangled one, which has the length of each name before it."""
    return any(re.search(rf"(?<!\d){len(name)}{name}", kernel) for name in READ) or re.search(rf"\d{CUB}", kernel)


def main():
    programs = sys.argv[1:]
    if not programs or programs[0].startswith("-"):
        sys.exit(__doc__)
    cuobjdump = os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump")
    if cuobjdump is None:
        sys.exit("no cuobjdump: it comes with the CUDA toolkit; CUOBJDUMP names one")
    version = compiler_version()
    if version != COMPILER:
        print(f"skip the list is of CUDA {COMPILER}, nvcc here is {version or 'missing'}")
        return 0
    failed = False
    for program in programs:
        number, places, others = divergent_kernels(cuobjdump, program)
        if number == 0 and others:
            print(f"skip {program}: it is of {' and '.join(sorted(others))}, the list of {' and '.join(ARCHITECTURES)}")
            continue
        unread = {kernel: n for kernel, n in places.items() if not is_read(kernel)}
        for kernel, n in sorted(unread.items()):
            print(f"FAIL {program}: {kernel}: {n} places where ptxas cannot prove that a warp is together: read them")
        if number == 0:
            print(f"FAIL {program}: no machine code was found in it")
        elif not unread:
            print(f"ok   {program}: {number} kernels, {len(places)} of them with places that have been read")
        failed = failed or bool(unread) or number == 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
