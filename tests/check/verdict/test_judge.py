"""What becomes of measurements: verdicts on numbers that are made up, each wrong in one way."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from support.shapes import gpt, recipe_for

from mup_megatron.check.measure.levels import EARLY, LATE, Level
from mup_megatron.check.measure.measurements import Key, MeasuredRun, Measurements, Quantity, RunProtocol
from mup_megatron.check.verdict.judge import Expectation, Sides, judge
from mup_megatron.check.verdict.verdict import CheckOutcome, Verdict

WIDTHS = (32, 64, 128)
BASE, MODELS = gpt(1), {width: gpt(ratio) for width, ratio in zip(WIDTHS, (1, 2, 4), strict=True)}
RECIPE = recipe_for(BASE)
FC1 = "decoder.layers.0.mlp.linear_fc1"
KEYS_BIAS = "decoder.layers.0.self_attention.k_layernorm.bias"

Change = Callable[[RunProtocol, MeasuredRun], MeasuredRun]


def measured(protocol: RunProtocol, change: Change, *, update_slope: float = 0.0) -> Measurements:
    """Of a weight, its module and a bias of keys; losses fall, and fall further for the wider."""
    runs = []
    for width in WIDTHS:
        for seed in range(2):
            values = {Key(Quantity.INITIAL, f"{FC1}.weight", 0): 0.1, Key(Quantity.INITIAL, KEYS_BIAS, 0): 0.0}
            for step in protocol.recorded:
                values[Key(Quantity.UPDATE, FC1, step)] = width**update_slope
                values |= {Key(Quantity.LEARNING_RATE, name, step): 0.1 for name in (f"{FC1}.weight", KEYS_BIAS)}
                values[Key(Quantity.GRADIENT, f"{FC1}.weight", step)] = 1e-2
                values[Key(Quantity.GRADIENT, f"{FC1}.bias", step)] = 1e-2
                values[Key(Quantity.GRADIENT, KEYS_BIAS, step)] = 1e-11
            losses = tuple(5 - 0.01 * step - 0.001 * width for step in range(protocol.steps))
            runs.append(change(protocol, MeasuredRun(width, seed, values, losses)))
    return Measurements(tuple(runs))


def verdict(change: Change, level: Level = Level.QUICK, *, apart: float = 1.0) -> Verdict:
    def same(_: RunProtocol, run: MeasuredRun) -> MeasuredRun:
        return run

    return judge(
        Sides(
            subject=lambda protocol: measured(protocol, change),
            reference=lambda protocol: measured(protocol, same),
            control=lambda protocol: measured(protocol, same, update_slope=apart),
        ),
        Expectation(recipe=RECIPE, plans={width: RECIPE.plan(model) for width, model in MODELS.items()}, models=MODELS),
        level=level,
        fingerprint="0f",
    )


def test_numbers_that_agree_pass_and_what_was_not_read_is_told() -> None:
    found = verdict(lambda _, run: run, Level.STANDARD)
    assert found.outcome is CheckOutcome.PASS, found.sections
    assert any(KEYS_BIAS in line and "rounding" in line for section in found.sections for line in section.lines)


def test_a_parameter_that_the_model_does_not_show_is_no_pass() -> None:
    def without(_: RunProtocol, run: MeasuredRun) -> MeasuredRun:
        return replace(run, values={key: x for key, x in run.values.items() if key.name != f"{FC1}.weight"})

    found = verdict(without)
    assert found.outcome is CheckOutcome.NO_VERDICT
    assert any(f"{FC1}.weight: in the plan" in line for section in found.sections for line in section.lines)


def test_a_model_that_breaks_in_the_long_runs_alone_fails() -> None:
    def broken(protocol: RunProtocol, run: MeasuredRun) -> MeasuredRun:
        if protocol is not LATE:
            return run
        return replace(run, values={}, losses=(5.0,), problem="loss: not finite after 1 step")

    found = verdict(broken, Level.STANDARD)
    assert found.outcome is CheckOutcome.FAIL
    assert [section.name for section in found.sections if section.outcome is CheckOutcome.FAIL] == ["late steps"]


def late(change: Callable[[Key, int, float], float]) -> Verdict:
    """Of a change of values in the long runs alone, at standard."""

    def changed(protocol: RunProtocol, run: MeasuredRun) -> MeasuredRun:
        if protocol is not LATE:
            return run
        return replace(run, values={key: change(key, run.width, value) for key, value in run.values.items()})

    return verdict(changed, Level.STANDARD)


def test_a_rate_that_is_wrong_later_has_the_cause_that_it_would_have_at_first() -> None:
    def collapsed(key: Key, width: int, value: float) -> float:
        hidden = key.quantity is Quantity.LEARNING_RATE and key.name == f"{FC1}.weight"
        return value * width / WIDTHS[0] if hidden else value

    first = late(collapsed).causes[0]
    assert (first.name, first.culprit) == ("learning-rate-collapsed", f"{FC1}.weight")
    assert first.share == pytest.approx(1.0)
    assert first.sentence.endswith(" Runs of 8 steps are right: it begins later.")


def test_of_gradients_that_are_wrong_later_it_counts_how_many_are_not() -> None:
    def two_of_three(key: Key, _: int, value: float) -> float:
        return 3 * value if key.quantity is Quantity.GRADIENT and key.name.startswith(FC1) else value

    first = late(two_of_three).causes[0]
    assert first.name == "gradient"
    assert first.culprit.startswith(FC1)


def test_the_short_runs_are_those_of_quick() -> None:
    seen: list[RunProtocol] = []

    def noting(protocol: RunProtocol, run: MeasuredRun) -> MeasuredRun:
        seen.append(protocol)
        return run

    verdict(noting)
    assert set(map(id, seen)) == {id(EARLY)}


def test_without_a_verdict_the_width_that_is_to_be_added_is_named() -> None:
    """More seeds would be the subject's, and tell reference and control no better apart."""
    found = verdict(lambda _, run: run, apart=0.0)
    assert found.outcome is CheckOutcome.NO_VERDICT
    [line] = [line for section in found.sections for line in section.lines if "cannot be told" in line]
    assert "add a model of width 256" in line
    assert "seeds" not in line


def test_what_gets_no_gradient_is_told_and_passes() -> None:
    def at_rest(_: RunProtocol, run: MeasuredRun) -> MeasuredRun:
        gradients = {key: 0.0 for key in run.values if key.quantity is Quantity.GRADIENT and KEYS_BIAS in key.name}
        return replace(run, values={**run.values, **gradients})

    def sides(protocol: RunProtocol) -> Measurements:
        return measured(protocol, at_rest)

    found = judge(
        Sides(subject=sides, reference=sides, control=lambda p: measured(p, at_rest, update_slope=1.0)),
        Expectation(recipe=RECIPE, plans={width: RECIPE.plan(model) for width, model in MODELS.items()}, models=MODELS),
        level=Level.QUICK,
        fingerprint="0f",
    )
    assert found.outcome is CheckOutcome.PASS
    assert f"Not of {KEYS_BIAS}: no gradient, in the correct reference either" in found.sections[1].lines
