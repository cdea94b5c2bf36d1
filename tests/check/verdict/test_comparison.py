"""Slopes, levels and what is called off, on measurements made up from a known law and known noise."""

import math
import random
from collections.abc import Callable

import pytest

from mup_megatron.check.measure.measurements import Key, MeasuredRun, Measurements, Quantity
from mup_megatron.check.verdict.comparison import ORDER, Finding, Mismatch, Slope, compare, findings, t_quantile

WIDTHS = (32, 64, 128, 256)
UPDATE = Key(Quantity.UPDATE, "decoder.layers.0", 3)
DEAD = Key(Quantity.DEAD, "w", 3)


def measured(
    *, slope: float, level: float = 0.0, spread: float = 0.05, seeds: int = 3, key: Key = UPDATE, draw: int = 0
) -> Measurements:
    """value = exp(level) · width^slope, with log-normal noise."""
    noise = random.Random(draw)
    return Measurements(
        tuple(
            MeasuredRun(w, s, {key: math.exp(level + slope * math.log(w) + noise.gauss(0, spread))}, (1.0,))
            for w in WIDTHS
            for s in range(seeds)
        )
    )


def test_a_slope_is_found_with_its_interval() -> None:
    covered = 0
    for draw in range(200):
        found = compare(measured(slope=-0.4, draw=draw), measured(slope=-0.4, draw=1000 + draw))[UPDATE].subject
        covered += abs(found.value + 0.4) <= found.half_width
    assert covered == pytest.approx(190, abs=10)


def test_the_reference_is_what_counts_and_not_zero() -> None:
    # A correct readout's update shrinks with width.
    assert compare(measured(slope=-0.4), measured(slope=-0.4, draw=1))[UPDATE].off is None
    assert compare(measured(slope=0.0), measured(slope=-0.4, draw=1))[UPDATE].off is Mismatch.SLOPE


def test_a_level_that_is_off_at_every_width_is_found() -> None:
    found = compare(measured(slope=0.0, level=math.log(2)), measured(slope=0.0, draw=1))[UPDATE]
    assert found.off is Mismatch.LEVEL
    assert found.factor == pytest.approx(2.0, rel=0.1)
    assert f"{found.factor:.3g} times what is expected" in Finding(found, Mismatch.LEVEL).sentence


def test_a_difference_that_seeds_explain_is_none() -> None:
    noisy = compare(measured(slope=0.2, spread=0.5), measured(slope=0.0, spread=0.5, draw=1))[UPDATE]
    assert noisy.off is None


def test_curvature_that_both_sides_share_is_not_noise() -> None:
    def curved(extra: float, draw: int) -> Measurements:
        runs = measured(slope=extra, spread=0.01, draw=draw).runs
        return Measurements(
            tuple(MeasuredRun(r.width, r.seed, {UPDATE: r.values[UPDATE] * (1 + 20 / r.width)}, (1.0,)) for r in runs)
        )

    assert compare(curved(0.0, 0), curved(0.0, 1))[UPDATE].off is None
    assert compare(curved(0.25, 0), curved(0.0, 1))[UPDATE].off is Mismatch.SLOPE


def test_values_of_zero_are_compared_and_differ_from_others() -> None:
    def runs(vector: float) -> Measurements:
        keys = {Key(Quantity.WEIGHT_DECAY, "w", 3): 0.1, Key(Quantity.WEIGHT_DECAY, "b", 3): vector}
        return Measurements(tuple(MeasuredRun(w, s, keys, (1.0,)) for w in WIDTHS for s in range(3)))

    assert not findings(compare(runs(-1e-7), runs(1e-7)))
    [found] = findings(compare(runs(0.1), runs(0.0)))
    assert found.key.name == "b"


def of_initial(values: Callable[[int], float]) -> Measurements:
    """Of a weight that has these at each width, beside one that has 1."""
    return Measurements(
        tuple(
            MeasuredRun(w, s, {Key(Quantity.INITIAL, "w", 0): values(w), Key(Quantity.INITIAL, "v", 0): 1.0}, (1.0,))
            for w in WIDTHS
            for s in range(3)
        )
    )


@pytest.mark.parametrize(
    ("found", "expected", "told"),
    [
        (lambda _: 0.0, lambda w: w / 32, "at width 256: 0, expected 8"),
        (lambda w: w / 32, lambda _: 0.0, "at width 256: 8, expected 0"),
        (lambda _: 0.5, lambda _: 0.0, "at width 256: 0.5, expected 0"),
        (lambda w: 0.0 if w < 100 else 0.5, lambda _: 0.5, "at width 64: 0, expected 0.5"),
        (lambda w: 0.0 if w == 256 else 0.5, lambda w: 0.0 if w == 256 else 0.25, "at width 256: 0, expected 0"),
    ],
    ids=["slope of found", "slope of expected", "level", "some widths", "alike where they are 0"],
)
def test_what_is_0_somewhere_has_values_and_no_slope_or_factor(
    found: Callable[[int], float], expected: Callable[[int], float], told: str
) -> None:
    [finding] = findings(compare(of_initial(found), of_initial(expected)))
    assert finding.sentence == f"w: initial weight, before training: {told}"


def test_values_are_told_with_the_slope_at_the_widest_width() -> None:
    [finding] = findings(compare(of_initial(lambda w: 256 / w), of_initial(lambda _: 1.0)))
    assert finding.sentence.endswith(
        "slope over width -1.00 ± 0.00, expected +0.00 ± 0.00; at width 256: 1, expected 1"
    )


def test_rows_without_gradient_are_told_as_a_share_where_there_should_be_none() -> None:
    def runs(dead: float) -> Measurements:
        return Measurements(tuple(MeasuredRun(w, s, {DEAD: dead}, (1.0,)) for w in WIDTHS for s in range(3)))

    [finding] = findings(compare(runs(0.5), runs(0.0)))
    assert finding.sentence.endswith("after 3 steps: up to 50% of its rows; at width 256: 0.5, expected 0")
    [finding] = findings(compare(runs(0.5), runs(0.125)))
    assert finding.sentence.endswith(
        "up to 50% of its rows, 4 times what is expected; at width 256: 0.5, expected 0.125"
    )


@pytest.mark.parametrize("gradient", [1e-10, 1e-3])
def test_nothing_is_read_from_a_gradient_that_is_rounding(gradient: float) -> None:
    """As that of a bias of keys, which does not change the softmax."""

    def runs(rate: float) -> Measurements:
        rates = {Key(Quantity.LEARNING_RATE, "keys", 3): rate, Key(Quantity.LEARNING_RATE, "w", 3): 0.1}
        gradients = {Key(Quantity.GRADIENT, name, 3): 1e-3 for name in ("w", "v")}
        gradients[Key(Quantity.GRADIENT, "keys", 3)] = gradient
        return Measurements(tuple(MeasuredRun(w, s, {**rates, **gradients}, (1.0,)) for w in WIDTHS for s in range(3)))

    told = {finding.key.name for finding in findings(compare(runs(0.7), runs(0.1)))}
    assert told == ({"keys"} if gradient == 1e-3 else set())


def test_nor_does_what_is_read_from_one_hide_what_is_read_from_others() -> None:
    def runs(decay: float) -> Measurements:
        decays = {Key(Quantity.WEIGHT_DECAY, "keys", 3): 1e6, Key(Quantity.WEIGHT_DECAY, "w", 3): decay}
        gradients = {Key(Quantity.GRADIENT, name, 3): 1e-3 for name in ("w", "v")}
        gradients[Key(Quantity.GRADIENT, "keys", 3)] = 1e-10
        return Measurements(tuple(MeasuredRun(w, s, {**decays, **gradients}, (1.0,)) for w in WIDTHS for s in range(3)))

    [found] = findings(compare(runs(0.05), runs(0.1)))
    assert (found.key.name, found.compared.factor) == ("w", pytest.approx(0.5, rel=0.02))


def test_a_small_draw_is_not_taken_for_nothing_beside_gains_of_1() -> None:
    def runs(residual: float) -> Measurements:
        stds = {"gain": 1.0, "bias": 0.0, "residual": residual}
        keys = {Key(Quantity.INITIAL, name, 0): std for name, std in stds.items()}
        return Measurements(tuple(MeasuredRun(w, s, keys, (1.0,)) for w in WIDTHS for s in range(3)))

    [found] = findings(compare(runs(0.0009 * math.sqrt(2)), runs(0.0009)))
    assert found.compared.factor == pytest.approx(math.sqrt(2), rel=0.01)


def test_a_rate_that_differs_in_one_run_alone_does_not_hide_behind_its_own_spread() -> None:
    key = Key(Quantity.LEARNING_RATE, "w", 3)
    right = measured(slope=0, spread=0, key=key)
    runs = [MeasuredRun(run.width, run.seed, {key: 0.0 if i == 5 else 1.0}, (1.0,)) for i, run in enumerate(right.runs)]
    assert findings(compare(Measurements(tuple(runs)), right))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_overflows_is_off_unless_the_reference_does_too(value: float) -> None:
    broken = Measurements(tuple(MeasuredRun(w, s, {UPDATE: value}, (1.0,)) for w in WIDTHS for s in range(3)))
    [found] = findings(compare(broken, measured(slope=0)))
    assert found.key == UPDATE
    assert compare(broken, broken) == {}


def test_what_is_explained_at_one_width_of_four_is_still_off() -> None:
    key = Key(Quantity.UNEXPLAINED, "w", 3)
    shares = {32: 1e-5, 64: 0.05, 128: 1e-5, 256: 1e-5}
    subject = Measurements(tuple(MeasuredRun(w, s, {key: shares[w]}, (1.0,)) for w in WIDTHS for s in range(3)))
    [found] = findings(compare(subject, measured(slope=0, level=-12, key=key)))
    assert "5% of it is explained by no" in found.sentence
    assert not findings(compare(measured(slope=0, level=-12, key=key), subject)), "better than the reference is not off"


def test_movement_that_is_not_explained_is_told_as_a_share() -> None:
    key = Key(Quantity.UNEXPLAINED, "w", 3)
    [found] = findings(compare(measured(slope=0, level=math.log(0.2), key=key), measured(slope=0, level=-12, key=key)))
    assert "20% of it is explained by no" in found.sentence
    assert not findings(compare(measured(slope=0, level=-9, key=key), measured(slope=0, level=-12, key=key)))


def test_what_only_one_side_has_is_not_compared() -> None:
    other = Key(Quantity.UPDATE, "elsewhere", 3)
    assert set(compare(measured(slope=0, key=other), measured(slope=0))) == set()


def test_causes_come_before_consequences() -> None:
    keys = [Key(quantity, "x", 3) for quantity in reversed(ORDER)]
    subject = Measurements(
        tuple(MeasuredRun(w, s, dict.fromkeys(keys, w**2.0), (1.0,)) for w in WIDTHS for s in (0, 1))
    )
    reference = Measurements(tuple(MeasuredRun(w, s, dict.fromkeys(keys, 1.0), (1.0,)) for w in WIDTHS for s in (0, 1)))
    assert tuple(finding.key.quantity for finding in findings(compare(subject, reference))) == ORDER


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 20, 2.0860), (0.975, 5, 2.5706), (0.9995, 20, 3.8495), (0.975, 1000, 1.9623)],
)
def test_quantiles_of_students_distribution(probability: float, freedom: int, expected: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(expected, rel=0.01)


def test_a_slope_in_words() -> None:
    assert str(Slope(0.984, 0.051)) == "+0.98 ± 0.05"
