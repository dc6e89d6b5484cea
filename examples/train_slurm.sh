#!/bin/bash
# Two nodes of eight GPUs each: eight networks of two columns, each with its share of the batch.
#
#     sbatch examples/train_slurm.sh STORE
#
# From the root of the repository, on a file system that all nodes see. At the end of its time the
# job saves a checkpoint and queues itself again. It has not been run on a cluster.
#SBATCH --job-name=alexnet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 8))
# Nodes may count restarts differently, so workers that start again get a store of their own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

srun --cpus-per-task "$SLURM_CPUS_PER_TASK" \
    torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "${nodes[0]}:29500" \
    train_alexnet.py --columns 2 --data "$1" --output "runs/$SLURM_JOB_ID" --resume &
step=$!

# Only this shell gets the signal (B:). srun would end the step; scancel passes the signal on to it.
trap 'stopping=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
status=0
wait "$step" || status=$?
if [[ -n ${stopping-} ]]; then
    wait "$step" || true # the first wait ended with the signal; the checkpoint takes longer
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
