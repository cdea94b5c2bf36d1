#!/usr/bin/env bash
# The same thing in small, on a machine without a GPU: two processes that share every layer, for 20 steps of mock data.
#
#   launch/two_cpu_processes.sh [FLAGS OF MEGATRON-LM…]
#
# It trains examples/pretrain.py, or what SCRIPT names: SCRIPT=$MEGATRON/pretrain_gpt.py is the true one.
# With --exit-interval 10 it stops after ten steps; started again, it goes on from there, as a job that is queued again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron asks for it wherever tensor parallelism is on

OUTPUT=${OUTPUT:-results/launch/two_cpu_processes}
SCRIPT=${SCRIPT:-examples/pretrain.py}
TRAIN_ITERS=20
mkdir -p "$OUTPUT"

# A base of width 64 and a target four times as wide: stands for the proxy of a search and the model to train.
model_file() { # model_file WIDTH
  printf '%s\n' 'num_layers: 2' "hidden_size: $1" "num_attention_heads: $(($1 / 32))" 'vocab_size: 1023' \
    'seq_length: 64' 'transformer_impl: local'
}
model_file 64 >"$OUTPUT/base.yaml"
model_file 256 >"$OUTPUT/target.yaml"
RECIPE=$OUTPUT/example.recipe.yaml
[ -e "$RECIPE" ] || mup-megatron recipe --base "$OUTPUT/base.yaml" --lr 0.004 --lr-warmup-fraction 0.1 -o "$RECIPE"

data=(--mock-data --tokenizer-type NullTokenizer)
batch=(--micro-batch-size 2 --global-batch-size 8 --train-iters "$TRAIN_ITERS")
layout=(--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer)
checkpoints=(--save "$OUTPUT/checkpoints" --load "$OUTPUT/checkpoints" --save-interval 10 --ckpt-format torch_dist)
logging=(--log-interval 1 --eval-interval 1000 --eval-iters 1)
cpu=( # what needs a GPU
  --distributed-backend gloo --disable-gloo-process-groups --use-cpu-initialization --num-workers 0
  --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
  --no-bias-dropout-fusion --no-bias-gelu-fusion
)

printed=$(mup-megatron args "$OUTPUT/target.yaml" --recipe "$RECIPE" --train-iters "$TRAIN_ITERS")
# shellcheck disable=SC2206 # into words, none of which is a pattern
model=($printed --mup-recipe "$RECIPE")

exec torchrun --standalone --nproc-per-node 2 -m mup_megatron.launch "$SCRIPT" \
  "${model[@]}" "${data[@]}" "${batch[@]}" "${layout[@]}" "${checkpoints[@]}" "${logging[@]}" "${cpu[@]}" "$@"
