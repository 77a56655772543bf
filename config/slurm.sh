#!/bin/bash
# Train on two nodes of 8 GPUs under Slurm. Never run.
#     sbatch config/slurm.sh
# Start it in a clone of quill on a disk that both nodes see.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Slurm sends SIGTERM 120 s before the time limit. By default torchrun kills its processes 30 s
# later, perhaps before they have evaluated and saved: --shutdown_timeout gives them 110 s.
# NCCL_DEBUG=INFO shows which network NCCL uses, and NCCL_SOCKET_IFNAME selects one.
# Without this variable, the processes of two nodes cannot find each other after a restart (torch
# 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --max-restarts=3 --shutdown_timeout=110 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head:29500" \
    train.py config/train_gpt2.py --init_from=auto
