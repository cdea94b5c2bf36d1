"""Which learning-rate schedulers keep the ratios between groups, and how a JSON entry is rewritten until it does.

A plan gives each group of an optimizer a peak. A schedule keeps the ratios where every group's learning rate is, at
every step, its peak times one factor that all groups share: then the whole model follows the schedule that was tuned.
What multiplies the groups' own learning rates does. A number in the unit of a learning rate, written once for all
groups (a maximum, a floor, the start of a warm-up), does not, unless it is 0.

    JSON entry                        `rewritten`: such a number becomes a list, one value for each group in the plan's
                                      ratio, or is refused where a list is impossible
    a scheduler that a script made    `require_proportional`: looked into if its class is known, else tried on a copy
    every step of the run             `RatioWatch`

What a number written once means: it was meant for the recipe's learning rate, and each group gets its share. So a
maximum has to be the recipe's lr; another one is refused, for which of the two is meant is not ours to choose. Nor is
the schedule's shape: steps, factors and ends are the entry's, except that a recipe's min_lr above 0 is the floor of
WarmupCosineLR, the only scheduler of DeepSpeed's with one (a min_lr of 0, the default, says nothing).

Nothing here looks at a model or an engine.
"""

import contextlib
import copy
import inspect
import json
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.runtime import lr_schedules
from deepspeed.utils import logger

from mup_megatron.deepspeed.entry import AUTO
from mup_megatron.deepspeed.guard import CLOSE
from mup_megatron.errors import InputError
from mup_megatron.theory import Plan
from mup_megatron.validation import brief, quoted

SAME = 1e-7
"""The same for numbers that somebody wrote: what is accepted passes the live check."""

NEGLIGIBLE = 1e-12
"""Part of a group's peak below which a learning rate is rounding, left where a decay to 0 cancels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """Which parameters of a scheduler are learning rates. All others are steps and factors, the same for all groups."""

    peak: str | None = None
    """The maximum, one value for each group."""
    scaled: tuple[str, ...] = ()
    """Others with one value for each group."""
    shared: tuple[str, ...] = ()
    """One value for all groups, which keeps the ratios at 0 only."""
    smallest_change: str | None = None
    """A change of the learning rate below which it is not made; for all groups, so it has to be 0 as well."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Parameter → the attribute of the scheduler, or key of a group, that holds it, where that has another name."""


_WARMUP = _Rule(
    peak="warmup_max_lr",
    scaled=("warmup_min_lr",),
    attributes={"warmup_max_lr": "max_lrs", "warmup_min_lr": "min_lrs"},
)

_RULES: dict[str, _Rule] = {
    # DeepSpeed
    "WarmupLR": _WARMUP,
    "WarmupDecayLR": _WARMUP,
    "WarmupCosineLR": _Rule(),
    "OneCycle": _Rule(
        peak="cycle_max_lr",
        scaled=("cycle_min_lr",),
        attributes={"cycle_max_lr": "max_lrs", "cycle_min_lr": "min_lrs"},
    ),
    # A search for a learning rate begins where it likes and goes where it likes: it has no maximum.
    "LRRangeTest": _Rule(scaled=("lr_range_test_min_lr",), attributes={"lr_range_test_min_lr": "min_lr"}),
    # torch; Hugging Face's schedules are LambdaLR and ReduceLROnPlateau
    "LambdaLR": _Rule(),
    "MultiplicativeLR": _Rule(),
    "StepLR": _Rule(),
    "MultiStepLR": _Rule(),
    "ConstantLR": _Rule(),
    "LinearLR": _Rule(),
    "ExponentialLR": _Rule(),
    "PolynomialLR": _Rule(),
    "CosineAnnealingLR": _Rule(shared=("eta_min",)),
    "CosineAnnealingWarmRestarts": _Rule(shared=("eta_min",)),
    "CyclicLR": _Rule(peak="max_lr", scaled=("base_lr",), attributes={"max_lr": "max_lrs", "base_lr": "base_lrs"}),
    "OneCycleLR": _Rule(peak="max_lr"),
    "ReduceLROnPlateau": _Rule(scaled=("min_lr",), smallest_change="eps", attributes={"min_lr": "min_lrs"}),
    "SequentialLR": _Rule(),
    "ChainedScheduler": _Rule(),
    # Hugging Face. Its max_lr is a bound of an adaptive schedule, not the schedule's peak.
    "GreedyLR": _Rule(
        scaled=("min_lr", "max_lr"),
        smallest_change="eps",
        attributes={"min_lr": "min_lrs", "max_lr": "max_lrs"},
    ),
}

_MADE_BY = ("deepspeed", "torch", "transformers")
"""The packages whose classes the rules are about."""

_NEEDS_CODE = ("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler")
"""torch's schedulers that take functions or schedulers, which JSON can't hold."""


# ---- live check ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RatioWatch:
    """Whether all groups are at the same part of their peaks. Made once, asked at every step."""

    plan_lr: float
    """The recipe's learning rate."""
    peak_lrs: Sequence[float]
    """Of this rank's groups, above 0."""

    def check(self, current_lrs: Sequence[Any]) -> str | None:
        """None, or a sentence or two that names the group that is farthest off, and the likely cause."""
        lrs = [float(lr) for lr in current_lrs]
        if len(lrs) != len(self.peak_lrs):
            return f"The optimizer has {len(lrs)} groups, and {len(self.peak_lrs)} were made from the plan."
        factors = [lr / peak for lr, peak in zip(lrs, self.peak_lrs, strict=True)]
        if not factors:
            return None
        common = statistics.median_low(factors)
        off = [i for i, factor in enumerate(factors) if not _is_close(factor, common)]
        if not off:
            return None
        flat = all(math.isclose(lr, lrs[0], rel_tol=CLOSE) for lr in lrs)
        if flat:
            common = lrs[0] / self.plan_lr
            cause = (
                "One learning rate was written into every group, as a scheduler does with one maximum for all of them, "
                "or set_lr() of DeepSpeed's optimizers."
            )
        elif len(off) == 1:
            cause = "Something set the learning rate of this group alone."
        else:
            cause = "A floor or a warm-up's start that is one number for all groups does that: give each group its own."
        worst = max(
            (i for i, factor in enumerate(factors) if not _is_close(factor, common)),
            key=lambda i: abs(factors[i] - common),
        )
        peak = self.peak_lrs[worst]
        return (
            f"param_groups[{worst}]: the learning rate should be {common * peak:.8g}, its peak {peak:.8g} times the "
            f"schedule's {common:.8g} (the recipe's {self.plan_lr:.8g} is at {common * self.plan_lr:.8g}), and is "
            f"{lrs[worst]:.8g}. {cause}"
        )


def _is_close(factor: float, other: float) -> bool:
    return math.isclose(factor, other, rel_tol=CLOSE, abs_tol=NEGLIGIBLE)


# ---- the entry of the JSON -----------------------------------------------------------------------------------------


def rewritten(entry: Mapping[str, Any], plan: Plan, peak_lrs: Sequence[float]) -> dict[str, Any]:
    """The configuration's "scheduler" entry with which every group keeps its ratio.

    Args:
        entry: {"type": …, "params": {…}}.
        plan: says the recipe's lr, which a number written once for all groups is relative to.
        peak_lrs: the `lr` of the groups that this rank's optimizer has, in their order.

    Raises:
        InputError: what is wrong and the entry to write instead.
    """
    name, params, peaks = str(entry.get("type")), dict(entry.get("params") or {}), [float(lr) for lr in peak_lrs]
    kind = _class_of(name)
    rule = _RULES[name]
    defaults = {parameter.name: parameter.default for parameter in inspect.signature(kind).parameters.values()}
    if rule.peak is not None:
        params[rule.peak] = _peak_of_each(rule.peak, params.get(rule.peak), plan, peaks)
    for parameter in rule.scaled:
        value = params.get(parameter, AUTO)
        value = defaults[parameter] if value == AUTO else value
        if value is not inspect.Parameter.empty:
            params[parameter] = _share_of_each(parameter, value, plan, peaks)
    for parameter in rule.shared:
        _require_no_floor(name, parameter, params, plan, peaks)
    if rule.smallest_change is not None:
        params[rule.smallest_change] = 0.0
    if name == "WarmupCosineLR" and plan.min_lr > 0:
        params["cos_min_ratio"] = _floor(params.get("cos_min_ratio", AUTO), plan)
    _require_complete(name, kind, params)
    return {**entry, "params": params}


def made(entry: Mapping[str, Any], peak_lrs: Sequence[float]) -> Any:
    """The scheduler that an entry describes, on an optimizer of its own, whose groups have these learning rates.

    Raises:
        InputError: its class refuses a value, when it is made or at its first step.
    """
    name = str(entry.get("type"))
    kind = _class_of(name)
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)], "lr": lr} for lr in peak_lrs or [1.0]])
    with _without_remarks():
        try:
            scheduler = kind(optimizer, **dict(entry.get("params") or {}))
            trial = _twin(scheduler)
            trial.step(**_arguments(trial, 1))
        except Exception as error:  # each class looks at its values in its own way, or computes with whatever it got
            raise InputError(f"scheduler.params: {name} refuses them ({brief(error)}). Correct them.") from error
    return scheduler


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Without torch's warning, and DeepSpeed's log, that an optimizer made no step yet."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def for_one_group(entry: Mapping[str, Any], lr: float) -> Any:
    """The scheduler that an entry describes, on a single learning rate, which is its maximum.

    Raises:
        InputError: as `made`, or there is no such scheduler.
    """
    name = str(entry.get("type"))
    _class_of(name)
    peak = _RULES[name].peak
    own = {} if peak is None else {peak: lr}
    return made({"type": name, "params": own | dict(entry.get("params") or {})}, [lr])


def drives_betas(name: str, params: Mapping[str, Any]) -> bool:
    """Whether a JSON entry changes the optimizer's betas or momentum from step to step, as it does by default."""
    return name in ("OneCycle", "CyclicLR", "OneCycleLR") and bool(params.get("cycle_momentum", True))


def _class_of(name: str) -> Callable[..., Any]:
    """What DeepSpeed takes for a type."""
    kind: Callable[..., Any] | None = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name, None)
    if name in _RULES and name not in _NEEDS_CODE and kind is not None:
        return kind
    if name in _NEEDS_CODE:
        raise InputError(
            f'scheduler.type "{name}" is made of Python objects, which JSON can\'t hold. Use another, or make it in '
            "the script and pass it to deepspeed.initialize as lr_scheduler."
        )
    known = brief(", ".join(each for each in _RULES if each not in (*_NEEDS_CODE, "GreedyLR")), 190)
    raise InputError(f'scheduler.type "{brief(name, 30)}" is not known to keep the ratios. Use one of {known}.')


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
    if not _is_proportional(shares, peaks):
        raise InputError(
            f"scheduler.params.{parameter} is {quoted(list(value))}, which is not in the ratio of the groups' peaks, "
            f"{_listed(peaks)}. {write}"
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
    if _is_proportional([value] * len(peaks), peaks):
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


# ---- a scheduler that a script made --------------------------------------------------------------------------------

_USE_LAMBDA = (
    "Use torch.optim.lr_scheduler.LambdaLR(optimizer, factor) with one function of the step, or another scheduler that "
    "multiplies each group's own learning rate."
)


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
    for part in filter(_is_known, parts):
        _require_held(part, peaks)
    if not all(_is_known(part) and _has_one_function(part) for part in parts):
        _require_tried(scheduler, peaks)


def _parts(scheduler: Any) -> Iterator[Any]:
    """What a SequentialLR or ChainedScheduler consists of, at any depth, else the scheduler itself."""
    if type(scheduler).__name__ in ("SequentialLR", "ChainedScheduler") and _is_known(scheduler):
        for part in scheduler._schedulers:
            yield from _parts(part)
    else:
        yield scheduler


def _is_known(scheduler: object) -> bool:
    # Not isinstance: a subclass may compute something else.
    kind = type(scheduler)
    return kind.__name__ in _RULES and kind.__module__.partition(".")[0] in _MADE_BY


def _has_one_function(scheduler: Any) -> bool:
    functions = getattr(scheduler, "lr_lambdas", [])
    return all(function is functions[0] for function in functions)


def _require_held(scheduler: Any, peaks: list[float]) -> None:
    """Looks at the learning rates that a scheduler of a known class was given."""
    kind = type(scheduler).__name__
    rule = _RULES[kind]
    if rule.peak is not None:
        given = _held(scheduler, rule, rule.peak)
        if not _is_proportional(given, peaks) or (peaks and not math.isclose(given[0], peaks[0], rel_tol=SAME)):
            raise InputError(
                f"lr_scheduler: {kind} has {rule.peak} {_said(given)}, and the plan's peaks of its groups are others. "
                f"Write {rule.peak}={_listed(peaks)}."
            )
    for parameter in rule.scaled:
        given = _held(scheduler, rule, parameter)
        if not _is_proportional(given, peaks):
            shares = [max(given) * (peak / max(peaks)) for peak in peaks]
            raise InputError(
                f"lr_scheduler: {kind} has {parameter} {_said(given)}, which is not in the ratio of its groups' peaks, "
                f"{_listed(peaks)}. Write one value for each, such as {parameter}={_listed(shares)}."
            )
    for parameter in filter(None, (*rule.shared, rule.smallest_change)):
        given = _held(scheduler, rule, parameter)
        if not _is_proportional(given, peaks):
            other = _OTHER_FLOOR if kind == "CosineAnnealingLR" else ""
            raise InputError(
                f"lr_scheduler: {kind} has one {parameter} of {_said(given)} for all groups, whose peaks are "
                f"{_listed(peaks)}, so that their ratios are lost when it is reached. Write {parameter}=0{other}."
            )
    _require_start(scheduler, peaks)


_OTHER_FLOOR = ", or, for a floor, use deepspeed.runtime.lr_schedules.WarmupCosineLR with its cos_min_ratio"


def _held(scheduler: Any, rule: _Rule, parameter: str) -> list[float]:
    """A parameter's value for each group."""
    attribute, groups = rule.attributes.get(parameter, parameter), scheduler.optimizer.param_groups
    value = getattr(scheduler, attribute, None)
    if value is None:  # OneCycleLR keeps its own in the groups
        value = [group[attribute] for group in groups]
    return [float(own) for own in value] if isinstance(value, list | tuple) else [float(value)] * len(groups)


def _require_start(scheduler: Any, peaks: list[float]) -> None:
    """Looks at what a scheduler multiplies: what it found in the groups when it was made, or what is there now."""
    start = getattr(scheduler, "base_lrs", getattr(scheduler, "org_lrs", None))
    if start is None:
        start = [group["lr"] for group in scheduler.optimizer.param_groups]
    if not _is_proportional([float(lr) for lr in start], peaks):
        raise InputError(
            f"lr_scheduler: {type(scheduler).__name__} was made when its groups had the learning rates {_said(start)}, "
            f"and the plan's are {_listed(peaks)}. Make it when the optimizer has the plan's groups."
        )


def _is_proportional(values: Sequence[float], peaks: Sequence[float]) -> bool:
    if len(values) != len(peaks):
        return False
    factors = [value / peak for value, peak in zip(values, peaks, strict=True)]
    return all(math.isclose(factor, factors[0], rel_tol=SAME, abs_tol=NEGLIGIBLE) for factor in factors)


def _said(values: Sequence[Any]) -> str:
    """One number if all are the same."""
    return f"{float(values[0]):.9g}" if len({float(value) for value in values}) == 1 else _listed(values)


def _listed(values: Sequence[Any]) -> str:
    return f"[{', '.join(f'{float(value):.9g}' for value in values)}]"


# ---- loading a scheduler's state -----------------------------------------------------------------------------------

_STARTS = ("base_lrs", "_init_lrs")
"""Where torch's and Hugging Face's schedulers keep what they found in the groups when they were made."""

Held = list[tuple[Any, dict[str, Any]]]


def held_learning_rates(scheduler: object | None) -> Held:
    """Each part of a scheduler with the learning rates that it was made with, which loading a state may replace.

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
    if _is_known(scheduler):
        rule = _RULES[type(scheduler).__name__]
        for parameter in filter(None, (rule.peak, *rule.scaled)):
            yield rule.attributes.get(parameter, parameter)


# ---- trying a scheduler out ----------------------------------------------------------------------------------------

_STEPS = 10_000
_FAR = (20_011, 100_003, 1_000_003, 10_000_019)
"""Steps jumped to, where a scheduler can: primes, which no period of it divides."""

_POSITIONS = ("epoch", "last_batch_iteration", "batch_iteration")
"""How torch and DeepSpeed call an argument of step() that says which step it is."""


def _require_tried(scheduler: Any, peaks: list[float]) -> None:
    kind, watch = type(scheduler).__name__, RatioWatch(max(peaks, default=0.0), peaks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that the optimizer made no step
        try:
            broken = next(((step, lrs) for step, lrs in _tried(scheduler) if watch.check(lrs) is not None), None)
        except Exception as error:
            raise InputError(
                f"lr_scheduler: {kind} can't be tried on a copy ({type(error).__name__}: {error}), so nobody can tell "
                f"whether it keeps the ratios between groups. {_USE_LAMBDA}"
            ) from error
    if broken is not None:
        step, lrs = broken
        raise InputError(
            f"lr_scheduler: {kind} breaks the ratios between groups: at step {step} from here their learning rates are "
            f"{_listed(lrs)}, and their peaks are {_listed(peaks)}. {_USE_LAMBDA}"
        )


def _tried(scheduler: Any) -> Iterator[tuple[int, list[float]]]:
    """(step from now, learning rates) of a copy; ends early where the schedule does."""
    twin = _twin(scheduler)
    yield 0, _learning_rates(twin)
    for step in (*range(1, _STEPS + 1), *_FAR):
        arguments = _arguments(twin, step)
        if step > _STEPS and not any(value == step for value in arguments.values()):
            return  # it can't jump
        try:
            twin.step(**arguments)
        except Exception:
            if step == 1:
                raise
            return  # behind its end
        yield step, _learning_rates(twin)


def _arguments(scheduler: Any, step: int) -> dict[str, Any]:
    """What step() is to be called with: what it asks for, and where it is to jump to."""
    parameters = inspect.signature(scheduler.step).parameters
    asked = [name for name, each in parameters.items() if each.default is each.empty and each.kind not in _VARIADIC]
    if step > _STEPS:
        asked += [name for name in _POSITIONS if name in parameters and name not in asked]
    # A metric that stays is a plateau; anything else counts.
    return {name: 1.0 if "metric" in name or "loss" in name else step for name in asked}


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _learning_rates(scheduler: Any) -> list[float]:
    return [float(group["lr"]) for group in scheduler.optimizer.param_groups]


def _twin(scheduler: Any) -> Any:
    """A copy of a scheduler on an optimizer of its own, with the same groups but for what is trained."""
    optimizer = scheduler.optimizer
    alone = torch.optim.SGD([{"params": [torch.zeros(1)]} for _ in optimizer.param_groups])
    alone.defaults = dict(getattr(optimizer, "defaults", {}))
    memo: dict[int, Any] = {id(optimizer): alone}
    for own, group in zip(alone.param_groups, optimizer.param_groups, strict=True):
        own.update({key: copy.deepcopy(value) for key, value in group.items() if key != "params"})
        memo[id(group)] = own
    return copy.deepcopy(scheduler, memo)
