# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # sourced by run.sh, which sets root, here and work and uses what is set here
# The whole experiment in small, to try every stage on any machine in minutes: the same commands, the same ratios between
# the stages (a third of the trials, four times the tokens), a target four times as wide as the proxy. It tunes nothing.

proxy=$here/tiny/proxy.yaml
target=$here/tiny/target.yaml
space=$root/configs/spaces/gpt3_6.7b.yaml
search_budget=7e10 # little more than the least ladder
search_tokens=10240
stage1_trials=6
stage1_tokens=10240
stage2_trials=2
stage2_tokens=40960
target_tokens=40960
paper_parameters=()

sequence_length=64
proxy_batch=8
eval_iters=4
unsearched=(
  --lr-decay-style linear --min-lr 0 --lr-warmup-fraction 0.05
  --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --clip-grad 1.0
)

study=${STUDY:-tiny}
data=$(realpath -m -- "${DATA:-$work/data/text}") # made if it is not there: the source of Python's standard library
tokenizer=${TOKENIZER:-$data.tokenizer.json}
storage=${STORAGE:-}
workers=${WORKERS:-2}
trial_flags=()
search_jobs=${SEARCH_JOBS:-2}
stage1_jobs=${STAGE1_JOBS:-2}
stage2_jobs=${STAGE2_JOBS:-2}
search_time=${SEARCH_TIME:-00:30:00}
stage1_time=${STAGE1_TIME:-00:30:00}
stage2_time=${STAGE2_TIME:-00:30:00}

# Two processes that share every layer, as the real one has them, on the CPU.
target_batch=16
target_nodes=1
target_environment=(
  "RECIPE=$work/target.recipe.yaml"
  "OUTPUT=$work/target"
  "MODEL=$target"
  "DATA=$data"
  "GLOBAL=$target_batch"
  "TRAIN_ITERS=$((target_tokens / (target_batch * sequence_length)))"
)
target_command=("$here/tiny/target.sh")
target_script=()

require_settings() {
  :
}
