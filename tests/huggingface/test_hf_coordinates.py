"""What μP promises, measured on real Hugging Face models of three widths with a plan and torch's AdamW.

Every activation moves as much per step at every width, as it does with microsoft/mup; gradients shrink as the rule for
eps says. Two layers, heads of one size, base and smallest width 64 (ResNet's 32), learning rate 0.003. A slope is that
of log(size) over log(width), averaged over three seeds, which leaves a standard error of up to 0.08;
`benchmarks/hf_coordinates.py` takes more seeds and prints the slopes.
"""

import pytest
from support.hf_coordinates import (
    CASES,
    STEPS,
    Case,
    Plans,
    Slopes,
    eps_slopes,
    gradient_slopes,
    location_of,
    mean,
    plans_of,
    plans_of_extremes,
    update_slopes,
    with_mup,
)

from mup_megatron.theory import ADAM, Role, rules
from mup_megatron.theory.optimizers import ONE, Power

SEEDS = (0, 1, 2)
NORMED = {"bert", "resnet", "opt, post-norm"}
"""A norm ends each block or convolution, so that its output cannot grow however much training moves it."""

GROWTH = 0.15
VANISHING = -0.3
READOUT_VANISHING = -0.45
"""Right plans reach -0.37 (T5's first step), in microsoft/mup as well: a finite width. Half of it, in GPT-2, is what
the readout's initial weights contribute; that shrinks as 1/√width."""


OFTEN = {"gpt2", "llama", "bert", "t5", "resnet"}
"""One of each kind: with positions in a table, rotary, encoder, both stacks, convolutions."""


@pytest.fixture(
    scope="module", params=[pytest.param(case, marks=() if case in OFTEN else pytest.mark.slow) for case in CASES]
)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def plans(name: str) -> Plans:
    return plans_of(CASES[name])


@pytest.fixture(scope="module")
def ours(name: str, plans: Plans) -> list[Slopes]:
    return [update_slopes(CASES[name], plans, seed) for seed in SEEDS]


def assert_no_growth(of_plan: Slopes) -> None:
    assert max(of_plan.values()) <= GROWTH, max(of_plan.items(), key=lambda item: item[1])


def assert_no_vanishing(of_plan: Slopes) -> None:
    below = {
        key: slope
        for key, slope in of_plan.items()
        if slope < (READOUT_VANISHING if location_of(key[1]) == "readout" else VANISHING)
    }
    assert not below


def test_updates_neither_grow_nor_vanish_with_width(ours: list[Slopes]) -> None:
    assert_no_growth(mean(ours))
    assert_no_vanishing(mean(ours))


def test_slopes_are_microsoft_mups(name: str, plans: Plans, ours: list[Slopes]) -> None:
    oracle = update_slopes(CASES[name], plans, SEEDS[0], start=with_mup)
    assert ours[0] == pytest.approx(oracle, abs=0.02)


def test_standard_parametrization_is_told_apart(name: str, ours: list[Slopes]) -> None:
    standard = update_slopes(CASES[name], plans_of_extremes(CASES[name], "standard"), SEEDS[0])
    with pytest.raises(AssertionError):
        assert_no_growth(standard)
    for key, slope in standard.items():
        assert slope - ours[0][key] > _least_distance(name, *key), key


def _least_distance(name: str, step: int, activation: str) -> float:
    """How far standard parametrization's slope is above μP's."""
    if name not in NORMED or location_of(activation) == "readout":
        return 0.4
    # After the first step a norm hides most of it. The first convolution reads pixels: no rule distinguishes it.
    reads_pixels = activation.endswith("embedder.embedder.convolution")
    return 0.15 if step == STEPS[0] and not reads_pixels else float("-inf")


# ---- a rule that is not followed -----------------------------------------------------------------------------------


def updates_of_gpt2() -> Slopes:
    return update_slopes(CASES["gpt2"], plans_of_extremes(CASES["gpt2"]), SEEDS[0])


def test_a_learning_rate_without_its_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAM.lr, Role.HIDDEN, ONE)
    with pytest.raises(AssertionError):
        assert_no_growth(updates_of_gpt2())


def test_a_readout_without_its_multiplier_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.MULTIPLIER, Role.OUTPUT, ONE)
    grown = {activation for (_, activation), slope in updates_of_gpt2().items() if slope > GROWTH}
    assert grown == {"readout: lm_head"}


def test_a_learning_rate_that_falls_too_fast_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAM.lr, Role.HIDDEN, Power(r_in=-2))
    with pytest.raises(AssertionError):
        assert_no_vanishing(updates_of_gpt2())


# ---- gradients, and eps that follows them --------------------------------------------------------------------------


def first_gradients(case: Case, plans: Plans, seeds: tuple[int, ...] = SEEDS) -> dict[str, float]:
    return {
        name: slope
        for name, slope in gradient_slopes(case, plans, seeds).items()
        if not name.endswith(HEAD_NORMS) and not (case.family in WITHOUT_ROTARY and name.endswith(KEY_BIASES))
    }


HEAD_NORMS = ("q_norm.weight", "k_norm.weight")
"""All heads share them; at first what the heads say has random signs, so the sum falls as 1/√width."""

KEY_BIASES = ("k_proj.bias", "key.bias")
WITHOUT_ROTARY = {"bert", "vit", "opt"}
"""The same number for all of a query's logits changes nothing in a softmax: the gradient is nothing but rounding."""


def test_eps_follows_the_first_gradient(name: str, plans: Plans) -> None:
    gradients, eps = first_gradients(CASES[name], plans), eps_slopes(plans)
    assert len(gradients) >= 19
    assert {key: eps[key] for key in gradients} == pytest.approx(gradients, abs=0.25)


def test_eps_of_shared_head_norms_follows_after_one_step() -> None:
    plans = plans_of(CASES["qwen3"])
    found = gradient_slopes(CASES["qwen3"], plans, SEEDS, after=1)
    gains = {name: slope for name, slope in found.items() if name.endswith(HEAD_NORMS)}
    assert len(gains) == 4
    assert {name: eps_slopes(plans)[name] for name in gains} == pytest.approx(gains, abs=0.2)


def test_an_eps_that_does_not_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["gpt2, untied"]
    right = plans_of_extremes(case)
    gradients = first_gradients(case, right, SEEDS[:1])
    assert {key: eps_slopes(right)[key] for key in gradients} == pytest.approx(gradients, abs=0.25)
    for role in (Role.INPUT, Role.HIDDEN, Role.OUTPUT):
        with monkeypatch.context() as patched:
            patched.setitem(ADAM.eps, role, ONE)
            eps = eps_slopes(plans_of_extremes(case))
            assert {key: eps[key] for key in gradients} != pytest.approx(gradients, abs=0.25)
