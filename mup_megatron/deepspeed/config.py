"""A recipe → a DeepSpeed configuration with the `"mup"` entry, and whether an existing one goes with a recipe.

What a configuration may say beside the entry is in `entry.py` and `schedulers.py`, which the live engine asks as well.
"""

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mup_megatron.deepspeed import entry as entries
from mup_megatron.deepspeed.entry import AUTO, KEY, Configuration, SchedulerSection
from mup_megatron.deepspeed.optimizers import optimizer_of
from mup_megatron.errors import InputError
from mup_megatron.modules.groups import values
from mup_megatron.recipe import Recipe, load_recipe
from mup_megatron.theory import Plan

_SHORTEST_WARMUP = 2
"""DeepSpeed's warm-ups take at least this many steps, the first of them at 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """The values of a configuration that no recipe has."""

    train_iters: int | None = None
    """Length of the run in optimizer steps: the recipe's schedule is in fractions of it. None: no "scheduler"."""
    global_batch_size: int | None = None
    """None: the Trainer's or Accelerate's, as is the micro-batch size."""
    micro_batch_size: int | None = None
    zero_stage: Literal[0, 1, 2, 3] = 1
    bf16: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False


def configuration(recipe: Recipe, *, path: str, settings: EngineSettings) -> dict[str, Any]:
    """Returns a configuration that trains with a recipe.

    Args:
        recipe: decides the optimizer, its values, the schedule and the clipping. Its numbers are written out for those
            who read the file, and compared by the engine.
        path: where the recipe's file is.
        settings: the rest.

    Raises:
        InputError: DeepSpeed has no scheduler for the recipe's schedule, or the settings contradict each other.
    """
    entries.require_horizon(settings.global_batch_size, recipe)
    kind = optimizer_of(recipe).type
    params = entries.optimizer_params(kind, {}, recipe)
    clipping: float | str = recipe.moved.clip_grad
    if settings.global_batch_size is None:
        # The Trainer compares numbers with its own arguments. What is left open the recipe fills in, not the Trainer.
        params, clipping = dict.fromkeys(params, AUTO), AUTO
    optimizer = {"type": kind, "params": params}
    scheduler = None if settings.train_iters is None else _scheduler(recipe, settings.train_iters)
    zero = _zero(settings)
    if settings.zero_stage == 3 and not optimizer_of(recipe).goes_everywhere:
        zero["reduce_scatter"] = False
    entries.require_possible(Configuration.model_validate({"zero_optimization": zero}), recipe)
    return {
        **_batches(settings),
        "optimizer": optimizer,
        **({} if scheduler is None else {"scheduler": scheduler}),
        "gradient_clipping": clipping,
        "zero_optimization": zero,
        **({"bf16": {"enabled": True}} if settings.bf16 else {}),
        KEY: {"recipe": path},
    }


def _batches(settings: EngineSettings) -> dict[str, Any]:
    if settings.global_batch_size is None:
        keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        own = {} if settings.micro_batch_size is None else {keys[1]: settings.micro_batch_size}
        return dict.fromkeys(keys, AUTO) | own
    micro = settings.micro_batch_size
    if micro is None:
        return {"train_batch_size": settings.global_batch_size}
    if settings.global_batch_size % micro:
        raise InputError(
            f"--micro-batch-size {micro} does not divide --global-batch-size {settings.global_batch_size}. Choose a "
            f"divisor."
        )
    return {"train_batch_size": settings.global_batch_size, "train_micro_batch_size_per_gpu": micro}


def _zero(settings: EngineSettings) -> dict[str, Any]:
    if settings.offload_parameters and settings.zero_stage != 3:
        raise InputError("--offload-parameters: only ZeRO stage 3 can. Give --zero-stage 3.")
    if settings.offload_optimizer and settings.zero_stage == 0:
        raise InputError("--offload-optimizer: ZeRO stage 0 cannot. Give --zero-stage 1, 2 or 3.")
    return {
        "stage": settings.zero_stage,
        **({"offload_optimizer": {"device": "cpu"}} if settings.offload_optimizer else {}),
        **({"offload_param": {"device": "cpu"}} if settings.offload_parameters else {}),
    }


def _scheduler(recipe: Recipe, train_iters: int) -> dict[str, Any] | None:
    """The recipe's schedule in DeepSpeed's terms; None where the learning rate is constant from the first step on."""
    schedule, h = recipe.schedule, recipe.moved
    warmup = max(round(schedule.lr_warmup_fraction * train_iters), _SHORTEST_WARMUP)
    ramp = {"warmup_num_steps": warmup, "warmup_type": "linear"}
    decay = {"total_num_steps": round(schedule.lr_decay_fraction * train_iters), **ramp}
    match schedule.lr_decay_style:
        case "constant":
            return {"type": "WarmupLR", "params": ramp} if schedule.lr_warmup_fraction else None
        case "linear" if h.min_lr == 0.0:
            return {"type": "WarmupDecayLR", "params": decay}
        case "cosine":
            return {"type": "WarmupCosineLR", "params": {**decay, "cos_min_ratio": h.min_lr / h.lr}}
    what = f"{schedule.lr_decay_style}{' with a min_lr above 0' if schedule.lr_decay_style == 'linear' else ''}"
    raise InputError(
        f"schedule: DeepSpeed has no scheduler for {what}. Leave out --train-iters and hand a torch scheduler to "
        "deepspeed.initialize as lr_scheduler, or name one of Hugging Face's in its Trainer; it is checked at start."
    )


def problems(content: object, recipe: Recipe, plan: Plan, *, source: str) -> list[str]:
    """Lists what of a configuration does not go with a recipe, each in a sentence; nothing where all does.

    Raises:
        InputError: it is no configuration: something in it is not of its type; names key and `source`.
    """
    config = entries.configuration(content, source=source)
    assert isinstance(content, Mapping)
    checks: list[Callable[[], object]] = [
        lambda: _require_entry(content, recipe),
        lambda: entries.require_supported(config),
        lambda: entries.optimizer_params(config.made_optimizer.type, config.made_optimizer.params, recipe),
        lambda: entries.require_possible(config, recipe),
        lambda: entries.gradient_clipping(config.gradient_clipping, recipe),
        lambda: entries.require_horizon(content.get("train_batch_size"), recipe),
        lambda: require_fitting_scheduler(config, plan),
    ]
    found = []
    for check in checks:
        try:
            check()
        except InputError as error:
            found += str(error).splitlines()
    return found


def _require_entry(content: Mapping[str, Any], recipe: Recipe) -> None:
    entry = entries.entry_of(content)
    if entry is None:
        raise InputError(f'"{KEY}": missing, so DeepSpeed would train without μP. Write "{KEY}": {{"recipe": "…"}}.')
    named = load_recipe(Path(entry.recipe))
    if named.fingerprint != recipe.fingerprint:
        raise InputError(
            f'"{KEY}": {entry.recipe} is another recipe (fingerprint {named.fingerprint[:12]}) than the one that this '
            f"is "
            f"checked against ({recipe.fingerprint[:12]}). Name that one."
        )


def require_fitting_scheduler(config: Configuration, plan: Plan) -> None:
    """Raises InputError for a scheduler that breaks the ratios between a plan's groups, or refuses its params."""
    if config.scheduler is None or config.scheduler == SchedulerSection():
        return
    # DeepSpeed's log goes to the standard output that it finds when it is imported, where answers are.
    with contextlib.redirect_stdout(sys.stderr):
        from mup_megatron.deepspeed.schedulers import made, rewritten

    # What the Trainer fills in says nothing of ratios, and is looked at when it is there.
    params = dict(config.scheduler.params or {})
    later = {key: 2 for key in ("total_num_steps", "warmup_num_steps") if params.get(key) == AUTO}
    peaks = [group.lr for group in values(plan).values()]
    made(rewritten({"type": config.scheduler.type, "params": params | later}, plan, peaks), peaks)
