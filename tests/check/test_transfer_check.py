"""Transfer of the learning rate, on basins whose optimum is known: what fails, what passes, and what says nothing."""

import math
import random
from collections.abc import Callable

import pytest
from support.shapes import gpt

from mup_megatron.check.transfer import at_rate, final_loss, learning_rates, transfer
from mup_megatron.check.verdict.basins import judge_transfer
from mup_megatron.check.verdict.verdict import CheckOutcome
from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe

WIDTHS = (32, 64, 128)
LRS = learning_rates(2.0**-8, 7)
Basin = Callable[[int, float], float]


def _parabola(shift: float, *, curvature: float = 0.1, centre: float = -8.0) -> Basin:
    """log2 of the best learning rate moves by `shift` from the narrowest width to the widest."""

    def loss(width: int, lr: float) -> float:
        best = centre + shift * math.log2(width / WIDTHS[0]) / math.log2(WIDTHS[-1] / WIDTHS[0])
        return 3.0 + curvature * (math.log2(lr) - best) ** 2

    return loss


def _lopsided(shift: float) -> Basin:
    """Slow below the optimum, steep above it, and diverging two octaves above."""
    base = _parabola(shift)

    def loss(width: int, lr: float) -> float:
        best = -8.0 + shift * math.log2(width / WIDTHS[0]) / math.log2(WIDTHS[-1] / WIDTHS[0])
        above = math.log2(lr) - best
        return math.inf if above > 2 else base(width, lr) + 0.05 * max(0.0, above) ** 3

    return loss


def _losses(
    basin: Basin, *, noise: float = 0.01, common: float = 0.0, seeds: int = 3, chance: int = 0
) -> dict[int, dict[float, list[float]]]:
    """`noise` is each run's own, `common` a seed's at all learning rates."""
    rng = random.Random(chance)
    found = {}
    for width in WIDTHS:
        own = [common * rng.gauss(0, 1) for _ in range(seeds)]
        found[width] = {lr: [basin(width, lr) + offset + noise * rng.gauss(0, 1) for offset in own] for lr in LRS}
    return found


@pytest.mark.parametrize("shift", [-2.0, -1.3, 0.0, 0.4, 1.5])
@pytest.mark.parametrize("make", [_parabola, _lopsided])
def test_a_known_shift_is_measured(make: Callable[[float], Basin], shift: float) -> None:
    result = judge_transfer(_losses(make(shift)))

    assert result.shift == pytest.approx(shift, abs=0.25)
    assert result.shift_interval[0] - 0.15 < shift < result.shift_interval[1] + 0.15


def test_the_intervals_cover_the_truth_as_often_as_they_say() -> None:
    covered = [
        interval[0] <= 0.0 <= interval[1]
        for interval in (
            judge_transfer(_losses(_parabola(0.0), noise=0.03, chance=c)).shift_interval for c in range(25)
        )
    ]

    assert sum(covered) >= 20


@pytest.mark.parametrize("shift", [0.0, 0.3, -0.3])
def test_an_optimum_that_stays_passes(shift: float) -> None:
    result = judge_transfer(_losses(_parabola(shift)))

    assert result.outcome is CheckOutcome.PASS
    assert "octaves from width 32 to 128" in result.lines[0]


@pytest.mark.parametrize("make", [_parabola, _lopsided])
def test_a_shift_of_standard_parametrization_fails_and_says_what_it_costs(make: Callable[[float], Basin]) -> None:
    result = judge_transfer(_losses(make(-1.8)))

    assert result.outcome is CheckOutcome.FAIL
    assert result.regret > 0.05
    assert result.regret_interval[0] > 0.02
    assert f"moves by {result.shift:+.2f} ± " in result.lines[0]


def test_the_transferred_rate_that_diverges_at_the_widest_fails() -> None:
    def loss(width: int, lr: float) -> float:
        return math.inf if width == 128 and lr > 2.0**-9.5 else _parabola(-2.0)(width, lr)

    result = judge_transfer(_losses(loss))

    assert result.outcome is CheckOutcome.FAIL
    assert result.regret == math.inf


def test_a_shift_that_costs_nothing_passes() -> None:
    flat = _parabola(-1.5, curvature=0.003)

    assert judge_transfer(_losses(flat, noise=0.0003)).outcome is CheckOutcome.PASS


def test_a_shift_within_the_noise_does_not_fail() -> None:
    alarms = sum(
        judge_transfer(_losses(_parabola(0.0, curvature=0.03), noise=0.05, chance=chance)).outcome is CheckOutcome.FAIL
        for chance in range(20)
    )

    assert alarms <= 1


def test_noise_that_hides_the_optimum_is_no_verdict() -> None:
    result = judge_transfer(_losses(_parabola(0.0, curvature=0.01), noise=0.1, seeds=2))

    assert result.outcome is CheckOutcome.NO_VERDICT


def test_what_a_seed_adds_at_every_rate_does_not_widen_the_interval() -> None:
    def half(common: float) -> float:
        low, high = judge_transfer(_losses(_parabola(0.0), common=common)).shift_interval
        return high - low

    assert half(0.5) == pytest.approx(half(0.0), rel=0.5)


@pytest.mark.parametrize(("centre", "end"), [(-12.0, "lowest"), (-4.0, "highest")])
def test_a_basin_with_one_side_is_no_verdict(centre: float, end: str) -> None:
    result = judge_transfer(_losses(_parabola(0.0, centre=centre)))

    assert result.outcome is CheckOutcome.NO_VERDICT
    assert f"width 32 does best at the {end} learning rate" in result.lines[0]


def test_an_optimum_that_left_the_range_downwards_fails_with_a_lower_bound() -> None:
    result = judge_transfer(_losses(_parabola(-4.0)))

    assert result.outcome is CheckOutcome.FAIL
    assert "at least" in result.lines[0]


def test_divergence_bounds_a_basin_from_above() -> None:
    def loss(width: int, lr: float) -> float:
        return math.inf if lr > 2.0**-7.5 else _parabola(0.0)(width, lr)

    result = judge_transfer(_losses(loss))

    assert result.outcome is CheckOutcome.PASS
    assert all(optimum.edge == 0 for optimum in result.optima.values())


def test_one_diverged_seed_bounds_a_basin_like_all_of_them_whatever_higher_rates_seem_to_do() -> None:
    losses = _losses(_parabola(0.0))
    losses[128][2.0**-8][1] = math.inf

    assert judge_transfer(losses).optima[128].log2_lr == pytest.approx(-8.5, abs=0.5)
    assert judge_transfer(losses).optima[128].high <= -8.0


def test_a_width_that_never_trains_is_no_verdict() -> None:
    losses = _losses(lambda width, lr: math.inf if width == 64 else _parabola(0.0)(width, lr))

    result = judge_transfer(losses)

    assert result.outcome is CheckOutcome.NO_VERDICT
    assert result.lines == ("width 64 diverges at the lowest learning rate that was tried. Try lower ones.",)


def test_rows_hold_every_run() -> None:
    losses = _losses(_parabola(0.0))

    rows = judge_transfer(losses).rows

    assert [(row["width"], row["lr"]) for row in rows] == [(width, lr) for width in WIDTHS for lr in LRS]
    assert len(str(rows[0]["losses"]).split()) == 3


@pytest.mark.parametrize(
    ("losses", "what"),
    [
        ({32: dict.fromkeys(LRS, (3.0, 3.0)), 64: dict.fromkeys(LRS, (3.0, 3.0))}, "3 widths"),
        ({w: dict.fromkeys(LRS[:2], (3.0, 3.0)) for w in WIDTHS}, "3 learning rates"),
        ({w: dict.fromkeys(LRS, (3.0,)) for w in WIDTHS}, "--seeds 2"),
    ],
)
def test_too_little_is_refused(losses: dict[int, dict[float, tuple[float, ...]]], what: str) -> None:
    with pytest.raises(InputError, match=what):
        judge_transfer(losses)


# ---- the runs ------------------------------------------------------------------------------------------------------


class _Trained:
    """Stands for a trainee: falls to where its basin is, with the seed's own noise."""

    def __init__(self, end: float, seed: int) -> None:
        self._end, self._random = end, random.Random(seed)

    def step(self, step: int) -> float:
        return self._end + 3.0 * 0.5**step + 0.001 * self._random.gauss(0, 1)


def test_runs_follow_until_every_basin_has_two_sides() -> None:
    basin = _parabola(0.0, centre=-12.5)
    asked: list[tuple[int, int, float]] = []

    def start(width: int, seed: int, lr: float) -> _Trained:
        asked.append((width, seed, lr))
        return _Trained(basin(width, lr), hash((width, seed, lr)))

    result = transfer(start, WIDTHS, LRS, (1, 2), steps=20)  # type: ignore[arg-type]

    assert result.outcome is CheckOutcome.PASS
    assert result.optima[32].log2_lr == pytest.approx(-12.5, abs=0.1)
    assert {(width, seed) for width, seed, _ in asked} == {(width, seed) for width in WIDTHS for seed in (1, 2)}
    assert min(lr for _, _, lr in asked) == 2.0**-14


def test_the_search_for_a_second_side_ends() -> None:
    result = transfer(
        lambda width, seed, lr: _Trained(10.0 + math.log2(lr) / 10, seed),  # type: ignore[arg-type, return-value]
        WIDTHS,
        LRS,
        (1, 2),
        steps=20,
    )

    assert result.outcome is CheckOutcome.NO_VERDICT
    assert {len(basin) for basin in result.losses.values()} == {7 + 6}


def test_the_result_of_a_run_is_the_mean_of_its_last_tenth_and_infinite_if_it_diverges() -> None:
    class Given:
        def __init__(self, losses: list[float]) -> None:
            self._losses = losses

        def step(self, step: int) -> float:
            return self._losses[step]

    assert final_loss(Given([9.0] * 18 + [2.0, 4.0]), 20) == 3.0  # type: ignore[arg-type]
    assert final_loss(Given([9.0, math.nan]), 20) == math.inf  # type: ignore[arg-type]


def test_another_rate_keeps_the_floors_ratio_and_the_product_with_weight_decay() -> None:
    recipe = Recipe.model_validate(
        {"base": gpt(), "hyperparameters": {"lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.5}}
    )

    h = at_rate(recipe, 4e-2).hyperparameters

    assert (h.lr, h.min_lr, h.weight_decay) == pytest.approx((4e-2, 4e-3, 0.125))
