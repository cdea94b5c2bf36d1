#!/usr/bin/env bash
# The GPT-3 6.7B experiment of Tensor Programs V: from a search on its 40M proxy to the loss of the target.
#
#   launch/gpt3_6.7b/run.sh --dry-run               what would be run, and what it costs; starts nothing
#   launch/gpt3_6.7b/run.sh --scale tiny            every stage for real, but small: minutes on a CPU
#   launch/gpt3_6.7b/run.sh --slurm                 hands all stages to Slurm, each waiting for the one before
#   launch/gpt3_6.7b/run.sh --stage search          one stage, here; several calls of it share its trials
#
# Options: --scale full|tiny, --search fidelities|paper (over narrower and shorter trials, the default; or the paper's two
# stages of random ones), --stage NAME (again for another one), --work DIR (what is written; default
# results/gpt3_6.7b/SCALE), --tasks LIST (the target is exported, checked and evaluated on these tasks of
# lm-evaluation-harness), --accept-unfinished (stage 2 although trials of stage 1 have no result), --slurm, --dry-run.
#
# Stages, in their order: prepare search transfer target evaluate report; with --search paper stage1 stage2 for search.
# Stopped at any moment, the same command goes on. README.md says what has to be set for the full scale.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
export PATH="$PATH:$root/.venv/bin" # an environment that is active comes first

fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

scale=full search=fidelities work='' tasks='' stages=() dry_run=no slurm=no accept=()
while [ $# -gt 0 ]; do
  case $1 in
    --scale | --search | --stage | --tasks | --work)
      [ $# -gt 1 ] || fail "$1: its value is missing"
      case $1 in
        --scale) scale=$2 ;;
        --search) search=$2 ;;
        --stage) stages+=("$2") ;;
        --tasks) tasks=$2 ;;
        --work) work=$2 ;;
      esac
      shift
      ;;
    --dry-run) dry_run=yes ;;
    --slurm) slurm=yes ;;
    --accept-unfinished) accept=(--accept-unfinished) ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) fail "$1: no such option; --help lists them" ;;
  esac
  shift
done
[[ $scale = full || $scale = tiny ]] || fail "--scale $scale: choose full or tiny"
case $search in
  fidelities) searching=(search) ;;
  paper) searching=(stage1 stage2) ;;
  *) fail "--search $search: choose fidelities or paper" ;;
esac
[[ $search = paper || ${#accept[@]} -eq 0 ]] || fail "--accept-unfinished: it is about stage 2 of --search paper"
last=${searching[-1]} # its best trial is the answer
ALL=(prepare "${searching[@]}" transfer target evaluate report)
[ ${#stages[@]} -gt 0 ] || stages=("${ALL[@]}")
for stage in "${stages[@]}"; do
  [[ " ${ALL[*]} " = *" $stage "* ]] || fail "--stage $stage: choose from ${ALL[*]} with --search $search"
done

work=$(realpath -m -- "${work:-$root/results/gpt3_6.7b/$scale}")
# shellcheck source=full.sh
source "$here/$scale.sh"

search_iterations=$((search_tokens / (proxy_batch * sequence_length)))
stage1_iterations=$((stage1_tokens / (proxy_batch * sequence_length)))
stage2_iterations=$((stage2_tokens / (proxy_batch * sequence_length)))
target_iterations=$((target_tokens / (target_batch * sequence_length)))
storage_flags=()
[ -z "$storage" ] || storage_flags=(--storage "$storage")

# Running and submitting. Descriptor 3 is where it is said what is done; standard output is for the answer.

say() {
  printf '%s\n' "$*" >&3
}

run() { # run COMMAND…: says what it runs, and runs it unless this is a dry run
  say "  $(printf '%q ' "$@")"
  [ "$dry_run" = yes ] || "$@"
}

require_tasks() { # what --tasks needs, before days have gone by
  [ -n "$tokenizer" ] || fail "TOKENIZER is not set: --tasks needs the data's tokenizer, as a tokenizer.json or the \
folder of a vocab.json and merges.txt"
  command -v lm_eval >/dev/null || fail "--tasks: lm-evaluation-harness is not installed. pip install lm-eval, or leave \
--tasks out"
}

submit() { # submit NAME COMMAND…: a command of sbatch's. Sets `job` to the job's number
  local name=$1
  shift
  say "  $(printf '%q ' "$@")"
  job="JOB_OF_$name"
  if [ "$dry_run" = no ]; then
    job=$(cd "$root" && "$@") # slurm.sh wants to be submitted from there
    job=${job%%;*}            # behind it may be the cluster's name
    say "  # job $job"
  fi
}

# The stages, each as the command that does it here

do_prepare() {
  if [ "$scale" = tiny ] && [ ! -e "$data.json" ]; then
    run mup-megatron data -o "$data" --force
  fi
  # What is not searched. The learning rate in it is a placeholder: every trial has its own.
  run mup-megatron recipe --base "$proxy" --lr 0.001 "${unsearched[@]}" -o unsearched.recipe.yaml --force
  # Tables of a database server are made once, before many processes want to.
  [[ ! $storage =~ ^(postgresql|mysql|mariadb) ]] || run optuna --quiet study-names --storage "$storage"
}

do_search() {
  run mup-megatron sweep "$proxy" --data "$data" --study "$study-search" "${storage_flags[@]}" \
    --budget "$search_budget" --space "$space" --recipe unsearched.recipe.yaml \
    --train-iters "$search_iterations" --global-batch-size "$proxy_batch" --eval-iters "$eval_iters" \
    --workers "$workers" "${trial_flags[@]}"
}

do_stage1() {
  run mup-megatron sweep "$proxy" --data "$data" --study "$study-stage1" "${storage_flags[@]}" \
    --trials "$stage1_trials" --space "$space" --recipe unsearched.recipe.yaml \
    --train-iters "$stage1_iterations" --global-batch-size "$proxy_batch" --eval-iters "$eval_iters" \
    --workers "$workers" "${trial_flags[@]}"
}

do_stage2() {
  run mup-megatron sweep "$proxy" --data "$data" --study "$study-stage2" "${storage_flags[@]}" \
    --best "$stage2_trials" --of "$study-stage1" "${accept[@]}" \
    --train-iters "$stage2_iterations" --global-batch-size "$proxy_batch" --eval-iters "$eval_iters" \
    --workers "$workers" "${trial_flags[@]}"
}

fingerprint() { # fingerprint RECIPE: the one that its file states
  sed -n 's/^# fingerprint: //p' "$1"
}

do_transfer() {
  # If all trials of the search have a result, this is over at once; if a job was lost, it runs what is left.
  "do_$last"
  run mup-megatron transfer --study "$study-$last" "${storage_flags[@]}" -o new.recipe.yaml --force
  if [ "$dry_run" = no ] && [ -e target ] &&
    [ "$(fingerprint new.recipe.yaml)" != "$(fingerprint target.recipe.yaml)" ]; then
    fail "the search has another best trial than the one that $work/target was begun with. Move target and target.recipe.yaml
there away to begin again with the new one, $work/new.recipe.yaml, or leave this stage out to go on as before."
  fi
  run mv new.recipe.yaml target.recipe.yaml
}

do_target() {
  if [ "$dry_run" = yes ]; then
    run env "${target_environment[@]}" "${target_command[@]}"
    return
  fi
  mkdir -p target
  exec 9>>target/lock # the run inherits it, and so holds it even if this script is killed
  flock --nonblock 9 || fail "$work/target: its run is still going on. Wait for it, or end it"
  if [ -e target/complete ]; then
    say "  # the target's run is complete"
    return
  fi
  # The same log as in a Slurm job.
  run env "${target_environment[@]}" "${target_command[@]}" 2>&1 | tee -a target.log
  touch target/complete
}

# The target as stock transformers loads it, held against its checkpoint, and what lm-evaluation-harness says of it.
evaluate_tasks() {
  local exported=target-hf lm_eval_options=()
  if [ ! -e "$exported" ]; then
    run mup-megatron export target/checkpoints --recipe target.recipe.yaml --to "$exported" --tokenizer "$tokenizer"
  fi
  run mup-megatron check --exported "$exported" --against target/checkpoints --recipe target.recipe.yaml
  read -r -a lm_eval_options <<<"${LM_EVAL:-}"
  run env "HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}" lm_eval run --model hf --model_args "pretrained=$exported" \
    --tasks "$tasks" --output_path tasks "${lm_eval_options[@]}"
}

# EVALUATE is a command of yours. Its environment names model, recipe and checkpoints; what it prints is kept, and if the
# last line is a number, that is the target's loss. Without it, the validation loss at the end of the run is.
do_evaluate() {
  [ -z "$tasks" ] || evaluate_tasks
  if [ -z "${EVALUATE:-}" ]; then
    say "  # no EVALUATE command: the loss is that of Megatron-LM's validation at the end, in target.log"
    return
  fi
  export MODEL=$target RECIPE=$work/target.recipe.yaml CHECKPOINTS=$work/target/checkpoints
  run bash -c "{ $EVALUATE
  } >evaluation.new && mv evaluation.new evaluation.txt"
}

do_report() {
  local studies=() name
  for name in "${searching[@]}"; do
    studies+=(--study "$study-$name")
  done
  run python "$here/report.py" "${studies[@]}" "${storage_flags[@]}" --recipe target.recipe.yaml \
    --target "$target" --log target.log --evaluation evaluation.txt --output .
  for name in "${searching[@]}"; do # a page with pictures of each study that there is
    run mup-megatron sweep report "$study-$name" "${storage_flags[@]}" >&2 || say "  # no report of $study-$name"
  done
}

# The stages as Slurm jobs, each waiting for the one before. That one lost worker of many ends badly means nothing: each
# stage looks itself whether the one before is complete.

hand_to_slurm() { # hand_to_slurm STAGE: sets `job`, the last one; waits for the one that it was
  local stage=$1 after=() options=() here_it_is=("$here/run.sh" --scale "$scale" --search "$search" --work "$work") wrapped
  local command=(sbatch --parsable "--job-name=$study-$stage")
  here_it_is+=("${accept[@]}")
  [ -z "$tasks" ] || here_it_is+=(--tasks "$tasks")
  local one_gpu=(--nodes=1 --ntasks=1 --gpus-per-node=1 --cpus-per-task=8)
  [ -z "$job" ] || after=("--dependency=afterok:$job")
  wrapped="--wrap=$(printf '%q ' "${here_it_is[@]}" --stage "$stage")"
  case $stage in
    search | stage1 | stage2)
      local jobs=${stage}_jobs limit=${stage}_time
      after=("${after[@]/afterok/afterany}")
      submit "$stage" "${command[@]}" "--array=1-${!jobs}" "${one_gpu[@]}" "--time=${!limit}" \
        "--output=$work/logs/%x-%A_%a.log" "${after[@]}" "$wrapped"
      ;;
    transfer)
      local limit=${last}_time
      after=("${after[@]/afterok/afterany}")
      submit "$stage" "${command[@]}" "${one_gpu[@]}" "--time=${!limit}" "--output=$work/logs/%x-%j.log" \
        "${after[@]}" "$wrapped"
      ;;
    target)
      # Never two at a time: this stage may be submitted again while an earlier job of it is there.
      after=("--dependency=singleton${job:+,afterok:$job}" --kill-on-invalid-dep=yes)
      command+=("--nodes=$target_nodes")
      if [ ${#target_script[@]} -gt 0 ]; then
        submit "$stage" env "${target_environment[@]}" "${command[@]}" "--output=$work/target.log" --open-mode=append \
          "${after[@]}" "${target_script[@]}"
      else
        submit "$stage" "${command[@]}" "--output=$work/logs/%x-%j.log" "${after[@]}" "$wrapped"
      fi
      ;;
    evaluate)
      after+=(--kill-on-invalid-dep=yes)
      read -r -a options <<<"${EVALUATE_SBATCH:-}"
      submit "$stage" "${command[@]}" --nodes=1 "--output=$work/logs/%x-%j.log" "${options[@]}" "${after[@]}" \
        "$wrapped --stage report"
      ;;
  esac
}

# All of it

costs() {
  local rounded=()
  [ ${#paper_parameters[@]} -eq 0 ] || rounded=(--rounded "${paper_parameters[@]}")
  python "$here/cost.py" "${rounded[@]}" "$@" \
    --fidelities "$search_budget" "$proxy" "$space" "$search_iterations" "$proxy_batch" \
    --search "stage 1" "$stage1_trials" "$proxy" "$stage1_iterations" "$proxy_batch" \
    --search "stage 2" "$stage2_trials" "$proxy" "$stage2_iterations" "$proxy_batch" \
    --target "target" 1 "$target" "$target_iterations" "$target_batch"
}

main() {
  if [ "$dry_run" = yes ]; then
    exec 3>&1
    costs
    say
    say "The commands$([ "$slurm" = no ] || echo ' that hand the stages to Slurm'), in $work"
  else
    exec 3>&2
    for stage in "${stages[@]}"; do
      require_settings "$stage"
      [ "$stage" != evaluate ] || [ -z "$tasks" ] || require_tasks
    done
    if [ "$slurm" = yes ] && [[ ! $storage =~ :// || $storage =~ ^sqlite ]]; then
      fail "STORAGE is not set: jobs on several machines need a database server, such as postgresql://user@host/optuna"
    fi
    mkdir -p "$work/logs"
    cd "$work"
    costs --json cost.json >/dev/null
  fi

  job=''
  for stage in "${stages[@]}"; do
    if [ "$slurm" = no ] || [ "$stage" = prepare ]; then
      say
      say "$stage"
      case $stage in
        prepare) do_prepare >&2 ;;
        search) do_search >&2 ;;
        stage1) do_stage1 >&2 ;;
        stage2) do_stage2 >&2 ;;
        transfer) do_transfer >&2 ;;
        target) do_target >&2 ;;
        evaluate) do_evaluate >&2 ;;
        report) do_report ;;
      esac
    elif [ "$stage" != report ]; then # the job that evaluates does it
      say
      say "$stage"
      hand_to_slurm "$stage"
    fi
  done
}

{ # read as a whole before it begins, because a run takes days and this file may be edited meanwhile
  main
  exit
}
