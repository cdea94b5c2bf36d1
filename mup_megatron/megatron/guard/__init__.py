"""The guard: a live model, optimizer and scheduler against the plan, before a wrong run costs anything.

It holds no theory and changes nothing: a run is bitwise the same with and without it. Checks of one rank's share are
functions that return problems; `require_as_planned` makes one error of those of all ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch

from mup_megatron.collectives import gathered
from mup_megatron.errors import InputError
from mup_megatron.megatron.guard.forward import attention_problems, multiplier_problems
from mup_megatron.megatron.guard.optimizer import optimizer_problems, schedule_problems
from mup_megatron.megatron.guard.problems import Problem, message
from mup_megatron.megatron.guard.weights import weight_problems
from mup_megatron.megatron.names import require_match
from mup_megatron.theory import Plan

__all__ = [
    "Problem",
    "attention_problems",
    "multiplier_problems",
    "optimizer_problems",
    "require_as_planned",
    "schedule_problems",
    "weight_problems",
]


def require_as_planned(
    chunks: Sequence[torch.nn.Module], plan: Plan, optimizer: Any = None, scheduler: Any = None, *, weights: bool
) -> None:
    """Raises one InputError, the same on every rank, unless the run is what the plan says. Collective.

    Args:
        chunks: this rank's models, wrapped or not.
        plan: for the whole model.
        optimizer: looked at if given; on all ranks or on none.
        scheduler: looked at if given, with learning rates and weight decays at this moment; needs `optimizer`.
        weights: whether the weights are the initial ones. False after a step, or after a checkpoint was loaded.

    Raises:
        InputError: names parameters, what was expected and found, and the likely cause; many problems are counted.
    """
    require_match(chunks, plan)
    problems = attention_problems(chunks, plan) + multiplier_problems(chunks, plan)
    if weights:
        problems += weight_problems(chunks, plan)
    if optimizer is not None:
        problems += optimizer_problems(chunks, plan, optimizer, scheduler)
    if scheduler is not None:
        problems += schedule_problems(plan, scheduler, optimizer)
    everywhere = [problem for of_rank in gathered(problems) for problem in of_rank]
    if everywhere:
        raise InputError(message(everywhere))
