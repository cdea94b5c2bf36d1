"""What the scripts of users have in common who write their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mup_megatron.check.subjects.scripts import Task
from mup_megatron.modules import apply_plan
from mup_megatron.theory import Plan, PlanEntry


def adamw(groups: Any, task: Task, kind: Any = torch.optim.AdamW, **options: Any) -> Any:
    """The recipe's optimizer, or one of its kind."""
    h = task.recipe.hyperparameters
    return kind(groups, lr=h.lr, betas=(h.adam_beta1, h.adam_beta2), **options)


def singly(model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """A group for each parameter."""
    return [
        {"params": [p], "name": name, "lr": e.lr, "eps": e.eps, "weight_decay": e.weight_decay}
        for name, p in model.named_parameters()
        if (e := plan[name])
    ]


def own_groups(change: Callable[[dict[str, Any], PlanEntry, Task], None]) -> Callable[[nn.Module, Task], Any]:
    """A script with a group for each parameter, of which each is changed."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups = singly(model, task.plan)
        for group in groups:
            change(group, task.plan[group["name"]], task)
        return adamw(groups, task)

    return prepare


class OwnSchedule:
    """Sets each group's learning rate: (step, peak, group) → rate."""

    def __init__(self, optimizer: Any, rate: Callable[[int, float, dict[str, Any]], float]) -> None:
        self._optimizer, self._rate, self._step = optimizer, rate, 0
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._set()

    def step(self) -> None:
        """Once after each of the optimizer's."""
        self._step += 1
        self._set()

    def _set(self) -> None:
        for peak, group in zip(self._peaks, self._optimizer.param_groups, strict=False):
            group["lr"] = self._rate(self._step, peak, group)


def discard(_: Any) -> None:
    """For what changes in place, where nothing is to be returned."""
