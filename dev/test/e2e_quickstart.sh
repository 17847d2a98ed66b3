#!/usr/bin/env bash
# scripts/quickstart.sh with few steps: it builds, makes its corpus, trains, evaluates, samples, and says where things are.
#   dev/test/e2e_quickstart.sh
set -euo pipefail
export LC_ALL=C # numbers with a decimal point
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

scripts/quickstart.sh --output_dir "$work/run" --max_steps 4 --eval_batches 1 --sample_tokens 8 >"$work/out" 2>"$work/err" || {
    cat "$work/out" "$work/err"
    exit 1
}
# has PATTERN: a line of the output.
has() { grep -Eq -- "$1" "$work/out" && echo "ok   quickstart prints '$1'" || { echo "FAIL quickstart does not print '$1':"; cat "$work/out"; exit 1; }; }
has '^step 4/4 [|] loss [0-9]'
has 'validation loss [0-9]+[.][0-9]{6}'
has '^step 4 [|] sample, '
has "^checkpoint +$work/run/step00000004"
has "^metrics +$work/run/metrics.jsonl"
[ ! -s "$work/err" ] || { echo "FAIL quickstart prints errors:"; cat "$work/err"; exit 1; }
