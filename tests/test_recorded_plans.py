"""Every plan is, value by value, the one that was recorded: shapes, roles, and all that follows from a recipe."""

import pytest
from support.recorded_plans import plain, plans, recorded

NAMES = list(plans())


def test_the_record_is_of_these_plans() -> None:
    assert list(recorded()) == NAMES
    assert len(NAMES) >= 60


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_as_it_was_recorded(name: str) -> None:
    before, now = recorded()[name], plain(name)
    rows_before, rows_now = before.pop("parameters"), now.pop("parameters")
    assert now == before
    assert list(rows_now) == list(rows_before)
    for parameter, row in rows_before.items():
        assert rows_now[parameter] == row, parameter
