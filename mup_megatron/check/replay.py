"""What learning rate, eps and weight decay an optimizer used, read from how it moved a weight. Asks no optimizer.

Adam moves a weight in one step by

    Δw = -η · m̂ / (√v̂ + ε) - η·λ·w

m̂ and v̂ follow from the gradients that it saw, so with s = √v̂ every element of the tensor is one equation

    Δw·s = -η · m̂ - ε · Δw - ηλ · w·s - ηλε · w

that is linear in four unknowns: least squares over the elements gives η, ε and λ. SGD with momentum likewise, from two
unknowns. What least squares leave unexplained is rounding where the optimizer is the one that is expected, and is not
where its betas, its momentum or its kind are others. Only sums over elements are kept, so that ranks with different
shards add theirs up.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Sums = NDArray[np.float64]

SAMPLE = 8192
"""Elements of a tensor, drawn once, that are looked at: each is an equation, and there are four unknowns."""


def sample(tensor: Tensor) -> Tensor | slice:
    """What to index a flattened tensor with."""
    count = tensor.numel()
    if count <= SAMPLE:
        return slice(None)
    generator = torch.Generator().manual_seed(count)
    return torch.randint(count, (SAMPLE,), generator=generator).to(tensor.device)


@dataclass(frozen=True, slots=True)
class Fitted:
    """What the movement of one tensor in one step says. None for what it does not."""

    lr: float
    eps: float | None
    weight_decay: float | None
    unexplained: float
    """The share of the movement that no values of these explain, 0 to 1: a root mean square over the elements."""


class Replay(Protocol):
    """One tensor's optimizer state, kept beside the optimizer's own."""

    def observe(self, gradient: Tensor, before: Tensor) -> None:
        """Takes in a step's gradient, as the optimizer saw it, and the weight before the step."""

    def sums(self, before: Tensor, moved: Tensor) -> Sums:
        """The step's normal equations, [unknowns + 1, unknowns + 1]; those of shards are added."""


class AdamReplay:
    """For Adam with decoupled weight decay, eps outside the root, bias-corrected."""

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
        """The step's normal equations: of m̂, Δw, w·s, w, and Δw·s."""
        assert self._m is not None
        assert self._v is not None
        m = self._m.double() / (1 - self._beta1**self._steps)
        s = (self._v.double() / (1 - self._beta2**self._steps)).sqrt()
        w, d = before.double(), moved.double()
        return _gram([m, d, w * s, w, d * s])

    @staticmethod
    def fitted(sums: Sums) -> Fitted:
        """Solves the equations."""
        (lr, eps, decay, _), unexplained = _solved(sums)
        if lr <= 0:
            return Fitted(0.0, None, None, unexplained)
        return Fitted(lr, max(eps, 0.0), decay / lr, unexplained)


class SGDReplay:
    """For SGD with momentum and coupled weight decay: Δw = -η · Σ μᵏ (g + λw)."""

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._g: Tensor | None = None
        self._w: Tensor | None = None

    def observe(self, gradient: Tensor, before: Tensor) -> None:
        """Takes in a step's gradient, as the optimizer saw it, and the weight before the step."""
        self._g = gradient.clone() if self._g is None else self._momentum * self._g + gradient
        self._w = before.clone() if self._w is None else self._momentum * self._w + before

    def sums(self, before: Tensor, moved: Tensor) -> Sums:
        """The step's normal equations: of Σμᵏg, Σμᵏw and Δw."""
        assert self._g is not None
        assert self._w is not None
        return _gram([self._g.double(), self._w.double(), moved.double()])

    @staticmethod
    def fitted(sums: Sums) -> Fitted:
        """Solves the equations."""
        (lr, decay), unexplained = _solved(sums)
        if lr <= 0:
            return Fitted(0.0, None, None, unexplained)
        return Fitted(lr, None, decay / lr, unexplained)


def _gram(columns: list[Tensor]) -> Sums:
    stacked = torch.stack(columns)
    result: Sums = (stacked @ stacked.T).cpu().numpy()
    return result


def _solved(sums: Sums) -> tuple[tuple[float, ...], float]:
    """Minus what the columns but the last have to be multiplied by to give the last, and what is missing then.

    Least squares with columns scaled to 1; what cannot be told apart shares the smallest solution.
    """
    scale = np.sqrt(np.diag(sums))
    moved = scale[-1] > 0
    scale[scale == 0] = 1.0
    scaled = sums / np.outer(scale, scale)
    columns, target = scaled[:-1, :-1], scaled[:-1, -1]
    solution = np.linalg.lstsq(columns, target, rcond=1e-13)[0]
    left = 1 - 2 * solution @ target + solution @ columns @ solution if moved else 0.0
    return tuple(float(x) for x in -solution * scale[-1] / scale[:-1]), math.sqrt(min(1.0, max(0.0, left)))


def rms_of(squares: float, count: float) -> float:
    """Root mean square from a sum of squares."""
    return math.sqrt(squares / count) if count else 0.0
