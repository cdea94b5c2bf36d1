"""Every scheduler of DeepSpeed, torch and Hugging Face: kept, rewritten or refused, and what DeepSpeed alone does.

The reference is the same scheduler on an optimizer with one group at the recipe's learning rate: there no ratio can be
lost. Each group has to follow it, times its own ratio, from the start over warm-up, peak and floor to beyond the end.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from support.shapes import gpt, recipe_for
from torch.optim import lr_scheduler as torch_schedules
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from mup_megatron.deepspeed.schedulers import (
    RatioWatch,
    drives_betas,
    held_learning_rates,
    require_proportional,
    restore_learning_rates,
    rewritten,
)
from mup_megatron.errors import InputError
from mup_megatron.modules.groups import values
from mup_megatron.recipe import PerParameter
from mup_megatron.theory import Plan

LR = 0.006
STEPS = 49


def _plan(width: float, **changes: Any) -> Plan:
    recipe = recipe_for(gpt(), lr=LR, **{"min_lr": 0.0, **changes})
    louder = (PerParameter(match="embedding.word_embeddings.weight", lr_mult=3.0),) if width > 1 else ()
    return recipe.model_copy(update={"per_parameter": louder}).plan(gpt(width))


PLAN = _plan(4)
PEAKS = [group.lr for group in values(PLAN).values()]


def test_the_plan_of_these_tests_has_ratios_below_and_above_one() -> None:
    assert {round(peak / LR, 9) for peak in PEAKS} == {0.25, 1.0, 3.0}


# ---- running a scheduler -------------------------------------------------------------------------------------------


def _optimizer(lrs: Sequence[float], kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> torch.optim.Optimizer:
    return kind([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs], lr=LR)


def _made(entry: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """As DeepSpeedEngine._scheduler_from_config does."""
    kind = getattr(lr_schedules, entry["type"], None) or getattr(torch_schedules, entry["type"])
    return kind(optimizer, **entry["params"])


def _history(scheduler: Any, steps: int = STEPS) -> list[list[float]]:
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


def _follow(history: list[list[float]], reference: list[list[float]], peaks: Sequence[float] = PEAKS) -> bool:
    return all(
        math.isclose(lr, peak * (of_recipe / LR), rel_tol=1e-11, abs_tol=1e-14)
        for lrs, (of_recipe,) in zip(history, reference, strict=True)
        for lr, peak in zip(lrs, peaks, strict=True)
    )


# ---- the entry of the JSON -----------------------------------------------------------------------------------------

WARMUP = {"warmup_num_steps": 10, "warmup_type": "linear"}
RUN = {**WARMUP, "total_num_steps": 40}
CYCLE = {"cycle_first_step_size": 10, "cycle_second_step_size": 12, "decay_step_size": 3, "decay_lr_rate": 0.2}

Case = tuple[str, dict[str, Any], dict[str, Any]]
"""(type, params, what the reference has instead)."""

FLATTENED: dict[str, Case] = {
    "WarmupLR with a maximum": ("WarmupLR", {**WARMUP, "warmup_max_lr": LR}, {}),
    "WarmupLR, logarithmic": ("WarmupLR", {"warmup_num_steps": 10, "warmup_max_lr": LR}, {}),
    "WarmupLR with a start": ("WarmupLR", {**WARMUP, "warmup_min_lr": 1e-4}, {}),
    "WarmupLR with both": ("WarmupLR", {**WARMUP, "warmup_min_lr": 1e-4, "warmup_max_lr": LR}, {}),
    "WarmupDecayLR by default": ("WarmupDecayLR", RUN, {"warmup_max_lr": LR}),
    "WarmupDecayLR with a maximum": ("WarmupDecayLR", {**RUN, "warmup_max_lr": LR}, {}),
    "WarmupDecayLR with a start": ("WarmupDecayLR", {**RUN, "warmup_min_lr": 1e-4, "warmup_max_lr": LR}, {}),
    "OneCycle": ("OneCycle", {**CYCLE, "cycle_min_lr": 1e-4, "cycle_max_lr": LR}, {}),
    "OneCycle from zero, in stairs": (
        "OneCycle",
        {**CYCLE, "cycle_min_lr": 0, "cycle_max_lr": LR, "cycle_first_stair_count": 3},
        {},
    ),
    "LRRangeTest": ("LRRangeTest", {"lr_range_test_min_lr": 1e-5, "lr_range_test_step_size": 5}, {}),
    "LRRangeTest by default": ("LRRangeTest", {"lr_range_test_step_size": 5, "lr_range_test_staircase": True}, {}),
    "CyclicLR": ("CyclicLR", {"base_lr": 1e-4, "max_lr": LR, "step_size_up": 7}, {}),
    "OneCycleLR": ("OneCycleLR", {"max_lr": LR, "total_steps": STEPS + 1}, {}),
    "OneCycleLR, linear": (
        "OneCycleLR",
        {"max_lr": LR, "total_steps": STEPS + 1, "anneal_strategy": "linear", "final_div_factor": 1e12},
        {},
    ),
    "ReduceLROnPlateau with a floor": (
        "ReduceLROnPlateau",
        {"patience": 2, "factor": 0.3, "min_lr": 1e-4},
        {"eps": 0.0},
    ),
    "ReduceLROnPlateau, whose smallest change is one for all": (
        "ReduceLROnPlateau",
        {"patience": 0, "factor": 0.5},
        {"eps": 0.0},
    ),
}
KEPT: dict[str, Case] = {
    "WarmupLR without a maximum": ("WarmupLR", WARMUP, {}),
    "WarmupCosineLR": ("WarmupCosineLR", {**RUN, "warmup_min_ratio": 0.1, "cos_min_ratio": 0.05}, {}),
    "WarmupCosineLR by default": ("WarmupCosineLR", {"total_num_steps": 40, "warmup_num_steps": 10}, {}),
    "StepLR": ("StepLR", {"step_size": 7, "gamma": 0.5}, {}),
    "MultiStepLR": ("MultiStepLR", {"milestones": [5, 12], "gamma": 0.3}, {}),
    "ConstantLR": ("ConstantLR", {"factor": 0.2, "total_iters": 6}, {}),
    "LinearLR": ("LinearLR", {"start_factor": 0.1, "total_iters": 9}, {}),
    "ExponentialLR": ("ExponentialLR", {"gamma": 0.8}, {}),
    "PolynomialLR": ("PolynomialLR", {"total_iters": 30, "power": 2.0}, {}),
    "CosineAnnealingLR": ("CosineAnnealingLR", {"T_max": 20}, {}),
    "CosineAnnealingWarmRestarts": ("CosineAnnealingWarmRestarts", {"T_0": 8, "T_mult": 2}, {}),
}
REWRITABLE = FLATTENED | KEPT

each_case = pytest.mark.parametrize(("name", "params", "instead"), REWRITABLE.values(), ids=REWRITABLE)


@pytest.mark.parametrize(("name", "params", "instead"), FLATTENED.values(), ids=FLATTENED)
def test_plain_deepspeed_loses_the_ratios_in_silence(
    name: str, params: dict[str, Any], instead: dict[str, Any]
) -> None:
    plain = _history(_made({"type": name, "params": params}, _optimizer(PEAKS)))
    assert not _follow(plain, _history(_made({"type": name, "params": params | instead}, _optimizer([LR]))))
    assert any(RatioWatch(LR, PEAKS).check(lrs) for lrs in plain)


@pytest.mark.parametrize(("name", "params"), [case[:2] for case in KEPT.values()], ids=KEPT)
def test_plain_deepspeed_keeps_the_ratios_where_the_groups_are_multiplied(name: str, params: dict[str, Any]) -> None:
    plain = _history(_made({"type": name, "params": params}, _optimizer(PEAKS)))
    assert _follow(plain, _history(_made({"type": name, "params": params}, _optimizer([LR]))))


@each_case
def test_every_group_follows_the_schedule_of_the_recipe(
    name: str, params: dict[str, Any], instead: dict[str, Any]
) -> None:
    entry = rewritten({"type": name, "params": params}, PLAN, PEAKS)
    assert json.loads(json.dumps(entry)) == entry
    ours = _history(_made(entry, _optimizer(PEAKS)))
    reference = _history(_made({"type": name, "params": params | instead}, _optimizer([LR])))
    assert _follow(ours, reference)
    assert len({lr for (lr,) in reference}) > 1, "the schedule moves"
    assert all(RatioWatch(LR, PEAKS).check(lrs) is None for lrs in ours)
    if name != "LRRangeTest":
        top = ours[max(range(len(reference)), key=lambda step: reference[step])]
        assert top == pytest.approx(PEAKS, rel=2e-2 if name == "WarmupCosineLR" else 1e-12)


@each_case
def test_it_is_accepted_as_an_object_once_it_is_rewritten(
    name: str, params: dict[str, Any], instead: dict[str, Any]
) -> None:
    require_proportional(_made(rewritten({"type": name, "params": params}, PLAN, PEAKS), _optimizer(PEAKS)), PEAKS)


@each_case
def test_what_was_rewritten_stays(name: str, params: dict[str, Any], instead: dict[str, Any]) -> None:
    once = rewritten({"type": name, "params": params}, PLAN, PEAKS)
    assert rewritten(once, PLAN, PEAKS) == once


@each_case
def test_at_the_base_nothing_changes_by_a_bit(name: str, params: dict[str, Any], instead: dict[str, Any]) -> None:
    base = _plan(1)
    peaks = [group.lr for group in values(base).values()]
    assert set(peaks) == {LR}
    entry = rewritten({"type": name, "params": params}, base, peaks)
    plain = _history(_made({"type": name, "params": params | instead}, _optimizer(peaks)))
    assert _history(_made(entry, _optimizer(peaks))) == plain


@each_case
def test_lists_have_one_value_for_each_group_of_this_rank(
    name: str, params: dict[str, Any], instead: dict[str, Any]
) -> None:
    # A pipeline stage that holds nothing of some groups, and one that holds nothing at all.
    for peaks in (PEAKS[1:3], []):
        given = rewritten({"type": name, "params": params}, PLAN, peaks)["params"]
        assert all(len(value) == len(peaks) for key, value in given.items() if isinstance(value, list) and "lr" in key)
    short = _optimizer(PEAKS[1:3])
    _made(rewritten({"type": name, "params": params}, PLAN, PEAKS[1:3]), short)


def test_every_scheduler_of_deepspeed_is_among_these_cases() -> None:
    assert {name for name, *_ in REWRITABLE.values()} >= set(lr_schedules.VALID_LR_SCHEDULES)


def test_every_scheduler_of_torch_is_in_these_tests() -> None:
    of_torch = {
        name
        for name in torch_schedules.__all__
        if name not in ("LRScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler")
    }
    assert {name for name, *_ in REWRITABLE.values()} >= of_torch


def test_hugging_faces_auto_is_one_maximum_for_all_groups_and_becomes_the_plans_peaks() -> None:
    def filled(learning_rate: float) -> dict[str, Any]:
        config = HfTrainerDeepSpeedConfig(
            {
                "train_batch_size": 1,
                "scheduler": {
                    "type": "WarmupDecayLR",
                    "params": {**RUN, "warmup_min_lr": "auto", "warmup_max_lr": "auto"},
                },
            }
        )
        config.fill_only("scheduler.params.warmup_min_lr", 0)
        config.fill_match("scheduler.params.warmup_max_lr", learning_rate, "learning_rate")
        scheduler: dict[str, Any] = config.config["scheduler"]
        return scheduler

    assert any(len(set(lrs)) == 1 and lrs[0] > 0 for lrs in _history(_made(filled(LR), _optimizer(PEAKS))))
    reference = _history(_made(filled(LR), _optimizer([LR])))
    assert _follow(_history(_made(rewritten(filled(LR), PLAN, PEAKS), _optimizer(PEAKS))), reference)
    with pytest.raises(InputError, match=r"warmup_max_lr is 5e-05.* 0\.006.*learning_rate"):
        rewritten(filled(5e-5), PLAN, PEAKS)  # TrainingArguments' default


def test_an_auto_that_nobody_filled_in_is_resolved_where_the_plan_can() -> None:
    params = {**RUN, "warmup_min_lr": "auto", "warmup_max_lr": "auto"}
    entry = rewritten({"type": "WarmupDecayLR", "params": params}, PLAN, PEAKS)
    assert entry["params"] == {**RUN, "warmup_min_lr": [0.0] * len(PEAKS), "warmup_max_lr": PEAKS}


def test_the_recipes_floor_is_the_floor() -> None:
    plan = _plan(4, min_lr=0.0006)
    floors = [plan.by_name[entry.name].min_lr for entry in plan.entries]
    for params in (RUN, {**RUN, "cos_min_ratio": "auto"}, {**RUN, "cos_min_ratio": 0.1}):
        last = _history(_made(rewritten({"type": "WarmupCosineLR", "params": params}, plan, PEAKS), _optimizer(PEAKS)))[
            -1
        ]
        assert last == pytest.approx([peak * 0.1 for peak in PEAKS], rel=1e-12)
        assert {round(lr, 12) for lr in last} == {round(floor, 12) for floor in floors}
    with pytest.raises(InputError, match=r'cos_min_ratio is 0\.01.*Write "cos_min_ratio": 0\.1, or leave it out'):
        rewritten({"type": "WarmupCosineLR", "params": {**RUN, "cos_min_ratio": 0.01}}, plan, PEAKS)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD], ids=["AdamW", "SGD"])
def test_a_cycle_of_momentum_does_no_harm(kind: type[torch.optim.Optimizer]) -> None:
    params = {**CYCLE, "cycle_min_lr": 1e-4, "cycle_max_lr": LR, "cycle_momentum": True, "decay_mom_rate": 0.01}
    entry = rewritten({"type": "OneCycle", "params": params}, PLAN, PEAKS)
    reference = _history(_made({"type": "OneCycle", "params": params}, _optimizer([LR], kind)))
    scheduler = _made(entry, _optimizer(PEAKS, kind))
    require_proportional(scheduler, PEAKS)
    assert _follow(_history(scheduler), reference)


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        (
            "WarmupLR",
            {"warmup_max_lr": 0.001},
            r"warmup_max_lr is 0\.001, and the recipe\'s lr is 0\.006.*: 0\.006, or",
        ),
        ("WarmupDecayLR", {**RUN, "warmup_max_lr": 0.001}, r'Write "warmup_max_lr": 0\.006, or leave it out'),
        ("OneCycle", {"cycle_min_lr": 0, "cycle_max_lr": 0.01}, r'Write "cycle_max_lr": 0\.006'),
        ("CyclicLR", {"base_lr": 0, "max_lr": 0.01}, r'Write "max_lr": 0\.006'),
        ("OneCycleLR", {"max_lr": 0.01, "total_steps": 9}, r'Write "max_lr": 0\.006'),
        ("WarmupLR", {"warmup_max_lr": [LR, LR]}, r"warmup_max_lr has 2 values, and the optimizer has \d groups"),
        (
            "WarmupLR",
            {"warmup_max_lr": [LR] * len(PEAKS)},
            r"warmup_max_lr\[\d\] is 0\.006, and the plan's peak .* is 0\.0",
        ),
        (
            "WarmupLR",
            {"warmup_min_lr": [1e-4] * len(PEAKS)},
            r"warmup_min_lr is .* not in the ratio .* Write the one number",
        ),
        ("WarmupLR", {"warmup_min_lr": [1e-4]}, r"warmup_min_lr has 1 values"),
        ("WarmupLR", {"warmup_max_lr": "0.006"}, r"warmup_max_lr is '0\.006'\. Give a number"),
        ("WarmupLR", {"warmup_min_lr": True}, r"warmup_min_lr is True\. Give a number"),
        ("WarmupLR", {"warmup_min_lr": math.nan}, r"warmup_min_lr is nan\. Give a number"),
        ("WarmupLR", {"warmup_num_steps": "auto"}, r'warmup_num_steps is "auto".*Write the number'),
        (
            "WarmupDecayLR",
            {},
            r"missing a required argument: 'total_num_steps'. WarmupDecayLR takes total_num_steps, warmup",
        ),
        ("OneCycle", {"cycle_max_lr": LR}, r"missing a required argument: 'cycle_min_lr'"),
        (
            "WarmupCosineLR",
            {**RUN, "warmup_max_lr": LR},
            r"unexpected keyword argument 'warmup_max_lr'. WarmupCosineLR takes",
        ),
        (
            "CosineAnnealingLR",
            {"T_max": 40, "eta_min": 0.0006},
            r'eta_min is 0\.0006, one .*Write "eta_min": 0, or, for a floor, \{"type": "WarmupCosineLR", "params": '
            r'\{"total_num_steps": 40, "warmup_num_steps": 1, "cos_min_ratio": 0\.0\d+\}\}',
        ),
        ("CosineAnnealingWarmRestarts", {"T_0": 8, "eta_min": 1e-5}, r'takes no list. Write "eta_min": 0\.$'),
        ("LambdaLR", {"lr_lambda": 1}, r"LambdaLR.*JSON can't hold.*pass it to deepspeed\.initialize as lr_scheduler"),
        ("SequentialLR", {}, r"SequentialLR.*JSON can't hold"),
        (
            "WarmupStableDecayLR",
            {},
            r'"WarmupStableDecayLR" is not known to keep the ratios.*Use one of WarmupLR, Warm',
        ),
    ],
)
def test_an_entry_is_refused_with_what_to_write_instead(name: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        rewritten({"type": name, "params": params}, PLAN, PEAKS)
    assert "\n" not in str(error.value)


def test_the_entry_that_is_proposed_for_a_floor_has_it() -> None:
    with pytest.raises(InputError) as error:
        rewritten({"type": "CosineAnnealingLR", "params": {"T_max": 40, "eta_min": 0.0006}}, PLAN, PEAKS)
    proposed = json.loads(str(error.value).partition("for a floor, ")[2].removesuffix("."))
    last = _history(_made(rewritten(proposed, PLAN, PEAKS), _optimizer(PEAKS)))[-1]
    assert last == pytest.approx([peak * 0.1 for peak in PEAKS])


def test_one_floor_for_all_groups_is_right_where_all_peaks_are_equal() -> None:
    entry = {"type": "CosineAnnealingLR", "params": {"T_max": 40, "eta_min": 0.0006}}
    assert rewritten(entry, _plan(1), [LR, LR]) == entry


# ---- a scheduler that a script made --------------------------------------------------------------------------------


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
    reference, scheduler = _history(make(_optimizer([LR]))), make(_optimizer(PEAKS))
    require_proportional(scheduler, PEAKS)
    assert _follow(_history(scheduler), reference)


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
        require_proportional(make(_optimizer(PEAKS)), PEAKS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [make for make, _ in REFUSED.values()], ids=REFUSED)
def test_what_is_refused_does_break_them(make: Make) -> None:
    scheduler = make(_optimizer(PEAKS))
    far = _history(scheduler)
    if isinstance(scheduler, torch_schedules.CosineAnnealingLR):
        with pytest.warns(UserWarning, match="epoch parameter"):
            scheduler.step(epoch=scheduler.T_max)
        far.append([group["lr"] for group in scheduler.optimizer.param_groups])
    assert any(RatioWatch(LR, PEAKS).check(lrs) for lrs in far)


def test_a_maximum_for_each_group_that_is_not_the_plans_is_refused() -> None:
    optimizer = _optimizer(PEAKS)
    with pytest.raises(InputError, match=r"Write warmup_max_lr=\["):
        require_proportional(lr_schedules.WarmupLR(optimizer, warmup_max_lr=[2 * peak for peak in PEAKS]), PEAKS)


@pytest.mark.parametrize(
    "kind", [torch_schedules.StepLR, torch_schedules.ReduceLROnPlateau, lr_schedules.WarmupCosineLR]
)
def test_what_was_made_before_the_groups_had_their_learning_rates_is_refused(kind: Callable[..., Any]) -> None:
    params = {"StepLR": {"step_size": 3}, "ReduceLROnPlateau": {"eps": 0.0}, "WarmupCosineLR": {"total_num_steps": 9}}
    scheduler = kind(_optimizer([LR] * len(PEAKS)), **params[kind.__name__])
    with pytest.raises(InputError, match=r"was made when its groups had the learning rates 0\.006, and the plan's are"):
        require_proportional(scheduler, PEAKS)


def test_another_number_of_groups_is_refused() -> None:
    with pytest.raises(InputError, match=r"StepLR was made for 2 groups, and the optimizer has \d"):
        require_proportional(torch_schedules.StepLR(_optimizer(PEAKS[:2]), 3), PEAKS)


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
    optimizer = _optimizer(PEAKS)
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


# ---- live check ----------------------------------------------------------------------------------------------------

WATCH = RatioWatch(LR, [LR, LR / 4, LR / 4, 3 * LR])


def test_one_learning_rate_for_all_is_said_relative_to_the_recipe_wherever_most_groups_are() -> None:
    problem = RatioWatch(LR, [LR, LR / 4, LR / 4, LR / 4]).check([LR] * 4)
    assert problem is not None
    assert re.search(r"param_groups\[1\].*should be 0\.0015, .*is 0\.006\. One learning rate was written", problem)


def test_a_pipeline_stage_without_groups_has_no_ratios() -> None:
    assert RatioWatch(LR, []).check([]) is None


@pytest.mark.parametrize("factor", [0.0, 1e-9, 0.3, 1.0, 7.0])
def test_groups_at_one_part_of_their_peaks_are_right(factor: float) -> None:
    assert WATCH.check([factor * peak for peak in WATCH.peak_lrs]) is None
    assert WATCH.check([torch.tensor(factor * peak) for peak in WATCH.peak_lrs]) is None


def test_rounding_at_the_end_of_a_decay_is_no_difference() -> None:
    assert WATCH.check([0.0, 1e-19, -1e-19, 0.0]) is None


@pytest.mark.parametrize(
    ("lrs", "said"),
    [
        (
            [0.003] * 4,
            r"param_groups\[1\].*should be 0\.00075, .*\(the recipe's 0\.006 is at 0\.003\), and is 0\.003\..*set_lr",
        ),
        (
            [LR, LR / 4, LR / 4, 3 * LR * (1 + 2e-6)],
            r"param_groups\[3\].*should be 0\.018, .*and is 0\.018000036.* alone",
        ),
        ([0.0, 0.0, 1e-6, 0.0], r"param_groups\[2\].*should be 0, .*and is 1e-06"),
        ([LR + 1e-4, LR / 4 + 1e-4, LR / 4 + 1e-4, 3 * LR + 1e-4], r"floor or a warm-up's start"),
        ([LR, LR / 4, math.nan, 3 * LR], r"param_groups\[2\].* is nan"),
        ([LR, LR / 4, LR / 4], r"3 groups, and 4 were made from the plan"),
    ],
)
def test_a_broken_ratio_is_said_with_group_value_and_cause(lrs: list[float], said: str) -> None:
    problem = WATCH.check(lrs)
    assert problem is not None
    assert re.search(said, problem), problem


@each_case
def test_ratios_that_are_lost_at_one_step_only_are_noticed(
    name: str, params: dict[str, Any], instead: dict[str, Any]
) -> None:
    watch = RatioWatch(LR, PEAKS)
    history = _history(_made(rewritten({"type": name, "params": params}, PLAN, PEAKS), _optimizer(PEAKS)))
    assert [step for step, lrs in enumerate(history) if watch.check(lrs)] == []
    step = next(i for i in reversed(range(len(history))) if history[i][0] > 1e-9 * LR)
    history[step] = [history[step][0]] * len(PEAKS)
    assert [i for i, lrs in enumerate(history) if watch.check(lrs)] == [step]


@pytest.mark.parametrize("kind", [DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3])
def test_set_lr_of_deepspeeds_optimizers_is_noticed(kind: Any) -> None:
    groups = _optimizer(PEAKS).param_groups
    kind.set_lr(SimpleNamespace(param_groups=groups, optimizer=SimpleNamespace(param_groups=groups)), 0.003)
    problem = RatioWatch(LR, PEAKS).check([group["lr"] for group in groups])
    assert problem is not None
    assert "set_lr()" in problem


@pytest.mark.parametrize("name", ["OneCycle", "CyclicLR", "OneCycleLR"])
def test_who_drives_betas_by_default_is_known(name: str) -> None:
    assert drives_betas(name, {})
    assert not drives_betas(name, {"cycle_momentum": False})
    assert not drives_betas("WarmupLR", {})


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
    first, second = (HOLDING[name](_optimizer(lrs), lrs) for lrs in (before, now))
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
