"""The subject's measurements against the reference's: slopes over width, levels, and what of it is off. Plain numbers.

For one quantity of one tensor at one time, log(value) over log(width) is a straight line: its slope says how the value
follows width, its level how large it is. Both are compared with those of the correct reference, which at finite width
has slopes of its own, and never with 0. What seeds alone explain is told from what a mistake does by the spread of the
seeds within each width, pooled over both sides; curvature, which both sides share, is not taken for noise.
"""

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from statistics import NormalDist, fmean, median

from mup_megatron.check.measure.measurements import (
    BOUNDED,
    FROM_STEPS,
    Key,
    MeasuredRun,
    Measurements,
    Quantity,
    typical,
)


class Mismatch(StrEnum):
    """In which way a measurement is off."""

    SLOPE = "slope"
    LEVEL = "level"
    BOUND = "bound"
    """Out of what holds for every right model; its deviations are the values themselves."""


@dataclass(frozen=True, slots=True)
class Slope:
    """A slope of log(value) over log(width)."""

    value: float
    half_width: float
    """Of its 95% confidence interval, from the seeds."""

    def __str__(self) -> str:
        return f"{self.value:+.2f} ± {self.half_width:.2f}"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The deviation that is not called a mistake even where no noise explains it."""

    slope: float
    level: float


TOLERANCES: dict[Quantity, Tolerance] = {
    # Draws: a mistake is a power of width, of two, or of the depth.
    Quantity.INITIAL: Tolerance(0.05, 0.05),
    Quantity.ACTIVATION: Tolerance(0.10, 0.10),
    # Twice what is taken for nothing, also of rows without gradient; there is no law that it follows over width.
    Quantity.UNEXPLAINED: Tolerance(math.inf, math.log(2)),
    # Read from movement to about 1e-3.
    Quantity.LEARNING_RATE: Tolerance(0.02, 0.02),
    Quantity.EPS: Tolerance(0.05, 0.10),
    Quantity.WEIGHT_DECAY: Tolerance(0.03, 0.03),
    # What follows from all the others, through many layers and steps.
    Quantity.DEAD: Tolerance(math.inf, math.log(2)),
    Quantity.NORM: Tolerance(0.15, 0.20),
    Quantity.GRADIENT: Tolerance(0.15, 0.20),
    Quantity.UPDATE: Tolerance(0.15, 0.20),
    Quantity.SPECTRAL: Tolerance(0.15, 0.20),
    Quantity.OVERLAP: Tolerance(0.05, 0.10),
    Quantity.LOSS: Tolerance(0.05, 0.05),
    **dict.fromkeys(BOUNDED, Tolerance(math.inf, math.inf)),
}

CONFIDENCE = 1e-7
"""A right measurement is taken for a wrong one this often, if seeds are normal: a check makes some 10³ comparisons."""

_OF_LEAST = {Quantity.INITIAL: 1e-3, Quantity.LEARNING_RATE: 1e-3}
_OF_MEDIAN = {Quantity.EPS: 1e-3, Quantity.WEIGHT_DECAY: 0.02, Quantity.GRADIENT: 1e-4}
"""What is as good as 0, so that 0 can be compared, relative to the reference's values at the same width: to the least
that is not 0 where a 0 is exact, and to the median where it is read or computed."""
_LEAST_SPREAD = 0.003
"""Seeds that agree to rounding do not make a difference of a thousandth significant."""
_LEAST = {
    Quantity.OVERLAP: 0.02,
    # Right optimizers leave less than a thousandth unexplained, in single precision.
    Quantity.UNEXPLAINED: 0.003,
    # A few rows of an embedding whose tokens do not come up, more or less.
    Quantity.DEAD: 0.02,
}
"""What is as good as 0, whatever the reference has."""
_ROUNDING = 1e-5
"""A gradient that is so small beside the others is what single precision left over of sums that should be 0."""


@dataclass(frozen=True, slots=True)
class Values:
    """Values at one width: the subject's, and the reference's, which is expected."""

    width: int
    found: float
    expected: float

    def __str__(self) -> str:
        return f"at width {self.width}: {self.found:.3g}, expected {self.expected:.3g}"


@dataclass(frozen=True, slots=True)
class Compared:
    """One measurement at all widths, of subject and reference."""

    key: Key
    subject: Slope
    reference: Slope
    slope: float
    """The subject's less the reference's."""
    slope_error: float
    """Its standard error."""
    level: float
    """Mean over widths of log(subject/reference)."""
    level_error: float
    deviations: Mapping[int, float]
    """Width → log(subject/reference), seeds averaged."""
    largest: float
    """Of the subject's values, seeds averaged: at the width where it is largest."""
    off: Mismatch | None
    """None: within what seeds and tolerance allow."""
    shown: Values | None = None
    """At the widest width, or where it is floored at the widest of those; None of what is held against no reference."""
    floored: bool = False
    """True where a side is as good as 0 at some width: slopes and level are of what stands for it in a logarithm."""

    @property
    def factor(self) -> float:
        """The subject's value relative to the reference's, over all widths."""
        return math.exp(self.level)


Comparison = Mapping[Key, Compared]


def compare(subject: Measurements, reference: Measurements) -> dict[Key, Compared]:
    """Everything that both have measured, at the widths that both have."""
    widths = [width for width in subject.widths if width in set(reference.widths)]
    rounding = only_rounding(reference)
    floors = {width: _floors(reference, width, rounding) for width in widths}
    runs = [{w: side.at(w) for w in widths} for side in (subject, reference)]
    found = {}
    for key in sorted(subject.keys() & reference.keys()):
        if key.quantity in BOUNDED or (key.quantity in FROM_STEPS and key.name in rounding):
            continue
        values = [{w: [run.values[key] for run in side[w]] for w in widths} for side in runs]
        sides = [{w: [_log(value, key, floors[w]) for value in side[w]] for w in widths} for side in values]
        if _finite(sides[1]):
            compared = _compared(key, *sides) if _finite(sides[0]) else _not_finite(key, sides[1])
            least = {w: min(value for side in values for value in side[w]) for w in widths}
            floored = [w for w in widths if least[w] <= _floor(key, floors[w])]
            width = _widest_apart(compared, floored) if floored else widths[-1]
            shown = Values(width, *(typical(side[width]) for side in values))
            found[key] = replace(compared, shown=shown, floored=bool(floored))
    return found


def _widest_apart(compared: Compared, widths: Sequence[int]) -> int:
    """Returns the widest of some widths at which the values are apart, or else the widest of all of these."""
    room = TOLERANCES[compared.key.quantity].level
    return max(widths, key=lambda width: (abs(compared.deviations[width]) > room, width))


_GONE = 1e-5
"""What is so small beside others of its kind is 0 but for rounding, and follows no law."""


def own_slopes(
    measured: Measurements, quantity: Quantity, step: int, *, logarithms: bool = True
) -> dict[Key, Compared]:
    """Slopes over log(width) of a side by itself: of the values' logarithms, or of the values as they are."""
    found = {}
    keys = sorted(key for key in measured.keys() if (key.quantity, key.step) == (quantity, step))  # noqa: SIM118
    usual = {w: median([run.values[key] for run in measured.at(w) for key in keys] or [0.0]) for w in measured.widths}
    for key in keys:
        values = {w: [run.values[key] for run in measured.at(w)] for w in measured.widths}
        if logarithms:
            if any(v <= _GONE * usual[w] or not math.isfinite(v) for w, of_width in values.items() for v in of_width):
                continue
            values = {w: list(map(math.log, of_width)) for w, of_width in values.items()}
        compared = _compared(key, values, values)
        found[key] = replace(compared, deviations={w: fmean(v) for w, v in values.items()})
    return found


def _finite(side: Mapping[int, Sequence[float]]) -> bool:
    return all(math.isfinite(value) for values in side.values() for value in values)


def _not_finite(key: Key, reference: Mapping[int, list[float]]) -> Compared:
    """Returns what has overflowed in the subject alone, as far off as can be, whatever its seeds say."""
    as_reference = _compared(key, reference, reference)
    deviations = dict.fromkeys(reference, math.log(sys.float_info.max))
    return replace(as_reference, level=max(deviations.values()), deviations=deviations, off=Mismatch.LEVEL)


def only_rounding(reference: Measurements) -> set[str]:
    """Parameters that nothing can be read from, because their right gradient is 0 and what is there is rounding.

    A bias of keys, above all: it moves all logits of a query alike, and the softmax does not see that. What has exactly
    0 everywhere is not meant: it is not trained.
    """
    largest: dict[str, float] = {}
    for run in reference.runs:
        gradients: dict[int, dict[str, float]] = {}
        for key, value in run.values.items():
            if key.quantity is Quantity.GRADIENT:
                gradients.setdefault(key.step, {})[key.name] = value
        for of_step in gradients.values():
            usual = median([value for value in of_step.values() if value > 0] or [1.0])
            for name, value in of_step.items():
                largest[name] = max(largest.get(name, 0.0), value / usual)
    return {name for name, share in largest.items() if 0 < share < _ROUNDING}


def without_gradient(runs: Sequence[MeasuredRun]) -> set[str]:
    """Parameters whose gradient was 0 or none whenever somebody looked: what the loss does not depend on, and what is
    frozen.
    """
    largest: dict[str, float] = {}
    for run in runs:
        for key, value in run.values.items():
            if key.quantity is Quantity.GRADIENT:
                largest[key.name] = max(largest.get(key.name, 0.0), value)
    return {name for name, value in largest.items() if value == 0}


def _floors(reference: Measurements, width: int, rounding: Collection[str]) -> dict[Quantity, float]:
    values: dict[Quantity, list[float]] = {}
    for run in reference.at(width):
        for key, value in run.values.items():
            if value > 0 and key.name not in rounding:
                values.setdefault(key.quantity, []).append(value)
    floors = {quantity: share * min(values[quantity]) for quantity, share in _OF_LEAST.items() if quantity in values}
    for quantity, share in _OF_MEDIAN.items():
        # What is as good as 0, a vector's weight decay for one, is not among those whose median is meant.
        there = [value for value in values.get(quantity, ()) if value > 0.01 * max(values[quantity])]
        if there:
            floors[quantity] = share * median(there)
    return floors


def _log(value: float, key: Key, floors: Mapping[Quantity, float]) -> float:
    floor = _floor(key, floors)
    return math.log(max(value, floor) if key.quantity in _LEAST else max(value, 0.0) + floor)


def _floor(key: Key, floors: Mapping[Quantity, float]) -> float:
    """Returns what is as good as 0."""
    return _LEAST[key.quantity] if key.quantity in _LEAST else floors.get(key.quantity, 1e-30)


def _compared(key: Key, subject: Mapping[int, list[float]], reference: Mapping[int, list[float]]) -> Compared:
    widths = list(subject)
    x = [math.log(width) for width in widths]
    # What one step betrays does not depend on the seed: a subject where it does shall not hide behind its own spread.
    sides_of_noise = (reference,) if key.quantity in FROM_STEPS else (subject, reference)
    spread, freedom = _pooled([values for side in sides_of_noise for values in side.values()])
    centre = fmean(x)
    square = sum((xi - centre) ** 2 for xi in x)
    weights = [(xi - centre) / square for xi in x] if square else [0.0] * len(x)
    means = [[fmean(side[w]) for w in widths] for side in (subject, reference)]
    slopes, variances, level_variances = [], [], []
    for side, of_side in zip((subject, reference), means, strict=True):
        slopes.append(sum(weight * mean for weight, mean in zip(weights, of_side, strict=True)))
        counts = [len(side[w]) for w in widths]
        variances.append(sum(weight**2 * spread**2 / n for weight, n in zip(weights, counts, strict=True)))
        level_variances.append(sum(spread**2 / n for n in counts) / len(widths) ** 2)
    deviations = {w: found - expected for w, found, expected in zip(widths, *means, strict=True)}
    slope, slope_error = slopes[0] - slopes[1], math.sqrt(sum(variances))
    level, level_error = fmean(deviations.values()), math.sqrt(sum(level_variances))
    t = t_quantile(1 - CONFIDENCE, freedom)
    tolerance = TOLERANCES[key.quantity]
    off = None
    if key.quantity is Quantity.UNEXPLAINED:
        off = Mismatch.LEVEL if max(deviations.values()) > tolerance.level else None
    elif abs(slope) - t * slope_error > tolerance.slope:
        off = Mismatch.SLOPE
    elif abs(level) - t * level_error > tolerance.level:
        off = Mismatch.LEVEL
    largest = math.exp(min(700.0, max(means[0])))
    half = [t_quantile(0.975, freedom) * math.sqrt(variance) for variance in variances]
    sides = [Slope(value, width) for value, width in zip(slopes, half, strict=True)]
    return Compared(key, sides[0], sides[1], slope, slope_error, level, level_error, deviations, largest, off)


def _pooled(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within groups, and its degrees of freedom."""
    freedom = max(1, sum(len(group) - 1 for group in groups))
    squares = sum((value - mean) ** 2 for group in groups for mean in [fmean(group)] for value in group)
    return max(_LEAST_SPREAD, math.sqrt(squares / freedom)), freedom


@cache
def t_quantile(probability: float, freedom: int) -> float:
    """Returns a quantile of Student's distribution, by the Cornish-Fisher expansion (Abramowitz & Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    result: float = z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
    return result


# ---- findings ------------------------------------------------------------------------------------------------------

ORDER = (
    Quantity.INITIAL,
    Quantity.ACTIVATION,
    Quantity.UNEXPLAINED,
    Quantity.LEARNING_RATE,
    Quantity.EPS,
    Quantity.WEIGHT_DECAY,
    Quantity.DEAD,
    Quantity.NORM,
    Quantity.GRADIENT,
    Quantity.UPDATE,
    Quantity.SPECTRAL,
    Quantity.OVERLAP,
    Quantity.LOSS,
)
"""From causes to consequences."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A measurement that is off."""

    compared: Compared
    kind: Mismatch

    @property
    def key(self) -> Key:
        """The measurement that is off."""
        return self.compared.key

    @property
    def size(self) -> float:
        """The deviation, in the logarithm of the value or in its slope."""
        return abs(self.compared.slope if self.kind is Mismatch.SLOPE else self.compared.level)

    @property
    def sentence(self) -> str:
        """Says it in words: where, what was expected, what was found, by slope or factor and as values."""
        if self.kind is Mismatch.BOUND:
            return f"{self._where}: {_out_of_bounds(self.compared)}"
        told = [words for words in (self.in_words, self.compared.shown) if words]
        return f"{self._where}: {'; '.join(map(str, told))}"

    @property
    def _where(self) -> str:
        key = self.key
        when = "before training" if key.step == 0 else f"after {key.step} step{'s' if key.step > 1 else ''}"
        return f"{key.name}: {key.quantity}, {when}"

    @property
    def in_words(self) -> str:
        """Says by what slope or factor it is off; nothing where a 0 has neither, and its values say it."""
        c, quantity = self.compared, self.key.quantity
        if quantity is Quantity.UNEXPLAINED:
            return (
                f"{c.largest:.0%} of it is explained by no learning rate, eps and weight decay of the recipe's "
                "optimizer"
            )
        times = f"{c.factor:.3g} times what is expected"
        if quantity is Quantity.DEAD:
            rows = f"up to {c.largest:.0%} of its rows"
            return rows if c.floored else f"{rows}, {times}"
        if c.floored:
            return ""
        if self.kind is Mismatch.SLOPE:
            return f"slope over width {c.subject}, expected {c.reference}"
        at = "every width" if len(c.deviations) > 1 else f"width {next(iter(c.deviations), 0)}"
        return f"{times}, at {at}"


def _out_of_bounds(c: Compared) -> str:
    """Returns what was found, where there is no reference."""
    low, high = min(c.deviations), max(c.deviations)
    largest = max(c.deviations.values(), key=abs)
    match c.key.quantity:
        case Quantity.EVALUATION:
            return f"off by {largest:.2g} of what training computes on the same batch, at width {high}"
        case Quantity.MEAN:
            return f"{largest:+.2g} of its RMS, where there should be none"
        case Quantity.ALIKE:
            return f"{largest:.2g}: they are drawn from the same numbers"
        case Quantity.ROWS:
            return f"{largest:.2g} times that of independent ones"
        case Quantity.TAILS:
            return f"E x⁴/(E x²)² is {c.subject.value:.2f}, expected {c.reference.value:.2f}"
        case Quantity.SUMMED:
            return f"{largest:.2g} times the mean of the losses that it is made of"
        case _:
            return f"{c.deviations[low]:.3g} at width {low}, {c.deviations[high]:.3g} at width {high}"


def findings(comparison: Comparison) -> list[Finding]:
    """Returns what is off, causes before consequences, and of each kind the earliest first."""
    off = [Finding(compared, compared.off) for compared in comparison.values() if compared.off is not None]
    return sorted(off, key=lambda finding: (ORDER.index(finding.key.quantity), finding.key.step, -finding.size))
