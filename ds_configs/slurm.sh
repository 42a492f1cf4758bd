#!/usr/bin/env bash
# Slurm: two machines with four GPUs each; one torchrun on each machine starts its ranks.
#   sbatch ds_configs/slurm.sh --config ds_configs/imagenet.yaml --data_dir /data/imagenet --output_dir /shared/run
# Type it in the folder of the checkout; all that follows goes to train.py. Other numbers: sbatch --nodes 4 ...
# Before the time limit the run saves and stops, the job goes back into the queue, and goes on from there.
# What must be open and shared: docs/multi-node.md.
#SBATCH --job-name=resist_ds
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
# To this shell, 120 s before the limit: a round, a checkpoint and --grace (25 s) fit in.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes%%$'\n'*}
# Other jobs may be on the machine.
port=$((29500 + SLURM_JOB_ID % 1000))
# Where the machines have several networks, the one to use:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
[ -d .venv ] && PATH=$PWD/.venv/bin:$PATH

# Every torchrun gets a SIGTERM and passes it on to its ranks, which finish the round and save. By scancel, which
# signals the steps and not this shell: srun itself takes a SIGTERM for the order to kill them.
limit=
step=
trap 'limit=1; [ -z "$step" ] || scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# --shutdown_timeout: what torchrun leaves its ranks after a signal; keep it above --grace.
# In the background: else this shell would hear of no signal before the end.
srun torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" --rdzv_id "$SLURM_JOB_ID" \
  --rdzv_backend c10d --rdzv_endpoint "$first:$port" --shutdown_timeout 60 \
  train.py --resume auto "$@" &
step=$!
wait "$step"
code=$?
if [ -n "$limit" ]; then
  # a signal ends a wait
  wait "$step"
  code=$?
  # 0: the run was complete. Else it has stopped (and after an error it stops again at once, and for good).
  if [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
