#!/usr/bin/env bash
#SBATCH --job-name=train_gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
#SBATCH --output=train_gpt-%j.log
# Trains on the GPUs of a SLURM job, one process a GPU.
#   sbatch [--nodes=N ...] scripts/slurm_train.sh FLAG ...        FLAG: of train_gpt
#   sbatch --nodes=4 scripts/slurm_train.sh --context_parallel 32 --config run.toml
# Two minutes before the time limit SLURM sends SIGTERM: the step is finished and a checkpoint written. Where a step takes
# longer, ask for more with sbatch --signal=TERM@SECONDS. Submit the same line with --resume to go on, on as many nodes as
# you like.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this is a batch script: sbatch scripts/slurm_train.sh FLAG ...}"
if [ ! -x train_gpt ]; then
    echo "slurm_train: there is no train_gpt in $PWD: submit from the folder where make has built it" >&2
    exit 1
fi

# A rank that fails ends the job. Since 22.05 srun does not take --cpus-per-task from the job by itself; of an
# environment that sbatch was told to leave behind, what is set below must still reach the ranks.
launch=(srun --kill-on-bad-exit=1 --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
if [[ $(ldd ./train_gpt) == *libmpi* && $(srun --mpi=list 2>&1) == *pmix* ]]; then
    launch+=(--mpi=pmix)
else # built without MPI, or a SLURM without PMIx: the ranks meet at the first node
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export LLMC_RENDEZVOUS=${LLMC_RENDEZVOUS:-${nodes[0]}:$((20000 + SLURM_JOB_ID % 10000))}
fi
echo "slurm_train: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST meet ${LLMC_RENDEZVOUS:+at }${LLMC_RENDEZVOUS:-by PMIx}"
exec "${launch[@]}" ./train_gpt "$@"
