"""Wider is better: at every time of training, a wider model has no higher a training loss than a narrower one.

In μP that holds throughout training, where the same hyperparameters are used at all widths (TP5, Section 8, "Wider is
better"). Where a wider model is worse, its width rules are wrong, or its learning rate is too high for every width.
Plain numbers; judges no model that has diverged, which is found before.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from mup_megatron.check.measure.measurements import Measurements
from mup_megatron.check.verdict.comparison import t_quantile

AROUND = 2
"""Steps on either side of a time over which a loss is averaged: one batch is harder than another."""
TOLERANCE = 0.01
"""Relative. Two widths near the limit learn alike, and a loss that is still falling fast differs by what one step in a
hundred makes; a rule that is off by √2 per octave costs several times that."""
FALSE_ALARMS = 0.01
"""How often at most equal widths are called worse, over all comparisons together."""
LEAST_SPREAD = 0.002
"""Of log loss: seeds that agree by chance do not make every difference significant."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two neighbouring widths at one time."""

    narrower: int
    wider: int
    step: int
    narrower_loss: float
    wider_loss: float
    """Smoothed, geometric means of seeds."""
    difference: float
    """log(wider/narrower): above 0, the wider one is worse."""
    error: float
    """What seeds and the number of comparisons allow it to be by chance."""
    worse: bool

    @property
    def sentence(self) -> str:
        """Says it in words."""
        return (
            f"width {self.wider} is worse than {self.narrower} at step {self.step}: training loss "
            f"{self.wider_loss:.4g} instead of {self.narrower_loss:.4g}, {math.expm1(self.difference):+.1%} "
            f"(seeds alone: up to {math.expm1(self.error):.1%})"
        )


@dataclass(frozen=True)
class WiderResult:
    """The result of comparing losses over width."""

    pairs: tuple[Pair, ...]

    @property
    def holds(self) -> bool:
        """True where no wider model is worse."""
        return not self.offending

    @property
    def offending(self) -> tuple[Pair, ...]:
        """The pairs in which the wider model is worse, the largest difference first."""
        return tuple(sorted((pair for pair in self.pairs if pair.worse), key=lambda pair: -pair.difference))

    @property
    def lines(self) -> tuple[str, ...]:
        """Says it in words."""
        if self.offending:
            first, *others = self.offending
            more = [f"The same at {len(others)} more of {len(self.pairs)} comparisons."] if others else []
            return (first.sentence, *more)
        last = max(pair.step for pair in self.pairs)
        ends = [pair for pair in self.pairs if pair.step == last]
        losses = [ends[0].narrower_loss, *(pair.wider_loss for pair in ends)]
        widths = [ends[0].narrower, *(pair.wider for pair in ends)]
        told = ", ".join(f"{loss:.4g} at width {width}" for width, loss in zip(widths, losses, strict=True))
        return (f"training loss after {last} steps: {told}",)

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """One for each comparison."""
        return tuple(
            {
                "step": pair.step,
                "narrower": pair.narrower,
                "wider": pair.wider,
                "narrower_loss": pair.narrower_loss,
                "wider_loss": pair.wider_loss,
                "relative_difference": math.expm1(pair.difference),
                "allowed": math.expm1(pair.error + TOLERANCE),
                "worse": pair.worse,
            }
            for pair in self.pairs
        )


def wider_is_better(measured: Measurements, times: Sequence[int]) -> WiderResult:
    """Compares the training losses of neighbouring widths.

    Every comparison is a one-sided t-test on the means of log losses, with one spread of seeds for all widths at a
    time. The larger a difference is in terms of its error, the more comparisons it has to survive (Holm).

    Args:
        measured: runs of at least two widths.
        times: after how many steps to look.
    """
    tested = [found for step in times for found in _at(measured, step)]
    ranked = sorted(tested, key=lambda found: -found.score)
    pairs, rejected = {}, True
    for rank, found in enumerate(ranked):
        error = t_quantile(1 - FALSE_ALARMS / (len(ranked) - rank), found.freedom) * found.standard_error
        rejected = rejected and found.difference - error > TOLERANCE
        pairs[found] = found.judged(error, worse=rejected)
    return WiderResult(tuple(pairs[found] for found in tested))


@dataclass(frozen=True, slots=True)
class _Tested:
    narrower: int
    wider: int
    step: int
    losses: tuple[float, float]
    """Logs."""
    standard_error: float
    freedom: int

    @property
    def difference(self) -> float:
        narrower, wider = self.losses
        return 0.0 if narrower == wider else wider - narrower

    @property
    def score(self) -> float:
        return (self.difference - TOLERANCE) / self.standard_error

    def judged(self, error: float, *, worse: bool) -> Pair:
        narrower, wider = (math.exp(loss) for loss in self.losses)
        return Pair(self.narrower, self.wider, self.step, narrower, wider, self.difference, error, worse)


def _at(measured: Measurements, step: int) -> list[_Tested]:
    logs = {width: [_smoothed(run.losses, step) for run in measured.at(width)] for width in measured.widths}
    means = {width: fmean(values) for width, values in logs.items()}
    squares = [(x - means[width]) ** 2 for width, values in logs.items() for x in values if math.isfinite(means[width])]
    freedom = max(1, len(squares) - sum(math.isfinite(mean) for mean in means.values()))
    spread = max(LEAST_SPREAD, math.sqrt(sum(squares) / freedom))
    return [
        _Tested(a, b, step, (means[a], means[b]), spread * math.sqrt(1 / len(logs[a]) + 1 / len(logs[b])), freedom)
        for a, b in pairwise(measured.widths)
    ]


def _smoothed(losses: Sequence[float], step: int) -> float:
    """Log of the mean around the step, counted from 1; of a run that ended before, infinite."""
    around = losses[max(0, step - 1 - AROUND) : step + AROUND]
    if len(losses) < step or not all(math.isfinite(loss) and loss > 0 for loss in around):
        return math.inf
    return math.log(fmean(around))
