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
# One run under Slurm, requeued until it is finished. Submit from the repository's root:
#
#     sbatch [--nodes=N …] configs/runs/slurm.sh [further flags of train_distributed.py]
#
# The run's flags are in hosts.sh, which srun starts once per node. Two minutes before the time limit Slurm sends USR1
# to this script, since only the script can request a requeue. The script forwards it to srun, torchrun and the trainer,
# which saves and exits; the job is then requeued, and --resume auto resumes. If a node fails or the job is preempted,
# --requeue has the same effect. A run that fails with an error is not restarted.
set -euo pipefail

# This script runs on the first node. Set ADDRESS if the other nodes cannot reach the first of its addresses.
address=${ADDRESS:-$(hostname -I | cut -d ' ' -f 1)}
export NNODES=$SLURM_JOB_NUM_NODES RUN_ID=$SLURM_JOB_ID PORT=$((20000 + SLURM_JOB_ID % 10000))

stopped=
# once: a second USR1 would interrupt the second `wait` too, and the requeue would kill a step that is saving
trap 'stopped=yes; trap "" USR1; kill -USR1 $(jobs -p)' USR1
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 configs/runs/hosts.sh "$address" "$@" &
step=$!
status=0
wait "$step" || status=$?
if [[ $stopped ]]; then # the signal only interrupted `wait`
    status=0
    wait "$step" || status=$?
    [[ $status == 0 ]] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
