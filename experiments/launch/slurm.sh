#!/bin/bash
# A run over nodes of a Slurm cluster: one process a node, which has all of its GPUs.
#   RUN=/shared/runs/mine sbatch experiments/launch/slurm.sh [flags of grpo-jax train]
# Submit it again to resume. mesh.data x fsdp x tensor is nodes x GPUs of each.
#SBATCH --job-name=grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
set -eu
: "${RUN:?the run directory, on a file system that all nodes share}"
# By default jax gives a Slurm task one GPU.
export JAX_LOCAL_DEVICE_IDS=0,1,2,3

resume=()
if [ -e "$RUN/config.json" ]; then resume=(--resume); fi

# The processes find each other by the variables that srun sets. When one fails, srun ends
# all.
srun --kill-on-bad-exit=1 \
    grpo-jax train --run-dir "$RUN" --mesh.data 2 --mesh.fsdp 4 --mesh.tensor 1 \
    "${resume[@]}" "$@"
