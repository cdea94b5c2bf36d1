"""The ratios between groups of a running engine: where they are lost is said with group, value and cause."""

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from support.ds_schedules import LR, PEAKS, optimizer_of

from mup_megatron.deepspeed.schedulers import (
    RatioWatch,
)

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


@pytest.mark.parametrize("kind", [DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3])
def test_set_lr_of_deepspeeds_optimizers_is_noticed(kind: Any) -> None:
    groups = optimizer_of(PEAKS).param_groups
    kind.set_lr(SimpleNamespace(param_groups=groups, optimizer=SimpleNamespace(param_groups=groups)), 0.003)
    problem = RatioWatch(LR, PEAKS).check([group["lr"] for group in groups])
    assert problem is not None
    assert "set_lr()" in problem
