#!/usr/bin/env bash
# The target's run of `run.sh --scale tiny`, which sets what is asked for here: a script like Megatron-LM's
# pretrain_gpt.py, through the launcher, in two processes without a GPU. The real one is launch/gpt3.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
: "${RECIPE:?}" "${OUTPUT:?}" "${MODEL:?}" "${DATA:?}" "${GLOBAL:?}" "${TRAIN_ITERS:?}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_DEVICE_MAX_CONNECTIONS=1

printed=$(mup-megatron args "$MODEL" --recipe "$RECIPE" --train-iters "$TRAIN_ITERS")
# shellcheck disable=SC2206 # into words, none of which is a pattern
model=($printed)

data=(--data-path "$DATA" --split '99,1,0' --data-cache-path "$OUTPUT/data_cache" --num-workers 0
  --tokenizer-type NullTokenizer --vocab-size 1023) # to which this tokenizer adds one
batch=(--micro-batch-size 4 --global-batch-size "$GLOBAL" --train-iters "$TRAIN_ITERS")
layout=(--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer)
checkpoints=(--save "$OUTPUT/checkpoints" --load "$OUTPUT/checkpoints" --save-interval 20 --ckpt-format torch_dist)
logging=(--log-interval 10 --eval-interval 1000 --eval-iters 8)
cpu=( # what needs a GPU
  --distributed-backend gloo --disable-gloo-process-groups --use-cpu-initialization --no-persist-layer-norm
  --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-dropout-fusion --no-bias-gelu-fusion
)
exec torchrun --standalone --nproc-per-node 2 -m mup_megatron.launch "${SCRIPT:-$root/examples/pretrain.py}" \
  "${model[@]}" --mup-recipe "$RECIPE" "${data[@]}" "${batch[@]}" "${layout[@]}" "${checkpoints[@]}" "${logging[@]}" \
  "${cpu[@]}"
