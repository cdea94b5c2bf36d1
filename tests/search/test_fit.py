"""The fit over a search's best trials: where the optimum is, how sure that is, and whether the space ends before it."""

import math
import random
from collections.abc import Sequence
from itertools import product

import pytest

from mup_megatron.search import Fit
from mup_megatron.search.fit import Point, fit_points
from mup_megatron.search.space import SearchRange, Space

SPACE = Space(
    {
        "lr": SearchRange(1e-4, 1e-1, log=True),
        "std": SearchRange(0.002, 0.2, log=True),
        "decay": SearchRange(0.0, 0.3, log=False),
    }
)
CURVATURES = (2.0, 0.8, 0.0)
"""Of the loss in coordinates from 0 to 1: nothing depends on the last."""
NOISE = 0.01


def trials(
    optimum: tuple[float, float], seed: int, *, rungs: Sequence[tuple[int, float]] = ((120, 0.0),), noise: float = NOISE
) -> list[Point]:
    """Trials of a bowl that is flat far from its optimum. A rung has so many, and its learning rates lie so far off."""
    draw = random.Random(seed)
    found: list[Point] = []
    candidates = [SPACE.sample(seed, number) for number in range(rungs[0][0])]
    for number, (count, offset) in enumerate(rungs):
        points = []
        for values in candidates[:count]:
            u, v, _ = (SPACE.ranges[name].fraction(values[name]) for name in SPACE.ranges)
            u, v = u - optimum[0] - offset, v - optimum[1]
            rise = CURVATURES[0] * u * u + CURVATURES[1] * v * v + 0.8 * u * v
            points.append(Point(number, values, 3.0 - 0.5 * number + rise / (1 + 0.3 * rise) + draw.gauss(0, noise)))
        found += points
        candidates = [point.parameters for point in sorted(points, key=lambda point: point.loss)]
    return found


def made(points: list[Point]) -> Fit:
    fit = fit_points(points, SPACE)
    assert fit is not None
    return fit


def places(fit: Fit, name: str) -> tuple[float, float, float]:
    """Lower end, optimum and upper end, from 0 to 1."""
    basin = fit.basins[name]
    low, middle, high = (SPACE.ranges[name].fraction(v) for v in (basin.interval[0], basin.optimum, basin.interval[1]))
    return low, middle, high


LADDER = ((120, 0.1), (12, 0.05), (6, 0.0))
"""Shorter runs prefer higher learning rates."""


@pytest.mark.parametrize("rungs", [((120, 0.0),), LADDER], ids=["random", "ladder"])
def test_nine_of_ten_intervals_hold_the_optimum_and_are_narrow(rungs: Sequence[tuple[int, float]]) -> None:
    held = []
    for seed in range(15):
        draw = random.Random(f"optimum {seed}")
        optimum = (draw.uniform(0.3, 0.7), draw.uniform(0.3, 0.7))
        fit = made(trials(optimum, seed, rungs=rungs))
        assert fit.at_edges == {}
        for name, true in zip(SPACE.ranges, optimum, strict=False):
            low, middle, high = places(fit, name)
            assert low <= middle <= high
            assert high - low < 0.25
            assert abs(middle - true) < 0.15
            held.append(low <= true <= high)
    assert sum(held) / len(held) >= 0.8


def test_no_optimum_is_where_no_good_trial_is() -> None:
    """A plateau behind a wall, as very short trials have it over their rate: nothing bends the fit up there."""
    draw = random.Random(0)
    points = []
    for number in range(120):
        values = SPACE.sample(0, number)
        u = SPACE.ranges["lr"].fraction(values["lr"])
        points.append(Point(0, values, (4.0 if u < 0.5 else 3.0 + 0.2 * (u - 0.5) * (1.5 - u)) + draw.gauss(0, 1e-3)))
    fit = made(points)
    low, middle, _ = places(fit, "lr")
    assert 0.4 <= low <= middle <= 0.6
    assert fit.surface.reach("lr") == pytest.approx((0.4, 0.9), abs=0.11)
    assert "lr" not in fit.at_edges


def test_a_whole_trials_optimum_is_not_that_of_the_shorter_ones() -> None:
    errors = []
    for seed in range(8):
        _, middle, _ = places(made(trials((0.5, 0.5), seed, rungs=LADDER, noise=0.003)), "lr")
        errors.append(middle - 0.5)
    assert abs(sum(errors) / len(errors)) < 0.03, "the many short trials have theirs at 0.6"


def test_what_the_loss_does_not_depend_on_is_said_to_be_unknown() -> None:
    low, _, high = places(made(trials((0.5, 0.5), 1)), "decay")
    assert high - low > 0.8
    basin = made(trials((0.5, 0.5), 1)).basins["decay"].basin
    assert basin[1] - basin[0] > 0.2


@pytest.mark.parametrize(("name", "edge"), list(product(["lr", "std"], [0, 1])))
def test_an_optimum_beyond_a_bound_is_at_it(name: str, edge: int) -> None:
    beyond = 1.3 if edge else -0.3
    optimum = (beyond, 0.5) if name == "lr" else (0.5, beyond)
    assert made(trials(optimum, 5)).at_edges == {name: edge}


def test_the_basin_is_where_the_loss_rises_by_a_hundredth() -> None:
    fit = made(trials((0.5, 0.5), 3, noise=1e-4, rungs=((2000, 0.0),)))
    low, high = (SPACE.ranges["lr"].fraction(value) for value in fit.basins["lr"].basin)
    assert fit.loss == pytest.approx(3.0, abs=0.02)
    assert (high - low) / 2 == pytest.approx(math.sqrt(0.03 / CURVATURES[0]), rel=0.2)


def test_too_few_trials_have_no_fit() -> None:
    points = trials((0.5, 0.5), 1)
    assert fit_points(points[:27], SPACE) is None
    assert fit_points(points[:28], SPACE) is not None


def test_it_is_the_same_each_time_and_is_json() -> None:
    points = trials((0.5, 0.5), 2, rungs=LADDER)
    fit = made(points)
    assert made(points) == fit
    content = fit.to_json()
    assert content["basins"]["lr"]["interval"] == list(fit.basins["lr"].interval)
    assert content["at_edges"] == {}
    assert made(trials((1.3, 0.5), 5)).to_json()["at_edges"] == {"lr": "high"}


def test_the_surface_is_the_loss_of_each_rung_where_that_is_quadratic() -> None:
    draw = random.Random(1)
    points = []
    for rung, count in ((0, 120), (1, 40)):
        for _ in range(count):
            u = [draw.random() for _ in SPACE.ranges]
            loss = 3.0 - rung + (u[0] - 0.4) ** 2 + 2 * (u[1] - 0.6) ** 2 + u[2] ** 2 + 0.1 * (1 - rung) * u[0]
            values = {name: SPACE.ranges[name].at(x) for name, x in zip(SPACE.ranges, u, strict=True)}
            points.append(Point(rung, values, loss))
    fit = made(points)
    assert fit.surface.rungs == [0, 1]
    for rung, lr, std in ((0, 0.2, 0.9), (1, 0.2, 0.9), (1, 1.0, 0.0)):
        # The third is left at its optimum, the lower edge.
        expected = 3.0 - rung + (lr - 0.4) ** 2 + 2 * (std - 0.6) ** 2 + 0.1 * (1 - rung) * lr
        assert fit.surface.loss(rung, {"lr": lr, "std": std}) == pytest.approx(expected, abs=1e-3)
    assert fit.surface.loss(1, {}) == fit.loss
