#!/usr/bin/env bash
# The run of the Lighthouse paper (arXiv:2605.06554, Sec. 6.1) as one command: a 530 M parameter Llama at 98304 tokens of
# context: 10000 steps under Lighthouse attention, then 6000 steps of the same weights under dense attention. As in the paper
# the vocabulary has 128256 entries, of which bytes use 258; with --vocab_size 258 it is a model of 268 M parameters. Needs
# 82.6 GiB of a GPU, 62.9 with --recompute norms_and_gate.
#
# What it costs: 16000 steps of 32 sequences of 98304 tokens are 50.3 G tokens. At 100 K tokens/s with Lighthouse and 25 K
# dense, one GPU would need 10000 * 3.15 M / 100 K = 87 hours for the first stage and 210 hours for the second.
#   TRAIN_DATA='corpus/*.txt' scripts/run_530m_98k.sh [FLAG ...]      flags are handed to train_gpt and win
# Relative paths are from the repository's folder, where this goes first.
set -euo pipefail
unset CDPATH # which cd would follow
cd "$(dirname "$0")/.."

: "${TRAIN_DATA:?set TRAIN_DATA to the text files to train on, e.g. TRAIN_DATA='corpus/*.txt'}"
make -s train_gpt
exec ./train_gpt \
    --model lighthouse-530m \
    --train_data "$TRAIN_DATA" \
    --output_dir "${OUTPUT_DIR:-runs/530m_98k}" \
    --seq_len 98304 --batch_size 1 --global_batch 32 \
    --attention lighthouse --lighthouse_levels 3 --lighthouse_pool 4 --lighthouse_topk 1536 \
    --lighthouse_dense_layers 0,1,-2,-1 --lighthouse_steps 10000 \
    --max_steps 16000 --learning_rate 2e-3 --warmup_steps 2000 --schedule cosine \
    --beta1 0.9 --beta2 0.95 --weight_decay 0.1 --max_grad_norm 1.0 \
    --eval_every 250 --checkpoint_every 500 --keep_checkpoints 3 \
    "$@"
