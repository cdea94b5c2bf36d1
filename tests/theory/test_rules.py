"""The table of μP, role by role, written out from its source and held against the implementation.

Source: Tensor Programs V (arXiv 2203.03466), Table 8 and App. B.3, each width relative to the base's; weight decay by
Wang & Aitchison (arXiv 2405.13698), which wants η·λ of every weight to stay what it is at the base.
"""

import math
from collections.abc import Callable

import pytest

from mup_megatron.theory import ADAM, SGD, Optimizer, Property, Role, Scaling, Sizes, rules

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
MULTIPLIER: dict[tuple[Role, Property | None], Entry] = {
    (Role.INPUT, Property.EMBEDDING): lambda i, o: ALPHA_IN,
    (Role.INPUT, Property.VECTOR): lambda i, o: 1.0,
    (Role.HIDDEN, None): lambda i, o: 1.0,
    (Role.HIDDEN, Property.RESIDUAL): lambda i, o: 1.0,
    (Role.HIDDEN, Property.EXPERT): lambda i, o: 1.0,
    (Role.OUTPUT, Property.READOUT): lambda i, o: ALPHA_OUT / i,
    (Role.OUTPUT, None): lambda i, o: 1.0 / i,
    (Role.SCALAR, Property.GAIN): lambda i, o: 1.0,
}
WEIGHT: frozenset[Property] = frozenset()

# Powers of 4, where roots and quotients are exact: equality is bitwise.
EXACT = [(1.0, 1.0), (4.0, 1.0), (1.0, 4.0), (4.0, 16.0), (0.25, 4.0)]
ROUNDED = [(3.0, 5.0), (1.7, 1 / 3)]


def _at(role: Role, i: float, o: float, layers: int = 7) -> Scaling:
    return Scaling(
        Sizes(1, i, grows=role in (Role.HIDDEN, Role.OUTPUT)),
        Sizes(1, o, grows=role in (Role.HIDDEN, Role.INPUT)),
        Sizes(4, 2 * layers),
    )


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(("i", "o"), EXACT + ROUNDED)
def test_table_8(role: Role, i: float, o: float) -> None:
    s = _at(role, i, o)

    def expected(table: dict[Role, Entry]) -> object:
        value = table[role](s.r_in, s.r_out)
        return value if (i, o) == (1.0, 1.0) else pytest.approx(value, rel=2**-51, abs=0)

    assert rules.init_std(role, WEIGHT, s, sigma=SIGMA) == expected(INIT_STD)
    assert ADAM.learning_rate(role, s, eta=ETA) == expected(ADAM_LR)
    assert SGD.learning_rate(role, s, eta=ETA) == expected(SGD_LR)
    assert ADAM.epsilon(role, s, eps=EPSILON) == expected(ADAM_EPS)
    for optimizer, table in ((ADAM, ADAM_WEIGHT_DECAY), (SGD, SGD_WEIGHT_DECAY)):
        assert optimizer.decayed(role, s, lam=LAMBDA, exponent=1.0) == expected(table)
    assert SGD.epsilon(role, s, eps=EPSILON) is None


@pytest.mark.parametrize(("role", "own"), MULTIPLIER)
@pytest.mark.parametrize(("i", "o"), EXACT + ROUNDED)
def test_multipliers(role: Role, own: Property | None, i: float, o: float) -> None:
    s = _at(role, i, o)
    expected = MULTIPLIER[role, own](s.r_in, s.r_out)
    properties = WEIGHT if own is None else frozenset({own})
    multiplier = rules.multiplier(role, properties, s, embedding=ALPHA_IN, output=ALPHA_OUT)
    assert multiplier == pytest.approx(expected, rel=2**-51, abs=0)


@pytest.mark.parametrize(("i", "o"), EXACT)
def test_powers_of_four_are_exact(i: float, o: float) -> None:
    # So that the distances between widths that are 4 times one another carry no rounding.
    hidden = _at(Role.HIDDEN, i, o)
    assert rules.init_std(Role.HIDDEN, WEIGHT, hidden, sigma=1.0) == 1 / math.sqrt(i)
    assert ADAM.learning_rate(Role.HIDDEN, hidden, eta=1.0) == 1 / i
    assert ADAM.epsilon(Role.HIDDEN, hidden, eps=1.0) == 1 / o


def test_residual_outputs_keep_megatrons_factor_of_depth() -> None:
    s = _at(Role.HIDDEN, 4.0, 4.0, layers=8)
    for properties in ({Property.RESIDUAL}, {Property.RESIDUAL, Property.EXPERT}):
        std = rules.init_std(Role.HIDDEN, frozenset(properties), s, sigma=SIGMA)
        assert std == SIGMA / 2 / math.sqrt(2 * 8)


@pytest.mark.parametrize(("exponent", "factor"), [(1.0, 16.0), (0.5, 4.0), (0.0, 1.0), (0.25, 2.0)])
def test_the_exponent_of_weight_decay_is_that_of_hidden_weights_alone(exponent: float, factor: float) -> None:
    def decay(role: Role) -> float:
        return ADAM.decayed(role, _at(role, 16, 16), lam=LAMBDA, exponent=exponent)

    assert {role: decay(role) for role in Role} == dict.fromkeys(Role, LAMBDA) | {Role.HIDDEN: LAMBDA * factor}


@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=lambda optimizer: optimizer.name)
@pytest.mark.parametrize("role", list(Role))
def test_with_exponent_one_every_weight_keeps_its_product_of_lr_and_decay(role: Role, optimizer: Optimizer) -> None:
    s = _at(role, 3.0, 5.0)
    lr = optimizer.learning_rate(role, s, eta=ETA)
    decay = optimizer.decayed(role, s, lam=LAMBDA, exponent=1.0)
    assert lr * decay == pytest.approx(ETA * LAMBDA, rel=1e-15)


def test_attention_logits_are_scaled_by_one_over_the_head_size() -> None:
    def scale(size: int, alpha: float = 1.0) -> float:
        return rules.softmax_scale(base_head_size=64, head_size=size, alpha=alpha)

    # Bitwise Megatron's own expression at the base's head size: an unchanged scale stays unset.
    assert scale(64) == 1.0 / math.sqrt(64)
    assert rules.softmax_scale(base_head_size=80, head_size=80, alpha=1.0) == 1.0 / math.sqrt(80)
    assert scale(128) == 8 / 128
    assert scale(256) == 8 / 256
    assert scale(256, alpha=3.0) == 3 * 8 / 256
