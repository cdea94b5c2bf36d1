"""A plan → Megatron's own optimizer: the `config_overrides` that `get_megatron_optimizer` takes. Holds no theory.

Megatron's scheduler computes each group's learning rate from that group's `max_lr` and `min_lr`, and its weight decay
from its `wd_mult`, so the ratios of the plan hold during warm-up, at the peak and at the floor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, ParamKey
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

from mup_megatron.errors import InputError
from mup_megatron.megatron.names import named_parameters, require_match
from mup_megatron.megatron.versions import distinct_lr_mults
from mup_megatron.theory import Optimizer, Plan, PlanEntry

Override = Mapping[str, float]


def config_overrides(
    model_chunks: Sequence[torch.nn.Module], plan: Plan, config: OptimizerConfig
) -> dict[ParamKey, dict[str, float]]:
    """What `get_megatron_optimizer` takes as `config_overrides` for every parameter to get what the plan says.

    It takes the place of Megatron's standard overrides (no weight decay for vectors), which the plan contains. A
    parameter that gets the base's values is not mentioned. Collective: every rank has to call it.

    Args:
        model_chunks: as passed to `get_megatron_optimizer`; wrapped or not.
        plan: for the whole model.
        config: the optimizer's, with the recipe's base values. Betas, momentum and clipping are not per parameter: they
            are the caller's to copy from the recipe.

    Raises:
        InputError: `config` is not the plan's, or model and plan differ.
    """
    require_base_values(config, plan)
    require_match(model_chunks, plan)
    by_name = _overrides(plan)
    # By identity, because a predicate sees the stage's own name, which two virtual stages share.
    of_parameter = {id(p): by_name[name] for name, p in named_parameters(model_chunks, tied=plan.tied)}
    distinct = dict.fromkeys(tuple(sorted(override.items())) for override in by_name.values())
    return {
        ParamKey(with_name_predicate=_selects(of_parameter, dict(items))): dict(items) for items in distinct if items
    }


def _selects(of_parameter: Mapping[int, Override], override: Override) -> ParamWithNamePredicate:
    # Megatron tells predicates apart by their name alone.
    name = "mup " + " ".join(f"{key}={value!r}" for key, value in sorted(override.items()))
    return ParamWithNamePredicate(name=name, fn=lambda parameter, _: of_parameter.get(id(parameter)) == override)


def _overrides(plan: Plan) -> dict[str, Override]:
    """Each parameter's override. Computed from the plan alone, so that all ranks agree on the groups."""
    return {**distinct_lr_mults({entry.name: _override(entry, plan) for entry in plan.entries})}


def _override(entry: PlanEntry, plan: Plan) -> dict[str, float]:
    override = {}
    if entry.kind.is_vector:
        override["wd_mult"] = 0.0
    elif entry.weight_decay != plan.weight_decay:
        override["wd_mult"] = entry.weight_decay / plan.weight_decay
    if entry.lr != plan.lr:
        override["max_lr"] = entry.lr
        override["min_lr"] = entry.min_lr
        override["lr_mult"] = entry.lr / plan.lr
    if entry.eps is not None and entry.eps != plan.adam_eps:
        override["eps"] = entry.eps
    return override


def require_base_values(config: OptimizerConfig, plan: Plan) -> None:
    """Raises InputError unless an optimizer's configuration is what the plan's ratios are relative to."""
    expected = {"lr": plan.lr, "min_lr": plan.min_lr, "weight_decay": plan.weight_decay}
    if plan.optimizer is Optimizer.ADAM:
        expected["adam_eps"] = plan.adam_eps
    problems = [
        f"{key}: the optimizer is configured with {getattr(config, key)!r}, the recipe says {value!r}. "
        "Give it the recipe's value."
        for key, value in expected.items()
        if getattr(config, key) != value
    ]
    if config.optimizer != plan.optimizer.value:
        problems.append(
            f"optimizer: configured is {config.optimizer!r}, the recipe was tuned with {plan.optimizer.value!r}. "
            "Use the recipe's."
        )
    if getattr(config, "decoupled_lr", None) is not None:
        problems.append(
            "decoupled_lr: it would overwrite what the plan gives to embedding and readout. Drop it, and use "
            "per_parameter in the recipe."
        )
    if plan.optimizer is Optimizer.ADAM and not getattr(config, "decoupled_weight_decay", True):
        problems.append("decoupled_weight_decay: it is off, and the plan's weight decay is AdamW's. Set it to True.")
    if getattr(config, "apply_wd_to_qk_layernorm", False):
        problems.append("apply_wd_to_qk_layernorm: the plan has no weight decay for norms. Turn it off.")
    if problems:
        raise InputError("\n".join(problems))


def require_proportional_schedule(scheduler: Any) -> None:
    """Raises InputError if a Megatron scheduler would break the ratios between groups."""
    if scheduler.init_lr != 0.0:
        raise InputError(
            f"lr_warmup_init: a warm-up that starts at {scheduler.init_lr:g} for every group breaks the ratios between "
            "them; wide layers would start above their peak. Set it to 0."
        )


@dataclass(frozen=True, slots=True)
class GroupValues:
    """What the optimizer holds for one parameter at this moment."""

    lr: float
    max_lr: float
    min_lr: float
    eps: float | None
    weight_decay: float


def live_values(optimizer: Any, model_chunks: Sequence[torch.nn.Module], *, tied: bool) -> dict[str, GroupValues]:
    """What the live optimizer of this rank holds for each parameter whose state it owns, by global name."""
    groups = _groups_by_parameter(optimizer, [p for _, p in named_parameters(model_chunks, tied=tied)])
    return {
        name: GroupValues(
            lr=float(group["lr"]),
            max_lr=float(group["max_lr"]),
            min_lr=float(group["min_lr"]),
            eps=group.get("eps"),
            weight_decay=float(group["weight_decay"]),
        )
        for name, parameter in named_parameters(model_chunks, tied=tied)
        if (group := groups.get(id(parameter))) is not None
    }


def _groups_by_parameter(optimizer: Any, parameters: Sequence[torch.nn.Parameter]) -> dict[int, dict[str, Any]]:
    """The optimizer group of each model parameter, through whatever copies or shards the optimizer made of it."""
    groups: dict[int, dict[str, Any]] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        index_of_shard = getattr(part, "model_param_group_index_map", None)
        of_stored = {id(stored): group for group in part.param_groups for stored in group["params"]}
        for parameter in parameters:
            if index_of_shard is not None:
                if parameter in index_of_shard:
                    groups[id(parameter)] = part.param_groups[index_of_shard[parameter][0]]
            elif (group := of_stored.get(id(getattr(parameter, "main_param", parameter)))) is not None:
                groups[id(parameter)] = group
    return groups
