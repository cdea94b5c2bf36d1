"""The table of μP, role by role, written out from its source and held against the implementation.

Source: Tensor Programs V (arXiv 2203.03466), Table 8 and App. B.3, each width relative to the base's; weight decay by
Wang & Aitchison (arXiv 2405.13698), which wants η·λ of every weight to stay what it is at the base.
"""

import math
from collections.abc import Callable

import pytest
from mup_megatron.theory.roles import Ratios

from mup_megatron.theory import Kind, Optimizer, Role, rules

SIGMA, ETA, EPSILON, LAMBDA = 0.05, 0.006, 1e-8, 0.1
ALPHA_IN, ALPHA_OUT = 10.0, 3.0

Entry = Callable[[float, float], float]

# role → what it gets at ratios (r_in, r_out). A role whose side is finite has ratio 1 there.
INIT_STD: dict[Role, Entry] = {
    Role.INPUT: lambda i, o: SIGMA,
    Role.HIDDEN: lambda i, o: SIGMA / math.sqrt(i),
    Role.OUTPUT: lambda i, o: SIGMA,
    Role.SCALAR: lambda i, o: SIGMA,
}
ADAM_LR: dict[Role, Entry] = {
    Role.INPUT: lambda i, o: ETA,
    Role.HIDDEN: lambda i, o: ETA / i,
    Role.OUTPUT: lambda i, o: ETA,
    Role.SCALAR: lambda i, o: ETA,
}
SGD_LR: dict[Role, Entry] = {
    Role.INPUT: lambda i, o: ETA * o,
    Role.HIDDEN: lambda i, o: ETA * o / i,
    Role.OUTPUT: lambda i, o: ETA * i,
    Role.SCALAR: lambda i, o: ETA,
}
ADAM_EPS: dict[Role, Entry] = {
    Role.INPUT: lambda i, o: EPSILON / o,
    Role.HIDDEN: lambda i, o: EPSILON / o,
    Role.OUTPUT: lambda i, o: EPSILON / i,
    Role.SCALAR: lambda i, o: EPSILON,
}
ADAM_WEIGHT_DECAY: dict[Role, Entry] = {
    Role.INPUT: lambda i, o: LAMBDA,
    Role.HIDDEN: lambda i, o: LAMBDA * i,
    Role.OUTPUT: lambda i, o: LAMBDA,
    Role.SCALAR: lambda i, o: LAMBDA,
}
SGD_WEIGHT_DECAY: dict[Role, Entry] = {
    Role.INPUT: lambda i, o: LAMBDA / o,
    Role.HIDDEN: lambda i, o: LAMBDA * i / o,
    Role.OUTPUT: lambda i, o: LAMBDA / i,
    Role.SCALAR: lambda i, o: LAMBDA,
}
MULTIPLIER: dict[tuple[Role, Kind], Entry] = {
    (Role.INPUT, Kind.EMBEDDING): lambda i, o: ALPHA_IN,
    (Role.INPUT, Kind.BIAS): lambda i, o: 1.0,
    (Role.HIDDEN, Kind.WEIGHT): lambda i, o: 1.0,
    (Role.HIDDEN, Kind.RESIDUAL): lambda i, o: 1.0,
    (Role.OUTPUT, Kind.HEAD): lambda i, o: ALPHA_OUT / i,
    (Role.OUTPUT, Kind.WEIGHT): lambda i, o: 1.0 / i,
    (Role.SCALAR, Kind.GAIN): lambda i, o: 1.0,
}

# Powers of 4, where roots and quotients are exact: equality is bitwise.
EXACT = [(1.0, 1.0), (4.0, 1.0), (1.0, 4.0), (4.0, 16.0), (0.25, 4.0)]
ROUNDED = [(3.0, 5.0), (1.7, 1 / 3)]


def _at(role: Role, i: float, o: float) -> Ratios:
    return Ratios(
        i if role in (Role.HIDDEN, Role.OUTPUT) else 1.0,
        o if role in (Role.HIDDEN, Role.INPUT) else 1.0,
    )


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(("i", "o"), EXACT + ROUNDED)
def test_table_8(role: Role, i: float, o: float) -> None:
    r = _at(role, i, o)

    def expected(table: dict[Role, Entry]) -> object:
        value = table[role](r.r_in, r.r_out)
        return value if (i, o) == (1.0, 1.0) else pytest.approx(value, rel=2**-51, abs=0)

    assert rules.init_std(role, Kind.WEIGHT, r, sigma=SIGMA, num_layers=7) == expected(INIT_STD)
    assert rules.learning_rate(role, Optimizer.ADAM, r, eta=ETA) == expected(ADAM_LR)
    assert rules.learning_rate(role, Optimizer.SGD, r, eta=ETA) == expected(SGD_LR)
    assert rules.adam_eps(role, r, epsilon=EPSILON) == expected(ADAM_EPS)
    for optimizer, table in ((Optimizer.ADAM, ADAM_WEIGHT_DECAY), (Optimizer.SGD, SGD_WEIGHT_DECAY)):
        decay = rules.weight_decay(role, Kind.WEIGHT, optimizer, r, lam=LAMBDA, exponent=1.0)
        assert decay == expected(table)


@pytest.mark.parametrize(("role", "kind"), MULTIPLIER)
@pytest.mark.parametrize(("i", "o"), EXACT + ROUNDED)
def test_multipliers(role: Role, kind: Kind, i: float, o: float) -> None:
    r = _at(role, i, o)
    expected = MULTIPLIER[role, kind](r.r_in, r.r_out)
    multiplier = rules.multiplier(role, kind, r, embedding=ALPHA_IN, output=ALPHA_OUT)
    assert multiplier == pytest.approx(expected, rel=2**-51, abs=0)


@pytest.mark.parametrize(("i", "o"), EXACT)
def test_powers_of_four_are_exact(i: float, o: float) -> None:
    # So that the distances between widths that are 4 times one another carry no rounding.
    hidden = Ratios(i, o)
    assert rules.init_std(Role.HIDDEN, Kind.WEIGHT, hidden, sigma=1.0, num_layers=1) == 1 / math.sqrt(i)
    assert rules.learning_rate(Role.HIDDEN, Optimizer.ADAM, hidden, eta=1.0) == 1 / i
    assert rules.adam_eps(Role.HIDDEN, hidden, epsilon=1.0) == 1 / o


def test_residual_outputs_keep_megatrons_factor_of_depth() -> None:
    r = Ratios(4.0, 4.0)
    std = rules.init_std(Role.HIDDEN, Kind.RESIDUAL, r, sigma=SIGMA, num_layers=8)
    assert std == SIGMA / 2 / math.sqrt(2 * 8)


@pytest.mark.parametrize(("exponent", "factor"), [(1.0, 16.0), (0.5, 4.0), (0.0, 1.0), (0.25, 2.0)])
def test_the_exponent_of_weight_decay_is_that_of_hidden_weights_alone(exponent: float, factor: float) -> None:
    def decay(role: Role) -> float:
        return rules.weight_decay(role, Kind.WEIGHT, Optimizer.ADAM, _at(role, 16, 16), lam=LAMBDA, exponent=exponent)

    assert {role: decay(role) for role in Role} == dict.fromkeys(Role, LAMBDA) | {Role.HIDDEN: LAMBDA * factor}


@pytest.mark.parametrize("optimizer", list(Optimizer))
@pytest.mark.parametrize("role", list(Role))
def test_with_exponent_one_every_weight_keeps_its_product_of_lr_and_decay(role: Role, optimizer: Optimizer) -> None:
    r = _at(role, 3.0, 5.0)
    lr = rules.learning_rate(role, optimizer, r, eta=ETA)
    decay = rules.weight_decay(role, Kind.WEIGHT, optimizer, r, lam=LAMBDA, exponent=1.0)
    assert lr * decay == pytest.approx(ETA * LAMBDA, rel=1e-15)


@pytest.mark.parametrize("kind", [Kind.BIAS, Kind.GAIN])
@pytest.mark.parametrize("optimizer", list(Optimizer))
def test_vectors_have_no_weight_decay(kind: Kind, optimizer: Optimizer) -> None:
    for role in (Role.INPUT, Role.SCALAR):
        assert rules.weight_decay(role, kind, optimizer, _at(role, 1, 4), lam=LAMBDA, exponent=1.0) == 0.0


def test_attention_logits_are_scaled_by_one_over_the_head_size() -> None:
    def scale(size: int, alpha: float = 1.0) -> float:
        return rules.softmax_scale(base_head_size=64, head_size=size, alpha=alpha)

    # Bitwise Megatron's own expression at the base's head size: an unchanged scale stays unset.
    assert scale(64) == 1.0 / math.sqrt(64)
    assert rules.softmax_scale(base_head_size=80, head_size=80, alpha=1.0) == 1.0 / math.sqrt(80)
    assert scale(128) == 8 / 128
    assert scale(256) == 8 / 256
    assert scale(256, alpha=3.0) == 3 * 8 / 256
