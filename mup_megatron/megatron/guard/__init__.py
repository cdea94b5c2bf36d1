"""The guard: a live model, optimizer and scheduler against the plan, before a wrong run costs anything.

It changes nothing: a run is bitwise the same with and without it. Functions here collect what is live on one rank and
return the problems that `live/` finds; `require_as_planned` makes one error of those of all ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from mup_megatron.collectives import gathered
from mup_megatron.errors import InputError
from mup_megatron.live import weights as initial
from mup_megatron.live.problems import Problem, message
from mup_megatron.megatron.guard.forward import attention_problems, multiplier_problems
from mup_megatron.megatron.guard.optimizer import optimizer_problems, schedule_problems
from mup_megatron.megatron.names import global_shape, local_values, named_parameters, require_match
from mup_megatron.theory import Plan, PlanEntry

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


def is_due(step: int) -> bool:
    """Returns whether a run is compared again after so many steps, from 1 on: after 1, 2, 4, 8 and so on."""
    return step & (step - 1) == 0


def weight_problems(chunks: Sequence[torch.nn.Module], plan: Plan) -> list[Problem]:
    """Returns where this rank's initial weights are not the plan's; for a model that was just drawn."""
    return [
        problem
        for name, parameter in named_parameters(chunks, tied=plan.tied)
        if not parameter.is_meta
        for problem in initial.weight_problems(_without_padding(parameter, plan[name]), plan[name])
    ]


def _without_padding(parameter: torch.nn.Parameter, entry: PlanEntry) -> torch.Tensor:
    """Returns a rank's values without the rows that only pad the vocabulary."""
    values = parameter.detach()
    if entry.padded_to is None or global_shape(entry.name, parameter)[0] == entry.shape[0]:
        return local_values(parameter)
    if hasattr(values, "full_tensor"):
        values = values.full_tensor()  # which of its parts has the rows that pad it is FSDP's affair
    sharded = getattr(parameter, "tensor_model_parallel", False)
    first = parallel_state.get_tensor_model_parallel_rank() * len(values) if sharded else 0
    return values[: max(0, entry.shape[0] - first)]
