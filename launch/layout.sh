# shellcheck shell=bash
# shellcheck disable=SC2034 # what is set here is used where this is sourced
# What gpt3.sh and slurm.sh have in common: reading layouts.txt, and what follows from it. Sourced, not run.

GPUS_PER_NODE=8
SEQUENCE_LENGTH=2048
TRAIN_TOKENS=${TRAIN_TOKENS:-300000000000} # GPT-3's 300 B

fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

require() { # require NAME MEANING: a variable that the user has to set
  [ -n "${!1:-}" ] || fail "$1 is not set: $2"
}

require_count() { # require_count NAME VALUE: what the user has set is a count that arithmetic can work with
  [[ $2 =~ ^[1-9][0-9]{0,17}$ ]] || fail "$1=$2 is not a whole number above 0. Write it with digits alone, such as 16"
}

# read_layout SIZE: sets NODES TP PP VPP MICRO GLOBAL RECOMPUTE, and WORLD DP TRAIN_ITERS, which follow from them and
# from NNODES where that asks for another number of nodes.
read_layout() {
  local layouts size sizes='' found=no
  layouts=$(dirname "${BASH_SOURCE[0]}")/layouts.txt
  while read -r size NODES TP PP VPP MICRO GLOBAL RECOMPUTE; do
    case $size in '#'* | '') continue ;; esac
    sizes="$sizes $size"
    if [ "$size" = "${1:-}" ]; then
      found=yes
      break
    fi
  done <"$layouts"
  [ $found = yes ] || fail "which size? '${1:-}' is none of:$sizes"

  NODES=${NNODES:-$NODES}
  require_count NNODES "$NODES"
  require_count TRAIN_TOKENS "$TRAIN_TOKENS"
  WORLD=$((NODES * GPUS_PER_NODE))
  [ $((WORLD % (TP * PP))) -eq 0 ] ||
    fail "$NODES nodes are $WORLD GPUs, which tensor parallel $TP times pipeline parallel $PP does not divide"
  DP=$((WORLD / (TP * PP)))
  [ $((GLOBAL % (MICRO * DP))) -eq 0 ] ||
    fail "$NODES nodes make $DP model copies, and $DP copies of $MICRO sequences do not divide the batch of $GLOBAL"
  [ "$VPP" -eq 1 ] || [ $((GLOBAL / (MICRO * DP) % PP)) -eq 0 ] ||
    fail "$NODES nodes leave $((GLOBAL / (MICRO * DP))) micro batches a step, which the $PP interleaved stages do not divide"
  TRAIN_ITERS=$((TRAIN_TOKENS / (GLOBAL * SEQUENCE_LENGTH)))
  [ "$TRAIN_ITERS" -gt 0 ] || fail "TRAIN_TOKENS=$TRAIN_TOKENS is less than one step of $((GLOBAL * SEQUENCE_LENGTH)) tokens"
}
