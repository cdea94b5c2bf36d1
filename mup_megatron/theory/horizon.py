"""The rules of batch and duration on one page: what becomes of the base's values in a run with other batches or tokens.

μP says what follows from size, and nothing of these: `none`. Each other rule moves the base's values, of one run at the
base's size, before any rule of `rules.py` acts. They were measured in different ranges and contradict each other, so
none is taken unless a recipe names it.

                 learning rate    weight decay    eps     1 - β₁, 1 - β₂    holds where
    none         1                1               1       1                 -
    steps        S^-½             S^-½            S^½     S^-1              batches below the critical one
    batch-sde    B^½              B^½             B^-½    B                 small batches, the same tokens
    timescale    1                S^-1            1       1                 it moves weight decay alone
    tokens       D^-exponent      1               1       1                 the same batch, a schedule that decays

    B, D   tokens of a batch, tokens of the run: target's over the base's. S = D / B, the same of steps

Why: a step's gradient is its mean and noise of variance ∝ 1/B. Where the noise is what moves weights, Adam's run of S
times as many steps follows the same stochastic differential equation, in the time that the schedule counts, if the
learning rate falls as √S, moments forget in the same share of the run (1 - β ∝ 1/S) and eps keeps its size relative to
the gradient's noise. AdamW's weights are a mean of their updates over 1/(η·λ) steps, the timescale: S·η·λ = 1 keeps it
the same share of the run in `steps`, `batch-sde` and `timescale`. `tokens` is a fit to best learning rates.

Clipping, initial weights and multipliers are moved by none of them; the floor of a schedule is as its peak.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mup_megatron.theory.errors import PlanError
from mup_megatron.theory.optimizers import Optimizer, power

__all__ = ["HORIZON_RULES", "Factors", "HorizonRule", "Ratios"]

_ALIKE = 0.01
"""Ratios of batches and tokens that are 1 within this are the same: a run has whole steps."""
_NO_BETA = 1e-9
"""Of what is 0 but for rounding."""
_LEARNING_RATES = ("lr", "min_lr")
_WEIGHT_DECAYS = ("weight_decay",)
_EPSES = ("adam_eps",)
_BETAS = ("adam_beta1", "adam_beta2")


@dataclass(frozen=True, slots=True)
class Ratios:
    """The target's run over the base's."""

    batch: float
    """Of tokens in a batch."""
    tokens: float
    """Of tokens in the run."""

    @property
    def steps(self) -> float:
        """Returns the ratio of numbers of steps."""
        return self.tokens / self.batch

    @property
    def inverse(self) -> "Ratios":
        """Returns the base's run over the target's."""
        return Ratios(1.0 / self.batch, 1.0 / self.tokens)


@dataclass(frozen=True, slots=True)
class Power:
    """The factor S**steps · B**batch · D**tokens."""

    steps: float = 0.0
    batch: float = 0.0
    tokens: float = 0.0

    def __call__(self, r: Ratios) -> float:
        """Returns the factor at these ratios."""
        return power(r.steps, self.steps) * power(r.batch, self.batch) * power(r.tokens, self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The numbers by which a rule multiplies the base's values."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    forgetting: float = 1.0
    """Of 1 - β₁ and 1 - β₂."""

    def moved(self, values: Mapping[str, float]) -> dict[str, float]:
        """Returns those of a recipe's hyperparameters that these factors are of, moved.

        Raises:
            PlanError: a beta would not be above 0.
        """
        of_keys = {_LEARNING_RATES: self.lr, _WEIGHT_DECAYS: self.weight_decay, _EPSES: self.eps}
        found = {key: values[key] * factor for keys, factor in of_keys.items() for key in keys if key in values}
        return found | {key: self._beta(key, values[key]) for key in _BETAS if key in values}

    def _beta(self, key: str, beta: float) -> float:
        # Not 1 - (1 - β), which need not be β.
        moved = beta if self.forgetting == 1.0 else 1.0 - (1.0 - beta) * self.forgetting
        if moved < _NO_BETA and self.forgetting != 1.0:
            raise PlanError(
                f"{key} {beta:g} would become {round(moved, 6):g}, as 1 - β is multiplied by {self.forgetting:.4g}: "
                "the batch grows too much for this rule. Take a smaller batch, or rule: timescale."
            )
        return moved


@dataclass(frozen=True, kw_only=True)
class HorizonRule:
    """A way in which the base's values follow batch and tokens."""

    name: str
    """As in a recipe's `horizon.rule`."""
    lr: Power = Power()
    weight_decay: Power = Power()
    """Of AdamW's, which is multiplied by the learning rate."""
    eps: Power = Power()
    forgetting: Power = Power()
    """Of 1 - β₁ and 1 - β₂."""
    source: str
    range: str
    """Where it was derived or measured."""
    same_batch: bool = False
    same_tokens: bool = False
    decays: bool = False
    """Whether it is known only for schedules that decay over the whole run."""
    exponent: float | None = None
    """The one that a recipe may say otherwise, if there is one: by which the learning rate falls with the tokens."""

    @property
    def moves(self) -> bool:
        """Returns whether it changes anything at all."""
        return any(each != Power() for each in (self.lr, self.weight_decay, self.eps, self.forgetting))

    def with_exponent(self, exponent: float) -> "HorizonRule":
        """Returns the rule with another exponent.

        Raises:
            PlanError: it has none.
        """
        if self.exponent is None:
            raise PlanError(f"exponent: the rule {self.name} has none that could be chosen. Take it out.")
        return replace(self, exponent=exponent, lr=Power(tokens=-exponent))

    def factors(self, r: Ratios, optimizers: Sequence[Optimizer]) -> Factors:
        """Returns by what the base's values are multiplied in a run of such batches and tokens.

        Args:
            r: the target's run over the base's.
            optimizers: the recipe's, with those that it leaves some tensors to.

        Raises:
            PlanError: it is not known for one of these, or not for these batches and tokens.
        """
        if not self.moves:
            return Factors()
        for optimizer in optimizers:
            if self.name not in optimizer.horizons:
                raise PlanError(
                    f"the rule {self.name} is not known for {optimizer.title}. Write rule: none, and tune at the "
                    "batch and length of the target's run."
                )
        for same, ratio, what in (
            (self.same_batch, r.batch, "batch"),
            (self.same_tokens, r.tokens, "number of tokens"),
        ):
            if same and not math.isclose(ratio, 1.0, rel_tol=_ALIKE):
                raise PlanError(
                    f"the rule {self.name} is for the same {what}, and the target's is {ratio:.4g} times the tuning's. "
                    f"Choose another rule, as steps, or the same {what}."
                )
        return self.at(r)

    def at(self, r: Ratios) -> Factors:
        """Returns the same without asking whether it is known for them."""
        return Factors(lr=self.lr(r), weight_decay=self.weight_decay(r), eps=self.eps(r), forgetting=self.forgetting(r))


NONE = HorizonRule(
    name="none",
    source="Tensor Programs V, arXiv 2203.03466",
    range="μP's own statement: nothing follows from batch and tokens. The run is said, and compared.",
)

STEPS = HorizonRule(
    name="steps",
    lr=Power(steps=-0.5),
    weight_decay=Power(steps=-0.5),
    eps=Power(steps=0.5),
    forgetting=Power(steps=-1),
    source="Complete(d)P, arXiv 2512.22382",
    range="Batches below the critical one; measured with cosine schedules on RedPajama, up to 7B parameters.",
)

# The scaling rule for Adam there, which says nothing of weight decay: that keeps η·λ·steps, as `timescale` does.
BATCH_SDE = HorizonRule(
    name="batch-sde",
    lr=Power(batch=0.5),
    weight_decay=Power(batch=0.5),
    eps=Power(batch=-0.5),
    forgetting=Power(batch=1),
    source="On the SDEs and scaling rules for adaptive gradient algorithms, arXiv 2205.10287",
    range="Batches so small that noise outweighs the gradient, at the same number of tokens.",
    same_tokens=True,
)

TIMESCALE = HorizonRule(
    name="timescale",
    weight_decay=Power(steps=-1),
    source="How to set AdamW's weight decay, arXiv 2405.13698; Power Lines, arXiv 2505.13738",
    range="Weight decay alone, at the learning rate as tuned; the batch below the critical one.",
)

TOKENS = HorizonRule(
    name="tokens",
    lr=Power(tokens=-0.32),
    source="Scaling optimal LR across token horizons, arXiv 2409.19913; likewise 2603.28743, and 0.28 to 0.3 elsewhere",
    range="A fit at a fixed batch to runs that decay to their end.",
    same_batch=True,
    decays=True,
    exponent=0.32,
)

HORIZON_RULES: Mapping[str, HorizonRule] = {rule.name: rule for rule in (NONE, STEPS, BATCH_SDE, TIMESCALE, TOKENS)}
"""Every rule, by its name in a recipe."""
