#!/usr/bin/env bash
# Trains a GPT-3 model with gpt3.sh as a Slurm job, which goes on by itself when its time is over or a node fails.
#
#   export MEGATRON=… RECIPE=… DATA_PATH=… VOCAB_FILE=… MERGE_FILE=…          as for gpt3.sh
#   sbatch --nodes=16 launch/slurm.sh 6.7b [FLAGS OF MEGATRON-LM…]            from the root of this repository
#
# The number of nodes for each size is in layouts.txt; partition and account go on sbatch's command line too.
# DRY_RUN=1 bash launch/slurm.sh SIZE prints what would be started. It needs no Slurm.
#
# One task per node, and in it torchrun, rather than one task per GPU: so the job starts exactly what gpt3.sh starts on
# one machine, ranks, addresses and ports included; and torchrun ends the other GPUs of its node when one fails.
#
#SBATCH --job-name=gpt3-mup
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# Slurm runs a copy of this file from elsewhere; it was submitted from the root of the repository.
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
[ -f "$root/launch/layout.sh" ] || { echo "slurm.sh: submit it from the root of the repository, not from $root" >&2; exit 2; }
cd "$root"
# shellcheck source=layout.sh
source launch/layout.sh

if [ -n "${SLURM_JOB_NUM_NODES:-}" ]; then
  export NNODES=$SLURM_JOB_NUM_NODES
fi
size=${1:-}
read_layout "$size"
shift
export OUTPUT=${OUTPUT:-$root/results/gpt3_$size}

# Half an hour before its time is over the run saves and ends by itself, with exit status 0.
EXIT_MINUTES=${EXIT_MINUTES:-1410}
if [ -n "${SLURM_JOB_END_TIME:-}" ]; then # what sbatch --time asked for, where this Slurm tells
  EXIT_MINUTES=$(((SLURM_JOB_END_TIME - $(date +%s)) / 60 - 30))
  [ "$EXIT_MINUTES" -gt 0 ] || fail "the job has less than half an hour: give sbatch a longer --time"
fi

# When one node fails, the others must not wait for it.
step=(srun --kill-on-bad-exit=1 launch/gpt3.sh "$size" --exit-duration-in-mins "$EXIT_MINUTES" "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '%q ' "${step[@]}"
  printf '\n'
  exec launch/gpt3.sh "$size" --exit-duration-in-mins "$EXIT_MINUTES" "$@"
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node
export MASTER_ADDR MASTER_PORT

iteration() { # the last complete checkpoint's; 0 without one
  cat "$OUTPUT/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0
}

# A failed step ends the job here: what failed would fail again. Slurm itself requeues when it was a node that failed.
before=$(iteration)
"${step[@]}"
after=$(iteration)
echo "slurm.sh: $size is at step $after of $TRAIN_ITERS"
if [ "$after" -lt "$TRAIN_ITERS" ]; then
  [ "$after" -gt "$before" ] || fail "this job got no further than step $before, so it is not queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
