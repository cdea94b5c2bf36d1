"""Running schedulers on groups with a plan's peaks, and on one group that has the recipe's learning rate."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime import lr_schedules
from support.shapes import gpt, recipe_for
from torch.optim import lr_scheduler as torch_schedules

from mup_megatron.modules.groups import values
from mup_megatron.recipe import PerParameter
from mup_megatron.theory import Plan

LR = 0.006
STEPS = 49


def plan_at(width: float, **changes: Any) -> Plan:
    recipe = recipe_for(gpt(), lr=LR, **{"min_lr": 0.0, **changes})
    louder = (PerParameter(match="embedding.word_embeddings.weight", lr_mult=3.0),) if width > 1 else ()
    return recipe.model_copy(update={"per_parameter": louder}).plan(gpt(width))


PLAN = plan_at(4)
PEAKS = [group.lr for group in values(PLAN).values()]


def optimizer_of(lrs: Sequence[float], kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> torch.optim.Optimizer:
    return kind([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs], lr=LR)


def made_by_deepspeed(entry: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """As DeepSpeedEngine._scheduler_from_config does."""
    kind = getattr(lr_schedules, entry["type"], None) or getattr(torch_schedules, entry["type"])
    return kind(optimizer, **entry["params"])


def history_of(scheduler: Any, steps: int = STEPS) -> list[list[float]]:
    """Learning rates of all groups, [steps + 1][groups]; a metric that is asked for stays as it is."""
    groups = scheduler.optimizer.param_groups
    history = [[float(group["lr"]) for group in groups]]
    on_plateau = type(scheduler).__name__ in ("ReduceLROnPlateau", "GreedyLR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            scheduler.step(*([1.0] if on_plateau else []))
            history.append([float(group["lr"]) for group in groups])
    return history


def follows(history: list[list[float]], reference: list[list[float]], peaks: Sequence[float] = PEAKS) -> bool:
    return all(
        math.isclose(lr, peak * (of_recipe / LR), rel_tol=1e-11, abs_tol=1e-14)
        for lrs, (of_recipe,) in zip(history, reference, strict=True)
        for lr, peak in zip(lrs, peaks, strict=True)
    )
