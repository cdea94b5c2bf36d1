#!/usr/bin/env bash
# One search as an array of Slurm jobs: each takes trials of the same study until none is left.
#
#   sbatch --array=0-15 launch/sweep_slurm.sh PROXY.yaml --data D --study NAME --storage URL --trials 350 [FLAGS…]
#
# from the folder in which results/ is to be, which all nodes see: a trial that is stopped goes on there from its
# checkpoint, in whichever job. Partition, account and --gpus=1 go on sbatch's command line. The storage is one that all
# nodes reach: grpc://HOST:PORT of `mup-megatron sweep serve`, postgresql://…, or journal:///FILE in a shared folder.
# MPS=1 starts NVIDIA's MPS in each job, so that several --workers share its GPU.
# DRY_RUN=1 bash launch/sweep_slurm.sh … prints what each job would start. It needs no Slurm.
#
#SBATCH --job-name=mup-sweep
#SBATCH --ntasks=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@60
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -euo pipefail

fail() {
  echo "sweep_slurm.sh: $*" >&2
  exit 2
}

storage=""
previous=""
for word in "$@"; do
  case "$word" in --storage=*) storage=${word#--storage=} ;; esac
  if [ "$previous" = --storage ]; then storage=$word; fi
  previous=$word
done
case "$storage" in
  "") fail "give a --storage that all nodes reach" ;;
  sqlite:*) fail "--storage $storage: SQLite is for one machine. Use grpc://, postgresql:// or journal:///" ;;
esac

# A step of its own: Slurm sends SIGTERM to steps, a minute before the time is over or when the job is preempted.
step=(srun --kill-on-bad-exit=1 mup-megatron sweep "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then
  # Whoever reads what is printed need not know the storage's password.
  printf '%q ' "${step[@]}" | sed -E 's#(://[^ :@/]*):[^ @]*@#\1:XXX@#g; s#(pass[a-z]*=)[^ \&]*#\1XXX#g'
  printf '\n'
  exit 0
fi

if [ "${MPS:-0}" = 1 ]; then
  CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d)
  CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
  export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
  nvidia-cuda-mps-control -d
  trap 'nvidia-cuda-mps-control <<<quit' EXIT
fi

status=0
"${step[@]}" || status=$?
if [ "$status" = 143 ]; then # stopped in order: the same job goes on when it runs again
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
