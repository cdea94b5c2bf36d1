"""The rules of μP on one page: what every parameter gets, by its role, relative to the base.

The aim: at any width, what each layer computes, and how much one step of training changes it, keep their size. Then
what is best for one width is best for all.

- A layer sums over its fan_in n inputs. At initialisation the terms are independent and the sum grows as √n, so hidden
  weights start with σ/√r_in.
- A step of Adam moves every weight by about η, and all terms in the direction that helps: coherent, so what it changes
  in the sum grows as n. Hidden weights get η/r_in.
- The readout is trained from the first step on to agree with its input, so its sum is coherent as well: it is
  multiplied by 1/r_in. Through that multiplier its gradient is 1/r_in as large, which Adam does not see: its η stays.
- An embedding is looked up, not summed, and a bias or gain is added or multiplied: nothing grows, nothing changes.
- The gradient of every weight shrinks as its fan_out grows, because each of more outputs matters less. Adam's eps
  stands beside it, and SGD's step is made of it.

                         embedding, bias, gain    hidden             readout
    role                 input                    hidden             output
    init std             σ                        σ / √r_in          σ
    multiplier           α_in                     1                  α_out / r_in
    learning rate, Adam  η                        η / r_in           η
                   SGD   η · r_out                η · r_out / r_in   η · r_in
    eps (Adam)           ε / r_out                ε / r_out          ε / r_in
    weight decay, AdamW  λ                        λ · r_in           λ
                  SGD    λ / r_out                λ · r_in / r_out   λ / r_in
    attention logits: α_attn · √d_base / d instead of 1/√d, since queries and keys become coherent too

At the base r_in = r_out = 1, every factor is 1, and μP is standard parametrization. A tensor's role decides the
factors; its kind (`roles.py`) decides whether it carries α, Megatron's 1/√(2L), or no weight decay.

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

# TP5 App. B.3: eps follows the gradient, |g| ∝ 1/fan_out; the readout's, through its multiplier, ∝ 1/fan_in.
ADAM_EPS: dict[Role, Power] = {
    Role.INPUT: Power(r_out=-1),
    Role.HIDDEN: Power(r_out=-1),
    Role.OUTPUT: Power(r_in=-1),
    Role.SCALAR: ONE,
}

# WA: what keeps η·λ, but for the r_in of hidden weights, which has an exponent of its own: see weight_decay().
WEIGHT_DECAY: dict[Optimizer, dict[Role, Power]] = {
    Optimizer.ADAM: dict.fromkeys(Role, ONE),
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


def carried_init_std(role: Role, r: Ratios, *, std_at_base: float) -> float:
    """The std of a library's own initial draw: what it is at the base, carried to the target by the role's power."""
    return std_at_base * INIT_STD[role](r)


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


def softmax_scale(*, base_head_size: int, head_size: int, alpha: float, stock: float | None = None) -> float:
    """The scale of attention logits, α·√d_base/d: 1/d in the head size (TP5 §5, Def. 4.1), 1/√d at the base's.

    `stock` is what a library uses at the base where that is not 1/√d_base; it then falls as 1/d from there.
    """
    if head_size == base_head_size:
        return alpha * (default_softmax_scale(head_size) if stock is None else stock)
    if stock is not None:
        return alpha * stock * base_head_size / head_size
    return alpha * math.sqrt(base_head_size) / head_size
