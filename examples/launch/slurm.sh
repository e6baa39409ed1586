#!/usr/bin/env bash
#SBATCH --job-name=kdgqa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# SLURM: one process a node, which finds the others by itself.
#
#   WORKDIR=/shared/runs/uptrain CONFIG=uptrain:model=L/16,recipe=modern sbatch \
#       examples/launch/slurm.sh --config.init=/shared/converted --config.data.data_dir=/shared/data
#
# Two minutes before the time is up, or on preemption, all processes save the same step and end
# with status 143; the job is then put back into the queue and resumes.
set -euo pipefail
: "${WORKDIR:?a directory that all nodes see, or gs://BUCKET/NAME}"
: "${CONFIG:?a name and arguments, such as uptrain:model=L/16,recipe=modern}"

status=0
srun --kill-on-bad-exit=0 kdgqa train --multihost --config "$CONFIG" --workdir "$WORKDIR" "$@" ||
    status=$?
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
