"""The rules of μP on one page: what every parameter gets, by its role, relative to the base.

At the base r_in = r_out = 1, every factor below is 1, and μP is standard parametrization.

    r_in   fan_in(target) / fan_in(base) of this tensor if that side grows with width, else 1; r_out likewise
    σ, η, ε, λ, α   init std, learning rate, Adam's epsilon, weight decay and multipliers as tuned at the base

Sources
    TP5   Tensor Programs V, arXiv 2203.03466: Table 8 (with every width taken relative to the base), App. B.3 (eps)
    SC    A Spectral Condition for Feature Learning, arXiv 2310.17813
    WA    How to set AdamW's weight decay as you scale model and dataset size, arXiv 2405.13698
    M     Megatron-Core's own conventions, which hold at any width

This module is tables and small functions on numbers. Which tensor has which role is in `roles.py`; applying the rules
to a whole model is in `plan.py`.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from mup_megatron.theory.roles import Kind, Ratios, Role, default_softmax_scale


class Rule(StrEnum):
    """How hyperparameters follow width."""

    MUP = "mup"
    STANDARD = "standard"
    """Every tensor gets the base's values, whatever its width: the comparison that shows what μP does."""


class Optimizer(StrEnum):
    """The optimizers that the rules cover."""

    ADAM = "adam"
    """AdamW: decoupled weight decay, multiplied by the learning rate as torch and Megatron do; eps outside the root."""
    SGD = "sgd"
    """With or without momentum; coupled weight decay, as torch does."""


@dataclass(frozen=True, slots=True)
class Power:
    """The factor r_in**r_in_power * r_out**r_out_power."""

    r_in: float = 0.0
    r_out: float = 0.0

    def __call__(self, r: Ratios) -> float:
        """The factor at these ratios."""
        return _power(r.r_in, self.r_in) * _power(r.r_out, self.r_out)


def _power(ratio: float, exponent: float) -> float:
    # Division and square root are correctly rounded, ** is not: a ratio of 4 has to give exactly 1/4 and 1/2.
    if exponent == -1:
        return 1.0 / ratio
    if abs(exponent) == 0.5:
        root = math.sqrt(ratio)
        return root if exponent > 0 else 1.0 / root
    return math.pow(ratio, exponent)


ONE = Power()

INIT_STD: dict[Role, Power] = {  # TP5 Table 8: variance 1/fan_in for hidden weights, constant elsewhere
    Role.INPUT: ONE,
    Role.HIDDEN: Power(r_in=-0.5),
    Role.OUTPUT: ONE,
    Role.SCALAR: ONE,
}

MULTIPLIER: dict[Role, Power] = {  # TP5 Table 8: the readout's 1/fan_in
    Role.INPUT: ONE,
    Role.HIDDEN: ONE,
    Role.OUTPUT: Power(r_in=-1),
    Role.SCALAR: ONE,
}

LEARNING_RATE: dict[Optimizer, dict[Role, Power]] = {  # TP5 Table 8
    Optimizer.ADAM: {
        Role.INPUT: ONE,
        Role.HIDDEN: Power(r_in=-1),
        Role.OUTPUT: ONE,
        Role.SCALAR: ONE,
    },
    Optimizer.SGD: {
        Role.INPUT: Power(r_out=1),
        Role.HIDDEN: Power(r_in=-1, r_out=1),
        Role.OUTPUT: Power(r_in=1),
        Role.SCALAR: ONE,
    },
}

ADAM_EPS: dict[Role, Power] = {  # TP5 App. B.3: eps follows the gradient, |g| ∝ 1/fan_out; through its multiplier
    Role.INPUT: Power(r_out=-1),  # the output role's gradient is ∝ 1/fan_in
    Role.HIDDEN: Power(r_out=-1),
    Role.OUTPUT: Power(r_in=-1),
    Role.SCALAR: ONE,
}

WEIGHT_DECAY: dict[Optimizer, dict[Role, Power]] = {  # WA: what keeps η·λ, but for the r_in of hidden weights, which
    Optimizer.ADAM: dict.fromkeys(Role, ONE),  # has an exponent of its own: see weight_decay()
    Optimizer.SGD: {
        Role.INPUT: Power(r_out=-1),
        Role.HIDDEN: Power(r_out=-1),
        Role.OUTPUT: Power(r_in=-1),
        Role.SCALAR: ONE,
    },
}


def init_std(role: Role, kind: Kind, r: Ratios, *, sigma: float, num_layers: int) -> float:
    """The std of the initial draw (TP5 Table 8). `num_layers` is the target's.

    What writes into the residual stream keeps Megatron's further 1/√(2L) (M).
    """
    std = sigma * INIT_STD[role](r)
    return std / math.sqrt(2.0 * num_layers) if kind is Kind.RESIDUAL else std


def multiplier(role: Role, kind: Kind, r: Ratios, *, embedding: float, output: float) -> float:
    """The forward multiplier: α_in for embeddings, α_out/r_in for the readout, 1 elsewhere (TP5 Table 8)."""
    tuned = {Kind.EMBEDDING: embedding, Kind.HEAD: output}.get(kind, 1.0)
    return tuned * MULTIPLIER[role](r)


def learning_rate(role: Role, optimizer: Optimizer, r: Ratios, *, eta: float) -> float:
    """The peak learning rate (TP5 Table 8). The whole schedule, floor and warm-up included, scales with it."""
    return eta * LEARNING_RATE[optimizer][role](r)


def adam_eps(role: Role, r: Ratios, *, epsilon: float) -> float:
    """Adam's epsilon, outside the root (TP5 App. B.3)."""
    return epsilon * ADAM_EPS[role](r)


def weight_decay(role: Role, kind: Kind, optimizer: Optimizer, r: Ratios, *, lam: float, exponent: float) -> float:
    """The weight decay.

    Each step multiplies a weight by 1 - ηλ, so the product ηλ sets the optimizer's averaging timescale (WA). Dividing
    by the learning rate's factor keeps that product for every role; for hidden weights, whose fan_in made
    the factor fall, the compensation is r_in**exponent: 1 (as here and in microsoft/mup's MuAdamW) keeps it, 0 lets it
    fall as 1/r_in. Vectors have none (M).
    """
    if kind.is_vector:
        return 0.0
    compensation = Power(r_in=exponent) if role is Role.HIDDEN else ONE
    return lam * compensation(r) * WEIGHT_DECAY[optimizer][role](r)


def softmax_scale(*, base_head_size: int, head_size: int, alpha: float) -> float:
    """The scale of attention logits, α·√d_base/d: 1/d in the head size (TP5 §5, Def. 4.1), 1/√d at the base's."""
    if head_size == base_head_size:
        return alpha * default_softmax_scale(head_size)
    return alpha * math.sqrt(base_head_size) / head_size
