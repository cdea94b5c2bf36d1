"""The best learning rate at each width, and whether it is the same one. Pure numbers.

A width's basin, final loss over log2 of the learning rate, is a parabola near its minimum; where the minimum of the
widest lies against that of the narrowest is the shift, in octaves, and what the narrow one's optimum costs at the wide
one is the regret. Both come with what the seeds allow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mup_megatron.check.verdict.verdict import CheckOutcome
from mup_megatron.errors import InputError

Losses = Mapping[int, Mapping[float, Sequence[float]]]
"""Width → learning rate → final loss of each seed, infinite where a run diverged."""
SHIFT = 0.5
"""Octaves that an optimum may move: the finite width of models this small moves it by some of that. In standard
parametrization Adam's moves by a whole octave at every doubling of the width."""
PRECISION = 1.0
"""Octaves of uncertainty of the shift, beyond which nothing is concluded."""
REGRET = 0.005
"""Share of the loss that the transferred learning rate may cost: less would not be worth tuning for."""
NEAR = 2
"""Learning rates on either side of the best one that take part in the fit."""
REPLICATES = 500
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BasinOptimum:
    """The minimum of a width's basin."""

    log2_lr: float
    low: float
    high: float
    """The 95% interval, from the seeds."""
    edge: int
    """-1 or 1: the best rate is the lowest or highest that was tried, so the minimum lies beyond; 0: it does not."""

    @property
    def lr(self) -> float:
        """The learning rate."""
        return float(2.0**self.log2_lr)


@dataclass(frozen=True, kw_only=True)
class TransferResult:
    """The result of comparing basins."""

    outcome: CheckOutcome
    lines: tuple[str, ...]
    optima: Mapping[int, BasinOptimum]
    shift: float
    """Octaves from the narrowest's optimum to the widest's."""
    shift_interval: tuple[float, float]
    """95%."""
    regret: float
    """Share of the widest's best loss that the narrowest's optimum costs there; infinite where it diverges."""
    regret_interval: tuple[float, float]
    losses: Losses

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """One for each width and learning rate."""
        return tuple(
            {
                "width": width,
                "lr": lr,
                "loss": fmean(values),
                "optimum": self.optima[width].lr,
                "losses": " ".join(f"{loss:.6g}" for loss in values),
            }
            for width, basin in self.losses.items()
            for lr, values in sorted(basin.items())
        )


class _Basin:
    """One width's losses: means over seeds, and by how much such a mean is off by chance."""

    def __init__(self, losses: Mapping[float, Sequence[float]]) -> None:
        self.x: Array = np.log2(np.array(sorted(losses)))
        self.mean = mean_losses(losses)
        self._fits: dict[int, Array] = {}
        self._seeds = min(len(values) for values in losses.values())
        finite = [np.array(losses[lr])[: self._seeds] for lr in sorted(losses)]
        self._residuals = _residuals(np.array([finite[i] for i in self._near(self.mean)]))

    def _near(self, mean: Array) -> NDArray[np.intp]:
        """Indices of the rates that take part in the fit."""
        best = int(np.argmin(mean))
        around = np.arange(max(0, best - NEAR), min(len(mean), best + NEAR + 1))
        return around[np.isfinite(mean[around])]

    def replicate(self, rng: np.random.Generator) -> Array:
        """Means as other seeds might have given them."""
        draws = rng.choice(self._residuals, size=(len(self.mean), self._seeds))
        return self.mean + draws.mean(axis=1)

    def edge(self, mean: Array) -> int:
        """Returns which end the best rate is at, if at any; a rate at which runs diverge is beyond an end too."""
        best = int(np.argmin(mean))
        return -1 if best == 0 else int(best == len(mean) - 1)

    def optimum(self, mean: Array) -> float:
        """Returns log2(learning rate) at the vertex of a parabola through the points near the best one.

        Never further from the best one than the next rate that was tried, which is worse or diverges.
        """
        best, near = int(np.argmin(mean)), self._near(mean)
        if self.edge(mean) != 0 or len(near) < 3:
            return float(self.x[best])
        if best not in self._fits:
            # Far points say more about how a basin ends than about where it is lowest.
            weights = 0.5 ** np.abs(near - best)
            design = np.vander(self.x[near] - self.x[best], 3)
            self._fits[best] = np.linalg.pinv(design * weights[:, None]) * weights
        a, b, _ = self._fits[best] @ (mean[near] - mean[best])
        if a <= 0:
            return float(self.x[best])
        return float(np.clip(self.x[best] - b / (2 * a), self.x[best - 1], self.x[best + 1]))

    def loss(self, mean: Array, log2_lr: float) -> float:
        """Between the rates that were tried, on a straight line; beyond them, that at the end."""
        i = int(np.clip(np.searchsorted(self.x, log2_lr) - 1, 0, len(self.x) - 2))
        share = float(np.clip((log2_lr - self.x[i]) / (self.x[i + 1] - self.x[i]), 0.0, 1.0))
        ends = [(1 - share, float(mean[i])), (share, float(mean[i + 1]))]
        return sum(part * loss for part, loss in ends if part > 0)


def mean_losses(losses: Mapping[float, Sequence[float]]) -> Array:
    """Over seeds, by rising learning rate: infinite from the first at which a run diverges."""
    means = np.array([fmean(losses[lr]) for lr in sorted(losses)])
    diverged = ~np.isfinite(means)
    if diverged.any():
        means[int(np.argmax(diverged)) :] = math.inf
    return means


def _residuals(losses: Array) -> Array:
    """Returns how [rates, seeds] differ from the sum of a rate's and a seed's own level, inflated to the noise's size.

    What a seed adds at all rates alike, as a hard batch does, moves no minimum.
    """
    rates, seeds = losses.shape
    if seeds < 2:
        return np.zeros(1)
    centred = losses - losses.mean(axis=1, keepdims=True)
    freedom = rates * (seeds - 1)
    if rates > 1:
        centred = centred - centred.mean(axis=0, keepdims=True)
        freedom = (rates - 1) * (seeds - 1)
    result: Array = centred.flatten() * math.sqrt(losses.size / freedom)
    return result


def judge_transfer(losses: Losses) -> TransferResult:
    """Returns whether the learning rate transfers.

    Args:
        losses: at three widths or more, three learning rates or more and two seeds or more.

    Raises:
        InputError: fewer.
    """
    widths = sorted(losses)
    if len(widths) < 3 or any(len(losses[w]) < 3 for w in widths):
        raise InputError("transfer: needs at least 3 widths and 3 learning rates at each. Give more.")
    if any(len(values) < 2 for w in widths for values in losses[w].values()):
        raise InputError("transfer: without a second seed nothing says how much is noise. Give --seeds 2 or more.")
    dead = [w for w in widths if not np.isfinite(mean_losses(losses[w])).any()]
    if dead:
        return _nothing_trains(losses, dead[0])
    basins = {w: _Basin(losses[w]) for w in widths}
    wide = basins[widths[-1]]
    rng = np.random.default_rng(0)
    found: dict[int, list[float]] = {w: [] for w in widths}
    regrets = []
    for _ in range(REPLICATES):
        means = {w: basin.replicate(rng) for w, basin in basins.items()}
        for w, basin in basins.items():
            found[w].append(basin.optimum(means[w]))
        regrets.append(_regret(wide, means[widths[-1]], found[widths[0]][-1], found[widths[-1]][-1]))
    optima = {}
    for w, basin in basins.items():
        low, high = np.quantile(found[w], [0.025, 0.975])
        optima[w] = BasinOptimum(basin.optimum(basin.mean), float(low), float(high), basin.edge(basin.mean))
    first, last = optima[widths[0]], optima[widths[-1]]
    shifts = np.array(found[widths[-1]]) - np.array(found[widths[0]])
    low, high = np.quantile(shifts, [0.025, 0.975])
    regret = _regret(wide, wide.mean, first.log2_lr, last.log2_lr)
    # Not interpolated: between a finite and an infinite value there is nothing.
    least, most = np.quantile(regrets, [0.025, 0.975], method="nearest")
    shift, interval = last.log2_lr - first.log2_lr, (float(low), float(high))
    outcome, why = _conclude(widths, optima, shift, interval, regret, (float(least), float(most)))
    told = ", ".join(f"{optima[w].lr:.3g} at width {w}" for w in widths)
    return TransferResult(
        outcome=outcome,
        lines=(why, f"best learning rates: {told}"),
        optima=optima,
        shift=shift,
        shift_interval=interval,
        regret=regret,
        regret_interval=(float(least), float(most)),
        losses=losses,
    )


def _regret(basin: _Basin, mean: Array, transferred: float, own: float) -> float:
    best = basin.loss(mean, own)
    return (basin.loss(mean, transferred) - best) / best


def _nothing_trains(losses: Losses, width: int) -> TransferResult:
    line = f"width {width} diverges at the lowest learning rate that was tried. Try lower ones."
    return TransferResult(
        outcome=CheckOutcome.NO_VERDICT,
        lines=(line,),
        optima={w: BasinOptimum(math.nan, math.nan, math.nan, 0) for w in losses},
        shift=math.nan,
        shift_interval=(math.nan, math.nan),
        regret=math.nan,
        regret_interval=(math.nan, math.nan),
        losses=losses,
    )


def _conclude(
    widths: Sequence[int],
    optima: Mapping[int, BasinOptimum],
    shift: float,
    interval: tuple[float, float],
    regret: float,
    regret_interval: tuple[float, float],
) -> tuple[CheckOutcome, str]:
    narrowest, widest = widths[0], widths[-1]
    half = (interval[1] - interval[0]) / 2
    open_ends = {w: optimum.edge for w, optimum in optima.items() if optimum.edge != 0}
    at_least = " at least" if widest in open_ends else ""
    told = (
        f"the best learning rate moves by {shift:+.2f} ± {half:.2f} octaves{at_least} from width {narrowest} to "
        f"{widest}, and that of width {narrowest} costs {regret:.1%}{at_least} of the loss at width {widest}"
    )
    moved = min(abs(interval[0]), abs(interval[1])) > SHIFT and interval[0] * interval[1] > 0
    # Where the widest's minimum lies beyond the rates tried, it is further away still, if in that direction.
    further = open_ends.get(widest, 0) in (0, math.copysign(1, shift))
    if moved and regret_interval[0] > REGRET and further and narrowest not in open_ends:
        return CheckOutcome.FAIL, told
    if open_ends:
        width, edge = next(iter(open_ends.items()))
        end, remedy = ("lowest", "lower") if edge < 0 else ("highest", "higher")
        return (
            CheckOutcome.NO_VERDICT,
            f"width {width} does best at the {end} learning rate that was tried. Try {remedy} ones.",
        )
    if half > PRECISION and regret_interval[1] > REGRET:
        return CheckOutcome.NO_VERDICT, f"{told}: the seeds differ too much to say. Give more seeds or steps."
    return CheckOutcome.PASS, told
