"""A plan → parameter groups for any torch optimizer, DeepSpeed's engine or the Megatron-DeepSpeed fork. Holds no
theory.

The groups follow from the plan alone, so that all ranks agree on them and on their order whatever each of them holds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from mup_megatron.errors import InputError
from mup_megatron.modules.names import planned_name
from mup_megatron.modules.optimizers import TORCH_OPTIMIZERS
from mup_megatron.theory import Plan, PlanEntry

Group = dict[str, Any]

PADDING = "mup_group_padding"
"""How the name of a parameter begins that only stands for a group of which a pipeline stage holds nothing."""


FLAT = "_flat_param"
"""What FullyShardedDataParallel makes of several parameters, unless it is told to keep them."""


def flattened(name: str) -> str:
    """Returns the message about a parameter that FSDP has flattened."""
    return (
        f"{name}: FullyShardedDataParallel has put weights together that have values of their own in the plan. Wrap "
        "the model with use_orig_params=True."
    )


class Form(StrEnum):
    """The form in which a group says what its parameters get."""

    ABSOLUTE = "absolute"
    """`lr`, `weight_decay`, `eps`: for torch's and DeepSpeed's optimizers and schedulers."""
    RATIO = "ratio"
    """`lr_mult`, `wd_mult` to the base's values, and `eps`: for schedulers that multiply one learning rate by each
    group's ratio, as those of Megatron and of the fork Megatron-DeepSpeed do."""


@dataclass(frozen=True, slots=True)
class GroupValues:
    """The values of the parameters of one group."""

    optimizer: str
    """The one that steps them."""
    lr: float
    weight_decay: float
    eps: float | None
    """None for an optimizer without."""
    has_vectors: bool
    """Biases and gains stand apart from weights even where all their values are alike."""

    @classmethod
    def of(cls, entry: PlanEntry) -> "GroupValues":
        """Returns the values that a parameter needs."""
        return cls(entry.optimizer, entry.lr, entry.weight_decay, entry.eps, entry.is_vector)

    def as_keys(self, plan: Plan, form: Form) -> Group:
        """Returns the keys of a group; `optimizer` is among them where the plan has several.

        Absolute ones say to torch's own optimizer how the plan's updates follow a matrix's shape, if that has a say.
        """
        rest: Group = {} if self.eps is None else {"eps": self.eps}
        if len(plan.optimizers) > 1:
            rest |= {"optimizer": self.optimizer}
        if form is Form.ABSOLUTE:
            if self.optimizer == plan.optimizer and self.optimizer in TORCH_OPTIMIZERS:
                rest |= TORCH_OPTIMIZERS[self.optimizer].of_scale.get(plan.scale_mode, {})
            return {"lr": self.lr, "weight_decay": self.weight_decay, **rest}
        decay = self.weight_decay / plan.weight_decay if plan.weight_decay else 1.0
        return {"lr_mult": self.lr / plan.lr, "wd_mult": decay, **rest}


def members(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Name of a group → the parameters of the whole model that belong into it, in the plan's order.

    A group is called after its first parameter: unique, and the same in a recipe that differs in numbers only.
    """
    found: dict[GroupValues, list[str]] = {}
    for entry in plan.entries:
        found.setdefault(GroupValues.of(entry), []).append(entry.name)
    return {f"mup {names[0]}": tuple(names) for names in found.values()}


def values(plan: Plan) -> dict[str, GroupValues]:
    """Name of a group → what it holds."""
    return {group: GroupValues.of(plan[names[0]]) for group, names in members(plan).items()}


def param_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    plan: Plan,
    *,
    form: Form = Form.ABSOLUTE,
    pad_on: torch.nn.Module | None = None,
) -> list[Group]:
    """Groups in the plan's order: `name`, `params`, and the keys of `form`. Frozen parameters are left out.

    Where several optimizers step a plan's parameters, the `optimizer` of each group says which one it is for.

    Args:
        named_parameters: what this rank holds, by the plan's names, or by those that wrappers make of them.
        plan: for the whole model.
        form: absolute values or ratios.
        pad_on: give a group of which this rank holds nothing one element of its own, registered on this module.
            DeepSpeed's pipeline has one collective for each group under ZeRO-1, and hangs where a stage lacks one; and
            it looks for the name of everything in a group when it saves. None: a group without parameters is left out.

    Raises:
        InputError: a parameter that the plan does not know, by name.
    """
    group_of = {name: group for group, names in members(plan).items() for name in names}
    held: dict[str, list[torch.nn.Parameter]] = {group: [] for group in members(plan)}
    seen: set[str] = set()
    for name, parameter in named_parameters:
        if name.rpartition(".")[2].startswith(PADDING) or not parameter.requires_grad:
            continue
        planned = planned_name(name, group_of)
        if planned is None and name.rpartition(".")[2] == FLAT:
            raise InputError(flattened(name))
        if planned is None:
            raise InputError(f"{name}: the plan has no such parameter. Make the plan from the model that is trained.")
        if planned in seen:
            raise InputError(f"{name}: {planned} of the plan is there already. Hand over the parameters of one model.")
        seen.add(planned)
        held[group_of[planned]].append(parameter)
    if pad_on is not None:
        for index, parameters in enumerate(held.values()):
            if not parameters:
                parameters.append(_padding(pad_on, index))
    of_group: Mapping[str, GroupValues] = values(plan)
    return [
        {"name": group, "params": parameters, **of_group[group].as_keys(plan, form)}
        for group, parameters in held.items()
        if parameters
    ]


def _padding(module: torch.nn.Module, index: int) -> torch.nn.Parameter:
    """One element that stays 0: nothing computes with it, so it has no gradient."""
    like = next(module.parameters())
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
    module.register_parameter(f"{PADDING}{index}", parameter)
    return parameter
