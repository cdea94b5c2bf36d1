#!/usr/bin/env bash
# Trains a GPT-3 model with Megatron-LM's own pretrain_gpt.py, on GPUs. μP is what stands under "The one thing added".
#
#   launch/gpt3.sh SIZE [--dry-run] [FLAGS OF MEGATRON-LM…]       SIZE: see layouts.txt, which also has layout and batch
#
# Flags go behind the ones below and so win over them. --dry-run or DRY_RUN=1 prints the command line and starts nothing.
# It runs once on each node. On more than one, each has its NODE_RANK and all the same MASTER_ADDR; slurm.sh does that.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root model_file=$root/configs/models/gpt3_${1:-}.yaml
# shellcheck source=layout.sh
source "$root/launch/layout.sh"

size=${1:-}
read_layout "$size"
shift
if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi

# What you have to set

require MEGATRON "the folder of your Megatron-LM checkout, core_v0.16 to core_v0.19"
require RECIPE "the recipe with the hyperparameters: what mup-megatron transfer wrote, or configs/recipes/gpt3_6.7b.recipe.yaml"
require DATA_PATH "the training data as Megatron-LM's --data-path takes it: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX …"
require VOCAB_FILE "gpt2-vocab.json of the GPT-2 tokenizer that the data was made with"
require MERGE_FILE "gpt2-merges.txt of the same tokenizer"

# What you may set

OUTPUT=${OUTPUT:-results/gpt3_$size}   # checkpoints, TensorBoard, the index of the data. Shared between the nodes
SAVE_INTERVAL=${SAVE_INTERVAL:-500}    # steps: at most so many are lost when a node fails
MASTER_PORT=${MASTER_PORT:-29500}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
if [ "$NODES" -eq 1 ] || [ "${DRY_RUN:-0}" = 1 ]; then
  NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-localhost}
fi
require NODE_RANK "this node's number from 0 to $((NODES - 1)), for $size runs on $NODES nodes. launch/slurm.sh sets it"
require MASTER_ADDR "the address of node 0, the same on all $NODES nodes. launch/slurm.sh sets it"
[ "${DRY_RUN:-0}" = 1 ] || [ -f "$MEGATRON/pretrain_gpt.py" ] || fail "MEGATRON=$MEGATRON has no pretrain_gpt.py"

read -r -a prefixes <<<"$DATA_PATH"
data=(
  --data-path "${prefixes[@]}"
  --split '989,10,1'
  --data-cache-path "$OUTPUT/data_cache"
  --tokenizer-type GPT2BPETokenizer
  --vocab-file "$VOCAB_FILE"
  --merge-file "$MERGE_FILE"
)

batch=(
  --micro-batch-size "$MICRO"
  --global-batch-size "$GLOBAL"
  --train-iters "$TRAIN_ITERS"
)

layout=(
  --tensor-model-parallel-size "$TP"
  --pipeline-model-parallel-size "$PP"
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
  --bf16
)
[ "$TP" -eq 1 ] || layout+=(--sequence-parallel)
[ "$VPP" -eq 1 ] || layout+=(--num-virtual-stages-per-pipeline-rank "$VPP")
case $RECOMPUTE in
  none) ;;
  selective) layout+=(--recompute-granularity selective) ;;
  full) layout+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1) ;;
  *) fail "layouts.txt: recompute is none, selective or full, not $RECOMPUTE" ;;
esac

# The same folder for both: what is there is gone on with, and in an empty one the run begins.
checkpoints=(
  --save "$OUTPUT/checkpoints"
  --load "$OUTPUT/checkpoints"
  --save-interval "$SAVE_INTERVAL"
  --ckpt-format torch_dist
)

logging=(
  --log-interval 10
  --log-throughput
  --tensorboard-dir "$OUTPUT/tensorboard"
  --eval-interval 1000
  --eval-iters 10
)

# The one thing added: the script is started through mup_megatron.launch with a recipe. Shape, hyperparameters and
# schedule come from the model file and the recipe instead of being written down here.

launcher=(-m mup_megatron.launch)
printed=$(mup-megatron args "$model_file" --recipe "$RECIPE" --train-iters "$TRAIN_ITERS")
# shellcheck disable=SC2206 # into words, none of which is a pattern
model=($printed --mup-recipe "$RECIPE")

# One launcher per node, which starts one process per GPU and ends them all when one of them fails.

command=(
  torchrun
  --nnodes "$NODES"
  --nproc-per-node "$GPUS_PER_NODE"
  --node-rank "$NODE_RANK"
  --master-addr "$MASTER_ADDR"
  --master-port "$MASTER_PORT"
  "${launcher[@]}"
  "$MEGATRON/pretrain_gpt.py"
  "${model[@]}" "${data[@]}" "${batch[@]}" "${layout[@]}" "${checkpoints[@]}" "${logging[@]}" "$@"
)

# With tensor parallelism, communication and computation overlap only if kernels reach the GPU in the order of their launch.
export CUDA_DEVICE_MAX_CONNECTIONS=1
if [ "${DRY_RUN:-0}" = 1 ]; then
  printf 'CUDA_DEVICE_MAX_CONNECTIONS=1'
  printf ' %q' "${command[@]}"
  printf '\n'
  exit 0
fi
exec "${command[@]}"
