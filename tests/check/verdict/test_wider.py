"""Wider is better, on made-up losses: what is called worse, and what is left to the seeds."""

import math
import random
from collections.abc import Callable

import pytest

from mup_megatron.check.measure.measurements import MeasuredRun, Measurements
from mup_megatron.check.verdict.wider import TOLERANCE, wider_is_better

WIDTHS = (32, 64, 128, 256)
STEPS = 48
TIMES = (16, 32, 48)


def _measured(
    loss: Callable[[int, int], float], *, noise: float = 0.0, seeds: int = 3, chance: int = 0
) -> Measurements:
    """`loss(width, step)` with noise between seeds and noise between steps, both relative."""
    rng = random.Random(chance)
    runs = []
    for width in WIDTHS:
        for seed in range(seeds):
            own = 1 + noise * rng.gauss(0, 1)
            losses = [loss(width, step) * own * (1 + noise * rng.gauss(0, 1)) for step in range(1, STEPS + 1)]
            runs.append(MeasuredRun(width, seed, {}, tuple(losses)))
    return Measurements(tuple(runs))


def _better(width: int, step: int) -> float:
    return (5.0 - 2.5 * step / STEPS) * (1 + 1 / width)


def test_wider_models_that_learn_more_hold() -> None:
    result = wider_is_better(_measured(_better, noise=0.01), TIMES)

    assert result.holds
    assert result.offending == ()
    assert result.lines[0].startswith("training loss after 48 steps: ")
    assert "at width 256" in result.lines[0]


def test_a_wider_model_that_is_worse_is_named_with_time_and_difference() -> None:
    def late_trouble(width: int, step: int) -> float:
        return _better(width, step) * (1.3 if width == 256 and step > 24 else 1.0)

    result = wider_is_better(_measured(late_trouble, noise=0.005), TIMES)

    assert not result.holds
    assert {(pair.narrower, pair.wider, pair.step) for pair in result.offending} == {(128, 256, 32), (128, 256, 48)}
    worst = result.offending[0]
    assert worst.difference == pytest.approx(math.log(1.3), abs=0.03)
    assert worst.difference > worst.error > 0
    assert f"width 256 is worse than 128 at step {worst.step}" in result.lines[0]


def test_every_neighbouring_pair_is_a_row_at_every_time() -> None:
    result = wider_is_better(_measured(_better), TIMES)

    assert [(row["step"], row["narrower"], row["wider"]) for row in result.rows] == [
        (step, narrower, wider) for step in TIMES for narrower, wider in ((32, 64), (64, 128), (128, 256))
    ]


def test_widths_that_are_equal_are_seldom_called_worse() -> None:
    alarms = sum(
        not wider_is_better(_measured(lambda _width, _step: 4.0, noise=0.02, chance=chance), TIMES).holds
        for chance in range(300)
    )

    assert alarms <= 6


def test_a_difference_within_the_seeds_noise_is_not_called_worse_and_with_less_noise_is() -> None:
    def worse(width: int, _step: int) -> float:
        return 4.0 * (1.05 if width == 256 else 1.0)

    assert wider_is_better(_measured(worse, noise=0.05), TIMES).holds
    assert not wider_is_better(_measured(worse, noise=0.002), TIMES).holds


def test_a_difference_within_the_tolerance_is_not_called_worse_however_alike_the_seeds_are() -> None:
    def slightly(width: int, _step: int) -> float:
        return 4.0 * (1 + 0.5 * TOLERANCE) ** WIDTHS.index(width)

    assert wider_is_better(_measured(slightly), TIMES).holds


def test_a_single_hard_batch_is_averaged_out() -> None:
    def hard_batch(width: int, step: int) -> float:
        return _better(width, step) * (1.04 if width == 256 and step == 32 else 1.0)

    assert wider_is_better(_measured(hard_batch), TIMES).holds


def test_a_wider_run_that_ended_early_is_worse_and_a_narrower_one_is_not_an_excuse() -> None:
    measured = _measured(_better)
    broken = [
        MeasuredRun(run.width, run.seed, {}, (*run.losses[:20], math.nan))
        if run.width == 128 and run.seed == 1
        else run
        for run in measured.runs
    ]

    result = wider_is_better(Measurements(tuple(broken)), TIMES)

    assert {(pair.narrower, pair.wider, pair.step) for pair in result.offending} == {(64, 128, 32), (64, 128, 48)}
