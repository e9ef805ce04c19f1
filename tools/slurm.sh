#!/usr/bin/env bash
# Trains on several machines under SLURM, with one task for each GPU:
#
#     sbatch tools/slurm.sh --config configs/7b_full.py --output-dir /shared/runs ...
#
# SLURM sends SIGTERM two minutes before the time limit, or if it preempts the job. The run then
# saves a checkpoint and ends with status 143, and the job puts itself into the queue again and
# continues with the same command. Edit the following lines for your cluster; --partition, --account
# and --time can also be given to sbatch.
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
trap : TERM                                            # SIGTERM must not end this script
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun does not read SLURM_CPUS_PER_TASK

# JAX selects the GPU of a task by the task's index on its machine, so each task must see all GPUs
# of the machine. The option --gpus-per-task would hide the other GPUs.
srun --wait=120 python -m llava_jax.train "$@"
status=$?

# 143 is 128 + SIGTERM: the run has saved a checkpoint but is not finished.
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
