"""The processes of a run: one on its own, or torchrun's. Joins them into Megatron's groups and lets them part again.

Importing this module imports neither torch nor Megatron, because the CPU runtime has to come before both.
"""

import gc
import importlib
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from mup_megatron.errors import InputError

ResultT = TypeVar("ResultT")

_SLOW_IMPORTS = (
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.pipeline_parallel",
    "mup_megatron.training.checkpoint",
    "mup_megatron.training.loop",
    "torch._dynamo",  # by the first optimizer of a process
)

_REPEATING_LOGGERS = (
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed.distributed_data_parallel",
)
"""They say for every model and every checkpoint what Megatron plans to replace. A user can do nothing about it."""

_REPEATING_WARNINGS = ("megatron", r"torch\.distributed")
"""Likewise: what is experimental in Megatron, and what it uses of torch that torch plans to replace."""


_met = False


def has_met() -> bool:
    """Says if a process group was made in this process. Its threads may outlive it, and no fork outlives them."""
    return _met


def preload() -> bool:
    """Imports what a run needs, so that forked processes begin at once. Returns whether they run on the CPU.

    Safe on a machine with a GPU too: torch is told to look for it in a way that does not initialise CUDA,
    which no fork would survive.

    Raises:
        InputError: torch or Megatron-Core is missing or too old, or was imported before.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    on_cpu = enable_cpu()
    for name in _SLOW_IMPORTS:
        importlib.import_module(name)
    keep()
    return on_cpu


def keep() -> None:
    """Has collections pass over all objects that there are: they live as long as this process and those it forks.

    A run ends with a collection. Torch and Megatron are most of what it would look through, and in a forked process
    looking copies their memory.
    """
    gc.collect()
    gc.freeze()


def enable_cpu() -> bool:
    """Turns the CPU runtime on where there is no GPU; returns whether it is on.

    Raises:
        InputError: torch or Megatron-Core is missing or too old, or was imported before.
    """
    for module in _REPEATING_WARNINGS:
        warnings.filterwarnings("ignore", module=module)
    try:
        from mup_megatron.megatron import cpu
    except ImportError as error:
        raise InputError(
            f"training needs torch and Megatron-Core ({error}). Install them: pip install 'mup-megatron[megatron]'"
        ) from None
    return cpu.enable()


def world_size() -> int:
    """Returns the number of processes that take part; known before they have joined."""
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if _under_torchrun() else 1


def _under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def joined(
    *,
    tensor: int,
    pipeline: int,
    virtual_stages: int | None,
    seed: int,
    experts: int = 1,
    tensor_of_experts: int | None = None,
) -> Iterator[None]:
    """Megatron's process groups and random numbers for the time of a run, on every rank.

    A process group that exists already is used and left as it is. Otherwise torchrun's processes find each other, and a
    single process needs no one, no port and no file. Python's, numpy's and torch's generators are seeded as Megatron-LM
    does, with seed + 100·(pipeline stage).
    """
    from megatron.core import parallel_state

    for name in _REPEATING_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with met():
        try:
            parallel_state.initialize_model_parallel(
                tensor,
                pipeline,
                virtual_stages,
                expert_model_parallel_size=experts,
                expert_tensor_parallel_size=tensor_of_experts,
                create_gloo_process_groups=False,
            )
            seed_all(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
            yield
        finally:
            parallel_state.destroy_model_parallel()
            # The run's parts refer to each other, and hold its buffers and the threads of its process groups.
            gc.collect()


@contextmanager
def met() -> Iterator[None]:
    """The process group of a run on Megatron: around several times that Megatron's groups are `joined`."""
    import torch
    from torch import distributed

    from mup_megatron.megatron import cpu

    if not (distributed.is_initialized() or cpu.is_enabled()):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with process_group(backend()):
        yield


def backend() -> str:
    """Returns torch's backend for this machine: a GPU that the CPU runtime only pretends to be there is none."""
    import torch

    from mup_megatron.megatron import cpu

    return "gloo" if cpu.is_enabled() or not torch.cuda.is_available() else "nccl"


@contextmanager
def process_group(backend: str) -> Iterator[None]:
    """The process group that there is, or for the time of a run torchrun's, or one process by itself, which needs no
    one, no port and no file.
    """
    global _met
    from torch import distributed

    if distributed.is_initialized():
        yield
        return
    _met = True
    if _under_torchrun():
        distributed.init_process_group(backend)
    else:
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def seed_all(seed: int) -> None:
    """Seeds every generator that a run draws from, Megatron's for tensor-parallel ranks too."""
    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def is_first() -> bool:
    """Says if this rank is the one that writes and speaks."""
    from torch import distributed

    return not distributed.is_initialized() or distributed.get_rank() == 0


def on_first_rank(work: Callable[[], ResultT]) -> ResultT:
    """Returns the result of `work`, done by the first rank alone and told to all. Collective if there are ranks.

    Where `work` fails, every rank raises what it raised on the first.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return work()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: ResultT = outcome[0]
    return result
