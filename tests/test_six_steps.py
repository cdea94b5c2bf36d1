"""Six steps from standard parametrization to μP: each changes one thing, and the last is μP."""

import math

import pytest
import six_steps

from mup_megatron.theory import Plan, Role

NEW = (
    {("init_std", Role.HIDDEN)},
    {("lr", Role.HIDDEN)},
    {("multiplier", Role.OUTPUT)},
    {("softmax_scale", None)},
    {("eps", Role.INPUT), ("eps", Role.HIDDEN), ("eps", Role.OUTPUT)},
    {("weight_decay", Role.HIDDEN)},
)


def plan(step: int, width: int) -> Plan:
    return six_steps.recipe(step, width).plan(six_steps.model(width))


def differing(one: Plan, other: Plan) -> set[tuple[str, Role | None]]:
    found: set[tuple[str, Role | None]] = set()
    for before, after in zip(one.entries, other.entries, strict=True):
        for value in ("init_std", "multiplier", "lr", "eps", "weight_decay"):
            values = [getattr(entry, value) for entry in (before, after)]
            if None not in values and not math.isclose(*values, rel_tol=1e-12):
                found.add((value, before.role))
    return found if math.isclose(one.softmax_scale, other.softmax_scale) else {*found, ("softmax_scale", None)}


@pytest.mark.parametrize("step", range(1, 7))
def test_each_step_changes_one_thing(step: int) -> None:
    assert differing(plan(step - 1, 256), plan(step, 256)) == NEW[step - 1]


def test_at_the_base_they_are_one() -> None:
    assert all(differing(plan(0, six_steps.BASE), plan(step, six_steps.BASE)) == set() for step in range(1, 7))
