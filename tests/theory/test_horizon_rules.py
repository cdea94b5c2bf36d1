"""Rules of batch and duration: each factor against its paper's table, worked out by hand, and what each refuses."""

from collections.abc import Mapping

import pytest

from mup_megatron.theory import ADAM, HORIZON_RULES, SGD, Factors, PlanError, Ratios

TUNED = {"lr": 0.004, "min_lr": 0.0004, "weight_decay": 0.1, "adam_eps": 1e-8, "adam_beta1": 0.9, "adam_beta2": 0.96}

# Four times the batch, 16 times the tokens, so 4 times the steps.
LONGER = Ratios(batch=4, tokens=16)
LARGER = Ratios(batch=4, tokens=1)

# 16^-0.32 = 2^-1.28 = 0.4117955; 16^-0.5 = 0.25.
BY_HAND: Mapping[str, tuple[str, float | None, Ratios, dict[str, float]]] = {
    "none": ("none", None, LONGER, TUNED),
    "Complete(d)P, batch and tokens": (
        "steps",
        None,
        LONGER,
        {
            "lr": 0.002,
            "min_lr": 0.0002,
            "weight_decay": 0.05,
            "adam_eps": 2e-8,
            "adam_beta1": 0.975,
            "adam_beta2": 0.99,
        },
    ),
    "Complete(d)P, tokens alone": (
        "steps",
        None,
        Ratios(batch=1, tokens=16),
        {
            "lr": 0.001,
            "min_lr": 0.0001,
            "weight_decay": 0.025,
            "adam_eps": 4e-8,
            "adam_beta1": 0.99375,
            "adam_beta2": 0.9975,
        },
    ),
    "Malladi": (
        "batch-sde",
        None,
        LARGER,
        {
            "lr": 0.008,
            "min_lr": 0.0008,
            "weight_decay": 0.2,
            "adam_eps": 5e-9,
            "adam_beta1": 0.6,
            "adam_beta2": 0.84,
        },
    ),
    "timescale": ("timescale", None, LONGER, {**TUNED, "weight_decay": 0.025}),
    "timescale, batch alone": ("timescale", None, LARGER, {**TUNED, "weight_decay": 0.4}),
    "tokens": (
        "tokens",
        None,
        Ratios(batch=1, tokens=16),
        {**TUNED, "lr": 0.004 * 0.4117955, "min_lr": 0.0004 * 0.4117955},
    ),
    "tokens, another exponent": (
        "tokens",
        0.5,
        Ratios(batch=1, tokens=16),
        {**TUNED, "lr": 0.001, "min_lr": 0.0001},
    ),
}


def _factors(name: str, r: Ratios, exponent: float | None = None) -> Factors:
    rule = HORIZON_RULES[name]
    return (rule if exponent is None else rule.with_exponent(exponent)).factors(r, [ADAM])


@pytest.mark.parametrize("case", BY_HAND)
def test_what_a_rule_makes_of_the_bases_values(case: str) -> None:
    name, exponent, ratios, expected = BY_HAND[case]

    assert _factors(name, ratios, exponent).moved(TUNED) == pytest.approx(expected, rel=1e-6)


def test_every_rule_is_worked_out_and_says_where_it_is_from() -> None:
    assert {name for name, *_ in BY_HAND.values()} == set(HORIZON_RULES)
    assert all(name == rule.name for name, rule in HORIZON_RULES.items())
    assert all("arXiv" in rule.source and rule.range.endswith(".") for rule in HORIZON_RULES.values())


@pytest.mark.parametrize("name", HORIZON_RULES)
def test_the_same_run_changes_no_bit(name: str) -> None:
    odd = {key: value / 3 for key, value in TUNED.items()}

    assert _factors(name, Ratios(batch=1, tokens=1)).moved(odd) == odd


@pytest.mark.parametrize("batch", [0.25, 2.0, 3.0])
def test_at_the_same_tokens_the_rule_of_steps_is_that_of_the_batch(batch: float) -> None:
    same = Ratios(batch=batch, tokens=1)
    left, right = _factors("steps", same), _factors("batch-sde", same)

    assert (left.lr, left.weight_decay, left.eps, left.forgetting) == pytest.approx(
        (right.lr, right.weight_decay, right.eps, right.forgetting)
    )


@pytest.mark.parametrize(
    ("name", "ratios"), [("steps", LONGER), ("timescale", LONGER), ("batch-sde", LARGER), ("timescale", LARGER)]
)
def test_weights_forget_in_the_same_share_of_the_run(name: str, ratios: Ratios) -> None:
    factors = _factors(name, ratios)

    assert factors.lr * factors.weight_decay * ratios.steps == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["steps", "timescale"])
def test_the_way_back_undoes_it(name: str) -> None:
    moved = _factors(name, LONGER).moved(TUNED)

    assert _factors(name, LONGER.inverse).moved(moved) == pytest.approx(TUNED, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "ratios", "said"),
    [
        ("batch-sde", LONGER, "the rule batch-sde is for the same number of tokens, and the target's is 16 times"),
        ("tokens", LONGER, "the rule tokens is for the same batch, and the target's is 4 times"),
    ],
)
def test_what_a_rule_says_nothing_of_is_refused(name: str, ratios: Ratios, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        _factors(name, ratios)


def test_a_run_of_whole_steps_is_as_long_as_one_that_is_not() -> None:
    # 333 steps of 96 sequences instead of 1000 of 32.
    factors = _factors("batch-sde", Ratios(batch=3, tokens=31968 / 32000))

    assert factors.forgetting == 3


@pytest.mark.parametrize(("batch", "beta"), [(10, "adam_beta1 0.9 would become 0"), (16, "would become -0.6")])
def test_a_beta_is_above_0(batch: float, beta: str) -> None:
    with pytest.raises(PlanError, match=beta):
        _factors("steps", Ratios(batch=batch, tokens=1)).moved(TUNED)


def test_a_base_without_momentum_may_train_as_long() -> None:
    assert Factors(lr=2.0).moved({"adam_beta1": 0.0}) == {"adam_beta1": 0.0}


@pytest.mark.parametrize("name", [name for name in HORIZON_RULES if name != "none"])
def test_an_optimizer_that_says_nothing_of_a_rule_is_refused_by_its_title(name: str) -> None:
    rule = HORIZON_RULES[name]

    with pytest.raises(PlanError, match=f"the rule {name} is not known for SGD"):
        rule.factors(Ratios(1, 1), [SGD])
    with pytest.raises(PlanError, match="not known for SGD"):
        rule.factors(Ratios(1, 1), [ADAM, SGD])  # that it leaves some tensors to
    assert HORIZON_RULES["none"].factors(LONGER, [SGD]) == Factors()


def test_an_exponent_is_of_one_rule() -> None:
    with pytest.raises(PlanError, match="the rule steps has none"):
        HORIZON_RULES["steps"].with_exponent(0.3)
