#!/usr/bin/env bash
# Whether this machine has a GPU that the kernels run on, of compute capability 8.0 or more: status 0. Where nvidia-smi
# finds none it may say so in words, with status 0 too.
nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
    awk '/^[0-9]+[.][0-9]+$/ && $1 >= 8 { n++ } END { exit !n }'
