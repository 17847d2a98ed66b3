#!/usr/bin/env bash
# Trains on several GPUs of one or more machines with Open MPI, one process a GPU.
#   scripts/mpirun_train.sh N [MPIRUN_FLAG ...] -- FLAG ...       N: ranks; FLAG: of train_gpt
#   scripts/mpirun_train.sh 8 -- --context_parallel 8 --config run.toml
#   scripts/mpirun_train.sh 16 --hostfile hosts -- --context_parallel 8 --config run.toml     hosts: 'node1 slots=8' lines
# A rank that fails ends the job; start it again with --resume, on as many GPUs as there are then.
# Relative paths are from the repository's folder, where this goes first.
set -euo pipefail
unset CDPATH # which cd would follow
cd "$(dirname "$0")/.."
case ${1:-} in
'' | 0* | -h | --help | *[!0-9]*) sed -n 's/^#   //p' "$0"; exit 2 ;;
esac
ranks=$1
shift
mpi_flags=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    mpi_flags+=("$1")
    shift
done
[ $# -gt 0 ] && shift

make -s train_gpt
# Not bound to a core each: reading data and writing checkpoints use several threads. NCCL's settings reach all machines.
[ "$(id -u)" -eq 0 ] && mpi_flags+=(--allow-run-as-root)
for variable in $(env | sed -n 's/^\(NCCL_[A-Z0-9_]*\)=.*/\1/p'); do
    mpi_flags+=(-x "$variable")
done
# Ctrl-C ends mpirun's ranks within seconds, before a long step is over: they get SIGUSR1 instead, which it passes on, and
# finish the step and write a checkpoint.
set -m
mpirun -np "$ranks" --bind-to none "${mpi_flags[@]}" ./train_gpt "$@" </dev/null &
job=$!
trap 'kill -USR1 $job' INT TERM HUP USR1
status=0
while true; do
    wait $job && status=0 || status=$?
    kill -0 $job 2>/dev/null || break
done
exit $status
