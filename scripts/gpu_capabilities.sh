#!/usr/bin/env bash
# Prints the compute capabilities, as in 9.0, of this machine's GPUs that the kernels run on, of 8.0 or more; where there
# is none, status 1. Where nvidia-smi finds none it may say so in words, on standard output and with status 0.
nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
    awk '/^[0-9]+[.][0-9]+$/ && $1 >= 8 { print; n++ } END { exit !n }'
