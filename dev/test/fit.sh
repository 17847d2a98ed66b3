#!/usr/bin/env bash
# train_gpt --fit for a GPU of a given size, which none need have: what it says fits does, and a step more does not.
set -euo pipefail
export LC_ALL=C # numbers with a decimal point
unset CDPATH # which cd would follow
cd "$(dirname "$0")/../.."
[ -x train_gpt ] || { echo "./train_gpt is not built: make cuda"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

launcher=()
fit() { "${launcher[@]}" ./train_gpt --fit --model lighthouse-530m --host_memory 100 "$@"; }
status=0
fit --gpu_memory 80 --attention lighthouse --lighthouse_topk 12800000 >"$work/out" 2>"$work/err" || status=$?
[ $status -ne 0 ] && grep -q -- '--lighthouse_topk 12800000: .*the nearest that works is' "$work/err" || { echo "a budget that no sequence holds: exit $status"; cat "$work/out" "$work/err"; exit 1; }
echo "ok   a budget that no sequence holds: $(cat "$work/err")"

# The shortest sequence of the geometry is 24576, which 5 does not divide.
fit --gpu_memory 80 --batch_size 1 --attention lighthouse --lighthouse_scorer dilated --lighthouse_dilation 5 >"$work/out" 2>"$work/err" &&
    grep -q -- '--recompute none' "$work/out" || { echo "--fit with a dilation: failed"; cat "$work/out" "$work/err"; exit 1; }
echo "ok   --fit with a dilation, without --seq_len"

status=0
fit --gpu_memory 80 >/dev/full 2>"$work/err" || status=$?
[ $status -ne 0 ] && grep -q 'the output cannot be written' "$work/err" || { echo "--fit into a full device: exit $status"; cat "$work/err"; exit 1; }
echo "ok   --fit into a full device: $(cat "$work/err")"

kept=0.5 # GiB of the GPU
lighthouse=(--batch_size 1 --attention lighthouse --lighthouse_levels 4 --lighthouse_pool 4 --lighthouse_topk 1024)
# Of the table: the row of a --recompute, the column of an --offload.
cell() { awk -v row="$1" -v column="$2" '$1 == "--recompute" && $2 == row { print $(column + 2) }' "$work/table"; }
# total TABLE LINE: GiB at the end of the line that begins so: what the plan needs of the GPU, or of the host.
total() { awk -v what="$2" '$0 ~ "^" what { print $(NF) }' "$1"; }
check_fit() { # check_fit NAME UNIT GPU_GIB "OFFLOAD..." FLAG...
    local name=$1 unit=$2 gpu=$3 offloads=$4 column=0
    shift 4
    fit --gpu_memory "$gpu" "$@" >"$work/table"
    for offload in $offloads; do
        column=$((column + 1))
        for recompute in none norms_and_gate all_but_attention block; do
            local T
            T=$(cell $recompute $column)
            [[ $T =~ ^[0-9]+$ && $((T % unit)) -eq 0 ]] || { echo "$name: no length in row $recompute, column $offload"; cat "$work/table"; exit 1; }
            # A sixteenth and an eighth more: longer sequences may need less again.
            for length in "$T" $((T + unit)) $((T + unit + T / 16 / unit * unit)) $((T + unit + T / 8 / unit * unit)); do
                fit --gpu_memory "$gpu" "$@" --print_memory --recompute $recompute --offload $offload --seq_len "$length" >"$work/plan"
                local fits=0
                awk -v gpu="$(total "$work/plan" 'total ')" -v host="$(total "$work/plan" 'host total ')" -v gpu_free="$gpu" \
                    -v kept=$kept 'BEGIN { exit !(gpu <= gpu_free - kept + 1e-4 && host <= 98 + 1e-4) }' && fits=1
                [ $fits -eq $((length == T)) ] || { echo "$name: $length tokens with $recompute, $offload: fits is $fits"; cat "$work/table" "$work/plan"; exit 1; }
            done
        done
    done
    echo "ok   $name: $((4 * column)) longest lengths fit, one step and an eighth more do not: $(tail -1 "$work/table" | tr -s ' ')"
}
check_fit "--fit, dense" 128 40 "none activations optimizer all" --batch_size 2
check_fit "--fit, Lighthouse" 512 79 "none activations optimizer all" "${lighthouse[@]}"
check_fit "--fit, dilated" 384 60 "none activations" --batch_size 1 --attention lighthouse --lighthouse_scorer dilated \
    --lighthouse_dilation 3 --lighthouse_topk 1024 --seq_len 98304
# Where the classifier takes one more chunk, of fewer rows, longer sequences need less.
check_fit "--fit, chunks of logits" 128 12.275 "none activations" --batch_size 1
if [ $((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1])) -lt 501 ]; then
    echo "skip several ranks: scripts/spawn_ranks.sh needs bash 5.1, this is $BASH_VERSION"
    exit 0
fi
kept=2.25 # and NCCL's
# Where attention goes in more parts, too.
launcher=(scripts/spawn_ranks.sh 3)
check_fit "--fit, three ranks on a sequence" 768 40 "none activations" --context_parallel 3 --batch_size 1
launcher=(scripts/spawn_ranks.sh 2)
# As many parts of five sequences, the largest of four, three and two in turn.
check_fit "--fit, two ranks, five sequences" 512 30 "none activations" --context_parallel 2 --context_exchange ring --batch_size 5
check_fit "--fit, two ranks, by heads" 512 40 "none activations" --context_parallel 2 --context_exchange heads --batch_size 1
