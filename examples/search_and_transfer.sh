#!/bin/sh
# From text to a recipe to a wide model, one command after the other, in a few minutes on a CPU.
#
#   PATH=.venv/bin:$PATH examples/search_and_transfer.sh
set -eu
work=results/example
mkdir -p "$work"
cat > "$work/target.yaml" <<'MODEL'
num_layers: 2
hidden_size: 256
num_attention_heads: 8
vocab_size: 1024
seq_length: 64
untie_embeddings_and_output_weights: true
transformer_impl: local
MODEL
mup-megatron data -o "$work/text" --force                                  # the standard library's source, as text
mup-megatron proxy "$work/target.yaml" -o "$work/proxy.yaml" --hidden-size 64 --force
mup-megatron sweep "$work/proxy.yaml" --data "$work/text" --trials 4 --study example \
    --train-iters 50 --global-batch-size 8 --workers 2
mup-megatron transfer --study example -o "$work/example.recipe.yaml" --force
mup-megatron explain "$work/target.yaml" --recipe "$work/example.recipe.yaml" --brief
mup-megatron train "$work/target.yaml" --recipe "$work/example.recipe.yaml" --data "$work/text" \
    --train-iters 20 --global-batch-size 8 --output "$work/run"
