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
# Two minutes before the time limit SLURM sends SIGTERM: the step is finished and a checkpoint written. Submit the same line
# with --resume to go on, on as many nodes as you like.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this is a batch script: sbatch scripts/slurm_train.sh FLAG ...}"

launch=(srun --kill-on-bad-exit=1)
if ldd ./train_gpt | grep -q libmpi; then
    launch+=(--mpi=pmix)
else # built without MPI: the ranks meet at the first node
    LLMC_RENDEZVOUS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1):$((20000 + SLURM_JOB_ID % 20000))
    export LLMC_RENDEZVOUS
fi
exec "${launch[@]}" ./train_gpt "$@"
