"""A quadratic fit over the best trials of a search: where its optimum is, and how sure that is. Pure.

In coordinates in which the space is a unit cube (logarithms where it is searched in them), the loss of a trial is

    intercept of its rung + (slopes + shift of its rung) · u + curvatures · u² + interactions

All rungs of a ladder share the curvatures; what a shorter or narrower run prefers may lie elsewhere, so each has its
own shift of the slopes. Shifts and interactions have a normal prior, everything else is free. From the posterior come
draws of the coefficients, from each draw the lowest point of the cube as far as the fitted trials reach: their middle
is the optimum, their spread says how sure it is. Where no good trial is, a quadratic says nothing.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mup_megatron.search.space import Space
from mup_megatron.search.study import StudyRecord

Array: TypeAlias = NDArray[np.float64]

DRAWS = 400
LEVEL = 0.9
"""How many of the draws an interval holds."""
CERTAIN = 0.95
"""How many of them put the optimum at an edge, if it is said to be there."""
RISE = 0.01
"""By how much of the loss it may rise within the basin."""
SHIFT = 0.1
"""By how much of the space's width optima of different rungs lie apart: the width of the prior."""
EDGE = 0.01
"""As close to a bound is at it."""
BEYOND = 0.1
"""By how much of the space's width an optimum may lie beyond all fitted trials."""
INSIDE = 0.25
"""So far from the edge the loss has to be higher by more than a residual, or the edge does not matter."""
LARGEST = 1e100
"""Of losses that have a fit: their squares are numbers too."""
SWEEPS = 30
"""Of a descent along the coordinates."""


@dataclass(frozen=True)
class Basin:
    """The optimum of one hyperparameter."""

    optimum: float
    interval: tuple[float, float]
    """Holds it with a probability of 0.9, as far as the loss is quadratic."""
    basin: tuple[float, float]
    """Within it the loss is at most 1 % above its least, the others at their optima."""


@dataclass(frozen=True)
class Fit:
    """A quadratic fit over the best trials of a study."""

    basins: Mapping[str, Basin]
    at_edges: Mapping[str, int]
    """Hyperparameters whose optimum is at a bound of the space: 0 the lower, 1 the upper."""
    loss: float
    """Of a whole trial at the optimum."""
    residual: float
    """Root mean square of what the fit leaves."""
    trials: int
    surface: "Surface" = field(compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, those that a recipe's provenance has of a fit."""
        basins = {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(basin).items()}
            for name, basin in self.basins.items()
        }
        at_edges = {name: ("low", "high")[edge] for name, edge in self.at_edges.items()}
        return {
            "basins": basins, "at_edges": at_edges, "loss": self.loss, "residual": self.residual, "trials": self.trials
        }  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A complete trial."""

    rung: int
    parameters: Mapping[str, float]
    loss: float


def fitted(study: StudyRecord) -> Fit | None:
    """Returns the fit over the best trials of a study; None if there are too few for one, or no whole one."""
    trials = [trial for trial in study.trials if trial.loss is not None]
    points = [Point(study.rung_of(trial), trial.parameters, float(trial.loss or 0.0)) for trial in trials]
    return None if study.best is None else fit_points(points, study.spec.space)


def fit_points(points: Sequence[Point], space: Space) -> Fit | None:
    """Returns the fit over the best of these trials; None if there are too few.

    Of the lowest rung the best third counts, but at least three trials for each slope and curvature, of which there
    have to be four (`least_for_fit`); on the others, all.
    """
    names = list(space.ranges)
    lowest = sorted((point for point in points if point.rung == 0), key=lambda point: point.loss)
    if len(lowest) < least_for_fit(space):
        return None
    used = [
        *lowest[: max(3 * _terms(space), math.ceil(len(lowest) / 3))],
        *(point for point in points if point.rung > 0),
    ]
    if max(abs(point.loss) for point in used) > LARGEST:
        return None
    rungs = np.array([point.rung for point in used])
    unit = np.array([[space.ranges[name].fraction(point.parameters[name]) for name in names] for point in used])
    losses = np.array([point.loss for point in used])
    best = unit[min(range(len(used)), key=lambda i: (-rungs[i], losses[i]))]
    model = _Model(len(names), sorted({point.rung for point in used}))
    draws, residual = model.posterior(unit, rungs, losses)
    reach = np.clip([unit.min(axis=0) - BEYOND, unit.max(axis=0) + BEYOND], 0.0, 1.0)
    optima = np.array([model.lowest(draw, best, reach) for draw in draws])
    mean = draws.mean(axis=0)
    middle = model.lowest(mean, best, reach)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(optima, [tail, 1 - tail], axis=0)
    loss = model.at(mean, middle)
    half = np.sqrt(RISE * abs(loss) / np.maximum(model.curvatures(mean), 1e-12))
    at_edges = {
        name: edge
        for j, name in enumerate(names)
        for edge in (0, 1)
        if np.mean([model.falls_to(draw, at, j, edge) > residual for draw, at in zip(draws, optima, strict=True)])
        > CERTAIN
    }
    basins = {}
    for j, name in enumerate(names):
        value = space.ranges[name].at
        basins[name] = Basin(
            value(middle[j]),
            (value(low[j]), value(high[j])),
            (value(max(0.0, middle[j] - half[j])), value(min(1.0, middle[j] + half[j]))),
        )
    return Fit(basins, at_edges, loss, residual, len(used), Surface(space, model, mean, middle, reach))


def least_for_fit(space: Space) -> int:
    """Returns how many complete trials there have to be on the lowest rung for a fit."""
    return 4 * _terms(space)


def _terms(space: Space) -> int:
    """Intercept, slopes and curvatures."""
    return 1 + 2 * len(space.ranges)


@dataclass(frozen=True)
class _Model:
    """The quadratic: slopes, curvatures, interactions, then intercepts and shifts of rungs."""

    size: int
    rungs: Sequence[int]
    """Those that there are; the last has no shift."""

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        return list(itertools.combinations(range(self.size), 2))

    def _columns(self, unit: Array, rungs: Array) -> Array:
        pairs = [unit[:, j] * unit[:, k] for j, k in self._pairs]
        on = [(rungs == rung).astype(float) for rung in self.rungs]
        shifts = [unit * mine[:, None] for mine in on[:-1]]
        parts = [unit, unit**2, *([np.stack(pairs, axis=1)] if pairs else []), np.stack(on, axis=1), *shifts]
        return np.concatenate(parts, axis=1)

    def posterior(self, unit: Array, rungs: Array, losses: Array) -> tuple[Array, float]:
        """Returns draws of the coefficients, and the root mean square of the residuals."""
        columns = self._columns(unit, rungs)
        d, n = self.size, len(losses)
        free = 2 * d + len(self.rungs)
        # First without interactions and shifts, for the scale of their priors.
        plain = np.concatenate([columns[:, : 2 * d], columns[:, self._intercepts]], axis=1)
        first, *_ = np.linalg.lstsq(plain, losses, rcond=None)
        curvatures = np.abs(first[d : 2 * d])
        curvatures = np.maximum(curvatures, max(0.05 * float(curvatures.mean()), 1e-9))
        noise = max(float(np.sum((losses - plain @ first) ** 2)) / max(n - free, 1), 1e-18)
        precision = np.zeros(columns.shape[1])
        for index, (j, k) in enumerate(self._pairs):
            precision[2 * d + index] = 1 / (curvatures[j] * curvatures[k])
        precision[self._intercepts.stop :] = np.tile(1 / (2 * curvatures * SHIFT) ** 2, len(self.rungs) - 1)
        for _ in range(3):
            covariance = np.linalg.pinv(columns.T @ columns / noise + np.diag(precision), hermitian=True)
            mean = covariance @ (columns.T @ losses) / noise
            left = float(np.sum((losses - columns @ mean) ** 2))
            noise = max(left / max(n - free, 1), 1e-18)
        values, vectors = np.linalg.eigh(covariance)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        normal = np.random.Generator(np.random.PCG64(0)).standard_normal((DRAWS, len(mean)))
        return mean + (normal - normal.mean(axis=0)) @ root.T, math.sqrt(left / n)

    @property
    def _intercepts(self) -> slice:
        begin = 2 * self.size + len(self._pairs)
        return slice(begin, begin + len(self.rungs))

    def curvatures(self, coefficients: Array) -> Array:
        """Returns half the second derivatives along the coordinates."""
        return coefficients[self.size : 2 * self.size]

    def _interactions(self, coefficients: Array) -> Array:
        matrix = np.zeros((self.size, self.size))
        for index, (j, k) in enumerate(self._pairs):
            matrix[j, k] = matrix[k, j] = coefficients[2 * self.size + index]
        return matrix

    def at(self, coefficients: Array, point: Array, rung: int | None = None) -> float:
        """Returns the loss of a trial on a rung that there is, by default of a whole one."""
        place = len(self.rungs) - 1 if rung is None else self.rungs.index(rung)
        slopes, mixed = coefficients[: self.size], self._interactions(coefficients)
        if place < len(self.rungs) - 1:
            begin = self._intercepts.stop + place * self.size
            slopes = slopes + coefficients[begin : begin + self.size]
        level = coefficients[self._intercepts][place]
        return float(level + slopes @ point + self.curvatures(coefficients) @ point**2 + point @ mixed @ point / 2)

    def falls_to(self, coefficients: Array, optimum: Array, j: int, edge: int) -> float:
        """Returns by how much the loss falls from inside to an edge, if the optimum is there; 0 if it is not."""
        if abs(optimum[j] - edge) > EDGE:
            return 0.0
        inside = optimum.copy()
        inside[j] = abs(edge - INSIDE)
        return self.at(coefficients, inside) - self.at(coefficients, optimum)

    def lowest(self, coefficients: Array, start: Array, reach: Array) -> Array:
        """Returns the lowest point between two corners that a descent along the coordinates finds."""
        slopes, curved, mixed = (
            coefficients[: self.size],
            self.curvatures(coefficients),
            self._interactions(coefficients),
        )
        low, high = reach
        point = np.array(start)
        for _ in range(SWEEPS):
            for j in range(self.size):
                slope = slopes[j] + mixed[j] @ point
                if curved[j] > 0:
                    point[j] = min(max(-slope / (2 * curved[j]), low[j]), high[j])
                else:
                    point[j] = high[j] if slope + curved[j] * (low[j] + high[j]) < 0 else low[j]
        return point


@dataclass(frozen=True)
class Surface:
    """The fitted loss at any place of the space."""

    _space: Space
    _model: _Model
    _mean: Array
    _optimum: Array
    _reach: Array

    @property
    def rungs(self) -> Sequence[int]:
        """Those of which it knows the loss."""
        return self._model.rungs

    def reach(self, name: str) -> tuple[float, float]:
        """Returns the fractions of the space between which there were trials to fit."""
        low, high = self._reach[:, list(self._space.ranges).index(name)]
        return float(low), float(high)

    def loss(self, rung: int, fractions: Mapping[str, float]) -> float:
        """Returns that of a trial on a rung, at these fractions of the space; what is not named is at its optimum."""
        point = self._optimum.copy()
        for index, name in enumerate(self._space.ranges):
            point[index] = fractions.get(name, point[index])
        return self._model.at(self._mean, point, rung)
