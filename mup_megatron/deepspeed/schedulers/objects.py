"""Schedulers that a script made: refused if they would break the ratios, and kept by what they were made with."""

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from mup_megatron.deepspeed.schedulers import trial
from mup_megatron.deepspeed.schedulers.ratios import SAME, RatioWatch, as_list, is_proportional
from mup_megatron.deepspeed.schedulers.table import LearningRate, Takes, rule_of
from mup_megatron.errors import InputError

_USE_LAMBDA = (
    "Use torch.optim.lr_scheduler.LambdaLR(optimizer, factor) with one function of the step, or another scheduler that "
    "multiplies each group's own learning rate."
)
_OTHER_FLOOR = ", or, for a floor, use deepspeed.runtime.lr_schedules.WarmupCosineLR with its cos_min_ratio"


def require_proportional(scheduler: object, peak_lrs: Sequence[float]) -> None:
    """Refuses a scheduler that would break the ratios between groups at any time.

    Classes of DeepSpeed, torch and Hugging Face are looked into. Another, or one with functions that differ between
    groups, is tried on a copy with groups of its own; the live check sees what comes later than that.

    Args:
        scheduler: as made by a script, on the optimizer.
        peak_lrs: the plan's `lr` of that optimizer's groups, in their order.

    Raises:
        InputError: what is wrong and what to write instead.
    """
    peaks, kind = [float(lr) for lr in peak_lrs], type(scheduler).__name__
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", None)
    if groups is None:
        raise InputError(
            f"lr_scheduler: {kind} has no optimizer with param_groups, so nobody can tell whether it keeps the ratios "
            f"between them. {_USE_LAMBDA}"
        )
    if len(groups) != len(peaks):
        raise InputError(
            f"lr_scheduler: {kind} was made for {len(groups)} groups, and the optimizer has {len(peaks)}. Make it from "
            "the optimizer that is trained."
        )
    parts = list(_parts(scheduler))
    for part in parts:
        if (rule := rule_of(part)) is not None:
            for learning_rate in rule.learning_rates:
                _require_proportional(learning_rate, part, peaks)
            _require_start(part, peaks)
    if not all(rule_of(part) and _has_one_function(part) for part in parts):
        _require_tried(scheduler, peaks)


def _parts(scheduler: Any) -> Iterator[Any]:
    """Yields what a SequentialLR or ChainedScheduler consists of, at any depth, else the scheduler itself."""
    if type(scheduler).__name__ in ("SequentialLR", "ChainedScheduler") and rule_of(scheduler):
        for part in scheduler._schedulers:
            yield from _parts(part)
    else:
        yield scheduler


def _has_one_function(scheduler: Any) -> bool:
    functions = getattr(scheduler, "lr_lambdas", [])
    return all(function is functions[0] for function in functions)


def _require_proportional(learning_rate: LearningRate, scheduler: Any, peaks: list[float]) -> None:
    """Looks at a learning rate that a scheduler of a known class was given."""
    name, takes, given = learning_rate.name, learning_rate.takes, learning_rate.held_by(scheduler)
    is_maximum = takes is not Takes.PEAK or not peaks or math.isclose(given[0], peaks[0], rel_tol=SAME)
    if is_proportional(given, peaks) and is_maximum:
        return
    kind, found = type(scheduler).__name__, _one_or_all(given)
    match takes:
        case Takes.PEAK:
            wrong = f"{name} {found}, and the plan's peaks of its groups are others. Write {name}={as_list(peaks)}."
        case Takes.EACH:
            shares = [max(given) * (peak / max(peaks)) for peak in peaks]
            wrong = (
                f"{name} {found}, which is not in the ratio of its groups' peaks, {as_list(peaks)}. Write one value "
                f"for each, such as {name}={as_list(shares)}."
            )
        case Takes.SHARED | Takes.SMALLEST_CHANGE:
            other = _OTHER_FLOOR if kind == "CosineAnnealingLR" else ""
            wrong = (
                f"one {name} of {found} for all groups, whose peaks are {as_list(peaks)}, so that their ratios are "
                f"lost when it is reached. Write {name}=0{other}."
            )
    raise InputError(f"lr_scheduler: {kind} has {wrong}")


def _require_start(scheduler: Any, peaks: list[float]) -> None:
    """Looks at what a scheduler multiplies: what it found in the groups when it was made, or what is there now."""
    start = getattr(scheduler, "base_lrs", getattr(scheduler, "org_lrs", None))
    if start is None:
        start = [group["lr"] for group in scheduler.optimizer.param_groups]
    if not is_proportional([float(lr) for lr in start], peaks):
        raise InputError(
            f"lr_scheduler: {type(scheduler).__name__} was made when its groups had the learning rates "
            f"{_one_or_all(start)}, and the plan's are {as_list(peaks)}. Make it when the optimizer has the plan's "
            "groups."
        )


def _one_or_all(values: Sequence[Any]) -> str:
    return f"{float(values[0]):.9g}" if len({float(value) for value in values}) == 1 else as_list(values)


def _require_tried(scheduler: Any, peaks: list[float]) -> None:
    kind, watch = type(scheduler).__name__, RatioWatch(max(peaks, default=0.0), peaks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that the optimizer made no step
        try:
            broken = next(((step, lrs) for step, lrs in trial.steps(scheduler) if watch.check(lrs) is not None), None)
        except Exception as error:
            raise InputError(
                f"lr_scheduler: {kind} can't be tried on a copy ({type(error).__name__}: {error}), so nobody can tell "
                f"whether it keeps the ratios between groups. {_USE_LAMBDA}"
            ) from error
    if broken is not None:
        step, lrs = broken
        raise InputError(
            f"lr_scheduler: {kind} breaks the ratios between groups: at step {step} from here their learning rates are "
            f"{as_list(lrs)}, and their peaks are {as_list(peaks)}. {_USE_LAMBDA}"
        )


# ---- loading a scheduler's state -----------------------------------------------------------------------------------

_STARTS = ("base_lrs", "_init_lrs")
"""Where torch's and Hugging Face's schedulers keep what they found in the groups when they were made."""

Held = list[tuple[Any, dict[str, Any]]]


def held_learning_rates(scheduler: object | None) -> Held:
    """Returns each part of a scheduler with the learning rates it was made with, which loading a state may replace.

    What lies in the optimizer's groups is not among it.
    """
    return [
        (part, {name: copy.copy(vars(part)[name]) for name in _holding(part) if name in vars(part)})
        for part in ([] if scheduler is None else _parts(scheduler))
    ]


def restore_learning_rates(held: Held) -> None:
    """Gives them back. Where the schedule stands stays what was loaded."""
    for part, own in held:
        for name, value in own.items():
            setattr(part, name, value)


def _holding(scheduler: object) -> Iterator[str]:
    yield from _STARTS
    if (rule := rule_of(scheduler)) is not None:
        yield from (each.attribute for each in rule.learning_rates if each.takes in (Takes.PEAK, Takes.EACH))
