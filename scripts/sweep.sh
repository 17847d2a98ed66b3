#!/usr/bin/env bash
# The ablations of the Lighthouse paper (arXiv:2605.06554) at a size of one's choice: trains the same model with one setting
# of Lighthouse attention varied, each run switched to dense attention at the same step, and prints a table.
#   TRAIN_DATA='corpus/*.txt' scripts/sweep.sh topk|pool|levels|scorer [VALUE,VALUE,...] [FLAG ...]
# FLAGs go to every run and win. STEPS (600), SWITCH (400: the step at which attention becomes dense), SEQ_LEN (32768),
# TRAINER (./train_gpt) and OUTPUT_DIR (runs/sweep_AXIS, which must hold no sweep yet) come from the environment, and as
# FLAGs are refused. The default model has 26 M parameters.
# A value whose geometry SEQ_LEN does not allow is refused by the trainer and listed as such; the others run. A signal
# ends the sweep once the run under way has finished its step and saved; a second one, at once.
#   TRAIN_DATA=build/corpus.txt scripts/sweep.sh topk 256,512,1024 --num_layers 12
# Relative paths are from the repository's folder, where this goes first.
set -uo pipefail
export LC_ALL=C # numbers with a decimal point
unset CDPATH # which cd would follow
cd "$(dirname "$0")/.." || exit 1

usage() { sed -n 's/^#   //p' "$0" >&2; exit 2; }
[ $# -ge 1 ] || usage
axis=$1 && shift
seq_len=${SEQ_LEN:-32768} steps=${STEPS:-600} switch=${SWITCH:-400} trainer=${TRAINER:-./train_gpt}
for name in seq_len steps switch; do
    [[ ${!name} =~ ^[1-9][0-9]{0,8}$ ]] || { echo "sweep: ${name^^} '${!name}': must be a whole number above 0" >&2; exit 2; }
done
[ "$switch" -lt "$steps" ] || { echo "sweep: SWITCH $switch: must be below STEPS $steps, or no step is dense" >&2; exit 2; }
# nearest_topk N: seq_len / N as --lighthouse_topk may be, a multiple of 128.
nearest_topk() { echo $(((seq_len / $1 + 127) / 128 * 128)); }
case $axis in
topk) values=$(nearest_topk 128),$(nearest_topk 64),$(nearest_topk 32) ;;
pool) values=2,4,8 ;;
levels) values=2,3,4 ;;
scorer) values=norm,dilated ;;
*) usage ;;
esac
: "${TRAIN_DATA:?set TRAIN_DATA to the text files to train on, e.g. TRAIN_DATA='corpus/*.txt'}"
if [ $# -ge 1 ] && [[ $1 != --* ]]; then values=$1 && shift; fi
[[ $values =~ ^[A-Za-z0-9_]+(,[A-Za-z0-9_]+)*$ ]] || { echo "sweep: '$values': must be values with commas between them" >&2; exit 2; }
# The table says what these variables say.
for flag in "$@"; do
    case ${flag%%=*} in
    --train_data) variable=TRAIN_DATA ;;
    --seq_len) variable=SEQ_LEN ;;
    --max_steps) variable=STEPS ;;
    --lighthouse_steps) variable=SWITCH ;;
    --output_dir) variable=OUTPUT_DIR ;;
    "--lighthouse_$axis") echo "sweep: $flag: it is what this sweep varies" >&2; exit 2 ;;
    *) continue ;;
    esac
    echo "sweep: ${flag%%=*}: set $variable in the environment instead" >&2
    exit 2
done
output=${OUTPUT_DIR:-runs/sweep_$axis}
for made in table.md ${values//,/ }; do
    [ ! -e "$output/$made" ] || { echo "sweep: $output/$made is there already: move it away, or name another folder with OUTPUT_DIR" >&2; exit 1; }
done
values=$(tr , '\n' <<<"$values" | awk '!seen[$0]++' | paste -sd,) # short sequences have one for several
[ "$trainer" != ./train_gpt ] || make -s train_gpt || exit 1
mkdir -p "$output"

# loss LINE NAME: that number of a line of metrics.jsonl, to four places.
loss() {
    local value
    value=$(grep -o "\"$2\":[^,}]*" <<<"$1" | head -1 | cut -d: -f2)
    if [ -n "$value" ]; then printf '%.4f' "$value"; else printf '%s' -; fi
}

# The trainer has a process group of its own, so that one signal reaches it once, whoever the terminal sends it to.
set -m
job="" signal=""
forward() {
    signal=$1
    [ -z "$job" ] || kill -TERM "$job" 2>/dev/null
}
trap 'forward 1' HUP
trap 'forward 2' INT
trap 'forward 15' TERM

rows="" failed=0 trained=""
for value in ${values//,/ }; do
    run=$output/$value metrics=$output/$value/metrics.jsonl
    echo "== --lighthouse_$axis $value"
    "$trainer" --num_layers 8 --width 512 --num_heads 8 --num_kv_heads 8 --head_dim 64 --ffn_width 1408 \
        --train_data "$TRAIN_DATA" --seq_len "$seq_len" --batch_size 1 --max_steps "$steps" --warmup_steps $((steps / 20)) \
        --learning_rate 1.5e-3 --eval_every "$switch" --eval_batches 8 --sample_tokens 0 --attention lighthouse \
        --lighthouse_levels 3 --lighthouse_pool 4 --lighthouse_topk "$(nearest_topk 64)" --lighthouse_dense_layers 0,-1 \
        --lighthouse_steps "$switch" "--lighthouse_$axis" "$value" --output_dir "$run" --plain "$@" </dev/null >"$run.log" 2>&1 &
    job=$!
    [ -z "$signal" ] || kill -TERM "$job" # it came when there was no job to forward it to
    while true; do
        wait "$job" && status=0 || status=$?
        kill -0 "$job" 2>/dev/null || break # else it was a signal that ended the wait
    done
    job=""
    if [ -n "$signal" ]; then
        echo "sweep: stopped by a signal during --lighthouse_$axis $value; trained to the end: ${trained:-none}; there is no table" >&2
        exit $((128 + signal))
    fi
    # A trainer that got a signal saves and ends well, but before its last step.
    last_step=$(grep -E '"event":"(step|skip)"' "$metrics" 2>/dev/null | tail -1 | grep -o '"step":[0-9]*' | cut -d: -f2)
    if [ $status -ne 0 ] || [ "${last_step:-0}" -ne "$steps" ]; then
        why="stopped at step ${last_step:-0} of $steps"
        [ $status -eq 0 ] || why=$(tail -1 "$run.log")
        failed=$((failed + 1))
        rows+="| $value | $why |"$'\n'
        echo "$why"
        continue
    fi
    trained+=${trained:+, }$value
    sub_sequence=$(sed -n 's/^lighthouse  T [0-9]*, S \([0-9]*\),.*/\1/p' "$run.log" | head -1)
    # Tokens/s: the median of the steps under each attention.
    speed() { grep '"event":"step"' "$metrics" | grep "\"attention\":\"$1\"" | grep -o '"tokens_per_second":[^,}]*' | cut -d: -f2 |
        sort -g | awk '{ a[NR] = $1 } END { if (NR) printf "%.0f", a[int((NR + 1) / 2)]; else print "-" }'; }
    at_switch=$(grep '"event":"validation"' "$metrics" | grep "\"step\":${switch}[,}]" | head -1)
    last=$(grep '"event":"validation"' "$metrics" | tail -1)
    row="| $value | $sub_sequence | $(speed lighthouse) | $(speed dense) | $(loss "$at_switch" loss) |"
    row+=" $(loss "$at_switch" dense_loss) | $(loss "$last" dense_loss) |"
    rows+="$row"$'\n'
    echo "$row"
done

if [ $failed -gt 0 ] && ! grep -q '"event":"step"' "$output"/*/metrics.jsonl 2>/dev/null; then
    echo "sweep: no run trained: there is no table" >&2
    exit 1
fi
{
    echo "Sweep of --lighthouse_$axis at T=$seq_len: $switch steps under Lighthouse attention, $((steps - switch)) under dense."
    echo
    echo "| $axis | S | tokens/s, Lighthouse | tokens/s, dense | validation loss at the switch | the same under dense attention | at the end |"
    echo "|---|---|---|---|---|---|---|"
    printf '%s' "$rows"
} | tee "$output/table.md"
[ $failed -eq 0 ]
