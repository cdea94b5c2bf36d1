"""The table of schedulers: which parameters of DeepSpeed's, torch's and Hugging Face's classes are learning rates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from deepspeed.runtime import lr_schedules
from torch.optim import lr_scheduler as torch_schedules

from mup_megatron.errors import InputError
from mup_megatron.validation import brief


class Takes(Enum):
    """The ways in which schedulers take a parameter that is a learning rate."""

    PEAK = "its maximum, one value for each group"
    EACH = "one value for each group"
    SHARED = "one value for all groups, which keeps the ratios at 0 only"
    SMALLEST_CHANGE = "a change below which none is made, one value for all groups: so it has to be 0 as well"


@dataclass(frozen=True, slots=True)
class LearningRate:
    """A parameter of a scheduler that is a learning rate."""

    takes: Takes
    name: str
    attribute: str
    """The attribute of the scheduler, or key of a group, that holds it."""

    def held_by(self, scheduler: Any) -> list[float]:
        """Returns the parameter's value for each group of a scheduler."""
        groups = scheduler.optimizer.param_groups
        value = getattr(scheduler, self.attribute, None)
        if value is None:  # OneCycleLR keeps its own in the groups
            value = [group[self.attribute] for group in groups]
        return [float(own) for own in value] if isinstance(value, list | tuple) else [float(value)] * len(groups)


@dataclass(frozen=True, slots=True)
class SchedulerRule:
    """A row of the table. Parameters that are not named are steps and factors, the same for all groups."""

    learning_rates: tuple[LearningRate, ...] = ()
    needs_code: bool = False
    """It takes functions or schedulers, which JSON can't hold."""
    cycles_momentum: bool = False
    """It drives betas or momentum as well, unless told otherwise."""


_peak, _each = partial(LearningRate, Takes.PEAK), partial(LearningRate, Takes.EACH)
_ETA_MIN = SchedulerRule((LearningRate(Takes.SHARED, "eta_min", "eta_min"),))
_EPS = LearningRate(Takes.SMALLEST_CHANGE, "eps", "eps")
_WARMUP = SchedulerRule((_peak("warmup_max_lr", "max_lrs"), _each("warmup_min_lr", "min_lrs")))

RULES: Mapping[str, SchedulerRule] = {
    # DeepSpeed
    "WarmupLR": _WARMUP,
    "WarmupDecayLR": _WARMUP,
    "WarmupCosineLR": SchedulerRule(),
    "OneCycle": SchedulerRule(
        (_peak("cycle_max_lr", "max_lrs"), _each("cycle_min_lr", "min_lrs")), cycles_momentum=True
    ),
    # A search for a learning rate begins where it likes and goes where it likes: it has no maximum.
    "LRRangeTest": SchedulerRule((_each("lr_range_test_min_lr", "min_lr"),)),
    # torch; Hugging Face's schedules are LambdaLR and ReduceLROnPlateau
    "LambdaLR": SchedulerRule(needs_code=True),
    "MultiplicativeLR": SchedulerRule(needs_code=True),
    "StepLR": SchedulerRule(),
    "MultiStepLR": SchedulerRule(),
    "ConstantLR": SchedulerRule(),
    "LinearLR": SchedulerRule(),
    "ExponentialLR": SchedulerRule(),
    "PolynomialLR": SchedulerRule(),
    "CosineAnnealingLR": _ETA_MIN,
    "CosineAnnealingWarmRestarts": _ETA_MIN,
    "CyclicLR": SchedulerRule((_peak("max_lr", "max_lrs"), _each("base_lr", "base_lrs")), cycles_momentum=True),
    "OneCycleLR": SchedulerRule((_peak("max_lr", "max_lr"),), cycles_momentum=True),
    "ReduceLROnPlateau": SchedulerRule((_each("min_lr", "min_lrs"), _EPS)),
    "SequentialLR": SchedulerRule(needs_code=True),
    "ChainedScheduler": SchedulerRule(needs_code=True),
    # Hugging Face. Its max_lr is a bound of an adaptive schedule, not the schedule's peak.
    "GreedyLR": SchedulerRule((_each("min_lr", "min_lrs"), _each("max_lr", "max_lrs"), _EPS)),
}

_MADE_BY = ("deepspeed", "torch", "transformers")
"""The packages whose classes the rules are about."""


def rule_of(scheduler: object) -> SchedulerRule | None:
    """Returns the rule of a scheduler's class; None of a class that nobody knows."""
    # Not isinstance: a subclass may compute something else.
    kind = type(scheduler)
    return RULES.get(kind.__name__) if kind.__module__.partition(".")[0] in _MADE_BY else None


def drives_betas(name: str, params: Mapping[str, Any]) -> bool:
    """Says of a JSON entry if it changes the optimizer's betas or momentum from step to step, as it does by default."""
    return RULES.get(name, SchedulerRule()).cycles_momentum and bool(params.get("cycle_momentum", True))


def class_of(name: str) -> Callable[..., Any]:
    """Returns the class that DeepSpeed takes for a type of a JSON entry.

    Raises:
        InputError: there is none, nothing is known of it, or it needs more than JSON can hold.
    """
    kind, rule = _found(name), RULES.get(name)
    if rule is not None and rule.needs_code:
        raise InputError(
            f'scheduler.type "{name}" is made of Python objects, which JSON can\'t hold. Use another, or make it in '
            "the script and pass it to deepspeed.initialize as lr_scheduler."
        )
    if rule is None or kind is None:
        known = brief(", ".join(each for each, rule in RULES.items() if _found(each) and not rule.needs_code), 190)
        raise InputError(f'scheduler.type "{brief(name, 30)}" is not known to keep the ratios. Use one of {known}.')
    return kind


def _found(name: str) -> Callable[..., Any] | None:
    return getattr(lr_schedules, name, None) or getattr(torch_schedules, name, None)
