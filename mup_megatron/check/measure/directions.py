"""Optimizers whose step is a direction, made of the gradients so far, and decoupled weight decay:

    Δw = -η · d - ηλ · w

Muon's direction is its momentum, orthogonalised by iterations of Newton and Schulz and scaled by the matrix's shape;
Lion's is the sign of one. Here are the directions, in plain torch, an optimizer that trains the correct runs with
them, and the replay that reads η and λ back from a step.

Sources: Muon, kellerjordan.github.io/posts/muon; Lion, arXiv 2302.06675. Coefficients: Polar Express, arXiv 2505.16932;
CANS, arXiv 2506.10935; the others as their authors give them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from itertools import chain, cycle, islice, repeat
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import shapes_of
from mup_megatron.check.measure.optimizers import Handling, Split
from mup_megatron.check.measure.replay import Fitted, Sums, fitted_pair, gram
from mup_megatron.recipe import Hyperparameters
from mup_megatron.theory import SCALE_MODES

_STEEP = (3.4445, -4.7750, 2.0315)
COEFFICIENTS: Mapping[str, tuple[tuple[float, float, float], ...]] = {
    "simple": (_STEEP,),
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ),
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    "aol": (
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    ),
    "deepseekv4": (*(_STEEP,) * 8, *((2.0, -1.5, 0.5),) * 2),
}
"""`muon_coefficient_type` → a, b, c of each iteration's a·x + b·x³ + c·x⁵."""
_LAST_REPEATS = frozenset({"polar_express", "cans", "deepseekv4"})
"""Those whose further iterations have the last coefficients; the others begin anew."""


def splits_of(model: ModelFile) -> dict[str, Split]:
    """Returns how the rows of matrices divide that are not orthogonalised as one, by name."""
    tensors = (tensor for tensor in shapes_of(model, model)[1].tensors if tensor.stepped_by_parts)
    return {tensor.name: tuple(part.rows // tensor.runs for part in tensor.parts) for tensor in tensors}


def orthogonalised(matrix: Tensor, *, coefficients: str, iterations: int, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a matrix with the same singular vectors, and singular values of about 1.

    Args:
        matrix: one, or a batch of them.
        coefficients: `muon_coefficient_type`.
        iterations: how many.
        dtype: in which matrices are multiplied; by default in their own.
    """
    x = matrix.to(dtype or matrix.dtype)
    x = x.mT if matrix.shape[-2] > matrix.shape[-1] else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    # In bf16 it matters where a sum is rounded: what is as good as 0 in a gradient comes out as large as the rest.
    added = torch.addmm if x.dim() == 2 else torch.baddbmm
    own = COEFFICIENTS[coefficients]
    for a, b, c in islice(chain(own, repeat(own[-1])) if coefficients in _LAST_REPEATS else cycle(own), iterations):
        square = x @ x.mT
        x = added(x, added(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if matrix.shape[-2] > matrix.shape[-1] else x).to(matrix.dtype)


class Direction(Protocol):
    """Makes the direction of each step of one tensor. Gradients are all taken in; of few steps a replay asks for it."""

    def observe(self, gradient: Tensor) -> None:
        """Takes in a further gradient."""

    def now(self) -> Tensor:
        """Returns the direction after the last gradient."""


class MuonDirection:
    """Muon's, of a whole matrix.

    Args:
        h: of the recipe.
        split: of the matrix.
        dtype: in which it multiplies matrices; by default in that of gradients.
    """

    def __init__(self, h: Hyperparameters, split: Split, dtype: torch.dtype | None = None) -> None:
        self._h, self._split, self._dtype = h, split, dtype
        self._momentum: Tensor | None = None
        self._ahead: Tensor | None = None

    def observe(self, gradient: Tensor) -> None:
        """Takes in a further gradient."""
        h = self._h
        if self._momentum is None:
            self._momentum = torch.zeros_like(gradient)
        self._momentum.lerp_(gradient, 1 - h.muon_momentum)
        self._ahead = gradient.lerp(self._momentum, h.muon_momentum) if h.muon_nesterov else self._momentum

    def now(self) -> Tensor:
        """Returns the orthogonalised momentum, of each part by itself, times the scale of its shape."""
        ahead = self._ahead
        assert ahead is not None
        if not self._split:
            return self._scaled(ahead)
        runs = ahead.unflatten(0, (-1, sum(self._split)))
        parts = [
            self._scaled(part.flatten(0, 1)).unflatten(0, part.shape[:2]) for part in runs.split(self._split, dim=1)
        ]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def _scaled(self, matrix: Tensor) -> Tensor:
        h = self._h
        rows, columns = map(Fraction, matrix.shape[-2:])
        scale = math.sqrt(SCALE_MODES[h.muon_scale_mode](rows, columns)) * h.muon_extra_scale_factor
        kind, iterations = h.muon_coefficient_type, h.muon_num_ns_steps
        return scale * orthogonalised(matrix, coefficients=kind, iterations=iterations, dtype=self._dtype)


class LionDirection:
    """Lion's."""

    def __init__(self, h: Hyperparameters) -> None:
        self._beta1, self._beta2 = h.adam_beta1, h.adam_beta2
        self._momentum: Tensor | None = None
        self._now: Tensor | None = None

    def observe(self, gradient: Tensor) -> None:
        """Takes in a further gradient."""
        if self._momentum is None:
            self._momentum = torch.zeros_like(gradient)
        self._now = self._momentum.lerp(gradient, 1 - self._beta1).sign()
        self._momentum.lerp_(gradient, 1 - self._beta2)

    def now(self) -> Tensor:
        """Returns the sign of the momentum before the last gradient, moved towards it."""
        assert self._now is not None
        return self._now


class Directed(torch.optim.Optimizer):
    """Steps in directions, with a group for each tensor, and decoupled weight decay.

    Args:
        groups: with `lr` and `weight_decay`; each may say how its tensor is taken (`handling`).
        make: a new direction for one tensor, given that.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], make: Callable[[Handling], Direction]) -> None:
        super().__init__(groups, {"handling": Handling()})
        self._make = make

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes one."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if "direction" not in (state := self.state[parameter]):
                    state["direction"] = self._make(group["handling"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                state["direction"].observe(parameter.grad)
                parameter.add_(state["direction"].now(), alpha=-group["lr"])


class DirectionReplay:
    """For an optimizer that steps in directions.

    Args:
        directions: new ones, of which that one counts that explains most: they differ in how they round.
        whole: see `Replay`.
    """

    def __init__(self, *directions: Direction, whole: bool) -> None:
        self._directions, self.whole = directions, whole

    def observe(self, gradient: Tensor, before: Tensor) -> None:
        """Takes in a step's gradient, as the optimizer saw it, and the weight before the step."""
        for direction in self._directions:
            direction.observe(gradient)

    def sums(self, before: Tensor, moved: Tensor) -> Sums:
        """The step's normal equations with each direction: of d, w and Δw."""
        w, d = before.double(), moved.double()
        return np.stack([gram([direction.now().double(), w, d]) for direction in self._directions])

    @staticmethod
    def fitted(sums: Sums) -> Fitted:
        """Solves the equations."""
        return min((fitted_pair(each) for each in sums), key=lambda fitted: fitted.unexplained)
