"""The memory of a trial, about, and what this machine has free for it: looked at before the first trial."""

import os
import subprocess
from collections.abc import Callable

import psutil  # type: ignore[import-untyped]

from mup_megatron.architectures.cost import parameter_count
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.training.options import TrainingOptions

PROCESS_BYTES = 200 * 2**20
"""Of a trial's process by itself: what it does not share with the one that it was forked from."""


def state_bytes(model: ModelFile, options: TrainingOptions) -> int:
    """Returns the bytes of weights, gradients and Adam's two moments; with bf16 of weights in both precisions."""
    return parameter_count(model) * (18 if options.bf16 else 16)


def trial_bytes(model: ModelFile, options: TrainingOptions) -> int:
    """Returns about what a trial needs: its states, what its layers keep for the backward pass, and its logits.

    A layer keeps about 17·h + 2.5·a·s numbers for each token (arXiv 2205.05198, eq. 1), less with fused attention.
    """
    tokens = (options.micro_batch_size or options.global_batch_size) * model.seq_length
    kept = 17 * model.hidden_size + 2.5 * model.num_attention_heads * model.seq_length
    activations = tokens * model.num_layers * kept * (2 if options.bf16 else 4)
    logits = tokens * model.vocab_size * 3 * 4
    return PROCESS_BYTES + state_bytes(model, options) + round(activations + logits)


def remark_on_memory(
    model: ModelFile, options: TrainingOptions, workers: int, *, free: Callable[[], tuple[int, int] | None]
) -> str | None:
    """Returns what to tell a user whose trials probably do not fit beside each other; None if they do.

    Args:
        model: of the largest trials.
        options: of their run.
        workers: trials at a time.
        free: returns bytes that are free and bytes that there are; None if that cannot be known.

    Raises:
        InputError: not even the states of one trial can ever fit.
    """
    known = free()
    if known is None:
        return None
    available, total = known
    if state_bytes(model, options) > total:
        raise InputError(
            f"a trial needs {_gib(state_bytes(model, options))} for weights, gradients and optimizer alone, and this "
            f"machine has {_gib(total)}. Search on a smaller proxy: `mup-megatron proxy` makes one."
        )
    each = trial_bytes(model, options)
    if each * workers <= available:
        return None
    fitting = available // each
    remedy = f"Use --workers {fitting}." if fitting else "Use a smaller --micro-batch-size."
    return f"{workers} trials of about {_gib(each)} may not fit into the {_gib(available)} that are free. {remedy}"


def _gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"


def free_memory() -> tuple[int, int]:
    """Returns the bytes that are free on this machine and that it has, or those of its control group (Slurm's job)."""
    memory = psutil.virtual_memory()
    limit, used = (_number_in(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is None or used is None or limit > memory.total:
        return int(memory.available), int(memory.total)
    return min(int(memory.available), limit - used), limit


def _number_in(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):  # none, or "max"
        return None


def free_gpu_memory() -> tuple[int, int] | None:
    """Returns the bytes that are free on the first GPU that trials see, and that it has; None if nothing tells.

    Asked of nvidia-smi: CUDA itself, once used in a process, survives none of its forks.
    """
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits", f"--id={device}"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
        free, total = (int(float(number) * 2**20) for number in answer.strip().splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return free, total
