"""The "scheduler" entry of a DeepSpeed configuration: rewritten so that every group keeps its ratio, and made."""

import contextlib
import inspect
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.utils import logger

from mup_megatron.deepspeed.entry import AUTO
from mup_megatron.deepspeed.schedulers import trial
from mup_megatron.deepspeed.schedulers.ratios import SAME, as_list, is_proportional
from mup_megatron.deepspeed.schedulers.table import RULES, Takes, class_of
from mup_megatron.errors import InputError
from mup_megatron.theory import Plan
from mup_megatron.validation import brief, quoted


def rewritten(entry: Mapping[str, Any], plan: Plan, peak_lrs: Sequence[float]) -> dict[str, Any]:
    """Returns the entry with which every group keeps its ratio.

    Args:
        entry: {"type": …, "params": {…}}.
        plan: says the recipe's lr, which a number written once for all groups is relative to.
        peak_lrs: the `lr` of the groups that this rank's optimizer has, in their order.

    Raises:
        InputError: what is wrong and the entry to write instead.
    """
    name, params, peaks = str(entry.get("type")), dict(entry.get("params") or {}), [float(lr) for lr in peak_lrs]
    kind = class_of(name)
    defaults = {parameter.name: parameter.default for parameter in inspect.signature(kind).parameters.values()}
    for learning_rate in RULES[name].learning_rates:
        key = learning_rate.name
        match learning_rate.takes:
            case Takes.PEAK:
                params[key] = _peak_of_each(key, params.get(key), plan, peaks)
            case Takes.EACH:
                value = params.get(key, AUTO)
                value = defaults[key] if value == AUTO else value
                if value is not inspect.Parameter.empty:
                    params[key] = _share_of_each(key, value, plan, peaks)
            case Takes.SHARED:
                _require_no_floor(name, key, params, plan, peaks)
            case Takes.SMALLEST_CHANGE:
                params[key] = 0.0
    if name == "WarmupCosineLR" and plan.min_lr > 0:
        params["cos_min_ratio"] = _floor(params.get("cos_min_ratio", AUTO), plan)
    _require_complete(name, kind, params)
    return {**entry, "params": params}


def made(entry: Mapping[str, Any], peak_lrs: Sequence[float]) -> Any:
    """Returns the scheduler that an entry describes, on an optimizer of its own with groups of these learning rates.

    Raises:
        InputError: its class refuses a value, when it is made or at its first step.
    """
    name = str(entry.get("type"))
    kind = class_of(name)
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)], "lr": lr} for lr in peak_lrs or [1.0]])
    with _without_remarks():
        try:
            scheduler = kind(optimizer, **dict(entry.get("params") or {}))
            trial.first_step(scheduler)
        except Exception as error:  # each class looks at its values in its own way, or computes with whatever it got
            raise InputError(f"scheduler.params: {name} refuses them ({brief(error)}). Correct them.") from error
    return scheduler


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Silences torch's warning, and DeepSpeed's log, that an optimizer made no step yet."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def for_one_group(entry: Mapping[str, Any], lr: float) -> Any:
    """Returns the scheduler that an entry describes, on a single learning rate, which is its maximum.

    Raises:
        InputError: as `made`, or there is no such scheduler.
    """
    name = str(entry.get("type"))
    class_of(name)
    own = {each.name: lr for each in RULES[name].learning_rates if each.takes is Takes.PEAK}
    return made({"type": name, "params": own | dict(entry.get("params") or {})}, [lr])


def _peak_of_each(parameter: str, value: Any, plan: Plan, peaks: list[float]) -> list[float]:
    if value is None or value == AUTO:
        return peaks
    write = f'Write "{parameter}": {plan.lr:.9g}, or leave it out: each group then gets its own.'
    if isinstance(value, list | tuple):
        _require_one_for_each(parameter, value, peaks, write)
        for i, (own, peak) in enumerate(zip(value, peaks, strict=True)):
            if not math.isclose(_number(parameter, own), peak, rel_tol=SAME):
                raise InputError(
                    f"scheduler.params.{parameter}[{i}] is {brief(own)}, and the plan's peak of that group is "
                    f"{peak:.9g}. {write}"
                )
    elif not math.isclose(_number(parameter, value), plan.lr, rel_tol=SAME):
        raise InputError(
            f"scheduler.params.{parameter} is {value}, and the recipe's lr is {plan.lr:.9g}: the schedule's maximum is "
            f"the recipe's. {write} With Hugging Face's Trainer, learning_rate has to be the recipe's too."
        )
    return peaks


def _share_of_each(parameter: str, value: Any, plan: Plan, peaks: list[float]) -> list[float]:
    if not isinstance(value, list | tuple):
        number = _number(parameter, value)
        return [number * (peak / plan.lr) for peak in peaks]
    write = "Write the one number that goes with the recipe's lr: each group then gets its share."
    _require_one_for_each(parameter, value, peaks, write)
    shares = [_number(parameter, own) for own in value]
    if not is_proportional(shares, peaks):
        raise InputError(
            f"scheduler.params.{parameter} is {quoted(list(value))}, which is not in the ratio of the groups' peaks, "
            f"{as_list(peaks)}. {write}"
        )
    return shares


def _require_one_for_each(parameter: str, value: Sequence[Any], peaks: Sequence[float], write: str) -> None:
    if len(value) != len(peaks):
        raise InputError(
            f"scheduler.params.{parameter} has {len(value)} values, and the optimizer has {len(peaks)} groups. {write}"
        )


def _number(parameter: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(
            f"scheduler.params.{brief(parameter, 60)} is {quoted(value)}. Give a number, or a list with one "
            "number for each group."
        )
    return float(value)


def _require_no_floor(name: str, parameter: str, params: Mapping[str, Any], plan: Plan, peaks: list[float]) -> None:
    value = _number(parameter, params.get(parameter, 0.0))
    if is_proportional([value] * len(peaks), peaks):
        return
    remedy = f'Write "{parameter}": 0'
    if name == "CosineAnnealingLR":
        ratio = {"total_num_steps": params.get("T_max"), "warmup_num_steps": 1, "cos_min_ratio": value / plan.lr}
        remedy += f", or, for a floor, {json.dumps({'type': 'WarmupCosineLR', 'params': ratio})}"
    raise InputError(
        f"scheduler.params.{parameter} is {value:.9g}, one learning rate for all groups, and {name} takes no list. "
        f"{remedy}."
    )


def _floor(ratio: Any, plan: Plan) -> float:
    of_recipe = plan.min_lr / plan.lr
    if ratio != AUTO and not math.isclose(_number("cos_min_ratio", ratio), of_recipe, rel_tol=SAME):
        raise InputError(
            f"scheduler.params.cos_min_ratio is {ratio}, and the recipe's min_lr / lr is {of_recipe:.9g}: the floor is "
            f'the recipe\'s. Write "cos_min_ratio": {of_recipe:.9g}, or leave it out.'
        )
    return of_recipe


def _require_complete(name: str, kind: Callable[..., Any], params: Mapping[str, Any]) -> None:
    for parameter, value in params.items():
        if value == AUTO:
            raise InputError(
                f'scheduler.params.{brief(parameter, 60)} is "{AUTO}", which Hugging Face\'s Trainer or Accelerate '
                "would fill in. Write the number."
            )
    signature = inspect.signature(kind)
    try:
        signature.bind(None, **params)
    except TypeError as error:
        allowed = ", ".join(list(signature.parameters)[1:])
        raise InputError(f"scheduler.params: {brief(error)}. {name} takes {brief(allowed, 130)}.") from None
