#!/usr/bin/env bash
# Trains with the `deepspeed` launcher, on one node or on those of a hostfile. μP is what stands under "The one thing added".
#
#   launch/deepspeed.sh [--dry-run] [ARGUMENTS OF THE SCRIPT…]
#
# It is started on one node, and the launcher starts the others by ssh; or without ssh once on each node, with its own
# NODE_RANK and the MASTER_ADDR of all. --dry-run or DRY_RUN=1 writes the configuration, prints the command line and
# starts nothing. In small, on a machine without a GPU:
#
#   DS_ACCELERATOR=cpu SLOTS=2 MODEL=examples/deepspeed_gpt2/gpt2_256.json BATCH=16 \
#     RECIPE=examples/deepspeed_gpt2/gpt2.recipe.yaml TRAIN_ITERS=100 launch/deepspeed.sh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
[ ! -d .venv/bin ] || export PATH="$root/.venv/bin:$PATH"

fail() {
  echo "deepspeed.sh: $*" >&2
  exit 2
}
require() { # require NAME MEANING
  [ -n "${!1:-}" ] || fail "set $1: $2"
}

if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi

# What you have to set

require MODEL "the model's configuration, a Hugging Face config.json"
require RECIPE "the recipe with the hyperparameters, tuned on a narrower model of the same kind"
require TRAIN_ITERS "length of the run in steps; the recipe's schedule is in fractions of it"
require BATCH "sequences in a step, over all GPUs"

# What you may set

SCRIPT=${SCRIPT:-examples/deepspeed_gpt2/train.py} # takes --model and --deepspeed_config, and knows nothing of μP
DATA=${DATA:-}                                     # handed to the script as --data, if set
HOSTFILE=${HOSTFILE:-}                             # as launch/hostfile. Without one: this node alone
NODE_RANK=${NODE_RANK:-}                           # without ssh: this node's number in the hostfile, from 0
MASTER_PORT=${MASTER_PORT:-29500}
SLOTS=${SLOTS:-}                                   # processes on a node. Default: as many as it has GPUs
ZERO_STAGE=${ZERO_STAGE:-2}
MICRO_BATCH=${MICRO_BATCH:-}                       # sequences at a time on a GPU. Default: the batch in one go
BF16=${BF16:-0}                                    # 1: train in bf16
OUTPUT=${OUTPUT:-results/launch/deepspeed}         # the configuration. Shared between the nodes

# By ssh the launcher hands on the variables that begin with NCCL, PYTHON, MV2, UCX or MLFLOW; others go into the file
# .deepspeed_env.

where=()
if [ -n "$HOSTFILE" ]; then
  [ -f "$HOSTFILE" ] || fail "HOSTFILE=$HOSTFILE: no such file. launch/hostfile shows one"
  where+=(--hostfile "$HOSTFILE")
else
  where+=(--hostfile "") # else a /job/hostfile would be taken
fi
if [ -n "$NODE_RANK" ]; then
  require HOSTFILE "the hostfile in which this node has the NODE_RANK"
  require MASTER_ADDR "the address of node 0, the same on all nodes"
  where+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
fi
where+=(--master_port "$MASTER_PORT")
[ -z "$SLOTS" ] || where+=(--num_accelerators "$SLOTS")

# The one thing added: the configuration, with the recipe in its entry "mup", is written by mup-megatron; and the script
# is started through mup_megatron.launch, which ends the run if an engine has no such entry.

config=$OUTPUT/ds.json
write=(
  mup-megatron ds-config "$MODEL" --recipe "$RECIPE"
  --train-iters "$TRAIN_ITERS"
  --global-batch-size "$BATCH"
  --zero-stage "$ZERO_STAGE"
  --output "$config" --force
)
[ -z "$MICRO_BATCH" ] || write+=(--micro-batch-size "$MICRO_BATCH")
[ "$BF16" = 0 ] || write+=(--bf16)
mkdir -p "$OUTPUT"
"${write[@]}"
if [ "${DS_ACCELERATOR:-}" = cpu ]; then
  # DeepSpeed's own Adam would be compiled first, which takes minutes.
  python - "$config" <<'PYTHON'
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
content = json.loads(path.read_text())
content["optimizer"]["params"]["torch_adam"] = True
path.write_text(json.dumps(content, indent=2) + "\n")
PYTHON
fi
launcher=(--module mup_megatron.launch --deepspeed)

arguments=(--model "$MODEL" --deepspeed_config "$config")
[ -z "$DATA" ] || arguments+=(--data "$DATA")

command=(deepspeed "${where[@]}" "${launcher[@]}" "$SCRIPT" "${arguments[@]}" "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi
exec "${command[@]}"
