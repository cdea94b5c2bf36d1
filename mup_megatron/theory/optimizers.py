"""The optimizers that the rules cover, each as one object: learning rate, eps, weight decay, and how it folds.

The table of all of them, and the sources, are in `rules.py`. To add one, write its tables and call `register`; what
frameworks call it is registered with each adapter.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mup_megatron.theory.errors import PlanError
from mup_megatron.theory.tensors import Role, Tensor
from mup_megatron.theory.widths import Scaling

__all__ = ["ADAM", "EVERYWHERE", "ONE", "SGD", "Factor", "Optimizer", "Power", "optimizers", "register"]

Factor = Callable[[Scaling], float]
"""A factor of a value, from the sizes at base and target."""


@dataclass(frozen=True, slots=True)
class Power:
    """The factor r_in**r_in_power * r_out**r_out_power."""

    r_in: float = 0.0
    r_out: float = 0.0

    def __call__(self, s: Scaling) -> float:
        """Returns the factor at these sizes."""
        return power(s.r_in, self.r_in) * power(s.r_out, self.r_out)


def power(ratio: float, exponent: float) -> float:
    """Returns ratio**exponent, exact where the exponent is one of the rules'."""
    # Division and square root are correctly rounded, ** is not: a ratio of 4 has to give exactly 1/4 and 1/2.
    if exponent == -1:
        return 1.0 / ratio
    if abs(exponent) == 0.5:
        root = math.sqrt(ratio)
        return root if exponent > 0 else 1.0 / root
    return math.pow(ratio, exponent)


ONE = Power()
"""The factor 1."""
EVERYWHERE: Mapping[Role, Factor] = dict.fromkeys(Role, ONE)
"""The factor 1 for every role."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer's rules: factors of every value of a parameter, by its role, relative to the base."""

    name: str
    """As in a recipe's `parametrization.optimizer`."""
    title: str
    """As people write it."""
    hyperparameters: tuple[str, ...]
    """The keys of a recipe that it reads and that not every optimizer does."""
    lr: Mapping[Role, Factor]
    """Of the peak; the whole schedule, floor and warm-up included, scales with it."""
    eps: Mapping[Role, Factor] | None
    """None where the optimizer has none."""
    weight_decay: Mapping[Role, Factor]
    """But for the r_in of hidden weights, which has an exponent of its own: see `decayed`."""
    step: int
    """How its step grows with the gradient's size: 0 for those that divide by it, 1 for those that are made of it."""
    bottlenecks: bool = True
    """Whether its rules hold for a bottleneck that all tokens pass, a hidden tensor whose output keeps its size."""
    others: "tuple[Optimizer, ...]" = ()
    """Those that it leaves some tensors to."""
    routes: "Callable[[Tensor], Optimizer] | None" = None
    """Which of these or itself steps a tensor; None where it leaves none."""

    def learning_rate(self, role: Role, s: Scaling, *, eta: float) -> float:
        """Returns the learning rate of a tensor whose base value is `eta`."""
        return eta * self.lr[role](s)

    def epsilon(self, role: Role, s: Scaling, *, eps: float) -> float | None:
        """Returns the eps of a tensor whose base value is `eps`; None for an optimizer without.

        It follows the gradient, which is a sum over the tokens that the tensor sees: an expert's falls as its share.
        """
        return None if self.eps is None else eps * self.eps[role](s) * s.share.ratio

    def decayed(self, role: Role, s: Scaling, *, lam: float, exponent: float) -> float:
        """Returns the weight decay of a matrix whose base value is `lam`.

        Each step multiplies a weight by 1 - ηλ, so the product ηλ sets the optimizer's averaging timescale (WA).
        Dividing by the learning rate's factor keeps that product for every role; for hidden weights, whose fan_in made
        the factor fall, the compensation is r_in**exponent: 1 (as here and in microsoft/mup's MuAdamW) keeps it, 0 lets
        it fall as 1/r_in.
        """
        compensation = Power(r_in=exponent) if role is Role.HIDDEN else ONE
        return lam * compensation(s) * self.weight_decay[role](s)

    def folded(self, theta: float) -> float:
        """Returns c in (LR · c, weight decay / c, eps / θ), by which a weight that holds a multiplier θ trains alike.

        Source: TP5, Lemma J.1 (abc-symmetry).
        """
        return theta * theta**self.step

    def for_tensor(self, tensor: Tensor) -> "Optimizer":
        """Returns the optimizer that steps a tensor where a recipe names this one: itself, unless it says otherwise.

        Raises:
            PlanError: it routes to an optimizer that is not among its `others`.
        """
        if self.routes is None:
            return self
        chosen = self.routes(tensor)
        if chosen.name not in {self.name, *(each.name for each in self.others)}:
            raise PlanError(f"{self.name}: it leaves {tensor.name} to {chosen.name}. Add that to its `others`.")
        return chosen


ADAM = Optimizer(
    name="adam",
    title="Adam",
    hyperparameters=("adam_beta1", "adam_beta2", "adam_eps"),
    lr={  # TP5 Table 8
        Role.INPUT: ONE,
        Role.HIDDEN: Power(r_in=-1),
        Role.OUTPUT: ONE,
        Role.SCALAR: ONE,
    },
    # TP5 App. B.3: eps follows the gradient, |g| ∝ 1/fan_out; the readout's, through its multiplier, ∝ 1/fan_in.
    eps={
        Role.INPUT: Power(r_out=-1),
        Role.HIDDEN: Power(r_out=-1),
        Role.OUTPUT: Power(r_in=-1),
        Role.SCALAR: ONE,
    },
    weight_decay=EVERYWHERE,
    step=0,
)
"""Decoupled weight decay, multiplied by the learning rate as torch and Megatron do; eps outside the root."""

SGD = Optimizer(
    name="sgd",
    title="SGD",
    hyperparameters=("sgd_momentum",),
    lr={  # TP5 Table 8
        Role.INPUT: Power(r_out=1),
        Role.HIDDEN: Power(r_in=-1, r_out=1),
        Role.OUTPUT: Power(r_in=1),
        Role.SCALAR: ONE,
    },
    eps=None,
    weight_decay={  # WA: keeps η·λ
        Role.INPUT: Power(r_out=-1),
        Role.HIDDEN: Power(r_out=-1),
        Role.OUTPUT: Power(r_in=-1),
        Role.SCALAR: ONE,
    },
    step=1,
    # Measured on latents of a fixed rank: their updates fall as r_in^-0.6 under this rule for hidden tensors.
    bottlenecks=False,
)
"""With or without momentum; coupled weight decay, as torch does."""

_OPTIMIZERS: dict[str, Optimizer] = {}


def register(optimizer: Optimizer) -> None:
    """Makes an optimizer known under its name.

    Raises:
        PlanError: there is one of this name, or a table lacks a role.
    """
    if optimizer.name in _OPTIMIZERS:
        raise PlanError(f"{optimizer.name}: an optimizer of this name is registered already. Choose another.")
    tables = {"lr": optimizer.lr, "eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
    for key, table in tables.items():
        if table is not None and (missing := set(Role) - set(table)):
            raise PlanError(f"{optimizer.name}: its {key} says nothing of the role {min(missing)}. Add it.")
    _OPTIMIZERS[optimizer.name] = optimizer


def optimizers() -> Mapping[str, Optimizer]:
    """Returns every optimizer that the rules cover, by its name in a recipe."""
    return _OPTIMIZERS


for _each in (ADAM, SGD):
    register(_each)
