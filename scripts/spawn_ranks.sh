#!/usr/bin/env bash
# Starts N ranks of a program on this machine without MPI, and ends all of them when one fails.
#   scripts/spawn_ranks.sh N PROGRAM [ARGUMENT...]
#   scripts/spawn_ranks.sh 2 ./train_gpt --context_parallel 2 --comm_transport host ...
# Ends with the status of the first rank that failed, or 0. Ranks that do not end when they are told to are killed after
# SPAWN_GRACE seconds (30): one that hangs may be why another failed. For several machines: scripts/slurm_train.sh.
set -uo pipefail
case ${1:-} in
'' | -h | --help | *[!0-9]*) sed -n 's/^#   //p' "$0"; exit 2 ;;
esac
size=$1
shift
LLMC_RENDEZVOUS=$(mktemp -u "${TMPDIR:-/tmp}/llmc_rendezvous.XXXXXXXX")
export LLMC_RENDEZVOUS LLMC_WORLD_SIZE=$size

ranks=()
end_all() { kill -- "${ranks[@]}" 2>/dev/null; }
trap 'end_all; exit 130' INT
trap 'end_all; exit 143' TERM
for ((rank = 0; rank < size; ++rank)); do
    LLMC_RANK=$rank "$@" &
    ranks+=($!)
done
status=0
for ((left = size; left > 0; --left)); do
    wait -n
    ended=$?
    if [ $ended -ne 0 ] && [ $status -eq 0 ]; then
        status=$ended
        echo "spawn_ranks: a rank ended with status $ended; ending the others" >&2
        sleep 1 # for their own words about it
        end_all
        for ((i = 0; i < 10 * ${SPAWN_GRACE:-30}; ++i)); do
            kill -0 -- "${ranks[@]}" 2>/dev/null || break
            sleep 0.1
        done
        kill -9 -- "${ranks[@]}" 2>/dev/null
    fi
done
rm -f "$LLMC_RENDEZVOUS"
exit $status
