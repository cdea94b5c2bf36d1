#!/bin/sh
# A GPT-2 of width 64 and one of width 256 under DeepSpeed ZeRO-2, two processes, with one and the same recipe.
#
#   examples/deepspeed_gpt2/run.sh [--steps N]
#
# PROCESSES, WIDTHS and OUTPUT may be set: 2, '64 256' and results/examples/deepspeed_gpt2.
# train.py and ds.json know nothing of μP. ds_mup.json is ds.json with the entry "mup"; --deepspeed makes sure that it
# is honoured. Without a GPU it takes a minute and a half on two free cores.
set -eu
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
export PYTHONWARNINGS=ignore::FutureWarning # torch renames what DeepSpeed calls
nvidia-smi >/dev/null 2>&1 || export DS_ACCELERATOR=cpu
here=examples/deepspeed_gpt2
out=${OUTPUT:-results/examples/deepspeed_gpt2}
mkdir -p "$out"

# What every group of parameters of the wide model is going to get.
mup-megatron ds-config "$here/gpt2_256.json" --recipe "$here/gpt2.recipe.yaml" --check "$here/ds_mup.json"

for width in ${WIDTHS:-64 256}; do
  for config in ds ds_mup; do
    name=${config}_$width
    start=
    [ "$config" = ds ] || start='-m mup_megatron.launch --deepspeed'
    # shellcheck disable=SC2086  # several words, or none
    torchrun --standalone --nproc-per-node "${PROCESSES:-2}" $start "$here/train.py" --model "$here/gpt2_$width.json" \
      --deepspeed_config "$here/$config.json" "$@" >"$out/$name.log" 2>&1 || { tail -n 30 "$out/$name.log" >&2; exit 1; }
    printf '%-12s %s\n' "$config.json" "$(grep 'mean loss' "$out/$name.log")"
  done
done
