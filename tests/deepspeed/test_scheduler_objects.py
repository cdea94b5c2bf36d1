"""Every scheduler of DeepSpeed, torch and Hugging Face that a script makes: accepted, refused, or tried on a copy."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from support.ds_schedules import LR, PEAKS, STEPS, follows, history_of, optimizer_of
from torch.optim import lr_scheduler as torch_schedules
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler

from mup_megatron.deepspeed.schedulers import (
    RatioWatch,
    held_learning_rates,
    require_proportional,
    restore_learning_rates,
)
from mup_megatron.errors import InputError


def _sequential(optimizer: torch.optim.Optimizer, floor: float = 0.0) -> Any:
    warmup = torch_schedules.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    decay = torch_schedules.CosineAnnealingLR(optimizer, T_max=30, eta_min=floor)
    return torch_schedules.SequentialLR(optimizer, [warmup, decay], milestones=[10])


def _chained(optimizer: torch.optim.Optimizer, floor: float = 0.0) -> Any:
    warmup = torch_schedules.ConstantLR(optimizer, factor=0.1, total_iters=10)
    decay = torch_schedules.CosineAnnealingLR(optimizer, T_max=30, eta_min=floor)
    return torch_schedules.ChainedScheduler([warmup, decay])


def _hugging_face(name: str, optimizer: torch.optim.Optimizer, **kwargs: Any) -> Any:
    return get_scheduler(name, optimizer, 10, 40, kwargs)


def _share(value: float, optimizer: torch.optim.Optimizer) -> list[float]:
    return [value * group["lr"] / LR for group in optimizer.param_groups]


def _halved(step: int) -> float:
    return 0.5 ** (step / 10)


HUGGING_FACE: dict[str, dict[str, Any]] = {
    "polynomial": {"lr_end": 1e-4, "power": 2.0},
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4, "warmup_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 10, "min_lr_ratio": 0.1},
}
"""Arguments; a schedule without an entry has none that could hold a learning rate."""

BY_METRIC = ("reduce_lr_on_plateau", "greedy")

Make = Callable[[torch.optim.Optimizer], Any]

ACCEPTED: dict[str, Make] = {
    "LambdaLR": lambda o: LambdaLR(o, _halved),
    "LambdaLR with a function for each group": lambda o: LambdaLR(o, [partial(_halved) for _ in o.param_groups]),
    "MultiplicativeLR": lambda o: torch_schedules.MultiplicativeLR(o, lambda step: 0.9),
    "SequentialLR": _sequential,
    "ChainedScheduler": _chained,
    "SequentialLR of ChainedScheduler": lambda o: torch_schedules.SequentialLR(
        o, [_chained(o), torch_schedules.ConstantLR(o, factor=0.5)], milestones=[20]
    ),
    "ReduceLROnPlateau": lambda o: torch_schedules.ReduceLROnPlateau(
        o, patience=2, factor=0.5, min_lr=_share(1e-4, o), eps=0.0
    ),
    "reduce_lr_on_plateau": lambda o: _hugging_face("reduce_lr_on_plateau", o, patience=0, eps=0.0),
    "greedy": lambda o: _hugging_face(
        "greedy", o, min_lr=_share(1e-5, o), max_lr=_share(0.01, o), eps=0.0, patience=2, factor=0.5
    ),
    **{
        str(each.value): partial(lambda name, o: _hugging_face(name, o, **HUGGING_FACE.get(name, {})), each.value)
        for each in SchedulerType
        if each.value not in BY_METRIC
    },
}


@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
def test_an_object_that_keeps_the_ratios_is_accepted_and_left_alone(make: Make) -> None:
    reference, scheduler = history_of(make(optimizer_of([LR]))), make(optimizer_of(PEAKS))
    require_proportional(scheduler, PEAKS)
    assert follows(history_of(scheduler), reference)


def test_every_schedule_of_hugging_face_is_in_these_tests() -> None:
    assert set(ACCEPTED) >= {each.value for each in SchedulerType}


Refused = tuple[Make, str]

REFUSED: dict[str, Refused] = {
    "WarmupLR": (
        lambda o: lr_schedules.WarmupLR(o, warmup_max_lr=LR),
        r"WarmupLR has warmup_max_lr 0\.006, and the plan's peaks .* Write warmup_max_lr=\[0\.",
    ),
    "WarmupLR with a start": (
        lambda o: lr_schedules.WarmupLR(o, warmup_min_lr=1e-4),
        r"warmup_min_lr 0\.0001, which is not in the ratio .* Write one value for each, such as warmup_min_lr=\[",
    ),
    "WarmupDecayLR": (
        lambda o: lr_schedules.WarmupDecayLR(o, 40, warmup_num_steps=10),
        r"warmup_max_lr 0\.001.*Write warmup_max_lr=\[",
    ),
    "OneCycle": (lambda o: lr_schedules.OneCycle(o, 1e-4, LR), r"cycle_max_lr 0\.006.*Write cycle_max_lr=\["),
    "LRRangeTest": (lambda o: lr_schedules.LRRangeTest(o), r"lr_range_test_min_lr 0\.001.*=\["),
    "CosineAnnealingLR": (
        lambda o: torch_schedules.CosineAnnealingLR(o, T_max=1_000_000, eta_min=1e-6),
        r"CosineAnnealingLR has one eta_min of 1e-06 .* Write eta_min=0, or, for a floor, use .*WarmupCosineLR",
    ),
    "CosineAnnealingWarmRestarts": (
        lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, 10, eta_min=1e-6),
        r"one eta_min of 1e-06 .* Write eta_min=0\.$",
    ),
    "CyclicLR": (lambda o: torch_schedules.CyclicLR(o, 1e-4, LR), r"CyclicLR has max_lr 0\.006.* Write max_lr=\["),
    "CyclicLR from a base": (
        lambda o: torch_schedules.CyclicLR(o, 1e-4, _share(LR, o)),
        r"CyclicLR has base_lr 0\.0001.* such as base_lr=\[",
    ),
    "OneCycleLR": (
        lambda o: torch_schedules.OneCycleLR(o, LR, total_steps=STEPS + 1),
        r"OneCycleLR has max_lr 0\.006.* Write max_lr=\[",
    ),
    "ReduceLROnPlateau": (
        lambda o: torch_schedules.ReduceLROnPlateau(o, min_lr=1e-5, eps=0.0, patience=0),
        r"ReduceLROnPlateau has min_lr 1e-05, .* such as min_lr=\[",
    ),
    "ReduceLROnPlateau by default": (
        lambda o: torch_schedules.ReduceLROnPlateau(o, patience=0),
        r"one eps of 1e-08 for all groups.* Write eps=0\.",
    ),
    "reduce_lr_on_plateau": (lambda o: _hugging_face("reduce_lr_on_plateau", o, patience=0), r"Write eps=0\."),
    "greedy": (lambda o: _hugging_face("greedy", o, patience=0), r"GreedyLR has min_lr 0\.001, .* such as min_lr=\["),
    "SequentialLR": (lambda o: _sequential(o, 1e-4), r"CosineAnnealingLR has one eta_min of 0\.0001"),
    "ChainedScheduler": (lambda o: _chained(o, 1e-4), r"CosineAnnealingLR has one eta_min of 0\.0001"),
    "SequentialLR of ChainedScheduler": (
        lambda o: torch_schedules.SequentialLR(o, [_chained(o, 1e-4), torch_schedules.ConstantLR(o)], milestones=[20]),
        r"CosineAnnealingLR has one eta_min of 0\.0001",
    ),
    "LambdaLR": (
        lambda o: LambdaLR(o, [lambda step: 0.9**step, *[lambda step: 0.8**step for _ in PEAKS[1:]]]),
        r"LambdaLR breaks the ratios between groups: at step 1 from here .* with one function of the step",
    ),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
def test_an_object_that_breaks_the_ratios_is_refused_with_what_to_write_instead(make: Make, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        require_proportional(make(optimizer_of(PEAKS)), PEAKS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [make for make, _ in REFUSED.values()], ids=REFUSED)
def test_what_is_refused_does_break_them(make: Make) -> None:
    scheduler = make(optimizer_of(PEAKS))
    far = history_of(scheduler)
    if isinstance(scheduler, torch_schedules.CosineAnnealingLR):
        with pytest.warns(UserWarning, match="epoch parameter"):
            scheduler.step(epoch=scheduler.T_max)
        far.append([group["lr"] for group in scheduler.optimizer.param_groups])
    assert any(RatioWatch(LR, PEAKS).check(lrs) for lrs in far)


def test_a_maximum_for_each_group_that_is_not_the_plans_is_refused() -> None:
    optimizer = optimizer_of(PEAKS)
    with pytest.raises(InputError, match=r"Write warmup_max_lr=\["):
        require_proportional(lr_schedules.WarmupLR(optimizer, warmup_max_lr=[2 * peak for peak in PEAKS]), PEAKS)


@pytest.mark.parametrize(
    "kind", [torch_schedules.StepLR, torch_schedules.ReduceLROnPlateau, lr_schedules.WarmupCosineLR]
)
def test_what_was_made_before_the_groups_had_their_learning_rates_is_refused(kind: Callable[..., Any]) -> None:
    params = {"StepLR": {"step_size": 3}, "ReduceLROnPlateau": {"eps": 0.0}, "WarmupCosineLR": {"total_num_steps": 9}}
    scheduler = kind(optimizer_of([LR] * len(PEAKS)), **params[kind.__name__])
    with pytest.raises(InputError, match=r"was made when its groups had the learning rates 0\.006, and the plan's are"):
        require_proportional(scheduler, PEAKS)


def test_another_number_of_groups_is_refused() -> None:
    with pytest.raises(InputError, match=r"StepLR was made for 2 groups, and the optimizer has \d"):
        require_proportional(torch_schedules.StepLR(optimizer_of(PEAKS[:2]), 3), PEAKS)


# ---- classes that nobody knows -------------------------------------------------------------------------------------


class Floored(torch_schedules.LRScheduler):
    """Falls by 1/1000 at each step, not below a floor; whole numbers of steps can be jumped over."""

    def __init__(self, optimizer: torch.optim.Optimizer, floor: float) -> None:
        self.floor = floor
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [max(self.floor, lr * 0.999**self.last_epoch) for lr in self.base_lrs]


class LateFloor(Floored):
    """Whose floor comes after 50,000 steps."""

    def get_lr(self) -> list[Any]:
        return [self.floor if self.last_epoch > 50_000 else lr for lr in self.base_lrs]


class FlooredCosine(torch_schedules.CosineAnnealingLR):
    """Has a floor in parts of the peak, under the name of torch's."""

    def get_lr(self) -> list[Any]:
        part = (1 + math.cos(math.pi * self.last_epoch / self.T_max)) / 2
        return [lr * (self.eta_min + (1 - self.eta_min) * part) for lr in self.base_lrs]

    _get_closed_form_lr = get_lr


class OwnKind:
    """Not torch's. Counts, or is told where it is, and holds the optimizer's groups itself."""

    def __init__(self, optimizer: torch.optim.Optimizer, added: float = 0.0) -> None:
        self.optimizer, self.groups = optimizer, optimizer.param_groups
        self.peaks = [group["lr"] for group in self.groups]
        self.added = added

    def step(self, num_updates: int) -> None:
        if num_updates > 300:
            raise StopIteration
        for group, peak in zip(self.groups, self.peaks, strict=True):
            group["lr"] = peak / (1 + num_updates) + self.added


class OnMetric(OwnKind):
    """Falls where an accuracy does not rise."""

    def step(self, metrics: float) -> None:  # type: ignore[override]
        for group in self.groups:
            group["lr"] = max(self.added, group["lr"] * (0.5 if metrics <= getattr(self, "best", -math.inf) else 1.0))
        self.best = max(getattr(self, "best", -math.inf), metrics)


class ByDefaults(OwnKind):
    """Has a floor, but for an optimizer with betas."""

    def step(self) -> None:  # type: ignore[override]
        super().step(7)
        if "betas" not in self.optimizer.defaults:
            self.groups[0]["lr"] = 1.0


class Broken(OwnKind):
    """Can't make a step, say because it asks a server first."""

    def step(self) -> None:  # type: ignore[override]
        raise RuntimeError("no server")


UNKNOWN: dict[str, tuple[Make, str | None]] = {
    "without a floor": (lambda o: Floored(o, 0.0), None),
    "with a floor": (lambda o: Floored(o, 1e-4), r"Floored breaks .* at step \d+ from here .*0\.0001"),
    "with a floor in the distance": (lambda o: LateFloor(o, 1e-4), r"LateFloor breaks .* at step 100003 from here"),
    "with a floor in parts of the peak": (lambda o: FlooredCosine(o, 30, 0.1), None),
    "told its step": (OwnKind, None),
    "told its step, with a floor": (lambda o: OwnKind(o, 1e-6), r"OwnKind breaks .* at step 1 from here"),
    "told a metric": (OnMetric, None),
    "told a metric, with a floor": (lambda o: OnMetric(o, 1e-4), r"OnMetric breaks"),
    "in a sequence": (
        lambda o: torch_schedules.SequentialLR(o, [torch_schedules.ConstantLR(o), Floored(o, 1e-4)], milestones=[5]),
        r"SequentialLR breaks",
    ),
    "that asks for the optimizer's defaults": (ByDefaults, None),
    "that fails": (Broken, r"Broken can't be tried on a copy \(RuntimeError: no server\), so nobody can tell"),
    "that steps not at all": (
        lambda o: SimpleNamespace(optimizer=o),
        r"SimpleNamespace can't be tried on a copy \(AttributeError.* Use torch\.optim\.lr_scheduler\.LambdaLR",
    ),
    "without an optimizer": (lambda o: SimpleNamespace(), r"SimpleNamespace has no optimizer .* Use torch\.optim"),
}


@pytest.mark.parametrize(("make", "said"), UNKNOWN.values(), ids=UNKNOWN)
def test_another_class_is_tried_on_a_copy(make: Make, said: str | None) -> None:
    optimizer = optimizer_of(PEAKS)
    scheduler = make(optimizer)
    before = [{**group} for group in optimizer.param_groups]
    if said is None:
        require_proportional(scheduler, PEAKS)
    else:
        with pytest.raises(InputError, match=said):
            require_proportional(scheduler, PEAKS)
    assert [{**group} for group in optimizer.param_groups] == before
    assert getattr(scheduler, "last_epoch", 0) == 0


def test_a_copy_does_not_copy_the_parameters() -> None:
    large = torch.nn.Parameter(torch.zeros(1))

    def refuse(memo: dict[int, Any]) -> Any:
        raise AssertionError("copied")

    large.__deepcopy__ = refuse  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW([{"params": [large], "lr": LR}])
    require_proportional(OwnKind(optimizer), [LR])


# ---- loading the state of one that held other learning rates -------------------------------------------------------

HOLDING: dict[str, Callable[[Any, list[float]], Any]] = {
    "LambdaLR": lambda o, lrs: LambdaLR(o, _halving),
    "SequentialLR": lambda o, lrs: torch_schedules.SequentialLR(
        o, [torch_schedules.LinearLR(o, total_iters=3), LambdaLR(o, _halving)], milestones=[3]
    ),
    "ChainedScheduler of one in another": lambda o, lrs: torch_schedules.ChainedScheduler(
        [
            torch_schedules.ConstantLR(o, total_iters=2),
            torch_schedules.SequentialLR(
                o, [torch_schedules.LinearLR(o, total_iters=3), LambdaLR(o, _halving)], milestones=[3]
            ),
        ]
    ),
    "CyclicLR": lambda o, lrs: torch_schedules.CyclicLR(
        o, [lr / 10 for lr in lrs], list(lrs), step_size_up=4, cycle_momentum=False
    ),
    "ReduceLROnPlateau": lambda o, lrs: torch_schedules.ReduceLROnPlateau(
        o, patience=0, min_lr=[lr / 5 for lr in lrs], eps=0.0
    ),
    "GreedyLR": lambda o, lrs: get_scheduler(
        SchedulerType.GREEDY,
        o,
        scheduler_specific_kwargs={
            "min_lr": [lr / 5 for lr in lrs],
            "max_lr": [2 * lr for lr in lrs],
            "eps": 0.0,
            "patience": 1,
            "smooth": False,
            "reset_start": 4,
        },
    ),
    "WarmupLR": lambda o, lrs: lr_schedules.WarmupLR(o, warmup_max_lr=list(lrs), warmup_num_steps=4),
    "WarmupCosineLR": lambda o, lrs: lr_schedules.WarmupCosineLR(o, total_num_steps=9, warmup_num_steps=3),
    "OneCycle": lambda o, lrs: lr_schedules.OneCycle(
        o, [lr / 10 for lr in lrs], list(lrs), cycle_first_step_size=5, cycle_momentum=False
    ),
    "LRRangeTest": lambda o, lrs: lr_schedules.LRRangeTest(o, list(lrs), 2),
}


def _halving(step: int) -> float:
    return 0.5**step


@pytest.mark.parametrize("name", HOLDING)
def test_a_loaded_schedule_goes_on_from_this_runs_learning_rates(name: str) -> None:
    """Both schedules take the same steps, so that the factor between their learning rates stays the same."""

    def step(scheduler: Any) -> list[float]:
        scheduler.optimizer.step()
        scheduler.step(*([1.0] if name in ("ReduceLROnPlateau", "GreedyLR") else []))
        return [group["lr"] for group in scheduler.optimizer.param_groups]

    before, now = ([own * lr for own in (1.0, 0.25)] for lr in (0.004, 0.001))
    first, second = (HOLDING[name](optimizer_of(lrs), lrs) for lrs in (before, now))
    for _ in range(2):
        step(first)
    held = held_learning_rates(second)
    second.load_state_dict(first.state_dict())
    restore_learning_rates(held)
    for old, new in zip(first.optimizer.param_groups, second.optimizer.param_groups, strict=True):
        new["lr"] = old["lr"] / 4
    for _ in range(10):
        assert [4 * lr for lr in step(second)] == pytest.approx(step(first))


def test_no_schedule_holds_nothing() -> None:
    restore_learning_rates(held_learning_rates(None))
