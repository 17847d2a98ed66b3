#!/usr/bin/env bash
# scripts/spawn_ranks.sh with ranks that end well, fail, stand still, and are stopped: its status, and that none of them lives on.
set -uo pipefail
export LC_ALL=C # numbers with a decimal point
unset CDPATH # which cd would follow
cd "$(dirname "$0")/../.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

# expect NAME STATUS SECONDS SCRIPT: three ranks of a script end with that status within so many seconds, and are gone.
expect() {
    local name=$1 wanted=$2 limit=$3 start=$SECONDS status pid
    rm -f "$work"/pid*
    printf '#!/usr/bin/env bash\necho $$ >"%s/pid$LLMC_RANK"\n%s\n' "$work" "$4" >"$work/rank.sh"
    SPAWN_GRACE=2 timeout -s KILL 60 scripts/spawn_ranks.sh 3 bash "$work/rank.sh" >"$work/out" 2>&1
    status=$?
    for pid in $(cat "$work"/pid*); do
        if kill -0 "$pid" 2>/dev/null; then
            echo "FAIL $name: a rank lives on"
            kill -9 "$pid"
            failed=1
        fi
    done
    if [ $status -eq "$wanted" ] && [ $((SECONDS - start)) -le "$limit" ] && [ "$(ls "$work"/pid* | wc -l)" -eq 3 ]; then
        echo "ok   $name: status $status after $((SECONDS - start)) s"
    else
        echo "FAIL $name: status $status after $((SECONDS - start)) s, not $wanted within $limit"
        sed 's/^/     /' "$work/out"
        failed=1
    fi
}
# shellcheck disable=SC2016 # the ranks' own variables
{
    expect "all end" 0 5 '[ $LLMC_WORLD_SIZE = 3 ] && [ -n "$LLMC_RENDEZVOUS" ] && sleep 0.$LLMC_RANK'
    expect "one fails" 7 8 '[ $LLMC_RANK = 1 ] && sleep 0.5 && exit 7; exec sleep 50'
    expect "all fail as what cannot be started does" 127 8 'exit 127'
    expect "one is killed" 137 8 '[ $LLMC_RANK = 2 ] && sleep 0.5 && kill -9 $$; exec sleep 50'
    expect "stopped: each is told once, and may finish" 0 8 \
        'trap "sleep 1; exit 0" TERM; trap "exit 9" INT; [ $LLMC_RANK = 0 ] && sleep 0.5 && kill -TERM $PPID; for i in {1..99}; do sleep 0.1; done; exit 8'
    expect "one stands still" 7 12 '[ $LLMC_RANK = 0 ] && sleep 1 && exit 7; [ $LLMC_RANK = 1 ] && kill -STOP $$; exec sleep 50'
}
exit $failed
