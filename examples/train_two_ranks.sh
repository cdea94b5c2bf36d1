#!/bin/sh
# One model on two processes that share every layer (tensor parallelism), on GPUs or on the CPU.
# Killed at any moment, even by `kill -9`, it goes on where it was when it is started again.
set -eu
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
out=results/examples/two_ranks
mkdir -p "$out"

# A base of width 64, and a target four times as wide. `sweep` and `transfer` make such a recipe from a search.
model() {
  printf '%s\n' num_layers:\ 2 "hidden_size: $1" "num_attention_heads: $(($1 / 32))" vocab_size:\ 1024 seq_length:\ 64
}
model 64 > "$out/base.yaml"
model 256 > "$out/target.yaml"
[ -e "$out/example.recipe.yaml" ] || mup-megatron recipe --base "$out/base.yaml" --lr 0.004 \
  --lr-warmup-fraction 0.05 -o "$out/example.recipe.yaml"

[ -e "$out/text.bin" ] || mup-megatron data -o "$out/text"

torchrun --standalone --nproc-per-node 2 -m mup_megatron train "$out/target.yaml" \
  --recipe "$out/example.recipe.yaml" --data "$out/text" --output "$out/run" \
  --train-iters 100 --global-batch-size 16 --micro-batch-size 8 \
  --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer \
  --save "$out/checkpoints" --load "$out/checkpoints" --save-interval 25
