#!/usr/bin/env bash
# A run on several machines under SLURM, one task for each GPU:
#
#     sbatch tools/slurm.sh --config configs/7b_full.py --output-dir /shared/runs ...
#
# Two minutes before its time is up, or when it is preempted, SLURM sends SIGTERM: the run saves and
# ends with status 143, and the job queues itself again, to go on with the same command. Edit what
# follows for your cluster; --partition, --account and --time can be given to sbatch as well.
#SBATCH --job-name=llava_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=llava_jax-%j.log
set -uo pipefail
trap : TERM                                            # this script waits for srun all the same
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # which srun does not take over by itself

# JAX gives each task the GPU that has its number on its machine, so each must see them all: no
# --gpus-per-task, which would hide the others.
srun --wait=120 python -m llava_jax.train "$@"
status=$?

# 143 is 128 + SIGTERM: saved, and not finished.
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
