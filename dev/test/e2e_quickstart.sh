#!/usr/bin/env bash
# scripts/quickstart.sh with few steps: it builds, makes its corpus, trains, evaluates, samples, and says where things
# are; and on the text that a settings file names.
#   dev/test/e2e_quickstart.sh
set -euo pipefail
export LC_ALL=C # numbers with a decimal point
unset CDPATH # which cd would follow
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# quickstart FLAG...: its output and its errors in files.
quickstart() { scripts/quickstart.sh "$@" >"$work/out" 2>"$work/err" || { cat "$work/out" "$work/err"; exit 1; }; }
# has PATTERN: a line of the output.
has() { grep -Eq -- "$1" "$work/out" && echo "ok   quickstart prints '$1'" || { echo "FAIL quickstart does not print '$1':"; cat "$work/out"; exit 1; }; }
no_errors() { [ ! -s "$work/err" ] || { echo "FAIL quickstart prints errors:"; cat "$work/err"; exit 1; }; }

quickstart --help # builds: a compiler may warn, e.g. of registers that some GPU lacks
# No more steps of warm-up than steps, of which the trainer would warn.
few=(--max_steps 4 --warmup_steps 1 --eval_batches 1 --sample_tokens 8)
quickstart --output_dir "$work/run" "${few[@]}"
has '^== making a corpus'
has '^step 4/4 [|] loss [0-9]'
has 'validation loss [0-9]+[.][0-9]{6}'
has '^step 4 [|] sample, '
has "^checkpoint +$work/run/step00000004"
has "^metrics +$work/run/metrics.jsonl"
no_errors

head -c 200000 build/corpus.txt >"$work/mine.txt"
echo "train_data = '$work/mine.txt'" >"$work/mine.toml"
quickstart --output_dir "$work/mine" "${few[@]}" --config "$work/mine.toml"
has "^== on the text that train_data in $work/mine.toml names"
has '^train +1 file of bytes, 190002 tokens'
no_errors
