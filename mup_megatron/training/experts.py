"""Initial weights of a model with experts that do not depend on which rank holds which.

With weights drawn on the CPU, each rank draws from the same numbers: so that tensor-parallel ranks agree, and with the
effect that experts of different expert-parallel ranks would begin as copies of each other, and what is drawn after them
otherwise than with all experts on one rank.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from mup_megatron.megatron.model import stock_std
from mup_megatron.megatron.names import named_parameters
from mup_megatron.theory import Plan, PlanEntry


def draw_by_name(models: Sequence[torch.nn.Module], plan: Plan, config: Any, *, seed: int) -> None:
    """Draws every weight with the std with which Megatron drew it, from numbers that its global name decides.

    Args:
        models: this rank's, not wrapped, freshly built.
        plan: for the whole model.
        config: their TransformerConfig.
        seed: of the run.
    """
    for name, parameter in named_parameters(models, tied=plan.tied):
        std = stock_std(plan[name], config) if plan[name].init_std is not None else None
        if std is None:
            continue
        ranks, rank = _ranks(plan[name], parameter)
        split = int(getattr(parameter, "partition_dim", 0))
        shape = [size * ranks if dimension == split else size for dimension, size in enumerate(parameter.shape)]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        whole = torch.empty(shape).normal_(std=std, generator=generator)
        with torch.no_grad():
            parameter.copy_(whole.chunk(ranks, dim=split)[rank])


def _ranks(entry: PlanEntry, parameter: torch.nn.Parameter) -> tuple[int, int]:
    """By how many ranks a weight is shared, and which of them this is."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return 1, 0
    if entry.is_expert:
        return (
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_rank(),
        )
    return parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
