#!/usr/bin/env bash
#SBATCH --job-name=gptbert
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#
# One run under Slurm, as many jobs long as it takes, submitted from the repository's root:
#
#     sbatch [--nodes=N …] configs/runs/slurm.sh [further flags of train_distributed.py]
#
# Flags of the run are in hosts.sh, which srun starts once on every node. Two minutes before the time limit Slurm sends
# USR1 to this script, since only the script can ask for a requeue. It goes on to srun, torchrun and the trainer, which
# saves and ends; the same job then waits in the queue again, and --resume auto goes on. Where a node fails or another
# job takes the nodes, --requeue makes Slurm do the same. A run that ends by an error is not started again.
set -euo pipefail

# This script runs on the first node. ADDRESS names that node where the others do not reach the first of its addresses.
address=${ADDRESS:-$(hostname -I | cut -d ' ' -f 1)}
export NNODES=$SLURM_JOB_NUM_NODES RUN_ID=$SLURM_JOB_ID PORT=$((20000 + SLURM_JOB_ID % 10000))

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 configs/runs/hosts.sh "$address" "$@" &
step=$!
stopped=
trap 'stopped=yes; kill -USR1 "$step"' USR1
status=0
wait "$step" || status=$?
if [[ $stopped ]]; then # the signal ended only the waiting
    status=0
    wait "$step" || status=$?
    [[ $status == 0 ]] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
