"""The learning rate, eps and weight decay that an optimizer used, read from how it moved a weight. Asks no optimizer.

Adam moves a weight in one step by

    Δw = -η · m̂ / (√v̂ + ε) - η·λ·w

m̂ and v̂ follow from the gradients that it saw, so with s = √v̂ every element of the tensor is one equation

    Δw·s = -η · m̂ - ε · Δw - ηλ · w·s - ηλε · w

that is linear in four unknowns: least squares over the elements gives η, ε and λ. SGD with momentum likewise, from two
unknowns, and the optimizers of `directions.py`. What least squares leave unexplained is rounding where the optimizer is
the one that is expected, and is not where its betas, its momentum or its kind are others. Only sums over elements are
kept, so that ranks with different shards add theirs up.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["FEWEST", "AdamReplay", "Fitted", "Replay", "SGDReplay", "Sums"]

Sums = NDArray[np.float64]
"""Sums over elements of the products of each two of a step's terms."""

_LAST_DIGIT = 2.0**-23
"""Of a weight in single precision, relative to it."""
_TOLD_APART = 1e-9
"""Of squares: columns that differ by less than 3e-5 cannot be told apart in single precision."""
SAMPLE = 8192
"""Elements of a tensor, drawn once, that are looked at: each is an equation, and there are four unknowns."""

FEWEST = 8
"""Elements of a tensor, fewer of which are not looked at: so few equations have a solution whatever moved."""


def sample(tensor: Tensor) -> Tensor | slice:
    """Returns an index of a flattened tensor's elements that are looked at."""
    count = tensor.numel()
    if count <= SAMPLE:
        return slice(None)
    generator = torch.Generator().manual_seed(count)
    return torch.randint(count, (SAMPLE,), generator=generator).to(tensor.device)


@dataclass(frozen=True, slots=True)
class Fitted:
    """The values that the movement of one tensor in one step tells; None for those that it does not."""

    lr: float | None
    eps: float | None
    weight_decay: float | None
    unexplained: float
    """The share of the movement that no values of these explain, 0 to 1: a root mean square over the elements, in which
    elements count as their gradients are large."""


class Replay(Protocol):
    """One tensor's optimizer state, kept beside the optimizer's own."""

    whole: bool
    """Whether what a step does to an element depends on all of its tensor: it is then shown all of each, else a few."""

    def observe(self, gradient: Tensor, before: Tensor) -> None:
        """Takes in a step's gradient, as the optimizer saw it, and the weight before the step."""

    def sums(self, before: Tensor, moved: Tensor) -> Sums:
        """Returns the step's normal equations, [unknowns + 1, unknowns + 1]; those of shards are added."""

    @staticmethod
    def fitted(sums: Sums) -> Fitted:
        """Solves the equations."""


class AdamReplay:
    """For Adam with decoupled weight decay, eps outside the root, bias-corrected."""

    whole = False

    def __init__(self, beta1: float, beta2: float) -> None:
        self._beta1, self._beta2 = beta1, beta2
        self._steps = 0
        self._m: Tensor | None = None
        self._v: Tensor | None = None

    def observe(self, gradient: Tensor, before: Tensor) -> None:
        """Takes in a step's gradient, as the optimizer saw it, and the weight before the step."""
        self._steps += 1
        if self._m is None or self._v is None:
            self._m, self._v = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self._m.lerp_(gradient, 1 - self._beta1)
        self._v.mul_(self._beta2).addcmul_(gradient, gradient, value=1 - self._beta2)

    def sums(self, before: Tensor, moved: Tensor) -> Sums:
        """Returns the step's normal equations: of m̂, Δw, w·s, w, and Δw·s."""
        assert self._m is not None
        assert self._v is not None
        m = self._m.double() / (1 - self._beta1**self._steps)
        s = (self._v.double() / (1 - self._beta2**self._steps)).sqrt()
        w, d = before.double(), moved.double()
        return gram([m, d, w * s, w, d * s])

    @staticmethod
    def fitted(sums: Sums) -> Fitted:
        """Solves the equations."""
        (lr, eps, decay, _), left, known = _solved(sums)
        eps = max(eps, 0.0)
        # In units of the movement: what stands in the equations is Δw·s, of which ε may make much more or less.
        moved = _squares(sums, {4: 1.0, 1: eps})
        unexplained = _share(left, moved, digit=_squares(sums, {2: 1.0, 3: eps}))
        return _fitted(lr, eps if known[1] else None, decay if known[2] else None, unexplained, is_known=known[0])


class SGDReplay:
    """For SGD with momentum and coupled weight decay: Δw = -η · Σ μᵏ (g + λw)."""

    whole = False

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._g: Tensor | None = None
        self._w: Tensor | None = None

    def observe(self, gradient: Tensor, before: Tensor) -> None:
        """Takes in a step's gradient, as the optimizer saw it, and the weight before the step."""
        self._g = gradient.clone() if self._g is None else self._momentum * self._g + gradient
        self._w = before.clone() if self._w is None else self._momentum * self._w + before

    def sums(self, before: Tensor, moved: Tensor) -> Sums:
        """Returns the step's normal equations: of Σμᵏg, Σμᵏw and Δw."""
        assert self._g is not None
        assert self._w is not None
        return gram([self._g.double(), self._w.double(), moved.double()])

    @staticmethod
    def fitted(sums: Sums) -> Fitted:
        """Solves the equations."""
        return fitted_pair(sums)


def fitted_pair(sums: Sums) -> Fitted:
    """Solves the equations of a step that is made of two terms: one times η, and the weight times ηλ."""
    (lr, decay), left, known = _solved(sums)
    unexplained = _share(left, _squares(sums, {2: 1.0}), digit=_squares(sums, {1: 1.0}))
    return _fitted(lr, None, decay if known[1] else None, unexplained, is_known=known[0])


def gram(columns: list[Tensor]) -> Sums:
    """Returns the sums over elements of the products of each two of a step's terms."""
    stacked = torch.stack([column.flatten() for column in columns])
    result: Sums = (stacked @ stacked.T).cpu().numpy()
    return result


def _fitted(lr: float, eps: float | None, decay: float | None, unexplained: float, *, is_known: bool) -> Fitted:
    if not is_known:
        return Fitted(None, None, None, unexplained)
    if lr <= 0:
        return Fitted(0.0, None, None, unexplained)
    return Fitted(lr, eps, None if decay is None else decay / lr, unexplained)


def _solved(sums: Sums) -> tuple[tuple[float, ...], float, tuple[bool, ...]]:
    """Minus what the columns but the last are to be multiplied by to give the last; the squares that are left over; and
    of which column that is known.

    Least squares with columns scaled to 1. Of what cannot be told apart nothing is known: where all gradients of a gain
    so far have one sign, for one, learning rate and weight decay move it alike. What does not move has a known 0.
    """
    if sums[-1, -1] == 0:
        return (0.0,) * (len(sums) - 1), 0.0, (True,) * (len(sums) - 1)
    scale = np.sqrt(np.diag(sums))
    scale[scale == 0] = 1.0
    scaled = sums / np.outer(scale, scale)
    columns, target = scaled[:-1, :-1], scaled[:-1, -1]
    solution = np.linalg.lstsq(columns, target, rcond=1e-13)[0]
    left = scaled[-1, -1] - 2 * solution @ target + solution @ columns @ solution
    sizes, directions = np.linalg.eigh(columns)
    unknown = (directions[:, sizes < _TOLD_APART] ** 2).sum(axis=1) > _TOLD_APART
    return (
        tuple(float(x) for x in -solution * scale[-1] / scale[:-1]),
        max(0.0, float(left)) * float(scale[-1]) ** 2,
        tuple(not x for x in unknown),
    )


def _squares(sums: Sums, of: Mapping[int, float]) -> float:
    """Returns the sum of squares of columns, multiplied and added up."""
    return float(sum(a * b * sums[i, j] for i, a in of.items() for j, b in of.items()))


def _share(left: float, moved: float, *, digit: float) -> float:
    """Returns a share of squares, as a ratio of roots.

    A weight cannot move by less than its last digit: what that leaves over is not counted.
    """
    beyond = max(0.0, left - _LAST_DIGIT**2 * digit)
    return min(1.0, math.sqrt(beyond / moved)) if moved > 0 else 0.0


def rms_of(squares: float, count: float) -> float:
    """Root mean square from a sum of squares."""
    return math.sqrt(squares / count) if count else 0.0
