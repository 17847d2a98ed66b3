#!/usr/bin/env bash
# Starts N ranks of a program on this machine without MPI, and ends all of them when one fails.
#   scripts/spawn_ranks.sh N PROGRAM [ARGUMENT...]
#   scripts/spawn_ranks.sh 2 ./train_gpt --context_parallel 2 --comm_transport host ...
# Ends with the status of the first rank that failed, or 0. Ranks that do not end when they are told to are killed after
# SPAWN_GRACE seconds (30): one that hangs may be why another failed. Ctrl-C, SIGTERM, SIGUSR1 and the end of the
# terminal are passed on once, and the ranks are waited for: they finish their step and write a checkpoint. For several
# machines: scripts/slurm_train.sh.
set -uo pipefail
case ${1:-} in
'' | 0* | -h | --help | *[!0-9]*) sed -n 's/^#   //p' "$0"; exit 2 ;;
esac
[ $# -ge 2 ] || { echo "spawn_ranks: no program: scripts/spawn_ranks.sh N PROGRAM [ARGUMENT...]" >&2; exit 2; }
size=$1
shift
grace=${SPAWN_GRACE:-30}
[[ $grace =~ ^[0-9]{1,6}$ ]] || { echo "spawn_ranks: SPAWN_GRACE '$grace': must be whole seconds" >&2; exit 2; }
if [ $((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1])) -lt 501 ]; then
    echo "spawn_ranks: needs bash 5.1 or newer, this is $BASH_VERSION" >&2
    exit 2
fi
LLMC_RENDEZVOUS=$(mktemp -u "${TMPDIR:-/tmp}/llmc_rendezvous.XXXXXXXX")
export LLMC_RENDEZVOUS LLMC_WORLD_SIZE=$size

set -m # each rank is a process group of its own, which the terminal's Ctrl-C does not reach beside this script
ranks=()
signals=0
send() { for rank in "${ranks[@]}"; do kill "-$1" -- "-$rank" 2>/dev/null; done; }
trap '((++signals)); send INT' INT
trap '((++signals)); send TERM' TERM HUP
trap '((++signals)); send USR1' USR1
for ((rank = 0; rank < size; ++rank)); do
    LLMC_RANK=$rank "$@" </dev/null &
    ranks+=($!)
done
status=0
left=$size
while [ "$left" -gt 0 ]; do
    before=$signals
    wait -n -p ended_rank
    ended=$?
    if [ "$signals" -ne "$before" ] && [ $ended -gt 128 ]; then continue; fi # the signal ended the wait, not a rank
    if [ -z "${ended_rank:-}" ]; then break; fi # none is left; a rank may end with 127 too
    ((--left))
    if [ $ended -ne 0 ] && [ $status -eq 0 ]; then
        status=$ended
        echo "spawn_ranks: a rank ended with status $ended; ending the others" >&2
        sleep 1 # for their own words about it
        send TERM
        send CONT # or one that is stopped would take it when it is killed
        for ((i = 0; i < 10 * 10#$grace; ++i)); do
            [ -n "$(jobs -rp)" ] || break
            sleep 0.1
        done
        send KILL
    fi
done
rm -f "$LLMC_RENDEZVOUS"
exit $status
