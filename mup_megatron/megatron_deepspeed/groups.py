"""A plan → the fork's parameter groups, as ratios to the base's learning rate and weight decay. Holds no theory.

The fork's scheduler gives each group `lr_mult` times one learning rate and `wd_mult` times one weight decay at every
step, so the ratios hold during warm-up, at the peak and at the floor. An absolute `lr` in a group it would overwrite.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mup_megatron.errors import InputError
from mup_megatron.megatron_deepspeed.names import PADDING, named_parameters, unwrapped
from mup_megatron.theory import Plan, PlanEntry

Group = dict[str, Any]


@dataclass(frozen=True, slots=True)
class GroupValues:
    """What the fork's optimizer and scheduler read from a group."""

    lr_mult: float
    wd_mult: float
    eps: float | None
    """None for SGD."""

    @classmethod
    def of(cls, entry: PlanEntry, plan: Plan) -> "GroupValues":
        """What a parameter needs, relative to the base's values that the optimizer is configured with."""
        decay = entry.weight_decay / plan.weight_decay if plan.weight_decay else 1.0
        return cls(lr_mult=entry.lr / plan.lr, wd_mult=decay, eps=entry.eps)

    def as_keys(self) -> dict[str, float]:
        """The keys of a group."""
        eps = {} if self.eps is None else {"eps": self.eps}
        return {"lr_mult": self.lr_mult, "wd_mult": self.wd_mult, **eps}


def members(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Name of a group → the parameters of the whole model that belong into it, in the plan's order.

    From the plan alone, so that all ranks agree on the groups and their order. A group is called after its first
    parameter: unique, and the same in a recipe that differs in numbers only.
    """
    found: dict[GroupValues, list[str]] = {}
    for entry in plan.entries:
        found.setdefault(GroupValues.of(entry, plan), []).append(entry.name)
    return {f"mup {names[0]}": tuple(names) for names in found.values()}


def values(plan: Plan) -> dict[str, GroupValues]:
    """Name of a group → what it holds."""
    return {group: GroupValues.of(plan[names[0]], plan) for group, names in members(plan).items()}


def param_groups(chunks: Sequence[torch.nn.Module], plan: Plan, *, every_group: bool) -> list[Group]:
    """Groups as the fork's `get_param_groups` returns them: name, params, lr_mult, wd_mult; and eps.

    Args:
        chunks: what this rank holds, wrapped or not.
        plan: for the whole model.
        every_group: give a group of which this rank holds nothing one element of its own. DeepSpeed's pipeline has one
            collective for each group under ZeRO-1, and hangs where a stage lacks one. The element is registered on the
            model, because DeepSpeed looks for the name of everything that is in a group when it saves.
    """
    group_of = {name: group for group, names in members(plan).items() for name in names}
    held: dict[str, list[torch.nn.Parameter]] = {group: [] for group in members(plan)}
    for _, name, parameter in named_parameters(chunks):
        held[group_of[name]].append(parameter)
    if every_group:
        for index, parameters in enumerate(held.values()):
            if not parameters:
                parameters.append(_padding(unwrapped(chunks[0]), index))
    by_name = values(plan)
    return [
        {"name": group, "params": parameters, **by_name[group].as_keys()}
        for group, parameters in held.items()
        if parameters
    ]


def _padding(model: torch.nn.Module, index: int) -> torch.nn.Parameter:
    """One element that stays 0: nothing computes with it, so it has no gradient."""
    like = next(model.parameters())
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
    model.register_parameter(f"{PADDING}{index}", parameter)
    return parameter


def problems(chunks: Sequence[torch.nn.Module], plan: Plan, given: Iterable[Group]) -> list[str]:
    """Why the plan's groups cannot take the place of those that the fork made, if they cannot."""
    found = []
    given_of = {id(parameter): group for group in given for parameter in group["params"]}
    for fork_name, name, parameter in named_parameters(chunks):
        if not parameter.requires_grad:
            found.append(f"{fork_name}: it is frozen. Only training of all parameters is supported.")
            continue
        own = given_of.get(id(parameter), {})
        # Under ZeRO-3 the fork itself takes every parameter for a vector, because what is left of one is.
        decays = own.get("wd_mult", 1.0) != 0.0
        other_decay = not hasattr(parameter, "ds_shape") and decays == plan[name].kind.is_vector
        if own.get("lr_mult", 1.0) != 1.0 or (own and other_decay):
            found.append(
                f"{fork_name}: the script gives it a learning rate or weight decay of its own, which the plan would "
                "replace. Say it with per_parameter in the recipe."
            )
    return found


def restore(groups: Iterable[Group], plan: Plan) -> None:
    """Gives the groups of a live optimizer the plan's values again, which a load replaces by those that were saved.

    Raises:
        InputError: the groups are not the plan's.
    """
    by_name = values(plan)
    for group in groups:
        if group.get("name") not in by_name:
            raise InputError(
                f"--load: the optimizer has a group {group.get('name')!r} now, which is not the plan's. Load the "
                "weights alone with --finetune."
            )
        group.update(by_name[group["name"]].as_keys())


def tell_apart_the_same(before: Plan, now: Plan) -> bool:
    """Whether two plans for one model put the same parameters together."""
    left: Mapping[str, tuple[str, ...]] = members(before)
    return left == members(now)
