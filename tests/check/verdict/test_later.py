"""Steps beyond those of a quick check: what one narrow model's optimizer did, held against plan and schedule."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import small_nets
from support.small_nets import OPTIONS, Net, recipe_for
from torch import nn

from mup_megatron.check.measure.measurements import Key, MeasuredRun, Quantity
from mup_megatron.check.run_modules import check_modules
from mup_megatron.check.subjects.scripts import Task, prepare_by_plan, warm_up_and_decay
from mup_megatron.check.verdict.later import LATER, later_section, width_of
from mup_megatron.check.verdict.verdict import CheckOutcome
from mup_megatron.modules import plan_for_module
from mup_megatron.theory import Plan

RECIPE = recipe_for(hyperparameters={"weight_decay": 0.1})
UP = "blocks.0.up.weight"


@pytest.fixture(autouse=True)
def _references(monkeypatch: pytest.MonkeyPatch) -> None:
    small_nets.keep_references(monkeypatch)


def plan(width: int) -> Plan:
    return plan_for_module(lambda: Net(width), RECIPE)


def schedule(step: int) -> float:
    return warm_up_and_decay(step, LATER.steps)


def run(change: Callable[[Key, float], float]) -> MeasuredRun:
    """A run that does what the plan says, but for a change."""
    values: dict[Key, float] = {}
    for entry in plan(64).entries:
        for step in LATER.recorded:
            for quantity, value in (
                (Quantity.LEARNING_RATE, entry.lr * schedule(step - 1)),
                (Quantity.WEIGHT_DECAY, entry.weight_decay),
            ):
                key = Key(quantity, entry.name, step)
                values[key] = change(key, value)
    return MeasuredRun(64, 1, values, ())


def test_a_run_that_follows_its_plan_passes() -> None:
    section, cause = later_section(run(lambda _, value: value), plan(64), schedule, ())
    assert (section.outcome, section.findings, cause) == (CheckOutcome.PASS, (), None)


@pytest.mark.parametrize("quantity", [Quantity.LEARNING_RATE, Quantity.WEIGHT_DECAY])
def test_what_goes_wrong_later_is_told_with_its_step(quantity: Quantity) -> None:
    def change(key: Key, value: float) -> float:
        return value * (2.0 if (key.quantity, key.name) == (quantity, UP) and key.step > 30 else 1.0)

    section, cause = later_section(run(change), plan(64), schedule, ())
    assert section.outcome is CheckOutcome.FAIL
    assert section.findings[0].key == Key(quantity, UP, 32)
    assert "2 times what is expected, at width 64" in section.findings[0].sentence
    assert cause is not None
    assert (cause.name, cause.culprit) == ("later-steps", UP)
    assert later_section(run(change), plan(64), schedule, {UP})[0].outcome is CheckOutcome.PASS


def test_what_gets_no_gradient_on_either_side_has_no_rate() -> None:
    def at_rest(gradient: float) -> MeasuredRun:
        found = run(lambda key, value: 0.0 if key.name == UP else value)
        gradients = {Key(Quantity.GRADIENT, UP, step): gradient for step in LATER.recorded}
        return MeasuredRun(64, 1, {**found.values, **gradients}, ())

    assert later_section(at_rest(0.0), plan(64), schedule, (), {UP})[0].outcome is CheckOutcome.PASS
    # What the reference trains has to move, and so has what gets a gradient.
    assert later_section(at_rest(0.0), plan(64), schedule, (), ())[0].outcome is CheckOutcome.FAIL
    assert later_section(at_rest(0.1), plan(64), schedule, (), {UP})[0].outcome is CheckOutcome.FAIL


def test_the_width_is_one_at_which_rates_differ() -> None:
    assert width_of({width: plan(width) for width in (32, 64, 128)}) == 64


def test_rates_that_collapse_after_ten_steps_fail_a_quick_check() -> None:
    def prepare(model: nn.Module, task: Task) -> Any:
        optimizer = prepare_by_plan(model, task)
        assert optimizer is not None
        lr = task.plan.lr

        def rate(group: dict[str, Any]) -> Callable[[int], float]:
            ratio = lr / group["lr"]
            return lambda step: warm_up_and_decay(step, task.steps) * (1.0 if step < 10 else ratio)

        rates = [rate(group) for group in optimizer.param_groups]
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates)

    verdict = check_modules(Net, RECIPE, prepare=prepare, **OPTIONS)
    assert verdict.outcome is CheckOutcome.FAIL
    assert [section.name for section in verdict.sections if section.outcome is CheckOutcome.FAIL] == ["later steps"]
    assert verdict.causes[0].name == "later-steps"
    assert {finding.key.step for finding in verdict.sections[2].findings} == set(LATER.recorded)
