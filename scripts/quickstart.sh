#!/usr/bin/env bash
# From a fresh clone to a trained model in one command: installs what is missing, builds, makes a corpus from this
# system's C and C++ headers, trains a small Llama on it, and samples. With an NVIDIA GPU (Ampere or newer) and nvcc the
# GPU trainer runs, otherwise the CPU trainer (about three minutes on two cores).
#   scripts/quickstart.sh [FLAG ...]      flags are handed to the trainer, e.g. --max_steps 1000; --train_data, also in
#                                         the file of --config, trains on other text
# Of a --config file the settings count that this script has no flag for below.
# Relative paths are from the repository's folder, where this goes first.
set -euo pipefail
unset CDPATH # which cd would follow
cd "$(dirname "$0")/.."

scripts/install_dependencies.sh train
# Threads that wait sleep: spinning, they would take the cores from whatever else runs here.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

if scripts/gpu_capabilities.sh >/dev/null && { command -v nvcc || [ -x /usr/local/cuda/bin/nvcc ]; } >/dev/null; then
    trainer=train_gpt
    settings=(--num_layers 6 --width 384 --num_heads 6 --num_kv_heads 6 --head_dim 64 --ffn_width 1024
        --seq_len 1024 --batch_size 16 --max_steps 1000 --learning_rate 1e-3 --warmup_steps 50 --sample_every 500)
else
    trainer=train_gpt_cpu
    settings=(--max_steps 420 --sample_every 210)
fi
echo "== building $trainer"
make -s found "$trainer"

data=()
config=$(printf '%s\n' "$@" | sed -n 's/^--config=//p; /^--config$/ { n; p; }')
if [[ " $*" == *" --train_data"* ]]; then
    echo "== on the text that --train_data names"
elif [ -n "$config" ] && grep -qs '^[[:space:]]*train_data[[:space:]]*=' "$config"; then
    echo "== on the text that train_data in $config names"
else
    echo "== making a corpus"
    [ -s build/corpus.txt ] || scripts/make_corpus.sh build/corpus.txt 16
    data=(--train_data build/corpus.txt)
fi

output=runs/quickstart-$(date +%Y%m%d-%H%M%S)
echo "== training, in $PWD, where the paths and commands below are right"
"./$trainer" "${data[@]}" --output_dir "$output" --eval_every 100 --eval_batches 16 \
    --sample_prompt '#include <' --sample_tokens 200 "${settings[@]}" "$@"
