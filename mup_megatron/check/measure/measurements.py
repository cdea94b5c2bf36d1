"""The measurements of one short training run, by name: plain numbers, nothing of torch."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any, NamedTuple

Report = Callable[[str, int, int], None]
"""(what is trained, how many models are done, of how many)."""


LOGITS = "attention_logits"
"""How the attention logits of a torch module are called, which belong to no module of its own."""


class Quantity(StrEnum):
    """Kinds of measurement. Each is one number for one parameter or activation at one time."""

    INITIAL = "initial weight"
    """RMS of a weight before the first step."""
    ACTIVATION = "activation"
    """RMS of a module's output (of attention logits: the softmax's input) before the first step."""
    UPDATE = "activation update"
    """RMS of how far that output is from where it started, on the same batch."""
    GRADIENT = "gradient"
    """RMS of a gradient as the optimizer saw it: reduced over ranks and clipped."""
    DEAD = "rows without gradient"
    """The share of a tensor's rows whose gradient is exactly 0: of queries alone, say, in a matrix of values too."""
    LEARNING_RATE = "learning rate"
    """η as the movement of a weight in one step betrays it: see `replay.py`. Likewise the next two."""
    EPS = "eps"
    WEIGHT_DECAY = "weight decay"
    UNEXPLAINED = "unexplained movement"
    """The share of that movement that no learning rate, eps and weight decay explain: betas, momentum, another rule."""
    SPECTRAL = "spectral norm of the update"
    """‖W_t - W_0‖₂ / √(fan_out/fan_in) (SC, Condition 1)."""
    OVERLAP = "overlap"
    """⟨W_t, W_0⟩ / ‖W_0‖², which weight decay alone would make ∏(1 - ηλ) (WA)."""
    LOSS = "loss"
    """Of the training batch of a step."""
    NORM = "gradient norm"
    """Over all parameters, before it is clipped: what clipping hides of all gradients alike."""
    # What is held against fixed bounds and not against a reference: see `bounds.py`.
    INSIDE = "computed value"
    """RMS, before the first step, of what is computed between modules: of summands, inputs of nonlinear functions."""
    EVALUATION = "evaluation mode"
    """How far a module's output under eval() and no_grad() is from what training computes on the same batch, relative
    to it."""
    POSITION = "positions"
    """⟨q_i, q_{i+Δ}⟩ / ⟨q_i, q_i⟩ of queries on sequences of one repeated token: what positions alone make of them."""
    CONSTANT = "constant"
    """A number that is no weight, as the eps of a norm."""
    ALIKE = "correlation with another weight"
    """The largest with any other tensor's draw, of the elements that come first in both."""
    ROWS = "correlation of rows"
    """Of one matrix: mean square, in units of that of independent ones."""
    MEAN = "mean of a draw"
    """In units of its RMS, with its sign."""
    TAILS = "shape of a draw"
    """E x⁴ / (E x²)²: 3 for a normal distribution, 1.8 for a uniform one."""
    PLACE = "place in the forward pass"
    """When a module is done, or a value computed, before the first step."""
    SUMMED = "loss over its parts"
    """The loss in units of the mean of the losses of the forward passes that it is made of: 1 if it is their mean."""


LOSS_INPUT = "what the loss takes in"
TURNING = "turning of queries"
"""Of `POSITION`, where what positions do to queries is a turn: the mean cosine of its angles."""
WITHOUT_MEAN = "without mean"
"""Of attention logits: less their mean over the batch, and so without masks and biases of positions."""
FROM_STEPS = (Quantity.UNEXPLAINED, Quantity.LEARNING_RATE, Quantity.EPS, Quantity.WEIGHT_DECAY)
"""What an optimizer's steps betray of it."""
COORDINATES = (Quantity.ACTIVATION, Quantity.UPDATE)
"""What a classical coordinate check looks at."""
DRAWS = (Quantity.ALIKE, Quantity.ROWS, Quantity.MEAN, Quantity.TAILS)
"""What is looked at of initial weights, beside their size."""
BOUNDED = (
    Quantity.INSIDE,
    Quantity.EVALUATION,
    Quantity.POSITION,
    Quantity.CONSTANT,
    *DRAWS,
    Quantity.PLACE,
    Quantity.SUMMED,
)
"""What has bounds of its own, whatever a reference shows."""


class Key(NamedTuple):
    """The name of a number: of what, where, and after how many steps."""

    quantity: Quantity
    name: str
    """Of a parameter or module, global, in the target's terms; "loss" for the loss."""
    step: int
    """How many steps had been taken; for what belongs to a step, including it."""


Values = Mapping[Key, float]


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """One model of one width from one seed, trained for a few steps and measured."""

    width: int
    seed: int
    values: Values
    losses: tuple[float, ...]
    problem: str | None = None
    """Why nothing can be concluded from it: where it became non-finite, or that it is not deterministic."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the same run back."""
        values = [[key.quantity.value, key.name, key.step, value] for key, value in self.values.items()]
        return {
            "width": self.width,
            "seed": self.seed,
            "values": values,
            "losses": list(self.losses),
            "problem": self.problem,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "MeasuredRun":
        """Returns the run that `to_json` wrote."""
        values = {Key(Quantity(quantity), name, step): value for quantity, name, step, value in content["values"]}
        return cls(content["width"], content["seed"], values, tuple(content["losses"]), content["problem"])


def typical(values: Sequence[float]) -> float:
    """Returns the geometric mean of one value or more, of seeds; 0 where one of them is."""
    return math.exp(fmean(map(math.log, values))) if min(values) > 0 else 0.0


@dataclass(frozen=True)
class Measurements:
    """All runs of one way to build a model: the subject, the reference or the control."""

    runs: tuple[MeasuredRun, ...]

    @property
    def widths(self) -> list[int]:
        """The widths in rising order."""
        return sorted({run.width for run in self.runs})

    @property
    def problems(self) -> list[str]:
        """The reasons why nothing can be concluded from some of the runs."""
        return [f"width {run.width}, seed {run.seed}: {run.problem}" for run in self.runs if run.problem is not None]

    def at(self, width: int) -> list[MeasuredRun]:
        """Returns the runs of one width."""
        return [run for run in self.runs if run.width == width]

    def typical(self, key: Key, width: int) -> float | None:
        """Returns the geometric mean over seeds; None where it was not measured. 0 where it is 0 for a seed."""
        values = [run.values[key] for run in self.at(width) if key in run.values]
        return typical(values) if values else None

    def keys(self) -> set[Key]:
        """Returns the keys that every run has measured."""
        return set.intersection(*(set(run.values) for run in self.runs)) if self.runs else set()

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values."""
        return [run.to_json() for run in self.runs]

    @classmethod
    def from_json(cls, content: Sequence[Mapping[str, Any]]) -> "Measurements":
        """Returns the measurements that `to_json` wrote."""
        return cls(tuple(MeasuredRun.from_json(run) for run in content))


@dataclass(frozen=True, kw_only=True)
class RunProtocol:
    """The protocol of each run: how it is trained and when it is measured."""

    steps: int
    recorded: tuple[int, ...]
    """After how many steps activations and weights are compared with those at the start."""
    batch_size: int = 4
    spectral: bool = True
    """Whether spectral norms are taken, after the last step."""
    activations: bool = True
    """Whether activations are looked at, beside what the optimizer does."""

    def fingerprint(self) -> str:
        """Changes whenever the protocol does."""
        return json.dumps([self.steps, list(self.recorded), self.batch_size, self.spectral, self.activations])


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped:
    """The values that an optimizer holds for a parameter."""

    lr: float
    """The peak."""
    min_lr: float | None
    """The floor; None where the optimizer does not know it."""
    eps: float | None
    weight_decay: float
