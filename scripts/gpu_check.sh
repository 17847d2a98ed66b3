#!/usr/bin/env bash
# What needs one GPU, in one command, but for several ranks, which dev/test/e2e_ranks.sh trains: the whole model
# against the CPU reference (test_gpt; on a Hopper also as on GPUs before it), the trainer against the
# CPU's on random models (dev/test/random_runs.py), from end to end and on bad input, every kernel variant of dev/cuda
# against its reference, and compute-sanitizer (memcheck, racecheck, initcheck) on small sizes. Programs run side by
# side, on all GPUs. Ends with 'N passed, N failed', and ', N left' where it was ended early, and records GPU, date,
# every program's result and a hash in dev/gpu_check.txt: of the kernels, of the programs that check them, of the
# reference that they are compared with, and of the headers that say how a sequence, the optimizer's state and a model
# are cut up; other host code, and the scripts that test it, are not watched.
#   scripts/gpu_check.sh              build, check, record
#   scripts/gpu_check.sh --no_build   check the programs that are already built, which must be of these sources
#   scripts/gpu_check.sh --part checks|sanitizer   only the checks, or only those under compute-sanitizer; the record keeps
#                                     the other part's results while they are of the same sources
#   scripts/gpu_check.sh --resume     leave out what has passed, by the record, while that is of the same sources
#   scripts/gpu_check.sh --stale      exit 1 when the record lacks a check or is not of these sources (needs no GPU)
#   scripts/gpu_check.sh --hash       print the hash of the sources
# Ended by SIGTERM or SIGINT, it records what was over by then; --resume runs what is left.
# BUILD and BIN say where the programs are, as for make: build/dev/* and ./test_gpt, ./train_gpt, ./train_gpt_cpu unless
# set. JOBS: programs at a time.
set -uo pipefail
unset CDPATH # which cd would follow
cd "$(dirname "$0")/.." || exit 1
record=dev/gpu_check.txt
programs_dir=${BUILD:-build}/dev
# What the published implementation gives, for lighthouse_layer, looked for where test.sh does.
[ -z "${LLMC_GOLDEN_DIR:-}" ] && [ -d ../shared/golden ] && export LLMC_GOLDEN_DIR=../shared/golden
# The programs that take longest under the sanitizer, beside test_gpt.
longest="flash_attention_backward flash_attention_forward lighthouse_select zero context_attention long_context"
test_gpt=${BIN:-./}test_gpt

source_hash() {
    find llmc dev/cuda dev/test train_gpt.cu test_gpt.cu -type f \
        \( -name '*.cuh' -o -name '*.cu' -o -name 'lighthouse_*.h' -o -name 'context_pa*.h' -o -name 'zero_layout.h' \
        -o -name 'model_config.h' -o -name 'parameters.h' -o -name 'adamw_settings.h' -o -name 'bf16_model.h' -o -path 'llmc/reference/*.h' \
        -o -name 'golden_lighthouse.h' -o -name 'ring_emulation.h' -o -name 'random_runs.py' \) |
        LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d' ' -f1
}
recorded_hash() { sed -n 's/^kernel_sources: //p' "$record" 2>/dev/null; }
recorded_results() { sed -n "s/^$1: //p" "$record" 2>/dev/null; }
# count_results ok|FAIL|left: of the record, or what is to become one, on standard input.
count_results() { grep -c "^[a-z]*: $1"; }

build=yes parts="checks sanitizer" resume=no
while [ $# -gt 0 ]; do
    case $1 in
    --no_build) build=no ;;
    --resume) resume=yes ;;
    --part)
        case ${2:-} in
        checks | sanitizer) parts=$2 && shift ;;
        *) echo "--part ${2:-}: there are checks and sanitizer" >&2 && exit 2 ;;
        esac
        ;;
    --hash) source_hash && exit 0 ;;
    --stale)
        again="on a machine with a GPU run scripts/gpu_check.sh"
        [ -f "$record" ] || { echo "stale: $record does not exist; $again"; exit 1; }
        [ "$(recorded_hash)" = "$(source_hash)" ] || { echo "stale: the kernel sources have changed since $record; $again"; exit 1; }
        for part in checks sanitizer; do
            [ -n "$(recorded_results $part)" ] || { echo "stale: $record lacks the $part; $again --part $part"; exit 1; }
        done
        left=$(count_results left <"$record")
        [ "$left" -eq 0 ] || { echo "stale: of $record's checks $left are left; $again --resume"; exit 1; }
        echo "$record is of these kernel sources: $(tail -1 "$record")"
        exit 0
        ;;
    *)
        sed -n 's/^#   //p' "$0"
        [ "$1" = --help ] && exit 0
        exit 2
        ;;
    esac
    shift
done

command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || { echo "no NVIDIA GPU here" >&2; exit 1; }
if [ $build = yes ]; then
    make -j"$(nproc)" "${BIN:-}test_gpt" "${BIN:-}train_gpt" "${BIN:-}train_gpt_cpu" dev || { echo "the build failed" >&2; exit 1; }
fi

log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT
cublas_kernels='cublas|cutlass|xmma|nvjet'
# only_in_cublas LOG: whether all that racecheck has found lies between accesses of cuBLAS's own kernels: some of those
# that it takes for small products synchronise in ways that the tool does not see.
only_in_cublas() {
    local reported
    reported=$(grep -c 'Race reported between' "$1")
    [ "$reported" -gt 0 ] && grep -qE "RACECHECK SUMMARY: $reported hazards? displayed" "$1" &&
        ! grep -A1 'Race reported between' "$1" | grep ' access at ' | grep -qvE " access at (void )?[^ ]*($cublas_kernels)"
}
queue=()  # names of this run's checks, in order
# run_check NAME SECONDS COMMAND...: leaves the program's output in $log/NAME and one line about it in $log/NAME.result.
run_check() {
    local name=$1 limit=$2 start=$SECONDS status counts result
    shift 2
    timeout "$limit" "$@" >"$log/$name" 2>&1 </dev/null &
    # shellcheck disable=SC2064
    trap "kill $! 2>/dev/null; exit 143" TERM INT
    wait $!
    status=$?
    counts="$(grep -c '^ok ' "$log/$name") ok, $(grep -c '^FAIL' "$log/$name") FAIL"
    ! grep -q '^skip ' "$log/$name" || counts+=", $(grep -c '^skip ' "$log/$name") skipped"
    if [ $status -eq 9 ] && only_in_cublas "$log/$name"; then
        status=0
        counts+=" (and $(grep -c 'Race reported between' "$log/$name") hazards inside cuBLAS)"
    fi
    # A program that checked nothing has not passed.
    if [ $status -eq 0 ] && ! grep -q '^FAIL' "$log/$name" && grep -q '^ok ' "$log/$name"; then
        result="ok   $name: $counts, $((SECONDS - start)) s"
    else
        result="FAIL $name: exit $status$([ $status -eq 124 ] && echo " (over $limit s)"), $counts, $((SECONDS - start)) s"
    fi
    echo "$result" >"$log/$name.result"
    {
        echo "$result"
        {
            grep '^skip ' "$log/$name"
            [ "${result:0:2}" = ok ] || {
                grep '^FAIL' "$log/$name" | head -10
                grep -A2 'Race reported between' "$log/$name" | head -24
                tail -10 "$log/$name"
            }
        } | cut -c1-300 | sed 's/^/     /'
    } >"$log/$name.shown"
    cat "$log/$name.shown"
}
# Ends what runs; the script goes on, to record what is over.
ended=no
end_checks() {
    ended=yes
    # shellcheck disable=SC2046
    [ -z "$(jobs -rp)" ] || kill $(jobs -rp) 2>/dev/null
}
trap end_checks TERM INT
# start_check NAME SECONDS COMMAND...: runs it beside the others, at most $jobs at a time, on each GPU in turn.
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}"
start_check() {
    queue+=("$1")
    if [ $resume = yes ] && recorded_results "$part" | grep "^ok   $1:" >"$log/$1.result"; then
        return
    fi
    echo "left $1: not run to its end" >"$log/$1.result"
    while [ $ended = no ] && [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    [ $ended = no ] || return
    CUDA_VISIBLE_DEVICES=${gpus[${#queue[@]} % ${#gpus[@]}]} run_check "$@" &
}
# Every program but those that only time something (NAME_timing).
program_list() {
    for program in "$programs_dir"/*; do
        if [ -x "$program" ] && [ ! -d "$program" ] && [[ $program != *_timing ]]; then echo "$program"; fi
    done
}

cores=$(nproc)
hash=$(source_hash)
[ "$(recorded_hash)" = "$hash" ] || resume=no
declare -A results
for part in $parts; do
    queue=()
    if [ "$part" = checks ]; then
        jobs=${JOBS:-4}  # some take 10 GiB of the GPU's memory
        export OMP_NUM_THREADS=$((cores / jobs > 0 ? cores / jobs : 1))
        start_check test_gpt_memory 100 "$test_gpt" --memory
        wait # it looks at what the whole GPU has free
        start_check test_gpt 500 "$test_gpt"
        if [[ " $(scripts/gpu_capabilities.sh | tr '\n' ' ') " == *' 9.0 '* ]]; then
            for gpu in a100 a10; do start_check "test_gpt_as_$gpu" 500 "$test_gpt" --as $gpu; done
        fi
        random_runs=(python3 dev/test/random_runs.py --gpu "${BIN:-./}train_gpt" --cpu "${BIN:-./}train_gpt_cpu" --jobs 4)
        start_check random_runs 600 "${random_runs[@]}" --runs 24
        start_check random_runs_planted 600 "${random_runs[@]}" --runs 8 --planted
        start_check e2e_train 500 dev/test/e2e_train.sh "${BIN:-./}train_gpt"
        start_check e2e_bad_input 500 dev/test/e2e_bad_input.sh "${BIN:-./}train_gpt"
        for program in $(program_list); do
            start_check "$(basename "$program")" 300 "$program" --check_only
        done
    elif command -v compute-sanitizer >/dev/null; then
        jobs=${JOBS:-$cores}
        export OMP_NUM_THREADS=1
        # What takes longest starts first: the whole part lasts as long as its slowest program.
        sanitized=$({ for name in $longest; do program_list | grep "/$name\$"; done; program_list; } | awk '!seen[$0]++')
        # sanitize TOOL NAME PROGRAM ARGUMENTS...
        sanitize() {
            local tool=$1 name=$2 exclude=()
            shift 2
            # memcheck leaves out float64 references on the GPU and cuBLAS. initcheck must know what they wrote, and
            # under racecheck cuBLAS crashes when it is left out.
            [ "$tool" = memcheck ] && exclude=(--kernel-name-exclude "regex=truth_|$cublas_kernels")
            start_check "${name}_$tool" 900 compute-sanitizer --tool "$tool" "${exclude[@]}" --error-exitcode 9 "$@" --small
        }
        for tool in racecheck initcheck memcheck; do
            for test in gradients bits training; do
                sanitize $tool "test_gpt_$test" "$test_gpt" --part $test
            done
            # On few multiprocessors blocks that stay take several tiles: what may race is the next one's.
            few=()
            [ $tool = racecheck ] && few=(--multiprocessors 3)
            for program in $sanitized; do
                name=$(basename "$program")
                # initcheck does not know what other processes have written.
                [ "$tool $name" = "initcheck peer_copies" ] || sanitize $tool "$name" "$program" --check_only "${few[@]}"
            done
        done
    else
        queue=(compute-sanitizer)
        echo "FAIL compute-sanitizer: not found; it comes with the CUDA toolkit" | tee "$log/compute-sanitizer.result"
    fi
    wait
    for name in "${queue[@]}"; do
        results[$part]+="$part: $(cat "$log/$name.result")"$'\n'
    done
done

# The record: the part that was not run now stays while it is of the same sources. One process at a time writes it.
exec 9<scripts/gpu_check.sh
flock 9
text=""
for part in checks sanitizer; do
    if [ -n "${results[$part]:-}" ]; then
        text+=${results[$part]}
    elif [ "$(recorded_hash)" = "$hash" ]; then
        text+=$(grep "^$part: " "$record" && echo .)
        text=${text%.}
    fi
done
failed=$(count_results FAIL <<<"$text") left=$(count_results left <<<"$text")
{
    echo "kernel_sources: $hash"
    echo "date: $(date -u +%Y-%m-%d)"
    echo "gpu: $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"
    printf '%s' "$text"
    echo "$(count_results ok <<<"$text") passed, $failed failed$([ "$left" -eq 0 ] || echo ", $left left")"
} >"$record.new" && mv "$record.new" "$record"
cat "$record"
[ "$failed" -eq 0 ] && [ "$left" -eq 0 ]
