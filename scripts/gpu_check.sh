#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the whole model against the CPU reference (test_gpt), every kernel variant of
# dev/cuda against its reference, and compute-sanitizer (memcheck, racecheck, initcheck) on small sizes. Ends with
# 'N passed, N failed' and records GPU, date, the hash of the kernel sources and every program's result in
# dev/gpu_check.txt.
#   scripts/gpu_check.sh              build, check, record
#   scripts/gpu_check.sh --no_build   check the programs that are already built
#   scripts/gpu_check.sh --stale      exit 1 when the recorded hash is not that of the sources (needs no GPU)
#   scripts/gpu_check.sh --hash       print the hash of the sources
set -uo pipefail
cd "$(dirname "$0")/.."
record=dev/gpu_check.txt

source_hash() {
    find llmc dev/cuda train_gpt.cu test_gpt.cu -type f \( -name '*.cuh' -o -name '*.cu' -o -name 'lighthouse_geometry.h' \) |
        LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d' ' -f1
}

build=yes
case ${1:-} in
"") ;;
--no_build) build=no ;;
--hash) source_hash && exit 0 ;;
--stale)
    [ -f "$record" ] || { echo "stale: $record does not exist; run scripts/gpu_check.sh on a machine with a GPU"; exit 1; }
    if [ "$(sed -n 's/^kernel_sources: //p' "$record")" = "$(source_hash)" ]; then
        echo "$record is of these kernel sources"
        exit 0
    fi
    echo "stale: the kernel sources have changed since $record was made; run scripts/gpu_check.sh on a machine with a GPU"
    exit 1
    ;;
*)
    sed -n 's/^#   //p' "$0"
    [ "$1" = --help ] && exit 0
    exit 2
    ;;
esac

command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || { echo "no NVIDIA GPU here" >&2; exit 1; }
if [ $build = yes ]; then
    make -j"$(nproc)" test_gpt dev || { echo "the build failed" >&2; exit 1; }
fi

passed=0 failed=0 results=""
log=$(mktemp -d)
# check NAME SECONDS COMMAND...: runs it, keeps its output, counts it as one check.
check() {
    local name=$1 limit=$2 start=$SECONDS status lines
    shift 2
    timeout "$limit" "$@" >"$log/$name" 2>&1 </dev/null
    status=$?
    lines="$(grep -c '^ok ' "$log/$name") ok, $(grep -c '^FAIL' "$log/$name") FAIL"
    # A program that checked nothing has not passed.
    if [ $status -eq 0 ] && ! grep -q '^FAIL' "$log/$name" && grep -q '^ok ' "$log/$name"; then
        passed=$((passed + 1))
        results+="ok   $name: $lines, $((SECONDS - start)) s"$'\n'
    else
        failed=$((failed + 1))
        results+="FAIL $name: exit $status, $lines, $((SECONDS - start)) s"$'\n'
        { grep '^FAIL' "$log/$name" | head -5; tail -5 "$log/$name"; } | sed 's/^/     /'
    fi
    printf '%s' "$results" | tail -1
}

check test_gpt 300 ./test_gpt
for program in build/dev/*; do
    [ -x "$program" ] && [ ! -d "$program" ] || continue
    check "$(basename "$program")" 120 "$program" --check_only
done
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
        check "test_gpt_$tool" 180 compute-sanitizer --tool $tool --error-exitcode 9 ./test_gpt --small
        for program in build/dev/*; do
            [ -x "$program" ] && [ ! -d "$program" ] || continue
            check "$(basename "$program")_$tool" 120 compute-sanitizer --tool $tool --error-exitcode 9 "$program" --check_only --small
        done
    done
else
    failed=$((failed + 1))
    results+="FAIL compute-sanitizer: not found; it comes with the CUDA toolkit"$'\n'
fi

{
    echo "kernel_sources: $(source_hash)"
    echo "date: $(date -u +%Y-%m-%d)"
    echo "gpu: $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"
    printf '%s' "$results"
    echo "$passed passed, $failed failed"
} >"$record"
cat "$record"
rm -rf "$log"
[ $failed -eq 0 ]
