"""A plan → Megatron's own optimizer: the `config_overrides` that `get_megatron_optimizer` takes. Holds no theory.

Megatron's scheduler computes each group's learning rate from that group's `max_lr` and `min_lr`, and its weight decay
from its `wd_mult`, so the ratios of the plan hold during warm-up, at the peak and at the floor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig, ParamKey
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

from mup_megatron.errors import InputError
from mup_megatron.megatron.names import named_parameters, require_match
from mup_megatron.megatron.optimizers import MEGATRON_OPTIMIZERS, absence, distributed_problem, require_possible
from mup_megatron.megatron.versions import distinct_lr_mults
from mup_megatron.theory import Plan, PlanEntry

__all__ = ["config_overrides"]

Override = Mapping[str, Any]


def config_overrides(
    model_chunks: Sequence[torch.nn.Module], plan: Plan, config: OptimizerConfig
) -> dict[ParamKey, dict[str, Any]]:
    """Returns the `config_overrides` of `get_megatron_optimizer`, for every parameter to get what the plan says.

    It takes the place of Megatron's standard overrides (no weight decay for vectors), which the plan contains. A
    parameter that gets the base's values is not mentioned. To be used once: Megatron adds to it for some optimizers.
    Collective: every rank has to call it.

    Args:
        model_chunks: as passed to `get_megatron_optimizer`; wrapped or not.
        plan: for the whole model.
        config: the optimizer's, with the recipe's base values, `**recipe.optimizer_values` among them. Clipping is the
            caller's to copy from the recipe.

    Raises:
        InputError: `config` is not the plan's, or model and plan differ.
    """
    require_base_values(config, plan)
    require_match(model_chunks, plan)
    by_name = overrides_by_name(plan)
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


def overrides_by_name(plan: Plan) -> dict[str, Override]:
    """Each parameter's override. Computed from the plan alone, so that all ranks agree on the groups."""
    return {**distinct_lr_mults({entry.name: _override(entry, plan) for entry in plan.entries})}


def _override(entry: PlanEntry, plan: Plan) -> dict[str, Any]:
    override: dict[str, Any] = {}
    if entry.optimizer != plan.optimizer and entry.optimizer not in MEGATRON_OPTIMIZERS[plan.optimizer].leaves_to:
        override["optimizer"] = entry.optimizer
    if entry.is_vector:
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
    known = require_possible(plan.optimizer, plan.optimizers)
    if (absent := absence(plan.optimizer)) is not None:
        raise InputError(absent)
    own = {**plan.optimizer_values, **known.fixed}
    expected = {"lr": plan.lr, "min_lr": plan.min_lr, "weight_decay": plan.weight_decay, **own}
    # These a plan of an earlier release says too, which has no such values.
    if plan.scale_mode is not None:
        expected["muon_scale_mode"] = plan.scale_mode
    if any(entry.eps is not None for entry in plan.entries):
        expected["adam_eps"] = plan.adam_eps
    problems = [
        f"{key}: the optimizer is configured with {getattr(config, key)!r}, the recipe says {value!r}. "
        "Give it the recipe's value."
        for key, value in expected.items()
        if getattr(config, key) != value
    ]
    if config.optimizer != plan.optimizer:
        problems.append(
            f"optimizer: configured is {config.optimizer!r}, the recipe was tuned with {plan.optimizer!r}. "
            "Use the recipe's."
        )
    if known.leaves_to:
        ranks = [parallel_state.get_tensor_model_parallel_world_size()]
        ranks += [parallel_state.get_expert_tensor_parallel_world_size()]
        problems += filter(None, [known.split_problem(vars(config), max(ranks))])
        if config.use_distributed_optimizer or config.use_layer_wise_distributed_optimizer:
            problems += filter(None, [distributed_problem(plan.optimizer)])
    if config.decoupled_lr is not None:
        problems.append(
            "decoupled_lr: it would overwrite what the plan gives to embedding and readout. Drop it, and use "
            "per_parameter in the recipe."
        )
    decoupled = any(MEGATRON_OPTIMIZERS[name].decoupled_weight_decay for name in plan.optimizers)
    if decoupled and not config.decoupled_weight_decay:
        problems.append("decoupled_weight_decay: it is off, and the plan's weight decay is AdamW's. Set it to True.")
    if config.apply_wd_to_qk_layernorm:
        problems.append("apply_wd_to_qk_layernorm: the plan has no weight decay for norms. Turn it off.")
    if problems:
        raise InputError("\n".join(problems))


@dataclass(frozen=True, slots=True)
class LiveGroupValues:
    """The values that the optimizer holds for one parameter at this moment."""

    lr: float
    max_lr: float | None
    """None where the group has none of its own, as after loading what an old Megatron saved; likewise `min_lr`."""
    min_lr: float | None
    eps: float | None
    """None for an optimizer without."""
    weight_decay: float
    wd_mult: float
    """What the scheduler multiplies the base's weight decay by."""
    optimizer: str | None
    """By which Megatron steps the group; None where that is the configured one."""

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "LiveGroupValues":
        """Returns the values of one group."""
        return cls(
            lr=float(group["lr"]),
            max_lr=group.get("max_lr"),
            min_lr=group.get("min_lr"),
            eps=group.get("eps"),
            weight_decay=float(group["weight_decay"]),
            wd_mult=float(group.get("wd_mult", 1.0)),
            optimizer=group.get("optimizer"),
        )


def live_values(optimizer: Any, model_chunks: Sequence[torch.nn.Module], *, tied: bool) -> dict[str, LiveGroupValues]:
    """Returns what the live optimizer of this rank holds for each parameter whose state it owns, by global name."""
    return {
        name: LiveGroupValues.of(groups[0])
        for name, _, groups in parameters_with_groups(optimizer, model_chunks, tied=tied)
        if groups
    }


def parameters_with_groups(
    optimizer: Any, model_chunks: Sequence[torch.nn.Module], *, tied: bool
) -> list[tuple[str, torch.nn.Parameter, list[dict[str, Any]]]]:
    """(global name, parameter, the groups that hold it) of everything on this rank, through whatever copies or shards
    the optimizer made of it.

    One group each, if all is well: none for what is frozen or lost, and with the distributed optimizer for what another
    rank updates.
    """
    found: list[tuple[str, torch.nn.Parameter, list[dict[str, Any]]]] = [
        (name, parameter, []) for name, parameter in named_parameters(model_chunks, tied=tied)
    ]
    for part in parts_of(optimizer):
        groups_of: dict[int, list[dict[str, Any]]] = {}
        for group in part.param_groups:
            for stored in group["params"]:
                # Megatron-FSDP puts its own in the model's place, and the model's back for a pass.
                for own in {id(stored), id(getattr(stored, "orig_param", stored))}:
                    groups_of.setdefault(own, []).append(group)
        for _, parameter, groups in found:
            stored = _stored(part, parameter)
            groups += groups_of.get(id(stored), []) if stored is not None else []
    return found


def parts_of(optimizer: Any) -> list[Any]:
    """Megatron's single optimizers inside one that chains them."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def is_sharded(part: Any) -> bool:
    """Returns whether it is the distributed optimizer, of which each data-parallel rank updates another share."""
    return hasattr(part, "model_param_group_index_map")


def _stored(part: Any, parameter: torch.nn.Parameter) -> Any:
    """Returns the tensor that stands for a model's parameter in the groups of an optimizer; None if there is none."""
    if not is_sharded(part):
        return getattr(parameter, "main_param", parameter)
    if parameter not in part.model_param_group_index_map:
        return None
    index, order = part.model_param_group_index_map[parameter]
    shards = part.param_groups[index]["params"]
    return shards[order] if order < len(shards) else None
