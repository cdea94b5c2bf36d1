"""Every scheduler that a JSON entry can name: kept, rewritten or refused, and what DeepSpeed alone does.

The reference is the same scheduler on an optimizer with one group at the recipe's learning rate: there no ratio can be
lost. Each group has to follow it, times its own ratio, from the start over warm-up, peak and floor to beyond the end.
"""

import json
import math
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from support.ds_schedules import LR, PEAKS, PLAN, STEPS, follows, history_of, made_by_deepspeed, optimizer_of, plan_at
from torch.optim import lr_scheduler as torch_schedules
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from mup_megatron.deepspeed.schedulers import (
    RatioWatch,
    drives_betas,
    require_proportional,
    rewritten,
)
from mup_megatron.errors import InputError
from mup_megatron.modules.groups import values


def test_the_plan_of_these_tests_has_ratios_below_and_above_one() -> None:
    assert {round(peak / LR, 9) for peak in PEAKS} == {0.25, 1.0, 3.0}


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
    plain = history_of(made_by_deepspeed({"type": name, "params": params}, optimizer_of(PEAKS)))
    assert not follows(
        plain, history_of(made_by_deepspeed({"type": name, "params": params | instead}, optimizer_of([LR])))
    )
    assert any(RatioWatch(LR, PEAKS).check(lrs) for lrs in plain)


@pytest.mark.parametrize(("name", "params"), [case[:2] for case in KEPT.values()], ids=KEPT)
def test_plain_deepspeed_keeps_the_ratios_where_the_groups_are_multiplied(name: str, params: dict[str, Any]) -> None:
    plain = history_of(made_by_deepspeed({"type": name, "params": params}, optimizer_of(PEAKS)))
    assert follows(plain, history_of(made_by_deepspeed({"type": name, "params": params}, optimizer_of([LR]))))


@each_case
def test_every_group_follows_the_schedule_of_the_recipe(
    name: str, params: dict[str, Any], instead: dict[str, Any]
) -> None:
    entry = rewritten({"type": name, "params": params}, PLAN, PEAKS)
    assert json.loads(json.dumps(entry)) == entry
    ours = history_of(made_by_deepspeed(entry, optimizer_of(PEAKS)))
    reference = history_of(made_by_deepspeed({"type": name, "params": params | instead}, optimizer_of([LR])))
    assert follows(ours, reference)
    assert len({lr for (lr,) in reference}) > 1, "the schedule moves"
    assert all(RatioWatch(LR, PEAKS).check(lrs) is None for lrs in ours)
    if name != "LRRangeTest":
        top = ours[max(range(len(reference)), key=lambda step: reference[step])]
        assert top == pytest.approx(PEAKS, rel=2e-2 if name == "WarmupCosineLR" else 1e-12)


@each_case
def test_it_is_accepted_as_an_object_once_it_is_rewritten(
    name: str, params: dict[str, Any], instead: dict[str, Any]
) -> None:
    require_proportional(
        made_by_deepspeed(rewritten({"type": name, "params": params}, PLAN, PEAKS), optimizer_of(PEAKS)), PEAKS
    )


@each_case
def test_what_was_rewritten_stays(name: str, params: dict[str, Any], instead: dict[str, Any]) -> None:
    once = rewritten({"type": name, "params": params}, PLAN, PEAKS)
    assert rewritten(once, PLAN, PEAKS) == once


@each_case
def test_at_the_base_nothing_changes_by_a_bit(name: str, params: dict[str, Any], instead: dict[str, Any]) -> None:
    base = plan_at(1)
    peaks = [group.lr for group in values(base).values()]
    assert set(peaks) == {LR}
    entry = rewritten({"type": name, "params": params}, base, peaks)
    plain = history_of(made_by_deepspeed({"type": name, "params": params | instead}, optimizer_of(peaks)))
    assert history_of(made_by_deepspeed(entry, optimizer_of(peaks))) == plain


@each_case
def test_lists_have_one_value_for_each_group_of_this_rank(
    name: str, params: dict[str, Any], instead: dict[str, Any]
) -> None:
    # A pipeline stage that holds nothing of some groups, and one that holds nothing at all.
    for peaks in (PEAKS[1:3], []):
        given = rewritten({"type": name, "params": params}, PLAN, peaks)["params"]
        assert all(len(value) == len(peaks) for key, value in given.items() if isinstance(value, list) and "lr" in key)
    short = optimizer_of(PEAKS[1:3])
    made_by_deepspeed(rewritten({"type": name, "params": params}, PLAN, PEAKS[1:3]), short)


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

    assert any(
        len(set(lrs)) == 1 and lrs[0] > 0 for lrs in history_of(made_by_deepspeed(filled(LR), optimizer_of(PEAKS)))
    )
    reference = history_of(made_by_deepspeed(filled(LR), optimizer_of([LR])))
    assert follows(history_of(made_by_deepspeed(rewritten(filled(LR), PLAN, PEAKS), optimizer_of(PEAKS))), reference)
    with pytest.raises(InputError, match=r"warmup_max_lr is 5e-05.* 0\.006.*learning_rate"):
        rewritten(filled(5e-5), PLAN, PEAKS)  # TrainingArguments' default


def test_an_auto_that_nobody_filled_in_is_resolved_where_the_plan_can() -> None:
    params = {**RUN, "warmup_min_lr": "auto", "warmup_max_lr": "auto"}
    entry = rewritten({"type": "WarmupDecayLR", "params": params}, PLAN, PEAKS)
    assert entry["params"] == {**RUN, "warmup_min_lr": [0.0] * len(PEAKS), "warmup_max_lr": PEAKS}


def test_the_recipes_floor_is_the_floor() -> None:
    plan = plan_at(4, min_lr=0.0006)
    floors = [plan.by_name[entry.name].min_lr for entry in plan.entries]
    for params in (RUN, {**RUN, "cos_min_ratio": "auto"}, {**RUN, "cos_min_ratio": 0.1}):
        last = history_of(
            made_by_deepspeed(rewritten({"type": "WarmupCosineLR", "params": params}, plan, PEAKS), optimizer_of(PEAKS))
        )[-1]
        assert last == pytest.approx([peak * 0.1 for peak in PEAKS], rel=1e-12)
        assert {round(lr, 12) for lr in last} == {round(floor, 12) for floor in floors}
    with pytest.raises(InputError, match=r'cos_min_ratio is 0\.01.*Write "cos_min_ratio": 0\.1, or leave it out'):
        rewritten({"type": "WarmupCosineLR", "params": {**RUN, "cos_min_ratio": 0.01}}, plan, PEAKS)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD], ids=["AdamW", "SGD"])
def test_a_cycle_of_momentum_does_no_harm(kind: type[torch.optim.Optimizer]) -> None:
    params = {**CYCLE, "cycle_min_lr": 1e-4, "cycle_max_lr": LR, "cycle_momentum": True, "decay_mom_rate": 0.01}
    entry = rewritten({"type": "OneCycle", "params": params}, PLAN, PEAKS)
    reference = history_of(made_by_deepspeed({"type": "OneCycle", "params": params}, optimizer_of([LR], kind)))
    scheduler = made_by_deepspeed(entry, optimizer_of(PEAKS, kind))
    require_proportional(scheduler, PEAKS)
    assert follows(history_of(scheduler), reference)


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
    last = history_of(made_by_deepspeed(rewritten(proposed, PLAN, PEAKS), optimizer_of(PEAKS)))[-1]
    assert last == pytest.approx([peak * 0.1 for peak in PEAKS])


def test_one_floor_for_all_groups_is_right_where_all_peaks_are_equal() -> None:
    entry = {"type": "CosineAnnealingLR", "params": {"T_max": 40, "eta_min": 0.0006}}
    assert rewritten(entry, plan_at(1), [LR, LR]) == entry


@each_case
def test_ratios_that_are_lost_at_one_step_only_are_noticed(
    name: str, params: dict[str, Any], instead: dict[str, Any]
) -> None:
    watch = RatioWatch(LR, PEAKS)
    history = history_of(
        made_by_deepspeed(rewritten({"type": name, "params": params}, PLAN, PEAKS), optimizer_of(PEAKS))
    )
    assert [step for step, lrs in enumerate(history) if watch.check(lrs)] == []
    step = next(i for i in reversed(range(len(history))) if history[i][0] > 1e-9 * LR)
    history[step] = [history[step][0]] * len(PEAKS)
    assert [i for i, lrs in enumerate(history) if watch.check(lrs)] == [step]


@pytest.mark.parametrize("name", ["OneCycle", "CyclicLR", "OneCycleLR"])
def test_who_drives_betas_by_default_is_known(name: str) -> None:
    assert drives_betas(name, {})
    assert not drives_betas(name, {"cycle_momentum": False})
    assert not drives_betas("WarmupLR", {})
