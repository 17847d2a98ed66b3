#!/usr/bin/env bash
# The GPU programs on a machine without a GPU: --help works, and a run ends with one sentence and a non-zero status.
set -euo pipefail
unset CDPATH # which cd would follow
cd "$(dirname "$0")/../.."
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo "this machine has a GPU, so this tests nothing"
    exit 1
fi
for program in ./train_gpt ./test_gpt; do [ -x $program ] || { echo "$program is not built: make cuda"; exit 1; }; done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
./train_gpt --help >"$work/help"
grep -q -- '--seq_len' "$work/help"

head -c 100000 /dev/urandom >"$work/data.txt"
status=0
./train_gpt --train_data "$work/data.txt" --output_dir "$work/run" --max_steps 1 >"$work/out" 2>"$work/err" || status=$?
[ $status -ne 0 ] || { echo "train_gpt without a GPU exited 0"; exit 1; }
[ "$(wc -l <"$work/err")" -eq 1 ] || { echo "expected one line on stderr:"; cat "$work/err"; exit 1; }
grep -qi 'gpu' "$work/err" || { echo "the sentence does not name the GPU:"; cat "$work/err"; exit 1; }
echo "ok   train_gpt without a GPU: $(cat "$work/err")"

status=0
./test_gpt >"$work/out" 2>"$work/err" || status=$?
[ $status -ne 0 ] || { echo "test_gpt without a GPU exited 0"; exit 1; }
[ "$(wc -l <"$work/err")" -eq 1 ] || { echo "expected one line on stderr:"; cat "$work/err"; exit 1; }
grep -qi 'gpu' "$work/err" || { echo "the sentence does not name the GPU:"; cat "$work/err"; exit 1; }
echo "ok   test_gpt without a GPU: $(cat "$work/err")"

status=0
./train_gpt --fit --model lighthouse-530m >"$work/out" 2>"$work/err" || status=$?
[ $status -ne 0 ] && grep -q -- '--gpu_memory' "$work/err" || { echo "--fit alone: exit $status"; cat "$work/out" "$work/err"; exit 1; }
echo "ok   --fit without a GPU: $(cat "$work/err")"

if [ $((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1])) -lt 501 ]; then
    echo "skip several ranks: scripts/spawn_ranks.sh needs bash 5.1, this is $BASH_VERSION"
    exit 0
fi
status=0
scripts/spawn_ranks.sh 2 ./train_gpt --train_data "$work/data.txt" --device 1 --max_steps 1 >"$work/out" 2>"$work/err" || status=$?
[ $status -ne 0 ] && grep -q -- '--device is for one process, and there are 2 ranks' "$work/err" || { echo "--device of two ranks: exit $status"; cat "$work/out" "$work/err"; exit 1; }
echo "ok   --device of two ranks: $(grep -m1 -- --device "$work/err")"
