"""Recipes and plans that are used wrongly."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from exam import models
from exam.mistakes.entries import mistake
from exam.mistakes.scripts import adamw, own_groups, singly
from exam.setups import Modules, Setup
from mup_megatron.check.subjects.scripts import Task, prepare_by_plan
from mup_megatron.huggingface import plan_for
from mup_megatron.modules import apply_plan, param_groups, plan_for_module
from mup_megatron.theory import Plan, PlanEntry, Role


def _other_plan(setup: Modules, task: Task, *, width: int | None = None, **content: Any) -> Plan:
    """The plan of a script that has another recipe."""
    recipe = task.recipe.model_copy(update=content)
    if setup.base is not None:
        return plan_for(setup.factory(width or task.width), recipe)  # type: ignore[arg-type]
    return plan_for_module(lambda: setup.factory(width or task.width), recipe)


def _rates_from(setup: Modules, plan: Callable[[Task], Plan]) -> Setup:
    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups, other = singly(model, task.plan), plan(task)
        for group in groups:
            entry = other[group["name"]]
            group["lr"] = entry.lr
        return adamw(groups, task)

    return setup.with_script(prepare)


@mistake("lm", "recipe", "blocks.*")
def rates_by_the_rule_of_sgd(setup: Modules) -> Setup:
    """The learning rates are those that the recipe would give to SGD."""

    def plan(task: Task) -> Plan:
        sgd = task.recipe.parametrization.model_copy(update={"optimizer": "sgd"})
        return _other_plan(setup, task, parametrization=sgd)

    return _rates_from(setup, plan)


@mistake("lm-sgd", "recipe")
def sgd_with_the_rates_of_adam(setup: Modules) -> Setup:
    """The learning rates of a run with SGD are those that the recipe would give to Adam."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        adam = task.recipe.parametrization.model_copy(update={"optimizer": "adam"})
        plan = _other_plan(setup, task, parametrization=adam)
        groups = [{"params": [p], "lr": plan[n].lr, "weight_decay": 0.0} for n, p in model.named_parameters()]
        return torch.optim.SGD(groups, momentum=task.recipe.hyperparameters.sgd_momentum)

    return setup.with_script(prepare)


@mistake("lm-sgd", "optimizer")
def momentum_dampened(setup: Modules) -> Setup:
    """The momentum of SGD is dampened by a half, as the base's was not."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups = param_groups(model.named_parameters(), task.plan)
        return torch.optim.SGD(groups, momentum=task.recipe.hyperparameters.sgd_momentum, dampening=0.5)

    return setup.with_script(prepare)


@mistake("lm", "recipe", "blocks.*")
def rates_of_a_smaller_sibling(setup: Modules) -> Setup:
    """The learning rates were written down once, for a model of width 64, and are used at all widths."""
    return _rates_from(setup, lambda task: _other_plan(setup, task, width=64))


@mistake("lm", "recipe")
def base_of_half_the_width(setup: Modules) -> Setup:
    """The script's plan leads from a base that is half as wide as the one that was tuned."""
    other = replace(setup, base_width=models.BASE // 2).recipe.base

    def prepare(model: nn.Module, task: Task) -> Any:
        plan = _other_plan(setup, task, base=other)
        return prepare_by_plan(model, replace(task, plan=plan))

    return setup.with_script(prepare)


@mistake("lm", "recipe", "blocks.*")
def ratio_from_the_number_of_parameters(setup: Modules) -> Setup:
    """The ratio of widths is taken to be the root of that of numbers of parameters, embeddings included."""

    def change(group: dict[str, Any], entry: PlanEntry, task: Task) -> None:
        if entry.role is Role.HIDDEN:
            counts = [sum(p.numel() for p in setup.factory(w).parameters()) for w in (models.BASE, task.width)]
            group["lr"] = task.plan.lr / math.sqrt(counts[1] / counts[0])

    return setup.with_script(own_groups(change))


@mistake("lm-overrides", "recipe")
def overrides_matched_against_the_wrong_names(setup: Modules) -> Setup:
    """The recipe's factor for the first block was written for the last one by a script that counts from behind."""

    def plan(task: Task) -> Plan:
        own = [o.model_copy(update={"match": "blocks.1.*"}) for o in task.recipe.per_parameter]
        return _other_plan(setup, task, per_parameter=tuple(own))

    return _rates_from(setup, plan)


@mistake("convnet", "recipe", "blocks.*")
def kernel_area_in_the_ratio(setup: Modules) -> Setup:
    """The learning rate of convolutions is divided by fan_in over the base's channels: by the kernel's area as well."""

    def change(group: dict[str, Any], entry: PlanEntry, _task: Task) -> None:
        if len(entry.shape) == 4 and entry.role is Role.HIDDEN:
            group["lr"] /= 9

    return setup.with_script(own_groups(change))


@mistake("convnet", "recipe", "stem*")
def stem_as_a_hidden_layer(setup: Modules) -> Setup:
    """All convolutions count as hidden, the first one over three colours too."""

    def change(group: dict[str, Any], entry: PlanEntry, task: Task) -> None:
        if entry.name == "stem.weight":
            group["lr"] *= models.BASE / task.width

    return setup.with_script(own_groups(change))


@mistake("classifier", "recipe", "last*", "first*")
def layers_numbered_instead_of_named(setup: Modules) -> Setup:
    """Every layer but the last counts as hidden, the first one too, in learning rate and eps."""

    def change(group: dict[str, Any], entry: PlanEntry, task: Task) -> None:
        if entry.name == "first.weight":
            group["lr"] *= models.BASE / task.width
            group["weight_decay"] *= task.width / models.BASE

    return setup.with_script(own_groups(change))
