#!/bin/bash
# Two nodes of 8 GPUs under Slurm: sbatch config/slurm.sh, in a clone on a disk that both nodes see. Not run.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torchrun would kill its processes 30 s after the signal, before an evaluation and a save may be done
# NCCL_DEBUG=INFO says which network it takes, NCCL_SOCKET_IFNAME names one
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --max-restarts=3 --shutdown_timeout=110 --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d --rdzv_endpoint="$head:29500" train.py config/train_gpt2.py --init_from=auto
