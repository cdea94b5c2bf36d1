"""A plan that a checkpoint carries is this run's, whichever machine and release wrote it."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from support.shapes import gpt, recipe_for

from mup_megatron.training.record import _same_plan

PLAN: dict[str, Any] = json.loads(json.dumps(recipe_for(gpt()).plan(gpt(hidden_size=128)).to_json()))


def _lr(factor: float) -> Callable[[dict[str, Any]], object]:
    return lambda plan: plan["parameters"][1].update(lr=plan["parameters"][1]["lr"] * factor)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda _: None, True),
        (_lr(1 + 1e-15), True),
        (lambda plan: plan["parameters"].reverse(), True),
        (lambda plan: plan.update(said_later=1), True),
        (lambda plan: plan["parameters"][0].pop("padded_to"), True),
        (_lr(1 + 1e-9), False),
        (lambda plan: plan["parameters"][0].pop("lr"), False),
        (lambda plan: plan["parameters"].pop(), False),
        (lambda plan: plan["parameters"].append(plan["parameters"][0]), False),
        (lambda plan: plan["parameters"][0].update(lr="x"), False),
        (lambda plan: plan["parameters"][0].update(name=[]), False),
        (lambda plan: plan.update(parameters={}), False),
        (lambda plan: plan.clear(), False),
    ],
)
def test_plans_are_compared_by_name_up_to_last_digits(change: Callable[[dict[str, Any]], object], same: bool) -> None:
    found = copy.deepcopy(PLAN)
    change(found)
    assert _same_plan(found, PLAN) is same


def test_what_is_no_plan_is_not_the_plan() -> None:
    assert not _same_plan([1], PLAN)
