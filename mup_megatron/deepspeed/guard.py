"""A live engine compared with the plan: what it really does with each parameter, read back by name. Changes nothing.

ZeRO's optimizers hold flat buffers instead of parameters, but still know which parameters a group was made of. So what
is read here are the very groups that the optimizer steps with, not what was handed over to it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mup_megatron.deepspeed.names import named_parameters
from mup_megatron.live.compare import CLOSE, group_problems, value_problems
from mup_megatron.live.problems import Problem, message, number
from mup_megatron.modules.applied import kept_problems
from mup_megatron.theory import Plan

__all__ = ["CLOSE", "LiveValues", "group_problem", "live_values", "problems"]


@dataclass(frozen=True, slots=True)
class LiveValues:
    """The values that the optimizer uses for a parameter at this moment."""

    lr: float
    weight_decay: float
    eps: float | None
    """None for an optimizer without."""


def live_values(engine: Any) -> dict[str, LiveValues]:
    """Returns name → values of every parameter that this rank's optimizer steps; the rate is the present one."""
    return {name: _values(groups[-1]) for name, groups in _groups(engine).items()}


def _groups(engine: Any) -> dict[str, list[Mapping[str, Any]]]:
    """Name → the groups that hold it, of every parameter that this rank's optimizer steps."""
    name_of = {id(parameter): name for name, parameter in named_parameters(engine)}
    live = engine.optimizer.param_groups
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for index, parameters in _members(engine.optimizer):
        for parameter in parameters:
            if id(parameter) in name_of:
                groups.setdefault(name_of[id(parameter)], []).append(live[index])
    return groups


def _values(group: Mapping[str, Any]) -> LiveValues:
    return LiveValues(float(group["lr"]), group["weight_decay"], group.get("eps"))


def _members(optimizer: Any) -> Iterator[tuple[int, Sequence[torch.nn.Parameter]]]:
    """(index of a group, the model's parameters in it), by what each of DeepSpeed's optimizers remembers of them."""
    if hasattr(optimizer, "sub_group_to_group_id"):  # ZeRO-3
        for index, parameters in enumerate(optimizer.fp16_groups):
            yield optimizer.sub_group_to_group_id[index], parameters
        return
    for attribute in ("bit16_groups", "bf16_groups", "fp16_groups"):  # ZeRO-1 and 2; bf16 and fp16 without ZeRO
        if hasattr(optimizer, attribute):
            yield from enumerate(getattr(optimizer, attribute))
            return
    yield from ((index, group["params"]) for index, group in enumerate(optimizer.param_groups))


def problems(engine: Any, plan: Plan, clip_grad: float, *, at_peak: bool) -> list[str]:
    """Returns where this rank's engine is not what the plan says: one message, or nothing.

    Args:
        engine: DeepSpeed's.
        plan: for the whole model.
        clip_grad: the recipe's.
        at_peak: no schedule has touched the learning rates. Else they may all be lower by one factor.
    """
    groups = _groups(engine)
    live = live_values(engine)
    trained = [name for name, parameter in named_parameters(engine) if parameter.requires_grad]
    found = kept_problems(engine.module)
    found += group_problems({name: len(groups.get(name, ())) for name in trained}, _CAUSE)
    factor = 1.0 if at_peak else _factor(plan, live)
    for name, values in live.items():
        entry = plan[name]
        planned = {"lr": entry.lr * factor, "weight decay": entry.weight_decay, "eps": entry.eps}
        held = {"lr": values.lr, "weight decay": values.weight_decay, "eps": values.eps}
        found += value_problems(name, planned, held, _CAUSE)
    live_clip = getattr(engine.optimizer, "clip_grad", engine.gradient_clipping())
    if live_clip != clip_grad:
        found.append(Problem("engine", "gradient clipping", number(clip_grad), number(live_clip), _CAUSE))
    return [message(found, of='"mup": the engine is not what the recipe says')] if found else []


_CAUSE = "Something changed the optimizer's groups after the plan was applied: take it out."


def _factor(plan: Plan, live: Mapping[str, LiveValues]) -> float:
    """Returns where the schedule stands, by the parameter whose planned rate is highest."""
    name = max(live, key=lambda name: plan[name].lr, default=None)
    return 1.0 if name is None else live[name].lr / plan[name].lr


def group_problem(
    groups: Sequence[Mapping[str, Any]], planned: Sequence[Mapping[str, Any]], moments: Sequence[Mapping[str, Any]]
) -> str | None:
    """Returns what is wrong with the present values of groups, but for learning rates; cheap enough for every step.

    Args:
        groups: the live optimizer's.
        planned: what they should be.
        moments: betas or momentum of each of them, where no schedule drives them.
    """
    if len(groups) != len(planned):
        return (
            f'"mup": the optimizer has {len(groups)} groups of parameters instead of the {len(planned)} of the plan. '
            "Do not add or remove groups."
        )
    for group, plan, own in zip(groups, planned, moments, strict=True):
        wanted = {"weight_decay": plan.get("weight_decay"), "eps": plan.get("eps"), **own}
        for key, value in wanted.items():
            found = tuple(group[key]) if key == "betas" else group.get(key)
            if found != value:
                return (
                    f'"mup": {key} of the group "{plan["name"]}" should be {value} and is {found}. '
                    "Something changed it during the run: take it out, or say it in the recipe."
                )
    return None
