"""A live engine compared with the plan: what it really does with each parameter, read back by name. Changes nothing.

ZeRO's optimizers hold flat buffers instead of parameters, but still know which parameters a group was made of. So what
is read here are the very groups that the optimizer steps with, not what was handed over to it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mup_megatron.deepspeed.names import named_parameters
from mup_megatron.theory import Plan, PlanEntry
from mup_megatron.validation import listed

SHOWN = 5
"""How many problems a message describes; the rest is counted."""

CLOSE = 1e-6
"""Relative difference up to which learning rates of a run agree."""


@dataclass(frozen=True, slots=True)
class LiveValues:
    """The values that the optimizer uses for a parameter at this moment."""

    lr: float
    weight_decay: float
    eps: float | None
    """None for SGD."""


def live_values(engine: Any) -> dict[str, LiveValues]:
    """Name → values of every parameter that this rank's optimizer steps; the learning rate is the present one."""
    name_of = {id(parameter): name for name, parameter in named_parameters(engine)}
    groups = engine.optimizer.param_groups
    return {
        name_of[id(parameter)]: _values(groups[index])
        for index, parameters in _members(engine.optimizer)
        for parameter in parameters
        if id(parameter) in name_of
    }


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
    """Lists in sentences where this rank's engine is not what the plan says.

    Args:
        engine: DeepSpeed's.
        plan: for the whole model.
        clip_grad: the recipe's.
        at_peak: no schedule has touched the learning rates. Else they may all be lower by one factor.
    """
    live = live_values(engine)
    found = []
    trained = [name for name, parameter in named_parameters(engine) if parameter.requires_grad]
    found += [
        f"{name}: the optimizer does not have it, so it would not be trained" for name in trained if name not in live
    ]
    factor = 1.0 if at_peak else _factor(plan, live)
    for name, values in live.items():
        found += _differences(plan[name], values, factor)
    live_clip = getattr(engine.optimizer, "clip_grad", engine.gradient_clipping())
    if live_clip != clip_grad:
        found.append(f"gradient clipping: should be {clip_grad:g} and is {live_clip:g}")
    return _summary(found)


def _factor(plan: Plan, live: Mapping[str, LiveValues]) -> float:
    """Where the schedule stands, by the parameter whose planned rate is highest."""
    name = max(live, key=lambda name: plan[name].lr, default=None)
    return 1.0 if name is None else live[name].lr / plan[name].lr


def _differences(entry: PlanEntry, values: LiveValues, factor: float) -> Iterator[str]:
    if not math.isclose(values.lr, entry.lr * factor, rel_tol=CLOSE):
        yield f"{entry.name}: the learning rate should be {entry.lr * factor:.6g} and is {values.lr:.6g}"
    if values.weight_decay != entry.weight_decay:
        yield f"{entry.name}: weight_decay should be {entry.weight_decay:.6g} and is {values.weight_decay:.6g}"
    if values.eps != entry.eps:
        yield f"{entry.name}: eps should be {entry.eps} and is {values.eps}"


def _summary(found: Sequence[str]) -> list[str]:
    if not found:
        return []
    return [
        f'"mup": the engine is not what the recipe says, so it was stopped: {listed(found, SHOWN, separator="; ")}. '
        "Something changed the optimizer's groups after the plan was applied: take it out."
    ]


def group_problem(
    groups: Sequence[Mapping[str, Any]], planned: Sequence[Mapping[str, Any]], moments: Mapping[str, Any]
) -> str | None:
    """Says what is wrong with the present values of groups, but for learning rates; cheap enough for every step.

    Args:
        groups: the live optimizer's.
        planned: what they should be.
        moments: betas or momentum of all of them, where no schedule drives them.
    """
    if len(groups) != len(planned):
        return (
            f'"mup": the optimizer has {len(groups)} groups of parameters instead of the {len(planned)} of the plan. '
            "Do not add or remove groups."
        )
    for group, plan in zip(groups, planned, strict=True):
        wanted = {"weight_decay": plan.get("weight_decay"), "eps": plan.get("eps"), **moments}
        for key, value in wanted.items():
            found = tuple(group[key]) if key == "betas" else group.get(key)
            if found != value:
                return (
                    f'"mup": {key} of the group "{plan["name"]}" should be {value} and is {found}. '
                    "Something changed it during the run: take it out, or say it in the recipe."
                )
    return None
