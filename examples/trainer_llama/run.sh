#!/bin/sh
# A Llama of width 64 and one of width 256 with the Hugging Face Trainer under DeepSpeed ZeRO-3, two processes.
#
#   examples/trainer_llama/run.sh [--steps N]
#
# PROCESSES, WIDTHS and OUTPUT may be set: 2, '64 256' and results/examples/trainer_llama.
# ds_mup.json is ds.json with the entry "mup"; the script has one import for it. Without a GPU it takes a minute and a
# half on two free cores.
set -eu
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
export PYTHONWARNINGS=ignore::FutureWarning # torch renames what DeepSpeed calls
nvidia-smi >/dev/null 2>&1 || export DS_ACCELERATOR=cpu
here=examples/trainer_llama
out=${OUTPUT:-results/examples/trainer_llama}
mkdir -p "$out"

# What every group of parameters of the wide model is going to get.
mup-megatron ds-config "$here/llama_256.json" --recipe "$here/llama.recipe.yaml" --check "$here/ds_mup.json"

for width in ${WIDTHS:-64 256}; do
  for config in ds ds_mup; do
    name=${config}_$width
    torchrun --standalone --nproc-per-node "${PROCESSES:-2}" "$here/train.py" --model "$here/llama_$width.json" \
      --config "$here/$config.json" --output "$out" "$@" >"$out/$name.log" 2>&1 || { tail -n 30 "$out/$name.log" >&2; exit 1; }
    printf '%-12s %s\n' "$config.json" "$(grep 'mean loss' "$out/$name.log")"
  done
done
