"""The values of a recipe that hold for the run as a whole, read back from the live optimizer and schedule.

Per-parameter values are the guard's. These may be changed after the recipe's were put in and before the training loop:
by a script, by its defaults, or by what a checkpoint brings along.
"""

import argparse
import math
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mup_megatron.megatron.optimizer import parts_of
from mup_megatron.megatron.optimizers import MEGATRON_OPTIMIZERS
from mup_megatron.modules.optimizers import TORCH_OPTIMIZERS
from mup_megatron.recipe import Recipe
from mup_megatron.theory import optimizers

CLOSE = 1e-9
"""Relative: the same product of the same numbers, in another order."""


def problems(recipe: Recipe, values: argparse.Namespace, optimizer: Any, scheduler: Any) -> list[str]:
    """Returns where the schedule, betas, momentum or clipping of this run are not the recipe's."""
    found = [] if optimizer is None else _optimizer_problems(recipe, optimizer)
    if isinstance(scheduler, OptimizerParamScheduler):
        found += _schedule_problems(recipe, values, scheduler)
    return found


def _optimizer_problems(recipe: Recipe, optimizer: Any) -> list[str]:
    h = recipe.moved
    found: dict[str, tuple[Any, Any]] = {}
    for part in parts_of(optimizer):
        found["clip_grad"] = (part.config.clip_grad, h.clip_grad)
        for group in part.param_groups:
            name = group.get("optimizer", recipe.parametrization.optimizer)
            settings = (MEGATRON_OPTIMIZERS[name].settings or TORCH_OPTIMIZERS[name].settings)(h)
            for key in settings.keys() & group.keys():
                live = tuple(group[key]) if isinstance(group[key], list) else group[key]
                found[f"{optimizers()[name].title}'s {key}"] = (live, settings[key])
    return [
        f"{name}: {live} in the optimizer, {wanted} in the recipe. Something changed it after the recipe's values were "
        "put in: a script, or its defaults. Leave it to the recipe."
        for name, (live, wanted) in found.items()
        if live != wanted
    ]


def _schedule_problems(recipe: Recipe, values: argparse.Namespace, scheduler: OptimizerParamScheduler) -> list[str]:
    s = recipe.schedule
    # Megatron counts in samples.
    run = values.train_samples or values.train_iters * values.global_batch_size
    found: dict[str, tuple[Any, Any]] = {
        "lr_decay_style": (scheduler.lr_decay_style, s.lr_decay_style),
        "the length of the warm-up": (scheduler.lr_warmup_steps, s.lr_warmup_fraction * run),
        "the end of the decay": (scheduler.lr_decay_steps, s.lr_decay_fraction * run),
    }
    if s.lr_decay_style == "WSD":
        found["lr_wsd_decay_style"] = (scheduler.lr_wsd_decay_style, s.lr_wsd_decay_style)
        found["the length of the final decay"] = (scheduler.wsd_decay_steps, s.lr_wsd_decay_fraction * run)
    return [
        f"{name}: {_shown(live)} in the schedule, {_shown(wanted)} by the recipe and the length of this run (in "
        "samples). A script changed it, or a checkpoint: to go on to another length set "
        "--override-opt-param-scheduler, and drop --use-checkpoint-opt_param-scheduler."
        for name, (live, wanted) in found.items()
        if not _same(live, wanted)
    ]


def _same(live: Any, wanted: Any) -> bool:
    return live == wanted if isinstance(wanted, str) else math.isclose(live, wanted, rel_tol=CLOSE, abs_tol=CLOSE)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"
