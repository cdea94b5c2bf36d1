# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # sourced by run.sh, which sets root, here and work and uses what is set here
# The experiment as in the paper (Tensor Programs V, arXiv 2203.03466, section 7.4). README.md says where each number is
# from. What belongs to your cluster is set in the environment; the experiment itself is changed here.

# What the paper says

proxy=$root/configs/models/gpt3_6.7b_proxy_40m.yaml
target=$root/configs/models/gpt3_6.7b.yaml
space=$root/configs/spaces/gpt3_6.7b.yaml
stage1_trials=350
stage1_tokens=4000000000
stage2_trials=117
stage2_tokens=16000000000
target_tokens=300000000000
paper_parameters=(40e6 6.7e9) # of proxy and target, as the paper's formula rounds them

# Our own search, over fidelities: as many candidates, each whole trial as long as the paper's first ones

search_budget=3.6e19 # FLOPs, 0.28 % of the target's
search_tokens=4000000000

# What it leaves unsaid, and was chosen here

sequence_length=2048
proxy_batch=256 # sequences: 0.5 M tokens, GPT-3's own batch for small models
eval_iters=10   # batches of a trial's validation loss
unsearched=(    # what is not searched
  --lr-decay-style linear --min-lr 0 --lr-warmup-fraction 0.01
  --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --clip-grad 1.0
)

# Your cluster

study=${STUDY:-gpt3_6.7b}
for name in DATA MEGATRON VOCAB_FILE MERGE_FILE TOKENIZER; do # jobs begin in other folders
  [ -z "${!name:-}" ] || export "$name=$(realpath -m -- "${!name}")"
done
data=${DATA:-} # prefix of Megatron's .bin and .idx, made with GPT-2's tokenizer
[ "$dry_run" = no ] || data=${data:-DATA}
tokenizer=${TOKENIZER:-} # of the data, for --tasks
[ "$dry_run" = no ] || tokenizer=${tokenizer:-TOKENIZER}
storage=${STORAGE:-} # of the studies; several machines need a database server
workers=${WORKERS:-1}
trial_flags=(--bf16 --micro-batch-size "${TRIAL_MICRO_BATCH:-16}")
search_jobs=${SEARCH_JOBS:-64} # of the Slurm array, each on one GPU
stage1_jobs=${STAGE1_JOBS:-64}
stage2_jobs=${STAGE2_JOBS:-64}
search_time=${SEARCH_TIME:-24:00:00} # must be longer than a trial
stage1_time=${STAGE1_TIME:-24:00:00}
stage2_time=${STAGE2_TIME:-48:00:00}

# The target's run is that of launch/gpt3.sh: Megatron-LM's own pretrain_gpt.py, in the layout of launch/layouts.txt.

TRAIN_TOKENS=$target_tokens
# shellcheck source=../layout.sh
source "$root/launch/layout.sh"
read_layout 6.7b
target_batch=$GLOBAL
target_nodes=$NODES
target_environment=(
  "RECIPE=$work/target.recipe.yaml"
  "OUTPUT=$work/target"
  "DATA_PATH=${DATA_PATH:-$data}"
  "TRAIN_TOKENS=$target_tokens"
)
target_command=("$root/launch/gpt3.sh" 6.7b)
target_script=("$root/launch/slurm.sh" 6.7b)

require_settings() { # require_settings STAGE: what would be missed after days
  require DATA "the prefix of your training data in Megatron's format, made with GPT-2's tokenizer"
  if [ "$1" = target ]; then
    require MEGATRON "the folder of your Megatron-LM checkout, core_v0.16 to core_v0.19"
    require VOCAB_FILE "gpt2-vocab.json of the tokenizer that the data was made with"
    require MERGE_FILE "gpt2-merges.txt of the same tokenizer"
  fi
}
