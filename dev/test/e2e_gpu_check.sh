#!/usr/bin/env bash
# scripts/gpu_check.sh in a copy of the sources, with stand-ins for the GPU, the sanitizer and the programs: what its record
# says, what --stale makes of it, what --resume runs, and what it leaves when it is ended. Needs no GPU.
set -uo pipefail
export LC_ALL=C # numbers with a decimal point
unset CDPATH # which cd would follow
cd "$(dirname "$0")/../.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

mkdir -p "$work/tree/dev/cuda" "$work/tree/dev/test" "$work/tree/llmc" "$work/tree/scripts" "$work/bin" "$work/build/dev"
cp scripts/gpu_check.sh "$work/tree/scripts/"
echo "// a kernel" >"$work/tree/llmc/kernel.cuh"
touch "$work/tree/train_gpt.cu" "$work/tree/test_gpt.cu"
# stand_in PATH LINE...: a program of these lines that notes that it ran.
stand_in() {
    local path=$1
    shift
    printf '#!/usr/bin/env bash\necho %s >>"%s/ran"\n' "$(basename "$path")" "$work" >"$work/$path"
    printf '%s\n' "$@" >>"$work/$path"
    chmod +x "$work/$path"
}
# shellcheck disable=SC2016 # the stand-ins' own variables
{
    stand_in bin/nvidia-smi 'case "$*" in -L) echo "GPU 0" ;; *index*) echo 0 ;; *) echo "stand-in, 1.0" ;; esac'
    stand_in bin/compute-sanitizer 'echo "ok   under it"'
    stand_in bin/python3 'echo "ok   random"'
    stand_in tree/dev/test/e2e_train.sh 'echo "ok   trained"'
    stand_in tree/dev/test/e2e_bad_input.sh 'echo "ok   refused"'
    stand_in test_gpt 'echo "ok   model"'
    stand_in build/dev/quick 'echo "ok   quick"'
    stand_in build/dev/silent 'exit ${SILENT_STATUS:-0}'
    stand_in build/dev/slow "echo \$\$ >'$work/slow.pid'" 'sleep ${SLOW:-0}' 'echo "ok   slow"'
    stand_in build/dev/wrong 'echo "ok   one"' '[ -n "${RIGHT:-}" ] || { echo "FAIL another"; exit 1; }'
    stand_in build/dev/attention_timing 'echo "not a check"'
}
export PATH=$work/bin:$PATH BUILD=$work/build BIN=$work/

# gpu_check STATUS TEXT NAME ARGUMENTS...: it ends with that status and a last line that contains TEXT.
gpu_check() {
    local wanted=$1 text=$2 name=$3 status
    shift 3
    : >"$work/ran"
    "$work/tree/scripts/gpu_check.sh" "$@" >"$work/out" 2>&1
    status=$?
    if [ $status -eq "$wanted" ] && [[ $(tail -1 "$work/out") == *"$text"* ]]; then
        echo "ok   $name"
    else
        echo "FAIL $name: status $status, not $wanted, or the last line lacks '$text'"
        tail -5 "$work/out" | sed 's/^/     /'
        failed=1
    fi
}
# expect NAME COMMAND...
expect() {
    local name=$1
    shift
    if "$@"; then echo "ok   $name"; else echo "FAIL $name: $*" && failed=1; fi
}
record=$work/tree/dev/gpu_check.txt
# Whether the slow program is over, within two seconds.
slow_is_over() {
    for _ in {1..20}; do
        kill -0 "$(cat "$work/slow.pid")" 2>/dev/null || return 0
        sleep 0.1
    done
    return 1
}
ran() { sort "$work/ran" | grep -v nvidia-smi | uniq | paste -sd,; }

gpu_check 1 "does not exist" "no record" --stale
gpu_check 1 "2 failed" "a check that fails and one that checks nothing" --no_build --part checks
expect "both are named" grep -q '^checks: FAIL silent: exit 0, 0 ok' "$record"
expect "with how they ended" grep -q '^checks: FAIL wrong: exit 1, 1 ok, 1 FAIL' "$record"
expect "what only times ran not" test "$(ran)" = "e2e_bad_input.sh,e2e_train.sh,python3,quick,silent,slow,test_gpt,wrong"
gpu_check 1 "lacks the sanitizer" "one part alone" --stale
stand_in build/dev/silent 'echo "ok   no more"'
RIGHT=yes gpu_check 0 "10 passed, 0 failed" "what failed, again" --no_build --part checks --resume
expect "and nothing else" test "$(ran)" = "silent,wrong"
gpu_check 0 "31 passed, 0 failed" "the other part, the first kept" --no_build --part sanitizer
expect "under the sanitizer alone" test "$(ran)" = "compute-sanitizer"
gpu_check 0 "31 passed, 0 failed" "a whole record" --stale

# Ended while one check runs: that one and those behind it are left.
SLOW=60 RIGHT=yes timeout 5 "$work/tree/scripts/gpu_check.sh" --no_build --part checks >"$work/out" 2>&1
expect "ended early: what was over is recorded" grep -q '^checks: ok   quick' "$record"
expect "what was not is left" grep -q '^checks: left slow: not run to its end' "$record"
expect "and counted" grep -q '^30 passed, 0 failed, 1 left' "$record"
expect "and has ended" slow_is_over
gpu_check 1 "1 are left" "stale, as something is left" --stale
RIGHT=yes gpu_check 0 "31 passed, 0 failed" "resumed" --no_build --resume
expect "what was left" test "$(ran)" = "slow"

echo "// changed" >>"$work/tree/llmc/kernel.cuh"
gpu_check 1 "have changed" "other sources" --stale
RIGHT=yes gpu_check 0 "10 passed, 0 failed" "of other sources nothing is resumed" --no_build --part checks --resume
expect "all of it ran" test "$(ran)" = "e2e_bad_input.sh,e2e_train.sh,python3,quick,silent,slow,test_gpt,wrong"
exit $failed
